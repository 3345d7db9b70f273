//! Regions against real servers: what their sources answer, and every way in which they fail.

use std::{
    fmt::Write as _,
    fs,
    net::{IpAddr, SocketAddr},
    path::Path,
    time::Instant,
};

use filter_tests::{
    net::{
        ALLOWED4, ALLOWED6, CLIENT4, Connection, DB4, DB6, DENIED4, DENIED6, Net, Protected,
        wait_until,
    },
    servers::{Ca, Certificate, Dns, Encrypted, FAULTS, Resolv, Web},
};
use serde_json::Value;

const PORT: u16 = 5432;
const DB: SocketAddr = SocketAddr::new(IpAddr::V4(DB4), PORT);
const DB_V6: SocketAddr = SocketAddr::new(IpAddr::V6(DB6), PORT);

/// The addresses that every source gives first: the client's allowed ones, and one of nobody.
const GOOD: [&str; 3] = ["203.0.113.10/32", "203.0.113.200/32", "2001:db8::10/128"];
const GOOD_RECORDS: &str = "egress 1 A 203.0.113.10\n\
                            egress 1 A 203.0.113.200\n\
                            egress 1 AAAA 2001:db8::10\n";
const GOOD_LIST: &[u8] = b"# egress\n203.0.113.10\n203.0.113.200/32\n2001:db8::10/128\n";

/// The database `orders`, open to region `x`, and `other`, open to nobody.
fn policy(regions: &str) -> String {
    policy_with_rules(regions, "{region: x}")
}

fn policy_with_rules(regions: &str, rules: &str) -> String {
    format!(
        "interfaces: [eth0]
regions:
{regions}
databases:
  - {{name: orders, port: {PORT}, model: dedicated, force_tls: false, rules: [{rules}]}}
  - {{name: other, port: 6379, model: dedicated, force_tls: false, rules: [{{cidr: 192.0.2.0/24}}]}}
"
    )
}

/// Region `x` by DNS from the server next to the database, which may be slow on a busy machine.
fn dns(more: &str) -> String {
    let timeout = if more.contains("timeout:") {
        ""
    } else {
        "timeout: 20s, "
    };
    format!("  x: {{dns: [egress.test], nameservers: [{CLIENT4}], {timeout}{more}}}")
}

fn region(net: &Net, name: &str) -> Value {
    let regions = net.agent_json(&["regions"]);
    let regions = regions.as_array().unwrap();
    regions
        .iter()
        .find(|region| region["name"] == name)
        .unwrap()
        .clone()
}

fn prefixes(net: &Net, name: &str) -> Vec<String> {
    let region = region(net, name);
    let prefixes = region["prefixes"].as_array().unwrap();
    prefixes
        .iter()
        .map(|prefix| prefix.as_str().unwrap().to_owned())
        .collect()
}

fn wait_for_prefixes(net: &Net, name: &str, expected: &[&str]) {
    let mut found = Vec::new();
    let arrived = wait_until(|| {
        found = prefixes(net, name);
        found == expected
    });
    assert!(
        arrived,
        "region {name} has {found:?}: {}",
        region(net, name)
    );
}

fn last_error(net: &Net, name: &str) -> String {
    let region = region(net, name);
    assert_eq!(region["failing"], true, "{region}");
    region["error"]["text"].as_str().unwrap().into()
}

/// `refresh` fails with this, `regions` and `status` name it, and who got in before still does and
/// nobody else.
fn keeps_the_last_good_set(net: &Net, fault: &str, expected: &str) {
    let output = net.agent(&["refresh", "x"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{fault}: {text}");
    assert!(text.contains(expected), "{fault}: {text}");
    let error = last_error(net, "x");
    assert!(error.contains(expected), "{fault}: {error}");
    let status = net.agent_text(&["status"]);
    assert!(status.contains("warning: region x: "), "{fault}: {status}");
    assert_eq!(prefixes(net, "x"), GOOD, "{fault}");
    who_gets_in(net);
}

fn who_gets_in(net: &Net) {
    use Connection::{Accepted, Silence};
    let attempts = [
        (ALLOWED4.into(), DB),
        (ALLOWED6.into(), DB_V6),
        (DENIED4.into(), DB),
        (DENIED6.into(), DB_V6),
    ];
    let expected = [Accepted, Accepted, Silence, Silence];
    assert_eq!(net.connect_all(&attempts), expected);
}

fn watch_good(net: &Net) {
    net.watch(&[Protected::tcp(PORT, &GOOD)]);
}

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
    assert_eq!(line, "region x: 1 added (198.51.100.7/32)");

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
    net.write_policy(&policy(&dns("retire_after: 1s")));
    net.start();
    let expected = ["198.51.100.7/32", "203.0.113.200/32", "2001:db8::10/128"];
    wait_for_prefixes(&net, "x", &expected);
    net.watch(&[Protected::tcp(PORT, &expected)]);
    assert_eq!(net.connect(ALLOWED4.into(), DB), Connection::Silence);
    assert_eq!(region(&net, "x")["change"]["removed"][0], "203.0.113.10/32");
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
            "another set",
            "egress 1 A 198.51.100.7".into(),
            "3 of 3 prefixes are gone",
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
    let rules = net.agent_json(&["rules", "--database", "orders"]);
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
fn set_that_shrank_is_taken_when_it_stays_or_is_accepted() {
    let mut net = Net::new("shrink");
    let server = Dns::start(&net.client, net.dir(), CLIENT4.into(), "test.");
    server.set(GOOD_RECORDS);
    net.write_policy(&policy(&dns("shrink_after: 1h, retire_after: 0s")));
    net.start();
    wait_for_prefixes(&net, "x", &GOOD);
    server.set("egress 1 A 198.51.100.1\n");
    net.wait_for_line("warning: region x: 3 of 3 prefixes are gone");
    assert_eq!(prefixes(&net, "x"), GOOD);
    let usage = net.agent(&["refresh", "--accept"]);
    assert_eq!(usage.status.code(), Some(2));
    let text = net.agent_text(&["refresh", "x", "--accept"]);
    assert!(text.starts_with("x: changed, 1 prefix"), "{text}");
    assert!(
        text.contains("+ 198.51.100.1/32") && text.contains("- 203.0.113.10/32"),
        "{text}"
    );
    assert_eq!(prefixes(&net, "x"), ["198.51.100.1/32"]);

    server.set("egress 1 A 198.51.100.2\n");
    net.wait_for_line("warning: region x: 1 of 1 prefixes are gone");
    assert_eq!(prefixes(&net, "x"), ["198.51.100.1/32"]);
    net.reload(&policy(&dns("shrink_after: 3s, retire_after: 0s")));
    wait_for_prefixes(&net, "x", &["198.51.100.2/32"]);
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

/// Region `x` from `https://lists.test/list`.
fn url(ca: &Path, more: &str) -> String {
    format!(
        "  x: {{url: 'https://lists.test/list', ca_file: {}, {more}}}",
        ca.display()
    )
}

/// A web server at the client's address under the name `lists.test`, which the agent's host knows.
fn web(net: &mut Net) -> (Web, Resolv, std::path::PathBuf) {
    let ca = Ca::new(net.dir());
    let file = ca.file();
    let web = Web::start(&net.client, net.dir(), CLIENT4.into(), ca, "lists.test");
    let hosts = [(CLIENT4.into(), "lists.test")];
    let resolv = Resolv::new(&net.db, CLIENT4.into(), &hosts);
    net.own_resolver = true;
    (web, resolv, file)
}

#[test]
fn every_https_fault_keeps_the_last_good_set() {
    let mut net = Net::new("https-faults");
    let _listener = net.listen(PORT);
    let (mut web, _resolv, ca) = web(&mut net);
    web.put("list", GOOD_LIST);
    web.put("plain", b"198.51.100.0/24\n");
    let guards = "min_refresh: 1h, max_refresh: 1h, retire_after: 0s";
    let with_timeout = |timeout: &str| policy(&url(&ca, &format!("timeout: {timeout}, {guards}")));
    net.write_policy(&with_timeout("1m"));
    watch_good(&net);
    net.start();
    wait_for_prefixes(&net, "x", &GOOD);
    who_gets_in(&net);

    for fault in FAULTS {
        let expected = match fault {
            "500" => "500 Internal Server Error",
            "html" => "\"<html>",
            "to-http" => "it redirects to http://lists.test/plain, which is not encrypted",
            "loop" => "it redirects more than 5 times",
            "slow" => "not all of it came within 2s",
            "endless" | "bomb" => "the body is longer than",
            "cut" => "fetch https://lists.test/list",
            other => panic!("{other}"),
        };
        web.fault(Some(fault));
        // That answer never ends; the others may take their time.
        let timeout = if fault == "slow" { "2s" } else { "1m" };
        net.reload(&with_timeout(timeout));
        keeps_the_last_good_set(&net, fault, expected);
    }
    web.fault(None);
    for (content, expected) in [
        ("", "no prefix that is selected"),
        (
            "203.0.113.10/32\n<br>\n",
            "line 2: \"<br>\" is not a prefix",
        ),
        (
            "203.0.113.10/32\n203.0.113.200/32\n2001:db8::10/128\n0.0.0.0/0\n",
            "broader than /8",
        ),
        ("198.51.100.0/24\n", "3 of 3 prefixes are gone"),
    ] {
        web.put("list", content.as_bytes());
        keeps_the_last_good_set(&net, content, expected);
    }
    web.put("list", GOOD_LIST);
    for kind in [Certificate::Expired, Certificate::SelfSigned] {
        web.certify(kind);
        keeps_the_last_good_set(&net, "certificate", "certificate");
    }
    web.stop();
    keeps_the_last_good_set(&net, "no server", "fetch https://lists.test/list");
    web.certify(Certificate::Good);
    assert_eq!(
        net.agent_text(&["refresh", "x"]),
        "x: no change, 3 prefixes\n"
    );
    who_gets_in(&net);
    // The prefixes of the plain list never got in: `who_gets_in` tried.
}

#[test]
fn list_that_did_not_change_is_not_sent_again() {
    let mut net = Net::new("https-304");
    let (web, _resolv, ca) = web(&mut net);
    web.put("list", GOOD_LIST);
    net.write_policy(&policy(&url(&ca, "min_refresh: 1h, max_refresh: 1h")));
    net.start();
    wait_for_prefixes(&net, "x", &GOOD);
    let confirmed = region(&net, "x")["confirmed"].clone();
    net.agent_text(&["refresh"]);
    assert_ne!(region(&net, "x")["confirmed"], confirmed);
    let log = web.log();
    assert_eq!(log.len(), 2, "{log:?}");
    assert!(
        log[0] == "200 /list -" && log[1].starts_with("304 /list "),
        "{log:?}"
    );
    // Nor after a restart.
    assert!(wait_until(|| net
        .state_dir()
        .join("regions/x.json")
        .exists()));
    net.terminate();
    net.start();
    assert!(wait_until(|| web.log().len() == 3));
    assert!(web.log()[2].starts_with("304 /list "), "{:?}", web.log());
    assert_eq!(prefixes(&net, "x"), GOOD);
    // And what did change is.
    web.put("list", &[GOOD_LIST, b"192.0.2.0/24\n"].concat());
    let text = net.agent_text(&["refresh", "x"]);
    assert!(text.contains("+ 192.0.2.0/24"), "{text}");
}

#[test]
fn every_format_is_fetched() {
    let mut net = Net::new("https-formats");
    let (web, _resolv, ca) = web(&mut net);
    let samples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../filter-agent/tests/lists");
    let formats = [
        (
            "aws.json",
            "aws, region: eu-west-3, service: EC2",
            "13.36.0.0/14",
        ),
        ("gcp.json", "gcp, scope: europe-west9", "34.155.0.0/16"),
        (
            "azure.json",
            "azure, tag: AzureCloud.francecentral",
            "4.176.0.0/16",
        ),
        ("cloudflare.json", "cloudflare", "103.21.244.0/22"),
        ("github.json", "github, key: actions", "4.148.0.0/16"),
        (
            "oracle.json",
            "oracle, region: eu-paris-1",
            "129.149.0.0/20",
        ),
        (
            "digitalocean.csv",
            "digitalocean, city: Frankfurt",
            "64.226.64.0/20",
        ),
        ("list.txt", "text", "198.51.100.0/24"),
        ("gcp.json", "json, path: '$..ipv4Prefix'", "34.1.208.0/20"),
    ];
    let mut regions = String::new();
    let mut rules = Vec::new();
    for (number, (file, select, _)) in formats.iter().enumerate() {
        web.put(file, &fs::read(samples.join(file)).unwrap());
        writeln!(
            regions,
            "  r{number}: {{url: 'https://lists.test/{file}', ca_file: {}, select: {{format: \
             {select}}}}}",
            ca.display()
        )
        .unwrap();
        rules.push(format!("{{region: r{number}}}"));
    }
    web.put("list", b"192.0.2.0/24\n");
    writeln!(
        regions,
        "  moved: {{url: 'https://lists.test/to-https', ca_file: {}}}
  plain: {{url: 'http://lists.test/list', insecure: true}}",
        ca.display()
    )
    .unwrap();
    rules.push("{region: moved}, {region: plain}".into());
    net.write_policy(&policy_with_rules(&regions, &rules.join(", ")));
    let checked = net.agent_text(&["check", "--resolve", net.policy_path().to_str().unwrap()]);
    assert!(!checked.contains("was not looked up"), "{checked}");
    net.start();
    let waited = wait_until(|| {
        let status = net.agent_json(&["status"]);
        status["errors"].as_array().unwrap().is_empty()
    });
    assert!(waited, "{}", net.agent_json(&["status"]));
    for (number, (file, _, first)) in formats.iter().enumerate() {
        let prefixes = prefixes(&net, &format!("r{number}"));
        assert_eq!(prefixes[0], *first, "{file}");
    }
    assert_eq!(prefixes(&net, "moved"), ["192.0.2.0/24"]);
    assert_eq!(prefixes(&net, "plain"), ["192.0.2.0/24"]);
}

#[test]
fn fifty_regions_of_a_thousand_prefixes_stay_within_64_mib() {
    let mut net = Net::new("fifty");
    let (web, _resolv, ca) = web(&mut net);
    let mut regions = String::new();
    let mut rules = vec![Vec::new(); 2];
    for region in 0..50 {
        let mut list = String::new();
        for i in 0..1000 {
            // None next to another: nothing is merged.
            writeln!(list, "51.{region}.{}.{}/32", i / 100, i % 100 * 2).unwrap();
        }
        web.put(&format!("r{region}"), list.as_bytes());
        writeln!(
            regions,
            "  r{region}: {{url: 'https://lists.test/r{region}', ca_file: {}, min_refresh: 1h, \
             max_refresh: 1h}}",
            ca.display()
        )
        .unwrap();
        rules[region % 2].push(format!("{{region: r{region}}}"));
    }
    let text = format!(
        "interfaces: [eth0]\nregions:\n{regions}databases:\n\
         - {{name: a, port: 1, model: dedicated, force_tls: false, rules: [{}]}}\n\
         - {{name: b, port: 2, model: dedicated, force_tls: false, rules: [{}]}}\n",
        rules[0].join(", "),
        rules[1].join(", ")
    );
    net.write_policy(&text);
    net.start();
    let all = || {
        let status = net.agent_json(&["status"]);
        let databases = status["databases"].as_array().unwrap();
        databases
            .iter()
            .all(|database| database["prefixes"] == 25_000)
    };
    assert!(wait_until(all), "{}", net.agent_text(&["status"]));
    for round in 0..3 {
        for region in 0..50 {
            let list = fs::read(net.dir().join(format!("nginx/root/r{region}"))).unwrap();
            let more = format!("52.{region}.{round}.0/24\n");
            web.put(&format!("r{region}"), &[&list, more.as_bytes()].concat());
        }
        net.agent_text(&["refresh"]);
    }
    let (peak, resident) = net.memory();
    println!("peak {peak} KiB, resident {resident} KiB");
    assert!(peak <= 64 << 10, "{peak} KiB");
}
