//! Debian's database servers, started by tests inside their namespaces: each takes connections both with
//! TLS and in the clear, so that only the filter can be what refuses one.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use nix::{
    sys::signal::Signal,
    unistd::{User, chown},
};

use crate::{
    net::{CLIENT4, Connection, DB4, DB6, Namespace, Net, PATIENCE, succeed, wait_until},
    servers::{Ca, Certificate, Server},
};

/// A folder that a server's own user may use, and that user.
fn home(net: &Net, user: &str) -> (PathBuf, User) {
    let found = User::from_name(user).unwrap();
    let found = found.unwrap_or_else(|| panic!("the user {user} exists"));
    let home = net.dir().join(user);
    fs::create_dir_all(&home).unwrap();
    own(&home, &found);
    (home, found)
}

fn own(path: &Path, user: &User) {
    chown(path, Some(user.uid), Some(user.gid)).unwrap();
}

/// A certificate and its key, readable by the server's user.
fn certificate(net: &Net, home: &Path, user: &User) -> [PathBuf; 2] {
    use std::os::unix::fs::PermissionsExt as _;
    let ca = Ca::new(net.dir());
    let (certificate, key) = ca.certificate(&[&DB4.to_string()], Certificate::Good);
    [(certificate, "server.pem"), (key, "server.key")].map(|(from, name)| {
        let to = home.join(name);
        fs::copy(from, &to).unwrap();
        own(&to, user);
        fs::set_permissions(&to, fs::Permissions::from_mode(0o600)).unwrap();
        to
    })
}

fn wait_for_port(net: &Net, port: u16, what: &str) {
    let address = SocketAddr::new(IpAddr::from(DB4), port);
    let started = || net.connect(CLIENT4.into(), address) == Connection::Accepted;
    assert!(wait_until(started), "{what} does not start");
}

pub struct Postgres {
    server: Server,
}

impl Postgres {
    pub const PORT: u16 = 5432;

    pub fn start(net: &Net) -> Self {
        let server = Self::start_in(net, &net.db);
        wait_for_port(net, Self::PORT, "PostgreSQL");
        server
    }

    /// Elsewhere than on the database host, and does not wait.
    pub fn start_in(net: &Net, namespace: &Namespace) -> Self {
        let versions = fs::read_dir("/usr/lib/postgresql").expect("PostgreSQL is installed");
        let newest = versions.map(|entry| entry.unwrap().path()).max();
        let bin = newest.unwrap().join("bin");
        let (home, user) = home(net, "postgres");
        let data = home.join("data");
        fs::create_dir(&data).unwrap();
        own(&data, &user);
        let as_postgres = |program: &str| {
            let mut command = Command::new(bin.join(program));
            command.arg("-D").arg(&data).current_dir(&data);
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
            command
        };
        let options = [
            "--auth=trust",
            "--no-sync",
            "--username=postgres",
            "--encoding=UTF8",
        ];
        succeed(as_postgres("initdb").args(options));
        let access = "host all all all trust\nhost replication all all trust\n";
        fs::write(data.join("pg_hba.conf"), access).unwrap();
        let [certificate, key] = certificate(net, &home, &user);
        let mut server = as_postgres("postgres");
        for setting in [
            "listen_addresses=*",
            "unix_socket_directories=",
            "fsync=off",
            "max_connections=500",
            // As long as it may be, or no limit: a busy machine decides nothing.
            "authentication_timeout=600",
            "wal_sender_timeout=0",
            "ssl=on",
            &format!("ssl_cert_file={}", certificate.display()),
            &format!("ssl_key_file={}", key.display()),
        ] {
            server.arg("-c").arg(setting);
        }
        let server = Server::start(namespace, server, &net.dir().join("postgresql.log"));
        Self { server }
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // Immediate shutdown.
        self.server.signal(Signal::SIGQUIT);
        self.server.ends();
    }
}

/// Makes the client's connections to the database come from this address of the client's.
pub fn come_from(net: &Net, source: IpAddr) -> IpAddr {
    let (database, length) = match source {
        IpAddr::V4(_) => (IpAddr::from(DB4), 32),
        IpAddr::V6(_) => (DB6.into(), 128),
    };
    net.client.ip(&format!(
        "route replace {database}/{length} dev eth0 src {source}"
    ));
    database
}

/// What a query answers to psql at a source address of the client's. `options`: libpq's. Where nobody
/// is to answer, `connect_timeout=2` keeps it short.
pub fn psql(net: &Net, source: IpAddr, options: &str, query: &str) -> Result<String, String> {
    let database = come_from(net, source);
    let mut command = Command::new("psql");
    command
        .args(["--no-psqlrc", "-At", "-c", query])
        .arg(format!("host={database} user=postgres {options}"))
        .env("PGCONNECT_TIMEOUT", PATIENCE.as_secs().to_string());
    answer(&net.client.output(&mut command))
}

/// The same on the database host itself, past the filter.
pub fn psql_at_home(net: &Net, query: &str) -> Result<String, String> {
    let mut command = Command::new("psql");
    command
        .args(["--no-psqlrc", "-At", "-c", query])
        .arg("host=127.0.0.1 user=postgres sslmode=disable")
        .env("PGCONNECT_TIMEOUT", PATIENCE.as_secs().to_string());
    answer(&net.db.output(&mut command))
}

fn answer(output: &Output) -> Result<String, String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(text(&output.stderr))
    }
}

pub struct Maria {
    server: Server,
}

impl Maria {
    pub const PORT: u16 = 3306;

    pub fn start(net: &Net) -> Self {
        let (home, user) = home(net, "mysql");
        let data = home.join("data");
        let mut install = Command::new("mariadb-install-db");
        install
            .arg("--no-defaults")
            .arg(format!("--datadir={}", data.display()))
            // A server that starts removes what others keep in /tmp.
            .arg(format!("--tmpdir={}", home.display()))
            .args(["--user=mysql", "--auth-root-authentication-method=normal"])
            .args(["--skip-test-db", "--skip-name-resolve"]);
        succeed(&mut install);
        let [certificate, key] = certificate(net, &home, &user);
        let access = home.join("access.sql");
        fs::write(&access, "CREATE USER anyone@'%' IDENTIFIED BY 'secret';\n").unwrap();
        own(&access, &user);
        let mut server = Command::new("mariadbd");
        server
            .args(["--no-defaults", "--user=mysql", "--bind-address=0.0.0.0"])
            .args(["--skip-name-resolve", "--innodb-flush-log-at-trx-commit=0"])
            .arg("--connect-timeout=600")
            // Takes a PROXY header, and does without.
            .arg("--proxy-protocol-networks=203.0.113.0/24")
            .arg(format!("--datadir={}", data.display()))
            .arg(format!("--tmpdir={}", home.display()))
            .arg(format!("--socket={}", home.join("socket").display()))
            .arg(format!("--pid-file={}", home.join("pid").display()))
            .arg(format!("--init-file={}", access.display()))
            .arg(format!("--ssl-cert={}", certificate.display()))
            .arg(format!("--ssl-key={}", key.display()));
        let server = Server::start(&net.db, server, &net.dir().join("mariadb.log"));
        wait_for_port(net, Self::PORT, "MariaDB");
        Self { server }
    }
}

impl Drop for Maria {
    fn drop(&mut self) {
        self.server.signal(Signal::SIGKILL);
        self.server.ends();
    }
}

/// What a query answers to MariaDB's client. `options`: its own.
pub fn mariadb(net: &Net, options: &[&str], query: &str) -> Result<String, String> {
    let database = come_from(net, crate::net::ALLOWED4.into());
    let mut command = Command::new("mariadb");
    command
        .args(["--no-defaults", "--batch", "--skip-column-names"])
        .args(["--user=anyone", "--password=secret"])
        .arg(format!("--connect-timeout={}", PATIENCE.as_secs()))
        .arg(format!("--host={database}"))
        .args(options)
        .args(["--execute", query]);
    answer(&net.client.output(&mut command))
}

/// HAProxy at an allowed address, whose ports lead to MariaDB behind a PROXY header.
pub struct Balancer {
    _server: Server,
}

impl Balancer {
    /// On loopback: with a header of version 1, and of version 2.
    pub const PORTS: [u16; 2] = [3307, 3308];

    pub fn start(net: &Net) -> Self {
        let allowed = crate::net::ALLOWED4;
        let mut text = "defaults\n mode tcp\n timeout connect 20s\n timeout client 20s\n timeout \
                        server 20s\n"
            .to_owned();
        for (port, header) in Self::PORTS.into_iter().zip(["send-proxy", "send-proxy-v2"]) {
            let server = format!("{DB4}:{}", Maria::PORT);
            text += &format!(
                "listen on{port}\n bind 127.0.0.1:{port}\n server db {server} {header} source {allowed}\n"
            );
        }
        let configuration = net.dir().join("haproxy.cfg");
        fs::write(&configuration, text).unwrap();
        let mut server = Command::new("haproxy");
        server.arg("-db").arg("-f").arg(configuration);
        let server = Server::start(&net.client, server, &net.dir().join("haproxy.log"));
        for port in Self::PORTS {
            let listens = || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok();
            let listens = || net.client.run(listens);
            assert!(wait_until(listens), "HAProxy does not start");
        }
        Self { _server: server }
    }
}

pub struct Redis {
    server: Server,
}

impl Redis {
    /// With TLS only, and in the clear only: a port of Redis takes one or the other.
    pub const PORT: u16 = 6379;
    pub const CLEAR_PORT: u16 = 6380;

    pub fn start(net: &Net) -> Self {
        let (home, user) = home(net, "redis");
        let [certificate, key] = certificate(net, &home, &user);
        let mut server = Command::new("redis-server");
        server
            .current_dir(&home)
            .uid(user.uid.as_raw())
            .gid(user.gid.as_raw())
            .args(["--save", "", "--protected-mode", "no", "--bind", "0.0.0.0"])
            .args(["--tls-auth-clients", "no", "--tls-port"])
            .arg(Self::PORT.to_string())
            .arg("--port")
            .arg(Self::CLEAR_PORT.to_string())
            .arg("--tls-cert-file")
            .arg(&certificate)
            .arg("--tls-key-file")
            .arg(&key)
            .arg("--tls-ca-cert-file")
            .arg(&certificate);
        let server = Server::start(&net.db, server, &net.dir().join("redis.log"));
        wait_for_port(net, Self::PORT, "Redis");
        Self { server }
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.server.signal(Signal::SIGKILL);
        self.server.ends();
    }
}

/// What a command answers to redis-cli. `options`: its own.
pub fn redis(net: &Net, port: u16, options: &[&str]) -> Result<String, String> {
    let database: Ipv4Addr = DB4;
    come_from(net, crate::net::ALLOWED4.into());
    let mut command = Command::new("timeout");
    command
        .arg(PATIENCE.as_secs().to_string())
        .args(["redis-cli", "-e", "-h"])
        .arg(database.to_string())
        .arg("-p")
        .arg(port.to_string())
        .args(options);
    answer(&net.client.output(&mut command))
}
