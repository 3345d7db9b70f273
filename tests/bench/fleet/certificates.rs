//! The certificates of all hosts are replaced.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use filter_tests::{
    certificates::Kind,
    datagrams::Datagrams,
    etcd::{Etcd, Session},
    net::run_in,
};

use super::{
    PATIENCE, SECTION, changes, ms, outage,
    real::{RealHost, check},
    simulated::Simulated,
};
use crate::report::{Measure, Report};

/// Interval of looks at the number of connections.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// Until every host has a new connection. `hosts`: the names of all.
pub fn measure(
    report: &mut Report,
    etcd: &Etcd,
    session: &mut Session<'_>,
    real: &[RealHost],
    simulated: &mut Simulated,
    hosts: &[String],
) -> Result<()> {
    let traffic: Vec<Datagrams> = real.iter().map(RealHost::traffic).collect();
    let accepted = || run_in(&etcd.namespace.name, outage::accepted);
    let (before, lost) = (accepted()?, simulated.lost());
    for host in hosts {
        // It takes the place of the one before.
        etcd.authority.sign(host, &[], Kind::Good);
    }
    let replaced = Instant::now();
    while accepted()? - before < hosts.len() as u64 {
        ensure!(
            replaced.elapsed() < PATIENCE,
            "{} of {} hosts connect with their new certificates",
            accepted()? - before,
            hosts.len()
        );
        sleep(LOOK_INTERVAL);
    }
    let name = format!(
        "{} certificates replaced, to the last new connection",
        hosts.len()
    );
    let took = [ms(replaced.elapsed())];
    report.record(Measure::new(SECTION, name, "ms", &took));
    ensure!(
        simulated.lost() == lost,
        "hosts lost etcd by new certificates: {:?}",
        simulated.complaint()
    );
    let put = changes::put(session, 0)?;
    simulated.wait_for(put.revision)?;
    for host in real {
        host.wait_for(etcd)?;
    }
    traffic.iter().try_for_each(check)
}
