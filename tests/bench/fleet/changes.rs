//! A change to a document, until hosts have it.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use filter_tests::{
    datagrams::Datagrams,
    etcd::{Etcd, Session},
};

use super::{
    DATABASE, Fleet, SECTION, ms,
    real::{RealHost, Switched, TURNS, check, document, switched},
    server::Load,
};
use crate::report::{Measure, Report};

/// Pause after a change, in which hosts write their status. A random part is added: no change meets the same tick.
const PAUSE: Duration = Duration::from_millis(300);

pub struct Put {
    pub begun: Instant,
    pub returned: Instant,
    pub revision: i64,
}

/// Writes a document.
pub fn put(session: &mut Session<'_>, turn: usize) -> Result<Put> {
    let text = document(turn);
    let begun = Instant::now();
    let revision = session.put(&format!("rules/{DATABASE}"), &text);
    let returned = Instant::now();
    Ok(Put {
        begun,
        returned,
        revision: revision.context("write the document")?,
    })
}

/// Milliseconds of all changes, of one host or of several.
#[derive(Default)]
struct Times {
    allowed: Vec<f64>,
    allowed_after: Vec<f64>,
    revoked: Vec<f64>,
    revoked_after: Vec<f64>,
    puts: Vec<f64>,
}

impl Times {
    fn add(&mut self, put: &Put, switched: &Switched) {
        let after = |at: Instant, from: Instant| ms(at.saturating_duration_since(from));
        self.allowed.push(after(switched.allowed, put.begun));
        self.allowed_after
            .push(after(switched.allowed, put.returned));
        self.revoked.push(after(switched.revoked, put.begun));
        self.revoked_after
            .push(after(switched.revoked, put.returned));
        self.puts.push(ms(put.returned - put.begun));
    }

    fn record(&self, report: &mut Report, of: &str) {
        for (name, values) in [
            ("put sent to first packet of a new source", &self.allowed),
            (
                "put returned to first packet of a new source",
                &self.allowed_after,
            ),
            ("put sent to last packet of a revoked source", &self.revoked),
            (
                "put returned to last packet of a revoked source",
                &self.revoked_after,
            ),
            ("put by itself", &self.puts),
        ] {
            let name = format!("{of}, {name}");
            report.record(Measure::with_tail(SECTION, name, values));
        }
    }
}

/// One real agent, and nobody else.
pub fn to_one(
    report: &mut Report,
    etcd: &Etcd,
    session: &mut Session<'_>,
    host: &RealHost,
    changes: usize,
) -> Result<()> {
    host.wait_for(etcd)?;
    let traffic = host.traffic();
    let (mut times, mut enforced) = (Times::default(), Vec::new());
    for turn in 1..=changes {
        sleep(PAUSE.mul_f64(1.0 + fastrand::f64()));
        traffic.forget_arrivals();
        let put = put(session, turn)?;
        times.add(&put, &turned(&traffic, turn, put.begun)?);
        host.wait_for(etcd)?;
        enforced.push(host.enforced_ms(etcd)?);
    }
    check(&traffic)?;
    times.record(report, "one host");
    let name = "one host, etcd's announcement to in force, by the agent";
    report.record(Measure::with_tail(SECTION, name, &enforced));
    Ok(())
}

/// What the turn did to a host's packets.
fn turned(traffic: &Datagrams, turn: usize, begun: Instant) -> Result<Switched> {
    let [allowed, revoked] = [turn, turn + 1].map(|turn| TURNS[turn % TURNS.len()]);
    switched(traffic, allowed, revoked, begun)
}

/// All hosts.
pub fn to_all(report: &mut Report, fleet: &mut Fleet<'_>, changes: usize) -> Result<()> {
    // Whatever was before: the first turn changes something.
    fleet.put_everywhere(0)?;
    let traffic = fleet.traffic();
    let Fleet {
        simulated,
        session,
        etcd,
        real,
    } = fleet;
    simulated.settle();
    simulated.compiling();
    let (before, written) = (Load::of(etcd)?, simulated.written());
    let (mut times, mut compiled, mut last) = (Times::default(), Vec::new(), Vec::new());
    for turn in 1..=changes {
        sleep(PAUSE.mul_f64(fastrand::f64()));
        traffic.iter().for_each(Datagrams::forget_arrivals);
        let put = put(session, turn)?;
        let current = simulated.wait_for(put.revision)?;
        let mut current: Vec<f64> = current.iter().map(|at| ms(*at - put.begun)).collect();
        compiled.extend_from_slice(&current);
        for traffic in &traffic {
            let switched = turned(traffic, turn, put.begun)?;
            times.add(&put, &switched);
            current.push(ms(switched.allowed - put.begun));
        }
        last.extend(current.into_iter().reduce(f64::max));
        simulated.settle();
    }
    let after = Load::of(etcd)?;
    traffic.iter().try_for_each(check)?;
    let count = real.len() + compiled.len() / changes;
    let name = format!("{count} hosts, put sent to rules compiled at a simulated one");
    report.record(Measure::with_tail(SECTION, name, &compiled));
    times.record(report, &format!("{count} hosts"));
    let name = format!("{count} hosts, put sent to the last of them");
    report.record(Measure::with_tail(SECTION, name, &last));
    let judging = simulated.compiling().into_iter().map(|time| time * 1e3);
    let name = "judging and compiling at a simulated host";
    let judging: Vec<f64> = judging.collect();
    report.record(Measure::with_tail(SECTION, name, &judging));
    let sync = 1e3 * (after.sync_time - before.sync_time) / (after.syncs - before.syncs);
    let name = "etcd, a write of its log to disk, mean";
    report.record(Measure::new(SECTION, name, "ms", &[sync]));
    let processor = 1e3 * (after.processor - before.processor) / changes as f64;
    let name = format!("processor time of etcd, a change to {count} hosts");
    report.record(Measure::new(SECTION, name, "ms", &[processor]));
    let statuses = (simulated.written() - written) as f64;
    let bytes = (after.database - before.database) / statuses;
    let name = "etcd's database on disk, for each status written";
    report.record(Measure::new(SECTION, name, "bytes", &[bytes]));
    Ok(())
}
