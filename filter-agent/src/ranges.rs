//! Sets of addresses as sorted ranges: what prefixes hold, whatever their number. Pure.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;

/// First and last address of a range. Addresses of both families, IPv4 ones first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ranges(Vec<(Place, Place)>);

/// An address by family (6: IPv6) and number.
type Place = (u8, u128);

fn place(address: IpAddr) -> Place {
    match address {
        IpAddr::V4(address) => (4, address.to_bits().into()),
        IpAddr::V6(address) => (6, address.to_bits()),
    }
}

impl Ranges {
    pub fn of(prefixes: &[IpNet]) -> Self {
        let range = |prefix: &IpNet| (place(prefix.network()), place(prefix.broadcast()));
        let mut ranges: Vec<(Place, Place)> = prefixes.iter().map(range).collect();
        ranges.sort_unstable();
        let mut merged: Vec<(Place, Place)> = Vec::new();
        for (first, last) in ranges {
            match merged.last_mut() {
                Some((_, end)) if first <= *end => *end = last.max(*end),
                _ => merged.push((first, last)),
            }
        }
        Self(merged)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn contains(&self, address: IpAddr) -> bool {
        self.end_at(place(address)).is_some()
    }

    /// The end of the range that holds an address.
    fn end_at(&self, place: Place) -> Option<Place> {
        let after = self.0.partition_point(|(first, _)| *first <= place);
        let (_, last) = self.0[..after].last()?;
        (*last >= place).then_some(*last)
    }

    /// Whether all addresses of `other` are among these.
    fn holds(&self, other: &Self) -> bool {
        let mut ranges = other.0.iter();
        ranges.all(|(first, last)| self.first_gap(*first, *last).is_none())
    }

    /// The first address of a range that is not among these.
    fn first_gap(&self, first: Place, last: Place) -> Option<Place> {
        let mut next = first;
        loop {
            match self.end_at(next) {
                None => return Some(next),
                Some(end) if end >= last => return None,
                Some(end) => next = after(end),
            }
        }
    }

    /// The places of the sets that hold everything that this one does: each that does so alone; else several that do so
    /// together. Empty: some address is in none.
    pub fn held_by(&self, others: &[&Self]) -> Vec<usize> {
        if self.is_empty() {
            return Vec::new();
        }
        let all = || others.iter().enumerate();
        let alone = all().filter(|(_, other)| other.holds(self));
        let alone: Vec<usize> = alone.map(|(number, _)| number).collect();
        if !alone.is_empty() {
            return alone;
        }
        let mut together = BTreeSet::new();
        for &(first, last) in &self.0 {
            let mut next = first;
            loop {
                let ends = all().filter_map(|(number, other)| Some((other.end_at(next)?, number)));
                // Of several that reach as far the first.
                let Some((end, number)) = ends.reduce(|a, b| if b.0 > a.0 { b } else { a }) else {
                    return Vec::new();
                };
                together.insert(number);
                if end >= last {
                    break;
                }
                next = after(end);
            }
        }
        together.into_iter().collect()
    }
}

/// The next address. Only asked for below the last one of a range.
fn after((family, number): Place) -> Place {
    (family, number.saturating_add(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(prefixes: &[&str]) -> Ranges {
        let prefixes: Vec<IpNet> = prefixes.iter().map(|p| p.parse().unwrap()).collect();
        Ranges::of(&prefixes)
    }

    #[test]
    fn sets_are_held_alone_together_or_not() {
        let own = ranges(&["192.0.2.0/24", "2001:db8::/64"]);
        let (half, rest) = (
            ranges(&["192.0.2.0/25", "2001:db8::/48"]),
            ranges(&["192.0.2.128/25"]),
        );
        let wide = ranges(&["192.0.0.0/16", "2001:db8::/32"]);
        let other = ranges(&["198.51.100.0/24"]);
        assert_eq!(own.held_by(&[&other, &wide, &half, &rest]), [1]);
        assert_eq!(own.held_by(&[&other, &half, &rest]), [1, 2]);
        assert!(own.held_by(&[&half, &other]).is_empty());
        assert!(own.held_by(&[]).is_empty());
        assert!(ranges(&[]).held_by(&[&wide]).is_empty());
        let everything = ranges(&["0.0.0.0/0", "::/0"]);
        assert_eq!(everything.held_by(&[&everything]), [0]);
        let halves = ["8000::/1", "::/1"].map(|half| ranges(&["0.0.0.0/0", half]));
        assert_eq!(everything.held_by(&[&halves[0], &halves[1]]), [0, 1]);
        // An IPv4 address is no IPv6 address.
        assert!(!ranges(&["::/0"]).contains("0.0.0.1".parse().unwrap()));
    }

    /// Against each address of a small network, one by one.
    #[test]
    fn random_sets_agree_with_a_count_of_addresses() {
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..400 {
            let mut set = || {
                let prefixes = (0..random.usize(1..4)).map(|_| {
                    let length = random.u8(28..=32);
                    let address = 0xc000_0200_u32 | random.u32(..32);
                    IpNet::new(IpAddr::from(address.to_be_bytes()), length)
                        .unwrap()
                        .trunc()
                });
                prefixes.collect::<Vec<IpNet>>()
            };
            let (own, sets) = (set(), [set(), set(), set()]);
            let addresses = |set: &[IpNet]| -> BTreeSet<IpAddr> {
                let all = (0..=255).map(|low| IpAddr::from([192, 0, 2, low]));
                all.filter(|a| set.iter().any(|p| p.contains(a))).collect()
            };
            let ranges = sets.each_ref().map(|set| Ranges::of(set));
            let others: Vec<&Ranges> = ranges.iter().collect();
            let held = Ranges::of(&own).held_by(&others);
            let wanted = addresses(&own);
            let alone = (0..3).filter(|&i| wanted.is_subset(&addresses(&sets[i])));
            let alone: Vec<usize> = alone.collect();
            let union = addresses(&sets.concat());
            if !alone.is_empty() {
                assert_eq!(held, alone, "{own:?} {sets:?}");
            } else if wanted.is_subset(&union) {
                let named: Vec<IpNet> = held.iter().flat_map(|&i| sets[i].clone()).collect();
                assert!(wanted.is_subset(&addresses(&named)), "{own:?} {sets:?}");
                assert!(held.len() > 1);
            } else {
                assert!(held.is_empty(), "{own:?} {sets:?}");
            }
            for &address in &wanted {
                assert!(Ranges::of(&own).contains(address));
            }
        }
    }
}
