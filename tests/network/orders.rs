//! The database `orders`, which most tests protect.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use filter_tests::net::{DB4, DB6, dedicated, policy};

pub const PORT: u16 = 5432;
pub const DB: SocketAddr = SocketAddr::new(IpAddr::V4(DB4), PORT);
pub const DB_V6: SocketAddr = SocketAddr::new(IpAddr::V6(DB6), PORT);
pub const ALLOWED: [&str; 2] = ["203.0.113.10/32", "2001:db8::10/128"];

/// A dedicated database `orders`, open to the allowed sources.
pub fn orders(mode: &str) -> String {
    policy("eth0", mode, &[dedicated("orders", PORT, &ALLOWED, "")])
}

pub fn v4(address: Ipv4Addr, port: u16) -> SocketAddr {
    SocketAddr::new(address.into(), port)
}
