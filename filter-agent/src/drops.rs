//! Sums up samples of packets that were not allowed, by source. Pure.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::IpAddr,
};

use filter_common::{Reason, opening::OpeningKind};
use ipnet::IpNet;
use jiff::Timestamp;

use crate::{
    kernel::{counters::Counts, samples::Dropped},
    report,
    temporary::{Temporary, Timed},
};

/// Index of the loopback interface, in every network namespace: where the agent's own probes come in.
const LOOPBACK: u32 = 1;

/// Sources that are remembered, each by database and reason.
const MOST: usize = 4096;

/// Temporary rules that have ended and are remembered, for hints.
const MAX_ENDED: usize = 256;

/// The samples since the agent started.
#[derive(Debug)]
pub struct Drops {
    since: Timestamp,
    seen: BTreeMap<Who, Seen>,
    /// The kernel's counters by then.
    before: Counts,
    /// How many samples there were, those included that are remembered no more.
    sampled: Counts,
    /// Temporary rules that have ended, the latest last.
    ended: VecDeque<Temporary>,
}

/// The part of the samples that is reported.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Only what was aimed at this one.
    pub database: Option<String>,
    /// Only sources of this prefix.
    pub source: Option<IpNet>,
    /// At most so many sources.
    pub limit: Option<usize>,
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
    first: Timestamp,
    last: Timestamp,
    /// Of the last refused connection.
    opening: Option<OpeningKind>,
}

impl Drops {
    pub fn since(since: Timestamp, before: Counts) -> Self {
        Self {
            since,
            seen: BTreeMap::new(),
            before,
            sampled: Counts::new(),
            ended: VecDeque::new(),
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

    /// Notes the temporary rules that have ended between two states of what is enforced.
    pub fn note_ended(&mut self, before: &Timed, after: &Timed) {
        let now = after.now.boot;
        let is_there = |rule: &Temporary| after.temporary.iter().any(|other| other.is_same(rule));
        let temporary = before.temporary.iter();
        let ended = temporary.filter(|rule| rule.end <= now && !is_there(rule));
        self.ended.extend(ended.cloned());
        let surplus = self.ended.len().saturating_sub(MAX_ENDED);
        self.ended.drain(..surplus);
    }

    /// Temporary rules that ended lately, the latest last.
    pub fn ended(&self) -> Vec<Temporary> {
        self.ended.iter().cloned().collect()
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
                first: now,
                last: now,
                opening: None,
            };
            let seen = self.seen.entry(who).or_insert(seen);
            seen.packets += 1;
            seen.last = now;
            // What follows a connection's beginning is unknown, and says less than the beginning did.
            let is_known = |opening: &OpeningKind| *opening != OpeningKind::Unknown;
            seen.opening = packet
                .opening
                .filter(is_known)
                .or(seen.opening)
                .or(packet.opening);
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

    /// Those that tried most often first. `counts`: what the kernel counted by now.
    pub fn report(&self, counts: &Counts, wanted: &Wanted) -> report::Drops {
        let Wanted {
            database,
            source,
            limit,
        } = wanted;
        let wanted = |name: &Option<String>| database.is_none() || name == database;
        let holds = |address: Option<IpAddr>| match (source, address) {
            (None, _) => true,
            (Some(prefix), address) => address.is_some_and(|address| prefix.contains(&address)),
        };
        let seen = self.seen.iter();
        let seen = seen.filter(|(who, _)| wanted(&who.database) && holds(who.source));
        let mut sources: Vec<report::Dropped> = seen
            .map(|(who, seen)| report::Dropped {
                database: who.database.clone(),
                source: who.source,
                reason: who.reason.name().into(),
                monitor: who.monitored,
                packets: seen.packets,
                first_seen: Some(seen.first),
                opening: seen.opening.map(|opening| opening.name().into()),
                hint: None,
                allow: None,
                last_seen: seen.last,
            })
            .collect();
        sources.sort_by_key(|dropped| Reverse((dropped.packets, dropped.last_seen)));
        let left_out = sources.len().saturating_sub(limit.unwrap_or(usize::MAX));
        sources.truncate(sources.len() - left_out);
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
            left_out,
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
            opening: None,
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
        let report = drops.report(&Counts::new(), &Wanted::default());
        assert_eq!(report.sources[0].source, packet(1).source);
        assert_eq!(report.sources[0].packets, 2);
        assert_eq!(drops.sampled[&counter()], 2 + 19 * 2048);
    }

    /// A monitored connection goes on, and its later packets said `nothing known`.
    #[test]
    fn known_opening_outlasts_unknown_ones() {
        let mut drops = none();
        let opening = |opening| Dropped {
            reason: Reason::NotTls,
            opening,
            ..packet(1)
        };
        let mut reported = |kind| {
            drops.add(vec![opening(kind)], Timestamp::now());
            let mut report = drops.report(&Counts::new(), &Wanted::default());
            report.sources.remove(0).opening
        };
        let unknown = Some(OpeningKind::Unknown);
        assert_eq!(reported(None), None);
        assert_eq!(reported(unknown).as_deref(), Some("nothing known"));
        for opening in [Some(OpeningKind::Http), None, unknown] {
            assert_eq!(reported(opening).as_deref(), Some("HTTP request"));
        }
        assert_eq!(reported(Some(OpeningKind::Ssh)).as_deref(), Some("SSH"));
    }

    #[test]
    fn what_was_counted_and_not_sampled_is_told() {
        let before = Counts::from([(counter(), 100)]);
        let mut drops = Drops::since(Timestamp::UNIX_EPOCH, before);
        drops.add(vec![packet(1)], Timestamp::now());
        let counts = Counts::from([(counter(), 111)]);
        let report = drops.report(&counts, &Wanted::default());
        assert_eq!(report.unsampled.len(), 1);
        assert_eq!(report.unsampled[0].packets, 10);
        let counts = Counts::from([(counter(), 101)]);
        assert!(
            drops
                .report(&counts, &Wanted::default())
                .unsampled
                .is_empty()
        );
    }

    #[test]
    fn database_that_is_removed_and_added_again_is_counted_from_zero() {
        let before = Counts::from([(counter(), 100)]);
        let mut drops = Drops::since(Timestamp::UNIX_EPOCH, before);
        drops.add(vec![packet(1)], Timestamp::now());
        drops.restart(&["orders".to_owned()].into());
        drops.add(vec![packet(1)], Timestamp::now());
        let counts = Counts::from([(counter(), 7)]);
        assert_eq!(
            drops.report(&counts, &Wanted::default()).unsampled[0].packets,
            6
        );
        assert_eq!(
            drops.report(&counts, &Wanted::default()).sources[0].packets,
            2
        );
    }

    #[test]
    fn probes_of_the_agent_are_nobody_turned_away() {
        let mut drops = none();
        let probe = Dropped {
            interface: LOOPBACK,
            ..packet(1)
        };
        drops.add(vec![probe], Timestamp::now());
        assert!(
            drops
                .report(&Counts::new(), &Wanted::default())
                .sources
                .is_empty()
        );
    }

    #[test]
    fn drops_of_one_database_are_told_alone() {
        let mut drops = none();
        let other = Dropped {
            database: None,
            ..packet(2)
        };
        drops.add(vec![packet(1), other], Timestamp::now());
        let of_orders = Wanted {
            database: Some("orders".into()),
            ..Wanted::default()
        };
        let report = drops.report(&Counts::new(), &of_orders);
        assert_eq!(report.sources.len(), 1);
        assert_eq!(report.sources[0].source, packet(1).source);
    }

    #[test]
    fn sources_are_chosen_by_prefix_and_limited() {
        let mut drops = none();
        let at = |seconds| Timestamp::from_second(seconds).unwrap();
        let packets = |count: u32, address: u32| vec![packet(address); count as usize];
        for low in 1..=4 {
            drops.add(packets(low, 0xc000_0200 | low), at(low.into()));
        }
        drops.add(packets(1, 0xc633_6401), at(9));
        drops.add(packets(1, 0xc000_0204), at(10));
        let report = |source: Option<&str>, limit| {
            let wanted = Wanted {
                source: source.map(|source| source.parse().unwrap()),
                limit,
                ..Wanted::default()
            };
            let report = drops.report(&Counts::new(), &wanted);
            let sources = report.sources.iter().map(|d| d.source.unwrap().to_string());
            (sources.collect::<Vec<_>>().join(" "), report.left_out)
        };
        let four = "192.0.2.4 192.0.2.3 192.0.2.2 192.0.2.1";
        assert_eq!(report(Some("192.0.2.0/24"), None), (four.into(), 0));
        assert_eq!(report(None, Some(2)), ("192.0.2.4 192.0.2.3".into(), 3));
        assert_eq!(report(Some("192.0.2.3/32"), Some(2)).1, 0);
        assert_eq!(report(Some("2001:db8::/32"), Some(2)), (String::new(), 0));
        let all = drops.report(&Counts::new(), &Wanted::default());
        let first = &all.sources[0];
        assert_eq!((first.first_seen, first.last_seen), (Some(at(4)), at(10)));
    }

    #[test]
    fn temporary_rules_that_ended_are_remembered_and_those_that_were_revoked_are_not() {
        use crate::{
            clock::{BootTime, Now},
            temporary::{Ends, Kind},
        };
        let now = |boot| Now {
            boot: BootTime(boot),
            steady: Timestamp::UNIX_EPOCH,
            wall: Timestamp::UNIX_EPOCH,
        };
        let rule = |source: &str, end| {
            Temporary::new(
                "orders",
                Kind::Allow,
                source.parse().unwrap(),
                BootTime(end),
                now(1),
            )
        };
        let timed = |boot, temporary| Timed {
            now: now(boot),
            ends: Ends::default(),
            temporary,
        };
        let (first, second) = (rule("192.0.2.1/32", 10), rule("192.0.2.2/32", 20));
        let before = timed(1, vec![first.clone(), second]);
        let mut drops = none();
        // The second was revoked, and the first has ended.
        drops.note_ended(&before, &timed(10, vec![]));
        assert_eq!(drops.ended(), std::slice::from_ref(&first));
        // It is there again, with another end.
        drops.note_ended(
            &timed(1, vec![first]),
            &timed(30, vec![rule("192.0.2.1/32", 40)]),
        );
        assert_eq!(drops.ended().len(), 1);
        for low in 0..300 {
            let rules = vec![rule(&format!("198.51.{}.{}/32", low / 250, low % 250), 5)];
            drops.note_ended(&timed(1, rules), &timed(10, vec![]));
        }
        assert_eq!(drops.ended().len(), MAX_ENDED);
    }
}
