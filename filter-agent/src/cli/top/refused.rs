//! From reports to the rows of the sources whose packets were dropped. Pure.

use std::cmp::Reverse;

use ipnet::IpNet;
use jiff::Timestamp;

use super::{
    numbers::{seconds_since, short, short_duration},
    rows::{Mark, Row},
    state::Wanted,
};
use crate::{
    cli::print::with_monitor,
    report::{Dropped, Drops, Origin, Rule},
};

/// Sources that sent a packet within so many seconds are listed first.
const RECENT: i64 = 60;

/// Sources of the last minute first, those with most packets at the top; then the others, the latest first.
pub(super) fn refused(
    drops: &Drops,
    rules: &[Rule],
    only: Option<&str>,
    now: Timestamp,
) -> Vec<Row> {
    let is_shown = |database: &Option<String>| {
        only.is_none_or(|only| database.as_ref().is_none_or(|name| name == only))
    };
    let sources = drops.sources.iter();
    let mut sources: Vec<&Dropped> = sources.filter(|one| is_shown(&one.database)).collect();
    sources.sort_by_cached_key(|dropped| {
        let age = seconds_since(dropped.last_seen, now);
        let age = if age <= RECENT { 0 } else { age };
        (age, Reverse(dropped.packets), who(dropped))
    });
    let mut rows: Vec<Row> = sources
        .iter()
        .map(|dropped| of_source(dropped, rules, now))
        .collect();
    let unsampled = drops.unsampled.iter();
    rows.extend(
        unsampled
            .filter(|more| is_shown(&more.database))
            .map(|more| {
                let database = or_any(&more.database);
                let reason = with_monitor(&more.reason, more.monitor);
                Row {
                    id: format!("unsampled {database} {reason}"),
                    detail: format!(
                        "{database}: {} more packets, {reason}, whose sources were not sampled",
                        more.packets
                    ),
                    cells: vec![
                        "not sampled".into(),
                        database,
                        reason,
                        short(more.packets),
                        String::new(),
                        String::new(),
                    ],
                    mark: Mark::None,
                    allow: Some(Err("the sources of these packets are not known".into())),
                }
            }),
    );
    rows
}

fn who(dropped: &Dropped) -> String {
    let Dropped {
        database,
        source,
        reason,
        monitor,
        ..
    } = dropped;
    format!("{database:?} {source:?} {reason} {monitor}")
}

fn of_source(dropped: &Dropped, rules: &[Rule], now: Timestamp) -> Row {
    let database = or_any(&dropped.database);
    let source = dropped.source.map(|source| source.to_string());
    let source = source.unwrap_or_else(|| "unknown".into());
    let reason = with_monitor(&dropped.reason, dropped.monitor);
    let ago = short_duration(seconds_since(dropped.last_seen, now).unsigned_abs());
    let left = allowed_for(dropped, rules);
    let note = left.as_ref().map(|left| format!("allowed for {left}"));
    let allowed = left.map(|left| format!("; a temporary rule allows it now, for {left} more"));
    let detail = format!(
        "{source} to {database}: {reason}, at least {} packets, the last {ago} ago{}",
        dropped.packets,
        allowed.unwrap_or_default(),
    );
    Row {
        id: who(dropped),
        cells: vec![
            source,
            database,
            reason,
            short(dropped.packets),
            ago,
            note.unwrap_or_default(),
        ],
        detail,
        mark: Mark::None,
        allow: Some(may_allow(dropped)),
    }
}

/// The rule that `allow` would add, or why it would not help.
fn may_allow(dropped: &Dropped) -> Result<Wanted, String> {
    let Some(source) = dropped.source else {
        return Err("the source address of these packets could not be read".into());
    };
    let Some(database) = dropped.database.clone() else {
        return Err(format!("which database {source} wanted is not known"));
    };
    match &*dropped.reason {
        "not-allowed" => Ok(Wanted { database, source }),
        "blocked" => Err(format!(
            "{source} is blocked from {database}, which wins over every rule: `filter-agent revoke` ends a block"
        )),
        reason => Err(format!(
            "packets of {source} are dropped as {reason}, whatever the rules say"
        )),
    }
}

/// Time left of a temporary rule that allows the source by now.
fn allowed_for(dropped: &Dropped, rules: &[Rule]) -> Option<String> {
    let source = dropped.source.filter(|_| dropped.reason == "not-allowed")?;
    let rules = rules.iter().filter(|rule| {
        let holds = |net: IpNet| net.contains(&source);
        Some(&rule.database) == dropped.database.as_ref()
            && !rule.expired
            && !rule.suspended
            && rule.source.parse().is_ok_and(holds)
    });
    let rules: Vec<&Rule> = rules.collect();
    if rules.iter().any(|rule| rule.origin == Origin::Block) {
        return None;
    }
    let temporary = rules.iter().filter(|rule| rule.origin == Origin::Temporary);
    Some(short_duration(
        temporary.filter_map(|rule| rule.left).max()?,
    ))
}

fn or_any(database: &Option<String>) -> String {
    database.clone().unwrap_or_else(|| "any".into())
}
