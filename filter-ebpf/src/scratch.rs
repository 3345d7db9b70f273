//! The per-CPU record of a segment while it is judged and answered: shared by `refuse` and `answer`.

use aya_ebpf::{btf_maps::PerCpuArray, macros::btf_map, programs::XdpContext};
use filter_common::Address;

use crate::parse::{Place, Tcp};

/// A segment to a port where TLS is forced. It is an argument of functions that the kernel verifies
/// separately, passed through a map: Linux 6.1 does not accept their arguments as map keys. A function
/// that is inlined or static is verified again on every path that leads to it.
#[repr(C)]
pub struct Scratch {
    pub source: Address,
    pub destination: Address,
    pub place: Place,
    pub is_v4: u32,
    pub guard: u32,
    /// Destination port, host byte order.
    pub port: u32,
    /// Results of `refuse::follow_segment`: the offset of the IP header in the packet in bytes, the TCP header, and the
    /// sequence number at which the server's side of the stream is reset.
    pub network: u32,
    pub tcp: Tcp,
    pub reset_at: u32,
    pub headers: Headers,
}

/// The headers of an answer while they are put together.
#[repr(C)]
pub struct Headers {
    pub ethernet: [u8; 12],
    pub tag: [u8; 4],
    pub ethertype: [u8; 2],
    pub v4: [u8; 20],
    pub v6: [u8; 8],
    pub pseudo: [u8; 12],
    pub tcp: [u8; 20],
}

/// The segments that this CPU judges. The stack, 512 bytes, is too small for them. Two: before Linux 6.3 a packet may
/// interrupt one of the agent's test runs, which then goes on with its own segment.
#[btf_map]
static SCRATCH: PerCpuArray<Scratch, 2> = PerCpuArray::new();

/// Index of the loopback interface, through which test runs come in. It is never filtered.
const LOOPBACK: usize = 1;

#[inline(always)]
pub fn scratch(ctx: &XdpContext) -> Option<&'static mut Scratch> {
    let is_test_run = ctx.ingress_ifindex() == LOOPBACK;
    let scratch = SCRATCH.get_ptr_mut(is_test_run.into())?;
    // SAFETY: a non-null element of a per-CPU array. No packet interrupts another, nor a test run another one, so
    // nothing else on this CPU uses it until the segment is done with, and no two functions use it at a time.
    Some(unsafe { &mut *scratch })
}
