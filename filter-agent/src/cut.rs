//! Open connections whose source loses its access. Pure.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use filter_common::Protocol;
use ipnet::{Ipv4Net, Ipv6Net};

use crate::{
    clock::BootTime,
    compile::{Compiled, Entries, Held},
    host::sockets::Connection,
    kernel::image::Image,
    log::Entry,
    policy::OnRemoval,
    report,
    rules::RuleKey,
};

/// Sources that one change logs; the rest are only counted.
const MAX_LOGGED: usize = 20;

/// A connection that a rule allowed, and that none allows any more.
#[derive(Clone, Debug, PartialEq)]
pub struct Cut<'a> {
    pub database: &'a str,
    /// The text of its `RuleKey`.
    pub rule: &'a str,
    pub connection: &'a Connection,
    pub on_removal: OnRemoval,
}

/// Finds the connections that a change cuts. `is_filtered`: whether packets of a source come through the filter.
pub fn cut<'a>(
    before: &'a Image,
    after: &Compiled,
    connections: &'a [Connection],
    now: BootTime,
    is_filtered: impl Fn(IpAddr) -> bool,
) -> Vec<Cut<'a>> {
    let cut = connections.iter().filter_map(|connection| {
        let source = connection.peer.ip();
        // A rule that ended by itself counts: the change that removes it cuts its connections.
        let (database, rule) = before.rule_of(connection.local, source, now)?;
        let (_, entries) = at(after, connection.local)?;
        (!entries.passes(source, now) && is_filtered(source)).then_some(Cut {
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
        let held: Vec<Held> = match source {
            IpAddr::V4(source) => {
                let prefix = |length| Ipv4Net::new_assert(source, length).trunc();
                holding(&self.v4, (0..=32).rev().map(prefix)).collect()
            }
            IpAddr::V6(source) => {
                let prefix = |length| Ipv6Net::new_assert(source, length).trunc();
                holding(&self.v6, (0..=128).rev().map(prefix)).collect()
            }
        };
        let rule = |held: &Held| &self.rules[usize::from(held.rule)].0;
        let mut allowed = held.iter().filter(|held| in_force(held));
        let member = allowed.clone().find(|held| held.is_member);
        if member.is_some() {
            return member.map(rule);
        }
        let is_blocked = match source {
            IpAddr::V4(source) => blocked(&self.blocked4, |net| net.contains(&source), in_force),
            IpAddr::V6(source) => blocked(&self.blocked6, |net| net.contains(&source), in_force),
        };
        allowed.next().filter(|_| !is_blocked).map(rule)
    }
}

/// Whether a block holds a source. There are few.
fn blocked<N>(
    blocks: &[(N, Held)],
    holds: impl Fn(&N) -> bool,
    in_force: impl Fn(&Held) -> bool,
) -> bool {
    let mut blocks = blocks.iter();
    blocks.any(|(net, held)| holds(net) && in_force(held))
}

/// The entries of these prefixes.
fn holding<N: Ord + Copy>(
    entries: &[(N, Held)],
    prefixes: impl Iterator<Item = N>,
) -> impl Iterator<Item = Held> {
    prefixes.flat_map(|prefix| {
        let first = entries.partition_point(|&(other, _)| other < prefix);
        let same = entries[first..]
            .iter()
            .take_while(move |(other, _)| *other == prefix);
        same.map(|&(_, held)| held)
    })
}

/// Connections by database, rule and source.
pub fn report(cut: &[Cut]) -> Vec<report::Cut> {
    let mut sources: BTreeMap<(&str, &str, IpAddr), report::Cut> = BTreeMap::new();
    for Cut {
        database,
        rule,
        connection,
        on_removal,
    } in cut
    {
        let source = connection.peer.ip();
        let of_source = sources
            .entry((database, rule, source))
            .or_insert_with(|| report::Cut {
                database: (*database).to_owned(),
                rule: RuleKey::describe(rule),
                source,
                connections: 0,
                idle: None,
                reset: *on_removal == OnRemoval::Reset,
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
        let entry = Entry::warning(cut.to_string());
        entry
            .with("DATABASE", cut.database.clone())
            .with("RULE", cut.rule.clone())
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
        let before = Image::of(&compiled(RULES, "", &[], now), &Image::default()).unwrap();
        let after = compiled(rules, more, blocks, now);
        let is_filtered = |source: IpAddr| source.to_string() != "192.0.2.200";
        let time = BootTime(now.boot.0 + passed);
        let found = cut(&before, &after, &connections, time, is_filtered);
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

    #[test]
    fn connections_that_a_block_cut_before_are_not_cut_again() {
        let now = Clock::start().now();
        let connections = [
            connection(5432, "192.0.2.1:1"),
            connection(5432, "198.51.100.7:2"),
        ];
        let before = compiled(RULES, "", &["192.0.2.1/32"], now);
        let before = Image::of(&before, &Image::default()).unwrap();
        let after = compiled("[]", "", &["192.0.2.1/32"], now);
        let found = cut(&before, &after, &connections, now.boot, |_| true);
        let peers: Vec<String> = found
            .iter()
            .map(|c| c.connection.peer.to_string())
            .collect();
        assert_eq!(peers, ["198.51.100.7:2"]);
    }

    #[test]
    fn cut_connections_are_reported_by_rule_and_source() {
        let now = Clock::start().now();
        let connections = [
            connection(5432, "192.0.2.1:3"),
            connection(5432, "192.0.2.1:90"),
        ];
        let before = Image::of(&compiled(RULES, "", &[], now), &Image::default()).unwrap();
        let after = compiled("[]", ", on_removal: keep", &[], now);
        let found = cut(&before, &after, &connections, now.boot, |_| true);
        let lines: Vec<String> = report(&found).iter().map(ToString::to_string).collect();
        let expected = "database orders: 2 connections of 192.0.2.1, allowed by 192.0.2.0/24, idle for up to 1m 30s: cut off, \
                        and left to the server (on_removal: keep)";
        assert_eq!(lines, [expected]);
    }
}
