//! Everything at once, at random: segments of several streams, of which a server may read one, by every way in; and a correct
//! client in the middle of what a bad network makes of its segments.

use filter_tests::{
    frames::Rng,
    net::{ACK, Checksum, FIN, PSH, RawClient, RawConnection, SYN, Segment, URG},
};
use socket2::Protocol;

use crate::{
    laboratory::{Laboratory, RAW4, RAW6},
    proxies,
    server::{CANCEL_REQUEST, Engine, GSSENC_REQUEST, SSL_REQUEST, Server, hello},
};

const REQUIRED: &str = "proxy_protocol: required";

fn openings(engine: Engine) -> Vec<Vec<u8>> {
    let with_hello = |request: Vec<u8>| [request, hello(200, 47)].concat();
    engine.requests().into_iter().map(with_hello).collect()
}

/// Streams of which some may be read, with what comes first of each.
fn streams(engine: Engine, is_proxied: bool, rng: &mut Rng) -> Vec<(usize, Vec<u8>)> {
    let clear = engine.clear();
    let mut streams = openings(engine);
    streams.extend([
        clear.clone(),
        [CANCEL_REQUEST, &clear].concat(),
        [SSL_REQUEST, &clear].concat(),
        [GSSENC_REQUEST, &clear].concat(),
    ]);
    let mut before = || {
        let headers = proxies::headers(engine);
        let header = headers[rng.usize(..headers.len())].clone();
        match rng.u8(0..8) {
            _ if !is_proxied => vec![],
            0 => vec![],
            1 => header.repeat(2),
            _ => header,
        }
    };
    let with_header = |stream| {
        let before = before();
        (before.len(), [before, stream].concat())
    };
    streams.into_iter().map(with_header).collect()
}

/// A part of a stream, cut where something may depend on it, most often at the place where it belongs.
fn part(connection: &RawConnection, stream: &(usize, Vec<u8>), rng: &mut Rng) -> Segment {
    const PLACES: [usize; 14] = [0, 1, 5, 6, 8, 9, 10, 14, 16, 22, 36, 41, 42, 64];
    let (begins, stream) = stream;
    let mut place = || {
        let place = PLACES[rng.usize(..PLACES.len())];
        let place = place + if rng.bool() { *begins } else { 0 };
        place.min(stream.len())
    };
    let (from, to) = (place(), place());
    let to = if to <= from { stream.len() } else { to };
    // What a link takes.
    let to = to.min(from + 1300);
    let moved = match rng.u8(0..8) {
        0 => 0_u32.wrapping_sub(rng.u32(0..20)),
        1 => rng.u32(0..20),
        _ => 0,
    };
    let segment = connection.data((from as u32).wrapping_add(moved), &stream[from..to]);
    let mut options = vec![];
    if rng.u8(0..8) == 0 {
        // DSS of Multipath TCP: the data begins the stream.
        options = vec![30, 14, 0x20, 0x04, 0, 0, 0, 1, 0, 0, 0, 1, 0, 60];
    }
    Segment {
        flags: match rng.u8(0..24) {
            0 => PSH | ACK | FIN,
            1 => PSH | ACK | URG,
            2 => PSH | ACK | SYN,
            3 => PSH,
            _ => PSH | ACK,
        },
        urgent: if rng.u8(0..24) == 0 {
            rng.u16(0..64)
        } else {
            0
        },
        checksum: match rng.u8(0..6) {
            0 => Checksum::Wrong,
            1 => Checksum::OfPseudoHeader,
            _ => Checksum::Right,
        },
        options,
        ..segment
    }
}

/// Sends a storm over one connection. `is_proxied`: whether headers come first.
fn blow(client: &RawClient, engine: Engine, is_proxied: bool, rng: &mut Rng) {
    let streams = streams(engine, is_proxied, rng);
    let two = [0, 1].map(|_| &streams[rng.usize(..streams.len())]);
    let mut connection = client.connection(engine.port());
    if rng.u8(0..4) == 0 {
        let data = part(&connection, two[0], rng).data;
        let option: &[u8] = if rng.bool() { &[34, 2, 1, 1] } else { &[] };
        let syn = connection.syn();
        connection.send(&Segment {
            options: [&syn.options, option].concat(),
            data,
            ..syn
        });
    }
    connection.ask();
    let (count, acknowledged) = (rng.usize(1..14), rng.usize(0..4));
    for number in 0..count {
        if number >= acknowledged {
            connection.send(&connection.segment());
        }
        connection.send(&part(&connection, two[rng.usize(..2)], rng));
    }
    client.fence();
    for stream in two {
        connection.reset(stream.0 as u32);
        connection.reset(stream.1.len() as u32);
    }
    connection.reset(0);
}

#[test]
fn storm_of_segments_brings_no_plaintext_in() {
    let mut rng = Rng::with_seed(61);
    for (more, mode) in [("", "native"), (REQUIRED, "generic"), (REQUIRED, "native")] {
        let is_proxied = more == REQUIRED;
        let laboratory = Laboratory::with(&format!("storm{}", more.len()), mode, more);
        let db = &laboratory.net.db;
        db.sysctl(&[("ipv4/tcp_fastopen", 0x603)]);
        for engine in Engine::ALL {
            for (protocol, cookies) in [(None, 1), (None, 2), (Some(Protocol::MPTCP), 1)] {
                db.sysctl(&[("ipv4/tcp_syncookies", cookies)]);
                let mut server = Server::start_at(db, engine, engine.port(), protocol, |_| {});
                for client in laboratory.clients() {
                    for round in 0..rounds() {
                        blow(&client, engine, is_proxied, &mut rng);
                        if is_proxied {
                            proxies::assert_tls_only(&mut server);
                        } else {
                            server.assert_tls_only();
                        }
                        if round % 16 == 0 {
                            server.forget();
                        }
                        client.forget();
                    }
                }
            }
        }
    }
}

/// Storms of each kind.
fn rounds() -> usize {
    let full = std::env::var_os("FILTER_TESTS_FULL").is_some();
    if full { 150 } else { 20 }
}

/// Segments lost, twice, in another order, and damaged: once they come in order, the server reads them whole.
#[test]
fn client_over_a_bad_network_gets_in() {
    let mut rng = Rng::with_seed(67);
    for (more, mode, address) in [("", "generic", RAW6), (REQUIRED, "native", RAW4)] {
        let is_proxied = more == REQUIRED;
        let laboratory = Laboratory::with(&format!("weather{}", more.len()), mode, more);
        let client = laboratory.client(address);
        for engine in Engine::ALL {
            let mut server = laboratory.serve(engine);
            for _ in 0..rounds() {
                let headers = proxies::headers(engine);
                let header = match is_proxied {
                    true => headers[rng.usize(..headers.len())].clone(),
                    false => vec![],
                };
                let openings = openings(engine);
                let opening = &openings[rng.usize(..openings.len())];
                let stream = [&header[..], opening].concat();
                // A header is sent at once.
                let mut cuts: Vec<_> = (0..rng.usize(0..6))
                    .map(|_| header.len() + rng.usize(..70))
                    .filter(|&cut| cut > 0)
                    .collect();
                cuts.extend([0, stream.len()]);
                cuts.sort_unstable();
                cuts.dedup();
                let pieces: Vec<_> = cuts.windows(2).map(|two| (two[0], two[1])).collect();
                let connection = client.open(engine.port());
                for _ in 0..rng.usize(0..12) {
                    let (from, to) = pieces[rng.usize(..pieces.len())];
                    let mut segment = connection.data(from as u32, &stream[from..to]);
                    if rng.bool() {
                        segment.checksum = Checksum::Wrong;
                        let at = rng.usize(..segment.data.len());
                        segment.data[at] ^= 1 << rng.u8(0..8);
                    }
                    connection.send(&segment);
                }
                for &(from, to) in &pieces {
                    connection.write(from as u32, &stream[from..to]);
                }
                server.wait_for_any(connection.from, &stream);
                connection.reset(stream.len() as u32);
                server.forget();
                client.forget();
            }
        }
    }
}
