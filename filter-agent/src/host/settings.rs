//! Settings of the kernel that decide whose packets reach a guarded port: read from `/proc/sys`, and what is to be warned
//! of.

use std::{fs, ops::RangeInclusive, path::Path};

use anyhow::{Context as _, Result};

use crate::{
    host::Interface,
    policy::{Database, Policy},
};

/// Ports of a database that one warning names; the rest are only counted.
const MAX_NAMED_PORTS: usize = 5;

/// Each is an error where it could not be read: that is not the same as off.
#[derive(Debug)]
pub struct Settings {
    /// Ports that the kernel gives to this host's own connections.
    ephemeral: Result<RangeInclusive<u16>>,
    /// Ports among them that it does not.
    reserved: Result<Vec<RangeInclusive<u16>>>,
    /// Whether this host passes packets on to others: by IPv4 and by IPv6.
    forwards: [Result<bool>; 2],
}

impl Settings {
    /// Of this network namespace.
    pub fn read() -> Self {
        Self {
            ephemeral: setting("ipv4/ip_local_port_range", |text| {
                let mut ports = text.split_whitespace().map(str::parse);
                Some(ports.next()?.ok()?..=ports.next()?.ok()?)
            }),
            reserved: setting("ipv4/ip_local_reserved_ports", ranges),
            forwards: ["ipv4/ip_forward", "ipv6/conf/all/forwarding"]
                .map(|name| setting(name, |text| Some(text != "0"))),
        }
    }

    /// Guarded ports that may be those of this host's own connections: fault C15.
    pub fn port_warnings(&self, policy: &Policy) -> Vec<String> {
        let (ephemeral, reserved) = match (&self.ephemeral, &self.reserved) {
            (Ok(ephemeral), Ok(reserved)) => (ephemeral, reserved),
            (Err(error), _) | (_, Err(error)) => {
                return vec![format!(
                    "which ports this host gives to its own connections is unknown: {error:#}"
                )];
            }
        };
        let may_be_given = |port: &&u16| {
            ephemeral.contains(port) && !reserved.iter().any(|range| range.contains(port))
        };
        let databases = policy.databases.iter().filter_map(|database| {
            let ports: Vec<&u16> = database.ports.iter().filter(may_be_given).collect();
            if ports.is_empty() {
                return None;
            }
            let named = ports.iter().take(MAX_NAMED_PORTS);
            let mut named = named.map(ToString::to_string).collect::<Vec<_>>().join(", ");
            if ports.len() > MAX_NAMED_PORTS {
                named.push_str(&format!(" and {} more", ports.len() - MAX_NAMED_PORTS));
            }
            Some(format!(
                "database {}: this host may give port {named} to a connection of its own, of which the filter then drops \
                 the replies, unless a server is bound to it: list it in net.ipv4.ip_local_reserved_ports",
                database.name
            ))
        });
        databases.collect()
    }

    /// Packets for other machines that pass a filtered interface: fault C16. A database with `addresses` does not claim
    /// them.
    pub fn forward_warnings(&self, policy: &Policy, filtered: &[Interface]) -> Vec<String> {
        let claims_all = |database: &&Database| database.addresses.is_empty();
        let databases: Vec<&str> = policy
            .databases
            .iter()
            .filter(claims_all)
            .map(|database| database.name.as_str())
            .collect();
        if databases.is_empty() || filtered.is_empty() {
            return Vec::new();
        }
        let bridged = filtered.iter().filter(|interface| interface.is_bridge_port);
        let bridged = bridged.map(|interface| format!("{} is a port of a bridge", interface.name));
        let mut why: Vec<String> = bridged.collect();
        let mut warnings = Vec::new();
        for (forwards, family) in self.forwards.iter().zip(["IPv4", "IPv6"]) {
            match forwards {
                Ok(true) => why.push(format!("this host forwards {family}")),
                Ok(false) => {}
                Err(error) => warnings.push(format!(
                    "whether this host forwards {family} is unknown: {error:#}"
                )),
            }
        }
        if !why.is_empty() {
            warnings.push(format!(
                "{}: packets to other machines are judged as if they were for {}; `addresses` limits a database to this \
                 host's own",
                why.join(", "),
                databases.join(", ")
            ));
        }
        warnings
    }
}

/// Reads a setting below `/proc/sys/net`.
fn setting<T>(name: &str, parse: impl Fn(&str) -> Option<T>) -> Result<T> {
    let path = Path::new("/proc/sys/net").join(name);
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let text = text.trim();
    parse(text).with_context(|| format!("read {}: {text:?} is not understood", path.display()))
}

/// `5432,40000-40009`.
fn ranges(text: &str) -> Option<Vec<RangeInclusive<u16>>> {
    let range = |text: &str| {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        Some(first.parse().ok()?..=last.parse().ok()?)
    };
    text.split(',')
        .filter(|text| !text.is_empty())
        .map(range)
        .collect()
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;
    use crate::policy::parse;

    fn policy(databases: &str) -> Policy {
        let text = format!("interfaces: [eth0]\ndatabases: [{databases}]\n");
        parse(&text)
            .unwrap_or_else(|problems| panic!("{text}: {problems:?}"))
            .0
    }

    fn settings(reserved: &str, forwards: bool) -> Settings {
        Settings {
            ephemeral: Ok(32768..=60999),
            reserved: Ok(ranges(reserved).unwrap()),
            forwards: [Ok(forwards), Ok(false)],
        }
    }

    const ORDERS: &str =
        "{name: orders, ports: [5432, 40000, 50000], model: dedicated, force_tls: false}";

    #[test]
    fn guarded_ports_that_connections_of_the_host_may_have_are_warned_of() {
        let policy = policy(ORDERS);
        let named = |reserved: &str| {
            let warnings = settings(reserved, false).port_warnings(&policy);
            let named = |warning: &String| {
                let (_, rest) = warning.split_once("give port ").unwrap();
                rest.split_once(" to").unwrap().0.to_owned()
            };
            warnings.iter().map(named).collect::<Vec<_>>()
        };
        assert_eq!(named(""), ["40000, 50000"]);
        assert_eq!(named("40000"), ["50000"]);
        assert!(named("1-2,39999-50000").is_empty());
    }

    #[test]
    fn packets_for_other_machines_are_warned_of_where_a_database_claims_every_address() {
        let bridged = Interface {
            name: "eth0".into(),
            is_bridge_port: true,
            ..Interface::default()
        };
        let plain = Interface::default();
        let warnings = |forwards, interface: &Interface, databases: &str| {
            let filtered = std::slice::from_ref(interface);
            settings("", forwards).forward_warnings(&policy(databases), filtered)
        };
        assert!(warnings(false, &plain, ORDERS).is_empty());
        let expected = "this host forwards IPv4: packets to other machines are judged as if they were for orders;";
        assert!(warnings(true, &plain, ORDERS)[0].starts_with(expected));
        let expected = "eth0 is a port of a bridge, this host forwards IPv4: packets to";
        assert!(warnings(true, &bridged, ORDERS)[0].starts_with(expected));
        let own = ORDERS.replace("model", "addresses: [10.0.0.1], model");
        assert!(warnings(true, &bridged, &own).is_empty());
    }

    /// A setting that the service's sandbox hides was taken for off.
    #[test]
    fn setting_that_cannot_be_read_is_unknown_and_not_off() {
        let policy = policy(ORDERS);
        let hidden = || anyhow!("No such file or directory");
        let settings = Settings {
            ephemeral: Err(hidden()),
            reserved: Ok(Vec::new()),
            forwards: [Err(hidden()), Ok(false)],
        };
        assert!(settings.port_warnings(&policy)[0].contains("is unknown: No such file"));
        let warnings = settings.forward_warnings(&policy, &[Interface::default()]);
        assert_eq!(
            warnings,
            ["whether this host forwards IPv4 is unknown: No such file or directory"]
        );
    }
}
