//! Connections to what was open, and is guarded or filtered from a change on.

use filter_tests::net::{ALLOWED4, DENIED4, Net, dedicated, policy};
use serde_json::{Value, json};

use crate::host::{PORT, connected};

const ALLOWED: &str = "203.0.113.10/32";

fn others() -> String {
    dedicated("others", 6000, &[ALLOWED], "")
}

/// A change to this policy cuts off `DENIED4`, which nothing kept out before, and says so.
#[track_caller]
fn assert_cuts(net: &Net, text: &str) {
    let mut kept = connected(net, ALLOWED4);
    let mut cut = connected(net, DENIED4);
    net.write_policy(text);
    let expected = json!([{
        "database": "orders",
        "rule": Value::Null,
        "source": DENIED4.to_string(),
        "connections": 1,
        "idle": Value::Null,
        "at_confirm": false,
        "reset": true,
    }]);
    let without_idle = |plan: &Value| {
        let mut found = plan["cut"].clone();
        found[0]["idle"] = Value::Null;
        found
    };
    assert_eq!(without_idle(&net.agent_json(&["plan"])), expected);
    let error = net.agent_error(&["reload", "--max-cut", "0"]);
    let text = format!(
        "it would cut off 1 open connection, more than 0: 1 of {DENIED4} at database orders"
    );
    assert!(error.contains(&text), "{error}");
    cut.assert_alive();
    let reloaded = net.agent_json(&["reload", "--max-cut", "1"]);
    assert_eq!(without_idle(&reloaded["plan"]), expected);
    cut.assert_reset();
    kept.assert_alive();
}

#[test]
fn connections_to_a_port_that_becomes_guarded_are_cut() {
    let mut net = Net::new("opened-port");
    let _echo = net.echo(PORT);
    net.write_policy(&policy("eth0", "native", &[others()]));
    net.start();
    let orders = dedicated("orders", PORT, &[ALLOWED], "");
    assert_cuts(&net, &policy("eth0", "native", &[others(), orders]));
}

#[test]
fn connections_to_a_database_that_is_no_longer_only_monitored_are_cut() {
    let mut net = Net::new("opened-monitor");
    let _echo = net.echo(PORT);
    let orders = |more: &str| {
        let orders = dedicated("orders", PORT, &[ALLOWED], more);
        policy("eth0", "native", &[others(), orders])
    };
    net.write_policy(&orders("monitor: true"));
    net.start();
    assert_cuts(&net, &orders(""));
}

#[test]
fn connections_through_an_interface_that_becomes_filtered_are_cut() {
    let mut net = Net::new("opened-interface");
    let _echo = net.echo(PORT);
    net.db.ip("link add idle type veth peer name idle2");
    let orders = |interfaces: &str| {
        let orders = dedicated("orders", PORT, &[ALLOWED], "");
        policy(interfaces, "native", &[orders])
    };
    net.write_policy(&orders("idle"));
    net.start();
    assert_cuts(&net, &orders("idle, eth0"));
}

/// Whose packets do not come through the filter is not cut off.
#[test]
fn connections_through_another_interface_are_left_alone() {
    let mut net = Net::new("opened-elsewhere");
    let _echo = net.echo(PORT);
    net.db.ip("link add idle type veth peer name idle2");
    let with = |databases: &[String]| policy("idle", "native", databases);
    net.write_policy(&with(&[others()]));
    net.start();
    let mut client = connected(&net, DENIED4);
    let orders = dedicated("orders", PORT, &[ALLOWED], "");
    net.write_policy(&with(&[others(), orders]));
    let reloaded = net.agent_json(&["reload", "--max-cut", "0"]);
    assert_eq!(reloaded["plan"]["cut"], json!([]));
    client.assert_alive();
}
