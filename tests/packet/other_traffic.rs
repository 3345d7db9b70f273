//! Packets that are for no database.

use filter_common::Reason::Truncated;
use filter_tests::{
    frames::{self, Extension, HOP_BY_HOP, Protocol, TCP, UDP},
    loaded::Loaded,
};

use crate::verdicts::{
    FOREIGNERS, LOCAL4, LOCAL6, ORDERS, check, check_pass, dedicated, from, other, packet, unclear,
};

#[test]
fn nothing_is_dropped_where_nothing_is_guarded() {
    let mut loaded = Loaded::new("interfaces: [eth0]\ndatabases: []\n");
    let mut frames = 0;
    for source in FOREIGNERS {
        for protocol in Protocol::ALL {
            let local = if source.contains(':') { LOCAL6 } else { LOCAL4 };
            let addressing = packet(source, local, protocol, 5432).addressing;
            for plan in frames::threats(&addressing, 0) {
                for frame in plan.frames {
                    check_pass(&loaded, &plan.name, &frame, true);
                    frames += 1;
                }
            }
        }
    }
    assert!(frames > 2500, "{frames}");
    assert_eq!(loaded.counted(), Default::default());
}

#[test]
fn segment_without_ports_passes_where_its_protocol_is_not_guarded() {
    let mut loaded = Loaded::new(ORDERS);
    for source in FOREIGNERS {
        for (number, expected) in [(TCP, unclear(Truncated)), (UDP, other())] {
            let mut packet = from(source);
            packet.segment.truncate(3);
            packet.protocol = Some(number);
            check(
                &mut loaded,
                &format!("protocol {number}"),
                &packet.frame(),
                expected,
            );
        }
    }
}

#[test]
fn other_traffic_passes_uncounted() {
    let mut loaded = Loaded::new(&dedicated(&[]));
    let with = |source: &str, destination: &str, number: u8, body: &[u8]| {
        let mut packet = packet(source, destination, Protocol::Udp, 9);
        packet.protocol = Some(number);
        packet.segment = body.to_vec();
        packet
    };
    let raw = |ethertype: u16, body: &[u8]| {
        let mut frame = from(FOREIGNERS[0]).frame();
        frame.truncate(12);
        frame.extend(ethertype.to_be_bytes());
        frame.extend(body);
        frame
    };
    let udp = |source: &str, destination: &str, port| {
        packet(source, destination, Protocol::Udp, port).frame()
    };
    let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 1];
    arp.extend([0; 20]);
    let mut mld = packet("fe80::1", "ff02::16", Protocol::Udp, 9);
    mld.inner = vec![
        Extension {
            kind: HOP_BY_HOP,
            bytes: vec![0, 0, 5, 2, 0, 0, 1, 0],
        },
        Extension {
            kind: 58,
            bytes: vec![0; 28],
        },
    ];
    // An error quotes the packet that it answers: not a packet to the port quoted.
    let quoted = from(FOREIGNERS[0]).frame()[14..42].to_vec();
    let too_big = [vec![3, 4, 0, 0, 0, 0, 5, 120], quoted.clone()].concat();
    let too_big6 = [vec![2, 0, 0, 0, 0, 0, 5, 0], quoted].concat();
    let echo = with(FOREIGNERS[0], LOCAL4, 1, &[8, 0, 0, 0, 0, 1, 0, 1]);
    let mut broken_echo = echo.clone();
    broken_echo.length = Some(1500);
    let mut table = vec![
        ("ARP", raw(0x0806, &arp)),
        ("LLDP", raw(0x88cc, &[2, 7, 4, 2, 0, 0, 0, 0, 1])),
        ("spanning tree", raw(38, &[0x42, 0x42, 3, 0, 0, 0, 0, 0])),
        ("SNAP", raw(44, &[0xaa, 0xaa, 3, 0, 0, 0, 8, 0, 0x45, 0])),
        ("PPPoE", raw(0x8864, &[0x11, 0, 0, 1, 0, 2, 0, 0x21])),
        ("MPLS", raw(0x8847, &[0, 0, 0x11, 0xff, 0x45, 0])),
        ("frame without a body", raw(0x0806, &[])),
        ("echo", echo.frame()),
        ("echo longer than its frame", broken_echo.frame()),
        (
            "fragmentation needed",
            with(FOREIGNERS[0], LOCAL4, 1, &too_big).frame(),
        ),
        (
            "IGMP",
            with("192.0.2.1", "224.0.0.22", 2, &[0x22, 0, 0, 0, 0, 0, 0, 0]).frame(),
        ),
        ("IPIP", with(FOREIGNERS[0], LOCAL4, 4, &[0x45; 40]).frame()),
        ("GRE", with(FOREIGNERS[0], LOCAL4, 47, &[0; 24]).frame()),
        ("ESP", with(FOREIGNERS[0], LOCAL4, 50, &[7; 24]).frame()),
        (
            "SCTP",
            with(FOREIGNERS[0], LOCAL4, 132, &[0x15, 0x38, 0x15, 0x38]).frame(),
        ),
        (
            "neighbour solicitation",
            with("fe80::1", "ff02::1:ff00:10", 58, &[135; 24]).frame(),
        ),
        (
            "neighbour advertisement",
            with("fe80::1", LOCAL6, 58, &[136; 24]).frame(),
        ),
        (
            "duplicate address detection",
            with("::", "ff02::1:ff00:10", 58, &[135; 24]).frame(),
        ),
        (
            "router advertisement",
            with("fe80::1", "ff02::1", 58, &[134; 16]).frame(),
        ),
        (
            "packet too big",
            with(FOREIGNERS[1], LOCAL6, 58, &too_big6).frame(),
        ),
        ("MLD report", mld.frame()),
        ("DHCP", udp("0.0.0.0", "255.255.255.255", 67)),
        ("DHCP answer", udp("192.0.2.1", LOCAL4, 68)),
        ("DHCPv6", udp("fe80::1", "ff02::1:2", 547)),
        ("VXLAN", udp(FOREIGNERS[0], LOCAL4, 4789)),
    ];
    for source in FOREIGNERS {
        let local = if source.contains(':') { LOCAL6 } else { LOCAL4 };
        let mut answer = packet(source, local, Protocol::Udp, 40000);
        answer.segment.resize(4000, 0);
        for frame in answer.fragments(&answer.split(&[1448, 2896])) {
            table.push(("fragment of a DNS answer", frame));
        }
        table.push((
            "other port",
            packet(source, local, Protocol::Tcp, 22).frame(),
        ));
    }
    for (name, frame) in table {
        check(&mut loaded, name, &frame, other());
    }
}
