//! Removing what a demo made, and finding what is left of one.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::PREFIX;
use crate::{output, run};

/// Removes what demos left that were killed before they could clean up.
pub fn remove_those_of_the_dead() -> Result<()> {
    let mut ids = namespaces(PREFIX)?;
    let temporary = std::env::temp_dir();
    let entries = fs::read_dir(&temporary).context("list the temporary directory")?;
    ids.extend(entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()));
    let mut pids: Vec<u32> = ids
        .iter()
        .filter_map(|id| id.strip_prefix(PREFIX)?.split('-').next()?.parse().ok())
        .collect();
    pids.sort_unstable();
    pids.dedup();
    for pid in pids {
        if !Path::new("/proc").join(pid.to_string()).exists() {
            let id = format!("{PREFIX}{pid}");
            remove(&id, &temporary.join(&id))?;
        }
    }
    Ok(())
}

/// Removes a demo's processes, namespaces, mounts and files.
pub fn remove(id: &str, directory: &Path) -> Result<()> {
    for namespace in namespaces(&format!("{id}-"))? {
        end_processes(&namespace)?;
        run(Command::new("ip").args(["netns", "delete", &namespace]))?;
    }
    for mount in mounts(directory)? {
        run(Command::new("umount").arg(mount))?;
    }
    if directory.exists() {
        fs::remove_dir_all(directory).with_context(|| format!("remove {}", directory.display()))?;
    }
    Ok(())
}

fn end_processes(namespace: &str) -> Result<()> {
    // Killed outright, PostgreSQL would leave its shared memory behind.
    for signal in [Signal::SIGINT, Signal::SIGKILL] {
        for pid in processes(namespace)? {
            // It may have ended meanwhile.
            let _ = kill(pid, signal);
        }
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(30) {
            if processes(namespace)?.is_empty() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    bail!("processes in {namespace} do not end")
}

fn processes(namespace: &str) -> Result<Vec<Pid>> {
    let list = output(Command::new("ip").args(["netns", "pids", namespace]))?;
    let pids = list.lines().map(|pid| pid.parse().map(Pid::from_raw));
    pids.collect::<Result<_, _>>().context("read a process id")
}

pub fn what_is_left(id: &str, directory: &Path) -> Result<Vec<String>> {
    let mut left = namespaces(&format!("{id}-"))?;
    left.extend(mounts(directory)?);
    if directory.exists() {
        left.push(directory.display().to_string());
    }
    for process in fs::read_dir("/proc")
        .context("list the processes")?
        .flatten()
    {
        let command = fs::read(process.path().join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&command).contains(&*directory.to_string_lossy()) {
            left.push(format!("process {}", process.file_name().display()));
        }
    }
    Ok(left)
}

fn namespaces(prefix: &str) -> Result<Vec<String>> {
    let names = match fs::read_dir("/run/netns") {
        // It is made with the first namespace.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        names => names.context("list the namespaces")?,
    };
    let names = names.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    Ok(names.filter(|name| name.starts_with(prefix)).collect())
}

fn mounts(directory: &Path) -> Result<Vec<String>> {
    let table = fs::read_to_string("/proc/self/mounts").context("list the mounts")?;
    let points = table.lines().filter_map(|line| line.split(' ').nth(1));
    Ok(points
        .filter(|point| Path::new(point).starts_with(directory))
        .map(str::to_owned)
        .collect())
}
