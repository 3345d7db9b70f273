//! The same programs as in `main`, which note their steps on the packets of some sources, and log them in one line each.
//! Loaded only for a trace: an object of its own, so that the agent's other programs do not change by it.
#![no_std]
#![no_main]
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

#[xdp(frags)]
#[inline(always)]
pub fn filter_traced(ctx: XdpContext) -> u32 {
    steps::begin_packet(&ctx);
    let action = judge(&ctx);
    steps::log_packet(ctx.ctx, action);
    action
}

#[inline(always)]
fn judge(ctx: &XdpContext) -> u32 {
    if let Some(packet) = parse::plain4(ctx) {
        return verdict(ctx, &packet);
    }
    if let Some(packet) = parse::plain6(ctx) {
        return verdict(ctx, &packet);
    }
    verdict(ctx, &parse::parse(ctx))
}

include!("verdict.rs");

#[cgroup_skb(ingress)]
pub fn tls_opening_traced(ctx: SkBuffContext) -> i32 {
    steps::begin_segment();
    let passes = tls::passes(ctx.skb.skb);
    steps::log_segment(ctx.skb.skb, passes.into());
    passes.into()
}

/// The kernel lets only GPL-compatible programs call the helpers used here.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}
