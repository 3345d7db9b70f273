//! One scrape at a time: from the agent's snapshot and the thread that owns the filter to the text that is served.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use tokio::sync::{Mutex, watch};

use crate::{
    clock::Clock,
    enforcer::{Enforcer, Handle},
    kernel::fill::Fill,
    log::Entry,
    metrics::{Values, process::Usage, timings::Timings},
    snapshot::Snapshot,
};

/// A text, or why there is none, is served again for this long: however often it is asked for, it costs the agent little.
const FRESH_FOR: Duration = Duration::from_secs(1);

/// How often the maps are listed that the programs fill.
const LISTED_EVERY: Duration = Duration::from_secs(30);

/// Time allowed for the thread that owns the filter, which may be making a change.
const OBSERVE_TIMEOUT: Duration = Duration::from_secs(8);

/// Makes the text of the metrics.
pub struct Scraper {
    pub snapshot: watch::Receiver<Snapshot>,
    pub enforcer: Handle,
    pub clock: Clock,
    pub timings: Timings,
    /// Why metrics are not served on the address of the policy.
    pub listener: watch::Receiver<Option<String>>,
    last: Mutex<Last>,
}

#[derive(Default)]
struct Last {
    text: Option<(Instant, Result<String, String>)>,
    listed: Option<(Instant, Vec<Fill>)>,
}

impl Scraper {
    pub fn new(
        snapshot: watch::Receiver<Snapshot>,
        enforcer: Handle,
        clock: Clock,
        timings: Timings,
        listener: watch::Receiver<Option<String>>,
    ) -> Self {
        Self {
            snapshot,
            enforcer,
            clock,
            timings,
            listener,
            last: Mutex::default(),
        }
    }

    /// # Errors
    /// The kernel's state cannot be read back, or that takes too long.
    pub async fn text(&self) -> Result<String, String> {
        let mut last = self.last.lock().await;
        if let Some((at, text)) = &last.text
            && at.elapsed() < FRESH_FOR
        {
            return text.clone();
        }
        let text = self.new_text(&mut last).await;
        let text = text.map_err(|error| format!("{error:#}"));
        last.text = Some((Instant::now(), text.clone()));
        text
    }

    async fn new_text(&self, last: &mut Last) -> Result<String> {
        let is_old = |(at, _): &(Instant, Vec<Fill>)| at.elapsed() >= LISTED_EVERY;
        let lists = last.listed.as_ref().is_none_or(is_old);
        let look = self.enforcer.call(move |enforcer: &mut Enforcer| {
            let observed = enforcer.observe(false)?;
            let listed = lists.then(|| enforcer.program_fills());
            let fills = enforcer.own_fills();
            anyhow::Ok((observed, fills, listed, enforcer.formerly_allowed()))
        });
        let looked = tokio::time::timeout(OBSERVE_TIMEOUT, look).await;
        let looked = looked.context("read back what is enforced: a change is under way")?;
        let ((observed, entries), mut fills, listed, formerly_allowed) = looked.flatten()?;
        entries.into_iter().for_each(Entry::log);
        match listed {
            Some(Ok(listed)) => last.listed = Some((Instant::now(), listed)),
            // Unknown, and absent from the text.
            Some(Err(_)) => last.listed = None,
            None => {}
        }
        fills.extend(last.listed.iter().flat_map(|(_, listed)| listed.clone()));
        let snapshot = self.snapshot.borrow().clone();
        let mut status = snapshot.status(&observed, self.clock.now());
        status.errors.extend(self.listener.borrow().clone());
        let rules = observed.rules(None, None, self.clock.now())?;
        let values = Values {
            usage: Usage::read(snapshot.started),
            snapshot: &snapshot,
            status: &status,
            rules: &rules,
            fills: &fills,
            formerly_allowed: &formerly_allowed,
            timings: &self.timings,
        };
        values.text()
    }
}
