//! A figure that was measured several times: its median and quartiles.

use std::fmt;

use serde::Serialize;

/// The median, and the first and the third quartile.
#[derive(Clone, Copy, Serialize)]
pub struct Spread {
    pub median: f64,
    pub low: f64,
    pub high: f64,
}

impl Spread {
    /// `values`: at least one.
    pub fn of(values: &[f64]) -> Self {
        Self {
            median: quantile(values, 0.5),
            low: quantile(values, 0.25),
            high: quantile(values, 0.75),
        }
    }
}

/// Interpolated between the two nearest values. `values`: at least one.
pub fn quantile(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = part * (sorted.len() - 1) as f64;
    let [below, above] = [at.floor(), at.ceil()].map(|index| sorted[index as usize]);
    below + (above - below) * at.fract()
}

/// With as many digits as the format asks for, or as the median can do with.
impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { median, low, high } = self;
        let digits = f.precision().unwrap_or(match median.abs() {
            ..100.0 => 2,
            100.0..1000.0 => 1,
            _ => 0,
        });
        write!(f, "{median:.digits$} ({low:.digits$} to {high:.digits$})")
    }
}
