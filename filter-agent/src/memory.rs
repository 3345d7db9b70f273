//! Memory that the C library keeps after it was freed.

use nix::libc;

/// Gives it back to the kernel. By itself the library does so at the end of its heap only, where something small stays in
/// use: what a start or a large change took for a moment would be the agent's for good.
pub fn give_back() {
    // Other libraries than glibc have no such call.
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes a number, and locks the heaps that it looks at.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    use procfs::process::Process;

    use super::*;

    fn resident() -> u64 {
        let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE);
        let pages = Process::myself().unwrap().statm().unwrap().resident;
        pages * u64::try_from(page.unwrap().unwrap()).unwrap()
    }

    #[test]
    fn what_was_freed_below_something_in_use_is_given_back() {
        const EACH: usize = 1024;
        let mut blocks: Vec<Vec<u8>> = (0..64 * 1024).map(|_| vec![1; EACH]).collect();
        let last = blocks.pop();
        drop(blocks);
        let before = resident();
        give_back();
        let after = resident();
        assert!(after + 32 * 1024 * 1024 < before, "{before} to {after}");
        assert_eq!(last.map(|block| block.len()), Some(EACH));
    }
}
