//! What is known of the fleet's documents: last good ones, what is held or refused, and since when. Pure: answers and times are
//! parameters.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    fleet::Answer,
    policy::{Document, Policy},
};

#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    documents: BTreeMap<String, Good>,
}

/// The last good document of a database.
#[derive(Clone, Debug, PartialEq)]
pub struct Good {
    pub create_revision: i64,
    pub mod_revision: i64,
    pub version: i64,
    pub sha256: String,
    pub since: Timestamp,
    pub document: Document,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct Kept {}

impl State {
    pub fn restore(_kept: Kept, _policy: &Policy, _now: Timestamp) -> Self {
        Self::default()
    }

    pub fn kept(&self) -> Kept {
        Kept {}
    }

    pub fn under(&self, _policy: &Policy) -> Self {
        self.clone()
    }

    pub fn take(&self, _answer: &Answer, _policy: &Policy, _now: Timestamp) -> Self {
        self.clone()
    }

    pub fn lost(&mut self, _error: String, _now: Timestamp) {}

    /// Marks rollouts whose time is over; `None`: there are no new ones. What is marked stays over, however the clock is set.
    pub fn without_rollouts_over(&self, _wall: Timestamp) -> Option<Self> {
        None
    }

    pub fn documents(&self) -> &BTreeMap<String, Good> {
        &self.documents
    }
}
