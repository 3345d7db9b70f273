//! What the daemon answers and the commands print.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use ipnet::IpNet;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::kernel::difference::Difference;

#[derive(Debug, Deserialize, Serialize)]
pub struct Status {
    pub version: String,
    pub pid: u32,
    pub started: Timestamp,
    pub policy: Enforced,
    pub interfaces: Vec<Interface>,
    /// How often the filter was put back on an interface from which somebody took it.
    pub repairs: u64,
    pub databases: Vec<Database>,
    /// Packets dropped that could have been aimed at any database, by reason.
    pub unattributed: BTreeMap<String, u64>,
    /// The same where all it could have been aimed at is only monitored: passed.
    pub unattributed_would_drop: BTreeMap<String, u64>,
    pub regions: Vec<Region>,
    pub verified: Verified,
    pub warnings: Vec<String>,
    /// Why the filter does not do, on every listed interface that is there, what the policy in force says.
    pub not_enforced: Vec<String>,
    /// Where what is enforced is not what the policy says.
    pub errors: Vec<String>,
}

/// The policy in force, and how long each step to it took, in milliseconds.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Enforced {
    pub file: PathBuf,
    /// When its file was read and found valid.
    pub accepted: Timestamp,
    /// From `accepted` on.
    pub compiled_ms: f64,
    pub enforced_ms: f64,
    pub next_expiry: Option<Timestamp>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Interface {
    pub name: String,
    /// `native` or `generic`; `None`: not filtered.
    pub mode: Option<String>,
    pub program_id: Option<u32>,
}

#[derive(Debug, Deserialize, Serialize)]
pub struct Database {
    pub name: String,
    /// `tcp/5432`.
    pub ports: Vec<String>,
    /// Local addresses; empty: all.
    pub addresses: Vec<IpAddr>,
    pub model: String,
    pub monitor: bool,
    pub rules: usize,
    pub prefixes: usize,
    pub passed: u64,
    /// Packets dropped, by reason.
    pub dropped: BTreeMap<String, u64>,
    /// Packets that `monitor` let pass, by the reason to drop them.
    pub would_drop: BTreeMap<String, u64>,
    pub force_tls: bool,
    /// Where TLS is forced: connections by what became of them.
    pub connections: BTreeMap<String, u64>,
    /// The same while the database was only monitored.
    pub monitored_connections: BTreeMap<String, u64>,
}

/// The last comparison of the attached program with the policy.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Verified {
    pub at: Timestamp,
    /// Packets the program was run on.
    pub probes: usize,
    pub errors: Vec<String>,
}

#[derive(Debug, Deserialize, Serialize)]
pub struct Rule {
    pub database: String,
    /// Place in the policy's `rules`, from 1; `None`: given by the database's other fields.
    pub number: Option<usize>,
    pub source: String,
    pub label: Option<String>,
    pub expires: Option<Timestamp>,
    pub expired: bool,
    pub prefixes: usize,
    pub hits: u64,
}

#[derive(Debug, Deserialize, Serialize)]
pub struct Region {
    pub name: String,
    /// Where its prefixes come from.
    pub source: String,
    /// Whether a rule names it; only then is it looked up.
    pub used: bool,
    /// What is allowed, those that retire included, adjacent and covered ones merged.
    pub prefixes: Vec<IpNet>,
    pub retiring: Vec<Retiring>,
    /// When the source last gave this set.
    pub confirmed: Option<Timestamp>,
    /// The next look-up; `None`: when the file changes, or never.
    pub next: Option<Timestamp>,
    /// Whether the last look-up failed.
    pub failing: bool,
    /// The last error, which may be over.
    pub error: Option<Error>,
    pub change: Option<Change>,
}

/// A prefix that left its region's answer and is allowed for a while.
#[derive(Debug, Deserialize, Serialize)]
pub struct Retiring {
    pub prefix: IpNet,
    pub until: Timestamp,
}

#[derive(Debug, Deserialize, Serialize)]
pub struct Error {
    pub at: Timestamp,
    pub text: String,
}

/// The last change of a region.
#[derive(Debug, Deserialize, Serialize)]
pub struct Change {
    pub at: Option<Timestamp>,
    pub added: Vec<IpNet>,
    /// No longer in the answer, but allowed for a while.
    pub left: Vec<IpNet>,
    pub removed: Vec<IpNet>,
}

/// What a look-up came to.
#[derive(Debug, Deserialize, Serialize)]
pub struct Refreshed {
    pub region: String,
    pub prefixes: usize,
    pub added: Vec<IpNet>,
    pub left: Vec<IpNet>,
    pub removed: Vec<IpNet>,
    pub error: Option<String>,
}

#[derive(Debug, Deserialize, Serialize)]
pub struct Explanation {
    pub database: String,
    pub source: IpAddr,
    /// What the program does with such a packet.
    pub passes: bool,
    pub monitor: bool,
    pub reason: String,
    /// Whether a connection has to begin with TLS, too.
    pub force_tls: bool,
    pub rule: Option<String>,
    pub label: Option<String>,
    pub expires: Option<Timestamp>,
}

/// Who was turned away since the agent started.
#[derive(Debug, Deserialize, Serialize)]
pub struct Drops {
    pub since: Timestamp,
    /// Who tried most often first.
    pub sources: Vec<Dropped>,
    /// Packets of which nothing more is known: of a flood only some are looked at.
    pub unsampled: Vec<Unsampled>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Dropped {
    /// `None`: aimed at no database in particular.
    pub database: Option<String>,
    /// `None`: the packet did not tell.
    pub source: Option<IpAddr>,
    pub reason: String,
    /// Whether they were only counted, and passed.
    pub monitor: bool,
    /// At least.
    pub packets: u64,
    pub last_seen: Timestamp,
}

#[derive(Debug, Deserialize, Serialize)]
pub struct Unsampled {
    pub database: Option<String>,
    pub reason: String,
    pub monitor: bool,
    pub packets: u64,
}

/// What a policy file would change, or changed.
#[derive(Debug, Deserialize, Serialize)]
pub struct Plan {
    pub file: PathBuf,
    pub difference: Difference,
    /// Interfaces that come under the filter and that leave it.
    pub attached: Vec<String>,
    pub detached: Vec<String>,
    pub warnings: Vec<String>,
}

#[derive(Debug, Deserialize, Serialize)]
pub struct Reloaded {
    pub plan: Plan,
    pub enforced: Enforced,
    pub verified: Verified,
    /// What is wrong although the policy is enforced.
    pub errors: Vec<String>,
}

#[derive(Debug, Deserialize, Serialize)]
pub struct Failure {
    pub error: String,
}
