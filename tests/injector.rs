//! Makes one system call of the real agent fail, or kills the agent at it.
//!
//! A seccomp filter hands calls of one kind to a supervisor thread of the test (`SECCOMP_RET_USER_NOTIF`,
//! seccomp_unotify(2)). It counts them over all threads of the agent, and answers each: let it run,
//! fail it with an errno without running it, or kill the agent instead.

use std::{
    convert::Infallible,
    ffi::OsString,
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Read as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::{fs::FileExt as _, process::CommandExt as _},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, MutexGuard},
    thread::{self, JoinHandle},
};

use anyhow::{Context as _, Result};
use libseccomp::{
    ScmpAction, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpNotifReq, ScmpNotifResp,
    ScmpNotifRespFlags, ScmpSyscall, error::SeccompError, notify_id_valid, set_api,
};
use nix::{
    errno::Errno,
    fcntl::AT_FDCWD,
    libc::{AF_NETLINK, PATH_MAX},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::net::Namespace;

/// Kinds of calls that can fail.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// bpf(2), except for lookups in maps.
    Bpf,
    /// `BPF_MAP_LOOKUP_ELEM`. A kind of its own: a start over the pins of another layout makes thousands of them.
    BpfLookup,
    /// `BPF_LINK_CREATE` and `BPF_LINK_UPDATE`. A kind of its own: among hundreds of other calls, the one that
    /// switches an interface's program would seldom be the one that fails.
    BpfLink,
    /// Opening, making, renaming, removing and syncing files in the watched directories.
    Files,
    /// Making netlink sockets, and sending and receiving on them.
    Netlink,
    /// Writing to standard error.
    Log,
}

impl Kind {
    pub const ALL: [Self; 6] = [
        Self::Bpf,
        Self::BpfLookup,
        Self::BpfLink,
        Self::Files,
        Self::Netlink,
        Self::Log,
    ];

    /// The errors that the kernel returns most likely for calls of this kind.
    pub fn errors(self) -> &'static [Errno] {
        match self {
            Self::Bpf | Self::BpfLookup => &[Errno::ENOMEM],
            // Without memory, by another program on the interface, by a policy of the host.
            Self::BpfLink => &[Errno::ENOMEM, Errno::EBUSY, Errno::EPERM],
            Self::Files => &[Errno::EIO],
            Self::Netlink => &[Errno::ENOBUFS],
            Self::Log => &[Errno::ENOSPC],
        }
    }
}

/// What happens instead of the call.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Action {
    Fail(Errno),
    /// SIGKILL to the agent.
    Kill,
}

/// Calls that do not run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fault {
    /// The first one, counted from 1.
    pub first: usize,
    /// How many fail from there on.
    pub calls: usize,
    pub action: Action,
}

/// What the supervisor watches.
#[derive(Debug)]
pub struct Watch {
    pub kind: Kind,
    pub policy: PathBuf,
    /// For `Kind::Files`.
    pub directories: Vec<PathBuf>,
    /// The agent's standard error.
    pub log: File,
}

/// An agent whose calls are supervised.
pub struct Supervised {
    pub child: Child,
    state: Arc<Mutex<State>>,
    supervisor: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    /// Since the agent's first look at its policy file: what the loader and the runtime do before is
    /// not the agent's.
    counts: bool,
    fault: Option<Fault>,
    count: usize,
    fired: Vec<String>,
}

impl Supervised {
    /// Starts the agent in a namespace, by the launcher. `fault`: counted since it reads its policy.
    pub fn spawn(
        launcher: &Path,
        namespace: &Namespace,
        agent: &Command,
        watch: Watch,
        fault: Option<Fault>,
    ) -> Self {
        let mut command = Command::new(launcher);
        command.arg(format!("{:?}", watch.kind));
        command.arg(agent.get_program()).args(agent.get_args());
        command.envs(
            agent
                .get_envs()
                .filter_map(|(name, value)| Some((name, value?))),
        );
        if let Some(directory) = agent.get_current_dir() {
            command.current_dir(directory);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(watch.log.try_clone().unwrap());
        let mut child = namespace.run(|| command.spawn().unwrap());
        let mut line = String::new();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        output.read_line(&mut line).unwrap();
        let number = line
            .trim()
            .parse()
            .expect("the launcher prints its listener");
        let pid = rustix::process::Pid::from_child(&child);
        let launcher = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        let listener = pidfd_getfd(launcher, number, PidfdGetfdFlags::empty()).unwrap();
        let state = Arc::new(Mutex::new(State {
            fault,
            ..State::default()
        }));
        let supervisor = thread::spawn({
            let state = state.clone();
            move || supervise(&listener, &watch, &state)
        });
        // Now the launcher becomes the agent.
        drop(child.stdin.take());
        Self {
            child,
            state,
            supervisor: Some(supervisor),
        }
    }

    /// Counts calls from 0 from now on, and lets these fail.
    pub fn arm(&self, fault: Option<Fault>) {
        let mut state = self.state();
        state.counts = true;
        state.count = 0;
        state.fault = fault;
    }

    /// Lets no more calls fail.
    pub fn disarm(&self) {
        self.state().fault = None;
    }

    pub fn count(&self) -> usize {
        self.state().count
    }

    /// Whether the agent was killed at a call, or ended.
    pub fn has_ended(&mut self) -> bool {
        let state = self.state();
        let killed = matches!(state.fault, Some(fault) if fault.action == Action::Kill);
        let is_dying = killed && !state.fired.is_empty();
        drop(state);
        is_dying || self.child.try_wait().unwrap().is_some()
    }

    /// The calls that did not run.
    pub fn fired(&self) -> Vec<String> {
        self.state().fired.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(supervisor) = self.supervisor.take() {
            let ended = supervisor.join();
            assert!(
                thread::panicking() || ended.is_ok(),
                "the supervisor failed"
            );
        }
    }
}

/// What the launcher does: installs the filter on itself, hands the listener to the test, and becomes
/// the agent.
///
/// The calls that hand it over are not in any filter: nobody would answer them yet.
///
/// # Errors
/// The agent was not started.
pub fn launch(mut arguments: impl Iterator<Item = OsString>) -> Result<Infallible> {
    let name = arguments.next().context("the kind of calls is missing")?;
    let is_named = |kind: &Kind| name.to_str() == Some(&format!("{kind:?}"));
    let kind = Kind::ALL
        .into_iter()
        .find(is_named)
        .context("no such kind of calls")?;
    let program = arguments.next().context("the program is missing")?;
    let filter = filter(kind).context("make a seccomp filter")?;
    filter.load().context("load the seccomp filter")?;
    // The kernel closes it when the agent takes the place of this program.
    println!("{}", filter.get_notify_fd().context("get the listener")?);
    io::stdin()
        .read_to_end(&mut Vec::new())
        .context("wait for the test")?;
    let mut agent = Command::new(program);
    agent
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    Err(agent.exec()).context("start the agent")
}

fn filter(kind: Kind) -> std::result::Result<ScmpFilterContext, SeccompError> {
    const LOW: ScmpCompareOp = ScmpCompareOp::MaskedEqual(0xffff_ffff);
    let mut filter = ScmpFilterContext::new(ScmpAction::Allow)?;
    let mut notify = |name: &str, conditions: &[ScmpArgCompare]| {
        let call = ScmpSyscall::from_name(name)?;
        let added = filter.add_rule_conditional(ScmpAction::Notify, call, conditions);
        added.map(|_| ())
    };
    notify("openat", &[])?;
    let is = |command| ScmpArgCompare::new(0, ScmpCompareOp::Equal, command);
    let is_no_lookup = ScmpArgCompare::new(0, ScmpCompareOp::NotEqual, MAP_LOOKUP_ELEM);
    match kind {
        Kind::Bpf => notify("bpf", &[is_no_lookup])?,
        Kind::BpfLookup => notify("bpf", &[is(MAP_LOOKUP_ELEM)])?,
        Kind::BpfLink => {
            for command in [LINK_CREATE, LINK_UPDATE] {
                notify("bpf", &[is(command)])?;
            }
        }
        Kind::Files => {
            for name in FILE_CALLS {
                notify(name, &[])?;
            }
        }
        Kind::Netlink => {
            notify("socket", &[ScmpArgCompare::new(0, LOW, AF_NETLINK as u64)])?;
            for name in ["sendto", "sendmsg", "recvfrom", "recvmsg"] {
                notify(name, &[])?;
            }
        }
        Kind::Log => {
            for name in ["write", "writev"] {
                notify(name, &[ScmpArgCompare::new(0, LOW, 2)])?;
            }
        }
    }
    Ok(filter)
}

const MAP_LOOKUP_ELEM: u64 = 1;
const LINK_CREATE: u64 = 28;
const LINK_UPDATE: u64 = 29;

/// The API level of libseccomp that has them.
const NOTIFICATIONS: u32 = 6;

/// Besides openat(2).
const FILE_CALLS: [&str; 12] = [
    "open",
    "rename",
    "renameat",
    "renameat2",
    "fsync",
    "fdatasync",
    "unlink",
    "unlinkat",
    "mkdir",
    "mkdirat",
    "rmdir",
    "ftruncate",
];

/// Answers calls until no process has the filter.
fn supervise(listener: &OwnedFd, watch: &Watch, state: &Mutex<State>) {
    // Where no filter was loaded, libseccomp does not find out by itself that the kernel has notifications.
    set_api(NOTIFICATIONS).unwrap();
    loop {
        let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            polled => polled.unwrap(),
        };
        let events = fds[0].revents().unwrap_or(PollFlags::empty());
        if !events.contains(PollFlags::POLLIN) {
            return;
        }
        // Killed meanwhile, with its call.
        let Ok(request) = ScmpNotifReq::receive(listener.as_raw_fd()) else {
            continue;
        };
        let action = judge(&request, watch, state);
        let response = match action {
            None => ScmpNotifResp::new_continue(request.id, ScmpNotifRespFlags::empty()),
            Some(Action::Fail(errno)) => {
                let flags = ScmpNotifRespFlags::empty();
                ScmpNotifResp::new_error(request.id, -(errno as i32), flags)
            }
            Some(Action::Kill) => {
                // The call waits for an answer, and is over with the process.
                // `None`: somebody else killed it.
                if let Some(agent) = process(request.pid) {
                    let _ = kill(agent, Signal::SIGKILL);
                }
                continue;
            }
        };
        let answered = response.respond(listener.as_raw_fd());
        let is_waiting = notify_id_valid(listener.as_raw_fd(), request.id).is_ok();
        assert!(answered.is_ok() || !is_waiting, "answer {request:?}");
    }
}

/// `None`: the call runs.
fn judge(request: &ScmpNotifReq, watch: &Watch, state: &Mutex<State>) -> Option<Action> {
    let name = request.data.syscall.get_name().unwrap_or_default();
    let mut state = state.lock().unwrap();
    if !state.counts {
        state.counts = name == "openat" && path_of(request, 0, 1).as_ref() == Some(&watch.policy);
        return None;
    }
    let call = describe(request, &name, watch)?;
    state.count += 1;
    let fault = state.fault?;
    if state.count < fault.first || state.count - fault.first >= fault.calls {
        return None;
    }
    state.fired.push(call);
    Some(fault.action)
}

/// The call as one reads it, if it is of the kind.
fn describe(request: &ScmpNotifReq, name: &str, watch: &Watch) -> Option<String> {
    let arguments = &request.data.args;
    let is_watched = |path: &Path| watch.directories.iter().any(|d| path.starts_with(d));
    let of_path = |directory: usize, path: usize| {
        let path = path_of(request, directory, path).filter(|path| is_watched(path))?;
        Some(format!("{name} {}", path.display()))
    };
    match (watch.kind, name) {
        (Kind::Bpf | Kind::BpfLookup | Kind::BpfLink, "bpf") => {
            Some(format!("bpf {}", bpf_command(arguments[0])))
        }
        (Kind::Files, "open" | "rename" | "unlink" | "mkdir" | "rmdir") => of_path(WORKING, 0),
        (Kind::Files, "openat" | "renameat" | "renameat2" | "unlinkat" | "mkdirat") => {
            of_path(0, 1)
        }
        (Kind::Files, "fsync" | "fdatasync" | "ftruncate") => {
            let path = descriptor(request, arguments[0]).filter(|path| is_watched(path))?;
            Some(format!("{name} {}", path.display()))
        }
        (Kind::Netlink, "socket") => Some("socket AF_NETLINK".into()),
        (Kind::Netlink, "sendto" | "sendmsg" | "recvfrom" | "recvmsg") => {
            is_netlink(request, arguments[0]).then(|| format!("{name} on a netlink socket"))
        }
        (Kind::Log, "write" | "writev") => Some(format!("{name} to standard error")),
        _ => None,
    }
}

/// Stands for the argument with the directory, where a call has none.
const WORKING: usize = usize::MAX;

/// The path that a call names. Another thread could change it before the kernel reads it; the agent
/// has no reason to.
fn path_of(request: &ScmpNotifReq, directory: usize, path: usize) -> Option<PathBuf> {
    let mut bytes = vec![0; PATH_MAX as usize];
    let memory = File::open(format!("/proc/{}/mem", request.pid)).ok()?;
    let read = memory.read_at(&mut bytes, request.data.args[path]).ok()?;
    let end = bytes[..read].iter().position(|byte| *byte == 0)?;
    bytes.truncate(end);
    let path = PathBuf::from(String::from_utf8(bytes).ok()?);
    if path.is_absolute() {
        return Some(path);
    }
    // A descriptor stands in the low half of the argument.
    let number = request.data.args.get(directory).map(|n| *n as u32 as i32);
    let directory = match number {
        None => working_directory(request),
        Some(number) if number == AT_FDCWD.as_raw_fd() => working_directory(request),
        Some(_) => descriptor(request, request.data.args[directory]),
    };
    Some(directory?.join(path))
}

fn working_directory(request: &ScmpNotifReq) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{}/cwd", request.pid)).ok()
}

/// What a descriptor of the calling thread stands for.
fn descriptor(request: &ScmpNotifReq, number: u64) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{}/fd/{}", request.pid, number as u32)).ok()
}

/// The kernel lists the netlink sockets of a namespace by their inodes.
fn is_netlink(request: &ScmpNotifReq, number: u64) -> bool {
    let is_listed = || {
        let target = descriptor(request, number)?;
        let inode = target
            .to_str()?
            .strip_prefix("socket:[")?
            .strip_suffix(']')?;
        let sockets = fs::read_to_string(format!("/proc/{}/net/netlink", request.pid)).ok()?;
        Some(
            sockets
                .lines()
                .any(|line| line.split_whitespace().last() == Some(inode)),
        )
    };
    is_listed().unwrap_or(false)
}

/// The process of a thread.
fn process(thread: u32) -> Option<Pid> {
    let status = fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Tgid:"))?;
    Some(Pid::from_raw(line.trim().parse().ok()?))
}

/// `enum bpf_cmd` of linux/bpf.h.
fn bpf_command(number: u64) -> String {
    let name = match number {
        0 => "MAP_CREATE",
        MAP_LOOKUP_ELEM => "MAP_LOOKUP_ELEM",
        2 => "MAP_UPDATE_ELEM",
        3 => "MAP_DELETE_ELEM",
        4 => "MAP_GET_NEXT_KEY",
        5 => "PROG_LOAD",
        6 => "OBJ_PIN",
        7 => "OBJ_GET",
        10 => "PROG_TEST_RUN",
        13 => "PROG_GET_FD_BY_ID",
        14 => "MAP_GET_FD_BY_ID",
        15 => "OBJ_GET_INFO_BY_FD",
        18 => "BTF_LOAD",
        24 => "MAP_LOOKUP_BATCH",
        26 => "MAP_UPDATE_BATCH",
        27 => "MAP_DELETE_BATCH",
        LINK_CREATE => "LINK_CREATE",
        LINK_UPDATE => "LINK_UPDATE",
        30 => "LINK_GET_FD_BY_ID",
        34 => "LINK_DETACH",
        _ => return format!("command {number}"),
    };
    name.into()
}
