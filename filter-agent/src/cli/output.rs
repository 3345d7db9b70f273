//! Output: JSON or text, tables, exit statuses.

use std::{
    fmt::{self, Display},
    io::{self, IsTerminal as _, Write as _},
    process::{self, ExitCode},
    sync::Arc,
};

use anyhow::{Context as _, Result};
use comfy_table::{ContentArrangement, Table, presets};
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use signal_hook::{consts::SIGPIPE, flag::register_conditional_shutdown};

use crate::{cli::args::Output, text::written_out};

/// The exit status that a shell reports for a process ended by SIGPIPE.
pub(super) const EXIT_BROKEN_PIPE: i32 = 128 + SIGPIPE;

/// Returns exit status 1 if the printed output contains an error.
pub(super) fn failure_if(failed: bool) -> ExitCode {
    if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

/// Ends the process when the reader of its output ends, as in `status | head -1`. Call it when only printing is left:
/// before that, a broken pipe is the agent's and an error to report.
pub(super) fn end_with_the_reader() -> Result<()> {
    register_conditional_shutdown(SIGPIPE, EXIT_BROKEN_PIPE, Arc::new(true.into()))
        .context("watch for a closed pipe")?;
    Ok(())
}

/// Exits with 1 where stdout takes nothing.
pub(super) fn print_line(line: fmt::Arguments<'_>) {
    print_raw(&written_out(&line.to_string()));
}

/// Of JSON, whose strings have no control characters, but those from U+0080 on, which belong to them.
pub(super) fn print_raw(line: &str) {
    if let Err(error) = writeln!(io::stdout(), "{line}") {
        eprintln!(
            "filter-agent: write the answer to stdout: {error}; a change that was asked for is made"
        );
        process::exit(1);
    }
}

impl Output {
    pub(super) fn print<T: Serialize>(&self, value: &T, text: impl Fn(&T)) -> Result<()> {
        end_with_the_reader()?;
        if self.json {
            let json = serde_json::to_string_pretty(value).context("write JSON")?;
            print_raw(&json);
        } else {
            text(value);
        }
        Ok(())
    }
}

/// Widest line that a command prints.
const WIDTH: u16 = 100;

/// Prefixes that a difference lists; the rest are only counted.
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
            say!("{}", line.trim());
        }
    }
}

pub(super) fn or(text: &str, otherwise: &str) -> String {
    if text.is_empty() { otherwise } else { text }.to_owned()
}

/// Prints the first `LISTED` items: a region may have a hundred thousand.
pub(super) fn list<T: Display>(sign: &str, what: &str, items: &[T]) {
    for item in items.iter().take(LISTED) {
        say!("  {sign} {what}{item}");
    }
    if items.len() > LISTED {
        say!("  {sign} and {} more", items.len() - LISTED);
    }
}

/// The time until then.
pub(super) fn until(then: Option<Timestamp>) -> String {
    match then {
        Some(then) => duration(then.duration_since(Timestamp::now())),
        None => "-".into(),
    }
}

pub(super) fn age(since: Timestamp) -> String {
    duration(Timestamp::now().duration_since(since))
}

/// Rounds down to whole seconds.
fn duration(duration: SignedDuration) -> String {
    format!("{:#}", SignedDuration::from_secs(duration.as_secs().max(0)))
}
