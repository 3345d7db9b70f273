//! The difference between two images, by database. Pure.

use std::{borrow::Cow, collections::BTreeMap};

use filter_common::{Guard, Protocol, Section};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::kernel::{
    change::{Change, changes},
    image::Image,
    sections::{TrieContent, part},
};

/// The changes of an apply, by database.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct Difference {
    pub databases: BTreeMap<String, DatabaseDifference>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct DatabaseDifference {
    /// Prefixes that become allowed.
    pub added: Vec<IpNet>,
    /// Prefixes that are no longer allowed.
    pub removed: Vec<IpNet>,
    /// Prefixes that become blocked, and that no longer are.
    #[serde(default)]
    pub blocked: Vec<IpNet>,
    #[serde(default)]
    pub unblocked: Vec<IpNet>,
    /// Ports that become guarded, or whose guard changes.
    pub guarded: Vec<String>,
    pub unguarded: Vec<String>,
}

impl DatabaseDifference {
    /// Whether a source that a rule allows may lose its access.
    pub fn takes_access(&self) -> bool {
        !self.removed.is_empty() || !self.blocked.is_empty()
    }

    /// Whether any source may: where a port becomes guarded, those that it was open to.
    pub fn may_cut(&self) -> bool {
        self.takes_access() || !self.guarded.is_empty()
    }
}

impl Image {
    /// This image with the slots that `new` gives to the same databases.
    fn renumbered(&self, new: &Self) -> Cow<'_, Self> {
        let slots = new.slots_by_name();
        let moved: BTreeMap<u16, u16> = self
            .slots_by_name()
            .into_iter()
            .filter_map(|(database, old)| Some((old, *slots.get(database)?)))
            .filter(|(old, new)| old != new)
            .collect();
        if moved.is_empty() {
            return Cow::Borrowed(self);
        }
        let mut image = self.clone();
        let slot = |old: u16| moved.get(&old).copied().unwrap_or(old);
        let guard = |guard: &mut Guard| *guard = guard.with_slot(slot(guard.slot()));
        image
            .slots
            .iter_mut()
            .for_each(|(old, _)| *old = slot(*old as u16).into());
        let section = |old: Section| old.with_slot(slot(old.slot()));
        for prefixes in [&mut image.allowed4, &mut image.blocked4] {
            *prefixes = in_sections(prefixes, section);
        }
        for prefixes in [&mut image.allowed6, &mut image.blocked6] {
            *prefixes = in_sections(prefixes, section);
        }
        image.locals.iter_mut().for_each(|(_, old)| guard(old));
        image.ports.iter_mut().for_each(|(_, old)| guard(old));
        image.slots.sort_unstable_by_key(|&(slot, _)| slot);
        Cow::Owned(image)
    }

    /// Difference from `self` to `new`, by database.
    pub fn difference(&self, new: &Self) -> Difference {
        let old = self.renumbered(new);
        let mut databases: BTreeMap<String, DatabaseDifference> = BTreeMap::new();
        let name = |image: &Self, slot: u16| {
            let place = image
                .slots
                .binary_search_by_key(&slot.into(), |&(slot, _)| slot);
            place
                .ok()
                .and_then(|place| image.slots[place].1.text().map(str::to_owned))
        };
        let database = |slot: u16| {
            let name = name(new, slot).or_else(|| name(&old, slot));
            name.unwrap_or_else(|| format!("(slot {slot})"))
        };
        let of_prefixes = [
            changed(&old.allowed4, &new.allowed4),
            changed(&old.allowed6, &new.allowed6),
        ];
        for (slot, prefix, is_added) in of_prefixes.into_iter().flatten() {
            let database = databases.entry(database(slot)).or_default();
            let list = if is_added {
                &mut database.added
            } else {
                &mut database.removed
            };
            list.push(prefix);
        }
        let of_blocks = [
            changed(&old.blocked4, &new.blocked4),
            changed(&old.blocked6, &new.blocked6),
        ];
        for (slot, prefix, is_added) in of_blocks.into_iter().flatten() {
            let database = databases.entry(database(slot)).or_default();
            let list = if is_added {
                &mut database.blocked
            } else {
                &mut database.unblocked
            };
            list.push(prefix);
        }
        let mut of_guards = |old: Option<Guard>, new: Option<Guard>, text: &str| {
            let described = |guard: Guard| {
                let monitored = if guard.is_monitor() { " (monitor)" } else { "" };
                let tls = if guard.engine() != 0 { " with TLS" } else { "" };
                (database(guard.slot()), format!("{text}{tls}{monitored}"))
            };
            let [old, new] = [old, new].map(|guard| guard.map(described));
            // `policy::differences` lists the other changes of a guard.
            if old == new {
                return;
            }
            if let Some((database, text)) = old {
                databases.entry(database).or_default().unguarded.push(text);
            }
            if let Some((database, text)) = new {
                databases.entry(database).or_default().guarded.push(text);
            }
        };
        for Change { key, old, new } in changes(&old.ports, &new.ports) {
            let guards = [old, new].map(|guard| {
                let guard = guard.map(Guard::of_any_sources);
                guard.filter(|guard| !guard.is_by_address())
            });
            of_guards(guards[0], guards[1], &port_text(key));
        }
        for Change { key, old, new } in changes(&old.locals, &new.locals) {
            let address = std::net::Ipv6Addr::from(key.address).to_canonical();
            let text = format!("{address} {}", port_text(key.port));
            let [old, new] = [old, new].map(|guard| guard.map(Guard::of_any_sources));
            of_guards(old, new, &text);
        }
        databases.retain(|_, database| *database != DatabaseDifference::default());
        Difference { databases }
    }
}

/// Prefixes of a slot that come, or go: not those that another of its sections has as well.
fn changed<N: Ord + Copy + Into<IpNet>>(
    old: &TrieContent<N>,
    new: &TrieContent<N>,
) -> Vec<(u16, IpNet, bool)> {
    // Changes are sorted by section: most have the section of the one before.
    let mut others = (None, [false; 2]);
    let changes = old.changes_to(new).into_iter().filter_map(|change| {
        let (section, prefix) = change.key;
        let slot = section.slot();
        let other = match section.is_cluster() {
            true => Section::rules(slot),
            false => Section::cluster(slot),
        };
        if others.0 != Some(other) {
            let has_any = |list: &TrieContent<N>| part(list, other).next().is_some();
            others = (Some(other), [old, new].map(has_any));
        }
        let is_in =
            |list: &TrieContent<N>, has_any| has_any && list.get(&(other, prefix)).is_some();
        let (was_there, is_there) = (is_in(old, others.1[0]), is_in(new, others.1[1]));
        let is_old = change.old.is_some() || was_there;
        let is_new = change.new.is_some() || is_there;
        (is_new != is_old).then(|| (slot, prefix.into(), is_new))
    });
    let mut changed: Vec<_> = changes.collect();
    // A prefix that is added to both sections, or removed from both, is listed once.
    changed.sort_unstable();
    changed.dedup();
    changed
}

/// The prefixes in other sections.
fn in_sections<N: Ord + Copy>(
    prefixes: &TrieContent<N>,
    section: impl Fn(Section) -> Section,
) -> TrieContent<N> {
    let moved = prefixes.iter();
    let moved = moved.map(|&((old, prefix), value)| ((section(old), prefix), value));
    let mut moved: Vec<_> = moved.collect();
    moved.sort_by_key(|&(key, _)| key);
    moved.into()
}

/// `tcp/5432`.
fn port_text(index: u32) -> String {
    let protocol = Protocol::ALL[(index >> 16) as usize & 1];
    format!("{}/{}", protocol.name(), index as u16)
}
