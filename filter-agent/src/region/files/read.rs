//! Reads a region's file.

use std::{
    fmt,
    fs::{self, Metadata},
    os::unix::fs::MetadataExt as _,
    path::Path,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};

use crate::{
    policy::spelled,
    region::{
        answer::{Answer, Found, Stamp, Version},
        files::{
            watch::{Progress, Watcher},
            writers::has_writer,
        },
        lists,
    },
    threads, whole_file,
};

/// Longest file of prefixes, in bytes.
const MAX_FILE: u64 = 64 << 20;

/// Reads of a file that changes meanwhile, one after the other.
const MAX_ATTEMPTS: usize = 3;

/// The error of a file that is not read because it may be half written. A set that is known stays.
#[derive(Clone, Copy, Debug)]
pub struct StillWritten;

impl fmt::Display for StillWritten {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a program is still writing it")
    }
}

impl std::error::Error for StillWritten {}

/// Reads a file of prefixes, and has its changes announced from before it is read. `before`: the version that is
/// known.
///
/// # Errors
/// The file cannot be read in time, a program is still writing it, or it is not a list of prefixes.
pub(in crate::region) async fn read(
    path: &Path,
    limit: Duration,
    before: Option<&Version>,
    watcher: Option<&Watcher>,
) -> Result<Answer> {
    let job = {
        let (path, before, watcher) = (path.to_owned(), before.cloned(), watcher.cloned());
        move || read_now(&path, before.as_ref(), watcher.as_ref())
    };
    let answer = tokio::time::timeout(limit, threads::run(&threads::REGION_FILES, path, job)).await;
    let answer = answer.unwrap_or_else(|_| Err(anyhow!("no answer within {}", spelled(limit))));
    answer.with_context(|| format!("read {}", path.display()))
}

/// Blocks for as long as the file system does.
fn read_now(path: &Path, before: Option<&Version>, watcher: Option<&Watcher>) -> Result<Answer> {
    for _ in 0..MAX_ATTEMPTS {
        let begun = watcher.map(|watcher| watcher.watch(path));
        let answer = read_once(path, before);
        let Some((watcher, begun)) = watcher.zip(begun) else {
            return answer;
        };
        let Progress {
            changes,
            unfinished,
        } = watcher.progress(path);
        // Events report neither writers from before the watch nor the end of truncate(2).
        if begun.is_new || unfinished {
            let file = whole_file::open(path).ok();
            if let Some(has_writer) = file.as_ref().and_then(has_writer) {
                watcher.settle(path, changes, has_writer);
                ensure!(!has_writer, StillWritten);
            }
        }
        let progress = watcher.progress(path);
        ensure!(!progress.unfinished, StillWritten);
        if begun.changes == progress.changes {
            return answer;
        }
    }
    bail!("it changed while it was read, {MAX_ATTEMPTS} times");
}

fn read_once(path: &Path, before: Option<&Version>) -> Result<Answer> {
    let metadata = fs::metadata(path)?;
    let version = stamp(path, &metadata).map(Version::File);
    if version.is_some() && before == version.as_ref() {
        return Ok(Answer::Unchanged { ask_again: None });
    }
    let body = whole_file::read(&mut whole_file::open(path)?, &metadata, MAX_FILE)?;
    Ok(Answer::Found(Found {
        version,
        ..Found::of(lists::read_file(&body)?)
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
