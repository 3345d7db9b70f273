//! Headers of an answer by HTTP, as hyper reads them. What else the agent reads of headers belongs here, too.

#![no_main]

use std::{
    cell::LazyCell,
    io,
    time::{Duration, SystemTime},
};

use filter_agent::{
    region::{
        answer::{Answer, Found, Version},
        http,
        state::State,
        try_later::TryLater,
    },
    store,
};
use filter_fuzz::{now, plant, region};
use http_body_util::Empty;
use hyper::{
    HeaderMap, Request, StatusCode,
    body::Bytes,
    client::conn::http1,
    header::{HeaderValue, IF_MODIFIED_SINCE, IF_NONE_MATCH},
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    runtime::{Builder, Runtime},
};

thread_local! {
    static RUNTIME: LazyCell<Runtime> =
        LazyCell::new(|| Builder::new_current_thread().build().expect("a runtime"));
}

libfuzzer_sys::fuzz_target!(|answer: &[u8]| {
    let headers = RUNTIME.with(|runtime| runtime.block_on(exchange(answer)));
    let Some(headers) = headers else {
        return;
    };
    let status = StatusCode::TOO_MANY_REQUESTS;
    if let Some(later) = TryLater::read(status, &headers, SystemTime::UNIX_EPOCH) {
        let wait = later.wait();
        assert!(
            !wait.is_zero() && wait <= Duration::from_hours(24),
            "{wait:?}"
        );
    }
    let version = http::version(&headers);
    if let Some(Version::Http {
        etag,
        last_modified,
    }) = &version
    {
        assert!(etag.is_some() || last_modified.is_some());
        check_request(etag.as_deref(), last_modified.as_deref());
        check_kept(&version);
    }
    if let Some(Version::Http {
        etag: Some(etag),
        last_modified: Some(_),
    }) = &version
    {
        plant(etag.starts_with("W/"));
    }
});

/// The headers. `None`: it is no answer.
async fn exchange(answer: &[u8]) -> Option<HeaderMap> {
    let (client, mut server) = tokio::io::duplex(1 << 16);
    let connection = http1::handshake::<TokioIo<DuplexStream>, Empty<Bytes>>(TokioIo::new(client));
    let (mut sender, connection) = connection.await.ok()?;
    let request = Request::builder()
        .uri("/list")
        .body(Empty::new())
        .expect("a request");
    let response = sender.send_request(request);
    // hyper takes no answer that comes before its request.
    let serve = async {
        server.read_u8().await?;
        server.write_all(answer).await?;
        server.shutdown().await?;
        std::future::pending::<io::Result<()>>().await
    };
    tokio::select! {
        biased;
        response = response => {
            Some(response.ok()?.headers().clone())
        }
        _ = connection => None,
        _ = serve => None,
    }
}

/// What is kept of an answer must not keep the next request from being made, nor add anything to it.
fn check_request(etag: Option<&str>, last_modified: Option<&str>) {
    for (name, validator) in [(IF_NONE_MATCH, etag), (IF_MODIFIED_SINCE, last_modified)] {
        if let Some(text) = validator {
            let value = HeaderValue::from_str(text).expect("it can be sent again");
            assert_eq!(value.as_bytes(), text.as_bytes(), "{name}");
            assert!(!text.contains(['\r', '\n', '\0']));
        }
    }
}

/// The version comes back from the state directory as it was.
fn check_kept(version: &Option<Version>) {
    let region = region();
    let mut state = State::new(region.clone(), now());
    let found = Found {
        prefixes: vec!["192.0.2.0/24".parse().expect("a prefix")],
        version: version.clone(),
        ..Found::default()
    };
    state.take(Ok(Answer::Found(found)), false, now());
    assert_eq!(state.version(), version.as_ref());
    let set = state.set.expect("it is good");
    let text = store::encode("x", &region.source, &set).expect("it is written");
    let read = store::decode(&text, "x", &region.source).expect("it is read");
    assert_eq!(read.version, *version);
}
