//! One packet, one verdict: tables for the shipped program. Each is checked against the reference
//! too, so that neither of the two is taken at its word.

use filter_common::Reason::{self, *};
use filter_tests::{
    frames::{
        self, AUTHENTICATION, Addressing, DECOY_PORT, DESTINATION_OPTIONS, Extension, HOP_BY_HOP,
        IPV4, IPV6, MORE, Packet, Piece, Protocol, SEGMENT, SERVICE_VLAN, TCP, UDP, VLAN,
    },
    loaded::Loaded,
    reference::Expected,
};

const LOCAL4: &str = "192.0.2.10";
const LOCAL6: &str = "2001:db8::10";

/// Allowed by `ORDERS` and not, of each family.
const FRIENDS: [&str; 2] = ["198.51.100.7", "2001:db8:1::7"];
const FOREIGNERS: [&str; 2] = ["203.0.113.7", "2001:db8:2::7"];

const ORDERS: &str = "
interfaces: [eth0]
databases:
  - name: orders
    port: 5432
    model: dedicated
    force_tls: false
    rules: [{cidr: 198.51.100.0/24}, {cidr: \"2001:db8:1::/48\"}]
";

fn dedicated(rules: &[&str]) -> String {
    let rules: Vec<_> = rules
        .iter()
        .map(|rule| format!("{{cidr: \"{rule}\"}}"))
        .collect();
    let base = ORDERS.rsplit_once("    rules").unwrap().0;
    format!("{base}    rules: [{}]\n", rules.join(", "))
}

fn from(source: &str) -> Packet {
    let local = if source.contains(':') { LOCAL6 } else { LOCAL4 };
    packet(source, local, Protocol::Tcp, 5432)
}

fn packet(source: &str, destination: &str, protocol: Protocol, port: u16) -> Packet {
    let addressing = Addressing {
        source_mac: [2, 0, 0, 0, 0, 1],
        destination_mac: [2, 0, 0, 0, 0, 2],
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
        source_port: 40000,
        destination_port: port,
        protocol,
    };
    Packet::new(&addressing, 1)
}

fn other() -> Expected {
    Expected {
        pass: true,
        database: None,
        reason: None,
        monitored: false,
    }
}

fn judged(database: &str, reason: Reason) -> Expected {
    Expected {
        pass: reason == Allowed,
        database: Some(database.into()),
        reason: Some(reason),
        monitored: false,
    }
}

/// Dropped, on no database's account.
fn unclear(reason: Reason) -> Expected {
    Expected {
        database: None,
        ..judged("", reason)
    }
}

fn monitored(expected: Expected) -> Expected {
    Expected {
        pass: true,
        monitored: true,
        ..expected
    }
}

fn check(loaded: &mut Loaded, name: &str, frame: &[u8], expected: Expected) {
    assert_eq!(loaded.run(frame), expected, "{name}: {frame:02x?}");
    assert_eq!(
        loaded.expected(frame),
        expected,
        "{name}, by the reference: {frame:02x?}"
    );
}

/// Many frames that no counter is read between.
fn check_pass(loaded: &Loaded, name: &str, frame: &[u8], pass: bool) {
    let passed = loaded.filter.run_packet(frame).unwrap().passes();
    assert_eq!(passed, pass, "{name}: {frame:02x?}");
}

#[test]
fn prefix_allows_from_its_first_to_its_last_address() {
    let table: [(&[&str], &[&str], &[&str]); 19] = [
        (&[], &[], &["1.0.0.0", "198.51.100.7", "2001:db8::1"]),
        (
            &["0.0.0.0/0"],
            &[
                "1.0.0.0",
                "126.255.255.255",
                "128.0.0.0",
                "223.255.255.255",
                "255.255.255.254",
            ],
            &["::2", "2001:db8::1", "2000::", "fe80::1"],
        ),
        (
            &["0.0.0.0/1"],
            &["1.0.0.0", "64.0.0.0", "126.255.255.255"],
            &["128.0.0.0", "192.0.2.1"],
        ),
        (
            &["128.0.0.0/1"],
            &["128.0.0.0", "255.255.255.254"],
            &["126.255.255.255", "1.0.0.0"],
        ),
        (
            &["0.0.0.0/1", "128.0.0.0/1"],
            &["1.0.0.0", "126.255.255.255", "128.0.0.0", "255.255.255.254"],
            &["2001:db8::1"],
        ),
        (
            &["10.0.0.0/8"],
            &["10.0.0.0", "10.1.2.3", "10.255.255.255"],
            &["9.255.255.255", "11.0.0.0", "138.0.0.0"],
        ),
        (
            &["192.0.2.0/24"],
            &["192.0.2.0", "192.0.2.77", "192.0.2.255"],
            &["192.0.1.255", "192.0.3.0", "2.0.192.1"],
        ),
        (
            &["192.0.2.6/31"],
            &["192.0.2.6", "192.0.2.7"],
            &["192.0.2.5", "192.0.2.8"],
        ),
        (
            &["192.0.2.6/32"],
            &["192.0.2.6"],
            &["192.0.2.5", "192.0.2.7", "192.0.2.134"],
        ),
        (
            &["10.0.0.0/8", "10.1.0.0/16", "10.1.2.3/32"],
            &[
                "10.0.0.0",
                "10.1.0.0",
                "10.1.2.2",
                "10.1.2.3",
                "10.1.2.4",
                "10.255.255.255",
            ],
            &["9.255.255.255", "11.0.0.0"],
        ),
        (
            &["10.0.0.0/9", "10.128.0.0/9"],
            &["10.127.255.255", "10.128.0.0"],
            &["9.255.255.255", "11.0.0.0"],
        ),
        (
            &["::/0"],
            &[
                "::2",
                "2001:db8::1",
                "feff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
            ],
            &["1.0.0.0", "198.51.100.7"],
        ),
        (
            &["8000::/1"],
            &["8000::", "fe80::1"],
            &["7fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "128.0.0.1"],
        ),
        (
            &["2001::/16"],
            &[
                "2001::",
                "2001:db8::1",
                "2001:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
            ],
            &["2000:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "2002::"],
        ),
        (
            &["2001:db8::/32"],
            &["2001:db8::", "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff"],
            &["2001:db7:ffff:ffff:ffff:ffff:ffff:ffff", "2001:db9::"],
        ),
        (
            &["2001:db8:0:5::/64"],
            &[
                "2001:db8:0:5::",
                "2001:db8:0:5:1::2",
                "2001:db8:0:5:ffff:ffff:ffff:ffff",
            ],
            &["2001:db8:0:4:ffff:ffff:ffff:ffff", "2001:db8:0:6::"],
        ),
        (
            &["2001:db8::6/127"],
            &["2001:db8::6", "2001:db8::7"],
            &["2001:db8::5", "2001:db8::8"],
        ),
        (
            &["2001:db8::6/128"],
            &["2001:db8::6"],
            &["2001:db8::5", "2001:db8::7", "2001:db8::8000:6"],
        ),
        (
            &["192.0.2.0/24", "2001:db8::/32"],
            &["192.0.2.0", "2001:db8::"],
            // An IPv4 address inside an IPv6 one is none.
            &["::192.0.2.1", "64:ff9b::c000:201", "2002:c000:201::1"],
        ),
    ];
    let mut loaded = Loaded::new(ORDERS);
    for (rules, allowed, denied) in table {
        loaded.apply(&dedicated(rules));
        for (sources, reason) in [(allowed, Allowed), (denied, NotAllowed)] {
            for source in sources {
                let name = format!("{source} under {rules:?}");
                check(
                    &mut loaded,
                    &name,
                    &from(source).frame(),
                    judged("orders", reason),
                );
            }
        }
    }
}

#[test]
fn every_kind_of_rule_allows_what_it_names_and_no_other_databases_sources() {
    let policy = "
interfaces: [eth0]
regions:
  office: {prefixes: [192.0.2.0/25, 192.0.2.192/26, \"2001:db8:5::/48\"]}
regional_network: [10.0.0.0/8, \"fd00::/8\"]
databases:
  - name: orders
    port: 5432
    model: dedicated
    force_tls: false
    cluster: [172.16.0.1/32, \"2001:db8:6::1/128\"]
    rules:
      - region: office
      - cidr: 198.51.100.0/24
      - {cidr: 203.0.113.0/24, expires: 2026-06-01T12:00:00Z}
      - {cidr: 203.0.112.0/24, expires: 2026-06-01T12:00:01Z}
  - name: archive
    port: 5433
    model: dedicated
    force_tls: false
    rules: [{cidr: 198.51.100.0/24}, {cidr: 198.51.101.0/24}]
  - {name: shop, port: 3306, model: shared, cluster: [172.16.0.2/32]}
  - {name: closed, ports: [1, 65535], model: dedicated, force_tls: false}
";
    let table = [
        ("192.0.2.0", 5432, Allowed),
        ("192.0.2.127", 5432, Allowed),
        ("192.0.2.128", 5432, NotAllowed),
        ("192.0.2.191", 5432, NotAllowed),
        ("192.0.2.192", 5432, Allowed),
        ("192.0.2.255", 5432, Allowed),
        ("192.0.3.0", 5432, NotAllowed),
        ("2001:db8:5::", 5432, Allowed),
        ("2001:db8:5:ffff:ffff:ffff:ffff:ffff", 5432, Allowed),
        ("2001:db8:4:ffff:ffff:ffff:ffff:ffff", 5432, NotAllowed),
        ("2001:db8:6::", 5432, NotAllowed),
        ("2001:db8:6::1", 5432, Allowed),
        ("2001:db8:6::2", 5432, NotAllowed),
        ("172.16.0.1", 5432, Allowed),
        ("172.16.0.0", 5432, NotAllowed),
        ("172.16.0.2", 5432, NotAllowed),
        ("10.1.2.3", 5432, NotAllowed),
        ("198.51.100.1", 5432, Allowed),
        ("198.51.101.1", 5432, NotAllowed),
        ("203.0.113.1", 5432, NotAllowed),
        ("203.0.112.1", 5432, Allowed),
        ("198.51.100.1", 5433, Allowed),
        ("198.51.101.1", 5433, Allowed),
        ("192.0.2.1", 5433, NotAllowed),
        ("172.16.0.1", 5433, NotAllowed),
        ("10.0.0.0", 3306, Allowed),
        ("10.255.255.255", 3306, Allowed),
        ("9.255.255.255", 3306, NotAllowed),
        ("11.0.0.0", 3306, NotAllowed),
        ("fd00::", 3306, Allowed),
        ("fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 3306, Allowed),
        ("fc00::1", 3306, NotAllowed),
        ("172.16.0.2", 3306, Allowed),
        ("172.16.0.1", 3306, NotAllowed),
        ("198.51.100.1", 3306, NotAllowed),
        ("198.51.100.1", 1, NotAllowed),
        ("10.1.2.3", 65535, NotAllowed),
        ("172.16.0.1", 65535, NotAllowed),
    ];
    let mut loaded = Loaded::new(policy);
    for (source, port, reason) in table {
        let local = if source.contains(':') { LOCAL6 } else { LOCAL4 };
        let frame = packet(source, local, Protocol::Tcp, port).frame();
        let database = match port {
            5432 => "orders",
            5433 => "archive",
            3306 => "shop",
            _ => "closed",
        };
        check(
            &mut loaded,
            &format!("{source} to {port}"),
            &frame,
            judged(database, reason),
        );
    }
}

#[test]
fn hit_counts_for_the_rule_with_the_longest_prefix() {
    let mut loaded = Loaded::new(&dedicated(&["10.0.0.0/8", "10.1.0.0/16", "fd00::/8"]));
    for source in [
        "10.0.0.1",
        "10.1.0.1",
        "10.1.255.255",
        "10.2.0.1",
        "10.255.0.1",
        "192.0.2.1",
        "fd00::1",
        "127.0.0.1",
    ] {
        loaded.run(&from(source).frame());
    }
    let hits = |rule: &str, packets: u64| (("orders".into(), rule.into()), packets);
    let expected = [
        hits("10.0.0.0/8", 3),
        hits("10.1.0.0/16", 2),
        hits("fd00::/8", 1),
    ];
    assert_eq!(loaded.filter.hits().unwrap(), expected.into());
}

#[test]
fn only_the_named_port_and_protocol_is_guarded() {
    let udp = "  - {name: metrics, port: 5433, protocol: udp, model: dedicated}\n";
    let mut loaded = Loaded::new(&format!("{ORDERS}{udp}"));
    let table = [
        (Protocol::Tcp, 5432, judged("orders", NotAllowed)),
        (Protocol::Udp, 5432, other()),
        (Protocol::Udp, 5433, judged("metrics", NotAllowed)),
        (Protocol::Tcp, 5433, other()),
        (Protocol::Tcp, 5431, other()),
        // Of the guarded port's bytes swapped.
        (Protocol::Tcp, 5432_u16.swap_bytes(), other()),
        (Protocol::Tcp, 0, other()),
        (Protocol::Udp, 65535, other()),
    ];
    for (protocol, port, expected) in table {
        for (source, local) in FOREIGNERS.into_iter().zip([LOCAL4, LOCAL6]) {
            let name = format!("{source} to {} {port}", protocol.name());
            let frame = packet(source, local, protocol, port).frame();
            check(&mut loaded, &name, &frame, expected.clone());
        }
    }
    // Where a packet comes from another's guarded port, it is an answer.
    let mut answer = packet(FOREIGNERS[0], LOCAL4, Protocol::Tcp, 40000);
    answer.segment[..2].copy_from_slice(&5432_u16.to_be_bytes());
    check(&mut loaded, "answer", &answer.frame(), other());
}

#[test]
fn source_that_no_host_has_is_dropped_whatever_the_rules_say() {
    let mut loaded = Loaded::new(&dedicated(&["0.0.0.0/0", "::/0"]));
    for source in [
        "0.0.0.0",
        "0.0.0.1",
        "0.255.255.255",
        "127.0.0.0",
        "127.0.0.1",
        "127.255.255.255",
        "224.0.0.0",
        "239.255.255.255",
        "255.255.255.255",
        "::",
        "::1",
        "ff00::",
        "ff02::1",
        "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
        "::ffff:0.0.0.0",
        "::ffff:198.51.100.7",
        "::ffff:255.255.255.255",
    ] {
        let mut packet = from(source);
        check(
            &mut loaded,
            source,
            &packet.frame(),
            judged("orders", BadSource),
        );
        packet.segment[2..4].copy_from_slice(&DECOY_PORT.to_be_bytes());
        check(&mut loaded, source, &packet.frame(), other());
    }
    for source in [
        "1.0.0.0",
        "126.255.255.255",
        "128.0.0.0",
        "223.255.255.255",
        "240.0.0.0",
        "255.255.255.254",
        "::2",
        "fe80::1",
        "feff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
        "::fffe:ffff:ffff",
        "::1:0:0:0",
        "::198.51.100.7",
        "64:ff9b::c633:6407",
        "2001:0:1::1",
    ] {
        check(
            &mut loaded,
            source,
            &from(source).frame(),
            judged("orders", Allowed),
        );
    }
}

#[test]
fn packet_that_is_cut_short_never_passes() {
    let mut loaded = Loaded::new(ORDERS);
    for source in FRIENDS.into_iter().chain(FOREIGNERS) {
        let ip_header = if source.contains(':') { 40 } else { 20 };
        let plain = from(source);
        let mut tagged = plain.clone();
        tagged.tags = vec![(SERVICE_VLAN, 0), (VLAN, 7)];
        let mut optioned = plain.clone();
        match ip_header {
            20 => optioned.options = vec![1; 40],
            _ => optioned.inner = vec![frames::options(HOP_BY_HOP, 1), frames::authentication(3)],
        }
        let reason = if FRIENDS.contains(&source) {
            Allowed
        } else {
            NotAllowed
        };
        for packet in [plain, tagged, optioned] {
            let frame = packet.frame();
            let start = 14 + 4 * packet.tags.len();
            for length in 14..frame.len() {
                let expected = match length < start + ip_header {
                    true => unclear(Truncated),
                    false => unclear(BadHeader),
                };
                let name = format!("{length} of {} bytes from {source}", frame.len());
                check(&mut loaded, &name, &frame[..length], expected);
            }
            check(&mut loaded, "whole", &frame, judged("orders", reason));
        }
    }
}

#[test]
fn segment_that_ends_before_its_ports_is_dropped() {
    let mut loaded = Loaded::new(ORDERS);
    for source in FRIENDS.into_iter().chain(FOREIGNERS) {
        let reason = if FRIENDS.contains(&source) {
            Allowed
        } else {
            NotAllowed
        };
        for length in 0..=SEGMENT {
            let mut packet = from(source);
            packet.segment.truncate(length);
            let expected = match length {
                0..=3 => unclear(Truncated),
                _ => judged("orders", reason),
            };
            let name = format!("segment of {length} bytes from {source}");
            check(&mut loaded, &name, &packet.frame(), expected.clone());
            // Padding is not part of the packet, whatever it looks like.
            let whole = from(source).segment;
            let padded = [packet.frame(), whole[length..].to_vec()].concat();
            check(&mut loaded, &format!("{name}, padded"), &padded, expected);
        }
    }
}

#[test]
fn ports_lie_where_the_header_length_says() {
    let mut loaded = Loaded::new(ORDERS);
    for words in 0..=4 {
        let mut packet = from(FOREIGNERS[0]);
        packet.header_words = Some(words);
        check(
            &mut loaded,
            &format!("IHL {words}"),
            &packet.frame(),
            unclear(BadHeader),
        );
    }
    let ports = |port: u16| [1234_u16.to_be_bytes(), port.to_be_bytes()].concat();
    for words in 5..=15 {
        let length = (words - 5) * 4;
        let option = |port| ports(port).into_iter().cycle().take(length).collect();
        let mut packet = from(FOREIGNERS[0]);
        packet.options = option(DECOY_PORT);
        let name = format!("IHL {words}, decoy at +20");
        check(
            &mut loaded,
            &name,
            &packet.frame(),
            judged("orders", NotAllowed),
        );
        let mut packet = from(FOREIGNERS[0]);
        packet.segment[..4].copy_from_slice(&ports(DECOY_PORT));
        packet.options = option(5432);
        let name = format!("IHL {words}, protected port at +20");
        check(&mut loaded, &name, &packet.frame(), other());
        for claimed in 5..words {
            let mut packet = from(FOREIGNERS[0]);
            packet.options = option(5432);
            packet.header_words = Some(claimed as u8);
            let name = format!("IHL {claimed} claimed, {words} written, port at +20");
            check(
                &mut loaded,
                &name,
                &packet.frame(),
                judged("orders", NotAllowed),
            );
        }
    }
    for version in (0..16).filter(|&version| version != 4) {
        let mut packet = from(FOREIGNERS[0]);
        packet.version = Some(version);
        check(
            &mut loaded,
            &format!("version {version}"),
            &packet.frame(),
            unclear(BadHeader),
        );
    }
    for version in (0..16).filter(|&version| version != 6) {
        let mut packet = from(FOREIGNERS[1]);
        packet.version = Some(version);
        check(
            &mut loaded,
            &format!("version {version}"),
            &packet.frame(),
            unclear(BadHeader),
        );
    }
}

#[test]
fn length_that_lies_is_no_way_around() {
    let mut loaded = Loaded::new(ORDERS);
    let segment = SEGMENT as u16;
    for padding in [0, 20] {
        for claimed in (0..=130).chain([1500, 0x7fff, 0x8000, 0xffff]) {
            let mut v4 = from(FOREIGNERS[0]);
            v4.length = Some(claimed);
            let expected = match claimed {
                0..=19 => unclear(BadHeader),
                20..=23 => unclear(Truncated),
                _ if claimed <= 20 + segment + padding => judged("orders", NotAllowed),
                _ => unclear(BadHeader),
            };
            let mut frame = v4.frame();
            frame.resize(frame.len() + usize::from(padding), 0);
            check(
                &mut loaded,
                &format!("total length {claimed}"),
                &frame,
                expected,
            );
            let mut v6 = from(FOREIGNERS[1]);
            v6.length = Some(claimed);
            let expected = match claimed {
                0..=3 => unclear(Truncated),
                _ if claimed <= segment + padding => judged("orders", NotAllowed),
                _ => unclear(BadHeader),
            };
            let mut frame = v6.frame();
            frame.resize(frame.len() + usize::from(padding), 0);
            check(
                &mut loaded,
                &format!("payload length {claimed}"),
                &frame,
                expected,
            );
        }
    }
    let mut jumbogram = from(FOREIGNERS[1]);
    let jumbo = vec![0, 0, 0xc2, 4, 0, 1, 0, 0];
    jumbogram.inner = vec![Extension {
        kind: HOP_BY_HOP,
        bytes: jumbo,
    }];
    jumbogram.length = Some(0);
    check(
        &mut loaded,
        "jumbogram",
        &jumbogram.frame(),
        judged("orders", NotAllowed),
    );
}

#[test]
fn of_all_ethertypes_only_ip_is_judged() {
    let mut loaded = Loaded::new(ORDERS);
    for source in FOREIGNERS {
        let mut frame = from(source).frame();
        let family = if source.contains(':') { IPV6 } else { IPV4 };
        for ethertype in 0..=u16::MAX {
            frame[12..14].copy_from_slice(&ethertype.to_be_bytes());
            let pass = ethertype != IPV4 && ethertype != IPV6;
            check_pass(
                &loaded,
                &format!("ethertype {ethertype:#06x}"),
                &frame,
                pass,
            );
        }
        frame[12..14].copy_from_slice(&family.to_be_bytes());
        assert_eq!(loaded.counted().into_values().sum::<u64>(), 2);
        check(
            &mut loaded,
            "own ethertype",
            &frame,
            judged("orders", NotAllowed),
        );
    }
}

#[test]
fn of_all_protocols_only_the_guarded_one_is_judged() {
    let mut loaded = Loaded::new(ORDERS);
    for source in FOREIGNERS {
        for number in 0..=255 {
            let mut packet = from(source);
            packet.protocol = Some(number);
            // What would be extension headers reads the ports as a header that ends in nothing.
            let expected = match number {
                TCP => judged("orders", NotAllowed),
                _ => other(),
            };
            let name = format!("protocol {number} from {source}");
            check(&mut loaded, &name, &packet.frame(), expected);
        }
    }
}

#[test]
fn tags_are_followed_to_the_bound_and_dropped_past_it() {
    let mut loaded = Loaded::new(ORDERS);
    let mixes = [
        [VLAN, VLAN],
        [SERVICE_VLAN, SERVICE_VLAN],
        [SERVICE_VLAN, VLAN],
    ];
    for (sources, reason) in [(FRIENDS, Allowed), (FOREIGNERS, NotAllowed)] {
        for source in sources {
            for mix in mixes {
                for depth in 0..=16 {
                    for vid in [0, 1, 0xefff] {
                        let mut packet = from(source);
                        let kinds = mix.iter().cycle().take(depth);
                        packet.tags = kinds.map(|&kind| (kind, vid)).collect();
                        let expected = match depth {
                            0..=4 => judged("orders", reason),
                            _ => unclear(VlanTags),
                        };
                        let name = format!("{depth} tags {mix:x?} from {source}");
                        check(&mut loaded, &name, &packet.frame(), expected);
                    }
                }
            }
            for kind in [0x9100, 0x9200, 0x88e7] {
                let mut packet = from(source);
                packet.tags = vec![(VLAN, 0), (kind, 0)];
                check(
                    &mut loaded,
                    &format!("tag {kind:#x}"),
                    &packet.frame(),
                    other(),
                );
            }
        }
    }
}

#[test]
fn extension_headers_are_followed_to_the_bound_and_dropped_past_it() {
    let mut loaded = Loaded::new(ORDERS);
    let local = [0; 16];
    let kinds = [
        frames::options(HOP_BY_HOP, 0),
        frames::options(DESTINATION_OPTIONS, 0),
        frames::options(DESTINATION_OPTIONS, 9),
        frames::routing(0, 0, local),
        frames::routing(2, 1, local),
        frames::routing(4, 0, local),
        frames::fragment(0, false, 1),
        frames::fragment(0, true, 1),
        frames::authentication(0),
        frames::authentication(3),
        frames::authentication(4),
    ];
    for (sources, reason) in [(FRIENDS, Allowed), (FOREIGNERS, NotAllowed)] {
        for depth in 0..=12 {
            let expected = match depth {
                0..=8 => judged("orders", reason),
                _ => unclear(ExtensionHeaders),
            };
            for extension in &kinds {
                let mut packet = from(sources[1]);
                packet.inner = vec![extension.clone(); depth];
                let name = format!("{depth} x {extension:?}");
                check(&mut loaded, &name, &packet.frame(), expected.clone());
                if extension.kind == AUTHENTICATION {
                    packet = from(sources[0]);
                    packet.inner = vec![extension.clone(); depth];
                    let name = format!("{depth} x {extension:?} over IPv4");
                    check(&mut loaded, &name, &packet.frame(), expected.clone());
                }
                for place in 0..depth {
                    let mut packet = from(sources[1]);
                    packet.inner = vec![frames::options(DESTINATION_OPTIONS, 1); depth];
                    packet.inner[place] = extension.clone();
                    let name = format!("{extension:?} at place {place} of {depth}");
                    check(&mut loaded, &name, &packet.frame(), expected.clone());
                }
            }
        }
    }
}

#[test]
fn chain_that_ends_in_no_segment_is_other_traffic() {
    let mut loaded = Loaded::new(ORDERS);
    for last in [frames::NO_NEXT, 58, 50, 47, 132, 135, 255] {
        let mut packet = from(FOREIGNERS[1]);
        packet.inner = vec![
            frames::options(DESTINATION_OPTIONS, 0),
            Extension {
                kind: last,
                bytes: vec![0; 8],
            },
        ];
        check(
            &mut loaded,
            &format!("ends in {last}"),
            &packet.frame(),
            other(),
        );
    }
    // Segment routing unwraps the packet inside behind the filter's back.
    for inside in [4, 41] {
        let mut packet = from(FOREIGNERS[1]);
        let bytes = from(FOREIGNERS[1]).frame()[14..].to_vec();
        packet.inner = vec![Extension {
            kind: inside,
            bytes,
        }];
        check(&mut loaded, "tunnel", &packet.frame(), other());
        packet.inner.insert(0, frames::routing(4, 0, [0; 16]));
        check(
            &mut loaded,
            "routed tunnel",
            &packet.frame(),
            unclear(ExtensionHeaders),
        );
    }
}

#[test]
fn header_chain_that_goes_on_in_the_padding_is_cut_short() {
    let mut loaded = Loaded::new(ORDERS);
    let padding = [frames::NO_NEXT, 0, 1, 4, 0, 0, 0, 0];
    // With how much of it has to be there to be followed.
    let kinds = [
        (4, frames::options(HOP_BY_HOP, 0)),
        (4, frames::options(DESTINATION_OPTIONS, 0)),
        (4, frames::routing(0, 0, [0; 16])),
        (4, frames::fragment(0, true, 1)),
        (2, frames::authentication(3)),
    ];
    for (needed, kind) in kinds {
        for length in 0..needed {
            let mut packet = from(FOREIGNERS[1]);
            packet.inner = vec![frames::options(DESTINATION_OPTIONS, 0), kind.clone()];
            packet.length = Some(8 + length as u16);
            let mut frame = packet.frame();
            frame.truncate(14 + 40 + 8 + length);
            frame.extend(padding.repeat(4));
            let name = format!("{length} bytes of {kind:?}");
            check(&mut loaded, &name, &frame, unclear(Truncated));
        }
    }
}

#[test]
fn first_fragment_is_judged_and_later_ones_pass() {
    let mut loaded = Loaded::new(ORDERS);
    for (sources, reason) in [(FRIENDS, Allowed), (FOREIGNERS, NotAllowed)] {
        for source in sources {
            for offset in [0, 1, 2, 3, 185, 4096, 8191] {
                for more in [false, true] {
                    for length in [0, 1, 3, 4, 8, 16, 24, SEGMENT] {
                        let packet = from(source);
                        let piece = Piece {
                            offset,
                            more,
                            bytes: packet.segment[..length].to_vec(),
                            next: None,
                        };
                        let expected = match (offset, length) {
                            (0, 0..=3) => unclear(Truncated),
                            (0, _) => judged("orders", reason),
                            _ => other(),
                        };
                        let name = format!("at {offset}, more {more}, {length} bytes, {source}");
                        check(&mut loaded, &name, &packet.fragment(&piece), expected);
                    }
                }
            }
        }
    }
    // Flags are no offset.
    for flags in [0x4000, 0x8000, 0xc000, MORE, 0xe000] {
        let mut packet = from(FOREIGNERS[0]);
        packet.flags_and_offset = flags;
        let name = format!("flags {flags:#06x}");
        check(
            &mut loaded,
            &name,
            &packet.frame(),
            judged("orders", NotAllowed),
        );
        packet.flags_and_offset |= 0x0001;
        check(&mut loaded, &name, &packet.frame(), other());
    }
}

/// Two databases at one port, by address.
const BY_ADDRESS: &str = "
interfaces: [eth0]
databases:
  - name: blue
    port: 5432
    addresses: [192.0.2.10, \"2001:db8::10\"]
    model: dedicated
    force_tls: false
    rules: [{cidr: 198.51.100.0/24}, {cidr: \"2001:db8:1::/48\"}]
  - name: green
    port: 5432
    addresses: [192.0.2.11, \"2001:db8::11\"]
    model: dedicated
    force_tls: false
    rules: [{cidr: 203.0.113.0/24}, {cidr: \"2001:db8:2::/48\"}]
  - name: lone
    port: 6379
    addresses: [192.0.2.10]
    model: dedicated
    force_tls: false
    rules: [{cidr: 198.51.100.0/24}]
";

#[test]
fn databases_that_share_a_port_are_told_apart_by_address() {
    let mut loaded = Loaded::new(BY_ADDRESS);
    let table = [
        (FRIENDS[0], "192.0.2.10", 5432, judged("blue", Allowed)),
        (FRIENDS[0], "192.0.2.11", 5432, judged("green", NotAllowed)),
        (
            FOREIGNERS[0],
            "192.0.2.10",
            5432,
            judged("blue", NotAllowed),
        ),
        (FOREIGNERS[0], "192.0.2.11", 5432, judged("green", Allowed)),
        (FRIENDS[1], "2001:db8::10", 5432, judged("blue", Allowed)),
        (
            FRIENDS[1],
            "2001:db8::11",
            5432,
            judged("green", NotAllowed),
        ),
        (
            FOREIGNERS[1],
            "2001:db8::10",
            5432,
            judged("blue", NotAllowed),
        ),
        (
            FOREIGNERS[1],
            "2001:db8::11",
            5432,
            judged("green", Allowed),
        ),
        ("127.0.0.1", "192.0.2.10", 5432, judged("blue", BadSource)),
        (FOREIGNERS[0], "192.0.2.12", 5432, other()),
        (FOREIGNERS[1], "2001:db8::12", 5432, other()),
        (FOREIGNERS[0], "192.0.2.10", 5433, other()),
        (
            FOREIGNERS[0],
            "192.0.2.10",
            6379,
            judged("lone", NotAllowed),
        ),
        (FRIENDS[0], "192.0.2.10", 6379, judged("lone", Allowed)),
        (FOREIGNERS[0], "192.0.2.11", 6379, other()),
        (FOREIGNERS[1], "2001:db8::10", 6379, other()),
        // For many hosts, so for which address is not to be told.
        (FRIENDS[0], "224.0.0.1", 5432, unclear(Destination)),
        (FRIENDS[0], "239.255.255.255", 5432, unclear(Destination)),
        (FRIENDS[0], "255.255.255.255", 5432, unclear(Destination)),
        (FRIENDS[1], "ff02::1", 5432, unclear(Destination)),
        (FRIENDS[1], "ff00::", 5432, unclear(Destination)),
        (FRIENDS[0], "224.0.0.1", 6379, judged("lone", Destination)),
        (FRIENDS[0], "223.255.255.255", 5432, other()),
        (FRIENDS[0], "240.0.0.0", 5432, other()),
        (FRIENDS[0], "224.0.0.1", 5433, other()),
    ];
    for (source, destination, port, expected) in table {
        let frame = packet(source, destination, Protocol::Tcp, port).frame();
        let name = format!("{source} to {destination} port {port}");
        check(&mut loaded, &name, &frame, expected);
    }
}

#[test]
fn source_route_to_a_port_that_depends_on_the_address_is_dropped() {
    let mut loaded = Loaded::new(BY_ADDRESS);
    let options: [(&str, &[u8], bool); 10] = [
        ("loose source route", &[131, 7, 4, 192, 0, 2, 11], true),
        ("strict source route", &[137, 7, 4, 192, 0, 2, 11], true),
        (
            "after one no-operation",
            &[1, 131, 7, 4, 192, 0, 2, 11],
            true,
        ),
        ("after two", &[1, 1, 137, 7, 4, 192, 0, 2, 11], true),
        ("after three", &[1, 1, 1, 131, 7, 4, 192, 0, 2, 11], true),
        (
            "at the end",
            &[&[1; 33][..], &[131, 7, 4, 192, 0, 2, 11]].concat(),
            true,
        ),
        ("in the last byte", &[&[1; 39][..], &[137]].concat(), true),
        ("record route", &[7, 7, 4, 0, 0, 0, 0], false),
        ("router alert", &[148, 4, 0, 0], false),
        (
            "neighbours of the numbers",
            &[130, 132, 136, 138, 3, 9],
            false,
        ),
    ];
    for (name, options, is_route) in options {
        for destination in ["192.0.2.10", "192.0.2.12"] {
            let mut packet = packet(FRIENDS[0], destination, Protocol::Tcp, 5432);
            packet.options = options.to_vec();
            let expected = match (is_route, destination) {
                (true, _) => unclear(Destination),
                (false, "192.0.2.10") => judged("blue", Allowed),
                (false, _) => other(),
            };
            check(
                &mut loaded,
                &format!("{name} to {destination}"),
                &packet.frame(),
                expected,
            );
        }
    }
    for route_type in [0, 2, 3, 4, 200] {
        for segments_left in [0, 1, 255] {
            let mut packet = packet(FRIENDS[1], "2001:db8::10", Protocol::Tcp, 5432);
            packet.inner = vec![
                frames::options(DESTINATION_OPTIONS, 0),
                frames::routing(route_type, segments_left, [0x20; 16]),
                frames::options(DESTINATION_OPTIONS, 0),
            ];
            let expected = match segments_left {
                0 => judged("blue", Allowed),
                _ => unclear(Destination),
            };
            let name = format!("routing type {route_type}, {segments_left} segments left");
            check(&mut loaded, &name, &packet.frame(), expected);
        }
    }
    // Where the address does not matter, neither does the route.
    let mut loaded = Loaded::new(ORDERS);
    for (source, reason) in [(FRIENDS[0], Allowed), (FOREIGNERS[0], NotAllowed)] {
        let mut packet = from(source);
        packet.options = vec![131, 7, 4, 192, 0, 2, 11];
        check(
            &mut loaded,
            source,
            &packet.frame(),
            judged("orders", reason),
        );
    }
}

#[test]
fn monitored_database_counts_what_it_would_drop_and_passes_it() {
    let monitor = format!("{ORDERS}    monitor: true\n");
    let mut loaded = Loaded::new(&monitor);
    let mut tagged = from(FOREIGNERS[0]);
    tagged.tags = vec![(VLAN, 0); 5];
    let frame = from(FOREIGNERS[0]).frame();
    let table = [
        (
            "friend",
            from(FRIENDS[0]).frame(),
            monitored(judged("orders", Allowed)),
        ),
        (
            "foreigner",
            frame.clone(),
            monitored(judged("orders", NotAllowed)),
        ),
        (
            "loopback",
            from("127.0.0.1").frame(),
            monitored(judged("orders", BadSource)),
        ),
        (
            "cut short",
            frame[..20].to_vec(),
            monitored(unclear(Truncated)),
        ),
        ("five tags", tagged.frame(), monitored(unclear(VlanTags))),
    ];
    for (name, frame, expected) in table {
        check(&mut loaded, name, &frame, expected);
    }
    // Next to one that enforces, what may be for either is dropped.
    let enforced = "  - {name: shop, port: 3306, model: shared}\n";
    loaded.apply(&format!("{monitor}{enforced}"));
    check(&mut loaded, "cut short", &frame[..20], unclear(Truncated));
    check(
        &mut loaded,
        "foreigner",
        &frame,
        monitored(judged("orders", NotAllowed)),
    );
    // Of another protocol, it does not matter.
    let enforced = "  - {name: metrics, port: 53, protocol: udp, model: dedicated}\n";
    loaded.apply(&format!("{monitor}{enforced}"));
    let mut short = from(FOREIGNERS[0]);
    short.segment.truncate(3);
    check(
        &mut loaded,
        "TCP without ports",
        &short.frame(),
        monitored(unclear(Truncated)),
    );
    check(&mut loaded, "cut short", &frame[..20], unclear(Truncated));
}

#[test]
fn one_monitored_database_does_not_open_the_port_that_it_shares() {
    let with = |blue: bool, green: bool| {
        let policy = BY_ADDRESS.replacen(
            "    port: 5432\n",
            &format!("    monitor: {blue}\n    port: 5432\n"),
            1,
        );
        let (head, tail) = policy.split_once("name: green\n").unwrap();
        format!("{head}name: green\n    monitor: {green}\n{tail}")
    };
    let mut loaded = Loaded::new(BY_ADDRESS);
    for (blue, green) in [(true, false), (false, true), (true, true), (false, false)] {
        loaded.apply(&with(blue, green));
        let mut routed = packet("192.0.2.200", "192.0.2.10", Protocol::Tcp, 5432);
        routed.options = vec![131, 7, 4, 192, 0, 2, 11];
        let multicast = packet("192.0.2.200", "224.0.0.1", Protocol::Tcp, 5432);
        for packet in [routed, multicast] {
            let expected = match (blue, green) {
                (true, true) => monitored(unclear(Destination)),
                _ => unclear(Destination),
            };
            let name = format!("monitor: blue {blue}, green {green}");
            check(&mut loaded, &name, &packet.frame(), expected);
        }
    }
}

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

#[test]
fn packet_in_more_than_one_buffer_is_judged_alike() {
    let mut loaded = Loaded::new(ORDERS);
    let sizes = [3000, 3466, 3480, 3500, 3520, 3600, 4096, 4200, 9000];
    for (sources, reason) in [(FRIENDS, Allowed), (FOREIGNERS, NotAllowed)] {
        for source in sources {
            for size in sizes {
                let mut packet = from(source);
                packet.segment.resize(size, 0);
                let expected = judged("orders", reason);
                check(
                    &mut loaded,
                    &format!("{size} from {source}"),
                    &packet.frame(),
                    expected,
                );
                packet.segment[2..4].copy_from_slice(&DECOY_PORT.to_be_bytes());
                check(
                    &mut loaded,
                    &format!("{size} to a decoy"),
                    &packet.frame(),
                    other(),
                );
                packet.length = Some(size as u16 + 100);
                let name = format!("{size} and 100 missing");
                check(&mut loaded, &name, &packet.frame(), unclear(BadHeader));
            }
        }
        // Longer than the field can say: segments that the network stack has joined.
        for source in sources {
            let mut packet = from(source);
            packet.length = Some(0);
            packet.segment.resize(66_000, 0);
            if source.contains(':') {
                packet.inner = vec![frames::options(HOP_BY_HOP, 0)];
            }
            let name = format!("66,000 bytes from {source}");
            check(
                &mut loaded,
                &name,
                &packet.frame(),
                judged("orders", reason),
            );
        }
        // The ports themselves lie in the second buffer, or across.
        for units in (40..=255).chain([255; 3]) {
            let mut packet = from(sources[1]);
            let long = frames::options(DESTINATION_OPTIONS, 255);
            packet.inner = vec![long, frames::options(DESTINATION_OPTIONS, units)];
            let name = format!("options of {units} units");
            check(
                &mut loaded,
                &name,
                &packet.frame(),
                judged("orders", reason),
            );
        }
    }
}

#[test]
fn every_threat_gets_the_verdict_of_the_reference() {
    let mut loaded = Loaded::new(&format!(
        "{ORDERS}  - {{name: metrics, port: 5432, protocol: udp, model: dedicated}}\n"
    ));
    for source in FRIENDS.into_iter().chain(FOREIGNERS) {
        for protocol in Protocol::ALL {
            let local = if source.contains(':') { LOCAL6 } else { LOCAL4 };
            let addressing = packet(source, local, protocol, 5432).addressing;
            for plan in frames::threats(&addressing, 0) {
                for frame in plan.frames {
                    let expected = loaded.expected(&frame);
                    check(&mut loaded, &plan.name, &frame, expected);
                }
            }
        }
    }
}

#[test]
fn every_way_to_cut_a_threat_short_gets_the_verdict_of_the_reference() {
    let loaded = Loaded::new(ORDERS);
    for source in FOREIGNERS {
        let addressing = from(source).addressing;
        for plan in frames::threats(&addressing, 0).into_iter().step_by(5) {
            for frame in plan.frames {
                for length in 14..=frame.len() {
                    let frame = &frame[..length];
                    let pass = loaded.expected(frame).pass;
                    check_pass(&loaded, &plan.name, frame, pass);
                }
            }
        }
    }
}
