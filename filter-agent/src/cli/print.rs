//! The texts that commands print.

use std::{collections::BTreeMap, net::IpAddr};

use filter_common::Reason;
use ipnet::IpNet;
use jiff::Unit;

use crate::{
    cli::output::{LISTED, age, list, or, print_table, table, until},
    kernel::difference::Difference,
    report::{self, By, Explanation, Plan, Refreshed, Reloaded, Status},
};

pub(super) fn with_addresses(ports: &[String], addresses: &[IpAddr]) -> String {
    let ports = ranges(ports).join(", ");
    if addresses.is_empty() {
        return ports;
    }
    let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    format!("{ports} at {}", addresses.join(", "))
}

/// Ports in the form of reports, `tcp/5432`, with each run of successive ones as a range, `tcp/5432-5440`. Other texts stay
/// as they are.
fn ranges(ports: &[String]) -> Vec<String> {
    let parse = |text: &str| -> Option<(String, u16)> {
        let (protocol, port) = text.split_once('/')?;
        Some((protocol.to_owned(), port.parse().ok()?))
    };
    let mut ranges: Vec<String> = Vec::new();
    // The range at the end of `ranges`: its protocol, first and last port.
    let mut open: Option<(String, u16, u16)> = None;
    for text in ports {
        let parsed = parse(text);
        match (&mut open, &parsed) {
            (Some((protocol, first, last)), Some((next_protocol, next)))
                if protocol == next_protocol && last.checked_add(1) == Some(*next) =>
            {
                *last = *next;
                ranges.pop();
                ranges.push(format!("{protocol}/{first}-{last}"));
            }
            _ => {
                ranges.push(text.clone());
                open = parsed.map(|(protocol, port)| (protocol, port, port));
            }
        }
    }
    ranges
}

/// `1 prefix`, `2 prefixes`.
fn counted(count: usize, one: &str, many: &str) -> String {
    let what = if count == 1 { one } else { many };
    format!("{count} {what}")
}

pub(super) fn with_monitor(model: &str, monitor: bool) -> String {
    let monitor = if monitor { ", monitor" } else { "" };
    format!("{model}{monitor}")
}

pub(super) fn print_warnings(warnings: &[String]) {
    if !warnings.is_empty() {
        say!("");
    }
    for warning in warnings {
        say!("warning: {warning}");
    }
}

pub(super) fn print_plan(plan: &Plan) {
    let mut same = true;
    for name in &plan.attached {
        say!("+ interface {name}");
        same = false;
    }
    for name in &plan.detached {
        say!("- interface {name}");
        same = false;
    }
    print_difference(&plan.difference);
    same &= plan.difference.databases.is_empty();
    for setting in &plan.settings {
        same = false;
        say!("{setting}");
    }
    if same {
        say!("no difference: the kernel enforces {}", plan.file.display());
    }
    print_cut(&plan.cut, &plan.cut_unknown);
    print_warnings(&plan.warnings);
}

fn print_difference(difference: &Difference) {
    for (name, database) in &difference.databases {
        say!("database {name}");
        list("+", "protect ", &ranges(&database.guarded));
        list("-", "protect ", &ranges(&database.unguarded));
        list("+", "", &database.added);
        list("-", "", &database.removed);
        list("+", "block ", &database.blocked);
        list("-", "block ", &database.unblocked);
    }
}

fn print_cut(cut: &[report::Cut], unknown: &[String]) {
    for cut in cut.iter().take(LISTED) {
        say!("{cut}");
    }
    if let Some(more) = cut.len().checked_sub(LISTED).filter(|&more| more > 0) {
        say!("and connections of {more} more sources");
    }
    unknown
        .iter()
        .for_each(|why| say!("open connections: {why}"));
}

/// `which`: what of the file is enforced, as in `an earlier text of `; empty: all of it.
pub(super) fn print_reloaded(reloaded: &Reloaded, which: &str) {
    print_plan(&reloaded.plan);
    say!("");
    let report::Enforced { file, timing, .. } = &reloaded.enforced;
    say!(
        "{which}{} is enforced, in {:.1} ms (compiled in {:.1} ms); change {}",
        file.display(),
        timing.enforced_ms,
        timing.compiled_ms,
        reloaded.id
    );
    print_verified(&reloaded.verified);
    for error in &reloaded.errors {
        say!("error: {error}");
    }
    if let Some(window) = &reloaded.window {
        print_window(window);
    }
}

/// The window of a policy that is tried, and what to type.
fn print_window(window: &report::Window) {
    let id = window.id;
    say!("{window}");
    say!(
        "to keep it: filter-agent confirm {id}; to take it back now: filter-agent confirm {id} --fall-back"
    );
}

pub(super) fn print_decided(decided: &report::Decided) {
    let report::Decided {
        id,
        file,
        difference,
        ..
    } = decided;
    print_difference(difference);
    print_cut(&decided.cut, &decided.cut_unknown);
    let file = file.display();
    match (decided.confirmed, &decided.timing) {
        (true, _) => say!("change {id} is confirmed"),
        (false, Some(timing)) => {
            say!("change {id} is taken back: the policy of {file} before it is {timing}");
        }
        (false, None) => say!("change {id} is taken back"),
    }
    for error in &decided.errors {
        say!("error: {error}");
    }
}

fn print_verified(verified: &report::Verified) {
    let probes = verified.probes;
    if verified.errors.is_empty() {
        say!("verified: the attached program judged {probes} probe packets as the policy does");
    }
    for error in &verified.errors {
        say!("error: {error}");
    }
}

pub(super) fn print_status(status: &Status) {
    let policy = &status.policy;
    say!(
        "filter-agent {}, pid {}, up {}",
        status.version,
        status.pid,
        age(status.started)
    );
    say!(
        "policy {}, accepted {} ago, enforced in {:.1} ms (compiled in {:.1} ms)",
        policy.file.display(),
        age(policy.timing.accepted),
        policy.timing.enforced_ms,
        policy.timing.compiled_ms
    );
    if let Some(expiry) = policy.next_expiry {
        let expiry = expiry.round(Unit::Second).unwrap_or(expiry);
        say!("next rule expires at {expiry}");
    }
    print_verified(&status.verified);
    if let Some(window) = &status.window {
        print_window(window);
    }
    if let Some(tracing) = &status.tracing {
        say!("{tracing}");
    }
    let mut interfaces = table(["INTERFACE", "MODE", "PROGRAM"]);
    for interface in &status.interfaces {
        let program = interface.program_id.map(|id| id.to_string());
        interfaces.add_row([
            interface.name.clone(),
            or(
                interface.mode.as_deref().unwrap_or_default(),
                "NOT FILTERED",
            ),
            or(&program.unwrap_or_default(), "-"),
        ]);
    }
    if !status.interfaces.is_empty() {
        say!("");
    }
    print_table(&interfaces, status.interfaces.len());
    if status.repairs > 0 {
        let times = if status.repairs == 1 { "time" } else { "times" };
        say!(
            "another program detached the filter; it was attached again {} {times}",
            status.repairs
        );
    }
    let header = [
        "DATABASE", "PORTS", "MODEL", "RULES", "PREFIXES", "PASSED", "DROPPED",
    ];
    let mut databases = table(header);
    for database in &status.databases {
        let mut dropped = reasons(&database.dropped);
        if !database.would_drop.is_empty() {
            let would_drop = reasons(&database.would_drop);
            dropped = format!("{dropped} (would drop {would_drop})");
        }
        databases.add_row([
            database.name.clone(),
            with_addresses(&database.ports, &database.addresses),
            with_monitor(&database.model, database.monitor),
            database.rules.to_string(),
            database.prefixes.to_string(),
            database.passed.to_string(),
            dropped,
        ]);
    }
    if !status.databases.is_empty() {
        say!("");
    }
    print_table(&databases, status.databases.len());
    for database in &status.databases {
        let parts = [
            (database.temporary, "temporary rule", "temporary rules"),
            (database.blocks, "block", "blocks"),
            (database.suspended, "suspended rule", "suspended rules"),
        ];
        let there = parts.into_iter().filter(|(count, ..)| *count > 0);
        let there = there.map(|(count, one, many)| counted(count, one, many));
        let there: Vec<String> = there.collect();
        if !there.is_empty() {
            say!("{}: {}", database.name, there.join(", "));
        }
    }
    for database in status
        .databases
        .iter()
        .filter(|database| database.force_tls)
    {
        let mut connections = reasons(&database.connections);
        if !database.monitored_connections.is_empty() {
            let monitored = reasons(&database.monitored_connections);
            connections = format!("{connections} (monitored: {monitored})");
        }
        let how = if database.monitor_tls {
            "only monitored"
        } else {
            "forced"
        };
        say!(
            "{}: TLS is {how}; connections: {connections}",
            database.name
        );
    }
    let unattributed = [
        ("dropped", &status.unattributed),
        ("would be dropped", &status.unattributed_would_drop),
    ];
    for (what, counts) in unattributed {
        if !counts.is_empty() {
            say!("\n{what}, for any of the databases: {}", reasons(counts));
        }
    }
    let used: Vec<&report::Region> = status.regions.iter().filter(|r| r.used).collect();
    if !used.is_empty() {
        say!("");
    }
    print_region_table(&used);
    if let Some(fleet) = &status.fleet {
        print_fleet(fleet);
    }
    print_warnings(&status.warnings);
    if status.warnings.is_empty() && !status.errors.is_empty() {
        say!("");
    }
    for error in &status.errors {
        say!("error: {error}");
    }
}

fn print_fleet(fleet: &report::Fleet) {
    let at = fleet
        .revision
        .map(|revision| format!(", at revision {revision}"));
    let answered = match (&fleet.answered, &fleet.lost) {
        _ if fleet.frozen => "frozen: nothing new is taken".into(),
        (_, Some(lost)) => format!("etcd does not answer since {:.0}: {}", lost.at, lost.text),
        (Some(at), None) => format!("etcd answered {} ago", age(*at)),
        (None, None) => "etcd has not answered yet".into(),
    };
    say!(
        "\nfleet: host {}{}; {answered}",
        fleet.host,
        at.unwrap_or_default()
    );
    let mut documents = table(["DATABASE", "DOCUMENT", "STATE", "RULES", "SINCE", "ROLLOUT"]);
    for document in &fleet.documents {
        let rollout = document.rollout.as_ref().map(|rollout| {
            let here = if rollout.in_force {
                "in force"
            } else {
                "not here"
            };
            format!("{here}, until {:.0}", rollout.until)
        });
        documents.add_row([
            document.database.clone(),
            document
                .revision
                .map_or("-".into(), |revision| revision.to_string()),
            document.state.name().into(),
            document.rules.to_string(),
            document
                .since
                .map_or("-".into(), |since| format!("{since:.0}")),
            rollout.unwrap_or_else(|| "-".into()),
        ]);
    }
    print_table(&documents, fleet.documents.len());
}

/// `3 not-allowed, 1 bad-source`.
fn reasons(counts: &BTreeMap<String, u64>) -> String {
    let reasons = counts
        .iter()
        .map(|(reason, packets)| format!("{packets} {reason}"));
    or(&reasons.collect::<Vec<_>>().join(", "), "0")
}

fn print_region_table(regions: &[&report::Region]) {
    let header = [
        "REGION",
        "PREFIXES",
        "AGE",
        "NEXT",
        "LAST LOOK-UP",
        "SOURCE",
    ];
    let mut table = table(header);
    for region in regions {
        let (next, last) = match (region.used, region.failing, &region.confirmed) {
            (false, _, _) => ("-".into(), "not used"),
            (true, true, _) if region.partial => (until(region.next), "PARTLY"),
            (true, true, _) => (until(region.next), "FAILED"),
            (true, false, None) => (until(region.next), "under way"),
            (true, false, Some(_)) => (until(region.next), "good"),
        };
        table.add_row([
            region.name.clone(),
            region.prefixes.len().to_string(),
            region.confirmed.map(age).unwrap_or_else(|| "-".into()),
            next,
            last.into(),
            region.source.clone(),
        ]);
    }
    print_table(&table, regions.len());
}

pub(super) fn print_regions(regions: &[report::Region]) {
    print_region_table(&regions.iter().collect::<Vec<_>>());
    for region in regions.iter().filter(|region| region.used) {
        say!("\n{}", region.name);
        list(" ", "", &region.prefixes);
        for retiring in region.retiring.iter().take(LISTED) {
            let left = until(Some(retiring.until));
            say!(
                "    {} is retiring: allowed for {left} more",
                retiring.prefix
            );
        }
        if let Some(change) = &region.change {
            let at = change.at.map(age).unwrap_or_else(|| "-".into());
            say!("  last change {at} ago");
            print_change(&change.added, &change.left, &change.removed);
        }
        if let Some(error) = &region.error {
            let resolved = if region.failing { "" } else { ", resolved" };
            say!(
                "  last error {} ago{resolved}: {}",
                age(error.at),
                error.text
            );
        }
    }
}

fn print_change(added: &[IpNet], left: &[IpNet], removed: &[IpNet]) {
    list("+", "", added);
    list("~", "retiring, still allowed: ", left);
    list("-", "", removed);
}

pub(super) fn print_refreshed(refreshed: &[Refreshed]) {
    if refreshed.is_empty() {
        say!("no rule names a region");
    }
    for region in refreshed {
        let name = &region.region;
        let prefixes = counted(region.prefixes, "prefix", "prefixes");
        let changes = region.added.len() + region.left.len() + region.removed.len();
        match &region.error {
            Some(error) if region.partial => {
                say!(
                    "{name}: error: {error}; the rest of the result is in force, {prefixes} with what is kept"
                )
            }
            Some(error) if region.prefixes == 0 => {
                say!("{name}: error: {error}; it allows nobody")
            }
            Some(error) => {
                say!("{name}: error: {error}; the last good set of {prefixes} stays in force")
            }
            None if changes == 0 => say!("{name}: no change, {prefixes}"),
            None => say!("{name}: changed, {prefixes}"),
        }
        print_change(&region.added, &region.left, &region.removed);
    }
}

pub(super) fn print_explanations(explanations: &[Explanation]) {
    if explanations.is_empty() {
        say!("no database has an address of that family");
    }
    for verdict in explanations {
        let Explanation {
            database, source, ..
        } = verdict;
        let action = if verdict.passes {
            "passes"
        } else {
            "is dropped"
        };
        let by = verdict.by.as_ref().map(by);
        let document = verdict.document.map(|document| {
            let (revision, since) = (document.revision, document.since);
            format!("document of revision {revision}, in force since {since:.0}")
        });
        let notes = verdict.label.clone().into_iter().chain(by).chain(document);
        let notes: Vec<String> = notes.collect();
        let label = match notes.is_empty() {
            true => String::new(),
            false => format!(" ({})", notes.join("; ")),
        };
        let expires = verdict.expires.map(|at| format!(", until {at}"));
        let expires = expires.unwrap_or_default();
        let is_blocked = verdict.reason == Reason::Blocked.name();
        let is_closed = verdict.reason == Reason::TlsUnenforced.name();
        let why = match &verdict.rule {
            Some(rule) if is_blocked => format!("{rule}{label}{expires}"),
            Some(rule) if is_closed => format!(
                "{rule}{label}{expires} allows it, but the port is closed, since TLS cannot be enforced: \
                 `filter-agent status` says why"
            ),
            Some(rule) => format!("allowed by {rule}{label}{expires}"),
            None => match verdict.reason.as_str() {
                "bad-source" => "no packet may come from this address".into(),
                _ => match &verdict.exception {
                    Some(exception) => format!("no rule allows it; {exception}"),
                    None => "no rule allows it".into(),
                },
            },
        };
        let monitor = if verdict.monitor && (verdict.rule.is_none() || is_blocked) {
            ", but the database is only monitored"
        } else {
            ""
        };
        let tls = match verdict.force_tls && verdict.rule.is_some() && !is_blocked && !is_closed {
            true => ", if the connection begins with TLS",
            false => "",
        };
        let way = match verdict.unfiltered.as_deref() {
            Some(interface) => {
                format!("; but its packets come through {interface}, which is not filtered")
            }
            None => String::new(),
        };
        say!("{database}: {source} {action}: {why}{tls}{monitor}{way}");
    }
}

/// The client that added a rule: `added by uid 0 (logged in as 1000), filter-agent`.
pub(super) fn by(by: &By) -> String {
    format!("added by {by}")
}

/// Describes a change, and when it was in force.
pub(super) fn describe_temporary(done: &report::Temporary) -> String {
    match &done.timing {
        Some(timing) => format!("{done}; {timing}; change {}", done.id),
        None => done.to_string(),
    }
}

pub(super) fn print_temporary(done: &report::Temporary) {
    say!("{}", describe_temporary(done));
    print_cut(&done.cut, &done.cut_unknown);
    done.notes.iter().for_each(|note| say!("note: {note}"));
    done.errors.iter().for_each(|error| say!("error: {error}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn successive_ports_are_printed_as_ranges() {
        let ports = |ports: &[&str]| {
            let ports: Vec<String> = ports.iter().map(|&port| port.to_owned()).collect();
            ranges(&ports)
        };
        assert_eq!(ports(&["tcp/5432"]), ["tcp/5432"]);
        assert_eq!(
            ports(&["tcp/1", "tcp/2", "tcp/3", "tcp/5", "udp/6", "udp/7"]),
            ["tcp/1-3", "tcp/5", "udp/6-7"]
        );
        assert_eq!(ports(&["tcp/65534", "tcp/65535"]), ["tcp/65534-65535"]);
        let other = ["tcp/1 at 10.0.0.1", "tcp/2 at 10.0.0.1"];
        assert_eq!(ports(&other), other);
        let all: Vec<String> = (1..=u16::MAX).map(|port| format!("tcp/{port}")).collect();
        assert_eq!(with_addresses(&all, &[]), "tcp/1-65535");
    }
}
