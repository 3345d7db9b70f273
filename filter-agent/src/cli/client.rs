//! Requests to the agent, by its control socket.

use std::{fs, io, os::unix::fs::MetadataExt as _, path::Path, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail};
use http_body_util::{BodyExt as _, Full};
use hyper::{
    Method, Request, Response,
    body::{Bytes, Incoming},
};
use hyper_util::rt::TokioIo;
use nix::unistd::Group;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::{cli::progress::announced, policy::spelled, report};

/// Default path of the agent's socket.
pub(super) const SOCKET: &str = "/run/filter-agent/control.sock";

/// Default path of the socket for members of a group, who may read.
pub(super) const STATUS_SOCKET: &str = "/run/filter-agent-status/status.sock";

/// Time limit of requests that wait for no look-up.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Pause until an agent whose queue of connections is full is tried again.
const CONNECT_RETRY: Duration = Duration::from_millis(50);

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

/// The agent behind a control socket, and the time that each request to it may take.
pub(super) struct Agent<'a> {
    pub(super) socket: &'a Path,
    /// For requests that only read, where that one may not be opened.
    pub(super) status_socket: Option<&'a Path>,
    pub(super) timeout: Duration,
    /// The reason why it may take long, for people who wait.
    pub(super) while_it: Option<&'static str>,
}

impl<'a> Agent<'a> {
    /// Requests to it wait for no look-up.
    pub(super) fn new(socket: &'a Path) -> Self {
        Self {
            socket,
            status_socket: None,
            timeout: ANSWER_TIMEOUT,
            while_it: None,
        }
    }

    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        let request = self.request(Method::GET, path, String::new());
        self.within_timeout(request).await
    }

    pub(super) async fn post<T: DeserializeOwned>(&self, path: &str, body: String) -> Result<T> {
        let request = self.request(Method::POST, path, body);
        let answer = self.within_timeout(request).await;
        answer.map_err(|error| match error.downcast_ref::<TimedOut>() {
            Some(_) => error.context("the agent may still do what was asked for"),
            None => error,
        })
    }

    /// Whether an agent accepts connections.
    ///
    /// # Errors
    /// That cannot be found out, as without permission.
    pub(super) async fn is_running(&self) -> Result<bool> {
        let connected = self.within_timeout(async { Ok(connect(self.socket).await) });
        match connected.await? {
            Ok(_) => Ok(true),
            Err(error) if is_absent(&error) => Ok(false),
            Err(error) => Err(self.refused(error)),
        }
    }

    /// Bounds connecting, the request and the answer together: an agent that is stopped accepts connections as long as
    /// its queue is not full, and one that hangs does not end its answer.
    async fn within_timeout<T>(&self, request: impl Future<Output = Result<T>>) -> Result<T> {
        let what = || {
            let what = self.while_it.map(|what| format!(", {what}"));
            let limit = spelled(self.timeout);
            format!(
                "waiting for the agent{}: at most {limit} in all",
                what.unwrap_or_default()
            )
        };
        let answer = announced(what, tokio::time::timeout(self.timeout, request)).await;
        answer.unwrap_or_else(|_| {
            let (socket, limit) = (self.socket.display(), spelled(self.timeout));
            Err(anyhow!(TimedOut).context(format!(
                "no answer on {socket} within {limit}: the agent is stopped, hangs or is busy; see `systemctl status \
                 filter-agent` and restart it: the filter stays in force meanwhile"
            )))
        })
    }

    /// Posts a request whose answer comes in lines, as long as there are any.
    pub(super) async fn lines(&self, path: &str) -> Result<Lines> {
        let request = self.send(Method::POST, path, String::new());
        let answer = self.within_timeout(request).await?;
        Ok(Lines {
            answer,
            read: Vec::new(),
        })
    }

    async fn request<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: String,
    ) -> Result<T> {
        let answer = self.send(method, path, body).await?;
        let body = answer.collect().await;
        let body = body.context("read the agent's answer")?.to_bytes();
        serde_json::from_slice(&body).context("parse the agent's answer")
    }

    /// Sends a request. Returns the body of its answer.
    ///
    /// # Errors
    /// No connection, or what the agent answers where it could not do it.
    async fn send(&self, method: Method, path: &str, body: String) -> Result<Incoming> {
        let stream = match (connect(self.socket).await, self.status_socket) {
            (Err(error), Some(socket))
                if method == Method::GET && error.kind() == io::ErrorKind::PermissionDenied =>
            {
                let stream = connect(socket).await;
                stream.map_err(|error| self.refused_to_group(socket, error))?
            }
            (stream, _) => stream.map_err(|error| self.refused(error))?,
        };
        let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream));
        let (mut sender, connection) = handshake.await.context("connect to the agent")?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(hyper::header::HOST, "filter-agent")
            .body(Full::<Bytes>::from(body))
            .context("make a request")?;
        let response: Response<Incoming> = sender
            .send_request(request)
            .await
            .context("send a request to the agent")?;
        let status = response.status();
        let body = response.into_body();
        if status.is_success() {
            return Ok(body);
        }
        let body = body.collect().await;
        let body = body.context("read the agent's answer")?.to_bytes();
        match serde_json::from_slice::<report::Failure>(&body) {
            Ok(failure) => bail!("{}", failure.error),
            Err(_) => bail!("{}", String::from_utf8_lossy(&body)),
        }
    }

    /// Describes why no connection could be made, and what to do.
    fn refused(&self, error: io::Error) -> anyhow::Error {
        let socket = self.socket.display();
        let what = match error.kind() {
            io::ErrorKind::PermissionDenied => format!("only root may use {socket}"),
            _ => format!("no agent answers on {socket}: start it with `filter-agent run`"),
        };
        anyhow!(error).context(what)
    }
}

impl Agent<'_> {
    /// The same for a user who may not open the control socket either.
    fn refused_to_group(&self, status_socket: &Path, error: io::Error) -> anyhow::Error {
        let (socket, status) = (self.socket.display(), status_socket.display());
        let group = fs::metadata(status_socket).map(|metadata| metadata.gid());
        let group = group.map(|id| match Group::from_gid(id.into()) {
            Ok(Some(group)) => group.name,
            _ => id.to_string(),
        });
        let what = match (error.kind(), group) {
            (io::ErrorKind::PermissionDenied, Ok(group)) => format!(
                "only root may use {socket}, and only members of the group {group} may read from {status}: become one"
            ),
            _ => format!("only root may use {socket}, and no agent answers on {status}"),
        };
        anyhow!(error).context(what)
    }
}

/// An answer that comes in lines.
pub(super) struct Lines {
    answer: Incoming,
    /// Bytes of lines that were not returned yet.
    read: Vec<u8>,
}

impl Lines {
    /// Returns the next line; `None`: the answer has ended, or its connection.
    ///
    /// # Errors
    /// None has come for `ANSWER_TIMEOUT`.
    pub(super) async fn next(&mut self) -> Result<Option<String>> {
        loop {
            if let Some(end) = self.read.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.read.drain(..=end).collect();
                let line = String::from_utf8(line).context("parse the agent's answer")?;
                return Ok(Some(line.trim_end().to_owned()));
            }
            let frame = tokio::time::timeout(ANSWER_TIMEOUT, self.answer.frame()).await;
            let frame = frame.with_context(|| {
                let limit = spelled(ANSWER_TIMEOUT);
                format!(
                    "nothing has come from the agent for {limit}: it is stopped, hangs or is busy"
                )
            })?;
            // Cut off: the agent was killed.
            let Some(Ok(frame)) = frame else {
                return Ok(None);
            };
            self.read.extend(frame.into_data().iter().flatten());
        }
    }
}

/// The cause of errors of the time limit.
#[derive(Debug)]
struct TimedOut;

impl std::error::Error for TimedOut {}

impl std::fmt::Display for TimedOut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("timed out")
    }
}

/// Connects to a socket; tries again for as long as its queue of connections is full.
async fn connect(socket: &Path) -> io::Result<UnixStream> {
    loop {
        match UnixStream::connect(socket).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                tokio::time::sleep(CONNECT_RETRY).await;
            }
            connected => return connected,
        }
    }
}

/// Whether nobody listens on a socket, rather than that the connection failed.
pub(super) fn is_absent(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    async fn refusal(socket: &Path) -> String {
        let agent = Agent {
            timeout: Duration::from_millis(300),
            ..Agent::new(socket)
        };
        let read = agent.get::<Vec<String>>("/v1/rules").await.unwrap_err();
        let change = agent.post::<Vec<String>>("/v1/detach", String::new()).await;
        let change = format!("{:#}", change.unwrap_err());
        assert!(
            change.contains("may still do what was asked for"),
            "{change}"
        );
        format!("{read:#}")
    }

    #[tokio::test]
    async fn agent_that_accepts_and_never_answers_is_given_up() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("control.sock");
        let _listener = UnixListener::bind(&socket).unwrap();
        let error = refusal(&socket).await;
        let expected = format!("no answer on {} within 300ms", socket.display());
        assert!(error.starts_with(&expected), "{error}");
    }

    #[tokio::test]
    async fn agent_whose_queue_is_full_is_given_up_and_not_taken_for_absent() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("control.sock");
        let listener = tokio::net::UnixSocket::new_stream().unwrap();
        listener.bind(&socket).unwrap();
        let _listener = listener.listen(1).unwrap();
        let mut queued = Vec::new();
        while let Ok(stream) = super::UnixStream::connect(&socket).await {
            queued.push(stream);
        }
        let agent = Agent {
            timeout: Duration::from_millis(300),
            ..Agent::new(&socket)
        };
        let error = format!("{:#}", agent.is_running().await.unwrap_err());
        assert!(error.starts_with("no answer on "), "{error}");
        assert!(refusal(&socket).await.starts_with("no answer on "));
    }

    #[tokio::test]
    async fn socket_that_nobody_listens_on_is_an_absent_agent() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("control.sock");
        assert!(!Agent::new(&socket).is_running().await.unwrap());
        drop(UnixListener::bind(&socket).unwrap());
        assert!(UnixStream::connect(&socket).is_err());
        assert!(!Agent::new(&socket).is_running().await.unwrap());
        let _listener = UnixListener::bind(folder.path().join("other")).unwrap();
        let other = folder.path().join("other");
        assert!(Agent::new(&other).is_running().await.unwrap());
    }
}
