//! The judgement of a connection, in its socket's storage: there as long as the socket is, whatever the state of the maps.

use core::{
    arch::asm,
    ptr::{read_volatile, write_volatile},
};

use aya_ebpf::{
    bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock},
    btf_maps::SkStorage,
    helpers::generated::bpf_sk_storage_get,
    macros::btf_map,
};
use filter_common::{Judgement, opening::Forms};

use crate::proxy::Header;

#[btf_map]
static JUDGEMENTS: SkStorage<Judgement> = SkStorage::new();

/// A judgement in a socket's storage. Another CPU may use it at the same time: no reference to it is made.
#[derive(Clone, Copy)]
pub struct JudgementPointer(*mut Judgement);

/// The judgement of a socket. `new`: is stored where there is none.
#[inline(always)]
pub fn judgement_of(sk: *mut bpf_sock, new: Option<&mut Judgement>) -> Option<JudgementPointer> {
    let map = (&raw const JUDGEMENTS).cast_mut().cast();
    let (new, flags) = match new {
        Some(new) => ((&raw mut *new).cast(), BPF_SK_STORAGE_GET_F_CREATE.into()),
        None => (core::ptr::null_mut(), 0),
    };
    // SAFETY: the helper (kernel 5.2) takes a socket that is not null, and copies the new value.
    let found = unsafe { bpf_sk_storage_get(map, sk.cast(), new, flags) };
    (!found.is_null()).then_some(JudgementPointer(found.cast()))
}

impl JudgementPointer {
    /// Written before any other CPU sees it.
    #[inline(always)]
    pub fn base(self) -> u32 {
        // SAFETY: an aligned integer of a map's element, which a program that holds the pointer may read.
        unsafe { read_volatile(&raw const (*self.0).base) as u32 }
    }

    #[inline(always)]
    pub fn forms(self) -> Forms {
        // SAFETY: as in `base`.
        Forms(unsafe { read_volatile(&raw const (*self.0).forms) })
    }

    #[inline(always)]
    fn has(self, state: u64) -> bool {
        // SAFETY: as in `base`.
        unsafe { read_volatile(&raw const (*self.0).state) & state != 0 }
    }

    #[inline(always)]
    pub fn is_unjudged(self) -> bool {
        self.has(Judgement::UNJUDGED)
    }

    #[inline(always)]
    pub fn is_refused(self) -> bool {
        self.has(Judgement::REFUSED)
    }

    /// Has a connection go on that was not judged, or monitored only, when it began.
    #[inline(always)]
    pub fn set_judged(self) {
        // SAFETY: as in `base`. It was counted before.
        unsafe {
            write_volatile(&raw mut (*self.0).forms, u64::MAX);
            write_volatile(&raw mut (*self.0).state, Judgement::COUNTED);
        }
    }

    /// Takes away the forms that are not among these. Atomic: read, changed and written, two CPUs would let two
    /// forms pass. Returns what is left.
    #[inline(always)]
    pub fn narrow(self, to: Forms) -> Forms {
        let mut forms = to.0;
        // SAFETY: one instruction (kernel 5.12) on eight bytes of the element, aligned as the map's values are.
        unsafe {
            asm!(
                "{0} = atomic_fetch_and((u64 *)({1} + 0), {0})",
                inout(reg) forms,
                in(reg) &raw mut (*self.0).forms,
                options(nostack)
            );
        }
        Forms(forms).and(to)
    }

    #[inline(always)]
    pub fn header(self) -> u64 {
        // SAFETY: as in `base`.
        unsafe { read_volatile(&raw const (*self.0).header) }
    }

    /// Adds a header. Returns what there is then: several, if another one was added before.
    #[inline(always)]
    pub fn set_header(self, header: Header) -> u64 {
        // SAFETY: as in `narrow`.
        let before = unsafe { fetch_or(&raw mut (*self.0).header, header.word()) };
        before | header.word()
    }

    /// Adds places to those seen. Returns all.
    #[inline(always)]
    pub fn see(self, places: u64) -> u64 {
        // SAFETY: as in `narrow`.
        let seen = unsafe { fetch_or(&raw mut (*self.0).seen, places) };
        seen | places
    }

    /// Returns whether the connection was not counted before.
    #[inline(always)]
    pub fn count_once(self) -> bool {
        self.add_state(Judgement::COUNTED) & Judgement::COUNTED == 0
    }

    #[inline(always)]
    pub fn set_refused(self) {
        self.add_state(Judgement::REFUSED);
    }

    /// Returns what the state was.
    #[inline(always)]
    fn add_state(self, state: u64) -> u64 {
        // SAFETY: as in `narrow`.
        unsafe { fetch_or(&raw mut (*self.0).state, state) }
    }
}

/// Adds bits to a number, atomically. Returns what it was.
///
/// # Safety
/// `number` is eight bytes of a map's element.
#[inline(always)]
unsafe fn fetch_or(number: *mut u64, bits: u64) -> u64 {
    let mut before = bits;
    // SAFETY: one instruction (kernel 5.12), on what the caller promises.
    unsafe {
        asm!(
            "{0} = atomic_fetch_or((u64 *)({1} + 0), {0})",
            inout(reg) before,
            in(reg) number,
            options(nostack)
        );
    }
    before
}
