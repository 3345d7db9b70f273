//! The regions in force: look-ups, their results, and requests that wait for them.

use std::{path::Path, sync::Arc};

use anyhow::Result;

use crate::{
    agent::{Agent, Cause},
    event::{Effect, Reply},
    look_ups::{LookUp, Purpose},
    refreshes::to_refresh,
    region::{
        answer::Answer,
        state::{Change, State},
    },
    report::{self, Timing},
    snapshot::{describe, describe_result},
};

impl Agent {
    pub(super) fn look_up(&mut self, name: &str, accept: bool, waiter: Option<u64>) {
        let Some(state) = self.regions.get_mut(name) else {
            return;
        };
        // The answer says when to ask again.
        state.next = None;
        let look_up = LookUp {
            number: self.look_ups.begin(name, accept, waiter),
            region: state.region.clone(),
            // A result can only be accepted as a whole: without the version the source returns all of it.
            version: state.version().filter(|_| !accept).cloned(),
        };
        self.effects.push(Effect::LookUp(look_up));
    }

    pub(super) fn looked_up(&mut self, number: u64, answer: Result<Answer>) {
        match self.look_ups.finish(number) {
            None => {}
            Some(Purpose::Proposal { number, name }) => {
                if let Some(proposal) = self.proposals.get_mut(number) {
                    proposal.answers.insert(name, answer);
                    self.decide(number);
                }
            }
            Some(Purpose::Region {
                name,
                accept,
                waiters,
            }) => {
                let Some(before) = self.regions.get(&name).cloned() else {
                    return;
                };
                let mut state = before.clone();
                let change = state.take(answer, accept, self.now.steady);
                // A file may have changed again since it was read.
                state.next = [state.next, before.next].into_iter().flatten().min();
                if change.is_empty() {
                    self.regions.insert(name.clone(), state);
                    self.region_done(&name, Some(&before), change, &waiters);
                } else {
                    let mut regions = self.regions.clone();
                    regions.insert(name.clone(), state);
                    let cause = Cause::Region {
                        name,
                        change,
                        waiters,
                    };
                    self.change_regions(regions, cause);
                }
            }
        }
    }

    pub(super) fn file_changed(&mut self, path: &Path) {
        for state in self.regions.values_mut() {
            if state.region.file().is_some_and(|file| file == path) {
                state.next = Some(self.now.steady);
            }
        }
        // Answers for a proposed policy are out of date as well.
        for (number, name, region) in self.proposals.file_changed(path) {
            self.effects.push(Effect::LookUp(LookUp {
                number: self.look_ups.begin_for_proposal(number, &name),
                region,
                version: None,
            }));
        }
        self.tick();
    }

    /// Logs a change that is in force, and notes when it came to be.
    pub(super) fn region_changed(&mut self, name: &str, change: &Change, timing: &Timing) {
        self.log(describe(name, change, timing));
        let state = self.regions.get_mut(name);
        if let Some(change) = state.and_then(|state| state.change.as_mut()) {
            Arc::make_mut(change).timing = Some(timing.clone().into());
        }
    }

    /// Logs the result of a look-up, saves the set, and replies to requests that wait for it.
    pub(super) fn region_done(
        &mut self,
        name: &str,
        before: Option<&State>,
        change: Change,
        waiters: &[u64],
    ) {
        if let Some(state) = self.regions.get(name) {
            let entry = describe_result(name, before, state, self.now);
            self.effects.extend(entry.map(Effect::Log));
        }
        let changed = !change.is_empty();
        if waiters.is_empty() && !self.is_ending {
            let state = self.regions.get(name);
            let write = state.and_then(|s| self.saves.looked_up(name, s, changed, self.now.steady));
            self.effects.extend(write.map(Effect::Save));
        } else {
            // The operator asked for it, or nothing comes after it.
            self.save_region(name, changed);
        }
        self.refreshes
            .done(name, self.regions.get(name), &change, waiters);
    }

    pub(super) fn refresh(
        &mut self,
        region: Option<String>,
        accept: bool,
        reply: Reply<Vec<report::Refreshed>>,
    ) {
        let names = match to_refresh(&self.regions, region) {
            Ok(names) => names,
            Err(error) => return reply.send(Err(error)),
        };
        if names.is_empty() {
            return reply.send(Ok(Vec::new()));
        }
        let number = self.look_ups.number();
        self.refreshes.begin(number, &names, reply);
        for name in names {
            self.look_up(&name, accept, Some(number));
        }
    }
}
