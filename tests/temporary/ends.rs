//! Ends of rules: the kernel keeps them, with an agent and without one.

use std::time::{Duration, Instant};

use filter_tests::net::{
    ALLOWED4, CLIENT4, Connection, DENIED4, Hammer, NEIGHBOURS, Net, Protected, wait_until,
};
use jiff::{SignedDuration, Timestamp};
use serde_json::json;

use crate::host::{
    ALLOWED, DB, DENIED, MEMBER, PORT, connect_all, connected, kept_sources, orders, rule, sources,
    temporary,
};

/// Sources that a rule allows all the time, and that none ever allows.
const STEADY: &str = "203.0.113.11/32";
const NEVER: std::net::IpAddr = std::net::IpAddr::V4(CLIENT4);

#[test]
fn rules_and_blocks_end_without_an_agent_and_nobody_else_notices() {
    let policy = orders(&[ALLOWED, STEADY], "");
    let watched = [ALLOWED, STEADY, DENIED, MEMBER];
    let mut net = Net::enforcing("ends-alone", &[Protected::tcp(PORT, &watched)], &policy);
    let _echo = net.echo(PORT);
    let allowed = Hammer::allowed(&net.client, &[(NEIGHBOURS[1], DB)]);
    let denied = Hammer::denied(&net.client, &[(NEVER, DB)]);
    let mut steady = connected(&net, NEIGHBOURS[1]);

    // `expires:` ends as `allow` does.
    let end = Timestamp::now() + SignedDuration::from_secs(3);
    let member = format!("{{cidr: {MEMBER}, expires: '{end}'}}, {{cidr: '{STEADY}'}}");
    net.reload(&policy.replace(&format!("{{cidr: '{STEADY}'}}"), &member));
    let begun = Instant::now();
    let done = net.agent_json(&["allow", "orders", DENIED, "--for", "3s"]);
    assert_eq!(
        done["difference"]["databases"]["orders"]["added"],
        json!([DENIED])
    );
    let done = net.agent_json(&["block", "orders", ALLOWED, "--for", "3s"]);
    assert_eq!(
        done["difference"]["databases"]["orders"]["blocked"],
        json!([ALLOWED])
    );
    net.kill();
    let unblocked = wait_until(|| net.connect(ALLOWED4.into(), DB) == Connection::Accepted);
    assert!(unblocked, "a block outlives its end");
    assert!(
        begun.elapsed() >= Duration::from_secs(3),
        "a block ends early"
    );
    let out = [DENIED4.into(), NEIGHBOURS[0]].map(|source| (source, DB));
    let silent = [Connection::Silence; 2];
    assert!(
        wait_until(|| net.connect_all(&out) == silent),
        "a rule outlives its end"
    );
    net.watch(&[Protected::tcp(PORT, &[ALLOWED, STEADY])]);
    assert_eq!(net.connect_all(&out), silent);
    steady.assert_alive();

    // The next agent finds nothing of what has ended.
    net.start();
    assert_eq!(sources(&net), Vec::<String>::new());
    assert_eq!(net.agent_json(&["status", "--verify"])["errors"], json!([]));
    assert_eq!(net.connect_all(&out), silent);
    assert!(wait_until(|| kept_sources(&net).is_empty()));
    steady.assert_alive();
    assert!(allowed.attempts() > 0 && denied.attempts() > 0);
    allowed.stop();
    denied.stop();
}

#[test]
fn ended_rule_is_taken_out_by_the_agent_and_its_connections_are_reset() {
    let watched = [ALLOWED, DENIED];
    let policy = orders(&[ALLOWED], "");
    let mut net = Net::enforcing("ends-agent", &[Protected::tcp(PORT, &watched)], &policy);
    let _echo = net.echo(PORT);
    let mut steady = connected(&net, ALLOWED4);
    net.agent_text(&["allow", "orders", DENIED, "--for", "1h"]);
    let mut client = connected(&net, DENIED4);
    net.agent_text(&["allow", "orders", DENIED, "--for", "2s"]);
    client.assert_reset();
    net.wait_for_line("database orders: temporary rule 198.51.100.7/32 has ended");
    net.watch(&[Protected::tcp(PORT, &[ALLOWED])]);
    assert!(wait_until(|| temporary(&net).is_empty()));
    assert!(wait_until(|| kept_sources(&net).is_empty()));
    assert_eq!(net.connect(DENIED4.into(), DB), Connection::Silence);

    net.agent_text(&["block", "orders", ALLOWED, "--for", "2s"]);
    steady.assert_reset();
    net.wait_for_line("database orders: block 203.0.113.10/32 has ended");
    assert!(wait_until(|| temporary(&net).is_empty()));
    assert_eq!(connect_all(&net, &[ALLOWED4]), [Connection::Accepted]);
    assert_eq!(net.agent_json(&["status", "--verify"])["errors"], json!([]));
}

#[test]
fn longer_end_that_is_allowed_again_holds_and_a_shorter_one_too() {
    let policy = orders(&[], "");
    let mut net = Net::enforcing("ends-again", &[Protected::tcp(PORT, &[DENIED])], &policy);
    let _echo = net.echo(PORT);
    net.agent_text(&["allow", "orders", DENIED, "--for", "1s"]);
    net.agent_text(&["allow", "orders", DENIED, "--for", "1h"]);
    let mut client = connected(&net, DENIED4);
    assert!(rule(&net, DENIED)["left"].as_u64() > Some(3000));
    // Another one ends meanwhile, after the first end of this one.
    net.agent_text(&["allow", "orders", MEMBER, "--for", "1s"]);
    net.wait_for_line("database orders: temporary rule 203.0.113.9/32 has ended");
    assert_eq!(sources(&net), [DENIED]);
    client.assert_alive();
    net.agent_text(&["allow", "orders", DENIED, "--for", "1s"]);
    client.assert_reset();
    assert!(wait_until(|| temporary(&net).is_empty()));
}

#[test]
fn connections_that_lost_their_rule_without_an_agent_are_reset_at_the_next_start() {
    let both = orders(&[ALLOWED, STEADY], "");
    let mut net = Net::enforcing("ends-off", &[], &both);
    let _echo = net.echo(PORT);
    net.wait_until_confirmed();
    let mut steady = connected(&net, NEIGHBOURS[1]);
    let mut removed = connected(&net, ALLOWED4);
    net.agent_text(&["allow", "orders", DENIED, "--for", "1h"]);
    let mut ended = connected(&net, DENIED4);
    net.agent_text(&["allow", "orders", DENIED, "--for", "1s"]);
    net.kill();
    let out = || net.connect(DENIED4.into(), DB) == Connection::Silence;
    assert!(wait_until(out), "a rule outlives its end");
    net.start();
    ended.assert_reset();
    removed.assert_alive();
    net.terminate();
    net.write_policy(&orders(&[STEADY], ""));
    net.start();
    removed.assert_reset();
    steady.assert_alive();
}

#[test]
fn rule_or_block_that_ended_hides_no_other_without_an_agent() {
    // A hole for one host, which only a temporary rule allows.
    let rules = "{cidr: 203.0.113.0/24, except: [203.0.113.9/32]}";
    let policy = orders(&[], "").replace("rules: []", &format!("rules: [{rules}]"));
    let watched = ["203.0.113.0/24", DENIED];
    let mut net = Net::enforcing("ends-hides", &[Protected::tcp(PORT, &watched)], &policy);
    let _echo = net.echo(PORT);
    let hole = [(NEIGHBOURS[0], DB)];
    assert_eq!(net.connect_all(&hole), [Connection::Silence]);
    // A shorter rule inside a longer one, the other way round, and the same of blocks.
    for [action, source, lasting] in [
        ["allow", ALLOWED, "1s"],
        ["allow", MEMBER, "1h"],
        ["allow", "203.0.113.8/31", "1s"],
        ["allow", "198.51.100.0/24", "1h"],
        ["allow", DENIED, "1s"],
        ["block", "198.51.100.0/30", "1s"],
        ["block", STEADY, "1h"],
        ["block", "203.0.113.0/24", "2s"],
        ["block", "203.0.113.8/30", "1s"],
    ] {
        net.agent_text(&[action, "orders", source, "--for", lasting]);
    }
    net.kill();
    let inside = || net.connect(ALLOWED4.into(), DB) == Connection::Accepted;
    assert!(wait_until(inside), "a block outlives its end");
    // All that lasts for seconds has ended.
    let all = [
        ALLOWED4.into(),
        NEIGHBOURS[0],
        NEIGHBOURS[1],
        DENIED4.into(),
    ];
    let (yes, no) = (Connection::Accepted, Connection::Silence);
    let found = net.connect_all(&all.map(|source| (source, DB)));
    assert_eq!(found, [yes, yes, no, yes]);
    net.start();
    assert_eq!(sources(&net).len(), 3);
    let found = net.connect_all(&all.map(|source| (source, DB)));
    assert_eq!(found, [yes, yes, no, yes]);
    net.agent_text(&["revoke", "orders", MEMBER]);
    assert_eq!(net.connect_all(&hole), [no]);
    assert_eq!(net.agent_json(&["status", "--verify"])["errors"], json!([]));
}
