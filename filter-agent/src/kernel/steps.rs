//! The writes that turn one image into another. Pure.

use filter_common::{BloomLine, Guard, LocalKey, Name};
use ipnet::{Ipv4Net, Ipv6Net};

use crate::kernel::{
    bloom::union,
    change::{Change, changes},
    image::Image,
};

/// One write to one map. Large variants are boxed: nearly all steps of a long list are prefixes.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    Slot(Box<Change<u32, Name>>),
    Rule(Box<Change<u32, Name>>),
    Prefix(PrefixStep),
    Bloom(Box<Change<u32, BloomLine>>),
    Local(Change<LocalKey, Guard>),
    Port(Change<u32, Guard>),
    Protocols { old: u32, new: u32 },
}

/// A write to a trie: database slot and prefix, and the value that an `Image` has for it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PrefixStep {
    V4(Change<(u16, Ipv4Net), u32>),
    V6(Change<(u16, Ipv6Net), u32>),
}

impl Step {
    /// The write to a trie, if this step is one.
    pub fn prefix(&self) -> Option<&PrefixStep> {
        match self {
            Self::Prefix(step) => Some(step),
            _ => None,
        }
    }

    /// Whether two neighbours may change places: both add prefixes of a family, or both remove them.
    pub fn is_independent_of(&self, other: &Self) -> bool {
        match (self.prefix(), other.prefix()) {
            (Some(PrefixStep::V4(one)), Some(PrefixStep::V4(other))) => {
                one.removes() == other.removes()
            }
            (Some(PrefixStep::V6(one)), Some(PrefixStep::V6(other))) => {
                one.removes() == other.removes()
            }
            _ => false,
        }
    }

    /// The step that takes this one back.
    pub fn reversed(&self) -> Self {
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
            Self::Prefix(PrefixStep::V4(change)) => Self::Prefix(PrefixStep::V4(swap(change))),
            Self::Prefix(PrefixStep::V6(change)) => Self::Prefix(PrefixStep::V6(swap(change))),
            Self::Bloom(change) => Self::Bloom(swap(change).into()),
            Self::Local(change) => Self::Local(swap(change)),
            Self::Port(change) => Self::Port(swap(change)),
            &Self::Protocols { old, new } => Self::Protocols { old: new, new: old },
        }
    }
}

impl Image {
    /// Returns the steps from this image to `new`, in an order in which at every instant a source that both allow
    /// passes, and one that both deny is dropped: prefixes are added before a port is guarded by them,
    /// and removed after.
    pub fn steps_to(&self, new: &Self) -> Vec<Step> {
        let slots = changes(&self.slots, &new.slots);
        let rules = changes(&self.rules, &new.rules);
        let allowed4 = changes(&self.allowed4, &new.allowed4);
        let allowed6 = changes(&self.allowed6, &new.allowed6);
        let locals = changes(&self.locals, &new.locals);
        let mut steps = Vec::with_capacity(allowed4.len() + allowed6.len());
        steps.extend(set(&slots).map(|change| Step::Slot(change.into())));
        steps.extend(set(&rules).map(|change| Step::Rule(change.into())));
        let both_blooms = union(&self.bloom, &new.bloom);
        steps.extend(
            changes(&self.bloom, &both_blooms)
                .into_iter()
                .map(|change| Step::Bloom(change.into())),
        );
        steps.extend(set(&allowed4).map(PrefixStep::V4).map(Step::Prefix));
        steps.extend(set(&allowed6).map(PrefixStep::V6).map(Step::Prefix));
        steps.extend(set(&locals).map(Step::Local));
        let both = self.protocols | new.protocols;
        let protocols = |old, new| (old != new).then_some(Step::Protocols { old, new });
        steps.extend(protocols(self.protocols, both));
        steps.extend(changes(&self.ports, &new.ports).into_iter().map(Step::Port));
        steps.extend(protocols(both, new.protocols));
        steps.extend(removed(&locals).map(Step::Local));
        steps.extend(removed(&allowed4).map(PrefixStep::V4).map(Step::Prefix));
        steps.extend(removed(&allowed6).map(PrefixStep::V6).map(Step::Prefix));
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

/// Changes that add an entry or give it another value.
fn set<K: Copy, V: Copy>(changes: &[Change<K, V>]) -> impl Iterator<Item = Change<K, V>> {
    changes.iter().copied().filter(|change| !change.removes())
}

/// Changes that take an entry away.
fn removed<K: Copy, V: Copy>(changes: &[Change<K, V>]) -> impl Iterator<Item = Change<K, V>> {
    changes.iter().copied().filter(|change| change.removes())
}
