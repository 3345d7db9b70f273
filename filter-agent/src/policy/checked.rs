//! A checked policy, without its regions' definitions.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

use filter_common::{Engine, Protocol};
use glob::Pattern;
use ipnet::IpNet;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::policy::region::Region;

/// A policy that holds: every name resolves, every number is in range, no two databases claim the
/// same port of the same address. Only `parse` makes one.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    pub interfaces: Vec<Listed>,
    pub mode: Mode,
    /// The built-in regions included.
    pub regions: BTreeMap<String, Region>,
    /// What "the regional network" means for shared databases.
    pub regional_network: Vec<IpNet>,
    /// How many connections with forced TLS are followed at once.
    pub tls_connections: u32,
    pub databases: Vec<Database>,
    /// Databases (by name) and interfaces (`interface eth1`) whose protection this policy may end when it
    /// takes another's place.
    pub unprotected: BTreeSet<String>,
}

/// An entry of `interfaces`.
#[derive(Clone, Debug, PartialEq)]
pub enum Listed {
    Name(String),
    /// Every Ethernet interface whose name the shell pattern matches.
    Pattern(Pattern),
    /// Whichever carries a default route.
    DefaultRoute,
}

/// As the policy file spells it.
impl fmt::Display for Listed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Pattern(pattern) => pattern.fmt(f),
            Self::DefaultRoute => f.write_str(DEFAULT_ROUTE),
        }
    }
}

pub(super) const DEFAULT_ROUTE: &str = "default";

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Native XDP, else generic.
    #[default]
    Auto,
    Native,
    Generic,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Database {
    pub name: String,
    pub protocol: Protocol,
    /// At least one, sorted, no two alike.
    pub ports: Vec<u16>,
    /// Local addresses the database listens on; empty: all.
    pub addresses: Vec<IpAddr>,
    pub model: Model,
    pub tls: Option<Tls>,
    /// Count what would be dropped, and pass it.
    pub monitor: bool,
    /// Its own cluster members: always allowed.
    pub cluster: Vec<IpNet>,
}

/// How TLS is forced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tls {
    pub engine: Engine,
    /// Whether PostgreSQL's CancelRequest may come in the clear.
    pub cancel_in_clear: bool,
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

impl Database {
    /// `tcp/5432`, for each port.
    pub fn guarded_ports(&self) -> Vec<String> {
        let protocol = self.protocol.name();
        self.ports
            .iter()
            .map(|port| format!("{protocol}/{port}"))
            .collect()
    }
}

impl Model {
    /// As the policy file spells it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Dedicated { .. } => "dedicated",
            Self::Shared { .. } => "shared",
        }
    }
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
