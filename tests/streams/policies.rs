//! Where connections are not judged, or only counted.

use std::{
    io::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    time::Duration,
};

use filter_tests::net::{
    CLIENT4, CLIENT6, DB4, DB6, FIN, Namespace, PATIENCE, RST, Received, bound, wait_until,
};

use crate::{
    laboratory::Laboratory,
    server::{Engine, Server, hello},
};

/// Connects and sends clear text, which the server must read.
#[track_caller]
fn assert_reads_clear(server: &mut Server, from: &Namespace, source: IpAddr, to: SocketAddr) {
    let clear = server.engine.clear();
    let mut stream = from.run(|| {
        let socket = bound(source);
        socket.connect_timeout(&to.into(), PATIENCE).unwrap();
        TcpStream::from(socket)
    });
    stream.write_all(&clear).unwrap();
    let port = stream.local_addr().unwrap().port();
    server.wait_for_any(port, &clear);
}

#[test]
fn monitored_database_refuses_nobody_and_counts() {
    let laboratory = Laboratory::with("monitored", "native", "monitor: true");
    for engine in Engine::ALL {
        let mut server = laboratory.serve(engine);
        for client in laboratory.clients() {
            let clear = engine.clear();
            let connection = client.open(engine.port());
            connection.write(0, &clear[..40]);
            connection.write(40, &clear[40..]);
            server.wait_for_any(connection.from, &clear);
            let opening = [engine.requests().remove(0), hello(300, 29)].concat();
            let connection = client.open(engine.port());
            connection.write(0, &opening);
            server.wait_for_any(connection.from, &opening);
        }
        let counted = laboratory.database(engine)["monitored_connections"].clone();
        assert_eq!(
            counted,
            serde_json::json!({"refused": 2, "tls": 2}),
            "{engine:?}"
        );
    }
}

/// What was let pass by `monitor: tls` is from before TLS was forced.
#[test]
fn connection_that_was_monitored_goes_on_until_existing_ones_are_judged() {
    let laboratory = Laboratory::with("monitored-before", "native", "monitor: tls");
    let engine = Engine::Postgresql;
    let mut server = laboratory.serve(engine);
    for client in laboratory.clients() {
        laboratory.net.reload(&laboratory.policy("monitor: tls"));
        let clear = engine.clear();
        let connection = client.open(engine.port());
        connection.write(0, &clear);
        server.wait_for_any(connection.from, &clear);
        laboratory.net.reload(&laboratory.policy(""));
        connection.write(96, &clear);
        server.wait_for_any(connection.from, &[&clear[..], &clear].concat());
        laboratory.net.agent_text(&["reload", "--existing"]);
        // Repeated, as a kernel does, it is answered.
        let ended = || {
            connection.write(192, &clear);
            let ends = |segment: &Received| {
                connection.is_mine(segment) && segment.flags & (FIN | RST) != 0
            };
            client.wait_for(Duration::from_millis(20), ends).is_some()
        };
        assert!(wait_until(ended));
        assert_eq!(server.read_from(connection.from).concat().len(), 192);
        let connections = laboratory.connections(engine);
        assert!(connections["refused"].as_u64() > Some(0), "{connections}");
    }
}

#[test]
fn cluster_is_exempt() {
    let laboratory = Laboratory::new("cluster", "native");
    for engine in Engine::ALL {
        let mut server = laboratory.serve(engine);
        for (source, to) in [(CLIENT4.into(), DB4.into()), (CLIENT6.into(), DB6.into())] {
            let to = SocketAddr::new(to, engine.port());
            assert_reads_clear(&mut server, &laboratory.net.client, source, to);
        }
    }
}

#[test]
fn loopback_is_untouched() {
    let laboratory = Laboratory::new("loopback", "native");
    let addresses: [IpAddr; 4] = [
        Ipv4Addr::LOCALHOST.into(),
        Ipv6Addr::LOCALHOST.into(),
        DB4.into(),
        DB6.into(),
    ];
    for engine in Engine::ALL {
        let mut server = laboratory.serve(engine);
        for address in addresses {
            let to = SocketAddr::new(address, engine.port());
            assert_reads_clear(&mut server, &laboratory.net.db, address, to);
        }
    }
}

#[test]
fn database_without_forced_tls_is_untouched() {
    let laboratory = Laboratory::new("unforced", "native");
    laboratory
        .net
        .reload(&laboratory.policy("force_tls: false"));
    for engine in Engine::ALL {
        let mut server = laboratory.serve(engine);
        for client in laboratory.clients() {
            let mut connection = client.connection(engine.port());
            connection.ask();
            // With the end of the handshake.
            connection.write(0, &engine.clear());
            server.wait_for_any(connection.from, &engine.clear());
        }
    }
}

/// One database forces TLS; another one, and a port that no database guards, have nothing to do with it.
#[test]
fn other_ports_are_untouched() {
    let laboratory = Laboratory::new("ports", "native");
    let forced = laboratory
        .policy("")
        .lines()
        .take(5)
        .collect::<Vec<_>>()
        .join("\n");
    let unforced = "\n  - {name: clear, port: 5500, engine: postgresql, model: dedicated, force_tls: \
                    false, rules: [{cidr: 203.0.113.0/24}, {cidr: '2001:db8::/64'}]}\n";
    laboratory.net.reload_unprotected(&(forced + unforced));
    for port in [5500, 5501, Engine::Mongodb.port()] {
        let db = &laboratory.net.db;
        let mut server = Server::start_at(db, Engine::Postgresql, port, None, |_| {});
        for client in laboratory.clients() {
            let connection = client.open(port);
            let clear = server.engine.clear();
            connection.write(0, &clear);
            server.wait_for_any(connection.from, &clear);
        }
    }
}
