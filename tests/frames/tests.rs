use fastrand::Rng;
use filter_common::Protocol;

use crate::frames::{
    addressing::Addressing,
    checksum::{checksum, transport_checksum},
    extensions::{authentication, options},
    hostile::hostile,
    kinds::{DESTINATION_OPTIONS, HOP_BY_HOP},
    packet::{Packet, SEGMENT, segment},
    threats::threats,
};

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
