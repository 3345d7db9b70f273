//! DNS look-ups of a region: from names to addresses, through aliases.

mod servers;

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use futures_util::{
    StreamExt as _,
    future::{join_all, try_join_all},
    stream::BoxStream,
};
use hickory_resolver::{
    net::{
        DnsError, NetError,
        dnssec::DnssecDnsHandle,
        xfer::{DnsHandle, FirstAnswer as _},
    },
    proto::{
        dnssec::{Proof, TrustAnchors},
        op::{DnsRequest, DnsRequestOptions, DnsResponse, Query, ResponseCode},
        rr::{Name, RData, Record, RecordType},
    },
};
use ipnet::IpNet;

use crate::{
    policy::{Dns, DnsType, spelled},
    region::{
        answer::{Found, Missing},
        tls,
    },
    threads,
};

/// CNAME records followed from one name.
const MAX_ALIASES: usize = 8;

/// Looks up the addresses of all the names. If one name fails, so does the look-up; if records of one type fail and those of
/// the other are there, they are returned with the error.
pub(super) async fn resolve(dns: &Dns, timeout: Duration) -> Result<Found> {
    let (servers, options) = servers::client(dns, timeout).await?;
    let asked = Asked {
        handle: OwnRecords(servers),
        options,
        // Records of one type may not be answered at all: those of the other must not be lost to the time limit of the
        // whole look-up.
        timeout: timeout * 9 / 10,
    };
    if !dns.dnssec {
        return asked.resolve(dns).await;
    }
    let anchors = match &dns.trust_anchor {
        Some(file) => {
            let path = file.clone();
            let read = threads::run(&threads::LOOK_UPS, file, move || {
                // The error's own text has its source.
                TrustAnchors::from_file(&path).map_err(|error| anyhow!("{error}"))
            });
            read.await
                .with_context(|| format!("read {}", file.display()))?
        }
        None => TrustAnchors::default(),
    };
    let asked = Asked {
        handle: DnssecDnsHandle::with_trust_anchor(asked.handle, Arc::new(anchors)),
        options: asked.options,
        timeout: asked.timeout,
    };
    asked.resolve(dns).await
}

/// The name servers, and how they are queried.
pub struct Asked<H> {
    pub handle: H,
    pub options: DnsRequestOptions,
    /// Of the records of one type.
    pub timeout: Duration,
}

/// The records of a name, and the types that failed.
struct Records {
    records: Vec<Record>,
    failed: Vec<(DnsType, String)>,
}

impl<H: DnsHandle> Asked<H> {
    /// Looks up the addresses of all the names.
    ///
    /// # Errors
    /// One of the names has none.
    pub async fn resolve(&self, dns: &Dns) -> Result<Found> {
        let results = dns.names.iter().map(|name| async move {
            let records = self.addresses(name, &dns.records).await;
            records.with_context(|| format!("look up {name}"))
        });
        let mut found = Found::default();
        let mut failed = Vec::new();
        let mut ttl = u32::MAX;
        for (name, records) in dns.names.iter().zip(try_join_all(results).await?) {
            let before = found.prefixes.len();
            for record in records.records {
                ttl = ttl.min(record.ttl);
                match record.data {
                    RData::A(address) => found.prefixes.push(IpNet::V4(address.0.into())),
                    RData::AAAA(address) => found.prefixes.push(IpNet::V6(address.0.into())),
                    _ => {}
                }
            }
            // Beside another name's addresses, its own would be lost without an error.
            ensure!(
                found.prefixes.len() > before,
                "look up {name}: no addresses"
            );
            let of_name = records.failed.into_iter();
            failed.extend(of_name.map(|(kind, error)| (kind, format!("look up {name}: {error}"))));
        }
        found.ask_again = Some(Duration::from_secs(ttl.into()));
        for (kind, error) in &failed {
            // The last members are kept for all names together: beside the records of another name it could never be told
            // which of them have left.
            let is_other = |prefix: &IpNet| match kind {
                DnsType::A => matches!(prefix, IpNet::V4(_)),
                DnsType::Aaaa => matches!(prefix, IpNet::V6(_)),
            };
            ensure!(!found.prefixes.iter().any(is_other), "{error}");
        }
        if !failed.is_empty() {
            let has = |wanted| failed.iter().any(|(kind, _)| *kind == wanted);
            let errors = failed.iter().map(|(_, error)| error.as_str());
            found.missing = Some(Missing {
                v4: has(DnsType::A),
                v6: has(DnsType::Aaaa),
                error: errors.collect::<Vec<_>>().join(", and "),
            });
        }
        Ok(found)
    }

    /// Returns the address records of a name, and the CNAME records on the way to them.
    ///
    /// # Errors
    /// A type failed, and the other has no addresses.
    async fn addresses(&self, name: &str, kinds: &[DnsType]) -> Result<Records> {
        // Without the final dot the search domains of the host would apply.
        let absolute = format!("{}.", name.trim_end_matches('.'));
        let mut walk = Walk::new(Name::from_utf8(absolute).context("read the name")?);
        if self.handle.is_verifying_dnssec() {
            // hickory 0.26 rejects a signed alias of a name that lacks the queried type: the proof of
            // that is for the last name, and hickory expects one for the first. CNAME queries avoid it.
            while self.query(&mut walk, RecordType::CNAME).await? {}
        }
        let results = join_all(kinds.iter().map(|kind| {
            let mut walk = walk.clone();
            let kind = match kind {
                DnsType::A => RecordType::A,
                DnsType::Aaaa => RecordType::AAAA,
            };
            async move {
                let queries = async {
                    while self.query(&mut walk, kind).await? {}
                    anyhow::Ok(walk.records)
                };
                let result = tokio::time::timeout(self.timeout, queries).await;
                let result = result
                    .unwrap_or_else(|_| Err(anyhow!("no answer within {}", spelled(self.timeout))));
                result.with_context(|| format!("{kind} records"))
            }
        }))
        .await;
        let mut all = Records {
            records: Vec::new(),
            failed: Vec::new(),
        };
        let mut first = None;
        for (&kind, result) in kinds.iter().zip(results) {
            match result {
                Ok(records) => all.records.extend(records),
                Err(error) => {
                    all.failed.push((kind, format!("{error:#}")));
                    first = first.or(Some(error));
                }
            }
        }
        let is_address = |record: &Record| record.record_type() != RecordType::CNAME;
        match first {
            Some(error) if !all.records.iter().any(is_address) => Err(error),
            _ => Ok(all),
        }
    }

    /// Queries the last name of a walk and continues it. Returns whether the new last name must be
    /// queried too: a name server may return a part of the chain of aliases only.
    ///
    /// A name without records of this type is not an error.
    async fn query(&self, walk: &mut Walk, kind: RecordType) -> Result<bool> {
        const UNSIGNED: &str = "the answer is not signed (`dnssec: require`)";
        let dnssec = self.handle.is_verifying_dnssec();
        let query = Query::query(walk.end().clone(), kind);
        let (code, answers, authorities) =
            match self.handle.lookup(query, self.options).first_answer().await {
                Ok(response) => {
                    let code = response.response_code;
                    let message = response.into_message();
                    (code, message.answers, message.authorities)
                }
                Err(NetError::Dns(DnsError::NoRecordsFound(none))) => {
                    let authorities = none.authorities.unwrap_or_default().to_vec();
                    (none.response_code, Vec::new(), authorities)
                }
                Err(NetError::Dns(DnsError::Nsec { .. })) => bail!(UNSIGNED),
                Err(NetError::NoConnections) => bail!("none of the name servers can be reached"),
                // The error chain repeats its text.
                Err(error) => bail!(tls::plain(&error.to_string())),
            };
        let known = walk.records.len();
        let incomplete = walk.follow(kind, &answers)?;
        // The response code of a chain is that of its last name, which is queried on its own.
        ensure!(
            code == ResponseCode::NoError || (code == ResponseCode::NXDomain && incomplete),
            "{code}"
        );
        if dnssec {
            let used = &walk.records[known..];
            let secure = used.iter().all(|record| record.proof == Proof::Secure);
            let mut proofs = authorities
                .iter()
                .filter(|record| record.record_type() != RecordType::RRSIG)
                .map(|record| record.proof)
                .peekable();
            let proven = if used.is_empty() {
                // hickory checked that these records, where they are signed, prove that there are none.
                proofs.peek().is_some() && proofs.all(|proof| proof == Proof::Secure)
            } else {
                // hickory does not check that a wildcard applies if the authority section holds only
                // records of an unsigned zone.
                proofs.all(|proof| proof != Proof::Insecure)
            };
            ensure!(secure && proven, UNSIGNED);
        }
        Ok(incomplete)
    }
}

/// The aliases from a name to its addresses, as far as name servers returned them.
#[derive(Clone, Debug)]
struct Walk {
    /// The name that was looked up, then the target of each alias. Never empty.
    names: Vec<Name>,
    /// CNAME records on the way, and address records of the last name.
    records: Vec<Record>,
}

impl Walk {
    fn new(name: Name) -> Self {
        Self {
            names: vec![name],
            records: Vec::new(),
        }
    }

    fn end(&self) -> &Name {
        &self.names[self.names.len() - 1]
    }

    /// Continues with the records of an answer section, in any order. Takes only records whose owner
    /// is on the way: a server can add records of any other name, even validly signed ones.
    ///
    /// Returns whether the answer ends at an alias, without records of its target.
    ///
    /// # Errors
    /// Records that contradict each other, a loop, too many aliases.
    fn follow(&mut self, kind: RecordType, answers: &[Record]) -> Result<bool> {
        let start = self.names.len();
        loop {
            // Names compare without regard to case (RFC 4343).
            let own = answers.iter().filter(|record| record.name == *self.end());
            let aliases = own
                .clone()
                .filter(|record| record.record_type() == RecordType::CNAME);
            let addresses: Vec<Record> = own
                .filter(|record| kind != RecordType::CNAME && record.record_type() == kind)
                .cloned()
                .collect();
            let mut target: Option<(&Name, &Record)> = None;
            for alias in aliases {
                let RData::CNAME(name) = &alias.data else {
                    continue;
                };
                match target {
                    // RFC 2181 section 10.1 allows one.
                    Some((first, _)) if *first != name.0 => {
                        bail!("{} has two aliases, {first} and {}", self.end(), name.0)
                    }
                    // The same record again: the shorter TTL counts.
                    Some((_, first)) if first.ttl <= alias.ttl => {}
                    _ => target = Some((&name.0, alias)),
                }
            }
            let Some((target, alias)) = target else {
                let incomplete = self.names.len() > start && addresses.is_empty();
                self.records.extend(addresses);
                return Ok(incomplete);
            };
            // RFC 1034 section 3.6.2 forbids it: nothing shows which of the two is meant.
            ensure!(
                addresses.is_empty(),
                "{} has an alias and {kind} records",
                self.end()
            );
            ensure!(!self.names.contains(target), "{target} is its own alias");
            ensure!(
                self.names.len() <= MAX_ALIASES,
                "more than {MAX_ALIASES} aliases"
            );
            self.records.push(alias.clone());
            self.names.push(target.clone());
        }
    }
}

/// Queries name servers, and removes records of other names than the queried one and its aliases
/// from answers before anything is concluded from them, such as a proof by DNSSEC.
#[derive(Clone)]
pub struct OwnRecords<H>(pub H);

impl<H: DnsHandle> DnsHandle for OwnRecords<H> {
    type Response = BoxStream<'static, Result<DnsResponse, NetError>>;
    type Runtime = H::Runtime;

    fn send(&self, request: DnsRequest) -> Self::Response {
        let name = request.queries.first().map(|query| query.name().clone());
        let own = move |response: Result<DnsResponse, NetError>| {
            let mut response = response?;
            if let Some(name) = &name {
                let owners = owners(name, &response.answers);
                response
                    .answers
                    .retain(|record| owners.contains(&record.name));
            }
            Ok(response)
        };
        self.0.send(request).map(own).boxed()
    }
}

/// Returns a name and the names that its aliases lead to, as many as `Walk` may need.
fn owners(name: &Name, answers: &[Record]) -> Vec<Name> {
    let mut owners = vec![name.clone()];
    let mut next = 0;
    while next < owners.len() && owners.len() <= MAX_ALIASES {
        for record in answers {
            if let RData::CNAME(target) = &record.data
                && record.name == owners[next]
                && !owners.contains(&target.0)
            {
                owners.push(target.0.clone());
            }
        }
        next += 1;
    }
    owners
}

#[cfg(test)]
mod tests;
