//! The host's interfaces that a policy lists, what each entry of the list stood for last, and which of
//! those interfaces run the filter. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use serde::{Deserialize, Serialize};

use crate::{
    host::Interface,
    policy::{Listed, Mode, Policy},
};

/// A pinned link, and the program that runs on it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pinned {
    pub interface: u32,
    pub program_id: u32,
}

/// Interfaces that are remembered of one entry although they are not on the host: the latest.
const MAX_ABSENT: usize = 16;

/// The interfaces that each entry of a policy's `interfaces` stood for last, by the entry's text. They count as
/// listed, at the next start too, while a route is away, a pattern matches nothing or an interface has
/// another name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Remembered(BTreeMap<String, Vec<Known>>);

/// An interface as it is recognised after a reboot.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
struct Known {
    name: String,
    hardware_address: Option<String>,
    /// As in `Interface`.
    kind: Option<String>,
}

/// Kinds of interfaces that have the hardware address of another one, which they are made over.
const BORROWERS: [&str; 8] = [
    "bond", "bridge", "dsa", "ipvlan", "macvlan", "macvtap", "team", "vlan",
];

impl Known {
    fn of(interface: &Interface) -> Self {
        Self {
            name: interface.name.clone(),
            hardware_address: interface.hardware_address.clone(),
            kind: interface.kind.clone(),
        }
    }

    /// Whether this is an interface under whatever name: a device with an address of its own. A bridge, a bond
    /// or a VLAN is recognised by its name alone, or else its port or parent would be taken for it.
    fn is_same_device(&self, interface: &Interface) -> bool {
        let borrows = |kind: &String| BORROWERS.contains(&kind.as_str());
        self.hardware_address.is_some()
            && self.hardware_address == interface.hardware_address
            && self.kind == interface.kind
            && !self.kind.as_ref().is_some_and(borrows)
    }

    /// The interface on the host that this is: by its hardware address under whatever name, else by its name.
    fn find<'a>(&self, host: &'a [Interface]) -> Vec<&'a Interface> {
        let can = || host.iter().filter(|interface| can_be_filtered(interface));
        let same: Vec<_> = can().filter(|i| self.is_same_device(i)).collect();
        let named = |interface: &&Interface| interface.name == self.name;
        match same.iter().copied().find(named) {
            Some(interface) => vec![interface],
            None if same.is_empty() => can().filter(named).collect(),
            None => same,
        }
    }
}

impl Remembered {
    fn of(&self, entry: &Listed) -> &[Known] {
        self.0.get(&entry.to_string()).map_or(&[], Vec::as_slice)
    }

    /// Whether it is known what this entry stood for.
    pub fn knows(&self, entry: &Listed) -> bool {
        !self.of(entry).is_empty()
    }

    /// Notes what the entries of a policy stand for now, as far as it is filtered. What one stood for before and
    /// that is still on the host is kept: it is still filtered.
    pub fn update(
        &mut self,
        policy: &Policy,
        host: &[Interface],
        is_filtered: impl Fn(u32) -> bool,
    ) {
        let entries = policy.interfaces.iter().map(|entry| {
            let direct = host.iter().filter(|interface| lists(entry, interface));
            let direct = direct.filter(|interface| is_filtered(interface.index));
            let mut known: Vec<Known> = direct.map(Known::of).collect();
            let is_name = matches!(entry, Listed::Name(_));
            if known.is_empty() || !is_name {
                let mut absent = 0;
                for before in self.of(entry) {
                    let is_here = !before.find(host).is_empty();
                    absent += usize::from(!is_here);
                    let is_new = |now: &Known| {
                        let same = before.hardware_address == now.hardware_address;
                        now.name != before.name && !(same && before.kind == now.kind)
                    };
                    if known.iter().all(is_new) && (is_here || absent <= MAX_ABSENT) {
                        known.push(before.clone());
                    }
                }
            }
            (entry.to_string(), known)
        });
        self.0 = entries.filter(|(_, known)| !known.is_empty()).collect();
    }
}

/// The host's interfaces that the policy lists, and the entries that list none.
#[derive(Debug)]
pub struct Coverage {
    pub present: Vec<Interface>,
    pub missing: Vec<Listed>,
    /// Interfaces among `present` that no entry matches now, and the entry that stood for each.
    remembered: Vec<(u32, Listed)>,
    /// Entries `default` whose routes lead only through interfaces that cannot be filtered, such as tunnels.
    tunnels: Vec<String>,
    /// Interfaces that need not be listed.
    ignored: Vec<Listed>,
}

/// So many interfaces without an address are warned of one by one: a host of containers has hundreds.
const MOST_NAMED: usize = 3;

impl Coverage {
    pub fn of(policy: &Policy, remembered: &Remembered, host: &[Interface]) -> Self {
        let mut ignored = policy.ignored_interfaces.clone();
        // A policy without databases attaches to no interface. Those that it lists are not missing in it.
        let entries = if policy.databases.is_empty() {
            ignored.extend(policy.interfaces.iter().cloned());
            &[][..]
        } else {
            &policy.interfaces
        };
        Self {
            ignored,
            ..Self::of_entries(entries, remembered, host)
        }
    }

    fn of_entries(entries: &[Listed], remembered: &Remembered, host: &[Interface]) -> Self {
        let mut coverage = Self {
            present: Vec::new(),
            missing: Vec::new(),
            remembered: Vec::new(),
            tunnels: Vec::new(),
            ignored: Vec::new(),
        };
        for entry in entries {
            let direct: Vec<_> = host.iter().filter(|i| lists(entry, i)).collect();
            for interface in &direct {
                coverage.add(interface);
            }
            let mut found = !direct.is_empty();
            // A name means the interface that has it.
            if !(found && matches!(entry, Listed::Name(_))) {
                let known = remembered.of(entry).iter();
                for interface in known.flat_map(|known| known.find(host)) {
                    if !coverage.is_present(interface.index) {
                        let stands_in = (interface.index, entry.clone());
                        coverage.remembered.push(stands_in);
                        coverage.add(interface);
                    }
                    found = true;
                }
            }
            if !found {
                coverage.missing.push(entry.clone());
            }
            if let Listed::DefaultRoute = entry {
                let through = host
                    .iter()
                    .filter(|i| i.default_route && !can_be_filtered(i));
                coverage.tunnels.extend(through.map(|i| i.name.clone()));
            }
        }
        // Listed directly by a later entry.
        let direct = |interface: &Interface| entries.iter().any(|entry| lists(entry, interface));
        let present = &coverage.present;
        coverage.remembered.retain(|(index, _)| {
            let interface = present.iter().find(|interface| interface.index == *index);
            !interface.is_some_and(direct)
        });
        coverage
    }

    fn add(&mut self, interface: &Interface) {
        if !self.is_present(interface.index) {
            self.present.push(interface.clone());
        }
    }

    pub fn is_present(&self, index: u32) -> bool {
        self.present
            .iter()
            .any(|interface| interface.index == index)
    }

    /// Whether no entry matches this interface now, and one did before. Its use may have changed since: what is wrong
    /// with it is an error, but refuses nothing.
    pub fn is_remembered(&self, index: u32) -> bool {
        self.remembered.iter().any(|(found, _)| *found == index)
    }

    /// The mode in which an interface is filtered: that of the entry that names it, of the first pattern that matches it,
    /// or of the entry that stood for it.
    pub fn mode(&self, policy: &Policy, interface: &Interface) -> Mode {
        let (names, others): (Vec<&Listed>, Vec<&Listed>) = policy
            .interfaces
            .iter()
            .filter(|entry| lists(entry, interface))
            .partition(|entry| matches!(entry, Listed::Name(_)));
        let before = self.remembered.iter();
        let before = before.filter(|(index, _)| *index == interface.index);
        let mut entries = names
            .into_iter()
            .chain(others)
            .chain(before.map(|(_, entry)| entry));
        let mode = entries
            .next()
            .and_then(|entry| policy.modes.get(&entry.to_string()));
        mode.copied().unwrap_or(policy.mode)
    }

    /// Interfaces that are filtered although the policy does not list them.
    pub fn unlisted<'a>(&self, pinned: &[Pinned], host: &'a [Interface]) -> Vec<&'a Interface> {
        let is_pinned = |index| pinned.iter().any(|pinned| pinned.interface == index);
        host.iter()
            .filter(|interface| is_pinned(interface.index) && !self.is_present(interface.index))
            .collect()
    }

    /// Listed interfaces that are there, and on which this agent's program does not run. `ours`: its id.
    pub fn errors(&self, pinned: &[Pinned], ours: u32) -> Vec<String> {
        let listed = self.present.iter().filter(|i| !self.is_remembered(i.index));
        listed
            .filter_map(|interface| unfiltered(interface, pinned, ours))
            .collect()
    }

    /// Why what is present and listed, or was listed before, is not filtered; and if nothing at all is, that.
    pub fn not_enforced(&self, pinned: &[Pinned], ours: u32) -> Vec<String> {
        let present = self.present.iter();
        let unfiltered = present.filter_map(|interface| unfiltered(interface, pinned, ours));
        self.inert(ours).into_iter().chain(unfiltered).collect()
    }

    /// Names of the interfaces on which this agent's program runs.
    pub fn filtered(&self, ours: u32) -> Vec<&str> {
        let runs = |i: &&Interface| i.xdp.is_some_and(|xdp| xdp.program_id == ours);
        let filtered = self.present.iter().filter(runs);
        filtered.map(|interface| interface.name.as_str()).collect()
    }

    /// The error of a policy that protects databases, and whose program runs on no interface at all.
    pub fn inert(&self, ours: u32) -> Option<String> {
        let lists_any = !self.present.is_empty() || !self.missing.is_empty();
        if !lists_any || !self.filtered(ours).is_empty() {
            return None;
        }
        let why: Vec<String> = self.missing.iter().map(describe_missing).collect();
        let why = if why.is_empty() {
            String::new()
        } else {
            format!(": {}", why.join(", "))
        };
        Some(format!(
            "nothing is filtered, and the databases are open{why}; `interfaces` must list the \
             interface through which they are reached"
        ))
    }

    /// Warnings of interfaces by which other hosts may reach a database past the filter, and of those that
    /// are filtered for what an entry stood for before. One without an address of its own counts too: Linux
    /// takes packets for any local address on every interface.
    pub fn warnings(&self, host: &[Interface]) -> Vec<String> {
        let stand_in = self.remembered.iter().filter_map(|(index, entry)| {
            let interface = self.present.iter().find(|found| found.index == *index)?;
            Some(describe_stand_in(&interface.name, entry))
        });
        let tunnels = self.tunnels.iter().map(|name| {
            format!(
                "a default route leads through {name}, which cannot be filtered: `default` does not \
                 stand for it"
            )
        });
        let is_ignored = |interface: &Interface| self.ignored.iter().any(|e| names(e, interface));
        let past = host
            .iter()
            .filter(|interface| interface.up && !interface.loopback)
            // The ports of a bridge deliver through the bridge.
            .filter(|interface| !interface.has_master || !interface.addresses.is_empty())
            .filter(|interface| !self.is_present(interface.index) && !is_ignored(interface));
        let (bare, past): (Vec<&Interface>, Vec<&Interface>) =
            past.partition(|interface| interface.addresses.is_empty());
        let (one_by_one, grouped) = if bare.len() > MOST_NAMED {
            (past, bare)
        } else {
            ([past, bare].concat(), Vec::new())
        };
        let past = one_by_one.into_iter().map(|interface| {
            let addresses: Vec<String> = interface.addresses.iter().map(ToString::to_string).collect();
            let addresses = match addresses.as_slice() {
                [] => String::new(),
                addresses => format!(" ({})", addresses.join(", ")),
            };
            let name = &interface.name;
            format!(
                "interface {name}{addresses} is not in `interfaces`: databases may be reachable through it"
            )
        });
        let group = (!grouped.is_empty()).then(|| {
            let named: Vec<&str> = grouped.iter().take(MOST_NAMED).map(|i| i.name.as_str()).collect();
            format!(
                "{} interfaces without addresses ({} and {} more) are not in `interfaces`: databases may be reachable \
                 through them; `ignore_interfaces` names those that need not be listed",
                grouped.len(),
                named.join(", "),
                grouped.len() - named.len()
            )
        });
        stand_in.chain(tunnels).chain(past).chain(group).collect()
    }
}

/// Warnings of databases that guard nothing, since this host has none of their `addresses`.
pub fn address_warnings(policy: &Policy, host: &[Interface]) -> Vec<String> {
    let is_here = |address: &IpAddr| host.iter().any(|found| found.addresses.contains(address));
    let elsewhere = policy.databases.iter().filter(|database| {
        !database.addresses.is_empty() && !database.addresses.iter().any(is_here)
    });
    let warnings = elsewhere.map(|database| {
        let addresses: Vec<String> = database.addresses.iter().map(ToString::to_string).collect();
        format!(
            "database {}: no interface of this host has any of its `addresses` ({}): unless they are a container's or a \
             service's, it guards nothing here",
            database.name,
            addresses.join(", ")
        )
    });
    warnings.collect()
}

/// The interfaces whose filtering ends if `new` takes the place of `old`: those that an entry of the old
/// policy alone lists, or listed when it was last looked at.
pub struct Ended {
    /// Names of the interfaces, those that are not on the host now included.
    pub names: BTreeSet<String>,
    /// Indexes of those that are on the host.
    pub indexes: BTreeSet<u32>,
}

impl Ended {
    pub fn between(
        old: &Policy,
        new: &Policy,
        remembered: &Remembered,
        host: &[Interface],
    ) -> Self {
        let gone = old.interfaces.iter();
        let gone: Vec<Listed> = gone
            .filter(|e| !new.interfaces.contains(e))
            .cloned()
            .collect();
        let stays = Coverage::of_entries(&new.interfaces, remembered, host);
        let mut ended = Self {
            names: BTreeSet::new(),
            indexes: BTreeSet::new(),
        };
        for interface in Coverage::of_entries(&gone, remembered, host).present {
            if !stays.is_present(interface.index) {
                ended.indexes.insert(interface.index);
                ended.names.insert(interface.name);
            }
        }
        for known in gone.iter().flat_map(|entry| remembered.of(entry)) {
            let interface = Interface {
                name: known.name.clone(),
                ethernet: true,
                ..Interface::default()
            };
            let stays = new.interfaces.iter().any(|entry| lists(entry, &interface));
            if known.find(host).is_empty() && !stays {
                ended.names.insert(known.name.clone());
            }
        }
        ended
    }
}

/// Why an interface is not filtered; `None`: it is.
fn unfiltered(interface: &Interface, pinned: &[Pinned], ours: u32) -> Option<String> {
    let name = &interface.name;
    let Some(xdp) = interface.xdp else {
        return Some(format!(
            "interface {name} is not filtered: no XDP program is attached"
        ));
    };
    let link = pinned
        .iter()
        .find(|pinned| pinned.interface == interface.index);
    if xdp.program_id != ours {
        return Some(format!(
            "interface {name} runs XDP program {}, not this agent's ({ours})",
            xdp.program_id
        ));
    }
    let is_pinned = link.is_some_and(|link| link.program_id == ours);
    (!is_pinned).then(|| {
        format!(
            "interface {name} is filtered only until this agent ends: the pin of its link is gone, as where the BPF \
             file system was unmounted; a restart of the agent attaches it anew, after a moment without a filter"
        )
    })
}

/// Whether an entry matches an interface, as it is now.
fn lists(entry: &Listed, interface: &Interface) -> bool {
    // A pattern is not meant to match what cannot be filtered, and a default route through it is a warning.
    let is_name = matches!(entry, Listed::Name(_));
    (is_name || can_be_filtered(interface)) && names(entry, interface)
}

/// The same, whether or not it can be filtered.
fn names(entry: &Listed, interface: &Interface) -> bool {
    let mut names = std::iter::once(&interface.name).chain(&interface.alternative_names);
    match entry {
        Listed::Name(name) => names.any(|other| other == name),
        Listed::Pattern(pattern) => names.any(|name| pattern.matches(name)),
        Listed::DefaultRoute => interface.default_route,
    }
}

/// The filter reads Ethernet frames.
fn can_be_filtered(interface: &Interface) -> bool {
    interface.ethernet && !interface.loopback
}

pub fn describe_missing(entry: &Listed) -> String {
    match entry {
        Listed::Name(name) => format!("interface {name} is missing"),
        Listed::Pattern(pattern) => format!("no interface is named as in {pattern}"),
        Listed::DefaultRoute => "no Ethernet interface carries a default route".into(),
    }
}

fn describe_stand_in(name: &str, entry: &Listed) -> String {
    match entry {
        Listed::Name(listed) => format!(
            "interface {listed} is missing; {name}, which has its hardware address, counts as {listed}: \
             write {name} into `interfaces`"
        ),
        Listed::Pattern(pattern) => {
            format!("interface {name} counts as listed by {pattern}, which its name matched before")
        }
        Listed::DefaultRoute => format!(
            "interface {name} counts as listed by `default`: a default route led through it before"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::parse;

    fn warnings(policy: &str, interfaces: usize) -> Vec<String> {
        let mut host: Vec<Interface> = (0..interfaces)
            .map(|number| Interface {
                index: number as u32 + 10,
                name: format!("veth{number}"),
                ethernet: true,
                up: true,
                ..Interface::default()
            })
            .collect();
        host.push(Interface {
            index: 2,
            name: "tun0".into(),
            up: true,
            addresses: vec!["192.0.2.1".parse().unwrap()],
            ..Interface::default()
        });
        let text = format!("interfaces: [eth0]\ndatabases: []\n{policy}");
        let (policy, _) = parse(&text).unwrap();
        Coverage::of(&policy, &Remembered::default(), &host).warnings(&host)
    }

    #[test]
    fn database_whose_addresses_are_elsewhere_is_warned_of() {
        let host = [Interface {
            addresses: vec!["192.0.2.1".parse().unwrap()],
            ..Interface::default()
        }];
        let warnings = |addresses: &str| {
            let database = format!(
                "{{name: orders, port: 1, model: dedicated, force_tls: false, addresses: {addresses}}}"
            );
            let text = format!("interfaces: [eth0]\ndatabases: [{database}]\n");
            address_warnings(&parse(&text).unwrap().0, &host)
        };
        assert!(warnings("[]").is_empty());
        assert!(warnings("[192.0.2.1, 192.0.2.2]").is_empty());
        let expected = "database orders: no interface of this host has any of its `addresses` (192.0.2.2): unless they are a \
             container's or a service's, it guards nothing here";
        assert_eq!(warnings("[192.0.2.2]"), [expected]);
    }

    /// Fault C18: one warning for each, at every reload.
    #[test]
    fn interfaces_of_containers_are_one_warning_or_none() {
        assert_eq!(warnings("", 3).len(), 4);
        let [tunnel, grouped] = &warnings("", 120)[..] else {
            panic!("{:?}", warnings("", 120));
        };
        assert!(
            tunnel.starts_with("interface tun0 (192.0.2.1) is not"),
            "{tunnel}"
        );
        let expected =
            "120 interfaces without addresses (veth0, veth1, veth2 and 117 more) are not";
        assert!(grouped.starts_with(expected), "{grouped}");
        assert_eq!(warnings("ignore_interfaces: ['veth*']", 120).len(), 1);
        assert!(warnings("ignore_interfaces: ['veth*', 'tun*']", 120).is_empty());
    }

    /// It was warned that a listed interface is not listed.
    #[test]
    fn interfaces_of_a_policy_without_databases_are_listed_ones() {
        let (policy, _) = parse("interfaces: ['veth*', default]\ndatabases: []\n").unwrap();
        let host = ["veth0", "eth0", "eth1"].map(|name| Interface {
            name: name.into(),
            ethernet: true,
            up: true,
            default_route: name == "eth0",
            ..Interface::default()
        });
        let coverage = Coverage::of(&policy, &Remembered::default(), &host);
        let warnings = coverage.warnings(&host);
        assert!(
            warnings.len() == 1 && warnings[0].starts_with("interface eth1 is not"),
            "{warnings:?}"
        );
    }
}
