//! Lists of prefixes that are shared, since one may hold a million. Pure.

use std::{iter, net::IpAddr, ops::Deref, sync::Arc};

use ipnet::IpNet;

/// Prefixes in order, no two alike, IPv4 first.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Prefixes {
    list: Box<[IpNet]>,
    widths: [Width; 2],
    shortest: Option<u8>,
    /// Whether one is a part of another.
    is_nested: bool,
}

/// A number of addresses, less one, since all of IPv6 would not fit; `None`: there is none.
pub type Width = Option<u128>;

impl Deref for Prefixes {
    type Target = [IpNet];

    fn deref(&self) -> &[IpNet] {
        &self.list
    }
}

impl From<Vec<IpNet>> for Prefixes {
    fn from(mut list: Vec<IpNet>) -> Self {
        list.sort_unstable();
        list.dedup();
        Self {
            widths: [true, false].map(|v4| width(list.iter().filter(|net| is_v4(net) == v4))),
            shortest: list.iter().map(IpNet::prefix_len).min(),
            is_nested: list.windows(2).any(|pair| pair[0].contains(&pair[1])),
            list: list.into(),
        }
    }
}

impl Prefixes {
    pub fn shared(list: impl Into<Vec<IpNet>>) -> Arc<Self> {
        Arc::new(list.into().into())
    }

    /// The length of its shortest prefix.
    pub fn shortest(&self) -> Option<u8> {
        self.shortest
    }

    /// Addresses of IPv4, or of IPv6, that it holds.
    pub fn width(&self, of_v4: bool) -> Width {
        self.widths[usize::from(!of_v4)]
    }

    /// Whether a prefix is one of its own.
    pub fn has(&self, prefix: &IpNet) -> bool {
        self.binary_search(prefix).is_ok()
    }

    /// Those of its own that are a part of `outer`, or `outer` itself.
    pub fn within(&self, outer: &IpNet) -> &[IpNet] {
        let begin = self.partition_point(|prefix| prefix < outer);
        let last = IpNet::from(outer.broadcast());
        let end = self.partition_point(|prefix| *prefix <= last);
        &self[begin..end]
    }

    /// Those of IPv4, or of IPv6.
    pub fn of_family(&self, v4: bool) -> &[IpNet] {
        let (of_v4, of_v6) = self.split_at(self.partition_point(is_v4));
        if v4 { of_v4 } else { of_v6 }
    }

    /// The longest of its own that a prefix is, or is a part of.
    pub fn holding(&self, prefix: IpNet) -> Option<IpNet> {
        let not_after = self.partition_point(|own| *own <= prefix);
        let last = *self[..not_after].last()?;
        if last.contains(&prefix) {
            return Some(last);
        }
        // In a list of a region, which has no nested ones, no other can.
        let shortest = self.shortest.filter(|_| self.is_nested)?;
        let mut outer = around(prefix).take_while(|outer| outer.prefix_len() >= shortest);
        outer.find(|outer| self.has(outer))
    }
}

pub fn is_v4(prefix: &IpNet) -> bool {
    matches!(prefix, IpNet::V4(_))
}

/// An address as a number.
pub fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_bits().into(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

/// A prefix, and those that it is a part of, the longest first.
pub fn around(prefix: IpNet) -> impl Iterator<Item = IpNet> {
    iter::successors(Some(prefix), IpNet::supernet)
}

/// Addresses that prefixes of one family, in order, hold together.
pub fn width<'a>(prefixes: impl Iterator<Item = &'a IpNet>) -> Width {
    let mut width: Width = None;
    let mut end: Option<u128> = None;
    for prefix in prefixes {
        let (first, last) = (bits(prefix.network()), bits(prefix.broadcast()));
        let first = match end {
            Some(end) if last <= end => continue,
            Some(end) => first.max(end + 1),
            None => first,
        };
        let more = last - first;
        width = Some(width.map_or(more, |width| width + more + 1));
        end = Some(last);
    }
    width
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn list_knows_its_prefixes_and_what_they_hold() {
        let mut random = fastrand::Rng::with_seed(4);
        let mut prefix = || {
            let address: IpAddr = match random.bool() {
                true => [192, 0, 2, random.u8(..16)].into(),
                false => (0x2001_0db8_u128 << 96 | random.u128(..16))
                    .to_be_bytes()
                    .into(),
            };
            let longest = IpNet::from(address).prefix_len();
            let length = random.u8(longest - 5..=longest);
            IpNet::new(address, length).unwrap().trunc()
        };
        for _ in 0..2_000 {
            let list: Vec<IpNet> = (0..5).map(|_| prefix()).collect();
            let prefixes = Prefixes::from(list.clone());
            assert!(prefixes.is_sorted_by(|one, other| one < other));
            let other = prefix();
            assert_eq!(prefixes.has(&other), list.contains(&other));
            let within = prefixes.iter().filter(|prefix| other.contains(*prefix));
            let within: Vec<IpNet> = within.copied().collect();
            assert_eq!(prefixes.within(&other), within);
            for part in [other, other.network().into()] {
                let holding = list.iter().filter(|prefix| prefix.contains(&part));
                let longest = holding.max_by_key(|prefix| prefix.prefix_len());
                assert_eq!(prefixes.holding(part), longest.copied());
            }
            let [v4, v6] = [true, false].map(|v4| prefixes.of_family(v4));
            assert_eq!([v4, v6].concat(), *prefixes);
            assert!(v4.iter().all(is_v4) && !v6.iter().any(is_v4));
        }
    }
}
