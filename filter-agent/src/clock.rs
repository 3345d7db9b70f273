//! The clock: time since boot, which no setting of the host's clock changes, as dates.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// Time since boot, suspended or not (CLOCK_BOOTTIME): the clock of the packet path, too.
pub fn since_boot() -> Duration {
    let time = clock_gettime(ClockId::Boottime);
    // Never negative.
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Nanoseconds since boot, suspended or not: as the packet path reads them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(transparent)]
pub struct BootTime(pub u64);

impl BootTime {
    pub fn now() -> Self {
        Self::default().after(since_boot())
    }

    pub fn after(self, time: Duration) -> Self {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        Self(self.0.saturating_add(nanoseconds))
    }

    /// Time from `earlier` on; zero where that is later.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// When a change was accepted.
#[derive(Clone, Copy, Debug)]
pub struct Accepted {
    /// By the host's clock, for people.
    pub at: Timestamp,
    since: BootTime,
}

impl Accepted {
    pub fn now() -> Self {
        Self {
            at: Timestamp::now(),
            since: BootTime::now(),
        }
    }

    /// Milliseconds from then until now.
    pub fn elapsed_ms(&self) -> f64 {
        BootTime::now().since(self.since).as_secs_f64() * 1000.0
    }
}

impl From<Now> for Accepted {
    fn from(now: Now) -> Self {
        Self {
            at: now.wall,
            since: now.boot,
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Clock {
    boot: Timestamp,
}

/// An instant, by both clocks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Now {
    /// Ends of rules go by it.
    pub boot: BootTime,
    /// Time since boot, counted from the date of the boot as the host's clock had it at the start. Only runs.
    /// Regions, retries and time limits go by it.
    pub steady: Timestamp,
    /// The host's clock, which can be set. Dates that people write go by it.
    pub wall: Timestamp,
}

impl Clock {
    pub fn start() -> Self {
        let now = Timestamp::now();
        Self {
            boot: now.checked_sub(since_boot()).unwrap_or(now),
        }
    }

    pub fn now(&self) -> Now {
        let since_boot = since_boot();
        Now {
            boot: BootTime::default().after(since_boot),
            steady: self.boot + since_boot,
            wall: Timestamp::now(),
        }
    }
}

impl Now {
    /// The date that the host's clock gives to an instant of the steady clock.
    pub fn on_host(&self, steady: Timestamp) -> Timestamp {
        let set: SignedDuration = self.wall.duration_since(self.steady);
        steady.checked_add(set).unwrap_or(steady)
    }

    /// The time since boot at a date of the host's clock: zero for one before the boot.
    pub fn boot_time_of(&self, date: Timestamp) -> BootTime {
        let left = date.as_nanosecond() - self.wall.as_nanosecond();
        let nanoseconds = i128::from(self.boot.0).saturating_add(left);
        BootTime(nanoseconds.clamp(0, u64::MAX.into()) as u64)
    }

    /// The date of the host's clock at a time since boot.
    pub fn date_of(&self, time: BootTime) -> Timestamp {
        let left = i128::from(time.0) - i128::from(self.boot.0);
        let date = Timestamp::from_nanosecond(self.wall.as_nanosecond() + left);
        date.unwrap_or(Timestamp::MAX)
    }
}

/// The kernel's id of this boot.
pub fn boot_id() -> Option<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(steady: i64, wall: i64) -> Now {
        let at = |seconds| Timestamp::from_second(seconds).unwrap();
        Now {
            boot: BootTime(steady as u64 * 1_000_000_000),
            steady: at(steady),
            wall: at(wall),
        }
    }

    #[test]
    fn steady_clock_runs_and_names_dates_of_the_host() {
        let clock = Clock::start();
        let (first, second) = (clock.now(), clock.now());
        assert!(second.steady >= first.steady);
        let now = at(100, 4000);
        assert_eq!(now.on_host(at(90, 0).steady).as_second(), 3990);
        for (date, time) in [(4010, 110), (3990, 90), (3900, 0)] {
            let date = at(0, date).wall;
            assert_eq!(now.boot_time_of(date).0, time * 1_000_000_000);
        }
        assert_eq!(now.boot_time_of(Timestamp::MIN).0, 0);
        assert_eq!(now.date_of(at(110, 0).boot), at(0, 4010).wall);
        // Later than the clock runs.
        assert_eq!(now.boot_time_of(Timestamp::MAX).0, u64::MAX);
    }
}
