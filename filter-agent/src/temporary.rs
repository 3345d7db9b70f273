//! Temporary rules and blocks, and the ends of rules. Pure: no I/O, no clock.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use anyhow::{Error, Result, bail, ensure};
use filter_common::{MAX_BLOCKS, MAX_RULES};
use ipnet::IpNet;
use jiff::{Timestamp, Unit};
use serde::{Deserialize, Serialize};

use crate::{
    clock::{BootTime, Now},
    log::Entry,
    policy::{Database, Model, Policy, Source, check_label, parse_cidr, without},
    policy_file::PolicyFile,
    refusal::Refusal,
    report::{self, By},
    rules::{Regions, RuleKey, held},
    text::list,
};

/// Shortest and longest time that a temporary rule may be given.
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_hours(366 * 24);

/// A change of the temporary rules that a client asks for.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Change {
    Allow(Wanted),
    Block(Wanted),
    Revoke { database: String, source: String },
}

/// A temporary rule that is asked for.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    pub database: String,
    /// A prefix, or an address: that one host.
    pub source: String,
    /// How long it is to last.
    pub seconds: u64,
    #[serde(default)]
    pub label: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Allow,
    Block,
}

/// A rule that `allow` or `block` added to those of the policy.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Temporary {
    pub database: String,
    pub kind: Kind,
    pub source: IpNet,
    pub label: Option<String>,
    pub added: Timestamp,
    pub by: Option<By>,
    pub end: BootTime,
    /// The date of the end, by the host's clock when the rule was added.
    pub until: Timestamp,
}

impl Temporary {
    /// A rule that is added now, without a label.
    pub fn new(database: &str, kind: Kind, source: IpNet, end: BootTime, now: Now) -> Self {
        Self {
            database: database.to_owned(),
            kind,
            source,
            label: None,
            added: now.wall,
            by: None,
            end,
            until: now.date_of(end),
        }
    }

    /// Whether both are the same rule, with whatever end.
    pub fn is_same(&self, other: &Self) -> bool {
        let key = |rule: &Self| (rule.database.clone(), rule.kind, rule.source);
        key(self) == key(other)
    }
}

/// The part of what is enforced that depends on time.
#[derive(Clone, Debug, PartialEq)]
pub struct Timed {
    pub now: Now,
    pub ends: Ends,
    /// Oldest first.
    pub temporary: Vec<Temporary>,
}

impl Timed {
    /// A policy by itself, whose rules end by the host's clock.
    pub fn of(policy: &Policy, now: Now) -> Self {
        Self {
            now,
            ends: Ends::anew(policy, now),
            temporary: Vec::new(),
        }
    }

    pub fn at(&self, now: Now) -> Self {
        Self {
            now,
            ..self.clone()
        }
    }

    /// Returns what is to be enforced after time has passed, and lines for the log about the policy's rules that have ended
    /// since.
    pub fn passed(&self, now: Now) -> (Self, Vec<Entry>) {
        let mut timed = self.at(now);
        timed.drop_ended();
        timed.ends.bring_nearer(now);
        (timed, self.ended(now.boot))
    }

    /// Forgets temporary rules that have ended.
    fn drop_ended(&mut self) {
        let now = self.now.boot;
        self.temporary.retain(|rule| rule.end > now);
    }

    /// Lines for the log about the policy's rules that ended from then on until `now`.
    fn ended(&self, now: BootTime) -> Vec<Entry> {
        let is_new = |end: BootTime| self.now.boot < end && end <= now;
        let dated = self.ends.iter().filter(|(_, end)| is_new(*end));
        let dated = dated.map(|(Dated { database, rule, .. }, _)| {
            let rule = rule.trim_start_matches(['=', '&', '@']);
            let text = format!("database {database}: the rule of {rule} has expired");
            Entry::info(text)
                .with("DATABASE", database)
                .with("RULE", rule)
                .with("REASON", "ended")
        });
        dated.collect()
    }

    /// The temporary rules of databases that a policy has, and filters by source.
    pub fn of_policy(&self, policy: &Policy) -> Vec<Temporary> {
        let has = |rule: &&Temporary| {
            let mut databases = policy.databases.iter();
            databases.any(|database| {
                database.name == rule.database && matches!(database.model, Model::Dedicated { .. })
            })
        };
        self.temporary.iter().filter(has).cloned().collect()
    }

    /// Returns what is to be enforced after a change, and the answer to whoever asked for it.
    ///
    /// # Errors
    /// Why it cannot be made, with what to do instead.
    pub fn changed(
        &self,
        file: &PolicyFile,
        regions: &Regions,
        change: Change,
        by: Option<By>,
    ) -> Result<(Self, report::Temporary)> {
        let mut timed = self.clone();
        timed.drop_ended();
        let done = match change {
            Change::Allow(wanted) => timed.add(file, regions, Kind::Allow, wanted, by)?,
            Change::Block(wanted) => timed.add(file, regions, Kind::Block, wanted, by)?,
            Change::Revoke { database, source } => timed.revoke(file, &database, &source)?,
        };
        Ok((timed, done))
    }

    fn add(
        &mut self,
        file: &PolicyFile,
        regions: &Regions,
        kind: Kind,
        wanted: Wanted,
        by: Option<By>,
    ) -> Result<report::Temporary> {
        let Wanted {
            database,
            source,
            seconds,
            label,
        } = wanted;
        let database = dedicated(&file.policy, &database)?;
        let source = wanted_source(&source)?;
        let lasting = Duration::from_secs(seconds);
        ensure!(
            (SHORTEST..=LONGEST).contains(&lasting),
            Refusal::Unprocessable(format!(
                "a temporary rule lasts from a second to 366 days: {seconds} s is not such a time; for longer write it \
                 into {}",
                file.path.display()
            ))
        );
        let label = label.filter(|label| !label.is_empty());
        if let Some(label) = &label {
            check_label(label).map_err(Refusal::Unprocessable)?;
        }
        let mut notes = Vec::new();
        match kind {
            Kind::Allow => {
                if source.prefix_len() == 0 {
                    notes.push(format!(
                        "as long as it lasts, filtering is off for all of {source}"
                    ));
                }
                self.note_allowed(database, source, regions, &mut notes);
            }
            Kind::Block => self.note_cluster(database, source, regions, &mut notes)?,
        }
        let is_same = |rule: &Temporary| {
            rule.database == database.name && rule.kind == kind && rule.source == source
        };
        self.temporary.retain(|rule| !is_same(rule));
        let count = |rules: &[Temporary]| {
            let same = |rule: &&Temporary| rule.database == database.name && rule.kind == kind;
            rules.iter().filter(same).count()
        };
        let (rules, blocks) = room(database);
        let used = count(&self.temporary);
        let beyond = match used.saturating_sub(rules) {
            0 => String::new(),
            suspended => format!(" ({suspended} more are suspended)"),
        };
        match kind {
            Kind::Allow => ensure!(
                used < rules,
                Refusal::Unprocessable(format!(
                    "database {} has {MAX_RULES} rules, {} of them temporary{beyond}, which is the most: revoke one, or \
                     take one out of {}",
                    database.name,
                    used.min(rules),
                    file.path.display()
                ))
            ),
            Kind::Block => ensure!(
                used < blocks,
                Refusal::Unprocessable(format!(
                    "database {} has {MAX_BLOCKS} blocks, which is the most: revoke one, or block a network that holds \
                     several",
                    database.name
                ))
            ),
        }
        let end = self.now.boot.after(lasting);
        let rule = Temporary::new(&database.name, kind, source, end, self.now);
        // For people, who read no fractions of seconds.
        let until = rule.until.round(Unit::Second).unwrap_or(Timestamp::MAX);
        let rule = Temporary {
            label,
            by,
            until,
            ..rule
        };
        let action = match kind {
            Kind::Allow => report::Action::Allowed,
            Kind::Block => report::Action::Blocked,
        };
        let done = report::Temporary {
            label: rule.label.clone(),
            until: Some(until),
            notes,
            ..report::Temporary::new(&database.name, action, source)
        };
        self.temporary.push(rule);
        Ok(done)
    }

    /// Notes rules that hold the source already, and blocks that hold it or parts of it.
    fn note_allowed(
        &self,
        database: &Database,
        source: IpNet,
        regions: &Regions,
        notes: &mut Vec<String>,
    ) {
        let holding = database
            .rules()
            .iter()
            .chain(&database.cluster)
            .find(|rule| {
                let ended = rule.expires.is_some_and(|at| at <= self.now.wall);
                !ended && without(&[source], &held(rule, regions)).is_empty()
            });
        if let Some(rule) = holding {
            notes.push(format!("{} of the policy allows it already", rule.source));
        }
        let blocks = self.temporary.iter().filter(|block| {
            let touches = block.source.contains(&source) || source.contains(&block.source);
            block.kind == Kind::Block && block.database == database.name && touches
        });
        notes.extend(blocks.map(|block| {
            let (source, until) = (block.source, block.until);
            format!("{source} stays blocked until {until}: to let it in, `filter-agent revoke` it and allow it again")
        }));
    }

    /// Notes members of the cluster that a block does not hold.
    ///
    /// # Errors
    /// A block of members only.
    fn note_cluster(
        &self,
        database: &Database,
        source: IpNet,
        regions: &Regions,
        notes: &mut Vec<String>,
    ) -> Result<()> {
        let members: Vec<IpNet> = database
            .cluster
            .iter()
            .flat_map(|member| held(member, regions))
            .collect();
        ensure!(
            !without(&[source], &members).is_empty(),
            Refusal::Unprocessable(format!(
                "{source} is in the cluster of database {}, which no block changes: take it out of `cluster:` in the \
                 policy file",
                database.name
            ))
        );
        let inside: Vec<&IpNet> = members.iter().filter(|m| source.contains(*m)).collect();
        if !inside.is_empty() {
            let members = list(inside.into_iter());
            notes.push(format!("members of its cluster are not blocked: {members}"));
        }
        Ok(())
    }

    fn revoke(
        &mut self,
        file: &PolicyFile,
        database: &str,
        source: &str,
    ) -> Result<report::Temporary> {
        let database = dedicated(&file.policy, database)?;
        let source = wanted_source(source)?;
        let is_meant = |rule: &Temporary| rule.database == database.name && rule.source == source;
        let label = self
            .temporary
            .iter()
            .filter(|rule| is_meant(rule))
            .find_map(|rule| rule.label.clone());
        if !self.temporary.iter().any(is_meant) {
            bail!(self.not_temporary(file, database, source));
        }
        let meant = self.temporary.iter().filter(|rule| is_meant(rule));
        let ended = meant.map(|rule| match rule.kind {
            Kind::Allow => "the temporary rule",
            Kind::Block => "the block",
        });
        let ended: Vec<&str> = ended.collect();
        let both = (ended.len() > 1).then(|| format!("{} of {source} end", ended.join(" and ")));
        self.temporary.retain(|rule| !is_meant(rule));
        Ok(report::Temporary {
            notes: both.into_iter().collect(),
            label,
            ..report::Temporary::new(&database.name, report::Action::Revoked, source)
        })
    }

    /// Why nothing can be revoked.
    fn not_temporary(&self, file: &PolicyFile, database: &Database, source: IpNet) -> Refusal {
        let written = database.rules().iter().chain(&database.cluster);
        if written
            .map(|rule| &rule.source)
            .any(|s| *s == Source::Cidr(source))
        {
            return Refusal::Conflict(format!(
                "{source} is a rule of the policy file: take it out of {}, then `filter-agent reload`",
                file.path.display()
            ));
        }
        let temporary = self
            .temporary
            .iter()
            .filter(|t| t.database == database.name);
        let temporary: Vec<IpNet> = temporary.map(|rule| rule.source).collect();
        let there = match temporary.is_empty() {
            true => "it has none".to_owned(),
            false => format!("it has {}", list(temporary.iter())),
        };
        Refusal::NotFound(format!(
            "database {} has no temporary rule and no block of {source}; {there}",
            database.name
        ))
    }

    /// The temporary rules and blocks of a database that have not ended and are not suspended, oldest first.
    pub fn in_force<'a>(&'a self, database: &'a Database) -> impl Iterator<Item = &'a Temporary> {
        let mut room = room(database);
        let of_database =
            move |rule: &&Temporary| rule.database == database.name && rule.end > self.now.boot;
        self.temporary
            .iter()
            .filter(of_database)
            .filter(move |rule| {
                let left = match rule.kind {
                    Kind::Allow => &mut room.0,
                    Kind::Block => &mut room.1,
                };
                let fits = *left > 0;
                *left = left.saturating_sub(1);
                fits
            })
    }

    /// Temporary rules that have no room beside the rules of the policy: the newest.
    pub fn suspended<'a>(&'a self, policy: &'a Policy) -> impl Iterator<Item = &'a Temporary> {
        let in_force = |rule: &Temporary| {
            let database = policy.databases.iter().find(|d| d.name == rule.database);
            database.is_none_or(|database| self.in_force(database).any(|found| found == rule))
        };
        let running = self.temporary.iter().filter(|r| r.end > self.now.boot);
        running.filter(move |rule| !in_force(rule))
    }
}

/// How many temporary rules and blocks a database may have.
pub fn room(database: &Database) -> (usize, usize) {
    match &database.model {
        Model::Dedicated { rules } => (MAX_RULES.saturating_sub(rules.len()), MAX_BLOCKS),
        Model::Shared { .. } => (0, 0),
    }
}

/// When the rules with `expires:` end.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ends(BTreeMap<Dated, BootTime>);

/// A rule with an end, as the kernel holds it.
#[derive(Clone, Debug, PartialEq)]
pub struct InKernel {
    pub database: String,
    /// The text of its `RuleKey`.
    pub rule: String,
    pub end: BootTime,
}

impl InKernel {
    /// The temporary rule that it is; `None`: it is of the policy.
    pub fn temporary(&self, now: Now) -> Option<Temporary> {
        let (kind, source) = match RuleKey::parse(&self.rule)? {
            RuleKey::Temporary(source) => (Kind::Allow, source),
            RuleKey::Block(source) => (Kind::Block, source),
            _ => return None,
        };
        Some(Temporary::new(&self.database, kind, source, self.end, now))
    }
}

/// A rule with a date: another date is another end.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
pub struct Dated {
    pub database: String,
    /// The text of its `RuleKey`.
    pub rule: String,
    pub expires: Timestamp,
}

impl Ends {
    /// Computes every end by the host's clock.
    pub fn anew(policy: &Policy, now: Now) -> Self {
        Self::default().with(policy, now)
    }

    /// These ends for the rules that have them, and new ones for the rest of a policy's.
    pub fn with(&self, policy: &Policy, now: Now) -> Self {
        let mut ends = BTreeMap::new();
        for database in &policy.databases {
            let members = database.cluster.iter();
            let members = members.map(|m| (RuleKey::Member(m.source.clone()), m));
            let rules = database
                .rules()
                .iter()
                .map(|r| (RuleKey::Rule(r.source.clone()), r));
            for (key, rule) in members.chain(rules) {
                if let Some(expires) = rule.expires {
                    let dated = Dated {
                        database: database.name.clone(),
                        rule: key.text(),
                        expires,
                    };
                    let known = self.0.get(&dated).copied();
                    let end = known.unwrap_or_else(|| now.boot_time_of(expires));
                    ends.insert(dated, end);
                }
            }
        }
        Self(ends)
    }

    /// The end of a rule.
    pub fn of(&self, database: &str, rule: &RuleKey, expires: Timestamp, now: Now) -> BootTime {
        let dated = Dated {
            database: database.to_owned(),
            rule: rule.text(),
            expires,
        };
        let known = self.0.get(&dated).copied();
        known.unwrap_or_else(|| now.boot_time_of(expires))
    }

    /// These ends and those of others; the nearer one where both have a rule's.
    pub fn nearest(mut self, others: &Self) -> Self {
        for (dated, &end) in &others.0 {
            let nearest = self.0.entry(dated.clone()).or_insert(end);
            *nearest = end.min(*nearest);
        }
        self
    }

    /// Brings ends nearer where the host's clock was set forward. Returns whether any was.
    pub fn bring_nearer(&mut self, now: Now) -> bool {
        // The clocks drift apart by less.
        const SET_FORWARD: Duration = Duration::from_secs(1);
        let mut nearer = false;
        for (dated, end) in &mut self.0 {
            let by_date = now.boot_time_of(dated.expires);
            if end.since(by_date) > SET_FORWARD {
                *end = by_date;
                nearer = true;
            }
        }
        nearer
    }

    /// Takes the ends in the kernel for rules whose end is unknown.
    pub fn adopt(&mut self, policy: &Policy, held: &[InKernel], now: Now) {
        for dated in Self::anew(policy, now).0.into_keys() {
            let same =
                |rule: &&InKernel| rule.database == dated.database && rule.rule == dated.rule;
            if let Some(rule) = held.iter().find(same) {
                self.0.entry(dated).or_insert(rule.end);
            }
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = (&Dated, BootTime)> {
        self.0.iter().map(|(dated, &end)| (dated, end))
    }
}

impl FromIterator<(Dated, BootTime)> for Ends {
    fn from_iter<T: IntoIterator<Item = (Dated, BootTime)>>(ends: T) -> Self {
        Self(ends.into_iter().collect())
    }
}

/// The database of a name.
///
/// # Errors
/// There is none, or its sources are not filtered.
fn dedicated<'a>(policy: &'a Policy, name: &str) -> Result<&'a Database> {
    let mut databases = policy.databases.iter();
    let Some(database) = databases.find(|database| database.name == name) else {
        let names = list(policy.databases.iter().map(|database| &database.name));
        bail!(Refusal::NotFound(format!(
            "no database {name} in the policy, which has {names}"
        )));
    };
    ensure!(
        matches!(database.model, Model::Dedicated { .. }),
        Refusal::Unprocessable(format!(
            "database {name} is shared, and open to the regional network without rules: only a dedicated database has \
             temporary rules and blocks"
        ))
    );
    Ok(database)
}

/// As `parse_source`, of a change.
fn wanted_source(text: &str) -> Result<IpNet> {
    parse_source(text).map_err(|error| Refusal::Unprocessable(format!("{error:#}")).into())
}

/// A prefix, or an address alone: that one host.
///
/// # Errors
/// Names the mistake in the text.
pub fn parse_source(text: &str) -> Result<IpNet> {
    let host: Result<IpAddr, _> = text.parse();
    let prefix = host.map_or_else(
        |_| text.to_owned(),
        |address| IpNet::from(address.to_canonical()).to_string(),
    );
    parse_cidr(&prefix).map_err(Error::msg)
}

/// The ends and temporary rules as they are on disk.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct Kept {
    /// The kernel's id of the boot in which it was written; `None`: unknown.
    pub boot_id: Option<String>,
    /// When it was written.
    pub boot: BootTime,
    /// The latest date that the host's clock has had.
    pub clock: Timestamp,
    pub ends: Vec<(Dated, BootTime)>,
    pub temporary: Vec<Temporary>,
}

impl Kept {
    /// `clock`: the latest date that was kept before.
    pub fn of(timed: &Timed, now: Now, clock: Timestamp) -> Self {
        let ends = timed.ends.iter();
        Self {
            boot_id: None,
            boot: now.boot,
            clock: clock.max(now.wall),
            ends: ends.map(|(dated, end)| (dated.clone(), end)).collect(),
            temporary: timed.temporary.clone(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.ends.is_empty() && self.temporary.is_empty()
    }

    /// Whether both hold the same ends and rules, whenever they were written.
    pub fn holds_the_same(&self, other: &Self) -> bool {
        self.ends == other.ends && self.temporary == other.temporary
    }

    /// Returns the ends and rules as they are in this boot. Over a reboot what is left is the smaller of what was left
    /// when this was written and of what is left by the host's clock, which is not taken earlier than it has been.
    pub fn restore(self, boot_id: Option<&str>, now: Now) -> (Ends, Vec<Temporary>) {
        let is_same = self.boot_id.is_some() && self.boot_id.as_deref() == boot_id;
        let latest = Now {
            wall: now.wall.max(self.clock),
            ..now
        };
        let end = |end: BootTime, date: Timestamp| {
            if is_same {
                return end;
            }
            let left = end.since(self.boot);
            now.boot.after(left).min(latest.boot_time_of(date))
        };
        let ends = self.ends.into_iter().map(|(dated, kept)| {
            let end = end(kept, dated.expires);
            (dated, end)
        });
        let temporary = self.temporary.into_iter().map(|rule| Temporary {
            end: end(rule.end, rule.until),
            ..rule
        });
        let temporary = temporary.filter(|rule| rule.end > now.boot);
        (ends.collect(), temporary.collect())
    }
}

#[cfg(test)]
mod tests;
