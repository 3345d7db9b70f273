//! Waits for what must happen, for a bounded time.

use std::{
    process::{Child, ExitStatus},
    thread,
    time::{Duration, Instant},
};

/// Limit of every wait for something that must happen: so long that a busy machine does not reach it.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// Whether a condition comes true within `PATIENCE`.
pub fn wait_until(mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if condition() {
            return true;
        }
        thread::sleep(Duration::from_millis(5));
    }
    condition()
}

/// Waits for a process to end, for a bounded time.
pub fn wait(child: &mut Child) -> Option<ExitStatus> {
    let mut status = None;
    wait_until(|| {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    status
}
