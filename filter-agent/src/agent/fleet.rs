//! The fleet's documents: taken from etcd, enforced, and kept for the next start.

use std::sync::Arc;

use super::{
    Agent, Cause, Fleet, Next,
    history::{numbered, with_change},
    window::regions_of,
};
use crate::{
    enforcer::Checked,
    event::Effect,
    fleet::{self, News, Settings, state::Standing},
    history::Origin,
    log::Entry,
    policy_file::PolicyFile,
    reconcile::{Committed, Occasion, Refused},
};

impl Agent {
    /// A policy with the rules that the fleet has for it.
    pub(super) fn with_fleet(&self, file: &Arc<PolicyFile>, fleet: &Fleet) -> Arc<PolicyFile> {
        fleet::with_rules(file, fleet, &self.own_name, self.now)
    }

    pub(super) fn fleet_news(&mut self, news: News) {
        match news {
            News::Lost(error) => {
                let before = self.fleet.clone();
                Arc::make_mut(&mut self.fleet).lost(error, self.now.steady);
                self.log_fleet(&before);
            }
            News::Answer { answer, healed } => {
                self.healed = healed;
                let next = self.fleet.take(&answer, &self.file.policy, self.now.steady);
                let over = next.without_rollouts_over(self.now.wall);
                self.enforce_fleet(over.unwrap_or(next).into());
            }
        }
    }

    fn enforce_fleet(&mut self, next: Arc<Fleet>) {
        let file = self.with_fleet(&self.file, &next);
        let rules = |file: &PolicyFile| {
            let databases = file.policy.databases.iter();
            databases
                .map(|d| d.fleet_rules().to_vec())
                .collect::<Vec<_>>()
        };
        if rules(&file) == rules(&self.file) {
            // Its document may have another revision.
            self.file = file;
            let before = std::mem::replace(&mut self.fleet, next);
            self.log_fleet(&before);
            return self.keep_fleet();
        }
        let regions = regions_of(&file.policy, &self.regions, self.now.steady);
        let mut timed = self.timed.at(self.now);
        timed.ends = timed.ends.with(&file.policy, self.now);
        let next = Next {
            file,
            regions,
            timed,
            fleet: next,
        };
        let occasion = Occasion::Change { caller: None };
        self.change(next, Cause::Fleet, occasion, false);
    }

    /// A change of the fleet's rules is in force.
    pub(super) fn fleet_changed(
        &mut self,
        id: u64,
        before: &Fleet,
        committed: Committed,
        checked: Checked,
    ) {
        self.log_fleet(before);
        let timing = &committed.enforced.timing;
        let entry = Entry::info(format!(
            "the fleet's rules changed; {timing}; {}",
            numbered(id, None)
        ));
        self.log(with_change(entry, id, Origin::Fleet, None));
        self.log_all(committed.entries);
        self.checked(checked);
        for error in committed.errors {
            self.log(Entry::error(error));
        }
        self.keep_fleet();
        self.forget_unused();
    }

    /// The kernel did not take it. It is asked again with etcd's next answer.
    pub(super) fn fleet_not_changed(&mut self, refused: Refused, not_taken_back: bool) {
        let error = format!("enforce the fleet's rules: {}", refused.describe_alone());
        self.retry_later(error, not_taken_back);
    }

    /// Logs how etcd and the documents stand where that is news.
    fn log_fleet(&mut self, before: &Fleet) {
        let after = self.fleet.clone();
        match (before.lost_since(), after.lost_since()) {
            (None, Some(lost)) => self.log(limited(Entry::warning(format!(
                "fleet: {}; what is in force stays so",
                lost.why
            )))),
            (Some(_), None) => self.log(limited(Entry::info("fleet: etcd answers again"))),
            _ => {}
        }
        match (before.held(), after.held()) {
            (was, Some(held)) if was.is_none_or(|was| was.why != held.why) => {
                let error = format!("fleet: {}: nothing that it says is put in force", held.why);
                self.log(limited(Entry::error(error)));
            }
            (Some(_), None) => self.log(limited(Entry::info("fleet: etcd is believed again"))),
            _ => {}
        }
        let databases = self.file.policy.databases.iter();
        let databases = databases.filter(|database| database.fleet.is_some());
        let names: Vec<String> = databases.map(|database| database.name.clone()).collect();
        for name in names {
            let standing = after.standing(&name);
            if standing == before.standing(&name) {
                continue;
            }
            let entry = match standing {
                Standing::Refused { why, mod_revision } => Entry::warning(format!(
                    "database {name}: the fleet's document of revision {mod_revision} is refused: {why}"
                )),
                Standing::Missing { .. } => Entry::warning(format!(
                    "database {name}: the fleet's document is gone; the last good one stays in force"
                )),
                Standing::Unreadable(since) => Entry::warning(format!(
                    "database {name}: the fleet's document cannot be read: {}",
                    since.why
                )),
                Standing::Active | Standing::Held(_) | Standing::Unknown => continue,
            };
            self.log(limited(entry.with("DATABASE", name)));
        }
    }

    /// Has the fleet's documents written to disk, if they are not there.
    pub(super) fn keep_fleet(&mut self) {
        let write = self.saves.fleet(self.fleet.kept(), self.now.steady);
        self.effects.extend(write.map(Effect::Save));
    }

    /// Follows what the policy in force says.
    pub(super) fn follow(&mut self) {
        let settings = Settings::of(&self.file.policy);
        self.effects.push(Effect::Follow(settings));
    }
}

/// Whoever may write to etcd can cause such lines.
fn limited(entry: Entry) -> Entry {
    entry.limited("the fleet".to_owned())
}
