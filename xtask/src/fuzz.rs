//! Builds the fuzz targets of `tests/fuzz` with the instrumentation that libFuzzer needs, and runs them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::thread;

use anyhow::{Context as _, Result, anyhow, bail, ensure};

use crate::{cargo, command_line, run, target_directory};

/// A program of `tests/fuzz`.
struct Target {
    name: &'static str,
    /// Runs that take a few seconds.
    runs: u64,
    /// Longest input, in bytes.
    longest: usize,
}

const fn target(name: &'static str, runs: u64, longest: usize) -> Target {
    Target {
        name,
        runs,
        longest,
    }
}

const TARGETS: [Target; 7] = [
    target("control", 10_000, 1024),
    target("dns", 30_000, 2048),
    target("http", 30_000, 1024),
    target("kept", 60_000, 2048),
    target("list", 30_000, 4096),
    target("policy", 15_000, 4096),
    target("region-file", 60_000, 2048),
];

/// Longest run of one input, in seconds: far more than any takes, so that only a hang is a fault.
const INPUT_TIMEOUT: u32 = 60;

/// Runs within which a planted fault is found, as a multiple of the usual ones.
const PLANTED_RUNS: u64 = 10;

/// How long each target runs.
#[derive(Clone, Copy)]
pub enum Length {
    /// Its own number of runs, times this.
    Usual(u64),
    Runs(u64),
    /// Wall time.
    Seconds(u64),
}

pub fn names() -> impl Iterator<Item = &'static str> {
    TARGETS.iter().map(|target| target.name)
}

/// Builds and runs one target or all.
///
/// # Errors
/// A fault that was found, with the input and the command that runs it again.
pub fn run_targets(name: Option<&str>, length: Length) -> Result<()> {
    let programs = build(&[])?;
    each(name, |target| {
        let end = programs.run(target, length)?;
        match end.input {
            None => Ok(end.summary),
            Some(input) => bail!(
                "fuzz target {}: {}\nto run it again: cargo xtask fuzz {} --input {}",
                target.name,
                end.summary,
                target.name,
                input.display()
            ),
        }
    })
}

/// Shows that each target finds a fault: builds them with one in each, and fails if one is not found.
pub fn find_planted(name: Option<&str>) -> Result<()> {
    let programs = build(&["--features", "planted"])?;
    each(name, |target| {
        let end = programs.run(target, Length::Usual(PLANTED_RUNS))?;
        let found = end.input.is_some() && end.log.contains("planted fault");
        ensure!(
            found,
            "fuzz target {}: the planted fault was not found: {}",
            target.name,
            end.summary
        );
        Ok(format!("planted fault found: {}", end.summary))
    })
}

/// Runs a target with one input, on our own terminal.
pub fn run_input(name: &str, input: &Path) -> Result<()> {
    let programs = build(&[])?;
    run(Command::new(programs.folder.join(name)).arg(input))
}

/// The programs, built.
struct Programs {
    folder: PathBuf,
    /// The folder of what they find.
    output: PathBuf,
}

/// The end of a target's run.
struct End {
    log: String,
    /// The input that a fault was found with.
    input: Option<PathBuf>,
    /// One line.
    summary: String,
}

/// Builds every target, without cargo-fuzz: its flags, but for the sanitizer, which needs a nightly toolchain. The parsers
/// are safe code.
fn build(features: &[&str]) -> Result<Programs> {
    let flags = [
        "-Cpasses=sancov-module",
        "-Cllvm-args=-sanitizer-coverage-level=4",
        "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
        "-Cllvm-args=-sanitizer-coverage-pc-table",
        "-Cllvm-args=-sanitizer-coverage-trace-compares",
    ];
    let host = host()?;
    // Named even though it is this host's: the flags are not for build scripts then.
    run(cargo()
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .args(["build", "--quiet", "--package", "filter-fuzz", "--bins"])
        .args(["--profile", "fuzz", "--target", &host])
        .args(features))?;
    let target = target_directory()?;
    Ok(Programs {
        folder: target.join(host).join("fuzz"),
        output: target.join("fuzzing"),
    })
}

/// The target triple that rustc builds for by default.
fn host() -> Result<String> {
    let version = crate::output(Command::new("rustc").arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host
        .context("find the host in what `rustc -vV` prints")?
        .into())
}

impl Programs {
    fn run(&self, target: &Target, length: Length) -> Result<End> {
        let output = self.output.join(target.name);
        let found = output.join("corpus");
        if !matches!(length, Length::Seconds(_)) {
            // The findings of an earlier run would change this one.
            let _ = fs::remove_dir_all(&found);
        }
        fs::create_dir_all(&found).with_context(|| format!("create {}", found.display()))?;
        let path = output.join("log");
        let log = File::create(&path).with_context(|| format!("create {}", path.display()))?;
        let seeds = Path::new("tests/fuzz/corpus").join(target.name);
        let dictionary = Path::new("tests/fuzz/dictionaries").join(target.name);
        let mut command = Command::new(self.folder.join(target.name));
        command.args([
            "-seed=1".into(),
            match length {
                Length::Usual(times) => format!("-runs={}", target.runs * times),
                Length::Runs(runs) => format!("-runs={runs}"),
                Length::Seconds(seconds) => format!("-max_total_time={seconds}"),
            },
            format!("-max_len={}", target.longest),
            format!("-timeout={INPUT_TIMEOUT}"),
            format!("-dict={}", dictionary.display()),
            format!("-artifact_prefix={}/", output.display()),
            "-print_final_stats=1".into(),
        ]);
        command.arg(&found).arg(seeds);
        if target.name == "policy" {
            command.arg("filter-agent/tests/policies");
        }
        let line = command_line(&command);
        let status = command
            .stdout(log.try_clone().context("write the log of a fuzz target")?)
            .stderr(log)
            .status()
            .with_context(|| format!("start `{line}`"))?;
        let log = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        let log = String::from_utf8_lossy(&log).into_owned();
        let after = |text: &str| Some(log.rsplit_once(text)?.1.lines().next()?.trim());
        let runs = after("stat::number_of_executed_units:").unwrap_or("no");
        let input = after("Test unit written to ").map(PathBuf::from);
        let fault = log
            .lines()
            .find(|line| line.contains("panicked at") || line.contains("ERROR: libFuzzer"));
        let summary = match fault {
            _ if status.success() => format!("{runs} runs"),
            Some(fault) => format!("{fault} after {runs} runs, see {}", path.display()),
            None => format!("`{line}` failed: {status}, see {}", path.display()),
        };
        ensure!(status.success() || input.is_some(), summary);
        Ok(End {
            log,
            input,
            summary,
        })
    }
}

/// Does something with one target or all, on each processor one at a time, and prints the results.
fn each(name: Option<&str>, job: impl Fn(&Target) -> Result<String> + Sync) -> Result<()> {
    let is_wanted = |target: &&Target| name.is_none_or(|name| name == target.name);
    let targets = Mutex::new(TARGETS.iter().filter(is_wanted));
    let next = || targets.lock().ok()?.next();
    let work = || -> Vec<anyhow::Error> {
        let mut errors = Vec::new();
        while let Some(target) = next() {
            match job(target) {
                Ok(result) => println!("{:<12} {result}", target.name),
                Err(error) => errors.push(error),
            }
        }
        errors
    };
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let errors: Vec<String> = thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        let ended = workers.into_iter().map(|worker| worker.join());
        let errors =
            ended.flat_map(|errors| errors.unwrap_or_else(|_| vec![anyhow!("a thread ended")]));
        errors.map(|error| format!("{error:#}")).collect()
    });
    ensure!(errors.is_empty(), errors.join("\n"));
    Ok(())
}
