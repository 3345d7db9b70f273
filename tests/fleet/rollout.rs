//! A rollout that is watched.

use std::{
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use filter_tests::{
    certificates::Kind,
    etcd::{Etcd, USER},
    net::{
        ALLOWED4, Connection, DB4, DENIED4, Hammer, Namespace, Net, Protected, run_in, wait,
        wait_until,
    },
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use socket2::{Domain, Socket, Type};

use crate::{
    commands::Operator,
    host::{A, B, PORT, connects, document, host, text, wait_for},
};

const OTHER: &str = "db8";

/// Another host, with a certificate of its own.
fn other_host(etcd: &Etcd) -> Net {
    let net = Net::new("fleet-soak-db8");
    etcd.attach_as(&net.db, 11);
    etcd.control(&["user", "add", OTHER, "--no-password"]);
    etcd.control(&["role", "add", OTHER]);
    etcd.control(&["user", "grant-role", OTHER, OTHER]);
    for key in ["era", "rules/orders", "rules/billing"] {
        etcd.grant(OTHER, key);
    }
    etcd.grant_own(OTHER, OTHER);
    let pair = etcd.authority.sign(OTHER, &[], Kind::Good);
    let path = |path: &std::path::Path| path.display().to_string();
    let text = text(etcd, "within: [198.51.100.0/24, 203.0.113.0/24]");
    let text = text
        .replace(&path(&etcd.client.certificate), &path(&pair.certificate))
        .replace(&path(&etcd.client.key), &path(&pair.key))
        .replace("host: db7", "host: db8");
    net.write_policy(&text);
    net
}

const BEFORE: &str = "# ours\nrules: [{cidr: 198.51.100.7/32}]\n";

/// An operator, and a host that has this document in force.
fn with_document<'a>(etcd: &'a Etcd, name: &str, document: &str) -> (Operator<'a>, Net) {
    etcd.grant(USER, "rules/billing");
    let kim = Operator::new(etcd);
    etcd.put("rules/orders", document.as_bytes());
    let mut net = host(name, etcd);
    net.start();
    wait_for(&net, etcd, "orders");
    (kim, net)
}

/// Connects from `DENIED4` again and again, whether it is let in or not, until it is told to end.
fn knock(client: &Namespace, ended: &AtomicBool) {
    run_in(&client.name, || {
        while !ended.load(Ordering::Relaxed) {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            let source = std::net::SocketAddr::new(DENIED4.into(), 0);
            socket.bind(&source.into()).unwrap();
            let to = std::net::SocketAddr::new(DB4.into(), PORT);
            let _ = socket.connect_timeout(&to.into(), Duration::from_millis(10));
            thread::sleep(Duration::from_millis(1));
        }
    });
}

#[test]
fn rollout_that_drops_who_came_before_is_halted_and_changes_no_other_host() {
    let etcd = Etcd::start("fleet-soak");
    etcd.grant(USER, "rules/billing");
    let kim = Operator::new(&etcd);
    let before = document(&[A]);
    etcd.put("rules/orders", &before);
    let [mut net, mut other] = [host("fleet-soak-db7", &etcd), other_host(&etcd)];
    let _echoes = [net.echo(PORT), other.echo(PORT)];
    net.start();
    other.start();
    wait_for(&net, &etcd, "orders");
    wait_for(&other, &etcd, "orders");
    other.watch(&[Protected::tcp(PORT, &[A, "203.0.113.9/32"])]);
    let allowed = Hammer::allowed(&other.client, &[(DENIED4.into(), (DB4, PORT).into())]);
    let file = kim.file("rules: [{cidr: 203.0.113.10/32}]");
    let ended = AtomicBool::new(false);
    let halted = thread::scope(|scope| {
        scope.spawn(|| knock(&net.client, &ended));
        let rollout = [
            "rollout", "orders", &file, "--on", "db7", "--soak", "20s", "--yes",
        ];
        let halted = kim.fails(&rollout);
        ended.store(true, Ordering::Relaxed);
        halted
    });
    assert!(halted.contains("halted: db7 drops "), "{halted}");
    assert!(halted.contains("is taken back"), "{halted}");
    let text = String::from_utf8(before).unwrap();
    assert_eq!(etcd.text_of("rules/orders").as_deref(), Some(text.trim()));
    wait_for(&net, &etcd, "orders");
    assert!(connects(&net, DENIED4.into(), PORT));
    assert!(!connects(&net, ALLOWED4.into(), PORT));
    assert!(allowed.attempts() > 0);
    allowed.stop();
    // Of a rollout that is over, nothing is reported.
    let is_quiet = || {
        let status = etcd.text_of("hosts/db7").unwrap();
        !status.contains("packets")
    };
    assert!(wait_until(is_quiet));
}

#[test]
fn rollout_that_does_no_harm_is_promoted_and_one_that_cannot_be_watched_is_taken_back() {
    let etcd = Etcd::start("fleet-soaked");
    let (kim, mut net) = with_document(&etcd, "fleet-soaked-db", BEFORE);
    let _echo = net.echo(PORT);
    let file = kim.file("rules: [{cidr: 198.51.100.7/32}, {cidr: 203.0.113.10/32}]");
    let rollout = ["rollout", "orders", &file, "--on"];
    let with = |more: &[&'static str]| [&rollout[..], more].concat();
    let is_as_before = || {
        let text = etcd.text_of("rules/orders");
        assert_eq!(text.as_deref(), Some(BEFORE.trim()));
    };
    for wrong in [&["db7", "--soak", "5s"][..], &["db7", "--promote"]] {
        assert_eq!(kim.run(&with(wrong)).status.code(), Some(2), "{wrong:?}");
    }
    let short = kim.fails(&with(&["db7", "--soak", "2m", "--for", "2m"]));
    assert!(short.contains("say --for"), "{short}");
    let refused = kim.file("rules: [{cidr: 192.0.2.0/24}]");
    let refused = kim.fails(&[
        "rollout", "orders", &refused, "--on", "db7", "--soak", "10s",
    ]);
    assert!(refused.contains("db7 would refuse it"), "{refused}");
    kim.file("rules: [{cidr: 198.51.100.7/32}, {cidr: 203.0.113.10/32}]");
    is_as_before();
    let stranger = kim.fails(&with(&["db7,db9", "--soak", "10s", "--yes"]));
    assert!(
        stranger.contains("halted: db9 reports nothing"),
        "{stranger}"
    );
    is_as_before();

    let begin = || {
        let mut command = kim.command(&with(&["db7", "--soak", "60s"]));
        command.stderr(Stdio::piped());
        let child = run_in(&etcd.host.name, || command.spawn().unwrap());
        let is_begun = || etcd.text_of("rules/orders").unwrap().contains("rollout");
        assert!(wait_until(is_begun));
        child
    };
    let mut child = begin();
    kill(
        Pid::from_raw(child.id().try_into().unwrap()),
        Signal::SIGINT,
    )
    .unwrap();
    assert_eq!(wait(&mut child).unwrap().code(), Some(130));
    is_as_before();
    // Without etcd nothing is taken back; interrupted once more, it leaves that to the hosts.
    let mut child = begin();
    let pid = Pid::from_raw(child.id().try_into().unwrap());
    // The first attempt is sent, and has no answer; the next ones have no connection.
    etcd.signal(0, Signal::SIGSTOP);
    kill(pid, Signal::SIGINT).unwrap();
    thread::sleep(Duration::from_secs(12));
    etcd.kill(0);
    thread::sleep(Duration::from_secs(2));
    let is_over = || {
        kill(pid, Signal::SIGINT).unwrap();
        thread::sleep(Duration::from_millis(500));
        child.try_wait().unwrap().is_some()
    };
    assert!(wait_until(is_over));
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    let last = said.lines().last().unwrap();
    assert!(last.contains("may be done all the same"), "{said}");
    etcd.run(0);
    etcd.wait_until_healthy();
    etcd.put("rules/orders", BEFORE.as_bytes());
    wait_for(&net, &etcd, "orders");
    let mut child = begin();
    etcd.put("rules/orders", &document(&[B]));
    assert_eq!(wait(&mut child).unwrap().code(), Some(1));
    let text = String::from_utf8(document(&[B])).unwrap();
    assert_eq!(etcd.text_of("rules/orders").as_deref(), Some(text.trim()));

    etcd.put("rules/orders", BEFORE.as_bytes());
    wait_for(&net, &etcd, "orders");
    let said = kim.says(&with(&["db7", "--soak", "10s", "--promote"]));
    assert!(
        said.contains("none of them is worse off: promoted"),
        "{said}"
    );
    wait_for(&net, &etcd, "orders");
    let both = [ALLOWED4, DENIED4].map(|source| net.connect(source.into(), (DB4, PORT).into()));
    assert_eq!(both, [Connection::Accepted; 2]);
    // Somebody else's rollout is not replaced.
    kim.says(&with(&["db7"]));
    let second = kim.fails(&with(&["db7", "--soak", "10s"]));
    assert!(second.contains("is under way"), "{second}");
    // The agent ends: it is silent, or reports no packets any more.
    kim.says(&["abort", "orders"]);
    wait_for(&net, &etcd, "orders");
    let mut command: Command = kim.command(&with(&["db7", "--soak", "60s"]));
    let mut child = run_in(&etcd.host.name, || command.spawn().unwrap());
    let reports = || etcd.text_of("hosts/db7").unwrap().contains("packets");
    assert!(wait_until(reports));
    net.kill();
    assert_eq!(wait(&mut child).unwrap().code(), Some(1));
    let text = etcd.text_of("rules/orders").unwrap();
    assert!(!text.contains("rollout"), "{text}");
}

#[test]
fn rollout_is_taken_back_that_a_host_refuses_and_one_whose_host_ended_while_etcd_was_away() {
    let etcd = Etcd::start("fleet-unseen");
    let (kim, mut net) = with_document(&etcd, "fleet-unseen-db", BEFORE);
    let _echo = net.echo(PORT);
    net.watch(&[Protected::tcp(PORT, &[A, B, "203.0.113.9/32"])]);
    let file = kim.file("rules: [{cidr: 198.51.100.7/32}, {cidr: 203.0.113.10/32}]");
    let rollout = ["rollout", "orders", &file, "--on", "db7", "--soak", "10s"];
    let begin = |more: &[&str]| {
        let mut command = kim.command(&[&rollout[..], more].concat());
        let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
        run_in(&etcd.host.name, || command.spawn().unwrap())
    };
    let document_has = |text: &str| {
        let has = || etcd.text_of("rules/orders").unwrap().contains(text);
        assert!(wait_until(has), "{:?}", etcd.text_of("rules/orders"));
    };
    let assert_taken_back = |child: Child| {
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        let text = etcd.text_of("rules/orders");
        assert_eq!(text.as_deref(), Some(BEFORE.trim()), "{said}");
        said
    };
    // While the baseline is taken, the host's own bounds become narrower.
    let child = begin(&[]);
    document_has("rollout");
    net.reload(&text(&etcd, "within: [198.51.100.0/24]"));
    let said = assert_taken_back(child);
    assert!(
        said.contains("db7") && said.contains("203.0.113.10/32"),
        "{said}"
    );
    net.reload(&text(&etcd, "within: [198.51.100.0/24, 203.0.113.0/24]"));
    wait_for(&net, &etcd, "orders");

    // While it is watched, another host's bounds become narrower, which would get it with the promotion, and it does not
    // believe etcd.
    let child = begin(&["--promote"]);
    document_has("203.0.113.10");
    let report = etcd.text_of("hosts/db7").unwrap();
    let narrow = report.replace(",\"203.0.113.0/24\"", "");
    let held = narrow.replace("\"active\"", "\"held\"");
    assert!(narrow != report && held != narrow);
    etcd.put("hosts/db8", held.as_bytes());
    let boot = etcd.text_of("alive/db7").unwrap();
    etcd.put_leased("alive/db8", &boot);
    let said = assert_taken_back(child);
    for expected in [
        "halted: db8 would refuse it: ",
        "db8 does not believe etcd",
        "is taken back",
    ] {
        assert!(said.contains(expected), "{said}");
    }
    etcd.delete("hosts/db8");
    wait_for(&net, &etcd, "orders");

    let child = begin(&["--promote"]);
    document_has("203.0.113.10");
    let is_tried = || connects(&net, ALLOWED4.into(), PORT);
    assert!(wait_until(is_tried));
    // The last reports are good, and the host ends before it can write another.
    etcd.kill(0);
    net.kill();
    thread::sleep(Duration::from_secs(20));
    etcd.run(0);
    etcd.wait_until_healthy();
    let said = assert_taken_back(child);
    assert!(
        said.contains("db7") && said.contains("is taken back"),
        "{said}"
    );
    net.start();
    wait_for(&net, &etcd, "orders");
    assert!(!connects(&net, ALLOWED4.into(), PORT));
    assert!(connects(&net, DENIED4.into(), PORT));
}
