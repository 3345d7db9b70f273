//! How long things take, as histograms. They begin with the agent.

use std::time::Duration;

use anyhow::{Context as _, Result};
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, core::Collector as _, proto::MetricFamily,
};

use crate::{policy::RegionSource, reconcile::Occasion, report::Timing};

/// Upper bounds in seconds: from a change of one prefix to one of a million.
const CHANGES: [f64; 10] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 1.0, 5.0, 10.0];

/// Up to the time limit of a look-up, and beyond.
const LOOK_UPS: [f64; 8] = [0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0];

const DELAYS: [f64; 8] = [0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 30.0];

/// Each clone counts into the same histograms.
#[derive(Clone, Debug)]
pub struct Timings {
    reloads: Histogram,
    changes: Histogram,
    look_ups: HistogramVec,
    loop_delays: Histogram,
}

impl Timings {
    /// # Errors
    /// A name or bounds that the crate refuses.
    pub fn new() -> Result<Self> {
        let options = |name: &str, help: &str, bounds: &[f64]| {
            HistogramOpts::new(name, help).buckets(bounds.to_vec())
        };
        let histogram = |options| Histogram::with_opts(options).context("make a histogram");
        let look_ups = options(
            "filter_agent_look_up_duration_seconds",
            "Duration of look-ups of regions, failed ones included, by the kind of the region's source.",
            &LOOK_UPS,
        );
        let look_ups = HistogramVec::new(look_ups, &["kind"]).context("make a histogram")?;
        for kind in ["dns", "file", "url"] {
            look_ups.with_label_values(&[kind]);
        }
        Ok(Self {
            reloads: histogram(options(
                "filter_agent_reload_duration_seconds",
                "Time from a policy file that was read and checked until it was in force, look-ups of new regions included.",
                &CHANGES,
            ))?,
            changes: histogram(options(
                "filter_agent_change_duration_seconds",
                "Time from a change of a region, a temporary rule or an end until it was in force.",
                &CHANGES,
            ))?,
            look_ups,
            loop_delays: histogram(options(
                "filter_agent_event_loop_delay_seconds",
                "Delay of the main loop's timer, measured once a second.",
                &DELAYS,
            ))?,
        })
    }

    /// A change is in force.
    pub fn in_force(&self, occasion: &Occasion, timing: &Timing) {
        let seconds = timing.enforced_ms / 1000.0;
        match occasion {
            Occasion::Start { .. } => {}
            Occasion::Reload { .. } | Occasion::FallBack => self.reloads.observe(seconds),
            Occasion::Change { .. } => self.changes.observe(seconds),
        }
    }

    pub fn looked_up(&self, source: &RegionSource, duration: Duration) {
        let kind = match source {
            // Never looked up.
            RegionSource::Prefixes(_) => return,
            RegionSource::File(_) => "file",
            RegionSource::Dns(_) => "dns",
            RegionSource::Url(_) => "url",
        };
        let histogram = self.look_ups.with_label_values(&[kind]);
        histogram.observe(duration.as_secs_f64());
    }

    pub fn loop_delay(&self, delay: Duration) {
        self.loop_delays.observe(delay.as_secs_f64());
    }

    pub(super) fn families(&self) -> Vec<MetricFamily> {
        let mut families = self.reloads.collect();
        families.extend(self.changes.collect());
        families.extend(self.look_ups.collect());
        families.extend(self.loop_delays.collect());
        families
    }
}
