//! Open connections whose source loses its access. Pure.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use filter_common::Protocol;

use crate::{
    clock::BootTime,
    compile::{Compiled, Entries},
    held::{Group, Held},
    host::{Interface, sockets::Connection},
    kernel::image::{Access, Image},
    log::Entry,
    policy::OnRemoval,
    report,
    rules::RuleKey,
};

/// Sources that one change logs; the rest are only counted.
const MAX_LOGGED: usize = 20;

/// A connection that was let in, and is no more.
#[derive(Clone, Debug, PartialEq)]
pub struct Cut<'a> {
    pub database: &'a str,
    /// The text of the `RuleKey` of the rule that allowed it. `None`: the port was open to all.
    pub rule: Option<&'a str>,
    pub connection: &'a Connection,
    pub on_removal: OnRemoval,
}

/// The interfaces of a host, and which of them are filtered.
#[derive(Clone, Debug, Default)]
pub struct Paths {
    pub host: Vec<Interface>,
    /// Their indexes.
    pub filtered: BTreeSet<u32>,
}

impl Paths {
    /// Returns the name of the interface through which packets of a source come, if that is not filtered.
    pub fn unfiltered(&self, source: IpAddr) -> Option<&str> {
        let is_own = |interface: &Interface| interface.addresses.contains(&source);
        if source.is_loopback() || self.host.iter().any(is_own) {
            let loopback = self.host.iter().find(|interface| interface.loopback);
            return loopback.map(|interface| interface.name.as_str());
        }
        let networks = self.host.iter().flat_map(|interface| {
            let networks = interface.networks.iter();
            let containing = networks.filter(|network| network.contains(&source));
            containing.map(move |network| (network.prefix_len(), interface))
        });
        let (_, interface) = networks.max_by_key(|(length, _)| *length)?;
        (!self.is_filtered(interface)).then_some(interface.name.as_str())
    }

    fn is_filtered(&self, interface: &Interface) -> bool {
        self.filtered.contains(&interface.index)
    }

    /// Whether what other hosts send to a local address comes through the filter: the interface that has it is filtered, or
    /// a port of a bridge or bond, which may lead to it. An address of no interface may come through any.
    fn reach(&self, local: IpAddr) -> bool {
        let mut holding = self.host.iter().filter(|i| i.addresses.contains(&local));
        let mut filtered = self.host.iter().filter(|i| self.is_filtered(i));
        match holding.next() {
            None => !self.filtered.is_empty(),
            Some(first) => {
                self.is_filtered(first)
                    || holding.any(|interface| self.is_filtered(interface))
                    || filtered.any(|interface| interface.has_master)
            }
        }
    }
}

/// The image and the interfaces before a change.
#[derive(Clone, Debug)]
pub struct Before<'i> {
    /// May hold a million prefixes.
    pub image: Cow<'i, Image>,
    pub paths: Paths,
}

impl Before<'_> {
    /// Whether packets of a connection passed.
    pub fn lets_in(&self, connection: &Connection, now: BootTime) -> bool {
        let Connection { local, peer, .. } = connection;
        let is_reached = self.paths.reach(local.ip());
        !is_reached || self.image.access(*local, peer.ip(), now) != Access::Denied
    }
}

/// Finds the connections that a change cuts. `paths`: after it.
pub fn cut<'a>(
    before: &'a Before<'_>,
    after: &'a Compiled,
    paths: &Paths,
    connections: &'a [Connection],
    now: BootTime,
) -> Vec<Cut<'a>> {
    // A source may have thousands of connections.
    let mut passing: BTreeMap<(&str, IpAddr), bool> = BTreeMap::new();
    let cut = connections.iter().filter_map(|connection| {
        let Connection { local, peer, .. } = connection;
        let source = peer.ip();
        let (name, entries) = at(after, *local)?;
        let passes = passing.entry((name, source));
        if *passes.or_insert_with(|| entries.passes(source, now))
            || paths.unfiltered(source).is_some()
        {
            return None;
        }
        // A rule that ended by itself counts: the change that removes it cuts its connections.
        let access = match before.paths.reach(local.ip()) {
            true => before.image.access(*local, source, now),
            false => Access::Open,
        };
        let (database, rule) = match access {
            Access::Allowed { database, rule } => (database, Some(rule)),
            Access::Open if paths.reach(local.ip()) => (name, None),
            Access::Open | Access::Denied => return None,
        };
        Some(Cut {
            database,
            rule,
            connection,
            on_removal: entries.on_removal,
        })
    });
    cut.collect()
}

/// The database that a local address and port belong to.
fn at(compiled: &Compiled, local: SocketAddr) -> Option<(&str, &Entries)> {
    let mut databases = compiled.databases.iter();
    let found = databases.find(|(_, entries)| {
        entries.protocol == Protocol::Tcp
            && entries.ports.contains(&local.port())
            && (entries.addresses.is_empty() || entries.addresses.contains(&local.ip()))
    });
    found.map(|(name, entries)| (name.as_str(), entries))
}

impl Entries {
    /// Whether packets of a source pass.
    pub fn passes(&self, source: IpAddr, now: BootTime) -> bool {
        self.monitor || self.rule_of(source, now).is_some()
    }

    /// The rule that allows a source: one that has not ended, of a source that no block holds.
    pub fn rule_of(&self, source: IpAddr, now: BootTime) -> Option<&RuleKey> {
        let in_force = |held: &Held| {
            let end = held.end.and_then(|rule| self.rules[usize::from(rule)].1);
            end.is_none_or(|end| end > now)
        };
        let allowing = |group| {
            let held = self.lists(group).holding(source).filter(in_force)?;
            Some(&self.rules[usize::from(held.rule)].0)
        };
        let is_blocked = || {
            let mut blocks = self.rules.iter();
            blocks.any(|(key, end)| {
                matches!(key, RuleKey::Block(block) if block.contains(&source))
                    && end.is_none_or(|end| end > now)
            })
        };
        let member = allowing(Group::Cluster);
        member.or_else(|| allowing(Group::Rules).filter(|_| !is_blocked()))
    }
}

/// Connections by database, rule and source.
pub fn report(cut: &[Cut]) -> Vec<report::Cut> {
    let mut sources: BTreeMap<(&str, Option<&str>, IpAddr), report::Cut> = BTreeMap::new();
    for Cut {
        database,
        rule,
        connection,
        on_removal,
    } in cut
    {
        let source = connection.peer.ip();
        let of_source = sources
            .entry((*database, *rule, source))
            .or_insert_with(|| report::Cut {
                database: (*database).to_owned(),
                rule: rule.map(RuleKey::describe),
                source,
                connections: 0,
                idle: None,
                reset: *on_removal == OnRemoval::Reset,
                at_confirm: false,
            });
        of_source.connections += 1;
        let idle = connection.idle.map(|idle| idle.as_secs());
        of_source.idle = of_source.idle.into_iter().chain(idle).max();
    }
    sources.into_values().collect()
}

/// Lines for the log.
pub fn entries(cut: &[report::Cut]) -> Vec<Entry> {
    let line = |cut: &report::Cut| {
        let entry = Entry::warning(cut.to_string())
            .with("DATABASE", cut.database.clone())
            .with("PREFIX", cut.source.to_string())
            .with("REASON", "cut-off");
        match &cut.rule {
            Some(rule) => entry.with("RULE", rule.clone()),
            None => entry,
        }
    };
    let mut lines: Vec<Entry> = cut.iter().take(MAX_LOGGED).map(line).collect();
    if let Some(more) = cut.len().checked_sub(MAX_LOGGED).filter(|&more| more > 0) {
        lines.push(Entry::warning(format!(
            "connections of {more} more sources are cut off"
        )));
    }
    lines
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use jiff::Timestamp;

    use super::*;
    use crate::{
        clock::{Clock, Now},
        compile::compile,
        policy,
        rules::Regions,
        temporary::{Kind, Temporary, Timed},
    };

    const RULES: &str =
        "[{cidr: 192.0.2.0/24, label: office}, {cidr: 198.51.100.0/24}, {cidr: '2001:db8::/32'}]";

    fn compiled(rules: &str, more: &str, blocks: &[&str], now: Now) -> Compiled {
        let text = format!(
            "interfaces: [eth0]\ndatabases:\n- {{name: orders, port: 5432, model: dedicated, force_tls: false, rules: \
             {rules}{more}}}\n"
        );
        let (policy, _) = policy::parse(&text).unwrap();
        let end = BootTime(now.boot.0 + 10);
        let temporary = blocks
            .iter()
            .map(|block| Temporary::new("orders", Kind::Block, block.parse().unwrap(), end, now));
        let timed = Timed {
            temporary: temporary.collect(),
            ..Timed::of(&policy, now)
        };
        compile(&policy, &Regions::new(), &timed)
    }

    fn interface(index: u32, addresses: &[&str], networks: &[&str]) -> Interface {
        Interface {
            index,
            name: format!("eth{index}"),
            addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
            networks: networks.iter().map(|text| text.parse().unwrap()).collect(),
            ..Interface::default()
        }
    }

    /// `eth1`, which leads to other hosts, `eth2`, and `eth3` with an address of its own.
    fn paths(filtered: &[u32]) -> Paths {
        Paths {
            host: vec![
                interface(1, &["10.0.0.1"], &["10.0.0.0/24"]),
                interface(2, &[], &["192.0.2.200/32"]),
                interface(3, &["10.3.0.1"], &["10.3.0.0/24"]),
            ],
            filtered: filtered.iter().copied().collect(),
        }
    }

    fn before(compiled: &Compiled) -> Before<'static> {
        Before {
            image: Cow::Owned(Image::of(compiled, &Image::default()).unwrap()),
            paths: paths(&[1]),
        }
    }

    fn connection(port: u16, peer: &str) -> Connection {
        Connection::between(([10, 0, 0, 1], port).into(), peer.parse().unwrap())
    }

    /// The peers of connections that a change from `RULES` to these rules and blocks cuts, after a time in nanoseconds.
    fn peers(rules: &str, more: &str, blocks: &[&str], passed: u64) -> Vec<String> {
        let now = Clock::start().now();
        let connections = [
            connection(5432, "192.0.2.1:1"),
            connection(5432, "192.0.2.1:2"),
            connection(5432, "198.51.100.7:3"),
            connection(5432, "[2001:db8::1]:4"),
            // No rule allowed it: its packets come in another way.
            connection(5432, "10.0.0.2:5"),
            connection(22, "192.0.2.1:6"),
            // Through an interface that is not filtered.
            connection(5432, "192.0.2.200:7"),
        ];
        let before = before(&compiled(RULES, "", &[], now));
        let after = compiled(rules, more, blocks, now);
        let time = BootTime(now.boot.0 + passed);
        let found = cut(&before, &after, &paths(&[1]), &connections, time);
        found
            .iter()
            .map(|cut| cut.connection.peer.to_string())
            .collect()
    }

    #[test]
    fn connections_are_cut_whose_source_no_rule_allows_any_more() {
        assert_eq!(peers(RULES, "", &[], 0), Vec::<String>::new());
        let without = "[{cidr: 198.51.100.0/24}, {cidr: '2001:db8::/32'}]";
        assert_eq!(peers(without, "", &[], 0), ["192.0.2.1:1", "192.0.2.1:2"]);
        assert_eq!(
            peers("[{cidr: 192.0.0.0/8}]", "", &[], 0),
            ["198.51.100.7:3", "[2001:db8::1]:4"]
        );
        assert_eq!(peers("[]", ", monitor: true", &[], 0), Vec::<String>::new());
        assert_eq!(
            peers(without, ", cluster: [192.0.2.1/32]", &[], 0),
            Vec::<String>::new()
        );
        let except = "[{cidr: 192.0.2.0/24, except: [192.0.2.1/32]}, {cidr: 198.51.100.0/24}, {cidr: '::/0'}]";
        assert_eq!(peers(except, "", &[], 0), ["192.0.2.1:1", "192.0.2.1:2"]);
    }

    #[test]
    fn connections_of_blocked_sources_are_cut_unless_they_are_of_the_cluster() {
        let blocks = ["192.0.2.0/30", "2001:db8::1/128"];
        let expected = ["192.0.2.1:1", "192.0.2.1:2", "[2001:db8::1]:4"];
        assert_eq!(peers(RULES, "", &blocks, 0), expected);
        let member = ", cluster: [192.0.2.1/32]";
        assert_eq!(peers(RULES, member, &blocks, 0), ["[2001:db8::1]:4"]);
        assert_eq!(peers(RULES, "", &blocks, 11), Vec::<String>::new());
    }

    /// The longest rule that holds a source may have ended: another one that holds it counts then.
    #[test]
    fn connections_are_cut_at_the_end_of_the_last_rule_that_holds_their_source() {
        let tomorrow = Timestamp::now() + Duration::from_hours(24);
        let until = format!(
            "{{cidr: 192.0.2.1/32, expires: '{tomorrow}'}}, {{cidr: 198.51.100.0/24}}, {{cidr: '::/0'}}"
        );
        let alone = format!("[{until}]");
        let two_days = 2 * 86_400_000_000_000;
        assert_eq!(peers(&alone, "", &[], 0), Vec::<String>::new());
        let both = ["192.0.2.1:1", "192.0.2.1:2"];
        assert_eq!(peers(&alone, "", &[], two_days), both);
        let wider = format!("[{until}, {{cidr: 192.0.2.0/24}}]");
        assert_eq!(peers(&wider, "", &[], two_days), Vec::<String>::new());
    }

    #[test]
    fn connections_that_a_block_cut_before_are_not_cut_again() {
        let now = Clock::start().now();
        let connections = [
            connection(5432, "192.0.2.1:1"),
            connection(5432, "198.51.100.7:2"),
        ];
        let before = before(&compiled(RULES, "", &["192.0.2.1/32"], now));
        let after = compiled("[]", "", &["192.0.2.1/32"], now);
        let found = cut(&before, &after, &paths(&[1]), &connections, now.boot);
        let peers: Vec<String> = found
            .iter()
            .map(|c| c.connection.peer.to_string())
            .collect();
        assert_eq!(peers, ["198.51.100.7:2"]);
    }

    /// A port that became guarded, or an interface that became filtered, cut off whoever used it, and said nothing.
    #[test]
    fn connections_to_what_was_open_are_cut() {
        let now = Clock::start().now();
        let connections = [
            connection(5432, "192.0.2.1:1"),
            connection(5432, "203.0.113.7:2"),
            connection(22, "203.0.113.7:3"),
            connection(5432, "192.0.2.200:4"),
            Connection::between(([10, 3, 0, 1], 5432).into(), "10.3.0.2:5".parse().unwrap()),
            Connection::between(
                ([10, 9, 0, 1], 5432).into(),
                "203.0.113.7:6".parse().unwrap(),
            ),
        ];
        let peers = |before: &Before<'_>, filtered: &[u32]| {
            let after = compiled(RULES, "", &[], now);
            let found = cut(before, &after, &paths(filtered), &connections, now.boot);
            assert!(
                found
                    .iter()
                    .all(|cut| cut.rule.is_none() && cut.database == "orders")
            );
            let peers = found.iter().map(|cut| cut.connection.peer.to_string());
            peers.collect::<Vec<_>>()
        };
        let none = Compiled::default();
        assert_eq!(
            peers(&before(&none), &[1]),
            ["203.0.113.7:2", "203.0.113.7:6"]
        );
        let monitored = compiled("[]", ", monitor: true", &[], now);
        assert_eq!(
            peers(&before(&monitored), &[1]),
            ["203.0.113.7:2", "203.0.113.7:6"]
        );
        let same = before(&compiled(RULES, "", &[], now));
        assert_eq!(peers(&same, &[1]), Vec::<String>::new());
        assert_eq!(peers(&same, &[1, 3]), ["10.3.0.2:5"]);
        let unattached = Before {
            paths: paths(&[]),
            ..same
        };
        assert_eq!(peers(&unattached, &[1]), ["203.0.113.7:2", "203.0.113.7:6"]);
    }

    #[test]
    fn cut_connections_are_reported_by_rule_and_source() {
        let now = Clock::start().now();
        let connections = [
            connection(5432, "192.0.2.1:3"),
            connection(5432, "192.0.2.1:90"),
        ];
        let before = before(&compiled(RULES, "", &[], now));
        let after = compiled("[]", ", on_removal: keep", &[], now);
        let found = cut(&before, &after, &paths(&[1]), &connections, now.boot);
        let lines: Vec<String> = report(&found).iter().map(ToString::to_string).collect();
        let expected = "database orders: 2 connections of 192.0.2.1, allowed by 192.0.2.0/24, idle for up to 1m 30s: cut off, \
                        and left to the server (on_removal: keep)";
        assert_eq!(lines, [expected]);
    }
}
