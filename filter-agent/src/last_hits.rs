//! When each rule last allowed or blocked a packet, and since when it is counted. Pure.

use std::collections::{BTreeMap, BTreeSet, btree_map::Entry};

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::{
    clock::{BootTime, Now},
    kernel::counters::Hits,
};

/// Identifies a rule over reloads: its database, and the text of its `RuleKey`.
pub type Key = (String, String);

/// The rules that the kernel holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LastHits(BTreeMap<Key, Seen>);

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
struct Seen {
    /// The kernel's counter when it was read last.
    hits: u64,
    since: Moment,
    last: Option<Moment>,
}

/// A time that has passed. Within a boot the clock that cannot be set counts: a host may boot with a wrong date, and correct
/// it later.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
enum Moment {
    /// Of this boot.
    Boot(BootTime),
    /// Before it.
    Date(Timestamp),
}

impl Moment {
    /// The date, by the host's clock as it is now, in whole seconds. Never later than now, however the clock was set.
    fn on_host(self, now: Now) -> Timestamp {
        let date = match self {
            Self::Boot(time) => now.date_of(time.min(now.boot)),
            Self::Date(date) => date.min(now.date_of(BootTime(0))),
        };
        // The clocks are not read at once: a finer date would change from look to look.
        Timestamp::from_second(date.as_second()).unwrap_or(date)
    }

    /// The same moment in a later boot.
    fn before_boot(self, written: BootTime, clock: Timestamp) -> Self {
        match self {
            Self::Boot(time) => {
                let age = SignedDuration::try_from(written.since(time)).unwrap_or_default();
                Self::Date(clock.checked_sub(age).unwrap_or(Timestamp::MIN))
            }
            date @ Self::Date(_) => date,
        }
    }
}

/// The last hit of a rule, by the host's clock.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LastHit {
    /// `None`: none since it is counted.
    pub at: Option<Timestamp>,
    pub counted_since: Timestamp,
}

impl LastHits {
    /// Notes the kernel's counters. Rules that are not among them are forgotten. A rule that is new is counted from now
    /// on: when the packets that its counter has already came is unknown. Returns whether anything changed.
    pub fn note(&mut self, hits: &Hits, now: BootTime) -> bool {
        let known = self.0.len();
        self.0.retain(|key, _| hits.contains_key(key));
        let mut changed = self.0.len() != known;
        for (key, &hits) in hits {
            match self.0.entry(key.clone()) {
                Entry::Vacant(new) => {
                    new.insert(Seen::begin(hits, now));
                    changed = true;
                }
                Entry::Occupied(mut known) => {
                    let seen = known.get_mut();
                    // A smaller number is of a counter that began anew.
                    let grew = hits > seen.hits || hits < seen.hits && hits > 0;
                    if grew {
                        seen.last = Some(Moment::Boot(now));
                    }
                    changed |= hits != seen.hits;
                    seen.hits = hits;
                }
            }
        }
        changed
    }

    /// Notes the rules that the kernel holds after a change: those that are gone are forgotten, new ones are counted from
    /// zero. `restarted`: databases whose counters begin at zero.
    pub fn changed(
        &mut self,
        rules: &BTreeSet<Key>,
        restarted: &BTreeSet<String>,
        now: BootTime,
    ) -> bool {
        let before = self.clone();
        self.0.retain(|key, _| rules.contains(key));
        for (database, rule) in rules {
            let seen = self.0.entry((database.clone(), rule.clone()));
            let seen = seen.or_insert_with(|| Seen::begin(0, now));
            if restarted.contains(database) {
                seen.hits = 0;
            }
        }
        *self != before
    }

    /// The last hit of a rule; `None`: the kernel does not hold it.
    pub fn of(&self, database: &str, rule: &str, now: Now) -> Option<LastHit> {
        let seen = self.0.get(&(database.to_owned(), rule.to_owned()))?;
        Some(LastHit {
            at: seen.last.map(|last| last.on_host(now)),
            counted_since: seen.since.on_host(now),
        })
    }

    /// The record for the disk.
    pub fn kept(&self, boot: BootTime, clock: Timestamp) -> Kept {
        let rules = self.0.iter();
        Kept {
            boot_id: None,
            boot,
            clock,
            rules: rules
                .map(|((database, rule), seen)| KeptRule {
                    database: database.clone(),
                    rule: rule.clone(),
                    seen: seen.clone(),
                })
                .collect(),
        }
    }
}

impl Seen {
    fn begin(hits: u64, now: BootTime) -> Self {
        Self {
            hits,
            since: Moment::Boot(now),
            last: None,
        }
    }
}

/// Last hits as they are on disk.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct Kept {
    /// The kernel's id of the boot in which it was written; `None`: unknown.
    boot_id: Option<String>,
    /// When it was written.
    boot: BootTime,
    /// The date of the host's clock then.
    clock: Timestamp,
    rules: Vec<KeptRule>,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
struct KeptRule {
    database: String,
    rule: String,
    #[serde(flatten)]
    seen: Seen,
}

impl Kept {
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    pub fn of_boot(self, boot_id: Option<String>) -> Self {
        Self { boot_id, ..self }
    }

    /// Returns the last hits as they are in this boot. After a reboot the kernel counts from zero.
    pub fn restore(self, boot_id: Option<&str>) -> LastHits {
        let is_same = self.boot_id.is_some() && self.boot_id.as_deref() == boot_id;
        let (written, clock) = (self.boot, self.clock);
        let in_this_boot = |seen: Seen| match is_same {
            true => seen,
            false => Seen {
                hits: 0,
                since: seen.since.before_boot(written, clock),
                last: seen.last.map(|last| last.before_boot(written, clock)),
            },
        };
        let rules = self.rules.into_iter();
        LastHits(
            rules
                .map(|kept| ((kept.database, kept.rule), in_this_boot(kept.seen)))
                .collect(),
        )
    }
}

#[cfg(test)]
mod tests;
