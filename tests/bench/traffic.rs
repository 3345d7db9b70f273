//! What is sent: allowed networks, frames, and the generator that sends them.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf, EbpfLoader, TestRun as _, TestRunOptions,
    programs::{TestRunAttrs, Xdp},
};
use filter_tests::{
    frames::{Packet, Protocol},
    net::{Namespace, addressing},
};
use nix::{
    net::if_::if_nametoindex,
    sched::{CpuSet, sched_setaffinity},
    time::{ClockId, clock_gettime},
    unistd::Pid,
};

/// The object that `build.rs` builds.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bench"));

pub const PORT: u16 = 5432;
/// Where TLS is forced.
pub const TLS_PORT: u16 = 5433;
const OTHER_PORT: u16 = 9999;

/// In each of its /24s, from the lowest on, one prefix is allowed: what is next to them is sent from
/// this network.
pub const DENSE: [u8; 2] = [11, 7];
const ALLOWED4: Ipv4Addr = Ipv4Addr::new(DENSE[0], DENSE[1], 0, 77);
const NEXT_TO_ALLOWED4: Ipv4Addr = Ipv4Addr::new(DENSE[0], DENSE[1], 0, 78);
pub const DENIED4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
pub const ALLOWED6: Ipv6Addr = Ipv6Addr::new(0x2a01, 0xe0a, 0, 0, 0, 0, 0, 0x77);
pub const DENIED6: Ipv6Addr = Ipv6Addr::new(0x2001, 0x470, 0, 0, 0, 0, 0, 7);

/// Frames that are alike but for their sources.
pub struct Traffic {
    pub name: &'static str,
    pub frame: Vec<u8>,
    is_v4: bool,
    /// Bits of the source's words, as in memory, that are random.
    random: [u32; 4],
    /// Whether the policy lets them pass; `None`: some.
    pub passes: Option<bool>,
}

impl Traffic {
    pub const fn family(&self) -> &'static str {
        if self.is_v4 { "IPv4" } else { "IPv6" }
    }

    /// A frame as the generator sends them.
    pub fn frame_at_random(&self, random: &mut fastrand::Rng) -> Vec<u8> {
        let mut frame = self.frame.clone();
        let source = frame[14 + if self.is_v4 { 12 } else { 8 }..]
            .as_chunks_mut()
            .0;
        for (word, mask) in source.iter_mut().zip(self.random) {
            let before = u32::from_ne_bytes(*word);
            *word = (before & !mask | random.u32(..) & mask).to_ne_bytes();
        }
        frame
    }
}

/// Segments whose checksum is wrong: where no filter is, every one gets as far as TCP, which drops it
/// for that, counted, at the same cost whatever stands in front.
fn segment(source: IpAddr, port: u16) -> Vec<u8> {
    let mut frame = Packet::new(&addressing(source, port, Protocol::Tcp), 1).frame();
    let checksum = 14 + if source.is_ipv4() { 20 } else { 40 } + 16;
    frame[checksum] ^= 0xff;
    frame
}

/// The opening of a PostgreSQL connection with TLS, and a segment of it once it is judged.
pub fn judged() -> ([Vec<u8>; 3], Vec<u8>) {
    const SYN: u8 = 2;
    const DATA: u8 = 24;
    let segment = |sequence: u32, flags: u8, payload: &[u8]| {
        let mut packet = Packet::new(&addressing(ALLOWED4.into(), TLS_PORT, Protocol::Tcp), 1);
        let header = &mut packet.segment;
        header.truncate(20);
        header[4..8].copy_from_slice(&sequence.to_be_bytes());
        header[12..14].copy_from_slice(&[5 << 4, flags]);
        header.extend(payload);
        packet.frame()
    };
    let request = [0, 0, 0, 8, 4, 210, 22, 47];
    let mut hello = vec![22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3];
    hello.resize(60, 9);
    let mut record = vec![23, 3, 3, 0, 50];
    record.resize(55, 9);
    let opening = [
        segment(1000, SYN, &[]),
        segment(1001, DATA, &request),
        segment(1009, DATA, &hello),
    ];
    (opening, segment(5000, DATA, &record))
}

pub fn traffics() -> Vec<Traffic> {
    let all4 = [u32::MAX, 0, 0, 0];
    let low16 = [0xffff_u32.to_be(), 0, 0, 0];
    // All of 2000::/3.
    let all6 = [0x1fff_ffff_u32.to_be(), u32::MAX, 0, u32::MAX];
    let none = [0; 4];
    let traffic = |name, source: IpAddr, port, random, passes| Traffic {
        name,
        frame: segment(source, port),
        is_v4: source.is_ipv4(),
        random,
        passes,
    };
    let denied = Some(false);
    let allowed = Some(true);
    vec![
        traffic("one source, denied", DENIED4.into(), PORT, none, denied),
        traffic("one source, allowed", ALLOWED4.into(), PORT, none, allowed),
        traffic("random sources", DENIED4.into(), PORT, all4, None),
        traffic(
            "random, next to allowed",
            NEXT_TO_ALLOWED4.into(),
            PORT,
            low16,
            None,
        ),
        traffic("another port", DENIED4.into(), OTHER_PORT, none, allowed),
        traffic("one source, denied", DENIED6.into(), PORT, none, denied),
        traffic("one source, allowed", ALLOWED6.into(), PORT, none, allowed),
        traffic("random sources", DENIED6.into(), PORT, all6, None),
        traffic("another port", DENIED6.into(), OTHER_PORT, none, allowed),
    ]
}

/// Frames to run the program on by itself: name, family, frame.
pub fn frames() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let mut echo = segment(DENIED4.into(), 0);
    echo[14 + 9] = 1;
    let mut arp = vec![0xff; 60];
    arp[12..16].copy_from_slice(&[0x08, 0x06, 0, 1]);
    let of = |source: IpAddr, port| segment(source, port);
    vec![
        ("allowed", "IPv4", of(ALLOWED4.into(), PORT)),
        ("denied", "IPv4", of(DENIED4.into(), PORT)),
        (
            "denied, next to allowed",
            "IPv4",
            of(NEXT_TO_ALLOWED4.into(), PORT),
        ),
        ("another port", "IPv4", of(DENIED4.into(), OTHER_PORT)),
        ("ICMP", "IPv4", echo),
        ("allowed", "IPv6", of(ALLOWED6.into(), PORT)),
        ("denied", "IPv6", of(DENIED6.into(), PORT)),
        ("another port", "IPv6", of(DENIED6.into(), OTHER_PORT)),
        ("ARP", "other", arp),
    ]
}

/// Loads the benchmark's own programs. `traffic`: what `generate` is to send.
pub fn programs(traffic: Option<&Traffic>) -> Result<Ebpf> {
    let mut loader = EbpfLoader::new();
    let (at, random) = match traffic {
        Some(traffic) => (14 + if traffic.is_v4 { 12 } else { 8 }, traffic.random),
        None => (0, [0; 4]),
    };
    loader.override_global("SOURCE_AT", &at, true);
    loader.override_global("RANDOM", &random, true);
    let mut ebpf = loader.load(OBJECT).context("load the benchmark's object")?;
    for name in ["floor", "pass", "chance", "generate"] {
        let program: &mut Xdp = program(&mut ebpf, name)?;
        program
            .load()
            .with_context(|| format!("load the program {name}"))?;
    }
    Ok(ebpf)
}

pub fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp> {
    let program = ebpf.program_mut(name);
    let program = program.with_context(|| format!("find the program {name}"))?;
    Ok(program.try_into()?)
}

/// Time per run of a program on one frame, in nanoseconds, with what the test run itself costs.
pub fn time(program: &Xdp, frame: &[u8], repeat: u32) -> Result<f64> {
    let options = TestRunOptions {
        data_in: Some(frame),
        repeat,
        ..TestRunOptions::default()
    };
    // Its own figure is in whole nanoseconds, and before it begins it sleeps until RCU has let go of
    // another program.
    let used = || clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from);
    let begin = used()?;
    program.test_run(options).context("run the program")?;
    Ok((used()? - begin).as_secs_f64() * 1e9 / f64::from(repeat))
}

/// Sends frames from the far end of a host's interface.
pub struct Generator {
    ebpf: Ebpf,
}

/// What came of it.
pub struct Sent {
    /// Packets per second that the host took.
    pub rate: f64,
    /// The share of them that TCP saw.
    pub arrived: f64,
}

impl Generator {
    pub fn new(traffic: &Traffic) -> Result<Self> {
        let ebpf = programs(Some(traffic))?;
        Ok(Self { ebpf })
    }

    fn send(&self, frame: &[u8], interface: u32, count: u32) -> Result<Duration> {
        let program = self
            .ebpf
            .program("generate")
            .context("find the generator")?;
        let program: &Xdp = program.try_into()?;
        // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
        let context = [0, frame.len() as u32, 0, interface, 0, 0].map(u32::to_ne_bytes);
        let options = TestRunOptions {
            data_in: Some(frame),
            ctx_in: Some(context.as_flattened()),
            repeat: count,
            attrs: TestRunAttrs::new().xdp_live_frames(64),
            ..TestRunOptions::default()
        };
        // What it says is per frame, without what it takes to begin and to end.
        let sent = program.test_run(options).context("send frames")?;
        Ok(sent.duration)
    }

    /// Sends from one processor for about so long.
    pub fn measure(
        &self,
        host: &Namespace,
        from: &Namespace,
        interface: &str,
        traffic: &Traffic,
        (processor, time): (usize, Duration),
    ) -> Result<Sent> {
        from.run(|| {
            let mut processors = CpuSet::new();
            processors.set(processor)?;
            sched_setaffinity(Pid::from_raw(0), &processors).context("stay on a processor")?;
            let peer = if_nametoindex("eth0").context("find the far end")?;
            let send = |count| self.send(&traffic.frame, peer, count);
            let count = time.as_nanos() / send(1 << 14)?.as_nanos().max(1);
            let count = u32::try_from(count)?;
            let before = received(host, interface)?;
            let per_frame = send(count)?;
            let after = received(host, interface)?;
            let packets = (after.0 - before.0) as f64;
            // Where the interface's thread took over, some found its queue full: on a busy machine most.
            ensure!(packets > 0.0, "of {count} frames the host took none");
            let taken = packets / f64::from(count);
            if taken < 0.5 {
                eprintln!("of {count} frames the host took {packets}: this rate means little");
            }
            Ok(Sent {
                rate: taken / per_frame.as_secs_f64(),
                arrived: (after.1 - before.1) as f64 / packets,
            })
        })
    }
}

/// Packets that an interface of the host received, and those whose checksum TCP found wrong.
fn received(host: &Namespace, interface: &str) -> Result<(u64, u64)> {
    // What is under way may be handled by another thread: until nothing is.
    let mut before = counted(host, interface)?;
    loop {
        std::thread::sleep(Duration::from_millis(5));
        let now = counted(host, interface)?;
        if now == before {
            return Ok(now);
        }
        before = now;
    }
}

fn counted(host: &Namespace, interface: &str) -> Result<(u64, u64)> {
    let (devices, protocols) = host.run(|| {
        let read = |name| fs::read_to_string(format!("/proc/thread-self/net/{name}"));
        Ok::<_, std::io::Error>((read("dev")?, read("snmp")?))
    })?;
    let packets = devices.lines().find_map(|line| {
        let line = line.trim().strip_prefix(interface)?.strip_prefix(':')?;
        line.split_whitespace().nth(1)?.parse().ok()
    });
    let mut lines = protocols.lines().filter(|line| line.starts_with("Tcp:"));
    let place = lines.next().and_then(|names| {
        let mut names = names.split_whitespace();
        names.position(|name| name == "InCsumErrors")
    });
    let wrong = lines.next().zip(place);
    let wrong =
        wrong.and_then(|(values, place)| values.split_whitespace().nth(place)?.parse().ok());
    Ok((
        packets.with_context(|| format!("find the packets of {interface}"))?,
        wrong.context("find TCP's wrong checksums")?,
    ))
}
