//! Requests over a Unix socket, as the agent's clients make them.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    path::Path,
};

use filter_tests::net::{Net, PATIENCE};
use serde_json::Value;

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    /// By their names in lower case.
    pub headers: BTreeMap<String, String>,
    pub body: String,
}

impl Answer {
    fn parse(text: &str) -> Self {
        let (head, body) = text
            .split_once("\r\n\r\n")
            .unwrap_or_else(|| panic!("{text:?}"));
        let mut lines = head.lines();
        let status = lines.next().unwrap().split(' ').nth(1).unwrap();
        let header = |line: &str| {
            let (name, value) = line.split_once(": ").unwrap();
            (name.to_lowercase(), value.to_owned())
        };
        let headers: BTreeMap<_, _> = lines.map(header).collect();
        // What is longer than a buffer comes in chunks.
        assert!(!headers.contains_key("transfer-encoding"), "{head}");
        Self {
            status: status.parse().unwrap(),
            headers,
            body: body.into(),
        }
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    #[track_caller]
    pub fn tag(&self) -> &str {
        &self.headers["etag"]
    }

    /// The text of a refusal: JSON with nothing else in it.
    #[track_caller]
    pub fn error(&self) -> String {
        assert_eq!(self.headers["content-type"], "application/json", "{self:?}");
        let json = self.json();
        let fields = json.as_object().unwrap();
        assert_eq!(fields.len(), 1, "{self:?}");
        let error = fields["error"].as_str().unwrap();
        assert!(!error.is_empty());
        error.into()
    }
}

/// Sends bytes and returns all that comes back.
pub fn send(socket: &Path, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // Fails where the answer is there before all is read.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8(answer).unwrap()
}

/// `request`: method and path. `headers`: whole lines.
pub fn ask_at(socket: &Path, request: &str, headers: &[String], body: &str) -> Answer {
    let mut head = format!("{request} HTTP/1.1\r\nHost: a\r\n");
    for header in headers {
        head.push_str(&format!("{header}\r\n"));
    }
    let length = body.len();
    head.push_str(&format!("Content-Length: {length}\r\n\r\n{body}"));
    Answer::parse(&send(socket, head.as_bytes()))
}

pub fn ask(net: &Net, request: &str, body: &str) -> Answer {
    ask_at(&net.socket(), request, &[], body)
}

/// The same on the condition that the rules have this tag.
pub fn ask_if(net: &Net, tag: &str, request: &str, body: &str) -> Answer {
    ask_at(&net.socket(), request, &[format!("If-Match: {tag}")], body)
}
