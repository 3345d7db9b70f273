//! The maps, and the verdict for a parsed packet.

use core::{
    arch::asm,
    ptr::{read_volatile, write_volatile},
};

use aya_ebpf::{
    bindings::{BPF_F_NO_PREALLOC, BPF_RB_NO_WAKEUP},
    btf_maps::{Array, HashMap, LpmTrie, PerCpuArray, RingBuf, lpm_trie::Key},
    helpers::generated::bpf_ktime_get_boot_ns,
    macros::btf_map,
    programs::XdpContext,
};
use filter_common::{
    ANY_SLOT, Address, BAD_SOURCE, BLOCKED_PREFIXES, BloomLine, CACHED_SOURCES, COUNTERS, CROWDED,
    CacheEntry, DEFAULT_MAX_PREFIXES, EntryPointer, Fate, Guard, LocalKey, MAX_LOCALS,
    MONITORED_SHIFT, NO_RULE, Name, PORTS, PREFIX_LINES, Port, Protocol, RULE_IDS, Reason,
    RuleValue, SAMPLE_PLACES, SAMPLE_RING_BYTES, SAMPLES_GRANTED, SECTION_BITS, SLOTS, Sample,
    Section, Source4, Source6, Stage, bloom_place, held_place, is_bad_source4, is_bad_source6,
    mapped, near_place, port_index,
    steps::{LookedUp, Parsed},
    touched_place,
};

use crate::{
    answer::Ending,
    parse::{Addresses, Packet, Segment, bytes_of},
    refuse::{self, Course},
    socket, steps,
};

/// Which database a port belongs to.
#[btf_map]
static PORT_GUARDS: Array<Port, { PORTS as usize }> = Array::new();
/// The same for ports whose database depends on the local address.
#[btf_map]
static LOCAL_GUARDS: HashMap<
    LocalKey,
    Guard,
    { MAX_LOCALS as usize },
    { BPF_F_NO_PREALLOC as usize },
> = HashMap::new();
/// Protocols with an enforced port and those with a monitored one: sets of `Protocol::bit` and
/// `Protocol::monitored_bit`.
#[btf_map]
static PROTOCOLS: Array<u32, 1> = Array::new();
/// Allowed prefixes, those of clusters in sections of their own. The longest that holds a source says when the last of
/// all rules that hold it ends.
#[btf_map]
static ALLOWED4: LpmTrie<Source4, RuleValue, { DEFAULT_MAX_PREFIXES as usize }> = LpmTrie::new();
#[btf_map]
static ALLOWED6: LpmTrie<Source6, RuleValue, { DEFAULT_MAX_PREFIXES as usize }> = LpmTrie::new();
/// Blocked prefixes. Tries of their own: there is room for a block, however many prefixes are allowed.
#[btf_map]
static BLOCKED4: LpmTrie<Source4, RuleValue, { BLOCKED_PREFIXES as usize }> = LpmTrie::new();
#[btf_map]
static BLOCKED6: LpmTrie<Source6, RuleValue, { BLOCKED_PREFIXES as usize }> = LpmTrie::new();
/// When a rule or a block ends, by its id, in nanoseconds since boot. The agent need not run at that time.
#[btf_map]
static ENDS: Array<u64, { RULE_IDS as usize }> = Array::new();
/// The prefix Bloom filter of every database's allowed prefixes, and the bitmap of /22s in front of it: most of a flood from
/// forged sources does not match, and needs no look-up in a trie, whose cost grows with its size.
#[btf_map]
static PREFIX_BLOOM: Array<BloomLine, { PREFIX_LINES as usize }> = Array::new();
/// The verdict cache: what the tries returned for sources, on this CPU. An entry holds for one epoch.
#[btf_map]
static VERDICT_CACHE: PerCpuArray<CacheEntry, { CACHED_SOURCES as usize }> = PerCpuArray::new();
/// Packets that were not allowed by database slot and reason, and connections by fate: see `CounterRow`.
#[btf_map]
static COUNTS: PerCpuArray<u64, { COUNTERS as usize }> = PerCpuArray::new();
/// Packets that were allowed, by rule id.
#[btf_map]
static HITS: PerCpuArray<u64, { filter_common::HITS as usize }> = PerCpuArray::new();
/// Samples of packets that were not allowed, for the agent. Not pinned: it belongs to one program. The
/// values have no type, since libbpf, and with it bpftool, loads no ring buffer whose values have a size.
#[btf_map]
static SAMPLES: RingBuf<(), { SAMPLE_RING_BYTES as usize }> = RingBuf::new();
/// Samples taken on this CPU of packets whose source was not looked up.
#[btf_map]
static TAKEN: PerCpuArray<u32, { SAMPLE_PLACES as usize }> = PerCpuArray::new();
/// The epoch, names of slots and of rule ids, and the probe packets among the counts: read by the agent
/// only.
#[btf_map]
static EPOCH: Array<u32, 1> = Array::new();
#[btf_map]
static SLOT_NAMES: Array<Name, { SLOTS as usize }> = Array::new();
#[btf_map]
static RULE_NAMES: Array<Name, { RULE_IDS as usize }> = Array::new();
#[btf_map]
static PROBES: Array<u64, { (COUNTERS + filter_common::HITS) as usize }> = Array::new();

/// Samples that the agent has granted so far, to each CPU for each entry of `VERDICT_CACHE` and of `TAKEN`.
/// The kernel makes a map of it, and one instruction of reading it.
#[unsafe(no_mangle)]
static mut GRANTED: u32 = 0;

/// Set in the tag of an IPv6 source. Port guards do not use the bit.
const V6: u64 = 1 << 31;

pub enum Outcome {
    NotConcerned,
    LaterFragment,
    Allowed {
        guard: Guard,
        rule: u32,
        /// Whether TLS is forced on the source.
        force_tls: bool,
    },
    Dropped {
        guard: Guard,
        /// The number of a `Reason`: where it stays a number, the verifier follows one path for all.
        reason: u32,
        /// Whether a sample of it is taken.
        sampled: bool,
    },
    /// The connection was refused at the socket, since TLS is forced.
    Refused {
        guard: Guard,
        ending: Ending,
    },
}

#[inline(always)]
fn dropped(guard: Guard, reason: Reason) -> Outcome {
    let reason = reason as u32;
    Outcome::Dropped {
        guard,
        reason,
        sampled: take_at(reason),
    }
}

#[inline(always)]
pub fn judge(ctx: &XdpContext, packet: &Packet) -> Outcome {
    match packet {
        Packet::Other => Outcome::NotConcerned,
        Packet::LaterFragment => {
            steps::parsed(Parsed::LaterFragment);
            Outcome::LaterFragment
        }
        Packet::Unclear { reason, protocols } => {
            steps::parsed(Parsed::Unclear);
            unclear(*reason, *protocols)
        }
        Packet::Segment(segment) => match judge_noted(ctx, segment) {
            Outcome::Allowed {
                guard,
                rule,
                force_tls: true,
            } => match refuse::follow(ctx, segment, guard) {
                Course::Passes => Outcome::Allowed {
                    guard,
                    rule,
                    force_tls: true,
                },
                Course::Ends(ending) => Outcome::Refused { guard, ending },
                Course::Closed => dropped(guard, Reason::TlsUnenforced),
            },
            outcome @ (Outcome::NotConcerned | Outcome::Allowed { .. }) => {
                if refuse::note_other(ctx, segment) {
                    outcome
                } else {
                    dropped(Guard::new(ANY_SLOT, false), Reason::TlsUnclear)
                }
            }
            Outcome::Dropped {
                guard,
                reason,
                sampled,
            } => {
                // It passes all the same.
                if guard.is_monitor() {
                    refuse::note_other(ctx, segment);
                }
                Outcome::Dropped {
                    guard,
                    reason,
                    sampled,
                }
            }
            outcome => outcome,
        },
    }
}

/// Where no port of these protocols is guarded, the packet cannot reach one.
#[inline(always)]
fn unclear(reason: Reason, protocols: u32) -> Outcome {
    let any = |monitor| Guard::new(ANY_SLOT, monitor);
    let Some(guarded) = PROTOCOLS.get(0) else {
        return dropped(any(false), Reason::NoPolicy);
    };
    if guarded & protocols != 0 {
        dropped(any(false), reason)
    } else if guarded & (protocols << MONITORED_SHIFT) != 0 {
        dropped(any(true), reason)
    } else {
        Outcome::NotConcerned
    }
}

#[inline(always)]
fn judge_noted(ctx: &XdpContext, segment: &Segment) -> Outcome {
    steps::segment(ctx, segment);
    judge_segment(segment)
}

#[inline(always)]
fn judge_segment(segment: &Segment) -> Outcome {
    let port = port_index(segment.protocol, segment.port);
    let Some(&found) = PORT_GUARDS.get(port) else {
        return dropped(Guard::new(ANY_SLOT, false), Reason::NoPolicy);
    };
    let guard = found.guard();
    if guard.is_none() {
        return Outcome::NotConcerned;
    }
    if !guard.is_by_address() {
        return judge_source(segment, found);
    }
    let Addresses {
        is_v4, destination, ..
    } = segment.addresses;
    let (address, many) = if is_v4 {
        let address = (destination[1] as u32).to_ne_bytes();
        (
            mapped(address),
            address[0] >> 4 == 0xe || address == [0xff; 4],
        )
    } else {
        let address = octets(destination);
        (address, address[0] == 0xff)
    };
    if many || segment.source_routed {
        return dropped(guard, Reason::Destination);
    }
    // SAFETY: the value is a plain integer that is copied at once; an update replaces the element.
    match unsafe { LOCAL_GUARDS.get(LocalKey { address, port }) } {
        Some(&guard) => judge_source(segment, found.with_guard(guard)),
        None => Outcome::NotConcerned,
    }
}

/// The guard of a port of a local address, for a TCP segment that is about to be given to a socket.
#[inline(always)]
pub fn guard_of(key: &LocalKey) -> Option<Guard> {
    let guard = PORT_GUARDS
        .get(port_index(Protocol::Tcp, key.port as u16))?
        .guard();
    if !guard.is_by_address() {
        return (!guard.is_none()).then_some(guard);
    }
    let key = LocalKey {
        port: port_index(Protocol::Tcp, key.port as u16),
        ..*key
    };
    // SAFETY: as in `judge_segment`.
    unsafe { LOCAL_GUARDS.get(key) }.copied()
}

/// Whether TLS is forced on a port, of some of its addresses at least.
#[inline(always)]
pub fn is_forced(port: u16) -> bool {
    let guard = PORT_GUARDS.get(port_index(Protocol::Tcp, port));
    guard.is_none_or(|port| port.guard().engine() != 0 || port.guard().is_by_address())
}

/// Whether TLS is not forced on a source.
#[inline(always)]
pub fn is_exempt(guard: Guard, is_v4: bool, source: &Address) -> bool {
    if !guard.has_cluster() {
        return false;
    }
    let section = Section::cluster(guard.slot());
    let value = if is_v4 {
        let address = source[3].to_ne_bytes();
        value_in(
            &ALLOWED4,
            &Key::new(SECTION_BITS + 32, Source4 { section, address }),
        )
    } else {
        let address = bytes_of(source);
        value_in(
            &ALLOWED6,
            &Key::new(SECTION_BITS + 128, Source6 { section, address }),
        )
    };
    is_in_force(value)
}

/// Whether a value is of a rule or a block that has not ended.
#[inline(always)]
fn is_in_force(value: u32) -> bool {
    value < RuleValue::FIRST_WITH_END || value != NO_RULE && lasts(value)
}

/// Whether a value that has an end still holds. Only packets that such a value decides read the clock.
#[inline(always)]
fn lasts(value: u32) -> bool {
    let end = RuleValue(value).end().and_then(|rule| ENDS.get(rule));
    // SAFETY: the helper takes nothing (5.8).
    let now = unsafe { bpf_ktime_get_boot_ns() };
    end.is_some_and(|&end| end > now)
}

#[inline(always)]
fn judge_source(segment: &Segment, port: Port) -> Outcome {
    let guard = port.guard();
    let Addresses { is_v4, source, .. } = segment.addresses;
    let tag = if is_v4 { port.0 } else { port.0 | V6 };
    let Some(entry) = cache_entry(source) else {
        return dropped(guard, Reason::NoPolicy);
    };
    steps::looked_up(LookedUp::VerdictCache);
    let value = match entry.rule(source, tag) {
        Some(value) if value < RuleValue::FIRST_WITH_END || value == NO_RULE => value,
        _ => value_of(source, tag, entry),
    };
    steps::found(value);
    if value < RuleValue::FIRST_BLOCKED {
        let value = RuleValue(value);
        return Outcome::Allowed {
            guard,
            rule: value.rule(),
            force_tls: guard.engine() != 0 && !value.is_exempt(),
        };
    }
    if value < BAD_SOURCE {
        count_hit(guard, RuleValue(value).rule());
    }
    Outcome::Dropped {
        guard,
        reason: RuleValue(value).reason(),
        sampled: take(entry.taken()),
    }
}

/// The entry of the verdict cache that a source may use.
#[inline(always)]
fn cache_entry(source: [u64; 2]) -> Option<EntryPointer> {
    let entry = VERDICT_CACHE.get_ptr_mut(place(source, CACHED_SOURCES))?;
    // SAFETY: a non-null element of a per-CPU array, which exists as long as the program does.
    Some(unsafe { EntryPointer::new(entry) })
}

/// One of `places`, a power of two, by Fibonacci hashing: the highest bits of a product with 2^64 over
/// the golden ratio.
#[inline(always)]
const fn place(source: [u64; 2], places: u32) -> u32 {
    let hash = (source[0] ^ source[1]).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (hash >> (64 - places.trailing_zeros())) as u32
}

/// The value for a source that is not in the verdict cache, or has a value with an end there; or `BAD_SOURCE`. Writes it to
/// the cache.
///
/// A cached value holds until its end, but not beyond its epoch, so the epoch has to be read before the maps are: also on
/// CPUs that reorder reads.
///
/// Inlined, as all that comes before the last decision: where the verifier of Linux 6.1 looks for what a value depends on,
/// and meets a call, it takes every number as relevant, and follows four times as many paths.
#[inline(always)]
fn value_of([high, low]: [u64; 2], tag: u64, entry: EntryPointer) -> u32 {
    // After the end of a block or of a cluster's member a rule decides.
    if let Some(value) = entry.rule([high, low], tag)
        && lasts(value)
    {
        return value;
    }
    let is_v4 = tag & V6 == 0;
    let (first, is_bad) = if is_v4 {
        (low as u32, is_bad_source4(u32::from_be(low as u32)))
    } else {
        let bits = u128::from(u64::from_be(high)) << 64 | u128::from(u64::from_be(low));
        (first_half(high), is_bad_source6(bits))
    };
    if is_bad {
        steps::looked_up(LookedUp::Nowhere);
        return BAD_SOURCE;
    }
    // Zero, but computed of the tag: no CPU has the index of the line before it has read the epoch.
    let mut zero = tag;
    // SAFETY: one instruction, of a register that it names.
    unsafe {
        asm!("{0} ^= {0}", inout(reg) zero, options(pure, nomem, nostack));
    }
    let line = |line: u32| PREFIX_BLOOM.get(line | zero as u32);
    let matches = |(at, word, bits): (u32, usize, u64)| {
        line(at).is_some_and(|line| line[word] & bits == bits)
    };
    let is_near = || {
        let (at, word, bits) = bloom_place(first, true);
        let (near, near_bits) = near_place(first);
        line(at).is_some_and(|line| {
            let is_there = |found: u64| found & near_bits == near_bits || found & CROWDED != 0;
            line[word] & bits == bits && is_there(line[near])
        })
    };
    let may_match = match is_v4 {
        true => matches(touched_place(first)) && (matches(held_place(first)) || is_near()),
        false => matches(bloom_place(first, false)),
    };
    let guard = Port(tag).guard();
    // Only databases with prefixes too short for the Bloom filter may allow the source then.
    if !may_match && !guard.is_wide() {
        steps::looked_up(LookedUp::Bloom);
        if entry.is_free(tag) {
            entry.remember([high, low], tag, NO_RULE, || ());
        }
        return NO_RULE;
    }
    steps::looked_up(LookedUp::Tries);
    barrier(entry.tag());
    let section = Section::cluster(guard.slot());
    let value = if is_v4 {
        let address = (low as u32).to_ne_bytes();
        let mut key = Key::new(SECTION_BITS + 32, Source4 { section, address });
        let rules = |key: &mut Key<Source4>| key.data.section = Section::rules(guard.slot());
        decide(guard, &mut key, &ALLOWED4, &BLOCKED4, rules)
    } else {
        let address = octets([high, low]);
        let mut key = Key::new(SECTION_BITS + 128, Source6 { section, address });
        let rules = |key: &mut Key<Source6>| key.data.section = Section::rules(guard.slot());
        decide(guard, &mut key, &ALLOWED6, &BLOCKED6, rules)
    };
    entry.remember([high, low], tag, value, || ());
    value
}

/// The value for a source that may be allowed. `key`: of the cluster; `rules` makes it one of the rules, in its place on the
/// stack.
#[inline(always)]
fn decide<K, const ALLOWED: usize>(
    guard: Guard,
    key: &mut Key<K>,
    allowed: &LpmTrie<K, RuleValue, ALLOWED>,
    blocked: &LpmTrie<K, RuleValue, { BLOCKED_PREFIXES as usize }>,
    rules: impl FnOnce(&mut Key<K>),
) -> u32 {
    if guard.has_cluster() {
        let value = value_in(allowed, key);
        if is_in_force(value) {
            return value;
        }
    }
    rules(key);
    let value = value_in(allowed, key);
    if !is_in_force(value) {
        return NO_RULE;
    }
    if guard.has_blocks() {
        let block = value_in(blocked, key);
        if is_in_force(block) {
            return block;
        }
    }
    value
}

/// The value of the longest prefix that holds a source.
#[inline(always)]
fn value_in<K, const M: usize>(trie: &LpmTrie<K, RuleValue, M>, key: &Key<K>) -> u32 {
    trie.get(key).map_or(NO_RULE, |value| value.0)
}

/// Adds nothing to a word, in one instruction (kernel 5.12) that no CPU reorders with reads and writes.
#[inline(always)]
fn barrier(word: *mut u64) {
    // SAFETY: one instruction on eight bytes of a map's element, aligned as the map's values are.
    unsafe {
        asm!(
            "{0} = atomic_fetch_add((u64 *)({1} + 0), {0})",
            inout(reg) 0_u64 => _,
            in(reg) word,
            options(nostack)
        );
    }
}

/// The four bytes that come first in memory.
#[inline(always)]
const fn first_half(bytes: u64) -> u32 {
    if cfg!(target_endian = "little") {
        bytes as u32
    } else {
        (bytes >> 32) as u32
    }
}

#[inline(always)]
fn octets(halves: [u64; 2]) -> [u8; 16] {
    let [a, b] = halves.map(u64::to_ne_bytes);
    [
        a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], b[0], b[1], b[2], b[3], b[4], b[5], b[6],
        b[7],
    ]
}

/// Counts a packet that `rule` allows, or that a block drops.
#[inline(always)]
pub fn count_hit(guard: Guard, rule: u32) {
    increment(HITS.get_ptr_mut(guard.hit(rule)));
}

/// Counts one that is not.
#[inline(always)]
pub fn count(guard: Guard, reason: u32) {
    increment(COUNTS.get_ptr_mut(guard.counter(reason)));
}

/// Takes a sample if the grant allows one more. Reads no clock and writes nothing that CPUs share: a flood
/// that has used up the grant costs one comparison a packet.
#[inline(always)]
fn take(number: *mut u32) -> bool {
    // SAFETY: aligned integers that are there as long as the program is. The agent writes the first; of the second
    // a packet that interrupts a test run may take a sample more than is granted.
    let (granted, taken) = unsafe { (read_volatile(&raw const GRANTED), read_volatile(number)) };
    let may = taken < granted;
    if may {
        let taken = granted.saturating_sub(SAMPLES_GRANTED).max(taken) + 1;
        // SAFETY: as above.
        unsafe { write_volatile(number, taken) };
    }
    may
}

#[inline(always)]
fn take_at(place: u32) -> bool {
    TAKEN.get_ptr_mut(place).is_some_and(take)
}

/// Sends a sample of a packet that was not allowed to the agent. `sampled`: whether one is taken; `None`:
/// decided by the packet's source.
#[inline(always)]
pub fn sample(ctx: &XdpContext, packet: &Packet, guard: Guard, reason: u32, sampled: Option<bool>) {
    let (source, family) = match packet {
        Packet::Segment(Segment { addresses, .. }) => {
            (addresses.source, if addresses.is_v4 { 4 } else { 6 })
        }
        _ => ([0, 0], 0),
    };
    if sampled.unwrap_or_else(|| take_at(place(source, SAMPLE_PLACES))) {
        let interface = ctx.ingress_ifindex() as u32;
        send(source, family << 16 | reason, guard, interface);
    }
}

/// The same for a segment that is not given to its socket. `opening`: names its stream's, for a sample that is taken.
#[inline(always)]
pub fn sample_segment(
    segment: &socket::Segment,
    guard: Guard,
    reason: u32,
    interface: u32,
    opening: impl FnOnce() -> u32,
) {
    let [a, b, c, d] = segment.source.map(u64::from);
    let (source, family) = if segment.is_v4 {
        ([0, d], 4)
    } else {
        ([joined(a, b), joined(c, d)], 6)
    };
    if take_at(place(source, SAMPLE_PLACES)) {
        let what = (opening() & 0xff) << 24 | family << 16 | reason;
        send(source, what, guard, interface);
    }
}

/// Two words as one number of the same bytes in memory.
#[inline(always)]
const fn joined(first: u64, second: u64) -> u64 {
    if cfg!(target_endian = "little") {
        second << 32 | first
    } else {
        first << 32 | second
    }
}

/// Not inlined, for its stack: the functions that judge a stream leave too little. `what`: the upper half is that of
/// `Sample::family`, the lower the reason.
#[inline(never)]
fn send(source: [u64; 2], what: u32, guard: Guard, interface: u32) {
    let sample = Sample {
        source,
        family: what >> 16,
        reason: what & 0xffff,
        guard,
        interface,
    };
    // A full ring loses the sample; the packet is counted all the same. The agent polls: no wake-up.
    let _ = SAMPLES.output_untyped::<Sample>(sample, BPF_RB_NO_WAKEUP.into());
}

/// Counts a connection.
#[inline(always)]
pub fn count_fate(guard: Guard, fate: Fate) {
    increment(COUNTS.get_ptr_mut(guard.fate_counter(fate)));
}

/// Counts a connection at a stage.
#[inline(always)]
pub fn count_stage(guard: Guard, stage: Stage) {
    increment(COUNTS.get_ptr_mut(guard.stage_counter(stage)));
}

#[inline(always)]
fn increment(counter: Option<*mut u64>) {
    if let Some(counter) = counter {
        // SAFETY: a non-null element of a per-CPU array; no packet interrupts another, and of one that
        // interrupts a test run (before Linux 6.3) the count may be lost.
        unsafe { *counter += 1 }
    }
}
