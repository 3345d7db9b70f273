//! What all routes share: the ways to the agent and to the thread that owns the filter.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use serde::Serialize;
use tokio::sync::{mpsc::UnboundedSender, oneshot, watch};

use super::answers::Written;
use crate::{
    clock::{Clock, Now},
    enforcer::{Enforcer, Handle, Observed},
    event::{Event, Reply, Request},
    log::Entry,
    metrics::scrape::Scraper,
    refusal::Refusal,
    snapshot::Snapshot,
    threads,
};

#[derive(Clone)]
pub struct Shared {
    pub events: UnboundedSender<Event>,
    pub snapshot: watch::Receiver<Snapshot>,
    pub enforcer: Handle,
    pub clock: Clock,
    pub scraper: Arc<Scraper>,
}

impl Shared {
    /// Has the agent answer a request.
    pub(super) async fn ask<T>(&self, request: impl FnOnce(Reply<T>) -> Request) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        let _ = self.events.send(Event::Request(request(Reply(reply))));
        let ending = "the agent is ending, and did not do it";
        let answer = answer.await;
        answer.map_err(|_| Refusal::Unavailable(ending.into()))?
    }

    /// Has the thread that owns the filter do a job.
    pub(super) async fn call<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Enforcer) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let done = self.enforcer.call(job).await;
        done.map_err(|error| Refusal::or(error, Refusal::Unavailable))?
    }

    pub(super) async fn observe(&self, verify: bool) -> Result<Observed> {
        let observed = self.call(move |enforcer| enforcer.observe(verify)).await;
        let (observed, entries) = observed?;
        entries.into_iter().for_each(Entry::log);
        Ok(observed)
    }

    /// Makes an answer of the agent's state and writes it out, on a thread of its own: regions may hold a million prefixes,
    /// and whoever may ask may ask all the time.
    pub(super) async fn write<T: Serialize>(
        &self,
        make: impl FnOnce(Snapshot, Now) -> Result<T> + Send + 'static,
    ) -> Result<Written> {
        let (snapshot, clock) = (self.snapshot.clone(), self.clock);
        let write = move || {
            let snapshot = snapshot.borrow().clone();
            let answer = make(snapshot, clock.now())?;
            let text = serde_json::to_vec(&answer).context("write the answer")?;
            Ok(Written(text))
        };
        threads::run_on_thread("answer", write).await.flatten()
    }
}
