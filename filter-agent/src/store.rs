//! The state directory, for what outlasts a restart of the host. One agent uses it at a time. Each file is whole or
//! unchanged, and read only if no other user could have written it. One thread writes; of several versions of a record
//! that wait for a slow disk only the latest is written.

pub mod history;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::value::RawValue;

use crate::{
    clock::boot_id, fleet::state as fleet, history::Past, host::coverage::Remembered, last_hits,
    policy::RegionSource, region::state::Set, temporary, window,
};

/// Time allowed to an agent that is ending to let go of the state directory: the kernel takes back its locks one after
/// the other, and frees its maps between them.
const LOCK_TIMEOUT: Duration = Duration::from_secs(2);
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// Longest file that is read, in bytes: a hundred for each of a million prefixes.
const MAX_FILE: u64 = 100 << 20;

/// The confirmed policy: the text that was in force last, for a start at which the file cannot be enforced, and
/// the interfaces that its entries stood for, for a boot at which no route is there yet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Confirmed {
    /// The text of the policy file.
    pub policy: String,
    pub interfaces: Remembered,
    /// The machine-id(5) of the host where it was in force. `None`: unknown.
    #[serde(default)]
    pub machine: Option<String>,
}

impl Confirmed {
    /// Whether it certainly was in force on this machine.
    pub fn is_of_this_machine(&self) -> bool {
        self.machine.is_some() && self.machine == machine()
    }

    /// Whether it was in force on another machine, from which the directory was copied: it says nothing of what this
    /// one guards. Unknown is not another.
    pub fn is_of_another_machine(&self) -> bool {
        let here = machine();
        self.machine.is_some() && here.is_some() && self.machine != here
    }
}

fn machine() -> Option<String> {
    let text = fs::read_to_string("/etc/machine-id").ok()?;
    let id = text.trim();
    let is_id = id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_id.then(|| id.to_owned())
}

/// Names a record of the state directory. Of several that wait the first is written first: the id of a change before all that
/// tells of it, a policy's text before the list that names it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Record {
    /// The id of the last change.
    ChangeId,
    /// The window of a policy that is tried, and texts that are not to be enforced. First: of several records that wait, the
    /// confirmed policy is written after it, so that a crash between them never lets a file win that was rolled back from.
    Window,
    /// When rules were last hit.
    LastHits,
    /// The fleet's documents that are in force.
    Fleet,
    Confirmed,
    /// Ends of rules, and temporary rules.
    Temporary,
    /// A region's last good set.
    Region(String),
    /// The regions of which anything is kept.
    Regions,
    /// The text of a policy, by its hash.
    Text(String),
    /// The last policies.
    Policies,
    /// The last changes of temporary rules.
    Changes,
    /// The policies whose text is kept.
    Texts,
}

impl Record {
    fn path(&self, directory: &Path) -> PathBuf {
        match self {
            Self::ChangeId => history::change_id_path(directory),
            Self::Window => window_path(directory),
            Self::LastHits => last_hits_path(directory),
            Self::Fleet => fleet_path(directory),
            Self::Confirmed => confirmed_path(directory),
            Self::Temporary => temporary_path(directory),
            Self::Region(name) => region_path(directory, name),
            Self::Regions => directory.join("regions"),
            Self::Text(hash) => history::text_path(directory, hash),
            Self::Policies => history::history_path(directory),
            Self::Changes => history::changes_path(directory),
            Self::Texts => history::texts_path(directory),
        }
    }
}

/// A new version of a record.
#[derive(Clone, Debug, PartialEq)]
pub enum Write {
    /// `None`: no policy is kept any more.
    Confirmed(Option<Confirmed>),
    Temporary(temporary::Kept),
    Window(Box<window::Kept>),
    LastHits(last_hits::Kept),
    Fleet(Box<fleet::Kept>),
    Region {
        name: String,
        source: Box<RegionSource>,
        set: Box<Set>,
    },
    /// Nothing is kept of any other region.
    Regions(BTreeSet<String>),
    ChangeId(u64),
    Text {
        hash: String,
        text: Arc<str>,
    },
    Policies(Arc<VecDeque<Past>>),
    Changes(Arc<VecDeque<Past>>),
    /// No other text is kept.
    Texts(BTreeSet<String>),
}

impl Write {
    pub fn record(&self) -> Record {
        match self {
            Self::Confirmed(_) => Record::Confirmed,
            Self::Temporary(_) => Record::Temporary,
            Self::Window(_) => Record::Window,
            Self::LastHits(_) => Record::LastHits,
            Self::Fleet(_) => Record::Fleet,
            Self::Region { name, .. } => Record::Region(name.clone()),
            Self::Regions(_) => Record::Regions,
            Self::ChangeId(_) => Record::ChangeId,
            Self::Text { hash, .. } => Record::Text(hash.clone()),
            Self::Policies(_) => Record::Policies,
            Self::Changes(_) => Record::Changes,
            Self::Texts(_) => Record::Texts,
        }
    }
}

/// The state directory of the agent that runs.
pub struct Store {
    directory: PathBuf,
    queue: Arc<Queue>,
    /// `None`: the directory is not there yet, and cannot be made; tried again before each write.
    lock: Arc<Mutex<Option<Flock<File>>>>,
}

#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    records: BTreeMap<Record, Write>,
    is_writing: bool,
}

impl Queue {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // Nothing between lock and unlock leaves it half changed.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store {
    /// Takes the directory for this agent, and removes what writes that were cut off left there. `warn` gets what
    /// keeps the directory from being used now.
    ///
    /// # Errors
    /// Another agent that has it.
    pub fn open(directory: &Path, warn: impl FnOnce(&anyhow::Error)) -> Result<Self> {
        let lock = match lock(directory) {
            Ok(lock) => {
                if let Err(error) = remove_unfinished(directory) {
                    warn(&error);
                }
                Some(lock)
            }
            Err(error) if error.is::<Taken>() => return Err(error),
            Err(error) => {
                warn(&error);
                None
            }
        };
        Ok(Self {
            directory: directory.to_owned(),
            queue: Arc::default(),
            lock: Arc::new(Mutex::new(lock)),
        })
    }

    /// Begins to write. `done` is called, on the writer's thread, with each version that was written, and the result.
    ///
    /// # Errors
    /// No thread.
    pub fn start(&self, done: impl Fn(Write, Result<()>) + Send + 'static) -> Result<()> {
        let (directory, queue) = (self.directory.clone(), self.queue.clone());
        let locked = self.lock.clone();
        let serve = move || {
            loop {
                let mut waiting = queue.waiting();
                waiting.is_writing = false;
                queue.changed.notify_all();
                let (record, next) = loop {
                    match waiting.records.pop_first() {
                        Some(next) => break next,
                        None => {
                            let woken = queue.changed.wait(waiting);
                            waiting = woken.unwrap_or_else(PoisonError::into_inner);
                        }
                    }
                };
                waiting.is_writing = true;
                drop(waiting);
                let mut locked = locked.lock().unwrap_or_else(PoisonError::into_inner);
                let result = match &*locked {
                    Some(lock) if is_of(lock, &directory) => Ok(()),
                    _ => lock(&directory)
                        .map(|lock| *locked = Some(lock))
                        .with_context(|| format!("write {}", record.path(&directory).display())),
                };
                drop(locked);
                let result = result.and_then(|()| write(&directory, &next));
                done(next, result);
            }
        };
        thread::Builder::new()
            .name("store".into())
            .spawn(serve)
            .context("start the thread that writes to disk")?;
        Ok(())
    }

    /// Has a record written, in place of a version that still waits.
    pub fn save(&self, write: Write) {
        self.queue.waiting().records.insert(write.record(), write);
        self.queue.changed.notify_all();
    }

    /// Waits until all is written, for a bounded time; whether it is. A disk that hangs is given up.
    pub fn finish(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut waiting = self.queue.waiting();
        while waiting.is_writing || !waiting.records.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let woken = self.queue.changed.wait_timeout(waiting, left);
            waiting = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

/// Another agent has the state directory.
#[derive(Debug)]
struct Taken(PathBuf);

impl std::fmt::Display for Taken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let directory = self.0.display();
        write!(
            f,
            "another filter-agent keeps its state in {directory}: stop it first, or give each its own \
             `--state-dir`"
        )
    }
}

impl std::error::Error for Taken {}

/// Whether a lock is one of the directory that is there now. One on a directory that was removed keeps no other agent
/// from the new one.
fn is_of(lock: &File, directory: &Path) -> bool {
    let (locked, found) = (lock.metadata(), fs::metadata(directory));
    let identity = |metadata: &fs::Metadata| (metadata.dev(), metadata.ino());
    matches!((&locked, &found), (Ok(locked), Ok(found)) if identity(locked) == identity(found))
}

/// Makes the directory and locks it; the kernel lets go however the agent ends.
fn lock(directory: &Path) -> Result<Flock<File>> {
    let mut builder = fs::DirBuilder::new();
    let made = builder.recursive(true).mode(0o700).create(directory);
    made.with_context(|| format!("create {}", directory.display()))?;
    let file = File::open(directory).with_context(|| format!("open {}", directory.display()))?;
    let metadata = file
        .metadata()
        .with_context(|| format!("examine {}", directory.display()))?;
    let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
    // In a sticky directory nobody else can rename or remove our files, and files of others are not read.
    let is_sticky = mode & 0o1000 != 0;
    ensure!(
        owner == nix::unistd::geteuid().as_raw() && (mode & 0o022 == 0 || is_sticky),
        "{} is not used: others could replace what is kept there (owner {owner}, mode {mode:o})",
        directory.display()
    );
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| match error {
        Errno::EWOULDBLOCK => Taken(directory.to_owned()).into(),
        error => anyhow::Error::new(error).context(format!("lock {}", directory.display())),
    })
}

/// Locks the directory, where an agent that is ending may have it for a moment.
fn patient_lock(directory: &Path) -> Result<Flock<File>> {
    let deadline = Instant::now() + LOCK_TIMEOUT;
    loop {
        match lock(directory) {
            Err(error) if error.is::<Taken>() && Instant::now() < deadline => {
                thread::sleep(LOCK_PAUSE);
            }
            taken => return taken,
        }
    }
}

pub fn confirmed_path(directory: &Path) -> PathBuf {
    directory.join("confirmed.json")
}

pub fn temporary_path(directory: &Path) -> PathBuf {
    directory.join("temporary.json")
}

pub fn window_path(directory: &Path) -> PathBuf {
    directory.join("window.json")
}

pub fn last_hits_path(directory: &Path) -> PathBuf {
    directory.join("last-hits.json")
}

pub fn fleet_path(directory: &Path) -> PathBuf {
    directory.join("fleet.json")
}

fn region_path(directory: &Path, name: &str) -> PathBuf {
    directory.join("regions").join(format!("{name}.json"))
}

/// The confirmed policy; `None`: none is kept.
///
/// # Errors
/// A file that cannot be read or is not ours, with its path.
pub fn read_confirmed(directory: &Path) -> Result<Option<Confirmed>> {
    read(&confirmed_path(directory), decode_confirmed)
}

/// The ends and temporary rules that were kept; `None`: none were.
///
/// # Errors
/// As `read_confirmed`.
pub fn read_temporary(directory: &Path) -> Result<Option<temporary::Kept>> {
    read(&temporary_path(directory), decode_temporary)
}

/// The window and the abandoned texts that were kept; `None`: none were.
///
/// # Errors
/// As `read_confirmed`.
pub fn read_window(directory: &Path) -> Result<Option<window::Kept>> {
    read(&window_path(directory), decode_window)
}

/// The last hits of rules that were kept; `None`: none were.
///
/// # Errors
/// As `read_confirmed`.
pub fn read_last_hits(directory: &Path) -> Result<Option<last_hits::Kept>> {
    read(&last_hits_path(directory), unseal)
}

/// The fleet's documents that were kept; `None`: none were.
///
/// # Errors
/// As `read_confirmed`.
pub fn read_fleet(directory: &Path) -> Result<Option<fleet::Kept>> {
    read(&fleet_path(directory), unseal)
}

/// The set that was kept of a region; `None`: none was.
///
/// # Errors
/// The file is damaged, or another user could have written it.
pub fn read_region(directory: &Path, name: &str, source: &RegionSource) -> Result<Option<Set>> {
    read(&region_path(directory, name), |text| {
        decode(text, name, source)
    })
}

/// Removes the confirmed policy, temporary rules and the texts of earlier policies, if any are kept, where no agent runs.
///
/// # Errors
/// A file that stays: the next start could enforce it. An agent that runs.
pub fn forget_confirmed(directory: &Path) -> Result<()> {
    if !directory
        .try_exists()
        .with_context(|| format!("examine {}", directory.display()))?
    {
        return Ok(());
    }
    let _lock = patient_lock(directory)?;
    write(directory, &Write::Confirmed(None))?;
    write(directory, &Write::Temporary(temporary::Kept::default()))?;
    write(directory, &Write::Window(Box::default()))?;
    write(directory, &Write::LastHits(last_hits::Kept::default()))?;
    history::keep_texts(directory, &BTreeSet::new())?;
    remove_unfinished(directory)
}

fn write(directory: &Path, write: &Write) -> Result<()> {
    let regions = directory.join("regions");
    match write {
        Write::Confirmed(Some(confirmed)) => {
            let confirmed = Confirmed {
                machine: machine(),
                ..confirmed.clone()
            };
            let text = seal(&confirmed)?;
            write_file(directory, &confirmed_path(directory), &text)
        }
        Write::Confirmed(None) => {
            let path = confirmed_path(directory);
            remove(&path).with_context(|| {
                format!(
                    "remove {}, which the next start would enforce",
                    path.display()
                )
            })
        }
        Write::Temporary(kept) if kept.is_empty() => {
            let path = temporary_path(directory);
            remove(&path).with_context(|| format!("remove {}", path.display()))
        }
        Write::Temporary(kept) => {
            let kept = temporary::Kept {
                boot_id: boot_id(),
                ..kept.clone()
            };
            write_file(directory, &temporary_path(directory), &seal(&kept)?)
        }
        Write::Window(kept) if kept.is_empty() => {
            let path = window_path(directory);
            remove(&path).with_context(|| format!("remove {}", path.display()))
        }
        Write::Window(kept) => {
            let mut kept = kept.clone();
            if let Some(open) = &mut kept.open {
                open.before.boot_id = boot_id();
            }
            write_file(directory, &window_path(directory), &seal(&kept)?)
        }
        Write::LastHits(kept) if kept.is_empty() => {
            let path = last_hits_path(directory);
            remove(&path).with_context(|| format!("remove {}", path.display()))
        }
        Write::LastHits(kept) => {
            let kept = kept.clone().of_boot(boot_id());
            write_file(directory, &last_hits_path(directory), &seal(&kept)?)
        }
        Write::Fleet(kept) if **kept == fleet::Kept::default() => {
            let path = fleet_path(directory);
            remove(&path).with_context(|| format!("remove {}", path.display()))
        }
        Write::Fleet(kept) => write_file(directory, &fleet_path(directory), &seal(kept)?),
        Write::Region { name, source, set } => {
            let text = encode(name, source, set)?;
            write_file(&regions, &region_path(directory, name), &text)
        }
        Write::Regions(names) => {
            for path in files(&regions)? {
                let name = path.file_stem().and_then(|stem| stem.to_str());
                let is_record = path.extension().is_some_and(|end| end == "json");
                if is_record && !name.is_some_and(|name| names.contains(name)) {
                    remove(&path).with_context(|| format!("remove {}", path.display()))?;
                }
            }
            Ok(())
        }
        Write::ChangeId(id) => history::write_change_id(directory, *id),
        Write::Text { hash, text } => history::write_text(directory, hash, text),
        Write::Policies(policies) => {
            history::write_changes(directory, &history::history_path(directory), policies)
        }
        Write::Changes(changes) => {
            history::write_changes(directory, &history::changes_path(directory), changes)
        }
        Write::Texts(hashes) => history::keep_texts(directory, hashes),
    }
}

/// The text of a record, and a sum that tells whether it is still what was written.
#[derive(Deserialize, Serialize)]
struct Sealed<'a> {
    crc32: u32,
    #[serde(borrow)]
    kept: &'a RawValue,
}

#[derive(Deserialize, Serialize)]
struct Kept<T, S> {
    region: T,
    /// Its `identity`: the set of another source is not this region's.
    source: T,
    set: S,
}

/// A record with its checksum, as JSON.
fn seal<T: Serialize>(record: &T) -> Result<Vec<u8>> {
    let kept = serde_json::value::to_raw_value(record).context("write a record as JSON")?;
    let sealed = Sealed {
        crc32: crc32fast::hash(kept.get().as_bytes()),
        kept: &kept,
    };
    serde_json::to_vec(&sealed).context("write a record as JSON")
}

/// # Errors
/// A text that is not what `seal` made of such a record.
fn unseal<T: DeserializeOwned>(text: &[u8]) -> Result<T> {
    let sealed: Sealed<'_> = serde_json::from_slice(text).context("it is damaged")?;
    let sum = crc32fast::hash(sealed.kept.get().as_bytes());
    ensure!(sum == sealed.crc32, "it is damaged: its checksum differs");
    serde_json::from_str(sealed.kept.get()).context("it is of another version")
}

/// The text of the file that keeps a region's set.
///
/// # Errors
/// serde_json refuses the set, which holds nothing that it would.
pub fn encode(name: &str, source: &RegionSource, set: &Set) -> Result<Vec<u8>> {
    let source = identity(source)?;
    seal(&Kept {
        region: name,
        source: source.as_str(),
        set,
    })
}

/// # Errors
/// Why the text is not what `encode` made for this region and source.
pub fn decode(text: &[u8], name: &str, source: &RegionSource) -> Result<Set> {
    let kept: Kept<String, Set> = unseal(text)?;
    ensure!(kept.region == name, "it is of region {}", kept.region);
    // Earlier versions kept the whole source, secrets included: it is not quoted.
    ensure!(kept.source == identity(source)?, "it is of another source");
    Ok(kept.set)
}

/// A text that differs between sources, without their secrets.
fn identity(source: &RegionSource) -> Result<String> {
    let text = serde_json::to_string(source).context("write the source as JSON")?;
    let sum = match source {
        RegionSource::Url(list) => list.url.checksum(),
        _ => None,
    };
    Ok(match sum {
        Some(sum) => format!("{text} {sum:08x}"),
        None => text,
    })
}

/// # Errors
/// Why the text is not what was written of a confirmed policy.
pub fn decode_confirmed(text: &[u8]) -> Result<Confirmed> {
    unseal(text)
}

/// # Errors
/// A text that is not what was written of temporary rules and ends.
pub fn decode_temporary(text: &[u8]) -> Result<temporary::Kept> {
    unseal(text)
}

/// # Errors
/// A text that is not what was written of a window and abandoned texts.
pub fn decode_window(text: &[u8]) -> Result<window::Kept> {
    unseal(text)
}

/// A file of the state directory; `None`: there is none.
///
/// # Errors
/// A file that others could have written, or that `decode` refuses, with its path.
fn read<T>(path: &Path, decode: impl FnOnce(&[u8]) -> Result<T>) -> Result<Option<T>> {
    let metadata = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        metadata => metadata.with_context(|| format!("read {}", path.display()))?,
    };
    let own = nix::unistd::geteuid().as_raw();
    let record = || {
        ensure!(metadata.is_file(), "it is not a regular file");
        let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
        if owner != own || mode & 0o022 != 0 {
            bail!("others could have written it (owner {owner}, mode {mode:o})");
        }
        ensure!(metadata.len() <= MAX_FILE, "it is too long");
        decode(&fs::read(path)?)
    };
    let record = record().with_context(|| format!("{} is ignored", path.display()))?;
    Ok(Some(record))
}

/// Writes a file, mode 0600.
///
/// # Errors
/// The text did not reach the disk. The file is then unchanged.
fn write_file(directory: &Path, path: &Path, text: &[u8]) -> Result<()> {
    let written = || -> Result<()> {
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(directory)?;
        // Without the random name that the crate adds to errors: each would be another, and be logged again.
        let made = tempfile::NamedTempFile::new_in(directory);
        let mut file = made.map_err(|error| io::Error::from(error.kind()))?;
        file.as_file_mut().write_all(text)?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        // The name too has to outlast a crash of the host.
        File::open(directory)?.sync_all()?;
        Ok(())
    };
    written().with_context(|| format!("write {}", path.display()))
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Removes the temporary files of writes that were cut off.
fn remove_unfinished(directory: &Path) -> Result<()> {
    let within = [directory.join("regions"), history::texts_path(directory)];
    let mut found = files(directory)?;
    for directory in within {
        found.extend(files(&directory)?);
    }
    for path in found {
        let name = path.file_name().unwrap_or_default();
        if name.to_string_lossy().starts_with(".tmp") {
            remove(&path).with_context(|| format!("remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// The files of a directory; none where there is no such directory.
fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let list = || -> io::Result<Vec<PathBuf>> {
        fs::read_dir(directory)?
            .map(|entry| Ok(entry?.path()))
            .collect()
    };
    match list() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        files => files.with_context(|| format!("list {}", directory.display())),
    }
}

#[cfg(test)]
mod tests;
