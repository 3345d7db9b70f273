//! The window of a confirmed reload: a policy that is tried until somebody confirms it, and the texts that were fallen or
//! rolled back from. Pure: no I/O, no clock.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use jiff::{Timestamp, Unit};
use serde::{Deserialize, Serialize};

use crate::{
    clock::{BootTime, Now},
    policy::{Policy, spelled},
    policy_file::PolicyFile,
    refusal::Refusal,
    region::state::{Regions, Set, State},
    report::{self, By},
    temporary::{self, Ends, Temporary, Timed},
};

/// Shortest and longest window.
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_hours(24);

/// Checks how long a window lasts.
///
/// # Errors
/// The bounds, in words.
pub fn check_lasting(lasting: Duration) -> Result<(), String> {
    match (SHORTEST..=LONGEST).contains(&lasting) {
        true => Ok(()),
        false => Err(format!(
            "a policy is tried for {} to {}",
            spelled(SHORTEST),
            spelled(LONGEST)
        )),
    }
}

/// Abandoned texts that are remembered.
const MAX_ABANDONED: usize = 20;

/// The window and the abandoned texts, as they are on disk.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct Kept {
    pub open: Option<Open>,
    pub abandoned: Abandoned,
}

impl Kept {
    /// Whether there is nothing to keep.
    pub fn is_empty(&self) -> bool {
        self.open.is_none() && self.abandoned.0.is_empty()
    }
}

/// A window that is open.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Open {
    /// The id of the change.
    pub id: u64,
    pub by: Option<By>,
    pub opened: Timestamp,
    pub end: BootTime,
    /// The tried policy: its file and text.
    pub path: PathBuf,
    pub policy: String,
    /// The ends and temporary rules before the reload, and the boot in which they and `end` count.
    pub before: temporary::Kept,
    /// Sets of regions of the confirmed policy to which the tried one gives another source: it has their place on disk.
    pub regions: BTreeMap<String, Set>,
}

impl Open {
    /// Whether the window is still open in this boot. Where the boot is unknown it is not: time may have passed uncounted.
    pub fn lasts(&self, boot_id: Option<&str>, now: Now) -> bool {
        self.is_of_boot(boot_id) && self.end > now.boot
    }

    pub fn is_of_boot(&self, boot_id: Option<&str>) -> bool {
        self.before.boot_id.is_some() && self.before.boot_id.as_deref() == boot_id
    }

    pub fn report(&self, now: Now) -> report::Window {
        self.brief().report(now)
    }

    pub fn brief(&self) -> Brief {
        Brief {
            id: self.id,
            by: self.by.clone(),
            opened: self.opened,
            end: self.end,
        }
    }

    /// The command that confirms it, for messages.
    pub fn command(&self) -> String {
        format!("`filter-agent confirm {}`", self.id)
    }
}

/// What readers learn of a window.
#[derive(Clone, Debug)]
pub struct Brief {
    id: u64,
    by: Option<By>,
    opened: Timestamp,
    end: BootTime,
}

impl Brief {
    pub fn report(&self, now: Now) -> report::Window {
        let until = now.date_of(self.end);
        report::Window {
            id: self.id,
            opened: self.opened,
            until: until.round(Unit::Second).unwrap_or(until),
            left: self.end.since(now.boot).as_secs(),
            by: self.by.clone(),
        }
    }
}

/// Why another change has to wait for the end of a window.
pub fn refusal(open: &Open, now: Now) -> Refusal {
    Refusal::Conflict(format!(
        "{}: {} keeps it, `filter-agent confirm {} --fall-back` takes it back at once",
        open.report(now),
        open.command(),
        open.id
    ))
}

/// A window that is open, with all that falling back takes.
#[derive(Debug)]
pub struct Window {
    pub open: Open,
    /// The confirmed policy.
    pub before: Arc<PolicyFile>,
    /// Its regions when the window was opened.
    pub regions: Regions,
    /// The kernel refused to fall back, and that is tried again.
    pub is_refused: bool,
}

impl Window {
    /// Returns the regions with which the confirmed policy is enforced: as they are now where the tried policy has the same
    /// source, and as they were before elsewhere. Those are looked up again at once.
    pub fn known_regions(&self, now: &Regions, time: Timestamp) -> Regions {
        let known = |(name, before): (&String, &State)| {
            let same = now
                .get(name)
                .filter(|state| state.region.source == before.region.source);
            let mut state = same.unwrap_or(before).clone();
            if same.is_none() && !state.region.is_constant() {
                state.next = Some(time);
            }
            (name.clone(), state)
        };
        let mut regions = now.clone();
        regions.extend(self.regions.iter().map(known));
        regions
    }

    /// Returns the ends and temporary rules with which the confirmed policy is enforced. `tried`: the tried policy.
    pub fn timed(&self, tried: &Policy, current: &Timed, now: Now) -> Timed {
        let kept = &self.open.before;
        let ends = kept.ends.iter().cloned().collect();
        let before = (ends, kept.temporary.clone());
        timed(before, &self.before.policy, tried, current.clone(), now)
    }
}

/// Returns the ends and temporary rules with which the confirmed policy is enforced again: no end later than it was
/// before the reload, what was changed meanwhile, and the temporary rules of databases that the tried policy lacks.
pub fn timed(
    (ends, temporary): (Ends, Vec<Temporary>),
    confirmed: &Policy,
    tried: &Policy,
    current: Timed,
    now: Now,
) -> Timed {
    let before = Timed {
        now,
        ends: Ends::default(),
        temporary,
    };
    let tried = before.of_policy(tried);
    let mut temporary = before.temporary;
    temporary.retain(|rule| !tried.contains(rule));
    temporary.extend(current.temporary);
    temporary.retain(|rule| rule.end > now.boot);
    temporary.sort_by_key(|rule| rule.added);
    let mut ends = ends.nearest(&current.ends).with(confirmed, now);
    ends.bring_nearer(now);
    let all = Timed {
        now,
        ends,
        temporary,
    };
    Timed {
        temporary: all.of_policy(confirmed),
        ..all
    }
}

/// Sets of regions that the tried policy looks up from another source than the confirmed one does.
pub fn displaced(before: &Regions, after: &Regions) -> BTreeMap<String, Set> {
    let displaced = before.iter().filter_map(|(name, state)| {
        let other = after.get(name)?;
        let is_displaced =
            other.region.source != state.region.source && !state.region.is_constant();
        let set = state.set.clone().filter(|_| is_displaced)?;
        Some((name.clone(), set))
    });
    displaced.collect()
}

/// Why a text is not to be enforced at a start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// Nobody confirmed it in time.
    Expired,
    /// By `confirm --fall-back`.
    TakenBack,
    /// By `rollback`.
    RolledBack,
}

/// A text that was fallen or rolled back from.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Text {
    /// Its SHA-256.
    pub hash: String,
    pub reason: Reason,
    /// The id of the change that enforced it. `None`: unknown.
    pub id: Option<u64>,
    pub at: Timestamp,
}

impl std::fmt::Display for Text {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.id {
            Some(id) => write!(f, "change {id} ")?,
            None => f.write_str("its text ")?,
        }
        let at = self.at.round(Unit::Second).unwrap_or(self.at);
        match self.reason {
            Reason::Expired => write!(f, "fell back at {at}, since nobody confirmed it in time"),
            Reason::TakenBack => write!(f, "was taken back at {at}"),
            Reason::RolledBack => write!(f, "was rolled back at {at}"),
        }
    }
}

/// The texts that were fallen or rolled back from: the oldest first, each once.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(transparent)]
pub struct Abandoned(Vec<Text>);

impl Abandoned {
    pub fn add(&mut self, text: Text) {
        self.remove(&text.hash);
        self.0.push(text);
        let surplus = self.0.len().saturating_sub(MAX_ABANDONED);
        self.0.drain(..surplus);
    }

    /// Returns whether it was there.
    pub fn remove(&mut self, hash: &str) -> bool {
        let before = self.0.len();
        self.0.retain(|text| text.hash != hash);
        self.0.len() < before
    }

    pub fn find(&self, hash: &str) -> Option<&Text> {
        self.0.iter().find(|text| text.hash == hash)
    }

    /// The text of a change; without an id the last one whose window has ended without being confirmed.
    pub fn of_change(&self, id: Option<u64>) -> Option<&Text> {
        let mut texts = self.0.iter().rev();
        texts.find(|text| match id {
            Some(id) => text.id == Some(id),
            None => text.reason != Reason::RolledBack,
        })
    }
}

/// Why a policy file with an abandoned text is not enforced, and what to type.
pub fn describe_abandoned(file: &std::path::Path, text: &Text) -> String {
    let file = file.display();
    format!(
        "{file} is not enforced: {text}; change the file, or `filter-agent reload` to enforce it as it is"
    )
}

#[cfg(test)]
mod tests;
