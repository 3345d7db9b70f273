//! Databases that the caller of a command can no longer reach after its change. Pure.

use std::net::IpAddr;

use crate::{
    clock::BootTime,
    compile::{Compiled, Entries},
    report,
};

/// Finds the databases that let the caller pass before a change, and not after it. `caller`: no IPv4-mapped address.
pub fn lock_out(
    before: &Compiled,
    after: &Compiled,
    caller: IpAddr,
    now: BootTime,
) -> Vec<report::LockOut> {
    let passes = |entries: &Entries| entries.passes(caller, now);
    let lost = before.databases.iter().filter(|(name, entries)| {
        let goes_on = match after.databases.get(*name) {
            Some(entries) => passes(entries),
            // It has another name, or nothing is filtered any more.
            None => {
                let mut others = after.databases.values();
                others.all(|other| !overlap(entries, other) || passes(other))
            }
        };
        passes(entries) && !goes_on
    });
    lost.map(|(name, entries)| report::LockOut {
        database: name.clone(),
        rule: entries.rule_of(caller, now).map(ToString::to_string),
    })
    .collect()
}

/// Whether two databases have a port in common.
fn overlap(one: &Entries, other: &Entries) -> bool {
    one.protocol == other.protocol
        && one.ports.iter().any(|port| other.ports.contains(port))
        && (one.addresses.is_empty()
            || other.addresses.is_empty()
            || one.addresses.iter().any(|at| other.addresses.contains(at)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        clock::Clock,
        compile::compile,
        policy,
        rules::Regions,
        temporary::{Kind, Temporary, Timed},
    };

    /// The databases that 203.0.113.7 loses by a change from one list of databases to another, and a block.
    fn lost(before: &str, after: &str, block: Option<&str>) -> Vec<(String, Option<String>)> {
        let now = Clock::start().now();
        let compiled = |databases: &str, block: Option<&str>| {
            let text = format!("interfaces: [eth0]\ndatabases: [{databases}]\n");
            let (policy, _) = policy::parse(&text).unwrap();
            let end = BootTime(now.boot.0 + 10);
            let temporary = block.map(|block| {
                Temporary::new("orders", Kind::Block, block.parse().unwrap(), end, now)
            });
            let timed = Timed {
                temporary: temporary.into_iter().collect(),
                ..Timed::of(&policy, now)
            };
            compile(&policy, &Regions::new(), &timed)
        };
        let (before, after) = (compiled(before, None), compiled(after, block));
        let lost = lock_out(&before, &after, "203.0.113.7".parse().unwrap(), now.boot);
        lost.into_iter()
            .map(|lost| (lost.database, lost.rule))
            .collect()
    }

    fn database(name: &str, port: u16, rules: &str, more: &str) -> String {
        format!(
            "{{name: {name}, port: {port}, model: dedicated, force_tls: false, rules: [{rules}]{more}}}"
        )
    }

    #[test]
    fn caller_loses_a_database_when_the_last_rule_that_holds_it_goes() {
        let wide = "{cidr: 203.0.113.0/24}";
        let both = "{cidr: 203.0.113.0/24}, {cidr: 203.0.113.7/32}";
        let orders = |rules: &str| database("orders", 5432, rules, "");
        let by = |rule: &str| vec![("orders".to_owned(), Some(rule.to_owned()))];
        assert_eq!(lost(&orders(wide), &orders(wide), None), []);
        assert_eq!(lost(&orders(both), &orders(wide), None), []);
        assert_eq!(lost(&orders(wide), &orders(""), None), by("203.0.113.0/24"));
        let without = "{cidr: 203.0.113.0/24, except: [203.0.113.7/32]}";
        assert_eq!(
            lost(&orders(both), &orders(without), None),
            by("203.0.113.7/32")
        );
        assert_eq!(
            lost(&orders(wide), &orders(wide), Some("203.0.113.4/30")),
            by("203.0.113.0/24")
        );
        let member = database("orders", 5432, wide, ", cluster: [203.0.113.7/32]");
        assert_eq!(lost(&member, &member, Some("203.0.113.4/30")), []);
        // It had no access before.
        assert_eq!(lost(&orders(""), &orders(""), None), []);
    }

    #[test]
    fn caller_loses_a_database_that_is_no_longer_only_monitored_or_has_another_name() {
        let monitored = database("orders", 5432, "", ", monitor: true");
        let closed = database("orders", 5432, "", "");
        assert_eq!(
            lost(&monitored, &closed, None),
            [("orders".to_owned(), None)]
        );
        assert_eq!(lost(&closed, &monitored, None), []);
        let open = database("orders", 5432, "{cidr: 203.0.113.0/24}", "");
        assert_eq!(lost(&open, &monitored, None), []);
        let renamed = database("stock", 5432, "", "");
        let elsewhere = database("stock", 5433, "", "");
        assert_eq!(lost(&open, &renamed, None).len(), 1);
        // Nothing is filtered there any more.
        assert_eq!(lost(&open, &elsewhere, None), []);
    }
}
