//! The database's own view: pgbench through the filter, and without it.

use std::{fs, process::Command};

use anyhow::{Context as _, Result, ensure};
use filter_tests::{
    databases::{Postgres, come_from},
    net::{ALLOWED4, Net, dedicated, policy, succeed},
};

use crate::{
    hosts::{Guard, Programs, attach},
    report::{Measure, Report},
};

const SECTION: &str = "pgbench";
const ALLOWED: &str = "203.0.113.10/32";

/// What stands in front of PostgreSQL, in turns.
const GUARDS: [Option<Guard>; 4] = [
    None,
    Some(Guard::Pass),
    Some(Guard::Filter),
    Some(Guard::NftInput),
];

pub fn measure(report: &mut Report, programs: &Programs, rounds: usize) -> Result<()> {
    let mut net = Net::new("bench-pgbench");
    net.remove_tripwire();
    net.fix_neighbours();
    let _postgres = Postgres::start(&net);
    come_from(&net, ALLOWED4.into());
    pgbench(&net, "prefer", &["--initialize", "--quiet", "--scale=5"])?;
    net.write_policy(&policy(
        "eth0",
        "native",
        &[dedicated("d", Postgres::PORT, &[ALLOWED], "")],
    ));
    let loads: [(&str, &[&str]); 2] = [
        ("select only", &["--client=4"]),
        (
            "connect for every transaction",
            &["--client=4", "--connect"],
        ),
    ];
    for (name, arguments) in loads {
        let mut rates: [Vec<f64>; GUARDS.len()] = Default::default();
        for round in 0..=rounds {
            for turn in 0..GUARDS.len() {
                // Nobody always comes after the same.
                let place = (turn + round) % GUARDS.len();
                let guard = GUARDS[place];
                put(&mut net, programs, guard);
                let common = [
                    "--select-only",
                    "--no-vacuum",
                    "--protocol=prepared",
                    "--time=1",
                ];
                let text = pgbench(&net, "prefer", &[&common, arguments].concat())?;
                take_away(&mut net, guard);
                // The first round fills the caches.
                if round > 0 {
                    rates[place].push(transactions(&text)?);
                }
            }
        }
        for (guard, of_guard) in GUARDS.iter().zip(&rates) {
            let host = guard.map_or("no filter", Guard::name);
            let shares = of_guard
                .iter()
                .zip(&rates[0])
                .map(|(rate, bare)| rate / bare);
            let measure = Measure::new(SECTION, name, "transactions/s", of_guard);
            report.record(measure.on(host).with_shares(&shares.collect::<Vec<_>>()));
        }
    }
    Ok(())
}

fn put(net: &mut Net, programs: &Programs, guard: Option<Guard>) {
    match guard {
        Some(Guard::Filter) => net.start(),
        Some(Guard::Pass) => {
            let pin = programs.pin(Guard::Pass);
            attach(net, "eth0", &pin.expect("it is a program"));
        }
        Some(_) => nftables(
            net,
            &format!(
                "table inet bench {{
                   set allowed {{ type ipv4_addr; flags interval; elements = {{ {ALLOWED} }} }}
                   chain guard {{
                     type filter hook input priority 0
                     tcp dport {} ip saddr != @allowed drop
                   }}
                 }}\n",
                Postgres::PORT
            ),
        ),
        None => {}
    }
}

fn take_away(net: &mut Net, guard: Option<Guard>) {
    match guard {
        Some(Guard::Filter) => {
            net.agent_text(&["detach", "--yes"]);
            net.wait_for_exit();
        }
        Some(Guard::Pass) => net.db.ip("link set dev eth0 xdpdrv off"),
        Some(_) => nftables(net, "delete table inet bench\n"),
        None => {}
    }
}

fn nftables(net: &Net, rules: &str) {
    let file = net.dir().join("rules.nft");
    fs::write(&file, rules).expect("write the rules");
    net.db
        .run(|| succeed(Command::new("nft").arg("-f").arg(&file)));
}

/// `mode`: libpq's `sslmode`.
pub fn pgbench(net: &Net, mode: &str, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new("pgbench");
    command
        .env("PGSSLMODE", mode)
        .args(["--host", "10.0.0.1", "--username", "postgres"])
        .args(arguments)
        .arg("postgres");
    let output = net.client.output(&mut command);
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "pgbench fails: {stderr}");
    Ok(String::from_utf8(output.stdout)?)
}

/// The rate that pgbench prints.
pub fn transactions(text: &str) -> Result<f64> {
    let rate = text.lines().find_map(|line| line.strip_prefix("tps = "));
    let rate = rate.and_then(|rate| rate.split(' ').next()?.parse().ok());
    rate.context("find the rate in what pgbench prints")
}
