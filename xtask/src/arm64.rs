//! arm64: builds the agent for it, compares the BPF objects inside with those of this processor, and runs tests on an
//! emulated machine.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{cargo, output, run, vm};

pub const TARGET: &str = "aarch64-unknown-linux-gnu";

const FOLDER: &str = "target/arm64";

const COMPILER: &str = "aarch64-linux-gnu-gcc";

/// The kernel, what the tests start, and the library that they are linked with. They are only unpacked: nothing of another
/// processor runs here.
const PACKAGES: &str = "bash,bpftool,ca-certificates,coreutils,iproute2,kmod,libseccomp-dev,linux-image-cloud-arm64,mount,nftables,procps,\
                        util-linux";

/// Folders of the packages that would only take memory of the machine.
const UNUSED: [&str; 5] = [
    "boot",
    "usr/share/doc",
    "usr/share/locale",
    "usr/share/man",
    "var/cache",
];

/// Packages, all of whose unit tests run.
const TESTED: [&str; 3] = ["filter-common", "filter-agent", "filter-tests"];

/// Their tests of one packet at a time, of the agent and of whole hosts that need no servers and no more than half
/// an hour in all.
const TESTS: [&str; 8] = [
    "lists",
    "oracle",
    "packet",
    "pins",
    "policy",
    "property",
    "reconcile",
    "verifier",
];

/// Time for the machine to boot and to run everything.
const LIMIT: Duration = Duration::from_mins(60);

/// Runs first in the machine. The lines that begin with `@` are for us. It ends by itself even if nobody waits for it.
const INIT: &str = r#"#!/bin/bash
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
for place in /dev/shm /run /tmp; do mount -t tmpfs tmpfs $place; done
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
depmod
cat /usr/share/ca-certificates/mozilla/*.crt > /etc/ssl/certs/ca-certificates.crt
ip link set lo up
(sleep 5000; echo o > /proc/sysrq-trigger) &
export FILTER_TESTS_AGENT=/filter-agent
echo "@booted $(uname -r)"
cd /tests
for test in *; do
  echo "@begin $test $(./$test --list --format terse | wc -l)"
  ./$test --test-threads 2 < /dev/null
  printf '\n@end %s\n' $?
done
echo @done
echo o > /proc/sysrq-trigger
sleep 60
"#;

/// Builds, compares and tests.
pub fn test() -> Result<()> {
    let options = ["--architectures=arm64", "--variant=extract"];
    let base = Path::new(FOLDER).join("base");
    vm::debian(&base, PACKAGES, &options, &[])?;
    let begin = Instant::now();
    let native = messages(cargo().args(["build", "--package", "filter-agent"]))?;
    // With tests of its package cargo builds the agent as well.
    let mut tests = cross(&base)?;
    tests.args(["test", "--no-run", "--lib"]);
    tests.args(TESTED.iter().flat_map(|package| ["--package", package]));
    tests.args(TESTS.iter().flat_map(|test| ["--test", test]));
    let built = messages(&mut tests)?;
    let agent = executables(&built, false).remove("filter-agent");
    let agent = agent.context("find the agent that cargo built")?;
    let programs = executables(&built, true);
    println!("built in {:.0} s", begin.elapsed().as_secs_f64());
    compare(&objects(&native)?, &objects(&built)?)?;
    let image = furnish(&base, &agent, &programs)?;
    Machine::boot(&base, &image)?.run_tests(programs.len())
}

/// `cargo` for arm64. `base`: has libseccomp, which the tests are linked with.
fn cross(base: &Path) -> Result<Command> {
    let libraries = base.join("usr/lib/aarch64-linux-gnu");
    let libraries = libraries
        .canonicalize()
        .with_context(|| format!("find {}", libraries.display()))?;
    let mut command = cargo();
    command
        .env("CARGO_BUILD_TARGET", TARGET)
        .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", COMPILER)
        .env("CC_aarch64_unknown_linux_gnu", COMPILER)
        // Without, what unit tests do at random takes an emulated processor ten times as long.
        .env("CARGO_PROFILE_DEV_OPT_LEVEL", "1")
        .env("LIBSECCOMP_LIB_PATH", libraries);
    Ok(command)
}

/// Builds. Returns what cargo says of each thing that it built.
fn messages(command: &mut Command) -> Result<Vec<Value>> {
    let printed = output(command.args(["--message-format", "json-render-diagnostics"]))?;
    let messages = printed.lines().map(serde_json::from_str);
    messages
        .collect::<Result<_, _>>()
        .context("read what cargo prints")
}

/// The programs that were built, by name: tests or others.
fn executables(messages: &[Value], is_test: bool) -> BTreeMap<String, PathBuf> {
    let executable = |message: &Value| {
        let name = message["target"]["name"].as_str()?;
        let path = message["executable"].as_str()?;
        (message["profile"]["test"] == is_test).then(|| (name.into(), path.into()))
    };
    messages.iter().filter_map(executable).collect()
}

/// The BPF objects that the agent was built with, by name.
fn objects(messages: &[Value]) -> Result<BTreeMap<String, Vec<u8>>> {
    let folder = messages.iter().find_map(|message| {
        let package = message["package_id"].as_str()?;
        let folder = message["out_dir"].as_str()?;
        package.contains("/filter-agent#").then_some(folder)
    });
    let folder = folder.context("find the folder of the BPF objects")?;
    let mut objects = BTreeMap::new();
    for entry in fs::read_dir(folder).with_context(|| format!("list {folder}"))? {
        let path = entry.with_context(|| format!("list {folder}"))?.path();
        if path.is_file() {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let object = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
            objects.insert(name.into_owned(), object);
        }
    }
    ensure!(!objects.is_empty(), "{folder} has no BPF objects");
    Ok(objects)
}

/// # Errors
/// The objects for arm64 are not those of this processor.
fn compare(native: &BTreeMap<String, Vec<u8>>, arm64: &BTreeMap<String, Vec<u8>>) -> Result<()> {
    ensure!(
        native.keys().eq(arm64.keys()),
        "other BPF objects are built for arm64"
    );
    for (name, object) in native {
        ensure!(
            arm64.get(name) == Some(object),
            "the BPF object `{name}` has other bytes for arm64"
        );
        println!("BPF object `{name}`: the same {} bytes", object.len());
    }
    Ok(())
}

/// Makes the machine's file system, which it has in memory. Returns the archive of it.
fn furnish(base: &Path, agent: &Path, programs: &BTreeMap<String, PathBuf>) -> Result<PathBuf> {
    let folder = Path::new(FOLDER);
    let root = folder.join("root");
    let _ = fs::remove_dir_all(&root);
    run(Command::new("cp")
        .args(["-a", "--reflink=auto"])
        .arg(base)
        .arg(&root))?;
    for name in UNUSED {
        let unused = root.join(name);
        fs::remove_dir_all(&unused).with_context(|| format!("remove {}", unused.display()))?;
    }
    // The packages' scripts, which would make these, have not run.
    symlink("bash", root.join("bin/sh")).context("make a link to the shell")?;
    for (path, text) in [
        ("init", INIT),
        (
            "etc/passwd",
            "root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n",
        ),
        ("etc/machine-id", "0123456789abcdef0123456789abcdef\n"),
        ("etc/group", "root:x:0:\nnogroup:x:65534:\n"),
    ] {
        fs::write(root.join(path), text).with_context(|| format!("write {path}"))?;
    }
    let executable = fs::Permissions::from_mode(0o755);
    fs::set_permissions(root.join("init"), executable).context("make init executable")?;
    fs::create_dir(root.join("tests")).context("create the folder of the tests")?;
    let programs = programs
        .iter()
        .map(|(name, path)| (path.as_path(), root.join("tests").join(name)));
    for (from, to) in programs.chain([(agent, root.join("filter-agent"))]) {
        run(Command::new("aarch64-linux-gnu-strip")
            .arg("-o")
            .args([to.as_path(), from]))?;
    }
    // Tests read these where the sources are.
    let samples = Path::new("filter-agent/tests");
    let samples = samples
        .canonicalize()
        .with_context(|| format!("find {}", samples.display()))?;
    let place = root.join(samples.strip_prefix("/").context("place the samples")?);
    fs::create_dir_all(&place).with_context(|| format!("create {}", place.display()))?;
    run(Command::new("cp")
        .arg("-a")
        .arg(samples.join("."))
        .arg(&place))?;
    let image = folder.join("root.cpio");
    run(Command::new("sh")
        .args([
            "-c",
            r#"cd "$0" && find . | cpio --quiet --create --format newc > ../root.cpio"#,
        ])
        .arg(&root))?;
    Ok(image)
}

/// An emulated machine. Killed when dropped.
struct Machine {
    qemu: Child,
    lines: Receiver<String>,
    console: File,
    deadline: Instant,
}

impl Machine {
    fn boot(base: &Path, image: &Path) -> Result<Self> {
        println!("==> boot arm64");
        let console = Path::new(FOLDER).join("console.log");
        let console = File::create(&console).context("create the console's log")?;
        // QEMU is killed even if this program is.
        let mut qemu = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "qemu-system-aarch64"])
            // The usual algorithm of pointer authentication takes half of the time of an emulated processor.
            .args(["-machine", "virt", "-cpu", "max,pauth-impdef=on"])
            .args(["-smp", "2", "-m", "2048"])
            .args(["-display", "none", "-serial", "stdio", "-no-reboot"])
            .args(["-nic", "none", "-append"])
            .arg("console=ttyAMA0 loglevel=1 panic=-1")
            .arg("-kernel")
            .arg(kernel(base)?)
            .arg("-initrd")
            .arg(image)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("start qemu-system-aarch64")?;
        let printed = qemu.stdout.take();
        let (sender, lines) = mpsc::channel();
        let machine = Self {
            qemu,
            lines,
            console,
            deadline: Instant::now() + LIMIT,
        };
        let mut printed = BufReader::new(printed.context("read the console")?);
        // Ends with QEMU, or with the machine.
        thread::spawn(move || {
            let mut line = Vec::new();
            while printed
                .read_until(b'\n', &mut line)
                .is_ok_and(|read| read > 0)
            {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                if sender.send(text).is_err() {
                    break;
                }
                line.clear();
            }
        });
        Ok(machine)
    }

    /// The next line of the console.
    fn line(&mut self) -> Result<String> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let line = self.lines.recv_timeout(left);
        let line = line.with_context(|| {
            format!("wait for the tests, {LIMIT:?} at most; see {FOLDER}/console.log")
        })?;
        writeln!(self.console, "{line}").context("write the console's log")?;
        Ok(line)
    }

    /// Follows the tests, and prints a line about each program.
    ///
    /// # Errors
    /// A test failed or did not run, or they have not ended in time.
    fn run_tests(mut self, programs: usize) -> Result<()> {
        let mut ended = 0;
        let mut failed = Vec::new();
        let mut begin = Instant::now();
        // Of the program that runs.
        let (mut name, mut listed, mut result) = (String::new(), String::new(), String::new());
        println!("{:<16}{:>8}  result", "program", "seconds");
        loop {
            let line = self.line()?;
            let words: Vec<&str> = line.split(' ').collect();
            match words[..] {
                ["@booted", release] => println!(
                    "{:<16}{:>8.1}  Linux {release}",
                    "boot",
                    begin.elapsed().as_secs_f64()
                ),
                ["@begin", program, tests] => {
                    begin = Instant::now();
                    (name, listed) = (program.into(), tests.into());
                    result.clear();
                }
                ["test", "result:", ..] => result = line.clone(),
                ["test", test, "...", "FAILED"] => failed.push(format!("{name}: {test}")),
                ["@end", status] => {
                    let seconds = begin.elapsed().as_secs_f64();
                    println!("{name:<16}{seconds:>8.1}  {result}");
                    ended += 1;
                    // Each that it lists, and none ignored.
                    let passed = format!("test result: ok. {listed} passed; 0 failed; 0 ignored;");
                    if status != "0" || listed == "0" || !result.starts_with(&passed) {
                        failed.push(format!(
                            "{name}: not each of {listed} tests passed, status {status}"
                        ));
                    }
                }
                ["@done"] => break,
                _ => {}
            }
        }
        ensure!(
            failed.is_empty(),
            "on arm64, see {FOLDER}/console.log: {}",
            failed.join(", ")
        );
        ensure!(ended == programs, "{ended} of {programs} test programs ran");
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

fn kernel(base: &Path) -> Result<PathBuf> {
    let boot = base.join("boot");
    let files = fs::read_dir(&boot).with_context(|| format!("list {}", boot.display()))?;
    let is_kernel = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default();
        name.to_string_lossy().starts_with("vmlinuz-")
    };
    files
        .filter_map(|file| Some(file.ok()?.path()))
        .find(is_kernel)
        .with_context(|| format!("find a kernel in {}", boot.display()))
}
