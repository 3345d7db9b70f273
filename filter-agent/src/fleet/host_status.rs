//! A host's report of itself in the fleet: the JSON of its key in etcd.

use std::collections::{BTreeMap, BTreeSet};

use filter_common::MAX_DATABASES;
use ipnet::IpNet;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{policy::check_name, report::FleetState, text::one_line};

/// Longest error of a database, in characters.
const MAX_ERROR: usize = 300;

/// A hundred days: no change takes as long.
const MAX_MS: f64 = 100.0 * 24.0 * 3600.0 * 1000.0;

/// Longest part of a database, in bytes.
const MAX_DATABASE: usize = 1024;

/// The status of a host. Fields that are not known are passed over when it is read: hosts have other versions.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct HostStatus {
    /// Version of the agent.
    pub agent: String,
    /// The host's present life, as the key `alive` has it.
    pub boot: String,
    /// Cluster, era and revision of the last believed answer. `None`: none was believed yet.
    pub cluster: Option<Cluster>,
    pub era: Option<u64>,
    pub revision: Option<i64>,
    /// When it was made, by the host's clock.
    pub at: Timestamp,
    pub databases: BTreeMap<String, DatabaseStatus>,
}

/// The id of a cluster of etcd: 16 hexadecimal digits, as `etcdctl` shows it. Numbers of JSON are not as long.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Cluster(String);

impl From<u64> for Cluster {
    fn from(id: u64) -> Self {
        Self(format!("{id:016x}"))
    }
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct DatabaseStatus {
    /// Revision of the newest document that is known.
    pub seen: Option<i64>,
    /// Revision of the document in force. `None`: there is none, or the kernel does not do what it should.
    pub enforced: Option<i64>,
    /// SHA-256 of the text of the document in force.
    pub sha256: Option<String>,
    pub state: FleetState,
    /// Why the newest document is not in force.
    pub error: Option<String>,
    /// Milliseconds from etcd's announcement until the document was in force. `None`: since before the agent's start.
    pub enforced_ms: Option<f64>,
    /// Rules of the document in force on this host.
    pub rules: usize,
    /// Temporary rules on this host, which count among the database's 30.
    pub temporary: usize,
    /// How far the fleet may open it. `None`: it is too long to be reported.
    pub bounds: Option<Bounds>,
    /// While a rollout is in force here. `None`: there is none, or the kernel was not read yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packets: Option<Packets>,
}

/// Packets of a database since its counters were made.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
pub struct Packets {
    /// When they were counted, by the host's clock.
    pub at: Timestamp,
    pub passed: u64,
    /// Those that no rule allows.
    pub dropped: u64,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Bounds {
    /// Shortest prefixes, for IPv4 and IPv6: `/16`.
    pub widest: [String; 2],
    /// Networks that rules must be inside of; empty: anywhere.
    pub within: Vec<IpNet>,
    /// Regions that may be named.
    pub regions: BTreeSet<String>,
    /// Number of the policy's own rules, which count among the database's 30.
    pub floor: usize,
}

impl HostStatus {
    /// Reads what a host wrote into its key, which may be anything. Names that no database can have, and times that no
    /// change takes, are left out. An error becomes one short line. `None`: the text is not a report, or has more databases
    /// than a host.
    pub fn read(text: &[u8]) -> Option<Self> {
        let mut status: Self = serde_json::from_slice(text).ok()?;
        if status.databases.len() > MAX_DATABASES {
            return None;
        }
        status.databases.retain(|name, _| check_name(name).is_ok());
        for database in status.databases.values_mut() {
            database.enforced_ms = database.enforced_ms.filter(|ms| (0.0..MAX_MS).contains(ms));
        }
        Some(status.limited())
    }

    /// Whether it reports the same as another. The time and the revision of etcd change with each answer.
    pub fn reports_the_same(&self, other: &Self) -> bool {
        let other = Self {
            revision: self.revision,
            at: self.at,
            ..other.clone()
        };
        *self == other
    }

    /// The same within the limits of each database.
    pub fn limited(mut self) -> Self {
        let databases = self.databases.into_iter();
        self.databases = databases.map(|(name, it)| (name, it.limited())).collect();
        self
    }

    /// Whether the host does not believe etcd.
    pub fn is_holding(&self) -> bool {
        let mut databases = self.databases.values();
        databases.any(|database| database.state == FleetState::Held)
    }

    /// Whether something is wrong: it is written without delay.
    pub fn has_errors(&self) -> bool {
        self.databases.values().any(|it| it.error.is_some())
    }
}

impl DatabaseStatus {
    /// The same with an error of one short line, and in the space that it may have.
    fn limited(mut self) -> Self {
        self.error = self.error.map(|error| one_line(&error, MAX_ERROR));
        let Some(excess) = self.excess() else {
            return self;
        };
        // A character is at least one byte.
        if let Some(error) = &self.error {
            let left = error.chars().count().saturating_sub(excess);
            self.error = Some(one_line(error, left.max(MAX_ERROR / 3)));
        }
        if self.excess().is_some() {
            // Part of the bounds would pass for other bounds.
            self.bounds = None;
        }
        self
    }

    fn excess(&self) -> Option<usize> {
        let length = serde_json::to_vec(self).map_or(0, |json| json.len());
        length.checked_sub(MAX_DATABASE).filter(|&it| it > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn database(error: Option<&str>, within: usize) -> DatabaseStatus {
        let network = |n: usize| format!("2001:db8:{n:x}::/48").parse().unwrap();
        DatabaseStatus {
            seen: Some(813),
            enforced: Some(812),
            sha256: Some("9c".repeat(32)),
            state: FleetState::Refused,
            error: error.map(Into::into),
            enforced_ms: Some(3.1),
            rules: 7,
            temporary: 1,
            bounds: Some(Bounds {
                widest: ["/16".into(), "/48".into()],
                within: (0..within).map(network).collect(),
                regions: ["osc-fr1".into()].into(),
                floor: 1,
            }),
            packets: None,
        }
    }

    fn length(database: &DatabaseStatus) -> usize {
        serde_json::to_vec(database).unwrap().len()
    }

    #[test]
    fn error_is_one_short_line() {
        let hostile = format!("line 3:\n\x1b[2J{}", "x".repeat(10_000));
        let error = database(Some(&hostile), 1).limited().error.unwrap();
        assert!(error.starts_with("line 3:  [2Jxxx"), "{error}");
        assert_eq!(error.chars().count(), MAX_ERROR);
    }

    #[test]
    fn what_a_hostile_host_reports_has_no_lines_and_no_names_of_its_own() {
        let hostile = "\x1b[2J\norders  9  ACTIVE";
        let mut own = database(Some(hostile), 1);
        own.enforced_ms = Some(1e308);
        let status = HostStatus {
            agent: "0.2.0".into(),
            boot: "3f0c".into(),
            cluster: None,
            era: Some(0),
            revision: Some(1),
            at: Timestamp::UNIX_EPOCH,
            databases: [("orders".into(), own.clone()), (hostile.into(), own)].into(),
        };
        let read = HostStatus::read(&serde_json::to_vec(&status).unwrap()).unwrap();
        assert_eq!(read.databases.len(), 1);
        let orders = &read.databases["orders"];
        let error = orders.error.as_deref();
        assert_eq!(error, Some(" [2J orders  9  ACTIVE"));
        assert_eq!(orders.enforced_ms, None);
        assert_eq!(HostStatus::read(&b"[".repeat(100_000)), None);
        let mut crowded = read;
        for n in 0..MAX_DATABASES {
            let orders = crowded.databases["orders"].clone();
            crowded.databases.insert(format!("invented-{n}"), orders);
        }
        let crowded = serde_json::to_vec(&crowded).unwrap();
        assert_eq!(HostStatus::read(&crowded), None);
    }

    #[test]
    fn database_has_bounded_space_and_loses_of_its_error_first() {
        // Two bytes a character in JSON.
        let error = "\"".repeat(MAX_ERROR);
        let whole = database(Some("short"), 3);
        assert_eq!(whole.clone().limited(), whole);
        let cut = database(Some(&error), 15).limited();
        assert!(length(&cut) <= MAX_DATABASE, "{}", length(&cut));
        assert!(cut.error.unwrap().len() < MAX_ERROR && cut.bounds.is_some());
        let without = database(Some(&error), 1000).limited();
        assert!(length(&without) <= MAX_DATABASE);
        assert_eq!(without.bounds, None);
    }

    #[test]
    fn time_and_revision_alone_are_no_news() {
        let status = |revision, error: Option<&str>| HostStatus {
            agent: "0.2.0".into(),
            boot: "3f0c".into(),
            cluster: None,
            era: Some(0),
            revision: Some(revision),
            at: Timestamp::from_second(revision).unwrap(),
            databases: [("orders".into(), database(error, 0))].into(),
        };
        assert!(status(1, None).reports_the_same(&status(2, None)));
        assert!(!status(1, None).reports_the_same(&status(1, Some("refused"))));
    }

    /// As another version might write it.
    #[test]
    fn what_is_not_known_is_passed_over() {
        let mut json = serde_json::to_value(database(None, 1)).unwrap();
        json["state"] = "mislaid".into();
        json["mood"] = "good".into();
        json["bounds"]["depth"] = 3.into();
        let read: DatabaseStatus = serde_json::from_value(json).unwrap();
        let state = FleetState::Unknown;
        assert_eq!(
            read,
            DatabaseStatus {
                state,
                ..database(None, 1)
            }
        );
    }
}
