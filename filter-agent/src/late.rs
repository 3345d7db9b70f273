//! Replies that wait for the disk, for a bounded time: a disk that hangs is not waited for. Pure.

use std::time::Duration;

use anyhow::{Context as _, anyhow};
use jiff::Timestamp;

use crate::{event::Reply, report, store::Record};

/// Time that a reply waits for the disk.
const SAVE_TIMEOUT: Duration = Duration::from_secs(1);

/// A reply that waits for a record to be written or removed.
#[derive(Debug)]
pub struct Late {
    pub until: Timestamp,
    answer: Answer,
}

#[derive(Debug)]
enum Answer {
    Reloaded(Box<report::Reloaded>, Reply<report::Reloaded>),
    Detached(Vec<String>, Reply<Vec<String>>),
    Temporary(Box<report::Temporary>, Reply<report::Temporary>),
}

impl Late {
    pub fn reloaded(
        reloaded: report::Reloaded,
        reply: Reply<report::Reloaded>,
        now: Timestamp,
    ) -> Self {
        Self {
            until: now + SAVE_TIMEOUT,
            answer: Answer::Reloaded(Box::new(reloaded), reply),
        }
    }

    pub fn detached(names: Vec<String>, reply: Reply<Vec<String>>, now: Timestamp) -> Self {
        Self {
            until: now + SAVE_TIMEOUT,
            answer: Answer::Detached(names, reply),
        }
    }

    pub fn temporary(
        done: report::Temporary,
        reply: Reply<report::Temporary>,
        now: Timestamp,
    ) -> Self {
        Self {
            until: now + SAVE_TIMEOUT,
            answer: Answer::Temporary(Box::new(done), reply),
        }
    }

    /// The record that it waits for.
    pub fn record(&self) -> Record {
        match self.answer {
            Answer::Reloaded(..) | Answer::Detached(..) => Record::Confirmed,
            Answer::Temporary(..) => Record::Temporary,
        }
    }

    /// Whether the agent ends with it.
    pub fn ends_agent(&self) -> bool {
        matches!(self.answer, Answer::Detached(..))
    }

    /// Sends it. `error`: why the record is not on disk as it should be. `is_slow`: it is on its way there.
    pub fn send(self, error: Option<&str>, is_slow: bool) {
        match self.answer {
            Answer::Reloaded(mut reloaded, reply) => {
                let error = match error {
                    _ if is_slow => Some(
                        "the policy in force is not kept for the next start yet: the disk takes too long",
                    ),
                    error => error,
                };
                reloaded.plan.warnings.extend(error.map(str::to_owned));
                reply.send(Ok(*reloaded));
            }
            Answer::Temporary(mut done, reply) => {
                let error = match error {
                    _ if is_slow => {
                        Some("this is not kept for the next start yet: the disk takes too long")
                    }
                    error => error,
                };
                done.errors.extend(error.map(str::to_owned));
                reply.send(Ok(*done));
            }
            Answer::Detached(names, reply) => {
                let error = match error {
                    _ if is_slow => "remove the confirmed policy: the disk takes too long",
                    None => return reply.send(Ok(names)),
                    Some(error) => error,
                };
                reply.send(Err(anyhow!("{error}")).context(
                    "detached: nothing is filtered, but the next start may enforce the policy again",
                ));
            }
        }
    }
}
