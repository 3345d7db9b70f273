//! The log on stderr. A reader that stops or ends neither stops nor ends the agent: a thread writes
//! lines from a bounded queue, and counts those that are lost.

use std::{
    io, mem, panic,
    sync::{
        OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
        mpsc::{Receiver, SyncSender, TryRecvError, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

/// Lines that wait while stderr takes none.
const MAX_QUEUED_LINES: usize = 1024;

/// Time allowed for the rest of the log at shutdown.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

static QUEUE: OnceLock<SyncSender<String>> = OnceLock::new();

/// Queued lines that the thread has not yet written or given up.
static PENDING: AtomicUsize = AtomicUsize::new(0);

/// Lines for which the queue had no room, not yet counted as lost by the thread.
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Logs a line. Never blocks and never panics.
pub fn log(line: &str) {
    let queue = QUEUE.get_or_init(start);
    // Counted before it is queued: the writer must not subtract it first.
    PENDING.fetch_add(1, Ordering::AcqRel);
    if queue.try_send(format!("{line}\n")).is_err() {
        PENDING.fetch_sub(1, Ordering::AcqRel);
        DROPPED.fetch_add(1, Ordering::Relaxed);
    }
}

/// Waits until the queued lines are written, for a bounded time.
pub fn flush() {
    let deadline = Instant::now() + FLUSH_TIMEOUT;
    while PENDING.load(Ordering::Acquire) > 0 && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(1));
    }
}

fn start() -> SyncSender<String> {
    let (queue, lines) = sync_channel(MAX_QUEUED_LINES);
    // Without the thread every line is lost, and nothing else.
    let _ = thread::Builder::new()
        .name("log".into())
        .spawn(move || write_lines(&lines, io::stderr()));
    // The standard hook waits for stderr.
    panic::set_hook(Box::new(|panic| {
        log(&panic.to_string().replace('\n', " "));
        flush();
    }));
    queue
}

fn write_lines(lines: &Receiver<String>, stderr: impl io::Write) {
    let mut writer = Writer {
        stderr,
        is_cut: false,
        lost: 0,
    };
    let mut tried = 0;
    loop {
        let mut next = lines.try_recv();
        if next == Err(TryRecvError::Empty) {
            // Dropped lines are newer than all that were queued before them.
            writer.lost += DROPPED.swap(0, Ordering::Relaxed);
            writer.report_lost();
            PENDING.fetch_sub(mem::take(&mut tried), Ordering::AcqRel);
            next = lines.recv().map_err(TryRecvError::from);
        }
        let Ok(line) = next else { return };
        tried += 1;
        writer.report_lost();
        if !writer.write(line) {
            writer.lost += 1;
        }
    }
}

struct Writer<W> {
    stderr: W,
    /// Whether the last line was written in part, as on a full disk.
    is_cut: bool,
    /// Lines not yet reported as lost.
    lost: u64,
}

impl<W: io::Write> Writer<W> {
    fn report_lost(&mut self) {
        let lost = self.lost;
        if lost > 0 && self.write(format!("{lost} lines of the log were lost\n")) {
            self.lost = 0;
        }
    }

    /// Writes a line by one call, if the system takes it whole. Returns whether it was written.
    fn write(&mut self, mut line: String) -> bool {
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
            stderr: Disk {
                room: 9,
                content: Vec::new(),
            },
            is_cut: false,
            lost: 0,
        };
        assert!(writer.write("first\n".into()));
        assert!(!writer.write("second\n".into()));
        assert!(!writer.write("third\n".into()));
        writer.lost = 2;
        writer.report_lost();
        assert_eq!(writer.lost, 2);
        writer.stderr.room = 1000;
        writer.report_lost();
        assert!(writer.write("fourth\n".into()));
        assert_eq!(writer.lost, 0);
        let content = String::from_utf8(writer.stderr.content).unwrap();
        assert_eq!(
            content,
            "first\nsec\n2 lines of the log were lost\nfourth\n"
        );
    }
}
