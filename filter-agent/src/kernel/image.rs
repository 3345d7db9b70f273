//! The image: what the maps hold, or should hold. Pure.

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use anyhow::{Result, bail};
use filter_common::{
    BLOOM_SHORTEST, BloomLine, Guard, LocalKey, Name, Protocol, RULE_IDS, RuleValue, SLOTS,
    Section, mapped, port_index,
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::{
    clock::BootTime,
    compile::{Compiled, Entries},
    held::{Group, Held},
    kernel::{
        bloom::with_prefixes,
        sections::{Rewrite, TrieContent, sections},
    },
};

/// The prefixes by whose coming and going the prefix Bloom filter is filled anew: one in so many of all.
const REFILL: usize = 64;

/// The content of every map that decides a verdict, and the names of slots and rules. Each list is
/// sorted by key, no two alike.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Image {
    /// Database slot to its database.
    pub slots: Vec<(u32, Name)>,
    /// Rule id to the text of its `RuleKey`.
    pub rules: Vec<(u32, Name)>,
    /// Rule id to the end of the rule, where it has one.
    pub ends: Vec<(u32, BootTime)>,
    /// The rule that allows a prefix, and when that ends.
    pub allowed4: TrieContent<Ipv4Net>,
    pub allowed6: TrieContent<Ipv6Net>,
    /// The block that holds a prefix, and when that ends.
    pub blocked4: TrieContent<Ipv4Net>,
    pub blocked6: TrieContent<Ipv6Net>,
    /// The prefix Bloom filter: the lines that are not all zeros.
    pub bloom: Vec<(u32, BloomLine)>,
    pub locals: Vec<(LocalKey, Guard)>,
    /// By `port_index`.
    pub ports: Vec<(u32, Guard)>,
    /// Sets of `Protocol::bit` and `Protocol::monitored_bit`.
    pub protocols: u32,
}

/// What an image was made of.
#[derive(Clone, Debug)]
pub struct Origin {
    pub compiled: Compiled,
    /// Prefixes that came or went since the Bloom filter was filled: it may still match those that went.
    since_filled: usize,
}

/// The verdict of an image on a source and a local port.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Access<'a> {
    /// The port is not guarded, or only monitored.
    Open,
    /// `rule`: the text of its `RuleKey`.
    Allowed {
        database: &'a str,
        rule: &'a str,
    },
    Denied,
}

fn find<K: Ord + Copy, V: Copy>(list: &[(K, V)], key: K) -> Option<V> {
    let place = list.binary_search_by_key(&key, |&(key, _)| key);
    place.ok().map(|place| list[place].1)
}

impl Image {
    /// Returns the image for `compiled` where nothing is in force yet, or it is not known what that was made of.
    ///
    /// # Errors
    /// As `next`.
    pub fn of(compiled: &Compiled, current: &Self) -> Result<Self> {
        let (image, _) = Self::next(compiled, current, None)?;
        Ok(image)
    }

    /// Returns the image for `compiled`, and what it is made of, as `former` is for `current`. Databases and rules that
    /// `current` has keep their slots and ids, new ones get unused ones: no entry in force changes its meaning while
    /// steps are written.
    ///
    /// # Errors
    /// More databases or rules, old and new together, than the kernel has slots or ids.
    pub fn next(
        compiled: &Compiled,
        current: &Self,
        former: Option<&Origin>,
    ) -> Result<(Self, Origin)> {
        let mut image = Self::default();
        // Where the Bloom filter is due, everything is gone through.
        let prefixes = current.allowed4.len() + current.allowed6.len();
        let origin = former.filter(|former| former.since_filled * REFILL < prefixes);
        let mut allowed = Rewrite::of(&current.allowed4, &current.allowed6);
        let mut blocked = Rewrite::of(&current.blocked4, &current.blocked6);
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
            let kept = slots.get(database.as_str()).copied();
            let slot = match kept.or_else(|| free_slots.next()) {
                Some(slot) => slot,
                None => bail!("no slot left for database {database}: reload in two steps"),
            };
            let Some(name) = Name::new(0, database) else {
                bail!("database name {database} does not fit the kernel's field");
            };
            image.slots.push((slot.into(), name));
            let mut rules = Vec::with_capacity(entries.rules.len());
            for (rule, end) in &entries.rules {
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
                image.ends.extend(end.map(|end| (id, end)));
            }
            let former = origin.filter(|_| kept.is_some());
            let former = former.and_then(|former| former.compiled.databases.get(database));
            let rewrite = |trie: &mut Rewrite, group, section, value: fn(u32) -> RuleValue| {
                let former = former.map(|former| former.lists(group));
                trie.section(section, &entries.lists(group), former.as_ref(), |held| {
                    until_end(value(rules[usize::from(held.rule)]), held, &rules)
                });
            };
            let exempt = |rule| RuleValue::allowed(rule).exempt();
            let section = Section::rules(slot);
            rewrite(&mut allowed, Group::Cluster, Section::cluster(slot), exempt);
            rewrite(&mut allowed, Group::Rules, section, RuleValue::allowed);
            rewrite(&mut blocked, Group::Blocks, section, RuleValue::blocked);
            image.protocols |= if entries.monitor {
                entries.protocol.monitored_bit()
            } else {
                entries.protocol.bit()
            };
            let shortest =
                [Group::Cluster, Group::Rules].map(|group| entries.lists(group).shortest());
            let shortest = shortest.into_iter().flatten().min();
            let is_wide = shortest.is_some_and(|length| length < BLOOM_SHORTEST);
            let has_blocks = entries.lists(Group::Blocks).count() > 0;
            let has_cluster = entries.rules.iter().any(|(rule, _)| rule.is_exempt());
            for &port in &entries.ports {
                let port = port_index(entries.protocol, port);
                let mut guard = Guard::new(slot, entries.monitor);
                if is_wide {
                    guard = guard.wide();
                }
                if has_cluster {
                    guard = guard.with_cluster();
                }
                if has_blocks {
                    guard = guard.with_blocks();
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
        image.ends.sort_unstable_by_key(|&(id, _)| id);
        image.locals.sort_unstable_by_key(|&(key, _)| key);
        let (allowed, blocked) = (allowed.finish(), blocked.finish());
        (image.allowed4, image.allowed6) = (allowed.v4, allowed.v6);
        (image.blocked4, image.blocked6) = (blocked.v4, blocked.v6);
        let changed = allowed.came4.len() + allowed.came6.len() + allowed.went;
        let mut since_filled = 0;
        image.bloom = match origin {
            Some(origin) if changed * REFILL < prefixes => {
                since_filled = origin.since_filled + changed;
                with_prefixes(&current.bloom, allowed.came4.iter(), allowed.came6.iter())
            }
            _ => {
                let v4 = image.allowed4.iter().map(|((_, prefix), _)| prefix);
                let v6 = image.allowed6.iter().map(|((_, prefix), _)| prefix);
                with_prefixes(&[], v4, v6)
            }
        };
        let origin = Origin {
            compiled: compiled.clone(),
            since_filled,
        };
        Ok((image, origin))
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

    /// The rules and blocks of each database, by the texts of their keys.
    pub fn rules_by_name(&self) -> BTreeSet<(String, String)> {
        let databases = self.slots_by_name();
        let databases: BTreeMap<u16, &str> = databases.into_iter().map(|(n, s)| (s, n)).collect();
        let named = |(_, name): &(u32, Name)| {
            let database = databases.get(&name.slot)?;
            Some(((*database).to_owned(), name.text()?.to_owned()))
        };
        self.rules.iter().filter_map(named).collect()
    }

    /// The slot of one database.
    pub fn slot(&self, database: &str) -> Option<u16> {
        let named = |(_, name): &&(u32, Name)| name.text() == Some(database);
        self.slots.iter().find(named).map(|&(slot, _)| slot as u16)
    }

    /// Whether a source may connect to a local TCP port. A rule counts whether or not it has ended, a block at the time
    /// `now`.
    pub fn access(&self, local: SocketAddr, source: IpAddr, now: BootTime) -> Access<'_> {
        match self.guard(local) {
            None => Access::Open,
            Some(guard) => match self.rule_of(guard.slot(), source, now) {
                Some((database, rule)) => Access::Allowed { database, rule },
                None if guard.is_monitor() => Access::Open,
                None => Access::Denied,
            },
        }
    }

    fn guard(&self, local: SocketAddr) -> Option<Guard> {
        let port = port_index(Protocol::Tcp, local.port());
        let guard = find(&self.ports, port)?;
        if !guard.is_by_address() {
            return Some(guard);
        }
        let address = local_address(local.ip());
        find(&self.locals, LocalKey { address, port })
    }

    /// The database in a slot, and the text of the rule that holds a source.
    fn rule_of(&self, slot: u16, source: IpAddr, now: BootTime) -> Option<(&str, &str)> {
        fn name<K: Ord + Copy>(list: &[(K, Name)], key: K) -> Option<&str> {
            let place = list.binary_search_by_key(&key, |&(key, _)| key).ok()?;
            list[place].1.text()
        }
        let mut sections = [Section::cluster(slot), Section::rules(slot)].into_iter();
        let value = sections.find_map(|section| match source {
            IpAddr::V4(source) => (0..=32).rev().find_map(|length| {
                let prefix = Ipv4Net::new_assert(source, length).trunc();
                self.allowed4.get(&(section, prefix))
            }),
            IpAddr::V6(source) => (0..=128).rev().find_map(|length| {
                let prefix = Ipv6Net::new_assert(source, length).trunc();
                self.allowed6.get(&(section, prefix))
            }),
        })?;
        let lasts = |value: &RuleValue| {
            let end = value.end().and_then(|rule| find(&self.ends, rule));
            end.is_none_or(|end| end > now)
        };
        let section = Section::rules(slot);
        let mut blocked4 = self.blocked4.iter().filter(|((of, _), _)| *of == section);
        let mut blocked6 = self.blocked6.iter().filter(|((of, _), _)| *of == section);
        let is_blocked = !value.is_exempt()
            && match source {
                IpAddr::V4(source) => {
                    blocked4.any(|((_, net), v)| net.contains(&source) && lasts(v))
                }
                IpAddr::V6(source) => {
                    blocked6.any(|((_, net), v)| net.contains(&source) && lasts(v))
                }
            };
        if is_blocked {
            return None;
        }
        let database = name(&self.slots, u32::from(slot))?;
        Some((database, name(&self.rules, value.rule())?))
    }

    /// The TCP ports that are guarded.
    pub fn tcp_ports(&self) -> BTreeSet<u16> {
        let ports = self.ports.iter().map(|&(port, _)| port);
        let first = port_index(Protocol::Tcp, 0);
        ports
            .filter_map(|port| port.checked_sub(first)?.try_into().ok())
            .collect()
    }

    /// Slots of databases that take a port of an address over from another, or lose one to another.
    /// They need new slots: while a slot holds what the old and the new policy allow, a port that
    /// changes hands would be open to what only the other port's old or new rules allow. So do databases whose blocks
    /// change (or come back: one that ended, and is prolonged) together with the places where they apply: for an instant the old blocks
    /// would apply to the new places. And
    /// those whose port becomes one of all addresses, or of some: what is sent to many (a broadcast) is dropped where it is of
    /// some, and would be judged by the old and the new rules together.
    fn moving(&self, compiled: &Compiled, slots: &BTreeMap<&str, u16>) -> BTreeSet<u16> {
        let mut moving = BTreeSet::new();
        for (database, entries) in &compiled.databases {
            let own = slots.get(database.as_str()).copied();
            moving.extend(own.filter(|&slot| {
                self.blocks(slot) != blocks(entries) && self.places(slot) != places(entries)
            }));
            for &port in &entries.ports {
                let port = port_index(entries.protocol, port);
                let place = self.ports.binary_search_by_key(&port, |&(port, _)| port);
                let Ok(guard) = place.map(|place| self.ports[place].1) else {
                    continue;
                };
                let everywhere = entries.addresses.is_empty();
                if guard.is_by_address() == everywhere {
                    moving.extend(own);
                }
                let mut owners = vec![guard.slot()];
                if guard.is_by_address() {
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

    /// The blocked prefixes of a slot, and when each block ends.
    fn blocks(&self, slot: u16) -> BTreeSet<(IpNet, Option<BootTime>)> {
        let end = |value: RuleValue| value.end().and_then(|rule| find(&self.ends, rule));
        let is_own = |section: &Section| section.slot() == slot;
        let v4 = self.blocked4.iter().filter(|((of, _), _)| is_own(of));
        let v6 = self.blocked6.iter().filter(|((of, _), _)| is_own(of));
        let v4 = v4.map(|&((_, prefix), value)| (prefix.into(), end(value)));
        v4.chain(v6.map(|&((_, prefix), value)| (prefix.into(), end(value))))
            .collect()
    }

    /// The ports of a slot, with their local addresses where they have any, and whether they are only monitored.
    fn places(&self, slot: u16) -> BTreeSet<(u32, Option<[u8; 16]>, bool)> {
        let ports = self
            .ports
            .iter()
            .filter(|(_, guard)| !guard.is_by_address());
        let ports = ports.map(|&(port, guard)| (port, None, guard));
        let locals = self.locals.iter();
        let locals = locals.map(|(local, guard)| (local.port, Some(local.address), *guard));
        let own = ports
            .chain(locals)
            .filter(|(.., guard)| guard.slot() == slot);
        own.map(|(port, address, guard)| (port, address, guard.is_monitor()))
            .collect()
    }

    /// Slots that no map mentions. A crashed agent may have left entries of a slot without a name.
    fn free_slots(&self) -> impl Iterator<Item = u16> {
        let slots = self.slots.iter().map(|&(slot, _)| slot as u16);
        let of_prefixes = sections(&self.allowed4).chain(sections(&self.allowed6));
        let of_prefixes = of_prefixes.chain(sections(&self.blocked4));
        let of_prefixes = of_prefixes.chain(sections(&self.blocked6));
        let slots = slots.chain(of_prefixes.map(|section| section.slot()));
        let slots = slots.chain(self.ports.iter().map(|(_, guard)| guard.slot()));
        let slots = slots.chain(self.locals.iter().map(|(_, guard)| guard.slot()));
        let used: BTreeSet<u16> = slots.collect();
        (1..SLOTS as u16).filter(move |slot| !used.contains(slot))
    }

    /// A rule's id is free once its name is gone, which is removed last.
    fn free_ids(&self) -> impl Iterator<Item = u32> {
        let used: BTreeSet<u32> = self.rules.iter().map(|&(id, _)| id).collect();
        (0..RULE_IDS).filter(move |id| !used.contains(id))
    }
}

fn blocks(entries: &Entries) -> BTreeSet<(IpNet, Option<BootTime>)> {
    let all = entries.lists(Group::Blocks).all().into_iter();
    let end = |held: Held| held.end.and_then(|rule| entries.rules[usize::from(rule)].1);
    all.map(|(prefix, held)| (prefix, end(held))).collect()
}

fn places(entries: &Entries) -> BTreeSet<(u32, Option<[u8; 16]>, bool)> {
    let addresses: Vec<_> = match entries.addresses.is_empty() {
        true => vec![None],
        false => entries
            .addresses
            .iter()
            .map(|&address| Some(local_address(address)))
            .collect(),
    };
    let ports = entries.ports.iter();
    let ports = ports.map(|&port| port_index(entries.protocol, port));
    ports
        .flat_map(|port| {
            addresses
                .iter()
                .map(move |&address| (port, address, entries.monitor))
        })
        .collect()
}

fn until_end(value: RuleValue, held: Held, rules: &[u32]) -> RuleValue {
    match held.end {
        Some(rule) => value.until_end_of(rules[usize::from(rule)]),
        None => value,
    }
}

fn local_address(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => mapped(address.octets()),
        IpAddr::V6(address) => address.octets(),
    }
}
