//! Collects the samples of dropped packets.

use anyhow::Result;
use jiff::Timestamp;

use crate::{drops::Wanted, enforcer::Enforcer, reconcile::InForce, report, temporary::Temporary};

/// The sources of dropped packets, with what hints about them are made from.
pub struct Found {
    pub drops: report::Drops,
    pub in_force: InForce,
    /// Temporary rules that ended lately, the latest last.
    pub ended: Vec<Temporary>,
}

impl Enforcer {
    pub(super) fn collect_drops(&mut self) -> Result<()> {
        let dropped = self.filter.dropped()?;
        self.drops.add(dropped, Timestamp::now());
        Ok(())
    }

    /// # Errors
    /// A database that the policy does not have, or a map that cannot be read.
    pub fn drops(&mut self, wanted: &Wanted) -> Result<Found> {
        self.in_force.check_database(wanted.database.as_deref())?;
        self.collect_drops()?;
        Ok(Found {
            drops: self.drops.report(&self.filter.counts()?, wanted),
            in_force: self.in_force.clone(),
            ended: self.drops.ended(),
        })
    }
}
