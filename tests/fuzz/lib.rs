//! Checks that several fuzz targets make of what a reader accepted.

use std::sync::LazyLock;

use filter_agent::{
    clock::{BootTime, Now},
    policy::{self, Policy, Region, parse_cidr},
    region::{
        answer::{Answer, Found},
        state::State,
    },
};
use ipnet::IpNet;
use jiff::Timestamp;

/// A rare condition that an input can reach by a few changes of a seed. Builds with the feature `planted` panic there, to
/// show that the fuzzer finds a fault in this target.
pub fn plant(condition: bool) {
    assert!(!cfg!(feature = "planted") || !condition, "planted fault");
}

/// The instant at which everything happens.
pub fn now() -> Timestamp {
    Timestamp::constant(1_790_000_000, 0)
}

/// The same, a thousand seconds after a boot.
pub fn clock() -> Now {
    Now {
        boot: BootTime(1_000_000_000_000),
        steady: now(),
        wall: now(),
    }
}

/// A valid policy.
pub fn policy(text: &str) -> Policy {
    match policy::parse(text) {
        Ok((policy, _)) => policy,
        Err(problems) => panic!("{problems:?}"),
    }
}

/// A region with the guards that regions have unless the policy changes them.
pub fn region() -> Region {
    static REGION: LazyLock<Region> = LazyLock::new(|| {
        let text = "interfaces: [eth0]\ndatabases: []\nregions: {x: {url: 'https://example.net'}}";
        policy(text).regions["x"].clone()
    });
    REGION.clone()
}

/// Prefixes that a reader may return: each is spelled in one way only, which the policy accepts, too.
pub fn check_prefixes(prefixes: &[IpNet]) {
    for prefix in prefixes {
        assert_eq!(prefix.trunc(), *prefix);
        let text = prefix.to_string();
        assert_eq!(text.parse(), Ok(*prefix), "{text}");
        if let Err(refusal) = parse_cidr(&text) {
            let is_judged = refusal.contains("not a valid source") || refusal.contains("is IPv4");
            assert!(is_judged, "{text}: {refusal}");
        }
    }
}

/// Puts a result in force for a region, and checks what is allowed then. Returns whether the region took it.
pub fn take(found: &Found) -> bool {
    let mut state = State::new(region(), now());
    state.take(Ok(Answer::Found(found.clone())), false, now());
    let fits = found.prefixes.len() <= state.region.guards.max_prefixes;
    let good = !found.prefixes.is_empty() && fits && found.prefixes.iter().all(is_allowed);
    assert_eq!(good, state.set.is_some(), "{found:?}: {:?}", state.error);
    assert_eq!(good, !state.failing || state.partial);
    if let Some(set) = &state.set {
        assert_eq!(ranges(&set.members), ranges(&found.prefixes));
        check_in_force(&state);
    }
    good
}

/// Checks the last good set of a region.
pub fn check_in_force(state: &State) {
    let Some(set) = &state.set else {
        return;
    };
    check_prefixes(&set.prefixes);
    let all: Vec<IpNet> = set
        .retiring
        .iter()
        .chain(&set.held)
        .map(|(prefix, _)| *prefix)
        .chain(set.members.iter().copied())
        .collect();
    assert!(set.members.is_sorted_by(|a, b| a < b));
    assert!(all.iter().all(is_allowed), "{all:?}");
    assert_eq!(ranges(&set.prefixes), ranges(&all));
    let disjoint = |pair: &[IpNet]| pair[0] < pair[1] && !pair[0].contains(&pair[1]);
    assert!(set.prefixes.windows(2).all(disjoint), "{:?}", set.prefixes);
}

/// First and last address of a prefix, IPv6 after IPv4.
fn ends(prefix: &IpNet) -> (bool, u128, u128) {
    match prefix {
        IpNet::V4(prefix) => {
            let (first, last) = (prefix.network().to_bits(), prefix.broadcast().to_bits());
            (false, first.into(), last.into())
        }
        IpNet::V6(prefix) => {
            let (first, last) = (prefix.network().to_bits(), prefix.broadcast().to_bits());
            (true, first, last)
        }
    }
}

/// The addresses of prefixes, as ranges with addresses between them that are in no prefix.
fn ranges(prefixes: &[IpNet]) -> Vec<(bool, u128, u128)> {
    let mut all: Vec<_> = prefixes.iter().map(ends).collect();
    all.sort_unstable();
    let mut ranges: Vec<(bool, u128, u128)> = Vec::new();
    for (family, first, last) in all {
        match ranges.last_mut() {
            Some((before, _, end)) if *before == family && first <= end.saturating_add(1) => {
                *end = last.max(*end);
            }
            _ => ranges.push((family, first, last)),
        }
    }
    ranges
}

/// Whether a region without options may hold the prefix: as the guards say it, by addresses instead of by prefixes.
fn is_allowed(prefix: &IpNet) -> bool {
    const NEVER4: [(u32, u32); 9] = [
        (0x0000_0000, 0x00ff_ffff),
        (0x0a00_0000, 0x0aff_ffff),
        (0x6440_0000, 0x647f_ffff),
        (0x7f00_0000, 0x7fff_ffff),
        (0xa9fe_0000, 0xa9fe_ffff),
        (0xac10_0000, 0xac1f_ffff),
        (0xc0a8_0000, 0xc0a8_ffff),
        (0xe000_0000, 0xefff_ffff),
        (0xf000_0000, 0xffff_ffff),
    ];
    // The first 16 bits.
    const NEVER6: [(u128, u128); 4] =
        [(0, 0), (0xfc00, 0xfdff), (0xfe80, 0xfebf), (0xff00, 0xffff)];
    let (_, first, last) = ends(prefix);
    match prefix {
        IpNet::V4(prefix) => {
            let apart = |&(from, to): &(u32, u32)| last < from.into() || u128::from(to) < first;
            prefix.prefix_len() >= 8 && NEVER4.iter().all(apart)
        }
        IpNet::V6(prefix) => {
            let (first, last) = (first >> 112, last >> 112);
            let apart = |&(from, to): &(u128, u128)| last < from || to < first;
            prefix.prefix_len() >= 16 && NEVER6.iter().all(apart)
        }
    }
}

/// Cuts a list of lines off at a place, and has it read again: it is refused, or holds what was read before the cut.
/// Where it is cut in its first line, nothing shows that.
pub fn check_cut(body: &[u8], whole: &[IpNet], read: impl Fn(&[u8]) -> Option<Vec<IpNet>>) {
    let ends: Vec<usize> = (0..body.len()).filter(|&i| body[i] == b'\n').collect();
    for end in ends.into_iter().rev().take(4) {
        // The line's end, its last byte before that, and its first.
        for cut in [end, end.saturating_sub(1), end + 2] {
            let Some(part) = body.get(..cut).filter(|part| part.contains(&b'\n')) else {
                continue;
            };
            if let Some(found) = read(part) {
                assert!(whole.starts_with(&found), "cut at {cut}");
            }
        }
    }
}
