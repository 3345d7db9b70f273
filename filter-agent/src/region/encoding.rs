//! Decompresses the body of a published list. Pure.

use std::io::Read as _;

use anyhow::{Context as _, Result, bail, ensure};
use flate2::read::MultiGzDecoder;
use reqwest::header::{self, HeaderMap};

/// Longest body of a published list, as it is sent and decompressed, in bytes: four times the longest that is published
/// today (Azure's).
pub(super) const MAX_BODY: usize = 16 << 20;

/// The only encoding that is asked for.
pub(super) const GZIP: &str = "gzip";

/// Returns the encodings of a body (RFC 9110 section 8.4), in lower case.
pub(super) fn of(headers: &HeaderMap) -> String {
    let values = headers.get_all(header::CONTENT_ENCODING).iter();
    let values = values.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    let values: Vec<String> = values.collect();
    values.join(", ").trim().to_ascii_lowercase()
}

/// Decompresses a body, every member of it: RFC 1952 section 2.2 has a file be a series of members, and the library that
/// the HTTP client uses stops after the first.
///
/// # Errors
/// The encoding is not known, or the body is damaged, too long or followed by something else.
pub(super) fn decoded(body: Vec<u8>, encoding: &str) -> Result<Vec<u8>> {
    match encoding {
        "" | "identity" => return Ok(body),
        GZIP | "x-gzip" => {}
        other => bail!(
            "the server sends it compressed as \"{}\", although only {GZIP} was asked for",
            other.escape_default().take(60).collect::<String>()
        ),
    }
    let mut plain = Vec::new();
    let most = MAX_BODY as u64;
    let mut decoder = MultiGzDecoder::new(body.as_slice()).take(most + 1);
    decoder
        .read_to_end(&mut plain)
        .context("decompress it: it is damaged, cut off, or has something behind its end")?;
    ensure!(
        plain.len() <= MAX_BODY,
        "the body is longer than {MAX_BODY} bytes, decompressed"
    );
    Ok(plain)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use flate2::{Compression, write::GzEncoder};

    use super::*;

    fn member(text: &str) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(text.as_bytes()).unwrap();
        encoder.finish().unwrap()
    }

    /// All but the first member was lost, and so was what stood behind the end.
    #[test]
    fn gzip_of_several_members_is_taken_whole_or_not_at_all() {
        let [one, two] = ["192.0.2.0/24\n", "198.51.100.0/24\n"].map(member);
        let both = [one.clone(), two.clone()].concat();
        let plain = decoded(both.clone(), GZIP).unwrap();
        assert_eq!(plain, b"192.0.2.0/24\n198.51.100.0/24\n");
        for end in 1..both.len() {
            let cut = decoded(both[..end].to_vec(), GZIP);
            assert!(end == one.len() || cut.is_err(), "{end}");
        }
        for garbage in [&b"garbage"[..], b"\0\0", b"x", b"\x1f\x8b"] {
            let body = [one.as_slice(), garbage].concat();
            let error = format!("{:#}", decoded(body, "x-gzip").unwrap_err());
            assert!(error.contains("has something behind its end"), "{error}");
        }
    }

    #[test]
    fn body_that_is_long_or_encoded_otherwise_is_refused() {
        let long = member(&"0".repeat(MAX_BODY + 1));
        let error = decoded(long, GZIP).unwrap_err().to_string();
        assert!(error.contains("is longer than 16777216 bytes"), "{error}");
        assert_eq!(decoded(b"x".into(), "").unwrap(), b"x");
        for other in ["br", "gzip, gzip", "\u{1b}"] {
            assert!(decoded(member("x"), other).is_err(), "{other}");
        }
    }
}
