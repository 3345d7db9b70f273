//! The guard of a port: one word that says what is done about a packet for it.

use crate::{
    ANY_SLOT, COUNTER_ROW, Engine, Fate, MOST_JUDGED_BYTES, Stage, hit_index, opening::PLACES,
};

/// A port guard: which database a port, or a port of a local address, belongs to, with its flags. Zero: none.
/// The highest bit is not used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Guard(pub u32);

impl Guard {
    /// Below the slot: both together are a row of counters.
    const MONITOR: u32 = 1;
    const SLOT_SHIFT: u32 = 1;
    const SLOT: u32 = 0xffff << Self::SLOT_SHIFT;
    const BY_ADDRESS: u32 = 1 << 17;
    const ENGINE_SHIFT: u32 = 18;
    const CANCEL: u32 = 1 << 21;
    const WIDE: u32 = 1 << 22;
    const UNENFORCED: u32 = 1 << 23;
    const TLS_MONITOR: u32 = 1 << 24;
    const PROXIED: u32 = 1 << 25;
    const CLUSTER: u32 = 1 << 26;
    const BLOCKS: u32 = 1 << 27;

    pub const fn new(slot: u16, monitor: bool) -> Self {
        Self((slot as u32) << Self::SLOT_SHIFT | monitor as u32)
    }

    /// The same guard for a port where TLS is forced. `cancel`: whether PostgreSQL's CancelRequest may
    /// come in the clear.
    pub const fn with_tls(self, engine: Engine, cancel: bool) -> Self {
        let cancel = if cancel { Self::CANCEL } else { 0 };
        Self(self.0 | (engine as u32) << Self::ENGINE_SHIFT | cancel)
    }

    /// The same guard for a port where TLS is not forced.
    pub const fn without_tls(self) -> Self {
        Self(self.0 & !(0x7 << Self::ENGINE_SHIFT))
    }

    /// The same guard for a port where connections without TLS are counted, and let pass.
    pub const fn with_monitored_tls(self) -> Self {
        Self(self.0 | Self::TLS_MONITOR)
    }

    /// The same guard for a port where connections begin with a PROXY header.
    pub const fn proxied(self) -> Self {
        Self(self.0 | Self::PROXIED)
    }

    /// The same guard for a port that stays open where nothing judges its connections.
    pub const fn open_unenforced(self) -> Self {
        Self(self.0 | Self::UNENFORCED)
    }

    /// The same guard for a database that allows a prefix shorter than `BLOOM_SHORTEST`.
    pub const fn wide(self) -> Self {
        Self(self.0 | Self::WIDE)
    }

    /// The same guard for a database that has a cluster.
    pub const fn with_cluster(self) -> Self {
        Self(self.0 | Self::CLUSTER)
    }

    /// The same guard for a database that has blocks.
    pub const fn with_blocks(self) -> Self {
        Self(self.0 | Self::BLOCKS)
    }

    /// The same guard, with a cluster also where another guard of the database has one.
    pub const fn with_cluster_of(self, other: Self) -> Self {
        Self(self.0 | other.0 & Self::CLUSTER)
    }

    /// The same guard, with blocks also where another guard of the database has them.
    pub const fn with_blocks_of(self, other: Self) -> Self {
        Self(self.0 | other.0 & Self::BLOCKS)
    }

    /// The same guard, whatever sources the database allows.
    pub const fn of_any_sources(self) -> Self {
        Self(self.0 & !(Self::WIDE | Self::CLUSTER | Self::BLOCKS))
    }

    /// The same guard for a port whose database depends on the local address.
    pub const fn by_address(self) -> Self {
        Self(self.0 | Self::BY_ADDRESS)
    }

    /// The same guard for a database in another slot.
    pub const fn with_slot(self, slot: u16) -> Self {
        Self(self.0 & !Self::SLOT | (slot as u32) << Self::SLOT_SHIFT)
    }

    /// The guard of a port that this one's database shares, by local address, with another's: what
    /// cannot be told apart counts on neither, and is let pass only where both are monitored.
    pub const fn shared_with(self, other: Self) -> Self {
        let monitor = self.is_monitor() && other.is_monitor();
        Self::new(ANY_SLOT, monitor).by_address()
    }

    pub const fn is_none(self) -> bool {
        self.0 == 0
    }

    pub const fn slot(self) -> u16 {
        (self.0 >> Self::SLOT_SHIFT) as u16
    }

    /// Index of the hits of one of the database's rules.
    pub const fn hit(self, rule: u32) -> u32 {
        hit_index(rule, self.is_monitor())
    }

    /// Index of the counter of a reason, by the number of the `Reason`.
    pub const fn counter(self, reason: u32) -> u32 {
        (self.0 & (Self::SLOT | Self::MONITOR)) * COUNTER_ROW.length + reason
    }

    /// Index of the counter of a fate.
    pub const fn fate_counter(self, fate: Fate) -> u32 {
        self.counter(COUNTER_ROW.first_fate + fate as u32)
    }

    /// Index of the counter of connections at a stage.
    pub const fn stage_counter(self, stage: Stage) -> u32 {
        self.counter(COUNTER_ROW.first_stage() + stage as u32)
    }

    pub const fn is_by_address(self) -> bool {
        self.0 & Self::BY_ADDRESS != 0
    }

    /// Whether drops are counted only.
    pub const fn is_monitor(self) -> bool {
        self.0 & Self::MONITOR != 0
    }

    /// Engine whose TLS opening is required; 0: TLS is not forced.
    pub const fn engine(self) -> u32 {
        self.0 >> Self::ENGINE_SHIFT & 0x7
    }

    /// The guard by which connections are counted at the socket: monitored, where TLS is.
    pub const fn of_connections(self) -> Self {
        if self.0 & Self::TLS_MONITOR != 0 {
            Self(self.0 | Self::MONITOR)
        } else {
            self
        }
    }

    /// Whether the database allows prefixes that the prefix Bloom filter does not hold.
    pub const fn is_wide(self) -> bool {
        self.0 & Self::WIDE != 0
    }

    pub const fn has_cluster(self) -> bool {
        self.0 & Self::CLUSTER != 0
    }

    pub const fn has_blocks(self) -> bool {
        self.0 & Self::BLOCKS != 0
    }

    /// Whether the port stays open where nothing judges its connections.
    pub const fn is_open_unenforced(self) -> bool {
        self.0 & Self::UNENFORCED != 0
    }

    pub const fn cancel_in_clear(self) -> bool {
        self.0 & Self::CANCEL != 0
    }

    /// Whether a PROXY header comes before the opening.
    pub const fn is_proxied(self) -> bool {
        self.0 & Self::PROXIED != 0
    }

    /// A socket that has received so many bytes is not judged any more: past every decisive place.
    pub const fn judged_bytes(self) -> u64 {
        if self.is_proxied() {
            MOST_JUDGED_BYTES
        } else {
            PLACES as u64
        }
    }
}

/// An entry of the port map: the port guard, and the epoch, which counts the changes to the allowed prefixes.
/// One word: a cached verdict holds for one guard in one epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Port(pub u64);

impl Port {
    pub const fn new(guard: Guard, epoch: u32) -> Self {
        Self((epoch as u64) << 32 | guard.0 as u64)
    }

    pub const fn guard(self) -> Guard {
        Guard(self.0 as u32)
    }

    /// The same epoch with the guard of one of the port's local addresses.
    pub const fn with_guard(self, guard: Guard) -> Self {
        Self::new(guard, (self.0 >> 32) as u32)
    }
}
