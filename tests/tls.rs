//! TLS that is forced: real servers that take both, real clients that try both.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver},
    },
    thread,
    time::{Duration, Instant},
};

use filter_tests::{
    databases::{Balancer, Maria, Postgres, Redis, come_from, mariadb, psql, psql_at_home, redis},
    net::{
        ALLOWED4, ALLOWED6, CLIENT4, Connection, DB4, DENIED4, Namespace, Net, PATIENCE, Polling,
        agent_binary, next_layout_binary, policy, released_binary, wait_until,
    },
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};

/// A dedicated database on which TLS is forced, as it is unless the policy says otherwise.
fn forced(engine: &str, port: u16, more: &str) -> String {
    format!(
        "{{name: orders, port: {port}, engine: {engine}, model: dedicated, rules: [{{cidr: \
         203.0.113.10/32}}, {{cidr: '2001:db8::10/128'}}], cluster: [10.0.0.2/32], {more}}}"
    )
}

/// A network whose client gets what native XDP sends back.
struct Polled {
    net: Net,
    _polling: Polling,
}

impl std::ops::Deref for Polled {
    type Target = Net;

    fn deref(&self) -> &Net {
        &self.net
    }
}

impl std::ops::DerefMut for Polled {
    fn deref_mut(&mut self) -> &mut Net {
        &mut self.net
    }
}

fn start(name: &str, mode: &str, database: &str) -> Polled {
    let net = Net::new(name);
    let polling = Polling::start(&net);
    net.write_policy(&policy("eth0", mode, &[database.into()]));
    Polled {
        net,
        _polling: polling,
    }
}

fn connections(net: &Net) -> Value {
    net.agent_json(&["status"])["databases"][0]["connections"].clone()
}

#[test]
fn psql_gets_in_with_tls_only() {
    for mode in ["native", "generic"] {
        let mut net = start(
            &format!("tls-psql-{mode}"),
            mode,
            &forced("postgresql", 5432, ""),
        );
        let _server = Postgres::start(&net);
        net.start();
        let encrypted = "select ssl from pg_stat_ssl where pid = pg_backend_pid()";
        for source in [ALLOWED4.into(), ALLOWED6.into()] {
            for options in [
                "sslmode=require",
                "sslmode=prefer",
                "sslmode=prefer gssencmode=disable",
            ] {
                assert_eq!(
                    psql(&net, source, options, encrypted).as_deref(),
                    Ok("t"),
                    "{options}"
                );
            }
            let error = psql(&net, source, "sslmode=disable", "select 1").unwrap_err();
            assert!(error.contains("TLS is required here"), "{error}");
        }
        // Its cluster is exempt.
        let clear = psql(&net, CLIENT4.into(), "sslmode=disable", encrypted);
        assert_eq!(clear.as_deref(), Ok("f"));
        // No other session is left on the server.
        let sessions =
            "select count(*) from pg_stat_activity where backend_type = 'client backend'";
        let alone = || psql_at_home(&net, sessions).as_deref() == Ok("1");
        assert!(wait_until(alone));
        assert_eq!(connections(&net), json!({"tls": 6, "refused": 2}));
    }
}

#[test]
fn mariadb_client_gets_in_with_tls_only() {
    let mut net = start("tls-mariadb", "native", &forced("mysql", 3306, ""));
    let _server = Maria::start(&net);
    net.start();
    let cipher = "show status like 'Ssl_cipher'";
    let encrypted = mariadb(&net, &["--ssl"], cipher).unwrap();
    assert!(encrypted.len() > "Ssl_cipher\t".len(), "{encrypted}");
    let error = mariadb(&net, &["--skip-ssl"], cipher).unwrap_err();
    assert!(
        error.contains("3159") && error.contains("TLS is required here"),
        "{error}"
    );
    assert_eq!(connections(&net), json!({"tls": 1, "refused": 1}));
    // The server lets it in where TLS is not forced.
    net.reload(&policy(
        "eth0",
        "native",
        &[forced("mysql", 3306, "force_tls: false")],
    ));
    assert_eq!(
        mariadb(&net, &["--skip-ssl"], cipher).as_deref(),
        Ok("Ssl_cipher")
    );
}

/// Fault C13: every connection through such a balancer was refused.
#[test]
fn clients_of_a_load_balancer_get_in_with_tls_only() {
    let database = forced("mysql", Maria::PORT, "proxy_protocol: required");
    let mut net = start("tls-haproxy", "native", &database);
    let _server = Maria::start(&net);
    net.start();
    let _balancer = Balancer::start(&net);
    let query = "show status like 'Ssl_cipher'";
    for port in Balancer::PORTS {
        let at = ["--host=127.0.0.1", &format!("--port={port}")];
        let encrypted = mariadb(&net, &[&at[..], &["--ssl"]].concat(), query).unwrap();
        assert!(encrypted.len() > "Ssl_cipher\t".len(), "{encrypted}");
        let error = mariadb(&net, &[&at[..], &["--skip-ssl"]].concat(), query).unwrap_err();
        assert!(error.contains("TLS is required here"), "{error}");
    }
    // Past the balancer.
    let error = mariadb(&net, &["--ssl"], query).unwrap_err();
    assert!(!error.contains("TLS is required"), "{error}");
    let dropped = &net.agent_json(&["status"])["databases"][0]["dropped"];
    assert_eq!(dropped["no-proxy-header"], 1);
}

#[test]
fn redis_client_gets_in_with_tls_only() {
    for (port, begins_with_tls) in [(Redis::PORT, true), (Redis::CLEAR_PORT, false)] {
        let name = format!("tls-redis-{begins_with_tls}");
        let mut net = start(&name, "native", &forced("redis", port, ""));
        let _server = Redis::start(&net);
        net.start();
        if begins_with_tls {
            let options = ["--tls", "--insecure", "ping"];
            assert_eq!(redis(&net, port, &options).as_deref(), Ok("PONG"));
            assert_eq!(connections(&net), json!({"tls": 1}));
        }
        let error = redis(&net, port, &["ping"]).unwrap_err();
        assert!(error.contains("TLS is required here"), "{error}");
        assert_eq!(connections(&net)["refused"], 1);
    }
}

/// Connections to the port that the server's kernel has, beside its listening socket.
fn server_sockets(net: &Net, port: u16) -> usize {
    let state = format!("( sport = :{port} )");
    let output = net.db.output(Command::new("ss").args(["-Htan", &state]));
    let text = String::from_utf8(output.stdout).unwrap();
    let open = |line: &&str| !line.starts_with("LISTEN") && !line.starts_with("TIME-WAIT");
    text.lines().filter(open).count()
}

#[test]
fn server_of_a_refused_client_is_free_at_once() {
    let mut net = start("tls-free", "native", &forced("postgresql", 5432, ""));
    let _server = Postgres::start(&net);
    net.start();
    for _ in 0..20 {
        psql(&net, ALLOWED4.into(), "sslmode=disable", "select 1").unwrap_err();
    }
    assert!(wait_until(|| server_sockets(&net, 5432) == 0));
    assert_eq!(connections(&net), json!({"refused": 20}));
}

#[test]
fn client_over_a_link_that_takes_no_answer_is_reset_all_the_same() {
    let mut net = Net::new("tls-no-answer");
    let _server = Postgres::start(&net);
    net.write_policy(&policy("eth0", "native", &[forced("postgresql", 5432, "")]));
    net.start();
    let error = psql(&net, ALLOWED4.into(), "sslmode=disable", "select 1").unwrap_err();
    assert!(
        error.contains("closed the connection unexpectedly"),
        "{error}"
    );
    assert!(wait_until(|| server_sockets(&net, 5432) == 0));
}

/// A psql that stays, reads what it is told and prints at once.
struct Session {
    child: Child,
    lines: Receiver<String>,
}

impl Session {
    fn start(net: &Net, source: IpAddr, options: &str) -> Self {
        let database = come_from(net, source);
        let mut command = Command::new("psql");
        command
            .args(["--no-psqlrc", "-At"])
            .arg(format!("host={database} user=postgres {options}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = net.client.run(|| command.spawn().unwrap());
        let (sender, lines) = mpsc::channel();
        let out = BufReader::new(child.stdout.take().unwrap());
        let err = BufReader::new(child.stderr.take().unwrap());
        let other = sender.clone();
        thread::spawn(move || {
            out.lines()
                .map_while(Result::ok)
                .try_for_each(|l| sender.send(l))
        });
        thread::spawn(move || {
            err.lines()
                .map_while(Result::ok)
                .try_for_each(|l| other.send(l))
        });
        Self { child, lines }
    }

    fn tell(&mut self, query: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{query}").unwrap();
    }

    fn ask(&mut self, query: &str) -> String {
        self.tell(query);
        self.lines.recv_timeout(PATIENCE).unwrap()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn query_is_cancelled_in_the_clear_unless_that_is_forbidden() {
    let mut net = start("tls-cancel", "native", &forced("postgresql", 5432, ""));
    let _server = Postgres::start(&net);
    net.start();
    let mut session = Session::start(&net, ALLOWED4.into(), "sslmode=require");
    assert_eq!(session.ask("select 1;"), "1");
    let sleeping = || {
        let query = "select count(*) from pg_stat_activity where wait_event = 'PgSleep'";
        psql_at_home(&net, query).unwrap()
    };
    let interrupt = |session: &mut Session| {
        session.tell("select pg_sleep(600);");
        assert!(wait_until(|| sleeping() == "1"));
        kill(
            Pid::from_raw(session.child.id().cast_signed()),
            Signal::SIGINT,
        )
        .unwrap();
        session.lines.recv_timeout(PATIENCE).unwrap()
    };
    let text = interrupt(&mut session);
    assert!(text.contains("Cancel request sent"), "{text}");
    let text = session.lines.recv_timeout(PATIENCE).unwrap();
    assert!(
        text.contains("canceling statement due to user request"),
        "{text}"
    );
    assert_eq!(connections(&net), json!({"tls": 1, "cancel": 1}));
    net.reload(&policy(
        "eth0",
        "native",
        &[forced("postgresql", 5432, "cancel_in_clear: false")],
    ));
    let mut session = Session::start(&net, ALLOWED4.into(), "sslmode=require");
    let text = interrupt(&mut session);
    assert!(text.contains("Cancel request sent"), "{text}");
    assert_eq!(sleeping(), "1");
    assert_eq!(connections(&net)["refused"], 1);
}

#[test]
fn session_from_before_is_let_run_until_existing_ones_are_judged() {
    let unforced = forced("postgresql", 5432, "force_tls: false");
    let mut net = start("tls-existing", "native", &unforced);
    let _server = Postgres::start(&net);
    net.start();
    let mut clear = Session::start(&net, ALLOWED4.into(), "sslmode=disable");
    let mut encrypted = Session::start(&net, ALLOWED4.into(), "sslmode=require");
    assert_eq!(
        (clear.ask("select 1;"), encrypted.ask("select 1;")),
        ("1".into(), "1".into())
    );
    net.reload(&policy("eth0", "native", &[forced("postgresql", 5432, "")]));
    assert_eq!(
        (clear.ask("select 2;"), encrypted.ask("select 2;")),
        ("2".into(), "2".into())
    );
    assert_eq!(connections(&net), json!({"unjudged": 2}));
    psql(&net, ALLOWED4.into(), "sslmode=disable", "select 1").unwrap_err();
    // Over a restart as well.
    net.kill();
    net.start();
    assert_eq!(
        (clear.ask("select 3;"), encrypted.ask("select 3;")),
        ("3".into(), "3".into())
    );
    net.agent_text(&["reload", "--existing"]);
    assert_eq!(encrypted.ask("select 4;"), "4");
    let text = clear.ask("select 4;");
    assert!(text.contains("TLS is required here"), "{text}");
    assert_eq!(connections(&net), json!({"unjudged": 2, "refused": 2}));
}

#[test]
fn monitored_tls_refuses_nobody_and_keeps_denied_sources_out() {
    let monitored = forced("postgresql", 5432, "monitor: tls");
    let mut net = start("tls-monitored", "native", &monitored);
    let _server = Postgres::start(&net);
    net.start();
    let clear = || psql(&net, ALLOWED4.into(), "sslmode=disable", "select 1");
    assert_eq!(clear().as_deref(), Ok("1"));
    let encrypted = psql(&net, ALLOWED4.into(), "sslmode=require", "select 1");
    assert_eq!(encrypted.as_deref(), Ok("1"));
    let denied = net.connect(DENIED4.into(), SocketAddr::new(DB4.into(), 5432));
    assert_eq!(denied, Connection::Silence);
    let status = net.agent_json(&["status"]);
    let database = &status["databases"][0];
    assert_eq!(database["connections"], json!({}));
    let counted = json!({"refused": 1, "tls": 1});
    assert_eq!(database["monitored_connections"], counted);
    let drops = net.agent_text(&["drops"]);
    assert!(drops.contains("not-tls"), "{drops}");
    net.reload(&policy("eth0", "native", &[forced("postgresql", 5432, "")]));
    let error = psql(&net, ALLOWED4.into(), "sslmode=disable", "select 1").unwrap_err();
    assert!(error.contains("TLS is required here"), "{error}");
}

#[test]
fn what_is_known_of_connections_outlasts_the_agent() {
    // Built before there are connections that would wait for it.
    let binaries = [agent_binary(), next_layout_binary(), agent_binary()];
    let mut net = start("tls-restart", "native", &forced("postgresql", 5432, ""));
    let _server = Postgres::start(&net);
    net.start();
    let mut session = Session::start(&net, ALLOWED4.into(), "sslmode=require");
    assert_eq!(session.ask("select 1;"), "1");
    let opened = net.client.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket
            .bind(&SocketAddr::new(ALLOWED4.into(), 0).into())
            .unwrap();
        socket
            .connect(&SocketAddr::new(DB4.into(), 5432).into())
            .unwrap();
        TcpStream::from(socket)
    });
    // An agent of another layout goes on with the same map, and so does this one after it.
    for binary in binaries {
        net.kill();
        net.binary = binary.to_owned();
        net.start();
        assert_eq!(session.ask("select 2;"), "2");
    }
    let mut opened = opened;
    opened
        .write_all(b"\0\0\0\x19\0\x03\0\0user\0postgres\0\0")
        .unwrap();
    let mut answer = Vec::new();
    opened.set_read_timeout(Some(PATIENCE)).unwrap();
    opened.read_to_end(&mut answer).unwrap();
    let answer = String::from_utf8_lossy(&answer).into_owned();
    assert!(answer.contains("TLS is required here"), "{answer}");
    // A downgrade counts from 0.
    assert_eq!(connections(&net), json!({"refused": 1}));
}

/// From what hosts run, and back to it, with a connection open.
#[test]
#[ignore = "needs the agent of an earlier release, which `cargo xtask test --full` builds"]
fn connections_outlast_the_upgrade_from_0_1_0_and_the_way_back() {
    let [before, now] = [released_binary("0.1.0"), agent_binary().to_owned()];
    let mut net = start("tls-before", "native", &forced("postgresql", 5432, ""));
    let _server = Postgres::start(&net);
    net.binary = before.clone();
    net.start();
    let mut session = Session::start(&net, ALLOWED4.into(), "sslmode=require");
    for (round, binary) in [&now, &before, &now, &now].into_iter().enumerate() {
        assert_eq!(session.ask("select 1;"), "1");
        match round % 2 {
            0 => net.terminate(),
            _ => net.kill(),
        }
        assert_eq!(session.ask("select 2;"), "2");
        net.binary = binary.clone();
        net.start();
        assert_eq!(session.ask("select 3;"), "3");
        let encrypted = psql(&net, ALLOWED4.into(), "sslmode=require", "select 4");
        assert_eq!(encrypted.as_deref(), Ok("4"));
        let error = psql(&net, ALLOWED4.into(), "sslmode=disable", "select 5").unwrap_err();
        assert!(error.contains("TLS is required here"), "{error}");
    }
}

#[test]
fn replication_streams_in_the_clear_from_a_cluster_member_only() {
    let mut net = start("tls-replication", "native", &forced("postgresql", 5432, ""));
    let _server = Postgres::start(&net);
    net.start();
    let backup = |source: IpAddr, name: &str| {
        let database = come_from(&net, source);
        let mut command = Command::new("pg_basebackup");
        command
            .args([
                "--wal-method=stream",
                "--no-sync",
                "--checkpoint=fast",
                "-D",
            ])
            .arg(net.dir().join(name))
            .arg("-d")
            .arg(format!("host={database} user=postgres sslmode=disable"));
        net.client.output(&mut command)
    };
    let member = backup(CLIENT4.into(), "member");
    assert!(member.status.success(), "{member:?}");
    let other = backup(ALLOWED4.into(), "other");
    let error = String::from_utf8_lossy(&other.stderr).into_owned();
    assert!(error.contains("TLS is required here"), "{error}");
}

#[test]
fn small_segments_and_lost_packets_keep_no_correct_client_out() {
    let mut net = start("tls-loss", "native", &forced("postgresql", 5432, ""));
    let _server = Postgres::start(&net);
    net.start();
    // Segments of 88 bytes, and one in ten packets of either side lost.
    net.client
        .ip("route replace 10.0.0.1/32 dev eth0 src 203.0.113.10 advmss 88");
    net.db
        .ip("route replace 203.0.113.10/32 dev eth0 advmss 88");
    for namespace in [&net.client, &net.db] {
        let rules = "table inet loss { chain output { type filter hook output priority 0; \
                     tcp dport 5432 numgen random mod 10 0 drop; \
                     tcp sport 5432 numgen random mod 10 0 drop; }; }";
        let output = namespace.output(Command::new("nft").arg(rules));
        assert!(output.status.success(), "{output:?}");
    }
    let mut bench = Command::new("pgbench");
    bench
        .args(["--no-vacuum", "--connect", "-c", "20", "-t", "3", "-f"])
        .arg(write_query(&net))
        .arg("host=10.0.0.1 user=postgres dbname=postgres sslmode=require");
    let output = net.client.output(&mut bench);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        text.contains("actually processed: 60/60"),
        "{text} {output:?}"
    );
    assert_eq!(connections(&net)["refused"], Value::Null);
}

fn write_query(net: &Net) -> PathBuf {
    let path = net.dir().join("query.sql");
    fs::write(&path, "select repeat('x', 10);\n").unwrap();
    path
}

#[test]
fn other_clients_begin_with_tls_as_their_engines_do() {
    let mut net = start("tls-openssl", "native", &forced("postgresql", 5432, ""));
    let _server = Postgres::start(&net);
    net.start();
    come_from(&net, ALLOWED4.into());
    let openssl = |net: &Net, options: &[&str]| {
        let mut command = Command::new("timeout");
        command.arg(PATIENCE.as_secs().to_string());
        command.args(["openssl", "s_client", "-brief", "-connect", "10.0.0.1:5432"]);
        command.args(options).stdin(Stdio::null());
        let output = net.client.output(&mut command);
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    };
    let text = openssl(&net, &["-starttls", "postgres"]);
    assert!(text.contains("CONNECTION ESTABLISHED"), "{text}");
    // As of PostgreSQL 17: it reaches the server, which is older.
    openssl(&net, &[]);
    assert_eq!(connections(&net), json!({"tls": 2}));
    let python = |ssl: &str| {
        let script = format!(
            "import asyncio, asyncpg\nasync def main():\n  c = await asyncpg.connect(\
             host='10.0.0.1', user='postgres', timeout={}, ssl={ssl})\n  print(await \
             c.fetchval('select ssl from pg_stat_ssl where pid = pg_backend_pid()'))\n\
             asyncio.run(main())",
            PATIENCE.as_secs()
        );
        let output = net
            .client
            .output(Command::new("/usr/bin/python3").args(["-c", &script]));
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    };
    assert_eq!(python("'require'").trim(), "True");
    assert_eq!(python("'prefer'").trim(), "True");
    let refused = python("False");
    assert!(refused.contains("TLS is required here"), "{refused}");
}

#[test]
fn database_behind_a_published_port_is_protected_too() {
    let mut net = start("tls-published", "native", &forced("postgresql", 5432, ""));
    let container = Namespace::new("tls-published-container".into());
    net.db.sysctl(&[("ipv4/ip_forward", 1)]);
    net.db.ip(&format!(
        "link add docker0 type veth peer name eth0 netns {}
         link set docker0 up
         address add 172.17.0.1/24 dev docker0",
        container.name
    ));
    container.ip("link set eth0 up
         link set lo up
         address add 172.17.0.2/24 dev eth0
         route add default via 172.17.0.1 dev eth0");
    let rules = "table ip published { chain prerouting { type nat hook prerouting priority -100; \
                 tcp dport 5432 dnat to 172.17.0.2:5432; }; }";
    let output = net.db.output(Command::new("nft").arg(rules));
    assert!(output.status.success(), "{output:?}");
    let _server = Postgres::start_in(&net, &container);
    net.start();
    let encrypted = || psql(&net, ALLOWED4.into(), "sslmode=require", "select 1");
    assert!(wait_until(|| encrypted().as_deref() == Ok("1")));
    let error = psql(&net, ALLOWED4.into(), "sslmode=disable", "select 1").unwrap_err();
    assert!(error.contains("TLS is required here"), "{error}");
    let sockets = || {
        let output = container.output(Command::new("ss").args(["-Htan", "( sport = :5432 )"]));
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines()
            .filter(|line| line.starts_with("ESTAB"))
            .count()
    };
    assert!(wait_until(|| sockets() == 0));
}

/// Who forwards the packets of a database, or has stopped its server, is told: nothing here judges its connections.
#[test]
fn connections_that_arrive_at_no_socket_are_a_warning() {
    let mut net = start("tls-lost", "native", &forced("postgresql", 5432, ""));
    net.start();
    let database = SocketAddr::new(DB4.into(), 5432);
    // A change of an interface has the agent look at everything.
    let mut queue = 1000;
    let mut is_warned = || {
        queue += 1;
        net.db.ip(&format!("link set lo txqueuelen {queue}"));
        thread::sleep(Duration::from_secs(1));
        let status = net.agent_json(&["status"]);
        assert_eq!(status["errors"], json!([]));
        let warnings = status["warnings"].as_array().unwrap().iter();
        let mut texts = warnings.map(|warning| warning.as_str().unwrap());
        texts.any(|text| text.starts_with("connections to database orders begin, and none arrives"))
    };
    let warned = wait_until(|| {
        net.connect(ALLOWED4.into(), database);
        is_warned()
    });
    assert!(warned);
    let _server = net.echo(5432);
    let connected = net.connect(ALLOWED4.into(), database);
    assert_eq!(connected, Connection::Accepted);
    assert!(wait_until(|| !is_warned()));
}

/// SYNs from everywhere, as fast as one processor sends them, to databases that are open to everybody.
#[test]
fn flood_of_forged_syns_keeps_no_client_out() {
    let mut net = start("tls-flood", "native", &forced("other", 1, ""));
    let databases = [
        ("postgresql", Postgres::PORT),
        ("mysql", Maria::PORT),
        ("redis", Redis::PORT),
    ];
    let internet = databases.map(|(engine, port)| {
        format!(
            "{{name: {engine}, port: {port}, engine: {engine}, model: shared, force_tls: true, \
             internet: true}}"
        )
    });
    net.write_policy(&policy("eth0", "native", &internet));
    let _servers = (
        Postgres::start(&net),
        Maria::start(&net),
        Redis::start(&net),
    );
    net.start();
    let mut flood = net.raw_client(DENIED4.into());
    // More than the maps hold.
    let frames: Vec<Vec<u8>> = (0..50_000)
        .map(|number| {
            flood.address = Ipv4Addr::from(fastrand::u32(0x0b00_0000..0x7f00_0000)).into();
            let connection = flood.connection(databases[number % databases.len()].1);
            connection.packet(&connection.syn()).frame()
        })
        .collect();
    let is_over = AtomicBool::new(false);
    let sent = thread::scope(|scope| {
        let wire = net.wire();
        let (frames, is_over) = (&frames, &is_over);
        let flooding = scope.spawn(move || {
            let (begun, mut sent) = (Instant::now(), 0);
            while !is_over.load(Ordering::Relaxed) && begun.elapsed() < PATIENCE {
                wire.send(&frames[sent % frames.len()]);
                sent += 1;
            }
            let rate = sent as f64 / begun.elapsed().as_secs_f64();
            println!("{sent} SYNs were sent, {rate:.0} per second");
            sent
        });
        for _ in 0..20 {
            let answer = psql(&net, ALLOWED4.into(), "sslmode=require", "select 1");
            assert_eq!(answer.as_deref(), Ok("1"));
            assert_eq!(mariadb(&net, &["--ssl"], "select 2").as_deref(), Ok("2"));
            let pong = redis(&net, Redis::PORT, &["--tls", "--insecure", "ping"]);
            assert_eq!(pong.as_deref(), Ok("PONG"));
        }
        is_over.store(true, Ordering::Relaxed);
        flooding.join().unwrap()
    });
    assert!(sent > 100_000, "{sent}");
    let status = net.agent_json(&["status"]);
    for database in status["databases"].as_array().unwrap() {
        assert_eq!(database["connections"], json!({"tls": 20}));
    }
}

/// Half of them with TLS, half in the clear, from many ports at once.
#[test]
fn ten_thousand_connections_are_judged_right() {
    const THREADS: usize = 10;
    const EACH: usize = 1000;
    let mut net = start("tls-soak", "native", &forced("postgresql", 5432, ""));
    let _server = Postgres::start(&net);
    net.start();
    let connect = || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket
            .bind(&SocketAddr::new(ALLOWED4.into(), 0).into())
            .unwrap();
        socket
            .connect(&SocketAddr::new(DB4.into(), 5432).into())
            .unwrap();
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    };
    let one = |number: usize| {
        let mut stream = connect();
        let mut answer = Vec::new();
        if number.is_multiple_of(2) {
            stream.write_all(&[0, 0, 0, 8, 4, 210, 22, 47]).unwrap();
            let mut taken = [0];
            stream.read_exact(&mut taken).unwrap();
            assert_eq!(taken, *b"S");
            // A ClientHello that the server answers with an alert, or with silence.
            stream.write_all(&[22, 3, 1, 0, 5, 1, 0, 0, 1, 0]).unwrap();
            let _ = stream.read_to_end(&mut answer);
            assert!(!answer.starts_with(b"E"), "{answer:?}");
        } else {
            stream
                .write_all(b"\0\0\0\x19\0\x03\0\0user\0postgres\0\0")
                .unwrap();
            let _ = stream.read_to_end(&mut answer);
            let text = String::from_utf8_lossy(&answer);
            assert!(text.contains("TLS is required here"), "{text}");
        }
    };
    let client = &net.client;
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| client.run(|| (0..EACH).for_each(one)));
        }
    });
    let half = THREADS * EACH / 2;
    assert_eq!(connections(&net), json!({"tls": half, "refused": half}));
}
