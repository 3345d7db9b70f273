//! Other content at the same place, by whichever way: the server reads one opening or nothing.

use std::{sync::Barrier, thread};

use filter_tests::net::{RawClient, Segment, URG};

use crate::{
    laboratory::{Laboratory, RAW4, RAW6},
    server::{CANCEL_REQUEST, Engine, Server, hello},
};

/// Streams of an engine that begin as they may, and some that do not.
fn streams(engine: Engine) -> Vec<Vec<u8>> {
    let with_hello = |request: Vec<u8>| [request, hello(200, 3)].concat();
    let mut streams: Vec<_> = engine.requests().into_iter().map(with_hello).collect();
    streams.push(engine.clear());
    // A record of another kind, and a request by which nobody asks for TLS.
    streams.push([&[22, 3, 1, 0, 50, 2][..], &[b'h'; 90]].concat());
    if engine == Engine::Postgresql {
        streams.push([CANCEL_REQUEST, &engine.clear()].concat());
    }
    streams
}

/// Sends two streams' heads and tails, cut at the same place, in this order: 0 and 1 are the heads, 2 and 3 the tails.
fn overlap(client: &RawClient, server: &mut Server, two: [&[u8]; 2], cut: usize, order: &[usize]) {
    let connection = client.open(server.engine.port());
    for &part in order {
        let stream = two[part % 2];
        match part {
            0 | 1 => connection.write(0, &stream[..cut]),
            _ => connection.write(cut as u32, &stream[cut..]),
        }
    }
    client.fence();
    server.assert_tls_only();
    connection.reset(two[0].len() as u32);
    connection.reset(two[1].len() as u32);
    connection.reset(0);
}

#[test]
fn two_contents_of_one_place_are_never_mixed() {
    const ORDERS: [&[usize]; 6] = [
        &[0, 1, 2, 3],
        &[0, 3],
        &[3, 0],
        &[2, 3, 0, 1],
        &[3, 2, 1, 0],
        &[2, 1, 0, 3],
    ];
    for (mode, address) in [("native", RAW4), ("generic", RAW6)] {
        let laboratory = Laboratory::new("overlaps", mode);
        let client = laboratory.client(address);
        for engine in [Engine::Postgresql, Engine::Mysql, Engine::Other] {
            let mut server = laboratory.serve(engine);
            let streams = streams(engine);
            let mut number = 0;
            for first in &streams {
                for second in streams.iter().filter(|second| *second != first) {
                    for cut in [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 14, 16, 21, 36, 41, 42, 60] {
                        // Each order for each pair, though not for each cut.
                        for order in ORDERS.iter().skip(number % 3).step_by(3) {
                            overlap(&client, &mut server, [first, second], cut, order);
                        }
                        number += 1;
                    }
                    server.forget();
                    client.forget();
                }
            }
        }
    }
}

#[test]
fn plaintext_that_overlaps_what_was_read_is_never_read() {
    let laboratory = Laboratory::new("covered", "native");
    let client = laboratory.client(RAW4);
    for engine in Engine::ALL {
        let mut server = laboratory.serve(engine);
        for request in engine.requests() {
            let stream = [request, hello(200, 3)].concat();
            for read in 1..=60 {
                // The server has the beginning; what follows covers some of it.
                let connection = client.open(engine.port());
                connection.write(0, &stream[..read]);
                let again = [&stream[..read], &engine.clear()].concat();
                connection.write(0, &again);
                let back = read.min(3);
                connection.write((read - back) as u32, &again[read - back..]);
                connection.write(0, &[&engine.clear()[..], &engine.clear()].concat());
                client.fence();
                server.poll();
                // Once all of the opening was read, all is allowed.
                server.assert_tls_only();
                connection.reset(0);
                connection.reset(read as u32);
            }
            server.forget();
            client.forget();
        }
    }
}

#[test]
fn two_threads_at_once_do_not_pass_two_contents() {
    for mode in ["generic", "native"] {
        let laboratory = Laboratory::new("race", mode);
        let engine = Engine::Postgresql;
        let mut server = laboratory.serve(engine);
        let streams = streams(engine);
        let client = laboratory.client(RAW4);
        let wires = [laboratory.net.wire(), laboratory.net.wire()];
        for round in 0..300 {
            let connection = client.open(engine.port());
            let [first, second] = [round, round / streams.len() + round + 1];
            let [first, second] = [first, second].map(|number| &streams[number % streams.len()]);
            let cut = [1, 4, 5, 8, 13, 60][round % 6];
            let frames = |stream: &[u8]| -> Vec<Vec<u8>> {
                let parts = [(cut, &stream[cut..]), (0, &stream[..cut])];
                let segments = parts.map(|(place, part)| connection.data(place as u32, part));
                segments
                    .map(|segment| connection.packet(&segment).frame())
                    .into()
            };
            let start = Barrier::new(2);
            thread::scope(|scope| {
                for (wire, frames) in wires.iter().zip([frames(first), frames(second)]) {
                    let start = &start;
                    scope.spawn(move || {
                        start.wait();
                        frames.iter().for_each(|frame| wire.send(frame));
                    });
                }
            });
            client.fence();
            server.assert_tls_only();
            for length in [0, cut, first.len(), second.len()] {
                connection.reset(length as u32);
            }
            server.forget();
            client.forget();
        }
    }
}

#[test]
fn urgent_data_moves_nothing() {
    let laboratory = Laboratory::new("urgent", "native");
    for engine in Engine::ALL {
        let mut server = laboratory.serve(engine);
        for client in laboratory.clients() {
            for request in engine.requests() {
                let stream = [request, hello(200, 3)].concat();
                for pointer in [0, 1, 2, 5, 8, 9, 14, 37, 60] {
                    for (flag, first) in [(URG, true), (URG, false), (0, true), (0, false)] {
                        let connection = client.open(engine.port());
                        let urgent = |segment: Segment| Segment {
                            flags: segment.flags | flag,
                            urgent: pointer,
                            ..segment
                        };
                        if first {
                            // The place of the urgent byte, before the byte is there.
                            connection.send(&urgent(connection.segment()));
                            connection.write(0, &stream);
                        } else {
                            connection.send(&urgent(connection.data(0, &stream)));
                        }
                        client.fence();
                        server.assert_tls_only();
                        connection.reset(0);
                        connection.reset(stream.len() as u32);
                    }
                }
            }
            server.forget();
            client.forget();
        }
    }
}
