//! Lists of allowed networks: as hard as can be, and shaped as they are published. All are made from fixed seeds.

use std::{collections::BTreeMap, net::Ipv4Addr};

use clap::ValueEnum;
use filter_tests::frames::Rng;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::traffic::{ALLOWED6, DENIED4, DENIED6, DENSE};

/// Lengths of prefixes, each with its weight.
type Weights = &'static [(u8, u32)];

/// The lengths of prefixes are drawn by weight. They are of the kind of the published lists, not copies of one.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Shape {
    /// Each prefix in another /24, from /25 to /32, anywhere: nothing can be merged, and nothing lies together.
    Hard,
    /// A provider's ranges: most from /16 to /24, close together in a few dozen /12s.
    Cloud,
    /// The networks of a country: most from /19 to /24, anywhere.
    Country,
    /// Single addresses nine times of ten, many of them neighbours, and networks from /16 to /24.
    Blocklist,
}

impl Shape {
    pub const fn name(self) -> &'static str {
        match self {
            Shape::Hard => "hard",
            Shape::Cloud => "cloud",
            Shape::Country => "country",
            Shape::Blocklist => "blocklist",
        }
    }

    /// Most prefixes of a family that are worth measuring: a million of a country's would not fit into the address space.
    pub const fn most(self) -> usize {
        match self {
            Shape::Hard => usize::MAX,
            Shape::Blocklist => 1_000_000,
            Shape::Country => 100_000,
            Shape::Cloud => 10_000,
        }
    }

    /// As many prefixes of each family, none inside another.
    pub fn networks(self, count: usize) -> Vec<IpNet> {
        let Some((v4, v6)) = self.weights() else {
            return hard(count);
        };
        let mut rng = Rng::with_seed(7);
        let mut taken = Taken::default();
        // No list may have the denied sources.
        taken.take(u32::from(DENIED4).into(), 1);
        let blocks: Vec<u32> = (0..24 + count / 50)
            .map(|_| address4(&mut rng) & 0xfff0_0000)
            .collect();
        let mut networks: Vec<IpNet> = Vec::with_capacity(2 * count);
        let mut last = 0;
        while networks.len() < count {
            let length = draw(&mut rng, v4);
            let address = match self {
                Shape::Cloud => {
                    let block = *rng.choice(&blocks).expect("there are blocks");
                    block | rng.u32(..1 << 20)
                }
                Shape::Blocklist if length == 32 && rng.u32(..3) == 0 => {
                    last & !0xff | rng.u32(..256)
                }
                _ => address4(&mut rng),
            };
            let network = Ipv4Net::new(address.into(), length).expect("a length of IPv4");
            let first = u32::from(network.network());
            if is_host(first) && taken.take(first.into(), 1 << (32 - length)) {
                networks.push(network.trunc().into());
                last = first;
            }
        }
        let mut taken = Taken::default();
        taken.take(u128::from(DENIED6), 1);
        while networks.len() < 2 * count {
            let length = draw(&mut rng, v6);
            let provider = match self {
                Shape::Country => rng.u128(..1 << 22),
                // A thousand of them, each with a /24 of its own.
                _ => rng.u128(..1000) << 8,
            };
            let address = (0x2a02_0000 + provider) << 96 | rng.u128(..1 << 96);
            let network = Ipv6Net::new(address.into(), length).expect("a length of IPv6");
            let first = u128::from(network.network());
            if taken.take(first, 1 << (128 - length)) {
                networks.push(network.trunc().into());
            }
        }
        networks
    }

    /// Of IPv4 and of IPv6. `None`: all lengths are as likely.
    fn weights(self) -> Option<(Weights, Weights)> {
        Some(match self {
            Shape::Hard => return None,
            Shape::Cloud => (
                &[
                    (14, 1),
                    (15, 1),
                    (16, 4),
                    (17, 4),
                    (18, 6),
                    (19, 7),
                    (20, 9),
                    (21, 9),
                    (22, 13),
                    (23, 12),
                    (24, 26),
                    (28, 2),
                    (32, 6),
                ],
                &[
                    (36, 4),
                    (40, 20),
                    (44, 20),
                    (46, 6),
                    (48, 35),
                    (56, 10),
                    (64, 5),
                ],
            ),
            Shape::Country => (
                &[
                    (13, 1),
                    (14, 2),
                    (15, 3),
                    (16, 10),
                    (17, 10),
                    (18, 20),
                    (19, 40),
                    (20, 60),
                    (21, 80),
                    (22, 300),
                    (23, 110),
                    (24, 364),
                ],
                &[(29, 20), (32, 55), (36, 3), (40, 4), (44, 4), (48, 14)],
            ),
            Shape::Blocklist => (
                &[
                    (16, 1),
                    (18, 1),
                    (19, 2),
                    (20, 4),
                    (21, 4),
                    (22, 8),
                    (23, 10),
                    (24, 70),
                    (32, 900),
                ],
                &[(32, 5), (48, 100), (64, 600), (128, 295)],
            ),
        })
    }
}

/// Ranges that do not overlap, by their first address.
#[derive(Default)]
struct Taken(BTreeMap<u128, u128>);

impl Taken {
    /// Returns false where a part is taken already.
    fn take(&mut self, first: u128, count: u128) -> bool {
        let last = first + (count - 1);
        let before = self.0.range(..=last).next_back();
        let is_free = before.is_none_or(|(_, &end)| end < first);
        if is_free {
            self.0.insert(first, last);
        }
        is_free
    }
}

fn draw(rng: &mut Rng, weights: Weights) -> u8 {
    let all: u32 = weights.iter().map(|(_, weight)| weight).sum();
    let mut place = rng.u32(..all);
    for &(length, weight) in weights {
        if place < weight {
            return length;
        }
        place -= weight;
    }
    unreachable!("a place is below the sum of the weights")
}

/// Of the addresses that hosts on the Internet have, most.
fn address4(rng: &mut Rng) -> u32 {
    loop {
        let address = rng.u32(0x0b08_0000..0xdf00_0000);
        if is_host(address) {
            return address;
        }
    }
}

fn is_host(address: u32) -> bool {
    let [first, second, ..] = address.to_be_bytes();
    (11..0xdf).contains(&first) && !matches!((first, second), (100 | 127, _) | (169, 254))
}

/// IPv4 from /25 to /32 in as many /24s, IPv6 from /48 to /64 in a thousand /24s, as if of a thousand providers.
fn hard(count: usize) -> Vec<IpNet> {
    let mut rng = Rng::with_seed(6);
    let mut taken = vec![false; 1 << 24];
    let mut networks: Vec<IpNet> = (0..count.min(256))
        .map(|third| {
            let [first, second] = DENSE;
            Ipv4Net::from(Ipv4Addr::new(first, second, third as u8, 77)).into()
        })
        .collect();
    while networks.len() < count {
        let place = rng.u32(0x0b_0800..0xa9_0000);
        let [_, first, second, third] = place.to_be_bytes();
        if !is_host(place << 8) || std::mem::replace(&mut taken[place as usize], true) {
            continue;
        }
        let address = Ipv4Addr::new(first, second, third, rng.u8(..));
        let prefix = Ipv4Net::new(address, rng.u8(25..=32)).expect("a length of IPv4");
        networks.push(prefix.trunc().into());
    }
    networks.push(Ipv6Net::from(ALLOWED6).into());
    for number in 1..count as u128 {
        // The number in the bits up to /48 makes each another.
        let provider = 0x2a02_0000 + ((number % 1000) << 8);
        let bits = provider << 96 | (number << 80) & ((1 << 104) - 1);
        let prefix = Ipv6Net::new(bits.into(), rng.u8(48..=64)).expect("a length of IPv6");
        networks.push(prefix.trunc().into());
    }
    networks
}
