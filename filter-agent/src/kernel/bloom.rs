//! The prefix Bloom filter's content. Pure.

use std::collections::BTreeMap;

use filter_common::{NEAR_BITS, NearLine, near_place};

use crate::kernel::change::{Change, changes};

/// Puts what is near ranges of one address family, given by the first 32 bits of their first and their
/// last addresses, into the lines of the map.
pub(super) fn add_near(
    lines: &mut [NearLine],
    ranges: impl Iterator<Item = (u32, u32)>,
    is_v4: bool,
) {
    const UNIT: u32 = 32 - NEAR_BITS;
    for (first, last) in ranges {
        for address in (first >> UNIT..=last >> UNIT).map(|beginning| beginning << UNIT) {
            let (line, word, bits) = near_place(address.to_be(), is_v4);
            lines[line as usize][word] |= bits;
        }
    }
}

/// What is near by either of two such maps.
pub(super) fn union(a: &[(u32, NearLine)], b: &[(u32, NearLine)]) -> Vec<(u32, NearLine)> {
    let merged = changes(a, b).into_iter();
    let merged = merged.map(|Change { key, old, new }| {
        let (old, new) = (old.unwrap_or_default(), new.unwrap_or_default());
        (key, std::array::from_fn(|word| old[word] | new[word]))
    });
    let differ: BTreeMap<u32, NearLine> = merged.collect();
    let mut lines = a.to_vec();
    lines.retain(|(line, _)| !differ.contains_key(line));
    lines.extend(differ);
    lines.sort_unstable_by_key(|&(line, _)| line);
    lines
}

#[cfg(test)]
mod tests {
    use filter_common::NEAR_LINES;
    use ipnet::Ipv4Net;

    use super::*;

    #[test]
    fn near_are_all_addresses_that_begin_as_one_of_a_prefix_does_and_few_others() {
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
            let mut lines = vec![NearLine::default(); NEAR_LINES as usize];
            add_near(&mut lines, ranges, true);
            for _ in 0..200 {
                let inside = random.choice(&prefixes).filter(|_| random.bool());
                let address = inside.map_or(random.u32(..), |prefix| {
                    let around = random.u32(..) >> prefix.prefix_len().min(31);
                    (prefix.network().to_bits() ^ around).wrapping_add(random.u32(..600))
                });
                let all = Ipv4Net::new_assert(address.into(), NEAR_BITS as u8);
                let expected = prefixes
                    .iter()
                    .any(|prefix| prefix.contains(&all.trunc()) || all.trunc().contains(prefix));
                let (line, word, bits) = near_place(address.to_be(), true);
                let found = lines[line as usize][word] & bits == bits;
                assert!(found || !expected, "{address:x} of {prefixes:?}");
                far += u32::from(!expected);
                mistaken += u32::from(found && !expected);
            }
        }
        assert!(far > 10_000 && mistaken < far / 100, "{mistaken} of {far}");
    }
}
