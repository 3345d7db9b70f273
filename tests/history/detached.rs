//! `detach`: who did it stays, and the texts go.

use std::fs;

use filter_tests::net::Net;
use serde_json::json;

use crate::host::{ALLOWED, allow, changes, ids, orders};

fn texts(net: &Net) -> usize {
    fs::read_dir(net.state_dir().join("policies"))
        .unwrap()
        .count()
}

#[test]
fn detach_is_noted_and_forgets_the_texts() {
    let mut net = Net::enforcing("history-detach", &[], &orders(&[ALLOWED]));
    net.wait_until_confirmed();
    allow(&net, "198.51.100.7");
    net.agent_text(&["detach", "--yes"]);
    net.wait_for_exit();
    let line = net
        .log
        .iter()
        .find(|line| line.starts_with("detached from eth0; change 3 by uid 0"));
    assert!(line.is_some(), "{:#?}", net.log);
    let detached = changes(&net);
    assert_eq!(ids(&detached), [3, 2, 1]);
    assert_eq!(detached[0]["kind"], "detached");
    assert_eq!(detached[0]["by"]["command"], "filter-agent");
    assert_eq!(detached[2]["text_kept"], json!(false));
    assert_eq!(texts(&net), 0);

    // The same policy is a change then; and without an agent it is noted as well.
    net.start();
    assert_eq!(ids(&changes(&net)), [4, 3, 2, 1]);
    net.wait_until_confirmed();
    net.terminate();
    assert_eq!(texts(&net), 1);
    net.agent_text(&["detach", "--yes"]);
    let detached = changes(&net);
    assert_eq!(ids(&detached), [5, 4, 3, 2, 1]);
    assert_eq!(detached[0]["kind"], "detached");
    assert_eq!(detached[0]["by"]["uid"], 0);
    assert_eq!(detached[0]["by"]["command"], "filter-agent");
    assert_eq!(texts(&net), 0);
    // There is nothing to detach any more.
    net.agent_text(&["detach", "--yes"]);
    assert_eq!(ids(&changes(&net)), [5, 4, 3, 2, 1]);
}
