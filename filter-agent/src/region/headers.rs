//! The headers that a published list is requested with, from a file of the operator's: a token.

use std::{fs::Metadata, os::unix::fs::MetadataExt as _, path::Path};

use anyhow::{Context as _, Result, bail, ensure};
use reqwest::header::{self, HeaderMap, HeaderName, HeaderValue};

use crate::{threads, whole_file};

/// Longest file of headers, in bytes.
const MAX_FILE: u64 = 64 << 10;

/// Headers that the request sets itself, or that mean this connection only.
const RESERVED: [HeaderName; 18] = [
    header::ACCEPT_ENCODING,
    header::CONNECTION,
    header::CONTENT_LENGTH,
    header::EXPECT,
    header::HOST,
    header::IF_MATCH,
    header::IF_MODIFIED_SINCE,
    header::IF_NONE_MATCH,
    header::IF_RANGE,
    header::IF_UNMODIFIED_SINCE,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::RANGE,
    header::REFERER,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// The same, of those without a constant.
const RESERVED_TOO: [&str; 2] = ["keep-alive", "proxy-connection"];

/// Reads the headers anew, so that a token can be replaced at any time.
///
/// # Errors
/// The file cannot be read, others may read it, or it is not a list of headers. Errors quote nothing of it.
pub(super) async fn read(path: &Path) -> Result<HeaderMap> {
    let file = path.to_owned();
    let headers = threads::run(&threads::LOOK_UPS, path, move || read_now(&file)).await;
    headers.with_context(|| format!("read {}", path.display()))
}

fn read_now(path: &Path) -> Result<HeaderMap> {
    let mut file = whole_file::open(path)?;
    let metadata = file.metadata()?;
    check_access(&metadata)?;
    parse(&whole_file::read(&mut file, &metadata, MAX_FILE)?)
}

/// # Errors
/// Others than root, or the user that this is run as, own the file or have access to it.
pub fn check_access(metadata: &Metadata) -> Result<()> {
    let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
    let own = nix::unistd::geteuid().as_raw();
    ensure!(
        owner == 0 || owner == own,
        "it belongs to user {owner}, not to root: chown it"
    );
    ensure!(
        mode & 0o077 == 0,
        "others than its owner have access to it (mode {mode:04o}): chmod 600"
    );
    Ok(())
}

/// Parses lines such as `Authorization: Bearer 4f0c`.
fn parse(text: &[u8]) -> Result<HeaderMap> {
    let mut headers = HeaderMap::new();
    for (number, line) in (1..).zip(text.split(|&byte| byte == b'\n')) {
        let line = line.trim_ascii();
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        let parsed = header(line).with_context(|| format!("line {number}"))?;
        let (name, value) = parsed;
        ensure!(
            headers.insert(name, value).is_none(),
            "line {number}: a line before it has the same header"
        );
    }
    if headers.is_empty() {
        bail!("it holds no header");
    }
    Ok(headers)
}

fn header(line: &[u8]) -> Result<(HeaderName, HeaderValue)> {
    let expected = "it is not a header, such as `Authorization: Bearer TOKEN`";
    let colon = line.iter().position(|&byte| byte == b':');
    let (name, value) = line.split_at(colon.context(expected)?);
    // The text before a colon may be part of a secret: only the reserved names are quoted.
    let name = HeaderName::from_bytes(name).ok().context(expected)?;
    ensure!(
        !RESERVED.contains(&name) && !RESERVED_TOO.contains(&name.as_str()),
        "the header {name} is the agent's to set"
    );
    let value = value[1..].trim_ascii();
    ensure!(!value.is_empty(), "the header has no value");
    let value = HeaderValue::from_bytes(value).ok();
    let mut value = value.context("the value has a character that headers may not have")?;
    // Left out where a library prints it.
    value.set_sensitive(true);
    Ok((name, value))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    fn error(text: &str) -> String {
        format!("{:#}", parse(text.as_bytes()).unwrap_err())
    }

    #[test]
    fn headers_are_read_a_line_each() {
        let text = "# a token\n\nAuthorization: Bearer a:b#c \r\nx-api-key:4f0c";
        let headers = parse(text.as_bytes()).unwrap();
        assert_eq!(headers.len(), 2);
        assert_eq!(headers["authorization"], "Bearer a:b#c");
        assert_eq!(headers["x-api-key"], "4f0c");
        let shown = format!("{headers:?}");
        assert!(!shown.contains("4f0c") && !shown.contains("a:b"), "{shown}");
    }

    #[test]
    fn line_that_is_not_a_header_is_named_and_not_quoted() {
        let expected = "it is not a header, such as `Authorization: Bearer TOKEN`";
        for line in ["s3cret", "s3cret s3cret: s3cret", ": s3cret", "s3cret : x"] {
            assert_eq!(
                error(&format!("x-a: 1\n{line}\n")),
                format!("line 2: {expected}")
            );
        }
        assert_eq!(error("s3cret:\n"), "line 1: the header has no value");
        let value = "line 1: the value has a character that headers may not have";
        assert_eq!(error("x-a: s3cret\0"), value);
        assert_eq!(error("x-a: s3\rcret"), value);
        let twice = "line 2: a line before it has the same header";
        assert_eq!(error("s3cret: 1\nS3cret: 2"), twice);
        for empty in ["", "# x-a: 1\n\n"] {
            assert_eq!(error(empty), "it holds no header");
        }
    }

    #[test]
    fn headers_of_the_request_itself_are_refused() {
        for name in [
            "Host",
            "content-length",
            "Connection",
            "Transfer-Encoding",
            "If-None-Match",
            "if-modified-since",
            "Accept-Encoding",
            "Keep-Alive",
            "Proxy-Authorization",
        ] {
            let shown = name.to_lowercase();
            let expected = format!("line 1: the header {shown} is the agent's to set");
            assert_eq!(error(&format!("{name}: s3cret")), expected);
        }
    }

    #[test]
    fn file_that_others_have_access_to_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("headers");
        fs::write(&file, "x-token: s3cret\n").unwrap();
        for mode in [0o600, 0o400] {
            fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(read_now(&file).unwrap()["x-token"], "s3cret");
        }
        for mode in [0o640, 0o604, 0o620, 0o610, 0o644] {
            fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
            let error = read_now(&file).unwrap_err().to_string();
            assert!(error.contains("chmod 600"), "{mode:o}: {error}");
        }
        let error = read_now(directory.path()).unwrap_err().to_string();
        assert_eq!(error, "it is not a regular file");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&file, vec![b'#'; 65 << 10]).unwrap();
        let error = read_now(&file).unwrap_err().to_string();
        assert_eq!(error, "it is longer than 65536 bytes");
    }
}
