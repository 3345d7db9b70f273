//! A checked policy, without its regions' definitions.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
};

use filter_common::{Engine, Protocol};
use glob::Pattern;
use ipnet::IpNet;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::policy::{
    fleet::{Bounds, Fleet},
    region::Region,
};

/// A valid policy: every name resolves, every number is in range, no two databases claim the same port of the same
/// address. Only `parse` makes one.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    pub interfaces: Vec<Listed>,
    /// Names and patterns of interfaces that need not be listed.
    pub ignored_interfaces: Vec<Listed>,
    pub mode: Mode,
    /// Modes of entries of `interfaces` that have their own, by the entry's text.
    pub modes: BTreeMap<String, Mode>,
    /// The built-in regions included.
    pub regions: BTreeMap<String, Region>,
    /// Prefixes from which shared databases are open.
    pub regional_network: Vec<IpNet>,
    pub databases: Vec<Database>,
    /// Databases, by name, and interfaces (`interface eth1`) that a reload of this policy may leave unprotected.
    pub unprotected: BTreeSet<String>,
    /// Address on which metrics are served, besides the control socket.
    pub metrics: Option<SocketAddr>,
    /// The source of the fleet's documents, if the host is of one.
    pub fleet: Option<Box<Fleet>>,
}

/// An entry of `interfaces`.
#[derive(Clone, Debug, PartialEq)]
pub enum Listed {
    Name(String),
    /// Every Ethernet interface whose name the shell pattern matches.
    Pattern(Pattern),
    /// Every interface with a default route.
    DefaultRoute,
}

/// The spelling of the policy file.
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
    /// Not empty, sorted, without duplicates.
    pub ports: Vec<u16>,
    /// Local addresses the database listens on; empty: all.
    pub addresses: Vec<IpAddr>,
    pub model: Model,
    pub tls: Option<Tls>,
    /// Count packets that would be dropped, and pass them.
    pub monitor: bool,
    /// Treatment of the connections of a source that loses its access.
    pub on_removal: OnRemoval,
    /// Members of its own cluster: always allowed, and exempt from forced TLS. Of regions only those whose prefixes the
    /// operator writes (`file`, `prefixes`).
    pub cluster: Vec<Rule>,
    /// The bounds and the rules of the fleet. `None`: it may add none.
    pub fleet: Option<FromFleet>,
}

/// The fleet's part of a database.
#[derive(Clone, Debug, PartialEq)]
pub struct FromFleet {
    pub bounds: Bounds,
    /// Rules of the fleet's document that is in force. `parse` leaves them empty.
    pub rules: Vec<Rule>,
    /// That document. `None`: there is none.
    pub document: Option<DocumentInForce>,
}

/// A document of the fleet that is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct DocumentInForce {
    /// etcd's revision of its last change.
    pub revision: i64,
    /// Since when it is in force, by the host's clock.
    pub since: Timestamp,
}

/// Treatment of the connections that a change cuts off. Their packets are dropped in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OnRemoval {
    /// The server's side is reset, so that it is free at once.
    #[default]
    Reset,
    /// The server's side is left to its own time limits.
    Keep,
}

/// How TLS is forced on a database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tls {
    pub engine: Engine,
    /// Whether PostgreSQL's CancelRequest is allowed without TLS.
    pub cancel_in_clear: bool,
    /// Whether the port stays open where TLS cannot be enforced.
    pub open_unenforced: bool,
    /// Count connections that would be refused, and let them pass.
    pub monitor: bool,
    /// Whether connections begin with a PROXY header.
    pub proxied: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Model {
    /// Only these rules allow sources; at most `filter_common::MAX_RULES`.
    Dedicated { rules: Vec<Rule> },
    /// Open to the regional network; with `internet` to every source.
    Shared { internet: bool },
}

#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    pub source: Source,
    /// Networks of the source that this rule does not allow; another may.
    pub except: Vec<IpNet>,
    pub label: Option<String>,
    /// From then on the rule allows nobody.
    pub expires: Option<Timestamp>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    Cidr(IpNet),
    /// A key of `Policy::regions`.
    Region(String),
}

impl Database {
    /// The rules of a dedicated database; a shared one has none.
    pub fn rules(&self) -> &[Rule] {
        match &self.model {
            Model::Dedicated { rules } => rules,
            Model::Shared { .. } => &[],
        }
    }

    /// The rules of the fleet's document that is in force.
    pub fn fleet_rules(&self) -> &[Rule] {
        self.fleet.as_ref().map_or(&[], |fleet| &fleet.rules)
    }

    /// The rules of the policy and of the fleet.
    pub fn all_rules(&self) -> impl Iterator<Item = &Rule> {
        self.rules().iter().chain(self.fleet_rules())
    }

    /// Returns `tcp/5432` for each port.
    pub fn guarded_ports(&self) -> Vec<String> {
        let protocol = self.protocol.name();
        self.ports
            .iter()
            .map(|port| format!("{protocol}/{port}"))
            .collect()
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Native => "native",
            Self::Generic => "generic",
        })
    }
}

impl Model {
    /// The spelling of the policy file.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Dedicated { .. } => "dedicated",
            Self::Shared { .. } => "shared",
        }
    }
}

/// The name of a rule in every output: `203.0.113.0/24`, `region osc-fr1`.
impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cidr(prefix) => prefix.fmt(f),
            Self::Region(name) => write!(f, "region {name}"),
        }
    }
}
