//! How a connection begins with TLS: what may stand at each place of the client's stream, for each engine.

use crate::Engine;

/// Places of a stream that may be decisive, from its first byte on; a power of two. Past it nothing is judged.
pub const PLACES: usize = 64;

/// Ways in which streams begin, as a set: the highest bit of each of four lanes of 16 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Forms(pub u64);

impl Forms {
    pub const NONE: Self = Self(0);
    /// A ClientHello.
    pub const HELLO: Self = Self(1 << 15);
    /// A request for TLS, then a ClientHello.
    pub const REQUEST: Self = Self(1 << 31);
    /// PostgreSQL's request for GSSAPI, one for TLS, then a ClientHello.
    pub const GSSENC: Self = Self(1 << 47);
    /// PostgreSQL's CancelRequest.
    pub const CANCEL: Self = Self(1 << 63);

    const ALL: [Self; 4] = [Self::HELLO, Self::REQUEST, Self::GSSENC, Self::CANCEL];

    pub const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    pub const fn is_none(self) -> bool {
        self.0 == 0
    }
}

/// The bytes that may stand at one place, for all forms at once: masked, from `low` to `high`. Lanes as in
/// `Forms`. Compared without branches, which the verifier would follow one by one.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Byte {
    mask: u64,
    low: u64,
    /// With the highest bit of each lane, which a lower number does not take away.
    high: u64,
}

/// The highest bit of each lane.
const LANES: u64 = 0x8000_8000_8000_8000;
const ONE: u64 = 0x0001_0001_0001_0001;

impl Byte {
    const ANY: Self = Self {
        mask: 0,
        low: 0,
        high: LANES,
    };

    const fn with(self, form: Forms, mask: u8, low: u8, high: u8) -> Self {
        let lane = form.0.trailing_zeros() - 15;
        Self {
            mask: self.mask | (mask as u64) << lane,
            low: self.low | (low as u64) << lane,
            high: self.high | (high as u64) << lane,
        }
    }

    /// The forms that may have this byte here.
    #[inline(always)]
    pub const fn forms(&self, byte: u8) -> Forms {
        let byte = (byte as u64 * ONE) & self.mask;
        let from_low = (byte | LANES) - self.low;
        let to_high = self.high - byte;
        Forms(from_low & to_high & LANES)
    }
}

/// How an engine's streams begin.
#[repr(C)]
pub struct Opening {
    pub bytes: [Byte; PLACES],
    /// The places that make each form complete, a bit for each, in the order of the lanes.
    pub complete: [u64; 4],
    /// All forms.
    pub forms: Forms,
}

/// PostgreSQL, "Message Formats": SSLRequest, GSSENCRequest, and CancelRequest without its length.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];
const GSSENC_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 48];
const CANCEL_CODE: [u8; 4] = [4, 210, 22, 46];

/// Length of MySQL's SSLRequest packet with its header, in bytes.
const MYSQL_REQUEST: usize = 36;
/// Enough of a TLS record to tell that it is a ClientHello.
const HELLO: usize = 6;

impl Opening {
    const fn new() -> Self {
        Self {
            bytes: [Byte::ANY; PLACES],
            complete: [0; 4],
            forms: Forms::NONE,
        }
    }

    const fn byte(mut self, form: Forms, place: usize, mask: u8, low: u8, high: u8) -> Self {
        self.bytes[place] = self.bytes[place].with(form, mask, low, high);
        let lane = form.0.trailing_zeros() as usize / 16;
        self.complete[lane] |= 1 << place;
        self.forms = self.forms.or(form);
        self
    }

    const fn exactly(mut self, form: Forms, at: usize, bytes: &[u8]) -> Self {
        let mut place = 0;
        while place < bytes.len() {
            self = self.byte(form, at + place, 0xff, bytes[place], bytes[place]);
            place += 1;
        }
        self
    }

    /// A handshake record of at most 2^14 bytes and some, whose first message is a ClientHello (RFC 8446
    /// sections 4 and 5.1; the version of a record that is a ClientHello goes from SSL 3.0 to TLS 1.3).
    const fn hello(self, form: Forms, at: usize) -> Self {
        self.exactly(form, at, &[22, 3])
            .byte(form, at + 2, 0xff, 0, 4)
            .byte(form, at + 3, 0xff, 0, 0x40)
            .byte(form, at + 4, 0, 0, 0)
            .exactly(form, at + HELLO - 1, &[1])
    }

    /// MongoDB takes what answers message 0 or -1, by the bytes at places 8 to 11, for a message in the clear, and all else for
    /// TLS. There a ClientHello has its version at place 9 (RFC 8446 section 4.1.2), if its first record holds that.
    const fn mongodb() -> Self {
        Self::new()
            .hello(Forms::HELLO, 0)
            .byte(Forms::HELLO, 9, 0xff, 3, 3)
    }

    const fn postgresql() -> Self {
        Self::new()
            .hello(Forms::HELLO, 0)
            .exactly(Forms::REQUEST, 0, &SSL_REQUEST)
            .hello(Forms::REQUEST, SSL_REQUEST.len())
            .exactly(Forms::GSSENC, 0, &GSSENC_REQUEST)
            .exactly(Forms::GSSENC, GSSENC_REQUEST.len(), &SSL_REQUEST)
            .hello(Forms::GSSENC, GSSENC_REQUEST.len() + SSL_REQUEST.len())
            // The length: up to 256 bytes of key as of protocol 3.2 (PostgreSQL 18).
            .exactly(Forms::CANCEL, 0, &[0, 0])
            .byte(Forms::CANCEL, 2, 0xff, 0, 1)
            .byte(Forms::CANCEL, 3, 0, 0, 0)
            .exactly(Forms::CANCEL, 4, &CANCEL_CODE)
    }

    /// MySQL, "Protocol::SSLRequest": a packet of 32 bytes, the second of the connection, whose capabilities have
    /// CLIENT_SSL (0x0800). A server that has it reads nothing else of the packet.
    const fn mysql() -> Self {
        let mut opening = Self::new()
            .exactly(Forms::REQUEST, 0, &[32, 0, 0, 1])
            .byte(Forms::REQUEST, 4, 0, 0, 0)
            .byte(Forms::REQUEST, 5, 8, 8, 8);
        let mut place = 6;
        while place < MYSQL_REQUEST {
            opening = opening.byte(Forms::REQUEST, place, 0, 0, 0);
            place += 1;
        }
        opening.hello(Forms::REQUEST, MYSQL_REQUEST)
    }

    /// Whether every place of one of these forms, and no other, is among the places seen.
    #[inline(always)]
    pub const fn is_complete(&self, forms: Forms, seen: u64) -> bool {
        let lane = match forms {
            Forms::HELLO => 0,
            Forms::REQUEST => 1,
            Forms::GSSENC => 2,
            Forms::CANCEL => 3,
            _ => return false,
        };
        self.complete[lane] & !seen == 0
    }
}

/// The openings: that of engines that speak TLS from the first byte, PostgreSQL's, MySQL's and MongoDB's.
pub const OPENINGS: [Opening; 4] = [
    Opening::new().hello(Forms::HELLO, 0),
    Opening::postgresql(),
    Opening::mysql(),
    Opening::mongodb(),
];

/// The place of an engine's opening among `OPENINGS`.
pub const fn opening_of(engine: u32) -> usize {
    const POSTGRESQL: u32 = Engine::Postgresql as u32;
    const MYSQL: u32 = Engine::Mysql as u32;
    const MONGODB: u32 = Engine::Mongodb as u32;
    match engine {
        POSTGRESQL => 1,
        MYSQL => 2,
        MONGODB => 3,
        _ => 0,
    }
}

const _: () = {
    assert!(PLACES.is_power_of_two() && MYSQL_REQUEST + HELLO <= PLACES);
    assert!(Forms::ALL.len() == 4);
};

/// The kind of a stream's first bytes that are not TLS, for people: its bytes may hold passwords, and are not printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum OpeningKind {
    Unknown = 1,
    /// Judged in its middle: it was open before TLS was forced.
    Middle = 2,
    PostgresqlStartup = 3,
    PostgresqlCancel = 4,
    MysqlLogin = 5,
    RedisCommand = 6,
    MongodbMessage = 7,
    Http = 8,
    Ssh = 9,
    /// Where another request for TLS has to come first.
    ClientHello = 10,
    ProxyHeader = 11,
}

impl OpeningKind {
    pub const ALL: [Self; 11] = [
        Self::Unknown,
        Self::Middle,
        Self::PostgresqlStartup,
        Self::PostgresqlCancel,
        Self::MysqlLogin,
        Self::RedisCommand,
        Self::MongodbMessage,
        Self::Http,
        Self::Ssh,
        Self::ClientHello,
        Self::ProxyHeader,
    ];

    /// As people read it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unknown => "nothing known",
            Self::Middle => "a connection from before TLS was forced",
            Self::PostgresqlStartup => "PostgreSQL startup without TLS",
            Self::PostgresqlCancel => "PostgreSQL cancel request without TLS",
            Self::MysqlLogin => "MySQL login without TLS",
            Self::RedisCommand => "Redis command without TLS",
            Self::MongodbMessage => "MongoDB message without TLS",
            Self::Http => "HTTP request",
            Self::Ssh => "SSH",
            Self::ClientHello => "TLS without the request for it that must come first",
            Self::ProxyHeader => "PROXY header",
        }
    }

    /// By the first bytes, in words of four as numbers, most significant byte first; zero where the segment has no more.
    pub const fn of(engine: u32, words: [u32; 4]) -> Self {
        const POSTGRESQL: u32 = Engine::Postgresql as u32;
        const MYSQL: u32 = Engine::Mysql as u32;
        const MONGODB: u32 = Engine::Mongodb as u32;
        const CANCEL: u32 = u32::from_be_bytes(CANCEL_CODE);
        let [first, second, _, fourth] = words;
        let operation = fourth.swap_bytes();
        let [a, b, _, number] = first.to_be_bytes();
        // OP_QUERY, OP_COMPRESSED and OP_MSG (MongoDB Wire Protocol), least significant byte first. Some lengths look as TLS
        // does.
        if engine == MONGODB && matches!(operation, 2004 | 2012 | 2013) {
            return Self::MongodbMessage;
        }
        if a == 22 && b == 3 {
            return Self::ClientHello;
        }
        match &first.to_be_bytes() {
            b"GET " | b"POST" | b"HEAD" | b"PUT " | b"DELE" | b"OPTI" | b"CONN" | b"PATC"
            | b"TRAC" | b"PRI " => return Self::Http,
            b"SSH-" => return Self::Ssh,
            b"PROX" | [13, 10, 13, 10] => return Self::ProxyHeader,
            [b'*', b'0'..=b'9', ..] => return Self::RedisCommand,
            _ => {}
        }
        match engine {
            // Protocol 3, whatever its minor version.
            POSTGRESQL if second >> 16 == 3 => Self::PostgresqlStartup,
            POSTGRESQL if second == CANCEL => Self::PostgresqlCancel,
            // The second packet of a connection.
            MYSQL if number == 1 => Self::MysqlLogin,
            _ => Self::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::{prelude::v1::*, vec};

    use super::*;

    /// The forms left after these bytes, and whether one is complete.
    fn judged(engine: Engine, bytes: &[u8]) -> (Forms, bool) {
        let opening = &OPENINGS[opening_of(engine as u32)];
        let (mut forms, mut seen) = (opening.forms, 0);
        for (place, &byte) in bytes.iter().enumerate().take(PLACES) {
            forms = forms.and(opening.bytes[place].forms(byte));
            seen |= 1 << place;
        }
        (forms, opening.is_complete(forms, seen))
    }

    const HELLO: [u8; 9] = [22, 3, 1, 2, 0, 1, 0, 1, 252];

    #[test]
    fn openings_are_told_from_everything_else() {
        let [request, gssenc] = [SSL_REQUEST, GSSENC_REQUEST];
        let cancel = [0, 0, 0, 16, 4, 210, 22, 46];
        let cases = [
            (HELLO.to_vec(), Forms::HELLO, true),
            ([&request[..], &HELLO].concat(), Forms::REQUEST, true),
            (
                [&gssenc[..], &request, &HELLO].concat(),
                Forms::GSSENC,
                true,
            ),
            ([&cancel[..], &[9; 8]].concat(), Forms::CANCEL, true),
            (request.to_vec(), Forms::REQUEST, false),
            (gssenc.to_vec(), Forms::GSSENC, false),
            ([&gssenc[..], &HELLO].concat(), Forms::NONE, false),
            ([&request[..], &request].concat(), Forms::NONE, false),
            (vec![0, 0, 0, 84, 0, 3, 0, 0], Forms::NONE, false),
            (vec![22, 3, 5], Forms::NONE, false),
            (vec![22, 3, 1, 0x41], Forms::NONE, false),
            (vec![22, 3, 1, 0, 0, 2], Forms::NONE, false),
        ];
        for (bytes, forms, complete) in cases {
            assert_eq!(
                judged(Engine::Postgresql, &bytes),
                (forms, complete),
                "{bytes:?}"
            );
        }
    }

    #[test]
    fn openings_without_tls_are_named() {
        let mysql = [0x55, 0, 0, 1, 0x85, 0xa6, 3, 0, 0, 0, 0, 1, 33];
        let op_msg = [[0x45, 0, 0, 0], [1, 0, 0, 0], [0; 4], [0xdd, 7, 0, 0]].concat();
        let startup = [0, 0, 0, 84, 0, 3, 0, 0, b'u', b's', b'e', b'r'];
        let cancel = [0, 0, 0, 16, 4, 210, 22, 46];
        for (engine, bytes, expected) in [
            (
                Engine::Postgresql,
                &startup[..],
                OpeningKind::PostgresqlStartup,
            ),
            (
                Engine::Postgresql,
                &cancel[..],
                OpeningKind::PostgresqlCancel,
            ),
            (Engine::Postgresql, b"GET / HTTP/1.1\r\n", OpeningKind::Http),
            (Engine::Postgresql, &SSL_REQUEST[..], OpeningKind::Unknown),
            (Engine::Redis, &startup[..], OpeningKind::Unknown),
            (
                Engine::Redis,
                b"*1\r\n$4\r\nPING\r\n",
                OpeningKind::RedisCommand,
            ),
            (Engine::Redis, b"PING", OpeningKind::Unknown),
            (Engine::Other, b"SSH-2.0-OpenSSH_9", OpeningKind::Ssh),
            (
                Engine::Other,
                b"PROXY TCP4 192.0.2.1",
                OpeningKind::ProxyHeader,
            ),
            (Engine::Mysql, &mysql[..], OpeningKind::MysqlLogin),
            (Engine::Mysql, &HELLO[..], OpeningKind::ClientHello),
            (Engine::Mongodb, &op_msg[..], OpeningKind::MongodbMessage),
            (
                Engine::Mongodb,
                &[&[22, 3, 0, 0, 7, 1, 0, 0], &op_msg[8..]].concat()[..],
                OpeningKind::MongodbMessage,
            ),
            (Engine::Mongodb, &[0; 16][..], OpeningKind::Unknown),
            (Engine::Other, b"", OpeningKind::Unknown),
        ] {
            let mut first = [0; 16];
            let length = bytes.len().min(16);
            first[..length].copy_from_slice(&bytes[..length]);
            let words = [0, 4, 8, 12].map(|at| {
                let word: [u8; 4] = first[at..at + 4].try_into().unwrap();
                u32::from_be_bytes(word)
            });
            let found = OpeningKind::of(engine as u32, words);
            assert_eq!(found, expected, "{engine:?} {bytes:?}");
        }
        for (place, kind) in (1..).zip(OpeningKind::ALL) {
            assert_eq!(kind as u32, place);
        }
    }

    #[test]
    fn mysql_asks_for_tls_by_a_bit() {
        for capabilities in 0..=255 {
            let mut bytes = [0; MYSQL_REQUEST].to_vec();
            bytes[..6].copy_from_slice(&[32, 0, 0, 1, 7, capabilities]);
            bytes.extend(HELLO);
            let expected = if capabilities & 8 != 0 {
                (Forms::REQUEST, true)
            } else {
                (Forms::NONE, false)
            };
            assert_eq!(judged(Engine::Mysql, &bytes), expected);
        }
        assert_eq!(judged(Engine::Mysql, &HELLO), (Forms::NONE, false));
    }

    #[test]
    fn every_byte_is_judged_as_a_range() {
        for engine in Engine::ALL {
            let opening = &OPENINGS[opening_of(engine as u32)];
            for rule in &opening.bytes {
                for byte in 0..=255 {
                    for form in Forms::ALL {
                        let lane = form.0.trailing_zeros() - 15;
                        let [mask, low, high] =
                            [rule.mask, rule.low, rule.high].map(|word| (word >> lane) as u8);
                        let expected = (low..=high).contains(&(byte & mask));
                        assert_eq!(!rule.forms(byte).and(form).is_none(), expected);
                    }
                }
            }
        }
    }
}
