//! How each engine's streams may begin, and how not.

use crate::{
    laboratory::Laboratory,
    server::{CANCEL_REQUEST, Engine, GSSENC_REQUEST, SSL_REQUEST, hello},
};

const MODES: [&str; 2] = ["native", "generic"];

#[test]
fn every_opening_is_read_whole() {
    for mode in MODES {
        let laboratory = Laboratory::new("openings", mode);
        for engine in Engine::ALL {
            let mut server = laboratory.serve(engine);
            for client in laboratory.clients() {
                for request in engine.requests() {
                    let connection = client.open(engine.port());
                    let mut stream = vec![];
                    for part in request.chunks(if request.len() > 16 { 36 } else { 8 }) {
                        connection.write(stream.len() as u32, part);
                        stream.extend(part);
                        server.wait_for(connection.from, &stream);
                    }
                    for part in [hello(517, 1), b"\x16\x03\x03\0\x04more".to_vec()] {
                        connection.write(stream.len() as u32, &part);
                        stream.extend(part);
                        server.wait_for(connection.from, &stream);
                    }
                }
            }
        }
    }
}

#[test]
fn plaintext_is_never_read() {
    for mode in MODES {
        let laboratory = Laboratory::new("plaintext", mode);
        for engine in Engine::ALL {
            let mut server = laboratory.serve(engine);
            for client in laboratory.clients() {
                for bytewise in [false, true] {
                    let connection = client.open(engine.port());
                    let clear = engine.clear();
                    for (place, part) in clear.chunks(if bytewise { 1 } else { 96 }).enumerate() {
                        connection.write(place as u32, part);
                    }
                    client.fence();
                    server.assert_tls_only();
                }
            }
        }
    }
}

#[test]
fn plaintext_after_a_request_is_never_read() {
    let laboratory = Laboratory::new("after", "native");
    let client = laboratory.client(crate::laboratory::RAW4);
    let engine = Engine::Postgresql;
    let mut server = laboratory.serve(engine);
    for requests in [
        vec![SSL_REQUEST],
        vec![GSSENC_REQUEST],
        vec![GSSENC_REQUEST, SSL_REQUEST],
        vec![SSL_REQUEST, SSL_REQUEST],
        vec![GSSENC_REQUEST, GSSENC_REQUEST],
        vec![SSL_REQUEST, GSSENC_REQUEST],
    ] {
        for together in [false, true] {
            let connection = client.open(engine.port());
            let mut stream = requests.concat();
            if together {
                stream.extend(engine.clear());
                connection.write(0, &stream);
            } else {
                for (number, request) in requests.iter().enumerate() {
                    connection.write(8 * number as u32, request);
                    client.fence();
                    server.poll();
                }
                connection.write(stream.len() as u32, &engine.clear());
            }
            client.fence();
            server.assert_tls_only();
        }
    }
}

#[test]
fn query_is_cancelled_in_the_clear_only_where_that_is_allowed() {
    let laboratory = Laboratory::new("cancel", "native");
    for engine in [Engine::Postgresql, Engine::PostgresqlWithoutCancel] {
        let mut server = laboratory.serve(engine);
        for client in laboratory.clients() {
            let connection = client.open(engine.port());
            connection.write(0, CANCEL_REQUEST);
            client.fence();
            server.assert_tls_only();
            if engine == Engine::Postgresql {
                server.wait_for(connection.from, CANCEL_REQUEST);
            }
        }
    }
}

/// Its length and its number look like a record with a ClientHello.
#[test]
fn message_of_mongodb_that_looks_like_a_hello_is_never_read() {
    let laboratory = Laboratory::new("message", "native");
    let engine = Engine::Mongodb;
    let mut server = laboratory.serve(engine);
    for client in laboratory.clients() {
        for answers_to in [[0; 4], [0xff; 4]] {
            // Of 790 bytes; OP_MSG with one section.
            let mut message = vec![22, 3, 0, 0, 7, 1, 0, 0];
            message.extend(answers_to);
            message.extend([0xdd, 7, 0, 0, 0, 0, 0, 0, 0]);
            message.resize(790, 1);
            for ends_handshake in [false, true] {
                for cut in [1, 8, 9, 10, 12, 790] {
                    let mut connection = client.connection(engine.port());
                    connection.ask();
                    if !ends_handshake {
                        connection.send(&connection.segment());
                    }
                    connection.write(0, &message[..cut]);
                    connection.write(cut as u32, &message[cut..]);
                    connection.send(&connection.segment());
                    connection.write(0, &message[..cut]);
                    connection.write(cut as u32, &message[cut..]);
                    client.fence();
                    server.assert_tls_only();
                    connection.reset(0);
                    connection.reset(cut as u32);
                }
            }
        }
    }
}
