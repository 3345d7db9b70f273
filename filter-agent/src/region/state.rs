//! What is known of a region: the last good set, what became of each answer since, and when to ask
//! again. Pure: answers and instants are given.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use backon::{BackoffBuilder as _, ExponentialBuilder};
use ipnet::IpNet;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    policy::{Guards, Model, Policy, Region, RegionSource, Source, spelled},
    region::{
        answer::{Answer, Found, Version},
        guards::{check, check_each, is_covered, merged, uncovered},
    },
};

/// Regions that rules name, by name.
pub type Regions = BTreeMap<String, State>;

/// The names of the regions that rules name.
pub fn used(policy: &Policy) -> impl Iterator<Item = &String> {
    let rules = policy
        .databases
        .iter()
        .filter_map(|database| match &database.model {
            Model::Dedicated { rules } => Some(rules),
            Model::Shared { .. } => None,
        });
    rules.flatten().filter_map(|rule| match &rule.source {
        Source::Region(name) => Some(name),
        Source::Cidr(_) => None,
    })
}

/// Regions of a policy that must be asked before it can be in force: those that are not known yet, or
/// not from this source, and files, which the operator expects to be read.
pub fn to_ask<'a>(policy: &'a Policy, known: &Regions) -> BTreeMap<&'a str, Option<Version>> {
    let version = |name: &'a String| {
        let region = policy.regions.get(name)?;
        match (kept(region, known.get(name)), &region.source) {
            (Some(state), RegionSource::File(_)) => Some((name.as_str(), state.version().cloned())),
            (Some(_), _) | (None, RegionSource::Prefixes(_)) => None,
            (None, _) => Some((name.as_str(), None)),
        }
    };
    used(policy).filter_map(version).collect()
}

/// What is known of a region that stays true under a new policy.
fn kept<'a>(region: &Region, known: Option<&'a State>) -> Option<&'a State> {
    let holds = |state: &State| {
        let set = state.set.as_ref();
        set.is_none_or(|set| check(&set.members, &region.guards).is_ok())
    };
    known.filter(|state| {
        let Region { source, guards } = &state.region;
        *source == region.source && (*guards == region.guards || holds(state))
    })
}

/// The regions of a policy: what is known of them, and these answers.
///
/// # Errors
/// The regions whose answer is an error or refused, each with why.
pub fn next(
    policy: &Policy,
    known: &Regions,
    mut answers: BTreeMap<String, Result<Answer>>,
    now: Timestamp,
) -> Result<Regions> {
    let mut regions = Regions::new();
    let mut errors = Vec::new();
    for name in used(policy) {
        if regions.contains_key(name) {
            continue;
        }
        let region = policy.regions.get(name);
        let region = region.with_context(|| format!("find region {name}"))?;
        let mut state = match kept(region, known.get(name)) {
            Some(state) => State {
                region: region.clone(),
                ..state.clone()
            },
            None => State::new(region.clone(), now),
        };
        if let Some(answer) = answers.remove(name) {
            state.take(answer, false, now);
            if let (true, Some(error)) = (state.failing, &state.error) {
                errors.push(format!("region {name}: {}", error.text));
            }
        }
        regions.insert(name.clone(), state);
    }
    ensure!(errors.is_empty(), "{}", errors.join("\n"));
    Ok(regions)
}

/// The prefixes that each region allows.
pub fn prefixes(regions: &Regions) -> BTreeMap<String, Arc<[IpNet]>> {
    let allowed = |(name, state): (&String, &State)| {
        let set = state.set.as_ref()?;
        Some((name.clone(), set.prefixes.clone()))
    };
    regions.iter().filter_map(allowed).collect()
}

#[derive(Clone, Debug)]
pub struct State {
    pub region: Region,
    /// In force. `None`: nothing is known, and the region allows nobody.
    pub set: Option<Set>,
    pub change: Option<Change>,
    pub error: Option<Error>,
    /// Whether the last look-up failed.
    pub failing: bool,
    /// When to ask again; `None`: when the file changes, or never.
    pub next: Option<Timestamp>,
    held: Option<Held>,
    failures: usize,
}

/// The last good set.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Set {
    /// Of the last good answer, sorted, no two alike.
    pub members: Arc<[IpNet]>,
    /// Members that left, and until when they stay allowed.
    pub retiring: Vec<(IpNet, Timestamp)>,
    /// When the source last gave it.
    pub confirmed: Timestamp,
    pub serial: Option<u64>,
    pub version: Option<Version>,
    /// What is allowed: members and those that retire, adjacent and covered ones merged.
    #[serde(skip)]
    pub prefixes: Arc<[IpNet]>,
}

/// An answer that may be wrong, and is believed when it stays the same.
#[derive(Clone, Debug)]
struct Held {
    members: Vec<IpNet>,
    since: Timestamp,
}

/// What the last change did to what is allowed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Change {
    pub at: Option<Timestamp>,
    pub added: Vec<IpNet>,
    /// No longer in the answer; allowed for `retire_after`.
    pub left: Vec<IpNet>,
    /// No longer allowed.
    pub removed: Vec<IpNet>,
}

impl Change {
    pub fn is_empty(&self) -> bool {
        self.added.is_empty() && self.left.is_empty() && self.removed.is_empty()
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Error {
    pub at: Timestamp,
    pub text: String,
}

impl Set {
    fn merge(&mut self) {
        let retiring = self.retiring.iter().map(|&(prefix, _)| prefix);
        let all: Vec<IpNet> = self.members.iter().copied().chain(retiring).collect();
        self.prefixes = merged(&all).into();
    }
}

impl State {
    /// Of a region that was never asked for: that is due.
    pub fn new(region: Region, now: Timestamp) -> Self {
        let mut state = Self {
            region,
            set: None,
            change: None,
            error: None,
            failing: false,
            next: Some(now),
            held: None,
            failures: 0,
        };
        if let RegionSource::Prefixes(prefixes) = &state.region.source {
            let found = Found {
                prefixes: prefixes.clone(),
                ..Found::default()
            };
            state.replace(found, now);
            state.change = None;
            state.next = None;
        }
        state
    }

    /// Puts in force what was kept, if it holds to the guards and to `max_age`.
    ///
    /// # Errors
    /// What is wrong with it; nothing is in force then.
    pub fn restore(&mut self, mut set: Set, now: Timestamp) -> Result<()> {
        let guards = &self.region.guards;
        ensure!(
            set.members.is_sorted_by(|a, b| a < b),
            "its members are out of order"
        );
        check(&set.members, guards)?;
        // The clock may have been wrong when it was written, or may be now.
        set.confirmed = set.confirmed.min(now);
        let latest = now + guards.retire_after;
        for (_, until) in &mut set.retiring {
            *until = (*until).min(latest);
        }
        set.retiring.retain(|&(_, until)| until > now);
        let leaving: Vec<IpNet> = set.retiring.iter().map(|&(prefix, _)| prefix).collect();
        check_each(&leaving, guards)?;
        if let Some(max_age) = guards.max_age {
            ensure!(
                set.confirmed + max_age > now,
                "it was confirmed at {}, longer ago than {} (`max_age`)",
                set.confirmed,
                spelled(max_age)
            );
        }
        set.merge();
        self.set = Some(set);
        Ok(())
    }

    /// The version of the set in force, to ask whether the source has another.
    pub fn version(&self) -> Option<&Version> {
        // An answer that is held was not taken: it must be given again in full.
        match (&self.held, &self.set) {
            (None, Some(set)) => set.version.as_ref(),
            _ => None,
        }
    }

    /// Whether another state of the region has the same set of the same source, whenever it was confirmed.
    pub fn holds_the_same(&self, other: &Self) -> bool {
        let content = |set: &Set| Set {
            confirmed: Timestamp::UNIX_EPOCH,
            ..set.clone()
        };
        self.region.source == other.region.source
            && self.set.as_ref().map(content) == other.set.as_ref().map(content)
    }

    /// Takes a look-up's outcome. `accept`: believe it even if it lost most of its members or is older
    /// than the last one. Returns what changed of what is allowed.
    pub fn take(&mut self, outcome: Result<Answer>, accept: bool, now: Timestamp) -> Change {
        match outcome.and_then(|answer| self.judge(answer, accept, now)) {
            Ok(change) => {
                self.failing = false;
                self.failures = 0;
                if !change.is_empty() {
                    self.change = Some(change.clone());
                }
                change
            }
            Err(error) => {
                self.fail(format!("{error:#}"), now);
                Change::default()
            }
        }
    }

    /// Notes a failure; the set in force stays.
    pub fn fail(&mut self, text: String, now: Timestamp) {
        let Guards {
            min_refresh,
            max_refresh,
            ..
        } = self.region.guards;
        let mut delays = ExponentialBuilder::new()
            .with_min_delay(min_refresh)
            .with_max_delay(max_refresh)
            .without_max_times()
            .with_jitter()
            .build();
        // Past the longest delay one more changes nothing.
        let delay = delays.nth(self.failures.min(32)).unwrap_or(max_refresh);
        let mut next = now + delay.min(max_refresh);
        if let Some(held) = &self.held {
            next = next
                .min(held.since + self.region.guards.shrink_after)
                .max(now + min_refresh);
        }
        self.next = Some(next);
        self.failures += 1;
        self.failing = true;
        self.error = Some(Error { at: now, text });
    }

    fn judge(&mut self, answer: Answer, accept: bool, now: Timestamp) -> Result<Change> {
        let found = match answer {
            Answer::Found(found) => found,
            Answer::Unchanged { ask_again } => {
                let Some(set) = &mut self.set else {
                    bail!("the source says that nothing changed, and nothing is known");
                };
                set.confirmed = now;
                self.next = self.schedule(ask_again, now);
                return Ok(Change::default());
            }
        };
        let mut found = found;
        found.prefixes.sort_unstable();
        found.prefixes.dedup();
        if let Err(error) = check(&found.prefixes, &self.region.guards) {
            self.held = None;
            return Err(error);
        }
        if let Some(suspicion) = self.suspicion(&found)
            && !accept
        {
            self.hold(&found.prefixes, &suspicion, now)?;
        }
        self.held = None;
        self.next = self.schedule(found.ask_again, now);
        Ok(self.replace(found, now))
    }

    fn schedule(&self, ask_again: Option<Duration>, now: Timestamp) -> Option<Timestamp> {
        let Guards {
            min_refresh,
            max_refresh,
            ..
        } = self.region.guards;
        // Files too, although their changes are announced: inotify does not see those that another host makes.
        if self.region.is_constant() {
            return None;
        }
        let delay = ask_again.unwrap_or(max_refresh);
        Some(now + delay.clamp(min_refresh, max_refresh))
    }

    /// Why an answer that is well formed may be wrong all the same.
    fn suspicion(&self, found: &Found) -> Option<String> {
        let set = self.set.as_ref()?;
        if let (Some(known), Some(serial)) = (set.serial, found.serial)
            && serial < known
        {
            return Some(format!(
                "the list's number {serial} is older than {known}, in force"
            ));
        }
        let gone = uncovered(&set.members, &merged(&found.prefixes)).count();
        let max_shrink = self.region.guards.max_shrink;
        let most = set.members.len() * usize::from(max_shrink) / 100;
        (gone > most).then(|| {
            let members = set.members.len();
            format!("{gone} of {members} prefixes are gone, more than {max_shrink}% (`max_shrink`)")
        })
    }

    /// Waits for a suspicious answer to stay the same.
    ///
    /// # Errors
    /// Until it has.
    fn hold(&mut self, members: &[IpNet], suspicion: &str, now: Timestamp) -> Result<()> {
        let since = match &self.held {
            Some(held) if held.members == members => held.since,
            _ => {
                let members = members.to_vec();
                self.held = Some(Held {
                    members,
                    since: now,
                });
                now
            }
        };
        let until = since + self.region.guards.shrink_after;
        ensure!(
            now >= until,
            "{suspicion}: taken if it is still so at {until}, or now with `filter-agent refresh \
             REGION --accept`"
        );
        Ok(())
    }

    /// Puts an answer in force.
    fn replace(&mut self, found: Found, now: Timestamp) -> Change {
        let before = self.set.take();
        let (known, allowed, mut retiring) = match before {
            Some(set) => (set.members, set.prefixes, set.retiring),
            None => Default::default(),
        };
        let answered = merged(&found.prefixes);
        retiring.retain(|(prefix, _)| !is_covered(prefix, &answered));
        let mut change = Change {
            at: Some(now),
            added: uncovered(&found.prefixes, &allowed).collect(),
            ..Change::default()
        };
        let retire_after = self.region.guards.retire_after;
        let gone = uncovered(&known, &answered).filter(|gone| {
            let retires = |(prefix, _): &(IpNet, Timestamp)| prefix == gone;
            !retiring.iter().any(retires)
        });
        let gone: Vec<IpNet> = gone.collect();
        if retire_after.is_zero() {
            change.removed = gone;
        } else {
            retiring.extend(gone.iter().map(|&prefix| (prefix, now + retire_after)));
            change.left = gone;
        }
        let mut set = Set {
            members: found.prefixes.into(),
            retiring,
            confirmed: now,
            serial: found.serial,
            version: found.version,
            prefixes: Arc::default(),
        };
        set.merge();
        self.set = Some(set);
        change
    }

    /// What time alone changes: members whose time is over, and a set that is too old.
    pub fn tick(&mut self, now: Timestamp) -> Change {
        let mut change = Change {
            at: Some(now),
            ..Change::default()
        };
        let Some(set) = &mut self.set else {
            return change;
        };
        if let Some(max_age) = self.region.guards.max_age
            && set.confirmed + max_age <= now
        {
            change.removed = set.prefixes.to_vec();
            let text = format!("not confirmed since {} (`max_age`)", set.confirmed);
            self.set = None;
            self.held = None;
            self.failing = true;
            self.error = Some(Error { at: now, text });
        } else if set.retiring.iter().any(|&(_, until)| until <= now) {
            let over = set.retiring.extract_if(.., |&mut (_, until)| until <= now);
            change.removed = over.map(|(prefix, _)| prefix).collect();
            set.merge();
        }
        if !change.is_empty() {
            self.change = Some(change.clone());
        }
        change
    }

    /// When `tick` changes something next.
    pub fn next_tick(&self) -> Option<Timestamp> {
        let set = self.set.as_ref()?;
        let retires = set.retiring.iter().map(|&(_, until)| until).min();
        let max_age = self.region.guards.max_age;
        let ages = max_age.map(|max_age| set.confirmed + max_age);
        [retires, ages].into_iter().flatten().min()
    }
}

#[cfg(test)]
mod tests;
