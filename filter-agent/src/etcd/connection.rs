//! One connection to one endpoint: the watches, and reads of all keys at one revision.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use etcd_client::{
    Client, ConnectOptions, KvClient, LeaseClient, Txn, TxnOp, WatchOptions, WatchResponse,
    WatchStream,
    proto::{PbKeyValue, PbRangeResponse, PbTxnOpResponse, PbTxnResponse},
};
use futures_util::FutureExt as _;

use crate::{
    etcd::{
        failure::{Failure, MAX_TEXT, plain},
        files::Files,
        own_keys::Clients,
    },
    fleet::{Answer, Found, Value},
    policy::MAX_DOCUMENT,
    text::one_line,
};

pub(super) const ERA: &str = "/filter-agent/v1/era";
pub(super) const RULES: &str = "/filter-agent/v1/rules/";

/// Limits of a TCP connection (`failure` names it too), and of each request as a whole.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection without a sign of life is pinged, and ended without an answer. etcd hangs up on more than one ping in 5 s.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest answer, in bytes: 128 of the longest documents, and what stands around them. gRPC's own limit is 4 MiB.
pub(super) const MAX_ANSWER: usize = 128 * MAX_DOCUMENT + (1 << 20);

pub struct Connection {
    kv: KvClient,
    lease: LeaseClient,
    watch: WatchStream,
    databases: BTreeSet<String>,
    /// Databases whose keys may not be watched.
    unwatched: BTreeSet<String>,
}

impl Connection {
    /// Connects, and returns once every watch stands.
    ///
    /// # Errors
    /// No connection, a watch that is refused for another reason than a missing right, or no answer in time.
    pub async fn open(endpoint: &str, files: &Files, databases: &BTreeSet<String>) -> Result<Self> {
        let client = connect(endpoint, files).await?;
        let kv = client.kv_client().max_decoding_message_size(MAX_ANSWER);
        let mut watches = client.watch_client().max_decoding_message_size(MAX_ANSWER);
        // No start revision, and no values of before: it only rings.
        let options = || Some(WatchOptions::new().with_fragment());
        let watch = within(watches.watch(ERA, options())).await;
        let watch = watch.map_err(Failure::at_first)?;
        let mut connection = Self {
            kv,
            lease: client.lease_client(),
            watch,
            databases: databases.clone(),
            unwatched: BTreeSet::new(),
        };
        connection.created(ERA).await?;
        // One after the other: many at once on a stream that is not read can block etcd.
        for database in databases {
            let key = key_of(database);
            within(connection.watch.watch(key.as_str(), options())).await?;
            if !connection.created(&key).await? {
                connection.unwatched.insert(database.clone());
            }
        }
        Ok(connection)
    }

    /// Waits until the watch that was asked for last stands. Returns whether it may.
    async fn created(&mut self, key: &str) -> Result<bool> {
        loop {
            let message = within(self.watch.message()).await?;
            let message = message.context(ENDED)?;
            // A change that another watch announces meanwhile is read anyway.
            if !message.created() {
                alive(&message)?;
            } else if !message.canceled() {
                return Ok(true);
            } else if message.cancel_reason().contains("permission denied") {
                return Ok(false);
            } else {
                bail!("watch {key}: {}", reason(&message));
            }
        }
    }

    /// Databases whose keys could not be watched when the connection was made.
    pub fn unwatched(&self) -> impl Iterator<Item = &str> {
        self.unwatched.iter().map(String::as_str)
    }

    /// For the host's own keys, over the same connection.
    pub fn clients(&self) -> Clients {
        Clients {
            kv: self.kv.clone(),
            lease: self.lease.clone(),
        }
    }

    /// Waits for an announcement, and takes all that there are.
    ///
    /// # Errors
    /// The connection or a watch ended.
    pub async fn rang(&mut self) -> Result<()> {
        let mut next = Some(self.watch.message().await);
        while let Some(message) = next {
            let message = message.map_err(|error| plain(&error))?;
            alive(&message.context(ENDED)?)?;
            next = self.watch.message().now_or_never();
        }
        Ok(())
    }

    /// Reads all keys at one revision.
    ///
    /// # Errors
    /// No answer in time, none that is believed, or the era cannot be read. A document that cannot be read is no error.
    pub async fn read(&mut self) -> Result<Answer> {
        let readable = self.databases.clone();
        match self.read_these(&readable).await {
            Ok(answer) => Ok(answer),
            Err(failure @ (Failure::Denied(_) | Failure::TooLong(_))) => {
                let longest = match failure {
                    Failure::TooLong(_) => MAX_DOCUMENT,
                    _ => usize::MAX,
                };
                let unreadable = self.unreadable(longest).await?;
                let is_readable = |name: &String| !unreadable.contains_key(name);
                let readable = readable.into_iter().filter(is_readable).collect();
                let mut answer = self.read_these(&readable).await?;
                let why = unreadable.into_iter();
                let found = why.map(|(name, why)| (name, Found::Unreadable(why)));
                answer.documents.extend(found);
                Ok(answer)
            }
            Err(failure) => Err(failure.into()),
        }
    }

    async fn read_these(&mut self, databases: &BTreeSet<String>) -> Result<Answer, Failure> {
        let keys = || {
            [ERA.to_owned()]
                .into_iter()
                .chain(databases.iter().map(|it| key_of(it)))
        };
        let gets: Vec<TxnOp> = keys().map(|key| TxnOp::get(key, None)).collect();
        let response = within(self.kv.txn(Txn::new().and_then(gets))).await?.0;
        let PbTxnResponse {
            header, responses, ..
        } = response;
        let header = header.context("etcd's answer has no header")?;
        if responses.len() != databases.len() + 1 {
            return Err(Failure::Other(anyhow!(
                "etcd answered other keys than those asked for"
            )));
        }
        let mut values = Vec::with_capacity(responses.len());
        for (key, response) in keys().zip(responses) {
            let Some(PbTxnOpResponse::ResponseRange(range)) = response.response else {
                return Err(Failure::Other(anyhow!(
                    "etcd's answer has nothing for {key}"
                )));
            };
            values.push(value_of(&key, range)?);
        }
        let mut values = values.into_iter();
        let era = values.next().flatten();
        let documents = databases.iter().cloned().zip(values.map(found)).collect();
        Ok(Answer {
            cluster: header.cluster_id,
            era: era.map_or(Ok(0), |value| era_of(&value))?,
            revision: header.revision,
            documents,
        })
    }

    /// Finds out which documents cannot be read, or are longer than this, and why: a transaction is refused as a whole.
    async fn unreadable(&mut self, longest: usize) -> Result<BTreeMap<String, String>> {
        if let Err(failure) = within(self.kv.get(ERA, None)).await {
            return Err(anyhow::Error::from(failure).context(format!("read {ERA}")));
        }
        let mut unreadable = BTreeMap::new();
        for database in self.databases.clone() {
            let key = key_of(&database);
            match within(self.kv.get(key.as_str(), None)).await {
                Ok(response) => {
                    let length = value_of(&key, response.0)?.map_or(0, |value| value.value.len());
                    if length > longest {
                        let why = format!(
                            "{length} bytes are more than the {MAX_DOCUMENT} that a document may have"
                        );
                        unreadable.insert(database, why);
                    }
                }
                Err(Failure::Denied(why)) => {
                    unreadable.insert(database, why);
                }
                Err(failure) => {
                    return Err(anyhow::Error::from(failure).context(format!("read {key}")));
                }
            }
        }
        Ok(unreadable)
    }
}

/// A connection to one endpoint, which is made with its first request.
///
/// # Errors
/// The endpoint or the certificates cannot be used.
pub(super) async fn connect(endpoint: &str, files: &Files) -> Result<Client> {
    let mut options = ConnectOptions::new()
        .with_connect_timeout(CONNECT_TIMEOUT)
        .with_keep_alive(PING_INTERVAL, PING_TIMEOUT)
        .with_keep_alive_while_idle(true)
        // Else a member that the others cannot be reached from keeps a watch that never rings.
        .with_require_leader(true);
    if let Some(tls) = files.tls() {
        options = options.with_tls(tls);
    }
    // One endpoint: with several, the balancer goes on sending to those that are dead.
    let client = Client::connect([endpoint], Some(options)).await;
    client.map_err(|error| plain(&error))
}

const ENDED: &str = "etcd ended the watch";

pub(super) fn key_of(database: &str) -> String {
    format!("{RULES}{database}")
}

/// # Errors
/// etcd cancelled a watch.
fn alive(message: &WatchResponse) -> Result<()> {
    ensure!(
        !message.canceled(),
        "etcd cancelled a watch: {}",
        reason(message)
    );
    Ok(())
}

fn reason(message: &WatchResponse) -> String {
    match (message.cancel_reason(), message.compact_revision()) {
        ("", 0) => "without a reason".into(),
        // It was so slow that what it had not sent yet is gone.
        ("", revision) => format!("revision {revision} is compacted"),
        (text, _) => one_line(text, MAX_TEXT),
    }
}

/// Bounds a request as a whole. The client's own limit would end with the first byte of the answer.
pub(super) async fn within<T>(
    request: impl Future<Output = Result<T, etcd_client::Error>>,
) -> Result<T, Failure> {
    match tokio::time::timeout(REQUEST_TIMEOUT, request).await {
        Ok(result) => result.map_err(Failure::from),
        Err(_) => Err(Failure::Other(anyhow!(
            "no answer within {} s",
            REQUEST_TIMEOUT.as_secs()
        ))),
    }
}

/// The one value that a get of one key finds, if any.
pub(super) fn value_of(key: &str, range: PbRangeResponse) -> Result<Option<PbKeyValue>> {
    let mut values = range.kvs.into_iter();
    let value = values.next();
    let is_other = value.as_ref().is_some_and(|it| it.key != key.as_bytes());
    ensure!(
        !is_other && values.next().is_none(),
        "etcd answered another key than {key}"
    );
    Ok(value)
}

fn found(value: Option<PbKeyValue>) -> Found {
    value.map_or(Found::Missing, |value| Found::Value(value.into()))
}

impl From<PbKeyValue> for Value {
    fn from(value: PbKeyValue) -> Self {
        Self {
            text: value.value,
            create_revision: value.create_revision,
            mod_revision: value.mod_revision,
            version: value.version,
        }
    }
}

/// # Errors
/// It is not a number. Then nothing can be believed: an era that is too low would let a restored etcd pass.
pub(super) fn era_of(value: &PbKeyValue) -> Result<u64> {
    let text = String::from_utf8_lossy(&value.value);
    let era = text.trim().parse();
    let quoted: String = text.trim().chars().take(20).collect();
    era.ok()
        .with_context(|| format!("the key {ERA} holds {quoted:?}, which is not a number: until it is one, hosts believe nothing"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(key: &str, value: &[u8]) -> PbKeyValue {
        PbKeyValue {
            key: key.into(),
            value: value.into(),
            ..PbKeyValue::default()
        }
    }

    #[test]
    fn value_of_another_key_is_not_taken() {
        let answer = |kvs| PbRangeResponse {
            kvs,
            ..PbRangeResponse::default()
        };
        let (own, other) = (value("a", b"1"), value("b", b"1"));
        assert_eq!(value_of("a", answer(vec![])).unwrap(), None);
        let taken = value_of("a", answer(vec![own.clone()])).unwrap();
        assert_eq!(taken, Some(own.clone()));
        assert!(value_of("a", answer(vec![other.clone()])).is_err());
        assert!(value_of("a", answer(vec![own, other])).is_err());
    }

    #[test]
    fn era_is_a_number_alone() {
        let era = |text: &[u8]| era_of(&value(ERA, text));
        assert_eq!(era(b"7").unwrap(), 7);
        assert_eq!(era(b"7\n").unwrap(), 7);
        for wrong in [
            &b""[..],
            b"-1",
            b"7 8",
            b"0x7",
            b"\xff",
            b"18446744073709551616",
        ] {
            let error = era(wrong).unwrap_err().to_string();
            assert!(error.ends_with("hosts believe nothing"), "{error}");
        }
        // A terminal and a log take one short line.
        let error = era(format!("\x1b[2J\n{}", "x".repeat(1000)).as_bytes());
        let error = error.unwrap_err().to_string();
        assert!(
            error.len() < 150 && !error.contains(char::is_control),
            "{error}"
        );
    }
}
