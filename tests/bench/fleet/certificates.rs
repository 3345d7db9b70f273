//! The certificates of all hosts are replaced.

use std::{thread::sleep, time::Instant};

use anyhow::{Result, ensure};
use filter_tests::{certificates::Kind, net::run_in};

use super::{
    Fleet, PATIENCE, SECTION, ms,
    outage::{LOOK_INTERVAL, accepted},
    real::check,
};
use crate::report::{Measure, Report};

/// Until every host has a new connection. `hosts`: the names of all.
pub fn measure(report: &mut Report, fleet: &mut Fleet<'_>, hosts: &[String]) -> Result<()> {
    let traffic = fleet.traffic();
    let accepted = || run_in(&fleet.etcd.namespace.name, accepted);
    let (before, lost) = (accepted()?, fleet.simulated.lost());
    for host in hosts {
        // It takes the place of the one before.
        fleet.etcd.authority.sign(host, &[], Kind::Good);
    }
    let replaced = Instant::now();
    let count = hosts.len();
    loop {
        let connected = accepted()? - before;
        if connected >= count as u64 {
            break;
        }
        ensure!(
            replaced.elapsed() < PATIENCE,
            "{connected} of {count} hosts connect with their new certificates"
        );
        sleep(LOOK_INTERVAL);
    }
    let name = format!("{count} certificates replaced, to the last new connection");
    let took = [ms(replaced.elapsed())];
    report.record(Measure::new(SECTION, name, "ms", &took));
    ensure!(
        fleet.simulated.lost() == lost,
        "hosts lost etcd by new certificates: {:?}",
        fleet.simulated.complaint()
    );
    fleet.put_everywhere(0)?;
    traffic.iter().try_for_each(check)
}
