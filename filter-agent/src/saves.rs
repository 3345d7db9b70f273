//! Which records are on disk, on their way there, or could not be written. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use anyhow::Result;
use jiff::Timestamp;

use crate::{
    host::coverage::Remembered,
    log::Entry,
    region::state::State,
    store::{Confirmed, Record, Write},
};

/// How often a set that stays the same is written to disk, for the time it was confirmed.
const SAVE_AGAIN: Duration = Duration::from_mins(10);

/// Pause before a set that could not be written is written again.
const RETRY: Duration = Duration::from_mins(1);

#[derive(Debug)]
pub struct Saves {
    /// The confirmed policy that was given to the store last.
    confirmed: Option<Confirmed>,
    /// Whether that one is on its way to disk.
    is_confirming: bool,
    /// When each region's set was given to the store last.
    regions: BTreeMap<String, Timestamp>,
    /// Why records are not on disk.
    errors: BTreeMap<Record, String>,
}

impl Saves {
    /// `confirmed`: as it is on disk. `regions`: those whose set is on disk.
    pub fn new(
        confirmed: Option<Confirmed>,
        regions: impl Iterator<Item = String>,
        now: Timestamp,
    ) -> Self {
        Self {
            confirmed,
            is_confirming: false,
            regions: regions.map(|name| (name, now)).collect(),
            errors: BTreeMap::new(),
        }
    }

    /// The write that keeps the policy in force for the next start; `None`: it is on disk.
    pub fn confirm(&mut self, policy: &str, interfaces: &Remembered) -> Option<Write> {
        let is_same = |kept: &Confirmed| kept.policy == policy && kept.interfaces == *interfaces;
        let is_saved = self.confirmed.as_ref().is_some_and(is_same);
        if is_saved && self.error(&Record::Confirmed).is_none() {
            return None;
        }
        let confirmed = Confirmed {
            policy: policy.into(),
            interfaces: interfaces.clone(),
            machine: None,
        };
        self.confirmed = Some(confirmed.clone());
        self.is_confirming = true;
        Some(Write::Confirmed(Some(confirmed)))
    }

    /// The write that keeps no policy for the next start.
    pub fn forget(&mut self) -> Write {
        self.confirmed = None;
        self.is_confirming = true;
        Write::Confirmed(None)
    }

    /// Whether the confirmed policy, or its removal, is on its way to disk.
    pub fn is_confirming(&self) -> bool {
        self.is_confirming
    }

    /// The write of a region's set, if it changed or its time on disk is old.
    pub fn region(
        &mut self,
        name: &str,
        state: &State,
        changed: bool,
        now: Timestamp,
    ) -> Option<Write> {
        let failed = self.errors.contains_key(&Record::Region(name.into()));
        let pause = if failed { RETRY } else { SAVE_AGAIN };
        let is_old = |saved: &Timestamp| *saved + pause <= now;
        let set = state.set.as_ref()?;
        let is_due = changed || self.regions.get(name).is_none_or(is_old);
        if !is_due || state.region.is_constant() {
            return None;
        }
        self.regions.insert(name.into(), now);
        Some(Write::Region {
            name: name.into(),
            source: state.region.source.clone().into(),
            set: set.clone().into(),
        })
    }

    /// The write that leaves nothing of other regions: it would be out of date when a rule names one again.
    pub fn keep_only(&mut self, names: BTreeSet<String>) -> Write {
        self.regions.retain(|name, _| names.contains(name));
        let is_gone =
            |record: &Record| matches!(record, Record::Region(name) if !names.contains(name));
        self.errors.retain(|record, _| !is_gone(record));
        Write::Regions(names)
    }

    /// Notes the result of a write. Returns a line for the log.
    pub fn written(&mut self, write: &Write, result: Result<()>) -> Option<Entry> {
        let record = &write.record();
        // A version that was overtaken says nothing about the latest one.
        if let Write::Confirmed(written) = write
            && *written == self.confirmed
        {
            self.is_confirming = false;
        }
        let entry = |entry: Entry| match record {
            Record::Region(name) => entry.with("REGION", name),
            _ => entry,
        };
        match result {
            Ok(()) => {
                self.errors.remove(record)?;
                Some(entry(Entry::info(match record {
                    Record::Confirmed => "the policy in force is kept for the next start".into(),
                    Record::Region(name) => {
                        format!("region {name}: its set is kept on disk again")
                    }
                    Record::Regions => "the sets of unused regions are removed".into(),
                })))
            }
            Err(error) => {
                let error = match record {
                    Record::Confirmed if *write != Write::Confirmed(None) => {
                        format!("the policy in force is not kept for the next start: {error:#}")
                    }
                    Record::Region(name) => format!("region {name}: {error:#}"),
                    Record::Confirmed | Record::Regions => format!("{error:#}"),
                };
                let is_new = self.error(record) != Some(&error);
                self.errors.insert(record.clone(), error.clone());
                is_new.then(|| entry(Entry::warning(error)))
            }
        }
    }

    /// Why a record is not on disk; `None`: it is, or is on its way.
    pub fn error(&self, record: &Record) -> Option<&String> {
        self.errors.get(record)
    }

    /// Regions whose set could not be written.
    pub fn failed_regions(&self) -> Vec<String> {
        let failed = self.errors.keys().filter_map(|record| match record {
            Record::Region(name) => Some(name.clone()),
            _ => None,
        });
        failed.collect()
    }

    pub fn errors(&self) -> impl Iterator<Item = &String> {
        self.errors.values()
    }
}
