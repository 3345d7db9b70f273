//! The benchmark. Everything that is compared is measured in turns in one run: times on their own say
//! more about the machine than about the filter.

mod control;
mod database;
mod fleet;
mod hosts;
mod instructions;
mod lists;
mod report;
mod spread;
mod tls;
mod traffic;

use std::{
    env, fs,
    net::IpAddr,
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, ValueEnum, builder::RangedU64ValueParser};
use filter_agent::{kernel::filter::Filter, temporary::Kind};
use filter_tests::bpffs::Bpffs;
use ipnet::IpNet;
use nix::{
    mount::{MsFlags, mount},
    sys::utsname::uname,
    unistd::geteuid,
};

use hosts::{Guard, Host, Programs, attach};
use instructions::Source;
use lists::Shape;
use report::{Measure, Report};
use traffic::{Generator, Sent, Traffic};

/// Of `enum xdp_action`.
const XDP_DROP: u32 = 1;

/// Twice as many are made, each in a /24 of its own.
fn sizes() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=2_000_000)
}

/// Measures the filter against programs that do nothing and against what else is in use.
#[derive(Parser)]
struct Arguments {
    /// A short run that shows that everything works; its figures mean little.
    #[arg(long)]
    quick: bool,
    /// Numbers of prefixes, instead of 30 to a million.
    #[arg(long, value_delimiter = ',', value_parser = sizes())]
    sizes: Vec<usize>,
    /// Lists of these shapes, instead of all.
    #[arg(long, value_delimiter = ',')]
    lists: Vec<Shape>,
    /// Only these parts.
    parts: Vec<Part>,
    /// Leave out what else is in use.
    #[arg(long)]
    no_rivals: bool,
    /// What cargo gives every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

impl Arguments {
    fn wants(&self, part: Part) -> bool {
        self.parts.is_empty() || self.parts.contains(&part)
    }

    fn wants_list(&self, shape: Shape) -> bool {
        self.lists.is_empty() || self.lists.contains(&shape)
    }
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Part {
    PerPacket,
    Live,
    Pgbench,
    Tls,
    Agent,
    Fleet,
}

/// How often and how long.
struct Plan {
    sizes: &'static [usize],
    packet_rounds: usize,
    /// Packets of a test run.
    repeat: u32,
    /// Sources of which instructions are counted for the first packet.
    new_sources: usize,
    live_rounds: usize,
    live: Duration,
    agent_rounds: usize,
    pgbench_rounds: usize,
    /// How long connections are measured at a time.
    connection: Duration,
    fleet: fleet::Plan,
}

const FULL: Plan = Plan {
    sizes: &[30, 1_000, 10_000, 100_000, 1_000_000],
    packet_rounds: 25,
    repeat: 400_000,
    new_sources: 101,
    live_rounds: 7,
    live: Duration::from_millis(100),
    agent_rounds: 3,
    pgbench_rounds: 12,
    connection: Duration::from_secs(1),
    fleet: fleet::FULL,
};

const QUICK: Plan = Plan {
    sizes: &[30, 1_000],
    packet_rounds: 3,
    repeat: 100_000,
    new_sources: 11,
    live_rounds: 3,
    live: Duration::from_millis(30),
    agent_rounds: 1,
    pgbench_rounds: 1,
    connection: Duration::from_millis(200),
    fleet: fleet::QUICK,
};

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    ensure!(geteuid().is_root(), "the benchmark needs root");
    let plan = if arguments.quick { QUICK } else { FULL };
    let sizes = match arguments.sizes.as_slice() {
        [] => plan.sizes,
        sizes => sizes,
    };
    let most = sizes.iter().copied().max().context("find a size")?;
    let wants = |part| arguments.wants(part);
    let mut report = Report {
        machine: machine()?,
        ..Report::default()
    };
    let bpffs = Bpffs::mount();
    // In the mount namespace that is ours now: xdp-filter keeps its maps there.
    let none = None::<&str>;
    mount(
        Some("bpf"),
        "/sys/fs/bpf",
        Some("bpf"),
        MsFlags::empty(),
        none,
    )
    .context("mount a BPF file system at /sys/fs/bpf")?;
    let networks = Shape::Hard.networks(2 * most);
    if [Part::PerPacket, Part::Live, Part::Pgbench]
        .into_iter()
        .any(wants)
    {
        programs(&mut report, arguments, &plan, sizes, &networks, &bpffs)?;
    }
    if wants(Part::Tls) {
        tls::measure(&mut report, plan.pgbench_rounds, plan.connection)?;
    }
    if wants(Part::Agent) {
        for &size in sizes {
            control::measure(&mut report, &networks[..2 * size], plan.agent_rounds)?;
        }
    }
    if wants(Part::Fleet) {
        fleet::measure(&mut report, &plan.fleet)?;
    }
    judge(&mut report);
    report.print();
    // <target>/release/deps/speed-<hash>
    let program = env::current_exe().context("find this program")?;
    let target = program
        .ancestors()
        .nth(3)
        .context("find the target directory")?;
    let directory = target.join("bench");
    report.write(&directory)?;
    println!("\nwritten to {}", directory.display());
    Ok(())
}

/// Parts that load the program without an agent.
fn programs(
    report: &mut Report,
    arguments: &Arguments,
    plan: &Plan,
    sizes: &[usize],
    networks: &[IpNet],
    bpffs: &Bpffs,
) -> Result<()> {
    let most = sizes.iter().copied().max().context("find a size")?;
    let mut programs = Programs::load(bpffs.path(), 2 * most + 4096)?;
    if arguments.wants(Part::PerPacket) {
        // While a program is on no interface, each test run has the kernel write calls of it and take them out again.
        let _attached = [Guard::Drop, Guard::Filter].map(|guard| Host::new(guard, &programs));
        for &size in sizes {
            programs.allow(&of_size(networks, size), 0)?;
            per_packet(report, &programs, plan, size, "")?;
            new_sources(report, &programs, plan, size)?;
        }
        let few = most.min(30);
        programs.allow(&of_size(networks, few), 120)?;
        per_packet(report, &programs, plan, few, ", 122 databases")?;
        ending(report, &mut programs, plan, &of_size(networks, few))?;
        programs.forces_tls = true;
        programs.allow(&of_size(networks, few), 0)?;
        judged(report, &programs, plan)?;
        programs.forces_tls = false;
    }
    if arguments.wants(Part::Live) {
        let rivals: &[Guard] = if arguments.no_rivals {
            &[]
        } else {
            &Guard::RIVALS
        };
        let guards = [
            &[Guard::Drop, Guard::Pass, Guard::Chance, Guard::Filter],
            rivals,
        ]
        .concat();
        let mut hosts: Vec<Host> = guards
            .into_iter()
            .map(|guard| Host::new(guard, &programs))
            .collect();
        let shapes = Shape::value_variants().iter();
        for &shape in shapes.filter(|&&shape| arguments.wants_list(shape)) {
            for &size in sizes.iter().filter(|&&size| size <= shape.most()) {
                let networks = match shape {
                    Shape::Hard => of_size(networks, size),
                    _ => shape.networks(size),
                };
                programs.allow(&networks, 0)?;
                for host in &mut hosts {
                    if let Err(error) = host.allow(&networks) {
                        let name = host.guard.name();
                        report.miss(format!("{name} with {size} prefixes: {error:#}"));
                    }
                }
                live(report, &hosts, &mut programs, plan, (shape, size))?;
            }
        }
        for host in &mut hosts {
            if matches!(host.guard, Guard::Drop | Guard::Filter) {
                host.net.add_client();
                let pin = programs.pin(host.guard).context("find the program")?;
                attach(&host.net, "eth1", &pin);
                two_processors(report, host, plan)?;
            }
            if host.guard == Guard::Filter {
                sampled(report, host, &mut programs.filter, plan)?;
            }
        }
    }
    if arguments.wants(Part::Pgbench) {
        database::measure(report, &programs, plan.pgbench_rounds)?;
    }
    Ok(())
}

fn machine() -> Result<String> {
    let processor = fs::read_to_string("/proc/cpuinfo")?;
    let model = processor
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let model = model.map_or("", |line| line.trim_start_matches([' ', '\t', ':']));
    let kernel = uname()?.release().to_string_lossy().into_owned();
    let processors = std::thread::available_parallelism()?;
    Ok(format!("Linux {kernel}, {processors} x {model}"))
}

/// The first of each family.
fn of_size(all: &[IpNet], size: usize) -> Vec<IpNet> {
    let (v4, v6) = all.split_at(all.len() / 2);
    [&v4[..size], &v6[..size]].concat()
}

/// The program by itself, over one that only drops.
fn per_packet(
    report: &mut Report,
    programs: &Programs,
    plan: &Plan,
    prefixes: usize,
    more: &str,
) -> Result<()> {
    for (name, family, frame) in traffic::frames() {
        let measure = of_frame(programs, plan, &frame, format!("{name}, {family}{more}"))?;
        report.record(measure.with_prefixes(prefixes));
    }
    Ok(())
}

/// A frame by itself, of a source that the program has seen.
fn of_frame(programs: &Programs, plan: &Plan, frame: &[u8], name: String) -> Result<Measure> {
    let over = over_the_floor(programs, plan, frame)?;
    let ran = programs
        .translated
        .count(&programs.filtering, frame, Source::Known)
        .with_context(|| format!("count instructions for `{name}`"))?;
    Ok(Measure::new("per packet", name, "ns", &over).with_instructions(ran.executed))
}

/// Dropped frames of sources that the program has not seen: instructions only, since the second run has seen its source.
fn new_sources(
    report: &mut Report,
    programs: &Programs,
    plan: &Plan,
    prefixes: usize,
) -> Result<()> {
    let mut random = fastrand::Rng::with_seed(prefixes as u64);
    let traffics = traffic::traffics().into_iter();
    for traffic in traffics.filter(|traffic| traffic.passes.is_none()) {
        let name = format!(
            "{}, first packet, dropped, {}",
            traffic.name,
            traffic.family()
        );
        let mut counts = Vec::new();
        for _ in 0..plan.new_sources {
            let frame = traffic.frame_at_random(&mut random);
            let ran = programs
                .translated
                .count(&programs.filtering, &frame, Source::New)
                .with_context(|| format!("count instructions for `{name}`"))?;
            if ran.returned == XDP_DROP {
                counts.push(ran.executed as f64);
            }
        }
        ensure!(!counts.is_empty(), "of `{name}`, no frame is dropped");
        let unit = "instructions without helpers";
        report.record(Measure::new("per packet", name, unit, &counts).with_prefixes(prefixes));
    }
    Ok(())
}

fn over_the_floor(programs: &Programs, plan: &Plan, frame: &[u8]) -> Result<Vec<f64>> {
    (0..plan.packet_rounds)
        .map(|_| {
            let floor = traffic::time(&programs.dropping, frame, plan.repeat)?;
            let filter = traffic::time(&programs.filtering, frame, plan.repeat)?;
            Ok(filter - floor)
        })
        .collect()
}

/// A connection that began with TLS, where it has to, and one where it need not.
fn judged(report: &mut Report, programs: &Programs, plan: &Plan) -> Result<()> {
    let (opening, data) = traffic::judged();
    for frame in &opening {
        traffic::time(&programs.filtering, frame, 1)?;
    }
    let name = "allowed, TLS forced and judged, IPv4".to_owned();
    report.record(of_frame(programs, plan, &data, name)?);
    Ok(())
}

/// Rules with an end, and blocks.
fn ending(
    report: &mut Report,
    programs: &mut Programs,
    plan: &Plan,
    networks: &[IpNet],
) -> Result<()> {
    let frames = traffic::frames();
    let frame = |wanted: &str| {
        let mut frames = frames
            .iter()
            .filter(|(name, family, _)| (*name, *family) == (wanted, "IPv4"));
        frames
            .next()
            .map(|(.., frame)| frame.clone())
            .context("find a frame")
    };
    let (allowed, denied) = (frame("allowed")?, frame("denied, next to allowed")?);
    let one =
        |frame: &[u8]| IpNet::from(IpAddr::from([frame[26], frame[27], frame[28], frame[29]]));
    let (allow, block) = ((Kind::Allow, one(&denied)), (Kind::Block, one(&allowed)));
    let other = (Kind::Block, one(&denied));
    for (name, temporary, frame) in [
        ("until an end: allowed", allow, &denied),
        ("with a block: blocked", block, &allowed),
        ("with a block of another: allowed", other, &allowed),
        ("with a block of another: denied", block, &denied),
    ] {
        programs.allow_with(networks, 0, &[temporary])?;
        report.record(of_frame(programs, plan, frame, format!("{name}, IPv4"))?);
    }
    programs.allow(networks, 0)
}

/// Every kind of traffic at every host, in turns; of the published lists only the traffic that depends on them.
fn live(
    report: &mut Report,
    hosts: &[Host],
    programs: &mut Programs,
    plan: &Plan,
    (shape, size): (Shape, usize),
) -> Result<()> {
    let is_hard = shape == Shape::Hard;
    let traffics = traffic::traffics().into_iter();
    for traffic in traffics.filter(|traffic| is_hard || traffic.name == "random sources") {
        let generator = Generator::new(&traffic)?;
        let is_needed = |guard: Guard| match guard {
            Guard::Drop => traffic.passes == Some(false),
            Guard::Pass => traffic.passes == Some(true),
            Guard::Chance => traffic.passes.is_none(),
            _ => true,
        };
        let hosts: Vec<&Host> = hosts
            .iter()
            .filter(|host| host.ready && is_needed(host.guard))
            .collect();
        let send = |host: &Host| {
            let net = &host.net;
            generator
                .measure(&net.db, &net.client, "eth0", &traffic, (0, plan.live))
                .with_context(|| format!("measure {}", host.guard.name()))
        };
        if traffic.passes.is_none() {
            let filter = hosts.iter().find(|host| host.guard == Guard::Filter);
            programs.pass(send(filter.context("find the filter")?)?.arrived)?;
        }
        let mut sent: Vec<Vec<Sent>> = Vec::new();
        for _ in 0..plan.live_rounds {
            let mut round = Vec::new();
            for host in &hosts {
                let sent = send(host)?;
                check(&traffic, host.guard, sent.arrived)?;
                round.push(sent);
            }
            sent.push(round);
        }
        for (index, host) in hosts.iter().enumerate() {
            let (mut rates, mut shares, mut arrived) = (Vec::new(), Vec::new(), Vec::new());
            for round in &sent {
                let floor = match traffic.passes {
                    Some(true) => Guard::Pass,
                    Some(false) => Guard::Drop,
                    None => Guard::Chance,
                };
                let floor = hosts.iter().position(|host| host.guard == floor);
                let floor = &round[floor.context("find the floor")?];
                rates.push(round[index].rate / 1e6);
                shares.push(round[index].rate / floor.rate);
                arrived.push(round[index].arrived);
            }
            let is_part = traffic.passes.is_none();
            let passed = arrived.iter().sum::<f64>() / arrived.len() as f64;
            let name = format!("{}, {}", traffic.name, traffic.family());
            let measure = Measure::new("live", name, "million packets/s", &rates)
                .on(host.guard.name())
                .with_prefixes(size)
                .with_list((!is_hard).then(|| shape.name()))
                .with_passed(is_part.then_some(passed))
                .with_shares(&shares);
            report.record(measure);
        }
    }
    Ok(())
}

/// A guard that does not do its work is not worth measuring.
fn check(traffic: &Traffic, guard: Guard, arrived: f64) -> Result<()> {
    let right = match traffic.passes {
        Some(false) => arrived < 0.001,
        Some(true) => arrived > 0.99,
        None => arrived < 0.5,
    };
    let (name, family) = (traffic.name, traffic.family());
    ensure!(
        right,
        "of `{name}` over {family}, {:.2} % get past {}",
        arrived * 100.0,
        guard.name()
    );
    Ok(())
}

/// Two interfaces, and a processor for each, against one of them.
fn two_processors(report: &mut Report, host: &Host, plan: &Plan) -> Result<()> {
    let flood = Flood::of("one source, denied", host, plan)?;
    let mut gains = Vec::new();
    for _ in 0..plan.live_rounds {
        gains.push(flood.rate(&[0, 1])? / flood.rate(&[0])?);
    }
    let measure = Measure::new(
        "live",
        "two processors, one source each, IPv4",
        "times one",
        &gains,
    );
    report.record(measure.on(host.guard.name()));
    Ok(())
}

/// Floods while samples of them are taken, a hundred times as often as by the agent, against floods
/// that nobody looks at.
fn sampled(report: &mut Report, host: &Host, filter: &mut Filter, plan: &Plan) -> Result<()> {
    for (name, places) in [
        ("one source, denied", &[0][..]),
        ("random sources", &[0]),
        ("random sources", &[0, 1]),
    ] {
        let flood = Flood::of(name, host, plan)?;
        let (mut rates, mut shares) = (Vec::new(), Vec::new());
        for _ in 0..plan.live_rounds {
            let alone = flood.rate(places)?;
            let over = AtomicBool::new(false);
            // However late the sampler's thread is.
            filter.grant_samples()?;
            let (rate, samples) = std::thread::scope(|scope| {
                let sampler = scope.spawn(|| {
                    let mut samples = 0;
                    while !over.load(Ordering::Relaxed) {
                        samples += filter.dropped()?.len();
                        filter.grant_samples()?;
                        std::thread::sleep(Duration::from_millis(10));
                    }
                    anyhow::Ok(samples + filter.dropped()?.len())
                });
                let rate = flood.rate(places);
                over.store(true, Ordering::Relaxed);
                (rate, sampler.join().expect("the samples are read"))
            });
            ensure!(samples? > 0, "of a flood, no sample is taken");
            rates.push(rate? / 1e6);
            shares.extend(rates.last().map(|rate| rate * 1e6 / alone));
        }
        let processors = match places.len() {
            1 => "",
            _ => " at each of two processors",
        };
        let name = format!("sampled, {name}, IPv4{processors}");
        let measure = Measure::new("live", name, "million packets/s", &rates);
        report.record(measure.on(host.guard.name()).with_shares(&shares));
    }
    Ok(())
}

/// IPv4 traffic to be dropped, from two processors, each to an interface of its own.
struct Flood<'a> {
    traffic: Traffic,
    generators: [Generator; 2],
    host: &'a Host,
    time: Duration,
}

impl<'a> Flood<'a> {
    fn of(name: &str, host: &'a Host, plan: &Plan) -> Result<Self> {
        let mut traffics = traffic::traffics().into_iter();
        let traffic = traffics.find(|traffic| traffic.name == name);
        let traffic = traffic.context("find the traffic")?;
        Ok(Self {
            generators: [Generator::new(&traffic)?, Generator::new(&traffic)?],
            traffic,
            host,
            time: plan.live,
        })
    }

    /// Packets per second that these processors bring together.
    fn rate(&self, places: &[usize]) -> Result<f64> {
        let (net, traffic, generators) = (&self.host.net, &self.traffic, &self.generators);
        let ends = [(&net.client, "eth0"), (&net.more_clients[0], "eth1")];
        let (db, time) = (&net.db, self.time);
        let rate = |place: usize| {
            let (client, interface) = ends[place];
            generators[place].measure(db, client, interface, traffic, (place, time))
        };
        let sent = std::thread::scope(|scope| {
            let rate = &rate;
            let threads = places.iter().map(|&place| scope.spawn(move || rate(place)));
            let threads: Vec<_> = threads.collect();
            let sent = threads
                .into_iter()
                .map(|thread| thread.join().expect("a generator runs"));
            sent.collect::<Result<Vec<_>>>()
        })?;
        Ok(sent.iter().map(|sent| sent.rate).sum())
    }
}

fn judge(report: &mut Report) {
    let over = |name: &str| -> Vec<f64> {
        let measures = report.find("per packet", name);
        let values = measures.filter(|m| !m.name.contains("next to") && !m.name.contains("TLS"));
        values.map(|m| m.value.median).collect()
    };
    let busy = [over("allowed"), over("denied")].concat();
    let other = [over("another port"), over("ICMP"), over("ARP")].concat();
    let share = |name: &str, size: Option<usize>| -> Vec<f64> {
        let measures = report
            .find("live", name)
            .filter(|m| m.host == Some("filter-agent"));
        let measures = measures.filter(|m| size.is_none() || m.prefixes == size);
        measures.filter_map(|m| Some(m.share?.median)).collect()
    };
    let live = share("one source", None);
    let random = share("random sources", Some(100_000));
    let agent = |name: &str, size: Option<usize>| -> Vec<f64> {
        let measures = report.find("agent", name);
        let measures = measures.filter(|m| size.is_none() || m.prefixes == size);
        measures.map(|m| m.value.median).collect()
    };
    let one = agent("reload, one rule", None);
    let one_of_30 = agent("reload, one rule", Some(30));
    let started = agent("started, to", Some(100_000));
    let pgbench = |name: &str| -> Vec<f64> {
        let measures = report
            .find("pgbench", name)
            .filter(|m| m.host == Some("filter-agent"));
        measures.filter_map(|m| Some(m.share?.median)).collect()
    };
    let queries = pgbench("select");
    let connections = pgbench("connect");
    report.judge(
        "over the floor, one source: at most 5 ns",
        5.0,
        false,
        &busy,
    );
    report.judge(
        "over the floor, other traffic: at most 1 ns",
        1.0,
        false,
        &other,
    );
    report.judge(
        "live, one source: at least 0.95 of the floor",
        0.95,
        true,
        &live,
    );
    report.judge(
        "live, random sources at 100,000 prefixes: at least 0.90",
        0.90,
        true,
        &random,
    );
    report.judge(
        "one rule changed, at 30 prefixes: under 10 ms",
        10.0,
        false,
        &one_of_30,
    );
    report.judge(
        "one rule changed, at any size: under 10 ms",
        10.0,
        false,
        &one,
    );
    report.judge(
        "100,000 prefixes, started to enforced: under 300 ms",
        300.0,
        false,
        &started,
    );
    let forced = report.find("forced TLS", "").filter_map(|m| m.share);
    let forced: Vec<f64> = forced.map(|share| share.median).collect();
    report.judge(
        "TLS forced: at least 0.98 of not forced",
        0.98,
        true,
        &forced,
    );
    report.judge(
        "pgbench, select only: at least 0.99 of no filter",
        0.99,
        true,
        &queries,
    );
    report.judge(
        "pgbench, connecting: at least 0.99 of no filter",
        0.99,
        true,
        &connections,
    );
}
