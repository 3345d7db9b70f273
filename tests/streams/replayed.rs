//! Attacks that brought plaintext in while an XDP program judged how connections begin.

use filter_tests::{
    frames::{HOP_BY_HOP, options},
    net::{Checksum, RawClient, RawConnection, Segment},
};

use crate::{
    laboratory::{Laboratory, RAW4, RAW6},
    server::{Engine, Server, hello},
};

const MODES: [&str; 2] = ["native", "generic"];
const ENGINE: Engine = Engine::Postgresql;

/// Segments that claim to carry far more than they do, and that no server takes.
fn send_broken(connection: &RawConnection, places: impl Iterator<Item = u32>) {
    for place in places {
        connection.send(&Segment {
            checksum: Checksum::Wrong,
            ..connection.data(place, &[b'x'; 60])
        });
    }
}

/// Sends plaintext on an established connection, from its beginning and after a request, and resets it.
fn send_clear(client: &RawClient, connection: &RawConnection, server: &mut Server) {
    connection.write(0, &ENGINE.clear());
    connection.write(0, &ENGINE.clear());
    client.fence();
    server.assert_tls_only();
    let read = server.read_from(connection.from).concat();
    assert!(
        read.is_empty(),
        "read {:?}",
        read.escape_ascii().to_string()
    );
    connection.reset(0);
}

#[test]
fn jumbo() {
    for mode in MODES {
        let laboratory = Laboratory::new("jumbo", mode);
        let mut server = laboratory.serve(ENGINE);
        let client = laboratory.client(RAW6);
        let connection = client.open(ENGINE.port());
        let mut packet = connection.packet(&Segment {
            checksum: Checksum::Wrong,
            ..connection.data(0, &[b'x'; 15])
        });
        packet.extensions = vec![options(HOP_BY_HOP, 0)];
        packet.length = Some(0);
        let frame = packet.frame();
        assert_eq!(frame.len(), 97);
        for _ in 0..32_804 {
            client.send_frame(&frame);
        }
        send_clear(&client, &connection, &mut server);
    }
}

#[test]
fn far() {
    let laboratory = Laboratory::new("far", "native");
    let mut server = laboratory.serve(ENGINE);
    for client in laboratory.clients() {
        let mut connection = client.connection(ENGINE.port());
        connection.send(&Segment {
            checksum: Checksum::Wrong,
            ..connection.syn()
        });
        // 2^31 bytes, by their places; then the SYN that counts, with the same number.
        send_broken(&connection, (0..1 << 31).step_by(1 << 20));
        connection.open();
        send_broken(&connection, (0..1 << 31).step_by(1 << 20));
        send_clear(&client, &connection, &mut server);
    }
}

#[test]
fn began() {
    let laboratory = Laboratory::new("began", "generic");
    let mut server = laboratory.serve(ENGINE);
    for client in laboratory.clients() {
        let mut connection = client.connection(ENGINE.port());
        let isn = connection.isn;
        connection.send(&Segment {
            checksum: Checksum::Wrong,
            ..connection.syn()
        });
        connection.open();
        // More SYNs than the program once remembered.
        for number in 1..20 {
            connection.isn = isn.wrapping_sub(number << 20);
            connection.send(&connection.syn());
        }
        connection.isn = isn;
        send_clear(&client, &connection, &mut server);
    }
}

/// More connections than are remembered anywhere push out what is remembered of one.
#[test]
fn lru() {
    let laboratory = Laboratory::new("lru", "native");
    let mut server = laboratory.serve(ENGINE);
    let client = laboratory.client(RAW4);
    let refused = client.open(ENGINE.port());
    let fresh = client.open(ENGINE.port());
    refused.write(0, &ENGINE.clear());
    for number in 0..80_000_u32 {
        let mut other = client.connection_from(number as u16, ENGINE.port());
        other.isn = number;
        other.send(&Segment {
            checksum: Checksum::Wrong,
            ..other.syn()
        });
    }
    for connection in [refused, fresh] {
        // What once made a connection look as if it was under way.
        connection.write(64, b"\x17\x03\x03\0\x10recordrecordreco");
        send_clear(&client, &connection, &mut server);
    }
}

/// Refused for good once: six bytes were wanted at once, and Linux does not merge the two.
#[test]
fn split() {
    let laboratory = Laboratory::new("split", "generic");
    let mut server = laboratory.serve(ENGINE);
    for client in laboratory.clients() {
        let stream = hello(1705, 17);
        let connection = client.open(ENGINE.port());
        connection.write(0, &stream[..5]);
        client.fence();
        connection.write(5, &stream[5..]);
        server.wait_for(connection.from, &stream);
    }
}
