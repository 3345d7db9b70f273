//! What the maps hold, as it is and as it should be, and the steps from one to the other. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use anyhow::{Result, bail};
use filter_common::{Guard, LocalKey, Name, Protocol, RULE_IDS, SLOTS, mapped, port_index};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::compile::Compiled;

/// The content of every map that decides a verdict, and the names of slots and rules. Each list is
/// sorted by key, no two alike.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Image {
    /// Database slot to its database.
    pub slots: Vec<(u32, Name)>,
    /// Rule id to the text of its `RuleKey`.
    pub rules: Vec<(u32, Name)>,
    /// Database slot and prefix to the id of the rule that allows it.
    pub allowed4: Vec<((u16, Ipv4Net), u32)>,
    pub allowed6: Vec<((u16, Ipv6Net), u32)>,
    pub locals: Vec<(LocalKey, Guard)>,
    /// By `port_index`.
    pub ports: Vec<(u32, Guard)>,
    /// Sets of `Protocol::bit` and `Protocol::monitored_bit`.
    pub protocols: u32,
}

/// One entry of one map, before and after.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Change<K, V> {
    pub key: K,
    /// `None`: absent.
    pub old: Option<V>,
    pub new: Option<V>,
}

/// One write to one map.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Step {
    Slot(Change<u32, Name>),
    Rule(Change<u32, Name>),
    Allowed4(Change<(u16, Ipv4Net), u32>),
    Allowed6(Change<(u16, Ipv6Net), u32>),
    Local(Change<LocalKey, Guard>),
    Port(Change<u32, Guard>),
    Protocols { old: u32, new: u32 },
}

impl Step {
    /// The step that takes this one back.
    pub fn reversed(self) -> Self {
        fn swap<K, V>(change: Change<K, V>) -> Change<K, V> {
            Change {
                key: change.key,
                old: change.new,
                new: change.old,
            }
        }
        match self {
            Self::Slot(change) => Self::Slot(swap(change)),
            Self::Rule(change) => Self::Rule(swap(change)),
            Self::Allowed4(change) => Self::Allowed4(swap(change)),
            Self::Allowed6(change) => Self::Allowed6(swap(change)),
            Self::Local(change) => Self::Local(swap(change)),
            Self::Port(change) => Self::Port(swap(change)),
            Self::Protocols { old, new } => Self::Protocols { old: new, new: old },
        }
    }
}

impl Image {
    /// What `compiled` needs, with the slots and rule ids of `held` for what stays, and unused ones
    /// for what is new: nothing that `held` still enforces changes its meaning on the way.
    ///
    /// # Errors
    /// More databases or rules, old and new together, than the kernel has slots or ids.
    pub fn of(compiled: &Compiled, held: &Self) -> Result<Self> {
        let mut image = Self::default();
        let slots = held.slots_by_name();
        let mut free_slots = held.free_slots();
        let ids: BTreeMap<(u16, &str), u32> = held
            .rules
            .iter()
            .filter_map(|(id, name)| Some(((name.slot, name.text()?), *id)))
            .collect();
        let mut free_ids = held.free_ids();
        let mut ports: BTreeMap<u32, Guard> = BTreeMap::new();
        for (database, entries) in &compiled.databases {
            let slot = match slots.get(database.as_str()) {
                Some(&slot) => slot,
                None => match free_slots.next() {
                    Some(slot) => slot,
                    None => bail!("no slot left for database {database}: reload in two steps"),
                },
            };
            let Some(name) = Name::new(0, database) else {
                bail!("database name {database} does not fit the kernel's field");
            };
            image.slots.push((slot.into(), name));
            let mut rules = Vec::with_capacity(entries.rules.len());
            for rule in &entries.rules {
                let text = rule.text();
                let id = match ids.get(&(slot, text.as_str())) {
                    Some(&id) => id,
                    None => match free_ids.next() {
                        Some(id) => id,
                        None => bail!("no rule id left for {rule}: reload in two steps"),
                    },
                };
                let Some(name) = Name::new(slot, &text) else {
                    bail!("rule {rule} does not fit the kernel's field");
                };
                rules.push(id);
                image.rules.push((id, name));
            }
            let v4 = entries.v4.iter();
            let v4 = v4.map(|&(prefix, rule)| ((slot, prefix), rules[rule as usize]));
            image.allowed4.extend(v4);
            let v6 = entries.v6.iter();
            let v6 = v6.map(|&(prefix, rule)| ((slot, prefix), rules[rule as usize]));
            image.allowed6.extend(v6);
            image.protocols |= if entries.monitor {
                entries.protocol.monitored_bit()
            } else {
                entries.protocol.bit()
            };
            for &port in &entries.ports {
                let port = port_index(entries.protocol, port);
                let guard = Guard::new(slot, entries.monitor);
                if entries.addresses.is_empty() {
                    ports.insert(port, guard);
                    continue;
                }
                ports
                    .entry(port)
                    .and_modify(|other| *other = other.shared_with(guard))
                    .or_insert(guard.by_address());
                image
                    .locals
                    .extend(entries.addresses.iter().map(|&address| {
                        let address = local_address(address);
                        (LocalKey { address, port }, guard)
                    }));
            }
        }
        image.ports.extend(ports);
        image.slots.sort_unstable_by_key(|&(slot, _)| slot);
        image.rules.sort_unstable_by_key(|&(id, _)| id);
        // Stable sorts: nearly sorted already, one run for each database.
        image.allowed4.sort_by_key(|&(key, _)| key);
        image.allowed6.sort_by_key(|&(key, _)| key);
        image.locals.sort_unstable_by_key(|&(key, _)| key);
        Ok(image)
    }

    pub fn slots_by_name(&self) -> BTreeMap<&str, u16> {
        self.slots
            .iter()
            .filter_map(|(slot, name)| Some((name.text()?, *slot as u16)))
            .collect()
    }

    /// Slots that no map mentions, what a crashed agent left without a name included.
    fn free_slots(&self) -> impl Iterator<Item = u16> {
        let mut used: BTreeSet<u32> = self.slots.iter().map(|&(slot, _)| slot).collect();
        used.extend(self.allowed4.iter().map(|&((slot, _), _)| u32::from(slot)));
        used.extend(self.allowed6.iter().map(|&((slot, _), _)| u32::from(slot)));
        used.extend(self.ports.iter().map(|(_, guard)| u32::from(guard.slot())));
        used.extend(self.locals.iter().map(|(_, guard)| u32::from(guard.slot())));
        (1..SLOTS)
            .filter(move |slot| !used.contains(slot))
            .map(|slot| slot as u16)
    }

    fn free_ids(&self) -> impl Iterator<Item = u32> {
        let used: BTreeSet<u32> = self.rules.iter().map(|&(id, _)| id).collect();
        (0..RULE_IDS).filter(move |id| !used.contains(id))
    }

    /// The writes that turn a kernel that holds `self` into one that holds `new`, in the order in
    /// which at every instant a source allowed by both passes and one denied by both is dropped:
    /// what allows is added before a port is guarded by it, and removed after.
    pub fn steps_to(&self, new: &Self) -> Vec<Step> {
        let slots = changes(&self.slots, &new.slots);
        let rules = changes(&self.rules, &new.rules);
        let allowed4 = changes(&self.allowed4, &new.allowed4);
        let allowed6 = changes(&self.allowed6, &new.allowed6);
        let locals = changes(&self.locals, &new.locals);
        let mut steps = Vec::new();
        steps.extend(set(&slots).map(Step::Slot));
        steps.extend(set(&rules).map(Step::Rule));
        steps.extend(set(&allowed4).map(Step::Allowed4));
        steps.extend(set(&allowed6).map(Step::Allowed6));
        steps.extend(set(&locals).map(Step::Local));
        let both = self.protocols | new.protocols;
        let protocols = |old, new| (old != new).then_some(Step::Protocols { old, new });
        steps.extend(protocols(self.protocols, both));
        steps.extend(changes(&self.ports, &new.ports).into_iter().map(Step::Port));
        steps.extend(protocols(both, new.protocols));
        steps.extend(removed(&locals).map(Step::Local));
        steps.extend(removed(&allowed4).map(Step::Allowed4));
        steps.extend(removed(&allowed6).map(Step::Allowed6));
        steps.extend(removed(&rules).map(Step::Rule));
        steps.extend(removed(&slots).map(Step::Slot));
        steps
    }

    /// Difference from `self` to `new`, by database.
    pub fn difference(&self, new: &Self) -> Difference {
        let mut databases: BTreeMap<String, DatabaseDifference> = BTreeMap::new();
        let name = |image: &Self, slot: u16| {
            let place = image
                .slots
                .binary_search_by_key(&slot.into(), |&(slot, _)| slot);
            place
                .ok()
                .and_then(|place| image.slots[place].1.text().map(str::to_owned))
        };
        // A slot keeps its database from one image to the next, or is in one of them only.
        let database = |slot: u16| {
            let name = name(new, slot).or_else(|| name(self, slot));
            name.unwrap_or_else(|| format!("(slot {slot})"))
        };
        let mut of_prefix = |slot, prefix: IpNet, added: bool, removed: bool| {
            let database = databases.entry(database(slot)).or_default();
            if added && !removed {
                database.added.push(prefix);
            } else if removed && !added {
                database.removed.push(prefix);
            }
        };
        for Change { key, old, new } in changes(&self.allowed4, &new.allowed4) {
            of_prefix(key.0, key.1.into(), new.is_some(), old.is_some());
        }
        for Change { key, old, new } in changes(&self.allowed6, &new.allowed6) {
            of_prefix(key.0, key.1.into(), new.is_some(), old.is_some());
        }
        let mut of_guard = |guard: Guard, text: &str, added: bool| {
            let database = databases.entry(database(guard.slot())).or_default();
            let monitored = if guard.is_monitor() { " (monitor)" } else { "" };
            let text = format!("{text}{monitored}");
            if added {
                database.guarded.push(text);
            } else {
                database.unguarded.push(text);
            }
        };
        for Change { key, old, new } in changes(&self.ports, &new.ports) {
            for (guard, added) in [(old, false), (new, true)] {
                if let Some(guard) = guard.filter(|guard| !guard.is_by_address()) {
                    of_guard(guard, &port_text(key), added);
                }
            }
        }
        for Change { key, old, new } in changes(&self.locals, &new.locals) {
            let address = std::net::Ipv6Addr::from(key.address).to_canonical();
            let text = format!("{address} {}", port_text(key.port));
            for (guard, added) in [(old, false), (new, true)] {
                if let Some(guard) = guard {
                    of_guard(guard, &text, added);
                }
            }
        }
        databases.retain(|_, database| *database != DatabaseDifference::default());
        Difference { databases }
    }
}

/// What an apply changes, or would.
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
    /// Ports that come under protection, or change how.
    pub guarded: Vec<String>,
    pub unguarded: Vec<String>,
}

/// `tcp/5432`.
fn port_text(index: u32) -> String {
    let protocol = Protocol::ALL[(index >> 16) as usize & 1];
    format!("{}/{}", protocol.name(), index as u16)
}

fn local_address(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => mapped(address.octets()),
        IpAddr::V6(address) => address.octets(),
    }
}

/// What differs between two sorted lists, by key.
fn changes<K: Ord + Copy, V: PartialEq + Copy>(
    old: &[(K, V)],
    new: &[(K, V)],
) -> Vec<Change<K, V>> {
    let mut changes = Vec::new();
    let (mut old, mut new) = (old.iter().peekable(), new.iter().peekable());
    loop {
        let (key, old, new) = match (old.peek(), new.peek()) {
            (None, None) => return changes,
            (Some(&&(key, value)), None) => (key, old.next().map(|_| value), None),
            (None, Some(&&(key, value))) => (key, None, new.next().map(|_| value)),
            (Some(&&(left, value)), Some(&&(right, _))) if left < right => {
                (left, old.next().map(|_| value), None)
            }
            (Some(&&(left, _)), Some(&&(right, value))) if right < left => {
                (right, None, new.next().map(|_| value))
            }
            (Some(&&(key, before)), Some(&&(_, after))) => {
                (key, old.next().map(|_| before), new.next().map(|_| after))
            }
        };
        if old != new {
            changes.push(Change { key, old, new });
        }
    }
}

fn set<K: Copy, V: Copy>(changes: &[Change<K, V>]) -> impl Iterator<Item = Change<K, V>> {
    changes
        .iter()
        .copied()
        .filter(|change| change.new.is_some())
}

fn removed<K: Copy, V: Copy>(changes: &[Change<K, V>]) -> impl Iterator<Item = Change<K, V>> {
    changes
        .iter()
        .copied()
        .filter(|change| change.new.is_none())
}
