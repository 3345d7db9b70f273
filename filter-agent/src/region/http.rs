//! Published lists, by HTTPS.

use anyhow::{Context as _, Result, bail, ensure};
use reqwest::{
    StatusCode,
    header::{self, HeaderMap},
    redirect,
};

use crate::{
    policy::Url,
    region::{
        answer::{Answer, Found, Version},
        lists::{self, List},
        tls,
    },
};

/// Longest body of a published list, decompressed, in bytes: four times the longest that is published
/// today (Azure's).
const MAX_BODY: usize = 16 << 20;

/// Redirects followed for one list.
const MAX_REDIRECTS: usize = 5;

pub(super) async fn fetch(url: &Url, before: Option<&Version>) -> Result<Answer> {
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
        .tls_backend_preconfigured(tls::client(url.ca_file.as_deref()).await?)
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
    // The caller's context names the URL.
    let mut response = request.send().await.map_err(reqwest::Error::without_url)?;
    if response.status() == StatusCode::NOT_MODIFIED && before.is_some() {
        return Ok(Answer::Unchanged { ask_again: None });
    }
    if response.status() != StatusCode::OK {
        bail!("the server answers {}", response.status());
    }
    let version = version(response.headers());
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
    // Parsing a long list takes a while, and the agent's loop must not block.
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

/// Returns the validators of an answer. `None`: it has none that a request could repeat.
pub fn version(headers: &HeaderMap) -> Option<Version> {
    let validator = |name| {
        let value = headers.get(name)?;
        Some(value.to_str().ok()?.to_owned())
    };
    let etag = validator(header::ETAG);
    let last_modified = validator(header::LAST_MODIFIED);
    let known = etag.is_some() || last_modified.is_some();
    known.then_some(Version::Http {
        etag,
        last_modified,
    })
}
