//! An etcd that is away, comes back, or comes back as it was before.

use std::{fs, process::Command};

use filter_agent::{
    etcd,
    fleet::{Found, News},
};
use filter_tests::net::PATIENCE;
use nix::sys::signal::Signal;
use tokio::sync::watch;

use crate::{
    certificates::Kind,
    etcd::{Etcd, endpoint},
    follower::{Follower, followed, text_of, value},
};

#[test]
fn host_that_was_away_finds_the_newest_after_a_compaction() {
    let (etcd, follower, before) = followed("fleet-compacted");
    etcd.cut(true);
    follower.lost();
    for n in 0..20 {
        etcd.put("rules/orders", n.to_string().as_bytes());
    }
    let revision = before.revision + 20;
    etcd.control(&["compact", &revision.to_string(), "--physical"]);
    etcd.control(&["defrag"]);
    etcd.cut(false);
    let answer = follower.found_again("orders", "19");
    assert_eq!(answer.revision, revision);
    etcd.put("rules/orders", b"two");
    follower.answer_with("orders", "two");
}

#[test]
fn connection_that_is_half_open_is_given_up() {
    let (etcd, follower, _) = followed("fleet-half-open");
    etcd.drop_packets(true);
    etcd.put("rules/orders", b"two");
    // By a ping: the next periodic read would not have been answered in time.
    let why = follower.lost();
    assert!(why.ends_with("the connection broke off"), "{why}");
    let why = follower.lost();
    assert!(why.ends_with("no connection within 2 s"), "{why}");
    etcd.drop_packets(false);
    follower.found_again("orders", "two");
}

#[test]
fn etcd_that_is_stopped_is_given_up_and_found_again() {
    let (etcd, follower, _) = followed("fleet-stopped");
    etcd.signal(0, Signal::SIGSTOP);
    follower.lost();
    // It takes connections still, by its kernel.
    let why = follower.lost();
    assert!(why.contains("within"), "{why}");
    etcd.signal(0, Signal::SIGCONT);
    etcd.put("rules/orders", b"two");
    follower.found_again("orders", "two");
}

#[test]
fn etcd_that_was_killed_is_found_again() {
    let (etcd, follower, before) = followed("fleet-killed");
    etcd.kill(0);
    follower.lost();
    let why = follower.lost();
    assert!(why.contains("refused"), "{why}");
    etcd.run(0);
    let after = follower.found_again("orders", "one");
    assert_eq!(value(&after, "orders"), value(&before, "orders"));
    etcd.put("rules/orders", b"two");
    follower.answer_with("orders", "two");
}

#[test]
fn restored_etcd_is_told_with_the_revision_that_it_went_back_to() {
    let etcd = Etcd::start("fleet-restored");
    etcd.put("rules/orders", b"one");
    let snapshot = etcd.snapshot();
    for n in 0..5 {
        etcd.put("rules/orders", n.to_string().as_bytes());
    }
    let follower = Follower::start(&etcd.host, etcd.settings(&["orders"]));
    let before = follower.answer_with("orders", "4");
    etcd.restore(&snapshot);
    let after = follower.found_again("orders", "one");
    assert_eq!(after.cluster, before.cluster, "the id tells nothing");
    assert!(after.revision < before.revision);
    // At revisions that were passed before: a watch that resumed there would be silent. A periodic read would find the
    // first of these, and then the connection would be given up.
    for text in ["two", "three"] {
        etcd.put("rules/orders", text.as_bytes());
        let answer = follower.answer_with("orders", text);
        assert!(answer.revision <= before.revision);
    }
}

/// The member that the host is connected to.
fn connected(etcd: &Etcd) -> usize {
    let mut command = Command::new("ss");
    command.args(["-Htn", "state", "established", "dport", "=", ":2379"]);
    let output = etcd.host.output(&mut command);
    let output = String::from_utf8(output.stdout).unwrap();
    let index = (0..3).find(|&index| {
        let place = endpoint(index).replace("https://", "");
        output.contains(&place)
    });
    index.unwrap_or_else(|| panic!("the host is connected to a member: {output}"))
}

#[test]
fn next_member_is_asked_and_one_without_a_leader_is_not_believed() {
    let etcd = Etcd::with_members("fleet-members", 3);
    etcd.put("rules/orders", b"one");
    let follower = Follower::start(&etcd.host, etcd.settings(&["orders"]));
    follower.answer_with("orders", "one");
    let first = connected(&etcd);
    etcd.kill(first);
    let why = follower.lost();
    assert!(why.starts_with(&endpoint(first)), "{why}");
    follower.found_again("orders", "one");
    let second = connected(&etcd);
    assert_ne!(second, first);
    etcd.put("rules/orders", b"two");
    follower.found_again("orders", "two");
    // The one that is left has no quorum.
    etcd.kill(3 - first - second);
    let why = follower.lost();
    assert!(
        why.starts_with(&endpoint(second)) && why.contains("no leader"),
        "{why}"
    );
    etcd.run(first);
    etcd.put("rules/orders", b"three");
    follower.found_again("orders", "three");
}

#[test]
fn replaced_certificate_is_used_by_a_new_connection() {
    let etcd = Etcd::start("fleet-renewed");
    etcd.put("rules/orders", b"one");
    etcd.put("rules/billing", b"two");
    etcd.control(&["user", "add", "db8", "--no-password"]);
    etcd.control(&["role", "add", "billing"]);
    etcd.control(&["user", "grant-role", "db8", "billing"]);
    etcd.grant("billing", "era");
    etcd.grant("billing", "rules/billing");
    let follower = Follower::start(&etcd.host, etcd.settings(&["billing", "orders"]));
    let answer = follower.answer();
    assert_eq!(text_of(&answer, "orders"), Some("one"));
    assert!(matches!(answer.documents["billing"], Found::Unreadable(_)));
    // Its user shows which one etcd saw.
    let other = etcd.authority.sign("db8", &[], Kind::Good);
    other.replace(&etcd.client);
    let answer = follower.answer_with("billing", "two");
    assert!(matches!(answer.documents["orders"], Found::Unreadable(_)));
}

#[test]
fn files_that_do_not_fit_are_named_and_read_again() {
    let etcd = Etcd::start("fleet-files");
    etcd.put("rules/orders", b"one");
    let key = fs::read(&etcd.client.key).unwrap();
    let stranger = etcd.authority.sign("db9", &[], Kind::Good);
    fs::copy(&stranger.key, &etcd.client.key).unwrap();
    let follower = Follower::start(&etcd.host, etcd.settings(&["orders"]));
    let why = follower.lost();
    let other = "the key in `key_file` is not that of the certificate in `cert_file`";
    assert!(why.ends_with(other), "{why}");
    let path = etcd.client.key.display().to_string();
    fs::write(&etcd.client.key, "").unwrap();
    let empty = format!("read {path}: it holds no private key in PEM");
    while !follower.lost().ends_with(&empty) {}
    fs::remove_file(&etcd.client.key).unwrap();
    let gone = format!("read {path}: No such file or directory (os error 2)");
    while !follower.lost().ends_with(&gone) {}
    fs::write(&etcd.client.key, key).unwrap();
    follower.found_again("orders", "one");
    // A connection that stands outlives its files.
    fs::remove_file(&etcd.client.key).unwrap();
    etcd.put("rules/orders", b"two");
    follower.answer_with("orders", "two");
    let lost = |news: &News| matches!(news, News::Lost(_));
    assert!(!follower.pending().iter().any(lost));
}

#[test]
fn nothing_is_told_after_the_end() {
    let etcd = Etcd::start("fleet-ended");
    let settings = etcd.settings(&["orders"]);
    etcd.host.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let (send, mut news) = tokio::sync::mpsc::unbounded_channel();
            let following = etcd::follow(settings, watch::channel(None).1, move |news| {
                send.send(news).unwrap()
            });
            assert!(matches!(news.recv().await, Some(News::Answer { .. })));
            drop(following);
            // The task that tells is gone.
            let ended = async { while news.recv().await.is_some() {} };
            tokio::time::timeout(PATIENCE, ended).await.unwrap();
        });
    });
}
