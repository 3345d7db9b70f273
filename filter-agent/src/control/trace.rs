//! `POST /trace`: lines of JSON, as long as a trace lasts and its client reads them.

use std::{
    convert::Infallible,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use axum::{
    Extension,
    body::{Body, Bytes},
    extract::State,
    http::header::CONTENT_TYPE,
    response::{IntoResponse as _, Response},
};
use futures_util::stream;
use serde::Deserialize;

use super::{
    answers::{Failed, Params},
    limits::{AnswerTime, CLIENT_TIMEOUT},
    shared::Shared,
};
use crate::{
    enforcer::{Handle, TraceRequest, USUAL_TRACE},
    kernel::traced::Traced,
    refusal::Refusal,
    report::{By, TraceLine},
    temporary::parse_source,
    threads,
};

/// How often lines are read.
const READ_INTERVAL: Duration = Duration::from_millis(100);

/// How often a line without anything in it is sent, where there is no other: only by writing is it found out that a client has
/// gone away whose machine does not say so.
const BEAT_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TraceQuery {
    source: String,
    database: Option<String>,
    seconds: Option<u64>,
}

pub(super) async fn trace(
    State(shared): State<Shared>,
    Extension(by): Extension<Option<By>>,
    Params(query): Params<TraceQuery>,
) -> Result<Response, Failed> {
    let TraceQuery {
        source,
        database,
        seconds,
    } = query;
    let source = parse_source(&source)
        .map_err(|error| Refusal::Invalid(format!("trace {source}: {error:#}")))?;
    let time = seconds.map_or(USUAL_TRACE, Duration::from_secs);
    let request = TraceRequest {
        source,
        database,
        time,
        by,
    };
    let prepared = shared.call(|enforcer| enforcer.prepare_trace(request));
    let (number, place) = prepared.await?;
    let ending = Ending {
        enforcer: shared.enforcer.clone(),
        number,
    };
    // No change waits for the verifier.
    let load = move || Traced::load(&place, source);
    let loaded = threads::run_on_thread("load-trace", load).await;
    let loaded = loaded.context("load the programs of a trace").flatten();
    let begun = shared.call(move |enforcer| enforcer.begin_trace(number, loaded));
    let first = begun.await?;
    let reading = Reading {
        ending,
        next: vec![first],
        is_over: false,
    };
    let body = Body::from_stream(stream::unfold(reading, Reading::read));
    let mut response = ([(CONTENT_TYPE, "application/x-ndjson")], body).into_response();
    response
        .extensions_mut()
        .insert(AnswerTime(time + CLIENT_TIMEOUT));
    Ok(response)
}

/// Ends the trace with its client.
struct Ending {
    enforcer: Handle,
    number: u64,
}

impl Drop for Ending {
    fn drop(&mut self) {
        let number = self.number;
        self.enforcer
            .send(move |enforcer| enforcer.end_trace(Some(number), "its client has ended"));
    }
}

struct Reading {
    ending: Ending,
    next: Vec<TraceLine>,
    is_over: bool,
}

impl Reading {
    /// Returns the next lines as they are sent, once there are any.
    async fn read(mut self) -> Option<(Result<Bytes, Infallible>, Self)> {
        let number = self.ending.number;
        let beat = Instant::now() + BEAT_INTERVAL;
        while self.next.is_empty() && !self.is_over && Instant::now() < beat {
            tokio::time::sleep(READ_INTERVAL).await;
            let read = self.ending.enforcer.call(move |e| e.read_trace(number));
            match read.await.flatten() {
                Ok(lines) => self.next = lines,
                Err(error) => {
                    let ended = format!("{error:#}");
                    self.next.push(TraceLine::Ended { ended });
                }
            }
        }
        if self.is_over {
            return None;
        }
        let is_last = |line: &TraceLine| matches!(line, TraceLine::Ended { .. });
        self.is_over = self.next.iter().any(is_last);
        let mut text = String::new();
        for line in self.next.drain(..) {
            // Fails for no value of this type.
            text.push_str(&serde_json::to_string(&line).unwrap_or_default());
            text.push('\n');
        }
        if text.is_empty() {
            text.push('\n');
        }
        Some((Ok(text.into()), self))
    }
}
