//! The daemon: where events come from, and how effects are carried out.

use std::{
    fs, io, mem,
    os::unix::{
        fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _},
        net::UnixListener as StdUnixListener,
    },
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use futures_util::{FutureExt as _, StreamExt as _};
use tokio::{
    net::{UnixListener, UnixStream},
    signal::unix::{SignalKind, signal},
    sync::{
        mpsc::{UnboundedSender, unbounded_channel},
        watch,
    },
    time::MissedTickBehavior,
};

pub use crate::start::Options;
use crate::{
    agent::Agent,
    clock::Clock,
    control,
    enforcer::{Enforcer, Handle},
    etcd,
    event::{Effect, Event},
    fleet::{self, host_status::HostStatus},
    host,
    log::Entry,
    look_ups::LookUp,
    memory,
    metrics::{self, scrape::Scraper, timings::Timings},
    notify::Notifier,
    policy_file::{PolicyFile, hash, read_text},
    reconcile::Refused,
    region::{files::Watcher, lookup},
    start::{compile_order, enforce, open},
    store::{Store, Write},
    threads,
};

/// How often we check that our program is still attached. After a forced detach the database is open for at most
/// this long.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// One of so many checks looks at everything, and runs the probes.
const THOROUGH_CHECK: u32 = 30;

/// Time allowed for open requests and disk writes at shutdown.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(1);

/// Time allowed at shutdown for the change under way: a million prefixes take a few seconds.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(10);

/// Time allowed for the policy file to be read.
const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// Runs the agent until a signal or a detach ends it. The filter stays in force after a signal. `status_socket`: as the
/// service manager passed it.
///
/// # Errors
/// The policy cannot be enforced, or the agent cannot go on. The filter stays as it is.
pub async fn run(options: Options, status_socket: Option<StdUnixListener>) -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "run needs root: it loads BPF programs and attaches them to interfaces"
    );
    refuse_second_agent(&options.socket).await?;
    let mut links = host::events()?;
    let (watcher, mut files) = Watcher::new();
    let mut hangup = signal(SignalKind::hangup()).context("listen for SIGHUP")?;
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let (events, mut happened) = unbounded_channel();
    let clock = Clock::start();
    let timings = Timings::new()?;
    let opened = open(&options, clock, &watcher).await?;
    let enforcer = opened.enforcer.clone();
    let listener = listen(&options.socket).await?;
    let mut own_socket = identity(&options.socket);
    let mut socket_error = None;
    let store = Store::open(&options.state_dir, |error| {
        Entry::warning(format!("{error:#}")).log();
    })?;
    let saved = events.clone();
    store.start(move |write, result| {
        let _ = saved.send(Event::Saved { write, result });
    })?;
    let started = enforce(opened, &options, clock, &watcher).await?;
    let (mut agent, effects) = Agent::start(started, clock.now());
    let (publish, snapshot) = watch::channel(agent.snapshot());
    let (failed, failure) = watch::channel(None);
    let scraper = Scraper::new(
        snapshot.clone(),
        enforcer.clone(),
        clock,
        timings.clone(),
        failure,
    );
    let scraper = Arc::new(scraper);
    tokio::spawn(metrics::listener::serve(
        snapshot.clone(),
        scraper.clone(),
        failed,
    ));
    let shared = control::Shared {
        events: events.clone(),
        snapshot,
        enforcer: enforcer.clone(),
        clock,
        scraper,
    };
    let status_socket = status_socket.map(listen_as_passed);
    // What is in force does not depend on who may look at it.
    let status_socket = status_socket.transpose().unwrap_or_else(|error| {
        Entry::error(format!("{error:#}")).log();
        None
    });
    let status_server =
        status_socket.map(|listener| control::Server::start_for_group(listener, shared.clone()));
    let mut server = control::Server::start(listener, shared);

    let mut ticks = tokio::time::interval(CHECK_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut checks = 0_u32;
    let mut performer = Performer {
        events: events.clone(),
        enforcer: enforcer.clone(),
        store,
        watcher,
        following: None,
        reports: watch::channel(None).0,
        is_stopping: false,
        failure: None,
        notifier: Notifier::start()?,
        timings: timings.clone(),
    };
    performer.perform(effects);
    performer.give_memory_back();
    let mut has_changed = false;
    let mut deadline = None;
    while !performer.is_stopping {
        let mut thorough = false;
        let event = tokio::select! {
            () = passed(deadline) => break,
            _ = terminate.recv() => Event::Terminate,
            _ = interrupt.recv() => Event::Terminate,
            _ = hangup.recv() => Event::Hangup,
            Some(event) = happened.recv() => event,
            Some(()) = links.next() => {
                // One check covers everything announced so far.
                while let Some(Some(())) = links.next().now_or_never() {}
                thorough = true;
                Event::Tick
            }
            Some(path) = files.next() => Event::FileChanged(path),
            () = tokio::time::sleep(agent.until_tick(clock.now())) => Event::Tick,
            scheduled = ticks.tick() => {
                timings.loop_delay(scheduled.elapsed());
                ensure!(
                    !enforcer.has_ended(),
                    "the thread that owns the filter has ended; the filter stays in force"
                );
                checks = (checks + 1) % THOROUGH_CHECK;
                performer.check(checks == 0 || !agent.is_ready(), &agent);
                // Not with the change: another one, right after it, would wait for that.
                if mem::take(&mut has_changed) {
                    performer.give_memory_back();
                }
                if !enforcer.is_stuck() {
                    performer.notifier.alive();
                }
                match restore_socket(&options.socket, own_socket).await {
                    None => {}
                    Some(Ok(listener)) => {
                        server.listen_on(listener);
                        own_socket = identity(&options.socket);
                        socket_error = None;
                        Entry::warning("the control socket was removed; it is there again").log();
                    }
                    Some(Err(error)) => {
                        let error = format!("no command reaches the agent: {error:#}");
                        if socket_error.as_ref() != Some(&error) {
                            Entry::error(error.clone()).log();
                        }
                        socket_error = Some(error);
                    }
                }
                Event::Tick
            }
        };
        if thorough {
            performer.check(true, &agent);
        }
        if let Event::Terminate = event {
            deadline = deadline.or(Some(Instant::now() + CHANGE_TIMEOUT));
        }
        let is_quiet = matches!(event, Event::Tick);
        has_changed |= matches!(event, Event::Committed(_));
        let effects = agent.handle(event, clock.now());
        if !is_quiet || !effects.is_empty() {
            publish.send_replace(agent.snapshot());
        }
        performer.perform(effects);
    }
    performer.notifier.stopping();
    // The next start would replace its programs all the same.
    let traced = enforcer.call(|enforcer| enforcer.end_trace(None, "the agent ends"));
    let _ = tokio::time::timeout(SHUTDOWN_TIMEOUT, traced).await;
    // Requests under way get their answers, in bounded time.
    server.stop(SHUTDOWN_TIMEOUT).await;
    if let Some(server) = status_server {
        server.stop(SHUTDOWN_TIMEOUT).await;
    }
    let final_hits = enforcer.call(Enforcer::final_hits);
    if let Ok(Ok(Some(kept))) = tokio::time::timeout(SHUTDOWN_TIMEOUT, final_hits).await {
        performer.store.save(Write::LastHits(kept));
    }
    Entry::info(agent.describe_stop()).log();
    if !performer.store.finish(SHUTDOWN_TIMEOUT) {
        Entry::warning("not everything is written to disk, which takes too long").log();
    }
    // The socket may be gone, or be another agent's by now: neither is a reason to fail or to remove it.
    let is_ours = identity(&options.socket).is_some_and(|socket| Some(socket) == own_socket);
    if is_ours && let Err(error) = fs::remove_file(&options.socket) {
        Entry::warning(format!("remove {}: {error}", options.socket.display())).log();
    }
    match performer.failure {
        None => Ok(()),
        Some(error) => bail!(error),
    }
}

/// Carries effects out, none of them on the main loop's thread if it can take long.
struct Performer {
    events: UnboundedSender<Event>,
    enforcer: Handle,
    store: Store,
    watcher: Watcher,
    following: Option<(fleet::Settings, etcd::Following)>,
    reports: watch::Sender<Option<Arc<HostStatus>>>,
    is_stopping: bool,
    failure: Option<String>,
    notifier: Notifier,
    timings: Timings,
}

impl Performer {
    fn check(&self, thorough: bool, agent: &Agent) {
        let events = self.events.clone();
        let enforced = agent.enforced().clone();
        self.enforcer.check(thorough, move |enforcer, thorough| {
            let _ = events.send(Event::Checked(enforcer.check(thorough, &enforced)));
        });
    }

    /// On the enforcer's thread, because it takes milliseconds where there is much.
    fn give_memory_back(&self) {
        self.enforcer.send(|_| memory::give_back());
    }

    fn perform(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            self.perform_one(effect);
        }
    }

    /// Goes on with a connection that is to the same place.
    fn follow(&mut self, settings: Option<fleet::Settings>) {
        let current = self.following.as_ref().map(|(current, _)| current);
        if current == settings.as_ref() {
            return;
        }
        // The old one ends first: nothing of it comes after the new one's.
        self.following = None;
        self.following = settings.map(|settings| {
            let events = self.events.clone();
            let tell = move |news| {
                let _ = events.send(Event::Fleet(news));
            };
            let reports = self.reports.subscribe();
            (settings.clone(), etcd::follow(settings, reports, tell))
        });
    }

    fn perform_one(&mut self, effect: Effect) {
        let events = self.events.clone();
        let enforcer = self.enforcer.clone();
        match effect {
            Effect::Log(entry) => entry.log(),
            Effect::Save(write) => self.store.save(write),
            Effect::Status(summary) => self.notifier.status(summary),
            Effect::Ready => self.notifier.ready(),
            Effect::Watch(files) => self.watcher.keep_only(|path| files.contains(path)),
            Effect::Stop => self.is_stopping = true,
            Effect::Fail(error) => {
                self.is_stopping = true;
                self.failure = Some(error);
            }
            Effect::Detach => enforcer.send(move |enforcer| {
                let _ = events.send(Event::Detached(enforcer.detach()));
            }),
            Effect::ReadPolicy {
                proposal,
                path,
                text,
            } => {
                tokio::spawn(async move {
                    let (what, named) = (format!("read {}", path.display()), path.clone());
                    let read = move || match text {
                        Some(text) => PolicyFile::parse(&path, text),
                        None => PolicyFile::read_regular(&path),
                    };
                    let pool = &threads::POLICIES;
                    let file = threads::run_within(pool, READ_TIMEOUT, &what, &named, read).await;
                    let _ = events.send(Event::PolicyRead { proposal, file });
                });
            }
            Effect::HashPolicy(path) => {
                tokio::spawn(async move {
                    let (what, named) = (format!("read {}", path.display()), path.clone());
                    let read = move || read_text(&path).map(|text| hash(&text));
                    let pool = &threads::POLICIES;
                    let hash = threads::run_within(pool, READ_TIMEOUT, &what, &named, read).await;
                    let _ = events.send(Event::PolicyHashed(hash));
                });
            }
            Effect::KeepTried { mut decided, reply } => enforcer.send(move |enforcer| {
                let (cut, checked) = enforcer.keep_tried();
                match cut {
                    Ok(cut) => decided.cut = cut,
                    Err(error) => decided.cut_unknown.push(format!("{error:#}")),
                }
                let _ = events.send(Event::Checked(checked));
                reply.send(Ok(*decided));
            }),
            Effect::Follow(settings) => self.follow(settings),
            Effect::Report(status) => {
                self.reports.send_replace(Some(status));
            }
            Effect::Count => enforcer.send(move |enforcer| {
                let _ = events.send(Event::Counted(enforcer.packets()));
            }),
            Effect::LookUp(look_up) => {
                let timings = self.timings.clone();
                tokio::spawn(ask(look_up, self.watcher.clone(), events, timings));
            }
            Effect::Commit {
                order,
                occasion,
                existing,
            } => {
                let timings = self.timings.clone();
                tokio::spawn(async move {
                    match compile_order(order).await {
                        Ok(desired) => enforcer.send(move |enforcer| {
                            let result = enforcer.commit(desired, &occasion).map(|mut done| {
                                if existing && let Err(error) = enforcer.judge_existing() {
                                    let error =
                                        format!("judge the connections from before: {error:#}");
                                    done.0.errors.push(error);
                                }
                                done
                            });
                            if let Ok((committed, _)) = &result {
                                timings.in_force(&occasion, &committed.enforced.timing);
                            }
                            let _ = events.send(Event::Committed(result.into()));
                        }),
                        Err(error) => {
                            let _ = events.send(Event::Committed(Err(Refused::from(error)).into()));
                        }
                    }
                });
            }
            Effect::Plan {
                order,
                caller,
                reply,
            } => {
                tokio::spawn(async move {
                    match compile_order(order).await {
                        Ok(desired) => enforcer.send(move |enforcer| {
                            reply.send(enforcer.plan(desired, caller));
                        }),
                        Err(error) => reply.send(Err(error)),
                    }
                });
            }
        }
    }
}

async fn ask(look_up: LookUp, watcher: Watcher, events: UnboundedSender<Event>, timings: Timings) {
    let LookUp {
        number,
        region,
        version,
        ..
    } = look_up;
    let (began, source) = (Instant::now(), region.source.clone());
    let asked = tokio::spawn(async move {
        lookup::ask(
            &region.source,
            &region.guards,
            version.as_ref(),
            Some(&watcher),
        )
        .await
    });
    // A library that panics over an answer is one more failed look-up.
    let answer = asked.await.context("look up").flatten();
    timings.looked_up(&source, began.elapsed());
    let _ = events.send(Event::LookedUp { number, answer });
}

/// Waits for an instant; without one, for ever.
async fn passed(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant.into()).await,
        None => std::future::pending().await,
    }
}

/// The device and inode of a file; `None`: there is none, or it cannot be examined.
fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = fs::symlink_metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// # Errors
/// An agent that has the socket, or that it cannot be found out whether one has: an agent that hangs refuses
/// connections once its queue of them is full.
async fn refuse_second_agent(socket: &Path) -> Result<()> {
    let name = socket.display();
    match UnixStream::connect(socket).await {
        Ok(_) => bail!("another filter-agent answers on {name}"),
        Err(error) => match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Ok(()),
            io::ErrorKind::WouldBlock => bail!(
                "another filter-agent hangs on {name}: its queue of connections is full; end it first"
            ),
            _ => Err(error).with_context(|| format!("examine whether an agent answers on {name}")),
        },
    }
}

/// Makes the control socket again where it was removed, or no command would reach the agent any more. `None`: it is
/// there. Another file in its place is left alone.
async fn restore_socket(socket: &Path, own: Option<(u64, u64)>) -> Option<Result<UnixListener>> {
    let name = socket.display();
    match fs::symlink_metadata(socket) {
        Ok(found) if Some((found.dev(), found.ino())) == own => None,
        Ok(_) => Some(Err(anyhow!(
            "another file has the place of {name}: remove it"
        ))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Some(listen(socket).await),
        Err(error) => Some(Err(anyhow!(error).context(format!("examine {name}")))),
    }
}

/// The status socket, as the service manager passed it. It stays the manager's: the agent neither makes nor removes it.
fn listen_as_passed(listener: StdUnixListener) -> Result<UnixListener> {
    let passed = || {
        listener.set_nonblocking(true)?;
        UnixListener::from_std(listener)
    };
    passed().context("no status socket: listen on what the service manager passed")
}

/// The control socket, for root only.
async fn listen(socket: &Path) -> Result<UnixListener> {
    refuse_second_agent(socket).await?;
    if let Some(directory) = socket.parent() {
        let mut builder = fs::DirBuilder::new();
        let made = builder.recursive(true).mode(0o750).create(directory);
        made.with_context(|| format!("create {}", directory.display()))?;
    }
    // An agent that was killed leaves its socket. Any other kind of file is not ours.
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
