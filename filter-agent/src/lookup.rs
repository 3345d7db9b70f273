//! One look-up of a region: asks DNS, an HTTPS server or a file, now.

use std::{
    fs::{self, Metadata},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use futures_util::future::try_join_all;
use hickory_resolver::{
    TokioResolver,
    config::{ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig},
    net::{DnsError, NetError, runtime::TokioRuntimeProvider},
    proto::{
        dnssec::{Proof, TrustAnchors},
        op::ResponseCode,
        rr::{Name, RData, Record, RecordType},
    },
};
use inotify::{WatchMask, Watches};
use ipnet::IpNet;
use reqwest::{StatusCode, header, redirect};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject as _},
};
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

use crate::{
    format::{self, List},
    policy::{Dns, Guards, Nameserver, RegionSource, Transport, Url, spelled},
};

/// Longest body of a published list, decompressed, in bytes: four times the longest that is published
/// today (Azure's).
const MAX_BODY: usize = 16 << 20;

/// Redirects followed for one list.
const MAX_REDIRECTS: usize = 5;

/// CNAME records followed from one name.
const MAX_ALIASES: usize = 8;

/// Longest file of prefixes, in bytes.
const MAX_FILE: u64 = 64 << 20;

/// Regions asked for by DNS at once: each takes a few sockets.
static RESOLVING: Semaphore = Semaphore::const_new(16);

/// Lists fetched at once: each takes memory for the body and what is read from it.
static FETCHING: Semaphore = Semaphore::const_new(4);

#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// The content is that of the version that was given.
    Unchanged {
        ask_again: Option<Duration>,
    },
    Found(Found),
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Found {
    pub prefixes: Vec<IpNet>,
    /// The publisher's own number of this state, which only grows.
    pub serial: Option<u64>,
    pub version: Option<Version>,
    /// When the source is worth asking again, as it says itself; `None`: it does not say.
    pub ask_again: Option<Duration>,
}

/// What tells one content from another without reading it.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Version {
    File(Stamp),
    /// Validators of RFC 9110 section 8.8.
    Http {
        etag: Option<String>,
        last_modified: Option<String>,
    },
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Stamp {
    path: PathBuf,
    device: u64,
    inode: u64,
    length: u64,
    modified: SystemTime,
}

impl Stamp {
    /// `None` for a file so new that another change may leave the same time: file systems keep it no
    /// finer than the kernel's tick.
    fn of(path: &Path, metadata: &Metadata) -> Option<Self> {
        let modified = metadata.modified().ok()?;
        let age = SystemTime::now().duration_since(modified).ok()?;
        (age > Duration::from_secs(1)).then(|| Self {
            path: path.to_owned(),
            device: metadata.dev(),
            inode: metadata.ino(),
            length: metadata.len(),
            modified,
        })
    }
}

/// Asks a region's source. `before`: the version of the set that is known. `watches`: where to announce
/// changes of a file.
///
/// # Errors
/// Whatever kept the source from giving a whole answer, with its name.
pub async fn ask(
    source: &RegionSource,
    guards: &Guards,
    before: Option<&Version>,
    watches: Option<&Watches>,
) -> Result<Answer> {
    let bounded = |permits: &'static Semaphore| async {
        permits.acquire().await.context("wait for other look-ups")
    };
    match source {
        RegionSource::Prefixes(prefixes) => Ok(Answer::Found(Found {
            prefixes: prefixes.clone(),
            ..Found::default()
        })),
        RegionSource::File(path) => {
            // Watched before it is read: a change in between is announced.
            let watched = watches.map_or(Ok(()), |watches| watch(path, watches));
            let mut answer = read(path, before)?;
            if watched.is_err() {
                let (Answer::Found(Found { ask_again, .. }) | Answer::Unchanged { ask_again }) =
                    &mut answer;
                *ask_again = Some(guards.max_refresh);
            }
            Ok(answer)
        }
        RegionSource::Dns(dns) => {
            let _permit = bounded(&RESOLVING).await?;
            let found = tokio::time::timeout(guards.timeout, resolve(dns, guards.timeout)).await;
            let found = found.unwrap_or_else(|_| {
                let (names, limit) = (dns.names.join(", "), spelled(guards.timeout));
                Err(anyhow!("look up {names}: no answer within {limit}"))
            });
            Ok(Answer::Found(found?))
        }
        RegionSource::Url(url) => {
            let _permit = bounded(&FETCHING).await?;
            let answer = tokio::time::timeout(guards.timeout, fetch(url, before)).await;
            let answer = answer.unwrap_or_else(|_| {
                let limit = spelled(guards.timeout);
                Err(anyhow!("not all of it came within {limit}"))
            });
            answer.with_context(|| format!("fetch {}", url.url))
        }
    }
}

/// Has changes of the file announced, whether it is written, replaced, or behind a symbolic link that
/// is replaced: all are changes of a directory.
fn watch(path: &Path, watches: &Watches) -> Result<()> {
    let changes = WatchMask::CLOSE_WRITE
        | WatchMask::CREATE
        | WatchMask::DELETE
        | WatchMask::MOVE
        | WatchMask::DELETE_SELF
        | WatchMask::MOVE_SELF;
    let target = fs::canonicalize(path)?;
    for path in [path, &target] {
        let directory = path.parent().context("find the directory")?;
        watches.clone().add(directory, changes)?;
    }
    Ok(())
}

fn read(path: &Path, before: Option<&Version>) -> Result<Answer> {
    let metadata = fs::metadata(path).with_context(|| format!("read {}", path.display()))?;
    // From before it is read: a change in between is seen next time.
    let version = Stamp::of(path, &metadata).map(Version::File);
    if version.is_some() && before == version.as_ref() {
        return Ok(Answer::Unchanged { ask_again: None });
    }
    ensure!(metadata.is_file(), "read {}: it is no file", path.display());
    ensure!(
        metadata.len() <= MAX_FILE,
        "read {}: it has {} bytes; at most {MAX_FILE}",
        path.display(),
        metadata.len()
    );
    let body = fs::read(path).with_context(|| format!("read {}", path.display()))?;
    let prefixes = format::read_file(&body).with_context(|| format!("read {}", path.display()))?;
    Ok(Answer::Found(Found {
        prefixes,
        version,
        ..Found::default()
    }))
}

/// The addresses of all the names together, or none of them.
async fn resolve(dns: &Dns, timeout: Duration) -> Result<Found> {
    let resolver = &resolver(dns, timeout)?;
    let answers = dns.names.iter().map(|name| async move {
        let records = addresses(resolver, name, dns.dnssec).await;
        records.with_context(|| format!("look up {name}"))
    });
    let records = try_join_all(answers).await?.concat();
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

/// The address records of a name, and the CNAME records on the way to them.
async fn addresses(resolver: &TokioResolver, name: &str, dnssec: bool) -> Result<Vec<Record>> {
    // Without its end a name would be looked for below the search domains too.
    let absolute = format!("{}.", name.trim_end_matches('.'));
    let mut name = Name::from_utf8(absolute).context("read the name")?;
    let mut all = Vec::new();
    if dnssec {
        // hickory 0.26 takes a signed alias of a name without such records for forged: the proof is
        // of the name at the end, not of the one that was asked for.
        while let Some(alias) = records(resolver, &name, RecordType::CNAME, true)
            .await?
            .pop()
        {
            ensure!(all.len() < MAX_ALIASES, "more than {MAX_ALIASES} aliases");
            let RData::CNAME(target) = &alias.data else {
                bail!("{name} is asked for its alias, and is no alias");
            };
            name = target.0.clone();
            all.push(alias);
        }
    }
    for kind in [RecordType::A, RecordType::AAAA] {
        let found = records(resolver, &name, kind, dnssec).await;
        all.extend(found.with_context(|| format!("{kind} records"))?);
    }
    Ok(all)
}

/// None at all of this type is an answer too.
async fn records(
    resolver: &TokioResolver,
    name: &Name,
    kind: RecordType,
    dnssec: bool,
) -> Result<Vec<Record>> {
    const UNSIGNED: &str = "the answer is not signed (`dnssec: require`)";
    match resolver.lookup(name.clone(), kind).await {
        Ok(lookup) => {
            let wanted = |record: &&Record| {
                record.record_type() == kind || record.record_type() == RecordType::CNAME
            };
            let records: Vec<Record> = lookup.answers().iter().filter(wanted).cloned().collect();
            let signed = records.iter().all(|record| record.proof == Proof::Secure);
            ensure!(signed || !dnssec, UNSIGNED);
            Ok(records)
        }
        Err(NetError::Dns(DnsError::NoRecordsFound(none))) => {
            let code = none.response_code;
            ensure!(code == ResponseCode::NoError, "{code}");
            // hickory checked that these prove it, where they are signed.
            let proof = none.authorities.as_deref().unwrap_or_default();
            let mut proof = proof
                .iter()
                .filter(|r| r.record_type() != RecordType::RRSIG)
                .peekable();
            let signed = proof.peek().is_some() && proof.all(|r| r.proof == Proof::Secure);
            ensure!(signed || !dnssec, UNSIGNED);
            Ok(Vec::new())
        }
        Err(NetError::Dns(DnsError::Nsec { .. })) => bail!(UNSIGNED),
        Err(NetError::NoConnections) => bail!("none of the name servers can be reached"),
        // Its own sources say the same again.
        Err(error) => Err(anyhow!("{error}")),
    }
}

/// Made anew for each look-up: `/etc/resolv.conf` may have changed, and what a cache remembers is what
/// should not be asked again.
fn resolver(dns: &Dns, timeout: Duration) -> Result<TokioResolver> {
    let mut builder = if dns.nameservers.is_empty() {
        TokioResolver::builder_tokio().context("read /etc/resolv.conf")?
    } else {
        let servers = dns.nameservers.iter().map(name_server).collect();
        let config = ResolverConfig::from_parts(None, Vec::new(), servers);
        TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
    };
    let options = builder.options_mut();
    // Of one query: a server that is silent or a packet that is lost leaves time for others.
    options.timeout = timeout / 4;
    options.cache_size = 0;
    options.use_hosts_file = ResolveHosts::Never;
    options.preserve_intermediates = true;
    options.validate = dns.dnssec;
    if let Some(file) = &dns.trust_anchor {
        let anchors = TrustAnchors::from_file(file);
        let anchors = anchors.with_context(|| format!("read {}", file.display()))?;
        builder = builder.with_trust_anchor(Arc::new(anchors));
    }
    let encrypted = dns
        .nameservers
        .iter()
        .any(|n| n.transport != Transport::Plain);
    let roots = if encrypted {
        roots(dns.ca_file.as_deref())?
    } else {
        RootCertStore::empty()
    };
    let resolver = builder.with_tls_config(tls(roots)?).build();
    resolver.context("set up the resolver")
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

fn tls(roots: RootCertStore) -> Result<ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context("set up TLS")?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

/// The certificates that are trusted: a file's, or the system's.
fn roots(file: Option<&Path>) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    match file {
        Some(file) => {
            let named = || format!("read certificates from {}", file.display());
            for certificate in CertificateDer::pem_file_iter(file).with_context(named)? {
                let added = roots.add(certificate.with_context(named)?);
                added.with_context(named)?;
            }
            ensure!(!roots.is_empty(), "{} holds no certificate", file.display());
        }
        None => {
            let found = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(found.certs);
            ensure!(
                !roots.is_empty(),
                "this system has no certificates to check a server's with: install \
                 ca-certificates, or set `ca_file`"
            );
        }
    }
    Ok(roots)
}

async fn fetch(url: &Url, before: Option<&Version>) -> Result<Answer> {
    let insecure = url.insecure;
    let redirects = redirect::Policy::custom(move |attempt| {
        if attempt.url().scheme() != "https" && !insecure {
            let target = attempt.url().to_string();
            return attempt.error(format!("it redirects to {target}, which is not encrypted"));
        }
        if attempt.previous().len() > MAX_REDIRECTS {
            return attempt.error(format!("it redirects more than {MAX_REDIRECTS} times"));
        }
        attempt.follow()
    });
    let client = reqwest::Client::builder()
        .tls_backend_preconfigured(tls(roots(url.ca_file.as_deref())?)?)
        .redirect(redirects)
        .user_agent(concat!("filter-agent/", env!("CARGO_PKG_VERSION")))
        .build()
        .context("set up the HTTP client")?;
    let mut request = client.get(&url.url);
    if let Some(Version::Http {
        etag,
        last_modified,
    }) = before
    {
        if let Some(etag) = etag {
            request = request.header(header::IF_NONE_MATCH, etag);
        }
        if let Some(last_modified) = last_modified {
            request = request.header(header::IF_MODIFIED_SINCE, last_modified);
        }
    }
    // The URL is named already.
    let mut response = request.send().await.map_err(reqwest::Error::without_url)?;
    if response.status() == StatusCode::NOT_MODIFIED && before.is_some() {
        return Ok(Answer::Unchanged { ask_again: None });
    }
    if response.status() != StatusCode::OK {
        bail!("the server answers {}", response.status());
    }
    let validator = |name| {
        let value = response.headers().get(name)?;
        Some(value.to_str().ok()?.to_owned())
    };
    let etag = validator(header::ETAG);
    let last_modified = validator(header::LAST_MODIFIED);
    let known = etag.is_some() || last_modified.is_some();
    let version = known.then_some(Version::Http {
        etag,
        last_modified,
    });
    let mut body = Vec::new();
    while let Some(chunk) = response
        .chunk()
        .await
        .map_err(reqwest::Error::without_url)?
    {
        ensure!(
            body.len() + chunk.len() <= MAX_BODY,
            "the body is longer than {MAX_BODY} bytes"
        );
        body.extend_from_slice(&chunk);
    }
    // A long list takes a while to read: the agent's only thread has other things to do.
    let select = url.select.clone();
    let list = tokio::task::spawn_blocking(move || format::read(&body, &select));
    let List { prefixes, serial } = list.await.context("read the list")??;
    Ok(Answer::Found(Found {
        prefixes,
        serial,
        version,
        ask_again: None,
    }))
}
