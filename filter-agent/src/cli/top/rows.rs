//! From reports to the rows of the panes. Pure.

use std::collections::{BTreeMap, HashMap, VecDeque};

use jiff::Timestamp;

use crate::{
    cli::{
        print::{by, with_addresses, with_monitor},
        top::{
            numbers::{rate, seconds_since, short, short_duration},
            rates::Rates,
            state::{Growth, Wanted},
        },
    },
    report::{Database, Logged, Origin, Region, Rule, Status},
};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Mark {
    #[default]
    None,
    Warning,
    Error,
}

/// A line of a pane.
#[derive(Debug, Default)]
pub(super) struct Row {
    /// The same in the next look, wherever the row is then.
    pub(super) id: String,
    /// One for each of the pane's columns.
    pub(super) cells: Vec<String>,
    /// The whole of it in words, for when it is chosen.
    pub(super) detail: String,
    pub(super) mark: Mark,
    /// Of a refused source: what `allow` would let in, or why it would not help.
    pub(super) allow: Option<Result<Wanted, String>>,
}

pub(super) fn databases(status: &Status, growth: &Growth, only: Option<&str>) -> Vec<Row> {
    let databases = status.databases.iter();
    let mut rows: Vec<Row> = databases
        .filter(|database| only.is_none_or(|only| database.name == only))
        .map(|database| of_database(database, growth))
        .collect();
    let unattributed: u64 = status.unattributed.values().sum();
    if unattributed > 0 && only.is_none() {
        rows.push(Row {
            id: String::new(),
            cells: vec![
                "any".into(),
                String::new(),
                String::new(),
                String::new(),
                rate(growth.dropped.of(&None)),
                String::new(),
                short(unattributed),
                "which one is not known".into(),
            ],
            detail: format!(
                "dropped packets that could be for any database: {}",
                by_reason(&status.unattributed)
            ),
            ..Row::default()
        });
    }
    rows
}

fn of_database(database: &Database, growth: &Growth) -> Row {
    let name = &database.name;
    let mut notes = Vec::new();
    if database.monitor {
        let would = rate(growth.would_drop.of(name));
        notes.push(format!("would drop {would}/s"));
    }
    if database.suspended > 0 {
        notes.push(format!("{} suspended", database.suspended));
    }
    if database.temporary > 0 {
        notes.push(format!("{} temporary", database.temporary));
    }
    if database.blocks > 0 {
        notes.push(format!("{} blocked", database.blocks));
    }
    let ports = with_addresses(&database.ports, &database.addresses);
    let counted = [
        ("dropped", &database.dropped),
        ("would drop", &database.would_drop),
        ("connections", &database.connections),
        ("monitored connections", &database.monitored_connections),
    ];
    let counted = counted.iter().filter(|(_, counts)| !counts.is_empty());
    let counted = counted.map(|(what, counts)| format!("; {what}: {}", by_reason(counts)));
    let detail = format!(
        "{name}: {ports}, {}, {} rules, {} prefixes; passed: {}{}",
        with_monitor(&database.model, database.monitor),
        database.rules,
        database.prefixes,
        database.passed,
        counted.collect::<String>(),
    );
    Row {
        id: name.clone(),
        cells: vec![
            name.clone(),
            ports,
            database.rules.to_string(),
            rate(growth.passed.of(name)),
            rate(growth.dropped.of(&Some(name.clone()))),
            short(database.passed),
            short(database.dropped.values().sum()),
            notes.join(", "),
        ],
        detail,
        mark: match database.suspended > 0 {
            true => Mark::Warning,
            false => Mark::None,
        },
        allow: None,
    }
}

fn by_reason(counts: &BTreeMap<String, u64>) -> String {
    let counts = counts.iter().filter(|(_, count)| **count > 0);
    let counts: Vec<String> = counts
        .map(|(reason, count)| format!("{reason} {count}"))
        .collect();
    match counts.is_empty() {
        true => "0".into(),
        false => counts.join(", "),
    }
}

/// Ids of the rules: their places change when others come and go.
pub(super) fn rule_ids(rules: &[Rule]) -> Vec<String> {
    let mut times = HashMap::<String, usize>::new();
    let id = |rule: &Rule| {
        let Rule {
            database,
            origin,
            source,
            ..
        } = rule;
        let id = format!("{database} {origin:?} {source}");
        let time = times.entry(id.clone()).or_default();
        *time += 1;
        format!("{id} {time}")
    };
    rules.iter().map(id).collect()
}

/// Those with the highest rate first, then those with most hits.
pub(super) fn rules(rules: &[Rule], hits: &Rates<String>, only: Option<&str>) -> Vec<Row> {
    let ids = rule_ids(rules).into_iter().zip(rules);
    let shown = ids.filter(|(_, rule)| only.is_none_or(|only| rule.database == only));
    let mut shown: Vec<(String, &Rule)> = shown.collect();
    shown.sort_by(|(a_id, a), (b_id, b)| {
        let rate = |id| hits.of(id).unwrap_or_default();
        let rates = rate(b_id).total_cmp(&rate(a_id));
        rates.then(b.hits.cmp(&a.hits))
    });
    let row = |(id, rule): (String, &Rule)| {
        let source = match rule.origin {
            Origin::Block => format!("block {}", rule.source),
            _ => rule.source.clone(),
        };
        let left = match (rule.expired, rule.suspended, rule.left) {
            (true, _, _) => "ended".into(),
            (_, true, _) => "suspended".into(),
            (_, _, Some(left)) => short_duration(left),
            (_, _, None) => String::new(),
        };
        let label = rule.label.clone().unwrap_or_default();
        let number = rule.number.map(|number| format!(" {number}"));
        let except: Vec<String> = rule.except.iter().map(ToString::to_string).collect();
        let notes = [
            (!except.is_empty()).then(|| format!("except {}", except.join(", "))),
            rule.expires.map(|expires| format!("until {expires:.0}")),
            rule.by.as_ref().map(by),
            rule.label.clone(),
        ];
        let notes = notes.into_iter().flatten().map(|note| format!("; {note}"));
        Row {
            cells: vec![
                source.clone(),
                rule.database.clone(),
                rate(hits.of(&id)),
                short(rule.hits),
                left,
                label,
            ],
            detail: format!(
                "{}: rule{} {source}, {} hits, {} prefixes{}",
                rule.database,
                number.unwrap_or_default(),
                rule.hits,
                rule.prefixes,
                notes.collect::<String>()
            ),
            mark: match rule.suspended {
                true => Mark::Warning,
                false => Mark::None,
            },
            allow: None,
            id,
        }
    };
    shown.into_iter().map(row).collect()
}

/// The regions that rules name, those whose look-up failed first.
pub(super) fn regions(
    regions: &[Region],
    rules: &[Rule],
    only: Option<&str>,
    now: Timestamp,
) -> Vec<Row> {
    let is_named = |region: &Region, database: &str| {
        let source = format!("region {}", region.name);
        let mut rules = rules.iter();
        rules.any(|rule| rule.database == database && rule.source == source)
    };
    let used = regions.iter().filter(|region| region.used);
    let shown = used.filter(|region| only.is_none_or(|only| is_named(region, only)));
    let mut shown: Vec<&Region> = shown.collect();
    shown.sort_by_key(|region| !region.failing);
    let row = |region: &Region| {
        let age = region.confirmed.map(|at| seconds_since(at, now));
        let age = age.map_or("never".into(), |age| short_duration(age.unsigned_abs()));
        let next = region.next.map(|at| seconds_since(now, at).max(0));
        let next = next.map_or("-".into(), |left| short_duration(left.unsigned_abs()));
        let (last, mark) = match (region.failing, region.confirmed) {
            (true, _) if region.partial => ("PARTLY", Mark::Warning),
            (true, _) => ("FAILED", Mark::Error),
            (false, None) => ("under way", Mark::Warning),
            (false, Some(_)) => ("good", Mark::None),
        };
        let error = region.error.as_ref();
        let current = error.filter(|_| region.failing);
        let current = current.map(|error| error.text.clone()).unwrap_or_default();
        let error = error.map(|error| {
            let resolved = if region.failing { "" } else { ", resolved" };
            let ago = short_duration(seconds_since(error.at, now).unsigned_abs());
            format!("; last error {ago} ago{resolved}: {}", error.text)
        });
        let change = region.change.as_ref().and_then(|change| change.at);
        let change = change.map(|at| {
            let ago = short_duration(seconds_since(at, now).unsigned_abs());
            format!("; last change {ago} ago")
        });
        Row {
            id: region.name.clone(),
            detail: format!(
                "{}: {}, {} prefixes, {} retiring{}{}",
                region.name,
                region.source,
                region.prefixes.len(),
                region.retiring.len(),
                error.unwrap_or_default(),
                change.unwrap_or_default()
            ),
            cells: vec![
                region.name.clone(),
                region.prefixes.len().to_string(),
                age,
                next,
                last.into(),
                current,
            ],
            mark,
            allow: None,
        }
    };
    shown.into_iter().map(row).collect()
}

/// The latest first. Lines that name another database are left out.
pub(super) fn events(events: &VecDeque<Logged>, only: Option<&str>, now: Timestamp) -> Vec<Row> {
    let is_shown = |event: &&Logged| {
        let database = event.fields.get("DATABASE");
        only.is_none_or(|only| database.is_none_or(|database| database == only))
    };
    let row = |event: &Logged| {
        let day = |at: Timestamp| at.strftime("%F").to_string();
        let time = match day(event.at) == day(now) {
            true => event.at.strftime("%TZ"),
            false => event.at.strftime("%b %d"),
        };
        Row {
            id: event.number.to_string(),
            cells: vec![time.to_string(), event.level.clone(), event.text.clone()],
            detail: format!("{:.0} {}: {}", event.at, event.level, event.text),
            mark: match &*event.level {
                "error" => Mark::Error,
                "warning" => Mark::Warning,
                _ => Mark::None,
            },
            allow: None,
        }
    };
    events.iter().rev().filter(is_shown).map(row).collect()
}
