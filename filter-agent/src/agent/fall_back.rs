//! Falling back from a policy that nobody confirmed, and texts that are not to be enforced at a start.

use std::{mem, sync::Arc, time::Duration};

use anyhow::{Result, anyhow};

use super::{
    Agent, Cause, Next,
    history::{by_whom, with_change},
    window::regions_of,
};
use crate::{
    enforcer::Checked,
    event::{Effect, Reply},
    history::{Origin, State},
    late::Late,
    log::Entry,
    policy_file::PolicyFile,
    reconcile::{Committed, Occasion, Refused},
    refusal::Refusal,
    region::state::Regions,
    report::{self, By},
    window::{Reason, Text, describe_abandoned},
};

/// How often the policy file is read where its text was abandoned: until it is changed that is an error in `status`.
const HASH_INTERVAL: Duration = Duration::from_secs(5);

/// Why and for whom the confirmed policy is enforced again.
#[derive(Debug)]
pub(super) struct FallBack {
    pub(super) reason: Reason,
    pub(super) by: Option<By>,
    pub(super) reply: Option<Reply<report::Decided>>,
}

impl Agent {
    /// Falls back where the time of a policy is over, gives up a disk that does not take a window, and looks at the policy
    /// file. Returns whether a change is under way now.
    pub(super) fn tick_trial(&mut self) -> bool {
        let now = self.now.steady;
        if let Some(opening) = &self.trial.opening
            && opening.until <= now
            && !opening.is_saved
        {
            let number = opening.number;
            self.close_opening();
            let error = "keep the policy that is tried: the disk takes too long";
            self.refuse_proposal(number, Refusal::Unavailable(error.into()).into());
        }
        if self.trial.next_hash.is_some_and(|next| next <= now) {
            self.hash_file();
        }
        let Some(window) = &self.trial.window else {
            return false;
        };
        let is_waiting = window.is_refused && self.stuck.as_ref().is_some_and(|s| s.next > now);
        if window.open.end > self.now.boot || is_waiting {
            return false;
        }
        if let Some(confirming) = self.trial.confirming.take() {
            let error = "not confirmed: the disk takes too long, and the agent falls back";
            let error = Refusal::Unavailable(error.into());
            confirming.reply.send(Err(error.into()));
        }
        self.fall_back(Reason::Expired, None, None);
        true
    }

    pub(super) fn fall_back(
        &mut self,
        reason: Reason,
        by: Option<By>,
        reply: Option<Reply<report::Decided>>,
    ) {
        let Some(window) = &self.trial.window else {
            return;
        };
        let fleet: Arc<_> = self
            .fleet
            .under(&window.before.policy, self.now.steady)
            .into();
        let file = self.with_fleet(&window.before, &fleet);
        let known = window.known_regions(&self.regions, self.now.steady);
        let regions = regions_of(&file.policy, &known, self.now.steady);
        let timed = window.timed(&self.file.policy, &self.timed, self.now);
        let cause = Cause::FallBack(FallBack { reason, by, reply });
        let next = Next {
            file,
            regions,
            timed,
            fleet,
        };
        self.change(next, cause, Occasion::FallBack, false);
    }

    /// The confirmed policy is enforced again.
    pub(super) fn fell_back(
        &mut self,
        asked: FallBack,
        tried: &PolicyFile,
        before: &Regions,
        committed: Committed,
        checked: Checked,
    ) {
        let FallBack { reason, by, reply } = asked;
        let Some(window) = self.trial.window.take() else {
            return;
        };
        self.enforced = committed.enforced.clone();
        self.end_look_ups(before, &[]);
        let id = window.open.id;
        let text = Text {
            hash: tried.hash.clone(),
            reason,
            id: Some(id),
            at: self.now.wall,
        };
        let who = by_whom(by.as_ref());
        let entry = Entry::warning(format!(
            "{text}{who}; the confirmed policy is enforced again, {}",
            committed.enforced.timing
        ));
        let entry = with_change(entry, id, Origin::FallBack, by.as_ref());
        self.log(entry.with("REASON", "fell-back"));
        // The same text that was confirmed before is not abandoned.
        if tried.hash != self.file.hash {
            self.watch_file(&text);
            self.trial.abandoned.add(text);
        }
        self.save_window();
        // A confirmation that came too late may be on its way to disk.
        self.confirm();
        for name in window.open.regions.keys() {
            self.save_region(name, true);
        }
        self.forget_unused();
        self.follow_fleet_anew();
        self.log_all(committed.entries);
        self.checked(checked);
        for error in &committed.errors {
            self.log(Entry::error(error.clone()));
        }
        if let Some(reply) = reply {
            let decided = report::Decided {
                id,
                file: self.file.path.clone(),
                confirmed: false,
                difference: committed.report.difference,
                timing: Some(committed.enforced.timing),
                cut: committed.report.cut,
                cut_unknown: committed.report.cut_unknown,
                errors: committed.errors,
            };
            let late = Late::fell_back(decided, reply, self.now.steady);
            self.answer_when_kept(late);
        }
    }

    /// The kernel did not take the confirmed policy. That is tried again.
    pub(super) fn not_fallen_back(
        &mut self,
        reason: Reason,
        refused: Refused,
        not_taken_back: bool,
        reply: Option<Reply<report::Decided>>,
    ) {
        let error = refused.describe_alone();
        let Some(window) = &mut self.trial.window else {
            return;
        };
        // By hand, in time: whoever asked learns it, and the window stays open.
        if reason == Reason::Expired {
            window.is_refused = true;
        }
        let id = window.open.id;
        let error = format!("fall back from change {id}: {error}");
        if reason == Reason::Expired || not_taken_back {
            self.retry_later(error.clone(), not_taken_back);
        }
        if let Some(reply) = reply {
            reply.send(Err(anyhow!(error)));
        }
    }

    // Abandoned texts.

    /// Shows an abandoned text as an error for as long as the policy file has it.
    pub(super) fn watch_file(&mut self, text: &Text) {
        self.instead_of_file = Some(describe_abandoned(&self.path, text));
        self.trial.is_logged = false;
        self.hash_file();
    }

    fn hash_file(&mut self) {
        self.trial.next_hash = Some(self.now.steady + HASH_INTERVAL);
        self.effects.push(Effect::HashPolicy(self.path.clone()));
    }

    /// Has the policy file read again and again, since its text was abandoned, as the log has it.
    pub(super) fn watch_abandoned(&mut self) {
        self.trial.next_hash = Some(self.now.steady);
        self.trial.is_logged = true;
    }

    pub(super) fn policy_hashed(&mut self, hash: Result<String>) {
        // A file that cannot be read has no other text.
        let Ok(hash) = hash else { return };
        if self.trial.next_hash.is_none() {
            return;
        }
        match self.trial.abandoned.find(&hash) {
            // The very text that is in force is enforced at a start, too.
            Some(text) if hash != self.file.hash => {
                let error = describe_abandoned(&self.path, text);
                if !mem::replace(&mut self.trial.is_logged, true) {
                    self.log(Entry::error(error.clone()));
                }
                self.instead_of_file = Some(error);
            }
            _ => {
                self.instead_of_file = None;
                self.trial.next_hash = None;
            }
        }
    }

    /// A policy was enforced that needs no confirmation: its text may be enforced at a start again, and what was tried is
    /// over. Returns the text that was rolled back from. `in_force`: the id of the policy before.
    pub(super) fn reloaded_for_good(
        &mut self,
        origin: Origin,
        in_force: Option<u64>,
        replaced: &PolicyFile,
    ) -> Option<Text> {
        let at = self.now.wall;
        let text = |reason| Text {
            hash: replaced.hash.clone(),
            reason,
            id: in_force,
            at,
        };
        let abandoned = match self.trial.window.take() {
            Some(window) => {
                self.history.set_state(window.open.id, State::FellBack);
                Some(text(Reason::Expired))
            }
            None => (origin == Origin::Rollback).then(|| text(Reason::RolledBack)),
        };
        let abandoned = abandoned.filter(|text| text.hash != self.file.hash);
        if let Some(text) = abandoned.clone() {
            self.trial.abandoned.add(text);
        }
        self.trial.abandoned.remove(&self.file.hash);
        self.trial.next_hash = None;
        self.trial.is_unknown = false;
        self.save_window();
        abandoned.filter(|_| origin == Origin::Rollback)
    }
}
