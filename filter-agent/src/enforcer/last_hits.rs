//! Reads the counters of rules now and then, and notes which have grown.

use std::{collections::BTreeSet, time::Duration};

use anyhow::Result;
use jiff::Timestamp;

use crate::{
    clock::BootTime,
    enforcer::Enforcer,
    kernel::counters::Hits,
    last_hits::{Kept, LastHits},
};

/// How often the counters are read: the last hit of a rule is known to this.
const INTERVAL: Duration = Duration::from_secs(10);

/// The checks come each second, and none exactly then.
const EARLY: Duration = Duration::from_millis(500);

#[derive(Default)]
pub(super) struct Counted {
    pub(super) last_hits: LastHits,
    /// When the counters were read last.
    read: BootTime,
    /// Whether anything changed since the last record for the disk.
    is_changed: bool,
}

impl Counted {
    pub(super) fn note(&mut self, hits: &Hits) {
        let now = BootTime::now();
        self.read = now;
        self.is_changed |= self.last_hits.note(hits, now);
    }

    /// The record for the disk, if it changed since the last one.
    pub(super) fn record(&mut self) -> Option<Kept> {
        let is_changed = std::mem::take(&mut self.is_changed);
        is_changed.then(|| self.last_hits.kept(BootTime::now(), Timestamp::now()))
    }
}

impl Enforcer {
    /// Goes on from what was kept on disk.
    pub fn restore_last_hits(&mut self, last_hits: LastHits) {
        self.counted.last_hits = last_hits;
    }

    pub(super) fn read_hits(&mut self) -> Result<()> {
        let hits = self.filter.hits()?;
        self.counted.note(&hits);
        Ok(())
    }

    /// The same, unless they were read lately.
    pub(super) fn read_hits_if_due(&mut self) -> Result<()> {
        let since = BootTime::now().since(self.counted.read);
        match since + EARLY >= INTERVAL {
            true => self.read_hits(),
            false => Ok(()),
        }
    }

    /// Follows a change of the rules in the kernel. `restarted`: databases whose counters begin at zero.
    pub(super) fn rules_changed(&mut self, restarted: &BTreeSet<String>) {
        let rules = self.filter.image().rules_by_name();
        let now = BootTime::now();
        self.counted.is_changed |= self.counted.last_hits.changed(&rules, restarted, now);
    }

    /// The record for the disk before the agent ends, with hits from after the last check. `None`: nothing changed, the
    /// counters cannot be read, or nothing is to be kept.
    pub fn final_hits(&mut self) -> Option<Kept> {
        if self.is_detached {
            return None;
        }
        // The next start reads them.
        let _ = self.read_hits();
        self.counted.record()
    }
}
