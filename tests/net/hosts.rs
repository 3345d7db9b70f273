//! The database host and its clients: namespaces, the links between them, and the tripwire.

use std::{
    env,
    fmt::Write as _,
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::{
        linux::net::SocketAddrExt as _,
        unix::{self, net::UnixListener},
    },
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::mpsc::Receiver,
    thread,
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    unistd::geteuid,
};

use crate::net::{
    addresses::{
        ALLOWED4, ALLOWED6, CLIENT_MAC, CLIENT4, CLIENT6, DB_MAC, DB4, DB6, DENIED4, DENIED6,
        NEIGHBOURS, OTHER_DB4, OTHER_DB6, mac,
    },
    binary::agent_binary,
    command::{feed, succeed},
    namespace::Namespace,
    nft::counter,
    tripwire::{Protected, ruleset},
    wait::wait_until,
};

/// The running agent.
pub(super) struct Agent {
    pub(super) child: Child,
    pub(super) lines: Receiver<String>,
}

/// A database host and a client, joined by a veth pair: `eth0` in both namespaces.
pub struct Net {
    name: String,
    pub(super) agent: Option<Agent>,
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
    pub(super) dir: PathBuf,
    has_tripwire: bool,
    _claim: UnixListener,
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

    pub fn bpffs(&self) -> PathBuf {
        self.dir.join("bpffs")
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.join("control.sock")
    }

    pub fn dir(&self) -> &Path {
        &self.dir
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
        self.db
            .run(|| feed(Command::new("nft").args(["-f", "-"]), &ruleset(protected)));
    }
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
