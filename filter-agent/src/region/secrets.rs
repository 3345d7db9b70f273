//! The secrets of a request for a list, and errors without them: a server may return in its answer what it was
//! sent, and errors quote answers. Pure.

use reqwest::Request;
use url::form_urlencoded;

/// Shortest text that is taken for a secret, and shortest beginning of a longer one, in bytes. Shorter ones would hide
/// words of the messages.
const LEAST: usize = 4;
const LEAST_PART: usize = 6;

/// The secrets of requests: header values and their tokens, user information, queries.
#[derive(Default)]
pub(super) struct Secrets(Vec<String>);

impl Secrets {
    /// Adds those of a request, and of the URL that it was made of.
    pub(super) fn add(&mut self, request: &Request, url: &url::Url) {
        let headers = request.headers().values();
        for value in headers.filter(|value| value.is_sensitive()) {
            let value = String::from_utf8_lossy(value.as_bytes());
            // `Bearer TOKEN`.
            if let Some((_, token)) = value.split_once(char::is_whitespace) {
                self.add_text(token.trim());
            }
            self.add_text(&value);
        }
        for part in [url.username(), url.password().unwrap_or_default()] {
            self.add_text(part);
            let pair = format!("={}", part.replace('+', "%2B"));
            for (_, decoded) in form_urlencoded::parse(pair.as_bytes()) {
                self.add_text(&decoded);
            }
        }
        self.add_text(url.query().unwrap_or_default());
        for (_, value) in url.query_pairs() {
            self.add_text(&value);
        }
    }

    fn add_text(&mut self, secret: &str) {
        // As errors quote them.
        let spelled = [
            secret.to_owned(),
            secret.as_bytes().escape_ascii().to_string(),
            secret.escape_debug().to_string(),
        ];
        for secret in spelled {
            if secret.len() >= LEAST && !self.0.contains(&secret) {
                self.0.push(secret);
            }
        }
        self.0.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
    }

    /// Replaces the secrets in a text, and the beginnings of those that a quote cut off.
    pub(super) fn masked(&self, text: &str) -> String {
        let masked = |text: String, secret: &String| without(&text, secret);
        self.0.iter().fold(text.to_owned(), masked)
    }
}

fn without(text: &str, secret: &str) -> String {
    let least = secret.len().min(LEAST_PART);
    let mut shown = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let same = rest.chars().zip(secret.chars());
        let same = same.take_while(|(a, b)| a == b);
        let same: usize = same.map(|(c, _)| c.len_utf8()).sum();
        if same >= least {
            shown.push_str("...");
            rest = &rest[same..];
        } else {
            shown.push(first);
            rest = &rest[first.len_utf8()..];
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use reqwest::{Client, header::HeaderValue};

    use super::*;
    use crate::region::lists;

    /// A server that returned the token had it in `status`, in `regions` and in the journal.
    #[test]
    fn secrets_that_an_answer_returns_are_not_quoted() {
        let provider = rustls::crypto::ring::default_provider();
        let _ = provider.install_default();
        let url = "https://user:p%40ss%22word@lists.test/list?key=quer%79value&n=1";
        let url: url::Url = url.parse().unwrap();
        let mut token = HeaderValue::from_static("Bearer S3CRET#t0ken");
        token.set_sensitive(true);
        let requests = [
            Client::new().get(url.clone()).build().unwrap(),
            Client::new()
                .get(url.clone())
                .header("x-token", token)
                .build()
                .unwrap(),
        ];
        let mut secrets = Secrets::default();
        for request in &requests {
            secrets.add(request, &url);
        }
        let select = crate::policy::Select::Text { unterminated: true };
        for returned in [
            "Bearer S3CRET#t0ken",
            "S3CRET#t0ken",
            "S3CRET",
            "user:p%40ss%22word",
            "p@ss\"word",
            "p%40ss%22word",
            "key=quer%79value&n=1",
            "queryvalue",
            // The header that the user information becomes.
            "Basic dXNlcjpwQHNzIndvcmQ=",
            "dXNlcjpwQHNzIndvcmQ=",
        ] {
            for text in [
                returned.to_owned(),
                format!("x={returned}"),
                // Cut off by the quote.
                format!("{}{returned}{}", "-".repeat(52), "-".repeat(52)),
            ] {
                let error = lists::read(text.as_bytes(), &select).unwrap_err();
                let masked = secrets.masked(&format!("{error:#}"));
                for secret in ["S3CRET", "ss\\\"w", "ss%22w", "quer", "dXNlcj"] {
                    assert!(!masked.contains(secret), "{text}: {masked}");
                }
                assert!(masked.contains("is not a prefix"), "{masked}");
            }
        }
    }

    #[test]
    fn text_without_secrets_stays() {
        let mut secrets = Secrets::default();
        for secret in ["", "abc", "S3CRET-token", "é-secret"] {
            secrets.add_text(secret);
        }
        let text = "line 1: \"abc S3CR\" is not a prefix, é";
        assert_eq!(secrets.masked(text), text);
        assert_eq!(secrets.masked("a S3CRET-tok b"), "a ... b");
        assert_eq!(secrets.masked("é-secret"), "...");
    }
}
