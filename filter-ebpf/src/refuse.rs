//! How a connection to a port where TLS is forced ends if it does not begin with TLS. The program at the socket drops
//! the segment and notes the client here; the client sends it again, and the XDP program answers.

use aya_ebpf::{
    bindings::{BPF_F_NO_PREALLOC, BPF_NOEXIST, xdp_md},
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, lpm_trie::Key},
    macros::btf_map,
    programs::XdpContext,
};
use filter_common::{
    AMBIGUOUS, Address, Client, Guard, LocalKey, OUTSIDERS, Protocol, REFUSALS, Reason, Refusal,
    SYNS, Stage, Syn,
};

use crate::{
    answer::{self, Ending},
    parse::{self, Segment},
    rules,
    scratch::{Scratch, scratch},
};

/// SYNs that the XDP program let pass to a port where TLS is forced, and to which one.
#[btf_map]
static SYNS_PASSED: LruHashMap<Syn, LocalKey, { SYNS as usize }> = LruHashMap::new();
/// The refused connections.
#[btf_map]
static REFUSED: LruHashMap<Client, Refusal, { REFUSALS as usize }> = LruHashMap::new();
/// Networks of this host that are not filtered: clients there speak to its sockets and its containers without passing the
/// filter.
#[btf_map]
static LOCAL_NETWORKS: LpmTrie<Address, u32, { filter_common::LOCAL_NETWORKS as usize }> =
    LpmTrie::new();
/// Sources with addresses of these networks that came through a filtered interface. None is pushed out: once it is full, no client
/// counts as one of this host's own.
#[btf_map]
static OUTSIDER_SOURCES: HashMap<
    Address,
    u32,
    { OUTSIDERS as usize },
    { BPF_F_NO_PREALLOC as usize },
> = HashMap::new();
#[btf_map]
static OUTSIDERS_FULL: Array<u32, 1> = Array::new();
/// Not zero: there are refused connections. The agent clears it.
#[btf_map]
static REFUSING: Array<u32, 1> = Array::new();
/// Not zero: connections are judged at the socket. The agent writes it.
#[btf_map]
static JUDGED: Array<u32, 1> = Array::new();

const FIN: u32 = 1;
const SYN: u32 = 2;
const RST: u32 = 4;
const ACK: u32 = 16;

/// How far from what the server expects a segment of a refused connection may begin, in bytes: what was in flight when
/// it was refused.
const LARGEST_SEGMENT: i32 = 1 << 16;
const LARGEST_WINDOW: i32 = 1 << 20;

/// Return value of `follow_segment` for a segment that passes; an `Ending` is above it.
const PASSES: u32 = 0;

/// The port of this host that a SYN was let pass to.
#[inline(always)]
pub fn noted(syn: &Syn) -> Option<LocalKey> {
    // SAFETY: plain integers that are copied at once; the kernel may give the element to another SYN meanwhile, which
    // an attacker gains nothing by: the next SYN is looked up again.
    unsafe { SYNS_PASSED.get(syn) }.copied()
}

/// Whether a client is in a network of this host's own, and never came through a filtered interface.
#[inline(always)]
pub fn is_local_client(source: &Address) -> bool {
    LOCAL_NETWORKS.get(&Key::new(128, *source)).is_some()
        && OUTSIDER_SOURCES.get_ptr(source).is_none()
        && OUTSIDERS_FULL.get(0).is_some_and(|&full| full == 0)
}

/// Notes that a source came through a filtered interface. At a socket, where forged sources of this host's own networks
/// have been dropped already (net.ipv4.conf.*.rp_filter = 1), and where TLS is forced on it: its rules allow the source.
#[inline(always)]
pub fn note_outsider(source: &Address) {
    let is_local = LOCAL_NETWORKS.get(&Key::new(128, *source)).is_some();
    if is_local && OUTSIDER_SOURCES.insert(source, 1, 0).is_err() {
        let _ = OUTSIDERS_FULL.set(0, 1, 0);
    }
}

/// Notes a connection as refused. `next`: the sequence number that the server expects.
#[inline(always)]
pub fn refuse(client: &Client, next: u32, reason: Reason) {
    // A client that was noted before keeps the state of its ending.
    if REFUSED.get_ptr(client).is_none() {
        let state = match reason {
            Reason::NotTls => 0,
            _ => Refusal::WORDLESS,
        };
        let _ = REFUSED.insert(client, Refusal { next, state }, 0);
    }
    let _ = REFUSING.set(0, 1, 0);
}

/// Verdict on a segment.
pub enum Course {
    Passes,
    /// Its connection was refused; it is rewritten.
    Ends(Ending),
    /// The port is closed, since nothing judges connections.
    Closed,
}

/// Follows a segment from a source that is allowed, to a port where TLS is forced.
#[inline(always)]
pub fn follow(ctx: &XdpContext, segment: &Segment, guard: Guard) -> Course {
    let is_judged = JUDGED.get(0).is_some_and(|&judged| judged != 0);
    if !is_judged && !guard.is_open_unenforced() {
        return Course::Closed;
    }
    let is_refusing = REFUSING.get(0).is_none_or(|&refusing| refusing != 0);
    let flags = parse::flags(ctx, segment);
    if !is_refusing && flags.is_some_and(|flags| flags & (SYN | ACK) != SYN) {
        return Course::Passes;
    }
    let Some(scratch) = scratch(ctx) else {
        return Course::Ends(Ending::Dropped);
    };
    fill(scratch, segment, guard);
    match follow_segment(ctx.ctx).checked_sub(1) {
        None => Course::Passes,
        Some(ending) if ending == Ending::Dropped as u32 => Course::Ends(Ending::Dropped),
        Some(ending) if answer::write_answer(ctx.ctx, ending) == 0 => Course::Ends(Ending::Dropped),
        Some(ending) => Course::Ends(Ending::of(ending)),
    }
}

/// Notes a SYN to a port where TLS is not forced: what looks the same and goes to one where it is must not be taken for it.
/// Returns whether it passes, which one in fragments does not.
#[inline(always)]
pub fn note_other(ctx: &XdpContext, segment: &Segment) -> bool {
    // First: where TLS is forced nowhere, nothing else is looked at.
    let is_judged = JUDGED.get(0).is_some_and(|&judged| judged != 0);
    if !is_judged || segment.protocol != Protocol::Tcp {
        return true;
    }
    if parse::flags(ctx, segment).is_some_and(|flags| flags & (SYN | ACK) != SYN) {
        return true;
    }
    let Some(scratch) = scratch(ctx) else {
        return true;
    };
    // No guard: nothing was refused.
    fill(scratch, segment, Guard::default());
    follow_segment(ctx.ctx) == PASSES
}

#[inline(always)]
fn fill(scratch: &mut Scratch, segment: &Segment, guard: Guard) {
    let addresses = &segment.addresses;
    scratch.place = segment.place;
    scratch.guard = guard.0;
    scratch.is_v4 = addresses.is_v4.into();
    scratch.port = segment.port.into();
    scratch.source = parse::address(addresses.is_v4, addresses.source);
    scratch.destination = parse::address(addresses.is_v4, addresses.destination);
}

/// A global function, which the kernel verifies once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn follow_segment(ctx: *mut xdp_md) -> u32 {
    let ctx = XdpContext::new(ctx);
    match scratch(&ctx).map(|scratch| ending(&ctx, scratch)) {
        Some(None) => PASSES,
        Some(Some(ending)) => ending as u32 + 1,
        None => Ending::Dropped as u32 + 1,
    }
}

#[inline(always)]
fn ending(ctx: &XdpContext, scratch: &mut Scratch) -> Option<Ending> {
    let is_guarded = !Guard(scratch.guard).is_none();
    let Some(tcp) = parse::tcp(ctx, &scratch.place) else {
        // Cut off before its flags it may be a SYN.
        let passes = !is_guarded && parse::is_whole(ctx, &scratch.place, scratch.is_v4 != 0);
        return (!passes).then_some(Ending::Dropped);
    };
    let [first, second, ..] = tcp.ports.to_ne_bytes();
    let port = u16::from_ne_bytes([first, second]).into();
    let client = Client {
        source: scratch.source,
        port,
        slot: Guard(scratch.guard).slot().into(),
    };
    let is_v4 = scratch.is_v4 != 0;
    if tcp.flags & (SYN | ACK) == SYN {
        // No client cuts up a SYN. Its rest could be kept back until it is not noted any more.
        if !parse::is_whole(ctx, &scratch.place, is_v4) {
            return Some(Ending::Dropped);
        }
        let _ = REFUSED.remove(client);
        let syn = Syn {
            source: scratch.source,
            sequence: tcp.sequence,
        };
        let guard = Guard(scratch.guard);
        if note(&syn, scratch) && is_guarded {
            rules::count_stage(guard, Stage::Begun);
        }
        if is_guarded && !guard.of_connections().is_monitor() {
            answer::hide_multipath(ctx.ctx, scratch.place.transport, tcp.payload);
        }
        return None;
    }
    if !is_guarded || Guard(scratch.guard).of_connections().is_monitor() {
        return None;
    }
    // Not refused, most often: looked up for as long as any connection is.
    let refusal = REFUSED.get_ptr_mut(client)?;
    scratch.tcp = tcp;
    let Some(network) = parse::network_offset(ctx, &scratch.place, is_v4) else {
        return Some(Ending::Dropped);
    };
    scratch.network = network as u32;
    let ends = tcp.length != 0 || tcp.flags & (FIN | RST) != 0;
    // SAFETY: aligned integers of a map's element. Another CPU may change them, which repeats an ending at worst.
    let state = unsafe {
        scratch.reset_at = (*refusal).next;
        (*refusal).state
    };
    // The same client port may have a connection to another address of the database.
    let distance = tcp.sequence.wrapping_sub(scratch.reset_at) as i32;
    if !(-LARGEST_SEGMENT..LARGEST_WINDOW).contains(&distance) {
        return None;
    }
    let wordless = state & Refusal::WORDLESS;
    if wordless != 0 {
        scratch.guard = Guard(scratch.guard).without_tls().0;
    }
    let (state, ending) = match state & !wordless {
        0 if tcp.length != 0 => (Refusal::ANSWERED, Ending::ToClient),
        0 => return None,
        // Reset and emptied packets alternate, since either may be lost.
        Refusal::ANSWERED => (Refusal::ANSWERED | Refusal::RESET_SENT, Ending::ResetServer),
        _ if ends => (Refusal::ANSWERED, Ending::Emptied),
        _ => (state, Ending::Emptied),
    };
    // SAFETY: as above.
    unsafe {
        (*refusal).state = state | wordless;
    }
    Some(ending)
}

/// Notes a SYN. What looks the same and went to another port was sent to deceive: neither counts. Returns whether none was
/// noted that looks the same.
#[inline(always)]
fn note(syn: &Syn, scratch: &mut Scratch) -> bool {
    let mut through = LocalKey {
        address: parse::bytes_of(&scratch.destination),
        port: scratch.port,
    };
    let before = noted(syn);
    if before.is_some_and(|before| before == through) {
        return false;
    }
    if before.is_none() && SYNS_PASSED.insert(syn, through, BPF_NOEXIST.into()).is_ok() {
        return true;
    }
    // Of two ports; or another CPU noted one that looks the same, in this moment; or the map takes none, and nothing is
    // noted.
    through.port = AMBIGUOUS;
    let _ = SYNS_PASSED.insert(syn, through, 0);
    false
}
