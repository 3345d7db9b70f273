//! The clock: time since boot, which no setting of the host's clock changes, as dates.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use rustix::time::{ClockId, clock_gettime};

/// Time since boot, suspended or not (CLOCK_BOOTTIME): the clock of the packet path, too.
pub fn since_boot() -> Duration {
    let time = clock_gettime(ClockId::Boottime);
    // Never negative.
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[derive(Clone, Copy, Debug)]
pub struct Clock {
    boot: Timestamp,
}

/// An instant, by both clocks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Now {
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
        Now {
            steady: self.boot + since_boot(),
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
}

/// The clock by which rules end: a host's clock that is set back does not make an end later, one that is set
/// forward makes it earlier.
#[derive(Clone, Copy, Debug)]
pub struct Ends {
    at: Now,
}

impl Ends {
    /// Goes by the host's clock from now on.
    pub fn start(now: Now) -> Self {
        Self { at: now }
    }

    pub fn now(&mut self, now: Now) -> Timestamp {
        let passed = now.steady.duration_since(self.at.steady);
        let ran = self.at.wall.checked_add(passed).unwrap_or(self.at.wall);
        self.at = Now {
            steady: now.steady,
            wall: ran.max(now.wall),
        };
        self.at.wall
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(steady: i64, wall: i64) -> Now {
        let at = |seconds| Timestamp::from_second(seconds).unwrap();
        Now {
            steady: at(steady),
            wall: at(wall),
        }
    }

    #[test]
    fn clock_that_is_set_back_or_forward_never_makes_an_end_later() {
        let mut ends = Ends::start(at(100, 1000));
        assert_eq!(ends.now(at(110, 1010)).as_second(), 1010);
        // Set back by an hour: the end comes as it would have.
        assert_eq!(ends.now(at(120, 1020 - 3600)).as_second(), 1020);
        // Set forward by a day, and right again: what ended stays ended.
        assert_eq!(ends.now(at(130, 1030 + 86400)).as_second(), 1030 + 86400);
        assert_eq!(ends.now(at(140, 1040)).as_second(), 1040 + 86400);
        assert_eq!(
            Ends::start(at(150, 1050)).now(at(150, 1050)).as_second(),
            1050
        );
    }

    #[test]
    fn steady_clock_runs_and_names_dates_of_the_host() {
        let clock = Clock::start();
        let (first, second) = (clock.now(), clock.now());
        assert!(second.steady >= first.steady);
        let now = at(100, 4000);
        assert_eq!(now.on_host(at(90, 0).steady).as_second(), 3990);
    }
}
