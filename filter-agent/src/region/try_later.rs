//! Servers that refuse requests until some time: how they name it. Pure.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use jiff::{Timestamp, Unit};
use reqwest::{
    StatusCode,
    header::{self, HeaderMap},
};

/// Longest wait that a server is granted.
const MAX_WAIT: Duration = Duration::from_hours(24);

/// A number of seconds from here on is a date: seconds since 1970. Servers write both in the same headers.
const LEAST_DATE: u64 = 1_000_000_000;

/// The error of a look-up that a server refused until some time.
#[derive(Debug, PartialEq)]
pub struct TryLater {
    status: StatusCode,
    /// By the host's clock.
    until: Timestamp,
    wait: Duration,
}

impl TryLater {
    /// From a response that is not a list. `None`: it names no time to come.
    pub fn read(status: StatusCode, headers: &HeaderMap, now: SystemTime) -> Option<Self> {
        let text = |name: &str| headers.get(name)?.to_str().ok().map(str::trim);
        let date = |text: &str| httpdate::parse_http_date(text).ok();
        // The server's dates go by its own clock.
        let server_now = text(header::DATE.as_str()).and_then(date).unwrap_or(now);
        let until = |date: SystemTime| date.duration_since(server_now).ok();
        let seconds = |text: &str| {
            let seconds = text.parse().ok()?;
            let duration = Duration::from_secs(seconds);
            if seconds < LEAST_DATE {
                return Some(duration);
            }
            until(SystemTime::UNIX_EPOCH.checked_add(duration)?)
        };
        let retry_after = text(header::RETRY_AFTER.as_str());
        let retry_after = retry_after.and_then(|text| match text.parse() {
            Ok(delay) => Some(Duration::from_secs(delay)),
            Err(_) => until(date(text)?),
        });
        // GitHub's, and those of a draft of the IETF (draft-ietf-httpapi-ratelimit-headers-06).
        let resets = ["x-ratelimit", "ratelimit"].map(|prefix| {
            let is_used_up = text(&format!("{prefix}-remaining")) == Some("0");
            let reset = text(&format!("{prefix}-reset")).filter(|_| is_used_up);
            reset.and_then(seconds)
        });
        let wait = resets.into_iter().chain([retry_after]).flatten().max()?;
        (!wait.is_zero()).then(|| Self {
            status,
            until: instant(now, wait),
            wait,
        })
    }

    /// How long to wait from the response on.
    pub fn wait(&self) -> Duration {
        self.wait.min(MAX_WAIT)
    }
}

/// To the second; the last instant there is, for a wait that is longer.
fn instant(now: SystemTime, wait: Duration) -> Timestamp {
    let until = now.checked_add(wait).map(Timestamp::try_from);
    let until = until.and_then(Result::ok).unwrap_or(Timestamp::MAX);
    until.round(Unit::Second).unwrap_or(until)
}

impl fmt::Display for TryLater {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { status, until, .. } = self;
        write!(
            f,
            "the server answers {status} and asks to wait until {until}"
        )
    }
}

impl std::error::Error for TryLater {}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: &str = "Thu, 01 Jan 2026 12:00:00 GMT";

    fn read(lines: &[(&'static str, &str)]) -> Option<TryLater> {
        let headers = lines
            .iter()
            .map(|&(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
        let now = httpdate::parse_http_date(NOW).unwrap();
        TryLater::read(StatusCode::TOO_MANY_REQUESTS, &headers.collect(), now)
    }

    fn seconds(lines: &[(&'static str, &str)]) -> Option<u64> {
        read(lines).map(|later| later.wait().as_secs())
    }

    /// Fault C19.
    #[test]
    fn time_that_a_server_asks_for_is_read() {
        let used_up = ("x-ratelimit-remaining", "0");
        for (lines, wait) in [
            (&[("retry-after", "90")][..], Some(90)),
            (
                &[("retry-after", "Thu, 01 Jan 2026 12:01:00 GMT")],
                Some(60),
            ),
            // 2026-01-01T13:00:00Z.
            (&[used_up, ("x-ratelimit-reset", "1767272400")], Some(3600)),
            (&[used_up, ("x-ratelimit-reset", "30")], Some(30)),
            (
                &[("ratelimit-remaining", "0"), ("ratelimit-reset", "7")],
                Some(7),
            ),
            (
                &[used_up, ("x-ratelimit-reset", "30"), ("retry-after", "5")],
                Some(30),
            ),
            // The host's clock is wrong, or the server's.
            (
                &[
                    ("date", "Tue, 01 Jan 2030 00:00:00 GMT"),
                    ("retry-after", "Tue, 01 Jan 2030 00:10:00 GMT"),
                ],
                Some(600),
            ),
            // A day at most.
            (&[("retry-after", "31536000")], Some(86_400)),
            (&[("retry-after", "18446744073709551615")], Some(86_400)),
            (
                &[("retry-after", "Fri, 31 Dec 9999 23:59:59 GMT")],
                Some(86_400),
            ),
            // No time, or one that is over.
            (&[], None),
            (&[("retry-after", "0")], None),
            (&[("retry-after", "-1")], None),
            (&[("retry-after", "soon")], None),
            (&[("retry-after", "18446744073709551616")], None),
            (&[("retry-after", "Thu, 01 Jan 2026 11:59:59 GMT")], None),
            (&[("x-ratelimit-reset", "1767272400")], None),
            (
                &[("x-ratelimit-remaining", "1"), ("x-ratelimit-reset", "30")],
                None,
            ),
        ] {
            assert_eq!(seconds(lines), wait, "{lines:?}");
        }
    }

    #[test]
    fn error_names_the_time() {
        let later = read(&[("retry-after", "90")]).unwrap();
        let expected =
            "the server answers 429 Too Many Requests and asks to wait until 2026-01-01T12:01:30Z";
        assert_eq!(later.to_string(), expected);
        let later = read(&[("retry-after", "18446744073709551615")]).unwrap();
        assert!(later.to_string().contains("until 9999-"), "{later}");
    }
}
