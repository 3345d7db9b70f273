//! Knowledge of each database's key, in memory and on disk.

use std::{collections::BTreeMap, mem, sync::Arc};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    fleet::{
        Found, Value,
        state::{Good, Marks},
    },
    policy::{Document, MAX_DOCUMENT},
    policy_file::hash,
};

/// The record on disk.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct Kept {
    pub marks: Option<Marks>,
    pub databases: BTreeMap<String, Known>,
    /// The time of etcd's last answer.
    pub contact: Option<Timestamp>,
}

impl Kept {
    /// Whether either leads to the same documents. The rest changes with each answer, since any write to etcd raises the
    /// revision: it need not be written as often.
    pub fn has_same_documents(&self, other: &Self) -> bool {
        let history = |kept: &Self| kept.marks.map(|marks| (marks.cluster, marks.era));
        let values = self.databases.iter();
        let others = other.databases.iter();
        let parts =
            |(name, known): (_, &Known)| (name, known.newest.clone(), known.last_good.clone());
        history(self) == history(other) && values.map(parts).eq(others.map(parts))
    }
}

/// A database's key, as believed answers showed it.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct Known {
    /// The revision at which it was last read. `None`: never in the history that the marks are of.
    pub read_at: Option<i64>,
    /// Its value then. `None`: it was not there.
    pub newest: Option<Received>,
    /// Since when it is not there.
    pub missing_since: Option<Timestamp>,
    /// The last value that was in force before `newest`, as long as that one was not.
    pub last_good: Option<Received>,
}

/// A value that was received.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Received {
    pub create_revision: i64,
    pub mod_revision: i64,
    pub version: i64,
    pub sha256: String,
    /// Length of the value, in bytes.
    pub length: usize,
    /// `None`: no policy could accept it, since it is too long or not UTF-8.
    pub text: Option<Arc<str>>,
    /// Whether it was in force at any time.
    pub was_in_force: bool,
    /// `None`: it is not in force.
    pub in_force_since: Option<Timestamp>,
    /// Whether the time of its rollout is over.
    #[serde(default)]
    pub rollout_over: bool,
}

impl Known {
    /// Takes what a believed answer found at a revision. Returns whether there is something else to judge.
    pub(super) fn take(&mut self, found: &Found, revision: i64, now: Timestamp) -> bool {
        match found {
            Found::Unreadable(_) => false,
            Found::Missing => {
                self.read_at = Some(revision);
                self.missing_since.get_or_insert(now);
                self.replace(None)
            }
            Found::Value(value) => {
                self.read_at = Some(revision);
                self.missing_since = None;
                let received = Received::of(value);
                match &mut self.newest {
                    Some(newest) if newest.sha256 == received.sha256 => {
                        newest.create_revision = received.create_revision;
                        newest.mod_revision = received.mod_revision;
                        newest.version = received.version;
                        false
                    }
                    _ => self.replace(Some(received)),
                }
            }
        }
    }

    fn replace(&mut self, newest: Option<Received>) -> bool {
        if newest.is_none() && self.newest.is_none() {
            return false;
        }
        let before = mem::replace(&mut self.newest, newest);
        let was_good = before.filter(|before| before.was_in_force);
        self.last_good = was_good.or(self.last_good.take());
        if let (Some(newest), Some(last)) = (&mut self.newest, &self.last_good)
            && newest.sha256 == last.sha256
        {
            newest.was_in_force = last.was_in_force;
            newest.in_force_since = last.in_force_since;
            newest.rollout_over = last.rollout_over;
        }
        true
    }

    /// SHA-256 of the value that is known.
    pub(super) fn content(&self) -> Option<&str> {
        let value = self.newest.as_ref().or(self.last_good.as_ref());
        value.map(|value| value.sha256.as_str())
    }
}

impl Received {
    fn of(value: &Value) -> Self {
        let length = value.text.len();
        let text = (length <= MAX_DOCUMENT).then(|| str::from_utf8(&value.text).ok());
        Self {
            create_revision: value.create_revision,
            mod_revision: value.mod_revision,
            version: value.version,
            sha256: hash(&value.text),
            length,
            text: text.flatten().map(Arc::from),
            was_in_force: false,
            in_force_since: None,
            rollout_over: false,
        }
    }

    /// The error of a value without a text.
    pub(super) fn unusable(&self) -> String {
        let length = self.length;
        match length > MAX_DOCUMENT {
            true => format!("it has {length} bytes; at most {MAX_DOCUMENT}"),
            false => "it is not UTF-8".into(),
        }
    }

    /// Notes that it comes into force, stays so or is not.
    pub(super) fn judged(
        &mut self,
        document: Result<Document, String>,
        now: Timestamp,
    ) -> Result<Good, String> {
        if document.is_err() {
            self.in_force_since = None;
        }
        let document = document?;
        self.was_in_force = true;
        Ok(Good {
            create_revision: self.create_revision,
            mod_revision: self.mod_revision,
            version: self.version,
            sha256: self.sha256.clone(),
            since: *self.in_force_since.get_or_insert(now),
            rollout_over: self.rollout_over,
            document,
        })
    }
}
