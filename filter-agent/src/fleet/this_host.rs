//! This host in the fleet: its name, what it reported of itself, and what came of it. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use jiff::{SignedDuration, Timestamp};

use super::{
    OwnKeys, Settings, Unwritten,
    host_status::{HostStatus, Packets},
    state::State,
};
use crate::{
    clock::BootTime,
    policy::{Policy, check_host},
    report,
};

/// Longest time between two reports.
const REPORT_INTERVAL: SignedDuration = SignedDuration::from_mins(10);

/// How often packets are counted while a rollout is in force here, for who watches it. At other times they are not: the
/// status is no telemetry.
const COUNT_INTERVAL: SignedDuration = SignedDuration::from_secs(5);

#[derive(Clone, Debug, Default)]
pub struct ThisHost {
    /// The host's own name, for a policy that gives it no other.
    own_name: String,
    /// The host's present life. `None`: it is not known.
    boot: Option<String>,
    /// Changes that etcd did not announce.
    pub healed: u64,
    /// When the last answer was announced, and when the change that it led to was begun.
    pub rang: BootTime,
    pub accepted: BootTime,
    /// The keys and members that are followed at present.
    pub followed: Option<Settings>,
    /// Errors of the kernel's last comparison with the policy.
    pub not_verified: Vec<String>,
    /// When the status was last written to etcd.
    pub written: Option<Timestamp>,
    /// Since when it is not, and why.
    pub unwritten: Option<(Timestamp, Unwritten)>,
    /// By database: milliseconds until its document was in force.
    pub enforced_ms: BTreeMap<String, f64>,
    /// Of databases with a rollout.
    pub packets: BTreeMap<String, Packets>,
    /// When they were last asked for.
    asked: Option<Timestamp>,
    reported: Option<(Arc<HostStatus>, Timestamp)>,
}

impl ThisHost {
    pub fn new(own_name: String, boot: Option<String>) -> Self {
        Self {
            own_name,
            boot,
            ..Self::default()
        }
    }

    /// The name of the host in the fleet.
    pub fn name(&self, policy: &Policy) -> String {
        let fleet = policy.fleet.as_ref();
        let host = fleet.and_then(|fleet| fleet.host.clone());
        host.unwrap_or_else(|| self.own_name.clone())
    }

    /// The keys that it writes.
    ///
    /// # Errors
    /// It can have none: its name or its present life is not known.
    pub fn keys(&self, policy: &Policy) -> Result<OwnKeys, String> {
        let host = self.name(policy);
        check_host(&host)
            .map_err(|error| format!("{error}; name it in the policy, with `host`"))?;
        let boot = self.boot.clone();
        let boot = boot.ok_or("the kernel's boot id cannot be read")?;
        Ok(OwnKeys { host, boot })
    }

    /// Notes that documents came into force.
    pub fn enforced(&mut self, before: &State, after: &State, milliseconds: f64) {
        let revision = |state: &State, name| state.documents().get(name).map(|it| it.mod_revision);
        for name in after.documents().keys() {
            if revision(before, name) != revision(after, name) {
                let rounded = (milliseconds * 10.0).round() / 10.0;
                self.enforced_ms.insert(name.clone(), rounded);
            }
        }
    }

    /// Whether packets have to be counted. `rolled_out`: databases with a rollout that is in force here.
    pub fn is_count_due(&mut self, rolled_out: &BTreeSet<&String>, now: Timestamp) -> bool {
        self.packets.retain(|name, _| rolled_out.contains(name));
        if rolled_out.is_empty() {
            self.asked = None;
            return false;
        }
        let asked = self.asked;
        let is_due = asked.is_none_or(|asked| now.duration_since(asked) >= COUNT_INTERVAL);
        if is_due {
            self.asked = Some(now);
        }
        is_due
    }

    /// The status to report now, if it is news or the last one is old. `status`: `None` where nothing is followed.
    pub fn report(
        &mut self,
        status: Option<HostStatus>,
        now: Timestamp,
    ) -> Option<Arc<HostStatus>> {
        let Some(status) = status else {
            self.reported = None;
            return None;
        };
        let is_due = self.reported.as_ref().is_none_or(|(reported, at)| {
            !reported.reports_the_same(&status) || now.duration_since(*at) >= REPORT_INTERVAL
        });
        if !is_due {
            return None;
        }
        self.reported = Some((status.clone().into(), now));
        Some(status.limited().into())
    }

    /// Notes what came of a status. Returns whether that is news.
    pub fn status_written(&mut self, result: Result<(), Unwritten>, now: Timestamp) -> bool {
        let before = self.unwritten.take();
        match result {
            Ok(()) => {
                self.written = Some(now);
                before.is_some()
            }
            Err(why) => {
                let is_news = before.as_ref().is_none_or(|(_, before)| *before != why);
                let since = before.map_or(now, |(since, _)| since);
                self.unwritten = Some((since, why));
                is_news
            }
        }
    }
}

impl Unwritten {
    /// One line about a host of this name.
    pub fn describe(&self, host: &str) -> String {
        match self {
            Self::NameTaken => format!(
                "another host of the fleet has the name {host}: no status of this one is written, its documents are followed \
                 all the same; give one of them another name (`host`), and a certificate for it"
            ),
            Self::Failed(why) => format!("the status of this host is not written to etcd: {why}"),
        }
    }

    pub fn reported(&self, host: &str, at: Timestamp) -> report::Error {
        report::Error {
            at,
            text: self.describe(host),
        }
    }
}
