//! Databases that share a port, or are monitored.

use filter_common::Reason::{Allowed, BadSource, Destination, NotAllowed, Truncated, VlanTags};
use filter_tests::{
    frames::{self, DESTINATION_OPTIONS, Protocol, VLAN},
    loaded::Loaded,
};

use crate::verdicts::{
    FOREIGNERS, FRIENDS, ORDERS, check, from, judged, monitored, other, packet, unclear,
};

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
