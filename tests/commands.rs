//! Commands where the agent is stopped, cannot see a file, or runs with less than root has.

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::fs::{PermissionsExt as _, chown},
    process::{Command, Stdio},
    time::Instant,
};

use filter_tests::net::{Net, agent_binary, dedicated, policy, wait, wait_until};
use nix::sys::signal::Signal;

fn with(allowed: &[&str]) -> String {
    policy("eth0", "auto", &[dedicated("orders", 5432, allowed, "")])
}

#[test]
fn plan_reads_the_file_itself_even_a_pipe_or_a_long_one() {
    let mut net = Net::new("plan-text");
    net.write_policy(&with(&["203.0.113.10/32"]));
    net.start();
    // The agent's own standard input is empty. Longer than what HTTP servers take unless they are told to.
    let mut text = with(&["203.0.113.10/32", "198.51.100.0/24"]);
    text.push_str(&"# a long comment\n".repeat(200_000));
    let plan = |text: &str| {
        let mut command = net.agent_command(&["plan", "/dev/stdin"]);
        let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = net.db.run(|| pipes.stderr(Stdio::piped()).spawn().unwrap());
        let mut input = child.stdin.take().unwrap();
        input.write_all(text.as_bytes()).unwrap();
        drop(input);
        child.wait_with_output().unwrap()
    };
    let output = plan(&text);
    let printed = String::from_utf8(output.stdout).unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{error}");
    let rule = "+ database orders: rule 198.51.100.0/24";
    assert_eq!(
        printed,
        format!("database orders\n  + 198.51.100.0/24\n{rule}\n")
    );
    // Fault D7: what no packet shows is a difference too.
    let output = plan(&with(&["203.0.113.10/32"]).replace("mode: auto", "mode: generic"));
    let error = String::from_utf8(output.stderr).unwrap();
    let expected = "changing the mode would open it for a moment: run `filter-agent detach` first";
    assert!(error.contains(expected), "{error}");
    let labelled = "{cidr: 203.0.113.10/32, label: office, expires: 2100-01-01T00:00:00Z}";
    let output = plan(&with(&[]).replace("rules: []", &format!("rules: [{labelled}]")));
    let printed = String::from_utf8(output.stdout).unwrap();
    let expected = "~ database orders: rule 203.0.113.10/32: nothing -> \"office\", until 2100-01-01T00:00:00Z\n";
    assert_eq!(printed, expected);
    let output = plan("interfaces: [eth0]\ndatabases: [{}]\n");
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        error.starts_with("filter-agent: /dev/stdin: line 2: "),
        "{error}"
    );
    let missing = net.agent_error(&["plan", "missing.yaml"]);
    assert!(
        missing.starts_with("filter-agent: read missing.yaml: "),
        "{missing}"
    );
    // Without a file it is the agent's own.
    assert!(net.agent_text(&["plan"]).starts_with("no difference"));
}

#[test]
fn members_of_a_cluster_have_labels_and_ends() {
    let mut net = Net::new("cluster-members");
    let replicas = net.dir().join("replicas.txt");
    fs::write(&replicas, "192.0.2.7/32\n").unwrap();
    let cluster = "cluster: [10.1.2.3/32, {cidr: 10.1.0.0/16, label: replicas, expires: 2100-01-01T00:00:00Z}, {region: replicas}]";
    let orders = dedicated("orders", 5432, &[], cluster);
    let regions = format!("regions: {{replicas: {{file: {}}}}}\n", replicas.display());
    net.write_policy(&(regions + &policy("eth0", "auto", &[orders])));
    net.start();
    let explain = |source: &str| net.agent_text(&["explain", source]);
    let text = explain("10.1.2.4");
    assert_eq!(
        text,
        "orders: 10.1.2.4 passes: allowed by cluster member 10.1.0.0/16 (replicas), until 2100-01-01T00:00:00Z\n"
    );
    for source in ["10.1.2.3", "192.0.2.7"] {
        let text = explain(source);
        assert_eq!(
            text,
            format!("orders: {source} passes: allowed by cluster\n")
        );
    }
    let rules = net.agent_json(&["rules"])["rules"].take();
    assert_eq!(rules[0]["source"], "cluster");
    assert_eq!(rules[0]["prefixes"], 2);
    assert_eq!(rules[1]["source"], "cluster member 10.1.0.0/16");
    assert_eq!(rules[1]["label"], "replicas");
    assert_eq!(rules[1]["expires"], "2100-01-01T00:00:00Z");
    assert_eq!(rules[1]["prefixes"], 1);
    // The region is followed.
    fs::write(&replicas, "192.0.2.8/32\n").unwrap();
    assert!(wait_until(
        || explain("192.0.2.8").contains("allowed by cluster")
    ));
}

#[test]
fn row_of_a_table_is_a_line_where_stdout_is_no_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("policy.yaml");
    let ports: Vec<String> = (1..=65535).map(|port| port.to_string()).collect();
    let rules: Vec<String> = (1..=30)
        .map(|i| format!("{{cidr: 198.51.100.{i}/32}}"))
        .collect();
    let text = format!(
        "interfaces: [eth0]
databases:
  - {{name: all, ports: [{}], protocol: udp, model: dedicated, rules: [{}]}}
",
        ports.join(", "),
        rules.join(", ")
    );
    fs::write(&path, text).unwrap();
    let output = Command::new(agent_binary())
        .arg("check")
        .arg(&path)
        .output()
        .unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    let rows: Vec<&str> = printed
        .lines()
        .filter(|line| line.contains("udp/"))
        .collect();
    assert_eq!(rows.len(), 1, "{printed}");
    assert!(rows[0].starts_with("all"), "{printed}");
    assert!(rows[0].contains(" udp/1-65535 "), "{printed}");
    assert!(rows[0].ends_with("198.51.100.30/32"), "{printed}");
}

#[test]
fn no_command_hangs_when_the_agent_is_stopped() {
    let mut net = Net::new("stopped");
    net.write_policy(&with(&["203.0.113.10/32"]));
    net.start();
    net.wait_until_confirmed();
    net.signal(Signal::SIGSTOP);
    let policy_path = net.policy_path();
    let policy_path = policy_path.to_str().unwrap();
    let socket = net.socket();
    for arguments in [
        &["status"][..],
        &["reload", "--timeout", "1s"],
        &["refresh", "--timeout", "1s"],
        &["plan", policy_path, "--timeout", "1s"],
    ] {
        let begun = Instant::now();
        let error = net.agent_error(arguments);
        println!("{arguments:?} after {:?}", begun.elapsed());
        let limit = if arguments == ["status"] { "10s" } else { "1s" };
        let expected = format!("no answer on {} within {limit}", socket.display());
        assert!(error.contains(&expected), "{arguments:?}: {error}");
        assert!(error.contains("systemctl status filter-agent"), "{error}");
    }
    // The pins need no agent.
    let enforced = net.agent_text(&["status", "--enforced"]);
    assert_eq!(enforced, "enforced on eth0, without an agent\n");
    net.signal(Signal::SIGCONT);
    net.agent_text(&["status"]);
    let usage = net.agent(&["reload", "--timeout", "soon"]);
    assert_eq!(usage.status.code(), Some(2));
}

#[test]
fn check_says_which_files_the_service_could_not_read() {
    let net = Net::new("unreadable");
    let file = net.dir().join("office.txt");
    let closed = net.dir().join("closed");
    let inside = closed.join("ca.pem");
    fs::write(&file, "192.0.2.0/24\n").unwrap();
    fs::create_dir(&closed).unwrap();
    fs::write(&inside, "").unwrap();
    net.write_policy(&format!(
        "interfaces: [eth0]
regions:
  office: {{file: {}}}
  list: {{url: 'https://lists.test/', ca_file: {}}}
databases:
  - {{name: orders, port: 5432, model: dedicated, force_tls: false, rules: [{{region: office}}]}}
",
        file.display(),
        inside.display()
    ));
    let mode = |path: &std::path::Path, owner: u32, mode: u32| {
        chown(path, Some(owner), Some(owner)).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    let warnings = || {
        let checked = net.agent(&["check", net.policy_path().to_str().unwrap(), "--json"]);
        assert_eq!(checked.status.code(), Some(0));
        let checked: serde_json::Value = serde_json::from_slice(&checked.stdout).unwrap();
        let warnings = checked["warnings"].as_array().unwrap().clone();
        let text = warnings
            .iter()
            .map(|warning| warning.as_str().unwrap().to_owned());
        text.filter(|warning| warning.contains("the service could not read"))
            .collect::<Vec<_>>()
    };
    mode(&file, 1234, 0o600);
    mode(&closed, 1234, 0o700);
    mode(&net.policy_path(), 1234, 0o640);
    let of = |path: &std::path::Path| format!("the service could not read {}: ", path.display());
    let expected = [
        format!(
            "{}owner 1234, group 1234, mode 0640",
            of(&net.policy_path())
        ),
        format!(
            "{}it may not search {} (owner 1234, group 1234, mode 0700)",
            of(&inside),
            closed.display()
        ),
        format!("{}owner 1234, group 1234, mode 0600", of(&file)),
    ];
    assert_eq!(warnings(), expected);
    // Readable to others, to root's group, or root's own.
    mode(&file, 1234, 0o604);
    mode(&closed, 0, 0o700);
    mode(&net.policy_path(), 0, 0o600);
    let hidden = [&inside, &file].map(|path| format!("{}its unit hides /tmp", of(path)));
    assert_eq!(warnings(), hidden);
}

/// A pipe that nobody writes to held up the command for good.
#[test]
fn plan_of_a_pipe_without_a_writer_ends() {
    let mut net = Net::new("pipe");
    net.write_policy(&policy(
        "eth0",
        "auto",
        &[dedicated("orders", 5432, &[], "")],
    ));
    net.start();
    let pipe = net.dir().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let pipe = pipe.to_str().unwrap();
    let mut command = net.agent_command(&["plan", "--timeout", "1s", pipe]);
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let mut plan = net.db.run(|| command.spawn().unwrap());
    let ended = wait(&mut plan);
    let _ = plan.kill();
    assert!(
        ended.is_some_and(|status| status.code() == Some(1)),
        "it does not end"
    );
    let mut error = String::new();
    plan.stderr.unwrap().read_to_string(&mut error).unwrap();
    assert!(
        error.contains(&format!("read {pipe}: no answer within 1 s")),
        "{error}"
    );
}

/// `println!` panics there: exit status 101, also of a change that was made.
#[test]
fn answer_that_cannot_be_written_is_a_failure_in_a_line() {
    let mut net = Net::new("full-stdout");
    net.write_policy(&with(&["203.0.113.10/32"]));
    net.start();
    let commands: [&[&str]; 4] = [
        &["allow", "orders", "198.51.100.7", "--for", "1h"],
        &["status"],
        &["rules", "--json"],
        &["plan"],
    ];
    for arguments in commands {
        let mut command = net.agent_command(arguments);
        command.stdout(fs::File::options().write(true).open("/dev/full").unwrap());
        let output = net.db.output(&mut command);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(
            error.contains("write the answer to stdout: No space left"),
            "{error}"
        );
    }
    assert_eq!(
        net.agent_json(&["rules"])["rules"][1]["origin"],
        "temporary"
    );
}
