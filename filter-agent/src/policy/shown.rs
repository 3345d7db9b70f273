//! A policy's text as every output shows it. Pure.

use crate::policy::{RegionSource, parse, redacted};

/// Returns the text of a policy without the secrets of its URLs, and with all else that it has. `None`: it is spelled so that
/// they cannot be told from the rest, as with escapes in a URL or with one that goes over several lines.
pub fn shown(text: &str) -> Option<String> {
    let shown = redacted(text);
    let (policy, _) = parse(&shown).ok()?;
    let sources = policy.regions.values().map(|region| &region.source);
    let mut lists = sources.filter_map(|source| match source {
        RegionSource::Url(list) => Some(&list.url),
        _ => None,
    });
    // What is left of a URL is what is shown of it.
    lists.all(|url| url.checksum().is_none()).then_some(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(url: &str) -> String {
        format!("interfaces: [eth0] # office\nregions:\n  x:\n    url: {url}\ndatabases: []\n")
    }

    #[test]
    fn text_is_shown_without_its_secrets_or_not_at_all() {
        for (url, expected) in [
            ("https://lists.test/a", "https://lists.test/a"),
            (
                "https://lists.test/a?token=secret",
                "https://lists.test/a?...",
            ),
            ("'https://me:secret@lists.test/a'", "'https://lists.test/a'"),
            (
                "\"https://lists.test/a?token=\\\n      secret\"",
                "\"https://lists.test/a?...\"",
            ),
        ] {
            assert_eq!(shown(&policy(url)), Some(policy(expected)), "{url}");
        }
        for url in [
            // YAML puts these together only after the text was looked through.
            "https://lists.test/a?token=\n      secret",
            "\"https:\\x2f\\x2flists.test/a?token=secret\"",
            "\"https:\\x2f\\x2fme:secret@lists.test/a\"",
        ] {
            let shown = shown(&policy(url));
            assert!(shown.is_none(), "{url}: {shown:?}");
        }
    }
}
