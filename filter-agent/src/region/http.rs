//! Published lists, by HTTPS.

use std::time::SystemTime;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use reqwest::{
    Client, Response, StatusCode,
    header::{self, HeaderMap},
    redirect,
};
use tokio::sync::Semaphore;

use crate::{
    policy::Url,
    region::{
        answer::{Answer, Found, Version},
        encoding::{self, MAX_BODY},
        headers,
        lists::{self, List},
        secrets::Secrets,
        tls,
        try_later::TryLater,
    },
};

/// Lists parsed at once: parsing takes several times the memory of the text.
static PARSING: Semaphore = Semaphore::const_new(1);

/// Redirects followed for one list.
const MAX_REDIRECTS: usize = 5;

/// # Errors
/// A `TryLater` where the server names a time to come; else why there is no list. The caller's context names the URL.
pub(super) async fn fetch(list: &Url, before: Option<&Version>) -> Result<Answer> {
    let mut secrets = Secrets::default();
    let answer = fetch_with(list, before, &mut secrets).await;
    answer.map_err(|error| match error.downcast_ref::<TryLater>() {
        // It quotes nothing of the answer.
        Some(_) => error,
        None => anyhow!(secrets.masked(&tls::plain(&format!("{error:#}")))),
    })
}

/// As `fetch`. Errors may quote `secrets`, which those of the requests are added to.
async fn fetch_with(list: &Url, before: Option<&Version>, secrets: &mut Secrets) -> Result<Answer> {
    let client = Client::builder()
        .tls_backend_preconfigured(tls::client(list.ca_file.as_deref()).await?)
        // `request` follows them.
        .redirect(redirect::Policy::none())
        .user_agent(concat!("filter-agent/", env!("CARGO_PKG_VERSION")))
        .build()
        .context("set up the HTTP client")?;
    let headers = match &list.headers_file {
        Some(file) => headers::read(file).await?,
        None => HeaderMap::new(),
    };
    let mut response = request(&client, list, headers, &validators(before), secrets).await?;
    let status = response.status();
    if status == StatusCode::NOT_MODIFIED && before.is_some() {
        return Ok(Answer::Unchanged { ask_again: None });
    }
    if status != StatusCode::OK {
        let later = TryLater::read(status, response.headers(), SystemTime::now());
        return Err(later.map_or_else(|| anyhow!("the server answers {status}"), Into::into));
    }
    let version = version(response.headers());
    let content_type = response.headers().get(header::CONTENT_TYPE);
    let content_type = content_type.and_then(|value| value.to_str().ok());
    let content_type = content_type.unwrap_or_default().to_owned();
    let encoding = encoding::of(response.headers());
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(without_url)? {
        ensure!(
            body.len() + chunk.len() <= MAX_BODY,
            "the body is longer than {MAX_BODY} bytes"
        );
        body.extend_from_slice(&chunk);
    }
    let select = list.select.clone();
    let parsing = PARSING.acquire().await.context("wait for other lists")?;
    // Parsing a long list takes a while, and the agent's loop must not block.
    let read = tokio::task::spawn_blocking(move || {
        let body = encoding::decoded(body, &encoding)?;
        let list = lists::read(&body, &select);
        drop(parsing);
        match list {
            // Some servers call a list a page, too.
            Err(error) if is_web_page(&content_type, &body) => Err(error.context(
                "the server answers with a web page, such as one to log in or one of a proxy, not with a list",
            )),
            list => list.map(|List { prefixes, serial }| Found {
                serial,
                version,
                ..Found::of(prefixes)
            }),
        }
    });
    Ok(Answer::Found(read.await.context("read the list")??))
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

fn validators(before: Option<&Version>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    if let Some(Version::Http {
        etag,
        last_modified,
    }) = before
    {
        let validators = [
            (header::IF_NONE_MATCH, etag),
            (header::IF_MODIFIED_SINCE, last_modified),
        ];
        for (name, value) in validators {
            // One that no server sends is left out, and the whole list comes.
            if let Some(Ok(value)) = value.as_ref().map(|value| value.parse()) {
                headers.insert(name, value);
            }
        }
    }
    headers
}

/// Requests a list, and follows redirects. From the first that leads to another origin on, the operator's `headers` are
/// not sent. The client's own way of following would send them, and this URL with its query in `Referer`.
async fn request(
    client: &Client,
    list: &Url,
    mut headers: HeaderMap,
    validators: &HeaderMap,
    secrets: &mut Secrets,
) -> Result<Response> {
    let mut url = list.url.clone();
    for _ in 0..=MAX_REDIRECTS {
        let request = client
            .get(url.reveal().clone())
            .headers(validators.clone())
            .header(header::ACCEPT_ENCODING, encoding::GZIP)
            .headers(headers.clone());
        let request = request.build().map_err(without_url)?;
        secrets.add(&request, url.reveal());
        let response = client.execute(request).await.map_err(without_url)?;
        let (301 | 302 | 303 | 307 | 308) = response.status().as_u16() else {
            return Ok(response);
        };
        let location = response.headers().get(header::LOCATION);
        let location = location.and_then(|location| std::str::from_utf8(location.as_bytes()).ok());
        let next = location.and_then(|location| url.join(location).ok());
        let next = next.context("it redirects, but not to a URL")?;
        match next.scheme() {
            "https" => {}
            "http" if list.insecure => {}
            _ => bail!("it redirects to {next}, which is not encrypted"),
        }
        if !next.has_same_origin(&url) {
            headers.clear();
        }
        url = next;
    }
    bail!("it redirects more than {MAX_REDIRECTS} times")
}

fn without_url(error: reqwest::Error) -> anyhow::Error {
    error.without_url().into()
}

/// Whether a body is HTML, by its type or its beginning.
fn is_web_page(content_type: &str, body: &[u8]) -> bool {
    let kind = content_type.split(';').next().unwrap_or_default().trim();
    let kinds = ["text/html", "application/xhtml+xml"];
    let begins = |with: &str| {
        let beginning = body.trim_ascii_start().get(..with.len());
        beginning.is_some_and(|beginning| beginning.eq_ignore_ascii_case(with.as_bytes()))
    };
    kinds.iter().any(|html| kind.eq_ignore_ascii_case(html))
        || begins("<!doctype html")
        || begins("<html")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn web_page_is_known_by_its_type_or_its_beginning() {
        for (content_type, body) in [
            ("text/html", "203.0.113.1"),
            ("Text/HTML; charset=utf-8", ""),
            ("text/plain", "\n <!DOCTYPE html><p>"),
            ("", "<html>"),
        ] {
            assert!(is_web_page(content_type, body.as_bytes()), "{content_type}");
        }
        assert!(!is_web_page("text/plain", b"203.0.113.1\n"));
        assert!(!is_web_page("application/json", b"{}"));
    }
}
