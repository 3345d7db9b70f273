//! The steps of the traced programs on a packet: noted on the way, and logged at the end.
//!
//! They stand in maps, not on the stack: the functions that judge a stream leave little of its 512 bytes, and the verifier does
//! not follow what is in a map, so that a note makes it follow no other path.

use core::{arch::asm, ptr::read_volatile};

use aya_ebpf::{
    bindings::{__sk_buff, xdp_md},
    btf_maps::{Array, PerCpuArray},
    macros::btf_map,
    programs::XdpContext,
};
use aya_log_ebpf::info;
use filter_common::{
    Address, Guard, MAX_VLAN_TAGS, Protocol,
    steps::{Budget, Decision, LookedUp, PacketSteps, Parsed, SegmentSteps, Stand, TracedPrefix},
};

use crate::{parse, socket::Segment};

/// Set by the agent before the programs are loaded.
#[unsafe(no_mangle)]
static TRACED: TracedPrefix = TracedPrefix {
    address: [0; 4],
    mask: [0; 4],
    version: 0,
};

/// The steps on the packet that this CPU judges. A packet that interrupts a test run (before Linux 6.3) leaves nothing to be
/// logged for it, and test runs are not traced.
#[btf_map]
static PACKET_STEPS: PerCpuArray<PacketSteps, 1> = PerCpuArray::new();
/// The steps on the segment that this CPU judges.
#[btf_map]
static SEGMENT_STEPS: PerCpuArray<SegmentSteps, 1> = PerCpuArray::new();
/// See `Budget`.
#[btf_map]
static TRACE_BUDGET: Array<u64, { Budget::ALL.len() }> = Array::new();

/// Index of the loopback interface, through which test runs come in. It is never filtered.
const LOOPBACK: usize = 1;

#[inline(always)]
fn packet_steps() -> Option<&'static mut PacketSteps> {
    let steps = PACKET_STEPS.get_ptr_mut(0)?;
    // SAFETY: a non-null element of a per-CPU array of plain integers; no packet interrupts another, and no two
    // functions use it at a time.
    Some(unsafe { &mut *steps })
}

#[inline(always)]
fn segment_steps() -> Option<&'static mut SegmentSteps> {
    let steps = SEGMENT_STEPS.get_ptr_mut(0)?;
    // SAFETY: as above; segments are given to sockets one after the other on a CPU.
    Some(unsafe { &mut *steps })
}

/// Decides whether a packet is traced. Before it is judged: an answer to a refused client has other addresses.
///
/// Inlined, as what `filter` calls: see `rules::value_of`.
#[inline(always)]
pub fn begin_packet(ctx: &XdpContext) {
    let Some(steps) = packet_steps() else {
        return;
    };
    *steps = PacketSteps::default();
    if ctx.ingress_ifindex() == LOOPBACK {
        return;
    }
    read_source(ctx, steps);
}

/// Reads the source of a packet, also of one that is malformed behind it.
#[inline(always)]
fn read_source(ctx: &XdpContext, steps: &mut PacketSteps) -> Option<()> {
    const IPV4: u16 = 0x0800;
    const IPV6: u16 = 0x86dd;
    const VLAN: u16 = 0x8100;
    const SERVICE_VLAN: u16 = 0x88a8;
    let mut at = 12;
    let mut ethertype = u16::from_be_bytes(parse::load(ctx, at)?);
    for _ in 0..MAX_VLAN_TAGS {
        if ethertype != VLAN && ethertype != SERVICE_VLAN {
            break;
        }
        at += 4;
        ethertype = u16::from_be_bytes(parse::load(ctx, at)?);
    }
    let (version, source): (u32, Address) = match ethertype {
        IPV4 => {
            let source = parse::load::<4>(ctx, at + 14)?;
            (4, [0, 0, 0xffff_u32.to_be(), u32::from_ne_bytes(source)])
        }
        IPV6 => {
            let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = parse::load::<16>(ctx, at + 10)?;
            let words = [[a, b, c, d], [e, f, g, h], [i, j, k, l], [m, n, o, p]];
            (6, words.map(u32::from_ne_bytes))
        }
        _ => return None,
    };
    steps.source = source;
    if traced().holds(version, &source) {
        steps.version = version;
    }
    Some(())
}

#[inline(always)]
fn traced() -> TracedPrefix {
    // SAFETY: a constant, which is there as long as the program is.
    unsafe { read_volatile(&raw const TRACED) }
}

#[inline(always)]
pub fn looked_up(place: LookedUp) {
    if let Some(steps) = packet_steps() {
        steps.looked_up = place as u32;
    }
}

#[inline(always)]
pub fn found(value: u32) {
    if let Some(steps) = packet_steps() {
        steps.value = value;
    }
}

#[inline(always)]
pub fn parsed(parsed: Parsed) {
    if let Some(steps) = packet_steps() {
        steps.parsed = parsed as u32;
    }
}

#[inline(always)]
pub fn segment(ctx: &XdpContext, segment: &parse::Segment) {
    const SYN: u32 = 2;
    const ACK: u32 = 16;
    let Some(steps) = packet_steps() else {
        return;
    };
    let is_tcp = segment.protocol == Protocol::Tcp;
    steps.parsed = if is_tcp { Parsed::Tcp } else { Parsed::Udp } as u32;
    steps.port = segment.port.into();
    let flags = parse::flags(ctx, segment);
    let begins = is_tcp && flags.is_some_and(|flags| flags & (SYN | ACK) == SYN);
    steps.is_quiet = (!begins).into();
}

/// Notes what was decided. `why`: the number of a `Reason`, or of an `Ending`.
#[inline(always)]
pub fn decided(decision: Decision, guard: Guard, why: u32) {
    if let Some(steps) = packet_steps() {
        steps.decision = decision as u32;
        steps.guard = guard.0;
        steps.why = why;
    }
}

/// Logs the steps on a packet, if it is traced. Returns whether it did. A global function, which the kernel verifies once, and
/// called after the last decision: see `rules::value_of`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn log_packet(ctx: *mut xdp_md, action: u32) -> u32 {
    let ctx = XdpContext::new(ctx);
    let Some(steps) = packet_steps() else {
        return 0;
    };
    let slot = TRACE_BUDGET.get(Budget::Slot as u32).copied();
    if steps.version == 0 || !slot.is_some_and(|slot| steps.concerns(slot)) || !may_log() {
        return 0;
    }
    let [a, b, c, d] = steps.source;
    let interface = ctx.ingress_ifindex() as u32;
    info!(
        &ctx,
        target: "",
        "packet {} {} {} {} {} {} {} {} {} {} {} {} {} {}",
        a,
        b,
        c,
        d,
        steps.version,
        interface,
        steps.parsed,
        steps.port,
        steps.guard,
        steps.looked_up,
        steps.value,
        steps.decision,
        steps.why,
        action
    );
    steps.version = 0;
    1
}

#[inline(always)]
pub fn begin_segment() {
    if let Some(steps) = segment_steps() {
        *steps = SegmentSteps::default();
    }
}

/// Notes where a segment stands in its connection, and at which byte of the stream its data begins.
#[inline(always)]
pub fn stands(stand: Stand, place: u32) {
    if let Some(steps) = segment_steps() {
        steps.stand = stand as u32;
        steps.place = place;
    }
}

#[inline(always)]
pub fn judged(guard: Guard, reason: u32) {
    if let Some(steps) = segment_steps() {
        steps.is_judged = 1;
        steps.guard = guard.0;
        steps.reason = reason;
    }
}

/// Logs the steps on a segment, if it is traced and was judged. A global function, as `log_packet`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn log_segment(skb: *mut __sk_buff, passes: u32) -> u32 {
    let (Some(steps), Some(segment)) = (segment_steps(), Segment::get()) else {
        return 0;
    };
    let version = if segment.is_v4 { 4 } else { 6 };
    let guard = Guard(steps.guard);
    let slot = TRACE_BUDGET.get(Budget::Slot as u32).copied();
    let concerns = |slot| slot == 0 || guard.slot() == 0 || u64::from(guard.slot()) == slot;
    if steps.is_judged == 0
        || !traced().holds(version, &segment.source)
        || !slot.is_some_and(concerns)
        || !may_log()
    {
        return 0;
    }
    // SAFETY: a field of the context.
    let interface = unsafe { read_volatile(&raw const (*skb).ifindex) };
    let [a, b, c, d] = segment.source;
    info!(
        skb,
        target: "",
        "segment {} {} {} {} {} {} {} {} {} {} {} {} {}",
        a,
        b,
        c,
        d,
        version,
        interface,
        segment.port,
        steps.guard,
        steps.stand,
        steps.place,
        segment.length,
        steps.reason,
        passes
    );
    1
}

/// Whether the agent's grant allows one more line.
#[inline(always)]
fn may_log() -> bool {
    let number = |number: Budget| TRACE_BUDGET.get_ptr_mut(number as u32);
    let (Some(granted), Some(wanted), Some(lost)) = (
        number(Budget::Granted),
        number(Budget::Wanted),
        number(Budget::Lost),
    ) else {
        return false;
    };
    // SAFETY: a map's element, which is there as long as the program is.
    let granted = unsafe { granted.read_volatile() };
    let may = add_one(wanted) < granted;
    if !may {
        add_one(lost);
    }
    may
}

/// Adds one to a number that CPUs share, and returns what it was (kernel 5.12).
#[inline(always)]
fn add_one(number: *mut u64) -> u64 {
    let before;
    // SAFETY: one instruction on eight bytes of a map's element, aligned as the map's values are.
    unsafe {
        asm!(
            "{0} = atomic_fetch_add((u64 *)({1} + 0), {0})",
            inout(reg) 1_u64 => before,
            in(reg) number,
            options(nostack)
        );
    }
    before
}
