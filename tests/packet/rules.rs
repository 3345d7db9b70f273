//! Which sources the rules allow, at which port.

use std::net::Ipv4Addr;

use filter_common::{
    Reason::{Allowed, BadSource, NotAllowed},
    bloom_place,
};
use filter_tests::{
    frames::{DECOY_PORT, Protocol},
    loaded::Loaded,
};

use crate::verdicts::{
    FOREIGNERS, LOCAL4, LOCAL6, ORDERS, check, dedicated, from, judged, other, packet,
};

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

/// Where a line of the Bloom filter has no room for the surroundings of its prefixes, what it leaves out is not denied.
#[test]
fn source_is_allowed_where_words_of_the_bloom_filter_are_crowded() {
    let in_one_line = |source: &u32| bloom_place(source.to_be(), true).0 == 7;
    let sources = (0..1 << 21).map(|n: u32| 20 << 24 | n << 7 | 77);
    let sources: Vec<u32> = sources.filter(in_one_line).collect();
    assert!(sources.len() > 200);
    let mut policy = "interfaces: [eth0]\ndatabases:\n".to_owned();
    let chunks: Vec<_> = (6000..).zip(sources.chunks(30)).collect();
    for (port, sources) in &chunks {
        let rule = |&source: &u32| format!("{{cidr: {}/32}}", Ipv4Addr::from(source));
        let rules: Vec<_> = sources.iter().map(rule).collect();
        let rules = rules.join(", ");
        policy += &format!(
            "  - {{name: d{port}, port: {port}, model: dedicated, force_tls: false, rules: [{rules}]}}\n"
        );
    }
    let mut loaded = Loaded::new(&policy);
    for (port, sources) in chunks {
        for &source in sources {
            // Beside it, in another /29.
            for (source, reason) in [(source, Allowed), (source ^ 32, NotAllowed)] {
                let source = Ipv4Addr::from(source).to_string();
                let frame = packet(&source, LOCAL4, Protocol::Tcp, port).frame();
                let expected = judged(&format!("d{port}"), reason);
                check(&mut loaded, &source, &frame, expected);
            }
        }
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
