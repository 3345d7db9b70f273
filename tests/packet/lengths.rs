//! Packets that are shorter or longer than their headers say, or than a buffer.

use filter_common::Reason::{Allowed, BadHeader, NotAllowed, Truncated};
use filter_tests::{
    frames::{
        self, DECOY_PORT, DESTINATION_OPTIONS, Extension, HOP_BY_HOP, SEGMENT, SERVICE_VLAN, VLAN,
    },
    loaded::Loaded,
};

use crate::verdicts::{FOREIGNERS, FRIENDS, ORDERS, check, from, judged, other, unclear};

#[test]
fn packet_that_is_cut_short_never_passes() {
    let mut loaded = Loaded::new(ORDERS);
    for source in FRIENDS.into_iter().chain(FOREIGNERS) {
        let ip_header = if source.contains(':') { 40 } else { 20 };
        let plain = from(source);
        let mut tagged = plain.clone();
        tagged.tags = vec![(SERVICE_VLAN, 0), (VLAN, 7)];
        let mut optioned = plain.clone();
        match ip_header {
            20 => optioned.options = vec![1; 40],
            _ => optioned.inner = vec![frames::options(HOP_BY_HOP, 1), frames::authentication(3)],
        }
        let reason = if FRIENDS.contains(&source) {
            Allowed
        } else {
            NotAllowed
        };
        for packet in [plain, tagged, optioned] {
            let frame = packet.frame();
            let start = 14 + 4 * packet.tags.len();
            for length in 14..frame.len() {
                let expected = match length < start + ip_header {
                    true => unclear(Truncated),
                    false => unclear(BadHeader),
                };
                let name = format!("{length} of {} bytes from {source}", frame.len());
                check(&mut loaded, &name, &frame[..length], expected);
            }
            check(&mut loaded, "whole", &frame, judged("orders", reason));
        }
    }
}

#[test]
fn segment_that_ends_before_its_ports_is_dropped() {
    let mut loaded = Loaded::new(ORDERS);
    for source in FRIENDS.into_iter().chain(FOREIGNERS) {
        let reason = if FRIENDS.contains(&source) {
            Allowed
        } else {
            NotAllowed
        };
        for length in 0..=SEGMENT {
            let mut packet = from(source);
            packet.segment.truncate(length);
            let expected = match length {
                0..=3 => unclear(Truncated),
                _ => judged("orders", reason),
            };
            let name = format!("segment of {length} bytes from {source}");
            check(&mut loaded, &name, &packet.frame(), expected.clone());
            // Padding is not part of the packet, whatever it looks like.
            let whole = from(source).segment;
            let padded = [packet.frame(), whole[length..].to_vec()].concat();
            check(&mut loaded, &format!("{name}, padded"), &padded, expected);
        }
    }
}

#[test]
fn ports_lie_where_the_header_length_says() {
    let mut loaded = Loaded::new(ORDERS);
    for words in 0..=4 {
        let mut packet = from(FOREIGNERS[0]);
        packet.header_words = Some(words);
        check(
            &mut loaded,
            &format!("IHL {words}"),
            &packet.frame(),
            unclear(BadHeader),
        );
    }
    let ports = |port: u16| [1234_u16.to_be_bytes(), port.to_be_bytes()].concat();
    for words in 5..=15 {
        let length = (words - 5) * 4;
        let option = |port| ports(port).into_iter().cycle().take(length).collect();
        let mut packet = from(FOREIGNERS[0]);
        packet.options = option(DECOY_PORT);
        let name = format!("IHL {words}, decoy at +20");
        check(
            &mut loaded,
            &name,
            &packet.frame(),
            judged("orders", NotAllowed),
        );
        let mut packet = from(FOREIGNERS[0]);
        packet.segment[..4].copy_from_slice(&ports(DECOY_PORT));
        packet.options = option(5432);
        let name = format!("IHL {words}, protected port at +20");
        check(&mut loaded, &name, &packet.frame(), other());
        for claimed in 5..words {
            let mut packet = from(FOREIGNERS[0]);
            packet.options = option(5432);
            packet.header_words = Some(claimed as u8);
            let name = format!("IHL {claimed} claimed, {words} written, port at +20");
            check(
                &mut loaded,
                &name,
                &packet.frame(),
                judged("orders", NotAllowed),
            );
        }
    }
    for version in (0..16).filter(|&version| version != 4) {
        let mut packet = from(FOREIGNERS[0]);
        packet.version = Some(version);
        check(
            &mut loaded,
            &format!("version {version}"),
            &packet.frame(),
            unclear(BadHeader),
        );
    }
    for version in (0..16).filter(|&version| version != 6) {
        let mut packet = from(FOREIGNERS[1]);
        packet.version = Some(version);
        check(
            &mut loaded,
            &format!("version {version}"),
            &packet.frame(),
            unclear(BadHeader),
        );
    }
}

#[test]
fn length_that_lies_is_no_way_around() {
    let mut loaded = Loaded::new(ORDERS);
    let segment = SEGMENT as u16;
    for padding in [0, 20] {
        for claimed in (0..=130).chain([1500, 0x7fff, 0x8000, 0xffff]) {
            let mut v4 = from(FOREIGNERS[0]);
            v4.length = Some(claimed);
            let expected = match claimed {
                0..=19 => unclear(BadHeader),
                20..=23 => unclear(Truncated),
                _ if claimed <= 20 + segment + padding => judged("orders", NotAllowed),
                _ => unclear(BadHeader),
            };
            let mut frame = v4.frame();
            frame.resize(frame.len() + usize::from(padding), 0);
            check(
                &mut loaded,
                &format!("total length {claimed}"),
                &frame,
                expected,
            );
            let mut v6 = from(FOREIGNERS[1]);
            v6.length = Some(claimed);
            let expected = match claimed {
                0..=3 => unclear(Truncated),
                _ if claimed <= segment + padding => judged("orders", NotAllowed),
                _ => unclear(BadHeader),
            };
            let mut frame = v6.frame();
            frame.resize(frame.len() + usize::from(padding), 0);
            check(
                &mut loaded,
                &format!("payload length {claimed}"),
                &frame,
                expected,
            );
        }
    }
    let mut jumbogram = from(FOREIGNERS[1]);
    let jumbo = vec![0, 0, 0xc2, 4, 0, 1, 0, 0];
    jumbogram.inner = vec![Extension {
        kind: HOP_BY_HOP,
        bytes: jumbo,
    }];
    jumbogram.length = Some(0);
    check(
        &mut loaded,
        "jumbogram",
        &jumbogram.frame(),
        judged("orders", NotAllowed),
    );
}

#[test]
fn header_chain_that_goes_on_in_the_padding_is_cut_short() {
    let mut loaded = Loaded::new(ORDERS);
    let padding = [frames::NO_NEXT, 0, 1, 4, 0, 0, 0, 0];
    // With how much of it has to be there to be followed.
    let kinds = [
        (4, frames::options(HOP_BY_HOP, 0)),
        (4, frames::options(DESTINATION_OPTIONS, 0)),
        (4, frames::routing(0, 0, [0; 16])),
        (4, frames::fragment(0, true, 1)),
        (2, frames::authentication(3)),
    ];
    for (needed, kind) in kinds {
        for length in 0..needed {
            let mut packet = from(FOREIGNERS[1]);
            packet.inner = vec![frames::options(DESTINATION_OPTIONS, 0), kind.clone()];
            packet.length = Some(8 + length as u16);
            let mut frame = packet.frame();
            frame.truncate(14 + 40 + 8 + length);
            frame.extend(padding.repeat(4));
            let name = format!("{length} bytes of {kind:?}");
            check(&mut loaded, &name, &frame, unclear(Truncated));
        }
    }
}

#[test]
fn packet_in_more_than_one_buffer_is_judged_alike() {
    let mut loaded = Loaded::new(ORDERS);
    let sizes = [3000, 3466, 3480, 3500, 3520, 3600, 4096, 4200, 9000];
    for (sources, reason) in [(FRIENDS, Allowed), (FOREIGNERS, NotAllowed)] {
        for source in sources {
            for size in sizes {
                let mut packet = from(source);
                packet.segment.resize(size, 0);
                let expected = judged("orders", reason);
                check(
                    &mut loaded,
                    &format!("{size} from {source}"),
                    &packet.frame(),
                    expected,
                );
                packet.segment[2..4].copy_from_slice(&DECOY_PORT.to_be_bytes());
                check(
                    &mut loaded,
                    &format!("{size} to a decoy"),
                    &packet.frame(),
                    other(),
                );
                packet.length = Some(size as u16 + 100);
                let name = format!("{size} and 100 missing");
                check(&mut loaded, &name, &packet.frame(), unclear(BadHeader));
            }
        }
        // Longer than the field can say: segments that the network stack has joined.
        for source in sources {
            let mut packet = from(source);
            packet.length = Some(0);
            packet.segment.resize(66_000, 0);
            if source.contains(':') {
                packet.inner = vec![frames::options(HOP_BY_HOP, 0)];
            }
            let name = format!("66,000 bytes from {source}");
            check(
                &mut loaded,
                &name,
                &packet.frame(),
                judged("orders", reason),
            );
        }
        // The ports themselves lie in the second buffer, or across.
        for units in (40..=255).chain([255; 3]) {
            let mut packet = from(sources[1]);
            let long = frames::options(DESTINATION_OPTIONS, 255);
            packet.inner = vec![long, frames::options(DESTINATION_OPTIONS, units)];
            let name = format!("options of {units} units");
            check(
                &mut loaded,
                &name,
                &packet.frame(),
                judged("orders", reason),
            );
        }
    }
}
