//! Which sources reach a database, by connections and datagrams.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    process::Command,
    time::Duration,
};

use filter_tests::{
    databases::{Postgres, psql},
    net::{
        ALLOWED4, ALLOWED6, Connection, DB4, DB6, DENIED4, DENIED6, NEIGHBOURS, Net, OTHER_DB4,
        OTHER_DB6, Patience, Protected, dedicated, policy, transfer, wait_until,
    },
};

use crate::orders::{ALLOWED, DB, DB_V6, PORT, orders, v4};

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
    for rule in net.agent_json(&["rules"])["rules"].as_array().unwrap() {
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

/// Fault D9: it said "is dropped" of the host's own addresses, whose connections work.
#[test]
fn explain_says_of_local_sources_that_their_way_is_not_filtered() {
    let net = Net::enforcing("explain-local", &[], &orders("native"));
    net.db.ip("link add docker0 type bridge
         link set docker0 up
         address add 172.17.0.1/16 dev docker0");
    let unfiltered = |source: &str| {
        let explained = net.agent_json(&["explain", source]);
        let text = net.agent_text(&["explain", source]);
        let interface = explained["verdicts"][0]["unfiltered"]
            .as_str()
            .map(str::to_owned);
        let says = text.contains("which is not filtered");
        assert_eq!(says, interface.is_some(), "{text}");
        interface
    };
    for own in ["127.0.0.1", "::1", &DB4.to_string(), "172.17.0.1"] {
        assert_eq!(unfiltered(own).as_deref(), Some("lo"), "{own}");
    }
    assert_eq!(unfiltered("172.17.0.9").as_deref(), Some("docker0"));
    for outside in [
        ALLOWED4.to_string(),
        DENIED4.to_string(),
        "198.51.100.200".into(),
    ] {
        assert_eq!(unfiltered(&outside), None, "{outside}");
    }
}
