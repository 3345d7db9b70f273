//! The thread that owns the filter. It alone writes to the kernel, one job after another, so that the main loop
//! never waits for the kernel. Between jobs it checks and repairs what is attached.

mod cut;
pub mod drops;
mod handle;
mod last_hits;
mod tls;
mod trace;

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    io, mem,
    net::IpAddr,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use filter_common::Reason;
use jiff::Timestamp;

use crate::{
    cut::Before,
    drops::Drops,
    former::Former,
    host::{
        Interface, Netlink,
        coverage::{Coverage, Pinned, Remembered, describe_missing},
        settings::Settings,
        sockets::Sockets,
    },
    kernel::{
        counters::{Counts, Fates, Hits},
        fill::Fill,
        filter::Filter,
        links::Attached,
    },
    last_hits::{Kept, LastHits},
    log::Entry,
    reconcile::{self, Committed, Desired, Facts, InForce, Occasion, Refused, describe_attachment},
    report,
    temporary::InKernel,
    text::{counted, list},
    verify,
};
pub use handle::{Handle, Jobs};
pub use trace::{LOAD_TIMEOUT, LONGEST_TRACE, TraceRequest, USUAL_TRACE};

/// Time allowed for a list of the host's interfaces. A look that was given up is an error.
const NETLINK_TIMEOUT: Duration = Duration::from_secs(10);

/// Sources that a refusal names whose connections would be cut off.
const MAX_NAMED_CUTS: usize = 5;

pub struct Enforcer {
    filter: Filter,
    netlink: NetlinkReader,
    sockets: Sockets,
    /// What was in force before a change whose connections could not be reset; tried again at thorough checks.
    not_reset: Option<Before<'static>>,
    /// What was in force before the policy that is tried. Connections that it let in are not reset until that is decided.
    before_tried: Option<Before<'static>>,
    in_force: InForce,
    verified: report::Verified,
    /// Indexes of the interfaces that were filtered when all was looked at last.
    covered: BTreeSet<u32>,
    /// Why listed interfaces are not filtered, by index: each is logged once.
    unfiltered: BTreeMap<u32, String>,
    /// Errors of the checks and repairs, by what they are about; each is logged once.
    complaints: BTreeMap<&'static str, String>,
    repairs: u64,
    drops: Drops,
    former: Former,
    counted: last_hits::Counted,
    /// Number of the round of probes that was sent last.
    probe_round: u64,
    /// A listed interface that is a port of a bridge.
    bridged: Option<String>,
    /// What was counted of connections where TLS is forced, by database; and the databases whose connections are lost.
    seen: BTreeMap<String, tls::Seen>,
    lost: Vec<String>,
    /// Until when connections from before TLS was forced are counted.
    counting_until: Option<Instant>,
    traces: trace::Traces,
    /// The checks must not attach again.
    is_detached: bool,
}

/// The result of a check.
#[derive(Debug)]
pub struct Checked {
    pub remembered: Remembered,
    pub entries: Vec<Entry>,
    /// The last comparison of what the kernel does with the policy.
    pub verified: report::Verified,
    /// One line for the service manager, if it may have changed.
    pub summary: Option<String>,
    /// The last hits of rules for the disk, if they changed.
    pub last_hits: Option<Kept>,
}

/// The kernel's present state, read back.
#[derive(Debug)]
pub struct Observed {
    pub in_force: InForce,
    pub host: Vec<Interface>,
    pub pinned: Vec<Pinned>,
    /// The id of this agent's program.
    pub program_id: u32,
    pub counts: Counts,
    pub fates: Fates,
    pub hits: Hits,
    pub last_hits: LastHits,
    pub repairs: u64,
    pub verified: report::Verified,
    pub complaints: Vec<String>,
    /// Databases whose connections begin and never arrive.
    pub lost: Vec<String>,
    pub settings: Settings,
    pub tracing: Option<report::Tracing>,
}

/// Reads the host's interfaces over one socket that stays open: a host that runs out of descriptors must not
/// stop the checks.
struct NetlinkReader {
    runtime: tokio::runtime::Runtime,
    netlink: Option<Netlink>,
}

impl NetlinkReader {
    fn open() -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("start the runtime that reads netlink")?;
        let netlink = runtime.block_on(async { Netlink::connect() })?;
        Ok(Self {
            runtime,
            netlink: Some(netlink),
        })
    }

    fn read<T>(&mut self, look: impl AsyncFn(&Netlink) -> Result<T>) -> Result<T> {
        // After an error a new socket is opened.
        let netlink = self.netlink.take();
        self.runtime.block_on(async {
            let netlink = match netlink {
                Some(netlink) => netlink,
                None => Netlink::connect()?,
            };
            let found = tokio::time::timeout(NETLINK_TIMEOUT, look(&netlink)).await;
            let found = found.context("the kernel does not answer over netlink")??;
            self.netlink = Some(netlink);
            Ok(found)
        })
    }

    fn interfaces(&mut self) -> Result<Vec<Interface>> {
        self.read(async |netlink| netlink.interfaces().await)
    }
}

impl Enforcer {
    /// Loads the program over the maps that are pinned, or over new ones; it enforces what they hold.
    ///
    /// # Errors
    /// As `Filter::open`.
    pub fn open(bpffs: &Path, max_prefixes: Option<u32>, in_force: InForce) -> Result<Self> {
        let filter = Filter::open(bpffs, max_prefixes)?;
        let now = Timestamp::now();
        Ok(Self {
            netlink: NetlinkReader::open()?,
            sockets: Sockets::open()?,
            not_reset: None,
            before_tried: None,
            drops: Drops::since(now, filter.counts()?),
            former: Former::default(),
            filter,
            in_force,
            verified: report::Verified {
                at: now,
                probes: 0,
                interfaces: Vec::new(),
                errors: Vec::new(),
            },
            covered: BTreeSet::new(),
            unfiltered: BTreeMap::new(),
            complaints: BTreeMap::new(),
            repairs: 0,
            counted: last_hits::Counted::default(),
            probe_round: 0,
            bridged: None,
            seen: BTreeMap::new(),
            lost: Vec::new(),
            counting_until: None,
            traces: trace::Traces::default(),
            is_detached: false,
        })
    }

    fn facts<'a>(
        &'a self,
        occasion: &'a Occasion,
        host: &'a [Interface],
        pinned: &'a [Pinned],
        program_id: u32,
    ) -> Facts<'a> {
        Facts {
            program_id,
            before: match occasion {
                Occasion::Start { before } => before.as_ref(),
                _ => Some(&self.in_force.file.policy),
            },
            remembered: &self.in_force.remembered,
            host,
            settings: Settings::read,
            pinned,
        }
    }

    fn prepare(
        &self,
        desired: Desired,
        occasion: &Occasion,
        host: &[Interface],
    ) -> Result<reconcile::Plan> {
        let pinned = match occasion {
            Occasion::Change { .. } => Vec::new(),
            _ => self.filter.pinned()?,
        };
        reconcile::prepare(
            desired,
            occasion,
            &self.facts(occasion, host, &pinned, self.filter.program_id()?),
            |interface, mode| self.filter.check_interface(interface, mode),
            |compiled| self.filter.plan(compiled),
        )
    }

    /// Prepares a change without making it, and reports what it would do.
    ///
    /// # Errors
    /// As `commit`, as far as it can be known before.
    pub fn plan(&mut self, desired: Desired, caller: Option<IpAddr>) -> Result<report::Plan> {
        let host = self.netlink.interfaces()?;
        let occasion = Occasion::Reload {
            allow_unprotect: true,
            max_cut: None,
            caller,
            is_tried: false,
        };
        let file = desired.file.clone();
        let plan = self.prepare(desired, &occasion, &host)?;
        let compiled = plan.compiled();
        let mut report = plan.report;
        self.find_effects(&compiled, caller, &mut report);
        let unenforced = self.foresee_tls(&compiled, &file.policy, &host);
        report.warnings.extend(unenforced);
        if !plan.unguarded.is_empty() {
            let why = reconcile::describe_unguarded(&plan.unguarded);
            report.warnings.push(format!("a reload is refused: {why}"));
        }
        Ok(report)
    }

    /// Makes the kernel enforce `desired`, and compares what it does with that.
    ///
    /// # Errors
    /// The change was refused.
    pub fn commit(
        &mut self,
        desired: Desired,
        occasion: &Occasion,
    ) -> Result<(Committed, Checked), Refused> {
        // A change of regions only writes maps, and can be made while netlink fails.
        let is_change = matches!(occasion, Occasion::Change { .. });
        let host = if is_change {
            Vec::new()
        } else {
            let host = self.netlink.interfaces()?;
            self.filter.adopt_moved(&host)?;
            host
        };
        let (file, accepted) = (desired.file.clone(), desired.accepted);
        let mut plan = self.prepare(desired, occasion, &host)?;
        let compiled = plan.compiled();
        let paths = self.find_effects(&compiled, occasion.caller(), &mut plan.report);
        // What a change cuts off of what was let in before a policy that is tried waits, too.
        if !matches!(occasion, Occasion::Change { .. }) {
            let cut = plan.report.cut.iter_mut();
            cut.for_each(|cut| cut.at_confirm = cut.reset && occasion.is_tried());
        }
        // What comes while a policy is tried may cut off more.
        let paths = paths.or_else(|| occasion.is_tried().then(|| self.paths_or_covered()));
        if let Occasion::Reload {
            max_cut: Some(most),
            ..
        } = *occasion
        {
            refuse_cut(&plan.report, most)?;
        }
        let mut entries = Vec::new();
        if !is_change {
            self.note_host(&file.policy, &host, &mut entries);
        }
        // Before the first connection to a port where TLS is forced now.
        if compiled.forces_tls() {
            self.hold_tls(&compiled, true, &mut entries);
            let counted = self.count_existing(&compiled);
            self.note("connections from before", counted, &mut entries);
        }
        let mut committed = reconcile::commit(&mut self.filter, plan, &host)?;
        self.drops.restart(&committed.restarted);
        let changed = &committed.report.difference;
        self.former.note(changed, Timestamp::now());
        match occasion {
            // Counters may be those of an agent before, or of another layout's maps.
            Occasion::Start { .. } => {
                let read = self.read_hits();
                self.note("hits", read, &mut entries);
                // Who is refused before the first check is sampled as well.
                let granted = self.filter.grant_samples();
                self.note("drops", granted, &mut entries);
            }
            _ => self.rules_changed(&committed.restarted),
        }
        self.in_force.file = file;
        self.in_force.compiled = committed.compiled.clone();
        let before = mem::take(&mut committed.before);
        self.drops
            .note_ended(&self.in_force.timed, &committed.timed);
        self.in_force.timed = committed.timed.clone();
        if !is_change {
            let policy = &self.in_force.file.policy;
            self.in_force.remembered.update(policy, &host, |_| true);
        }
        let before = paths.map(|paths| Before {
            image: Cow::Owned(before),
            paths,
        });
        match occasion {
            Occasion::Reload { is_tried: true, .. } => self.before_tried = before,
            Occasion::Reload { .. } | Occasion::FallBack => {
                self.reset_since_tried(&mut entries);
                self.reset_cut(before, &mut entries);
            }
            Occasion::Start { .. } | Occasion::Change { .. } => {
                self.reset_cut(before, &mut entries);
            }
        }
        self.hold_tls(&committed.compiled, false, &mut entries);
        // The change is in force, and shuts everybody out who is not exempt: a reload must not look as if all were well.
        if let Some(error) = self.complaints.get(tls::TLS).filter(|_| !is_change) {
            // Errors of the change are logged as such.
            entries.retain(|entry| entry.text != *error);
            committed.errors.push(error.clone());
        }
        self.look_for_lost(&mut entries);
        self.verify(&mut entries);
        let timing = &mut committed.enforced.timing;
        timing.verified_ms = self
            .verified
            .errors
            .is_empty()
            .then(|| accepted.elapsed_ms());
        timing.interfaces.clone_from(&self.verified.interfaces);
        let mut summary = None;
        if !is_change {
            match self.summary(&committed.enforced) {
                Ok((text, inert)) => {
                    summary = Some(text);
                    committed.errors.extend(inert);
                }
                Err(error) => committed.errors.push(format!("{error:#}")),
            }
        }
        let checked = self.checked(entries, summary);
        Ok((committed, checked))
    }

    fn checked(&mut self, entries: Vec<Entry>, summary: Option<String>) -> Checked {
        Checked {
            remembered: self.in_force.remembered.clone(),
            entries,
            verified: self.verified.clone(),
            summary,
            last_hits: self.counted.record(),
        }
    }

    /// Describes in one line what is enforced. Returns an error text as well where no interface is filtered.
    fn summary(&mut self, enforced: &report::Enforced) -> Result<(String, Option<String>)> {
        let host = self.netlink.interfaces()?;
        let InForce {
            file,
            compiled,
            remembered,
            ..
        } = &self.in_force;
        let prefixes: usize = compiled.databases.values().map(|e| e.prefixes()).sum();
        let coverage = Coverage::of(&file.policy, remembered, &host);
        let ours = self.filter.program_id()?;
        let mut on = coverage.filtered(ours).join(", ");
        if on.is_empty() {
            on = "no interface".into();
        }
        if !coverage.missing.is_empty() {
            on = format!(
                "{on} ({})",
                list(coverage.missing.iter().map(describe_missing))
            );
        }
        let summary = format!(
            "enforcing {}: {} and {} on {on}, in {:.1} ms",
            file.path.display(),
            counted(compiled.databases.len(), "database", "databases"),
            counted(prefixes, "prefix", "prefixes"),
            enforced.timing.enforced_ms,
        );
        Ok((summary, coverage.inert(ours)))
    }

    /// Checks that the program is still attached, and repairs. Any process with the right to can detach it, and the
    /// kernel does not announce that. `thorough`: runs the probes, too, and looks at every interface.
    pub fn check(&mut self, thorough: bool, enforced: &report::Enforced) -> Checked {
        let mut entries = Vec::new();
        let mut summary = None;
        if self.is_detached {
            return self.checked(entries, summary);
        }
        self.end_late_trace();
        let compiled = self.in_force.compiled.clone();
        // Each second where all is well; what the kernel refuses is tried again at a thorough check.
        if thorough || !self.complaints.contains_key(tls::TLS) {
            self.hold_tls(&compiled, thorough, &mut entries);
        }
        if thorough {
            self.reset_rest(&mut entries);
            let ended = self.end_tls_searches();
            self.note("refused connections", ended, &mut entries);
            self.look_for_lost(&mut entries);
        }
        if thorough || self.lost_an_interface() {
            let attached = self.heal(&mut entries);
            if thorough || attached {
                self.verify(&mut entries);
            }
            if attached {
                summary = self.summary(enforced).ok().map(|(summary, _)| summary);
            }
        }
        let read = self.read_hits_if_due();
        self.note("hits", read, &mut entries);
        let collected = self.collect_drops();
        let granted = self.filter.grant_samples();
        self.note("drops", collected.and(granted), &mut entries);
        self.checked(entries, summary)
    }

    /// Logs an error of the checks once, until it is over or another.
    fn note(&mut self, what: &'static str, result: Result<()>, entries: &mut Vec<Entry>) {
        match result {
            Ok(()) => {
                self.complaints.remove(what);
            }
            Err(error) => {
                let error = format!("{error:#}");
                if self.complaints.get(what) != Some(&error) {
                    entries.push(Entry::error(error.clone()));
                }
                self.complaints.insert(what, error);
            }
        }
    }

    /// Whether an interface that was filtered runs another program now, or none; that it cannot be seen counts
    /// as lost.
    fn lost_an_interface(&mut self) -> bool {
        let programs = self.netlink.read(async |netlink| netlink.programs().await);
        let (Ok(programs), Ok(ours)) = (programs, self.filter.program_id()) else {
            return true;
        };
        let runs_ours = |index| {
            programs
                .get(index)
                .is_some_and(|xdp| xdp.program_id == ours)
        };
        !self.covered.iter().all(runs_ours)
    }

    /// Attaches again wherever a listed interface came back or lost its link. Returns whether it did.
    fn heal(&mut self, entries: &mut Vec<Entry>) -> bool {
        let host = match self.netlink.interfaces() {
            Ok(host) => host,
            Err(error) => {
                self.note("look", Err(error), entries);
                return false;
            }
        };
        self.note("look", Ok(()), entries);
        let file = self.in_force.file.clone();
        self.note_host(&file.policy, &host, entries);
        let restored = self.filter.restore_pins();
        if let Ok(true) = restored {
            entries.push(Entry::warning(
                "pins of the filter were removed; they are restored",
            ));
        }
        let restored = restored.map(drop).context("restore the filter's pins");
        let moved = restored.and_then(|()| self.filter.adopt_moved(&host));
        self.note("pins", moved, entries);
        let mut attached = false;
        // An index that is free may be another interface's next.
        let is_here = |index: &u32| host.iter().any(|interface| interface.index == *index);
        self.covered.retain(is_here);
        self.unfiltered.retain(|index, _| is_here(index));
        let policy = &self.in_force.file.policy;
        let coverage = Coverage::of(policy, &self.in_force.remembered, &host);
        for interface in &coverage.present {
            let mode = coverage.mode(policy, interface);
            let healed = match self.filter.check_interface(interface, mode) {
                Ok(()) => self.filter.attach(interface, mode),
                Err(error) => Err(error),
            };
            match healed {
                Ok(how) => {
                    self.unfiltered.remove(&interface.index);
                    if how != Attached::Kept {
                        if self.covered.contains(&interface.index) {
                            entries.push(describe_repair(interface));
                            self.repairs += 1;
                        }
                        entries.push(describe_attachment(interface, &how));
                        attached = true;
                    }
                }
                Err(error) => {
                    let error = format!("{} is not filtered: {error:#}", interface.name);
                    if self.unfiltered.get(&interface.index) != Some(&error) {
                        entries.push(
                            Entry::error(error.clone()).with("INTERFACE", interface.name.clone()),
                        );
                    }
                    self.unfiltered.insert(interface.index, error);
                }
            }
        }
        let is_filtered = |index| !self.unfiltered.contains_key(&index);
        self.in_force.remembered.update(policy, &host, is_filtered);
        attached
    }

    /// Compares what the kernel does with what the policy says. An error is logged once; that it cannot be
    /// compared is one.
    fn verify(&mut self, entries: &mut Vec<Entry>) {
        let verified = self.compare().unwrap_or_else(|error| report::Verified {
            at: Timestamp::now(),
            probes: 0,
            interfaces: Vec::new(),
            errors: vec![format!("verify what is enforced: {error:#}")],
        });
        for error in &verified.errors {
            if !self.verified.errors.contains(error) {
                entries.push(Entry::error(error.clone()));
            }
        }
        self.verified = verified;
    }

    fn compare(&mut self) -> Result<report::Verified> {
        let host = self.netlink.interfaces()?;
        let InForce {
            file, remembered, ..
        } = &self.in_force;
        let coverage = Coverage::of(&file.policy, remembered, &host);
        self.probe_round = self.probe_round.wrapping_add(1);
        let round = self.probe_round;
        let verified = verify::verify(&mut self.filter, &coverage, &self.in_force, round)?;
        let pinned = self.filter.pinned()?.into_iter().map(|link| link.interface);
        self.covered = pinned.filter(|&index| coverage.is_present(index)).collect();
        Ok(verified)
    }

    /// Reads back what the kernel does. `verify`: runs the probes first.
    ///
    /// # Errors
    /// Netlink, a pin or a map cannot be read.
    pub fn observe(&mut self, verify: bool) -> Result<(Observed, Vec<Entry>)> {
        let mut entries = Vec::new();
        if verify {
            self.verify(&mut entries);
        }
        let complaints = self.complaints.iter();
        let complaints = complaints.map(|(what, error)| format!("{what}: {error}"));
        let complaints = complaints.collect();
        let (counts, hits) = self.filter.counts_and_hits()?;
        self.counted.note(&hits);
        let observed = Observed {
            complaints,
            lost: self.lost.clone(),
            settings: Settings::read(),
            tracing: self.tracing(),
            in_force: self.in_force.clone(),
            host: self.netlink.interfaces()?,
            pinned: self.pinned()?,
            program_id: self.filter.program_id()?,
            counts,
            fates: self.filter.fates()?,
            hits,
            last_hits: self.counted.last_hits.clone(),
            repairs: self.repairs,
            verified: self.verified.clone(),
        };
        Ok((observed, entries))
    }

    /// By database: packets that passed, and those that no rule allows.
    ///
    /// # Errors
    /// A map cannot be read.
    pub fn packets(&self) -> Result<BTreeMap<String, [u64; 2]>> {
        let mut packets: BTreeMap<String, [u64; 2]> = BTreeMap::new();
        for ((database, reason, is_monitored), count) in self.filter.counts()? {
            let Some(database) = database.filter(|_| !is_monitored) else {
                continue;
            };
            let [passed, dropped] = packets.entry(database).or_default();
            match reason {
                Reason::Allowed => *passed += count,
                Reason::NotAllowed => *dropped += count,
                _ => {}
            }
        }
        Ok(packets)
    }

    /// The links that are pinned: none where the pins were removed, and cannot be restored.
    fn pinned(&self) -> Result<Vec<Pinned>> {
        match self.filter.pinned() {
            Err(error) if is_absent(&error) => Ok(Vec::new()),
            pinned => pinned,
        }
    }

    /// # Errors
    /// As `verify::explain`.
    pub fn explain(
        &mut self,
        source: IpAddr,
        database: Option<&str>,
    ) -> Result<Vec<report::Explanation>> {
        let paths = self.paths()?;
        let unfiltered = paths.unfiltered(source);
        verify::explain(
            &mut self.filter,
            &self.in_force,
            source,
            database,
            unfiltered,
        )
    }

    /// Sources that are dropped now and that a rule allowed until lately, by database.
    pub fn formerly_allowed(&self) -> BTreeMap<String, usize> {
        let dropped = self.drops.not_allowed();
        self.former.count(dropped, Timestamp::now())
    }

    /// How full the maps are that only the agent fills.
    pub fn own_fills(&self) -> Vec<Fill> {
        self.filter.own_fills()
    }

    /// How full the maps are that the programs fill, too. It takes a system call for each entry.
    ///
    /// # Errors
    /// A map cannot be listed.
    pub fn program_fills(&self) -> Result<Vec<Fill>> {
        self.filter.program_fills()
    }

    /// Names of the databases in the kernel.
    pub fn databases(&self) -> BTreeSet<String> {
        let names = self.filter.image().slots_by_name().into_keys();
        names.map(str::to_owned).collect()
    }

    /// Rules and blocks with an end, as the kernel holds them.
    pub fn ends(&self) -> Vec<InKernel> {
        self.filter.ends()
    }

    /// Stops filtering. Returns the names of the interfaces that are no longer filtered.
    ///
    /// # Errors
    /// A pin that is not ours or cannot be removed. The filter stays, at least in part: the checks repair it.
    pub fn detach(&mut self) -> Result<Vec<String>> {
        let host = self.netlink.interfaces()?;
        self.end_trace(None, "the filter is detached");
        let indexes = self.filter.remove()?;
        self.is_detached = true;
        let filtered = host.into_iter();
        let filtered = filtered.filter(|interface| indexes.contains(&interface.index));
        Ok(filtered.map(|interface| interface.name).collect())
    }
}

/// The log's line of an interface that was filtered until something detached the program.
fn describe_repair(interface: &Interface) -> Entry {
    let name = &interface.name;
    Entry::warning(format!("the filter was taken off {name}, not by the agent"))
        .with("INTERFACE", name.clone())
}

/// # Errors
/// More open connections would be cut off, or it is not known how many.
fn refuse_cut(plan: &report::Plan, most: usize) -> Result<()> {
    if let Some(unknown) = plan.cut_unknown.first() {
        bail!("it is not known how many open connections it would cut off: {unknown}");
    }
    let connections: usize = plan.cut.iter().map(|cut| cut.connections).sum();
    ensure!(
        connections <= most,
        "it would cut off {}, more than {most}: {}",
        counted(connections, "open connection", "open connections"),
        list(plan.cut.iter().take(MAX_NAMED_CUTS).map(|cut| {
            format!(
                "{} of {} at database {}",
                cut.connections, cut.source, cut.database
            )
        }))
    );
    Ok(())
}

fn is_absent(error: &anyhow::Error) -> bool {
    let cause = error.downcast_ref::<io::Error>();
    cause.is_some_and(|cause| cause.kind() == io::ErrorKind::NotFound)
}
