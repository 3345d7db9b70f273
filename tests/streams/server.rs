//! Servers that record what they read.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{Ipv6Addr, SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use filter_tests::net::{Namespace, wait_until};
use socket2::{Domain, Protocol, Socket, Type};

/// Time within which a server must have read what it may read.
const PATIENCE: Duration = Duration::from_secs(5);

pub const SSL_REQUEST: &[u8] = &[0, 0, 0, 8, 4, 210, 22, 47];
pub const GSSENC_REQUEST: &[u8] = &[0, 0, 0, 8, 4, 210, 22, 48];
pub const CANCEL_REQUEST: &[u8] = &[0, 0, 0, 16, 4, 210, 22, 46, 1, 2, 3, 4, 5, 6, 7, 8];

/// The engines, each on a port of its own where it is forced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    Postgresql,
    /// With `cancel_in_clear: false`.
    PostgresqlWithoutCancel,
    Mysql,
    Redis,
    Mongodb,
    Other,
}

impl Engine {
    pub const ALL: [Self; 6] = [
        Self::Postgresql,
        Self::PostgresqlWithoutCancel,
        Self::Mysql,
        Self::Redis,
        Self::Mongodb,
        Self::Other,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Postgresql | Self::PostgresqlWithoutCancel => "postgresql",
            Self::Mysql => "mysql",
            Self::Redis => "redis",
            Self::Mongodb => "mongodb",
            Self::Other => "other",
        }
    }

    pub fn port(self) -> u16 {
        match self {
            Self::Postgresql => 5432,
            Self::PostgresqlWithoutCancel => 5433,
            Self::Mysql => 3306,
            Self::Redis => 6379,
            Self::Mongodb => 27017,
            Self::Other => 8443,
        }
    }

    fn is_postgresql(self) -> bool {
        self.name() == "postgresql"
    }

    /// What a stream may consist of before the ClientHello.
    pub fn requests(self) -> Vec<Vec<u8>> {
        match self {
            Self::Mysql => vec![mysql_request()],
            _ if self.is_postgresql() => vec![
                vec![],
                SSL_REQUEST.to_vec(),
                [GSSENC_REQUEST, SSL_REQUEST].concat(),
            ],
            _ => vec![vec![]],
        }
    }

    /// What a client sends that does not speak TLS, longer than what is judged.
    pub fn clear(self) -> Vec<u8> {
        let mut clear = match self {
            Self::Mysql => mysql_login(),
            Self::Redis => b"*1\r\n$4\r\nPING\r\n".to_vec(),
            Self::Mongodb => [93, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0xdd, 7, 0, 0].to_vec(),
            Self::Other => b"GET / HTTP/1.1\r\n\r\n".to_vec(),
            _ => b"\0\0\0\x60\0\x03\0\0user\0postgres\0database\0postgres\0options\0".to_vec(),
        };
        clear.resize(96, b'c');
        clear
    }

    /// Whether a server may read a stream that begins so. Own code on purpose: it must not share a mistake
    /// with the program.
    pub fn may_read(self, stream: &[u8]) -> bool {
        // Of any length below 512.
        let cancel = |(place, &byte): (usize, &u8)| match place {
            2 => byte <= 1,
            3 => true,
            _ => byte == CANCEL_REQUEST[place],
        };
        let cancels = self == Self::Postgresql && stream.iter().enumerate().take(8).all(cancel);
        cancels
            || self.requests().iter().any(|request| {
                let requests = match self {
                    // Capabilities with CLIENT_SSL (0x0800); the rest is not read.
                    Self::Mysql => {
                        agrees(stream, request, 4) && stream.get(5).is_none_or(|byte| byte & 8 != 0)
                    }
                    _ => agrees(stream, request, request.len()),
                };
                requests && stream.get(request.len()..).is_none_or(is_hello)
            }) && !(self == Self::Mongodb && is_message(stream))
    }
}

/// Whether a stream's first bytes, as many as there are, are these.
fn agrees(stream: &[u8], expected: &[u8], count: usize) -> bool {
    let count = count.min(stream.len());
    stream[..count] == expected[..count]
}

/// Whether MongoDB, which takes both at one port, takes a stream for a message in the clear: one that is no answer to
/// another.
fn is_message(stream: &[u8]) -> bool {
    let answers_to = stream.get(8..12);
    answers_to.is_some_and(|number| [0, u8::MAX].iter().any(|&byte| number == [byte; 4]))
}

/// Whether these bytes may begin a record with a ClientHello.
fn is_hello(bytes: &[u8]) -> bool {
    let allowed = |place: usize, byte: u8| match place {
        0 => byte == 22,
        1 => byte == 3,
        2 => byte <= 4,
        3 => byte <= 0x40,
        5 => byte == 1,
        _ => true,
    };
    (bytes.iter().enumerate().take(6)).all(|(place, &byte)| allowed(place, byte))
}

fn mysql_request() -> Vec<u8> {
    let mut request = vec![32, 0, 0, 1, 0x85, 0xae, 0x9f, 0x19, 0, 0, 0, 1, 45];
    request.resize(36, 0);
    request
}

/// A login without TLS: the same, but for CLIENT_SSL.
fn mysql_login() -> Vec<u8> {
    let mut login = mysql_request();
    login[0] = 60;
    login[5] &= !8;
    login.extend(b"anyone\0\x14secretsecretsecretse\0");
    login
}

/// A ClientHello of this length with its record's header, the same for the same seed.
pub fn hello(length: usize, seed: u64) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let message = length - 9;
    let mut hello = vec![22, 3, 1];
    hello.extend((length as u16 - 5).to_be_bytes());
    hello.extend([1, 0]);
    hello.extend((message as u16).to_be_bytes());
    hello.extend([3, 3]);
    hello.extend((2..message).map(|_| rng.u8(..)));
    hello
}

/// One accepted connection.
pub struct Accepted {
    stream: TcpStream,
    pub peer: SocketAddr,
    pub read: Vec<u8>,
    /// Requests of PostgreSQL that were answered.
    answered: usize,
    /// Whether the stream ended or broke.
    pub ended: bool,
}

/// A server of an engine. It does something only when it is asked what it has read.
pub struct Server {
    pub engine: Engine,
    pub listeners: Vec<Socket>,
    pub accepted: Vec<Accepted>,
}

impl Server {
    /// Listens on every local address.
    pub fn start(namespace: &Namespace, engine: Engine) -> Self {
        Self::start_at(namespace, engine, engine.port(), None, |_| {})
    }

    /// `prepare`: sets options of the socket before it is bound.
    pub fn start_at(
        namespace: &Namespace,
        engine: Engine,
        port: u16,
        protocol: Option<Protocol>,
        prepare: fn(&Socket),
    ) -> Self {
        let mut server = Self {
            engine,
            listeners: vec![],
            accepted: vec![],
        };
        server.listen(namespace, port, protocol, prepare);
        server
    }

    pub fn listen(
        &mut self,
        namespace: &Namespace,
        port: u16,
        protocol: Option<Protocol>,
        prepare: fn(&Socket),
    ) {
        self.listeners.push(namespace.run(|| {
            let socket = Socket::new(Domain::IPV6, Type::STREAM, protocol).unwrap();
            socket.set_reuse_address(true).unwrap();
            prepare(&socket);
            let address = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port).into();
            // A listener that was closed is still there while a process that another test starts has its copy.
            let listens = || socket.bind(&address).is_ok() && socket.listen(4096).is_ok();
            assert!(wait_until(listens), "port {port} is taken");
            socket.set_nonblocking(true).unwrap();
            socket
        }));
    }

    /// Accepts and reads what is there, and answers as the engine does.
    pub fn poll(&mut self) {
        for listener in &self.listeners {
            while let Ok((socket, peer)) = listener.accept() {
                socket.set_nonblocking(true).unwrap();
                let mut stream = TcpStream::from(socket);
                if self.engine == Engine::Mysql {
                    let _ = stream.write_all(b"greeting");
                }
                self.accepted.push(Accepted {
                    stream,
                    peer: peer.as_socket().unwrap(),
                    read: vec![],
                    answered: 0,
                    ended: false,
                });
            }
        }
        for accepted in &mut self.accepted {
            accepted.poll(self.engine.is_postgresql());
        }
    }

    /// Asserts that no connection has read what it may not read.
    #[track_caller]
    pub fn assert_tls_only(&mut self) {
        self.poll();
        for accepted in &self.accepted {
            let begins = self.engine.may_read(&accepted.read);
            let read = &accepted.read[..accepted.read.len().min(100)];
            assert!(
                begins,
                "{:?} read {:?}",
                self.engine,
                read.escape_ascii().to_string()
            );
        }
    }

    /// What the connections from this port have read, one after the other.
    pub fn read_from(&mut self, port: u16) -> Vec<Vec<u8>> {
        self.poll();
        let accepted = self.accepted.iter();
        let of_port = accepted.filter(|accepted| accepted.peer.port() == port);
        of_port.map(|accepted| accepted.read.clone()).collect()
    }

    /// Waits until the last connection from this port has read this, and asserts that none has read anything else.
    #[track_caller]
    pub fn wait_for(&mut self, port: u16, expected: &[u8]) {
        self.wait_for_any(port, expected);
        self.assert_tls_only();
    }

    /// Waits until the last connection from this port has read this, whatever it is.
    #[track_caller]
    pub fn wait_for_any(&mut self, port: u16, expected: &[u8]) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let late = Instant::now() > deadline;
            let read = self.read_from(port);
            if read.last().is_some_and(|read| read == expected) {
                return;
            }
            assert!(!late, "{:?} read {}", self.engine, summary(&read));
            thread::sleep(Duration::from_micros(200));
        }
    }

    /// Forgets the connections that ended.
    pub fn forget_ended(&mut self) {
        self.accepted.retain(|accepted| !accepted.ended);
    }

    /// Closes the connections.
    pub fn forget(&mut self) {
        self.poll();
        self.accepted.clear();
    }
}

fn summary(read: &[Vec<u8>]) -> String {
    let one = |read: &Vec<u8>| {
        let beginning = read[..read.len().min(60)].escape_ascii();
        format!("{} bytes: {beginning}", read.len())
    };
    format!("{:?}", read.iter().map(one).collect::<Vec<_>>())
}

impl Accepted {
    fn poll(&mut self, answers: bool) {
        let mut buffer = [0; 16384];
        while !self.ended {
            match self.stream.read(&mut buffer) {
                Ok(0) => self.ended = true,
                Ok(length) => self.read.extend(&buffer[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => self.ended = true,
            }
        }
        // Refuses GSSAPI, takes TLS.
        let requests = self.read.chunks_exact(8).skip(self.answered);
        for request in requests.take_while(|_| answers) {
            let answer: &[u8] = match request {
                SSL_REQUEST => b"S",
                GSSENC_REQUEST => b"N",
                _ => break,
            };
            let _ = self.stream.write_all(answer);
            self.answered += 1;
        }
    }
}
