//! Definitions that the packet path and the agent share: map keys and values, reasons, limits and names.
#![no_std]

mod cache;
mod guard;
pub mod opening;
pub mod steps;
mod value;

pub use cache::{CacheEntry, EntryPointer};
pub use guard::{Guard, Port};
pub use value::{BAD_SOURCE, NO_RULE, RuleValue};

/// Version of everything pinned: map names, types, sizes and the meaning of their values. Pins live
/// under a directory of this number, so two layouts never meet in one map. Whoever changes any of
/// these raises it.
pub const LAYOUT: u32 = if NEXT_LAYOUT { 9 } else { 8 };

/// Whether this is the build that tests upgrade to: as this one, but with maps of other sizes and rows of
/// counters of another length.
const NEXT_LAYOUT: bool = cfg!(feature = "next-layout");

/// VLAN tags the parser follows. Linux unwraps stacked priority tags (VID 0) without limit, so a
/// frame with more is dropped, not passed.
pub const MAX_VLAN_TAGS: usize = 4;

/// Extension headers the parser follows before the transport header. RFC 8200 section 4.1 lists six
/// kinds that each occur at most once, destination options twice.
pub const MAX_EXTENSION_HEADERS: usize = 8;

/// Databases in a policy.
pub const MAX_DATABASES: usize = 127;

/// Database slots in the kernel, slot 0 excepted: enough for a reload that replaces every database,
/// since a slot is not reused before its last packet was judged.
pub const SLOTS: u32 = if NEXT_LAYOUT { 512 } else { 256 };

/// The slot of packets that could be aimed at any database.
pub const ANY_SLOT: u16 = 0;

/// Rules in one database's allowlist.
pub const MAX_RULES: usize = 30;

/// Temporary blocks of one database.
pub const MAX_BLOCKS: usize = 30;

/// Rule ids in the kernel: for each slot the allowlist, the blocks, the cluster, the regional network and the
/// Internet. A `RuleValue` has 15 bits for them.
pub const RULE_IDS: u32 = SLOTS * (MAX_RULES + MAX_BLOCKS + 3) as u32;

/// Prefixes that each trie of blocks has room for: those of every database, old and new together.
pub const BLOCKED_PREFIXES: u32 = SLOTS * MAX_BLOCKS as u32;

/// Longest name of a database or a region, in bytes.
pub const MAX_NAME: usize = 60;

/// Prefixes each LPM trie is made for, per address family, where the operator names no other number.
pub const DEFAULT_MAX_PREFIXES: u32 = 1 << 20;

/// Entries of the map of local addresses.
pub const MAX_LOCALS: u32 = 16384;

/// Where the set of protocols with monitored ports begins, in the word that also holds the set of
/// those with enforced ones.
pub const MONITORED_SHIFT: u32 = 16;

/// A transport protocol that a database can listen on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Protocol {
    Tcp = 0,
    Udp = 1,
}

impl Protocol {
    pub const ALL: [Self; 2] = [Self::Tcp, Self::Udp];

    /// This protocol's bit in a set of protocols.
    pub const fn bit(self) -> u32 {
        1 << self as u32
    }

    /// The same for a protocol with a port that is monitored only, beside those in one word.
    pub const fn monitored_bit(self) -> u32 {
        self.bit() << MONITORED_SHIFT
    }

    /// The name in the policy and in output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }

    /// Number in the IP header (IANA protocol numbers).
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }
}

/// Entries of the port map: every port of every protocol.
pub const PORTS: u32 = 2 << 16;

/// Index of a port (host byte order) in the port map.
pub const fn port_index(protocol: Protocol, port: u16) -> u32 {
    ((protocol as u32) << 16) | port as u32
}

/// How TLS begins on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum Engine {
    Postgresql = 1,
    Mysql = 2,
    Redis = 3,
    Mongodb = 4,
    Other = 5,
}

impl Engine {
    pub const ALL: [Self; 5] = [
        Self::Postgresql,
        Self::Mysql,
        Self::Redis,
        Self::Mongodb,
        Self::Other,
    ];
}

/// Entries of the map of answers: one for each engine, by its number.
pub const ANSWERS: u32 = 8;

/// Bytes of an answer, where there is one.
pub const ANSWER_LENGTH: usize = 128;

/// The error that a refused client receives in its own protocol before the connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Answer {
    /// `ANSWER_LENGTH`, or 0: the connection is only reset.
    pub length: u32,
    pub bytes: [u8; ANSWER_LENGTH],
}

/// A segment's source and destination address, in words, which are copied faster than bytes: as in the header;
/// IPv4 as IPv4-mapped IPv6.
pub type Address = [u32; 4];

/// Key of the map of SYNs that the XDP program let pass to a port where TLS is forced: by it the program at the socket
/// finds out which port of this host a connection was for whose destination was translated. Without the source port, which may be
/// translated too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Syn {
    pub source: Address,
    pub sequence: u32,
}

/// Entries of the map of SYNs: of a flood, as many as come between XDP and the socket. Before Linux 6.16 each processor
/// keeps 128 for itself, and one that finds none left takes the latest from the others (d4adf1c9ee77).
pub const SYNS: u32 = 1 << 15;

/// In `LocalKey::port`, beside no port: SYNs that look the same went to different ports.
pub const AMBIGUOUS: u32 = u32::MAX;

/// Entries of the map of sources that came through a filtered interface with addresses of this host's own networks.
pub const OUTSIDERS: u32 = 1 << 14;

/// Key of the map of sockets that connections through this host's ports reach by another address or port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Published {
    pub address: Address,
    /// Host byte order.
    pub port: u32,
    /// Inode number of the network namespace.
    pub namespace: u32,
}

/// Entries of that map: listening sockets in containers, and those that there were. None is pushed out: connections of its
/// socket would not be judged any more.
pub const PUBLISHED: u32 = 1 << 16;

/// Key of the map of refused connections, as both programs know them: addresses and ports of the server may differ
/// between interface and socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Client {
    pub source: Address,
    /// Source port, as in the header.
    pub port: u32,
    /// Of the database.
    pub slot: u32,
}

/// A refused connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Refusal {
    /// The next sequence number that the server expects.
    pub next: u32,
    /// Set of the bits below.
    pub state: u32,
}

impl Refusal {
    /// The client has the answer.
    pub const ANSWERED: u32 = 1;
    /// A reset was sent to the server.
    pub const RESET_SENT: u32 = 2;
    /// The answer is a reset without words: that TLS is required is not what the client has to be told.
    pub const WORDLESS: u32 = 4;
}

/// Refused connections that are kept in mind: one that is forgotten is refused again.
pub const REFUSALS: u32 = 1 << 14;

/// Source, destination and both ports of a connection, as in its client's headers.
pub type Connection = [u32; 9];

/// Entries of the map of connections whose opening came with the end of their handshake.
pub const HANDSHAKES: u32 = 1 << 12;

/// Entries of the map of networks whose clients are local ones to containers.
pub const LOCAL_NETWORKS: u32 = 1024;

/// The judgement of a connection, in its socket's storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Judgement {
    /// Sequence number of the stream's first byte.
    pub base: u64,
    /// Set of the bits below.
    pub state: u64,
    /// How the stream may have begun, going by what was let pass: `opening::Forms`.
    pub forms: u64,
    /// The decisive places that were let pass, a bit for each.
    pub seen: u64,
    /// The PROXY header before the opening; zero: none was let pass yet.
    pub header: u64,
}

impl Judgement {
    /// Counted, by its `Fate`.
    pub const COUNTED: u64 = 1;
    /// The connection is from before TLS was forced, and goes on unjudged.
    pub const UNJUDGED: u64 = 2;
    /// The connection is refused. Without it a connection that has no form left was only monitored.
    pub const REFUSED: u64 = 4;
}

/// How connections from before TLS was forced are treated: a set of the bits below, or zero. They have received
/// more than is judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Existing(pub u32);

impl Existing {
    pub const NOTHING: Self = Self(0);
    /// Each is counted when it sends something.
    pub const COUNTED: Self = Self(1);
    /// Each is judged by what it sends next.
    pub const JUDGED: Self = Self(2);

    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}

/// Longest PROXY header, in bytes. Those of load balancers are below 600.
pub const MAX_PROXY_HEADER: u32 = 1024;

/// The highest of `Guard::judged_bytes`.
pub const MOST_JUDGED_BYTES: u64 = opening::PLACES as u64 + MAX_PROXY_HEADER as u64;

/// Where the kernel keeps what it has no helper for, in bytes: found in its type information (BTF), which is of the
/// running kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct KernelOffsets {
    /// Of the pointer to the network namespace in `struct sock`.
    pub namespace: u32,
    /// Of the inode number in `struct net`.
    pub inode: u32,
    /// Of the first sequence number in `struct tcp_request_sock`.
    pub first: u32,
}

/// Key of the map of local addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct LocalKey {
    /// Network byte order; IPv4 as IPv4-mapped IPv6 (RFC 4291 section 2.5.5.2).
    pub address: [u8; 16],
    /// As `port_index`.
    pub port: u32,
}

/// IPv4-mapped form of an IPv4 address, network byte order.
pub const fn mapped(v4: [u8; 4]) -> [u8; 16] {
    let [a, b, c, d] = v4;
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
}

/// Data of an LPM key: the section, always matched whole, then the source address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct Source4 {
    pub section: Section,
    /// Network byte order.
    pub address: [u8; 4],
}

/// Data of an LPM key: the section, always matched whole, then the source address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct Source6 {
    pub section: Section,
    /// Network byte order.
    pub address: [u8; 16],
}

/// Leading bits that key the two bitmaps of IPv4: nothing else is asked where no allowed prefix contains an address with
/// the same bits, and a trie at once where one prefix holds all addresses with them. The prefix Bloom filter decides
/// between, and has nothing of prefixes of so many bits or fewer.
pub const BITMAP_PREFIX_BITS: u32 = 22;

/// Leading bits that key the prefix Bloom filter: a trie is searched only if some allowed prefix contains an
/// address with the same bits.
pub const BLOOM_PREFIX_BITS: u32 = 25;

/// Shorter prefixes are in neither: most of the Internet would match.
pub const BLOOM_SHORTEST: u8 = 8;

/// One line of them, as large as a CPU's cache line: of each that is asked, a packet fetches one.
pub type BloomLine = [u64; 8];

/// Lines of the Bloom filter, 512 KiB for both families, which stays in a CPU's second-level cache. With 100,000
/// prefixes one of 3,000 other addresses matches by mistake, with a million one of eight.
pub const BLOOM_LINES: u32 = 1 << 13;

/// Lines of one bitmap, 512 KiB as well.
const BITMAP_LINES: u32 = (1 << BITMAP_PREFIX_BITS) / (8 * size_of::<BloomLine>() as u32);

/// Lines of all three: those of the bitmaps follow.
pub const PREFIX_LINES: u32 = BLOOM_LINES + 2 * BITMAP_LINES;

/// The line, the word in it and the bit in that word for an IPv4 address as in memory. An address may match where it is
/// set.
#[inline(always)]
pub const fn touched_place(address: u32) -> (u32, usize, u64) {
    let place = u32::from_be(address) >> (32 - BITMAP_PREFIX_BITS);
    (
        BLOOM_LINES + (place >> 9),
        (place >> 6 & 7) as usize,
        1 << (place & 63),
    )
}

/// The same for the second bitmap. An address matches where it is set.
#[inline(always)]
pub const fn held_place(address: u32) -> (u32, usize, u64) {
    let (line, word, bit) = touched_place(address);
    (line + BITMAP_LINES, word, bit)
}

/// Leading bits of IPv4 addresses that key the bits of the prefix Bloom filter for the surroundings of long prefixes.
pub const NEAR_PREFIX_BITS: u32 = 29;

/// The bit of a word of the prefix Bloom filter that says that it has no such bits, because they would be too many.
pub const CROWDED: u64 = 1 << 63;

/// The word and the bits in it for an IPv4 address as in memory, in the line that `bloom_place` names. An address may match
/// where all of the bits are set, or the word is `CROWDED`.
#[inline(always)]
pub const fn near_place(address: u32) -> (usize, u64) {
    let beginning = address & (u32::MAX << (32 - NEAR_PREFIX_BITS)).to_be();
    // A multiplier of MurmurHash3's: with that of `bloom_place`, entries of one line would differ in few bits.
    let hash = (beginning as u64).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let bits = 1 << (hash >> 58) | 1 << (hash >> 52 & 63);
    ((hash >> 49 & 7) as usize, bits & !CROWDED)
}

/// The line, the word in it and the bits in that word for an address, by its first four bytes as in
/// memory. An address may match where all of the bits are set.
#[inline(always)]
pub const fn bloom_place(first: u32, is_v4: bool) -> (u32, usize, u64) {
    let beginning = first & (u32::MAX << (32 - BLOOM_PREFIX_BITS)).to_be();
    let family = (is_v4 as u64) << 32;
    // Fibonacci hashing: the highest bits of a product with 2^64 over the golden ratio.
    let hash = (beginning as u64 | family).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let bits = 1 << (hash >> 42 & 63) | 1 << (hash >> 36 & 63) | 1 << (hash >> 30 & 63);
    (
        (hash >> 51) as u32,
        (hash >> 48 & 7) as usize,
        bits & !CROWDED,
    )
}

/// Bits of the section in front of the address in an LPM key.
pub const SECTION_BITS: u32 = 32;

/// A part of a trie that is searched by itself: what one database's rules allow, or its cluster. As in the key: the slot
/// in the last two bytes, big endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Section(pub [u8; 4]);

impl Section {
    /// Prefixes that a database's rules allow, or that its blocks hold.
    pub const fn rules(slot: u16) -> Self {
        Self((slot as u32).to_be_bytes())
    }

    /// Prefixes of a database's cluster, which no rule and no block changes.
    pub const fn cluster(slot: u16) -> Self {
        Self((1 << 16 | slot as u32).to_be_bytes())
    }

    pub const fn is_cluster(self) -> bool {
        self.0[1] != 0
    }

    pub const fn slot(self) -> u16 {
        u16::from_be_bytes([self.0[2], self.0[3]])
    }

    /// The same section of a database in another slot.
    pub const fn with_slot(self, slot: u16) -> Self {
        if self.is_cluster() {
            Self::cluster(slot)
        } else {
            Self::rules(slot)
        }
    }
}

/// Why a packet for a protected port got its verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum Reason {
    /// An allowed prefix holds the source, and has not ended. Such packets are counted as hits of their rule; the counter
    /// of this reason holds those of rules that were removed.
    Allowed = 0,
    /// No allowed prefix holds the source.
    NotAllowed = 1,
    /// A source that no host may have on the wire.
    BadSource = 2,
    /// The packet, or its first fragment, ends before the ports.
    Truncated = 3,
    /// Impossible header: version, IHL below 5, length below the header's or beyond the packet.
    BadHeader = 4,
    /// More than `MAX_VLAN_TAGS` tags.
    VlanTags = 5,
    /// More than `MAX_EXTENSION_HEADERS` extension headers, or a packet inside a routing header.
    ExtensionHeaders = 6,
    /// The port belongs to different databases by address, and which address the packet ends at
    /// is unknown: source-routed, multicast or broadcast.
    Destination = 7,
    /// A map could not be read, or written.
    NoPolicy = 8,
    /// TLS is forced, and the connection does not begin with it.
    NotTls = 9,
    /// TLS is forced, and what the packet holds of the connection's beginning cannot be judged.
    TlsUnclear = 10,
    /// TLS is forced, and nothing judges connections.
    TlsUnenforced = 11,
    /// TLS is forced behind a PROXY header, and the connection does not begin with one.
    NoProxyHeader = 12,
    /// A block holds the source, which a rule would allow.
    Blocked = 13,
}

impl Reason {
    pub const ALL: [Self; 14] = [
        Self::Allowed,
        Self::NotAllowed,
        Self::BadSource,
        Self::Truncated,
        Self::BadHeader,
        Self::VlanTags,
        Self::ExtensionHeaders,
        Self::Destination,
        Self::NoPolicy,
        Self::NotTls,
        Self::TlsUnclear,
        Self::TlsUnenforced,
        Self::NoProxyHeader,
        Self::Blocked,
    ];

    /// The name in output and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::NotAllowed => "not-allowed",
            Self::BadSource => "bad-source",
            Self::Truncated => "truncated",
            Self::BadHeader => "bad-header",
            Self::VlanTags => "vlan-tags",
            Self::ExtensionHeaders => "extension-headers",
            Self::Destination => "destination",
            Self::NoPolicy => "no-policy",
            Self::NotTls => "not-tls",
            Self::TlsUnclear => "tls-unclear",
            Self::TlsUnenforced => "tls-unenforced",
            Self::NoProxyHeader => "no-proxy-header",
            Self::Blocked => "blocked",
        }
    }
}

/// A packet that was not allowed, as it stands in the ring buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Sample {
    /// As in the header; IPv4 in the first half of the second.
    pub source: [u64; 2],
    /// In its lowest byte 4, 6, or 0: the packet has no readable source. In the next the number of an `OpeningKind`, or 0.
    pub family: u32,
    /// A `Reason`.
    pub reason: u32,
    pub guard: Guard,
    /// Index of the interface that it came in through; for the agent's own probes that of loopback.
    pub interface: u32,
}

/// Bytes of the ring buffer of samples: room for some 13,000.
pub const SAMPLE_RING_BYTES: u32 = 1 << 19;

/// Entries of a CPU's verdict cache, a power of two. A source has one place, and takes it from another.
pub const CACHED_SOURCES: u32 = 1 << 10;

/// Places that limit samples of packets whose source is not looked up, a power of two.
pub const SAMPLE_PLACES: u32 = 64;

/// Samples that a CPU may take for each place whenever the agent grants more, which it does every second. A
/// flood from one source leaves the samples of other places.
pub const SAMPLES_GRANTED: u32 = 4;

/// The counters of a slot: a row of what was enforced, then one of what was only monitored. A row has the
/// reasons of packets first, from `first_fate` on the fates of connections, and then their stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CounterRow {
    pub length: u32,
    pub first_fate: u32,
}

impl CounterRow {
    /// The rows of a layout, for an agent that takes its counters over.
    pub const fn of(layout: u32) -> Self {
        let (length, first_fate) = match layout {
            0..=3 => (16, 12),
            4 => (32, 27),
            5..=7 => (32, 24),
            // Of the build that tests upgrade to.
            _ => (64, 50),
        };
        Self { length, first_fate }
    }

    /// Entries of the counter map for so many slots.
    pub const fn counters(self, slots: u32) -> u32 {
        slots * 2 * self.length
    }

    /// Indexes of all counters of one slot.
    pub const fn of_slot(self, slot: u16) -> core::ops::Range<u32> {
        let first = slot as u32 * 2 * self.length;
        first..first + 2 * self.length
    }

    /// Index of the counter of a reason.
    pub const fn reason(self, slot: u16, reason: Reason, monitored: bool) -> u32 {
        (slot as u32 * 2 + monitored as u32) * self.length + reason as u32
    }

    pub(crate) const fn first_stage(self) -> u32 {
        self.first_fate + Fate::ALL.len() as u32
    }

    /// Index of the counter of connections at a stage.
    pub const fn stage(self, slot: u16, stage: Stage, monitored: bool) -> u32 {
        (slot as u32 * 2 + monitored as u32) * self.length + self.first_stage() + stage as u32
    }

    /// Index of the counter of a fate.
    pub const fn fate(self, slot: u16, fate: Fate, monitored: bool) -> u32 {
        (slot as u32 * 2 + monitored as u32) * self.length + self.first_fate + fate as u32
    }
}

/// The rows of this layout.
pub const COUNTER_ROW: CounterRow = CounterRow::of(LAYOUT);

/// Entries of the counter map.
pub const COUNTERS: u32 = COUNTER_ROW.counters(SLOTS);

/// The result of judging a connection to a port where TLS is forced. Counted once for each connection, beside
/// the reasons of its packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Fate {
    /// The connection began with TLS.
    Tls = 0,
    /// A CancelRequest in the clear.
    Cancel = 1,
    /// The connection was open before TLS was forced.
    Unjudged = 2,
    /// The connection was refused.
    Refused = 3,
}

impl Fate {
    pub const ALL: [Self; 4] = [Self::Tls, Self::Cancel, Self::Unjudged, Self::Refused];

    /// The name in output and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tls => "tls",
            Self::Cancel => "cancel",
            Self::Unjudged => "unjudged",
            Self::Refused => "refused",
        }
    }
}

/// How far a connection to a port where TLS is forced has come. That one begins, and none arrives, says that connections
/// are not judged here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Stage {
    /// Its SYN was let pass at the interface.
    Begun = 0,
    /// Its SYN, or that again, was for a socket of this host.
    Arrived = 1,
}

impl Stage {
    pub const ALL: [Self; 2] = [Self::Begun, Self::Arrived];
}

/// Entries of the map of hits.
pub const HITS: u32 = RULE_IDS * 2;

/// Index of a rule's hits: packets that it allowed, while its database was only monitored or was not.
pub const fn hit_index(rule: u32, monitored: bool) -> u32 {
    rule * 2 + monitored as u32
}

/// A text in a map value: what a slot or a rule id stands for, so that a restarted agent finds the
/// names of what it left behind. Length zero: free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Name {
    /// The slot of a rule's database; in the map of slots unused.
    pub slot: u16,
    pub length: u8,
    pub text: [u8; MAX_NAME + 1],
}

impl Name {
    pub const FREE: Self = Self {
        slot: 0,
        length: 0,
        text: [0; MAX_NAME + 1],
    };

    /// `None` when the text is empty or longer than the field.
    pub fn new(slot: u16, text: &str) -> Option<Self> {
        let mut name = Self { slot, ..Self::FREE };
        name.text
            .get_mut(..text.len())?
            .copy_from_slice(text.as_bytes());
        name.length = text.len() as u8;
        (name.length > 0).then_some(name)
    }

    /// `None` when free, or when the bytes are no text.
    pub fn text(&self) -> Option<&str> {
        let bytes = self.text.get(..self.length as usize)?;
        core::str::from_utf8(bytes)
            .ok()
            .filter(|text| !text.is_empty())
    }
}

/// Whether no host may have this source address on the wire: unspecified and "this network"
/// (RFC 1122 section 3.2.1.3), loopback, multicast, limited broadcast.
#[inline(always)]
pub const fn is_bad_source4(bits: u32) -> bool {
    // Two comparisons for most sources.
    let top = bits >> 24;
    let is_unicast = top.wrapping_sub(1) < 126 || top.wrapping_sub(128) < 96;
    !is_unicast && (top < 240 || bits == u32::MAX)
}

/// Whether no host may have this source address on the wire: unspecified, loopback, multicast,
/// IPv4-mapped (RFC 4291 section 2.5).
#[inline(always)]
pub const fn is_bad_source6(bits: u128) -> bool {
    bits <= 1 || bits >> 120 == 0xff || bits >> 32 == 0xffff
}

const _: () = {
    assert!(size_of::<Guard>() == 4);
    assert!(size_of::<Port>() == 8);
    assert!(size_of::<LocalKey>() == 20);
    assert!(size_of::<Source4>() == 8);
    assert!(size_of::<Source6>() == 20);
    assert!(size_of::<Name>() == 64);
    assert!(size_of::<Answer>() == 132);
    assert!(size_of::<Syn>() == 20);
    assert!(size_of::<Published>() == 24);
    assert!(size_of::<Client>() == 24);
    assert!(size_of::<Judgement>() == 40);
    assert!(size_of::<Sample>() == 32);
    assert!(size_of::<steps::TracedPrefix>() == 36);
    // Every id, one more for its end, and neither `NO_RULE` nor `BAD_SOURCE`.
    assert!(RULE_IDS + 1 < 0x7fff);
    // Room for more reasons and fates.
    assert!(Reason::ALL.len() as u32 + 10 <= COUNTER_ROW.first_fate);
    assert!(COUNTER_ROW.first_stage() + (Stage::ALL.len() as u32) < COUNTER_ROW.length);
};

#[cfg(feature = "user")]
mod pod {
    use super::*;

    // SAFETY: repr(C) or transparent over integers and byte arrays, no padding (sizes asserted
    // above), every bit pattern valid.
    unsafe impl aya::Pod for Guard {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Port {}
    // SAFETY: as above.
    unsafe impl aya::Pod for LocalKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for RuleValue {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Source4 {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Source6 {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Name {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Answer {}
    // SAFETY: as above.
    unsafe impl aya::Pod for KernelOffsets {}
    // SAFETY: as above.
    unsafe impl aya::Pod for steps::TracedPrefix {}

    impl Sample {
        /// Reads a sample from the ring buffer; `None` where it has another length.
        pub fn read(bytes: &[u8]) -> Option<Self> {
            let is_whole = bytes.len() == size_of::<Self>();
            // SAFETY: as many bytes as the type has, which need no alignment here; repr(C) over integers,
            // no padding (size asserted above), every bit pattern valid.
            is_whole.then(|| unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() })
        }
    }
}
