//! Reads regular files whole, or not at all.

use std::{
    fs::{self, File, Metadata, OpenOptions},
    io::Read as _,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::Path,
};

use anyhow::{Result, ensure};
use nix::fcntl::OFlag;

/// Opens a regular file.
///
/// # Errors
/// It cannot be opened, or is of another kind: opening a pipe would wait for its writer, and opening a device can have
/// effects.
pub fn open(path: &Path) -> Result<File> {
    let ensure_regular = |metadata: Metadata| {
        ensure!(metadata.is_file(), "it is not a regular file");
        Ok(())
    };
    ensure_regular(fs::metadata(path)?)?;
    // A pipe may have taken its place meanwhile.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(path)?;
    ensure_regular(file.metadata()?)?;
    Ok(file)
}

/// Reads a file, of at most so many bytes. `before`: its properties when the look at it began.
///
/// # Errors
/// It cannot be read, is longer, or changed meanwhile: a file of another host, by a network file system, does so without
/// an announcement.
pub fn read(file: &mut File, before: &Metadata, most: u64) -> Result<Vec<u8>> {
    let mut content = Vec::new();
    file.take(most + 1).read_to_end(&mut content)?;
    ensure!(
        content.len() as u64 <= most,
        "it is longer than {most} bytes"
    );
    let after = file.metadata()?;
    let state = |metadata: &Metadata| (metadata.ino(), metadata.len(), metadata.modified().ok());
    ensure!(
        state(before) == state(&after) && after.len() == content.len() as u64,
        "it changed while it was read"
    );
    Ok(content)
}
