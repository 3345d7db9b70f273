//! The policy file: read whole, checked, and described.

use std::{
    fs::File,
    io::Read as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use ring::digest::{SHA256, digest};

use crate::{
    clock::Accepted,
    compile::Compiled,
    policy::{self, Policy},
    refusal::Refusal,
    whole_file,
};

/// Longest policy file, in bytes, as for lists of prefixes. Devices and pipes may have no end.
pub const MAX_LENGTH: u64 = 64 << 20;

/// A policy with the text and file that it came from.
#[derive(Clone, Debug)]
pub struct PolicyFile {
    pub path: PathBuf,
    pub text: String,
    /// SHA-256 of the text, in hexadecimal digits.
    pub hash: String,
    pub policy: Policy,
    pub warnings: Vec<String>,
    /// When the text was there.
    pub accepted: Accepted,
}

impl PolicyFile {
    /// Reads and checks a policy, from a file or a pipe.
    ///
    /// # Errors
    /// A file that cannot be read, or everything wrong with its content, a line each.
    pub fn read(path: &Path) -> Result<Self> {
        let read = || -> Result<String> {
            let mut bytes = Vec::new();
            let file = File::open(path)?;
            let length = file.take(MAX_LENGTH + 1).read_to_end(&mut bytes)?;
            ensure!(
                length as u64 <= MAX_LENGTH,
                "it is longer than {MAX_LENGTH} bytes"
            );
            text(bytes)
        };
        let text = read().with_context(|| format!("read {}", path.display()))?;
        Self::parse(path, text)
    }

    /// Reads and checks the agent's policy file. A pipe is refused: one without a writer would hold up the thread that
    /// reads it for good, and with it every later read of the file.
    ///
    /// # Errors
    /// As `read`, and a file that is not a regular one, or changed while it was read.
    pub fn read_regular(path: &Path) -> Result<Self> {
        Self::parse(path, read_text(path)?)
    }

    /// Checks the text of a policy file. `path` only names it in messages.
    ///
    /// # Errors
    /// Everything wrong with the text, a line each.
    pub fn parse(path: &Path, text: String) -> Result<Self> {
        let accepted = Accepted::now();
        let named = |problem: policy::Problem| format!("{}: {problem}", path.display());
        let (policy, problems) = policy::parse(&text).map_err(|problems| {
            let lines: Vec<String> = problems.into_iter().map(named).collect();
            Refusal::Unprocessable(lines.join("\n"))
        })?;
        Ok(Self {
            path: path.to_owned(),
            hash: hash(&text),
            text,
            policy,
            warnings: problems.into_iter().map(named).collect(),
            accepted,
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

/// The text of the agent's policy file, which is not checked.
///
/// # Errors
/// As `PolicyFile::read_regular`, but for what the text says.
pub fn read_text(path: &Path) -> Result<String> {
    let read = || {
        let mut file = whole_file::open(path)?;
        let before = file.metadata()?;
        text(whole_file::read(&mut file, &before, MAX_LENGTH)?)
    };
    read().with_context(|| format!("read {}", path.display()))
}

/// SHA-256 of a text, in hexadecimal digits.
pub fn hash(text: impl AsRef<[u8]>) -> String {
    let digest = digest(&SHA256, text.as_ref());
    let digits = digest.as_ref().iter().map(|byte| format!("{byte:02x}"));
    digits.collect()
}

/// The text of a policy file, without the byte order mark that Windows editors put in front.
///
/// # Errors
/// Another encoding than UTF-8, with the first line that shows it.
pub fn text(bytes: Vec<u8>) -> Result<String> {
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
        bail!("it is UTF-16 text: save it as UTF-8");
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = before.iter().filter(|&&byte| byte == b'\n').count() + 1;
        anyhow!("line {line} is not UTF-8 text")
    })?;
    Ok(match text.strip_prefix('\u{feff}') {
        Some(text) => text.into(),
        None => text,
    })
}

#[cfg(test)]
mod tests {
    use std::{fs, sync::mpsc::channel, thread, time::Duration};

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;

    /// Fault C11: a mark was "more than one document", and an encoding had no line.
    #[test]
    fn byte_order_mark_is_skipped_and_other_encodings_are_named_with_their_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("policy.yaml");
        let read = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            [PolicyFile::read(&path), PolicyFile::read_regular(&path)]
        };
        for file in read(b"\xef\xbb\xbfdatabases: []\ninterfaces: [eth0]\n") {
            file.unwrap();
        }
        for (bytes, expected) in [
            (
                &b"databases: []\n# caf\xe9\ninterfaces: [eth0]\n"[..],
                "line 2 is not UTF-8 text",
            ),
            (b"\xff\xfed\0", "it is UTF-16 text: save it as UTF-8"),
        ] {
            for file in read(bytes) {
                let error = format!("{:#}", file.unwrap_err());
                assert!(error.ends_with(expected), "{error}");
            }
        }
    }

    /// A pipe without a writer in the file's place held up every later reload.
    #[test]
    fn agent_reads_no_pipe_and_waits_for_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("policy.yaml");
        mkfifo(&path, Mode::S_IRUSR).unwrap();
        let (send, result) = channel();
        let pipe = path.clone();
        thread::spawn(move || send.send(PolicyFile::read_regular(&pipe).map(drop)));
        let read = result.recv_timeout(Duration::from_secs(10));
        let error = format!("{:#}", read.expect("it does not wait").unwrap_err());
        assert!(error.ends_with("it is not a regular file"), "{error}");
        for other in [folder.path(), Path::new("/dev/zero")] {
            let error = format!("{:#}", PolicyFile::read_regular(other).unwrap_err());
            assert!(error.ends_with("it is not a regular file"), "{error}");
        }
        fs::remove_file(&path).unwrap();
        fs::write(&path, "databases: []\ninterfaces: [eth0]\n").unwrap();
        PolicyFile::read_regular(&path).unwrap();
    }
}
