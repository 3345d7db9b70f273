//! Requests that change what is enforced, and the plan of such a change.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use axum::{Extension, Json, body::Body, extract::State};
use serde::Deserialize;

use super::{
    answers::{Answer, Params, read_body},
    limits::MAX_CHANGE,
    reads::NoQuery,
    shared::Shared,
};
use crate::{
    event::{ReloadOptions, Request},
    policy_file::MAX_LENGTH,
    refusal::Refusal,
    report::{self, By},
    temporary::Change,
    window,
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CallerQuery {
    /// The address of who asks; `None`: not known.
    caller: Option<IpAddr>,
}

pub(super) async fn plan(
    State(shared): State<Shared>,
    Params(query): Params<CallerQuery>,
) -> Answer<report::Plan> {
    let plan = shared.ask(|reply| Request::Plan {
        text: None,
        path: None,
        caller: query.caller,
        reply,
    });
    Ok(Json(plan.await?))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PlanQuery {
    /// Names the text in messages.
    file: PathBuf,
    caller: Option<IpAddr>,
}

pub(super) async fn plan_text(
    State(shared): State<Shared>,
    Params(query): Params<PlanQuery>,
    body: Body,
) -> Answer<report::Plan> {
    let text = read_body(body, MAX_LENGTH as usize, "read the policy").await?;
    let text = String::from_utf8(text.into())
        .map_err(|_| Refusal::Invalid("read the policy: it is not UTF-8".into()))?;
    let plan = shared.ask(|reply| Request::Plan {
        text: Some(text),
        path: Some(query.file),
        caller: query.caller,
        reply,
    });
    Ok(Json(plan.await?))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ReloadQuery {
    #[serde(default)]
    existing: bool,
    #[serde(default)]
    allow_unprotect: bool,
    max_cut: Option<usize>,
    /// Seconds after which the agent falls back, unless the policy is confirmed.
    confirm: Option<u64>,
    /// SHA-256 of the text that is meant.
    #[serde(rename = "if")]
    if_hash: Option<String>,
    caller: Option<IpAddr>,
}

pub(super) async fn reload(
    State(shared): State<Shared>,
    Extension(by): Extension<Option<By>>,
    Params(query): Params<ReloadQuery>,
) -> Answer<report::Reloaded> {
    let confirm = query.confirm.map(Duration::from_secs);
    if let Some(lasting) = confirm {
        window::check_lasting(lasting).map_err(Refusal::Invalid)?;
        if query.existing {
            let why = "`existing` resets connections, which cannot be taken back: without `confirm`, or once it is confirmed";
            return Err(Refusal::Invalid(why.into()).into());
        }
    }
    let options = ReloadOptions {
        confirm,
        if_hash: query.if_hash,
        existing: query.existing,
        allow_unprotect: query.allow_unprotect,
        max_cut: query.max_cut,
        caller: query.caller,
        by,
    };
    let reloaded = shared.ask(|reply| Request::Reload { options, reply });
    Ok(Json(reloaded.await?))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RollbackQuery {
    /// The id of a change; `None`: the policy that was confirmed before the one in force.
    to: Option<u64>,
    #[serde(default)]
    allow_unprotect: bool,
    max_cut: Option<usize>,
    caller: Option<IpAddr>,
}

pub(super) async fn rollback(
    State(shared): State<Shared>,
    Extension(by): Extension<Option<By>>,
    Params(query): Params<RollbackQuery>,
) -> Answer<report::Reloaded> {
    let options = ReloadOptions {
        allow_unprotect: query.allow_unprotect,
        max_cut: query.max_cut,
        caller: query.caller,
        by,
        ..ReloadOptions::default()
    };
    let to = query.to;
    let reloaded = shared.ask(|reply| Request::Rollback { to, options, reply });
    Ok(Json(reloaded.await?))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ConfirmQuery {
    /// `None`: whichever change is tried.
    id: Option<u64>,
    /// Enforce the confirmed policy again instead.
    #[serde(default)]
    fall_back: bool,
}

pub(super) async fn confirm(
    State(shared): State<Shared>,
    Extension(by): Extension<Option<By>>,
    Params(query): Params<ConfirmQuery>,
) -> Answer<report::Decided> {
    let decided = shared.ask(|reply| Request::Confirm {
        id: query.id,
        fall_back: query.fall_back,
        by,
        reply,
    });
    Ok(Json(decided.await?))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RefreshQuery {
    /// `None`: every region.
    region: Option<String>,
    #[serde(default)]
    accept: bool,
}

pub(super) async fn refresh(
    State(shared): State<Shared>,
    Params(query): Params<RefreshQuery>,
) -> Answer<report::Refreshes> {
    let refreshed = shared.ask(|reply| Request::Refresh {
        region: query.region,
        accept: query.accept,
        reply,
    });
    let regions = refreshed.await?;
    Ok(Json(report::Refreshes { regions }))
}

pub(super) async fn temporary(
    State(shared): State<Shared>,
    Extension(by): Extension<Option<By>>,
    Params(NoQuery {}): Params<NoQuery>,
    body: Body,
) -> Answer<report::Temporary> {
    let body = read_body(body, MAX_CHANGE, "read the change").await?;
    let (change, caller) = read_change(&body)
        .map_err(|error| Refusal::Invalid(format!("read the change: {error}")))?;
    let changed = shared.ask(|reply| Request::Temporary {
        change,
        condition: None,
        caller,
        by,
        reply,
    });
    Ok(Json(changed.await?))
}

/// Reads a change, and the address of who asks for it, which may stand beside it.
fn read_change(body: &[u8]) -> serde_json::Result<(Change, Option<IpAddr>)> {
    let mut fields: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(body)?;
    let caller = fields.remove("caller").unwrap_or_default();
    let caller = serde_json::from_value(caller)?;
    let change = serde_json::from_value(fields.into())?;
    Ok((change, caller))
}

pub(super) async fn detach(
    State(shared): State<Shared>,
    Extension(by): Extension<Option<By>>,
    Params(NoQuery {}): Params<NoQuery>,
) -> Answer<report::Detached> {
    let names = shared.ask(|reply| Request::Detach { by, reply });
    let interfaces = names.await?;
    Ok(Json(report::Detached { interfaces }))
}
