//! `allow`, `block` and `revoke`: what they do at once, and what they refuse.

use std::{
    fs,
    process::{Child, Stdio},
};

use filter_tests::net::{
    ALLOWED4, Connection, DB6, DENIED4, DENIED6, NEIGHBOURS, Net, Patience, Protected, dedicated,
    policy,
};
use serde_json::{Value, json};

use crate::host::{
    ALLOWED, DB, DENIED, MEMBER, PORT, connected, explain, kept, kept_sources, orders, others,
    rule, sources, state, temporary,
};

fn enforcing(name: &str, policy: &str) -> Net {
    let allowed = [ALLOWED, DENIED, MEMBER, "2001:db8:dead::7/128"];
    Net::enforcing(name, &[Protected::tcp(PORT, &allowed)], policy)
}

#[test]
fn source_is_allowed_at_once_and_shown() {
    let net = enforcing("temporary-allow", &orders(&[ALLOWED], ""));
    let _echo = net.echo(PORT);
    assert_eq!(net.connect(DENIED4.into(), DB), Connection::Silence);
    let arguments = ["allow", "orders", "198.51.100.7", "--for", "2h"];
    let done = net.agent_json(&[&arguments[..], &["--label", "Anna's migration"]].concat());
    assert_eq!(done["action"], "allowed");
    assert_eq!(done["source"], DENIED);
    assert_eq!(
        done["difference"]["databases"]["orders"]["added"],
        json!([DENIED])
    );
    let mut client = connected(&net, DENIED4);
    client.assert_alive();

    let listed = rule(&net, DENIED);
    assert_eq!(listed["origin"], "temporary");
    assert_eq!(listed["label"], "Anna's migration");
    assert_eq!(listed["expires"], done["until"]);
    assert_eq!(listed["by"]["uid"], 0);
    assert_eq!(listed["by"]["command"], "filter-agent");
    assert_eq!(listed["prefixes"], 1);
    assert!(listed["hits"].as_u64().unwrap() > 0);
    let left = listed["left"].as_u64().unwrap();
    assert!((6000..=7200).contains(&left), "{left}");
    let verdict = explain(&net, "198.51.100.7");
    assert_eq!(verdict["passes"], true);
    assert_eq!(verdict["label"], "Anna's migration");
    assert_eq!(verdict["expires"], done["until"]);
    let status = net.agent_json(&["status", "--verify"]);
    assert_eq!(status["errors"], json!([]));
    assert_eq!(status["databases"][0]["rules"], 2);
    assert!(status["policy"]["next_expiry"].is_string());
    for (command, text) in [
        (&["rules"][..], "temporary"),
        (&["rules"], "Anna's migration; added by uid 0"),
        (
            &["explain", "198.51.100.7"],
            "allowed by temporary rule 198.51.100.7/32 (Anna's",
        ),
    ] {
        let printed = net.agent_text(command);
        assert!(printed.contains(text), "{command:?}: {printed}");
    }

    // Again is another end, not another rule.
    net.agent_text(&["allow", "orders", DENIED, "--for", "3h"]);
    assert_eq!(sources(&net), [DENIED]);
    assert!(rule(&net, DENIED)["left"].as_u64().unwrap() > 7200);
    client.assert_alive();

    net.agent_text(&["allow", "orders", "2001:db8:dead::7", "--for", "1h"]);
    let v6 = net.connect(DENIED6.into(), (DB6, PORT).into());
    assert_eq!(v6, Connection::Accepted);
    let done = net.agent_json(&["revoke", "orders", "198.51.100.7"]);
    assert_eq!(done["action"], "revoked");
    assert_eq!(done["cut"][0]["rule"], "temporary rule 198.51.100.7/32");
    assert_eq!(done["cut"][0]["connections"], 1);
    client.assert_reset();
    assert_eq!(net.connect(DENIED4.into(), DB), Connection::Silence);
    assert_eq!(sources(&net), ["2001:db8:dead::7/128"]);
}

#[test]
fn source_is_blocked_at_once_whatever_allows_it_but_not_the_cluster() {
    let policy = orders(&["203.0.113.0/24"], &format!("cluster: [{MEMBER}]"));
    let net = enforcing("temporary-block", &policy);
    let _echo = net.echo(PORT);
    let mut member = connected(&net, NEIGHBOURS[0]);
    let mut client = connected(&net, ALLOWED4);
    net.agent_text(&["allow", "orders", ALLOWED, "--for", "2h"]);
    let arguments = ["block", "orders", "203.0.113.0/24", "--for", "1h"];
    let done = net.agent_json(&arguments);
    let notes = done["notes"].to_string();
    assert!(notes.contains(MEMBER), "{notes}");
    assert_eq!(
        done["difference"]["databases"]["orders"]["blocked"],
        json!(["203.0.113.0/24"])
    );
    client.assert_reset();
    member.assert_alive();
    assert_eq!(net.connect(ALLOWED4.into(), DB), Connection::Silence);
    assert_eq!(net.connect(NEIGHBOURS[0], DB), Connection::Accepted);
    let verdict = explain(&net, "203.0.113.10");
    assert_eq!(
        (verdict["passes"].clone(), verdict["reason"].clone()),
        (json!(false), json!("blocked"))
    );
    let listed = rule(&net, "203.0.113.0/24");
    assert_eq!(listed["origin"], "block");
    assert!(listed["hits"].as_u64().unwrap() > 0);
    let status = net.agent_json(&["status", "--verify"]);
    assert_eq!(status["errors"], json!([]));
    assert!(status["databases"][0]["dropped"]["blocked"].as_u64() > Some(0));
    // The reply says that the source stays blocked.
    let arguments = ["allow", "orders", "203.0.113.77", "--for", "1h"];
    let notes = net.agent_json(&arguments)["notes"].to_string();
    assert!(notes.contains("203.0.113.0/24 stays blocked"), "{notes}");
    net.agent_text(&["revoke", "orders", "203.0.113.0/24"]);
    assert_eq!(net.connect(ALLOWED4.into(), DB), Connection::Accepted);
    member.assert_alive();
}

#[test]
fn refused_change_changes_nothing() {
    let shop = "{name: shop, port: 3306, engine: mysql, model: shared}".to_owned();
    let expired =
        "{name: old, port: 6000, model: dedicated, force_tls: false, rules: []}".to_owned();
    let more = format!("cluster: [{MEMBER}]");
    let rules: Vec<String> = others(27).into_iter().chain([ALLOWED.into()]).collect();
    let rules: Vec<&str> = rules.iter().map(String::as_str).collect();
    let databases = [dedicated("orders", PORT, &rules, &more), shop, expired];
    let net = enforcing("temporary-refused", &policy("eth0", "native", &databases));
    for source in ["198.51.100.1", "198.51.100.2"] {
        net.agent_text(&["allow", "orders", source, "--for", "2h"]);
    }
    for host in 1..=30 {
        let source = format!("198.51.100.{host}");
        net.agent_text(&["block", "orders", &source, "--for", "2h"]);
    }
    let before = state(&net);
    let long = "x".repeat(101);
    for (arguments, expected) in [
        ("allow shop 10.1.0.1 --for 2h", "database shop is shared"),
        ("block shop 10.1.0.1 --for 2h", "database shop is shared"),
        ("revoke shop 10.1.0.1", "database shop is shared"),
        ("allow sales 10.1.0.1 --for 2h", "no database sales"),
        (
            "block sales 10.1.0.1 --for 2h",
            "which has orders, shop, old",
        ),
        ("revoke sales 10.1.0.1", "no database sales"),
        (
            "allow orders 198.51.100.7/24 --for 2h",
            "host bits set: the network is 198.51.100.0/24",
        ),
        ("block orders 198.51.100.7/24 --for 2h", "host bits"),
        ("revoke orders 198.51.100.7/24", "host bits"),
        ("allow orders 198.51.100 --for 2h", "is not a prefix"),
        ("allow orders 127.0.0.1 --for 2h", "is not a valid source"),
        ("block orders 203.0.113.9 --for 2h", "is in the cluster"),
        (
            "allow orders 192.0.2.200 --for 2h",
            "has 30 rules, 2 of them temporary",
        ),
        ("block orders 192.0.2.200 --for 2h", "has 30 blocks"),
        (
            "revoke orders 203.0.113.10",
            "is a rule of the policy file: take it out of",
        ),
        ("revoke orders 203.0.113.9", "is a rule of the policy file"),
        (
            "revoke orders 192.0.2.200",
            "no temporary rule and no block of 192.0.2.200/32; it has 198.51.100.1/32",
        ),
        ("revoke old 192.0.2.200", "it has none"),
        (
            "allow old 192.0.2.200 --for 0s",
            "a temporary rule lasts from a second to",
        ),
        (
            "allow old 192.0.2.200 --for 367d",
            "a temporary rule lasts from a second to",
        ),
        (
            &format!("allow old 192.0.2.200 --for 2h --label {long}"),
            "at most 100 characters",
        ),
        (
            "allow old 192.0.2.200 --for 2h --label a\tb",
            "none a control character",
        ),
    ] {
        let arguments: Vec<&str> = arguments.split(' ').collect();
        let error = net.agent_error(&arguments);
        assert!(error.contains(expected), "{arguments:?}: {error}");
        assert_eq!(state(&net), before, "{arguments:?}");
    }
    // The same source again is no 31st rule.
    net.agent_text(&["allow", "orders", "198.51.100.1", "--for", "3h"]);
    net.agent_text(&["block", "orders", "198.51.100.1", "--for", "3h"]);
    assert_eq!(temporary(&net).len(), 32);
}

#[test]
fn rule_without_an_end_is_wrong_usage_with_a_line_that_the_policy_file_takes() {
    let net = enforcing("temporary-endless", &orders(&[ALLOWED], ""));
    let before = state(&net);
    for source in ["198.51.100.7", "198.51.100.0/24", "2001:db8:dead::7"] {
        for action in ["allow", "block"] {
            let output = net.agent(&[action, "orders", source]);
            let error = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(2), "{error}");
            let texts: Vec<&str> = error.split('`').skip(1).step_by(2).collect();
            let line = texts
                .iter()
                .find(|text| text.contains("cidr: ") || text.contains("except: "))
                .unwrap_or_else(|| panic!("no line for the policy file: {error}"));
            // An exception is inside its rule's prefix.
            let everybody = if source.contains(':') {
                "'::/0'"
            } else {
                "0.0.0.0/0"
            };
            let rule = match line.strip_prefix("- ") {
                Some(rule) => format!("{{{rule}}}"),
                None => format!("{{cidr: {everybody}, {line}}}"),
            };
            let text = orders(&[], "").replace("rules: []", &format!("rules: [{rule}]"));
            let path = net.dir().join("other.yaml");
            fs::write(&path, &text).unwrap();
            let check = net.agent(&["check", path.to_str().unwrap()]);
            let problems = String::from_utf8_lossy(&check.stderr).into_owned();
            assert!(check.status.success(), "{error}: {text}: {problems}");
        }
    }
    for lasting in ["--for=-1h", "--for=soon", "--for=1mo"] {
        let output = net.agent(&["allow", "orders", "198.51.100.7", lasting]);
        assert_eq!(output.status.code(), Some(2), "{lasting}");
    }
    assert_eq!(state(&net), before);
}

#[test]
fn changes_of_many_clients_at_once_are_all_made() {
    let net = enforcing("temporary-many", &orders(&[ALLOWED], ""));
    let hosts: Vec<String> = (1..=12).map(|host| format!("192.0.2.{host}")).collect();
    let all_at_once = |arguments: &[Vec<&str>]| {
        let begin = |arguments: &Vec<&str>| {
            let mut command = net.agent_command(arguments);
            command.stdout(Stdio::null()).spawn().unwrap()
        };
        let begun: Vec<Child> = arguments.iter().map(begin).collect();
        for mut child in begun {
            assert!(child.wait().unwrap().success());
        }
    };
    let changes = hosts.iter().flat_map(|host| {
        let change = |action| vec![action, "orders", host, "--for", "1h"];
        ["allow", "block"].map(change)
    });
    all_at_once(&changes.collect::<Vec<_>>());
    assert_eq!(temporary(&net).len(), 2 * hosts.len());
    assert_eq!(kept_sources(&net).len(), 2 * hosts.len());
    let changes = hosts.iter().map(|host| vec!["revoke", "orders", host]);
    all_at_once(&changes.collect::<Vec<_>>());
    assert_eq!(sources(&net), Vec::<String>::new());
    assert_eq!(kept(&net), Value::Null);
    let difference = &net.agent_json(&["plan"])["difference"]["databases"];
    assert_eq!(*difference, json!({}));
}

#[test]
fn database_on_udp_has_no_connections_that_are_unknown() {
    let udp = |rules: &str| {
        let database = format!(
            "{{name: orders, port: {PORT}, protocol: udp, engine: other, model: dedicated, force_tls: false, \
             rules: [{rules}]}}"
        );
        policy("eth0", "native", &[database])
    };
    let net = Net::enforcing("temporary-udp", &[], &udp("{cidr: 203.0.113.0/24}"));
    let _echo = net.echo_datagrams(PORT);
    assert!(net.exchange(ALLOWED4.into(), DB, Patience::Long));
    let done = net.agent_json(&["block", "orders", ALLOWED, "--for", "1h"]);
    assert_eq!(done["cut_unknown"], json!([]), "{done}");
    assert!(!net.exchange(ALLOWED4.into(), DB, Patience::Short));
    net.write_policy(&udp(""));
    net.agent_text(&["reload", "--max-cut", "0"]);
}
