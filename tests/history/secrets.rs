//! Secrets of a policy: on disk as the policy has them, and nowhere else.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    process::Command,
};

use filter_tests::net::Net;

use crate::host::{ALLOWED, changes, orders};

/// A policy with a region that no rule names, so that nobody looks it up.
fn policy(secret: &str) -> String {
    let url = format!("https://me:{secret}@lists.test/list?token={secret}");
    format!(
        "regions: {{office: {{url: '{url}'}}}}\n{}",
        orders(&[ALLOWED])
    )
}

#[test]
fn secrets_of_a_policy_are_in_no_answer_and_no_line() {
    let mut net = Net::enforcing("history-secrets", &[], &policy("first-secret"));
    net.write_policy(&policy("second-secret"));
    net.agent_text(&["reload"]);
    let changes = changes(&net);
    let settings = changes[0]["difference"]["settings"]["first"].to_string();
    assert!(
        settings.contains("~ region office: the secrets of its URL"),
        "{settings}"
    );
    let shown = net.agent_text(&["history", "2", "--text"]);
    assert!(shown.contains("https://lists.test/list?..."), "{shown}");
    let mut raw = String::new();
    for path in [
        "/v1/history",
        "/v1/history?id=1&text=true",
        "/v1/history?id=2&text=true",
        "/v1/events",
    ] {
        let mut client = UnixStream::connect(net.socket()).unwrap();
        write!(client, "GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        client.read_to_string(&mut raw).unwrap();
    }
    assert!(raw.contains("lists.test"), "{raw}");
    // YAML joins these only when it is read: the text is not shown rather than in part.
    let split = policy("third-secret").replace("token=third-secret", "token=third\n  -secret");
    net.write_policy(&split.replace("'", ""));
    let reloaded = net.agent(&["reload"]);
    let mut others = String::from_utf8(reloaded.stderr).unwrap();
    if reloaded.status.success() {
        let refused = net.agent_error(&["history", "3", "--text"]);
        assert!(refused.contains("is not shown"), "{refused}");
        others += &refused;
    }
    net.terminate();
    let kept = net.agent(&["history", "1", "--text"]);
    let kept = String::from_utf8(kept.stdout).unwrap();
    assert!(kept.contains("https://lists.test/list?..."), "{kept}");
    let everything = [raw, shown, kept, others, net.log.join("\n")].concat();
    for secret in ["first-secret", "second-secret", "third"] {
        assert!(!everything.contains(secret), "{secret}: {everything}");
    }
    // The texts themselves are the policies'.
    let mut grep = Command::new("grep");
    grep.args(["--recursive", "--files-with-matches", "first-secret"]);
    let found = grep.arg(net.state_dir()).output().unwrap();
    let found = String::from_utf8(found.stdout).unwrap();
    assert_eq!(found.lines().count(), 1, "{found}");
    assert!(found.contains("/policies/"), "{found}");
}
