//! Replies that wait for the disk, for a bounded time: a disk that hangs is not waited for. Pure.

use std::time::Duration;

use anyhow::{Context as _, anyhow};
use jiff::Timestamp;

use crate::{event::Reply, report, saves::Saves, store::Record};

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
    FellBack(Box<report::Decided>, Reply<report::Decided>),
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

    pub fn fell_back(
        decided: report::Decided,
        reply: Reply<report::Decided>,
        now: Timestamp,
    ) -> Self {
        Self {
            until: now + SAVE_TIMEOUT,
            answer: Answer::FellBack(Box::new(decided), reply),
        }
    }

    /// The record that keeps the change for the next start.
    fn record(&self) -> Record {
        match self.answer {
            Answer::Reloaded(..) | Answer::Detached(..) => Record::Confirmed,
            Answer::Temporary(..) => Record::Temporary,
            Answer::FellBack(..) => Record::Window,
        }
    }

    /// The records that tell who made the change, and what a start is not to enforce.
    fn others(&self) -> &'static [Record] {
        match self.answer {
            Answer::Reloaded(..) => &[Record::Window, Record::ChangeId, Record::Policies],
            Answer::Temporary(..) => &[Record::ChangeId, Record::Changes],
            Answer::FellBack(..) => &[Record::ChangeId, Record::Policies],
            Answer::Detached(..) => &[
                Record::Window,
                Record::Temporary,
                Record::LastHits,
                Record::ChangeId,
                Record::Changes,
                Record::Texts,
            ],
        }
    }

    /// Whether the disk has not yet said what became of a record that it waits for.
    pub fn must_wait(&self, saves: &Saves) -> bool {
        let is_under_way = |record: &Record| saves.is_under_way(record);
        is_under_way(&self.record()) || self.others().iter().any(is_under_way)
    }

    /// Whether the agent ends with it.
    pub fn ends_agent(&self) -> bool {
        matches!(self.answer, Answer::Detached(..))
    }

    /// Sends it, with why the records are not on disk as they should be.
    pub fn send(self, saves: &Saves) {
        let record = self.record();
        let is_slow = saves.is_under_way(&record);
        let error = saves.error(&record).map(String::as_str);
        let others = self.others().iter();
        let unnoted = others.filter_map(|record| match saves.is_under_way(record) {
            true => Some("the history is not kept yet: the disk takes too long".to_owned()),
            false => saves.error(record).cloned(),
        });
        let mut unnoted: Vec<String> = unnoted.collect();
        unnoted.dedup();
        match self.answer {
            Answer::Reloaded(mut reloaded, reply) => {
                let error = match error {
                    _ if is_slow => Some(
                        "the policy in force is not kept for the next start yet: the disk takes too long",
                    ),
                    error => error,
                };
                reloaded.plan.warnings.extend(error.map(str::to_owned));
                reloaded.plan.warnings.extend(unnoted);
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
                done.notes.extend(unnoted);
                reply.send(Ok(*done));
            }
            Answer::FellBack(mut decided, reply) => {
                let error = match error {
                    _ if is_slow => Some("the disk takes too long"),
                    error => error,
                };
                let error = error.map(|error| {
                    format!("a start before the end would go on to try the policy: {error}")
                });
                decided.errors.extend(error);
                decided.errors.extend(unnoted);
                reply.send(Ok(*decided));
            }
            Answer::Detached(names, reply) => {
                let others = [Record::Window, Record::Temporary];
                let error = error.or_else(|| {
                    let error = others.iter().find_map(|record| saves.error(record));
                    error.map(String::as_str)
                });
                let error = match (error, saves.error(&Record::LastHits)) {
                    _ if is_slow => "remove the confirmed policy: the disk takes too long",
                    (Some(error), _) => error,
                    (None, Some(error)) => {
                        let error = anyhow!("{error}");
                        let what = "detached: nothing is filtered, but a file is left, which another `filter-agent detach` removes";
                        return reply.send(Err(error.context(what)));
                    }
                    (None, None) => return reply.send(Ok(names)),
                };
                reply.send(Err(anyhow!("{error}")).context(
                    "detached: nothing is filtered, but the next start may enforce the policy again",
                ));
            }
        }
    }
}
