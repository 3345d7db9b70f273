//! The state of a region: its last good set, what happened since, and when to look up again. Pure: results and times are
//! parameters.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use backon::{BackoffBuilder as _, ExponentialBuilder};
use ipnet::IpNet;
use jiff::{Timestamp, Unit};
use serde::{Deserialize, Serialize};

use crate::{
    policy::{Guards, Policy, Region, RegionSource, Source, redacted, spelled},
    prefixes::Prefixes,
    region::{
        answer::{Answer, Found, Version},
        files::StillWritten,
        guards::{check, check_each, is_covered, merged, merged_with, uncovered},
        try_later::TryLater,
    },
    report::Timing,
    rules,
};

/// The states of the regions that rules name, by name.
pub type Regions = BTreeMap<String, State>;

/// Returns the names of the regions that rules and clusters name. A name may come more than once.
pub fn used(policy: &Policy) -> impl Iterator<Item = &String> {
    let databases = policy.databases.iter();
    let rules = databases.map(|database| database.cluster.iter().chain(database.all_rules()));
    rules.flatten().filter_map(|rule| match &rule.source {
        Source::Region(name) => Some(name),
        Source::Cidr(_) => None,
    })
}

/// Returns the regions to look up before a policy can be in force, with the version of the set in force: those without a
/// set from this source, and files, since an operator who reloads expects them to be read.
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

/// Returns the state of a region if it remains valid under a new policy.
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

/// Returns the regions of a policy: the known states that remain valid, with these results taken.
///
/// # Errors
/// Regions whose look-up failed or whose result was refused, a line each.
pub fn next(
    policy: &Policy,
    known: &Regions,
    answers: BTreeMap<String, Result<Answer>>,
    now: Timestamp,
) -> Result<Regions> {
    let (regions, errors) = next_and_errors(policy, known, answers, now)?;
    ensure!(errors.is_empty(), "{}", errors.join("\n"));
    Ok(regions)
}

/// As `next`. What failed is returned as well, a line for each region, and is among the regions as it was known.
///
/// # Errors
/// A rule names a region that there is not.
pub fn next_and_errors(
    policy: &Policy,
    known: &Regions,
    mut answers: BTreeMap<String, Result<Answer>>,
    now: Timestamp,
) -> Result<(Regions, Vec<String>)> {
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
            // A program that hangs with the file open must not hold up the rest of the policy.
            let is_still_written = answer
                .as_ref()
                .is_err_and(|error| error.is::<StillWritten>());
            let keeps_set = is_still_written && state.set.is_some();
            state.take(answer, false, now);
            if let (true, false, Some(error)) = (state.failing, state.partial, &state.error)
                && !keeps_set
            {
                errors.push(format!("region {name}: {}", error.text));
            }
        }
        regions.insert(name.clone(), state);
    }
    Ok((regions, errors))
}

/// Returns the prefixes that each region allows.
pub fn prefixes(regions: &Regions) -> rules::Regions {
    let allowed = |(name, state): (&String, &State)| {
        let set = state.set.as_ref()?;
        Some((name.clone(), set.prefixes.clone()))
    };
    regions.iter().filter_map(allowed).collect()
}

#[derive(Clone, Debug)]
pub struct State {
    pub region: Region,
    /// The last good set. `None`: there is none, and the region allows nobody.
    pub set: Option<Set>,
    /// Shared, as the sets' prefixes are: a state is copied at every change, and this may be a million of them.
    pub change: Option<Arc<Change>>,
    pub error: Option<Error>,
    /// Whether the last look-up failed, or something is missing in its result.
    pub failing: bool,
    /// Whether the last result is in force although something is missing in it, which `error` names.
    pub partial: bool,
    /// When to look up next. `None`: never, or a look-up is under way.
    pub next: Option<Timestamp>,
    quarantined: Option<Quarantined>,
    failures: usize,
    /// Look-ups since the agent started, or since the region has this source: those that brought a result, and those that
    /// failed.
    pub succeeded: u64,
    pub failed: u64,
}

/// The last good set.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Set {
    /// Prefixes of the last good result, sorted, without duplicates.
    pub members: Arc<[IpNet]>,
    /// Prefixes that left with more than `max_shrink` of the others: each retires with the first good result from then on
    /// that does not have it. No time that passes without results counts.
    #[serde(default)]
    pub held: Vec<(IpNet, Timestamp)>,
    /// Retiring prefixes, and until when each stays allowed.
    pub retiring: Vec<(IpNet, Timestamp)>,
    /// When the source last returned this set.
    pub confirmed: Timestamp,
    pub serial: Option<u64>,
    pub version: Option<Version>,
    /// The result that is far smaller than the one before.
    #[serde(default)]
    pub shrunk: Option<Shrunk>,
    /// The part of the source that could not be looked up last.
    #[serde(default)]
    pub incomplete: Option<Incomplete>,
    /// The members, with adjacent and covered ones merged.
    #[serde(skip)]
    pub merged: Arc<Prefixes>,
    /// Allowed prefixes: the same with held and retiring ones.
    #[serde(skip)]
    pub prefixes: Arc<Prefixes>,
}

/// A result that is far smaller than the one before. It is an error until it was so for `shrink_after`, or grows again.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
pub struct Shrunk {
    /// Members before.
    from: usize,
    until: Timestamp,
}

/// Address families that cannot be looked up. Their last members stay.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
pub struct Incomplete {
    v4: bool,
    v6: bool,
    since: Timestamp,
}

impl Incomplete {
    fn has(&self, prefix: &IpNet) -> bool {
        match prefix {
            IpNet::V4(_) => self.v4,
            IpNet::V6(_) => self.v6,
        }
    }
}

/// A quarantined result: an older one than that in force. It is accepted if it stays the same for `shrink_after`.
#[derive(Clone, Debug)]
struct Quarantined {
    members: Vec<IpNet>,
    since: Timestamp,
}

/// How a region's allowed prefixes changed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Change {
    pub at: Option<Timestamp>,
    pub added: Vec<IpNet>,
    /// Retiring: no longer in the result, allowed for `retire_after`.
    pub left: Vec<IpNet>,
    /// No longer allowed.
    pub removed: Vec<IpNet>,
    /// `None`: it is not in force yet.
    pub timing: Option<Box<Timing>>,
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

/// The instant for people, in whole seconds.
fn in_seconds(at: Timestamp) -> Timestamp {
    at.round(Unit::Second).unwrap_or(at)
}

impl Shrunk {
    fn describe(&self, members: &[IpNet]) -> String {
        format!(
            "the prefixes fell from {} to {}, by more than `max_shrink`: reported until {}, or until `filter-agent \
             refresh REGION --accept`; those that left stay allowed for a time",
            self.from,
            members.len(),
            in_seconds(self.until)
        )
    }
}

impl Set {
    /// Puts together what is allowed, after held or retiring prefixes changed.
    fn merge(&mut self) {
        let left = self.held.iter().chain(&self.retiring);
        let left = left.map(|&(prefix, _)| prefix);
        self.prefixes = match self.held.is_empty() && self.retiring.is_empty() {
            true => self.merged.clone(),
            false => Prefixes::shared(merged_with(&self.merged, left)),
        };
    }

    /// The same after members changed.
    fn merge_members(&mut self) {
        self.merged = Prefixes::shared(merged(&self.members));
        self.merge();
    }
}

impl State {
    /// Makes the state of a region that was never looked up. A look-up is due at once.
    pub fn new(region: Region, now: Timestamp) -> Self {
        let mut state = Self {
            region,
            set: None,
            change: None,
            error: None,
            failing: false,
            partial: false,
            next: Some(now),
            quarantined: None,
            failures: 0,
            succeeded: 0,
            failed: 0,
        };
        if let RegionSource::Prefixes(prefixes) = &state.region.source {
            let found = Found {
                prefixes: prefixes.clone(),
                ..Found::default()
            };
            state.replace(found, None, true, now);
            state.change = None;
            state.next = None;
        }
        state
    }

    /// Puts a stored set in force, if it passes the guards and is not older than `max_age`.
    ///
    /// # Errors
    /// The set is not valid. Nothing is in force then.
    pub fn restore(&mut self, mut set: Set, now: Timestamp) -> Result<()> {
        let guards = &self.region.guards;
        ensure!(
            set.members.is_sorted_by(|a, b| a < b),
            "its members are out of order"
        );
        check(&set.members, guards)?;
        // The clock may have been wrong when it was written, or may be now.
        set.confirmed = set.confirmed.min(now);
        for (_, until) in &mut set.retiring {
            *until = (*until).min(now + guards.retire_after);
        }
        for (_, until) in &mut set.held {
            *until = (*until).min(now + guards.shrink_after);
        }
        if let Some(shrunk) = &mut set.shrunk {
            shrunk.until = shrunk.until.min(now + guards.shrink_after);
        }
        if let Some(incomplete) = &mut set.incomplete {
            incomplete.since = incomplete.since.min(now);
        }
        set.retiring.retain(|&(_, until)| until > now);
        let left = set.held.iter().chain(&set.retiring);
        let mut left: Vec<IpNet> = left.map(|&(prefix, _)| prefix).collect();
        left.sort_unstable();
        check_each(&left, guards)?;
        if let Some(max_age) = guards.max_age {
            ensure!(
                set.confirmed + max_age > now,
                "it was confirmed at {}, longer ago than {} (`max_age`)",
                set.confirmed,
                spelled(max_age)
            );
        }
        set.merge_members();
        self.set = Some(set);
        Ok(())
    }

    /// Returns the version of the set in force, so that a source need not return the same content again.
    pub fn version(&self) -> Option<&Version> {
        // While a result is quarantined the source must return it in full again.
        match (&self.quarantined, &self.set) {
            (None, Some(set)) => set.version.as_ref(),
            _ => None,
        }
    }

    /// Whether another state of the region has the same set of the same source, whenever it was confirmed.
    pub fn holds_the_same(&self, other: &Self) -> bool {
        let content = |set: &Set| Set {
            confirmed: Timestamp::UNIX_EPOCH,
            members: Arc::default(),
            merged: Arc::default(),
            prefixes: Arc::default(),
            ..set.clone()
        };
        // Most sets are copies that share their prefixes: these need not be compared one by one.
        let same = |one: &Arc<[IpNet]>, other| Arc::ptr_eq(one, other) || one == other;
        self.region.source == other.region.source
            && match (&self.set, &other.set) {
                (Some(one), Some(other)) => {
                    same(&one.members, &other.members)
                        && one.prefixes == other.prefixes
                        && content(one) == content(other)
                }
                (None, None) => true,
                _ => false,
            }
    }

    /// Takes the result of a look-up. `accept`: what looks wrong in it is meant. Returns how the allowed prefixes changed.
    pub fn take(&mut self, result: Result<Answer>, accept: bool, now: Timestamp) -> Change {
        match result.and_then(|answer| self.judge(answer, accept, now)) {
            Ok((change, missing)) => {
                self.failures = 0;
                self.succeeded += 1;
                self.failing = missing.is_some();
                self.partial = self.failing;
                if let Some(text) = missing {
                    self.error = Some(Error { at: now, text });
                }
                if !change.is_empty() {
                    self.change = Some(Arc::new(change.clone()));
                }
                change
            }
            Err(error) => {
                self.fail(format!("{error:#}"), now);
                if let Some(later) = error.downcast_ref() {
                    self.try_later(later, now);
                }
                Change::default()
            }
        }
    }

    /// Records a failed look-up and schedules a retry. The set in force stays.
    pub fn fail(&mut self, text: String, now: Timestamp) {
        let Guards {
            min_refresh,
            max_refresh,
            ..
        } = self.region.guards;
        let mut delays = self.delays();
        // Beyond 32 doublings the delay is `max_refresh` anyway.
        let delay = delays.nth(self.failures.min(32)).unwrap_or(max_refresh);
        let mut next = now + delay.min(max_refresh);
        if let Some(quarantined) = &self.quarantined {
            next = next
                .min(quarantined.since + self.region.guards.shrink_after)
                .max(now + min_refresh);
        }
        self.next = Some(next);
        self.failures += 1;
        self.failed += 1;
        self.failing = true;
        self.partial = false;
        // Servers and libraries may quote a URL that holds secrets.
        let text = redacted(&text);
        self.error = Some(Error { at: now, text });
    }

    /// Schedules the next look-up no earlier than the source asks for. Hosts that share an address hear of the same
    /// instant: each waits a random time longer.
    fn try_later(&mut self, later: &TryLater, now: Timestamp) {
        let spread = self.delays().next().unwrap_or_default();
        self.next = self.next.max(Some(now + later.wait() + spread));
    }

    /// Delays of look-ups that fail one after the other, each a random time longer than the backoff.
    fn delays(&self) -> impl Iterator<Item = Duration> + use<> {
        let guards = &self.region.guards;
        ExponentialBuilder::new()
            .with_min_delay(guards.min_refresh)
            .with_max_delay(guards.max_refresh)
            .without_max_times()
            .with_jitter()
            .build()
    }

    /// Returns how the allowed prefixes changed, and what is missing in the result.
    fn judge(
        &mut self,
        answer: Answer,
        accept: bool,
        now: Timestamp,
    ) -> Result<(Change, Option<String>)> {
        let mut found = match answer {
            Answer::Found(found) => found,
            Answer::Unchanged { ask_again } => {
                let Some(set) = &mut self.set else {
                    bail!("the source returned no content, only that it did not change");
                };
                set.confirmed = now;
                set.shrunk = set.shrunk.filter(|shrunk| !accept && now < shrunk.until);
                let missing = set.shrunk.map(|shrunk| shrunk.describe(&set.members));
                self.next = self.schedule(ask_again, now);
                return Ok((Change::default(), missing));
            }
        };
        let missing = found.missing.take();
        let incomplete = missing.as_ref().map(|missing| Incomplete {
            v4: missing.v4,
            v6: missing.v6,
            since: self
                .set
                .as_ref()
                .and_then(|set| set.incomplete)
                .map_or(now, |before| before.since),
        });
        if let (Some(incomplete), Some(set)) = (&incomplete, &self.set) {
            let kept = set.members.iter().filter(|prefix| incomplete.has(prefix));
            found.prefixes.extend(kept);
            found.merged = None;
        }
        found.prefixes.sort_unstable();
        found.prefixes.dedup();
        if let Err(error) = check(&found.prefixes, &self.region.guards) {
            self.quarantined = None;
            return Err(error.context(self.region.source.to_string()));
        }
        if !accept {
            self.refuse_older(&found, now)?;
        }
        self.quarantined = None;
        self.next = self.schedule(found.ask_again, now);
        let change = self.replace(found, incomplete, accept, now);
        let mut missing: Vec<String> = missing.map(|part| part.error).into_iter().collect();
        if let Some(set) = &self.set {
            missing.extend(set.shrunk.map(|shrunk| shrunk.describe(&set.members)));
        }
        Ok((
            change,
            (!missing.is_empty()).then(|| missing.join(", and ")),
        ))
    }

    /// When to look up next after a good result.
    fn schedule(&self, ask_again: Option<Duration>, now: Timestamp) -> Option<Timestamp> {
        let Guards {
            min_refresh,
            max_refresh,
            ..
        } = self.region.guards;
        // Files too: inotify does not see changes that another host makes.
        if self.region.is_constant() {
            return None;
        }
        let delay = ask_again.unwrap_or(max_refresh);
        Some(now + delay.clamp(min_refresh, max_refresh))
    }

    /// Quarantines a result that is older than the set in force, until it has stayed the same for `shrink_after`.
    ///
    /// # Errors
    /// As long as it has not.
    fn refuse_older(&mut self, found: &Found, now: Timestamp) -> Result<()> {
        let known = self.set.as_ref().and_then(|set| set.serial);
        let Some(known) = known.filter(|known| found.serial.is_none_or(|serial| serial < *known))
        else {
            return Ok(());
        };
        let members = &found.prefixes;
        let since = match &self.quarantined {
            Some(quarantined) if quarantined.members == *members => quarantined.since,
            _ => {
                let members = members.clone();
                self.quarantined = Some(Quarantined {
                    members,
                    since: now,
                });
                now
            }
        };
        let until = since + self.region.guards.shrink_after;
        let shown = in_seconds(until);
        let older = match found.serial {
            Some(serial) => format!("the list's number {serial} is older than {known}, in force"),
            None => format!("the list has no number, and the one in force has {known}"),
        };
        ensure!(
            now >= until,
            "{older}: taken if it is still so at {shown}, or now with \
             `filter-agent refresh REGION --accept`"
        );
        Ok(())
    }

    /// Puts a result in force. New prefixes are allowed at once. Those that are gone retire, but if more than `max_shrink`
    /// are gone only once results have lacked them for `shrink_after`: a source that rotates returns some of its prefixes
    /// each time.
    fn replace(
        &mut self,
        found: Found,
        incomplete: Option<Incomplete>,
        accept: bool,
        now: Timestamp,
    ) -> Change {
        let guards = &self.region.guards;
        let before = self.set.take();
        let (known, allowed, mut held, mut retiring, shrunk) = match before {
            Some(set) => (
                set.members,
                set.prefixes,
                set.held,
                set.retiring,
                set.shrunk,
            ),
            None => Default::default(),
        };
        let result = found
            .merged
            .unwrap_or_else(|| Prefixes::shared(merged(&found.prefixes)));
        held.retain(|(prefix, _)| !is_covered(prefix, &result));
        retiring.retain(|(prefix, _)| !is_covered(prefix, &result));
        let gone: Vec<IpNet> = uncovered(&known, &result).collect();
        let share = |of: usize| of * usize::from(guards.max_shrink) / 100;
        let is_suspicious = !accept && gone.len() > share(known.len());
        let shrunk = shrunk.filter(|shrunk| !accept && now < shrunk.until);
        let shrunk = match is_suspicious {
            true => Some(Shrunk {
                from: shrunk.map_or(known.len(), |shrunk| shrunk.from),
                until: now + guards.shrink_after,
            }),
            false => shrunk,
        };
        let shrunk = shrunk.filter(|shrunk| {
            let least = shrunk.from - share(shrunk.from);
            found.prefixes.len() < least && now < shrunk.until
        });
        let mut change = Change {
            at: Some(now),
            added: uncovered(&found.prefixes, &allowed).collect(),
            left: gone.clone(),
            ..Change::default()
        };
        if is_suspicious {
            held.extend(
                gone.iter()
                    .map(|&prefix| (prefix, now + guards.shrink_after)),
            );
        }
        let retires = now + guards.retire_after;
        // Of a family that could not be looked up nothing is known.
        let is_known = |prefix: &IpNet| incomplete.is_none_or(|incomplete| !incomplete.has(prefix));
        let over = held.extract_if(.., |(prefix, until)| {
            accept || (*until <= now && is_known(prefix))
        });
        retiring.extend(over.map(|(prefix, _)| (prefix, retires)));
        if !is_suspicious {
            retiring.extend(gone.iter().map(|&prefix| (prefix, retires)));
        }
        if accept || retires == now {
            for (_, until) in &mut retiring {
                *until = retires.min(*until);
            }
            // Else it is `tick` that removes them, with pauses where the kernel refuses.
            let over = retiring.extract_if(.., |&mut (_, until)| until <= now);
            change.removed = over.map(|(prefix, _)| prefix).collect();
        }
        // A source with ever new addresses must not fill the maps: those that left first are removed early.
        let room = guards.max_prefixes.saturating_sub(found.prefixes.len());
        for left in [&mut retiring, &mut held] {
            left.sort_by_key(|&(_, until)| std::cmp::Reverse(until));
        }
        let early = held.split_off(room.min(held.len()));
        let late = retiring.split_off((room - held.len()).min(retiring.len()));
        change
            .removed
            .extend(early.into_iter().chain(late).map(|(prefix, _)| prefix));
        let removed: BTreeSet<IpNet> = change.removed.iter().copied().collect();
        change.left.retain(|prefix| !removed.contains(prefix));
        let mut set = Set {
            members: found.prefixes.into(),
            held,
            retiring,
            confirmed: now,
            serial: found.serial,
            version: found.version,
            shrunk,
            incomplete,
            merged: result,
            prefixes: Arc::default(),
        };
        set.merge();
        self.set = Some(set);
        change
    }

    /// Removes retiring prefixes whose time is over, and a set older than `max_age`.
    pub fn tick(&mut self, now: Timestamp) -> Change {
        let mut change = Change {
            at: Some(now),
            ..Change::default()
        };
        let Some(set) = &mut self.set else {
            return change;
        };
        let max_age = self.region.guards.max_age;
        if let (Some(max_age), Some(incomplete)) = (max_age, set.incomplete)
            && incomplete.since + max_age <= now
        {
            // The family that could not be looked up for so long.
            let old = |prefix: &IpNet| incomplete.has(prefix);
            change.removed = set.prefixes.iter().copied().filter(old).collect();
            let members = set.members.iter().copied();
            set.members = members.filter(|prefix| !old(prefix)).collect();
            set.held.retain(|(prefix, _)| !old(prefix));
            set.retiring.retain(|(prefix, _)| !old(prefix));
            set.incomplete = None;
            set.merge_members();
        }
        if let Some(max_age) = max_age
            && set.confirmed + max_age <= now
        {
            change.removed.extend_from_slice(&set.prefixes);
            let text = format!("not confirmed since {} (`max_age`)", set.confirmed);
            self.set = None;
            self.quarantined = None;
            self.failing = true;
            self.partial = false;
            self.error = Some(Error { at: now, text });
        } else if set.retiring.iter().any(|&(_, until)| until <= now) {
            let over = set.retiring.extract_if(.., |&mut (_, until)| until <= now);
            change.removed.extend(over.map(|(prefix, _)| prefix));
            set.merge();
        }
        if !change.is_empty() {
            self.change = Some(Arc::new(change.clone()));
        }
        change
    }

    /// Returns when `tick` next changes something.
    pub fn next_tick(&self) -> Option<Timestamp> {
        let set = self.set.as_ref()?;
        let retires = set.retiring.iter().map(|&(_, until)| until).min();
        let max_age = self.region.guards.max_age;
        let ages = max_age.map(|max_age| set.confirmed + max_age);
        let since = set.incomplete.map(|incomplete| incomplete.since);
        let part_ages = max_age.and_then(|max_age| Some(since? + max_age));
        [retires, ages, part_ages].into_iter().flatten().min()
    }
}

#[cfg(test)]
mod tests;
