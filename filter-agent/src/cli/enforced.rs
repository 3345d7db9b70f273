//! `status --enforced`: whether the filter is in force, with an agent or without one.

use std::{
    error::Error,
    fmt,
    path::Path,
    slice,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow, bail, ensure};
use serde::Serialize;

use crate::{
    cli::{client::Agent, output::or, progress::announced},
    host::{
        self,
        coverage::{Coverage, describe_missing},
        driver::unreliably_filtered,
    },
    kernel::pins,
    policy::{self, spelled},
    report::Status,
    store,
};

/// Output of `status --enforced`.
#[derive(Serialize)]
pub(super) struct Enforcement {
    /// Whether an agent reported it; else it was read from the pins and the kernel's list of interfaces.
    agent: bool,
    pub(super) interfaces: Vec<String>,
}

pub(super) fn print_enforcement(found: &Enforcement) {
    let on = or(
        &found.interfaces.join(", "),
        "no interface, since nothing is to be protected",
    );
    let by = if found.agent {
        ""
    } else {
        ", without an agent"
    };
    say!("enforced on {on}{by}");
}

/// Whether the filter is in force on every listed interface that exists.
///
/// # Errors
/// It is not, or that cannot be found out.
pub(super) async fn enforced(
    agent: &Agent<'_>,
    bpffs: &Path,
    state_dir: &Path,
) -> Result<Enforcement> {
    let status: Result<Status> = agent.get("/v1/status?verify=true").await;
    match status {
        Ok(status) => {
            ensure!(
                status.not_enforced.is_empty(),
                "{}",
                status.not_enforced.join("; ")
            );
            let filtered = status
                .interfaces
                .into_iter()
                .filter(|i| i.program_id.is_some());
            Ok(Enforcement {
                agent: true,
                interfaces: filtered.map(|interface| interface.name).collect(),
            })
        }
        // The filter may be in force without an agent.
        Err(_) => enforced_without_agent(bpffs, state_dir).await,
    }
}

/// The filter is not in force, as opposed to: it cannot be found out.
#[derive(Debug)]
pub(super) struct NotEnforced(String);

impl fmt::Display for NotEnforced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for NotEnforced {}

/// The same, from the pins and the kernel's list of interfaces.
///
/// # Errors
/// `NotEnforced`, or it cannot be found out.
pub(super) async fn enforced_without_agent(bpffs: &Path, state_dir: &Path) -> Result<Enforcement> {
    let pinned = pins::pinned(bpffs)?;
    let host = host::interfaces().await?;
    let runs = |interface: &host::Interface| {
        let xdp = interface.xdp.map(|xdp| xdp.program_id);
        let mut links = pinned
            .iter()
            .filter(|link| link.interface == interface.index);
        links.any(|link| xdp == Some(link.program_id))
    };
    let kept = store::read_confirmed(state_dir)?;
    let kept = kept.ok_or_else(|| {
        NotEnforced("no agent answers, and no confirmed policy is kept on this host".into())
    })?;
    let (policy, _) = policy::parse(&kept.policy).map_err(|problems| {
        let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
        anyhow!("the confirmed policy is not valid: {}", problems.join("; "))
    })?;
    let coverage = Coverage::of(&policy, &kept.interfaces, &host);
    for interface in &coverage.present {
        let name = &interface.name;
        ensure!(
            runs(interface),
            NotEnforced(format!("no agent answers, and {name} is not filtered"))
        );
        let program = interface.xdp.map_or(0, |xdp| xdp.program_id);
        let mut errors = unreliably_filtered(slice::from_ref(interface), program).into_iter();
        if let Some(error) = errors.next() {
            bail!(NotEnforced(format!("no agent answers, and {error}")));
        }
    }
    let missing: Vec<String> = coverage.missing.iter().map(describe_missing).collect();
    ensure!(
        !coverage.present.is_empty() || missing.is_empty(),
        NotEnforced(format!(
            "no agent answers, and nothing is filtered: {}",
            missing.join(", ")
        ))
    );
    Ok(Enforcement {
        agent: false,
        interfaces: coverage
            .present
            .into_iter()
            .map(|interface| interface.name)
            .collect(),
    })
}

/// Repeats a check until it succeeds or the time limit has passed. Returns the last error.
pub(super) async fn wait_for<T, F: Future<Output = Result<T>>>(
    limit: Duration,
    mut look: impl FnMut() -> F,
) -> Result<T> {
    const PAUSE: Duration = Duration::from_millis(200);
    let deadline = Instant::now() + limit;
    let what = || {
        format!(
            "waiting for the filter to be in force: at most {}",
            spelled(limit)
        )
    };
    let repeated = async {
        loop {
            let found = look().await;
            if found.is_ok() || Instant::now() + PAUSE > deadline {
                return found;
            }
            tokio::time::sleep(PAUSE).await;
        }
    };
    announced(what, repeated).await
}
