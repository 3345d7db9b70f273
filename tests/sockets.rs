//! Connections that the agent's library lists and destroys.

use std::{
    collections::BTreeSet,
    fs,
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    process::Command,
    time::{Duration, Instant},
};

use filter_agent::host::sockets::{Connection, Destroyed, Sockets};
use filter_tests::net::{
    CLIENT4, CLIENT6, DB4, DB6, Namespace, Net, PATIENCE, bound, succeed, wait_until,
};
use rustix::{
    process::{Resource, Rlimit, getrlimit, setrlimit},
    thread::{CapabilitySet, capabilities, set_capabilities},
};

/// Of a listener on 0.0.0.0, of one on [::], and of one whose connections are not listed.
const V4_PORT: u16 = 5432;
const DUAL_PORT: u16 = 5433;
const OTHER_PORT: u16 = 5434;

const PORTS: [u16; 2] = [V4_PORT, DUAL_PORT];

/// States as `/proc/net/tcp` has them.
const SYN_RECV: &str = "03";
const FIN_WAIT1: &str = "04";
const FIN_WAIT2: &str = "05";
const TIME_WAIT: &str = "06";

/// Both ends of a connection.
struct Pair {
    client: TcpStream,
    server: TcpStream,
}

impl Pair {
    fn new(net: &Net, source: SocketAddr, destination: SocketAddr, listener: &TcpListener) -> Self {
        let client = open(net, source, destination);
        Self {
            client,
            server: accept(listener),
        }
    }

    fn name(&self) -> (SocketAddr, SocketAddr) {
        let peer = self.client.local_addr().unwrap();
        (self.client.peer_addr().unwrap(), peer)
    }

    #[track_caller]
    fn assert_alive(&mut self) {
        let mut byte = [0];
        self.client.write_all(b"a").unwrap();
        self.server.read_exact(&mut byte).unwrap();
        self.server.write_all(b"b").unwrap();
        self.client.read_exact(&mut byte).unwrap();
    }

    /// The server's side ended without a word from the client, and so did the client's.
    #[track_caller]
    fn assert_destroyed(&mut self) {
        let error = self.server.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionAborted);
        let error = self.client.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
}

/// Connects; port 0 of the source is any.
fn open(net: &Net, source: SocketAddr, destination: SocketAddr) -> TcpStream {
    let socket = net.client.run(|| match source.port() {
        0 => bound(source.ip()),
        _ => {
            let socket = socket2::Socket::new(
                socket2::Domain::for_address(source),
                socket2::Type::STREAM,
                None,
            );
            let socket = socket.unwrap();
            socket.bind(&source.into()).unwrap();
            socket
        }
    });
    let connected = socket.connect_timeout(&destination.into(), PATIENCE);
    connected.unwrap_or_else(|error| panic!("connect to {destination}: {error}"));
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.into()
}

fn accept(listener: &TcpListener) -> TcpStream {
    let (server, _) = listener.accept().unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    server
}

fn any_port(source: impl Into<IpAddr>) -> SocketAddr {
    SocketAddr::new(source.into(), 0)
}

fn listen_v4(net: &Net) -> TcpListener {
    net.listen_at(Ipv4Addr::UNSPECIFIED.into(), V4_PORT)
}

fn connect_v4(net: &Net, listener: &TcpListener) -> Pair {
    Pair::new(net, any_port(CLIENT4), (DB4, V4_PORT).into(), listener)
}

fn sockets(net: &Net) -> Sockets {
    net.db.run(|| Sockets::open().unwrap())
}

fn list(sockets: &mut Sockets) -> Vec<Connection> {
    sockets.connections(&BTreeSet::from(PORTS)).unwrap()
}

fn names(connections: &[Connection]) -> BTreeSet<(SocketAddr, SocketAddr)> {
    let names: BTreeSet<_> = connections.iter().map(|c| (c.local, c.peer)).collect();
    assert_eq!(names.len(), connections.len(), "{connections:?}");
    names
}

fn find<'a>(connections: &'a [Connection], pair: &Pair) -> &'a Connection {
    let (local, peer) = pair.name();
    let mut found = connections
        .iter()
        .filter(|c| (c.local, c.peer) == (local, peer));
    found.next().unwrap()
}

/// Waits until the kernel has sockets of these states on the port, and of no others but listeners.
#[track_caller]
fn wait_for_states(namespace: &Namespace, port: u16, expected: &[&str]) {
    let mut found = Vec::new();
    let local = format!(":{port:04X}");
    let came = wait_until(|| {
        let text = namespace.run(|| fs::read_to_string("/proc/thread-self/net/tcp").unwrap());
        let lines = text.lines().map(|line| line.split_whitespace());
        let states = lines.filter_map(|mut fields| {
            let is_local = fields.nth(1)?.ends_with(&local);
            let state = fields.nth(1)?;
            (is_local && state != "0A").then(|| state.to_owned())
        });
        found = states.collect();
        found.sort();
        found == expected
    });
    assert!(came, "{found:?}");
}

#[test]
fn one_of_the_listed_connections_is_destroyed_and_the_others_live() {
    let net = Net::new("sockets-one");
    let began = Instant::now();
    let v4 = listen_v4(&net);
    let dual = net.listen(DUAL_PORT);
    let other = net.listen(OTHER_PORT);
    let mut plain = connect_v4(&net, &v4);
    let mut v6 = Pair::new(&net, any_port(CLIENT6), (DB6, DUAL_PORT).into(), &dual);
    let mut mapped = Pair::new(&net, any_port(CLIENT4), (DB4, DUAL_PORT).into(), &dual);
    let mut foreign = Pair::new(&net, any_port(CLIENT4), (DB4, OTHER_PORT).into(), &other);
    let waiting = open(&net, any_port(CLIENT4), (DB4, V4_PORT).into());
    let waiting_name = (waiting.peer_addr().unwrap(), waiting.local_addr().unwrap());

    let mut sockets = sockets(&net);
    assert!(sockets.can_destroy().unwrap());
    let listed = list(&mut sockets);
    let expected = BTreeSet::from([plain.name(), v6.name(), mapped.name(), waiting_name]);
    assert_eq!(names(&listed), expected);
    for connection in &listed {
        // The kernel counts in ticks of its clock.
        let idle = connection.idle.unwrap();
        assert!(
            idle <= began.elapsed() + Duration::from_millis(20),
            "{idle:?}"
        );
    }
    // By one dump for all ports.
    let more = BTreeSet::from_iter((1..=100).chain(PORTS));
    assert_eq!(names(&sockets.connections(&more).unwrap()), expected);
    assert_eq!(sockets.connections(&BTreeSet::new()).unwrap(), []);

    let doomed = find(&listed, &mapped);
    assert_eq!(sockets.destroy(doomed).unwrap(), Destroyed::Ended);
    mapped.assert_destroyed();
    assert_eq!(sockets.destroy(doomed).unwrap(), Destroyed::Gone);
    for pair in [&mut plain, &mut v6, &mut foreign] {
        pair.assert_alive();
    }
    let left = BTreeSet::from([plain.name(), v6.name(), waiting_name]);
    assert_eq!(names(&list(&mut sockets)), left);

    for pair in [&mut plain, &mut v6] {
        let doomed = find(&listed, pair);
        assert_eq!(sockets.destroy(doomed).unwrap(), Destroyed::Ended);
        pair.assert_destroyed();
    }
    assert_eq!(names(&list(&mut sockets)), BTreeSet::from([waiting_name]));
    let _waiting = accept(&v4);
    connect_v4(&net, &v4).assert_alive();
    for source in [IpAddr::from(CLIENT4), CLIENT6.into()] {
        let destination = if source.is_ipv4() {
            DB4.into()
        } else {
            IpAddr::from(DB6)
        };
        Pair::new(
            &net,
            any_port(source),
            (destination, DUAL_PORT).into(),
            &dual,
        )
        .assert_alive();
    }
}

#[test]
fn connection_between_the_ports_of_an_earlier_one_is_not_destroyed() {
    let net = Net::new("sockets-reused");
    let listeners = [listen_v4(&net), net.listen(DUAL_PORT)];
    let mut sockets = sockets(&net);
    for (listener, port) in listeners.iter().zip(PORTS) {
        let source = SocketAddr::from((CLIENT4, 40_000));
        let destination = SocketAddr::from((DB4, port));
        let first = Pair::new(&net, source, destination, listener);
        let listed = list(&mut sockets);
        let earlier = find(&listed, &first);
        // A reset leaves nothing in TIME_WAIT.
        let client = socket2::Socket::from(first.client);
        client.set_linger(Some(Duration::ZERO)).unwrap();
        drop(client);
        assert!(wait_until(|| list(&mut sockets).is_empty()));
        assert_eq!(sockets.destroy(earlier).unwrap(), Destroyed::Gone);

        let mut second = Pair::new(&net, source, destination, listener);
        assert_eq!(names(&list(&mut sockets)), BTreeSet::from([second.name()]));
        assert_eq!(sockets.destroy(earlier).unwrap(), Destroyed::Gone);
        second.assert_alive();
        let client = socket2::Socket::from(second.client);
        client.set_linger(Some(Duration::ZERO)).unwrap();
        drop(client);
        assert!(wait_until(|| list(&mut sockets).is_empty()));
    }
}

#[test]
fn sockets_that_no_process_holds_are_not_listed() {
    let net = Net::new("sockets-orphans");
    let listener = listen_v4(&net);
    let mut sockets = sockets(&net);
    let connect = || connect_v4(&net, &listener);

    // The process closed it, but the client reads nothing: FIN_WAIT1.
    let mut full = connect();
    full.server.set_nonblocking(true).unwrap();
    while full.server.write(&[0; 65_536]).is_ok() {}
    drop(full.server);
    // The process closed it, and the client's side is still open: FIN_WAIT2.
    let closed = connect();
    drop(closed.server);
    // Both closed it, the server first: TIME_WAIT.
    let over = connect();
    drop(over.server);
    drop(over.client);
    // The process closed its direction only: FIN_WAIT2 as well.
    let half = connect();
    half.server.shutdown(Shutdown::Write).unwrap();
    let states = [FIN_WAIT1, FIN_WAIT2, FIN_WAIT2, TIME_WAIT];
    wait_for_states(&net.db, V4_PORT, &states);

    let listed = list(&mut sockets);
    assert_eq!(names(&listed), BTreeSet::from([half.name()]));
    assert_eq!(sockets.destroy(&listed[0]).unwrap(), Destroyed::Ended);
    assert_eq!(list(&mut sockets), []);
}

#[test]
fn connection_that_is_not_established_yet_is_not_listed() {
    let net = Net::new("sockets-half-open");
    let _listener = listen_v4(&net);
    net.client.run(|| {
        succeed(Command::new("nft").arg(
            "add table inet t; add chain inet t c { type filter hook input priority 0; }; \
             add rule inet t c tcp flags & (syn | ack) == syn | ack drop",
        ));
    });
    let socket = net.client.run(|| bound(CLIENT4.into()));
    socket.set_nonblocking(true).unwrap();
    let destination = SocketAddr::from((DB4, V4_PORT));
    socket.connect(&destination.into()).unwrap_err();
    wait_for_states(&net.db, V4_PORT, &[SYN_RECV]);
    assert_eq!(list(&mut sockets(&net)), []);
}

#[test]
fn thousands_of_connections_are_listed_and_destroyed() {
    const COUNT: usize = 2_000;
    let limit = getrlimit(Resource::Nofile);
    let limit = Rlimit {
        // `None` is no limit.
        current: limit.current.map(|limit| limit.max(3 * COUNT as u64)),
        ..limit
    };
    setrlimit(Resource::Nofile, limit).unwrap();
    let net = Net::new("sockets-thousands");
    let listener = listen_v4(&net);
    let mut pairs: Vec<_> = (0..COUNT).map(|_| connect_v4(&net, &listener)).collect();
    let mut sockets = sockets(&net);
    let listed = list(&mut sockets);
    assert_eq!(names(&listed), pairs.iter().map(Pair::name).collect());
    for pair in &pairs[1..] {
        let doomed = find(&listed, pair);
        assert_eq!(sockets.destroy(doomed).unwrap(), Destroyed::Ended);
    }
    for pair in &mut pairs[1..] {
        pair.assert_destroyed();
    }
    pairs[0].assert_alive();
    assert_eq!(
        names(&list(&mut sockets)),
        BTreeSet::from([pairs[0].name()])
    );
}

/// The kernel has no way to destroy the whole connection.
#[test]
fn subflow_of_a_multipath_connection_is_destroyed() {
    let net = Net::new("sockets-multipath");
    let multipath = || {
        let protocol = Some(socket2::Protocol::MPTCP);
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, protocol);
        socket.unwrap()
    };
    let listener: TcpListener = net.db.run(|| {
        let socket = multipath();
        let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, V4_PORT));
        socket.bind(&address.into()).unwrap();
        socket.listen(1).unwrap();
        socket.into()
    });
    let client = net.client.run(multipath);
    let destination = SocketAddr::from((DB4, V4_PORT));
    client.connect(&destination.into()).unwrap();
    let mut pair = Pair {
        client: client.into(),
        server: accept(&listener),
    };
    pair.assert_alive();
    let mut sockets = sockets(&net);
    let listed = list(&mut sockets);
    assert_eq!(names(&listed), BTreeSet::from([pair.name()]));
    assert_eq!(sockets.destroy(&listed[0]).unwrap(), Destroyed::Ended);
    assert_eq!(list(&mut sockets), []);
}

#[test]
fn without_the_capability_nothing_is_destroyed() {
    let net = Net::new("sockets-capability");
    let listener = listen_v4(&net);
    let mut pair = connect_v4(&net, &listener);
    let error = net.db.run(|| {
        let mut sets = capabilities(None).unwrap();
        sets.effective.remove(CapabilitySet::NET_ADMIN);
        set_capabilities(None, sets).unwrap();
        let mut sockets = Sockets::open().unwrap();
        let listed = list(&mut sockets);
        sockets.destroy(&listed[0]).unwrap_err()
    });
    let error = format!("{error:#}");
    assert!(error.contains("Operation not permitted"), "{error}");
    pair.assert_alive();
}
