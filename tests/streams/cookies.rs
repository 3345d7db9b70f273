//! SYN cookies, by which the stream begins where the client says; and lost ends of handshakes, with and without.

use filter_tests::net::{ACK, RawClient, RawConnection, SYN, Segment};

use crate::{
    laboratory::Laboratory,
    server::{Engine, SSL_REQUEST, hello},
};

const COOKIES: (&str, u32) = ("ipv4/tcp_syncookies", 2);

fn laboratory(name: &str, mode: &'static str) -> Laboratory {
    let laboratory = Laboratory::new(name, mode);
    laboratory.net.db.sysctl(&[COOKIES]);
    laboratory
}

/// A connection that has its SYN cookie, and says that both streams begin later than they do.
fn moved(client: &RawClient, engine: Engine, by: u32) -> RawConnection<'_> {
    let mut connection = client.connection(engine.port());
    connection.ask();
    connection.isn = connection.isn.wrapping_add(by);
    connection.server_isn = connection.server_isn.wrapping_add(by);
    connection
}

fn openings(engine: Engine) -> Vec<Vec<u8>> {
    let with_hello = |request: Vec<u8>| [request, hello(300, 9)].concat();
    engine.requests().into_iter().map(with_hello).collect()
}

#[test]
fn cookie_that_is_moved_brings_no_plaintext_in() {
    for mode in ["native", "generic"] {
        let laboratory = laboratory("cookie-moved", mode);
        for engine in Engine::ALL {
            let mut server = laboratory.serve(engine);
            for client in laboratory.clients() {
                for by in [
                    100_000,
                    1,
                    9,
                    64,
                    1 << 31,
                    u32::MAX,
                    0_u32.wrapping_sub(100_000),
                    0,
                ] {
                    for with_ack in [true, false] {
                        let connection = moved(&client, engine, by);
                        if with_ack {
                            connection.send(&connection.segment());
                        }
                        connection.write(0, &engine.clear());
                        // Where an XDP program would believe the stream to begin.
                        connection.write(0_u32.wrapping_sub(by), &openings(engine)[0]);
                        connection.write(0, &engine.clear());
                        client.fence();
                        server.assert_tls_only();
                        let read = server.read_from(connection.from).concat();
                        assert!(by == 0 || read.is_empty() || engine.may_read(&read));
                        connection.reset(0);
                        connection.reset(300);
                    }
                }
            }
        }
    }
}

#[test]
fn good_bytes_before_a_cookies_stream_bring_no_plaintext_in() {
    let laboratory = laboratory("cookie-before", "native");
    for engine in Engine::ALL {
        let mut server = laboratory.serve(engine);
        for client in laboratory.clients() {
            for stream in openings(engine) {
                for length in [1, 5, 6, 8, 9, 14, 16, 22, 36, 42, 60] {
                    // The cookie is for the place after the good bytes; then for the place before.
                    for by in [0, length as u32, 0_u32.wrapping_sub(length as u32)] {
                        let connection = moved(&client, engine, by);
                        let data = [&stream[..length], &engine.clear()].concat();
                        connection.write(0_u32.wrapping_sub(length as u32), &data);
                        connection.write(0_u32.wrapping_sub(by), &data);
                        connection.send(&connection.segment());
                        connection.write(0_u32.wrapping_sub(length as u32), &data);
                        client.fence();
                        server.assert_tls_only();
                        connection.reset(0);
                        connection.reset(length as u32);
                    }
                }
            }
        }
    }
}

#[test]
fn correct_client_gets_in_over_cookies() {
    let laboratory = laboratory("cookie-good", "native");
    for engine in Engine::ALL {
        let mut server = laboratory.serve(engine);
        for client in laboratory.clients() {
            for stream in openings(engine) {
                let connection = client.open(engine.port());
                connection.write(0, &stream[..5]);
                connection.write(5, &stream[5..]);
                server.wait_for(connection.from, &stream);
                // The end of the handshake is lost, and the opening in its place.
                if engine != Engine::Mysql {
                    let mut connection = client.connection(engine.port());
                    connection.ask();
                    connection.write(0, &stream);
                    server.wait_for(connection.from, &stream);
                }
            }
        }
    }
}

/// What comes is only a part, which nothing can be told by: it is dropped, until the server repeats its SYN-ACK.
#[test]
fn lost_end_of_a_handshake_is_made_up_for() {
    let laboratory = Laboratory::new("third-lost", "native");
    let engines = [Engine::Postgresql, Engine::Redis];
    let mut servers = engines.map(|engine| laboratory.serve(engine));
    let clients = laboratory.clients();
    let mut waiting = vec![];
    for (number, engine) in engines.into_iter().enumerate() {
        for client in &clients {
            for stream in openings(engine) {
                let mut connection = client.connection(engine.port());
                connection.ask();
                connection.write(0, &stream[..5]);
                connection.write(5, &stream[5..]);
                waiting.push((number, client, connection, stream));
            }
        }
    }
    for (number, client, connection, stream) in &waiting {
        client.wait(|received| connection.is_mine(received) && received.has(SYN | ACK));
        connection.send(&connection.segment());
        connection.write(0, &stream[..5]);
        connection.write(5, &stream[5..]);
        servers[*number].wait_for(connection.from, stream);
    }
}

/// PostgreSQL's request ends the handshake over a cookie, and what follows the server's answer is not TLS.
#[test]
fn request_over_a_cookie_is_followed_by_tls_only() {
    let laboratory = laboratory("cookie-request", "native");
    let engine = Engine::Postgresql;
    let mut server = laboratory.serve(engine);
    for client in laboratory.clients() {
        for by in [0, 100_000] {
            for more in [engine.clear(), hello(300, 9)] {
                let connection = moved(&client, engine, by);
                connection.write(0, SSL_REQUEST);
                server.wait_for(connection.from, SSL_REQUEST);
                client.wait(|received| connection.is_mine(received) && !received.data.is_empty());
                let acknowledged = Segment {
                    acknowledgement: connection.segment().acknowledgement.wrapping_add(1),
                    ..connection.data(8, &more)
                };
                connection.send(&acknowledged);
                client.fence();
                server.assert_tls_only();
                let stream = [SSL_REQUEST, &more].concat();
                if engine.may_read(&stream) {
                    server.wait_for(connection.from, &stream);
                }
            }
        }
    }
}
