//! The image: what the maps hold, or should hold. Pure.

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv6Addr},
};

use anyhow::{Result, bail};
use filter_common::{
    BLOOM_LINES, BLOOM_SHORTEST, BloomLine, EXEMPT, Guard, LocalKey, Name, RULE_IDS, SLOTS, mapped,
    port_index,
};
use ipnet::{Ipv4Net, Ipv6Net};

use crate::{compile::Compiled, kernel::bloom::add_ranges};

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
    /// The prefix Bloom filter: the lines that are not all zeros.
    pub bloom: Vec<(u32, BloomLine)>,
    pub locals: Vec<(LocalKey, Guard)>,
    /// By `port_index`.
    pub ports: Vec<(u32, Guard)>,
    /// Sets of `Protocol::bit` and `Protocol::monitored_bit`.
    pub protocols: u32,
}

impl Image {
    /// Returns the image for `compiled`. Databases and rules that `current` has keep their slots and ids, new
    /// ones get unused ones: no entry in force changes its meaning while steps are written.
    ///
    /// # Errors
    /// More databases or rules, old and new together, than the kernel has slots or ids.
    pub fn of(compiled: &Compiled, current: &Self) -> Result<Self> {
        let mut image = Self::default();
        let mut slots = current.slots_by_name();
        let moving = current.moving(compiled, &slots);
        slots.retain(|_, slot| !moving.contains(slot));
        let mut free_slots = current.free_slots();
        let ids: BTreeMap<(u16, &str), u32> = current
            .rules
            .iter()
            .filter_map(|(id, name)| Some(((name.slot, name.text()?), *id)))
            .collect();
        let mut free_ids = current.free_ids();
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
            let is_wide = v4.chain(v6).any(|length| length < BLOOM_SHORTEST);
            for &port in &entries.ports {
                let port = port_index(entries.protocol, port);
                let mut guard = Guard::new(slot, entries.monitor);
                if is_wide {
                    guard = guard.wide();
                }
                if let Some(tls) = entries.tls {
                    guard = guard.with_tls(tls.engine, tls.cancel_in_clear);
                    if tls.monitor {
                        guard = guard.with_monitored_tls();
                    }
                    if tls.proxied {
                        guard = guard.proxied();
                    }
                    if tls.open_unenforced {
                        guard = guard.open_unenforced();
                    }
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
        let v4 = v4.filter(|prefix| prefix.prefix_len() >= BLOOM_SHORTEST);
        let v4 = v4.map(|prefix| (prefix.network().to_bits(), prefix.broadcast().to_bits()));
        let mut lines = vec![BloomLine::default(); BLOOM_LINES as usize];
        add_ranges(&mut lines, v4, true);
        let v6 = image.allowed6.iter().map(|((_, prefix), _)| prefix);
        let v6 = v6.filter(|prefix| prefix.prefix_len() >= BLOOM_SHORTEST);
        let first_bits = |address: Ipv6Addr| (address.to_bits() >> 96) as u32;
        let v6 = v6.map(|prefix| (first_bits(prefix.network()), first_bits(prefix.broadcast())));
        add_ranges(&mut lines, v6, false);
        let used = (0..)
            .zip(lines)
            .filter(|(_, line)| *line != BloomLine::default());
        image.bloom = used.collect();
        Ok(image)
    }

    /// The guards of a slot's ports where TLS is forced.
    fn forced(&self, slot: u16) -> impl Iterator<Item = Guard> {
        let guards = self.ports.iter().map(|&(_, guard)| guard);
        let guards = guards.chain(self.locals.iter().map(|&(_, guard)| guard));
        guards.filter(move |guard| guard.slot() == slot && guard.engine() != 0)
    }

    /// Whether connections without TLS to a slot's database are refused, rather than monitored.
    pub fn refuses_clear(&self, slot: u16) -> bool {
        self.forced(slot)
            .any(|guard| !guard.of_connections().is_monitor())
    }

    /// Whether the ports of a slot's database are closed where nothing judges its connections.
    pub fn closes_unenforced(&self, slot: u16) -> bool {
        self.forced(slot).any(|guard| !guard.is_open_unenforced())
    }

    /// The slot of each database.
    pub fn slots_by_name(&self) -> BTreeMap<&str, u16> {
        self.slots
            .iter()
            .filter_map(|(slot, name)| Some((name.text()?, *slot as u16)))
            .collect()
    }

    /// The slot of one database.
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

    /// Slots that no map mentions. A crashed agent may have left entries of a slot without a name.
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
}

fn local_address(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => mapped(address.octets()),
        IpAddr::V6(address) => address.octets(),
    }
}
