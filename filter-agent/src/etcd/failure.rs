//! Errors of requests to etcd, told apart as far as it matters, as one line each.

use std::error::Error;

use anyhow::anyhow;

use crate::text::one_line;

/// Status codes of gRPC, whose type `etcd-client` does not export.
const INVALID_ARGUMENT: i32 = 3;
const PERMISSION_DENIED: i32 = 7;
const RESOURCE_EXHAUSTED: i32 = 8;
const OUT_OF_RANGE: i32 = 11;

/// Longest text of a server in an error, in characters.
pub(super) const MAX_TEXT: usize = 300;

/// The connection was made before, and is gone: the peer closed it, or no ping was answered.
const BROKEN_OFF: &str = "the connection broke off";

/// How errors begin that come before a request is sent.
const NOT_SENT: [&str; 2] = ["tcp connect error", "no connection within"];

/// Texts of the libraries, and their meaning for an operator.
const PLAIN: [(&str, &str); 12] = [
    ("closed because of a broken pipe", BROKEN_OFF),
    (
        "peer closed connection without sending TLS close_notify",
        BROKEN_OFF,
    ),
    ("Connection reset by peer", BROKEN_OFF),
    ("missing grpc-status trailer", BROKEN_OFF),
    ("operation was canceled: connection closed", BROKEN_OFF),
    ("deadline has elapsed", "no connection within 2 s"),
    (
        "received fatal alert",
        "it refuses the certificate in `cert_file`, which may have expired, or that there is none",
    ),
    (
        "invalid peer certificate: UnknownIssuer",
        "no authority in `ca_file` signed the certificate that it shows",
    ),
    (
        "invalid peer certificate: certificate expired",
        "the certificate that it shows has expired",
    ),
    ("received corrupt message of type", "it does not speak TLS"),
    (
        "http2 error: connection error detected",
        "it does not speak gRPC",
    ),
    (
        "KeyMismatch",
        "the key in `key_file` is not that of the certificate in `cert_file`",
    ),
];

/// A failed request.
#[derive(Debug)]
pub enum Failure {
    /// The user has no right to a key.
    Denied(String),
    /// The answer is longer than we read.
    TooLong(String),
    /// The request changed nothing: it was not sent, or etcd rejected it.
    Refused(String),
    Other(anyhow::Error),
}

impl Failure {
    /// The same, with what it is about.
    pub fn of(self, subject: &str) -> Self {
        match self {
            Self::Denied(text) => Self::Denied(format!("{subject}: {text}")),
            Self::TooLong(text) => Self::TooLong(format!("{subject}: {text}")),
            Self::Refused(text) => Self::Refused(format!("{subject}: {text}")),
            Self::Other(error) => Self::Other(error.context(subject.to_owned())),
        }
    }

    /// The same, of the first request on a connection.
    pub fn at_first(self) -> Self {
        match self {
            Self::Other(error) if error.to_string() == BROKEN_OFF => Self::Other(anyhow!(
                "it closed the connection at once: it is not etcd, expects TLS, or refuses the certificate in `cert_file`, which may have expired"
            )),
            other => other,
        }
    }
}

impl From<etcd_client::Error> for Failure {
    fn from(error: etcd_client::Error) -> Self {
        let text = text(&error);
        if NOT_SENT.iter().any(|start| text.starts_with(start)) {
            return Self::Refused(text);
        }
        let etcd_client::Error::GRpcStatus(status) = error else {
            return Self::Other(anyhow!(text));
        };
        let code = status.code() as i32;
        if code == OUT_OF_RANGE {
            return Self::TooLong(text);
        }
        // Made by the library of a connection that broke, which has codes of its own: no answer of etcd's.
        if status.source().is_some() {
            return Self::Other(anyhow!(text));
        }
        match code {
            PERMISSION_DENIED => Self::Denied(text),
            INVALID_ARGUMENT => Self::Refused(text),
            // An etcd that is full says so of writes that it has done, too.
            RESOURCE_EXHAUSTED if text.contains("too many requests") => Self::Refused(text),
            _ => Self::Other(anyhow!(text)),
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Other(error)
    }
}

impl From<Failure> for anyhow::Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Denied(text) | Failure::TooLong(text) | Failure::Refused(text) => {
                anyhow!(text)
            }
            Failure::Other(error) => error,
        }
    }
}

/// An error that no caller tells apart.
pub fn plain(error: &etcd_client::Error) -> anyhow::Error {
    anyhow!(text(error))
}

/// All that an error says, its causes too, and nothing twice.
fn text(error: &etcd_client::Error) -> String {
    let (first, mut cause) = match error {
        etcd_client::Error::GRpcStatus(status) => (status.message().to_owned(), status.source()),
        etcd_client::Error::TransportError(error) => (error.to_string(), error.source()),
        other => (other.to_string(), None),
    };
    let mut texts = vec![first];
    while let Some(error) = cause {
        let text = error.to_string();
        if !texts.iter().any(|before| before.contains(&text)) {
            texts.push(text);
        }
        cause = error.source();
    }
    texts.retain(|text| !text.is_empty() && text != "transport error");
    let text = texts.join(": ");
    let plain = PLAIN.iter().find(|(written, _)| text.contains(written));
    plain.map_or_else(
        || one_line(&text, MAX_TEXT),
        |(_, plain)| (*plain).to_owned(),
    )
}
