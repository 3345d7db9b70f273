//! In place of `steps`, for the programs that run without a trace: nothing is noted.

use aya_ebpf::programs::XdpContext;
use filter_common::{
    Guard,
    steps::{Decision, LookedUp, Parsed, Stand},
};

use crate::parse::Segment;

#[inline(always)]
pub fn looked_up(_: LookedUp) {}

#[inline(always)]
pub fn found(_value: u32) {}

#[inline(always)]
pub fn parsed(_: Parsed) {}

#[inline(always)]
pub fn segment(_: &XdpContext, _: &Segment) {}

#[inline(always)]
pub fn decided(_: Decision, _: Guard, _why: u32) {}

#[inline(always)]
pub fn stands(_: Stand, _place: u32) {}

#[inline(always)]
pub fn judged(_: Guard, _reason: u32) {}
