//! The writes that turn one image into another. Pure.

use std::{collections::BTreeMap, iter};

use filter_common::{BloomLine, Guard, LocalKey, Name, RuleValue, Section};
use ipnet::{Ipv4Net, Ipv6Net};

use crate::{
    clock::BootTime,
    kernel::{
        bloom::union,
        change::{Change, changes},
        image::Image,
        sections::TrieContent,
    },
    rules::RuleKey,
};

/// One write to one map. Large variants are boxed: nearly all steps of a long list are prefixes.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    Slot(Box<Change<u32, Name>>),
    Rule(Box<Change<u32, Name>>),
    End(Change<u32, BootTime>),
    Prefix(PrefixStep),
    Block(PrefixStep),
    Bloom(Box<Change<u32, BloomLine>>),
    Local(Change<LocalKey, Guard>),
    Port(Change<u32, Guard>),
    Protocols {
        old: u32,
        new: u32,
    },
    /// The verdict caches forget what they hold. The guards of ports as they are at that moment.
    Epoch(Vec<(u32, Guard)>),
}

/// A write to a trie of allowed prefixes, or of blocks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PrefixStep {
    V4(Change<(Section, Ipv4Net), RuleValue>),
    V6(Change<(Section, Ipv6Net), RuleValue>),
}

impl Step {
    /// The write to a trie of allowed prefixes, if this step is one.
    pub fn prefix(&self) -> Option<&PrefixStep> {
        match self {
            Self::Prefix(step) => Some(step),
            _ => None,
        }
    }

    /// The line and its new bits, if this step is a write to the prefix Bloom filter.
    pub fn bloom_line(&self) -> Option<(u32, BloomLine)> {
        match self {
            Self::Bloom(change) => Some((change.key, change.new.unwrap_or_default())),
            _ => None,
        }
    }

    /// Whether two neighbours may change places: both add prefixes of a family to sections of one kind, or both remove
    /// them, or both are lines of the Bloom filter.
    pub fn is_independent_of(&self, other: &Self) -> bool {
        if let (Self::Bloom(_), Self::Bloom(_)) = (self, other) {
            return true;
        }
        match (self.prefix(), other.prefix()) {
            (Some(PrefixStep::V4(one)), Some(PrefixStep::V4(other))) => {
                one.removes() == other.removes()
                    && one.key.0.is_cluster() == other.key.0.is_cluster()
            }
            (Some(PrefixStep::V6(one)), Some(PrefixStep::V6(other))) => {
                one.removes() == other.removes()
                    && one.key.0.is_cluster() == other.key.0.is_cluster()
            }
            _ => false,
        }
    }

    /// The step that takes this one back.
    pub fn reversed(&self) -> Self {
        fn swap_prefix(step: &PrefixStep) -> PrefixStep {
            match step {
                PrefixStep::V4(change) => PrefixStep::V4(swap(change)),
                PrefixStep::V6(change) => PrefixStep::V6(swap(change)),
            }
        }
        fn swap<K: Copy, V: Copy>(change: &Change<K, V>) -> Change<K, V> {
            Change {
                key: change.key,
                old: change.new,
                new: change.old,
            }
        }
        match self {
            Self::Slot(change) => Self::Slot(swap(change).into()),
            Self::Rule(change) => Self::Rule(swap(change).into()),
            Self::End(change) => Self::End(swap(change)),
            Self::Prefix(step) => Self::Prefix(swap_prefix(step)),
            Self::Block(step) => Self::Block(swap_prefix(step)),
            Self::Bloom(change) => Self::Bloom(swap(change).into()),
            Self::Local(change) => Self::Local(swap(change)),
            Self::Port(change) => Self::Port(swap(change)),
            &Self::Protocols { old, new } => Self::Protocols { old: new, new: old },
            Self::Epoch(ports) => Self::Epoch(ports.clone()),
        }
    }
}

impl Image {
    /// Returns the steps from this image to `new`, in an order in which at every instant a source that both allow
    /// passes, and one that both deny is dropped: prefixes are added before a port is guarded by them,
    /// and removed after; an end becomes later before prefixes are to last until then, and earlier after none is. A prefix
    /// that loses its end, or gets one, is written between.
    pub fn steps_to(&self, new: &Self) -> Vec<Step> {
        let slots = changes(&self.slots, &new.slots);
        let rules = changes(&self.rules, &new.rules);
        let allowed4 = prefix_changes(&self.allowed4, &new.allowed4, Ipv4Net::supernet);
        let allowed6 = prefix_changes(&self.allowed6, &new.allowed6, Ipv6Net::supernet);
        let blocked4 = prefix_changes(&self.blocked4, &new.blocked4, Ipv4Net::supernet);
        let blocked6 = prefix_changes(&self.blocked6, &new.blocked6, Ipv6Net::supernet);
        let mut steps = Vec::with_capacity(allowed4.len() + allowed6.len());
        steps.extend(set(&slots).map(|change| Step::Slot(change.into())));
        steps.extend(set(&rules).map(|change| Step::Rule(change.into())));
        let both_blooms = union(&self.bloom, &new.bloom);
        steps.extend(
            changes(&self.bloom, &both_blooms)
                .into_iter()
                .map(|change| Step::Bloom(change.into())),
        );
        let latest_ends = latest(&self.ends, &new.ends);
        let names: BTreeMap<u32, Name> = self.rules.iter().chain(&new.rules).copied().collect();
        let mut later = changes(&self.ends, &latest_ends);
        // Blocks come before the ends of rules that had ended and are prolonged.
        let mut end_later = |steps: &mut Vec<Step>, is_meant: fn(&str) -> bool| {
            let of_rules = later.extract_if(.., |change| {
                let name = names.get(&change.key).and_then(Name::text);
                name.is_some_and(is_meant)
            });
            steps.extend(of_rules.map(Step::End));
        };
        // Members of clusters are allowed before there are blocks, which they pass, and blocks are in force before more is
        // allowed; the other way round for what goes.
        let (cluster4, rules4) = by_section(&allowed4);
        let (cluster6, rules6) = by_section(&allowed6);
        end_later(&mut steps, RuleKey::is_member);
        steps.extend(set(&cluster4).map(PrefixStep::V4).map(Step::Prefix));
        steps.extend(set(&cluster6).map(PrefixStep::V6).map(Step::Prefix));
        let (old, new_guards) = (Guards::of(self), Guards::of(new));
        let clustered = old.with(&new_guards, Guard::with_cluster_of);
        old.steps_to(&clustered, &mut steps);
        end_later(&mut steps, RuleKey::is_block);
        steps.extend(set(&blocked4).map(PrefixStep::V4).map(Step::Block));
        steps.extend(set(&blocked6).map(PrefixStep::V6).map(Step::Block));
        let blocking = clustered.with(&new_guards, Guard::with_blocks_of);
        clustered.steps_to(&blocking, &mut steps);
        end_later(&mut steps, |_| true);
        steps.extend(set(&rules4).map(PrefixStep::V4).map(Step::Prefix));
        steps.extend(set(&rules6).map(PrefixStep::V6).map(Step::Prefix));
        let both = self.protocols | new.protocols;
        let protocols = |old, new| (old != new).then_some(Step::Protocols { old, new });
        steps.extend(protocols(self.protocols, both));
        let new_clustered = new_guards.with(&old, Guard::with_cluster_of);
        let new_blocking = new_clustered.with(&old, Guard::with_blocks_of);
        let mut guards = Vec::new();
        blocking.steps_to(&new_blocking, &mut guards);
        // A source that the database did not allow may be remembered as such. Where a port that was not guarded becomes the
        // database's, and a new rule allows the source, it would be dropped until the change is done.
        let allows_more = |step: &Step| matches!(step, Step::Prefix(_) | Step::End(_));
        if !guards.is_empty() && steps.iter().any(allows_more) {
            steps.push(Step::Epoch(blocking.ports.clone()));
        }
        steps.append(&mut guards);
        steps.extend(protocols(both, new.protocols));
        steps.extend(removed(&rules4).map(PrefixStep::V4).map(Step::Prefix));
        steps.extend(removed(&rules6).map(PrefixStep::V6).map(Step::Prefix));
        new_blocking.steps_to(&new_clustered, &mut steps);
        steps.extend(removed(&blocked4).map(PrefixStep::V4).map(Step::Block));
        steps.extend(removed(&blocked6).map(PrefixStep::V6).map(Step::Block));
        new_clustered.steps_to(&new_guards, &mut steps);
        steps.extend(removed(&cluster4).map(PrefixStep::V4).map(Step::Prefix));
        steps.extend(removed(&cluster6).map(PrefixStep::V6).map(Step::Prefix));
        steps.extend(changes(&latest_ends, &new.ends).into_iter().map(Step::End));
        steps.extend(
            changes(&both_blooms, &new.bloom)
                .into_iter()
                .map(|change| Step::Bloom(change.into())),
        );
        steps.extend(removed(&rules).map(|change| Step::Rule(change.into())));
        steps.extend(removed(&slots).map(|change| Step::Slot(change.into())));
        steps
    }
}

/// Changes of a trie. Where a prefix goes that has an end, it gets the value first that its sources have then: it may have
/// ended, and would hide a new prefix of which it is a part until it is gone.
fn prefix_changes<N: Ord + Copy>(
    old: &TrieContent<N>,
    new: &TrieContent<N>,
    supernet: fn(&N) -> Option<N>,
) -> Sources<N> {
    let mut all = Vec::new();
    for change in old.changes_to(new) {
        let (section, prefix) = change.key;
        let ends = change.old.is_some_and(|old| old.end().is_some());
        let outer = || {
            let mut supernets = iter::successors(Some(prefix), supernet);
            supernets.find_map(|outer| new.get(&(section, outer)))
        };
        let between = (change.removes() && ends).then(outer).flatten();
        match between {
            Some(_) => all.extend([
                Change {
                    new: between,
                    ..change
                },
                Change {
                    old: between,
                    ..change
                },
            ]),
            None => all.push(change),
        }
    }
    all
}

type Sources<N> = Vec<Change<(Section, N), RuleValue>>;

/// Changes of the cluster's section, and of the rules'.
fn by_section<N: Copy>(changes: &[Change<(Section, N), RuleValue>]) -> (Sources<N>, Sources<N>) {
    let changes = changes.iter().copied();
    changes.partition(|change| change.key.0.is_cluster())
}

/// Port guards of an image, or between two.
struct Guards {
    locals: Vec<(LocalKey, Guard)>,
    ports: Vec<(u32, Guard)>,
}

impl Guards {
    fn of(image: &Image) -> Self {
        Self {
            locals: image.locals.clone(),
            ports: image.ports.clone(),
        }
    }

    /// These guards, each with a flag that another one of the same database has in its place.
    fn with(&self, other: &Self, flag_of: fn(Guard, Guard) -> Guard) -> Self {
        Self {
            locals: with_flag(&self.locals, &other.locals, flag_of),
            ports: with_flag(&self.ports, &other.ports, flag_of),
        }
    }

    /// Guards of local addresses are added before a port refers to them, and removed after.
    fn steps_to(&self, new: &Self, steps: &mut Vec<Step>) {
        let locals = changes(&self.locals, &new.locals);
        steps.extend(set(&locals).map(Step::Local));
        steps.extend(changes(&self.ports, &new.ports).into_iter().map(Step::Port));
        steps.extend(removed(&locals).map(Step::Local));
    }
}

fn with_flag<K: Ord + Copy>(
    guards: &[(K, Guard)],
    other: &[(K, Guard)],
    flag_of: fn(Guard, Guard) -> Guard,
) -> Vec<(K, Guard)> {
    let guards = guards.iter().map(|&(key, guard)| {
        let found = other.binary_search_by_key(&key, |&(key, _)| key);
        match found.map(|place| other[place].1) {
            Ok(other) if other.slot() == guard.slot() => (key, flag_of(guard, other)),
            _ => (key, guard),
        }
    });
    guards.collect()
}

/// The later end of each rule. Ends of blocks, too: one that becomes later may block for an instant what a block that is
/// removed at the same time does.
fn latest(old: &[(u32, BootTime)], new: &[(u32, BootTime)]) -> Vec<(u32, BootTime)> {
    let mut ends: BTreeMap<u32, BootTime> = old.iter().copied().collect();
    for &(rule, end) in new {
        let latest = ends.entry(rule).or_default();
        *latest = end.max(*latest);
    }
    ends.into_iter().collect()
}

/// Changes that add an entry or give it another value.
fn set<K: Copy, V: Copy>(changes: &[Change<K, V>]) -> impl Iterator<Item = Change<K, V>> {
    changes.iter().copied().filter(|change| !change.removes())
}

/// Changes that take an entry away.
fn removed<K: Copy, V: Copy>(changes: &[Change<K, V>]) -> impl Iterator<Item = Change<K, V>> {
    changes.iter().copied().filter(|change| change.removes())
}
