//! Packets in fragments that mislead.

use crate::frames::{
    decoy::decoy,
    extensions::{fragment, options, routing, segment_address},
    kinds::{DESTINATION_OPTIONS, HOP_BY_HOP, NO_NEXT, TCP, UDP},
    packet::{Packet, Piece, SEGMENT},
    plan::plan,
    threats::list::Threats,
};

impl Threats<'_> {
    /// Plans that both families have.
    pub(super) fn fragments(&mut self) {
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
    pub(super) fn fragment_grid(&mut self) {
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

    pub(super) fn ipv6_fragments(&mut self) {
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
