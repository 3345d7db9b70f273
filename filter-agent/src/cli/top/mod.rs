//! `top`: a live view of the agent in the terminal.

mod columns;
mod draw;
mod keys;
mod looks;
mod numbers;
mod rates;
mod refused;
mod rows;
mod state;
#[cfg(test)]
mod tests;
mod text;

use std::{
    env, io,
    io::IsTerminal as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use crossterm::event::{Event, EventStream, KeyEventKind};
use futures_util::StreamExt as _;
use jiff::Timestamp;
use ratatui::DefaultTerminal;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc::{UnboundedSender, unbounded_channel},
};

use crate::cli::{client::Agent, progress};

use draw::draw;
use keys::Action;
use looks::{Report, allow, look_on};
use state::State;

/// Time for the first connection, by which it is known whether this user may connect at all.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// How often the screen is drawn without a key or a report, for the ages on it.
const DRAW_INTERVAL: Duration = Duration::from_secs(1);

/// Shows the agent until a key or a signal ends it. An agent that does not answer is shown as that.
///
/// # Errors
/// There is no terminal, it cannot be drawn on, or this user may not ask the agent.
pub(super) async fn top(socket: &Path, interval: Duration) -> Result<()> {
    // A line on stderr would stand in the midst of the screen.
    progress::be_silent();
    let agent = Agent {
        timeout: CONNECT_TIMEOUT,
        ..Agent::new(socket)
    };
    // Any other error may pass, and is shown.
    if let Err(error) = agent.is_running().await
        && let Some(cause) = error.downcast_ref::<io::Error>()
        && cause.kind() == io::ErrorKind::PermissionDenied
    {
        return Err(error);
    }
    check_terminal()?;
    let signals = Signals::listen()?;
    // Also restores the terminal at a panic.
    let shown = match ratatui::try_init() {
        Ok(mut terminal) => {
            let shown = show(&mut terminal, socket, interval, signals).await;
            shown.and(terminal.show_cursor().context("show the cursor"))
        }
        Err(error) => Err(error).context("prepare the terminal"),
    };
    let restored = ratatui::try_restore().context("restore the terminal");
    shown.and(restored)
}

fn check_terminal() -> Result<()> {
    ensure!(
        io::stdin().is_terminal() && io::stdout().is_terminal(),
        "top draws on a terminal, and this is none: use `filter-agent status`, `drops`, `rules` and `regions`"
    );
    let term = env::var("TERM").unwrap_or_default();
    if term.is_empty() || term == "dumb" {
        bail!(
            "top needs a terminal on which it can move the cursor, and TERM is {term:?}: use `filter-agent status`, \
             `drops`, `rules` and `regions`"
        );
    }
    Ok(())
}

/// Signals that end the view, rather than the process with the terminal as it is.
struct Signals([Signal; 3]);

impl Signals {
    fn listen() -> Result<Self> {
        let listen = |kind| signal(kind).context("listen for signals");
        Ok(Self([
            listen(SignalKind::terminate())?,
            listen(SignalKind::interrupt())?,
            listen(SignalKind::hangup())?,
        ]))
    }

    async fn any(&mut self) {
        let [terminate, interrupt, hangup] = &mut self.0;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

async fn show(
    terminal: &mut DefaultTerminal,
    socket: &Path,
    interval: Duration,
    mut signals: Signals,
) -> Result<()> {
    // By the convention of no-color.org: set, and not empty.
    let colours = env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let mut keys = EventStream::new();
    let (reports, mut reported) = unbounded_channel();
    let mut looking = tokio::spawn(look_on(socket.to_owned(), interval, reports.clone()));
    let mut state = State::new(interval, Instant::now());
    loop {
        terminal
            .draw(|frame| draw(frame, &state, colours, Timestamp::now(), Instant::now()))
            .context("draw on the terminal")?;
        tokio::select! {
            () = signals.any() => return Ok(()),
            ended = &mut looking => return ended.context("look at the agent"),
            () = tokio::time::sleep(DRAW_INTERVAL) => {}
            report = reported.recv() => {
                if let Some(report) = report {
                    state.take(report);
                }
            }
            event = keys.next() => {
                let event = event.context("read from the terminal: it is closed")?;
                let event = event.context("read from the terminal")?;
                if let Event::Key(key) = event
                    && key.kind == KeyEventKind::Press
                {
                    match state.press(key, Timestamp::now()) {
                        Some(Action::Quit) => return Ok(()),
                        Some(Action::Allow(wanted)) => {
                            start_allow(socket.to_owned(), wanted, reports.clone());
                        }
                        None => {}
                    }
                }
            }
        }
    }
}

fn start_allow(socket: PathBuf, wanted: state::Wanted, reports: UnboundedSender<Report>) {
    tokio::spawn(async move {
        let answer = allow(&socket, &wanted).await;
        // The view may have ended.
        let _ = reports.send(Report::Allowed(answer));
    });
}

impl State {
    fn take(&mut self, report: Report) {
        match report {
            Report::Look(look, at) => self.take_look(*look, at),
            Report::Events(events) => self.take_events(events),
            Report::Allowed(lines) => self.message = lines,
        }
    }
}
