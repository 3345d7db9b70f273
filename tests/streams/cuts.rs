//! Correct openings, cut and ordered in ways that no client can be blamed for: the server reads them whole.

use filter_tests::{
    frames::Rng,
    net::{Checksum, RawConnection},
};

use crate::{
    laboratory::{Laboratory, RAW4, RAW6},
    server::{Engine, hello},
};

const LENGTHS: [usize; 3] = [500, 1705, 8000];

/// The ways in which an engine's streams begin, with a ClientHello of this length.
fn openings(engine: Engine, length: usize) -> Vec<Vec<u8>> {
    let with_hello = |request: Vec<u8>| [request, hello(length, 7)].concat();
    engine.requests().into_iter().map(with_hello).collect()
}

/// Pieces of a stream that ends at `length`, from and to the places where it is cut.
fn pieces(cuts: &[usize], length: usize) -> Vec<(usize, usize)> {
    let ends = cuts.iter().copied().chain([length]);
    let starts = [0].into_iter().chain(cuts.iter().copied());
    starts.zip(ends).collect()
}

fn send(connection: &RawConnection, stream: &[u8], pieces: &[(usize, usize)]) {
    for &(from, to) in pieces {
        connection.write(from as u32, &stream[from..to]);
    }
}

#[test]
fn opening_cut_in_two_anywhere_is_read_whole() {
    for (mode, address) in [("native", RAW4), ("generic", RAW6)] {
        let laboratory = Laboratory::new("cut", mode);
        let client = laboratory.client(address);
        for engine in [Engine::Postgresql, Engine::Mysql, Engine::Redis] {
            let mut server = laboratory.serve(engine);
            for stream in LENGTHS.iter().flat_map(|&length| openings(engine, length)) {
                let later = [100, 255, 256, 499, stream.len() - 1];
                for cut in (1..=80).chain(later) {
                    for reversed in [false, true] {
                        let connection = client.open(engine.port());
                        let mut pieces = pieces(&[cut], stream.len());
                        if reversed {
                            pieces.reverse();
                        }
                        send(&connection, &stream, &pieces);
                        server.wait_for(connection.from, &stream);
                        connection.reset(stream.len() as u32);
                    }
                    server.forget();
                    client.forget();
                }
            }
        }
    }
}

#[test]
fn opening_in_many_pieces_in_any_order_is_read_whole() {
    let mut rng = Rng::with_seed(64);
    for (mode, address) in [("native", RAW6), ("generic", RAW4)] {
        let laboratory = Laboratory::new("pieces", mode);
        let client = laboratory.client(address);
        for engine in [Engine::Postgresql, Engine::Mysql, Engine::Mongodb] {
            let mut server = laboratory.serve(engine);
            for _ in 0..100 {
                let streams = openings(engine, rng.usize(500..=8000));
                let stream = &streams[rng.usize(..streams.len())];
                // Most cuts where bytes are judged.
                let mut cuts: Vec<_> = (0..rng.usize(2..10))
                    .map(|_| match rng.u8(0..4) {
                        0 => rng.usize(1..stream.len()),
                        _ => rng.usize(1..64),
                    })
                    .collect();
                cuts.sort_unstable();
                cuts.dedup();
                let mut pieces = pieces(&cuts, stream.len());
                if rng.bool() {
                    rng.shuffle(&mut pieces);
                }
                let repeated = pieces[rng.usize(..pieces.len())];
                pieces.insert(rng.usize(..=pieces.len()), repeated);
                let connection = client.open(engine.port());
                send(&connection, stream, &pieces);
                server.wait_for(connection.from, stream);
                connection.reset(stream.len() as u32);
                server.forget();
                client.forget();
            }
        }
    }
}

#[test]
fn opening_byte_by_byte_is_read_whole() {
    let laboratory = Laboratory::new("bytes", "native");
    for engine in Engine::ALL {
        let mut server = laboratory.serve(engine);
        for client in laboratory.clients() {
            for stream in openings(engine, 500) {
                let connection = client.open(engine.port());
                for (place, byte) in stream.chunks(1).enumerate() {
                    connection.write(place as u32, byte);
                }
                server.wait_for(connection.from, &stream);
            }
        }
    }
}

#[test]
fn keepalive_before_the_opening_keeps_no_client_out() {
    let laboratory = Laboratory::new("keepalive", "native");
    let client = laboratory.client(RAW4);
    for engine in Engine::ALL {
        let mut server = laboratory.serve(engine);
        for stream in openings(engine, 500) {
            let connection = client.open(engine.port());
            // Some keepalives carry a byte of garbage at the place before the next (RFC 9293 section 3.8.4).
            for garbage in [&b""[..], b"x"] {
                connection.send(&connection.data(u32::MAX, garbage));
            }
            connection.write(0, &stream);
            server.wait_for(connection.from, &stream);
        }
    }
}

/// The program sees what TCP discards: a bit that fell over on the way.
#[test]
fn damaged_opening_keeps_no_client_out() {
    let laboratory = Laboratory::new("damaged", "native");
    for engine in [Engine::Postgresql, Engine::Mysql, Engine::Other] {
        let mut server = laboratory.serve(engine);
        for client in laboratory.clients() {
            // Of every length modulo that of the parts that are summed up.
            for length in (300..365).chain([1400]) {
                let stream = openings(engine, length).pop().unwrap();
                // The last makes another request of PostgreSQL's of it.
                let (place, bit) = if length == 364 { (7, 1) } else { (0, 0x20) };
                let connection = client.open(engine.port());
                let mut damaged = connection.data(0, &stream);
                damaged.data[place] ^= bit;
                damaged.checksum = Checksum::Wrong;
                connection.send(&damaged);
                connection.write(0, &stream);
                server.wait_for(connection.from, &stream);
                connection.reset(stream.len() as u32);
                client.forget();
            }
        }
        let counted = laboratory.connections(engine);
        assert_eq!(counted, serde_json::json!({"tls": 2 * 66}), "{engine:?}");
    }
}
