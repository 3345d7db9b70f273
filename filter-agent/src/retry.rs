//! A change that the kernel refused, and when it is tried again. Pure.

use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBuilder};
use jiff::Timestamp;

/// Pauses before a change that the kernel refused is tried again.
const FIRST_PAUSE: Duration = Duration::from_secs(10);
const LONGEST_PAUSE: Duration = Duration::from_mins(5);

#[derive(Debug)]
pub struct Retry {
    pub error: String,
    pub next: Timestamp,
    /// Whether the maps hold something else than what they held before.
    pub not_taken_back: bool,
    failures: usize,
}

impl Retry {
    /// The pause grows with each failure. `before`: the retry that failed now.
    pub fn after(
        before: Option<&Self>,
        error: String,
        not_taken_back: bool,
        now: Timestamp,
    ) -> Self {
        let failures = before.map_or(0, |before| before.failures);
        let mut pauses = ExponentialBuilder::new()
            .with_min_delay(FIRST_PAUSE)
            .with_max_delay(LONGEST_PAUSE)
            .without_max_times()
            .build();
        // Past the longest pause one more changes nothing.
        let pause = pauses.nth(failures.min(16)).unwrap_or(LONGEST_PAUSE);
        Self {
            error,
            next: now + pause.min(LONGEST_PAUSE),
            not_taken_back: not_taken_back || before.is_some_and(|before| before.not_taken_back),
            failures: failures + 1,
        }
    }
}
