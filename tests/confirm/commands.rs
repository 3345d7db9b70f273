//! Commands that decide on a policy, and wrong uses of them.

use std::{fs, process::Output};

use filter_tests::net::Net;
use serde_json::{Value, json};

use crate::host::{
    OTHER, PORT, after, assert_abandoned, assert_allowed, before, confirmed_text, enforcing,
    errors, orders, try_policy,
};

fn usage(net: &Net, arguments: &[&str]) -> String {
    let Output { status, stderr, .. } = net.agent(arguments);
    let text = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(2), "{arguments:?}: {text}");
    text
}

#[test]
fn wrong_uses_change_nothing() {
    let net = enforcing("confirm-wrong");
    let _echo = net.echo(PORT);
    net.write_policy(&after());
    for lasting in ["0s", "500ms", "25h", "-1m", "soon"] {
        usage(&net, &["reload", &format!("--confirm={lasting}")]);
    }
    usage(&net, &["reload", "--confirm", "2m", "--existing"]);
    usage(&net, &["reload", "--if", "abc"]);
    usage(&net, &["confirm", "the last"]);
    for arguments in [
        &["confirm"][..],
        &["confirm", "--fall-back"],
        &["confirm", "7"],
    ] {
        let error = net.agent_error(arguments);
        assert!(error.contains("nothing is tried"), "{error}");
    }
    let error = net.agent_error(&["rollback"]);
    assert!(error.contains("no policy before"), "{error}");
    let error = net.agent_error(&["rollback", "99"]);
    assert!(error.contains("99"), "{error}");
    // A file that is refused opens no window.
    net.write_policy("databases: 7");
    net.agent_error(&["reload", "--confirm", "2m"]);
    net.write_policy("interfaces: [eth0]\ndatabases: []\n");
    let error = net.agent_error(&["reload", "--confirm", "2m"]);
    assert!(error.contains("--allow-unprotect"), "{error}");
    assert_eq!(net.agent_json(&["status"])["window"], Value::Null);
    assert_allowed(&net, true, false);
    let id = try_policy(&net, &after(), "10m");
    let error = net.agent_error(&["confirm", &(id + 1).to_string()]);
    assert!(
        error.contains(&format!("change {} is not tried", id + 1))
            && error.contains(&format!("change {id} is tried until")),
        "{error}"
    );
    assert_eq!(net.agent_json(&["status"])["window"]["id"], id);
    // SIGHUP cannot pass a flag, and has nobody who would see a message.
    net.hang_up();
    let mut net = net;
    net.wait_for_line("error: reload refused");
    assert_allowed(&net, false, true);
}

#[test]
fn plan_prints_the_hash_that_reload_goes_by() {
    let net = enforcing("confirm-if");
    net.write_policy(&after());
    let plan = net.agent_json(&["plan"]);
    let hash = plan["hash"].as_str().unwrap();
    let sum = std::process::Command::new("sha256sum")
        .arg(net.policy_path())
        .output()
        .unwrap();
    assert!(String::from_utf8(sum.stdout).unwrap().starts_with(hash));
    let text = net.agent_text(&["plan"]);
    assert!(
        text.contains(&format!("filter-agent reload --if {hash}")),
        "{text}"
    );
    net.write_policy(&orders(&[OTHER]));
    let error = net.agent_error(&["reload", "--if", hash]);
    assert!(
        error.contains("nothing is changed") && error.contains("is not the text that was meant"),
        "{error}"
    );
    assert_eq!(confirmed_text(&net), before());
    net.write_policy(&after());
    net.agent_text(&["reload", "--if", hash, "--confirm", "10m"]);
    net.agent_text(&["confirm"]);
    assert_eq!(confirmed_text(&net), after());
}

#[test]
fn rollback_enforces_a_policy_of_before_and_leaves_the_file_alone() {
    let mut net = enforcing("confirm-rollback");
    let _echo = net.echo(PORT);
    net.write_policy(&after());
    let second = net.agent_json(&["reload"])["id"].to_string();
    let text = net.agent_text(&["rollback"]);
    assert!(text.contains("- 198.51.100.7/32"), "{text}");
    assert_allowed(&net, true, false);
    assert_eq!(confirmed_text(&net), before());
    assert_eq!(fs::read_to_string(net.policy_path()).unwrap(), after());
    assert_abandoned(&net, "was rolled back");
    net.kill();
    net.start();
    assert_allowed(&net, true, false);
    assert_abandoned(&net, "was rolled back");
    net.agent_text(&["rollback", &second]);
    assert_allowed(&net, false, true);
    assert_eq!(errors(&net), "");
    // What it would leave unguarded has to be meant.
    net.write_policy("interfaces: [eth0]\ndatabases: []\n");
    let empty = net.agent_json(&["reload", "--allow-unprotect"])["id"].to_string();
    net.agent_text(&["rollback", &second]);
    let error = net.agent_error(&["rollback", &empty]);
    assert!(error.contains("--allow-unprotect"), "{error}");
    assert_allowed(&net, false, true);
    net.agent_text(&["rollback", &empty, "--allow-unprotect"]);
    assert_eq!(net.agent_json(&["status"])["databases"], json!([]));
}
