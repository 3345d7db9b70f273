//! What the maps hold, as it is and as it should be, and the steps from one to the other. Pure.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv6Addr},
};

use anyhow::{Result, bail};
use filter_common::{
    EXEMPT, Guard, LocalKey, NEAR_BITS, NEAR_LINES, NEAR_SHORTEST, Name, NearLine, Protocol,
    RULE_IDS, SLOTS, mapped, near_place, port_index,
};
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
    /// Database slot and prefix to the id of the rule that allows it, with `EXEMPT` where TLS is not
    /// forced on it.
    pub allowed4: Vec<((u16, Ipv4Net), u32)>,
    pub allowed6: Vec<((u16, Ipv6Net), u32)>,
    /// What is near those prefixes: the lines that are not all zeros.
    pub near: Vec<(u32, NearLine)>,
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

impl<K, V> Change<K, V> {
    fn removes(&self) -> bool {
        self.new.is_none()
    }
}

/// One write to one map. What is large is boxed: nearly all steps of a long list are prefixes.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    Slot(Box<Change<u32, Name>>),
    Rule(Box<Change<u32, Name>>),
    Allowed4(Change<(u16, Ipv4Net), u32>),
    Allowed6(Change<(u16, Ipv6Net), u32>),
    Near(Box<Change<u32, NearLine>>),
    Local(Change<LocalKey, Guard>),
    Port(Change<u32, Guard>),
    Protocols { old: u32, new: u32 },
}

impl Step {
    /// Whether two neighbours may change places: both add prefixes of a family, or both remove them.
    pub fn is_independent_of(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Allowed4(one), Self::Allowed4(other)) => one.removes() == other.removes(),
            (Self::Allowed6(one), Self::Allowed6(other)) => one.removes() == other.removes(),
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
            Self::Allowed4(change) => Self::Allowed4(swap(change)),
            Self::Allowed6(change) => Self::Allowed6(swap(change)),
            Self::Near(change) => Self::Near(swap(change).into()),
            Self::Local(change) => Self::Local(swap(change)),
            Self::Port(change) => Self::Port(swap(change)),
            &Self::Protocols { old, new } => Self::Protocols { old: new, new: old },
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
        let mut slots = held.slots_by_name();
        let moving = held.moving(compiled, &slots);
        slots.retain(|_, slot| !moving.contains(slot));
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
                rules.push(if rule.is_exempt() { id | EXEMPT } else { id });
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
            let v4 = entries.v4.iter().map(|(prefix, _)| prefix.prefix_len());
            let v6 = entries.v6.iter().map(|(prefix, _)| prefix.prefix_len());
            let is_wide = v4.chain(v6).any(|length| length < NEAR_SHORTEST);
            for &port in &entries.ports {
                let port = port_index(entries.protocol, port);
                let mut guard = Guard::new(slot, entries.monitor);
                if is_wide {
                    guard = guard.wide();
                }
                if let Some(tls) = entries.tls {
                    guard = guard.with_tls(tls.engine, tls.cancel_in_clear);
                }
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
        let v4 = image.allowed4.iter().map(|((_, prefix), _)| prefix);
        let v4 = v4.filter(|prefix| prefix.prefix_len() >= NEAR_SHORTEST);
        let v4 = v4.map(|prefix| (prefix.network().to_bits(), prefix.broadcast().to_bits()));
        let mut near = vec![NearLine::default(); NEAR_LINES as usize];
        add_near(&mut near, v4, true);
        let v6 = image.allowed6.iter().map(|((_, prefix), _)| prefix);
        let v6 = v6.filter(|prefix| prefix.prefix_len() >= NEAR_SHORTEST);
        let first_bits = |address: Ipv6Addr| (address.to_bits() >> 96) as u32;
        let v6 = v6.map(|prefix| (first_bits(prefix.network()), first_bits(prefix.broadcast())));
        add_near(&mut near, v6, false);
        let used = (0..)
            .zip(near)
            .filter(|(_, line)| *line != NearLine::default());
        image.near = used.collect();
        Ok(image)
    }

    /// Slots of databases where TLS is forced.
    pub fn forced(&self) -> BTreeSet<u16> {
        let guards = self.ports.iter().map(|(_, guard)| guard);
        let guards = guards.chain(self.locals.iter().map(|(_, guard)| guard));
        let forced = guards.filter(|guard| guard.engine() != 0);
        forced.map(|guard| guard.slot()).collect()
    }

    /// Where each database is in the kernel.
    pub fn slots_by_name(&self) -> BTreeMap<&str, u16> {
        self.slots
            .iter()
            .filter_map(|(slot, name)| Some((name.text()?, *slot as u16)))
            .collect()
    }

    /// Where one database is in the kernel.
    pub fn slot(&self, database: &str) -> Option<u16> {
        let named = |(_, name): &&(u32, Name)| name.text() == Some(database);
        self.slots.iter().find(named).map(|&(slot, _)| slot as u16)
    }

    /// Slots of databases that take a port of an address over from another, or lose one to another.
    /// They need new slots: while a slot holds what the old and the new policy allow, a port that
    /// changes hands would be open to what only the other port's old or new rules allow.
    fn moving(&self, compiled: &Compiled, slots: &BTreeMap<&str, u16>) -> BTreeSet<u16> {
        let mut moving = BTreeSet::new();
        for (database, entries) in &compiled.databases {
            let own = slots.get(database.as_str()).copied();
            for &port in &entries.ports {
                let port = port_index(entries.protocol, port);
                let place = self.ports.binary_search_by_key(&port, |&(port, _)| port);
                let Ok(guard) = place.map(|place| self.ports[place].1) else {
                    continue;
                };
                let mut owners = vec![guard.slot()];
                if guard.is_by_address() {
                    let everywhere = entries.addresses.is_empty();
                    let addresses: Vec<_> = entries
                        .addresses
                        .iter()
                        .map(|&address| local_address(address))
                        .collect();
                    let locals = self.locals.iter().filter(|(local, _)| {
                        local.port == port && (everywhere || addresses.contains(&local.address))
                    });
                    owners = locals.map(|(_, guard)| guard.slot()).collect();
                }
                let others = owners.into_iter().filter(|&owner| Some(owner) != own);
                for other in others {
                    moving.insert(other);
                    moving.extend(own);
                }
            }
        }
        moving
    }

    /// Slots that no map mentions, what a crashed agent left without a name included.
    fn free_slots(&self) -> impl Iterator<Item = u16> {
        let slots = self.slots.iter().map(|&(slot, _)| slot as u16);
        let slots = slots.chain(self.allowed4.iter().map(|&((slot, _), _)| slot));
        let slots = slots.chain(self.allowed6.iter().map(|&((slot, _), _)| slot));
        let slots = slots.chain(self.ports.iter().map(|(_, guard)| guard.slot()));
        let slots = slots.chain(self.locals.iter().map(|(_, guard)| guard.slot()));
        // A table, not a set: there may be a million prefixes, and this runs at every reload.
        let mut used = [false; u16::MAX as usize + 1];
        slots.for_each(|slot| used[usize::from(slot)] = true);
        (1..SLOTS as u16).filter(move |&slot| !used[usize::from(slot)])
    }

    /// A rule's id is free once its name is gone, which is removed last.
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
        let mut steps = Vec::with_capacity(allowed4.len() + allowed6.len());
        steps.extend(set(&slots).map(|change| Step::Slot(change.into())));
        steps.extend(set(&rules).map(|change| Step::Rule(change.into())));
        let near = union(&self.near, &new.near);
        steps.extend(
            changes(&self.near, &near)
                .into_iter()
                .map(|change| Step::Near(change.into())),
        );
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
        steps.extend(
            changes(&near, &new.near)
                .into_iter()
                .map(|change| Step::Near(change.into())),
        );
        steps.extend(removed(&rules).map(|change| Step::Rule(change.into())));
        steps.extend(removed(&slots).map(|change| Step::Slot(change.into())));
        steps
    }

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
        image
            .allowed4
            .iter_mut()
            .for_each(|((old, _), _)| *old = slot(*old));
        image
            .allowed6
            .iter_mut()
            .for_each(|((old, _), _)| *old = slot(*old));
        image.locals.iter_mut().for_each(|(_, old)| guard(old));
        image.ports.iter_mut().for_each(|(_, old)| guard(old));
        image.slots.sort_unstable_by_key(|&(slot, _)| slot);
        image.allowed4.sort_unstable_by_key(|&(key, _)| key);
        image.allowed6.sort_unstable_by_key(|&(key, _)| key);
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
        let mut of_prefix = |slot, prefix: IpNet, added: bool, removed: bool| {
            let database = databases.entry(database(slot)).or_default();
            if added && !removed {
                database.added.push(prefix);
            } else if removed && !added {
                database.removed.push(prefix);
            }
        };
        for Change { key, old, new } in changes(&old.allowed4, &new.allowed4) {
            of_prefix(key.0, key.1.into(), new.is_some(), old.is_some());
        }
        for Change { key, old, new } in changes(&old.allowed6, &new.allowed6) {
            of_prefix(key.0, key.1.into(), new.is_some(), old.is_some());
        }
        let mut of_guard = |guard: Guard, text: &str, added: bool| {
            let database = databases.entry(database(guard.slot())).or_default();
            let monitored = if guard.is_monitor() { " (monitor)" } else { "" };
            let tls = if guard.engine() != 0 { " with TLS" } else { "" };
            let text = format!("{text}{tls}{monitored}");
            if added {
                database.guarded.push(text);
            } else {
                database.unguarded.push(text);
            }
        };
        for Change { key, old, new } in changes(&old.ports, &new.ports) {
            let [old, new] = [old, new].map(|guard| guard.map(Guard::of_any_width));
            for (guard, added) in [(old, false), (new, true)] {
                let guard = guard.filter(|guard| old != new && !guard.is_by_address());
                if let Some(guard) = guard {
                    of_guard(guard, &port_text(key), added);
                }
            }
        }
        for Change { key, old, new } in changes(&old.locals, &new.locals) {
            let address = std::net::Ipv6Addr::from(key.address).to_canonical();
            let text = format!("{address} {}", port_text(key.port));
            let [old, new] = [old, new].map(|guard| guard.map(Guard::of_any_width));
            for (guard, added) in [(old, false), (new, true)] {
                if let Some(guard) = guard.filter(|_| old != new) {
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

/// Puts what is near ranges of one address family, given by the first 32 bits of their first and their
/// last addresses, into the lines of the map.
fn add_near(lines: &mut [NearLine], ranges: impl Iterator<Item = (u32, u32)>, is_v4: bool) {
    const UNIT: u32 = 32 - NEAR_BITS;
    for (first, last) in ranges {
        for address in (first >> UNIT..=last >> UNIT).map(|beginning| beginning << UNIT) {
            let (line, word, bits) = near_place(address.to_be(), is_v4);
            lines[line as usize][word] |= bits;
        }
    }
}

/// What is near by either of two such maps.
fn union(a: &[(u32, NearLine)], b: &[(u32, NearLine)]) -> Vec<(u32, NearLine)> {
    let merged = changes(a, b).into_iter();
    let merged = merged.map(|Change { key, old, new }| {
        let (old, new) = (old.unwrap_or_default(), new.unwrap_or_default());
        (key, std::array::from_fn(|word| old[word] | new[word]))
    });
    let differ: BTreeMap<u32, NearLine> = merged.collect();
    let mut lines = a.to_vec();
    lines.retain(|(line, _)| !differ.contains_key(line));
    lines.extend(differ);
    lines.sort_unstable_by_key(|&(line, _)| line);
    lines
}

/// What differs between two sorted lists, by key.
pub fn changes<K: Ord + Copy, V: PartialEq + Copy>(
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

/// Changes that add an entry or give it another value.
fn set<K: Copy, V: Copy>(changes: &[Change<K, V>]) -> impl Iterator<Item = Change<K, V>> {
    changes.iter().copied().filter(|change| !change.removes())
}

/// Changes that take an entry away.
fn removed<K: Copy, V: Copy>(changes: &[Change<K, V>]) -> impl Iterator<Item = Change<K, V>> {
    changes.iter().copied().filter(|change| change.removes())
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::{
        compile::{Entries, RuleKey},
        policy::Source,
    };

    /// The maps while steps are written to them, judged as the packet path does.
    #[derive(Clone, Debug, Default, PartialEq)]
    struct Kernel {
        slots: BTreeMap<u32, Name>,
        rules: BTreeMap<u32, Name>,
        allowed4: BTreeMap<(u16, Ipv4Net), u32>,
        allowed6: BTreeMap<(u16, Ipv6Net), u32>,
        near: BTreeMap<u32, NearLine>,
        locals: BTreeMap<LocalKey, Guard>,
        ports: BTreeMap<u32, Guard>,
        protocols: u32,
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
                Step::Allowed4(change) => put(&mut self.allowed4, change),
                Step::Allowed6(change) => put(&mut self.allowed6, change),
                Step::Near(change) => put(&mut self.near, change),
                Step::Local(change) => put(&mut self.locals, change),
                Step::Port(change) => put(&mut self.ports, change),
                &Step::Protocols { old, new } => {
                    assert_eq!(self.protocols, old);
                    self.protocols = new;
                }
            }
        }

        fn image(&self) -> Image {
            fn list<K: Copy, V: Copy>(map: &BTreeMap<K, V>) -> Vec<(K, V)> {
                map.iter().map(|(key, value)| (*key, *value)).collect()
            }
            Image {
                slots: list(&self.slots),
                rules: list(&self.rules),
                allowed4: list(&self.allowed4),
                allowed6: list(&self.allowed6),
                near: list(&self.near),
                locals: list(&self.locals),
                ports: list(&self.ports),
                protocols: self.protocols,
            }
        }

        fn passes(&self, source: Ipv4Addr, destination: Ipv4Addr, port: u16) -> bool {
            let port = port_index(Protocol::Tcp, port);
            let Some(&guard) = self.ports.get(&port) else {
                return true;
            };
            let guard = if guard.is_by_address() {
                let address = mapped(destination.octets());
                match self.locals.get(&LocalKey { address, port }) {
                    Some(&guard) => guard,
                    None => return true,
                }
            } else {
                guard
            };
            let mut allowed = self.allowed4.keys();
            let allowed = allowed.any(|(slot, net)| *slot == guard.slot() && net.contains(&source));
            let (line, word, bits) = near_place(source.to_bits().to_be(), true);
            let line = self.near.get(&line);
            let near = line.is_some_and(|line| line[word] & bits == bits);
            (near || guard.is_wide()) && allowed || guard.is_monitor()
        }
    }

    const LOCALS: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2)];
    const PORTS: [u16; 3] = [1, 2, 3];

    fn source(random: &mut fastrand::Rng) -> Ipv4Addr {
        Ipv4Addr::new(192, 0, 2, random.u8(..16))
    }

    /// Up to three databases that share no port of an address, open to parts of 192.0.2.0/28.
    fn compiled(random: &mut fastrand::Rng) -> Compiled {
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
            let mut v4: Vec<(Ipv4Net, u16)> = (0..random.u16(..5))
                .map(|rule| {
                    let length = match random.u8(..8) {
                        0 => random.u8(..8),
                        1 => random.u8(20..28),
                        _ => random.u8(28..=32),
                    };
                    let net = Ipv4Net::new(source(random), length).unwrap();
                    (net.trunc(), rule)
                })
                .collect();
            v4.sort();
            v4.dedup_by_key(|&mut (net, _)| net);
            let rules: Vec<RuleKey> = v4
                .iter()
                .map(|&(net, _)| RuleKey::Rule(Source::Cidr(net.into())))
                .collect();
            for (place, (_, rule)) in v4.iter_mut().enumerate() {
                *rule = place as u16;
            }
            let entries = Entries {
                protocol: Protocol::Tcp,
                ports: vec![port],
                addresses: local.map(IpAddr::from).into_iter().collect(),
                monitor: random.u8(..4) == 0,
                tls: None,
                rules,
                v4,
                v6: vec![],
            };
            compiled.databases.insert(name.into(), entries);
        }
        compiled
    }

    fn packets() -> impl Iterator<Item = (Ipv4Addr, Ipv4Addr, u16)> {
        (0..16)
            .map(|last| Ipv4Addr::new(192, 0, 2, last))
            .flat_map(|source| LOCALS.map(|local| (source, local)))
            .flat_map(|(source, local)| PORTS.map(|port| (source, local, port)))
    }

    #[test]
    fn at_every_step_what_both_policies_pass_passes_and_what_both_drop_is_dropped() {
        let mut random = fastrand::Rng::with_seed(1);
        let mut kernel = Kernel::default();
        for _ in 0..500 {
            let held = kernel.image();
            let new = Image::of(&compiled(&mut random), &held).unwrap();
            let before = kernel.clone();
            let mut after = kernel.clone();
            let mut steps = held.steps_to(&new);
            for group in steps.chunk_by_mut(Step::is_independent_of) {
                random.shuffle(group);
            }
            steps.iter().for_each(|step| after.write(step));
            assert_eq!(after.image(), new);
            for (done, step) in steps.iter().enumerate() {
                kernel.write(step);
                for (source, local, port) in packets() {
                    let judged = |kernel: &Kernel| kernel.passes(source, local, port);
                    if judged(&before) == judged(&after) {
                        let place = format!("{source} to {local}:{port} after step {done}");
                        assert_eq!(judged(&kernel), judged(&after), "{place} of {steps:#?}");
                    }
                }
                let mut undone = kernel.clone();
                for step in steps[..=done].iter().rev() {
                    undone.write(&step.reversed());
                }
                assert_eq!(undone, before);
            }
        }
    }

    #[test]
    fn near_are_all_addresses_that_begin_as_one_of_a_prefix_does_and_few_others() {
        let mut random = fastrand::Rng::with_seed(7);
        let (mut far, mut mistaken) = (0, 0);
        for _ in 0..200 {
            let mut prefixes: Vec<Ipv4Net> = (0..random.usize(..30))
                .map(|_| {
                    let shortest = random.u8(12..20);
                    let length = random.u8(shortest..=32);
                    Ipv4Net::new_assert(random.u32(..).into(), length).trunc()
                })
                .collect();
            random.shuffle(&mut prefixes);
            let ranges = prefixes
                .iter()
                .map(|prefix| (prefix.network().to_bits(), prefix.broadcast().to_bits()));
            let mut lines = vec![NearLine::default(); NEAR_LINES as usize];
            add_near(&mut lines, ranges, true);
            for _ in 0..200 {
                let inside = random.choice(&prefixes).filter(|_| random.bool());
                let address = inside.map_or(random.u32(..), |prefix| {
                    let around = random.u32(..) >> prefix.prefix_len().min(31);
                    (prefix.network().to_bits() ^ around).wrapping_add(random.u32(..600))
                });
                let all = Ipv4Net::new_assert(address.into(), NEAR_BITS as u8);
                let expected = prefixes
                    .iter()
                    .any(|prefix| prefix.contains(&all.trunc()) || all.trunc().contains(prefix));
                let (line, word, bits) = near_place(address.to_be(), true);
                let found = lines[line as usize][word] & bits == bits;
                assert!(found || !expected, "{address:x} of {prefixes:?}");
                far += u32::from(!expected);
                mistaken += u32::from(found && !expected);
            }
        }
        assert!(far > 10_000 && mistaken < far / 100, "{mistaken} of {far}");
    }

    fn one(name: &str, prefixes: &[&str]) -> (String, Entries) {
        let rules = prefixes.iter().map(|text| text.parse().unwrap());
        let entries = Entries {
            protocol: Protocol::Tcp,
            ports: vec![5432],
            addresses: vec![],
            monitor: false,
            tls: None,
            rules: rules.map(|net| RuleKey::Rule(Source::Cidr(net))).collect(),
            v4: (0..)
                .zip(prefixes)
                .map(|(i, text)| (text.parse().unwrap(), i))
                .collect(),
            v6: vec![],
        };
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
            allowed4: vec![((1, "0.0.0.0/0".parse().unwrap()), 0)],
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
}
