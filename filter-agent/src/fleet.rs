//! The fleet's documents as they come from etcd, and what is believed of them.

pub mod state;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
};

use crate::{
    clock::Now,
    policy::{InForce, Policy},
    policy_file::PolicyFile,
};
use state::State;

/// What etcd held of a host's keys, read at one revision.
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

/// What was found under a database's key.
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

/// What comes of following the fleet's keys.
#[derive(Debug)]
pub enum News {
    Answer(Answer),
    /// Why there is no answer, with the endpoint.
    Lost(String),
}

/// What is to be followed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    pub endpoints: Vec<String>,
    pub ca_file: Option<PathBuf>,
    pub cert_file: Option<PathBuf>,
    pub key_file: Option<PathBuf>,
    /// Databases whose documents are read.
    pub databases: BTreeSet<String>,
}

impl Settings {
    /// What a policy has to be followed; `None`: nothing, or nothing new is taken.
    pub fn of(policy: &Policy) -> Option<Self> {
        let fleet = policy.fleet.as_ref().filter(|fleet| !fleet.frozen)?;
        let databases = policy.databases.iter().filter(|d| d.fleet.is_some());
        let databases: BTreeSet<String> = databases.map(|d| d.name.clone()).collect();
        (!databases.is_empty()).then(|| Self {
            endpoints: fleet.endpoints.clone(),
            ca_file: fleet.ca_file.clone(),
            cert_file: fleet.cert_file.clone(),
            key_file: fleet.key_file.clone(),
            databases,
        })
    }
}

/// A policy with the rules of the fleet that are in force. `own_name`: the host's.
pub fn with_rules(
    file: &Arc<PolicyFile>,
    state: &State,
    own_name: &str,
    now: Now,
) -> Arc<PolicyFile> {
    if file.policy.databases.iter().all(|d| d.fleet.is_none()) {
        return file.clone();
    }
    let mut file = file.as_ref().clone();
    let fleet = file.policy.fleet.as_ref();
    let host = fleet.and_then(|fleet| fleet.host.clone());
    let host = host.unwrap_or_else(|| own_name.to_owned());
    for database in &mut file.policy.databases {
        let Some(fleet) = &mut database.fleet else {
            continue;
        };
        let good = state.documents().get(&database.name);
        fleet.document = good.map(|good| InForce {
            revision: good.mod_revision,
            since: now.on_host(good.since),
        });
        let rules = good.map(|good| good.document.rules_of(&host, good.rollout_over));
        fleet.rules = rules.unwrap_or_default();
    }
    file.into()
}
