//! Checks of a region's result, and comparisons of sets of prefixes. Pure.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, Ipv6Addr},
};

use anyhow::{Result, ensure};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::{
    policy::Guards,
    prefixes::{Prefixes, around},
};

/// Merges adjacent and covered prefixes, and sorts them.
pub(super) fn merged(prefixes: &[IpNet]) -> Vec<IpNet> {
    let mut merged = IpNet::aggregate(&prefixes.to_vec());
    merged.sort_unstable();
    merged
}

/// As `merged` of both lists, where the first is merged already: that one is gone through once, however long.
pub(super) fn merged_with(merged: &Prefixes, more: impl Iterator<Item = IpNet>) -> Vec<IpNet> {
    let mut added = BTreeSet::new();
    let mut gone: BTreeSet<IpNet> = BTreeSet::new();
    for mut prefix in more {
        let is_in = |added: &BTreeSet<IpNet>, prefix: &IpNet| {
            around(*prefix).any(|outer| added.contains(&outer))
        };
        if is_in(&added, &prefix) || merged.holding(prefix).is_some() {
            continue;
        }
        // With its other half it is the prefix around both.
        while let Some((outer, half)) = outer_and_other_half(&prefix) {
            let is_gone = gone.contains(&half) || !merged.has(&half);
            if !added.remove(&half) && is_gone {
                break;
            }
            prefix = outer;
        }
        added.retain(|inner| !prefix.contains(inner));
        gone.extend(merged.within(&prefix));
        added.insert(prefix);
    }
    let kept = merged.iter().filter(|prefix| !gone.contains(*prefix));
    let mut all: Vec<IpNet> = kept.chain(&added).copied().collect();
    // Made for lists that are in order.
    all.sort();
    all
}

/// The prefix that is one bit shorter, and its other half.
fn outer_and_other_half(prefix: &IpNet) -> Option<(IpNet, IpNet)> {
    let outer = prefix.supernet()?;
    let mut halves = outer.subnets(prefix.prefix_len()).ok()?;
    Some((outer, halves.find(|half| half != prefix)?))
}

/// Whether one of `merged`, as `merged()` returns them, contains the prefix. Only the last that sorts not after it can: at
/// the same address the shorter prefix sorts first.
pub(super) fn is_covered(prefix: &IpNet, merged: &[IpNet]) -> bool {
    let later = merged.partition_point(|other| other <= prefix);
    later > 0 && merged[later - 1].contains(prefix)
}

/// The prefixes, which are in order, that none of `merged` contains: both lists are gone through once.
pub(super) fn uncovered<'a>(
    prefixes: &'a [IpNet],
    merged: &'a [IpNet],
) -> impl Iterator<Item = IpNet> + 'a {
    let mut rest = merged;
    let uncovered = prefixes.iter().filter(move |prefix| {
        let not_after = rest.iter().take_while(|other| other <= prefix).count();
        rest = &rest[not_after.saturating_sub(1)..];
        !rest.first().is_some_and(|last| last.contains(*prefix))
    });
    uncovered.copied()
}

/// Checks the prefixes of a result, which are in order.
///
/// # Errors
/// There is none, there are too many, or one must not be in a result.
pub(super) fn check(prefixes: &[IpNet], guards: &Guards) -> Result<()> {
    // An empty file is more likely a failed download than a region without addresses.
    ensure!(
        !prefixes.is_empty() || guards.allow_empty,
        "it holds no prefix (a file may with `allow_empty: true`)"
    );
    ensure!(
        prefixes.len() <= guards.max_prefixes,
        "it holds {} prefixes; at most {} (`max_prefixes`)",
        prefixes.len(),
        guards.max_prefixes
    );
    check_each(prefixes, guards)
}

/// The same, however many there are.
pub(super) fn check_each(prefixes: &[IpNet], guards: &Guards) -> Result<()> {
    // Hardly ever there is one: a million prefixes are not compared with each of them.
    let mut special = SPECIAL.to_vec();
    special.retain(|(range, _)| any_overlaps(prefixes, range));
    let mut private = PRIVATE.to_vec();
    private.retain(|range| !guards.private && any_overlaps(prefixes, range));
    for prefix in prefixes {
        let shortest = match prefix {
            IpNet::V4(_) => guards.shortest[0],
            IpNet::V6(_) => guards.shortest[1],
        };
        ensure!(prefix.trunc() == *prefix, "{prefix} has host bits set");
        ensure!(
            prefix.prefix_len() >= shortest,
            "{prefix} is broader than /{shortest}; a region that has such prefixes needs `shortest`"
        );
        for (range, what) in &special {
            ensure!(!overlap(prefix, range), "{prefix} is {what}");
        }
        for range in &private {
            ensure!(
                !overlap(prefix, range),
                "{prefix} is private; a region that has such addresses needs `private: true`"
            );
        }
    }
    Ok(())
}

/// Whether a range overlaps any of prefixes that are in order.
fn any_overlaps(prefixes: &[IpNet], range: &IpNet) -> bool {
    let begin = prefixes.partition_point(|prefix| prefix < range);
    let first = prefixes.get(begin);
    first.is_some_and(|first| range.contains(first))
        || around(*range).any(|outer| prefixes.binary_search(&outer).is_ok())
}

fn overlap(one: &IpNet, other: &IpNet) -> bool {
    one.contains(other) || other.contains(one)
}

const fn v4(a: u8, b: u8, length: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(a, b, 0, 0), length))
}

const fn v6(first: u16, length: u8) -> IpNet {
    let address = Ipv6Addr::new(first, 0, 0, 0, 0, 0, 0, 0);
    IpNet::V6(Ipv6Net::new_assert(address, length))
}

/// Ranges of the IANA special-purpose registries (RFC 6890) that hold no region's addresses.
const SPECIAL: [(IpNet, &str); 8] = [
    (v4(0, 0, 8), "unspecified"),
    (v4(127, 0, 8), "loopback"),
    (v4(169, 254, 16), "link-local"),
    (v4(224, 0, 4), "multicast"),
    (v4(240, 0, 4), "reserved"),
    // ::/16 holds the unspecified, the loopback and the IPv4-mapped addresses.
    (v6(0, 16), "unspecified, loopback or IPv4-mapped"),
    (v6(0xfe80, 10), "link-local"),
    (v6(0xff00, 8), "multicast"),
];

/// RFC 1918, 6598 and 4193.
const PRIVATE: [IpNet; 5] = [
    v4(10, 0, 8),
    v4(172, 16, 12),
    v4(192, 168, 16),
    v4(100, 64, 10),
    v6(0xfc00, 7),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_that_are_gone_through_once_are_told_apart_as_one_by_one() {
        let mut random = fastrand::Rng::with_seed(2);
        for _ in 0..2_000 {
            let mut list = || {
                let prefixes = (0..random.usize(..8)).map(|_| {
                    let address = Ipv4Addr::new(192, 0, 2, random.u8(..32));
                    let net = Ipv4Net::new_assert(address, random.u8(26..=32));
                    IpNet::from(net.trunc())
                });
                let mut prefixes: Vec<IpNet> = prefixes.collect();
                prefixes.sort_unstable();
                prefixes
            };
            let (prefixes, others) = (list(), list());
            let merged = merged(&others);
            let both = [others.clone(), prefixes.clone()].concat();
            let more = prefixes.iter().rev().copied();
            let with = merged_with(&merged.clone().into(), more);
            assert_eq!(with, super::merged(&both), "{prefixes:?} {others:?}");
            let one_by_one = prefixes.iter().filter(|p| !is_covered(p, &merged));
            assert!(uncovered(&prefixes, &merged).eq(one_by_one.copied()));
            for range in &others {
                let any = prefixes.iter().any(|prefix| overlap(prefix, range));
                assert_eq!(any_overlaps(&prefixes, range), any);
            }
        }
    }
}
