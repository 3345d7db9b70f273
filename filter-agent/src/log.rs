//! The log: to the journal with its fields where one reads stderr, else as lines on stderr. A reader that stops
//! or ends neither stops nor ends the agent: a thread writes from a bounded queue, and counts what is lost.

mod limits;
pub mod recent;

use std::{
    fmt, io, mem, panic,
    sync::{
        OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use limits::Limits;
use log::{Level, LevelFilter, Record};
use systemd_journal_logger::{JournalLog, connected_to_journal};

use crate::text::written_out;

/// Entries that wait while nobody takes them.
const MAX_QUEUED_ENTRIES: usize = 1024;

/// Time allowed for the rest of the log at shutdown.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Characters of a line of a library's: netlink-proto logs every packet that it cannot read, byte by byte.
const MAX_LIBRARY_LINE: usize = 400;

/// Begins the line by which a command reports its failure.
const NAME: &str = "filter-agent: ";

static QUEUE: OnceLock<SyncSender<Entry>> = OnceLock::new();

/// Queued entries that the thread has not yet written or given up.
static PENDING: AtomicUsize = AtomicUsize::new(0);

/// Entries for which the queue had no room, not yet counted as lost by the thread.
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// A line of the log, with the fields that the journal gets beside it.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    pub level: Level,
    pub text: String,
    /// By their names in the journal: upper case.
    pub fields: Vec<(&'static str, String)>,
    /// Subject of a line that somebody outside can cause again and again.
    pub limited: Option<String>,
}

impl Entry {
    pub fn error(text: impl Into<String>) -> Self {
        Self::new(Level::Error, text)
    }

    pub fn warning(text: impl Into<String>) -> Self {
        Self::new(Level::Warn, text)
    }

    pub fn info(text: impl Into<String>) -> Self {
        Self::new(Level::Info, text)
    }

    fn new(level: Level, text: impl Into<String>) -> Self {
        Self {
            level,
            text: written_out(&text.into()).into_owned(),
            fields: Vec::new(),
            limited: None,
        }
    }

    pub fn with(mut self, field: &'static str, value: impl Into<String>) -> Self {
        self.fields.push((field, value.into()));
        self
    }

    /// Limits lines about `subject`: beyond some a minute they are only counted. Errors are not limited.
    pub fn limited(mut self, subject: impl Into<String>) -> Self {
        if self.level != Level::Error {
            self.limited = Some(subject.into());
        }
        self
    }

    /// Logs it. Never blocks and never panics.
    pub fn log(self) {
        recent::keep(&self);
        let queue = QUEUE.get_or_init(start);
        // Counted before it is queued: the writer must not subtract it first.
        PENDING.fetch_add(1, Ordering::AcqRel);
        if queue.try_send(self).is_err() {
            PENDING.fetch_sub(1, Ordering::AcqRel);
            DROPPED.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.level {
            // The last line of a command.
            _ if self.text.starts_with(NAME) => f.write_str(&self.text),
            Level::Error => write!(f, "error: {}", self.text),
            Level::Warn => write!(f, "warning: {}", self.text),
            _ => f.write_str(&self.text),
        }
    }
}

/// Takes what libraries log as warnings and errors.
struct Libraries;

impl log::Log for Libraries {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= Level::Warn
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let text = format!("{}: {}", record.target(), record.args()).replace('\n', " ");
            let text: String = text.chars().take(MAX_LIBRARY_LINE).collect();
            // Most are about what others sent.
            let library = record.target().split("::").next().unwrap_or_default();
            let entry = Entry {
                limited: Some(format!("library {library}")),
                ..Entry::new(record.level(), text)
            };
            entry.log();
        }
    }

    fn flush(&self) {}
}

/// Sends the warnings and errors of libraries, and panics, to this log.
pub fn install() {
    // Fails where another logger is installed: then that one takes them.
    if log::set_logger(&Libraries).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
    // The standard hook waits for stderr.
    panic::set_hook(Box::new(|panic| {
        Entry::error(panic.to_string().replace('\n', " ")).log();
        flush();
    }));
}

/// Reports the error that a command fails with.
pub fn failure(error: &anyhow::Error) {
    Entry::error(format!("{NAME}{error:#}")).log();
}

/// Waits until the queued entries are written, for a bounded time.
pub fn flush() {
    let deadline = Instant::now() + FLUSH_TIMEOUT;
    while PENDING.load(Ordering::Acquire) > 0 && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(1));
    }
}

fn start() -> SyncSender<Entry> {
    let (queue, entries) = sync_channel(MAX_QUEUED_ENTRIES);
    // Without the thread every entry is lost, and nothing else.
    let _ = thread::Builder::new().name("log".into()).spawn(move || {
        let journal = connected_to_journal()
            .then(|| JournalLog::new().ok())
            .flatten();
        write_entries(
            &entries,
            Writer {
                journal,
                stderr: io::stderr(),
                is_cut: false,
                lost: 0,
                limits: Limits::default(),
            },
        );
    });
    queue
}

fn write_entries(entries: &Receiver<Entry>, mut writer: Writer<impl io::Write>) {
    let mut tried = 0;
    let begun = Instant::now();
    loop {
        for (subject, lines) in writer.limits.end(begun.elapsed()) {
            writer.report_left_out(&subject, lines);
        }
        let mut next = entries.try_recv();
        if let Err(TryRecvError::Empty) = next {
            // Dropped entries are newer than all that were queued before them.
            writer.lost += DROPPED.swap(0, Ordering::Relaxed);
            writer.report_lost();
            PENDING.fetch_sub(mem::take(&mut tried), Ordering::AcqRel);
            let end = writer.limits.next_end();
            let wait = end.map_or(Duration::MAX, |end| end.saturating_sub(begun.elapsed()));
            next = match entries.recv_timeout(wait) {
                Err(RecvTimeoutError::Timeout) => continue,
                received => received.map_err(|_| TryRecvError::Disconnected),
            };
        }
        let Ok(entry) = next else { return };
        tried += 1;
        writer.report_lost();
        if let Some(subject) = &entry.limited
            && !writer.limits.admits(subject, begun.elapsed())
        {
            continue;
        }
        if !writer.write(&entry) {
            writer.lost += 1;
        }
    }
}

struct Writer<W> {
    journal: Option<JournalLog>,
    stderr: W,
    /// Whether the last line was written in part, as on a full disk.
    is_cut: bool,
    /// Entries not yet reported as lost.
    lost: u64,
    limits: Limits,
}

impl<W: io::Write> Writer<W> {
    fn report_lost(&mut self) {
        let lost = self.lost;
        let entry = || Entry::info(format!("{lost} lines of the log were lost"));
        if lost > 0 && self.write(&entry()) {
            self.lost = 0;
        }
    }

    fn report_left_out(&mut self, subject: &str, lines: u64) {
        let entry = Entry::warning(format!(
            "{subject}: {lines} more lines in a minute, left out"
        ));
        if !self.write(&entry) {
            self.lost += 1;
        }
    }

    /// Returns whether the entry was written.
    fn write(&mut self, entry: &Entry) -> bool {
        if let Some(journal) = &self.journal {
            let sent = journal.journal_send(
                &Record::builder()
                    .level(entry.level)
                    .target("filter_agent")
                    .args(format_args!("{}", entry.text))
                    .key_values(&entry.fields.as_slice())
                    .build(),
            );
            if sent.is_ok() {
                return true;
            }
        }
        self.write_line(format!("{entry}\n"))
    }

    /// Writes a line by one call, if the system takes it whole. Returns whether it was written.
    fn write_line(&mut self, mut line: String) -> bool {
        if self.is_cut {
            line.insert(0, '\n');
        }
        let mut left = line.as_bytes();
        while !left.is_empty() {
            match self.stderr.write(left) {
                Ok(length) if length > 0 => {
                    self.is_cut = true;
                    left = &left[length..];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => return false,
            }
        }
        self.is_cut = false;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes some bytes, as a disk that is nearly full.
    struct Disk {
        room: usize,
        content: Vec<u8>,
    }

    impl io::Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.room == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            let length = bytes.len().min(self.room);
            self.room -= length;
            self.content.extend(&bytes[..length]);
            Ok(length)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn line_that_was_cut_ends_before_the_next_one() {
        let mut writer = Writer {
            journal: None,
            stderr: Disk {
                room: 16,
                content: Vec::new(),
            },
            is_cut: false,
            lost: 0,
            limits: Limits::default(),
        };
        assert!(writer.write(&Entry::error("first")));
        assert!(!writer.write(&Entry::info("second")));
        assert!(!writer.write(&Entry::info("third")));
        writer.lost = 2;
        writer.report_lost();
        assert_eq!(writer.lost, 2);
        writer.stderr.room = 1000;
        writer.report_lost();
        assert!(writer.write(&Entry::warning("fourth")));
        assert_eq!(writer.lost, 0);
        let content = String::from_utf8(writer.stderr.content).unwrap();
        assert_eq!(
            content,
            "error: first\nsec\n2 lines of the log were lost\nwarning: fourth\n"
        );
    }
}
