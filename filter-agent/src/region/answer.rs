//! The result of a look-up, as every kind of source returns it.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{prefixes::Prefixes, region::guards::merged};

#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// The content is still that of the version in the request.
    Unchanged {
        ask_again: Option<Duration>,
    },
    Found(Found),
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Found {
    pub prefixes: Vec<IpNet>,
    /// The same, adjacent and covered ones merged, where they were so many that it takes a while.
    pub merged: Option<Arc<Prefixes>>,
    /// The publisher's version number of the list, which only grows.
    pub serial: Option<u64>,
    pub version: Option<Version>,
    /// Time until the source may have another result (DNS: the TTL). `None`: unknown.
    pub ask_again: Option<Duration>,
    pub missing: Option<Missing>,
}

impl Found {
    /// A result of any length. Sorts and merges it: the agent's loop must not.
    pub fn of(mut prefixes: Vec<IpNet>) -> Self {
        prefixes.sort_unstable();
        prefixes.dedup();
        Self {
            merged: Some(Prefixes::shared(merged(&prefixes))),
            prefixes,
            ..Self::default()
        }
    }
}

/// A part of the source that could not be looked up: the addresses of a family.
#[derive(Clone, Debug, PartialEq)]
pub struct Missing {
    pub v4: bool,
    pub v6: bool,
    pub error: String,
}

/// Identifies a content without reading it.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Version {
    File(Stamp),
    /// Validators of RFC 9110 section 8.8.
    Http {
        etag: Option<String>,
        last_modified: Option<String>,
    },
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Stamp {
    pub path: PathBuf,
    pub device: u64,
    pub inode: u64,
    pub length: u64,
    pub modified: SystemTime,
}
