//! Prefixes that were allowed until lately: a source in one of them that is dropped now has probably lost its access by
//! mistake. Pure.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

use ipnet::IpNet;
use jiff::Timestamp;

use crate::kernel::difference::Difference;

/// How long a prefix is remembered after it ceased to be allowed.
const REMEMBERED_FOR: Duration = Duration::from_hours(24);

/// How long a dropped source counts after its last packet.
const DROPPED_WITHIN: Duration = Duration::from_mins(10);

/// Prefixes that are remembered, of all databases together. Those that ended first are forgotten first.
const MOST: usize = 4096;

/// When each prefix ceased to be allowed, by database.
#[derive(Debug, Default)]
pub struct Former(BTreeMap<String, BTreeMap<IpNet, Timestamp>>);

impl Former {
    /// Notes the prefixes that a change takes away, and forgets those that it gives back.
    pub fn note(&mut self, difference: &Difference, now: Timestamp) {
        for (database, changed) in &difference.databases {
            let prefixes = self.0.entry(database.clone()).or_default();
            // Not longer than they need be: a change may add and remove a million.
            if !prefixes.is_empty() {
                for prefix in &changed.added {
                    prefixes.remove(prefix);
                }
            }
            let removed = changed.removed.iter().take(MOST);
            prefixes.extend(removed.map(|&prefix| (prefix, now)));
        }
        let mut all: Vec<(String, IpNet, Timestamp)> = Vec::new();
        for (database, prefixes) in std::mem::take(&mut self.0) {
            let recent = prefixes
                .into_iter()
                .filter(|&(_, ended)| is_within(REMEMBERED_FOR, ended, now));
            all.extend(recent.map(|(prefix, ended)| (database.clone(), prefix, ended)));
        }
        if all.len() > MOST {
            all.sort_by_key(|&(_, _, ended)| Reverse(ended));
            all.truncate(MOST);
        }
        for (database, prefix, ended) in all {
            self.0.entry(database).or_default().insert(prefix, ended);
        }
    }

    /// Counts the dropped sources of such prefixes, by database. `dropped`: database, source and time of the last
    /// packet.
    pub fn count<'a>(
        &self,
        dropped: impl Iterator<Item = (&'a str, IpAddr, Timestamp)>,
        now: Timestamp,
    ) -> BTreeMap<String, usize> {
        let mut lengths: BTreeMap<&str, BTreeSet<u8>> = BTreeMap::new();
        for (database, prefixes) in &self.0 {
            let of_database = prefixes.keys().map(IpNet::prefix_len);
            lengths.insert(database, of_database.collect());
        }
        let mut counts = BTreeMap::new();
        for (database, source, last) in dropped {
            let (Some(prefixes), true) =
                (self.0.get(database), is_within(DROPPED_WITHIN, last, now))
            else {
                continue;
            };
            // A prefix of each length that occurs, rather than each prefix: a flood has thousands of sources.
            let was_allowed = lengths[database].iter().any(|&length| {
                let prefix = IpNet::new(source, length).map(|prefix| prefix.trunc());
                let ended = prefix.ok().and_then(|prefix| prefixes.get(&prefix));
                ended.is_some_and(|ended| *ended <= last)
            });
            if was_allowed {
                *counts.entry(database.to_owned()).or_default() += 1;
            }
        }
        counts
    }
}

fn is_within(limit: Duration, since: Timestamp, now: Timestamp) -> bool {
    // A clock that was set back makes nothing older.
    now.duration_since(since).as_secs() <= limit.as_secs() as i64
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;

    use super::*;
    use crate::kernel::difference::DatabaseDifference;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::UNIX_EPOCH + SignedDuration::from_secs(seconds)
    }

    fn change(added: &[&str], removed: &[&str]) -> Difference {
        let prefixes = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        let changed = DatabaseDifference {
            added: prefixes(added),
            removed: prefixes(removed),
            ..DatabaseDifference::default()
        };
        Difference {
            databases: [("orders".to_owned(), changed)].into(),
        }
    }

    fn count(former: &Former, source: &str, last: i64, now: i64) -> usize {
        let dropped = [("orders", source.parse().unwrap(), at(last))];
        let counts = former.count(dropped.into_iter(), at(now));
        counts.values().sum()
    }

    #[test]
    fn source_of_a_removed_prefix_counts_from_its_removal_on() {
        let mut former = Former::default();
        former.note(&change(&[], &["203.0.113.0/24", "2001:db8::/64"]), at(100));
        assert_eq!(count(&former, "203.0.113.9", 99, 120), 0);
        assert_eq!(count(&former, "203.0.113.9", 110, 120), 1);
        assert_eq!(count(&former, "2001:db8::9", 110, 120), 1);
        assert_eq!(count(&former, "203.0.114.9", 110, 120), 0);
        // Its last packet is long ago.
        assert_eq!(count(&former, "203.0.113.9", 110, 711), 0);
    }

    #[test]
    fn prefix_that_is_allowed_again_or_ended_long_ago_is_forgotten() {
        let mut former = Former::default();
        former.note(
            &change(&[], &["203.0.113.0/24", "198.51.100.0/24"]),
            at(100),
        );
        former.note(&change(&["203.0.113.0/24"], &[]), at(200));
        assert_eq!(count(&former, "203.0.113.9", 210, 220), 0);
        assert_eq!(count(&former, "198.51.100.9", 210, 220), 1);
        former.note(&change(&[], &["192.0.2.0/24"]), at(100 + 24 * 3600 + 1));
        let now = 100 + 24 * 3600 + 10;
        assert_eq!(count(&former, "198.51.100.9", now, now), 0);
        assert_eq!(count(&former, "192.0.2.9", now, now), 1);
    }

    #[test]
    fn what_is_remembered_is_bounded_and_the_latest_stay() {
        let mut former = Former::default();
        let mut removed = change(&[], &[]);
        let prefixes = (0..5000_u32).map(|host| IpNet::from(IpAddr::from(host.to_be_bytes())));
        removed.databases.get_mut("orders").unwrap().removed = prefixes.collect();
        former.note(&removed, at(100));
        former.note(&change(&[], &["192.0.2.0/24"]), at(101));
        assert_eq!(former.0["orders"].len(), MOST);
        assert_eq!(count(&former, "192.0.2.9", 102, 102), 1);
    }
}
