//! Connects, sends datagrams and transfers data as a client, and returns the result.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use socket2::{Domain, Socket, Type};

use crate::net::{
    namespace::Namespace,
    wait::{PATIENCE, wait_until},
};

/// Time without an answer after which a connection attempt is checked for silence: longer than Linux
/// waits before it sends a SYN again, so that one lost packet decides nothing.
const SILENCE: Duration = Duration::from_millis(1500);
/// Time that a datagram's answer may take before the next datagram is sent.
const DATAGRAM_RETRY: Duration = Duration::from_millis(300);
/// A port that no test listens on or protects: the host answers each SYN with a reset.
const CLOSED_PORT: u16 = 1;

/// A TCP socket that connects from this address, in the namespace of the calling thread.
pub fn bound(source: IpAddr) -> Socket {
    let domain = if source.is_ipv4() {
        Domain::IPV4
    } else {
        Domain::IPV6
    };
    let socket = Socket::new(domain, Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind(&SocketAddr::new(source, 0).into()).unwrap();
    socket
}

/// What came of a connection attempt. It is closed at once (with a reset, to leave no trace).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Connection {
    Accepted,
    /// A reset came back.
    Refused,
    /// No SYN-ACK and no reset: what a dropped SYN looks like.
    Silence,
}

/// Connects from a source address, in the namespace of the calling thread.
pub fn connect(source: IpAddr, destination: SocketAddr) -> Connection {
    let socket = bound(source);
    socket.set_linger(Some(Duration::ZERO)).unwrap();
    let mut result = socket.connect_timeout(&destination.into(), SILENCE);
    if is_timeout(&result) {
        // A busy machine may be late. When a later SYN is answered, an answer to ours is here too.
        fence(source, destination.ip());
        result = match socket.take_error().unwrap() {
            Some(error) => Err(error),
            None if socket.peer_addr().is_ok() => Ok(()),
            None => Err(io::ErrorKind::TimedOut.into()),
        };
    }
    match result {
        Ok(()) => Connection::Accepted,
        Err(error) => match error.kind() {
            io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => {
                Connection::Refused
            }
            io::ErrorKind::TimedOut => Connection::Silence,
            _ => panic!("connect from {source} to {destination}: {error}"),
        },
    }
}

fn is_timeout(result: &io::Result<()>) -> bool {
    matches!(result, Err(error) if error.kind() == io::ErrorKind::TimedOut)
}

/// Waits until a host resets a connection to its closed port: whatever was sent before on the same
/// link has arrived by then, and was answered if the kernel answers it.
pub(super) fn fence(source: IpAddr, destination: IpAddr) {
    let address = SocketAddr::new(destination, CLOSED_PORT).into();
    let result = bound(source).connect_timeout(&address, PATIENCE);
    let refused = result.map_err(|error| error.kind());
    assert_eq!(
        refused,
        Err(io::ErrorKind::ConnectionRefused),
        "{source} does not reach {destination} at all"
    );
}

/// How long an answer to datagrams is waited for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Patience {
    /// As long as a busy machine takes: an answer must come.
    Long,
    /// For three datagrams: none must come.
    Short,
}

/// Whether datagrams are answered, in the namespace of the calling thread.
pub fn exchange(source: IpAddr, destination: SocketAddr, patience: Patience) -> bool {
    let socket = UdpSocket::bind((source, 0)).unwrap();
    socket.connect(destination).unwrap();
    socket.set_read_timeout(Some(DATAGRAM_RETRY)).unwrap();
    let answered = || {
        let mut answer = [0; 4];
        // Refused while the server is not there yet.
        let sent = socket.send(b"ping").is_ok();
        sent && matches!(socket.recv(&mut answer), Ok(4)) && answer == *b"ping"
    };
    match patience {
        // One may get lost.
        Patience::Long => wait_until(answered),
        Patience::Short => (0..3).any(|_| answered()),
    }
}

/// Sends 8 MiB to a server that echoes it.
pub fn transfer(client: &Namespace, source: IpAddr, destination: SocketAddr) {
    let data: Vec<u8> = (0..1_u32 << 21).flat_map(u32::to_be_bytes).collect();
    let socket = client.run(|| bound(source));
    let connected = socket.connect_timeout(&destination.into(), PATIENCE);
    connected.unwrap_or_else(|e| panic!("connect from {source} to {destination}: {e}"));
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut stream = TcpStream::from(socket);
    let mut writing = stream.try_clone().unwrap();
    let mut echoed = vec![0; data.len()];
    thread::scope(|scope| {
        let writer = scope.spawn(|| writing.write_all(&data).unwrap());
        stream.read_exact(&mut echoed).unwrap();
        writer.join().unwrap();
    });
    assert!(echoed == data, "the echo from {destination} differs");
}
