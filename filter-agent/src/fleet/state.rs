//! The state of the fleet's documents: those in force, those that are refused, and whether etcd is believed. Pure: answers and
//! times are parameters.

mod kept;
mod marks;
#[cfg(test)]
mod property;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};

use crate::{
    fleet::{Answer, Found},
    policy::{Database, Document, Policy, parse_document},
};

pub use kept::{Kept, Known, Received};
pub use marks::Marks;

/// How long etcd may be silent before it is reported.
const SILENT_AFTER: SignedDuration = SignedDuration::from_mins(3);

/// The fleet's documents on this host. Changes make another one, which replaces it once the kernel enforces it.
#[derive(Clone, Debug)]
pub struct State {
    /// Of the last believed answer. `None`: none was believed yet.
    marks: Option<Marks>,
    /// Of the databases that a believed answer named.
    known: BTreeMap<String, Known>,
    /// Documents in force, by database.
    documents: BTreeMap<String, Good>,
    /// Errors of the newest values that are not in force, by database.
    refused: BTreeMap<String, String>,
    /// Keys that could not be read, why, and since when.
    unreadable: BTreeMap<String, Since>,
    /// Answers are not believed since then; the last one's reason.
    held: Option<Since>,
    frozen: bool,
    /// Times of the agent's start and of etcd's last answer, which may be of before it.
    started: Timestamp,
    contact: Option<Timestamp>,
    lost: Option<Since>,
}

/// A document in force.
#[derive(Clone, Debug, PartialEq)]
pub struct Good {
    pub create_revision: i64,
    pub mod_revision: i64,
    pub version: i64,
    pub sha256: String,
    /// When it came into force on this host.
    pub since: Timestamp,
    /// Whether the time of its rollout is over: setting the clock back does not begin it again.
    pub rollout_over: bool,
    pub document: Document,
}

/// A condition that lasts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Since {
    pub since: Timestamp,
    pub why: String,
}

/// How a database stands. In all but `Active` the last good document stays in force, if there is one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The newest document is in force.
    Active,
    /// The newest document is not in force, or no longer.
    Refused {
        why: String,
        mod_revision: i64,
    },
    /// No answer is believed at present.
    Held(String),
    Missing {
        since: Timestamp,
    },
    Unreadable(Since),
    /// No believed answer was about it yet.
    Unknown,
}

impl State {
    /// Puts what was kept in force, as far as the policy allows it. Documents of other databases are forgotten.
    pub fn restore(kept: Kept, policy: &Policy, now: Timestamp) -> Self {
        let state = Self {
            marks: kept.marks,
            known: kept.databases,
            documents: BTreeMap::new(),
            refused: BTreeMap::new(),
            unreadable: BTreeMap::new(),
            held: None,
            frozen: false,
            started: now,
            contact: kept.contact,
            lost: None,
        };
        state.under(policy, now)
    }

    /// The record that the next start needs.
    pub fn kept(&self) -> Kept {
        Kept {
            marks: self.marks,
            databases: self.known.clone(),
            contact: self.contact,
        }
    }

    /// The same documents, judged by another policy. Those of databases that are no longer the fleet's are forgotten.
    pub fn under(&self, policy: &Policy, now: Timestamp) -> Self {
        let names = of_fleet(policy);
        let mut state = self.clone();
        state.frozen = policy.fleet.as_ref().is_some_and(|fleet| fleet.frozen);
        if policy.fleet.is_none() {
            state.marks = None;
            state.held = None;
            state.lost = None;
            state.contact = None;
        }
        state
            .known
            .retain(|name, _| names.contains_key(name.as_str()));
        state
            .unreadable
            .retain(|name, _| names.contains_key(name.as_str()));
        state.documents.clear();
        state.refused.clear();
        for database in names.into_values() {
            state.judge(database, policy, now);
        }
        state
    }

    /// The state that an answer leads to. `policy`: the one by which this state was judged.
    pub fn take(&self, answer: &Answer, policy: &Policy, now: Timestamp) -> Self {
        let mut state = self.clone();
        state.contact = Some(now);
        state.lost = None;
        if self.frozen {
            return state;
        }
        let databases = of_fleet(policy);
        let documents = answer.documents.iter();
        let documents = documents.map(|(name, found)| (name.as_str(), found));
        let documents: BTreeMap<&str, &Found> = documents
            .filter(|(name, _)| databases.contains_key(name))
            .collect();
        if let Err(why) = marks::check(self.marks, &self.known, answer, &documents) {
            let since = self.held.as_ref().map_or(now, |held| held.since);
            state.held = Some(Since { since, why });
            return state;
        }
        state.held = None;
        state.marks = Some(Marks::of(answer));
        if self
            .marks
            .is_some_and(|marks| !marks.is_same_history(answer))
        {
            // Numbers of another history say nothing of this one.
            for known in state.known.values_mut() {
                known.read_at = None;
            }
        }
        for (name, found) in documents {
            if let Found::Unreadable(why) = found {
                let before = self.unreadable.get(name);
                let since = before.map_or(now, |unreadable| unreadable.since);
                let why = why.clone();
                state.unreadable.insert(name.into(), Since { since, why });
                continue;
            }
            state.unreadable.remove(name);
            let known = state.known.entry(name.into()).or_default();
            if known.take(found, answer.revision, now) {
                state.judge(databases[name], policy, now);
            } else if let (Some(newest), Some(good)) =
                (&known.newest, state.documents.get_mut(name))
                && newest.sha256 == good.sha256
            {
                // The same content may have other numbers: written again, or restored.
                good.create_revision = newest.create_revision;
                good.mod_revision = newest.mod_revision;
                good.version = newest.version;
            }
        }
        state
    }

    /// Puts the newest value of a database in force, else the last good one, if the policy allows it.
    fn judge(&mut self, database: &Database, policy: &Policy, now: Timestamp) {
        let name = &database.name;
        self.documents.remove(name);
        self.refused.remove(name);
        let Some(known) = self.known.get_mut(name) else {
            return;
        };
        let frozen = self.frozen;
        let judged = |received: &mut Received| {
            let text = received.text.as_ref().ok_or_else(|| received.unusable());
            let document = text.and_then(|text| parse_document(text.as_bytes(), database, policy));
            if document.is_ok() && frozen && !received.was_in_force {
                return Err("`fleet: {frozen: true}`: nothing new is taken".into());
            }
            received.judged(document, now)
        };
        if let Some(newest) = &mut known.newest {
            match judged(newest) {
                Ok(good) => {
                    self.documents.insert(name.clone(), good);
                    known.last_good = None;
                    return;
                }
                Err(why) => {
                    self.refused.insert(name.clone(), why);
                }
            }
        }
        match known.last_good.as_mut().map(judged) {
            Some(Ok(good)) => {
                self.documents.insert(name.clone(), good);
            }
            // The error of the newest value, if there is one, says more.
            Some(Err(why)) => {
                self.refused.entry(name.clone()).or_insert(why);
            }
            None => {}
        }
    }

    /// Notes that etcd cannot be reached, or does not answer.
    pub fn lost(&mut self, error: String, now: Timestamp) {
        let since = self.lost.as_ref().map_or(now, |lost| lost.since);
        self.lost = Some(Since { since, why: error });
    }

    /// Notes which rollouts are over at a date. `None`: there are no new ones.
    pub fn without_rollouts_over(&self, wall: Timestamp) -> Option<Self> {
        let is_over = |good: &Good| {
            let rollout = good.document.rollout.as_ref();
            !good.rollout_over && rollout.is_some_and(|rollout| rollout.until <= wall)
        };
        if !self.documents.values().any(is_over) {
            return None;
        }
        let mut state = self.clone();
        for (name, good) in &mut state.documents {
            if !is_over(good) {
                continue;
            }
            good.rollout_over = true;
            let known = state.known.get_mut(name);
            let values = known.map(|known| [&mut known.newest, &mut known.last_good]);
            for value in values.into_iter().flatten().flatten() {
                if value.sha256 == good.sha256 {
                    value.rollout_over = true;
                }
            }
        }
        Some(state)
    }

    /// Databases with a rollout that is in force on a host.
    pub fn rolled_out(&self, host: &str) -> BTreeSet<&String> {
        let documents = self.documents.iter().filter(|(_, good)| {
            let rollout = good.document.rollout.as_ref();
            !good.rollout_over && rollout.is_some_and(|rollout| rollout.on.contains(host))
        });
        documents.map(|(name, _)| name).collect()
    }

    /// Documents in force, by database.
    pub fn documents(&self) -> &BTreeMap<String, Good> {
        &self.documents
    }

    pub fn marks(&self) -> Option<Marks> {
        self.marks
    }

    pub fn standing(&self, database: &str) -> Standing {
        if let Some(held) = &self.held {
            return Standing::Held(held.why.clone());
        }
        if let Some(unreadable) = self.unreadable.get(database) {
            return Standing::Unreadable(unreadable.clone());
        }
        let Some(known) = self.known.get(database) else {
            return Standing::Unknown;
        };
        let newest = known.newest.as_ref().or(known.last_good.as_ref());
        match (self.refused.get(database), newest, known.missing_since) {
            (Some(why), Some(value), _) => Standing::Refused {
                why: why.clone(),
                mod_revision: value.mod_revision,
            },
            (_, _, Some(since)) => Standing::Missing { since },
            (_, Some(_), None) => Standing::Active,
            (_, None, None) => Standing::Unknown,
        }
    }

    /// The revision of the newest value of a database's key.
    pub fn seen(&self, database: &str) -> Option<i64> {
        let newest = self.known.get(database)?.newest.as_ref()?;
        Some(newest.mod_revision)
    }

    /// The reason that answers are not believed, and since when.
    pub fn held(&self) -> Option<&Since> {
        self.held.as_ref()
    }

    /// Whether the policy has nothing new taken.
    pub fn is_frozen(&self) -> bool {
        self.frozen
    }

    /// The time of etcd's last answer.
    pub fn contact(&self) -> Option<Timestamp> {
        self.contact
    }

    /// The reason that etcd does not answer, and since when.
    pub fn lost_since(&self) -> Option<&Since> {
        self.lost.as_ref()
    }

    /// Whether etcd has not answered for so long that it is reported.
    pub fn is_silent(&self, now: Timestamp) -> bool {
        let last = self.contact.map_or(self.started, |at| at.max(self.started));
        now.duration_since(last) >= SILENT_AFTER
    }
}

/// The databases that the fleet may open.
fn of_fleet(policy: &Policy) -> BTreeMap<&str, &Database> {
    let is_of_fleet = |database: &&Database| policy.fleet.is_some() && database.fleet.is_some();
    let databases = policy.databases.iter().filter(is_of_fleet);
    databases
        .map(|database| (database.name.as_str(), database))
        .collect()
}
