//! The delivery oracle: unfiltered Linux says which hostile frames it delivers to the port. With
//! the filter on, none of them may arrive from a source that is not allowed, and all from one that
//! is.
//! Linux is the reference, not anybody's idea of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket},
};

use filter_common::Protocol;
use filter_tests::{
    frames::{self, Addressing, Packet, Plan, Rng},
    net::{
        ALLOWED4, ALLOWED6, DB_MAC, DB4, DB6, DENIED4, DENIED6, Net, OTHER_DB4, OTHER_DB6,
        Protected, Wire, addressing, dedicated, policy, wait_until,
    },
};
use nix::sys::socket::{setsockopt, sockopt};

const PORT: u16 = 5432;
const ALLOWED: [&str; 2] = ["203.0.113.10/32", "2001:db8::10/128"];
/// Random plans of each address family and protocol.
const RANDOM: usize = 800;
const SEED: u64 = 20_260_731;

/// Plans by id. The lower half of an id is the plan's number, the same in every round; the upper
/// half is the round's.
type Plans = BTreeMap<u32, Plan>;

/// A database host that is as lenient as its settings allow, with sockets that record what arrives.
struct Stand {
    net: Net,
    wire: Wire,
    datagrams: Vec<UdpSocket>,
    _listeners: Vec<TcpListener>,
}

impl Stand {
    /// The sockets are at these local addresses.
    fn new(name: &str, addresses: &[IpAddr]) -> Self {
        let net = Net::new(name);
        net.fix_neighbours();
        for conf in ["all", "eth0"] {
            let settings = [
                ("ipv4", "accept_local"),
                ("ipv4", "route_localnet"),
                ("ipv4", "accept_source_route"),
                ("ipv6", "accept_source_route"),
                ("ipv6", "seg6_enabled"),
                ("ipv6", "rpl_seg_enabled"),
            ];
            let settings = settings.map(|(family, name)| format!("{family}/conf/{conf}/{name}"));
            net.db
                .sysctl(&settings.each_ref().map(|name| (name.as_str(), 1)));
        }
        net.db.sysctl(&[
            ("ipv4/conf/eth0/rp_filter", 0),
            // Plans must not get in each other's way: as many are reassembled at once as there are,
            // what is left over goes soon, and a SYN is answered once.
            ("ipv4/ipfrag_max_dist", 0),
            ("ipv4/ipfrag_time", 1),
            ("ipv6/ip6frag_time", 1),
            ("ipv4/tcp_synack_retries", 0),
            ("ipv4/tcp_max_syn_backlog", 65_535),
            ("core/somaxconn", 65_535),
        ]);
        let datagrams = addresses.iter().map(|&address| {
            let address = SocketAddr::new(address, PORT);
            let socket = net.db.run(|| UdpSocket::bind(address).unwrap());
            setsockopt(&socket, sockopt::RcvBufForce, &(64 << 20)).unwrap();
            socket.set_nonblocking(true).unwrap();
            socket
        });
        Self {
            wire: net.wire(),
            datagrams: datagrams.collect(),
            _listeners: addresses
                .iter()
                .map(|&at| net.listen_at(at, PORT))
                .collect(),
            net,
        }
    }

    /// Sends plans, and returns the numbers of those that were delivered.
    fn deliver(&self, plans: &Plans) -> BTreeSet<u32> {
        let mut delivered = BTreeSet::new();
        let frames: Vec<_> = plans.values().map(|plan| &plan.frames).collect();
        // A veth's receive queue holds 256 frames.
        for batch in frames.chunks(16) {
            for frame in batch.iter().copied().flatten() {
                self.wire.send(frame);
            }
            self.net.settle();
            self.collect(&mut delivered);
        }
        // What is left over of fragments would complete later ones.
        assert!(
            wait_until(|| self.fragments() == 0),
            "fragments are not forgotten"
        );
        self.collect(&mut delivered);
        assert!(
            delivered.iter().all(|id| plans.contains_key(id)),
            "an unknown id arrived"
        );
        delivered.into_iter().map(number).collect()
    }

    /// Packets whose fragments the host still waits for.
    fn fragments(&self) -> u32 {
        let text = self.net.db.run(|| {
            ["sockstat", "sockstat6"]
                .map(|name| fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap())
        });
        let lines = text.iter().flat_map(|text| text.lines());
        let counts = lines.filter_map(|line| {
            let (name, rest) = line.split_once(": inuse ")?;
            let count = rest.split(' ').next()?;
            name.starts_with("FRAG")
                .then(|| count.parse::<u32>().unwrap())
        });
        counts.sum()
    }

    fn collect(&self, delivered: &mut BTreeSet<u32>) {
        let mut datagram = [0; 2048];
        for socket in &self.datagrams {
            while let Ok(length) = socket.recv(&mut datagram) {
                let id = datagram[..length].first_chunk();
                delivered.insert(u32::from_be_bytes(*id.expect("a datagram holds an id")));
            }
        }
        while let Some(frame) = self.wire.receive() {
            delivered.extend(syn_ack(&frame));
        }
    }

    /// The same, where those of `expected` that did not arrive are sent again: loss is no verdict.
    fn deliver_surely(&self, plans: &Plans, expected: &BTreeSet<u32>) -> BTreeSet<u32> {
        let mut delivered = self.deliver(plans);
        for _ in 0..3 {
            let mut missing = plans.clone();
            missing.retain(|id, _| {
                let number = number(*id);
                expected.contains(&number) && !delivered.contains(&number)
            });
            if missing.is_empty() {
                break;
            }
            delivered.extend(self.deliver(&missing));
        }
        delivered
    }

    /// What unfiltered Linux delivers.
    fn control(&self, plans: &Plans) -> BTreeSet<u32> {
        let first = self.deliver(plans);
        &first | &self.deliver(plans)
    }

    fn protect(&mut self, mode: &str, allowed: &[&str], addresses: &[IpAddr]) {
        let local = |protected: Protected| protected.at(addresses);
        self.net.watch(&[
            local(Protected::tcp(PORT, allowed)),
            local(Protected::udp(PORT, allowed)),
        ]);
        let mut local = String::new();
        if !addresses.is_empty() {
            let addresses = addresses.iter().map(|address| format!("'{address}'"));
            local = format!("addresses: [{}]", addresses.collect::<Vec<_>>().join(", "));
        }
        self.net.write_policy(&policy(
            "eth0",
            mode,
            &[
                dedicated("orders", PORT, allowed, &local),
                dedicated("names", PORT, allowed, &format!("protocol: udp, {local}")),
            ],
        ));
        self.net.start();
        let status = self.net.agent_json(&["status"]);
        assert_eq!(status["interfaces"][0]["mode"], mode);
    }
}

fn number(id: u32) -> u32 {
    id & 0xffff
}

/// The sequence number of the SYN that this frame, if it is a SYN-ACK, answers.
fn syn_ack(frame: &[u8]) -> Option<u32> {
    let packet = frame.get(14..)?;
    let segment = match u16::from_be_bytes(*frame.get(12..)?.first_chunk()?) {
        frames::IPV4 if packet.get(9) == Some(&frames::TCP) => {
            packet.get(usize::from(packet[0] & 0xf) * 4..)?
        }
        frames::IPV6 if packet.get(6) == Some(&frames::TCP) => packet.get(40..)?,
        _ => return None,
    };
    let from_port = u16::from_be_bytes(*segment.first_chunk()?) == PORT;
    let answers = segment.get(13)? & 0x17 == 0x12;
    let acknowledged = u32::from_be_bytes(*segment.get(8..)?.first_chunk()?);
    (from_port && answers).then(|| acknowledged.wrapping_sub(1))
}

/// The list of threats and random plans, from an IPv4 and an IPv6 source. The same ones in every
/// round.
fn plans(round: u32, sources: [IpAddr; 2]) -> Plans {
    let mut plans = Plans::new();
    let mut rng = Rng::with_seed(SEED);
    let mut add = |about: &str, list: Vec<Plan>| {
        for plan in list {
            let name = format!("{about}: {}", plan.name);
            plans.insert(round << 16 | plans.len() as u32, Plan { name, ..plan });
        }
        round << 16 | plans.len() as u32
    };
    let mut next = round << 16;
    for source in sources {
        for protocol in Protocol::ALL {
            let addressing = addressing(source, PORT, protocol);
            let family = if source.is_ipv4() { 4 } else { 6 };
            let about = format!("{} over IPv{family}", protocol.name());
            next = add(&about, frames::threats(&addressing, next));
            next = add(&about, tunnels(&addressing, next));
            let ids = next..next + RANDOM as u32;
            let random = ids.map(|id| frames::hostile(&mut rng, &addressing, id));
            next = add(&format!("{about}, random"), random.collect());
        }
    }
    assert!(next < (round + 1) << 16, "more plans than a round has ids");
    plans
}

/// Packets that Linux unwraps without a tunnel device: behind a segment routing header (RFC 8754,
/// RFC 6554) with no segments left stands a whole packet.
fn tunnels(addressing: &Addressing, first_id: u32) -> Vec<Plan> {
    let IpAddr::V6(destination) = addressing.destination else {
        return Vec::new();
    };
    let tunnel = |(id, (route_type, next)): (u32, (u8, u8))| {
        let mut inner = addressing.clone();
        if next == 4 {
            inner.source = if addressing.source == IpAddr::V6(ALLOWED6) {
                ALLOWED4.into()
            } else {
                DENIED4.into()
            };
            inner.destination = DB4.into();
        }
        let mut outer = Packet::new(addressing, id);
        outer.inner = vec![frames::routing(route_type, 0, destination.octets())];
        outer.segment = Packet::new(&inner, id).frame()[14..].to_vec();
        let mut frame = outer.frame();
        frame[14 + 40] = next;
        Plan {
            name: format!("packet of protocol {next} behind a routing header of type {route_type}"),
            frames: vec![frame],
        }
    };
    (first_id..)
        .zip([(3, 41), (4, 41), (4, 4)])
        .map(tunnel)
        .collect()
}

/// Drops that the documentation announces, whoever sends such a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Announced {
    /// More than 4 VLAN tags.
    Tags,
    /// More than 8 extension headers.
    ExtensionHeaders,
    /// A first fragment that ends before the ports.
    CutChain,
    /// A packet inside a routing header.
    Tunnel,
    /// A source route to a port that is protected on some addresses only.
    SourceRoute,
}

fn announced(plan: &Plan, by_address: bool) -> Option<Announced> {
    plan.frames
        .iter()
        .find_map(|frame| announced_of(frame, by_address))
}

/// Reads a frame that Linux would deliver: bounds are not this function's concern.
fn announced_of(frame: &[u8], by_address: bool) -> Option<Announced> {
    let word = |at: usize| {
        frame
            .get(at..at + 2)
            .map(|word| u16::from_be_bytes([word[0], word[1]]))
    };
    let mut at = 12;
    let mut tags = 0;
    while matches!(word(at)?, frames::VLAN | frames::SERVICE_VLAN) {
        tags += 1;
        at += 4;
    }
    if tags > 4 {
        return Some(Announced::Tags);
    }
    let ip = at + 2;
    if word(at)? == frames::IPV4 {
        let header = frame.get(ip..ip + usize::from(frame.get(ip)? & 0xf) * 4)?;
        let routed = header[20.min(header.len())..]
            .iter()
            .any(|byte| [131, 137].contains(byte));
        return (by_address && routed).then_some(Announced::SourceRoute);
    }
    let end = ip + 40 + usize::from(word(ip + 4)?);
    let mut next = *frame.get(ip + 6)?;
    let mut at = ip + 40;
    let (mut routing_header, mut source_routed, mut first_fragment) = (false, false, false);
    for headers in 0.. {
        let length = match next {
            frames::HOP_BY_HOP | frames::ROUTING | frames::DESTINATION_OPTIONS => {
                (usize::from(*frame.get(at + 1)?) + 1) * 8
            }
            frames::AUTHENTICATION => (usize::from(*frame.get(at + 1)?) + 2) * 4,
            frames::FRAGMENT => 8,
            4 | 41 if routing_header => return Some(Announced::Tunnel),
            _ => return (by_address && source_routed).then_some(Announced::SourceRoute),
        };
        if headers == 8 {
            return Some(Announced::ExtensionHeaders);
        }
        let is_fragment = next == frames::FRAGMENT;
        if is_fragment {
            if word(at + 2)? & 0xfff8 != 0 {
                return None;
            }
            first_fragment |= word(at + 2)? & 1 != 0;
        }
        routing_header |= next == frames::ROUTING;
        source_routed |= next == frames::ROUTING && *frame.get(at + 3)? > 0;
        next = *frame.get(at)?;
        at += length;
        if first_fragment && at >= end {
            // Linux, too, ignores a first fragment that is empty.
            return (!is_fragment).then_some(Announced::CutChain);
        }
    }
    None
}

/// Every plan, first without the filter, then with it.
fn oracle(name: &str, mode: &str, addresses: &[IpAddr]) {
    let mut stand = Stand::new(name, &[Ipv6Addr::UNSPECIFIED.into()]);
    let denied = [DENIED4.into(), DENIED6.into()];
    let plan_of = plans(0, denied);
    let control = stand.control(&plans(1, denied));
    let list = |numbers: BTreeSet<u32>| -> String {
        let names = numbers
            .iter()
            .map(|number| format!("\n  {}", plan_of[number].name));
        names.collect()
    };

    // This proves nothing unless Linux delivers much, not all, and more than the filter reads.
    let random = |number: &&u32| plan_of[number].name.contains("random");
    let delivered = control.iter().filter(random).count();
    let all = plan_of.keys().filter(random).count();
    assert!(
        delivered > all / 5 && delivered < all * 4 / 5,
        "{delivered} of {all} random plans"
    );
    let is_announced = |number: &u32| announced(&plan_of[number], !addresses.is_empty());
    let dropped: BTreeSet<u32> = control
        .iter()
        .copied()
        .filter(|number| is_announced(number).is_some())
        .collect();
    let mut reasons: BTreeSet<Announced> = dropped.iter().filter_map(is_announced).collect();
    reasons.remove(&Announced::SourceRoute);
    use Announced::{CutChain, ExtensionHeaders, Tags, Tunnel};
    assert_eq!(
        reasons,
        BTreeSet::from([Tags, ExtensionHeaders, CutChain, Tunnel])
    );
    let deepest = control
        .iter()
        .any(|number| plan_of[number].name.contains(": 16 VID-0 tags"));
    assert!(deepest, "Linux no longer unwraps 16 tags");

    stand.protect(mode, &ALLOWED, addresses);
    let arrived = stand.deliver(&plans(2, denied));
    assert!(
        arrived.is_empty(),
        "arrived from a source that is not allowed:{}",
        list(arrived)
    );
    let allowed = plans(3, [ALLOWED4.into(), ALLOWED6.into()]);
    let expected = &control - &dropped;
    let delivered = stand.deliver_surely(&allowed, &expected);
    let missing = &expected - &delivered;
    assert!(
        missing.is_empty(),
        "dropped from an allowed source:{}",
        list(missing)
    );
    let unexpected = &dropped & &delivered;
    assert!(
        unexpected.is_empty(),
        "delivered beyond a bound:{}",
        list(unexpected)
    );
}

#[test]
fn native_mode_delivers_what_linux_delivers_from_allowed_sources_only() {
    oracle("oracle-native", "native", &[]);
}

#[test]
fn generic_mode_delivers_what_linux_delivers_from_allowed_sources_only() {
    oracle("oracle-generic", "generic", &[]);
}

#[test]
fn native_mode_with_addresses_delivers_what_linux_delivers_from_allowed_sources_only() {
    oracle(
        "oracle-native-addresses",
        "native",
        &[DB4.into(), DB6.into()],
    );
}

#[test]
fn generic_mode_with_addresses_delivers_what_linux_delivers_from_allowed_sources_only() {
    oracle(
        "oracle-generic-addresses",
        "generic",
        &[DB4.into(), DB6.into()],
    );
}

/// Why the filter may pass frames of any other type.
#[test]
fn linux_reads_ip_packets_in_frames_of_their_ethertype_only() {
    let stand = Stand::new("ethertypes", &[Ipv6Addr::UNSPECIFIED.into()]);
    let mut plans = Plans::new();
    for ethertype in 0..=u16::MAX {
        let id = u32::from(ethertype);
        let mut packet = Packet::new(&addressing(DENIED4.into(), PORT, Protocol::Udp), id);
        packet.ethertype = Some(ethertype);
        let mut frame = packet.frame();
        if ethertype < 0x600 {
            // A length: LLC and SNAP (RFC 1042) say what follows.
            frame.splice(14..14, [0xaa, 0xaa, 3, 0, 0, 0, 8, 0]);
        }
        let name = format!("ethertype {ethertype:#06x}");
        plans.insert(
            id,
            Plan {
                name,
                frames: vec![frame],
            },
        );
    }
    let delivered = stand.control(&plans);
    assert_eq!(delivered, BTreeSet::from([u32::from(frames::IPV4)]));
}

/// Packets between every two of these addresses.
fn between(round: u32, sources: &[&str], destinations: &[&str]) -> Plans {
    let mut plans = Plans::new();
    for protocol in Protocol::ALL {
        for source in sources {
            for destination in destinations {
                let mut addressing = addressing(source.parse().unwrap(), PORT, protocol);
                addressing.destination = destination.parse().unwrap();
                addressing.destination_mac = match addressing.destination {
                    IpAddr::V4(to) if to.is_multicast() => [1, 0, 0x5e, 0, 0, 1],
                    IpAddr::V4(to) if to.octets()[3] == 255 => [0xff; 6],
                    IpAddr::V6(to) if to.is_multicast() => [0x33, 0x33, 0, 0, 0, 1],
                    _ => DB_MAC,
                };
                if addressing.source.is_ipv4() != addressing.destination.is_ipv4() {
                    continue;
                }
                let id = round << 16 | plans.len() as u32;
                let frames = vec![Packet::new(&addressing, id).frame()];
                let name = format!("{} from {source} to {destination}", protocol.name());
                plans.insert(id, Plan { name, frames });
            }
        }
    }
    plans
}

fn impossible_sources_are_dropped(name: &str, mode: &str) {
    const SOURCES: [&str; 14] = [
        "0.0.0.0",
        "0.1.2.3",
        "127.0.0.1",
        "127.255.255.254",
        "224.0.0.1",
        "239.255.255.255",
        "255.255.255.255",
        "::",
        "::1",
        "::ffff:203.0.113.10",
        "::ffff:10.0.0.2",
        "ff02::1",
        "ff0e::1",
        "ff05::2",
    ];
    let mut stand = Stand::new(name, &[Ipv6Addr::UNSPECIFIED.into()]);
    let destinations = ["10.0.0.1", "127.0.0.1", "fd00::1"];
    let control = stand.control(&between(1, &SOURCES, &destinations));
    let names = between(0, &SOURCES, &destinations);
    let loopback = |number: &u32| names[number].name.contains("from 127.0.0.1");
    assert!(
        control.iter().any(loopback),
        "Linux refuses loopback sources by itself"
    );
    stand.protect(mode, &["0.0.0.0/0", "::/0"], &[]);
    let arrived = stand.deliver(&between(2, &SOURCES, &destinations));
    let arrived: Vec<&str> = arrived
        .iter()
        .map(|number| names[number].name.as_str())
        .collect();
    assert!(
        arrived.is_empty(),
        "arrived under a policy that allows everybody: {arrived:?}"
    );
}

#[test]
fn impossible_sources_are_dropped_in_native_mode() {
    impossible_sources_are_dropped("sources-native", "native");
}

#[test]
fn impossible_sources_are_dropped_in_generic_mode() {
    impossible_sources_are_dropped("sources-generic", "generic");
}

/// Sources that a lenient host accepts, among them its own addresses, and every destination by
/// which it takes a packet for itself. `control`: some that Linux does deliver.
fn no_odd_pair_reaches_the_port(
    name: &str,
    listen: IpAddr,
    sources: &[&str],
    destinations: &[&str],
    control: &[&str],
) {
    let mut stand = Stand::new(name, &[listen]);
    let names = between(0, sources, destinations);
    let delivered = stand.control(&between(1, sources, destinations));
    for expected in control {
        let is_delivered = delivered
            .iter()
            .any(|number| names[number].name == *expected);
        assert!(is_delivered, "Linux does not deliver {expected}");
    }
    stand.protect("native", &ALLOWED, &[]);
    let arrived = stand.deliver(&between(2, sources, destinations));
    let arrived: Vec<&str> = arrived
        .iter()
        .map(|number| names[number].name.as_str())
        .collect();
    assert!(
        arrived.is_empty(),
        "arrived from sources that are not allowed: {arrived:?}"
    );
}

#[test]
fn odd_ipv4_sources_and_destinations_do_not_reach_the_port() {
    no_odd_pair_reaches_the_port(
        "pairs-ipv4",
        Ipv4Addr::UNSPECIFIED.into(),
        &["10.0.0.1", "10.0.0.3", "10.0.0.2", "198.51.100.7"],
        &[
            "10.0.0.1",
            "10.0.0.3",
            "127.0.0.1",
            "10.0.0.255",
            "255.255.255.255",
            "224.0.0.1",
        ],
        &[
            "udp from 10.0.0.1 to 10.0.0.1",
            "udp from 198.51.100.7 to 127.0.0.1",
            "udp from 198.51.100.7 to 10.0.0.255",
            "udp from 198.51.100.7 to 255.255.255.255",
            "udp from 198.51.100.7 to 224.0.0.1",
        ],
    );
}

#[test]
fn odd_ipv6_sources_and_destinations_do_not_reach_the_port() {
    no_odd_pair_reaches_the_port(
        "pairs-ipv6",
        Ipv6Addr::UNSPECIFIED.into(),
        // The host's own; 6to4, NAT64, Teredo and IPv4-compatible, each of an allowed IPv4 source.
        &[
            "fd00::1",
            "fd00::3",
            "2001:db8:dead::7",
            "2002:cb00:710a::1",
            "64:ff9b::203.0.113.10",
            "2001:0:cb00:710a::1",
            "::203.0.113.10",
        ],
        &["fd00::1", "fd00::3", "ff02::1", "ff01::1", "ff05::1"],
        &[
            "udp from 2001:db8:dead::7 to fd00::3",
            "udp from 2001:db8:dead::7 to ff02::1",
            "udp from 2002:cb00:710a::1 to fd00::1",
            "udp from 64:ff9b::203.0.113.10 to fd00::1",
        ],
    );
}

/// Packets to an address that no database has, routed on to one that a database has.
fn routed_on(round: u32, sources: [IpAddr; 2]) -> Plans {
    let mut plans = Plans::new();
    for protocol in Protocol::ALL {
        for source in sources {
            for kind in [131, 137, 0, 2, 3, 4] {
                let addressing = addressing(source, PORT, protocol);
                let id = round << 16 | plans.len() as u32;
                let mut packet = Packet::new(&addressing, id);
                match (addressing.destination, kind >= 131) {
                    (IpAddr::V4(last), true) => {
                        packet.options = [&[kind, 7, 4], &last.octets()[..]].concat();
                        packet.addressing.destination = OTHER_DB4.into();
                    }
                    (IpAddr::V6(last), false) => {
                        let mut route = frames::routing(kind, 1, last.octets());
                        if kind == 4 {
                            // RFC 8754: the segments stand in reverse order, the first among them.
                            route.bytes.extend(OTHER_DB6.octets());
                            (route.bytes[1], route.bytes[4]) = (4, 1);
                        }
                        packet.inner = vec![route];
                        packet.addressing.destination = OTHER_DB6.into();
                    }
                    _ => continue,
                }
                let name = format!("{} from {source}, route {kind}", protocol.name());
                plans.insert(
                    id,
                    Plan {
                        name,
                        frames: vec![packet.frame()],
                    },
                );
            }
        }
    }
    plans
}

#[test]
fn source_routes_do_not_lead_around_the_addresses_of_a_database() {
    let addresses = [DB4.into(), DB6.into()];
    let mut stand = Stand::new("routes", &addresses);
    let denied = [DENIED4.into(), DENIED6.into()];
    let control = stand.control(&routed_on(1, denied));
    let names = routed_on(0, denied);
    for kind in [131, 137, 3, 4] {
        let of_kind = |number: &u32| names[number].name.ends_with(&format!("route {kind}"));
        assert!(
            control.iter().any(of_kind),
            "Linux does not follow routes of kind {kind}"
        );
    }
    stand.protect("native", &ALLOWED, &addresses);
    let arrived = stand.deliver(&routed_on(2, denied));
    let arrived: Vec<&str> = arrived
        .iter()
        .map(|number| names[number].name.as_str())
        .collect();
    assert!(
        arrived.is_empty(),
        "arrived from a source that is not allowed: {arrived:?}"
    );
}
