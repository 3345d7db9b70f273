//! `status --brief`: one line and an exit status for monitoring systems, with an agent and without one.

use std::{fs, process::Command};

use filter_tests::net::{Net, dedicated, policy};

/// Exit status and the one line.
fn brief(net: &Net, more: &[&str]) -> (i32, String) {
    let output = net.agent(&[&["status", "--brief"], more].concat());
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.lines().count(), 1, "{text:?}");
    assert!(output.stderr.is_empty());
    (output.status.code().unwrap(), text.trim_end().to_owned())
}

fn orders(net: &Net) -> String {
    let office = net.dir().join("office.txt");
    let orders = dedicated("orders", 5432, &["203.0.113.10/32"], "");
    let orders = orders.replace("rules: [", "rules: [{region: office}, ");
    let office = format!("office: {{file: {}}}", office.display());
    format!(
        "regions:\n  {office}\n{}",
        policy("eth0", "native", &[orders])
    )
}

#[test]
fn one_line_and_an_exit_status_say_how_it_is() {
    let mut net = Net::new("brief");
    let (status, line) = brief(&net, &[]);
    let never = "CRITICAL - no agent answers, and no confirmed policy is kept on this host";
    assert_eq!((status, line.as_str()), (2, never));

    let office = net.dir().join("office.txt");
    fs::write(&office, "192.0.2.0/25\n").unwrap();
    net.write_policy(&orders(&net));
    net.start();
    net.wait_until_confirmed();
    let ok = (
        0,
        "OK - enforced on eth0: 1 database and 2 prefixes".to_owned(),
    );
    assert_eq!(brief(&net, &[]), ok);
    assert_eq!(brief(&net, &["--verify"]), ok);

    fs::remove_file(&office).unwrap();
    net.wait_for_line("warning: region office");
    let (status, line) = brief(&net, &[]);
    assert!(
        status == 1 && line.starts_with("WARNING - region office: "),
        "{line}"
    );

    net.kill();
    let (status, line) = brief(&net, &[]);
    let without = "WARNING - the last policy stays in force on eth0, but no agent answers on ";
    assert!(status == 1 && line.starts_with(without), "{line}");

    // A BPF file system that cannot be looked at: neither enforced nor not.
    let mut unseen = Command::new(&net.binary);
    unseen
        .args(["status", "--brief", "--socket"])
        .arg(net.socket());
    unseen.arg("--state-dir").arg(net.state_dir());
    let output = net.db.output(unseen.arg("--bpffs").arg(net.policy_path()));
    let line = String::from_utf8(output.stdout).unwrap();
    assert!(line.starts_with("UNKNOWN - "), "{line}");
    assert_eq!(output.status.code(), Some(3));

    net.db.ip("link delete eth0");
    let (status, line) = brief(&net, &[]);
    assert!(
        status == 2 && line.starts_with("CRITICAL - no agent answers, and nothing is filtered: "),
        "{line}"
    );
    net.start();
    let (status, line) = brief(&net, &[]);
    assert!(status == 2 && line.starts_with("CRITICAL - "), "{line}");
}

#[test]
fn wrong_usage_is_unknown_and_not_critical() {
    let net = Net::new("brief-usage");
    for wrong in [
        &["--nonsense"][..],
        &["--json"],
        &["--socket"],
        &["--enforced"],
    ] {
        let mut command = Command::new(&net.binary);
        let output = command
            .args(["status", "--brief"])
            .args(wrong)
            .output()
            .unwrap();
        let line = String::from_utf8(output.stdout).unwrap();
        assert!(
            line.starts_with("UNKNOWN - ") && line.lines().count() == 1,
            "{wrong:?}: {line}"
        );
        assert_eq!(output.status.code(), Some(3), "{wrong:?}");
    }
}
