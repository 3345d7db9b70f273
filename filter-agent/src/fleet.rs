//! The fleet's documents as they come from etcd, and what is believed of them.

pub mod state;

use std::collections::BTreeMap;

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
