//! TCP connections of this network namespace: listed and destroyed over sock_diag netlink.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use netlink_packet_core::{
    ErrorMessage, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_sock_diag::{
    AF_INET, AF_INET6, IPPROTO_TCP, SockDiagDestroy, SockDiagMessage, TCP_CLOSE_WAIT, TCP_CLOSING,
    TCP_ESTABLISHED, TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_LAST_ACK, TCP_LISTEN,
    inet::{
        ExtensionFlags, InetRequest, InetResponse, InetResponseHeader, SocketId, StateFlags,
        nlas::Nla,
    },
};
use netlink_sys::{Socket, protocols::NETLINK_SOCK_DIAG};
use nix::{
    errno::Errno,
    sys::{
        socket::{MsgFlags, setsockopt, sockopt::ReceiveTimeout},
        time::TimeVal,
    },
};

/// Time allowed for one answer of the kernel, and for all datagrams of a dump.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Bytes of the largest datagram of a dump (`netlink_dump`).
const MAX_DATAGRAM: usize = 32 << 10;

/// Connections that a list may have, 40 MiB. More are an error.
const MAX_CONNECTIONS: usize = 1 << 18;

/// Ports up to which each is dumped by itself, so that the kernel skips all other connections. Each dump walks the
/// whole hash table; for more ports one dump returns the connections of all ports.
const MAX_PORT_DUMPS: usize = 16;

/// A TCP connection that a process of this host holds or is about to accept.
#[derive(Clone, Debug, PartialEq)]
pub struct Connection {
    /// An IPv4-mapped address of a dual-stack socket is reported as IPv4.
    pub local: SocketAddr,
    pub peer: SocketAddr,
    /// Time since data was last received, or since the connection opened if none was. The kernel keeps no time of
    /// the opening. Counted in 32 bits of milliseconds: begins anew after 49 days.
    pub idle: Option<Duration>,
    /// Addresses as the kernel stores them, and the cookie: a number that no other socket gets until the next boot.
    /// Only `connections` makes one, so that no listener can be given to `destroy`.
    id: SocketId,
}

/// The result of an attempt to destroy a connection.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Destroyed {
    /// The peer was sent a reset; the server reads ECONNABORTED.
    Ended,
    /// It had ended before.
    Gone,
    /// The kernel was built without CONFIG_INET_DIAG_DESTROY.
    Unsupported,
}

#[cfg(test)]
impl Connection {
    /// A connection that no kernel listed.
    pub fn between(local: SocketAddr, peer: SocketAddr) -> Self {
        Self {
            local,
            peer,
            idle: Some(Duration::from_secs(peer.port().into())),
            id: SocketId::new_v4(),
        }
    }
}

/// A sock_diag socket. Requests block the calling thread.
pub struct Sockets {
    /// Stays open between requests: a host that runs out of descriptors must not stop them.
    socket: Option<Socket>,
}

impl Sockets {
    /// Opens the socket in the network namespace of the calling thread.
    ///
    /// # Errors
    /// The socket cannot be opened.
    pub fn open() -> Result<Self> {
        let socket = Some(open_socket()?);
        Ok(Self { socket })
    }

    /// The connections to these local ports that a process holds or is about to accept, in either direction. Not
    /// listed are listeners, connections that are not established yet, and what the kernel alone brings to an end
    /// (TIME_WAIT, sockets that their process closed): before 6.11, destroying one that its process closed can leave
    /// it in memory for ever (bac76cf89816).
    ///
    /// The kernel resumes a dump by a position in a hash chain: where another connection of the same chain ends at
    /// that moment, one may be missing. To miss none, list again until nothing is left to destroy.
    ///
    /// # Errors
    /// The kernel has no tcp_diag, it did not send the whole list in time, or there are too many connections.
    pub fn connections(&mut self, ports: &BTreeSet<u16>) -> Result<Vec<Connection>> {
        let dumps = [AF_INET, AF_INET6].into_iter().flat_map(|family| {
            let dumped = dumped_ports(ports).into_iter();
            dumped.map(move |port| dump_request(family, port))
        });
        let list = self.dump(ports, dumps);
        let list = list.context("list the host's TCP connections")?;
        // A connection stands twice where another one came into its hash chain.
        let mut connections = list.connections;
        connections.sort_by_key(|connection| connection.id.cookie);
        connections.dedup_by_key(|connection| connection.id.cookie);
        Ok(connections)
    }

    /// The local ports, of these, on which a process listens.
    ///
    /// # Errors
    /// As `connections`.
    pub fn listening(&mut self, ports: &BTreeSet<u16>) -> Result<BTreeSet<u16>> {
        let dumps = [AF_INET, AF_INET6].map(|family| InetRequest {
            states: StateFlags::LISTEN,
            ..dump_request(family, 0)
        });
        let list = self.dump(ports, dumps);
        Ok(list.context("list the host's listening sockets")?.listening)
    }

    fn dump<'a>(
        &mut self,
        ports: &'a BTreeSet<u16>,
        requests: impl IntoIterator<Item = InetRequest>,
    ) -> Result<List<'a>> {
        let deadline = Instant::now() + TIMEOUT;
        let mut list = List {
            ports,
            listening: BTreeSet::new(),
            connections: Vec::new(),
        };
        for request in requests {
            let request = SockDiagMessage::InetRequest(request);
            self.request(request, NLM_F_DUMP, deadline, |datagram| {
                list.read(datagram)
            })?;
        }
        Ok(list)
    }

    /// Ends a connection: exactly the one that was listed, never another one between the same ports.
    ///
    /// Of a Multipath TCP connection this ends one subflow: the kernel cannot destroy the whole connection. The
    /// server reads no error until `net.mptcp.close_timeout` (60 s) after the last subflow ended.
    ///
    /// # Errors
    /// The kernel refuses (EPERM without CAP_NET_ADMIN), or does not answer.
    pub fn destroy(&mut self, connection: &Connection) -> Result<Destroyed> {
        let destroyed = self.destroy_id(&connection.id);
        let destroyed = destroyed
            .with_context(|| format!("destroy the connection from {}", connection.peer))?;
        // Before 6.0 the kernel returns the same error for a connection that went to TIME_WAIT meanwhile.
        if destroyed == Destroyed::Unsupported && self.can_destroy()? {
            return Ok(Destroyed::Gone);
        }
        Ok(destroyed)
    }

    /// Whether the kernel can destroy connections at all. Destroys none.
    ///
    /// # Errors
    /// The kernel does not answer.
    pub fn can_destroy(&mut self) -> Result<bool> {
        // No socket has port 0, and none has cookie 0.
        let destroyed = self.destroy_id(&SocketId::new_v4());
        let destroyed = destroyed.context("check whether the kernel can destroy connections")?;
        Ok(destroyed != Destroyed::Unsupported)
    }

    fn destroy_id(&mut self, id: &SocketId) -> Result<Destroyed> {
        let request = InetRequest {
            family: family(id),
            protocol: IPPROTO_TCP,
            extensions: ExtensionFlags::empty(),
            states: StateFlags::empty(),
            socket_id: id.clone(),
        };
        let request = SockDiagDestroy::new(SockDiagMessage::InetRequest(request));
        let deadline = Instant::now() + TIMEOUT;
        let mut answer = None;
        self.request(request, NLM_F_ACK, deadline, |datagram| {
            let message = NetlinkMessage::<SockDiagMessage>::deserialize(datagram)?;
            let NetlinkPayload::Error(error) = message.payload else {
                bail!("the kernel's answer over netlink is no acknowledgement");
            };
            answer = Some(error);
            Ok(true)
        })?;
        destroyed(&answer.context("the kernel did not acknowledge")?)
    }

    /// Sends a request, and reads datagrams until `read` returns true.
    fn request<I: NetlinkSerializable>(
        &mut self,
        request: I,
        flags: u16,
        deadline: Instant,
        mut read: impl FnMut(&[u8]) -> Result<bool>,
    ) -> Result<()>
    where
        NetlinkPayload<I>: From<I>,
    {
        // After an error a new socket is opened: the rest of an answer must not be taken for the next one.
        let socket = match self.socket.take() {
            Some(socket) => socket,
            None => open_socket()?,
        };
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        socket.send(&bytes, 0).context("send over netlink")?;
        let mut datagram = Vec::with_capacity(MAX_DATAGRAM);
        loop {
            ensure!(
                Instant::now() < deadline,
                "the kernel's answer over netlink takes too long"
            );
            datagram.clear();
            let received = match socket.recv(&mut datagram, MsgFlags::MSG_TRUNC.bits()) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    bail!("the kernel does not answer over netlink")
                }
                received => received.context("receive over netlink")?,
            };
            ensure!(
                received == datagram.len(),
                "the kernel's answer over netlink was cut"
            );
            if read(&datagram)? {
                break;
            }
        }
        self.socket = Some(socket);
        Ok(())
    }
}

fn open_socket() -> Result<Socket> {
    let open = || {
        let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
        socket.bind_auto()?;
        // Other processes can send to a socket that is not connected.
        socket.connect(&netlink_sys::SocketAddr::new(0, 0))?;
        let timeout = TimeVal::new(TIMEOUT.as_secs().cast_signed(), 0);
        setsockopt(&socket, ReceiveTimeout, &timeout)?;
        Ok::<_, io::Error>(socket)
    };
    open().context("open a sock_diag netlink socket")
}

/// The ports to make a dump for each; 0 stands for all ports.
fn dumped_ports(ports: &BTreeSet<u16>) -> Vec<u16> {
    if ports.len() > MAX_PORT_DUMPS {
        return vec![0];
    }
    ports.iter().copied().collect()
}

fn dump_request(family: u8, port: u16) -> InetRequest {
    let any = if family == AF_INET {
        SocketId::new_v4()
    } else {
        SocketId::new_v6()
    };
    InetRequest {
        family,
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::INFO,
        states: StateFlags::ESTABLISHED
            | StateFlags::CLOSE_WAIT
            | StateFlags::FIN_WAIT1
            | StateFlags::FIN_WAIT2
            | StateFlags::CLOSING
            | StateFlags::LAST_ACK,
        socket_id: SocketId {
            source_port: port,
            ..any
        },
    }
}

fn family(id: &SocketId) -> u8 {
    match id.source_address {
        IpAddr::V4(_) => AF_INET,
        IpAddr::V6(_) => AF_INET6,
    }
}

/// The connections of dumps, as far as they were received.
struct List<'a> {
    ports: &'a BTreeSet<u16>,
    listening: BTreeSet<u16>,
    connections: Vec<Connection>,
}

impl List<'_> {
    /// Takes the connections of a datagram over, and returns whether it ends the dump.
    fn read(&mut self, mut datagram: &[u8]) -> Result<bool> {
        while !datagram.is_empty() {
            let message = NetlinkMessage::<SockDiagMessage>::deserialize(datagram)?;
            ensure!(
                message.header.flags & NLM_F_DUMP_INTR == 0,
                "the kernel interrupted the list"
            );
            match message.payload {
                NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(response)) => {
                    self.take(*response)?;
                }
                NetlinkPayload::Done(done) if done.code == 0 => return Ok(true),
                NetlinkPayload::Done(done) => {
                    let error = io::Error::from_raw_os_error(-done.code);
                    bail!("the kernel ended the list: {error}");
                }
                NetlinkPayload::Error(error) => match Errno::from_raw(-error.raw_code()) {
                    Errno::ENOENT => bail!("the kernel lacks the module tcp_diag"),
                    _ => bail!("the kernel refuses: {error}"),
                },
                NetlinkPayload::Overrun(_) => bail!("parts of the list were lost"),
                _ => {}
            }
            let length = (message.header.length as usize).next_multiple_of(size_of::<u32>());
            datagram = datagram.get(length..).unwrap_or_default();
        }
        Ok(false)
    }

    fn take(&mut self, response: InetResponse) -> Result<()> {
        let InetResponse { header, nlas } = response;
        if header.state == TCP_LISTEN && self.ports.contains(&header.socket_id.source_port) {
            self.listening.insert(header.socket_id.source_port);
            return Ok(());
        }
        if !self.ports.contains(&header.socket_id.source_port) || !is_held(&header) {
            return Ok(());
        }
        ensure!(
            self.connections.len() < MAX_CONNECTIONS,
            "there are more than {MAX_CONNECTIONS} connections"
        );
        let id = header.socket_id;
        let idle = nlas.iter().find_map(|attribute| match attribute {
            Nla::TcpInfo(info) => Some(Duration::from_millis(info.last_data_recv.into())),
            _ => None,
        });
        self.connections.push(Connection {
            local: SocketAddr::new(id.source_address.to_canonical(), id.source_port),
            peer: SocketAddr::new(id.destination_address.to_canonical(), id.destination_port),
            idle,
            id,
        });
        Ok(())
    }
}

/// Whether a process holds the connection, or finds it when it accepts: the latter has no inode yet, but can only be
/// in the first two states. The kernel reports some sockets in TIME_WAIT as FIN_WAIT2, without an inode.
fn is_held(header: &InetResponseHeader) -> bool {
    match header.state {
        TCP_ESTABLISHED | TCP_CLOSE_WAIT => true,
        TCP_FIN_WAIT1 | TCP_FIN_WAIT2 | TCP_CLOSING | TCP_LAST_ACK => header.inode != 0,
        _ => false,
    }
}

fn destroyed(answer: &ErrorMessage) -> Result<Destroyed> {
    let Some(code) = answer.code else {
        return Ok(Destroyed::Ended);
    };
    match Errno::from_raw(-code.get()) {
        // ESTALE: the ports belong to another connection.
        Errno::ENOENT | Errno::ESTALE => Ok(Destroyed::Gone),
        Errno::EOPNOTSUPP => Ok(Destroyed::Unsupported),
        _ => bail!("the kernel refuses: {answer}"),
    }
}

#[cfg(test)]
mod tests;
