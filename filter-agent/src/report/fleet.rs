//! The fleet as a host knows it.

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::Error;

#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Fleet {
    /// Name of this host in it.
    pub host: String,
    pub endpoints: Vec<String>,
    /// Whether nothing new is taken.
    pub frozen: bool,
    /// etcd's id of its cluster, in hexadecimal digits. `None`: no answer was believed yet.
    pub cluster: Option<String>,
    pub era: Option<u64>,
    /// The revision at which etcd was read last.
    pub revision: Option<i64>,
    /// When etcd answered last.
    pub answered: Option<Timestamp>,
    /// Since when etcd does not answer, and why.
    pub lost: Option<Error>,
    /// Since when its answers are not believed, and why.
    pub held: Option<Error>,
    /// Changes that etcd did not announce, and that a read found.
    pub healed: u64,
    /// When the status of this host was last written to etcd.
    #[serde(default)]
    pub status_written: Option<Timestamp>,
    /// Since when it is not, and why.
    #[serde(default)]
    pub status_unwritten: Option<Error>,
    pub documents: Vec<FleetDocument>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct FleetDocument {
    pub database: String,
    pub state: FleetState,
    /// Why the newest document is not in force.
    pub error: Option<String>,
    /// etcd's revision of the document in force. `None`: there is none.
    pub revision: Option<i64>,
    /// SHA-256 of its text.
    pub sha256: Option<String>,
    pub since: Option<Timestamp>,
    /// Rules of it in force on this host.
    pub rules: usize,
    pub rollout: Option<FleetRollout>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct FleetRollout {
    pub on: BTreeSet<String>,
    pub until: Timestamp,
    /// Whether its rules are in force on this host.
    pub in_force: bool,
}

/// How a document stands. In all states the last good one stays in force, if there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FleetState {
    /// The newest one is in force.
    Active,
    Refused,
    Held,
    Missing,
    Unreadable,
    /// It was not read yet, or a host of a newer version has another word.
    #[serde(other)]
    Unknown,
}

impl FleetState {
    pub fn name(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Refused => "refused",
            Self::Held => "held",
            Self::Missing => "missing",
            Self::Unreadable => "unreadable",
            Self::Unknown => "unknown",
        }
    }
}
