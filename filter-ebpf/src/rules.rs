//! The maps, and the verdict for a parsed packet.

use core::{arch::asm, ptr::read_volatile};

use aya_ebpf::{
    bindings::{BPF_F_NO_PREALLOC, BPF_RB_NO_WAKEUP},
    btf_maps::{Array, HashMap, LpmTrie, PerCpuArray, RingBuf, lpm_trie::Key},
    macros::btf_map,
    programs::XdpContext,
};
use filter_common::{
    ANY_SLOT, COUNTERS, DEFAULT_MAX_PREFIXES, EXEMPT, Fate, Guard, KNOWN_SOURCES, LocalKey,
    MAX_LOCALS, MONITORED_SHIFT, NEAR_LINES, Name, NearLine, PORTS, Port, RULE_IDS, Reason,
    SAMPLE_PLACES, SAMPLES, SAMPLES_GRANTED, SLOT_BITS, SLOTS, Sample, Source4, Source6,
    is_bad_source4, is_bad_source6, mapped, near_place, port_index, slot_key,
};

use crate::{
    answer::Ending,
    parse::{Addresses, Packet, Segment},
    tls,
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
/// Allowed prefixes to the id of the rule that allows, and whether it is exempt from TLS.
#[btf_map]
static ALLOWED4: LpmTrie<Source4, u32, { DEFAULT_MAX_PREFIXES as usize }> = LpmTrie::new();
#[btf_map]
static ALLOWED6: LpmTrie<Source6, u32, { DEFAULT_MAX_PREFIXES as usize }> = LpmTrie::new();
/// What is near an allowed prefix, of any database: most of a flood from forged sources is not, and
/// need not be looked up in a trie, whose cost grows with its size.
#[btf_map]
static NEAR: Array<NearLine, { NEAR_LINES as usize }> = Array::new();
/// What the tries said of sources, on this CPU: it holds for one epoch.
#[btf_map]
static KNOWN: PerCpuArray<Known, { KNOWN_SOURCES as usize }> = PerCpuArray::new();
/// Packets that were not allowed, by database slot and reason; connections by what became of them.
#[btf_map]
static COUNTS: PerCpuArray<u64, { COUNTERS as usize }> = PerCpuArray::new();
/// Packets that were allowed, by rule id.
#[btf_map]
static HITS: PerCpuArray<u64, { filter_common::HITS as usize }> = PerCpuArray::new();
/// Some of the packets that were not allowed: a `Sample` of each, for the agent. Of one program only,
/// not pinned. libbpf, and with it bpftool, loads no ring whose values have a size.
#[btf_map]
static SAMPLED: RingBuf<(), { SAMPLES as usize }> = RingBuf::new();
/// Samples that were taken on this CPU where no source was judged.
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

/// Samples that the agent has granted so far, to each CPU for each place of `KNOWN` and of `TAKEN`. The
/// kernel makes a map of it, and of reading it one instruction.
#[unsafe(no_mangle)]
static mut GRANTED: u32 = 0;

/// A source and its rule, as a guard's database has it.
#[repr(C)]
struct Known {
    /// As in the header; IPv4 in the lower half of the second.
    source: [u64; 2],
    /// The `Port`, with `V6`. Never zero, which is what an entry begins with: no guard is.
    tag: u64,
    /// As in the tries, or `NO_RULE`.
    rule: u32,
    /// Samples taken of the sources of this place.
    taken: u32,
}

impl Known {
    #[inline(always)]
    const fn remember(&mut self, source: [u64; 2], tag: u64, rule: u32) {
        self.source = source;
        self.tag = tag;
        self.rule = rule;
    }
}

/// What no rule's id is, whatever the bits beside it.
const NO_RULE: u32 = u32::MAX;
/// The same, since it is no host's source. Every rule's id is lower.
const BAD_SOURCE: u32 = u32::MAX - 1;

/// In a tag: of an IPv6 source. A bit that guards do not use.
const V6: u64 = 1 << 31;

pub enum Outcome {
    NotConcerned,
    LaterFragment,
    Allowed {
        guard: Guard,
        rule: u32,
        /// Whether TLS is forced on the source.
        force_tls: bool,
        fate: Option<Fate>,
    },
    Dropped {
        guard: Guard,
        reason: Reason,
        /// Whether the agent is to be told.
        sampled: bool,
    },
    /// TLS is forced, and the connection does not begin with it.
    Refused {
        guard: Guard,
        reason: Reason,
        ending: Ending,
        fate: Option<Fate>,
    },
}

#[inline(always)]
fn dropped(guard: Guard, reason: Reason) -> Outcome {
    Outcome::Dropped {
        guard,
        reason,
        sampled: take_at(reason as u32),
    }
}

#[inline(always)]
pub fn judge(ctx: &XdpContext, packet: &Packet) -> Outcome {
    match packet {
        Packet::Other => Outcome::NotConcerned,
        Packet::LaterFragment => Outcome::LaterFragment,
        Packet::Unclear { reason, protocols } => unclear(*reason, *protocols),
        Packet::Segment(segment) => match judge_segment(segment) {
            Outcome::Allowed {
                guard,
                rule,
                force_tls: true,
                ..
            } => judge_stream(ctx, segment, guard, rule),
            outcome => outcome,
        },
    }
}

/// Where TLS is forced on a source that is allowed.
#[inline(always)]
fn judge_stream(ctx: &XdpContext, segment: &Segment, guard: Guard, rule: u32) -> Outcome {
    let judged = tls::judge(ctx, segment, guard);
    match judged.refused() {
        None => Outcome::Allowed {
            guard,
            rule,
            force_tls: true,
            fate: judged.fate(),
        },
        Some((reason, ending)) => Outcome::Refused {
            guard,
            reason,
            ending,
            fate: judged.fate(),
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

#[inline(always)]
fn judge_source(segment: &Segment, port: Port) -> Outcome {
    let guard = port.guard();
    let Addresses { is_v4, source, .. } = segment.addresses;
    let tag = if is_v4 { port.0 } else { port.0 | V6 };
    let Some(known) = known(source) else {
        return dropped(guard, Reason::NoPolicy);
    };
    let rule = if known.tag == tag && known.source == source {
        known.rule
    } else {
        rule_of(source, tag, known)
    };
    if rule < BAD_SOURCE {
        Outcome::Allowed {
            guard,
            rule: rule & !EXEMPT,
            force_tls: guard.engine() != 0 && rule & EXEMPT == 0,
            fate: None,
        }
    } else {
        Outcome::Dropped {
            guard,
            reason: if rule == NO_RULE {
                Reason::NotAllowed
            } else {
                Reason::BadSource
            },
            sampled: take(&mut known.taken),
        }
    }
}

/// Where a source's rule is remembered.
#[inline(always)]
fn known(source: [u64; 2]) -> Option<&'static mut Known> {
    let known = KNOWN.get_ptr_mut(place(source, KNOWN_SOURCES))?;
    // SAFETY: a non-null element of a per-CPU array; XDP runs with preemption off, so nothing else on
    // this CPU uses it, and no two functions at a time.
    Some(unsafe { &mut *known })
}

/// One of `places`, a power of two, by Fibonacci hashing: the highest bits of a product with 2^64 over
/// the golden ratio.
#[inline(always)]
const fn place(source: [u64; 2], places: u32) -> u32 {
    let hash = (source[0] ^ source[1]).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (hash >> (64 - places.trailing_zeros())) as u32
}

/// The id of the rule that allows a source that is not known, with `EXEMPT`; or `NO_RULE`, or
/// `BAD_SOURCE`. It is known then, in `known`.
///
/// What is found out under an epoch has to hold as long as that does: the epoch is read before the maps
/// are, also by processors that read in another order than they are told to.
#[inline(always)]
fn rule_of([high, low]: [u64; 2], tag: u64, known: &mut Known) -> u32 {
    let is_v4 = tag & V6 == 0;
    let (first, is_bad) = if is_v4 {
        (low as u32, is_bad_source4(u32::from_be(low as u32)))
    } else {
        let bits = u128::from(u64::from_be(high)) << 64 | u128::from(u64::from_be(low));
        (first_half(high), is_bad_source6(bits))
    };
    if is_bad {
        return BAD_SOURCE;
    }
    let (line, word, bits) = near_place(first, is_v4);
    // Zero, which no processor knows before it has read the epoch.
    let mut zero = tag;
    // SAFETY: one instruction, of a register that it names.
    unsafe {
        asm!("{0} ^= {0}", inout(reg) zero, options(pure, nomem, nostack));
    }
    let line = NEAR.get(line | zero as u32);
    let is_near = line.is_some_and(|line| line[word] & bits == bits);
    // What is near no prefix is on no database's list, but on those whose prefixes are not there.
    if !is_near && !Port(tag).guard().is_wide() {
        // A flood of such sources takes no place from one that is allowed.
        if known.tag >> 32 != tag >> 32 || known.rule == NO_RULE {
            known.remember([high, low], tag, NO_RULE);
        }
        return NO_RULE;
    }
    // An exchange (kernel 5.12) is a barrier.
    // SAFETY: one instruction on eight bytes of the element, aligned as the map's values are.
    unsafe {
        asm!(
            "{0} = xchg_64({1} + 0, {0})",
            inout(reg) 0_u64 => _,
            in(reg) &raw mut known.tag,
            options(nostack)
        );
    }
    let slot = slot_key(Port(tag).guard().slot());
    let rule = if is_v4 {
        let address = (low as u32).to_ne_bytes();
        ALLOWED4.get(&Key::new(SLOT_BITS + 32, Source4 { slot, address }))
    } else {
        let address = octets([high, low]);
        ALLOWED6.get(&Key::new(SLOT_BITS + 128, Source6 { slot, address }))
    };
    let rule = rule.copied().unwrap_or(NO_RULE);
    known.remember([high, low], tag, rule);
    rule
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

/// Counts a packet that is allowed, by `rule`.
#[inline(always)]
pub fn count_allowed(guard: Guard, rule: u32, fate: Option<Fate>) {
    increment(HITS.get_ptr_mut(guard.hit(rule)));
    count_fate(guard, fate);
}

/// Counts one that is not.
#[inline(always)]
pub fn count(guard: Guard, reason: Reason, fate: Option<Fate>) {
    increment(COUNTS.get_ptr_mut(guard.counter(reason as u32)));
    count_fate(guard, fate);
}

/// Whether a sample may be taken, which it is then. No clock is read, and nothing is written that
/// processors share: a flood that has taken what was granted gets no further.
#[inline(always)]
fn take(taken: &mut u32) -> bool {
    // SAFETY: an aligned integer that is there as long as the program is, and that the agent writes.
    let granted = unsafe { read_volatile(&raw const GRANTED) };
    let may = *taken < granted;
    if may {
        *taken = granted.saturating_sub(SAMPLES_GRANTED).max(*taken) + 1;
    }
    may
}

#[inline(always)]
fn take_at(place: u32) -> bool {
    let taken = TAKEN.get_ptr_mut(place);
    // SAFETY: as `increment`'s.
    taken.is_some_and(|taken| take(unsafe { &mut *taken }))
}

/// Tells the agent of a packet that was not allowed. `sampled`: whether a sample is taken of it; `None`:
/// by its source.
#[inline(always)]
pub fn sample(
    ctx: &XdpContext,
    packet: &Packet,
    guard: Guard,
    reason: Reason,
    sampled: Option<bool>,
) {
    let (source, family) = match packet {
        Packet::Segment(Segment { addresses, .. }) => {
            (addresses.source, if addresses.is_v4 { 4 } else { 6 })
        }
        _ => ([0, 0], 0),
    };
    if sampled.unwrap_or_else(|| take_at(place(source, SAMPLE_PLACES))) {
        let [high, low] = source;
        send(ctx, high, low, family << 16 | reason as u32, guard);
    }
}

/// A function of its own for its stack, of which those that judge a stream leave no more. `what`: the
/// address family, and the reason in the lower half.
#[inline(never)]
fn send(ctx: &XdpContext, high: u64, low: u64, what: u32, guard: Guard) {
    let sample = Sample {
        source: [high, low],
        family: what >> 16,
        reason: what & 0xffff,
        guard,
        interface: ctx.ingress_ifindex() as u32,
    };
    // Where the ring is full, the packet is counted all the same. The agent looks by itself.
    let _ = SAMPLED.output_untyped::<Sample>(sample, BPF_RB_NO_WAKEUP.into());
}

#[inline(always)]
fn count_fate(guard: Guard, fate: Option<Fate>) {
    if let Some(fate) = fate {
        increment(COUNTS.get_ptr_mut(guard.counter(fate as u32)));
    }
}

#[inline(always)]
fn increment(counter: Option<*mut u64>) {
    if let Some(counter) = counter {
        // SAFETY: a non-null element of a per-CPU array; XDP runs with preemption off, so no other
        // program on this CPU writes it between the read and the write.
        unsafe { *counter += 1 }
    }
}
