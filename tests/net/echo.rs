//! Servers that send back what they receive.

use std::{
    io,
    net::{Shutdown, TcpListener, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use socket2::SockRef;

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
