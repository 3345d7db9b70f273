//! The filter: the loaded program, its maps, and what they hold.

use std::{
    collections::BTreeMap,
    fs::File,
    net::IpAddr,
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context as _, Result, anyhow};
use aya::{Ebpf, EbpfLoader, TestRun as _, TestRunOptions, maps::MapType, programs::Xdp};
use filter_common::{
    ANSWER_LENGTH, COUNTER_ROW, COUNTERS, DEFAULT_MAX_PREFIXES, LAYOUT, Name, Reason, RuleValue,
    hit_index,
};
use nix::fcntl::Flock;

use crate::{
    kernel::{
        counters::{Counts, Fates, Hits},
        hook,
        image::{Image, Origin},
        layout::{
            MapsFound, PinnedMaps, SHAPES, check_pin, check_pins, open_pins, share_connections,
        },
        maps::Maps,
        pins::{adopt_new_links, base, layouts, lock, own_directory},
        program::{OBJECT, check_kernel, load_error, program},
        read,
        traced::Traced,
    },
    temporary::InKernel,
};

const XDP_PASS: u32 = 2;
const XDP_TX: u32 = 3;

/// The pinned filter of one bpffs, held by one agent at a time.
pub struct Filter {
    /// Where this layout's maps and links are pinned.
    pub(super) pins: PathBuf,
    pub(super) ebpf: Ebpf,
    /// The programs that run in place of those, while there is a trace.
    pub(super) tracing: Option<Traced>,
    pub(super) maps: Maps,
    /// The content of the maps. The tries are read once, before this agent writes, and again only where a change
    /// could not be taken back: older kernels must not list a trie that changes.
    pub(super) image: Image,
    /// What the image was made of; `None`: it was read from the maps, or nothing is in them yet.
    pub(super) origin: Option<Origin>,
    /// Prefixes of one address family that a policy may have.
    pub(super) max_prefixes: usize,
    pub(super) pinned_maps: PinnedMaps,
    /// Why the program at the sockets cannot be loaded.
    pub(super) offsets_error: Option<String>,
    /// Whether the ports where TLS is forced are open.
    pub(super) is_judged: bool,
    /// Held so that no other agent starts; the kernel releases it when this one ends, however it ends.
    pub(super) lock: Flock<File>,
}

/// The result of a test run on one frame.
#[derive(Clone, Debug, PartialEq)]
pub struct Ran {
    pub action: u32,
    /// The frame after the run.
    pub frame: Vec<u8>,
}

impl Ran {
    pub fn passes(&self) -> bool {
        self.action == XDP_PASS
    }

    /// Whether the frame goes back to the client as an answer.
    pub fn is_answer(&self) -> bool {
        self.action == XDP_TX
    }
}

/// Makes the maps that are not pinned, and has the kernel check the program.
fn load(loader: &mut EbpfLoader<'_>) -> Result<Ebpf> {
    let mut ebpf = loader.load(OBJECT).context("create the BPF maps")?;
    program(&mut ebpf)?
        .load()
        .map_err(load_error)
        .context("load the XDP program")?;
    Ok(ebpf)
}

impl Filter {
    /// Loads the program over the maps pinned below `bpffs`, or over new ones.
    ///
    /// # Errors
    /// No bpffs there, a kernel that is too old, another agent, pins that are not ours.
    pub fn open(bpffs: &Path, max_prefixes: Option<u32>) -> Result<Self> {
        check_kernel(bpffs)?;
        let base = base(bpffs)?;
        own_directory(&base)?;
        let lock = lock(&base)?;
        let pins = base.join(format!("v{LAYOUT}"));
        own_directory(&pins)?;
        for (_, pins) in layouts(&base)? {
            adopt_new_links(&pins)?;
        }
        let found = check_pins(&pins)?;
        share_connections(&base, &pins)?;
        let max_prefixes = max_prefixes.unwrap_or(DEFAULT_MAX_PREFIXES);
        // Twice: a reload adds all of the new policy before it removes the old.
        let entries = max_prefixes.saturating_mul(2);
        let mut loader = EbpfLoader::new();
        loader.map_max_entries("ALLOWED4", entries);
        loader.map_max_entries("ALLOWED6", entries);
        // Without them the filter works, and closes the ports where TLS is forced.
        let offsets = hook::kernel_offsets();
        let namespace = hook::namespace()?;
        if let Ok(offsets) = &offsets {
            loader.override_global("KERNEL", offsets, true);
        }
        loader.override_global("NAMESPACE", &namespace, true);
        for shape in &SHAPES {
            loader.map_pin_path(shape.name, pins.join(shape.name));
        }
        // The maps are read while the kernel checks the program.
        let (mut ebpf, held) = thread::scope(|scope| {
            let held =
                (found == MapsFound::All).then(|| scope.spawn(|| read::image(&open_pins(&pins)?)));
            let ebpf = load(&mut loader);
            let held = held.map(|held| held.join().map_err(|_| anyhow!("a thread panicked")));
            anyhow::Ok((ebpf?, held.transpose()?.transpose()?))
        })?;
        let mut made_for = u32::MAX;
        for shape in SHAPES.iter().filter(|shape| shape.entries.is_none()) {
            let info = check_pin(&pins, shape)?;
            if shape.map_type == MapType::LpmTrie {
                made_for = made_for.min(info.max_entries());
            }
        }
        let pinned_maps = open_pins(&pins)?;
        let mut maps = Maps::take(&mut ebpf)?;
        maps.write_answers()?;
        let is_judged = maps.is_judged()?;
        let image = match (held, found) {
            (Some(image), _) => image,
            (None, MapsFound::None) => Image::default(),
            (None, MapsFound::Some | MapsFound::All) => read::image(&pinned_maps)?,
        };
        Ok(Self {
            pins,
            ebpf,
            tracing: None,
            maps,
            image,
            origin: None,
            max_prefixes: made_for as usize / 2,
            pinned_maps,
            is_judged,
            offsets_error: offsets.err().map(|error| format!("{error:#}")),
            lock,
        })
    }

    /// The kernel's id of the program that this agent runs: netlink must report it for each interface.
    pub fn program_id(&self) -> Result<u32> {
        let program = self.program()?;
        Ok(program.info().context("read the XDP program")?.id())
    }

    /// The XDP program that is to run on the interfaces.
    pub(super) fn program(&self) -> Result<&Xdp> {
        let program = match &self.tracing {
            Some(traced) => traced.ebpf.program("filter_traced"),
            None => self.ebpf.program("filter"),
        };
        Ok(program.context("find the XDP program")?.try_into()?)
    }

    /// As `program`, to attach it.
    pub(super) fn program_mut(&mut self) -> Result<&mut Xdp> {
        let program = match &mut self.tracing {
            Some(traced) => traced.ebpf.program_mut("filter_traced"),
            None => self.ebpf.program_mut("filter"),
        };
        Ok(program.context("find the XDP program")?.try_into()?)
    }

    /// Runs the loaded program on a frame. Counts like any other packet.
    pub fn run_packet(&self, frame: &[u8]) -> Result<Ran> {
        // An answer may be longer than the frame.
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
    /// counts again, if it was judged as it should be. `judged`: how the frame should be counted.
    pub fn probe(&mut self, frame: &[u8], judged: &Judged) -> Result<bool> {
        let passed = self.run_packet(frame)?.passes();
        // The program counted it elsewhere: taken out here, this counter would go backwards.
        if passed != judged.passes() {
            return Ok(passed);
        }
        // A packet that a block drops is counted by both.
        let hit = judged
            .rule
            .map(|id| COUNTERS + hit_index(id, judged.monitor));
        let reason = (judged.reason != Reason::Allowed)
            .then(|| COUNTER_ROW.reason(judged.slot, judged.reason, judged.monitor));
        for counter in hit.into_iter().chain(reason) {
            self.maps.record_probe(counter).context("record a probe")?;
        }
        Ok(passed)
    }

    /// Looks up in the maps how a source is judged at a guarded port, without running the program.
    pub fn judge(&self, database: &str, source: IpAddr, monitor: bool) -> Result<Judged> {
        let slot = self
            .image
            .slot(database)
            .with_context(|| format!("find database {database} in the kernel"))?;
        let value = self.maps.value(slot, source)?;
        let exempt = value.is_some_and(RuleValue::is_exempt);
        let bad = match source {
            IpAddr::V4(source) => filter_common::is_bad_source4(source.to_bits()),
            IpAddr::V6(source) => filter_common::is_bad_source6(source.to_bits()),
        };
        let (reason, rule) = match value {
            _ if bad => (Reason::BadSource, None),
            None => (Reason::NotAllowed, None),
            Some(value) if value.0 >= RuleValue::FIRST_BLOCKED => {
                (Reason::Blocked, Some(value.rule()))
            }
            Some(_) if !exempt && !self.is_judged && self.image.closes_unenforced(slot) => {
                (Reason::TlsUnenforced, None)
            }
            Some(value) => (Reason::Allowed, Some(value.rule())),
        };
        // A rule that a closed port leaves without effect is named all the same.
        let named = rule.or(value.filter(|_| !bad).map(RuleValue::rule));
        let place = named.map(|id| self.image.rules.binary_search_by_key(&id, |&(id, _)| id));
        let name = place
            .and_then(Result::ok)
            .map(|place| self.image.rules[place].1);
        Ok(Judged {
            slot,
            reason,
            monitor,
            rule,
            exempt,
            rule_text: name.and_then(|name| Some(name.text()?.to_owned())),
        })
    }

    /// Returns the content of the maps.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// Rules and blocks with an end.
    pub fn ends(&self) -> Vec<InKernel> {
        let names: BTreeMap<u32, Name> = self.image.rules.iter().copied().collect();
        let ends = self.image.ends.iter().filter_map(|(id, end)| {
            let rule = names.get(id)?;
            let slot = u32::from(rule.slot);
            let (_, database) = self.image.slots.iter().find(|(found, _)| *found == slot)?;
            Some(InKernel {
                database: database.text()?.to_owned(),
                rule: rule.text()?.to_owned(),
                end: *end,
            })
        });
        ends.collect()
    }

    /// Packets counted since the maps were made, the agent's own probes taken out.
    pub fn counts(&self) -> Result<Counts> {
        let hits = self.maps.hits_by_id(&self.image)?;
        self.maps.counts(&self.image, &hits)
    }

    /// Connections to a database that began at an interface, and that arrived at a socket of this host.
    pub fn stages(&self, database: &str) -> Result<[u64; 2]> {
        let slot = self.image.slot(database);
        slot.map_or(Ok([0; 2]), |slot| self.maps.stages(slot))
    }

    /// Connections counted since the maps were made.
    pub fn fates(&self) -> Result<Fates> {
        self.maps.fates(&self.image)
    }

    /// Packets allowed, by database and text of the rule's key.
    pub fn hits(&self) -> Result<Hits> {
        let hits = self.maps.hits_by_id(&self.image)?;
        Ok(self.maps.hits(&self.image, &hits))
    }

    /// Both, with each counter read once: those of the rules are most of them.
    pub fn counts_and_hits(&self) -> Result<(Counts, Hits)> {
        let hits = self.maps.hits_by_id(&self.image)?;
        let counts = self.maps.counts(&self.image, &hits)?;
        Ok((counts, self.maps.hits(&self.image, &hits)))
    }
}

/// How a packet is judged, and therefore counted.
#[derive(Clone, Debug, PartialEq)]
pub struct Judged {
    pub slot: u16,
    pub reason: Reason,
    pub monitor: bool,
    /// Id of the rule that allows the source, or of the block that holds it.
    pub rule: Option<u32>,
    /// Whether the source is exempt from TLS.
    pub exempt: bool,
    /// Text of that rule's `RuleKey`.
    pub rule_text: Option<String>,
}

impl Judged {
    pub fn passes(&self) -> bool {
        self.monitor || self.reason == Reason::Allowed
    }
}

/// The filter may be moved to a thread of its own.
const _: () = {
    const fn is_send<T: Send>() {}
    is_send::<Filter>();
};
