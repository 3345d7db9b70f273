//! The database `orders`, its clients, and what the agent reports and keeps of temporary rules.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use filter_tests::net::{Connection, DB4, EchoClient, Net, dedicated, policy};
use serde_json::{Value, json};

pub const PORT: u16 = 5432;
pub const DB: SocketAddr = SocketAddr::new(IpAddr::V4(DB4), PORT);
/// `ALLOWED4` and `DENIED4` as prefixes, and the first of `NEIGHBOURS`.
pub const ALLOWED: &str = "203.0.113.10/32";
pub const DENIED: &str = "198.51.100.7/32";
pub const MEMBER: &str = "203.0.113.9/32";

/// A policy with the database `orders` alone, open to these prefixes. `more`: other fields of it.
pub fn orders(rules: &[&str], more: &str) -> String {
    policy("eth0", "native", &[dedicated("orders", PORT, rules, more)])
}

/// So many rules that no client is in.
pub fn others(count: u8) -> Vec<String> {
    (0..count)
        .map(|host| format!("192.0.2.{host}/32"))
        .collect()
}

/// Temporary rules and blocks as `rules` lists them, oldest first.
pub fn temporary(net: &Net) -> Vec<Value> {
    let rules = net.agent_json(&["rules"]);
    let rules = rules["rules"].as_array().unwrap().iter();
    rules
        .filter(|rule| rule["origin"] != "file")
        .cloned()
        .collect()
}

/// Sources of temporary rules and blocks.
pub fn sources(net: &Net) -> Vec<String> {
    let source = |rule: &Value| rule["source"].as_str().unwrap().to_owned();
    temporary(net).iter().map(source).collect()
}

/// The temporary rule or block of a source.
#[track_caller]
pub fn rule(net: &Net, source: &str) -> Value {
    let rules = temporary(net);
    let found = rules.iter().find(|rule| rule["source"] == source);
    found
        .unwrap_or_else(|| panic!("{source} is not in {rules:?}"))
        .clone()
}

/// The record of temporary rules on disk. `Null`: there is none.
pub fn kept(net: &Net) -> Value {
    let Ok(text) = fs::read_to_string(net.state_dir().join("temporary.json")) else {
        return Value::Null;
    };
    serde_json::from_str::<Value>(&text).unwrap()["kept"].clone()
}

/// Sources of the temporary rules and blocks on disk.
pub fn kept_sources(net: &Net) -> Vec<String> {
    let kept = kept(net);
    let rules = kept["temporary"].as_array().cloned().unwrap_or_default();
    let source = |rule: &Value| rule["source"].as_str().unwrap().to_owned();
    rules.iter().map(source).collect()
}

/// All that a change of temporary rules can change, without what time changes.
pub fn state(net: &Net) -> Value {
    let mut rules = net.agent_json(&["rules"]);
    for rule in rules["rules"].as_array_mut().unwrap() {
        for field in ["left", "hits", "last_hit", "counted_since"] {
            rule[field] = Value::Null;
        }
    }
    let mut kept = kept(net);
    if kept != Value::Null {
        kept["boot"] = Value::Null;
        kept["clock"] = Value::Null;
    }
    let difference = net.agent_json(&["plan"])["difference"].clone();
    json!([rules, kept, difference])
}

/// The verdict on a source of `orders`.
pub fn explain(net: &Net, source: &str) -> Value {
    net.agent_json(&["explain", source, "--database", "orders"])["verdicts"][0].clone()
}

/// Results of connections from each source, all at once.
pub fn connect_all(net: &Net, sources: &[Ipv4Addr]) -> Vec<Connection> {
    let attempts: Vec<_> = sources.iter().map(|&s| (s.into(), DB)).collect();
    net.connect_all(&attempts)
}

/// A connection to a server that echoes.
pub fn connected(net: &Net, source: impl Into<IpAddr>) -> EchoClient {
    EchoClient::open(net, source.into(), DB)
}
