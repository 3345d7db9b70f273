//! Whether a connection begins with TLS, where that is forced: judged at the socket, which alone knows what the server
//! reads. Runs for every segment that is about to be given to a TCP socket of this host.
//!
//! Bytes are judged by their place in the stream, one by one, as often as they come: the server reads the beginning
//! of TLS there, or nothing.

use core::{arch::asm, ptr::read_volatile};

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_CURRENT_NETNS, BPF_F_NO_PREALLOC, BPF_NOEXIST, bpf_sock_tuple},
    btf_maps::{Array, HashMap, LruHashMap},
    helpers::generated::{
        bpf_sk_release, bpf_skb_load_bytes, bpf_skc_lookup_tcp, bpf_skc_to_mptcp_sock,
        bpf_skc_to_tcp_request_sock,
    },
    macros::btf_map,
};
use filter_common::{
    AMBIGUOUS, ANY_SLOT, Connection, Engine, Existing, Fate, Guard, HANDSHAKES, Judgement,
    LocalKey, MOST_JUDGED_BYTES, PUBLISHED, Published, Reason, Stage,
    opening::{Byte, Forms, OPENINGS, Opening, OpeningKind, PLACES, opening_of},
    steps::Stand,
};

use crate::{
    behind::{Behind, Place, behind_header},
    judgement::{JudgementPointer, judgement_of},
    parse::bytes_of,
    proxy::{self, Found, Header},
    refuse, rules,
    socket::{Segment, Socket, is_intact, kernel, load, read_segment},
    steps,
};

/// Connections whose opening came with the end of their handshake: nothing can be stored with their sockets then.
#[btf_map]
static HANDSHAKES_JUDGED: LruHashMap<Connection, u32, { HANDSHAKES as usize }> = LruHashMap::new();
/// Which port of this host connections come through to a socket with another address or port. Only SYNs that the
/// XDP program let pass, at sockets that listen, add to it.
#[btf_map]
static PUBLISHED_SOCKETS: HashMap<
    Published,
    LocalKey,
    { PUBLISHED as usize },
    { BPF_F_NO_PREALLOC as usize },
> = HashMap::new();

/// How connections from before TLS was forced are treated: an `Existing`.
#[btf_map]
static EXISTING: Array<u32, 1> = Array::new();
/// The local port to which the agent connects to find out whether connections are judged, or zero.
#[btf_map]
static PROOF: Array<u32, 1> = Array::new();
/// Segments of such connections that were dropped.
#[btf_map]
static PROOFS: Array<u32, 1> = Array::new();

const POSTGRESQL: u32 = Engine::Postgresql as u32;
const MYSQL: u32 = Engine::Mysql as u32;

/// Returns whether the segment is given to its socket.
#[inline(always)]
pub fn passes(skb: *mut __sk_buff) -> bool {
    let Some(socket) = Socket::of(skb) else {
        return true;
    };
    // A socket that listens has received nothing.
    if socket.received() >= MOST_JUDGED_BYTES {
        let existing = existing();
        let is_known =
            || judgement_of(socket.sk, None).is_some_and(|judgement| !judgement.is_refused());
        if existing == Existing::NOTHING || existing == Existing::COUNTED && is_known() {
            return true;
        }
    }
    let mut passes = u64::from(judge(skb));
    // SAFETY: one instruction, of a register that it names, which changes neither result. The verifier knows nothing of
    // what another function returns, and takes only 0 and 1.
    unsafe {
        asm!("{0} &= 1", inout(reg) passes, options(pure, nomem, nostack));
    }
    passes != 0
}

#[inline(always)]
fn existing() -> Existing {
    Existing(EXISTING.get(0).copied().unwrap_or(0))
}

/// Returns 1 if the segment passes. A global function, which the kernel verifies once; as those below, each with a part of
/// the stack.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn judge(skb: *mut __sk_buff) -> u32 {
    const PASS: u32 = 1;
    const DROP: u32 = 0;
    let Some(socket) = Socket::of(skb) else {
        return PASS;
    };
    if socket.is_loopback() {
        return judge_proof(socket);
    }
    if read_segment(skb) == 0 {
        let (_, is_ours) = socket.namespace();
        return (is_ours && !rules::is_forced(socket.port())).into();
    }
    let Some(segment) = Segment::get() else {
        return DROP;
    };
    let guard = match find_guard(skb) {
        UNGUARDED => return PASS,
        UNCLEAR => {
            let guard = Guard::new(ANY_SLOT, false);
            steps::judged(guard, Reason::TlsUnclear as u32);
            return note_refusal(skb, guard.0, Reason::TlsUnclear as u32);
        }
        guard => Guard(guard as u32),
    };
    let is_past = socket.received() >= guard.judged_bytes();
    let refusal = if segment.is_urgent && !is_past {
        // Urgent data is taken out of the stream, which moves what follows.
        Reason::TlsUnclear as u32
    } else if socket.listens() {
        judge_handshake(skb, guard.0)
    } else if segment.length == 0 {
        return PASS;
    } else if segment.flags & Segment::SYN != 0 && !is_past {
        Reason::TlsUnclear as u32
    } else {
        judge_stream(skb, guard.0)
    };
    steps::judged(guard, refusal);
    if refusal == PASSES {
        return PASS;
    }
    note_refusal(skb, guard.0, refusal)
}

/// Counts and samples a refused segment. Returns 1 if it passes all the same, since the database is only monitored. A global
/// function: what it takes of the stack is free while a segment is judged.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn note_refusal(skb: *mut __sk_buff, guard: u32, refusal: u32) -> u32 {
    let guard = Guard(guard);
    let (Some(socket), Some(segment)) = (Socket::of(skb), Segment::get()) else {
        return 0;
    };
    rules::count(guard, refusal);
    let opening = || match refusal {
        NOT_TLS => name_opening(skb, guard.engine()),
        _ => 0,
    };
    rules::sample_segment(segment, guard, refusal, socket.interface(), opening);
    guard.is_monitor().into()
}

/// Names what a refused connection began with. A global function, which the kernel verifies once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn name_opening(skb: *mut __sk_buff, engine: u32) -> u32 {
    const UNKNOWN: u32 = OpeningKind::Unknown as u32;
    let (Some(socket), Some(segment)) = (Socket::of(skb), Segment::get()) else {
        return UNKNOWN;
    };
    let Some(judgement) = judgement_of(socket.sk, None) else {
        return UNKNOWN;
    };
    if judgement.is_unjudged() {
        return OpeningKind::Middle as u32;
    }
    let header = Header::of(judgement.header()).map_or(0, Header::length);
    let place = segment.sequence.wrapping_sub(judgement.base());
    let skip = match place {
        0 => header,
        // Behind the header, or behind PostgreSQL's request for TLS.
        _ if place == header || place == header + 8 => 0,
        _ => return UNKNOWN,
    };
    let at = segment.data + skip;
    let words = match (load::<u32, 4>(skb, at), load::<u32, 2>(skb, at)) {
        (Some(words), _) => words,
        (None, Some([first, second])) => [first, second, 0, 0],
        (None, None) => return UNKNOWN,
    };
    OpeningKind::of(engine, words.map(u32::from_be)) as u32
}

const NOT_TLS: u32 = Reason::NotTls as u32;

/// No reason to refuse a segment: not the number of a `Reason` that refuses.
const PASSES: u32 = Reason::Allowed as u32;

/// Connections of this host to itself are not judged, but for the connection by which the agent finds out whether it would be.
#[inline(always)]
fn judge_proof(socket: Socket) -> u32 {
    let port = u32::from(socket.port());
    let is_proof = PROOF
        .get(0)
        .is_some_and(|&proof| proof == port && port != 0);
    if !is_proof || socket.listens() || !socket.namespace().1 {
        return 1;
    }
    let guard = Guard::new(ANY_SLOT, true).with_tls(Engine::Other, false);
    let is_empty = || Segment::get().is_none_or(|segment| segment.length == 0);
    if read_segment(socket.skb) == 0 || is_empty() || judge_stream(socket.skb, guard.0) == PASSES {
        return 1;
    }
    if let Some(proofs) = PROOFS.get_ptr_mut(0) {
        // SAFETY: an aligned integer of a map's element. Only the agent's one connection gets here.
        unsafe { proofs.write_volatile(proofs.read_volatile().wrapping_add(1)) }
    }
    0
}

/// Return values of `find_guard` where no guard is in force for the connection, or where it may be one of two. A guard is less
/// than either.
const UNGUARDED: u64 = 1 << 32;
const UNCLEAR: u64 = 2 << 32;

/// No port: of a SYN that the XDP program did not note, of what is no SYN, of a socket that is not published.
const NOWHERE: LocalKey = LocalKey {
    address: [0; 16],
    port: AMBIGUOUS - 1,
};

/// The guard of the port that the connection came through, where TLS is forced on its source.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn find_guard(skb: *mut __sk_buff) -> u64 {
    let (Some(socket), Some(segment)) = (Socket::of(skb), Segment::get()) else {
        return UNCLEAR;
    };
    let (namespace, is_ours) = socket.namespace();
    let own = LocalKey {
        address: bytes_of(&segment.destination),
        port: segment.port,
    };
    let is_syn = segment.flags & (Segment::SYN | Segment::ACK) == Segment::SYN;
    // Defined on either way: the verifier refuses to see anything else kept on the stack.
    let mut noted = NOWHERE;
    if is_syn && socket.listens() {
        noted = refuse::noted(&segment.syn()).unwrap_or(NOWHERE);
    }
    let is_noted = noted.port != NOWHERE.port;
    let is_forced = |guard: Guard| guard.engine() != 0;
    let through = if is_ours && rules::guard_of(&own).is_some_and(is_forced) {
        own
    } else if noted.port == AMBIGUOUS {
        return UNCLEAR;
    } else {
        published(segment, namespace, &own, noted)
    };
    let guard = match through.port {
        // The map takes no more.
        AMBIGUOUS => return UNCLEAR,
        port if port == NOWHERE.port => return UNGUARDED,
        _ => rules::guard_of(&through),
    };
    let Some(guard) = guard.filter(|guard| guard.engine() != 0) else {
        return UNGUARDED;
    };
    if is_noted {
        refuse::note_outsider(&segment.source);
    }
    // Connections between clients of this host are not judged.
    if refuse::is_local_client(&segment.source)
        || rules::is_exempt(guard, segment.is_v4, &segment.source)
    {
        return UNGUARDED;
    }
    let guard = guard.of_connections();
    if is_noted {
        rules::count_stage(guard, Stage::Arrived);
    }
    // Where a header was let pass the opening is behind it, whatever the policy says by now. Here, since 6.1 has no stack left
    // for it in `judge`.
    let began_with_header = judgement_of(socket.sk, None).is_some_and(|known| known.header() != 0);
    let guard = if began_with_header {
        guard.proxied()
    } else {
        guard
    };
    guard.0.into()
}

/// The port of this host that connections reach a socket through whose address or port is another: in a container, or behind a
/// translation on the host.
/// `noted`: the port that this SYN was let pass to.
#[inline(always)]
fn published(segment: &Segment, namespace: u32, own: &LocalKey, noted: LocalKey) -> LocalKey {
    let published = Published {
        address: segment.destination,
        port: segment.port,
        namespace,
    };
    // Whatever else leads there, where TLS is forced on one way it is judged.
    let is_noted = noted.port != NOWHERE.port;
    if is_noted && rules::guard_of(&noted).is_some_and(|guard| guard.engine() != 0) {
        let known = PUBLISHED_SOCKETS.get_ptr(published);
        // SAFETY: plain integers; an update replaces the element.
        let is_known = known.is_some_and(|known| unsafe { *known } == noted);
        if !is_known && PUBLISHED_SOCKETS.insert(published, noted, 0).is_err() {
            return LocalKey {
                port: AMBIGUOUS,
                ..noted
            };
        }
    } else if noted == *own && rules::guard_of(own).is_none() {
        // Reached without a translation, by anybody: none is there any more. A port with sources of its own may be
        // reached both ways, and by who is not among them only by that which is judged.
        let _ = PUBLISHED_SOCKETS.remove(published);
    }
    // SAFETY: as above; copied at once.
    unsafe { PUBLISHED_SOCKETS.get(published) }
        .copied()
        .unwrap_or(NOWHERE)
}

/// Judges a segment that comes before the connection is the server's. Returns the reason to refuse it, or `PASSES`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn judge_handshake(skb: *mut __sk_buff, guard: u32) -> u32 {
    const UNCLEAR: u32 = Reason::TlsUnclear as u32;
    let guard = Guard(guard);
    let (Some(socket), Some(segment)) = (Socket::of(skb), Segment::get()) else {
        return UNCLEAR;
    };
    steps::stands(Stand::Handshake, 0);
    // SAFETY: the helper (kernel 5.19) takes a socket that is not null.
    let speaks_mptcp = unsafe { !bpf_skc_to_mptcp_sock(socket.sk.cast()).is_null() };
    // It may say that its data belongs elsewhere in the stream. The client falls back to TCP.
    if speaks_mptcp && has_mptcp(socket.skb, segment.transport + 20, segment.data) != 0 {
        return UNCLEAR;
    }
    if segment.flags & Segment::RST != 0 || segment.length == 0 {
        return PASSES;
    }
    // TCP Fast Open: a client sends the data again, without the SYN.
    if segment.flags & Segment::SYN != 0 || !begins_stream(socket, segment) {
        return UNCLEAR;
    }
    let engine = guard.engine();
    // The server of MySQL speaks first.
    let Some(opening) = OPENINGS.get(opening_of(engine)).filter(|_| engine != MYSQL) else {
        return UNCLEAR;
    };
    let header = match guard.is_proxied() {
        false => 0,
        true => match proxy::find(skb, engine, segment.data, segment.length) {
            Found::Header(header) if header.length() < segment.length => header.length(),
            // With nothing behind it, it comes again, once the connection is the server's.
            _ => return UNCLEAR,
        },
    };
    let length = segment.length - header;
    let content = examine(socket, engine, segment, header, 0);
    let forms = content.forms.and(allowed_forms(opening, guard));
    let is_whole = match forms {
        // Longer than a request: by what was received, one is told from the other later.
        Forms::HELLO if engine == POSTGRESQL => length > 8,
        // As the length in its first four bytes says.
        Forms::CANCEL => load(skb, segment.data + header) == Some([length.to_be()]),
        Forms::REQUEST | Forms::GSSENC if segment.length == 8 => return PASSES,
        _ => true,
    };
    if !is_whole || !opening.is_complete(forms, content.seen) {
        return UNCLEAR;
    }
    if is_intact(skb) == 0 {
        return UNCLEAR;
    }
    steps::stands(Stand::Begun, 0);
    // A client repeats it until it is acknowledged.
    let noted = HANDSHAKES_JUDGED.insert(segment.connection(), 1, BPF_NOEXIST.into());
    if noted.is_ok() {
        rules::count_fate(guard, fate(forms));
    }
    PASSES
}

#[inline(always)]
const fn fate(forms: Forms) -> Fate {
    match forms {
        Forms::CANCEL => Fate::Cancel,
        _ => Fate::Tls,
    }
}

#[inline(always)]
fn allowed_forms(opening: &Opening, guard: Guard) -> Forms {
    if guard.cancel_in_clear() {
        opening.forms
    } else {
        opening.forms.without(Forms::CANCEL)
    }
}

/// Whether the stream of the connection that this segment opens begins with its first byte. With a SYN cookie it does, by
/// what the client says; else the kernel has a request for it. Linux trims what comes before.
#[inline(always)]
fn begins_stream(socket: Socket, segment: &Segment) -> bool {
    let [source, destination] = [segment.source, segment.destination];
    let mut tuple = [0_u32; 9];
    let length = if segment.is_v4 {
        tuple[0] = source[3];
        tuple[1] = destination[3];
        tuple[2] = segment.ports;
        12
    } else {
        tuple[..4].copy_from_slice(&source);
        tuple[4..8].copy_from_slice(&destination);
        tuple[8] = segment.ports;
        36
    };
    const LISTEN: u32 = 10;
    const THIS_NAMESPACE: u64 = BPF_F_CURRENT_NETNS as u64;
    // SAFETY: the helpers (kernels 5.2, 5.9 and 4.20) read a tuple of that length, and take the socket that was
    // found, once each, until it is released.
    unsafe {
        let tuple = tuple.as_mut_ptr().cast::<bpf_sock_tuple>();
        let found = bpf_skc_lookup_tcp(socket.skb.cast(), tuple, length, THIS_NAMESPACE, 0);
        if found.is_null() {
            return false;
        }
        let begins = if read_volatile(&raw const (*found).state) == LISTEN {
            true
        } else {
            let request = bpf_skc_to_tcp_request_sock(found.cast()).cast::<u8>();
            if request.is_null() {
                false
            } else {
                let first = request.add(kernel().first as usize).cast::<u32>();
                read_volatile(first).wrapping_add(1) == segment.sequence
            }
        };
        bpf_sk_release(found.cast());
        begins
    }
}

/// Whether an option of Multipath TCP (RFC 8684 section 3) is among those from `at` to `end`, or they cannot be read.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn has_mptcp(skb: *mut __sk_buff, mut at: u32, end: u32) -> u32 {
    const END: u8 = 0;
    const PADDING: u8 = 1;
    const MPTCP: u8 = 30;
    const LONGEST: u32 = 40;
    for _ in 0..LONGEST {
        if at >= end {
            return 0;
        }
        let Some([kind]) = load::<u8, 1>(skb, at) else {
            return 1;
        };
        match kind {
            END => return 0,
            MPTCP => return 1,
            PADDING => at += 1,
            _ => match load::<u8, 1>(skb, at + 1) {
                Some([length]) if length >= 2 => at += u32::from(length),
                _ => return 1,
            },
        }
    }
    1
}

/// Judges data of a connection that the server has. Returns the reason to refuse it, or `PASSES`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn judge_stream(skb: *mut __sk_buff, guard: u32) -> u32 {
    const UNCLEAR: u32 = Reason::TlsUnclear as u32;
    let guard = Guard(guard);
    let (Some(socket), Some(segment)) = (Socket::of(skb), Segment::get()) else {
        return UNCLEAR;
    };
    let engine = guard.engine();
    let Some(opening) = OPENINGS.get(opening_of(engine)) else {
        return UNCLEAR;
    };
    // The kernel counts what it received before it moves on to the next number, and neither is locked here. So
    // what was not counted by now, `next` does not include; and what the server has answered, it does. Data that ended the
    // handshake is neither until the socket is established.
    let is_new = socket.is_new();
    barrier();
    let (answers, segments) = (socket.answers(), socket.segments());
    barrier();
    let next = socket.next();
    barrier();
    let received = socket.received();
    let judgement = match judgement_of(socket.sk, None) {
        known if received >= guard.judged_bytes() => {
            return judge_existing(socket, segment, guard, next, known) as u32;
        }
        // It was judged before a header was required.
        Some(judgement) if judgement.header() == 0 && received >= PLACES as u64 => {
            return judge_existing(socket, segment, guard, next, Some(judgement)) as u32;
        }
        Some(judgement) => judgement,
        None => {
            let forms = allowed_forms(opening, guard);
            let (base, forms, seen) = match received {
                // What was let pass at the listener is about to be received.
                0 if is_new || segments != 0 => return UNCLEAR,
                0 => (next, forms, 0),
                // Judged as a whole with the end of the handshake, or from before TLS was forced.
                _ if guard.is_proxied() => {
                    return judge_existing(socket, segment, guard, next, None) as u32;
                }
                // A request for TLS or GSSAPI came with it.
                8 if engine == POSTGRESQL && answers > 0 => {
                    (next.wrapping_sub(8), Forms::REQUEST.or(Forms::GSSENC), 0xff)
                }
                1..=8 if engine == POSTGRESQL => return UNCLEAR,
                1..=5 => return UNCLEAR,
                _ => return judge_existing(socket, segment, guard, next, None) as u32,
            };
            let mut new = Judgement {
                base: base.into(),
                state: 0,
                forms: forms.0,
                seen,
                header: 0,
            };
            // Another CPU may have been first: its values are as good.
            match judgement_of(socket.sk, Some(&mut new)) {
                Some(judgement) => judgement,
                None => return Reason::NoPolicy as u32,
            }
        }
    };
    // What the server has already is not given to it again.
    let old = next.wrapping_sub(segment.sequence);
    let old = if old as i32 > 0 { old } else { 0 };
    if old >= segment.length {
        return PASSES;
    }
    let place = segment
        .sequence
        .wrapping_add(old)
        .wrapping_sub(judgement.base());
    let mut opens = Place { skip: old, place };
    let mut reason = Reason::NotTls;
    if guard.is_proxied() {
        match behind_header(skb, engine, segment, opens, judgement) {
            Behind::Nothing => return PASSES,
            Behind::Unclear => return UNCLEAR,
            Behind::Opening(place) => opens = place,
            Behind::NoHeader => reason = Reason::NoProxyHeader,
        }
    }
    if opens.place >= PLACES as u32 {
        steps::stands(Stand::Later, 0);
        return PASSES;
    }
    steps::stands(Stand::Beginning, opens.place);
    let content = match reason {
        Reason::NotTls => examine(socket, engine, segment, opens.skip, opens.place),
        _ => Content::NOTHING,
    };
    let forms = judgement.forms();
    // What was damaged on its way decides nothing.
    if forms.and(content.forms) != forms && is_intact(skb) == 0 {
        return UNCLEAR;
    }
    let forms = judgement.narrow(content.forms);
    if forms.is_none() {
        if judgement.count_once() {
            rules::count_fate(guard, Fate::Refused);
        }
        refuse(segment, guard, next, judgement, reason);
        return reason as u32;
    }
    let seen = judgement.see(content.seen);
    if opening.is_complete(forms, seen) {
        steps::stands(Stand::Begun, opens.place);
        if judgement.count_once() {
            rules::count_fate(guard, fate(forms));
        }
    }
    PASSES
}

/// Judges data of a connection whose beginning is past: one from before TLS was forced is counted, or judged by whether a
/// TLS record begins with what comes next.
#[inline(always)]
fn judge_existing(
    socket: Socket,
    segment: &Segment,
    guard: Guard,
    next: u32,
    known: Option<JudgementPointer>,
) -> Reason {
    steps::stands(Stand::Later, 0);
    let existing = existing();
    let judges = existing.has(Existing::JUDGED);
    if let Some(judgement) = known {
        if judgement.is_refused() {
            refuse(segment, guard, next, judgement, Reason::NotTls);
            return Reason::NotTls;
        }
        // One with no form left was monitored, and is from before TLS was forced now.
        let is_judged = !judgement.is_unjudged() && !judgement.forms().is_none();
        if !judges || is_judged {
            return Reason::Allowed;
        }
    }
    if existing == Existing::NOTHING {
        return Reason::Allowed;
    }
    let mut new = Judgement {
        base: next.into(),
        state: Judgement::COUNTED | Judgement::UNJUDGED,
        forms: u64::MAX,
        seen: 0,
        header: 0,
    };
    if HANDSHAKES_JUDGED.get_ptr(segment.connection()).is_some() {
        new.state = Judgement::COUNTED;
        let _ = judgement_of(socket.sk, Some(&mut new));
        return Reason::Allowed;
    }
    if !judges {
        if judgement_of(socket.sk, Some(&mut new)).is_some() {
            rules::count_fate(guard, Fate::Unjudged);
        }
        return Reason::Allowed;
    }
    let old = next.wrapping_sub(segment.sequence) as i32;
    if old >= segment.length as i32 {
        return Reason::Allowed;
    }
    // Old bytes in front of new ones would hide where a record begins.
    if old != 0 || segment.length < 5 {
        return Reason::TlsUnclear;
    }
    let Some(judgement) = judgement_of(socket.sk, Some(&mut new)) else {
        return Reason::NoPolicy;
    };
    // RFC 8446 section 5.1: a record is up to 2^14 + 2048 bytes long.
    if let Some([20..=23, 3, 0..=4, 0..=0x48, _]) = load::<u8, 5>(socket.skb, segment.data) {
        judgement.set_judged();
        return Reason::Allowed;
    }
    if is_intact(socket.skb) == 0 {
        return Reason::TlsUnclear;
    }
    judgement.narrow(Forms::NONE);
    rules::count_fate(guard, Fate::Refused);
    refuse(segment, guard, next, judgement, Reason::NotTls);
    Reason::NotTls
}

/// Has a connection ended, unless it is monitored.
#[inline(always)]
fn refuse(segment: &Segment, guard: Guard, next: u32, judgement: JudgementPointer, reason: Reason) {
    if !guard.is_monitor() {
        judgement.set_refused();
        refuse::refuse(&segment.client(guard), next, reason);
    }
}

/// Content of a segment at decisive places.
struct Content {
    /// The forms that may have it there.
    forms: Forms,
    /// The places, a bit for each.
    seen: u64,
}

impl Content {
    /// The bytes of no form.
    const NOTHING: Self = Self {
        forms: Forms::NONE,
        seen: 0,
    };
}

/// Compares what is `skip` bytes into the segment's data, at `place` of the stream, below `PLACES`.
#[inline(always)]
fn examine(socket: Socket, engine: u32, segment: &Segment, skip: u32, place: u32) -> Content {
    let place = place as usize & (PLACES - 1);
    let count = (segment.length.wrapping_sub(skip) as usize).min(PLACES - place);
    let (at, count, place) = (segment.data + skip, count as u32, place as u32);
    Content {
        forms: Forms(compare(
            socket.skb,
            opening_of(engine) as u32,
            at,
            count,
            place,
        )),
        seen: u64::MAX >> (PLACES as u32 - count) << place,
    }
}

/// The forms that may have the `count` bytes at `at` of the packet from `place` of the stream on; none if they cannot be
/// read. A global function, which the kernel verifies once, for all who call it.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn compare(skb: *mut __sk_buff, opening: u32, at: u32, count: u32, place: u32) -> u64 {
    let Some(opening) = OPENINGS.get(opening as usize) else {
        return Forms::NONE.0;
    };
    // One to `PLACES`: the verifier of Linux 6.1 does not learn from a comparison that a number is not zero.
    let count = bounded((count as usize).wrapping_sub(1)) + 1;
    let mut bytes = [0_u64; PLACES / 8];
    // SAFETY: the helper (kernel 4.5) writes so many bytes, which are there, or fails.
    let failed = unsafe {
        let to = bytes.as_mut_ptr().cast();
        bpf_skb_load_bytes(skb.cast(), at, to, count as u32)
    };
    if failed != 0 {
        return Forms::NONE.0;
    }
    let mut forms = u64::MAX;
    for (index, bytes) in bytes.iter().enumerate() {
        for (byte, value) in bytes.to_ne_bytes().into_iter().enumerate() {
            let number = index * 8 + byte;
            let rule: &Byte = &opening.bytes[(place as usize + number) & (PLACES - 1)];
            // All ones past the bytes: a branch would be followed from each of them.
            let past = ((count as i64 - 1 - number as i64) >> 63) as u64;
            forms &= rule.forms(value).0 | past;
        }
    }
    forms
}

/// The number as the verifier keeps it bounded.
#[inline(always)]
fn bounded(number: usize) -> usize {
    let mut bounded = number as u64;
    // SAFETY: one instruction, of a register that it names, which changes no number below `PLACES`.
    unsafe {
        asm!("{0} &= 0x3f", inout(reg) bounded, options(pure, nomem, nostack));
    }
    bounded as usize
}

/// Keeps reads in their order: an atomic operation is a barrier (kernel 5.12).
#[inline(always)]
fn barrier() {
    let mut word = 0_u64;
    // SAFETY: one instruction on eight bytes of the stack.
    unsafe {
        asm!(
            "{0} = xchg_64({1} + 0, {0})",
            inout(reg) 0_u64 => _,
            in(reg) &raw mut word,
            options(nostack)
        );
    }
}
