//! Packets that show what the attached program does with a policy. Pure.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use filter_common::{Protocol, is_bad_source4, is_bad_source6};
use ipnet::IpNet;

use crate::{
    clock::BootTime,
    compile::{Compiled, Entries},
    prefixes::{Prefixes, bits},
    rules::RuleKey,
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

/// Prefixes without a gap between them that a source outside of all is looked for behind: with 30 lists each takes some
/// 10 µs.
const MAX_LOOKS: usize = 2_000;

/// Addresses from which such a source is looked for, one after the other.
const BEGINNINGS: u128 = 8;

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
        let lasts = |end: Option<BootTime>| end.is_none_or(|end| end > now.after(MARGIN));
        let lasting = entries.allowed().filter(|&(end, _)| lasts(end));
        let lasting: Vec<&Prefixes> = lasting.map(|(_, list)| list).collect();
        let all: Vec<&Prefixes> = entries.allowed().map(|(_, list)| list).collect();
        let is_free = |source: &IpAddr| {
            let mut rules = entries.rules.iter();
            !rules.any(|(key, _)| matches!(key, RuleKey::Block(block) if block.contains(source)))
        };
        let sources = [true, false].into_iter().flat_map(|of_v4| {
            let prefixes = lasting.iter().flat_map(|list| list.of_family(of_v4));
            let inside = inside(prefixes, is_free);
            [(inside, true), (outside(&all, of_v4), false)]
        });
        let sources = sources.filter_map(|(source, allowed)| {
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
fn source(bits: u128, of_v4: bool) -> Option<IpAddr> {
    let is_bad = match address(bits, of_v4)? {
        IpAddr::V4(address) => is_bad_source4(address.to_bits()),
        IpAddr::V6(address) => is_bad_source6(address.to_bits()),
    };
    address(bits, of_v4).filter(|_| !is_bad)
}

fn address(bits: u128, of_v4: bool) -> Option<IpAddr> {
    match of_v4 {
        true => Some(Ipv4Addr::from_bits(bits.try_into().ok()?).into()),
        false => Some(Ipv6Addr::from_bits(bits).into()),
    }
}

/// An address of one of the prefixes.
fn inside<'a>(
    mut prefixes: impl Iterator<Item = &'a IpNet>,
    is_free: impl Fn(&IpAddr) -> bool,
) -> Option<IpAddr> {
    prefixes.find_map(|prefix| {
        let (first, last) = (bits(prefix.network()), bits(prefix.broadcast()));
        let middle = (first + (last - first) / 2).saturating_add(1).min(last);
        let addresses = [first, middle, last].into_iter();
        let mut sources = addresses.filter_map(|bits| source(bits, prefix.addr().is_ipv4()));
        sources.find(&is_free)
    })
}

/// An address of a family that no list holds, above what hosts may not have: the first one, unless it is far.
fn outside(lists: &[&Prefixes], of_v4: bool) -> Option<IpAddr> {
    // 0.0.0.0/8, and ::/64, below which are IPv4-mapped and other special addresses.
    let (lowest, bits) = if of_v4 { (1 << 24, 32) } else { (1 << 64, 128) };
    let starts = (0..BEGINNINGS).map(|part| (part << (bits - BEGINNINGS.ilog2())).max(lowest));
    starts
        .into_iter()
        .find_map(|start| outside_from(start, lists, of_v4))
}

fn outside_from(start: u128, lists: &[&Prefixes], of_v4: bool) -> Option<IpAddr> {
    let mut next = start;
    for _ in 0..MAX_LOOKS {
        let found = address(next, of_v4)?;
        let holding = lists.iter().find_map(|list| list.holding(found.into()));
        next = match (holding, source(next, of_v4)) {
            (Some(prefix), _) => bits(prefix.broadcast()).checked_add(1)?,
            (None, Some(source)) => return Some(source),
            // A whole first byte is loopback or multicast.
            (None, None) => {
                let byte = if of_v4 { 24 } else { 120 };
                ((next >> byte) + 1).checked_mul(1 << byte)?
            }
        };
    }
    None
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

    use super::*;

    fn compiled(v4: &[&str], v6: &[&str]) -> Compiled {
        let prefixes: Vec<IpNet> = v4
            .iter()
            .chain(v6)
            .map(|text| text.parse().unwrap())
            .collect();
        let entries = Entries {
            protocol: Protocol::Tcp,
            ports: vec![5432],
            addresses: vec![],
            monitor: false,
            tls: None,
            on_removal: crate::policy::OnRemoval::Reset,
            rules: vec![(RuleKey::Internet, None)],
            lists: vec![(0, Prefixes::shared(prefixes))],
            counts: Default::default(),
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
    fn source_inside_is_of_a_rule_that_lasts_and_of_no_block() {
        let mut compiled = compiled(&["192.0.2.0/24"], &[]);
        let entries = compiled.databases.get_mut("orders").unwrap();
        entries.rules[0].1 = Some(BootTime(MARGIN.as_nanos() as u64));
        let lasting = ["198.51.100.0/25", "203.0.113.0/24"].map(|net| net.parse().unwrap());
        let key = RuleKey::Temporary(lasting[0]);
        entries.add(key, Some(BootTime(u64::MAX)), [Prefixes::shared(lasting)]);
        let block = "198.51.100.0/24".parse().unwrap();
        entries.add(RuleKey::Block(block), None, [Prefixes::shared([block])]);
        let probes = probes(&compiled, BootTime(0), 0);
        let mut inside = probes.iter().filter(|probe| probe.allowed);
        assert_eq!(
            inside.next().unwrap().source,
            IpAddr::from([203, 0, 113, 0])
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
