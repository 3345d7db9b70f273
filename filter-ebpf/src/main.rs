//! The programs: every frame that arrives on a filtered interface, and every segment for a TCP socket, to a verdict.
#![no_std]
#![no_main]
// RUSTC_BOOTSTRAP is on for `-Z build-std`; inline assembly for BPF is not stable yet.
#![feature(asm_experimental_arch)]

mod answer;
mod judgement;
mod parse;
mod proxy;
mod refuse;
mod rules;
mod scratch;
mod socket;
mod tls;

use answer::Ending;
use aya_ebpf::{
    bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_TX},
    macros::{cgroup_skb, xdp},
    programs::{SkBuffContext, XdpContext},
};
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

#[inline(always)]
fn verdict(ctx: &XdpContext, packet: &Packet) -> u32 {
    match rules::judge(ctx, packet) {
        Outcome::NotConcerned => XDP_PASS,
        Outcome::LaterFragment => XDP_PASS,
        Outcome::Allowed { guard, rule, .. } => {
            rules::count_hit(guard, rule);
            XDP_PASS
        }
        Outcome::Dropped {
            guard,
            reason,
            sampled,
        } => {
            rules::count(guard, reason);
            rules::sample(ctx, packet, guard, reason, Some(sampled));
            if guard.is_monitor() {
                XDP_PASS
            } else {
                XDP_DROP
            }
        }
        // Counted and sampled where it was refused.
        Outcome::Refused { guard, ending } => match ending {
            _ if guard.is_monitor() => XDP_PASS,
            Ending::Dropped => XDP_DROP,
            Ending::ToClient => XDP_TX,
            Ending::ResetServer => XDP_PASS,
            Ending::Emptied => XDP_PASS,
        },
    }
}

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
