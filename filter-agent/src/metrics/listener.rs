//! Serves `GET /metrics`, and nothing else, on the address of the policy. An address that is taken, or not there yet, is
//! an error in `status` and is tried again; it stops nothing.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::State,
    http::{Request, StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use backon::{BackoffBuilder as _, ExponentialBuilder};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus::TEXT_FORMAT;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
};
use tower_service::Service as _;

use crate::{log::Entry, metrics::scrape::Scraper, snapshot::Snapshot};

/// Connections at a time. More wait: descriptors for the checks must be left.
const MAX_CONNECTIONS: usize = 8;

/// Time allowed to a client to send its request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(2);

/// Longest head of a request, in bytes: the least that the HTTP crate takes.
const MAX_HEAD: usize = 8 << 10;

/// Time allowed to a connection from its beginning to its end.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(15);

/// Pauses before an address is tried again.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// Pause after an error of `accept`, such as no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The answer where there is no text: errors name files of this host, and anybody may read this.
const NO_TEXT: &str = "the filter cannot be read now: `filter-agent status` says why\n";

/// Answers `GET /metrics`.
async fn metrics(State(scraper): State<Arc<Scraper>>) -> Response {
    match scraper.text().await {
        Ok(text) => ([(CONTENT_TYPE, TEXT_FORMAT)], text).into_response(),
        Err(_) => (StatusCode::SERVICE_UNAVAILABLE, NO_TEXT).into_response(),
    }
}

/// Serves metrics wherever the policy in force says, until the agent ends. `failed`: gets why it cannot.
pub async fn serve(
    mut snapshot: watch::Receiver<Snapshot>,
    scraper: Arc<Scraper>,
    failed: watch::Sender<Option<String>>,
) {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .with_state(scraper);
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let address = snapshot.borrow_and_update().file.policy.metrics;
        let serving = async {
            match address {
                Some(address) => listen(address, &router, &connections, &failed).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = serving => {}
            is_moved = moved(&mut snapshot, address) => {
                failed.send_replace(None);
                if !is_moved {
                    return;
                }
            }
        }
    }
}

/// Waits until the policy in force names another address. Returns false when the agent ends.
async fn moved(snapshot: &mut watch::Receiver<Snapshot>, from: Option<SocketAddr>) -> bool {
    let is_other = |snapshot: &Snapshot| snapshot.file.policy.metrics != from;
    snapshot.wait_for(is_other).await.is_ok()
}

/// Listens on an address for good, as soon as it can.
async fn listen(
    address: SocketAddr,
    router: &Router,
    connections: &Arc<Semaphore>,
    failed: &watch::Sender<Option<String>>,
) {
    let mut pauses = ExponentialBuilder::new()
        .with_min_delay(FIRST_PAUSE)
        .with_max_delay(LONGEST_PAUSE)
        .without_max_times()
        .build();
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => {
                failed.send_replace(None);
                Entry::info(format!("metrics on http://{address}/metrics")).log();
                accept(&listener, router, connections).await;
            }
            Err(error) => {
                let error = format!("no metrics on {address}: {error}; tried again");
                failed.send_if_modified(|failed| {
                    let is_new = failed.as_ref() != Some(&error);
                    if is_new {
                        Entry::error(error.clone()).log();
                        *failed = Some(error);
                    }
                    is_new
                });
            }
        }
        tokio::time::sleep(pauses.next().unwrap_or(LONGEST_PAUSE)).await;
    }
}

async fn accept(listener: &TcpListener, router: &Router, connections: &Arc<Semaphore>) {
    while let Ok(permit) = connections.clone().acquire_owned().await {
        match listener.accept().await {
            Ok((stream, _)) => {
                let router = router.clone();
                tokio::spawn(async move {
                    // An error of a connection concerns its client alone.
                    let _ = tokio::time::timeout(CONNECTION_TIMEOUT, answer(stream, router)).await;
                    drop(permit);
                });
            }
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// Answers one request.
async fn answer(stream: TcpStream, router: Router) {
    let service = service_fn(move |request: Request<Incoming>| {
        let mut router = router.clone();
        async move { router.call(request.map(Body::new)).await }
    });
    let _ = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service)
        .await;
}
