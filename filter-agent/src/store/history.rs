//! The records of the history. Texts of policies have files of their own, named by their hashes: a change of a temporary rule
//! rewrites none of them. The id of the last change is written in place: a full disk takes that, and no id is given twice.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs::{self, OpenOptions},
    io,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp;

use super::{files, patient_lock, read, remove, seal, unseal, write_file};
use crate::{
    history::{History, Past, What},
    policy_file,
    report::By,
};

/// Length of the file of the last id, in bytes: twenty digits, a space, a checksum, a line feed.
const CHANGE_ID_LENGTH: usize = 30;

pub fn change_id_path(directory: &Path) -> PathBuf {
    directory.join("change-id")
}

pub fn history_path(directory: &Path) -> PathBuf {
    directory.join("history.json")
}

pub fn changes_path(directory: &Path) -> PathBuf {
    directory.join("changes.json")
}

pub(super) fn texts_path(directory: &Path) -> PathBuf {
    directory.join("policies")
}

pub(super) fn text_path(directory: &Path, hash: &str) -> PathBuf {
    texts_path(directory).join(format!("{hash}.yaml"))
}

/// The history as it is on disk.
#[derive(Debug, Default)]
pub struct Kept {
    pub history: History,
    /// The last id; `None`: it is not there, or cannot be read.
    pub change_id: Option<u64>,
    /// Records that cannot be read, and why.
    pub unreadable: Vec<(PathBuf, anyhow::Error)>,
}

/// Reads what is there: a record that cannot be read takes nothing from the others.
pub fn read_history(directory: &Path) -> Kept {
    let mut unreadable = Vec::new();
    let change_id = taken(
        &change_id_path(directory),
        decode_change_id,
        &mut unreadable,
    );
    let policies = taken(&history_path(directory), decode_changes, &mut unreadable);
    let others = taken(&changes_path(directory), decode_changes, &mut unreadable);
    let (policies, others) = (policies.unwrap_or_default(), others.unwrap_or_default());
    let mut texts = BTreeMap::new();
    for past in &policies {
        let What::Policy(policy) = &past.what else {
            continue;
        };
        let hash = &policy.hash;
        let decode = |text: &[u8]| decode_text(text, hash);
        if let Some(text) = taken(&text_path(directory, hash), decode, &mut unreadable) {
            texts.insert(hash.clone(), text);
        }
    }
    Kept {
        history: History::restore(change_id.unwrap_or_default(), policies, others, texts),
        change_id,
        unreadable,
    }
}

/// The content of a record; `None`: there is none, or it cannot be read.
fn taken<T>(
    path: &Path,
    decode: impl FnOnce(&[u8]) -> Result<T>,
    unreadable: &mut Vec<(PathBuf, anyhow::Error)>,
) -> Option<T> {
    match read(path, decode) {
        Ok(record) => record,
        Err(error) => {
            unreadable.push((path.to_owned(), error));
            None
        }
    }
}

/// Moves a record out of the way, for whoever wants to look at it. Returns its new path.
///
/// # Errors
/// It stays, and the next version takes its place.
pub fn set_aside(path: &Path) -> Result<PathBuf> {
    let mut name = path.as_os_str().to_owned();
    name.push(".damaged");
    let aside = PathBuf::from(name);
    fs::rename(path, &aside).with_context(|| format!("move {}", path.display()))?;
    Ok(aside)
}

/// # Errors
/// A text that is not what was written of the last id.
pub fn decode_change_id(text: &[u8]) -> Result<u64> {
    let text = std::str::from_utf8(text).context("it is damaged")?;
    let (id, _) = text.split_once(' ').context("it is damaged")?;
    let id = id.parse().context("it is damaged")?;
    ensure!(
        encode_change_id(id) == text,
        "it is damaged: its checksum differs"
    );
    Ok(id)
}

fn encode_change_id(id: u64) -> String {
    let digits = format!("{id:020}");
    let sum = crc32fast::hash(digits.as_bytes());
    format!("{digits} {sum:08x}\n")
}

/// # Errors
/// A text that is not what was written of changes.
pub fn decode_changes(text: &[u8]) -> Result<VecDeque<Past>> {
    unseal(text)
}

fn decode_text(text: &[u8], hash: &str) -> Result<Arc<str>> {
    let text = std::str::from_utf8(text).context("it is damaged")?;
    ensure!(
        policy_file::hash(text) == hash,
        "it is damaged: its checksum differs"
    );
    Ok(text.into())
}

pub(super) fn write_change_id(directory: &Path, id: u64) -> Result<()> {
    let (path, text) = (change_id_path(directory), encode_change_id(id));
    match overwrite(&path, text.as_bytes()) {
        // It is not there yet, or not as it should be.
        Ok(false) => write_file(directory, &path, text.as_bytes()),
        Ok(true) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("write {}", path.display())),
    }
}

/// Overwrites a file of the same length in place, which takes no room on the disk. Returns whether there is such a file.
fn overwrite(path: &Path, text: &[u8]) -> io::Result<bool> {
    let mut options = OpenOptions::new();
    let flags = nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK;
    let file = match options.write(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(_) => return Ok(false),
    };
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.len() != text.len() as u64 {
        return Ok(false);
    }
    debug_assert_eq!(text.len(), CHANGE_ID_LENGTH);
    file.write_all_at(text, 0)?;
    file.sync_data()?;
    Ok(true)
}

pub(super) fn write_changes(directory: &Path, path: &Path, changes: &VecDeque<Past>) -> Result<()> {
    write_file(directory, path, &seal(changes)?)
}

pub(super) fn write_text(directory: &Path, hash: &str, text: &str) -> Result<()> {
    write_file(
        &texts_path(directory),
        &text_path(directory, hash),
        text.as_bytes(),
    )
}

/// Removes the texts of other policies.
pub(super) fn keep_texts(directory: &Path, hashes: &BTreeSet<String>) -> Result<()> {
    for path in files(&texts_path(directory))? {
        let name = path.file_stem().and_then(|stem| stem.to_str());
        let is_text = path.extension().is_some_and(|end| end == "yaml");
        if is_text && !name.is_some_and(|name| hashes.contains(name)) {
            remove(&path).with_context(|| format!("remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// Notes a detach without an agent.
///
/// # Errors
/// It is not noted.
pub fn note_detached(directory: &Path, at: Timestamp, by: By) -> Result<()> {
    let exists = directory.try_exists();
    if !exists.with_context(|| format!("examine {}", directory.display()))? {
        return Ok(());
    }
    let _lock = patient_lock(directory)?;
    let Kept {
        mut history,
        unreadable,
        ..
    } = read_history(directory);
    for (path, _) in unreadable {
        set_aside(&path)?;
    }
    history.detached(at, Some(by));
    write_change_id(directory, history.last_id())?;
    write_changes(directory, &changes_path(directory), history.others())
}
