//! The agent in front of PostgreSQL servers, in network namespaces made for the occasion.

mod fleet;
mod network;
mod one_host;
mod remains;
mod servers;

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;

use crate::command_line;

/// Followed by the process id, so that two demos do not meet and a dead one's remains are known.
const PREFIX: &str = "fa-demo-";

/// Limit of every wait for something that must happen, so long that a busy machine does not reach it.
const PATIENCE: Duration = Duration::from_secs(180);

/// How psql ends that got no answer.
const NO_ANSWER: &str = "timeout expired";

/// Shows one host, or a fleet of three with etcd.
pub fn show(agent: &Path, is_fleet: bool) -> Result<()> {
    remains::remove_those_of_the_dead()?;
    let mut demo = Demo::new(agent)?;
    let id = demo.id.clone();
    let directory = demo.directory.clone();
    let shown = match is_fleet {
        true => fleet::play(&mut demo),
        false => one_host::play(&mut demo),
    };
    let interrupted = demo.stop_if_interrupted();
    if shown.is_err() && interrupted.is_ok() {
        demo.print_logs();
    }
    let failures = demo.failures;
    // Stops everything and removes it, whatever happened.
    drop(demo);
    let left = remains::what_is_left(&id, &directory)?;
    interrupted?;
    shown?;

    heading("What is left of it");
    ensure!(left.is_empty(), "left behind: {}", left.join(", "));
    println!("  no namespace, no mount, no file, no process");
    ensure!(failures == 0, "{failures} of the expectations did not hold");
    println!("\nEverything was as expected.");
    Ok(())
}

fn heading(text: &str) {
    println!("\n== {text}");
}

/// Makes a directory, whatever the umask: PostgreSQL runs as a user of its own and must get to its data in it.
fn make_directory(path: &Path) -> Result<()> {
    fs::create_dir(path).with_context(|| format!("create {}", path.display()))?;
    fs::set_permissions(path, Permissions::from_mode(0o755))
        .with_context(|| format!("open {} to all", path.display()))
}

struct Demo {
    id: String,
    directory: PathBuf,
    agent: PathBuf,
    postgresql: PathBuf,
    /// The servers, in the order in which they were started.
    children: Vec<Child>,
    interrupted: Arc<AtomicBool>,
    failures: u32,
}

impl Demo {
    fn new(agent: &Path) -> Result<Demo> {
        let interrupted = Arc::new(AtomicBool::new(false));
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            signal_hook::flag::register(signal as i32, interrupted.clone())
                .context("listen for signals")?;
        }
        let id = format!("{PREFIX}{}", std::process::id());
        let directory = std::env::temp_dir().join(&id);
        let postgresql = servers::postgresql_directory()?;
        make_directory(&directory)?;
        Ok(Demo {
            id,
            directory,
            agent: agent.to_owned(),
            postgresql,
            children: Vec::new(),
            interrupted,
            failures: 0,
        })
    }

    fn expect(&mut self, holds: bool, what: &str) {
        if !holds {
            println!("  FAILED: expected that {what}");
            self.failures += 1;
        }
    }

    fn stop_if_interrupted(&self) -> Result<()> {
        ensure!(!self.interrupted.load(Ordering::Relaxed), "interrupted");
        Ok(())
    }

    fn wait_until(&self, what: &str, holds: impl Fn() -> Result<bool>) -> Result<()> {
        let begin = Instant::now();
        loop {
            self.stop_if_interrupted()?;
            if holds()? {
                return Ok(());
            }
            ensure!(begin.elapsed() < PATIENCE, "waited in vain until {what}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Runs a command, prints what it prints, and expects how it exits. `line`: the command as a person types it.
    fn show(
        &mut self,
        at: &str,
        line: &str,
        command: &mut Command,
        expected: i32,
    ) -> Result<String> {
        self.stop_if_interrupted()?;
        println!("{at}$ {line}");
        let output = self.finish(command)?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        print!("{text}");
        let found = output.status.code();
        let what = format!("it exits with {expected}, not {found:?}");
        self.expect(found == Some(expected), &what);
        Ok(text)
    }

    /// Runs a command that prints less than a pipe holds. It is ended with the demo, or where it hangs.
    fn finish(&self, command: &mut Command) -> Result<Output> {
        let line = command_line(command);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().with_context(|| format!("start `{line}`"))?;
        self.wait_for(child)
            .with_context(|| format!("wait for `{line}`"))
    }

    fn wait_for(&self, mut child: Child) -> Result<Output> {
        let begin = Instant::now();
        while child.try_wait()?.is_none() {
            if self.stop_if_interrupted().is_err() || begin.elapsed() > 2 * PATIENCE {
                child.kill()?;
                child.wait()?;
                self.stop_if_interrupted()?;
                bail!("it hangs");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        // Ctrl-C ends the command as well: what it printed then is not what it would have.
        self.stop_if_interrupted()?;
        Ok(child.wait_with_output()?)
    }

    /// The end of what each server said.
    fn print_logs(&self) {
        for entry in fs::read_dir(&self.directory)
            .into_iter()
            .flatten()
            .flatten()
        {
            let path = entry.path();
            if path.extension().is_some_and(|extension| extension == "log") {
                let log = fs::read_to_string(&path).unwrap_or_default();
                let lines: Vec<&str> = log.lines().collect();
                eprintln!("\n{}:", path.display());
                for line in &lines[lines.len().saturating_sub(20)..] {
                    eprintln!("  {line}");
                }
            }
        }
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        if let Err(error) = remains::remove(&self.id, &self.directory) {
            eprintln!("clean up: {error:#}");
        }
        for child in &mut self.children {
            // Its end was seen to already; this is only for the kernel's process table.
            let _ = child.try_wait();
        }
    }
}
