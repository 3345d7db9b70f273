//! Clients that connect again and again, while something else changes.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::net::{
    clients::bound,
    namespace::{Namespace, enter},
    wait::PATIENCE,
};

/// Clients that connect without a pause until they are stopped.
pub struct Hammer {
    stop: Arc<AtomicBool>,
    attempts: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Hammer {
    /// Connects from each source again and again, each time with a question and an answer.
    ///
    /// # Panics
    /// When stopped, if a connection failed.
    pub fn allowed(client: &Namespace, attempts: &[(IpAddr, SocketAddr)]) -> Self {
        Self::start(client, attempts, |source, destination| {
            let socket = bound(source);
            socket.set_linger(Some(Duration::ZERO)).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            let connected = socket.connect_timeout(&destination.into(), PATIENCE);
            connected.unwrap_or_else(|e| panic!("connect from {source} to {destination}: {e}"));
            let mut stream = TcpStream::from(socket);
            stream.write_all(b"ping").unwrap();
            let mut answer = [0; 4];
            stream.read_exact(&mut answer).unwrap();
        })
    }

    /// Tries to connect from each source again and again.
    ///
    /// # Panics
    /// When stopped, if any attempt was answered.
    pub fn denied(client: &Namespace, attempts: &[(IpAddr, SocketAddr)]) -> Self {
        Self::start(client, attempts, |source, destination| {
            let brief = Duration::from_millis(3);
            let error = bound(source).connect_timeout(&destination.into(), brief);
            let error = error.expect_err("a source that is not allowed connected");
            assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        })
    }

    fn start(
        client: &Namespace,
        attempts: &[(IpAddr, SocketAddr)],
        attempt: impl Fn(IpAddr, SocketAddr) + Copy + Send + 'static,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let made = Arc::new(AtomicU64::new(0));
        let threads = attempts.iter().map(|&(source, destination)| {
            let (stop, made) = (stop.clone(), made.clone());
            let name = client.name.clone();
            thread::spawn(move || {
                enter(&name);
                while !stop.load(Ordering::Relaxed) {
                    attempt(source, destination);
                    made.fetch_add(1, Ordering::Relaxed);
                }
            })
        });
        Self {
            threads: threads.collect(),
            attempts: made,
            stop,
        }
    }

    /// The number of attempts so far, of all sources together.
    pub fn attempts(&self) -> u64 {
        self.attempts.load(Ordering::Relaxed)
    }

    /// Whether a thread has panicked: it makes no more attempts.
    pub fn failed(&self) -> bool {
        self.threads.iter().any(JoinHandle::is_finished)
    }

    pub fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("a client failed");
        }
    }
}

/// Calls a closure with 0, 1 and so on: `least` times, and on until each hammer has made so many
/// attempts, however slow the machine is.
pub fn under_load(least: usize, hammers: &[(&Hammer, u64)], mut round: impl FnMut(usize)) {
    let deadline = Instant::now() + PATIENCE;
    for number in 0.. {
        let enough = hammers
            .iter()
            .all(|(hammer, least)| hammer.attempts() >= *least);
        let failed = hammers.iter().any(|(hammer, _)| hammer.failed());
        if number >= least && (enough || failed) {
            break;
        }
        assert!(
            number < least || Instant::now() < deadline,
            "the clients make no attempts"
        );
        round(number);
    }
}
