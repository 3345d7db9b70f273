//! Interfaces that come, go, are not covered, or run another program.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    process::Command,
};

use filter_common::LAYOUT;
use filter_tests::net::{
    ALLOWED4, CLIENT4, Connection, DB4, DENIED4, Hammer, Net, Protected, connect, dedicated,
    policy, succeed,
};
use nix::sys::signal::Signal;

use crate::orders::{ALLOWED, DB, PORT, orders, v4};

#[test]
fn hangup_applies_the_file_and_interfaces_come_and_go_with_it() {
    let mut net = Net::new("hangup");
    net.add_client();
    let second: IpAddr = "10.0.1.2".parse().unwrap();
    let db: SocketAddr = "10.0.1.1:5432".parse().unwrap();
    let _listener = net.listen(PORT);
    net.write_policy(&orders("native"));
    net.start();
    let connect = |net: &Net| net.more_clients[0].run(|| connect(second, db));
    assert_eq!(connect(&net), Connection::Accepted);
    let both = policy(
        "eth0, eth1",
        "native",
        &[dedicated("orders", PORT, &ALLOWED, "")],
    );
    net.write_policy(&both);
    net.hang_up();
    net.wait_for_line("enforcing ");
    net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
    assert_eq!(connect(&net), Connection::Silence);
    assert_eq!(
        net.agent_json(&["status", "--verify"])["errors"],
        serde_json::json!([])
    );
    net.watch(&[]);
    net.reload_unprotected(&orders("native"));
    assert_eq!(connect(&net), Connection::Accepted);
    assert_eq!(net.connect(DENIED4.into(), DB), Connection::Silence);
}

#[test]
fn interface_that_goes_down_and_up_stays_filtered() {
    let mut net = Net::new("flap");
    let _listener = net.listen(PORT);
    net.watch(&[Protected::tcp(PORT, &["2001:db8::10/128", "10.0.0.2/32"])]);
    let orders = dedicated("orders", PORT, &["10.0.0.2/32"], "");
    net.write_policy(&policy("eth0", "native", &[orders]));
    net.start();
    let stranger: IpAddr = "10.0.0.9".parse().unwrap();
    net.client
        .ip(&format!("address add {stranger}/24 dev eth0"));
    let hammer = Hammer::denied(&net.client, &[(stranger, DB)]);
    for _ in 0..5 {
        net.db.ip("link set eth0 down");
        net.db.ip("link set eth0 up");
    }
    hammer.stop();
    assert_eq!(net.connect(CLIENT4.into(), DB), Connection::Accepted);
    assert_eq!(
        net.agent_json(&["status", "--verify"])["errors"],
        serde_json::json!([])
    );
}

#[test]
fn uncovered_interface_is_named() {
    let mut net = Net::new("uncovered");
    net.add_client();
    net.write_policy(&orders("native"));
    net.start();
    let path = net.policy_path();
    for command in [&["status"][..], &["check", path.to_str().unwrap()]] {
        let warnings = net.agent_json(command)["warnings"].to_string();
        assert!(
            warnings.contains("eth1") && warnings.contains("10.0.1.1"),
            "{warnings}"
        );
        assert!(!warnings.contains("interface eth0"), "{warnings}");
    }
}

#[test]
fn uncovered_interface_without_an_address_is_named_and_one_of_a_bridge_is_not() {
    let mut net = Net::new("uncovered-bare");
    net.db.ip("link add bare type veth peer name other
               link set bare up
               link add br0 type bridge
               link add port type veth peer name far
               link set port master br0
               link set port up");
    net.write_policy(&orders("native"));
    net.start();
    let warnings = net.agent_json(&["status"])["warnings"].to_string();
    assert!(warnings.contains("interface bare is not in"), "{warnings}");
    assert!(!warnings.contains("interface port"), "{warnings}");
    assert!(!warnings.contains("interface other"), "{warnings}");
}

/// What a tunnel delivers arrives on the tunnel's own interface, after the filter of the one below.
#[test]
fn tunnel_is_named_as_uncovered_and_filtered_where_it_is_listed() {
    let mut net = Net::new("tunnel");
    for (namespace, local, remote, inside) in [
        (&net.db, DB4, CLIENT4, "10.9.0.1"),
        (&net.client, CLIENT4, DB4, "10.9.0.2"),
    ] {
        namespace.ip(&format!(
            "link add vx0 type vxlan id 1 dstport 4789 dev eth0 local {local} remote {remote}
             link set vx0 up
             address add {inside}/24 dev vx0"
        ));
    }
    let _listener = net.listen(PORT);
    net.write_policy(&orders("auto"));
    net.start();
    let stranger: IpAddr = "10.9.0.2".parse().unwrap();
    let inside = v4("10.9.0.1".parse().unwrap(), PORT);
    assert_eq!(net.connect(stranger, inside), Connection::Accepted);
    let warnings = net.agent_json(&["status"])["warnings"].to_string();
    assert!(
        warnings.contains("vx0") && warnings.contains("10.9.0.1"),
        "{warnings}"
    );

    let orders = dedicated("orders", PORT, &ALLOWED, "");
    net.reload(&policy("eth0, vx0", "auto", &[orders]));
    net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
    let attempts = [(stranger, inside), (ALLOWED4.into(), inside)];
    use Connection::{Accepted, Silence};
    assert_eq!(net.connect_all(&attempts), [Silence, Accepted]);
    let status = net.agent_json(&["status", "--verify"]);
    assert_eq!(status["errors"], serde_json::json!([]));
    assert_eq!(status["interfaces"][0]["mode"], "native");
    assert_eq!(status["interfaces"][1]["mode"], "generic");
}

#[test]
fn program_that_takes_the_filters_place_is_an_error_until_it_is_gone() {
    let mut net = Net::new("replaced");
    let _listener = net.listen(PORT);
    net.write_policy(&orders("native"));
    net.start();
    let mut stranger = Net::new("replacement");
    stranger.write_policy(&orders("native"));
    stranger.start();
    let program = stranger.agent_json(&["status"])["interfaces"][0]["program_id"].to_string();

    // An agent that runs would be quicker.
    net.signal(Signal::SIGSTOP);
    let pins = fs::read_dir(net.bpffs().join(format!("filter-agent/v{LAYOUT}"))).unwrap();
    let mut pins = pins.map(|entry| entry.unwrap().path());
    let link = pins.find(|pin| pin.to_str().unwrap().contains("link_"));
    fs::remove_file(link.unwrap()).unwrap();
    assert_eq!(net.connect(DENIED4.into(), DB), Connection::Accepted);
    let bpftool = |words: &str| {
        net.db.run(|| {
            let mut command = Command::new("bpftool");
            succeed(command.arg("net").args(words.split(' ')));
        });
    };
    bpftool(&format!("attach xdpdrv id {program} dev eth0"));
    net.signal(Signal::SIGCONT);

    let output = net.agent(&["status", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let errors = status["errors"].to_string();
    assert!(
        errors.contains(&format!("eth0 runs XDP program {program}, not this")),
        "{errors}"
    );
    bpftool("detach xdpdrv dev eth0");
    net.agent_text(&["reload"]);
    net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
    assert_eq!(
        net.agent_json(&["status", "--verify"])["errors"],
        serde_json::json!([])
    );
    assert_eq!(net.connect(DENIED4.into(), DB), Connection::Silence);
}
