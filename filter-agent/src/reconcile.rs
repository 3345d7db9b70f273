//! One change of what the kernel enforces: `prepare` finds out what it would do and refuses what can be refused
//! without touching the kernel, `commit` does it. Start, restart, reload, region changes and ends of rules all
//! come here.

use std::{collections::BTreeSet, mem, net::IpAddr, sync::Arc};

use anyhow::{Result, bail, ensure};

use crate::{
    clock::Accepted,
    compile::Compiled,
    host::{
        Interface,
        coverage::{Coverage, Ended, Pinned, Remembered, describe_missing},
        settings::Settings,
    },
    kernel::{
        apply::{Applied, NotTakenBack, Planned, Unknown},
        filter::Filter,
        image::Image,
        links::{Attached, TakenOver, is_gone},
    },
    log::Entry,
    policy::{Mode, Policy, differences},
    policy_file::PolicyFile,
    protection,
    refusal::Refusal,
    report,
    temporary::Timed,
    text::{counted, list},
};

/// A policy with its regions' prefixes, ready to be enforced.
#[derive(Clone, Debug)]
pub struct Desired {
    pub file: Arc<PolicyFile>,
    pub compiled: Arc<Compiled>,
    pub timed: Arc<Timed>,
    pub accepted: Accepted,
    /// From then until it was compiled, in milliseconds.
    pub compiled_ms: f64,
}

/// The policy that the kernel enforces.
#[derive(Clone, Debug)]
pub struct InForce {
    pub file: Arc<PolicyFile>,
    pub compiled: Arc<Compiled>,
    pub timed: Arc<Timed>,
    /// Interfaces that the entries of `interfaces` stand for.
    pub remembered: Remembered,
}

/// On what occasion something is enforced.
#[derive(Clone, Debug)]
pub enum Occasion {
    /// `before`: the confirmed policy, if one is kept.
    Start { before: Option<Policy> },
    Reload {
        /// Whether the new policy may leave unguarded what the one in force guards.
        allow_unprotect: bool,
        /// How many open connections the change may cut off; `None`: any number.
        max_cut: Option<usize>,
        caller: Option<IpAddr>,
        /// Whether it has to be confirmed: no connection is reset until then.
        is_tried: bool,
    },
    /// The confirmed policy is enforced again after one that was tried.
    FallBack,
    /// Of regions, of temporary rules, or an end of rules: the policy is the one in force.
    Change { caller: Option<IpAddr> },
}

impl Occasion {
    /// The address of who asked for it, if it is known.
    pub fn caller(&self) -> Option<IpAddr> {
        match *self {
            Self::Start { .. } | Self::FallBack => None,
            Self::Reload { caller, .. } | Self::Change { caller } => caller,
        }
    }

    /// Whether a policy is to be tried.
    pub fn is_tried(&self) -> bool {
        matches!(self, Self::Reload { is_tried: true, .. })
    }
}

/// The state of the host and the kernel before a change.
pub struct Facts<'a> {
    /// The policy that the new one replaces.
    pub before: Option<&'a Policy>,
    pub remembered: &'a Remembered,
    /// A whole dump.
    pub host: &'a [Interface],
    /// Reads the kernel's settings; a change of regions does not need them.
    pub settings: fn() -> Settings,
    pub pinned: &'a [Pinned],
    /// The kernel's id of this agent's program.
    pub program_id: u32,
}

/// A change that was not refused.
#[derive(Debug)]
pub struct Plan {
    pub report: report::Plan,
    /// Databases, ports and interfaces that the change would leave unguarded.
    pub unguarded: Vec<String>,
    desired: Desired,
    change: Planned,
    is_start: bool,
    /// Listed interfaces that may be filtered, each in its mode.
    attach: Vec<(Interface, Mode)>,
    /// Of these, the ones that only memory lists, and all where the agent falls back: what is wrong with them refuses
    /// nothing.
    remembered: BTreeSet<u32>,
    /// Interfaces whose filtering ends.
    detach: BTreeSet<u32>,
    filtered: BTreeSet<u32>,
}

/// A change that was made.
#[derive(Debug)]
pub struct Committed {
    /// The image before the change.
    pub before: Image,
    pub report: Box<report::Plan>,
    pub timed: Arc<Timed>,
    pub compiled: Arc<Compiled>,
    pub enforced: report::Enforced,
    /// Lines for the log.
    pub entries: Vec<Entry>,
    /// Databases whose counters begin at zero.
    pub restarted: BTreeSet<String>,
    /// Errors after the change was made. They refuse nothing.
    pub errors: Vec<String>,
    /// Why a link of another layout was not taken over. Its interface is filtered by the program and maps that the
    /// link has.
    pub not_taken_over: Option<anyhow::Error>,
}

/// A change that was not made.
#[derive(Debug)]
pub struct Refused {
    pub error: anyhow::Error,
    pub kernel: Kernel,
}

/// The content of the maps after a change was refused.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kernel {
    /// As before.
    Unchanged,
    /// Parts of the change could not be taken back. The agent knows which, and tries again.
    Mixed,
    /// It cannot be read: the agent must end. What is pinned stays in force.
    Unknown,
}

impl From<anyhow::Error> for Refused {
    fn from(error: anyhow::Error) -> Self {
        let kernel = if error.is::<Unknown>() {
            Kernel::Unknown
        } else if error.is::<NotTakenBack>() {
            Kernel::Mixed
        } else {
            Kernel::Unchanged
        };
        Self { error, kernel }
    }
}

impl Refused {
    /// The error, where another message says what stays in force.
    pub fn alone(self) -> anyhow::Error {
        match self.kernel {
            Kernel::Unchanged => Refusal::or(self.error, Refusal::Conflict),
            _ => self.describe("change"),
        }
    }

    /// The same as text.
    pub fn describe_alone(self) -> String {
        format!("{:#}", self.alone())
    }

    /// The error with its consequence. `what`: the kind of change, as in `reload`.
    pub fn describe(self, what: &str) -> anyhow::Error {
        // Only what left the kernel as it was is called refused.
        let outcome = match self.kernel {
            Kernel::Unchanged => "refused, nothing is changed",
            Kernel::Mixed => "failed half way, and the agent tries to take back the rest",
            Kernel::Unknown => {
                "failed half way, and the agent ends; the next one goes on from what is in force"
            }
        };
        let error = match self.kernel {
            Kernel::Unchanged => Refusal::or(self.error, Refusal::Conflict),
            _ => self.error,
        };
        error.context(format!("{what} {outcome}"))
    }
}

impl Plan {
    pub fn compiled(&self) -> Arc<Compiled> {
        self.desired.compiled.clone()
    }
}

/// Prepares a change. `check` returns why an interface cannot be filtered, `change` how the maps would change:
/// both look at the kernel, and neither changes anything.
///
/// # Errors
/// Everything for which the change is refused, as far as it can be known before it is made.
pub fn prepare(
    desired: Desired,
    occasion: &Occasion,
    facts: &Facts<'_>,
    check: impl Fn(&Interface, Mode) -> Result<()>,
    change: impl FnOnce(&Compiled) -> Result<Planned>,
) -> Result<Plan> {
    let Facts {
        before,
        remembered,
        host,
        settings,
        pinned,
        program_id: ours,
    } = *facts;
    let mut change = change(&desired.compiled)?;
    let filtered = indexes(pinned);
    let mut report = report::Plan {
        file: desired.file.path.clone(),
        hash: desired.file.hash.clone(),
        difference: mem::take(&mut change.difference),
        settings: before
            .map(|before| differences(before, &desired.file.policy))
            .unwrap_or_default(),
        attached: Vec::new(),
        detached: Vec::new(),
        warnings: Vec::new(),
        cut: Vec::new(),
        cut_unknown: Vec::new(),
        lock_out: Vec::new(),
    };
    if let Occasion::Change { .. } = occasion {
        return Ok(Plan {
            report,
            unguarded: Vec::new(),
            desired,
            change,
            is_start: false,
            attach: Vec::new(),
            remembered: BTreeSet::new(),
            detach: BTreeSet::new(),
            filtered,
        });
    }
    let policy = &desired.file.policy;
    let coverage = Coverage::of(policy, remembered, host);
    report.warnings = desired.file.warnings(&desired.compiled);
    report.warnings.extend(coverage.warnings(host));
    let settings = settings();
    report.warnings.extend(settings.port_warnings(policy));
    let forwarded = settings.forward_warnings(policy, &coverage.present);
    report.warnings.extend(forwarded);
    for entry in &coverage.missing {
        let what = describe_missing(entry);
        // One that is missing is filtered when it appears: at boot it may come later, and one that vanished must
        // not keep the others from their rules. Only where a reload names one that never was there is that
        // a mistake.
        let is_new = before.is_some_and(|before| !before.interfaces.contains(entry));
        if matches!(occasion, Occasion::Reload { .. }) && is_new {
            let names = list(host.iter().map(|interface| &interface.name));
            bail!("{what} on this host, which has {names}");
        }
        report
            .warnings
            .push(format!("{what}; it is filtered as soon as it is there"));
    }
    let unguarded = before.map(|before| protection::ended(before, policy, remembered, host));
    let unguarded = unguarded.unwrap_or_default();
    if let Occasion::Reload {
        allow_unprotect: false,
        ..
    } = occasion
    {
        ensure!(unguarded.is_empty(), describe_unguarded(&unguarded));
    }
    // An interface that is filtered as it should be is left alone: nothing there can fail after the maps are written.
    let is_whole = |interface: &Interface| {
        let link = pinned.iter().find(|link| link.interface == interface.index);
        let runs = interface.xdp.map(|xdp| xdp.program_id);
        runs == Some(ours) && link.is_some_and(|link| link.program_id == ours)
    };
    let is_fall_back = matches!(occasion, Occasion::FallBack);
    let mut attach = Vec::new();
    let mut only_remembered = BTreeSet::new();
    for interface in &coverage.present {
        let is_remembered = coverage.is_remembered(interface.index);
        let mode = coverage.mode(policy, interface);
        match check(interface, mode) {
            Ok(()) if is_whole(interface) => {}
            Ok(()) => attach.push((interface.clone(), mode)),
            // What is wrong with one interface must not keep a tried policy in force: the checks go on to attach it.
            Err(error) if is_remembered || is_fall_back => {
                report.warnings.push(not_filtered(interface, &error))
            }
            Err(error) => return Err(error),
        }
        if is_remembered || is_fall_back {
            only_remembered.insert(interface.index);
        }
    }
    let name_if = |wanted: &dyn Fn(u32) -> bool| -> Vec<String> {
        let found = host.iter().filter(|interface| wanted(interface.index));
        found.map(|interface| interface.name.clone()).collect()
    };
    let detach = ended(policy, &coverage, facts);
    let stay: Vec<Interface> = host
        .iter()
        .filter(|interface| !detach.contains(&interface.index))
        .cloned()
        .collect();
    report
        .warnings
        .extend(unlisted(policy, &coverage, pinned, &stay));
    report.attached = name_if(&|index| coverage.is_present(index) && !filtered.contains(&index));
    report.detached = name_if(&|index| detach.contains(&index));
    Ok(Plan {
        report,
        unguarded,
        is_start: matches!(occasion, Occasion::Start { .. }),
        desired,
        change,
        attach,
        remembered: only_remembered,
        detach,
        filtered,
    })
}

/// Makes the kernel enforce what was prepared.
///
/// # Errors
/// The change was refused. The kernel enforces what it did before, unless the error says otherwise.
pub fn commit(filter: &mut Filter, plan: Plan, host: &[Interface]) -> Result<Committed, Refused> {
    let Plan {
        mut report,
        unguarded: _,
        desired,
        change,
        is_start,
        attach,
        remembered,
        detach,
        filtered,
    } = plan;
    let others = if is_start {
        filter.to_take_over()?
    } else {
        Vec::new()
    };
    // The maps first: no program runs on maps that do not hold the policy yet.
    let applied = filter.make(change)?;
    let mut attached = Vec::new();
    for (interface, mode) in attach {
        match filter.attach(&interface, mode) {
            Ok(Attached::Kept) => {}
            Ok(how) => attached.push((interface, how)),
            // Others are not kept from their rules by one that has vanished since the host was looked at, or
            // that only memory lists.
            Err(error) if is_gone(&error) || remembered.contains(&interface.index) => {
                report.warnings.push(not_filtered(&interface, &error));
            }
            Err(error) => return Err(take_back(filter, applied, &attached, &filtered, error)),
        }
    }
    // The commit. The kernel enforces the new policy on every listed interface that is there, and adds were made
    // before removals. Above this line whatever fails is taken back and refuses the change. Below it nothing
    // may return an error, ask whether to go on, or look at a file: what goes wrong is reported beside the
    // change, which stands.
    let mut entries = Vec::new();
    let mut errors = Vec::new();
    let result = filter.take_over(others);
    entries.extend(result.taken.iter().map(describe_takeover));
    let found = result.errors.iter();
    errors.extend(found.map(|error| format!("take over an older agent's pins: {error:#}")));
    let not_taken_over = result.not_taken.into_iter().next();
    for (interface, how) in &attached {
        entries.push(describe_attachment(interface, how));
    }
    report.attached = attached
        .iter()
        .map(|(interface, _)| interface.name.clone())
        .collect();
    report.detached.clear();
    for index in detach {
        let name = host.iter().find(|interface| interface.index == index);
        match filter.detach(index) {
            Ok(()) => report.detached.extend(name.map(|found| found.name.clone())),
            Err(error) => errors.push(format!("{error:#}")),
        }
    }
    let before = applied.before;
    let restarted = applied.restarted;
    let warnings = report.warnings.iter();
    entries.extend(warnings.map(|warning| Entry::warning(warning.clone())));
    Ok(Committed {
        before,
        enforced: report::Enforced {
            file: desired.file.path.clone(),
            timing: report::Timing {
                accepted: desired.accepted.at,
                compiled_ms: desired.compiled_ms,
                enforced_ms: desired.accepted.elapsed_ms(),
                verified_ms: None,
                interfaces: Vec::new(),
            },
            next_expiry: desired
                .compiled
                .next_end
                .map(|end| desired.timed.now.date_of(end)),
        },
        compiled: desired.compiled,
        timed: desired.timed,
        report: report.into(),
        entries,
        restarted,
        errors,
        not_taken_over,
    })
}

/// Takes back what was done of a change. The maps first: what is filtered must not go on with a policy that was
/// refused. A link that was put back where one was lost stays.
fn take_back(
    filter: &mut Filter,
    applied: Applied,
    attached: &[(Interface, Attached)],
    filtered: &BTreeSet<u32>,
    error: anyhow::Error,
) -> Refused {
    let mut refused = match filter.undo(applied) {
        Ok(()) => Refused::from(error),
        Err(more) => Refused::from(more.context(format!("{error:#}"))),
    };
    let new = attached.iter().map(|(interface, _)| interface.index);
    for index in new.filter(|index| !filtered.contains(index)) {
        if let Err(more) = filter.detach(index) {
            refused.error = refused.error.context(format!("{more:#}"));
            if refused.kernel == Kernel::Unchanged {
                refused.kernel = Kernel::Mixed;
            }
        }
    }
    refused
}

fn not_filtered(interface: &Interface, error: &anyhow::Error) -> String {
    format!("{} is not filtered: {error:#}", interface.name)
}

fn indexes(pinned: &[Pinned]) -> BTreeSet<u32> {
    pinned.iter().map(|pinned| pinned.interface).collect()
}

/// Indexes of the interfaces that are to be filtered no longer: what the policy before listed and the new one
/// does not. None while an entry of the new policy has no interface: that one may be there under another name.
fn ended(policy: &Policy, coverage: &Coverage, facts: &Facts<'_>) -> BTreeSet<u32> {
    match facts.before {
        Some(before) if coverage.missing.is_empty() => {
            let ended = Ended::between(before, policy, facts.remembered, facts.host).indexes;
            &ended & &indexes(facts.pinned)
        }
        _ => BTreeSet::new(),
    }
}

/// Why a policy is refused that would leave something unguarded.
pub fn describe_unguarded(unguarded: &[String]) -> String {
    format!(
        "it would end the protection of {}; if that is meant: `filter-agent reload \
         --allow-unprotect`, or list them under `unprotected:` in the policy",
        unguarded.join(", ")
    )
}

/// Warnings of interfaces that are filtered although the policy does not list them.
pub fn unlisted(
    policy: &Policy,
    coverage: &Coverage,
    pinned: &[Pinned],
    host: &[Interface],
) -> Vec<String> {
    // Where nothing is protected, the program passes everything.
    if policy.databases.is_empty() {
        return Vec::new();
    }
    let unlisted = coverage.unlisted(pinned, host).into_iter();
    let why = if coverage.missing.is_empty() {
        "until `filter-agent detach`".into()
    } else {
        format!(
            "since {}",
            list(coverage.missing.iter().map(describe_missing))
        )
    };
    let warnings = unlisted.map(|interface| {
        let name = &interface.name;
        format!("interface {name} stays filtered although it is not listed, {why}")
    });
    warnings.collect()
}

fn describe_takeover(taken: &TakenOver) -> Entry {
    let TakenOver {
        layout,
        links,
        counters,
    } = taken;
    let interfaces = counted(*links, "interface", "interfaces");
    let counters = if *counters { "go on" } else { "begin at 0" };
    Entry::info(format!(
        "took over from an agent of layout {layout}: {interfaces} switched, counters {counters}"
    ))
}

/// The log's line of an attachment: a fall-back to generic mode must not go unnoticed.
pub fn describe_attachment(interface: &Interface, how: &Attached) -> Entry {
    let name = &interface.name;
    Entry::info(match how {
        Attached::Kept => format!("{name} is filtered as before"),
        Attached::Native => format!("attached to {name} in native mode"),
        Attached::Generic { refusal: None } => format!("attached to {name} in generic mode"),
        Attached::Generic {
            refusal: Some(refusal),
        } => {
            format!("attached to {name} in generic mode, since native mode was refused: {refusal}")
        }
    })
    .with("INTERFACE", name.clone())
}

#[cfg(test)]
mod tests;
