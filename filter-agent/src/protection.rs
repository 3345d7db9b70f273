//! Compares what two policies guard. Pure.

use std::{collections::BTreeSet, net::IpAddr};

use crate::{
    host::Interface,
    host::coverage::{Ended, Remembered},
    policy::{Database, Policy},
};

/// Ports that one message names; the rest are only counted.
const MAX_NAMED_PORTS: usize = 5;

/// Lists what would no longer be guarded if `new` took the place of `old`, a line each, without what `new` itself
/// says may end (`unprotected`). Rules do not count: whom a guarded database admits is what a reload is for.
pub fn ended(
    old: &Policy,
    new: &Policy,
    remembered: &Remembered,
    host: &[Interface],
) -> Vec<String> {
    let databases = old.databases.iter().filter_map(|database| {
        let lost = lost(database, new)?;
        (!new.unprotected.contains(&database.name)).then_some(lost)
    });
    // Where nothing is guarded, an interface more or less changes nothing.
    let guards = old.databases.iter().any(|database| !database.monitor);
    let names = Ended::between(old, new, remembered, host).names.into_iter();
    let interfaces = names
        .filter(|_| guards)
        .map(|name| format!("interface {name}"));
    let interfaces = interfaces.filter(|interface| !new.unprotected.contains(interface));
    databases.chain(interfaces).collect()
}

/// The part of a database that the new policy leaves open, however its databases are named there. `None`:
/// none. A database that is only monitored guards nothing.
fn lost(database: &Database, new: &Policy) -> Option<String> {
    if database.monitor {
        return None;
    }
    let ports = database.ports.iter();
    let lost: Vec<String> = ports
        .filter_map(|&port| left_open(database, port, new))
        .collect();
    if lost.is_empty() {
        return None;
    }
    let name = &database.name;
    let after = new.databases.iter().find(|after| after.name == *name);
    if after.is_some_and(|after| after.monitor) {
        return Some(format!("database {name} (`monitor: true` is new)"));
    }
    let mut text = lost[..lost.len().min(MAX_NAMED_PORTS)].join(", ");
    if lost.len() > MAX_NAMED_PORTS {
        text.push_str(&format!(" and {} more ports", lost.len() - MAX_NAMED_PORTS));
    }
    Some(format!("database {name} ({text})"))
}

/// A port of a database as far as the new policy guards it no longer: `tcp/5432 at 10.0.0.1`. `None`: it is
/// guarded as before.
fn left_open(database: &Database, port: u16, new: &Policy) -> Option<String> {
    let guards = |after: &&Database| {
        let same = after.protocol == database.protocol && after.ports.contains(&port);
        same && !after.monitor
    };
    let guarding: Vec<&Database> = new.databases.iter().filter(guards).collect();
    if guarding.iter().any(|after| after.addresses.is_empty()) {
        return None;
    }
    let guarded: BTreeSet<&IpAddr> = guarding.iter().flat_map(|after| &after.addresses).collect();
    let open = database
        .addresses
        .iter()
        .filter(|address| !guarded.contains(address));
    let list = |addresses: Vec<String>| addresses.join(" and ");
    let open = list(open.map(ToString::to_string).collect());
    let port = format!("{}/{port}", database.protocol.name());
    match (
        database.addresses.is_empty(),
        open.is_empty(),
        guarded.is_empty(),
    ) {
        (true, _, true) => Some(port),
        (true, _, false) => {
            let guarded = list(guarded.into_iter().map(ToString::to_string).collect());
            Some(format!("{port} at addresses other than {guarded}"))
        }
        (false, true, _) => None,
        (false, false, _) => Some(format!("{port} at {open}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy;

    fn parse(interfaces: &str, databases: &str, more: &str) -> Policy {
        let text = format!("interfaces: [{interfaces}]\n{more}\ndatabases: [{databases}]\n");
        policy::parse(&text)
            .unwrap_or_else(|problems| panic!("{text}: {problems:?}"))
            .0
    }

    fn database(name: &str, more: &str) -> String {
        format!("{{name: {name}, model: dedicated, force_tls: false, rules: [], {more}}}")
    }

    fn interface(index: u32, name: &str) -> Interface {
        Interface {
            index,
            name: name.into(),
            hardware_address: Some(format!("02:00:00:00:00:{index:02x}")),
            ethernet: true,
            default_route: name == "eth0",
            ..Interface::default()
        }
    }

    #[test]
    fn what_is_guarded_no_longer_is_named_and_nothing_else() {
        let orders = database("orders", "ports: [5432, 5433]");
        let old = parse("eth0", &orders, "");
        let cases = [
            (
                database("orders", "ports: [5432, 5433], cluster: [10.0.0.0/8]"),
                "",
            ),
            (database("renamed", "ports: [5433, 5432, 5434]"), ""),
            (String::new(), "database orders (tcp/5432, tcp/5433)"),
            (
                database("orders", "port: 5432"),
                "database orders (tcp/5433)",
            ),
            (
                database("orders", "ports: [5432, 5433], protocol: udp"),
                "database orders (tcp/5432, tcp/5433)",
            ),
            (
                database("orders", "ports: [5432, 5433], monitor: true"),
                "database orders (`monitor: true` is new)",
            ),
            (
                database("orders", "ports: [5432, 5433], addresses: [10.0.0.1]"),
                "database orders (tcp/5432 at addresses other than 10.0.0.1, \
                 tcp/5433 at addresses other than 10.0.0.1)",
            ),
            (
                format!(
                    "{}, {}",
                    database("orders", "port: 5432, monitor: true"),
                    database("more", "port: 5433")
                ),
                "database orders (`monitor: true` is new)",
            ),
        ];
        let remembered = Remembered::default();
        for (databases, expected) in cases {
            let new = parse("eth0", &databases, "");
            assert_eq!(
                ended(&old, &new, &remembered, &[]).join("; "),
                expected,
                "{databases}"
            );
            let new = parse("eth0", &databases, "unprotected: [orders]");
            assert_eq!(ended(&old, &new, &remembered, &[]), [""; 0], "{databases}");
        }
    }

    #[test]
    fn narrowed_addresses_and_a_monitored_database() {
        let remembered = Remembered::default();
        let old = database("orders", "port: 5432, addresses: [10.0.0.1, 10.0.0.2]");
        let old = parse("eth0", &old, "");
        let new = parse(
            "eth0",
            &database("orders", "port: 5432, addresses: [10.0.0.2]"),
            "",
        );
        let expected = ["database orders (tcp/5432 at 10.0.0.1)"];
        assert_eq!(ended(&old, &new, &remembered, &[]), expected);
        let all = parse("eth0", &database("orders", "port: 5432"), "");
        assert_eq!(ended(&old, &all, &remembered, &[]), [""; 0]);
        let old = parse(
            "eth0, eth1",
            &database("orders", "port: 5432, monitor: true"),
            "",
        );
        let none = parse("eth0", "", "");
        let host = [interface(1, "eth0"), interface(2, "eth1")];
        assert_eq!(ended(&old, &none, &remembered, &host), [""; 0]);
    }

    #[test]
    fn interface_that_is_listed_no_longer_is_named() {
        let orders = database("orders", "port: 5432");
        let host = [
            interface(1, "eth0"),
            interface(2, "eth1"),
            interface(3, "lan0"),
        ];
        let policy = |interfaces: &str| parse(interfaces, &orders, "");
        let mut remembered = Remembered::default();
        remembered.update(&policy("eth0, eth1, 'eth*', default"), &host, |_| true);
        let ended = |old: &str, new: &str, host: &[Interface]| {
            ended(&policy(old), &policy(new), &remembered, host).join("; ")
        };
        assert_eq!(ended("eth0, eth1", "eth0", &host), "interface eth1");
        assert_eq!(ended("eth0, eth1", "'eth*'", &host), "");
        assert_eq!(ended("'eth*'", "eth0", &host), "interface eth1");
        assert_eq!(ended("default", "eth0", &host), "");
        assert_eq!(ended("default", "lan0", &host), "interface eth0");
        assert_eq!(ended("eth0", "default", &host), "");
        // A name that never was there guarded nothing; one that is away did.
        assert_eq!(ended("eth0, eth9", "eth0", &host), "");
        assert_eq!(ended("eth0, eth1", "eth0", &host[..1]), "interface eth1");
        assert_eq!(ended("eth0, eth1", "'eth*'", &host[..1]), "");
        // Under another name it is the same.
        let renamed = Interface {
            index: 2,
            ..interface(2, "wan0")
        };
        let host = [interface(1, "eth0"), renamed];
        assert_eq!(ended("eth0, eth1", "eth0, wan0", &host), "");
        assert_eq!(ended("eth0, eth1", "eth0", &host), "interface wan0");
        let unprotected = parse("eth0", &orders, "unprotected: [interface wan0]");
        let lines = super::ended(&policy("eth0, eth1"), &unprotected, &remembered, &host);
        assert_eq!(lines, [""; 0]);
    }
}
