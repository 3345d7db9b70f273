//! Last good sets of regions on disk, and how any file of the state directory is written and read: whole or
//! not at all, and believed only if it is this agent's own.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::value::RawValue;

use crate::{policy::RegionSource, region::state::Set};

/// Longest file that is read, in bytes: a hundred for each of a million prefixes.
const MAX_FILE: u64 = 100 << 20;

/// The text of a record, and a sum that tells whether it is still what was written.
#[derive(Deserialize, Serialize)]
struct Sealed<'a> {
    crc32: u32,
    #[serde(borrow)]
    kept: &'a RawValue,
}

#[derive(Deserialize, Serialize)]
struct Kept<T, S> {
    region: T,
    /// As the policy had it: the set of another source is not this region's.
    source: T,
    set: S,
}

/// A record with its checksum, as JSON.
pub fn seal<T: Serialize>(record: &T) -> Result<Vec<u8>> {
    let kept = serde_json::value::to_raw_value(record).context("write a record as JSON")?;
    let sealed = Sealed {
        crc32: crc32fast::hash(kept.get().as_bytes()),
        kept: &kept,
    };
    serde_json::to_vec(&sealed).context("write a record as JSON")
}

/// # Errors
/// A text that is not what `seal` made of such a record.
pub fn unseal<T: DeserializeOwned>(text: &[u8]) -> Result<T> {
    let sealed: Sealed<'_> = serde_json::from_slice(text).context("it is damaged")?;
    let sum = crc32fast::hash(sealed.kept.get().as_bytes());
    ensure!(sum == sealed.crc32, "it is damaged: its checksum differs");
    serde_json::from_str(sealed.kept.get()).context("it is of another version")
}

/// The file's text.
///
/// # Errors
/// What serde_json refuses; there is nothing in a set that it would.
pub fn encode(name: &str, source: &RegionSource, set: &Set) -> Result<Vec<u8>> {
    let source = serde_json::to_string(source).context("write the source as JSON")?;
    seal(&Kept {
        region: name,
        source: source.as_str(),
        set,
    })
}

/// # Errors
/// Why the text is not what `encode` made for this region and source.
pub fn decode(text: &[u8], name: &str, source: &RegionSource) -> Result<Set> {
    let kept: Kept<String, Set> = unseal(text)?;
    ensure!(kept.region == name, "it is of region {}", kept.region);
    let source = serde_json::to_string(source).context("write the source as JSON")?;
    ensure!(
        kept.source == source,
        "it is of another source: {}",
        kept.source
    );
    Ok(kept.set)
}

fn path(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("{name}.json"))
}

/// The set that was kept of a region; `None`: none was.
///
/// # Errors
/// What is wrong with it, with its path.
pub fn read(directory: &Path, name: &str, source: &RegionSource) -> Result<Option<Set>> {
    read_file(&path(directory, name), |text| decode(text, name, source))
}

/// A file of the state directory; `None`: there is none.
///
/// # Errors
/// A file that others could have written, or that `decode` refuses, with its path.
pub fn read_file<T>(path: &Path, decode: impl FnOnce(&[u8]) -> Result<T>) -> Result<Option<T>> {
    let metadata = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        metadata => metadata.with_context(|| format!("read {}", path.display()))?,
    };
    let own = nix::unistd::geteuid().as_raw();
    let record = || {
        ensure!(metadata.is_file(), "it is not a regular file");
        let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
        if owner != own || mode & 0o022 != 0 {
            bail!("others could have written it (owner {owner}, mode {mode:o})");
        }
        ensure!(metadata.len() <= MAX_FILE, "it is too long");
        decode(&fs::read(path)?)
    };
    let record = record().with_context(|| format!("{} is ignored", path.display()))?;
    Ok(Some(record))
}

/// # Errors
/// What kept the set from reaching the disk; the file is then what it was.
pub fn write(directory: &Path, name: &str, source: &RegionSource, set: &Set) -> Result<()> {
    let text = encode(name, source, set)?;
    write_file(directory, &path(directory, name), &text)
}

/// Writes a file of the state directory, mode 0600.
///
/// # Errors
/// What kept the text from reaching the disk; the file is then what it was.
pub fn write_file(directory: &Path, path: &Path, text: &[u8]) -> Result<()> {
    let written = || -> Result<()> {
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(directory)?;
        let mut file = tempfile::NamedTempFile::new_in(directory)?;
        file.write_all(text)?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        // The name too has to outlast a crash of the host.
        fs::File::open(directory)?.sync_all()?;
        Ok(())
    };
    written().with_context(|| format!("write {}", path.display()))
}

/// Removes what writes that were cut off left in a directory. Only while nothing is being written there.
///
/// # Errors
/// The first file that stays, and why.
pub fn remove_unfinished(directory: &Path) -> Result<()> {
    let files = match fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        files => files.with_context(|| format!("list {}", directory.display()))?,
    };
    for file in files {
        let file = file.with_context(|| format!("list {}", directory.display()))?;
        if file.file_name().to_string_lossy().starts_with(".tmp") {
            let path = file.path();
            fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// Removes what was kept of every region but these.
///
/// # Errors
/// The first file that stays, and why.
pub fn keep_only(directory: &Path, names: impl Fn(&str) -> bool) -> Result<()> {
    let files = match fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        files => files.with_context(|| format!("list {}", directory.display()))?,
    };
    for file in files {
        let path = file
            .with_context(|| format!("list {}", directory.display()))?
            .path();
        let name = path.file_stem().and_then(|stem| stem.to_str());
        let json = path
            .extension()
            .is_some_and(|extension| extension == "json");
        // Also what a write that was cut off left behind.
        let temporary = name.is_some_and(|name| name.starts_with(".tmp"));
        if temporary || json && !name.is_some_and(&names) {
            fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
        }
    }
    Ok(())
}
