//! Policies that wait for their file or their regions, and reloads that wait for the one before them. Pure.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Result;

use crate::{
    event::{ReloadOptions, Reply},
    policy::Region,
    policy_file::PolicyFile,
    region::{answer::Answer, state::used},
    report,
};

#[derive(Debug)]
pub struct Proposal {
    pub aim: Aim,
    /// `None`: it is being read.
    pub file: Option<Arc<PolicyFile>>,
    /// By region.
    pub answers: BTreeMap<String, Result<Answer>>,
}

#[derive(Debug)]
pub enum Aim {
    Reload(Reload),
    Plan {
        caller: Option<IpAddr>,
        reply: Reply<report::Plan>,
    },
}

/// The policy that a reload enforces.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Wanted {
    /// The policy file, as it is when the reload's turn comes.
    File,
    /// The policy of a change; `None`: the one that was confirmed before the one in force.
    Rollback { to: Option<u64> },
}

impl Wanted {
    /// For messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::File => "reload",
            Self::Rollback { .. } => "rollback",
        }
    }
}

#[derive(Debug)]
pub struct Reload {
    pub wanted: Wanted,
    pub options: ReloadOptions,
    /// `None` for SIGHUP.
    pub reply: Option<Reply<report::Reloaded>>,
}

#[derive(Debug, Default)]
pub struct Proposals {
    by_number: BTreeMap<u64, Proposal>,
    /// Reloads come one after the other.
    waiting: VecDeque<Reload>,
    is_reloading: bool,
}

impl Proposals {
    /// Returns the reload, if it is its turn; else it waits for `next_reload`. One that nobody waits for is dropped where
    /// another such one waits, which reads the file later than now.
    pub fn reload(&mut self, reload: Reload) -> Option<Reload> {
        let is_hangup = |reload: &Reload| reload.reply.is_none();
        if is_hangup(&reload) && self.waiting.iter().any(is_hangup) {
            return None;
        }
        self.waiting.push_back(reload);
        if self.is_reloading {
            return None;
        }
        self.is_reloading = true;
        self.waiting.pop_front()
    }

    /// Ends the reload under way. Returns the next one.
    pub fn next_reload(&mut self) -> Option<Reload> {
        let next = self.waiting.pop_front();
        self.is_reloading = next.is_some();
        next
    }

    pub fn begin(&mut self, number: u64, aim: Aim) {
        let proposal = Proposal {
            aim,
            file: None,
            answers: BTreeMap::new(),
        };
        self.by_number.insert(number, proposal);
    }

    pub fn get(&self, number: u64) -> Option<&Proposal> {
        self.by_number.get(&number)
    }

    pub fn get_mut(&mut self, number: u64) -> Option<&mut Proposal> {
        self.by_number.get_mut(&number)
    }

    pub fn remove(&mut self, number: u64) -> Option<Proposal> {
        self.by_number.remove(&number)
    }

    /// The regions that a changed file concerns, by proposal. What was answered about them is forgotten.
    pub fn file_changed(&mut self, path: &Path) -> Vec<(u64, String, Region)> {
        let mut changed = Vec::new();
        for (&number, proposal) in &mut self.by_number {
            let Some(file) = &proposal.file else { continue };
            let used: BTreeSet<&String> = used(&file.policy).collect();
            for name in used {
                if let Some(region) = file.policy.regions.get(name)
                    && region.file().is_some_and(|file| file == path)
                {
                    proposal.answers.remove(name);
                    changed.push((number, name.clone(), region.clone()));
                }
            }
        }
        changed
    }

    /// The files of regions.
    pub fn region_files(&self) -> impl Iterator<Item = &PathBuf> {
        let files = self.by_number.values().filter_map(|p| p.file.as_ref());
        let regions = files.flat_map(|file| file.policy.regions.values());
        regions.filter_map(Region::file)
    }
}
