//! One agent after another: a binary whose maps have another layout takes over what the last one left,
//! and back again, and at no moment does anybody get in who should not, or stay out who should get in.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::unix::fs::PermissionsExt as _,
    process::Command,
    thread,
    time::Duration,
};

use filter_common::LAYOUT;
use filter_tests::{
    net::{
        ALLOWED4, ALLOWED6, CLIENT4, Connection, DB4, DB6, DENIED4, DENIED6, Hammer, Net,
        Protected, agent_binary, dedicated, next_layout_binary, policy, released_binary,
        under_load, wait_until,
    },
    servers::{Ca, Dns, Resolv, Web},
};
use nix::errno::Errno;
use serde_json::{Value, json};

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
    (dropped, rules["rules"][0]["hits"].as_u64().unwrap())
}

/// The errors in `status --verify` of an agent of any release.
fn errors_of(net: &Net) -> Value {
    // `Net::agent` adds `--state-dir`, which 0.1.0 does not take here.
    let mut status = Command::new(&net.binary);
    status.args(["status", "--verify", "--json", "--socket"]);
    status.arg(net.socket()).arg("--bpffs").arg(net.bpffs());
    let output = net.db.output(&mut status);
    let status: Value = serde_json::from_slice(&output.stdout).unwrap();
    status["errors"].clone()
}

/// From what hosts run, and back to it, under traffic.
#[test]
#[ignore = "needs the agent of an earlier release, which `cargo xtask test --full` builds"]
fn agent_of_0_1_0_is_taken_over_without_a_gap_and_takes_over_again() {
    let mut net = start("released");
    let _server = net.echo(PORT);
    assert_filtered(&net);
    let (allowed, denied) = attempts();
    let inside = Hammer::allowed(&net.client, &allowed);
    let outside = Hammer::denied(&net.client, &denied);
    under_load(4, &[(&inside, 10), (&outside, 10)], |round| {
        let binary = if round.is_multiple_of(2) {
            released_binary("0.1.0")
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
        assert_eq!(errors_of(&net), json!([]));
    });
    inside.stop();
    outside.stop();
    assert_filtered(&net);
}

/// Its policy file as well, and what it kept of regions, whose servers are away all the time from then on.
#[test]
#[ignore = "needs the agent of an earlier release, which `cargo xtask test --full` builds"]
fn policy_and_regions_of_0_1_0_hold_after_the_upgrade_and_after_the_way_back() {
    const BY_DNS: IpAddr = IpAddr::V4(ALLOWED4);
    const BY_LIST: IpAddr = IpAddr::V6(ALLOWED6);
    const BY_FILE: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 30));
    let mut net = Net::new("released-regions");
    net.add_source(BY_FILE);
    let _server = net.echo(PORT);
    let mut dns = Dns::start(&net.client, net.dir(), CLIENT4.into(), "test.");
    dns.set(&format!("egress 60 A {ALLOWED4}\n"));
    let ca = Ca::new(net.dir());
    let ca_file = ca.file();
    let mut web = Web::start(&net.client, net.dir(), CLIENT4.into(), ca, "lists.test");
    web.put("list", format!("{ALLOWED6}\n").as_bytes());
    let hosts = [(CLIENT4.into(), "lists.test")];
    let _resolv = Resolv::new(&net.db, CLIENT4.into(), &hosts);
    net.own_resolver = true;
    let file = net.dir().join("office.txt");
    fs::write(&file, format!("{BY_FILE}/32\n")).unwrap();
    net.write_policy(&format!(
        "interfaces: [eth0]
mode: native
regional_network: [192.0.2.0/24]
regions:
  egress: {{dns: [egress.test], nameservers: ['{CLIENT4}'], retire_after: 1h}}
  list: {{url: 'https://lists.test/list', ca_file: {ca}}}
  office: {{file: {office}}}
databases:
  - name: orders
    port: {PORT}
    engine: postgresql
    model: dedicated
    force_tls: false
    cluster: [192.0.2.77/32]
    rules: [{{region: egress}}, {{region: list}}, {{region: office, label: office}},
            {{cidr: 198.51.100.99/32, expires: 2030-12-31T18:00:00Z}}]
  - {{name: shop, port: 3306, engine: mysql, model: shared}}
  - {{name: public, port: 6379, engine: redis, model: shared, force_tls: true, internet: true}}
",
        ca = ca_file.display(),
        office = file.display()
    ));
    let in_v4 = "203.0.113.10/32";
    net.watch(&[Protected::tcp(
        PORT,
        &[in_v4, "203.0.113.30/32", "2001:db8::10/128"],
    )]);
    let attempts = [(BY_DNS, DB), (BY_LIST, DB_V6), (BY_FILE, DB)];
    let holds = |net: &Net| {
        let allowed = net.connect_all(&attempts);
        let denied = net.connect_all(&[(DENIED4.into(), DB), (DENIED6.into(), DB_V6)]);
        (allowed, denied) == ([Accepted; 3].to_vec(), [Silence; 2].to_vec())
    };
    net.binary = released_binary("0.1.0");
    net.start();
    assert!(wait_until(|| holds(&net)));
    let kept = |region: &str| net.state_dir().join(format!("regions/{region}.json"));
    assert!(wait_until(|| ["egress", "list"]
        .map(kept)
        .iter()
        .all(|file| file.exists())));
    dns.stop();
    web.stop();
    let [before, now] = [released_binary("0.1.0"), agent_binary().to_owned()];
    for (round, binary) in [&now, &before, &now, &before, &now].into_iter().enumerate() {
        net.kill();
        // The last two times without pins, as after a reboot.
        if round > 2 {
            fs::remove_dir_all(net.bpffs().join("filter-agent")).unwrap();
        }
        net.binary = binary.clone();
        net.start();
        assert!(holds(&net), "round {round}: {:#?}", net.log);
    }
    assert_eq!(layouts(&net), [format!("v{LAYOUT}")]);
}

/// It kept no policy that a start could go back to.
#[test]
#[ignore = "needs the agent of an earlier release, which `cargo xtask test --full` builds"]
fn upgrade_from_0_1_0_with_a_bad_policy_is_refused_and_leaves_it_in_force() {
    let mut net = Net::new("released-bad");
    net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
    let _server = net.echo(PORT);
    net.write_policy(&orders(&ALLOWED));
    net.binary = released_binary("0.1.0");
    net.start();
    net.kill();
    net.binary = agent_binary().to_owned();
    net.write_policy("interfaces: [eth0]\ndatabases: [{name: orders}]\n");
    let line = net.refusal(&[]);
    assert!(line.contains("orders"), "{line}");
    let (allowed, denied) = attempts();
    assert_eq!(net.connect_all(&allowed), [Accepted, Accepted]);
    assert_eq!(net.connect_all(&denied), [Silence, Silence]);
    assert_eq!(layouts(&net), ["v3"]);
    net.write_policy(&orders(&ALLOWED));
    net.start();
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
