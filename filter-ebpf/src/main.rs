//! The programs: every frame that arrives on a filtered interface, and every segment for a TCP socket, to a verdict.
#![no_std]
#![no_main]
// RUSTC_BOOTSTRAP is on for `-Z build-std`; inline assembly for BPF is not stable yet.
#![feature(asm_experimental_arch)]

mod answer;
mod behind;
mod judgement;
mod parse;
mod proxy;
mod refuse;
mod rules;
mod scratch;
mod socket;
#[path = "no_steps.rs"]
mod steps;
mod tls;

use answer::Ending;
use aya_ebpf::{
    bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_TX},
    macros::{cgroup_skb, xdp},
    programs::{SkBuffContext, XdpContext},
};
use filter_common::{Guard, steps::Decision};
use parse::Packet;
use rules::Outcome;

/// Loaded as XDP *frags*: without it the kernel refuses to attach above an MTU of about a page.
#[xdp(frags)]
// Into the function that the macro makes around it: as one of its own it costs each packet a call.
#[inline(always)]
pub fn filter(ctx: XdpContext) -> u32 {
    // One after the other: what follows is compiled for each by itself.
    if let Some(packet) = parse::plain4(&ctx) {
        return verdict(&ctx, &packet);
    }
    if let Some(packet) = parse::plain6(&ctx) {
        return verdict(&ctx, &packet);
    }
    verdict(&ctx, &parse::parse(&ctx))
}

include!("verdict.rs");

/// Attached to the root of the cgroups, so that it sees what is for the sockets of containers, too.
#[cgroup_skb(ingress)]
pub fn tls_opening(ctx: SkBuffContext) -> i32 {
    tls::passes(ctx.skb.skb).into()
}

/// The kernel lets only GPL-compatible programs call the helpers used here.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}
