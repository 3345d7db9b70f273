//! The addresses of the database host and the client.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use filter_common::Protocol;

use crate::frames::Addressing;

/// The database host's addresses.
pub const DB4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
pub const DB6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
/// More local addresses of the database host, for databases with `addresses:`.
pub const OTHER_DB4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 3);
pub const OTHER_DB6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 3);
/// The client's addresses on the link.
pub const CLIENT4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
pub const CLIENT6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);

/// The client's addresses that policies allow, or do not.
pub const ALLOWED4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
pub const ALLOWED6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x10);
pub const DENIED4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
pub const DENIED6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xdead, 0, 0, 0, 0, 7);
/// Next to the allowed ones, on both sides.
pub const NEIGHBOURS: [IpAddr; 4] = [
    IpAddr::V4(Ipv4Addr::new(203, 0, 113, 9)),
    IpAddr::V4(Ipv4Addr::new(203, 0, 113, 11)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0xf)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x11)),
];

pub const DB_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// Of packets from a source behind the client to a port of the database host.
pub fn addressing(source: IpAddr, port: u16, protocol: Protocol) -> Addressing {
    Addressing {
        source_mac: CLIENT_MAC,
        destination_mac: DB_MAC,
        source,
        destination: if source.is_ipv4() {
            DB4.into()
        } else {
            DB6.into()
        },
        source_port: 40_000,
        destination_port: port,
        protocol,
    }
}

pub(super) fn mac(address: [u8; 6]) -> String {
    address.map(|byte| format!("{byte:02x}")).join(":")
}
