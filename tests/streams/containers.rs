//! A database in a container: a network namespace of its own, which packets reach by DNAT.

use std::{
    io::Write as _,
    net::{IpAddr, SocketAddr, TcpStream},
    process::Command,
};

use filter_tests::net::{DB4, Namespace, OTHER_DB4, PATIENCE, RawClient, bound, succeed};

use crate::{
    laboratory::{Laboratory, RAW4},
    server::{Engine, SSL_REQUEST, Server, hello},
};

const BOX4: &str = "172.17.0.2";
const BOX6: &str = "fd17::2";
/// A port of the host that leads to a closed one of the container.
const CLOSED_PORT: u16 = 7;
/// Engines, and the container's ports to which theirs lead.
const ENGINES: [(Engine, u16); 3] = [
    (Engine::Redis, 6379),
    (Engine::Postgresql, 15432),
    (Engine::Mysql, 13306),
];

/// The container, beside another one.
struct Host {
    laboratory: Laboratory,
    container: Namespace,
    other: Namespace,
}

impl Host {
    fn new(name: &str, mode: &'static str) -> Self {
        let mut laboratory = Laboratory::without_agent(name, mode);
        let db = &laboratory.net.db;
        db.sysctl(&[("ipv4/ip_forward", 1), ("ipv6/conf/all/forwarding", 1)]);
        let add = |interface: &str, number: u8| {
            let container = Namespace::new(format!("{}-{interface}", db.name));
            db.ip(&format!(
                "link add {interface} type veth peer name eth0 netns {}
                 link set {interface} up
                 address add 172.{number}.0.1/24 dev {interface}
                 address add fd{number}::1/64 dev {interface} nodad",
                container.name
            ));
            container.ip(&format!(
                "link set eth0 up
                 address add 172.{number}.0.2/24 dev eth0
                 address add fd{number}::2/64 dev eth0 nodad
                 route add default via 172.{number}.0.1 dev eth0
                 route add default via fd{number}::1 dev eth0"
            ));
            container
        };
        let (container, other) = (add("box", 17), add("box2", 18));
        let mut ports: Vec<_> = ENGINES.map(|(engine, port)| (engine.port(), port)).into();
        ports.push((CLOSED_PORT, 1));
        let mut rules = String::new();
        for (from, to) in ports {
            rules += &format!(
                "iifname eth0 ip daddr 10.0.0.1 tcp dport {from} dnat ip to {BOX4}:{to}; \
                 iifname eth0 ip6 daddr fd00::1 tcp dport {from} dnat ip6 to [{BOX6}]:{to}; "
            );
        }
        translate(db, &rules);
        laboratory.net.start();
        Self {
            laboratory,
            container,
            other,
        }
    }

    /// Has one more port of the host lead to one of the container, without forced TLS. `more`: fields of its database.
    fn publish(&self, from: u16, to: u16, more: &str) {
        let net = &self.laboratory.net;
        let policy = self.laboratory.policy("")
            + &format!(
                "  - {{name: clear, port: {from}, model: dedicated, force_tls: false, {more}}}\n"
            );
        net.reload(&policy);
        for (family, container) in [
            ("ip daddr 10.0.0.1", format!("ip to {BOX4}")),
            ("ip6 daddr fd00::1", format!("ip6 to [{BOX6}]")),
        ] {
            let rule = format!(
                "add rule inet nat prerouting iifname eth0 {family} tcp dport {from} dnat {container}:{to}"
            );
            net.db.run(|| succeed(Command::new("nft").arg(rule)));
        }
    }

    fn serve(&self, engine: Engine, port: u16) -> Server {
        Server::start_at(&self.container, engine, port, None, |_| {})
    }
}

fn openings(engine: Engine) -> Vec<Vec<u8>> {
    let with_hello = |request: Vec<u8>| [request, hello(300, 31)].concat();
    engine.requests().into_iter().map(with_hello).collect()
}

/// Has these ports of the host lead to another one, or to a container's.
fn translate(namespace: &Namespace, rules: &str) {
    let chain = "type nat hook prerouting priority -100;";
    let table = format!("table inet nat {{ chain prerouting {{ {chain} {rules} }}; }}");
    namespace.run(|| succeed(Command::new("nft").arg(table)));
}

/// Clear text in some ways, of which nothing may be read.
fn attack(client: &RawClient, server: &mut Server) {
    let engine = server.engine;
    let clear = engine.clear();
    for with_ack in [true, false] {
        for before in [&b""[..], SSL_REQUEST, &openings(engine)[0][..5]] {
            for moved in [0, 100_000] {
                let mut connection = client.connection(engine.port());
                connection.ask();
                connection.isn = connection.isn.wrapping_add(moved);
                connection.server_isn = connection.server_isn.wrapping_add(moved);
                if with_ack {
                    connection.send(&connection.segment());
                }
                connection.write(0, &[before, &clear].concat());
                connection.write(before.len() as u32, &clear);
                connection.write(0, &clear);
                connection.write(
                    0_u32.wrapping_sub(before.len() as u32),
                    &[before, &clear].concat(),
                );
                client.fence_at(CLOSED_PORT);
                server.assert_tls_only();
                connection.reset(0);
                connection.reset(before.len() as u32);
            }
        }
    }
}

#[test]
fn container_reads_tls_and_nothing_else() {
    for mode in ["native", "generic"] {
        let host = Host::new("container", mode);
        for (engine, port) in ENGINES {
            let mut server = host.serve(engine, port);
            for cookies in [1, 2] {
                host.container.sysctl(&[("ipv4/tcp_syncookies", cookies)]);
                for client in host.laboratory.clients() {
                    // Attacked before anybody else came, too.
                    attack(&client, &mut server);
                    for stream in openings(engine) {
                        let connection = client.open(engine.port());
                        connection.write(0, &stream[..5]);
                        connection.write(5, &stream[5..]);
                        server.wait_for(connection.from, &stream);
                    }
                }
            }
        }
    }
}

/// A SYN that looks the same and goes to another port of the host must not decide which port another came through.
#[test]
fn container_is_judged_by_the_port_that_a_connection_came_through() {
    let host = Host::new("ambiguous", "native");
    let [(redis, redis_port), (postgresql, postgresql_port), _] = ENGINES;
    let mut servers = [
        host.serve(redis, redis_port),
        host.serve(postgresql, postgresql_port),
    ];
    for client in host.laboratory.clients() {
        for order in [[redis, postgresql], [postgresql, redis]] {
            let [first, second] = order.map(Engine::port);
            let mut connection = client.connection(second);
            let mut decoy = client.connection_from(connection.from, first);
            decoy.isn = connection.isn;
            decoy.send(&decoy.syn());
            connection.send(&connection.syn());
            client.fence_at(CLOSED_PORT);
            // The server may have answered one of the two.
            for connection in [&mut connection, &mut decoy] {
                let answer = client.take(|received| connection.is_mine(received));
                connection.server_isn = answer.map_or(0, |answer| answer.sequence);
                for engine in order {
                    connection.send(&connection.segment());
                    connection.write(0, &engine.clear());
                    connection.write(0, &engine.clear());
                }
            }
            client.fence_at(CLOSED_PORT);
            for server in &mut servers {
                server.assert_tls_only();
            }
        }
    }
}

#[test]
fn clients_on_the_containers_host_are_not_judged() {
    let host = Host::new("local", "native");
    for (engine, port) in ENGINES {
        let mut server = host.serve(engine, port);
        // Somebody came from outside before.
        for client in host.laboratory.clients() {
            attack(&client, &mut server);
            let connection = client.open(engine.port());
            connection.write(0, &openings(engine)[0]);
            server.wait_for(connection.from, &openings(engine)[0]);
        }
        let db = &host.laboratory.net.db;
        for (from, source, to) in [
            (&host.container, "127.0.0.1", "127.0.0.1"),
            (&host.container, BOX4, BOX4),
            (&host.container, BOX6, BOX6),
            (db, "172.17.0.1", BOX4),
            (db, "fd17::1", BOX6),
            (&host.other, "172.18.0.2", BOX4),
            (&host.other, "fd18::2", BOX6),
        ] {
            let [source, to] = [source, to].map(|address| address.parse::<IpAddr>().unwrap());
            let mut stream = from.run(|| {
                let socket = bound(source);
                let to = SocketAddr::new(to, port);
                socket.connect_timeout(&to.into(), PATIENCE).unwrap();
                TcpStream::from(socket)
            });
            stream.write_all(&engine.clear()).unwrap();
            server.wait_for_any(stream.local_addr().unwrap().port(), &engine.clear());
        }
    }
}

/// The database is on this host, behind another port than its clients'.
#[test]
fn port_that_is_redirected_is_judged() {
    let laboratory = Laboratory::new("redirect", "generic");
    let mut rules = String::new();
    for (engine, port) in ENGINES {
        rules += &format!(
            "iifname eth0 tcp dport {} redirect to :{port}; ",
            engine.port()
        );
    }
    rules += &format!("iifname eth0 tcp dport {CLOSED_PORT} redirect to :1; ");
    translate(&laboratory.net.db, &rules);
    for (engine, port) in ENGINES {
        let db = &laboratory.net.db;
        let mut server = Server::start_at(db, engine, port, None, |_| {});
        for client in laboratory.clients() {
            attack(&client, &mut server);
            for stream in openings(engine) {
                let connection = client.open(engine.port());
                connection.write(0, &stream);
                server.wait_for(connection.from, &stream);
            }
        }
    }
}

/// NAT changes the client's port where another of its connections, to another address of the host, has that one. Of a
/// container that has just begun to listen nobody knows yet which port leads to it.
#[test]
fn container_is_judged_where_nat_changes_the_clients_port() {
    let host = Host::new("remapped", "native");
    let engine = Engine::Redis;
    let rule = format!("iifname eth0 ip daddr {OTHER_DB4} tcp dport 6379 dnat ip to {BOX4}:6379");
    host.laboratory.net.db.run(|| {
        let rule = format!("add rule inet nat prerouting {rule}");
        succeed(Command::new("nft").arg(rule));
    });
    let clients = [DB4, OTHER_DB4].map(|server| {
        let mut client = host.laboratory.client(RAW4);
        client.server = server.into();
        client
    });
    // The container does not take the first connection yet, which the host's NAT has.
    let nft = |arguments: &[&str]| {
        let mut command = Command::new("nft");
        host.container.run(|| succeed(command.args(arguments)));
    };
    nft(&[
        "table inet closed { chain input { type filter hook input priority 0; tcp dport 6379 drop; }; }",
    ]);
    let first = clients[0].connection(engine.port());
    first.send(&first.syn());
    clients[0].fence_at(CLOSED_PORT);
    nft(&["delete table inet closed"]);
    let mut server = host.serve(engine, 6379);
    let mut second = clients[1].connection_from(first.from, engine.port());
    second.open();
    second.write(0, &engine.clear());
    clients[0].fence_at(CLOSED_PORT);
    server.assert_tls_only();
    assert!(
        server
            .accepted
            .iter()
            .any(|accepted| accepted.peer.port() != first.from)
    );
}

/// Clients outside have addresses of another container's network: they come through the filtered interface all the same.
#[test]
fn client_with_an_address_of_a_containers_network_is_judged() {
    let host = Host::new("overlapping", "native");
    let laboratory = &host.laboratory;
    let policy = laboratory
        .policy("")
        .replace("203.0.113.0/24", "172.18.0.64/26");
    laboratory.net.reload(&policy);
    let client = "172.18.0.66".parse().unwrap();
    laboratory
        .net
        .db
        .ip("route add 172.18.0.64/26 via 10.0.0.2 dev eth0");
    let client = laboratory.client(client);
    for (engine, port) in ENGINES {
        let mut server = host.serve(engine, port);
        attack(&client, &mut server);
    }
}

/// Two ports of the host lead to one of a container, and only one of them forces TLS.
#[test]
fn port_that_forces_tls_is_not_opened_by_one_that_does_not() {
    let host = Host::new("two-ports", "native");
    let laboratory = &host.laboratory;
    const CLEAR_PORT: u16 = 5500;
    host.publish(
        CLEAR_PORT,
        15432,
        "rules: [{cidr: 203.0.113.0/24}, {cidr: '2001:db8::/64'}]",
    );
    let (engine, port) = ENGINES[1];
    let mut server = host.serve(engine, port);
    for client in laboratory.clients() {
        for opened_first in [engine.port(), CLEAR_PORT] {
            client.open(opened_first);
            let forced = client.open(engine.port());
            client.open(CLEAR_PORT);
            forced.write(0, &engine.clear());
            client.fence_at(CLOSED_PORT);
            server.assert_tls_only();
        }
    }
}

/// Who is let pass only since a port is monitored does not have its clients judged as another port's.
#[test]
fn monitored_port_is_not_taken_for_one_that_forces_tls() {
    let host = Host::new("monitored-port", "native");
    const MONITORED_PORT: u16 = 5500;
    host.publish(
        MONITORED_PORT,
        25500,
        "monitor: true, rules: [{cidr: 192.0.2.0/24}]",
    );
    let (engine, port) = ENGINES[1];
    let _forced = host.serve(engine, port);
    let mut server = host.serve(engine, 25500);
    for client in host.laboratory.clients() {
        let forced = client.open(engine.port());
        let mut deceiving = client.connection(MONITORED_PORT);
        deceiving.isn = forced.isn;
        deceiving.send(&deceiving.syn());
        client.fence_at(CLOSED_PORT);
        let connection = client.open(MONITORED_PORT);
        connection.write(0, &engine.clear());
        server.wait_for_any(connection.from, &engine.clear());
    }
}
