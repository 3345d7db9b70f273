//! The database `orders`, its changes, and what is kept of them.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
};

use filter_tests::net::{Net, dedicated, policy};
use serde_json::{Value, json};

pub const PORT: u16 = 5432;
pub const ALLOWED: &str = "203.0.113.10/32";

/// A policy with the database `orders` alone, open to these prefixes.
pub fn orders(rules: &[&str]) -> String {
    policy("eth0", "native", &[dedicated("orders", PORT, rules, "")])
}

/// The changes of the history, newest first.
pub fn changes(net: &Net) -> Vec<Value> {
    let listing = net.agent_json(&["history"]);
    listing["changes"].as_array().unwrap().clone()
}

pub fn ids(changes: &[Value]) -> Vec<u64> {
    changes
        .iter()
        .map(|past| past["id"].as_u64().unwrap())
        .collect()
}

/// Allows or revokes a source as a client of the control socket. Returns the id of the change.
pub fn post(net: &Net, change: &Value) -> u64 {
    let body = change.to_string();
    let mut client = UnixStream::connect(net.socket()).unwrap();
    let length = body.len();
    let head =
        format!("POST /v1/temporary HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n");
    client.write_all((head + &body).as_bytes()).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200"), "{answer}");
    let done: Value = serde_json::from_str(body).unwrap();
    done["id"].as_u64().unwrap()
}

pub fn allow(net: &Net, source: &str) -> u64 {
    let wanted = json!({ "database": "orders", "source": source, "seconds": 3600 });
    post(net, &json!({ "allow": wanted }))
}
