//! Every known threat, against the reference.

use filter_tests::{
    frames::{self, Protocol},
    loaded::Loaded,
};

use crate::verdicts::{
    FOREIGNERS, FRIENDS, LOCAL4, LOCAL6, ORDERS, check, check_pass, from, packet,
};

#[test]
fn every_threat_gets_the_verdict_of_the_reference() {
    let mut loaded = Loaded::new(&format!(
        "{ORDERS}  - {{name: metrics, port: 5432, protocol: udp, model: dedicated}}\n"
    ));
    for source in FRIENDS.into_iter().chain(FOREIGNERS) {
        for protocol in Protocol::ALL {
            let local = if source.contains(':') { LOCAL6 } else { LOCAL4 };
            let addressing = packet(source, local, protocol, 5432).addressing;
            for plan in frames::threats(&addressing, 0) {
                for frame in plan.frames {
                    let expected = loaded.expected(&frame);
                    check(&mut loaded, &plan.name, &frame, expected);
                }
            }
        }
    }
}

#[test]
fn every_way_to_cut_a_threat_short_gets_the_verdict_of_the_reference() {
    let loaded = Loaded::new(ORDERS);
    for source in FOREIGNERS {
        let addressing = from(source).addressing;
        for plan in frames::threats(&addressing, 0).into_iter().step_by(5) {
            for frame in plan.frames {
                for length in 14..=frame.len() {
                    let frame = &frame[..length];
                    let pass = loaded.expected(frame).pass;
                    check_pass(&loaded, &plan.name, frame, pass);
                }
            }
        }
    }
}
