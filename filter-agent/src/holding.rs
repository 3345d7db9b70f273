//! Compares the rules in force: which others cover a rule, and which rule allows a source. Pure.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use crate::{
    clock::BootTime,
    policy::{Database, Model, Policy, Rule, Source},
    ranges::Ranges,
    rules::{Regions, RuleKey, held, keyed},
    temporary::{Kind, Timed},
};

/// A rule or block in force, with the sources that it holds.
#[derive(Debug)]
pub struct Holding {
    pub key: RuleKey,
    /// `None`: it has no end.
    end: Option<BootTime>,
    ranges: Arc<Ranges>,
}

impl Holding {
    pub fn contains(&self, source: IpAddr) -> bool {
        self.ranges.contains(source)
    }

    /// Whether nothing changes where `other` is taken out and this one holds the same sources.
    fn replaces(&self, other: &Self) -> bool {
        let is_of_kind = match (&self.key, &other.key) {
            (RuleKey::Block(_), RuleKey::Block(_)) => true,
            (RuleKey::Block(_), _) | (_, RuleKey::Block(_)) => false,
            // A cluster is exempt from blocks and from TLS.
            (own, other) => own.is_exempt() || !other.is_exempt(),
        };
        let lasts = match (self.end, other.end) {
            (None, _) => true,
            (Some(own), Some(other)) => own >= other,
            (Some(_), None) => false,
        };
        is_of_kind && lasts
    }
}

/// The regions that rules name, as ranges: one may hold a million prefixes.
pub struct Regional<'a> {
    prefixes: &'a Regions,
    ranges: BTreeMap<String, Arc<Ranges>>,
}

impl<'a> Regional<'a> {
    pub fn new(prefixes: &'a Regions) -> Self {
        Self {
            prefixes,
            ranges: BTreeMap::new(),
        }
    }

    fn of(&mut self, rule: &Rule) -> Arc<Ranges> {
        let make = || Arc::new(Ranges::of(&held(rule, self.prefixes)));
        match &rule.source {
            Source::Region(name) if rule.except.is_empty() => {
                self.ranges.entry(name.clone()).or_insert_with(make).clone()
            }
            _ => make(),
        }
    }
}

/// The rules and blocks of a database that are in force.
pub fn in_force(
    policy: &Policy,
    database: &Database,
    regional: &mut Regional<'_>,
    timed: &Timed,
) -> Vec<Holding> {
    let mut holdings = Vec::new();
    let now = timed.now;
    let mut add = |key: RuleKey, rule: &Rule| {
        let end = rule
            .expires
            .map(|at| timed.ends.of(&database.name, &key, at, now));
        if end.is_none_or(|end| end > now.boot) {
            let ranges = regional.of(rule);
            holdings.push(Holding { key, end, ranges });
        }
    };
    for (key, rule) in keyed(database) {
        add(key, rule);
    }
    for member in database.cluster.iter().filter(|m| m.expires.is_some()) {
        add(RuleKey::Member(member.source.clone()), member);
    }
    let mut fixed = |key, prefixes: Vec<_>| {
        if !prefixes.is_empty() {
            holdings.push(Holding {
                key,
                end: None,
                ranges: Arc::new(Ranges::of(&prefixes)),
            });
        }
    };
    let permanent = database.cluster.iter().filter(|m| m.expires.is_none());
    let permanent = permanent.flat_map(|member| held(member, regional.prefixes).to_vec());
    fixed(RuleKey::Cluster, permanent.collect());
    if let Model::Shared { internet } = &database.model {
        fixed(RuleKey::RegionalNetwork, policy.regional_network.clone());
        if *internet {
            let everybody = ["0.0.0.0/0", "::/0"].map(|all| all.parse().ok());
            fixed(RuleKey::Internet, everybody.into_iter().flatten().collect());
        }
    }
    holdings.extend(timed.in_force(database).map(|rule| Holding {
        key: match rule.kind {
            Kind::Allow => RuleKey::Temporary(rule.source),
            Kind::Block => RuleKey::Block(rule.source),
        },
        end: Some(rule.end),
        ranges: Arc::new(Ranges::of(&[rule.source])),
    }));
    holdings
}

/// The rules that hold, for at least as long, all that a rule does: taking that one out alone changes nothing. By the text
/// of its key.
pub fn covered(holdings: &[Holding]) -> BTreeMap<String, Vec<String>> {
    let covering = |own: &Holding| {
        let others = holdings.iter().filter(|other| other.key != own.key);
        let others: Vec<&Holding> = others.filter(|other| other.replaces(own)).collect();
        let ranges: Vec<&Ranges> = others.iter().map(|other| &*other.ranges).collect();
        let numbers = own.ranges.held_by(&ranges).into_iter();
        let names = numbers.map(|number| others[number].key.to_string());
        (own.key.text(), names.collect())
    };
    holdings.iter().map(covering).collect()
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::{clock::Now, policy::parse, prefixes::Prefixes, temporary::Temporary};

    #[test]
    fn rule_is_covered_by_what_holds_it_for_as_long() {
        let text = "
interfaces: [eth0]
regional_network: [10.0.0.0/8]
regions:
  office: {prefixes: [198.51.100.0/24, 2001:db8::/32]}
databases:
  - name: orders
    port: 5432
    model: dedicated
    force_tls: false
    cluster: [10.1.2.3/32, {cidr: 10.1.2.4/32, expires: 2030-01-01T00:00:00Z}]
    rules:
      - cidr: 203.0.113.0/24
      - cidr: 203.0.113.7/32
      - {cidr: 203.0.113.64/26, except: [203.0.113.66/32]}
      - {region: office}
      - cidr: 198.51.100.9/32
      - cidr: 10.1.2.0/30
      - cidr: 10.1.2.3/32
      - {cidr: 192.0.2.0/24, expires: 2030-01-01T00:00:00Z}
      - cidr: 192.0.2.1/32
      - {cidr: 192.0.2.2/32, expires: 2029-01-01T00:00:00Z}
      - {cidr: 0.0.0.0/0, expires: 2020-01-01T00:00:00Z}
  - {name: shop, port: 3306, engine: mysql, model: shared, internet: true, force_tls: true}
";
        let (policy, _) = parse(text).unwrap();
        let wall: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let now = Now {
            boot: BootTime(1_000_000_000),
            steady: wall,
            wall,
        };
        let mut timed = Timed::of(&policy, now);
        for (kind, source) in [
            (Kind::Allow, "203.0.113.9/32"),
            (Kind::Block, "203.0.113.0/28"),
            (Kind::Block, "203.0.113.8/32"),
        ] {
            let (source, end) = (source.parse().unwrap(), BootTime(u64::MAX / 2));
            let rule = Temporary::new("orders", kind, source, end, now);
            timed.temporary.push(rule);
        }
        let office = ["198.51.100.0/24", "2001:db8::/32"].map(|p| p.parse().unwrap());
        let regions = Regions::from([("office".into(), Prefixes::shared(office))]);
        let mut regional = Regional::new(&regions);
        let holdings = in_force(&policy, &policy.databases[0], &mut regional, &timed);
        let found = covered(&holdings);
        let covered_by = |rule: &str| found[rule].join(", ");
        for (rule, expected) in [
            ("203.0.113.0/24", ""),
            ("203.0.113.7/32", "203.0.113.0/24"),
            ("203.0.113.64/26", "203.0.113.0/24"),
            ("@office", ""),
            ("198.51.100.9/32", "region office"),
            ("10.1.2.0/30", ""),
            ("10.1.2.3/32", "10.1.2.0/30, cluster"),
            ("cluster", ""),
            ("=10.1.2.4/32", ""),
            ("192.0.2.0/24", ""),
            ("192.0.2.1/32", ""),
            ("192.0.2.2/32", "192.0.2.0/24"),
            ("+203.0.113.9/32", "203.0.113.0/24"),
            ("!203.0.113.0/28", ""),
            ("!203.0.113.8/32", "block 203.0.113.0/28"),
        ] {
            assert_eq!(covered_by(rule), expected, "{rule}");
        }
        // Ended.
        assert!(!found.contains_key("0.0.0.0/0"));
        let shop = in_force(&policy, &policy.databases[1], &mut regional, &timed);
        assert_eq!(covered(&shop)["regional network"], ["internet"]);
    }
}
