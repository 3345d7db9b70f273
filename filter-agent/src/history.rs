//! The policies that were in force and the changes of temporary rules, with who asked for each. Pure: no I/O, no clock.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    path::PathBuf,
    sync::Arc,
};

use anyhow::Result;
use ipnet::IpNet;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    kernel::difference::{DatabaseDifference, Difference},
    policy,
    policy_file::PolicyFile,
    refusal::Refusal,
    report::{self, Action, By},
};

/// Policies that are kept, and apart from them changes of temporary rules and of the fleet's: many of these must not push out a policy.
pub const MAX_POLICIES: usize = 20;
pub const MAX_OTHERS: usize = 1000;

/// Longest texts of policies that are kept, all together, in bytes: as long as the longest policy file.
const MAX_TEXTS: usize = 64 << 20;

/// Prefixes of a database, and lines of settings, that a change lists; the rest are only counted.
const LISTED: usize = 100;

/// The same of all databases of a change together.
const LISTED_IN_ALL: usize = 1000;

/// A change that was made.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Past {
    pub id: u64,
    /// By the host's clock.
    pub at: Timestamp,
    pub origin: Origin,
    /// `None`: it was nobody's request.
    pub by: Option<By>,
    #[serde(flatten)]
    pub what: What,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// A client of the control socket had the policy file read.
    Reload,
    /// SIGHUP had it read.
    Sighup,
    /// The agent's start.
    Start,
    /// `rollback` to a policy of before.
    Rollback,
    /// The end of a policy that was tried.
    FallBack,
    /// A client of the control socket, other than by `reload`.
    Socket,
    /// The fleet's documents.
    Fleet,
    /// The end of a rule.
    Time,
}

impl Origin {
    pub fn name(self) -> &'static str {
        match self {
            Self::Reload => "reload",
            Self::Sighup => "sighup",
            Self::Start => "start",
            Self::Rollback => "rollback",
            Self::FallBack => "fall-back",
            Self::Socket => "socket",
            Self::Fleet => "fleet",
            Self::Time => "time",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum What {
    Policy(PastPolicy),
    Temporary(PastTemporary),
    Fleet(PastFleet),
    /// Nothing was filtered from then on.
    Detached,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct PastPolicy {
    pub file: PathBuf,
    /// SHA-256 of its text, in hexadecimal digits.
    pub hash: String,
    /// Whether its text is kept. As long as the list is that of `History`.
    #[serde(default)]
    pub text_kept: bool,
    pub state: State,
    pub difference: Summary,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// In force by a plain `reload`, by `confirm` or by a start.
    Confirmed,
    /// In force until it is confirmed, or for a time.
    Trying,
    FellBack,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct PastTemporary {
    pub action: Action,
    pub database: String,
    pub source: IpNet,
    pub label: Option<String>,
    pub until: Option<Timestamp>,
}

/// A change of the fleet's rules.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct PastFleet {
    /// The databases whose rules changed, with the revisions of their documents. `None`: it has no document any more.
    pub documents: BTreeMap<String, Option<i64>>,
    pub difference: Summary,
}

/// The difference that a policy, or the fleet, made, bounded.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct Summary {
    pub databases: BTreeMap<String, DatabaseSummary>,
    /// As in `report::Plan`.
    pub settings: Listed<String>,
    pub attached: Vec<String>,
    pub detached: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct DatabaseSummary {
    pub added: Listed<IpNet>,
    pub removed: Listed<IpNet>,
    pub blocked: Listed<IpNet>,
    pub unblocked: Listed<IpNet>,
    pub guarded: Listed<String>,
    pub unguarded: Listed<String>,
}

/// How many there are, and the first of them.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct Listed<T> {
    pub count: usize,
    pub first: Vec<T>,
}

impl<T: Clone> Listed<T> {
    /// `room`: how many more the change may list.
    fn of(all: &[T], room: &mut usize) -> Self {
        let listed = all.len().min(LISTED).min(*room);
        *room -= listed;
        Self {
            count: all.len(),
            first: all[..listed].to_vec(),
        }
    }
}

impl Summary {
    pub fn of(plan: &report::Plan) -> Self {
        let Difference { databases } = &plan.difference;
        let mut room = LISTED_IN_ALL;
        let settings = Listed::of(&plan.settings, &mut room);
        let databases = databases.iter().map(|(name, difference)| {
            let DatabaseDifference {
                added,
                removed,
                blocked,
                unblocked,
                guarded,
                unguarded,
            } = difference;
            let summary = DatabaseSummary {
                guarded: Listed::of(guarded, &mut room),
                unguarded: Listed::of(unguarded, &mut room),
                removed: Listed::of(removed, &mut room),
                added: Listed::of(added, &mut room),
                blocked: Listed::of(blocked, &mut room),
                unblocked: Listed::of(unblocked, &mut room),
            };
            (name.clone(), summary)
        });
        Self {
            databases: databases.collect(),
            settings,
            attached: plan.attached.clone(),
            detached: plan.detached.clone(),
        }
    }

    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether it concerns a database, as far as it is listed.
    fn concerns(&self, database: &str) -> bool {
        // `+ database orders`, `~ database orders: port: ...`.
        let place = format!(" database {database}");
        let names = |line: &String| {
            let rest = line.get(1..).and_then(|line| line.strip_prefix(&*place));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(':'))
        };
        self.databases.contains_key(database) || self.settings.first.iter().any(names)
    }
}

/// A policy that can be enforced again.
#[derive(Clone, Debug, PartialEq)]
pub struct KeptPolicy {
    pub path: PathBuf,
    pub hash: String,
    pub text: Arc<str>,
}

/// Changes, newest first.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Listing {
    pub changes: Vec<Past>,
    /// Changes beyond the limit that was asked for.
    pub left_out: usize,
    /// The text of the policy that was asked for, without its secrets.
    #[serde(default)]
    pub text: Option<String>,
}

/// Which changes are asked for.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    pub id: Option<u64>,
    pub database: Option<String>,
    /// Not before then.
    pub since: Option<Timestamp>,
    /// At most so many, the newest.
    pub limit: Option<usize>,
}

/// Cheap to clone.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    /// The highest id that was given to a change.
    last_id: u64,
    /// Oldest first, both lists.
    policies: Arc<VecDeque<Past>>,
    others: Arc<VecDeque<Past>>,
    /// By their hashes.
    texts: BTreeMap<String, Arc<str>>,
}

impl History {
    /// The history as it was kept. `last_id`: the highest id that was given, as far as it is known.
    pub fn restore(
        last_id: u64,
        policies: VecDeque<Past>,
        others: VecDeque<Past>,
        texts: BTreeMap<String, Arc<str>>,
    ) -> Self {
        let ids = policies.iter().chain(&others).map(|past| past.id);
        let mut history = Self {
            last_id: ids.max().unwrap_or_default().max(last_id),
            policies: policies.into(),
            others: others.into(),
            texts,
        };
        history.drop_oldest();
        history
    }

    pub fn last_id(&self) -> u64 {
        self.last_id
    }

    pub fn policies(&self) -> &Arc<VecDeque<Past>> {
        &self.policies
    }

    pub fn others(&self) -> &Arc<VecDeque<Past>> {
        &self.others
    }

    pub fn texts(&self) -> &BTreeMap<String, Arc<str>> {
        &self.texts
    }

    /// The id of the next change.
    pub fn next_id(&mut self) -> u64 {
        self.last_id = self.last_id.saturating_add(1);
        self.last_id
    }

    /// The policy that was put in force last. `None`: the filter was detached since, or it is not known.
    pub fn in_force(&self) -> Option<(&Past, &PastPolicy)> {
        let last = self.policies.back()?;
        let is_later = |past: &&Past| past.id > last.id;
        let mut later = self.others.iter().rev().take_while(is_later);
        match later.any(|past| past.what == What::Detached) {
            true => None,
            false => as_policy(last),
        }
    }

    /// The change that put a policy in force; `None`: another one is.
    pub fn is_in_force(&self, file: &PolicyFile) -> Option<u64> {
        let (past, policy) = self.in_force()?;
        (policy.hash == file.hash).then_some(past.id)
    }

    /// The confirmed policy before the one in force: the newest with another text.
    pub fn before(&self) -> Option<u64> {
        let mut newest = self.policies.iter().rev().filter_map(as_policy);
        let (_, in_force) = newest.next()?;
        let is_before = |(_, past): &(&Past, &PastPolicy)| {
            past.state == State::Confirmed && past.hash != in_force.hash
        };
        newest.find(is_before).map(|(past, _)| past.id)
    }

    /// The policy of a change.
    ///
    /// # Errors
    /// Why it cannot be enforced again.
    pub fn policy(&self, id: u64) -> Result<KeptPolicy> {
        let past = self.find(id)?;
        let What::Policy(policy) = &past.what else {
            let error =
                format!("change {id} is not a policy: `filter-agent history {id}` shows it");
            return Err(Refusal::Conflict(error).into());
        };
        let unkept = || Refusal::Conflict(format!("the text of change {id} is not kept any more"));
        let text = self.texts.get(&policy.hash).ok_or_else(unkept)?;
        Ok(KeptPolicy {
            path: policy.file.clone(),
            hash: policy.hash.clone(),
            text: text.clone(),
        })
    }

    /// The text of a policy without its secrets. Parses it.
    ///
    /// # Errors
    /// It is not kept, or cannot be shown.
    pub fn shown_text(&self, id: u64) -> Result<String> {
        let kept = self.policy(id)?;
        let secret = || {
            let hash = &kept.hash;
            Refusal::Conflict(format!(
                "the text of change {id} is not shown, since its secrets cannot be told from the rest: root finds it in \
                 the state directory, in policies/{hash}.yaml"
            ))
        };
        Ok(policy::shown(&kept.text).ok_or_else(secret)?)
    }

    fn find(&self, id: u64) -> Result<&Past> {
        let mut all = self.policies.iter().chain(self.others.iter());
        let found = all.find(|past| past.id == id);
        let unknown = || {
            let last = self.last_id;
            let error = match id {
                0 => "there is no change 0: they are counted from 1".into(),
                id if id > last => format!("there is no change {id} yet: the last one is {last}"),
                _ => format!(
                    "change {id} is not kept: the last {MAX_POLICIES} policies are, and the last {MAX_OTHERS} \
                     other changes"
                ),
            };
            Refusal::NotFound(error)
        };
        Ok(found.ok_or_else(unknown)?)
    }

    /// Keeps the text of a policy that is in the list.
    pub fn keep_text(&mut self, file: &PolicyFile) {
        let kept = self.texts.entry(file.hash.clone());
        kept.or_insert_with(|| file.text.as_str().into());
        self.drop_oldest();
    }

    /// Notes a policy that is in force.
    pub fn enforced(&mut self, past: Past, file: &PolicyFile) {
        Arc::make_mut(&mut self.policies).push_back(past);
        self.keep_text(file);
    }

    /// Notes a change of the temporary rules, the end of one, or a change of the fleet's rules.
    pub fn changed(&mut self, past: Past) {
        Arc::make_mut(&mut self.others).push_back(past);
        self.drop_oldest();
    }

    /// Notes that nothing is filtered any more. Texts are forgotten: no policy is put in force again from here.
    pub fn detached(&mut self, at: Timestamp, by: Option<By>) -> u64 {
        let id = self.next_id();
        self.texts.clear();
        self.changed(Past {
            id,
            at,
            origin: Origin::Socket,
            by,
            what: What::Detached,
        });
        id
    }

    /// What became of a policy. `None`: it is not kept.
    pub fn state(&self, id: u64) -> Option<State> {
        let past = self.policies.iter().find(|past| past.id == id)?;
        as_policy(past).map(|(_, policy)| policy.state)
    }

    /// Notes what became of a policy.
    pub fn set_state(&mut self, id: u64, state: State) {
        let policies = Arc::make_mut(&mut self.policies);
        if let Some(past) = policies.iter_mut().find(|past| past.id == id)
            && let What::Policy(policy) = &mut past.what
        {
            policy.state = state;
        }
    }

    fn drop_oldest(&mut self) {
        for (list, most) in [
            (&mut self.policies, MAX_POLICIES),
            (&mut self.others, MAX_OTHERS),
        ] {
            if let Some(beyond) = list.len().checked_sub(most).filter(|&beyond| beyond > 0) {
                Arc::make_mut(list).drain(..beyond);
            }
        }
        let mut room = MAX_TEXTS;
        let mut kept = BTreeSet::new();
        for (_, policy) in self.policies.iter().rev().filter_map(as_policy) {
            let Some(text) = self.texts.get(&policy.hash) else {
                continue;
            };
            if kept.contains(&policy.hash) {
                continue;
            }
            match room.checked_sub(text.len()) {
                Some(left) => room = left,
                None => break,
            }
            kept.insert(policy.hash.clone());
        }
        self.texts.retain(|hash, _| kept.contains(hash));
    }

    /// Lists changes, newest first.
    ///
    /// # Errors
    /// The id that is asked for is not kept.
    pub fn list(&self, wanted: &Wanted) -> Result<Listing> {
        let all: Vec<&Past> = match wanted.id {
            Some(id) => vec![self.find(id)?],
            None => {
                let mut all: Vec<&Past> = self.policies.iter().chain(self.others.iter()).collect();
                all.sort_unstable_by_key(|past| std::cmp::Reverse(past.id));
                all
            }
        };
        let is_wanted = |past: &&&Past| {
            wanted.since.is_none_or(|since| past.at >= since)
                && wanted
                    .database
                    .as_ref()
                    .is_none_or(|wanted| match &past.what {
                        What::Policy(policy) => policy.difference.concerns(wanted),
                        What::Temporary(temporary) => temporary.database == *wanted,
                        What::Fleet(fleet) => fleet.documents.contains_key(wanted),
                        What::Detached => true,
                    })
        };
        let found: Vec<&&Past> = all.iter().filter(is_wanted).collect();
        let limit = wanted.limit.unwrap_or(usize::MAX);
        let changes = found
            .iter()
            .take(limit)
            .map(|past| self.shown((**past).clone()));
        Ok(Listing {
            changes: changes.collect(),
            left_out: found.len().saturating_sub(limit),
            text: None,
        })
    }

    fn shown(&self, mut past: Past) -> Past {
        if let What::Policy(policy) = &mut past.what {
            policy.text_kept = self.texts.contains_key(&policy.hash);
        }
        past
    }
}

fn as_policy(past: &Past) -> Option<(&Past, &PastPolicy)> {
    match &past.what {
        What::Policy(policy) => Some((past, policy)),
        _ => None,
    }
}

impl What {
    /// A policy that is in force.
    pub fn policy(file: &PolicyFile, state: State, difference: Summary) -> Self {
        Self::Policy(PastPolicy {
            file: file.path.clone(),
            hash: file.hash.clone(),
            text_kept: false,
            state,
            difference,
        })
    }
}

#[cfg(test)]
mod tests;
