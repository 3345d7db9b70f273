//! Arguments of the commands.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};
use jiff::SignedDuration;

/// Drops, in the kernel, every packet to a database port that no rule allows.
#[derive(Parser)]
#[command(name = "filter-agent", version, max_term_width = 100)]
pub(super) struct Cli {
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Args)]
pub(super) struct PolicyPath {
    /// The policy file.
    #[arg(long, default_value = "/etc/filter-agent/policy.yaml")]
    pub(super) policy: PathBuf,
}

#[derive(Args)]
pub(super) struct Socket {
    /// The daemon's control socket.
    #[arg(long, default_value = "/run/filter-agent/control.sock")]
    pub(super) socket: PathBuf,
}

#[derive(Args)]
pub(super) struct Bpffs {
    /// The BPF file system below which the filter is pinned.
    #[arg(long, default_value = "/sys/fs/bpf")]
    pub(super) bpffs: PathBuf,
}

#[derive(Args)]
pub(super) struct StateDir {
    /// Where the confirmed policy and the last good addresses of regions are kept.
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
pub(super) struct Output {
    /// Print JSON.
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Subcommand)]
pub(super) enum Command {
    /// Enforce the policy and keep it enforced; the filter stays when this stops.
    Run {
        #[command(flatten)]
        policy: PolicyPath,
        #[command(flatten)]
        socket: Socket,
        #[command(flatten)]
        bpffs: Bpffs,
        #[command(flatten)]
        state_dir: StateDir,
        /// Prefixes of one address family that the kernel's maps are made for [default: 1048576].
        /// Maps that exist keep their size.
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1 << 26))]
        max_prefixes: Option<u32>,
    },
    /// Validate a policy file and print what it would enforce. Needs no root.
    Check {
        /// The policy file, instead of --policy.
        file: Option<PathBuf>,
        /// Look up the regions that it uses, which needs the network.
        #[arg(long)]
        resolve: bool,
        /// Examine the interfaces and the kernel of this host, and print what attaching would meet.
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
    /// Print the difference between a policy file and what the kernel enforces.
    Plan {
        /// The policy file [default: the daemon's].
        file: Option<PathBuf>,
        #[command(flatten)]
        timeout: Timeout,
        #[command(flatten)]
        socket: Socket,
        #[command(flatten)]
        output: Output,
    },
    /// Enforce the policy file as it is now; if it is refused, nothing changes.
    Reload {
        /// Where TLS is forced, judge connections from before that, too, by what they send next.
        #[arg(long)]
        existing: bool,
        /// Enforce it even if a database, port, address or interface that is guarded now is guarded no longer.
        #[arg(long)]
        allow_unprotect: bool,
        #[command(flatten)]
        timeout: Timeout,
        #[command(flatten)]
        socket: Socket,
        #[command(flatten)]
        output: Output,
    },
    /// Print what the kernel enforces and what it counted.
    Status {
        /// Run probe packets through the attached program first.
        #[arg(long)]
        verify: bool,
        /// Exit 0 if every listed interface that exists enforces the policy, whatever else is wrong; without an
        /// agent, too. For a database's unit.
        #[arg(long)]
        enforced: bool,
        /// Wait for that at most so long, such as 60s.
        #[arg(long, requires = "enforced", value_name = "DURATION", value_parser = time_limit)]
        wait: Option<Duration>,
        #[command(flatten)]
        socket: Socket,
        #[command(flatten)]
        bpffs: Bpffs,
        #[command(flatten)]
        state_dir: StateDir,
        #[command(flatten)]
        output: Output,
    },
    /// List the rules, with the packets each of them let through.
    Rules {
        /// Only of this database.
        #[arg(long)]
        database: Option<String>,
        #[command(flatten)]
        socket: Socket,
        #[command(flatten)]
        output: Output,
    },
    /// List the regions and their prefixes.
    Regions {
        #[command(flatten)]
        socket: Socket,
        #[command(flatten)]
        output: Output,
    },
    /// Look up regions now and print what changed; if one fails, its last good set stays.
    Refresh {
        /// Only this region.
        region: Option<String>,
        /// Believe an answer that lost most of its prefixes, or that is older than the last.
        #[arg(long, requires = "region")]
        accept: bool,
        #[command(flatten)]
        timeout: Timeout,
        #[command(flatten)]
        socket: Socket,
        #[command(flatten)]
        output: Output,
    },
    /// Print the verdict on packets from a source, and the rule that gives it.
    Explain {
        source: IpAddr,
        /// Only at this database.
        #[arg(long)]
        database: Option<String>,
        #[command(flatten)]
        socket: Socket,
        #[command(flatten)]
        output: Output,
    },
    /// List who is turned away since the agent started: source, database, reason.
    Drops {
        /// Only at this database.
        #[arg(long)]
        database: Option<String>,
        /// Go on, with a line for each source that is turned away from now on, every second.
        #[arg(long)]
        follow: bool,
        #[command(flatten)]
        socket: Socket,
        #[command(flatten)]
        output: Output,
    },
    /// Stop filtering and remove every trace: everybody can reach the databases then.
    Detach {
        /// Do not ask.
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

/// A duration of the command line, of at most an hour.
fn time_limit(text: &str) -> Result<Duration, String> {
    let duration: SignedDuration = text.parse().map_err(|_| "not a valid duration: 60s, 2m")?;
    let duration = Duration::try_from(duration).map_err(|_| "a duration must not be negative")?;
    if duration > Duration::from_hours(1) {
        return Err("at most 1h".into());
    }
    Ok(duration)
}
