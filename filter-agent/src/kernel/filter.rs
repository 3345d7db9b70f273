//! The filter: the loaded program, its maps, and what they hold.

use std::{
    fs::File,
    net::IpAddr,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use aya::{Ebpf, EbpfLoader, TestRun as _, TestRunOptions, maps::MapType, programs::Xdp};
use filter_common::{
    ADOPTION_SECONDS, ANSWER_LENGTH, COUNTERS, DEFAULT_MAX_PREFIXES, EXEMPT, LAYOUT, Reason,
    Stream, counter_index, hit_index,
};
use nix::{
    fcntl::Flock,
    time::{ClockId, clock_gettime},
};

use crate::{
    compile::Compiled,
    kernel::{
        counters::{Counts, Fates, Hits},
        difference::Difference,
        image::Image,
        layout::{SHAPES, check_pin, check_pins, share_streams},
        maps::{Allowed, Maps, absent_is_none},
        pins::{adopt_new_links, base, layouts, lock, own_directory},
        program::{OBJECT, check_kernel, load_error, program},
        samples::Dropped,
        steps::Step,
    },
};

/// Prefixes that are worth a second thread to write them.
const MANY: usize = 1_000;

const XDP_PASS: u32 = 2;
const XDP_TX: u32 = 3;

/// The pinned filter of one bpffs, held by one agent at a time.
pub struct Filter {
    /// Where this layout's maps and links are pinned.
    pub(super) pins: PathBuf,
    pub(super) ebpf: Ebpf,
    pub(super) maps: Maps,
    /// What the maps hold. The kernel's tries are read once, before this agent writes: older
    /// kernels must not be asked to list a trie that changes.
    pub(super) held: Image,
    /// Prefixes of one address family that a policy may have.
    max_prefixes: usize,
    _lock: Flock<File>,
}

/// What the program did with a frame.
#[derive(Clone, Debug, PartialEq)]
pub struct Ran {
    pub action: u32,
    /// The frame, as the program left it.
    pub frame: Vec<u8>,
}

impl Ran {
    pub fn passes(&self) -> bool {
        self.action == XDP_PASS
    }

    /// Whether it was sent back.
    pub fn is_answer(&self) -> bool {
        self.action == XDP_TX
    }
}

/// A change that was made, and what it takes to undo it.
#[derive(Debug)]
pub struct Applied {
    pub difference: Difference,
    before: Image,
}

impl Filter {
    /// Loads the program over the maps pinned below `bpffs`, or over new ones.
    ///
    /// # Errors
    /// No bpffs there, a kernel that is too old, another agent, pins that are not ours.
    pub fn open(bpffs: &Path, max_prefixes: Option<u32>, tls_connections: u32) -> Result<Self> {
        check_kernel(bpffs)?;
        let base = base(bpffs)?;
        own_directory(&base)?;
        let lock = lock(&base)?;
        let pins = base.join(format!("v{LAYOUT}"));
        own_directory(&pins)?;
        for (_, pins) in layouts(&base)? {
            adopt_new_links(&pins)?;
        }
        let adopted = check_pins(&pins)?;
        share_streams(&base, &pins)?;
        let max_prefixes = max_prefixes.unwrap_or(DEFAULT_MAX_PREFIXES);
        // Twice: a reload adds all of the new policy before it removes the old.
        let entries = max_prefixes.saturating_mul(2);
        let mut loader = EbpfLoader::new();
        loader.map_max_entries("ALLOWED4", entries);
        loader.map_max_entries("ALLOWED6", entries);
        loader.map_max_entries("STREAMS", tls_connections);
        for shape in &SHAPES {
            loader.map_pin_path(shape.name, pins.join(shape.name));
        }
        let mut ebpf = loader.load(OBJECT).context("create the BPF maps")?;
        program(&mut ebpf)?
            .load()
            .map_err(load_error)
            .context("load the XDP program")?;
        let mut made_for = u32::MAX;
        for shape in SHAPES.iter().filter(|shape| shape.entries.is_none()) {
            let info = check_pin(&pins, shape)?;
            if shape.map_type == MapType::LpmTrie {
                made_for = made_for.min(info.max_entries());
            }
        }
        let mut maps = Maps::take(&mut ebpf)?;
        maps.write_answers()?;
        let held = if adopted {
            maps.read()?
        } else {
            Image::default()
        };
        Ok(Self {
            pins,
            ebpf,
            maps,
            held,
            max_prefixes: made_for as usize / 2,
            _lock: lock,
        })
    }

    /// What `compiled` would change.
    pub fn plan(&self, compiled: &Compiled) -> Result<Difference> {
        let image = self.image(compiled)?;
        Ok(self.held.difference(&image))
    }

    /// What the maps would hold. Refused up front where it would not fit: a map that turns out full
    /// half way is undone, but the undoing itself is better never needed.
    fn image(&self, compiled: &Compiled) -> Result<Image> {
        let image = Image::of(compiled, &self.held)?;
        for (family, prefixes) in [
            ("IPv4", image.allowed4.len()),
            ("IPv6", image.allowed6.len()),
        ] {
            ensure!(
                prefixes <= self.max_prefixes,
                "the policy has {prefixes} {family} prefixes and the kernel's map holds {}: write \
                 fewer, or make larger maps (`filter-agent detach`, then `run --max-prefixes`)",
                self.max_prefixes
            );
        }
        Ok(image)
    }

    /// Makes the kernel hold what `compiled` says, changing only what differs.
    ///
    /// # Errors
    /// What was refused. What had been written by then is taken back.
    pub fn apply(&mut self, compiled: &Compiled) -> Result<Applied> {
        let image = self.image(compiled)?;
        let difference = self.held.difference(&image);
        let before = self.change(image)?;
        Ok(Applied { difference, before })
    }

    /// Makes the kernel hold what it held before.
    pub fn undo(&mut self, applied: Applied) -> Result<()> {
        self.change(applied.before).context("take back a change")?;
        Ok(())
    }

    /// Returns what the kernel held before.
    fn change(&mut self, image: Image) -> Result<Image> {
        self.maps.clear_counters(&self.held, &image)?;
        let (forced, newly) = (self.held.forced(), image.forced());
        let until = since_boot()? + ADOPTION_SECONDS * 1_000_000_000;
        for &slot in newly.difference(&forced) {
            self.maps.set_adoption(slot, until)?;
        }
        let steps = self.held.steps_to(&image);
        let mut done = 0;
        let mut groups = steps.chunk_by(Step::is_independent_of);
        let written = groups.try_for_each(|group| {
            done += group.len();
            self.write(group)
        });
        let written = written
            .and_then(|()| self.maps.begin_epoch(&image.ports))
            .and_then(|()| self.maps.keep_hits(&self.held, &image));
        if let Err(error) = written {
            let undo = || format!("take back a refused change ({error:#})");
            for step in steps[..done].iter().rev() {
                self.maps
                    .write(&step.clone().reversed())
                    .with_context(undo)?;
            }
            // What was found out half way is not to be remembered either.
            self.maps.begin_epoch(&self.held.ports).with_context(undo)?;
            return Err(error.context("write the policy to the kernel, nothing is changed"));
        }
        Ok(std::mem::replace(&mut self.held, image))
    }

    /// Writes steps that are independent of each other. Where they are many, which only prefixes are, two
    /// threads share them: a trie's lock is held for a part of each write, and not to read it back.
    fn write(&mut self, group: &[Step]) -> Result<()> {
        if group.len() >= MANY {
            let (first, second) = group.split_at(group.len() / 2);
            let mut allowed = Allowed::open(&self.pins)?;
            let written = thread::scope(|scope| {
                let second = scope.spawn(move || second.iter().try_for_each(|s| allowed.write(s)));
                let first = first.iter().try_for_each(|step| self.maps.write(step));
                let second = second.join().map_err(|_| anyhow!("a thread panicked"));
                first.and(second.flatten())
            });
            // A processor's stock of nodes may be used up (kernel 6.13), and who waits for the lock gives
            // up after a quarter of a second (6.15): neither happens to one thread that takes its time.
            if written.is_ok() {
                return written;
            }
        }
        group.iter().try_for_each(|step| self.maps.write(step))
    }

    /// Judges the connections that were under way before TLS was forced: by what they send next.
    pub fn judge_existing(&mut self) -> Result<()> {
        for slot in self.held.forced() {
            self.maps.set_adoption(slot, 0)?;
        }
        let connections: Result<Vec<_>, _> = self.maps.streams.iter().collect();
        for (connection, stream) in connections.context("list the connections")? {
            if stream.state & Stream::UNJUDGED != 0 {
                absent_is_none(self.maps.streams.remove(&connection))
                    .context("forget a connection")?;
            }
        }
        Ok(())
    }

    /// The kernel's id of the program this agent loaded: what netlink must tell of each interface.
    pub fn program_id(&self) -> Result<u32> {
        let program = self.program()?;
        Ok(program.info().context("read the XDP program")?.id())
    }

    fn program(&self) -> Result<&Xdp> {
        let program = self
            .ebpf
            .program("filter")
            .context("find the XDP program")?;
        Ok(program.try_into()?)
    }

    /// Runs the loaded program on a frame. Counts like any other packet.
    pub fn run_packet(&self, frame: &[u8]) -> Result<Ran> {
        // An answer may be longer than what it answers.
        let mut after = vec![0; frame.len() + ANSWER_LENGTH];
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut after),
            ..TestRunOptions::default()
        };
        let result = self
            .program()?
            .test_run(options)
            .context("run the XDP program")?;
        after.truncate(result.data_size_out as usize);
        Ok(Ran {
            action: result.return_value,
            frame: after,
        })
    }

    /// Runs the loaded program on a frame that is a probe, not traffic, and takes it out of the
    /// counts again. `judged`: how the frame should be counted.
    pub fn probe(&mut self, frame: &[u8], judged: &Judged) -> Result<bool> {
        let passed = self.run_packet(frame)?.passes();
        let counter = match judged.rule {
            Some(id) => COUNTERS + hit_index(id, judged.monitor),
            None => counter_index(judged.slot, judged.reason, judged.monitor),
        };
        self.maps.record_probe(counter).context("record a probe")?;
        Ok(passed)
    }

    /// What the maps say of a source at a guarded port, without the program.
    pub fn judge(&self, database: &str, source: IpAddr, monitor: bool) -> Result<Judged> {
        let slot = self
            .held
            .slot(database)
            .with_context(|| format!("find database {database} in the kernel"))?;
        let rule = self.maps.allowed.find(slot, source)?;
        let exempt = rule.is_some_and(|rule| rule & EXEMPT != 0);
        let rule = rule.map(|rule| rule & !EXEMPT);
        let bad = match source {
            IpAddr::V4(source) => filter_common::is_bad_source4(source.to_bits()),
            IpAddr::V6(source) => filter_common::is_bad_source6(source.to_bits()),
        };
        let (reason, rule) = match rule {
            _ if bad => (Reason::BadSource, None),
            None => (Reason::NotAllowed, None),
            Some(id) => (Reason::Allowed, Some(id)),
        };
        let place = rule.map(|id| self.held.rules.binary_search_by_key(&id, |&(id, _)| id));
        let name = place
            .and_then(Result::ok)
            .map(|place| self.held.rules[place].1);
        Ok(Judged {
            slot,
            reason,
            monitor,
            rule,
            exempt,
            rule_text: name.and_then(|name| Some(name.text()?.to_owned())),
        })
    }

    /// Packets counted since the maps were made, the agent's own probes taken out.
    pub fn counts(&self) -> Result<Counts> {
        self.maps.counts(&self.held)
    }

    /// Connections counted since the maps were made.
    pub fn fates(&self) -> Result<Fates> {
        self.maps.fates(&self.held)
    }

    /// Packets allowed, by database and text of the rule's key.
    pub fn hits(&self) -> Result<Hits> {
        self.maps.hits(&self.held)
    }

    /// As `Maps::dropped`.
    pub fn dropped(&mut self) -> Result<Vec<Dropped>> {
        self.maps.dropped(&self.held)
    }
}

/// How a packet is judged, and so counted.
#[derive(Clone, Debug, PartialEq)]
pub struct Judged {
    pub slot: u16,
    pub reason: Reason,
    pub monitor: bool,
    /// Id of the rule that allows.
    pub rule: Option<u32>,
    /// Whether TLS is not forced on the source.
    pub exempt: bool,
    /// Text of that rule's `RuleKey`.
    pub rule_text: Option<String>,
}

impl Judged {
    pub fn passes(&self) -> bool {
        self.monitor || self.reason == Reason::Allowed
    }
}

/// Nanoseconds since the host started, suspended or not: the clock of the packet path.
fn since_boot() -> Result<u64> {
    let time = clock_gettime(ClockId::CLOCK_BOOTTIME).context("read the clock")?;
    Ok(Duration::from(time).as_nanos() as u64)
}

/// The filter may be moved to a thread of its own.
const _: () = {
    const fn is_send<T: Send>() {}
    is_send::<Filter>();
};
