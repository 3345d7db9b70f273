//! The real agent between real clients and servers: who gets in, and who does not.

use std::net::{IpAddr, SocketAddr};

use filter_tests::net::{
    ALLOWED4, ALLOWED6, Connection, DB4, DB6, DENIED4, DENIED6, NEIGHBOURS, Net, Protected,
};

const PORT: u16 = 5432;
const DB: SocketAddr = SocketAddr::new(IpAddr::V4(DB4), PORT);
const DB_V6: SocketAddr = SocketAddr::new(IpAddr::V6(DB6), PORT);
const ALLOWED: [&str; 2] = ["203.0.113.10/32", "2001:db8::10/128"];

/// A policy for one interface, in native mode.
fn policy(databases: &str) -> String {
    format!("interfaces: [eth0]\nmode: native\ndatabases:\n{databases}")
}

/// A dedicated database `orders` at 5432, open to the allowed sources.
fn orders() -> String {
    policy(
        "  - name: orders
    port: 5432
    engine: postgresql
    model: dedicated
    force_tls: false
    rules:
      - cidr: 203.0.113.10/32
      - cidr: 2001:db8::10/128
",
    )
}

#[test]
fn tripwire_counts_what_is_not_filtered() {
    let net = Net::new("tripwire");
    let _listener = net.listen(PORT);
    net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
    assert_eq!(net.connect(ALLOWED4.into(), DB), Connection::Accepted);
    assert_eq!(net.connect(ALLOWED6.into(), DB_V6), Connection::Accepted);
    assert_eq!(net.tripwire(), 0);
    assert_eq!(net.connect(DENIED4.into(), DB), Connection::Accepted);
    assert!(net.tripwire() > 0);
    net.reset_tripwire();
    assert_eq!(net.connect(DENIED6.into(), DB_V6), Connection::Accepted);
    assert!(net.tripwire() > 0);
    net.reset_tripwire();
}

#[test]
fn tripwire_fails_the_test_that_sets_it_off() {
    let outcome = std::panic::catch_unwind(|| {
        let net = Net::new("tripwire-fails");
        let _listener = net.listen(PORT);
        net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
        net.connect(DENIED4.into(), DB);
    });
    let message = outcome.unwrap_err().downcast::<String>().unwrap();
    assert!(message.contains("tripwire: packets"), "{message}");
}

#[test]
fn allowed_sources_connect_and_others_get_no_answer() {
    let mut net = Net::new("allowed");
    let _listener = net.listen(PORT);
    let _other = net.listen(5433);
    net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
    net.write_policy(&orders());
    net.start();
    assert_eq!(net.connect(ALLOWED4.into(), DB), Connection::Accepted);
    assert_eq!(net.connect(ALLOWED6.into(), DB_V6), Connection::Accepted);
    assert_eq!(net.connect(DENIED4.into(), DB), Connection::Silence);
    assert_eq!(net.connect(DENIED6.into(), DB_V6), Connection::Silence);
    for source in NEIGHBOURS {
        let destination = if source.is_ipv4() { DB } else { DB_V6 };
        assert_eq!(net.connect(source, destination), Connection::Silence);
    }
    for (port, expected) in [(5433, Connection::Accepted), (5434, Connection::Refused)] {
        let v4 = net.connect(DENIED4.into(), SocketAddr::new(DB4.into(), port));
        let v6 = net.connect(DENIED6.into(), SocketAddr::new(DB6.into(), port));
        assert_eq!((v4, v6), (expected, expected), "port {port}");
    }
}
