//! The client of a trace.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    process::{Child, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
};

use filter_tests::net::{Net, PATIENCE, wait};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

/// `filter-agent trace`, as it runs.
pub struct Reader {
    child: Child,
    lines: Receiver<Value>,
    /// The lines that were taken, without the first.
    pub taken: Vec<Value>,
}

impl Reader {
    /// Starts a trace, and waits until it is on.
    pub fn start(net: &Net, arguments: &[&str]) -> Self {
        let mut command = net.agent_command(&[&["trace", "--json"], arguments].concat());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = net.db.run(|| command.spawn().unwrap());
        let stdout = child.stdout.take().unwrap();
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(serde_json::from_str(&line).unwrap()).is_err() {
                    break;
                }
            }
        });
        let mut reader = Self {
            child,
            lines,
            taken: Vec::new(),
        };
        reader.wait_for(|line| line["tracing"].is_string());
        reader.taken.clear();
        reader
    }

    /// Waits for a line.
    #[track_caller]
    pub fn wait_for(&mut self, wanted: impl Fn(&Value) -> bool) -> Value {
        loop {
            let Ok(line) = self.lines.recv_timeout(PATIENCE) else {
                let mut error = String::new();
                let _ = self.child.kill();
                let mut stderr = self.child.stderr.take().unwrap();
                stderr.read_to_string(&mut error).unwrap();
                panic!("no such line; {error}; before: {:#?}", self.taken);
            };
            self.taken.push(line.clone());
            if wanted(&line) {
                return line;
            }
        }
    }

    /// Waits for a line with this in its text.
    #[track_caller]
    pub fn wait_for_text(&mut self, part: &str) -> Value {
        self.wait_for(|line| {
            line["text"]
                .as_str()
                .is_some_and(|text| text.contains(part))
        })
    }

    /// Waits for the last line, and returns why the trace ended.
    #[track_caller]
    pub fn wait_for_end(&mut self) -> String {
        let last = self.wait_for(|line| line["ended"].is_string());
        let status = wait(&mut self.child).expect("the command ends");
        assert!(status.success(), "{status}");
        last["ended"].as_str().unwrap().into()
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Ends the client, as Ctrl-C does.
    pub fn interrupt(mut self) {
        self.signal(Signal::SIGINT);
        wait(&mut self.child).expect("the command ends");
    }

    /// The exit status and the error of a trace that ends by itself.
    pub fn fail(mut self) -> String {
        let status = wait(&mut self.child).expect("the command ends");
        assert_eq!(status.code(), Some(1));
        let mut error = String::new();
        let mut stderr = self.child.stderr.take().unwrap();
        stderr.read_to_string(&mut error).unwrap();
        error
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The name of the program that runs on an interface of the database host.
pub fn program(net: &Net, interface: &str) -> String {
    let mut command = std::process::Command::new("ip");
    command.args(["-json", "-details", "link", "show", interface]);
    let links: Value = serde_json::from_slice(&net.db.output(&mut command).stdout).unwrap();
    let id = links[0]["xdp"]["prog"]["id"].to_string();
    let mut command = std::process::Command::new("bpftool");
    command.args(["--json", "prog", "show", "id", &id]);
    let program: Value = serde_json::from_slice(&command.output().unwrap().stdout).unwrap();
    program["name"].as_str().unwrap_or("none").into()
}
