//! Readers of the agent's log that end or stop, and a full disk under it, stop nothing.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufRead as _, BufReader, PipeReader, PipeWriter, Read as _, Write as _},
    net::{IpAddr, SocketAddr},
    os::{fd::AsRawFd as _, unix::fs::OpenOptionsExt as _},
    path::{Path, PathBuf},
    process::{Output, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::{Duration, Instant},
};

use filter_tests::net::{
    ALLOWED4, ALLOWED6, Connection, DB4, DB6, DENIED4, Net, Protected, wait, wait_until,
};
use nix::{
    libc::O_NONBLOCK,
    mount::{MsFlags, mount},
};

const PORT: u16 = 5432;
const DB: SocketAddr = SocketAddr::new(IpAddr::V4(DB4), PORT);
const DB_V6: SocketAddr = SocketAddr::new(IpAddr::V6(DB6), PORT);

/// Databases with a warning each at every reload.
const WARNINGS: usize = 120;

struct Fixture {
    net: Net,
    list: PathBuf,
}

impl Fixture {
    /// The agent runs, and logs to `stderr`.
    fn new(name: &str, stderr: impl Into<Stdio>) -> Self {
        Self::with(Net::new(name), stderr)
    }

    fn with(net: Net, stderr: impl Into<Stdio>) -> Self {
        let list = net.dir().join("list");
        let mut fixture = Self { net, list };
        fixture.list("192.0.2.1/32");
        fixture.net.write_policy(&fixture.policy("203.0.113.10/32"));
        fixture.watch(&["203.0.113.10/32"]);
        fixture.net.spawn_logging_to(stderr.into(), &[]);
        let mut status = None;
        let enforces = wait_until(|| {
            let status = status.insert(fixture.net.agent(&["status"]));
            status.status.success()
        });
        assert!(enforces, "{status:?}");
        fixture
    }

    fn watch(&self, allowed: &[&str]) {
        self.net.watch(&[Protected::tcp(PORT, allowed)]);
    }

    /// The content of region `list`.
    fn list(&self, prefixes: &str) {
        let next = self.net.dir().join("next");
        fs::write(&next, prefixes).unwrap();
        fs::rename(next, &self.list).unwrap();
    }

    fn policy(&self, allowed: &str) -> String {
        let open: String = (0..WARNINGS)
            .map(|i| {
                let port = 10_000 + i;
                format!(
                    "  - {{name: open{i}, port: {port}, model: dedicated, force_tls: false, \
                     rules: [{{cidr: 0.0.0.0/0}}]}}\n"
                )
            })
            .collect();
        format!(
            "interfaces: [eth0]
regions:
  list: {{file: {}}}
databases:
  - {{name: orders, port: {PORT}, model: dedicated, force_tls: false, \
     rules: [{{cidr: {allowed}}}, {{region: list}}]}}
{open}",
            self.list.display()
        )
    }

    fn gets_in(&self, expected: [Connection; 3]) {
        let attempts = [
            (ALLOWED4.into(), DB),
            (DENIED4.into(), DB),
            (ALLOWED6.into(), DB_V6),
        ];
        assert_eq!(self.net.connect_all(&attempts), expected);
    }

    /// Runs a command, which must end: an agent that waits for its reader answers none.
    fn command(&self, arguments: &[&str]) -> Output {
        let mut command = self.net.agent_command(arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.net.db.run(|| command.spawn().unwrap());
        if wait(&mut child).is_none() {
            child.kill().unwrap();
            panic!("{arguments:?} gets no answer");
        }
        child.wait_with_output().unwrap()
    }

    fn reload(&self, allowed: &str) {
        self.net.write_policy(&self.policy(allowed));
        let output = self.command(&["reload"]);
        assert!(output.status.success(), "{output:?}");
    }

    /// Everything is done as if somebody read the log. More lines are logged than wait for a reader.
    fn goes_on(&mut self) {
        use Connection::{Accepted, Silence};
        let _listener = self.net.listen(PORT);
        self.gets_in([Accepted, Silence, Silence]);
        for _ in 0..6 {
            self.reload("203.0.113.10/32");
            self.reload("192.0.2.9/32");
        }
        self.gets_in([Silence, Silence, Silence]);
        self.watch(&["198.51.100.7/32"]);
        self.reload("198.51.100.7/32");
        self.gets_in([Silence, Accepted, Silence]);
        self.watch(&["198.51.100.7/32", "2001:db8::10/128"]);
        self.list("2001:db8::10/128");
        let in_force = || self.net.connect(ALLOWED6.into(), DB_V6) == Accepted;
        assert!(wait_until(in_force), "the changed file is not in force");
        self.net.write_policy("databases: 7");
        assert_eq!(self.command(&["reload"]).status.code(), Some(1));
        self.gets_in([Silence, Accepted, Accepted]);
        let status = self.command(&["status"]);
        assert!(status.status.success(), "{status:?}");
    }

    fn ends(&mut self) {
        let start = Instant::now();
        self.net.terminate();
        let took = start.elapsed();
        assert!(took < Duration::from_secs(8), "it took {took:?} to end");
    }
}

/// Fills the pipe, so that the next write waits for its reader.
fn fill(writer: &PipeWriter) {
    // Opened again: flags set on the pipe's end would be the agent's too.
    let path = format!("/proc/self/fd/{}", writer.as_raw_fd());
    let mut full = OpenOptions::new()
        .write(true)
        .custom_flags(O_NONBLOCK)
        .open(path)
        .unwrap();
    for block in [&[b'x'; 4096][..], b"\n"] {
        while full.write(block).is_ok() {}
    }
}

fn read_lines(reader: PipeReader) -> Receiver<String> {
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(reader).lines().map_while(Result::ok) {
            let _ = sender.send(line);
        }
    });
    lines
}

fn is_report(line: &str) -> bool {
    let number = line.strip_suffix(" lines of the log were lost");
    number.is_some_and(|number| number.parse::<u64>().is_ok_and(|number| number > 0))
}

#[test]
fn reader_that_ended_stops_nothing() {
    let (reader, writer) = io::pipe().unwrap();
    let mut fixture = Fixture::new("log-closed", writer);
    drop(reader);
    fixture.goes_on();
    fixture.ends();
}

#[test]
fn reader_that_stopped_stops_nothing() {
    let (reader, writer) = io::pipe().unwrap();
    let mut fixture = Fixture::new("log-stopped", writer.try_clone().unwrap());
    fill(&writer);
    fixture.goes_on();
    fixture.ends();
    drop(reader);
}

#[test]
fn lost_lines_are_counted_when_the_reader_goes_on() {
    let (reader, writer) = io::pipe().unwrap();
    let mut fixture = Fixture::new("log-resumed", writer.try_clone().unwrap());
    fill(&writer);
    drop(writer);
    fixture.goes_on();
    let lines = read_lines(reader);
    let mut before = 0;
    loop {
        let line = lines.recv_timeout(Duration::from_secs(20)).unwrap();
        if is_report(&line) {
            break;
        }
        before += usize::from(line.starts_with("warning: "));
    }
    // What was queued before them comes first.
    assert!(before > 1000, "{before} lines were kept");
    fixture.reload("198.51.100.7/32");
    fixture.ends();
    let rest: Vec<String> = lines.iter().collect();
    assert!(rest.iter().any(|line| line.starts_with("enforcing ")));
    assert!(rest.iter().any(|line| line.starts_with("stopping; ")));
    assert!(!rest.iter().any(|line| is_report(line)), "{rest:?}");
}

/// A file system of a few pages; unmounted with the test's directory.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn new(directory: &Path) -> Self {
        let path = directory.join("disk");
        fs::create_dir(&path).unwrap();
        let options = Some("size=64k");
        mount(
            Some("tmpfs"),
            &path,
            Some("tmpfs"),
            MsFlags::empty(),
            options,
        )
        .unwrap();
        Self(path)
    }

    fn log(&self) -> PathBuf {
        self.0.join("log")
    }

    /// Leaves a few bytes for the log.
    fn fill(&self) {
        let mut log = OpenOptions::new().append(true).open(self.log()).unwrap();
        let length = usize::try_from(log.metadata().unwrap().len()).unwrap();
        let rest = 4096 - length % 4096;
        assert!(rest > 20, "{length}");
        log.write_all(&vec![b'x'; rest - 11]).unwrap();
        log.write_all(b"\n").unwrap();
        let mut filler = File::create(self.0.join("filler")).unwrap();
        while filler.write(&[0; 4096]).is_ok() {}
    }

    fn make_room(&self) {
        fs::remove_file(self.0.join("filler")).unwrap();
    }
}

#[test]
fn full_disk_stops_nothing_and_lost_lines_are_counted() {
    let net = Net::new("log-disk");
    let disk = SmallDisk::new(net.dir());
    let log = OpenOptions::new()
        .append(true)
        .create(true)
        .open(disk.log())
        .unwrap();
    let mut fixture = Fixture::with(net, log);
    let started = || {
        let text = fs::read_to_string(disk.log()).unwrap();
        text.contains("enforcing ")
    };
    assert!(wait_until(started));
    disk.fill();
    fixture.goes_on();
    disk.make_room();
    fixture.net.write_policy("databases: 7");
    fixture.net.agent_error(&["reload"]);
    let mut text = String::new();
    let reported = wait_until(|| {
        text.clear();
        let mut log = File::open(disk.log()).unwrap();
        log.read_to_string(&mut text).unwrap();
        text.lines().any(is_report)
    });
    assert!(reported, "{text}");
    let after = text.lines().position(is_report).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    // What there was room for of the line that was cut.
    assert_eq!(lines[after - 1].len(), 10, "{text}");
    assert!(
        lines[after + 1].starts_with("error: reload refused"),
        "{text}"
    );
    fixture.ends();
}

#[test]
fn agent_that_cannot_start_ends_whoever_reads() {
    let net = Net::new("log-refused");
    net.write_policy("databases: 7");
    let (closed, writer_of_closed) = io::pipe().unwrap();
    drop(closed);
    let (_stopped, writer) = io::pipe().unwrap();
    fill(&writer);
    for stderr in [writer_of_closed, writer] {
        let mut command = net.agent_command(&["run"]);
        command.stdin(Stdio::null()).stderr(stderr);
        let mut child = net.db.run(|| command.spawn().unwrap());
        let status = wait(&mut child);
        let _ = child.kill();
        let status = status.expect("the agent ends");
        assert_eq!(status.code(), Some(1), "{status}");
    }
}
