//! Proposals: a reload or a plan, until it is decided.

use std::{path::PathBuf, sync::Arc};

use anyhow::{Result, bail};

use super::{Agent, Cause, Next};
use crate::{
    event::{Effect, Order, ReloadOptions, Reply},
    history::{KeptPolicy, Origin},
    log::Entry,
    look_ups::LookUp,
    policy_file::PolicyFile,
    proposals::{Aim, Proposal, Reload, Wanted},
    reconcile::{Occasion, Refused},
    refusal::Refusal,
    region::state as region,
    report,
    temporary::{Ends, Timed},
};

impl Agent {
    pub(super) fn reload(
        &mut self,
        wanted: Wanted,
        options: ReloadOptions,
        reply: Option<Reply<report::Reloaded>>,
    ) {
        let reload = Reload {
            wanted,
            options,
            reply,
        };
        let reload = self.proposals.reload(reload);
        self.begin_reload(reload);
    }

    pub(super) fn begin_reload(&mut self, reload: Option<Reload>) {
        let Some(reload) = reload else { return };
        let kept = match (self.refuse_while_trying(), reload.wanted) {
            (Some(refusal), _) => Err(refusal.into()),
            (None, Wanted::File) => Ok(None),
            (None, Wanted::Rollback { to }) => self.find_policy(to).map(Some),
        };
        match kept {
            Ok(None) => self.propose(Aim::Reload(reload), None, None),
            Ok(Some(KeptPolicy { path, text, .. })) => {
                let text = text.as_ref().into();
                self.propose(Aim::Reload(reload), Some(path), Some(text));
            }
            Err(refusal) => self.refuse_aim(Aim::Reload(reload), refusal),
        }
    }

    /// Finds the policy to roll back to.
    ///
    /// # Errors
    /// There is none, it is in force, or its text is not kept.
    fn find_policy(&self, to: Option<u64>) -> Result<KeptPolicy> {
        let id = to.or_else(|| self.history.before()).ok_or_else(|| {
            let why =
                "no policy before the one in force is kept: `filter-agent history` lists them";
            Refusal::NotFound(why.into())
        })?;
        let kept = self.history.policy(id)?;
        if *kept.text == *self.file.text {
            let why = format!("the policy of change {id} is the one in force");
            bail!(Refusal::Conflict(why));
        }
        Ok(kept)
    }

    pub(super) fn propose(&mut self, aim: Aim, path: Option<PathBuf>, text: Option<String>) {
        let number = self.look_ups.number();
        self.proposals.begin(number, aim);
        self.effects.push(Effect::ReadPolicy {
            proposal: number,
            path: path.unwrap_or_else(|| self.path.clone()),
            text,
        });
    }

    pub(super) fn policy_read(&mut self, number: u64, file: Result<PolicyFile>) {
        let Some(proposal) = self.proposals.get_mut(number) else {
            return;
        };
        let file = match file {
            Ok(file) => Arc::new(file),
            Err(error) => {
                if let Some(proposal) = self.proposals.remove(number) {
                    self.refuse_aim(proposal.aim, error);
                }
                return;
            }
        };
        proposal.file = Some(file.clone());
        if let Aim::Reload(reload) = &proposal.aim
            && let Some(hash) = &reload.options.if_hash
            && !hash.eq_ignore_ascii_case(&file.hash)
        {
            let error = format!(
                "{} is not the text that was meant: its hash is {}; see `filter-agent plan`",
                file.path.display(),
                file.hash
            );
            return self.refuse_proposal(number, Refusal::PreconditionFailed(error).into());
        }
        // Documents name regions, too.
        let fleet = self.fleet.under(&file.policy, self.now.steady);
        let file = self.with_fleet(&file, &fleet);
        for (name, version) in region::to_ask(&file.policy, &self.regions) {
            let look_up = LookUp {
                number: self.look_ups.begin_for_proposal(number, name),
                region: file.policy.regions[name].clone(),
                version,
            };
            self.effects.push(Effect::LookUp(look_up));
        }
        self.decide(number);
    }

    /// Turns a proposal into a change or a plan, once the results of all its look-ups are there.
    pub(super) fn decide(&mut self, number: u64) {
        if self.look_ups.is_waiting(number) {
            return;
        }
        let Some(proposal) = self.proposals.get(number) else {
            return;
        };
        // A policy that is tried is on disk before it is enforced.
        if let (Aim::Reload(reload), Some(_)) = (&proposal.aim, &proposal.file)
            && let Some(lasting) = reload.options.confirm
            && !self.is_opened(number, lasting)
        {
            return;
        }
        let Some(Proposal {
            aim,
            file: Some(file),
            answers,
        }) = self.proposals.remove(number)
        else {
            return;
        };
        let asked = answers.keys().cloned().collect();
        // It may have changed since the file was read.
        let fleet: Arc<_> = self.fleet.under(&file.policy, self.now.steady).into();
        let file = self.with_fleet(&file, &fleet);
        let next = region::next(&file.policy, &self.regions, answers, self.now.steady);
        // A reload computes the ends anew, by the host's clock.
        let timed = Timed {
            now: self.now,
            ends: Ends::anew(&file.policy, self.now),
            temporary: self.timed.of_policy(&file.policy),
        };
        match (aim, next) {
            (Aim::Reload(reload), Ok(regions)) => {
                let Reload {
                    wanted,
                    options,
                    reply,
                } = reload;
                let occasion = Occasion::Reload {
                    allow_unprotect: options.allow_unprotect,
                    max_cut: options.max_cut,
                    caller: options.caller,
                    is_tried: options.confirm.is_some(),
                };
                let origin = match (wanted, &reply) {
                    (Wanted::Rollback { .. }, _) => Origin::Rollback,
                    (Wanted::File, Some(_)) => Origin::Reload,
                    (Wanted::File, None) => Origin::Sighup,
                };
                let open = self.take_opening().map(Box::new);
                let cause = Cause::Reload {
                    wanted,
                    asked,
                    origin,
                    by: options.by,
                    open,
                    reply,
                };
                let next = Next {
                    file,
                    regions,
                    timed,
                    fleet,
                };
                self.change(next, cause, occasion, options.existing);
            }
            (Aim::Plan { caller, reply }, Ok(regions)) => {
                let order = Order {
                    accepted: file.accepted,
                    file,
                    prefixes: region::prefixes(&regions),
                    timed,
                };
                self.effects.push(Effect::Plan {
                    order,
                    caller,
                    reply,
                });
                self.watch_used();
            }
            (aim, Err(error)) => self.refuse_aim(aim, error),
        }
    }

    pub(super) fn refuse_aim(&mut self, aim: Aim, error: anyhow::Error) {
        match aim {
            Aim::Plan { reply, .. } => {
                reply.send(Err(Refusal::or(error, Refusal::Conflict)));
                self.watch_used();
            }
            Aim::Reload(reload) => {
                self.refuse_reload(reload.wanted, reload.reply, Refused::from(error));
            }
        }
    }

    pub(super) fn refuse_reload(
        &mut self,
        wanted: Wanted,
        reply: Option<Reply<report::Reloaded>>,
        refused: Refused,
    ) {
        self.forget_opening();
        let error = refused.describe(wanted.name());
        self.log(Entry::error(format!("{error:#}")));
        if let Some(reply) = reply {
            reply.send(Err(error));
        }
        self.watch_used();
        let next = self.proposals.next_reload();
        self.begin_reload(next);
    }
}
