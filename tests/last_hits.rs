//! When each rule was last hit: over reloads, restarts and reboots, and where the disk takes nothing.

use std::{
    fs::{self, File},
    io::Write as _,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::Output,
};

use filter_tests::{
    net::{ALLOWED4, Connection, DB4, Net, Protected, dedicated, policy, wait_until},
    records::rewrite,
};
use jiff::{SignedDuration, Timestamp};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

const PORT: u16 = 5432;
const MONITORED: u16 = 3306;
const ALLOWED: &str = "203.0.113.10/32";
const WIDER: &str = "203.0.113.0/24";
const OTHER: &str = "192.0.2.0/24";

fn both(rules: &[&str]) -> String {
    let orders = dedicated("orders", PORT, rules, "");
    let shop = dedicated("shop", MONITORED, &[ALLOWED, OTHER], "monitor: true");
    policy("eth0", "native", &[orders, shop])
}

fn record(net: &Net) -> PathBuf {
    net.state_dir().join("last-hits.json")
}

fn date(value: &Value) -> Timestamp {
    value.as_str().unwrap_or_default().parse().unwrap()
}

/// When a rule was last hit, `null` where it was not, and since when it is counted.
#[track_caller]
fn last_hit(net: &Net, database: &str, source: &str) -> (Value, Timestamp) {
    let rules = net.agent_json(&["rules", "--database", database]);
    let mut found = rules["rules"].as_array().unwrap().iter();
    let rule = found.find(|rule| rule["source"] == source);
    let rule = rule.unwrap_or_else(|| panic!("{source} is not in {rules:#}"));
    (rule["last_hit"].clone(), date(&rule["counted_since"]))
}

#[track_caller]
fn hit(net: &Net, port: u16) {
    let at = SocketAddr::new(IpAddr::V4(DB4), port);
    assert_eq!(net.connect(ALLOWED4.into(), at), Connection::Accepted);
}

/// The clocks are not read at once.
#[track_caller]
fn assert_same(one: Timestamp, other: Timestamp) {
    let apart = one.duration_since(other).abs();
    assert!(apart <= SignedDuration::from_secs(1), "{one} {other}");
}

fn now() -> Timestamp {
    Timestamp::from_second(Timestamp::now().as_second()).unwrap()
}

fn unused(net: &Net, lasting: &str) -> Output {
    net.agent(&["rules", "--unused", lasting])
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn last_hit_is_kept_over_restarts_and_reboots() {
    let mut net = Net::enforcing(
        "last-hits",
        &[Protected::tcp(PORT, &[ALLOWED])],
        &both(&[ALLOWED, OTHER]),
    );
    let _listeners = [net.listen(PORT), net.listen(MONITORED)];
    let begun = now();
    for (database, source) in [("orders", ALLOWED), ("orders", OTHER), ("shop", ALLOWED)] {
        let (last, since) = last_hit(&net, database, source);
        assert_eq!(last, Value::Null);
        assert!(since <= now());
    }
    hit(&net, PORT);
    hit(&net, MONITORED);
    let (last, since) = last_hit(&net, "orders", ALLOWED);
    assert!(date(&last) >= begun && date(&last) <= now());
    // Also one that is only monitored.
    assert!(date(&last_hit(&net, "shop", ALLOWED).0) >= begun);
    assert_eq!(last_hit(&net, "orders", OTHER).0, Value::Null);
    let table = net.agent_text(&["rules"]);
    assert!(
        table.contains("LAST HIT") && table.contains("s ago"),
        "{table}"
    );
    assert!(table.contains("none in "), "{table}");

    // A restart changes nothing, and what came without an agent is found.
    net.terminate();
    net.start();
    let (after, since_after) = last_hit(&net, "orders", ALLOWED);
    assert_same(date(&after), date(&last));
    assert_same(since_after, since);
    net.kill();
    let without_agent = now();
    hit(&net, PORT);
    net.start();
    let (last, since_after) = last_hit(&net, "orders", ALLOWED);
    assert!(date(&last) >= without_agent, "{last} {without_agent}");
    assert_same(since_after, since);
    assert_eq!(last_hit(&net, "orders", OTHER).0, Value::Null);

    // A reload keeps it; a rule that comes back is another one.
    net.reload(&both(&[ALLOWED, OTHER, "198.51.100.0/24"]));
    assert_same(date(&last_hit(&net, "orders", ALLOWED).0), date(&last));
    net.watch(&[Protected::tcp(PORT, &[WIDER])]);
    net.reload(&both(&[OTHER, WIDER]));
    let back = now();
    net.reload(&both(&[ALLOWED, OTHER]));
    let (again, since_again) = last_hit(&net, "orders", ALLOWED);
    assert_eq!(again, Value::Null);
    assert!(since_again >= back);
    let (_, other_since) = last_hit(&net, "orders", OTHER);
    assert_same(other_since, since);

    // A reboot: nothing of the kernel is left.
    hit(&net, PORT);
    let (last, since) = last_hit(&net, "orders", ALLOWED);
    let reboot = |net: &mut Net, change: &dyn Fn(&mut Value)| {
        net.terminate();
        rewrite(&record(net), |kept| {
            kept["boot_id"] = json!("5ac5b9d8-8d6f-4d2c-a3a4-3f3c7a6b2c10");
            change(kept);
        });
        net.watch(&[]);
        fs::remove_dir_all(net.bpffs().join("filter-agent")).unwrap();
        net.assert_detached("eth0");
        net.start();
    };
    // This boot has lasted for longer: the record is made older than it.
    let uptime = fs::read_to_string("/proc/uptime").unwrap();
    let uptime: i64 = uptime.split('.').next().unwrap().parse().unwrap();
    let earlier = SignedDuration::from_secs(uptime + 3600);
    reboot(&mut net, &|kept| {
        kept["clock"] = json!(date(&kept["clock"]) - earlier)
    });
    let (after, since_after) = last_hit(&net, "orders", ALLOWED);
    assert_same(date(&after), date(&last) - earlier);
    assert_same(since_after, since - earlier);
    // The clock was a year ahead then, and is right now.
    reboot(&mut net, &|kept| {
        let ahead = Timestamp::now() + SignedDuration::from_hours(365 * 24);
        kept["clock"] = json!(ahead);
        for rule in kept["rules"].as_array_mut().unwrap() {
            rule["last"] = json!({"date": ahead});
        }
    });
    let (last, since) = last_hit(&net, "orders", OTHER);
    assert!(date(&last) <= now() && since <= now(), "{last} {since}");

    // Only a rule that is counted for so long is called unused.
    let young = unused(&net, "30d");
    assert!(young.status.success());
    assert_eq!(text(&young.stdout), "no rule is without a hit for 30d\n");
    reboot(&mut net, &|kept| {
        let days =
            |days: i64| json!({"date": Timestamp::now() - SignedDuration::from_hours(24 * days)});
        for rule in kept["rules"].as_array_mut().unwrap() {
            let is_old = rule["rule"] == OTHER && rule["database"] == "orders";
            rule["since"] = days(if is_old { 40 } else { 20 });
            rule["last"] = Value::Null;
        }
    });
    let old = unused(&net, "30d");
    let (table, left_out) = (text(&old.stdout), text(&old.stderr));
    assert_eq!(table.lines().count(), 2, "{table}");
    assert!(
        table.contains("orders") && table.contains("none in 40d"),
        "{table}"
    );
    assert_eq!(
        left_out,
        "3 rules without a hit left out: counted for less than 30d, at most for 20d\n"
    );
    let json: Value =
        serde_json::from_slice(&net.agent(&["rules", "--unused", "30d", "--json"]).stdout).unwrap();
    let rules = json["rules"].as_array().unwrap();
    assert_eq!(rules.len(), 1, "{json:#}");
    assert_eq!(rules[0]["source"], OTHER);

    // Nothing is left after a detach.
    net.watch(&[]);
    net.agent_text(&["detach", "--yes"]);
    net.wait_for_exit();
    assert!(!record(&net).exists());
}

#[test]
fn rule_that_others_cover_names_them() {
    let net = Net::enforcing("last-hits-covered", &[], &both(&[ALLOWED, OTHER]));
    let mut net = net;
    net.agent_text(&["allow", "orders", WIDER, "--for", "1h"]);
    let covered = |net: &Net, source: &str| {
        let rules = net.agent_json(&["rules", "--database", "orders"]);
        let mut found = rules["rules"].as_array().unwrap().iter();
        found.find(|rule| rule["source"] == source).unwrap()["covered_by"].clone()
    };
    // A rule without an end outlasts one that has one.
    assert_eq!(covered(&net, ALLOWED), json!([]));
    net.reload(&both(&[ALLOWED, WIDER]));
    assert_eq!(covered(&net, ALLOWED), json!([WIDER]));
    let table = net.agent_text(&["rules"]);
    assert!(table.contains("covered by 203.0.113.0/24"), "{table}");
    net.terminate();
}

#[test]
fn record_that_is_damaged_is_ignored_and_said_so() {
    let mut net = Net::enforcing("last-hits-damaged", &[], &both(&[ALLOWED]));
    let _listener = net.listen(PORT);
    net.watch(&[Protected::tcp(PORT, &[ALLOWED])]);
    hit(&net, PORT);
    net.terminate();
    fs::write(record(&net), "{\"crc32\":1,\"kept\":{}}").unwrap();
    let before = now();
    net.spawn(&[]);
    let line = net.wait_for_line("warning: ");
    assert!(line.contains("last-hits.json is ignored"), "{line}");
    net.wait_for_line("enforcing ");
    // The packets that its counter holds came at an unknown time.
    let (last, since) = last_hit(&net, "orders", ALLOWED);
    assert_eq!(last, Value::Null);
    assert!(since >= before);
    net.terminate();
}

/// A file system that is gone when it is dropped.
struct SmallDisk<'a>(&'a Path);

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        let _ = umount2(self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
fn full_disk_is_a_warning_and_ends_with_it() {
    let mut net = Net::new("last-hits-disk");
    let disk = net.state_dir();
    fs::create_dir_all(&disk).unwrap();
    let (kind, size) = (Some("tmpfs"), Some("size=64k"));
    mount(kind, &disk, kind, MsFlags::empty(), size).unwrap();
    let _mounted = SmallDisk(&disk);
    let filler = disk.join("filler");
    let mut file = File::create(&filler).unwrap();
    while file.write(&[0; 4096]).is_ok() {}
    drop(file);
    net.write_policy(&both(&[ALLOWED]));
    net.start();
    let warnings = |net: &Net| net.agent_json(&["status"])["warnings"].to_string();
    let warned =
        || warnings(&net).contains("the last hits of rules are not kept for the next start");
    assert!(wait_until(warned), "{}", warnings(&net));
    assert!(!record(&net).exists());
    fs::remove_file(&filler).unwrap();
    assert!(wait_until(|| warnings(&net) == "[]"), "{}", warnings(&net));
    assert!(record(&net).exists());
    net.terminate();
    let log = net.log.join("\n");
    assert_eq!(
        log.matches("last hits of rules are not kept").count(),
        1,
        "{log}"
    );
    assert_eq!(
        log.matches("last hits of rules are kept").count(),
        1,
        "{log}"
    );
}
