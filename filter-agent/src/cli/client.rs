//! Requests to the agent, by its control socket.

use std::{io, path::Path};

use anyhow::{Context as _, Result, anyhow, bail};
use http_body_util::{BodyExt as _, Empty};
use hyper::{Method, Request, body::Bytes};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::report;

/// Percent-encodes a query's value (RFC 3986 section 2.3).
pub(super) fn encode(value: &str) -> String {
    let mut encoded = String::new();
    for byte in value.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                encoded.push(byte.into());
            }
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

/// One request to the daemon.
pub(super) async fn ask<T: DeserializeOwned>(
    socket: &Path,
    method: Method,
    path: &str,
) -> Result<T> {
    let stream = UnixStream::connect(socket).await.map_err(|error| {
        let socket = socket.display();
        let what = match error.kind() {
            io::ErrorKind::PermissionDenied => format!("only root may use {socket}"),
            _ => format!("no agent answers on {socket}: start it with `filter-agent run`"),
        };
        anyhow!(error).context(what)
    })?;
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.context("speak to the agent")?;
    tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(hyper::header::HOST, "filter-agent")
        .body(Empty::<Bytes>::new())
        .context("make a request")?;
    let response = sender
        .send_request(request)
        .await
        .context("ask the agent")?;
    let status = response.status();
    let body = response.into_body().collect().await;
    let body = body.context("read the agent's answer")?.to_bytes();
    if !status.is_success() {
        match serde_json::from_slice::<report::Failure>(&body) {
            Ok(failure) => bail!("{}", failure.error),
            Err(_) => bail!("{}", String::from_utf8_lossy(&body)),
        }
    }
    serde_json::from_slice(&body).context("understand the agent's answer")
}
