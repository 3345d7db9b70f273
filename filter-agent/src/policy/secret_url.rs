//! URLs of published lists. Their user information and their query may be secrets.

use std::{fmt, sync::Arc};

use serde::{Serialize, Serializer};
use url::{ParseError, Position, Url};

/// A URL that every output shows without its secrets: `https://host/path?...`. Only `reveal` returns them. Shared, since
/// regions are often cloned.
#[derive(Clone, PartialEq)]
pub struct SecretUrl(Arc<Url>);

impl SecretUrl {
    /// # Errors
    /// The text is not a URL. The error does not quote it.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        Ok(Self(Url::parse(text)?.into()))
    }

    /// The URL that a reference in a response of this one leads to. User information stays within the origin.
    ///
    /// # Errors
    /// The reference does not lead to a URL. The error does not quote it.
    pub fn join(&self, reference: &str) -> Result<Self, ParseError> {
        let mut joined = self.0.join(reference)?;
        if joined.origin() == self.0.origin() && !has_user(&joined) {
            // Both fail only for URLs without a host, and the origin of such a URL equals no other.
            let _ = joined.set_username(self.0.username());
            let _ = joined.set_password(self.0.password());
        }
        Ok(Self(joined.into()))
    }

    /// The whole URL, to send a request with. It must be neither printed nor stored.
    pub fn reveal(&self) -> &Url {
        &self.0
    }

    pub fn scheme(&self) -> &str {
        self.0.scheme()
    }

    /// Whether scheme, host and port are the same.
    pub fn has_same_origin(&self, other: &Self) -> bool {
        self.0.origin() == other.0.origin()
    }

    /// Whether it holds a user's name or password.
    pub fn has_user(&self) -> bool {
        has_user(&self.0)
    }

    /// A checksum of the whole URL. `None`: it holds no secret, and the text that is shown identifies it.
    pub fn checksum(&self) -> Option<u32> {
        let whole = self.0.as_str();
        (self.to_string() != whole).then(|| crc32fast::hash(whole.as_bytes()))
    }
}

fn has_user(url: &Url) -> bool {
    !url.username().is_empty() || url.password().is_some()
}

impl fmt::Display for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let url = &self.0;
        let Some(host) = url.host_str().filter(|host| !host.is_empty()) else {
            // Without a host it is not known what its parts mean.
            return write!(f, "{}:...", url.scheme());
        };
        write!(f, "{}://{host}", url.scheme())?;
        f.write_str(&url[Position::AfterHost..Position::AfterPath])?;
        if url.query().is_some() {
            f.write_str("?...")?;
        }
        Ok(())
    }
}

impl fmt::Debug for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

impl Serialize for SecretUrl {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Returns a text without the secrets of URLs in it, for messages that quote what somebody else wrote: an entry of the
/// policy in the wrong place, a server's response.
pub fn redacted(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(place) = rest.find("://") {
        let is_scheme = |c: char| c.is_ascii_alphanumeric() || "+-.".contains(c);
        let start = rest[..place].trim_end_matches(is_scheme).len();
        let (before, url) = rest.split_at(start);
        let (url, after) = url.split_at(end_of_url(before.chars().next_back(), url));
        shown.push_str(&without_user(before));
        shown.push_str(&redacted_url(url));
        rest = after;
    }
    shown + &without_user(rest)
}

/// Leaves out `user:password@` in front of a host without a scheme: from the quote that it begins, or the space before it.
fn without_user(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('@') {
        let is_escaped = |place: usize| before[..place].ends_with('\\');
        let mut quotes = before.rmatch_indices(['"', '\'', '`']);
        let quote = quotes.find(|(place, _)| !is_escaped(*place));
        let start = match quote {
            Some((place, quote)) => place + quote.len(),
            None => before
                .rfind(char::is_whitespace)
                .map_or(0, |place| place + 1),
        };
        if before[start..].contains(':') {
            shown.push_str(&before[..start]);
            shown.push_str("...");
        } else {
            shown.push_str(before);
        }
        shown.push('@');
        rest = after;
    }
    shown + rest
}

/// Where a URL in a text ends: at the end of the quote that it begins, or at a space, less punctuation.
fn end_of_url(before: Option<char>, text: &str) -> usize {
    let quote = before.filter(|before| "\"'`".contains(*before));
    let mut escaped = false;
    let end = text.find(|c: char| {
        let ends = match quote {
            Some(quote) => !escaped && c == quote,
            None => c.is_whitespace(),
        };
        escaped = !escaped && c == '\\';
        ends
    });
    let end = end.unwrap_or(text.len());
    match quote {
        Some(_) => end,
        None => text[..end].trim_end_matches([':', ',', ';', ')']).len(),
    }
}

fn redacted_url(text: &str) -> String {
    if !text.contains(['@', '?']) {
        return text.to_owned();
    }
    match SecretUrl::parse(text) {
        Ok(url) => url.to_string(),
        Err(_) => {
            let scheme = text.split(':').next().unwrap_or_default();
            format!("{scheme}://...")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "https://user:pa%20ss@lists.test:8443/a/list?token=x&y=z#end";

    fn url(text: &str) -> SecretUrl {
        SecretUrl::parse(text).unwrap()
    }

    /// Fault C6.
    #[test]
    fn url_is_shown_without_its_secrets() {
        let shown = "https://lists.test:8443/a/list?...";
        assert_eq!(url(SECRET).to_string(), shown);
        assert_eq!(format!("{:?}", url(SECRET)), format!("{shown:?}"));
        let json = serde_json::to_string(&url(SECRET)).unwrap();
        assert_eq!(json, format!("{shown:?}"));
        assert_eq!(url(SECRET).reveal().as_str(), SECRET);
        for (whole, shown) in [
            ("https://lists.test/list", "https://lists.test/list"),
            ("https://user@[2001:db8::1]/", "https://[2001:db8::1]/"),
            ("https://lists.test?x", "https://lists.test/?..."),
            ("data:text/plain,secret", "data:..."),
            ("file:///secret", "file:..."),
        ] {
            assert_eq!(url(whole).to_string(), shown);
        }
    }

    #[test]
    fn checksum_tells_urls_apart_that_are_shown_alike() {
        let plain = url("https://lists.test/list");
        assert_eq!(plain.checksum(), None);
        let sums = ["?a=1", "?a=2", "#a", "?"].map(|end| {
            let url = url(&format!("https://lists.test/list{end}"));
            url.checksum().unwrap()
        });
        let user = url("https://u:p@lists.test/list").checksum().unwrap();
        for (place, sum) in sums.iter().enumerate() {
            assert!(*sum != user && !sums[..place].contains(sum));
        }
    }

    #[test]
    fn user_stays_within_the_origin() {
        let base = url("https://user:pa%20ss@lists.test/list?token=x");
        for (reference, whole) in [
            ("/next", "https://user:pa%20ss@lists.test/next"),
            (
                "https://lists.test:443/next",
                "https://user:pa%20ss@lists.test/next",
            ),
            ("https://other@lists.test/", "https://other@lists.test/"),
            (
                "https://lists.test:8443/next",
                "https://lists.test:8443/next",
            ),
            ("http://lists.test/next", "http://lists.test/next"),
            ("//elsewhere.test/next", "https://elsewhere.test/next"),
        ] {
            assert_eq!(base.join(reference).unwrap().reveal().as_str(), whole);
        }
    }

    /// Fault C6: an entry in the wrong place, quoted by the message that refuses it.
    #[test]
    fn secrets_of_urls_in_a_text_are_left_out() {
        for (text, shown) in [
            ("no URL, a://b", "no URL, a://b"),
            (
                "fetch https://u:p@lists.test/list?x=1: no answer",
                "fetch https://lists.test/list?...: no answer",
            ),
            (
                "invalid type: string \"https://u:p w@lists.test/\", expected a mapping",
                "invalid type: string \"https://lists.test/\", expected a mapping",
            ),
            (
                "string \"https://u:p \\\" w@lists.test/\", expected a mapping",
                "string \"https://...\", expected a mapping",
            ),
            (
                "string \"https://u:p/w@lists.test/\", and `ftp://u@a.test/`",
                "string \"https://...\", and `ftp://a.test/`",
            ),
            (
                "such as tls://192.0.2.53#name or https://192.0.2.53/dns-query#name",
                "such as tls://192.0.2.53#name or https://192.0.2.53/dns-query#name",
            ),
            ("://u:p@a.test ://", "://... ://"),
            // Without a scheme: `dns: 'user:PASS@host'`.
            (
                "dns: string \"user:pa \\\" ss@a.test\", expected a list",
                "dns: string \"...@a.test\", expected a list",
            ),
            (
                "of u:p@a.test and https://u:p@b.test and u:p@c.test",
                "of ...@a.test and https://b.test/ and ...@c.test",
            ),
            ("line 1: noreply@a.test", "line 1: noreply@a.test"),
        ] {
            assert_eq!(redacted(text), shown);
        }
    }
}
