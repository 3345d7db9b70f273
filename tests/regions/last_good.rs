//! The last good set of a region: what keeps it, and what replaces it.

use std::fs;

use filter_tests::{
    net::{ALLOWED4, CLIENT4, Connection, DENIED4, Net, Protected, wait_until},
    servers::Dns,
};

use crate::orders::{
    DB, GOOD, GOOD_RECORDS, PORT, dns, last_error, policy, policy_with_rules, prefixes, region,
    wait_for_prefixes, watch_good, who_gets_in,
};

#[test]
fn constant_region_is_not_looked_up() {
    let mut net = Net::new("constant-region");
    // Private, and broad: what the guards of look-ups refuse is the operator's to write.
    let text = policy("  x: {prefixes: [10.0.0.0/8, 203.0.113.0/24]}");
    net.write_policy(&text);
    net.start();
    assert_eq!(net.agent_text(&["refresh"]), "no rule names a region\n");
    let error = net.agent_error(&["refresh", "x"]);
    assert!(
        error.contains("the prefixes of region x stand in the policy"),
        "{error}"
    );
    assert_eq!(region(&net, "x")["failing"], false);
    assert_eq!(net.agent_json(&["status"])["errors"], serde_json::json!([]));
}

#[test]
fn restart_without_a_network_enforces_what_was_kept() {
    let mut net = Net::new("kept");
    let _listener = net.listen(PORT);
    let mut server = Dns::start(&net.client, net.dir(), CLIENT4.into(), "test.");
    server.set(GOOD_RECORDS);
    let text = policy(&dns("retire_after: 1h"));
    net.write_policy(&text);
    watch_good(&net);
    net.start();
    wait_for_prefixes(&net, "x", &GOOD);
    let file = net.state_dir().join("regions/x.json");
    assert!(wait_until(|| file.exists()));
    net.kill();
    server.stop();
    // As a reboot would.
    net.agent_text(&["detach", "--yes"]);
    net.start();
    assert_eq!(prefixes(&net, "x"), GOOD);
    who_gets_in(&net);
    assert!(wait_until(|| region(&net, "x")["failing"] == true));
    assert!(last_error(&net, "x").contains("look up egress.test"));

    // Damaged: reported and ignored; the other rules are enforced all the same.
    net.kill();
    let mut bytes = fs::read(&file).unwrap();
    let place = bytes
        .windows(9)
        .position(|window| window == b"203.0.113")
        .unwrap();
    bytes[place] = b'1';
    fs::write(&file, bytes).unwrap();
    net.watch(&[Protected::tcp(PORT, &[])]);
    net.start();
    let said = net
        .log
        .iter()
        .any(|line| line.contains("region x") && line.contains("x.json is ignored: it is damaged"));
    assert!(said, "{:#?}", net.log);
    assert_eq!(net.connect(ALLOWED4.into(), DB), Connection::Silence);
    let output = net.agent(&["status"]);
    let status = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{status}");
    assert!(
        status.contains("error: region x has no addresses and allows nobody"),
        "{status}"
    );
    let open = net.agent_text(&["explain", "192.0.2.7", "--database", "other"]);
    assert!(open.contains("passes"), "{open}");

    watch_good(&net);
    server.restart();
    wait_for_prefixes(&net, "x", &GOOD);
    who_gets_in(&net);
    // The set of another source is not this region's.
    net.kill();
    server.stop();
    net.write_policy(&text.replace("egress.test", "other.test"));
    net.watch(&[Protected::tcp(PORT, &[])]);
    net.start();
    assert!(
        net.log
            .iter()
            .any(|line| line.contains("it is of another source"))
    );
    assert_eq!(net.connect(ALLOWED4.into(), DB), Connection::Silence);
}

#[test]
fn state_directory_that_cannot_be_written_is_warned_of() {
    let mut net = Net::new("unkept");
    let _listener = net.listen(PORT);
    let server = Dns::start(&net.client, net.dir(), CLIENT4.into(), "test.");
    server.set(GOOD_RECORDS);
    fs::write(net.state_dir(), "a file, where a directory should be").unwrap();
    net.write_policy(&policy(&dns("")));
    watch_good(&net);
    net.start();
    wait_for_prefixes(&net, "x", &GOOD);
    who_gets_in(&net);
    let warned = || {
        let output = net.agent(&["status"]);
        String::from_utf8_lossy(&output.stdout).contains("warning: region x: write ")
    };
    assert!(wait_until(warned));
    net.wait_for_line("warning: region x: write ");
}

#[test]
fn set_that_is_too_old_is_dropped_where_the_policy_says_so() {
    let mut net = Net::new("max-age");
    let _listener = net.listen(PORT);
    let mut server = Dns::start(&net.client, net.dir(), CLIENT4.into(), "test.");
    server.set(GOOD_RECORDS);
    let ages = dns("max_refresh: 1s, max_age: 3s, timeout: 1s");
    let stays = dns("max_refresh: 1s, max_age: 1h");
    net.write_policy(&policy(&stays));
    watch_good(&net);
    net.start();
    wait_for_prefixes(&net, "x", &GOOD);
    server.stop();
    net.reload(&policy(&ages));
    wait_for_prefixes(&net, "x", &[]);
    net.watch(&[Protected::tcp(PORT, &[])]);
    assert_eq!(net.connect(ALLOWED4.into(), DB), Connection::Silence);
    net.wait_for_line("region x: 3 removed");
    watch_good(&net);
    server.restart();
    net.reload(&policy(&stays));
    wait_for_prefixes(&net, "x", &GOOD);
    who_gets_in(&net);
}

#[test]
fn set_that_shrank_loses_nobody_until_it_stays_so_or_is_accepted() {
    let mut net = Net::new("shrink");
    let server = Dns::start(&net.client, net.dir(), CLIENT4.into(), "test.");
    server.set(GOOD_RECORDS);
    net.write_policy(&policy(&dns("shrink_after: 1h, retire_after: 0s")));
    net.start();
    wait_for_prefixes(&net, "x", &GOOD);
    server.set("egress 1 A 198.51.100.1\n");
    net.wait_for_line(
        "warning: region x: the prefixes fell from 3 to 1, by more than `max_shrink`",
    );
    // What is new is allowed, and nobody is cut off.
    assert_eq!(
        prefixes(&net, "x"),
        [&["198.51.100.1/32"], &GOOD[..]].concat()
    );
    let usage = net.agent(&["refresh", "--accept"]);
    assert_eq!(usage.status.code(), Some(2));
    let text = net.agent_text(&["refresh", "x", "--accept"]);
    assert!(text.starts_with("x: changed, 1 prefix"), "{text}");
    assert!(text.contains("- 203.0.113.10/32"), "{text}");
    assert_eq!(prefixes(&net, "x"), ["198.51.100.1/32"]);

    server.set(GOOD_RECORDS);
    net.reload(&policy(&dns("shrink_after: 3s, retire_after: 0s")));
    net.agent(&["refresh", "x", "--accept"]);
    assert_eq!(prefixes(&net, "x"), GOOD);
    server.set("egress 1 A 198.51.100.2\n");
    wait_for_prefixes(&net, "x", &["198.51.100.2/32"]);
    let is_good = || region(&net, "x")["failing"] == false;
    assert!(wait_until(is_good), "{}", region(&net, "x"));
}

#[test]
fn reload_with_a_region_that_fails_is_refused_only_if_it_is_new() {
    let mut net = Net::new("reload-region");
    let _listener = net.listen(PORT);
    let mut server = Dns::start(&net.client, net.dir(), CLIENT4.into(), "test.");
    server.set(&format!("{GOOD_RECORDS}bad 1 A 127.0.0.1\n"));
    net.write_policy(&policy(&dns("")));
    watch_good(&net);
    net.start();
    wait_for_prefixes(&net, "x", &GOOD);
    for (name, expected) in [("none", "Non-Existent Domain"), ("bad", "loopback")] {
        let new = format!(
            "{}\n  y: {{dns: [{name}.test], nameservers: [{CLIENT4}]}}",
            dns("")
        );
        let text = policy_with_rules(&new, "{region: x}, {region: y}");
        net.write_policy(&text);
        let error = net.agent_error(&["reload"]);
        assert!(
            error.contains("reload refused, nothing is changed: region y: "),
            "{error}"
        );
        assert!(error.contains(expected), "{error}");
        let error = net.agent_error(&["plan"]);
        assert!(error.contains("region y: "), "{error}");
        who_gets_in(&net);
    }
    // What is known of a region in force does not depend on its source.
    server.stop();
    let text = policy_with_rules(&dns("min_refresh: 2s"), "{region: x}, {cidr: 192.0.2.0/24}");
    net.reload(&text);
    who_gets_in(&net);
    server.restart();
    server.set(&format!("{GOOD_RECORDS}y 1 A 198.51.100.7\n"));
    let new = format!(
        "{}\n  y: {{dns: [y.test], nameservers: [{CLIENT4}]}}",
        dns("")
    );
    net.watch(&[Protected::tcp(
        PORT,
        &[&GOOD[..], &["198.51.100.7/32"]].concat(),
    )]);
    net.reload(&policy_with_rules(&new, "{region: x}, {region: y}"));
    assert_eq!(net.connect(DENIED4.into(), DB), Connection::Accepted);
}

#[test]
fn region_that_does_not_fit_the_kernel_keeps_what_is_enforced() {
    let mut net = Net::new("region-full");
    let _listener = net.listen(PORT);
    let server = Dns::start(&net.client, net.dir(), CLIENT4.into(), "test.");
    server.set(GOOD_RECORDS);
    net.write_policy(&policy(&dns("")));
    watch_good(&net);
    net.start_with(&["--max-prefixes", "10"]);
    wait_for_prefixes(&net, "x", &GOOD);
    let many: String = (0..20)
        .map(|i| format!("egress 1 A 192.0.2.{}\n", i * 2))
        .collect();
    server.set(&format!("{GOOD_RECORDS}{many}"));
    net.wait_for_line("warning: region x: the policy has 23 IPv4 prefixes");
    assert_eq!(prefixes(&net, "x"), GOOD);
    who_gets_in(&net);
}
