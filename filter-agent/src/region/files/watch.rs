//! Announcements of changed region files, by inotify.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    thread,
    time::Instant,
};

use futures_util::Stream;
use inotify::{Inotify, WatchMask, Watches};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use crate::{
    log::Entry,
    region::files::{
        table::{Hop, Part, Table},
        walk::Walk,
    },
};

/// Watches region files. Clones share everything.
///
/// A file's path leads through names in directories: plain directories, symbolic links, the file. Each name is
/// watched in its directory, so that a change of any of them is noticed, and the file itself is, for writes. Without
/// inotify nothing is announced, and files are only read again from time to time.
#[derive(Clone)]
pub struct Watcher(Option<Arc<Shared>>);

struct Shared {
    /// Locked while events are taken, never while a file system is asked for something.
    inotify: Mutex<Inotify>,
    table: Mutex<Table>,
    /// Whether a watch that was refused has been logged.
    logged: AtomicBool,
}

/// A watch that was begun, or renewed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Begun {
    /// Changes announced before.
    pub(super) changes: u64,
    /// Whether nothing is known of earlier writes.
    pub(super) is_new: bool,
}

/// How far a file is, by the events so far.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Progress {
    /// Changes announced since the file is watched.
    pub(super) changes: u64,
    /// Whether it was changed and not closed since.
    pub(super) unfinished: bool,
}

impl Watcher {
    /// Makes a watcher, and the stream of its files that may have changed, each as the path that was watched.
    pub fn new() -> (Self, impl Stream<Item = PathBuf> + Send + Unpin) {
        match Shared::start() {
            Ok(shared) => (Self(Some(shared.clone())), Changed(Some(shared))),
            Err(error) => {
                Entry::warning(format!(
                    "region files are not watched, only read again every `max_refresh`: {error}"
                ))
                .log();
                (Self(None), Changed(None))
            }
        }
    }

    /// Watches a file, or what is new on the way to it. Blocks for as long as the file systems on the way do.
    ///
    /// A name that cannot be watched is left out.
    pub fn watch(&self, path: &Path) -> Begun {
        let Some(shared) = &self.0 else {
            return Begun {
                changes: 0,
                is_new: true,
            };
        };
        // Earlier events are not about this read. The thread that takes events finds an error, too, and logs it.
        let _ = shared.take_events();
        shared.table().adding += 1;
        let mut watches = lock(&shared.inotify).watches();
        let (hops, refused) = follow(path, &mut watches);
        if let Some((place, error)) = refused
            && !shared.logged.swap(true, Ordering::Relaxed)
        {
            Entry::warning(format!(
                "watch {}: {error}: changes of {} may be noticed at `max_refresh` only",
                place.display(),
                path.display()
            ))
            .log();
        }
        let mut table = shared.table();
        let is_new = !table.files.contains_key(path);
        table.replace(path, hops);
        table.adding -= 1;
        table.remove_unused(&mut watches);
        Begun {
            changes: table.files[path].changes,
            is_new,
        }
    }

    /// Stops watching other files than these.
    pub fn keep_only(&self, wanted: impl Fn(&Path) -> bool) {
        let Some(shared) = &self.0 else { return };
        let mut watches = lock(&shared.inotify).watches();
        let mut table = shared.table();
        let files = table.files.keys();
        let unwanted: Vec<PathBuf> = files.filter(|path| !wanted(path)).cloned().collect();
        for path in unwanted {
            table.replace(&path, BTreeMap::new());
            table.files.remove(&path);
            table.changed.remove(&path);
        }
        table.remove_unused(&mut watches);
    }

    /// How far a watched file is, all events up to now included.
    pub(super) fn progress(&self, path: &Path) -> Progress {
        let idle = Progress {
            changes: 0,
            unfinished: false,
        };
        let Some(shared) = &self.0 else { return idle };
        let _ = shared.take_events();
        let table = shared.table();
        let file = table.files.get(path);
        file.map_or(idle, |file| Progress {
            changes: file.changes,
            unfinished: file.is_unfinished(Instant::now()),
        })
    }

    /// Notes whether a program has the file open for writing, as it was found after so many changes.
    pub(super) fn settle(&self, path: &Path, changes: u64, has_writer: bool) {
        if let Some(shared) = &self.0 {
            let _ = shared.take_events();
            shared.table().settle(path, changes, has_writer);
        }
    }
}

impl Shared {
    fn start() -> io::Result<Arc<Self>> {
        let inotify = Inotify::init()?;
        let readable = inotify.as_fd().try_clone_to_owned()?;
        let shared = Arc::new(Self {
            inotify: Mutex::new(inotify),
            table: Mutex::default(),
            logged: AtomicBool::new(false),
        });
        let weak = Arc::downgrade(&shared);
        thread::Builder::new()
            .name("watch-files".into())
            .spawn(move || {
                if let Err(error) = take_all_events(&weak, &readable) {
                    Entry::warning(format!(
                        "region files are no longer watched, only read again every `max_refresh`: {error}"
                    )
).log();
                }
            })?;
        Ok(shared)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        lock(&self.table)
    }

    /// Takes all events that there are, and wakes the stream if a file may have changed.
    fn take_events(&self) -> io::Result<()> {
        let mut buffer = [0; 4096];
        let mut inotify = lock(&self.inotify);
        loop {
            let events = match inotify.read_events(&mut buffer) {
                Ok(events) => events,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let mut table = self.table();
            for event in events {
                let name = event.name.map(OsString::from);
                table.event(event.wd, name, event.mask);
            }
            if !table.changed.is_empty()
                && let Some(waker) = table.waker.take()
            {
                waker.wake();
            }
        }
    }
}

/// A panic of another thread leaves nothing half done that matters here.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes events as they come, until the watcher is gone. A thread of its own: directories like `/tmp` have many events
/// that concern no region, and the agent's only thread has other things to do.
fn take_all_events(shared: &Weak<Shared>, readable: &OwnedFd) -> io::Result<()> {
    // Bounded, to notice that the watcher is gone.
    let timeout = PollTimeout::from(u16::MAX);
    loop {
        let mut polled = [PollFd::new(readable.as_fd(), PollFlags::POLLIN)];
        match poll(&mut polled, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let Some(shared) = shared.upgrade() else {
            return Ok(());
        };
        shared.take_events()?;
    }
}

/// The files that may have changed. Without inotify it never yields.
struct Changed(Option<Arc<Shared>>);

impl Stream for Changed {
    type Item = PathBuf;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<PathBuf>> {
        let Some(shared) = &self.0 else {
            return Poll::Pending;
        };
        let mut table = shared.table();
        match table.changed.pop_first() {
            Some(path) => Poll::Ready(Some(path)),
            None => {
                table.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// Watches each name on the way to a file. Returns the names, and the first that could not be watched.
fn follow(
    path: &Path,
    watches: &mut Watches,
) -> (BTreeMap<Hop, Part>, Option<(PathBuf, io::Error)>) {
    let mut hops = BTreeMap::new();
    let mut refused = None;
    let mut walk = Walk::new(path);
    while let Some(name) = walk.next_name() {
        let mut mask = WatchMask::CREATE
            | WatchMask::DELETE
            | WatchMask::MOVE
            | WatchMask::ONLYDIR
            | WatchMask::MASK_ADD;
        if name.is_last {
            mask |= WatchMask::CLOSE_WRITE;
        }
        // Before the name is looked at: a change in between is announced.
        let watched = watches.add(&name.directory, mask);
        let is_link = walk.follow(&name);
        let part = match is_link {
            Ok(true) => Part::Way,
            Ok(false) | Err(_) if name.is_last => Part::File,
            Ok(false) | Err(_) => Part::Way,
        };
        let place = name.directory.join(&name.name);
        match watched {
            Ok(wd) => {
                hops.insert((wd, Some(name.name)), part);
            }
            Err(error) => refused = refused.or(Some((name.directory, error))),
        }
        if part == Part::File && is_link.is_ok() {
            let mask = WatchMask::MODIFY
                | WatchMask::CLOSE_WRITE
                | WatchMask::DONT_FOLLOW
                | WatchMask::MASK_ADD;
            match watches.add(&place, mask) {
                Ok(wd) => {
                    hops.insert((wd, None), Part::File);
                }
                // Gone again.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => refused = refused.or(Some((place, error))),
            }
        }
    }
    (hops, refused)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use futures_util::{FutureExt as _, StreamExt as _};

    use super::*;
    use crate::region::files::table::{CREATION_TIMEOUT, WRITE_TIMEOUT};

    #[test]
    fn lost_events_announce_every_file() {
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name);
        let (watcher, mut changed) = Watcher::new();
        let paths = [place("a"), place("b")];
        for path in &paths {
            fs::write(path, "192.0.2.1/32\n").unwrap();
            watcher.watch(path);
        }
        let limit = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
        let limit: usize = limit.trim().parse().unwrap();
        {
            // Nobody takes events meanwhile.
            let _queue = lock(&watcher.0.as_ref().unwrap().inotify);
            fs::write(place("0"), "").unwrap();
            for i in 0..limit {
                fs::rename(place(&i.to_string()), place(&(i + 1).to_string())).unwrap();
            }
        }
        watcher.progress(&paths[0]);
        let mut next = || changed.next().now_or_never().flatten();
        assert_eq!([next(), next()], paths.map(Some));
        assert_eq!(next(), None);
    }

    #[test]
    fn hard_link_is_complete_after_a_while_and_a_file_that_is_written_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let (watcher, _changed) = Watcher::new();
        let path = folder.path().join("list");
        let later = Instant::now() + 2 * CREATION_TIMEOUT;
        let is_unfinished = |now: Instant| {
            let progress = watcher.progress(&path);
            let table = watcher.0.as_ref().unwrap().table();
            assert_eq!(
                progress.unfinished,
                table.files[&path].is_unfinished(Instant::now())
            );
            table.files[&path].is_unfinished(now)
        };
        watcher.watch(&path);
        fs::write(folder.path().join("other"), "192.0.2.1/32\n").unwrap();
        fs::hard_link(folder.path().join("other"), &path).unwrap();
        watcher.watch(&path);
        assert!(is_unfinished(Instant::now()));
        assert!(!is_unfinished(later));
        let mut file = fs::OpenOptions::new().append(true).open(&path).unwrap();
        io::Write::write_all(&mut file, b"192.0.2.2/32\n").unwrap();
        assert!(is_unfinished(later));
        // Where the kernel reports no writers there is no other end of truncate(2).
        assert!(!is_unfinished(Instant::now() + 2 * WRITE_TIMEOUT));
        drop(file);
        assert!(!is_unfinished(Instant::now()));
    }
}
