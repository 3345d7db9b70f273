//! The maps, and the verdict for a parsed packet.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{Array, HashMap, LpmTrie, PerCpuArray, lpm_trie::Key},
    macros::btf_map,
    programs::XdpContext,
};
use filter_common::{
    ANY_SLOT, COUNTERS, DEFAULT_MAX_PREFIXES, EXEMPT, Fate, Guard, LocalKey, MAX_LOCALS,
    MONITORED_SHIFT, Name, PORTS, RULE_IDS, Reason, SLOT_BITS, SLOTS, Source4, Source6,
    counter_index, fate_index, is_bad_source4, is_bad_source6, mapped, port_index, slot_key,
};

use crate::{
    answer::Ending,
    parse::{Addresses, Packet, Segment},
    tls,
};

/// Which database a port belongs to.
#[btf_map]
static PORT_GUARDS: Array<Guard, { PORTS as usize }> = Array::new();
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
/// Packets by database slot and reason.
#[btf_map]
static COUNTS: PerCpuArray<u64, { COUNTERS as usize }> = PerCpuArray::new();
/// Packets by rule id.
#[btf_map]
static HITS: PerCpuArray<u64, { RULE_IDS as usize }> = PerCpuArray::new();
/// Names of slots and of rule ids, and the probe packets among the counts: read by the agent only.
#[btf_map]
static SLOT_NAMES: Array<Name, { SLOTS as usize }> = Array::new();
#[btf_map]
static RULE_NAMES: Array<Name, { RULE_IDS as usize }> = Array::new();
#[btf_map]
static PROBES: Array<u64, { (COUNTERS + RULE_IDS) as usize }> = Array::new();

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
    Refused {
        guard: Guard,
        reason: Reason,
        ending: Ending,
        fate: Option<Fate>,
    },
}

/// What is dropped.
#[inline(always)]
fn refused(guard: Guard, reason: Reason) -> Outcome {
    Outcome::Refused {
        guard,
        reason,
        ending: Ending::Dropped,
        fate: None,
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
        return refused(any(false), Reason::NoPolicy);
    };
    if guarded & protocols != 0 {
        refused(any(false), reason)
    } else if guarded & (protocols << MONITORED_SHIFT) != 0 {
        refused(any(true), reason)
    } else {
        Outcome::NotConcerned
    }
}

#[inline(always)]
fn judge_segment(segment: &Segment) -> Outcome {
    let port = port_index(segment.protocol, segment.port);
    let Some(&guard) = PORT_GUARDS.get(port) else {
        return refused(Guard::new(ANY_SLOT, false), Reason::NoPolicy);
    };
    if guard.is_none() {
        return Outcome::NotConcerned;
    }
    if !guard.is_by_address() {
        return judge_source(segment, guard);
    }
    let (address, many) = match segment.addresses {
        Addresses::V4 { destination, .. } => (
            mapped(destination),
            destination[0] >> 4 == 0xe || destination == [0xff; 4],
        ),
        Addresses::V6 { destination, .. } => (destination, destination[0] == 0xff),
    };
    if many || segment.source_routed {
        return refused(guard, Reason::Destination);
    }
    // SAFETY: the value is a plain integer that is copied at once; an update replaces the element.
    match unsafe { LOCAL_GUARDS.get(LocalKey { address, port }) } {
        Some(&guard) => judge_source(segment, guard),
        None => Outcome::NotConcerned,
    }
}

#[inline(always)]
fn judge_source(segment: &Segment, guard: Guard) -> Outcome {
    let slot = guard.slot();
    let (bad, rule) = match segment.addresses {
        Addresses::V4 { source, .. } => (
            is_bad_source4(source),
            ALLOWED4.get(&Key::new(
                SLOT_BITS + 32,
                Source4 {
                    slot: slot_key(slot),
                    address: source,
                },
            )),
        ),
        Addresses::V6 { source, .. } => (
            is_bad_source6(source),
            ALLOWED6.get(&Key::new(
                SLOT_BITS + 128,
                Source6 {
                    slot: slot_key(slot),
                    address: source,
                },
            )),
        ),
    };
    match rule {
        _ if bad => refused(guard, Reason::BadSource),
        None => refused(guard, Reason::NotAllowed),
        Some(&rule) => Outcome::Allowed {
            guard,
            rule: rule & !EXEMPT,
            force_tls: guard.engine() != 0 && rule & EXEMPT == 0,
            fate: None,
        },
    }
}

/// Counts the outcome, once.
#[inline(always)]
pub fn count(outcome: &Outcome) {
    let (guard, reason, fate) = match *outcome {
        Outcome::NotConcerned | Outcome::LaterFragment => return,
        Outcome::Allowed {
            guard, rule, fate, ..
        } => {
            increment(HITS.get_ptr_mut(rule));
            (guard, Reason::Allowed, fate)
        }
        Outcome::Refused {
            guard,
            reason,
            fate,
            ..
        } => (guard, reason, fate),
    };
    let (slot, monitor) = (guard.slot(), guard.is_monitor());
    increment(COUNTS.get_ptr_mut(counter_index(slot, reason, monitor)));
    if let Some(fate) = fate {
        increment(COUNTS.get_ptr_mut(fate_index(slot, fate, monitor)));
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
