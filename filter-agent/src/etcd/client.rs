//! Requests of a person who writes documents: one connection, a request after the other.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, anyhow, bail};
use etcd_client::{
    Compare, CompareOp, GetOptions, KvClient, MaintenanceClient, Txn, TxnOp,
    proto::{PbKeyValue, PbRangeResponse, PbTxnOpResponse},
};

use crate::{
    etcd::{
        connection::{ERA, MAX_ANSWER, RULES, connect, era_of, key_of, value_of, within},
        failure::Failure,
        files::Files,
        own_keys::{ALIVE, HOSTS},
    },
    fleet::{
        Settings, Value,
        host_status::{Cluster, DatabaseStatus, HostStatus},
    },
    policy::{Rollout, check_document, check_host, check_name},
    report::FleetState,
};

pub struct Client {
    kv: KvClient,
    maintenance: MaintenanceClient,
    /// The member that answers.
    endpoint: String,
    /// Names the user's certificate, for errors about a missing right.
    user: String,
}

/// Everything that etcd holds of a fleet.
#[derive(Debug, Default)]
pub struct Overview {
    /// Which etcd answered.
    pub cluster: Cluster,
    pub era: u64,
    /// Revisions of the documents, by database.
    pub documents: BTreeMap<String, i64>,
    /// Rollouts that are in them.
    pub rollouts: BTreeMap<String, Rollout>,
    /// Reports of hosts. `None`: the host wrote something else.
    pub hosts: BTreeMap<String, Option<HostStatus>>,
    /// The present life of each host that is there.
    pub alive: BTreeMap<String, String>,
}

impl Overview {
    pub fn reports(&self) -> impl Iterator<Item = (&String, &HostStatus)> {
        let hosts = self.hosts.iter();
        hosts.filter_map(|(host, status)| Some((host, status.as_ref()?)))
    }

    /// The report of a host that can be read.
    pub fn report(&self, host: &str) -> Option<&HostStatus> {
        self.hosts.get(host)?.as_ref()
    }

    /// Whether a host's report was made before it could know this revision of a document, an era that was raised since, or
    /// this etcd: a backup holds what hosts reported to another one.
    pub fn is_earlier(
        &self,
        status: &HostStatus,
        reported: &DatabaseStatus,
        revision: Option<i64>,
    ) -> bool {
        use FleetState::{Held, Unreadable};
        // In these states a host has seen no document of this etcd.
        let is_behind = !matches!(reported.state, Held | Unreadable) && reported.seen < revision;
        self.is_of_earlier_era(status) || self.is_elsewhere(status) || is_behind
    }

    /// Whether the era was raised since a host reported: it believes this etcd, once it reads that.
    pub fn is_of_earlier_era(&self, status: &HostStatus) -> bool {
        status.era.unwrap_or_default() < self.era
    }

    /// Whether a host has reported to another etcd, and not to this one: one that does not believe this one has.
    pub fn is_elsewhere(&self, status: &HostStatus) -> bool {
        let cluster = status.cluster.as_ref();
        cluster.is_some_and(|cluster| *cluster != self.cluster) && !status.is_holding()
    }

    /// Whether a host is there, in the life that it reported.
    pub fn is_alive(&self, host: &str, status: &HostStatus) -> bool {
        self.alive.get(host) == Some(&status.boot)
    }
}

/// A value was changed by somebody else, and is not overwritten. `None`: it is gone.
#[derive(Debug)]
pub struct Changed(pub Option<i64>);

/// Said of an error before anything was written.
#[derive(Debug)]
pub struct NothingWritten;

impl Client {
    /// Connects to the first member that answers.
    ///
    /// # Errors
    /// Why each of them does not.
    pub async fn connect(settings: &Settings) -> Result<Self> {
        let files = Files::read(settings).await?;
        let user = settings.cert_file.as_ref();
        let user = user.map(|file| format!(", as the user that {} names", file.display()));
        let user = user.unwrap_or_default();
        let mut errors = Vec::new();
        for endpoint in &settings.endpoints {
            let mut client = match connect(endpoint, &files).await {
                Ok(client) => Self {
                    kv: client.kv_client().max_decoding_message_size(MAX_ANSWER),
                    maintenance: client.maintenance_client(),
                    endpoint: endpoint.clone(),
                    user: user.clone(),
                },
                Err(error) => {
                    errors.push(format!("{endpoint}: {error:#}"));
                    continue;
                }
            };
            // The connection is made with the first request. A missing right is an answer.
            match within(client.kv.get(ERA, None)).await {
                Ok(_) => return Ok(client),
                Err(failure) => match failure.at_first() {
                    denied @ Failure::Denied(_) => {
                        return Err(client.failed(denied, &format!("read {ERA}")));
                    }
                    failure => {
                        errors.push(format!("{endpoint}: {:#}", anyhow::Error::from(failure)));
                    }
                },
            }
        }
        bail!("reach etcd: {}", errors.join("; "))
    }

    /// The document of a database; of an earlier `revision`, as far as etcd still has it. `None`: there is none.
    ///
    /// # Errors
    /// No answer, no right to read it, or a revision that is compacted or yet to come.
    pub async fn document(
        &mut self,
        database: &str,
        revision: Option<i64>,
    ) -> Result<Option<Value>> {
        let key = key_of(database);
        let options = revision.map(|revision| GetOptions::new().with_revision(revision));
        let value = self.get(&key, options).await?;
        Ok(value.map(Value::from))
    }

    async fn get(&mut self, key: &str, options: Option<GetOptions>) -> Result<Option<PbKeyValue>> {
        let found = within(self.kv.get(key, options)).await;
        let found = found.map_err(|failure| self.failed(failure, &format!("read {key}")))?;
        value_of(key, found.0)
    }

    /// Everything of the fleet that its status is made of, read at one revision.
    ///
    /// # Errors
    /// No answer, no right to read it, or the era is not a number.
    pub async fn overview(&mut self) -> Result<Overview> {
        let get = |prefix| TxnOp::get(prefix, Some(GetOptions::new().with_prefix()));
        let gets = [get(RULES), get(HOSTS), get(ALIVE), TxnOp::get(ERA, None)];
        let found = within(self.kv.txn(Txn::new().and_then(gets))).await;
        let found = found
            .map_err(|failure| self.failed(failure, "read the fleet"))?
            .0;
        let header = found.header.context("etcd's answer has no header")?;
        let mut responses = found.responses.into_iter();
        let mut range = |of: &str| match responses.next().and_then(|it| it.response) {
            Some(PbTxnOpResponse::ResponseRange(range)) => Ok(range),
            _ => Err(anyhow!("etcd's answer has nothing for {of}")),
        };
        let rules = named(range(RULES)?, RULES, check_name);
        let hosts = named(range(HOSTS)?, HOSTS, check_host);
        let alive = named(range(ALIVE)?, ALIVE, check_host);
        let era = value_of(ERA, range(ERA)?)?;
        let text = |value: PbKeyValue| String::from_utf8_lossy(&value.value).into_owned();
        let rollout = |(name, value): &(String, PbKeyValue)| {
            let document = check_document(&value.value).ok()?;
            Some((name.clone(), document.rollout?))
        };
        Ok(Overview {
            cluster: header.cluster_id.into(),
            era: era.map_or(Ok(0), |value| era_of(&value))?,
            rollouts: rules.iter().filter_map(rollout).collect(),
            documents: rules
                .into_iter()
                .map(|(name, value)| (name, value.mod_revision))
                .collect(),
            hosts: hosts
                .into_iter()
                .map(|(name, value)| (name, HostStatus::read(&value.value)))
                .collect(),
            alive: alive
                .into_iter()
                .filter(|(_, value)| is_leased(value))
                .map(|(name, value)| (name, text(value)))
                .collect(),
        })
    }

    /// Whether a host is there, and its report; without those of others, which may be too much to be read.
    ///
    /// # Errors
    /// No answer, or no right to read it.
    pub async fn host(&mut self, host: &str) -> Result<(bool, Option<HostStatus>)> {
        let alive = self.get(&format!("{ALIVE}{host}"), None).await?;
        let report = self.get(&format!("{HOSTS}{host}"), None).await?;
        let report = report.and_then(|value| HostStatus::read(&value.value));
        Ok((alive.as_ref().is_some_and(is_leased), report))
    }

    /// Removes what a host reported. Returns whether there was anything.
    ///
    /// # Errors
    /// No answer, or no right to do it.
    pub async fn forget(&mut self, host: &str) -> Result<bool> {
        let key = format!("{HOSTS}{host}");
        let done = within(self.kv.delete(key.as_str(), None)).await;
        let done = done.map_err(|failure| self.unanswered(failure, &format!("remove {key}")))?;
        Ok(done.deleted() > 0)
    }

    /// The version of the member that answers.
    ///
    /// # Errors
    /// No answer, or no right to ask.
    pub async fn version(&mut self) -> Result<String> {
        let status = within(self.maintenance.status()).await;
        Ok(status.map_err(anyhow::Error::from)?.version().to_owned())
    }

    /// Writes a document, if its last change is still of this revision (0: if there is none). Returns the revision of this
    /// change.
    ///
    /// # Errors
    /// `Changed`, no answer, or no right to write it. Without an answer it may have been written.
    pub async fn put(&mut self, database: &str, text: &str, expected: i64) -> Result<i64> {
        self.put_if(&key_of(database), text, expected).await
    }

    /// The era, and the revision of its last change (0: there was none).
    ///
    /// # Errors
    /// No answer, no right to read it, or no number.
    pub async fn era(&mut self) -> Result<(u64, i64)> {
        Ok(match self.get(ERA, None).await? {
            Some(value) => (era_of(&value)?, value.mod_revision),
            None => (0, 0),
        })
    }

    /// Raises the era. `expected`: as of `put`.
    ///
    /// # Errors
    /// As `put`.
    pub async fn raise_era(&mut self, to: u64, expected: i64) -> Result<()> {
        self.put_if(ERA, &to.to_string(), expected).await.map(drop)
    }

    /// An error that says what was asked of whom, and as whom where that matters.
    fn failed(&self, failure: Failure, what: &str) -> anyhow::Error {
        let user = match failure {
            Failure::Denied(_) => self.user.as_str(),
            _ => "",
        };
        let what = format!("{}: {what}{user}", self.endpoint);
        anyhow::Error::from(failure).context(what)
    }

    /// The same of a write. `NothingWritten` where that is certain.
    fn unanswered(&self, failure: Failure, what: &str) -> anyhow::Error {
        if let Failure::Denied(_) | Failure::Refused(_) = failure {
            return self.failed(failure, what).context(NothingWritten);
        }
        let doubt = "which may be done all the same: look before it is tried again";
        self.failed(failure, &format!("{what}, {doubt}"))
    }

    async fn put_if(&mut self, key: &str, text: &str, expected: i64) -> Result<i64> {
        let is_same = Compare::mod_revision(key, CompareOp::Equal, expected);
        let txn = Txn::new()
            .when([is_same])
            .and_then([TxnOp::put(key, text, None)])
            .or_else([TxnOp::get(key, None)]);
        let done = within(self.kv.txn(txn)).await;
        let done = done.map_err(|failure| self.unanswered(failure, &format!("write {key}")))?;
        let done = done.0;
        if done.succeeded {
            let header = done.header.context("etcd's answer has no header")?;
            return Ok(header.revision);
        }
        let found = done.responses.into_iter().next();
        let Some(PbTxnOpResponse::ResponseRange(range)) = found.and_then(|found| found.response)
        else {
            return Err(anyhow!("etcd's answer has nothing for {key}"));
        };
        let revision = value_of(key, range)?.map(|value| value.mod_revision);
        Err(Changed(revision).into())
    }
}

/// Values by what follows the prefix in their keys. A key whose name no database and no host has is nobody's.
fn named<E>(
    range: PbRangeResponse,
    prefix: &str,
    check: fn(&str) -> Result<(), E>,
) -> Vec<(String, PbKeyValue)> {
    let named = range.kvs.into_iter().filter_map(|value| {
        let name = std::str::from_utf8(&value.key).ok()?.strip_prefix(prefix)?;
        check(name).ok()?;
        Some((name.to_owned(), value))
    });
    named.collect()
}

/// Without a lease a key outlives its host.
fn is_leased(alive: &PbKeyValue) -> bool {
    alive.lease != 0
}

impl std::fmt::Display for Changed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(revision) => write!(f, "it was changed at revision {revision}"),
            None => f.write_str("it is not there any more"),
        }
    }
}

impl std::error::Error for Changed {}

impl std::fmt::Display for NothingWritten {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("nothing is written")
    }
}
