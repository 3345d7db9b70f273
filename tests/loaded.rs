//! The shipped program, loaded by the shipped code, with a policy in its maps.

use std::collections::BTreeMap;

use aya::maps::{Array, Map, MapData};
use filter_agent::{
    clock::{BootTime, Now},
    compile::compile,
    kernel::{counters::Counts, filter::Filter},
    policy::{self, Policy},
    region::state as region,
    rules::Regions,
    temporary::{Ends, Temporary, Timed},
};
use filter_common::LAYOUT;
use jiff::Timestamp;

use crate::{
    bpffs::Bpffs,
    reference::{Expected, verdict},
};

/// A thousand seconds after a boot.
fn now() -> Now {
    let now = "2026-06-01T12:00:00Z".parse().unwrap();
    Now {
        boot: BootTime(1_000_000_000_000),
        steady: now,
        wall: now,
    }
}

pub struct Loaded {
    pub filter: Filter,
    pub policy: Policy,
    pub regions: Regions,
    pub timed: Timed,
    /// The ends in the kernel as the policy has them, by rule id.
    ends: Vec<u64>,
    counts: Counts,
    // Unmounted last.
    bpffs: Bpffs,
}

impl Loaded {
    pub fn new(policy: &str) -> Self {
        let bpffs = Bpffs::mount();
        let filter = Filter::open(bpffs.path(), Some(4096)).unwrap();
        let (parsed, regions) = parse(policy);
        let mut loaded = Self {
            filter,
            policy: parsed,
            regions,
            timed: Timed {
                now: now(),
                ends: Ends::default(),
                temporary: Vec::new(),
            },
            ends: Vec::new(),
            counts: Counts::new(),
            bpffs,
        };
        loaded.apply(policy);
        loaded
    }

    pub fn apply(&mut self, policy: &str) {
        self.apply_with(policy, Vec::new());
    }

    /// `apply`, with temporary rules.
    pub fn apply_with(&mut self, policy: &str, temporary: Vec<Temporary>) {
        (self.policy, self.regions) = parse(policy);
        self.timed = Timed {
            temporary,
            ..Timed::of(&self.policy, now())
        };
        self.set_ends(|end| end);
        let compiled = compile(&self.policy, &self.regions, &self.timed);
        self.filter.apply(&compiled).unwrap();
        // As the agent does; frames are judged by themselves here, without sockets.
        self.filter.set_judged(compiled.forces_tls()).unwrap();
        let ends = self.ends_in_kernel();
        self.ends = ends.iter().map(|end| end.unwrap()).collect();
        self.pass_to(self.timed.now.boot);
        self.counts = self.filter.counts().unwrap();
    }

    /// Lets time pass: for the kernel, whose clock cannot be set, what has ended by then ended long ago, and the rest ends
    /// never. Nothing else is written, as where no agent runs.
    pub fn pass_to(&mut self, time: BootTime) {
        self.timed.now.boot = time;
        self.set_ends(|end| if end <= time.0 { 1 } else { u64::MAX });
    }

    fn ends_in_kernel(&self) -> Array<MapData, u64> {
        let pin = self
            .bpffs
            .path()
            .join(format!("filter-agent/v{LAYOUT}/ENDS"));
        let map = MapData::from_pin(pin).unwrap();
        Array::try_from(Map::Array(map)).unwrap()
    }

    fn set_ends(&self, end: impl Fn(u64) -> u64) {
        let mut ends = self.ends_in_kernel();
        for (id, &of_policy) in (0..).zip(&self.ends).filter(|(_, end)| **end != 0) {
            ends.set(id, end(of_policy), 0).unwrap();
        }
    }

    /// Runs the program on a frame: what it did, and where it counted that.
    pub fn run(&mut self, frame: &[u8]) -> Expected {
        let pass = self.filter.run_packet(frame).unwrap().passes();
        let counted = self.counted();
        assert!(
            counted.values().sum::<u64>() <= 1,
            "counted more than once: {counted:?}"
        );
        let counter = counted.into_keys().next();
        let (database, reason, monitored) = match counter {
            Some((database, reason, monitored)) => (database, Some(reason), monitored),
            None => (None, None, false),
        };
        Expected {
            pass,
            database,
            reason,
            monitored,
        }
    }

    /// What was counted since the last time.
    pub fn counted(&mut self) -> Counts {
        let counts = self.filter.counts().unwrap();
        let before = std::mem::replace(&mut self.counts, counts);
        let counts = self.counts.iter();
        let new = counts.map(|(key, count)| (key.clone(), count - before.get(key).unwrap_or(&0)));
        new.filter(|&(_, count)| count > 0).collect()
    }

    /// What the reference says of a frame.
    pub fn expected(&self, frame: &[u8]) -> Expected {
        verdict(&self.policy, &self.regions, frame, &self.timed)
    }
}

fn parse(text: &str) -> (Policy, Regions) {
    let (policy, _) = policy::parse(text).unwrap_or_else(|problems| {
        panic!("refused: {problems:?}\n{text}");
    });
    let known = region::Regions::new();
    let regions = region::next(&policy, &known, BTreeMap::new(), Timestamp::now()).unwrap();
    (policy, region::prefixes(&regions))
}
