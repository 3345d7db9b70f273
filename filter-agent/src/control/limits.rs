//! What a client may take: time, bytes and connections.

use std::time::Duration;

/// Time allowed to a client to send its request's head. While it does not, it keeps others waiting.
pub(super) const HEAD_TIMEOUT: Duration = Duration::from_secs(2);

/// Time allowed to a client to send a body, and to read the answer.
pub(super) const CLIENT_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest description of a change, in bytes.
pub(super) const MAX_CHANGE: usize = 8 << 10;

/// Pause after an error of `accept`, such as no descriptor left.
pub(super) const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Connections of the control socket at a time. More wait: descriptors for the checks must be left.
pub(super) const CONTROL_CONNECTIONS: usize = 32;

/// Time allowed to a client to read an answer that is longer than others, since it takes its time.
#[derive(Clone)]
pub(super) struct AnswerTime(pub(super) Duration);
