//! The benchmark's own programs, beside the filter: programs that cost nothing, and a source of packets.
#![no_std]
#![no_main]

use core::ptr::read_volatile;

use aya_ebpf::{
    bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_TX},
    helpers::generated::bpf_get_prandom_u32,
    macros::xdp,
    programs::XdpContext,
};

/// Where in a frame its source address begins, in bytes.
#[unsafe(no_mangle)]
static SOURCE_AT: u32 = 0;
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

/// Sends each frame that it is run on.
#[xdp(frags)]
pub fn generate(ctx: XdpContext) -> u32 {
    // SAFETY: a constant, which the loader sets before the program is loaded.
    let at = unsafe { read_volatile(&raw const SOURCE_AT) } as usize & 0x3f;
    let source = ctx.data() + at;
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
            let fixed = place.read_unaligned() & !random;
            place.write_unaligned(fixed | bpf_get_prandom_u32() & random);
        }
    }
    XDP_TX
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}
