//! A scrape agrees with `status` and `rules`, and is what Prometheus expects.

use std::{
    io::{Read as _, Write as _},
    net::SocketAddr,
    os::unix::net::UnixStream,
};

use filter_tests::net::{
    ALLOWED4, Connection, DB4, DENIED4, Net, Protected, dedicated, policy, wait_until,
};

use crate::text::Scrape;

const PORT: u16 = 5432;
const LISTEN: &str = "127.0.0.1:9464";

/// Orders with a rule of a region, and a database that is only monitored.
fn orders() -> String {
    let orders = dedicated("orders", PORT, &["203.0.113.10/32"], "");
    let orders = orders.replace("rules: [", "rules: [{region: office}, ");
    let shop = dedicated("shop", 3306, &[], "monitor: true");
    let policy = policy("eth0", "native", &[orders, shop]);
    format!(
        "metrics: {{listen: '{LISTEN}'}}\nregions:\n  office: {{prefixes: [192.0.2.128/25]}}\n{policy}"
    )
}

fn listen() -> SocketAddr {
    LISTEN.parse().unwrap()
}

/// Rules come and go while packets are counted: Prometheus takes every fall of a counter for a restart.
#[test]
fn no_counter_falls_while_the_agent_runs() {
    let mut net = Net::new("monotone");
    let _listener = net.listen(PORT);
    let to = SocketAddr::new(DB4.into(), PORT);
    let text = |more: &[&str]| {
        let rules = [&["203.0.113.10/32"], more].concat();
        let databases = [dedicated("orders", PORT, &rules, "")];
        format!(
            "metrics: {{listen: '{LISTEN}'}}\n{}",
            policy("eth0", "native", &databases)
        )
    };
    net.watch(&[Protected::tcp(
        PORT,
        &["203.0.113.10/32", "198.51.100.7/32"],
    )]);
    net.write_policy(&text(&[]));
    net.start();
    net.wait_for_line("metrics on ");
    let mut last = Scrape::of(&net, listen());
    for round in 1..=4 {
        // The rule of a source that has just been allowed goes.
        net.reload(&text(if round % 2 == 1 {
            &["198.51.100.7/32"]
        } else {
            &[]
        }));
        net.connect_all(&[(ALLOWED4.into(), to), (DENIED4.into(), to)]);
        net.agent_text(&["status", "--verify"]);
        let reloads = "filter_agent_reload_duration_seconds_count";
        let mut next = Scrape::of(&net, listen());
        assert!(wait_until(|| {
            next = Scrape::of(&net, listen());
            next.value(reloads) == f64::from(round)
        }));
        for (series, before) in last.counters() {
            if next.has(series) {
                assert!(next.value(series) >= before, "{series} fell from {before}");
            }
        }
        last = next;
    }
    let reason = |reason| {
        last.value(&format!(
            "filter_agent_packets_total{{database=\"orders\",reason=\"{reason}\",monitored=\"false\"}}"
        ))
    };
    assert!(reason("allowed") > 8.0 && reason("not-allowed") > 1.0);
}

#[test]
fn scrape_agrees_with_status_and_rules() {
    let protected = Protected::tcp(PORT, &["203.0.113.10/32"]);
    let mut net = Net::new("scrape");
    net.watch(&[protected]);
    let _listener = net.listen(PORT);
    net.write_policy(&orders());
    net.start();
    net.wait_for_line("metrics on ");
    let to = SocketAddr::new(DB4.into(), PORT);
    assert_eq!(net.connect(ALLOWED4.into(), to), Connection::Accepted);
    assert_eq!(net.connect(DENIED4.into(), to), Connection::Silence);
    net.agent_text(&["allow", "orders", "192.0.2.7", "--for", "2h"]);
    net.agent_text(&["block", "orders", "203.0.113.10", "--for", "1h"]);

    // What is served again for a second is not yet what `status` says.
    let mut scrape = Scrape::of(&net, listen());
    let mut status = net.agent_json(&["status"]);
    let is_same = || {
        scrape = Scrape::of(&net, listen());
        status = net.agent_json(&["status"]);
        let passed = "filter_agent_packets_total{database=\"orders\",reason=\"allowed\",monitored=\"false\"}";
        let blocks = "filter_agent_blocks{database=\"orders\"}";
        scrape.value(blocks) == 1.0
            && Some(scrape.value(passed)) == status["databases"][0]["passed"].as_f64()
    };
    assert!(wait_until(is_same), "{status}");
    let orders = &status["databases"][0];
    assert!(orders["passed"].as_f64().unwrap() > 0.0);
    let packets = |reason: &str| {
        scrape.value(&format!(
            "filter_agent_packets_total{{database=\"orders\",reason=\"{reason}\",monitored=\"false\"}}"
        ))
    };
    assert_eq!(
        Some(packets("not-allowed")),
        orders["dropped"]["not-allowed"].as_f64()
    );
    assert_eq!(packets("bad-source"), 0.0);
    let of = |name: &str| scrape.value(&format!("filter_agent_{name}{{database=\"orders\"}}"));
    for (name, field) in [
        ("rules", "rules"),
        ("prefixes", "prefixes"),
        ("temporary_rules", "temporary"),
        ("blocks", "blocks"),
        ("suspended_rules", "suspended"),
    ] {
        assert_eq!(Some(of(name)), orders[field].as_f64(), "{name}");
    }
    assert_eq!(
        scrape.value("filter_agent_monitored{database=\"shop\"}"),
        1.0
    );
    let rules = net.agent_json(&["rules", "--database", "orders"]);
    for rule in rules["rules"].as_array().unwrap() {
        let [source, origin] = ["source", "origin"].map(|field| rule[field].as_str().unwrap());
        let hits = format!(
            "filter_agent_rule_packets_total{{database=\"orders\",rule=\"{source}\",origin=\"{origin}\"}}"
        );
        assert_eq!(Some(scrape.value(&hits)), rule["hits"].as_f64(), "{hits}");
    }
    let left = scrape.value("filter_agent_next_end_seconds");
    assert!((3000.0..=3600.0).contains(&left), "{left}");
    assert_eq!(
        scrape.value("filter_agent_interface_attached{interface=\"eth0\"}"),
        1.0
    );
    assert!(scrape.has("filter_agent_interface_info{interface=\"eth0\",mode=\"native\"}"));
    assert_eq!(
        scrape.value("filter_agent_region_prefixes{region=\"office\"}"),
        1.0
    );
    assert_eq!(scrape.value("filter_agent_policy_enforced"), 1.0);
    assert_eq!(scrape.value("filter_agent_verification_errors"), 0.0);
    let errors = status["errors"].as_array().unwrap().len();
    assert_eq!(scrape.value("filter_agent_errors"), errors as f64);
    assert_eq!(
        scrape.value("filter_agent_map_entries{map=\"BLOCKED4\"}"),
        1.0
    );
    assert_eq!(
        scrape.value("filter_agent_map_entries{map=\"ALLOWED6\"}"),
        0.0
    );
    assert_eq!(
        scrape.value("filter_agent_map_max_entries{map=\"ALLOWED4\"}"),
        1048576.0
    );
    // The temporary rule and the block.
    assert_eq!(
        scrape.value("filter_agent_change_duration_seconds_count"),
        2.0
    );
    let (resident, _) = net.memory();
    let measured = scrape.value("process_resident_memory_bytes");
    assert!(
        measured > 1e6 && measured <= 1024.0 * resident as f64,
        "{measured}"
    );
    assert!(scrape.value("process_open_fds") > 10.0);
    assert_eq!(
        scrape.value("filter_agent_formerly_allowed_sources{database=\"orders\"}"),
        0.0
    );

    net.agent_text(&["reload"]);
    let reloads = "filter_agent_reload_duration_seconds_count";
    assert!(wait_until(
        || Scrape::of(&net, listen()).value(reloads) == 1.0
    ));
    // On the control socket, too.
    let mut control = UnixStream::connect(net.socket()).unwrap();
    control.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    control.read_to_string(&mut answer).unwrap();
    let (head, text) = answer.split_once("\r\n\r\n").unwrap();
    assert!(
        head.contains("content-type: text/plain; version=0.0.4"),
        "{head}"
    );
    assert_eq!(Scrape::parse(text).len(), scrape.len(), "{text}");
}
