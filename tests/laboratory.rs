//! A database host whose agent meets one fault after another, and what is observed of it from outside:
//! its commands, its log, its pins, its files, and what passes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    fs::{self, File},
    io::Read as _,
    net::IpAddr,
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    process::{Child, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    datagrams::Datagrams,
    injector::{Fault, Kind, Supervised, Watch},
    net::{ALLOWED4, ALLOWED6, DENIED4, DENIED6, NEIGHBOURS, Net, policy},
};

pub const PORT: u16 = 5432;

/// Sources that both policies allow: one sends all the time, one when it is asked about.
const ALWAYS: IpAddr = IpAddr::V4(ALLOWED4);
const ALWAYS_TOO: IpAddr = NEIGHBOURS[1];
const ONLY_OLD: IpAddr = IpAddr::V6(ALLOWED6);
const ONLY_NEW: IpAddr = IpAddr::V6(DENIED6);
/// Sources that neither policy allows.
const NEVER: IpAddr = IpAddr::V4(DENIED4);
const NEVER_TOO: IpAddr = NEIGHBOURS[2];

/// Longest time for anything that the agent does.
const LIMIT: Duration = Duration::from_secs(20);

/// Two policies, which differ by one prefix each.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Version {
    Old,
    New,
}

impl Version {
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Old => Self::New,
            Self::New => Self::Old,
        }
    }

    fn prefix(self) -> String {
        match self {
            Self::Old => format!("{ONLY_OLD}/128"),
            Self::New => format!("{ONLY_NEW}/128"),
        }
    }

    pub fn text(self) -> String {
        text(&format!("cidr: '{}'", self.prefix()))
    }

    /// The same until then.
    pub fn text_until(self, end: Timestamp) -> String {
        text(&format!("cidr: '{}', expires: {end}", self.prefix()))
    }
}

/// A policy with two rules: one for the sources that always pass, and this one.
fn text(rule: &str) -> String {
    let database = format!(
        "{{name: orders, port: {PORT}, protocol: udp, engine: other, model: dedicated, \
         force_tls: false, rules: [{{cidr: {ALWAYS}/31}}, {{{rule}}}]}}"
    );
    policy("eth0", "native", &[database])
}

/// The policy that the kernel enforces, as packets show.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum InForce {
    Policy(Version),
    /// Everything passes.
    Nothing,
    Neither {
        always: bool,
        only_old: bool,
        only_new: bool,
        never: bool,
    },
}

impl InForce {
    /// Either policy without its own prefix.
    pub const ONLY_ALWAYS: Self = Self::Neither {
        always: true,
        only_old: false,
        only_new: false,
        never: false,
    };
}

impl fmt::Display for InForce {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Policy(Version::Old) => formatter.write_str("the old policy"),
            Self::Policy(Version::New) => formatter.write_str("the new policy"),
            Self::Nothing => formatter.write_str("no filter"),
            Self::Neither {
                always,
                only_old,
                only_new,
                never,
            } => {
                let passing = [
                    (always, "what both policies allow"),
                    (only_old, "what only the old one allows"),
                    (only_new, "what only the new one allows"),
                    (never, "what neither allows"),
                ];
                let passing: Vec<&str> = passing
                    .iter()
                    .filter(|(p, _)| **p)
                    .map(|(_, n)| *n)
                    .collect();
                write!(
                    formatter,
                    "neither policy (there passes: {})",
                    passing.join(", ")
                )
            }
        }
    }
}

/// How a start ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Started {
    Ready,
    Exited(ExitStatus),
    /// Neither within `LIMIT`.
    Hangs,
}

/// What a command printed, and how it ended.
pub struct Answer {
    /// `None`: it did not end within `LIMIT`.
    pub status: Option<ExitStatus>,
    pub text: String,
}

impl Answer {
    pub fn succeeded(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }
}

/// Whether a message says that nothing was done.
pub fn claims_refusal(message: &str) -> bool {
    message.contains("refused") || message.contains("nothing is changed")
}

/// A guarantee that was broken.
pub struct Finding {
    pub what: String,
    /// The scenario and the fault.
    pub round: String,
    pub evidence: String,
}

pub struct Laboratory {
    pub net: Net,
    launcher: &'static Path,
    /// The scenario and the fault under way.
    pub round: String,
    pub findings: Vec<Finding>,
    datagrams: Datagrams,
    /// The service manager's end, while a start is under way. Afterwards there is none: datagrams that
    /// nobody reads would make the agent wait.
    ready: Option<UnixDatagram>,
    /// The files on the BPF file system and in the state directory after a clean run.
    /// By the agent's binary: another layout has other pins.
    clean: BTreeMap<PathBuf, [BTreeSet<PathBuf>; 2]>,
    /// Whether a policy is in force, so that the steady sources must be judged.
    is_enforced: bool,
}

impl Laboratory {
    /// `name` is the test's, and must be no other's.
    pub fn new(name: &str, launcher: &'static Path) -> Self {
        let net = Net::new(name);
        net.fix_neighbours();
        let others = [ALWAYS_TOO, ONLY_OLD, ONLY_NEW, NEVER_TOO];
        let datagrams = Datagrams::start(&net, PORT, &[ALWAYS, NEVER], &others);
        Self {
            net,
            launcher,
            round: String::new(),
            findings: Vec::new(),
            datagrams,
            ready: None,
            clean: BTreeMap::new(),
            is_enforced: false,
        }
    }

    pub fn find(&mut self, what: &str, evidence: &str) {
        // At once too, for a run that somebody ends.
        eprintln!("{}: {what}", self.round);
        self.findings.push(Finding {
            what: what.into(),
            round: self.round.clone(),
            evidence: format!("{}\nthe agent's log:\n{}", evidence.trim_end(), self.log()),
        });
    }

    /// What the agent wrote since it was started last.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn log_path(&self) -> PathBuf {
        self.net.dir().join("log")
    }

    /// Writes a policy whose second rule is a region with this version's prefix. Where such a policy is there
    /// already, only the region's file changes.
    pub fn write_region(&self, version: Version) {
        let path = self.net.dir().join("office.txt");
        let next = self.net.dir().join("office.next");
        fs::write(&next, format!("{}\n", version.prefix())).unwrap();
        fs::rename(next, &path).unwrap();
        let region = format!("regions: {{office: {{file: {}}}}}\n", path.display());
        let policy = text("region: office") + &region;
        if fs::read_to_string(self.net.policy_path()).ok().as_ref() != Some(&policy) {
            self.net.write_policy(&policy);
        }
    }

    /// Starts the agent and does not wait.
    pub fn spawn(&mut self, kind: Kind, fault: Option<Fault>) -> Supervised {
        let path = self.net.dir().join("ready");
        let _ = fs::remove_file(&path);
        let ready = UnixDatagram::bind(&path).unwrap();
        ready
            .set_read_timeout(Some(Duration::from_millis(5)))
            .unwrap();
        self.ready = Some(ready);
        let mut command = self.net.agent_command(&["run"]);
        command.env("NOTIFY_SOCKET", path);
        let watch = Watch {
            kind,
            policy: self.net.policy_path(),
            directories: vec![self.net.state_dir(), self.net.bpffs()],
            log: File::create(self.log_path()).unwrap(),
        };
        Supervised::spawn(self.launcher, &self.net.db, &command, watch, fault)
    }

    /// Waits until the agent tells its service manager that it is ready, or ends.
    pub fn wait_for_start(&mut self, agent: &mut Supervised) -> Started {
        let ready = self.ready.take().expect("the agent was just started");
        let deadline = Instant::now() + LIMIT;
        let mut message = [0; 4096];
        while Instant::now() < deadline {
            if let Ok(length) = ready.recv(&mut message)
                && String::from_utf8_lossy(&message[..length]).contains("READY=1")
            {
                return Started::Ready;
            }
            if let Some(status) = agent.child.try_wait().unwrap() {
                return Started::Exited(status);
            }
        }
        Started::Hangs
    }

    /// Ends the agent as a service manager does. It may be gone.
    pub fn stop(&mut self, agent: &mut Supervised) {
        let fired = agent.fired().len();
        let pid = Pid::from_raw(i32::try_from(agent.child.id()).unwrap());
        // Not waited for yet, so that the number is nobody else's.
        if agent.child.try_wait().unwrap().is_none() {
            kill(pid, Signal::SIGTERM).unwrap();
        }
        match wait(&mut agent.child) {
            None => self.find("the agent does not stop", ""),
            // What fails at its end may be the reason.
            Some(status) if agent.fired().is_empty() && !status.success() => {
                self.find("a stop fails", &format!("{status}, {fired}"));
            }
            Some(_) => {}
        }
    }

    /// Runs a command of the agent's.
    pub fn command(&self, arguments: &[&str]) -> Answer {
        let mut command = self.net.agent_command(arguments);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = self.net.db.run(|| command.spawn().unwrap());
        let status = wait(&mut child);
        if status.is_none() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        let mut text = String::new();
        child
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        Answer { status, text }
    }

    pub fn in_force(&self) -> InForce {
        let passes = |source| self.datagrams.passes(source);
        match [ALWAYS_TOO, ONLY_OLD, ONLY_NEW, NEVER_TOO].map(passes) {
            [true, true, false, false] => InForce::Policy(Version::Old),
            [true, false, true, false] => InForce::Policy(Version::New),
            [true, true, true, true] => InForce::Nothing,
            [always, only_old, only_new, never] => InForce::Neither {
                always,
                only_old,
                only_new,
                never,
            },
        }
    }

    /// From now on a policy is in force, whatever happens.
    pub fn expect_enforced(&mut self) {
        if !self.is_enforced {
            self.datagrams.look();
        }
        self.is_enforced = true;
    }

    /// From now on the filter may be gone.
    pub fn expect_anything(&mut self) {
        self.is_enforced = false;
    }

    /// Looks at what passed since the last look, if a policy was in force all the time.
    pub fn check_steady(&mut self) {
        let passed: BTreeMap<_, _> = self.datagrams.look();
        if !self.is_enforced {
            return;
        }
        let [always, never] = [ALWAYS, NEVER].map(|s| passed.get(&s).copied().unwrap_or_default());
        if never.received > 0 {
            self.find(
                "a source passes that no policy allows",
                &format!("{never:?}"),
            );
        }
        if always.received != always.sent {
            self.find(
                "a source is dropped that both policies allow",
                &format!("{always:?}"),
            );
        }
    }

    /// Removes the filter, and all that is on disk.
    pub fn clear(&mut self) {
        self.is_enforced = false;
        for directory in [self.net.bpffs().join("filter-agent"), self.net.state_dir()] {
            let _ = fs::remove_dir_all(directory);
        }
        // The kernel frees the links a moment later.
        assert!(
            within_limit(|| self.in_force() == InForce::Nothing),
            "{}",
            self.in_force()
        );
    }

    /// Starts the agent without a fault, which must enforce the policy file, whatever it finds.
    /// `kind`: of its calls that can fail later.
    pub fn converge(&mut self, kind: Kind, expected: InForce) -> Supervised {
        let agent = self.start_again(kind);
        let in_force = self.in_force();
        self.check_started(in_force, expected);
        agent
    }

    /// Starts the agent without a fault, which must succeed.
    pub fn start_again(&mut self, kind: Kind) -> Supervised {
        let mut agent = self.spawn(kind, None);
        let mut started = self.wait_for_start(&mut agent);
        if started != Started::Ready {
            self.find("the next start fails", &format!("{started:?}"));
            // The next round begins from nothing.
            drop(agent);
            self.clear();
            agent = self.spawn(kind, None);
            started = self.wait_for_start(&mut agent);
            assert_eq!(started, Started::Ready, "{}", self.log());
        }
        self.expect_enforced();
        agent
    }

    /// What a start must leave.
    pub fn check_started(&mut self, in_force: InForce, expected: InForce) {
        if in_force != expected {
            self.find(&format!("the next start leaves in force {in_force}"), "");
        }
        let status = self.command(&["status"]);
        if !status.succeeded() {
            self.find("after the next start `status` fails", &status.text);
        }
        self.check_files();
    }

    /// The files that are pinned and kept, but for the list of changes, which outlasts a detach.
    pub fn files(&self) -> BTreeSet<PathBuf> {
        let state = self.net.state_dir();
        let mut kept = files_below(&state);
        for name in ["change-id", "changes.json", "history.json", "policies"] {
            kept.remove(&state.join(name));
        }
        kept.extend(files_below(&self.net.bpffs().join("filter-agent")));
        kept
    }

    /// All files but the texts of earlier policies, which have their hashes as names, and records of the history that could
    /// not be read, which are set aside for whoever wants to look at them.
    fn all_files(&self) -> [BTreeSet<PathBuf>; 2] {
        let state = self.net.state_dir();
        let texts = state.join("policies");
        let aside = ["change-id", "changes.json", "history.json"];
        let aside = aside.map(|name| state.join(format!("{name}.damaged")));
        let is_of_history = |path: &PathBuf| {
            let end = path.extension().unwrap_or_default();
            path.starts_with(&texts) && (end == "yaml" || end == "damaged") || aside.contains(path)
        };
        [self.net.bpffs(), self.net.state_dir()].map(|path| {
            let mut found = files_below(&path);
            found.retain(|path| !is_of_history(path));
            found
        })
    }

    /// Remembers what a clean run left, after its end.
    pub fn remember_files(&mut self) {
        let files = self.all_files();
        self.clean.insert(self.net.binary.clone(), files);
    }

    /// Compares what is pinned and kept with what a clean run left there.
    fn check_files(&mut self) {
        let Some(clean) = self.clean.get(&self.net.binary) else {
            return;
        };
        // The agent writes what it keeps after it is ready.
        // Kept as long as the policy has a rule with an end.
        let policy = fs::read_to_string(self.net.policy_path()).unwrap();
        let ends = policy
            .contains("expires:")
            .then(|| self.net.state_dir().join("temporary.json"));
        let files = || {
            let mut found = self.all_files();
            ends.iter().for_each(|ends| {
                found[1].remove(ends);
            });
            found
        };
        let mut found = files();
        let deadline = Instant::now() + Duration::from_secs(2);
        while found != *clean && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
            found = files();
        }
        let list = |found: &[BTreeSet<PathBuf>; 2], clean: &[BTreeSet<PathBuf>; 2]| {
            let differing = (0..2).flat_map(|n| found[n].difference(&clean[n]));
            let names: Vec<String> = differing.map(|path| path.display().to_string()).collect();
            names.join(", ")
        };
        let (more, fewer) = (list(&found, clean), list(clean, &found));
        if !more.is_empty() || !fewer.is_empty() {
            let evidence = format!("more: {more}; missing: {fewer}");
            self.find(
                "the next start leaves other files than a clean run",
                &evidence,
            );
        }
    }
}

fn files_below(directory: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let Ok(entries) = fs::read_dir(directory) else {
        return found;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(files_below(&path));
        }
        found.insert(path);
    }
    found
}

/// Whether a condition comes true within the time that anything may take.
pub fn within_limit(mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + LIMIT;
    while Instant::now() < deadline {
        if condition() {
            return true;
        }
        thread::sleep(Duration::from_millis(1));
    }
    condition()
}

fn wait(child: &mut Child) -> Option<ExitStatus> {
    let mut status = None;
    within_limit(|| {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    status
}
