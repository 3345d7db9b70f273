//! Every way to list an interface, through everything that happens to interfaces and routes, over a
//! reload, a restart, a heal and an upgrade: no packet of a denied source gets in, no interface is
//! detached, and exit statuses agree with what the kernel does.

use std::{
    ffi::OsStr,
    fs,
    net::{IpAddr, SocketAddr},
    os::unix::ffi::OsStrExt as _,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use filter_tests::net::{
    ALLOWED4, Connection, DB4, DENIED4, Net, Protected, agent_binary, bound, dedicated,
    next_layout_binary, policy, run_in, wait_until,
};
use serde_json::{Value, json};

use Connection::{Accepted, Silence};

const PORT: u16 = 5432;
const DB: SocketAddr = SocketAddr::new(IpAddr::V4(DB4), PORT);
const ALLOWED: [&str; 1] = ["203.0.113.10/32"];

/// What a policy may call `eth0`.
const ENTRIES: [&str; 4] = ["eth0", "enp1s0", "'eth*'", "default"];

fn orders(interfaces: &str) -> String {
    policy(
        interfaces,
        "auto",
        &[dedicated("orders", PORT, &ALLOWED, "")],
    )
}

/// A denied client that never stops trying, whatever the host answers: the tripwire counts what gets in.
struct Intruder {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Intruder {
    fn start(net: &Net) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, client) = (stop.clone(), net.client.name.clone());
        let thread = thread::spawn(move || {
            run_in(&client, || {
                while !stopped.load(Ordering::Relaxed) {
                    let brief = Duration::from_millis(3);
                    let _ = bound(DENIED4.into()).connect_timeout(&DB.into(), brief);
                }
            });
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Intruder {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A host whose clients need no default route for their answers, and an agent on it.
fn start(name: &str, entry: &str) -> Net {
    let mut net = Net::new(name);
    net.db.ip("link property add dev eth0 altname enp1s0");
    add_client_routes(&net, "eth0");
    net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
    net.write_policy(&orders(entry));
    net.start();
    net.wait_until_confirmed();
    net
}

fn add_client_routes(net: &Net, interface: &str) {
    net.db.ip(&format!(
        "route replace 203.0.113.0/24 via 10.0.0.2 dev {interface}
         route replace 198.51.100.0/24 via 10.0.0.2 dev {interface}"
    ));
}

fn delete_default_routes(net: &Net) {
    net.db
        .ip("route del default via 10.0.0.2 dev eth0\nroute del default via fd00::2 dev eth0");
}

/// Whether an XDP program runs on an interface of a namespace.
fn is_filtered(namespace: &str, interface: &str) -> bool {
    let mut command = Command::new("ip");
    command.args(["-n", namespace, "-j", "link", "show", "dev", interface]);
    let output = command.output().unwrap();
    let links: Value = serde_json::from_slice(&output.stdout).unwrap();
    links[0]["xdp"]["prog"]["id"].as_u64().is_some()
}

/// Whether `reload`, `status --verify` and `status --enforced` succeed.
fn statuses(net: &Net) -> [bool; 3] {
    let command = |arguments: &[&str]| net.agent(arguments).status.success();
    [
        command(&["reload"]),
        command(&["status", "--verify"]),
        command(&["status", "--enforced"]),
    ]
}

/// Goes through everything that reads the host's interfaces anew: a reload, the checks of a running agent, a
/// restart, and an upgrade to another layout (from there: a downgrade, and an upgrade). `check` is called after each.
fn through_everything(net: &mut Net, mut check: impl FnMut(&Net, &str)) {
    check(net, "at once");
    let output = net.agent(&["reload"]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!said.contains("- interface"), "{said}");
    check(net, "after a reload");
    // Long enough for checks, and for netlink's events.
    thread::sleep(Duration::from_millis(1200));
    check(net, "after a while");
    let binaries = [agent_binary(), next_layout_binary()];
    for (binary, when) in binaries.iter().zip(["after a restart", "after an upgrade"]) {
        net.kill();
        check(net, "without an agent");
        net.binary = binary.to_path_buf();
        net.start();
        check(net, when);
        net.agent(&["reload"]);
        check(net, &format!("{when} and a reload"));
    }
}

#[track_caller]
fn assert_closed(net: &Net, interface: &str, entry: &str, when: &str) {
    let filtered = is_filtered(&net.db.name, interface);
    assert!(filtered, "{entry}: {interface} is not filtered {when}");
    assert_eq!(net.tripwire(), 0, "{entry}: packets got in {when}");
}

#[track_caller]
fn assert_serves(net: &Net, entry: &str) {
    let attempts = [(ALLOWED4.into(), DB), (DENIED4.into(), DB)];
    let connections = net.connect_all(&attempts);
    assert_eq!(connections, [Accepted, Silence], "{entry}");
}

/// For events that leave `eth0` where it is: whatever the policy calls it, all goes on, and nothing fails.
fn stays_filtered(name: &str, event: impl Fn(&Net)) {
    for entry in ENTRIES {
        let mut net = start(name, entry);
        let _listener = net.listen(PORT);
        assert_serves(&net, entry);
        let _intruder = Intruder::start(&net);
        event(&net);
        through_everything(&mut net, |net, when| {
            assert_closed(net, "eth0", entry, when);
        });
        assert_serves(&net, entry);
        assert_eq!(statuses(&net), ALL_WELL, "{entry}");
    }
}

const ALL_WELL: [bool; 3] = [true, true, true];

#[test]
fn route_that_is_gone_detaches_nothing() {
    stays_filtered("route-gone", delete_default_routes);
}

#[test]
fn route_that_moved_detaches_nothing() {
    let moved = |net: &Net| {
        net.db.ip("link add docker0 type bridge
             link set docker0 up
             address add 10.9.0.1/24 dev docker0");
        delete_default_routes(net);
        net.db.ip("route add default via 10.9.0.2 dev docker0");
    };
    stays_filtered("route-moved", moved);
}

#[test]
fn route_that_leads_nowhere_refuses_nothing() {
    let nowhere = |net: &Net| {
        delete_default_routes(net);
        for (kind, metric) in [("unreachable", 10), ("blackhole", 20), ("prohibit", 30)] {
            net.db.ip(&format!(
                "route add {kind} default metric {metric}
                 route add {kind} ::/0 metric {metric}"
            ));
        }
    };
    stays_filtered("route-nowhere", nowhere);
}

#[test]
fn route_through_a_tunnel_refuses_nothing() {
    let tunnel = |net: &Net| {
        net.db.ip("tuntap add tun0 mode tun
             link set tun0 up
             address add 10.8.0.1/24 dev tun0");
        delete_default_routes(net);
        net.db.ip("route add default dev tun0");
    };
    stays_filtered("route-tunnel", tunnel);
}

#[test]
fn link_that_is_down_stays_filtered() {
    let down = |net: &Net| net.db.ip("link set eth0 down");
    for entry in ENTRIES {
        let mut net = start("link-down", entry);
        let _listener = net.listen(PORT);
        let intruder = Intruder::start(&net);
        down(&net);
        through_everything(&mut net, |net, when| {
            assert_closed(net, "eth0", entry, when);
        });
        assert_eq!(statuses(&net), ALL_WELL, "{entry}");
        net.db.ip("link set eth0 up");
        add_client_routes(&net, "eth0");
        // What the intruder asked while nobody could answer may fail only now, and our connections with it.
        net.fix_neighbours();
        assert_serves(&net, entry);
        drop(intruder);
    }
}

#[test]
fn renamed_interface_stays_filtered_however_it_was_listed() {
    for entry in ENTRIES {
        let mut net = start("rename", entry);
        let _listener = net.listen(PORT);
        let _intruder = Intruder::start(&net);
        net.db
            .ip("link set eth0 down\nlink set eth0 name lan0\nlink set lan0 up");
        add_client_routes(&net, "lan0");
        through_everything(&mut net, |net, when| {
            assert_closed(net, "lan0", entry, when);
        });
        assert_serves(&net, entry);
        assert_eq!(statuses(&net), ALL_WELL, "{entry}");
        // The altname moved with it; the others are told what to write.
        let warnings = net.agent_json(&["status"])["warnings"].to_string();
        let expected = entry != "enp1s0";
        assert_eq!(
            warnings.contains("lan0") && warnings.contains("counts as"),
            expected,
            "{entry}: {warnings}"
        );
    }
}

#[test]
fn interface_that_was_deleted_is_filtered_when_it_is_made_again() {
    for entry in ENTRIES {
        let mut net = start("remade", entry);
        let _listener = net.listen(PORT);
        net.db.ip("link delete eth0");
        through_everything(&mut net, |net, when| {
            if !when.contains("without") {
                let [_, status, enforced] = statuses(net);
                assert!(!status && !enforced, "{entry}: nothing is filtered {when}");
            }
        });
        let output = net.agent(&["reload"]);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            !output.status.success() && said.contains("nothing is filtered"),
            "{said}"
        );
        // Without a route, as at boot; and no packet until the agent saw it.
        net.watch(&[]);
        net.make_pair();
        delete_default_routes(&net);
        net.db.ip("link property add dev eth0 altname enp1s0");
        add_client_routes(&net, "eth0");
        assert!(wait_until(|| is_filtered(&net.db.name, "eth0")), "{entry}");
        net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
        assert_serves(&net, entry);
        let intruder = Intruder::start(&net);
        through_everything(&mut net, |net, when| {
            assert_closed(net, "eth0", entry, when);
        });
        drop(intruder);
        assert_eq!(statuses(&net), ALL_WELL, "{entry}");
    }
}

#[test]
fn interface_in_another_namespace_stays_filtered_there_and_when_it_is_back() {
    for entry in ENTRIES {
        let mut net = start("elsewhere", entry);
        let _listener = net.listen(PORT);
        let elsewhere = net.add_client().name.clone();
        net.db
            .ip(&format!("link set eth0 name moving0 netns {elsewhere}"));
        // The pattern lists another interface of that name, so that it is not inert.
        let others = entry == "'eth*'";
        through_everything(&mut net, |net, when| {
            assert!(is_filtered(&elsewhere, "moving0"), "{entry}: {when}");
            if !when.contains("without") {
                assert_eq!(
                    net.agent(&["status"]).status.success(),
                    others,
                    "{entry}: {when}"
                );
            }
        });
        let mut back = Command::new("ip");
        back.args([
            "-n", &elsewhere, "link", "set", "moving0", "name", "eth0", "netns",
        ]);
        assert!(back.arg(&net.db.name).status().unwrap().success());
        net.db
            .ip("link set eth0 up\naddress add 10.0.0.1/24 dev eth0");
        add_client_routes(&net, "eth0");
        let _intruder = Intruder::start(&net);
        through_everything(&mut net, |net, when| {
            assert_closed(net, "eth0", entry, when);
        });
        assert_serves(&net, entry);
        assert_eq!(statuses(&net), ALL_WELL, "{entry}");
    }
}

#[test]
fn interrupted_dumps_detach_nothing() {
    for entry in ENTRIES {
        let mut net = start("interrupted", entry);
        let _listener = net.listen(PORT);
        // Enough that a dump takes several packets; and all the time one comes or goes.
        let many = (0..120).map(|n| format!("link add quiet{n} type bridge\n"));
        net.db.ip(&many.collect::<String>());
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, namespace) = (stop.clone(), net.db.name.clone());
        let restless = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                for action in [
                    &["add", "restless", "type", "bridge"][..],
                    &["delete", "restless"],
                ] {
                    let mut command = Command::new("ip");
                    command.args(["-n", &namespace, "link"]).args(action);
                    assert!(command.status().unwrap().success());
                }
            }
        });
        let interrupted = || {
            let mut list = Command::new("ip");
            list.args(["-n", &net.db.name, "link"]);
            let output = list.output().unwrap();
            String::from_utf8_lossy(&output.stderr).contains("interrupted")
        };
        assert!(wait_until(interrupted), "no dump is interrupted");
        let intruder = Intruder::start(&net);
        through_everything(&mut net, |net, when| {
            assert_closed(net, "eth0", entry, when);
        });
        stop.store(true, Ordering::Relaxed);
        restless.join().unwrap();
        drop(intruder);
        assert_serves(&net, entry);
        assert_eq!(statuses(&net), ALL_WELL, "{entry}");
    }
}

#[test]
fn refused_netlink_socket_detaches_nothing_and_is_an_error() {
    for entry in ENTRIES {
        let mut net = start("no-netlink", entry);
        let _listener = net.listen(PORT);
        let intruder = Intruder::start(&net);
        net.without_netlink(|| {
            // The links are as they were, which `status --enforced` finds out by itself.
            assert_eq!(statuses(&net), [false, false, true], "{entry}");
            let line = net.agent_error(&["reload"]);
            assert!(
                line.contains("nothing is changed") && line.contains("netlink"),
                "{line}"
            );
            thread::sleep(Duration::from_millis(1500));
            assert_closed(&net, "eth0", entry, "without sockets");
        });
        net.kill();
        for binary in [agent_binary(), next_layout_binary()] {
            net.binary = binary.to_path_buf();
            let line = net.refusal_without_netlink();
            assert!(line.contains("Operation not permitted"), "{line}");
            assert_closed(&net, "eth0", entry, "after a start that was refused");
        }
        net.start();
        drop(intruder);
        assert_serves(&net, entry);
        assert_eq!(statuses(&net), ALL_WELL, "{entry}");
    }
}

#[test]
fn what_default_and_patterns_stood_for_is_filtered_at_a_boot_without_routes() {
    for entry in ENTRIES {
        let mut net = start("boot", entry);
        let _listener = net.listen(PORT);
        assert_eq!(statuses(&net), ALL_WELL, "{entry}");
        net.kill();
        // A reboot: what was pinned is gone, and so are interfaces and routes; the driver names it otherwise.
        let mut unpin = Command::new("rm");
        unpin.arg("-r").arg(net.bpffs().join("filter-agent"));
        assert!(unpin.status().unwrap().success());
        net.db.ip("link delete eth0");
        net.watch(&[]);
        net.make_pair();
        delete_default_routes(&net);
        net.db
            .ip("link set eth0 down\nlink set eth0 name ens3\nlink set ens3 up");
        add_client_routes(&net, "ens3");
        assert!(!is_filtered(&net.db.name, "ens3"));
        net.start();
        net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
        assert_closed(&net, "ens3", entry, "at a boot");
        assert_serves(&net, entry);
        let output = net.agent_json(&["status"]);
        assert_eq!(output["errors"], json!([]), "{entry}");
    }
}

#[test]
fn interface_that_took_the_index_of_one_elsewhere_does_not_detach_it() {
    let mut net = start("index", "'[eb]*'");
    let _listener = net.listen(PORT);
    let elsewhere = net.add_client().name.clone();
    let links = net
        .db
        .output(Command::new("ip").args(["-j", "link", "show", "eth0"]));
    let links: Value = serde_json::from_slice(&links.stdout).unwrap();
    let index = links[0]["ifindex"].as_u64().unwrap();
    net.db
        .ip(&format!("link set eth0 name moving0 netns {elsewhere}"));
    net.db.ip(&format!(
        "link add eth9 index {index} type veth peer name far9"
    ));
    assert!(wait_until(|| is_filtered(&net.db.name, "eth9")));
    through_everything(&mut net, |net, when| {
        assert!(is_filtered(&elsewhere, "moving0"), "{when}");
        assert!(is_filtered(&net.db.name, "eth9"), "{when}");
    });
    // Many that came and went leave nothing behind.
    for _ in 0..10 {
        net.db.ip("link add brief type bridge");
        assert!(wait_until(|| is_filtered(&net.db.name, "brief")));
        net.db.ip("link delete brief");
    }
    let pins = || {
        let base = fs::read_dir(net.bpffs().join("filter-agent")).unwrap();
        let pins = base.flat_map(|layout| fs::read_dir(layout.unwrap().path()).unwrap());
        let names = pins.map(|pin| pin.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.contains("link_")).count()
    };
    // eth0 elsewhere, eth1, eth9.
    assert!(wait_until(|| pins() == 3), "{} links are pinned", pins());
    let mut back = Command::new("ip");
    back.args([
        "-n", &elsewhere, "link", "set", "moving0", "name", "eth0", "netns",
    ]);
    assert!(back.arg(&net.db.name).status().unwrap().success());
    net.db
        .ip("link set eth0 up\naddress add 10.0.0.1/24 dev eth0");
    add_client_routes(&net, "eth0");
    assert!(wait_until(|| net
        .agent(&["status", "--enforced"])
        .status
        .success()));
    assert_serves(&net, "eth0 again");
    assert_eq!(statuses(&net), ALL_WELL);
}

#[test]
fn port_of_a_bridge_does_not_stand_in_for_the_bridge() {
    let mut net = Net::new("bridge-port");
    net.db
        .ip("link add br0 address 02:00:00:00:00:01 type bridge\nlink set br0 up");
    net.write_policy(&orders("br0"));
    net.start();
    net.wait_until_confirmed();
    net.kill();
    fs::remove_dir_all(net.bpffs().join("filter-agent")).unwrap();
    net.db.ip("link delete br0");
    net.start();
    assert!(!is_filtered(&net.db.name, "eth0"));
    net.db
        .ip("link add br0 address 02:00:00:00:00:01 type bridge\nlink set br0 up");
    assert!(wait_until(|| is_filtered(&net.db.name, "br0")));
    assert!(!is_filtered(&net.db.name, "eth0"));
}

#[test]
fn interface_of_an_entry_that_runs_another_program_is_not_enforced() {
    let mut net = start("taken", "default, eth1");
    net.add_client();
    assert!(wait_until(|| is_filtered(&net.db.name, "eth1")));
    net.wait_until_confirmed();
    net.kill();
    fs::remove_dir_all(net.bpffs().join("filter-agent")).unwrap();
    delete_default_routes(&net);
    // Another agent's, as good as any other program.
    let stranger = Net::new("taken-stranger");
    stranger.write_policy(&orders("eth0"));
    let mut other = Command::new(agent_binary());
    other.arg("run").arg("--policy").arg(stranger.policy_path());
    other
        .arg("--bpffs")
        .arg(stranger.bpffs())
        .arg("--state-dir")
        .arg(stranger.state_dir());
    other.arg("--socket").arg(stranger.socket());
    let mut other = net.db.run(|| other.spawn().unwrap());
    assert!(wait_until(|| is_filtered(&net.db.name, "eth0")));
    net.start();
    assert!(is_filtered(&net.db.name, "eth1"));
    for agent_runs in [true, false] {
        let line = net.agent_error(&["status", "--enforced"]);
        assert!(line.contains("eth0"), "{line}");
        if agent_runs {
            net.kill();
        }
    }
    other.kill().unwrap();
    other.wait().unwrap();
}

#[test]
fn what_is_remembered_does_not_grow() {
    let net = start("remembered", "'eth*'");
    for n in 0..40 {
        net.db
            .ip(&format!("link set eth0 address 02:00:00:00:01:{n:02x}"));
        net.agent_text(&["reload"]);
    }
    let kept = fs::read_to_string(net.state_dir().join("confirmed.json")).unwrap();
    assert_eq!(kept.matches("hardware_address").count(), 1, "{kept}");
}

/// The netlink crates leave it out of what they read.
#[test]
fn interface_whose_name_is_no_text_is_warned_of() {
    let mut net = Net::new("coverage-names");
    net.write_policy(&orders("eth0"));
    net.start();
    let (c1, turned) = ("c\u{8d}x", "d\u{202e}x");
    let is_warned_of = |name: &[u8], peer: &str, written: &str| {
        let link = |arguments: &[&str]| {
            let mut command = Command::new("ip");
            command
                .args(["-n", &net.db.name, "link", arguments[0]])
                .arg(OsStr::from_bytes(name))
                .args(&arguments[1..]);
            assert!(command.status().unwrap().success());
        };
        link(&["add", "type", "veth", "peer", "name", peer]);
        link(&["set", "up"]);
        let line = format!("warning: interface {written} is not in `interfaces`");
        let is_said = || net.agent_text(&["status"]).contains(&line);
        assert!(wait_until(is_said), "{}", net.agent_text(&["status"]));
    };
    // Those that a terminal obeys, too; in JSON they stand for themselves.
    for (name, written) in [(c1, r"c\u{8d}x"), (turned, r"d\u{202e}x")] {
        is_warned_of(name.as_bytes(), "peer0", written);
        let status = net.agent_json(&["status"]).to_string();
        assert!(status.contains(name), "{status}");
        net.db.ip("link delete peer0");
    }
    is_warned_of(b"x\xffy", "peer0", r"x\xffy");
    is_warned_of(b"w\x1b[31m", "peer1", r"w\u{1b}[31m");
    net.reload(&orders("eth0"));
    net.terminate();
    let log = net.log.join("\n");
    assert!(
        log.contains(r"interface x\xffy") && !log.contains('\u{1b}'),
        "{log}"
    );
    assert!(
        net.log.iter().all(|line| line.chars().count() < 500),
        "{log}"
    );
}
