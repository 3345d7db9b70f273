//! The result of a look-up, as every kind of source returns it.

use std::{
    path::PathBuf,
    time::{Duration, SystemTime},
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// The content is that of the version that was given.
    Unchanged {
        ask_again: Option<Duration>,
    },
    Found(Found),
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Found {
    pub prefixes: Vec<IpNet>,
    /// The publisher's own number of this state, which only grows.
    pub serial: Option<u64>,
    pub version: Option<Version>,
    /// When the source is worth asking again, as it says itself; `None`: it does not say.
    pub ask_again: Option<Duration>,
}

/// What tells one content from another without reading it.
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
