//! Decides whether an answer is believed: an etcd that was restored from a snapshot holds rules that were revoked since.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    fleet::{Answer, Found, Value, state::kept::Known},
    policy_file::hash,
};

/// Cluster, era and revision of a believed answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Marks {
    pub cluster: u64,
    pub era: u64,
    pub revision: i64,
}

impl Marks {
    pub(super) fn of(answer: &Answer) -> Self {
        Self {
            cluster: answer.cluster,
            era: answer.era,
            revision: answer.revision,
        }
    }

    /// Whether the answer's revisions count the same writes, as far as these numbers show.
    pub(super) fn is_same_history(self, answer: &Answer) -> bool {
        self.era == answer.era && self.went_back(answer).is_none()
    }

    /// How the answer is neither a later one of the same history nor of a later era.
    fn went_back(self, answer: &Answer) -> Option<String> {
        let (old, new) = (self, Self::of(answer));
        if new.era != old.era {
            let went = || format!("etcd went back from era {} to {}", old.era, new.era);
            return (new.era < old.era).then(went);
        }
        if new.cluster != old.cluster {
            return Some(format!(
                "another etcd answers: cluster {:x}, not {:x}",
                new.cluster, old.cluster
            ));
        }
        let went = || {
            format!(
                "etcd went back from revision {} to {}",
                old.revision, new.revision
            )
        };
        (new.revision < old.revision).then(went)
    }
}

/// Checks whether an answer is believed. `documents`: those of it that matter to this host.
///
/// # Errors
/// The answer is held: nothing of it may be in force. Says how it cannot be a later one.
pub(super) fn check(
    marks: Option<Marks>,
    known: &BTreeMap<String, Known>,
    answer: &Answer,
    documents: &BTreeMap<&str, &Found>,
) -> Result<(), String> {
    let revision = answer.revision;
    for (name, found) in documents {
        if let Found::Value(value) = found
            && !is_possible(value, revision)
        {
            return Err(format!(
                "numbers of etcd that cannot be: document of {name}, created at revision {}, changed at {}, version {}, \
                 read at revision {revision}",
                value.create_revision, value.mod_revision, value.version
            ));
        }
    }
    let Some(marks) = marks else {
        return Ok(());
    };
    if answer.era > marks.era {
        return Ok(());
    }
    if let Some(how) = marks.went_back(answer) {
        return match changes_nothing(known, documents) {
            true => Ok(()),
            false => Err(how),
        };
    }
    for (name, found) in documents {
        if let Some(known) = known.get(*name) {
            let back = |how| format!("etcd went back: document of {name}: {how}");
            follows(known, found, revision).map_err(back)?;
        }
    }
    Ok(())
}

/// Whether a value can have these numbers in any etcd. A revision changes a key once at most, and the first version is of
/// the revision that made the key.
fn is_possible(value: &Value, revision: i64) -> bool {
    let (created, changed) = (value.create_revision, value.mod_revision);
    let is_ordered = 0 < created && created <= changed && changed <= revision;
    let is_first = created == changed;
    is_ordered
        && value.version >= 1
        && value.version <= 1 + changed - created
        && is_first == (value.version == 1)
}

/// Checks whether a key that is known can have become this, in the history in which it is known.
///
/// # Errors
/// How it cannot.
fn follows(known: &Known, found: &Found, revision: i64) -> Result<(), String> {
    let Some(read_at) = known.read_at else {
        return Ok(());
    };
    let value = match found {
        Found::Unreadable(_) => return Ok(()),
        Found::Missing if known.newest.is_some() && revision == read_at => {
            return Err(format!("there and not there at revision {revision}"));
        }
        Found::Missing => return Ok(()),
        Found::Value(value) => value,
    };
    let (created, changed, version) = (value.create_revision, value.mod_revision, value.version);
    let Some(newest) = &known.newest else {
        let unseen = || format!("created at revision {created}, and was not there at {read_at}");
        return (created > read_at).then_some(()).ok_or_else(unseen);
    };
    let (old, old_version) = (newest.mod_revision, newest.version);
    if changed == old {
        let is_same = newest.create_revision == created
            && old_version == version
            && newest.sha256 == hash(&value.text);
        let differs = || format!("two different ones of revision {old}");
        return is_same.then_some(()).ok_or_else(differs);
    }
    if changed < old {
        return Err(format!("from revision {old} to {changed}"));
    }
    // The old one was still there when it was last read.
    if changed <= read_at {
        return Err(format!(
            "changed at revision {changed}, and was still of {old} at {read_at}"
        ));
    }
    if created == newest.create_revision {
        let is_later = version > old_version && version - old_version <= changed - old;
        let impossible = || {
            format!("version {version} of revision {changed} after version {old_version} of {old}")
        };
        return is_later.then_some(()).ok_or_else(impossible);
    }
    let unseen = || {
        let before = newest.create_revision;
        format!("created at revision {created}, and was one created at {before} at {read_at}")
    };
    (created > read_at).then_some(()).ok_or_else(unseen)
}

/// Whether every document is what is known already, so that it does not matter of which history the answer is.
fn changes_nothing(known: &BTreeMap<String, Known>, documents: &BTreeMap<&str, &Found>) -> bool {
    let is_same = |(name, known): (&String, &Known)| match documents.get(name.as_str()) {
        Some(Found::Value(value)) => known.content() == Some(hash(&value.text).as_str()),
        Some(Found::Missing) => known.newest.is_none(),
        // Not known is not the same.
        Some(Found::Unreadable(_)) | None => false,
    };
    let is_new = |(name, found): (&&str, &&Found)| {
        matches!(found, Found::Value(_)) && !known.contains_key(*name)
    };
    known.iter().all(is_same) && !documents.iter().any(is_new)
}
