use filter_common::Engine;

use super::*;

/// One database, `orders`, in slot 1, with a rule and a block.
fn text(line: &str) -> String {
    let name = |slot, text| Name::new(slot, text).unwrap();
    let image = Image {
        slots: vec![(1, name(0, "orders"))],
        rules: vec![
            (5, name(1, "203.0.113.0/24")),
            (6, name(1, "!203.0.113.7/32")),
        ],
        ..Image::default()
    };
    let interfaces = BTreeMap::from([(3, "eth0".to_owned())]);
    let names = Names {
        image: &image,
        interfaces: &interfaces,
    };
    read(line, Timestamp::UNIX_EPOCH, &names).unwrap().text
}

/// The words of an IPv4 source, its version, and an interface.
fn from(source: [u8; 4]) -> String {
    let [mapped, source] = [0xffff_u32.to_be(), u32::from_ne_bytes(source)];
    format!("0 0 {mapped} {source} 4 3")
}

#[test]
fn steps_on_a_packet_are_a_sentence() {
    let guard = Guard::new(1, false).0;
    let monitored = Guard::new(1, true).0;
    let forced = Guard::new(1, false).with_tls(Engine::Postgresql, false).0;
    let denied = from([198, 51, 100, 7]);
    let allowed = from([203, 0, 113, 7]);
    let blocked = RuleValue::blocked(6).0;
    let exempt = RuleValue::allowed(5).exempt().0;
    for (line, expected) in [
        (
            format!("packet {denied} 2 5432 {guard} 2 {NO_RULE} 2 1 1"),
            "IPv4 TCP to port 5432: database orders; source 198.51.100.7: no rule (near no allowed network); \
             dropped: not-allowed",
        ),
        (
            format!("packet {denied} 2 5432 {monitored} 3 {NO_RULE} 2 1 2"),
            "IPv4 TCP to port 5432: database orders; source 198.51.100.7: no rule (looked up); passed, since database \
             orders is only monitored; else dropped: not-allowed",
        ),
        (
            format!("packet {allowed} 3 53 {guard} 1 5 1 0 2"),
            "IPv4 UDP to port 53: database orders; source 203.0.113.7: allowed by 203.0.113.0/24 (as looked up before); \
             passed",
        ),
        (
            format!("packet {allowed} 2 5432 {forced} 3 5 1 0 2"),
            "IPv4 TCP to port 5432: database orders; source 203.0.113.7: allowed by 203.0.113.0/24 (looked up); TLS is \
             forced, which is judged at the socket; passed",
        ),
        (
            format!("packet {allowed} 2 5432 {forced} 3 {exempt} 1 0 2"),
            "IPv4 TCP to port 5432: database orders; source 203.0.113.7: allowed by 203.0.113.0/24, without TLS, too \
             (looked up); passed",
        ),
        (
            format!("packet {allowed} 2 5432 {guard} 3 {blocked} 2 13 1"),
            "IPv4 TCP to port 5432: database orders; source 203.0.113.7: block 203.0.113.7/32 (looked up); dropped: \
             blocked",
        ),
        (
            format!("packet {allowed} 2 5432 {guard} 1 9 1 0 2"),
            "IPv4 TCP to port 5432: database orders; source 203.0.113.7: allowed by 9, removed since (as looked up \
             before); passed",
        ),
        (
            format!("packet {denied} 2 22 0 0 0 0 0 2"),
            "IPv4 TCP to port 22: no database; source 198.51.100.7; passed",
        ),
        (
            format!("packet {denied} 1 0 0 0 0 0 0 2"),
            "IPv4, a later fragment, which has no port; source 198.51.100.7; passed",
        ),
        (
            format!("packet {denied} 4 0 0 0 0 2 4 1"),
            "IPv4, headers that do not lead to a port: it may be for any database; source 198.51.100.7; dropped: \
             bad-header",
        ),
        (
            format!("packet {allowed} 2 5432 {forced} 1 5 3 2 2"),
            "IPv4 TCP to port 5432: database orders; source 203.0.113.7: allowed by 203.0.113.0/24 (as looked up before); \
             its connection was refused, since it did not begin with TLS; passed on as a reset of the server's side",
        ),
    ] {
        assert_eq!(text(&line), expected, "{line}");
    }
}

#[test]
fn steps_on_a_segment_are_a_sentence() {
    let guard = Guard::new(1, false).with_tls(Engine::Redis, false).0;
    let allowed = from([203, 0, 113, 7]);
    let begin = "IPv4 TCP at the socket of database orders, port 6379; source 203.0.113.7";
    for (line, expected) in [
        ("1 0 0 0 1", "the handshake, without data; passed"),
        (
            "3 0 517 0 1",
            "bytes 0 to 516 of the connection: it begins with TLS; passed",
        ),
        (
            "2 0 14 9 0",
            "bytes 0 to 13 of the connection do not begin TLS; refused: not-tls",
        ),
        (
            "2 3 2 10 0",
            "bytes 3 to 4 of the connection cannot be judged; dropped until it comes again: tls-unclear",
        ),
        ("4 0 100 0 1", "past its beginning; passed"),
    ] {
        let line = format!("segment {allowed} 6379 {guard} {line}");
        assert_eq!(text(&line), format!("{begin}; {expected}"));
    }
}

#[test]
fn lines_of_another_form_are_nothing() {
    let image = Image::default();
    let interfaces = BTreeMap::new();
    let names = Names {
        image: &image,
        interfaces: &interfaces,
    };
    for line in [
        "",
        "packet",
        "packet 1 2 3",
        "segment x",
        "packet 0 0 0 0 4 3 9 1 1 1 1 1 1 1",
        "packet 0 0 0 0 4 3 2 1 1 1 1 2 99 1",
    ] {
        assert_eq!(read(line, Timestamp::UNIX_EPOCH, &names), None, "{line}");
    }
}
