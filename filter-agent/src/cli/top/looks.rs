//! Requests of the view, each with a time limit, apart from the loop that draws.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Result;
use jiff::Timestamp;
use serde_json::json;
use tokio::{sync::mpsc::UnboundedSender, time::MissedTickBehavior};

use super::state::{Look, Wanted};
use crate::{
    cli::{caller::Caller, client::Agent, print::describe_temporary},
    report::{Events, Rules, Temporary},
};

/// Time limit of each request of a look: the view shows an agent that hangs as such, and asks again.
const TIMEOUT: Duration = Duration::from_secs(5);

/// How long a source is allowed.
const ALLOWED_FOR: Duration = Duration::from_hours(1);

/// Answers to the requests. Errors are texts for the screen.
pub(super) enum Report {
    /// When its last answer came.
    Look(Box<Result<Look, String>>, Instant),
    Events(Result<Events, String>),
    /// Result of an `allow`, in lines.
    Allowed(Vec<String>),
}

/// Looks at the agent at each interval, until nobody takes the reports.
pub(super) async fn look_on(socket: PathBuf, interval: Duration, reports: UnboundedSender<Report>) {
    let agent = Agent {
        timeout: TIMEOUT,
        ..Agent::new(&socket)
    };
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut seen = Seen::default();
    loop {
        ticks.tick().await;
        let look = look(&agent).await.map_err(text);
        let is_answered = look.is_ok();
        let report = Report::Look(Box::new(look), Instant::now());
        if reports.send(report).is_err() {
            return;
        }
        if is_answered {
            let events = seen.next(&agent).await.map_err(text);
            let _ = reports.send(Report::Events(events));
        }
    }
}

async fn look(agent: &Agent<'_>) -> Result<Look> {
    Ok(Look {
        rules: agent.get::<Rules>("/v1/rules").await?.rules,
        drops: agent.get("/v1/drops").await?,
        // At the end: rates are of this moment.
        status: agent.get("/v1/status").await?,
    })
}

/// The lines of the log that were read.
#[derive(Default)]
struct Seen {
    since: Option<Timestamp>,
    last: u64,
}

impl Seen {
    /// Reads the lines that came since.
    async fn next(&mut self, agent: &Agent<'_>) -> Result<Events> {
        let path = format!("/v1/events?after={}", self.last);
        let mut events: Events = agent.get(&path).await?;
        // Another agent's numbers begin at 1 again.
        if self.since.replace(events.since) != Some(events.since) && self.last > 0 {
            events = agent.get("/v1/events").await?;
            self.since = Some(events.since);
            self.last = 0;
        }
        if let Some(last) = events.events.last() {
            self.last = last.number;
        }
        Ok(events)
    }
}

/// Does what `allow DATABASE SOURCE --for 1h --label top` does, and returns what that prints.
pub(super) async fn allow(socket: &Path, wanted: &Wanted) -> Vec<String> {
    let caller = Caller::find();
    let change = json!({
        "allow": {
            "database": wanted.database,
            "source": wanted.source,
            "seconds": ALLOWED_FOR.as_secs(),
            "label": "top",
        },
        "caller": caller.address(),
    });
    let agent = Agent::new(socket);
    let done: Result<Temporary> = agent.post("/v1/temporary", change.to_string()).await;
    match done {
        Ok(done) => {
            let mut lines = vec![describe_temporary(&done)];
            lines.extend(done.cut.iter().map(ToString::to_string));
            lines.extend(done.notes.iter().map(|note| format!("note: {note}")));
            lines.extend(done.errors.iter().map(|error| format!("error: {error}")));
            lines
        }
        Err(error) => vec![format!("error: {}", text(error))],
    }
}

fn text(error: anyhow::Error) -> String {
    format!("{error:#}")
}
