//! The kernel's side: load, attach, pin, reconcile, read back. The only user of aya.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File},
    io,
    net::{IpAddr, Ipv6Addr},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use aya::{
    Ebpf, EbpfLoader, TestRun as _, TestRunOptions,
    maps::{
        Array, HashMap, LpmTrie, Map, MapData, MapError, MapInfo, MapType, PerCpuArray,
        PerCpuValues, RingBuf, lpm_trie::Key,
    },
    programs::{
        ProgramError, ProgramType, Xdp, XdpMode,
        links::{FdLink, PinnedLink},
    },
    sys::is_program_supported,
    util::{KernelVersion, nr_cpus},
};
use filter_common::{
    ADOPTION_SECONDS, ANSWER_LENGTH, ANSWERS, ANY_SLOT, Answer, COUNTERS, Connection,
    DEFAULT_MAX_PREFIXES, EXEMPT, Engine, Fate, Guard, HITS, LAYOUT, LocalKey, MAX_LOCALS,
    NEAR_LINES, Name, NearLine, PORTS, Port, RULE_IDS, Reason, SAMPLES_GRANTED, SLOT_BITS, SLOTS,
    Sample, Source4, Source6, Stream, counter_index, counters_of, fate_index, hit_index, slot_key,
};
use ipnet::{Ipv4Net, Ipv6Net};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::statfs::{BPF_FS_MAGIC, statfs},
    time::{ClockId, clock_gettime},
};

use crate::{
    compile::Compiled,
    host::{AttachedXdp, Interface},
    kernel::answer::answer,
    kernel::image::{Change, Difference, Image, Step, changes},
    policy::Mode,
};

/// The object that `build.rs` builds.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/filter"));

/// The first kernel that has XDP frags and `bpf_xdp_get_buff_len`.
const OLDEST_KERNEL: KernelVersion = KernelVersion::new(5, 18, 0);

/// Prefixes that are worth a second thread to write them.
const MANY: usize = 1_000;

const BPF_F_NO_PREALLOC: u32 = 1;
const XDP_PASS: u32 = 2;
const XDP_TX: u32 = 3;

/// What a pinned map has to be to be adopted: aya opens an existing pin without comparing.
/// Entries of `None` are the operator's choice, made when the map was.
struct Shape {
    name: &'static str,
    map_type: MapType,
    key: usize,
    value: usize,
    entries: Option<u32>,
    flags: u32,
}

impl Shape {
    /// Whether a map's entries are like this one's, however many there are.
    fn holds_the_same(&self, info: &MapInfo) -> bool {
        info.map_type().ok() == Some(self.map_type)
            && info.key_size() as usize == self.key
            && info.value_size() as usize == self.value
    }
}

const fn array(name: &'static str, value: usize, entries: u32) -> Shape {
    Shape {
        name,
        map_type: MapType::Array,
        key: 4,
        value,
        entries: Some(entries),
        flags: 0,
    }
}

const fn trie(name: &'static str, source: usize) -> Shape {
    Shape {
        name,
        map_type: MapType::LpmTrie,
        key: 4 + source,
        value: 4,
        entries: None,
        flags: BPF_F_NO_PREALLOC,
    }
}

const fn per_cpu(name: &'static str, entries: u32) -> Shape {
    Shape {
        map_type: MapType::PerCpuArray,
        ..array(name, 8, entries)
    }
}

const SHAPES: [Shape; 15] = [
    array("PORT_GUARDS", size_of::<Port>(), PORTS),
    Shape {
        name: "LOCAL_GUARDS",
        map_type: MapType::Hash,
        key: size_of::<LocalKey>(),
        value: size_of::<Guard>(),
        entries: Some(MAX_LOCALS),
        flags: BPF_F_NO_PREALLOC,
    },
    array("PROTOCOLS", 4, 1),
    trie("ALLOWED4", size_of::<Source4>()),
    trie("ALLOWED6", size_of::<Source6>()),
    array("NEAR", size_of::<NearLine>(), NEAR_LINES),
    array("EPOCH", 4, 1),
    per_cpu("COUNTS", COUNTERS),
    per_cpu("HITS", HITS),
    array("SLOT_NAMES", size_of::<Name>(), SLOTS),
    array("RULE_NAMES", size_of::<Name>(), RULE_IDS),
    array("PROBES", 8, COUNTERS + HITS),
    Shape {
        name: "STREAMS",
        map_type: MapType::LruHash,
        key: size_of::<Connection>(),
        value: size_of::<Stream>(),
        entries: None,
        flags: 0,
    },
    array("ADOPT_UNTIL", 8, SLOTS),
    array("ANSWERS_BY_ENGINE", size_of::<Answer>(), ANSWERS),
];

/// The pinned filter of one bpffs, held by one agent at a time.
pub struct Filter {
    /// Where this layout's maps and links are pinned.
    pins: PathBuf,
    ebpf: Ebpf,
    maps: Maps,
    /// What the maps hold. The kernel's tries are read once, before this agent writes: older
    /// kernels must not be asked to list a trie that changes.
    held: Image,
    /// Prefixes of one address family that a policy may have.
    max_prefixes: usize,
    _lock: Flock<File>,
}

struct Maps {
    ports: Array<MapData, Port>,
    locals: HashMap<MapData, LocalKey, Guard>,
    protocols: Array<MapData, u32>,
    allowed: Allowed,
    near: Array<MapData, NearLine>,
    epoch: Array<MapData, u32>,
    counts: PerCpuArray<MapData, u64>,
    hits: PerCpuArray<MapData, u64>,
    slot_names: Array<MapData, Name>,
    rule_names: Array<MapData, Name>,
    probes: Array<MapData, u64>,
    streams: HashMap<MapData, Connection, Stream>,
    adopt_until: Array<MapData, u64>,
    answers: Array<MapData, Answer>,
    granted: Array<MapData, u32>,
    sampled: RingBuf<MapData>,
}

/// Some packets that were not allowed: one, or of a flood the first of each second.
#[derive(Clone, Debug, PartialEq)]
pub struct Dropped {
    /// `None`: it cannot be told.
    pub source: Option<IpAddr>,
    /// `None`: aimed at no database in particular.
    pub database: Option<String>,
    pub reason: Reason,
    /// Whether it was only counted, and passed.
    pub monitored: bool,
    /// Index of the interface that it came in through.
    pub interface: u32,
}

/// A link that is pinned.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pinned {
    pub interface: u32,
    pub program_id: u32,
}

/// How `attach` came to run the program on an interface.
#[derive(Clone, Debug, PartialEq)]
pub enum Attached {
    /// The link was there; it runs the current program now.
    Kept,
    Native,
    /// `refusal`: why not native, where native was tried.
    Generic {
        refusal: Option<String>,
    },
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

/// What was taken over from an agent of another layout.
#[derive(Clone, Debug, PartialEq)]
pub struct TakenOver {
    pub layout: u32,
    /// Interfaces whose program was switched.
    pub links: usize,
    /// Whether counters go on where they were.
    pub counters: bool,
}

/// Packets by database (`None`: aimed at no database in particular), reason, and whether the reason
/// was only counted, not enforced.
pub type Counts = BTreeMap<(Option<String>, Reason, bool), u64>;

/// Packets allowed, by database and text of the rule's key.
pub type Hits = BTreeMap<(String, String), u64>;

/// Connections by database, what became of them, and whether that was only monitored.
pub type Fates = BTreeMap<(String, Fate, bool), u64>;

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

    /// Runs the program on `interface`: over the link that is pinned for it where it is whole, else
    /// over a new one that is pinned.
    pub fn attach(&mut self, interface: &Interface, mode: Mode) -> Result<Attached> {
        let pin = self.link_pin(interface.index);
        if let Some(found) = self.find_link(interface.index)?
            && self.is_whole(interface)?
        {
            // One of another layout is switched when the maps are full, by `take_over`.
            if found != pin {
                return Ok(Attached::Kept);
            }
            let ours = Some(self.program_id()?);
            if interface.xdp.map(|xdp| xdp.program_id) != ours {
                self.update(&pin)
                    .with_context(|| format!("update the program on {}", interface.name))?;
            }
            return Ok(Attached::Kept);
        }
        // The pin that is there is of a link that was detached by force, which the new one replaces, or of one whose
        // interface is in another network namespace and left its index to this one.
        if exists(&pin)? {
            match self.update(&pin) {
                Ok(()) => set_aside(&pin, &self.pins)?,
                Err(error) if is_detached(&error) => {}
                Err(error) => return Err(error.context(format!("update {}", pin.display()))),
            }
        }
        let native = match mode {
            Mode::Generic => None,
            Mode::Auto | Mode::Native => match self.attach_new(interface, XdpMode::Driver, &pin) {
                Ok(()) => return Ok(Attached::Native),
                Err(error) => Some(error),
            },
        };
        if mode == Mode::Native
            && let Some(error) = native
        {
            return Err(error.context(format!("attach to {} in native mode", interface.name)));
        }
        let refusal = native.map(|error| format!("{:#}", error.root_cause()));
        match self.attach_new(interface, XdpMode::Skb, &pin) {
            Ok(()) => Ok(Attached::Generic { refusal }),
            Err(error) => {
                let native = refusal.map(|refusal| format!(" (native mode: {refusal})"));
                let native = native.unwrap_or_default();
                let name = &interface.name;
                Err(error.context(format!("attach to {name} in generic mode{native}")))
            }
        }
    }

    fn attach_new(&mut self, interface: &Interface, mode: XdpMode, pin: &Path) -> Result<()> {
        let program = program(&mut self.ebpf)?;
        let id = program.attach_to_if_index(interface.index, mode)?;
        let link = program.take_link(id)?;
        // Where the kernel refuses a link with EINVAL, aya attaches over netlink instead, which does
        // not outlive the agent. Such an attachment is no FdLink, and is undone as it is dropped.
        let link = FdLink::try_from(link)
            .map_err(|_| anyhow!("the driver refuses a BPF link (EINVAL)"))?;
        let new = self.pins.join(format!("{NEW_LINK}{}", interface.index));
        link.pin(&new)
            .with_context(|| format!("pin the link at {}", new.display()))?;
        fs::rename(&new, pin)
            .with_context(|| format!("rename {} to {}", new.display(), pin.display()))
    }

    /// Replaces the program on a pinned link atomically (BPF_LINK_UPDATE, kernel 5.9): no packet meets
    /// an interface without one.
    fn update(&mut self, pin: &Path) -> Result<()> {
        let link = FdLink::from(PinnedLink::from_pin(pin)?);
        let program = program(&mut self.ebpf)?;
        let id = program.attach_to_link(link.try_into()?)?;
        // The pin keeps the link; this agent needs no file descriptor of it.
        drop(program.take_link(id)?);
        Ok(())
    }

    /// Brings pins, which are named by interface index, in line with the host: a link whose interface is gone is
    /// removed, and the link of an interface that was in another network namespace, and is back under another
    /// index, gets its name. A link whose interface is elsewhere stays: it is filtered there.
    pub fn adopt_moved(&mut self, host: &[Interface]) -> Result<()> {
        let mut away = Vec::new();
        for pin in entries(&self.pins)? {
            let name = pin
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            let index = name
                .strip_prefix("link_")
                .and_then(|index| index.parse().ok());
            let is_gone = index.is_some_and(|index: u32| !host.iter().any(|i| i.index == index));
            if is_gone || name.starts_with(AWAY_LINK) {
                match self.update(&pin) {
                    Ok(()) => away.push(pin),
                    Err(error) if is_detached(&error) => fs::remove_file(&pin)
                        .with_context(|| format!("remove {}", pin.display()))?,
                    Err(error) => return Err(error),
                }
            }
        }
        if away.is_empty() {
            return Ok(());
        }
        let ours = self.program_id()?;
        let mut back = Vec::new();
        for interface in host
            .iter()
            .filter(|i| i.xdp.is_some_and(|xdp| xdp.program_id == ours))
        {
            if self.find_link(interface.index)?.is_none() {
                back.push(interface.index);
            }
        }
        // Of several the kernel does not say which is which.
        if let ([pin], [index]) = (away.as_slice(), back.as_slice()) {
            let to = self.link_pin(*index);
            fs::rename(pin, &to)
                .with_context(|| format!("rename {} to {}", pin.display(), to.display()))?;
        }
        Ok(())
    }

    /// Whether the link pinned for an interface is the one whose program runs there.
    fn is_whole(&self, interface: &Interface) -> Result<bool> {
        let Some(pin) = self.find_link(interface.index)? else {
            return Ok(false);
        };
        let program_id = linked_program(&pin)?;
        Ok(interface
            .xdp
            .is_some_and(|xdp| xdp.program_id == program_id))
    }

    /// The link that is pinned for an interface, by this layout or another.
    fn find_link(&self, interface: u32) -> Result<Option<PathBuf>> {
        let name = link_name(interface);
        let others = self.other_layouts()?.into_iter();
        let others = others.map(|(_, pins)| pins.join(&name));
        for pin in std::iter::once(self.link_pin(interface)).chain(others) {
            if exists(&pin)? {
                return Ok(Some(pin));
            }
        }
        Ok(None)
    }

    /// What agents of other layouts left, by layout.
    fn other_layouts(&self) -> Result<Vec<(u32, PathBuf)>> {
        let base = self.pins.parent().context("find the pins' directory")?;
        let mut others = layouts(base)?;
        others.retain(|(layout, _)| *layout != LAYOUT);
        Ok(others)
    }

    /// Takes over what an agent of another layout left in force: carries its counters, switches each of
    /// its links to this program atomically, and only then removes its maps. The maps must hold the
    /// policy by now. Whenever it is cut off, the next start goes on with what is left.
    ///
    /// # Errors
    /// A link that the kernel does not switch: it and the old maps stay as they are. Only a link whose
    /// interface is certainly gone is removed.
    pub fn take_over(&mut self) -> Result<Vec<TakenOver>> {
        let mut taken = Vec::new();
        for (layout, pins) in self.other_layouts()? {
            own_directory(&pins)?;
            // What the counters of a later layout mean this agent cannot know.
            let counters = layout < LAYOUT && self.maps.carry_counters(&pins, &self.held)?;
            let mut links = 0;
            for pin in entries(&pins)? {
                let Some(name) = pin.file_name().and_then(|name| name.to_str()) else {
                    continue;
                };
                if !name.starts_with("link_") && !name.starts_with(AWAY_LINK) {
                    continue;
                }
                let to = self.pins.join(name);
                let is_taken = exists(&to)?;
                match self.update(&pin) {
                    // Another interface has this one's index by now.
                    Ok(()) if is_taken => set_aside(&pin, &self.pins)?,
                    Ok(()) => fs::rename(&pin, &to)
                        .with_context(|| format!("rename {} to {}", pin.display(), to.display()))?,
                    Err(error) if is_detached(&error) => {
                        fs::remove_file(&pin)
                            .with_context(|| format!("remove {}", pin.display()))?;
                        continue;
                    }
                    Err(error) => {
                        return Err(error.context(format!(
                            "switch {} to layout {LAYOUT}; what layout {layout} enforces stays in force",
                            pin.display()
                        )));
                    }
                }
                links += 1;
            }
            remove_directory(&pins)?;
            taken.push(TakenOver {
                layout,
                links,
                counters,
            });
        }
        Ok(taken)
    }

    /// Whether this agent may attach to the interface: it has an Ethernet link layer and no XDP
    /// program but ours, in a mode that need not change.
    pub fn check_interface(&self, interface: &Interface, mode: Mode) -> Result<()> {
        let Some(xdp) = interface.xdp else {
            return check_free(interface);
        };
        if !self.is_whole(interface)? {
            return check_free(interface);
        }
        let name = &interface.name;
        let attached = attached(xdp);
        let keeps = match mode {
            Mode::Auto => true,
            Mode::Native => xdp.native,
            Mode::Generic => !xdp.native,
        };
        ensure!(
            keeps,
            "{name} is filtered in {attached} mode, and changing the mode would open it for a \
             moment: run `filter-agent detach` first"
        );
        Ok(())
    }

    /// Stops filtering an interface, whether or not it still exists.
    pub fn detach(&mut self, interface: u32) -> Result<()> {
        let pin = self.link_pin(interface);
        fs::remove_file(&pin).with_context(|| format!("remove {}", pin.display()))
    }

    /// Stops filtering everywhere and removes every pin, this filter's own included.
    ///
    /// # Errors
    /// Something that is not ours among the pins, before any is removed.
    pub fn remove(&self) -> Result<Vec<u32>> {
        remove_pins(self.pins.parent().context("find the pins' directory")?)
    }

    /// The links that are pinned, with the programs the kernel says they run.
    pub fn pinned(&self) -> Result<Vec<Pinned>> {
        pinned_in(&self.pins)
    }

    fn link_pin(&self, interface: u32) -> PathBuf {
        self.pins.join(link_name(interface))
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
        let mut record = |index: u32| -> Result<()> {
            let probes = self.maps.probes.get(&index, 0)?;
            Ok(self.maps.probes.set(index, probes + 1, 0)?)
        };
        record(match judged.rule {
            Some(id) => COUNTERS + hit_index(id, judged.monitor),
            None => counter_index(judged.slot, judged.reason, judged.monitor),
        })
        .context("record a probe")?;
        Ok(passed)
    }

    /// What the maps say of a source at a guarded port, without the program.
    pub fn judge(&self, database: &str, source: IpAddr, monitor: bool) -> Result<Judged> {
        let slot = self
            .held
            .slot(database)
            .with_context(|| format!("find database {database} in the kernel"))?;
        let found = match source {
            IpAddr::V4(source) => {
                let key = source4(slot, Ipv4Net::from(source));
                self.maps.allowed.v4.get(&key, 0)
            }
            IpAddr::V6(source) => {
                let key = source6(slot, Ipv6Net::from(source));
                self.maps.allowed.v6.get(&key, 0)
            }
        };
        let rule = absent_is_none(found).context("look the source up in the kernel")?;
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
        let mut counts = Counts::new();
        let any = (u32::from(ANY_SLOT), Name::FREE);
        for (slot, name) in [any].iter().chain(&self.held.slots) {
            for reason in Reason::ALL {
                for monitored in [false, true] {
                    let index = counter_index(*slot as u16, reason, monitored);
                    let mut packets = self.count(&self.maps.counts, index, index)?;
                    if reason == Reason::Allowed {
                        let rules = self.held.rules.iter();
                        for (id, _) in rules.filter(|(_, rule)| u32::from(rule.slot) == *slot) {
                            packets += self.hits_of(*id, monitored)?;
                        }
                    }
                    if packets > 0 {
                        let database = name.text().map(str::to_owned);
                        counts.insert((database, reason, monitored), packets);
                    }
                }
            }
        }
        Ok(counts)
    }

    /// Samples of the packets that were not allowed since this was asked last. Those of databases that are
    /// no more are left out. More are taken only when it is asked again.
    pub fn dropped(&mut self) -> Result<Vec<Dropped>> {
        let names: BTreeMap<u32, &str> = self
            .held
            .slots
            .iter()
            .filter_map(|(slot, name)| Some((*slot, name.text()?)))
            .collect();
        let mut dropped = Vec::new();
        while let Some(item) = self.maps.sampled.next() {
            let sample = read_sample(&item).context("read what was dropped")?;
            let slot = sample.guard.slot();
            let database = names.get(&slot.into()).copied();
            let reason = Reason::ALL.get(sample.reason as usize);
            if let Some(&reason) = reason
                && (slot == ANY_SLOT || database.is_some())
            {
                dropped.push(Dropped {
                    source: source_of(&sample),
                    database: database.map(str::to_owned),
                    reason,
                    monitored: sample.guard.is_monitor(),
                    interface: sample.interface,
                });
            }
        }
        let granted = self
            .maps
            .granted
            .get(&0, 0)?
            .saturating_add(SAMPLES_GRANTED);
        self.maps
            .granted
            .set(0, granted, 0)
            .context("grant samples")?;
        Ok(dropped)
    }

    /// Connections counted since the maps were made.
    pub fn fates(&self) -> Result<Fates> {
        let mut fates = Fates::new();
        for (slot, name) in &self.held.slots {
            let Some(database) = name.text() else {
                continue;
            };
            for fate in Fate::ALL {
                for monitored in [false, true] {
                    let index = fate_index(*slot as u16, fate, monitored);
                    let connections = self.count(&self.maps.counts, index, index)?;
                    if connections > 0 {
                        fates.insert((database.to_owned(), fate, monitored), connections);
                    }
                }
            }
        }
        Ok(fates)
    }

    /// Packets allowed, by database and text of the rule's key.
    pub fn hits(&self) -> Result<Hits> {
        let databases: BTreeMap<u16, &str> = self
            .held
            .slots_by_name()
            .into_iter()
            .map(|(database, slot)| (slot, database))
            .collect();
        let mut hits = Hits::new();
        for (id, name) in &self.held.rules {
            if let (Some(database), Some(rule)) = (databases.get(&name.slot), name.text()) {
                let packets = self.hits_of(*id, false)? + self.hits_of(*id, true)?;
                hits.insert(((*database).to_owned(), rule.to_owned()), packets);
            }
        }
        Ok(hits)
    }

    fn hits_of(&self, rule: u32, monitored: bool) -> Result<u64> {
        let index = hit_index(rule, monitored);
        self.count(&self.maps.hits, index, COUNTERS + index)
    }

    /// One counter, summed over the CPUs. `probes`: its place in the map of probes.
    fn count(&self, map: &PerCpuArray<MapData, u64>, index: u32, probes: u32) -> Result<u64> {
        let packets: u64 = map.get(&index, 0).context("read a counter")?.iter().sum();
        if packets == 0 {
            return Ok(0);
        }
        let probes = self
            .maps
            .probes
            .get(&probes, 0)
            .context("read the probes")?;
        Ok(packets.saturating_sub(probes))
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

impl Maps {
    fn take(ebpf: &mut Ebpf) -> Result<Self> {
        fn typed<T>(ebpf: &mut Ebpf, name: &str) -> Result<T>
        where
            T: TryFrom<Map, Error = MapError>,
        {
            let map = ebpf.take_map(name).context("find it in the BPF object");
            map.and_then(|map| Ok(T::try_from(map)?))
                .with_context(|| format!("open the BPF map {name}"))
        }
        Ok(Self {
            ports: typed(ebpf, "PORT_GUARDS")?,
            locals: typed(ebpf, "LOCAL_GUARDS")?,
            protocols: typed(ebpf, "PROTOCOLS")?,
            allowed: Allowed {
                v4: typed(ebpf, "ALLOWED4")?,
                v6: typed(ebpf, "ALLOWED6")?,
            },
            near: typed(ebpf, "NEAR")?,
            epoch: typed(ebpf, "EPOCH")?,
            counts: typed(ebpf, "COUNTS")?,
            hits: typed(ebpf, "HITS")?,
            slot_names: typed(ebpf, "SLOT_NAMES")?,
            rule_names: typed(ebpf, "RULE_NAMES")?,
            probes: typed(ebpf, "PROBES")?,
            streams: typed(ebpf, "STREAMS")?,
            adopt_until: typed(ebpf, "ADOPT_UNTIL")?,
            answers: typed(ebpf, "ANSWERS_BY_ENGINE")?,
            granted: typed(ebpf, ".bss")?,
            sampled: typed(ebpf, "SAMPLED")?,
        })
    }

    fn write_answers(&mut self) -> Result<()> {
        for engine in Engine::ALL {
            self.answers
                .set(engine as u32, answer(engine), 0)
                .context("write what refused clients are told")?;
        }
        Ok(())
    }

    /// Until when, in nanoseconds since boot, connections of a slot that are found under way are let
    /// run.
    fn set_adoption(&mut self, slot: u16, until: u64) -> Result<()> {
        self.adopt_until
            .set(slot.into(), until, 0)
            .context("write until when connections are let run")
    }

    /// What an earlier agent left. Arrays are read whole: the kernel has no list of what is set in one.
    fn read(&self) -> Result<Image> {
        self.try_read().context("read what the kernel holds")
    }

    fn try_read(&self) -> Result<Image, MapError> {
        let mut image = Image {
            protocols: self.protocols.get(&0, 0)?,
            ..Image::default()
        };
        for slot in 1..SLOTS {
            let name = self.slot_names.get(&slot, 0)?;
            if name != Name::FREE {
                image.slots.push((slot, name));
            }
        }
        for id in 0..RULE_IDS {
            let name = self.rule_names.get(&id, 0)?;
            if name != Name::FREE {
                image.rules.push((id, name));
            }
        }
        for index in 0..PORTS {
            let guard = self.ports.get(&index, 0)?.guard();
            if !guard.is_none() {
                image.ports.push((index, guard));
            }
        }
        for line in 0..NEAR_LINES {
            let near = self.near.get(&line, 0)?;
            if near != NearLine::default() {
                image.near.push((line, near));
            }
        }
        for entry in self.locals.iter() {
            image.locals.push(entry?);
        }
        for entry in self.allowed.v4.iter() {
            let (key, id) = entry?;
            let Source4 { slot, address } = key.data();
            let length = key.prefix_len().saturating_sub(SLOT_BITS) as u8;
            // Only this agent writes the map, and only prefixes.
            if let Ok(prefix) = Ipv4Net::new(address.into(), length) {
                image
                    .allowed4
                    .push(((u32::from_be_bytes(slot) as u16, prefix), id));
            }
        }
        for entry in self.allowed.v6.iter() {
            let (key, id) = entry?;
            let Source6 { slot, address } = key.data();
            let length = key.prefix_len().saturating_sub(SLOT_BITS) as u8;
            if let Ok(prefix) = Ipv6Net::new(address.into(), length) {
                image
                    .allowed6
                    .push(((u32::from_be_bytes(slot) as u16, prefix), id));
            }
        }
        image.locals.sort_unstable_by_key(|&(key, _)| key);
        image.allowed4.sort_unstable_by_key(|&(key, _)| key);
        image.allowed6.sort_unstable_by_key(|&(key, _)| key);
        Ok(image)
    }

    /// Adopts the counters of another layout's maps, by the names of databases and rules; whether
    /// they are such as this layout's.
    fn carry_counters(&mut self, pins: &Path, held: &Image) -> Result<bool> {
        let names = ["SLOT_NAMES", "RULE_NAMES", "COUNTS", "HITS", "PROBES"];
        let mut sizes = BTreeMap::new();
        for shape in SHAPES.iter().filter(|shape| names.contains(&shape.name)) {
            let Ok(info) = MapInfo::from_pin(pins.join(shape.name)) else {
                return Ok(false);
            };
            if !shape.holds_the_same(&info) {
                return Ok(false);
            }
            sizes.insert(shape.name, info.max_entries());
        }
        // Before layout 3 the packets of a rule were counted otherwise.
        if sizes["HITS"] != hit_index(sizes["RULE_NAMES"], false) {
            return Ok(false);
        }
        let open = |name: &str| MapData::from_pin(pins.join(name));
        let slot_names: Array<_, Name> = Map::Array(open("SLOT_NAMES")?).try_into()?;
        let rule_names: Array<_, Name> = Map::Array(open("RULE_NAMES")?).try_into()?;
        let counts: PerCpuArray<_, u64> = Map::PerCpuArray(open("COUNTS")?).try_into()?;
        let hits: PerCpuArray<_, u64> = Map::PerCpuArray(open("HITS")?).try_into()?;
        let probes: Array<_, u64> = Map::Array(open("PROBES")?).try_into()?;
        let new_slots = held.slots_by_name();
        let mut slots = BTreeMap::from([(u32::from(ANY_SLOT), ANY_SLOT)]);
        for old in 1..sizes["SLOT_NAMES"] {
            let name = slot_names.get(&old, 0)?;
            let new = name.text().and_then(|name| new_slots.get(name));
            slots.extend(new.map(|&new| (old, new)));
        }
        for (&old, &new) in &slots {
            for (from, to) in counters_of(old as u16).zip(counters_of(new)) {
                self.counts.set(to, counts.get(&from, 0)?, 0)?;
                self.probes.set(to, probes.get(&from, 0)?, 0)?;
            }
        }
        for old in 0..sizes["RULE_NAMES"] {
            let name = rule_names.get(&old, 0)?;
            let Some(&slot) = slots.get(&u32::from(name.slot)) else {
                continue;
            };
            let same = |(_, new): &&(u32, Name)| new.slot == slot && new.text() == name.text();
            if name != Name::FREE
                && let Some(&(new, _)) = held.rules.iter().find(same)
            {
                for monitored in [false, true] {
                    let (old, new) = (hit_index(old, monitored), hit_index(new, monitored));
                    self.hits.set(new, hits.get(&old, 0)?, 0)?;
                    let probed = probes.get(&(sizes["COUNTS"] + old), 0)?;
                    self.probes.set(COUNTERS + new, probed, 0)?;
                }
            }
        }
        Ok(true)
    }

    /// Zeroes the counters of slots and rule ids that `new` begins to use.
    fn clear_counters(&mut self, held: &Image, new: &Image) -> Result<()> {
        let cpus = nr_cpus().map_err(|(file, error)| anyhow!(error).context(file))?;
        let zero = || PerCpuValues::try_from(vec![0_u64; cpus]).context("make a zero counter");
        let is_new =
            |held: &[(u32, Name)], id: u32| held.binary_search_by_key(&id, |e| e.0).is_err();
        for &(slot, _) in new
            .slots
            .iter()
            .filter(|entry| is_new(&held.slots, entry.0))
        {
            for index in counters_of(slot as u16) {
                self.counts
                    .set(index, zero()?, 0)
                    .context("clear a counter")?;
                self.probes.set(index, 0, 0).context("clear a counter")?;
            }
        }
        for &(id, _) in new
            .rules
            .iter()
            .filter(|entry| is_new(&held.rules, entry.0))
        {
            for index in [false, true].map(|monitored| hit_index(id, monitored)) {
                self.hits
                    .set(index, zero()?, 0)
                    .context("clear a counter")?;
                self.probes
                    .set(COUNTERS + index, 0, 0)
                    .context("clear a counter")?;
            }
        }
        Ok(())
    }

    /// Adds the hits of the rules that `after` no longer has to their databases' counters.
    fn keep_hits(&mut self, before: &Image, after: &Image) -> Result<()> {
        for change in changes(&before.rules, &after.rules) {
            let (Some(rule), None) = (change.old, change.new) else {
                continue;
            };
            for monitored in [false, true] {
                let from = hit_index(change.key, monitored);
                let to = counter_index(rule.slot, Reason::Allowed, monitored);
                let hits = self.hits.get(&from, 0)?;
                let counts = self.counts.get(&to, 0)?;
                let sums = counts.iter().zip(hits.iter()).map(|(a, b)| a + b);
                let sums: Vec<u64> = sums.collect();
                self.counts.set(to, PerCpuValues::try_from(sums)?, 0)?;
                let probes = self.probes.get(&to, 0)?;
                let probes = probes + self.probes.get(&(COUNTERS + from), 0)?;
                self.probes.set(to, probes, 0)?;
            }
        }
        Ok(())
    }

    /// Ends what the packet path remembers of the tries.
    fn begin_epoch(&mut self, ports: &[(u32, Guard)]) -> Result<()> {
        let epoch = self.epoch()?.wrapping_add(1);
        self.epoch.set(0, epoch, 0).context("begin an epoch")?;
        for &(port, guard) in ports {
            self.ports
                .set(port, Port::new(guard, epoch), 0)
                .context("begin an epoch")?;
        }
        Ok(())
    }

    fn epoch(&self) -> Result<u32> {
        self.epoch.get(&0, 0).context("read the epoch")
    }

    fn write(&mut self, step: &Step) -> Result<()> {
        match *step {
            Step::Slot(ref change) => self
                .slot_names
                .set(change.key, change.new.unwrap_or(Name::FREE), 0)
                .with_context(|| format!("write the name of slot {}", change.key)),
            Step::Rule(ref change) => self
                .rule_names
                .set(change.key, change.new.unwrap_or(Name::FREE), 0)
                .with_context(|| format!("write the name of rule {}", change.key)),
            Step::Allowed4(_) | Step::Allowed6(_) => self.allowed.write(step),
            Step::Near(ref change) => self
                .near
                .set(change.key, change.new.unwrap_or_default(), 0)
                .context("write what is near the prefixes"),
            Step::Local(Change { key, new, .. }) => match new {
                Some(guard) => self.locals.insert(key, guard, 0),
                None => absent_is_none(self.locals.remove(&key)).map(drop),
            }
            .with_context(|| {
                let address = Ipv6Addr::from(key.address).to_canonical();
                format!(
                    "guard {address}: there is room for {MAX_LOCALS} local addresses times ports, \
                     those of the old and the new policy together; reload in two steps"
                )
            }),
            Step::Port(Change { key, new, .. }) => {
                let epoch = self.epoch()?;
                let port = new.map_or(Port::default(), |guard| Port::new(guard, epoch));
                self.ports
                    .set(key, port, 0)
                    .with_context(|| format!("write the guard of port {}", key as u16))
            }
            Step::Protocols { new, .. } => self
                .protocols
                .set(0, new, 0)
                .context("write the guarded protocols"),
        }
    }
}

/// The prefixes of every database, by address family.
struct Allowed {
    v4: LpmTrie<MapData, Source4, u32>,
    v6: LpmTrie<MapData, Source6, u32>,
}

impl Allowed {
    /// A second way in to maps that are pinned.
    fn open(pins: &Path) -> Result<Self> {
        let open = |name: &str| {
            let map = MapData::from_pin(pins.join(name));
            map.map(Map::LpmTrie)
                .with_context(|| format!("open the map {name}"))
        };
        Ok(Self {
            v4: open("ALLOWED4")?.try_into()?,
            v6: open("ALLOWED6")?.try_into()?,
        })
    }

    fn write(&mut self, step: &Step) -> Result<()> {
        match *step {
            Step::Allowed4(Change { key, new, .. }) => {
                let (slot, prefix) = key;
                write_prefix(&mut self.v4, &source4(slot, prefix), new)
                    .with_context(|| format!("write prefix {prefix}"))
            }
            Step::Allowed6(Change { key, new, .. }) => {
                let (slot, prefix) = key;
                write_prefix(&mut self.v6, &source6(slot, prefix), new)
                    .with_context(|| format!("write prefix {prefix}"))
            }
            _ => Ok(()),
        }
    }
}

/// Nanoseconds since the host started, suspended or not: the clock of the packet path.
fn since_boot() -> Result<u64> {
    let time = clock_gettime(ClockId::CLOCK_BOOTTIME).context("read the clock")?;
    Ok(Duration::from(time).as_nanos() as u64)
}

/// The connections that an agent of another layout follows, in a map like this layout's, go on being
/// followed in the same map.
fn share_streams(base: &Path, pins: &Path) -> Result<()> {
    let own = pins.join("STREAMS");
    let shape = SHAPES.iter().find(|shape| shape.name == "STREAMS");
    for (layout, other) in layouts(base)? {
        let theirs = other.join("STREAMS");
        let info = MapInfo::from_pin(&theirs);
        let (Ok(info), Some(shape)) = (info, shape) else {
            continue;
        };
        if layout != LAYOUT && !exists(&own)? && shape.holds_the_same(&info) {
            fs::hard_link(&theirs, &own)
                .with_context(|| format!("share {} with layout {LAYOUT}", theirs.display()))?;
        }
    }
    Ok(())
}

/// Writes one entry and reads it back: inserts into a trie have been seen to fail under memory
/// pressure, and a batch of them to be lost (kernel 6.18).
fn write_prefix<K: aya::Pod>(
    trie: &mut LpmTrie<MapData, K, u32>,
    key: &Key<K>,
    new: Option<u32>,
) -> Result<()> {
    let Some(id) = new else {
        absent_is_none(trie.remove(key))?;
        return Ok(());
    };
    trie.insert(key, id, 0)?;
    // The longest match of a prefix that is in the trie is that prefix.
    ensure!(
        trie.get(key, 0)? == id,
        "the kernel does not hold what was written"
    );
    Ok(())
}

/// A sample as it is in the ring.
fn read_sample(bytes: &[u8]) -> Option<Sample> {
    let (source, rest) = bytes.split_first_chunk::<16>()?;
    let &[high, low] = source.as_chunks::<8>().0 else {
        return None;
    };
    let &[family, reason, guard, interface] = rest.as_chunks::<4>().0 else {
        return None;
    };
    Some(Sample {
        source: [high, low].map(u64::from_ne_bytes),
        family: u32::from_ne_bytes(family),
        reason: u32::from_ne_bytes(reason),
        guard: Guard(u32::from_ne_bytes(guard)),
        interface: u32::from_ne_bytes(interface),
    })
}

fn source_of(sample: &Sample) -> Option<IpAddr> {
    let [high, low] = sample.source;
    match sample.family {
        4 => Some(IpAddr::from((low as u32).to_ne_bytes())),
        6 => {
            let bits = u128::from(u64::from_be(high)) << 64 | u128::from(u64::from_be(low));
            Some(Ipv6Addr::from_bits(bits).into())
        }
        _ => None,
    }
}

/// aya names a missing key in three ways, by map type and call.
fn absent_is_none<T>(result: Result<T, MapError>) -> Result<Option<T>, MapError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound | MapError::ElementNotFound) => Ok(None),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn source4(slot: u16, prefix: Ipv4Net) -> Key<Source4> {
    let source = Source4 {
        slot: slot_key(slot),
        address: prefix.network().octets(),
    };
    Key::new(SLOT_BITS + u32::from(prefix.prefix_len()), source)
}

fn source6(slot: u16, prefix: Ipv6Net) -> Key<Source6> {
    let source = Source6 {
        slot: slot_key(slot),
        address: prefix.network().octets(),
    };
    Key::new(SLOT_BITS + u32::from(prefix.prefix_len()), source)
}

fn program(ebpf: &mut Ebpf) -> Result<&mut Xdp, ProgramError> {
    let program = ebpf.program_mut("filter").ok_or(ProgramError::NotLoaded)?;
    program.try_into()
}

/// The kernel's refusal with the end of the verifier's log, which says why; all of it is pages long.
fn load_error(error: ProgramError) -> anyhow::Error {
    let ProgramError::LoadError {
        io_error,
        verifier_log,
    } = error
    else {
        return error.into();
    };
    let log = verifier_log.to_string();
    // What it counted stands after what it refused.
    let counted = ["processed ", "stack depth ", "verification time "];
    let mut lines = log
        .lines()
        .rev()
        .filter(|line| !counted.iter().any(|counted| line.starts_with(counted)));
    match lines.find(|line| !line.trim().is_empty()) {
        Some(line) => anyhow!("{io_error}: the verifier says: {line}"),
        None => io_error.into(),
    }
}

/// Whether the kernel can do what the filter needs of it.
///
/// # Errors
/// What is missing.
pub fn check_kernel(bpffs: &Path) -> Result<()> {
    let kernel = KernelVersion::current().context("read the kernel's version")?;
    ensure!(
        kernel >= OLDEST_KERNEL,
        "this kernel is too old: the filter needs Linux 5.18 or newer"
    );
    base(bpffs)?;
    match is_program_supported(ProgramType::Xdp) {
        Ok(true) => Ok(()),
        Ok(false) => bail!("this kernel has no XDP: it is built without CONFIG_NET"),
        Err(ProgramError::SyscallError(error)) => {
            let what = match error.io_error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::ENOSYS) => {
                    "this kernel has no BPF: it is built without CONFIG_BPF_SYSCALL"
                }
                Some(Errno::EPERM) => {
                    "the kernel refuses BPF here: run as root, with CAP_BPF and CAP_NET_ADMIN"
                }
                _ => "ask the kernel for XDP",
            };
            Err(error).context(what)
        }
        Err(error) => Err(error).context("ask the kernel for XDP"),
    }
}

/// Whether the program may be attached where this agent's does not run.
///
/// # Errors
/// An interface that is not Ethernet, or on which somebody else's program runs.
pub fn check_free(interface: &Interface) -> Result<()> {
    let name = &interface.name;
    ensure!(
        interface.ethernet,
        "{name} is not an Ethernet interface: the filter reads Ethernet frames only"
    );
    if let Some(xdp) = interface.xdp {
        bail!(
            "another XDP program (id {}, {} mode) is attached to {name}: detach it first, for \
             example with `ip link set dev {name} xdp off`",
            xdp.program_id,
            attached(xdp)
        );
    }
    Ok(())
}

fn attached(xdp: AttachedXdp) -> &'static str {
    if xdp.native { "native" } else { "generic" }
}

/// Stops filtering and removes everything that any layout of this agent pinned below `bpffs`.
/// Returns the indexes of the interfaces that were filtered.
///
/// # Errors
/// An agent that runs, and would attach again.
pub fn remove(bpffs: &Path) -> Result<Vec<u32>> {
    let base = base(bpffs)?;
    if !exists(&base)? {
        return Ok(Vec::new());
    }
    let _lock = lock(&base)?;
    remove_pins(&base)
}

fn remove_pins(base: &Path) -> Result<Vec<u32>> {
    let mut interfaces = Vec::new();
    for layout in entries(base)? {
        for pin in entries(&layout)? {
            ensure!(
                !pin.is_dir(),
                "{} is not this agent's: remove it, then detach; nothing is changed",
                pin.display()
            );
        }
    }
    for layout in entries(base)? {
        interfaces.extend(pinned_interfaces(&layout)?);
        remove_directory(&layout)?;
    }
    fs::remove_dir(base).with_context(|| format!("remove {}", base.display()))?;
    Ok(interfaces)
}

fn remove_directory(pins: &Path) -> Result<()> {
    for pin in entries(pins)? {
        fs::remove_file(&pin).with_context(|| format!("remove {}", pin.display()))?;
    }
    fs::remove_dir(pins).with_context(|| format!("remove {}", pins.display()))
}

/// The links that are pinned below `bpffs`, by whatever layout.
pub fn pinned(bpffs: &Path) -> Result<Vec<Pinned>> {
    let base = base(bpffs)?;
    let mut pinned = Vec::new();
    if exists(&base)? {
        for (_, pins) in layouts(&base)? {
            pinned.extend(pinned_in(&pins)?);
        }
    }
    Ok(pinned)
}

/// The links that are pinned in a layout's directory, with the programs that the kernel says they run.
fn pinned_in(pins: &Path) -> Result<Vec<Pinned>> {
    let links = pinned_interfaces(pins)?.into_iter().map(|interface| {
        Ok(Pinned {
            interface,
            program_id: linked_program(&pins.join(link_name(interface)))?,
        })
    });
    links.collect()
}

/// Interface indexes for which a filter is pinned below `bpffs`, whether or not an agent runs.
pub fn left_in_force(bpffs: &Path) -> Result<Vec<u32>> {
    let base = base(bpffs)?;
    let mut interfaces = Vec::new();
    if exists(&base)? {
        for (_, pins) in layouts(&base)? {
            interfaces.extend(pinned_interfaces(&pins)?);
        }
    }
    Ok(interfaces)
}

/// The directories of all layouts that are pinned.
fn layouts(base: &Path) -> Result<Vec<(u32, PathBuf)>> {
    let layout = |path: PathBuf| {
        let number = path.file_name()?.to_str()?.strip_prefix('v')?.parse();
        Some((number.ok()?, path))
    };
    Ok(entries(base)?.into_iter().filter_map(layout).collect())
}

/// Begins the name of the pin of a new link that has not replaced the last link's pin yet.
const NEW_LINK: &str = "new_link_";

/// Begins the name of the pin of a link whose interface is in another network namespace, while another interface
/// has its index here.
const AWAY_LINK: &str = "away_link_";

fn set_aside(pin: &Path, pins: &Path) -> Result<()> {
    for number in 0..u32::MAX {
        let to = pins.join(format!("{AWAY_LINK}{number}"));
        if !exists(&to)? {
            return fs::rename(pin, &to)
                .with_context(|| format!("rename {} to {}", pin.display(), to.display()));
        }
    }
    bail!("{} cannot be set aside", pin.display())
}

/// Finishes what an agent that was killed left half done: links that are attached and pinned under the name
/// of new ones.
fn adopt_new_links(pins: &Path) -> Result<()> {
    for new in entries(pins)? {
        let name = new.file_name().and_then(|name| name.to_str());
        let index = name.and_then(|name| name.strip_prefix(NEW_LINK)?.parse().ok());
        if let Some(index) = index {
            let pin = pins.join(link_name(index));
            fs::rename(&new, &pin)
                .with_context(|| format!("rename {} to {}", new.display(), pin.display()))?;
        }
    }
    Ok(())
}

/// By index, which a rename does not change; bpffs allows no dot, as in eth0.100, in a name.
fn link_name(interface: u32) -> String {
    format!("link_{interface}")
}

/// The kernel's id of the program on a link that is pinned.
fn linked_program(pin: &Path) -> Result<u32> {
    let link = PinnedLink::from_pin(pin).with_context(|| format!("open {}", pin.display()))?;
    let info = FdLink::from(link).info().context("read the link")?;
    Ok(info.program_id())
}

/// Whether there is such a file.
///
/// # Errors
/// What kept us from seeing: that is not the same as none.
fn exists(path: &Path) -> Result<bool> {
    path.try_exists()
        .with_context(|| format!("examine {}", path.display()))
}

/// Whether a link has no interface any more: it vanished, or the link was detached by force.
fn is_detached(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let cause = cause.downcast_ref::<io::Error>();
        cause.is_some_and(|cause| cause.raw_os_error() == Some(Errno::ENOLINK as i32))
    })
}

/// The directory that the agent owns on a BPF file system.
fn base(bpffs: &Path) -> Result<PathBuf> {
    let mount = statfs(bpffs).with_context(|| {
        let bpffs = bpffs.display();
        format!("open {bpffs}, where a BPF file system has to be mounted")
    })?;
    ensure!(
        mount.filesystem_type() == BPF_FS_MAGIC,
        "{0} is no BPF file system: mount one with `mount -t bpf bpf {0}`",
        bpffs.display()
    );
    Ok(bpffs.join("filter-agent"))
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let list = || -> io::Result<Vec<PathBuf>> {
        fs::read_dir(directory)?
            .map(|entry| Ok(entry?.path()))
            .collect()
    };
    list().with_context(|| format!("list {}", directory.display()))
}

fn pinned_interfaces(pins: &Path) -> Result<Vec<u32>> {
    let index = |pin: &PathBuf| {
        pin.file_name()?
            .to_str()?
            .strip_prefix("link_")?
            .parse()
            .ok()
    };
    Ok(entries(pins)?.iter().filter_map(index).collect())
}

/// Makes the directory, or refuses one that somebody else could have filled.
fn own_directory(path: &Path) -> Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(error).with_context(|| format!("create {}", path.display()));
        }
        _ => {}
    }
    let metadata =
        fs::symlink_metadata(path).with_context(|| format!("examine {}", path.display()))?;
    let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
    ensure!(
        metadata.is_dir() && owner == nix::unistd::geteuid().as_raw() && mode & 0o077 == 0,
        "{} is not this agent's own (owner {owner}, mode {mode:o}): find out who made it, and \
         remove it",
        path.display()
    );
    Ok(())
}

/// Held as long as the agent lives, and let go by the kernel however it ends.
fn lock(base: &Path) -> Result<Flock<File>> {
    let directory = File::open(base).with_context(|| format!("open {}", base.display()))?;
    match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((_, Errno::EWOULDBLOCK)) => bail!(
            "another filter-agent runs on {}: stop it first, or use its commands",
            base.display()
        ),
        Err((_, error)) => Err(error).with_context(|| format!("lock {}", base.display())),
    }
}

/// Checks every map that is pinned; whether any is.
fn check_pins(pins: &Path) -> Result<bool> {
    let mut missing = None;
    let mut found = false;
    for shape in &SHAPES {
        if exists(&pins.join(shape.name))? {
            check_pin(pins, shape)?;
            found = true;
        } else {
            missing = Some(shape.name);
        }
    }
    // Without a link this is a first start that was cut short. With one, a new and empty map would
    // take the place of the one that is enforced.
    if let Some(name) = missing
        && !pinned_interfaces(pins)?.is_empty()
    {
        bail!(
            "the pin of {name} is missing from {}, where a filter is in force: run \
             `filter-agent detach`, then start again",
            pins.display()
        );
    }
    Ok(found)
}

/// # Errors
/// A map of another type, size or flags than this layout has: made by somebody else.
fn check_pin(pins: &Path, shape: &Shape) -> Result<MapInfo> {
    let pin = pins.join(shape.name);
    let info = MapInfo::from_pin(&pin).with_context(|| format!("open {}", pin.display()))?;
    let same = shape.holds_the_same(&info)
        && shape
            .entries
            .is_none_or(|entries| entries == info.max_entries())
        && info.map_flags() == shape.flags;
    ensure!(
        same,
        "{} is not a map of this agent's layout {LAYOUT}: find out who pinned it, then run \
         `filter-agent detach`",
        pin.display()
    );
    Ok(info)
}
