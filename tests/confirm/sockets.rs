//! Open connections: none is reset before the policy that cuts it off is confirmed.

use filter_tests::net::{ALLOWED4, DENIED4, Net};

use crate::host::{
    AFTER, BEFORE, BOTH, OTHER, PORT, after, assert_allowed, before, connected, enforcing, orders,
    try_policy, wait_for_fall_back,
};

/// The sockets of a source at the server.
fn sockets(net: &Net, source: &str) -> usize {
    let mut command = std::process::Command::new("ss");
    command.args(["-Htn", "state", "established", "dst", source]);
    let output = net.db.output(&mut command);
    String::from_utf8(output.stdout).unwrap().lines().count()
}

#[test]
fn session_that_is_cut_off_stands_still_and_goes_on_after_falling_back() {
    let mut net = enforcing("confirm-session");
    let _echo = net.echo(PORT);
    let mut client = connected(&net, ALLOWED4);
    client.assert_alive();
    net.write_policy(&after());
    let text = net.agent_text(&["reload", "--confirm", "10m"]);
    assert!(
        text.contains("cut off, and reset when the policy is confirmed"),
        "{text}"
    );
    let mut new = connected(&net, DENIED4);
    client.send();
    // What a look at everything finds is not reset either, nor what the next agent finds.
    net.agent_text(&["status", "--verify"]);
    net.kill();
    net.start();
    net.terminate();
    net.start();
    assert_allowed(&net, false, true);
    client.assert_still();
    assert_eq!(sockets(&net, "203.0.113.10"), 1);
    net.agent_text(&["confirm", "--fall-back"]);
    client.assert_answered();
    client.assert_alive();
    // Whom only the other policy let in is reset at once.
    new.assert_reset();
}

#[test]
fn session_that_is_cut_off_is_reset_when_the_policy_is_confirmed() {
    let mut net = enforcing("confirm-reset");
    let _echo = net.echo(PORT);
    for restarts in [false, true] {
        let mut client = connected(&net, ALLOWED4);
        let mut kept = connected(&net, "203.0.113.9".parse().unwrap());
        let id = try_policy(&net, &after(), "10m").to_string();
        if restarts {
            net.kill();
            net.start();
        }
        client.assert_still();
        let decided = net.agent_json(&["confirm", &id]);
        let cut = &decided["cut"][0];
        assert_eq!(cut["source"], "203.0.113.10", "{decided}");
        assert_eq!(cut["reset"], true);
        assert_eq!(cut["at_confirm"], false);
        client.assert_reset();
        kept.assert_alive();
        net.reload(&before());
    }
}

#[test]
fn block_and_region_change_meanwhile_reset_nobody_whom_falling_back_may_let_in() {
    let net = enforcing("confirm-block");
    let _echo = net.echo(PORT);
    let mut before_tried = connected(&net, ALLOWED4);
    try_policy(&net, &orders(&[BEFORE, AFTER, BOTH]), "10m");
    let mut only_tried = connected(&net, DENIED4);
    let waits = net.agent_json(&["block", "orders", BEFORE, "--for", "1h"]);
    assert_eq!(waits["cut"][0]["at_confirm"], true, "{waits}");
    let now = net.agent_json(&["block", "orders", AFTER, "--for", "1h"]);
    assert_eq!(now["cut"][0]["at_confirm"], false, "{now}");
    only_tried.assert_reset();
    before_tried.assert_still();
    net.agent_text(&["revoke", "orders", BEFORE]);
    before_tried.assert_alive();
    net.agent_text(&["block", "orders", BEFORE, "--for", "1h"]);
    before_tried.assert_still();
    // The block is in force after falling back, too.
    net.agent_text(&["confirm", "--fall-back"]);
    before_tried.assert_reset();
}

#[test]
fn session_of_whom_the_policy_allows_again_in_the_end_is_not_reset() {
    let net = enforcing("confirm-again");
    let _echo = net.echo(PORT);
    let mut client = connected(&net, ALLOWED4);
    try_policy(&net, &orders(&[OTHER]), "1s");
    wait_for_fall_back(&net);
    client.assert_alive();
    try_policy(&net, &orders(&[OTHER]), "10m");
    net.agent_text(&["allow", "orders", BEFORE, "--for", "1h"]);
    let decided = net.agent_json(&["confirm"]);
    assert_eq!(decided["cut"].as_array().unwrap().len(), 0, "{decided}");
    client.assert_alive();
}
