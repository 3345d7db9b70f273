//! Translates inotify events into changes of watched files. Asks the kernel for nothing but the removal of watches.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    path::{Path, PathBuf},
    task::Waker,
    time::{Duration, Instant},
};

use inotify::{EventMask, WatchDescriptor, Watches};

/// Time after which a new name without writes is complete although no writer closed it, as a hard link is.
pub(super) const CREATION_TIMEOUT: Duration = Duration::from_mins(1);

/// Time after the last write after which a file is complete although no writer closed it, where the kernel does not
/// report writers: truncate(2) is a write without a writer.
pub(super) const WRITE_TIMEOUT: Duration = Duration::from_mins(10);

/// A name in a watched directory; `None`: the watched file itself.
pub(super) type Hop = (WatchDescriptor, Option<OsString>);

/// Kind of a name on the way to a file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Part {
    /// A directory or a symbolic link.
    Way,
    /// The file, which is made and then written.
    File,
}

/// Which names lead to which files, and what happened to them.
#[derive(Default)]
pub(super) struct Table {
    names: BTreeMap<WatchDescriptor, BTreeMap<Option<OsString>, BTreeMap<PathBuf, Part>>>,
    pub(super) files: BTreeMap<PathBuf, Watched>,
    /// Files to announce.
    pub(super) changed: BTreeSet<PathBuf>,
    pub(super) waker: Option<Waker>,
    /// Threads that add watches which are not among `names` yet.
    pub(super) adding: usize,
}

#[derive(Default)]
pub(super) struct Watched {
    hops: BTreeMap<Hop, Part>,
    pub(super) changes: u64,
    /// Time of the file's last change, if it was not closed since.
    unfinished: BTreeMap<Hop, Instant>,
}

impl Watched {
    pub(super) fn is_unfinished(&self, now: Instant) -> bool {
        let unfinished = |(hop, changed): (&Hop, &Instant)| {
            let limit = match hop {
                (_, None) => WRITE_TIMEOUT,
                (_, Some(_)) => CREATION_TIMEOUT,
            };
            now.duration_since(*changed) < limit
        };
        self.unfinished.iter().any(unfinished)
    }
}

impl Table {
    /// Notes whether a program has a file open for writing, unless more happened than this number of changes.
    pub(super) fn settle(&mut self, path: &Path, changes: u64, has_writer: bool) {
        let Some(file) = self.files.get_mut(path) else {
            return;
        };
        if file.changes != changes {
            return;
        }
        file.unfinished.clear();
        if has_writer {
            let own = file.hops.keys().filter(|(_, name)| name.is_none());
            file.unfinished = own.map(|hop| (hop.clone(), Instant::now())).collect();
            // Announced when it is closed.
            self.changed.remove(path);
        }
    }

    /// Replaces the way to a file.
    pub(super) fn replace(&mut self, path: &Path, hops: BTreeMap<Hop, Part>) {
        let file = self.files.entry(path.to_owned()).or_default();
        for (wd, name) in file.hops.keys() {
            if let Some(files) = self.names.get_mut(wd).and_then(|names| names.get_mut(name)) {
                files.remove(path);
            }
        }
        for ((wd, name), part) in &hops {
            let names = self.names.entry(wd.clone()).or_default();
            let files = names.entry(name.clone()).or_default();
            files.insert(path.to_owned(), *part);
        }
        let is_file = |hop: &Hop| hops.get(hop) == Some(&Part::File);
        file.unfinished.retain(|hop, _| is_file(hop));
        file.hops = hops;
    }

    /// Removes the watches that no file needs. The kernel has one watch a directory: not while another thread may have
    /// added one of them for a file of its own.
    pub(super) fn remove_unused(&mut self, watches: &mut Watches) {
        if self.adding > 0 {
            return;
        }
        self.names.retain(|wd, names| {
            names.retain(|_, files| !files.is_empty());
            if names.is_empty() {
                // Fails where the directory is gone, and the watch with it.
                let _ = watches.remove(wd.clone());
            }
            !names.is_empty()
        });
    }

    pub(super) fn event(&mut self, wd: WatchDescriptor, name: Option<OsString>, mask: EventMask) {
        if mask.contains(EventMask::Q_OVERFLOW) {
            for (path, file) in &mut self.files {
                file.changes += 1;
                // It may have been closed meanwhile.
                file.unfinished.clear();
                self.changed.insert(path.clone());
            }
            return;
        }
        if mask.contains(EventMask::IGNORED) {
            // The directory is gone, or its file system.
            for path in self
                .names
                .remove(&wd)
                .into_iter()
                .flatten()
                .flat_map(|(_, f)| f.into_keys())
            {
                if let Some(file) = self.files.get_mut(&path) {
                    file.changes += 1;
                    file.unfinished.retain(|(other, _), _| *other != wd);
                }
                self.changed.insert(path);
            }
            return;
        }
        let Some(files) = self.names.get(&wd).and_then(|names| names.get(&name)) else {
            return;
        };
        let begins = mask.intersects(EventMask::CREATE | EventMask::MODIFY);
        for (path, part) in files {
            let Some(file) = self.files.get_mut(path) else {
                continue;
            };
            file.changes += 1;
            if *part == Part::File && begins {
                let hop = (wd.clone(), name.clone());
                file.unfinished.insert(hop, Instant::now());
                // Announced when it is closed.
                self.changed.remove(path);
            } else {
                file.unfinished.remove(&(wd.clone(), name.clone()));
                self.changed.insert(path.clone());
            }
        }
    }
}
