//! Three members of etcd, which are killed, paused and cut off while documents change; and one with a slow disk.

use std::{
    fs,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use fastrand::Rng;
use filter_tests::net::{ALLOWED4, DB4, DENIED4, Hammer, Net, Protected, wait_until};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;

use crate::{
    etcd::Etcd,
    host::{FLOOR, PORT, document, host, status, wait_for},
};

const MEMBERS: usize = 3;

/// Documents allow some of these. `ALLOWED4` and `DENIED4` are none of them.
fn pool() -> Vec<String> {
    (64..84)
        .map(|host| format!("198.51.100.{host}/32"))
        .collect()
}

fn some_of(pool: &[String], random: &mut Rng) -> Vec<String> {
    let mut chosen = random.choose_multiple(pool.iter(), 12);
    chosen.sort_unstable();
    chosen.into_iter().cloned().collect()
}

/// The sources that the fleet has open, by the agent's own list.
fn in_force(net: &Net) -> Vec<String> {
    let rules = net.agent_json(&["rules", "--database", "orders"]);
    let rules = rules["rules"].as_array().unwrap().iter();
    let rules = rules.filter(|rule| rule["origin"] == "fleet");
    let mut sources: Vec<String> = rules
        .map(|rule| rule["source"].as_str().unwrap().to_owned())
        .collect();
    sources.sort_unstable();
    sources
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    Kill,
    Pause,
    /// From the other members, and not from hosts.
    Cut,
}

impl Fault {
    fn strike(self, etcd: &Etcd, member: usize) {
        match self {
            Self::Kill => etcd.kill(member),
            Self::Pause => etcd.signal(member, Signal::SIGSTOP),
            Self::Cut => etcd.cut_off(member, true),
        }
    }

    fn mend(self, etcd: &Etcd, member: usize) {
        match self {
            Self::Kill => etcd.run(member),
            Self::Pause => etcd.signal(member, Signal::SIGCONT),
            Self::Cut => etcd.cut_off(member, false),
        }
    }
}

/// One member after the other is ill, at times two are, so that there is no quorum. A change that was acknowledged is in force in the
/// end; what is in force never goes back; who is in no document never gets in, and whom the policy allows always does.
#[test]
fn members_that_are_ill_at_random_lose_no_change() {
    let rounds = match std::env::var_os("FILTER_TESTS_FULL") {
        Some(_) => 60,
        None => 6,
    };
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = Rng::with_seed(seed);
    let etcd = Etcd::with_members("fleet-random", MEMBERS);
    etcd.grant("db7", "rules/billing");
    let pool = pool();
    let as_document = |sources: &[String]| {
        let sources: Vec<&str> = sources.iter().map(String::as_str).collect();
        document(&sources)
    };
    etcd.put("rules/orders", &as_document(&pool[..5]));
    let mut net = host("fleet-random-db", &etcd);
    let _echo = net.echo(PORT);
    net.start();
    wait_for(&net, &etcd, "orders");
    let mut allowed: Vec<&str> = pool.iter().map(String::as_str).collect();
    allowed.push("203.0.113.9/32");
    net.watch(&[Protected::tcp(PORT, &allowed)]);
    let floor = Hammer::allowed(&net.client, &[(FLOOR, (DB4, PORT).into())]);
    let nobody = [ALLOWED4, DENIED4].map(|source| (source.into(), (DB4, PORT).into()));
    let denied = Hammer::denied(&net.client, &nobody);
    let mut last = None;
    let mut seen = || {
        let document = status(&net, "orders");
        let revision = document["revision"].as_i64();
        assert!(revision >= last, "{document} after {last:?}");
        assert_eq!(document["state"], "active", "{document}");
        last = revision;
        revision
    };
    for round in 0..rounds {
        let count = 1 + usize::from(random.u8(..4) == 0);
        let members = random.choose_multiple(0..MEMBERS, count);
        let faults: Vec<(usize, Fault)> = members
            .into_iter()
            .map(|member| {
                (
                    member,
                    *random
                        .choice(&[Fault::Kill, Fault::Pause, Fault::Cut])
                        .unwrap(),
                )
            })
            .collect();
        println!("round {round}: {faults:?}");
        for &(member, fault) in &faults {
            fault.strike(&etcd, member);
        }
        let healthy = (0..MEMBERS).find(|member| faults.iter().all(|(it, _)| it != member));
        for _ in 0..random.usize(1..4) {
            let sources = some_of(&pool, &mut random);
            // Without a quorum, or while it looks for a leader, it is not written; or it is, and nobody says so.
            let text = as_document(&sources);
            let written = etcd.put_at(healthy.unwrap(), "rules/orders", &text);
            assert!(written.is_none() || faults.len() == 1, "without a quorum");
            // Members that are not ill suffice.
            let has_it = || written.is_none() || seen() >= written;
            assert!(wait_until(has_it), "{}", status(&net, "orders"));
        }
        for &(member, fault) in &faults {
            fault.mend(&etcd, member);
        }
        let text = as_document(&some_of(&pool, &mut random));
        let member = random.usize(..MEMBERS);
        let mut written = None;
        assert!(
            wait_until(|| {
                written = etcd.put_at(member, "rules/orders", &text);
                written.is_some()
            }),
            "the members do not get well"
        );
        // One that nobody answered for may be written after it.
        let is_newest = || {
            let revision = seen();
            let text = String::from_utf8(as_document(&in_force(&net))).unwrap();
            revision >= written && etcd.text_of("rules/orders").as_deref() == Some(text.trim_end())
        };
        assert!(wait_until(is_newest), "{}", status(&net, "orders"));
    }
    assert!(floor.attempts() > 0 && denied.attempts() > 0);
    floor.stop();
    denied.stop();
    assert_eq!(net.agent_json(&["status", "--verify"])["errors"], json!([]));
}

/// `strace` that slows every `fdatasync` of a process down, until it is dropped.
struct SlowDisk(Child);

impl SlowDisk {
    fn of(pid: Pid) -> Self {
        let mut command = Command::new("strace");
        command.args(["-f", "-e", "trace=fdatasync", "-o", "/dev/null"]);
        command.args(["-e", "inject=fdatasync:delay_enter=500000", "-p"]);
        let strace = command.arg(pid.to_string()).stderr(Stdio::null()).spawn();
        let traced = || {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            !status.contains("TracerPid:\t0")
        };
        assert!(wait_until(traced), "strace does not attach");
        Self(strace.unwrap())
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        let pid = Pid::from_raw(self.0.id().try_into().unwrap());
        // It lets go of what it traces.
        let _ = kill(pid, Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

/// The agent's connections to etcd, by address and port of both ends.
fn connections(net: &Net) -> Vec<String> {
    let mut command = Command::new("ss");
    command.args(["-Htn", "state", "established", "dport", "=", ":2379"]);
    let output = String::from_utf8(net.db.output(&mut command).stdout).unwrap();
    let lines = output.lines().map(|line| {
        let ends = line.split_whitespace().skip(2);
        ends.take(2).collect::<Vec<_>>().join(" ")
    });
    lines.collect()
}

#[test]
fn slow_disk_of_etcd_loses_no_host_and_no_change() {
    let etcd = Etcd::start("fleet-slow");
    etcd.grant("db7", "rules/billing");
    etcd.put("rules/orders", &document(&["198.51.100.64/32"]));
    let mut net = host("fleet-slow-db", &etcd);
    let _echo = net.echo(PORT);
    net.start();
    wait_for(&net, &etcd, "orders");
    let is_there = || etcd.text_of("alive/db7").is_some();
    assert!(wait_until(is_there));
    let alive = etcd.created_at("alive/db7");
    let connected = connections(&net);
    let floor = Hammer::allowed(&net.client, &[(FLOOR, (DB4, PORT).into())]);
    let _slow = SlowDisk::of(etcd.pid(0));
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        // Reads wait, too, while etcd writes.
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                etcd.put_at(0, "rules/billing", &document(&[]));
            }
        });
        for last in 65..75 {
            let begin = Instant::now();
            let address = format!("198.51.100.{last}/32");
            etcd.put("rules/orders", &document(&[&address]));
            let is_slow = begin.elapsed() >= Duration::from_millis(500);
            assert!(is_slow, "the disk is not slow");
            wait_for(&net, &etcd, "orders");
        }
        ended.store(true, Ordering::Relaxed);
    });
    assert_eq!(etcd.created_at("alive/db7"), alive);
    assert_eq!(connections(&net), connected, "the same one as before");
    assert!(floor.attempts() > 0);
    floor.stop();
}
