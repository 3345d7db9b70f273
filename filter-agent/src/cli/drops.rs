//! `drops`: the sources whose packets were dropped.

use std::{
    collections::BTreeMap,
    io::{self, Write as _},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result};
use jiff::Timestamp;

use crate::{
    cli::{
        client::Agent,
        output::{EXIT_BROKEN_PIPE, LISTED, age, or, print_table, table},
    },
    report::{self, Drops},
};

pub(super) fn print_drops(drops: &Drops) {
    let mut table = table([
        "DATABASE",
        "SOURCE",
        "REASON",
        "PACKETS",
        "FIRST SEEN",
        "LAST SEEN",
        "HINT",
    ]);
    for dropped in &drops.sources {
        table.add_row([
            or_any(&dropped.database).to_owned(),
            source(dropped),
            reason(&dropped.reason, dropped.monitor),
            dropped.packets.to_string(),
            dropped.first_seen.map_or("-".into(), ago),
            ago(dropped.last_seen),
            hint(dropped),
        ]);
    }
    print_table(&table, drops.sources.len());
    if drops.left_out > 0 {
        say!("and {} more (see --limit)", drops.left_out);
    }
    for allow in drops.sources.iter().filter_map(|d| d.allow.as_ref()) {
        say!("to let it in: {allow}");
    }
    drops.unsampled.iter().for_each(print_unsampled);
    if drops.sources.is_empty() && drops.unsampled.is_empty() {
        let since = age(drops.since);
        say!("no packet was dropped since the agent started {since} ago");
    }
}

fn ago(at: Timestamp) -> String {
    format!("{} ago", age(at))
}

/// The first bytes of a refused connection, in words, and the hint about its source.
fn hint(dropped: &report::Dropped) -> String {
    let opening = dropped.opening.iter();
    let parts: Vec<&str> = opening.chain(&dropped.hint).map(String::as_str).collect();
    or(&parts.join("; "), "-")
}

fn print_unsampled(more: &report::Unsampled) {
    let (database, reason) = (or_any(&more.database), reason(&more.reason, more.monitor));
    say!(
        "{database}: {} more packets, {reason}, whose sources were not sampled",
        more.packets
    );
}

fn or_any(database: &Option<String>) -> &str {
    database.as_deref().unwrap_or("any")
}

fn source(dropped: &report::Dropped) -> String {
    let source = dropped.source.map(|source| source.to_string());
    source.unwrap_or_else(|| "unknown".into())
}

fn reason(reason: &str, monitor: bool) -> String {
    let monitor = if monitor { ", only monitored" } else { "" };
    format!("{reason}{monitor}")
}

/// Prints new drops every second, until the agent or the reader of the output ends.
pub(super) async fn follow_drops(
    mut before: Drops,
    agent: &Agent<'_>,
    path: &str,
    json: bool,
) -> Result<ExitCode> {
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let now: Drops = agent.get(path).await?;
        let new = newer(&before, &now);
        let mut lines = Vec::new();
        if json {
            for dropped in &new {
                lines.push(serde_json::to_string(dropped).context("write JSON")?);
            }
        } else {
            lines.extend(new.iter().take(LISTED).map(line));
            if new.len() > LISTED {
                lines.push(format!("and {} more", new.len() - LISTED));
            }
        }
        let mut stdout = io::stdout();
        let written = lines.iter().try_for_each(|line| writeln!(stdout, "{line}"));
        match written {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                return Ok(ExitCode::from(EXIT_BROKEN_PIPE as u8));
            }
            written => written.context("write to standard output")?,
        }
        before = now;
    }
}

fn line(dropped: &report::Dropped) -> String {
    format!(
        "{:.0} {} {} {} {}",
        dropped.last_seen,
        or_any(&dropped.database),
        source(dropped),
        dropped.packets,
        reason(&dropped.reason, dropped.monitor)
    )
}

/// The sources whose packets were dropped between two reports, with the packets since the first.
fn newer(before: &Drops, now: &Drops) -> Vec<report::Dropped> {
    let who = |dropped: &report::Dropped| {
        let database = dropped.database.clone();
        (
            database,
            dropped.source,
            dropped.reason.clone(),
            dropped.monitor,
        )
    };
    let before: BTreeMap<_, u64> = before
        .sources
        .iter()
        .map(|dropped| (who(dropped), dropped.packets))
        .collect();
    let mut new = now.sources.clone();
    for dropped in &mut new {
        dropped.packets -= before
            .get(&who(dropped))
            .copied()
            .unwrap_or_default()
            .min(dropped.packets);
    }
    new.retain(|dropped| dropped.packets > 0);
    new
}
