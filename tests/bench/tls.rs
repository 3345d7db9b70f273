//! What forced TLS costs: connections that are judged at their sockets, against the same where it is not forced.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use filter_tests::{
    databases::{Postgres, come_from},
    net::{ALLOWED4, DB4, Net, bound, policy},
};
use serde_json::Value;

use crate::{
    database::{pgbench, transactions},
    report::{Measure, Report},
};

const SECTION: &str = "forced TLS";
/// Of the server that reads whatever comes.
const SINK: u16 = 8443;
/// A ClientHello's beginning, which is all that is judged.
const OPENING: [u8; 64] = {
    let mut opening = [0; 64];
    [opening[0], opening[1], opening[2], opening[3], opening[5]] = [22, 3, 1, 2, 1];
    opening
};
const COMMON: [&str; 3] = ["--select-only", "--no-vacuum", "--client=4"];
const STATISTICS: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// What goes through the filter, for a time.
#[derive(Clone, Copy)]
enum Load {
    /// One connection that sends without a pause.
    Bulk,
    Select,
    Connect,
}

impl Load {
    const ALL: [Self; 3] = [Self::Bulk, Self::Select, Self::Connect];

    const fn name(self) -> &'static str {
        match self {
            Self::Bulk => "one connection without a pause",
            Self::Select => "pgbench over TLS, select only",
            Self::Connect => "pgbench over TLS, connect for every transaction",
        }
    }

    const fn unit(self) -> &'static str {
        match self {
            Self::Bulk => "MB/s",
            Self::Select | Self::Connect => "transactions/s",
        }
    }

    fn run(self, net: &Net, time: Duration) -> Result<f64> {
        let seconds = format!("--time={}", time.as_secs().max(1));
        let more = match self {
            Self::Bulk => return bulk(net, time),
            Self::Select => "--protocol=prepared",
            Self::Connect => "--connect",
        };
        let arguments = [&COMMON[..], &[&seconds, more]].concat();
        transactions(&pgbench(net, "require", &arguments)?)
    }
}

fn written(force: bool) -> String {
    let database = |name: &str, port: u16, engine: &str| {
        format!(
            "{{name: {name}, port: {port}, engine: {engine}, model: dedicated, force_tls: {force}, \
             rules: [{{cidr: {ALLOWED4}/32}}]}}"
        )
    };
    let databases = [
        database("d", Postgres::PORT, "postgresql"),
        database("sink", SINK, "other"),
    ];
    policy("eth0", "native", &databases)
}

pub fn measure(report: &mut Report, rounds: usize, time: Duration) -> Result<()> {
    let mut net = Net::new("bench-tls");
    net.remove_tripwire();
    net.fix_neighbours();
    let _postgres = Postgres::start(&net);
    let sink = net.listen(SINK);
    thread::spawn(move || sink_all(&sink));
    come_from(&net, ALLOWED4.into());
    pgbench(&net, "disable", &["--initialize", "--quiet", "--scale=5"])?;
    net.write_policy(&written(false));
    net.start();
    for load in Load::ALL {
        let mut rates: [Vec<f64>; 2] = Default::default();
        for round in 0..=rounds {
            // Neither always comes after the other.
            for force in [round % 2 == 0, round % 2 != 0] {
                net.reload_unprotected(&written(force));
                let rate = load.run(&net, time)?;
                // The first round fills the caches.
                if round > 0 {
                    rates[usize::from(force)].push(rate);
                }
            }
        }
        let [unforced, forced] = &rates;
        let shares: Vec<f64> = forced.iter().zip(unforced).map(|(a, b)| a / b).collect();
        let measure = Measure::new(SECTION, load.name(), load.unit(), unforced);
        report.record(measure.on("not forced"));
        let measure = Measure::new(SECTION, load.name(), load.unit(), forced);
        report.record(measure.on("forced").with_shares(&shares));
    }
    for load in Load::ALL {
        for force in [false, true] {
            net.reload_unprotected(&written(force));
            run_times(report, &net, load, force, rounds.min(5), time)?;
        }
    }
    Ok(())
}

/// What a run of each program takes by the kernel's own statistics, whose clocks are part of it.
fn run_times(
    report: &mut Report,
    net: &Net,
    load: Load,
    force: bool,
    rounds: usize,
    time: Duration,
) -> Result<()> {
    let before = fs::read_to_string(STATISTICS).context("read whether BPF statistics are kept")?;
    fs::write(STATISTICS, "1").context("have BPF statistics kept")?;
    let measured = (|| {
        let mut times: [Vec<f64>; 2] = Default::default();
        for _ in 0..rounds {
            let before = runs()?;
            load.run(net, time)?;
            for ((times, before), after) in times.iter_mut().zip(before).zip(runs()?) {
                let [ns, count] = [after[0] - before[0], after[1] - before[1]];
                times.extend((count > 1000).then_some(ns as f64 / count as f64));
            }
        }
        anyhow::Ok(times)
    })();
    fs::write(STATISTICS, before).context("have BPF statistics kept as before")?;
    let forced = if force { "forced" } else { "not forced" };
    for (times, place) in measured?.iter().zip(["the interface", "the socket"]) {
        if !times.is_empty() {
            let name = format!("a run at {place}, {}", load.name());
            report.record(Measure::new(SECTION, name, "ns", times).on(forced));
        }
    }
    Ok(())
}

/// Time in nanoseconds and number of runs of the agent's two programs.
fn runs() -> Result<[[u64; 2]; 2]> {
    let mut bpftool = Command::new("bpftool");
    let output = bpftool.args(["--json", "prog", "show"]).output()?;
    ensure!(output.status.success(), "bpftool: {output:?}");
    let programs: Vec<Value> = serde_json::from_slice(&output.stdout)?;
    // The last that was loaded: the agent's.
    let of = |name: &str| {
        let found = programs.iter().rfind(|program| program["name"] == name);
        let number = |field: &str| {
            found
                .and_then(|program| program[field].as_u64())
                .unwrap_or(0)
        };
        [number("run_time_ns"), number("run_cnt")]
    };
    Ok(["filter", "tls_opening"].map(of))
}

fn sink_all(listener: &TcpListener) {
    while let Ok((mut stream, _)) = listener.accept() {
        thread::spawn(move || {
            let mut buffer = vec![0; 1 << 20];
            while stream.read(&mut buffer).is_ok_and(|length| length > 0) {}
        });
    }
}

/// Returns megabytes per second that a connection takes which begins as TLS does.
fn bulk(net: &Net, time: Duration) -> Result<f64> {
    let mut stream = net.client.run(|| -> Result<TcpStream> {
        let socket = bound(ALLOWED4.into());
        socket.connect(&SocketAddr::new(DB4.into(), SINK).into())?;
        Ok(socket.into())
    })?;
    stream.write_all(&OPENING)?;
    let data = vec![0; 1 << 16];
    let begun = Instant::now();
    let mut bytes = 0;
    while begun.elapsed() < time {
        stream.write_all(&data)?;
        bytes += data.len();
    }
    Ok(bytes as f64 / begun.elapsed().as_secs_f64() / 1e6)
}
