//! The keys that this host writes: its status, and that it is alive. A failure here ends nothing else.

use std::{convert::Infallible, sync::Arc, time::Duration};

use anyhow::{Context as _, anyhow};
use backon::{BackoffBuilder as _, ExponentialBuilder};
use etcd_client::{
    Compare, CompareOp, KvClient, LeaseClient, LeaseKeepAliveStream, LeaseKeeper, PutOptions, Txn,
    TxnOp,
};
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until},
};

use crate::{
    etcd::{
        connection::{value_of, within},
        failure::Failure,
    },
    fleet::{News, OwnKeys, Unwritten, host_status::HostStatus},
};

pub(super) const HOSTS: &str = "/filter-agent/v1/hosts/";
pub(super) const ALIVE: &str = "/filter-agent/v1/alive/";

/// Length of the lease, which is renewed three times as often.
const LEASE_SECONDS: i64 = 30;
const RENEWAL_INTERVAL: Duration = Duration::from_secs(10);

/// Interval of looks at the key while it is another's, and how long it may be: what this host wrote before a reboot ends
/// with its lease, which a new leader of etcd prolongs once.
const LOOK_INTERVAL: Duration = Duration::from_secs(3);
const TAKEN_AFTER: Duration = Duration::from_secs(40);

/// Good news wait for a random time up to this: a change reaches many hosts at once.
const LONGEST_DELAY: Duration = Duration::from_millis(200);

/// Pauses before another attempt, each a random part of these.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// The newest status to write. `None`: there is none yet.
pub type Reports = watch::Receiver<Option<Arc<HostStatus>>>;

/// Writes the keys, over any number of connections.
pub struct Writer {
    keys: OwnKeys,
    reports: Reports,
    /// Since when the name is another host's.
    taken_since: Option<Instant>,
}

/// The clients that one connection has for them.
pub struct Clients {
    pub kv: KvClient,
    pub lease: LeaseClient,
}

/// How a connection's lease is renewed.
struct Lease {
    keeper: LeaseKeeper,
    answers: LeaseKeepAliveStream,
}

impl Writer {
    pub fn new(keys: OwnKeys, reports: Reports) -> Self {
        Self {
            keys,
            reports,
            taken_since: None,
        }
    }

    /// Writes them as long as the connection lasts.
    pub async fn write(&mut self, clients: &mut Clients, tell: &impl Fn(News)) -> Infallible {
        let pauses = || {
            ExponentialBuilder::new()
                .with_min_delay(FIRST_PAUSE)
                .with_max_delay(LONGEST_PAUSE)
                .without_max_times()
                .build()
        };
        let mut next = pauses();
        // A look of long ago says nothing: leases stand still while etcd does.
        self.taken_since = None;
        loop {
            let begun = Instant::now();
            if let Err(failure) = self.write_once(clients, tell).await {
                let why = format!("{:#}", anyhow::Error::from(failure));
                tell(News::Status(Err(Unwritten::Failed(why))));
            }
            if begun.elapsed() >= LONGEST_PAUSE {
                next = pauses();
            }
            let pause = next.next().unwrap_or(LONGEST_PAUSE);
            sleep(pause.mul_f64(fastrand::f64())).await;
        }
    }

    /// Writes until the name or the lease is lost.
    async fn write_once(
        &mut self,
        clients: &mut Clients,
        tell: &impl Fn(News),
    ) -> Result<(), Failure> {
        let mut lease = self.claim(clients, tell).await?;
        let mut renew_at = Instant::now() + RENEWAL_INTERVAL;
        // The status that another connection wrote may be lost, if etcd was restored since.
        self.reports.mark_changed();
        let mut write_at = None;
        loop {
            tokio::select! {
                // Nothing comes after an error: the daemon ends.
                Ok(()) = self.reports.changed() => {
                    let delay = match self.reports.borrow_and_update().as_ref() {
                        None => continue,
                        Some(status) if status.has_errors() => Duration::ZERO,
                        Some(_) => LONGEST_DELAY.mul_f64(fastrand::f64()),
                    };
                    let at = Instant::now() + delay;
                    write_at = Some(write_at.map_or(at, |before: Instant| before.min(at)));
                }
                () = sleep_until(write_at.unwrap_or(renew_at)), if write_at.is_some() => {
                    write_at = None;
                    if !self.write_status(clients).await? {
                        return Ok(());
                    }
                    tell(News::Status(Ok(())));
                }
                () = sleep_until(renew_at) => {
                    if !lease.renew().await? {
                        return Ok(());
                    }
                    renew_at = Instant::now() + RENEWAL_INTERVAL;
                }
            }
        }
    }

    /// Returns once the host's name is this one's.
    async fn claim(
        &mut self,
        clients: &mut Clients,
        tell: &impl Fn(News),
    ) -> Result<Lease, Failure> {
        loop {
            if let Some(lease) = self.try_claim(clients).await? {
                self.taken_since = None;
                return Ok(lease);
            }
            let since = *self.taken_since.get_or_insert_with(Instant::now);
            if since.elapsed() >= TAKEN_AFTER {
                tell(News::Status(Err(Unwritten::NameTaken)));
            }
            sleep(LOOK_INTERVAL.mul_f64(0.75 + fastrand::f64() / 2.0)).await;
        }
    }

    /// `None`: another host has it, or had until its lease ends.
    async fn try_claim(&self, clients: &mut Clients) -> Result<Option<Lease>, Failure> {
        let key = format!("{ALIVE}{}", self.keys.host);
        let found = within(clients.kv.get(key.as_str(), None)).await;
        let found = value_of(&key, found.map_err(|it| it.of(&key))?.0)?;
        let is_unchanged = match found {
            Some(value) if value.value != self.keys.boot.as_bytes() => return Ok(None),
            // Of this host's agent before a restart: from then on it is under the new lease.
            Some(value) => {
                Compare::mod_revision(key.as_str(), CompareOp::Equal, value.mod_revision)
            }
            None => Compare::create_revision(key.as_str(), CompareOp::Equal, 0),
        };
        let granted = within(clients.lease.grant(LEASE_SECONDS, None)).await;
        let id = granted.map_err(|it| it.of("a lease"))?.0.id;
        let options = PutOptions::new().with_lease(id);
        let put = TxnOp::put(key.as_str(), self.keys.boot.as_str(), Some(options));
        let claim = Txn::new().when([is_unchanged]).and_then([put]);
        let claimed = within(clients.kv.txn(claim)).await;
        if !claimed.map_err(|it| it.of(&key))?.0.succeeded {
            // Another was faster. The lease ends by itself.
            return Ok(None);
        }
        let renewed = within(clients.lease.keep_alive(id)).await;
        let (keeper, answers) = renewed.map_err(|it| it.of("renew the lease"))?;
        Ok(Some(Lease { keeper, answers }))
    }

    /// Writes the newest status, if the name is this host's still. Returns whether it is.
    async fn write_status(&mut self, clients: &mut Clients) -> Result<bool, Failure> {
        let Some(status) = self.reports.borrow_and_update().clone() else {
            return Ok(true);
        };
        let text = serde_json::to_vec(status.as_ref());
        let text = text.context("encode the status").map_err(Failure::from)?;
        let OwnKeys { host, boot } = &self.keys;
        let (alive, key) = (format!("{ALIVE}{host}"), format!("{HOSTS}{host}"));
        let is_ours = Compare::value(alive, CompareOp::Equal, boot.as_str());
        let put = TxnOp::put(key.as_str(), text, None);
        let write = Txn::new().when([is_ours]).and_then([put]);
        let written = within(clients.kv.txn(write)).await;
        Ok(written.map_err(|it| it.of(&key))?.0.succeeded)
    }
}

impl Lease {
    /// Returns whether it goes on: it may have ended while etcd could not be reached.
    async fn renew(&mut self) -> Result<bool, Failure> {
        within(self.keeper.keep_alive()).await?;
        let answer = within(self.answers.message()).await?;
        let answer =
            answer.ok_or_else(|| Failure::Other(anyhow!("etcd ended the lease's renewal")));
        Ok(answer?.0.ttl > 0)
    }
}
