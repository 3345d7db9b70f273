//! The last lines of the log, for `GET /events`.

use std::{
    collections::VecDeque,
    sync::{LazyLock, Mutex, MutexGuard, PoisonError},
};

use jiff::Timestamp;
use log::Level;

use super::Entry;
use crate::report::{Events, Logged};

/// Lines that are kept.
const MAX_LINES: usize = 200;

/// Longest text and field that is kept, in bytes; the log itself has the whole of it.
const MAX_LENGTH: usize = 2000;

static RECENT: LazyLock<Mutex<Recent>> = LazyLock::new(|| {
    Mutex::new(Recent {
        since: Timestamp::now(),
        last: 0,
        lines: VecDeque::new(),
    })
});

struct Recent {
    since: Timestamp,
    /// Number of the last line.
    last: u64,
    lines: VecDeque<Logged>,
}

/// Keeps a line that is about to be queued, whether or not the queue has room for it.
pub(super) fn keep(entry: &Entry) {
    lock().keep(entry, Timestamp::now());
}

/// The lines that are kept and have a higher number.
pub fn after(number: u64) -> Events {
    lock().after(number)
}

/// Nothing that holds the lock can panic or wait.
fn lock() -> MutexGuard<'static, Recent> {
    RECENT.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Recent {
    fn keep(&mut self, entry: &Entry, at: Timestamp) {
        self.last += 1;
        if self.lines.len() == MAX_LINES {
            self.lines.pop_front();
        }
        let level = match entry.level {
            Level::Error => "error",
            Level::Warn => "warning",
            _ => "info",
        };
        let fields = entry.fields.iter();
        self.lines.push_back(Logged {
            number: self.last,
            at,
            level: level.into(),
            text: shortened(&entry.text),
            fields: fields
                .map(|(name, value)| ((*name).to_owned(), shortened(value)))
                .collect(),
        });
    }

    fn after(&self, number: u64) -> Events {
        let lines = self.lines.iter();
        Events {
            since: self.since,
            events: lines.filter(|line| line.number > number).cloned().collect(),
        }
    }
}

fn shortened(text: &str) -> String {
    match text.len() > MAX_LENGTH {
        true => format!("{}...", &text[..text.floor_char_boundary(MAX_LENGTH)]),
        false => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_lines_are_kept_and_numbered() {
        let mut recent = Recent {
            since: Timestamp::UNIX_EPOCH,
            last: 0,
            lines: VecDeque::new(),
        };
        assert!(recent.after(0).events.is_empty());
        for number in 1..=250 {
            let entry = Entry::warning(format!("line {number}")).with("REGION", "osc-fr1");
            recent.keep(&entry, Timestamp::UNIX_EPOCH);
        }
        let all = recent.after(0).events;
        assert_eq!(all.len(), MAX_LINES);
        assert_eq!((all[0].number, &*all[0].text), (51, "line 51"));
        let newer = recent.after(248).events;
        assert_eq!(newer.len(), 2);
        let last = &newer[1];
        assert_eq!((last.number, &*last.level), (250, "warning"));
        assert_eq!(last.fields["REGION"], "osc-fr1");
        assert!(recent.after(250).events.is_empty());
    }

    #[test]
    fn long_line_is_cut_between_characters() {
        let text = shortened(&"\u{20ac}".repeat(1000));
        assert_eq!(text, format!("{}...", "\u{20ac}".repeat(666)));
        assert_eq!(shortened("short"), "short");
    }
}
