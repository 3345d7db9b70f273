//! The benchmark's own programs, beside the filter: programs that cost nothing, and a source of packets.
#![no_std]
#![no_main]

use core::ptr::read_volatile;

use aya_ebpf::{
    bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_TX},
    btf_maps::Array,
    helpers::generated::bpf_get_prandom_u32,
    macros::{btf_map, xdp},
    programs::XdpContext,
};

/// Where in a frame its source address begins, in bytes.
#[unsafe(no_mangle)]
static SOURCE_AT: u32 = 0;
/// Where that of IPv4 begins, just behind the header's checksum.
const V4_SOURCE_AT: usize = 26;
/// Which bits of the address's words each frame has at random, as in memory. IPv4 has one word.
#[unsafe(no_mangle)]
static RANDOM: [u32; 4] = [0; 4];

/// The cost of any XDP program that drops.
#[xdp(frags)]
pub fn floor(_: XdpContext) -> u32 {
    XDP_DROP
}

/// The cost of any that passes.
#[xdp(frags)]
pub fn pass(_: XdpContext) -> u32 {
    XDP_PASS
}

/// How many of 2^32 sources `chance` passes.
#[btf_map]
static PASSED: Array<u32, 1> = Array::new();
/// Where a word of the source is random, in frames of IPv4 and of IPv6. The other word is the same in all frames, or random as well.
const RANDOM_WORDS: [usize; 2] = [V4_SOURCE_AT, 34];

/// The cost of any that passes a part of what has random sources, and drops the others. No helper: to return from one takes
/// longer than all of this.
#[xdp(frags)]
pub fn chance(ctx: XdpContext) -> u32 {
    let [first, second] = RANDOM_WORDS.map(|at| ctx.data() + at);
    if second + 4 > ctx.data_end() {
        return XDP_DROP;
    }
    // SAFETY: both words end before the frame does, by the check above (4.1).
    let words =
        unsafe { (first as *const u32).read_unaligned() ^ (second as *const u32).read_unaligned() };
    // Fibonacci hashing: sources that differ in few bits are spread over all values (Knuth, TAOCP 3, 6.4).
    let is_passed = |&passed: &u32| words.wrapping_mul(0x9e37_79b1) < passed;
    match PASSED.get(0).is_some_and(is_passed) {
        true => XDP_PASS,
        false => XDP_DROP,
    }
}

/// Sends each frame that it is run on.
#[xdp(frags)]
pub fn generate(ctx: XdpContext) -> u32 {
    // SAFETY: a constant, which the loader sets before the program is loaded.
    let at = unsafe { read_volatile(&raw const SOURCE_AT) } as usize & 0x3f;
    let source = ctx.data() + at;
    if ctx.data() + V4_SOURCE_AT > ctx.data_end() {
        return XDP_TX;
    }
    for (word, random) in RANDOM.iter().enumerate() {
        // SAFETY: as above.
        let random = unsafe { read_volatile(random) };
        let place = source + 4 * word;
        if random == 0 || place + 4 > ctx.data_end() {
            continue;
        }
        // SAFETY: the four bytes at `place` end before the frame does; the helper takes nothing (4.1).
        unsafe {
            let place = place as *mut u32;
            let before = place.read_unaligned();
            let after = before & !random | bpf_get_prandom_u32() & random;
            place.write_unaligned(after);
            if at == V4_SOURCE_AT {
                let checksum = (source - 2) as *mut u16;
                checksum.write_unaligned(changed(checksum.read_unaligned(), before, after));
            }
        }
    }
    XDP_TX
}

/// The checksum of a header of which a word is another now (RFC 1624, equation 3). All as in memory.
#[inline(always)]
const fn changed(checksum: u16, before: u32, after: u32) -> u16 {
    let before = !before;
    let sum =
        !checksum as u32 + (before & 0xffff) + (before >> 16) + (after & 0xffff) + (after >> 16);
    // Five summands of 16 bits carry at most twice.
    let sum = (sum & 0xffff) + (sum >> 16);
    !((sum & 0xffff) + (sum >> 16)) as u16
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}
