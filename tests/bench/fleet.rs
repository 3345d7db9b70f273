//! The fleet: how long a change takes from etcd to the packets of one host and of a thousand, and what they cost etcd.
//!
//! One clock: whoever writes, the hosts and the probes run on one machine. A change begins before its request is sent, and
//! ends with a packet at a real host, at a simulated one with the rules compiled.

mod certificates;
mod changes;
mod machine;
mod outage;
mod real;
mod server;
mod simulated;

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use filter_tests::{
    certificates::Kind,
    datagrams::Datagrams,
    etcd::{Etcd, Session},
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::report::{Measure, Report};
use real::RealHost;
use server::Load;
use simulated::{Named, Simulated};

pub const SECTION: &str = "fleet";
/// Database that all hosts have.
const DATABASE: &str = "orders";
const REAL: usize = 3;
/// Time allowed for each step. It decides nothing but that the benchmark ends.
const PATIENCE: Duration = Duration::from_secs(120);

/// How often and how long.
pub struct Plan {
    /// All hosts, the real ones included.
    hosts: usize,
    changes: usize,
    idle: Duration,
    /// How long etcd is away, each time.
    outages: &'static [Duration],
    /// Starts of an agent with `fleet`, and without, of which its memory is taken.
    starts: usize,
}

pub const FULL: Plan = Plan {
    hosts: 1000,
    changes: 50,
    idle: Duration::from_secs(60),
    outages: &[
        Duration::ZERO,
        Duration::ZERO,
        Duration::ZERO,
        Duration::from_secs(20),
        Duration::from_secs(20),
    ],
    starts: 5,
};

pub const QUICK: Plan = Plan {
    hosts: 20,
    changes: 3,
    idle: Duration::from_secs(1),
    outages: &[Duration::ZERO],
    starts: 1,
};

/// All hosts, and the etcd that they follow. Hosts are dropped before it.
struct Fleet<'a> {
    simulated: Simulated,
    real: Vec<RealHost>,
    session: Session<'a>,
    etcd: &'a Etcd,
}

impl Fleet<'_> {
    /// Writes a document, and waits until every host has it.
    fn put_everywhere(&mut self, turn: usize) -> Result<()> {
        let put = changes::put(&mut self.session, turn)?;
        self.simulated.wait_for(put.revision)?;
        let mut real = self.real.iter();
        real.try_for_each(|host| host.wait_for(self.etcd))
    }

    /// Packets to the real hosts, from now on.
    fn traffic(&self) -> Vec<Datagrams> {
        self.real.iter().map(RealHost::traffic).collect()
    }
}

pub fn measure(report: &mut Report, plan: &Plan) -> Result<()> {
    raise_file_limit()?;
    let taken = 100.0 * machine::taken_by_others(Duration::from_secs(1))?;
    report.record(Measure::new(
        SECTION,
        "processors that others take",
        "%",
        &[taken],
    ));
    let etcd = Etcd::start("bench-fleet");
    let mut session = etcd.session();
    let real: Vec<String> = (1..=REAL).map(|n| format!("real-{n}")).collect();
    let simulated: Vec<String> = (1..=plan.hosts - REAL)
        .map(|n| format!("host-{n}"))
        .collect();
    let begun = Instant::now();
    session.add_hosts(&real, DATABASE);
    session.add_hosts(&simulated, DATABASE);
    println!("{} users are set up in {:.1?}", plan.hosts, begun.elapsed());
    let sign = |name: &String| -> Named {
        let pair = etcd.authority.sign(name, &[], Kind::Good);
        (name.clone(), pair)
    };
    let mut hosts = Vec::new();
    for (place, (name, pair)) in real.iter().map(sign).enumerate() {
        hosts.push(RealHost::new(&etcd, place, &name, &pair));
    }
    changes::put(&mut session, 0)?;
    memory(report, &etcd, &mut hosts[0], plan)?;
    hosts[0].start();
    changes::to_one(report, &etcd, &mut session, &hosts[0], plan.changes)?;
    for host in &mut hosts[1..] {
        host.start();
    }
    let named = simulated.iter().map(sign).collect();
    let mut fleet = Fleet {
        simulated: start(report, &etcd, named, &mut session)?,
        real: hosts,
        session,
        etcd: &etcd,
    };
    idle(report, &etcd, &fleet.simulated, plan)?;
    changes::to_all(report, &mut fleet, plan.changes)?;
    for &away in plan.outages {
        outage::measure(report, &mut fleet, away)?;
    }
    certificates::measure(report, &mut fleet, &[real, simulated].concat())?;
    let load = Load::of(&etcd)?;
    for (name, bytes) in [
        ("resident memory of etcd, at the end", load.resident),
        ("etcd's database on disk, at the end", load.database),
    ] {
        report.record(Measure::new(SECTION, name, "MB", &[bytes / 1e6]));
    }
    judge(report, plan);
    Ok(())
}

/// Each host has some file descriptors in this process, and one in etcd, which inherits the limit.
fn raise_file_limit() -> Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most).context("raise the limit of open files")
}

/// Memory of the agent that follows etcd, and of the same one with the same rules in its file.
fn memory(report: &mut Report, etcd: &Etcd, host: &mut RealHost, plan: &Plan) -> Result<()> {
    let (mut with, mut without, mut more) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..plan.starts {
        let alone = host.memory_without_fleet();
        host.start();
        host.wait_for(etcd)?;
        let followed = host.memory();
        host.kill();
        without.push(alone);
        with.push(followed);
        more.push(followed - alone);
    }
    for (name, values) in [
        ("resident memory of an agent without `fleet`", without),
        ("resident memory of an agent with `fleet`", with),
        ("the difference", more),
    ] {
        report.record(Measure::new(SECTION, name, "MB", &values));
    }
    Ok(())
}

/// All simulated hosts at once, as when the power comes back.
fn start(
    report: &mut Report,
    etcd: &Etcd,
    hosts: Vec<Named>,
    session: &mut Session<'_>,
) -> Result<Simulated> {
    let revision = changes::put(session, 0)?.revision;
    let count = hosts.len();
    let begun = Instant::now();
    let mut simulated = Simulated::start(etcd, hosts)?;
    let current = simulated.wait_for(revision)?;
    let current: Vec<f64> = current.iter().map(|at| ms(*at - begun)).collect();
    let name = format!("{count} hosts start at once, until each is current");
    report.record(Measure::with_tail(SECTION, name, &current));
    simulated.settle();
    // The name of a host is its own, once its status is written.
    ensure!(
        simulated.written() >= count as u64,
        "hosts did not write their status: {:?}",
        simulated.complaint()
    );
    Ok(simulated)
}

fn idle(report: &mut Report, etcd: &Etcd, simulated: &Simulated, plan: &Plan) -> Result<()> {
    let (before, own) = (Load::of(etcd)?, machine::own_processor_time()?);
    let begun = Instant::now();
    sleep(plan.idle);
    let (after, own_after) = (Load::of(etcd)?, machine::own_processor_time()?);
    let time = begun.elapsed().as_secs_f64();
    let of = |name: &str| format!("{name}, {} hosts idle", plan.hosts);
    let share = |used: f64| 100.0 * used / time;
    for (name, unit, value) in [
        (
            of("processor time of etcd"),
            "% of one",
            share(after.processor - before.processor),
        ),
        (
            of("processor time of the simulated hosts"),
            "% of one",
            share((own_after - own).as_secs_f64()),
        ),
        (
            of("reads"),
            "a second",
            (after.transactions - before.transactions) / time,
        ),
        (
            of("renewals of leases"),
            "a second",
            (after.renewals - before.renewals) / time,
        ),
        (of("resident memory of etcd"), "MB", after.resident / 1e6),
        (of("etcd's database on disk"), "MB", after.database / 1e6),
    ] {
        report.record(Measure::new(SECTION, name, unit, &[value]));
    }
    ensure!(
        simulated.lost() == 0,
        "idle hosts lost etcd: {:?}",
        simulated.complaint()
    );
    Ok(())
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn judge(report: &mut Report, plan: &Plan) {
    let tails = |report: &Report, name: &str, of: fn(crate::report::Tail) -> f64| -> Vec<f64> {
        let found = report.find(SECTION, name);
        found.filter_map(|m| m.tail.map(of)).collect()
    };
    let medians = |report: &Report, name: &str| -> Vec<f64> {
        let found = report.find(SECTION, name);
        found.map(|m| m.value.median).collect()
    };
    let one = tails(report, "one host, put returned", |tail| tail.p99);
    let all = tails(report, &format!("{} hosts, ", plan.hosts), |tail| tail.max);
    let back = tails(report, "etcd killed", |tail| tail.max);
    let renewed = medians(report, &format!("{} certificates replaced", plan.hosts));
    let idle = format!("processor time of etcd, {} hosts idle", plan.hosts);
    let idle = medians(report, &idle);
    let memory = medians(report, "the difference");
    report.judge(
        "one host, from the put's return, p99: at most 25 ms",
        25.0,
        false,
        &one,
    );
    report.judge(
        format!("a change at {} hosts: at most 1 s", plan.hosts),
        1e3,
        false,
        &all,
    );
    report.judge(
        "etcd killed and started, all hosts current: at most 15 s",
        15e3,
        false,
        &back,
    );
    report.judge(
        "all certificates replaced, each host connected with its own: at most 10 s",
        10e3,
        false,
        &renewed,
    );
    report.judge(
        "etcd, idle hosts: at most 10 % of a core",
        10.0,
        false,
        &idle,
    );
    // 3 MiB.
    report.judge(
        "memory for the fleet: at most 3.1 MB",
        3.1458,
        false,
        &memory,
    );
}
