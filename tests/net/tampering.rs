//! Makes system calls of the running agent fail or wait, by strace.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Child, ChildStderr, Command, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::net::hosts::Net;

/// A strace that does something to the agent's system calls, until it is stopped.
pub struct Tampering {
    strace: Child,
    log: PathBuf,
    _stderr: BufReader<ChildStderr>,
}

impl Tampering {
    /// Stops it. What it delayed goes on at once.
    pub fn stop(mut self) {
        let pid = i32::try_from(self.strace.id()).unwrap();
        kill(Pid::from_raw(pid), Signal::SIGINT).unwrap();
        self.strace.wait().unwrap();
        let calls = fs::read_to_string(&self.log).unwrap();
        let done = calls.contains("(INJECTED)") || calls.contains("(DELAYED)");
        assert!(done, "no call was tampered with: {calls}");
    }
}

impl Net {
    /// Has strace do something to system calls of all threads of the running agent: `error=EPERM`,
    /// `delay_enter=60s`. `calls`: their names, separated by commas.
    pub fn tamper(&self, calls: &str, how: &str) -> Tampering {
        let mut strace = Command::new("strace");
        strace.args(["-f", "-p", &self.agent_pid().to_string()]);
        strace.args(["-e", &format!("trace={calls}")]);
        strace.args(["-e", &format!("inject={calls}:{how}"), "-o"]);
        let log = self.dir.join("strace");
        strace.arg(&log).stdin(Stdio::null()).stderr(Stdio::piped());
        let mut strace = strace.spawn().unwrap();
        // Its first line says that it is attached. It ends if it cannot write the others.
        let mut stderr = BufReader::new(strace.stderr.take().unwrap());
        let mut line = String::new();
        stderr.read_line(&mut line).unwrap();
        assert!(line.contains("attached"), "{line}");
        Tampering {
            strace,
            log,
            _stderr: stderr,
        }
    }

    /// Lets the running agent neither open nor use a netlink socket meanwhile.
    pub fn without_netlink<T>(&self, meanwhile: impl FnOnce() -> T) -> T {
        let tampering = self.tamper("socket,sendto", "error=EPERM");
        let result = meanwhile();
        tampering.stop();
        result
    }
}
