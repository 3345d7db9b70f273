//! Multipath TCP (RFC 8684), whose data may belong elsewhere in the stream than its segment says.

use std::{
    io::Write as _,
    net::{SocketAddr, TcpStream},
};

use filter_tests::net::{ACK, ALLOWED4, DB4, PATIENCE, RawConnection, SYN, Segment};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    laboratory::Laboratory,
    server::{Engine, Server, hello},
};

const ENGINES: [Engine; 3] = [Engine::Postgresql, Engine::Mysql, Engine::Other];

fn serve(laboratory: &Laboratory, engine: Engine) -> Server {
    let protocol = Some(Protocol::MPTCP);
    Server::start_at(&laboratory.net.db, engine, engine.port(), protocol, |_| {})
}

/// MP_CAPABLE of a SYN, without and with the checksums that it may ask for.
const CAPABLE: [&[u8]; 2] = [&[30, 4, 0x01, 0x01], &[30, 4, 0x01, 0x81]];
/// MP_JOIN of a SYN.
const JOIN: &[u8] = &[30, 12, 0x10, 1, 0, 0, 0, 1, 0, 0, 0, 2];

/// MP_CAPABLE of the segment that ends the handshake, with both keys, or of the first data.
fn keys(length: Option<u16>) -> Vec<u8> {
    let mut option = vec![30, if length.is_some() { 22 } else { 20 }, 0x01, 0x01];
    option.extend([7; 8]);
    option.extend([9; 8]);
    option.extend(length.into_iter().flat_map(u16::to_be_bytes));
    option
}

/// DSS: the segment's data belongs at this place of the connection's stream.
fn mapping(place: u32, subflow: u32, length: u16) -> Vec<u8> {
    // The mapping, with a data sequence number of four bytes.
    let mut option = vec![30, 12, 0x20, 0x04];
    option.extend(place.to_be_bytes());
    option.extend(subflow.to_be_bytes());
    option.extend(length.to_be_bytes());
    option[1] = option.len() as u8;
    option
}

fn with_option(segment: Segment, option: &[u8]) -> Segment {
    let options = [&segment.options, option].concat();
    Segment { options, ..segment }
}

fn opening(engine: Engine) -> Vec<u8> {
    [engine.requests().remove(0), hello(200, 19)].concat()
}

/// Kernels before 6.12 do not fall back where their SYNs are dropped.
#[test]
fn multipath_syn_is_answered_as_a_plain_one() {
    let laboratory = Laboratory::new("mptcp-syn", "generic");
    for engine in ENGINES {
        let mut server = serve(&laboratory, engine);
        for client in laboratory.clients() {
            for option in [CAPABLE[0], CAPABLE[1], JOIN] {
                // Behind other options as well, at even and odd places.
                for before in [&[][..], &[1, 1], &[3, 3, 7]] {
                    let mut connection = client.connection(engine.port());
                    let syn = with_option(connection.syn(), &[before, option].concat());
                    let answer = connection.ask_with(&syn);
                    assert!(answer.has(SYN | ACK) && !answer.options.contains(&30));
                    connection.send(&connection.segment());
                    connection.write(0, &opening(engine));
                    server.wait_for(connection.from, &opening(engine));
                }
            }
        }
    }
}

/// Sends data with mappings to the beginning of the stream, in both orders.
fn send_mapped(connection: &RawConnection, engine: Engine) {
    let (opening, clear) = (opening(engine), engine.clear());
    let length = opening.len() as u32;
    let clear_length = clear.len() as u16;
    for place in [0, 1, 2] {
        let mapped = with_option(
            connection.data(length, &clear),
            &mapping(place, length + 1, clear_length),
        );
        connection.send(&mapped);
    }
    let keyed = keys(Some(clear_length));
    connection.send(&with_option(connection.data(0, &clear), &keyed));
    connection.send(&with_option(
        connection.data(0, &opening),
        &mapping(2_000, 1, length as u16),
    ));
}

#[test]
fn mapped_data_is_no_way_in() {
    let laboratory = Laboratory::new("mptcp-data", "native");
    for engine in ENGINES {
        let mut server = serve(&laboratory, engine);
        for client in laboratory.clients() {
            for cookies in [1, 2] {
                laboratory
                    .net
                    .db
                    .sysctl(&[("ipv4/tcp_syncookies", cookies)]);
                for third in [keys(None), keys(Some(96)), mapping(1, 1, 96), vec![]] {
                    let mut connection = client.connection(engine.port());
                    connection.send(&with_option(connection.syn(), CAPABLE[0]));
                    let answer = connection.ask();
                    assert!(answer.has(SYN | ACK) && !answer.options.contains(&30));
                    connection.send(&with_option(connection.segment(), &third));
                    connection.send(&with_option(connection.data(0, &engine.clear()), &third));
                    send_mapped(&connection, engine);
                    connection.send(&connection.segment());
                    send_mapped(&connection, engine);
                    client.fence();
                    server.assert_tls_only();
                    connection.reset(0);
                    connection.reset(opening(engine).len() as u32);
                }
            }
        }
    }
}

#[test]
fn multipath_client_gets_in_with_tls() {
    let laboratory = Laboratory::new("mptcp-client", "native");
    let engine = Engine::Postgresql;
    let mut server = serve(&laboratory, engine);
    let mut stream = laboratory.net.client.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP)).unwrap();
        socket
            .bind(&SocketAddr::new(ALLOWED4.into(), 0).into())
            .unwrap();
        let server = SocketAddr::new(DB4.into(), engine.port());
        socket.connect_timeout(&server.into(), PATIENCE).unwrap();
        TcpStream::from(socket)
    });
    let port = stream.local_addr().unwrap().port();
    stream.write_all(&opening(engine)).unwrap();
    server.wait_for(port, &opening(engine));
}
