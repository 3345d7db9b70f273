//! Which records are on disk, on their way there, or could not be written. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    time::Duration,
};

use anyhow::Result;
use jiff::Timestamp;

use crate::{
    fleet::state as fleet,
    history::History,
    host::coverage::Remembered,
    last_hits,
    log::Entry,
    region::state::State,
    store::{Confirmed, Record, Write},
    temporary::Kept,
    window,
};

/// How often a set that stays the same is written to disk, for the time it was confirmed.
const SAVE_AGAIN: Duration = Duration::from_mins(10);

/// How often at most a set that look-ups change is written to disk: a name that rotates through a pool changes at each.
const CHANGE_INTERVAL: Duration = Duration::from_mins(1);

/// Pause before a set that could not be written is written again.
const RETRY: Duration = Duration::from_mins(1);

/// How often the time that is left of rules is written to disk: a reboot without notice may lengthen them by as much.
const LEFT_INTERVAL: Duration = Duration::from_mins(1);

/// How often at most the last hits of rules are written to disk. Agents that are killed lose as much, and the next one sees in
/// the kernel's counters which rules were hit since.
const HITS_INTERVAL: Duration = Duration::from_mins(1);

/// Pause before records of the history that could not be written are written again, where there is no change before.
const HISTORY_RETRY: Duration = Duration::from_secs(10);

/// How often at most the marks of etcd's answers are written to disk, where the documents stay the same.
const MARKS_INTERVAL: Duration = Duration::from_mins(1);

#[derive(Debug)]
pub struct Saves {
    /// The confirmed policy that was given to the store last.
    confirmed: Option<Confirmed>,
    /// The ends and temporary rules that were given to the store last, and when.
    temporary: Kept,
    temporary_at: Timestamp,
    /// The window and abandoned texts that were given to the store last, and when. `None`: something else is on disk.
    window: Option<window::Kept>,
    window_at: Timestamp,
    /// The fleet's documents that were given to the store last. `None`: something else is on disk.
    fleet: Option<fleet::Kept>,
    fleet_at: Timestamp,
    /// Last hits of rules that are not on disk, and when a version was given to the store last.
    last_hits: Option<last_hits::Kept>,
    last_hits_at: Option<Timestamp>,
    /// The history that was given to the store last, and when; and the id of a change.
    history: History,
    history_at: Timestamp,
    change_id: Option<u64>,
    /// Records of which one kind there is that are on their way to disk.
    under_way: BTreeSet<Record>,
    /// When each region's set was given to the store last.
    regions: BTreeMap<String, Timestamp>,
    /// When each region's set was written last because a look-up changed it.
    changed: BTreeMap<String, Timestamp>,
    /// Regions whose set changed since it was given to the store.
    waiting: BTreeSet<String>,
    /// Why records are not on disk.
    errors: BTreeMap<Record, String>,
}

impl Saves {
    /// `confirmed`, `temporary`, `window`, `history` and `change_id`: as on disk. `regions`: those whose set is on disk.
    pub fn new(
        confirmed: Option<Confirmed>,
        temporary: Kept,
        window: Option<window::Kept>,
        fleet: Option<fleet::Kept>,
        (history, change_id): (History, Option<u64>),
        regions: impl Iterator<Item = String>,
        now: Timestamp,
    ) -> Self {
        Self {
            confirmed,
            temporary,
            temporary_at: now,
            window,
            window_at: now,
            fleet,
            fleet_at: now,
            last_hits: None,
            last_hits_at: None,
            history,
            history_at: now,
            change_id,
            under_way: BTreeSet::new(),
            regions: regions.map(|name| (name, now)).collect(),
            changed: BTreeMap::new(),
            waiting: BTreeSet::new(),
            errors: BTreeMap::new(),
        }
    }

    /// The write that keeps the policy in force for the next start; `None`: it is on disk.
    pub fn confirm(&mut self, policy: &str, interfaces: &Remembered) -> Option<Write> {
        let is_same = |kept: &Confirmed| kept.policy == policy && kept.interfaces == *interfaces;
        let is_saved = self.confirmed.as_ref().is_some_and(is_same);
        if is_saved && self.error(&Record::Confirmed).is_none() {
            return None;
        }
        let confirmed = Confirmed {
            policy: policy.into(),
            interfaces: interfaces.clone(),
            machine: None,
        };
        self.confirmed = Some(confirmed.clone());
        self.under_way.insert(Record::Confirmed);
        Some(Write::Confirmed(Some(confirmed)))
    }

    /// The policy that is kept for the next start, whole and up to date on disk; `None`: it is not, or is on its way there.
    pub fn confirmed(&self) -> Option<&Confirmed> {
        let record = &Record::Confirmed;
        let is_on_disk = self.error(record).is_none() && !self.is_under_way(record);
        self.confirmed.as_ref().filter(|_| is_on_disk)
    }

    /// Goes back to the confirmed policy of before a write that failed: it is still on disk.
    pub fn take_back_confirmed(&mut self, before: Option<Confirmed>) {
        self.confirmed = before;
        self.errors.remove(&Record::Confirmed);
    }

    /// Whether a window or the abandoned texts have to be written again: the disk did not take them, or the time that is
    /// left of rules, which is written each minute, is old.
    pub fn is_window_due(&self, now: Timestamp) -> bool {
        let is_open = self.window.as_ref().is_some_and(|kept| kept.open.is_some());
        let is_old = self.window_at + LEFT_INTERVAL <= now && is_open;
        let failed = self.error(&Record::Window).is_some();
        !self.is_under_way(&Record::Window) && (failed || is_old)
    }

    /// The write that keeps a window and the abandoned texts for the next start; `None`: they are on disk.
    pub fn window(&mut self, kept: window::Kept, now: Timestamp) -> Option<Write> {
        if self.window.as_ref() == Some(&kept) && !self.is_window_due(now) {
            return None;
        }
        self.window = Some(kept.clone());
        self.window_at = now;
        self.under_way.insert(Record::Window);
        Some(Write::Window(kept.into()))
    }

    /// The write that keeps the fleet's documents for the next start; `None`: they are on disk. The marks of the last answer,
    /// which any write to etcd moves, are written each minute at most.
    pub fn fleet(&mut self, kept: fleet::Kept, now: Timestamp) -> Option<Write> {
        let is_same = |before: &fleet::Kept| match self.fleet_at + MARKS_INTERVAL > now {
            true => before.has_same_documents(&kept),
            false => *before == kept,
        };
        if self.fleet.as_ref().is_some_and(is_same) && self.error(&Record::Fleet).is_none() {
            return None;
        }
        self.fleet = Some(kept.clone());
        self.fleet_at = now;
        self.under_way.insert(Record::Fleet);
        Some(Write::Fleet(kept.into()))
    }

    /// The write that keeps the ends and temporary rules for the next start; `None`: they are on disk. `now`: also for
    /// the time that is left, which is written each minute else.
    pub fn temporary(&mut self, kept: Kept, now: Timestamp, at_once: bool) -> Option<Write> {
        let is_same = kept.holds_the_same(&self.temporary);
        let failed = self.error(&Record::Temporary).is_some();
        let is_old = self.temporary_at + LEFT_INTERVAL <= now;
        let is_due = !is_same || (at_once || is_old) && (failed || !kept.is_empty());
        if !is_due {
            return None;
        }
        self.temporary = kept.clone();
        self.temporary_at = now;
        self.under_way.insert(Record::Temporary);
        Some(Write::Temporary(kept))
    }

    /// The write that keeps the last hits of rules for the next start, each minute at most; `None`: there is nothing new, or it
    /// waits. `changed`: they changed since the last call.
    pub fn last_hits(&mut self, changed: Option<last_hits::Kept>, now: Timestamp) -> Option<Write> {
        self.last_hits = changed.or(self.last_hits.take());
        let is_recent = |last: Timestamp| last + HITS_INTERVAL > now;
        if self.last_hits_at.is_some_and(is_recent) {
            return None;
        }
        let kept = self.last_hits.take()?;
        self.last_hits_at = Some(now);
        Some(Write::LastHits(kept))
    }

    /// The latest date that the host's clock had when the temporary rules were written.
    pub fn latest_clock(&self) -> Timestamp {
        self.temporary.clock
    }

    /// The writes that keep the history for the next start: of what changed, and of what could not be written.
    pub fn history(&mut self, history: &History, now: Timestamp) -> Vec<Write> {
        let before = mem::replace(&mut self.history, history.clone());
        self.history_at = now;
        let hashes = |history: &History| history.texts().keys().cloned().collect::<BTreeSet<_>>();
        let kept = hashes(history);
        self.errors.retain(|record, _| match record {
            Record::Text(hash) => kept.contains(hash),
            _ => true,
        });
        let failed = |record: &Record| self.errors.contains_key(record);
        let mut writes = Vec::new();
        if self.change_id != Some(history.last_id()) || failed(&Record::ChangeId) {
            writes.push(Write::ChangeId(history.last_id()));
        }
        for (hash, text) in history.texts() {
            if !before.texts().contains_key(hash) || failed(&Record::Text(hash.clone())) {
                writes.push(Write::Text {
                    hash: hash.clone(),
                    text: text.clone(),
                });
            }
        }
        if before.policies() != history.policies() || failed(&Record::Policies) {
            writes.push(Write::Policies(history.policies().clone()));
        }
        if before.others() != history.others() || failed(&Record::Changes) {
            writes.push(Write::Changes(history.others().clone()));
        }
        if hashes(&before) != kept || failed(&Record::Texts) {
            writes.push(Write::Texts(kept));
        }
        self.change_id = Some(history.last_id());
        self.under_way.extend(writes.iter().map(Write::record));
        writes
    }

    /// Whether parts of the history could not be written, and it is time to try again.
    pub fn must_repeat_history(&self, now: Timestamp) -> bool {
        let is_of_it = |record: &Record| {
            matches!(
                record,
                Record::ChangeId
                    | Record::Text(_)
                    | Record::Policies
                    | Record::Changes
                    | Record::Texts
            )
        };
        self.history_at + HISTORY_RETRY <= now && self.errors.keys().any(is_of_it)
    }

    /// The writes that keep neither a policy nor a window nor temporary rules nor last hits for the next start.
    pub fn forget(&mut self) -> [Write; 4] {
        self.confirmed = None;
        self.temporary = Kept::default();
        self.window = Some(window::Kept::default());
        self.last_hits = None;
        self.under_way.extend([
            Record::Confirmed,
            Record::Temporary,
            Record::Window,
            Record::LastHits,
        ]);
        [
            Write::Window(Box::default()),
            Write::Confirmed(None),
            Write::Temporary(Kept::default()),
            Write::LastHits(last_hits::Kept::default()),
        ]
    }

    /// Whether the latest version of a record, other than of a region, is on its way to disk.
    pub fn is_under_way(&self, record: &Record) -> bool {
        self.under_way.contains(record)
    }

    /// The write of a region's set that a look-up changed, or whose time on disk is old. A set that changes again and again
    /// is written each minute only; `region` writes it then, or at the end.
    pub fn looked_up(
        &mut self,
        name: &str,
        state: &State,
        changed: bool,
        now: Timestamp,
    ) -> Option<Write> {
        let is_recent = |last: &Timestamp| *last + CHANGE_INTERVAL > now;
        if changed && self.changed.get(name).is_some_and(is_recent) {
            self.waiting.insert(name.into());
            return None;
        }
        if changed {
            self.changed.insert(name.into(), now);
        }
        self.region(name, state, changed, now)
    }

    /// The write of a region's set, if it changed or its time on disk is old.
    pub fn region(
        &mut self,
        name: &str,
        state: &State,
        changed: bool,
        now: Timestamp,
    ) -> Option<Write> {
        let failed = self.errors.contains_key(&Record::Region(name.into()));
        let pause = if failed { RETRY } else { SAVE_AGAIN };
        let is_old = |saved: &Timestamp| *saved + pause <= now;
        let set = state.set.as_ref()?;
        let waits = self.waiting.contains(name)
            && self
                .changed
                .get(name)
                .is_none_or(|last| *last + CHANGE_INTERVAL <= now);
        let is_due = changed || waits || self.regions.get(name).is_none_or(is_old);
        if !is_due || state.region.is_constant() {
            return None;
        }
        self.regions.insert(name.into(), now);
        if self.waiting.remove(name) {
            self.changed.insert(name.into(), now);
        }
        Some(Write::Region {
            name: name.into(),
            source: state.region.source.clone().into(),
            set: set.clone().into(),
        })
    }

    /// The write that leaves nothing of other regions: it would be out of date when a rule names one again.
    pub fn keep_only(&mut self, names: BTreeSet<String>) -> Write {
        self.regions.retain(|name, _| names.contains(name));
        self.changed.retain(|name, _| names.contains(name));
        self.waiting.retain(|name| names.contains(name));
        let is_gone =
            |record: &Record| matches!(record, Record::Region(name) if !names.contains(name));
        self.errors.retain(|record, _| !is_gone(record));
        Write::Regions(names)
    }

    /// Notes the result of a write. Returns a line for the log.
    pub fn written(&mut self, write: &Write, result: Result<()>) -> Option<Entry> {
        let record = &write.record();
        // A version that was overtaken says nothing about the latest one.
        let is_latest = match write {
            Write::Confirmed(written) => *written == self.confirmed,
            Write::Temporary(written) => *written == self.temporary,
            Write::ChangeId(written) => Some(*written) == self.change_id,
            Write::Policies(written) => written == self.history.policies(),
            Write::Changes(written) => written == self.history.others(),
            Write::Text { .. } | Write::Texts(_) => true,
            Write::Fleet(written) => Some(&**written) == self.fleet.as_ref(),
            Write::Window(written) => Some(&**written) == self.window.as_ref(),
            // Nobody waits for others than those of `forget`.
            Write::LastHits(written) => written.is_empty(),
            Write::Region { .. } | Write::Regions(_) => false,
        };
        if is_latest {
            self.under_way.remove(record);
        }
        let entry = |entry: Entry| match record {
            Record::Region(name) => entry.with("REGION", name),
            _ => entry,
        };
        match result {
            Ok(()) => {
                self.errors.remove(record)?;
                Some(entry(Entry::info(match record {
                    Record::Confirmed => "the policy in force is kept for the next start".into(),
                    Record::Region(name) => {
                        format!("region {name}: its set is kept on disk again")
                    }
                    Record::Temporary => "temporary rules are kept for the next start again".into(),
                    Record::Window => {
                        "the policy that is tried, and those that were fallen back from, are kept for the next start \
                         again"
                            .into()
                    }
                    Record::Fleet => {
                        "the fleet's documents are kept for the next start again".into()
                    }
                    Record::LastHits => {
                        "the last hits of rules are kept for the next start again".into()
                    }
                    Record::Regions => "the sets of unused regions are removed".into(),
                    Record::ChangeId => "the numbers of changes are kept again".into(),
                    Record::Text(_) => "the text of the policy is kept in the history".into(),
                    Record::Policies => "the history of policies is kept again".into(),
                    Record::Changes => "the history of temporary rules is kept again".into(),
                    Record::Texts => {
                        "the texts of policies that are not in the history are removed".into()
                    }
                })))
            }
            Err(error) => {
                if let (Write::LastHits(kept), None) = (write, &self.last_hits) {
                    self.last_hits = Some(kept.clone());
                    // With the next check: nothing was written.
                    self.last_hits_at = None;
                }
                let error = match record {
                    Record::Confirmed if *write != Write::Confirmed(None) => {
                        format!("the policy in force is not kept for the next start: {error:#}")
                    }
                    Record::Temporary => {
                        format!(
                            "temporary rules and ends are not kept for the next start: {error:#}"
                        )
                    }
                    Record::Window => format!(
                        "what is known of policies that are tried, or were fallen back from, is not kept for the next \
                         start: {error:#}"
                    ),
                    Record::Fleet => {
                        format!("the fleet's documents are not kept for the next start: {error:#}")
                    }
                    Record::LastHits => {
                        format!("the last hits of rules are not kept for the next start: {error:#}")
                    }
                    Record::Region(name) => format!("region {name}: {error:#}"),
                    Record::ChangeId => format!(
                        "the numbers of changes are not kept, and may be given again: {error:#}"
                    ),
                    Record::Text(_) => {
                        format!("the text of the policy is not kept in the history: {error:#}")
                    }
                    Record::Policies => format!("the history of policies is not kept: {error:#}"),
                    Record::Changes => {
                        format!("the history of temporary rules is not kept: {error:#}")
                    }
                    Record::Confirmed | Record::Regions | Record::Texts => format!("{error:#}"),
                };
                let is_new = self.error(record) != Some(&error);
                self.errors.insert(record.clone(), error.clone());
                is_new.then(|| entry(Entry::warning(error)))
            }
        }
    }

    /// Why a record is not on disk; `None`: it is, or is on its way.
    pub fn error(&self, record: &Record) -> Option<&String> {
        self.errors.get(record)
    }

    /// Regions whose set on disk is not the latest: it changed again, or could not be written.
    pub fn unwritten_regions(&self) -> BTreeSet<String> {
        let failed = self.errors.keys().filter_map(|record| match record {
            Record::Region(name) => Some(name.clone()),
            _ => None,
        });
        failed.chain(self.waiting.iter().cloned()).collect()
    }

    pub fn errors(&self) -> impl Iterator<Item = &String> {
        self.errors.values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::parse;

    /// A name that rotates through a pool had its set written at every look-up.
    #[test]
    fn set_that_changes_at_every_look_up_is_written_each_minute_and_at_the_end() {
        let text = "interfaces: [eth0]\nregions: {x: {dns: [x.test]}}\ndatabases: []\n";
        let (policy, _) = parse(text).unwrap();
        let at = |seconds| Timestamp::from_second(seconds).unwrap();
        let mut state = State::new(policy.regions["x"].clone(), at(0));
        let mut saves = Saves::new(
            None,
            Kept::default(),
            None,
            None,
            Default::default(),
            ["x".to_owned()].into_iter(),
            at(0),
        );
        let mut written = Vec::new();
        for second in 0..150 {
            let prefixes = vec![format!("192.0.2.{second}/32").parse().unwrap()];
            let found = crate::region::answer::Found {
                prefixes,
                ..Default::default()
            };
            let found = crate::region::answer::Answer::Found(found);
            let changed = !state.take(Ok(found), false, at(second)).is_empty();
            assert!(changed);
            let write = saves.looked_up("x", &state, changed, at(second));
            // As the agent does at each check.
            let unwritten = saves.unwritten_regions();
            let again = unwritten.iter().filter_map(|name| {
                assert!(write.is_none());
                saves.region(name, &state, false, at(second))
            });
            let again: Vec<Write> = again.collect();
            written.extend(write.into_iter().chain(again).map(|_| second));
        }
        assert_eq!(written, [0, 60, 120]);
        assert_eq!(saves.unwritten_regions(), ["x".to_owned()].into());
        // At the end.
        assert!(saves.region("x", &state, true, at(150)).is_some());
        assert!(saves.unwritten_regions().is_empty());
    }
}
