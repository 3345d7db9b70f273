//! The harness of every network test: throw-away namespaces, the real agent in one of them, and a
//! tripwire that counts what should never have arrived.

use std::{
    env,
    fmt::Write as _,
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        linux::net::SocketAddrExt as _,
        unix::{self, net::UnixListener, process::CommandExt as _},
    },
    path::{Path, PathBuf},
    process::{Child, ChildStderr, Command, ExitStatus, Output, Stdio},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{self, Receiver},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use filter_common::Protocol;
use ipnet::IpNet;
use nix::{
    errno::Errno,
    ifaddrs::getifaddrs,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns},
    sys::{
        signal::{Signal, kill},
        socket::{
            AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, bind, recvfrom, setsockopt,
            socket, sockopt,
        },
    },
    unistd::{Pid, geteuid, write},
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};
use serde_json::Value;
use socket2::{Domain, SockRef, Socket, Type};

use crate::frames::Addressing;

/// The database host's addresses.
pub const DB4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
pub const DB6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
/// More local addresses of the database host, for databases with `addresses:`.
pub const OTHER_DB4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 3);
pub const OTHER_DB6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 3);
/// The client's addresses on the link.
pub const CLIENT4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
pub const CLIENT6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);

/// The client's addresses that policies allow, or do not.
pub const ALLOWED4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
pub const ALLOWED6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x10);
pub const DENIED4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
pub const DENIED6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xdead, 0, 0, 0, 0, 7);
/// Next to the allowed ones, on both sides.
pub const NEIGHBOURS: [IpAddr; 4] = [
    IpAddr::V4(Ipv4Addr::new(203, 0, 113, 9)),
    IpAddr::V4(Ipv4Addr::new(203, 0, 113, 11)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0xf)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x11)),
];

pub const DB_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// Packet type of frames that this host sent (packet(7)).
const PACKET_OUTGOING: u8 = 4;

/// Limit of every wait for something that must happen: so long that a busy machine does not reach it.
pub const PATIENCE: Duration = Duration::from_secs(180);
/// Time without an answer after which a connection attempt is checked for silence: longer than Linux
/// waits before it sends a SYN again, so that one lost packet decides nothing.
const SILENCE: Duration = Duration::from_millis(1500);
/// Time that a datagram's answer may take before the next datagram is sent.
const DATAGRAM_RETRY: Duration = Duration::from_millis(300);
/// A port that no test listens on or protects: the host answers each SYN with a reset.
const CLOSED_PORT: u16 = 1;

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

/// What the tripwire watches: packets to these ports from any source that is not allowed.
#[derive(Clone)]
pub struct Protected {
    pub protocol: Protocol,
    pub port: u16,
    /// Local addresses; empty: all.
    pub addresses: Vec<IpAddr>,
    pub allowed: Vec<IpNet>,
}

impl Protected {
    pub fn new(protocol: Protocol, port: u16, allowed: &[&str]) -> Self {
        let allowed = allowed.iter().map(|prefix| prefix.parse().unwrap());
        Self {
            protocol,
            port,
            addresses: Vec::new(),
            allowed: allowed.collect(),
        }
    }

    pub fn tcp(port: u16, allowed: &[&str]) -> Self {
        Self::new(Protocol::Tcp, port, allowed)
    }

    pub fn udp(port: u16, allowed: &[&str]) -> Self {
        Self::new(Protocol::Udp, port, allowed)
    }

    #[must_use]
    pub fn at(mut self, addresses: &[IpAddr]) -> Self {
        self.addresses = addresses.to_vec();
        self
    }
}

/// The running agent.
struct Agent {
    child: Child,
    lines: Receiver<String>,
}

/// A database host and a client, joined by a veth pair: `eth0` in both namespaces.
pub struct Net {
    name: String,
    agent: Option<Agent>,
    /// What the agent wrote to stderr, as far as it was read.
    pub log: Vec<String>,
    /// Whether the agent sees the namespace's own `/etc/resolv.conf` and `/etc/hosts`.
    pub own_resolver: bool,
    /// What runs as the agent.
    pub binary: PathBuf,
    pub db: Namespace,
    pub client: Namespace,
    /// At the far ends of `eth1` and so on.
    pub more_clients: Vec<Namespace>,
    dir: PathBuf,
    has_tripwire: bool,
    _claim: UnixListener,
}

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
    /// `name` is the test's, and must be no other's.
    pub fn new(name: &str) -> Self {
        assert!(
            geteuid().is_root(),
            "network tests need root: they make network namespaces and load BPF programs"
        );
        let claim = claim(name);
        let dir = env::temp_dir().join(format!("filter-tests-{name}"));
        clean(&dir);
        let bpffs = dir.join("bpffs");
        fs::create_dir_all(&bpffs).unwrap();
        let none = None::<&str>;
        mount(Some("bpf"), &bpffs, Some("bpf"), MsFlags::empty(), none).unwrap();
        let net = Self {
            name: name.into(),
            agent: None,
            log: Vec::new(),
            own_resolver: false,
            binary: agent_binary().to_owned(),
            db: Namespace::new(format!("{name}-db")),
            client: Namespace::new(format!("{name}-client")),
            more_clients: Vec::new(),
            dir,
            has_tripwire: true,
            _claim: claim,
        };
        // Sources of every kind must reach the filter and get their answers.
        let lenient = [
            ("ipv4/conf/all/rp_filter", 0),
            ("ipv4/conf/default/rp_filter", 0),
        ];
        net.db.sysctl(&lenient);
        net.client.sysctl(&lenient);
        net.make_pair();
        net.watch(&[]);
        net
    }

    /// Makes `eth0`, which a test may have deleted.
    pub fn make_pair(&self) {
        self.db.ip(&format!(
            "link add eth0 address {} type veth peer name eth0 address {} netns {}",
            mac(DB_MAC),
            mac(CLIENT_MAC),
            self.client.name
        ));
        let mut batch = String::from("link set eth0 up\n");
        for address in [CLIENT4, ALLOWED4, DENIED4].map(IpAddr::from) {
            let length = if address == CLIENT4 { 24 } else { 32 };
            writeln!(batch, "address add {address}/{length} dev eth0").unwrap();
        }
        for address in [CLIENT6, ALLOWED6, DENIED6].map(IpAddr::from) {
            let length = if address == CLIENT6 { 64 } else { 128 };
            writeln!(batch, "address add {address}/{length} dev eth0 nodad").unwrap();
        }
        for address in NEIGHBOURS {
            writeln!(batch, "address add {address} dev eth0 nodad").unwrap();
        }
        self.client.ip(&batch);
        self.db.ip(&format!(
            "link set eth0 up
             address add {DB4}/24 dev eth0
             address add {OTHER_DB4}/24 dev eth0
             address add {DB6}/64 dev eth0 nodad
             address add {OTHER_DB6}/64 dev eth0 nodad preferred_lft 0
             route add default via {CLIENT4} dev eth0
             route add default via {CLIENT6} dev eth0"
        ));
    }

    /// A host behind the client, which forwards to it no packet larger than `mtu`.
    pub fn add_host_behind_client(&self, v4: Ipv4Addr, v6: Ipv6Addr, mtu: u32) -> Namespace {
        let far = Namespace::new(format!("{}-far", self.name));
        self.client
            .sysctl(&[("ipv4/ip_forward", 1), ("ipv6/conf/all/forwarding", 1)]);
        self.client.ip(&format!(
            "link add far type veth peer name eth0 netns {}
             link set far up
             address add 192.168.0.1/24 dev far
             address add fd0f::1/64 dev far nodad
             route add {v4}/32 via 192.168.0.2 dev far mtu lock {mtu}
             route add {v6}/128 via fd0f::2 dev far mtu lock {mtu}",
            far.name
        ));
        far.ip(&format!(
            "link set eth0 up
             address add 192.168.0.2/24 dev eth0
             address add fd0f::2/64 dev eth0 nodad
             address add {v4}/32 dev eth0
             address add {v6}/128 dev eth0 nodad
             route add default via 192.168.0.1 dev eth0
             route add default via fd0f::1 dev eth0"
        ));
        far
    }

    /// Another interface of the database host (`eth1` and so on), with the client `10.0.<n>.2`.
    pub fn add_client(&mut self) -> &Namespace {
        let n = self.more_clients.len() + 1;
        let client = Namespace::new(format!("{}-client{n}", self.name));
        self.db.ip(&format!(
            "link add eth{n} type veth peer name eth0 netns {}
             link set eth{n} up
             address add 10.0.{n}.1/24 dev eth{n}",
            client.name
        ));
        client.ip(&format!(
            "link set eth0 up
             address add 10.0.{n}.2/24 dev eth0
             route add default via 10.0.{n}.1 dev eth0"
        ));
        self.more_clients.push(client);
        &self.more_clients[n - 1]
    }

    /// Makes the neighbour entries of the link permanent, for frames that must not wait for any.
    pub fn fix_neighbours(&self) {
        let client = mac(CLIENT_MAC);
        let db = mac(DB_MAC);
        self.db.ip(&format!(
            "neighbour replace {CLIENT4} lladdr {client} dev eth0 nud permanent
             neighbour replace {CLIENT6} lladdr {client} dev eth0 nud permanent"
        ));
        for address in [IpAddr::from(DB4), DB6.into(), OTHER_DB4.into()] {
            self.client.ip(&format!(
                "neighbour replace {address} lladdr {db} dev eth0 nud permanent"
            ));
        }
    }

    /// Counts, from now on, the SYNs to a port that the client sends over the link and those that
    /// pass the filter there. Call it before the client sends any.
    pub fn count_syns(&self, port: u16) {
        for (namespace, hook, interface) in [
            (&self.client, "output", "oifname"),
            (&self.db, "prerouting", "iifname"),
        ] {
            let ruleset = format!(
                "table inet syns {{
                    counter syns {{}}
                    chain syns {{
                        type filter hook {hook} priority -300
                        {interface} eth0 tcp dport {port} tcp flags & (syn | ack) == syn \
                            counter name syns
                    }}
                }}\n"
            );
            namespace.run(|| feed(Command::new("nft").args(["-f", "-"]), &ruleset));
        }
    }

    /// Asserts that each SYN counted was sent and passed the filter, and that some were.
    #[track_caller]
    pub fn assert_all_syns_passed(&self) {
        let count = |namespace: &Namespace| {
            let mut command = Command::new("nft");
            command.args(["-j", "list", "counter", "inet", "syns", "syns"]);
            counter(&namespace.output(&mut command))
        };
        let (mut sent, mut passed) = (0, 0);
        let all = wait_until(|| {
            (sent, passed) = (count(&self.client), count(&self.db));
            sent == passed
        });
        assert!(all && sent > 0, "{sent} SYNs were sent and {passed} passed");
    }

    /// Gives the client one more address to connect from.
    pub fn add_source(&self, source: IpAddr) {
        let length = if source.is_ipv4() { 32 } else { 128 };
        self.client
            .ip(&format!("address add {source}/{length} dev eth0 nodad"));
    }

    pub fn policy_path(&self) -> PathBuf {
        self.dir.join("policy.yaml")
    }

    pub fn state_dir(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// Waits until the policy in force is on disk, which a start does not wait for.
    pub fn wait_until_confirmed(&self) {
        let confirmed = self.state_dir().join("confirmed.json");
        assert!(wait_until(|| confirmed.exists()), "no policy was confirmed");
    }

    pub fn bpffs(&self) -> PathBuf {
        self.dir.join("bpffs")
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.join("control.sock")
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

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
            command.arg("--state-dir").arg(self.state_dir());
        }
        command
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

    /// Starts an agent that must not come up, and returns the one line it says.
    pub fn refusal(&self, arguments: &[&str]) -> String {
        let mut command = self.agent_command(&[&["run"], arguments].concat());
        self.refused(&mut command)
    }

    /// The same with another bpffs and socket, as if it were another host's.
    pub fn refusal_elsewhere(&self, bpffs: &Path, socket: &Path) -> String {
        let mut command = Command::new(agent_binary());
        command.arg("run").arg("--policy").arg(self.policy_path());
        command.arg("--bpffs").arg(bpffs);
        command.arg("--socket").arg(socket);
        command.arg("--state-dir").arg(self.dir.join("elsewhere"));
        self.refused(&mut command)
    }

    /// The same without root.
    pub fn refusal_without_root(&self) -> String {
        let mut command = self.agent_command(&["run"]);
        command.uid(65534).gid(65534);
        self.refused(&mut command)
    }

    /// The same where every call of bpf(2) fails with this error.
    pub fn refusal_without_bpf(&self, error: Errno) -> String {
        self.refusal_where_calls_fail(nix::libc::SYS_bpf, Vec::new(), error)
    }

    /// The same where every call of bpf(2) with this command fails with this error.
    pub fn refusal_without_bpf_command(&self, command: u32, error: Errno) -> String {
        let (length, operator) = (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq);
        let is_command = SeccompCondition::new(0, length, operator, command.into()).unwrap();
        let rules = vec![SeccompRule::new(vec![is_command]).unwrap()];
        self.refusal_where_calls_fail(nix::libc::SYS_bpf, rules, error)
    }

    /// The same where it cannot open a netlink socket.
    pub fn refusal_without_netlink(&self) -> String {
        let (length, operator) = (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq);
        let netlink = AddressFamily::Netlink as u64;
        let is_netlink = SeccompCondition::new(0, length, operator, netlink).unwrap();
        let rules = vec![SeccompRule::new(vec![is_netlink]).unwrap()];
        self.refusal_where_calls_fail(nix::libc::SYS_socket, rules, Errno::EPERM)
    }

    /// `rules`: which calls; none means all of them.
    fn refusal_where_calls_fail(&self, call: i64, rules: Vec<SeccompRule>, error: Errno) -> String {
        let filter = SeccompFilter::new(
            [(call, rules)].into(),
            SeccompAction::Allow,
            SeccompAction::Errno(error as u32),
            std::env::consts::ARCH.try_into().unwrap(),
        );
        let filter: BpfProgram = filter.unwrap().try_into().unwrap();
        let mut command = self.agent_command(&["run"]);
        self.refused_after(&mut command, || seccompiler::apply_filter(&filter).unwrap())
    }

    fn refused(&self, command: &mut Command) -> String {
        self.refused_after(command, || {})
    }

    /// `prepare`: what is done to the thread that starts the agent.
    fn refused_after(&self, command: &mut Command, prepare: impl FnOnce() + Send) -> String {
        command.stdin(Stdio::null()).stderr(Stdio::piped());
        let mut child = self.db.run(|| {
            prepare();
            command.spawn().unwrap()
        });
        let Some(status) = wait(&mut child) else {
            child.kill().unwrap();
            panic!("the agent started although it should have refused");
        };
        let stderr = io::read_to_string(child.stderr.unwrap()).unwrap();
        assert_eq!(status.code(), Some(1), "{stderr}");
        assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
        stderr.trim_end().into()
    }

    pub fn signal(&self, signal: Signal) {
        let agent = self.agent.as_ref().expect("the agent runs");
        let pid = i32::try_from(agent.child.id()).unwrap();
        kill(Pid::from_raw(pid), signal).unwrap();
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

    /// SIGHUP, which makes the agent read the policy file again.
    pub fn hang_up(&self) {
        self.signal(Signal::SIGHUP);
    }

    /// Runs a command of the agent's.
    pub fn agent(&self, arguments: &[&str]) -> Output {
        self.db.output(&mut self.agent_command(arguments))
    }

    /// Standard output of a command that must succeed.
    pub fn agent_text(&self, arguments: &[&str]) -> String {
        let output = self.agent(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {stderr}");
        String::from_utf8(output.stdout).unwrap()
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

    /// Waits until no XDP program runs on an interface of the database host: the kernel frees the
    /// links of removed pins a moment later.
    #[track_caller]
    pub fn assert_detached(&self, interface: &str) {
        let mut text = String::new();
        let detached = wait_until(|| {
            let mut command = Command::new("ip");
            let output = self.db.output(command.args(["link", "show", interface]));
            text = String::from_utf8(output.stdout).unwrap();
            text.contains(interface) && !text.contains("xdp")
        });
        assert!(detached, "{text}");
    }

    /// Packets of the tripwire: a rule on the input hook counts whatever arrives at a protected
    /// port from a source that is not allowed. Must be 0 when a test ends, or the test fails.
    ///
    /// A packet that arrives in fragments counts with its first one, if that holds the ports: on
    /// IPv6 the hook comes before reassembly. Where a header chain is cut before the ports nothing
    /// counts here, and only the receiving socket tells.
    pub fn tripwire(&self) -> u64 {
        let mut command = Command::new("nft");
        command.args(["-j", "list", "counter", "inet", "tripwire", "foreign"]);
        let output = self.db.output(&mut command);
        assert!(output.status.success(), "the tripwire was removed");
        counter(&output)
    }

    /// Counts from 0 again, for a test that means to set the tripwire off.
    pub fn reset_tripwire(&self) {
        let mut command = Command::new("nft");
        command.args(["reset", "counter", "inet", "tripwire", "foreign"]);
        assert!(self.db.output(&mut command).status.success());
    }

    /// For a benchmark, in which its cost would show.
    pub fn remove_tripwire(&mut self) {
        let mut command = Command::new("nft");
        command.args(["delete", "table", "inet", "tripwire"]);
        self.db.run(|| succeed(&mut command));
        self.has_tripwire = false;
    }

    /// Says what the tripwire watches from now on. What it counted stays.
    ///
    /// Call it after the agent enforces a narrower policy, and before it enforces a wider one.
    pub fn watch(&self, protected: &[Protected]) {
        let mut ruleset = String::from(
            "table inet tripwire {
                counter foreign {}
                chain input { type filter hook input priority -300; }
            }
            flush chain inet tripwire input\n",
        );
        for Protected {
            protocol,
            port,
            addresses,
            allowed,
        } in protected
        {
            for (family, is_v4) in [("ip", true), ("ip6", false)] {
                let of_family = |list: Vec<String>| format!("{{ {} }}", list.join(", "));
                let everywhere = addresses.is_empty();
                let addresses: Vec<String> = addresses
                    .iter()
                    .filter(|address| address.is_ipv4() == is_v4)
                    .map(ToString::to_string)
                    .collect();
                let allowed: Vec<String> = IpNet::aggregate(allowed)
                    .iter()
                    .filter(|prefix| prefix.addr().is_ipv4() == is_v4)
                    .map(ToString::to_string)
                    .collect();
                if addresses.is_empty() && !everywhere {
                    continue;
                }
                let local = match (everywhere, is_v4) {
                    (true, true) => "meta nfproto ipv4".into(),
                    (true, false) => "meta nfproto ipv6".into(),
                    (false, _) => format!("{family} daddr {}", of_family(addresses)),
                };
                let foreign = if allowed.is_empty() {
                    String::new()
                } else {
                    format!("{family} saddr != {}", of_family(allowed))
                };
                let protocol = protocol.name();
                writeln!(
                    ruleset,
                    "add rule inet tripwire input {local} {foreign} {protocol} dport {port} \
                     counter name foreign"
                )
                .unwrap();
            }
        }
        self.db
            .run(|| feed(Command::new("nft").args(["-f", "-"]), &ruleset));
    }

    /// Listens in the database host's namespace, on every local address.
    pub fn listen(&self, port: u16) -> TcpListener {
        self.listen_at(Ipv6Addr::UNSPECIFIED.into(), port)
    }

    pub fn listen_at(&self, address: IpAddr, port: u16) -> TcpListener {
        self.db.run(|| {
            let address = SocketAddr::new(address, port);
            let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
            socket.set_reuse_address(true).unwrap();
            socket.bind(&address.into()).unwrap();
            socket.listen(4096).unwrap();
            socket.into()
        })
    }

    /// A datagram socket of the database host, on every local address.
    pub fn receive(&self, port: u16) -> UdpSocket {
        self.db
            .run(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)).unwrap())
    }

    /// A server in the database host's namespace that answers every byte with itself.
    pub fn echo(&self, port: u16) -> Echo {
        Echo::start(self.listen(port))
    }

    pub fn echo_at(&self, address: IpAddr, port: u16) -> Echo {
        Echo::start(self.listen_at(address, port))
    }

    /// The same for datagrams.
    pub fn echo_datagrams(&self, port: u16) -> EchoDatagrams {
        EchoDatagrams::start(self.receive(port))
    }

    /// Whether datagrams from a source address of the client's are answered.
    pub fn exchange(&self, source: IpAddr, destination: SocketAddr, patience: Patience) -> bool {
        self.client.run(|| exchange(source, destination, patience))
    }

    /// Waits until the database host has received all that the client sent before.
    pub fn settle(&self) {
        self.client.run(|| fence(CLIENT4.into(), DB4.into()));
    }

    /// Tries to connect from a source address of the client's.
    pub fn connect(&self, source: IpAddr, destination: SocketAddr) -> Connection {
        self.client.run(|| connect(source, destination))
    }

    /// Sends 8 MiB from a source address of the client's to a server that echoes it.
    pub fn transfer(&self, source: IpAddr, destination: SocketAddr) {
        transfer(&self.client, source, destination);
    }

    /// The same for several at once.
    pub fn connect_all(&self, attempts: &[(IpAddr, SocketAddr)]) -> Vec<Connection> {
        thread::scope(|scope| {
            let threads: Vec<_> = attempts
                .iter()
                .map(|&(source, destination)| {
                    let client = &self.client;
                    scope.spawn(move || client.run(|| connect(source, destination)))
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        })
    }

    /// The client's end of the link, for frames made by hand.
    pub fn wire(&self) -> Wire {
        self.client.run(|| Wire::open("eth0"))
    }

    /// What the database host's network stack gets from the link, after the filter.
    pub fn passed(&self) -> Wire {
        self.db.run(|| Wire::open("eth0"))
    }
}

/// A TCP server that answers every byte with itself, until dropped.
pub struct Echo {
    listener: TcpListener,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    fn start(listener: TcpListener) -> Self {
        let accepting = listener.try_clone().unwrap();
        let thread = thread::spawn(move || {
            while let Ok((stream, _)) = accepting.accept() {
                thread::spawn(move || io::copy(&mut &stream, &mut &stream));
            }
        });
        Self {
            listener,
            thread: Some(thread),
        }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        // Wakes the thread up from `accept`.
        let _ = SockRef::from(&self.listener).shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A UDP server that answers every datagram with itself, until dropped.
pub struct EchoDatagrams {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl EchoDatagrams {
    fn start(socket: UdpSocket) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let interval = Some(Duration::from_millis(50));
        socket.set_read_timeout(interval).unwrap();
        let thread = thread::spawn(move || {
            let mut datagram = [0; 2048];
            while !stopped.load(Ordering::Relaxed) {
                if let Ok((length, source)) = socket.recv_from(&mut datagram) {
                    let _ = socket.send_to(&datagram[..length], source);
                }
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for EchoDatagrams {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A packet socket: frames as they are on the wire, both ways.
pub struct Wire {
    socket: OwnedFd,
}

impl Wire {
    fn open(interface: &str) -> Self {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let protocol = SockProtocol::EthAll;
        let socket = socket(AddressFamily::Packet, SockType::Raw, flags, protocol).unwrap();
        // The one safe way to a link-layer address that names the interface.
        let address = getifaddrs()
            .unwrap()
            .filter(|found| found.interface_name == interface)
            .find_map(|found| found.address?.as_link_addr().copied())
            .expect("the interface has a link-layer address");
        bind(socket.as_raw_fd(), &address).unwrap();
        setsockopt(&socket, sockopt::RcvBufForce, &(64 << 20)).unwrap();
        Self { socket }
    }

    pub fn send(&self, frame: &[u8]) {
        // Refused while the device's queue is full.
        let sent = wait_until(|| match write(&self.socket, frame) {
            Ok(_) => true,
            Err(Errno::ENOBUFS | Errno::EAGAIN) => false,
            Err(error) => panic!("send a frame of {} bytes: {error}", frame.len()),
        });
        assert!(sent, "the wire takes no frame");
    }

    /// The first 64 KiB of the next frame that arrived, if one did.
    pub fn receive(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 1 << 16];
        loop {
            match recvfrom::<LinkAddr>(self.socket.as_raw_fd(), &mut frame) {
                Ok((length, address)) => {
                    // The socket sees its own frames too.
                    if address.is_some_and(|from| from.pkttype() != PACKET_OUTGOING) {
                        frame.truncate(length);
                        return Some(frame);
                    }
                }
                Err(Errno::EAGAIN) => return None,
                Err(error) => panic!("receive a frame: {error}"),
            }
        }
    }
}

/// Clients that connect without a pause until they are stopped.
pub struct Hammer {
    stop: Arc<AtomicBool>,
    attempts: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Hammer {
    /// Connects from each source again and again, each time with a question and an answer.
    ///
    /// # Panics
    /// When stopped, if a connection failed.
    pub fn allowed(client: &Namespace, attempts: &[(IpAddr, SocketAddr)]) -> Self {
        Self::start(client, attempts, |source, destination| {
            let socket = bound(source);
            socket.set_linger(Some(Duration::ZERO)).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            let connected = socket.connect_timeout(&destination.into(), PATIENCE);
            connected.unwrap_or_else(|e| panic!("connect from {source} to {destination}: {e}"));
            let mut stream = TcpStream::from(socket);
            stream.write_all(b"ping").unwrap();
            let mut answer = [0; 4];
            stream.read_exact(&mut answer).unwrap();
        })
    }

    /// Tries to connect from each source again and again.
    ///
    /// # Panics
    /// When stopped, if any attempt was answered.
    pub fn denied(client: &Namespace, attempts: &[(IpAddr, SocketAddr)]) -> Self {
        Self::start(client, attempts, |source, destination| {
            let brief = Duration::from_millis(3);
            let error = bound(source).connect_timeout(&destination.into(), brief);
            let error = error.expect_err("a source that is not allowed connected");
            assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        })
    }

    fn start(
        client: &Namespace,
        attempts: &[(IpAddr, SocketAddr)],
        attempt: impl Fn(IpAddr, SocketAddr) + Copy + Send + 'static,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let made = Arc::new(AtomicU64::new(0));
        let threads = attempts.iter().map(|&(source, destination)| {
            let (stop, made) = (stop.clone(), made.clone());
            let name = client.name.clone();
            thread::spawn(move || {
                enter(&name);
                while !stop.load(Ordering::Relaxed) {
                    attempt(source, destination);
                    made.fetch_add(1, Ordering::Relaxed);
                }
            })
        });
        Self {
            threads: threads.collect(),
            attempts: made,
            stop,
        }
    }

    /// The number of attempts so far, of all sources together.
    pub fn attempts(&self) -> u64 {
        self.attempts.load(Ordering::Relaxed)
    }

    /// Whether a thread has panicked: it makes no more attempts.
    pub fn failed(&self) -> bool {
        self.threads.iter().any(JoinHandle::is_finished)
    }

    pub fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("a client failed");
        }
    }
}

/// Calls a closure with 0, 1 and so on: `least` times, and on until each hammer has made so many
/// attempts, however slow the machine is.
pub fn under_load(least: usize, hammers: &[(&Hammer, u64)], mut round: impl FnMut(usize)) {
    let deadline = Instant::now() + PATIENCE;
    for number in 0.. {
        let enough = hammers
            .iter()
            .all(|(hammer, least)| hammer.attempts() >= *least);
        let failed = hammers.iter().any(|(hammer, _)| hammer.failed());
        if number >= least && (enough || failed) {
            break;
        }
        assert!(
            number < least || Instant::now() < deadline,
            "the clients make no attempts"
        );
        round(number);
    }
}

/// A TCP socket that connects from this address, in the namespace of the calling thread.
pub fn bound(source: IpAddr) -> Socket {
    let domain = if source.is_ipv4() {
        Domain::IPV4
    } else {
        Domain::IPV6
    };
    let socket = Socket::new(domain, Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind(&SocketAddr::new(source, 0).into()).unwrap();
    socket
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
fn enter(name: &str) {
    let file = File::open(Path::new("/run/netns").join(name)).unwrap();
    setns(file, CloneFlags::CLONE_NEWNET).unwrap();
}

/// What came of a connection attempt. It is closed at once (with a reset, to leave no trace).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Connection {
    Accepted,
    /// A reset came back.
    Refused,
    /// No SYN-ACK and no reset: what a dropped SYN looks like.
    Silence,
}

/// Connects from a source address, in the namespace of the calling thread.
pub fn connect(source: IpAddr, destination: SocketAddr) -> Connection {
    let socket = bound(source);
    socket.set_linger(Some(Duration::ZERO)).unwrap();
    let mut result = socket.connect_timeout(&destination.into(), SILENCE);
    if is_timeout(&result) {
        // A busy machine may be late. When a later SYN is answered, an answer to ours is here too.
        fence(source, destination.ip());
        result = match socket.take_error().unwrap() {
            Some(error) => Err(error),
            None if socket.peer_addr().is_ok() => Ok(()),
            None => Err(io::ErrorKind::TimedOut.into()),
        };
    }
    match result {
        Ok(()) => Connection::Accepted,
        Err(error) => match error.kind() {
            io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => {
                Connection::Refused
            }
            io::ErrorKind::TimedOut => Connection::Silence,
            _ => panic!("connect from {source} to {destination}: {error}"),
        },
    }
}

fn is_timeout(result: &io::Result<()>) -> bool {
    matches!(result, Err(error) if error.kind() == io::ErrorKind::TimedOut)
}

/// Waits until a host resets a connection to its closed port: whatever was sent before on the same
/// link has arrived by then, and was answered if the kernel answers it.
fn fence(source: IpAddr, destination: IpAddr) {
    let address = SocketAddr::new(destination, CLOSED_PORT).into();
    let result = bound(source).connect_timeout(&address, PATIENCE);
    let refused = result.map_err(|error| error.kind());
    assert_eq!(
        refused,
        Err(io::ErrorKind::ConnectionRefused),
        "{source} does not reach {destination} at all"
    );
}

/// How long an answer to datagrams is waited for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Patience {
    /// As long as a busy machine takes: an answer must come.
    Long,
    /// For three datagrams: none must come.
    Short,
}

/// Whether datagrams are answered, in the namespace of the calling thread.
pub fn exchange(source: IpAddr, destination: SocketAddr, patience: Patience) -> bool {
    let socket = UdpSocket::bind((source, 0)).unwrap();
    socket.connect(destination).unwrap();
    socket.set_read_timeout(Some(DATAGRAM_RETRY)).unwrap();
    let answered = || {
        let mut answer = [0; 4];
        // Refused while the server is not there yet.
        let sent = socket.send(b"ping").is_ok();
        sent && matches!(socket.recv(&mut answer), Ok(4)) && answer == *b"ping"
    };
    match patience {
        // One may get lost.
        Patience::Long => wait_until(answered),
        Patience::Short => (0..3).any(|_| answered()),
    }
}

/// Sends 8 MiB to a server that echoes it.
pub fn transfer(client: &Namespace, source: IpAddr, destination: SocketAddr) {
    let data: Vec<u8> = (0..1_u32 << 21).flat_map(u32::to_be_bytes).collect();
    let socket = client.run(|| bound(source));
    let connected = socket.connect_timeout(&destination.into(), PATIENCE);
    connected.unwrap_or_else(|e| panic!("connect from {source} to {destination}: {e}"));
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut stream = TcpStream::from(socket);
    let mut writing = stream.try_clone().unwrap();
    let mut echoed = vec![0; data.len()];
    thread::scope(|scope| {
        let writer = scope.spawn(|| writing.write_all(&data).unwrap());
        stream.read_exact(&mut echoed).unwrap();
        writer.join().unwrap();
    });
    assert!(echoed == data, "the echo from {destination} differs");
}

impl Drop for Net {
    fn drop(&mut self) {
        if let Some(agent) = &mut self.agent {
            let _ = agent.child.kill();
            let _ = agent.child.wait();
            self.log.extend(agent.lines.iter());
        }
        if thread::panicking() {
            eprintln!("the agent wrote:\n{}", self.log.join("\n"));
            clean(&self.dir);
            return;
        }
        let arrived = if self.has_tripwire {
            self.tripwire()
        } else {
            0
        };
        clean(&self.dir);
        assert_eq!(
            arrived,
            0,
            "tripwire: packets of sources that are not allowed arrived at a protected port; \
             the agent wrote:\n{}",
            self.log.join("\n")
        );
    }
}

/// A policy for the interfaces named, with these databases (such as `dedicated` writes).
pub fn policy(interfaces: &str, mode: &str, databases: &[String]) -> String {
    let databases: String = databases.iter().map(|d| format!("  - {d}\n")).collect();
    format!(
        "interfaces: [{interfaces}]
mode: {mode}
regional_network: [10.1.0.0/16, 'fd01::/16']
databases:
{databases}"
    )
}

/// A dedicated database that these prefixes may reach. `more`: other fields of it.
pub fn dedicated(name: &str, port: u16, allowed: &[&str], more: &str) -> String {
    let rules: Vec<String> = allowed.iter().map(|p| format!("{{cidr: '{p}'}}")).collect();
    format!(
        "{{name: {name}, port: {port}, engine: postgresql, model: dedicated, force_tls: false, \
         rules: [{}], {more}}}",
        rules.join(", ")
    )
}

/// Waits for another run of the same test to end, and keeps the next one off its names. An abstract
/// socket goes with its process, however that ends.
fn claim(name: &str) -> UnixListener {
    let address = unix::net::SocketAddr::from_abstract_name(format!("filter-tests-{name}"));
    let address = address.unwrap();
    let mut claim = None;
    let claimed = (0..3).any(|_| {
        wait_until(|| {
            claim = UnixListener::bind_addr(&address).ok();
            claim.is_some()
        })
    });
    assert!(claimed, "another run of the test {name} does not end");
    claim.unwrap()
}

/// Removes a test's directory and what is mounted in it.
fn clean(dir: &Path) {
    for mounted in ["bpffs", "disk"] {
        let _ = umount2(&dir.join(mounted), MntFlags::MNT_DETACH);
    }
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            eprintln!("cannot remove {}: {error}", dir.display());
        }
        _ => {}
    }
}

fn mac(address: [u8; 6]) -> String {
    address.map(|byte| format!("{byte:02x}")).join(":")
}

/// Of packets from a source behind the client to a port of the database host.
pub fn addressing(source: IpAddr, port: u16, protocol: Protocol) -> Addressing {
    Addressing {
        source_mac: CLIENT_MAC,
        destination_mac: DB_MAC,
        source,
        destination: if source.is_ipv4() {
            DB4.into()
        } else {
            DB6.into()
        },
        source_port: 40_000,
        destination_port: port,
        protocol,
    }
}

/// The packets of the one counter that nft prints.
fn counter(output: &Output) -> u64 {
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    json["nftables"][1]["counter"]["packets"].as_u64().unwrap()
}

pub fn succeed(command: &mut Command) {
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {stderr}");
}

fn feed(command: &mut Command, input: &str) {
    command.stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(input.as_bytes()).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {stderr}\n{input}");
}

/// Waits for a process to end, for a bounded time.
pub fn wait(child: &mut Child) -> Option<ExitStatus> {
    let mut status = None;
    wait_until(|| {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    status
}

/// Whether a condition comes true within `PATIENCE`.
pub fn wait_until(mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if condition() {
            return true;
        }
        thread::sleep(Duration::from_millis(5));
    }
    condition()
}

/// The agent's binary, of the same profile as this test, built once.
pub fn agent_binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| build_agent("", &[]))
}

/// An agent whose maps have another layout, a later one.
pub fn next_layout_binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| build_agent("next-layout", &["--features", "next-layout"]))
}

/// `below`: the folder of the target directory, which this binary must not share with the other.
fn build_agent(below: &str, arguments: &[&str]) -> PathBuf {
    let test = env::current_exe().unwrap();
    // <target>/<profile>/deps/<test>
    let profile = test.ancestors().nth(2).unwrap();
    let target = profile.parent().unwrap().join(below);
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--quiet", "--package", "filter-agent"]);
    build.args(arguments).arg("--target-dir").arg(&target);
    if profile.ends_with("release") {
        build.arg("--release");
    }
    build.current_dir(env!("CARGO_MANIFEST_DIR"));
    // These describe this package to us. Build scripts of dependencies run again wherever they differ.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            build.env_remove(&name);
        }
    }
    let status = build.status().unwrap();
    assert!(status.success(), "cargo cannot build filter-agent");
    target
        .join(profile.file_name().unwrap())
        .join("filter-agent")
}
