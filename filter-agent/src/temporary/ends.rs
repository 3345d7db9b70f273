//! When rules end, and what is kept of it on disk.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Kind, Temporary, Timed};
use crate::{
    clock::{BootTime, Now},
    policy::Policy,
    rules::{RuleKey, keyed},
};

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
            for (key, rule) in members.chain(keyed(database)) {
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

    /// These ends and those of others; the nearer one where both have a rule's.
    pub fn nearest(mut self, others: &Self) -> Self {
        for (dated, &end) in &others.0 {
            let nearest = self.0.entry(dated.clone()).or_insert(end);
            *nearest = end.min(*nearest);
        }
        self
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
