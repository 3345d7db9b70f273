//! How a connection that is refused ends for both sides. The only code that writes to packets.

use aya_ebpf::{
    EbpfContext as _,
    bindings::xdp_md,
    btf_maps::Array,
    helpers::generated::{
        bpf_csum_diff, bpf_xdp_adjust_head, bpf_xdp_adjust_tail, bpf_xdp_get_buff_len,
        bpf_xdp_store_bytes,
    },
    macros::btf_map,
    programs::XdpContext,
};
use filter_common::{ANSWER_LENGTH, ANSWERS, Answer, Guard, MAX_VLAN_TAGS};

use crate::{
    parse::load,
    scratch::{Headers, Scratch, scratch},
};

/// The answer of each engine; the agent writes them.
#[btf_map]
static ANSWERS_BY_ENGINE: Array<Answer, { ANSWERS as usize }> = Array::new();

const FIN: u8 = 1;
const RST: u8 = 4;
const PSH: u8 = 8;
const ACK: u8 = 16;

pub const TCP_HEADER: usize = 20;

/// Fate of a refused packet.
#[derive(Clone, Copy)]
#[repr(u32)]
pub enum Ending {
    Dropped = 0,
    /// Sent back to the client, as the last packet from the server.
    ToClient = 1,
    /// Passed on to the server, as a reset.
    ResetServer = 2,
    /// Passed on to the server without its data.
    Emptied = 3,
}

impl Ending {
    #[inline(always)]
    pub fn of(number: u32) -> Self {
        match number {
            TO_CLIENT => Self::ToClient,
            RESET_SERVER => Self::ResetServer,
            EMPTIED => Self::Emptied,
            _ => Self::Dropped,
        }
    }
}

const TO_CLIENT: u32 = Ending::ToClient as u32;
const RESET_SERVER: u32 = Ending::ResetServer as u32;
const EMPTIED: u32 = Ending::Emptied as u32;

/// The TCP header that the packet gets.
struct Shape {
    to_client: bool,
    sequence: u32,
    acknowledgement: u32,
    flags: u8,
}

/// Rewrites the packet for its ending. Returns 0 if it cannot: with IP options or extension headers. A global
/// function, which the kernel verifies once, as `refuse::follow_segment`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn write_answer(ctx: *mut xdp_md, ending: u32) -> u32 {
    let ctx = XdpContext::new(ctx);
    let Some(scratch) = scratch(&ctx) else {
        return 0;
    };
    let tcp = &scratch.tcp;
    let shape = match ending {
        TO_CLIENT => Shape {
            to_client: true,
            sequence: tcp.acknowledgement,
            acknowledgement: tcp.sequence.wrapping_add(tcp.length),
            flags: 0,
        },
        RESET_SERVER => Shape {
            to_client: false,
            sequence: scratch.reset_at,
            // Without ACK: the client acknowledges what the server has not sent, and connection
            // tracking on the way would not let that through.
            acknowledgement: 0,
            flags: RST,
        },
        EMPTIED => Shape {
            to_client: false,
            sequence: tcp.sequence,
            acknowledgement: tcp.acknowledgement,
            flags: ACK,
        },
        _ => return 0,
    };
    rewrite(&ctx, scratch, &shape).is_some().into()
}

#[inline(always)]
fn rewrite(ctx: &XdpContext, scratch: &mut Scratch, shape: &Shape) -> Option<()> {
    let is_v4 = scratch.is_v4 != 0;
    let network = scratch.network as usize;
    let transport = network + if is_v4 { 20 } else { 40 };
    if scratch.place.transport as usize != transport {
        return None;
    }
    let answer = ANSWERS_BY_ENGINE.get(Guard(scratch.guard).engine())?;
    let speaks = shape.to_client && answer.length as usize == ANSWER_LENGTH;
    let flags = match (shape.to_client, speaks) {
        (false, _) => shape.flags,
        (true, true) => PSH | FIN | ACK,
        (true, false) => RST | ACK,
    };
    let length = if speaks {
        TCP_HEADER + ANSWER_LENGTH
    } else {
        TCP_HEADER
    };
    let moved = resize(ctx, transport + length)?;
    // First: the headers that follow overwrite the place where it was.
    link_header(ctx, &mut scratch.headers, network, moved, shape.to_client)?;
    let [p0, p1, d0, d1] = scratch.tcp.ports.to_ne_bytes();
    let [s0, s1, s2, s3] = shape.sequence.to_be_bytes();
    let [a0, a1, a2, a3] = shape.acknowledgement.to_be_bytes();
    let [p0, p1, d0, d1] = if shape.to_client {
        [d0, d1, p0, p1]
    } else {
        [p0, p1, d0, d1]
    };
    let headers = &mut scratch.headers;
    headers.tcp = [
        p0, p1, d0, d1, s0, s1, s2, s3, a0, a1, a2, a3, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0,
    ];
    let [high, low] = (length as u16).to_be_bytes();
    let (source, destination) = if shape.to_client {
        (&scratch.destination, &scratch.source)
    } else {
        (&scratch.source, &scratch.destination)
    };
    let mut sum = if is_v4 {
        let [s0, s1, s2, s3] = source[3].to_ne_bytes();
        let [d0, d1, d2, d3] = destination[3].to_ne_bytes();
        let [total_high, total_low] = (length as u16 + 20).to_be_bytes();
        headers.v4 = [
            0x45, 0, total_high, total_low, 0, 0, 0x40, 0, 64, 6, 0, 0, s0, s1, s2, s3, d0, d1, d2,
            d3,
        ];
        let [c0, c1] = folded(checksum(&headers.v4, 0));
        headers.v4[10] = c0;
        headers.v4[11] = c1;
        store(ctx, network, &headers.v4)?;
        headers.pseudo = [s0, s1, s2, s3, d0, d1, d2, d3, 0, 6, high, low];
        checksum(&headers.pseudo, 0)
    } else {
        headers.v6 = [0x60, 0, 0, 0, high, low, 6, 64];
        store(ctx, network, &headers.v6)?;
        store(ctx, network + 8, source)?;
        store(ctx, network + 24, destination)?;
        let sum = checksum(source, checksum(destination, 0));
        headers.v6 = [0, 0, high, low, 0, 0, 0, 6];
        checksum(&headers.v6, sum)
    };
    sum = checksum(&headers.tcp, sum);
    if speaks {
        sum = checksum(&answer.bytes, sum);
        store(ctx, transport + TCP_HEADER, &answer.bytes)?;
    }
    let [c0, c1] = folded(sum);
    headers.tcp[16] = c0;
    headers.tcp[17] = c1;
    store(ctx, transport, &headers.tcp)?;
    Some(())
}

/// Writes the Ethernet header and the VLAN tags, which are `moved` bytes from where they belong.
#[inline(always)]
fn link_header(
    ctx: &XdpContext,
    headers: &mut Headers,
    network: usize,
    moved: usize,
    to_client: bool,
) -> Option<()> {
    let [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5] = load::<12>(ctx, moved)?;
    headers.ethernet = if to_client {
        [s0, s1, s2, s3, s4, s5, d0, d1, d2, d3, d4, d5]
    } else {
        [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5]
    };
    store(ctx, 0, &headers.ethernet)?;
    for tag in 0..MAX_VLAN_TAGS {
        let offset = 12 + 4 * tag;
        if offset + 2 >= network {
            break;
        }
        headers.tag = load(ctx, moved + offset)?;
        store(ctx, offset, &headers.tag)?;
    }
    headers.ethertype = load(ctx, moved + network - 2)?;
    store(ctx, network - 2, &headers.ethertype)
}

/// Gives the packet this length, in bytes. A packet grows at its beginning: every driver leaves room there,
/// few leave room behind it. Returns by how much it grew.
#[inline(always)]
fn resize(ctx: &XdpContext, length: usize) -> Option<usize> {
    let ctx = ctx.as_ptr().cast();
    // SAFETY: the helpers (kernels 5.18, 4.10 and 4.18) only need the context they are given; no
    // pointer into the packet is kept.
    unsafe {
        let change = length as i32 - bpf_xdp_get_buff_len(ctx) as i32;
        if change <= 0 {
            return (bpf_xdp_adjust_tail(ctx, change) == 0).then_some(0);
        }
        (bpf_xdp_adjust_head(ctx, -change) == 0).then_some(change as usize)
    }
}

#[inline(always)]
fn store<T, const N: usize>(ctx: &XdpContext, offset: usize, elements: &[T; N]) -> Option<()> {
    // SAFETY: the helper (kernel 5.18) reads the bytes of so many integers, which there are, or fails.
    let failed = unsafe {
        bpf_xdp_store_bytes(
            ctx.as_ptr().cast(),
            offset as u32,
            elements.as_ptr().cast_mut().cast(),
            size_of::<[T; N]>() as u32,
        )
    };
    (failed == 0).then_some(())
}

/// Adds integers to an Internet checksum (RFC 1071), not folded yet. The helper wants a multiple of 4
/// bytes.
#[inline(always)]
fn checksum<T, const N: usize>(elements: &[T; N], sum: u32) -> u32 {
    // SAFETY: the helper (kernel 4.6) reads the bytes of so many integers, which there are.
    let sum = unsafe {
        bpf_csum_diff(
            core::ptr::null_mut(),
            0,
            elements.as_ptr().cast_mut().cast(),
            size_of::<[T; N]>() as u32,
            sum,
        )
    };
    sum as u32
}

/// The checksum as it stands in a header: the sums are of words in this host's byte order.
#[inline(always)]
fn folded(sum: u32) -> [u8; 2] {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    (!sum as u16).to_ne_bytes()
}

/// Hides the options of Multipath TCP (RFC 8684 section 3) of a segment whose TCP header, `transport` bytes into the
/// packet, goes on until `end`: what they say of the stream cannot be judged, and both ends go on without them. Options that
/// cannot be read stay. A global function, which the kernel verifies once.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn hide_multipath(ctx: *mut xdp_md, transport: u32, end: u32) -> u32 {
    let ctx = XdpContext::new(ctx);
    hide(&ctx, transport as usize, end as usize)
        .is_some()
        .into()
}

#[inline(always)]
fn hide(ctx: &XdpContext, transport: usize, end: usize) -> Option<()> {
    const END: u8 = 0;
    const NO_OPERATION: u8 = 1;
    const MULTIPATH: u8 = 30;
    /// An experiment's (RFC 4727): whoever does not take part skips it (RFC 9293 section 3.1).
    const HIDDEN: u8 = 253;
    const LONGEST: usize = 40;
    let mut at = transport + TCP_HEADER;
    for _ in 0..LONGEST {
        if at >= end {
            break;
        }
        let [kind] = load(ctx, at)?;
        at += match kind {
            END => break,
            NO_OPERATION => 1,
            _ => {
                let [length] = load(ctx, at + 1)?;
                if length < 2 {
                    break;
                }
                if kind == MULTIPATH {
                    let [old, new] = [MULTIPATH, HIDDEN].map(|kind| match (at - transport) % 2 {
                        0 => u16::from_ne_bytes([kind, 0]),
                        _ => u16::from_ne_bytes([0, kind]),
                    });
                    // RFC 1624 section 3.
                    let sum = !u16::from_ne_bytes(load(ctx, transport + 16)?);
                    let sum = u32::from(sum) + u32::from(!old) + u32::from(new);
                    store(ctx, transport + 16, &folded(sum))?;
                    store(ctx, at, &[HIDDEN])?;
                }
                length as usize
            }
        };
    }
    Some(())
}
