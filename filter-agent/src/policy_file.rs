//! The policy file: read whole, checked, and described.

use std::{
    fs,
    io::Read as _,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use jiff::Timestamp;

use crate::{
    compile::Compiled,
    policy::{self, Policy},
};

/// Longest policy file, in bytes, as for lists of prefixes. Devices and pipes may have no end.
pub const MAX_LENGTH: u64 = 64 << 20;

/// A policy with the text and file that it came from.
#[derive(Clone, Debug)]
pub struct PolicyFile {
    pub path: PathBuf,
    pub text: String,
    pub policy: Policy,
    pub warnings: Vec<String>,
    /// When the text was there.
    pub accepted: Timestamp,
    pub since: Instant,
}

impl PolicyFile {
    /// Reads and checks a policy file.
    ///
    /// # Errors
    /// A file that cannot be read, or everything wrong with its content, a line each.
    pub fn read(path: &Path) -> Result<Self> {
        let read = || -> Result<String> {
            let mut text = String::new();
            let length = fs::File::open(path)?
                .take(MAX_LENGTH + 1)
                .read_to_string(&mut text)?;
            ensure!(
                length as u64 <= MAX_LENGTH,
                "it is longer than {MAX_LENGTH} bytes"
            );
            Ok(text)
        };
        let text = read().with_context(|| format!("read {}", path.display()))?;
        Self::parse(path, text)
    }

    /// Checks the text of a policy file. `path` only names it in messages.
    ///
    /// # Errors
    /// Everything wrong with the text, a line each.
    pub fn parse(path: &Path, text: String) -> Result<Self> {
        let accepted = Timestamp::now();
        let since = Instant::now();
        let named = |problem: policy::Problem| format!("{}: {problem}", path.display());
        let (policy, problems) = policy::parse(&text).map_err(|problems| {
            let lines: Vec<String> = problems.into_iter().map(named).collect();
            anyhow!(lines.join("\n"))
        })?;
        Ok(Self {
            path: path.to_owned(),
            text,
            policy,
            warnings: problems.into_iter().map(named).collect(),
            accepted,
            since,
        })
    }

    /// Warnings of the policy and its regions that hold on every host.
    pub fn warnings(&self, compiled: &Compiled) -> Vec<String> {
        self.warnings
            .iter()
            .chain(&compiled.warnings)
            .cloned()
            .collect()
    }
}
