//! TLS that is forced: real servers that take both, real clients that try both.

use std::{
    fs,
    time::{Duration, Instant},
};

use filter_agent::{
    filter::{Attached, Filter},
    host::Interface,
    policy::Mode,
};
use filter_tests::{
    databases::{Maria, Postgres, Redis, mariadb, psql, redis},
    net::{ALLOWED4, ALLOWED6, CLIENT4, Net, policy},
};
use serde_json::{Value, json};

/// A dedicated database on which TLS is forced, as it is unless the policy says otherwise.
fn forced(engine: &str, port: u16, more: &str) -> String {
    format!(
        "{{name: orders, port: {port}, engine: {engine}, model: dedicated, rules: [{{cidr: \
         203.0.113.10/32}}, {{cidr: '2001:db8::10/128'}}], cluster: [10.0.0.2/32], {more}}}"
    )
}

/// A network whose client gets what native XDP sends back: over a veth that is only polled by an
/// interface with a program of its own.
struct Polled {
    net: Net,
    _filter: Filter,
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
    let pins = net.bpffs().join("client");
    fs::create_dir(&pins).unwrap();
    let mut filter = Filter::open(&pins, Some(1024), 1024).unwrap();
    net.client.run(|| {
        let interface = Interface {
            index: nix::net::if_::if_nametoindex("eth0").unwrap(),
            name: "eth0".into(),
            ethernet: true,
            ..Interface::default()
        };
        let attached = filter.attach(&interface, Mode::Native).unwrap();
        assert_eq!(attached, Attached::Native);
    });
    net.write_policy(&policy("eth0", mode, &[database.into()]));
    Polled {
        net,
        _filter: filter,
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
            let begin = Instant::now();
            let error = psql(&net, source, "sslmode=disable", "select 1").unwrap_err();
            assert!(error.contains("TLS is required here"), "{error}");
            assert!(
                begin.elapsed() < Duration::from_secs(1),
                "{:?}",
                begin.elapsed()
            );
        }
        // Its cluster is exempt.
        let clear = psql(&net, CLIENT4.into(), "sslmode=disable", encrypted);
        assert_eq!(clear.as_deref(), Ok("f"));
        let waiting = "select count(*) from pg_stat_activity where backend_type = 'client backend'";
        assert_eq!(
            psql(&net, ALLOWED4.into(), "sslmode=require", waiting).as_deref(),
            Ok("1")
        );
        assert_eq!(connections(&net), json!({"tls": 7, "refused": 2}));
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
    let begin = Instant::now();
    let error = mariadb(&net, &["--skip-ssl"], cipher).unwrap_err();
    assert!(
        error.contains("3159") && error.contains("TLS is required here"),
        "{error}"
    );
    assert!(
        begin.elapsed() < Duration::from_secs(1),
        "{:?}",
        begin.elapsed()
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
        let begin = Instant::now();
        let error = redis(&net, port, &["ping"]).unwrap_err();
        assert!(error.contains("TLS is required here"), "{error}");
        assert!(
            begin.elapsed() < Duration::from_secs(1),
            "{:?}",
            begin.elapsed()
        );
        assert_eq!(connections(&net)["refused"], 1);
    }
}
