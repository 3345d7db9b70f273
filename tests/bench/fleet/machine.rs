//! What else the machine does, and what this process takes of it.

use std::{fs, thread::sleep, time::Duration};

use anyhow::{Context as _, Result};
use nix::time::{ClockId, clock_gettime};

/// The share of all processors that is in use while this process sleeps.
pub fn taken_by_others(time: Duration) -> Result<f64> {
    let before = ticks()?;
    sleep(time);
    let after = ticks()?;
    let (busy, all) = (after.0 - before.0, after.1 - before.1);
    Ok(busy / all.max(1.0))
}

/// Ticks of all processors in use, and all ticks.
fn ticks() -> Result<(f64, f64)> {
    let text = fs::read_to_string("/proc/stat")?;
    let line = text.lines().next().context("read /proc/stat")?;
    let fields = line.split_whitespace().skip(1).take(8);
    let ticks: Vec<f64> = fields.map(str::parse).collect::<Result<_, _>>()?;
    let all: f64 = ticks.iter().sum();
    // idle and iowait
    Ok((all - ticks[3] - ticks[4], all))
}

/// Of all threads, those that ended too.
pub fn own_processor_time() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)?.into())
}
