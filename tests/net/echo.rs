//! Servers that send back what they receive, and their clients.

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use socket2::SockRef;

use crate::net::{Net, PATIENCE, bound};

/// A TCP server that answers every byte with itself, until dropped.
pub struct Echo {
    listener: TcpListener,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    pub(super) fn start(listener: TcpListener) -> Self {
        let accepting = listener.try_clone().unwrap();
        let thread = thread::spawn(move || {
            while let Ok((stream, _)) = accepting.accept() {
                thread::spawn(move || io::copy(&mut &stream, &mut &stream));
            }
        });
        Self {
            listener,
            thread: Some(thread),
        }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        // Wakes the thread up from `accept`.
        let _ = SockRef::from(&self.listener).shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A UDP server that answers every datagram with itself, until dropped.
pub struct EchoDatagrams {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl EchoDatagrams {
    pub(super) fn start(socket: UdpSocket) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let interval = Some(Duration::from_millis(50));
        socket.set_read_timeout(interval).unwrap();
        let thread = thread::spawn(move || {
            let mut datagram = [0; 2048];
            while !stopped.load(Ordering::Relaxed) {
                if let Ok((length, source)) = socket.recv_from(&mut datagram) {
                    let _ = socket.send_to(&datagram[..length], source);
                }
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for EchoDatagrams {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A connection to a server that echoes.
pub struct EchoClient(TcpStream);

impl EchoClient {
    pub fn open(net: &Net, source: IpAddr, server: SocketAddr) -> Self {
        let socket = net.client.run(|| bound(source));
        let connected = socket.connect_timeout(&server.into(), PATIENCE);
        connected.unwrap_or_else(|error| panic!("connect from {source}: {error}"));
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(socket.into())
    }

    /// Sends without waiting: where packets are dropped, the kernel repeats it.
    pub fn send(&mut self) {
        self.0.write_all(b"ping").unwrap();
    }

    #[track_caller]
    pub fn assert_answered(&mut self) {
        let mut answer = [0; 4];
        self.0.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"ping");
    }

    #[track_caller]
    pub fn assert_alive(&mut self) {
        self.send();
        self.assert_answered();
    }

    /// Nothing arrives from the server's host, no reset either.
    #[track_caller]
    pub fn assert_still(&mut self) {
        self.0.set_nonblocking(true).unwrap();
        let error = self.0.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}");
        self.0.set_nonblocking(false).unwrap();
    }

    /// Waits for the server's host to reset it.
    #[track_caller]
    pub fn assert_reset(&mut self) {
        let error = self.0.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
    }
}
