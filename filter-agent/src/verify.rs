//! Compares what the kernel does with the policy: the attached programs, probe packets, and the maps.

use std::net::IpAddr;

use anyhow::{Context as _, Result, ensure};
use filter_common::Reason;
use jiff::Timestamp;

use crate::{
    clock::BootTime,
    hints,
    host::coverage::Coverage,
    kernel::{filter::Filter, probe},
    policy::{DocumentInForce, Model, Rule, Source},
    reconcile::InForce,
    refusal::Refusal,
    report::{self, By},
    rules::RuleKey,
    temporary::Kind,
    text::list,
};

/// Runs the attached program on probe packets, and compares what is attached with what should be. `round`: of many
/// ports each round probes some.
///
/// # Errors
/// Netlink, a pin or a map cannot be read, or the program cannot be run.
pub fn verify(
    filter: &mut Filter,
    coverage: &Coverage,
    in_force: &InForce,
    round: u64,
) -> Result<report::Verified> {
    let ours = filter.program_id()?;
    let mut errors = coverage.errors(&filter.pinned()?, ours);
    let present = coverage.present.iter();
    let filtered = present.filter(|i| i.xdp.is_some_and(|xdp| xdp.program_id == ours));
    let now = BootTime::now();
    let probes = probe::probes(&in_force.compiled, now, round);
    for probe in &probes {
        let frame = probe::frame(probe.protocol, probe.source, probe.destination, probe.port);
        let judged = filter.judge(&probe.database, probe.source, probe.monitor)?;
        let passes = filter.probe(&frame, &judged)?;
        // A port that is closed since TLS cannot be enforced is an error of its own.
        let allowed = matches!(judged.reason, Reason::Allowed | Reason::TlsUnenforced);
        if allowed != probe.allowed || passes != judged.passes() {
            errors.push(format!(
                "database {}: a packet from {} to port {} {} although the policy {} it",
                probe.database,
                probe.source,
                probe.port,
                if passes { "passes" } else { "is dropped" },
                if probe.allowed {
                    "allows"
                } else {
                    "does not allow"
                },
            ));
        }
    }
    Ok(report::Verified {
        at: Timestamp::now(),
        probes: probes.len(),
        interfaces: filtered.map(|interface| interface.name.clone()).collect(),
        errors,
    })
}

/// The verdicts on a source. The verdict comes from the attached program, the rule from the kernel's map; that
/// the two agree is checked.
///
/// # Errors
/// A database that the policy does not have, or that has no address of the source's family.
pub fn explain(
    filter: &mut Filter,
    in_force: &InForce,
    source: IpAddr,
    database: Option<&str>,
    unfiltered: Option<&str>,
) -> Result<Vec<report::Explanation>> {
    in_force.check_database(database)?;
    let mut explanations = Vec::new();
    for (name, entries) in &in_force.compiled.databases {
        if database.is_some_and(|database| database != name) {
            continue;
        }
        let Some(destination) = probe::destination(entries, source) else {
            ensure!(
                database.is_none(),
                Refusal::NotFound(format!(
                    "database {name} has no address of {source}'s family"
                ))
            );
            continue;
        };
        let judged = filter.judge(name, source, entries.monitor)?;
        let port = *entries.ports.first().context("find a port")?;
        let frame = probe::frame(entries.protocol, source, destination, port);
        let passes = filter.probe(&frame, &judged)?;
        ensure!(
            passes == judged.passes(),
            "the attached program and the kernel's maps disagree on {source} at database {name}"
        );
        let rule = judged
            .rule_text
            .and_then(|text| entries.rules.iter().find(|(key, _)| key.text() == text));
        let (rule, end) = rule.map_or((None, None), |(key, end)| (Some(key), *end));
        let now = BootTime::now();
        let described = rule.and_then(|key| in_force.describe(name, key, source));
        let described = described.unwrap_or_default();
        explanations.push(report::Explanation {
            database: name.clone(),
            source,
            passes,
            monitor: entries.monitor,
            reason: judged.reason.name().into(),
            force_tls: entries.tls.is_some() && !judged.exempt,
            rule: rule.map(ToString::to_string),
            label: described.label,
            expires: described.expires,
            left: end.map(|end| end.since(now).as_secs()),
            by: described.by,
            document: described.document,
            exception: in_force.exception(name, judged.reason, source),
            unfiltered: unfiltered.map(str::to_owned),
        });
    }
    Ok(explanations)
}

impl InForce {
    /// # Errors
    /// A database that the policy does not have, with those it has.
    pub fn check_database(&self, database: Option<&str>) -> Result<()> {
        let Some(name) = database else { return Ok(()) };
        let databases = &self.compiled.databases;
        ensure!(
            !databases.is_empty(),
            Refusal::NotFound(format!("no database {name} in the policy, which has none"))
        );
        ensure!(
            databases.contains_key(name),
            Refusal::NotFound(format!(
                "no database {name} in the policy, which has {}",
                list(databases.keys())
            ))
        );
        Ok(())
    }

    /// The exception that keeps out a source which no rule allows.
    fn exception(&self, database: &str, reason: Reason, source: IpAddr) -> Option<String> {
        let mut databases = self.file.policy.databases.iter();
        let database = databases.find(|written| written.name == database)?;
        (reason == Reason::NotAllowed).then(|| hints::exception(database, source))?
    }

    /// Label, end and origin of the rule behind a key; for the cluster those of the member that holds the source.
    fn describe(&self, database: &str, key: &RuleKey, address: IpAddr) -> Option<Described> {
        let temporary = |kind, source| {
            let mut rules = self.timed.temporary.iter();
            let rule = rules.find(|rule| {
                rule.database == database && rule.kind == kind && rule.source == source
            })?;
            Some(Described {
                label: rule.label.clone(),
                expires: Some(rule.until),
                by: rule.by.clone(),
                document: None,
            })
        };
        let databases = &self.file.policy.databases;
        let written = databases.iter().find(|written| written.name == database)?;
        let holds = |member: &&Rule| match &member.source {
            Source::Cidr(prefix) => prefix.contains(&address),
            Source::Region(_) => false,
        };
        let rule = match (&written.model, key) {
            (_, RuleKey::Temporary(source)) => return temporary(Kind::Allow, *source),
            (_, RuleKey::Block(source)) => return temporary(Kind::Block, *source),
            (Model::Dedicated { rules }, RuleKey::Rule(source)) => {
                rules.iter().find(|rule| rule.source == *source)
            }
            (_, RuleKey::Fleet(source)) => written
                .fleet_rules()
                .iter()
                .find(|rule| rule.source == *source),
            (_, RuleKey::Member(source)) => written
                .cluster
                .iter()
                .find(|member| member.source == *source),
            (_, RuleKey::Cluster) => {
                let members = written
                    .cluster
                    .iter()
                    .filter(|member| member.expires.is_none());
                members
                    .filter(holds)
                    .max_by_key(|member| match &member.source {
                        Source::Cidr(prefix) => prefix.prefix_len(),
                        Source::Region(_) => 0,
                    })
            }
            _ => None,
        }?;
        Some(Described {
            label: rule.label.clone(),
            expires: rule.expires,
            by: None,
            document: match key {
                RuleKey::Fleet(_) => written.fleet.as_ref().and_then(|fleet| fleet.document),
                _ => None,
            },
        })
    }
}

/// Label, end and origin of a rule.
#[derive(Default)]
struct Described {
    label: Option<String>,
    expires: Option<Timestamp>,
    by: Option<By>,
    document: Option<DocumentInForce>,
}
