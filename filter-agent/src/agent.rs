//! The agent's state machine: events in, effects out. It does no I/O and reads no clock. One change is under way at
//! a time; events that would start another one wait until it is done.

mod end;
mod fall_back;
mod fleet;
mod history;
mod regions;
mod reloads;
mod temporary;
mod time;
mod window;

use std::{collections::VecDeque, mem, path::PathBuf, sync::Arc};

use anyhow::Result;
use jiff::Timestamp;

use crate::{
    clock::{BootTime, Now},
    enforcer::Checked,
    event::{Effect, Event, Order, ReloadOptions, Reply, Request},
    fleet::{ThisHost, state::State as Fleet},
    history::{History, Origin},
    host::coverage::Remembered,
    late::Late,
    log::Entry,
    look_ups::LookUps,
    policy_file::PolicyFile,
    proposals::{Aim, Proposals, Wanted},
    reconcile::{Committed, Kernel, Occasion, Refused},
    refreshes::Refreshes,
    region::state::{self as region, Change, Regions},
    report::{self, By},
    retry::Retry,
    saves::Saves,
    snapshot::Snapshot,
    start::Started,
    store::{Record, Write},
    temporary::Timed,
    window::{Open, Window},
};

use fall_back::FallBack;
use window::Trial;

/// The change that is under way.
#[derive(Debug)]
enum UnderWay {
    Change {
        next: Box<Next>,
        cause: Cause,
    },
    Detach {
        by: Option<By>,
        reply: Reply<Vec<String>>,
    },
}

/// Everything to enforce.
#[derive(Debug)]
struct Next {
    file: Arc<PolicyFile>,
    regions: Regions,
    timed: Timed,
    fleet: Arc<Fleet>,
}

#[derive(Debug)]
enum Cause {
    Reload {
        wanted: Wanted,
        asked: Vec<String>,
        origin: Origin,
        by: Option<By>,
        /// The window in which it has to be confirmed.
        open: Option<Box<Open>>,
        reply: Option<Reply<report::Reloaded>>,
    },
    FallBack(FallBack),
    Region {
        name: String,
        change: Change,
        waiters: Vec<u64>,
    },
    Fleet,
    Time {
        changes: Vec<(String, Change)>,
        /// Lines for the log about rules of the policy that have ended.
        ended: Vec<Entry>,
    },
    Temporary {
        done: Box<report::Temporary>,
        by: Option<By>,
        reply: Reply<report::Temporary>,
    },
}

pub struct Agent {
    /// The policy file that a reload reads.
    path: PathBuf,
    file: Arc<PolicyFile>,
    enforced: report::Enforced,
    regions: Regions,
    /// Documents of the fleet, and this host in it.
    fleet: Arc<Fleet>,
    this_host: ThisHost,
    remembered: Remembered,
    now: Now,
    started: Timestamp,
    timed: Timed,
    /// When the next rule ends.
    next_end: Option<BootTime>,
    look_ups: LookUps,
    under_way: Option<UnderWay>,
    /// Events that wait for the change that is under way.
    deferred: VecDeque<Event>,
    proposals: Proposals,
    refreshes: Refreshes,
    /// The change that the kernel refused last, if it has taken none since.
    stuck: Option<Retry>,
    /// Documents that the kernel refused, to be tried again.
    refused_fleet: Option<Arc<Fleet>>,
    saves: Saves,
    history: History,
    trial: Trial,
    instead_of_file: Option<String>,
    unreadable: Option<String>,
    /// Why the temporary rules that were kept could not be read; until a reload.
    unkept: Option<String>,
    /// What could not be read of the history; until a reload.
    unread_history: Vec<String>,
    late: Vec<Late>,
    is_ready: bool,
    is_detached: bool,
    /// The agent was told to end, and begins nothing more.
    is_ending: bool,
    effects: Vec<Effect>,
}

impl Agent {
    /// Makes the agent after a start. Returns its first effects, too.
    pub fn start(started: Started, now: Now) -> (Self, Vec<Effect>) {
        let Started {
            path,
            file,
            regions,
            unsaved,
            fleet,
            kept_fleet,
            this_host,
            timed,
            committed,
            checked,
            confirmed,
            kept,
            window,
            kept_window,
            is_window_unknown,
            abandoned,
            instead_of_file,
            is_abandoned,
            unreadable,
            unkept,
            history,
            change_id,
            unread_history,
        } = started;
        let saved = regions.keys().filter(|name| !unsaved.contains(*name));
        let (noted, temporary) = ((history.clone(), change_id), kept.temporary.clone());
        let saved = saved.cloned();
        let saves = Saves::new(
            confirmed,
            kept,
            kept_window.clone(),
            kept_fleet,
            noted,
            saved,
            now.steady,
        );
        let mut agent = Self {
            path,
            file,
            enforced: committed.enforced,
            regions,
            fleet: fleet.into(),
            this_host,
            remembered: Remembered::default(),
            now,
            started: now.wall,
            timed,
            next_end: committed.compiled.next_end,
            look_ups: LookUps::default(),
            under_way: None,
            deferred: VecDeque::new(),
            proposals: Proposals::default(),
            refreshes: Refreshes::default(),
            stuck: None,
            refused_fleet: None,
            saves,
            history,
            trial: Trial::new(window, abandoned, is_window_unknown),
            instead_of_file,
            unreadable,
            unkept,
            unread_history,
            late: Vec::new(),
            is_ready: false,
            is_detached: false,
            is_ending: false,
            effects: Vec::new(),
        };
        agent.note_ended_meanwhile(&temporary);
        let (file, origin) = (agent.file.clone(), Origin::Start);
        let id = agent.note_start(
            &file,
            &committed.report,
            kept_window.and_then(|kept| kept.open),
        );
        // It may not be on disk although the list is.
        agent.history.keep_text(&file);
        agent.keep_history();
        if let Some(reason) = &agent.instead_of_file {
            let error = format!("{reason}; the confirmed policy is enforced instead");
            agent.log(Entry::error(error));
        }
        agent.log_all(committed.entries);
        agent.log_policy(checked.summary.as_ref(), id, origin, None);
        for name in &unsaved {
            agent.save_region(name, true);
        }
        agent.forget_unused();
        agent.keep_fleet();
        agent.follow();
        agent.save_window();
        if is_abandoned {
            agent.watch_abandoned();
        }
        agent.checked(checked);
        let unread = [agent.unreadable.clone(), agent.unkept.clone()];
        let unread = unread.into_iter().flatten();
        for error in committed.errors.into_iter().chain(unread) {
            agent.log(Entry::error(error));
        }
        for error in agent.unread_history.clone() {
            agent.log(Entry::warning(error));
        }
        agent.tick();
        let effects = mem::take(&mut agent.effects);
        (agent, effects)
    }

    /// Handles an event. Returns the effects to carry out.
    pub fn handle(&mut self, event: Event, now: Now) -> Vec<Effect> {
        self.now = now;
        self.take(event);
        while self.under_way.is_none()
            && let Some(event) = self.deferred.pop_front()
        {
            self.take(event);
        }
        self.go_on();
        self.report_to_fleet();
        if self.is_ending && self.under_way.is_none() && self.late.is_empty() {
            self.effects.push(Effect::Stop);
        }
        mem::take(&mut self.effects)
    }

    fn take(&mut self, event: Event) {
        let begins_nothing = matches!(
            event,
            Event::Committed(_) | Event::Detached(_) | Event::Saved { .. } | Event::Tick
        );
        // Replies are dropped, which their clients see.
        if (self.is_detached || self.is_ending) && !begins_nothing {
            return;
        }
        match event {
            Event::Committed(result) => self.committed(*result),
            Event::Detached(result) => self.detached(result),
            Event::Checked(checked) => {
                self.checked(checked);
            }
            Event::Saved { write, result } => self.saved(&write, result),
            Event::Counted(packets) => self.counted(packets),
            Event::PolicyHashed(hash) => self.policy_hashed(hash),
            Event::Tick => self.tick(),
            Event::Terminate => self.terminate(),
            // Each reads the file when its turn comes: one is enough.
            Event::Hangup if self.deferred.iter().any(|e| matches!(e, Event::Hangup)) => {}
            event if self.under_way.is_some() => self.deferred.push_back(event),
            Event::Request(Request::Reload { options, reply }) => {
                self.reload(Wanted::File, options, Some(reply));
            }
            Event::Request(Request::Rollback { to, options, reply }) => {
                self.reload(Wanted::Rollback { to }, options, Some(reply));
            }
            Event::Hangup => self.reload(Wanted::File, ReloadOptions::default(), None),
            Event::Request(Request::Plan {
                text,
                path,
                caller,
                reply,
            }) => {
                self.propose(Aim::Plan { caller, reply }, path, text);
            }
            Event::Request(Request::Refresh {
                region,
                accept,
                reply,
            }) => self.refresh(region, accept, reply),
            Event::Request(Request::Temporary {
                change,
                condition,
                caller,
                by,
                reply,
            }) => {
                self.change_temporary(change, condition, caller, by, reply);
            }
            Event::Request(Request::Confirm {
                id,
                fall_back,
                by,
                reply,
            }) => self.decide_on_tried(id, fall_back, by, reply),
            Event::Request(Request::Detach { by, reply }) => {
                self.under_way = Some(UnderWay::Detach { by, reply });
                self.effects.push(Effect::Detach);
            }
            Event::PolicyRead { proposal, file } => self.policy_read(proposal, file),
            Event::LookedUp { number, answer } => self.looked_up(number, answer),
            Event::Fleet(news) => self.fleet_news(news),
            Event::FileChanged(path) => self.file_changed(&path),
        }
    }

    fn log(&mut self, entry: Entry) {
        self.effects.push(Effect::Log(entry));
    }

    fn log_all(&mut self, entries: Vec<Entry>) {
        self.effects.extend(entries.into_iter().map(Effect::Log));
    }

    // Changes.

    fn change(&mut self, next: Next, cause: Cause, occasion: Occasion, existing: bool) {
        let accepted = match cause {
            Cause::Reload { .. } => next.file.accepted,
            Cause::FallBack(_)
            | Cause::Region { .. }
            | Cause::Fleet
            | Cause::Time { .. }
            | Cause::Temporary { .. } => self.now.into(),
        };
        let order = Order {
            accepted,
            file: next.file.clone(),
            prefixes: region::prefixes(&next.regions),
            timed: next.timed.clone(),
        };
        let next = next.into();
        self.under_way = Some(UnderWay::Change { next, cause });
        self.effects.push(Effect::Commit {
            order,
            occasion,
            existing,
        });
    }

    /// A change of the regions or by time, under the policy in force.
    fn change_regions(&mut self, regions: Regions, cause: Cause) {
        let timed = self.timed.at(self.now);
        self.change_timed(regions, timed, cause, None);
    }

    fn committed(&mut self, result: Result<(Committed, Checked), Refused>) {
        let Some(UnderWay::Change { next, cause }) = self.under_way.take() else {
            return;
        };
        match result {
            Ok((mut committed, checked)) => {
                if self.stuck.take().is_some() {
                    self.log(Entry::info("the kernel takes changes again"));
                }
                let next = *next;
                let replaced = mem::replace(&mut self.file, next.file);
                let before = mem::replace(&mut self.regions, next.regions);
                let fleet = mem::replace(&mut self.fleet, next.fleet);
                self.enforced.next_expiry = committed.enforced.next_expiry;
                let timing = committed.enforced.timing.clone();
                self.next_end = committed.compiled.next_end;
                let timed = mem::replace(&mut self.timed, next.timed);
                let file = self.file.clone();
                let in_force = self.history.in_force().map(|(past, _)| past.id);
                let id = match &cause {
                    Cause::Reload {
                        origin,
                        open: Some(open),
                        ..
                    } => self.note_tried(open, &file, &committed.report, *origin),
                    Cause::Reload { origin, by, .. } => {
                        self.note_policy(&file, &committed.report, *origin, by.clone())
                    }
                    Cause::FallBack(FallBack { by, .. }) => {
                        self.note_fall_back(&committed.report, by.clone())
                    }
                    Cause::Temporary { done, by, .. } => self.note_temporary(done, by.clone()),
                    Cause::Fleet => self.note_fleet(&replaced, &committed.report),
                    Cause::Region { .. } | Cause::Time { .. } => 0,
                };
                self.note_ended(&timed.temporary);
                self.keep_history();
                self.keep_temporary(false);
                match cause {
                    Cause::Reload {
                        asked,
                        origin,
                        by,
                        open,
                        reply,
                        ..
                    } => {
                        self.log_all(mem::take(&mut committed.entries));
                        self.log_policy(checked.summary.as_ref(), id, origin, by.as_ref());
                        let mut left = None;
                        match open {
                            Some(open) => self.opened(Window {
                                open: *open,
                                before: replaced,
                                regions: before.clone(),
                                is_refused: false,
                            }),
                            None => left = self.reloaded_for_good(origin, in_force, &replaced),
                        }
                        self.reloaded(id, &asked, &before, committed, checked, reply);
                        if let Some(text) = left {
                            self.watch_file(&text);
                        }
                    }
                    Cause::FallBack(asked) => {
                        self.fell_back(asked, &replaced, &before, committed, checked);
                    }
                    Cause::Region {
                        name,
                        change,
                        waiters,
                    } => {
                        self.region_changed(&name, &change, &timing);
                        let subject = format!("changes by region {name}");
                        let limited = |entries: Vec<Entry>| {
                            let entries = entries.into_iter();
                            entries.map(|e| e.limited(subject.clone())).collect()
                        };
                        self.log_all(limited(committed.entries));
                        let entries = limited(checked.entries);
                        self.checked(Checked { entries, ..checked });
                        self.region_done(&name, before.get(&name), change, &waiters);
                    }
                    Cause::Fleet => self.fleet_changed(id, &fleet, committed, checked),
                    Cause::Time { changes, ended } => {
                        self.keep_fleet();
                        self.log_all(ended);
                        self.log_all(committed.entries);
                        for (name, change) in changes {
                            self.region_changed(&name, &change, &timing);
                            self.region_done(&name, before.get(&name), change, &[]);
                        }
                        self.checked(checked);
                    }
                    Cause::Temporary {
                        mut done,
                        by,
                        reply,
                    } => {
                        done.id = id;
                        self.temporary_changed(done, by, committed, checked, reply);
                    }
                }
            }
            Err(refused) => self.refused(cause, next.fleet, refused),
        }
    }

    /// `fleet`: with which the change would have been made.
    fn refused(&mut self, cause: Cause, fleet: Arc<Fleet>, refused: Refused) {
        if refused.kernel == Kernel::Unknown {
            // The next start reads the maps.
            self.effects
                .push(Effect::Fail(format!("{:#}", refused.error)));
        }
        let not_taken_back = refused.kernel != Kernel::Unchanged;
        match cause {
            Cause::Reload { wanted, reply, .. } => {
                if not_taken_back {
                    self.retry_later(format!("{:#}", refused.error), true);
                }
                self.refuse_reload(wanted, reply, refused);
            }
            Cause::FallBack(FallBack { reason, reply, .. }) => {
                self.not_fallen_back(reason, refused, not_taken_back, reply);
            }
            Cause::Region { name, waiters, .. } => {
                let error = refused.describe_alone();
                let before = self.regions.get(&name).cloned();
                if let Some(state) = self.regions.get_mut(&name) {
                    state.fail(error.clone(), self.now.steady);
                }
                if not_taken_back {
                    self.retry_later(error, true);
                }
                self.region_done(&name, before.as_ref(), Change::default(), &waiters);
            }
            Cause::Fleet => self.fleet_not_changed(fleet, refused, not_taken_back),
            Cause::Time { ended, .. } => {
                let what = match ended.is_empty() {
                    false => "take out rules that have ended",
                    true => "take out what is allowed no longer",
                };
                let error = format!("{what}: {}", refused.describe_alone());
                self.retry_later(error, not_taken_back);
            }
            Cause::Temporary { reply, .. } => {
                let error = refused.alone();
                if not_taken_back {
                    self.retry_later(format!("{error:#}"), true);
                }
                reply.send(Err(error));
            }
        }
    }

    /// Tries a change that time makes again, after a pause that grows.
    fn retry_later(&mut self, error: String, not_taken_back: bool) {
        let before = self.stuck.take();
        if before.as_ref().is_none_or(|before| before.error != error) {
            self.log(Entry::error(error.clone()));
        }
        let now = self.now.steady;
        self.stuck = Some(Retry::after(before.as_ref(), error, not_taken_back, now));
    }

    fn reloaded(
        &mut self,
        id: u64,
        asked: &[String],
        before: &Regions,
        committed: Committed,
        checked: Checked,
        reply: Option<Reply<report::Reloaded>>,
    ) {
        self.enforced = committed.enforced;
        self.instead_of_file = None;
        self.unreadable = None;
        self.unkept = None;
        self.unread_history.clear();
        self.end_look_ups(before, asked);
        for name in asked {
            let same = before.get(name).zip(self.regions.get(name));
            let same = same.is_some_and(|(before, now)| before.holds_the_same(now));
            let error = self.saves.error(&Record::Region(name.clone()));
            let is_saved = same && error.is_none();
            self.save_region(name, !is_saved);
        }
        self.forget_unused();
        self.follow_fleet_anew();
        let verified = checked.verified.clone();
        self.checked(checked);
        for error in &committed.errors {
            self.log(Entry::error(error.clone()));
        }
        if let Some(reply) = reply {
            let reloaded = report::Reloaded {
                id,
                plan: *committed.report,
                enforced: self.enforced.clone(),
                verified,
                window: self.window(),
                errors: committed.errors,
            };
            let late = Late::reloaded(reloaded, reply, self.now.steady);
            // A restart right after a reload starts with what the reload enforced.
            self.answer_when_kept(late);
        }
        let next = self.proposals.next_reload();
        self.begin_reload(next);
    }

    /// Ends look-ups that were asked for before, or are about a region that is no longer what it was.
    fn end_look_ups(&mut self, before: &Regions, asked: &[String]) {
        let regions = &self.regions;
        let ended = self.look_ups.end(|name| {
            let source = |regions: &Regions| regions.get(name).map(|s| s.region.source.clone());
            asked.iter().any(|asked| asked == name) || source(regions) != source(before)
        });
        for (name, _, waiters) in ended {
            let state = self.regions.get(&name);
            let unchanged = Change::default();
            self.refreshes.done(&name, state, &unchanged, &waiters);
        }
    }

    // What the kernel and the disk report.

    fn checked(&mut self, checked: Checked) {
        for name in self.saves.unwritten_regions() {
            self.save_region(&name, false);
        }
        if self.saves.error(&Record::Regions).is_some() {
            self.forget_unused();
        }
        if self.saves.must_repeat_history(self.now.steady) {
            self.keep_history();
        }
        if self.saves.is_window_due(self.now.steady) {
            self.save_window();
        }
        if self.saves.error(&Record::Fleet).is_some() {
            self.keep_fleet();
        }
        self.remembered = checked.remembered;
        self.this_host
            .not_verified
            .clone_from(&checked.verified.errors);
        let write = self.saves.last_hits(checked.last_hits, self.now.steady);
        self.effects.extend(write.map(Effect::Save));
        self.log_all(checked.entries);
        self.effects.extend(checked.summary.map(Effect::Status));
        if !self.is_ready && checked.verified.errors.is_empty() {
            self.is_ready = true;
            self.effects.push(Effect::Ready);
        }
        self.confirm();
    }

    /// Has the policy in force written to disk, with what its entries of `interfaces` stand for, if that is not
    /// what was written last. What cannot be read is left for the operator to see until a reload. The confirmed policy stays
    /// on disk while another one is tried.
    fn confirm(&mut self) {
        if self.unreadable.is_some() || self.trial.window.is_some() {
            return;
        }
        let write = self.saves.confirm(&self.file.text, &self.remembered);
        self.effects.extend(write.map(Effect::Save));
    }

    /// Has a region's set written to disk, if it changed or its time there is old.
    fn save_region(&mut self, name: &str, changed: bool) {
        let Some(state) = self.regions.get(name) else {
            return;
        };
        let write = self.saves.region(name, state, changed, self.now.steady);
        self.effects.extend(write.map(Effect::Save));
    }

    fn forget_unused(&mut self) {
        // Falling back takes its regions from the disk, too.
        let before = self.trial.window.iter().flat_map(|w| w.regions.keys());
        let names = self.regions.keys().chain(before).cloned().collect();
        let write = self.saves.keep_only(names);
        self.effects.push(Effect::Save(write));
        self.watch_used();
    }

    /// Ends the watches on files of regions that no policy in force or under way has.
    fn watch_used(&mut self) {
        let files = self.regions.values().filter_map(|s| s.region.file());
        let files = files.chain(self.proposals.region_files()).cloned();
        self.effects.push(Effect::Watch(files.collect()));
    }

    fn saved(&mut self, write: &Write, result: Result<()>) {
        let entry = self.saves.written(write, result);
        self.effects.extend(entry.map(Effect::Log));
        // Not after a version that was overtaken: what is to outlast a restart is the latest one.
        self.window_saved(&write.record());
        let saves = &self.saves;
        let waited = self.late.extract_if(.., |late| !late.must_wait(saves));
        for late in waited.collect::<Vec<_>>() {
            self.answer(late);
        }
    }

    /// Sends a reply once the change is on disk, or cannot be.
    fn answer_when_kept(&mut self, late: Late) {
        match late.must_wait(&self.saves) {
            true => self.late.push(late),
            false => self.answer(late),
        }
    }

    /// Sends a reply that waited for the disk.
    fn answer(&mut self, late: Late) {
        let ends_agent = late.ends_agent();
        late.send(&self.saves);
        if ends_agent {
            self.effects.push(Effect::Stop);
        }
    }

    /// The agent as plain values, for readers.
    pub fn snapshot(&self) -> Snapshot {
        let stuck = self.stuck.as_ref().map(|stuck| stuck.error.clone());
        let errors = [&self.instead_of_file, &self.unreadable, &stuck];
        Snapshot {
            now: self.now,
            started: self.started,
            file: self.file.clone(),
            enforced: self.enforced.clone(),
            window: self.trial.window.as_ref().map(|w| w.open.brief()),
            regions: self.regions.clone(),
            fleet: self.fleet.clone(),
            this_host: self.this_host.clone(),
            timed: self.timed.clone(),
            errors: errors.into_iter().flatten().cloned().collect(),
            unsaved: self
                .saves
                .errors()
                .chain(&self.unkept)
                .chain(&self.unread_history)
                .cloned()
                .collect(),
            history: self.history.clone(),
        }
    }

    pub fn enforced(&self) -> &report::Enforced {
        &self.enforced
    }

    pub fn is_ready(&self) -> bool {
        self.is_ready
    }
}

#[cfg(test)]
mod tests;
