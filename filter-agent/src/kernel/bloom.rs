//! The content of the prefix Bloom filter, and of the bitmaps in front of it. Pure.

use std::{collections::BTreeMap, net::Ipv6Addr};

use filter_common::{
    BITMAP_PREFIX_BITS, BLOOM_LINES, BLOOM_PREFIX_BITS, BLOOM_SHORTEST, BloomLine, CROWDED,
    NEAR_PREFIX_BITS, PREFIX_LINES, bloom_place, held_place, near_place, touched_place,
};
use ipnet::{Ipv4Net, Ipv6Net};

use crate::kernel::change::{Change, changes};

/// Surroundings of long prefixes that a word of 64 bits takes the bits of. More of them would match anything, and leave
/// nothing of what the word says of /25s.
const MAX_NEAR: u8 = 12;

/// The lines that are not all zeros, with prefixes added to them. Those that are too short to be looked for are left out.
pub(super) fn with_prefixes<'a>(
    used: &[(u32, BloomLine)],
    v4: impl Iterator<Item = &'a Ipv4Net> + Clone,
    v6: impl Iterator<Item = &'a Ipv6Net>,
) -> Vec<(u32, BloomLine)> {
    let mut lines = vec![BloomLine::default(); PREFIX_LINES as usize];
    for &(line, words) in used {
        lines[line as usize] = words;
    }
    let v4 = v4.filter(|prefix| prefix.prefix_len() >= BLOOM_SHORTEST);
    let v4 = v4.map(|prefix| (prefix.network().to_bits(), prefix.broadcast().to_bits()));
    add_v4(&mut lines, v4);
    let v6 = v6.filter(|prefix| prefix.prefix_len() >= BLOOM_SHORTEST);
    let first_bits = |address: Ipv6Addr| (address.to_bits() >> 96) as u32;
    let v6 = v6.map(|prefix| (first_bits(prefix.network()), first_bits(prefix.broadcast())));
    add_v6(&mut lines, v6);
    let lines = (0..).zip(lines);
    lines
        .filter(|(_, line)| *line != BloomLine::default())
        .collect()
}

/// Adds IPv6 prefixes, given by the first 32 bits of their first and last addresses.
fn add_v6(lines: &mut [BloomLine], ranges: impl Iterator<Item = (u32, u32)>) {
    for (first, last) in ranges {
        for address in beginnings(first, last, BLOOM_PREFIX_BITS) {
            add(lines, bloom_place(address, false));
        }
    }
}

/// Adds all IPv4 prefixes, given by their first and last addresses.
fn add_v4(lines: &mut [BloomLine], ranges: impl Iterator<Item = (u32, u32)> + Clone) {
    let is_short = |first: u32, last: u32| last - first >= u32::MAX >> BITMAP_PREFIX_BITS;
    for (first, last) in ranges.clone() {
        for address in beginnings(first, last, BITMAP_PREFIX_BITS) {
            add(lines, touched_place(address));
            if is_short(first, last) {
                add(lines, held_place(address));
            }
        }
    }
    let mut near = vec![(BloomLine::default(), [0_u8; 8]); BLOOM_LINES as usize];
    for (first, last) in ranges.filter(|&(first, last)| !is_short(first, last)) {
        for address in beginnings(first, last, BLOOM_PREFIX_BITS) {
            let place = bloom_place(address, true);
            add(lines, place);
            let (words, counts) = &mut near[place.0 as usize];
            let begin = u32::from_be(address);
            let (first, last) = (
                first.max(begin),
                last.min(begin | u32::MAX >> BLOOM_PREFIX_BITS),
            );
            for address in beginnings(first, last, NEAR_PREFIX_BITS) {
                let (word, bits) = near_place(address);
                if words[word] & bits != bits {
                    words[word] |= bits;
                    counts[word] = counts[word].saturating_add(1);
                }
            }
        }
    }
    for (line, (words, counts)) in lines.iter_mut().zip(near) {
        for (word, (bits, count)) in line.iter_mut().zip(words.into_iter().zip(counts)) {
            *word |= if count > MAX_NEAR { CROWDED } else { bits };
        }
    }
}

fn add(lines: &mut [BloomLine], (line, word, bits): (u32, usize, u64)) {
    lines[line as usize][word] |= bits;
}

/// The first addresses of all prefixes of a length that a range touches, as in memory.
fn beginnings(first: u32, last: u32, length: u32) -> impl Iterator<Item = u32> {
    let host_bits = 32 - length;
    (first >> host_bits..=last >> host_bits).map(move |prefix| (prefix << host_bits).to_be())
}

/// The filter that matches whatever either of two filters matches.
pub(super) fn union(a: &[(u32, BloomLine)], b: &[(u32, BloomLine)]) -> Vec<(u32, BloomLine)> {
    let merged = changes(a, b).into_iter();
    let merged = merged.map(|Change { key, old, new }| {
        let (old, new) = (old.unwrap_or_default(), new.unwrap_or_default());
        (key, std::array::from_fn(|word| old[word] | new[word]))
    });
    let differ: BTreeMap<u32, BloomLine> = merged.collect();
    let mut lines = a.to_vec();
    lines.retain(|(line, _)| !differ.contains_key(line));
    lines.extend(differ);
    lines.sort_unstable_by_key(|&(line, _)| line);
    lines
}

/// Whether an IPv4 address may be in an allowed prefix, as the program finds it. `line`: one of the map's.
#[cfg(test)]
pub(super) fn may_match4(
    line: impl Fn(u32) -> Option<BloomLine>,
    address: std::net::Ipv4Addr,
) -> bool {
    let address = address.to_bits().to_be();
    let is_set = |(number, word, bits): (u32, usize, u64)| {
        line(number).is_some_and(|line| line[word] & bits == bits)
    };
    let place = bloom_place(address, true);
    let (word, bits) = near_place(address);
    let is_near = is_set((place.0, word, bits)) || is_set((place.0, word, CROWDED));
    is_set(touched_place(address)) && (is_set(held_place(address)) || is_set(place) && is_near)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines_of<'a>(prefixes: impl IntoIterator<Item = &'a Ipv4Net>) -> Vec<BloomLine> {
        let prefixes = prefixes.into_iter();
        let range = |prefix: &Ipv4Net| (prefix.network().to_bits(), prefix.broadcast().to_bits());
        let ranges: Vec<_> = prefixes.map(range).collect();
        let mut lines = vec![BloomLine::default(); PREFIX_LINES as usize];
        add_v4(&mut lines, ranges.iter().copied());
        lines
    }

    #[test]
    fn bloom_filter_matches_every_address_of_its_prefixes_and_few_others() {
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
            let lines = lines_of(&prefixes);
            for _ in 0..200 {
                let inside = random.choice(&prefixes).filter(|_| random.bool());
                let address = inside.map_or(random.u32(..), |prefix| {
                    let around = random.u32(..) >> prefix.prefix_len().min(31);
                    (prefix.network().to_bits() ^ around).wrapping_add(random.u32(..600))
                });
                let all = Ipv4Net::new_assert(address.into(), NEAR_PREFIX_BITS as u8);
                let expected = prefixes
                    .iter()
                    .any(|prefix| prefix.contains(&all.trunc()) || all.trunc().contains(prefix));
                let line = |number: u32| lines.get(number as usize).copied();
                let found = may_match4(line, address.into());
                assert!(found || !expected, "{address:x} of {prefixes:?}");
                far += u32::from(!expected);
                mistaken += u32::from(found && !expected);
            }
        }
        assert!(far > 10_000 && mistaken < far / 100, "{mistaken} of {far}");
    }

    #[test]
    fn list_that_is_too_long_for_surroundings_loses_no_address_and_keeps_away_what_is_far() {
        let mut random = fastrand::Rng::with_seed(9);
        for (count, is_crowded) in [(50_000, false), (2_000_000, true)] {
            let addresses: Vec<Ipv4Net> = (0..count)
                .map(|_| Ipv4Net::new_assert(random.u32(..).into(), 32))
                .collect();
            let lines = lines_of(&addresses);
            let words = lines[..BLOOM_LINES as usize].iter().flatten();
            let crowded = words.filter(|&&word| word & CROWDED != 0).count();
            assert_eq!(crowded > 0, is_crowded);
            let line = |number: u32| lines.get(number as usize).copied();
            let held = addresses.iter().take(10_000);
            let mut held = held.map(|address| address.network());
            assert!(held.all(|address| may_match4(line, address)));
            let far = (0..10_000).filter(|_| may_match4(line, random.u32(..).into()));
            assert!(far.count() < if is_crowded { 3_000 } else { 20 });
        }
    }

    #[test]
    fn prefixes_of_22_bits_or_fewer_have_no_other_address_match() {
        let mut random = fastrand::Rng::with_seed(8);
        // As dense as a country's list: the Bloom filter alone would match most addresses.
        let mut prefixes = std::collections::BTreeSet::new();
        for _ in 0..40_000 {
            let prefix = Ipv4Net::new_assert(random.u32(..1 << 31).into(), random.u8(14..=22));
            prefixes.insert(prefix.trunc());
        }
        let lines = lines_of(&prefixes);
        let line = |number: u32| lines.get(number as usize).copied();
        let mut outside = 0;
        for _ in 0..10_000 {
            let address = random.u32(..).into();
            let mut around = (14..=22).map(|length| Ipv4Net::new_assert(address, length).trunc());
            let is_held = around.any(|prefix| prefixes.contains(&prefix));
            assert_eq!(may_match4(line, address), is_held, "{address}");
            outside += u32::from(!is_held);
        }
        assert!((1_000..9_000).contains(&outside), "{outside}");
    }
}
