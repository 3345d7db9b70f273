//! A full disk: what is done is in force, and who asked for it learns that it is not kept.

use filter_tests::{
    mounts::{Mounted, SmallDisk},
    net::{ALLOWED4, Connection, DENIED4, Net, Protected, wait_until},
};
use serde_json::{Value, json};

use crate::host::{ALLOWED, DENIED, MEMBER, PORT, connect_all, kept_sources, orders, sources};

/// A change that is in force and not kept: exit 1, and its answer.
#[track_caller]
fn not_kept(net: &Net, arguments: &[&str]) -> Value {
    let output = net.agent(&[arguments, &["--json"]].concat());
    assert_eq!(output.status.code(), Some(1), "{arguments:?}");
    let done: Value = serde_json::from_slice(&output.stdout).unwrap();
    let errors = done["errors"].to_string();
    assert!(
        errors.contains("not kept") && errors.contains("No space left"),
        "{errors}"
    );
    let status = net.agent_json(&["status"]);
    let said = format!("{}{}", status["errors"], status["warnings"]);
    assert!(
        said.contains("temporary rules and ends are not kept"),
        "{status}"
    );
    done
}

#[test]
fn change_on_a_full_disk_is_in_force_and_kept_when_there_is_room() {
    let mut net = Net::new("temporary-disk");
    let disk = SmallDisk::new(net.state_dir());
    let _echo = net.echo(PORT);
    net.write_policy(&orders(&[ALLOWED], ""));
    net.start();
    net.wait_until_confirmed();
    net.watch(&[Protected::tcp(PORT, &[ALLOWED, DENIED])]);
    let all = || connect_all(&net, &[ALLOWED4, DENIED4]);

    disk.fill();
    not_kept(&net, &["allow", "orders", DENIED, "--for", "2h"]);
    assert_eq!(all(), [Connection::Accepted; 2]);
    assert_eq!(kept_sources(&net), Vec::<String>::new());
    // For people.
    let output = net.agent(&["block", "orders", ALLOWED, "--for", "2h"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("203.0.113.10/32 blocked until"), "{text}");
    assert!(
        text.contains("error: ") && text.contains("not kept"),
        "{text}"
    );
    assert_eq!(all(), [Connection::Silence, Connection::Accepted]);
    disk.make_room();
    // The next change writes all.
    net.agent_text(&["allow", "orders", MEMBER, "--for", "2h"]);
    assert_eq!(kept_sources(&net), [DENIED, ALLOWED, MEMBER]);
    let status = net.agent_json(&["status"]);
    assert_eq!(
        (&status["errors"], &status["warnings"]),
        (&json!([]), &json!([]))
    );

    disk.fill();
    not_kept(&net, &["revoke", "orders", MEMBER]);
    not_kept(&net, &["revoke", "orders", ALLOWED]);
    assert_eq!(sources(&net), [DENIED]);
    assert_eq!(all(), [Connection::Accepted; 2]);
    // The old record is whole.
    assert_eq!(kept_sources(&net), [DENIED, ALLOWED, MEMBER]);
    // With nothing left there is nothing to write.
    net.agent_text(&["revoke", "orders", DENIED]);
    assert_eq!(kept_sources(&net), Vec::<String>::new());
    // The history may need more room than that freed.
    let status = net.agent_json(&["status"]);
    let said = format!("{}{}", status["errors"], status["warnings"]);
    assert!(!said.contains("temporary rules and ends"), "{status}");
    disk.make_room();
    net.terminate();
    drop(disk);
}

#[test]
fn agent_that_stops_keeps_what_it_could_not_before_and_the_kernel_what_it_cannot() {
    let mut net = Net::new("temporary-disk-end");
    let disk = SmallDisk::new(net.state_dir());
    net.write_policy(&orders(&[ALLOWED], ""));
    net.start();
    net.wait_until_confirmed();
    disk.fill();
    not_kept(&net, &["block", "orders", ALLOWED, "--for", "2h"]);
    // Killed on a full disk: the kernel holds it.
    net.kill();
    net.start();
    assert_eq!(sources(&net), [ALLOWED]);
    net.wait_for_line("warning: temporary rules and ends are not kept");
    disk.make_room();
    net.terminate();
    assert_eq!(kept_sources(&net), [ALLOWED]);
    // A stop on a full disk.
    net.start();
    disk.fill();
    not_kept(&net, &["allow", "orders", DENIED, "--for", "2h"]);
    net.terminate();
    net.start();
    assert_eq!(sources(&net), [ALLOWED, DENIED]);
    disk.make_room();
    net.agent_text(&["revoke", "orders", ALLOWED]);
    assert!(wait_until(|| kept_sources(&net) == [DENIED]));
    net.terminate();
    drop(disk);
}

#[test]
fn disk_that_hangs_is_not_waited_for() {
    let mut net = Net::enforcing("temporary-hang", &[], &orders(&[ALLOWED], ""));
    let _echo = net.echo(PORT);
    net.wait_until_confirmed();
    let place = net.state_dir();
    let hanging = Mounted::hanging(&place);
    let output = net.agent(&["allow", "orders", DENIED, "--for", "2h", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let done: Value = serde_json::from_slice(&output.stdout).unwrap();
    let errors = done["errors"].to_string();
    assert!(errors.contains("the disk takes too long"), "{errors}");
    let all = connect_all(&net, &[ALLOWED4, DENIED4]);
    assert_eq!(all, [Connection::Accepted; 2]);
    drop(hanging);
    net.agent_text(&["block", "orders", ALLOWED, "--for", "2h"]);
    assert_eq!(kept_sources(&net), [DENIED, ALLOWED]);
    net.terminate();
}
