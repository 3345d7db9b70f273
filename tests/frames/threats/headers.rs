//! Packets whose headers mislead.

use std::net::IpAddr;

use crate::frames::{
    decoy::{decoy, decoy_option},
    extensions::{Extension, authentication, fragment, options, routing, segment_address},
    kinds::{DESTINATION_OPTIONS, HOP_BY_HOP, IPV4, IPV6, SERVICE_VLAN, VLAN},
    packet::SEGMENT,
    threats::list::Threats,
};

impl Threats<'_> {
    pub(super) fn vlan(&mut self) {
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

    pub(super) fn lengths(&mut self) {
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

    pub(super) fn versions(&mut self) {
        for version in 0..=15 {
            let mut packet = self.next();
            packet.version = Some(version);
            self.frame(format!("version {version}"), packet.frame());
        }
        let mut packet = self.next();
        packet.ethertype = Some(if self.addressing.is_v4() { IPV6 } else { IPV4 });
        self.frame("ethertype of the other family", packet.frame());
    }

    pub(super) fn ipv4_options(&mut self) {
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

    pub(super) fn authentication(&mut self) {
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

    pub(super) fn extension_chains(&mut self) {
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
}
