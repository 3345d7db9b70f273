//! A start: which policy it enforces, and with which regions.

mod choice;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use futures_util::future::join_all;
use jiff::Timestamp;

use crate::{
    clock::{Clock, Now, boot_id},
    compile::{Compiled, compile},
    enforcer::{Checked, Enforcer, Handle},
    event::Order,
    fleet::{self as of_fleet, state as fleet},
    history::History,
    host::{self, coverage::Remembered},
    kernel::pins,
    last_hits::LastHits,
    log::Entry,
    policy::{Policy, Region, RegionSource},
    policy_file::PolicyFile,
    reconcile::{Committed, Desired, InForce, Kernel, Occasion},
    region::{
        files::Watcher,
        lookup,
        state::{self as region, Regions, Set, State},
    },
    store::{self, Confirmed, history as kept_history},
    temporary::{Ends, InKernel, Kept, Temporary, Timed},
    threads,
    window::{self, Abandoned, Window},
};

use choice::{Candidate, Choice};

/// Time allowed for a file to be read at a start.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// Paths and sizes that the daemon is started with.
#[derive(Clone, Debug)]
pub struct Options {
    pub policy: PathBuf,
    pub socket: PathBuf,
    pub bpffs: PathBuf,
    /// Keeps what outlasts a restart of the host.
    pub state_dir: PathBuf,
    /// Prefixes of one address family that a policy may have; `None`: the default.
    pub max_prefixes: Option<u32>,
}

/// The result of a start.
#[derive(Debug)]
pub struct Started {
    pub path: PathBuf,
    pub file: Arc<PolicyFile>,
    pub regions: Regions,
    /// Regions whose set is not what is on disk.
    pub unsaved: BTreeSet<String>,
    pub fleet: fleet::State,
    /// The fleet's documents as they are on disk. `None`: something else is there.
    pub kept_fleet: Option<fleet::Kept>,
    pub this_host: of_fleet::ThisHost,
    pub timed: Timed,
    pub committed: Committed,
    pub checked: Checked,
    /// As it is on disk.
    pub confirmed: Option<Confirmed>,
    /// The same of temporary rules and ends.
    pub kept: Kept,
    /// The window that is open.
    pub window: Option<Window>,
    /// The window and the abandoned texts as they are on disk. `None`: they are of another machine, or cannot be read.
    pub kept_window: Option<window::Kept>,
    /// Whether they cannot be read: what is there stays until a reload.
    pub is_window_unknown: bool,
    pub abandoned: Abandoned,
    /// Why the policy file is not the policy in force.
    pub instead_of_file: Option<String>,
    /// Whether that is since its text was fallen or rolled back from.
    pub is_abandoned: bool,
    /// Why the confirmed policy could not be read, to compare the file with.
    pub unreadable: Option<String>,
    /// Why what was kept of temporary rules could not be read.
    pub unkept: Option<String>,
    /// The history as it is on disk, and what could not be read of it.
    pub history: History,
    pub change_id: Option<u64>,
    pub unread_history: Vec<String>,
}

/// A filter that is loaded over what is pinned, and what is to be enforced.
pub struct Opened {
    pub enforcer: Handle,
    choice: Choice,
    fleet: KeptFleet,
    regions: Regions,
    unsaved: BTreeSet<String>,
}

/// Chooses the policy and loads the filter. Nothing is enforced yet.
///
/// # Errors
/// No policy, or no filter. What is pinned stays as it is.
pub async fn open(options: &Options, clock: Clock, watcher: &Watcher) -> Result<Opened> {
    let mut choice = Choice::make(options, clock.now()).await?;
    let fleet = KeptFleet::read(options, &choice).await?;
    choice.fill(|file| fleet.fill(file, clock.now()));
    let first = choice.candidates.front();
    let first = first.context("find a policy to enforce")?.file.clone();
    let (bpffs, max_prefixes) = (options.bpffs.clone(), options.max_prefixes);
    let in_force = InForce {
        file: first.clone(),
        compiled: Arc::new(Compiled::default()),
        timed: Arc::new(Timed::of(&first.policy, clock.now())),
        remembered: choice
            .confirmed
            .as_ref()
            .map_or_else(Remembered::default, |kept| kept.interfaces.clone()),
    };
    let displaced = choice.displaced(&first);
    // Long lists are read while the kernel checks the program.
    let (enforcer, regions) = tokio::join!(
        Handle::start(move || Enforcer::open(&bpffs, max_prefixes, in_force)),
        first_regions(options, &first.policy, displaced, watcher, clock.now()),
    );
    let enforcer = enforcer?;
    let (regions, unsaved) = regions?;
    Ok(Opened {
        enforcer,
        choice,
        fleet,
        regions,
        unsaved,
    })
}

/// Enforces the best policy that this host takes.
///
/// # Errors
/// No candidate can be enforced. What is pinned stays as it is.
pub async fn enforce(
    opened: Opened,
    options: &Options,
    clock: Clock,
    watcher: &Watcher,
) -> Result<Started> {
    let Opened {
        enforcer,
        mut choice,
        fleet,
        mut regions,
        mut unsaved,
    } = opened;
    let is_foreign = choice.is_foreign;
    let (kept, unkept) = match read_temporary(options, is_foreign).await {
        Ok(kept) => (kept, None),
        Err(error) => (Kept::default(), Some(format!("{error:#}"))),
    };
    let unread: Vec<String> = unkept
        .into_iter()
        .chain(choice.unknown_window.clone())
        .chain(fleet.error.clone())
        .collect();
    let unkept = (!unread.is_empty()).then(|| unread.join("; "));
    let (history, change_id, unread_history) = read_history(options, is_foreign).await;
    let last_hits = read_last_hits(options, is_foreign).await;
    let held = enforcer
        .call(|enforcer| {
            enforcer.restore_last_hits(last_hits);
            (enforcer.databases(), enforcer.ends())
        })
        .await?;
    let boot_id = boot_id();
    let restored = kept.clone().restore(boot_id.as_deref(), clock.now());
    let tried = choice.tried.as_ref().map(|(_, tried)| tried.clone());
    // The policy whose rules are in the kernel.
    let last = tried.as_ref().or(choice.before.as_ref());
    let last = last.map(|file| &file.policy);
    let restored = in_kernel(restored, last, held, clock.now());
    // It is written anew, with the machine of now.
    let confirmed = choice
        .confirmed
        .take()
        .filter(Confirmed::is_of_this_machine);
    let mut window = None;
    if choice
        .candidates
        .front()
        .is_some_and(|first| first.is_tried)
        && let Some((open, _)) = &choice.tried
        && let Some(before) = &choice.before
    {
        let displaced = choice.displaced(before);
        let (regions, _) =
            first_regions(options, &before.policy, displaced, watcher, clock.now()).await?;
        let found = Window {
            open: open.clone(),
            before: before.clone(),
            regions,
            is_refused: false,
        };
        restore_before_tried(&found, &enforcer, clock.now()).await?;
        window = Some(found);
    }
    let mut refused = None;
    let (file, instead_of_file, timed, committed, checked) = loop {
        let Some(candidate) = choice.candidates.pop_front() else {
            return Err(refused.unwrap_or_else(|| anyhow!("there is no policy to enforce")));
        };
        let Candidate {
            file,
            instead_of_file,
            is_tried,
        } = candidate;
        if let Some(refused) = &refused {
            let displaced = choice.displaced(&file);
            let again = first_regions(options, &file.policy, displaced, watcher, clock.now()).await;
            (regions, unsaved) = again.with_context(|| format!("{refused:#}"))?;
        }
        if !is_tried && window.take().is_some() {
            choice.fall_back(clock.now());
            choice.is_abandoned = true;
            enforcer.call(Enforcer::forget_before_tried).await?;
        }
        let now = clock.now();
        let timed = match (&choice.tried, &choice.before) {
            (Some((open, tried)), Some(before)) if !is_tried => {
                let kept = open.before.clone().restore(boot_id.as_deref(), now);
                let current = timed(&restored, &tried.policy, now);
                let back = window::timed(kept, &before.policy, &tried.policy, current, now);
                timed(&(back.ends, back.temporary), &file.policy, now)
            }
            _ => timed(&restored, &file.policy, now),
        };
        let order = Order {
            accepted: file.accepted,
            file: file.clone(),
            prefixes: region::prefixes(&regions),
            timed,
        };
        let started = order.timed.clone();
        let desired = compile_order(order).await?;
        // What the policy of before listed and this one does not is filtered no longer.
        let before = match (is_tried, &tried) {
            (false, Some(tried)) => Some(tried),
            _ => choice.before.as_ref(),
        };
        let occasion = Occasion::Start {
            before: before.map(|before| before.policy.clone()),
        };
        let committed = enforcer
            .call(move |enforcer| enforcer.commit(desired, &occasion))
            .await?;
        match committed {
            Ok((committed, checked)) => {
                // Another policy would not mend that, and this one is enforced as far as it went.
                if let Some(error) = committed.not_taken_over {
                    return Err(error.context("take over what an agent of another layout enforces"));
                }
                let reason = match refused {
                    Some(error) => {
                        let file = options.policy.display();
                        let refusal = format!("{file} is not enforced: {error:#}");
                        Some(instead_of_file.unwrap_or(refusal))
                    }
                    None => instead_of_file,
                };
                break (file, reason, started, committed, checked);
            }
            // What the maps hold must be known before another policy is tried.
            Err(error) if error.kernel == Kernel::Unknown => return Err(error.error),
            Err(error) => refused = refused.or(Some(error.error)),
        }
    };
    Ok(Started {
        path: options.policy.clone(),
        fleet: fleet.state(&file.policy, clock.now()),
        kept_fleet: fleet.kept,
        this_host: fleet.this_host,
        file,
        regions,
        unsaved,
        timed,
        committed,
        checked,
        confirmed,
        kept,
        window,
        kept_window: choice.kept_window,
        is_window_unknown: choice.unknown_window.is_some(),
        abandoned: choice.abandoned,
        instead_of_file,
        is_abandoned: choice.is_abandoned,
        unreadable: choice.unreadable,
        unkept,
        history,
        change_id,
        unread_history,
    })
}

/// Has the enforcer know what the confirmed policy lets in: those connections are not reset before the policy that is tried
/// is confirmed.
async fn restore_before_tried(window: &Window, enforcer: &Handle, now: Now) -> Result<()> {
    let (ends, temporary) = window
        .open
        .before
        .clone()
        .restore(boot_id().as_deref(), now);
    let file = window.before.clone();
    let order = Order {
        accepted: file.accepted,
        prefixes: region::prefixes(&window.regions),
        timed: timed(&(ends, temporary), &file.policy, now),
        file,
    };
    let compiled = compile_order(order).await?.compiled;
    let restored = enforcer.call(move |enforcer| enforcer.restore_before_tried(&compiled));
    if let Err(error) = restored.await? {
        let error = format!("{error:#}; connections may be reset before the policy is confirmed");
        Entry::warning(error).log();
    }
    Ok(())
}

/// The fleet's documents that were kept.
struct KeptFleet {
    kept: Option<fleet::Kept>,
    /// Why it cannot be read.
    error: Option<String>,
    this_host: of_fleet::ThisHost,
}

impl KeptFleet {
    /// # Errors
    /// It cannot be read, and what is pinned holds rules of the fleet, which stay in force.
    async fn read(options: &Options, choice: &Choice) -> Result<Self> {
        let this_host = of_fleet::ThisHost::new(host::name(), host::boot());
        if choice.is_foreign {
            return Ok(Self {
                kept: None,
                error: None,
                this_host,
            });
        }
        let directory = options.state_dir.clone();
        let path = store::fleet_path(&directory);
        let what = "read the fleet's documents that were kept";
        let read = move || store::read_fleet(&directory);
        let kept = threads::run_within(&threads::POLICIES, READ_TIMEOUT, what, &path, read).await;
        let (kept, error) = match kept {
            Ok(kept) => (Some(kept.unwrap_or_default()), None),
            Err(error) => {
                let is_used = choice.files().any(|file| file.policy.fleet.is_some());
                if is_used && !pins::left_in_force(&options.bpffs)?.is_empty() {
                    return Err(error.context(format!(
                        "start refused; what is pinned stays in force, without an agent: to begin with what etcd has, \
                         remove {}",
                        path.display()
                    )));
                }
                let error = format!(
                    "{error:#}; until etcd answers only the policy's own rules are in force"
                );
                (None, is_used.then_some(error))
            }
        };
        Ok(Self {
            kept,
            error,
            this_host,
        })
    }

    fn state(&self, policy: &Policy, now: Now) -> fleet::State {
        let kept = self.kept.clone().unwrap_or_default();
        let state = fleet::State::restore(kept, policy, now.steady);
        state.without_rollouts_over(now.wall).unwrap_or(state)
    }

    fn fill(&self, file: &Arc<PolicyFile>, now: Now) -> Arc<PolicyFile> {
        let state = self.state(&file.policy, now);
        of_fleet::with_rules(file, &state, &self.this_host, now)
    }
}

/// The temporary rules and ends that were kept on this machine.
async fn read_temporary(options: &Options, is_foreign: bool) -> Result<Kept> {
    if is_foreign {
        return Ok(Kept::default());
    }
    let directory = options.state_dir.clone();
    let path = store::temporary_path(&directory);
    let what = "read the temporary rules that were kept";
    let read = move || store::read_temporary(&directory);
    let kept = threads::run_within(&threads::POLICIES, READ_TIMEOUT, what, &path, read).await;
    Ok(kept?.unwrap_or_default())
}

/// The history that was kept on this machine, the id of its last change, and errors. Records that cannot be read are moved out
/// of the way: nothing of them is overwritten.
async fn read_history(options: &Options, is_foreign: bool) -> (History, Option<u64>, Vec<String>) {
    let directory = options.state_dir.clone();
    let what = "read the history that was kept";
    let place = kept_history::history_path(&directory);
    let read = move || {
        let mut kept = kept_history::read_history(&directory);
        if is_foreign {
            let records = [
                kept_history::history_path(&directory),
                kept_history::changes_path(&directory),
                kept_history::change_id_path(&directory),
            ];
            let there = records.into_iter().filter(|path| path.exists());
            let of_another = |path: PathBuf| {
                let error = anyhow!("{} is of another machine", path.display());
                (path, error)
            };
            kept = kept_history::Kept {
                unreadable: there.map(of_another).collect(),
                ..Default::default()
            };
        }
        let errors =
            kept.unreadable
                .into_iter()
                .map(|(path, error)| match kept_history::set_aside(&path) {
                    Ok(aside) => format!("{error:#}; it is now {}", aside.display()),
                    Err(more) => format!("{error:#}; {more:#}"),
                });
        let errors = errors.collect();
        Ok((kept.history, kept.change_id, errors))
    };
    let kept = threads::run_within(&threads::POLICIES, READ_TIMEOUT, what, &place, read).await;
    kept.unwrap_or_else(|error| (History::default(), None, vec![format!("{error:#}")]))
}

/// The last hits of rules that were kept on this machine. Where they cannot be read, rules are counted from now on.
async fn read_last_hits(options: &Options, is_foreign: bool) -> LastHits {
    if is_foreign {
        return LastHits::default();
    }
    let directory = options.state_dir.clone();
    let path = store::last_hits_path(&directory);
    let what = "read the last hits of rules that were kept";
    let read = move || store::read_last_hits(&directory);
    let kept = threads::run_within(&threads::POLICIES, READ_TIMEOUT, what, &path, read).await;
    match kept {
        Ok(kept) => kept.unwrap_or_default().restore(boot_id().as_deref()),
        Err(error) => {
            let error = format!("{error:#}; the last hits of rules are counted from now on");
            Entry::warning(error).log();
            LastHits::default()
        }
    }
}

/// Merges the kept ends and rules with those in the kernel: an agent that was killed, or that could not write to disk, has left the rest
/// there. `before`: the policy whose rules are in the kernel.
fn in_kernel(
    (mut ends, mut temporary): (Ends, Vec<Temporary>),
    before: Option<&Policy>,
    (databases, held): (BTreeSet<String>, Vec<InKernel>),
    now: Now,
) -> (Ends, Vec<Temporary>) {
    let found: Vec<Temporary> = held.iter().filter_map(|rule| rule.temporary(now)).collect();
    if let Some(before) = before {
        ends.adopt(before, &held, now);
        // A kept rule that the kernel does not hold is suspended, or was revoked and the disk did not take that.
        let kept = Timed {
            now,
            ends: Ends::default(),
            temporary: temporary.clone(),
        };
        let suspended: Vec<&Temporary> = kept.suspended(before).collect();
        temporary.retain(|rule| {
            !databases.contains(&rule.database)
                || found.iter().any(|found| found.is_same(rule))
                || suspended.contains(&rule)
        });
    }
    for found in found {
        match temporary.iter_mut().find(|rule| rule.is_same(&found)) {
            Some(rule) => rule.end = found.end,
            None => temporary.push(found),
        }
    }
    // The kernel holds those that ended while no agent ran, too.
    temporary.retain(|rule| rule.end > now.boot);
    (ends, temporary)
}

fn timed((ends, temporary): &(Ends, Vec<Temporary>), policy: &Policy, now: Now) -> Timed {
    let kept = Timed {
        now,
        ends: ends.with(policy, now),
        temporary: temporary.clone(),
    };
    Timed {
        temporary: kept.of_policy(policy),
        ..kept
    }
}

/// Compiles on a thread of its own: long lists take a while.
///
/// # Errors
/// No thread, or a compiler that panicked.
pub async fn compile_order(order: Order) -> Result<Desired> {
    let compiled = threads::run_on_thread("compile", move || {
        let compiled = Arc::new(compile(&order.file.policy, &order.prefixes, &order.timed));
        Desired {
            timed: Arc::new(order.timed),
            compiled_ms: order.accepted.elapsed_ms(),
            accepted: order.accepted,
            compiled,
            file: order.file,
        }
    });
    compiled.await.context("compile the policy")
}

/// The regions at a start, as they were kept, and files as they are now; and the names of those whose set is not
/// the one on disk. `displaced`: sets that stand elsewhere on disk. The network may not be there yet: what needs it comes later.
async fn first_regions(
    options: &Options,
    policy: &Policy,
    mut displaced: BTreeMap<String, Set>,
    watcher: &Watcher,
    now: Now,
) -> Result<(Regions, BTreeSet<String>)> {
    let now = now.steady;
    let mut regions = region::next(policy, &Regions::new(), BTreeMap::new(), now)?;
    // At once: files that hang delay the start by one time limit, not by one each.
    let read = regions.iter_mut().map(|(name, state)| {
        let displaced = displaced.remove(name);
        first_set(name, state, displaced, &options.state_dir, watcher, now)
    });
    let unsaved = join_all(read).await.into_iter().flatten().collect();
    Ok((regions, unsaved))
}

/// Puts the kept set of a region in force, and the content of its file. Returns the name of a region whose set is not the
/// one on disk.
async fn first_set(
    name: &str,
    state: &mut State,
    displaced: Option<Set>,
    state_dir: &Path,
    watcher: &Watcher,
    now: Timestamp,
) -> Option<String> {
    let warn = |error: String| {
        let entry = Entry::warning(format!("region {name}: {error}"));
        entry.with("REGION", name).log();
    };
    let Region { source, guards } = state.region.clone();
    if let RegionSource::Prefixes(_) = source {
        return None;
    }
    let is_displaced = displaced.is_some();
    let (directory, wanted) = (state_dir.to_owned(), (name.to_owned(), source.clone()));
    let what = format!("read the set that was kept of region {name}");
    let place = directory.join(name);
    let read = move || match displaced {
        Some(set) => Ok(Some(set)),
        None => store::read_region(&directory, &wanted.0, &wanted.1),
    };
    let kept = threads::run_within(&threads::LOOK_UPS, READ_TIMEOUT, &what, &place, read);
    let restored = kept.await.and_then(|set| {
        let Some(set) = set else { return Ok(()) };
        let restored = state.restore(set, now);
        restored.context("the set that was kept on disk is ignored")
    });
    if let Err(error) = restored {
        warn(format!("{error:#}"));
    }
    let RegionSource::File(_) = source else {
        return is_displaced.then(|| name.to_owned());
    };
    let kept = state.clone();
    let answer = lookup::ask(&source, &guards, state.version(), Some(watcher)).await;
    state.take(answer, false, now);
    if let (true, Some(error)) = (state.failing, &state.error) {
        warn(error.text.clone());
    }
    (is_displaced || !state.holds_the_same(&kept)).then(|| name.to_owned())
}
