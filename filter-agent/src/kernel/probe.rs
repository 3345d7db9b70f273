//! Packets that show what the attached program does with a policy. Pure.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use filter_common::{Protocol, is_bad_source4, is_bad_source6};
use ipnet::IpNet;

use crate::{
    clock::BootTime,
    compile::{Compiled, Entries, Held},
};

pub struct Probe {
    pub database: String,
    pub protocol: Protocol,
    pub port: u16,
    pub source: IpAddr,
    pub destination: IpAddr,
    /// Whether the policy allows the source.
    pub allowed: bool,
    pub monitor: bool,
}

/// Probes of one round: one sends a few hundred packets, however many ports the policy has.
pub const MAX_PROBES: usize = 512;

/// Time that a round of probes may take.
const MARGIN: Duration = Duration::from_secs(5);

/// Returns probes of each database: of every port and address family one source that must pass and one that
/// must not, as far as the policy has such sources. At most `MAX_PROBES`, shared equally by the
/// databases: where a database has more, each `round` returns the next of them in turn.
///
/// A prefix whose rule ends within a moment of `now`, and a source that is blocked, are not probed as allowed.
pub fn probes(compiled: &Compiled, now: BootTime, round: u64) -> Vec<Probe> {
    let mut probes = Vec::new();
    let share = MAX_PROBES / compiled.databases.len().max(1);
    for (name, entries) in &compiled.databases {
        let v4 = || {
            entries.v4.iter().map(|(prefix, _)| {
                let (first, last) = (prefix.network(), prefix.broadcast());
                (first.to_bits().into(), last.to_bits().into())
            })
        };
        let v6 = || {
            entries.v6.iter().map(|(prefix, _)| {
                let (first, last) = (prefix.network(), prefix.broadcast());
                (first.to_bits(), last.to_bits())
            })
        };
        let lasts = |held: &Held| {
            let end = held.end.and_then(|rule| entries.rules[usize::from(rule)].1);
            end.is_none_or(|end| end > now.after(MARGIN))
        };
        let lasting4 = v4().zip(&entries.v4).filter(|(_, (_, held))| lasts(held));
        let lasting6 = v6().zip(&entries.v6).filter(|(_, (_, held))| lasts(held));
        let free4 = |bits| {
            source4(bits).filter(|source| {
                let mut blocked = entries.blocked4.iter();
                !blocked.any(|(prefix, _)| IpNet::V4(*prefix).contains(source))
            })
        };
        let free6 = |bits| {
            source6(bits).filter(|source| {
                let mut blocked = entries.blocked6.iter();
                !blocked.any(|(prefix, _)| IpNet::V6(*prefix).contains(source))
            })
        };
        let sources = [
            (inside(lasting4.map(|(range, _)| range), free4), true),
            (outside(v4(), 1 << 24, source4), false),
            (inside(lasting6.map(|(range, _)| range), free6), true),
            // Above ::/64: below it are IPv4-mapped and other special addresses.
            (outside(v6(), 1 << 64, source6), false),
        ];
        let sources = sources.into_iter().filter_map(|(source, allowed)| {
            let source = source?;
            Some((source, destination(entries, source)?, allowed))
        });
        let sources: Vec<_> = sources.collect();
        let all = sources.len() * entries.ports.len();
        let count = all.min(share);
        let first = match all {
            0 => 0,
            _ => (round % all as u64) as usize * count % all,
        };
        probes.extend((first..first + count).map(|number| {
            let number = number % all;
            let (source, destination, allowed) = sources[number % sources.len()];
            Probe {
                database: name.clone(),
                protocol: entries.protocol,
                port: entries.ports[number / sources.len()],
                source,
                destination,
                allowed,
                monitor: entries.monitor,
            }
        }));
    }
    probes
}

/// An address as a source, unless no host may have it on the wire.
fn source4(bits: u128) -> Option<IpAddr> {
    let address = Ipv4Addr::from_bits(bits.try_into().ok()?);
    (!is_bad_source4(address.to_bits())).then_some(address.into())
}

fn source6(bits: u128) -> Option<IpAddr> {
    let address = Ipv6Addr::from_bits(bits);
    (!is_bad_source6(address.to_bits())).then_some(address.into())
}

/// An address of one of the ranges.
fn inside(
    mut ranges: impl Iterator<Item = (u128, u128)>,
    source: impl Fn(u128) -> Option<IpAddr>,
) -> Option<IpAddr> {
    ranges.find_map(|(first, last)| {
        let middle = (first + (last - first) / 2).saturating_add(1).min(last);
        [first, middle, last].into_iter().find_map(&source)
    })
}

/// The first address from `next` on that is in none of the ranges, which are sorted.
fn outside(
    ranges: impl Iterator<Item = (u128, u128)>,
    mut next: u128,
    source: fn(u128) -> Option<IpAddr>,
) -> Option<IpAddr> {
    for (first, last) in ranges {
        if next < first
            && let Some(source) = source(next)
        {
            return Some(source);
        }
        next = next.max(last.checked_add(1)?);
    }
    // Past the last range may lie addresses that are no source, such as loopback; after those of
    // IPv4 comes the next /8.
    source(next).or_else(|| source(((next >> 24) + 1) << 24))
}

/// A local address that a packet from `source` may be for: of its family, and the database's.
pub fn destination(entries: &Entries, source: IpAddr) -> Option<IpAddr> {
    if !entries.addresses.is_empty() {
        let same_family = |address: &&IpAddr| address.is_ipv4() == source.is_ipv4();
        return entries.addresses.iter().find(same_family).copied();
    }
    // Which one does not matter; these are for documentation (RFC 5737, RFC 3849).
    Some(match source {
        IpAddr::V4(_) => Ipv4Addr::new(192, 0, 2, 1).into(),
        IpAddr::V6(_) => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into(),
    })
}

/// An Ethernet frame with a minimal packet for a port: what the program reads of a real one.
pub fn frame(protocol: Protocol, source: IpAddr, destination: IpAddr, port: u16) -> Vec<u8> {
    // The longer of a TCP and a UDP header, empty but for the ports.
    const TRANSPORT: u8 = 20;
    let mut frame = vec![0; 12];
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let number = protocol.number();
            frame.extend([
                0x08,
                0x00,
                0x45,
                0,
                0,
                20 + TRANSPORT,
                0,
                0,
                0,
                0,
                64,
                number,
                0,
                0,
            ]);
            frame.extend(source.octets());
            frame.extend(destination.octets());
        }
        (source, destination) => {
            frame.extend([
                0x86,
                0xdd,
                0x60,
                0,
                0,
                0,
                0,
                TRANSPORT,
                protocol.number(),
                64,
            ]);
            for address in [source, destination] {
                frame.extend(match address {
                    IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
                    IpAddr::V6(address) => address.octets(),
                });
            }
        }
    }
    let ports = frame.len();
    frame.resize(ports + TRANSPORT as usize, 0);
    frame[ports + 2..ports + 4].copy_from_slice(&port.to_be_bytes());
    if protocol == Protocol::Tcp {
        // 20 bytes of header, and ACK: a packet that is part of a connection and says nothing in it.
        frame[ports + 12..ports + 14].copy_from_slice(&[0x50, 0x10]);
    }
    frame
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use ipnet::{Ipv4Net, Ipv6Net};

    use super::*;
    use crate::rules::RuleKey;

    fn compiled(v4: &[&str], v6: &[&str]) -> Compiled {
        let held = Held {
            rule: 0,
            end: None,
            is_member: false,
        };
        let v4 = v4
            .iter()
            .map(|text| (text.parse::<Ipv4Net>().unwrap(), held));
        let v6 = v6
            .iter()
            .map(|text| (text.parse::<Ipv6Net>().unwrap(), held));
        let entries = Entries {
            protocol: Protocol::Tcp,
            ports: vec![5432],
            addresses: vec![],
            monitor: false,
            tls: None,
            on_removal: crate::policy::OnRemoval::Reset,
            rules: vec![(RuleKey::Internet, None)],
            blocked4: vec![],
            blocked6: vec![],
            v4: v4.collect(),
            v6: v6.collect(),
        };
        Compiled {
            databases: [("orders".into(), entries)].into(),
            ..Compiled::default()
        }
    }

    fn sources(v4: &[&str], v6: &[&str]) -> Vec<(String, bool)> {
        let probes = probes(&compiled(v4, v6), BootTime(0), 0);
        probes
            .iter()
            .map(|probe| (probe.source.to_string(), probe.allowed))
            .collect()
    }

    #[test]
    fn closed_database_has_only_sources_that_must_not_pass() {
        let expected = [("1.0.0.0".into(), false), ("0:0:0:1::".into(), false)];
        assert_eq!(sources(&[], &[]), expected);
    }

    #[test]
    fn open_database_has_only_sources_that_must_pass() {
        let expected = [("128.0.0.0".into(), true), ("8000::".into(), true)];
        assert_eq!(sources(&["0.0.0.0/0"], &["::/0"]), expected);
    }

    #[test]
    fn source_outside_is_found_between_ranges_and_past_loopback() {
        let (inside, outside) = (true, false);
        assert_eq!(
            sources(
                &["0.0.0.0/8", "1.0.0.0/8", "3.0.0.0/8"],
                &["::/1", "8000::/2"]
            ),
            [
                ("1.0.0.0".into(), inside),
                ("2.0.0.0".into(), outside),
                ("4000::".into(), inside),
                ("c000::".into(), outside),
            ]
        );
        assert_eq!(
            sources(&["0.0.0.0/1"], &[])[..2],
            [("64.0.0.0".into(), inside), ("128.0.0.0".into(), outside),]
        );
    }

    #[test]
    fn many_ports_are_probed_in_turn_and_never_all_at_once() {
        let mut compiled = compiled(&["192.0.2.0/24"], &["2001:db8::/32"]);
        let mut other = compiled.databases["orders"].clone();
        other.ports = vec![1];
        compiled.databases.insert("shop".into(), other);
        let orders = compiled.databases.get_mut("orders").unwrap();
        orders.ports = (1000..3000).collect();
        let mut seen = BTreeSet::new();
        let rounds = (2000 * 4_usize).div_ceil(MAX_PROBES / 2);
        for round in 0..rounds as u64 {
            let probes = probes(&compiled, BootTime(0), round);
            assert!(probes.len() <= MAX_PROBES);
            let shop = probes.iter().filter(|probe| probe.database == "shop");
            assert_eq!(shop.count(), 4);
            let orders = probes.iter().filter(|probe| probe.database == "orders");
            seen.extend(orders.map(|probe| (probe.port, probe.source)));
        }
        assert_eq!(seen.len(), 2000 * 4);
    }
}
