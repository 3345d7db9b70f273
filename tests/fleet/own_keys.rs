//! The keys that hosts write to etcd of themselves.

use std::process::Command;

use filter_agent::fleet::host_status::{DatabaseStatus, HostStatus};
use filter_common::LAYOUT;
use filter_tests::net::{DENIED4, Hammer, Net, succeed, wait_until};
use serde_json::json;

use crate::{
    etcd::{Etcd, USER},
    host::{A, B, FLOOR, PORT, connects, document, host, text, wait_for},
};

/// The last status that the host wrote.
fn written(etcd: &Etcd) -> Option<HostStatus> {
    let text = etcd.text_of("hosts/db7")?;
    Some(serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}")))
}

/// Waits until it is so for `orders`.
#[track_caller]
fn wait_until_written(etcd: &Etcd, is_so: impl Fn(&DatabaseStatus) -> bool) -> HostStatus {
    let status = || written(etcd).filter(|status| is_so(&status.databases["orders"]));
    assert!(wait_until(|| status().is_some()), "{:?}", written(etcd));
    status().unwrap()
}

fn put(etcd: &Etcd, text: &[u8]) -> Option<i64> {
    etcd.put("rules/orders", text);
    Some(etcd.revision_of("rules/orders"))
}

/// Lines of the status that are about the fleet.
fn lines(net: &Net, kind: &str) -> Vec<String> {
    let status = net.agent_json(&["status"]);
    let lines = status[kind].as_array().unwrap().iter();
    let lines = lines.map(|line| line.as_str().unwrap().to_owned());
    lines.filter(|line| line.starts_with("fleet:")).collect()
}

/// Before the first document, with one in force, with one that is refused, and with one that the kernel does not take.
#[test]
fn host_writes_what_is_in_force_and_why_another_is_not() {
    let etcd = Etcd::start("fleet-told");
    etcd.grant("db7", "rules/billing");
    let mut net = host("fleet-told-db", &etcd);
    net.watch(&[]);
    net.start();
    let before = wait_until_written(&etcd, |it| it.state.name() == "missing");
    assert_eq!(before.databases["orders"].enforced, None);
    assert_eq!(Some(before.boot), etcd.text_of("alive/db7"));
    let good = put(&etcd, &document(&[A]));
    let status = wait_until_written(&etcd, |it| it.enforced == good);
    let orders = &status.databases["orders"];
    assert_eq!((orders.seen, orders.rules, &orders.error), (good, 1, &None));
    assert_eq!(orders.state.name(), "active");
    let local = net.agent_json(&["status"])["fleet"].clone();
    assert_eq!(local["documents"][0]["sha256"], json!(orders.sha256));
    assert!(orders.enforced_ms.is_some_and(|it| it > 0.0), "{orders:?}");
    let bounds = orders.bounds.as_ref().unwrap();
    assert_eq!((bounds.widest.concat(), bounds.floor), ("/24/64".into(), 1));
    assert_eq!(bounds.within.len(), 2);
    assert_eq!(status.databases["billing"].state.name(), "missing");
    net.agent_text(&["allow", "orders", B, "--for", "1h"]);
    wait_until_written(&etcd, |it| it.temporary == 1);
    // Refused: with its line, and the last good one stays.
    let bad = put(&etcd, &document(&[A, "192.0.2.0/24"]));
    let status = wait_until_written(&etcd, |it| it.seen == bad);
    let orders = &status.databases["orders"];
    assert_eq!((orders.enforced, orders.state.name()), (good, "refused"));
    let error = orders.error.clone().unwrap();
    assert!(error.contains("line 3"), "{error}");
    // The kernel refuses every further write to this map.
    let pin = net.bpffs().join(format!("filter-agent/v{LAYOUT}/ALLOWED4"));
    let mut freeze = Command::new("bpftool");
    succeed(freeze.args(["map", "freeze", "pinned"]).arg(pin));
    put(&etcd, &document(&[A, "198.51.100.64/26"]));
    let not_taken = |it: &DatabaseStatus| {
        let error = it.error.as_deref().unwrap_or_default();
        error.contains("enforce the fleet's rules")
    };
    let status = wait_until_written(&etcd, not_taken);
    assert_eq!(status.databases["orders"].enforced, good);
}

#[test]
fn host_that_died_is_no_longer_alive_and_one_that_restarts_is_at_once() {
    let etcd = Etcd::start("fleet-dead");
    etcd.grant("db7", "rules/billing");
    let mut net = host("fleet-dead-db", &etcd);
    net.watch(&[]);
    net.start();
    let good = put(&etcd, &document(&[A]));
    let status = wait_until_written(&etcd, |it| it.enforced == good);
    assert_eq!(etcd.text_of("alive/db7"), Some(status.boot.clone()));
    let created = etcd.created_at("alive/db7");
    let (alive, told) = (etcd.revision_of("alive/db7"), etcd.revision_of("hosts/db7"));
    net.kill();
    net.start();
    // Under a lease of its own, before the other one's ended, and the key with it.
    assert!(wait_until(|| etcd.revision_of("hosts/db7") > told));
    assert!(etcd.revision_of("alive/db7") > alive);
    assert_eq!(etcd.created_at("alive/db7"), created);
    assert_eq!(etcd.text_of("alive/db7"), Some(status.boot.clone()));
    // Its lease is renewed.
    let mut before = etcd.time_left("alive/db7");
    let mut is_renewed = || {
        let now = etcd.time_left("alive/db7");
        std::mem::replace(&mut before, now) < now
    };
    assert!(wait_until(&mut is_renewed));
    net.kill();
    assert!(wait_until(|| etcd.text_of("alive/db7").is_none()));
    assert_eq!(written(&etcd).unwrap().databases["orders"].enforced, good);
}

#[test]
fn second_host_of_a_name_says_so_writes_nothing_and_enforces() {
    let etcd = Etcd::start("fleet-twins");
    etcd.grant("db7", "rules/billing");
    let mut first = host("fleet-twin1", &etcd);
    first.watch(&[]);
    first.start();
    let good = put(&etcd, &document(&[A]));
    let status = wait_until_written(&etcd, |it| it.enforced == good);
    let mut second = Net::new("fleet-twin2");
    etcd.attach_as(&second.db, 11);
    second.write_policy(&text(&etcd, "within: [203.0.113.0/24]"));
    second.watch(&[]);
    second.start();
    let taken = "fleet: another host of the fleet has the name db7";
    let says_so = || {
        lines(&second, "errors")
            .iter()
            .any(|it| it.starts_with(taken))
    };
    assert!(wait_until(says_so), "{:?}", lines(&second, "errors"));
    // It follows and enforces; what is written is the first one's.
    let other = put(&etcd, &document(&[B]));
    wait_for(&first, &etcd, "orders");
    wait_for(&second, &etcd, "orders");
    let after = wait_until_written(&etcd, |it| it.enforced == other);
    assert_eq!(after.boot, status.boot);
    assert_eq!(
        after.databases["orders"].bounds,
        status.databases["orders"].bounds
    );
    assert_eq!(lines(&first, "errors"), [""; 0]);
    // Once the first one is gone the name is free.
    first.kill();
    let after = wait_until_written(&etcd, |it| it.bounds.as_ref().unwrap().within.len() == 1);
    assert_ne!(after.boot, status.boot);
    assert!(wait_until(|| lines(&second, "errors").is_empty()));
}

#[test]
fn host_without_the_right_to_its_keys_warns_and_enforces() {
    let etcd = Etcd::start("fleet-keyless");
    etcd.grant("db7", "rules/billing");
    let mut net = host("fleet-keyless-db", &etcd);
    etcd.revoke_own(USER, "db7");
    let _echo = net.echo(PORT);
    net.watch(&[]);
    net.start();
    put(&etcd, &document(&[A]));
    wait_for(&net, &etcd, "orders");
    assert!(connects(&net, DENIED4.into(), PORT) && connects(&net, FLOOR, PORT));
    let warned = || lines(&net, "warnings");
    assert!(wait_until(|| !warned().is_empty()));
    let warning = warned().concat();
    assert!(
        warning.contains("/filter-agent/v1/alive/db7: "),
        "{warning}"
    );
    assert!(warning.contains("permission denied"), "{warning}");
    assert_eq!(lines(&net, "errors"), [""; 0]);
    put(&etcd, &document(&[A, B]));
    wait_for(&net, &etcd, "orders");
    assert_eq!(written(&etcd), None);
    // Once it may, it does.
    etcd.grant_own(USER, "db7");
    wait_until_written(&etcd, |it| it.rules == 2);
    assert!(wait_until(|| warned().is_empty()), "{:?}", warned());
}

#[test]
fn what_changes_without_etcd_is_written_once_it_is_back() {
    let etcd = Etcd::start("fleet-untold");
    etcd.grant("db7", "rules/billing");
    let mut net = host("fleet-untold-db", &etcd);
    let _echo = net.echo(PORT);
    net.watch(&[]);
    net.start();
    let good = put(&etcd, &document(&[A]));
    wait_until_written(&etcd, |it| it.enforced == good);
    let snapshot = etcd.snapshot();
    let allowed = Hammer::allowed(
        &net.client,
        &[(FLOOR, (filter_tests::net::DB4, PORT).into())],
    );
    etcd.kill(0);
    net.agent_text(&["allow", "orders", B, "--for", "1h"]);
    etcd.run(0);
    etcd.wait_until_healthy();
    wait_until_written(&etcd, |it| it.temporary == 1 && it.enforced == good);
    // The same is written again as well: a restored etcd may have lost it.
    etcd.delete("hosts/db7");
    etcd.kill(0);
    etcd.run(0);
    etcd.wait_until_healthy();
    wait_until_written(&etcd, |it| it.temporary == 1 && it.enforced == good);
    // Restored from before: the host reports what it holds.
    etcd.put("rules/orders", &document(&[B]));
    wait_for(&net, &etcd, "orders");
    etcd.restore(&snapshot);
    let status = wait_until_written(&etcd, |it| it.state.name() == "held");
    assert!(status.databases["orders"].error.is_some());
    assert!(wait_until(
        || etcd.text_of("alive/db7") == Some(status.boot.clone())
    ));
    assert!(allowed.attempts() > 0);
    allowed.stop();
}
