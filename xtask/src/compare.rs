//! Judges a change: runs the benchmark of an earlier commit and the one of these sources in turns, and says which figures differ.

mod figures;

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::{cargo, output, steps, target_directory};
use figures::{Comparison, Side, Written};

/// Runs both in turns and prints what they measured.
///
/// # Errors
/// No such commit, one that cannot be built, a benchmark that does not take the arguments or fails.
pub fn judge(base: &str, rounds: usize, arguments: &[String]) -> Result<()> {
    let mut find = Command::new("git");
    find.args(["rev-parse", "--verify", "--quiet", "--end-of-options"]);
    let found = find.arg(format!("{base}^{{commit}}")).output();
    let found = found.context("start git")?;
    let reason = String::from_utf8_lossy(&found.stderr);
    ensure!(
        found.status.success(),
        "`{base}` names no commit of this repository: give a commit, a branch or a tag{}",
        reason.trim()
    );
    let commit = String::from_utf8_lossy(&found.stdout);
    let folder = target_directory()?.join("compare");
    let this = Program::here(folder.join("this"))?;
    this.check(arguments)?;
    let base = Program::of(commit.trim(), &folder)?;
    base.check(arguments)?;
    println!("base: {}\nthis: {}", base.name, this.name);
    let mut comparison = Comparison::new(rounds);
    for round in 0..rounds {
        let mut programs = [("base", Side::Base, &base), ("this", Side::This, &this)];
        if round % 2 == 1 {
            programs.reverse();
        }
        for (name, side, program) in programs {
            let begin = Instant::now();
            comparison.add(side, program.measure(arguments)?);
            let seconds = begin.elapsed().as_secs_f64();
            println!("round {} of {rounds}, {name}: {seconds:.1} s", round + 1);
        }
    }
    println!("\n{}", comparison.table().trim_fmt());
    Ok(())
}

/// A benchmark that is built. It writes its figures into this folder, because it lies in `release/deps` of it.
struct Program {
    name: String,
    folder: PathBuf,
}

impl Program {
    /// The sources as they lie here. Copied, so that a build meanwhile does not change what is measured.
    fn here(folder: PathBuf) -> Result<Self> {
        let root = std::env::current_dir().context("find the sources")?;
        let name = "the sources as they are here".to_owned();
        println!("==> build {name}");
        let program = Self { name, folder };
        program.build(&root, &target_directory()?)?;
        Ok(program)
    }

    /// A commit's. Its target directory is its own: artifacts of one place would pass for those of the other. It is large, and only
    /// what was made in it is kept.
    fn of(commit: &str, folder: &Path) -> Result<Self> {
        let mut subject = Command::new("git");
        let subject = output(subject.args(["show", "--no-patch", "--format=%h (%s)", commit]))?;
        let name = subject.trim().to_owned();
        let folder = folder.join(commit);
        let program = Self { name, folder };
        if program.benchmark().exists() {
            return Ok(program);
        }
        println!("==> build {}", program.name);
        let (source, target) = (program.folder.join("source"), program.folder.join("target"));
        let built = steps::export(commit, &source).and_then(|()| program.build(&source, &target));
        if built.is_err() {
            remove(&program.folder)?;
        }
        built.with_context(|| format!("build {}", program.name))?;
        for folder in [source, target] {
            remove(&folder)?;
        }
        Ok(program)
    }

    fn benchmark(&self) -> PathBuf {
        self.folder.join("release/deps/speed")
    }

    fn agent(&self) -> PathBuf {
        self.folder.join("filter-agent")
    }

    /// Builds the benchmark and the agent that it runs. The benchmark is put in place last: where it lies, all is there.
    fn build(&self, source: &Path, target: &Path) -> Result<()> {
        for (task, package, name, place) in [
            ("build", "filter-agent", "filter-agent", self.agent()),
            ("bench", "filter-bench", "speed", self.benchmark()),
        ] {
            let mut build = cargo();
            // Each side's own `rust-toolchain.toml` counts, not what rustup chose for this program.
            build.env_remove("RUSTUP_TOOLCHAIN").current_dir(source);
            build.args([task, "--quiet", "--package", package]);
            build.arg(if task == "build" {
                "--release"
            } else {
                "--no-run"
            });
            build.arg("--target-dir").arg(target);
            build.args(["--message-format", "json-render-diagnostics"]);
            let intermediate = target.display().to_string();
            build.args(["--config", &format!("build.build-dir={intermediate:?}")]);
            let messages = output(&mut build)?;
            let built = executable(&messages, name)
                .with_context(|| format!("find `{name}` in what cargo built"))?;
            let parent = place.parent().context("find the folder of a program")?;
            fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
            let copy = place.with_extension("new");
            fs::copy(&built, &copy)
                .and_then(|_| fs::rename(&copy, &place))
                .with_context(|| format!("copy {}", built.display()))?;
        }
        Ok(())
    }

    fn command(&self, arguments: &[String]) -> Command {
        let mut command = Command::new(self.benchmark());
        command.env("FILTER_TESTS_AGENT", self.agent());
        command.arg("--bench").args(arguments);
        command
    }

    /// Fails where the benchmark does not know the arguments. It reads them all before it heeds `--help`.
    fn check(&self, arguments: &[String]) -> Result<()> {
        let help = self.command(arguments).arg("--help").output();
        let help = help.with_context(|| format!("start {}", self.benchmark().display()))?;
        let stderr = String::from_utf8_lossy(&help.stderr);
        let reason = stderr.split("\n\n").next().unwrap_or_default();
        let reason: Vec<&str> = reason.split_whitespace().collect();
        let (name, arguments) = (&self.name, arguments.join(" "));
        ensure!(
            help.status.success(),
            "the benchmark of {name} does not take `{arguments}`: {}",
            reason.join(" ")
        );
        Ok(())
    }

    fn measure(&self, arguments: &[String]) -> Result<Written> {
        let (figures, log) = (
            self.folder.join("bench/bench.json"),
            self.folder.join("log"),
        );
        // Those of an earlier run would pass for this one's.
        remove(&figures)?;
        let file = File::create(&log).with_context(|| format!("create {}", log.display()))?;
        let copy = file.try_clone().context("write a log")?;
        let mut command = self.command(arguments);
        let status = command.stdout(copy).stderr(file).status();
        let status = status.with_context(|| format!("start {}", self.benchmark().display()))?;
        if !status.success() {
            let text = fs::read_to_string(&log).unwrap_or_default();
            let mut lines = text.lines().rev().map(str::trim);
            let last = lines.find(|line| !line.is_empty() && !line.starts_with("note:"));
            let (name, last) = (&self.name, last.unwrap_or("it says nothing"));
            bail!(
                "the benchmark of {name} fails ({status}): {last}; see {}",
                log.display()
            );
        }
        let read = fs::read_to_string(&figures).map_err(anyhow::Error::from);
        read.and_then(|text| Ok(serde_json::from_str(&text)?))
            .with_context(|| format!("read the figures of {}", self.name))
    }
}

/// The program of this name, from the messages of a build.
fn executable(messages: &str, name: &str) -> Option<PathBuf> {
    let messages = messages
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok());
    let of_name = messages.filter(|message: &Value| message["target"]["name"] == name);
    let mut programs = of_name.filter_map(|message| Some(message["executable"].as_str()?.into()));
    programs.next_back()
}

/// Removes a file or a folder, if there is one.
fn remove(path: &Path) -> Result<()> {
    let removed = match path.is_dir() {
        true => fs::remove_dir_all(path),
        false => fs::remove_file(path),
    };
    match removed {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
