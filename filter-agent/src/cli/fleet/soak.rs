//! The hosts of a rollout that is watched: what they report, and when it is halted. Pure.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::{etcd::client::Overview, fleet::host_status::Packets};

/// Time for a host to have in force what was written.
const LATE: Duration = Duration::from_secs(10);

/// Time without a report of packets after which a host is silent. One comes every 5 s.
const SILENT: Duration = Duration::from_secs(20);

/// A host may drop so many times what it dropped before, or so many packets a second more: small numbers vary.
const TIMES: f64 = 3.0;
const MORE: f64 = 5.0;

#[derive(Debug)]
pub(super) struct Watch {
    database: String,
    /// Of the document with the rollout.
    pub(super) revision: i64,
    hosts: BTreeMap<String, Host>,
    /// From when on hosts have time to have it in force.
    begun: Instant,
    /// As of the last look.
    era: u64,
}

#[derive(Debug)]
struct Host {
    is_active: bool,
    /// The first report and the last one.
    first: Option<Packets>,
    last: Option<Packets>,
    /// When the last one was seen; later where nothing could be asked since.
    heard: Instant,
    /// How many came since it has the document in force, and when the last one of them was seen.
    reports: usize,
    reported: Option<Instant>,
    /// Packets a second that no rule allowed before.
    baseline: Option<f64>,
}

#[derive(Debug, PartialEq)]
pub(super) enum Halt {
    /// Somebody else has changed the document: it is not ours to be taken back.
    Changed,
    Host(String),
}

impl Watch {
    pub(super) fn new(database: &str, revision: i64, on: &[String], now: Instant) -> Self {
        let host = |name: &String| {
            let host = Host {
                is_active: false,
                first: None,
                last: None,
                heard: now,
                reports: 0,
                reported: None,
                baseline: None,
            };
            (name.clone(), host)
        };
        Self {
            database: database.into(),
            revision,
            hosts: on.iter().map(host).collect(),
            begun: now,
            era: 0,
        }
    }

    /// Takes what was seen so far as what is usual.
    ///
    /// # Errors
    /// A host has not reported twice.
    pub(super) fn take_baseline(&mut self) -> Result<(), String> {
        for (name, host) in &mut self.hosts {
            let reports = host.first.zip(host.last);
            let rate = reports.and_then(|(first, last)| rate(first, last));
            let rate = rate.ok_or_else(|| format!("{name} has not reported its packets twice"))?;
            host.baseline = Some(rate);
        }
        Ok(())
    }

    /// Watches the same hosts for another revision from now on.
    pub(super) fn go_on(&mut self, revision: i64, now: Instant) {
        for host in self.hosts.values_mut() {
            host.is_active = false;
            host.heard = now;
            host.reports = 0;
            host.reported = None;
        }
        self.revision = revision;
        self.begun = now;
    }

    /// Whether every host has it in force, and has reported since.
    pub(super) fn has_all(&self) -> bool {
        let mut hosts = self.hosts.values();
        hosts.all(|host| host.is_active && host.reports > 0)
    }

    /// Whether reports of every host tell of the time until now: two, between which packets are counted, and none missing
    /// since. Time in which nothing could be asked tells of no host.
    pub(super) fn is_judged(&self, now: Instant) -> bool {
        let is_fresh = |at| now.duration_since(at) <= SILENT;
        let mut hosts = self.hosts.values();
        hosts.all(|host| host.is_active && host.reports > 1 && host.reported.is_some_and(is_fresh))
    }

    /// Nothing could be asked for a while: that is no host's silence.
    pub(super) fn excuse(&mut self, now: Instant) {
        self.begun = now;
        for host in self.hosts.values_mut() {
            host.heard = now;
        }
    }

    /// Judges what hosts have reported.
    pub(super) fn look(&mut self, overview: &Overview, now: Instant) -> Result<(), Halt> {
        if overview.documents.get(&self.database) != Some(&self.revision) {
            return Err(Halt::Changed);
        }
        // Hosts report anew once they have read a later one.
        if overview.era != std::mem::replace(&mut self.era, overview.era) {
            self.begun = now;
        }
        let (database, revision) = (&self.database, self.revision);
        let is_late = now.duration_since(self.begun) > LATE;
        for (name, host) in &mut self.hosts {
            let halted = host.look(name, database, revision, is_late, overview, now);
            halted.map_err(|why| Halt::Host(format!("{name} {why}")))?;
        }
        Ok(())
    }
}

impl Host {
    fn look(
        &mut self,
        name: &str,
        database: &str,
        revision: i64,
        is_late: bool,
        overview: &Overview,
        now: Instant,
    ) -> Result<(), String> {
        let status = overview.report(name).ok_or("reports nothing")?;
        if !overview.is_alive(name, status) {
            return Err("is silent".into());
        }
        let reported = status.databases.get(database);
        let reported =
            reported.ok_or_else(|| format!("has no database {database} of the fleet"))?;
        let is_earlier = overview.is_earlier(status, reported, Some(revision));
        // Its error is about something earlier.
        if let Some(error) = reported.error.as_ref().filter(|_| !is_earlier) {
            return Err(format!("reports: {error}"));
        }
        self.is_active = !is_earlier && reported.enforced == Some(revision);
        if !self.is_active && is_late {
            return Err(format!("does not enforce it after {} s", LATE.as_secs()));
        }
        match reported.packets {
            Some(packets) if self.last.is_none_or(|last| last.at != packets.at) => {
                self.heard = now;
                if self.is_active {
                    self.reports += 1;
                    self.reported = Some(now);
                }
                self.first = self.first.or(Some(packets));
                let last = self.last.replace(packets);
                let rate = last.and_then(|last| rate(last, packets));
                if let (Some(rate), Some(baseline)) = (rate, self.baseline)
                    && rate > baseline * TIMES
                    && rate > baseline + MORE
                {
                    return Err(format!(
                        "drops {rate:.1} packets a second that no rule allows, and {baseline:.1} before"
                    ));
                }
            }
            _ if now.duration_since(self.heard) > SILENT => {
                return Err(format!(
                    "has reported no packets for {} s",
                    SILENT.as_secs()
                ));
            }
            _ => {}
        }
        Ok(())
    }
}

/// Packets a second that no rule allowed between two reports of a host. `None`: its counters were made anew between
/// them, or its clock was set back.
fn rate(before: Packets, after: Packets) -> Option<f64> {
    let seconds = after.at.duration_since(before.at).as_secs_f64();
    let dropped = after.dropped.checked_sub(before.dropped)?;
    (seconds > 0.0).then(|| dropped as f64 / seconds)
}

#[cfg(test)]
mod tests {
    use jiff::{SignedDuration, Timestamp};
    use serde_json::json;

    use super::*;
    use crate::fleet::host_status::HostStatus;

    struct Fleet {
        watch: Watch,
        begin: Instant,
        overview: Overview,
    }

    impl Fleet {
        fn new() -> Self {
            let begin = Instant::now();
            let on = ["db7".to_owned()];
            let mut fleet = Self {
                watch: Watch::new("orders", 9, &on, begin),
                begin,
                overview: Overview {
                    documents: [("orders".into(), 9)].into(),
                    alive: [("db7".into(), "life".into())].into(),
                    ..Overview::default()
                },
            };
            fleet.report(9, None, Some((0, 100)));
            fleet
        }

        fn report(&mut self, enforced: i64, error: Option<&str>, packets: Option<(i64, u64)>) {
            let at = |seconds| Timestamp::UNIX_EPOCH + SignedDuration::from_secs(seconds);
            let packets = packets.map(
                |(seconds, dropped)| json!({"at": at(seconds), "passed": 0, "dropped": dropped}),
            );
            let status = json!({
                "agent": "0.1.0", "boot": "life", "at": at(0),
                "databases": {"orders": {
                    "seen": enforced, "enforced": enforced, "error": error, "rules": 2, "temporary": 0,
                    "state": "active", "packets": packets,
                }},
            });
            let status = HostStatus::read(status.to_string().as_bytes());
            self.overview.hosts = [("db7".into(), status)].into();
        }

        fn look(&mut self, seconds: u64) -> Result<(), Halt> {
            let now = self.begin + Duration::from_secs(seconds);
            self.watch.look(&self.overview, now)
        }

        /// After ten seconds in which it dropped so many packets.
        fn judging(dropped: u64) -> Self {
            let mut fleet = Self::new();
            fleet.look(0).unwrap();
            fleet.report(9, None, Some((10, 100 + dropped)));
            fleet.look(10).unwrap();
            let now = fleet.begin + Duration::from_secs(10);
            fleet.watch.take_baseline().unwrap();
            fleet.watch.go_on(11, now);
            fleet.overview.documents = [("orders".into(), 11)].into();
            fleet
        }
    }

    fn halted(result: Result<(), Halt>) -> String {
        match result {
            Err(Halt::Host(why)) => why,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn host_that_drops_much_more_than_before_halts_it() {
        for (before, more, halts) in [
            (0, 24, false),
            (0, 26, true),
            (100, 149, false),
            (100, 151, true),
            (10, 28, false),
            (10, 31, true),
        ] {
            let mut fleet = Fleet::judging(before);
            fleet.report(11, None, Some((15, 100 + before + more)));
            let result = fleet.look(15);
            assert_eq!(result.is_err(), halts, "{before} {more}: {result:?}");
        }
        // Counters that were made anew say nothing of the time between.
        let mut fleet = Fleet::judging(0);
        fleet.report(11, None, Some((15, 3)));
        fleet.look(15).unwrap();
        fleet.report(11, None, Some((20, 103)));
        assert!(halted(fleet.look(20)).contains("20.0 packets a second"));
    }

    #[test]
    fn baseline_of_a_host_takes_two_reports() {
        let mut fleet = Fleet::new();
        fleet.look(0).unwrap();
        assert!(fleet.watch.has_all());
        let why = fleet.watch.take_baseline().unwrap_err();
        assert_eq!(why, "db7 has not reported its packets twice");
    }

    #[test]
    fn reports_of_before_and_an_outage_of_etcd_judge_nothing() {
        let mut fleet = Fleet::judging(0);
        let at = |seconds| fleet.begin + Duration::from_secs(seconds);
        let [at_15, at_20, at_90, at_95] = [15, 20, 90, 95].map(at);
        // It has it in force, and reports the packets of before.
        fleet.report(11, None, Some((10, 100)));
        fleet.look(11).unwrap();
        assert!(!fleet.watch.has_all());
        fleet.report(11, None, Some((15, 100)));
        fleet.look(15).unwrap();
        assert!(fleet.watch.has_all());
        assert!(!fleet.watch.is_judged(at_15));
        fleet.report(11, None, Some((20, 100)));
        fleet.look(20).unwrap();
        assert!(fleet.watch.is_judged(at_20));
        fleet.overview.era = 1;
        fleet.look(20).unwrap();
        assert!(!fleet.watch.has_all());
        fleet.overview.era = 0;
        fleet.watch.excuse(at_90);
        fleet.look(90).unwrap();
        assert!(!fleet.watch.is_judged(at_90));
        fleet.report(11, None, Some((95, 100)));
        fleet.look(95).unwrap();
        assert!(fleet.watch.is_judged(at_95));
    }

    #[test]
    fn host_that_is_late_wrong_or_silent_halts_it() {
        let mut fleet = Fleet::judging(0);
        fleet.look(20).unwrap();
        assert!(!fleet.watch.has_all());
        assert_eq!(halted(fleet.look(21)), "db7 does not enforce it after 10 s");
        let mut fleet = Fleet::judging(0);
        fleet.report(9, Some("line 3"), Some((15, 100)));
        fleet.look(15).unwrap();
        fleet.report(11, Some("line 3"), Some((15, 100)));
        fleet.overview.era = 1;
        fleet.look(21).unwrap();
        fleet.look(31).unwrap();
        assert_eq!(halted(fleet.look(32)), "db7 does not enforce it after 10 s");
        fleet.overview.era = 0;
        assert_eq!(halted(fleet.look(15)), "db7 reports: line 3");
        let mut fleet = Fleet::judging(0);
        fleet.report(11, None, Some((15, 100)));
        fleet.look(15).unwrap();
        assert!(fleet.watch.has_all());
        fleet.look(35).unwrap();
        let silent = "db7 has reported no packets for 20 s";
        assert_eq!(halted(fleet.look(36)), silent);
        fleet.watch.excuse(fleet.begin + Duration::from_secs(36));
        fleet.look(56).unwrap();
        fleet.report(11, None, None);
        assert_eq!(halted(fleet.look(57)), silent);
        fleet.overview.alive.clear();
        assert_eq!(halted(fleet.look(57)), "db7 is silent");
        fleet.overview.hosts.clear();
        assert_eq!(halted(fleet.look(57)), "db7 reports nothing");
        fleet.overview.documents = [("orders".into(), 12)].into();
        assert_eq!(fleet.look(57), Err(Halt::Changed));
    }
}
