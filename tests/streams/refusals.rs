//! How a refused connection ends, and what its client may do then.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use filter_tests::net::{ACK, FIN, OTHER_DB4, OTHER_DB6, RST, RawClient, RawConnection, SYN};
use serde_json::json;

use crate::{
    laboratory::Laboratory,
    server::{Engine, Server, hello},
};

/// Time within which both ends learn that a connection is refused.
const LIMIT: Duration = Duration::from_secs(1);
/// Time after which a client sends again what was not acknowledged. A kernel takes 200 ms.
const REPETITION: Duration = Duration::from_millis(20);

fn opening(engine: Engine) -> Vec<u8> {
    [engine.requests().remove(0), hello(300, 23)].concat()
}

/// Sends clear text again and again, as a kernel does, until the connection is ended. Returns the last data.
#[track_caller]
fn be_refused(client: &RawClient, connection: &RawConnection, engine: Engine) -> Vec<u8> {
    let begun = Instant::now();
    let ends = |segment: &filter_tests::net::Received| {
        connection.is_mine(segment) && segment.flags & (FIN | RST) != 0
    };
    let answer = loop {
        assert!(begun.elapsed() < LIMIT, "the client is not told");
        connection.write(0, &engine.clear());
        if let Some(answer) = client.wait_for(REPETITION, ends) {
            break answer;
        }
    };
    assert_eq!(answer.sequence, connection.server_isn.wrapping_add(1));
    // As the client acknowledges the answer, or sends more.
    let mut last = connection.segment();
    last.acknowledgement = answer.sequence.wrapping_add(answer.data.len() as u32 + 1);
    connection.send(&last);
    assert!(answer.has(if answer.data.is_empty() {
        RST
    } else {
        FIN | ACK
    }));
    answer.data
}

/// Asserts that the server's end of the connection is gone within the limit.
#[track_caller]
fn assert_freed(server: &mut Server, port: u16) {
    let begun = Instant::now();
    loop {
        server.poll();
        let mut accepted = server.accepted.iter();
        if accepted.any(|accepted| accepted.peer.port() == port && accepted.ended) {
            return;
        }
        assert!(
            begun.elapsed() < LIMIT,
            "the server's socket is still there"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn client_is_told_in_its_engines_words_and_the_server_is_free() {
    for mode in ["native", "generic"] {
        let laboratory = Laboratory::new("told", mode);
        for engine in Engine::ALL {
            let mut server = laboratory.serve(engine);
            for client in laboratory.clients() {
                let connection = client.open(engine.port());
                let answer = be_refused(&client, &connection, engine);
                let text = String::from_utf8_lossy(&answer).into_owned();
                match engine {
                    Engine::Mongodb | Engine::Other => assert_eq!(text, ""),
                    _ => assert!(text.contains("TLS is required here"), "{text}"),
                }
                assert_freed(&mut server, connection.from);
                server.assert_tls_only();
                assert!(server.read_from(connection.from).concat().is_empty());
            }
            let expected = json!({"refused": 2});
            assert_eq!(laboratory.connections(engine), expected, "{engine:?}");
        }
    }
}

#[test]
fn same_ports_get_in_with_tls_after_a_refusal() {
    let laboratory = Laboratory::new("again", "native");
    for engine in Engine::ALL {
        let mut server = laboratory.serve(engine);
        for client in laboratory.clients() {
            let refused = client.open(engine.port());
            be_refused(&client, &refused, engine);
            assert_freed(&mut server, refused.from);
            server.forget_ended();
            let mut connection = client.connection_from(refused.from, engine.port());
            connection.open();
            connection.write(0, &opening(engine));
            server.wait_for(connection.from, &opening(engine));
            // And is refused again without.
            connection.reset(opening(engine).len() as u32);
            client.fence();
            server.poll();
            server.forget_ended();
            let mut connection = client.connection_from(refused.from, engine.port());
            connection.open();
            be_refused(&client, &connection, engine);
            assert_freed(&mut server, connection.from);
            server.assert_tls_only();
        }
    }
}

#[test]
fn syn_does_not_let_a_refused_connection_go_on() {
    let laboratory = Laboratory::new("forgiven", "generic");
    for engine in Engine::ALL {
        let mut server = laboratory.serve(engine);
        for client in laboratory.clients() {
            // Refused at once, or after a part that is right.
            for good in [0, 1, 5] {
                let connection = client.open(engine.port());
                let bytes = &opening(engine)[..good];
                connection.write(0, bytes);
                connection.write(good as u32, &engine.clear());
                client.fence();
                let mut syn = connection.syn();
                syn.sequence = syn.sequence.wrapping_add(1 << 30);
                connection.send(&syn);
                for (place, data) in [
                    (good, engine.clear()),
                    (0, engine.clear()),
                    (0, opening(engine)),
                    (64, engine.clear()),
                    (good, engine.clear()),
                ] {
                    connection.send(&syn);
                    connection.write(place as u32, &data);
                }
                client.fence();
                server.assert_tls_only();
                let read = server.read_from(connection.from).concat();
                assert!(read == bytes, "read {:?}", read.escape_ascii().to_string());
                connection.reset(good as u32);
            }
        }
    }
}

/// A refusal ends one connection: none of the same client to another database, and none of its address to the same.
#[test]
fn refusal_ends_no_other_connection() {
    let laboratory = Laboratory::new("others", "native");
    let [one, two] = [Engine::Postgresql, Engine::Redis];
    let mut servers = [one, two].map(|engine| laboratory.serve(engine));
    for client in laboratory.clients() {
        let refused = client.open(one.port());
        let mut same_port = client.connection_from(refused.from, two.port());
        same_port.open();
        let same_database = client.open(one.port());
        be_refused(&client, &refused, one);
        assert_freed(&mut servers[0], refused.from);
        for (connection, engine, server) in [(same_database, one, 0), (same_port, two, 1)] {
            connection.write(0, &opening(engine));
            servers[server].wait_for(connection.from, &opening(engine));
        }
        let answer = client.take(|segment| segment.has(SYN | RST));
        assert!(answer.is_none());
    }
}

/// Clients may have one port for connections to two addresses of a host, and many clients one address.
#[test]
fn refusal_ends_no_connection_to_another_address() {
    let laboratory = Laboratory::new("addresses", "native");
    let engine = Engine::Postgresql;
    let mut server = laboratory.serve(engine);
    for client in laboratory.clients() {
        let mut elsewhere = laboratory.client(client.address);
        elsewhere.server = match client.address {
            IpAddr::V4(_) => OTHER_DB4.into(),
            IpAddr::V6(_) => OTHER_DB6.into(),
        };
        let refused = client.open(engine.port());
        let mut connection = elsewhere.connection_from(refused.from, engine.port());
        connection.open();
        be_refused(&client, &refused, engine);
        assert_freed(&mut server, refused.from);
        server.forget_ended();
        connection.write(0, &opening(engine));
        server.wait_for(connection.from, &opening(engine));
    }
}

/// Whoever is judged as one from before TLS was forced is not among those that ended their handshake with a hello.
#[test]
fn long_hello_that_ended_the_handshake_goes_on_once_existing_connections_are_judged() {
    let laboratory = Laboratory::new("existing", "native");
    laboratory.net.agent_text(&["reload", "--existing"]);
    for engine in [Engine::Postgresql, Engine::Other] {
        let mut server = laboratory.serve(engine);
        for client in laboratory.clients() {
            let stream = hello(3000, 37);
            let mut connection = client.connection(engine.port());
            connection.ask();
            connection.write(0, &stream);
            server.wait_for(connection.from, &stream);
        }
    }
}
