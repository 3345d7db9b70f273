//! Whether a connection begins with TLS, where that is forced.
//!
//! Bytes are judged by their place in the client's stream, not by packet: every byte at a decisive place is
//! compared whenever it passes, in any order, as often as it is sent. So the server reads the beginning
//! of TLS there, or nothing. Only the sequence number at which the stream begins is stored.

use core::ptr::{read_volatile, write_volatile};

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
/// Until when, in nanoseconds since boot, a connection to a slot's database without a known beginning is adopted.
#[btf_map]
static ADOPT_UNTIL: Array<u64, { SLOTS as usize }> = Array::new();
/// The number of the current adoption, below `Stream::ADOPTIONS`. The agent ends an adoption by raising it:
/// the connections that it adopted are judged again.
#[btf_map]
static ADOPTION: Array<u32, 1> = Array::new();

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

/// The content of a segment at the decisive places of a stream.
enum Finding {
    /// Nothing.
    Beyond,
    /// The right bytes for a stream of this form. `tls`: a ClientHello is among them.
    Good {
        form: u32,
        tls: bool,
    },
    /// Too few bytes, or bytes that do not begin where they can be judged.
    Unclear,
    NotTls,
}

/// The verdict on a segment.
enum Verdict {
    Pass(Option<Fate>),
    Refuse(Reason, Ending, Option<Fate>),
}

const PASS: Verdict = Verdict::Pass(None);
const UNCLEAR: Verdict = Verdict::Refuse(Reason::TlsUnclear, Ending::Dropped, None);
const FAILED: Verdict = Verdict::Refuse(Reason::NoPolicy, Ending::Dropped, None);

/// The verdict on a segment, packed into the one number that a function of its own returns.
#[derive(Clone, Copy)]
pub struct Judged(u32);

impl Judged {
    const REFUSED: u32 = 1;
    const ENDING_SHIFT: u32 = 4;
    const ENDING: u32 = 3 << Self::ENDING_SHIFT;
    const FATE_SHIFT: u32 = 8;
    const REASON_SHIFT: u32 = 16;

    const fn new(refused: Option<(Reason, Ending)>, fate: Option<Fate>) -> Self {
        let fate = match fate {
            Some(fate) => fate as u32 + 1,
            None => 0,
        };
        let refused = match refused {
            Some((reason, ending)) => {
                Self::REFUSED
                    | (ending as u32) << Self::ENDING_SHIFT
                    | (reason as u32) << Self::REASON_SHIFT
            }
            None => 0,
        };
        Self(refused | fate << Self::FATE_SHIFT)
    }

    #[inline(always)]
    pub fn is_refused(self) -> bool {
        self.0 & Self::REFUSED != 0
    }

    /// The number of the `Reason`: it is counted and sampled as it is, so that none can be taken for another.
    #[inline(always)]
    pub fn reason(self) -> u32 {
        self.0 >> Self::REASON_SHIFT
    }

    #[inline(always)]
    pub fn ending(self) -> Ending {
        // The two bits have a value for each ending.
        match (self.0 & Self::ENDING) >> Self::ENDING_SHIFT {
            0 => Ending::Dropped,
            1 => Ending::ToClient,
            2 => Ending::ResetServer,
            _ => Ending::Emptied,
        }
    }

    /// The same, for a packet that could not be rewritten.
    #[inline(always)]
    fn dropped(self) -> Self {
        Self(self.0 & !Self::ENDING)
    }

    /// The number of the `Fate`, of a connection whose fate this segment decides.
    #[inline(always)]
    pub fn fate(self) -> Option<u32> {
        (self.0 >> Self::FATE_SHIFT & 0xff).checked_sub(1)
    }
}

const _: () = {
    assert!(Ending::Dropped as u32 == 0 && Ending::ToClient as u32 == 1);
    assert!(Ending::ResetServer as u32 == 2 && Ending::Emptied as u32 == 3);
};

/// A stream in the map. Another CPU may use it at the same time, and the kernel may give it to another
/// connection: no reference to it is made, and each field is read and written by itself, once.
#[derive(Clone, Copy)]
struct StreamPointer(*mut Stream);

impl StreamPointer {
    #[inline(always)]
    fn get(self, field: impl FnOnce(*mut Stream) -> *mut u32) -> u32 {
        // SAFETY: an aligned integer of a map's element, which a program that holds the pointer may read.
        unsafe { read_volatile(field(self.0)) }
    }

    #[inline(always)]
    fn set(self, field: impl FnOnce(*mut Stream) -> *mut u32, value: u32) {
        // SAFETY: as `get`'s.
        unsafe { write_volatile(field(self.0), value) }
    }

    #[inline(always)]
    fn state(self) -> u32 {
        // SAFETY: a field of the element; as the fields below.
        self.get(|stream| unsafe { &raw mut (*stream).state })
    }

    #[inline(always)]
    fn set_state(self, state: u32) {
        // SAFETY: as `state`'s.
        self.set(|stream| unsafe { &raw mut (*stream).state }, state);
    }

    #[inline(always)]
    fn carried(self) -> u32 {
        // SAFETY: as `state`'s.
        self.get(|stream| unsafe { &raw mut (*stream).carried })
    }

    #[inline(always)]
    fn set_carried(self, carried: u32) {
        // SAFETY: as `state`'s.
        self.set(|stream| unsafe { &raw mut (*stream).carried }, carried);
    }

    #[inline(always)]
    fn refused_at(self) -> u32 {
        // SAFETY: as `state`'s.
        self.get(|stream| unsafe { &raw mut (*stream).refused_at })
    }

    #[inline(always)]
    fn set_refused_at(self, sequence: u32) {
        // SAFETY: as `state`'s.
        self.set(|stream| unsafe { &raw mut (*stream).refused_at }, sequence);
    }

    /// One of `OPENINGS`.
    #[inline(always)]
    fn opening(self, place: usize) -> OpeningPointer {
        // SAFETY: an element of the array, since the place is below its length.
        OpeningPointer(unsafe { &raw mut (*self.0).openings[place % OPENINGS] })
    }

    /// Forgets where the stream begins.
    #[inline(always)]
    fn forget(self) {
        for place in 0..OPENINGS {
            self.opening(place).write(Opening {
                first: 0,
                began: 0,
                form: 0,
            });
        }
        self.set_carried(0);
    }
}

#[derive(Clone, Copy)]
struct OpeningPointer(*mut Opening);

impl OpeningPointer {
    #[inline(always)]
    fn read(self) -> Opening {
        // SAFETY: aligned integers of a map's element, as `StreamPointer`'s.
        unsafe {
            Opening {
                first: read_volatile(&raw const (*self.0).first),
                began: read_volatile(&raw const (*self.0).began),
                form: read_volatile(&raw const (*self.0).form),
            }
        }
    }

    /// Word by word: together it would be a call of memset, whose frame, at least 32 bytes on Linux 6.1,
    /// has no room left on the stack.
    #[inline(always)]
    fn write(self, opening: Opening) {
        // SAFETY: as `read`'s.
        unsafe {
            write_volatile(&raw mut (*self.0).first, opening.first);
            write_volatile(&raw mut (*self.0).began, opening.began);
            write_volatile(&raw mut (*self.0).form, opening.form);
        }
    }

    #[inline(always)]
    fn set_form(self, form: u32) {
        // SAFETY: as `read`'s.
        unsafe { write_volatile(&raw mut (*self.0).form, form) }
    }
}

/// Judges a segment from a source that is allowed, to a port where TLS is forced, and rewrites what is
/// not just dropped.
#[inline(always)]
pub fn judge(ctx: &XdpContext, segment: &Segment, guard: Guard) -> Judged {
    let Some(scratch) = scratch(ctx) else {
        return Judged::new(Some((Reason::NoPolicy, Ending::Dropped)), None);
    };
    scratch.place = segment.place;
    scratch.guard = guard.0;
    scratch.is_v4 = segment.addresses.is_v4.into();
    let judged = Judged(judge_tls(ctx.ctx));
    let ending = judged.ending() as u32;
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
    let context = XdpContext::new(ctx);
    let Some(scratch) = scratch(&context) else {
        return Judged::new(Some((Reason::NoPolicy, Ending::Dropped)), None).0;
    };
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
    // The later fragments of a segment pass without being judged.
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

#[inline(always)]
fn judge_tcp(ctx: &XdpContext, scratch: &mut Scratch) -> Verdict {
    let guard = Guard(scratch.guard);
    let tcp = &scratch.tcp;
    // Urgent data is taken out of the stream, which moves what follows.
    if tcp.flags & URG != 0 {
        return UNCLEAR;
    }
    let connection = &scratch.connection;
    let stream = STREAMS.get_ptr_mut(connection).map(StreamPointer);
    // A stream that an ended adoption let go on is judged as one that is not in the map.
    let stream = stream.filter(|stream| !Stream::is_judged_again(stream.state(), adoption()));
    if tcp.flags & (SYN | ACK) == SYN {
        return begin(scratch, stream);
    }
    let Some(stream) = stream else {
        return adopt(ctx, scratch);
    };
    if stream.state() & Stream::REFUSED != 0 {
        scratch.reset_at = stream.refused_at();
        return go_on_refusing(stream, tcp);
    }
    if tcp.length == 0 {
        return PASS;
    }
    // Sequence numbers begin anew after 2^32 bytes, and with them what looks like the opening.
    let carried = stream.carried();
    if carried >= 1 << 31 {
        return PASS;
    }
    stream.set_carried(carried.saturating_add(tcp.length));
    let mut found = None;
    for place in 0..OPENINGS {
        let opening = stream.opening(place).read();
        // Openings are filled in order.
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
    let pointer = stream.opening(place);
    let opening = pointer.read();
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
            pointer.set_form(form);
            match form {
                CANCEL => Fate::Cancel,
                _ if tls => Fate::Tls,
                _ => return PASS,
            }
        }
    };
    let state = stream.state();
    if state & Stream::JUDGED == 0 {
        stream.set_state(state | Stream::JUDGED);
        return Verdict::Pass(Some(fate));
    }
    PASS
}

/// The number of the current adoption.
#[inline(always)]
fn adoption() -> u32 {
    ADOPTION.get(0).copied().unwrap_or(0)
}

#[inline(always)]
fn nanoseconds() -> u64 {
    // SAFETY: the helper (kernel 5.8) takes nothing and only reads a clock.
    unsafe { bpf_ktime_get_boot_ns() }
}

/// Notes a SYN. The server may have accepted an earlier SYN with another sequence number, and ignore this one:
/// as long as that is possible, the stream has to hold for both.
#[inline(always)]
fn begin(scratch: &mut Scratch, stream: Option<StreamPointer>) -> Verdict {
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
        let stream = StreamPointer(&raw mut scratch.stream);
        stream.forget();
        stream.opening(0).write(opening);
        stream.set_state(0);
        return remember(scratch, PASS);
    };
    for place in 0..OPENINGS {
        let known = stream.opening(place).read();
        if known.began != 0 && known.first == opening.first {
            return PASS;
        }
    }
    for place in 0..OPENINGS {
        let known = stream.opening(place);
        let began = known.read().began;
        if began == 0 || now.wrapping_sub(began) > OPENING_SECONDS {
            known.write(opening);
            stream.set_carried(0);
            stream.set_state(0);
            return PASS;
        }
    }
    UNCLEAR
}

/// Judges a segment of a connection whose SYN was not seen, or was evicted.
#[inline(always)]
fn adopt(ctx: &XdpContext, scratch: &mut Scratch) -> Verdict {
    let tcp = &scratch.tcp;
    if tcp.length == 0 {
        return PASS;
    }
    let guard = Guard(scratch.guard);
    let stream = StreamPointer(&raw mut scratch.stream);
    stream.forget();
    let until = ADOPT_UNTIL.get(guard.slot().into());
    if until.is_some_and(|&until| nanoseconds() < until) {
        stream.set_state(Stream::adopted(adoption()));
        return remember(scratch, Verdict::Pass(Some(Fate::Unjudged)));
    }
    if tcp.length < 5 {
        return UNCLEAR;
    }
    // A stream that the LRU evicted was idle, and goes on with a whole record (RFC 8446 5.1).
    if let Some([20..=23, 3, 0..=4, 0..=0x48, _]) = load::<5>(ctx, tcp.payload as usize) {
        stream.set_state(Stream::JUDGED);
        return remember(scratch, PASS);
    }
    stream.set_state(0);
    let verdict = refuse(guard, stream, tcp);
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
fn refuse(guard: Guard, stream: StreamPointer, tcp: &Tcp) -> Verdict {
    if tcp.flags & ACK == 0 {
        return UNCLEAR;
    }
    stream.set_refused_at(tcp.sequence);
    if guard.is_monitor() {
        // The connection goes on, also once its database is enforced.
        stream.forget();
        stream.set_state(Stream::adopted(adoption()));
    } else {
        stream.set_state(stream.state() | Stream::REFUSED);
    }
    Verdict::Refuse(Reason::NotTls, Ending::ToClient, Some(Fate::Refused))
}

/// Judges a further packet of a refused connection. The client received its answer at once; its next packet
/// resets the server's side, and the server's kernel answers the rest, since the connection no longer exists
/// there. Reset and emptied packets alternate, since either may be lost.
#[inline(always)]
fn go_on_refusing(stream: StreamPointer, tcp: &Tcp) -> Verdict {
    let state = stream.state();
    let ending = if state & Stream::RESET_SENT == 0 {
        stream.set_state(state | Stream::RESET_SENT);
        Ending::ResetServer
    } else {
        if tcp.length != 0 || tcp.flags & (FIN | RST) != 0 {
            stream.set_state(state & !Stream::RESET_SENT);
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
