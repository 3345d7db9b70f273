//! The traced programs: loaded for a trace over the same pinned maps, run by the links while it lasts, and their log.

use std::{
    collections::BTreeSet,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    sync::mpsc::{Receiver, Sender, channel},
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, MapData},
    programs::{CgroupSkb, Xdp},
};
use aya_log::EbpfLogger;
use filter_common::{
    ANY_SLOT, mapped,
    steps::{Budget, TracedPrefix},
};
use ipnet::IpNet;

use crate::kernel::{
    filter::Filter,
    hook,
    layout::{MapsFound, PinnedMaps, SHAPES, check_pins},
    links::is_detached,
    maps::{Unpinned, typed},
    pins,
    program::load_error,
};

/// The object that `build.rs` builds.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/traced"));

/// Lines that the programs may log, whenever more are granted. Each is some 300 bytes of a ring of 128 KiB.
const LINES_GRANTED: u64 = 100;

/// Maps and pins that a trace is loaded over: for a thread of its own, since the verifier takes a while.
#[derive(Clone, Debug)]
pub struct TracePlace {
    pins: PathBuf,
}

/// The traced programs, loaded and not attached.
pub struct Traced {
    pub(super) ebpf: Ebpf,
    pub(super) unpinned: Unpinned,
    budget: Array<MapData, u64>,
    logger: EbpfLogger<Lines>,
    lines: Receiver<String>,
    lost: u64,
    slot: u16,
}

impl std::fmt::Debug for Traced {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Traced")
    }
}

/// Takes the lines that the programs logged.
struct Lines(Sender<String>);

impl log::Log for Lines {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        // The receiver goes with this logger.
        let _ = self.0.send(record.args().to_string());
    }

    fn flush(&self) {}
}

impl Traced {
    /// Loads the traced programs for packets of one prefix.
    ///
    /// # Errors
    /// The kernel's refusal; pins that are missing.
    pub fn load(place: &TracePlace, prefix: IpNet) -> Result<Self> {
        let pins = &place.pins;
        // A pin that is missing would be made anew, empty.
        ensure!(
            check_pins(pins)? == MapsFound::All,
            "the maps of the filter are not pinned in {}",
            pins.display()
        );
        let traced = traced_prefix(prefix);
        let mut loader = EbpfLoader::new();
        let offsets = hook::kernel_offsets();
        let namespace = hook::namespace()?;
        if let Ok(offsets) = &offsets {
            loader.override_global("KERNEL", offsets, true);
        }
        loader.override_global("NAMESPACE", &namespace, true);
        loader.override_global("TRACED", &traced, true);
        for shape in &SHAPES {
            loader.map_pin_path(shape.name, pins.join(shape.name));
        }
        let mut ebpf = loader.load(OBJECT).context("create the maps of a trace")?;
        let program: &mut Xdp = ebpf
            .program_mut("filter_traced")
            .context("find the traced XDP program")?
            .try_into()?;
        program
            .load()
            .map_err(load_error)
            .context("load the traced XDP program")?;
        if offsets.is_ok() {
            let program: &mut CgroupSkb = ebpf
                .program_mut("tls_opening_traced")
                .context("find the traced program that judges connections")?
                .try_into()?;
            program
                .load()
                .map_err(load_error)
                .context("load the traced program that judges connections")?;
        }
        let mut budget: Array<MapData, u64> = typed(&mut ebpf, "TRACE_BUDGET")?;
        budget
            .set(Budget::Granted as u32, LINES_GRANTED, 0)
            .context("grant lines to the trace")?;
        let (sender, lines) = channel();
        let logger = EbpfLogger::init_with_logger(&mut ebpf, Lines(sender))
            .context("read what the traced programs log")?;
        let unpinned = Unpinned::take(&mut ebpf)?;
        Ok(Self {
            ebpf,
            unpinned,
            budget,
            logger,
            lines,
            lost: 0,
            slot: ANY_SLOT,
        })
    }

    /// Instructions that the kernel's verifier followed, of the million that it would: of the program at the interfaces, and
    /// of that at the sockets.
    pub fn verified_instructions(&self) -> Result<[u32; 2]> {
        let count = |name| {
            let info = self.ebpf.program(name).context("find the program")?.info();
            let count = info.context("read a program")?.verified_instruction_count();
            count.context("read how much was verified (Linux 5.16)")
        };
        Ok([count("filter_traced")?, count("tls_opening_traced")?])
    }

    /// Whether the programs use these maps, and not others that were made since.
    fn uses(&self, pinned: &PinnedMaps) -> Result<bool> {
        let program = self.ebpf.program("filter_traced");
        let info = program.context("find the traced XDP program")?.info()?;
        let used = info.map_ids().context("read the maps of a program")?;
        let used: BTreeSet<u32> = used
            .context("read the maps of a program")?
            .into_iter()
            .collect();
        for name in ["PORT_GUARDS", "LOCAL_GUARDS", "ALLOWED4", "ALLOWED6"] {
            let map = pinned.get(name).context("find a map of the filter")?;
            if !used.contains(&map.info().context("read a map's id")?.id()) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Has only packets logged that concern the database of a slot, or all of the source where that is `ANY_SLOT`.
    fn set_slot(&mut self, slot: u16) -> Result<()> {
        if self.slot != slot {
            self.budget
                .set(Budget::Slot as u32, u64::from(slot), 0)
                .context("write the database of the trace")?;
            self.slot = slot;
        }
        Ok(())
    }
}

fn traced_prefix(prefix: IpNet) -> TracedPrefix {
    let words = |bytes: [u8; 16]| {
        [0, 4, 8, 12].map(|at| {
            let [a, b, c, d] = [0, 1, 2, 3].map(|byte| bytes[at + byte]);
            u32::from_ne_bytes([a, b, c, d])
        })
    };
    match prefix {
        IpNet::V4(prefix) => {
            let mask = u128::MAX << 32 | u128::from(prefix.netmask().to_bits());
            TracedPrefix {
                address: words(mapped(prefix.network().octets())),
                mask: words(mask.to_be_bytes()),
                version: 4,
            }
        }
        IpNet::V6(prefix) => TracedPrefix {
            address: words(prefix.network().octets()),
            mask: words(prefix.netmask().octets()),
            version: 6,
        },
    }
}

/// Lines of the traced programs, and how many were lost.
#[derive(Debug, Default)]
pub struct Logged {
    pub lines: Vec<String>,
    pub lost: u64,
}

impl Filter {
    /// Returns the maps and pins that a trace of this filter is loaded over.
    pub fn trace_place(&self) -> TracePlace {
        TracePlace {
            pins: self.pins.clone(),
        }
    }

    /// Has the traced programs run in place of this agent's own, by atomic updates of the links: they use the same maps and
    /// give the same verdicts. `database`: as `read_trace` has it.
    ///
    /// # Errors
    /// A link that cannot be switched: all run the programs from before again, but for those of which that is an error as
    /// well, which the checks repair.
    pub fn begin_trace(&mut self, mut traced: Traced, database: Option<&str>) -> Result<()> {
        ensure!(
            traced.uses(&self.pinned_maps)?,
            "the maps of the filter were pinned anew meanwhile: try again"
        );
        traced.set_slot(self.traced_slot(database))?;
        self.tracing = Some(traced);
        let switched = self.switch_links();
        if switched.is_err() {
            // Reported by what failed first.
            let _ = self.end_trace();
        }
        switched.context("switch to the traced programs")
    }

    /// Has this agent's own programs run again.
    ///
    /// # Errors
    /// A link that cannot be switched: the checks repair it.
    pub fn end_trace(&mut self) -> Result<()> {
        match self.tracing.take() {
            Some(_) => self.switch_links().context("switch back from a trace"),
            None => Ok(()),
        }
    }

    pub fn is_tracing(&self) -> bool {
        self.tracing.is_some()
    }

    /// Switches every link to the programs that are to run now: also those that fail do not keep the others.
    fn switch_links(&mut self) -> Result<()> {
        let mut result = Ok(());
        for pin in pins::links(&self.pins)? {
            match self.update(&pin) {
                // An interface that is gone; the checks remove its pin.
                Err(error) if is_detached(&error) => {}
                Err(error) if result.is_ok() => {
                    result = Err(error.context(format!("update {}", pin.display())));
                }
                _ => {}
            }
        }
        if self.has_hook()? {
            result = result.and(self.attach_hook());
        }
        result
    }

    fn traced_slot(&self, database: Option<&str>) -> u16 {
        // No slot: a database that a reload has removed.
        database.map_or(ANY_SLOT, |name| self.image.slot(name).unwrap_or(u16::MAX))
    }

    /// Returns what the traced programs logged since the last call. `database`: the only one of interest.
    pub fn read_trace(&mut self, database: Option<&str>) -> Result<Logged> {
        let slot = self.traced_slot(database);
        let Some(traced) = &mut self.tracing else {
            return Ok(Logged::default());
        };
        traced.set_slot(slot)?;
        // The library panics over a record that it cannot read: that must not end the thread that owns the filter.
        let flushed = catch_unwind(AssertUnwindSafe(|| traced.logger.flush()));
        ensure!(
            flushed.is_ok(),
            "what the traced programs logged cannot be read"
        );
        let lines = traced.lines.try_iter().collect();
        let lost = traced.budget.get(&(Budget::Lost as u32), 0);
        let lost = lost.context("read how many lines were lost")?;
        let before = std::mem::replace(&mut traced.lost, lost);
        Ok(Logged {
            lines,
            lost: lost.saturating_sub(before),
        })
    }

    /// Lets the traced programs log `LINES_GRANTED` more lines. How often this is called bounds what a flood makes of it.
    pub fn grant_lines(&mut self) -> Result<()> {
        let Some(traced) = &mut self.tracing else {
            return Ok(());
        };
        let wanted = traced.budget.get(&(Budget::Wanted as u32), 0)?;
        traced
            .budget
            .set(Budget::Granted as u32, wanted + LINES_GRANTED, 0)
            .context("grant lines to the trace")
    }
}
