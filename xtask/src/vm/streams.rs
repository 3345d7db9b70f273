//! The tests of forced TLS against crafted segments, on the machine's kernel: what is judged there depends on what the
//! kernel tells of its sockets, and on what its verifier accepts.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::machine::Machine;
use crate::dist::Profile;
use crate::{cargo, output};

/// Where they are in the machine.
const FOLDER: &str = "root/streams";

/// They take 45 seconds where the machine's processors are this host's.
const LIMIT: Duration = Duration::from_mins(90);
const INTERVAL: Duration = Duration::from_secs(10);

/// The tests and the agent that they run, built.
pub struct Streams {
    test: PathBuf,
    agent: PathBuf,
}

impl Streams {
    /// Builds the tests. The agent is the package's, which has been built: an emulated processor takes many times longer to
    /// start one that is not optimized.
    pub fn build(profile: Profile) -> Result<Self> {
        let messages = output(
            cargo()
                .args(["test", "--package", "filter-tests", "--test", "streams"])
                .args(["--no-run", "--message-format", "json"]),
        )?;
        let mut messages = messages.lines().filter_map(|line| {
            let message: serde_json::Value = serde_json::from_str(line).ok()?;
            let is_test = message["target"]["name"] == "streams";
            Some(message["executable"].as_str().filter(|_| is_test)?.into())
        });
        Ok(Self {
            test: messages.next().context("find the tests that cargo built")?,
            agent: profile.binary()?,
        })
    }

    /// Copies them into the machine's image.
    pub fn put(&self, root: &Path) -> Result<()> {
        let folder = root.join(FOLDER);
        fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        for (from, name) in [(&self.test, "test"), (&self.agent, "filter-agent")] {
            fs::copy(from, folder.join(name))
                .with_context(|| format!("copy {}", from.display()))?;
        }
        Ok(())
    }

    /// Runs them. Returns the line that sums them up.
    ///
    /// # Errors
    /// One fails, or they have not ended after `LIMIT`.
    pub fn run(&self, machine: &mut Machine) -> Result<String> {
        // In the background: the machine's shell waits for no command as long as these may take.
        machine.command(&format!(
            "cd /{FOLDER} && (FILTER_TESTS_AGENT=/{FOLDER}/filter-agent ./test --test-threads 2 > log 2>&1; \
             echo ended >> log) < /dev/null > /dev/null 2>&1 &"
        ))?;
        let deadline = Instant::now() + LIMIT;
        loop {
            thread::sleep(INTERVAL);
            let printed = machine.command(&format!("tail -150 /{FOLDER}/log"))?;
            let mut lines = printed.lines();
            if let Some(line) = lines.find(|line| line.starts_with("test result: ok.")) {
                return Ok(line.into());
            }
            if printed.ends_with("ended") {
                bail!("the tests of forced TLS fail in the machine:\n{printed}");
            }
            ensure!(
                Instant::now() < deadline,
                "the tests of forced TLS have not ended after {LIMIT:?}:\n{printed}"
            );
        }
    }
}
