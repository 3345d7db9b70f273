//! Files of prefixes, and the announcement of their changes.

use std::{
    fs::{self, Metadata},
    os::unix::fs::MetadataExt as _,
    path::Path,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use inotify::{WatchMask, Watches};

use crate::region::{
    answer::{Answer, Found, Stamp, Version},
    lists,
};

/// Longest file of prefixes, in bytes.
const MAX_FILE: u64 = 64 << 20;

/// Has changes of the file announced, whether it is written, replaced, or behind a symbolic link that
/// is replaced: all are changes of a directory.
pub(super) fn watch(path: &Path, watches: &Watches) -> Result<()> {
    let changes = WatchMask::CLOSE_WRITE
        | WatchMask::CREATE
        | WatchMask::DELETE
        | WatchMask::MOVE
        | WatchMask::DELETE_SELF
        | WatchMask::MOVE_SELF;
    let target = fs::canonicalize(path)?;
    for path in [path, &target] {
        let directory = path.parent().context("find the directory")?;
        watches.clone().add(directory, changes)?;
    }
    Ok(())
}

pub(super) fn read(path: &Path, before: Option<&Version>) -> Result<Answer> {
    let metadata = fs::metadata(path).with_context(|| format!("read {}", path.display()))?;
    // From before it is read: a change in between is seen next time.
    let version = stamp(path, &metadata).map(Version::File);
    if version.is_some() && before == version.as_ref() {
        return Ok(Answer::Unchanged { ask_again: None });
    }
    ensure!(metadata.is_file(), "read {}: it is no file", path.display());
    ensure!(
        metadata.len() <= MAX_FILE,
        "read {}: it has {} bytes; at most {MAX_FILE}",
        path.display(),
        metadata.len()
    );
    let body = fs::read(path).with_context(|| format!("read {}", path.display()))?;
    let prefixes = lists::read_file(&body).with_context(|| format!("read {}", path.display()))?;
    Ok(Answer::Found(Found {
        prefixes,
        version,
        ..Found::default()
    }))
}

/// The version of a file's content. `None` for a file so new that another change may leave the same time:
/// file systems keep it no finer than the kernel's tick.
fn stamp(path: &Path, metadata: &Metadata) -> Option<Stamp> {
    let modified = metadata.modified().ok()?;
    let age = SystemTime::now().duration_since(modified).ok()?;
    (age > Duration::from_secs(1)).then(|| Stamp {
        path: path.to_owned(),
        device: metadata.dev(),
        inode: metadata.ino(),
        length: metadata.len(),
        modified,
    })
}
