//! Packets to the database `orders`, and the verdicts expected of them.

use filter_common::Reason::{self, Allowed};
use filter_tests::{
    frames::{Addressing, Packet, Protocol},
    loaded::Loaded,
    reference::Expected,
};

pub const LOCAL4: &str = "192.0.2.10";
pub const LOCAL6: &str = "2001:db8::10";

/// Allowed by `ORDERS` and not, of each family.
pub const FRIENDS: [&str; 2] = ["198.51.100.7", "2001:db8:1::7"];
pub const FOREIGNERS: [&str; 2] = ["203.0.113.7", "2001:db8:2::7"];

pub const ORDERS: &str = "
interfaces: [eth0]
databases:
  - name: orders
    port: 5432
    model: dedicated
    force_tls: false
    rules: [{cidr: 198.51.100.0/24}, {cidr: \"2001:db8:1::/48\"}]
";

pub fn dedicated(rules: &[&str]) -> String {
    let rules: Vec<_> = rules
        .iter()
        .map(|rule| format!("{{cidr: \"{rule}\"}}"))
        .collect();
    let base = ORDERS.rsplit_once("    rules").unwrap().0;
    format!("{base}    rules: [{}]\n", rules.join(", "))
}

pub fn from(source: &str) -> Packet {
    let local = if source.contains(':') { LOCAL6 } else { LOCAL4 };
    packet(source, local, Protocol::Tcp, 5432)
}

pub fn packet(source: &str, destination: &str, protocol: Protocol, port: u16) -> Packet {
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

pub fn other() -> Expected {
    Expected {
        pass: true,
        database: None,
        reason: None,
        monitored: false,
    }
}

pub fn judged(database: &str, reason: Reason) -> Expected {
    Expected {
        pass: reason == Allowed,
        database: Some(database.into()),
        reason: Some(reason),
        monitored: false,
    }
}

/// Dropped, on no database's account.
pub fn unclear(reason: Reason) -> Expected {
    Expected {
        database: None,
        ..judged("", reason)
    }
}

pub fn monitored(expected: Expected) -> Expected {
    Expected {
        pass: true,
        monitored: true,
        ..expected
    }
}

pub fn check(loaded: &mut Loaded, name: &str, frame: &[u8], expected: Expected) {
    assert_eq!(loaded.run(frame), expected, "{name}: {frame:02x?}");
    assert_eq!(
        loaded.expected(frame),
        expected,
        "{name}, by the reference: {frame:02x?}"
    );
}

/// Many frames that no counter is read between.
pub fn check_pass(loaded: &Loaded, name: &str, frame: &[u8], pass: bool) {
    let passed = loaded.filter.run_packet(frame).unwrap().passes();
    assert_eq!(passed, pass, "{name}: {frame:02x?}");
}
