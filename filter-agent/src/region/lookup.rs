//! One look-up of a region, by DNS, HTTPS or from a file.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, anyhow};
use futures_util::future::join_all;
use tokio::sync::Semaphore;

use crate::{
    policy::{Guards, Policy, Region, RegionSource, spelled},
    region::{
        answer::{Answer, Found, Version},
        dns,
        files::{self, Watcher},
        http,
    },
};

/// DNS look-ups at once: each takes a few sockets.
static RESOLVING: Semaphore = Semaphore::const_new(16);

/// Downloads at once: each takes memory for the body and its prefixes.
static FETCHING: Semaphore = Semaphore::const_new(4);

/// Looks up a region. `before`: the version of the set in force. `watcher`: watches the file of a file region from then
/// on.
///
/// # Errors
/// The source did not return a complete result. The error names the source.
pub async fn ask(
    source: &RegionSource,
    guards: &Guards,
    before: Option<&Version>,
    watcher: Option<&Watcher>,
) -> Result<Answer> {
    let bounded = |permits: &'static Semaphore| async {
        permits.acquire().await.context("wait for other look-ups")
    };
    match source {
        RegionSource::Prefixes(prefixes) => Ok(Answer::Found(Found {
            prefixes: prefixes.clone(),
            ..Found::default()
        })),
        RegionSource::File(path) => files::read(path, guards.timeout, before, watcher).await,
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
            let answer = tokio::time::timeout(guards.timeout, http::fetch(url, before)).await;
            let answer = answer.unwrap_or_else(|_| {
                let limit = spelled(guards.timeout);
                Err(anyhow!("not all of it came within {limit}"))
            });
            answer.with_context(|| format!("fetch {}", url.url))
        }
    }
}

/// Looks several regions of a policy up at once. `versions`: of the sets that are known, by the regions' names.
pub async fn ask_all(
    policy: &Policy,
    versions: BTreeMap<&str, Option<Version>>,
) -> BTreeMap<String, Result<Answer>> {
    let answers = versions.into_iter().map(|(name, version)| async move {
        let Region { source, guards } = &policy.regions[name];
        let answer = ask(source, guards, version.as_ref(), None).await;
        (name.to_owned(), answer)
    });
    join_all(answers).await.into_iter().collect()
}
