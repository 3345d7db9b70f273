//! Last good sets on disk: written whole or not at all, and believed only if they are this agent's own.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::{policy::RegionSource, region::Set};

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

/// The file's text.
///
/// # Errors
/// What serde_json refuses; there is nothing in a set that it would.
pub fn encode(name: &str, source: &RegionSource, set: &Set) -> Result<Vec<u8>> {
    let source = serde_json::to_string(source).context("write the source as JSON")?;
    let kept = Kept {
        region: name,
        source: source.as_str(),
        set,
    };
    let kept = serde_json::value::to_raw_value(&kept).context("write a set as JSON")?;
    let sealed = Sealed {
        crc32: crc32fast::hash(kept.get().as_bytes()),
        kept: &kept,
    };
    serde_json::to_vec(&sealed).context("write a set as JSON")
}

/// # Errors
/// Why the text is not what `encode` made for this region and source.
pub fn decode(text: &[u8], name: &str, source: &RegionSource) -> Result<Set> {
    let sealed: Sealed<'_> = serde_json::from_slice(text).context("it is damaged")?;
    let sum = crc32fast::hash(sealed.kept.get().as_bytes());
    ensure!(sum == sealed.crc32, "it is damaged: its checksum differs");
    let kept: Kept<String, Set> =
        serde_json::from_str(sealed.kept.get()).context("it is of another version")?;
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
    let path = path(directory, name);
    let metadata = match fs::symlink_metadata(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        metadata => metadata.with_context(|| format!("read {}", path.display()))?,
    };
    let own = nix::unistd::geteuid().as_raw();
    let set = || {
        ensure!(metadata.is_file(), "it is no file");
        let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
        if owner != own || mode & 0o022 != 0 {
            bail!("others could have written it (owner {owner}, mode {mode:o})");
        }
        ensure!(metadata.len() <= MAX_FILE, "it is too long");
        decode(&fs::read(&path)?, name, source)
    };
    let set = set().with_context(|| format!("{} is ignored", path.display()))?;
    Ok(Some(set))
}

/// # Errors
/// What kept the set from reaching the disk; the file is then what it was.
pub fn write(directory: &Path, name: &str, source: &RegionSource, set: &Set) -> Result<()> {
    let path = path(directory, name);
    let written = || -> Result<()> {
        let text = encode(name, source, set)?;
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(directory)?;
        let mut file = tempfile::NamedTempFile::new_in(directory)?;
        file.write_all(&text)?;
        file.as_file().sync_all()?;
        file.persist(&path)?;
        // The name too has to outlast a crash of the host.
        fs::File::open(directory)?.sync_all()?;
        Ok(())
    };
    written().with_context(|| format!("write {}", path.display()))
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
