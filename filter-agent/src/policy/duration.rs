//! Durations as the policy spells them.

use std::time::Duration;

use jiff::SignedDuration;

/// Spells a duration as the policy does: `1h 30m`.
pub fn spelled(duration: Duration) -> String {
    let signed = SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX);
    format!("{signed:#}")
}
