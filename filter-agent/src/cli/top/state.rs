//! The state of the view, from the reports of the agent. Pure.

use std::{
    collections::{HashMap, VecDeque},
    net::IpAddr,
    time::{Duration, Instant},
};

use jiff::Timestamp;

use crate::{
    cli::top::{
        numbers::short_duration,
        rates::Rates,
        refused::refused,
        rows::{self, Row},
    },
    report::{Drops, Events, Logged, Rule, Status},
};

/// Lines of the log that are kept, as many as the agent keeps.
const MAX_EVENTS: usize = 200;

/// Time without an answer, beyond the interval, after which the view says so.
const SILENCE: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pane {
    Databases,
    Refused,
    Rules,
    Regions,
    Events,
}

pub(super) const PANES: [Pane; 5] = [
    Pane::Databases,
    Pane::Refused,
    Pane::Rules,
    Pane::Regions,
    Pane::Events,
];

/// The reports of one look at the agent.
pub(super) struct Look {
    pub(super) status: Status,
    pub(super) rules: Vec<Rule>,
    pub(super) drops: Drops,
}

/// Determines the meaning of keys.
#[derive(Debug, PartialEq)]
pub(super) enum Mode {
    Normal,
    Help,
    /// The question whether to allow this.
    Question(Wanted),
}

/// A source to be allowed.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Wanted {
    pub(super) database: String,
    pub(super) source: IpAddr,
}

#[derive(Default)]
pub(super) struct Growth {
    /// Packets of databases, by name; of dropped ones also those whose database is not known.
    pub(super) passed: Rates<String>,
    pub(super) dropped: Rates<Option<String>>,
    pub(super) would_drop: Rates<String>,
    /// Hits of rules, by `rows::rule_ids`.
    pub(super) hits: Rates<String>,
}

pub(super) struct State {
    interval: Duration,
    pub(super) look: Option<Look>,
    pub(super) growth: Growth,
    /// When the last answer came; before the first one, when the view began.
    answered: Instant,
    /// Why the last look failed.
    failure: Option<String>,
    /// When the agent began to number its lines.
    numbered_since: Option<Timestamp>,
    /// Oldest first.
    pub(super) events: VecDeque<Logged>,
    /// Why there are no newer ones.
    pub(super) events_error: Option<String>,
    pub(super) focused: Pane,
    /// The chosen row of each pane: its id, and its place when it was chosen.
    chosen: [Option<(String, usize)>; PANES.len()],
    /// The only database that is shown.
    pub(super) database: Option<String>,
    pub(super) mode: Mode,
    /// Result of the last key, until the next one.
    pub(super) message: Vec<String>,
}

impl State {
    pub(super) fn new(interval: Duration, now: Instant) -> Self {
        Self {
            interval,
            look: None,
            growth: Growth::default(),
            answered: now,
            failure: None,
            numbered_since: None,
            events: VecDeque::new(),
            events_error: None,
            focused: Pane::Databases,
            chosen: Default::default(),
            database: None,
            mode: Mode::Normal,
            message: Vec::new(),
        }
    }

    /// Takes the reports of a look that ended at `now`, or the error of one that failed.
    pub(super) fn take_look(&mut self, look: Result<Look, String>, now: Instant) {
        let look = match look {
            Ok(look) => look,
            Err(error) => {
                self.failure = Some(error);
                return;
            }
        };
        self.failure = None;
        self.answered = now;
        let mut passed = HashMap::new();
        let mut would_drop = HashMap::new();
        let mut dropped = HashMap::from([(None, look.status.unattributed.values().sum())]);
        for database in &look.status.databases {
            let name = &database.name;
            passed.insert(name.clone(), database.passed);
            dropped.insert(Some(name.clone()), database.dropped.values().sum());
            would_drop.insert(name.clone(), database.would_drop.values().sum());
        }
        let ids = rows::rule_ids(&look.rules).into_iter();
        let hits = ids.zip(&look.rules).map(|(id, rule)| (id, rule.hits));
        self.growth.hits.add(now, hits.collect());
        self.growth.passed.add(now, passed);
        self.growth.dropped.add(now, dropped);
        self.growth.would_drop.add(now, would_drop);
        self.look = Some(look);
    }

    /// Adds lines of the log. Those of an agent that was started anew take the place of the others.
    pub(super) fn take_events(&mut self, events: Result<Events, String>) {
        let events = match events {
            Ok(events) => events,
            Err(error) => {
                self.events_error = Some(error);
                return;
            }
        };
        self.events_error = None;
        if self.numbered_since.replace(events.since) != Some(events.since) {
            self.events.clear();
        }
        self.events.extend(events.events);
        let surplus = self.events.len().saturating_sub(MAX_EVENTS);
        self.events.drain(..surplus);
    }

    /// `no answer since 12s: ...`; `None`: the last look is as new as it should be.
    pub(super) fn silence(&self, now: Instant) -> Option<String> {
        let since = now.saturating_duration_since(self.answered);
        let is_late = since > self.interval + SILENCE;
        if self.failure.is_none() && !is_late {
            return None;
        }
        let failure = self.failure.as_ref();
        let why = failure.map_or(String::new(), |error| format!(": {error}"));
        Some(match self.look {
            Some(_) => format!("no answer since {}{why}", short_duration(since.as_secs())),
            None => format!("no answer yet{why}"),
        })
    }

    pub(super) fn rows(&self, pane: Pane, now: Timestamp) -> Vec<Row> {
        let Some(look) = &self.look else {
            return Vec::new();
        };
        let only = self.database.as_deref();
        match pane {
            Pane::Databases => rows::databases(&look.status, &self.growth, only),
            Pane::Refused => refused(&look.drops, &look.rules, only, now),
            Pane::Rules => rows::rules(&look.rules, &self.growth.hits, only),
            Pane::Regions => rows::regions(&look.status.regions, &look.rules, only, now),
            Pane::Events => rows::events(&self.events, only, now),
        }
    }

    /// The place of the chosen row. A row that is gone leaves its place to another; without a choice it is the first.
    pub(super) fn chosen(&self, pane: Pane, rows: &[Row]) -> usize {
        match &self.chosen[pane as usize] {
            Some((id, place)) => {
                let same = rows.iter().position(|row| row.id == *id);
                same.unwrap_or_else(|| (*place).min(rows.len().saturating_sub(1)))
            }
            None => 0,
        }
    }

    /// Chooses the row at a place, which it keeps when others come before it. The first place is no choice: what comes
    /// there is shown.
    pub(super) fn choose(&mut self, pane: Pane, rows: &[Row], place: usize) {
        let place = place.min(rows.len().saturating_sub(1));
        let row = rows.get(place).filter(|_| place > 0);
        self.chosen[pane as usize] = row.map(|row| (row.id.clone(), place));
    }
}
