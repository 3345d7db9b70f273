//! Ways to listen, and listeners that come and go.

use filter_tests::net::{ACK, FIN, RawConnection, Segment};
use nix::{libc, setsockopt_impl, sockopt_impl, sys::socket::setsockopt};
use socket2::Socket;

use crate::{
    laboratory::{Laboratory, RAW4},
    server::{Engine, SSL_REQUEST, Server, hello},
};

sockopt_impl!(
    /// Seconds until an ACK without data ends a handshake (tcp(7)).
    TcpDeferAccept,
    SetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_DEFER_ACCEPT,
    u32
);

fn opening(engine: Engine) -> Vec<u8> {
    [engine.requests().remove(0), hello(300, 11)].concat()
}

fn defer(socket: &Socket) {
    setsockopt(socket, TcpDeferAccept, &600).unwrap();
}

fn share(socket: &Socket) {
    socket.set_reuse_port(true).unwrap();
}

/// What a client sends that does not speak TLS, and what is only the beginning of TLS.
fn attacks(engine: Engine) -> Vec<Vec<u8>> {
    let (clear, opening) = (engine.clear(), opening(engine));
    let mut attacks = vec![clear.clone(), [SSL_REQUEST, &clear].concat()];
    for length in [1, 5, 6, 8, 9] {
        attacks.push(opening[..length].to_vec());
        attacks.push([&opening[..length], &clear].concat());
    }
    attacks
}

#[test]
fn deferred_accept_reads_openings_only() {
    let laboratory = Laboratory::new("deferred", "native");
    // A server that speaks first does not wait for the client.
    for engine in Engine::ALL
        .into_iter()
        .filter(|&engine| engine != Engine::Mysql)
    {
        let mut server = Server::start_at(&laboratory.net.db, engine, engine.port(), None, defer);
        for client in laboratory.clients() {
            for attack in attacks(engine) {
                let connection = client.open(engine.port());
                connection.write(0, &attack);
                connection.write(attack.len() as u32, &engine.clear());
                connection.write(0, &engine.clear());
                client.fence();
                if engine.may_read(&[&attack[..], &engine.clear()].concat()) {
                    continue;
                }
                server.assert_tls_only();
            }
            let connection = client.open(engine.port());
            client.fence();
            assert!(
                server.read_from(connection.from).is_empty(),
                "it was not deferred"
            );
            connection.write(0, &opening(engine));
            server.wait_for(connection.from, &opening(engine));
        }
    }
}

#[test]
fn listeners_that_share_a_port_read_openings_only() {
    let laboratory = Laboratory::new("shared", "native");
    for engine in [Engine::Postgresql, Engine::Other] {
        let mut server = Server::start_at(&laboratory.net.db, engine, engine.port(), None, share);
        for _ in 0..3 {
            server.listen(&laboratory.net.db, engine.port(), None, share);
        }
        for client in laboratory.clients() {
            for attack in attacks(engine).into_iter().cycle().take(40) {
                for with_ack in [false, true] {
                    let mut connection = client.connection(engine.port());
                    connection.ask();
                    if with_ack {
                        connection.send(&connection.segment());
                    }
                    connection.write(0, &attack);
                    connection.write(attack.len() as u32, &engine.clear());
                    client.fence();
                    server.assert_tls_only();
                }
                let connection = client.open(engine.port());
                connection.write(0, &opening(engine));
                server.wait_for(connection.from, &opening(engine));
            }
        }
    }
}

#[test]
fn fast_open_passes_no_data_on_a_syn() {
    let laboratory = Laboratory::new("fast-open", "generic");
    // Every listener takes data on a SYN, without a cookie.
    laboratory.net.db.sysctl(&[("ipv4/tcp_fastopen", 0x603)]);
    for engine in Engine::ALL {
        let mut server = laboratory.serve(engine);
        for client in laboratory.clients() {
            // No option, and one that asks for a cookie (RFC 7413).
            for option in [&[][..], &[34, 2, 1, 1]] {
                for data in [engine.clear(), opening(engine)] {
                    let mut connection = client.connection(engine.port());
                    let syn = connection.syn();
                    connection.send(&Segment {
                        options: [&syn.options, option].concat(),
                        data,
                        ..syn
                    });
                    client.fence();
                    assert!(server.read_from(connection.from).concat().is_empty());
                    // The client sends it again without.
                    connection.open();
                    connection.write(0, &opening(engine));
                    server.wait_for(connection.from, &opening(engine));
                }
            }
        }
    }
}

/// What a connection sends after something happened to the listener that its SYN went to.
fn go_on(connection: &RawConnection, engine: Engine, way: usize) {
    let data = |data: &[u8]| connection.write(0, data);
    match way {
        0 => data(&engine.clear()),
        1 => {
            connection.send(&connection.segment());
            data(&engine.clear());
        }
        2 => data(&[&opening(engine)[..5], &engine.clear()].concat()),
        _ => data(&opening(engine)),
    }
}

#[test]
fn listener_opened_again_within_a_handshake_reads_openings_only() {
    let laboratory = Laboratory::new("reopened", "native");
    let engine = Engine::Postgresql;
    for cookies in [1, 2] {
        laboratory
            .net
            .db
            .sysctl(&[("ipv4/tcp_syncookies", cookies)]);
        for client in laboratory.clients() {
            for way in 0..4 {
                let mut server = laboratory.serve(engine);
                let mut connection = client.connection(engine.port());
                connection.ask();
                server.listeners.clear();
                server.listen(&laboratory.net.db, engine.port(), None, |_| {});
                go_on(&connection, engine, way);
                client.fence();
                server.assert_tls_only();
                // It serves new clients.
                let connection = client.open(engine.port());
                connection.write(0, &opening(engine));
                server.wait_for(connection.from, &opening(engine));
            }
        }
    }
}

#[test]
fn connection_that_moves_to_another_listener_is_judged_there() {
    let laboratory = Laboratory::new("migrated", "native");
    laboratory.net.db.sysctl(&[("ipv4/tcp_migrate_req", 1)]);
    let engine = Engine::Postgresql;
    for client in laboratory.clients() {
        for way in (0..4).cycle().take(16) {
            let mut server =
                Server::start_at(&laboratory.net.db, engine, engine.port(), None, share);
            let mut connections: Vec<_> =
                (0..4).map(|_| client.connection(engine.port())).collect();
            for connection in &mut connections {
                connection.ask();
            }
            server.listen(&laboratory.net.db, engine.port(), None, share);
            server.listeners.remove(0);
            for connection in &connections {
                go_on(connection, engine, way);
            }
            client.fence();
            server.assert_tls_only();
            if way == 3 {
                for connection in &connections {
                    server.wait_for(connection.from, &opening(engine));
                }
            }
        }
    }
}

#[test]
fn ports_that_are_used_again_are_judged_anew() {
    let laboratory = Laboratory::new("time-wait", "native");
    for engine in [Engine::Postgresql, Engine::Redis] {
        let mut server = laboratory.serve(engine);
        for client in laboratory.clients() {
            for data_on_syn in [false, true] {
                let stream = opening(engine);
                let connection = client.open(engine.port());
                connection.write(0, &stream);
                server.wait_for(connection.from, &stream);
                // The server ends it first, and keeps the ports in TIME_WAIT.
                server.forget();
                let is_last = |segment: &filter_tests::net::Received| {
                    connection.is_mine(segment) && segment.has(FIN)
                };
                let last = client.wait(is_last);
                connection.send(&Segment {
                    acknowledgement: last.sequence.wrapping_add(1 + last.data.len() as u32),
                    flags: FIN | ACK,
                    ..connection.data(stream.len() as u32, &[])
                });
                client.fence();
                let mut again = client.connection_from(connection.from, engine.port());
                again.isn = connection.isn.wrapping_add(1_000_000);
                if data_on_syn {
                    again.send(&Segment {
                        data: engine.clear(),
                        ..again.syn()
                    });
                }
                again.open();
                again.write(0, &engine.clear());
                client.fence();
                let read = server.read_from(again.from).concat();
                assert!(
                    read.is_empty(),
                    "read {:?}",
                    read.escape_ascii().to_string()
                );
            }
        }
    }
}

#[test]
fn window_of_zero_changes_no_judgement() {
    let laboratory = Laboratory::new("zero-window", "native");
    let client = laboratory.client(RAW4);
    for engine in Engine::ALL {
        let mut server = laboratory.serve(engine);
        for data in [engine.clear(), opening(engine)] {
            let mut connection = client.connection(engine.port());
            connection.ask();
            let shut = |segment: Segment| Segment {
                window: 0,
                ..segment
            };
            connection.send(&shut(connection.segment()));
            // Probes with a byte that is old, then one that is not (RFC 9293 section 3.8.6.1).
            connection.send(&shut(connection.data(u32::MAX, b"x")));
            connection.send(&shut(connection.data(0, &data[..1])));
            connection.send(&shut(connection.data(0, &data)));
            client.fence();
            server.assert_tls_only();
            if engine.may_read(&data) {
                server.wait_for(connection.from, &data);
            }
        }
    }
}
