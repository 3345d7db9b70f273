//! What comes before the connection is the server's: on the SYN, with the end of the handshake, and SYNs where none belong.

use filter_tests::net::{ACK, FIN, PSH, RST, RawClient, SYN, Segment};
use nix::libc;
use socket2::{Domain, Socket, Type};
use std::net::{Ipv4Addr, SocketAddr};

use crate::{
    laboratory::{Laboratory, RAW4},
    server::{CANCEL_REQUEST, Engine, GSSENC_REQUEST, SSL_REQUEST, Server, hello},
};

fn openings(engine: Engine) -> Vec<Vec<u8>> {
    let with_hello = |request: Vec<u8>| [request, hello(300, 5)].concat();
    engine.requests().into_iter().map(with_hello).collect()
}

/// Asserts that nothing at all was read from this port.
#[track_caller]
fn assert_nothing_read(server: &mut Server, port: u16) {
    let read = server.read_from(port).concat();
    assert!(
        read.is_empty(),
        "{:?} read {:?}",
        server.engine,
        read.escape_ascii().to_string()
    );
}

/// Ends a handshake with data. Returns the client's port.
fn end_with(client: &RawClient, engine: Engine, data: &[u8]) -> u16 {
    let mut connection = client.connection(engine.port());
    connection.ask();
    connection.send(&connection.data(0, data));
    connection.from
}

#[test]
fn data_on_a_syn_is_never_read() {
    let laboratory = Laboratory::new("syn-data", "generic");
    for engine in Engine::ALL {
        let mut server = laboratory.serve(engine);
        for client in laboratory.clients() {
            for data in [engine.clear(), openings(engine)[0].clone()] {
                let connection = client.connection(engine.port());
                connection.send(&Segment {
                    data: data.clone(),
                    ..connection.syn()
                });
                client.fence();
                assert_nothing_read(&mut server, connection.from);
                // A client that sends it again without data gets in.
                let mut connection = connection;
                connection.open();
                let stream = &openings(engine)[0];
                connection.write(0, stream);
                server.wait_for(connection.from, stream);
            }
        }
    }
}

#[test]
fn opening_that_ends_the_handshake_is_read_whole() {
    for mode in ["native", "generic"] {
        let laboratory = Laboratory::new("third", mode);
        for engine in Engine::ALL
            .into_iter()
            .filter(|&engine| engine != Engine::Mysql)
        {
            let mut server = laboratory.serve(engine);
            for client in laboratory.clients() {
                for stream in openings(engine) {
                    let port = end_with(&client, engine, &stream);
                    server.wait_for(port, &stream);
                }
            }
        }
    }
}

#[test]
fn request_that_ends_the_handshake_is_followed_by_tls_only() {
    let laboratory = Laboratory::new("third-request", "native");
    let engine = Engine::Postgresql;
    let mut server = laboratory.serve(engine);
    for client in laboratory.clients() {
        for (request, more) in [
            (SSL_REQUEST, vec![hello(300, 5)]),
            (GSSENC_REQUEST, vec![SSL_REQUEST.to_vec(), hello(300, 5)]),
            (SSL_REQUEST, vec![engine.clear()]),
            (GSSENC_REQUEST, vec![engine.clear()]),
            (GSSENC_REQUEST, vec![hello(300, 5)]),
            (GSSENC_REQUEST, vec![SSL_REQUEST.to_vec(), engine.clear()]),
            (SSL_REQUEST, vec![SSL_REQUEST.to_vec(), hello(300, 5)]),
        ] {
            let mut connection = client.connection(engine.port());
            connection.ask();
            connection.send(&connection.data(0, request));
            server.wait_for(connection.from, request);
            // Answered by the server, as PostgreSQL's is, before more comes.
            client.wait(|received| connection.is_mine(received) && !received.data.is_empty());
            let mut stream = request.to_vec();
            for part in &more {
                for (at, byte) in part.chunks(7).enumerate() {
                    connection.write((stream.len() + at * 7) as u32, byte);
                }
                stream.extend(part);
                client.fence();
            }
            // Which of the two requests ended the handshake is not known any more; both may be followed by a hello.
            let read = server.read_from(connection.from).concat();
            assert!(
                engine.may_read(&read[8..]),
                "read {:?}",
                read.escape_ascii().to_string()
            );
            if engine.may_read(&stream) {
                server.wait_for(connection.from, &stream);
            }
            server.forget();
        }
    }
}

#[test]
fn part_of_an_opening_that_ends_the_handshake_brings_no_plaintext_in() {
    let laboratory = Laboratory::new("third-part", "native");
    let client = laboratory.client(RAW4);
    for engine in Engine::ALL {
        let mut server = laboratory.serve(engine);
        for stream in openings(engine) {
            for length in 1..=50 {
                let mut connection = client.connection(engine.port());
                connection.ask();
                connection.send(&connection.data(0, &stream[..length]));
                // Without an answer of the server, then with one.
                for _ in 0..2 {
                    connection.write(length as u32, &engine.clear());
                    connection.write(0, &engine.clear());
                    client.fence();
                    server.assert_tls_only();
                }
                connection.reset(0);
                connection.reset(length as u32);
            }
            server.forget();
            client.forget();
        }
    }
}

#[test]
fn plaintext_that_ends_the_handshake_is_never_read() {
    let laboratory = Laboratory::new("third-clear", "generic");
    for engine in Engine::ALL {
        let mut server = laboratory.serve(engine);
        for client in laboratory.clients() {
            let cancel = [CANCEL_REQUEST, b"x"].concat();
            let requests =
                [SSL_REQUEST, GSSENC_REQUEST].map(|request| [request, &engine.clear()].concat());
            for data in [&[engine.clear(), cancel][..], &requests].concat() {
                let port = end_with(&client, engine, &data);
                client.fence();
                assert_nothing_read(&mut server, port);
            }
            // All of MySQL's: its server speaks first.
            if engine == Engine::Mysql {
                let port = end_with(&client, engine, &openings(engine)[0]);
                client.fence();
                assert_nothing_read(&mut server, port);
            }
        }
    }
}

/// Linux cuts off what comes before the beginning of the stream.
#[test]
fn good_bytes_before_the_stream_bring_no_plaintext_in() {
    for mode in ["native", "generic"] {
        let laboratory = Laboratory::new("before", mode);
        let client = laboratory.client(RAW4);
        for engine in Engine::ALL {
            let mut server = laboratory.serve(engine);
            for stream in openings(engine) {
                for before in 1..=50 {
                    for established in [false, true] {
                        let mut connection = client.connection(engine.port());
                        connection.ask();
                        if established {
                            connection.send(&connection.segment());
                        }
                        let data = [&stream[..before], &engine.clear()].concat();
                        for flags in [PSH | ACK, PSH | ACK | FIN, SYN | ACK, SYN | PSH, RST, 0] {
                            connection.send(&Segment {
                                flags,
                                ..connection.data(0_u32.wrapping_sub(before as u32), &data)
                            });
                            if flags == RST {
                                break;
                            }
                        }
                        client.fence();
                        assert_nothing_read(&mut server, connection.from);
                    }
                }
                server.forget();
                client.forget();
            }
        }
    }
}

#[test]
fn syn_repeated_with_other_numbers_moves_nothing() {
    let laboratory = Laboratory::new("syns", "native");
    for engine in Engine::ALL {
        let mut server = laboratory.serve(engine);
        for client in laboratory.clients() {
            let stream = &openings(engine)[0];
            for moved in [1, 3, 6, 9, 64, 100_000, 1 << 31, u32::MAX, u32::MAX - 5] {
                for established in [false, true] {
                    let mut connection = client.connection(engine.port());
                    connection.ask();
                    if established {
                        connection.send(&connection.segment());
                    }
                    let isn = connection.isn;
                    connection.isn = isn.wrapping_add(moved);
                    connection.send(&connection.syn());
                    connection.write(0, stream);
                    connection.isn = isn;
                    connection.send(&connection.segment());
                    connection.write(0, &engine.clear());
                    client.fence();
                    server.assert_tls_only();
                    connection.reset(0);
                    connection.reset(engine.clear().len() as u32);
                }
            }
            server.forget();
            client.forget();
        }
    }
}

#[test]
fn syn_flag_within_a_connection_passes_no_data() {
    let laboratory = Laboratory::new("syn-within", "native");
    for engine in Engine::ALL {
        let mut server = laboratory.serve(engine);
        for client in laboratory.clients() {
            for flags in [SYN, SYN | ACK, SYN | ACK | PSH, SYN | FIN, SYN | ACK | FIN] {
                let connection = client.open(engine.port());
                for place in [0, u32::MAX] {
                    connection.send(&Segment {
                        flags,
                        ..connection.data(place, &engine.clear())
                    });
                }
                client.fence();
                assert_nothing_read(&mut server, connection.from);
            }
        }
    }
}

/// The host connects from the guarded port, and the client's SYN comes instead of an answer.
#[test]
fn connection_opened_by_both_ends_at_once_passes_no_plaintext() {
    let laboratory = Laboratory::new("both", "native");
    let client = laboratory.client(RAW4);
    let engine = Engine::Postgresql;
    for data_on_syn in [false, true] {
        let port = client.new_port();
        let socket = laboratory.net.db.run(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.set_reuse_address(true).unwrap();
            let local = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), engine.port());
            socket.bind(&local.into()).unwrap();
            socket.set_nonblocking(true).unwrap();
            let connected = socket.connect(&SocketAddr::new(RAW4, port).into());
            let error = connected.unwrap_err().raw_os_error();
            assert_eq!(error, Some(libc::EINPROGRESS));
            socket
        });
        let mut connection = client.connection_from(port, engine.port());
        let is_syn = |received: &filter_tests::net::Received| received.flags & (SYN | ACK) == SYN;
        let syn = client.wait(|received| connection.is_mine(received) && is_syn(received));
        connection.server_isn = syn.sequence;
        let data = if data_on_syn { engine.clear() } else { vec![] };
        connection.send(&Segment {
            data: data.clone(),
            ..connection.syn()
        });
        connection.send(&Segment {
            flags: SYN | ACK,
            acknowledgement: syn.sequence.wrapping_add(1),
            data,
            ..connection.syn()
        });
        connection.send(&connection.segment());
        connection.write(0, &engine.clear());
        client.fence();
        let read = socket.recv(&mut [std::mem::MaybeUninit::uninit(); 200]);
        assert!(
            read.as_ref().map_or(true, |&read| read == 0),
            "{read:?} bytes were read"
        );
    }
}
