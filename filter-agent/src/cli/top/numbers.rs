//! Numbers in few characters. Pure.

use jiff::Timestamp;

/// Negative where the clock was set back.
pub(super) fn seconds_since(then: Timestamp, now: Timestamp) -> i64 {
    now.duration_since(then).as_secs()
}

/// The largest unit alone: `59s`, `59m`, `47h`, `2d`.
pub(super) fn short_duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// Seven characters at most: a million and more with three to four digits.
pub(super) fn short(count: u64) -> String {
    match count {
        0..1_000_000 => count.to_string(),
        _ => scaled(count as f64),
    }
}

/// `-`: not known yet.
pub(super) fn rate(rate: Option<f64>) -> String {
    match rate {
        None => "-".into(),
        Some(0.0) => "0".into(),
        Some(rate) if rate < 9.95 => format!("{rate:.1}"),
        Some(rate) if rate < 9_999.5 => format!("{rate:.0}"),
        Some(rate) => scaled(rate),
    }
}

fn scaled(mut number: f64) -> String {
    let mut unit = "";
    for next in ["k", "M", "G", "T", "P", "E"] {
        if number < 999.5 {
            break;
        }
        number /= 1000.0;
        unit = next;
    }
    format!("{number:.1}{unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_take_few_characters() {
        let shown = [0, 999_999, 1_000_000, 12_345_678, 999_960_000, u64::MAX].map(short);
        assert_eq!(shown, ["0", "999999", "1.0M", "12.3M", "1.0G", "18.4E"]);
        let rates = [0.0, 0.04, 9.94, 9.96, 9_999.4, 9_999.6, 1_234_567.0].map(Some);
        let rates = rates.map(rate);
        assert_eq!(rates, ["0", "0.0", "9.9", "10", "9999", "10.0k", "1.2M"]);
        assert_eq!(rate(None), "-");
        let durations = [0, 59, 60, 3599, 3600, 172_799, 172_800].map(short_duration);
        assert_eq!(durations, ["0s", "59s", "1m", "59m", "1h", "47h", "2d"]);
    }
}
