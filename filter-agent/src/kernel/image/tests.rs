use std::net::Ipv4Addr;

use super::*;
use crate::{
    compile::Entries,
    kernel::{
        bloom::may_match4,
        change::Change,
        difference::{DatabaseDifference, Difference},
        steps::{PrefixStep, Step},
    },
    policy::Source,
    prefixes::Prefixes,
    rules::RuleKey,
};

/// The maps while steps are written to them, judged as the packet path does.
#[derive(Clone, Debug, Default, PartialEq)]
struct Kernel {
    slots: BTreeMap<u32, Name>,
    rules: BTreeMap<u32, Name>,
    ends: BTreeMap<u32, BootTime>,
    allowed4: BTreeMap<(Section, Ipv4Net), RuleValue>,
    allowed6: BTreeMap<(Section, Ipv6Net), RuleValue>,
    blocked4: BTreeMap<(Section, Ipv4Net), RuleValue>,
    blocked6: BTreeMap<(Section, Ipv6Net), RuleValue>,
    bloom: BTreeMap<u32, BloomLine>,
    locals: BTreeMap<LocalKey, Guard>,
    ports: BTreeMap<u32, Guard>,
    protocols: u32,
    /// The time at which packets are judged.
    now: BootTime,
}

impl Kernel {
    fn write(&mut self, step: &Step) {
        fn put<K: Copy + Ord, V: Copy + PartialEq + std::fmt::Debug>(
            map: &mut BTreeMap<K, V>,
            change: &Change<K, V>,
        ) {
            assert_eq!(map.remove(&change.key), change.old);
            if let Some(new) = change.new {
                map.insert(change.key, new);
            }
        }
        match step {
            Step::Slot(change) => put(&mut self.slots, change),
            Step::Rule(change) => put(&mut self.rules, change),
            Step::Prefix(PrefixStep::V4(change)) => put(&mut self.allowed4, change),
            Step::Prefix(PrefixStep::V6(change)) => put(&mut self.allowed6, change),
            Step::End(change) => put(&mut self.ends, change),
            Step::Block(PrefixStep::V4(change)) => put(&mut self.blocked4, change),
            Step::Block(PrefixStep::V6(change)) => put(&mut self.blocked6, change),
            Step::Bloom(change) => put(&mut self.bloom, change),
            Step::Local(change) => put(&mut self.locals, change),
            Step::Port(change) => put(&mut self.ports, change),
            &Step::Protocols { old, new } => {
                assert_eq!(self.protocols, old);
                self.protocols = new;
            }
            Step::Epoch(ports) => assert!(ports.iter().copied().eq(self.ports.clone())),
        }
    }

    fn image(&self) -> Image {
        fn list<K: Copy, V: Copy>(map: &BTreeMap<K, V>) -> Vec<(K, V)> {
            map.iter().map(|(key, value)| (*key, *value)).collect()
        }
        Image {
            slots: list(&self.slots),
            rules: list(&self.rules),
            ends: list(&self.ends),
            blocked4: list(&self.blocked4).into(),
            blocked6: list(&self.blocked6).into(),
            allowed4: list(&self.allowed4).into(),
            allowed6: list(&self.allowed6).into(),
            bloom: list(&self.bloom),
            locals: list(&self.locals),
            ports: list(&self.ports),
            protocols: self.protocols,
        }
    }

    /// The guard that judges a packet. `None`: it is dropped, whoever sends it.
    fn guard(&self, destination: Ipv4Addr, port: u16) -> Option<Guard> {
        let port = port_index(Protocol::Tcp, port);
        let guard = self.ports.get(&port).copied().unwrap_or_default();
        if !guard.is_by_address() {
            return Some(guard);
        }
        let address = mapped(destination.octets());
        let local = self.locals.get(&LocalKey { address, port });
        let local = local.copied().unwrap_or_default();
        (!destination.is_broadcast() || guard.is_monitor()).then_some(local)
    }

    /// Whether a guard lets a source pass, and whether a verdict cache holds to that.
    fn judge(&self, guard: Guard, source: Ipv4Addr) -> (bool, bool) {
        if guard.is_none() {
            return (true, false);
        }
        let found = |list: &BTreeMap<(Section, Ipv4Net), RuleValue>, section| {
            let held = list.iter();
            let held = held.filter(|((of, net), _)| *of == section && net.contains(&source));
            let longest = held.max_by_key(|((_, net), _)| net.prefix_len());
            let value = longest.map(|(_, value)| *value);
            value.filter(|value| value.end().is_none_or(|rule| self.ends[&rule] > self.now))
        };
        let rules = Section::rules(guard.slot());
        let of_cluster = || found(&self.allowed4, Section::cluster(guard.slot()));
        let member = guard.has_cluster().then(of_cluster).flatten();
        let may_match = may_match4(|line| self.bloom.get(&line).copied(), source);
        let allowed = member.or_else(|| found(&self.allowed4, rules));
        let allowed = allowed.filter(|_| may_match || guard.is_wide());
        let block = || found(&self.blocked4, rules);
        let is_subject = allowed.is_some() && member.is_none() && guard.has_blocks();
        let block = is_subject.then(block).flatten();
        let decided = block.or(allowed);
        let passes = allowed.is_some() && block.is_none() || guard.is_monitor();
        (passes, decided.is_none_or(|value| value.end().is_none()))
    }

    fn passes(&self, source: Ipv4Addr, destination: Ipv4Addr, port: u16) -> bool {
        let guard = self.guard(destination, port);
        guard.is_some_and(|guard| self.judge(guard, source).0)
    }
}

const LOCALS: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2)];
const DESTINATIONS: [Ipv4Addr; 3] = [LOCALS[0], LOCALS[1], Ipv4Addr::BROADCAST];
const PORTS: [u16; 3] = [1, 2, 3];

fn source(random: &mut fastrand::Rng) -> Ipv4Addr {
    Ipv4Addr::new(192, 0, 2, random.u8(..16))
}

/// Up to three databases that share no port of an address, open to parts of 192.0.2.0/28.
fn compiled(random: &mut fastrand::Rng, now: BootTime) -> Compiled {
    let mut compiled = Compiled::default();
    let mut free: Vec<(u16, Option<Ipv4Addr>)> = PORTS
        .iter()
        .flat_map(|&port| {
            if random.bool() {
                vec![(port, None)]
            } else {
                LOCALS.iter().map(|&local| (port, Some(local))).collect()
            }
        })
        .collect();
    random.shuffle(&mut free);
    for name in ["a", "b", "c"] {
        let Some((port, local)) = free.pop().filter(|_| random.u8(..4) > 0) else {
            continue;
        };
        let prefix = |random: &mut fastrand::Rng| {
            let length = match random.u8(..8) {
                0 => random.u8(..8),
                1 => random.u8(20..28),
                _ => random.u8(28..=32),
            };
            Ipv4Net::new_assert(source(random), length).trunc()
        };
        let mut entries = Entries {
            protocol: Protocol::Tcp,
            ports: vec![port],
            addresses: local.map(IpAddr::from).into_iter().collect(),
            monitor: random.u8(..4) == 0,
            tls: None,
            on_removal: crate::policy::OnRemoval::Reset,
            rules: vec![],
            lists: vec![],
            counts: Default::default(),
        };
        for _ in 0..random.u16(..7) {
            let net = prefix(random);
            let end = [None, None, Some(30), Some(150), Some(250)][random.usize(..5)];
            let end = end.map(|left| now.0 + left);
            let key = match random.u8(..4) {
                0 => RuleKey::Member(Source::Cidr(net.into())),
                1 => RuleKey::Block(net.into()),
                _ => RuleKey::Rule(Source::Cidr(net.into())),
            };
            if entries.rules.iter().all(|(other, _)| *other != key) {
                let list = Prefixes::shared([net.into()]);
                entries.add(key, end.map(BootTime), [list]);
            }
        }
        compiled.databases.insert(name.into(), entries);
    }
    compiled
}

fn packets() -> impl Iterator<Item = (Ipv4Addr, Ipv4Addr, u16)> {
    (0..16)
        .map(|last| Ipv4Addr::new(192, 0, 2, last))
        .flat_map(|source| DESTINATIONS.map(|local| (source, local)))
        .flat_map(|(source, local)| PORTS.map(|port| (source, local, port)))
}

#[test]
fn at_every_step_what_both_policies_pass_passes_and_what_both_drop_is_dropped() {
    let mut random = fastrand::Rng::with_seed(1);
    let mut kernel = Kernel::default();
    let mut origin = None;
    for round in 0..500 {
        // The kernel holds ended rules until the next change.
        kernel.now = BootTime(100 * round);
        let held = kernel.image();
        let compiled = compiled(&mut random, kernel.now);
        let (new, made_of) = Image::next(&compiled, &held, origin.as_ref()).unwrap();
        // At times it is not known what the maps were made of.
        origin = (random.u8(..10) > 0).then_some(made_of);
        let unknown = Image::of(&compiled, &held).unwrap();
        let bloom = new.bloom.clone();
        assert_eq!(new, Image { bloom, ..unknown });
        let before = kernel.clone();
        let mut after = kernel.clone();
        let mut steps = held.steps_to(&new);
        for group in steps.chunk_by_mut(Step::is_independent_of) {
            random.shuffle(group);
        }
        steps.iter().for_each(|step| after.write(step));
        assert_eq!(after.image(), new);
        // Verdicts that some CPU may have cached since the last epoch.
        let mut remembered = BTreeSet::new();
        let remember = |kernel: &Kernel, remembered: &mut BTreeSet<_>| {
            for (source, local, port) in packets() {
                if let Some(guard) = kernel.guard(local, port)
                    && let (passes, true) = kernel.judge(guard, source)
                {
                    remembered.insert((source, guard.0, passes));
                }
            }
        };
        remember(&before, &mut remembered);
        for (done, step) in steps.iter().enumerate() {
            kernel.write(step);
            if matches!(step, Step::Epoch(_)) {
                remembered.clear();
            }
            for (source, local, port) in packets() {
                let judged = |kernel: &Kernel| kernel.passes(source, local, port);
                if judged(&before) == judged(&after) {
                    let other = kernel.guard(local, port);
                    let other = other.map(|guard| (source, guard.0, !judged(&after)));
                    let is_other = judged(&kernel) != judged(&after)
                        || other.is_some_and(|other| remembered.contains(&other));
                    assert!(
                        !is_other,
                        "{source} to {local}:{port} after step {done} of {steps:#?}"
                    );
                }
            }
            remember(&kernel, &mut remembered);
            let mut undone = kernel.clone();
            for step in steps[..=done].iter().rev() {
                undone.write(&step.reversed());
            }
            assert_eq!(undone, before);
        }
    }
}

fn one(name: &str, prefixes: &[&str]) -> (String, Entries) {
    let mut entries = Entries {
        protocol: Protocol::Tcp,
        ports: vec![5432],
        addresses: vec![],
        monitor: false,
        tls: None,
        on_removal: crate::policy::OnRemoval::Reset,
        rules: vec![],
        lists: vec![],
        counts: Default::default(),
    };
    for text in prefixes {
        let net: IpNet = text.parse().unwrap();
        let list = Prefixes::shared([net]);
        entries.add(RuleKey::Rule(Source::Cidr(net)), None, [list]);
    }
    (name.into(), entries)
}

fn only(database: (String, Entries)) -> Compiled {
    Compiled {
        databases: [database].into(),
        ..Compiled::default()
    }
}

#[test]
fn slots_and_rule_ids_stay_with_their_names_and_are_not_reused_at_once() {
    let first = Image::of(
        &only(one("a", &["192.0.2.0/25", "198.51.100.0/24"])),
        &Image::default(),
    );
    let first = first.unwrap();
    let second = Image::of(
        &only(one("a", &["198.51.100.0/24", "203.0.113.0/24"])),
        &first,
    );
    let second = second.unwrap();
    assert_eq!(first.slots, second.slots);
    assert_eq!(first.rules[1], second.rules[0]);
    assert_ne!(first.rules[0].0, second.rules[1].0);
    let other = Image::of(&only(one("b", &["192.0.2.0/25"])), &first).unwrap();
    assert_ne!(first.slots[0].0, other.slots[0].0);
    assert!(first.rules.iter().all(|(id, _)| *id != other.rules[0].0));
}

#[test]
fn slot_that_only_entries_without_a_name_use_is_not_given_away() {
    let torn = Image {
        allowed4: vec![(
            (Section::rules(1), "0.0.0.0/0".parse().unwrap()),
            RuleValue::allowed(0),
        )]
        .into(),
        ..Image::default()
    };
    let image = Image::of(&only(one("a", &[])), &torn).unwrap();
    assert_eq!(image.slots[0].0, 2);
}

#[test]
fn port_shared_by_address_is_of_no_database_and_monitored_only_if_all_are() {
    let mut compiled = only(one("a", &[]));
    let (_, mut entries) = one("b", &[]);
    entries.addresses = vec![LOCALS[1].into()];
    compiled.databases.insert("b".into(), entries);
    let first = compiled.databases.get_mut("a").unwrap();
    first.addresses = vec![LOCALS[0].into()];
    first.monitor = true;
    let port = |compiled: &Compiled| Image::of(compiled, &Image::default()).unwrap().ports[0].1;
    assert!(port(&compiled).is_by_address() && port(&compiled).slot() == 0);
    assert!(!port(&compiled).is_monitor());
    compiled.databases.get_mut("b").unwrap().monitor = true;
    assert!(port(&compiled).is_monitor());
}

#[test]
fn difference_names_prefixes_and_ports_by_database() {
    let held = Image::of(&only(one("a", &["192.0.2.0/25"])), &Image::default()).unwrap();
    let new = Image::of(&only(one("a", &["198.51.100.0/24"])), &held).unwrap();
    let difference = held.difference(&new);
    let expected = DatabaseDifference {
        added: vec!["198.51.100.0/24".parse().unwrap()],
        removed: vec!["192.0.2.0/25".parse().unwrap()],
        ..DatabaseDifference::default()
    };
    assert_eq!(difference.databases, [("a".into(), expected)].into());
    let gone = held.difference(&Image::default());
    assert_eq!(gone.databases["a"].unguarded, ["tcp/5432"]);
    assert_eq!(held.difference(&held), Difference::default());
}

#[test]
fn prefix_that_the_cluster_keeps_is_not_told_as_removed() {
    let with_member = |rules: &[&str]| {
        let (name, mut entries) = one("a", rules);
        let list = Prefixes::shared(["192.0.2.0/25".parse().unwrap()]);
        entries.add(RuleKey::Cluster, None, [list]);
        only((name, entries))
    };
    let held = Image::of(&with_member(&["192.0.2.0/25"]), &Image::default()).unwrap();
    let new = Image::of(&with_member(&[]), &held).unwrap();
    assert_eq!(held.allowed4.len(), new.allowed4.len() + 1);
    assert_eq!(held.difference(&new), Difference::default());
    assert_eq!(new.difference(&held), Difference::default());
}

#[test]
fn bloom_filter_of_a_long_list_matches_what_comes_and_forgets_in_time_what_went() {
    let mut random = fastrand::Rng::with_seed(11);
    let region = |random: &mut fastrand::Rng, count| {
        let hosts = (0..count).map(|_| Ipv4Net::new_assert(random.u32(..).into(), 32).into());
        Prefixes::shared(hosts.collect::<Vec<IpNet>>())
    };
    let long = region(&mut random, 20_000);
    let (name, empty) = one("a", &[]);
    let key = |name: &str| RuleKey::Rule(Source::Region(name.into()));
    let mut image = Image::default();
    let mut origin = None;
    let (mut went, mut added_to) = (Vec::new(), 0);
    for _ in 0..40 {
        let other = region(&mut random, 20);
        let mut entries = empty.clone();
        entries.add(key("long"), None, [long.clone()]);
        entries.add(key("other"), None, [other.clone()]);
        let compiled = only((name.clone(), entries));
        let (next, made_of) = Image::next(&compiled, &image, origin.as_ref()).unwrap();
        let line = |number| find(&next.bloom, number);
        let matches = |prefix: &IpNet| match prefix.addr() {
            IpAddr::V4(address) => may_match4(line, address),
            IpAddr::V6(_) => false,
        };
        assert!(long.iter().chain(other.iter()).all(matches));
        let exact = Image::of(&compiled, &image).unwrap();
        added_to += usize::from(next.bloom != exact.bloom);
        let remembered = went.iter().filter(|prefix| matches(prefix)).count();
        // Those of one in 64 of all, and the few that match by chance.
        assert!(remembered < 20_000 / REFILL + 40, "{remembered}");
        went.extend_from_slice(&other);
        (image, origin) = (next, Some(made_of));
    }
    assert!((20..40).contains(&added_to), "{added_to}");
}
