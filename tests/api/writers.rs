//! Many clients at once.

use std::{sync::Barrier, thread};

use filter_tests::net::{ALLOWED4, DB4, DENIED4, Hammer, Net, Protected, dedicated, policy};
use serde_json::json;

use crate::http::{ask, ask_at};

const PORT: u16 = 5432;
const RULES: &str = "/v1/databases/orders/firewall_rules";
const CLIENTS: usize = 30;

fn start(name: &str) -> Net {
    let orders = dedicated("orders", PORT, &["203.0.113.10/32"], "");
    let text = policy("eth0", "native", &[orders]);
    Net::enforcing(name, &[Protected::tcp(PORT, &["203.0.113.10/32"])], &text)
}

/// The statuses of so many clients that make a rule each, at the same time.
fn all_at_once(make: impl Fn(usize) -> u16 + Sync) -> Vec<u16> {
    let barrier = Barrier::new(CLIENTS);
    let (make, barrier) = (&make, &barrier);
    thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|n| {
                scope.spawn(move || {
                    barrier.wait();
                    make(n)
                })
            })
            .collect();
        clients
            .into_iter()
            .map(|client| client.join().unwrap())
            .collect()
    })
}

fn body(n: usize) -> String {
    json!({"cidr": format!("192.0.2.{n}/32"), "seconds": 600}).to_string()
}

#[test]
fn of_writers_who_read_the_same_rules_one_writes() {
    let net = start("api-same-tag");
    let tag = ask(&net, &format!("GET {RULES}"), "").tag().to_owned();
    let (socket, condition) = (net.socket(), format!("If-Match: {tag}"));
    let mut statuses = all_at_once(|n| {
        ask_at(
            &socket,
            &format!("POST {RULES}"),
            std::slice::from_ref(&condition),
            &body(n),
        )
        .status
    });
    statuses.sort();
    let mut expected = vec![412; CLIENTS];
    expected[0] = 201;
    assert_eq!(statuses, expected);
    let rules = ask(&net, &format!("GET {RULES}"), "").json();
    assert_eq!(rules["rules"].as_array().unwrap().len(), 2);
}

#[test]
fn writers_without_a_condition_lose_nothing_and_let_nobody_else_in() {
    let net = start("api-thirty");
    let _echo = net.echo(PORT);
    let socket = net.socket();
    let database = (DB4, PORT).into();
    let allowed = Hammer::allowed(&net.client, &[(ALLOWED4.into(), database)]);
    let denied = Hammer::denied(&net.client, &[(DENIED4.into(), database)]);
    let mut statuses =
        all_at_once(|n| ask_at(&socket, &format!("POST {RULES}"), &[], &body(n)).status);
    statuses.sort();
    // One rule is in the file: of thirty, one has no room.
    let mut expected = vec![201; CLIENTS];
    expected[CLIENTS - 1] = 422;
    assert_eq!(statuses, expected);
    let rules = ask(&net, &format!("GET {RULES}"), "").json();
    let rules = rules["rules"].as_array().unwrap();
    assert_eq!(rules.len(), 30);
    assert!(rules.iter().all(|rule| rule["state"] == "ACTIVE"));
    let made = rules.iter().filter(|rule| rule["origin"] == "temporary");
    let made: Vec<String> = made
        .map(|rule| rule["id"].as_str().unwrap().into())
        .collect();
    let statuses = all_at_once(|n| {
        let Some(id) = made.get(n) else { return 204 };
        ask_at(&socket, &format!("DELETE {RULES}/{id}"), &[], "").status
    });
    assert_eq!(statuses, [204; CLIENTS]);
    net.agent_text(&["status", "--verify"]);
    allowed.stop();
    denied.stop();
}
