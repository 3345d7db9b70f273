//! When things happen: start, signals, expiry, look-ups, changed files, netlink events, requests.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs, io,
    net::IpAddr,
    os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use filter_common::Reason;
use futures_util::{FutureExt as _, Stream, StreamExt as _, future::join_all};
use inotify::{Inotify, Watches};
use ipnet::IpNet;
use jiff::{SignedDuration, Timestamp, Unit};
use sd_notify::NotifyState;
use tokio::{
    net::{UnixListener, UnixStream},
    signal::unix::{SignalKind, signal},
    sync::{
        MappedMutexGuard, Mutex, MutexGuard, Notify,
        mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
        oneshot,
    },
    time::MissedTickBehavior,
};

use crate::{
    compile::{Compiled, RuleKey, compile, is_expired},
    confirmed::{self, Confirmed},
    control,
    drops::Drops,
    host::coverage::{self as interfaces, Coverage, Ended, Pinned, Remembered},
    host::{self, Interface},
    kept,
    kernel::{
        difference::Difference,
        filter::Filter,
        links::{Attached, TakenOver},
        pins, probe,
    },
    log::log,
    policy::{Guards, Model, Policy, Region, RegionSource, Rule},
    policy_file::PolicyFile,
    protection,
    region::lookup::{self, Answer, Version},
    region::state::{self as region, Change, Regions, Set},
    report,
};

/// How often the programs on the interfaces are looked at: for so long somebody who takes one off
/// opens the database.
const CHECK_EVERY: Duration = Duration::from_secs(1);

/// How many of these checks go by until one looks at everything.
const THOROUGH: u32 = 30;

/// How long to wait before taking out expired rules is tried again.
const RETRY: Duration = Duration::from_secs(10);

/// Where the daemon finds and keeps things.
#[derive(Clone, Debug)]
pub struct Options {
    pub policy: PathBuf,
    pub socket: PathBuf,
    pub bpffs: PathBuf,
    /// Where what outlasts a restart of the host is kept.
    pub state_dir: PathBuf,
    /// Prefixes of one address family that a policy may have; `None`: the default.
    pub max_prefixes: Option<u32>,
}

/// Asks what must be known of a policy's regions before it can be in force.
pub async fn look_up(
    policy: &Policy,
    ask: BTreeMap<&str, Option<Version>>,
    watches: Option<&Watches>,
) -> BTreeMap<String, Result<Answer>> {
    let answers = ask.into_iter().map(|(name, version)| async move {
        let Region { source, guards } = &policy.regions[name];
        let answer = lookup::ask(source, guards, version.as_ref(), watches).await;
        (name.to_owned(), answer)
    });
    join_all(answers).await.into_iter().collect()
}

/// The time by which regions are kept: it starts right and then only runs, whatever is done to the
/// host's clock.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    started: Instant,
    at: Timestamp,
}

impl Clock {
    pub fn start() -> Self {
        Self {
            started: Instant::now(),
            at: Timestamp::now(),
        }
    }

    pub fn now(&self) -> Timestamp {
        self.at + self.started.elapsed()
    }

    /// What the host's clock says now of an instant of this one.
    fn on_host(&self, instant: Timestamp) -> Timestamp {
        let set: SignedDuration = Timestamp::now().duration_since(self.now());
        instant.checked_add(set).unwrap_or(instant)
    }
}

/// How often a set that stays the same is written to disk, for the time it was confirmed.
const WRITE_AGAIN: Duration = Duration::from_mins(10);

/// Members that a line of the log names before it only counts.
const NAMED: usize = 5;

/// One look-up of a region, to be made without the agent.
pub struct Question {
    pub region: String,
    /// Answers to an earlier question do not count any more.
    number: u64,
    source: RegionSource,
    guards: Guards,
    version: Option<Version>,
    watches: Option<Watches>,
}

/// What came of a question.
pub struct Outcome {
    pub region: String,
    number: u64,
    answer: Result<Answer>,
}

impl Question {
    pub async fn ask(self) -> Outcome {
        let Self {
            region,
            number,
            source,
            guards,
            version,
            watches,
        } = self;
        let asked = tokio::spawn(async move {
            lookup::ask(&source, &guards, version.as_ref(), watches.as_ref()).await
        });
        // A library that panics over an answer is one more failed look-up.
        let answer = asked.await.context("look up").flatten();
        Outcome {
            region,
            number,
            answer,
        }
    }
}

/// What tasks in the background tell the main loop.
enum Event {
    Answered(Outcome),
    /// A set was written to disk, or was not.
    Written {
        region: String,
        outcome: Result<()>,
    },
    /// The same of the confirmed policy.
    Confirmed(Result<()>),
}

/// The running agent: a filter and the policy it enforces.
pub struct Agent {
    pub options: Options,
    filter: Filter,
    pub loaded: PolicyFile,
    pub regions: Regions,
    compiled: Compiled,
    clock: Clock,
    pub watches: Option<Watches>,
    /// The question under way about each region.
    asked: BTreeMap<String, u64>,
    questions: u64,
    /// When each region's set was last given to `writer`.
    written: BTreeMap<String, Timestamp>,
    /// Regions whose set could not be written, and why.
    unwritten: BTreeMap<String, String>,
    writer: UnboundedSender<Write>,
    /// What the entries of `interfaces` stood for last.
    remembered: Remembered,
    /// The confirmed policy that was given to `writer` last.
    confirmed: Option<Confirmed>,
    /// Why that could not be written.
    unconfirmed: Option<String>,
    /// Why the policy file is not the policy in force, after a start that could not enforce it.
    instead_of_file: Option<String>,
    /// Why the confirmed policy could not be read at the start, to compare the file with.
    unreadable: Option<String>,
    /// Why listed interfaces are not filtered, by index: each is logged once.
    unfiltered: BTreeMap<u32, String>,
    /// Why the pins that somebody removed could not be restored: logged once.
    unpinned: Option<String>,
    enforced: report::Enforced,
    verified: report::Verified,
    /// Indexes of the interfaces that are filtered.
    covered: BTreeSet<u32>,
    /// How often the filter was put back on an interface from which somebody took it.
    repairs: u64,
    /// Number of the round of probes that was sent last.
    probe_round: u64,
    drops: Drops,
    started: Timestamp,
}

/// Attaches, fills, and stays until it is told to stop; the filter stays longer.
pub async fn run(options: Options) -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "run needs root: it loads BPF programs and attaches them to interfaces"
    );
    let mut links = host::events()?;
    let (watches, mut files) = file_events();
    let mut hangup = signal(SignalKind::hangup()).context("listen for SIGHUP")?;
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let (events, mut happened) = unbounded_channel();
    let (writer, writing) = unbounded_channel();
    let writes = tokio::spawn(write(options.state_dir.clone(), writing, events.clone()));

    let clock = Clock::start();
    let start = Start::choose(&options).await?;
    let (bpffs, max_prefixes) = (options.bpffs.clone(), options.max_prefixes);
    let connections = start.first().policy.tls_connections;
    let open = move || Filter::open(&bpffs, max_prefixes, connections);
    let open = tokio::task::spawn_blocking(open);
    // Long lists are read while the kernel checks the program.
    let ((filter, listener), regions) = tokio::try_join!(
        async {
            let filter = open.await.context("open the filter").flatten()?;
            anyhow::Ok((filter, listen(&options.socket).await?))
        },
        first_regions(&options, &start.first().policy, watches.as_ref(), clock),
    )?;
    let own_socket = identity(&options.socket);
    // Only now is it certain that no other agent writes there.
    if let Err(error) = kept::remove_unfinished(&options.state_dir) {
        log(&format!("warning: {error:#}"));
    }
    let agent = Agent::start(
        options.clone(),
        clock,
        filter,
        start,
        regions,
        watches,
        writer,
    );
    let agent = agent.await?;
    let shared = Shared {
        agent: Arc::new(Mutex::new(Some(agent))),
        reloading: Arc::default(),
        detached: Arc::default(),
        changed: Arc::default(),
    };
    let stop = Arc::new(Notify::new());
    let stopped = stop.clone();
    let server = axum::serve(listener, control::router(shared.clone()))
        .with_graceful_shutdown(async move { stopped.notified().await });
    let server = tokio::spawn(server.into_future());

    let mut ready = false;
    let mut checks = tokio::time::interval(CHECK_EVERY);
    checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut checked = 0_u32;
    // Where there is no agent any more, it was detached, and the loop is about to end.
    loop {
        let (expiry, refresh) = match shared.agent().await {
            Ok(mut agent) => {
                for question in agent.questions_due() {
                    let events = events.clone();
                    tokio::spawn(async move {
                        let _ = events.send(Event::Answered(question.ask().await));
                    });
                }
                (agent.compiled.next_expiry, agent.until_refresh())
            }
            Err(_) => (None, Duration::MAX),
        };
        tokio::select! {
            _ = hangup.recv() => {
                // Its look-ups may take a while; what is wrong is logged.
                tokio::spawn(shared.clone().reload(false, false));
            }
            Some(()) = links.next() => {
                // One look at the interfaces answers all that was announced by now.
                while let Some(Some(())) = links.next().now_or_never() {}
                if let Ok(mut agent) = shared.agent().await {
                    agent.heal().await;
                }
            }
            Some(()) = files.next() => {
                while let Some(Some(())) = files.next().now_or_never() {}
                if let Ok(mut agent) = shared.agent().await {
                    agent.files_changed();
                }
            }
            Some(event) = happened.recv() => {
                if let Ok(mut agent) = shared.agent().await {
                    agent.happened(event).await;
                }
            }
            () = tokio::time::sleep(until(expiry)) => {
                if let Ok(mut agent) = shared.agent().await {
                    agent.expire().await;
                }
            }
            () = tokio::time::sleep(refresh) => {
                if let Ok(mut agent) = shared.agent().await {
                    agent.tick().await;
                }
            }
            _ = checks.tick() => {
                checked = (checked + 1) % THOROUGH;
                if let Ok(mut agent) = shared.agent().await {
                    agent.check(checked == 0 || !ready).await;
                    agent.collect_drops();
                    agent.grant_samples();
                    if !ready && agent.verified.errors.is_empty() {
                        ready = true;
                        tell_systemd(&[NotifyState::Ready]);
                        if let Ok((summary, _)) = agent.summary().await {
                            tell_systemd(&[NotifyState::Status(&summary)]);
                        }
                    }
                    tell_systemd(&[NotifyState::Watchdog]);
                }
            }
            () = shared.changed.notified() => {}
            () = shared.detached.notified() => break,
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    tell_systemd(&[NotifyState::Stopping]);
    // Requests under way get their answers, in bounded time.
    stop.notify_one();
    let _ = tokio::time::timeout(LAST_WORDS, server).await;
    match shared.agent.lock().await.take() {
        Some(agent) => {
            let names = list(agent.loaded.policy.interfaces.iter());
            log(&format!("stopping; the filter stays in force on {names}"));
        }
        None => log("detached; nothing is filtered any more"),
    }
    // The agent held the writer's other end.
    let _ = tokio::time::timeout(LAST_WORDS, writes).await;
    // A socket that somebody else removed is no reason to fail, nor one that is another agent's by now one to remove.
    let is_ours = identity(&options.socket).is_some_and(|socket| Some(socket) == own_socket);
    if is_ours && let Err(error) = fs::remove_file(&options.socket) {
        log(&format!(
            "warning: remove {}: {error}",
            options.socket.display()
        ));
    }
    Ok(())
}

/// The device and inode of a file; `None`: there is none, or it cannot be examined.
fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = fs::symlink_metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// How long a directory is left alone after a change: programs that replace files make several.
const SETTLE: Duration = Duration::from_millis(50);

/// How long what is under way at the end may take.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Policies that a start may enforce, and what the last agent left on disk.
struct Start {
    /// The best first. Each but the policy file itself with the reason why it is not the file.
    candidates: VecDeque<(PolicyFile, Option<String>)>,
    confirmed: Option<Confirmed>,
    /// The confirmed policy, parsed.
    before: Option<Policy>,
    /// Why what is kept cannot be read: the file cannot be compared with it.
    unreadable: Option<String>,
}

impl Start {
    /// The policy file, if it is valid and leaves guarded what the confirmed policy guards; else, and where
    /// this host refuses the file, the confirmed policy.
    ///
    /// # Errors
    /// Neither can be enforced. What is pinned stays as it is.
    async fn choose(options: &Options) -> Result<Self> {
        let file = PolicyFile::read(&options.policy);
        let path = confirmed::path(&options.state_dir);
        let kept = confirmed::read(&options.state_dir).and_then(|confirmed| {
            let text = confirmed.as_ref().map(|confirmed| confirmed.policy.clone());
            let before = text
                .map(|text| PolicyFile::parse(&path, text))
                .transpose()?;
            Ok((confirmed, before))
        });
        let mut unreadable = None;
        let (confirmed, before) = match kept {
            Ok(kept) => kept,
            // What it guards may be guarded no longer by the file.
            Err(error) if !pins::left_in_force(&options.bpffs)?.is_empty() => {
                return Err(error.context(format!(
                    "start refused; what is pinned stays in force, without an agent: if the policy file is \
                     right, remove {}",
                    path.display()
                )));
            }
            Err(error) => {
                unreadable = Some(format!(
                    "{error:#}; if the policy file is right, `filter-agent reload`"
                ));
                (None, None)
            }
        };
        let mut start = Self {
            candidates: VecDeque::new(),
            before: before.as_ref().map(|before| before.policy.clone()),
            confirmed,
            unreadable,
        };
        let name = options.policy.display();
        let refusal = match (file, &start.confirmed, &before) {
            (Ok(file), Some(confirmed), Some(_)) if file.text == confirmed.policy => {
                start.candidates.push_back((file, None));
                return Ok(start);
            }
            (Ok(file), Some(confirmed), Some(before)) => {
                let host = host::interfaces().await?;
                let known = &confirmed.interfaces;
                let ended = protection::ended(&before.policy, &file.policy, known, &host);
                if ended.is_empty() {
                    start.candidates.push_back((file, None));
                    None
                } else {
                    Some(format!(
                        "{name} is not enforced: {}",
                        describe_ended(&ended)
                    ))
                }
            }
            (Ok(file), ..) => {
                start.candidates.push_back((file, None));
                return Ok(start);
            }
            (Err(error), ..) if before.is_none() => {
                return Err(match pins::left_in_force(&options.bpffs) {
                    Ok(interfaces) if !interfaces.is_empty() => error
                        .context("start refused; what is pinned stays in force, without an agent"),
                    _ => error,
                });
            }
            (Err(error), ..) => {
                let error = format!("{error:#}").replace('\n', "; ");
                Some(format!(
                    "{name} is not enforced: {error}; correct it, then `filter-agent reload`"
                ))
            }
        };
        start
            .candidates
            .extend(before.map(|before| (before, refusal)));
        Ok(start)
    }

    fn first(&self) -> &PolicyFile {
        &self.candidates[0].0
    }
}

fn describe_ended(ended: &[String]) -> String {
    format!(
        "it would end the protection of {}; if that is meant: `filter-agent reload \
         --allow-unprotect`, or list them under `unprotected:` in the policy",
        ended.join(", ")
    )
}

fn regions_directory(state_dir: &Path) -> PathBuf {
    state_dir.join("regions")
}

/// A write to the state directory.
enum Write {
    Region(Box<Keep>),
    /// `None`: nothing is to be kept any more.
    Confirmed {
        confirmed: Option<Confirmed>,
        /// Gets the result.
        written: Option<oneshot::Sender<Result<()>>>,
    },
}

/// A region's set, on its way to disk.
struct Keep {
    region: String,
    source: RegionSource,
    set: Set,
}

/// Writes to disk, one after the other; neither a slow disk nor a long list delays anything else.
async fn write(
    state_dir: PathBuf,
    mut writes: UnboundedReceiver<Write>,
    events: UnboundedSender<Event>,
) {
    while let Some(write) = writes.recv().await {
        let state_dir = state_dir.clone();
        match write {
            Write::Region(keep) => {
                let region = keep.region.clone();
                let written = tokio::task::spawn_blocking(move || {
                    let directory = regions_directory(&state_dir);
                    kept::write(&directory, &keep.region, &keep.source, &keep.set)
                });
                let outcome = written.await.context("write to disk").flatten();
                let _ = events.send(Event::Written { region, outcome });
            }
            Write::Confirmed { confirmed, written } => {
                let outcome = tokio::task::spawn_blocking(move || match confirmed {
                    Some(confirmed) => confirmed::write(&state_dir, &confirmed),
                    None => confirmed::remove(&state_dir),
                });
                let outcome = outcome.await.context("write to disk").flatten();
                let outcome = match written {
                    // The receiver reports it.
                    Some(written) => match written.send(outcome) {
                        Ok(()) => continue,
                        Err(outcome) => outcome,
                    },
                    None => outcome,
                };
                let _ = events.send(Event::Confirmed(outcome));
            }
        }
    }
}

/// A stream that yields when a watched directory changes, and what to have watched with it. Where the
/// kernel grants none, files are read again now and then.
fn file_events() -> (Option<Watches>, impl Stream<Item = ()> + Unpin) {
    let stream = Inotify::init().and_then(|inotify| inotify.into_event_stream([0; 4096]));
    match stream {
        Ok(stream) => (Some(stream.watches()), stream.map(|_| ()).left_stream()),
        Err(error) => {
            log(&format!(
                "warning: files are not watched, only read again: {error}"
            ));
            (None, futures_util::stream::pending().right_stream())
        }
    }
}

/// Nothing happens where no service manager wants to know.
fn tell_systemd(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        log(&format!("warning: notify systemd: {error}"));
    }
}

/// How long to sleep for a rule to expire. The clock may be set meanwhile, which a sleep does not
/// see: hence never long.
fn until(expiry: Option<Timestamp>) -> Duration {
    const LONGEST: Duration = Duration::from_secs(10);
    let Some(expiry) = expiry else { return LONGEST };
    let left = expiry.duration_since(Timestamp::now());
    Duration::try_from(left).unwrap_or_default().min(LONGEST)
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
    // Left by an agent that was killed. Anything else is somebody's.
    match fs::symlink_metadata(socket) {
        Ok(metadata) => {
            ensure!(
                metadata.file_type().is_socket(),
                "{} is not a socket: name another path, or move it away",
                socket.display()
            );
            fs::remove_file(socket).with_context(|| format!("remove {}", socket.display()))?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => {
            return Err(error).with_context(|| format!("examine {}", socket.display()));
        }
    }
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
    async fn start(
        options: Options,
        clock: Clock,
        mut filter: Filter,
        start: Start,
        mut regions: Regions,
        watches: Option<Watches>,
        writer: UnboundedSender<Write>,
    ) -> Result<Self> {
        let Start {
            mut candidates,
            confirmed,
            before,
            unreadable,
        } = start;
        let mut remembered = confirmed.clone().unwrap_or_default().interfaces;
        let mut refused = None;
        let (loaded, instead_of_file, committed) = loop {
            let Some((loaded, reason)) = candidates.pop_front() else {
                return Err(refused.unwrap_or_else(|| anyhow!("there is no policy to enforce")));
            };
            if let Some(refused) = &refused {
                let again = first_regions(&options, &loaded.policy, watches.as_ref(), clock).await;
                regions = again.with_context(|| format!("{refused:#}"))?;
            }
            let before = before.as_ref();
            let occasion = Occasion::Start(before);
            match enforce(&mut filter, &loaded, &regions, occasion, &mut remembered).await {
                Ok(committed) => {
                    let reason = reason.or(refused.map(|error: anyhow::Error| {
                        let file = options.policy.display();
                        format!("{file} is not enforced: {error:#}")
                    }));
                    break (loaded, reason, committed);
                }
                // Another policy would not mend that, and this one is enforced as far as it went.
                Err(error) if error.is::<TakeOverFailed>() => return Err(error),
                Err(error) => refused = refused.or(Some(error)),
            }
        };
        if let Some(reason) = &instead_of_file {
            log(&format!(
                "error: {reason}; the confirmed policy is enforced instead"
            ));
        }
        for error in &committed.errors {
            log(&format!("error: {error}"));
        }
        let started = Timestamp::now();
        let drops = Drops::since(started, filter.counts()?);
        let mut agent = Self {
            options,
            filter,
            loaded,
            regions,
            compiled: committed.compiled,
            clock,
            watches,
            asked: BTreeMap::new(),
            questions: 0,
            written: BTreeMap::new(),
            unwritten: BTreeMap::new(),
            writer,
            remembered,
            confirmed,
            unconfirmed: None,
            instead_of_file,
            unreadable,
            unfiltered: BTreeMap::new(),
            unpinned: None,
            enforced: committed.enforced,
            verified: report::Verified {
                at: Timestamp::now(),
                probes: 0,
                errors: Vec::new(),
            },
            covered: BTreeSet::new(),
            repairs: 0,
            probe_round: 0,
            drops,
            started,
        };
        if let Some(unreadable) = &agent.unreadable {
            log(&format!("error: {unreadable}"));
        }
        agent.confirm(None);
        agent.forget_unused();
        // Grant the first samples, so that drops are reported from now on.
        agent.grant_samples();
        for error in agent.look().await {
            log(&format!("error: {error}"));
        }
        Ok(agent)
    }

    /// Has the policy in force written to disk, with what its entries of `interfaces` stand for, if that is
    /// not what was written last. `written` gets the result. What cannot be read is left for the operator to see
    /// until a reload.
    fn confirm(&mut self, written: Option<oneshot::Sender<Result<()>>>) {
        let confirmed = Confirmed {
            policy: self.loaded.text.clone(),
            interfaces: self.remembered.clone(),
        };
        if self.unreadable.is_some() {
            return;
        }
        if self.confirmed.as_ref() != Some(&confirmed) || self.unconfirmed.is_some() {
            self.confirmed = Some(confirmed.clone());
            // The writer lives as long as the agent.
            let _ = self.writer.send(Write::Confirmed {
                confirmed: Some(confirmed),
                written,
            });
        } else if let Some(written) = written {
            let _ = written.send(Ok(()));
        }
    }

    /// Notes how the confirmed policy was written.
    fn confirm_written(&mut self, outcome: Result<()>) {
        let error = outcome
            .err()
            .map(|error| format!("the policy in force is not kept for the next start: {error:#}"));
        if let Some(error) = &error
            && self.unconfirmed.as_ref() != Some(error)
        {
            log(&format!("warning: {error}"));
        }
        self.unconfirmed = error;
    }

    /// What is enforced, in one line, and what is wrong where nothing is.
    async fn summary(&self) -> Result<(String, Option<String>)> {
        let prefixes: usize = self.compiled.databases.values().map(|e| e.prefixes()).sum();
        let host = host::interfaces().await?;
        let coverage = Coverage::of(&self.loaded.policy, &self.remembered, &host);
        let (pinned, ours) = (self.filter.pinned()?, self.filter.program_id()?);
        let mut on = coverage.filtered(&pinned, ours).join(", ");
        if on.is_empty() {
            on = "no interface".into();
        }
        if !coverage.missing.is_empty() {
            let missing = coverage.missing.iter().map(interfaces::describe_missing);
            on = format!("{on} ({})", list(missing));
        }
        let summary = format!(
            "enforcing {}: {} and {} on {on}, in {:.1} ms",
            self.loaded.path.display(),
            counted(self.compiled.databases.len(), "database", "databases"),
            counted(prefixes, "prefix", "prefixes"),
            self.enforced.enforced_ms,
        );
        Ok((summary, coverage.inert(&pinned, ours)))
    }

    /// Looks at what was just enforced, and says it to the journal and the service manager. Returns what is wrong;
    /// it refuses nothing, since it is done.
    async fn look(&mut self) -> Vec<String> {
        let mut errors = Vec::new();
        self.verify().await;
        match self.summary().await {
            Ok((summary, inert)) => {
                log(&summary);
                tell_systemd(&[NotifyState::Status(&summary)]);
                errors.extend(inert);
            }
            Err(error) => errors.push(format!("{error:#}")),
        }
        errors
    }

    /// Enforces a policy, with what was answered about its regions, or leaves all as it is.
    async fn enforce(
        &mut self,
        loaded: PolicyFile,
        answers: BTreeMap<String, Result<Answer>>,
        allow_unprotect: bool,
    ) -> Result<report::Reloaded> {
        let asked: Vec<String> = answers.keys().cloned().collect();
        let regions = region::next(&loaded.policy, &self.regions, answers, self.clock.now())?;
        let occasion = Occasion::Reload {
            before: &self.loaded.policy,
            allow_unprotect,
        };
        let remembered = &mut self.remembered;
        let committed = enforce(&mut self.filter, &loaded, &regions, occasion, remembered).await?;
        self.drops.restart(&committed.restarted);
        self.loaded = loaded;
        self.instead_of_file = None;
        self.unreadable = None;
        let before = std::mem::replace(&mut self.regions, regions);
        self.compiled = committed.compiled;
        self.enforced = committed.enforced;
        for name in asked {
            // What was asked about it before is overtaken.
            self.asked.remove(&name);
            let same = before.get(&name).zip(self.regions.get(&name));
            let same = same.is_some_and(|(before, now)| before.holds_the_same(now));
            let is_kept = same && !self.unwritten.contains_key(&name);
            self.keep(&name, !is_kept);
        }
        let used = |name: &str| self.regions.contains_key(name);
        self.asked.retain(|name, _| used(name));
        self.written.retain(|name, _| used(name));
        self.unwritten.retain(|name, _| used(name));
        self.forget_unused();
        let mut errors = committed.errors;
        errors.extend(self.look().await);
        for error in &errors {
            log(&format!("error: {error}"));
        }
        Ok(report::Reloaded {
            plan: committed.plan,
            enforced: self.enforced.clone(),
            verified: self.verified.clone(),
            errors,
        })
    }

    /// Of regions that no rule names any more nothing is kept: it would be out of date when one does.
    fn forget_unused(&self) {
        let directory = regions_directory(&self.options.state_dir);
        if let Err(error) = kept::keep_only(&directory, |name| self.regions.contains_key(name)) {
            log(&format!("warning: {error:#}"));
        }
    }

    /// Notes that a region is being asked about.
    pub fn question(&mut self, name: &str) -> Result<Question> {
        let Some(state) = self.regions.get_mut(name) else {
            let known = list(self.regions.keys());
            bail!("no rule names region {name}; there are rules with {known}");
        };
        ensure!(
            !state.region.is_constant(),
            "the prefixes of region {name} stand in the policy: there is nothing to look up"
        );
        // The answer says when to ask again.
        state.next = None;
        self.questions += 1;
        self.asked.insert(name.into(), self.questions);
        Ok(Question {
            region: name.into(),
            number: self.questions,
            source: state.region.source.clone(),
            guards: state.region.guards.clone(),
            version: state.version().cloned(),
            watches: self.watches.clone(),
        })
    }

    /// About the regions whose time has come.
    fn questions_due(&mut self) -> Vec<Question> {
        let now = self.clock.now();
        let due = |(name, state): (&String, &region::State)| {
            let due = state.next.is_some_and(|next| next <= now);
            due.then(|| name.clone())
        };
        let names: Vec<String> = self.regions.iter().filter_map(due).collect();
        names
            .iter()
            .filter_map(|name| self.question(name).ok())
            .collect()
    }

    /// How long until a region has to be asked about, or changes by itself.
    fn until_refresh(&self) -> Duration {
        let states = self.regions.values();
        let next = states.flat_map(|state| [state.next, state.next_tick()]);
        let Some(next) = next.flatten().min() else {
            return Duration::MAX;
        };
        Duration::try_from(next.duration_since(self.clock.now())).unwrap_or_default()
    }

    fn files_changed(&mut self) {
        let soon = self.clock.now() + SETTLE;
        for state in self.regions.values_mut() {
            if let RegionSource::File(_) = state.region.source {
                // Not later than planned: changes may follow each other without end.
                state.next = Some(state.next.map_or(soon, |next| next.min(soon)));
            }
        }
    }

    async fn happened(&mut self, event: Event) {
        match event {
            Event::Answered(outcome) => {
                self.answered(outcome, false).await;
            }
            Event::Confirmed(outcome) => self.confirm_written(outcome),
            Event::Written { region, outcome } => match outcome {
                Ok(()) => {
                    if self.unwritten.remove(&region).is_some() {
                        log(&format!("region {region}: its set is kept on disk again"));
                    }
                }
                Err(error) => {
                    let error = format!("{error:#}");
                    if self.unwritten.get(&region) != Some(&error) {
                        log(&format!("warning: region {region}: {error}"));
                    }
                    self.unwritten.insert(region, error);
                }
            },
        }
    }

    /// Takes what came of a question, and enforces it. Returns what changed; `None`: nobody asks any
    /// more.
    pub async fn answered(&mut self, outcome: Outcome, accept: bool) -> Option<Change> {
        let Outcome {
            region,
            number,
            answer,
        } = outcome;
        if self.asked.get(&region) != Some(&number) {
            return None;
        }
        self.asked.remove(&region);
        let now = self.clock.now();
        let state = self.regions.get_mut(&region)?;
        let before = state.clone();
        let change = state.take(answer, accept, now);
        // A file may have changed again since it was read.
        state.next = [state.next, before.next].into_iter().flatten().min();
        Some(self.settle(&region, before, change).await)
    }

    /// What time changes of the regions.
    async fn tick(&mut self) {
        let now = self.clock.now();
        let names: Vec<String> = self.regions.keys().cloned().collect();
        for name in names {
            if let Some(state) = self.regions.get_mut(&name)
                && state.next_tick().is_some_and(|next| next <= now)
            {
                let before = state.clone();
                let change = state.tick(now);
                self.settle(&name, before, change).await;
            }
        }
    }

    /// Enforces what changed of a region, logs it and keeps it; if the kernel refuses it, the region
    /// stays what it was before.
    async fn settle(&mut self, name: &str, before: region::State, change: Change) -> Change {
        let was_failing = before.failing.then(|| before.error.clone()).flatten();
        let mut done = change;
        if !done.is_empty() {
            match self.apply() {
                Ok(()) => {
                    log(&describe(name, &done));
                    self.verify().await;
                }
                Err(error) => {
                    done = Change::default();
                    if let Some(state) = self.regions.get_mut(name) {
                        *state = before;
                        state.fail(format!("{error:#}"), self.clock.now());
                    }
                }
            }
        }
        if let Some(state) = self.regions.get(name) {
            match (&was_failing, &state.error) {
                (_, Some(error)) if state.failing => {
                    // Once, however often it is tried again.
                    if was_failing.is_none_or(|was| was.text != error.text) {
                        let consequence = self.consequence(state);
                        log(&format!(
                            "warning: region {name}: {}; {consequence}",
                            error.text
                        ));
                    }
                }
                (Some(_), _) => log(&format!("region {name}: answers again")),
                (None, _) => {}
            }
        }
        self.keep(name, !done.is_empty());
        done
    }

    /// What a region that fails means for who gets in.
    fn consequence(&self, state: &region::State) -> String {
        match &state.set {
            Some(set) => format!(
                "the last good set stays in force ({}, confirmed {})",
                counted(set.prefixes.len(), "prefix", "prefixes"),
                self.clock
                    .on_host(set.confirmed)
                    .round(Unit::Second)
                    .unwrap_or(set.confirmed)
            ),
            None => "it has no addresses and allows nobody".into(),
        }
    }

    /// Has a region's set written to disk, if it changed or its time there is old.
    fn keep(&mut self, name: &str, changed: bool) {
        let now = self.clock.now();
        let old = self
            .written
            .get(name)
            .is_none_or(|&written| written + WRITE_AGAIN <= now);
        let Some(state) = self.regions.get(name) else {
            return;
        };
        let (true, Some(set)) = (changed || old, &state.set) else {
            return;
        };
        let source = &state.region.source;
        if let RegionSource::Prefixes(_) = source {
            return;
        }
        let mut set = set.clone();
        set.confirmed = self.clock.on_host(set.confirmed);
        for (_, until) in &mut set.retiring {
            *until = self.clock.on_host(*until);
        }
        let keep = Keep {
            region: name.into(),
            source: source.clone(),
            set,
        };
        // The writer lives as long as the agent.
        let _ = self.writer.send(Write::Region(Box::new(keep)));
        self.written.insert(name.into(), now);
    }

    /// Compares what the kernel does with what the policy says. An error is logged once; that it cannot be
    /// compared is one.
    async fn verify(&mut self) {
        let verified = self
            .compare()
            .await
            .unwrap_or_else(|error| report::Verified {
                at: Timestamp::now(),
                probes: 0,
                errors: vec![format!("verify what is enforced: {error:#}")],
            });
        for error in &verified.errors {
            if !self.verified.errors.contains(error) {
                log(&format!("error: {error}"));
            }
        }
        self.verified = verified;
    }

    async fn compare(&mut self) -> Result<report::Verified> {
        let host = host::interfaces().await?;
        let coverage = Coverage::of(&self.loaded.policy, &self.remembered, &host);
        self.probe_round = self.probe_round.wrapping_add(1);
        let round = self.probe_round;
        let verified = verify(&mut self.filter, &coverage, &self.compiled, round)?;
        let pinned = self.filter.pinned()?.into_iter().map(|link| link.interface);
        self.covered = pinned.filter(|&index| coverage.is_present(index)).collect();
        Ok(verified)
    }

    /// Whether an interface that was filtered runs another program now, or none.
    async fn lost_an_interface(&self) -> bool {
        let (Ok(programs), Ok(ours)) = (host::programs().await, self.filter.program_id()) else {
            return true;
        };
        let runs_ours = |index| {
            programs
                .get(index)
                .is_some_and(|xdp| xdp.program_id == ours)
        };
        !self.covered.iter().all(runs_ours)
    }

    /// Looks after the filter, which anybody with the right to can take off an interface without the
    /// kernel telling of it.
    async fn check(&mut self, thorough: bool) {
        if thorough || self.lost_an_interface().await {
            self.heal().await;
        }
        if thorough {
            self.verify().await;
        }
    }

    /// Lets the kernel take more samples of dropped packets.
    fn grant_samples(&mut self) {
        if let Err(error) = self.filter.grant_samples() {
            log(&format!("error: {error:#}"));
        }
    }

    /// Reads the samples of dropped packets.
    fn collect_drops(&mut self) {
        match self.filter.dropped() {
            Ok(dropped) => self.drops.add(dropped, Timestamp::now()),
            Err(error) => log(&format!("error: {error:#}")),
        }
    }

    /// Attaches again wherever a listed interface came back or lost its link.
    async fn heal(&mut self) {
        let host = match host::interfaces().await {
            Ok(host) => host,
            Err(error) => return log(&format!("{error:#}")),
        };
        let unpinned = match self.filter.restore_pins() {
            Ok(false) => None,
            Ok(true) => {
                log("error: pins of the filter were removed; they are restored");
                None
            }
            Err(error) => Some(format!("{error:#}")),
        };
        if let Some(error) = &unpinned
            && self.unpinned.as_ref() != Some(error)
        {
            log(&format!("error: restore the filter's pins: {error}"));
        }
        self.unpinned = unpinned;
        if self.unpinned.is_none()
            && let Err(error) = self.filter.adopt_moved(&host)
        {
            log(&format!("error: {error:#}"));
        }
        let mut attached = false;
        // An index that is free may be another interface's next.
        let is_here = |index: &u32| host.iter().any(|interface| interface.index == *index);
        self.covered.retain(is_here);
        self.unfiltered.retain(|index, _| is_here(index));
        let coverage = Coverage::of(&self.loaded.policy, &self.remembered, &host);
        for interface in &coverage.present {
            let mode = self.loaded.policy.mode;
            let healed = match self.filter.check_interface(interface, mode) {
                Ok(()) => self.filter.attach(interface, mode),
                Err(error) => Err(error),
            };
            match healed {
                Ok(how) => {
                    self.unfiltered.remove(&interface.index);
                    if how != Attached::Kept {
                        log(&attachment(interface, &how));
                        attached = true;
                        self.repairs += u64::from(self.covered.contains(&interface.index));
                    }
                }
                Err(error) => {
                    let error = format!("{} is not filtered: {error:#}", interface.name);
                    if self.unfiltered.get(&interface.index) != Some(&error) {
                        log(&format!("error: {error}"));
                    }
                    self.unfiltered.insert(interface.index, error);
                }
            }
        }
        let is_filtered = |index| !self.unfiltered.contains_key(&index);
        self.remembered
            .update(&self.loaded.policy, &host, is_filtered);
        self.confirm(None);
        if attached {
            self.verify().await;
            if let Ok((summary, _)) = self.summary().await {
                tell_systemd(&[NotifyState::Status(&summary)]);
            }
        }
    }

    /// Has the kernel enforce the policy with its regions as they are now.
    fn apply(&mut self) -> Result<()> {
        let compiled = compile(
            &self.loaded.policy,
            &region::prefixes(&self.regions),
            Timestamp::now(),
        );
        let applied = self.filter.apply(&compiled)?;
        self.drops.restart(&applied.restarted);
        self.enforced.next_expiry = compiled.next_expiry;
        self.compiled = compiled;
        Ok(())
    }

    /// Takes out what has expired.
    async fn expire(&mut self) {
        let Some(expiry) = self.compiled.next_expiry else {
            return;
        };
        if expiry > Timestamp::now() {
            return;
        }
        match self.apply() {
            Ok(()) => {
                log(&format!(
                    "rules that expired at {expiry} no longer allow anybody"
                ));
                self.verify().await;
            }
            Err(error) => {
                log(&format!("error: take out expired rules: {error:#}"));
                // Tried again, but not at once and for ever.
                self.compiled.next_expiry = Some(Timestamp::now() + RETRY);
            }
        }
    }

    /// Read back from the kernel, every time: netlink, the links and the counters.
    pub async fn status(&mut self, reverify: bool) -> Result<report::Status> {
        if reverify {
            self.verify().await;
        }
        let host = host::interfaces().await?;
        let (pinned, ours) = (self.filter.pinned()?, self.filter.program_id()?);
        let coverage = Coverage::of(&self.loaded.policy, &self.remembered, &host);
        let mut warnings = self.loaded.warnings(&self.compiled);
        warnings.extend(coverage.warnings(&host));
        warnings.extend(unlisted(&self.loaded.policy, &coverage, &pinned, &host));
        warnings.extend(self.region_warnings());
        warnings.extend(self.unconfirmed.clone());
        let mut not_enforced = coverage.not_enforced(&pinned, ours);
        for error in &self.verified.errors {
            if !not_enforced.contains(error) {
                not_enforced.push(error.clone());
            }
        }
        let reasons = self.instead_of_file.iter().chain(&self.unreadable);
        let mut errors: Vec<String> = reasons.cloned().collect();
        errors.extend(self.region_errors());
        errors.extend(coverage.missing.iter().map(interfaces::describe_missing));
        errors.extend(not_enforced.iter().cloned());
        let present = coverage.present.iter().map(|interface| {
            let xdp = interface.xdp.filter(|xdp| xdp.program_id == ours);
            report::Interface {
                name: interface.name.clone(),
                mode: xdp.map(|xdp| if xdp.native { "native" } else { "generic" }.into()),
                program_id: xdp.map(|xdp| xdp.program_id),
            }
        });
        let missing = coverage.missing.iter().map(|entry| report::Interface {
            name: entry.to_string(),
            mode: None,
            program_id: None,
        });
        let interfaces = present.chain(missing);
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
        let fates = self.filter.fates()?;
        let connections = |database: &str, monitored: bool| -> BTreeMap<String, u64> {
            let of_database = fates
                .iter()
                .filter(|((name, _, counted), _)| name == database && *counted == monitored);
            of_database
                .map(|((_, fate, _), connections)| (fate.name().into(), *connections))
                .collect()
        };
        let databases = self.loaded.policy.databases.iter().map(|database| {
            let entries = &self.compiled.databases[&database.name];
            let name = Some(database.name.clone());
            let allowed = counts.get(&name).into_iter().flatten();
            report::Database {
                name: database.name.clone(),
                ports: database.guarded_ports(),
                addresses: database.addresses.clone(),
                model: database.model.name().into(),
                monitor: database.monitor,
                rules: entries.rules.len(),
                prefixes: entries.prefixes(),
                passed: allowed
                    .filter(|(reason, _, _)| *reason == Reason::Allowed)
                    .map(|(_, _, packets)| packets)
                    .sum(),
                dropped: dropped(&name, false),
                would_drop: dropped(&name, true),
                force_tls: database.tls.is_some(),
                connections: connections(&database.name, false),
                monitored_connections: connections(&database.name, true),
            }
        });
        Ok(report::Status {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            started: self.started,
            policy: self.enforced.clone(),
            interfaces: interfaces.collect(),
            repairs: self.repairs,
            databases: databases.collect(),
            unattributed: dropped(&None, false),
            unattributed_would_drop: dropped(&None, true),
            regions: self.regions(),
            verified: self.verified.clone(),
            warnings,
            not_enforced,
            errors,
        })
    }

    /// Rules that have expired are listed too: they are in the file.
    pub fn rules(&self, database: Option<&str>) -> Result<Vec<report::Rule>> {
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

    /// Who was turned away, up to now.
    pub fn drops(&mut self, database: Option<&str>) -> Result<report::Drops> {
        self.known(database)?;
        self.collect_drops();
        Ok(self.drops.report(&self.filter.counts()?, database))
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

    pub fn regions(&self) -> Vec<report::Region> {
        let region = |(name, region): (&String, &Region)| {
            let state = self.regions.get(name);
            let set = state.and_then(|state| state.set.as_ref());
            let on_host = |at: Timestamp| self.clock.on_host(at);
            let retiring = set.map(|set| set.retiring.as_slice()).unwrap_or_default();
            report::Region {
                name: name.clone(),
                source: region.source.to_string(),
                used: state.is_some(),
                prefixes: set.map(|set| set.prefixes.to_vec()).unwrap_or_default(),
                retiring: retiring
                    .iter()
                    .map(|&(prefix, until)| report::Retiring {
                        prefix,
                        until: on_host(until),
                    })
                    .collect(),
                confirmed: set.map(|set| on_host(set.confirmed)),
                next: state.and_then(|state| state.next).map(on_host),
                failing: state.is_some_and(|state| state.failing),
                error: state
                    .and_then(|state| state.error.as_ref())
                    .map(|error| report::Error {
                        at: on_host(error.at),
                        text: error.text.clone(),
                    }),
                change: state.and_then(|state| state.change.as_ref()).map(|change| {
                    report::Change {
                        at: change.at.map(on_host),
                        added: change.added.clone(),
                        left: change.left.clone(),
                        removed: change.removed.clone(),
                    }
                }),
            }
        };
        self.loaded.policy.regions.iter().map(region).collect()
    }

    /// Regions in use that allow nobody.
    fn region_errors(&self) -> Vec<String> {
        let without = self.regions.iter().filter(|(_, state)| state.set.is_none());
        let error = without.map(|(name, state)| {
            let why = match &state.error {
                Some(error) => &error.text,
                None => "not looked up yet",
            };
            format!("region {name} has no addresses and allows nobody: {why}")
        });
        error.collect()
    }

    /// Regions whose last look-up failed, and those that a restart would not find on disk.
    fn region_warnings(&self) -> Vec<String> {
        let failing = self.regions.iter().filter_map(|(name, state)| {
            let (true, Some(_), Some(error)) = (state.failing, &state.set, &state.error) else {
                return None;
            };
            let consequence = self.consequence(state);
            Some(format!("region {name}: {}; {consequence}", error.text))
        });
        let unwritten = self.unwritten.iter();
        let unwritten = unwritten.map(|(name, error)| format!("region {name}: {error}"));
        failing.chain(unwritten).collect()
    }

    /// The verdict comes from the attached program, the rule from the kernel's map; that the two agree
    /// is checked.
    pub fn explain(
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
                force_tls: entries.tls.is_some() && !judged.exempt,
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

/// The regions at a start: as they were kept, and files as they are now. The network may not be there
/// yet: what needs it comes later.
async fn first_regions(
    options: &Options,
    policy: &Policy,
    watches: Option<&Watches>,
    clock: Clock,
) -> Result<Regions> {
    let now = clock.now();
    let mut regions = region::next(policy, &Regions::new(), BTreeMap::new(), now)?;
    let directory = regions_directory(&options.state_dir);
    for (name, state) in &mut regions {
        let Region { source, guards } = state.region.clone();
        if let RegionSource::Prefixes(_) = source {
            continue;
        }
        let restored = kept::read(&directory, name, &source).and_then(|set| {
            let Some(set) = set else { return Ok(()) };
            let restored = state.restore(set, now);
            restored.context("the set that was kept on disk is ignored")
        });
        if let Err(error) = restored {
            log(&format!("warning: region {name}: {error:#}"));
        }
        if let RegionSource::File(_) = source {
            let answer = lookup::ask(&source, &guards, state.version(), watches).await;
            state.take(answer, false, now);
            if let (true, Some(error)) = (state.failing, &state.error) {
                log(&format!("warning: region {name}: {}", error.text));
            }
        }
    }
    Ok(regions)
}

fn describe_takeover(taken: &TakenOver) -> String {
    let TakenOver {
        layout,
        links,
        counters,
    } = taken;
    let interfaces = counted(*links, "interface", "interfaces");
    let counters = if *counters { "go on" } else { "begin at 0" };
    format!(
        "took over from an agent of layout {layout}: {interfaces} switched, counters {counters}"
    )
}

/// What changed of a region, in one line.
fn describe(name: &str, change: &Change) -> String {
    let part = |what: &str, prefixes: &[IpNet]| {
        let named = list(prefixes.iter().take(NAMED));
        match prefixes.len() {
            0 => None,
            count @ ..=NAMED => Some(format!("{count} {what} ({named})")),
            count => Some(format!("{count} {what} ({named} and more)")),
        }
    };
    let parts = [
        part("added", &change.added),
        part("left, still allowed for a time", &change.left),
        part("removed", &change.removed),
    ];
    format!("region {name}: {}", list(parts.into_iter().flatten()))
}

/// On what occasion a policy is enforced.
enum Occasion<'a> {
    /// With the confirmed policy; `None`: there is none.
    Start(Option<&'a Policy>),
    Reload {
        /// The policy in force.
        before: &'a Policy,
        /// Whether the new policy may leave unguarded what this one guards.
        allow_unprotect: bool,
    },
}

impl Occasion<'_> {
    fn before(&self) -> Option<&Policy> {
        match self {
            Self::Start(before) => *before,
            Self::Reload { before, .. } => Some(before),
        }
    }
}

/// What was enforced.
struct Committed {
    plan: report::Plan,
    /// As in `Applied`.
    restarted: BTreeSet<String>,
    compiled: Compiled,
    enforced: report::Enforced,
    /// What went wrong after it was, which is no refusal.
    errors: Vec<String>,
}

/// A start that could not switch every link of an older agent: each interface is filtered by the program and maps
/// that it has.
#[derive(Debug)]
struct TakeOverFailed;

impl std::fmt::Display for TakeOverFailed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("take over what an agent of another layout enforces")
    }
}

/// Makes the kernel enforce `loaded`.
///
/// # Errors
/// What was refused. The kernel enforces what it did before; but not where the error is a `TakeOverFailed`.
async fn enforce(
    filter: &mut Filter,
    loaded: &PolicyFile,
    regions: &Regions,
    occasion: Occasion<'_>,
    remembered: &mut Remembered,
) -> Result<Committed> {
    let compiled = compile(&loaded.policy, &region::prefixes(regions), Timestamp::now());
    let compiled_ms = milliseconds(loaded.since);
    let host = host::interfaces().await?;
    filter.adopt_moved(&host)?;
    let (mut plan, coverage) = interfaces(filter, loaded, &compiled, &occasion, remembered, &host)?;
    if let Occasion::Reload {
        before,
        allow_unprotect: false,
    } = occasion
    {
        let ended = protection::ended(before, &loaded.policy, remembered, &host);
        ensure!(ended.is_empty(), describe_ended(&ended));
    }
    let mode = loaded.policy.mode;
    let mut wanted = Vec::new();
    for interface in &coverage.present {
        match filter.check_interface(interface, mode) {
            Ok(()) => wanted.push(interface),
            Err(error) if coverage.is_remembered(interface.index) => {
                let name = &interface.name;
                plan.warnings
                    .push(format!("{name} is not filtered: {error:#}"));
            }
            Err(error) => return Err(error),
        }
    }
    let pinned_before: BTreeSet<u32> = indexes(&filter.pinned()?);
    // The maps first: no program runs on maps that do not hold the policy yet.
    let applied = filter.apply(&compiled)?;
    let mut attached = Vec::new();
    let mut outcome = Ok(());
    for interface in wanted {
        match filter.attach(interface, mode) {
            Ok(Attached::Kept) => {}
            Ok(how) => attached.push((interface, how)),
            Err(error) if coverage.is_remembered(interface.index) => {
                let name = &interface.name;
                plan.warnings
                    .push(format!("{name} is not filtered: {error:#}"));
            }
            Err(error) => {
                outcome = Err(error);
                break;
            }
        }
    }
    if let Err(mut error) = outcome {
        // The maps first: what is filtered must not go on with a policy that was refused.
        if let Err(more) = filter.undo(applied) {
            error = error.context(format!("{more:#}"));
        }
        // A link that was put back where one was lost stays.
        let new = attached.iter().map(|(interface, _)| interface.index);
        for index in new.filter(|index| !pinned_before.contains(index)) {
            if let Err(more) = filter.detach(index) {
                error = error.context(format!("{more:#}"));
            }
        }
        return Err(error);
    }
    plan.difference = applied.difference;
    let restarted = applied.restarted;
    // What another layout left, only a start can find.
    if let Occasion::Start(_) = occasion {
        for taken in filter.take_over().context(TakeOverFailed)? {
            log(&describe_takeover(&taken));
        }
    }
    for (interface, how) in &attached {
        log(&attachment(interface, how));
    }
    // The new policy is enforced by now: what goes wrong from here on refuses nothing.
    let mut errors = Vec::new();
    let name_of = |index| host.iter().find(|interface| interface.index == index);
    let name_of = |index| name_of(index).map(|interface| interface.name.clone());
    let names = attached.iter().map(|(interface, _)| interface.name.clone());
    plan.attached = names.collect();
    plan.detached.clear();
    match filter.pinned() {
        Ok(pinned) => {
            let before = occasion.before();
            for index in to_detach(
                &loaded.policy,
                &coverage,
                before,
                remembered,
                &pinned,
                &host,
            ) {
                match filter.detach(index) {
                    Ok(()) => plan.detached.extend(name_of(index)),
                    Err(error) => errors.push(format!("{error:#}")),
                }
            }
        }
        Err(error) => errors.push(format!("{error:#}")),
    }
    remembered.update(&loaded.policy, &host, |_| true);
    let enforced = report::Enforced {
        file: loaded.path.clone(),
        accepted: loaded.accepted,
        compiled_ms,
        enforced_ms: milliseconds(loaded.since),
        next_expiry: compiled.next_expiry,
    };
    for warning in &plan.warnings {
        log(&format!("warning: {warning}"));
    }
    Ok(Committed {
        plan,
        restarted,
        compiled,
        enforced,
        errors,
    })
}

fn indexes(pinned: &[Pinned]) -> BTreeSet<u32> {
    pinned.iter().map(|pinned| pinned.interface).collect()
}

/// Indexes of the interfaces that are to be filtered no longer: what the policy before listed and the new one
/// does not. `host` is a whole dump. None while an entry of the new policy has no interface: that one may be
/// there under another name.
fn to_detach(
    policy: &Policy,
    coverage: &Coverage,
    before: Option<&Policy>,
    remembered: &Remembered,
    pinned: &[Pinned],
    host: &[Interface],
) -> BTreeSet<u32> {
    match before {
        Some(before) if coverage.missing.is_empty() => {
            let ended = Ended::between(before, policy, remembered, host).indexes;
            &ended & &indexes(pinned)
        }
        _ => BTreeSet::new(),
    }
}

/// Warnings of interfaces that are filtered although the policy does not list them.
fn unlisted(
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
        let missing = coverage.missing.iter().map(interfaces::describe_missing);
        format!("since {}", list(missing))
    };
    let warnings = unlisted.map(|interface| {
        let name = &interface.name;
        format!("interface {name} stays filtered although it is not listed, {why}")
    });
    warnings.collect()
}

/// What `loaded` changes of the interfaces that are filtered. One that is missing is filtered when it
/// appears: at boot it may come later, and one that vanished must not keep the others from their
/// rules. Only where a reload names one that never was there is that a mistake.
fn interfaces(
    filter: &Filter,
    loaded: &PolicyFile,
    compiled: &Compiled,
    occasion: &Occasion<'_>,
    remembered: &Remembered,
    host: &[Interface],
) -> Result<(report::Plan, Coverage)> {
    let coverage = Coverage::of(&loaded.policy, remembered, host);
    let mut warnings = loaded.warnings(compiled);
    warnings.extend(coverage.warnings(host));
    for entry in &coverage.missing {
        let what = interfaces::describe_missing(entry);
        if let Occasion::Reload { before, .. } = occasion
            && !before.interfaces.contains(entry)
        {
            let names = list(host.iter().map(|interface| &interface.name));
            bail!("{what} on this host, which has {names}");
        }
        warnings.push(format!("{what}; it is filtered as soon as it is there"));
    }
    let pinned = filter.pinned()?;
    let filtered = indexes(&pinned);
    let attached = coverage.present.iter();
    let attached = attached.filter(|interface| !filtered.contains(&interface.index));
    let attached = attached.map(|interface| interface.name.clone()).collect();
    let ended = to_detach(
        &loaded.policy,
        &coverage,
        occasion.before(),
        remembered,
        &pinned,
        host,
    );
    let detached = host
        .iter()
        .filter(|interface| ended.contains(&interface.index));
    let detached = detached.map(|interface| interface.name.clone()).collect();
    let stay = host
        .iter()
        .filter(|interface| !ended.contains(&interface.index))
        .cloned();
    let stay: Vec<Interface> = stay.collect();
    warnings.extend(unlisted(&loaded.policy, &coverage, &pinned, &stay));
    let plan = report::Plan {
        file: loaded.path.clone(),
        difference: Difference::default(),
        attached,
        detached,
        warnings,
    };
    Ok((plan, coverage))
}

/// Runs the attached program on probe packets, and compares what is attached with what should be.
fn verify(
    filter: &mut Filter,
    coverage: &Coverage,
    compiled: &Compiled,
    round: u64,
) -> Result<report::Verified> {
    let mut errors = coverage.errors(&filter.pinned()?, filter.program_id()?);
    let probes = probe::probes(compiled, round);
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
    Ok(report::Verified {
        at: Timestamp::now(),
        probes: probes.len(),
        errors,
    })
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

fn list<T: ToString>(items: impl Iterator<Item = T>) -> String {
    items
        .map(|item| item.to_string())
        .collect::<Vec<_>>()
        .join(", ")
}

/// The agent as the main loop and the control socket share it.
#[derive(Clone)]
pub struct Shared {
    /// `None` once the filter was detached.
    agent: Arc<Mutex<Option<Agent>>>,
    /// Held for the length of a reload, which looks things up without the agent.
    reloading: Arc<Mutex<()>>,
    detached: Arc<Notify>,
    /// Something may be due sooner than the main loop knows.
    changed: Arc<Notify>,
}

impl Shared {
    pub async fn agent(&self) -> Result<MappedMutexGuard<'_, Agent>> {
        let guard = self.agent.lock().await;
        MutexGuard::try_map(guard, Option::as_mut).map_err(|_| anyhow!("the filter was detached"))
    }

    /// Enforces the policy file as it is now, or leaves all as it is. `existing`: connections from
    /// before TLS was forced are judged, too. `allow_unprotect`: what was guarded may be left open.
    pub async fn reload(self, existing: bool, allow_unprotect: bool) -> Result<report::Reloaded> {
        let _one = self.reloading.lock().await;
        let reloaded = self.try_reload(existing, allow_unprotect).await;
        let reloaded = reloaded.context("reload refused, nothing is changed");
        self.changed.notify_one();
        match reloaded {
            Ok((mut reloaded, written)) => {
                // A restart right after a reload starts with what the reload enforced. A disk that hangs is not
                // waited for.
                if let Ok(Ok(outcome)) = tokio::time::timeout(LAST_WORDS, written).await
                    && let Ok(mut agent) = self.agent().await
                {
                    agent.confirm_written(outcome);
                    reloaded.plan.warnings.extend(agent.unconfirmed.clone());
                }
                Ok(reloaded)
            }
            Err(error) => {
                log(&format!("{error:#}"));
                Err(error)
            }
        }
    }

    async fn try_reload(
        &self,
        existing: bool,
        allow_unprotect: bool,
    ) -> Result<(report::Reloaded, oneshot::Receiver<Result<()>>)> {
        let file = self.agent().await?.options.policy.clone();
        let (loaded, answers) = self.prepare(&file).await?;
        let mut agent = self.agent().await?;
        let mut reloaded = agent.enforce(loaded, answers, allow_unprotect).await?;
        let (written, done) = oneshot::channel();
        agent.confirm(Some(written));
        if existing && let Err(error) = agent.filter.judge_existing() {
            let error = format!("judge the connections from before: {error:#}");
            log(&format!("error: {error}"));
            reloaded.errors.push(error);
        }
        Ok((reloaded, done))
    }

    /// A policy file and what must be asked about its regions, without the agent meanwhile.
    async fn prepare(&self, file: &Path) -> Result<(PolicyFile, BTreeMap<String, Result<Answer>>)> {
        let loaded = PolicyFile::read(file)?;
        let (ask, watches) = {
            let agent = self.agent().await?;
            (
                region::to_ask(&loaded.policy, &agent.regions),
                agent.watches.clone(),
            )
        };
        let answers = look_up(&loaded.policy, ask, watches.as_ref()).await;
        Ok((loaded, answers))
    }

    /// What a policy file would change. `None`: the one that is enforced, as it is now.
    pub async fn plan(&self, file: Option<PathBuf>) -> Result<report::Plan> {
        let file = match file {
            Some(file) => file,
            None => self.agent().await?.options.policy.clone(),
        };
        let (loaded, answers) = self.prepare(&file).await?;
        let agent = self.agent().await?;
        let now = agent.clock.now();
        let regions = region::next(&loaded.policy, &agent.regions, answers, now)?;
        let compiled = compile(
            &loaded.policy,
            &region::prefixes(&regions),
            Timestamp::now(),
        );
        let host = host::interfaces().await?;
        let (before, known) = (&agent.loaded.policy, &agent.remembered);
        let occasion = Occasion::Reload {
            before,
            allow_unprotect: true,
        };
        let (mut plan, _) = interfaces(&agent.filter, &loaded, &compiled, &occasion, known, &host)?;
        let ended = protection::ended(before, &loaded.policy, known, &host);
        if !ended.is_empty() {
            let refused = format!("a reload is refused: {}", describe_ended(&ended));
            plan.warnings.push(refused);
        }
        plan.difference = agent.filter.plan(&compiled)?;
        Ok(plan)
    }

    /// Looks up a region, or all, now.
    pub async fn refresh(
        self,
        region: Option<String>,
        accept: bool,
    ) -> Result<Vec<report::Refreshed>> {
        let questions: Result<Vec<Question>> = {
            let mut agent = self.agent().await?;
            let names = match region {
                Some(name) => vec![name],
                // The prefixes of constant regions stand in the policy: there is nothing to look up, and the guards of
                // look-ups would refuse what the operator wrote.
                None => {
                    let states = agent.regions.iter();
                    let changing = states.filter(|(_, state)| !state.region.is_constant());
                    changing.map(|(name, _)| name.clone()).collect()
                }
            };
            names.iter().map(|name| agent.question(name)).collect()
        };
        let outcomes = join_all(questions?.into_iter().map(Question::ask)).await;
        let mut agent = self.agent().await?;
        let mut refreshed = Vec::new();
        for outcome in outcomes {
            let name = outcome.region.clone();
            let change = agent.answered(outcome, accept).await.unwrap_or_default();
            let state = agent.regions.get(&name);
            let error = state
                .filter(|state| state.failing)
                .and_then(|state| state.error.as_ref());
            refreshed.push(report::Refreshed {
                error: error.map(|error| error.text.clone()),
                prefixes: state
                    .and_then(|state| state.set.as_ref())
                    .map_or(0, |s| s.prefixes.len()),
                region: name,
                added: change.added,
                left: change.left,
                removed: change.removed,
            });
        }
        self.changed.notify_one();
        Ok(refreshed)
    }

    /// Stops filtering, and forgets the confirmed policy. Returns the names of the interfaces that are no longer
    /// filtered.
    pub async fn detach(&self) -> Result<Vec<String>> {
        let host = host::interfaces().await?;
        let mut shared = self.agent.lock().await;
        let agent = shared.as_ref().context("the filter was detached")?;
        let indexes = agent.filter.remove()?;
        let (written, done) = oneshot::channel();
        let _ = agent.writer.send(Write::Confirmed {
            confirmed: None,
            written: Some(written),
        });
        *shared = None;
        drop(shared);
        self.detached.notify_one();
        let filtered = host
            .into_iter()
            .filter(|interface| indexes.contains(&interface.index));
        let names = filtered.map(|interface| interface.name).collect();
        let forgotten = tokio::time::timeout(LAST_WORDS, done).await;
        let forgotten = forgotten.context("remove the confirmed policy: the disk takes too long");
        forgotten
            .and_then(|done| done.context("remove the confirmed policy"))
            .flatten()
            .context(
                "detached: nothing is filtered any more; but the next start may enforce it again",
            )?;
        Ok(names)
    }
}
