//! The filter without its agent: killed, stopped, started again, its interface or its pins gone.

use std::{
    fs::{self, Permissions},
    net::{IpAddr, SocketAddr},
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::PathBuf,
    process::Command,
    thread,
    time::Duration,
};

use filter_tests::net::{
    ALLOWED4, ALLOWED6, Connection, DB4, DB6, DENIED4, DENIED6, Hammer, Net, Protected, dedicated,
    policy, under_load, wait_until,
};
use nix::sys::signal::Signal;
use serde_json::json;

use Connection::{Accepted, Silence};

const PORT: u16 = 5432;
const DB: SocketAddr = SocketAddr::new(IpAddr::V4(DB4), PORT);
const DB_V6: SocketAddr = SocketAddr::new(IpAddr::V6(DB6), PORT);
const ALLOWED: [&str; 2] = ["203.0.113.10/32", "2001:db8::10/128"];
/// The sources that `ALLOWED` does not name.
const DENIED: [&str; 2] = ["198.51.100.7/32", "2001:db8:dead::7/128"];

fn orders(allowed: &[&str]) -> String {
    policy("eth0", "native", &[dedicated("orders", PORT, allowed, "")])
}

/// An agent that enforces `ALLOWED`.
fn start(name: &str) -> Net {
    Net::enforcing(name, &[Protected::tcp(PORT, &ALLOWED)], &orders(&ALLOWED))
}

/// Asserts that the sources of `ALLOWED` connect, and the denied ones do not, or the other way
/// round.
#[track_caller]
fn assert_open_to(net: &Net, allowed: &[&str]) {
    let attempts = [
        (ALLOWED4.into(), DB),
        (ALLOWED6.into(), DB_V6),
        (DENIED4.into(), DB),
        (DENIED6.into(), DB_V6),
    ];
    let expected = if allowed == ALLOWED {
        [Accepted, Accepted, Silence, Silence]
    } else {
        [Silence, Silence, Accepted, Accepted]
    };
    assert_eq!(net.connect_all(&attempts), expected);
}

fn program_of(net: &Net) -> u64 {
    let status = net.agent_json(&["status", "--verify"]);
    assert_eq!(status["errors"], json!([]));
    status["interfaces"][0]["program_id"].as_u64().unwrap()
}

/// `PATH/v<layout>`, where the maps and links are pinned.
fn pins(net: &Net) -> PathBuf {
    let base = net.bpffs().join("filter-agent");
    let entries = fs::read_dir(base).unwrap();
    let is_layout = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with('v');
    let mut paths = entries.map(|entry| entry.unwrap().path());
    paths.find(is_layout).expect("the maps are pinned")
}

#[test]
fn filter_outlives_a_killed_agent_and_the_next_one_adopts_it() {
    let mut net = start("killed");
    let _listener = net.listen(PORT);
    net.kill();
    assert_open_to(&net, &ALLOWED);
    let line = net.agent_error(&["status"]);
    assert!(line.contains("stays in force on eth0"), "{line}");
    net.start();
    assert_open_to(&net, &ALLOWED);
    assert!(program_of(&net) > 0);
    let difference = &net.agent_json(&["plan"])["difference"];
    assert_no_difference(difference);
}

/// No list in a difference holds anything.
fn assert_no_difference(difference: &serde_json::Value) {
    fn is_empty(value: &serde_json::Value) -> bool {
        match value {
            serde_json::Value::Array(list) => list.is_empty(),
            serde_json::Value::Object(fields) => fields.values().all(is_empty),
            other => other == &json!(0) || other.is_null(),
        }
    }
    assert!(is_empty(difference), "{difference:#}");
}

#[test]
fn filter_outlives_a_stopped_agent() {
    let mut net = start("stopped");
    let _listener = net.listen(PORT);
    net.terminate();
    assert!(
        net.log.last().unwrap().contains("stays in force on eth0"),
        "{:?}",
        net.log
    );
    assert!(!net.socket().exists());
    assert_open_to(&net, &ALLOWED);
    net.start();
    assert_open_to(&net, &ALLOWED);
}

#[test]
fn counts_and_hits_outlive_the_agent() {
    let mut net = start("counts");
    let _listener = net.listen(PORT);
    assert_open_to(&net, &ALLOWED);
    let before = net.agent_json(&["status"])["databases"][0].clone();
    assert!(before["passed"].as_u64() > Some(0), "{before:#}");
    net.kill();
    net.start();
    let after = net.agent_json(&["status"])["databases"][0].clone();
    assert_eq!(after["passed"], before["passed"]);
    assert_eq!(after["dropped"], before["dropped"]);
}

#[test]
fn restart_enforces_the_file_as_it_is_then() {
    let mut net = start("restart");
    let _listener = net.listen(PORT);
    net.kill();
    net.write_policy(&orders(&DENIED));
    assert_open_to(&net, &ALLOWED);
    net.watch(&[Protected::tcp(PORT, &[ALLOWED, DENIED].concat())]);
    net.start();
    net.watch(&[Protected::tcp(PORT, &DENIED)]);
    assert_open_to(&net, &DENIED);
}

#[test]
fn bad_file_at_a_start_means_the_confirmed_policy() {
    let mut net = start("bad-file");
    let _listener = net.listen(PORT);
    net.wait_until_confirmed();
    let bad = [
        // Cut off in the middle, after the interfaces, and before the first rule.
        "interfaces: [eth0]\ndatabases: [{name: ord",
        "interfaces: [eth0]\n",
        "interfaces: [eth0]\ndatabases:\n",
        "interfaces: [eth0]\ndatabases: []\n",
        "interfaces: [eth0]\ndatabases: 7\n",
        "",
    ];
    for text in bad {
        net.write_policy(text);
        let line = net.agent_error(&["reload"]);
        assert!(line.contains("nothing is changed"), "{text}: {line}");
        net.hang_up();
        net.wait_for_line("error: reload refused");
        net.kill();
        net.start();
        let status = net.agent(&["status"]);
        let status = String::from_utf8(status.stdout).unwrap();
        assert!(
            status.contains("policy.yaml is not enforced"),
            "{text}: {status}"
        );
        assert_open_to(&net, &ALLOWED);
        net.agent_text(&["status", "--enforced"]);
    }
    // No file at all, and a host that booted: nothing is pinned.
    fs::remove_file(net.policy_path()).unwrap();
    net.kill();
    net.watch(&[]);
    fs::remove_dir_all(net.bpffs().join("filter-agent")).unwrap();
    net.start();
    net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
    assert_open_to(&net, &ALLOWED);
    net.reload(&orders(&ALLOWED));
    assert_eq!(net.agent_json(&["status"])["errors"], json!([]));
}

#[test]
fn bad_file_where_nothing_is_kept_leaves_the_pins_as_they_are() {
    let mut net = start("nothing-kept");
    let _listener = net.listen(PORT);
    net.kill();
    fs::remove_dir_all(net.state_dir()).unwrap();
    net.write_policy("interfaces: [eth0]\n");
    let line = net.refusal(&[]);
    assert!(line.contains("what is pinned stays in force"), "{line}");
    assert_open_to(&net, &ALLOWED);
}

#[test]
fn confirmed_policy_that_cannot_be_read_is_not_taken_for_none() {
    let mut net = start("unreadable-kept");
    let _listener = net.listen(PORT);
    net.wait_until_confirmed();
    net.kill();
    let kept = net.state_dir().join("confirmed.json");
    let good = fs::read(&kept).unwrap();
    // Valid, and it would open the port.
    let other = policy("eth0", "native", &[dedicated("other", 5433, &ALLOWED, "")]);
    net.write_policy(&other);
    let spoilt: [(&str, &dyn Fn()); 3] = [
        ("damaged", &|| {
            fs::write(&kept, &good[..good.len() / 2]).unwrap()
        }),
        ("others could have written it", &|| {
            fs::set_permissions(&kept, fs::Permissions::from_mode(0o664)).unwrap();
        }),
        ("not a regular file", &|| {
            fs::remove_file(&kept).unwrap();
            fs::create_dir(&kept).unwrap();
        }),
    ];
    for (expected, spoil) in spoilt {
        fs::write(&kept, &good).unwrap();
        spoil();
        let line = net.refusal(&[]);
        assert!(
            line.contains(expected) && line.contains("what is pinned stays"),
            "{line}"
        );
        assert_open_to(&net, &ALLOWED);
    }
    // After a reboot nothing is pinned: the file is better than nothing, and says so until a reload.
    net.watch(&[]);
    fs::remove_dir_all(net.bpffs().join("filter-agent")).unwrap();
    net.write_policy(&orders(&ALLOWED));
    net.start();
    net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
    assert_open_to(&net, &ALLOWED);
    let errors = net.agent_json(&["status"])["errors"].to_string();
    assert!(errors.contains("not a regular file"), "{errors}");
    fs::remove_dir(&kept).unwrap();
    net.agent_text(&["reload"]);
    assert_eq!(net.agent_json(&["status"])["errors"], json!([]));
    assert!(kept.is_file());
}

#[test]
fn detach_that_meets_something_foreign_changes_nothing() {
    for agent_runs in [true, false] {
        let mut net = start(&format!("foreign-pin-{agent_runs}"));
        let _listener = net.listen(PORT);
        net.wait_until_confirmed();
        if !agent_runs {
            net.kill();
        }
        let foreign = pins(&net).join("foreign");
        fs::create_dir(&foreign).unwrap();
        let line = net.agent_error(&["detach", "--yes"]);
        assert!(
            line.contains("foreign") && line.contains("nothing is changed"),
            "{line}"
        );
        assert_open_to(&net, &ALLOWED);
        net.agent_text(&["status", "--enforced"]);
        fs::remove_dir(&foreign).unwrap();
        net.agent_text(&["detach", "--yes"]);
        if agent_runs {
            assert!(net.wait_for_exit().success());
        }
        net.watch(&[]);
        assert_eq!(net.connect(DENIED4.into(), DB), Accepted);
    }
}

/// Fault A10: what is not permitted to be seen was taken for absent.
#[test]
fn detach_without_permission_says_so_and_changes_nothing() {
    let mut net = start("unprivileged");
    let _listener = net.listen(PORT);
    net.kill();
    let detach = || {
        let mut command = net.agent_command(&["detach", "--yes"]);
        command.uid(65534).gid(65534);
        let output = net.db.output(&mut command);
        let line = String::from_utf8(output.stderr).unwrap();
        let printed = output.stdout;
        assert!(!output.status.success() && printed.is_empty(), "{line}");
        assert!(line.contains("Permission denied"), "{line}");
        assert!(!line.contains("nothing is filtered"), "{line}");
        assert_open_to(&net, &ALLOWED);
    };
    detach();
    // Where no socket is left, the pins are looked at. systemd mounts the BPF file system so.
    fs::remove_file(net.socket()).unwrap();
    fs::set_permissions(net.bpffs(), Permissions::from_mode(0o700)).unwrap();
    detach();
}

#[test]
fn reload_that_unguards_is_refused_without_the_flag_and_survives_a_restart_with_it() {
    let mut net = Net::new("unguard");
    let _listeners = [net.listen(PORT), net.listen(PORT + 1)];
    net.add_client();
    let other = dedicated("other", PORT + 1, &ALLOWED, "");
    let database = |more: &str| dedicated("orders", PORT, &ALLOWED, more);
    let both = policy("eth0, eth1", "auto", &[database(""), other.clone()]);
    net.write_policy(&both);
    net.start();
    let other_port = [(DENIED4.into(), SocketAddr::new(DB4.into(), PORT + 1))];
    let narrow = format!("addresses: [{DB4}]");
    let cases = [
        (
            policy("eth0, eth1", "auto", &[database("")]),
            "database other (tcp/5433)",
        ),
        (
            policy("eth0", "auto", &[database(""), other.clone()]),
            "interface eth1",
        ),
        (
            policy(
                "eth0, eth1",
                "auto",
                &[database("monitor: true"), other.clone()],
            ),
            "database orders (`monitor: true` is new)",
        ),
        (
            policy("eth0, eth1", "auto", &[database(&narrow), other.clone()]),
            "database orders (tcp/5432 at addresses other than 10.0.0.1)",
        ),
        (
            policy("eth0, eth1", "auto", &[]).replace("databases:\n", "databases: []\n"),
            "database orders (tcp/5432), database other",
        ),
    ];
    for (text, expected) in &cases {
        net.write_policy(text);
        let line = net.agent_error(&["reload"]);
        assert!(
            line.contains(expected) && line.contains("--allow-unprotect"),
            "{line}"
        );
        let plan = net.agent_text(&["plan"]);
        assert!(
            plan.contains("a reload is refused") && plan.contains(expected),
            "{plan}"
        );
        net.hang_up();
        net.wait_for_line("error: reload refused, nothing is changed");
        net.kill();
        net.start();
        let errors = net.agent_json(&["status"])["errors"].to_string();
        assert!(errors.contains(expected), "{errors}");
        assert_eq!(net.connect_all(&other_port), [Silence]);
        assert_eq!(
            net.agent_json(&["status"])["interfaces"]
                .as_array()
                .unwrap()
                .len(),
            2
        );
    }
    // Configuration management says so in the file.
    let mut managed = cases[0].0.clone();
    managed.push_str("unprotected: [other]\n");
    net.reload(&managed);
    assert_eq!(net.connect_all(&other_port), [Accepted]);
    net.reload(&both);
    assert_eq!(net.connect_all(&other_port), [Silence]);
    // With the flag it is done, and stays done over a restart.
    for (text, _) in &cases[..2] {
        net.write_policy(text);
        net.agent_text(&["reload", "--allow-unprotect"]);
        net.kill();
        net.start();
        assert_eq!(net.agent_json(&["status"])["errors"], json!([]));
    }
    assert_eq!(
        net.agent_json(&["status"])["interfaces"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    net.assert_detached("eth1");
}

#[test]
fn detach_forgets_the_confirmed_policy() {
    for agent_runs in [true, false] {
        let mut net = start(&format!("forget-{agent_runs}"));
        if !agent_runs {
            net.kill();
        }
        net.agent_text(&["detach", "--yes"]);
        if agent_runs {
            assert!(net.wait_for_exit().success());
        }
        assert!(!net.state_dir().join("confirmed.json").exists());
        net.watch(&[]);
        net.write_policy("interfaces: [eth0]\n");
        let line = net.refusal(&[]);
        assert!(line.contains("`databases` is missing"), "{line}");
    }
}

#[test]
fn state_directory_that_cannot_be_written_is_a_warning_and_stops_nothing() {
    let mut net = Net::new("full-disk");
    let _listener = net.listen(PORT);
    fs::create_dir_all(net.state_dir()).unwrap();
    let none = None::<&str>;
    let full = Some("size=64k");
    nix::mount::mount(
        none,
        &net.state_dir(),
        Some("tmpfs"),
        nix::mount::MsFlags::empty(),
        full,
    )
    .unwrap();
    fs::write(net.state_dir().join("full"), [0; 64 << 10]).unwrap();
    net.write_policy(&orders(&ALLOWED));
    net.start();
    net.wait_for_line("warning: the policy in force is not kept for the next start");
    net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
    assert_open_to(&net, &ALLOWED);
    net.watch(&[Protected::tcp(PORT, &[ALLOWED, DENIED].concat())]);
    net.reload(&orders(&DENIED));
    assert_open_to(&net, &DENIED);
    let warnings = net.agent_json(&["status"])["warnings"].to_string();
    assert!(warnings.contains("No space left"), "{warnings}");
    fs::remove_file(net.state_dir().join("full")).unwrap();
    net.agent_text(&["reload"]);
    let kept = || net.agent_json(&["status"])["warnings"] == json!([]);
    assert!(wait_until(kept));
    net.terminate();
    nix::mount::umount(&net.state_dir()).unwrap();
}

#[test]
fn policy_that_is_attached_nowhere_is_an_error() {
    let mut net = Net::new("inert");
    let nothing = policy("ens5", "auto", &[]).replace("databases:\n", "databases: []\n");
    net.write_policy(&nothing);
    net.start();
    net.agent_text(&["status", "--enforced"]);
    let inert = policy("ens5", "auto", &[dedicated("orders", PORT, &ALLOWED, "")]);
    net.write_policy(&inert);
    for _ in 0..2 {
        let reload = net.agent(&["reload"]);
        let text = String::from_utf8(reload.stdout).unwrap();
        assert!(!reload.status.success(), "{text}");
        assert!(
            text.contains(
                "error: nothing is filtered, and the databases are open: interface ens5 is missing"
            ),
            "{text}"
        );
        let line = net.agent_error(&["status", "--enforced"]);
        assert!(line.contains("nothing is filtered"), "{line}");
        net.kill();
        net.start();
        net.wait_for_line("error: nothing is filtered");
    }
    let policy_path = net.policy_path();
    let check = net.agent(&["check", policy_path.to_str().unwrap(), "--host"]);
    let text = String::from_utf8(check.stdout).unwrap();
    assert!(
        !check.status.success() && text.contains("error: interface ens5 is missing here"),
        "{text}"
    );
    // It comes up while a database's unit waits.
    let mut waiting = net.agent_command(&["status", "--enforced", "--wait", "60s"]);
    let mut waiting = net.db.run(|| waiting.spawn().unwrap());
    thread::sleep(Duration::from_millis(300));
    assert!(waiting.try_wait().unwrap().is_none());
    net.db.ip("link add ens5 type veth peer name far5");
    assert!(waiting.wait().unwrap().success());
}

#[test]
fn status_enforced_looks_by_itself_where_no_agent_runs() {
    let mut net = start("enforced");
    let enforced = ["status", "--enforced"];
    assert_eq!(net.agent_text(&enforced), "enforced on eth0\n");
    // One dead region is no reason for a database not to start.
    let region = "regions: {dead: {file: /nonexistent}}\n";
    let policy = orders(&ALLOWED).replace("rules: [", "rules: [{region: dead}, ");
    net.kill();
    net.write_policy(&format!("{region}{policy}"));
    net.start();
    assert!(!net.agent(&["status"]).status.success());
    net.agent_text(&enforced);
    net.kill();
    assert_eq!(
        net.agent_text(&enforced),
        "enforced on eth0, without an agent\n"
    );
    // A hung agent is no agent.
    net.start();
    net.signal(Signal::SIGSTOP);
    assert_eq!(
        net.agent_text(&enforced),
        "enforced on eth0, without an agent\n"
    );
    net.signal(Signal::SIGCONT);
    net.kill();
    // An interface that is listed and runs nothing.
    net.db.ip("link delete eth0");
    net.watch(&[]);
    net.make_pair();
    let line = net.agent_error(&enforced);
    assert!(line.contains("eth0 is not filtered"), "{line}");
    let line = net.agent_error(&["status", "--enforced", "--wait", "1s"]);
    assert!(line.contains("eth0 is not filtered"), "{line}");
    net.start();
    net.agent_text(&enforced);
    net.agent_text(&["detach", "--yes"]);
    net.wait_for_exit();
    let line = net.agent_error(&enforced);
    assert!(line.contains("no confirmed policy is kept"), "{line}");
    for wrong in ["abc", "-5s", "2h"] {
        let output = net.agent(&["status", "--enforced", "--wait", wrong]);
        assert_eq!(output.status.code(), Some(2), "{wrong}");
    }
    assert_eq!(
        net.agent(&["status", "--wait", "5s"]).status.code(),
        Some(2)
    );
}

#[test]
fn kills_at_random_moments_of_reloads_let_nobody_in_and_keep_nobody_out() {
    let mut net = Net::new("kills");
    let _echo = net.echo(PORT);
    let wide = ["203.0.113.0/24", "2001:db8::/64", "10.3.0.0/16"];
    net.watch(&[Protected::tcp(PORT, &wide)]);
    net.add_client();
    let here = format!("addresses: [{DB4}, '{DB6}', 10.0.1.1]");
    let many: Vec<String> = (0..200).map(|n| format!("10.3.{n}.0/24")).collect();
    let many = format!("cluster: [{}]", many.join(", "));
    // The last one guards fewer addresses than the first.
    let unprotected = "unprotected: [orders, renamed]\n";
    let policies = [
        dedicated("orders", PORT, &ALLOWED, ""),
        dedicated("orders", PORT, &wide, ""),
        dedicated("renamed", PORT, &ALLOWED, &many),
        dedicated("orders", PORT, &ALLOWED, &here),
    ]
    .map(|database| policy("eth0, eth1", "native", &[database]) + unprotected);
    net.write_policy(&policies[0]);
    net.start();
    let stranger = "10.0.1.2".parse().unwrap();
    let denied = [(stranger, DB), (stranger, "10.0.1.1:5432".parse().unwrap())];
    let denied = Hammer::denied(&net.more_clients[0], &denied);
    let allowed = [(ALLOWED4.into(), DB), (ALLOWED6.into(), DB_V6)];
    net.count_syns(PORT);
    let allowed = Hammer::allowed(&net.client, &allowed);
    let mut rng = fastrand::Rng::with_seed(7);
    under_load(20, &[(&allowed, 100), (&denied, 100)], |round| {
        net.write_policy(&policies[(round + 1) % policies.len()]);
        net.hang_up();
        thread::sleep(Duration::from_micros(rng.u64(..8_000)));
        net.kill();
        net.start();
        assert_no_difference(&net.agent_json(&["plan"])["difference"]);
    });
    allowed.stop();
    denied.stop();
    net.assert_all_syns_passed();
    let status = net.agent_json(&["status", "--verify"]);
    assert_eq!(status["errors"], json!([]));
}

#[test]
fn agent_that_was_killed_while_it_started_leaves_nothing_that_stops_the_next() {
    let mut net = Net::new("half-started");
    let _listener = net.listen(PORT);
    net.write_policy(&orders(&ALLOWED));
    let mut rng = fastrand::Rng::with_seed(7);
    for _ in 0..12 {
        net.spawn(&[]);
        thread::sleep(Duration::from_micros(rng.u64(..60_000)));
        net.kill();
        net.start();
        assert_eq!(net.connect(ALLOWED4.into(), DB), Accepted);
        assert!(program_of(&net) > 0);
        net.agent_text(&["detach", "--yes"]);
        assert!(net.wait_for_exit().success());
    }
    net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
    net.start();
    assert_open_to(&net, &ALLOWED);
}

#[test]
fn interface_that_is_deleted_and_made_again_is_filtered_again() {
    let mut net = start("recreated");
    let _listener = net.listen(PORT);
    net.db.ip("link delete eth0");
    assert!(wait_until(|| {
        let errors = net.agent_json(&["status"])["errors"].to_string();
        errors.contains("eth0 is missing")
    }));
    // What arrives between the interface and its filter is not this test's matter.
    net.watch(&[]);
    net.make_pair();
    net.wait_for_line("attached to eth0");
    net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
    assert_open_to(&net, &ALLOWED);
    assert!(program_of(&net) > 0);
}

#[test]
fn interface_that_was_made_again_while_the_agent_was_down_is_filtered_from_its_start() {
    let mut net = start("recreated-down");
    let _listener = net.listen(PORT);
    net.kill();
    net.db.ip("link delete eth0");
    net.make_pair();
    net.start();
    assert_open_to(&net, &ALLOWED);
    assert!(program_of(&net) > 0);
}

#[test]
fn policy_larger_than_the_maps_is_refused_and_the_old_one_stays() {
    let mut net = Net::new("full");
    let _listener = net.listen(PORT);
    net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
    net.write_policy(&orders(&ALLOWED));
    net.start_with(&["--max-prefixes", "16"]);
    let many: Vec<String> = (0..17).map(|n| format!("10.3.{n}.0/24")).collect();
    let many = format!("cluster: [{}]", many.join(", "));
    net.write_policy(&policy(
        "eth0",
        "native",
        &[dedicated("orders", PORT, &DENIED, &many)],
    ));
    let line = net.agent_error(&["reload"]);
    assert!(
        line.contains("18 IPv4 prefixes") && line.contains("16"),
        "{line}"
    );
    assert_open_to(&net, &ALLOWED);
    assert!(program_of(&net) > 0);
    // To the brim, and on to another full policy.
    let fits = |allowed: &[&str], from: u8| {
        let more: Vec<String> = (0..15).map(|n| format!("10.3.{}.0/24", from + n)).collect();
        let more = format!("cluster: [{}]", more.join(", "));
        policy(
            "eth0",
            "native",
            &[dedicated("orders", PORT, allowed, &more)],
        )
    };
    net.reload(&fits(&ALLOWED, 0));
    net.reload(&fits(&ALLOWED, 100));
    assert_open_to(&net, &ALLOWED);
}

#[test]
fn pins_that_others_could_write_are_refused() {
    let mut net = start("hostile-pins");
    let _listener = net.listen(PORT);
    net.kill();
    let base = net.bpffs().join("filter-agent");
    for directory in [base, pins(&net)] {
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o777)).unwrap();
        let line = net.refusal(&[]);
        assert!(line.contains(directory.to_str().unwrap()), "{line}");
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o700)).unwrap();
        nix::unistd::chown(&directory, Some(65534.into()), None).unwrap();
        let line = net.refusal(&[]);
        assert!(line.contains(directory.to_str().unwrap()), "{line}");
        nix::unistd::chown(&directory, Some(0.into()), None).unwrap();
    }
    assert_open_to(&net, &ALLOWED);
    net.start();
    assert_open_to(&net, &ALLOWED);
}

#[test]
fn foreign_map_under_a_pins_name_is_refused() {
    let mut net = start("foreign-map");
    let _listener = net.listen(PORT);
    net.kill();
    let pins = pins(&net);
    // One of the filter's own maps, under the name of another.
    let counts = pins.join("COUNTS");
    fs::rename(&counts, pins.join("aside")).unwrap();
    fs::hard_link(pins.join("HITS"), &counts).unwrap();
    let line = net.refusal(&[]);
    assert!(line.contains("COUNTS"), "{line}");
    assert_open_to(&net, &ALLOWED);
    fs::remove_file(&counts).unwrap();
    fs::rename(pins.join("aside"), &counts).unwrap();
    net.start();
    assert_open_to(&net, &ALLOWED);
}

#[test]
fn missing_map_is_refused() {
    let mut net = start("missing-map");
    let _listener = net.listen(PORT);
    net.kill();
    let pins = pins(&net);
    for name in [
        "PORT_GUARDS",
        "LOCAL_GUARDS",
        "PROTOCOLS",
        "ALLOWED4",
        "SLOT_NAMES",
    ] {
        fs::rename(pins.join(name), pins.join("aside")).unwrap();
        let line = net.refusal(&[]);
        assert!(line.contains(name), "{line}");
        assert!(!pins.join(name).exists());
        fs::rename(pins.join("aside"), pins.join(name)).unwrap();
    }
    assert_open_to(&net, &ALLOWED);
    net.start();
    assert_open_to(&net, &ALLOWED);
}

#[test]
fn detach_removes_every_trace() {
    for agent_runs in [true, false] {
        let mut net = start(&format!("detach-{agent_runs}"));
        let _listener = net.listen(PORT);
        if !agent_runs {
            net.kill();
        }
        net.agent_text(&["detach", "--yes"]);
        if agent_runs {
            assert!(net.wait_for_exit().success());
        }
        assert!(!net.bpffs().join("filter-agent").exists());
        net.assert_detached("eth0");
        net.watch(&[]);
        assert_eq!(net.connect(DENIED4.into(), DB), Accepted);
        net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
        net.start();
        assert_open_to(&net, &ALLOWED);
    }
}

#[test]
fn mode_change_is_refused_while_the_filter_is_on() {
    let net = start("mode");
    let _listener = net.listen(PORT);
    let generic = policy(
        "eth0",
        "generic",
        &[dedicated("orders", PORT, &ALLOWED, "")],
    );
    net.write_policy(&generic);
    let line = net.agent_error(&["reload"]);
    assert!(line.contains("native") && line.contains("detach"), "{line}");
    assert_open_to(&net, &ALLOWED);
}

#[test]
fn program_cannot_be_taken_off_with_ip_link() {
    let net = start("taken-off");
    let _listener = net.listen(PORT);
    let mut command = Command::new("ip");
    command.args(["link", "set", "dev", "eth0", "xdp", "off"]);
    assert!(!net.db.output(&mut command).status.success());
    assert_open_to(&net, &ALLOWED);
}

#[test]
fn socket_path_of_another_file_is_left_alone_and_a_missing_socket_ends_no_agent_badly() {
    let mut net = start("socket");
    let _listener = net.listen(PORT);
    fs::remove_file(net.socket()).unwrap();
    net.terminate();
    assert_open_to(&net, &ALLOWED);
    fs::write(net.socket(), "not yours").unwrap();
    let line = net.refusal(&[]);
    assert!(line.contains("control.sock is not a socket"), "{line}");
    assert_eq!(fs::read_to_string(net.socket()).unwrap(), "not yours");
    assert_open_to(&net, &ALLOWED);
    fs::remove_file(net.socket()).unwrap();
    net.start();
    // Another agent's by now.
    fs::remove_file(net.socket()).unwrap();
    let _other = std::os::unix::net::UnixListener::bind(net.socket()).unwrap();
    net.terminate();
    assert!(net.socket().exists());
}
