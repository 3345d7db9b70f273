//! The steps of a traced program on one packet, as numbers: the traced programs write them into lines of the log, and the
//! agent puts them into words.

use crate::{ANY_SLOT, Address, Guard};

/// Sources whose packets are traced: a constant of the traced programs, set before they are loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct TracedPrefix {
    /// In words as in the header; IPv4 as IPv4-mapped IPv6.
    pub address: Address,
    pub mask: Address,
    /// 4 or 6.
    pub version: u32,
}

impl TracedPrefix {
    /// Whether it holds a source of this IP version.
    #[inline(always)]
    pub const fn holds(&self, version: u32, source: &Address) -> bool {
        let mut differs = version ^ self.version;
        let mut word = 0;
        while word < 4 {
            differs |= (source[word] ^ self.address[word]) & self.mask[word];
            word += 1;
        }
        differs == 0
    }
}

/// Indexes of the map by which the agent bounds what a traced program logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Budget {
    /// Lines that may be logged, counted from the beginning of the trace. The agent writes it.
    Granted = 0,
    /// Lines that the packets so far would have made.
    Wanted = 1,
    /// Lines that were not logged.
    Lost = 2,
    /// The slot of the only database of interest, or `ANY_SLOT`. The agent writes it.
    Slot = 3,
}

impl Budget {
    pub const ALL: [Self; 4] = [Self::Granted, Self::Wanted, Self::Lost, Self::Slot];
}

/// As what a packet was parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Parsed {
    /// Neither TCP nor UDP.
    Other = 0,
    LaterFragment = 1,
    Tcp = 2,
    Udp = 3,
    /// It could be aimed at any port.
    Unclear = 4,
}

impl Parsed {
    pub const ALL: [Self; 5] = [
        Self::Other,
        Self::LaterFragment,
        Self::Tcp,
        Self::Udp,
        Self::Unclear,
    ];
}

/// Where the verdict on a source was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum LookedUp {
    /// The source was not looked up.
    Nowhere = 0,
    VerdictCache = 1,
    /// The prefix Bloom filter did not match.
    Bloom = 2,
    Tries = 3,
}

impl LookedUp {
    pub const ALL: [Self; 4] = [Self::Nowhere, Self::VerdictCache, Self::Bloom, Self::Tries];
}

/// The decision on a packet at the interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Decision {
    /// No database has the port.
    NotConcerned = 0,
    Allowed = 1,
    Dropped = 2,
    /// Its connection was refused before, since TLS is forced.
    Refused = 3,
}

impl Decision {
    pub const ALL: [Self; 4] = [
        Self::NotConcerned,
        Self::Allowed,
        Self::Dropped,
        Self::Refused,
    ];
}

/// The steps of the program at the interfaces on a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct PacketSteps {
    /// In words as in the header; IPv4 as IPv4-mapped IPv6.
    pub source: Address,
    /// 4 or 6; 0: the packet is not traced.
    pub version: u32,
    /// A `Parsed`.
    pub parsed: u32,
    /// Destination port.
    pub port: u32,
    pub guard: u32,
    /// A `LookedUp`.
    pub looked_up: u32,
    /// The value that was found for the source.
    pub value: u32,
    /// A `Decision`.
    pub decision: u32,
    /// The number of a `Reason`, where it was dropped; of an ending, where it was refused.
    pub why: u32,
    /// Whether nothing is logged, unless a database is concerned: most packets of a source that also has a session by
    /// SSH, or looks at the trace itself.
    pub is_quiet: u32,
}

impl PacketSteps {
    /// Whether the packet concerns the database in a slot, or any database where that is `ANY_SLOT`.
    #[inline(always)]
    pub const fn concerns(&self, slot: u64) -> bool {
        let own = Guard(self.guard).slot();
        if self.decision == Decision::NotConcerned as u32 {
            let is_any = slot == ANY_SLOT as u64 || self.parsed == Parsed::LaterFragment as u32;
            return is_any && self.is_quiet == 0;
        }
        slot == ANY_SLOT as u64 || own == ANY_SLOT || own as u64 == slot
    }
}

/// Where a segment for a socket stands in its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Stand {
    Unknown = 0,
    /// Before the connection is the server's.
    Handshake = 1,
    /// Among the bytes that decide.
    Beginning = 2,
    /// The connection has begun with TLS, by this segment.
    Begun = 3,
    /// Behind those bytes.
    Later = 4,
}

impl Stand {
    pub const ALL: [Self; 5] = [
        Self::Unknown,
        Self::Handshake,
        Self::Beginning,
        Self::Begun,
        Self::Later,
    ];
}

/// The steps of the program at the sockets on a segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct SegmentSteps {
    /// Whether it was judged.
    pub is_judged: u32,
    pub guard: u32,
    /// A `Stand`.
    pub stand: u32,
    /// Where its data begins in the stream, in bytes, while that is among those that decide.
    pub place: u32,
    /// The number of a `Reason`.
    pub reason: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    const V4: Address = [0, 0, 0xffff_u32.to_be(), 0xc633_6407_u32.to_be()];

    #[test]
    fn a_traced_prefix_holds_sources_of_its_own_version() {
        let prefix = TracedPrefix {
            address: [0, 0, 0xffff_u32.to_be(), 0xc633_6400_u32.to_be()],
            mask: [u32::MAX, u32::MAX, u32::MAX, 0xffff_ff00_u32.to_be()],
            version: 4,
        };
        assert!(prefix.holds(4, &V4));
        assert!(!prefix.holds(6, &V4));
        assert!(!prefix.holds(4, &[0, 0, 0xffff_u32.to_be(), 0xc633_6507_u32.to_be()]));
        let all = TracedPrefix {
            address: [0; 4],
            mask: [0; 4],
            version: 6,
        };
        assert!(all.holds(6, &V4) && !all.holds(4, &V4));
    }

    #[test]
    fn packets_of_other_databases_are_told_apart_from_those_that_may_be_any_ones() {
        let allowed = PacketSteps {
            guard: Guard::new(3, false).0,
            decision: Decision::Allowed as u32,
            ..PacketSteps::default()
        };
        assert!(allowed.concerns(0) && allowed.concerns(3) && !allowed.concerns(4));
        let malformed = PacketSteps {
            guard: Guard::new(ANY_SLOT, false).0,
            decision: Decision::Dropped as u32,
            ..allowed
        };
        assert!(malformed.concerns(0) && malformed.concerns(4));
        let other = PacketSteps::default();
        assert!(other.concerns(0) && !other.concerns(4));
        let session = PacketSteps {
            is_quiet: 1,
            ..other
        };
        assert!(!session.concerns(0));
        let fragment = PacketSteps {
            parsed: Parsed::LaterFragment as u32,
            ..other
        };
        assert!(fragment.concerns(4));
    }
}
