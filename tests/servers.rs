//! Debian's DNS and HTTPS servers, started by tests inside their namespaces: what a region's source
//! may be, and how it fails.

use std::{
    cell::Cell,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use hickory_proto::{
    op::{Edns, Message, Query},
    rr::{Name, RecordType},
};
use jiff::{SignedDuration, Timestamp};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair,
    date_time_ymd,
};

use crate::net::{Namespace, run_in, succeed, wait, wait_until};

/// A child process that runs until it is dropped.
pub(crate) struct Server {
    command: Command,
    namespace: String,
    child: Option<Child>,
}

impl Server {
    pub(crate) fn start(namespace: &Namespace, mut command: Command, log: &Path) -> Self {
        let log = fs::File::create(log).unwrap();
        command.stdin(Stdio::null());
        command.stdout(log.try_clone().unwrap()).stderr(log);
        let mut server = Self {
            command,
            namespace: namespace.name.clone(),
            child: None,
        };
        server.run();
        server
    }

    fn run(&mut self) {
        let child = run_in(&self.namespace, || self.command.spawn().unwrap());
        self.child = Some(child);
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().expect("the server runs");
        kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
    }

    /// Whether it ends by itself in good time.
    pub(crate) fn ends(&mut self) -> bool {
        let child = self.child.as_mut().expect("the server runs");
        wait(child).is_some()
    }

    fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

fn answers(namespace: &str, address: SocketAddr) {
    let connects = || run_in(namespace, || TcpStream::connect(address).is_ok());
    assert!(wait_until(connects), "no server answers at {address}");
}

/// Knot DNS, authoritative for a zone, on port 53.
pub struct Dns {
    server: Server,
    zone: String,
    directory: PathBuf,
    address: SocketAddr,
    serial: Cell<u32>,
}

impl Dns {
    /// `zone`: such as `test.`.
    pub fn start(namespace: &Namespace, directory: &Path, address: IpAddr, zone: &str) -> Self {
        Self::new(namespace, directory, address, zone, "")
    }

    /// The zone is signed; `trust_anchor` is its key.
    pub fn start_signed(
        namespace: &Namespace,
        directory: &Path,
        address: IpAddr,
        zone: &str,
    ) -> Self {
        let signing = "    dnssec-signing: on\n    dnssec-policy: test\n";
        Self::new(namespace, directory, address, zone, signing)
    }

    fn new(
        namespace: &Namespace,
        directory: &Path,
        address: IpAddr,
        zone: &str,
        signing: &str,
    ) -> Self {
        let directory = directory.join("knot");
        fs::create_dir_all(&directory).unwrap();
        let place = directory.display();
        let configuration = format!(
            "server:
    rundir: {place}
    listen: {address}@53
    udp-workers: 1
    tcp-workers: 1
    background-workers: 1
database:
    storage: {place}
    journal-db-max-size: 16M
log:
  - target: {place}/messages
    any: info
policy:
  - id: test
    single-type-signing: on
    ksk-lifetime: 0
zone:
  - domain: {zone}
    storage: {place}
    file: zone
    zonefile-sync: -1
    zonefile-load: difference-no-serial
    journal-content: all
{signing}"
        );
        fs::write(directory.join("knot.conf"), configuration).unwrap();
        let mut command = Command::new("knotd");
        command.arg("-c").arg(directory.join("knot.conf"));
        write_zone(&directory, zone, 1, "");
        let dns = Self {
            server: Server::start(namespace, command, &directory.join("output")),
            zone: zone.into(),
            directory,
            address: SocketAddr::new(address, 53),
            serial: Cell::new(1),
        };
        answers(&namespace.name, dns.address);
        dns.wait_until_served();
        dns
    }

    /// The zone's records from now on, lines such as `egress 1 A 203.0.113.10`.
    pub fn set(&self, records: &str) {
        self.serial.set(self.serial.get() + 1);
        write_zone(&self.directory, &self.zone, self.serial.get(), records);
        self.control(&["zone-reload", &self.zone]);
        self.wait_until_served();
    }

    /// Answers SERVFAIL until the next `set`.
    pub fn break_zone(&self) {
        self.control(&["-f", "zone-purge", &self.zone]);
    }

    /// No answers, as if all packets were lost.
    pub fn pause(&self) {
        self.server.signal(Signal::SIGSTOP);
    }

    pub fn resume(&self) {
        self.server.signal(Signal::SIGCONT);
    }

    pub fn stop(&mut self) {
        self.server.stop();
    }

    pub fn restart(&mut self) {
        self.server.run();
        answers(&self.server.namespace, self.address);
        self.wait_until_served();
    }

    /// The zone's key as a DNSKEY record.
    pub fn trust_anchor(&self) -> PathBuf {
        let mut keymgr = Command::new("keymgr");
        keymgr
            .arg("-c")
            .arg(self.directory.join("knot.conf"))
            .args([&self.zone, "dnskey"]);
        let output = keymgr.output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let key = String::from_utf8(output.stdout).unwrap();
        let (owner, key) = key.trim_end().split_once(' ').unwrap();
        let path = self.directory.join("anchor.key");
        fs::write(&path, format!("{owner} 3600 IN {key}\n")).unwrap();
        path
    }

    fn control(&self, arguments: &[&str]) {
        let mut knotc = Command::new("knotc");
        knotc
            .arg("-c")
            .arg(self.directory.join("knot.conf"))
            .arg("-b");
        succeed(knotc.args(arguments));
    }

    fn wait_until_served(&self) {
        let marker = format!("serial-{}", self.serial.get());
        let served = || {
            let mut knotc = Command::new("knotc");
            knotc.arg("-c").arg(self.directory.join("knot.conf"));
            let output = knotc
                .args(["zone-read", &self.zone, "marker", "TXT"])
                .output()
                .unwrap();
            String::from_utf8_lossy(&output.stdout).contains(&marker)
        };
        assert!(wait_until(served), "the zone is not served");
    }
}

fn write_zone(directory: &Path, zone: &str, serial: u32, records: &str) {
    let text = format!(
        "$ORIGIN {zone}\n\
         @ 1 SOA ns root {serial} 60 60 600 1\n\
         @ 1 NS ns\n\
         ns 1 A 192.0.2.53\n\
         marker 1 TXT serial-{serial}\n\
         {records}\n"
    );
    fs::write(directory.join("zone"), text).unwrap();
}

/// Stands between the agent and a `Dns`, and tampers with what it answers over UDP.
pub struct Tamperer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Asks the genuine server, with the DO bit set.
pub struct Genuine {
    socket: UdpSocket,
}

impl Genuine {
    pub fn ask(&self, name: &str, kind: RecordType) -> Message {
        let mut query = Message::query();
        query.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        let mut edns = Edns::new();
        edns.set_max_payload(4096).set_dnssec_ok(true);
        query.set_edns(edns);
        self.forward(&query.to_vec().unwrap())
    }

    fn forward(&self, query: &[u8]) -> Message {
        let mut answer = [0; 1 << 16];
        self.socket.send(query).unwrap();
        let length = self.socket.recv(&mut answer).unwrap();
        Message::from_vec(&answer[..length]).unwrap()
    }
}

impl Tamperer {
    /// `tamper` changes each answer. One without its query is not sent.
    pub fn start(
        namespace: &Namespace,
        address: SocketAddr,
        dns: IpAddr,
        tamper: impl Fn(&Genuine, &mut Message) + Send + 'static,
    ) -> Self {
        let (socket, upstream) = namespace.run(|| {
            let upstream = UdpSocket::bind((dns, 0)).unwrap();
            upstream.connect((dns, 53)).unwrap();
            (UdpSocket::bind(address).unwrap(), upstream)
        });
        let interval = Some(Duration::from_millis(50));
        socket.set_read_timeout(interval).unwrap();
        upstream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::spawn(move || {
            let genuine = Genuine { socket: upstream };
            let mut query = [0; 4096];
            while !stopped.load(Ordering::Relaxed) {
                let Ok((length, source)) = socket.recv_from(&mut query) else {
                    continue;
                };
                let mut answer = genuine.forward(&query[..length]);
                tamper(&genuine, &mut answer);
                if answer.queries.is_empty() {
                    continue;
                }
                socket.send_to(&answer.to_vec().unwrap(), source).unwrap();
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Tamperer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A certificate authority of the test's own.
pub struct Ca {
    issuer: Issuer<'static, KeyPair>,
    directory: PathBuf,
}

impl Ca {
    pub fn new(directory: &Path) -> Self {
        Self::with(directory.join("ca"), CertificateParams::new([]).unwrap())
    }

    /// One with a common name, and a folder of that name.
    pub fn named(directory: &Path, name: &str) -> Self {
        Self::with(directory.join(name), parameters_of(name, &[]))
    }

    /// One whose own certificate has expired.
    pub fn expired(directory: &Path, name: &str) -> Self {
        let mut parameters = parameters_of(name, &[]);
        expire(&mut parameters);
        Self::with(directory.join(name), parameters)
    }

    fn with(directory: PathBuf, mut parameters: CertificateParams) -> Self {
        fs::create_dir_all(&directory).unwrap();
        let key = KeyPair::generate().unwrap();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = parameters.self_signed(&key).unwrap();
        fs::write(directory.join("ca.pem"), certificate.pem()).unwrap();
        Self {
            issuer: Issuer::new(parameters, key),
            directory,
        }
    }

    pub fn file(&self) -> PathBuf {
        self.directory.join("ca.pem")
    }

    /// Paths of a certificate and its key.
    pub(crate) fn certificate(&self, names: &[&str], kind: Certificate) -> (PathBuf, PathBuf) {
        let all: Vec<String> = names.iter().map(ToString::to_string).collect();
        let parameters = CertificateParams::new(all).unwrap();
        self.write(parameters, names[0], kind)
    }

    /// The same with a common name. `names`: what a server is reached by.
    pub fn certificate_of(
        &self,
        user: &str,
        names: &[&str],
        kind: Certificate,
    ) -> (PathBuf, PathBuf) {
        self.write(parameters_of(user, names), user, kind)
    }

    fn write(
        &self,
        mut parameters: CertificateParams,
        name: &str,
        kind: Certificate,
    ) -> (PathBuf, PathBuf) {
        let key = KeyPair::generate().unwrap();
        if kind == Certificate::Expired {
            expire(&mut parameters);
        }
        let certificate = match kind {
            Certificate::SelfSigned => parameters.self_signed(&key),
            _ => parameters.signed_by(&key, &self.issuer),
        };
        let path = |end: &str| self.directory.join(format!("{name}-{kind:?}.{end}"));
        fs::write(path("pem"), certificate.unwrap().pem()).unwrap();
        fs::write(path("key"), key.serialize_pem()).unwrap();
        (path("pem"), path("key"))
    }
}

fn expire(parameters: &mut CertificateParams) {
    parameters.not_before = date_time_ymd(2020, 1, 1);
    parameters.not_after = date_time_ymd(2021, 1, 1);
}

fn parameters_of(user: &str, names: &[&str]) -> CertificateParams {
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    let mut parameters = CertificateParams::new(names).unwrap();
    parameters.distinguished_name = DistinguishedName::new();
    parameters.distinguished_name.push(DnType::CommonName, user);
    parameters
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Certificate {
    Good,
    Expired,
    SelfSigned,
}

/// Unbound: asks a `Dns` and answers over TLS (port 853) and HTTPS (443, `/dns-query`).
pub struct Encrypted {
    _server: Server,
}

impl Encrypted {
    /// `name`: what its certificate is for.
    pub fn start(
        namespace: &Namespace,
        directory: &Path,
        address: IpAddr,
        dns: IpAddr,
        ca: &Ca,
        name: &str,
    ) -> Self {
        let directory = directory.join("unbound");
        fs::create_dir_all(&directory).unwrap();
        let (certificate, key) = ca.certificate(&[name], Certificate::Good);
        let configuration = format!(
            "server:
    do-daemonize: no
    username: \"\"
    chroot: \"\"
    directory: \"{}\"
    pidfile: \"\"
    use-syslog: no
    num-threads: 1
    module-config: \"iterator\"
    interface: {address}@853
    interface: {address}@443
    tls-port: 853
    https-port: 443
    http-endpoint: \"/dns-query\"
    tls-service-pem: \"{}\"
    tls-service-key: \"{}\"
    access-control: 0.0.0.0/0 allow
    access-control: ::/0 allow
    do-not-query-localhost: no
    local-zone: \"test.\" nodefault
stub-zone:
    name: \"test.\"
    stub-addr: {dns}
remote-control:
    control-enable: no
",
            directory.display(),
            certificate.display(),
            key.display()
        );
        let file = directory.join("unbound.conf");
        fs::write(&file, configuration).unwrap();
        let mut command = Command::new("unbound");
        command.arg("-d").arg("-c").arg(file);
        let server = Server::start(namespace, command, &directory.join("output"));
        answers(&namespace.name, SocketAddr::new(address, 853));
        Self { _server: server }
    }
}

/// nginx: HTTPS on port 443 and HTTP on 80, with files that are `put`.
pub struct Web {
    server: Server,
    directory: PathBuf,
    address: IpAddr,
    name: String,
    ca: Ca,
}

/// What else than its content `/list` may answer.
pub const FAULTS: [&str; 12] = [
    "500",
    "html",
    "to-http",
    "to-secret",
    "loop",
    "slow",
    "endless",
    "cut",
    "bomb",
    "retry-after",
    "retry-date",
    "rate-limit",
];

/// How long the last three of `FAULTS` ask to wait.
pub const RETRY_AFTER: [(&str, SignedDuration); 3] = [
    ("retry-after", SignedDuration::from_hours(1)),
    ("retry-date", SignedDuration::from_hours(2)),
    ("rate-limit", SignedDuration::from_hours(3)),
];

impl Web {
    pub fn start(
        namespace: &Namespace,
        directory: &Path,
        address: IpAddr,
        ca: Ca,
        name: &str,
    ) -> Self {
        let directory = directory.join("nginx");
        let root = directory.join("root");
        fs::create_dir_all(&root).unwrap();
        let place = directory.display();
        let (certificate, key) = ca.certificate(&[name], Certificate::Good);
        let upstream = namespace.run(|| TcpListener::bind("127.0.0.1:0").unwrap());
        let faults = FAULTS
            .map(|fault| format!("if (-f {place}/fault-{fault}) {{ rewrite ^ /{fault} last; }}\n"));
        let faults = faults.concat();
        let [delay, date, reset] = RETRY_AFTER.map(|(_, wait)| (wait, Timestamp::now() + wait));
        let delay = delay.0.as_secs();
        let date = date.1.strftime("%a, %d %b %Y %H:%M:%S GMT");
        let reset = reset.1.as_second();
        let content = format!(
            "root {place}/root;
default_type text/plain;
gzip on; gzip_types *; gzip_min_length 1;
location = /500 {{ return 500; }}
location = /html {{ default_type text/html; return 200 '<html>Are you human?</html>'; }}
location = /to-http {{ return 302 http://{name}/plain; }}
location = /to-https {{ return 302 https://{name}/list; }}
location = /to-secret {{ return 302 http://user:s3cret@{name}/plain?token=s3cret; }}
location ~ ^/to-443/(.*)$ {{ return 302 https://{name}/$1; }}
location ~ ^/to-8443/(.*)$ {{ return 302 https://{name}:8443/$1; }}
location ~ ^/to-80/(.*)$ {{ return 302 http://{name}/$1; }}
location = /retry-after {{ add_header Retry-After {delay} always; return 429; }}
location = /retry-date {{ add_header Retry-After '{date}' always; return 503; }}
location = /rate-limit {{
    add_header X-RateLimit-Remaining 0 always;
    add_header X-RateLimit-Reset {reset} always;
    return 403;
}}
location = /loop {{ return 302 https://{name}/loop; }}
location = /list {{ {faults} }}
location = /echo {{ return 200 '$arg_of$http_x_token$http_authorization$request_uri\n'; }}
location ~ [.]gz$ {{ gzip off; add_header Content-Encoding gzip; }}
location = /bomb {{ gzip off; add_header Content-Encoding gzip; alias {place}/bomb.gz; }}
location ~ ^/(slow|endless|cut)$ {{
    gzip off; proxy_buffering off; proxy_pass http://{};
}}
",
            upstream.local_addr().unwrap()
        );
        fs::write(directory.join("content"), content).unwrap();
        let configuration = format!(
            "daemon off; master_process off; pid {place}/pid; error_log {place}/errors;
events {{ worker_connections 256; }}
http {{
    client_body_temp_path {place}/body; proxy_temp_path {place}/proxy;
    fastcgi_temp_path {place}/fastcgi; uwsgi_temp_path {place}/uwsgi;
    scgi_temp_path {place}/scgi;
    log_format short '$status $uri $http_if_none_match';
    access_log {place}/access short;
    log_format headers '$server_port $uri token=$http_x_token auth=$http_authorization referer=$http_referer';
    access_log {place}/headers headers;
    server {{ listen {address}:80; include {place}/content; }}
    server {{
        listen {address}:443 ssl; listen {address}:8443 ssl; include {place}/content;
        ssl_certificate {}; ssl_certificate_key {};
    }}
}}
",
            certificate.display(),
            key.display()
        );
        let file = directory.join("nginx.conf");
        fs::write(&file, configuration).unwrap();
        let zeros = "192.0.2.0/24\n".repeat(5 << 20);
        let plain = directory.join("bomb");
        fs::write(&plain, zeros).unwrap();
        succeed(Command::new("gzip").arg("-1").arg(plain));
        thread::spawn(move || misbehave(&upstream));
        let mut command = Command::new("nginx");
        command
            .arg("-e")
            .arg(directory.join("errors"))
            .arg("-c")
            .arg(file);
        let server = Server::start(namespace, command, &directory.join("output"));
        answers(&namespace.name, SocketAddr::new(address, 443));
        Self {
            server,
            directory,
            address,
            name: name.into(),
            ca,
        }
    }

    /// Makes `/list` answer with one of `FAULTS`, or as it should.
    pub fn fault(&self, fault: Option<&str>) {
        for other in FAULTS {
            let _ = fs::remove_file(self.directory.join(format!("fault-{other}")));
        }
        if let Some(fault) = fault {
            fs::write(self.directory.join(format!("fault-{fault}")), "").unwrap();
        }
    }

    /// Shows another certificate from now on.
    pub fn certify(&mut self, kind: Certificate) {
        let (to, to_key) = self.ca.certificate(&[&self.name], Certificate::Good);
        if kind != Certificate::Good {
            let (from, from_key) = self.ca.certificate(&[&self.name], kind);
            fs::copy(from, to).unwrap();
            fs::copy(from_key, to_key).unwrap();
        }
        self.stop();
        self.restart();
    }

    /// A file at a path.
    pub fn put(&self, path: &str, content: &[u8]) {
        let next = self.directory.join("next");
        fs::write(&next, content).unwrap();
        fs::rename(next, self.directory.join("root").join(path)).unwrap();
    }

    /// Port, path, `X-Token`, `Authorization` and `Referer` of each request.
    pub fn headers(&self) -> Vec<String> {
        let text = fs::read_to_string(self.directory.join("headers")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// Status, path and `If-None-Match` of each request.
    pub fn log(&self) -> Vec<String> {
        let text = fs::read_to_string(self.directory.join("access")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    pub fn stop(&mut self) {
        self.server.stop();
    }

    pub fn restart(&mut self) {
        self.server.run();
        answers(&self.server.namespace, SocketAddr::new(self.address, 443));
    }
}

/// Answers that no server of good will gives, to the requests that nginx passes on.
fn misbehave(listener: &TcpListener) {
    for stream in listener.incoming().map_while(Result::ok) {
        thread::spawn(move || {
            let mut request = String::new();
            let mut writer = &stream;
            let _ = BufReader::new(&stream).read_line(&mut request);
            let length = if request.contains("/cut") {
                "Content-Length: 1000\r\n"
            } else {
                ""
            };
            let head = format!("HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n{length}\r\n");
            let mut sent = writer.write_all(head.as_bytes());
            let endless = request.contains("/endless");
            let lines = "203.0.113.0/24\n".repeat(if endless { 10_000 } else { 1 });
            // Until the other side has had enough.
            while sent.is_ok() {
                sent = writer.write_all(lines.as_bytes());
                if request.contains("/cut") {
                    break;
                }
                if request.contains("/slow") {
                    thread::sleep(Duration::from_millis(500));
                }
            }
        });
    }
}

/// `/etc/resolv.conf` and `/etc/hosts` of a namespace, as `ip netns exec` shows them.
pub struct Resolv {
    directory: PathBuf,
}

impl Resolv {
    pub fn new(namespace: &Namespace, nameserver: IpAddr, hosts: &[(IpAddr, &str)]) -> Self {
        let resolv = format!("nameserver {nameserver}\nsearch example.net\n");
        Self::of(namespace, resolv.as_bytes(), hosts)
    }

    pub fn of(namespace: &Namespace, resolv: &[u8], hosts: &[(IpAddr, &str)]) -> Self {
        let directory = Path::new("/etc/netns").join(&namespace.name);
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join("resolv.conf"), resolv).unwrap();
        let hosts = hosts
            .iter()
            .map(|(address, name)| format!("{address} {name}\n"));
        fs::write(directory.join("hosts"), hosts.collect::<String>()).unwrap();
        Self { directory }
    }
}

impl Drop for Resolv {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
        // Only if nobody else needs it.
        let _ = fs::remove_dir("/etc/netns");
    }
}
