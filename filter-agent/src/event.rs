//! Events that the agent handles, and effects that it asks for.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::Result;
use tokio::sync::oneshot;

use crate::{
    clock::Accepted,
    enforcer::Checked,
    firewall::Condition,
    fleet::{self, host_status::HostStatus},
    log::Entry,
    look_ups::LookUp,
    policy_file::PolicyFile,
    reconcile::{Committed, Occasion, Refused},
    region::answer::Answer,
    report::{self, By},
    rules,
    store::Write,
    temporary::{Change, Timed},
};

/// Everything that happens.
#[derive(Debug)]
pub enum Event {
    Request(Request),
    /// SIGHUP: a reload that nobody waits for.
    Hangup,
    /// SIGTERM or SIGINT: the agent ends once the change under way is done.
    Terminate,
    PolicyRead {
        proposal: u64,
        file: Result<PolicyFile>,
    },
    LookedUp {
        number: u64,
        answer: Result<Answer>,
    },
    /// A region's file, by its path in the policy.
    FileChanged(PathBuf),
    Committed(Box<Result<(Committed, Checked), Refused>>),
    Detached(Result<Vec<String>>),
    Checked(Checked),
    Saved {
        write: Write,
        result: Result<()>,
    },
    /// From the fleet's keys.
    Fleet(fleet::News),
    /// By database: packets that passed, and those that no rule allows.
    Counted(Result<BTreeMap<String, [u64; 2]>>),
    /// The SHA-256 of the policy file's text now.
    PolicyHashed(Result<String>),
    /// Time passes.
    Tick,
}

/// Takes the answer to a request. A client that went away does not wait for it.
#[derive(Debug)]
pub struct Reply<T>(pub oneshot::Sender<Result<T>>);

impl<T> Reply<T> {
    pub fn send(self, result: Result<T>) {
        let _ = self.0.send(result);
    }
}

/// A request of a client that waits for the reply.
#[derive(Debug)]
pub enum Request {
    Reload {
        options: ReloadOptions,
        reply: Reply<report::Reloaded>,
    },
    Rollback {
        /// The id of a change; `None`: the policy that was confirmed before the one in force.
        to: Option<u64>,
        options: ReloadOptions,
        reply: Reply<report::Reloaded>,
    },
    Plan {
        /// `None`: the text of the agent's own policy file.
        text: Option<String>,
        /// The file's name in messages.
        path: Option<PathBuf>,
        /// The address of who asks, if it is known.
        caller: Option<IpAddr>,
        reply: Reply<report::Plan>,
    },
    Refresh {
        /// `None`: every region that is looked up.
        region: Option<String>,
        accept: bool,
        reply: Reply<Vec<report::Refreshed>>,
    },
    Temporary {
        change: Change,
        /// `None`: whatever the rules of its database are.
        condition: Option<Condition>,
        caller: Option<IpAddr>,
        by: Option<By>,
        reply: Reply<report::Temporary>,
    },
    /// Decides on the policy that is tried.
    Confirm {
        /// `None`: whichever it is.
        id: Option<u64>,
        /// Enforce the confirmed policy again.
        fall_back: bool,
        by: Option<By>,
        reply: Reply<report::Decided>,
    },
    Detach {
        by: Option<By>,
        reply: Reply<Vec<String>>,
    },
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct ReloadOptions {
    /// Fall back after so long, unless somebody confirms it.
    pub confirm: Option<Duration>,
    /// Refuse a text with another SHA-256.
    pub if_hash: Option<String>,
    /// Judge connections from before TLS was forced, too.
    pub existing: bool,
    /// Leave unguarded what the policy in force guards and the new one does not.
    pub allow_unprotect: bool,
    /// Refuse a change that cuts off more open connections.
    pub max_cut: Option<usize>,
    /// The address of who asks, if it is known.
    pub caller: Option<IpAddr>,
    /// Who asks. `None`: nobody, or it is not known.
    pub by: Option<By>,
}

/// An effect to carry out for the agent.
#[derive(Debug)]
pub enum Effect {
    /// Read and check a policy; `text`: it is here already. Answered by `PolicyRead`.
    ReadPolicy {
        proposal: u64,
        path: PathBuf,
        text: Option<String>,
    },
    /// Answered by `PolicyHashed`.
    HashPolicy(PathBuf),
    /// Resets the connections that a policy cut off, since it is confirmed. Answers with them.
    KeepTried {
        decided: Box<report::Decided>,
        reply: Reply<report::Decided>,
    },
    /// Answered by `LookedUp`.
    LookUp(LookUp),
    /// Answered by `Committed`.
    Commit {
        order: Order,
        occasion: Occasion,
        existing: bool,
    },
    Plan {
        order: Order,
        caller: Option<IpAddr>,
        reply: Reply<report::Plan>,
    },
    /// Answered by `Detached`.
    Detach,
    /// Answered by `Saved`.
    Save(Write),
    /// Follow these keys of the fleet, and no others. Answered by `Fleet`.
    Follow(Option<fleet::Settings>),
    /// Write this status of the host to etcd, once there is a connection. Answered by `Fleet`.
    Report(Arc<HostStatus>),
    /// Read the counters of packets. Answered by `Counted`.
    Count,
    /// The region files whose changes matter.
    Watch(BTreeSet<PathBuf>),
    Log(Entry),
    /// One line for the service manager.
    Status(String),
    /// The policy is enforced on every listed interface that exists, for the first time: report READY.
    Ready,
    /// The filter was detached, or the agent was told to end and nothing is under way: it ends.
    Stop,
    /// The agent cannot go on and ends with this error. The filter stays in force.
    Fail(String),
}

/// A policy and prefixes to enforce.
#[derive(Clone, Debug)]
pub struct Order {
    pub file: Arc<PolicyFile>,
    pub prefixes: rules::Regions,
    pub timed: Timed,
    pub accepted: Accepted,
}
