//! Forms of IP packets around the segments: fragments, options, extension headers.

use filter_tests::{
    frames::{
        AUTHENTICATION, DESTINATION_OPTIONS, Extension, HOP_BY_HOP, Packet, authentication,
        options, routing,
    },
    net::{ACK, DB6, OTHER_DB4, RawClient, RawConnection, SYN},
};

use crate::{
    laboratory::{Laboratory, RAW4, RAW6},
    server::{Engine, Server, hello},
};

const ENGINES: [Engine; 2] = [Engine::Postgresql, Engine::Other];

/// The three ways of a stream in to a server: on an established connection, at the end of the handshake, and in two
/// segments the wrong way round.
fn segments(connection: &mut RawConnection, way: usize, stream: &[u8]) -> Vec<Packet> {
    connection.ask();
    if way != 1 {
        connection.send(&connection.segment());
    }
    let parts = match way {
        2 => vec![(4, &stream[4..]), (0, &stream[..4])],
        _ => vec![(0, stream)],
    };
    let data = parts
        .iter()
        .map(|&(place, part)| connection.data(place, part));
    data.map(|segment| connection.packet(&segment)).collect()
}

/// Sends clear text and TLS in packets of a form. `delivers`: whether the server's kernel takes the form.
fn try_form(
    server: &mut Server,
    client: &RawClient,
    delivers: bool,
    frames: &dyn Fn(Packet) -> Vec<Vec<u8>>,
) {
    let engine = server.engine;
    for way in 0..3 {
        for stream in [engine.clear(), hello(300, 13)] {
            let mut connection = client.connection(engine.port());
            for packet in segments(&mut connection, way, &stream) {
                frames(packet)
                    .iter()
                    .for_each(|frame| client.send_frame(frame));
            }
            if delivers && engine.may_read(&stream) {
                server.wait_for(connection.from, &stream);
            }
            client.fence();
            server.assert_tls_only();
            connection.reset(0);
            connection.reset(stream.len() as u32);
        }
    }
}

#[test]
fn fragments_bring_tls_in_and_nothing_else() {
    for mode in ["native", "generic"] {
        let laboratory = Laboratory::new("fragments", mode);
        for engine in ENGINES {
            let mut server = laboratory.serve(engine);
            for client in laboratory.clients() {
                for (cuts, reversed) in [
                    (&[24][..], false),
                    (&[24], true),
                    (&[24, 32, 40], false),
                    (&[32, 88], true),
                    (&[8, 16, 24], true),
                ] {
                    let fragments = |packet: Packet| {
                        let end = packet.body().1.len();
                        let cuts: Vec<_> = cuts.iter().copied().filter(|&cut| cut < end).collect();
                        let mut fragments = packet.fragments(&packet.split(&cuts));
                        if reversed {
                            fragments.reverse();
                        }
                        fragments
                    };
                    // A first fragment without the whole TCP header is dropped at the interface.
                    try_form(&mut server, &client, cuts[0] >= 24, &fragments);
                }
            }
        }
    }
}

#[test]
fn extension_headers_hide_no_plaintext() {
    let laboratory = Laboratory::new("extensions", "native");
    let client = laboratory.client(RAW6);
    let chains: Vec<(Vec<Extension>, bool)> = vec![
        (vec![options(HOP_BY_HOP, 0)], true),
        (vec![options(DESTINATION_OPTIONS, 0)], true),
        (
            vec![options(HOP_BY_HOP, 0), options(DESTINATION_OPTIONS, 0)],
            true,
        ),
        // Linux takes no more than seven bytes of padding.
        (
            vec![options(HOP_BY_HOP, 3), options(DESTINATION_OPTIONS, 5)],
            false,
        ),
        (
            (0..4).map(|_| options(DESTINATION_OPTIONS, 0)).collect(),
            true,
        ),
        (
            (0..8).map(|_| options(DESTINATION_OPTIONS, 0)).collect(),
            false,
        ),
        (
            (0..9).map(|_| options(DESTINATION_OPTIONS, 0)).collect(),
            false,
        ),
        (vec![routing(0, 0, DB6.octets())], false),
        (vec![routing(2, 1, DB6.octets())], false),
        (vec![routing(4, 0, DB6.octets())], false),
        (vec![authentication(1)], false),
    ];
    assert!(
        chains
            .iter()
            .any(|(chain, _)| chain[0].kind == AUTHENTICATION)
    );
    for engine in ENGINES {
        let mut server = laboratory.serve(engine);
        for (extensions, delivers) in &chains {
            let with = |mut packet: Packet| {
                packet.extensions = extensions.clone();
                vec![packet.frame()]
            };
            try_form(&mut server, &client, *delivers, &with);
        }
    }
}

#[test]
fn ip_options_hide_no_plaintext() {
    let laboratory = Laboratory::new("options", "generic");
    let client = laboratory.client(RAW4);
    for engine in ENGINES {
        let mut server = laboratory.serve(engine);
        // No-operations, record route, a time stamp, one of unknown kind.
        for option in [
            vec![1; 4],
            vec![1; 40],
            vec![7, 7, 4, 0, 0, 0, 0, 0],
            vec![68, 8, 5, 0, 0, 0, 0, 0],
            vec![222, 8, 22, 3, 1, 0, 0, 1],
        ] {
            let with = |mut packet: Packet| {
                packet.options = option.clone();
                vec![packet.frame()]
            };
            try_form(&mut server, &client, true, &with);
        }
    }
}

/// "Route" of the attacks on the program that judged packets: the header's destination is another address of the host.
#[test]
fn source_route_hides_no_plaintext() {
    for mode in ["native", "generic"] {
        let laboratory = Laboratory::new("route", mode);
        let routes =
            ["all", "default", "eth0"].map(|name| format!("ipv4/conf/{name}/accept_source_route"));
        laboratory
            .net
            .db
            .sysctl(&routes.each_ref().map(|name| (name.as_str(), 1)));
        let client = laboratory.client(RAW4);
        for engine in ENGINES {
            let mut server = laboratory.serve(engine);
            // Loose and strict; the route leads on to the address of the connection, which the checksum is made for.
            for kind in [131, 137] {
                let with = |mut packet: Packet| {
                    packet.addressing.destination = OTHER_DB4.into();
                    packet.options = vec![kind, 7, 4, 10, 0, 0, 1];
                    vec![packet.frame()]
                };
                try_form(&mut server, &client, false, &with);
            }
        }
    }
}

#[test]
fn syn_behind_extension_headers_is_answered() {
    let laboratory = Laboratory::new("syns", "native");
    let client = laboratory.client(RAW6);
    for engine in ENGINES {
        let mut server = laboratory.serve(engine);
        for headers in 0..5 {
            let mut connection = client.connection(engine.port());
            let mut packet = connection.packet(&connection.syn());
            packet.extensions = vec![options(DESTINATION_OPTIONS, 0); headers];
            client.send_frame(&packet.frame());
            let answer = client.wait(|received| connection.is_mine(received));
            assert!(answer.has(SYN | ACK), "{answer:?}");
            connection.server_isn = answer.sequence;
            connection.send(&connection.segment());
            connection.write(0, &hello(300, 41));
            server.wait_for(connection.from, &hello(300, 41));
        }
    }
}
