//! The control socket: requests in HTTP, answers in JSON. It reaches the agent by events and snapshots, and the
//! kernel by jobs for the thread that owns the filter.

mod trace;

use std::{net::IpAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, anyhow};
use axum::{
    Extension, Json, Router,
    body::{Body, to_bytes},
    extract::{Query, State},
    http::{Request, StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus::TEXT_FORMAT;
use serde::Deserialize;
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{
        Semaphore,
        mpsc::{UnboundedSender, unbounded_channel},
        oneshot, watch,
    },
    task::JoinHandle,
};
use tower_service::Service as _;

use crate::{
    clock::Clock,
    drops::Wanted,
    enforcer::{Handle, Observed, drops::Found},
    event::{self, Event, ReloadOptions, Reply},
    hints,
    log::{Entry, recent},
    metrics::scrape::Scraper,
    policy_file::MAX_LENGTH,
    region::state as region,
    report::{self, By},
    snapshot::Snapshot,
    temporary::{Change, parse_source},
    threads,
};

/// Connections at a time. More wait: descriptors for the checks must be left.
const MAX_CONNECTIONS: usize = 32;

/// Time allowed to a client to send its request's head. While it does not, it keeps others waiting.
const HEAD_TIMEOUT: Duration = Duration::from_secs(2);

/// Time allowed to a client to send a body, and to read the answer.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest description of a change of the temporary rules, in bytes.
const MAX_CHANGE: usize = 8 << 10;

/// Pause after an error of `accept`, such as no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Shared by all routes.
#[derive(Clone)]
struct Shared {
    events: UnboundedSender<Event>,
    snapshot: watch::Receiver<Snapshot>,
    enforcer: Handle,
    clock: Clock,
    scraper: Arc<Scraper>,
}

impl Shared {
    /// Has the agent answer a request.
    async fn ask<T>(&self, request: impl FnOnce(Reply<T>) -> event::Request) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        let _ = self.events.send(Event::Request(request(Reply(reply))));
        let ending = |_| anyhow!("the agent is ending, and did not do it");
        answer.await.map_err(ending).flatten()
    }

    async fn observe(&self, verify: bool) -> Result<Observed> {
        let observed = self.enforcer.call(move |enforcer| enforcer.observe(verify));
        let (observed, entries) = observed.await.flatten()?;
        entries.into_iter().for_each(Entry::log);
        Ok(observed)
    }

    fn snapshot(&self) -> Snapshot {
        self.snapshot.borrow().clone()
    }
}

/// The server on the control socket.
pub struct Server {
    router: Router,
    accepting: JoinHandle<()>,
    connections: Arc<Semaphore>,
}

impl Server {
    pub fn start(
        listener: UnixListener,
        events: UnboundedSender<Event>,
        snapshot: watch::Receiver<Snapshot>,
        enforcer: Handle,
        clock: Clock,
        scraper: Arc<Scraper>,
    ) -> Self {
        let router = router(Shared {
            events,
            snapshot,
            enforcer,
            clock,
            scraper,
        });
        let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
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
        let all = self.connections.acquire_many(MAX_CONNECTIONS as u32);
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

/// Time allowed to a client to read an answer that is longer than others, since it takes its time.
#[derive(Clone)]
struct AnswerTime(Duration);

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

/// An error as the control socket reports it.
struct Failed(anyhow::Error);

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        let error = format!("{:#}", self.0);
        (StatusCode::CONFLICT, Json(report::Failure { error })).into_response()
    }
}

impl From<anyhow::Error> for Failed {
    fn from(error: anyhow::Error) -> Self {
        Self(error)
    }
}

type Answer<T> = Result<Json<T>, Failed>;

fn router(shared: Shared) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/status", get(status))
        .route("/rules", get(rules))
        .route("/regions", get(regions))
        .route("/explain", get(explain))
        .route("/drops", get(drops))
        .route("/events", get(events))
        .route("/trace", post(trace::trace))
        .route("/plan", get(plan).post(plan_text))
        .route("/reload", post(reload))
        .route("/refresh", post(refresh))
        .route("/temporary", post(temporary))
        .route("/detach", post(detach))
        .with_state(shared)
}

#[derive(Deserialize)]
struct StatusQuery {
    #[serde(default)]
    verify: bool,
}

async fn status(
    State(shared): State<Shared>,
    Query(query): Query<StatusQuery>,
) -> Answer<report::Status> {
    let observed = shared.observe(query.verify).await?;
    let mut status = shared.snapshot().status(&observed);
    status
        .errors
        .extend(shared.scraper.listener.borrow().clone());
    Ok(Json(status))
}

async fn metrics(State(shared): State<Shared>) -> Result<impl IntoResponse, Failed> {
    let text = shared.scraper.text().await;
    let text = text.map_err(|error| anyhow!(error))?;
    Ok(([(CONTENT_TYPE, TEXT_FORMAT)], text))
}

#[derive(Deserialize)]
struct DatabaseQuery {
    /// `None`: every database.
    database: Option<String>,
}

async fn rules(
    State(shared): State<Shared>,
    Query(query): Query<DatabaseQuery>,
) -> Answer<Vec<report::Rule>> {
    let observed = shared.observe(false).await?;
    let (snapshot, now) = (shared.snapshot(), shared.clock.now());
    // Regions may hold a million prefixes.
    let rules = threads::run_on_thread("rules", move || {
        let regions = region::prefixes(&snapshot.regions);
        observed.rules(query.database.as_deref(), Some(&regions), now)
    });
    Ok(Json(rules.await.flatten()?))
}

async fn regions(State(shared): State<Shared>) -> Answer<Vec<report::Region>> {
    Ok(Json(shared.snapshot().regions()))
}

#[derive(Deserialize)]
struct ExplainQuery {
    source: IpAddr,
    database: Option<String>,
}

async fn explain(
    State(shared): State<Shared>,
    Query(query): Query<ExplainQuery>,
) -> Answer<Vec<report::Explanation>> {
    let ExplainQuery { source, database } = query;
    // As a server on a socket for both families names an IPv4 client.
    let source = source.to_canonical();
    let explained = shared
        .enforcer
        .call(move |enforcer| enforcer.explain(source, database.as_deref()));
    Ok(Json(explained.await.flatten()?))
}

#[derive(Deserialize)]
struct DropsQuery {
    database: Option<String>,
    /// An address or a prefix.
    source: Option<String>,
    limit: Option<usize>,
    hints: Option<bool>,
}

async fn drops(
    State(shared): State<Shared>,
    Query(query): Query<DropsQuery>,
) -> Answer<report::Drops> {
    let wanted = Wanted {
        database: query.database,
        source: query.source.as_deref().map(parse_source).transpose()?,
        limit: query.limit,
    };
    let found = shared
        .enforcer
        .call(move |enforcer| enforcer.drops(&wanted));
    let mut found = found.await.flatten()?;
    if query.hints == Some(false) {
        return Ok(Json(found.drops));
    }
    let (snapshot, now) = (shared.snapshot(), shared.clock.now());
    let hinted = threads::run_on_thread("hints", move || {
        let Found {
            drops,
            in_force,
            ended,
        } = &mut found;
        hints::add(drops, in_force, &snapshot.regions, ended, now);
        found.drops
    });
    Ok(Json(hinted.await?))
}

#[derive(Deserialize)]
struct EventsQuery {
    /// Leaves out the lines up to this number.
    #[serde(default)]
    after: u64,
}

async fn events(Query(query): Query<EventsQuery>) -> Json<report::Events> {
    Json(recent::after(query.after))
}

#[derive(Deserialize)]
struct CallerQuery {
    /// The address of who asks; `None`: not known.
    caller: Option<IpAddr>,
}

async fn plan(
    State(shared): State<Shared>,
    Query(query): Query<CallerQuery>,
) -> Answer<report::Plan> {
    let plan = shared.ask(|reply| event::Request::Plan {
        text: None,
        path: None,
        caller: query.caller,
        reply,
    });
    Ok(Json(plan.await?))
}

#[derive(Deserialize)]
struct PlanQuery {
    /// Names the text in messages.
    file: PathBuf,
    caller: Option<IpAddr>,
}

async fn plan_text(
    State(shared): State<Shared>,
    Query(query): Query<PlanQuery>,
    body: Body,
) -> Answer<report::Plan> {
    let read = tokio::time::timeout(CLIENT_TIMEOUT, to_bytes(body, MAX_LENGTH as usize)).await;
    let text = read
        .context("read the policy: it took too long to arrive")?
        .context("read the policy")?;
    let text = String::from_utf8(text.into()).context("read the policy: it is not UTF-8")?;
    let plan = shared.ask(|reply| event::Request::Plan {
        text: Some(text),
        path: Some(query.file),
        caller: query.caller,
        reply,
    });
    Ok(Json(plan.await?))
}

#[derive(Deserialize)]
struct ReloadQuery {
    #[serde(default)]
    existing: bool,
    #[serde(default)]
    allow_unprotect: bool,
    max_cut: Option<usize>,
    caller: Option<IpAddr>,
}

async fn reload(
    State(shared): State<Shared>,
    Query(query): Query<ReloadQuery>,
) -> Answer<report::Reloaded> {
    let options = ReloadOptions {
        existing: query.existing,
        allow_unprotect: query.allow_unprotect,
        max_cut: query.max_cut,
        caller: query.caller,
    };
    let reloaded = shared.ask(|reply| event::Request::Reload { options, reply });
    Ok(Json(reloaded.await?))
}

#[derive(Deserialize)]
struct RefreshQuery {
    /// `None`: every region.
    region: Option<String>,
    #[serde(default)]
    accept: bool,
}

async fn refresh(
    State(shared): State<Shared>,
    Query(query): Query<RefreshQuery>,
) -> Answer<Vec<report::Refreshed>> {
    let refreshed = shared.ask(|reply| event::Request::Refresh {
        region: query.region,
        accept: query.accept,
        reply,
    });
    Ok(Json(refreshed.await?))
}

async fn temporary(
    State(shared): State<Shared>,
    Extension(by): Extension<Option<By>>,
    body: Body,
) -> Answer<report::Temporary> {
    let read = tokio::time::timeout(CLIENT_TIMEOUT, to_bytes(body, MAX_CHANGE)).await;
    let body = read
        .context("read the change: it took too long to arrive")?
        .context("read the change")?;
    let (change, caller) = read_change(&body).context("read the change")?;
    let changed = shared.ask(|reply| event::Request::Temporary {
        change,
        caller,
        by,
        reply,
    });
    Ok(Json(changed.await?))
}

/// Reads a change, and the address of who asks for it, which may stand beside it.
fn read_change(body: &[u8]) -> serde_json::Result<(Change, Option<IpAddr>)> {
    let mut fields: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(body)?;
    let caller = fields.remove("caller").unwrap_or_default();
    let caller = serde_json::from_value(caller)?;
    let change = serde_json::from_value(fields.into())?;
    Ok((change, caller))
}

/// The client of a connection, from the kernel and /proc.
fn client(stream: &UnixStream) -> Option<By> {
    let credentials = stream.peer_cred().ok()?;
    let read = |file: &str| {
        let text = std::fs::read_to_string(format!("/proc/{}/{file}", credentials.pid()?)).ok()?;
        Some(text.trim().to_owned())
    };
    // The kernel's number for nobody who logged in.
    let login_uid = read("loginuid").and_then(|uid| uid.parse().ok());
    Some(By {
        uid: credentials.uid(),
        login_uid: login_uid.filter(|&uid| uid != u32::MAX),
        pid: credentials.pid(),
        // Any process names itself, and the name is printed.
        command: read("comm").map(|name| name.replace(char::is_control, "?")),
    })
}

/// Answers with the names of the interfaces that are no longer filtered.
async fn detach(State(shared): State<Shared>) -> Answer<Vec<String>> {
    let names = shared.ask(|reply| event::Request::Detach { reply });
    Ok(Json(names.await?))
}
