//! `status --brief`: one line and an exit status, as monitoring plugins print them (Nagios, Icinga and others).

use std::{env, fmt, path::Path, process::ExitCode};

use crate::{
    cli::{
        client::Agent,
        enforced::{Enforcement, NotEnforced, enforced_without_agent},
        output::or,
    },
    report::Status,
    text::counted,
};

#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(u8)]
enum Level {
    Ok = 0,
    Warning = 1,
    Critical = 2,
    /// It cannot be found out.
    Unknown = 3,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "OK",
            Self::Warning => "WARNING",
            Self::Critical => "CRITICAL",
            Self::Unknown => "UNKNOWN",
        })
    }
}

/// Prints the line. What follows a `|` would be numbers to a monitoring system.
fn finish((level, text): (Level, String)) -> ExitCode {
    let text = text.replace(['\n', '\r'], " ").replace('|', "/");
    say!("{level} - {text}");
    ExitCode::from(level as u8)
}

/// Ends the process because of wrong usage: with 3 where `status --brief` was meant, since 2 is critical there.
pub(super) fn end_with_usage(error: &clap::Error) -> ExitCode {
    let given = |wanted: &str| env::args_os().any(|argument| argument == wanted);
    if error.use_stderr() && given("status") && given("--brief") {
        let text = error.to_string();
        let line = text.lines().next().unwrap_or_default();
        let text = line.trim_start_matches("error: ").to_owned();
        return finish((Level::Unknown, text));
    }
    error.exit()
}

pub(super) async fn brief(
    verify: bool,
    agent: &Agent<'_>,
    bpffs: &Path,
    state_dir: &Path,
) -> ExitCode {
    let path = format!("/v1/status?verify={verify}");
    let status: anyhow::Result<Status> = agent.get(&path).await;
    finish(match status {
        Ok(status) => with_agent(&status),
        Err(error) => without_agent(enforced_without_agent(bpffs, state_dir).await, &error),
    })
}

fn with_agent(status: &Status) -> (Level, String) {
    let filtered = status.interfaces.iter().filter(|i| i.program_id.is_some());
    let filtered: Vec<&str> = filtered.map(|interface| interface.name.as_str()).collect();
    if !status.not_enforced.is_empty() {
        return (Level::Critical, first(&status.not_enforced));
    }
    if filtered.is_empty() && !status.databases.is_empty() {
        return (Level::Critical, first(&status.errors));
    }
    let troubles: Vec<String> = [&status.errors[..], &status.warnings[..]].concat();
    if !troubles.is_empty() {
        return (Level::Warning, first(&troubles));
    }
    let prefixes: usize = status.databases.iter().map(|d| d.prefixes).sum();
    let text = format!(
        "enforced on {}: {} and {}",
        or(&filtered.join(", "), "no interface"),
        counted(status.databases.len(), "database", "databases"),
        counted(prefixes, "prefix", "prefixes"),
    );
    let tried = status.window.as_ref().map(|window| format!("; {window}"));
    (Level::Ok, text + &tried.unwrap_or_default())
}

/// `error`: why no agent answers.
fn without_agent(found: anyhow::Result<Enforcement>, error: &anyhow::Error) -> (Level, String) {
    match found {
        Ok(found) => {
            let on = found.interfaces.join(", ");
            let on = or(&on, "no interface, since nothing is to be protected");
            let text = format!("the last policy stays in force on {on}, but {error:#}");
            (Level::Warning, text)
        }
        Err(found) if found.is::<NotEnforced>() => (Level::Critical, format!("{found:#}")),
        Err(found) => (Level::Unknown, format!("{found:#}; {error:#}")),
    }
}

/// The first of some lines, and the number of the others.
fn first(lines: &[String]) -> String {
    let first = lines
        .first()
        .map_or("no interface is filtered", String::as_str);
    match lines.len() {
        0 | 1 => first.to_owned(),
        more => format!("{first} (and {} more)", more - 1),
    }
}
