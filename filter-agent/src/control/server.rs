//! The servers on the two sockets: connections, and who is at their other end.

use std::{sync::Arc, time::Duration};

use axum::{Router, body::Body, http::Request};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{Semaphore, mpsc::unbounded_channel},
    task::JoinHandle,
};
use tower_service::Service as _;

use super::{
    limits::{ACCEPT_PAUSE, AnswerTime, CONTROL, HEAD_TIMEOUT, Limits, MAX_HEAD, STATUS},
    routes::{Audience, router},
    shared::Shared,
};
use crate::{peer::owner, report::By};

/// The server on one socket.
pub struct Server {
    service: Service,
    accepting: JoinHandle<()>,
}

/// What answers, and how many at a time.
#[derive(Clone)]
struct Service {
    router: Router,
    limits: Limits,
    connections: Arc<Semaphore>,
    requests: Arc<Semaphore>,
}

impl Server {
    /// Serves everything: the socket is root's.
    pub fn start(listener: UnixListener, shared: Shared) -> Self {
        Self::serve(listener, router(shared, Audience::Root), CONTROL)
    }

    /// Serves what the group of the other socket may read.
    pub fn start_for_group(listener: UnixListener, shared: Shared) -> Self {
        Self::serve(listener, router(shared, Audience::Group), STATUS)
    }

    fn serve(listener: UnixListener, router: Router, limits: Limits) -> Self {
        let service = Service {
            router,
            limits,
            connections: Arc::new(Semaphore::new(limits.connections)),
            requests: Arc::new(Semaphore::new(limits.requests)),
        };
        let accepting = tokio::spawn(accept(listener, service.clone()));
        Self { service, accepting }
    }

    /// Takes connections from another listener: the socket of the one before was removed.
    pub fn listen_on(&mut self, listener: UnixListener) {
        self.accepting.abort();
        self.accepting = tokio::spawn(accept(listener, self.service.clone()));
    }

    /// Takes no more connections, and lets those that are open end, for a bounded time.
    pub async fn stop(self, timeout: Duration) {
        self.accepting.abort();
        let Service {
            limits,
            connections,
            ..
        } = &self.service;
        let all = connections.acquire_many(limits.connections as u32);
        let _ = tokio::time::timeout(timeout, all).await;
    }
}

async fn accept(listener: UnixListener, service: Service) {
    loop {
        let Ok(permit) = service.connections.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let service = service.clone();
                tokio::spawn(async move {
                    serve(stream, service).await;
                    drop(permit);
                });
            }
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// Serves one request. A client that sends slowly or does not read is given up.
async fn serve(stream: UnixStream, service: Service) {
    let Service {
        router,
        limits,
        requests,
        ..
    } = service;
    let by = client(&stream);
    let (answered, mut answer_time) = unbounded_channel();
    let service = service_fn(move |mut request: Request<Incoming>| {
        let (mut router, answered) = (router.clone(), answered.clone());
        let requests = requests.clone();
        request.extensions_mut().insert(by.clone());
        async move {
            let turn = requests.acquire_owned().await;
            let response = router.call(request.map(Body::new)).await;
            let time = response.as_ref().ok().and_then(|r| r.extensions().get());
            let time = time.map_or(limits.reading, |&AnswerTime(time)| time);
            let _ = answered.send((time, turn));
            response
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        // What is wrong with it concerns the client alone.
        _ = connection => {}
        () = async {
            match answer_time.recv().await {
                // Its turn lasts until its client has the answer.
                Some((time, _turn)) => tokio::time::sleep(time).await,
                None => std::future::pending().await,
            }
        } => {}
    }
}

/// The client of a connection.
fn client(stream: &UnixStream) -> Option<By> {
    let credentials = stream.peer_cred().ok()?;
    Some(owner(credentials.uid(), credentials.pid()))
}
