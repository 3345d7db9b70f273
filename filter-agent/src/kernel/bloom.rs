//! The content of the prefix Bloom filter, and of the bitmap in front of it. Pure.

use std::collections::BTreeMap;

use filter_common::{BITMAP_PREFIX_BITS, BLOOM_PREFIX_BITS, BloomLine, bitmap_place, bloom_place};

use crate::kernel::change::{Change, changes};

/// Adds ranges of one address family, given by the first 32 bits of their first and last addresses.
pub(super) fn add_ranges(
    lines: &mut [BloomLine],
    ranges: impl Iterator<Item = (u32, u32)>,
    is_v4: bool,
) {
    let mut add = |(line, word, bits): (u32, usize, u64)| lines[line as usize][word] |= bits;
    for (first, last) in ranges {
        for address in beginnings(first, last, BLOOM_PREFIX_BITS) {
            add(bloom_place(address, is_v4));
        }
        if is_v4 {
            beginnings(first, last, BITMAP_PREFIX_BITS)
                .for_each(|address| add(bitmap_place(address)));
        }
    }
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
    let places = [bitmap_place(address), bloom_place(address, true)];
    let is_set = |(number, word, bits): (u32, usize, u64)| {
        line(number).is_some_and(|line| line[word] & bits == bits)
    };
    places.into_iter().all(is_set)
}

#[cfg(test)]
mod tests {
    use filter_common::PREFIX_LINES;
    use ipnet::Ipv4Net;

    use super::*;

    fn lines_of<'a>(prefixes: impl IntoIterator<Item = &'a Ipv4Net>) -> Vec<BloomLine> {
        let prefixes = prefixes.into_iter();
        let ranges =
            prefixes.map(|prefix| (prefix.network().to_bits(), prefix.broadcast().to_bits()));
        let mut lines = vec![BloomLine::default(); PREFIX_LINES as usize];
        add_ranges(&mut lines, ranges, true);
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
                let all = Ipv4Net::new_assert(address.into(), BLOOM_PREFIX_BITS as u8);
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
