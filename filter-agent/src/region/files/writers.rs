//! Whether a program has a file open for writing. inotify reports only what happens from a watch on, and reports no end of
//! a change by truncate(2), which opens nothing.

use std::{fs::File, os::fd::AsRawFd as _};

use nix::{
    errno::Errno,
    libc::{self, c_int},
};

/// The signal of a broken lease (fcntl(2)); missing in `libc`.
const F_SETSIG: c_int = 10;

/// Asks the kernel for a read lease, which it grants on files that nobody has open for writing, and returns it at once. A
/// program that opens the file in between waits for that long.
///
/// `None`: it cannot be found out. The file is another user's and the agent has no CAP_LEASE, or its file system has no
/// leases.
pub(super) fn has_writer(file: &File) -> Option<bool> {
    let fcntl = |command: c_int, argument: c_int| {
        // SAFETY: these commands take an integer and no pointer, and the descriptor is open for as long as `file` is
        // borrowed.
        Errno::result(unsafe { libc::fcntl(file.as_raw_fd(), command, argument) })
    };
    // Of a lease that is broken before it is returned: SIGIO would end the process, SIGURG is ignored.
    fcntl(F_SETSIG, libc::SIGURG).ok()?;
    let leased = fcntl(libc::F_SETLEASE, libc::F_RDLCK);
    match leased {
        Ok(_) => {
            // Fails only where the lease was taken away already, which ends it as well.
            let _ = fcntl(libc::F_SETLEASE, libc::F_UNLCK);
            Some(false)
        }
        Err(Errno::EAGAIN) => Some(true),
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, OpenOptions};

    use super::*;

    #[test]
    fn writer_is_noticed_while_it_has_the_file_open() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("list");
        fs::write(&path, "").unwrap();
        let file = File::open(&path).unwrap();
        assert_eq!(has_writer(&file), Some(false));
        let writer = OpenOptions::new().append(true).open(&path).unwrap();
        assert_eq!(has_writer(&file), Some(true));
        drop(writer);
        assert_eq!(has_writer(&file), Some(false));
        // The lease is gone: this would wait for it to end.
        fs::write(&path, "x").unwrap();
    }
}
