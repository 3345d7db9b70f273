//! Forced TLS, segment by segment, through the shipped program: what a client might try, and what
//! reaches the server of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    process::Command,
};

use fastrand::Rng;
use filter_agent::kernel::filter::Ran;
use filter_common::{Fate, Reason};
use filter_tests::loaded::Loaded;
use serde_json::Value;

const SYN: u8 = 2;
const RST: u8 = 4;
const PSH: u8 = 8;
const ACK: u8 = 16;
const URG: u8 = 32;
const DATA: u8 = PSH | ACK;

const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
const MEMBER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 200);
const SERVER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

const SSL_REQUEST: &[u8] = &[0, 0, 0, 8, 4, 210, 22, 47];
const GSSENC_REQUEST: &[u8] = &[0, 0, 0, 8, 4, 210, 22, 48];
const CANCEL_REQUEST: &[u8] = &[0, 0, 0, 16, 4, 210, 22, 46, 1, 2, 3, 4, 5, 6, 7, 8];
const STARTUP: &[u8] = b"\0\0\0\x29\0\x03\0\0user\0postgres\0database\0postgres\0\0";
/// The beginning of a ClientHello in a TLS record.
const HELLO: &[u8] = &[
    22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3, 9, 9, 9, 9, 9, 9, 9, 9, 9,
];
const RECORD: &[u8] = &[23, 3, 3, 0, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9];
const ISN: u32 = 7_000_000;
const ACKNOWLEDGED: u32 = 900;

fn mysql_request() -> Vec<u8> {
    let mut request = vec![32, 0, 0, 1, 0x85, 0xae, 0x9f, 0x19];
    request.extend([0, 0, 0, 1, 45]);
    request.resize(36, 0);
    request
}

/// A login in the clear: the same, but for CLIENT_SSL.
fn mysql_login() -> Vec<u8> {
    let mut login = mysql_request();
    login[0] = 60;
    login[5] &= !8;
    login.extend(b"anyone\0\x14secretsecretsecretse\0");
    login
}

fn policy(engine: &str, more: &str) -> String {
    format!(
        "interfaces: [eth0]\ndatabases:\n  - {{name: orders, port: 5432, engine: {engine}, model: \
         dedicated, cluster: [{MEMBER}/32], rules: [{{cidr: 198.51.100.0/24}}], {more}}}\n"
    )
}

/// Connections of one client to a database of one engine, over IPv4.
struct Connection {
    loaded: Loaded,
    source: Ipv4Addr,
    port: u16,
}

impl Connection {
    fn new(engine: &str) -> Self {
        Self::with(engine, "")
    }

    fn with(engine: &str, more: &str) -> Self {
        let mut loaded = Loaded::new(&policy(engine, more));
        // Whatever is found under way is judged.
        loaded.filter.judge_existing().unwrap();
        Self {
            loaded,
            source: CLIENT,
            port: 40_000,
        }
    }

    fn open(engine: &str) -> Self {
        let connection = Self::new(engine);
        connection.begin();
        connection
    }

    fn begin(&self) {
        assert!(self.send(ISN, SYN, &[]).passes());
        assert!(self.send(ISN + 1, ACK, &[]).passes());
    }

    fn send(&self, sequence: u32, flags: u8, payload: &[u8]) -> Ran {
        self.send_frame(&self.frame(sequence, flags, payload))
    }

    fn send_frame(&self, frame: &[u8]) -> Ran {
        self.loaded.filter.run_packet(frame).unwrap()
    }

    /// Sends data at an offset of the stream; whether it passes as it is.
    fn data(&self, offset: u32, payload: &[u8]) -> bool {
        let frame = self.frame(ISN + 1 + offset, DATA, payload);
        let ran = self.send_frame(&frame);
        ran.passes() && ran.frame == frame
    }

    fn frame(&self, sequence: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
        let length = 40 + payload.len() as u16;
        frame.extend([0x45, 0]);
        frame.extend(length.to_be_bytes());
        frame.extend([0, 0, 0x40, 0, 64, 6, 0, 0]);
        frame.extend(self.source.octets());
        frame.extend(SERVER.octets());
        frame.extend(self.port.to_be_bytes());
        frame.extend(5432_u16.to_be_bytes());
        frame.extend(sequence.to_be_bytes());
        frame.extend(ACKNOWLEDGED.to_be_bytes());
        frame.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 1]);
        frame.extend(payload);
        frame
    }

    fn fates(&self) -> BTreeMap<Fate, u64> {
        let fates = self.loaded.filter.fates().unwrap();
        let fates = fates.into_iter();
        fates.map(|((_, fate, _), count)| (fate, count)).collect()
    }

    fn packets(&mut self, reason: Reason) -> u64 {
        let counted = self.loaded.counted();
        let of_reason = counted.into_iter().filter(|((_, r, _), _)| *r == reason);
        of_reason.map(|(_, count)| count).sum()
    }
}

/// The Internet checksum of what is summed up right: zero.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2);
    let mut sum: u32 = words
        .map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0)))
        .sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !sum as u16
}

/// Of an IPv4 packet of TCP: the header's, and that of the segment with its pseudo header.
fn checksums(frame: &[u8]) -> [u16; 2] {
    let (header, segment) = frame[14..].split_at(20);
    let length = (segment.len() as u16).to_be_bytes();
    let pseudo = [&header[12..], &[0, 6], &length, segment].concat();
    [checksum(header), checksum(&pseudo)]
}

#[test]
fn each_engine_begins_with_tls_in_its_own_way() {
    let mysql = mysql_request();
    let table: [(&str, &[&[u8]]); 8] = [
        ("postgresql", &[SSL_REQUEST, HELLO, RECORD]),
        ("postgresql", &[HELLO, RECORD]),
        ("postgresql", &[GSSENC_REQUEST, SSL_REQUEST, HELLO, RECORD]),
        ("mysql", &[&mysql, HELLO, RECORD]),
        ("redis", &[HELLO, RECORD]),
        ("mongodb", &[HELLO, RECORD]),
        ("other", &[HELLO, RECORD]),
        ("postgresql", &[CANCEL_REQUEST]),
    ];
    for (engine, segments) in table {
        let connection = Connection::open(engine);
        let mut offset = 0;
        for segment in segments {
            assert!(connection.data(offset, segment), "{engine} at {offset}");
            // Sent again, it is the same.
            assert!(connection.data(offset, segment), "{engine} at {offset}");
            offset += segment.len() as u32;
        }
        let fate = if segments[0] == CANCEL_REQUEST {
            Fate::Cancel
        } else {
            Fate::Tls
        };
        assert_eq!(connection.fates(), [(fate, 1)].into(), "{engine}");
    }
}

#[test]
fn what_does_not_begin_with_tls_is_refused() {
    let login = mysql_login();
    let no_ssl = {
        let mut request = mysql_request();
        request[5] &= !8;
        request
    };
    let glued = [SSL_REQUEST, STARTUP].concat();
    let mysql_glued = [&mysql_request(), &login[..]].concat();
    let gss_glued = [GSSENC_REQUEST, STARTUP].concat();
    let long_cancel = [CANCEL_REQUEST, STARTUP].concat();
    let server_hello = [22, 3, 3, 0, 90, 2, 0, 0];
    let table: [(&str, &[&[u8]]); 16] = [
        ("postgresql", &[STARTUP]),
        ("postgresql", &[b"GET / HTTP/1.1\r\n"]),
        ("postgresql", &[SSL_REQUEST, STARTUP]),
        ("postgresql", &[SSL_REQUEST, SSL_REQUEST]),
        ("postgresql", &[SSL_REQUEST, RECORD]),
        ("postgresql", &[&glued]),
        ("postgresql", &[&gss_glued]),
        ("postgresql", &[GSSENC_REQUEST, STARTUP]),
        ("postgresql", &[GSSENC_REQUEST, HELLO]),
        ("postgresql", &[GSSENC_REQUEST, SSL_REQUEST, STARTUP]),
        ("postgresql", &[&long_cancel]),
        ("mysql", &[&login]),
        ("mysql", &[&no_ssl]),
        ("mysql", &[&mysql_glued]),
        ("redis", &[b"*1\r\n$4\r\nPING\r\n"]),
        ("other", &[&server_hello]),
    ];
    for (number, (engine, segments)) in table.into_iter().enumerate() {
        let connection = Connection::open(engine);
        let (last, before) = segments.split_last().unwrap();
        let mut offset = 0;
        for segment in before {
            assert!(
                connection.data(offset, segment),
                "case {number} at {offset}"
            );
            offset += segment.len() as u32;
        }
        let answer = connection.send(ISN + 1 + offset, DATA, last);
        assert!(answer.is_answer(), "case {number}: {answer:?}");
        assert_eq!(connection.fates(), [(Fate::Refused, 1)].into(), "{number}");
        // And stays so, also for the beginning that it should have had.
        assert!(!connection.data(offset, last), "case {number}");
        assert!(!connection.data(offset, HELLO), "case {number}");
    }
}

#[test]
fn refused_client_is_told_and_its_next_packet_resets_the_server() {
    let connection = Connection::open("postgresql");
    assert!(connection.data(0, SSL_REQUEST));
    let answer = connection.send(ISN + 9, DATA, STARTUP);
    assert!(answer.is_answer());
    let frame = answer.frame;
    assert_eq!(frame[..12], [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1]);
    assert_eq!(checksums(&frame), [0, 0]);
    let number = |at: usize| u32::from_be_bytes(frame[at..at + 4].try_into().unwrap());
    // From the server's port, where its stream is, with the client's data acknowledged, and an end.
    assert_eq!(frame[34..38], [0x15, 0x38, 0x9c, 0x40]);
    assert_eq!(number(38), ACKNOWLEDGED);
    assert_eq!(number(42), ISN + 9 + STARTUP.len() as u32);
    assert_eq!(frame[47], PSH | ACK | 1);
    let text = String::from_utf8_lossy(&frame[54..]);
    assert!(text.starts_with('E') && text.contains("TLS is required here"));
    assert_eq!(number(55) as usize, frame.len() - 54 - 1);

    // The client's acknowledgement becomes a reset where the server's side of the stream is.
    let reset = connection.send(ISN + 9 + 48, ACK, &[]);
    assert!(reset.passes());
    assert_eq!(reset.frame.len(), 54);
    assert_eq!(checksums(&reset.frame), [0, 0]);
    assert_eq!(reset.frame[38..42], (ISN + 9).to_be_bytes());
    assert_eq!(reset.frame[47], RST);
    // What it sends again reaches the server without what it carries, which its kernel answers.
    let emptied = connection.send(ISN + 9, DATA, STARTUP);
    assert!(emptied.passes());
    assert_eq!((emptied.frame.len(), emptied.frame[47]), (54, ACK));
    assert_eq!(checksums(&emptied.frame), [0, 0]);
}

#[test]
fn answer_keeps_the_tags_of_a_tagged_frame() {
    let connection = Connection::new("mysql");
    let tagged = |sequence: u32, flags: u8, payload: &[u8]| {
        let mut frame = connection.frame(sequence, flags, payload);
        frame.splice(12..12, [0x81, 0, 0, 7, 0x88, 0xa8, 0, 9]);
        connection.send_frame(&frame)
    };
    assert!(tagged(ISN, SYN, &[]).passes());
    for login in [&mysql_login()[..], &[1; 300]] {
        let answer = tagged(ISN + 1, DATA, login);
        if answer.is_answer() {
            assert_eq!(
                answer.frame[12..24],
                [0x81, 0, 0, 7, 0x88, 0xa8, 0, 9, 8, 0, 0x45, 0]
            );
            assert_eq!(checksums(&answer.frame[8..]), [0, 0]);
        } else {
            assert_eq!(answer.frame[12..20], [0x81, 0, 0, 7, 0x88, 0xa8, 0, 9]);
        }
    }
    assert_eq!(connection.fates(), [(Fate::Refused, 1)].into());
}

#[test]
fn pieces_of_an_opening_that_cannot_be_judged_are_dropped_until_they_can() {
    for engine in ["postgresql", "mysql", "other"] {
        let opening = match engine {
            "postgresql" => [SSL_REQUEST, HELLO].concat(),
            "mysql" => [&mysql_request(), HELLO].concat(),
            _ => HELLO.to_vec(),
        };
        let mut connection = Connection::open(engine);
        // Byte by byte, forwards and backwards.
        let decisive = opening.len() - HELLO.len() + 6;
        let all: Vec<usize> = (0..decisive).chain((0..decisive).rev()).collect();
        for &at in &all {
            assert!(
                !connection.data(at as u32, &opening[at..=at]),
                "{engine}: byte {at}"
            );
        }
        assert_eq!(connection.packets(Reason::TlsUnclear), all.len() as u64);
        assert_eq!(connection.fates(), [].into());
        // What a client's kernel sends in the end.
        assert!(connection.data(0, &opening), "{engine}");
    }
}

#[test]
fn plain_byte_by_byte_is_refused_at_the_first() {
    for (engine, byte) in [
        ("postgresql", b'Q'),
        ("mysql", 60),
        ("redis", b'*'),
        ("other", 0),
    ] {
        let connection = Connection::open(engine);
        assert!(
            connection.send(ISN + 1, DATA, &[byte]).is_answer(),
            "{engine}"
        );
    }
}

#[test]
fn other_bytes_at_the_same_place_do_not_pass() {
    let connection = Connection::open("postgresql");
    assert!(connection.data(0, SSL_REQUEST));
    assert!(connection.data(8, HELLO));
    // The server may have dropped what was judged: a bad checksum, an old timestamp.
    assert!(!connection.data(0, &STARTUP[..8]));
    let connection = Connection::open("postgresql");
    assert!(connection.data(0, SSL_REQUEST));
    assert!(!connection.data(0, GSSENC_REQUEST));
    assert!(!connection.data(0, HELLO));
    assert!(!connection.data(0, CANCEL_REQUEST));
    let connection = Connection::open("postgresql");
    assert!(connection.data(0, HELLO));
    assert!(!connection.data(0, SSL_REQUEST));
    assert!(!connection.data(3, STARTUP));
}

#[test]
fn segment_that_reaches_into_the_opening_from_either_side_is_dropped() {
    let connection = Connection::open("postgresql");
    let before = connection.send(ISN.wrapping_sub(4), DATA, &[0; 20]);
    assert!(!before.passes() && !before.is_answer());
    assert!(!connection.data(2, STARTUP));
    assert!(!connection.data(21, STARTUP));
    // Past every decisive place it only waits for what belongs before it.
    assert!(connection.data(22, STARTUP));
    // A keepalive probe repeats the byte before the stream.
    assert!(connection.send(ISN, ACK, &[0]).passes());
}

#[test]
fn data_on_the_syn_urgent_data_and_fragments_are_dropped() {
    let connection = Connection::new("postgresql");
    assert!(!connection.send(ISN, SYN, SSL_REQUEST).passes());
    assert!(connection.send(ISN, SYN, &[]).passes());
    assert!(!connection.send(ISN + 1, DATA | URG, SSL_REQUEST).passes());
    assert!(!connection.send(ISN + 1, ACK | URG, &[]).passes());
    let mut fragment = connection.frame(ISN + 1, DATA, SSL_REQUEST);
    fragment[20] = 0x20;
    assert!(!connection.send_frame(&fragment).passes());
    let mut short = connection.frame(ISN + 1, DATA, SSL_REQUEST);
    short[46] = 0x40;
    assert!(!connection.send_frame(&short).passes());
    // On the third ACK it is judged like any other.
    assert!(connection.data(0, SSL_REQUEST));
}

#[test]
fn another_syn_moves_no_stream_that_the_server_may_have() {
    let connection = Connection::open("postgresql");
    // The server challenges it, and keeps the connection.
    assert!(connection.send(ISN + 1000, SYN, &[]).passes());
    assert!(connection.send(ISN + 1001, DATA, SSL_REQUEST).passes());
    assert!(!connection.data(0, STARTUP));
    // So it is with some; one more has to wait until the first is over.
    let connection = Connection::open("postgresql");
    for again in 1..8 {
        assert!(connection.send(ISN + 1000 * again, SYN, &[]).passes());
    }
    assert!(connection.send(ISN, SYN, &[]).passes());
    assert!(!connection.send(ISN + 8000, SYN, &[]).passes());
    for isn in (0..8).map(|again| ISN + 1000 * again) {
        assert!(connection.send(isn + 1, DATA, SSL_REQUEST).passes());
        assert!(!connection.send(isn + 1, DATA, GSSENC_REQUEST).passes());
    }
}

#[test]
fn connection_whose_beginning_was_not_seen_goes_on_with_records_only() {
    let connection = Connection::new("postgresql");
    assert!(connection.send(5000, ACK, &[]).passes());
    assert!(connection.send(5000, DATA, RECORD).passes());
    assert!(
        connection
            .send(6000, DATA, b"the middle of a record")
            .passes()
    );
    let other = Connection::new("postgresql");
    assert!(other.send(5000, DATA, b"Q\0\0\0\x0dselect 1\0").is_answer());
    assert_eq!(other.fates(), [(Fate::Refused, 1)].into());
}

#[test]
fn connection_from_before_is_let_run_until_it_is_judged() {
    let mut loaded = Loaded::new(&policy("postgresql", "force_tls: false"));
    loaded.apply(&policy("postgresql", ""));
    let mut connection = Connection {
        loaded,
        source: CLIENT,
        port: 40_000,
    };
    let query = b"Q\0\0\0\x0dselect 1\0";
    assert!(connection.send(5000, DATA, query).passes());
    assert!(connection.send(5014, DATA, query).passes());
    assert_eq!(connection.fates(), [(Fate::Unjudged, 1)].into());
    // A new one is not.
    connection.port += 1;
    connection.begin();
    assert!(connection.send(ISN + 1, DATA, STARTUP).is_answer());
    connection.port -= 1;
    connection.loaded.filter.judge_existing().unwrap();
    assert!(connection.send(5028, DATA, query).is_answer());
}

#[test]
fn cluster_is_exempt_and_monitor_refuses_nobody() {
    let mut connection = Connection::new("postgresql");
    connection.source = MEMBER;
    connection.begin();
    assert!(connection.data(0, STARTUP));
    assert_eq!(connection.fates(), [].into());

    let mut connection = Connection::with("postgresql", "monitor: true");
    connection.begin();
    connection.loaded.counted();
    assert!(connection.data(0, STARTUP));
    assert!(connection.data(STARTUP.len() as u32, STARTUP));
    let fates = connection.loaded.filter.fates().unwrap();
    assert_eq!(fates, [(("orders".into(), Fate::Refused, true), 1)].into());
    assert_eq!(connection.packets(Reason::NotTls), 1);
    // It is let run when it is no longer only monitored.
    connection.loaded.apply(&policy("postgresql", ""));
    assert!(connection.data(90, STARTUP));
}

#[test]
fn cancel_in_the_clear_can_be_forbidden() {
    let connection = Connection::with("postgresql", "cancel_in_clear: false");
    connection.begin();
    assert!(connection.send(ISN + 1, DATA, CANCEL_REQUEST).is_answer());
}

#[test]
fn connection_longer_than_its_sequence_numbers_goes_on() {
    let connection = Connection::open("postgresql");
    assert!(connection.data(0, SSL_REQUEST));
    assert!(connection.data(8, HELLO));
    // As large as generic mode sees them.
    let large = vec![0xab; 64_000];
    let mut offset = 28_u32;
    while offset < (1 << 31) - 64_000 {
        let frame = connection.frame(ISN + 1 + offset, DATA, &large);
        assert!(connection.send_frame(&frame).passes(), "at {offset}");
        offset += 64_000;
    }
    assert!(!connection.data(2, &large));
    assert!(connection.data(offset, &large));
    // Whoever has sent so much begins at the same numbers once more.
    assert!(connection.data(2, &large));
}

/// What a server could read: for each SYN, every byte that ever passed at each place.
#[derive(Default)]
struct Server {
    passed: BTreeMap<(u32, u32), BTreeSet<u8>>,
}

impl Server {
    fn take(&mut self, isns: &[u32], sequence: u32, payload: &[u8]) {
        for &isn in isns {
            for (at, &byte) in (0..).zip(payload) {
                let place = sequence.wrapping_add(at).wrapping_sub(isn + 1);
                if place < 64 {
                    self.passed.entry((isn, place)).or_default().insert(byte);
                }
            }
        }
    }

    /// Whether there is a choice of bytes that gives a stream which does not begin with TLS.
    fn could_read_plain(&self, isn: u32, allowed: &[&[Option<u8>]]) -> bool {
        let at = |place: usize| self.passed.get(&(isn, place as u32));
        let Some(first) = at(0) else {
            return false;
        };
        first.iter().any(|&first| {
            // All of the bytes that could follow this first byte must be those of one opening.
            !allowed.iter().any(|opening| {
                opening[0] == Some(first)
                    && opening.iter().enumerate().skip(1).all(|(place, expected)| {
                        let (Some(expected), Some(found)) = (expected, at(place)) else {
                            return true;
                        };
                        found.iter().all(|byte| byte == expected)
                    })
            })
        })
    }
}

#[test]
fn nothing_that_reaches_a_server_in_any_order_reads_as_plain() {
    fn some(bytes: &[u8]) -> Vec<Option<u8>> {
        bytes.iter().copied().map(Some).collect()
    }
    let hello = [Some(22), Some(3), None, None, None, Some(1)];
    let mysql: Vec<Option<u8>> = (0..36)
        .map(|at| {
            [Some(32), Some(0), Some(0), Some(1)]
                .get(at)
                .copied()
                .flatten()
        })
        .collect();
    let openings = [
        (
            "postgresql",
            vec![
                hello.to_vec(),
                [some(SSL_REQUEST), hello.to_vec()].concat(),
                [some(GSSENC_REQUEST), some(SSL_REQUEST), hello.to_vec()].concat(),
                some(&CANCEL_REQUEST[..8]),
            ],
        ),
        ("mysql", vec![[mysql, hello.to_vec()].concat()]),
        ("other", vec![hello.to_vec()]),
    ];
    let seed = fastrand::u64(..);
    let mut rng = Rng::with_seed(seed);
    let mut reached = 0;
    for (engine, openings) in openings {
        let mut connection = Connection::new(engine);
        let allowed: Vec<&[Option<u8>]> = openings.iter().map(Vec::as_slice).collect();
        let streams = [
            [SSL_REQUEST, HELLO, RECORD].concat(),
            [SSL_REQUEST, STARTUP].concat(),
            [GSSENC_REQUEST, SSL_REQUEST, HELLO].concat(),
            [GSSENC_REQUEST, STARTUP].concat(),
            [CANCEL_REQUEST, STARTUP].concat(),
            [HELLO, RECORD].concat(),
            [&mysql_request(), HELLO].concat(),
            mysql_login(),
            STARTUP.to_vec(),
        ];
        for _ in 0..1500 {
            connection.port = connection.port.wrapping_add(1).max(1024);
            let isns = [rng.u32(1000..2000), rng.u32(1000..2000)];
            let mut server = Server::default();
            let mut begun = Vec::new();
            for step in 0..rng.usize(2..30) {
                let isn = isns[rng.usize(..2)];
                if step == 0 || rng.u8(..12) == 0 {
                    if connection.send(isn, SYN, &[]).passes() {
                        begun.push(isn);
                    }
                    continue;
                }
                let stream = &streams[rng.usize(..streams.len())];
                let boundaries = [0, 0, 8, 16, 36, rng.usize(..stream.len())];
                let from = boundaries[rng.usize(..boundaries.len())].min(stream.len() - 1);
                let to = match rng.u8(..3) {
                    0 => stream.len(),
                    1 => (from + 8).min(stream.len()),
                    _ => rng.usize(from + 1..=stream.len()),
                };
                let sequence = isn + 1 + from as u32;
                let frame = connection.frame(sequence, DATA, &stream[from..to]);
                let ran = connection.send_frame(&frame);
                // Each SYN may be the one that the server took; it may have dropped what it likes.
                if ran.passes() && ran.frame == frame {
                    reached += 1;
                    server.take(&begun, sequence, &stream[from..to]);
                }
            }
            for &isn in &begun {
                assert!(
                    !server.could_read_plain(isn, &allowed),
                    "seed {seed}, {engine}: {:?}",
                    server.passed
                );
            }
        }
    }
    assert!(reached > 1000, "hardly anything passes: {reached}");
}

fn bpftool(arguments: &str) -> Value {
    let mut command = Command::new("bpftool");
    command.arg("--json").args(arguments.split(' '));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{arguments}: {output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Fault B17: a packet that interrupted one of the agent's test runs overwrote the segment that the test run went on
/// judging, so that the packet's connection was taken for one from before TLS was forced.
#[test]
fn test_runs_have_a_segment_of_their_own_which_no_packet_overwrites() {
    let connection = Connection::open("postgresql");
    assert!(connection.data(0, SSL_REQUEST));
    let program = connection.loaded.filter.program_id().unwrap();
    let program = bpftool(&format!("prog show id {program}"));
    let maps = program["map_ids"].as_array().unwrap();
    let name = |id: &Value| bpftool(&format!("map show id {id}"))["name"].clone();
    let id = maps.iter().find(|id| name(id) == "SCRATCH").unwrap();
    // The record of packets, then that of test runs.
    let is_used = |record: &Value| {
        let of_cpus = record["values"].as_array().unwrap().iter();
        let mut bytes = of_cpus.flat_map(|of_cpu| of_cpu["value"].as_array().unwrap());
        bytes.any(|byte| byte != "0x00")
    };
    let records = bpftool(&format!("map dump id {id}"));
    let used: Vec<bool> = records.as_array().unwrap().iter().map(is_used).collect();
    assert_eq!(used, [false, true]);
}
