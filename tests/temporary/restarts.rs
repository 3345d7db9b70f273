//! Temporary rules over restarts, reloads and reboots, and with a record that is damaged.

use std::{
    fs,
    path::PathBuf,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use filter_tests::{
    net::{ALLOWED4, Connection, DENIED4, NEIGHBOURS, Net, Protected, wait_until},
    records::rewrite,
};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::host::{
    ALLOWED, DENIED, MEMBER, PORT, connect_all, connected, explain, kept, kept_sources, orders,
    rule, sources, temporary,
};

const HOUR: u64 = 3600;

fn record(net: &Net) -> PathBuf {
    net.state_dir().join("temporary.json")
}

/// Removes what the kernel holds, as a reboot does.
fn empty_kernel(net: &Net) {
    fs::remove_dir_all(net.bpffs().join("filter-agent")).unwrap();
    net.assert_detached("eth0");
}

/// Restarts the agent after a reboot; `change` says what the record's times are in this boot.
fn reboot(net: &mut Net, change: impl FnOnce(&mut Value)) {
    net.kill();
    rewrite(&record(net), |kept| {
        kept["boot_id"] = json!("5ac5b9d8-8d6f-4d2c-a3a4-3f3c7a6b2c10");
        change(kept);
    });
    // Nothing is filtered meanwhile.
    net.watch(&[]);
    empty_kernel(net);
    net.start();
}

fn seconds(seconds: u64) -> u64 {
    seconds * 1_000_000_000
}

#[track_caller]
fn assert_left(rule: &Value, expected: u64) {
    let left = rule["left"].as_u64().unwrap_or_default();
    assert!(
        (expected - 300..=expected).contains(&left),
        "{expected}: {rule}"
    );
}

#[test]
fn temporary_rules_stay_over_restarts_and_reloads() {
    let policy = orders(&[ALLOWED, "203.0.113.11/32"], "");
    let watched = [DENIED, "203.0.113.11/32"];
    let mut net = Net::enforcing("stay", &[], &policy);
    let _echo = net.echo(PORT);
    net.wait_until_confirmed();
    let label = ["--label", "on call"];
    net.agent_text(&[&["allow", "orders", DENIED, "--for", "2h"], &label[..]].concat());
    net.agent_text(&["block", "orders", ALLOWED, "--for", "1h"]);
    net.watch(&[Protected::tcp(PORT, &watched)]);
    let mut client = connected(&net, DENIED4);
    let before = temporary(&net);
    let same = |net: &Net| {
        let now = temporary(net);
        assert_eq!(now.len(), before.len(), "{now:?}");
        for (now, before) in now.iter().zip(&before) {
            for field in ["source", "origin", "label", "by", "added", "expires"] {
                assert_eq!(now[field], before[field], "{field}");
            }
            assert!(now["left"].as_u64() <= before["left"].as_u64());
        }
        let found = connect_all(net, &[DENIED4, ALLOWED4]);
        assert_eq!(found, [Connection::Accepted, Connection::Silence]);
        let verified = net.agent_json(&["status", "--verify"])["verified"].clone();
        assert_eq!(verified["errors"], json!([]));
    };
    same(&net);
    net.terminate();
    net.start();
    same(&net);
    net.kill();
    net.start();
    same(&net);
    net.reload(&orders(&[ALLOWED, "203.0.113.11/32", MEMBER], ""));
    same(&net);
    net.write_policy("databases: 7");
    net.agent_error(&["reload"]);
    same(&net);
    // The confirmed policy is in force instead of this file.
    net.kill();
    net.start();
    same(&net);
    client.assert_alive();
    // A rule that an agent could not write is in the kernel, without its label.
    net.kill();
    fs::remove_file(record(&net)).unwrap();
    net.start();
    assert_eq!(sources(&net).len(), 2);
    let found = connect_all(&net, &[DENIED4, ALLOWED4]);
    assert_eq!(found, [Connection::Accepted, Connection::Silence]);
    assert!(wait_until(|| kept_sources(&net).len() == 2));
    client.assert_alive();
}

#[test]
fn after_a_reboot_the_smaller_of_both_times_is_left() {
    let end = Timestamp::now() + SignedDuration::from_hours(2);
    let expiring = format!("{{cidr: {MEMBER}, expires: '{end:.0}'}}");
    let policy = orders(&[], "").replace("rules: []", &format!("rules: [{expiring}]"));
    let mut net = Net::enforcing("reboot", &[], &policy);
    let _echo = net.echo(PORT);
    net.wait_until_confirmed();
    for host in 1..=5 {
        let source = format!("198.51.100.{host}");
        net.agent_text(&["allow", "orders", &source, "--for", "2h"]);
    }
    net.agent_text(&["block", "orders", ALLOWED, "--for", "2h"]);
    assert!(kept(&net)["ends"][0][1].is_u64());
    let now = Timestamp::now();
    let in_seconds = |seconds| json!((now + SignedDuration::from_secs(seconds)).to_string());
    reboot(&mut net, |kept| {
        // Of a boot that had lasted for longer than this one may have.
        let boot = seconds(1_000_000);
        kept["boot"] = json!(boot);
        kept["ends"][0][1] = json!(boot + seconds(HOUR));
        let rules = kept["temporary"].as_array_mut().unwrap();
        for rule in rules.iter_mut() {
            rule["end"] = json!(boot + seconds(2 * HOUR));
        }
        // Less was left when it was written, less is left by the clock.
        rules[0]["end"] = json!(boot + seconds(HOUR));
        rules[1]["until"] = in_seconds(3600);
        // Ended, by either.
        rules[2]["end"] = json!(boot - 1);
        rules[3]["until"] = in_seconds(-1);
        rules[5]["end"] = json!(boot + seconds(HOUR));
    });
    let expected = [
        "198.51.100.1/32",
        "198.51.100.2/32",
        "198.51.100.5/32",
        ALLOWED,
    ];
    assert_eq!(sources(&net), expected);
    for (source, left) in expected.iter().zip([HOUR, HOUR, 2 * HOUR, HOUR]) {
        assert_left(&rule(&net, source), left);
    }
    let member = |net: &Net| net.agent_json(&["rules"])["rules"][0].clone();
    assert_left(&member(&net), HOUR);
    for (source, passes) in [
        ("198.51.100.1", true),
        ("198.51.100.3", false),
        ("198.51.100.4", false),
        ("198.51.100.5", true),
        ("203.0.113.10", false),
    ] {
        assert_eq!(explain(&net, source)["passes"], passes, "{source}");
    }
    let out = connect_all(&net, &[ALLOWED4, DENIED4]);
    assert_eq!(out, [Connection::Silence; 2]);

    // A clock that was set back is not believed.
    reboot(&mut net, |kept| {
        kept["clock"] = in_seconds(3600 + 1800);
        let boot = kept["boot"].as_u64().unwrap();
        kept["ends"][0][1] = json!(boot + seconds(2 * HOUR));
    });
    assert_eq!(
        sources(&net),
        ["198.51.100.1/32", "198.51.100.5/32", ALLOWED]
    );
    assert_left(&rule(&net, "198.51.100.1/32"), HOUR / 2);
    assert_left(&rule(&net, "198.51.100.5/32"), HOUR / 2);
    assert_left(&rule(&net, ALLOWED), HOUR / 2);
    assert_left(&member(&net), HOUR / 2);
    assert_eq!(
        net.connect(NEIGHBOURS[0], crate::host::DB),
        Connection::Accepted
    );
    // A reload goes by the clock.
    net.agent_text(&["reload"]);
    assert_left(&member(&net), 2 * HOUR);
    assert_left(&rule(&net, "198.51.100.5/32"), HOUR / 2);
}

#[test]
fn what_is_left_when_the_agent_stops_is_what_is_left_after_a_reboot() {
    let mut net = Net::enforcing("reboot-stop", &[], &orders(&[ALLOWED], ""));
    net.agent_text(&["allow", "orders", DENIED, "--for", "2h"]);
    let written = kept(&net)["boot"].as_u64().unwrap();
    net.terminate();
    let kept = kept(&net);
    assert!(kept["boot"].as_u64().unwrap() > written, "{kept}");
    assert_eq!(kept_sources(&net), [DENIED]);
    empty_kernel(&net);
    rewrite(&record(&net), |kept| kept["boot_id"] = Value::Null);
    net.start();
    assert_left(&rule(&net, DENIED), 2 * HOUR);
}

#[test]
fn damaged_record_stops_nothing_and_what_is_in_the_kernel_stays() {
    let policy = orders(&[ALLOWED], "");
    let mut net = Net::enforcing("damaged", &[], &policy);
    let _echo = net.echo(PORT);
    net.wait_until_confirmed();
    net.agent_text(&["allow", "orders", DENIED, "--for", "2h"]);
    net.agent_text(&["block", "orders", ALLOWED, "--for", "2h"]);
    net.watch(&[Protected::tcp(PORT, &[DENIED])]);
    let mut client = connected(&net, DENIED4);
    let damages: [fn(Vec<u8>) -> Vec<u8>; 4] = [
        |_| b"{".to_vec(),
        |_| Vec::new(),
        |text| text[..text.len() / 2].to_vec(),
        |text| {
            let text = String::from_utf8(text).unwrap();
            text.replacen("\"block\"", "\"allow\"", 1).into_bytes()
        },
    ];
    for damage in damages {
        net.terminate();
        let text = fs::read(record(&net)).unwrap();
        fs::write(record(&net), damage(text)).unwrap();
        net.start();
        let mut expected = [DENIED, ALLOWED];
        let mut found = sources(&net);
        expected.sort_unstable();
        found.sort_unstable();
        assert_eq!(found, expected);
        let verdicts = connect_all(&net, &[DENIED4, ALLOWED4]);
        assert_eq!(verdicts, [Connection::Accepted, Connection::Silence]);
        let status = net.agent_json(&["status"]);
        let said = format!("{}{}", status["errors"], status["warnings"]);
        assert!(said.contains("temporary.json is ignored"), "{status}");
        client.assert_alive();
        // The next change writes it anew.
        net.agent_text(&["allow", "orders", MEMBER, "--for", "1h"]);
        net.agent_text(&["revoke", "orders", MEMBER]);
        assert_eq!(kept_sources(&net).len(), 2);
        net.agent_text(&["reload"]);
        let status = net.agent_json(&["status"]);
        assert_eq!(
            (&status["errors"], &status["warnings"]),
            (&json!([]), &json!([]))
        );
    }
    // Where nothing is in the kernel either, the policy is in force without them.
    net.kill();
    fs::write(record(&net), "{").unwrap();
    net.watch(&[]);
    empty_kernel(&net);
    net.start();
    assert_eq!(sources(&net), Vec::<String>::new());
    assert_eq!(connect_all(&net, &[ALLOWED4]), [Connection::Accepted]);
    let status = net.agent_json(&["status"]);
    let said = format!("{}{}", status["errors"], status["warnings"]);
    assert!(said.contains("temporary.json is ignored"), "{status}");
}

#[test]
fn change_that_was_answered_survives_a_crash_and_a_reboot() {
    let mut net = Net::enforcing("answered", &[], &orders(&[ALLOWED], ""));
    net.wait_until_confirmed();
    for round in 0..4_u8 {
        let hosts: Vec<String> = (1..=25)
            .map(|host| format!("198.51.{round}.{host}"))
            .collect();
        let allow = |host: &String| net.agent_command(&["allow", "orders", host, "--for", "1h"]);
        let commands: Vec<Command> = hosts.iter().map(allow).collect();
        let answered = Arc::new(AtomicUsize::new(0));
        let counted = answered.clone();
        let client = thread::spawn(move || {
            for mut command in commands {
                if !command.output().unwrap().status.success() {
                    break;
                }
                counted.fetch_add(1, Ordering::SeqCst);
            }
        });
        let enough = usize::from(round) * 3 + 1;
        assert!(wait_until(|| answered.load(Ordering::SeqCst) >= enough));
        net.kill();
        client.join().unwrap();
        // Every other time the kernel is empty, too.
        if round % 2 == 1 {
            empty_kernel(&net);
            rewrite(&record(&net), |kept| kept["boot_id"] = Value::Null);
        }
        net.start();
        let found = sources(&net);
        for host in &hosts[..answered.load(Ordering::SeqCst)] {
            let source = format!("{host}/32");
            assert!(found.contains(&source), "{source} is not in {found:?}");
        }
        for source in &found {
            net.agent_text(&["revoke", "orders", source]);
        }
    }
}

#[test]
fn detach_forgets_temporary_rules() {
    let mut net = Net::enforcing("forgets", &[], &orders(&[ALLOWED], ""));
    for with_agent in [true, false] {
        net.wait_until_confirmed();
        net.agent_text(&["allow", "orders", DENIED, "--for", "1h"]);
        if !with_agent {
            net.kill();
        }
        net.agent_text(&["detach", "--yes"]);
        if with_agent {
            net.wait_for_exit();
        }
        assert!(!record(&net).exists());
        net.start();
        assert_eq!(sources(&net), Vec::<String>::new());
        assert_eq!(explain(&net, "198.51.100.7")["passes"], false);
    }
}
