//! The steps of `check` and `test`, timed.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::dist::Profile;
use crate::fuzz::{self, Length};
use crate::{arm64, bench, cargo, run, target_directory, vm};

/// Runs the steps that need no root.
pub fn check() -> Result<()> {
    let mut report = Report::default();
    let result = check_steps(&mut report);
    report.print();
    result
}

/// Everything. `full`: in the virtual machine every kernel, not only the oldest, every fault, and fuzzing for minutes.
pub fn test(full: bool) -> Result<()> {
    let mut report = Report::default();
    let result = check_steps(&mut report)
        .and_then(|()| fuzz_steps(&mut report, full))
        .and_then(|()| privileged_steps(&mut report, full));
    report.print();
    result
}

fn check_steps(report: &mut Report) -> Result<()> {
    report.step("format", cargo().args(["fmt", "--all", "--check"]))?;
    // `cargo deny` looks at the crates of all systems, and a build here has downloaded only its own.
    report.step("fetch", cargo().args(["fetch", "--locked"]))?;
    report.step(
        "dependencies",
        cargo()
            .args(["deny", "--offline", "check"])
            .args(["licenses", "bans", "sources"]),
    )?;
    report.step(
        "clippy, host",
        cargo()
            .args(["clippy", "--workspace", "--exclude", "filter-ebpf"])
            .args(["--all-targets", "--", "-D", "warnings"]),
    )?;
    report.step("clippy, BPF", &mut clippy_bpf()?)?;
    report.step(
        "unit tests",
        cargo().args(["test", "--workspace"]).args([
            "--exclude",
            "filter-ebpf",
            "--exclude",
            "filter-tests",
        ]),
    )
}

/// By numbers of runs, so that no timing decides.
fn fuzz_steps(report: &mut Report, full: bool) -> Result<()> {
    if full {
        report.time("fuzz", || fuzz::run_targets(None, Length::Usual(15)))?;
        return report.time("fuzz, planted", || fuzz::find_planted(None));
    }
    report.time("fuzz, briefly", || {
        fuzz::run_targets(None, Length::Usual(1))
    })
}

fn privileged_steps(report: &mut Report, full: bool) -> Result<()> {
    // The tests run the agent's binary, which cargo does not build for another package's tests, and
    // one of another layout. Each would build what is missing while others wait.
    let build = ["build", "--package", "filter-agent"];
    report.step("build the agent", cargo().args(build))?;
    let target = target_directory()?;
    // Its dependencies are those of the other: only the results lie apart.
    report.step(
        "build another layout",
        cargo()
            .args(build)
            .args(["--features", "next-layout", "--config"])
            .arg(format!(
                "build.build-dir={:?}",
                target.display().to_string()
            ))
            .arg("--target-dir")
            .arg(target.join("next-layout")),
    )?;
    // Each of these tests runs an agent, servers and clients of its own: many at once compete for the
    // processor until time-outs expire.
    let mut tests = cargo();
    tests.args(["test", "--package", "filter-tests", "--no-fail-fast"]);
    tests.args(["--", "--test-threads", "4"]);
    if full {
        tests.env("FILTER_TESTS_FULL", "1");
    }
    report.step("tests as root", &mut tests)?;
    if full {
        report.time("build the releases", build_released)?;
        report.step(
            "upgrade from them",
            cargo()
                .args(["test", "--package", "filter-tests", "--test", "upgrade"])
                .args(["--test", "tls"])
                .args(["--", "--ignored"]),
        )?;
        // Processes of their own, because a demo catches signals.
        let program = std::env::current_exe().context("find this program")?;
        report.step("demo", Command::new(&program).arg("demo"))?;
        let mut fleet = Command::new(&program);
        report.step("demo, fleet", fleet.args(["demo", "--fleet"]))?;
    }
    // Its figures decide nothing; that it can be run does. Most of it is compiled already, for the tests.
    report.step("benchmark, briefly", bench("dev").arg("--quick"))?;
    // Compiling the shipped agent takes as long as the system test itself.
    let (kernels, profile) = if full {
        (&vm::KERNELS[..], Profile::Shipped)
    } else {
        (&vm::KERNELS[..1], Profile::Dev)
    };
    report.time("virtual machine", || vm::test(kernels, profile, full))?;
    if full {
        report.time("drivers", || vm::drivers::test(&vm::KERNELS))?;
        report.time("arm64", arm64::test)?;
    }
    Ok(())
}

/// The earlier releases, which upgrades meet on hosts, and their commits.
const RELEASED: [(&str, &str); 1] = [("0.1.0", "1e467f4")];

/// Builds their agents, below `released` in the target directory.
fn build_released() -> Result<()> {
    let target = target_directory()?.join("released");
    for (version, commit) in RELEASED {
        let folder = target.join(version);
        let source = folder.join("source");
        export(commit, &source)?;
        run(cargo()
            .args(["build", "--package", "filter-agent", "--target-dir"])
            .arg(&target)
            .current_dir(&source))?;
        let binary = folder.join("filter-agent");
        fs::copy(target.join("debug/filter-agent"), &binary)
            .with_context(|| format!("copy the agent to {}", binary.display()))?;
    }
    Ok(())
}

/// Unpacks the sources of a commit into this folder.
pub fn export(commit: &str, source: &Path) -> Result<()> {
    fs::create_dir_all(source).with_context(|| format!("create {}", source.display()))?;
    let archive = source.with_extension("tar");
    let mut export = Command::new("git");
    export.args(["archive", "--output"]).arg(&archive);
    run(export.arg(commit)).context("export an earlier commit, which needs the whole history")?;
    let mut unpack = Command::new("tar");
    unpack.arg("--extract").arg("--file").arg(&archive);
    run(unpack.arg("--directory").arg(source))?;
    fs::remove_file(&archive).with_context(|| format!("remove {}", archive.display()))
}

/// Clippy for the BPF target, with the flags that aya-build compiles it with.
fn clippy_bpf() -> Result<Command> {
    let target = if cfg!(target_endian = "big") {
        "bpfeb-unknown-none"
    } else {
        "bpfel-unknown-none"
    };
    let mut clippy = cargo();
    clippy
        .env("RUSTC_BOOTSTRAP", "1")
        .env(
            "CARGO_ENCODED_RUSTFLAGS",
            format!("--cfg=bpf_target_arch=\"{}\"", std::env::consts::ARCH),
        )
        .args(["clippy", "--package", "filter-ebpf", "--bins"])
        .args(["--target", target, "-Z", "build-std=core"])
        // Build scripts look at RUSTC_BOOTSTRAP: in a shared directory each side would
        // rebuild the other's dependencies.
        .arg("--target-dir")
        .arg(target_directory()?.join("bpf"))
        .args(["--", "-D", "warnings"]);
    Ok(clippy)
}

#[derive(Default)]
struct Report {
    steps: Vec<(&'static str, Duration, bool)>,
}

impl Report {
    fn step(&mut self, name: &'static str, command: &mut Command) -> Result<()> {
        self.time(name, || run(command))
    }

    fn time(&mut self, name: &'static str, step: impl FnOnce() -> Result<()>) -> Result<()> {
        println!("\n==> {name}");
        let begin = Instant::now();
        let result = step();
        self.steps.push((name, begin.elapsed(), result.is_ok()));
        result
    }

    fn print(&self) {
        println!("\n{:<20} {:>8}", "step", "seconds");
        for (name, time, passed) in &self.steps {
            let verdict = if *passed { "ok" } else { "FAILED" };
            println!("{name:<20} {:>8.1}  {verdict}", time.as_secs_f64());
        }
    }
}
