//! Changes of the temporary rules that clients ask for.

use std::{fmt::Display, net::IpAddr, time::Duration};

use anyhow::{Error, Result, bail, ensure};
use filter_common::{MAX_BLOCKS, MAX_RULES};
use ipnet::IpNet;
use jiff::{Timestamp, Unit};
use serde::Deserialize;

use super::{Kind, Temporary, Timed, room};
use crate::{
    clock::{BootTime, Now},
    policy::{Database, Model, Policy, Rule, Source, check_label, parse_cidr, without},
    policy_file::PolicyFile,
    refusal::Refusal,
    report::{self, By},
    rules::{Regions, held, rule_id},
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
    Revoke {
        database: String,
        source: String,
    },
    /// Adds a rule, unless it is there.
    #[serde(skip_deserializing)]
    Create(New),
    #[serde(skip_deserializing)]
    Amend(Amendment),
    #[serde(skip_deserializing)]
    Remove {
        database: String,
        id: String,
    },
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

impl Wanted {
    fn of_kind(self, kind: Kind) -> New {
        let Self {
            database,
            source,
            seconds,
            label,
        } = self;
        New {
            database,
            kind,
            source,
            label,
            end: Until::After(seconds),
        }
    }
}

/// A temporary rule or a block that is asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct New {
    pub database: String,
    pub kind: Kind,
    pub source: String,
    pub label: Option<String>,
    pub end: Until,
}

/// What is to become of a rule; `None`: it stays.
#[derive(Clone, Debug, PartialEq)]
pub struct Amendment {
    pub database: String,
    pub id: String,
    /// `Some(None)`: it is to have none.
    pub label: Option<Option<String>>,
    pub end: Option<Until>,
}

/// When a rule is to end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Until {
    /// In so many seconds.
    After(u64),
    At(Timestamp),
}

impl Until {
    /// The end since boot, and as a date for people, who read no fractions of seconds.
    ///
    /// # Errors
    /// It is past, too near or too far.
    fn end(self, now: Now, file: &PolicyFile) -> Result<(BootTime, Timestamp)> {
        let (lasting, what) = match self {
            Self::After(seconds) => (Some(Duration::from_secs(seconds)), format!("{seconds} s")),
            Self::At(date) => {
                let lasting = Duration::try_from(date.duration_since(now.wall));
                (lasting.ok(), format!("the time until {date}"))
            }
        };
        let lasting = lasting.filter(|lasting| (SHORTEST..=LONGEST).contains(lasting));
        let lasting = lasting.ok_or_else(|| {
            Refusal::Unprocessable(format!(
                "a temporary rule lasts from a second to 366 days: {what} is not such a time; for longer write it into {}",
                file.path.display()
            ))
        })?;
        let end = now.boot.after(lasting);
        let date = match self {
            Self::After(_) => now.date_of(end),
            Self::At(date) => date,
        };
        Ok((end, rounded(date)))
    }
}

fn rounded(date: Timestamp) -> Timestamp {
    date.round(Unit::Second).unwrap_or(Timestamp::MAX)
}

impl Timed {
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
            Change::Allow(wanted) => timed.add(file, regions, wanted.of_kind(Kind::Allow), by)?,
            Change::Block(wanted) => timed.add(file, regions, wanted.of_kind(Kind::Block), by)?,
            Change::Revoke { database, source } => timed.revoke(file, &database, &source)?,
            Change::Create(rule) => timed.create(file, regions, rule, by)?,
            Change::Amend(amendment) => timed.amend(file, amendment)?,
            Change::Remove { database, id } => timed.remove(file, &database, &id)?,
        };
        Ok((timed, done))
    }

    fn add(
        &mut self,
        file: &PolicyFile,
        regions: &Regions,
        rule: New,
        by: Option<By>,
    ) -> Result<report::Temporary> {
        let New {
            database,
            kind,
            source,
            label,
            end,
        } = rule;
        let database = dedicated(&file.policy, &database)?;
        let source = wanted_source(&source)?;
        let (end, until) = end.end(self.now, file)?;
        let label = checked(label)?;
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
        let rule = Temporary {
            label,
            by,
            until,
            ..Temporary::new(&database.name, kind, source, end, self.now)
        };
        let done = report::Temporary {
            notes,
            ..describe(&rule)
        };
        self.temporary.push(rule);
        Ok(done)
    }

    /// Adds a rule; one that is there already, as it is asked for, stays as it is.
    fn create(
        &mut self,
        file: &PolicyFile,
        regions: &Regions,
        rule: New,
        by: Option<By>,
    ) -> Result<report::Temporary> {
        let database = dedicated(&file.policy, &rule.database)?;
        let source = wanted_source(&rule.source)?;
        let label = checked(rule.label.clone())?;
        let mut temporary = self.temporary.iter();
        let there = temporary.find(|there| {
            (&there.database, there.kind, there.source) == (&database.name, rule.kind, source)
        });
        let Some(there) = there else {
            return self.add(file, regions, rule, by);
        };
        let id = there.id();
        ensure!(
            there.label == label,
            Refusal::Conflict(format!(
                "{id} is there with another label: change it with PATCH"
            ))
        );
        if let Until::At(date) = rule.end {
            ensure!(
                rounded(date) == there.until,
                Refusal::Conflict(format!(
                    "{id} is there and ends at {}: move its end with PATCH",
                    there.until
                ))
            );
        }
        Ok(report::Temporary {
            changed: false,
            ..describe(there)
        })
    }

    /// Changes label or end of a rule.
    fn amend(&mut self, file: &PolicyFile, amendment: Amendment) -> Result<report::Temporary> {
        let Amendment {
            database,
            id,
            label,
            end,
        } = amendment;
        let now = self.now;
        let place = self.place(file, &database, &id)?;
        let rule = &mut self.temporary[place];
        let before = rule.clone();
        if let Some(label) = label {
            rule.label = checked(label)?;
        }
        match end {
            // The same date again does not move it by what the clocks have drifted apart.
            Some(Until::At(date)) if rounded(date) == rule.until => {}
            Some(end) => (rule.end, rule.until) = end.end(now, file)?,
            None => {}
        }
        Ok(report::Temporary {
            changed: *rule != before,
            ..describe(rule)
        })
    }

    fn remove(&mut self, file: &PolicyFile, database: &str, id: &str) -> Result<report::Temporary> {
        let place = self.place(file, database, id)?;
        let rule = self.temporary.remove(place);
        Ok(report::Temporary {
            label: rule.label,
            ..report::Temporary::new(database, report::Action::Revoked, rule.source)
        })
    }

    /// The place of a temporary rule.
    ///
    /// # Errors
    /// There is none of that id, or it is a rule of the file.
    fn place(&self, file: &PolicyFile, database: &str, id: &str) -> Result<usize> {
        let database = find_database(&file.policy, database)?;
        let mut temporary = self.temporary.iter();
        let place = temporary.position(|r| r.database == database.name && r.id() == id);
        if let Some(place) = place {
            return Ok(place);
        }
        let mut written = database.rules().iter();
        if written.any(|rule| rule_id("file", &rule.source) == id) {
            bail!(Refusal::Conflict(format!(
                "{id} is a rule of the policy file: change it in {}, then `filter-agent reload`",
                file.path.display()
            )));
        }
        let mut fleet = database.fleet_rules().iter();
        if fleet.any(|rule| rule_id("fleet", &rule.source) == id) {
            bail!(Refusal::Conflict(of_the_fleet(
                &id.to_owned(),
                &database.name
            )));
        }
        bail!(Refusal::NotFound(format!(
            "database {} has no rule {id}",
            database.name
        )));
    }

    /// Notes rules that hold the source already, and blocks that hold it or parts of it.
    fn note_allowed(
        &self,
        database: &Database,
        source: IpNet,
        regions: &Regions,
        notes: &mut Vec<String>,
    ) {
        let holds = |rule: &Rule| {
            let ended = rule.expires.is_some_and(|at| at <= self.now.wall);
            !ended && without(&[source], &held(rule, regions)).is_empty()
        };
        let written = database.rules().iter().chain(&database.cluster);
        let written = written.map(|rule| (rule, "policy"));
        let fleet = database.fleet_rules().iter().map(|rule| (rule, "fleet"));
        if let Some((rule, whose)) = written.chain(fleet).find(|(rule, _)| holds(rule)) {
            notes.push(format!("{} of the {whose} allows it already", rule.source));
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
            .flat_map(|member| held(member, regions).to_vec())
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
        let mut fleet = database.fleet_rules().iter();
        if fleet.any(|rule| rule.source == Source::Cidr(source)) {
            return Refusal::Conflict(of_the_fleet(&source, &database.name));
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
}

/// Why a rule of the fleet cannot be changed here, and what can be done.
fn of_the_fleet(rule: &dyn Display, database: &str) -> String {
    format!(
        "{rule} is a rule of the fleet: take it out there (`filter-agent fleet revoke {database} ...`), or block it here \
         for a time"
    )
}

/// The report of a rule that is in force from now on.
fn describe(rule: &Temporary) -> report::Temporary {
    let action = match rule.kind {
        Kind::Allow => report::Action::Allowed,
        Kind::Block => report::Action::Blocked,
    };
    report::Temporary {
        label: rule.label.clone(),
        until: Some(rule.until),
        ..report::Temporary::new(&rule.database, action, rule.source)
    }
}

/// A label as it is kept: an empty one is none.
///
/// # Errors
/// It is too long, or has control characters.
fn checked(label: Option<String>) -> Result<Option<String>> {
    let label = label.filter(|label| !label.is_empty());
    if let Some(label) = &label {
        check_label(label).map_err(Refusal::Unprocessable)?;
    }
    Ok(label)
}

/// The database of a name.
///
/// # Errors
/// There is none.
pub fn find_database<'a>(policy: &'a Policy, name: &str) -> Result<&'a Database> {
    let mut databases = policy.databases.iter();
    let found = databases.find(|database| database.name == name);
    found.ok_or_else(|| {
        let names = list(policy.databases.iter().map(|database| &database.name));
        Refusal::NotFound(format!(
            "no database {name} in the policy, which has {names}"
        ))
        .into()
    })
}

/// The same, if its sources are filtered.
///
/// # Errors
/// There is none, or they are not.
fn dedicated<'a>(policy: &'a Policy, name: &str) -> Result<&'a Database> {
    let database = find_database(policy, name)?;
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
