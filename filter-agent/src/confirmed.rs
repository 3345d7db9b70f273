//! The confirmed policy on disk: the text that was in force last, for a start at which the file cannot be
//! enforced, and the interfaces that it stood for, for a boot at which no route is there yet.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::{
    host::coverage::Remembered,
    kept::{read_file, seal, unseal, write_file},
};

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Confirmed {
    /// The text of the policy file.
    pub policy: String,
    pub interfaces: Remembered,
}

pub fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("confirmed.json")
}

/// The confirmed policy; `None`: none is kept.
///
/// # Errors
/// A file that cannot be read or is not ours, with its path.
pub fn read(state_dir: &Path) -> Result<Option<Confirmed>> {
    read_file(&path(state_dir), unseal)
}

/// # Errors
/// A write that failed; the file is then unchanged.
pub fn write(state_dir: &Path, confirmed: &Confirmed) -> Result<()> {
    write_file(state_dir, &path(state_dir), &seal(confirmed)?)
}

/// Removes what is kept, if anything is.
///
/// # Errors
/// A file that stays: the next start could enforce it.
pub fn remove(state_dir: &Path) -> Result<()> {
    let path = path(state_dir);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| {
                format!(
                    "remove {}, which the next start would enforce",
                    path.display()
                )
            })
        }
        _ => Ok(()),
    }
}
