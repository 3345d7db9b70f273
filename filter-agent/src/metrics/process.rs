//! The agent's own process, from /proc, by the names that Prometheus' client libraries agree on.

use jiff::Timestamp;
use procfs::process::{LimitValue, Process};

/// `None`: it cannot be read.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    pub cpu_seconds: Option<f64>,
    pub resident_bytes: Option<u64>,
    pub virtual_bytes: Option<u64>,
    pub threads: Option<i64>,
    pub open_fds: Option<usize>,
    /// The limit; `None` also where there is none.
    pub max_fds: Option<u64>,
    /// In seconds since 1970.
    pub started: f64,
}

impl Usage {
    /// Reads it now. `started`: when the agent started.
    pub fn read(started: Timestamp) -> Self {
        let process = Process::myself().ok();
        let process = process.as_ref();
        let stat = process.and_then(|process| process.stat().ok());
        let stat = stat.as_ref();
        let limits = process.and_then(|process| process.limits().ok());
        Self {
            cpu_seconds: stat
                .map(|stat| (stat.utime + stat.stime) as f64 / procfs::ticks_per_second() as f64),
            resident_bytes: stat.map(|stat| stat.rss * procfs::page_size()),
            virtual_bytes: stat.map(|stat| stat.vsize),
            threads: stat.map(|stat| stat.num_threads),
            open_fds: process.and_then(|process| process.fd_count().ok()),
            max_fds: limits.and_then(|limits| match limits.max_open_files.soft_limit {
                LimitValue::Value(limit) => Some(limit),
                LimitValue::Unlimited => None,
            }),
            started: seconds(started),
        }
    }
}

/// Seconds since 1970.
pub(super) fn seconds(time: Timestamp) -> f64 {
    time.as_millisecond() as f64 / 1000.0
}
