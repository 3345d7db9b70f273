//! Where output goes, its tables, and exit statuses.

use std::{
    fmt::Display,
    io::{self, IsTerminal as _},
    process::ExitCode,
    sync::Arc,
};

use anyhow::{Context as _, Result};
use comfy_table::{ContentArrangement, Table, presets};
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use signal_hook::{consts::SIGPIPE, flag::register_conditional_shutdown};

use crate::cli::args::Output;

/// What a shell makes of a process that SIGPIPE ended.
pub(super) const EXIT_BROKEN_PIPE: i32 = 128 + SIGPIPE;

/// Exit status 1 where something was printed that is an error all the same.
pub(super) fn failure_if(failed: bool) -> ExitCode {
    if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

/// Ends the process where nobody reads on, as in `status | head -1`. To be called when all that is left is
/// to print: to lose the agent half way is an error that wants a message.
pub(super) fn end_with_the_reader() -> Result<()> {
    register_conditional_shutdown(SIGPIPE, EXIT_BROKEN_PIPE, Arc::new(true.into()))
        .context("watch for a closed pipe")?;
    Ok(())
}

impl Output {
    pub(super) fn print<T: Serialize>(&self, value: &T, text: impl Fn(&T)) -> Result<()> {
        end_with_the_reader()?;
        if self.json {
            let json = serde_json::to_string_pretty(value).context("write JSON")?;
            println!("{json}");
        } else {
            text(value);
        }
        Ok(())
    }
}

/// Widest line that a command prints.
const WIDTH: u16 = 100;

/// Prefixes that a difference prints before it only counts.
pub(super) const LISTED: usize = 20;

/// A table without lines. It wraps long cells on a terminal only: elsewhere a row is a line, for grep and awk.
pub(super) fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    if io::stdout().is_terminal() {
        table
            .set_content_arrangement(ContentArrangement::Dynamic)
            .set_width(WIDTH);
    } else {
        table.set_content_arrangement(ContentArrangement::Disabled);
    }
    table
}

pub(super) fn print_table(table: &Table, rows: usize) {
    if rows > 0 {
        for line in table.lines() {
            println!("{}", line.trim());
        }
    }
}

pub(super) fn or(text: &str, otherwise: &str) -> String {
    if text.is_empty() { otherwise } else { text }.to_owned()
}

/// The first `LISTED` items: a region may have a hundred thousand.
pub(super) fn list<T: Display>(sign: &str, what: &str, items: &[T]) {
    for item in items.iter().take(LISTED) {
        println!("  {sign} {what}{item}");
    }
    if items.len() > LISTED {
        println!("  {sign} and {} more", items.len() - LISTED);
    }
}

/// How long until then.
pub(super) fn until(then: Option<Timestamp>) -> String {
    match then {
        Some(then) => duration(then.duration_since(Timestamp::now())),
        None => "-".into(),
    }
}

pub(super) fn age(since: Timestamp) -> String {
    duration(Timestamp::now().duration_since(since))
}

/// Whole seconds, to be short.
fn duration(duration: SignedDuration) -> String {
    format!("{:#}", SignedDuration::from_secs(duration.as_secs().max(0)))
}
