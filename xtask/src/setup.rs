//! Installs what building and testing need and is missing.
//!
//! Everything is looked up first. Where something cannot be installed from here, the
//! commands that would do it are printed instead, and nothing is changed.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::{arm64, cargo, command_line, is_root, output, run, target_directory};

#[derive(Clone, Copy, PartialEq)]
pub enum Needs {
    /// To compile the agent.
    Build,
    /// To check and test everything that needs no root.
    Check,
    /// To make packages as well.
    Package,
    /// To build and run the tests that need root as well: the agent, servers, clients.
    Run,
    /// To compare it with what else is in use as well.
    Bench,
    /// All of it, and to boot a virtual machine.
    Machine,
    /// To compile for arm64 and to boot an emulated machine of it.
    Arm64,
}

/// Besides what rustup installs by default; `rust-toolchain.toml` names them too, but rustup
/// heeds that only when it installs the toolchain.
const COMPONENTS: [&str; 3] = ["rust-src", "clippy", "rustfmt"];

/// etcd's messages are compiled from their definitions, which import those of protobuf's own.
const BUILD_PACKAGES: [&str; 4] = ["gcc", "libc6-dev", "libprotobuf-dev", "protobuf-compiler"];
/// libFuzzer is C++.
const CHECK_PACKAGES: [&str; 1] = ["g++"];
const PACKAGE_PACKAGES: [&str; 3] = ["lintian", "lowdown", "rpm"];
const MACHINE_PACKAGES: [&str; 4] = ["dnsmasq-base", "e2fsprogs", "mmdebstrap", "qemu-system-x86"];
const ARM64_PACKAGES: [&str; 5] = [
    "cpio",
    "gcc-aarch64-linux-gnu",
    "libc6-dev-arm64-cross",
    "mmdebstrap",
    "qemu-system-arm",
];
const BENCH_PACKAGES: [&str; 4] = ["ethtool", "ipset", "iptables", "xdp-tools"];
const RUN_PACKAGES: [&str; 22] = [
    "bpftool",
    "curl",
    "etcd-client",
    "etcd-server",
    "haproxy",
    "iproute2",
    "knot",
    "libseccomp-dev",
    "mariadb-server",
    "nftables",
    "nginx-light",
    "openssl",
    "postgresql",
    "prometheus",
    "python3-asyncpg",
    "python3-venv",
    "redis-server",
    "socat",
    "strace",
    "systemd",
    "tmux",
    "unbound",
];

/// From PyPI, into a folder of its own below the target directory, where the test looks for it.
const SCHEMATHESIS: &str = "4.32.5";

const BPF_LINKER: &str = "0.13.0";
/// Programs of cargo's, and their versions: one that checks the dependencies, and those that make packages.
const CARGO_DENY: (&str, &str) = ("cargo-deny", "0.20.2");
const CARGO_CYCLONEDX: (&str, &str) = ("cargo-cyclonedx", "0.5.9");
const CARGO_DEB: (&str, &str) = ("cargo-deb", "3.8.0");

/// Debian's packages of servers start them, and postgresql's makes one first, unless these files say
/// no. They stand only while we install.
const NO_SERVERS: [(&str, &str); 2] = [
    (
        "/etc/postgresql-common/createcluster.d/filter-agent.conf",
        "create_main_cluster = false\n",
    ),
    ("/usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n"),
];

pub fn install(needs: Needs) -> Result<()> {
    let mut rustup: Vec<Command> = missing_components()?.into_iter().collect();
    if needs == Needs::Arm64 {
        rustup.extend(missing_target()?);
    }
    let linker = (!has_bpf_linker()).then(Linker::choose).transpose()?;
    let mut packages: Vec<String> = BUILD_PACKAGES.map(str::to_owned).to_vec();
    let checks = matches!(needs, Needs::Check | Needs::Machine);
    let makes_packages = matches!(needs, Needs::Package | Needs::Machine);
    if makes_packages {
        packages.extend(PACKAGE_PACKAGES.map(str::to_owned));
    }
    if checks {
        packages.extend(CHECK_PACKAGES.map(str::to_owned));
    }
    if matches!(needs, Needs::Run | Needs::Bench | Needs::Machine) {
        packages.extend(RUN_PACKAGES.map(str::to_owned));
    }
    if matches!(needs, Needs::Bench | Needs::Machine) {
        packages.extend(BENCH_PACKAGES.map(str::to_owned));
    }
    if needs == Needs::Machine {
        packages.extend(MACHINE_PACKAGES.map(str::to_owned));
    }
    if needs == Needs::Arm64 {
        packages.extend(ARM64_PACKAGES.map(str::to_owned));
    }
    if let Some(Linker::Source { llvm }) = linker {
        packages.push(format!("llvm-{llvm}-dev"));
    }
    let packages = missing_packages(packages);

    if !packages.is_empty() && (!is_root() || !is_installed("apt-get")) {
        return Err(refusal(&rustup, &packages, linker.as_ref()));
    }
    for mut command in rustup {
        println!("==> {}", command_line(&command));
        run(&mut command)?;
    }
    if !packages.is_empty() {
        println!("==> install {}", packages.join(", "));
        install_packages(&packages)?;
    }
    let programs = [
        (checks, CARGO_DENY),
        (makes_packages, CARGO_CYCLONEDX),
        (makes_packages, CARGO_DEB),
    ];
    for (is_needed, (program, version)) in programs {
        if is_needed && !is_installed(program) {
            println!("==> install {program} {version}");
            // An optimized build takes minutes longer (cargo-deny's uses LTO for all crates), and saves seconds in use.
            run(cargo()
                .env("CARGO_PROFILE_DEV_DEBUG", "false")
                .args(["install", program, "--debug", "--locked"])
                .args(["--version", version]))?;
        }
    }
    if matches!(needs, Needs::Run | Needs::Bench | Needs::Machine) {
        install_schemathesis()?;
    }
    if let Some(linker) = linker {
        println!("==> install bpf-linker {BPF_LINKER}");
        run(&mut linker.command())?;
        if !has_bpf_linker() {
            bail!(
                "bpf-linker {BPF_LINKER} was installed but is not what runs as `bpf-linker`: \
                 put cargo's bin directory first in PATH"
            );
        }
    }
    Ok(())
}

fn install_schemathesis() -> Result<()> {
    let folder = target_directory()?.join(format!("schemathesis-{SCHEMATHESIS}"));
    if folder.join("bin/schemathesis").exists() {
        return Ok(());
    }
    println!("==> install schemathesis {SCHEMATHESIS}");
    run(Command::new("python3").args(["-m", "venv"]).arg(&folder))?;
    run(Command::new(folder.join("bin/pip"))
        .args(["install", "--quiet", "--disable-pip-version-check"])
        .arg(format!("schemathesis=={SCHEMATHESIS}")))
}

/// Lists what to do by hand, in order.
fn refusal(rustup: &[Command], packages: &[String], linker: Option<&Linker>) -> anyhow::Error {
    let mut commands: Vec<String> = rustup.iter().map(command_line).collect();
    commands.push(command_line(&apt_update()));
    commands.push(command_line(&apt_install(packages)));
    commands.extend(linker.map(|linker| command_line(&linker.command())));
    let why = if is_installed("apt-get") {
        "installing Debian packages needs root; run these, the apt-get ones as root"
    } else {
        "there is no apt-get here; install what these would on Debian"
    };
    anyhow::anyhow!("{why}:\n  {}", commands.join("\n  "))
}

/// The command that installs the missing components of the toolchain, if there are any.
fn missing_components() -> Result<Option<Command>> {
    let installed = installed_by_rustup("component")?;
    let is_missing = |component: &&str| !installed.lines().any(|line| line.starts_with(*component));
    let missing: Vec<&str> = COMPONENTS.into_iter().filter(is_missing).collect();
    Ok((!missing.is_empty()).then(|| add_by_rustup("component", &missing)))
}

/// The command that installs the standard library for arm64, if it is missing.
fn missing_target() -> Result<Option<Command>> {
    let installed = installed_by_rustup("target")?;
    let is_missing = !installed.lines().any(|line| line == arm64::TARGET);
    Ok(is_missing.then(|| add_by_rustup("target", &[arm64::TARGET])))
}

fn installed_by_rustup(kind: &str) -> Result<String> {
    output(Command::new("rustup").args([kind, "list", "--installed"]))
        .context("the toolchain comes from rustup: see https://rustup.rs")
}

fn add_by_rustup(kind: &str, names: &[&str]) -> Command {
    let mut command = Command::new("rustup");
    command.args([kind, "add"]).args(names);
    command
}

fn missing_packages(wanted: Vec<String>) -> Vec<String> {
    // It fails when it does not know one of the packages, and still lists the others.
    let installed = Command::new("dpkg-query")
        .args(["--show", "--showformat", "${Package} ${db:Status-Status}\n"])
        .args(&wanted)
        .output()
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default();
    let is_missing = |package: &String| {
        let line = format!("{package} installed");
        !installed.lines().any(|found| found == line)
    };
    wanted.into_iter().filter(is_missing).collect()
}

fn install_packages(packages: &[String]) -> Result<()> {
    // A source of the host's that does not answer is no reason to stop: apt-get install says
    // whether what it needs is there.
    if run(&mut apt_update()).is_err() {
        println!("apt-get update failed; going on with the package lists of before");
    }
    for package in packages {
        let known = output(Command::new("apt-cache").args(["madison", package]))?;
        if known.is_empty() {
            bail!("{}", unavailable(package));
        }
    }
    let mut standing = Vec::new();
    let declared = NO_SERVERS.into_iter().try_for_each(|(path, text)| {
        standing.extend(Declared::make(Path::new(path), text)?);
        Ok(())
    });
    let installed = declared.and_then(|()| run(&mut apt_install(packages)));
    for file in standing {
        file.undo()?;
    }
    installed
}

fn unavailable(package: &str) -> String {
    if package.starts_with("llvm-") {
        format!(
            "{package} is in none of this system's apt sources: on Debian 12 add the security \
             suite (`deb http://deb.debian.org/debian-security bookworm-security main`), elsewhere \
             https://apt.llvm.org, or install cargo-binstall, whose bpf-linker needs no LLVM"
        )
    } else {
        format!("{package} is in none of this system's apt sources: add Debian's main suite")
    }
}

fn apt_update() -> Command {
    let mut command = Command::new("apt-get");
    command.args(["update", "--quiet"]);
    command
}

fn apt_install(packages: &[String]) -> Command {
    let mut command = Command::new("apt-get");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(["install", "--yes", "--quiet", "--no-install-recommends"])
        .args(packages);
    command
}

/// A file that tells Debian's packages something while they are installed.
struct Declared {
    /// To be removed again: the file, and the directories made for it.
    created: Vec<PathBuf>,
}

impl Declared {
    /// `None`: there is such a file, which is not ours.
    fn make(file: &Path, text: &str) -> Result<Option<Declared>> {
        if file.exists() && fs::read(file).ok().as_deref() != Some(text.as_bytes()) {
            return Ok(None);
        }
        let mut created = vec![file.to_owned()];
        let directories = file.ancestors().skip(1);
        created.extend(
            directories
                .take_while(|path| !path.exists())
                .map(Path::to_owned),
        );
        fs::create_dir_all(file.parent().context("find the directory of the file")?)
            .and_then(|()| fs::write(file, text))
            .and_then(|()| fs::set_permissions(file, Permissions::from_mode(0o755)))
            .with_context(|| format!("write {}", file.display()))?;
        Ok(Some(Declared { created }))
    }

    fn undo(self) -> Result<()> {
        let file = &self.created[0];
        fs::remove_file(file).with_context(|| format!("remove {}", file.display()))?;
        for directory in &self.created[1..] {
            // The package may have put files of its own there by now.
            if fs::remove_dir(directory).is_err() {
                break;
            }
        }
        Ok(())
    }
}

fn has_bpf_linker() -> bool {
    let version = Command::new("bpf-linker").arg("--version").output();
    version.is_ok_and(|output| {
        output.status.success()
            && String::from_utf8_lossy(&output.stdout).trim() == format!("bpf-linker {BPF_LINKER}")
    })
}

/// Where bpf-linker comes from.
enum Linker {
    /// Its authors' binary.
    Binary,
    /// Compiled here, against the LLVM that rustc's own is: another cannot read its output.
    Source { llvm: u32 },
}

impl Linker {
    fn choose() -> Result<Linker> {
        if is_installed("cargo-binstall") {
            return Ok(Linker::Binary);
        }
        let version = output(Command::new("rustc").arg("-vV"))?;
        let llvm = version
            .lines()
            .find_map(|line| line.strip_prefix("LLVM version: ")?.split('.').next())
            .and_then(|major| major.parse().ok())
            .context("find the LLVM version in what `rustc -vV` prints")?;
        Ok(Linker::Source { llvm })
    }

    fn command(&self) -> Command {
        // Forced, because cargo would not replace one that is there but does not start.
        let mut command = cargo();
        match self {
            Linker::Binary => command
                .args([
                    "binstall",
                    "--no-confirm",
                    "--force",
                    "--disable-strategies",
                    "compile",
                ])
                .arg(format!("bpf-linker@{BPF_LINKER}")),
            Linker::Source { llvm } => command
                .env("LLVM_PREFIX", format!("/usr/lib/llvm-{llvm}"))
                .args([
                    "install",
                    "bpf-linker",
                    "--version",
                    BPF_LINKER,
                    "--locked",
                    "--force",
                ])
                .args([
                    "--no-default-features",
                    "--features",
                    &format!("llvm-{llvm}"),
                ]),
        };
        command
    }
}

fn is_installed(program: &str) -> bool {
    Command::new(program)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok()
}
