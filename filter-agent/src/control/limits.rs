//! What a client may take: time, bytes and connections.

use std::time::Duration;

/// Time allowed to a client to send its request's head. While it does not, it keeps others waiting.
pub(super) const HEAD_TIMEOUT: Duration = Duration::from_secs(2);

/// Time allowed to a client to send a body, and to read the answer.
pub(super) const CLIENT_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest head of a request, in bytes; the HTTP crate takes no less than half of it.
pub(super) const MAX_HEAD: usize = 16 << 10;

/// Longest description of a change, in bytes.
pub(super) const MAX_CHANGE: usize = 8 << 10;

/// Pause after an error of `accept`, such as no descriptor left.
pub(super) const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What all clients of a socket together may take.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    /// Connections at a time. More wait: descriptors for the checks must be left.
    pub(super) connections: usize,
    /// Requests that are answered at a time, from their head until their client has the whole answer, which may be as long
    /// as the largest region.
    pub(super) requests: usize,
    /// Time allowed to a client to read its answer, while others may wait for its turn.
    pub(super) reading: Duration,
}

/// Of root's.
pub(super) const CONTROL: Limits = Limits {
    connections: 32,
    requests: 32,
    reading: CLIENT_TIMEOUT,
};

/// Of the group's, apart from those: what its members open and ask for keeps no command of root's waiting for long.
pub(super) const STATUS: Limits = Limits {
    connections: 16,
    requests: 4,
    reading: Duration::from_secs(2),
};

/// Time allowed to a client to read an answer that is longer than others, since it takes its time.
#[derive(Clone)]
pub(super) struct AnswerTime(pub(super) Duration);
