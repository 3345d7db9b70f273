//! Sums up samples of packets that were not allowed, by source. Pure.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use filter_common::Reason;
use jiff::Timestamp;

use crate::{
    kernel::{counters::Counts, samples::Dropped},
    report,
};

/// Index of the loopback interface, in every network namespace: where the agent's own probes come in.
const LOOPBACK: u32 = 1;

/// Sources that are remembered, each by database and reason.
const MOST: usize = 4096;

/// The samples since the agent started.
#[derive(Debug)]
pub struct Drops {
    since: Timestamp,
    seen: BTreeMap<Who, Seen>,
    /// What the kernel had counted by then.
    before: Counts,
    /// How many samples there were, those included that are remembered no more.
    sampled: Counts,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Who {
    database: Option<String>,
    source: Option<IpAddr>,
    reason: Reason,
    monitored: bool,
}

#[derive(Debug)]
struct Seen {
    packets: u64,
    last: Timestamp,
}

impl Drops {
    pub fn since(since: Timestamp, before: Counts) -> Self {
        Self {
            since,
            seen: BTreeMap::new(),
            before,
            sampled: Counts::new(),
        }
    }

    /// Forgets what was counted and sampled of databases whose counters begin at zero: they were removed
    /// and added again, or have another slot in the kernel.
    pub fn restart(&mut self, databases: &BTreeSet<String>) {
        for counts in [&mut self.before, &mut self.sampled] {
            counts.retain(|(database, _, _), _| {
                let name = database.as_ref();
                !name.is_some_and(|name| databases.contains(name))
            });
        }
    }

    /// Adds samples taken until `now`.
    pub fn add(&mut self, dropped: Vec<Dropped>, now: Timestamp) {
        let dropped = dropped.into_iter();
        for packet in dropped.filter(|packet| packet.interface != LOOPBACK) {
            let counter = (packet.database.clone(), packet.reason, packet.monitored);
            *self.sampled.entry(counter).or_default() += 1;
            let who = Who {
                database: packet.database,
                source: packet.source,
                reason: packet.reason,
                monitored: packet.monitored,
            };
            let seen = Seen {
                packets: 0,
                last: now,
            };
            let seen = self.seen.entry(who).or_insert(seen);
            seen.packets += 1;
            seen.last = now;
        }
        // A forged source of a flood comes once: the sources with the most packets stay.
        if self.seen.len() > 2 * MOST {
            let mut all: Vec<_> = std::mem::take(&mut self.seen).into_iter().collect();
            all.sort_unstable_by_key(|(_, seen)| Reverse((seen.packets, seen.last)));
            all.truncate(MOST);
            self.seen = all.into_iter().collect();
        }
    }

    /// Sources that no rule allows and that were dropped: database, source and time of the last packet.
    pub fn not_allowed(&self) -> impl Iterator<Item = (&str, IpAddr, Timestamp)> {
        self.seen.iter().filter_map(|(who, seen)| {
            let is_dropped = who.reason == Reason::NotAllowed && !who.monitored;
            let of = who.database.as_deref().zip(who.source);
            let (database, source) = of.filter(|_| is_dropped)?;
            Some((database, source, seen.last))
        })
    }

    /// Those that tried most often first. `counts`: what the kernel counted by now. `database`: only
    /// what was aimed at this one.
    pub fn report(&self, counts: &Counts, database: Option<&str>) -> report::Drops {
        let wanted = |name: &Option<String>| database.is_none() || name.as_deref() == database;
        let seen = self.seen.iter().filter(|(who, _)| wanted(&who.database));
        let mut sources: Vec<report::Dropped> = seen
            .map(|(who, seen)| report::Dropped {
                database: who.database.clone(),
                source: who.source,
                reason: who.reason.name().into(),
                monitor: who.monitored,
                packets: seen.packets,
                last_seen: seen.last,
            })
            .collect();
        sources.sort_by_key(|dropped| Reverse((dropped.packets, dropped.last_seen)));
        let mut unsampled = Vec::new();
        for (counter, &packets) in counts {
            let (name, reason, monitored) = counter;
            let of = |counts: &Counts| counts.get(counter).copied().unwrap_or_default();
            let packets = packets.saturating_sub(of(&self.before) + of(&self.sampled));
            if *reason != Reason::Allowed && packets > 0 && wanted(name) {
                unsampled.push(report::Unsampled {
                    database: name.clone(),
                    reason: reason.name().into(),
                    monitor: *monitored,
                    packets,
                });
            }
        }
        report::Drops {
            since: self.since,
            sources,
            unsampled,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn packet(source: u32) -> Dropped {
        Dropped {
            source: Some(Ipv4Addr::from_bits(source).into()),
            database: Some("orders".into()),
            reason: Reason::NotAllowed,
            monitored: false,
            interface: 2,
        }
    }

    fn counter() -> (Option<String>, Reason, bool) {
        (Some("orders".into()), Reason::NotAllowed, false)
    }

    fn none() -> Drops {
        Drops::since(Timestamp::UNIX_EPOCH, Counts::new())
    }

    #[test]
    fn who_tries_often_outlasts_a_flood_from_forged_sources() {
        let mut drops = none();
        drops.add(vec![packet(1), packet(1)], Timestamp::UNIX_EPOCH);
        for flood in 1..20 {
            let forged = (0..2048).map(|low| packet(flood << 16 | low));
            drops.add(forged.collect(), Timestamp::now());
        }
        assert!(drops.seen.len() <= 2 * MOST);
        let report = drops.report(&Counts::new(), None);
        assert_eq!(report.sources[0].source, packet(1).source);
        assert_eq!(report.sources[0].packets, 2);
        assert_eq!(drops.sampled[&counter()], 2 + 19 * 2048);
    }

    #[test]
    fn what_was_counted_and_not_sampled_is_told() {
        let before = Counts::from([(counter(), 100)]);
        let mut drops = Drops::since(Timestamp::UNIX_EPOCH, before);
        drops.add(vec![packet(1)], Timestamp::now());
        let counts = Counts::from([(counter(), 111)]);
        let report = drops.report(&counts, None);
        assert_eq!(report.unsampled.len(), 1);
        assert_eq!(report.unsampled[0].packets, 10);
        let counts = Counts::from([(counter(), 101)]);
        assert!(drops.report(&counts, None).unsampled.is_empty());
    }

    #[test]
    fn database_that_is_removed_and_added_again_is_counted_from_zero() {
        let before = Counts::from([(counter(), 100)]);
        let mut drops = Drops::since(Timestamp::UNIX_EPOCH, before);
        drops.add(vec![packet(1)], Timestamp::now());
        drops.restart(&["orders".to_owned()].into());
        drops.add(vec![packet(1)], Timestamp::now());
        let counts = Counts::from([(counter(), 7)]);
        assert_eq!(drops.report(&counts, None).unsampled[0].packets, 6);
        assert_eq!(drops.report(&counts, None).sources[0].packets, 2);
    }

    #[test]
    fn probes_of_the_agent_are_nobody_turned_away() {
        let mut drops = none();
        let probe = Dropped {
            interface: LOOPBACK,
            ..packet(1)
        };
        drops.add(vec![probe], Timestamp::now());
        assert!(drops.report(&Counts::new(), None).sources.is_empty());
    }

    #[test]
    fn drops_of_one_database_are_told_alone() {
        let mut drops = none();
        let other = Dropped {
            database: None,
            ..packet(2)
        };
        drops.add(vec![packet(1), other], Timestamp::now());
        let report = drops.report(&Counts::new(), Some("orders"));
        assert_eq!(report.sources.len(), 1);
        assert_eq!(report.sources[0].source, packet(1).source);
    }
}
