//! Growth of counters per second. Pure.

use std::{collections::HashMap, hash::Hash, time::Instant};

/// Counters at the last look, and what each grew by a second since the look before.
pub(super) struct Rates<K> {
    at: Option<Instant>,
    counts: HashMap<K, u64>,
    rates: HashMap<K, f64>,
}

impl<K> Default for Rates<K> {
    fn default() -> Self {
        Self {
            at: None,
            counts: HashMap::new(),
            rates: HashMap::new(),
        }
    }
}

impl<K: Eq + Hash> Rates<K> {
    /// Adds a look. A counter that is new, or less than it was, such as that of a database that was removed and added
    /// again, has no rate until the next look.
    pub(super) fn add(&mut self, at: Instant, counts: HashMap<K, u64>)
    where
        K: Clone,
    {
        self.rates.clear();
        if let Some(before) = self.at.replace(at) {
            let seconds = at.duration_since(before).as_secs_f64();
            for (key, &count) in &counts {
                let grown = self.counts.get(key);
                if let Some(grown) = grown.and_then(|&before| count.checked_sub(before))
                    && seconds > 0.0
                {
                    self.rates.insert(key.clone(), grown as f64 / seconds);
                }
            }
        }
        self.counts = counts;
    }

    /// `None`: not known yet.
    pub(super) fn of(&self, key: &K) -> Option<f64> {
        self.rates.get(key).copied()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn rate_needs_two_looks_and_a_counter_that_grows() {
        let mut rates = Rates::default();
        let start = Instant::now();
        let mut look = |seconds: u64, counts: &[(&'static str, u64)]| {
            let counts = counts.iter().copied().collect();
            rates.add(start + Duration::from_secs(seconds), counts);
            (rates.of(&"orders"), rates.of(&"shop"))
        };
        assert_eq!(look(0, &[("orders", 100)]), (None, None));
        assert_eq!(look(2, &[("orders", 130), ("shop", 7)]), (Some(15.0), None));
        assert_eq!(
            look(3, &[("orders", 130), ("shop", 9)]),
            (Some(0.0), Some(2.0))
        );
        // Counted from 0 again.
        assert_eq!(look(4, &[("orders", 3), ("shop", 9)]), (None, Some(0.0)));
        assert_eq!(look(5, &[("orders", 4)]), (Some(1.0), None));
        assert_eq!(look(5, &[("orders", 9)]), (None, None));
    }
}
