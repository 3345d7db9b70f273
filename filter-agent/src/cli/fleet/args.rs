//! Arguments of `fleet`.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Subcommand};
use jiff::Timestamp;

use crate::cli::args::{lasting, time_limit};

#[derive(Args)]
pub(in crate::cli) struct Access {
    /// File whose `fleet` says where etcd is, and which certificate to show: a policy file, or one with nothing else.
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/etc/filter-agent/policy.yaml"
    )]
    pub(super) fleet: PathBuf,
}

#[derive(Args)]
pub(in crate::cli) struct Waiting {
    /// Wait for at most so long, such as 30s, until every host enforces it, and print and exit as `fleet status` does.
    #[arg(long, value_name = "DURATION", value_parser = time_limit)]
    pub(super) wait: Option<Duration>,
}

#[derive(Subcommand)]
pub(in crate::cli) enum Fleet {
    /// Print the document of a database.
    Get {
        /// Database, as the policies of its hosts name it.
        database: String,
        /// As it was at this revision of etcd.
        #[arg(long, value_parser = clap::value_parser!(i64).range(1..))]
        revision: Option<i64>,
        #[command(flatten)]
        access: Access,
    },
    /// Print whether every host enforces what was written. Exits with 0 if all do, 1 if one cannot, 3 if the others are
    /// silent, and 4 if some do not yet.
    Status {
        /// Show only this database.
        database: Option<String>,
        #[command(flatten)]
        waiting: Waiting,
        /// Print JSON.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        access: Access,
    },
    /// Forget what a host reported of itself that is gone for good.
    Forget {
        /// Host, by its name in the fleet.
        host: String,
        #[command(flatten)]
        access: Access,
    },
    /// Print which rules a file would change, and which hosts would refuse it.
    Diff {
        /// Database.
        database: String,
        /// Document; `-` is standard input.
        file: PathBuf,
        #[command(flatten)]
        access: Access,
    },
    /// Write a document, unless somebody else changes it meanwhile.
    Put {
        /// Database.
        database: String,
        /// Document; `-` is standard input.
        file: PathBuf,
        /// Only if the document is still the one of this revision; 0: only if there is none.
        #[arg(long, value_name = "REVISION", value_parser = clap::value_parser!(i64).range(0..))]
        if_revision: Option<i64>,
        /// Even if it takes away more than half of the rules or ends a rollout, a host would refuse it, no host has the database,
        /// or a host does not believe etcd.
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        waiting: Waiting,
        #[command(flatten)]
        access: Access,
    },
    /// Add a rule to a document. It is written anew: comments are lost.
    Allow {
        /// Database.
        database: String,
        /// Prefix, such as 203.0.113.0/24; an address alone is that one host.
        source: String,
        /// How long, such as 2h or 3d.
        #[arg(long = "for", value_name = "DURATION", value_parser = some_time, conflicts_with = "expires")]
        lasting: Option<Duration>,
        /// Until when, such as 2026-12-31T18:00:00Z.
        #[arg(long, value_name = "TIME")]
        expires: Option<Timestamp>,
        /// Why, for those who read the rules later.
        #[arg(long)]
        label: Option<String>,
        /// Even if a host would refuse it, or no host has the database.
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        waiting: Waiting,
        #[command(flatten)]
        access: Access,
    },
    /// Take a rule out of a document. It is written anew: comments are lost.
    Revoke {
        /// Database.
        database: String,
        /// Prefix of the rule; an address alone is that one host.
        source: String,
        #[command(flatten)]
        waiting: Waiting,
        #[command(flatten)]
        access: Access,
    },
    /// Have some hosts enforce a document for a time, and the others go on. They return to theirs by themselves.
    Rollout {
        /// Database.
        database: String,
        /// Document; `-` is standard input.
        file: PathBuf,
        /// Hosts, by their names in the fleet.
        #[arg(long, value_name = "HOST", required = true, value_delimiter = ',')]
        on: Vec<String>,
        /// How long, such as 30m, unless it is promoted by then.
        #[arg(long = "for", value_name = "DURATION", default_value = "30m", value_parser = some_time)]
        lasting: Duration,
        /// Watch the hosts for so long, such as 2m, after as long without the change. It is taken back where one of them
        /// falls silent, reports an error, or drops much more than before.
        #[arg(long, value_name = "DURATION", value_parser = soak, conflicts_with = "wait")]
        soak: Option<Duration>,
        /// Promote it if none of them is worse off.
        #[arg(long, requires = "soak")]
        promote: bool,
        /// Even if it takes away more than half of the rules or another rollout, a host would refuse it, or is not known.
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        waiting: Waiting,
        #[command(flatten)]
        access: Access,
    },
    /// Have every host enforce what is rolled out to some.
    Promote {
        /// Database.
        database: String,
        /// Even if a host would refuse it.
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        waiting: Waiting,
        #[command(flatten)]
        access: Access,
    },
    /// End a rollout: its hosts enforce again what the others do.
    Abort {
        /// Database.
        database: String,
        #[command(flatten)]
        waiting: Waiting,
        #[command(flatten)]
        access: Access,
    },
    /// Have every host believe etcd again, after it was restored from a backup.
    Recover {
        /// Do not ask.
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        access: Access,
    },
}

impl Fleet {
    pub(super) fn database(&self) -> Option<&String> {
        match self {
            Self::Get { database, .. }
            | Self::Diff { database, .. }
            | Self::Put { database, .. }
            | Self::Allow { database, .. }
            | Self::Revoke { database, .. }
            | Self::Rollout { database, .. }
            | Self::Promote { database, .. }
            | Self::Abort { database, .. } => Some(database),
            Self::Status { database, .. } => database.as_ref(),
            Self::Recover { .. } | Self::Forget { .. } => None,
        }
    }
}

/// As `lasting`, and not over at once.
fn some_time(text: &str) -> Result<Duration, String> {
    let duration = lasting(text)?;
    match duration < Duration::from_secs(1) {
        true => Err("at least 1s".into()),
        false => Ok(duration),
    }
}

/// As `time_limit`, and long enough for two reports of a host, which come every 5 s.
fn soak(text: &str) -> Result<Duration, String> {
    let duration = time_limit(text)?;
    match duration < Duration::from_secs(10) {
        true => Err("at least 10s".into()),
        false => Ok(duration),
    }
}
