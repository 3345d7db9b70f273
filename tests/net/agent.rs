//! The agent in the database host's namespace: its process, its log and its commands.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    process::{Command, ExitStatus, Output, Stdio},
    sync::mpsc,
    thread,
    time::Instant,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::net::{
    hosts::{Agent, Net},
    tripwire::Protected,
    wait::{PATIENCE, wait, wait_until},
};

impl Net {
    /// The policy file's text. A new file takes the old one's place whole, as editors and
    /// configuration tools do it.
    pub fn write_policy(&self, text: &str) {
        let next = self.dir.join("policy.yaml.next");
        fs::write(&next, text).unwrap();
        fs::rename(next, self.policy_path()).unwrap();
    }

    /// A command of the agent's, to be run in the database host's namespace.
    pub fn agent_command(&self, arguments: &[&str]) -> Command {
        let mut command = if self.own_resolver {
            let mut command = Command::new("ip");
            command
                .args(["netns", "exec", &self.db.name])
                .arg(&self.binary);
            command
        } else {
            Command::new(&self.binary)
        };
        command.args(arguments).current_dir(&self.dir);
        match arguments[0] {
            "run" => command.arg("--policy").arg(self.policy_path()),
            _ => &mut command,
        };
        if arguments[0] != "check" {
            command.arg("--socket").arg(self.socket());
        }
        if let "run" | "check" | "status" | "detach" = arguments[0] {
            command.arg("--bpffs").arg(self.bpffs());
        }
        if let "run" | "check" | "status" | "detach" | "history" = arguments[0] {
            command.arg("--state-dir").arg(self.state_dir());
        }
        command
    }

    /// A network in which an agent enforces this policy, and the tripwire watches.
    pub fn enforcing(name: &str, protected: &[Protected], policy: &str) -> Self {
        let mut net = Self::new(name);
        net.watch(protected);
        net.write_policy(policy);
        net.start();
        net
    }

    /// Starts the agent and waits until it enforces the policy.
    pub fn start(&mut self) {
        self.start_with(&[]);
    }

    pub fn start_with(&mut self, arguments: &[&str]) {
        self.spawn(arguments);
        self.wait_for_line("enforcing ");
    }

    /// Starts the agent and does not wait.
    pub fn spawn(&mut self, arguments: &[&str]) {
        self.spawn_logging_to(Stdio::piped(), arguments);
    }

    /// The same with another stderr, which the test reads itself.
    pub fn spawn_logging_to(&mut self, stderr: Stdio, arguments: &[&str]) {
        assert!(self.agent.is_none(), "the agent runs already");
        let mut command = self.agent_command(&[&["run"], arguments].concat());
        command.stdin(Stdio::null()).stderr(stderr);
        // As the unit has it.
        command.env("MALLOC_ARENA_MAX", "1");
        let mut child = self.db.run(|| command.spawn().unwrap());
        let (sender, lines) = mpsc::channel();
        if let Some(stderr) = child.stderr.take() {
            thread::spawn(move || {
                for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                    if sender.send(line).is_err() {
                        break;
                    }
                }
            });
        }
        self.agent = Some(Agent { child, lines });
    }

    /// Waits for the agent to log a line that begins so, and returns it.
    pub fn wait_for_line(&mut self, beginning: &str) -> String {
        let agent = self.agent.as_ref().expect("the agent runs");
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match agent.lines.recv_timeout(left) {
                Ok(line) => {
                    self.log.push(line.clone());
                    if line.starts_with(beginning) {
                        return line;
                    }
                }
                Err(error) => {
                    let log = self.log.join("\n");
                    panic!("no line `{beginning}...` of the agent ({error}), which wrote:\n{log}");
                }
            }
        }
    }

    /// Waits until the policy in force is on disk, which a start does not wait for.
    pub fn wait_until_confirmed(&self) {
        let confirmed = self.state_dir().join("confirmed.json");
        assert!(wait_until(|| confirmed.exists()), "no policy was confirmed");
    }

    pub fn signal(&self, signal: Signal) {
        let agent = self.agent.as_ref().expect("the agent runs");
        let pid = i32::try_from(agent.child.id()).unwrap();
        kill(Pid::from_raw(pid), signal).unwrap();
    }

    /// SIGHUP, which makes the agent read the policy file again.
    pub fn hang_up(&self) {
        self.signal(Signal::SIGHUP);
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        let mut agent = self.agent.take().expect("the agent runs");
        agent.child.kill().unwrap();
        agent.child.wait().unwrap();
    }

    /// SIGTERM, and waits until the agent is gone.
    pub fn terminate(&mut self) {
        self.signal(Signal::SIGTERM);
        let status = self.wait_for_exit();
        assert!(status.success(), "{status}: {}", self.log.join("\n"));
    }

    pub fn wait_for_exit(&mut self) -> ExitStatus {
        let mut agent = self.agent.take().expect("the agent runs");
        let status = wait(&mut agent.child).expect("the agent stops");
        self.log.extend(agent.lines.iter());
        status
    }

    pub fn agent_pid(&self) -> u32 {
        self.agent.as_ref().expect("the agent runs").child.id()
    }

    /// Peak and present resident memory of the agent, in KiB.
    pub fn memory(&self) -> (u64, u64) {
        let agent = self.agent.as_ref().expect("the agent runs");
        let status = fs::read_to_string(format!("/proc/{}/status", agent.child.id())).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        (field("VmHWM"), field("VmRSS"))
    }

    /// Runs a command of the agent's.
    pub fn agent(&self, arguments: &[&str]) -> Output {
        self.db.output(&mut self.agent_command(arguments))
    }

    /// Standard output of a command that must succeed.
    pub fn agent_text(&self, arguments: &[&str]) -> String {
        let output = self.agent(arguments);
        let stdout = String::from_utf8(output.stdout).unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        // A command whose change is in force, with an error beside, tells of it on standard output.
        assert!(output.status.success(), "{arguments:?}: {stdout}{stderr}");
        stdout
    }

    /// What a command prints as JSON, whether or not it succeeds.
    pub fn agent_json(&self, arguments: &[&str]) -> Value {
        let output = self.agent(&[arguments, &["--json"]].concat());
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
            let stderr = String::from_utf8_lossy(&output.stderr);
            panic!("{arguments:?} prints no JSON: {error}: {stderr}")
        })
    }

    /// The one line of a command that must fail.
    pub fn agent_error(&self, arguments: &[&str]) -> String {
        let output = self.agent(arguments);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {stderr}");
        assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
        stderr.trim_end().into()
    }

    /// Makes the agent enforce another policy.
    pub fn reload(&self, policy: &str) {
        self.write_policy(policy);
        self.agent_text(&["reload"]);
    }

    /// The same where it leaves something unguarded.
    pub fn reload_unprotected(&self, policy: &str) {
        self.write_policy(policy);
        self.agent_text(&["reload", "--allow-unprotect"]);
    }
}
