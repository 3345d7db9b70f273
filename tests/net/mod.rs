//! The harness of every network test: throw-away namespaces, the real agent in one of them, and a
//! tripwire that counts what should never have arrived.

mod addresses;
mod agent;
mod binary;
mod clients;
mod command;
mod echo;
mod hammer;
mod hosts;
mod namespace;
mod nft;
mod policies;
mod polling;
mod raw;
mod refusal;
mod tampering;
mod traffic;
mod tripwire;
mod wait;
mod wire;

pub use addresses::{
    ALLOWED4, ALLOWED6, CLIENT_MAC, CLIENT4, CLIENT6, DB_MAC, DB4, DB6, DENIED4, DENIED6,
    NEIGHBOURS, OTHER_DB4, OTHER_DB6, addressing,
};
pub use binary::{agent_binary, next_layout_binary, released_binary};
pub use clients::{Connection, Patience, bound, connect, exchange, transfer};
pub use command::succeed;
pub use echo::{Echo, EchoClient, EchoDatagrams};
pub use hammer::{Hammer, under_load};
pub use hosts::Net;
pub use namespace::{Namespace, run_in};
pub use policies::{dedicated, policy};
pub use polling::Polling;
pub use raw::{
    ACK, Checksum, FIN, PSH, RST, RawClient, RawConnection, Received, SYN, Segment, URG,
};
pub use tampering::Tampering;
pub use tripwire::Protected;
pub use wait::{PATIENCE, wait, wait_until};
pub use wire::Wire;
