//! A policy that leaves no room for temporary rules, or does not have their database.

use filter_tests::net::{
    CLIENT4, Connection, DENIED4, Net, Protected, dedicated, policy, wait_until,
};
use serde_json::json;

use crate::host::{
    DB, DENIED, PORT, connected, explain, kept_sources, orders, others, rule, sources, temporary,
};

fn with_rules(count: u8) -> String {
    let rules = others(count);
    let rules: Vec<&str> = rules.iter().map(String::as_str).collect();
    orders(&rules, "")
}

/// Sources of the temporary rules that are suspended.
fn suspended(net: &Net) -> Vec<String> {
    let rules = temporary(net);
    let suspended = rules.iter().filter(|rule| rule["suspended"] == true);
    suspended
        .map(|rule| rule["source"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn newest_temporary_rules_are_suspended_where_the_policy_leaves_no_room_and_resumed() {
    let own = "10.0.0.2/32";
    let watched = [own, DENIED];
    let mut net = Net::enforcing("room", &[Protected::tcp(PORT, &watched)], &with_rules(28));
    let _echo = net.echo(PORT);
    net.wait_until_confirmed();
    net.agent_text(&["block", "orders", "192.0.2.1", "--for", "2h"]);
    net.agent_text(&["allow", "orders", own, "--for", "2h"]);
    net.agent_text(&["allow", "orders", DENIED, "--for", "2h", "--label", "new"]);
    let mut old = connected(&net, CLIENT4);
    let mut new = connected(&net, DENIED4);
    let until = rule(&net, DENIED)["expires"].clone();
    assert_eq!(suspended(&net), Vec::<String>::new());

    net.write_policy(&with_rules(29));
    let plan = net.agent_json(&["plan"]);
    assert_eq!(
        plan["difference"]["databases"]["orders"]["removed"],
        json!([DENIED])
    );
    assert_eq!(plan["cut"][0]["source"], "198.51.100.7");
    let plan = net.agent_json(&["reload"])["plan"].clone();
    assert_eq!(
        plan["difference"]["databases"]["orders"]["removed"],
        json!([DENIED])
    );
    net.watch(&[Protected::tcp(PORT, &[own])]);
    new.assert_reset();
    old.assert_alive();
    assert_eq!(suspended(&net), [DENIED]);
    assert!(net.agent_text(&["rules"]).contains("suspended"));
    let status = net.agent_json(&["status"])["databases"][0].clone();
    let counts = ["temporary", "blocks", "suspended"].map(|field| status[field].as_u64());
    assert_eq!(counts, [Some(1); 3]);
    let status = net.agent_text(&["status"]);
    let line = "orders: 1 temporary rule, 1 block, 1 suspended rule";
    assert!(status.contains(line), "{status}");
    assert_eq!(explain(&net, "198.51.100.7")["passes"], false);
    assert_eq!(net.connect(DENIED4.into(), DB), Connection::Silence);
    assert_eq!(explain(&net, "192.0.2.1")["reason"], "blocked");
    assert_eq!(net.agent_json(&["status", "--verify"])["errors"], json!([]));
    // Over a restart, too.
    net.kill();
    net.start();
    assert_eq!(suspended(&net), [DENIED]);
    assert_eq!(net.connect(DENIED4.into(), DB), Connection::Silence);
    old.assert_alive();

    net.reload(&with_rules(30));
    assert_eq!(suspended(&net), [own, DENIED]);
    old.assert_reset();
    let error = net.agent_error(&["allow", "orders", "192.0.2.99", "--for", "1h"]);
    let text = "has 30 rules, 0 of them temporary (2 more are suspended)";
    assert!(error.contains(text), "{error}");
    net.watch(&[Protected::tcp(PORT, &watched)]);
    net.reload(&with_rules(29));
    assert_eq!(suspended(&net), [DENIED]);
    // The older one makes room.
    net.agent_text(&["revoke", "orders", own]);
    assert_eq!(suspended(&net), Vec::<String>::new());
    let resumed = rule(&net, DENIED);
    assert_eq!(
        (&resumed["expires"], &resumed["label"]),
        (&until, &json!("new"))
    );
    connected(&net, DENIED4).assert_alive();
    assert_eq!(net.agent_json(&["status", "--verify"])["errors"], json!([]));
}

#[test]
fn suspended_rule_can_be_revoked_and_does_not_outlive_its_end() {
    let mut net = Net::enforcing("room-end", &[], &with_rules(28));
    net.agent_text(&["allow", "orders", DENIED, "--for", "2h"]);
    net.agent_text(&["allow", "orders", "198.51.100.8", "--for", "3s"]);
    net.reload(&with_rules(30));
    net.agent_text(&["revoke", "orders", DENIED]);
    net.wait_for_line("database orders: temporary rule 198.51.100.8/32 has ended");
    assert!(wait_until(
        || temporary(&net).is_empty() && kept_sources(&net).is_empty()
    ));
    net.reload(&with_rules(28));
    assert_eq!(sources(&net), Vec::<String>::new());
    assert_eq!(explain(&net, "198.51.100.8")["passes"], false);
}

#[test]
fn database_that_is_removed_or_shared_loses_its_temporary_rules() {
    let other = dedicated("other", 6000, &["192.0.2.1/32"], "");
    let both = |database: &str| policy("eth0", "native", &[database.into(), other.clone()]);
    let own = dedicated("orders", PORT, &["192.0.2.1/32"], "");
    let shared = format!("{{name: orders, port: {PORT}, engine: postgresql, model: shared}}");
    let without = policy("eth0", "native", std::slice::from_ref(&other));
    let net = Net::enforcing("room-gone", &[], &both(&own));
    net.wait_until_confirmed();
    for text in [without, both(&shared)] {
        net.agent_text(&["allow", "orders", DENIED, "--for", "2h"]);
        net.agent_text(&["block", "orders", "192.0.2.0/24", "--for", "2h"]);
        net.agent_text(&["allow", "other", DENIED, "--for", "2h"]);
        net.write_policy(&text);
        let plan = net.agent_json(&["plan"])["difference"]["databases"]["orders"].clone();
        let reloaded = net.agent_json(&["reload", "--allow-unprotect"]);
        let done = reloaded["plan"]["difference"]["databases"]["orders"].clone();
        assert_eq!(done, plan);
        assert!(done["removed"].to_string().contains(DENIED), "{done}");
        assert_eq!(done["unblocked"], json!(["192.0.2.0/24"]), "{done}");
        assert_eq!(sources(&net), [DENIED]);
        assert_eq!(temporary(&net)[0]["database"], "other");
        assert!(wait_until(|| kept_sources(&net) == [DENIED]));
        // It does not find them again when it is back.
        net.write_policy(&both(&own));
        net.agent_text(&["reload", "--allow-unprotect"]);
        assert_eq!(sources(&net), [DENIED]);
        assert_eq!(explain(&net, "198.51.100.7")["passes"], false);
        assert_eq!(explain(&net, "192.0.2.1")["passes"], true);
        net.agent_text(&["revoke", "other", DENIED]);
    }
}
