//! What is kept, how much of it, and over what.

use std::{
    env,
    fs::{self, OpenOptions},
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
};

use filter_tests::net::{Net, wait_until};
use serde_json::{Value, json};

use crate::host::{ALLOWED, allow, changes, ids, orders, post};

/// Changes of temporary rules, and policies, that are kept.
const MAX_OTHERS: u64 = 1000;
const MAX_POLICIES: usize = 20;

fn text(number: usize) -> String {
    format!("{}# {number}\n", orders(&[&format!("192.0.2.{number}/32")]))
}

#[test]
fn last_policies_and_changes_are_kept_over_a_restart_and_kill() {
    let mut net = Net::new("history-bounds");
    net.write_policy(&text(0));
    net.start();
    for number in 1..=MAX_POLICIES {
        net.write_policy(&text(number));
        assert_eq!(net.agent_json(&["reload"])["id"], number as u64 + 1);
    }
    let source = "198.51.100.7";
    let revoke = json!({ "revoke": { "database": "orders", "source": source } });
    let first = MAX_POLICIES as u64 + 2;
    // More than are kept takes minutes; the bound has a test of its own beside the code.
    let made = if env::var_os("FILTER_TESTS_FULL").is_some() {
        MAX_OTHERS + 1
    } else {
        40
    };
    let last = first + made - 1;
    for id in first..=last {
        let done = match (id - first) % 2 {
            0 => allow(&net, source),
            _ => post(&net, &revoke),
        };
        assert_eq!(done, id);
    }
    // The first policy is gone, and changes of temporary rules beyond those that are kept.
    let oldest = first.max(last + 1 - MAX_OTHERS.min(made));
    let expected: Vec<u64> = (oldest..=last).rev().chain((2..first).rev()).collect();
    let before = changes(&net);
    assert_eq!(ids(&before), expected);
    let gone = net.agent_error(&["history", "1"]);
    assert!(
        gone.contains("change 1 is not kept: the last 20 policies are"),
        "{gone}"
    );
    assert_eq!(net.agent_text(&["history", "2", "--text"]), text(1));
    let texts = || {
        fs::read_dir(net.state_dir().join("policies"))
            .unwrap()
            .count()
    };
    assert_eq!(texts(), MAX_POLICIES);

    // Whoever was answered finds it again, at once after.
    net.kill();
    let kept = net.agent_json(&["history"]);
    assert_eq!(kept["changes"], json!(before));
    net.start();
    assert_eq!(changes(&net), before);
    net.terminate();
    net.start();
    assert_eq!(changes(&net), before);
    assert_eq!(allow(&net, "198.51.100.8"), last + 1);
    net.terminate();
    // For root alone.
    let directory = net.state_dir();
    for name in ["history.json", "changes.json", "change-id", "policies"] {
        let mode = fs::metadata(directory.join(name))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o077, 0, "{name}");
    }
}

#[test]
fn history_is_read_without_an_agent_which_is_said() {
    let mut net = Net::enforcing("history-no-agent", &[], &orders(&[ALLOWED]));
    net.write_policy(&orders(&["192.0.2.1/32"]));
    net.agent_text(&["reload"]);
    allow(&net, "198.51.100.7");
    let running = net.agent(&["history"]);
    net.terminate();
    let stopped = net.agent(&["history"]);
    assert_eq!(stopped.stdout, running.stdout);
    let said = String::from_utf8(stopped.stderr).unwrap();
    let expected = format!(
        "filter-agent: no agent runs: this is what is kept in {}\n",
        net.state_dir().display()
    );
    assert_eq!(said, expected);
    assert_eq!(running.stderr, b"");
    assert_eq!(
        net.agent_text(&["history", "2", "--text"]),
        orders(&["192.0.2.1/32"])
    );
    let error = net.agent(&["history", "9"]);
    assert_eq!(error.status.code(), Some(1));
    // Somebody else may not, whatever the modes on the way are.
    let mut other = std::process::Command::new("setpriv");
    other.args([
        "--reuid",
        "65534",
        "--clear-groups",
        "--regid",
        "65534",
        "--",
    ]);
    let history = net.agent_command(&["history"]);
    other.arg(history.get_program()).args(history.get_args());
    let refused = net.db.output(other.current_dir("/"));
    assert_eq!(refused.status.code(), Some(1));
    assert_eq!(refused.stdout, b"");
    fs::remove_dir_all(net.state_dir()).unwrap();
    let nothing = net.agent_error(&["history"]);
    assert!(nothing.contains("no agent runs"), "{nothing}");
}

/// Each record by itself: what cannot be read takes nothing from the others, and stops no start.
#[test]
fn damaged_record_is_said_and_set_aside_and_stops_no_start() {
    let mut net = Net::enforcing("history-damaged", &[], &orders(&[ALLOWED]));
    for number in [1, 2] {
        net.write_policy(&text(number));
        net.agent_text(&["reload"]);
    }
    allow(&net, "198.51.100.7");
    net.terminate();
    let directory = net.state_dir();
    // A start whose policy the history does not know any more puts it in force anew.
    for (name, found, next) in [
        ("changes.json", vec![3, 2, 1], 5),
        ("history.json", vec![6, 5], 7),
        ("change-id", vec![7, 6, 5], 8),
    ] {
        let path = directory.join(name);
        let text = fs::read(&path).unwrap();
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"x").unwrap();
        // Without an agent.
        let output = net.agent(&["history"]);
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8(output.stderr).unwrap();
        let damaged = format!("{} is ignored: it is damaged", path.display());
        assert!(said.contains(&damaged), "{said}");
        assert!(path.exists());
        net.start();
        let aside = format!("{}.damaged", path.display());
        net.wait_for_line(&format!("warning: {damaged}"));
        assert_eq!(fs::read(&aside).unwrap(), [&text[..], b"x"].concat());
        let status = net.agent_json(&["status"]);
        assert!(status["warnings"].to_string().contains(&aside), "{status}");
        assert_eq!(ids(&changes(&net)), found, "{name}");
        assert_eq!(allow(&net, &format!("198.51.100.{next}")), next, "{name}");
        net.agent_json(&["reload"]);
        let status = net.agent_json(&["status"]);
        assert_eq!(status["warnings"], json!([]), "{name}");
        net.terminate();
    }

    // A text that is not that of its hash is not enforced again.
    net.start();
    let policy = changes(&net)
        .into_iter()
        .find(|past| past["kind"] == "policy")
        .unwrap();
    let hash = policy["hash"].as_str().unwrap().to_owned();
    net.terminate();
    let path = directory.join(format!("policies/{hash}.yaml"));
    fs::write(&path, "databases: []\n").unwrap();
    net.write_policy(&orders(&["192.0.2.77/32"]));
    net.start();
    net.wait_for_line(&format!("warning: {}", path.display()));
    let id = policy["id"].to_string();
    let error = net.agent_error(&["history", &id, "--text"]);
    assert!(error.contains("is not kept any more"), "{error}");
    net.terminate();
}

/// A record of another machine tells who changed what there.
#[test]
fn history_of_another_machine_is_set_aside() {
    let mut net = Net::enforcing("history-foreign", &[], &orders(&[ALLOWED]));
    net.wait_until_confirmed();
    allow(&net, "198.51.100.7");
    net.agent_text(&["status"]);
    net.kill();
    filter_tests::records::rewrite(&net.state_dir().join("confirmed.json"), |kept| {
        kept["machine"] = json!("0".repeat(32));
    });
    net.watch(&[]);
    fs::remove_dir_all(net.bpffs().join("filter-agent")).unwrap();
    net.assert_detached("eth0");
    net.start();
    let aside = net.state_dir().join("changes.json.damaged");
    assert!(wait_until(|| aside.exists()));
    let listed: Vec<Value> = changes(&net);
    assert_eq!(ids(&listed), [1]);
    net.terminate();
}
