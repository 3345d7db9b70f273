//! Headers between the IP header and the transport header.

use std::net::IpAddr;

use crate::frames::kinds::{AUTHENTICATION, FRAGMENT, ROUTING};

/// A header between the IP header and the transport header; its first byte, the next header's kind,
/// is filled in by `chain`.
#[derive(Clone, Debug)]
pub struct Extension {
    pub kind: u8,
    pub bytes: Vec<u8>,
}

/// Hop-by-hop or destination options of `units` + 1 times 8 bytes, all padding (PadN).
pub fn options(kind: u8, units: u8) -> Extension {
    let mut bytes = vec![0, units];
    let mut left = (usize::from(units) + 1) * 8 - 2;
    while left > 0 {
        let pad = left.min(200);
        match pad {
            1 => bytes.push(0),
            _ => bytes.extend([vec![1, pad as u8 - 2], vec![0; pad - 2]].concat()),
        }
        left -= pad;
    }
    Extension { kind, bytes }
}

/// A routing header with one address, of a type and with a number of segments left.
pub fn routing(route_type: u8, segments_left: u8, address: [u8; 16]) -> Extension {
    let mut bytes = vec![0, 2, route_type, segments_left, 0, 0, 0, 0];
    bytes.extend(address);
    Extension {
        kind: ROUTING,
        bytes,
    }
}

/// An authentication header with an integrity value of `words` times 4 bytes.
pub fn authentication(words: u8) -> Extension {
    let mut bytes = vec![0, words + 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1];
    bytes.resize(12 + usize::from(words) * 4, 0xaa);
    Extension {
        kind: AUTHENTICATION,
        bytes,
    }
}

/// An IPv6 fragment header; the offset in units of 8 bytes.
pub fn fragment(offset: u16, more: bool, id: u32) -> Extension {
    let mut bytes = vec![0, 0];
    bytes.extend((offset << 3 | u16::from(more)).to_be_bytes());
    bytes.extend(id.to_be_bytes());
    Extension {
        kind: FRAGMENT,
        bytes,
    }
}

/// Headers in a row before what is of kind `last`: the kind of the first, and the bytes.
pub fn chain(extensions: &[Extension], last: u8, payload: &[u8]) -> (u8, Vec<u8>) {
    let mut next = last;
    let mut bytes = payload.to_vec();
    for extension in extensions.iter().rev() {
        let mut header = extension.bytes.clone();
        header[0] = next;
        header.extend(bytes);
        (next, bytes) = (extension.kind, header);
    }
    (next, bytes)
}

/// The address as a routing header names it.
pub(super) fn segment_address(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}
