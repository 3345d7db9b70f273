//! `trace`: the steps of the filter on the packets of one source, as they arrive.

use std::{
    io::{self, Write as _},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    cli::{
        client::{Agent, encode},
        output::EXIT_BROKEN_PIPE,
    },
    report::{TraceLine, Traced},
};

/// Prints lines until the trace or the reader of the output ends.
pub(super) async fn trace(
    agent: &Agent<'_>,
    source: &str,
    database: Option<&str>,
    time: Duration,
    json: bool,
) -> Result<ExitCode> {
    let database = database.map(|database| format!("&database={}", encode(database)));
    let path = format!(
        "/v1/trace?source={}&seconds={}{}",
        encode(source),
        time.as_secs(),
        database.unwrap_or_default()
    );
    let mut lines = agent.lines(&path).await?;
    let mut ended = false;
    while let Some(line) = lines.next().await? {
        // Sent to find out whether somebody reads.
        if line.is_empty() {
            continue;
        }
        let parsed = serde_json::from_str(&line).context("parse the agent's answer")?;
        ended |= matches!(parsed, TraceLine::Ended { .. });
        let line = if json { line } else { text(&parsed) };
        let mut stdout = io::stdout();
        match writeln!(stdout, "{line}") {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                return Ok(ExitCode::from(EXIT_BROKEN_PIPE as u8));
            }
            written => written.context("write to standard output")?,
        }
    }
    if !ended {
        bail!(
            "the agent ended in the middle of the trace; its next start ends what the trace attached"
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn text(line: &TraceLine) -> String {
    match line {
        TraceLine::Begun {
            tracing,
            database,
            until,
        } => {
            let to = database.as_ref().map(|name| format!(" to database {name}"));
            format!(
                "tracing packets of {tracing}{} until {until:.0}; Ctrl-C ends it",
                to.unwrap_or_default()
            )
        }
        TraceLine::Packet(packet) => packet_text(packet),
        TraceLine::Lost { lost } => {
            format!("{lost} more packets: too many to be logged, one by one")
        }
        TraceLine::Ended { ended } => format!("the trace has ended: {ended}"),
    }
}

fn packet_text(packet: &Traced) -> String {
    let at = packet.at.strftime("%H:%M:%S%.3fZ");
    let interface = packet.interface.as_deref().unwrap_or("-");
    format!("{at} {interface} {}", packet.text)
}
