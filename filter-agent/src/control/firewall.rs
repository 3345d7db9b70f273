//! A database's rules in the shape of the provider's API: those of the policy are read, temporary ones made, changed and
//! removed.

use std::net::IpAddr;

use axum::{
    Extension, Json,
    body::Body,
    extract::State,
    http::{
        HeaderMap, StatusCode,
        header::{ETAG, IF_MATCH, LOCATION},
    },
    response::{IntoResponse, Response},
};
use jiff::Timestamp;
use serde::{Deserialize, Deserializer, de::DeserializeOwned};

use super::{
    answers::{Answer, Failed, Params, Place, Written, read_body},
    limits::MAX_CHANGE,
    reads::NoQuery,
    shared::Shared,
};
use crate::{
    event::Request,
    firewall::{self, Condition},
    refusal::Refusal,
    report::{self, By, FirewallAction, RangeType},
    temporary::{Amendment, Change, Kind, New, Until},
};

pub(super) async fn managed_ranges(
    State(shared): State<Shared>,
    Params(NoQuery {}): Params<NoQuery>,
) -> Result<Written, Failed> {
    let ranges = shared.write(|snapshot, _| {
        let ranges = snapshot.managed_ranges();
        Ok(report::ManagedRanges { ranges })
    });
    Ok(ranges.await?)
}

pub(super) async fn list(
    State(shared): State<Shared>,
    Place(database): Place<String>,
    Params(NoQuery {}): Params<NoQuery>,
) -> Result<Response, Failed> {
    let rules = rules(&shared, &database)?;
    let tag = [(ETAG, quoted(&firewall::tag(&rules)))];
    Ok((tag, Json(report::FirewallRules { rules })).into_response())
}

/// The rules of a database, as they are now.
fn rules(shared: &Shared, database: &str) -> Result<Vec<report::FirewallRule>, Failed> {
    // Without a copy: it may hold a million prefixes.
    let snapshot = shared.snapshot.borrow();
    let policy = &snapshot.file.policy;
    let now = shared.clock.now();
    Ok(firewall::rules(policy, &snapshot.timed, now, database)?)
}

pub(super) async fn one(
    State(shared): State<Shared>,
    Place((database, id)): Place<(String, String)>,
    Params(NoQuery {}): Params<NoQuery>,
) -> Answer<report::FirewallRuleOnly> {
    let mut rules = rules(&shared, &database)?.into_iter();
    match rules.find(|rule| rule.id == id) {
        Some(rule) => Ok(Json(report::FirewallRuleOnly { rule })),
        None => {
            let error = format!("database {database} has no rule {id}");
            Err(Refusal::NotFound(error).into())
        }
    }
}

/// A rule that is to be made.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewRule {
    #[serde(default, rename = "type")]
    of: RangeType,
    cidr: Option<String>,
    range_id: Option<String>,
    label: Option<String>,
    #[serde(default)]
    action: FirewallAction,
    expires: Option<Timestamp>,
    seconds: Option<u64>,
    caller: Option<IpAddr>,
}

pub(super) async fn create(
    State(shared): State<Shared>,
    Extension(by): Extension<Option<By>>,
    Place(database): Place<String>,
    Params(NoQuery {}): Params<NoQuery>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Failed> {
    let condition = condition(&headers)?;
    let rule: NewRule = read_json(body).await?;
    if rule.of == RangeType::ManagedRange || rule.range_id.is_some() {
        let error = "a rule made here names a network by `cidr`: a managed range belongs into the policy file";
        return Err(Refusal::Unprocessable(error.into()).into());
    }
    let Some(source) = rule.cidr else {
        return Err(Refusal::Unprocessable("a rule needs a `cidr`".into()).into());
    };
    let Some(end) = until(rule.expires, rule.seconds)? else {
        let error = "a rule made here is temporary and needs an end, `expires` or `seconds`: one without belongs into the \
                     policy file";
        return Err(Refusal::Unprocessable(error.into()).into());
    };
    let place = format!("/v1/databases/{database}/firewall_rules");
    let change = Change::Create(New {
        database,
        kind: match rule.action {
            FirewallAction::Allow => Kind::Allow,
            FirewallAction::Block => Kind::Block,
        },
        source,
        label: rule.label,
        end,
    });
    let made = shared.ask(|reply| Request::Temporary {
        change,
        condition,
        caller: rule.caller,
        by,
        reply,
    });
    let made = made.await?;
    let tag = [(ETAG, quoted(&made.tag))];
    let id = made.rule.as_ref().map(|rule| rule.id.as_str());
    match id {
        Some(id) if made.changed => {
            let location = [(LOCATION, format!("{place}/{id}"))];
            Ok((StatusCode::CREATED, tag, location, Json(made)).into_response())
        }
        _ => Ok((tag, Json(made)).into_response()),
    }
}

/// What is to become of a rule.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleChange {
    /// `null`: none.
    #[serde(default, deserialize_with = "given")]
    label: Option<Option<String>>,
    expires: Option<Timestamp>,
    seconds: Option<u64>,
    caller: Option<IpAddr>,
}

/// Tells `null` from a field that is left out.
fn given<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Option<String>>, D::Error> {
    Deserialize::deserialize(from).map(Some)
}

pub(super) async fn amend(
    State(shared): State<Shared>,
    Extension(by): Extension<Option<By>>,
    Place((database, id)): Place<(String, String)>,
    Params(NoQuery {}): Params<NoQuery>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Failed> {
    let condition = condition(&headers)?;
    let wanted: RuleChange = read_json(body).await?;
    let end = until(wanted.expires, wanted.seconds)?;
    let change = Change::Amend(Amendment {
        database,
        id,
        label: wanted.label,
        end,
    });
    let changed = shared.ask(|reply| Request::Temporary {
        change,
        condition,
        caller: wanted.caller,
        by,
        reply,
    });
    let changed = changed.await?;
    let tag = [(ETAG, quoted(&changed.tag))];
    Ok((tag, Json(changed)).into_response())
}

pub(super) async fn remove(
    State(shared): State<Shared>,
    Extension(by): Extension<Option<By>>,
    Place((database, id)): Place<(String, String)>,
    Params(NoQuery {}): Params<NoQuery>,
    headers: HeaderMap,
) -> Result<Response, Failed> {
    let condition = condition(&headers)?;
    let removed = shared.ask(|reply| Request::Temporary {
        change: Change::Remove { database, id },
        condition,
        caller: None,
        by,
        reply,
    });
    let tag = [(ETAG, quoted(&removed.await?.tag))];
    Ok((StatusCode::NO_CONTENT, tag).into_response())
}

async fn read_json<T: DeserializeOwned>(body: Body) -> Result<T, Failed> {
    let body = read_body(body, MAX_CHANGE, "read the rule").await?;
    let rule = serde_json::from_slice(&body);
    rule.map_err(|error| Refusal::Invalid(format!("read the rule: {error}")).into())
}

/// The end that is asked for.
///
/// # Errors
/// It is asked for in two ways.
fn until(expires: Option<Timestamp>, seconds: Option<u64>) -> Result<Option<Until>, Failed> {
    match (expires, seconds) {
        (Some(_), Some(_)) => {
            let error = "a rule has one end: `expires` or `seconds`, not both";
            Err(Refusal::Unprocessable(error.into()).into())
        }
        (Some(at), None) => Ok(Some(Until::At(at))),
        (None, Some(seconds)) => Ok(Some(Until::After(seconds))),
        (None, None) => Ok(None),
    }
}

fn quoted(tag: &str) -> String {
    format!("\"{tag}\"")
}

/// Reads `If-Match`.
///
/// # Errors
/// What stands there is no list of tags.
fn condition(headers: &HeaderMap) -> Result<Option<Condition>, Failed> {
    let mut given = headers.get_all(IF_MATCH).iter().peekable();
    if given.peek().is_none() {
        return Ok(None);
    }
    let invalid = || Refusal::Invalid("If-Match takes `*` or tags in double quotes".into());
    let mut tags = Vec::new();
    for value in given {
        for tag in value.to_str().map_err(|_| invalid())?.split(',') {
            let tag = tag.trim();
            let quoted = tag.strip_prefix("W/").unwrap_or(tag);
            let inside = quoted.strip_prefix('"').and_then(|t| t.strip_suffix('"'));
            match inside {
                _ if tag == "*" => return Ok(Some(Condition::Any)),
                // A weak tag is equal to none here.
                Some(_) if tag.starts_with("W/") => {}
                Some(inside) => tags.push(inside.to_owned()),
                None => return Err(invalid().into()),
            }
        }
    }
    Ok(Some(Condition::OneOf(tags)))
}
