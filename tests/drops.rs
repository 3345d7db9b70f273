//! Who is turned away is told, and a flood neither hides anybody nor costs more than it may.

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    os::unix::net::UnixStream,
    process::Stdio,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use filter_agent::kernel::samples::Dropped;
use filter_common::{CACHED_SOURCES, Reason, SAMPLES_GRANTED};
use filter_tests::{
    frames::{Packet, Protocol, Rng},
    loaded::Loaded,
    net::{
        ALLOWED4, CLIENT4, Connection, DB4, DB6, DENIED4, DENIED6, Net, Polling, Protected,
        addressing, bound, dedicated, policy, wait_until,
    },
};
use jiff::{SignedDuration, Timestamp};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use serde_json::Value;

const PORT: u16 = 5432;
const MONITORED: u16 = 3306;

fn orders() -> String {
    let orders = dedicated("orders", PORT, &["203.0.113.10/32"], "");
    let shop = dedicated("shop", MONITORED, &[], "monitor: true");
    policy("eth0", "native", &[orders, shop])
}

fn segment(source: IpAddr, port: u16) -> Vec<u8> {
    Packet::new(&addressing(source, port, Protocol::Tcp), 1).frame()
}

fn at(address: impl Into<IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(address.into(), port)
}

/// Packets of each source, as `drops` tells them.
fn told(drops: &Value, database: &str, source: impl Into<IpAddr>) -> u64 {
    let source = source.into().to_string();
    let sources = drops["sources"].as_array().unwrap().iter();
    let mut found = sources.filter(|d| d["database"] == database && d["source"] == *source);
    found.next().map_or(0, |d| d["packets"].as_u64().unwrap())
}

#[test]
fn sources_turned_away_are_told_with_database_and_reason() {
    let mut net = Net::new("drops");
    let _listener = net.listen(PORT);
    let _monitored = net.listen(MONITORED);
    net.write_policy(&orders());
    net.start();
    let nobody = net.agent_text(&["drops"]);
    assert!(nobody.starts_with("no packet was dropped"), "{nobody}");
    let attempts = [
        (DENIED4.into(), at(DB4, PORT)),
        (DENIED6.into(), at(DB6, PORT)),
    ];
    let silence = [Connection::Silence, Connection::Silence];
    assert_eq!(net.connect_all(&attempts), silence);
    for (source, port) in [(ALLOWED4, PORT), (CLIENT4, MONITORED)] {
        let connected = net.connect(source.into(), at(DB4, port));
        assert_eq!(connected, Connection::Accepted);
    }
    net.wire().send(&segment(DENIED4.into(), PORT)[..35]);
    assert!(wait_until(|| {
        let drops = net.agent_json(&["drops"]);
        drops["sources"].to_string().contains("bad-header")
    }));

    let drops = net.agent_json(&["drops"]);
    let status = net.agent_json(&["status"]);
    let told4 = told(&drops, "orders", DENIED4);
    let told6 = told(&drops, "orders", DENIED6);
    assert!(told4 >= 1 && told6 >= 1, "{drops:#}");
    let counted = &status["databases"][0]["dropped"]["not-allowed"];
    assert_eq!(Some(told4 + told6), counted.as_u64(), "{drops:#}");
    assert_eq!(drops["unsampled"], serde_json::json!([]));
    let all = drops["sources"].as_array().unwrap();
    for dropped in all {
        let expected = match dropped["database"].as_str() {
            Some("orders") => ("not-allowed", false, dropped["source"].is_string()),
            Some("shop") => ("not-allowed", true, dropped["source"] == "10.0.0.2"),
            _ => ("bad-header", false, dropped["source"].is_null()),
        };
        let (reason, monitor) = (dropped["reason"].as_str(), dropped["monitor"].as_bool());
        assert_eq!(
            (reason, monitor, true),
            (Some(expected.0), Some(expected.1), expected.2)
        );
    }
    assert_eq!(all.len(), 4, "{drops:#}");
    let one = net.agent_json(&["drops", "--database", "shop"]);
    assert_eq!(one["sources"].as_array().unwrap().len(), 1, "{one:#}");
    let text = net.agent_text(&["drops"]);
    for expected in [
        "orders",
        "198.51.100.7",
        "not-allowed, only monitored",
        "unknown",
    ] {
        assert!(text.contains(expected), "{text}");
    }
    let error = net.agent_error(&["drops", "--database", "nope"]);
    assert!(error.contains("no database nope"), "{error}");
}

#[test]
fn flood_from_one_source_hides_no_other_and_all_is_accounted_for() {
    const FLOOD: u64 = 30_000;
    let mut net = Net::new("drops-flood");
    net.fix_neighbours();
    net.write_policy(&orders());
    net.start();
    let (wire, flood) = (net.wire(), segment(DENIED4.into(), PORT));
    for number in 0..FLOOD {
        wire.send(&flood);
        if number == FLOOD / 2 {
            wire.send(&segment(DENIED6.into(), PORT));
        }
        // The link's queue holds 256 frames, and loses more.
        if number % 128 == 0 {
            net.settle();
        }
    }
    let counted = || {
        let status = net.agent_json(&["status"]);
        status["databases"][0]["dropped"]["not-allowed"].as_u64()
    };
    assert!(wait_until(|| counted() == Some(FLOOD + 1)));
    let drops = net.agent_json(&["drops"]);
    assert_eq!(told(&drops, "orders", DENIED6), 1, "{drops:#}");
    let sampled = told(&drops, "orders", DENIED4);
    assert!(sampled > 0 && sampled < FLOOD / 2, "{drops:#}");
    assert_eq!(drops["unsampled"][0]["packets"], FLOOD - sampled);
    let text = net.agent_text(&["drops"]);
    let more = format!("orders: {} more packets, not-allowed", FLOOD - sampled);
    assert!(text.contains(&more), "{text}");
}

/// Fault B8: every reader of the drops granted more samples, and opened the ring's lock to a flood.
#[test]
fn readers_of_the_drops_grant_no_samples() {
    const READS: u64 = 100;
    let mut net = Net::new("drops-read");
    net.fix_neighbours();
    net.write_policy(&orders());
    net.start();
    let begun = Instant::now();
    let (wire, frame) = (net.wire(), segment(DENIED4.into(), PORT));
    for _ in 0..READS {
        for _ in 0..10 {
            wire.send(&frame);
        }
        net.settle();
        let mut client = UnixStream::connect(net.socket()).unwrap();
        client
            .write_all(b"GET /v1/drops HTTP/1.1\r\nhost: x\r\n\r\n")
            .unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    let sampled = told(&net.agent_json(&["drops"]), "orders", DENIED4);
    // Once a second, and before.
    let grants = begun.elapsed().as_secs() + 3;
    let cpus = thread::available_parallelism().unwrap().get() as u64;
    let most = grants * u64::from(SAMPLES_GRANTED) * cpus;
    assert!(sampled > 0 && sampled <= most, "{sampled} of {most}");
}

/// Fault B9: samples taken before the database was removed were subtracted from what was counted since.
#[test]
fn drops_of_a_database_that_was_removed_and_added_again_are_accounted_for() {
    const AFTER: u64 = 100;
    let mut net = Net::new("drops-again");
    net.fix_neighbours();
    net.write_policy(&orders());
    net.start();
    let (wire, frame) = (net.wire(), segment(DENIED4.into(), PORT));
    wire.send(&frame);
    let sampled = || told(&net.agent_json(&["drops"]), "orders", DENIED4);
    assert!(wait_until(|| sampled() == 1));
    let shop = dedicated("shop", MONITORED, &[], "monitor: true");
    net.reload_unprotected(&policy("eth0", "native", &[shop]));
    net.reload(&orders());
    for _ in 0..AFTER {
        wire.send(&frame);
    }
    let counted = || {
        let status = net.agent_json(&["status"]);
        status["databases"][0]["dropped"]["not-allowed"].as_u64()
    };
    assert!(wait_until(|| counted() == Some(AFTER)));
    let drops = net.agent_json(&["drops"]);
    let unsampled = drops["unsampled"][0]["packets"].as_u64().unwrap();
    let sampled = told(&drops, "orders", DENIED4) - 1;
    assert_eq!(sampled + unsampled, AFTER, "{drops:#}");
}

#[test]
fn follow_tells_what_is_new_until_the_agent_stops() {
    let mut net = Net::new("drops-follow");
    net.fix_neighbours();
    net.write_policy(&orders());
    net.start();
    let wire = net.wire();
    wire.send(&segment(DENIED6.into(), PORT));
    let before = || told(&net.agent_json(&["drops"]), "orders", DENIED6) == 1;
    assert!(wait_until(before));
    let mut command = net.agent_command(&["drops", "--follow"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = net.db.run(|| command.spawn().unwrap());
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let (told, first) = mpsc::channel();
    let reader = thread::spawn(move || {
        let _ = told.send(lines.next().unwrap().unwrap());
        lines.map(Result::unwrap).collect::<Vec<_>>()
    });
    // Until it has asked for the first time, nothing is new.
    let line = loop {
        wire.send(&segment(DENIED4.into(), PORT));
        match first.recv_timeout(Duration::from_millis(200)) {
            Ok(line) => break line,
            Err(_) => assert!(child.try_wait().unwrap().is_none(), "it ended"),
        }
    };
    assert!(
        line.contains(" orders 198.51.100.7 ") && line.ends_with(" not-allowed"),
        "{line}"
    );
    net.terminate();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    let rest = reader.join().unwrap();
    assert!(rest.iter().all(|line| !line.contains(&DENIED6.to_string())));
}

#[test]
fn samples_are_bounded_until_the_agent_grants_more_however_often_it_reads() {
    // Samples are granted to each CPU.
    let mut cpu = CpuSet::new();
    cpu.set(0).unwrap();
    sched_setaffinity(Pid::from_raw(0), &cpu).unwrap();
    let mut loaded = Loaded::new(&orders());
    let cpus = 1;
    let (v4, v6) = (
        segment(DENIED4.into(), PORT),
        segment(DENIED6.into(), MONITORED),
    );
    loaded.run(&v4);
    assert_eq!(loaded.filter.dropped().unwrap(), [], "nothing was granted");
    for _ in 0..2 {
        loaded.filter.grant_samples().unwrap();
        for _ in 0..200 {
            loaded.run(&v4);
        }
        let dropped = loaded.filter.dropped().unwrap();
        assert!(dropped.len() >= SAMPLES_GRANTED as usize);
        assert!(dropped.len() <= cpus * SAMPLES_GRANTED as usize);
        let expected = Dropped {
            source: Some(DENIED4.into()),
            database: Some("orders".into()),
            reason: Reason::NotAllowed,
            monitored: false,
            interface: 1,
            opening: None,
        };
        assert!(dropped.iter().all(|dropped| *dropped == expected));
    }
    // Reading grants nothing, however often: a flood takes no more.
    for _ in 0..200 {
        loaded.run(&v4);
        assert_eq!(loaded.filter.dropped().unwrap(), []);
    }
    loaded.filter.grant_samples().unwrap();
    loaded.run(&v6);
    let [dropped] = &loaded.filter.dropped().unwrap()[..] else {
        panic!("one sample of one packet");
    };
    assert_eq!(dropped.source, Some(DENIED6.into()));
    assert!(dropped.monitored && dropped.database.as_deref() == Some("shop"));

    let mut rng = Rng::with_seed(6);
    let mut forged = BTreeSet::new();
    for _ in 0..20_000 {
        let source = Ipv4Addr::from_bits(rng.u32(1 << 24..126 << 24));
        forged.insert(IpAddr::from(source));
        loaded.run(&segment(source.into(), PORT));
    }
    let dropped = loaded.filter.dropped().unwrap();
    let most = cpus * (CACHED_SOURCES * SAMPLES_GRANTED) as usize;
    let taken = dropped.len();
    assert!(taken >= most / cpus / 2 && taken <= most, "{taken}");
    assert!(dropped.iter().all(|d| forged.contains(&d.source.unwrap())));
}

/// The entry of a source at a database.
#[track_caller]
fn of_source(drops: &Value, database: &str, source: &str) -> Value {
    let mut sources = drops["sources"].as_array().unwrap().iter();
    let found = sources.find(|d| d["database"] == database && d["source"] == source);
    found
        .unwrap_or_else(|| panic!("{source} is not in {drops:#}"))
        .clone()
}

#[test]
fn hint_says_what_is_known_and_the_command_lets_the_source_in() {
    let mut net = Net::new("drops-hints");
    net.fix_neighbours();
    let _listener = net.listen(PORT);
    let end = Timestamp::now() + SignedDuration::from_secs(1);
    let allowed = "{cidr: 203.0.113.10/32}";
    let expiring = format!("{{cidr: 198.51.100.0/24, expires: '{end:.0}'}}");
    let orders = orders().replace(
        "[{cidr: '203.0.113.10/32'}]",
        &format!("[{allowed}, {expiring}]"),
    );
    assert!(orders.contains("expires"), "{orders}");
    net.write_policy(&orders);
    net.watch(&[Protected::tcp(
        PORT,
        &["203.0.113.10/32", "198.51.100.0/24"],
    )]);
    net.start();
    let refused = || net.connect(DENIED4.into(), at(DB4, PORT)) == Connection::Silence;
    assert!(wait_until(refused), "the rule does not end");
    let wire = net.wire();
    wire.send(&segment([203, 0, 113, 99].into(), PORT));
    wire.send(&segment([203, 0, 113, 10].into(), MONITORED));
    let all = || {
        net.agent_json(&["drops"])["sources"]
            .as_array()
            .unwrap()
            .len()
            >= 3
    };
    assert!(wait_until(all));

    let drops = net.agent_json(&["drops"]);
    let expired = of_source(&drops, "orders", "198.51.100.7");
    let hint = expired["hint"].as_str().unwrap();
    assert!(
        hint.starts_with("rule 198.51.100.0/24 allowed it until "),
        "{hint}"
    );
    let date = |field: &str| {
        expired[field]
            .as_str()
            .unwrap()
            .parse::<Timestamp>()
            .unwrap()
    };
    assert!(date("first_seen") <= date("last_seen"));
    assert_eq!(expired["opening"], Value::Null);
    let near = of_source(&drops, "orders", "203.0.113.99");
    assert_eq!(near["hint"], "next to 203.0.113.10/32, in the same /24");
    let elsewhere = of_source(&drops, "shop", "203.0.113.10");
    assert_eq!(
        elsewhere["hint"],
        "203.0.113.10/32 of database orders allows it there"
    );

    // One source or network, and not all rows.
    for (source, sources) in [("198.51.100.7", 1), ("203.0.113.0/24", 2), ("192.0.2.1", 0)] {
        let drops = net.agent_json(&["drops", "--source", source]);
        assert_eq!(
            drops["sources"].as_array().unwrap().len(),
            sources,
            "{drops:#}"
        );
    }
    let error = net.agent_error(&["drops", "--source", "198.51.100.7/24"]);
    assert!(error.contains("198.51.100.0/24"), "{error}");
    let text = net.agent_text(&["drops", "--limit", "1"]);
    assert!(text.contains("and 2 more (see --limit)"), "{text}");
    let text = net.agent_text(&["drops", "--source", "198.51.100.7"]);
    let allow = "to let it in: filter-agent allow orders 198.51.100.7 --for 1h";
    assert!(text.contains(allow) && text.contains(hint), "{text}");

    // The command does what it says.
    let command = expired["allow"].as_str().unwrap();
    let words: Vec<&str> = command.split_whitespace().skip(1).collect();
    net.agent_text(&words);
    assert_eq!(
        net.connect(DENIED4.into(), at(DB4, PORT)),
        Connection::Accepted
    );
    let hint = || of_source(&net.agent_json(&["drops"]), "orders", "198.51.100.7");
    let now = hint();
    assert_eq!(
        now["hint"],
        "allowed by now, by temporary rule 198.51.100.7/32"
    );
    assert_eq!(now["allow"], Value::Null);

    // A block, and a temporary rule that has ended.
    net.agent_text(&[
        "block",
        "orders",
        "198.51.100.7",
        "--for",
        "1h",
        "--label",
        "abuse",
    ]);
    let blocked = hint()["hint"].as_str().unwrap().to_owned();
    assert!(
        blocked.starts_with("blocked by 198.51.100.7/32 (abuse) until "),
        "{blocked}"
    );
    assert!(
        blocked.contains("`filter-agent revoke orders 198.51.100.7/32`"),
        "{blocked}"
    );
    net.agent_text(&["revoke", "orders", "198.51.100.7"]);
    wire.send(&segment([192, 0, 2, 7].into(), PORT));
    net.agent_text(&[
        "allow",
        "orders",
        "192.0.2.7",
        "--for",
        "1s",
        "--label",
        "Kim",
    ]);
    let ended = || {
        let drops = net.agent_json(&["drops", "--source", "192.0.2.7"]);
        let hint = drops["sources"][0]["hint"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        hint.starts_with("temporary rule 192.0.2.7/32 (Kim) allowed it until ")
    };
    assert!(wait_until(ended), "{:#}", net.agent_json(&["drops"]));
    net.terminate();
}

/// A database, its port and engine, the parts of what its client sends, and the name of that.
type Case<'a> = (&'a str, u16, &'a str, &'a [&'a [u8]], &'a str);

#[test]
fn refused_connections_are_named_by_what_they_began_with() {
    let mysql = [0x20, 0, 0, 1, 0x85, 0xa6, 0x3, 0, 0, 0, 0, 1, 33];
    let startup = [0, 0, 0, 84, 0, 3, 0, 0, b'u', b's', b'e', b'r', 0];
    let op_msg = [0x45, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0xdd, 7, 0, 0, 0, 0];
    let request = [0, 0, 0, 8, 4, 210, 22, 47];
    let cases: [Case; 7] = [
        (
            "pg",
            5432,
            "postgresql",
            &[&startup],
            "PostgreSQL startup without TLS",
        ),
        // It asks for TLS, and goes on without it.
        (
            "declined",
            5433,
            "postgresql",
            &[&request, &startup],
            "PostgreSQL startup without TLS",
        ),
        (
            "web",
            5434,
            "postgresql",
            &[b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"],
            "HTTP request",
        ),
        ("maria", 3306, "mysql", &[&mysql], "MySQL login without TLS"),
        (
            "cache",
            6379,
            "redis",
            &[b"*1\r\n$4\r\nPING\r\n"],
            "Redis command without TLS",
        ),
        (
            "documents",
            27017,
            "mongodb",
            &[&op_msg],
            "MongoDB message without TLS",
        ),
        (
            "other",
            9000,
            "other",
            &[b"\0\x01\x02\x03secret"],
            "nothing known",
        ),
    ];
    let databases = cases.map(|(name, port, engine, _, _)| {
        format!(
            "{{name: {name}, port: {port}, engine: {engine}, model: dedicated, \
             rules: [{{cidr: 203.0.113.10/32}}]}}"
        )
    });
    let mut net = Net::new("drops-openings");
    net.write_policy(&policy("eth0", "native", &databases));
    let _polling = Polling::start(&net);
    let watched = cases.map(|(_, port, ..)| Protected::tcp(port, &["203.0.113.10/32"]));
    net.watch(&watched);
    let listeners = cases.map(|(_, port, ..)| net.listen(port));
    net.start();
    // PostgreSQL's answer of a server without TLS.
    let declining = listeners[1].try_clone().unwrap();
    thread::spawn(move || {
        for stream in declining.incoming() {
            let mut stream = stream.unwrap();
            let mut asked = [0; 8];
            if stream.read_exact(&mut asked).is_ok() {
                let _ = stream.write_all(b"N");
            }
            thread::spawn(move || stream.read_to_end(&mut Vec::new()));
        }
    });
    for (name, port, _, parts, expected) in cases {
        let connect = || {
            let socket = bound(ALLOWED4.into());
            socket.connect(&at(DB4, port).into()).unwrap();
            let mut stream = TcpStream::from(socket);
            stream.set_nodelay(true).unwrap();
            for (number, part) in parts.iter().enumerate() {
                if number > 0 {
                    // The server's answer, so that the rest is a segment of its own.
                    let mut answer = [0];
                    stream.read_exact(&mut answer).unwrap();
                }
                stream.write_all(part).unwrap();
            }
            stream
        };
        let mut drops = Value::Null;
        // A source is sampled a few times a second only.
        let named = wait_until(|| {
            let _stream = net.client.run(connect);
            let source = "203.0.113.10";
            drops = net.agent_json(&["drops", "--database", name, "--source", source]);
            drops["sources"][0]["opening"] == expected
        });
        assert!(named, "{name}: {drops:#}");
        assert_eq!(drops["sources"][0]["reason"], "not-tls");
        assert_eq!(drops["sources"][0]["allow"], Value::Null);
        assert!(!drops.to_string().contains("secret"), "{drops}");
    }
    let text = net.agent_text(&["drops", "--database", "pg"]);
    let hint = "PostgreSQL startup without TLS; the source is allowed; its client must use TLS (sslmode=require)";
    assert!(text.contains(hint), "{text}");
    net.terminate();
}
