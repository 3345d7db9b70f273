//! Which of the host's interfaces a policy lists, and which of those run the filter. Pure.

use crate::{
    filter::Pinned,
    host::Interface,
    policy::{Listed, Policy},
};

/// The host's interfaces that the policy lists, and the entries that list none.
pub struct Coverage {
    pub present: Vec<Interface>,
    pub missing: Vec<Listed>,
}

impl Coverage {
    pub fn of(policy: &Policy, host: &[Interface]) -> Self {
        let mut coverage = Self {
            present: Vec::new(),
            missing: Vec::new(),
        };
        // Nothing to protect is no reason to touch an interface.
        if policy.databases.is_empty() {
            return coverage;
        }
        for entry in &policy.interfaces {
            let mut found = host
                .iter()
                .filter(|interface| lists(entry, interface))
                .peekable();
            if found.peek().is_none() {
                coverage.missing.push(entry.clone());
            }
            for interface in found {
                if !coverage.is_present(interface.index) {
                    coverage.present.push(interface.clone());
                }
            }
        }
        coverage
    }

    pub fn is_present(&self, index: u32) -> bool {
        self.present
            .iter()
            .any(|interface| interface.index == index)
    }

    /// Whether an interface of the policy may be on the host under another name: one that is filtered
    /// and not listed is then better left so.
    pub fn may_be_renamed(&self) -> bool {
        self.missing
            .iter()
            .any(|entry| matches!(entry, Listed::Name(_)))
    }

    /// Interfaces that are filtered although the policy does not list them, by index.
    pub fn unlisted(&self, pinned: &[Pinned]) -> Vec<u32> {
        let indexes = pinned.iter().map(|pinned| pinned.interface);
        indexes.filter(|&index| !self.is_present(index)).collect()
    }

    /// Interfaces that are there, and on which this agent's program does not run. `ours`: its id.
    pub fn errors(&self, pinned: &[Pinned], ours: u32) -> Vec<String> {
        let errors = self.present.iter().filter_map(|interface| {
            let name = &interface.name;
            let Some(xdp) = interface.xdp else {
                return Some(format!(
                    "interface {name} is not filtered: no XDP program is attached"
                ));
            };
            let link = pinned
                .iter()
                .find(|pinned| pinned.interface == interface.index);
            let whole = xdp.program_id == ours && link.is_some_and(|link| link.program_id == ours);
            (!whole).then(|| {
                format!(
                    "interface {name} runs XDP program {}, not this agent's ({ours})",
                    xdp.program_id
                )
            })
        });
        errors.collect()
    }

    /// Warnings of interfaces by which other hosts may reach a database past the filter. One without
    /// an address of its own counts too: Linux takes packets for any local address on every
    /// interface.
    pub fn warnings(&self, host: &[Interface]) -> Vec<String> {
        host.iter()
            .filter(|interface| interface.up && !interface.loopback)
            // The ports of a bridge deliver through the bridge.
            .filter(|interface| !interface.has_master || !interface.addresses.is_empty())
            .filter(|interface| !self.is_present(interface.index))
            .map(|interface| {
                let addresses: Vec<String> = interface
                    .addresses
                    .iter()
                    .map(ToString::to_string)
                    .collect();
                let addresses = match addresses.as_slice() {
                    [] => String::new(),
                    addresses => format!(" ({})", addresses.join(", ")),
                };
                let name = &interface.name;
                format!(
                    "interface {name}{addresses} is not in `interfaces`: databases may be \
                     reachable through it"
                )
            })
            .collect()
    }
}

fn lists(entry: &Listed, interface: &Interface) -> bool {
    // A pattern is not meant to name what cannot be filtered.
    let filterable = interface.ethernet && !interface.loopback;
    match entry {
        Listed::Name(name) => interface.name == *name,
        Listed::Pattern(pattern) => filterable && pattern.matches(&interface.name),
        Listed::DefaultRoute => interface.default_route,
    }
}

pub fn describe_missing(entry: &Listed) -> String {
    match entry {
        Listed::Name(name) => format!("interface {name} is missing"),
        Listed::Pattern(pattern) => format!("no interface is named as in {pattern}"),
        Listed::DefaultRoute => "no interface carries a default route".into(),
    }
}
