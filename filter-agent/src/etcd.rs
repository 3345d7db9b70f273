//! Follows the documents of this host in etcd, and writes its status there. The only user of `etcd-client`; it judges
//! nothing, and keeps nothing of one connection for the next.
//!
//! The watch only rings; what is reported is a linearizable read of all keys. So no event can be lost, come twice or come
//! late, and no revision has to be resumed at that etcd has compacted, or has not reached again after a restore.

pub mod client;
mod connection;
mod failure;
mod files;
mod own_keys;

use std::{future::pending, pin::pin, time::Duration};

use anyhow::{Result, bail};
use backon::{BackoffBuilder as _, ExponentialBuilder};
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep, sleep_until},
};

pub use own_keys::Reports;

use crate::{
    clock::BootTime,
    etcd::{connection::Connection, files::Files, own_keys::Writer},
    fleet::{Answer, Found, News, Settings},
};

/// Pauses before another connection, each a random part of these.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Interval of reads that no watch asked for, a quarter more or less at random.
const READ_INTERVAL: Duration = Duration::from_secs(60);

/// Time allowed to a watch to announce what a read found already.
const RING_TIMEOUT: Duration = Duration::from_secs(5);

/// Documents that are followed, until it is dropped.
#[must_use]
pub struct Following {
    task: JoinHandle<()>,
}

impl Drop for Following {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Follows documents by a task of the current runtime, and writes what is reported of the host.
pub fn follow(
    settings: Settings,
    reports: Reports,
    tell: impl Fn(News) + Send + Sync + 'static,
) -> Following {
    Following {
        task: tokio::spawn(run(settings, reports, tell)),
    }
}

async fn run(settings: Settings, reports: Reports, tell: impl Fn(News)) {
    if settings.endpoints.is_empty() {
        return;
    }
    let mut pauses = pauses();
    let mut healed = 0;
    let own = settings.own.clone();
    let mut writer = own.map(|keys| Writer::new(keys, reports));
    // At random, so that hosts with the same file do not all take the first.
    let mut next = fastrand::usize(..settings.endpoints.len());
    loop {
        let endpoint = &settings.endpoints[next];
        let begun = Instant::now();
        let attended = attend(endpoint, &settings, &mut healed, writer.as_mut(), &tell).await;
        let Err(error) = attended else {
            continue;
        };
        tell(News::Lost(format!("{endpoint}: {error:#}")));
        next = (next + 1) % settings.endpoints.len();
        // A member that answers once and hangs up again is no reason to hurry.
        if begun.elapsed() >= LONGEST_PAUSE {
            pauses = self::pauses();
        }
        // From zero on: many hosts that lost the same etcd come back spread over the whole pause.
        let pause = pauses.next().unwrap_or(LONGEST_PAUSE);
        sleep(pause.mul_f64(fastrand::f64())).await;
    }
}

fn pauses() -> impl Iterator<Item = Duration> {
    ExponentialBuilder::new()
        .with_min_delay(FIRST_PAUSE)
        .with_max_delay(LONGEST_PAUSE)
        .without_max_times()
        .build()
}

/// Stays with one endpoint, until it has to be connected to anew: its certificates changed, or a key may be watched now.
///
/// # Errors
/// Why the connection cannot be made, or ended.
async fn attend(
    endpoint: &str,
    settings: &Settings,
    healed: &mut u64,
    writer: Option<&mut Writer>,
    tell: &impl Fn(News),
) -> Result<()> {
    let files = Files::read(settings).await?;
    let connection = Connection::open(endpoint, &files, &settings.databases).await?;
    let mut clients = connection.clients();
    let writing = async {
        match writer {
            Some(writer) => writer.write(&mut clients, tell).await,
            None => pending().await,
        }
    };
    // Side by side: a write that is not answered holds up no read.
    tokio::select! {
        ended = read_when_rung(connection, &files, healed, tell) => ended,
        never = writing => match never {},
    }
}

async fn read_when_rung(
    mut connection: Connection,
    files: &Files,
    healed: &mut u64,
    tell: &impl Fn(News),
) -> Result<()> {
    // After every watch stands: what is written from now on rings, what was written before is read.
    let mut rang = BootTime::now();
    let answer = connection.read().await?;
    let mut known = revisions(&answer);
    let report = |answer, healed, rang| {
        tell(News::Answer {
            answer,
            healed,
            rang,
        });
    };
    report(answer, *healed, rang);
    let mut changed = pin!(files.changed());
    let mut read_at = next_read();
    let mut ring_by = None;
    loop {
        let is_rung = tokio::select! {
            rang = connection.rang() => rang.map(|()| true)?,
            () = sleep_until(read_at) => false,
            () = sleep_until(ring_by.unwrap_or(read_at)), if ring_by.is_some() => {
                *healed += 1;
                bail!("the watch did not announce a change that a read found");
            }
            () = &mut changed => return Ok(()),
        };
        rang = BootTime::now();
        let answer = connection.read().await?;
        let found = revisions(&answer);
        if is_rung {
            ring_by = None;
        } else if connection
            .unwatched()
            .any(|name| is_readable(&answer, name))
        {
            report(answer, *healed, rang);
            return Ok(());
        } else if found != known {
            ring_by = Some(Instant::now() + RING_TIMEOUT);
        }
        known = found;
        read_at = next_read();
        report(answer, *healed, rang);
    }
}

fn next_read() -> Instant {
    Instant::now() + READ_INTERVAL.mul_f64(0.75 + fastrand::f64() / 2.0)
}

fn is_readable(answer: &Answer, database: &str) -> bool {
    !matches!(
        answer.documents.get(database),
        None | Some(Found::Unreadable(_))
    )
}

/// Tells two answers apart: the era, and the revision of each document, if there is one.
fn revisions(answer: &Answer) -> (u64, Vec<Option<i64>>) {
    let revision = |found: &Found| match found {
        Found::Value(value) => Some(value.mod_revision),
        Found::Missing | Found::Unreadable(_) => None,
    };
    (
        answer.era,
        answer.documents.values().map(revision).collect(),
    )
}
