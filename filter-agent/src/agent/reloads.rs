//! Proposals: a reload or a plan, until it is decided.

use std::{path::PathBuf, sync::Arc};

use anyhow::Result;

use super::{Agent, Cause};
use crate::{
    event::{Effect, Order, ReloadOptions, Reply},
    history::Origin,
    log::Entry,
    look_ups::LookUp,
    policy_file::PolicyFile,
    proposals::{Aim, Proposal, Reload},
    reconcile::{Occasion, Refused},
    refusal::Refusal,
    region::state as region,
    report,
    temporary::{Ends, Timed},
};

impl Agent {
    pub(super) fn reload(
        &mut self,
        options: ReloadOptions,
        reply: Option<Reply<report::Reloaded>>,
    ) {
        let reload = self.proposals.reload(Reload { options, reply });
        self.begin_reload(reload);
    }

    pub(super) fn begin_reload(&mut self, reload: Option<Reload>) {
        if let Some(reload) = reload {
            self.propose(Aim::Reload(reload), None, None);
        }
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
        let Some(Proposal {
            aim,
            file: Some(file),
            answers,
        }) = self.proposals.remove(number)
        else {
            return;
        };
        let asked = answers.keys().cloned().collect();
        let next = region::next(&file.policy, &self.regions, answers, self.now.steady);
        // A reload computes the ends anew, by the host's clock.
        let timed = Timed {
            now: self.now,
            ends: Ends::anew(&file.policy, self.now),
            temporary: self.timed.of_policy(&file.policy),
        };
        match (aim, next) {
            (Aim::Reload(Reload { options, reply }), Ok(regions)) => {
                let occasion = Occasion::Reload {
                    allow_unprotect: options.allow_unprotect,
                    max_cut: options.max_cut,
                    caller: options.caller,
                };
                let origin = match reply {
                    Some(_) => Origin::Reload,
                    None => Origin::Sighup,
                };
                let cause = Cause::Reload {
                    file: file.clone(),
                    asked,
                    origin,
                    by: options.by,
                    reply,
                };
                self.change(file, regions, timed, cause, occasion, options.existing);
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
            Aim::Reload(reload) => self.refuse_reload(reload.reply, Refused::from(error)),
        }
    }

    pub(super) fn refuse_reload(
        &mut self,
        reply: Option<Reply<report::Reloaded>>,
        refused: Refused,
    ) {
        let error = refused.describe("reload");
        self.log(Entry::error(format!("{error:#}")));
        if let Some(reply) = reply {
            reply.send(Err(error));
        }
        self.watch_used();
        let next = self.proposals.next_reload();
        self.begin_reload(next);
    }
}
