//! One agent after another: a binary whose maps have another layout takes over what the last one left,
//! and back again, and at no moment does anybody get in who should not, or stay out who should get in.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    os::unix::fs::PermissionsExt as _,
    thread,
    time::Duration,
};

use filter_common::LAYOUT;
use filter_tests::net::{
    ALLOWED4, ALLOWED6, Connection, DB4, DB6, DENIED4, DENIED6, Hammer, Net, Protected,
    agent_binary, dedicated, next_layout_binary, policy, previous_binary, under_load, wait_until,
};
use nix::errno::Errno;
use serde_json::json;

use Connection::{Accepted, Silence};

const PORT: u16 = 5432;
const DB: SocketAddr = SocketAddr::new(IpAddr::V4(DB4), PORT);
const DB_V6: SocketAddr = SocketAddr::new(IpAddr::V6(DB6), PORT);
const ALLOWED: [&str; 2] = ["203.0.113.10/32", "2001:db8::10/128"];

fn orders(allowed: &[&str]) -> String {
    policy("eth0", "native", &[dedicated("orders", PORT, allowed, "")])
}

fn start(name: &str) -> Net {
    // Built before there is any traffic that would compete with it.
    next_layout_binary();
    Net::enforcing(name, &[Protected::tcp(PORT, &ALLOWED)], &orders(&ALLOWED))
}

type Attempts = [(IpAddr, SocketAddr); 2];

/// Those that must succeed, and those that must not.
fn attempts() -> (Attempts, Attempts) {
    (
        [(ALLOWED4.into(), DB), (ALLOWED6.into(), DB_V6)],
        [(DENIED4.into(), DB), (DENIED6.into(), DB_V6)],
    )
}

#[track_caller]
fn assert_filtered(net: &Net) {
    let (allowed, denied) = attempts();
    assert_eq!(net.connect_all(&allowed), [Accepted, Accepted]);
    assert_eq!(net.connect_all(&denied), [Silence, Silence]);
    assert_eq!(net.agent_json(&["status", "--verify"])["errors"], json!([]));
}

/// The layouts that are pinned.
fn layouts(net: &Net) -> Vec<String> {
    let entries = fs::read_dir(net.bpffs().join("filter-agent")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.collect()
}

fn dropped_and_hits(net: &Net) -> (u64, u64) {
    let status = net.agent_json(&["status"]);
    let dropped = status["databases"][0]["dropped"]["not-allowed"]
        .as_u64()
        .unwrap_or(0);
    let rules = net.agent_json(&["rules"]);
    // The agent of before lists them without a name.
    let rules = rules.get("rules").unwrap_or(&rules);
    (dropped, rules[0]["hits"].as_u64().unwrap())
}

/// From what hosts run, and back to it, under traffic.
#[test]
#[ignore = "needs the agent of an earlier commit, which `cargo xtask test --full` builds"]
fn agent_of_the_commit_before_is_taken_over_without_a_gap_and_takes_over_again() {
    let mut net = start("previous");
    let _server = net.echo(PORT);
    assert_filtered(&net);
    let (allowed, denied) = attempts();
    let inside = Hammer::allowed(&net.client, &allowed);
    let outside = Hammer::denied(&net.client, &denied);
    under_load(4, &[(&inside, 10), (&outside, 10)], |round| {
        let binary = if round.is_multiple_of(2) {
            previous_binary()
        } else {
            agent_binary().to_owned()
        };
        match round % 4 {
            0 | 1 => net.terminate(),
            _ => net.kill(),
        }
        net.binary = binary;
        net.start();
        assert_eq!(layouts(&net).len(), 1);
        assert_eq!(net.agent_json(&["status", "--verify"])["errors"], json!([]));
    });
    inside.stop();
    outside.stop();
    assert_filtered(&net);
}

#[test]
fn agent_of_another_layout_takes_over_without_a_gap_and_back() {
    let mut net = start("layouts");
    let _server = net.echo(PORT);
    assert_filtered(&net);
    let (allowed, denied) = attempts();
    let inside = Hammer::allowed(&net.client, &allowed);
    let outside = Hammer::denied(&net.client, &denied);
    let mut before = (0, 0);
    under_load(3, &[(&inside, 10), (&outside, 10)], |round| {
        let (binary, layout, counters) = if round.is_multiple_of(2) {
            (next_layout_binary(), LAYOUT + 1, "counters go on")
        } else {
            (agent_binary(), LAYOUT, "counters begin at 0")
        };
        before = before.max(dropped_and_hits(&net));
        net.terminate();
        net.binary = binary.to_owned();
        net.log.clear();
        net.start();
        let said = format!("1 interface switched, {counters}");
        assert!(
            net.log.iter().any(|line| line.ends_with(&said)),
            "{:#?}",
            net.log
        );
        assert_eq!(layouts(&net), [format!("v{layout}")]);
        assert_eq!(net.agent_json(&["status", "--verify"])["errors"], json!([]));
        if counters == "counters go on" {
            let after = dropped_and_hits(&net);
            assert!(
                after.0 >= before.0 && after.1 >= before.1,
                "{before:?} {after:?}"
            );
        } else {
            before = (0, 0);
        }
    });
    inside.stop();
    outside.stop();
    assert_filtered(&net);
}

#[test]
fn upgrade_that_brings_another_policy_enforces_it_at_the_switch() {
    let mut net = start("layout-policy");
    let _server = net.echo(PORT);
    net.kill();
    net.binary = next_layout_binary().to_owned();
    net.write_policy(&orders(&["198.51.100.7/32"]));
    net.watch(&[Protected::tcp(PORT, &["198.51.100.7/32"])]);
    net.start();
    let sources = [ALLOWED4, DENIED4].map(|source| net.connect(source.into(), DB));
    assert_eq!(sources, [Silence, Accepted]);
}

#[test]
fn upgrade_with_a_bad_policy_enforces_the_confirmed_one() {
    let mut net = start("layout-bad");
    let _server = net.echo(PORT);
    net.wait_until_confirmed();
    net.kill();
    net.binary = next_layout_binary().to_owned();
    net.write_policy("interfaces: [eth0]\ndatabases: [{name: orders}]\n");
    net.start();
    let (allowed, denied) = attempts();
    assert_eq!(net.connect_all(&allowed), [Accepted, Accepted]);
    assert_eq!(net.connect_all(&denied), [Silence, Silence]);
    assert_eq!(layouts(&net), [format!("v{}", LAYOUT + 1)]);
    let errors = net.agent_json(&["status"])["errors"].to_string();
    assert!(errors.contains("is not enforced"), "{errors}");
    net.write_policy(&orders(&ALLOWED));
    net.agent_text(&["reload"]);
    assert_filtered(&net);
}

#[test]
fn upgrade_that_is_killed_at_any_moment_is_finished_by_the_next_start() {
    let mut net = start("layout-killed");
    let _server = net.echo(PORT);
    let (allowed, denied) = attempts();
    let inside = Hammer::allowed(&net.client, &allowed);
    let outside = Hammer::denied(&net.client, &denied);
    net.kill();
    let mut random = fastrand::Rng::with_seed(5);
    for round in 0..30 {
        let binaries = [next_layout_binary(), agent_binary()];
        net.binary = binaries[round % 2].to_owned();
        net.spawn(&[]);
        thread::sleep(Duration::from_micros(random.u64(1_000..60_000)));
        net.kill();
    }
    net.binary = next_layout_binary().to_owned();
    net.start();
    assert_eq!(layouts(&net), [format!("v{}", LAYOUT + 1)]);
    inside.stop();
    outside.stop();
    assert_filtered(&net);
}

#[test]
fn takeover_that_cannot_update_a_link_leaves_the_old_program_and_maps_in_force() {
    const BPF_LINK_UPDATE: u32 = 29;
    let mut net = start("layout-no-update");
    let _server = net.echo(PORT);
    let (allowed, denied) = attempts();
    let inside = Hammer::allowed(&net.client, &allowed);
    let outside = Hammer::denied(&net.client, &denied);
    net.kill();
    net.binary = next_layout_binary().to_owned();
    for error in [Errno::ENOMEM, Errno::EBUSY, Errno::EPERM] {
        let line = net.refusal_without_bpf_command(BPF_LINK_UPDATE, error);
        assert!(line.contains("the policy of layout"), "{line}");
        assert!(layouts(&net).contains(&format!("v{LAYOUT}")), "{error}");
        assert_eq!(net.connect_all(&denied), [Silence, Silence], "{error}");
    }
    net.start();
    inside.stop();
    outside.stop();
    assert_eq!(layouts(&net), [format!("v{}", LAYOUT + 1)]);
    assert_filtered(&net);
}

/// The agent went on, filtered nothing by its own program, and was never ready.
#[test]
fn takeover_that_cannot_look_at_the_old_pins_is_refused_and_changes_nothing() {
    let mut net = start("layout-foreign");
    let _server = net.echo(PORT);
    net.kill();
    net.binary = next_layout_binary().to_owned();
    net.write_policy(&orders(&["198.51.100.7/32"]));
    let pins = net.bpffs().join("filter-agent").join(format!("v{LAYOUT}"));
    fs::set_permissions(&pins, fs::Permissions::from_mode(0o755)).unwrap();
    let line = net.refusal(&[]);
    assert!(line.contains("is not this agent's own"), "{line}");
    let (allowed, denied) = attempts();
    assert_eq!(net.connect_all(&allowed), [Accepted, Accepted]);
    assert_eq!(net.connect_all(&denied), [Silence, Silence]);
    fs::set_permissions(&pins, fs::Permissions::from_mode(0o700)).unwrap();
    net.write_policy(&orders(&ALLOWED));
    net.start();
    assert_eq!(layouts(&net), [format!("v{}", LAYOUT + 1)]);
    assert_filtered(&net);
}

/// A map of connections that cannot be opened was taken for none: the next layout began with an empty one, and
/// open connections were forgotten.
#[test]
fn takeover_that_cannot_open_the_connections_is_refused_and_makes_no_new_map() {
    const BPF_OBJ_GET: u32 = 7;
    let mut net = start("layout-streams");
    let _server = net.echo(PORT);
    net.kill();
    net.binary = next_layout_binary().to_owned();
    let line = net.refusal_without_bpf_command(BPF_OBJ_GET, Errno::ENOMEM);
    assert!(
        line.contains(&format!("v{LAYOUT}/PUBLISHED_SOCKETS")),
        "{line}"
    );
    let next = format!("filter-agent/v{}/PUBLISHED_SOCKETS", LAYOUT + 1);
    assert!(!net.bpffs().join(next).exists());
    net.start();
    assert_filtered(&net);
}

#[test]
fn interface_that_vanished_before_the_upgrade_leaves_nothing_behind() {
    let mut net = start("layout-vanished");
    let _server = net.echo(PORT);
    net.kill();
    net.db.ip("link delete eth0");
    net.binary = next_layout_binary().to_owned();
    net.start();
    assert_eq!(layouts(&net), [format!("v{}", LAYOUT + 1)]);
    net.make_pair();
    assert!(wait_until(|| {
        let errors = net.agent_json(&["status"])["errors"].clone();
        errors == json!([])
    }));
    assert_filtered(&net);
}
