//! The real agent between real clients and servers: who gets in, and who does not.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use filter_common::LAYOUT;
use filter_tests::databases::{Postgres, psql};
use filter_tests::net::{
    ALLOWED4, ALLOWED6, CLIENT4, Connection, DB4, DB6, DENIED4, DENIED6, Hammer, NEIGHBOURS, Net,
    OTHER_DB4, OTHER_DB6, PATIENCE, Patience, Protected, bound, connect, dedicated, policy,
    succeed, transfer, under_load, wait_until,
};
use jiff::{SignedDuration, Timestamp};
use nix::{errno::Errno, sys::signal::Signal};

const PORT: u16 = 5432;
const DB: SocketAddr = SocketAddr::new(IpAddr::V4(DB4), PORT);
const DB_V6: SocketAddr = SocketAddr::new(IpAddr::V6(DB6), PORT);
const ALLOWED: [&str; 2] = ["203.0.113.10/32", "2001:db8::10/128"];

/// A dedicated database `orders`, open to the allowed sources.
fn orders(mode: &str) -> String {
    policy("eth0", mode, &[dedicated("orders", PORT, &ALLOWED, "")])
}

fn v4(address: Ipv4Addr, port: u16) -> SocketAddr {
    SocketAddr::new(address.into(), port)
}

#[test]
fn tripwire_counts_what_is_not_filtered() {
    let net = Net::new("tripwire");
    let _listener = net.listen(PORT);
    net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
    assert_eq!(net.connect(ALLOWED4.into(), DB), Connection::Accepted);
    assert_eq!(net.connect(ALLOWED6.into(), DB_V6), Connection::Accepted);
    assert_eq!(net.tripwire(), 0);
    assert_eq!(net.connect(DENIED4.into(), DB), Connection::Accepted);
    assert!(net.tripwire() > 0);
    net.reset_tripwire();
    assert_eq!(net.connect(DENIED6.into(), DB_V6), Connection::Accepted);
    assert!(net.tripwire() > 0);
    net.reset_tripwire();
}

#[test]
fn tripwire_fails_the_test_that_sets_it_off() {
    let outcome = std::panic::catch_unwind(|| {
        let net = Net::new("tripwire-fails");
        let _listener = net.listen(PORT);
        net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
        net.connect(DENIED4.into(), DB);
    });
    let message = outcome.unwrap_err().downcast::<String>().unwrap();
    assert!(message.contains("tripwire: packets"), "{message}");
}

fn allowed_sources_connect_and_others_get_no_answer(name: &str, mode: &str, mtu: u32) {
    let mut net = Net::new(name);
    net.db.ip(&format!("link set eth0 mtu {mtu}"));
    net.client.ip(&format!("link set eth0 mtu {mtu}"));
    let _echo = net.echo(PORT);
    let _other = net.listen(5433);
    net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
    net.write_policy(&orders(mode));
    net.start();
    // In frames as large as the link's offloads make them.
    net.transfer(ALLOWED4.into(), DB);
    net.transfer(ALLOWED6.into(), DB_V6);
    assert_eq!(net.agent_json(&["status"])["interfaces"][0]["mode"], mode);

    let mut expected = vec![
        (ALLOWED4.into(), DB, Connection::Accepted),
        (ALLOWED6.into(), DB_V6, Connection::Accepted),
        (DENIED4.into(), DB, Connection::Silence),
        (DENIED6.into(), DB_V6, Connection::Silence),
    ];
    for source in NEIGHBOURS {
        let destination = if source.is_ipv4() { DB } else { DB_V6 };
        expected.push((source, destination, Connection::Silence));
    }
    for (port, other) in [(5433, Connection::Accepted), (5434, Connection::Refused)] {
        expected.push((DENIED4.into(), v4(DB4, port), other));
        expected.push((DENIED6.into(), SocketAddr::new(DB6.into(), port), other));
    }
    let attempts: Vec<_> = expected.iter().map(|&(from, to, _)| (from, to)).collect();
    for (outcome, (from, to, expected)) in net.connect_all(&attempts).iter().zip(expected) {
        assert_eq!(*outcome, expected, "from {from} to {to}");
    }
    for rule in net.agent_json(&["rules"]).as_array().unwrap() {
        assert!(rule["hits"].as_u64().unwrap() >= 2, "{rule:#}");
    }
    let status = net.agent_json(&["status", "--verify"]);
    assert_eq!(status["errors"].as_array().unwrap().len(), 0, "{status:#}");
    let orders = &status["databases"][0];
    assert!(orders["passed"].as_u64().unwrap() >= 2, "{orders:#}");
    assert!(
        orders["dropped"]["not-allowed"].as_u64().unwrap() >= 6,
        "{orders:#}"
    );
}

#[test]
fn allowed_sources_connect_in_native_mode() {
    allowed_sources_connect_and_others_get_no_answer("native", "native", 1500);
}

#[test]
fn allowed_sources_connect_in_generic_mode() {
    allowed_sources_connect_and_others_get_no_answer("generic", "generic", 1500);
}

#[test]
fn allowed_sources_connect_with_jumbo_frames_in_native_mode() {
    allowed_sources_connect_and_others_get_no_answer("jumbo", "native", 9000);
}

/// Segments that were never cut, in a packet too long for IP's length field (BIG TCP).
#[test]
fn packets_beyond_64_kib_pass_in_generic_mode() {
    let mut net = Net::new("big-tcp");
    for namespace in [&net.db, &net.client] {
        namespace.ip("link set eth0 mtu 9000 gso_max_size 150000 gro_max_size 150000");
    }
    let _echo = net.echo(PORT);
    net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
    net.write_policy(&orders("generic"));
    net.start();
    // One packet may then fill the whole window.
    net.client.sysctl(&[("ipv4/tcp_tso_win_divisor", 1)]);
    let passed = net.passed();
    // How far the window opens is the kernel's to say.
    let came = (0..20).any(|_| {
        net.transfer(ALLOWED6.into(), DB_V6);
        std::iter::from_fn(|| passed.receive()).any(|frame| frame.len() == 1 << 16)
    });
    assert!(came, "no such packet came");
    let dropped = &net.agent_json(&["status"])["databases"][0]["dropped"];
    assert_eq!(*dropped, serde_json::json!({}));
}

#[test]
fn udp_service_answers_allowed_sources_only() {
    let mut net = Net::new("udp");
    let _echo = net.echo_datagrams(5300);
    let _other = net.echo_datagrams(5301);
    let _tcp = net.listen(5300);
    net.watch(&[Protected::udp(5300, &ALLOWED)]);
    let names = dedicated("names", 5300, &ALLOWED, "protocol: udp");
    net.write_policy(&policy("eth0", "native", &[names]));
    net.start();
    let service6 = SocketAddr::new(DB6.into(), 5300);
    assert!(net.exchange(ALLOWED4.into(), v4(DB4, 5300), Patience::Long));
    assert!(net.exchange(ALLOWED6.into(), service6, Patience::Long));
    assert!(!net.exchange(DENIED4.into(), v4(DB4, 5300), Patience::Short));
    assert!(!net.exchange(DENIED6.into(), service6, Patience::Short));
    assert!(net.exchange(DENIED4.into(), v4(DB4, 5301), Patience::Long));
    assert_eq!(
        net.connect(DENIED4.into(), v4(DB4, 5300)),
        Connection::Accepted
    );
}

#[test]
fn datagrams_in_fragments_reach_other_services() {
    let mut net = Net::new("fragments");
    let socket = net.receive(5301);
    net.watch(&[Protected::udp(5300, &ALLOWED)]);
    let names = dedicated("names", 5300, &ALLOWED, "protocol: udp");
    net.write_policy(&policy("eth0", "native", &[names]));
    net.start();
    for (source, destination) in [
        (IpAddr::from(DENIED4), v4(DB4, 5301)),
        (DENIED6.into(), SocketAddr::new(DB6.into(), 5301)),
    ] {
        socket
            .set_read_timeout(Some(Duration::from_secs(1)))
            .unwrap();
        let sender = net
            .client
            .run(|| std::net::UdpSocket::bind((source, 0)).unwrap());
        let mut datagram = [0; 8000];
        // One may get lost.
        let arrived = wait_until(|| {
            sender.send_to(&[7; 6000], destination).unwrap();
            let Ok((length, from)) = socket.recv_from(&mut datagram) else {
                return false;
            };
            length == 6000 && from.ip().to_canonical() == source
        });
        assert!(arrived, "from {source}");
    }
}

#[test]
fn shared_database_is_open_to_the_regional_network() {
    let mut net = Net::new("shared");
    let inside: [IpAddr; 2] = ["10.1.2.3".parse().unwrap(), "fd01::3".parse().unwrap()];
    let outside: [IpAddr; 2] = ["10.2.0.0".parse().unwrap(), "fd02::".parse().unwrap()];
    for source in inside.into_iter().chain(outside) {
        net.add_source(source);
    }
    let _listener = net.listen(PORT);
    net.watch(&[Protected::tcp(PORT, &["10.1.0.0/16", "fd01::/16"])]);
    let shop = format!("{{name: shop, port: {PORT}, engine: mysql, model: shared}}");
    net.write_policy(&policy("eth0", "native", &[shop]));
    net.start();
    let attempts = [
        (inside[0], DB),
        (inside[1], DB_V6),
        (outside[0], DB),
        (outside[1], DB_V6),
    ];
    use Connection::{Accepted, Silence};
    assert_eq!(
        net.connect_all(&attempts),
        [Accepted, Accepted, Silence, Silence]
    );
}

#[test]
fn cluster_members_connect_to_a_closed_database() {
    let mut net = Net::new("cluster");
    let _listener = net.listen(PORT);
    net.watch(&[Protected::tcp(PORT, &["203.0.113.10/32"])]);
    let orders = dedicated("orders", PORT, &[], "cluster: [203.0.113.10/32]");
    net.write_policy(&policy("eth0", "native", &[orders]));
    net.start();
    let attempts = [
        (ALLOWED4.into(), DB),
        (DENIED4.into(), DB),
        (ALLOWED6.into(), DB_V6),
    ];
    use Connection::{Accepted, Silence};
    assert_eq!(net.connect_all(&attempts), [Accepted, Silence, Silence]);
}

#[test]
fn databases_share_a_port_on_different_addresses() {
    let mut net = Net::new("addresses");
    let third: Ipv4Addr = "10.0.0.4".parse().unwrap();
    net.db.ip(&format!("address add {third}/24 dev eth0"));
    let _listener = net.listen(PORT);
    net.watch(&[
        Protected::tcp(PORT, &["203.0.113.10/32", "2001:db8::10/128"])
            .at(&[DB4.into(), DB6.into()]),
        Protected::tcp(PORT, &["198.51.100.7/32", "2001:db8:dead::7/128"])
            .at(&[OTHER_DB4.into(), OTHER_DB6.into()]),
    ]);
    net.write_policy(&policy(
        "eth0",
        "native",
        &[
            dedicated(
                "orders",
                PORT,
                &ALLOWED,
                &format!("addresses: [{DB4}, '{DB6}']"),
            ),
            dedicated(
                "shop",
                PORT,
                &["198.51.100.7/32", "2001:db8:dead::7/128"],
                &format!("addresses: [{OTHER_DB4}, '{OTHER_DB6}']"),
            ),
        ],
    ));
    net.start();
    let other6 = SocketAddr::new(OTHER_DB6.into(), PORT);
    use Connection::{Accepted, Silence};
    let expected = [
        (ALLOWED4.into(), DB, Accepted),
        (DENIED4.into(), DB, Silence),
        (ALLOWED6.into(), DB_V6, Accepted),
        (DENIED6.into(), DB_V6, Silence),
        (ALLOWED4.into(), v4(OTHER_DB4, PORT), Silence),
        (DENIED4.into(), v4(OTHER_DB4, PORT), Accepted),
        (ALLOWED6.into(), other6, Silence),
        (DENIED6.into(), other6, Accepted),
        // An address of no database.
        (DENIED4.into(), v4(third, PORT), Accepted),
    ];
    let attempts: Vec<_> = expected.iter().map(|&(from, to, _)| (from, to)).collect();
    for (outcome, (from, to, expected)) in net.connect_all(&attempts).iter().zip(expected) {
        assert_eq!(*outcome, expected, "from {from} to {to}");
    }
}

#[test]
fn monitor_counts_and_lets_pass() {
    let mut net = Net::new("monitor");
    let _listener = net.listen(PORT);
    let orders = dedicated("orders", PORT, &ALLOWED, "monitor: true");
    net.write_policy(&policy("eth0", "native", &[orders]));
    net.start();
    assert_eq!(net.connect(DENIED4.into(), DB), Connection::Accepted);
    assert_eq!(net.connect(ALLOWED4.into(), DB), Connection::Accepted);
    let status = net.agent_json(&["status"]);
    let orders = &status["databases"][0];
    assert!(
        orders["would_drop"]["not-allowed"].as_u64().unwrap() >= 1,
        "{orders:#}"
    );
    assert_eq!(orders["dropped"], serde_json::json!({}));
}

/// A policy with a rule that ends then.
fn expiring(end: Timestamp) -> String {
    let rule = format!("{{cidr: 203.0.113.10/32, expires: '{end:.0}'}}");
    policy(
        "eth0",
        "native",
        &[format!(
            "{{name: orders, port: {PORT}, engine: postgresql, model: dedicated, force_tls: false, \
         rules: [{rule}, {{cidr: '2001:db8::10/128'}}]}}"
        )],
    )
}

fn in_seconds(seconds: i64) -> Timestamp {
    Timestamp::now() + SignedDuration::from_secs(seconds)
}

#[test]
fn rule_ends_when_it_expires() {
    let mut net = Net::new("expires");
    let _listener = net.listen(PORT);
    net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
    net.write_policy(&orders("native"));
    net.start();
    // Until the end is late enough for this machine to connect before it.
    for seconds in [3, 10, 60, 120] {
        let end = in_seconds(seconds);
        net.reload(&expiring(end));
        let connection = net.connect(ALLOWED4.into(), DB);
        if Timestamp::now() < end {
            assert_eq!(connection, Connection::Accepted);
            break;
        }
    }
    net.wait_for_line("rules that expired");
    net.watch(&[Protected::tcp(PORT, &["2001:db8::10/128"])]);
    assert_eq!(net.connect(ALLOWED4.into(), DB), Connection::Silence);
    assert_eq!(net.connect(ALLOWED6.into(), DB_V6), Connection::Accepted);
}

#[test]
fn rule_that_expired_while_the_agent_was_down_ends_at_start() {
    let mut net = Net::new("expired");
    let _listener = net.listen(PORT);
    net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
    net.write_policy(&orders("native"));
    net.start();
    // Until the end is late enough for this machine to kill the agent before it.
    for seconds in [2, 10, 60, 120] {
        let end = in_seconds(seconds);
        net.reload(&expiring(end));
        net.kill();
        if Timestamp::now() < end {
            let left = end.duration_since(Timestamp::now()) + SignedDuration::from_secs(1);
            thread::sleep(left.try_into().unwrap_or_default());
            break;
        }
        net.start();
    }
    net.start();
    net.watch(&[Protected::tcp(PORT, &["2001:db8::10/128"])]);
    assert_eq!(net.connect(ALLOWED4.into(), DB), Connection::Silence);
    assert_eq!(net.connect(ALLOWED6.into(), DB_V6), Connection::Accepted);
}

#[test]
fn region_file_allows_what_it_lists() {
    let mut net = Net::new("region");
    let _listener = net.listen(PORT);
    let file = net.dir().join("office.txt");
    fs::write(&file, "# the office\n203.0.113.0/28\n2001:db8::10/128\n").unwrap();
    let database = format!(
        "{{name: orders, port: {PORT}, engine: postgresql, model: dedicated, force_tls: false, \
         rules: [{{region: office}}]}}"
    );
    let text = policy("eth0", "native", &[database]);
    let text = format!("regions: {{office: {{file: {}}}}}\n{text}", file.display());
    net.watch(&[Protected::tcp(
        PORT,
        &["203.0.113.0/28", "2001:db8::10/128"],
    )]);
    net.write_policy(&text);
    net.start();
    use Connection::{Accepted, Silence};
    let attempts = [
        (ALLOWED4.into(), DB),
        (ALLOWED6.into(), DB_V6),
        (DENIED4.into(), DB),
    ];
    assert_eq!(net.connect_all(&attempts), [Accepted, Accepted, Silence]);

    net.watch(&[Protected::tcp(
        PORT,
        &["203.0.113.0/28", "2001:db8::10/128", "198.51.100.7/32"],
    )]);
    fs::write(&file, "198.51.100.7/32\n").unwrap();
    net.reload(&text);
    net.watch(&[Protected::tcp(PORT, &["198.51.100.7/32"])]);
    assert_eq!(net.connect_all(&attempts), [Silence, Silence, Accepted]);

    fs::write(&file, "<html>\n").unwrap();
    let error = net.agent_error(&["reload"]);
    assert!(
        error.contains("office") && error.contains("line 1"),
        "{error}"
    );
    assert_eq!(net.connect_all(&attempts), [Silence, Silence, Accepted]);
}

#[test]
fn second_agent_is_refused() {
    let mut net = Net::new("second");
    net.write_policy(&orders("native"));
    net.start();
    let line = net.refusal(&[]);
    assert!(line.contains("another"), "{line}");
    assert_eq!(net.agent_json(&["status"])["errors"], serde_json::json!([]));
}

#[test]
fn other_xdp_program_is_named_and_left_alone() {
    let mut net = Net::new("foreign");
    let _listener = net.listen(PORT);
    net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
    net.write_policy(&orders("native"));
    net.start();
    let status = net.agent_json(&["status"]);
    let program = status["interfaces"][0]["program_id"].as_u64().unwrap();
    // The filter of another BPF file system is nobody this agent knows.
    let stranger = Net::new("foreign-stranger");
    let bpffs = stranger.bpffs();
    let socket = stranger.socket();
    let line = net.refusal_elsewhere(&bpffs, &socket);
    assert!(
        line.contains("another XDP program") && line.contains("eth0"),
        "{line}"
    );
    assert!(line.contains(&program.to_string()), "{line}");
    let status = net.agent_json(&["status", "--verify"]);
    assert_eq!(status["errors"], serde_json::json!([]));
    assert_eq!(net.connect(DENIED4.into(), DB), Connection::Silence);
}

#[test]
fn interface_without_ethernet_is_refused() {
    let net = Net::new("tun");
    net.db.ip("tuntap add tun0 mode tun\nlink set tun0 up");
    net.write_policy(&policy(
        "eth0, tun0",
        "auto",
        &[dedicated("orders", PORT, &ALLOWED, "")],
    ));
    let line = net.refusal(&[]);
    assert!(line.contains("tun0") && line.contains("Ethernet"), "{line}");
    net.assert_detached("eth0");
}

#[test]
fn kernel_that_cannot_serve_is_refused_with_what_is_missing() {
    let net = Net::new("no-bpf");
    net.write_policy(&orders("auto"));
    let without = net.refusal_without_bpf(Errno::ENOSYS);
    assert!(without.contains("CONFIG_BPF_SYSCALL"), "{without}");
    let forbidden = net.refusal_without_bpf(Errno::EPERM);
    assert!(forbidden.contains("CAP_BPF"), "{forbidden}");
    let missing = net.dir().join("no-bpffs");
    let line = net.refusal_elsewhere(&missing, &net.socket());
    assert!(
        line.contains("no-bpffs") && line.contains("mount"),
        "{line}"
    );
    fs::create_dir(&missing).unwrap();
    let line = net.refusal_elsewhere(&missing, &net.socket());
    assert!(line.contains("mount -t bpf bpf"), "{line}");
    net.assert_detached("eth0");
}

#[test]
fn run_without_root_is_refused() {
    let net = Net::new("rootless");
    net.write_policy(&orders("native"));
    let line = net.refusal_without_root();
    assert!(line.contains("root"), "{line}");
    net.assert_detached("eth0");
}

#[test]
fn path_mtu_and_neighbours_are_found_through_the_filter() {
    let mut net = Net::new("mtu");
    let _echo = net.echo(PORT);
    let far = net.add_host_behind_client(
        "192.0.2.10".parse().unwrap(),
        "2001:db8:f::10".parse().unwrap(),
        1300,
    );
    net.watch(&[Protected::tcp(
        PORT,
        &["192.0.2.10/32", "2001:db8:f::10/128"],
    )]);
    let rules = ["192.0.2.10/32", "2001:db8:f::10/128"];
    net.write_policy(&policy(
        "eth0",
        "native",
        &[dedicated("orders", PORT, &rules, "")],
    ));
    net.start();
    // Neighbours are asked for by packets that no rule names.
    for namespace in [&net.db, &net.client] {
        namespace.ip("neighbour flush dev eth0");
    }
    // The echo leaves in packets that are too big for the link to the far host, which only the
    // router's ICMP error says.
    transfer(&far, "192.0.2.10".parse().unwrap(), DB);
    transfer(&far, "2001:db8:f::10".parse().unwrap(), DB_V6);
    for destination in ["192.0.2.10", "2001:db8:f::10"] {
        let mut command = Command::new("ip");
        command.args(["route", "get", destination]);
        let route = net.db.output(&mut command);
        let route = String::from_utf8(route.stdout).unwrap();
        assert!(route.contains("mtu 1300"), "{route}");
    }
}

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
fn directory_that_is_no_bpffs_is_refused() {
    let net = Net::new("no-bpffs");
    net.write_policy(&orders("native"));
    let line = net.refusal_elsewhere(net.dir(), &net.socket());
    assert!(
        line.contains("bpf") && line.contains(net.dir().to_str().unwrap()),
        "{line}"
    );
    net.assert_detached("eth0");
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
fn output_that_nobody_reads_on_ends_the_command_quietly() {
    let mut net = Net::new("closed-pipe");
    net.write_policy(&orders("auto"));
    net.start();
    let policy = net.policy_path();
    let policy = policy.to_str().unwrap();
    for arguments in [
        &["check", policy, "--json"][..],
        &["check", policy],
        &["detach", "--yes"],
    ] {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let mut command = net.agent_command(arguments);
        command.stdout(writer).stderr(Stdio::piped());
        let output = command.spawn().unwrap().wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(128 + Signal::SIGPIPE as i32));
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    }
    assert!(net.wait_for_exit().success());
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

#[test]
fn reloads_under_traffic_neither_refuse_an_allowed_source_nor_accept_a_denied_one() {
    let mut net = Net::new("reloads");
    let _echo = net.echo(PORT);
    net.add_client();
    net.watch(&[Protected::tcp(
        PORT,
        &["203.0.113.0/24", "2001:db8::/64", "10.3.0.0/16"],
    )]);
    let more: Vec<String> = (0..20).map(|n| format!("10.3.{n}.0/24")).collect();
    let more: Vec<&str> = more.iter().map(String::as_str).chain(ALLOWED).collect();
    let wide = ["203.0.113.0/24", "2001:db8::/64"];
    let here = format!("addresses: [{DB4}, '{DB6}', 10.0.1.1]");
    let policies = [
        vec![dedicated("orders", PORT, &ALLOWED, "")],
        vec![dedicated("orders", PORT, &more, "")],
        vec![dedicated("orders", PORT, &wide, "cluster: [10.3.0.0/16]")],
        vec![
            dedicated("renamed", PORT, &ALLOWED, ""),
            dedicated("orders", 5433, &wide, ""),
        ],
        vec![dedicated("orders", PORT, &ALLOWED, &here)],
        vec![
            dedicated("renamed", PORT, &wide, &here),
            dedicated("shop", 5434, &[], ""),
        ],
    ]
    .map(|databases| policy("eth0, eth1", "native", &databases));
    net.write_policy(&policies[0]);
    net.start();
    let stranger = "10.0.1.2".parse().unwrap();
    let denied = [
        (stranger, DB),
        (stranger, v4("10.0.1.1".parse().unwrap(), PORT)),
    ];
    let denied = Hammer::denied(&net.more_clients[0], &denied);
    let allowed = [(ALLOWED4.into(), DB), (ALLOWED6.into(), DB_V6)];
    net.count_syns(PORT);
    let allowed = Hammer::allowed(&net.client, &allowed);
    under_load(204, &[(&allowed, 200), (&denied, 200)], |round| {
        net.reload_unprotected(&policies[(round + 1) % policies.len()]);
    });
    allowed.stop();
    denied.stop();
    net.assert_all_syns_passed();
}

#[test]
fn removed_rule_silences_open_sessions_and_no_others() {
    let mut net = Net::new("sessions");
    let _echo = net.echo(PORT);
    net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
    net.write_policy(&orders("native"));
    net.start();
    let open = |source: IpAddr, destination| {
        let socket = net.client.run(|| bound(source));
        socket.connect_timeout(&destination, PATIENCE).unwrap();
        TcpStream::from(socket)
    };
    let mut removed = open(ALLOWED4.into(), DB.into());
    let mut kept = open(ALLOWED6.into(), DB_V6.into());
    let ping = |stream: &mut TcpStream, patience: Duration| {
        stream.set_read_timeout(Some(patience)).unwrap();
        stream.write_all(b"ping").unwrap();
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).is_ok()
    };
    assert!(ping(&mut removed, PATIENCE) && ping(&mut kept, PATIENCE));
    net.reload(&policy(
        "eth0",
        "native",
        &[dedicated("orders", PORT, &ALLOWED[1..], "")],
    ));
    net.watch(&[Protected::tcp(PORT, &ALLOWED[1..])]);
    assert!(!ping(&mut removed, Duration::from_secs(1)));
    assert!(ping(&mut kept, PATIENCE));
}

#[test]
fn psql_reaches_postgresql_from_allowed_sources_only() {
    let mut net = Net::new("postgresql");
    let _server = Postgres::start(&net);
    let psql = |net: &Net, source: IpAddr, query: &str| psql(net, source, "sslmode=disable", query);
    let refused = |net: &Net, source: IpAddr| {
        let options = "sslmode=disable connect_timeout=2";
        filter_tests::databases::psql(net, source, options, "select 1").unwrap_err()
    };
    net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
    net.write_policy(&orders("native"));
    net.start();
    let address = "select host(inet_client_addr())";
    for source in [IpAddr::from(ALLOWED4), ALLOWED6.into()] {
        assert_eq!(psql(&net, source, address).unwrap(), source.to_string());
        let result = psql(&net, source, "select repeat('x', 3000000)").unwrap();
        assert_eq!(result.len(), 3_000_000);
    }
    for source in [IpAddr::from(DENIED4), DENIED6.into(), NEIGHBOURS[0]] {
        let error = refused(&net, source);
        assert!(error.contains("timeout expired"), "{source}: {error}");
    }
    net.watch(&[Protected::tcp(
        PORT,
        &["203.0.113.10/32", "2001:db8::10/128", "198.51.100.7/32"],
    )]);
    net.reload(&policy(
        "eth0",
        "native",
        &[dedicated(
            "orders",
            PORT,
            &["198.51.100.7/32", "2001:db8::10/128"],
            "",
        )],
    ));
    net.watch(&[Protected::tcp(
        PORT,
        &["2001:db8::10/128", "198.51.100.7/32"],
    )]);
    assert_eq!(
        psql(&net, DENIED4.into(), address).unwrap(),
        DENIED4.to_string()
    );
    refused(&net, ALLOWED4.into());
    assert_eq!(
        psql(&net, ALLOWED6.into(), address).unwrap(),
        ALLOWED6.to_string()
    );
}
