//! Limits lines that somebody outside can cause again and again, such as the answers of a name server. Pure.

use std::{collections::BTreeMap, time::Duration};

/// Lines about one thing that are written within `WINDOW`. The rest are counted.
const MAX_LINES: u32 = 20;
const WINDOW: Duration = Duration::from_mins(1);

/// Times are since any fixed moment.
#[derive(Debug, Default)]
pub(super) struct Limits {
    windows: BTreeMap<String, Window>,
}

#[derive(Debug)]
struct Window {
    end: Duration,
    lines: u32,
    left_out: u64,
}

impl Limits {
    /// Whether a line about `subject` is written. Windows that are over are to be ended before.
    pub(super) fn admits(&mut self, subject: &str, now: Duration) -> bool {
        let window = self.windows.entry(subject.to_owned()).or_insert(Window {
            end: now + WINDOW,
            lines: 0,
            left_out: 0,
        });
        if window.lines == MAX_LINES {
            window.left_out += 1;
            return false;
        }
        window.lines += 1;
        true
    }

    /// Ends the windows that are over. Returns the subjects of which lines were left out, and how many.
    pub(super) fn end(&mut self, now: Duration) -> Vec<(String, u64)> {
        let over = self.windows.extract_if(.., |_, window| window.end <= now);
        over.filter(|(_, window)| window.left_out > 0)
            .map(|(subject, window)| (subject, window.left_out))
            .collect()
    }

    /// When lines that were left out are to be reported next.
    pub(super) fn next_end(&self) -> Option<Duration> {
        let windows = self.windows.values();
        let full = windows.filter(|window| window.left_out > 0);
        full.map(|window| window.end).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flood_of_lines_is_counted_and_hides_no_other_subject() {
        let mut limits = Limits::default();
        let second = Duration::from_secs;
        let mut written = 0;
        for time in 0..50 {
            for _ in 0..10 {
                written += u32::from(limits.admits("region x", second(time)));
            }
        }
        assert_eq!(written, MAX_LINES);
        assert!(limits.admits("region y", second(50)));
        assert_eq!(limits.next_end(), Some(WINDOW));
        assert_eq!(limits.end(second(59)), []);
        let left_out = vec![("region x".to_owned(), 500 - u64::from(MAX_LINES))];
        assert_eq!(limits.end(second(60)), left_out);
        assert_eq!(limits.next_end(), None);
        // A new window.
        assert!(limits.admits("region x", second(61)));
        // Nothing is remembered of subjects that are quiet.
        assert_eq!(limits.end(second(200)), []);
        assert!(limits.windows.is_empty());
    }
}
