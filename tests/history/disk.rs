//! A full disk: changes are made and answered, what is not kept is said, and written when there is room.

use std::fs;

use filter_tests::{
    mounts::SmallDisk,
    net::{ALLOWED4, Connection, DB4, DENIED4, Net, Protected, wait_until},
};
use serde_json::{Value, json};

use crate::host::{ALLOWED, PORT, allow, changes, ids, orders};

fn kept_ids(net: &Net, name: &str) -> Vec<u64> {
    let Ok(text) = fs::read_to_string(net.state_dir().join(name)) else {
        return Vec::new();
    };
    let record: Value = serde_json::from_str(&text).unwrap();
    ids(record["kept"].as_array().unwrap())
}

#[test]
fn full_disk_delays_no_change_is_said_and_made_up_for() {
    let mut net = Net::new("history-disk");
    let disk = SmallDisk::new(net.state_dir());
    let _echo = net.echo(PORT);
    net.write_policy(&orders(&[ALLOWED]));
    net.start();
    net.wait_until_confirmed();
    assert!(wait_until(|| kept_ids(&net, "history.json") == [1]));
    net.watch(&[Protected::tcp(PORT, &[ALLOWED, "198.51.100.0/24"])]);
    disk.fill();

    net.write_policy(&orders(&[ALLOWED, "198.51.100.0/24"]));
    let reloaded = net.agent_json(&["reload"]);
    assert_eq!(reloaded["id"], 2);
    let warnings = reloaded["plan"]["warnings"].to_string();
    assert!(
        warnings.contains("the history of policies is not kept: "),
        "{warnings}"
    );
    assert!(warnings.contains("No space left"), "{warnings}");
    assert_eq!(
        net.connect(DENIED4.into(), (DB4, PORT).into()),
        Connection::Accepted
    );
    let output = net.agent(&["block", "orders", ALLOWED, "--for", "1h", "--json"]);
    let blocked: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(blocked["id"], 3);
    let notes = blocked["notes"].to_string();
    assert!(
        notes.contains("the history of temporary rules is not kept: "),
        "{notes}"
    );
    assert_eq!(
        net.connect(ALLOWED4.into(), (DB4, PORT).into()),
        Connection::Silence
    );
    let status = net.agent_json(&["status"]);
    let said = status["warnings"].to_string();
    assert!(
        said.contains("the history of policies is not kept"),
        "{said}"
    );
    assert_eq!(kept_ids(&net, "history.json"), [1]);
    // The agent knows all the same.
    assert_eq!(ids(&changes(&net)), [3, 2, 1]);

    disk.make_room();
    assert!(wait_until(|| kept_ids(&net, "history.json") == [1, 2]));
    assert!(wait_until(|| kept_ids(&net, "changes.json") == [3]));
    let is_quiet = || {
        !net.agent_json(&["status"])["warnings"]
            .to_string()
            .contains("history")
    };
    assert!(wait_until(is_quiet));
    net.terminate();
    let begin = "warning: the history of policies is not kept";
    let lines = net
        .log
        .iter()
        .filter(|line| line.starts_with(begin))
        .count();
    assert_eq!(lines, 1, "{:#?}", net.log);
    let before = net.agent_json(&["history"]);
    assert_eq!(ids(before["changes"].as_array().unwrap()), [3, 2, 1]);
    drop(disk);
}

/// What could not be written is lost with the agent; its numbers are not given again.
#[test]
fn no_id_is_given_twice_over_a_restart_on_a_full_disk() {
    let mut net = Net::new("history-ids");
    let disk = SmallDisk::new(net.state_dir());
    net.write_policy(&orders(&[ALLOWED]));
    net.start();
    net.wait_until_confirmed();
    assert!(wait_until(|| kept_ids(&net, "history.json") == [1]));
    disk.fill();
    let mut given = vec![1];
    for round in 0..3 {
        for host in 0..3 {
            let output = net.agent(&[
                "allow",
                "orders",
                &format!("198.51.100.{}", 10 * round + host),
                "--for",
                "1h",
                "--json",
            ]);
            let done: Value = serde_json::from_slice(&output.stdout).unwrap();
            given.push(done["id"].as_u64().unwrap());
        }
        net.kill();
        net.start();
    }
    let mut sorted = given.clone();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(sorted, given);
    disk.make_room();
    let next = allow(&net, "198.51.100.99");
    assert!(next > *given.last().unwrap(), "{next}: {given:?}");
    assert_eq!(ids(&changes(&net))[0], next);
    net.terminate();
    assert_eq!(
        net.agent_json(&["history", &next.to_string()])["changes"][0]["action"],
        json!("allowed")
    );
    drop(disk);
}
