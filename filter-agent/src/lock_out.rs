//! Databases that the caller of a command can no longer reach after its change. Pure.

use std::net::IpAddr;

use crate::{
    clock::BootTime,
    compile::{Compiled, Entries},
    report,
};

/// Finds the databases whose ports let the caller pass before a change, and not after it. `caller`: no IPv4-mapped address.
/// `was_filtered`: whether its packets came through the filter before.
pub fn lock_out(
    before: &Compiled,
    after: &Compiled,
    caller: IpAddr,
    was_filtered: bool,
    now: BootTime,
) -> Vec<report::LockOut> {
    let denying = after.databases.iter();
    let denying = denying.filter(|(_, entries)| !entries.passes(caller, now));
    let lost = denying.filter_map(|(name, entries)| {
        let others = before.databases.iter();
        let others = others.filter(|(_, other)| was_filtered && overlap(entries, other));
        let others: Vec<(&String, &Entries)> = others.collect();
        let open = others.iter().find(|(_, other)| other.passes(caller, now));
        match open {
            Some((database, other)) => Some(report::LockOut {
                database: (*database).clone(),
                rule: other.rule_of(caller, now).map(ToString::to_string),
            }),
            None if is_guarded(entries, &others) => None,
            None => Some(report::LockOut {
                database: name.clone(),
                rule: None,
            }),
        }
    });
    lost.collect()
}

/// Whether every port of a database, at each of its addresses, belonged to one of these.
fn is_guarded(entries: &Entries, before: &[(&String, &Entries)]) -> bool {
    entries.ports.iter().all(|port| {
        let others = before
            .iter()
            .filter(|(_, other)| other.ports.contains(port));
        let others = others.map(|(_, other)| other);
        let is_guarded_at = |address| {
            others
                .clone()
                .any(|other| other.addresses.contains(address))
        };
        others.clone().any(|other| other.addresses.is_empty())
            || !entries.addresses.is_empty() && entries.addresses.iter().all(is_guarded_at)
    })
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
        let caller = "203.0.113.7".parse().unwrap();
        let lost = lock_out(&before, &after, caller, true, now.boot);
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

    /// A database on the port of an SSH session, of all changes, was no lock-out.
    #[test]
    fn caller_loses_a_port_that_becomes_guarded() {
        let open = database("orders", 5432, "{cidr: 203.0.113.0/24}", "");
        let admin = |more: &str| format!("{open}, {}", database("admin", 22, "", more));
        let by_nothing = |name: &str| vec![(name.to_owned(), None)];
        assert_eq!(lost(&open, &admin(""), None), by_nothing("admin"));
        assert_eq!(lost(&open, &admin(", monitor: true"), None), []);
        let at = |addresses: &str| admin(&format!(", addresses: [{addresses}]"));
        assert_eq!(
            lost(&at("10.0.0.1"), &at("10.0.0.1, 10.0.0.2"), None),
            by_nothing("admin")
        );
        assert_eq!(lost(&at("10.0.0.1"), &admin(""), None), by_nothing("admin"));
        assert_eq!(lost(&admin(""), &at("10.0.0.1"), None), []);
        assert_eq!(lost(&at("10.0.0.1, 10.0.0.2"), &at("10.0.0.2"), None), []);
        // Two that change places.
        let closed = |port: u16| database("bills", port, "", "");
        let of = |port: u16| database("orders", port, "{cidr: 203.0.113.0/24}", "");
        let before = format!("{}, {}", of(5432), closed(5433));
        let after = format!("{}, {}", of(5433), closed(5432));
        let orders = vec![("orders".to_owned(), Some("203.0.113.0/24".to_owned()))];
        assert_eq!(lost(&before, &after, None), orders);
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
        // The port it was at is open now, and the other is not.
        let stock = [("stock".to_owned(), None)];
        assert_eq!(lost(&open, &elsewhere, None), stock);
    }
}
