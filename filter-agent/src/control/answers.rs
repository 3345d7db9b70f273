//! Requests that are read, and refusals as HTTP tells them.

use std::error::Error as _;

use axum::{
    Json,
    body::{Body, Bytes, to_bytes},
    extract::{FromRequestParts, Path, Query},
    http::{Method, StatusCode, Uri, header::CONTENT_TYPE, request::Parts},
    response::{IntoResponse, Response},
};
use http_body_util::LengthLimitError;
use serde::de::DeserializeOwned;

use super::limits::CLIENT_TIMEOUT;
use crate::{policy::spelled, refusal::Refusal, report};

pub(super) type Answer<T> = Result<Json<T>, Failed>;

/// An answer in JSON that is written out already.
pub(super) struct Written(pub(super) Vec<u8>);

impl IntoResponse for Written {
    fn into_response(self) -> Response {
        ([(CONTENT_TYPE, "application/json")], self.0).into_response()
    }
}

/// An error as the socket reports it.
#[derive(Debug)]
pub(super) struct Failed {
    status: StatusCode,
    error: String,
}

impl Failed {
    pub(super) fn new(status: StatusCode, error: impl Into<String>) -> Self {
        let error = error.into();
        Self { status, error }
    }
}

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        let Self { status, error } = self;
        (status, Json(report::Failure { error })).into_response()
    }
}

impl From<anyhow::Error> for Failed {
    fn from(error: anyhow::Error) -> Self {
        let status = match error.downcast_ref::<Refusal>() {
            Some(Refusal::NotFound(_)) => StatusCode::NOT_FOUND,
            Some(Refusal::Invalid(_)) => StatusCode::BAD_REQUEST,
            Some(Refusal::Conflict(_)) => StatusCode::CONFLICT,
            Some(Refusal::PreconditionFailed(_)) => StatusCode::PRECONDITION_FAILED,
            Some(Refusal::Unprocessable(_)) => StatusCode::UNPROCESSABLE_ENTITY,
            Some(Refusal::Unavailable(_)) => StatusCode::SERVICE_UNAVAILABLE,
            None => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, format!("{error:#}"))
    }
}

impl From<Refusal> for Failed {
    fn from(refusal: Refusal) -> Self {
        anyhow::Error::from(refusal).into()
    }
}

/// The parameters of a query: those of the type, and no other.
pub(super) struct Params<T>(pub(super) T);

impl<S: Sync, T: DeserializeOwned> FromRequestParts<S> for Params<T> {
    type Rejection = Failed;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Failed> {
        match Query::try_from_uri(&parts.uri) {
            Ok(Query(params)) => Ok(Self(params)),
            Err(rejection) => {
                let why = rejection.source().map(ToString::to_string);
                let why = why.unwrap_or_else(|| rejection.body_text());
                Err(Refusal::Invalid(format!("read the query: {why}")).into())
            }
        }
    }
}

/// The names in a path.
pub(super) struct Place<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Place<T> {
    type Rejection = Failed;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failed> {
        match Path::from_request_parts(parts, state).await {
            Ok(Path(names)) => Ok(Self(names)),
            Err(rejection) => {
                let why = rejection.body_text();
                Err(Refusal::Invalid(format!("read the path: {why}")).into())
            }
        }
    }
}

/// Reads a body whole. `what` begins the error, as in `read the policy`.
pub(super) async fn read_body(body: Body, most: usize, what: &str) -> Result<Bytes, Failed> {
    let read = tokio::time::timeout(CLIENT_TIMEOUT, to_bytes(body, most)).await;
    let Ok(read) = read else {
        let limit = spelled(CLIENT_TIMEOUT);
        let error = format!("{what}: it did not arrive within {limit}");
        return Err(Failed::new(StatusCode::REQUEST_TIMEOUT, error));
    };
    read.map_err(|error| {
        let is_too_long = error
            .source()
            .is_some_and(|cause| cause.is::<LengthLimitError>());
        match is_too_long {
            true => {
                let error = format!("{what}: it is longer than {most} bytes");
                Failed::new(StatusCode::PAYLOAD_TOO_LARGE, error)
            }
            false => Refusal::Invalid(format!("{what}: {error}")).into(),
        }
    })
}

pub(super) async fn not_found(uri: Uri) -> Failed {
    let error = format!(
        "there is no {}: docs/api.md lists what there is",
        uri.path()
    );
    Failed::new(StatusCode::NOT_FOUND, error)
}

/// On the status socket, where the path is one of the control socket's alone.
pub(super) async fn only_root(uri: Uri) -> Failed {
    let error = format!("{} is for root, on the control socket", uri.path());
    Failed::new(StatusCode::FORBIDDEN, error)
}

pub(super) async fn not_allowed(method: Method, uri: Uri) -> Failed {
    let error = format!(
        "{} does not take {method}: the header Allow names what it takes",
        uri.path()
    );
    Failed::new(StatusCode::METHOD_NOT_ALLOWED, error)
}
