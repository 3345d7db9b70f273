//! The server on the control socket: connections, and who is at their other end.

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
    limits::{ACCEPT_PAUSE, AnswerTime, CLIENT_TIMEOUT, CONTROL_CONNECTIONS, HEAD_TIMEOUT},
    routes::router,
    shared::Shared,
};
use crate::{peer::owner, report::By};

pub struct Server {
    router: Router,
    accepting: JoinHandle<()>,
    connections: Arc<Semaphore>,
}

impl Server {
    pub fn start(listener: UnixListener, shared: Shared) -> Self {
        let router = router(shared);
        let connections = Arc::new(Semaphore::new(CONTROL_CONNECTIONS));
        let accepting = tokio::spawn(accept(listener, router.clone(), connections.clone()));
        Self {
            router,
            accepting,
            connections,
        }
    }

    /// Takes connections from another listener: the socket of the one before was removed.
    pub fn listen_on(&mut self, listener: UnixListener) {
        self.accepting.abort();
        let (router, connections) = (self.router.clone(), self.connections.clone());
        self.accepting = tokio::spawn(accept(listener, router, connections));
    }

    /// Takes no more connections, and lets those that are open end, for a bounded time.
    pub async fn stop(self, timeout: Duration) {
        self.accepting.abort();
        let all = self.connections.acquire_many(CONTROL_CONNECTIONS as u32);
        let _ = tokio::time::timeout(timeout, all).await;
    }
}

async fn accept(listener: UnixListener, router: Router, connections: Arc<Semaphore>) {
    loop {
        let Ok(permit) = connections.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let router = router.clone();
                tokio::spawn(async move {
                    serve(stream, router).await;
                    drop(permit);
                });
            }
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// Serves one request. A client that sends slowly or does not read is given up.
async fn serve(stream: UnixStream, router: Router) {
    let by = client(&stream);
    let (answered, mut answer_time) = unbounded_channel();
    let service = service_fn(move |mut request: Request<Incoming>| {
        let (mut router, answered) = (router.clone(), answered.clone());
        request.extensions_mut().insert(by.clone());
        async move {
            let response = router.call(request.map(Body::new)).await;
            let time = response.as_ref().ok().and_then(|r| r.extensions().get());
            let _ = answered.send(time.map_or(CLIENT_TIMEOUT, |&AnswerTime(time)| time));
            response
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        // What is wrong with it concerns the client alone.
        _ = connection => {}
        () = async {
            match answer_time.recv().await {
                Some(time) => tokio::time::sleep(time).await,
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
