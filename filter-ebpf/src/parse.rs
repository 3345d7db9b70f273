//! Reads addresses and ports from packet bytes, or returns the reason why it cannot. The only pointer code.

use core::{arch::asm, mem::MaybeUninit};

use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::{bpf_xdp_get_buff_len, bpf_xdp_load_bytes},
    programs::XdpContext,
};
use filter_common::{Address, MAX_EXTENSION_HEADERS, MAX_VLAN_TAGS, Protocol, Reason};

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_SERVICE_VLAN: u16 = 0x88a8;

const TCP: u8 = Protocol::Tcp.number();
const UDP: u8 = Protocol::Udp.number();
const HOP_BY_HOP: u8 = 0;
const IPV4: u8 = 4;
const IPV6: u8 = 41;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;

/// Any transport protocol: where a packet ends before it says which.
const ANY: u32 = Protocol::Tcp.bit() | Protocol::Udp.bit();

/// Source and destination, as in the header; IPv4 in the lower half of the second number, so that no
/// part of them is ever undefined: the verifier refuses to see such a part copied.
#[derive(Clone, Copy)]
pub struct Addresses {
    pub is_v4: bool,
    pub source: [u64; 2],
    pub destination: [u64; 2],
}

impl Addresses {
    #[inline(always)]
    const fn v4(source: u32, destination: u32) -> Self {
        Self {
            is_v4: true,
            source: [0, source as u64],
            destination: [0, destination as u64],
        }
    }

    #[inline(always)]
    const fn v6(source: [u64; 2], destination: [u64; 2]) -> Self {
        Self {
            is_v4: false,
            source,
            destination,
        }
    }
}

/// An address of `Addresses` in words.
#[inline(always)]
pub fn address(is_v4: bool, address: [u64; 2]) -> Address {
    if is_v4 {
        return [0, 0, 0xffff_u32.to_be(), address[1] as u32];
    }
    let [[a, b, c, d, e, f, g, h], [i, j, k, l, m, n, o, p]] = address.map(u64::to_ne_bytes);
    [[a, b, c, d], [e, f, g, h], [i, j, k, l], [m, n, o, p]].map(u32::from_ne_bytes)
}

#[inline(always)]
pub fn bytes_of(address: &Address) -> [u8; 16] {
    let [a, b, c, d] = address.map(u32::to_ne_bytes);
    [
        a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2],
        d[3],
    ]
}

pub struct Segment {
    pub addresses: Addresses,
    pub protocol: Protocol,
    /// Destination port, host byte order.
    pub port: u16,
    /// Linux may deliver to another local address than the header's: a source route is present.
    pub source_routed: bool,
    /// The headers before it are of the lengths that most have: known to the compiler, not to be compared.
    pub is_plain: bool,
    pub place: Place,
}

/// Where a segment is in its packet, in bytes from the packet's beginning.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Place {
    /// Of the transport header.
    pub transport: u32,
    /// Past the segment; what follows is padding.
    pub end: u32,
}

/// A TCP header (RFC 9293 section 3.1).
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Tcp {
    /// Source port, then destination port, as in the header.
    pub ports: u32,
    pub sequence: u32,
    pub acknowledgement: u32,
    pub flags: u32,
    /// Where the payload begins in the packet, and how long it is, in bytes.
    pub payload: u32,
    pub length: u32,
}

pub enum Packet {
    /// Not IP, or neither TCP nor UDP.
    Other,
    /// Not the first fragment: no ports in it.
    LaterFragment,
    Segment(Segment),
    /// Could be aimed at any port of these protocols (a set of `Protocol::bit`).
    Unclear {
        reason: Reason,
        protocols: u32,
    },
}

const fn unclear(reason: Reason) -> Packet {
    Packet::Unclear {
        reason,
        protocols: ANY,
    }
}

/// Where the `length` bytes at `offset` begin, or `None` when they are not all in the packet's first
/// buffer.
#[inline(always)]
fn bytes(ctx: &XdpContext, offset: usize, length: usize) -> Option<usize> {
    let start = ctx.data() + offset;
    // Written as `start + n > end`: subtracting packet pointers would need CAP_PERFMON, and an exact
    // `==` end is misjudged by the verifier of some 5.x kernels (2fa7d94afc1a).
    if start + length > ctx.data_end() {
        return None;
    }
    Some(start)
}

/// What is `OFFSET` bytes into what begins at `start`, as it is in the packet. One instruction, where the
/// compiler, which knows no alignment of packets, reads byte by byte.
///
/// # Safety
/// `bytes` gave `start`, and was asked for all that is read.
macro_rules! reader {
    ($name:ident, $number:ty, $instruction:literal) => {
        #[inline(always)]
        unsafe fn $name<const OFFSET: usize>(start: usize) -> $number {
            let number: u64;
            // SAFETY: as the caller promises; the kernel rejects the program where the processor could
            // not read at any address. What is read is no larger than its type.
            unsafe {
                asm!(
                    $instruction,
                    out(reg) number,
                    in(reg) start,
                    const OFFSET,
                    options(pure, readonly, nostack)
                );
                core::hint::assert_unchecked(number <= <$number>::MAX as u64);
            }
            number as $number
        }
    };
}

reader!(byte, u8, "{0} = *(u8 *)({1} + {2})");
reader!(half, u16, "{0} = *(u16 *)({1} + {2})");
reader!(word, u32, "{0} = *(u32 *)({1} + {2})");
reader!(double, u64, "{0} = *(u64 *)({1} + {2})");

/// The number in the two bytes at `offset`.
#[inline(always)]
fn number(ctx: &XdpContext, offset: usize) -> Option<u16> {
    let start = bytes(ctx, offset, 2)?;
    // SAFETY: both bytes are there.
    Some(u16::from_be(unsafe { half::<0>(start) }))
}

/// The bytes at an offset that the packet itself gives, in whichever buffer; `None` past its end.
///
/// Slower than `read`, and only for what few packets have: the verifier follows a packet pointer
/// through every way to such an offset, which for chains of headers is past what it accepts.
#[inline(always)]
pub fn load<const N: usize>(ctx: &XdpContext, offset: usize) -> Option<[u8; N]> {
    load_elements(ctx, offset)
}

/// The same in words, as they are in the packet.
#[inline(always)]
fn load_words<const N: usize>(ctx: &XdpContext, offset: usize) -> Option<[u32; N]> {
    load_elements(ctx, offset)
}

/// For integers only.
#[inline(always)]
fn load_elements<T, const N: usize>(ctx: &XdpContext, offset: usize) -> Option<[T; N]> {
    // Not zeroed first: that would be a call of memset, a loop that the verifier follows each time.
    let mut elements = MaybeUninit::<[T; N]>::uninit();
    // SAFETY: the helper (kernel 5.18) writes as many bytes as there are, or fails.
    let failed = unsafe {
        bpf_xdp_load_bytes(
            ctx.as_ptr().cast(),
            offset as u32,
            elements.as_mut_ptr().cast(),
            size_of::<[T; N]>() as u32,
        )
    };
    if failed != 0 {
        return None;
    }
    // SAFETY: the helper did not fail: all bytes are written.
    Some(unsafe { elements.assume_init() })
}

/// A number as the verifier of Linux 6.1 knows it to be below 2^16: it forgets what a byte swap leaves,
/// and refuses to add it to a packet pointer.
#[inline(always)]
fn bounded(number: u16) -> usize {
    let mut bounded = u64::from(number);
    // SAFETY: one instruction, of a register that it names, which changes no number below 2^16.
    unsafe {
        asm!("{0} &= 0xffff", inout(reg) bounded, options(pure, nomem, nostack));
    }
    bounded as usize
}

/// Whether the packet holds `length` bytes, in all its buffers.
#[inline(always)]
fn holds(ctx: &XdpContext, length: usize) -> bool {
    ctx.data() + length <= ctx.data_end() || total(ctx) >= length as u64
}

/// Length of the packet in bytes, in all its buffers.
#[inline(always)]
fn total(ctx: &XdpContext) -> u64 {
    // SAFETY: the helper (kernel 5.18) only reads the context it is given.
    unsafe { bpf_xdp_get_buff_len(ctx.as_ptr().cast()) }
}

/// What nearly all packets are, as `parse` has it and in fewer instructions: IPv4 without tags, options
/// and padding of its length. `None`: it is for `parse` to tell.
#[inline(always)]
pub fn plain4(ctx: &XdpContext) -> Option<Packet> {
    const IP: usize = 14;
    const PORTS: usize = IP + 20;
    let start = bytes(ctx, 0, PORTS + 4)?;
    // SAFETY: all that is read is in those bytes.
    unsafe {
        if half::<12>(start) != ETHERTYPE_IPV4.to_be() || byte::<IP>(start) != 0x45 {
            return None;
        }
        let length = bounded(u16::from_be(half::<{ IP + 2 }>(start)));
        if length < 24 {
            return None;
        }
        let protocol = match byte::<{ IP + 9 }>(start) {
            TCP => Protocol::Tcp,
            UDP => Protocol::Udp,
            AUTHENTICATION => return None,
            _ => return Some(Packet::Other),
        };
        if half::<{ IP + 6 }>(start) & 0x3fff_u16.to_be() != 0
            || start + IP + length > ctx.data_end()
        {
            return None;
        }
        Some(Packet::Segment(Segment {
            addresses: Addresses::v4(word::<{ IP + 12 }>(start), word::<{ IP + 16 }>(start)),
            protocol,
            port: u16::from_be(half::<{ PORTS + 2 }>(start)),
            source_routed: false,
            is_plain: true,
            place: Place {
                transport: PORTS as u32,
                end: (IP + length) as u32,
            },
        }))
    }
}

/// The same of IPv6, without tags and extension headers.
#[inline(always)]
pub fn plain6(ctx: &XdpContext) -> Option<Packet> {
    const IP: usize = 14;
    const PORTS: usize = IP + 40;
    let start = bytes(ctx, 0, PORTS + 4)?;
    // SAFETY: all that is read is in those bytes.
    unsafe {
        if half::<12>(start) != ETHERTYPE_IPV6.to_be() || byte::<IP>(start) >> 4 != 6 {
            return None;
        }
        let protocol = match byte::<{ IP + 6 }>(start) {
            TCP => Protocol::Tcp,
            UDP => Protocol::Udp,
            _ => return None,
        };
        let length = bounded(u16::from_be(half::<{ IP + 4 }>(start)));
        if length < 4 || start + IP + 40 + length > ctx.data_end() {
            return None;
        }
        Some(Packet::Segment(Segment {
            addresses: Addresses::v6(
                [double::<{ IP + 8 }>(start), double::<{ IP + 16 }>(start)],
                [double::<{ IP + 24 }>(start), double::<{ IP + 32 }>(start)],
            ),
            protocol,
            port: u16::from_be(half::<{ PORTS + 2 }>(start)),
            source_routed: false,
            is_plain: true,
            place: Place {
                transport: PORTS as u32,
                end: (IP + 40 + length) as u32,
            },
        }))
    }
}

#[inline(always)]
pub fn parse(ctx: &XdpContext) -> Packet {
    let Some(mut ethertype) = number(ctx, 12) else {
        return unclear(Reason::Truncated);
    };
    let mut offset = 14;
    for _ in 0..MAX_VLAN_TAGS {
        if ethertype != ETHERTYPE_VLAN && ethertype != ETHERTYPE_SERVICE_VLAN {
            break;
        }
        let Some(next) = number(ctx, offset + 2) else {
            return unclear(Reason::Truncated);
        };
        ethertype = next;
        offset += 4;
    }
    match ethertype {
        ETHERTYPE_IPV4 => ipv4(ctx, offset),
        ETHERTYPE_IPV6 => ipv6(ctx, offset),
        ETHERTYPE_VLAN | ETHERTYPE_SERVICE_VLAN => unclear(Reason::VlanTags),
        _ => Packet::Other,
    }
}

/// RFC 791 section 3.1.
#[inline(always)]
fn ipv4(ctx: &XdpContext, start: usize) -> Packet {
    let Some(header) = bytes(ctx, start, 20) else {
        return unclear(Reason::Truncated);
    };
    // SAFETY: the header's 20 bytes are there.
    let (first, fragment, next, source, destination) = unsafe {
        (
            u32::from_be(word::<0>(header)),
            u32::from_be(word::<4>(header)),
            u32::from_be(word::<8>(header)),
            word::<12>(header),
            word::<16>(header),
        )
    };
    let header_length = (first >> 24 & 0xf) as usize * 4;
    let mut length = bounded(first as u16);
    if length == 0 {
        // What generic mode sees of a BIG TCP packet (kernel 6.3): too long for the field.
        let whole = total(ctx) as usize;
        if whole > start + u16::MAX as usize {
            length = u16::MAX as usize;
        }
    }
    if first >> 28 != 4 || header_length < 20 || length < header_length {
        return unclear(Reason::BadHeader);
    }
    let protocol = (next >> 16) as u8;
    // A later fragment carries no ports, and without its first one is never delivered.
    if fragment & 0x1fff != 0 {
        return Packet::LaterFragment;
    }
    if protocol != TCP && protocol != UDP && protocol != AUTHENTICATION {
        return Packet::Other;
    }
    if !holds(ctx, start + length) {
        return unclear(Reason::BadHeader);
    }
    let addresses = Addresses::v4(source, destination);
    let at = Cursor {
        offset: start + header_length,
        end: start + length,
        next: protocol,
    };
    if header_length == 20 && protocol != AUTHENTICATION {
        return ports(port(ctx, start + 20), at, addresses, false);
    }
    let mut routes = 0;
    for i in 0..10 {
        let offset = start + 20 + i * 4;
        if offset >= at.offset {
            break;
        }
        let Some(options) = load::<4>(ctx, offset) else {
            return unclear(Reason::Truncated);
        };
        // Loose and strict source route (RFC 791), wherever such a byte stands in the options: an
        // option's content that looks like one is taken for one.
        routes |= has_byte(options, 131) | has_byte(options, 137);
    }
    walk(ctx, at, addresses, routes != 0, false)
}

/// Not zero where one of the bytes is `byte`. Without branches, of which the verifier would follow
/// both sides for every byte.
#[inline(always)]
fn has_byte(bytes: [u8; 4], byte: u8) -> u32 {
    let zero_where_equal = u32::from_ne_bytes(bytes) ^ u32::from_ne_bytes([byte; 4]);
    zero_where_equal.wrapping_sub(0x0101_0101) & !zero_where_equal & 0x8080_8080
}

/// RFC 8200 section 3.
#[inline(always)]
fn ipv6(ctx: &XdpContext, start: usize) -> Packet {
    let Some(header) = bytes(ctx, start, 40) else {
        return unclear(Reason::Truncated);
    };
    // SAFETY: the header's 40 bytes are there.
    let (first, second, source, destination) = unsafe {
        (
            u32::from_be(word::<0>(header)),
            u32::from_be(word::<4>(header)),
            [double::<8>(header), double::<16>(header)],
            [double::<24>(header), double::<32>(header)],
        )
    };
    if first >> 28 != 6 {
        return unclear(Reason::BadHeader);
    }
    let next = (second >> 8) as u8;
    let payload = bounded((second >> 16) as u16);
    let mut end = start + 40 + payload;
    if payload == 0 && next == HOP_BY_HOP {
        // A jumbogram (RFC 2675), or what generic mode sees of a BIG TCP packet (kernel 5.19).
        end = start + u16::MAX as usize;
    } else if !holds(ctx, end) {
        return unclear(Reason::BadHeader);
    }
    let at = Cursor {
        offset: start + 40,
        end,
        next,
    };
    let addresses = Addresses::v6(source, destination);
    if next == TCP || next == UDP {
        return ports(port(ctx, start + 40), at, addresses, false);
    }
    walk(ctx, at, addresses, false, true)
}

/// A place in the packet, within what the IP header says is the packet.
struct Cursor {
    offset: usize,
    /// What follows is padding, which Linux cuts off: a header that begins or goes on there is none.
    end: usize,
    /// Kind of header at `offset` (IANA protocol numbers).
    next: u8,
}

impl Cursor {
    /// The first bytes of the header here.
    #[inline(always)]
    fn load<const N: usize>(&self, ctx: &XdpContext) -> Option<[u8; N]> {
        if self.offset + N > self.end {
            return None;
        }
        load(ctx, self.offset)
    }
}

/// The destination port of TCP or UDP, whose header is here.
#[inline(always)]
fn port(ctx: &XdpContext, offset: usize) -> Option<u16> {
    number(ctx, offset + 2)
}

/// The segment to a port.
#[inline(always)]
fn ports(port: Option<u16>, at: Cursor, addresses: Addresses, source_routed: bool) -> Packet {
    let protocol = if at.next == TCP {
        Protocol::Tcp
    } else {
        Protocol::Udp
    };
    match port {
        Some(port) if at.offset + 4 <= at.end => Packet::Segment(Segment {
            addresses,
            protocol,
            port,
            source_routed,
            is_plain: false,
            place: Place {
                transport: at.offset as u32,
                end: at.end as u32,
            },
        }),
        _ => Packet::Unclear {
            reason: Reason::Truncated,
            protocols: protocol.bit(),
        },
    }
}

/// Follows extension headers to the ports. IPv4 has only one of them, the authentication header.
#[inline(always)]
fn walk(
    ctx: &XdpContext,
    mut at: Cursor,
    addresses: Addresses,
    mut source_routed: bool,
    v6: bool,
) -> Packet {
    let mut routing_header = false;
    for _ in 0..=MAX_EXTENSION_HEADERS {
        match at.next {
            TCP | UDP => {
                let port = at
                    .load(ctx)
                    .map(|[_, _, high, low]| u16::from_be_bytes([high, low]));
                return ports(port, at, addresses, source_routed);
            }
            AUTHENTICATION => {
                let Some([next, length]) = at.load(ctx) else {
                    return unclear(Reason::Truncated);
                };
                // RFC 4302 section 2.2: in 4-byte units, minus 2; every other header in 8-byte units.
                at.offset += (length as usize + 2) * 4;
                at.next = next;
            }
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS if v6 => {
                let Some([next, length, _, segments_left]) = at.load(ctx) else {
                    return unclear(Reason::Truncated);
                };
                routing_header |= at.next == ROUTING;
                source_routed |= at.next == ROUTING && segments_left != 0;
                at.offset += (length as usize + 1) * 8;
                at.next = next;
            }
            FRAGMENT if v6 => {
                let Some([next, _, high, low]) = at.load(ctx) else {
                    return unclear(Reason::Truncated);
                };
                if u16::from_be_bytes([high, low]) & 0xfff8 != 0 {
                    return Packet::LaterFragment;
                }
                at.offset += 8;
                at.next = next;
            }
            // Linux unwraps the packet inside on this same interface, past native XDP, where segment
            // routing is on (seg6_enabled, rpl_seg_enabled).
            IPV4 | IPV6 if routing_header => return unclear(Reason::ExtensionHeaders),
            _ => return Packet::Other,
        }
    }
    unclear(Reason::ExtensionHeaders)
}

/// The TCP header of a segment; `None` where it is cut off, or goes on past the segment.
#[inline(always)]
pub fn tcp(ctx: &XdpContext, place: &Place) -> Option<Tcp> {
    let [ports, sequence, acknowledgement, rest, _] =
        load_words::<5>(ctx, place.transport as usize)?;
    let rest = u32::from_be(rest);
    let header = (rest >> 28) * 4;
    let payload = place.transport + header;
    if header < 20 || payload > place.end {
        return None;
    }
    Some(Tcp {
        ports,
        sequence: u32::from_be(sequence),
        acknowledgement: u32::from_be(acknowledgement),
        flags: rest >> 16 & 0xff,
        payload,
        length: place.end - payload,
    })
}

/// The flags of a TCP segment; of one that is plain without a helper. `None`: it is cut off before them.
#[inline(always)]
pub fn flags(ctx: &XdpContext, segment: &Segment) -> Option<u32> {
    const FLAGS: usize = 13;
    let at = segment.place.transport + FLAGS as u32;
    if at >= segment.place.end {
        return None;
    }
    if !segment.is_plain {
        let [flags] = load(ctx, at as usize)?;
        return Some(u32::from(flags));
    }
    let transport = if segment.addresses.is_v4 { 34 } else { 54 };
    let start = bytes(ctx, transport, FLAGS + 1)?;
    // SAFETY: so many bytes are there.
    Some(u32::from(unsafe { byte::<FLAGS>(start) }))
}

/// Whether all of a segment is in its packet, rather than in fragments.
#[inline(always)]
pub fn is_whole(ctx: &XdpContext, place: &Place, is_v4: bool) -> bool {
    let Some(network) = network_offset(ctx, place, is_v4) else {
        return false;
    };
    if is_v4 {
        return load::<2>(ctx, network + 6).is_some_and(|[fragment, _]| fragment & 0x20 == 0);
    }
    let Some([mut next]) = load(ctx, network + 6) else {
        return false;
    };
    let mut offset = network + 40;
    for _ in 0..=MAX_EXTENSION_HEADERS {
        if next == TCP {
            return true;
        }
        let Some([then, length, _, fragment]) = load(ctx, offset) else {
            return false;
        };
        offset += match next {
            FRAGMENT if fragment & 1 != 0 => return false,
            FRAGMENT => 8,
            AUTHENTICATION => (length as usize + 2) * 4,
            _ => (length as usize + 1) * 8,
        };
        next = then;
    }
    false
}

/// Where the IP header is, of a packet that `parse` followed to its ports.
///
/// Found once more: carried through the parser, such constants would keep the verifier from taking one way for
/// another.
#[inline(always)]
pub fn network_offset(ctx: &XdpContext, place: &Place, is_v4: bool) -> Option<usize> {
    // No tags, and nothing between both headers.
    if place.transport == if is_v4 { 34 } else { 54 } {
        return Some(14);
    }
    let mut offset = 12;
    for _ in 0..=MAX_VLAN_TAGS {
        match u16::from_be_bytes(load(ctx, offset)?) {
            ETHERTYPE_VLAN | ETHERTYPE_SERVICE_VLAN => offset += 4,
            _ => return Some(offset + 2),
        }
    }
    None
}
