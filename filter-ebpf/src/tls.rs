//! Whether a connection begins with TLS, where that is forced.
//!
//! By the place of bytes in the client's stream, not by packet: every byte at a decisive place is
//! compared whenever it passes, in whatever order, as often as it is sent, so that what the server reads
//! there is the beginning of TLS or nothing. Only where the stream begins has to be remembered.

use aya_ebpf::{
    bindings::xdp_md,
    btf_maps::{Array, LruHashMap},
    helpers::generated::bpf_ktime_get_boot_ns,
    macros::btf_map,
    programs::XdpContext,
};
use filter_common::{
    Connection, DEFAULT_TLS_CONNECTIONS, Engine, Fate, Guard, OPENING_SECONDS, OPENINGS, Opening,
    Reason, SLOTS, Stream,
};

use crate::{
    answer::{self, Ending},
    parse::{Segment, Tcp, load, network, tcp},
    scratch::{Scratch, scratch},
};

/// Connections to ports where TLS is forced.
#[btf_map]
static STREAMS: LruHashMap<Connection, Stream, { DEFAULT_TLS_CONNECTIONS as usize }> =
    LruHashMap::new();
/// Until when, in nanoseconds since boot, a connection of a slot that is found under way is let run.
#[btf_map]
static ADOPT_UNTIL: Array<u64, { SLOTS as usize }> = Array::new();

const FIN: u32 = 1;
const SYN: u32 = 2;
const RST: u32 = 4;
const ACK: u32 = 16;
const URG: u32 = 32;

/// What a stream began with: a ClientHello, a request for TLS, PostgreSQL's request for GSSAPI or its
/// CancelRequest.
const HELLO: u32 = 1;
const REQUEST: u32 = 2;
const GSSENC: u32 = 3;
const CANCEL: u32 = 4;

const POSTGRESQL: u32 = Engine::Postgresql as u32;
const MYSQL: u32 = Engine::Mysql as u32;

/// PostgreSQL, "Message Formats": SSLRequest, GSSENCRequest, and the code of CancelRequest.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];
const GSSENC_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 48];
const CANCEL_CODE: [u8; 4] = [4, 210, 22, 46];

/// Length of MySQL's SSLRequest packet with its header.
const MYSQL_REQUEST: u32 = 36;

/// Enough of a TLS record to tell that it is a ClientHello (RFC 8446 sections 4 and 5.1).
const HELLO_LENGTH: u32 = 6;

/// Past every decisive place of every engine.
const FARTHEST: u32 = 64;

/// What a segment holds at the decisive places of a stream.
enum Finding {
    /// Nothing.
    Beyond,
    /// What should be there, of a stream of this form; `tls`: a ClientHello, too.
    Good {
        form: u32,
        tls: bool,
    },
    /// Too little to tell, or not from where it could be told.
    Unclear,
    NotTls,
}

/// What is to be done with a segment.
enum Verdict {
    Pass(Option<Fate>),
    Refuse(Reason, Ending, Option<Fate>),
}

const PASS: Verdict = Verdict::Pass(None);
const UNCLEAR: Verdict = Verdict::Refuse(Reason::TlsUnclear, Ending::Dropped, None);
const FAILED: Verdict = Verdict::Refuse(Reason::NoPolicy, Ending::Dropped, None);

/// What became of a segment, in one number: what such a function returns.
#[derive(Clone, Copy)]
pub struct Judged(u32);

impl Judged {
    const REFUSED: u32 = 1;

    const fn new(refused: Option<(Reason, Ending)>, fate: Option<Fate>) -> Self {
        let fate = match fate {
            Some(fate) => fate as u32,
            None => 0,
        };
        match refused {
            None => Self(fate << 8),
            Some((reason, ending)) => {
                Self(Self::REFUSED | (ending as u32) << 4 | fate << 8 | (reason as u32) << 16)
            }
        }
    }

    #[inline(always)]
    fn ending(self) -> u32 {
        self.0 >> 4 & 0xf
    }

    /// The same, for a packet that could not be rewritten.
    #[inline(always)]
    fn dropped(self) -> Self {
        Self(self.0 & !0xf0)
    }

    /// Why and how it was refused; `None`: it passes.
    #[inline(always)]
    pub fn refused(self) -> Option<(Reason, Ending)> {
        if self.0 & Self::REFUSED == 0 {
            return None;
        }
        let reason = match self.0 >> 16 {
            reason if reason == Reason::NotTls as u32 => Reason::NotTls,
            reason if reason == Reason::BadHeader as u32 => Reason::BadHeader,
            reason if reason == Reason::TlsUnclear as u32 => Reason::TlsUnclear,
            _ => Reason::NoPolicy,
        };
        let ending = match self.ending() {
            ending if ending == Ending::ToClient as u32 => Ending::ToClient,
            ending if ending == Ending::ResetServer as u32 => Ending::ResetServer,
            ending if ending == Ending::Emptied as u32 => Ending::Emptied,
            _ => Ending::Dropped,
        };
        Some((reason, ending))
    }

    #[inline(always)]
    pub fn fate(self) -> Option<Fate> {
        match self.0 >> 8 & 0xff {
            fate if fate == Fate::Tls as u32 => Some(Fate::Tls),
            fate if fate == Fate::Cancel as u32 => Some(Fate::Cancel),
            fate if fate == Fate::Unjudged as u32 => Some(Fate::Unjudged),
            fate if fate == Fate::Refused as u32 => Some(Fate::Refused),
            _ => None,
        }
    }
}

/// Judges a segment from a source that is allowed, to a port where TLS is forced, and rewrites what is
/// not just dropped.
#[inline(always)]
pub fn judge(ctx: &XdpContext, segment: &Segment, guard: Guard) -> Judged {
    let Some(scratch) = scratch() else {
        return Judged::new(Some((Reason::NoPolicy, Ending::Dropped)), None);
    };
    scratch.place = segment.place;
    scratch.guard = guard.0;
    scratch.is_v4 = segment.addresses.is_v4.into();
    let judged = Judged(judge_tls(ctx.ctx));
    let ending = judged.ending();
    if ending == Ending::Dropped as u32 || guard.is_monitor() {
        return judged;
    }
    if answer::write_answer(ctx.ctx, ending) == 0 {
        return judged.dropped();
    }
    judged
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn judge_tls(ctx: *mut xdp_md) -> u32 {
    let Some(scratch) = scratch() else {
        return Judged::new(Some((Reason::NoPolicy, Ending::Dropped)), None).0;
    };
    let context = XdpContext::new(ctx);
    let refused = |reason| Judged::new(Some((reason, Ending::Dropped)), None).0;
    let is_v4 = scratch.is_v4 != 0;
    let Some(network) = network(&context, &scratch.place, is_v4) else {
        return refused(Reason::BadHeader);
    };
    scratch.network = network.offset as u32;
    scratch.connection.source = network.source;
    scratch.connection.destination = network.destination;
    let Some(tcp) = tcp(&context, &scratch.place) else {
        return refused(Reason::BadHeader);
    };
    // The rest of a fragmented segment passes unseen.
    if !network.is_whole {
        return refused(Reason::TlsUnclear);
    }
    scratch.connection.ports = tcp.ports;
    scratch.tcp = tcp;
    let judged = match judge_tcp(&context, scratch) {
        Verdict::Pass(fate) => Judged::new(None, fate),
        Verdict::Refuse(reason, ending, fate) => Judged::new(Some((reason, ending)), fate),
    };
    judged.0
}

/// Forgets where a stream begins, word by word: together it would be a call of memset, whose frame, at
/// least 32 bytes on Linux 6.1, has no place on the stack any more.
#[inline(always)]
fn forget(stream: &mut Stream) {
    for opening in &mut stream.openings {
        // SAFETY: a reference may be written to.
        unsafe {
            core::ptr::write_volatile(&mut opening.first, 0);
            core::ptr::write_volatile(&mut opening.began, 0);
            core::ptr::write_volatile(&mut opening.form, 0);
        }
    }
    // SAFETY: as above.
    unsafe { core::ptr::write_volatile(&mut stream.carried, 0) }
}

#[inline(always)]
fn judge_tcp(ctx: &XdpContext, scratch: &mut Scratch) -> Verdict {
    let guard = Guard(scratch.guard);
    let tcp = &scratch.tcp;
    // Urgent data is taken out of the stream, which moves what follows.
    if tcp.flags & URG != 0 {
        return UNCLEAR;
    }
    let connection = &scratch.connection;
    let stream = STREAMS.get_ptr_mut(connection);
    if tcp.flags & (SYN | ACK) == SYN {
        return begin(scratch, stream);
    }
    let Some(stream) = stream else {
        return adopt(ctx, scratch);
    };
    // SAFETY: an element of a preallocated map; it may be given to another connection while it is
    // read, which a stream that is evicted under load has to bear.
    let stream = unsafe { &mut *stream };
    if stream.state & Stream::REFUSED != 0 {
        scratch.reset_at = stream.refused_at;
        return go_on_refusing(stream, tcp);
    }
    if tcp.length == 0 {
        return PASS;
    }
    // Sequence numbers begin anew after 2^32 bytes, and with them what looks like the opening.
    if stream.carried >= 1 << 31 {
        return PASS;
    }
    stream.carried = stream.carried.saturating_add(tcp.length);
    let mut found = None;
    for (place, opening) in stream.openings.iter().enumerate() {
        // They are taken in turn.
        if opening.began == 0 {
            break;
        }
        let offset = tcp.sequence.wrapping_sub(opening.first);
        // Somewhere in the opening, or from before the stream into it.
        let touches = offset < FARTHEST || offset.wrapping_neg() < tcp.length;
        if touches {
            if found.is_some() {
                return UNCLEAR;
            }
            found = Some(place);
        }
    }
    let Some(place) = found else {
        return PASS;
    };
    let opening = &mut stream.openings[place % OPENINGS];
    let offset = tcp.sequence.wrapping_sub(opening.first);
    let fate = match examine(ctx, guard, opening.form, offset, tcp) {
        Finding::Beyond => return PASS,
        Finding::Unclear => return UNCLEAR,
        Finding::NotTls => return refuse(guard, stream, tcp),
        Finding::Good { form, tls } => {
            // The same bytes again, or the first time.
            if opening.form != 0 && opening.form != form {
                return UNCLEAR;
            }
            opening.form = form;
            match form {
                CANCEL => Fate::Cancel,
                _ if tls => Fate::Tls,
                _ => return PASS,
            }
        }
    };
    if stream.state & Stream::JUDGED == 0 {
        stream.state |= Stream::JUDGED;
        return Verdict::Pass(Some(fate));
    }
    PASS
}

#[inline(always)]
fn nanoseconds() -> u64 {
    // SAFETY: the helper (kernel 5.8) takes nothing and only reads a clock.
    unsafe { bpf_ktime_get_boot_ns() }
}

/// A SYN. The server may have taken an earlier one with another sequence number, and refuses this one
/// then: as long as that could be, both have to hold.
#[inline(always)]
fn begin(scratch: &mut Scratch, stream: Option<*mut Stream>) -> Verdict {
    // TCP Fast Open: a client sends the data again, without the SYN.
    if scratch.tcp.length != 0 {
        return UNCLEAR;
    }
    let now = (nanoseconds() / 1_000_000_000) as u32 + 1;
    let opening = Opening {
        first: scratch.tcp.sequence.wrapping_add(1),
        began: now,
        form: 0,
    };
    let Some(stream) = stream else {
        forget(&mut scratch.stream);
        scratch.stream.openings[0] = opening;
        scratch.stream.state = 0;
        return remember(scratch, PASS);
    };
    // SAFETY: as in `judge_tcp`.
    let stream = unsafe { &mut *stream };
    for known in &stream.openings {
        if known.began != 0 && known.first == opening.first {
            return PASS;
        }
    }
    for known in &mut stream.openings {
        if known.began == 0 || now.wrapping_sub(known.began) > OPENING_SECONDS {
            *known = opening;
            stream.carried = 0;
            stream.state = 0;
            return PASS;
        }
    }
    UNCLEAR
}

/// A segment of a connection whose SYN was not seen, or is forgotten.
#[inline(always)]
fn adopt(ctx: &XdpContext, scratch: &mut Scratch) -> Verdict {
    let tcp = &scratch.tcp;
    if tcp.length == 0 {
        return PASS;
    }
    let guard = Guard(scratch.guard);
    forget(&mut scratch.stream);
    let until = ADOPT_UNTIL.get(guard.slot().into());
    if until.is_some_and(|&until| nanoseconds() < until) {
        scratch.stream.state = Stream::UNJUDGED;
        return remember(scratch, Verdict::Pass(Some(Fate::Unjudged)));
    }
    if tcp.length < 5 {
        return UNCLEAR;
    }
    // A connection that was forgotten was idle, and goes on with a whole record (RFC 8446 5.1).
    if let Some([20..=23, 3, 0..=4, 0..=0x48, _]) = load::<5>(ctx, tcp.payload as usize) {
        scratch.stream.state = Stream::JUDGED;
        return remember(scratch, PASS);
    }
    scratch.stream.state = 0;
    let verdict = refuse(guard, &mut scratch.stream, tcp);
    remember(scratch, verdict)
}

/// Stores the new stream.
#[inline(always)]
fn remember(scratch: &Scratch, verdict: Verdict) -> Verdict {
    let (connection, stream) = (&scratch.connection, &scratch.stream);
    match STREAMS.insert(connection, stream, 0) {
        Ok(()) => verdict,
        Err(_) => FAILED,
    }
}

#[inline(always)]
fn refuse(guard: Guard, stream: &mut Stream, tcp: &Tcp) -> Verdict {
    if tcp.flags & ACK == 0 {
        return UNCLEAR;
    }
    stream.refused_at = tcp.sequence;
    if guard.is_monitor() {
        // It goes on, also when it is no longer only monitored.
        forget(stream);
        stream.state = Stream::UNJUDGED;
    } else {
        stream.state |= Stream::REFUSED;
    }
    Verdict::Refuse(Reason::NotTls, Ending::ToClient, Some(Fate::Refused))
}

/// The client was told at once; its next packet tells the server, and whatever follows is answered by
/// the server's kernel, which knows no such connection any more. Told again in turns, since either may
/// be lost.
#[inline(always)]
fn go_on_refusing(stream: &mut Stream, tcp: &Tcp) -> Verdict {
    let ending = if stream.state & Stream::TOLD == 0 {
        stream.state |= Stream::TOLD;
        Ending::ResetServer
    } else {
        if tcp.length != 0 || tcp.flags & (FIN | RST) != 0 {
            stream.state &= !Stream::TOLD;
        }
        Ending::Emptied
    };
    Verdict::Refuse(Reason::NotTls, ending, None)
}

/// What a segment holds at the decisive places of a stream of this form, from `offset` on.
#[inline(always)]
fn examine(ctx: &XdpContext, guard: Guard, form: u32, offset: u32, tcp: &Tcp) -> Finding {
    let decisive = match (guard.engine(), form) {
        (POSTGRESQL, 0 | GSSENC) => 16 + HELLO_LENGTH,
        (POSTGRESQL, CANCEL) => 16,
        (POSTGRESQL, REQUEST) => 8 + HELLO_LENGTH,
        (MYSQL, _) => MYSQL_REQUEST + HELLO_LENGTH,
        _ => HELLO_LENGTH,
    };
    if offset >= FARTHEST {
        return Finding::Unclear;
    }
    if offset >= decisive {
        return Finding::Beyond;
    }
    match (guard.engine(), form, offset) {
        (POSTGRESQL, _, 0) => postgresql(ctx, guard, tcp),
        (POSTGRESQL, REQUEST, 8) | (POSTGRESQL, GSSENC, 16) | (MYSQL, REQUEST, MYSQL_REQUEST) => {
            hello(ctx, tcp, 0, form)
        }
        (POSTGRESQL, GSSENC, 8) => match load::<8>(ctx, tcp.payload as usize) {
            Some(SSL_REQUEST) => after_request(ctx, tcp, 8, GSSENC),
            None => Finding::Unclear,
            Some(_) => Finding::NotTls,
        },
        (POSTGRESQL, ..) => Finding::Unclear,
        (MYSQL, _, 0) => mysql(ctx, tcp),
        (MYSQL, ..) => Finding::Unclear,
        (_, _, 0) => hello(ctx, tcp, 0, HELLO),
        _ => Finding::Unclear,
    }
}

#[inline(always)]
fn postgresql(ctx: &XdpContext, guard: Guard, tcp: &Tcp) -> Finding {
    if tcp.length < 8 {
        return begins_with(ctx, tcp, 0, [0, 22]);
    }
    match load::<8>(ctx, tcp.payload as usize) {
        None => Finding::Unclear,
        Some(SSL_REQUEST) => after_request(ctx, tcp, 8, REQUEST),
        // A client waits for the answer.
        Some(GSSENC_REQUEST) if tcp.length == 8 => Finding::Good {
            form: GSSENC,
            tls: false,
        },
        Some(GSSENC_REQUEST) => Finding::NotTls,
        // Up to 256 bytes of key as of protocol 3.2 (PostgreSQL 18).
        Some([0, 0, high, low, c0, c1, c2, c3])
            if [c0, c1, c2, c3] == CANCEL_CODE
                && guard.cancel_in_clear()
                && u32::from(u16::from_be_bytes([high, low])) == tcp.length
                && tcp.length <= 12 + 256 =>
        {
            Finding::Good {
                form: CANCEL,
                tls: false,
            }
        }
        Some(_) => hello(ctx, tcp, 0, HELLO),
    }
}

/// MySQL, "Protocol::SSLRequest": a packet of 32 bytes, the second of the connection, whose
/// capabilities have CLIENT_SSL (0x0800). A server that has it reads nothing else of the packet.
#[inline(always)]
fn mysql(ctx: &XdpContext, tcp: &Tcp) -> Finding {
    if tcp.length < MYSQL_REQUEST {
        return begins_with(ctx, tcp, 0, [32, 32]);
    }
    match load::<6>(ctx, tcp.payload as usize) {
        None => Finding::Unclear,
        Some([32, 0, 0, 1, _, capabilities]) if capabilities & 8 != 0 => {
            after_request(ctx, tcp, MYSQL_REQUEST, REQUEST)
        }
        Some(_) => Finding::NotTls,
    }
}

/// A request for TLS that is `length` bytes long, and what follows it in the same segment.
#[inline(always)]
fn after_request(ctx: &XdpContext, tcp: &Tcp, length: u32, form: u32) -> Finding {
    if tcp.length == length {
        return Finding::Good { form, tls: false };
    }
    hello(ctx, tcp, length, form)
}

/// A ClientHello `at` bytes into the segment.
#[inline(always)]
fn hello(ctx: &XdpContext, tcp: &Tcp, at: u32, form: u32) -> Finding {
    if tcp.length < at + HELLO_LENGTH {
        return begins_with(ctx, tcp, at, [22, 22]);
    }
    match load::<6>(ctx, (tcp.payload + at) as usize) {
        None => Finding::Unclear,
        Some([22, 3, 0..=4, 0..=0x40, _, 1]) => Finding::Good { form, tls: true },
        Some(_) => Finding::NotTls,
    }
}

/// Too little to tell, unless its first byte tells that it is wrong. A client whose segment is dropped
/// sends it again, with what it has by then.
#[inline(always)]
fn begins_with(ctx: &XdpContext, tcp: &Tcp, at: u32, bytes: [u8; 2]) -> Finding {
    match load::<1>(ctx, (tcp.payload + at) as usize) {
        Some([byte]) if !bytes.contains(&byte) => Finding::NotTls,
        _ => Finding::Unclear,
    }
}
