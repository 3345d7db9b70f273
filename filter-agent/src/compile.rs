//! A `Policy` and its regions to what the kernel must hold. Pure: no I/O, no clock.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use filter_common::Protocol;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use jiff::Timestamp;

use crate::policy::{Database, Model, Policy, Rule, Source, Tls};

/// Prefixes that each region allows, by its name. A region that is missing allows nobody.
pub type Regions = BTreeMap<String, Arc<[IpNet]>>;

/// Everything to enforce, by database name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Compiled {
    pub databases: BTreeMap<String, Entries>,
    /// When the next rule expires.
    pub next_expiry: Option<Timestamp>,
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
    /// Keys of the rules. Where two give the same prefix, it counts for the earlier one.
    pub rules: Vec<RuleKey>,
    /// Allowed prefixes, sorted, no two alike, with the place of their rule in `rules`.
    pub v4: Vec<(Ipv4Net, u16)>,
    pub v6: Vec<(Ipv6Net, u16)>,
}

/// Identifies a rule of a database in the kernel. It stays the same over reloads as long as the rule's source does.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RuleKey {
    Rule(Source),
    Cluster,
    RegionalNetwork,
    Internet,
}

impl RuleKey {
    /// At most `filter_common::MAX_NAME` + 1 bytes; no two keys alike.
    pub fn text(&self) -> String {
        match self {
            Self::Rule(Source::Cidr(prefix)) => prefix.to_string(),
            Self::Rule(Source::Region(name)) => format!("@{name}"),
            Self::Cluster => "cluster".into(),
            Self::RegionalNetwork => "regional network".into(),
            Self::Internet => "internet".into(),
        }
    }

    /// Whether TLS is not forced on what it allows: what a cluster says to itself.
    pub fn is_exempt(&self) -> bool {
        *self == Self::Cluster
    }
}

impl std::fmt::Display for RuleKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Rule(source) => source.fmt(f),
            key => f.write_str(&key.text()),
        }
    }
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
        let rules = self.v4.iter().map(|&(_, rule)| rule);
        for rule in rules.chain(self.v6.iter().map(|&(_, rule)| rule)) {
            counts[rule as usize] += 1;
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

/// Compiles a policy as it is at the instant `now`.
pub fn compile(policy: &Policy, regions: &Regions, now: Timestamp) -> Compiled {
    let mut compiled = Compiled::default();
    for database in &policy.databases {
        let entries = compile_database(policy, database, regions, now, &mut compiled);
        warn_of_width(database, &entries, &mut compiled.warnings);
        compiled.databases.insert(database.name.clone(), entries);
    }
    compiled
}

/// One database; its expired rules become warnings, the next expiry is noted in `compiled`.
fn compile_database(
    policy: &Policy,
    database: &Database,
    regions: &Regions,
    now: Timestamp,
    compiled: &mut Compiled,
) -> Entries {
    let mut entries = Entries {
        protocol: database.protocol,
        ports: database.ports.clone(),
        addresses: database.addresses.clone(),
        monitor: database.monitor,
        tls: database.tls,
        rules: Vec::new(),
        v4: Vec::new(),
        v6: Vec::new(),
    };
    let mut is_in_force = |what: String, rule: &Rule| {
        if is_expired(rule, now) {
            compiled.warnings.push(format!(
                "database {}, {what}: {} has expired and allows nobody",
                database.name, rule.source
            ));
            return false;
        }
        compiled.next_expiry = [compiled.next_expiry, rule.expires]
            .into_iter()
            .flatten()
            .min();
        true
    };
    // The cluster first: it stays allowed, and exempt, whatever rule names its addresses too.
    if !database.cluster.is_empty() {
        let members = database.cluster.iter();
        let members = members.filter(|member| is_in_force("cluster".into(), member));
        let members: Vec<IpNet> = members
            .flat_map(|member| prefixes(&member.source, regions))
            .copied()
            .collect();
        add(&mut entries, RuleKey::Cluster, &members);
    }
    match &database.model {
        Model::Dedicated { rules } => {
            for (number, rule) in (1..).zip(rules) {
                if is_in_force(format!("rule {number}"), rule) {
                    let key = RuleKey::Rule(rule.source.clone());
                    add(&mut entries, key, prefixes(&rule.source, regions));
                }
            }
        }
        Model::Shared { internet } => {
            if !policy.regional_network.is_empty() {
                add(
                    &mut entries,
                    RuleKey::RegionalNetwork,
                    &policy.regional_network,
                );
            }
            if *internet {
                let everybody = [Ipv4Net::default().into(), Ipv6Net::default().into()];
                add(&mut entries, RuleKey::Internet, &everybody);
            }
        }
    }
    // Stable, so that of two rules with the same prefix the first keeps it.
    entries.v4.sort_by_key(|&(prefix, _)| prefix);
    entries.v4.dedup_by_key(|&mut (prefix, _)| prefix);
    entries.v6.sort_by_key(|&(prefix, _)| prefix);
    entries.v6.dedup_by_key(|&mut (prefix, _)| prefix);
    entries
}

/// Whether the rule no longer allows at the instant `now`.
pub fn is_expired(rule: &Rule, now: Timestamp) -> bool {
    rule.expires.is_some_and(|expires| expires <= now)
}

fn prefixes<'a>(source: &'a Source, regions: &'a Regions) -> &'a [IpNet] {
    match source {
        Source::Cidr(prefix) => std::slice::from_ref(prefix),
        Source::Region(name) => regions.get(name).map_or(&[], |prefixes| prefixes),
    }
}

/// Appends a rule and what it allows; sorting and duplicates come last.
fn add(entries: &mut Entries, key: RuleKey, prefixes: &[IpNet]) {
    let rule = entries.rules.len() as u16;
    entries.rules.push(key);
    for prefix in prefixes {
        match prefix {
            IpNet::V4(prefix) => entries.v4.push((*prefix, rule)),
            IpNet::V6(prefix) => entries.v6.push((*prefix, rule)),
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
    use filter_common::MAX_NAME;

    use super::*;
    use crate::policy::{Listed, Mode};

    fn database(model: Model) -> Database {
        Database {
            name: "orders".into(),
            protocol: Protocol::Tcp,
            ports: vec![5432],
            addresses: vec![],
            model,
            tls: None,
            monitor: false,
            cluster: vec![],
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
            databases,
        }
    }

    fn cidr(text: &str) -> Rule {
        Rule {
            source: Source::Cidr(text.parse().unwrap()),
            label: None,
            expires: None,
        }
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn dedicated(rules: Vec<Rule>) -> Compiled {
        let policy = policy(vec![database(Model::Dedicated { rules })]);
        compile(&policy, &Regions::new(), at("2026-01-01T00:00:00Z"))
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
        assert_eq!(compiled.next_expiry, Some(at("2026-02-01T00:00:00Z")));
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
        let compiled = compile(&with_region, &regions, at("2026-01-01T00:00:00Z"));
        let entries = &compiled.databases["orders"];
        assert_eq!(entries.rules[0], RuleKey::Cluster);
        assert_eq!(entries.prefixes_by_rule(), [1, 1, 1]);
        assert_eq!(entries.v4[1], ("192.0.2.0/24".parse().unwrap(), 1));
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
        let compiled = compile(&policy, &Regions::new(), at("2026-01-01T00:00:00Z"));
        let entries = &compiled.databases["orders"];
        assert_eq!(entries.v4, [("10.1.2.4/32".parse().unwrap(), 0)]);
        assert_eq!(compiled.next_expiry, Some(at("2026-02-01T00:00:00Z")));
        let expected = ["database orders, cluster: 10.1.2.3/32 has expired and allows nobody"];
        assert_eq!(compiled.warnings, expected);
    }

    #[test]
    fn shared_database_is_open_to_the_regional_network_and_with_internet_to_everybody() {
        let closed = policy(vec![database(Model::Shared { internet: false })]);
        let open = policy(vec![database(Model::Shared { internet: true })]);
        let now = at("2026-01-01T00:00:00Z");
        let entries = |policy| compile(policy, &Regions::new(), now).databases["orders"].clone();
        assert_eq!(entries(&closed).v4, [("10.0.0.0/8".parse().unwrap(), 0)]);
        assert_eq!(entries(&closed).v6, []);
        assert_eq!(entries(&open).v4[0], (Ipv4Net::default(), 1));
        assert_eq!(entries(&open).v6, [(Ipv6Net::default(), 1)]);
    }

    #[test]
    fn every_rule_key_fits_its_field_in_the_kernel() {
        let longest = RuleKey::Rule(Source::Region("r".repeat(MAX_NAME)));
        let name = filter_common::Name::new(1, &longest.text()).unwrap();
        assert_eq!(name.text(), Some(longest.text().as_str()));
        let v6 = RuleKey::Rule(cidr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128").source);
        assert!(v6.text().len() <= MAX_NAME);
    }
}
