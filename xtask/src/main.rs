//! The project's own tasks: `cargo xtask setup | build | check | test | fuzz | verify | bench | dist | vm | arm64 | demo`.

mod arm64;
mod compare;
mod demo;
mod dist;
mod fuzz;
mod setup;
mod steps;
mod vm;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail, ensure};
use clap::builder::PossibleValuesParser;
use clap::{Parser, Subcommand};

use dist::Profile;
use fuzz::Length;
use setup::Needs;

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "Set up, build, check, test and show filter-agent"
)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what building and testing need and is missing
    Setup,
    /// Build the agent, with the XDP program inside
    Build {
        #[arg(long)]
        release: bool,
    },
    /// Format, clippy on both sides and the tests that need no root
    Check,
    /// Everything `check` does, then the tests that need root
    Test {
        /// Boot every kernel in the virtual machine, not only the oldest, with the tests of forced TLS, fail every
        /// system call of the agent, not some, fuzz for minutes, not seconds, and try the drivers of network cards and arm64 in
        /// emulated machines
        #[arg(long)]
        full: bool,
    },
    /// Run the fuzz targets: the readers of what comes from outside, on mutations of sample inputs
    Fuzz {
        /// Only this target
        #[arg(value_parser = PossibleValuesParser::new(fuzz::names()))]
        target: Option<String>,
        /// Runs of each target, instead of its own number
        #[arg(long)]
        runs: Option<u64>,
        /// Run each target for so long instead, and keep the inputs that it finds for the next time
        #[arg(long, conflicts_with = "runs")]
        seconds: Option<u64>,
        /// Show that each target finds a fault that is planted in it
        #[arg(long, conflicts_with_all = ["runs", "seconds"])]
        planted: bool,
        /// Run the target with this input alone
        #[arg(long, requires = "target", conflicts_with_all = ["runs", "seconds", "planted"])]
        input: Option<PathBuf>,
    },
    /// Load the program and print what it costs the running kernel's verifier
    Verify,
    /// Measure the filter against a program that does nothing and against what else is in use
    Bench {
        /// Judge a change: measure these sources and that commit in turns, and say of each figure whether they differ
        ///
        /// The benchmark is built here and of the sources of BASE (below `compare` in the target directory, where the build is kept for
        /// the next time), then run in turns with the same arguments: base, this, this, base and so on. A figure is `faster`
        /// or `slower` (`less` or `more`, where it is no speed) if every run of the one side lies on the same side of every run of
        /// the other. By chance alone that happens to one figure in 35 with 4 rounds, in 126 with 5, in 1,700 with 7.
        /// `this/base` is of each round, its quartiles beside it. Not all parts have to be measured:
        ///
        /// cargo xtask bench --compare main -- per-packet --sizes 30,100000
        #[arg(long, value_name = "BASE", verbatim_doc_comment)]
        compare: Option<String>,
        /// Runs of each side, of at least four
        #[arg(long, requires = "compare", default_value_t = 5, value_parser = clap::value_parser!(u16).range(4..))]
        rounds: u16,
        /// What `cargo xtask bench -- --help` lists
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Make the packages: a .deb, an .rpm and a tarball
    Dist,
    /// Boot the package in a virtual machine and try to get past it at every moment
    Vm {
        /// Only this kernel
        #[arg(long, value_parser = vm::KERNELS)]
        kernel: Option<String>,
        /// Run the tests of forced TLS on its kernel as well
        #[arg(long)]
        streams: bool,
        /// Try the drivers of network cards instead, those that QEMU emulates
        #[arg(long, conflicts_with = "streams")]
        drivers: bool,
    },
    /// Build the agent for arm64, compare its BPF objects with those of this processor, and run the unit and the packet tests on
    /// an emulated machine
    Arm64,
    /// Run the agent in front of a PostgreSQL server in throw-away network namespaces
    Demo {
        /// Three servers, whose rules come from etcd
        #[arg(long)]
        fleet: bool,
    },
}

fn main() -> ExitCode {
    match perform(Arguments::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(task: Task) -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("find the workspace")?;
    std::env::set_current_dir(root).with_context(|| format!("enter {}", root.display()))?;
    match task {
        Task::Setup => setup::install(Needs::Run)?,
        Task::Build { release } => {
            setup::install(Needs::Build)?;
            let profile: &[&str] = if release { &["--release"] } else { &[] };
            build(profile)?;
        }
        Task::Check => {
            setup::install(Needs::Check)?;
            steps::check()?;
        }
        Task::Test { full } => {
            require_root("test")?;
            setup::install(Needs::Machine)?;
            if full {
                setup::install(Needs::Arm64)?;
            }
            steps::test(full)?;
        }
        Task::Fuzz {
            target,
            runs,
            seconds,
            planted,
            input,
        } => {
            setup::install(Needs::Check)?;
            let length = match (runs, seconds) {
                (Some(runs), _) => Length::Runs(runs),
                (None, Some(seconds)) => Length::Seconds(seconds),
                (None, None) => Length::Usual(1),
            };
            match (&target, input) {
                (Some(target), Some(input)) => fuzz::run_input(target, &input)?,
                (target, _) if planted => fuzz::find_planted(target.as_deref())?,
                (target, _) => fuzz::run_targets(target.as_deref(), length)?,
            }
        }
        Task::Verify => {
            require_root("verify")?;
            setup::install(Needs::Run)?;
            run(cargo()
                .args(["test", "--package", "filter-tests", "--test", "verifier"])
                .args(["--", "--nocapture"]))?;
        }
        Task::Bench {
            compare,
            rounds,
            arguments,
        } => {
            require_root("bench")?;
            setup::install(Needs::Bench)?;
            match compare {
                Some(base) => compare::judge(&base, rounds.into(), &arguments)?,
                None => run(bench("bench").args(arguments))?,
            }
        }
        Task::Dist => {
            setup::install(Needs::Package)?;
            let made = dist::make(Profile::Shipped)?;
            for package in [made.deb, made.rpm, made.tarball] {
                println!("{}", package.display());
            }
        }
        Task::Vm {
            kernel,
            streams,
            drivers,
        } => {
            require_root("vm")?;
            setup::install(Needs::Machine)?;
            let kernels = match &kernel {
                Some(kernel) => &[kernel.as_str()][..],
                None => &vm::KERNELS,
            };
            if drivers {
                vm::drivers::test(kernels)?;
            } else {
                vm::test(kernels, Profile::Shipped, streams)?;
            }
        }
        Task::Arm64 => {
            require_root("arm64")?;
            setup::install(Needs::Arm64)?;
            arm64::test()?;
        }
        Task::Demo { fleet } => {
            require_root("demo")?;
            setup::install(Needs::Run)?;
            build(&["--release"])?;
            demo::show(&target_directory()?.join("release/filter-agent"), fleet)?;
        }
    }
    Ok(())
}

fn build(profile: &[&str]) -> Result<()> {
    run(cargo()
        .args(["build", "--package", "filter-agent"])
        .args(profile))
}

/// The benchmark, compiled with this profile. Its arguments follow.
fn bench(profile: &str) -> Command {
    let mut command = cargo();
    command.args(["bench", "--quiet", "--package", "filter-bench"]);
    command.args(["--profile", profile, "--"]);
    command
}

fn require_root(task: &str) -> Result<()> {
    ensure!(
        is_root(),
        "`cargo xtask {task}` needs root, to load XDP programs and to make network namespaces; \
         `cargo xtask check` runs what does not"
    );
    Ok(())
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// The directory cargo builds into, whatever configured it: this program was built there.
fn target_directory() -> Result<PathBuf> {
    let program = std::env::current_exe().context("find this program")?;
    let directory = program.ancestors().nth(2);
    Ok(directory
        .context("find cargo's target directory")?
        .to_owned())
}

/// Without the variables that describe this package to us: build scripts of dependencies run again
/// wherever they differ, and everything would be compiled again.
fn cargo() -> Command {
    let mut command = Command::new("cargo");
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command
}

/// Runs a command on our own terminal and fails with the command line when it fails.
fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("start `{}`", command_line(command)))?;
    if !status.success() {
        bail!("`{}` failed: {status}", command_line(command));
    }
    Ok(())
}

/// Runs a command and gives what it printed on standard output.
fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stderr(std::process::Stdio::inherit())
        .output()
        .with_context(|| format!("start `{}`", command_line(command)))?;
    if !output.status.success() {
        bail!("`{}` failed: {}", command_line(command), output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The command as one would type it.
fn command_line(command: &Command) -> String {
    let variables = command
        .get_envs()
        .filter_map(|(name, value)| Some((name, value?)))
        .map(|(name, value)| format!("{}={}", name.to_string_lossy(), value.to_string_lossy()));
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    variables
        .chain(words.map(|word| word.to_string_lossy().into_owned()))
        .collect::<Vec<_>>()
        .join(" ")
}
