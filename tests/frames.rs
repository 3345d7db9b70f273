//! Ethernet frames, byte by byte: well-formed ones that Linux delivers, and every known way to
//! write one so that a filter and the network stack may read it differently.
//!
//! Own code on purpose: what builds the tests' packets must not share a mistake with what reads
//! them.

use std::net::IpAddr;

pub use fastrand::Rng;
pub use filter_common::Protocol;

pub const IPV4: u16 = 0x0800;
pub const IPV6: u16 = 0x86dd;
pub const VLAN: u16 = 0x8100;
pub const SERVICE_VLAN: u16 = 0x88a8;

pub const HOP_BY_HOP: u8 = 0;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const ROUTING: u8 = 43;
pub const FRAGMENT: u8 = 44;
pub const AUTHENTICATION: u8 = 51;
pub const NO_NEXT: u8 = 59;
pub const DESTINATION_OPTIONS: u8 = 60;

/// "More fragments" in IPv4's flags and offset.
pub const MORE: u16 = 0x2000;

/// Length of the transport header and payload of a packet: both protocols alike, so that every plan
/// of fragments fits both.
pub const SEGMENT: usize = 40;

/// A port that no test protects, where a filter that reads the wrong bytes finds it.
pub const DECOY_PORT: u16 = 9;

#[derive(Clone, Debug)]
pub struct Addressing {
    pub source_mac: [u8; 6],
    pub destination_mac: [u8; 6],
    pub source: IpAddr,
    pub destination: IpAddr,
    pub source_port: u16,
    pub destination_port: u16,
    pub protocol: Protocol,
}

impl Addressing {
    fn protocol_number(&self) -> u8 {
        match self.protocol {
            Protocol::Tcp => TCP,
            Protocol::Udp => UDP,
        }
    }

    fn is_v4(&self) -> bool {
        self.destination.is_ipv4()
    }
}

/// What is sent to find out whether it is delivered: frames in order. Delivered means that UDP data
/// arrives that begins with the id (4 bytes, big endian), or that a SYN with the id as its sequence
/// number is answered.
#[derive(Clone, Debug)]
pub struct Plan {
    pub name: String,
    pub frames: Vec<Vec<u8>>,
}

fn plan(name: impl Into<String>, frames: Vec<Vec<u8>>) -> Plan {
    Plan {
        name: name.into(),
        frames,
    }
}

/// An 802.1Q or 802.1ad tag: its type and control information (the VLAN id in the low 12 bits).
pub type Tag = (u16, u16);

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
fn segment(addressing: &Addressing, id: u32) -> Vec<u8> {
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
fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let words = words.map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0)));
    let sum: u32 = words.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    !((sum & 0xffff) + (sum >> 16)) as u16
}

/// Bytes that read as ports: from anywhere, to the decoy port.
fn decoy() -> Vec<u8> {
    [1234_u16.to_be_bytes(), DECOY_PORT.to_be_bytes()].concat()
}

/// An IPv4 option of unknown kind that ends in a decoy.
fn decoy_option(length: usize) -> Vec<u8> {
    let mut option = vec![0x9e, length as u8];
    option.extend(decoy().iter().cycle().take(length - 2));
    option
}

/// The address as a routing header names it.
fn segment_address(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

/// Every threat on the list that is for the addresses' family, by hand. The frames of plan `n`
/// carry the id `first_id + n`.
pub fn threats(addressing: &Addressing, first_id: u32) -> Vec<Plan> {
    let mut list = Threats {
        addressing,
        first_id,
        plans: Vec::new(),
    };
    list.vlan();
    list.lengths();
    list.versions();
    list.fragments();
    list.fragment_grid();
    list.authentication();
    if addressing.is_v4() {
        list.ipv4_options();
    } else {
        list.extension_chains();
        list.ipv6_fragments();
    }
    list.plans
}

struct Threats<'a> {
    addressing: &'a Addressing,
    first_id: u32,
    plans: Vec<Plan>,
}

impl Threats<'_> {
    /// The packet that the next plan is made of.
    fn next(&self) -> Packet {
        Packet::new(self.addressing, self.first_id + self.plans.len() as u32)
    }

    fn frame(&mut self, name: impl Into<String>, frame: Vec<u8>) {
        self.plans.push(plan(name, vec![frame]));
    }

    fn pieces(&mut self, name: impl Into<String>, packet: &Packet, pieces: &[Piece]) {
        self.plans.push(plan(name, packet.fragments(pieces)));
    }

    fn vlan(&mut self) {
        self.frame("plain", self.next().frame());
        for depth in 1..=16 {
            for (mix, kinds) in [
                ("802.1Q", [VLAN, VLAN]),
                ("802.1ad", [SERVICE_VLAN, SERVICE_VLAN]),
                ("802.1ad over 802.1Q", [SERVICE_VLAN, VLAN]),
                ("802.1Q over 802.1ad", [VLAN, SERVICE_VLAN]),
            ] {
                let mut packet = self.next();
                packet.tags = kinds
                    .iter()
                    .cycle()
                    .take(depth)
                    .map(|&kind| (kind, 0))
                    .collect();
                self.frame(format!("{depth} VID-0 tags, {mix}"), packet.frame());
            }
        }
        for (name, tag) in [
            ("VID 1", (VLAN, 1)),
            ("VID 4095", (VLAN, 0xfff)),
            ("VID 0, priority 7", (VLAN, 0xe000)),
            ("tag type 0x9100", (0x9100, 0)),
            ("tag type 0x9200", (0x9200, 0)),
        ] {
            let mut packet = self.next();
            packet.tags = vec![tag];
            self.frame(name, packet.frame());
            let mut packet = self.next();
            packet.tags = vec![(VLAN, 0), tag];
            self.frame(format!("VID 0, then {name}"), packet.frame());
        }
        for tags in 1..=5 {
            for missing in 1..=4 {
                let mut packet = self.next();
                packet.tags = vec![(VLAN, 0); tags];
                let mut frame = packet.frame();
                frame.truncate(14 + 4 * tags - missing);
                self.frame(format!("{tags} tags, cut by {missing}"), frame);
            }
        }
    }

    fn lengths(&mut self) {
        let frame = self.next().frame();
        for length in 14..frame.len() {
            let mut frame = self.next().frame();
            frame.truncate(length);
            self.frame(format!("cut to {length} bytes"), frame.clone());
            frame.resize(60.max(length), 0);
            self.frame(format!("cut to {length} bytes and padded"), frame);
        }
        let header = if self.addressing.is_v4() { 20 } else { 0 };
        let true_length = header + SEGMENT as u16;
        let mut lies: Vec<u16> = (0..=true_length + 8).collect();
        lies.extend([1500, 0x7fff, 0x8000, 0xffff]);
        for length in lies {
            for padding in [0, 20] {
                let mut packet = self.next();
                packet.length = Some(length);
                let mut frame = packet.frame();
                frame.resize(frame.len() + padding, 0);
                self.frame(
                    format!("length {length}, {padding} bytes of padding"),
                    frame,
                );
            }
        }
    }

    fn versions(&mut self) {
        for version in 0..=15 {
            let mut packet = self.next();
            packet.version = Some(version);
            self.frame(format!("version {version}"), packet.frame());
        }
        let mut packet = self.next();
        packet.ethertype = Some(if self.addressing.is_v4() { IPV6 } else { IPV4 });
        self.frame("ethertype of the other family", packet.frame());
    }

    fn ipv4_options(&mut self) {
        for words in 0..=15 {
            let mut packet = self.next();
            packet.header_words = Some(words);
            self.frame(format!("IHL {words} claimed, 5 written"), packet.frame());
        }
        for words in 6..=15 {
            let length = (words - 5) * 4;
            let mut packet = self.next();
            packet.options = vec![1; length];
            self.frame(format!("IHL {words}, no-operations"), packet.frame());
            let mut packet = self.next();
            packet.options = decoy_option(length);
            self.frame(
                format!("IHL {words}, decoy ports in an option"),
                packet.frame(),
            );
            let mut packet = self.next();
            packet.options = decoy().into_iter().cycle().take(length).collect();
            self.frame(format!("IHL {words}, decoy ports at +20"), packet.frame());
            let mut packet = self.next();
            packet.options = vec![0; length];
            packet.header_words = Some(5);
            self.frame(format!("IHL 5 claimed, {words} written"), packet.frame());
        }
        let IpAddr::V4(destination) = self.addressing.destination else {
            panic!("options are IPv4's");
        };
        let [a, b, c, d] = destination.octets();
        let named: [(&str, Vec<u8>); 13] = [
            ("loose source route, done", vec![131, 7, 8, a, b, c, d]),
            ("loose source route, one to go", vec![131, 7, 4, a, b, c, d]),
            ("strict source route, done", vec![137, 7, 8, a, b, c, d]),
            (
                "strict source route, one to go",
                vec![137, 7, 4, a, b, c, d],
            ),
            (
                "source route after no-operation",
                vec![1, 131, 7, 4, a, b, c, d],
            ),
            ("record route", vec![7, 7, 4, 0, 0, 0, 0]),
            ("timestamp", vec![68, 12, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            ("router alert", vec![148, 4, 0, 0]),
            ("security", vec![130, 11, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            ("stream id", vec![136, 4, 0, 0]),
            ("CIPSO", vec![134, 6, 0, 0, 0, 1]),
            ("option of length 0", vec![148, 0, 0, 0]),
            ("option longer than the header", vec![148, 40, 0, 0]),
        ];
        for (name, options) in named {
            let mut packet = self.next();
            packet.options = options;
            self.frame(name, packet.frame());
        }
        for (name, flags) in [("don't fragment", 0x4000), ("reserved flag", 0x8000)] {
            let mut packet = self.next();
            packet.flags_and_offset = flags;
            self.frame(name, packet.frame());
        }
    }

    fn authentication(&mut self) {
        for depth in 1..=12 {
            let mut packet = self.next();
            packet.inner = vec![authentication(3); depth];
            self.frame(format!("{depth} authentication headers"), packet.frame());
        }
        for words in 0..=8 {
            let mut packet = self.next();
            packet.inner = vec![authentication(words)];
            self.frame(format!("authentication, {words} words"), packet.frame());
        }
        if self.addressing.is_v4() {
            return;
        }
        for place in 0..3 {
            let mut packet = self.next();
            packet.inner = vec![options(DESTINATION_OPTIONS, 0); 2];
            packet.inner.insert(place, authentication(3));
            self.frame(format!("authentication at place {place}"), packet.frame());
        }
    }

    fn extension_chains(&mut self) {
        let address = segment_address(self.addressing.destination);
        let kinds = [
            ("hop-by-hop", options(HOP_BY_HOP, 0)),
            ("destination options", options(DESTINATION_OPTIONS, 0)),
            ("long destination options", options(DESTINATION_OPTIONS, 4)),
            ("routing type 0", routing(0, 0, address)),
            ("routing type 2", routing(2, 0, address)),
            ("routing type 4", routing(4, 0, address)),
            ("unknown routing type", routing(200, 0, address)),
            ("atomic fragment", fragment(0, false, 1)),
        ];
        for (name, extension) in &kinds {
            for depth in 1..=12 {
                let mut packet = self.next();
                packet.inner = vec![extension.clone(); depth];
                self.frame(format!("{depth} x {name}"), packet.frame());
            }
        }
        for depth in 1..=12 {
            let mut packet = self.next();
            packet.inner = kinds[..7]
                .iter()
                .map(|kind| kind.1.clone())
                .cycle()
                .take(depth)
                .collect();
            self.frame(
                format!("{depth} extension headers of all kinds"),
                packet.frame(),
            );
            let mut packet = self.next();
            packet.inner = vec![options(DESTINATION_OPTIONS, 0); depth];
            packet.inner[0] = options(HOP_BY_HOP, 0);
            self.frame(
                format!("hop-by-hop, then {} destination options", depth - 1),
                packet.frame(),
            );
        }
        for route_type in [0, 1, 2, 3, 4, 200] {
            for segments_left in [1, 2, 255] {
                let mut packet = self.next();
                packet.inner = vec![routing(route_type, segments_left, address)];
                let name = format!("routing type {route_type}, {segments_left} segments left");
                self.frame(name, packet.frame());
            }
        }
        for (name, bytes) in [
            (
                "jumbo payload option, length 0",
                vec![0, 0, 0xc2, 4, 0, 0, 0, 80],
            ),
            ("hop-by-hop, length 0", vec![0, 0, 1, 4, 0, 0, 0, 0]),
            ("router alert", vec![0, 0, 5, 2, 0, 0, 1, 0]),
            (
                "unknown option that must be discarded",
                vec![0, 0, 0x40, 4, 0, 0, 0, 0],
            ),
        ] {
            let mut packet = self.next();
            let kind = HOP_BY_HOP;
            packet.inner = vec![Extension { kind, bytes }];
            packet.length = name.ends_with("length 0").then_some(0);
            self.frame(name, packet.frame());
        }
        // A header that claims to be longer than it is moves the ports for whoever believes it.
        for units in [1, 2, 5, 31, 255] {
            let mut packet = self.next();
            let mut extension = options(DESTINATION_OPTIONS, 0);
            extension.bytes[1] = units;
            packet.inner = vec![extension];
            self.frame(
                format!("destination options claim {units} units"),
                packet.frame(),
            );
        }
    }

    /// Plans that both families have.
    fn fragments(&mut self) {
        let packet = self.next();
        self.pieces(
            "only the first fragment",
            &packet,
            &packet.split(&[16])[..1],
        );
        for cut in [8, 16, 24, 32] {
            let packet = self.next();
            let pieces = packet.split(&[cut]);
            self.pieces(format!("two fragments cut at {cut}"), &packet, &pieces);
            let packet = self.next();
            let pieces: Vec<_> = packet.split(&[cut]).into_iter().rev().collect();
            self.pieces(
                format!("two fragments cut at {cut}, last first"),
                &packet,
                &pieces,
            );
        }
        for (name, order) in [
            ("in order", [0, 1, 2, 3, 4]),
            ("reversed", [4, 3, 2, 1, 0]),
            ("first one last", [1, 2, 3, 4, 0]),
            ("mixed", [2, 0, 4, 1, 3]),
        ] {
            let packet = self.next();
            let pieces = packet.split(&[8, 16, 24, 32]);
            let pieces = order.map(|place| pieces[place].clone());
            self.pieces(format!("five fragments, {name}"), &packet, &pieces);
        }
        for length in [0, 4, 12, 15] {
            let packet = self.next();
            let mut pieces = packet.split(&[16]);
            pieces[0].bytes.truncate(length);
            let name = format!("first fragment of {length} bytes, rest from 16");
            self.pieces(name, &packet, &pieces);
        }
        let packet = self.next();
        let empty = Piece {
            more: true,
            ..packet.piece(0, 0)
        };
        let pieces = [vec![empty], packet.split(&[8])].concat();
        self.pieces(
            "an empty first fragment before the true one",
            &packet,
            &pieces,
        );

        // RFC 1858 and 3128: a later fragment writes over the ports or the flags of the first.
        let decoyed = |packet: &Packet| {
            let mut decoyed = packet.clone();
            decoyed.segment[..4].copy_from_slice(&decoy());
            decoyed
        };
        for (name, order) in [
            ("decoy first", [0, 1, 2]),
            ("decoy last", [1, 2, 0]),
            ("decoy between", [1, 0, 2]),
        ] {
            let packet = self.next();
            let decoy = decoyed(&packet).piece(0, 16);
            let pieces = [decoy, packet.piece(0, 16), packet.piece(16, SEGMENT)];
            let pieces = order.map(|place| pieces[place].clone());
            self.pieces(
                format!("two fragments at offset 0, {name}"),
                &packet,
                &pieces,
            );
        }
        let packet = self.next();
        let pieces = [
            packet.piece(0, 16),
            packet.piece(0, 16),
            packet.piece(16, SEGMENT),
        ];
        self.pieces("first fragment twice", &packet, &pieces);
        for (name, from) in [("offset 1", 8), ("offset 2", 16)] {
            let packet = self.next();
            let pieces = [packet.piece(0, 24), packet.piece(from, SEGMENT)];
            self.pieces(format!("overlap from {name}"), &packet, &pieces);
            let packet = self.next();
            let pieces = [packet.piece(from, SEGMENT), packet.piece(0, 24)];
            self.pieces(format!("overlap from {name}, last first"), &packet, &pieces);
            let packet = self.next();
            let pieces = [decoyed(&packet).piece(0, 24), packet.piece(from, SEGMENT)];
            self.pieces(
                format!("overlap from {name} after a decoy"),
                &packet,
                &pieces,
            );
        }
        let packet = self.next();
        let mut whole = packet.piece(0, SEGMENT);
        whole.offset = 1;
        let pieces = [
            Piece {
                more: true,
                ..decoyed(&packet).piece(0, 8)
            },
            whole,
        ];
        self.pieces(
            "whole segment at offset 1 after a decoy of 8 bytes",
            &packet,
            &pieces,
        );
        let packet = self.next();
        let pieces = [packet.piece(8, SEGMENT)];
        self.pieces("only a fragment at offset 1", &packet, &pieces);
        let packet = self.next();
        let pieces = [
            packet.piece(16, SEGMENT),
            decoyed(&packet).piece(0, 16),
            packet.piece(0, 16),
        ];
        self.pieces("rest, decoy, first", &packet, &pieces);
        let packet = self.next();
        let mut last = packet.piece(8, SEGMENT);
        last.offset = 8191;
        self.pieces(
            "end beyond 65,535 bytes",
            &packet,
            &[packet.piece(0, 8), last],
        );
        let packet = self.next();
        let whole = packet.piece(0, SEGMENT);
        self.pieces("atomic fragment", &packet, &[whole]);
    }

    /// Single fragments of every kind, none of which alone is a packet unless it is atomic.
    fn fragment_grid(&mut self) {
        for offset in [0, 1, 2, 8191] {
            for more in [false, true] {
                for length in [0, 3, 4, 8, 16, 24, SEGMENT] {
                    let packet = self.next();
                    let piece = Piece {
                        offset,
                        more,
                        bytes: packet.segment[..length].to_vec(),
                        next: None,
                    };
                    let name = format!("fragment at {offset}, more {more}, {length} bytes");
                    self.pieces(name, &packet, &[piece]);
                }
            }
        }
    }

    fn ipv6_fragments(&mut self) {
        let number = self.addressing.protocol_number();
        // Which headers a packet has is for the first fragment to say (RFC 8200 section 4.5).
        for lie in [
            NO_NEXT,
            DESTINATION_OPTIONS,
            58,
            if number == TCP { UDP } else { TCP },
        ] {
            for (name, liar) in [("second", 1), ("first", 0)] {
                for reversed in [false, true] {
                    let packet = self.next();
                    let mut pieces = packet.split(&[16]);
                    pieces[liar].next = Some(lie);
                    if reversed {
                        pieces.reverse();
                    }
                    let order = if reversed { ", last first" } else { "" };
                    let name = format!("{name} fragment says next header {lie}{order}");
                    self.pieces(name, &packet, &pieces);
                }
            }
        }
        // RFC 7112: the header chain goes on in the second fragment.
        for units in [0, 1, 4] {
            let mut packet = self.next();
            packet.inner = vec![options(DESTINATION_OPTIONS, units)];
            let header = 8 * (usize::from(units) + 1);
            for cut in (8..=header + 8).step_by(8) {
                packet.id = self.next().id;
                packet.segment = self.next().segment;
                let pieces = packet.split(&[cut]);
                let name = format!("destination options of {header} bytes, cut at {cut}");
                self.pieces(name.clone(), &packet, &pieces);
                packet.id = self.next().id;
                packet.segment = self.next().segment;
                let mut pieces = packet.split(&[cut]);
                pieces.reverse();
                self.pieces(name + ", last first", &packet, &pieces);
            }
        }
        self.chain_in_padding();
        for (name, outer) in [
            ("atomic", fragment(0, false, 7)),
            ("first", fragment(0, true, 7)),
            ("later", fragment(1, false, 7)),
        ] {
            let mut packet = self.next();
            packet.extensions = vec![outer];
            let pieces = packet.split(&[16]);
            self.pieces(
                format!("fragments inside a fragment that is {name}"),
                &packet,
                &pieces,
            );
        }
        for count in 1..=9 {
            let mut packet = self.next();
            packet.inner = vec![fragment(0, false, 7); count];
            let pieces = packet.split(&[8 * count + 8]);
            self.pieces(
                format!("{count} atomic headers inside fragments"),
                &packet,
                &pieces,
            );
        }
        // A fragmented packet whose fragments are fragmented.
        for cut in [8, 16, 24] {
            let packet = self.next();
            let pieces = packet.split(&[16]);
            let frames = pieces.iter().flat_map(|piece| {
                let mut outer = packet.clone();
                outer.id = !packet.id ^ u32::from(piece.offset);
                outer.inner = vec![fragment(piece.offset, piece.more, packet.id)];
                outer.segment = piece.bytes.clone();
                let cut = cut.min(outer.body().1.len() - 8);
                outer.fragments(&outer.split(&[cut]))
            });
            let frames = frames.collect();
            self.plans.push(plan(
                format!("fragments of fragments, cut at {cut}"),
                frames,
            ));
        }
        for (name, before) in [
            ("hop-by-hop", options(HOP_BY_HOP, 0)),
            ("destination options", options(DESTINATION_OPTIONS, 0)),
            (
                "routing",
                routing(0, 0, segment_address(self.addressing.destination)),
            ),
        ] {
            let mut packet = self.next();
            packet.extensions = vec![before];
            let pieces = packet.split(&[16]);
            self.pieces(
                format!("{name} before the fragment header"),
                &packet,
                &pieces,
            );
            let mut packet = self.next();
            packet.extensions = vec![];
            packet.inner = vec![options(DESTINATION_OPTIONS, 0)];
            let pieces = packet.split(&[8, 16, 24]);
            self.pieces(
                format!("{name}: each header in its own fragment"),
                &packet,
                &pieces,
            );
        }
    }

    /// The first fragment ends within the chain, and the frame's padding goes on with a chain that
    /// ends in nothing: whoever reads on into the padding takes the packet for harmless.
    fn chain_in_padding(&mut self) {
        for inside in [0, 1] {
            for last in [NO_NEXT, 58, DESTINATION_OPTIONS] {
                let mut packet = self.next();
                packet.inner = vec![options(DESTINATION_OPTIONS, 0); inside + 1];
                let cut = 8 * inside;
                let mut pieces = packet.split(&[cut]);
                pieces[0].next = Some(DESTINATION_OPTIONS);
                let mut frames = packet.fragments(&pieces);
                frames[0].extend([last, 0, 1, 4, 0, 0, 0, 0].repeat(8));
                let name = format!("padding goes on after {inside} headers, next header {last}");
                self.plans.push(plan(name, frames));
            }
        }
    }
}

/// One random plan: about half of them are what Linux delivers in some odd form, the others are
/// broken somewhere.
pub fn hostile(rng: &mut Rng, addressing: &Addressing, id: u32) -> Plan {
    let mut packet = Packet::new(addressing, id);
    let mut name = Vec::new();
    if rng.u8(..10) < 3 {
        let depth = pick(rng, &[1, 2, 3, 4, 5, 6, 16]);
        packet.tags = (0..depth).map(|_| random_tag(rng)).collect();
        name.push(format!("tags {:x?}", packet.tags));
    }
    if addressing.is_v4() {
        if rng.u8(..10) < 4 {
            packet.options = random_options(rng, addressing);
            name.push(format!("options {:02x?}", packet.options));
        }
        if rng.u8(..20) == 0 {
            packet.inner = vec![authentication(rng.u8(..5)); rng.usize(1..10)];
            name.push(format!("{} authentication headers", packet.inner.len()));
        }
    } else {
        packet.extensions = random_chain(rng, addressing, true);
        packet.inner = random_chain(rng, addressing, false);
        let kinds = packet.extensions.iter().chain(&packet.inner);
        let kinds: Vec<u8> = kinds.map(|extension| extension.kind).collect();
        if !kinds.is_empty() {
            name.push(format!("extension headers {kinds:?}"));
        }
    }
    // Alone or with others: a broken field in every fragment.
    if rng.u8(..10) == 0 {
        name.push(break_header(rng, &mut packet));
    }
    let mut frames = if rng.bool() {
        vec![packet.frame()]
    } else {
        let pieces = random_pieces(rng, &packet, &mut name);
        packet.fragments(&pieces)
    };
    if rng.u8(..10) < 2 {
        let frame = rng.choice(&mut frames).expect("a plan has frames");
        name.push(break_frame(rng, frame));
    }
    if rng.u8(..10) < 3 {
        for frame in &mut frames {
            frame.resize(frame.len().max(60), 0);
        }
        name.push("padded to 60 bytes".into());
    }
    if rng.u8(..10) == 0 {
        let frame = rng.choice(&mut frames).expect("a plan has frames");
        frame.extend(random_trailer(rng));
        name.push("with a trailer".into());
    }
    plan(name.join("; "), frames)
}

fn pick<T: Copy>(rng: &mut Rng, list: &[T]) -> T {
    list[rng.usize(..list.len())]
}

fn random_tag(rng: &mut Rng) -> Tag {
    let kind = match rng.u8(..10) {
        0 => 0x9100,
        1..=4 => SERVICE_VLAN,
        _ => VLAN,
    };
    let control = match rng.u8(..10) {
        0 => rng.u16(..),
        1 => 1,
        // The priority bits do not make it another VLAN.
        2 | 3 => u16::from(rng.u8(..8)) << 13,
        _ => 0,
    };
    (kind, control)
}

fn random_options(rng: &mut Rng, addressing: &Addressing) -> Vec<u8> {
    let IpAddr::V4(destination) = addressing.destination else {
        panic!("options are IPv4's");
    };
    let [a, b, c, d] = destination.octets();
    match rng.u8(..8) {
        0 => vec![0; rng.usize(1..=40)],
        1 | 2 => vec![1; rng.usize(1..=40)],
        3 => decoy_option(rng.usize(6..=40)),
        4 => decoy()
            .into_iter()
            .cycle()
            .take(rng.usize(4..=40))
            .collect(),
        5 => vec![pick(rng, &[131, 137]), 7, pick(rng, &[4, 8]), a, b, c, d],
        6 => vec![148, 4, 0, 0],
        _ => (0..rng.usize(1..=40)).map(|_| rng.u8(..)).collect(),
    }
}

fn random_chain(rng: &mut Rng, addressing: &Addressing, first: bool) -> Vec<Extension> {
    let length = match rng.u8(..10) {
        0..=4 => 0,
        5..=7 => rng.usize(1..=2),
        8 => rng.usize(3..=6),
        _ => rng.usize(6..=12),
    };
    let address = segment_address(addressing.destination);
    let extension = |place| match rng.u8(..14) {
        // Hop-by-hop options stand first or the packet is refused.
        0..=3 if first && place == 0 => options(HOP_BY_HOP, rng.u8(..3)),
        4 => options(HOP_BY_HOP, 0),
        5 | 6 => {
            let types = [0, 2, 3, 4, rng.u8(..)];
            let left = [0, 0, 0, 1, rng.u8(..)];
            routing(pick(rng, &types), pick(rng, &left), address)
        }
        7 => fragment(0, false, rng.u32(..)),
        8 => fragment(rng.u16(..0x1fff), rng.bool(), rng.u32(..)),
        9 => authentication(rng.u8(..6)),
        10 => options(DESTINATION_OPTIONS, rng.u8(..20)),
        _ => options(DESTINATION_OPTIONS, rng.u8(..3)),
    };
    (0..length).map(extension).collect()
}

/// Cuts a packet in fragments, honestly or not, and says how in `name`.
fn random_pieces(rng: &mut Rng, packet: &Packet, name: &mut Vec<String>) -> Vec<Piece> {
    let units = packet.body().1.len() / 8;
    let mut cuts: Vec<usize> = (1..units)
        .filter(|_| rng.u8(..4) == 0)
        .map(|unit| unit * 8)
        .collect();
    if cuts.is_empty() && units > 1 && rng.u8(..8) > 0 {
        cuts.push(rng.usize(1..units) * 8);
    }
    name.push(format!("fragments cut at {cuts:?}"));
    let mut pieces = packet.split(&cuts);
    match rng.u8(..3) {
        0 => {}
        1 => {
            pieces.reverse();
            name.push("last first".into());
        }
        _ => {
            rng.shuffle(&mut pieces);
            name.push("shuffled".into());
        }
    }
    if rng.u8(..3) > 0 {
        return pieces;
    }
    let victim = rng.usize(..pieces.len());
    match rng.u8(..8) {
        0 => {
            pieces.push(pieces[victim].clone());
            name.push(format!("piece {victim} twice"));
        }
        1 => {
            pieces.remove(victim);
            pieces.push(packet.piece(0, 8));
            name.push(format!("piece {victim} replaced by the first 8 bytes"));
        }
        2 => {
            let mut decoyed = Piece {
                more: true,
                ..packet.piece(0, 16.min(units * 8))
            };
            let place = decoyed.bytes.len().min(4);
            decoyed.bytes[..place].copy_from_slice(&decoy()[..place]);
            pieces.insert(victim, decoyed);
            name.push(format!("decoy at offset 0 before piece {victim}"));
        }
        3 => {
            let from = rng.usize(..units) * 8;
            pieces.insert(victim, packet.piece(from, packet.body().1.len()));
            name.push(format!("overlap from {from} before piece {victim}"));
        }
        4 => {
            let kinds = [TCP, UDP, NO_NEXT, DESTINATION_OPTIONS, rng.u8(..)];
            pieces[victim].next = Some(pick(rng, &kinds));
            name.push(format!(
                "piece {victim} says next header {:?}",
                pieces[victim].next
            ));
        }
        5 => {
            pieces[victim].offset = rng.u16(..0x1fff);
            name.push(format!("piece {victim} at {}", pieces[victim].offset));
        }
        6 => {
            pieces[victim].more = !pieces[victim].more;
            name.push(format!("piece {victim} with its flag turned"));
        }
        _ => {
            let length = rng.usize(..=pieces[victim].bytes.len());
            pieces[victim].bytes.truncate(length);
            name.push(format!("piece {victim} of {length} bytes"));
        }
    }
    pieces
}

/// Makes a header field lie, and says which.
fn break_header(rng: &mut Rng, packet: &mut Packet) -> String {
    let lengths = [0, 1, 19, 20, 40, 59, 60, 61, 100, 1500, 0x8000, 0xffff];
    let ethertypes = [IPV4, IPV6, VLAN, 0x9100, rng.u16(..)];
    match rng.u8(..6) {
        0 => packet.version = Some(rng.u8(..16)),
        1 => packet.header_words = Some(rng.u8(..16)),
        2 => packet.length = Some(pick(rng, &lengths)),
        3 => packet.length = Some(rng.u16(..128)),
        4 => packet.protocol = Some(rng.u8(..)),
        _ => packet.ethertype = Some(pick(rng, &ethertypes)),
    }
    format!(
        "version {:?}, IHL {:?}, length {:?}, protocol {:?}, ethertype {:x?}",
        packet.version, packet.header_words, packet.length, packet.protocol, packet.ethertype
    )
}

/// Cuts a frame short or turns one of its bytes, and says which.
fn break_frame(rng: &mut Rng, frame: &mut Vec<u8>) -> String {
    let place = rng.usize(14..frame.len());
    if rng.bool() {
        frame.truncate(place);
        return format!("cut to {place} bytes");
    }
    frame[place] ^= 1 << rng.u8(..8);
    format!("byte {place} is {:#04x}", frame[place])
}

/// What a reader past the packet's end takes for more headers.
fn random_trailer(rng: &mut Rng) -> Vec<u8> {
    match rng.u8(..3) {
        0 => decoy().repeat(rng.usize(1..8)),
        1 => [NO_NEXT, 0, 1, 4, 0, 0, 0, 0].repeat(rng.usize(1..8)),
        _ => (0..rng.usize(1..80)).map(|_| rng.u8(..)).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addressing(source: &str, destination: &str, protocol: Protocol) -> Addressing {
        Addressing {
            source_mac: [2, 0, 0, 0, 0, 1],
            destination_mac: [2, 0, 0, 0, 0, 2],
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
            source_port: 40000,
            destination_port: 5432,
            protocol,
        }
    }

    fn both_families(protocol: Protocol) -> [Addressing; 2] {
        [
            addressing("192.0.2.1", "192.0.2.2", protocol),
            addressing("2001:db8::1", "2001:db8::2", protocol),
        ]
    }

    #[test]
    fn udp_over_ipv4_is_byte_for_byte_as_written_by_hand() {
        let frame = Packet::new(&both_families(Protocol::Udp)[0], 0x01020304).frame();
        #[rustfmt::skip]
        let expected = [
            2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x08, 0x00,
            0x45, 0, 0, 60, 0x03, 0x04, 0, 0, 64, 17, 0xf3, 0xa9, 192, 0, 2, 1, 192, 0, 2, 2,
            0x9c, 0x40, 0x15, 0x38, 0, 40, 0x1b, 0x71, 1, 2, 3, 4,
        ];
        assert_eq!(&frame[..expected.len()], expected, "{frame:02x?}");
        assert_eq!(frame.len(), 14 + 20 + SEGMENT);
        assert!(frame[expected.len()..].iter().all(|&byte| byte == 0x55));
    }

    #[test]
    fn checksums_of_rfc_1071_and_of_the_segments_sum_to_zero() {
        assert_eq!(
            checksum(&[&[0, 1, 0xf2, 3, 0xf4, 0xf5, 0xf6, 0xf7]]),
            !0xddf2
        );
        for protocol in Protocol::ALL {
            for addressing in both_families(protocol) {
                let segment = segment(&addressing, 77);
                assert_eq!(transport_checksum(&addressing, &segment), 0xffff);
            }
        }
    }

    #[test]
    fn options_headers_are_as_long_as_they_say() {
        for units in 0..=255 {
            let header = options(DESTINATION_OPTIONS, units).bytes;
            assert_eq!(header.len(), (usize::from(units) + 1) * 8);
        }
        assert_eq!(options(HOP_BY_HOP, 0).bytes, [0, 0, 1, 4, 0, 0, 0, 0]);
        assert_eq!(authentication(3).bytes.len(), 24);
        assert_eq!(authentication(3).bytes[1], 4);
    }

    #[test]
    fn honest_fragments_hold_the_body_once() {
        for addressing in both_families(Protocol::Tcp) {
            let mut packet = Packet::new(&addressing, 5);
            packet.inner = vec![authentication(1)];
            let pieces = packet.split(&[8, 32]);
            let bytes: Vec<u8> = pieces
                .iter()
                .flat_map(|piece| piece.bytes.clone())
                .collect();
            assert_eq!(bytes, packet.body().1);
            assert_eq!(
                pieces.iter().map(|piece| piece.offset).collect::<Vec<_>>(),
                [0, 1, 4]
            );
            assert_eq!(
                pieces.iter().map(|piece| piece.more).collect::<Vec<_>>(),
                [true, true, false]
            );
        }
    }

    #[test]
    fn threats_are_many_and_each_of_one_name() {
        for protocol in Protocol::ALL {
            for addressing in both_families(protocol) {
                let plans = threats(&addressing, 0);
                assert!(plans.len() > 400, "{}", plans.len());
                let mut names: Vec<_> = plans.iter().map(|plan| &plan.name).collect();
                names.sort();
                let twice: Vec<_> = names.windows(2).filter(|two| two[0] == two[1]).collect();
                assert_eq!(twice, Vec::<&[&String]>::new());
            }
        }
    }

    #[test]
    fn hostile_plans_are_repeatable_and_fit_an_ethernet_frame() {
        for addressing in both_families(Protocol::Udp) {
            let plans = |seed| {
                let mut rng = Rng::with_seed(seed);
                let plans = (0..5000).map(|id| hostile(&mut rng, &addressing, id));
                plans.collect::<Vec<_>>()
            };
            let (first, second) = (plans(1), plans(1));
            for (first, second) in first.iter().zip(&second) {
                assert_eq!(first.frames, second.frames);
                assert!(
                    first
                        .frames
                        .iter()
                        .all(|frame| (14..3500).contains(&frame.len())),
                    "{first:?}"
                );
            }
        }
    }
}
