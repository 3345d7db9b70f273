//! Kinds of refused requests, for callers that go by them, as HTTP's statuses do.

use std::{error::Error, fmt};

/// Why a request is refused. Nothing was changed. An error of no kind is a fault of the host or of the agent.
#[derive(Debug)]
pub enum Refusal {
    /// There is nothing of that name.
    NotFound(String),
    /// The request itself is wrong, whatever is in force.
    Invalid(String),
    /// It contradicts what is in force or under way, and may be taken at another time.
    Conflict(String),
    /// What it was asked on the condition of is not so any more.
    PreconditionFailed(String),
    /// The request is well formed, and what it asks for is not.
    Unprocessable(String),
    /// The agent cannot answer now.
    Unavailable(String),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::NotFound(text)
        | Self::Invalid(text)
        | Self::Conflict(text)
        | Self::PreconditionFailed(text)
        | Self::Unprocessable(text)
        | Self::Unavailable(text)) = self;
        f.write_str(text)
    }
}

impl Error for Refusal {}

impl Refusal {
    /// Gives an error a kind, unless it has one.
    pub fn or(error: anyhow::Error, kind: fn(String) -> Self) -> anyhow::Error {
        match error.is::<Self>() {
            true => error,
            false => kind(format!("{error:#}")).into(),
        }
    }
}
