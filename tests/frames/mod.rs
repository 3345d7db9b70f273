//! Ethernet frames, byte by byte: well-formed ones that Linux delivers, and every known way to
//! write one so that a filter and the network stack may read it differently.
//!
//! Own code on purpose: what builds the tests' packets must not share a mistake with what reads
//! them.

mod addressing;
mod checksum;
mod decoy;
mod extensions;
mod hostile;
mod kinds;
mod packet;
mod plan;
#[cfg(test)]
mod tests;
mod threats;

pub use addressing::Addressing;
pub use checksum::transport_checksum;
pub use decoy::DECOY_PORT;
pub use extensions::{Extension, authentication, chain, fragment, options, routing};
pub use fastrand::Rng;
pub use filter_common::Protocol;
pub use hostile::hostile;
pub use kinds::{
    AUTHENTICATION, DESTINATION_OPTIONS, FRAGMENT, HOP_BY_HOP, IPV4, IPV6, NO_NEXT, ROUTING,
    SERVICE_VLAN, TCP, UDP, VLAN,
};
pub use packet::{MORE, Packet, Piece, SEGMENT, Tag};
pub use plan::Plan;
pub use threats::threats;
