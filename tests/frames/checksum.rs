//! Checksums of the Internet protocols.

use std::net::IpAddr;

use crate::frames::addressing::Addressing;

/// RFC 9293 section 3.1 and RFC 768, over a pseudo header; RFC 8200 section 8.1 for IPv6.
pub fn transport_checksum(addressing: &Addressing, segment: &[u8]) -> u16 {
    let address = |address: IpAddr| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let (source, destination) = (address(addressing.source), address(addressing.destination));
    let number = u16::from(addressing.protocol_number()).to_be_bytes();
    let length = (segment.len() as u32).to_be_bytes();
    match checksum(&[&source, &destination, &number, &length, segment]) {
        // Zero in UDP means that there is none.
        0 => 0xffff,
        sum => sum,
    }
}

/// RFC 1071, over parts of even length but the last.
pub(super) fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let words = words.map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0)));
    let sum: u32 = words.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    !((sum & 0xffff) + (sum >> 16)) as u16
}
