//! The header of the PROXY protocol, with which a load balancer begins a connection: where it ends.
//!
//! HAProxy, "The PROXY protocol" versions 1 and 2: a sender writes the header at once, so that it is in one segment. Servers
//! count on it: MariaDB takes what has come by then for the whole header.

use aya_ebpf::bindings::__sk_buff;
use filter_common::{Engine, MAX_PROXY_HEADER};

use crate::socket::load;

/// Where a header ends, going by what was let pass: a number, and its complement in the higher half, so that two numbers
/// in one word, each written by a bitwise or, are none.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Header(u32);

impl Header {
    /// A segment that begins with no header.
    const NONE: u32 = 0;
    /// One that may, and ends before that is certain.
    const CUT: u32 = 1;

    #[inline(always)]
    pub const fn word(self) -> u64 {
        (!self.0 as u64) << 32 | self.0 as u64
    }

    /// `None`: no header, or several that disagree.
    #[inline(always)]
    pub fn of(word: u64) -> Option<Self> {
        let header = Self(word as u32);
        (header.word() == word).then_some(header)
    }

    /// In bytes.
    #[inline(always)]
    pub const fn length(self) -> u32 {
        self.0
    }
}

/// Content of the beginning of a stream.
pub enum Found {
    Header(Header),
    /// The segment ends before its header does.
    Cut,
    /// No header.
    Nothing,
}

/// Looks for a header in the `length` bytes at `at` of the packet, where a stream begins.
#[inline(always)]
pub fn find(skb: *mut __sk_buff, engine: u32, at: u32, length: u32) -> Found {
    match find_header(skb, engine, at, length) {
        Header::NONE => Found::Nothing,
        Header::CUT => Found::Cut,
        found => Found::Header(Header(found)),
    }
}

/// Section 2.2: a signature of 12 bytes, version and command, address family, and the length of what follows.
const BEGINNING_2: u32 = 16;
const SIGNATURE: [u32; 3] = [
    u32::from_be_bytes(*b"\r\n\r\n"),
    u32::from_be_bytes(*b"\0\r\nQ"),
    u32::from_be_bytes(*b"UIT\n"),
];

/// MariaDB takes no longer one, and of the length only the lower byte (10.11, `parse_proxy_protocol_header`): it would read
/// the rest of a longer one as what the client says.
const LONGEST_MYSQL: u32 = 256;
const MYSQL: u32 = Engine::Mysql as u32;

/// A global function, which the kernel verifies once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn find_header(skb: *mut __sk_buff, engine: u32, at: u32, length: u32) -> u32 {
    let longest = match engine {
        MYSQL => LONGEST_MYSQL,
        _ => MAX_PROXY_HEADER,
    };
    let Some([first]) = load::<u8, 1>(skb, at).filter(|_| length != 0) else {
        return Header::CUT;
    };
    match first {
        b'P' => find_text(skb, at, length),
        b'\r' if length < BEGINNING_2 => Header::CUT,
        b'\r' => {
            let Some(words) = load::<u32, 4>(skb, at) else {
                return Header::CUT;
            };
            let [a, b, c, rest] = words.map(u32::from_be);
            let header = BEGINNING_2 + (rest & 0xffff);
            // Version 2; whether the balancer speaks for a client or for itself.
            let is_version_2 = rest >> 24 == 0x20 || rest >> 24 == 0x21;
            if [a, b, c] != SIGNATURE || !is_version_2 || header > longest {
                Header::NONE
            } else if header > length {
                Header::CUT
            } else {
                header
            }
        }
        _ => Header::NONE,
    }
}

/// Section 2.1: printable text of at most 107 bytes with the CR LF at its end. Servers differ in what they make of other
/// bytes before that.
#[inline(always)]
fn find_text(skb: *mut __sk_buff, at: u32, length: u32) -> u32 {
    const LONGEST: u32 = 107;
    const NAME: &[u8] = b"PROXY ";
    let mut place = 0;
    while place < LONGEST {
        if place >= length {
            return Header::CUT;
        }
        let Some([byte]) = load::<u8, 1>(skb, at + place) else {
            return Header::CUT;
        };
        let is_name = NAME
            .get(place as usize)
            .is_none_or(|&expected| byte == expected);
        match byte {
            b' '..=b'~' if is_name => place += 1,
            b'\r' if place >= NAME.len() as u32 => break,
            _ => return Header::NONE,
        }
    }
    let length_with_end = place + 2;
    if length_with_end > LONGEST {
        return Header::NONE;
    }
    if length_with_end > length {
        return Header::CUT;
    }
    match load::<u8, 1>(skb, at + place + 1) {
        Some([b'\n']) => length_with_end,
        _ => Header::NONE,
    }
}
