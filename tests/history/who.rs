//! Who made a change, and what it was.

use std::{
    collections::BTreeMap,
    process::{Command, Output},
};

use filter_tests::net::{Net, Protected, wait_until};
use serde_json::{Value, json};

use crate::host::{ALLOWED, PORT, changes, ids, orders};

/// A user of whom /etc/passwd knows nothing, and one that it knows.
const STRANGER: u32 = 54_321;
const DAEMON: u32 = 1;

/// Runs a command as root who logged in as this user.
fn logged_in(net: &Net, uid: u32, command: &Command) -> Output {
    let script = "echo \"$0\" > /proc/self/loginuid && exec \"$@\"";
    let mut shell = Command::new("sh");
    shell.args(["-c", script]).arg(uid.to_string());
    shell.arg(command.get_program()).args(command.get_args());
    net.db.output(&mut shell)
}

#[test]
fn each_change_tells_who_made_it_and_what_it_was() {
    let mut net = Net::enforcing(
        "history-who",
        &[Protected::tcp(PORT, &[ALLOWED, "203.0.113.0/24"])],
        &orders(&[ALLOWED]),
    );
    net.write_policy(&orders(&["203.0.113.0/24"]));
    let reload = net.agent_command(&["reload", "--json"]);
    let reloaded = logged_in(&net, STRANGER, &reload);
    let reloaded: Value = serde_json::from_slice(&reloaded.stdout).unwrap();
    let arguments = [
        "allow",
        "orders",
        "198.51.100.7",
        "--for",
        "1h",
        "--label",
        "Kim",
    ];
    let allowed = logged_in(&net, DAEMON, &net.agent_command(&arguments));
    let allowed = String::from_utf8(allowed.stdout).unwrap();
    assert!(allowed.contains("; change 3\n"), "{allowed}");
    let mut curl = Command::new("curl");
    let body = r#"{"block": {"database": "orders", "source": "203.0.113.10", "seconds": 60}}"#;
    curl.args(["--silent", "--data", body, "--unix-socket"]);
    curl.arg(net.socket()).arg("http://localhost/v1/temporary");
    assert!(net.db.output(&mut curl).status.success());
    net.agent_text(&["revoke", "orders", "198.51.100.7"]);
    net.write_policy(&orders(&["203.0.113.0/25"]));
    net.hang_up();
    assert!(wait_until(|| changes(&net).len() == 6));

    let changes = changes(&net);
    assert_eq!(ids(&changes), [6, 5, 4, 3, 2, 1]);
    assert_eq!(reloaded["id"], 2);
    let shown: Vec<Value> = changes
        .iter()
        .map(|past| {
            json!([
                past["kind"],
                past["origin"],
                past["by"]["login_uid"],
                past["by"]["command"]
            ])
        })
        .collect();
    let own = changes[1]["by"]["login_uid"].clone();
    assert_eq!(
        shown,
        [
            json!(["policy", "sighup", null, null]),
            json!(["temporary", "socket", own, "filter-agent"]),
            json!(["temporary", "socket", own, "curl"]),
            json!(["temporary", "socket", DAEMON, "filter-agent"]),
            json!(["policy", "reload", STRANGER, "filter-agent"]),
            json!(["policy", "start", null, null]),
        ]
    );
    for past in &changes[1..4] {
        assert_eq!(past["by"]["uid"], 0);
        assert!(past["by"]["pid"].as_u64().unwrap() > 1);
    }
    let fields = |past: &Value| {
        json!([
            past["action"],
            past["database"],
            past["source"],
            past["label"]
        ])
    };
    assert_eq!(
        fields(&changes[1]),
        json!(["revoked", "orders", "198.51.100.7/32", "Kim"])
    );
    assert_eq!(
        fields(&changes[2]),
        json!(["blocked", "orders", "203.0.113.10/32", null])
    );
    assert_eq!(
        fields(&changes[3]),
        json!(["allowed", "orders", "198.51.100.7/32", "Kim"])
    );
    let difference = &changes[4]["difference"]["databases"]["orders"];
    assert_eq!(
        difference["added"],
        json!({ "count": 1, "first": ["203.0.113.0/24"] })
    );
    assert_eq!(
        difference["removed"],
        json!({ "count": 1, "first": [ALLOWED] })
    );
    assert_eq!(changes[4]["state"], "confirmed");

    // For people.
    let text = net.agent_text(&["history"]);
    let lines: BTreeMap<&str, &str> = text
        .lines()
        .filter_map(|line| line.split_once("  "))
        .collect();
    assert!(lines["2"].contains("uid 54321, filter-agent"), "{text}");
    assert!(lines["2"].contains("+1 -1 prefixes"), "{text}");
    assert!(lines["3"].contains("daemon, filter-agent"), "{text}");
    assert!(
        lines["3"].contains("orders: 198.51.100.7/32 allowed until "),
        "{text}"
    );
    assert!(lines["4"].contains(", curl"), "{text}");
    assert!(lines["6"].contains("SIGHUP"), "{text}");
    assert_eq!(
        text.lines().nth(1).unwrap().split_whitespace().next(),
        Some("6")
    );
    let one = net.agent_text(&["history", "2"]);
    for expected in [
        "by uid 54321 logged in, now root, pid ",
        "database orders\n  + 203.0.113.0/24\n  - 203.0.113.10/32\n",
        "origin: reload\n",
        "text: kept, SHA-256 ",
    ] {
        assert!(one.contains(expected), "{expected}: {one}");
    }
    assert_eq!(
        net.agent_text(&["history", "2", "--text"]),
        orders(&["203.0.113.0/24"])
    );

    // Only some.
    let listing = net.agent_json(&["history", "--limit", "2"]);
    assert_eq!(ids(listing["changes"].as_array().unwrap()), [6, 5]);
    assert_eq!(listing["left_out"], 4);
    let none = net.agent_json(&["history", "--database", "shop"]);
    assert_eq!(none["changes"], json!([]));
    let all = net.agent_json(&["history", "--database", "orders", "--since", "1h"]);
    assert_eq!(all["changes"].as_array().unwrap().len(), 6);

    // Wrong uses.
    for (arguments, expected) in [
        (
            &["history", "99"][..],
            "there is no change 99 yet: the last one is 6",
        ),
        (
            &["history", "0"],
            "there is no change 0: they are counted from 1",
        ),
        (&["history", "3", "--text"], "change 3 is not a policy"),
    ] {
        let error = net.agent_error(arguments);
        assert!(error.contains(expected), "{error}");
    }
    for arguments in [
        &["history", "x"][..],
        &["history", "--text"],
        &["history", "2", "--since", "1d"],
    ] {
        assert_eq!(net.agent(arguments).status.code(), Some(2), "{arguments:?}");
    }
    net.terminate();
}

#[test]
fn reload_that_changes_nothing_is_no_change() {
    let mut net = Net::enforcing("history-same", &[], &orders(&[ALLOWED]));
    for _ in 0..3 {
        assert_eq!(net.agent_json(&["reload"])["id"], 1);
    }
    net.hang_up();
    // Those of the reloads are before it.
    for _ in 0..4 {
        net.wait_for_line("enforcing ");
    }
    assert_eq!(ids(&changes(&net)), [1]);
    net.write_policy(&orders(&[]));
    assert_eq!(net.agent_json(&["reload"])["id"], 2);
    net.terminate();
}

/// Ends come by themselves, with and without an agent.
#[test]
fn ends_of_temporary_rules_are_changes_of_nobody() {
    let mut net = Net::enforcing("history-ends", &[], &orders(&[ALLOWED]));
    net.agent_text(&["allow", "orders", "198.51.100.7", "--for", "1s"]);
    net.wait_for_line("database orders: temporary rule 198.51.100.7/32 has ended");
    net.agent_text(&["block", "orders", ALLOWED, "--for", "2s"]);
    net.agent_text(&["revoke", "orders", ALLOWED]);
    net.agent_text(&["block", "orders", ALLOWED, "--for", "2s"]);
    net.kill();
    std::thread::sleep(std::time::Duration::from_secs(3));
    net.start();
    let changes = changes(&net);
    let shown = changes.iter().map(|past| {
        json!([
            past["id"],
            past["action"],
            past["origin"],
            past["by"].is_null()
        ])
    });
    let expected = [
        json!([7, "unblocked", "time", true]),
        json!([6, "blocked", "socket", false]),
        json!([5, "revoked", "socket", false]),
        json!([4, "blocked", "socket", false]),
        json!([3, "ended", "time", true]),
        json!([2, "allowed", "socket", false]),
        json!([1, null, "start", true]),
    ];
    assert_eq!(shown.collect::<Vec<_>>(), expected);
    net.terminate();
}
