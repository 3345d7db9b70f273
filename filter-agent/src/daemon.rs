//! When things happen: start, signals, expiry, netlink events, requests on the control socket.

use std::{
    collections::BTreeMap,
    fs,
    net::IpAddr,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use axum::{
    Json, Router,
    extract::{Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use filter_common::Reason;
use futures_util::{FutureExt as _, StreamExt as _};
use jiff::Timestamp;
use serde::Deserialize;
use tokio::{
    net::{UnixListener, UnixStream},
    signal::unix::{SignalKind, signal},
    sync::{MappedMutexGuard, Mutex, MutexGuard, Notify},
};

use crate::{
    compile::{Compiled, RuleKey, compile, is_expired},
    filter::{Attached, Filter},
    host::{self, Interface},
    image::Difference,
    policy::{self, Model, Policy, Region, Rule},
    probe,
    region::{self, Regions},
    report,
};

/// How long to wait before taking out expired rules is tried again.
const RETRY: Duration = Duration::from_secs(10);

/// Where the daemon finds and keeps things.
#[derive(Clone, Debug)]
pub struct Options {
    pub policy: PathBuf,
    pub socket: PathBuf,
    pub bpffs: PathBuf,
    /// Prefixes of one address family that a policy may have; `None`: the default.
    pub max_prefixes: Option<u32>,
}

/// A policy file, read and found valid.
pub struct Loaded {
    pub file: PathBuf,
    pub policy: Policy,
    pub regions: Regions,
    pub warnings: Vec<String>,
    accepted: Timestamp,
    since: Instant,
}

impl Loaded {
    pub fn compile(&self) -> Compiled {
        compile(&self.policy, &self.regions, Timestamp::now())
    }
}

/// Reads a policy file and resolves the regions it uses. `before`: what they were when last resolved.
///
/// # Errors
/// Everything wrong with the file, a line each.
pub fn load(file: &Path, before: &Regions) -> Result<Loaded> {
    let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    let accepted = Timestamp::now();
    let since = Instant::now();
    let named = |problem: policy::Problem| format!("{}: {problem}", file.display());
    let (policy, problems) = policy::parse(&text).map_err(|problems| {
        let lines: Vec<String> = problems.into_iter().map(named).collect();
        anyhow!(lines.join("\n"))
    })?;
    let regions = region::resolve(&policy, before)?;
    Ok(Loaded {
        file: file.to_owned(),
        policy,
        regions,
        warnings: problems.into_iter().map(named).collect(),
        accepted,
        since,
    })
}

/// The running agent: a filter and the policy it enforces.
struct Agent {
    options: Options,
    filter: Filter,
    loaded: Loaded,
    compiled: Compiled,
    enforced: report::Enforced,
    verified: report::Verified,
    started: Timestamp,
}

/// Attaches, fills, and stays until it is told to stop; the filter stays longer.
pub async fn run(options: Options) -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "run needs root: it loads BPF programs and attaches them to interfaces"
    );
    let filter = Filter::open(&options.bpffs, options.max_prefixes)?;
    let loaded = load(&options.policy, &Regions::new())?;
    let listener = listen(&options.socket).await?;
    let mut events = link_events()?;
    let mut hangup = signal(SignalKind::hangup()).context("listen for SIGHUP")?;
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;

    let agent = Agent::start(options.clone(), filter, loaded).await?;
    let shared = Shared {
        agent: Arc::new(Mutex::new(Some(agent))),
        detached: Arc::default(),
    };
    let stop = Arc::new(Notify::new());
    let stopped = stop.clone();
    let server = axum::serve(listener, router(shared.clone()))
        .with_graceful_shutdown(async move { stopped.notified().await });
    let server = tokio::spawn(server.into_future());

    // Where there is no agent any more, it was detached, and the loop is about to end.
    loop {
        let expiry = match shared.agent().await {
            Ok(agent) => agent.compiled.next_expiry,
            Err(_) => None,
        };
        tokio::select! {
            _ = hangup.recv() => {
                if let Ok(mut agent) = shared.agent().await {
                    // What was wrong is logged by then.
                    let _ = agent.reload().await;
                }
            }
            Some(()) = events.next() => {
                // One look at the interfaces answers all that was announced by now.
                while let Some(Some(())) = events.next().now_or_never() {}
                if let Ok(mut agent) = shared.agent().await {
                    agent.heal().await;
                }
            }
            () = tokio::time::sleep(until(expiry)) => {
                if let Ok(mut agent) = shared.agent().await {
                    agent.expire().await;
                }
            }
            () = shared.detached.notified() => break,
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    // Requests under way get their answers, in bounded time.
    stop.notify_one();
    let _ = tokio::time::timeout(Duration::from_secs(1), server).await;
    match shared.agent.lock().await.take() {
        Some(agent) => {
            let names = agent.loaded.policy.interfaces.join(", ");
            log(&format!("stopping; the filter stays in force on {names}"));
        }
        None => log("detached; nothing is filtered any more"),
    }
    fs::remove_file(&options.socket).with_context(|| format!("remove {}", options.socket.display()))
}

/// One line for the journal.
fn log(line: &str) {
    eprintln!("{line}");
}

/// How long to sleep for a rule to expire. The clock may be set meanwhile, which a sleep does not
/// see: hence never long.
fn until(expiry: Option<Timestamp>) -> Duration {
    const LONGEST: Duration = Duration::from_secs(10);
    let Some(expiry) = expiry else { return LONGEST };
    let left = expiry.duration_since(Timestamp::now());
    Duration::try_from(left).unwrap_or_default().min(LONGEST)
}

type Events = futures_util::stream::BoxStream<'static, ()>;

/// A stream that yields when an interface appears, vanishes or changes.
fn link_events() -> Result<Events> {
    let groups = [rtnetlink::MulticastGroup::Link];
    let (connection, _, messages) = rtnetlink::new_multicast_connection(&groups)
        .context("listen for interfaces that come and go")?;
    tokio::spawn(connection);
    Ok(messages.map(|_| ()).boxed())
}

/// The control socket, for root only.
async fn listen(socket: &Path) -> Result<UnixListener> {
    if UnixStream::connect(socket).await.is_ok() {
        bail!("another filter-agent answers on {}", socket.display());
    }
    if let Some(directory) = socket.parent() {
        let mut builder = fs::DirBuilder::new();
        let made = builder.recursive(true).mode(0o750).create(directory);
        made.with_context(|| format!("create {}", directory.display()))?;
    }
    // Left by an agent that was killed.
    let _ = fs::remove_file(socket);
    // No moment at which others could connect: the mode is right from the start.
    let mask = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(socket);
    nix::sys::stat::umask(mask);
    listener.with_context(|| format!("listen on {}", socket.display()))
}

fn counted(count: usize, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

impl Agent {
    async fn start(options: Options, mut filter: Filter, loaded: Loaded) -> Result<Self> {
        let (_, compiled, enforced) = enforce(&mut filter, &loaded, &[]).await?;
        let verified = verify(&mut filter, &loaded.policy, &compiled).await?;
        let agent = Self {
            options,
            filter,
            loaded,
            compiled,
            enforced,
            verified,
            started: Timestamp::now(),
        };
        log(&agent.summary());
        Ok(agent)
    }

    /// What is enforced, in one line: what whoever starts the agent waits for.
    fn summary(&self) -> String {
        let prefixes: usize = self.compiled.databases.values().map(|e| e.prefixes()).sum();
        format!(
            "enforcing {}: {} and {} on {}, in {:.1} ms",
            self.loaded.file.display(),
            counted(self.compiled.databases.len(), "database", "databases"),
            counted(prefixes, "prefix", "prefixes"),
            self.loaded.policy.interfaces.join(", "),
            self.enforced.enforced_ms,
        )
    }

    /// Enforces the policy file as it is now, or leaves all as it is.
    async fn reload(&mut self) -> Result<report::Reloaded> {
        let reloaded = self.try_reload().await;
        match &reloaded {
            Ok(_) => log(&self.summary()),
            Err(error) => log(&format!("{error:#}")),
        }
        reloaded
    }

    async fn try_reload(&mut self) -> Result<report::Reloaded> {
        const REFUSED: &str = "reload refused, nothing is changed";
        let loaded = load(&self.options.policy, &self.loaded.regions).context(REFUSED)?;
        let known = &self.loaded.policy.interfaces;
        let enforced = enforce(&mut self.filter, &loaded, known).await;
        let (plan, compiled, enforced) = enforced.context(REFUSED)?;
        self.loaded = loaded;
        self.compiled = compiled;
        self.enforced = enforced;
        self.verify().await?;
        Ok(report::Reloaded {
            plan,
            enforced: self.enforced.clone(),
            verified: self.verified.clone(),
        })
    }

    async fn verify(&mut self) -> Result<()> {
        self.verified = verify(&mut self.filter, &self.loaded.policy, &self.compiled).await?;
        Ok(())
    }

    /// Attaches again wherever a listed interface came back or lost its link.
    async fn heal(&mut self) {
        let host = match host::interfaces().await {
            Ok(host) => host,
            Err(error) => return log(&format!("{error:#}")),
        };
        let mut attached = false;
        for name in &self.loaded.policy.interfaces {
            let Some(interface) = host.iter().find(|interface| interface.name == *name) else {
                continue;
            };
            let mode = self.loaded.policy.mode;
            let healed = match self.filter.check_interface(interface, mode) {
                Ok(()) => self.filter.attach(interface, mode),
                Err(error) => Err(error),
            };
            match healed {
                Ok(Attached::Kept) => {}
                Ok(how) => {
                    log(&attachment(interface, &how));
                    attached = true;
                }
                Err(error) => log(&format!("{name} is not filtered: {error:#}")),
            }
        }
        if attached && let Err(error) = self.verify().await {
            log(&format!("error: {error:#}"));
        }
    }

    /// Takes out what has expired.
    async fn expire(&mut self) {
        let Some(expiry) = self.compiled.next_expiry else {
            return;
        };
        if expiry > Timestamp::now() {
            return;
        }
        let compiled = self.loaded.compile();
        match self.filter.apply(&compiled) {
            Ok(_) => {
                self.enforced.next_expiry = compiled.next_expiry;
                self.compiled = compiled;
                log(&format!(
                    "rules that expired at {expiry} no longer allow anybody"
                ));
                if let Err(error) = self.verify().await {
                    log(&format!("error: {error:#}"));
                }
            }
            Err(error) => {
                log(&format!("error: take out expired rules: {error:#}"));
                // Tried again, but not at once and for ever.
                self.compiled.next_expiry = Some(Timestamp::now() + RETRY);
            }
        }
    }

    /// Read back from the kernel, every time: netlink, the links and the counters.
    async fn status(&mut self, reverify: bool) -> Result<report::Status> {
        if reverify {
            self.verify().await?;
        }
        let host = host::interfaces().await?;
        let warnings = warnings(&self.loaded, &self.compiled, &host);
        let mut errors = link_errors(&self.filter, &self.loaded.policy, &host)?;
        for error in &self.verified.errors {
            if !errors.contains(error) {
                errors.push(format!("at {}: {error}", self.verified.at));
            }
        }
        let ours = self.filter.program_id()?;
        let interfaces = self.loaded.policy.interfaces.iter().map(|name| {
            let interface = host.iter().find(|interface| interface.name == *name);
            let xdp = interface.and_then(|interface| interface.xdp);
            let xdp = xdp.filter(|xdp| xdp.program_id == ours);
            report::Interface {
                name: name.clone(),
                mode: xdp.map(|xdp| if xdp.native { "native" } else { "generic" }.into()),
                program_id: xdp.map(|xdp| xdp.program_id),
            }
        });
        let mut counts: BTreeMap<Option<String>, Vec<(Reason, bool, u64)>> = BTreeMap::new();
        for ((database, reason, monitored), packets) in self.filter.counts()? {
            counts
                .entry(database)
                .or_default()
                .push((reason, monitored, packets));
        }
        let dropped = |database: &Option<String>, monitored: bool| -> BTreeMap<String, u64> {
            let counts = counts.get(database).into_iter().flatten();
            counts
                .filter(|(reason, counted, _)| *reason != Reason::Allowed && *counted == monitored)
                .map(|(reason, _, packets)| (reason.name().into(), *packets))
                .collect()
        };
        let databases = self.loaded.policy.databases.iter().map(|database| {
            let entries = &self.compiled.databases[&database.name];
            let name = Some(database.name.clone());
            let allowed = counts.get(&name).into_iter().flatten();
            report::Database {
                name: database.name.clone(),
                ports: ports(database),
                addresses: database.addresses.clone(),
                model: model(database).into(),
                monitor: database.monitor,
                rules: entries.rules.len(),
                prefixes: entries.prefixes(),
                passed: allowed
                    .filter(|(reason, _, _)| *reason == Reason::Allowed)
                    .map(|(_, _, packets)| packets)
                    .sum(),
                dropped: dropped(&name, false),
                would_drop: dropped(&name, true),
            }
        });
        Ok(report::Status {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            started: self.started,
            policy: self.enforced.clone(),
            interfaces: interfaces.collect(),
            databases: databases.collect(),
            unattributed: dropped(&None, false),
            unattributed_would_drop: dropped(&None, true),
            regions: self.regions(),
            verified: self.verified.clone(),
            warnings,
            errors,
        })
    }

    /// Rules that have expired are listed too: they are in the file.
    fn rules(&self, database: Option<&str>) -> Result<Vec<report::Rule>> {
        self.known(database)?;
        let hits = self.filter.hits()?;
        let mut rules = Vec::new();
        let selected = |name: &str| database.is_none_or(|database| database == name);
        for database in self
            .loaded
            .policy
            .databases
            .iter()
            .filter(|d| selected(&d.name))
        {
            let entries = &self.compiled.databases[&database.name];
            let prefixes = entries.prefixes_by_rule();
            let line = |key: &RuleKey, number: Option<usize>, rule: Option<&Rule>| {
                let place = entries.rules.iter().position(|rule| rule == key);
                let hits = hits.get(&(database.name.clone(), key.text()));
                report::Rule {
                    database: database.name.clone(),
                    number,
                    source: key.to_string(),
                    label: rule.and_then(|rule| rule.label.clone()),
                    expires: rule.and_then(|rule| rule.expires),
                    expired: rule.is_some_and(|rule| is_expired(rule, Timestamp::now())),
                    prefixes: place.map_or(0, |place| prefixes[place]),
                    hits: hits.copied().unwrap_or_default(),
                }
            };
            for key in &entries.rules {
                if !matches!(key, RuleKey::Rule(_)) {
                    rules.push(line(key, None, None));
                }
            }
            if let Model::Dedicated { rules: written } = &database.model {
                for (number, rule) in (1..).zip(written) {
                    let key = RuleKey::Rule(rule.source.clone());
                    rules.push(line(&key, Some(number), Some(rule)));
                }
            }
        }
        Ok(rules)
    }

    /// # Errors
    /// A database that the policy does not have, with those it has.
    fn known(&self, database: Option<&str>) -> Result<()> {
        let Some(name) = database else { return Ok(()) };
        ensure!(
            self.compiled.databases.contains_key(name),
            "no database {name} in the policy, which has {}",
            list(self.compiled.databases.keys())
        );
        Ok(())
    }

    fn regions(&self) -> Vec<report::Region> {
        let region = |(name, region): (&String, &Region)| {
            let resolved = self.loaded.regions.get(name);
            report::Region {
                name: name.clone(),
                source: region.to_string(),
                used: resolved.is_some(),
                prefixes: resolved.map(|r| r.prefixes.to_vec()).unwrap_or_default(),
                resolved: resolved.map(|r| r.at),
            }
        };
        self.loaded.policy.regions.iter().map(region).collect()
    }

    /// The verdict comes from the attached program, the rule from the kernel's map; that the two agree
    /// is checked.
    fn explain(
        &mut self,
        source: IpAddr,
        database: Option<&str>,
    ) -> Result<Vec<report::Explanation>> {
        self.known(database)?;
        let mut explanations = Vec::new();
        for (name, entries) in &self.compiled.databases {
            if database.is_some_and(|database| database != name) {
                continue;
            }
            let Some(destination) = probe::destination(entries, source) else {
                ensure!(
                    database.is_none(),
                    "database {name} has no address of {source}'s family"
                );
                continue;
            };
            let judged = self.filter.judge(name, source, entries.monitor)?;
            let frame = probe::frame(entries.protocol, source, destination, entries.ports[0]);
            let passes = self.filter.probe(&frame, &judged)?;
            ensure!(
                passes == judged.passes(),
                "the attached program and the kernel's maps disagree on {source} at database {name}"
            );
            let rule = judged
                .rule_text
                .and_then(|text| entries.rules.iter().find(|rule| rule.text() == text));
            let written = rule.and_then(|key| self.written(name, key));
            explanations.push(report::Explanation {
                database: name.clone(),
                source,
                passes,
                monitor: entries.monitor,
                reason: judged.reason.name().into(),
                rule: rule.map(ToString::to_string),
                label: written.and_then(|rule| rule.label.clone()),
                expires: written.and_then(|rule| rule.expires),
            });
        }
        Ok(explanations)
    }

    /// The rule of the policy file behind a key.
    fn written(&self, database: &str, key: &RuleKey) -> Option<&Rule> {
        let databases = &self.loaded.policy.databases;
        let database = databases.iter().find(|written| written.name == database)?;
        let (Model::Dedicated { rules }, RuleKey::Rule(source)) = (&database.model, key) else {
            return None;
        };
        rules.iter().find(|rule| rule.source == *source)
    }
}

/// Makes the kernel enforce `loaded`. An interface among `known` may be missing: it was there and is
/// gone, which must not keep the others from their rules.
async fn enforce(
    filter: &mut Filter,
    loaded: &Loaded,
    known: &[String],
) -> Result<(report::Plan, Compiled, report::Enforced)> {
    let compiled = loaded.compile();
    let compiled_ms = milliseconds(loaded.since);
    let (mut plan, wanted) = interfaces(filter, loaded, &compiled, known).await?;
    let mode = loaded.policy.mode;
    for interface in &wanted {
        filter.check_interface(interface, mode)?;
    }
    let mut attached = Vec::new();
    let mut outcome = Ok(());
    for interface in &wanted {
        match filter.attach(interface, mode) {
            Ok(Attached::Kept) => {}
            Ok(how) => {
                attached.push(interface.index);
                log(&attachment(interface, &how));
            }
            Err(error) => {
                outcome = Err(error);
                break;
            }
        }
    }
    match outcome.and_then(|()| filter.apply(&compiled)) {
        Ok(difference) => plan.difference = difference,
        Err(error) => {
            for index in attached {
                filter.detach(index)?;
            }
            return Err(error);
        }
    }
    for pinned in filter.pinned()? {
        if wanted.iter().any(|wanted| wanted.index == pinned.interface) {
            continue;
        }
        // The new policy is enforced by now.
        if let Err(error) = filter.detach(pinned.interface) {
            log(&format!("error: {error:#}"));
        }
    }
    let enforced = report::Enforced {
        file: loaded.file.clone(),
        accepted: loaded.accepted,
        compiled_ms,
        enforced_ms: milliseconds(loaded.since),
        next_expiry: compiled.next_expiry,
    };
    for warning in &plan.warnings {
        log(&format!("warning: {warning}"));
    }
    Ok((plan, compiled, enforced))
}

/// What `loaded` changes of the interfaces that are filtered, and those it names that exist.
async fn interfaces(
    filter: &Filter,
    loaded: &Loaded,
    compiled: &Compiled,
    known: &[String],
) -> Result<(report::Plan, Vec<Interface>)> {
    let host = host::interfaces().await?;
    let mut warnings = warnings(loaded, compiled, &host);
    let mut wanted = Vec::new();
    for name in &loaded.policy.interfaces {
        match host.iter().find(|interface| interface.name == *name) {
            Some(interface) => wanted.push(interface.clone()),
            None if known.contains(name) => warnings.push(format!(
                "interface {name} is missing; it is filtered as soon as it is back"
            )),
            None => bail!(
                "interface {name} does not exist on this host, which has {}",
                list(host.iter().map(|interface| &interface.name))
            ),
        }
    }
    let pinned = filter.pinned()?;
    let is_pinned = |index| pinned.iter().any(|pinned| pinned.interface == index);
    let attached = wanted
        .iter()
        .filter(|interface| !is_pinned(interface.index));
    let is_wanted = |index| wanted.iter().any(|wanted| wanted.index == index);
    let detached = pinned.iter().map(|pinned| pinned.interface);
    let detached = detached.filter(|&index| !is_wanted(index)).map(|index| {
        let interface = host.iter().find(|host| host.index == index);
        interface.map_or_else(|| format!("{index} (gone)"), |found| found.name.clone())
    });
    let plan = report::Plan {
        file: loaded.file.clone(),
        difference: Difference::default(),
        attached: attached.map(|interface| interface.name.clone()).collect(),
        detached: detached.collect(),
        warnings,
    };
    Ok((plan, wanted))
}

/// Runs the attached program on probe packets, and compares what is attached with what should be.
async fn verify(
    filter: &mut Filter,
    policy: &Policy,
    compiled: &Compiled,
) -> Result<report::Verified> {
    let mut errors = link_errors(filter, policy, &host::interfaces().await?)?;
    let probes = probe::probes(compiled);
    for probe in &probes {
        let frame = probe::frame(probe.protocol, probe.source, probe.destination, probe.port);
        let judged = filter.judge(&probe.database, probe.source, probe.monitor)?;
        let passes = filter.probe(&frame, &judged)?;
        let allowed = judged.reason == Reason::Allowed;
        if allowed != probe.allowed || passes != (probe.allowed || probe.monitor) {
            errors.push(format!(
                "database {}: a packet from {} to port {} {} although the policy {} it",
                probe.database,
                probe.source,
                probe.port,
                if passes { "passes" } else { "is dropped" },
                if probe.allowed {
                    "allows"
                } else {
                    "does not allow"
                },
            ));
        }
    }
    for error in &errors {
        log(&format!("error: {error}"));
    }
    Ok(report::Verified {
        at: Timestamp::now(),
        probes: probes.len(),
        errors,
    })
}

/// Listed interfaces on which this agent's program does not run.
fn link_errors(filter: &Filter, policy: &Policy, host: &[Interface]) -> Result<Vec<String>> {
    let ours = filter.program_id()?;
    let pinned = filter.pinned()?;
    let error = |name: &String| {
        let Some(interface) = host.iter().find(|interface| interface.name == *name) else {
            return Some(format!("interface {name} is missing"));
        };
        let Some(xdp) = interface.xdp else {
            return Some(format!(
                "interface {name} is not filtered: no XDP program is attached"
            ));
        };
        let link = pinned
            .iter()
            .find(|pinned| pinned.interface == interface.index);
        let whole = xdp.program_id == ours && link.is_some_and(|link| link.program_id == ours);
        (!whole).then(|| {
            format!(
                "interface {name} runs XDP program {}, not this agent's ({ours})",
                xdp.program_id
            )
        })
    };
    Ok(policy.interfaces.iter().filter_map(error).collect())
}

/// What the journal says of an attachment: a fall-back to generic mode must not go unnoticed.
fn attachment(interface: &Interface, how: &Attached) -> String {
    let name = &interface.name;
    match how {
        Attached::Kept => format!("{name} is filtered as before"),
        Attached::Native => format!("attached to {name} in native mode"),
        Attached::Generic { refusal: None } => format!("attached to {name} in generic mode"),
        Attached::Generic {
            refusal: Some(refusal),
        } => {
            format!("attached to {name} in generic mode, since native mode was refused: {refusal}")
        }
    }
}

/// `tcp/5432`, for each port.
pub fn ports(database: &policy::Database) -> Vec<String> {
    let protocol = database.protocol.name();
    database
        .ports
        .iter()
        .map(|port| format!("{protocol}/{port}"))
        .collect()
}

pub fn model(database: &policy::Database) -> &'static str {
    match database.model {
        Model::Dedicated { .. } => "dedicated",
        Model::Shared { .. } => "shared",
    }
}

/// All there is to know of a policy on this host that is no error.
pub fn warnings(loaded: &Loaded, compiled: &Compiled, host: &[Interface]) -> Vec<String> {
    let mut warnings = loaded.warnings.clone();
    warnings.extend(compiled.warnings.iter().cloned());
    warnings.extend(uncovered(host, &loaded.policy.interfaces));
    warnings
}

/// Warnings of interfaces by which other hosts may reach a database past the filter. One without an
/// address of its own counts too: Linux takes packets for any local address on every interface.
fn uncovered(host: &[Interface], listed: &[String]) -> Vec<String> {
    host.iter()
        .filter(|interface| interface.up && !interface.loopback)
        // The ports of a bridge deliver through the bridge.
        .filter(|interface| !interface.has_master || !interface.addresses.is_empty())
        .filter(|interface| !listed.contains(&interface.name))
        .map(|interface| {
            let addresses = match interface.addresses.as_slice() {
                [] => String::new(),
                addresses => format!(" ({})", list(addresses.iter())),
            };
            let name = &interface.name;
            format!(
                "interface {name}{addresses} is not in `interfaces`: databases may be reachable \
                 through it"
            )
        })
        .collect()
}

fn list<T: ToString>(items: impl Iterator<Item = T>) -> String {
    items
        .map(|item| item.to_string())
        .collect::<Vec<_>>()
        .join(", ")
}

#[derive(Clone)]
struct Shared {
    /// `None` once the filter was detached.
    agent: Arc<Mutex<Option<Agent>>>,
    detached: Arc<Notify>,
}

impl Shared {
    async fn agent(&self) -> Result<MappedMutexGuard<'_, Agent>> {
        let guard = self.agent.lock().await;
        MutexGuard::try_map(guard, Option::as_mut).map_err(|_| anyhow!("the filter was detached"))
    }
}

/// An error as the control socket tells it.
struct Failed(anyhow::Error);

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        let error = format!("{:#}", self.0);
        (StatusCode::CONFLICT, Json(report::Failure { error })).into_response()
    }
}

impl From<anyhow::Error> for Failed {
    fn from(error: anyhow::Error) -> Self {
        Self(error)
    }
}

type Answer<T> = Result<Json<T>, Failed>;

fn router(shared: Shared) -> Router {
    Router::new()
        .route("/status", get(status))
        .route("/rules", get(rules))
        .route("/regions", get(regions))
        .route("/explain", get(explain))
        .route("/plan", get(plan))
        .route("/reload", post(reload))
        .route("/detach", post(detach))
        .with_state(shared)
}

#[derive(Deserialize)]
struct StatusQuery {
    #[serde(default)]
    verify: bool,
}

async fn status(
    State(shared): State<Shared>,
    Query(query): Query<StatusQuery>,
) -> Answer<report::Status> {
    Ok(Json(shared.agent().await?.status(query.verify).await?))
}

#[derive(Deserialize)]
struct RulesQuery {
    database: Option<String>,
}

async fn rules(
    State(shared): State<Shared>,
    Query(query): Query<RulesQuery>,
) -> Answer<Vec<report::Rule>> {
    Ok(Json(
        shared.agent().await?.rules(query.database.as_deref())?,
    ))
}

async fn regions(State(shared): State<Shared>) -> Answer<Vec<report::Region>> {
    Ok(Json(shared.agent().await?.regions()))
}

#[derive(Deserialize)]
struct ExplainQuery {
    source: IpAddr,
    database: Option<String>,
}

async fn explain(
    State(shared): State<Shared>,
    Query(query): Query<ExplainQuery>,
) -> Answer<Vec<report::Explanation>> {
    let mut agent = shared.agent().await?;
    Ok(Json(
        agent.explain(query.source, query.database.as_deref())?,
    ))
}

#[derive(Deserialize)]
struct PlanQuery {
    /// `None`: the policy file of the daemon.
    file: Option<PathBuf>,
}

async fn plan(
    State(shared): State<Shared>,
    Query(query): Query<PlanQuery>,
) -> Answer<report::Plan> {
    let agent = shared.agent().await?;
    let file = query.file.as_ref().unwrap_or(&agent.options.policy);
    let loaded = load(file, &agent.loaded.regions)?;
    let known = &agent.loaded.policy.interfaces;
    let compiled = loaded.compile();
    let (mut plan, _) = interfaces(&agent.filter, &loaded, &compiled, known).await?;
    plan.difference = agent.filter.plan(&compiled)?;
    Ok(Json(plan))
}

async fn reload(State(shared): State<Shared>) -> Answer<report::Reloaded> {
    Ok(Json(shared.agent().await?.reload().await?))
}

/// Answers with the names of the interfaces that are no longer filtered.
async fn detach(State(shared): State<Shared>) -> Answer<Vec<String>> {
    let agent = shared.agent.lock().await.take();
    let agent = agent.context("the filter was detached")?;
    let interfaces = agent.loaded.policy.interfaces.clone();
    agent.filter.remove()?;
    shared.detached.notify_one();
    Ok(Json(interfaces))
}
