//! Interfaces that appear, vanish, change and are named in other ways than by their name.

use std::{
    fs::{self, Permissions},
    net::{IpAddr, SocketAddr},
    os::unix::fs::PermissionsExt as _,
    process::Command,
};

use filter_common::LAYOUT;
use filter_tests::net::{
    ALLOWED4, Connection, DB4, DENIED4, Hammer, Net, Protected, agent_binary, connect, dedicated,
    policy, succeed, wait_until,
};
use serde_json::{Value, json};

use Connection::{Accepted, Silence};

const PORT: u16 = 5432;
const DB: SocketAddr = SocketAddr::new(IpAddr::V4(DB4), PORT);
const ALLOWED: [&str; 1] = ["203.0.113.10/32"];

fn orders(interfaces: &str) -> String {
    policy(
        interfaces,
        "auto",
        &[dedicated("orders", PORT, &ALLOWED, "")],
    )
}

/// An agent that filters these interfaces.
fn start(name: &str, interfaces: &str) -> Net {
    Net::enforcing(name, &[Protected::tcp(PORT, &ALLOWED)], &orders(interfaces))
}

#[track_caller]
fn assert_filtered(net: &Net) {
    let attempts = [(ALLOWED4.into(), DB), (DENIED4.into(), DB)];
    assert_eq!(net.connect_all(&attempts), [Accepted, Silence]);
    assert_eq!(net.agent_json(&["status", "--verify"])["errors"], json!([]));
}

/// Names of the interfaces that `status` lists, and how each is filtered.
fn interfaces(net: &Net) -> Vec<(String, String)> {
    let status = net.agent_json(&["status"]);
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let interfaces = status["interfaces"].as_array().unwrap().iter();
    interfaces
        .map(|i| (text(&i["name"]), text(&i["mode"])))
        .collect()
}

fn said(net: &Net, beginning: &str) -> bool {
    net.log.iter().any(|line| line.starts_with(beginning))
}

#[test]
fn interface_has_a_mode_of_its_own() {
    let mut net = start(
        "own-mode",
        "{name: eth0, mode: generic}, {name: 'eth*', mode: native}",
    );
    let _listener = net.listen(PORT);
    assert_eq!(interfaces(&net), [("eth0".into(), "generic".into())]);
    assert_filtered(&net);
    // As it is when the agent starts again, and when it puts a lost filter back.
    net.kill();
    net.start();
    assert_eq!(interfaces(&net), [("eth0".into(), "generic".into())]);
    net.write_policy(&orders("'eth*', {name: eth0, mode: native}"));
    let error = net.agent_error(&["reload"]);
    let expected = "eth0 is filtered in generic mode, and changing the mode would open it";
    assert!(error.contains(expected), "{error}");
    assert_filtered(&net);
}

#[test]
fn interface_that_is_not_there_yet_is_filtered_when_it_comes() {
    let mut net = start("later", "eth0, eth7");
    let _listener = net.listen(PORT);
    assert!(said(
        &net,
        "warning: interface eth7 is missing; it is filtered as soon as"
    ));
    let errors = net.agent_json(&["status"])["errors"].to_string();
    assert!(errors.contains("interface eth7 is missing"), "{errors}");
    net.db.ip("link add eth7 type veth peer name far7");
    net.wait_for_line("attached to eth7 in native mode");
    assert_filtered(&net);
}

#[test]
fn reload_that_names_an_interface_that_never_was_there_is_refused() {
    let net = start("never", "eth0");
    let _listener = net.listen(PORT);
    for (entry, expected) in [
        ("eth8", "interface eth8 is missing on this host, which has "),
        ("'ens*'", "no interface is named as in ens* on this host"),
    ] {
        net.write_policy(&orders(&format!("eth0, {entry}")));
        let error = net.agent_error(&["reload"]);
        assert!(error.contains(expected), "{error}");
    }
    assert_filtered(&net);
}

#[test]
fn pattern_covers_what_it_names_and_what_comes_later() {
    let mut net = start("pattern", "'eth*'");
    let _listener = net.listen(PORT);
    assert_eq!(interfaces(&net), [("eth0".into(), "native".into())]);
    assert_filtered(&net);
    net.add_client();
    let eth1 = ("eth1".to_owned(), "native".to_owned());
    assert!(wait_until(|| interfaces(&net).contains(&eth1)));
    let second: IpAddr = "10.0.1.2".parse().unwrap();
    let db: SocketAddr = "10.0.1.1:5432".parse().unwrap();
    assert_eq!(net.more_clients[0].run(|| connect(second, db)), Silence);
    // Neither the loopback interface nor what is no Ethernet is meant by a pattern.
    net.db.ip("tuntap add dev etun mode tun");
    net.reload(&orders("'*'"));
    let listed = interfaces(&net);
    assert!(
        listed.iter().all(|(name, _)| name.starts_with("eth")),
        "{listed:?}"
    );
    assert_filtered(&net);
}

#[test]
fn default_route_decides_where_the_policy_says_default() {
    let mut net = start("default-route", "default");
    let _listener = net.listen(PORT);
    assert_eq!(interfaces(&net), [("eth0".into(), "native".into())]);
    assert_filtered(&net);
    net.add_client();
    assert_eq!(interfaces(&net).len(), 1);
    net.db
        .ip("route add default via 10.0.1.2 dev eth1 metric 50");
    net.wait_for_line("attached to eth1 in native mode");
    // Whatever else happens to the route, what is filtered stays so.
    net.db.ip(
        "route delete default via 10.0.0.2 dev eth0\nroute delete default via fd00::2 dev eth0",
    );
    net.db.ip("route add 198.51.100.0/24 via 10.0.0.2 dev eth0");
    let both = [("eth1", "native"), ("eth0", "native")];
    let both = both.map(|(name, mode)| (name.to_owned(), mode.to_owned()));
    assert!(wait_until(|| interfaces(&net) == both));
    assert_eq!(net.connect(DENIED4.into(), DB), Silence);
    let warnings = net.agent_json(&["status"])["warnings"].to_string();
    let expected = "eth0 counts as listed by `default`: a default route led through it before";
    assert!(warnings.contains(expected), "{warnings}");
}

#[test]
fn renamed_interface_stays_filtered_and_is_reported() {
    let mut net = start("renamed", "eth0");
    let _listener = net.listen(PORT);
    net.db.ip("link set eth0 down
         link set eth0 name lan0
         link set lan0 up
         route add default via 10.0.0.2 dev lan0");
    let attempts = [(ALLOWED4.into(), DB), (DENIED4.into(), DB)];
    assert_eq!(net.connect_all(&attempts), [Accepted, Silence]);
    let reload = net.agent(&["reload"]);
    let text = String::from_utf8(reload.stdout).unwrap();
    assert!(
        text.contains("eth0 is missing; lan0, which has its hardware address, counts as eth0"),
        "{text}"
    );
    assert_eq!(net.connect_all(&attempts), [Accepted, Silence]);
    net.kill();
    net.start();
    assert_eq!(net.connect_all(&attempts), [Accepted, Silence]);
    net.reload(&orders("lan0"));
    assert_filtered(&net);
}

#[test]
fn changes_of_an_interface_leave_the_filter_on_it() {
    let net = start("changes", "eth0");
    let _listener = net.listen(PORT);
    let hammer = Hammer::denied(&net.client, &[(DENIED4.into(), DB)]);
    for mtu in [1280, 9000, 3000, 1500] {
        net.db.ip(&format!("link set eth0 mtu {mtu}"));
        net.client.ip(&format!("link set eth0 mtu {mtu}"));
        assert_eq!(net.connect(ALLOWED4.into(), DB), Accepted);
    }
    net.db
        .ip("link set eth0 promisc on\nlink set eth0 multicast off");
    hammer.stop();
    assert_filtered(&net);
}

#[test]
fn driver_that_refuses_native_mode_is_filtered_in_generic_mode_which_says_why() {
    let mut net = Net::new("no-native");
    net.db.ip("link add br0 type bridge\nlink set br0 up");
    net.write_policy(&orders("eth0, br0"));
    net.start();
    assert!(said(
        &net,
        "attached to br0 in generic mode, since native mode was refused: "
    ));
    assert!(interfaces(&net).contains(&("br0".into(), "generic".into())));
    net.agent_text(&["detach", "--yes"]);
    net.wait_for_exit();
    net.write_policy(&orders("eth0, br0").replace("mode: auto", "mode: native"));
    let error = net.refusal(&[]);
    assert!(error.contains("attach to br0 in native mode"), "{error}");
}

#[test]
fn filter_that_is_taken_off_by_force_is_put_back_and_counted() {
    let mut net = start("forced-off", "eth0");
    let _listener = net.listen(PORT);
    assert_eq!(net.agent_json(&["status"])["repairs"], 0);
    let pins = fs::read_dir(net.bpffs().join(format!("filter-agent/v{LAYOUT}"))).unwrap();
    let mut pins = pins.map(|entry| entry.unwrap().path());
    let link = pins
        .find(|pin| pin.to_str().unwrap().contains("link_"))
        .unwrap();
    // Until it is put back anybody gets in.
    net.watch(&[]);
    succeed(
        Command::new("bpftool")
            .args(["link", "detach", "pinned"])
            .arg(link),
    );
    net.wait_for_line("attached to eth0 in native mode");
    net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
    assert_filtered(&net);
    assert_eq!(net.agent_json(&["status"])["repairs"], 1);
    let text = net.agent_text(&["status"]);
    assert!(text.contains("attached again 1 time"), "{text}");
}

/// Faults C15, C16 and D15.
#[test]
fn what_surrounds_a_guarded_port_is_warned_of() {
    let mut net = Net::new("around");
    let policy_path = net.policy_path();
    let check = ["check", policy_path.to_str().unwrap(), "--host"];
    let text = policy("eth0", "auto", &[dedicated("orders", 40000, &ALLOWED, "")]);
    net.write_policy(&text);
    net.watch(&[Protected::tcp(40000, &ALLOWED)]);
    net.db
        .sysctl(&[("ipv4/ip_forward", 0), ("ipv6/conf/all/forwarding", 0)]);
    let port = "database orders: this host may give port 40000 to a connection of its own";
    let checked = net.agent_text(&check);
    assert!(checked.contains(port), "{checked}");
    assert!(
        !checked.contains("forwards") && !checked.contains("NAT rule"),
        "{checked}"
    );

    net.db.sysctl(&[("ipv4/ip_forward", 1)]);
    let rules = "table ip nat {
        chain PREROUTING {
            type nat hook prerouting priority dstnat;
            tcp dport 15432 redirect to :40000
            tcp dport { 40000 } redirect to :40000
        }
    }";
    let mut nft = Command::new("nft");
    let added = net.db.run(|| nft.arg(rules).status().unwrap());
    assert!(added.success());
    let forwards =
        "this host forwards IPv4: packets to other machines are judged as if they were for orders";
    let nat = "a NAT rule of this host leads packets from port 15432 to 40000, which is port 40000 of database orders";
    let checked = net.agent_text(&check);
    for expected in [port, forwards, nat] {
        assert!(checked.contains(expected), "{expected}: {checked}");
    }
    assert!(!checked.contains("from port 40000"), "{checked}");
    net.start();
    for expected in [port, forwards] {
        assert!(said(&net, &format!("warning: {expected}")), "{:?}", net.log);
    }
    let status = net.agent_text(&["status"]);
    assert!(
        status.contains(port) && !status.contains("forwards"),
        "{status}"
    );

    // What is warned of can be put right.
    net.db.sysctl(&[("ipv4/ip_local_reserved_ports", 40000)]);
    let text = text.replace("port: 40000", "port: 40000, addresses: [10.0.0.1]");
    net.write_policy(&text);
    let checked = net.agent_text(&check);
    assert!(
        !checked.contains(port) && !checked.contains("forwards"),
        "{checked}"
    );
}

/// `iptables-save` of nftables does not list what the kernel keeps for the older tool, and of a range of ports only the
/// first was considered.
#[test]
fn nat_rules_of_iptables_legacy_and_to_a_range_of_ports_are_warned_of() {
    let net = Net::new("legacy-nat");
    net.write_policy(&policy(
        "eth0",
        "auto",
        &[dedicated("orders", 40000, &ALLOWED, "")],
    ));
    let rule =
        "-t nat -A PREROUTING -p tcp --dport 15432 -j DNAT --to-destination 10.0.0.1:39999-40001";
    for tool in ["iptables-legacy", "iptables-nft"] {
        let change = |rule: &str| {
            let mut command = Command::new(tool);
            command.args(rule.split(' '));
            assert!(
                net.db.run(|| command.status().unwrap()).success(),
                "{tool} {rule}"
            );
        };
        change(rule);
        let checked = net.agent_text(&["check", net.policy_path().to_str().unwrap(), "--host"]);
        let nat = "a NAT rule of this host leads packets from port 15432 to 40000, which is port 40000 of database orders";
        assert!(checked.contains(nat), "{tool}: {checked}");
        change(&rule.replace("-A", "-D"));
    }
}

#[test]
fn check_of_the_host_tells_what_attaching_would_meet_and_touches_nothing() {
    let mut net = Net::new("check-host");
    let policy_path = net.policy_path();
    let check = ["check", policy_path.to_str().unwrap(), "--host"];
    net.db.ip("link add br0 type bridge
         link set br0 mtu 9000
         link add eth5 type veth peer name far5
         link set eth5 mtu 9000");
    net.write_policy(&orders("eth0, br0, eth5"));
    let checked = net.agent_json(&check);
    let host = |name: &str| {
        let interfaces = checked["host"].as_array().unwrap();
        let found = interfaces.iter().find(|i| i["interface"] == name);
        found.unwrap().clone()
    };
    let eth5 = host("eth5");
    assert_eq!(
        [&eth5["driver"], &eth5["native"], &eth5["mtu"]],
        [&json!("veth"), &json!(true), &json!(9000)]
    );
    assert_eq!(eth5["notes"], json!([]));
    let expected = json!(["bridge has no native XDP: the filter will run in generic mode"]);
    assert_eq!(host("br0")["notes"], expected);
    let text = net.agent_text(&check);
    assert!(text.contains("br0: bridge has no native XDP"), "{text}");
    let links = net.db.output(Command::new("ip").args(["-details", "link"]));
    assert!(
        !String::from_utf8(links.stdout)
            .unwrap()
            .contains("prog/xdp")
    );
    assert!(!net.bpffs().join("filter-agent").exists());

    let tried = |net: &Net, policy: &str| {
        net.write_policy(policy);
        let output = net.agent(&check);
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stdout).unwrap()
    };
    let native = orders("br0").replace("mode: auto", "mode: native");
    let expected = "error: br0: bridge has no native XDP, and the policy says `mode: native`";
    let text = tried(&net, &native);
    assert!(text.contains(expected), "{text}");
    assert!(net.refusal(&[]).contains("attach to br0 in native mode"));
    net.db.ip("tuntap add tun0 mode tun");
    let text = tried(&net, &orders("tun0"));
    assert!(text.contains("error: tun0 is not an Ethernet"), "{text}");

    // An agent's own program is no obstacle, another's is.
    net.write_policy(&orders("eth0"));
    net.start();
    net.agent_text(&check);
    // Without permission to look at the pins, the agent's own program is not taken for another's. systemd mounts
    // the BPF file system so.
    fs::set_permissions(net.bpffs(), Permissions::from_mode(0o700)).unwrap();
    let mut unprivileged = Command::new("setpriv");
    unprivileged.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    unprivileged
        .arg(agent_binary())
        .args(check)
        .arg("--bpffs")
        .arg(net.bpffs());
    unprivileged.arg("--state-dir").arg(net.state_dir());
    let output = net.db.output(&mut unprivileged);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("run this as root"), "{text}");
    assert!(!text.contains("another XDP program"), "{text}");
    let stranger = Net::new("check-host-stranger");
    let mut command = Command::new(agent_binary());
    command.args(check).arg("--bpffs").arg(stranger.bpffs());
    let output = net.db.output(&mut command);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("error: another XDP program (id "), "{text}");
}
