//! A host is told of etcd's keys: of which, when, and how often.

use filter_agent::fleet::Found;
use serde_json::Value as Json;

use crate::{
    etcd::{Etcd, USER},
    follower::{Follower, followed, text_of, value},
};

#[test]
fn first_answer_is_what_etcd_holds_at_one_revision() {
    let etcd = Etcd::start("fleet-first");
    etcd.grant(USER, "rules/billing");
    etcd.put("rules/orders", b"rules: []\n");
    etcd.put("rules/orders", b"rules: [1]\n");
    etcd.put("other", b"x");
    let follower = Follower::start(&etcd.host, etcd.settings(&["billing", "orders"]));
    let answer = follower.answer();
    let get = ["get", "/filter-agent/v1/rules/orders", "-w", "json"];
    let get: Json = serde_json::from_str(&etcd.control(&get)).unwrap();
    let orders = value(&answer, "orders");
    assert_eq!(orders.text, b"rules: [1]\n");
    let stored = &get["kvs"][0];
    assert_eq!(
        Some(orders.create_revision),
        stored["create_revision"].as_i64()
    );
    assert_eq!(Some(orders.mod_revision), stored["mod_revision"].as_i64());
    assert_eq!(orders.version, 2);
    assert_eq!(Some(answer.revision), get["header"]["revision"].as_i64());
    assert_eq!(answer.revision, orders.mod_revision + 1);
    assert_eq!(Some(answer.cluster), get["header"]["cluster_id"].as_u64());
    assert_eq!(answer.documents["billing"], Found::Missing);
    assert_eq!(answer.era, 0);
}

#[test]
fn every_change_of_a_followed_key_is_announced() {
    let etcd = Etcd::start("fleet-rings");
    let follower = Follower::start(&etcd.host, etcd.settings(&["orders"]));
    assert_eq!(follower.answer().documents["orders"], Found::Missing);
    // Periodic reads alone would find the first, and then the watch would be given up.
    for text in ["one", "two", "three"] {
        etcd.put("rules/orders", text.as_bytes());
        follower.answer_with("orders", text);
    }
    etcd.put("era", b"7\n");
    assert_eq!(follower.answer().era, 7);
    etcd.delete("rules/orders");
    assert_eq!(follower.answer().documents["orders"], Found::Missing);
}

#[test]
fn burst_ends_with_the_last() {
    let etcd = Etcd::start("fleet-burst");
    let follower = Follower::start(&etcd.host, etcd.settings(&["orders"]));
    let mut revision = follower.answer().revision;
    etcd.put_all("rules/orders", (0..100).map(|n: u32| n.to_string()));
    let mut answers = 0;
    loop {
        let answer = follower.answer();
        answers += 1;
        assert!(
            answer.revision >= revision,
            "no answer is older than the one before"
        );
        revision = answer.revision;
        if text_of(&answer, "orders") == Some("99") {
            break;
        }
    }
    assert!(answers <= 100, "{answers} answers to 100 changes");
    etcd.put("rules/orders", b"after");
    assert!(follower.answer_with("orders", "after").revision > revision);
}

#[test]
fn era_that_is_not_a_number_is_not_believed() {
    let (etcd, follower, _) = followed("fleet-era");
    etcd.put("era", b"soon");
    let why = follower.lost();
    assert!(
        why.ends_with("the key /filter-agent/v1/era holds \"soon\", which is not a number: until it is one, hosts believe nothing"),
        "{why}"
    );
    etcd.put("era", b"1");
    assert_eq!(follower.found_again("orders", "one").era, 1);
}

#[test]
fn document_without_a_right_is_unreadable_until_it_is_granted() {
    let etcd = Etcd::start("fleet-denied");
    etcd.put("rules/orders", b"one");
    etcd.put("rules/billing", b"secret");
    let follower = Follower::start(&etcd.host, etcd.settings(&["billing", "orders"]));
    let answer = follower.answer();
    assert_eq!(text_of(&answer, "orders"), Some("one"));
    let Found::Unreadable(why) = &answer.documents["billing"] else {
        panic!("{answer:?}");
    };
    assert_eq!(why, "etcdserver: permission denied");
    etcd.put("rules/orders", b"two");
    follower.answer_with("orders", "two");
    etcd.grant(USER, "rules/billing");
    // Nothing rings for it: the next periodic read finds it, and a new connection watches it.
    follower.answer_with("billing", "secret");
    follower.answer_with("billing", "secret");
    etcd.put("rules/billing", b"open");
    follower.answer_with("billing", "open");
}

#[test]
fn documents_that_are_too_long_together_leave_the_others_readable() {
    let etcd = Etcd::start("fleet-long");
    let names: Vec<String> = (0..8).map(|n| format!("long{n}")).collect();
    let long = vec![b'x'; 1_400_000];
    for name in &names {
        etcd.grant(USER, &format!("rules/{name}"));
        etcd.put(&format!("rules/{name}"), &long);
    }
    etcd.put("rules/orders", b"one");
    let mut databases: Vec<&str> = names.iter().map(String::as_str).collect();
    let alone = Follower::start(&etcd.host, etcd.settings(&["long0", "orders"]));
    assert_eq!(value(&alone.answer(), "long0").text, long);
    // One of them alone is given on as it is, also where another key may not be read.
    let denied = Follower::start(&etcd.host, etcd.settings(&["billing", "long0", "orders"]));
    let answer = denied.answer();
    assert_eq!(value(&answer, "long0").text, long);
    assert!(matches!(answer.documents["billing"], Found::Unreadable(_)));
    databases.push("orders");
    let follower = Follower::start(&etcd.host, etcd.settings(&databases));
    let answer = follower.answer();
    assert_eq!(text_of(&answer, "orders"), Some("one"));
    for name in &names {
        let Found::Unreadable(why) = &answer.documents[name] else {
            panic!("{name} is left out");
        };
        assert_eq!(
            why,
            "1400000 bytes are more than the 65536 that a document may have"
        );
    }
    etcd.put("rules/orders", b"two");
    follower.answer_with("orders", "two");
}

#[test]
fn as_many_databases_as_etcd_reads_at_once() {
    let etcd = Etcd::start("fleet-many");
    let names: Vec<String> = (0..127).map(|n| format!("orders{n:03}")).collect();
    etcd.control(&[
        "role",
        "grant-permission",
        USER,
        "read",
        "/filter-agent/v1/rules/",
        "--prefix",
    ]);
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let follower = Follower::start(&etcd.host, etcd.settings(&names));
    let answer = follower.answer();
    assert_eq!(answer.documents.len(), 127);
    etcd.put("rules/orders126", b"last");
    follower.answer_with("orders126", "last");
}
