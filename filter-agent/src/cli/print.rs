//! The texts that commands print.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;

use crate::{
    cli::output::{LISTED, age, list, or, print_table, table, until},
    report::{self, Explanation, Plan, Refreshed, Reloaded, Rule, Status},
};

pub(super) fn with_addresses(ports: &[String], addresses: &[IpAddr]) -> String {
    let ports = ports.join(", ");
    if addresses.is_empty() {
        return ports;
    }
    let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    format!("{ports} at {}", addresses.join(", "))
}

pub(super) fn with_monitor(model: &str, monitor: bool) -> String {
    let monitor = if monitor { ", monitor" } else { "" };
    format!("{model}{monitor}")
}

pub(super) fn print_warnings(warnings: &[String]) {
    if !warnings.is_empty() {
        println!();
    }
    for warning in warnings {
        println!("warning: {warning}");
    }
}

pub(super) fn print_plan(plan: &Plan) {
    let mut same = true;
    for name in &plan.attached {
        println!("+ interface {name}");
        same = false;
    }
    for name in &plan.detached {
        println!("- interface {name}");
        same = false;
    }
    for (name, database) in &plan.difference.databases {
        same = false;
        println!("database {name}");
        list("+", "protect ", &database.guarded);
        list("-", "protect ", &database.unguarded);
        list("+", "", &database.added);
        list("-", "", &database.removed);
    }
    if same {
        println!("no difference: the kernel enforces {}", plan.file.display());
    }
    print_warnings(&plan.warnings);
}

pub(super) fn print_reloaded(reloaded: &Reloaded) {
    print_plan(&reloaded.plan);
    println!();
    let report::Enforced {
        file,
        compiled_ms,
        enforced_ms,
        ..
    } = &reloaded.enforced;
    println!(
        "{} is enforced, {enforced_ms:.1} ms after it was read (compiled after {compiled_ms:.1} ms)",
        file.display()
    );
    print_verified(&reloaded.verified);
    for error in &reloaded.errors {
        println!("error: {error}");
    }
}

fn print_verified(verified: &report::Verified) {
    let probes = verified.probes;
    if verified.errors.is_empty() {
        println!("verified: the attached program judged {probes} probe packets as the policy does");
    }
    for error in &verified.errors {
        println!("error: {error}");
    }
}

pub(super) fn print_status(status: &Status) {
    let policy = &status.policy;
    println!(
        "filter-agent {}, pid {}, up {}",
        status.version,
        status.pid,
        age(status.started)
    );
    println!(
        "policy {}, accepted {} ago, compiled after {:.1} ms, enforced after {:.1} ms",
        policy.file.display(),
        age(policy.accepted),
        policy.compiled_ms,
        policy.enforced_ms
    );
    if let Some(expiry) = policy.next_expiry {
        println!("next rule expires at {expiry}");
    }
    print_verified(&status.verified);
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
    println!();
    print_table(&interfaces, status.interfaces.len());
    if status.repairs > 0 {
        let times = if status.repairs == 1 { "time" } else { "times" };
        println!(
            "somebody took the filter off; it was put back {} {times}",
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
    println!();
    print_table(&databases, status.databases.len());
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
        println!(
            "{}: TLS is forced; connections: {connections}",
            database.name
        );
    }
    let unattributed = [
        ("dropped", &status.unattributed),
        ("would be dropped", &status.unattributed_would_drop),
    ];
    for (what, counts) in unattributed {
        if !counts.is_empty() {
            println!(
                "\n{what}, aimed at no database in particular: {}",
                reasons(counts)
            );
        }
    }
    let used: Vec<&report::Region> = status.regions.iter().filter(|r| r.used).collect();
    if !used.is_empty() {
        println!();
    }
    print_region_table(&used);
    print_warnings(&status.warnings);
    if status.warnings.is_empty() && !status.errors.is_empty() {
        println!();
    }
    for error in &status.errors {
        println!("error: {error}");
    }
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

pub(super) fn print_rules(rules: &[Rule]) {
    let header = [
        "DATABASE", "RULE", "SOURCE", "PREFIXES", "PACKETS", "EXPIRES", "LABEL",
    ];
    let mut table = table(header);
    for rule in rules {
        let expires = rule.expires.map(|expires| expires.to_string());
        let expires = match (expires, rule.expired) {
            (Some(expires), true) => format!("{expires} (expired)"),
            (Some(expires), false) => expires,
            (None, _) => "-".into(),
        };
        table.add_row([
            rule.database.clone(),
            rule.number
                .map_or_else(|| "-".into(), |number| number.to_string()),
            rule.source.clone(),
            rule.prefixes.to_string(),
            rule.hits.to_string(),
            expires,
            rule.label.clone().unwrap_or_default(),
        ]);
    }
    if rules.is_empty() {
        println!("no rules: nobody may reach a database");
    }
    print_table(&table, rules.len());
}

pub(super) fn print_regions(regions: &[report::Region]) {
    print_region_table(&regions.iter().collect::<Vec<_>>());
    for region in regions.iter().filter(|region| region.used) {
        println!("\n{}", region.name);
        list(" ", "", &region.prefixes);
        for retiring in region.retiring.iter().take(LISTED) {
            let left = until(Some(retiring.until));
            println!("    {} has left and retires in {left}", retiring.prefix);
        }
        if let Some(change) = &region.change {
            let at = change.at.map(age).unwrap_or_else(|| "-".into());
            println!("  last change {at} ago");
            print_change(&change.added, &change.left, &change.removed);
        }
        if let Some(error) = &region.error {
            let over = if region.failing { "" } else { ", over by now" };
            println!("  last error {} ago{over}: {}", age(error.at), error.text);
        }
    }
}

fn print_change(added: &[IpNet], left: &[IpNet], removed: &[IpNet]) {
    list("+", "", added);
    list("~", "left, still allowed for a time: ", left);
    list("-", "", removed);
}

pub(super) fn print_refreshed(refreshed: &[Refreshed]) {
    if refreshed.is_empty() {
        println!("no rule names a region");
    }
    for region in refreshed {
        let name = &region.region;
        let prefixes = region.prefixes;
        let changes = region.added.len() + region.left.len() + region.removed.len();
        match &region.error {
            Some(error) => println!("{name}: error: {error}; {prefixes} prefixes stay in force"),
            None if changes == 0 => println!("{name}: no change, {prefixes} prefixes"),
            None => println!("{name}: changed, {prefixes} prefixes"),
        }
        print_change(&region.added, &region.left, &region.removed);
    }
}

pub(super) fn print_explanations(explanations: &[Explanation]) {
    if explanations.is_empty() {
        println!("no database has an address of that family");
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
        let label = verdict.label.as_ref().map(|label| format!(" ({label})"));
        let label = label.unwrap_or_default();
        let expires = verdict.expires.map(|at| format!(", until {at}"));
        let expires = expires.unwrap_or_default();
        let why = match &verdict.rule {
            Some(rule) => format!("allowed by {rule}{label}{expires}"),
            None => match verdict.reason.as_str() {
                "bad-source" => "no host may have this address on the wire".into(),
                _ => "no rule allows it".into(),
            },
        };
        let monitor = if verdict.monitor && verdict.rule.is_none() {
            ", but the database is only monitored"
        } else {
            ""
        };
        let tls = match verdict.force_tls && verdict.rule.is_some() {
            true => ", as long as the connection begins with TLS",
            false => "",
        };
        println!("{database}: {source} {action}: {why}{tls}{monitor}");
    }
}
