//! The shipped program, loaded by the shipped code, with a policy in its maps.

use std::collections::BTreeMap;

use filter_agent::{
    compile::{Regions, compile},
    kernel::{counters::Counts, filter::Filter},
    policy::{self, Policy},
    region::state as region,
};
use jiff::Timestamp;

use crate::{
    bpffs::Bpffs,
    reference::{Expected, verdict},
};

pub struct Loaded {
    pub filter: Filter,
    pub policy: Policy,
    pub regions: Regions,
    pub now: Timestamp,
    counts: Counts,
    // Unmounted last.
    _bpffs: Bpffs,
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
            now: "2026-06-01T12:00:00Z".parse().unwrap(),
            counts: Counts::new(),
            _bpffs: bpffs,
        };
        loaded.apply(policy);
        loaded
    }

    pub fn apply(&mut self, policy: &str) {
        (self.policy, self.regions) = parse(policy);
        let compiled = compile(&self.policy, &self.regions, self.now);
        self.filter.apply(&compiled).unwrap();
        // As the agent does; frames are judged by themselves here, without sockets.
        self.filter.set_judged(compiled.forces_tls()).unwrap();
        self.counts = self.filter.counts().unwrap();
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
        verdict(&self.policy, &self.regions, frame, self.now)
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
