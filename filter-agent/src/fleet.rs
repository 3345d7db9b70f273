//! The fleet's documents as they come from etcd, and what is believed of them.

pub mod host_status;
pub mod state;
mod this_host;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
};

use crate::{
    clock::{BootTime, Now},
    policy::{DocumentInForce, Policy},
    policy_file::PolicyFile,
};
use state::State;

pub use this_host::ThisHost;

/// A host's keys as etcd held them, read at one revision.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// etcd's id of the cluster.
    pub cluster: u64,
    /// Raised by `fleet recover` only; 0 where the key is not there.
    pub era: u64,
    /// The revision of the whole key space at which it was read.
    pub revision: i64,
    /// By database, each that was asked for.
    pub documents: BTreeMap<String, Found>,
}

/// The content of a database's key.
#[derive(Clone, Debug, PartialEq)]
pub enum Found {
    Missing,
    /// Why it may not be read.
    Unreadable(String),
    Value(Value),
}

/// A value, with etcd's numbers of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    pub text: Vec<u8>,
    /// The revision at which its key was made, and the one at which it was last changed.
    pub create_revision: i64,
    pub mod_revision: i64,
    /// Changes since its key was made, from 1.
    pub version: i64,
}

/// News of the keys that are followed.
#[derive(Clone, Debug, PartialEq)]
pub enum News {
    Answer {
        answer: Answer,
        /// Changes so far that a periodic read found, and the watch did not announce. More than 0 is a fault of etcd's.
        healed: u64,
        /// When it was announced, or began to be read.
        rang: BootTime,
    },
    /// One line: the endpoint, and why there is no connection to it. Another is made without being asked for.
    Lost(String),
    /// Whether the host's status was written.
    Status(Result<(), Unwritten>),
}

/// Why the host's status is not in etcd. It is tried again without being asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unwritten {
    /// Another host has this one's name.
    NameTaken,
    /// One line, such as that the user has no right to a key.
    Failed(String),
}

/// The parts of a host's own keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnKeys {
    /// The name of the host in the fleet.
    pub host: String,
    /// Its present life: tells it from another host of this name, and from itself before a reboot.
    pub boot: String,
}

/// The keys to follow, and the members of etcd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    pub endpoints: Vec<String>,
    pub ca_file: Option<PathBuf>,
    pub cert_file: Option<PathBuf>,
    pub key_file: Option<PathBuf>,
    /// Databases whose documents are read. At most 127: etcd takes 128 operations in a transaction.
    pub databases: BTreeSet<String>,
    /// `None`: no status is written.
    pub own: Option<OwnKeys>,
}

impl Settings {
    /// Those of a policy; `None`: nothing is followed.
    pub fn of(policy: &Policy, this_host: &ThisHost) -> Option<Self> {
        let fleet = policy.fleet.as_ref().filter(|_| is_followed(policy))?;
        let databases = policy.databases.iter().filter(|d| d.fleet.is_some());
        let databases: BTreeSet<String> = databases.map(|d| d.name.clone()).collect();
        Some(Self {
            endpoints: fleet.endpoints.clone(),
            ca_file: fleet.ca_file.clone(),
            cert_file: fleet.cert_file.clone(),
            key_file: fleet.key_file.clone(),
            databases,
            own: this_host.keys(policy).ok(),
        })
    }
}

/// Whether documents are taken from etcd.
pub fn is_followed(policy: &Policy) -> bool {
    let is_open = policy.fleet.as_ref().is_some_and(|fleet| !fleet.frozen);
    is_open && policy.databases.iter().any(|d| d.fleet.is_some())
}

/// A policy with the rules of the fleet that are in force.
pub fn with_rules(
    file: &Arc<PolicyFile>,
    state: &State,
    this_host: &ThisHost,
    now: Now,
) -> Arc<PolicyFile> {
    if file.policy.databases.iter().all(|d| d.fleet.is_none()) {
        return file.clone();
    }
    let mut file = file.as_ref().clone();
    let host = this_host.name(&file.policy);
    for database in &mut file.policy.databases {
        let Some(fleet) = &mut database.fleet else {
            continue;
        };
        let good = state.documents().get(&database.name);
        fleet.document = good.map(|good| DocumentInForce {
            revision: good.mod_revision,
            since: now.on_host(good.since),
        });
        let rules = good.map(|good| good.document.rules_of(&host, good.rollout_over));
        fleet.rules = rules.unwrap_or_default();
    }
    file.into()
}
