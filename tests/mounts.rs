//! Mounts for a test, a file system that hangs, and one with little room.

use std::{
    fs::{self, File, OpenOptions},
    io::Write as _,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount, umount2},
    sched::{CloneFlags, unshare},
};

/// Has the mounts of this thread and of the programs that it starts seen by nobody else.
pub fn own_mounts() {
    unshare(CloneFlags::CLONE_NEWNS).expect("make a mount namespace");
    let none = None::<&str>;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(none, "/", none, private, none).expect("make the mounts private");
}

/// A mount that is gone when it is dropped.
pub struct Mounted<'a> {
    place: &'a Path,
    /// The other end of a file system in user space that answers nothing.
    end: Option<File>,
}

impl<'a> Mounted<'a> {
    /// One that never answers, as a network file system whose server is gone.
    pub fn hanging(place: &'a Path) -> Self {
        let end = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .unwrap();
        let data = format!("fd={},rootmode=40000,user_id=0,group_id=0", end.as_raw_fd());
        let (source, kind) = (Some("hanging"), Some("fuse"));
        mount(source, place, kind, MsFlags::empty(), Some(data.as_str())).unwrap();
        Self {
            place,
            end: Some(end),
        }
    }

    pub fn bind(source: &Path, place: &'a Path) -> Self {
        let none = None::<&str>;
        mount(Some(source), place, none, MsFlags::MS_BIND, none).unwrap();
        Self { place, end: None }
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        // What waits for an answer gets an error.
        self.end = None;
        umount2(self.place, MntFlags::MNT_DETACH).unwrap();
    }
}

/// A directory with little room.
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    pub fn new(path: PathBuf) -> Self {
        fs::create_dir_all(&path).unwrap();
        let (kind, size) = (Some("tmpfs"), Some("size=64k"));
        mount(kind, &path, kind, MsFlags::empty(), size).unwrap();
        Self(path)
    }

    pub fn fill(&self) {
        let mut filler = File::create(self.0.join("filler")).unwrap();
        while filler.write(&[0; 4096]).is_ok() {}
    }

    pub fn make_room(&self) {
        fs::remove_file(self.0.join("filler")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = umount(&self.0);
    }
}
