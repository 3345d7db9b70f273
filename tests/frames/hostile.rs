//! Random packets, about half of them broken.

use std::net::IpAddr;

use fastrand::Rng;

use crate::frames::{
    addressing::Addressing,
    decoy::{decoy, decoy_option},
    extensions::{Extension, authentication, fragment, options, routing, segment_address},
    kinds::{DESTINATION_OPTIONS, HOP_BY_HOP, IPV4, IPV6, NO_NEXT, SERVICE_VLAN, TCP, UDP, VLAN},
    packet::{Packet, Piece, Tag},
    plan::{Plan, plan},
};

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
