//! Policies that are tried until somebody confirms them.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use anyhow::{Error, Result, anyhow};
use jiff::Timestamp;

use super::{
    Agent,
    history::{by_whom, with_change},
};
use crate::{
    clock::BootTime,
    event::{Effect, Reply},
    history::{Origin, State},
    log::Entry,
    policy::Policy,
    policy_file::PolicyFile,
    proposals::Aim,
    refusal::Refusal,
    region::state::{self as region, Regions},
    report::{self, By},
    store::{Confirmed, Record},
    temporary::Kept,
    window::{self, Abandoned, Open, Reason, Window},
};

/// Time allowed to the disk to take a window. A reload that it does not take by then is refused.
const SAVE_TIMEOUT: Duration = Duration::from_secs(5);

/// A reload that waits until its window is on disk.
#[derive(Debug)]
pub(super) struct Opening {
    /// Of its proposal.
    pub(super) number: u64,
    /// `None`: what is on its way to disk of the confirmed policy comes first.
    pub(super) open: Option<Open>,
    pub(super) is_saved: bool,
    /// Until when the disk may take it.
    pub(super) until: Timestamp,
}

/// A policy that is confirmed as soon as that is on disk.
#[derive(Debug)]
pub(super) struct Confirming {
    pub(super) by: Option<By>,
    pub(super) reply: Reply<report::Decided>,
    /// The confirmed policy that was on disk before.
    pub(super) before: Option<Confirmed>,
}

/// What is tried, and what was abandoned.
#[derive(Debug, Default)]
pub(super) struct Trial {
    pub(super) window: Option<Window>,
    pub(super) abandoned: Abandoned,
    /// What is on disk could not be read, and stays there until a reload: it may be that the file is not to be enforced.
    pub(super) is_unknown: bool,
    pub(super) opening: Option<Opening>,
    pub(super) confirming: Option<Confirming>,
    /// When the policy file is read again, to see whether its text was abandoned. `None`: it was not.
    pub(super) next_hash: Option<Timestamp>,
    /// Whether the log has it that it was.
    pub(super) is_logged: bool,
}

impl Trial {
    pub(super) fn new(window: Option<Window>, abandoned: Abandoned, is_unknown: bool) -> Self {
        Self {
            window,
            abandoned,
            is_unknown,
            ..Self::default()
        }
    }

    /// When something is due: the end of a window, the time limit of the disk, a look at the policy file.
    pub(super) fn next(&self) -> (Option<BootTime>, Option<Timestamp>) {
        let window = self.window.as_ref().filter(|window| !window.is_refused);
        let opening = self.opening.as_ref().map(|opening| opening.until);
        let next = opening.into_iter().chain(self.next_hash).min();
        (window.map(|window| window.open.end), next)
    }
}

impl Agent {
    /// Has the window, if one is open, and the abandoned texts written to disk.
    pub(super) fn save_window(&mut self) {
        if self.trial.is_unknown {
            return;
        }
        let window = self.trial.window.as_ref().map(|window| &window.open);
        let opening = self.trial.opening.as_ref();
        let opening = opening.and_then(|opening| opening.open.as_ref());
        let open = window.or(opening).map(|open| {
            let mut open = open.clone();
            // What is left of the rules counts from now.
            open.before.boot = self.now.boot;
            open.before.clock = self.saves.latest_clock().max(self.now.wall);
            open
        });
        let kept = window::Kept {
            open,
            abandoned: self.trial.abandoned.clone(),
        };
        let write = self.saves.window(kept, self.now.steady);
        self.effects.extend(write.map(Effect::Save));
    }

    /// Why no policy can be reloaded or rolled back to now; `None`: nothing is tried.
    pub(super) fn refuse_while_trying(&self) -> Option<Refusal> {
        let window = self.trial.window.as_ref()?;
        // Where the kernel refuses to fall back, another policy is a way out.
        let is_stuck = window.is_refused && window.open.end <= self.now.boot;
        (!is_stuck).then(|| window::refusal(&window.open, self.now))
    }

    /// Opens the window of a proposal that is ready, and has it written to disk. Returns whether it is there: only then is
    /// the policy enforced.
    pub(super) fn is_opened(&mut self, number: u64, lasting: Duration) -> bool {
        if let Some(opening) = &self.trial.opening
            && opening.number == number
            && opening.open.is_some()
        {
            return opening.is_saved;
        }
        let until = self.now.steady + SAVE_TIMEOUT;
        let opening = self.trial.opening.get_or_insert(Opening {
            number,
            open: None,
            is_saved: false,
            until,
        });
        opening.number = number;
        // Falling back, and a start after the end, enforce what is on disk.
        if self.saves.is_under_way(&Record::Confirmed) {
            return false;
        }
        let kept = self.saves.confirmed().filter(|_| self.unreadable.is_none());
        if kept.is_none_or(|kept| kept.policy != self.file.text) {
            let error = anyhow!(
                "the policy in force, to fall back to, is not kept on disk: see `filter-agent status`"
            );
            let error = Refusal::or(error, Refusal::Unavailable);
            self.refuse_proposal(number, error);
            return false;
        }
        let open = self.open(number, lasting);
        self.trial.is_unknown = false;
        if let Some(opening) = &mut self.trial.opening {
            opening.open = open;
        }
        self.save_window();
        false
    }

    fn open(&mut self, number: u64, lasting: Duration) -> Option<Open> {
        let id = self.next_change();
        // On disk before the window: the number is given to no other change.
        self.keep_history();
        let proposal = self.proposals.get(number)?;
        let (file, Aim::Reload(reload)) = (proposal.file.clone()?, &proposal.aim) else {
            return None;
        };
        let (now, by) = (self.now, reload.options.by.clone());
        let after = regions_of(&file.policy, &self.regions, now.steady);
        Some(Open {
            id,
            by,
            opened: now.wall,
            end: now.boot.after(lasting),
            path: file.path.clone(),
            policy: file.text.clone(),
            before: Kept::of(&self.timed, now, self.saves.latest_clock()),
            regions: window::displaced(&self.regions, &after),
        })
    }

    pub(super) fn refuse_proposal(&mut self, number: u64, error: Error) {
        if let Some(proposal) = self.proposals.remove(number) {
            self.refuse_aim(proposal.aim, error);
        }
    }

    /// Takes back the opening of a window.
    pub(super) fn close_opening(&mut self) -> Option<Opening> {
        let opening = self.trial.opening.take()?;
        self.save_window();
        Some(opening)
    }

    /// The agent ends: what is not in force yet is not tried by the next one.
    pub(super) fn end_trial(&mut self) {
        self.close_opening();
        if let Some(confirming) = self.trial.confirming.take() {
            let error = "the agent is ending, and did not confirm it";
            let error = Refusal::Unavailable(error.into());
            confirming.reply.send(Err(error.into()));
        }
    }

    /// The window of the reload that is made now, with what falling back to the policy in force takes.
    pub(super) fn take_opening(&mut self) -> Option<Open> {
        let opening = self.trial.opening.take()?;
        Some(Open {
            before: Kept::of(&self.timed, self.now, self.saves.latest_clock()),
            ..opening.open?
        })
    }

    /// A reload was refused: its window is closed.
    pub(super) fn forget_opening(&mut self) {
        if self.trial.window.is_none() {
            self.trial.opening = None;
            self.save_window();
        }
    }

    /// The window that is open, for readers.
    pub(super) fn window(&self) -> Option<report::Window> {
        let window = self.trial.window.as_ref()?;
        Some(window.open.report(self.now))
    }

    /// The policy is in force, and has to be confirmed.
    pub(super) fn opened(&mut self, window: Window) {
        let open = &window.open;
        let line = format!(
            "{}; without {} the confirmed policy is enforced again",
            open.report(self.now),
            open.command()
        );
        let entry = Entry::warning(line).with("CHANGE", open.id.to_string());
        self.trial.window = Some(window);
        self.log(entry.with("REASON", "tried"));
        // Temporary rules may have changed since it was written.
        self.save_window();
    }

    /// Goes on with a reload whose window is on disk.
    pub(super) fn go_on(&mut self) {
        if let Some(opening) = &self.trial.opening
            && (opening.is_saved || opening.open.is_none())
            && self.under_way.is_none()
            && !self.is_ending
        {
            self.decide(opening.number);
        }
    }

    /// Notes what the disk took of a window or the confirmed policy.
    pub(super) fn window_saved(&mut self, record: &Record) {
        if self.saves.is_under_way(record) {
            return;
        }
        let error = self.saves.error(record).cloned();
        match record {
            Record::Window => {
                let Some(opening) = &mut self.trial.opening else {
                    return;
                };
                if opening.open.is_none() {
                    return;
                }
                match error {
                    None => opening.is_saved = true,
                    Some(error) => {
                        let number = opening.number;
                        self.close_opening();
                        let error = Refusal::Unavailable(error).into();
                        self.refuse_proposal(number, error);
                    }
                }
            }
            Record::Confirmed => {
                if let Some(confirming) = self.trial.confirming.take() {
                    match error {
                        None => self.confirmed(confirming),
                        Some(error) => self.not_confirmed(confirming, &error),
                    }
                }
            }
            _ => {}
        }
    }

    // The decision.

    pub(super) fn decide_on_tried(
        &mut self,
        id: Option<u64>,
        fall_back: bool,
        by: Option<By>,
        reply: Reply<report::Decided>,
    ) {
        match self.find_tried(id) {
            Err(error) => reply.send(Err(error.into())),
            Ok(()) if fall_back => self.fall_back(Reason::TakenBack, by, Some(reply)),
            Ok(()) => {
                let before = self.saves.confirmed().cloned();
                let confirming = Confirming { by, reply, before };
                let write = self.saves.confirm(&self.file.text, &self.remembered);
                match write {
                    Some(write) => {
                        self.effects.push(Effect::Save(write));
                        self.trial.confirming = Some(confirming);
                    }
                    None => self.confirmed(confirming),
                }
            }
        }
    }

    /// # Errors
    /// Why there is nothing to decide on.
    fn find_tried(&self, id: Option<u64>) -> Result<(), Refusal> {
        let Some(window) = &self.trial.window else {
            return Err(Refusal::Conflict(self.nothing_tried(id)));
        };
        let open = &window.open;
        if let Some(id) = id.filter(|&id| id != open.id) {
            let what = match self.trial.abandoned.of_change(Some(id)) {
                Some(text) => text.to_string(),
                None => format!("change {id} is not tried"),
            };
            let open = open.report(self.now);
            return Err(Refusal::Conflict(format!("{what}; {open}")));
        }
        if self.trial.confirming.is_some() {
            let why = format!("change {} is being confirmed already", open.id);
            return Err(Refusal::Conflict(why));
        }
        if open.end <= self.now.boot {
            return Err(Refusal::Conflict(format!(
                "the time of change {} is over: the confirmed policy is enforced again as soon as the kernel takes it",
                open.id
            )));
        }
        Ok(())
    }

    fn nothing_tried(&self, id: Option<u64>) -> String {
        match (id, self.trial.abandoned.of_change(id)) {
            (_, Some(text)) => format!("nothing is tried: {text}"),
            (Some(id), None) => format!("nothing is tried: change {id} needs no `confirm`"),
            (None, None) => {
                "nothing is tried: `filter-agent reload --confirm 2m` tries the policy file".into()
            }
        }
    }

    fn confirmed(&mut self, Confirming { by, reply, .. }: Confirming) {
        let Some(window) = self.trial.window.take() else {
            return;
        };
        self.trial.abandoned.remove(&self.file.hash);
        self.save_window();
        for name in self.regions.keys().cloned().collect::<Vec<_>>() {
            let is_displaced = window.open.regions.contains_key(&name);
            self.save_region(&name, is_displaced);
        }
        self.forget_unused();
        let id = window.open.id;
        self.history.set_state(id, State::Confirmed);
        self.keep_history();
        let who = by_whom(by.as_ref());
        let entry = Entry::info(format!("change {id} is confirmed{who}"));
        let entry = with_change(entry, id, Origin::Socket, by.as_ref());
        self.log(entry.with("REASON", "confirmed"));
        let decided = report::Decided {
            id,
            file: self.file.path.clone(),
            confirmed: true,
            difference: Default::default(),
            timing: None,
            cut: Vec::new(),
            cut_unknown: Vec::new(),
            errors: Vec::new(),
        };
        self.effects.push(Effect::KeepTried {
            decided: decided.into(),
            reply,
        });
    }

    /// The disk did not take it: the window stays open.
    fn not_confirmed(&mut self, confirming: Confirming, error: &str) {
        let Confirming { reply, before, .. } = confirming;
        self.saves.take_back_confirmed(before);
        let left = self.trial.window.as_ref();
        let left = left.map(|window| window.open.report(self.now).to_string());
        let left = left.unwrap_or_default();
        let error = format!("not confirmed: {error}; {left}");
        reply.send(Err(Refusal::Unavailable(error).into()));
    }

    // The history.

    /// Notes the policy of a start. `open`: the window that the last agent left.
    pub(super) fn note_start(
        &mut self,
        file: &Arc<PolicyFile>,
        plan: &report::Plan,
        open: Option<Open>,
    ) -> u64 {
        let goes_on = self.trial.window.is_some();
        if let Some(open) = open {
            let is_noted = self.history.state(open.id).is_some();
            if goes_on {
                return match is_noted {
                    true => open.id,
                    false => self.note_tried(&open, file, plan, Origin::Start),
                };
            }
            let is_abandoned = self.trial.abandoned.of_change(Some(open.id)).is_some();
            let state = match is_abandoned {
                true => State::FellBack,
                false => State::Confirmed,
            };
            self.history.set_state(open.id, state);
        }
        self.note_policy(file, plan, Origin::Start, None)
    }

    /// Notes that the confirmed policy is in force again.
    pub(super) fn note_fall_back(&mut self, plan: &report::Plan, by: Option<By>) -> u64 {
        let Some(window) = &self.trial.window else {
            return 0;
        };
        let (id, file) = (window.open.id, window.before.clone());
        self.history.set_state(id, State::FellBack);
        self.note_policy(&file, plan, Origin::FallBack, by)
    }
}

/// The regions of a policy, by what is known of them. One that was checked defines each region that it names.
pub(super) fn regions_of(policy: &Policy, known: &Regions, now: Timestamp) -> Regions {
    region::next(policy, known, BTreeMap::new(), now).unwrap_or_default()
}
