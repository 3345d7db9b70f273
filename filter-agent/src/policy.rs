//! YAML text to a checked `Policy`.

use std::{collections::BTreeMap, fmt, net::IpAddr, path::PathBuf};

use filter_common::Protocol;
use ipnet::IpNet;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// A policy that holds: every name resolves, every number is in range, no two databases claim the
/// same port of the same address. Only `parse` makes one.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    pub interfaces: Vec<String>,
    pub mode: Mode,
    /// The built-in regions included.
    pub regions: BTreeMap<String, Region>,
    /// What "the regional network" means for shared databases.
    pub regional_network: Vec<IpNet>,
    pub databases: Vec<Database>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Native XDP, else generic.
    #[default]
    Auto,
    Native,
    Generic,
}

/// Where a region's prefixes come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Region {
    Prefixes(Vec<IpNet>),
    File(PathBuf),
    /// Names whose A and AAAA records are the region's addresses.
    Dns(Vec<String>),
    Url {
        url: String,
        select: BTreeMap<String, String>,
    },
}

/// Where the prefixes come from, in a few words.
impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Prefixes(_) => f.write_str("policy"),
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Dns(names) => write!(f, "dns {}", names.join(", ")),
            Self::Url { url, .. } => write!(f, "url {url}"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    Postgresql,
    Mysql,
    Redis,
    Mongodb,
    Other,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Database {
    pub name: String,
    pub protocol: Protocol,
    /// At least one, sorted, no two alike.
    pub ports: Vec<u16>,
    /// Local addresses the database listens on; empty: all.
    pub addresses: Vec<IpAddr>,
    pub engine: Engine,
    pub model: Model,
    pub force_tls: bool,
    /// Count what would be dropped, and pass it.
    pub monitor: bool,
    /// Its own cluster members: always allowed.
    pub cluster: Vec<IpNet>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Model {
    /// Closed but for these rules; at most `filter_common::MAX_RULES`.
    Dedicated { rules: Vec<Rule> },
    /// Open to the regional network, with `internet` to everybody.
    Shared { internet: bool },
}

#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    pub source: Source,
    pub label: Option<String>,
    /// The instant from which the rule no longer allows.
    pub expires: Option<Timestamp>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    Cidr(IpNet),
    /// A key of `Policy::regions`.
    Region(String),
}

/// As the policy file spells it, and as a rule is named everywhere: `203.0.113.0/24`, `region osc-fr1`.
impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cidr(prefix) => prefix.fmt(f),
            Self::Region(name) => write!(f, "region {name}"),
        }
    }
}

/// One thing wrong with, or notable in, a policy file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Counted from 1.
    pub line: Option<usize>,
    pub database: Option<String>,
    /// Place in the database's `rules`, counted from 1.
    pub rule: Option<usize>,
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// A checked policy and what its author should know of it, or everything wrong with it in the order
/// of the file.
pub fn parse(text: &str) -> Result<(Policy, Vec<Problem>), Vec<Problem>> {
    let _ = text;
    todo!()
}

/// A prefix as the policy spells it, or what is wrong with the text.
pub fn parse_cidr(text: &str) -> Result<IpNet, String> {
    text.parse()
        .map_err(|_| format!("{text} is not a prefix, such as 192.0.2.0/24"))
}
