//! `detach`, and what is still filtered where no agent answers.

use std::{
    io::{self, BufRead as _, IsTerminal as _, Write as _},
    path::Path,
    process::{self, ExitCode},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp;

use crate::{
    cli::{
        client::{Agent, is_absent},
        output::end_with_the_reader,
    },
    kernel::pins,
    peer::owner,
    report::Detached,
    store,
};

/// Time for a running agent to detach: it removes each map and link.
const DETACH_TIMEOUT: Duration = Duration::from_mins(1);

/// Adds to an error of reaching the agent what is filtered all the same: pins need no agent.
pub(super) fn tell_what_is_left(error: anyhow::Error, bpffs: &Path) -> anyhow::Error {
    match pins::left_in_force(bpffs) {
        // An agent that runs may filter by links whose pins are out of sight.
        Ok(interfaces) if interfaces.is_empty() => match error.downcast_ref::<io::Error>() {
            Some(cause) if is_absent(cause) => error.context("nothing is filtered"),
            _ => error,
        },
        Ok(interfaces) => {
            let names: Vec<String> = interfaces.into_iter().map(interface_name).collect();
            let names = names.join(", ");
            error.context(format!("the last policy stays in force on {names}"))
        }
        Err(_) => error,
    }
}

fn interface_name(index: u32) -> String {
    let name = nix::net::if_::if_indextoname(index);
    let name = name.ok().and_then(|name| name.into_string().ok());
    name.unwrap_or_else(|| format!("interface {index} (gone)"))
}

/// Detaches the filter. A running agent must do it itself, since it would attach again; without one this process removes the
/// pins.
pub(super) async fn detach(
    yes: bool,
    socket: &Path,
    bpffs: &Path,
    state_dir: &Path,
) -> Result<ExitCode> {
    if !yes {
        if !io::stdin().is_terminal() {
            eprintln!("filter-agent: detach asks on a terminal; elsewhere it needs --yes");
            return Ok(ExitCode::from(2));
        }
        print!("Stop filtering? Everybody can reach the databases then. [y/N] ");
        io::stdout().flush().context("write to the terminal")?;
        let mut answer = String::new();
        io::stdin()
            .lock()
            .read_line(&mut answer)
            .context("read the answer")?;
        ensure!(answer.trim().eq_ignore_ascii_case("y"), "not detached");
    }
    let agent = Agent {
        timeout: DETACH_TIMEOUT,
        while_it: Some("which removes the filter"),
        ..Agent::new(socket)
    };
    // An agent that hangs would attach again when it goes on: then nothing is removed here.
    let names: Vec<String> = if agent.is_running().await? {
        let detached: Detached = agent.post("/v1/detach", String::new()).await?;
        detached.interfaces
    } else {
        let interfaces = pins::remove(bpffs)?;
        store::forget_confirmed(state_dir).context(
            "detached: nothing is filtered, but the next start may enforce the policy again",
        )?;
        let names: Vec<String> = interfaces.into_iter().map(interface_name).collect();
        if !names.is_empty() {
            let by = owner(
                nix::unistd::getuid().as_raw(),
                i32::try_from(process::id()).ok(),
            );
            if let Err(error) = store::history::note_detached(state_dir, Timestamp::now(), by) {
                eprintln!("filter-agent: detached, but the history does not say so: {error:#}");
            }
        }
        names
    };
    end_with_the_reader()?;
    match names.as_slice() {
        [] => say!("nothing was filtered"),
        names => say!("detached from {}: it is open now", names.join(", ")),
    }
    Ok(ExitCode::SUCCESS)
}
