//! Debian's etcd, one member or several, with TLS, certificates as users and rights, in a namespace of its own; and a host
//! beside it.

mod session;

use std::{
    fs,
    io::Write as _,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::Mutex,
};

use filter_agent::fleet::Settings;
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, geteuid},
};
use tempfile::TempDir;

use crate::{
    certificates::{Authority, Kind, Pair},
    net::{Namespace, run_in, succeed, wait_until},
};

pub use session::Session;

/// The host's user in etcd.
pub const USER: &str = "db7";

/// A cluster, stopped and removed when dropped.
pub struct Etcd {
    members: Mutex<Vec<Member>>,
    pub authority: Authority,
    root: Pair,
    server: Pair,
    /// The host's certificate.
    pub client: Pair,
    pub host: Namespace,
    pub namespace: Namespace,
    directory: TempDir,
    /// In bytes. `None`: etcd's own default.
    room: Option<usize>,
}

struct Member {
    data: PathBuf,
    child: Option<Child>,
}

impl Drop for Member {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Member {
    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    fn pid(&self) -> Pid {
        let child = self.child.as_ref().expect("the member runs");
        Pid::from_raw(child.id().try_into().unwrap())
    }
}

impl Etcd {
    /// One member. `name`: the test's. The host's user may read the era and `orders`.
    pub fn start(name: &str) -> Self {
        Self::with_members(name, 1)
    }

    pub fn with_members(name: &str, count: usize) -> Self {
        Self::make(name, count, None)
    }

    /// One member with room for so many bytes.
    pub fn with_room(name: &str, room: usize) -> Self {
        Self::make(name, 1, Some(room))
    }

    fn make(name: &str, count: usize, room: Option<usize>) -> Self {
        assert!(geteuid().is_root(), "tests with etcd need root");
        let directory = tempfile::Builder::new()
            .prefix(&format!("filter-tests-{name}-"))
            .tempdir()
            .unwrap();
        let namespace = Namespace::new(format!("{name}-etcd"));
        let host = Namespace::new(format!("{name}-host"));
        namespace.ip(&format!(
            "link add eth0 type veth peer name eth0 netns {}",
            host.name
        ));
        for index in 0..count {
            namespace.ip(&format!("address add {}/24 dev eth0", address(index)));
        }
        namespace.ip("link set eth0 up");
        host.ip("address add 10.77.0.9/24 dev eth0\nlink set eth0 up");
        let authority = Authority::new(directory.path(), "authority");
        let addresses: Vec<String> = (0..count).map(address).collect();
        let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
        let member = |index: usize| Member {
            data: directory.path().join(format!("data-{index}")),
            child: None,
        };
        let etcd = Self {
            members: Mutex::new((0..count).map(member).collect()),
            root: authority.sign("root", &[], Kind::Good),
            server: authority.sign("etcd", &addresses, Kind::Good),
            client: authority.sign(USER, &[], Kind::Good),
            authority,
            host,
            namespace,
            directory,
            room,
        };
        for index in 0..count {
            etcd.run(index);
        }
        etcd.wait_until_healthy();
        etcd.set_up_rights();
        etcd
    }

    fn set_up_rights(&self) {
        self.control(&["user", "add", "root", "--no-password"]);
        self.control(&["user", "grant-role", "root", "root"]);
        self.control(&["user", "add", USER, "--no-password"]);
        self.control(&["role", "add", USER]);
        self.control(&["user", "grant-role", USER, USER]);
        self.grant(USER, "era");
        self.grant(USER, "rules/orders");
        self.control(&["auth", "enable"]);
    }

    /// Lets a role read a key.
    pub fn grant(&self, role: &str, key: &str) {
        let key = format!("/filter-agent/v1/{key}");
        self.control(&["role", "grant-permission", role, "read", &key]);
    }

    /// Lets a user's role write a host's own keys.
    pub fn grant_own(&self, role: &str, host: &str) {
        for key in own_keys(host) {
            self.control(&["role", "grant-permission", role, "readwrite", &key]);
        }
    }

    /// Takes that right away again.
    pub fn revoke_own(&self, role: &str, host: &str) {
        for key in own_keys(host) {
            self.control(&["role", "revoke-permission", role, &key]);
        }
    }

    /// The address at which a member listens without TLS, in its own namespace.
    pub fn without_tls(index: usize) -> String {
        format!("127.0.0.1:{}", 2400 + index)
    }

    /// Starts a member, and does not wait for it.
    pub fn run(&self, index: usize) {
        self.run_as(index, &self.server);
    }

    /// The same with another certificate towards clients.
    pub fn run_as(&self, index: usize, server: &Pair) {
        let count = self.members.lock().unwrap().len();
        let peer = |index: usize| format!("https://{}:2380", address(index));
        let members = (0..count).map(|index| format!("m{index}={}", peer(index)));
        let members: Vec<String> = members.collect();
        let member = &mut self.members.lock().unwrap()[index];
        let client = endpoint(index);
        let authority = self.authority.file();
        let mut command = Command::new("etcd");
        command
            .gid(group(index))
            .args(["--name", &format!("m{index}")])
            .arg("--data-dir")
            .arg(&member.data)
            .args(["--advertise-client-urls", &client])
            .arg("--listen-client-urls")
            .arg(format!("{client},http://{}", Self::without_tls(index)))
            .args(["--listen-peer-urls", &peer(index)])
            .args(["--initial-advertise-peer-urls", &peer(index)])
            .args(["--initial-cluster", &members.join(",")])
            .args(["--initial-cluster-token", TOKEN])
            // A busy machine elects no new leader.
            .args(["--heartbeat-interval", "200", "--election-timeout", "2000"])
            .args(["--client-cert-auth", "--peer-client-cert-auth"]);
        for (prefix, pair) in [("", server), ("peer-", &self.server)] {
            command
                .arg(format!("--{prefix}trusted-ca-file"))
                .arg(&authority)
                .arg(format!("--{prefix}cert-file"))
                .arg(&pair.certificate)
                .arg(format!("--{prefix}key-file"))
                .arg(&pair.key);
        }
        if let Some(room) = self.room {
            command.args(["--quota-backend-bytes", &room.to_string()]);
        }
        let log = self.directory.path().join(format!("log-{index}"));
        let log = fs::OpenOptions::new().create(true).append(true).open(log);
        let log = log.unwrap();
        command.stdin(Stdio::null());
        command.stdout(log.try_clone().unwrap()).stderr(log);
        let child = run_in(&self.namespace.name, || command.spawn().unwrap());
        member.child = Some(child);
    }

    pub fn wait_until_healthy(&self) {
        let healthy = || {
            self.try_control(&["endpoint", "health"], b"")
                .status
                .success()
        };
        assert!(wait_until(healthy), "etcd does not get healthy");
    }

    /// `kill -9`.
    pub fn kill(&self, index: usize) {
        self.members.lock().unwrap()[index].kill();
    }

    pub fn signal(&self, index: usize, signal: Signal) {
        kill(self.pid(index), signal).unwrap();
    }

    pub fn pid(&self, index: usize) -> Pid {
        self.members.lock().unwrap()[index].pid()
    }

    /// Runs `etcdctl` as root, beside etcd. Returns what it prints.
    pub fn control(&self, arguments: &[&str]) -> String {
        self.feed(arguments, b"")
    }

    fn feed(&self, arguments: &[&str], input: &[u8]) -> String {
        let output = self.try_control(arguments, input);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "etcdctl {arguments:?}: {stderr}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// The same as another user. Returns whether it succeeded, and what it printed.
    pub fn control_as(&self, user: &Pair, arguments: &[&str], input: &[u8]) -> (bool, String) {
        let output = self.try_control_as(user, arguments, input);
        let text = [output.stdout, output.stderr].concat();
        (
            output.status.success(),
            String::from_utf8_lossy(&text).into_owned(),
        )
    }

    fn try_control(&self, arguments: &[&str], input: &[u8]) -> Output {
        self.try_control_as(&self.root, arguments, input)
    }

    fn try_control_as(&self, user: &Pair, arguments: &[&str], input: &[u8]) -> Output {
        let endpoints: Vec<String> = {
            let members = self.members.lock().unwrap();
            let running = members.iter().enumerate();
            let running = running.filter(|(_, member)| member.child.is_some());
            running.map(|(index, _)| endpoint(index)).collect()
        };
        self.control_at(&endpoints, user, arguments, input)
    }

    fn control_at(
        &self,
        endpoints: &[String],
        user: &Pair,
        arguments: &[&str],
        input: &[u8],
    ) -> Output {
        let mut command = Command::new("etcdctl");
        command
            .env("ETCDCTL_API", "3")
            .arg("--endpoints")
            .arg(endpoints.join(","))
            .arg("--cacert")
            .arg(self.authority.file())
            .arg("--cert")
            .arg(&user.certificate)
            .arg("--key")
            .arg(&user.key)
            // The last one counts.
            .args(["--command-timeout", "60s"])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        self.namespace.run(|| {
            let mut child = command.spawn().unwrap();
            // It need not read it.
            let _ = child.stdin.take().unwrap().write_all(input);
            child.wait_with_output().unwrap()
        })
    }

    /// Writes a key below the agent's prefix, such as `rules/orders`.
    pub fn put(&self, key: &str, value: &[u8]) {
        let key = format!("/filter-agent/v1/{key}");
        match value {
            // It reads nothing as no value.
            [] => self.control(&["put", &key, ""]),
            value => self.feed(&["put", &key], value),
        };
    }

    /// Writes a key through this member, which may be ill. Returns the revision; `None`: nobody says that it is written.
    pub fn put_at(&self, index: usize, key: &str, value: &[u8]) -> Option<i64> {
        let key = format!("/filter-agent/v1/{key}");
        let brief = ["--command-timeout", "3s", "--write-out", "json"];
        let arguments = [&["put", &key][..], &brief].concat();
        let output = self.control_at(&[endpoint(index)], &self.root, &arguments, value);
        let written = output.status.success();
        let written = written.then(|| serde_json::from_slice::<serde_json::Value>(&output.stdout));
        written?.unwrap()["header"]["revision"].as_i64()
    }

    /// Writes values one after the other as fast as etcd takes them, which `etcdctl` cannot.
    pub fn put_all(&self, key: &str, values: impl Iterator<Item = String>) {
        let mut session = self.session();
        for value in values {
            session.put(key, &value).unwrap();
        }
    }

    /// The revision at which a key was last changed.
    pub fn revision_of(&self, key: &str) -> i64 {
        self.number_of(key, "mod_revision")
    }

    /// The one at which it was made.
    pub fn created_at(&self, key: &str) -> i64 {
        self.number_of(key, "create_revision")
    }

    fn number_of(&self, key: &str, field: &str) -> i64 {
        let key = format!("/filter-agent/v1/{key}");
        let found = self.control(&["get", &key, "--write-out", "json"]);
        let found: serde_json::Value = serde_json::from_str(&found).unwrap();
        found["kvs"][0][field].as_i64().unwrap()
    }

    /// The text under a key below the agent's prefix; `None`: it is not there.
    pub fn text_of(&self, key: &str) -> Option<String> {
        let key = format!("/filter-agent/v1/{key}");
        let text = self.control(&["get", &key, "--print-value-only"]);
        let text = text.trim_end();
        (!text.is_empty()).then(|| text.to_owned())
    }

    /// Puts a key that ends in a minute.
    pub fn put_leased(&self, key: &str, value: &str) {
        let granted = self.control(&["lease", "grant", "60"]);
        let lease = granted.split(' ').nth(1).unwrap();
        let lease = format!("--lease={lease}");
        self.control(&["put", &lease, &format!("/filter-agent/v1/{key}"), value]);
    }

    /// Seconds left to the lease of a key.
    pub fn time_left(&self, key: &str) -> i64 {
        let lease = format!("{:x}", self.number_of(key, "lease"));
        let found = self.control(&["lease", "timetolive", &lease, "--write-out", "json"]);
        let found: serde_json::Value = serde_json::from_str(&found).unwrap();
        found["ttl"].as_i64().unwrap()
    }

    pub fn delete(&self, key: &str) {
        self.control(&["del", &format!("/filter-agent/v1/{key}")]);
    }

    pub fn snapshot(&self) -> PathBuf {
        let file = self.directory.path().join("snapshot");
        let _ = fs::remove_file(&file);
        self.control(&["snapshot", "save", file.to_str().unwrap()]);
        file
    }

    /// Stops the only member, and starts it with the snapshot's content. With the same token as before the cluster's id
    /// is the same.
    pub fn restore(&self, snapshot: &Path) {
        self.restore_as(snapshot, TOKEN);
    }

    /// With another token it is another cluster.
    pub fn restore_as(&self, snapshot: &Path, token: &str) {
        self.kill(0);
        let data = self.members.lock().unwrap()[0].data.clone();
        fs::remove_dir_all(&data).unwrap();
        let peer = format!("https://{}:2380", address(0));
        let mut command = Command::new("etcdctl");
        command
            .env("ETCDCTL_API", "3")
            .args(["snapshot", "restore"])
            .arg(snapshot)
            .args(["--name", "m0", "--data-dir"])
            .arg(&data)
            .args(["--initial-cluster", &format!("m0={peer}")])
            .args(["--initial-cluster-token", token])
            .args(["--initial-advertise-peer-urls", &peer]);
        succeed(&mut command);
        self.run(0);
        self.wait_until_healthy();
    }

    /// Cuts the host off, or connects it again: the link is down.
    pub fn cut(&self, cut: bool) {
        let state = if cut { "down" } else { "up" };
        self.namespace.ip(&format!("link set eth0 {state}"));
    }

    /// Cuts a member off from the others, or connects it again.
    pub fn cut_off(&self, index: usize, cut: bool) {
        let (group, address) = (group(index), address(index));
        let mut command = Command::new("nft");
        if cut {
            command.arg(format!(
                "table inet cut{index} {{ chain out {{ type filter hook output priority 0;
                    meta skgid {group} tcp dport 2380 drop; meta skgid {group} tcp sport 2380 drop;
                    ip daddr {address} tcp dport 2380 drop; ip daddr {address} tcp sport 2380 drop; }}
                }}"
            ));
        } else {
            command.args(["delete", "table", "inet", &format!("cut{index}")]);
        }
        self.namespace.run(|| succeed(&mut command));
    }

    /// Connects another namespace, by an interface `etcd0` of it.
    pub fn attach(&self, namespace: &Namespace) {
        self.attach_as(namespace, 10);
    }

    /// The same with another last byte of its address.
    pub fn attach_as(&self, namespace: &Namespace, last: u8) {
        self.namespace.ip(&format!(
            "link add db{last} type veth peer name etcd0 netns {}\nlink set db{last} up\nroute add 10.77.0.{last}/32 dev db{last}",
            namespace.name
        ));
        namespace.ip(&format!(
            "address add 10.77.0.{last}/24 dev etcd0\nlink set etcd0 up"
        ));
    }

    /// Drops every packet between the host and etcd, both ways and without a word, or no more.
    pub fn drop_packets(&self, dropped: bool) {
        let rules = "table inet cut {
            chain in { type filter hook input priority 0; iifname eth0 drop; }
            chain out { type filter hook output priority 0; oifname eth0 drop; }
        }";
        let mut command = Command::new("nft");
        if dropped {
            command.arg(rules);
        } else {
            command.args(["delete", "table", "inet", "cut"]);
        }
        self.host.run(|| succeed(&mut command));
    }

    /// The settings of a host that follows these databases.
    pub fn settings(&self, databases: &[&str]) -> Settings {
        let count = self.members.lock().unwrap().len();
        Settings {
            endpoints: (0..count).map(endpoint).collect(),
            ca_file: Some(self.authority.file()),
            cert_file: Some(self.client.certificate.clone()),
            key_file: Some(self.client.key.clone()),
            databases: databases.iter().map(ToString::to_string).collect(),
            own: None,
        }
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }
}

fn own_keys(host: &str) -> [String; 2] {
    ["hosts", "alive"].map(|part| format!("/filter-agent/v1/{part}/{host}"))
}

const TOKEN: &str = "fleet";

fn address(index: usize) -> String {
    format!("10.77.0.{}", index + 1)
}

/// Tells the packets of the members apart, which are in one namespace.
fn group(index: usize) -> u32 {
    60_000 + u32::try_from(index).unwrap()
}

pub fn endpoint(index: usize) -> String {
    format!("https://{}:2379", address(index))
}
