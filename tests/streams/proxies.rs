//! Connections that a load balancer begins with a PROXY header, where the policy requires one.

use filter_tests::{
    frames::Rng,
    net::{Checksum, RawClient, RawConnection},
};

use crate::{
    laboratory::{Laboratory, RAW4, RAW6},
    server::{Engine, Server, hello},
};

const ENGINES: [Engine; 3] = [Engine::Postgresql, Engine::Mysql, Engine::Other];

pub fn version_2(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
    let mut header = b"\r\n\r\n\0\r\nQUIT\n".to_vec();
    header.extend([0x20 | command, family]);
    header.extend((rest.len() as u16).to_be_bytes());
    header.extend(rest);
    header
}

/// Headers as load balancers write them, the longest included: MariaDB takes 256 bytes.
pub fn headers(engine: Engine) -> Vec<Vec<u8>> {
    let longest = format!(
        "PROXY TCP6 {0} {0} 65535 65535\r\n",
        "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"
    );
    assert_eq!(longest.len(), 104);
    let most = if engine == Engine::Mysql { 256 } else { 1024 };
    vec![
        b"PROXY TCP4 198.51.100.1 192.0.2.1 4711 5432\r\n".to_vec(),
        longest.into_bytes(),
        b"PROXY UNKNOWN\r\n".to_vec(),
        version_2(0, 0, &[]),
        version_2(1, 0x11, &[7; 12]),
        version_2(1, 0x21, &[b'\n'; 36]),
        version_2(1, 0x11, &[0x16; 225]),
        version_2(1, 0x11, &vec![3; most - 16]),
    ]
}

/// What is none, or comes too long.
fn no_headers(engine: Engine) -> Vec<Vec<u8>> {
    let most = if engine == Engine::Mysql { 256 } else { 1024 };
    let mut version_3 = version_2(1, 0x11, &[7; 12]);
    version_3[12] = 0x31;
    vec![
        vec![],
        b"PROXY TCP4 198.51.100.1\n 192.0.2.1 4711 5432\r\n".to_vec(),
        b"PROXY TCP4\r198.51.100.1 192.0.2.1 4711 5432\r\n".to_vec(),
        b"PROXY \0\r\n".to_vec(),
        b"PROXI UNKNOWN\r\n".to_vec(),
        [b"PROXY ", &[b'x'; 100][..], b"\r\n"].concat(),
        version_2(2, 0x11, &[7; 12]),
        version_3,
        version_2(1, 0x11, &vec![7; most - 15]),
    ]
}

/// Where a server goes on after a header. Own code on purpose: it must not share a mistake with the program.
fn after_header(read: &[u8]) -> Option<&[u8]> {
    if read.starts_with(b"\r\n\r\n\0\r\nQUIT\n") {
        let length = read.get(14..16)?;
        return read.get(16 + usize::from(u16::from_be_bytes([length[0], length[1]]))..);
    }
    let end = read.windows(2).position(|two| two == b"\r\n")?;
    read.starts_with(b"PROXY ").then(|| &read[end + 2..])
}

#[track_caller]
pub fn assert_tls_only(server: &mut Server) {
    server.poll();
    for accepted in &server.accepted {
        let opening = match &accepted.read[..] {
            [] => &[],
            read => after_header(read).unwrap_or_else(|| panic!("no header: {read:?}")),
        };
        let is_allowed = server.engine.may_read(opening);
        assert!(is_allowed, "{:?} read {opening:?}", server.engine);
    }
}

fn proxied(name: &str, mode: &'static str) -> Laboratory {
    Laboratory::with(name, mode, "proxy_protocol: required")
}

fn openings(engine: Engine) -> Vec<Vec<u8>> {
    let with_hello = |request: Vec<u8>| [request, hello(300, 43)].concat();
    engine.requests().into_iter().map(with_hello).collect()
}

/// The ways in which a correct client's segments arrive: how much of the stream each has, from where on.
fn ways(header: usize, length: usize, rng: &mut Rng) -> Vec<Vec<(usize, usize)>> {
    let mut bytewise = vec![(0, header)];
    bytewise.extend((header..header + 50).map(|at| (at, at + 1)));
    bytewise.push((header + 50, length));
    let cut = rng.usize(header + 1..length);
    vec![
        vec![(0, length)],
        vec![(0, header), (header, length)],
        vec![(0, cut), (cut, length)],
        // The opening is early, and comes again.
        vec![(header, length), (0, header), (header, length)],
        // The header comes twice.
        vec![(0, header), (0, cut), (cut, length)],
        bytewise,
    ]
}

#[test]
fn opening_behind_a_header_is_read_whole() {
    let mut rng = Rng::with_seed(17);
    for (mode, address) in [("native", RAW4), ("generic", RAW6)] {
        let laboratory = proxied("proxied", mode);
        let client = laboratory.client(address);
        for engine in ENGINES {
            let mut server = laboratory.serve(engine);
            for header in headers(engine) {
                for opening in openings(engine) {
                    let stream = [&header[..], &opening].concat();
                    for way in ways(header.len(), stream.len(), &mut rng) {
                        let connection = client.open(engine.port());
                        for (from, to) in way {
                            connection.write(from as u32, &stream[from..to]);
                        }
                        server.wait_for_any(connection.from, &stream);
                        connection.reset(stream.len() as u32);
                    }
                    assert_tls_only(&mut server);
                    server.forget();
                    client.forget();
                }
            }
        }
    }
}

#[test]
fn opening_behind_a_header_that_ends_the_handshake_is_read_whole() {
    let laboratory = proxied("proxied-handshake", "native");
    for engine in [Engine::Postgresql, Engine::Other] {
        let mut server = laboratory.serve(engine);
        for client in laboratory.clients() {
            for header in headers(engine) {
                for opening in openings(engine) {
                    let stream = [&header[..], &opening].concat();
                    let mut connection = client.connection(engine.port());
                    connection.ask();
                    connection.send(&connection.data(0, &stream[..stream.len().min(1400)]));
                    server.wait_for_any(connection.from, &stream);
                }
            }
            assert_tls_only(&mut server);
        }
    }
}

#[test]
fn plaintext_behind_a_header_is_never_read() {
    for (mode, address) in [("native", RAW6), ("generic", RAW4)] {
        let laboratory = proxied("proxied-clear", mode);
        let client = laboratory.client(address);
        for engine in Engine::ALL {
            let mut server = laboratory.serve(engine);
            for header in headers(engine) {
                for ends_handshake in [false, true] {
                    let stream = [&header[..], &engine.clear()].concat();
                    let mut connection = client.connection(engine.port());
                    connection.ask();
                    if !ends_handshake {
                        connection.send(&connection.segment());
                    }
                    connection.write(0, &stream);
                    connection.send(&connection.segment());
                    connection.write(header.len() as u32, &engine.clear());
                    connection.write(0, &header);
                    connection.write(header.len() as u32, &engine.clear());
                    connection.write(0, &stream);
                    client.fence();
                    assert_tls_only(&mut server);
                    connection.reset(0);
                    connection.reset(header.len() as u32);
                }
            }
            client.forget();
        }
    }
}

#[test]
fn connection_without_a_header_is_refused() {
    let laboratory = proxied("unproxied", "native");
    for engine in ENGINES {
        let mut server = laboratory.serve(engine);
        let client = laboratory.client(RAW4);
        for header in no_headers(engine) {
            let connection = client.open(engine.port());
            let stream = [&header[..], &openings(engine)[0]].concat();
            connection.write(0, &stream);
            client.fence();
            assert!(server.read_from(connection.from).concat().is_empty());
            connection.reset(0);
        }
        let database = laboratory.database(engine);
        let expected = no_headers(engine).len();
        assert_eq!(database["connections"]["refused"], expected, "{database}");
        assert_eq!(
            database["dropped"]["no-proxy-header"], expected,
            "{database}"
        );
    }
}

/// A server that takes what has come for the whole header, as MariaDB does, reads its rest as what follows.
#[test]
fn header_in_pieces_is_never_read() {
    let laboratory = proxied("proxied-pieces", "native");
    for engine in ENGINES {
        let mut server = laboratory.serve(engine);
        for client in laboratory.clients() {
            for header in headers(engine) {
                let stream = [&header[..], &openings(engine)[0]].concat();
                for cut in (1..header.len()).step_by(if header.len() > 110 { 17 } else { 1 }) {
                    let connection = client.open(engine.port());
                    for (from, to) in [(0, cut), (cut, stream.len()), (cut, header.len())] {
                        connection.write(from as u32, &stream[from..to]);
                    }
                    client.fence();
                    assert!(server.read_from(connection.from).concat().is_empty());
                    // It comes again, as it should.
                    connection.write(0, &stream);
                    server.wait_for_any(connection.from, &stream);
                    connection.reset(stream.len() as u32);
                    client.forget();
                }
                server.forget();
            }
        }
    }
}

/// Some with wrong checksums: what the program has seen, the server need not have read.
fn send_parts(connection: &RawConnection, parts: &[(usize, Vec<u8>)], rng: &mut Rng) {
    let mut order: Vec<_> = (0..parts.len()).chain(0..parts.len()).collect();
    rng.shuffle(&mut order);
    for number in order {
        let (place, part) = &parts[number];
        let mut segment = connection.data(*place as u32, part);
        segment.checksum = match rng.u8(0..6) {
            0 => Checksum::Wrong,
            1 | 2 => Checksum::OfPseudoHeader,
            _ => Checksum::Right,
        };
        connection.send(&segment);
    }
}

/// Two headers, of which the server reads one or a mixture, with what is TLS behind one of them and not behind the other.
fn mixtures(engine: Engine) -> Vec<Vec<(usize, Vec<u8>)>> {
    let opening = openings(engine).remove(0);
    let clear = engine.clear();
    let [short, long] = [12, 200].map(|length| version_2(1, 0x11, &vec![9; length]));
    let text = b"PROXY TCP4 198.51.100.1 192.0.2.1 4711 5432\r\n".to_vec();
    let same_length = version_2(1, 0x11, &vec![9; text.len() - 16]);
    // Behind the short header clear text, behind the long one TLS.
    let hidden = [&long[..], &opening].concat();
    let mut shown = [&short[..], &clear].concat();
    shown.resize(long.len(), b'x');
    let shown = [shown, opening.clone()].concat();
    vec![
        vec![
            (0, hidden.clone()),
            (0, shown.clone()),
            (short.len(), clear.clone()),
        ],
        vec![
            (0, short.clone()),
            (0, long.clone()),
            (short.len(), clear.clone()),
            (long.len(), opening.clone()),
        ],
        // The length of one in the beginning of the other.
        vec![
            (14, long[14..].to_vec()),
            (0, short.clone()),
            (14, short[14..].to_vec()),
            (short.len(), opening.clone()),
            (long.len(), clear.clone()),
        ],
        // A line's end within the text.
        vec![
            (0, text.clone()),
            (20, b"\r\n".to_vec()),
            (22, clear.clone()),
            (text.len(), opening.clone()),
        ],
        vec![
            (20, b"\r\n".to_vec()),
            (22, clear.clone()),
            (0, text.clone()),
            (text.len(), opening.clone()),
        ],
        vec![
            (0, text.clone()),
            (0, same_length),
            (text.len(), opening),
            (text.len(), clear),
        ],
    ]
}

fn try_mixtures(server: &mut Server, client: &RawClient, rng: &mut Rng) {
    let engine = server.engine;
    for parts in mixtures(engine) {
        for _ in 0..12 {
            let connection = client.open(engine.port());
            send_parts(&connection, &parts, rng);
            client.fence();
            assert_tls_only(server);
            for place in [0, 28, 45, 216] {
                connection.reset(place);
            }
            client.forget();
        }
        server.forget();
    }
}

#[test]
fn headers_that_disagree_bring_no_plaintext_in() {
    let mut rng = Rng::with_seed(29);
    let laboratory = proxied("headers", "native");
    for engine in ENGINES {
        let mut server = laboratory.serve(engine);
        for client in laboratory.clients() {
            try_mixtures(&mut server, &client, &mut rng);
        }
    }
}

/// As `cuts::damaged_opening_keeps_no_client_out`, in the length of a header.
#[test]
fn damaged_header_keeps_no_client_out() {
    let laboratory = proxied("proxied-damaged", "native");
    let engine = Engine::Postgresql;
    let mut server = laboratory.serve(engine);
    for client in laboratory.clients() {
        let header = version_2(1, 0x11, &[7; 12]);
        let stream = [&header[..], &openings(engine)[0]].concat();
        let connection = client.open(engine.port());
        let mut damaged = connection.data(0, &stream);
        damaged.data[15] ^= 0x20;
        damaged.checksum = Checksum::Wrong;
        connection.send(&damaged);
        connection.write(0, &stream);
        server.wait_for_any(connection.from, &stream);
    }
}

#[test]
fn session_from_before_a_header_was_required_goes_on() {
    let laboratory = Laboratory::new("unproxied-before", "native");
    for engine in ENGINES {
        laboratory.net.reload(&laboratory.policy(""));
        let mut server = laboratory.serve(engine);
        for client in laboratory.clients() {
            laboratory.net.reload(&laboratory.policy(""));
            let opening = &openings(engine)[0];
            let connection = client.open(engine.port());
            connection.write(0, opening);
            server.wait_for(connection.from, opening);
            let proxied = laboratory.policy("proxy_protocol: required");
            laboratory.net.reload(&proxied);
            connection.write(opening.len() as u32, b"more");
            let stream = [&opening[..], b"more"].concat();
            server.wait_for(connection.from, &stream);
        }
    }
}

/// What was required when the connection began with it is judged by it.
#[test]
fn header_of_a_connection_counts_when_none_is_required_any_more() {
    let laboratory = proxied("proxied-before", "native");
    for engine in ENGINES {
        let mut server = laboratory.serve(engine);
        for client in laboratory.clients() {
            for header in headers(engine) {
                for is_clear in [true, false] {
                    laboratory
                        .net
                        .reload(&laboratory.policy("proxy_protocol: required"));
                    let connection = client.open(engine.port());
                    connection.write(0, &header);
                    server.wait_for_any(connection.from, &header);
                    laboratory.net.reload(&laboratory.policy(""));
                    let opening = openings(engine).remove(0);
                    let sent = if is_clear { engine.clear() } else { opening };
                    connection.write(header.len() as u32, &sent);
                    client.fence();
                    assert_tls_only(&mut server);
                    if !is_clear {
                        server.wait_for_any(connection.from, &[&header[..], &sent].concat());
                    }
                    connection.reset(header.len() as u32);
                }
            }
        }
        server.forget();
    }
}
