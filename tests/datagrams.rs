//! Datagrams that show what passes the filter, all the time and at one moment.
//!
//! Two threads: one sends, in the client's namespace, from sources that must always pass or never;
//! one receives, in the database host's. Both count, so that a lost one is noticed.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::AsFd as _,
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{setsockopt, sockopt},
};

use crate::net::{CLIENT4, DB4, DB6, Net, PATIENCE};

/// A port that no policy guards: what arrives there shows that all that was sent before has arrived.
const FENCE: u16 = 9;
/// Time between two datagrams of one source.
const PACE: Duration = Duration::from_millis(1);
/// Fences that are sent before a datagram counts as dropped: the interface has several queues, in one of
/// which it can be late.
const ATTEMPTS: u32 = 2;
/// Room for what arrives while the machine is too busy to receive it.
const BUFFER: usize = 8 << 20;

/// Sends and receives until dropped.
pub struct Datagrams {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    sources: BTreeMap<IpAddr, UdpSocket>,
    fence: UdpSocket,
    port: u16,
}

struct Shared {
    state: Mutex<State>,
    fenced: Condvar,
}

#[derive(Default)]
struct State {
    stop: bool,
    /// Nothing is sent all the time meanwhile.
    paused: bool,
    /// By source, of what is sent all the time.
    sent: BTreeMap<IpAddr, u64>,
    received: BTreeMap<IpAddr, u64>,
    /// By source.
    arrivals: BTreeMap<IpAddr, Arrivals>,
    /// The highest number that came through the fence.
    fence: u64,
    next_fence: u64,
}

/// Datagrams of one source since the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Passed {
    pub sent: u64,
    pub received: u64,
}

/// The first and the last arrival of a source's datagrams.
#[derive(Clone, Copy, Debug)]
pub struct Arrivals {
    pub first: Instant,
    pub last: Instant,
}

impl Datagrams {
    /// `steady`: sources that send all the time. `others`: those that `passes` can ask about as well.
    pub fn start(net: &Net, port: u16, steady: &[IpAddr], others: &[IpAddr]) -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            fenced: Condvar::new(),
        });
        let sockets = net.db.run(|| [port, FENCE].map(receiving));
        let receiver = thread::spawn({
            let shared = shared.clone();
            move || receive(&sockets, &shared)
        });
        let bind = |source: &IpAddr| {
            let socket = net.client.run(|| UdpSocket::bind((*source, 0)).unwrap());
            (*source, socket)
        };
        let sending: BTreeMap<IpAddr, UdpSocket> = steady.iter().map(bind).collect();
        let sender = thread::spawn({
            let shared = shared.clone();
            move || send(&sending, port, &shared)
        });
        Self {
            shared,
            threads: vec![receiver, sender],
            sources: others.iter().map(bind).collect(),
            fence: bind(&CLIENT4.into()).1,
            port,
        }
    }

    /// What of a steady source passed since the last look.
    pub fn look(&self) -> BTreeMap<IpAddr, Passed> {
        let mut state = self.shared.state();
        state.paused = true;
        for _ in 0..ATTEMPTS {
            state = self.wait_for_fence(state);
        }
        state.paused = false;
        let sent = std::mem::take(&mut state.sent);
        let mut received = std::mem::take(&mut state.received);
        let passed = |(source, sent)| {
            let received = received.remove(&source).unwrap_or(0);
            (source, Passed { sent, received })
        };
        sent.into_iter().map(passed).collect()
    }

    /// Counts arrivals from now on only.
    pub fn forget_arrivals(&self) {
        self.shared.state().arrivals.clear();
    }

    /// `None`: nothing of the source arrived.
    pub fn arrivals(&self, source: IpAddr) -> Option<Arrivals> {
        self.shared.state().arrivals.get(&source).copied()
    }

    /// Whether a source passes now.
    pub fn passes(&self, source: IpAddr) -> bool {
        let socket = &self.sources[&source];
        (0..ATTEMPTS).any(|_| {
            let mut state = self.shared.state();
            state.received.remove(&source);
            socket
                .send_to(&[0; 8], destination(source, self.port))
                .unwrap();
            state = self.wait_for_fence(state);
            state.received.contains_key(&source)
        })
    }

    fn wait_for_fence<'a>(&self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.next_fence += 1;
        let number = state.next_fence;
        let deadline = Instant::now() + PATIENCE;
        let to = destination(CLIENT4.into(), FENCE);
        while state.fence < number {
            assert!(Instant::now() < deadline, "the link does not deliver");
            self.fence.send_to(&number.to_be_bytes(), to).unwrap();
            let again = Duration::from_millis(100);
            state = self.shared.fenced.wait_timeout(state, again).unwrap().0;
        }
        state
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

impl Drop for Datagrams {
    fn drop(&mut self) {
        self.shared.state().stop = true;
        for thread in self.threads.drain(..) {
            let ended = thread.join();
            assert!(thread::panicking() || ended.is_ok(), "a client failed");
        }
    }
}

fn receiving(port: u16) -> UdpSocket {
    let socket = UdpSocket::bind(("::", port)).unwrap();
    setsockopt(&socket, sockopt::RcvBufForce, &BUFFER).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket
}

fn destination(source: IpAddr, port: u16) -> SocketAddr {
    let host = if source.is_ipv4() {
        DB4.into()
    } else {
        DB6.into()
    };
    SocketAddr::new(host, port)
}

fn send(sources: &BTreeMap<IpAddr, UdpSocket>, port: u16, shared: &Shared) {
    loop {
        {
            let mut state = shared.state();
            if state.stop {
                return;
            }
            let pausing = state.paused;
            for (source, socket) in sources.iter().filter(|_| !pausing) {
                socket.send_to(&[0; 8], destination(*source, port)).unwrap();
                *state.sent.entry(*source).or_default() += 1;
            }
        }
        thread::sleep(PACE);
    }
}

fn receive(sockets: &[UdpSocket; 2], shared: &Shared) {
    let [guarded, fence] = sockets;
    let mut buffer = [0; 8];
    loop {
        let mut fds = [guarded, fence].map(|s| PollFd::new(s.as_fd(), PollFlags::POLLIN));
        poll(&mut fds, PollTimeout::from(50_u8)).unwrap();
        // First the fence: what came before it is in the other buffer by now.
        let mut number = None;
        while fence.recv(&mut buffer).is_ok() {
            number = Some(u64::from_be_bytes(buffer));
        }
        let mut arrived: BTreeMap<IpAddr, u64> = BTreeMap::new();
        while let Ok((_, source)) = guarded.recv_from(&mut buffer) {
            *arrived.entry(source.ip().to_canonical()).or_default() += 1;
        }
        let now = Instant::now();
        let mut state = shared.state();
        for (source, count) in arrived {
            let arrivals = state.arrivals.entry(source);
            let first = now;
            arrivals.or_insert(Arrivals { first, last: now }).last = now;
            *state.received.entry(source).or_default() += count;
        }
        if let Some(number) = number {
            state.fence = state.fence.max(number);
            shared.fenced.notify_all();
        }
        if state.stop {
            return;
        }
    }
}
