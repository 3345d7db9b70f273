//! A database's rules in the provider's shape.

use std::net::{IpAddr, SocketAddr};

use filter_tests::net::{ALLOWED4, Connection, DB4, DENIED4, Net, Protected, dedicated, policy};
use serde_json::{Value, json};

use crate::http::{ask, ask_if};

const PORT: u16 = 5432;
const RULES: &str = "/v1/databases/orders/firewall_rules";

/// Whether `DENIED4`, which no rule of the file allows, gets an answer.
fn reaches(net: &Net, source: impl Into<IpAddr>) -> bool {
    let database = SocketAddr::new(DB4.into(), PORT);
    net.connect(source.into(), database) == Connection::Accepted
}

fn start(name: &str) -> Net {
    let allowed = ["203.0.113.0/24", "2001:db8::/32"];
    let orders = dedicated("orders", PORT, &allowed, "");
    let orders = orders.replace(
        "rules: [",
        "rules: [{region: office}, {cidr: 192.0.2.0/24, expires: 2020-01-01T00:00:00Z}, ",
    );
    let text = format!(
        "regions: {{office: {{prefixes: [10.9.0.0/16, 10.10.0.0/16]}}}}\n{}",
        policy(
            "eth0",
            "native",
            &[orders, "{name: shop, port: 3306, model: shared}".into()]
        )
    );
    let watched = ["203.0.113.0/24", "198.51.100.7/32"];
    Net::enforcing(name, &[Protected::tcp(PORT, &watched)], &text)
}

fn field(rules: &Value, name: &str) -> Vec<Value> {
    let rules = rules["rules"].as_array().unwrap();
    rules.iter().map(|rule| rule[name].clone()).collect()
}

#[test]
fn rule_is_made_once_changed_and_removed() {
    let net = start("api-rules");
    let _echo = net.echo(PORT);
    assert!(!reaches(&net, DENIED4));
    let body =
        json!({"type": "custom_range", "cidr": "198.51.100.7/32", "label": "Kim", "seconds": 7200});
    let made = ask(&net, &format!("POST {RULES}"), &body.to_string());
    assert_eq!(made.status, 201, "{made:?}");
    let id = "temporary-198.51.100.7_32";
    assert_eq!(made.headers["location"], format!("{RULES}/{id}"));
    let json = made.json();
    let rule = &json["rule"];
    assert_eq!(rule["id"], id);
    assert_eq!(
        [
            &rule["state"],
            &rule["origin"],
            &rule["action"],
            &rule["type"],
            &rule["cidr"],
            &rule["label"]
        ],
        [
            "ACTIVE",
            "temporary",
            "allow",
            "custom_range",
            "198.51.100.7/32",
            "Kim"
        ]
    );
    assert!(json["timing"]["enforced_ms"].is_number(), "{json}");
    assert_eq!(
        (&json["changed"], &json["errors"]),
        (&json!(true), &json!([]))
    );
    assert!(reaches(&net, DENIED4));

    // A tool that did not get the answer asks again.
    let again = ask(&net, &format!("POST {RULES}"), &body.to_string());
    assert_eq!((again.status, again.tag()), (200, made.tag()));
    assert_eq!(
        (&again.json()["rule"], &again.json()["changed"]),
        (rule, &json!(false))
    );
    let listed = ask(&net, &format!("GET {RULES}"), "");
    assert_eq!(listed.tag(), made.tag());
    let ids = [
        "file-region-office",
        "file-192.0.2.0_24",
        "file-203.0.113.0_24",
        "file-2001:db8::_32",
        id,
    ];
    assert_eq!(field(&listed.json(), "id"), ids);
    assert_eq!(
        field(&listed.json(), "state"),
        ["ACTIVE", "EXPIRED", "ACTIVE", "ACTIVE", "ACTIVE"]
    );
    assert_eq!(listed.json()["rules"][0]["range_id"], "office");
    // And one that imports reads it by its id.
    let one = ask(&net, &format!("GET {}", made.headers["location"]), "");
    assert_eq!((one.status, &one.json()["rule"]), (200, rule));

    let other = json!({"cidr": "198.51.100.7/32", "label": "Sam", "seconds": 7200});
    let refused = ask(&net, &format!("POST {RULES}"), &other.to_string());
    assert_eq!(refused.status, 409);
    assert!(refused.error().contains("another label"), "{refused:?}");

    let expires = "2100-01-01T00:00:00Z";
    let far = ask(
        &net,
        &format!("PATCH {RULES}/{id}"),
        &json!({ "expires": expires }).to_string(),
    );
    assert_eq!(far.status, 422, "{far:?}");
    let changed = ask(
        &net,
        &format!("PATCH {RULES}/{id}"),
        &json!({"label": null, "seconds": 60}).to_string(),
    );
    assert_eq!(changed.status, 200, "{changed:?}");
    assert_ne!(changed.tag(), made.tag());
    let now = &changed.json()["rule"];
    assert_eq!(now["label"], Value::Null);
    assert!(now["expires"].as_str() < rule["expires"].as_str(), "{now}");
    // The date that it has already, and nothing at all.
    for nothing in [json!({"expires": now["expires"]}), json!({})] {
        let same = ask(&net, &format!("PATCH {RULES}/{id}"), &nothing.to_string());
        assert_eq!((same.status, same.tag()), (200, changed.tag()), "{nothing}");
        assert_eq!(same.json()["changed"], false);
    }
    assert!(reaches(&net, DENIED4));

    let removed = ask(&net, &format!("DELETE {RULES}/{id}"), "");
    assert_eq!((removed.status, removed.body.as_str()), (204, ""));
    net.watch(&[Protected::tcp(PORT, &["203.0.113.0/24"])]);
    assert!(!reaches(&net, DENIED4));
    assert_eq!(ask(&net, &format!("DELETE {RULES}/{id}"), "").status, 404);
    assert!(reaches(&net, ALLOWED4));
}

#[test]
fn block_is_made_with_its_action_and_says_whom_it_cuts_off() {
    let net = start("api-block");
    let _echo = net.echo(PORT);
    let open = net.client.run(|| {
        let socket = filter_tests::net::bound(ALLOWED4.into());
        socket
            .connect(&SocketAddr::new(DB4.into(), PORT).into())
            .unwrap();
        socket
    });
    let body = json!({"cidr": "203.0.113.10", "action": "block", "seconds": 600});
    let made = ask(&net, &format!("POST {RULES}"), &body.to_string());
    assert_eq!(made.status, 201, "{made:?}");
    let json = made.json();
    assert_eq!(json["rule"]["id"], "block-203.0.113.10_32");
    assert_eq!(
        [&json["rule"]["origin"], &json["rule"]["action"]],
        ["block", "block"]
    );
    assert_eq!(json["cut"][0]["source"], "203.0.113.10", "{json}");
    drop(open);
    assert!(!reaches(&net, ALLOWED4));
    let id = json["rule"]["id"].as_str().unwrap();
    assert_eq!(ask(&net, &format!("DELETE {RULES}/{id}"), "").status, 204);
    assert!(reaches(&net, ALLOWED4));
    // A shared database has no rules.
    let shared = ask(&net, "GET /v1/databases/shop/firewall_rules", "");
    assert_eq!((shared.status, shared.json()), (200, json!({"rules": []})));
    let ranges = ask(&net, "GET /v1/firewall/managed_ranges", "").json();
    let ranges = ranges["ranges"].as_array().unwrap();
    let office = ranges.iter().find(|range| range["id"] == "office").unwrap();
    assert_eq!(office["prefixes"], 2);
}

#[test]
fn tag_changes_with_whatever_the_rules_hold_and_with_nothing_else() {
    let net = start("api-tags");
    let tag = || ask(&net, &format!("GET {RULES}"), "").tag().to_owned();
    let first = tag();
    assert_eq!(tag(), first);
    // Packets and other databases change none of it.
    assert!(!reaches(&net, DENIED4));
    assert_eq!(tag(), first);
    let mut seen = vec![first.clone()];
    let mut changed = |what: &str| {
        let now = tag();
        assert!(!seen.contains(&now), "{what}");
        seen.push(now);
    };
    net.agent_text(&["allow", "orders", "198.51.100.9", "--for", "2h"]);
    changed("allow");
    net.agent_text(&[
        "allow",
        "orders",
        "198.51.100.9",
        "--for",
        "2h",
        "--label",
        "a",
    ]);
    changed("another label");
    net.agent_text(&[
        "allow",
        "orders",
        "198.51.100.9",
        "--for",
        "3h",
        "--label",
        "a",
    ]);
    changed("another end");
    net.agent_text(&["block", "orders", "198.51.100.9", "--for", "2h"]);
    changed("block");
    let text = std::fs::read_to_string(net.policy_path()).unwrap();
    net.reload(&text.replace("2001:db8::/32", "2001:db8::/33"));
    changed("the file");
    net.reload(&text);
    net.agent_text(&["revoke", "orders", "198.51.100.9"]);
    assert_eq!(tag(), first);
}

#[test]
fn condition_that_does_not_hold_changes_nothing() {
    let net = start("api-conditions");
    let body = json!({"cidr": "198.51.100.9/32", "seconds": 600}).to_string();
    let make = format!("POST {RULES}");
    let old = ask(&net, &format!("GET {RULES}"), "").tag().to_owned();
    for tag in [
        "\"other\"",
        "W/\"other\"",
        &format!("W/{old}"),
        "\"a\", \"b\"",
    ] {
        let refused = ask_if(&net, tag, &make, &body);
        assert_eq!(refused.status, 412, "{tag}: {refused:?}");
        assert!(refused.error().contains(&old), "{refused:?}");
    }
    for wrong in ["other", "\"a", "\"a\" \"b\" x", ""] {
        assert_eq!(ask_if(&net, wrong, &make, &body).status, 400, "{wrong}");
    }
    let made = ask_if(&net, &format!("\"a\", {old}"), &make, &body);
    assert_eq!(made.status, 201, "{made:?}");
    let path = &made.headers["location"];
    assert_eq!(
        ask_if(&net, &old, &format!("PATCH {path}"), "{}").status,
        412
    );
    assert_eq!(
        ask_if(&net, &old, &format!("DELETE {path}"), "").status,
        412
    );
    assert_eq!(ask(&net, &format!("GET {path}"), "").status, 200);
    let changed = ask_if(
        &net,
        made.tag(),
        &format!("PATCH {path}"),
        "{\"label\": \"b\"}",
    );
    assert_eq!(changed.status, 200, "{changed:?}");
    assert_eq!(ask_if(&net, "*", &format!("DELETE {path}"), "").status, 204);
}

#[test]
fn thirty_first_rule_is_refused_and_blocks_have_thirty_of_their_own() {
    let net = start("api-room");
    let make = |action: &str, host: usize| {
        let body =
            json!({"cidr": format!("198.51.100.{host}/32"), "action": action, "seconds": 600});
        ask(&net, &format!("POST {RULES}"), &body.to_string())
    };
    // Four are in the file.
    for host in 100..126 {
        assert_eq!(make("allow", host).status, 201, "{host}");
    }
    let refused = make("allow", 126);
    assert_eq!(refused.status, 422);
    assert!(refused.error().contains("has 30 rules"), "{refused:?}");
    assert_eq!(make("allow", 125).status, 200);
    assert_eq!(make("block", 126).status, 201);
}
