//! Ethertypes, tags, protocols, extension headers and fragments.

use filter_common::Reason::{Allowed, ExtensionHeaders, NotAllowed, Truncated, VlanTags};
use filter_tests::{
    frames::{
        self, AUTHENTICATION, DESTINATION_OPTIONS, Extension, HOP_BY_HOP, IPV4, IPV6, MORE, Piece,
        SEGMENT, SERVICE_VLAN, TCP, VLAN,
    },
    loaded::Loaded,
};

use crate::verdicts::{
    FOREIGNERS, FRIENDS, ORDERS, check, check_pass, from, judged, other, unclear,
};

#[test]
fn of_all_ethertypes_only_ip_is_judged() {
    let mut loaded = Loaded::new(ORDERS);
    for source in FOREIGNERS {
        let mut frame = from(source).frame();
        let family = if source.contains(':') { IPV6 } else { IPV4 };
        for ethertype in 0..=u16::MAX {
            frame[12..14].copy_from_slice(&ethertype.to_be_bytes());
            let pass = ethertype != IPV4 && ethertype != IPV6;
            check_pass(
                &loaded,
                &format!("ethertype {ethertype:#06x}"),
                &frame,
                pass,
            );
        }
        frame[12..14].copy_from_slice(&family.to_be_bytes());
        assert_eq!(loaded.counted().into_values().sum::<u64>(), 2);
        check(
            &mut loaded,
            "own ethertype",
            &frame,
            judged("orders", NotAllowed),
        );
    }
}

#[test]
fn of_all_protocols_only_the_guarded_one_is_judged() {
    let mut loaded = Loaded::new(ORDERS);
    for source in FOREIGNERS {
        for number in 0..=255 {
            let mut packet = from(source);
            packet.protocol = Some(number);
            // What would be extension headers reads the ports as a header that ends in nothing.
            let expected = match number {
                TCP => judged("orders", NotAllowed),
                _ => other(),
            };
            let name = format!("protocol {number} from {source}");
            check(&mut loaded, &name, &packet.frame(), expected);
        }
    }
}

#[test]
fn tags_are_followed_to_the_bound_and_dropped_past_it() {
    let mut loaded = Loaded::new(ORDERS);
    let mixes = [
        [VLAN, VLAN],
        [SERVICE_VLAN, SERVICE_VLAN],
        [SERVICE_VLAN, VLAN],
    ];
    for (sources, reason) in [(FRIENDS, Allowed), (FOREIGNERS, NotAllowed)] {
        for source in sources {
            for mix in mixes {
                for depth in 0..=16 {
                    for vid in [0, 1, 0xefff] {
                        let mut packet = from(source);
                        let kinds = mix.iter().cycle().take(depth);
                        packet.tags = kinds.map(|&kind| (kind, vid)).collect();
                        let expected = match depth {
                            0..=4 => judged("orders", reason),
                            _ => unclear(VlanTags),
                        };
                        let name = format!("{depth} tags {mix:x?} from {source}");
                        check(&mut loaded, &name, &packet.frame(), expected);
                    }
                }
            }
            for kind in [0x9100, 0x9200, 0x88e7] {
                let mut packet = from(source);
                packet.tags = vec![(VLAN, 0), (kind, 0)];
                check(
                    &mut loaded,
                    &format!("tag {kind:#x}"),
                    &packet.frame(),
                    other(),
                );
            }
        }
    }
}

#[test]
fn extension_headers_are_followed_to_the_bound_and_dropped_past_it() {
    let mut loaded = Loaded::new(ORDERS);
    let local = [0; 16];
    let kinds = [
        frames::options(HOP_BY_HOP, 0),
        frames::options(DESTINATION_OPTIONS, 0),
        frames::options(DESTINATION_OPTIONS, 9),
        frames::routing(0, 0, local),
        frames::routing(2, 1, local),
        frames::routing(4, 0, local),
        frames::fragment(0, false, 1),
        frames::fragment(0, true, 1),
        frames::authentication(0),
        frames::authentication(3),
        frames::authentication(4),
    ];
    for (sources, reason) in [(FRIENDS, Allowed), (FOREIGNERS, NotAllowed)] {
        for depth in 0..=12 {
            let expected = match depth {
                0..=8 => judged("orders", reason),
                _ => unclear(ExtensionHeaders),
            };
            for extension in &kinds {
                let mut packet = from(sources[1]);
                packet.inner = vec![extension.clone(); depth];
                let name = format!("{depth} x {extension:?}");
                check(&mut loaded, &name, &packet.frame(), expected.clone());
                if extension.kind == AUTHENTICATION {
                    packet = from(sources[0]);
                    packet.inner = vec![extension.clone(); depth];
                    let name = format!("{depth} x {extension:?} over IPv4");
                    check(&mut loaded, &name, &packet.frame(), expected.clone());
                }
                for place in 0..depth {
                    let mut packet = from(sources[1]);
                    packet.inner = vec![frames::options(DESTINATION_OPTIONS, 1); depth];
                    packet.inner[place] = extension.clone();
                    let name = format!("{extension:?} at place {place} of {depth}");
                    check(&mut loaded, &name, &packet.frame(), expected.clone());
                }
            }
        }
    }
}

#[test]
fn chain_that_ends_in_no_segment_is_other_traffic() {
    let mut loaded = Loaded::new(ORDERS);
    for last in [frames::NO_NEXT, 58, 50, 47, 132, 135, 255] {
        let mut packet = from(FOREIGNERS[1]);
        packet.inner = vec![
            frames::options(DESTINATION_OPTIONS, 0),
            Extension {
                kind: last,
                bytes: vec![0; 8],
            },
        ];
        check(
            &mut loaded,
            &format!("ends in {last}"),
            &packet.frame(),
            other(),
        );
    }
    // Segment routing unwraps the packet inside behind the filter's back.
    for inside in [4, 41] {
        let mut packet = from(FOREIGNERS[1]);
        let bytes = from(FOREIGNERS[1]).frame()[14..].to_vec();
        packet.inner = vec![Extension {
            kind: inside,
            bytes,
        }];
        check(&mut loaded, "tunnel", &packet.frame(), other());
        packet.inner.insert(0, frames::routing(4, 0, [0; 16]));
        check(
            &mut loaded,
            "routed tunnel",
            &packet.frame(),
            unclear(ExtensionHeaders),
        );
    }
}

#[test]
fn first_fragment_is_judged_and_later_ones_pass() {
    let mut loaded = Loaded::new(ORDERS);
    for (sources, reason) in [(FRIENDS, Allowed), (FOREIGNERS, NotAllowed)] {
        for source in sources {
            for offset in [0, 1, 2, 3, 185, 4096, 8191] {
                for more in [false, true] {
                    for length in [0, 1, 3, 4, 8, 16, 24, SEGMENT] {
                        let packet = from(source);
                        let piece = Piece {
                            offset,
                            more,
                            bytes: packet.segment[..length].to_vec(),
                            next: None,
                        };
                        let expected = match (offset, length) {
                            (0, 0..=3) => unclear(Truncated),
                            (0, _) => judged("orders", reason),
                            _ => other(),
                        };
                        let name = format!("at {offset}, more {more}, {length} bytes, {source}");
                        check(&mut loaded, &name, &packet.fragment(&piece), expected);
                    }
                }
            }
        }
    }
    // Flags are no offset.
    for flags in [0x4000, 0x8000, 0xc000, MORE, 0xe000] {
        let mut packet = from(FOREIGNERS[0]);
        packet.flags_and_offset = flags;
        let name = format!("flags {flags:#06x}");
        check(
            &mut loaded,
            &name,
            &packet.frame(),
            judged("orders", NotAllowed),
        );
        packet.flags_and_offset |= 0x0001;
        check(&mut loaded, &name, &packet.frame(), other());
    }
}
