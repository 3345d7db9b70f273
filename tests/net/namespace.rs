//! Network namespaces.

use std::{
    fs::{self, File},
    path::Path,
    process::{Command, Output},
    thread,
};

use nix::{
    sched::{CloneFlags, setns},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::net::command::{feed, succeed};

/// A network namespace, deleted when dropped.
pub struct Namespace {
    pub name: String,
}

impl Namespace {
    pub fn new(name: String) -> Self {
        // Left by a run that was killed, with what it had started there.
        if Path::new("/run/netns").join(&name).exists() {
            let mut command = Command::new("ip");
            let pids = command.args(["netns", "pids", &name]).output().unwrap();
            for pid in String::from_utf8(pids.stdout).unwrap().split_whitespace() {
                let _ = kill(Pid::from_raw(pid.parse().unwrap()), Signal::SIGKILL);
            }
            succeed(Command::new("ip").args(["netns", "delete", &name]));
        }
        succeed(Command::new("ip").args(["netns", "add", &name]));
        let namespace = Self { name };
        namespace.ip("link set lo up");
        namespace
    }

    /// Runs a closure in a thread inside the namespace. Sockets and child processes that it makes
    /// stay there.
    pub fn run<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> T {
        run_in(&self.name, inside)
    }

    /// Commands of `ip`, a line each.
    pub fn ip(&self, batch: &str) {
        let mut command = Command::new("ip");
        command.args(["-n", &self.name, "-batch", "-"]);
        feed(&mut command, batch);
    }

    pub fn output(&self, command: &mut Command) -> Output {
        self.run(|| command.output().unwrap())
    }

    /// Sets kernel parameters below `net/`.
    pub fn sysctl(&self, settings: &[(&str, u32)]) {
        self.run(|| {
            for (name, value) in settings {
                let path = Path::new("/proc/sys/net").join(name);
                let written = fs::write(&path, value.to_string());
                written.unwrap_or_else(|error| panic!("set {name} to {value}: {error}"));
            }
        });
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let delete = Command::new("ip")
            .args(["netns", "delete", &self.name])
            .status();
        if !delete.is_ok_and(|status| status.success()) {
            eprintln!("cannot delete the namespace {}", self.name);
        }
    }
}

/// Runs a closure in a thread inside the namespace of this name.
pub fn run_in<T: Send>(namespace: &str, inside: impl FnOnce() -> T + Send) -> T {
    let inside = || {
        enter(namespace);
        inside()
    };
    match thread::scope(|scope| scope.spawn(inside).join()) {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Moves the calling thread into a namespace.
pub(super) fn enter(name: &str) {
    let file = File::open(Path::new("/run/netns").join(name)).unwrap();
    setns(file, CloneFlags::CLONE_NEWNET).unwrap();
}
