//! What a trace prints of each kind of packet.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
};

use filter_common::Protocol;
use filter_tests::{
    frames::Packet,
    net::{
        ALLOWED4, ALLOWED6, DB4, DB6, DENIED4, DENIED6, Net, PATIENCE, Patience, Protected,
        addressing, bound, dedicated, policy, wait_until,
    },
};
use serde_json::{Value, json};

use crate::reader::Reader;

pub const PORT: u16 = 5432;
pub const ALLOWED: [&str; 2] = ["203.0.113.10/32", "2001:db8::10/128"];

pub fn db(port: u16) -> SocketAddr {
    SocketAddr::new(DB4.into(), port)
}

fn parts(line: &Value, fields: &[&str]) -> Value {
    fields.iter().map(|field| line[field].clone()).collect()
}

const VERDICT: [&str; 5] = ["source", "database", "rule", "reason", "passed"];

#[test]
fn verdicts_at_the_interface_are_told_with_their_reasons() {
    let names = dedicated("names", 5300, &ALLOWED, "protocol: udp");
    let orders = dedicated("orders", PORT, &ALLOWED, "");
    let late = dedicated("late", 5434, &[], "");
    let mut net = Net::enforcing(
        "trace-verdicts",
        &[Protected::tcp(PORT, &ALLOWED)],
        &policy("eth0", "native", &[names, orders, late]),
    );
    let _echo = net.echo(PORT);
    let _names = net.echo_datagrams(5300);
    net.agent_text(&["block", "names", "203.0.113.10", "--for", "1h"]);

    let mut allowed = Reader::start(&net, &["203.0.113.10"]);
    net.connect(ALLOWED4.into(), db(PORT));
    let line = allowed.wait_for_text("port 5432");
    assert_eq!(
        parts(&line, &VERDICT),
        json!(["203.0.113.10", "orders", "203.0.113.10/32", null, true])
    );
    assert_eq!(line["interface"], "eth0");
    assert_eq!(
        line["text"],
        "IPv4 TCP to port 5432: database orders; source 203.0.113.10: allowed by 203.0.113.10/32 (looked up); passed"
    );
    // Not the packets of a session that no database has, but its beginning.
    net.connect(ALLOWED4.into(), db(22));
    let line = allowed.wait_for_text("port 22");
    assert_eq!(
        line["text"],
        "IPv4 TCP to port 22: no database; source 203.0.113.10; passed"
    );
    assert!(!net.exchange(ALLOWED4.into(), db(5300), Patience::Short));
    let line = allowed.wait_for_text("port 5300");
    assert_eq!(
        parts(&line, &VERDICT),
        json!([
            "203.0.113.10",
            "names",
            "block 203.0.113.10/32",
            "blocked",
            false
        ])
    );
    assert_eq!(line["protocol"], "udp");
    // Others stay silent: what was sent before `port 22` would have been printed before that.
    net.connect(DENIED4.into(), db(PORT));
    net.connect(ALLOWED4.into(), db(23));
    allowed.wait_for_text("port 23");
    let of_others = |line: &&Value| line["source"] != "203.0.113.10";
    assert_eq!(allowed.taken.iter().find(of_others), None);
    allowed.interrupt();

    let mut denied = Reader::start(&net, &["198.51.100.0/24"]);
    net.connect(DENIED4.into(), db(PORT));
    let line = denied.wait_for_text("port 5432");
    assert_eq!(
        parts(&line, &VERDICT),
        json!(["198.51.100.7", "orders", null, "not-allowed", false])
    );
    assert_eq!(
        line["text"],
        "IPv4 TCP to port 5432: database orders; source 198.51.100.7: no rule (near no allowed network); dropped: \
         not-allowed"
    );
    // Until its rule ends.
    net.agent_text(&["allow", "late", "198.51.100.7", "--for", "1s"]);
    let mut knock = || {
        net.connect(DENIED4.into(), db(5434));
        denied.wait_for_text("port 5434")
    };
    assert_eq!(knock()["rule"], "temporary rule 198.51.100.7/32");
    assert!(wait_until(|| knock()["reason"] == "not-allowed"));
    denied.interrupt();

    let mut six = Reader::start(&net, &["2001:db8::/32", "--database", "orders"]);
    let to = SocketAddr::new(DB6.into(), PORT);
    for (source, passed) in [(ALLOWED6, true), (DENIED6, false)] {
        // Nothing of other databases.
        net.connect(source.into(), SocketAddr::new(DB6.into(), 5434));
        net.connect(source.into(), to);
        let line = six.wait_for(|line| line["source"] == source.to_string());
        assert_eq!(
            parts(&line, &["database", "port", "passed"]),
            json!(["orders", PORT, passed])
        );
    }
    six.interrupt();
    net.terminate();
}

#[test]
fn malformed_packets_and_fragments_of_a_source_are_told() {
    let orders = dedicated("orders", PORT, &ALLOWED, "");
    let mut net = Net::enforcing(
        "trace-malformed",
        &[Protected::tcp(PORT, &ALLOWED)],
        &policy("eth0", "native", &[orders]),
    );
    net.fix_neighbours();
    let wire = net.wire();
    let mut trace = Reader::start(&net, &["203.0.113.10"]);
    let packet = Packet::new(&addressing(ALLOWED4.into(), PORT, Protocol::Tcp), 7);
    let short = Packet {
        header_words: Some(4),
        ..packet.clone()
    };
    wire.send(&short.frame());
    let line = trace.wait_for_text("headers that do not lead to a port");
    assert_eq!(
        parts(&line, &VERDICT),
        json!(["203.0.113.10", null, null, "bad-header", false])
    );
    let tagged = Packet {
        tags: vec![(0x8100, 0); 4],
        ..packet.clone()
    };
    wire.send(&tagged.frame());
    assert_eq!(trace.wait_for_text("port 5432")["passed"], true);
    let pieces = packet.split(&[24]);
    wire.send(&packet.fragments(&pieces)[1]);
    let line = trace.wait_for_text("a later fragment");
    assert_eq!(
        parts(&line, &["port", "reason", "passed"]),
        json!([null, null, true])
    );
    trace.interrupt();
    net.terminate();
}

/// A ClientHello's beginning, in a record that is longer.
fn hello() -> Vec<u8> {
    let mut hello = vec![22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3];
    hello.resize(300, 7);
    hello
}

fn connected(net: &Net, source: IpAddr) -> TcpStream {
    let socket = net.client.run(|| bound(source));
    socket.connect_timeout(&db(6379).into(), PATIENCE).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.into()
}

#[test]
fn places_of_a_connections_beginning_are_told_where_tls_is_forced() {
    let rules = "rules: [{cidr: 203.0.113.10/32}]";
    let redis = format!("{{name: orders, port: 6379, engine: redis, model: dedicated, {rules}}}");
    let mut net = Net::enforcing("trace-tls", &[], &policy("eth0", "native", &[redis]));
    let _echo = net.echo(6379);
    let mut trace = Reader::start(&net, &["203.0.113.10"]);
    let status = net.agent_json(&["status", "--verify"]);
    assert_eq!(status["errors"], json!([]));

    let mut tls = connected(&net, ALLOWED4.into());
    let line = trace.wait_for_text("TLS is forced, which is judged at the socket");
    assert_eq!(line["at_socket"], false);
    trace.wait_for_text("the handshake, without data");
    tls.write_all(&hello()).unwrap();
    let line = trace.wait_for_text("begins with TLS");
    assert_eq!(
        parts(
            &line,
            &["at_socket", "database", "port", "reason", "passed"]
        ),
        json!([true, "orders", 6379, null, true])
    );
    assert_eq!(
        line["text"],
        "IPv4 TCP at the socket of database orders, port 6379; source 203.0.113.10; bytes 0 to 299 of the connection: it \
         begins with TLS; passed"
    );
    tls.read_exact(&mut [0; 300]).unwrap();

    let mut clear = connected(&net, ALLOWED4.into());
    clear.write_all(b"PING\r\n").unwrap();
    let line = trace.wait_for_text("do not begin TLS");
    assert_eq!(
        parts(&line, &["reason", "passed"]),
        json!(["not-tls", false])
    );
    trace.wait_for_text("its connection was refused");
    // By a reset: the agent says so, not only the program.
    assert!(clear.read(&mut [0; 100]).is_err());
    trace.interrupt();
    net.terminate();
}
