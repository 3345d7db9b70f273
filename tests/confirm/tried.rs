//! A policy that is tried in a running agent: until it is confirmed, taken back or falls back.

use std::{fs, net::IpAddr, path::Path};

use filter_tests::net::{
    ALLOWED4, Connection, DENIED4, Hammer, NEIGHBOURS, Net, Protected, dedicated, policy,
    under_load, wait_until,
};
use serde_json::{Value, json};

use crate::host::{
    AFTER, BEFORE, BOTH, DB, OTHER, PORT, after, assert_abandoned, assert_allowed, before,
    confirmed_text, enforcing, errors, kept, orders, try_policy, wait_for_fall_back,
};

fn sources(net: &Net) -> Vec<String> {
    let rules = net.agent_json(&["rules"])["rules"].clone();
    let rules = rules.as_array().unwrap().iter();
    let temporary = rules.filter(|rule| rule["origin"] != "file");
    temporary
        .map(|rule| rule["source"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn policy_that_nobody_confirms_falls_back_and_loses_no_packet_of_who_is_allowed_by_both() {
    let net = enforcing("confirm-falls-back");
    let _echo = net.echo(PORT);
    // Nobody else, before, meanwhile and after.
    net.watch(&[Protected::tcp(PORT, &[BEFORE, AFTER, BOTH])]);
    let allowed = Hammer::allowed(&net.client, &[(NEIGHBOURS[0], DB)]);
    let denied = Hammer::denied(&net.client, &[(NEIGHBOURS[1], DB)]);
    under_load(3, &[(&allowed, 50), (&denied, 50)], |round| {
        let id = try_policy(&net, &after(), "1s");
        wait_for_fall_back(&net);
        assert_allowed(&net, true, false);
        assert_abandoned(&net, &format!("change {id} fell back"));
        // The next round tries the same text.
        let abandoned = kept(&net)["abandoned"].as_array().unwrap().len();
        assert_eq!(abandoned, 1, "round {round}");
    });
    allowed.stop();
    denied.stop();
    assert_eq!(confirmed_text(&net), before());
    assert_eq!(fs::read_to_string(net.policy_path()).unwrap(), after());
    assert_eq!(net.tripwire(), 0);
}

#[test]
fn confirmed_policy_stays() {
    let mut net = enforcing("confirm-stays");
    let _echo = net.echo(PORT);
    net.write_policy(&after());
    let text = net.agent_text(&["reload", "--confirm", "10m"]);
    let status = net.agent_json(&["status"]);
    let id = status["window"]["id"].as_u64().unwrap();
    for part in [
        format!("change {id} is tried until "),
        "left), by uid 0".into(),
        format!("filter-agent confirm {id};"),
        format!("filter-agent confirm {id} --fall-back"),
    ] {
        assert!(text.contains(&part), "{part}: {text}");
    }
    assert!(
        status["window"]["left"].as_u64().unwrap() <= 600,
        "{status}"
    );
    assert_eq!(confirmed_text(&net), before());
    assert_allowed(&net, false, true);
    let text = net.agent_text(&["confirm", &id.to_string()]);
    assert!(
        text.contains(&format!("change {id} is confirmed")),
        "{text}"
    );
    assert_eq!(confirmed_text(&net), after());
    assert_eq!(kept(&net), Value::Null);
    assert_eq!(errors(&net), "");
    net.kill();
    net.start();
    assert_allowed(&net, false, true);
    let error = net.agent_error(&["confirm"]);
    assert!(error.contains("nothing is tried"), "{error}");
    let error = net.agent_error(&["confirm", &id.to_string()]);
    assert!(error.contains("needs no `confirm`"), "{error}");
}

#[test]
fn policy_is_taken_back_by_hand_and_the_file_is_an_error_until_it_is_changed_or_reloaded() {
    let mut net = enforcing("confirm-by-hand");
    let _echo = net.echo(PORT);
    let id = try_policy(&net, &after(), "10m").to_string();
    let text = net.agent_text(&["confirm", &id, "--fall-back"]);
    assert!(
        text.contains(&format!("change {id} is taken back")),
        "{text}"
    );
    assert_allowed(&net, true, false);
    assert_abandoned(&net, "was taken back");
    let error = net.agent_error(&["confirm", &id]);
    assert!(
        error.contains(&format!("change {id} was taken back at")),
        "{error}"
    );
    net.wait_for_line("error: ");
    // Another text, without a reload.
    net.write_policy(&orders(&[OTHER]));
    assert!(wait_until(|| errors(&net).is_empty()));
    assert_allowed(&net, true, false);
    // The very text, by a reload.
    net.reload(&after());
    assert_eq!(errors(&net), "");
    assert_allowed(&net, false, true);
    net.kill();
    net.start();
    assert_eq!(errors(&net), "");
    assert_allowed(&net, false, true);
}

/// Puts a region's file in place at once.
fn replace(list: &Path, prefixes: &str) {
    let next = list.with_extension("next");
    fs::write(&next, prefixes).unwrap();
    fs::rename(next, list).unwrap();
}

#[test]
fn what_changes_meanwhile_survives_and_no_end_is_moved() {
    let net = enforcing("confirm-meanwhile");
    let _echo = net.echo(PORT);
    let list = net.dir().join("office.txt");
    let put = |prefixes: &str| replace(&list, prefixes);
    put(BEFORE);
    let region = format!("regions: {{office: {{file: {}}}}}\n", list.display());
    let shop = dedicated("shop", 6000, &[BOTH], "");
    let both = |rules: &[&str]| {
        let orders = dedicated("orders", PORT, rules, "");
        policy("eth0", "native", &[orders, shop.clone()])
            .replace("rules: [", "rules: [{region: office}, ")
    };
    net.reload(&(both(&[BOTH]) + &region));
    net.agent_text(&["allow", "shop", OTHER, "--for", "2h"]);
    net.agent_text(&["allow", "orders", "192.0.2.1", "--for", "2h"]);
    let left = |source: &str| {
        let rules = net.agent_json(&["rules"])["rules"].clone();
        let rules = rules.as_array().unwrap().clone();
        let found = rules.iter().find(|rule| rule["source"] == source);
        found.map(|rule| rule["left"].as_u64().unwrap())
    };
    let shop_left = left(OTHER).unwrap();
    // Without the database, and without the region.
    net.write_policy(&orders(&[BOTH, AFTER]));
    let reloaded = net.agent_json(&["reload", "--confirm", "10m", "--allow-unprotect"]);
    assert!(reloaded["window"]["id"].is_u64(), "{reloaded}");
    assert_eq!(left(OTHER), None);
    net.agent_text(&["block", "orders", BEFORE, "--for", "1h"]);
    net.agent_text(&["allow", "orders", "192.0.2.2", "--for", "1h"]);
    net.agent_text(&["revoke", "orders", "192.0.2.1"]);
    put(&format!("{BEFORE}\n{OTHER}\n"));
    net.agent_text(&["confirm", "--fall-back"]);
    assert!(left(OTHER).unwrap() <= shop_left);
    let mut found = sources(&net);
    found.sort();
    assert_eq!(found, ["192.0.2.2/32", BEFORE, OTHER]);
    // The region's file is read again.
    let explained = |source: &str| {
        let verdicts = net.agent_json(&["explain", source, "--database", "orders"]);
        verdicts["verdicts"][0]["passes"] == true
    };
    assert!(wait_until(|| explained("203.0.113.11")));
    assert!(!explained("203.0.113.10"));
    net.agent_text(&["revoke", "orders", BEFORE]);
    let source = ALLOWED4.into();
    assert_eq!(net.connect(source, DB), Connection::Accepted);
    assert_eq!(net.connect(DENIED4.into(), DB), Connection::Silence);
}

#[test]
fn region_that_changes_while_it_is_tried_is_in_force_after_falling_back() {
    let net = enforcing("confirm-region");
    let list = net.dir().join("office.txt");
    let put = |prefixes: &str| replace(&list, prefixes);
    put(BEFORE);
    let region = format!("regions: {{office: {{file: {}}}}}\n", list.display());
    let with_region =
        |rules: &[&str]| orders(rules).replace("rules: [", "rules: [{region: office}, ") + &region;
    net.reload(&with_region(&[BOTH]));
    try_policy(&net, &with_region(&[AFTER]), "10m");
    put(OTHER);
    let has_other = |net: &Net| {
        let verdicts = net.agent_json(&["explain", "203.0.113.11"]);
        verdicts["verdicts"][0]["passes"] == true
    };
    assert!(wait_until(|| has_other(&net)));
    net.agent_text(&["confirm", "--fall-back"]);
    assert!(has_other(&net));
    let both: IpAddr = NEIGHBOURS[0];
    let verdicts = net.agent_json(&["explain", &both.to_string()]);
    assert_eq!(verdicts["verdicts"][0]["passes"], true);
}

#[test]
fn falling_back_that_the_kernel_refuses_is_tried_again() {
    let mut net = enforcing("confirm-refused");
    let _echo = net.echo(PORT);
    let id = try_policy(&net, &after(), "15s");
    let tampering = net.tamper("socket,sendto", "error=EPERM");
    // By hand: it is tried as before.
    let error = net.agent_error(&["confirm", "--fall-back"]);
    let expected = format!("fall back from change {id}");
    assert!(error.contains(&expected), "{error}");
    net.wait_for_line(&format!("error: {expected}"));
    let attempts = [ALLOWED4, DENIED4].map(|source| (source.into(), DB));
    let found = net.connect_all(&attempts);
    assert_eq!(found, [Connection::Silence, Connection::Accepted]);
    let error = net.agent_error(&["confirm"]);
    assert!(error.contains("is over"), "{error}");
    tampering.stop();
    wait_for_fall_back(&net);
    assert_allowed(&net, true, false);
    assert_abandoned(&net, &format!("change {id} fell back"));
}

#[test]
fn interface_that_vanished_meanwhile_keeps_nothing_from_falling_back() {
    let net = enforcing("confirm-interface");
    let _echo = net.echo(PORT);
    net.db.ip("link add idle type veth peer name idle2");
    let both = policy(
        "eth0, idle",
        "native",
        &[dedicated("orders", PORT, &[BEFORE], "")],
    );
    net.reload(&both);
    net.write_policy(&after());
    net.agent_text(&["reload", "--confirm", "10m", "--allow-unprotect"]);
    net.db.ip("link del idle");
    net.agent_text(&["confirm", "--fall-back"]);
    let found = net.connect_all(&[(ALLOWED4.into(), DB), (DENIED4.into(), DB)]);
    assert_eq!(found, [Connection::Accepted, Connection::Silence]);
    assert!(errors(&net).contains("idle"));
    // It is filtered when it is back.
    net.db.ip("link add idle type veth peer name idle2");
    let filtered = || {
        let interfaces = net.agent_json(&["status"])["interfaces"].clone();
        let interfaces = interfaces.as_array().unwrap().clone();
        interfaces
            .iter()
            .any(|i| i["name"] == "idle" && i["program_id"].is_u64())
    };
    assert!(wait_until(filtered));
}

#[test]
fn detach_ends_what_is_tried_and_forgets_it() {
    let mut net = enforcing("confirm-detach");
    try_policy(&net, &after(), "10m");
    net.agent_text(&["confirm", "--fall-back"]);
    try_policy(&net, &orders(&[OTHER]), "10m");
    assert!(kept(&net)["open"].is_object());
    net.agent_text(&["detach", "--yes"]);
    assert!(net.wait_for_exit().success());
    assert_eq!(kept(&net), Value::Null);
    // Without an agent, too.
    net.write_policy(&before());
    net.start();
    net.wait_until_confirmed();
    try_policy(&net, &after(), "10m");
    net.kill();
    net.agent_text(&["detach", "--yes"]);
    assert_eq!(kept(&net), Value::Null);
    net.start();
    assert_eq!(net.agent_json(&["status"])["errors"], json!([]));
}
