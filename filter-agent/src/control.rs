//! The control socket: requests in HTTP, answers in JSON.

use std::{net::IpAddr, path::PathBuf};

use anyhow::Context as _;
use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde::Deserialize;

use crate::{
    daemon::Shared,
    policy_file::{MAX_LENGTH, PolicyFile},
    report,
};

/// An error as the control socket tells it.
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

pub fn router(shared: Shared) -> Router {
    Router::new()
        .route("/status", get(status))
        .route("/rules", get(rules))
        .route("/regions", get(regions))
        .route("/explain", get(explain))
        .route("/drops", get(drops))
        .route(
            "/plan",
            get(plan)
                .post(plan_text)
                .layer(DefaultBodyLimit::max(MAX_LENGTH as usize)),
        )
        .route("/reload", post(reload))
        .route("/refresh", post(refresh))
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
    Ok(Json(shared.agent().await?.status(query.verify).await?))
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
    Ok(Json(
        shared.agent().await?.rules(query.database.as_deref())?,
    ))
}

async fn regions(State(shared): State<Shared>) -> Answer<Vec<report::Region>> {
    Ok(Json(shared.agent().await?.regions()))
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
    let mut agent = shared.agent().await?;
    Ok(Json(
        agent.explain(query.source, query.database.as_deref())?,
    ))
}

async fn drops(
    State(shared): State<Shared>,
    Query(query): Query<DatabaseQuery>,
) -> Answer<report::Drops> {
    Ok(Json(
        shared.agent().await?.drops(query.database.as_deref())?,
    ))
}

/// Plans the agent's own policy file.
async fn plan(State(shared): State<Shared>) -> Answer<report::Plan> {
    let file = shared.agent().await?.options.policy.clone();
    Ok(Json(shared.plan(PolicyFile::read(&file)?).await?))
}

#[derive(Deserialize)]
struct PlanQuery {
    /// Names the text in messages.
    file: PathBuf,
}

/// Plans the text that the request carries: the agent need not be able to read the file.
async fn plan_text(
    State(shared): State<Shared>,
    Query(query): Query<PlanQuery>,
    text: String,
) -> Answer<report::Plan> {
    Ok(Json(
        shared.plan(PolicyFile::parse(&query.file, text)?).await?,
    ))
}

#[derive(Deserialize)]
struct ReloadQuery {
    /// Judge connections from before TLS was forced, too.
    #[serde(default)]
    existing: bool,
    /// What was guarded may be left open.
    #[serde(default)]
    allow_unprotect: bool,
}

/// A task of its own: a client that goes away must not stop it half way.
async fn reload(
    State(shared): State<Shared>,
    Query(query): Query<ReloadQuery>,
) -> Answer<report::Reloaded> {
    let reloaded = tokio::spawn(shared.reload(query.existing, query.allow_unprotect)).await;
    Ok(Json(reloaded.context("reload").flatten()?))
}

#[derive(Deserialize)]
struct RefreshQuery {
    /// `None`: every region.
    region: Option<String>,
    #[serde(default)]
    accept: bool,
}

/// As `reload`.
async fn refresh(
    State(shared): State<Shared>,
    Query(query): Query<RefreshQuery>,
) -> Answer<Vec<report::Refreshed>> {
    let refreshed = tokio::spawn(shared.refresh(query.region, query.accept)).await;
    Ok(Json(refreshed.context("refresh").flatten()?))
}

/// Answers with the names of the interfaces that are no longer filtered.
async fn detach(State(shared): State<Shared>) -> Answer<Vec<String>> {
    Ok(Json(shared.detach().await?))
}
