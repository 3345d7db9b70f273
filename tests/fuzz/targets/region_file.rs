//! A region's file.

#![no_main]

use filter_agent::region::{
    answer::Found,
    lists::{self, read_file},
};
use filter_fuzz::{check_cut, check_prefixes, plant, take};
use ipnet::IpNet;

libfuzzer_sys::fuzz_target!(|body: &[u8]| {
    let Ok(prefixes) = read_file(body) else {
        return;
    };
    // One for each line that holds more than a comment.
    let text = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body);
    let is_entry = |line: &&[u8]| {
        let entry = line.split(|byte| b"#;".contains(byte)).next();
        entry.is_some_and(|entry| !entry.trim_ascii().is_empty())
    };
    let lines = text.split(|&byte| byte == b'\n').filter(is_entry);
    assert_eq!(lines.count(), prefixes.len());
    check_prefixes(&prefixes);
    check_cut(text, &prefixes, |part| read_file(part).ok());
    // It reads what it is written as, and a publisher's list of the same text holds the same.
    let lines = |prefixes: &[IpNet]| -> String {
        let lines = prefixes.iter().map(|prefix| format!("{prefix}\n"));
        lines.collect()
    };
    assert_eq!(
        read_file(lines(&prefixes).as_bytes()).ok(),
        Some(prefixes.clone())
    );
    let select = filter_agent::policy::Select::Text {
        unterminated: false,
    };
    let published = lists::read(body, &select).map(|list| list.prefixes);
    // Only a file may be empty.
    let expected = Some(prefixes.clone()).filter(|prefixes| !prefixes.is_empty());
    assert_eq!(published.ok(), expected);
    let found = Found {
        prefixes,
        ..Found::default()
    };
    let good = take(&found);
    let odd = |prefix: &IpNet| matches!(prefix, IpNet::V6(_)) && prefix.prefix_len() != 64;
    plant(good && found.prefixes.len() > 2 && found.prefixes.iter().any(odd));
});
