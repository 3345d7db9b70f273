//! How the agent ends: by a signal, or by a detach.

use anyhow::Result;

use super::{
    Agent, Trial, UnderWay,
    history::{numbered, with_change},
};
use crate::{
    event::Effect, history::Origin, late::Late, log::Entry, proposals::Proposals,
    refreshes::Refreshes, text::list,
};

impl Agent {
    /// Begins nothing more. The change under way is waited for: its client learns what came of it, and the last line
    /// of the log is true.
    pub(super) fn terminate(&mut self) {
        self.is_ending = true;
        self.deferred.clear();
        self.proposals = Proposals::default();
        self.refreshes = Refreshes::default();
        self.end_trial();
        // The time left of each rule, for a start after a reboot.
        self.keep_temporary(true);
        for name in self.saves.unwritten_regions() {
            self.save_region(&name, true);
        }
    }

    pub(super) fn detached(&mut self, result: Result<Vec<String>>) {
        let Some(UnderWay::Detach { by, reply }) = self.under_way.take() else {
            return;
        };
        match result {
            Ok(names) => {
                self.is_detached = true;
                let id = self.history.detached(self.now.wall, by.clone());
                let from = match names.is_empty() {
                    true => String::new(),
                    false => format!(" from {}", list(names.iter())),
                };
                let numbered = numbered(id, by.as_ref());
                let entry = Entry::info(format!("detached{from}; {numbered}"));
                self.log(with_change(entry, id, Origin::Socket, by.as_ref()));
                self.keep_history();
                self.trial = Trial::default();
                let forget = self.saves.forget();
                self.effects.extend(forget.map(Effect::Save));
                self.late
                    .push(Late::detached(names, reply, self.now.steady));
            }
            Err(error) => {
                self.log(Entry::error(format!("detach: {error:#}")));
                reply.send(Err(error));
            }
        }
    }

    /// For the log's last line.
    pub fn describe_stop(&self) -> String {
        if self.is_detached {
            return "detached; nothing is filtered any more".into();
        }
        let names = list(self.file.policy.interfaces.iter());
        match self.under_way {
            None => format!("stopping; the filter stays in force on {names}"),
            Some(UnderWay::Change { .. }) => format!(
                "stopping in the middle of a change, which the next start completes or takes back; the filter \
                 stays in force on {names}"
            ),
            Some(UnderWay::Detach { .. }) => {
                "stopping in the middle of a detach: parts of the filter may be gone; run `filter-agent detach` \
                 again"
                    .into()
            }
        }
    }
}
