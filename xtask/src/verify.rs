//! What the running kernel's verifier makes of the program.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context as _, Result, ensure};

use crate::{build, target_directory};

/// Instructions that the verifier may follow, of the million it would: a change that doubles them is a
/// mistake. Linux 6.18 follows some 45,000.
const INSTRUCTIONS: u64 = 80_000;

pub fn verify() -> Result<()> {
    build(&["--release"])?;
    let object = object()?;
    // In a mount namespace of its own, with a BPF file system that goes with it.
    let script = "mount -t bpf bpf /mnt && exec bpftool --debug prog load \"$0\" /mnt/filter";
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", script])
        .arg(&object)
        .output()
        .context("start unshare")?;
    let log = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    ensure!(
        output.status.success(),
        "the kernel refuses the program:\n{}",
        log.lines().rev().take(20).collect::<Vec<_>>().join("\n")
    );
    let word_after = |text: &str| -> Option<&str> {
        let rest = &log[log.rfind(text)? + text.len()..];
        rest.split_whitespace().next()
    };
    let instructions = word_after("processed ").and_then(|word| word.parse::<u64>().ok());
    let instructions = instructions.context("find the instructions in the log")?;
    // Of the program, and of each function that it calls. The kernel refuses more than 512 together.
    let stack = word_after("stack depth ").context("find the stack in the log")?;
    println!("{instructions} instructions verified, {stack} bytes of stack");
    ensure!(
        instructions <= INSTRUCTIONS,
        "more than {INSTRUCTIONS} instructions verified"
    );
    Ok(())
}

/// The BPF object built last.
fn object() -> Result<PathBuf> {
    let builds = target_directory()?.join("release/build");
    let list = fs::read_dir(&builds).with_context(|| format!("list {}", builds.display()))?;
    let objects = list.filter_map(|entry| {
        let path = entry.ok()?.path().join("out/filter");
        let made = fs::metadata(&path).and_then(|data| data.modified()).ok()?;
        Some((made, path))
    });
    let newest: Option<(SystemTime, PathBuf)> = objects.max();
    let (_, path) = newest.context("find the BPF object")?;
    Ok(path)
}
