//! Temporary rules and blocks, and the ends of rules. Pure: no I/O, no clock.

mod changes;
mod ends;

use filter_common::{MAX_BLOCKS, MAX_RULES};
use ipnet::IpNet;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub use changes::{Amendment, Change, New, Until, Wanted, find_database, parse_source};
pub use ends::{Dated, Ends, InKernel, Kept};

use crate::{
    clock::{BootTime, Now},
    log::Entry,
    policy::{Database, Model, Policy, Source},
    report::By,
    rules::rule_id,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Allow,
    Block,
}

/// A rule that `allow` or `block` added to those of the policy.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Temporary {
    pub database: String,
    pub kind: Kind,
    pub source: IpNet,
    pub label: Option<String>,
    pub added: Timestamp,
    pub by: Option<By>,
    pub end: BootTime,
    /// The date of the end, by the host's clock when the rule was added.
    pub until: Timestamp,
}

impl Temporary {
    /// A rule that is added now, without a label.
    pub fn new(database: &str, kind: Kind, source: IpNet, end: BootTime, now: Now) -> Self {
        Self {
            database: database.to_owned(),
            kind,
            source,
            label: None,
            added: now.wall,
            by: None,
            end,
            until: now.date_of(end),
        }
    }

    /// Its id among the rules of its database, whatever its label and end.
    pub fn id(&self) -> String {
        let origin = match self.kind {
            Kind::Allow => "temporary",
            Kind::Block => "block",
        };
        rule_id(origin, &Source::Cidr(self.source))
    }

    /// Whether both are the same rule, with whatever end.
    pub fn is_same(&self, other: &Self) -> bool {
        let key = |rule: &Self| (rule.database.clone(), rule.kind, rule.source);
        key(self) == key(other)
    }
}

/// The part of what is enforced that depends on time.
#[derive(Clone, Debug, PartialEq)]
pub struct Timed {
    pub now: Now,
    pub ends: Ends,
    /// Oldest first.
    pub temporary: Vec<Temporary>,
}

impl Timed {
    /// A policy by itself, whose rules end by the host's clock.
    pub fn of(policy: &Policy, now: Now) -> Self {
        Self {
            now,
            ends: Ends::anew(policy, now),
            temporary: Vec::new(),
        }
    }

    pub fn at(&self, now: Now) -> Self {
        Self {
            now,
            ..self.clone()
        }
    }

    /// Returns what is to be enforced after time has passed, and lines for the log about the policy's rules that have ended
    /// since.
    pub fn passed(&self, now: Now) -> (Self, Vec<Entry>) {
        let mut timed = self.at(now);
        timed.drop_ended();
        timed.ends.bring_nearer(now);
        (timed, self.ended(now.boot))
    }

    /// Forgets temporary rules that have ended.
    fn drop_ended(&mut self) {
        let now = self.now.boot;
        self.temporary.retain(|rule| rule.end > now);
    }

    /// Lines for the log about the policy's rules that ended from then on until `now`.
    fn ended(&self, now: BootTime) -> Vec<Entry> {
        let is_new = |end: BootTime| self.now.boot < end && end <= now;
        let dated = self.ends.iter().filter(|(_, end)| is_new(*end));
        let dated = dated.map(|(Dated { database, rule, .. }, _)| {
            let rule = rule.trim_start_matches(['=', '&', '@', '*', '^']);
            let text = format!("database {database}: the rule of {rule} has expired");
            Entry::info(text)
                .with("DATABASE", database)
                .with("RULE", rule)
                .with("REASON", "ended")
        });
        dated.collect()
    }

    /// The temporary rules of databases that a policy has, and filters by source.
    pub fn of_policy(&self, policy: &Policy) -> Vec<Temporary> {
        let has = |rule: &&Temporary| {
            let mut databases = policy.databases.iter();
            databases.any(|database| {
                database.name == rule.database && matches!(database.model, Model::Dedicated { .. })
            })
        };
        self.temporary.iter().filter(has).cloned().collect()
    }

    /// The temporary rules and blocks of a database that have not ended and are not suspended, oldest first.
    pub fn in_force<'a>(&'a self, database: &'a Database) -> impl Iterator<Item = &'a Temporary> {
        let mut room = room(database);
        let of_database =
            move |rule: &&Temporary| rule.database == database.name && rule.end > self.now.boot;
        self.temporary
            .iter()
            .filter(of_database)
            .filter(move |rule| {
                let left = match rule.kind {
                    Kind::Allow => &mut room.0,
                    Kind::Block => &mut room.1,
                };
                let fits = *left > 0;
                *left = left.saturating_sub(1);
                fits
            })
    }

    /// Temporary rules that have no room beside the rules of the policy: the newest.
    pub fn suspended<'a>(&'a self, policy: &'a Policy) -> impl Iterator<Item = &'a Temporary> {
        let in_force = |rule: &Temporary| {
            let database = policy.databases.iter().find(|d| d.name == rule.database);
            database.is_none_or(|database| self.in_force(database).any(|found| found == rule))
        };
        let running = self.temporary.iter().filter(|r| r.end > self.now.boot);
        running.filter(move |rule| !in_force(rule))
    }
}

/// How many temporary rules and blocks a database may have.
pub fn room(database: &Database) -> (usize, usize) {
    match &database.model {
        Model::Dedicated { .. } => {
            let rules = database.all_rules().count();
            (MAX_RULES.saturating_sub(rules), MAX_BLOCKS)
        }
        Model::Shared { .. } => (0, 0),
    }
}

#[cfg(test)]
mod tests;
