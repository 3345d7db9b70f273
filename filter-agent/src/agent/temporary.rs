//! Temporary rules and blocks: added, revoked, and kept on disk.

use std::net::IpAddr;

use super::{
    Agent, Cause,
    history::{numbered, with_change},
};
use crate::{
    enforcer::Checked,
    event::{Effect, Reply},
    history::Origin,
    late::Late,
    log::Entry,
    reconcile::{Committed, Occasion},
    region::state::{self as region, Regions},
    report::{self, By},
    temporary::{Change, Kept, Timed},
};

impl Agent {
    pub(super) fn change_temporary(
        &mut self,
        change: Change,
        caller: Option<IpAddr>,
        by: Option<By>,
        reply: Reply<report::Temporary>,
    ) {
        let prefixes = region::prefixes(&self.regions);
        let timed = self.timed.at(self.now);
        match timed.changed(&self.file, &prefixes, change, by.clone()) {
            Ok((timed, done)) => {
                let done = done.into();
                let cause = Cause::Temporary { done, by, reply };
                self.change_timed(self.regions.clone(), timed, cause, caller);
            }
            Err(error) => reply.send(Err(error)),
        }
    }

    /// A change of the regions or of the ends, under the policy in force.
    pub(super) fn change_timed(
        &mut self,
        regions: Regions,
        timed: Timed,
        cause: Cause,
        caller: Option<IpAddr>,
    ) {
        let file = self.file.clone();
        let occasion = Occasion::Change { caller };
        self.change(file, regions, timed, cause, occasion, false);
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
        self.log(with_change(entry, done.id, Origin::Socket, by.as_ref()));
        self.log_all(committed.entries);
        self.checked(checked);
        done.timing = Some(timing);
        done.difference = committed.report.difference;
        done.cut = committed.report.cut;
        done.cut_unknown = committed.report.cut_unknown;
        done.lock_out = committed.report.lock_out;
        done.errors = committed.errors;
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
