//! A BPF file system of a test's own.

use std::path::Path;

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    unistd::geteuid,
};
use tempfile::TempDir;

use crate::mounts::own_mounts;

/// Seen by the thread that made it, and gone with it, however that ends: it is mounted in a mount
/// namespace of the thread's own.
pub struct Bpffs(TempDir);

impl Bpffs {
    pub fn mount() -> Self {
        assert!(
            geteuid().is_root(),
            "this test loads BPF programs: run it as root"
        );
        let directory = TempDir::with_prefix("filter-agent-").expect("make a directory");
        own_mounts();
        let none = None::<&str>;
        mount(none, directory.path(), Some("bpf"), MsFlags::empty(), none)
            .expect("mount a BPF file system");
        Self(directory)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        // What stays open keeps the pins, not the directory.
        let _ = umount2(self.path(), MntFlags::MNT_DETACH);
    }
}
