//! Loading the XDP program, and what the kernel must have for it.

use std::path::Path;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use aya::{
    Ebpf,
    programs::{ProgramError, ProgramType, Xdp},
    sys::is_program_supported,
    util::KernelVersion,
};
use nix::errno::Errno;

use crate::kernel::pins;

/// The object that `build.rs` builds.
pub(super) static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/filter"));

/// The first kernel that has XDP frags and `bpf_xdp_get_buff_len`.
const OLDEST_KERNEL: KernelVersion = KernelVersion::new(5, 18, 0);

pub(super) fn program(ebpf: &mut Ebpf) -> Result<&mut Xdp, ProgramError> {
    let program = ebpf.program_mut("filter").ok_or(ProgramError::NotLoaded)?;
    program.try_into()
}

/// The load error with the line of the verifier's log that names the cause; the whole log is pages long.
pub(super) fn load_error(error: ProgramError) -> anyhow::Error {
    let ProgramError::LoadError {
        io_error,
        verifier_log,
    } = error
    else {
        return error.into();
    };
    let log = verifier_log.to_string();
    // Statistics follow the cause.
    let counted = ["processed ", "stack depth ", "verification time "];
    let mut lines = log
        .lines()
        .rev()
        .filter(|line| !counted.iter().any(|counted| line.starts_with(counted)));
    match lines.find(|line| !line.trim().is_empty()) {
        Some(line) => anyhow!("{io_error}: the verifier says: {line}"),
        None => io_error.into(),
    }
}

/// Whether the kernel can do what the filter needs of it.
///
/// # Errors
/// The kernel lacks a part, which is named.
pub fn check_kernel(bpffs: &Path) -> Result<()> {
    let kernel = KernelVersion::current().context("read the kernel's version")?;
    ensure!(
        kernel >= OLDEST_KERNEL,
        "this kernel is too old: the filter needs Linux 5.18 or newer"
    );
    pins::base(bpffs)?;
    match is_program_supported(ProgramType::Xdp) {
        Ok(true) => Ok(()),
        Ok(false) => bail!("this kernel has no XDP: it is built without CONFIG_NET"),
        Err(ProgramError::SyscallError(error)) => {
            let what = match error.io_error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::ENOSYS) => {
                    "this kernel has no BPF: it is built without CONFIG_BPF_SYSCALL"
                }
                Some(Errno::EPERM) => {
                    "the kernel refuses BPF here: run as root, with CAP_BPF and CAP_NET_ADMIN"
                }
                _ => "ask the kernel for XDP",
            };
            Err(error).context(what)
        }
        Err(error) => Err(error).context("ask the kernel for XDP"),
    }
}
