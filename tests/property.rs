//! Random policies and random frames: the program against the reference.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    iter,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
    thread,
    time::Duration,
};

use aya::{
    TestRun as _, TestRunOptions,
    programs::{Xdp, loaded_programs},
};
use aya_obj::programs::XdpAttachType;
use filter_agent::{
    clock::{BootTime, Now},
    compile::{Compiled, compile},
    kernel::{counters::Counts, filter::Ran, traced::Traced},
    policy::{self, Model, Policy, parse_cidr},
    temporary::{Kind, Temporary},
};
use filter_common::Reason;
use filter_tests::{
    frames::{self, Addressing, Packet, Protocol, Rng},
    loaded::Loaded,
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};

const PORTS: [u16; 4] = [5432, 5433, 3306, 53];

const LOCALS: [&str; 4] = ["192.0.2.10", "192.0.2.11", "2001:db8::10", "2001:db8::11"];

fn pick<T: Copy>(rng: &mut Rng, list: &[T]) -> T {
    list[rng.usize(..list.len())]
}

fn random_address(rng: &mut Rng, v4: bool) -> IpAddr {
    if v4 {
        Ipv4Addr::from(rng.u32(..)).into()
    } else {
        Ipv6Addr::from(rng.u128(..)).into()
    }
}

/// Of every length, and often inside or around one of the others.
fn random_prefix(rng: &mut Rng, others: &BTreeSet<IpNet>) -> IpNet {
    let v4 = rng.u8(..3) > 0;
    let near = rng.choice(others).filter(|_| rng.bool()).map(IpNet::addr);
    let address = near.unwrap_or_else(|| random_address(rng, v4));
    let longest = if address.is_ipv4() { 32 } else { 128 };
    let length = match rng.u8(..6) {
        0 => rng.u8(..=2),
        1 | 2 => longest - rng.u8(..=2),
        _ => rng.u8(..=longest),
    };
    match address {
        IpAddr::V4(address) => Ipv4Net::new_assert(address, length).trunc().into(),
        IpAddr::V6(address) => Ipv6Net::new_assert(address, length).trunc().into(),
    }
}

/// Prefixes that a policy may have, as items of a YAML list.
fn random_prefixes(rng: &mut Rng, count: usize) -> Vec<String> {
    let mut prefixes = BTreeSet::new();
    for _ in 0..count {
        prefixes.insert(random_prefix(rng, &prefixes));
    }
    let texts = prefixes.iter().map(ToString::to_string);
    // What the policy refuses, such as 127.0.0.0/9, no rule of any policy can say.
    texts.filter(|text| parse_cidr(text).is_ok()).collect()
}

/// One is past.
const EXPIRES: [&str; 8] = [
    "",
    "",
    "",
    "",
    ", expires: 2026-01-01T00:00:00Z",
    ", expires: 2026-06-01T13:00:00Z",
    ", expires: 2026-06-01T14:00:00Z",
    ", expires: 2026-06-02T12:00:00Z",
];

/// Exceptions inside a prefix, that leave something of it, as a field.
fn random_exceptions(rng: &mut Rng, prefix: &str) -> String {
    let outer: IpNet = prefix.parse().unwrap();
    if rng.u8(..4) > 0 || outer.prefix_len() > 20 {
        return String::new();
    }
    let holes: Vec<String> = (0..rng.usize(1..4))
        .filter_map(|_| match outer {
            IpNet::V4(outer) => {
                let host = rng.u32(..) & !u32::from(outer.netmask());
                let address = u32::from(outer.network()) | host;
                let length = rng.u8(outer.prefix_len() + 4..=32);
                Some(IpNet::V4(Ipv4Net::new_assert(address.into(), length).trunc()).to_string())
            }
            IpNet::V6(_) => None,
        })
        .filter(|text| parse_cidr(text).is_ok())
        .collect();
    format!(", except: [{}]", quoted(&holes))
}

/// A policy file that the parser accepts.
fn random_policy(rng: &mut Rng) -> String {
    let mut text = String::from("interfaces: [eth0]\nregions:\n");
    for name in ["office", "cloud"] {
        let prefixes = [random_prefixes(rng, 20), vec!["198.51.100.0/24".into()]].concat();
        let prefixes: BTreeSet<_> = prefixes.into_iter().collect();
        let prefixes: Vec<_> = prefixes.into_iter().collect();
        writeln!(text, "  {name}: {{prefixes: [{}]}}", quoted(&prefixes)).unwrap();
    }
    let count = rng.usize(..4);
    writeln!(
        text,
        "regional_network: [{}]",
        quoted(&random_prefixes(rng, count))
    )
    .unwrap();
    text.push_str("databases:\n");
    let count = rng.usize(..5);
    let mut claimed = BTreeSet::new();
    for number in 0..count {
        let protocol = pick(rng, &["tcp", "udp"]);
        let mut ports = BTreeSet::new();
        ports.insert(pick(rng, &PORTS));
        ports.insert(pick(rng, &PORTS));
        // A port of one address, or of all: a claim on all is a claim on each.
        let everywhere = rng.u8(..3) > 0;
        let addresses: Vec<&str> = match everywhere {
            true => LOCALS.to_vec(),
            false => LOCALS.into_iter().filter(|_| rng.bool()).collect(),
        };
        let claims: Vec<_> = addresses
            .iter()
            .flat_map(|address| ports.iter().map(move |port| (protocol, *port, *address)))
            .collect();
        let free = |claim| !claimed.contains(claim);
        if addresses.is_empty() || !claims.iter().all(free) {
            continue;
        }
        claimed.extend(claims);
        let monitor = rng.u8(..3) == 0;
        let list: Vec<_> = ports.iter().map(ToString::to_string).collect();
        // A name often comes and goes, and its place in the kernel is used again.
        writeln!(text, "  - name: db{number}-{}", rng.u8(..3)).unwrap();
        writeln!(text, "    ports: [{}]", list.join(", ")).unwrap();
        writeln!(text, "    protocol: {protocol}\n    monitor: {monitor}").unwrap();
        if !everywhere {
            let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
            writeln!(text, "    addresses: [{}]", quoted(&addresses)).unwrap();
        }
        let cluster = rng.usize(..3);
        text.push_str("    cluster:\n");
        for prefix in random_prefixes(rng, cluster) {
            let expires = pick(rng, &EXPIRES);
            writeln!(text, "      - {{cidr: \"{prefix}\"{expires}}}").unwrap();
        }
        if text.ends_with("cluster:\n") {
            text.insert_str(text.len() - 1, " []");
        }
        if rng.u8(..4) == 0 {
            text.push_str("    model: shared\n");
            continue;
        }
        text.push_str("    model: dedicated\n    force_tls: false\n    rules:\n");
        let rules = rng.usize(..25);
        for prefix in random_prefixes(rng, rules) {
            let except = random_exceptions(rng, &prefix);
            let expires = pick(rng, &EXPIRES);
            writeln!(text, "      - {{cidr: \"{prefix}\"{except}{expires}}}").unwrap();
        }
        let region = pick(rng, &["office", "cloud"]);
        writeln!(text, "      - {{region: {region}}}").unwrap();
    }
    if text.ends_with("databases:\n") {
        text.insert_str(text.len() - 1, " []");
    }
    text
}

fn quoted(texts: &[String]) -> String {
    let texts: Vec<_> = texts.iter().map(|text| format!("\"{text}\"")).collect();
    texts.join(", ")
}

/// Every prefix that the policy's text names.
fn prefixes(policy: &str) -> Vec<IpNet> {
    let words = policy.split(|c: char| !(c.is_ascii_hexdigit() || "./:".contains(c)));
    words.filter_map(|word| word.parse().ok()).collect()
}

/// Addresses at a prefix's edges, where an error of one shows.
fn at_edge(rng: &mut Rng, prefix: &IpNet) -> IpAddr {
    let step = pick(rng, &[-1, 0, 1]);
    match (prefix, rng.bool()) {
        (IpNet::V4(prefix), first) => {
            let edge = if first {
                prefix.network()
            } else {
                prefix.broadcast()
            };
            Ipv4Addr::from(u32::from(edge).wrapping_add_signed(step as i32)).into()
        }
        (IpNet::V6(prefix), first) => {
            let edge = if first {
                prefix.network()
            } else {
                prefix.broadcast()
            };
            Ipv6Addr::from(u128::from(edge).wrapping_add_signed(step)).into()
        }
    }
}

fn random_source(rng: &mut Rng, prefixes: &[IpNet]) -> IpAddr {
    let special = [
        "0.0.0.0",
        "0.1.2.3",
        "127.0.0.1",
        "224.0.0.1",
        "239.1.2.3",
        "255.255.255.255",
        "240.0.0.1",
        "::",
        "::1",
        "::2",
        "ff02::1",
        "::ffff:192.0.2.1",
        "::192.0.2.1",
        "64:ff9b::c000:201",
        "2002:c000:201::1",
        "fe80::1",
    ];
    match rng.u8(..10) {
        0 => pick(rng, &special).parse().unwrap(),
        1 => random_address(rng, true),
        2 => random_address(rng, false),
        _ => match rng.choice(prefixes) {
            Some(prefix) => at_edge(rng, prefix),
            None => random_address(rng, true),
        },
    }
}

fn random_addressing(rng: &mut Rng, prefixes: &[IpNet]) -> Addressing {
    let source = random_source(rng, prefixes);
    let destinations = if source.is_ipv4() {
        [
            "192.0.2.10",
            "192.0.2.11",
            "192.0.2.12",
            "239.1.2.3",
            "255.255.255.255",
        ]
    } else {
        [
            "2001:db8::10",
            "2001:db8::11",
            "2001:db8::12",
            "ff02::1",
            "::ffff:192.0.2.10",
        ]
    };
    // Mostly the first ones.
    let among = if rng.u8(..5) == 0 { 5 } else { 3 };
    let port = match rng.u8(..8) {
        0 => rng.u16(..),
        1 => pick(rng, &PORTS).wrapping_add(pick(rng, &[1, 256, u16::MAX])),
        _ => pick(rng, &PORTS),
    };
    Addressing {
        source_mac: [2, 0, 0, 0, 0, 1],
        destination_mac: [2, 0, 0, 0, 0, 2],
        source,
        destination: pick(rng, &destinations[..among]).parse().unwrap(),
        source_port: pick(rng, &[40000, 5432, 53]),
        destination_port: port,
        protocol: pick(rng, &Protocol::ALL),
    }
}

fn random_frames(rng: &mut Rng, prefixes: &[IpNet], count: usize) -> Vec<Vec<u8>> {
    let mut frames = Vec::with_capacity(count);
    while frames.len() < count {
        let addressing = random_addressing(rng, prefixes);
        let id = rng.u32(..);
        if rng.bool() {
            frames.push(Packet::new(&addressing, id).frame());
        } else {
            frames.extend(frames::hostile(rng, &addressing, id).frames);
        }
    }
    frames
}

/// All frames at once, since reading the counters takes longer than judging a packet; on a mistake
/// one by one, to tell which.
fn compare(loaded: &mut Loaded, text: &str, frames: &[Vec<u8>], seed: u64) -> Counts {
    let mut agree = true;
    let mut counters = Counts::new();
    for frame in frames {
        let expected = loaded.expected(frame);
        agree &= loaded.filter.run_packet(frame).unwrap().passes() == expected.pass;
        if let Some(counter) = expected.counter() {
            *counters.entry(counter).or_default() += 1;
        }
    }
    if agree & (loaded.counted() == counters) {
        return counters;
    }
    for frame in frames {
        let (expected, actual) = (loaded.expected(frame), loaded.run(frame));
        let hex: String = frame.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            actual, expected,
            "seed {seed}: program left, reference right, of frame\n{hex}\nunder policy\n{text}"
        );
    }
    panic!("seed {seed}: the program counts other than the reference, but not one by one");
}

/// From the environment to repeat a failure, else another one each time.
fn seed() -> u64 {
    match std::env::var("FILTER_TESTS_SEED") {
        Ok(seed) => seed.parse().expect("FILTER_TESTS_SEED is a number"),
        Err(_) => Rng::new().u64(..),
    }
}

#[test]
fn verdict_and_counter_equal_the_reference_after_every_change_of_policy() {
    const POLICIES: usize = 600;
    const FRAMES: usize = 300;
    let seed = seed();
    let mut rng = Rng::with_seed(seed);
    let mut text = random_policy(&mut rng);
    let mut loaded = Loaded::new(&text);
    let mut reasons = BTreeSet::new();
    // Sources that the program may still know from the policy before.
    let mut known = Vec::new();
    for _ in 0..POLICIES {
        let prefixes = prefixes(&text);
        let mut frames = random_frames(&mut rng, &prefixes, FRAMES);
        compare(&mut loaded, &text, &known, seed);
        let counters = compare(&mut loaded, &text, &frames, seed);
        frames.truncate(FRAMES / 3);
        known = frames;
        reasons.extend(
            counters
                .into_keys()
                .map(|(_, reason, monitored)| (reason, monitored)),
        );
        // Some are replaced before a packet is judged by them.
        for _ in 0..rng.usize(1..=2) {
            text = random_policy(&mut rng);
            loaded.apply(&text);
        }
    }
    // Nor where TLS is forced, which is another test's.
    let never = [
        Reason::NoPolicy,
        Reason::NotTls,
        Reason::TlsUnclear,
        Reason::TlsUnenforced,
        Reason::NoProxyHeader,
        Reason::Blocked,
    ];
    let all = Reason::ALL
        .into_iter()
        .filter(|reason| !never.contains(reason));
    let all = all.flat_map(|reason| [(reason, false), (reason, true)]);
    assert_eq!(
        reasons,
        all.collect(),
        "seed {seed}: not every verdict came up"
    );
}

/// Of a long list only what differs is looked at, and what is in front of the tries is added to and, in time, filled anew:
/// prefixes that came, went, or are covered by others are judged as all are.
#[test]
fn long_list_that_changes_little_by_little_is_judged_as_the_reference_does() {
    const PREFIXES: usize = 2_000;
    const CHANGES: usize = 150;
    let seed = seed();
    let mut rng = Rng::with_seed(seed);
    let mut list: BTreeSet<IpNet> = BTreeSet::new();
    let valid =
        |prefix: &IpNet| prefix.prefix_len() > 20 && parse_cidr(&prefix.to_string()).is_ok();
    let grow = |rng: &mut Rng, list: &mut BTreeSet<IpNet>| {
        let prefix = random_prefix(rng, list);
        list.extend(Some(prefix).filter(valid));
        prefix
    };
    while list.len() < PREFIXES {
        grow(&mut rng, &mut list);
    }
    let mut loaded = Loaded::new("interfaces: [eth0]\ndatabases: []\n");
    let mut rules: Vec<String> = Vec::new();
    let mut changed: Vec<IpNet> = Vec::new();
    for _ in 0..CHANGES {
        for _ in 0..rng.usize(1..6) {
            match rng.u8(..3) {
                0 => changed.push(grow(&mut rng, &mut list)),
                1 => {
                    let place = rng.usize(..list.len());
                    let gone = *list.iter().nth(place).unwrap();
                    list.remove(&gone);
                    changed.push(gone);
                }
                // A rule for a part of the list, or around it, that has an end or none.
                _ => {
                    let prefix = Some(random_prefix(&mut rng, &list)).filter(valid);
                    let rule = prefix.map(|prefix| format!("cidr: \"{prefix}\""));
                    let is_new = |rule: &String| rules.iter().all(|other| !other.starts_with(rule));
                    let rule = rule.filter(is_new);
                    rules.extend(rule.map(|rule| rule + pick(&mut rng, &EXPIRES)));
                    if rules.len() > 8 {
                        rules.remove(rng.usize(..rules.len()));
                    }
                    changed.extend(prefix);
                }
            }
        }
        rng.shuffle(&mut rules);
        let texts: Vec<String> = list.iter().map(ToString::to_string).collect();
        let own: String = rules.iter().map(|rule| format!("{{{rule}}}, ")).collect();
        let text = format!(
            "interfaces: [eth0]
regions: {{long: {{prefixes: [{}]}}}}
databases:
  - {{name: a, port: {}, model: dedicated, force_tls: false, rules: [{own}{{region: long}}]}}
",
            quoted(&texts),
            PORTS[0],
        );
        loaded.apply(&text);
        let around = changed.iter().rev().take(40).chain(list.iter().take(40));
        let around: Vec<IpNet> = around.copied().collect();
        let frames = random_frames(&mut rng, &around, 300);
        compare(&mut loaded, &text, &frames, seed);
    }
}

/// Rules, exceptions, members of clusters, temporary rules and blocks that overlap: before the first end, and at and after
/// each, with the maps and the verdict caches as they were.
#[test]
fn every_end_is_an_end_without_an_agent() {
    let seed = seed();
    let mut rng = Rng::with_seed(seed);
    let mut loaded = Loaded::new("interfaces: [eth0]\ndatabases: []\n");
    let mut reasons = BTreeSet::new();
    for _ in 0..120 {
        let text = random_policy(&mut rng);
        let (policy, _) = policy::parse(&text).unwrap();
        let mut around = prefixes(&text);
        let temporary = random_temporary(&mut rng, &policy, &around, loaded.timed.now);
        around.extend(temporary.iter().map(|rule| rule.source));
        let mut times: Vec<BootTime> = temporary.iter().map(|rule| rule.end).collect();
        loaded.apply_with(&text, temporary);
        times.extend(loaded.timed.ends.iter().map(|(_, end)| end));
        times.extend(
            times
                .clone()
                .iter()
                .map(|end| BootTime(end.0.saturating_sub(1))),
        );
        times.retain(|&time| time > loaded.timed.now.boot);
        times.sort_unstable();
        times.dedup();
        let frames: Vec<Vec<u8>> = (0..60)
            .map(|_| {
                let mut addressing = random_addressing(&mut rng, &around);
                addressing.destination_port = pick(&mut rng, &PORTS);
                Packet::new(&addressing, rng.u32(..)).frame()
            })
            .collect();
        for time in [loaded.timed.now.boot].into_iter().chain(times) {
            loaded.pass_to(time);
            for frame in &frames {
                let (expected, mut actual) = (loaded.expected(frame), loaded.run(frame));
                reasons.extend(expected.reason);
                // A block may outlast, in the verdict cache, the rule of the source that it blocks.
                if expected.reason == Some(Reason::NotAllowed)
                    && actual.reason == Some(Reason::Blocked)
                {
                    actual.reason = expected.reason;
                }
                assert_eq!(
                    actual, expected,
                    "seed {seed}: program left, reference right, at {time:?} of {:?}\n{frame:02x?}\nunder policy\n\
                     {text}",
                    loaded.timed
                );
            }
        }
    }
    let all = [Reason::Allowed, Reason::NotAllowed, Reason::Blocked];
    assert!(
        all.iter().all(|reason| reasons.contains(reason)),
        "seed {seed}: {reasons:?}"
    );
}

/// Temporary rules and blocks at and around prefixes of a policy.
fn random_temporary(rng: &mut Rng, policy: &Policy, around: &[IpNet], now: Now) -> Vec<Temporary> {
    let mut rules: Vec<Temporary> = Vec::new();
    for database in &policy.databases {
        let Model::Dedicated { rules: written } = &database.model else {
            continue;
        };
        let mut room = 30 - written.len();
        for _ in 0..rng.usize(..8) {
            let others: BTreeSet<IpNet> = around.iter().copied().collect();
            let source = random_prefix(rng, &others);
            let kind = pick(rng, &[Kind::Allow, Kind::Block]);
            let is_same = |rule: &Temporary| {
                (&rule.database, rule.kind, rule.source) == (&database.name, kind, source)
            };
            let is_full = kind == Kind::Allow && room == 0;
            if is_full || parse_cidr(&source.to_string()).is_err() || rules.iter().any(is_same) {
                continue;
            }
            room -= usize::from(kind == Kind::Allow);
            let end = now.boot.after(Duration::from_secs(rng.u64(1..5) * 1800));
            rules.push(Temporary::new(&database.name, kind, source, end, now));
        }
    }
    rules
}

/// Few places, many sources: each is judged again and again, known or not, near an allowed prefix or far
/// from all, and by what the policy is at that moment.
#[test]
fn source_that_comes_again_is_judged_by_the_policy_of_that_moment() {
    let seed = seed();
    let mut rng = Rng::with_seed(seed);
    let mut loaded = Loaded::new("interfaces: [eth0]\ndatabases: []\n");
    for _ in 0..30 {
        let text = random_policy(&mut rng);
        let prefixes = prefixes(&text);
        let again: Vec<Vec<u8>> = (0..1500)
            .map(|_| {
                let mut addressing = random_addressing(&mut rng, &prefixes);
                addressing.protocol = Protocol::Tcp;
                addressing.destination_port = pick(&mut rng, &PORTS);
                let last = rng.u16(..).to_be_bytes();
                addressing.source = match addressing.source {
                    IpAddr::V4(source) if rng.bool() => {
                        let [a, b, ..] = source.octets();
                        Ipv4Addr::new(a, b, last[0], last[1]).into()
                    }
                    // The same bits in the place of another family's address.
                    IpAddr::V6(_) if rng.u8(..4) == 0 => {
                        let low = u128::from(rng.u64(..)) >> pick(&mut rng, &[0, 32]);
                        let high = u128::from(pick(&mut rng, &[0, u64::MAX])) << 64;
                        Ipv6Addr::from(high | low).into()
                    }
                    source => source,
                };
                Packet::new(&addressing, rng.u32(..)).frame()
            })
            .collect();
        for text in [&text, &random_policy(&mut rng), &text] {
            loaded.apply(text);
            compare(&mut loaded, text, &again, seed);
            compare(&mut loaded, text, &again, seed);
        }
    }
}

/// The program that is loaded, for a thread of its own, on the CPU of this number among those that there are.
struct Judge {
    program: Xdp,
    cpu: usize,
    /// Frames judged under one policy, and while it was changed.
    settled: AtomicUsize,
    changing: AtomicUsize,
}

impl Judge {
    fn new(loaded: &Loaded, cpu: usize) -> Self {
        let id = loaded.filter.program_id().unwrap();
        let mut programs = loaded_programs().map(Result::unwrap);
        let info = programs.find(|program| program.id() == id).unwrap();
        Self {
            program: Xdp::from_program_info(info, "filter".into(), XdpAttachType::Interface)
                .unwrap(),
            cpu,
            settled: AtomicUsize::new(0),
            changing: AtomicUsize::new(0),
        }
    }

    fn stay(&self) {
        let may = sched_getaffinity(Pid::from_raw(0)).unwrap();
        let may: Vec<usize> = (0..CpuSet::count())
            .filter(|&cpu| may.is_set(cpu).unwrap())
            .collect();
        let mut own = CpuSet::new();
        own.set(may[self.cpu % may.len()]).unwrap();
        sched_setaffinity(Pid::from_raw(0), &own).unwrap();
    }

    fn passes(&self, frame: &[u8]) -> bool {
        let mut after = vec![0; frame.len()];
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut after),
            ..TestRunOptions::default()
        };
        let action = self.program.test_run(options).unwrap().return_value;
        let frame = after;
        Ran { action, frame }.passes()
    }
}

/// Each CPU has a verdict cache of its own, and reads maps that are written meanwhile: what both policies drop never passes,
/// what both let pass is never dropped, and once a change is done the policy before it is forgotten.
#[test]
fn verdict_of_two_processors_is_of_the_policy_before_or_after_while_it_changes() {
    const POLICIES: usize = 10;
    const FRAMES: usize = 600;
    const CHANGES: usize = 300;
    const JUDGED: usize = 20_000;
    let seed = seed();
    let mut rng = Rng::with_seed(seed);
    let mut loaded = Loaded::new("interfaces: [eth0]\ndatabases: []\n");
    let texts: Vec<String> = iter::repeat_with(|| random_policy(&mut rng))
        .map(|text| {
            EXPIRES
                .iter()
                .filter(|end| !end.is_empty())
                .fold(text, |text, end| text.replace(end, ""))
        })
        .take(POLICIES)
        .collect();
    let around: Vec<IpNet> = texts.iter().flat_map(|text| prefixes(text)).collect();
    let frames = random_frames(&mut rng, &around, FRAMES);
    let policies: Vec<(Compiled, Vec<bool>)> = texts
        .iter()
        .map(|text| {
            loaded.apply(text);
            let passes = |frame: &Vec<u8>| loaded.expected(frame).pass;
            let passes = frames.iter().map(passes).collect();
            let compiled = compile(&loaded.policy, &loaded.regions, &loaded.timed);
            (compiled, passes)
        })
        .collect();
    // Whether the last one is in force, or about to be, is told by `changes`: twice their number, and one less until it is.
    let order: Vec<usize> = iter::once(POLICIES - 1)
        .chain(iter::repeat_with(|| rng.usize(..POLICIES)))
        .take(100 * CHANGES)
        .collect();
    let changes = AtomicUsize::new(0);
    let judges = [0, 1].map(|cpu| Judge::new(&loaded, cpu));
    let judge = |own: &Judge| {
        own.stay();
        let mut rng = Rng::with_seed(seed ^ own.cpu as u64);
        loop {
            let frame = rng.usize(..FRAMES);
            let before = changes.load(SeqCst);
            let passes = own.passes(&frames[frame]);
            let after = changes.load(SeqCst);
            if before == usize::MAX || after == usize::MAX {
                return;
            }
            let mut may = order[before / 2..=after.div_ceil(2)]
                .iter()
                .map(|&policy| policies[policy].1[frame]);
            assert!(
                may.any(|may| may == passes),
                "seed {seed}: passes: {passes}, between changes {before} and {after}, of\n{:02x?}\nunder\n{}\nand\n{}",
                frames[frame],
                texts[order[before / 2]],
                texts[order[after.div_ceil(2)]]
            );
            let count = match before == after && before.is_multiple_of(2) {
                true => &own.settled,
                false => &own.changing,
            };
            count.fetch_add(1, SeqCst);
        }
    };
    thread::scope(|scope| {
        let running = judges.each_ref().map(|own| scope.spawn(|| judge(own)));
        let ended = || running.iter().any(|judge| judge.is_finished());
        for (change, &policy) in order.iter().enumerate().skip(1) {
            let enough = |own: &Judge| own.changing.load(SeqCst) >= JUDGED;
            if change > CHANGES && judges.iter().all(enough) || ended() {
                break;
            }
            changes.store(2 * change - 1, SeqCst);
            loaded.filter.apply(&policies[policy].0).unwrap();
            changes.store(2 * change, SeqCst);
            // Each source may have been remembered by then.
            let settled = judges.each_ref().map(|own| own.settled.load(SeqCst));
            let has_judged =
                |(own, before): (&Judge, usize)| own.settled.load(SeqCst) >= before + FRAMES / 2;
            while !judges.iter().zip(settled).all(has_judged) && !ended() {
                thread::yield_now();
            }
        }
        changes.store(usize::MAX, SeqCst);
    });
    for own in &judges {
        let changing = own.changing.load(SeqCst);
        assert!(changing >= JUDGED, "only {changing} while it changed");
    }
}

#[test]
fn well_formed_packet_to_no_protected_port_passes() {
    let seed = seed();
    let mut rng = Rng::with_seed(seed);
    let mut loaded = Loaded::new("interfaces: [eth0]\ndatabases: []\n");
    for _ in 0..100 {
        let text = random_policy(&mut rng);
        loaded.apply(&text);
        let prefixes = prefixes(&text);
        let databases = loaded.policy.databases.clone();
        for _ in 0..300 {
            let mut addressing = random_addressing(&mut rng, &prefixes);
            let protected = |addressing: &Addressing| {
                databases.iter().any(|database| {
                    database.protocol == addressing.protocol
                        && database.ports.contains(&addressing.destination_port)
                })
            };
            while protected(&addressing) {
                addressing.destination_port = rng.u16(..);
            }
            let packet = well_formed(&mut rng, &addressing);
            let frame = packet.frame();
            let pass = loaded.filter.run_packet(&frame).unwrap().passes();
            assert!(
                pass,
                "seed {seed}: dropped {packet:?}\nunder policy\n{text}"
            );
        }
        assert_eq!(
            loaded.counted(),
            Default::default(),
            "seed {seed}: counted other traffic"
        );
    }
}

/// The traced programs are other programs: the same frames, under the same policies.
#[test]
fn verdict_and_counter_are_the_same_while_a_trace_is_on() {
    let seed = seed();
    let mut rng = Rng::with_seed(seed);
    let mut loaded = Loaded::new("interfaces: [eth0]\ndatabases: []\n");
    for _ in 0..40 {
        let text = random_policy(&mut rng);
        loaded.apply(&text);
        let frames = random_frames(&mut rng, &prefixes(&text), 300);
        let untraced = compare(&mut loaded, &text, &frames, seed);
        let place = loaded.filter.trace_place();
        let traced = Traced::load(&place, "0.0.0.0/0".parse().unwrap()).unwrap();
        let own = loaded.filter.program_id().unwrap();
        loaded.filter.begin_trace(traced, None).unwrap();
        assert_ne!(loaded.filter.program_id().unwrap(), own);
        assert_eq!(compare(&mut loaded, &text, &frames, seed), untraced);
        loaded.filter.end_trace().unwrap();
        assert_eq!(loaded.filter.program_id().unwrap(), own);
    }
}

/// Within what the filter follows: four tags, eight extension headers.
fn well_formed(rng: &mut Rng, addressing: &Addressing) -> Packet {
    let mut packet = Packet::new(addressing, rng.u32(..));
    let tag = |rng: &mut Rng| {
        (
            pick(rng, &[frames::VLAN, frames::SERVICE_VLAN]),
            rng.u16(..),
        )
    };
    packet.tags = (0..rng.usize(..=4)).map(|_| tag(rng)).collect();
    if addressing.source.is_ipv4() {
        packet.options = vec![pick(rng, &[0, 1]); rng.usize(..=40)];
        return packet;
    }
    let header = |rng: &mut Rng| match rng.u8(..4) {
        0 => frames::options(frames::HOP_BY_HOP, rng.u8(..8)),
        1 => frames::authentication(rng.u8(..8)),
        2 => frames::fragment(0, false, 1),
        _ => frames::options(frames::DESTINATION_OPTIONS, rng.u8(..8)),
    };
    packet.inner = (0..rng.usize(..=8)).map(|_| header(rng)).collect();
    packet
}
