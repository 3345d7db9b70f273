//! Regions looked up by DNS.

use std::{fmt::Write as _, net::IpAddr, path::Path, time::Instant};

use filter_tests::{
    net::{ALLOWED4, CLIENT4, Connection, DENIED4, Net, Protected, wait_until},
    servers::{Ca, Dns, Encrypted, Resolv},
};
use serde_json::Value;

use crate::orders::{
    DB, GOOD, GOOD_RECORDS, PORT, dns, keeps_the_last_good_set, policy, policy_with_rules,
    prefixes, region, wait_for_prefixes, watch_good, who_gets_in,
};

#[test]
fn dns_change_is_followed_and_an_address_that_leaves_retires() {
    let mut net = Net::new("dns-change");
    let _listener = net.listen(PORT);
    let dns_server = Dns::start(&net.client, net.dir(), CLIENT4.into(), "test.");
    dns_server.set(GOOD_RECORDS);
    net.write_policy(&policy(&dns("retire_after: 1h")));
    watch_good(&net);
    net.start();
    wait_for_prefixes(&net, "x", &GOOD);
    who_gets_in(&net);

    net.watch(&[Protected::tcp(
        PORT,
        &[&GOOD[..], &["198.51.100.7/32"]].concat(),
    )]);
    let added = format!("{GOOD_RECORDS}egress 1 A 198.51.100.7\n");
    dns_server.set(&added);
    let changed = Instant::now();
    let accepted = wait_until(|| net.connect(DENIED4.into(), DB) == Connection::Accepted);
    assert!(accepted, "{}", region(&net, "x"));
    println!(
        "from the changed record to the first connection: {:?}",
        changed.elapsed()
    );
    let line = net.wait_for_line("region x: 1 added");
    let change = "region x: 1 added (198.51.100.7/32); in force after ";
    assert!(
        line.starts_with(change) && line.ends_with(" on eth0"),
        "{line}"
    );
    let timing = &region(&net, "x")["change"]["timing"];
    assert_eq!(timing["interfaces"], serde_json::json!(["eth0"]));
    let [compiled, enforced, verified] =
        ["compiled_ms", "enforced_ms", "verified_ms"].map(|step| timing[step].as_f64().unwrap());
    assert!(0.0 < compiled && compiled < enforced && enforced < verified);

    dns_server.set(&added.replace("egress 1 A 203.0.113.10\n", ""));
    let left = wait_until(|| !region(&net, "x")["retiring"].as_array().unwrap().is_empty());
    assert!(left, "{}", region(&net, "x"));
    assert_eq!(
        region(&net, "x")["retiring"][0]["prefix"],
        "203.0.113.10/32"
    );
    assert!(
        net.agent_text(&["regions"])
            .contains("203.0.113.10/32 is retiring")
    );
    assert_eq!(net.connect(ALLOWED4.into(), DB), Connection::Accepted);
    // What is kept over a restart retires as the policy of then says.
    net.terminate();
    net.write_policy(&policy(&dns("retire_after: 1s, shrink_after: 0s")));
    net.start();
    let expected = ["198.51.100.7/32", "203.0.113.200/32", "2001:db8::10/128"];
    wait_for_prefixes(&net, "x", &expected);
    net.watch(&[Protected::tcp(PORT, &expected)]);
    assert_eq!(net.connect(ALLOWED4.into(), DB), Connection::Silence);
    assert_eq!(region(&net, "x")["change"]["removed"][0], "203.0.113.10/32");

    // Another set altogether is followed at once, and what left is held.
    net.reload(&policy(&dns("retire_after: 1s")));
    dns_server.set("egress 1 A 203.0.113.10\n");
    let follows = || net.connect(ALLOWED4.into(), DB) == Connection::Accepted;
    net.watch(&[Protected::tcp(PORT, &[&expected[..], &GOOD[..1]].concat())]);
    assert!(wait_until(follows), "{}", region(&net, "x"));
    assert_eq!(net.connect(DENIED4.into(), DB), Connection::Accepted);
    let now = region(&net, "x");
    let error = now["error"]["text"].as_str().unwrap();
    assert!(error.contains("prefixes fell from 3 to 1"), "{now}");
}

#[test]
fn every_dns_fault_keeps_the_last_good_set() {
    let mut net = Net::new("dns-faults");
    let _listener = net.listen(PORT);
    let mut server = Dns::start(&net.client, net.dir(), CLIENT4.into(), "test.");
    server.set(GOOD_RECORDS);
    // Nothing but `refresh` asks.
    let guards = "min_refresh: 1h, max_refresh: 1h, max_prefixes: 10, retire_after: 0s";
    net.write_policy(&policy(&dns(guards)));
    watch_good(&net);
    net.start();
    wait_for_prefixes(&net, "x", &GOOD);
    let with = |record: &str| format!("{GOOD_RECORDS}egress 1 {record}\n");
    let many: String = (1..=20)
        .map(|i| format!("egress 1 A 192.0.2.{i}\n"))
        .collect();
    let answers = [
        ("other name", String::new(), "Non-Existent Domain"),
        ("no address", "egress 1 TXT none".into(), "no addresses"),
        (
            "unspecified",
            with("A 0.0.0.0"),
            "0.0.0.0/32 is unspecified",
        ),
        ("loopback", with("A 127.0.0.1"), "127.0.0.1/32 is loopback"),
        (
            "link-local",
            with("AAAA fe80::1"),
            "fe80::1/128 is link-local",
        ),
        (
            "multicast",
            with("A 224.0.0.1"),
            "224.0.0.1/32 is multicast",
        ),
        ("private", with("A 10.1.2.3"), "10.1.2.3/32 is private"),
        ("mapped", with("AAAA ::ffff:198.51.100.7"), "IPv4-mapped"),
        (
            "too many",
            format!("{GOOD_RECORDS}{many}"),
            "23 prefixes; at most 10",
        ),
        (
            "loop",
            "egress 1 CNAME a\na 1 CNAME egress".into(),
            "look up egress.test",
        ),
        ("dangling", "egress 1 CNAME a".into(), "Non-Existent Domain"),
    ];
    for (fault, records, expected) in answers {
        server.set(&records);
        keeps_the_last_good_set(&net, fault, expected);
    }
    server.break_zone();
    keeps_the_last_good_set(&net, "SERVFAIL", "Server Failure");
    server.set(GOOD_RECORDS);
    net.reload(&policy(&dns(&format!("timeout: 2s, {guards}"))));
    server.pause();
    keeps_the_last_good_set(&net, "no answer", "look up egress.test");
    server.resume();
    server.stop();
    keeps_the_last_good_set(&net, "no server", "look up egress.test");
    server.restart();
    net.reload(&policy(&dns(guards)));
    let text = net.agent_text(&["refresh"]);
    assert_eq!(text, "x: no change, 3 prefixes\n");
    assert_eq!(region(&net, "x")["failing"], false);

    // Each fault was logged once, and its end.
    net.terminate();
    let servfail = net
        .log
        .iter()
        .filter(|line| line.contains("Server Failure"))
        .count();
    assert_eq!(servfail, 1, "{:#?}", net.log);
    assert_eq!(
        net.log
            .iter()
            .filter(|line| *line == "region x: answers again")
            .count(),
        1
    );
}

#[test]
fn slow_answers_arrive_and_hold_nothing_up() {
    let mut net = Net::new("dns-slow");
    let _listener = net.listen(PORT);
    let server = Dns::start(&net.client, net.dir(), CLIENT4.into(), "test.");
    server.set(GOOD_RECORDS);
    server.pause();
    net.write_policy(&policy(&dns("timeout: 2m")));
    watch_good(&net);
    net.start();
    // While the question is open, everything else is answered.
    assert_eq!(region(&net, "x")["confirmed"], Value::Null);
    let status = net.agent_json(&["status"]);
    let errors = status["errors"].to_string();
    assert!(
        errors.contains("region x has no addresses and allows nobody"),
        "{errors}"
    );
    assert_eq!(net.connect(ALLOWED4.into(), DB), Connection::Silence);
    net.reload(&policy_with_rules(
        &dns("timeout: 2m"),
        "{region: x}, {cidr: 192.0.2.0/24}",
    ));
    server.resume();
    wait_for_prefixes(&net, "x", &GOOD);
    who_gets_in(&net);
}

#[test]
fn long_answers_and_chains_of_names_arrive_whole() {
    let mut net = Net::new("dns-long");
    let server = Dns::start(&net.client, net.dir(), CLIENT4.into(), "test.");
    let mut records = String::new();
    for i in 0..200 {
        writeln!(records, "long 60 A 192.0.2.{i}").unwrap();
    }
    records += "chain 60 CNAME b\nb 1 CNAME c\nc 60 A 198.51.100.1\nplain 60 A 198.51.100.2\n";
    server.set(&records);
    let regions = format!(
        "  long: {{dns: [long.test], nameservers: [{CLIENT4}]}}
  chain: {{dns: [chain.test, plain.test.], nameservers: [{CLIENT4}]}}"
    );
    let rules = "{region: long}, {region: chain}";
    net.write_policy(&policy_with_rules(&regions, rules));
    net.start();
    wait_for_prefixes(&net, "chain", &["198.51.100.1/32", "198.51.100.2/32"]);
    // 192.0.2.0 to 192.0.2.199, merged.
    wait_for_prefixes(
        &net,
        "long",
        &["192.0.2.0/25", "192.0.2.128/26", "192.0.2.192/29"],
    );
    let rules = net.agent_json(&["rules", "--database", "orders"])["rules"].take();
    assert_eq!(
        (&rules[0]["source"], &rules[0]["prefixes"]),
        (&"region long".into(), &3.into())
    );
    // The shortest TTL of the chain decides.
    let region = region(&net, "chain");
    let time =
        |field: &str| -> jiff::Timestamp { region[field].as_str().unwrap().parse().unwrap() };
    let until_next = time("next").duration_since(time("confirmed"));
    assert_eq!(until_next.as_secs(), 1);
}

#[test]
fn silent_name_servers_leave_time_for_one_that_answers() {
    let mut net = Net::new("dns-silent");
    let server = Dns::start(&net.client, net.dir(), CLIENT4.into(), "test.");
    server.set(GOOD_RECORDS);
    let mut silent = Vec::new();
    for address in ["10.0.0.7", "10.0.0.8", "10.0.0.9"] {
        net.add_source(address.parse().unwrap());
        let directory = net.dir().join(address);
        let server = Dns::start(&net.client, &directory, address.parse().unwrap(), "test.");
        server.pause();
        silent.push(server);
    }
    let servers = format!("10.0.0.7, 10.0.0.8, 10.0.0.9, {CLIENT4}");
    net.write_policy(&policy(&format!(
        "  x: {{dns: [egress.test], nameservers: [{servers}], timeout: 10s}}"
    )));
    net.start();
    wait_for_prefixes(&net, "x", &GOOD);
    assert_eq!(region(&net, "x")["error"], Value::Null);
}

#[test]
fn name_servers_are_asked_over_tls_and_https() {
    let mut net = Net::new("dns-encrypted");
    let _listener = net.listen(PORT);
    let server = Dns::start(&net.client, net.dir(), CLIENT4.into(), "test.");
    server.set(GOOD_RECORDS);
    let ca = Ca::new(net.dir());
    let address: IpAddr = "10.0.0.9".parse().unwrap();
    net.add_source(address);
    let name = "dns.test";
    let _encrypted = Encrypted::start(&net.client, net.dir(), address, CLIENT4.into(), &ca, name);
    let with = |nameserver: &str, more: &str| {
        policy(&format!(
            "  x: {{dns: [egress.test], nameservers: ['{nameserver}'], {more}}}"
        ))
    };
    let ca_file = format!("ca_file: {}", ca.file().display());
    watch_good(&net);
    net.write_policy(&with("tls://10.0.0.9#dns.test", &ca_file));
    net.start();
    wait_for_prefixes(&net, "x", &GOOD);
    who_gets_in(&net);
    net.reload(&with("https://10.0.0.9/dns-query#dns.test", &ca_file));
    assert_eq!(prefixes(&net, "x"), GOOD);
    who_gets_in(&net);

    // Of nobody known, or for another name; nothing of the policy in force changes.
    for (nameserver, more) in [
        ("tls://10.0.0.9#dns.test", ""),
        ("https://10.0.0.9/dns-query#dns.test", ""),
        ("tls://10.0.0.9#other.test", ca_file.as_str()),
        ("https://10.0.0.9/dns-query#other.test", ca_file.as_str()),
    ] {
        net.write_policy(&with(nameserver, more));
        let error = net.agent_error(&["reload"]);
        assert!(error.contains("region x: "), "{nameserver}: {error}");
        who_gets_in(&net);
    }
}

#[test]
fn dnssec_is_required_where_the_policy_says_so() {
    let mut net = Net::new("dnssec");
    let _listener = net.listen(PORT);
    let server = Dns::start_signed(&net.client, net.dir(), CLIENT4.into(), "test.");
    server.set(&format!(
        "{GOOD_RECORDS}v4 1 A 203.0.113.10\nalias 1 CNAME v4\n"
    ));
    let unsigned_dir = net.dir().join("unsigned");
    let address: IpAddr = "10.0.0.9".parse().unwrap();
    net.add_source(address);
    let unsigned = Dns::start(&net.client, &unsigned_dir, address, "test.");
    unsigned.set(GOOD_RECORDS);
    let anchor = server.trust_anchor();
    let with = |name: &str, server: IpAddr, anchor: Option<&Path>| {
        let anchor = anchor.map(|path| format!(", trust_anchor: {}", path.display()));
        let anchor = anchor.unwrap_or_default();
        policy(&format!(
            "  x: {{dns: [{name}.test], nameservers: [{server}], dnssec: require{anchor}}}"
        ))
    };
    watch_good(&net);
    net.write_policy(&with("egress", CLIENT4.into(), Some(&anchor)));
    net.start();
    wait_for_prefixes(&net, "x", &GOOD);
    who_gets_in(&net);
    // A chain, and a proof that there is no AAAA record.
    net.reload(&with("alias", CLIENT4.into(), Some(&anchor)));
    assert_eq!(prefixes(&net, "x"), GOOD[..1]);
    net.reload(&with("egress", CLIENT4.into(), Some(&anchor)));

    for (server, anchor) in [(address, Some(anchor.as_path())), (CLIENT4.into(), None)] {
        net.write_policy(&with("egress", server, anchor));
        let error = net.agent_error(&["reload"]);
        assert!(error.contains("region x: look up egress.test"), "{error}");
        who_gets_in(&net);
    }
}

#[test]
fn built_in_region_is_looked_up_where_the_host_looks_names_up() {
    let mut net = Net::new("dns-built-in");
    let _listener = net.listen(PORT);
    let server = Dns::start(&net.client, net.dir(), CLIENT4.into(), "scalingo.com.");
    server.set(&GOOD_RECORDS.replace("egress", "egress.osc-fr1"));
    let _resolv = Resolv::new(&net.db, CLIENT4.into(), &[]);
    net.own_resolver = true;
    let text = policy_with_rules("  unused: {dns: [unused.test]}", "{region: osc-fr1}");
    net.write_policy(&text);
    watch_good(&net);
    net.start();
    wait_for_prefixes(&net, "osc-fr1", &GOOD);
    who_gets_in(&net);
    assert_eq!(region(&net, "unused")["used"], false);
    let error = net.agent_error(&["refresh", "unused"]);
    assert!(
        error.contains("no rule names region unused; the rules name osc-fr1"),
        "{error}"
    );
    let error = net.agent_error(&["refresh", "osc-fr2"]);
    assert!(error.contains("no rule names region osc-fr2"), "{error}");
}
