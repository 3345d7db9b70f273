//! A `Policy` and its regions to what the kernel must hold. Pure: no I/O, no clock.

use std::{collections::BTreeMap, net::IpAddr};

use filter_common::Protocol;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::{
    clock::BootTime,
    policy::{Database, Model, OnRemoval, Policy, Rule, Tls},
    rules::{Regions, RuleKey, held, keyed},
    temporary::{Kind, Timed},
};

/// Everything to enforce, by database name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Compiled {
    pub databases: BTreeMap<String, Entries>,
    /// When the next rule or block ends.
    pub next_end: Option<BootTime>,
    pub warnings: Vec<String>,
}

/// One database, as the maps need it.
#[derive(Clone, Debug, PartialEq)]
pub struct Entries {
    pub protocol: Protocol,
    pub ports: Vec<u16>,
    /// Empty: every local address.
    pub addresses: Vec<IpAddr>,
    pub monitor: bool,
    pub tls: Option<Tls>,
    pub on_removal: OnRemoval,
    /// Rules and blocks, with their ends.
    pub rules: Vec<(RuleKey, Option<BootTime>)>,
    /// Allowed prefixes, sorted. Two alike are the cluster's and the rules', in this order.
    pub v4: Vec<(Ipv4Net, Held)>,
    pub v6: Vec<(Ipv6Net, Held)>,
    /// Blocked prefixes, sorted, no two alike.
    pub blocked4: Vec<(Ipv4Net, Held)>,
    pub blocked6: Vec<(Ipv6Net, Held)>,
}

/// The rule that holds a prefix, and the rule whose end counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// The place of its rule in `Entries::rules`: of two with the same prefix the earlier one.
    pub rule: u16,
    /// The place of the rule that ends last, of all that hold the prefix; `None`: one of them has no end.
    pub end: Option<u16>,
    pub is_member: bool,
}

impl Entries {
    /// Of both address families.
    pub fn prefixes(&self) -> usize {
        self.v4.len() + self.v6.len()
    }

    /// Whether connections without TLS are refused, rather than monitored.
    pub fn refuses_clear(&self) -> bool {
        self.tls.is_some_and(|tls| !tls.monitor) && !self.monitor
    }

    /// Prefixes that each of `rules` gives. One that an earlier rule gives too counts there.
    pub fn prefixes_by_rule(&self) -> Vec<usize> {
        let mut counts = vec![0; self.rules.len()];
        let held = self.v4.iter().map(|&(_, held)| held);
        let held = held.chain(self.v6.iter().map(|&(_, held)| held));
        let held = held.chain(self.blocked4.iter().map(|&(_, held)| held));
        for held in held.chain(self.blocked6.iter().map(|&(_, held)| held)) {
            counts[held.rule as usize] += 1;
        }
        counts
    }
}

impl Compiled {
    /// Whether TLS is forced on any database.
    pub fn forces_tls(&self) -> bool {
        self.databases.values().any(|entries| entries.tls.is_some())
    }
}

/// Compiles a policy as it is at one time.
pub fn compile(policy: &Policy, regions: &Regions, timed: &Timed) -> Compiled {
    let mut compiled = Compiled::default();
    for database in &policy.databases {
        let entries = compile_database(policy, database, regions, timed, &mut compiled);
        warn_of_width(database, &entries, &mut compiled.warnings);
        compiled.databases.insert(database.name.clone(), entries);
    }
    // They are taken out at their end, too.
    let suspended = timed.suspended(policy).map(|rule| rule.end);
    compiled.next_end = compiled.next_end.into_iter().chain(suspended).min();
    compiled
}

/// One database; its rules that have ended become warnings, the next end is noted in `compiled`.
fn compile_database(
    policy: &Policy,
    database: &Database,
    regions: &Regions,
    timed: &Timed,
    compiled: &mut Compiled,
) -> Entries {
    let mut entries = Entries {
        protocol: database.protocol,
        ports: database.ports.clone(),
        addresses: database.addresses.clone(),
        monitor: database.monitor,
        tls: database.tls,
        on_removal: database.on_removal,
        rules: Vec::new(),
        v4: Vec::new(),
        v6: Vec::new(),
        blocked4: Vec::new(),
        blocked6: Vec::new(),
    };
    let name = &database.name;
    // The end of a rule: `Err` where it has ended. `what`: as it is called in a warning; nobody who looks after a host can
    // take a rule out of a document of the fleet, where `allow --for` leaves many that are over.
    let mut end = |key: &RuleKey, rule: &Rule, what: Option<String>| {
        let Some(expires) = rule.expires else {
            return Ok(None);
        };
        let end = timed.ends.of(name, key, expires, timed.now);
        if end <= timed.now.boot {
            compiled.warnings.extend(what.map(|what| {
                format!(
                    "database {name}, {what}: {} has expired and allows nobody",
                    rule.source
                )
            }));
            return Err(());
        }
        Ok(Some(end))
    };
    // The cluster first: it stays allowed, and exempt, whatever rule names its addresses too.
    let mut permanent = Vec::new();
    for member in &database.cluster {
        let key = RuleKey::Member(member.source.clone());
        match end(&key, member, Some("cluster".into())) {
            Ok(None) => permanent.extend_from_slice(&held(member, regions)),
            Ok(end) => add(&mut entries, key, end, &held(member, regions)),
            Err(()) => {}
        }
    }
    if !permanent.is_empty() {
        add(&mut entries, RuleKey::Cluster, None, &permanent);
    }
    match &database.model {
        Model::Dedicated { .. } => {
            let written = database.rules().len();
            for (number, (key, rule)) in (1..).zip(keyed(database)) {
                let what = (number <= written).then(|| format!("rule {number}"));
                if let Ok(end) = end(&key, rule, what) {
                    add(&mut entries, key, end, &held(rule, regions));
                }
            }
        }
        Model::Shared { internet } => {
            if !policy.regional_network.is_empty() {
                let key = RuleKey::RegionalNetwork;
                add(&mut entries, key, None, &policy.regional_network);
            }
            if *internet {
                let everybody = [Ipv4Net::default().into(), Ipv6Net::default().into()];
                add(&mut entries, RuleKey::Internet, None, &everybody);
            }
        }
    }
    for rule in timed.in_force(database) {
        let source = std::slice::from_ref(&rule.source);
        match rule.kind {
            Kind::Allow => {
                let key = RuleKey::Temporary(rule.source);
                add(&mut entries, key, Some(rule.end), source);
            }
            Kind::Block => {
                let held = Held::new(&mut entries, RuleKey::Block(rule.source), Some(rule.end));
                match rule.source {
                    IpNet::V4(source) => entries.blocked4.push((source, held)),
                    IpNet::V6(source) => entries.blocked6.push((source, held)),
                }
            }
        }
    }
    let ends: Vec<_> = entries.rules.iter().map(|&(_, end)| end).collect();
    arrange(&mut entries.v4, &ends, |a, b| a.contains(b));
    arrange(&mut entries.v6, &ends, |a, b| a.contains(b));
    arrange(&mut entries.blocked4, &ends, |a, b| a.contains(b));
    arrange(&mut entries.blocked6, &ends, |a, b| a.contains(b));
    let next = ends.into_iter().flatten().min();
    compiled.next_end = [compiled.next_end, next].into_iter().flatten().min();
    entries
}

impl Held {
    /// Appends a rule, and returns what it holds.
    fn new(entries: &mut Entries, key: RuleKey, end: Option<BootTime>) -> Self {
        let rule = entries.rules.len() as u16;
        let is_member = key.is_exempt();
        entries.rules.push((key, end));
        Self {
            rule,
            end: end.map(|_| rule),
            is_member,
        }
    }
}

/// Appends a rule and what it allows; sorting and duplicates come last.
fn add(entries: &mut Entries, key: RuleKey, end: Option<BootTime>, prefixes: &[IpNet]) {
    let held = Held::new(entries, key, end);
    for prefix in prefixes {
        match prefix {
            IpNet::V4(prefix) => entries.v4.push((*prefix, held)),
            IpNet::V6(prefix) => entries.v6.push((*prefix, held)),
        }
    }
}

/// Sorts prefixes, and gives each the latest end of all rules that hold it: a trie finds only the longest prefix of a
/// source, and a rule of few sources that has ended must not hide one of many that is in force.
pub(crate) fn arrange<N: Ord + Copy>(
    held: &mut Vec<(N, Held)>,
    ends: &[Option<BootTime>],
    holds: impl Fn(&N, &N) -> bool,
) {
    // `None`, no end, is the latest.
    let later = |one: Option<u16>, other: Option<u16>| {
        let by_end = |&place: &u16| ends[usize::from(place)];
        let (one, other) = (one?, other?);
        [one, other].into_iter().max_by_key(by_end)
    };
    // Stable, so that of two rules with the same prefix the first keeps it.
    held.sort_by_key(|&(prefix, held)| (prefix, !held.is_member));
    held.dedup_by(|(next, same), (prefix, kept)| {
        let is_same = next == prefix && same.is_member == kept.is_member;
        if is_same {
            kept.end = later(kept.end, same.end);
        }
        is_same
    });
    if held.iter().all(|(_, held)| held.end.is_none()) {
        return;
    }
    for is_member in [true, false] {
        let mut outer: Vec<(N, Option<u16>)> = Vec::new();
        for (prefix, held) in held.iter_mut().filter(|(_, h)| h.is_member == is_member) {
            while outer.pop_if(|(outer, _)| !holds(outer, prefix)).is_some() {}
            if let Some(&(_, end)) = outer.last() {
                held.end = later(held.end, end);
            }
            outer.push((*prefix, held.end));
        }
    }
}

/// An allowlist of half an address space or more is hardly one, however many prefixes it takes.
fn warn_of_width(database: &Database, entries: &Entries, warnings: &mut Vec<String>) {
    if matches!(database.model, Model::Shared { internet: true }) {
        return;
    }
    let v4 = width(entries.v4.iter().map(|(prefix, _)| {
        let (first, last) = (u32::from(prefix.network()), u32::from(prefix.broadcast()));
        (first.into(), last.into())
    }));
    let v6 = width(
        entries
            .v6
            .iter()
            .map(|(prefix, _)| (prefix.network().to_bits(), prefix.broadcast().to_bits())),
    );
    for (family, width, space) in [("IPv4", v4, 32), ("IPv6", v6, 128)] {
        let half = (1 << (space - 1)) - 1;
        let Some(width) = width.filter(|&width| width >= half) else {
            continue;
        };
        let whole = width == u128::MAX >> (128 - space);
        let (how_much, effect) = if whole {
            ("the whole", "filtering is off for it")
        } else {
            ("half or more of the", "this hardly filters")
        };
        warnings.push(format!(
            "database {}: its rules allow {how_much} {family} address space: {effect}",
            database.name
        ));
    }
}

/// Addresses in the union of ranges sorted by first address, less one, since all of IPv6 would not
/// fit; `None` when there is none.
fn width(ranges: impl Iterator<Item = (u128, u128)>) -> Option<u128> {
    let mut width: Option<u128> = None;
    let mut end: Option<u128> = None;
    for (first, last) in ranges {
        let first = match end {
            Some(end) if last <= end => continue,
            Some(end) => first.max(end + 1),
            None => first,
        };
        let more = last - first;
        width = Some(width.map_or(more, |width| width + more + 1));
        end = Some(last);
    }
    width
}

#[cfg(test)]
mod tests {

    use jiff::Timestamp;

    use super::*;
    use crate::{
        clock::Now,
        policy::{Listed, Mode, Source},
    };

    /// In nanoseconds.
    const DAY: u64 = 24 * 60 * 60 * 1_000_000_000;

    fn database(model: Model) -> Database {
        Database {
            name: "orders".into(),
            protocol: Protocol::Tcp,
            ports: vec![5432],
            addresses: vec![],
            model,
            tls: None,
            monitor: false,
            on_removal: OnRemoval::Reset,
            cluster: vec![],
            fleet: None,
        }
    }

    fn policy(databases: Vec<Database>) -> Policy {
        Policy {
            interfaces: vec![Listed::Name("eth0".into())],
            ignored_interfaces: vec![],
            mode: Mode::Auto,
            modes: BTreeMap::new(),
            regions: BTreeMap::new(),
            regional_network: vec!["10.0.0.0/8".parse().unwrap()],
            unprotected: Default::default(),
            metrics: None,
            fleet: None,
            databases,
        }
    }

    fn cidr(text: &str) -> Rule {
        Rule {
            source: Source::Cidr(text.parse().unwrap()),
            except: vec![],
            label: None,
            expires: None,
        }
    }

    /// By a rule without an end.
    fn held(rule: u16) -> Held {
        Held {
            rule,
            end: None,
            is_member: false,
        }
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    /// At the start of 2026, a day after a boot.
    fn timed(policy: &Policy) -> Timed {
        let now = Now {
            boot: BootTime(DAY),
            steady: at("2026-01-01T00:00:00Z"),
            wall: at("2026-01-01T00:00:00Z"),
        };
        Timed::of(policy, now)
    }

    fn dedicated(rules: Vec<Rule>) -> Compiled {
        let policy = policy(vec![database(Model::Dedicated { rules })]);
        compile(&policy, &Regions::new(), &timed(&policy))
    }

    #[test]
    fn two_halves_are_the_whole_address_space() {
        let compiled = dedicated(vec![cidr("0.0.0.0/1"), cidr("128.0.0.0/1")]);
        assert_eq!(compiled.warnings.len(), 1);
        assert!(
            compiled.warnings[0].contains("the whole IPv4"),
            "{:?}",
            compiled.warnings
        );
    }

    #[test]
    fn half_of_the_address_space_is_warned_of_and_less_is_not() {
        let half = dedicated(vec![
            cidr("128.0.0.0/2"),
            cidr("192.0.0.0/2"),
            cidr("200.0.0.0/8"),
        ]);
        assert!(
            half.warnings[0].contains("half or more of the IPv4"),
            "{:?}",
            half.warnings
        );
        assert_eq!(
            dedicated(vec![cidr("128.0.0.0/2"), cidr("1.0.0.0/8")])
                .warnings
                .len(),
            0
        );
        let half = dedicated(vec![cidr("8000::/1")]);
        assert!(
            half.warnings[0].contains("half or more of the IPv6"),
            "{:?}",
            half.warnings
        );
        assert!(dedicated(vec![cidr("::/0")]).warnings[0].contains("the whole IPv6"));
        assert_eq!(dedicated(vec![cidr("8000::/2")]).warnings.len(), 0);
    }

    #[test]
    fn expired_rule_allows_nobody_and_the_next_expiry_is_the_earliest_to_come() {
        let rule = |expires: &str| Rule {
            expires: Some(at(expires)),
            ..cidr("192.0.2.0/24")
        };
        let past = rule("2026-01-01T00:00:00Z");
        let later = Rule {
            source: cidr("198.51.100.0/24").source,
            ..rule("2026-03-01T00:00:00Z")
        };
        let soon = Rule {
            source: cidr("203.0.113.0/24").source,
            ..rule("2026-02-01T00:00:00Z")
        };
        let compiled = dedicated(vec![past, later, soon]);
        let entries = &compiled.databases["orders"];
        assert_eq!(entries.v4.len(), 2);
        assert_eq!(compiled.next_end, Some(BootTime(32 * DAY)));
        assert!(compiled.warnings[0].contains("rule 1: 192.0.2.0/24 has expired"));
    }

    #[test]
    fn of_two_rules_with_one_prefix_the_first_keeps_it() {
        let mut with_region = policy(vec![database(Model::Dedicated {
            rules: vec![
                cidr("192.0.2.0/24"),
                Rule {
                    source: Source::Region("office".into()),
                    ..cidr("192.0.2.0/24")
                },
            ],
        })]);
        with_region.databases[0].cluster = vec![cidr("10.1.2.3/32")];
        let office: [IpNet; 2] = [
            "192.0.2.0/24".parse().unwrap(),
            "2001:db8::/32".parse().unwrap(),
        ];
        let regions = Regions::from([("office".into(), office.into())]);
        let compiled = compile(&with_region, &regions, &timed(&with_region));
        let entries = &compiled.databases["orders"];
        assert_eq!(entries.rules[0], (RuleKey::Cluster, None));
        assert_eq!(entries.prefixes_by_rule(), [1, 1, 1]);
        assert_eq!(entries.v4[1], ("192.0.2.0/24".parse().unwrap(), held(1)));
    }

    /// Otherwise a rule of few sources that ended would hide one of many that is in force.
    #[test]
    fn prefix_lasts_as_long_as_any_rule_that_holds_it() {
        let until = |text: &str, month: u8| Rule {
            expires: Some(at(&format!("2026-{month:02}-01T00:00:00Z"))),
            ..cidr(text)
        };
        let compiled = dedicated(vec![
            until("192.0.2.1/32", 2),
            until("192.0.2.0/24", 4),
            until("192.0.2.0/28", 3),
            cidr("198.51.100.0/24"),
            until("198.51.100.1/32", 2),
            until("203.0.113.1/32", 2),
        ]);
        let ends: Vec<_> = compiled.databases["orders"]
            .v4
            .iter()
            .map(|(prefix, held)| (prefix.to_string(), held.rule, held.end))
            .collect();
        let expected = [
            ("192.0.2.0/24", 1, Some(1)),
            ("192.0.2.0/28", 2, Some(1)),
            ("192.0.2.1/32", 0, Some(1)),
            ("198.51.100.0/24", 3, None),
            ("198.51.100.1/32", 4, None),
            ("203.0.113.1/32", 5, Some(5)),
        ];
        let expected = expected.map(|(prefix, rule, end)| (prefix.to_owned(), rule, end));
        assert_eq!(ends, expected);
    }

    #[test]
    fn member_of_a_cluster_has_an_end_too() {
        let mut policy = policy(vec![database(Model::Dedicated { rules: vec![] })]);
        let member = |prefix: &str, expires: &str| Rule {
            expires: Some(at(expires)),
            ..cidr(prefix)
        };
        policy.databases[0].cluster = vec![
            member("10.1.2.3/32", "2026-01-01T00:00:00Z"),
            member("10.1.2.4/32", "2026-02-01T00:00:00Z"),
        ];
        let compiled = compile(&policy, &Regions::new(), &timed(&policy));
        let entries = &compiled.databases["orders"];
        let member = Held {
            end: Some(0),
            is_member: true,
            ..held(0)
        };
        assert_eq!(entries.v4, [("10.1.2.4/32".parse().unwrap(), member)]);
        assert_eq!(compiled.next_end, Some(BootTime(32 * DAY)));
        let expected = ["database orders, cluster: 10.1.2.3/32 has expired and allows nobody"];
        assert_eq!(compiled.warnings, expected);
    }

    #[test]
    fn shared_database_is_open_to_the_regional_network_and_with_internet_to_everybody() {
        let closed = policy(vec![database(Model::Shared { internet: false })]);
        let open = policy(vec![database(Model::Shared { internet: true })]);
        let entries =
            |policy| compile(policy, &Regions::new(), &timed(policy)).databases["orders"].clone();
        assert_eq!(
            entries(&closed).v4,
            [("10.0.0.0/8".parse().unwrap(), held(0))]
        );
        assert_eq!(entries(&closed).v6, []);
        assert_eq!(entries(&open).v4[0], (Ipv4Net::default(), held(1)));
        assert_eq!(entries(&open).v6, [(Ipv6Net::default(), held(1))]);
    }
}
