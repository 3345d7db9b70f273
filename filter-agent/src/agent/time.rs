//! What is due as time passes.

use std::time::Duration;

use jiff::Timestamp;

use super::{Agent, Cause, Next, window::regions_of};
use crate::{clock::Now, reconcile::Occasion, region::state::State};

/// Longest time between two ticks: the host's clock may be set meanwhile.
const LONGEST_WAIT: Duration = Duration::from_secs(1);

impl Agent {
    /// Starts look-ups that are due, takes out prefixes and rules that ended, and sends replies that waited enough.
    pub(super) fn tick(&mut self) {
        let now = self.now.steady;
        for late in self
            .late
            .extract_if(.., |late| late.until <= now)
            .collect::<Vec<_>>()
        {
            self.answer(late);
        }
        if self.under_way.is_some() || self.is_detached || self.is_ending {
            return;
        }
        if self.tick_trial() {
            return;
        }
        let due = self.regions.iter().filter(|(name, state)| {
            state.next.is_some_and(|next| next <= now) && !self.look_ups.is_under_way(name)
        });
        for name in due.map(|(name, _)| name.clone()).collect::<Vec<_>>() {
            self.look_up(&name, false, None);
        }
        self.keep_temporary(false);
        if self.stuck.as_ref().is_some_and(|stuck| stuck.next > now) {
            return;
        }
        if self.enforce_refused_fleet() {
            return;
        }
        let is_due = |state: &State| state.next_tick().is_some_and(|next| next <= now);
        let due = self.regions.values().any(is_due);
        let has_ended = self.next_end.is_some_and(|next| next <= self.now.boot);
        let is_nearer = self.timed.ends.clone().bring_nearer(self.now);
        let must_repair = self
            .stuck
            .as_ref()
            .is_some_and(|stuck| stuck.not_taken_back);
        let over = self.fleet.without_rollouts_over(self.now.wall);
        if due || has_ended || is_nearer || must_repair || over.is_some() {
            let (mut timed, ended) = self.timed.passed(self.now);
            let mut regions = self.regions.clone();
            let mut changes = Vec::new();
            for (name, state) in &mut regions {
                if is_due(state) {
                    changes.push((name.clone(), state.tick(now)));
                }
            }
            let (mut file, mut fleet) = (self.file.clone(), self.fleet.clone());
            if let Some(over) = over {
                fleet = over.into();
                file = self.with_fleet(&file, &fleet);
                regions = regions_of(&file.policy, &regions, now);
                timed.ends = timed.ends.with(&file.policy, self.now);
            }
            let next = Next {
                file,
                regions,
                timed,
                fleet,
            };
            let cause = Cause::Time { changes, ended };
            self.change(next, cause, Occasion::Change { caller: None }, false);
        }
    }

    /// How long until the next tick.
    pub fn until_tick(&self, now: Now) -> Duration {
        let late = self.late.iter().map(|late| late.until);
        let retry = self.stuck.as_ref().map(|stuck| stuck.next);
        let regions = self.regions.iter().flat_map(|(name, state)| {
            let next = state.next.filter(|_| !self.look_ups.is_under_way(name));
            let ends = state.next_tick();
            [
                next,
                ends.map(|end| retry.map_or(end, |retry| end.max(retry))),
            ]
        });
        let (trial_end, trial) = self.trial.next();
        let next = regions.flatten().chain(late).chain(trial).min();
        let until = |instant: Timestamp, now: Timestamp| {
            Duration::try_from(instant.duration_since(now)).unwrap_or_default()
        };
        let mut wait = next.map_or(LONGEST_WAIT, |next| until(next, now.steady));
        // Nothing that is due begins now.
        if self.under_way.is_some() || self.is_detached || self.is_ending {
            wait = LONGEST_WAIT;
        } else {
            let end = self.next_end.filter(|_| self.stuck.is_none());
            let end = end.into_iter().chain(trial_end).min();
            wait = end.map_or(wait, |end| wait.min(end.since(now.boot)));
        }
        wait.min(LONGEST_WAIT)
    }
}
