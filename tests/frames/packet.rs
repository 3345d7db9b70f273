//! One packet, whole or in fragments.

use std::net::IpAddr;

use filter_common::Protocol;

use crate::frames::{
    addressing::Addressing,
    checksum::{checksum, transport_checksum},
    extensions::{Extension, chain, fragment},
    kinds::{IPV4, IPV6},
};

/// "More fragments" in IPv4's flags and offset.
pub const MORE: u16 = 0x2000;

/// Length of the transport header and payload of a packet: both protocols alike, so that every plan
/// of fragments fits both.
pub const SEGMENT: usize = 40;

/// An 802.1Q or 802.1ad tag: its type and control information (the VLAN id in the low 12 bits).
pub type Tag = (u16, u16);

/// Part of a packet's body, as a fragment carries it.
#[derive(Clone, Debug)]
pub struct Piece {
    /// In units of 8 bytes.
    pub offset: u16,
    pub more: bool,
    pub bytes: Vec<u8>,
    /// Kind of the first header in the body, where the fragment lies about it.
    pub next: Option<u8>,
}

/// One packet; what is `None` is written as it should be.
#[derive(Clone, Debug)]
pub struct Packet {
    pub addressing: Addressing,
    pub id: u32,
    pub tags: Vec<Tag>,
    pub ethertype: Option<u16>,
    pub version: Option<u8>,
    /// IPv4's IHL.
    pub header_words: Option<u8>,
    /// IPv4's total length, IPv6's payload length.
    pub length: Option<u16>,
    /// IPv4's flags and fragment offset.
    pub flags_and_offset: u16,
    /// IPv4's protocol, IPv6's first next header.
    pub protocol: Option<u8>,
    /// IPv4 options, padded to words with end-of-options.
    pub options: Vec<u8>,
    /// Headers in every fragment (IPv6).
    pub extensions: Vec<Extension>,
    /// Headers that are fragmented like the payload.
    pub inner: Vec<Extension>,
    /// Transport header and payload.
    pub segment: Vec<u8>,
}

impl Packet {
    /// A UDP datagram or TCP SYN that Linux accepts, with the id in it.
    pub fn new(addressing: &Addressing, id: u32) -> Self {
        Self {
            addressing: addressing.clone(),
            id,
            tags: vec![],
            ethertype: None,
            version: None,
            header_words: None,
            length: None,
            flags_and_offset: 0,
            protocol: None,
            options: vec![],
            extensions: vec![],
            inner: vec![],
            segment: segment(addressing, id),
        }
    }

    /// What fragments carry: the kind of its first header, and the bytes.
    pub fn body(&self) -> (u8, Vec<u8>) {
        chain(
            &self.inner,
            self.addressing.protocol_number(),
            &self.segment,
        )
    }

    /// The packet, not fragmented.
    pub fn frame(&self) -> Vec<u8> {
        let (next, body) = self.body();
        let (next, body) = chain(&self.extensions, next, &body);
        self.ethernet(&self.ip(next, &body))
    }

    /// One fragment of the packet.
    pub fn fragment(&self, piece: &Piece) -> Vec<u8> {
        let next = piece.next.unwrap_or(self.body().0);
        if self.addressing.is_v4() {
            let mut packet = self.clone();
            packet.flags_and_offset = piece.offset & 0x1fff | if piece.more { MORE } else { 0 };
            return packet.ethernet(&packet.ip(next, &piece.bytes));
        }
        let mut extensions = self.extensions.clone();
        extensions.push(fragment(piece.offset, piece.more, self.id));
        let (next, body) = chain(&extensions, next, &piece.bytes);
        self.ethernet(&self.ip(next, &body))
    }

    pub fn fragments(&self, pieces: &[Piece]) -> Vec<Vec<u8>> {
        pieces.iter().map(|piece| self.fragment(piece)).collect()
    }

    /// The body's bytes from `from` to `to`, as an honest fragment.
    pub fn piece(&self, from: usize, to: usize) -> Piece {
        let (_, body) = self.body();
        Piece {
            offset: (from / 8) as u16,
            more: to < body.len(),
            bytes: body[from..to].to_vec(),
            next: None,
        }
    }

    /// Honest fragments that end at each of `cuts`, multiples of 8, and at the body's end.
    pub fn split(&self, cuts: &[usize]) -> Vec<Piece> {
        let ends = cuts.iter().copied().chain([self.body().1.len()]);
        let starts = [0].into_iter().chain(cuts.iter().copied());
        starts
            .zip(ends)
            .map(|(from, to)| self.piece(from, to))
            .collect()
    }

    fn ethernet(&self, packet: &[u8]) -> Vec<u8> {
        let ethertype = if self.addressing.is_v4() { IPV4 } else { IPV6 };
        let mut frame = self.addressing.destination_mac.to_vec();
        frame.extend(self.addressing.source_mac);
        for (kind, control) in &self.tags {
            frame.extend(kind.to_be_bytes());
            frame.extend(control.to_be_bytes());
        }
        frame.extend(self.ethertype.unwrap_or(ethertype).to_be_bytes());
        frame.extend(packet);
        frame
    }

    fn ip(&self, next: u8, body: &[u8]) -> Vec<u8> {
        let next = self.protocol.unwrap_or(next);
        match (self.addressing.source, self.addressing.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let mut options = self.options.clone();
                options.resize(options.len().next_multiple_of(4), 0);
                let header_length = 20 + options.len();
                let words = self.header_words.unwrap_or(header_length as u8 / 4);
                let length = (header_length + body.len()) as u16;
                let mut header = vec![self.version.unwrap_or(4) << 4 | words & 0xf, 0];
                header.extend(self.length.unwrap_or(length).to_be_bytes());
                header.extend((self.id as u16).to_be_bytes());
                header.extend(self.flags_and_offset.to_be_bytes());
                header.extend([64, next, 0, 0]);
                header.extend(source.octets());
                header.extend(destination.octets());
                header.extend(options);
                // Linux sums as many words as the header claims to have.
                let summed = [&header[..], body].concat();
                let summed = &summed[..(usize::from(words & 0xf) * 4).min(summed.len())];
                let sum = checksum(&[summed]);
                header[10..12].copy_from_slice(&sum.to_be_bytes());
                header.extend(body);
                header
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let mut packet = vec![self.version.unwrap_or(6) << 4, 0, 0, 0];
                packet.extend(self.length.unwrap_or(body.len() as u16).to_be_bytes());
                packet.extend([next, 64]);
                packet.extend(source.octets());
                packet.extend(destination.octets());
                packet.extend(body);
                packet
            }
            (source, destination) => panic!("{source} and {destination} are of two families"),
        }
    }
}

/// UDP header and data that begins with the id, or a TCP SYN whose sequence number it is.
pub(super) fn segment(addressing: &Addressing, id: u32) -> Vec<u8> {
    let mut segment = addressing.source_port.to_be_bytes().to_vec();
    segment.extend(addressing.destination_port.to_be_bytes());
    let sum_at = match addressing.protocol {
        Protocol::Udp => {
            segment.extend((SEGMENT as u16).to_be_bytes());
            segment.extend([0, 0]);
            segment.extend(id.to_be_bytes());
            segment.resize(SEGMENT, 0x55);
            6
        }
        Protocol::Tcp => {
            segment.extend(id.to_be_bytes());
            segment.extend([0, 0, 0, 0]);
            // Header of SEGMENT bytes, SYN, window.
            segment.extend([(SEGMENT / 4) as u8 * 16, 0x02, 0xff, 0xff, 0, 0, 0, 0]);
            // Maximum segment size, then no-operations.
            segment.extend([2, 4, 0x05, 0x00]);
            segment.resize(SEGMENT, 1);
            16
        }
    };
    let sum = transport_checksum(addressing, &segment);
    segment[sum_at..sum_at + 2].copy_from_slice(&sum.to_be_bytes());
    segment
}
