//! Has the client's end of the link polled, without which it gets nothing that native XDP sends back.

use std::fs;

use filter_agent::{
    host::Interface,
    kernel::{filter::Filter, links::Attached},
    policy::Mode,
};
use nix::net::if_::if_nametoindex;

use crate::net::hosts::Net;

/// A program on the client's interface, until it is dropped.
pub struct Polling {
    _filter: Filter,
}

impl Polling {
    pub fn start(net: &Net) -> Self {
        let pins = net.bpffs().join("client");
        fs::create_dir(&pins).unwrap();
        let mut filter = Filter::open(&pins, Some(1024)).unwrap();
        net.client.run(|| {
            let interface = Interface {
                index: if_nametoindex("eth0").unwrap(),
                name: "eth0".into(),
                ethernet: true,
                kind: Some("veth".into()),
                ..Interface::default()
            };
            let attached = filter.attach(&interface, Mode::Native).unwrap();
            assert_eq!(attached, Attached::Native);
        });
        Self { _filter: filter }
    }
}
