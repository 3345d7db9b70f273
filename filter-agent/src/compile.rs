//! A `Policy` and its regions to what the kernel must hold. Pure: no I/O, no clock.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{Arc, OnceLock},
};

use filter_common::Protocol;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::{
    clock::BootTime,
    held::Group,
    policy::{Database, Model, OnRemoval, Policy, Rule, Source, Tls},
    prefixes::{Prefixes, Width, is_v4, width},
    rules::{Regions, RuleKey, held, keyed},
    temporary::{Kind, Timed},
};

/// Everything to enforce, by database name.
#[derive(Clone, Debug, Default)]
pub struct Compiled {
    pub databases: BTreeMap<String, Entries>,
    /// When the next rule or block ends.
    pub next_end: Option<BootTime>,
    pub warnings: Vec<String>,
}

/// One database, as the maps need it.
#[derive(Clone, Debug)]
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
    /// The prefixes of each rule, by its place in `rules`, in that order. The cluster has a list for each region that it names,
    /// and one for all other members.
    pub lists: Vec<(u16, Arc<Prefixes>)>,
    /// Counted when it is first asked for: long lists that overlap take a while.
    pub counts: OnceLock<Vec<usize>>,
}

impl Entries {
    /// Allowed prefixes of both address families. One that the cluster and the rules have counts twice.
    pub fn prefixes(&self) -> usize {
        let counts = self.prefixes_by_rule().iter().zip(&self.rules);
        let allowed = counts.filter(|(_, (key, _))| key.group() != Group::Blocks);
        allowed.map(|(count, _)| count).sum()
    }

    /// Whether connections without TLS are refused, rather than monitored.
    pub fn refuses_clear(&self) -> bool {
        self.tls.is_some_and(|tls| !tls.monitor) && !self.monitor
    }

    /// Prefixes that each of `rules` gives. One that an earlier rule gives too counts there.
    pub fn prefixes_by_rule(&self) -> &[usize] {
        self.counts.get_or_init(|| {
            let mut counts = vec![0; self.rules.len()];
            for group in Group::ALL {
                self.lists(group).count_by_rule(&mut counts);
            }
            counts
        })
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
        lists: Vec::new(),
        counts: OnceLock::new(),
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
    let (mut permanent, mut lists) = (Vec::new(), Vec::new());
    for member in &database.cluster {
        let key = RuleKey::Member(member.source.clone());
        match end(&key, member, Some("cluster".into())) {
            // All written ones in one list: there may be a thousand.
            Ok(None) => match &member.source {
                Source::Cidr(_) => permanent.extend_from_slice(&held(member, regions)),
                Source::Region(_) => lists.push(held(member, regions)),
            },
            Ok(end) => entries.add(key, end, [held(member, regions)]),
            Err(()) => {}
        }
    }
    lists.push(Prefixes::shared(permanent));
    if lists.iter().any(|list| !list.is_empty()) {
        entries.add(RuleKey::Cluster, None, lists);
    }
    match &database.model {
        Model::Dedicated { .. } => {
            let written = database.rules().len();
            for (number, (key, rule)) in (1..).zip(keyed(database)) {
                let what = (number <= written).then(|| format!("rule {number}"));
                if let Ok(end) = end(&key, rule, what) {
                    entries.add(key, end, [held(rule, regions)]);
                }
            }
        }
        Model::Shared { internet } => {
            if !policy.regional_network.is_empty() {
                let regional = Prefixes::shared(policy.regional_network.as_slice());
                entries.add(RuleKey::RegionalNetwork, None, [regional]);
            }
            if *internet {
                let everybody = [Ipv4Net::default().into(), Ipv6Net::default().into()];
                entries.add(RuleKey::Internet, None, [Prefixes::shared(everybody)]);
            }
        }
    }
    for rule in timed.in_force(database) {
        let key = match rule.kind {
            Kind::Allow => RuleKey::Temporary(rule.source),
            Kind::Block => RuleKey::Block(rule.source),
        };
        entries.add(key, Some(rule.end), [Prefixes::shared([rule.source])]);
    }
    let next = entries.rules.iter().filter_map(|&(_, end)| end).min();
    compiled.next_end = [compiled.next_end, next].into_iter().flatten().min();
    entries
}

impl Entries {
    /// The lists of allowed prefixes, each with the end of its rule.
    pub fn allowed(&self) -> impl Iterator<Item = (Option<BootTime>, &Prefixes)> {
        self.lists.iter().filter_map(|(rule, list)| {
            let (key, end) = &self.rules[usize::from(*rule)];
            (key.group() != Group::Blocks).then_some((*end, &**list))
        })
    }

    /// Appends a rule or block and what it holds.
    pub fn add(
        &mut self,
        key: RuleKey,
        end: Option<BootTime>,
        lists: impl IntoIterator<Item = Arc<Prefixes>>,
    ) {
        let rule = self.rules.len() as u16;
        self.rules.push((key, end));
        self.lists
            .extend(lists.into_iter().map(|list| (rule, list)));
    }
}

/// An allowlist of half an address space or more is hardly one, however many prefixes it takes.
fn warn_of_width(database: &Database, entries: &Entries, warnings: &mut Vec<String>) {
    if matches!(database.model, Model::Shared { internet: true }) {
        return;
    }
    for (family, of_v4, space) in [("IPv4", true, 32), ("IPv6", false, 128)] {
        let half = (1 << (space - 1)) - 1;
        let Some(width) = width_of(entries, of_v4).filter(|&width| width >= half) else {
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

/// Addresses of a family that are allowed. Where lists overlap, and are far from half of the address space, too many.
fn width_of(entries: &Entries, of_v4: bool) -> Width {
    let lists: Vec<&Prefixes> = entries.allowed().map(|(_, list)| list).collect();
    let widths = lists.iter().filter_map(|list| list.width(of_v4));
    let all = widths.reduce(|all, width| all.saturating_add(width).saturating_add(1))?;
    // Only a few lists are so wide that it takes a look at all their prefixes.
    let half = u128::MAX >> (if of_v4 { 97 } else { 1 });
    let whole = lists
        .iter()
        .any(|list| list.width(of_v4) == Some(half * 2 + 1));
    if all < half || whole {
        return Some(all.min(half * 2 + 1));
    }
    let mut prefixes: Vec<&IpNet> = lists.iter().flat_map(|list| list.iter()).collect();
    prefixes.retain(|prefix| is_v4(prefix) == of_v4);
    // Made for lists that are in order.
    prefixes.sort();
    width(prefixes.into_iter())
}

#[cfg(test)]
mod tests {

    use jiff::Timestamp;

    use super::*;
    use crate::{
        clock::Now,
        policy::{Listed, Mode},
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

    /// The prefixes of a group, each with its rule, and the one whose end counts.
    fn all(entries: &Entries, group: Group) -> Vec<(String, u16, Option<u16>)> {
        let all = entries.lists(group).all().into_iter();
        all.map(|(prefix, held)| (prefix.to_string(), held.rule, held.end))
            .collect()
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
        // A prefix of several rules counts once.
        let quarter = ["64.0.0.0/2", "64.0.0.0/3", "96.0.0.0/3"].map(cidr);
        assert_eq!(dedicated(quarter.into()).warnings.len(), 0);
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
        assert_eq!(entries.prefixes(), 2);
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
        let regions = Regions::from([("office".into(), Prefixes::shared(office))]);
        let compiled = compile(&with_region, &regions, &timed(&with_region));
        let entries = &compiled.databases["orders"];
        assert_eq!(entries.rules[0], (RuleKey::Cluster, None));
        assert_eq!(entries.prefixes_by_rule(), [1, 1, 1]);
        let rules = [("192.0.2.0/24", 1), ("2001:db8::/32", 2)];
        let rules = rules.map(|(prefix, rule)| (prefix.to_owned(), rule, None));
        assert_eq!(all(entries, Group::Rules), rules);
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
        let ends = all(&compiled.databases["orders"], Group::Rules);
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
        let members = all(entries, Group::Cluster);
        assert_eq!(members, [("10.1.2.4/32".to_owned(), 0, Some(0))]);
        assert_eq!(entries.prefixes(), 1);
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
        let rules = |policy| all(&entries(policy), Group::Rules);
        let regional = ("10.0.0.0/8".to_owned(), 0, None);
        let [v4, v6] = ["0.0.0.0/0", "::/0"].map(|all| (all.to_owned(), 1, None));
        assert_eq!(rules(&open), [v4, regional.clone(), v6]);
        assert_eq!(rules(&closed), [regional]);
    }
}
