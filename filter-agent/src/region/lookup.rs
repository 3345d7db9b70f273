//! One look-up of a region: asks DNS, an HTTPS server or a file, now.

use std::{
    fs::{self, Metadata},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
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
    policy::{Guards, RegionSource, Url, spelled},
    region::dns,
    region::lists::{self, List},
};

/// Longest body of a published list, decompressed, in bytes: four times the longest that is published
/// today (Azure's).
const MAX_BODY: usize = 16 << 20;

/// Redirects followed for one list.
const MAX_REDIRECTS: usize = 5;

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
        RegionSource::Dns(source) => {
            let _permit = bounded(&RESOLVING).await?;
            let found =
                tokio::time::timeout(guards.timeout, dns::resolve(source, guards.timeout)).await;
            let found = found.unwrap_or_else(|_| {
                let (names, limit) = (source.names.join(", "), spelled(guards.timeout));
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
    let prefixes = lists::read_file(&body).with_context(|| format!("read {}", path.display()))?;
    Ok(Answer::Found(Found {
        prefixes,
        version,
        ..Found::default()
    }))
}

pub(crate) fn tls(roots: RootCertStore) -> Result<ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context("set up TLS")?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

/// The certificates that are trusted: a file's, or the system's.
pub(crate) fn roots(file: Option<&Path>) -> Result<RootCertStore> {
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
    let list = tokio::task::spawn_blocking(move || lists::read(&body, &select));
    let List { prefixes, serial } = list.await.context("read the list")??;
    Ok(Answer::Found(Found {
        prefixes,
        serial,
        version,
        ask_again: None,
    }))
}
