//! A segment that is about to be given to a TCP socket: its headers, and what the kernel knows of the socket.

use core::{arch::asm, mem::MaybeUninit, ptr::read_volatile};

use aya_ebpf::{
    bindings::{__sk_buff, bpf_sock, bpf_tcp_sock},
    btf_maps::PerCpuArray,
    helpers::generated::{bpf_skb_load_bytes, bpf_skc_to_tcp_sock, bpf_tcp_sock as tcp_sock},
    macros::btf_map,
};
use filter_common::{
    Address, Client, Connection, Guard, KernelOffsets, MAX_EXTENSION_HEADERS, Protocol, Syn,
};

const IPV4: u32 = (0x0800_u16).to_be() as u32;
const IPV6: u32 = (0x86dd_u16).to_be() as u32;
const TCP: u8 = Protocol::Tcp.number();
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;

/// BPF_TCP_SYN_RECV and BPF_TCP_LISTEN.
const SYN_RECV: u32 = 3;
const LISTEN: u32 = 10;

/// Set by the agent before the program is loaded: constants for the verifier.
#[unsafe(no_mangle)]
static KERNEL: KernelOffsets = KernelOffsets {
    namespace: 0,
    inode: 0,
    first: 0,
};
/// Inode number of the network namespace whose interfaces the XDP program filters.
#[unsafe(no_mangle)]
static NAMESPACE: u32 = 0;

#[inline(always)]
pub fn kernel() -> KernelOffsets {
    // SAFETY: constants, which are there as long as the program is.
    unsafe { read_volatile(&raw const KERNEL) }
}

/// A TCP socket that is no request and not in TIME_WAIT, with a segment for it.
#[derive(Clone, Copy)]
pub struct Socket {
    pub skb: *mut __sk_buff,
    pub sk: *mut bpf_sock,
    tcp: *mut bpf_tcp_sock,
}

impl Socket {
    #[inline(always)]
    pub fn of(skb: *mut __sk_buff) -> Option<Self> {
        // SAFETY: a field of the context, which the kernel fills in.
        let sk = unsafe { (*skb).__bindgen_anon_2.sk };
        if sk.is_null() {
            return None;
        }
        // SAFETY: not null; the helper (kernel 5.1) returns null for all other sockets.
        let tcp = unsafe { tcp_sock(sk) };
        (!tcp.is_null()).then_some(Self { skb, sk, tcp })
    }

    #[inline(always)]
    fn state(self) -> u32 {
        // SAFETY: not null, as `of` made sure; the same below.
        unsafe { read_volatile(&raw const (*self.sk).state) }
    }

    #[inline(always)]
    pub fn listens(self) -> bool {
        self.state() == LISTEN
    }

    /// Whether the kernel still makes the socket: it may be given what ended its handshake any moment.
    #[inline(always)]
    pub fn is_new(self) -> bool {
        self.state() == SYN_RECV
    }

    /// Segments with data that it was given, counted before their bytes are.
    #[inline(always)]
    pub fn segments(self) -> u32 {
        // SAFETY: as in `state`.
        unsafe { read_volatile(&raw const (*self.tcp).data_segs_in) }
    }

    /// Bytes that were received in order, of whatever the program has read.
    #[inline(always)]
    pub fn received(self) -> u64 {
        // SAFETY: as in `state`.
        unsafe { read_volatile(&raw const (*self.tcp).bytes_received) }
    }

    /// The sequence number after those.
    #[inline(always)]
    pub fn next(self) -> u32 {
        // SAFETY: as in `state`.
        unsafe { read_volatile(&raw const (*self.tcp).rcv_nxt) }
    }

    /// Segments with data that this host has sent.
    #[inline(always)]
    pub fn answers(self) -> u32 {
        // SAFETY: as in `state`.
        unsafe { read_volatile(&raw const (*self.tcp).data_segs_out) }
    }

    /// Local port, host byte order.
    #[inline(always)]
    pub fn port(self) -> u16 {
        // SAFETY: as in `state`.
        unsafe { read_volatile(&raw const (*self.sk).src_port) as u16 }
    }

    /// Whether the segment came over loopback, whose index is 1 in every network namespace.
    #[inline(always)]
    pub fn is_loopback(self) -> bool {
        // SAFETY: a field of the context.
        unsafe { read_volatile(&raw const (*self.skb).ifindex) == 1 }
    }

    #[inline(always)]
    pub fn interface(self) -> u32 {
        // SAFETY: a field of the context.
        unsafe { read_volatile(&raw const (*self.skb).ifindex) }
    }

    /// Inode number of the socket's network namespace, and whether it is that of the filtered interfaces.
    #[inline(always)]
    pub fn namespace(self) -> (u32, bool) {
        // SAFETY: constants, as in `kernel`. The helper (kernel 5.9) takes a socket that is not null. What it returns,
        // and the pointer found there, are the kernel's: the verifier knows their types, and makes a read of
        // one that is not there anymore return zero.
        let (inode, ours) = unsafe {
            let sk = bpf_skc_to_tcp_sock(self.sk.cast()).cast::<u8>();
            if sk.is_null() {
                return (0, false);
            }
            let kernel = kernel();
            let namespace = sk.add(kernel.namespace as usize).cast::<*const u8>();
            let namespace = read_volatile(namespace);
            let inode = read_volatile(namespace.add(kernel.inode as usize).cast::<u32>());
            (inode, read_volatile(&raw const NAMESPACE))
        };
        (inode, inode == ours)
    }
}

/// The segment that this CPU judges, for functions that the kernel verifies separately: it does not fit their stack,
/// 512 bytes together.
#[btf_map]
static SEGMENTS: PerCpuArray<Segment, 1> = PerCpuArray::new();

/// A TCP segment (RFC 9293 section 3.1) with its addresses.
#[repr(C)]
pub struct Segment {
    pub source: Address,
    pub destination: Address,
    /// Source port, then destination port, as in the header.
    pub ports: u32,
    /// Destination port, host byte order.
    pub port: u32,
    pub sequence: u32,
    /// Of the TCP header, in bytes from the beginning of the IP header.
    pub transport: u32,
    /// Of the data; its length.
    pub data: u32,
    pub length: u32,
    pub is_v4: bool,
    /// Whether the flag or the pointer of urgent data is set.
    pub is_urgent: bool,
    pub flags: u8,
}

impl Segment {
    pub const SYN: u8 = 2;
    pub const RST: u8 = 4;
    pub const ACK: u8 = 16;
    const URG: u8 = 32;

    /// The segment that `read_segment` has read.
    #[inline(always)]
    pub fn get() -> Option<&'static Self> {
        let segment = SEGMENTS.get_ptr(0)?;
        // SAFETY: an element of a per-CPU array. Segments are given to sockets with bottom halves off, one after the other on
        // a CPU, so that nothing writes it while it is judged.
        Some(unsafe { &*segment })
    }

    /// The segment that the socket is about to be given; the context's data begins with the IP header.
    #[inline(always)]
    fn read(skb: *mut __sk_buff) -> Option<Self> {
        // SAFETY: fields of the context.
        let (protocol, end) = unsafe { ((*skb).protocol, (*skb).len) };
        let (is_v4, source, destination, transport) = match protocol {
            IPV4 => {
                let [first, _, _, source, destination] = load::<u32, 5>(skb, 0)?;
                let mapped = 0xffff_u32.to_be();
                let transport = (u32::from_be(first) >> 24 & 15) * 4;
                (
                    true,
                    [0, 0, mapped, source],
                    [0, 0, mapped, destination],
                    transport,
                )
            }
            IPV6 => {
                let [_, next, s0, s1, s2, s3, d0, d1, d2, d3] = load::<u32, 10>(skb, 0)?;
                let transport = behind_extensions(skb, u32::from_be(next) >> 8 & 0xff);
                if transport == 0 {
                    return None;
                }
                (false, [s0, s1, s2, s3], [d0, d1, d2, d3], transport)
            }
            _ => return None,
        };
        let [ports, sequence, _, rest, urgent] = load::<u32, 5>(skb, transport)?;
        let rest = u32::from_be(rest);
        let flags = (rest >> 16) as u8;
        let data = transport + (rest >> 28) * 4;
        Some(Self {
            is_v4,
            source,
            destination,
            ports,
            port: u32::from_be(ports) & 0xffff,
            sequence: u32::from_be(sequence),
            flags,
            is_urgent: flags & Self::URG != 0 || u32::from_be(urgent) as u16 != 0,
            transport,
            data,
            length: end.checked_sub(data)?,
        })
    }

    /// As in the header.
    #[inline(always)]
    fn source_port(&self) -> u32 {
        let [first, second, ..] = self.ports.to_ne_bytes();
        u16::from_ne_bytes([first, second]).into()
    }

    #[inline(always)]
    pub fn syn(&self) -> Syn {
        Syn {
            source: self.source,
            sequence: self.sequence,
        }
    }

    #[inline(always)]
    pub fn connection(&self) -> Connection {
        let ([a, b, c, d], [e, f, g, h]) = (self.source, self.destination);
        [a, b, c, d, e, f, g, h, self.ports]
    }

    #[inline(always)]
    pub fn client(&self, guard: Guard) -> Client {
        Client {
            source: self.source,
            port: self.source_port(),
            slot: guard.slot().into(),
        }
    }
}

/// Reads the segment for `Segment::get`. Returns 0 if it cannot be read. A global function, which the kernel verifies once.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn read_segment(skb: *mut __sk_buff) -> u32 {
    let (Some(segment), Some(place)) = (Segment::read(skb), SEGMENTS.get_ptr_mut(0)) else {
        return 0;
    };
    // SAFETY: as in `Segment::get`.
    unsafe {
        *place = segment;
    }
    1
}

/// Where the TCP header begins behind IPv6 extension headers; 0 if that cannot be found. A global function, which the
/// kernel verifies once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn behind_extensions(skb: *mut __sk_buff, next: u32) -> u32 {
    let mut next = next as u8;
    let mut offset = 40;
    for _ in 0..=MAX_EXTENSION_HEADERS {
        if next == TCP {
            return offset;
        }
        let Some([then, length]) = load::<u8, 2>(skb, offset) else {
            return 0;
        };
        offset += match next {
            FRAGMENT => 8,
            AUTHENTICATION => (u32::from(length) + 2) * 4,
            _ => (u32::from(length) + 1) * 8,
        };
        next = then;
    }
    0
}

/// Words that are summed up at a time, and how often: a segment of more than 9,216 bytes came in parts, whose
/// checksums are verified already.
const WORDS: usize = 16;
const PARTS: u32 = 144;

/// Returns 0 if the segment's checksum is wrong (RFC 9293 section 3.1): the program sees a segment before TCP has discarded
/// one that was damaged on its way. A global function, which the kernel verifies once.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn is_intact(skb: *mut __sk_buff) -> u32 {
    const PART: u32 = size_of::<[u32; WORDS]>() as u32;
    let Some(segment) = Segment::get() else {
        return 0;
    };
    let end = segment.data + segment.length;
    let length = end.wrapping_sub(segment.transport);
    // Of an IPv4-mapped address the words in front, 0 and ffff, change no sum.
    let mut sum = u64::from((length + u32::from(TCP)).to_be());
    for word in 0..4 {
        sum += u64::from(segment.source[word]) + u64::from(segment.destination[word]);
    }
    let pseudo = folded(sum);
    let Some([checksum]) = load::<u16, 1>(skb, segment.transport + 16) else {
        return 0;
    };
    // Not computed where the sender is on this host, or segments were joined: verified or never sent. One in 65,536 of
    // the damaged passes for such a one, as one in 65,536 passes TCP's own sum: its client is refused and tries again.
    if checksum == pseudo {
        return 1;
    }
    // What is left of whole parts first: it ends the packet.
    let mut words = [0_u32; WORDS];
    let left = length % PART;
    let mut bounded = u64::from(left.wrapping_sub(1));
    // SAFETY: one instruction, of a register that it names, which changes no number below `PART`: so the verifier of
    // Linux 6.1 knows its bounds.
    unsafe {
        asm!("{0} &= 0x3f", inout(reg) bounded, options(pure, nomem, nostack));
    }
    // SAFETY: the helper (kernel 4.5) writes so many bytes, which are there, or fails.
    let failed = left != 0
        && unsafe {
            let to = words.as_mut_ptr().cast();
            bpf_skb_load_bytes(skb.cast(), end - left, to, bounded as u32 + 1) != 0
        };
    if failed {
        return 0;
    }
    let mut sum = u64::from(pseudo) + total(words);
    let mut at = segment.transport;
    for _ in 0..PARTS {
        if at + PART > end {
            break;
        }
        let Some(words) = load::<u32, WORDS>(skb, at) else {
            return 0;
        };
        sum += total(words);
        at += PART;
    }
    (at + PART <= end || folded(sum) == u16::MAX).into()
}

#[inline(always)]
fn total(words: [u32; WORDS]) -> u64 {
    words.into_iter().map(u64::from).sum()
}

/// The one's complement sum of the words of 16 bits in a sum of words (RFC 1071 section 2).
#[inline(always)]
const fn folded(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// For integers only.
#[inline(always)]
pub fn load<T, const N: usize>(skb: *mut __sk_buff, offset: u32) -> Option<[T; N]> {
    let mut elements = MaybeUninit::<[T; N]>::uninit();
    let to = elements.as_mut_ptr().cast();
    // SAFETY: the helper (kernel 4.5) writes as many bytes as there are, or fails.
    let failed = unsafe { bpf_skb_load_bytes(skb.cast(), offset, to, size_of::<[T; N]>() as u32) };
    if failed != 0 {
        return None;
    }
    // SAFETY: the helper did not fail: all bytes are written.
    Some(unsafe { elements.assume_init() })
}
