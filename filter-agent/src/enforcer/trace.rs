//! A trace: the traced programs run while a client reads what they log, one at a time, for a limited time.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use ipnet::IpNet;
use jiff::Timestamp;

use super::Enforcer;
use crate::{
    kernel::traced::{TracePlace, Traced},
    log::Entry,
    policy::spelled,
    refusal::Refusal,
    report::{self, By, TraceLine},
    trace::{self, Names},
};

/// Longest and usual time of a trace.
pub const LONGEST_TRACE: Duration = Duration::from_secs(600);
pub const USUAL_TRACE: Duration = Duration::from_secs(60);

/// Time allowed for the kernel to verify the programs of a trace: a busy host takes seconds.
pub const LOAD_TIMEOUT: Duration = Duration::from_secs(60);

/// How often the programs may log `LINES_GRANTED` more lines.
const GRANT_INTERVAL: Duration = Duration::from_secs(1);

/// A client's request for a trace.
#[derive(Clone, Debug)]
pub struct TraceRequest {
    pub source: IpNet,
    /// `None`: packets for any database, and for none.
    pub database: Option<String>,
    pub time: Duration,
    pub by: Option<By>,
}

/// The trace that is on or being loaded, and how the one before ended.
#[derive(Default)]
pub(super) struct Traces {
    current: Option<Trace>,
    /// Of the last trace: its lines that were not read yet, and why it ended.
    last: Option<(u64, Vec<TraceLine>)>,
    numbers: u64,
}

struct Trace {
    number: u64,
    request: TraceRequest,
    end: Instant,
    until: Timestamp,
    granted: Instant,
    /// Names of the interfaces by index.
    interfaces: BTreeMap<u32, String>,
}

impl Trace {
    fn describe(&self) -> String {
        let of = match &self.request.database {
            Some(database) => format!(" to database {database}"),
            None => String::new(),
        };
        format!("trace of {}{of}", self.request.source)
    }

    fn entry(&self, text: String) -> Entry {
        let entry = Entry::info(text).with("PREFIX", self.request.source.to_string());
        match &self.request.database {
            Some(database) => entry.with("DATABASE", database.clone()),
            None => entry,
        }
    }

    fn describe_by(&self) -> String {
        match &self.request.by {
            Some(by) => format!(", by {by}"),
            None => String::new(),
        }
    }
}

impl Enforcer {
    /// Makes room for a trace. Returns its number, and what it is loaded over.
    ///
    /// # Errors
    /// Another trace, nothing that is filtered, a database that the policy does not have.
    pub fn prepare_trace(&mut self, request: TraceRequest) -> Result<(u64, TracePlace)> {
        ensure!(
            !self.is_detached,
            Refusal::Unavailable("the filter is detached".into())
        );
        self.in_force.check_database(request.database.as_deref())?;
        ensure!(
            (Duration::from_secs(1)..=LONGEST_TRACE).contains(&request.time),
            Refusal::Invalid(format!(
                "a trace lasts from 1s to {}",
                spelled(LONGEST_TRACE)
            ))
        );
        if let Some(current) = &self.traces.current {
            bail!(Refusal::Conflict(format!(
                "a {} is on until {:.0}{}: one at a time",
                current.describe(),
                current.until,
                current.describe_by()
            )));
        }
        let pinned = self.filter.pinned()?;
        ensure!(
            !pinned.is_empty(),
            Refusal::Conflict("no interface is filtered: there is nothing to trace".into())
        );
        self.traces.numbers += 1;
        let now = Instant::now();
        self.traces.current = Some(Trace {
            number: self.traces.numbers,
            end: now + LOAD_TIMEOUT,
            until: Timestamp::now() + LOAD_TIMEOUT,
            granted: now,
            interfaces: BTreeMap::new(),
            request,
        });
        Ok((self.traces.numbers, self.filter.trace_place()))
    }

    /// Has the traced programs run. Returns the first line.
    ///
    /// # Errors
    /// They could not be loaded, or not be attached: the links run what they ran before.
    pub fn begin_trace(&mut self, number: u64, traced: Result<Traced>) -> Result<TraceLine> {
        let begun = traced
            .context("this kernel does not take the programs of a trace")
            .and_then(|traced| {
                let current = self.traces.current.as_ref().filter(|t| t.number == number);
                let current = current.context("the trace was ended before it began")?;
                let database = current.request.database.as_deref();
                self.filter.begin_trace(traced, database)
            });
        let Some(mut trace) = self.traces.current.take_if(|trace| trace.number == number) else {
            bail!(Refusal::Conflict(
                "the trace was ended before it began".into()
            ));
        };
        begun?;
        trace.end = Instant::now() + trace.request.time;
        trace.until = Timestamp::now() + trace.request.time;
        trace
            .entry(format!(
                "{} begins, for {}{}: the programs that log it are attached",
                trace.describe(),
                spelled(trace.request.time),
                trace.describe_by()
            ))
            .log();
        let line = TraceLine::Begun {
            tracing: trace.request.source,
            database: trace.request.database.clone(),
            until: trace.until,
        };
        self.traces.current = Some(trace);
        Ok(line)
    }

    /// Returns the lines since the last call. The last one, after which there are none, says why the trace ended.
    ///
    /// # Errors
    /// The maps of the trace cannot be read.
    pub fn read_trace(&mut self, number: u64) -> Result<Vec<TraceLine>> {
        self.end_late_trace();
        if let Some(trace) = &mut self.traces.current
            && trace.number == number
        {
            if trace.granted.elapsed() >= GRANT_INTERVAL {
                trace.granted = Instant::now();
                self.filter.grant_lines()?;
            }
            return self.read_lines();
        }
        match self.traces.last.take_if(|(last, _)| *last == number) {
            Some((_, lines)) => Ok(lines),
            None => bail!("the trace has ended"),
        }
    }

    fn read_lines(&mut self) -> Result<Vec<TraceLine>> {
        let Some(trace) = &mut self.traces.current else {
            return Ok(Vec::new());
        };
        let logged = self.filter.read_trace(trace.request.database.as_deref())?;
        if !logged.lines.is_empty() && trace.interfaces.is_empty() {
            // A line without the name is a line all the same.
            let host = self.netlink.interfaces().unwrap_or_default().into_iter();
            trace.interfaces = host.map(|found| (found.index, found.name)).collect();
        }
        let names = Names {
            image: self.filter.image(),
            interfaces: &trace.interfaces,
        };
        let now = Timestamp::now();
        let read = |line: &String| trace::read(line, now, &names).map(Box::new);
        let unread = logged.lines.iter().filter(|line| read(line).is_none());
        let lost = logged.lost + unread.count() as u64;
        let lines = logged.lines.iter().filter_map(read);
        let lines = lines.map(TraceLine::Packet);
        let lost = (lost > 0).then_some(TraceLine::Lost { lost });
        Ok(lines.chain(lost).collect())
    }

    /// Ends a trace whose time is over: also where nobody reads it.
    pub(super) fn end_late_trace(&mut self) {
        if let Some(trace) = &self.traces.current
            && trace.end <= Instant::now()
        {
            let why = if self.filter.is_tracing() {
                format!("its time is over, {}", spelled(trace.request.time))
            } else {
                format!(
                    "its programs were not loaded within {}",
                    spelled(LOAD_TIMEOUT)
                )
            };
            self.end_trace(None, &why);
        }
    }

    /// Has the programs run that log nothing. `number`: only if that trace is on.
    pub fn end_trace(&mut self, number: Option<u64>, why: &str) {
        let is_meant = |trace: &Trace| number.is_none_or(|number| trace.number == number);
        if !self.traces.current.as_ref().is_some_and(is_meant) {
            return;
        }
        let mut lines = self.read_lines().unwrap_or_default();
        // Its last samples.
        let collected = self.collect_drops();
        let ended = self.filter.end_trace();
        let Some(trace) = self.traces.current.take() else {
            return;
        };
        trace
            .entry(format!("{} has ended: {why}", trace.describe()))
            .log();
        for error in [collected.err(), ended.err()].into_iter().flatten() {
            Entry::error(format!("end the {}: {error:#}", trace.describe())).log();
        }
        lines.push(TraceLine::Ended { ended: why.into() });
        self.traces.last = Some((trace.number, lines));
    }

    /// The trace that is on, for `status`.
    pub(super) fn tracing(&self) -> Option<report::Tracing> {
        let trace = self.traces.current.as_ref()?;
        self.filter.is_tracing().then(|| report::Tracing {
            source: trace.request.source,
            database: trace.request.database.clone(),
            until: trace.until,
            by: trace.request.by.clone(),
        })
    }
}
