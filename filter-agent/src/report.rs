//! The agent's answers to requests, which the commands print.

mod firewall;
mod fleet;

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf, time::Duration};

use ipnet::IpNet;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub use firewall::{
    FirewallAction, FirewallRule, FirewallRuleOnly, FirewallRules, ManagedRange, ManagedRanges,
    RangeType, RuleState,
};
pub use fleet::{Fleet, FleetDocument, FleetRollout, FleetState};

use crate::{
    kernel::difference::Difference,
    policy::{DocumentInForce, spelled},
    text::{counted, list},
};

#[derive(Debug, Deserialize, Serialize)]
pub struct Status {
    pub version: String,
    pub pid: u32,
    pub started: Timestamp,
    pub policy: Enforced,
    pub interfaces: Vec<Interface>,
    /// How often another program detached the filter and the agent attached it again.
    pub repairs: u64,
    pub databases: Vec<Database>,
    /// Packets dropped whose database is unknown, by reason.
    pub unattributed: BTreeMap<String, u64>,
    /// Packets passed, since all databases that they may be for are only monitored, by the reason to drop them.
    pub unattributed_would_drop: BTreeMap<String, u64>,
    pub regions: Vec<Region>,
    pub verified: Verified,
    /// The trace that is on.
    #[serde(default)]
    pub tracing: Option<Tracing>,
    /// The window of a policy that is tried.
    #[serde(default)]
    pub window: Option<Window>,
    /// `None`: the host is of no fleet.
    #[serde(default)]
    pub fleet: Option<Fleet>,
    pub warnings: Vec<String>,
    /// Why the policy is not enforced on every listed interface that exists.
    pub not_enforced: Vec<String>,
    /// Differences between the policy and what is enforced.
    pub errors: Vec<String>,
}

/// The policy in force, and how long it took to enforce it.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Enforced {
    pub file: PathBuf,
    #[serde(flatten)]
    pub timing: Timing,
    pub next_expiry: Option<Timestamp>,
}

/// How long a change took.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Timing {
    /// When its file was read, its request taken, its answer there, or its end noticed.
    pub accepted: Timestamp,
    /// Milliseconds from `accepted` until it was compiled.
    pub compiled_ms: f64,
    /// Milliseconds from `accepted` until the kernel enforced it.
    pub enforced_ms: f64,
    /// Milliseconds from `accepted` until it was read back and probed. `None`: what was found is not right.
    #[serde(default)]
    pub verified_ms: Option<f64>,
    /// Interfaces on which it is enforced, as read back.
    #[serde(default)]
    pub interfaces: Vec<String>,
}

/// `in force after 4.1 ms on eth0`.
impl std::fmt::Display for Timing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "in force after {:.1} ms", self.enforced_ms)?;
        match self.interfaces.is_empty() {
            true => f.write_str(", attached to no interface"),
            false => write!(f, " on {}", list(self.interfaces.iter())),
        }
    }
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
    /// `tcp/5432` each.
    pub ports: Vec<String>,
    /// Local addresses; empty: all.
    pub addresses: Vec<IpAddr>,
    pub model: String,
    pub monitor: bool,
    pub rules: usize,
    /// Temporary rules in force, which `rules` counts too.
    #[serde(default)]
    pub temporary: usize,
    /// Blocks in force, which `rules` counts too.
    #[serde(default)]
    pub blocks: usize,
    /// Temporary rules that the database has no room for.
    #[serde(default)]
    pub suspended: usize,
    pub prefixes: usize,
    pub passed: u64,
    /// Packets dropped, by reason.
    pub dropped: BTreeMap<String, u64>,
    /// Packets that `monitor` let pass, by the reason to drop them.
    pub would_drop: BTreeMap<String, u64>,
    pub force_tls: bool,
    /// Whether connections without it are only counted.
    pub monitor_tls: bool,
    /// Connections by verdict, where TLS is forced.
    pub connections: BTreeMap<String, u64>,
    /// Connections by verdict while the database was only monitored.
    pub monitored_connections: BTreeMap<String, u64>,
}

/// The last comparison of the attached program with the policy.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Verified {
    pub at: Timestamp,
    /// Number of probe packets.
    pub probes: usize,
    /// Interfaces that run the program.
    #[serde(default)]
    pub interfaces: Vec<String>,
    pub errors: Vec<String>,
}

#[derive(Debug, Deserialize, Serialize)]
pub struct Rules {
    pub rules: Vec<Rule>,
}

#[derive(Debug, Deserialize, Serialize)]
pub struct Rule {
    pub database: String,
    /// Place in the database's `rules`, counted from 1. `None`: from another field, such as `cluster`.
    pub number: Option<usize>,
    pub source: String,
    pub label: Option<String>,
    pub expires: Option<Timestamp>,
    pub expired: bool,
    pub prefixes: usize,
    /// Packets that it allowed, or that it blocked.
    pub hits: u64,
    /// `None`: none since `counted_since`.
    #[serde(default)]
    pub last_hit: Option<Timestamp>,
    /// `None`: the kernel does not hold it.
    #[serde(default)]
    pub counted_since: Option<Timestamp>,
    /// Rules that hold all that it does, for as long: without it alone nothing changes.
    #[serde(default)]
    pub covered_by: Vec<String>,
    #[serde(default)]
    pub origin: Origin,
    #[serde(default)]
    pub except: Vec<IpNet>,
    /// Seconds until it ends.
    #[serde(default)]
    pub left: Option<u64>,
    /// Whether it is not in force, since the database has no room for it.
    #[serde(default)]
    pub suspended: bool,
    #[serde(default)]
    pub added: Option<Timestamp>,
    #[serde(default)]
    pub by: Option<By>,
}

/// Where a rule comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    #[default]
    File,
    /// Of the fleet's document.
    Fleet,
    /// Added by `allow`.
    Temporary,
    /// Added by `block`.
    Block,
}

impl Origin {
    pub fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Fleet => "fleet",
            Self::Temporary => "temporary",
            Self::Block => "block",
        }
    }
}

#[derive(Debug, Deserialize, Serialize)]
pub struct Regions {
    pub regions: Vec<Region>,
}

#[derive(Debug, Deserialize, Serialize)]
pub struct Region {
    pub name: String,
    /// Source of its prefixes.
    pub source: String,
    /// Whether a rule names it; only then is it looked up.
    pub used: bool,
    /// Allowed prefixes, retiring ones included, with adjacent and covered ones merged.
    pub prefixes: Vec<IpNet>,
    pub retiring: Vec<Retiring>,
    /// When the source last returned this set.
    pub confirmed: Option<Timestamp>,
    /// The next look-up. `None`: never, or one is under way.
    pub next: Option<Timestamp>,
    /// Whether the last look-up failed, or something was missing in its result.
    pub failing: bool,
    /// Whether its result is in force although something was missing in it.
    #[serde(default)]
    pub partial: bool,
    /// The last error; it is resolved unless `failing`.
    pub error: Option<Error>,
    pub change: Option<Change>,
}

/// A retiring prefix: it left its region, and stays allowed until then.
#[derive(Debug, Deserialize, Serialize)]
pub struct Retiring {
    pub prefix: IpNet,
    pub until: Timestamp,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Error {
    pub at: Timestamp,
    pub text: String,
}

/// The last change of a region.
#[derive(Debug, Deserialize, Serialize)]
pub struct Change {
    pub at: Option<Timestamp>,
    pub added: Vec<IpNet>,
    /// Retiring: no longer in the result, but still allowed.
    pub left: Vec<IpNet>,
    pub removed: Vec<IpNet>,
    /// `None`: it is not in force yet.
    #[serde(default)]
    pub timing: Option<Timing>,
}

#[derive(Debug, Deserialize, Serialize)]
pub struct Refreshes {
    pub regions: Vec<Refreshed>,
}

/// The result of `refresh` for a region.
#[derive(Debug, Deserialize, Serialize)]
pub struct Refreshed {
    pub region: String,
    pub prefixes: usize,
    pub added: Vec<IpNet>,
    pub left: Vec<IpNet>,
    pub removed: Vec<IpNet>,
    /// Why the look-up failed, or what was missing in its result.
    pub error: Option<String>,
    /// Whether its result is in force all the same.
    #[serde(default)]
    pub partial: bool,
}

#[derive(Debug, Deserialize, Serialize)]
pub struct Verdicts {
    pub verdicts: Vec<Explanation>,
}

#[derive(Debug, Deserialize, Serialize)]
pub struct Explanation {
    pub database: String,
    pub source: IpAddr,
    /// Whether the program passes such a packet.
    pub passes: bool,
    pub monitor: bool,
    pub reason: String,
    /// Whether a connection must also begin with TLS.
    pub force_tls: bool,
    pub rule: Option<String>,
    pub label: Option<String>,
    pub expires: Option<Timestamp>,
    /// Seconds until the rule or the block ends.
    #[serde(default)]
    pub left: Option<u64>,
    #[serde(default)]
    pub by: Option<By>,
    /// The fleet's document that has the rule.
    #[serde(default)]
    pub document: Option<DocumentInForce>,
    /// The exception of a rule that keeps the source out, in words.
    #[serde(default)]
    pub exception: Option<String>,
    /// The interface through which packets of this source come, where that is not filtered: loopback for the host's own
    /// addresses.
    #[serde(default)]
    pub unfiltered: Option<String>,
}

/// Dropped packets since the agent started.
#[derive(Debug, Deserialize, Serialize)]
pub struct Drops {
    pub since: Timestamp,
    /// Sampled sources, those with most packets first.
    pub sources: Vec<Dropped>,
    /// Sources beyond the limit that was asked for.
    #[serde(default)]
    pub left_out: usize,
    /// Packets that were not sampled: of a flood only some are.
    pub unsampled: Vec<Unsampled>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Dropped {
    /// `None`: the database is unknown.
    pub database: Option<String>,
    /// `None`: the packet's source address could not be parsed.
    pub source: Option<IpAddr>,
    pub reason: String,
    /// Whether the packets were only counted, and passed.
    pub monitor: bool,
    /// Lower bound of the number of packets.
    pub packets: u64,
    #[serde(default)]
    pub first_seen: Option<Timestamp>,
    pub last_seen: Timestamp,
    /// First bytes of a refused connection instead of TLS, in words.
    #[serde(default)]
    pub opening: Option<String>,
    /// Facts about the source, or how it could get in.
    #[serde(default)]
    pub hint: Option<String>,
    /// The command that would let the source in.
    #[serde(default)]
    pub allow: Option<String>,
}

#[derive(Debug, Deserialize, Serialize)]
pub struct Unsampled {
    pub database: Option<String>,
    pub reason: String,
    pub monitor: bool,
    pub packets: u64,
}

/// The last lines of the agent's log.
#[derive(Debug, Deserialize, Serialize)]
pub struct Events {
    /// When they began to be numbered, at the start of the agent.
    pub since: Timestamp,
    /// Oldest first.
    pub events: Vec<Logged>,
}

/// A line of the log.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Logged {
    /// Counted from 1.
    pub number: u64,
    pub at: Timestamp,
    /// `error`, `warning` or `info`.
    pub level: String,
    pub text: String,
    /// By their names in the journal.
    pub fields: BTreeMap<String, String>,
}

/// The difference that a policy makes or would make.
#[derive(Debug, Deserialize, Serialize)]
pub struct Plan {
    pub file: PathBuf,
    /// SHA-256 of its text, for `reload --if`.
    #[serde(default)]
    pub hash: String,
    pub difference: Difference,
    /// How the policy differs from the one in force, a line each: what the kernel's prefixes and ports do not show.
    #[serde(default)]
    pub settings: Vec<String>,
    /// Interfaces that will be filtered and are not yet.
    pub attached: Vec<String>,
    /// Interfaces that will no longer be filtered.
    pub detached: Vec<String>,
    pub warnings: Vec<String>,
    /// Open connections whose source loses its access.
    #[serde(default)]
    pub cut: Vec<Cut>,
    /// Why open connections are not known, or not all of them.
    #[serde(default)]
    pub cut_unknown: Vec<String>,
    /// Databases that the caller can no longer reach.
    #[serde(default)]
    pub lock_out: Vec<LockOut>,
}

/// A database that lets the caller pass before a change, and not after it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct LockOut {
    pub database: String,
    /// The rule that allowed the caller. `None`: it was not guarded, or only monitored.
    pub rule: Option<String>,
}

/// Connections of one source that a change cuts off.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Cut {
    pub database: String,
    /// The rule that allowed the source. `None`: the port was not guarded, or only monitored.
    pub rule: Option<String>,
    pub source: IpAddr,
    pub connections: usize,
    /// Seconds since the longest idle of them received data; the kernel keeps no time of a connection's beginning.
    pub idle: Option<u64>,
    /// Whether the server's side is reset.
    pub reset: bool,
    /// Whether that waits until the policy is confirmed.
    #[serde(default)]
    pub at_confirm: bool,
}

/// `database orders: 3 connections of 203.0.113.9, which 203.0.113.0/24 allowed, are cut off and reset`.
impl std::fmt::Display for Cut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let connections = counted(self.connections, "connection", "connections");
        let Self {
            database,
            rule,
            source,
            ..
        } = self;
        write!(f, "database {database}: {connections} of {source}")?;
        match rule {
            Some(rule) => write!(f, ", allowed by {rule}")?,
            None => f.write_str(", from before the port was guarded")?,
        }
        if let Some(idle) = self.idle {
            write!(f, ", idle for up to {}", spelled(Duration::from_secs(idle)))?;
        }
        f.write_str(match (self.reset, self.at_confirm) {
            (true, false) => ": cut off and reset",
            (true, true) => ": cut off, and reset when the policy is confirmed",
            (false, _) => ": cut off, and left to the server (on_removal: keep)",
        })
    }
}

#[derive(Debug, Deserialize, Serialize)]
pub struct Reloaded {
    /// The number of the change; where nothing changed, that of the policy in force.
    #[serde(default)]
    pub id: u64,
    pub plan: Plan,
    pub enforced: Enforced,
    pub verified: Verified,
    /// The window in which it has to be confirmed.
    #[serde(default)]
    pub window: Option<Window>,
    /// Errors after the policy was enforced.
    pub errors: Vec<String>,
}

/// The interfaces that are no longer filtered.
#[derive(Debug, Deserialize, Serialize)]
pub struct Detached {
    pub interfaces: Vec<String>,
}

/// A policy that is tried until somebody confirms it.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Window {
    /// The id of the change.
    pub id: u64,
    pub opened: Timestamp,
    /// When the confirmed policy is enforced again, by the host's clock.
    pub until: Timestamp,
    /// Seconds until then.
    pub left: u64,
    pub by: Option<By>,
}

/// `change 7 is tried until 2026-12-31T18:00:00Z (1m 20s left), by uid 0, filter-agent`.
impl std::fmt::Display for Window {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let left = spelled(Duration::from_secs(self.left));
        write!(
            f,
            "change {} is tried until {} ({left} left)",
            self.id, self.until
        )?;
        match &self.by {
            Some(by) => write!(f, ", by {by}"),
            None => Ok(()),
        }
    }
}

/// The end of a window by `confirm`.
#[derive(Debug, Deserialize, Serialize)]
pub struct Decided {
    pub id: u64,
    /// The file of the policy in force.
    pub file: PathBuf,
    /// `false`: the confirmed policy is enforced again.
    pub confirmed: bool,
    pub difference: Difference,
    /// `None`: nothing changed in the kernel.
    #[serde(default)]
    pub timing: Option<Timing>,
    pub cut: Vec<Cut>,
    pub cut_unknown: Vec<String>,
    /// Errors after it was done.
    pub errors: Vec<String>,
}

/// The client of the control socket that asked for a change.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct By {
    pub uid: u32,
    /// The user that logged in (`loginuid`), whoever it has become since.
    pub login_uid: Option<u32>,
    pub pid: Option<i32>,
    pub command: Option<String>,
}

/// A change of the temporary rules.
#[derive(Debug, Deserialize, Serialize)]
pub struct Temporary {
    /// The number of the change; 0: it is not made yet.
    #[serde(default)]
    pub id: u64,
    pub database: String,
    pub action: Action,
    /// Whether it was not so already.
    #[serde(default)]
    pub changed: bool,
    pub source: IpNet,
    pub label: Option<String>,
    pub until: Option<Timestamp>,
    /// The rule as it is now. `None`: there is none any more.
    #[serde(default)]
    pub rule: Option<FirewallRule>,
    /// The tag of the database's rules as they are now.
    #[serde(skip)]
    pub tag: String,
    /// `None`: it is not made yet.
    #[serde(default)]
    pub timing: Option<Timing>,
    /// Side effects that the operator may not expect.
    pub notes: Vec<String>,
    pub difference: Difference,
    #[serde(default)]
    pub cut: Vec<Cut>,
    #[serde(default)]
    pub cut_unknown: Vec<String>,
    #[serde(default)]
    pub lock_out: Vec<LockOut>,
    /// Errors after it was in force.
    pub errors: Vec<String>,
}

impl Temporary {
    /// The report of a change that is not made yet.
    pub fn new(database: &str, action: Action, source: IpNet) -> Self {
        Self {
            id: 0,
            database: database.to_owned(),
            action,
            changed: true,
            source,
            label: None,
            until: None,
            rule: None,
            tag: String::new(),
            timing: None,
            notes: Vec::new(),
            difference: Difference::default(),
            cut: Vec::new(),
            cut_unknown: Vec::new(),
            lock_out: Vec::new(),
            errors: Vec::new(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    Allowed,
    Blocked,
    Revoked,
    /// The time of a temporary rule is over.
    Ended,
    /// The time of a block is over.
    Unblocked,
}

impl Action {
    pub fn name(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Blocked => "blocked",
            Self::Revoked => "revoked",
            Self::Ended => "ended",
            Self::Unblocked => "unblocked",
        }
    }
}

/// `database orders: 203.0.113.9/32 allowed until 2026-12-31T18:00:00Z`.
impl std::fmt::Display for Temporary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            database,
            source,
            until,
            ..
        } = self;
        let action = self.action.name();
        write!(f, "database {database}: {source} {action}")?;
        until.map_or(Ok(()), |until| write!(f, " until {until}"))
    }
}

impl std::fmt::Display for By {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "uid {}", self.uid)?;
        if let Some(uid) = self.login_uid {
            write!(f, " (logged in as {uid})")?;
        }
        match &self.command {
            Some(command) => write!(f, ", {command}"),
            None => Ok(()),
        }
    }
}

/// A trace that is on.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Tracing {
    pub source: IpNet,
    pub database: Option<String>,
    pub until: Timestamp,
    pub by: Option<By>,
}

impl std::fmt::Display for Tracing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a trace of {} ", self.source)?;
        if let Some(database) = &self.database {
            write!(f, "to database {database} ")?;
        }
        write!(f, "is on until {:.0}", self.until)?;
        match &self.by {
            Some(by) => write!(f, ", by {by}"),
            None => Ok(()),
        }
    }
}

/// A line of a trace.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(untagged)]
pub enum TraceLine {
    /// The first line: packets of this prefix are logged from now on.
    Begun {
        tracing: IpNet,
        database: Option<String>,
        until: Timestamp,
    },
    Packet(Box<Traced>),
    /// Packets whose steps were not logged, since there were too many.
    Lost {
        lost: u64,
    },
    /// The last line: why it has ended.
    Ended {
        ended: String,
    },
}

/// The steps of a program on one packet.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Traced {
    /// When the agent read it, up to a quarter of a second later than the packet.
    pub at: Timestamp,
    pub source: IpAddr,
    /// `None`: one that has appeared since.
    pub interface: Option<String>,
    /// Whether it was judged at the socket, where TLS is forced, and not at the interface.
    pub at_socket: bool,
    /// `None`: neither TCP nor UDP, or not known.
    pub protocol: Option<String>,
    pub port: Option<u16>,
    pub database: Option<String>,
    /// The rule that allows the source, or the block that holds it.
    pub rule: Option<String>,
    /// `None`: the packet was allowed, or concerns no database.
    pub reason: Option<String>,
    pub passed: bool,
    /// All of it in words.
    pub text: String,
}

#[derive(Debug, Deserialize, Serialize)]
pub struct Failure {
    pub error: String,
}
