//! The prefix Bloom filter's content. Pure.

use std::collections::BTreeMap;

use filter_common::{BLOOM_PREFIX_BITS, BloomLine, bloom_place};

use crate::kernel::change::{Change, changes};

/// Adds ranges of one address family, given by the first 32 bits of their first and last addresses.
pub(super) fn add_ranges(
    lines: &mut [BloomLine],
    ranges: impl Iterator<Item = (u32, u32)>,
    is_v4: bool,
) {
    const UNIT: u32 = 32 - BLOOM_PREFIX_BITS;
    for (first, last) in ranges {
        for address in (first >> UNIT..=last >> UNIT).map(|beginning| beginning << UNIT) {
            let (line, word, bits) = bloom_place(address.to_be(), is_v4);
            lines[line as usize][word] |= bits;
        }
    }
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

#[cfg(test)]
mod tests {
    use filter_common::BLOOM_LINES;
    use ipnet::Ipv4Net;

    use super::*;

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
            let ranges = prefixes
                .iter()
                .map(|prefix| (prefix.network().to_bits(), prefix.broadcast().to_bits()));
            let mut lines = vec![BloomLine::default(); BLOOM_LINES as usize];
            add_ranges(&mut lines, ranges, true);
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
                let (line, word, bits) = bloom_place(address.to_be(), true);
                let found = lines[line as usize][word] & bits == bits;
                assert!(found || !expected, "{address:x} of {prefixes:?}");
                far += u32::from(!expected);
                mistaken += u32::from(found && !expected);
            }
        }
        assert!(far > 10_000 && mistaken < far / 100, "{mistaken} of {far}");
    }
}
