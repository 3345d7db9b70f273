//! Requests that only read.

use std::net::IpAddr;

use axum::{Json, extract::State, http::header::CONTENT_TYPE, response::IntoResponse};
use jiff::Timestamp;
use prometheus::TEXT_FORMAT;
use serde::Deserialize;

use super::{
    answers::{Answer, Failed, Params, Written},
    shared::Shared,
};
use crate::{
    drops::Wanted, enforcer::drops::Found, hints, history::Wanted as Past, log::recent,
    refusal::Refusal, region::state as region, report, temporary::parse_source,
};

/// For requests that have no parameters.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NoQuery {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StatusQuery {
    #[serde(default)]
    verify: bool,
}

pub(super) async fn status(
    State(shared): State<Shared>,
    Params(query): Params<StatusQuery>,
) -> Result<Written, Failed> {
    let observed = shared.observe(query.verify).await?;
    let listener = shared.scraper.listener.borrow().clone();
    let status = shared.write(move |snapshot, now| {
        let mut status = snapshot.status(&observed, now);
        status.errors.extend(listener);
        Ok(status)
    });
    Ok(status.await?)
}

pub(super) async fn metrics(
    State(shared): State<Shared>,
    Params(NoQuery {}): Params<NoQuery>,
) -> Result<impl IntoResponse, Failed> {
    let text = shared.scraper.text().await;
    let text = text.map_err(Refusal::Unavailable)?;
    Ok(([(CONTENT_TYPE, TEXT_FORMAT)], text))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DatabaseQuery {
    /// `None`: every database.
    database: Option<String>,
}

pub(super) async fn rules(
    State(shared): State<Shared>,
    Params(query): Params<DatabaseQuery>,
) -> Result<Written, Failed> {
    let observed = shared.observe(false).await?;
    let rules = shared.write(move |snapshot, now| {
        let regions = region::prefixes(&snapshot.regions);
        let rules = observed.rules(query.database.as_deref(), Some(&regions), now)?;
        Ok(report::Rules { rules })
    });
    Ok(rules.await?)
}

pub(super) async fn regions(
    State(shared): State<Shared>,
    Params(NoQuery {}): Params<NoQuery>,
) -> Result<Written, Failed> {
    let regions = shared.write(|snapshot, _| {
        let regions = snapshot.regions();
        Ok(report::Regions { regions })
    });
    Ok(regions.await?)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ExplainQuery {
    source: IpAddr,
    database: Option<String>,
}

pub(super) async fn explain(
    State(shared): State<Shared>,
    Params(query): Params<ExplainQuery>,
) -> Answer<report::Verdicts> {
    let ExplainQuery { source, database } = query;
    // As a server on a socket for both families names an IPv4 client.
    let source = source.to_canonical();
    let explained = shared.call(move |enforcer| enforcer.explain(source, database.as_deref()));
    let verdicts = explained.await?;
    Ok(Json(report::Verdicts { verdicts }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DropsQuery {
    database: Option<String>,
    /// An address or a prefix.
    source: Option<String>,
    limit: Option<usize>,
    hints: Option<bool>,
}

pub(super) async fn drops(
    State(shared): State<Shared>,
    Params(query): Params<DropsQuery>,
) -> Result<Written, Failed> {
    let source = query.source.as_deref().map(parse_source).transpose();
    let source = source.map_err(|error| Refusal::or(error, Refusal::Invalid))?;
    let wanted = Wanted {
        database: query.database,
        source,
        limit: query.limit,
    };
    let found = shared.call(move |enforcer| enforcer.drops(&wanted));
    let mut found = found.await?;
    let drops = shared.write(move |snapshot, now| {
        let Found {
            drops,
            in_force,
            ended,
        } = &mut found;
        if query.hints != Some(false) {
            hints::add(drops, in_force, &snapshot.regions, ended, now);
        }
        Ok(found.drops)
    });
    Ok(drops.await?)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct HistoryQuery {
    /// Only this change.
    id: Option<u64>,
    database: Option<String>,
    since: Option<Timestamp>,
    limit: Option<usize>,
    /// Whether the text of the policy is wanted, too.
    #[serde(default)]
    text: bool,
}

pub(super) async fn history(
    State(shared): State<Shared>,
    Params(query): Params<HistoryQuery>,
) -> Result<Written, Failed> {
    let HistoryQuery {
        id,
        database,
        since,
        limit,
        text,
    } = query;
    let text_of = match (text, id) {
        (false, _) => None,
        (true, Some(id)) => Some(id),
        (true, None) => {
            let error = "the text of which policy: name its `id`, too";
            return Err(Refusal::Invalid(error.into()).into());
        }
    };
    let wanted = Past {
        id,
        database,
        since,
        limit,
    };
    let listed = shared.write(move |snapshot, _| {
        let mut listing = snapshot.history.list(&wanted)?;
        listing.text = text_of
            .map(|id| snapshot.history.shown_text(id))
            .transpose()?;
        Ok(listing)
    });
    Ok(listed.await?)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct EventsQuery {
    /// Leaves out the lines up to this number.
    #[serde(default)]
    after: u64,
}

pub(super) async fn events(Params(query): Params<EventsQuery>) -> Json<report::Events> {
    Json(recent::after(query.after))
}
