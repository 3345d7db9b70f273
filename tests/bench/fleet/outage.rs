//! etcd is killed, and started again.

use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering},
    thread::{self, sleep},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use filter_tests::{datagrams::Datagrams, etcd::Session, net::run_in};

use super::{
    Fleet, PATIENCE, SECTION, changes, ms,
    real::{TURNS, check, switched},
};
use crate::report::{Measure, Report};

/// Interval of looks at the number of connections, and the time over which they are counted.
pub const LOOK_INTERVAL: Duration = Duration::from_millis(10);
const WINDOW: Duration = Duration::from_millis(100);

/// Until all hosts have a document that is written as soon as etcd takes it. `away`: from the kill to the start.
pub fn measure(report: &mut Report, fleet: &mut Fleet<'_>, away: Duration) -> Result<()> {
    // The turn to come allows another source than this one.
    fleet.put_everywhere(0)?;
    let traffic = fleet.traffic();
    let Fleet {
        simulated,
        session,
        etcd,
        ..
    } = fleet;
    simulated.settle();
    let stop = AtomicBool::new(false);
    let namespace = etcd.namespace.name.as_str();
    let (begun, put, current, busiest) = thread::scope(|scope| -> Result<_> {
        let looks = scope.spawn(|| run_in(namespace, || look(&stop)));
        let measured = (|| {
            etcd.kill(0);
            sleep(away);
            traffic.iter().for_each(Datagrams::forget_arrivals);
            let begun = Instant::now();
            etcd.run(0);
            let put = put(session, begun)?;
            let mut current = simulated.wait_for(put.revision)?;
            for traffic in &traffic {
                current.push(switched(traffic, TURNS[1], TURNS[0], begun)?.allowed);
            }
            anyhow::Ok((begun, put, current))
        })();
        stop.store(true, Ordering::Relaxed);
        let looks = looks.join().expect("connections are counted")?;
        let (begun, put, current) = measured?;
        Ok((begun, put, current, busiest(&looks)))
    })?;
    traffic.iter().try_for_each(check)?;
    let of = |name: &str| format!("etcd killed, started {} s later, {name}", away.as_secs());
    let since = |at: &Instant| ms(at.saturating_duration_since(begun));
    let current: Vec<f64> = current.iter().map(since).collect();
    let name = of("its start to each host current");
    report.record(Measure::with_tail(SECTION, name, &current));
    let name = of("its start to the document written");
    let written = [since(&put.returned)];
    report.record(Measure::new(SECTION, name, "ms", &written));
    let name = of("connections in the busiest 100 ms");
    report.record(Measure::new(SECTION, name, "", &[busiest as f64]));
    simulated.settle();
    Ok(())
}

/// As soon as etcd takes it.
fn put(session: &mut Session<'_>, begun: Instant) -> Result<changes::Put> {
    loop {
        match changes::put(session, 1) {
            Ok(put) => return Ok(put),
            Err(error) => ensure!(begun.elapsed() < PATIENCE, "etcd is not back: {error:#}"),
        }
        sleep(LOOK_INTERVAL);
    }
}

/// Counts of connections that etcd's namespace has accepted, until it is stopped.
fn look(stop: &AtomicBool) -> Result<Vec<(Instant, u64)>> {
    let mut looks = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        looks.push((Instant::now(), accepted()?));
        sleep(LOOK_INTERVAL);
    }
    Ok(looks)
}

/// Connections that the namespace of this thread has accepted.
pub fn accepted() -> Result<u64> {
    let text = fs::read_to_string("/proc/thread-self/net/snmp")?;
    let mut lines = text.lines().filter(|line| line.starts_with("Tcp:"));
    let (names, values) = (lines.next(), lines.next());
    let names = names.context("find the names")?.split_whitespace();
    let values = values.context("find the values")?.split_whitespace();
    let mut found = names
        .zip(values)
        .filter(|(name, _)| *name == "PassiveOpens");
    Ok(found.next().context("find PassiveOpens")?.1.parse()?)
}

fn busiest(looks: &[(Instant, u64)]) -> u64 {
    let after = |(index, (at, count)): (usize, &(Instant, u64))| {
        let within = looks[index..].iter();
        let within = within.take_while(|(later, _)| *later - *at <= WINDOW);
        within.last().map_or(0, |(_, later)| later - count)
    };
    looks.iter().enumerate().map(after).max().unwrap_or(0)
}
