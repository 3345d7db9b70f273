//! The agent's state as plain values, and the reports made from them: readers never touch the agent. Pure.

pub mod fleet;

use std::{collections::BTreeMap, sync::Arc};

use filter_common::Reason;
use ipnet::IpNet;
use jiff::{Timestamp, Unit};

use crate::{
    clock::Now,
    enforcer::Observed,
    fleet::{ThisHost, state::State as Fleet},
    history::History,
    holding::{self, Regional},
    host::{
        coverage::{Coverage, address_warnings, describe_missing},
        driver::{long_frame_warnings, unreliably_filtered},
    },
    log::Entry,
    policy::{Model, Region, Rule},
    policy_file::PolicyFile,
    reconcile::{InForce, unlisted},
    region::state::{Change, Regions, State},
    report,
    rules::{self, RuleKey},
    temporary::{Kind, Timed},
    text::{counted, list},
    window::Brief,
};

/// Prefixes that one line of the log lists; the rest are only counted.
const MAX_LOGGED_PREFIXES: usize = 5;

/// The agent's state at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    pub now: Now,
    pub started: Timestamp,
    pub file: Arc<PolicyFile>,
    pub enforced: report::Enforced,
    pub window: Option<Brief>,
    pub regions: Regions,
    /// Documents of the fleet, and this host in it.
    pub fleet: Arc<Fleet>,
    pub this_host: ThisHost,
    pub timed: Timed,
    /// Errors of the agent itself, such as a policy file that is not enforced.
    pub errors: Vec<String>,
    /// Why records are not on disk, where a restart would look for them.
    pub unsaved: Vec<String>,
    pub history: History,
}

impl Snapshot {
    /// The status: what the kernel does, beside what it should do.
    pub fn status(&self, observed: &Observed, now: Now) -> report::Status {
        let Observed {
            in_force,
            host,
            pinned,
            program_id: ours,
            settings,
            ..
        } = observed;
        let policy = &in_force.file.policy;
        let coverage = Coverage::of(policy, &in_force.remembered, host);
        let mut warnings = in_force.file.warnings(&in_force.compiled);
        warnings.extend(coverage.warnings(host));
        warnings.extend(address_warnings(policy, host));
        warnings.extend(settings.port_warnings(policy));
        warnings.extend(unlisted(policy, &coverage, pinned, host));
        warnings.extend(long_frame_warnings(host, *ours));
        warnings.extend(self.region_warnings());
        warnings.extend(self.fleet_warnings(now.steady));
        warnings.extend(observed.lost.iter().cloned());
        warnings.extend(self.unsaved.iter().cloned());
        let mut not_enforced = coverage.not_enforced(pinned, *ours);
        not_enforced.extend(unreliably_filtered(host, *ours));
        for error in &observed.verified.errors {
            if !not_enforced.contains(error) {
                not_enforced.push(error.clone());
            }
        }
        let mut errors = self.errors.clone();
        errors.extend(self.region_errors());
        errors.extend(self.fleet_errors());
        errors.extend(coverage.missing.iter().map(describe_missing));
        errors.extend(not_enforced.iter().cloned());
        errors.extend(observed.complaints.iter().cloned());
        let present = coverage.present.iter().map(|interface| {
            let xdp = interface.xdp.filter(|xdp| xdp.program_id == *ours);
            report::Interface {
                name: interface.name.clone(),
                mode: xdp.map(|xdp| if xdp.native { "native" } else { "generic" }.into()),
                program_id: xdp.map(|xdp| xdp.program_id),
            }
        });
        let missing = coverage.missing.iter().map(|entry| report::Interface {
            name: entry.to_string(),
            mode: None,
            program_id: None,
        });
        let interfaces = present.chain(missing).collect();
        report::Status {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            started: self.started,
            policy: self.enforced.clone(),
            interfaces,
            repairs: observed.repairs,
            databases: observed.databases(self.now),
            unattributed: observed.packets(None, false),
            unattributed_would_drop: observed.packets(None, true),
            regions: self.regions(),
            verified: observed.verified.clone(),
            tracing: observed.tracing.clone(),
            window: self.window.as_ref().map(|window| window.report(now)),
            fleet: self.fleet(),
            warnings,
            not_enforced,
            errors,
        }
    }

    /// The regions, as the provider calls them.
    pub fn managed_ranges(&self) -> Vec<report::ManagedRange> {
        let regions = self.file.policy.regions.iter();
        let ranges = regions.map(|(name, region)| {
            let set = self.regions.get(name).and_then(|state| state.set.as_ref());
            report::ManagedRange {
                id: name.clone(),
                name: name.clone(),
                source: region.source.to_string(),
                prefixes: set.map_or(0, |set| set.prefixes.len()),
            }
        });
        ranges.collect()
    }

    /// Every region of the policy; those that no rule names are not looked up.
    pub fn regions(&self) -> Vec<report::Region> {
        let region = |(name, region): (&String, &Region)| {
            let state = self.regions.get(name);
            let set = state.and_then(|state| state.set.as_ref());
            let on_host = |at: Timestamp| self.now.on_host(at);
            let retire_after = region.guards.retire_after;
            let held = set.map(|set| set.held.as_slice()).unwrap_or_default();
            let held = held
                .iter()
                .map(|&(prefix, until)| (prefix, until + retire_after));
            let retiring = set.map(|set| set.retiring.as_slice()).unwrap_or_default();
            let retiring = held.chain(retiring.iter().copied());
            let error = state.and_then(|state| state.error.as_ref());
            report::Region {
                name: name.clone(),
                source: region.source.to_string(),
                used: state.is_some(),
                prefixes: set.map(|set| set.prefixes.to_vec()).unwrap_or_default(),
                retiring: retiring
                    .map(|(prefix, until)| report::Retiring {
                        prefix,
                        until: on_host(until),
                    })
                    .collect(),
                confirmed: set.map(|set| on_host(set.confirmed)),
                next: state.and_then(|state| state.next).map(on_host),
                failing: state.is_some_and(|state| state.failing),
                partial: state.is_some_and(|state| state.partial),
                error: error.map(|error| report::Error {
                    at: on_host(error.at),
                    text: error.text.clone(),
                }),
                change: state.and_then(|state| state.change.as_ref()).map(|change| {
                    report::Change {
                        at: change.at.map(on_host),
                        added: change.added.clone(),
                        left: change.left.clone(),
                        removed: change.removed.clone(),
                        timing: change.timing.as_deref().cloned(),
                    }
                }),
            }
        };
        self.file.policy.regions.iter().map(region).collect()
    }

    /// Regions in use that allow nobody.
    fn region_errors(&self) -> impl Iterator<Item = String> {
        let without = self.regions.iter().filter(|(_, state)| state.set.is_none());
        without.map(|(name, state)| {
            let why = match &state.error {
                Some(error) => &error.text,
                None => "not looked up yet",
            };
            no_addresses(name, why)
        })
    }

    /// Regions whose last look-up failed.
    fn region_warnings(&self) -> impl Iterator<Item = String> {
        self.regions.iter().filter_map(|(name, state)| {
            let (true, Some(_), Some(error)) = (state.failing, &state.set, &state.error) else {
                return None;
            };
            let consequence = consequence(state, self.now);
            Some(format!("region {name}: {}; {consequence}", error.text))
        })
    }
}

pub fn no_addresses(name: &str, why: &str) -> String {
    format!("region {name} has no addresses and allows nobody: {why}")
}

/// The consequence of a region's failure for the sources that it allows.
fn consequence(state: &State, now: Now) -> String {
    match &state.set {
        Some(set) if state.partial => {
            let prefixes = counted(set.prefixes.len(), "prefix", "prefixes");
            format!("the rest of the result is in force ({prefixes} with what is kept)")
        }
        Some(set) => {
            let confirmed = now.on_host(set.confirmed);
            format!(
                "the last good set stays in force ({}, confirmed {})",
                counted(set.prefixes.len(), "prefix", "prefixes"),
                confirmed.round(Unit::Second).unwrap_or(confirmed)
            )
        }
        None => "it has no addresses and allows nobody".into(),
    }
}

/// Describes a region's change that is in force in one line.
pub fn describe(name: &str, change: &Change, timing: &report::Timing) -> Entry {
    let part = |what: &str, prefixes: &[IpNet]| {
        let named = list(prefixes.iter().take(MAX_LOGGED_PREFIXES));
        match prefixes.len() {
            0 => None,
            count @ ..=MAX_LOGGED_PREFIXES => Some(format!("{count} {what} ({named})")),
            count => Some(format!("{count} {what} ({named} and more)")),
        }
    };
    let parts = [
        part("added", &change.added),
        part("left, still allowed for a time", &change.left),
        part("removed", &change.removed),
    ];
    let parts = list(parts.into_iter().flatten());
    let entry = Entry::info(format!("region {name}: {parts}; {timing}"))
        .with("REGION", name)
        .limited(format!("region {name}"));
    let changed = [&change.added, &change.left, &change.removed];
    let changed = changed.into_iter().flatten().take(MAX_LOGGED_PREFIXES);
    changed.fold(entry, |entry, prefix| {
        entry.with("PREFIX", prefix.to_string())
    })
}

/// The log's line of a look-up that changed nothing of what is allowed: where it failed, once, however often it
/// fails again in the same way.
pub fn describe_result(
    name: &str,
    before: Option<&State>,
    state: &State,
    now: Now,
) -> Option<Entry> {
    let failed = before.filter(|before| before.failing);
    let failed = failed.and_then(|before| before.error.as_ref());
    let entry = match (failed, &state.error) {
        (Some(failed), Some(error)) if state.failing && failed.text == error.text => return None,
        (_, Some(error)) if state.failing => {
            let consequence = consequence(state, now);
            Entry::warning(format!("region {name}: {}; {consequence}", error.text))
        }
        (Some(_), _) => Entry::info(format!("region {name}: answers again")),
        (None, _) => return None,
    };
    Some(entry.with("REGION", name).limited(format!("region {name}")))
}

impl Observed {
    /// Packets that were not allowed, by reason. `database`: `None` for those aimed at none in particular.
    /// `monitored`: those that were only counted, and passed.
    fn packets(&self, database: Option<&str>, monitored: bool) -> BTreeMap<String, u64> {
        let counts = self.counts.iter().filter(|((name, reason, counted), _)| {
            name.as_deref() == database && *reason != Reason::Allowed && *counted == monitored
        });
        counts
            .map(|((_, reason, _), packets)| (reason.name().into(), *packets))
            .collect()
    }

    fn connections(&self, database: &str, monitored: bool) -> BTreeMap<String, u64> {
        let fates = self.fates.iter();
        let fates =
            fates.filter(|((name, _, counted), _)| name == database && *counted == monitored);
        fates
            .map(|((_, fate, _), connections)| (fate.name().into(), *connections))
            .collect()
    }

    fn databases(&self, now: Now) -> Vec<report::Database> {
        let InForce {
            file,
            compiled,
            timed,
            ..
        } = &self.in_force;
        let timed = timed.at(now);
        let databases = file.policy.databases.iter().filter_map(|database| {
            let entries = compiled.databases.get(&database.name)?;
            let name = &database.name;
            let allowed = |(counted, _): &(&(Option<String>, Reason, bool), &u64)| {
                counted.0.as_ref() == Some(name) && counted.1 == Reason::Allowed
            };
            let of_kind = |kind: Kind| timed.in_force(database).filter(move |t| t.kind == kind);
            let suspended = timed.suspended(&file.policy);
            Some(report::Database {
                temporary: of_kind(Kind::Allow).count(),
                blocks: of_kind(Kind::Block).count(),
                suspended: suspended.filter(|rule| rule.database == *name).count(),
                name: name.clone(),
                ports: database.guarded_ports(),
                addresses: database.addresses.clone(),
                model: database.model.name().into(),
                monitor: database.monitor,
                rules: entries.rules.len(),
                prefixes: entries.prefixes(),
                passed: self.counts.iter().filter(allowed).map(|(_, n)| n).sum(),
                dropped: self.packets(Some(name), false),
                would_drop: self.packets(Some(name), true),
                force_tls: database.tls.is_some(),
                monitor_tls: database.tls.is_some_and(|tls| tls.monitor),
                connections: self.connections(name, false),
                monitored_connections: self.connections(name, true),
            })
        });
        databases.collect()
    }

    /// The rules with their hits. Rules that have ended and temporary rules that are suspended are listed too. `regions`:
    /// their prefixes, which takes a while; without them it is not told what covers a rule.
    ///
    /// # Errors
    /// A database that the policy does not have.
    pub fn rules(
        &self,
        database: Option<&str>,
        regions: Option<&rules::Regions>,
        now: Now,
    ) -> anyhow::Result<Vec<report::Rule>> {
        let in_force = &self.in_force;
        in_force.check_database(database)?;
        let mut rules = Vec::new();
        let mut regional = regions.map(Regional::new);
        let timed = in_force.timed.at(now);
        let databases = in_force.file.policy.databases.iter();
        for database in databases.filter(|d| database.is_none_or(|name| name == d.name)) {
            let Some(entries) = in_force.compiled.databases.get(&database.name) else {
                continue;
            };
            let prefixes = entries.prefixes_by_rule();
            let covered = regional.as_mut().map(|regional| {
                let policy = &in_force.file.policy;
                holding::covered(&holding::in_force(policy, database, regional, &timed))
            });
            let covered = covered.unwrap_or_default();
            let line = |key: &RuleKey| {
                let place = entries.rules.iter().position(|(rule, _)| rule == key);
                let hits = self.hits.get(&(database.name.clone(), key.text()));
                let end = place.and_then(|place| entries.rules[place].1);
                let last_hit = self.last_hits.of(&database.name, &key.text(), now);
                report::Rule {
                    database: database.name.clone(),
                    number: None,
                    source: key.to_string(),
                    label: None,
                    expires: None,
                    expired: end.is_some_and(|end| end <= now.boot),
                    prefixes: place.map_or(0, |place| prefixes[place]),
                    hits: hits.copied().unwrap_or_default(),
                    last_hit: last_hit.and_then(|hit| hit.at),
                    counted_since: last_hit.map(|hit| hit.counted_since),
                    covered_by: covered.get(&key.text()).cloned().unwrap_or_default(),
                    origin: report::Origin::File,
                    except: Vec::new(),
                    left: end.map(|end| end.since(now.boot).as_secs()),
                    suspended: false,
                    added: None,
                    by: None,
                }
            };
            let written = |key: RuleKey, number: Option<usize>, rule: &Rule| report::Rule {
                number,
                label: rule.label.clone(),
                expires: rule.expires,
                expired: rule.expires.is_some_and(|at| {
                    in_force.timed.ends.of(&database.name, &key, at, now) <= now.boot
                }),
                except: rule.except.clone(),
                ..line(&key)
            };
            let permanent = database.cluster.iter().filter(|m| m.expires.is_none());
            let labels: Vec<&str> = permanent.filter_map(|m| m.label.as_deref()).collect();
            for (key, _) in &entries.rules {
                match key {
                    // One rule to the kernel, however many members it has.
                    RuleKey::Cluster => rules.push(report::Rule {
                        label: (!labels.is_empty()).then(|| labels.join(", ")),
                        ..line(key)
                    }),
                    RuleKey::RegionalNetwork | RuleKey::Internet => rules.push(line(key)),
                    RuleKey::Rule(_)
                    | RuleKey::Fleet(_)
                    | RuleKey::Member(_)
                    | RuleKey::Temporary(_)
                    | RuleKey::Block(_) => {}
                }
            }
            let ending = database.cluster.iter().filter(|m| m.expires.is_some());
            rules.extend(ending.map(|m| written(RuleKey::Member(m.source.clone()), None, m)));
            if let Model::Dedicated { rules: listed } = &database.model {
                rules.extend((1..).zip(listed).map(|(number, rule)| {
                    written(RuleKey::Rule(rule.source.clone()), Some(number), rule)
                }));
            }
            rules.extend(database.fleet_rules().iter().map(|rule| report::Rule {
                source: rule.source.to_string(),
                origin: report::Origin::Fleet,
                ..written(RuleKey::Fleet(rule.source.clone()), None, rule)
            }));
            let temporary = in_force.timed.temporary.iter();
            rules.extend(
                temporary
                    .filter(|t| t.database == database.name)
                    .map(|rule| {
                        let (key, origin) = match rule.kind {
                            Kind::Allow => {
                                (RuleKey::Temporary(rule.source), report::Origin::Temporary)
                            }
                            Kind::Block => (RuleKey::Block(rule.source), report::Origin::Block),
                        };
                        report::Rule {
                            source: rule.source.to_string(),
                            label: rule.label.clone(),
                            expires: Some(rule.until),
                            expired: rule.end <= now.boot,
                            origin,
                            left: Some(rule.end.since(now.boot).as_secs()),
                            suspended: in_force
                                .timed
                                .suspended(&in_force.file.policy)
                                .any(|s| s == rule),
                            added: Some(rule.added),
                            by: rule.by.clone(),
                            ..line(&key)
                        }
                    }),
            );
        }
        Ok(rules)
    }
}
