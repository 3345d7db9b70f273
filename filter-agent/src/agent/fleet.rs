//! The fleet's documents: taken from etcd, enforced, and kept for the next start.

use std::{collections::BTreeMap, sync::Arc};

use anyhow::Result;

use super::{
    Agent, Cause, Fleet, Next,
    history::{numbered, with_change},
    window::regions_of,
};
use crate::{
    enforcer::Checked,
    event::Effect,
    fleet::{
        self, News, Settings, Unwritten,
        host_status::{Bounds, DatabaseStatus, HostStatus, Packets},
        state::Standing,
    },
    history::Origin,
    log::Entry,
    policy::{Database, FromFleet, Rule, Source},
    policy_file::PolicyFile,
    reconcile::{Committed, Occasion, Refused},
    snapshot::{fleet::describe_standing, no_addresses},
    temporary::Kind,
    text::list,
};

impl Agent {
    /// A policy with the rules that the fleet has for it.
    pub(super) fn with_fleet(&self, file: &Arc<PolicyFile>, fleet: &Fleet) -> Arc<PolicyFile> {
        fleet::with_rules(file, fleet, &self.this_host, self.now)
    }

    pub(super) fn fleet_news(&mut self, news: News) {
        match news {
            News::Lost(error) => {
                let before = self.fleet.clone();
                Arc::make_mut(&mut self.fleet).lost(error, self.now.steady);
                self.log_fleet(&before);
            }
            News::Status(result) => self.status_written(result),
            News::Answer {
                answer,
                healed,
                rang,
            } => {
                self.this_host.healed = healed;
                self.this_host.rang = rang;
                let next = self.fleet.take(&answer, &self.file.policy, self.now.steady);
                let over = next.without_rollouts_over(self.now.wall);
                self.enforce_fleet(over.unwrap_or(next).into());
            }
        }
    }

    fn enforce_fleet(&mut self, next: Arc<Fleet>) {
        let was_refused = self.refused_fleet.take().is_some();
        let file = self.with_fleet(&self.file, &next);
        let before = self.file.policy.databases.iter();
        let rules = file.policy.databases.iter().map(Database::fleet_rules);
        if rules.eq(before.map(Database::fleet_rules)) {
            // Its document may have another revision.
            self.file = file;
            let before = std::mem::replace(&mut self.fleet, next);
            let waited = self.now.boot.since(self.this_host.rang);
            let milliseconds = 1000.0 * waited.as_secs_f64();
            self.this_host.enforced(&before, &self.fleet, milliseconds);
            self.log_fleet(&before);
            // The change that the kernel refused is not wanted any more.
            self.stuck
                .take_if(|stuck| was_refused && !stuck.not_taken_back);
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
        self.this_host.accepted = self.now.boot;
        self.change(next, Cause::Fleet, occasion, false);
    }

    /// Tries again what the kernel refused. Returns whether a change is under way now.
    pub(super) fn enforce_refused_fleet(&mut self) -> bool {
        let Some(fleet) = self.refused_fleet.clone() else {
            return false;
        };
        self.enforce_fleet(fleet);
        self.under_way.is_some()
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
        let accepted = self.this_host.accepted.since(self.this_host.rang);
        let milliseconds = 1000.0 * accepted.as_secs_f64() + timing.enforced_ms;
        self.this_host.enforced(before, &self.fleet, milliseconds);
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

    /// The kernel did not take it. It is asked again after a pause, and with etcd's next answer.
    pub(super) fn fleet_not_changed(
        &mut self,
        fleet: Arc<Fleet>,
        refused: Refused,
        not_taken_back: bool,
    ) {
        self.refused_fleet = Some(fleet);
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
                Standing::Missing { .. } if after.documents().contains_key(&name) => {
                    Entry::warning(format!(
                        "database {name}: the fleet's document is gone; the last good one stays in force"
                    ))
                }
                Standing::Missing { .. } => Entry::info(format!(
                    "database {name}: the fleet has no document; only the policy's own rules are in force"
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

    /// Another policy is in force.
    pub(super) fn follow_fleet_anew(&mut self) {
        // It was judged by the policy before; etcd is asked again soon.
        self.refused_fleet = None;
        self.keep_fleet();
        self.follow();
    }

    /// Follows what the policy in force says.
    pub(super) fn follow(&mut self) {
        let settings = Settings::of(&self.file.policy, &self.this_host);
        if settings != self.this_host.followed {
            self.this_host.followed.clone_from(&settings);
            // Of other keys, or to other members.
            self.this_host.unwritten = None;
        }
        self.effects.push(Effect::Follow(settings));
    }

    /// Has the status of this host written to etcd where it is news.
    pub(super) fn report_to_fleet(&mut self) {
        if self.is_detached || self.is_ending {
            return;
        }
        let fleet = self.fleet.clone();
        let rolled_out = fleet.rolled_out(&self.this_host.name(&self.file.policy));
        if self.this_host.is_count_due(&rolled_out, self.now.steady) {
            self.effects.push(Effect::Count);
        }
        let status = self.host_status();
        let report = self.this_host.report(status, self.now.steady);
        self.effects.extend(report.map(Effect::Report));
    }

    /// `counts`: packets that passed and those that no rule allows; without those of a database that had none. An error
    /// leaves out what is not known.
    pub(super) fn counted(&mut self, counts: Result<BTreeMap<String, [u64; 2]>>) {
        self.this_host.packets.clear();
        let Ok(counts) = counts else {
            return;
        };
        let host = self.this_host.name(&self.file.policy);
        let at = self.now.wall;
        for name in self.fleet.rolled_out(&host) {
            let [passed, dropped] = counts.get(name).copied().unwrap_or_default();
            let packets = Packets {
                at,
                passed,
                dropped,
            };
            self.this_host.packets.insert(name.clone(), packets);
        }
    }

    /// The state after the newest answer that was believed, even if the kernel refused its rules.
    fn believed_fleet(&self) -> &Fleet {
        self.refused_fleet.as_ref().unwrap_or(&self.fleet)
    }

    /// `None`: it is not written.
    fn host_status(&self) -> Option<HostStatus> {
        let policy = &self.file.policy;
        let keys = self.this_host.followed.as_ref()?.own.as_ref()?;
        let marks = self.believed_fleet().marks();
        let databases = policy.databases.iter().filter_map(|database| {
            let fleet = database.fleet.as_ref()?;
            let status = self.database_status(database, fleet);
            Some((database.name.clone(), status))
        });
        Some(HostStatus {
            agent: env!("CARGO_PKG_VERSION").into(),
            boot: keys.boot.clone(),
            cluster: marks.map(|marks| marks.cluster.into()),
            era: marks.map(|marks| marks.era),
            revision: marks.map(|marks| marks.revision),
            at: self.now.wall,
            databases: databases.collect(),
        })
    }

    fn database_status(&self, database: &Database, fleet: &FromFleet) -> DatabaseStatus {
        let name = &database.name;
        let policy = &self.file.policy;
        let believed = self.believed_fleet();
        let (state, error) = describe_standing(believed.standing(name));
        let without = self.without_addresses(fleet);
        let not_verified = &self.this_host.not_verified;
        let is_verified = not_verified.is_empty();
        // The worst first: the kernel does something else, it takes no change, the document is not taken.
        let error = match (is_verified, &self.stuck) {
            (false, _) => Some(format!("not enforced: {}", list(not_verified.iter()))),
            (true, Some(stuck)) => Some(stuck.error.clone()),
            (true, None) => error.or_else(|| {
                let (region, why) = without?;
                Some(no_addresses(region, why?))
            }),
        };
        let good = self.fleet.documents().get(name);
        // One that is being looked up for the first time is not in force yet.
        let is_looked_up = without.is_none_or(|(_, why)| why.is_some());
        let in_force = good.filter(|_| is_verified && is_looked_up);
        let allowed = self.timed.in_force(database);
        let allowed = allowed.filter(|rule| rule.kind == Kind::Allow && rule.end > self.now.boot);
        let all_regions = || policy.regions.keys().cloned().collect();
        DatabaseStatus {
            seen: believed.seen(name),
            enforced: in_force.map(|good| good.mod_revision),
            sha256: in_force.map(|good| good.sha256.clone()),
            state,
            error,
            enforced_ms: in_force.and_then(|_| self.this_host.enforced_ms.get(name).copied()),
            rules: fleet.rules.len(),
            temporary: allowed.count(),
            bounds: Some(Bounds {
                widest: fleet.bounds.widest.map(|length| format!("/{length}")),
                within: fleet.bounds.within.clone(),
                regions: fleet.bounds.regions.clone().unwrap_or_else(all_regions),
                floor: database.rules().len(),
            }),
            packets: self.this_host.packets.get(name).copied(),
        }
    }

    /// The first region of the document in force that allows nobody, and why. `None`: it was not looked up yet.
    fn without_addresses<'a>(&'a self, fleet: &'a FromFleet) -> Option<(&'a str, Option<&'a str>)> {
        let lasts = |rule: &&Rule| rule.expires.is_none_or(|end| end > self.now.wall);
        fleet.rules.iter().filter(lasts).find_map(|rule| {
            let Source::Region(name) = &rule.source else {
                return None;
            };
            let region = self.regions.get(name)?;
            let why = region.error.as_ref().map(|error| error.text.as_str());
            region.set.is_none().then_some((name.as_str(), why))
        })
    }

    /// Notes whether the status was written.
    fn status_written(&mut self, result: Result<(), Unwritten>) {
        let failed = result.as_ref().err().cloned();
        if !self.this_host.status_written(result, self.now.steady) {
            return;
        }
        let entry = match failed {
            None => Entry::info("fleet: the status of this host is written to etcd again"),
            Some(why) => {
                let host = self.this_host.name(&self.file.policy);
                let line = format!("fleet: {}", why.describe(&host));
                match why {
                    Unwritten::NameTaken => Entry::error(line),
                    Unwritten::Failed(_) => Entry::warning(line),
                }
            }
        };
        self.log(limited(entry));
    }
}

/// Anybody who may write to etcd can cause such lines.
fn limited(entry: Entry) -> Entry {
    entry.limited("the fleet".to_owned())
}
