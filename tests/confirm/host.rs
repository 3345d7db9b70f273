//! The database `orders`, its clients, and what the agent keeps of a policy that is tried.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use filter_tests::{
    net::{ALLOWED4, Connection, DB4, DENIED4, EchoClient, Net, dedicated, policy, wait_until},
    records::rewrite,
};
use serde_json::{Value, json};

pub const PORT: u16 = 5432;
pub const DB: SocketAddr = SocketAddr::new(IpAddr::V4(DB4), PORT);
/// `ALLOWED4` and `DENIED4` as prefixes, and the first two of `NEIGHBOURS`.
pub const BEFORE: &str = "203.0.113.10/32";
pub const AFTER: &str = "198.51.100.7/32";
pub const BOTH: &str = "203.0.113.9/32";
pub const OTHER: &str = "203.0.113.11/32";

/// A policy with the database `orders` alone, open to these prefixes.
pub fn orders(rules: &[&str]) -> String {
    policy("eth0", "native", &[dedicated("orders", PORT, rules, "")])
}

/// The confirmed policy, and the one that is tried.
pub fn before() -> String {
    orders(&[BEFORE, BOTH])
}

pub fn after() -> String {
    orders(&[AFTER, BOTH])
}

/// An agent that enforces `before`, with a server.
pub fn enforcing(name: &str) -> Net {
    let net = Net::enforcing(name, &[], &before());
    net.wait_until_confirmed();
    net
}

/// Tries a policy. Returns the id of the change.
pub fn try_policy(net: &Net, text: &str, lasting: &str) -> u64 {
    net.write_policy(text);
    let reloaded = net.agent_json(&["reload", "--confirm", lasting]);
    let id = reloaded["id"].as_u64().unwrap();
    assert_eq!(reloaded["window"]["id"], id, "{reloaded}");
    id
}

/// Connections of the sources that only the confirmed policy allows, and only the tried one.
#[track_caller]
pub fn assert_allowed(net: &Net, before: bool, after: bool) {
    let expected = |is_allowed| match is_allowed {
        true => Connection::Accepted,
        false => Connection::Silence,
    };
    let attempts = [ALLOWED4, DENIED4].map(|source| (source.into(), DB));
    let found = net.connect_all(&attempts);
    assert_eq!(found, [expected(before), expected(after)]);
    let verified = net.agent_json(&["status", "--verify"])["verified"].clone();
    assert_eq!(verified["errors"], json!([]));
}

/// Waits until nothing is tried any more.
#[track_caller]
pub fn wait_for_fall_back(net: &Net) {
    let has_ended = || net.agent_json(&["status"])["window"].is_null();
    assert!(wait_until(has_ended), "it does not fall back");
}

pub fn window_path(net: &Net) -> PathBuf {
    net.state_dir().join("window.json")
}

/// The record on disk. `Null`: there is none.
pub fn kept(net: &Net) -> Value {
    match fs::read_to_string(window_path(net)) {
        Ok(text) => serde_json::from_str::<Value>(&text).unwrap()["kept"].clone(),
        Err(_) => Value::Null,
    }
}

pub fn confirmed_text(net: &Net) -> String {
    let text = fs::read_to_string(net.state_dir().join("confirmed.json")).unwrap();
    let confirmed: Value = serde_json::from_str(&text).unwrap();
    confirmed["kept"]["policy"].as_str().unwrap().to_owned()
}

/// Ends the window on disk, where no agent runs: as if its time had passed.
pub fn end_window(net: &Net) {
    rewrite(&window_path(net), |kept| kept["open"]["end"] = json!(1));
}

/// Removes what the kernel holds, and has the record be of another boot: as a reboot does, where no agent runs.
pub fn reboot(net: &Net) {
    rewrite(&window_path(net), |kept| {
        kept["open"]["before"]["boot_id"] = json!("5ac5b9d8-8d6f-4d2c-a3a4-3f3c7a6b2c10");
    });
    fs::remove_dir_all(net.bpffs().join("filter-agent")).unwrap();
    net.assert_detached("eth0");
}

/// The errors of `status`, which exits with 1 where there are any.
pub fn errors(net: &Net) -> String {
    let output = net.agent(&["status", "--json"]);
    let status: Value = serde_json::from_slice(&output.stdout).unwrap();
    let errors = &status["errors"];
    let is_empty = errors.as_array().unwrap().is_empty();
    assert_eq!(output.status.success(), is_empty, "{errors}");
    match is_empty {
        true => String::new(),
        false => errors.to_string(),
    }
}

/// The policy file is in force at no start, as `status` says.
#[track_caller]
pub fn assert_abandoned(net: &Net, why: &str) {
    let errors = errors(net);
    assert!(
        errors.contains("policy.yaml is not enforced") && errors.contains(why),
        "{errors}"
    );
    let brief = net.agent(&["status", "--brief"]);
    let line = String::from_utf8(brief.stdout).unwrap();
    assert_eq!(brief.status.code(), Some(1), "{line}");
    assert!(line.starts_with("WARNING - "), "{line}");
}

/// A connection to the server, which echoes.
pub fn connected(net: &Net, source: Ipv4Addr) -> EchoClient {
    EchoClient::open(net, source.into(), DB)
}
