//! DNS look-ups of a region: from names to addresses, through aliases.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use futures_util::{StreamExt as _, future::try_join_all, stream::BoxStream};
use hickory_resolver::{
    NameServerPool, PoolContext, TlsConfig,
    config::{ConnectionConfig, NameServerConfig, ResolverOpts},
    net::{
        DnsError, NetError,
        dnssec::DnssecDnsHandle,
        runtime::TokioRuntimeProvider,
        xfer::{DnsHandle, FirstAnswer as _, RetryDnsHandle},
    },
    proto::{
        dnssec::{Proof, TrustAnchors},
        op::{DnsRequest, DnsRequestOptions, DnsResponse, Query, ResponseCode},
        rr::{Name, RData, Record, RecordType},
    },
    system_conf::read_system_conf,
};
use ipnet::IpNet;

use crate::{
    policy::{Dns, Nameserver, Transport},
    region::{answer::Found, tls},
    threads,
};

/// CNAME records followed from one name.
const MAX_ALIASES: usize = 8;

/// Looks up the addresses of all the names. If one name fails, so does the look-up.
pub(super) async fn resolve(dns: &Dns, timeout: Duration) -> Result<Found> {
    let (servers, options) = resolver(dns, timeout).await?;
    let handle = OwnRecords(servers);
    if !dns.dnssec {
        return resolve_by(&handle, options, dns).await;
    }
    let anchors = match &dns.trust_anchor {
        Some(file) => {
            let path = file.clone();
            let read = threads::run(&threads::LOOK_UPS, file, move || {
                Ok(TrustAnchors::from_file(&path)?)
            });
            read.await
                .with_context(|| format!("read {}", file.display()))?
        }
        None => TrustAnchors::default(),
    };
    let handle = DnssecDnsHandle::with_trust_anchor(handle, Arc::new(anchors));
    resolve_by(&handle, options, dns).await
}

/// Looks up the addresses of all the names through this client. If one name fails, so does the look-up.
pub async fn resolve_by<H: DnsHandle>(
    handle: &H,
    options: DnsRequestOptions,
    dns: &Dns,
) -> Result<Found> {
    let results = dns.names.iter().map(|name| async move {
        let records = addresses(handle, options, name).await;
        records.with_context(|| format!("look up {name}"))
    });
    let records = try_join_all(results).await?.concat();
    let mut found = Found::default();
    let mut ttl = u32::MAX;
    for record in records {
        ttl = ttl.min(record.ttl);
        match record.data {
            RData::A(address) => found.prefixes.push(IpNet::V4(address.0.into())),
            RData::AAAA(address) => found.prefixes.push(IpNet::V6(address.0.into())),
            _ => {}
        }
    }
    ensure!(
        !found.prefixes.is_empty(),
        "look up {}: no addresses",
        dns.names.join(", ")
    );
    found.ask_again = Some(Duration::from_secs(ttl.into()));
    Ok(found)
}

/// Returns the address records of a name, and the CNAME records on the way to them.
async fn addresses<H: DnsHandle>(
    handle: &H,
    options: DnsRequestOptions,
    name: &str,
) -> Result<Vec<Record>> {
    // Without the final dot the search domains of the host would apply.
    let absolute = format!("{}.", name.trim_end_matches('.'));
    let mut walk = Walk::new(Name::from_utf8(absolute).context("read the name")?);
    if handle.is_verifying_dnssec() {
        // hickory 0.26 rejects a signed alias of a name that lacks the queried type: the proof of
        // that is for the last name, and hickory expects one for the first. CNAME queries avoid it.
        while query(handle, options, &mut walk, RecordType::CNAME).await? {}
    }
    let mut all = Vec::new();
    for kind in [RecordType::A, RecordType::AAAA] {
        let mut walk = walk.clone();
        let context = || format!("{kind} records");
        while query(handle, options, &mut walk, kind)
            .await
            .with_context(context)?
        {}
        all.extend(walk.records);
    }
    Ok(all)
}

/// Queries the last name of a walk and continues it. Returns whether the new last name must be
/// queried too: a name server may return a part of the chain of aliases only.
///
/// A name without records of this type is not an error.
async fn query<H: DnsHandle>(
    handle: &H,
    options: DnsRequestOptions,
    walk: &mut Walk,
    kind: RecordType,
) -> Result<bool> {
    const UNSIGNED: &str = "the answer is not signed (`dnssec: require`)";
    let dnssec = handle.is_verifying_dnssec();
    let query = Query::query(walk.end().clone(), kind);
    let (code, answers, authorities) = match handle.lookup(query, options).first_answer().await {
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
        Err(error) => bail!("{error}"),
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

/// Makes the client of the name servers, and the options of each query. Each look-up makes its own: `/etc/resolv.conf` may
/// have changed. hickory's `Resolver` is not used: it follows aliases without checking that they belong to the queried
/// name.
async fn resolver(
    dns: &Dns,
    timeout: Duration,
) -> Result<(
    RetryDnsHandle<NameServerPool<TokioRuntimeProvider>>,
    DnsRequestOptions,
)> {
    let (servers, mut options) = if dns.nameservers.is_empty() {
        let file = "/etc/resolv.conf";
        let read = threads::run(&threads::LOOK_UPS, Path::new(file), || {
            Ok(read_system_conf()?)
        });
        let (config, options) = read.await.with_context(|| format!("read {file}"))?;
        (config.name_servers, options)
    } else {
        let servers = dns.nameservers.iter().map(name_server).collect();
        (servers, ResolverOpts::default())
    };
    // A silent server or a lost packet leaves time for others.
    options.timeout = timeout / 4;
    let mut query = DnsRequestOptions::default();
    query.recursion_desired = options.recursion_desired;
    query.use_edns = options.edns0;
    query.edns_payload_len = options.edns_payload_len;
    query.edns_set_dnssec_ok = dns.dnssec;
    let encrypted = dns
        .nameservers
        .iter()
        .any(|n| n.transport != Transport::Plain);
    let config = if encrypted {
        tls::client(dns.ca_file.as_deref()).await?
    } else {
        tls::none()?
    };
    let attempts = options.attempts;
    let tls = TlsConfig { config };
    let context = Arc::new(PoolContext::new(options, tls));
    let pool = NameServerPool::from_config(servers, context, TokioRuntimeProvider::default());
    Ok((RetryDnsHandle::new(pool, attempts), query))
}

fn name_server(server: &Nameserver) -> NameServerConfig {
    let mut connections = match &server.transport {
        Transport::Plain => vec![ConnectionConfig::udp(), ConnectionConfig::tcp()],
        Transport::Tls { name } => vec![ConnectionConfig::tls(name.as_str().into())],
        Transport::Https { name, path } => {
            let path = Some(path.as_str().into());
            vec![ConnectionConfig::https(name.as_str().into(), path)]
        }
    };
    for connection in &mut connections {
        connection.port = server.port.unwrap_or(connection.port);
    }
    NameServerConfig::new(server.address, true, connections)
}

#[cfg(test)]
mod tests;
