//! What a change of image means for each database. Pure.

use std::{borrow::Cow, collections::BTreeMap};

use filter_common::{Guard, Protocol};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::kernel::{
    change::{Change, changes},
    image::Image,
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
    /// Ports that become guarded, or whose guard changes.
    pub guarded: Vec<String>,
    pub unguarded: Vec<String>,
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
                let guard = guard.map(Guard::of_any_width);
                guard.filter(|guard| !guard.is_by_address())
            });
            of_guards(guards[0], guards[1], &port_text(key));
        }
        for Change { key, old, new } in changes(&old.locals, &new.locals) {
            let address = std::net::Ipv6Addr::from(key.address).to_canonical();
            let text = format!("{address} {}", port_text(key.port));
            let [old, new] = [old, new].map(|guard| guard.map(Guard::of_any_width));
            of_guards(old, new, &text);
        }
        databases.retain(|_, database| *database != DatabaseDifference::default());
        Difference { databases }
    }
}

/// `tcp/5432`.
fn port_text(index: u32) -> String {
    let protocol = Protocol::ALL[(index >> 16) as usize & 1];
    format!("{}/{}", protocol.name(), index as u16)
}
