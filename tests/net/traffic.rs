//! Sockets, connections and frames between the client and the database host.

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket},
    process::Command,
    thread,
};

use socket2::{Domain, Socket, Type};

use crate::net::{
    addresses::{CLIENT4, DB4},
    clients::{Connection, Patience, connect, exchange, fence, transfer},
    command::feed,
    echo::{Echo, EchoDatagrams},
    hosts::Net,
    namespace::Namespace,
    nft::counter,
    wait::wait_until,
    wire::Wire,
};

impl Net {
    /// Listens in the database host's namespace, on every local address.
    pub fn listen(&self, port: u16) -> TcpListener {
        self.listen_at(Ipv6Addr::UNSPECIFIED.into(), port)
    }

    pub fn listen_at(&self, address: IpAddr, port: u16) -> TcpListener {
        self.db.run(|| {
            let address = SocketAddr::new(address, port);
            let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
            socket.set_reuse_address(true).unwrap();
            socket.bind(&address.into()).unwrap();
            socket.listen(4096).unwrap();
            socket.into()
        })
    }

    /// A datagram socket of the database host, on every local address.
    pub fn receive(&self, port: u16) -> UdpSocket {
        self.db
            .run(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)).unwrap())
    }

    /// A server in the database host's namespace that answers every byte with itself.
    pub fn echo(&self, port: u16) -> Echo {
        Echo::start(self.listen(port))
    }

    pub fn echo_at(&self, address: IpAddr, port: u16) -> Echo {
        Echo::start(self.listen_at(address, port))
    }

    /// The same for datagrams.
    pub fn echo_datagrams(&self, port: u16) -> EchoDatagrams {
        EchoDatagrams::start(self.receive(port))
    }

    /// Whether datagrams from a source address of the client's are answered.
    pub fn exchange(&self, source: IpAddr, destination: SocketAddr, patience: Patience) -> bool {
        self.client.run(|| exchange(source, destination, patience))
    }

    /// Waits until the database host has received all that the client sent before.
    pub fn settle(&self) {
        self.client.run(|| fence(CLIENT4.into(), DB4.into()));
    }

    /// Tries to connect from a source address of the client's.
    pub fn connect(&self, source: IpAddr, destination: SocketAddr) -> Connection {
        self.client.run(|| connect(source, destination))
    }

    /// Sends 8 MiB from a source address of the client's to a server that echoes it.
    pub fn transfer(&self, source: IpAddr, destination: SocketAddr) {
        transfer(&self.client, source, destination);
    }

    /// The same for several at once.
    pub fn connect_all(&self, attempts: &[(IpAddr, SocketAddr)]) -> Vec<Connection> {
        thread::scope(|scope| {
            let threads: Vec<_> = attempts
                .iter()
                .map(|&(source, destination)| {
                    let client = &self.client;
                    scope.spawn(move || client.run(|| connect(source, destination)))
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        })
    }

    /// The client's end of the link, for frames made by hand.
    pub fn wire(&self) -> Wire {
        self.client.run(|| Wire::open("eth0"))
    }

    /// What the database host's network stack gets from the link, after the filter.
    pub fn passed(&self) -> Wire {
        self.db.run(|| Wire::open("eth0"))
    }

    /// Counts, from now on, the SYNs to a port that the client sends over the link and those that
    /// pass the filter there. Call it before the client sends any.
    pub fn count_syns(&self, port: u16) {
        for (namespace, hook, interface) in [
            (&self.client, "output", "oifname"),
            (&self.db, "prerouting", "iifname"),
        ] {
            let ruleset = format!(
                "table inet syns {{
                    counter syns {{}}
                    chain syns {{
                        type filter hook {hook} priority -300
                        {interface} eth0 tcp dport {port} tcp flags & (syn | ack) == syn \
                            counter name syns
                    }}
                }}\n"
            );
            namespace.run(|| feed(Command::new("nft").args(["-f", "-"]), &ruleset));
        }
    }

    /// Asserts that each SYN counted was sent and passed the filter, and that some were.
    #[track_caller]
    pub fn assert_all_syns_passed(&self) {
        let count = |namespace: &Namespace| {
            let mut command = Command::new("nft");
            command.args(["-j", "list", "counter", "inet", "syns", "syns"]);
            counter(&namespace.output(&mut command))
        };
        let (mut sent, mut passed) = (0, 0);
        let all = wait_until(|| {
            (sent, passed) = (count(&self.client), count(&self.db));
            sent == passed
        });
        assert!(all && sent > 0, "{sent} SYNs were sent and {passed} passed");
    }
}
