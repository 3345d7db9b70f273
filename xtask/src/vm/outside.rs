//! The machine's surroundings: a network namespace with a DHCP server that is slow to answer, and
//! three clients that never stop trying.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::sched::{CloneFlags, setns};
use socket2::{Domain, SockRef, Socket, Type};

use crate::{output, run};

pub const NAMESPACE: &str = "filter-agent-vm";
pub const HOST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
pub const ALLOWED: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
pub const DENIED: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 3);
/// Two that temporary rules let in for a time, and one that the fleet's document does.
pub const GUESTS: [Ipv4Addr; 3] = [
    Ipv4Addr::new(10, 77, 0, 4),
    Ipv4Addr::new(10, 77, 0, 5),
    Ipv4Addr::new(10, 77, 0, 6),
];
pub const PORT: u16 = 5432;
/// Of the machine's `eth0`.
pub const HOST_MAC: &str = "52:54:00:77:00:01";

/// Seconds from a request for an address to the server's answer: much longer than the agent takes to
/// start, so that address and route come late.
const DHCP_DELAY: u32 = 8;

/// Longer than Linux waits before it sends a SYN again.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// Of the client without TLS, which need not be answered.
const CLEAR_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two connection attempts of the denied client: shorter than attaching a filter takes.
const DENIED_INTERVAL: Duration = Duration::from_millis(5);
/// Time that an attempt of the denied client may take before it is given up.
const DENIED_TIMEOUT: Duration = Duration::from_secs(1);

/// The network outside of the machine. Removed when dropped.
pub struct Namespace(());

impl Namespace {
    pub fn make() -> Result<Self> {
        // One that was left by a run that was killed.
        drop(Self(()));
        run(Command::new("ip").args(["netns", "add", NAMESPACE]))?;
        let made = Self(());
        made.ip("link set lo up")?;
        Ok(made)
    }

    /// Runs a command of ip(8) there.
    pub fn ip(&self, command: &str) -> Result<()> {
        run(Command::new("ip")
            .args(["-n", NAMESPACE])
            .args(command.split(' ')))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "delete", NAMESPACE])
            .stderr(Stdio::null())
            .status();
    }
}

/// The DHCP server and the clients in the namespace.
pub struct Outside {
    dhcp: Child,
    _namespace: Namespace,
    pub allowed: Allowed,
    pub denied: Denied,
    pub clear: Clear,
}

impl Outside {
    /// `folder`: where the DHCP server keeps its leases.
    pub fn start(folder: &Path) -> Result<Self> {
        let namespace = Namespace::make()?;
        for command in [
            "tuntap add dev tap0 mode tap".into(),
            "tuntap add dev tap1 mode tap".into(),
            format!("address add {ALLOWED}/24 dev tap0"),
            format!("address add {DENIED}/24 dev tap0"),
            format!("address add {}/24 dev tap0", GUESTS[0]),
            format!("address add {}/24 dev tap0", GUESTS[1]),
            format!("address add {}/24 dev tap0", GUESTS[2]),
            "link set tap0 up".into(),
            "link set tap1 up".into(),
            // No attempt waits for the machine's answer to ARP.
            format!("neighbour add {HOST} lladdr {HOST_MAC} dev tap0 nud permanent"),
        ] {
            namespace.ip(&command)?;
        }
        // Every packet of the machine's port counts, however late it comes.
        run(inside("nft").arg(format!(
            "table ip answers {{ counter denied {{ }}; counter guest {{ }}; chain input {{ \
             type filter hook input priority -300; \
             ip daddr {DENIED} tcp sport {PORT} counter name denied; \
             ip daddr {} tcp sport {PORT} counter name guest; }}; }}",
            GUESTS[0]
        )))?;
        let leases = folder.join("leases");
        let _ = fs::remove_file(&leases);
        let dhcp = inside("dnsmasq")
            .args(["--keep-in-foreground", "--conf-file=/dev/null", "--port=0"])
            .args(["--user=root", "--pid-file", "--interface=tap0"])
            .args(["--bind-interfaces", "--dhcp-authoritative", "--no-ping"])
            .arg(format!("--dhcp-leasefile={}", leases.display()))
            .arg(format!("--dhcp-range={HOST},{HOST},255.255.255.0,12h"))
            .arg(format!("--dhcp-host={HOST_MAC},{HOST}"))
            .arg(format!("--dhcp-option=option:router,{ALLOWED}"))
            .arg(format!("--dhcp-reply-delay={DHCP_DELAY}"))
            .stdin(Stdio::null())
            .stderr(File::create(folder.join("dhcp.log")).context("create the DHCP server's log")?)
            .spawn()
            .context("start dnsmasq")?;
        Ok(Self {
            dhcp,
            _namespace: namespace,
            allowed: Allowed::start()?,
            denied: Denied::start(DENIED.into(), database())?,
            clear: Clear::start()?,
        })
    }

    /// Packets that came from the machine's port to the denied client so far.
    pub fn answers(&self) -> Result<u64> {
        answers("denied")
    }

    /// Packets that came from there to the first guest so far.
    pub fn answers_to_guest(&self) -> Result<u64> {
        answers("guest")
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = self.dhcp.kill();
        let _ = self.dhcp.wait();
    }
}

fn answers(counter: &str) -> Result<u64> {
    let text = output(inside("nft").args(["list", "counter", "ip", "answers", counter]))?;
    let mut words = text
        .split_whitespace()
        .skip_while(|word| *word != "packets");
    let packets = words.nth(1).and_then(|packets| packets.parse().ok());
    packets.with_context(|| format!("read the counter of answers, {counter}"))
}

/// A command in the namespace.
pub fn inside(program: &str) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", NAMESPACE, program]);
    command
}

fn namespace() -> Result<File> {
    File::open(Path::new("/run/netns").join(NAMESPACE)).context("open the namespace")
}

/// A thread in the namespace that repeats something until it is stopped.
struct Client {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Client {
    fn start(interval: Duration, mut attempt: impl FnMut() + Send + 'static) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let namespace = namespace()?;
        let thread = thread::spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).expect("enter the namespace");
            while !stopped.load(Ordering::Relaxed) {
                attempt();
                thread::sleep(interval);
            }
        });
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Connects to the database and asks what every PostgreSQL answers, again and again.
pub struct Allowed {
    _client: Client,
    /// When it was served.
    served: Arc<Mutex<Vec<Instant>>>,
}

impl Allowed {
    fn start() -> Result<Self> {
        let served = Arc::new(Mutex::new(Vec::new()));
        let times = served.clone();
        let client = Client::start(Duration::from_millis(20), move || {
            if serves(ALLOWED) {
                let mut times = times.lock().expect("no client panics");
                times.push(Instant::now());
            }
        })?;
        Ok(Self {
            _client: client,
            served,
        })
    }

    /// How often it was served in that time, and the longest time in which it was not.
    pub fn between(&self, (start, end): (Instant, Instant)) -> (usize, Duration) {
        let served = self.served.lock().expect("no client panics");
        let (mut count, mut last, mut gap) = (0, start, Duration::ZERO);
        for &at in served.iter().filter(|at| (start..end).contains(at)) {
            count += 1;
            gap = gap.max(at - last);
            last = at;
        }
        (count, gap.max(end - last))
    }
}

/// Whether a guest is served.
pub fn serves_guest(guest: Ipv4Addr) -> Result<bool> {
    from_outside(move || serves(guest))
}

/// Runs this in the namespace, and returns its result.
pub fn from_outside<T: Send + 'static>(ask: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let namespace = namespace()?;
    let asking = thread::spawn(move || {
        setns(namespace, CloneFlags::CLONE_NEWNET).expect("enter the namespace");
        ask()
    });
    Ok(asking.join().expect("no client panics"))
}

/// Whether PostgreSQL answers an SSLRequest from there. For threads in the namespace.
fn serves(source: Ipv4Addr) -> bool {
    let answer = ask_with(source, &[0, 0, 0, 8, 4, 210, 22, 47], READ_TIMEOUT);
    matches!(answer, Ok(b'S' | b'N'))
}

/// The first byte that a client gets for this.
fn ask_with(source: Ipv4Addr, request: &[u8], timeout: Duration) -> std::io::Result<u8> {
    let socket = bound(source.into())?;
    socket.connect_timeout(&database().into(), CONNECT_TIMEOUT)?;
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(timeout))?;
    stream.write_all(request)?;
    let mut answer = [0];
    stream.read_exact(&mut answer)?;
    Ok(answer[0])
}

/// Logs in without TLS from the allowed address, again and again.
pub struct Clear {
    _client: Client,
    counts: Arc<[AtomicU64; 2]>,
}

impl Clear {
    fn start() -> Result<Self> {
        let counts = Arc::new([const { AtomicU64::new(0) }; 2]);
        let [tries, served] = [counts.clone(), counts.clone()];
        let client = Client::start(Duration::from_millis(100), move || {
            let answer = ask_with(
                ALLOWED,
                b"\0\0\0\x17\0\x03\0\0user\0postgres\0\0",
                CLEAR_TIMEOUT,
            );
            tries[0].fetch_add(1, Ordering::Relaxed);
            // An authentication request; the filter answers with an error.
            if matches!(answer, Ok(b'R')) {
                served[1].fetch_add(1, Ordering::Relaxed);
            }
        })?;
        Ok(Self {
            _client: client,
            counts,
        })
    }

    /// Tries, and answers of the database.
    pub fn counts(&self) -> [u64; 2] {
        [0, 1].map(|index| self.counts[index].load(Ordering::Relaxed))
    }
}

/// Connects without waiting for what comes of it, many times a second.
pub struct Denied {
    client: Client,
    tries: Arc<AtomicU64>,
}

impl Denied {
    pub fn start(source: IpAddr, to: SocketAddr) -> Result<Self> {
        let tries = Arc::new(AtomicU64::new(0));
        let made = tries.clone();
        let mut open: VecDeque<(Instant, Socket)> = VecDeque::new();
        let client = Client::start(DENIED_INTERVAL, move || {
            while open
                .front()
                .is_some_and(|(begin, _)| begin.elapsed() > DENIED_TIMEOUT)
            {
                open.pop_front();
            }
            let connect = || -> std::io::Result<Socket> {
                let socket = bound(source)?;
                socket.set_nonblocking(true)?;
                match socket.connect(&to.into()) {
                    Err(error) if error.raw_os_error() != Some(nix::libc::EINPROGRESS) => {
                        Err(error)
                    }
                    _ => Ok(socket),
                }
            };
            // It fails while the link is down.
            if let Ok(socket) = connect() {
                open.push_back((Instant::now(), socket));
                made.fetch_add(1, Ordering::Relaxed);
            }
        })?;
        Ok(Self { client, tries })
    }

    pub fn tries(&self) -> u64 {
        self.tries.load(Ordering::Relaxed)
    }

    pub fn stop(&self) {
        self.client.stop.store(true, Ordering::Relaxed);
    }
}

/// A TCP socket that leaves nothing behind when it is closed.
pub fn bound(source: IpAddr) -> std::io::Result<Socket> {
    let source = SocketAddr::new(source, 0);
    let socket = Socket::new(Domain::for_address(source), Type::STREAM, None)?;
    socket.bind(&source.into())?;
    SockRef::from(&socket).set_linger(Some(Duration::ZERO))?;
    Ok(socket)
}

pub fn database() -> SocketAddr {
    SocketAddr::new(HOST.into(), PORT)
}
