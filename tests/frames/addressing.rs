//! Where a packet comes from and goes to.

use std::net::IpAddr;

use filter_common::Protocol;

use crate::frames::kinds::{TCP, UDP};

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
    pub(super) fn protocol_number(&self) -> u8 {
        match self.protocol {
            Protocol::Tcp => TCP,
            Protocol::Udp => UDP,
        }
    }

    pub(super) fn is_v4(&self) -> bool {
        self.destination.is_ipv4()
    }
}
