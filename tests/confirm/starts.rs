//! Agents that are killed, stopped or rebooted while a policy is tried, and what the next start enforces.

use std::{fs, path::Path, thread};

use filter_tests::{
    net::{ALLOWED4, Connection, DENIED4, Net, wait_until},
    records::rewrite,
};
use serde_json::{Value, json};

use crate::host::{
    AFTER, BEFORE, BOTH, DB, OTHER, PORT, after, assert_abandoned, assert_allowed, before,
    confirmed_text, end_window, enforcing, errors, kept, orders, reboot, try_policy,
    wait_for_fall_back, window_path,
};

fn window(net: &Net) -> Value {
    net.agent_json(&["status"])["window"].clone()
}

#[test]
fn window_goes_on_over_restarts_whatever_the_file_says() {
    let mut net = enforcing("confirm-restart");
    let _echo = net.echo(PORT);
    let id = try_policy(&net, &after(), "10m");
    let ends: [fn(&mut Net); 2] = [Net::kill, Net::terminate];
    for text in [after(), before(), orders(&[OTHER]), "databases: 7".into()] {
        for end in ends {
            end(&mut net);
            net.write_policy(&text);
            net.start();
            let window = window(&net);
            assert_eq!(window["id"], id, "{window}");
            assert!(window["left"].as_u64().unwrap() <= 600);
            assert_allowed(&net, false, true);
            assert_eq!(confirmed_text(&net), before());
        }
    }
    let error = net.agent_error(&["reload"]);
    assert!(
        error.contains(&format!("filter-agent confirm {id}")),
        "{error}"
    );
    net.agent_text(&["confirm", &id.to_string()]);
    assert_eq!(confirmed_text(&net), after());
    // The file is not what was confirmed.
    net.kill();
    net.start();
    assert_allowed(&net, false, true);
    assert!(errors(&net).contains("databases"));
}

#[test]
fn agent_that_is_killed_falls_back_when_its_successor_finds_the_time_over() {
    let mut net = enforcing("confirm-killed");
    let _echo = net.echo(PORT);
    let id = try_policy(&net, &after(), "10m");
    net.kill();
    // The kernel goes on with what is tried.
    let attempts = [ALLOWED4, DENIED4].map(|source| (source.into(), DB));
    let found = net.connect_all(&attempts);
    assert_eq!(found, [Connection::Silence, Connection::Accepted]);
    end_window(&net);
    net.start();
    assert_allowed(&net, true, false);
    assert_abandoned(&net, &format!("change {id} fell back"));
    let error = net.agent_error(&["confirm", &id.to_string()]);
    assert!(error.contains("fell back at"), "{error}");
    assert!(wait_until(|| kept(&net)["open"].is_null()));
    assert_eq!(confirmed_text(&net), before());
    // Nor at the next start.
    net.kill();
    net.start();
    assert_allowed(&net, true, false);
    assert_abandoned(&net, "fell back");
    // The file is edited.
    net.kill();
    net.write_policy(&orders(&[OTHER, BOTH]));
    net.start();
    assert_eq!(errors(&net), "");
    assert!(wait_until(|| confirmed_text(&net) == orders(&[OTHER, BOTH])));
}

#[test]
fn agent_that_restarts_before_the_end_falls_back_at_the_end() {
    let mut net = enforcing("confirm-short");
    let _echo = net.echo(PORT);
    try_policy(&net, &after(), "8s");
    net.kill();
    net.start();
    wait_for_fall_back(&net);
    assert_allowed(&net, true, false);
    assert_abandoned(&net, "fell back");
}

#[test]
fn reboot_ends_a_window() {
    let mut net = enforcing("confirm-reboot");
    let _echo = net.echo(PORT);
    net.agent_text(&["allow", "orders", OTHER, "--for", "2h"]);
    let id = try_policy(&net, &after(), "10m");
    net.agent_text(&["revoke", "orders", OTHER]);
    net.kill();
    reboot(&net);
    net.start();
    assert_allowed(&net, true, false);
    assert_abandoned(&net, &format!("change {id} fell back"));
    let rules = net.agent_json(&["rules"])["rules"].clone();
    let rules = rules.as_array().unwrap().clone();
    assert!(
        rules.iter().all(|rule| rule["origin"] == "file"),
        "{rules:?}"
    );
}

/// The set of the tried policy has the place of the other one on disk.
#[test]
fn region_to_which_the_tried_policy_gives_another_source_comes_back_from_disk() {
    let mut net = enforcing("confirm-source");
    let _echo = net.echo(PORT);
    let [first, second] = ["first.txt", "second.txt"].map(|name| net.dir().join(name));
    fs::write(&first, BEFORE).unwrap();
    fs::write(&second, AFTER).unwrap();
    let with = |list: &Path| {
        let region = format!("regions: {{office: {{file: {}}}}}\n", list.display());
        orders(&[BOTH]).replace("rules: [", "rules: [{region: office}, ") + &region
    };
    net.reload(&with(&first));
    try_policy(&net, &with(&second), "10m");
    net.kill();
    fs::remove_file(&first).unwrap();
    net.start();
    assert_allowed(&net, false, true);
    net.kill();
    end_window(&net);
    net.start();
    assert_allowed(&net, true, false);
    // It is on disk under its name again.
    net.kill();
    net.start();
    assert_allowed(&net, true, false);
}

#[test]
fn window_lasts_in_boot_time_whatever_the_clock_says() {
    let mut net = enforcing("confirm-clock");
    let _echo = net.echo(PORT);
    try_policy(&net, &after(), "10m");
    for date in ["2020-01-01T00:00:00Z", "2040-01-01T00:00:00Z"] {
        net.kill();
        rewrite(&window_path(&net), |kept| {
            kept["open"]["opened"] = json!(date);
            kept["open"]["before"]["clock"] = json!(date);
        });
        net.start();
        assert!(window(&net)["left"].as_u64().unwrap() > 60);
        assert_allowed(&net, false, true);
    }
}

#[test]
fn damaged_record_means_the_confirmed_policy() {
    let mut net = enforcing("confirm-damaged");
    let _echo = net.echo(PORT);
    try_policy(&net, &after(), "10m");
    net.kill();
    fs::write(window_path(&net), "{").unwrap();
    net.start();
    assert_allowed(&net, true, false);
    let found = errors(&net);
    assert!(found.contains("window.json is ignored"), "{found}");
    net.agent_text(&["reload"]);
    assert_eq!(errors(&net), "");
    assert_allowed(&net, false, true);
    net.kill();
    net.start();
    assert_eq!(errors(&net), "");
}

#[test]
fn policy_that_was_confirmed_stays_though_its_window_is_still_on_disk() {
    let mut net = enforcing("confirm-between");
    let _echo = net.echo(PORT);
    try_policy(&net, &after(), "10m");
    let open = fs::read(window_path(&net)).unwrap();
    net.agent_text(&["confirm"]);
    net.kill();
    fs::write(window_path(&net), open).unwrap();
    net.start();
    assert_allowed(&net, false, true);
    assert_eq!(window(&net), Value::Null);
    assert_eq!(errors(&net), "");
    assert!(wait_until(|| kept(&net).is_null()));
}

#[test]
fn one_of_two_operators_tries_a_policy_and_the_other_one_learns_it() {
    let net = enforcing("confirm-two");
    net.write_policy(&after());
    let commands = [0; 6].map(|_| net.agent_command(&["reload", "--confirm", "10m", "--json"]));
    let outputs = thread::scope(|scope| {
        let run = |mut command: std::process::Command| {
            let host = &net.db;
            scope.spawn(move || host.output(&mut command))
        };
        let running = commands.map(run);
        running.map(|running| running.join().unwrap())
    });
    let (done, refused): (Vec<_>, Vec<_>) = outputs
        .into_iter()
        .partition(|output| output.status.success());
    assert_eq!(done.len(), 1);
    let reloaded: Value = serde_json::from_slice(&done[0].stdout).unwrap();
    let id = &reloaded["window"]["id"];
    for output in refused {
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(
            error.contains(&format!("change {id} is tried until")),
            "{error}"
        );
        assert!(error.contains("by uid 0"), "{error}");
    }
}
