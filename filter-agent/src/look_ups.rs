//! The look-ups under way: each has a number, and a result counts only for the latest one of its purpose. Pure.

use std::collections::BTreeMap;

use crate::{policy::Region, region::answer::Version};

/// A look-up to make.
#[derive(Clone, Debug)]
pub struct LookUp {
    pub number: u64,
    pub region: Region,
    /// The version that is known: the source may answer that it is unchanged.
    pub version: Option<Version>,
}

/// The purpose of a look-up.
#[derive(Clone, Debug, PartialEq)]
pub enum Purpose {
    /// A region in force.
    Region {
        name: String,
        /// Whether a quarantined result is taken at once.
        accept: bool,
        /// Numbers of the requests that wait for it.
        waiters: Vec<u64>,
    },
    /// A region of a policy that is not in force yet.
    Proposal { number: u64, name: String },
}

#[derive(Debug, Default)]
pub struct LookUps {
    last: u64,
    under_way: BTreeMap<u64, Purpose>,
}

impl LookUps {
    /// A number that no look-up, proposal or request has had.
    pub fn number(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    pub fn is_under_way(&self, region: &str) -> bool {
        self.under_way
            .values()
            .any(|purpose| matches!(purpose, Purpose::Region { name, .. } if name == region))
    }

    /// Notes a look-up of a region in force. It takes the place of one that is under way: those that wait for
    /// that one wait for this one, and if that one was to be accepted, so is this one.
    pub fn begin(&mut self, region: &str, mut accept: bool, waiter: Option<u64>) -> u64 {
        let mut waiters = Vec::from_iter(waiter);
        for (_, earlier, more) in self.end(|name| name == region) {
            accept |= earlier;
            waiters.extend(more);
        }
        let number = self.number();
        let purpose = Purpose::Region {
            name: region.into(),
            accept,
            waiters,
        };
        self.under_way.insert(number, purpose);
        number
    }

    /// Notes a look-up for a proposal, in place of one for the same region.
    pub fn begin_for_proposal(&mut self, proposal: u64, region: &str) -> u64 {
        let purpose = Purpose::Proposal {
            number: proposal,
            name: region.into(),
        };
        self.under_way.retain(|_, other| *other != purpose);
        let number = self.number();
        self.under_way.insert(number, purpose);
        number
    }

    /// Ends a look-up. Returns its purpose; `None`: a later look-up has taken its place.
    pub fn finish(&mut self, number: u64) -> Option<Purpose> {
        self.under_way.remove(&number)
    }

    /// Whether a proposal waits for a result.
    pub fn is_waiting(&self, proposal: u64) -> bool {
        let is_its = |purpose: &Purpose| matches!(purpose, Purpose::Proposal { number, .. } if *number == proposal);
        self.under_way.values().any(is_its)
    }

    /// Forgets the look-ups of regions in force with such names. Returns the region of each, whether its result was to be
    /// accepted, and the numbers of the requests that wait for it.
    pub fn end(&mut self, is_meant: impl Fn(&str) -> bool) -> Vec<(String, bool, Vec<u64>)> {
        let is_meant =
            |purpose: &Purpose| matches!(purpose, Purpose::Region { name, .. } if is_meant(name));
        let ended = self
            .under_way
            .extract_if(.., |_, purpose| is_meant(purpose))
            .filter_map(|(_, purpose)| match purpose {
                Purpose::Region {
                    name,
                    accept,
                    waiters,
                } => Some((name, accept, waiters)),
                Purpose::Proposal { .. } => None,
            });
        ended.collect()
    }
}
