//! The XDP program: every frame that arrives on a filtered interface, to a verdict.
#![no_std]
#![no_main]
// RUSTC_BOOTSTRAP is on for `-Z build-std`; inline assembly for BPF is not stable yet.
#![feature(asm_experimental_arch)]

mod answer;
mod parse;
mod rules;
mod tls;

use answer::Ending;
use aya_ebpf::{
    bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_TX},
    macros::xdp,
    programs::XdpContext,
};
use rules::Outcome;

/// Loaded as XDP *frags*: without it the kernel refuses to attach above an MTU of about a page.
#[xdp(frags)]
pub fn filter(ctx: XdpContext) -> u32 {
    let outcome = rules::judge(&ctx, &parse::parse(&ctx));
    rules::count(&outcome);
    match outcome {
        Outcome::NotConcerned => XDP_PASS,
        Outcome::LaterFragment => XDP_PASS,
        Outcome::Allowed { .. } => XDP_PASS,
        Outcome::Refused { guard, ending, .. } => match ending {
            _ if guard.is_monitor() => XDP_PASS,
            Ending::Dropped => XDP_DROP,
            Ending::ToClient => XDP_TX,
            Ending::ResetServer => XDP_PASS,
            Ending::Emptied => XDP_PASS,
        },
    }
}

/// The kernel lets only GPL-compatible programs call the helpers used here.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}
