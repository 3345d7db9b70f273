//! Arguments of the commands.

use std::{net::IpAddr, num::NonZeroUsize, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};
use clap_complete::ArgValueCompleter;
use jiff::{Span, SpanRelativeTo};

use crate::{
    cli::{
        client::{Agent, SOCKET, STATUS_SOCKET},
        complete,
        fleet::Fleet,
    },
    enforcer::LONGEST_TRACE,
    window::check_lasting,
};

/// Drops, in the kernel, every packet to a database port that no rule allows.
#[derive(Parser)]
#[command(name = "filter-agent", version, max_term_width = 100)]
pub(super) struct Cli {
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Args)]
pub(super) struct PolicyPath {
    /// Policy file.
    #[arg(long, default_value = "/etc/filter-agent/policy.yaml")]
    pub(super) policy: PathBuf,
}

#[derive(Args)]
pub(super) struct Socket {
    /// Control socket of the agent.
    #[arg(long, default_value = SOCKET)]
    pub(super) socket: PathBuf,
}

/// For commands that only read: members of a group may, too.
#[derive(Args)]
pub(super) struct Reading {
    #[command(flatten)]
    pub(super) socket: Socket,
    /// Status socket of the agent, for users who may not open the control socket.
    #[arg(long, value_name = "SOCKET", default_value = STATUS_SOCKET)]
    pub(super) status_socket: PathBuf,
}

impl Reading {
    pub(super) fn agent(&self) -> Agent<'_> {
        Agent {
            status_socket: Some(&self.status_socket),
            ..Agent::new(&self.socket.socket)
        }
    }
}

#[derive(Args)]
pub(super) struct Bpffs {
    /// BPF file system in which the filter is pinned.
    #[arg(long, default_value = "/sys/fs/bpf")]
    pub(super) bpffs: PathBuf,
}

#[derive(Args)]
pub(super) struct StateDir {
    /// Directory of the confirmed policy and of the last good sets of regions.
    #[arg(long, default_value = "/var/lib/filter-agent")]
    pub(super) state_dir: PathBuf,
}

#[derive(Args)]
pub(super) struct Timeout {
    /// Time for the agent to answer, such as 30s; it may wait for the look-ups of regions.
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = time_limit)]
    pub(super) timeout: Duration,
}

#[derive(Args)]
pub(super) struct Temporary {
    /// How long, such as 30m, 2h or 3d.
    #[arg(long = "for", value_name = "DURATION", value_parser = lasting)]
    pub(super) lasting: Option<Duration>,
    /// Why, for those who read `rules` later.
    #[arg(long)]
    pub(super) label: Option<String>,
}

#[derive(Args)]
pub(super) struct HistoryWanted {
    /// Show this change in full, by its number.
    #[arg(add = ArgValueCompleter::new(complete::changes))]
    pub(super) id: Option<u64>,
    /// Show only changes of this database.
    #[arg(long, conflicts_with = "id", add = ArgValueCompleter::new(complete::databases))]
    pub(super) database: Option<String>,
    /// Show only changes of the last so long, such as 7d.
    #[arg(long, conflicts_with = "id", value_name = "DURATION", value_parser = lasting)]
    pub(super) since: Option<Duration>,
    /// Show at most so many, the newest [default: 20; with --json all].
    #[arg(long, conflicts_with = "id", value_name = "NUMBER")]
    pub(super) limit: Option<NonZeroUsize>,
    /// Print the text of the policy that the change put in force, without its secrets.
    #[arg(long, requires = "id")]
    pub(super) text: bool,
}

#[derive(Args)]
pub(super) struct Output {
    /// Print JSON.
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Subcommand)]
pub(super) enum Command {
    /// Enforce the policy and keep it enforced. The filter stays in force when the agent stops.
    Run {
        #[command(flatten)]
        policy: PolicyPath,
        #[command(flatten)]
        socket: Socket,
        #[command(flatten)]
        bpffs: Bpffs,
        #[command(flatten)]
        state_dir: StateDir,
        /// Capacity of the kernel's maps, in prefixes of one address family [default: 1048576]. Existing maps keep
        /// their size.
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1 << 26))]
        max_prefixes: Option<u32>,
    },
    /// Validate a policy file and print what it would enforce. Needs no root.
    Check {
        /// Policy file, instead of --policy.
        file: Option<PathBuf>,
        /// Look up the regions that rules name. Needs the network.
        #[arg(long)]
        resolve: bool,
        /// Check the kernel and the listed interfaces of this host, too. Attaches nothing.
        #[arg(long)]
        host: bool,
        #[command(flatten)]
        policy: PolicyPath,
        #[command(flatten)]
        bpffs: Bpffs,
        #[command(flatten)]
        state_dir: StateDir,
        #[command(flatten)]
        output: Output,
    },
    /// Print the difference between a policy file and what the kernel enforces. Changes nothing.
    Plan {
        /// Policy file, which this command reads and sends [default: the agent's policy file].
        file: Option<PathBuf>,
        #[command(flatten)]
        timeout: Timeout,
        #[command(flatten)]
        socket: Socket,
        #[command(flatten)]
        output: Output,
    },
    /// Enforce the policy file as it is now. If it is refused, nothing changes.
    Reload {
        /// Also judge connections that were open before TLS was forced, by the next packet of each.
        #[arg(long)]
        existing: bool,
        /// Enforce the file even if it no longer protects a database, port, address or interface that is protected now.
        #[arg(long)]
        allow_unprotect: bool,
        /// Refuse the change if it would cut off more open connections than this. `plan` lists them.
        #[arg(long, value_name = "NUMBER")]
        max_cut: Option<usize>,
        /// Try the file for so long, such as 2m: the policy of before is enforced again then, unless `confirm` keeps it.
        #[arg(long, value_name = "DURATION", value_parser = window, conflicts_with = "existing")]
        confirm: Option<Duration>,
        /// Refuse the file if its text is another one than `plan` printed this hash of.
        #[arg(long = "if", value_name = "HASH", value_parser = hash)]
        if_hash: Option<String>,
        #[command(flatten)]
        timeout: Timeout,
        #[command(flatten)]
        socket: Socket,
        #[command(flatten)]
        output: Output,
    },
    /// Keep the policy that `reload --confirm` tries.
    Confirm {
        /// The change that is meant, as `reload` printed it.
        #[arg(add = ArgValueCompleter::new(complete::tried))]
        change: Option<u64>,
        /// Enforce the policy of before again, at once.
        #[arg(long)]
        fall_back: bool,
        #[command(flatten)]
        socket: Socket,
        #[command(flatten)]
        output: Output,
    },
    /// Enforce a policy of before again. The policy file stays as it is, and its text is not enforced at the next start.
    Rollback {
        /// The change whose policy is meant, as `history` lists it [default: the policy confirmed before the one in force].
        #[arg(add = ArgValueCompleter::new(complete::policies))]
        change: Option<u64>,
        /// Enforce it even if it no longer protects a database, port, address or interface that is protected now.
        #[arg(long)]
        allow_unprotect: bool,
        /// Refuse it if it would cut off more open connections than this.
        #[arg(long, value_name = "NUMBER")]
        max_cut: Option<usize>,
        #[command(flatten)]
        timeout: Timeout,
        #[command(flatten)]
        socket: Socket,
        #[command(flatten)]
        output: Output,
    },
    /// Allow a source for a time, in addition to the policy file. It ends by itself, whether or not the agent runs.
    Allow {
        /// Database, as the policy names it.
        #[arg(add = ArgValueCompleter::new(complete::databases))]
        database: String,
        /// Prefix, such as 203.0.113.0/24; an address alone is that one host.
        #[arg(add = ArgValueCompleter::new(complete::refused))]
        source: String,
        #[command(flatten)]
        temporary: Temporary,
        #[command(flatten)]
        socket: Socket,
        #[command(flatten)]
        output: Output,
    },
    /// Block a source for a time, whatever rule allows it. Members of the database's cluster are not blocked.
    Block {
        /// Database, as the policy names it.
        #[arg(add = ArgValueCompleter::new(complete::databases))]
        database: String,
        /// Prefix, such as 203.0.113.0/24; an address alone is that one host.
        #[arg(add = ArgValueCompleter::new(complete::refused_or_allowed))]
        source: String,
        #[command(flatten)]
        temporary: Temporary,
        #[command(flatten)]
        socket: Socket,
        #[command(flatten)]
        output: Output,
    },
    /// End what `allow` or `block` did for a source. Rules of the policy file stay.
    Revoke {
        /// Database.
        #[arg(add = ArgValueCompleter::new(complete::databases))]
        database: String,
        /// Source, as it was allowed or blocked.
        #[arg(add = ArgValueCompleter::new(complete::temporary))]
        source: String,
        #[command(flatten)]
        socket: Socket,
        #[command(flatten)]
        output: Output,
    },
    /// Print what the kernel enforces and what it counted.
    Status {
        /// Send probe packets through the attached program first.
        #[arg(long)]
        verify: bool,
        /// Exit 0 if every listed interface that exists enforces the policy, whatever else is wrong. Needs no agent. For
        /// the unit of a database.
        #[arg(long)]
        enforced: bool,
        /// Print one line for a monitoring system, and exit 0 where all is well, 1 for a warning, 2 where the policy is not
        /// enforced, and 3 where that cannot be found out. Needs no agent.
        #[arg(long, conflicts_with_all = ["enforced", "json"])]
        brief: bool,
        /// Wait for that for at most this long, such as 60s.
        #[arg(long, requires = "enforced", value_name = "DURATION", value_parser = time_limit)]
        wait: Option<Duration>,
        #[command(flatten)]
        reading: Reading,
        #[command(flatten)]
        bpffs: Bpffs,
        #[command(flatten)]
        state_dir: StateDir,
        #[command(flatten)]
        output: Output,
    },
    /// List the rules, how many packets each allowed and when the last one was, and what else covers each.
    Rules {
        /// Show only this database.
        #[arg(long, add = ArgValueCompleter::new(complete::databases))]
        database: Option<String>,
        /// Show only rules without a hit for so long, such as 30d, that are counted for at least as long.
        #[arg(long, value_name = "DURATION", value_parser = lasting)]
        unused: Option<Duration>,
        #[command(flatten)]
        reading: Reading,
        #[command(flatten)]
        output: Output,
    },
    /// List the regions and their prefixes.
    Regions {
        #[command(flatten)]
        reading: Reading,
        #[command(flatten)]
        output: Output,
    },
    /// Look up regions now and print what changed. Where a look-up fails, the last good set stays in force.
    Refresh {
        /// Look up only this region.
        #[arg(add = ArgValueCompleter::new(complete::regions))]
        region: Option<String>,
        /// Accept a result that lost most of its prefixes, or that is older than the last one.
        #[arg(long, requires = "region")]
        accept: bool,
        #[command(flatten)]
        timeout: Timeout,
        #[command(flatten)]
        socket: Socket,
        #[command(flatten)]
        output: Output,
    },
    /// List the changes that were made, by whom, newest first: the last 20 policies and the last 1,000 changes of temporary
    /// rules. Needs no agent.
    History {
        #[command(flatten)]
        wanted: HistoryWanted,
        #[command(flatten)]
        socket: Socket,
        #[command(flatten)]
        state_dir: StateDir,
        #[command(flatten)]
        output: Output,
    },
    /// Print the verdict on packets from a source, and the rule that decides it.
    Explain {
        /// Source address of the packets, such as 203.0.113.10.
        #[arg(add = ArgValueCompleter::new(complete::refused))]
        source: IpAddr,
        /// Show only this database.
        #[arg(long, add = ArgValueCompleter::new(complete::databases))]
        database: Option<String>,
        #[command(flatten)]
        reading: Reading,
        #[command(flatten)]
        output: Output,
    },
    /// List the sources whose packets were dropped since the agent started.
    Drops {
        /// Show only this database.
        #[arg(long, add = ArgValueCompleter::new(complete::databases))]
        database: Option<String>,
        /// Show only this source: an address or a prefix.
        #[arg(long, value_name = "SRC", add = ArgValueCompleter::new(complete::refused))]
        source: Option<String>,
        /// Show at most so many sources [default: 20; with --json: all].
        #[arg(long, value_name = "NUMBER", value_parser = at_least_one)]
        limit: Option<NonZeroUsize>,
        /// Keep running, and print every second a line for each source whose packets were dropped.
        #[arg(long, conflicts_with = "limit")]
        follow: bool,
        #[command(flatten)]
        reading: Reading,
        #[command(flatten)]
        output: Output,
    },
    /// Show databases with their rates, refused sources, rules, regions and the log in the terminal, live. `?` lists the
    /// keys; `a` allows a refused source for an hour, after a question.
    Top {
        /// Time between two looks at the agent, from 100ms to 1h.
        #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = interval)]
        interval: Duration,
        #[command(flatten)]
        socket: Socket,
    },
    /// Print the filter's steps on the packets of a source, as they arrive. Their verdicts stay the same.
    Trace {
        /// Address or prefix.
        source: String,
        /// Only packets that may be for this database.
        #[arg(long, add = ArgValueCompleter::new(complete::databases))]
        database: Option<String>,
        /// How long, such as 30s or 5m, at most 10m.
        #[arg(long = "for", value_name = "DURATION", default_value = "1m", value_parser = trace_time)]
        time: Duration,
        #[command(flatten)]
        socket: Socket,
        #[command(flatten)]
        output: Output,
    },
    /// Read and write the rules of a fleet's databases, in etcd. Needs a certificate, and neither root nor an agent.
    #[command(subcommand)]
    Fleet(Fleet),
    /// Stop filtering and remove everything from the kernel. The databases are then open to everybody.
    Detach {
        /// Do not ask for confirmation.
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        socket: Socket,
        #[command(flatten)]
        bpffs: Bpffs,
        #[command(flatten)]
        state_dir: StateDir,
    },
}

fn at_least_one(text: &str) -> Result<NonZeroUsize, &'static str> {
    text.parse().map_err(|_| "not a whole number from 1 on")
}

/// A duration of the command line. Days have 24 hours.
pub(super) fn lasting(text: &str) -> Result<Duration, String> {
    let span: Span = text
        .parse()
        .map_err(|_| "not a duration with its unit, such as 60s, 2m or 3d")?;
    let duration = span.to_duration(SpanRelativeTo::days_are_24_hours());
    let duration = duration.map_err(|_| "write it in days, hours, minutes and seconds")?;
    Ok(Duration::try_from(duration).map_err(|_| "a duration must not be negative")?)
}

/// As `lasting`, within the bounds of a window.
fn window(text: &str) -> Result<Duration, String> {
    let duration = lasting(text)?;
    check_lasting(duration).map(|()| duration)
}

/// A SHA-256 in hexadecimal digits.
fn hash(text: &str) -> Result<String, String> {
    let is_hash = text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    match is_hash {
        true => Ok(text.to_owned()),
        false => Err("is not a hash of 64 hexadecimal digits, as `plan` prints it".into()),
    }
}

/// As `lasting`, within the bounds of a trace.
fn trace_time(text: &str) -> Result<Duration, String> {
    let duration = lasting(text)?;
    if !(Duration::from_secs(1)..=LONGEST_TRACE).contains(&duration) {
        return Err("from 1s to 10m".into());
    }
    Ok(duration)
}

/// As `lasting`, of at most an hour.
pub(super) fn time_limit(text: &str) -> Result<Duration, String> {
    let duration = lasting(text)?;
    if duration < Duration::from_millis(100) {
        return Err("at least 100ms".into());
    }
    if duration > Duration::from_hours(1) {
        return Err("at most 1h".into());
    }
    Ok(duration)
}

/// As `time_limit`, and not so short that the agent does little else than answer.
fn interval(text: &str) -> Result<Duration, String> {
    let duration = time_limit(text)?;
    if duration < Duration::from_millis(100) {
        return Err("at least 100ms".into());
    }
    Ok(duration)
}
