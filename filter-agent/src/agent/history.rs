//! Notes each change in the history, and adds its fields to lines of the log.

use std::sync::Arc;

use jiff::Timestamp;

use super::Agent;
use crate::{
    event::Effect,
    history::{Origin, Past, PastFleet, PastTemporary, State, Summary, What},
    log::Entry,
    policy_file::PolicyFile,
    report::{self, Action, By},
    temporary::{Kind, Temporary},
    window::Open,
};

impl Agent {
    /// Gives the next change its id.
    pub(super) fn next_change(&mut self) -> u64 {
        self.history.next_id()
    }

    /// Notes a policy that is in force. Returns the id of the change; where it is no news, of the policy in force.
    pub(super) fn note_policy(
        &mut self,
        file: &Arc<PolicyFile>,
        plan: &report::Plan,
        origin: Origin,
        by: Option<By>,
    ) -> u64 {
        let difference = Summary::of(plan);
        // A start only restores what the kernel lost, and removes what has ended since.
        let is_news = origin != Origin::Start && !difference.is_empty();
        if let (Some(id), false) = (self.history.is_in_force(file), is_news) {
            return id;
        }
        let id = self.next_change();
        let past = Past {
            id,
            at: self.now.wall,
            origin,
            by,
            what: What::policy(file, State::Confirmed, difference),
        };
        self.history.enforced(past, file);
        id
    }

    /// Notes a policy that is tried, under the id of its window.
    pub(super) fn note_tried(
        &mut self,
        open: &Open,
        file: &Arc<PolicyFile>,
        plan: &report::Plan,
        origin: Origin,
    ) -> u64 {
        let past = Past {
            id: open.id,
            at: self.now.wall,
            origin,
            by: open.by.clone(),
            what: What::policy(file, State::Trying, Summary::of(plan)),
        };
        self.history.enforced(past, file);
        open.id
    }

    pub(super) fn note_temporary(&mut self, done: &report::Temporary, by: Option<By>) -> u64 {
        let what = PastTemporary {
            action: done.action,
            database: done.database.clone(),
            source: done.source,
            label: done.label.clone(),
            until: done.until,
        };
        self.note(self.now.wall, Origin::Socket, by, What::Temporary(what))
    }

    /// Notes that the policy is in force with other rules of the fleet than before.
    pub(super) fn note_fleet(&mut self, before: &PolicyFile, plan: &report::Plan) -> u64 {
        let before = &before.policy.databases;
        let changed = self.file.policy.databases.iter().filter(|database| {
            let before = before.iter().find(|before| before.name == database.name);
            before.is_none_or(|before| before.fleet_rules() != database.fleet_rules())
        });
        let documents = changed.map(|database| {
            let fleet = database.fleet.as_ref();
            let document = fleet.and_then(|fleet| fleet.document);
            (
                database.name.clone(),
                document.map(|document| document.revision),
            )
        });
        let what = What::Fleet(PastFleet {
            documents: documents.collect(),
            difference: Summary::of(plan),
        });
        self.note(self.now.wall, Origin::Fleet, None, what)
    }

    fn note(&mut self, at: Timestamp, origin: Origin, by: Option<By>, what: What) -> u64 {
        let id = self.next_change();
        self.history.changed(Past {
            id,
            at,
            origin,
            by,
            what,
        });
        id
    }

    /// Notes and logs which of the temporary rules have ended that were in force before the last change.
    pub(super) fn note_ended(&mut self, before: &[Temporary]) {
        let now = self.timed.now.boot;
        for rule in self.ended_for_good(before, |rule| rule.end <= now) {
            self.note_end(rule, self.now.wall);
        }
    }

    /// Notes which of the temporary rules that were kept have ended while no agent ran.
    pub(super) fn note_ended_meanwhile(&mut self, kept: &[Temporary]) {
        let now = self.now.wall;
        for rule in self.ended_for_good(kept, |rule| rule.until <= now) {
            let until = rule.until;
            self.note_end(rule, until);
        }
    }

    /// Those of some temporary rules that have ended and are not in force under another end.
    fn ended_for_good(
        &self,
        rules: &[Temporary],
        has_ended: impl Fn(&Temporary) -> bool,
    ) -> Vec<Temporary> {
        let is_there = |rule: &Temporary| {
            let mut others = self.timed.temporary.iter();
            others.any(|other| other.is_same(rule))
        };
        let ended = rules
            .iter()
            .filter(|rule| has_ended(rule) && !is_there(rule));
        ended.cloned().collect()
    }

    fn note_end(&mut self, rule: Temporary, at: Timestamp) {
        let (past, what) = end_of(rule);
        let (database, source) = (past.database.clone(), past.source.to_string());
        let entry = Entry::info(format!("database {database}: {what} {source} has ended"))
            .with("DATABASE", database)
            .with("RULE", source)
            .with("REASON", "ended");
        let id = self.note(at, Origin::Time, None, What::Temporary(past));
        self.log(with_change(entry, id, Origin::Time, None));
    }

    /// Has what is new in the history written to disk: before anything else of a change, so that its id is given to no other
    /// one however the agent ends.
    pub(super) fn keep_history(&mut self) {
        let writes = self.saves.history(&self.history, self.now.steady);
        self.effects.extend(writes.into_iter().map(Effect::Save));
    }

    /// Logs a policy that is in force. `summary`: what is enforced, where that is known.
    pub(super) fn log_policy(
        &mut self,
        summary: Option<&String>,
        id: u64,
        origin: Origin,
        by: Option<&By>,
    ) {
        let unknown = || format!("enforcing {}", self.file.path.display());
        let summary = summary.cloned().unwrap_or_else(unknown);
        let entry = Entry::info(format!("{summary}; {}", numbered(id, by)));
        self.log(with_change(entry, id, origin, by));
    }
}

/// The end of a temporary rule, and what it is.
fn end_of(rule: Temporary) -> (PastTemporary, &'static str) {
    let (action, what) = match rule.kind {
        Kind::Allow => (Action::Ended, "temporary rule"),
        Kind::Block => (Action::Unblocked, "block"),
    };
    let past = PastTemporary {
        action,
        database: rule.database,
        source: rule.source,
        label: rule.label,
        until: Some(rule.until),
    };
    (past, what)
}

/// `change 12 by uid 0 (logged in as 1000), filter-agent`.
pub(super) fn numbered(id: u64, by: Option<&By>) -> String {
    format!("change {id}{}", by_whom(by))
}

/// ` by uid 0 (logged in as 1000), filter-agent`, or nothing.
pub(super) fn by_whom(by: Option<&By>) -> String {
    by.map(|by| format!(" by {by}")).unwrap_or_default()
}

/// A line of the log about a change, with who asked for it.
pub(super) fn with_change(entry: Entry, id: u64, origin: Origin, by: Option<&By>) -> Entry {
    let entry = entry
        .with("CHANGE", id.to_string())
        .with("ORIGIN", origin.name());
    let Some(by) = by else { return entry };
    let entry = entry.with("BY_UID", by.uid.to_string());
    let entry = match by.login_uid {
        Some(uid) => entry.with("BY_LOGIN_UID", uid.to_string()),
        None => entry,
    };
    match &by.command {
        Some(command) => entry.with("BY_COMMAND", command.clone()),
        None => entry,
    }
}
