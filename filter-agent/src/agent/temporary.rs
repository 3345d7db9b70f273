//! Temporary rules and blocks: added, revoked, and kept on disk.

use std::net::IpAddr;

use anyhow::Result;

use super::{
    Agent, Cause, Next,
    history::{numbered, with_change},
};
use crate::{
    enforcer::Checked,
    event::{Effect, Reply},
    firewall::{self, Condition},
    history,
    late::Late,
    log::Entry,
    reconcile::{Committed, Occasion},
    region::state::{self as region, Regions},
    report::{self, Action, By, FirewallRule, Origin},
    temporary::{Change, Kept, Timed},
};

impl Agent {
    pub(super) fn change_temporary(
        &mut self,
        change: Change,
        condition: Option<Condition>,
        caller: Option<IpAddr>,
        by: Option<By>,
        reply: Reply<report::Temporary>,
    ) {
        let prefixes = region::prefixes(&self.regions);
        let timed = self.timed.at(self.now);
        let changed = timed.changed(&self.file, &prefixes, change, by.clone());
        // What is wrong with the request goes first (RFC 9110 section 13.2.1).
        let changed = changed.and_then(|(timed, done)| {
            self.check_condition(condition, &done.database)?;
            Ok((timed, done))
        });
        match changed {
            Ok((_, mut done)) if !done.changed => {
                self.describe_rules(&mut done);
                reply.send(Ok(done));
            }
            Ok((timed, done)) => {
                let done = done.into();
                let cause = Cause::Temporary { done, by, reply };
                self.change_timed(self.regions.clone(), timed, cause, caller);
            }
            Err(error) => reply.send(Err(error)),
        }
    }

    /// # Errors
    /// The rules of the database are not those that the change was asked for.
    fn check_condition(&self, condition: Option<Condition>, database: &str) -> Result<()> {
        let Some(condition) = condition else {
            return Ok(());
        };
        let rules = firewall::rules(&self.file.policy, &self.timed, self.now, database)?;
        condition.check(&rules)
    }

    /// Adds what is in force after a change to its report.
    fn describe_rules(&self, done: &mut report::Temporary) {
        let policy = &self.file.policy;
        // The database is there: it was changed.
        let rules = firewall::rules(policy, &self.timed, self.now, &done.database);
        let rules = rules.unwrap_or_default();
        done.tag = firewall::tag(&rules);
        let origin = match done.action {
            Action::Allowed => Origin::Temporary,
            Action::Blocked => Origin::Block,
            Action::Revoked | Action::Ended | Action::Unblocked => return,
        };
        let is_it = |rule: &FirewallRule| rule.origin == origin && rule.cidr == Some(done.source);
        done.rule = rules.into_iter().find(is_it);
    }

    /// A change of the regions or of the ends, under the policy in force.
    pub(super) fn change_timed(
        &mut self,
        regions: Regions,
        timed: Timed,
        cause: Cause,
        caller: Option<IpAddr>,
    ) {
        let next = Next {
            file: self.file.clone(),
            regions,
            timed,
            fleet: self.fleet.clone(),
        };
        self.change(next, cause, Occasion::Change { caller }, false);
    }

    pub(super) fn temporary_changed(
        &mut self,
        mut done: Box<report::Temporary>,
        by: Option<By>,
        committed: Committed,
        checked: Checked,
        reply: Reply<report::Temporary>,
    ) {
        let timing = committed.enforced.timing;
        let numbered = numbered(done.id, by.as_ref());
        let entry = Entry::info(format!("{done}; {timing}; {numbered}"))
            .with("DATABASE", done.database.clone())
            .with("PREFIX", done.source.to_string())
            .with("REASON", done.action.name());
        self.log(with_change(
            entry,
            done.id,
            history::Origin::Socket,
            by.as_ref(),
        ));
        self.log_all(committed.entries);
        self.checked(checked);
        done.timing = Some(timing);
        done.difference = committed.report.difference;
        done.cut = committed.report.cut;
        done.cut_unknown = committed.report.cut_unknown;
        done.lock_out = committed.report.lock_out;
        done.errors = committed.errors;
        self.describe_rules(&mut done);
        // The reply waits for the disk: the change must be in force after a reboot.
        let late = Late::temporary(*done, reply, self.now.steady);
        self.answer_when_kept(late);
    }

    /// Has the ends of rules and the temporary rules written to disk, if they changed or the time on disk is old.
    pub(super) fn keep_temporary(&mut self, at_once: bool) {
        let kept = Kept::of(&self.timed, self.now, self.saves.latest_clock());
        let write = self.saves.temporary(kept, self.now.steady, at_once);
        self.effects.extend(write.map(Effect::Save));
    }
}
