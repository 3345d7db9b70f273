//! Names that shells complete by asking the agent.

use std::{
    collections::BTreeSet,
    path::Path,
    process::{Command, Output},
};

use filter_agent::cli::COMPLETE;
use filter_tests::net::{
    ALLOWED4, Connection, DB4, DENIED4, Net, agent_binary, dedicated, policy, wait_until,
};
use nix::sys::signal::Signal;

/// The completions that bash offers for a line whose last word is being typed, and its other output.
fn bash(line: &[&str]) -> (BTreeSet<String>, Output) {
    let script = format!(
        "source <({COMPLETE}=bash {}); COMP_WORDS=(\"$@\"); COMP_CWORD=$(($# - 1)); COMP_TYPE=9; \
         _clap_complete_filter_agent filter-agent \"${{COMP_WORDS[COMP_CWORD]}}\"; printf '%s\\n' \"${{COMPREPLY[@]}}\"",
        agent_binary().display()
    );
    let mut command = Command::new("bash");
    let command = command.args(["-c", &script, "bash", "filter-agent"]);
    let output = command.args(line).output().unwrap();
    let offered = String::from_utf8(output.stdout.clone()).unwrap();
    let offered = offered.lines().filter(|line| !line.is_empty());
    (offered.map(str::to_owned).collect(), output)
}

/// The same at the socket of an agent: the values, without options.
#[track_caller]
fn offered(socket: &Path, words: &[&str], current: &str) -> BTreeSet<String> {
    let socket = socket.to_str().unwrap();
    let line = [&words[..1], &["--socket", socket], &words[1..], &[current]].concat();
    let (offered, output) = bash(&line);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(error, "", "{line:?}");
    let values = offered.into_iter().filter(|value| !value.starts_with('-'));
    values.collect()
}

fn set(values: &[&str]) -> BTreeSet<String> {
    values.iter().map(|&value| value.to_owned()).collect()
}

#[test]
fn names_come_from_the_agent_and_nothing_without_one() {
    let mut net = Net::new("completion");
    let socket = net.socket();
    let complete = |words: &[&str], current: &str| offered(&socket, words, current);
    // No agent yet.
    assert_eq!(complete(&["allow"], ""), set(&[]));
    let allowed = format!("{ALLOWED4}/32");
    let orders = dedicated("orders", 5432, &[&allowed], "");
    let orders = orders.replace("rules: [", "rules: [{region: office}, ");
    let stock = dedicated("stock", 5433, &["192.0.2.0/24"], "");
    let text = policy("eth0", "auto", &[orders, stock]);
    net.write_policy(&format!(
        "regions: {{office: {{prefixes: [198.51.100.200/32]}}}}\n{text}"
    ));
    net.start();
    for command in ["allow", "block", "revoke"] {
        assert_eq!(complete(&[command], ""), set(&["orders", "stock"]));
    }
    assert_eq!(complete(&["block"], "or"), set(&["orders"]));
    assert_eq!(complete(&["rules", "--database"], "st"), set(&["stock"]));
    assert_eq!(complete(&["refresh"], ""), set(&["office"]));
    // Commands need no agent.
    let (commands, _) = bash(&["pl"]);
    assert_eq!(commands, set(&["plan"]));
    // Refused sources, by the databases that refused them.
    let connected = net.connect(DENIED4.into(), (DB4, 5432).into());
    assert_eq!(connected, Connection::Silence);
    let denied = DENIED4.to_string();
    assert!(wait_until(|| complete(&["explain"], "") == set(&[&denied])));
    assert_eq!(complete(&["allow", "orders"], ""), set(&[&denied]));
    assert_eq!(
        complete(&["block", "stock"], ""),
        set(&["192.0.2.0/24"]),
        "only what concerns the database"
    );
    net.agent_text(&["allow", "orders", &denied, "--for", "1h"]);
    net.agent_text(&["block", "stock", "192.0.2.7", "--for", "1h"]);
    let host = format!("{denied}/32");
    assert_eq!(complete(&["revoke", "orders"], ""), set(&[&host]));
    assert_eq!(
        complete(&["revoke", "stock"], "192"),
        set(&["192.0.2.7/32"])
    );
    // Changes by their numbers: every one, a policy that can be enforced again, and the one that is tried.
    assert_eq!(complete(&["history"], ""), set(&["1", "2", "3"]));
    assert_eq!(complete(&["rollback"], ""), set(&["1"]));
    assert_eq!(complete(&["confirm"], ""), set(&[]));
    net.wait_until_confirmed();
    net.agent_text(&["reload", "--confirm", "1h"]);
    assert_eq!(complete(&["confirm"], ""), set(&["4"]));
    net.agent_text(&["confirm"]);
    // An agent that does not answer is not waited for.
    net.signal(Signal::SIGSTOP);
    assert_eq!(complete(&["allow"], ""), set(&[]));
    net.signal(Signal::SIGCONT);
    assert_eq!(complete(&["allow"], ""), set(&["orders", "stock"]));
}

/// Bash puts into the line what it is given: the name of a file was executed.
#[test]
fn name_of_a_file_is_no_command() {
    let folder = tempfile::tempdir().unwrap();
    let names = [
        "p$(touch pwned).yaml",
        "p`touch pwned`.yaml",
        "p a>b.yaml",
        "plain.yaml",
    ];
    for name in names {
        std::fs::write(folder.path().join(name), "").unwrap();
    }
    let begun = folder.path().join("p").to_str().unwrap().to_owned();
    let (offered, _) = bash(&["plan", &begun]);
    assert_eq!(offered.len(), names.len(), "{offered:?}");
    for answer in offered {
        let script = format!("printf %s {answer}");
        let output = Command::new("bash")
            .args(["-c", &script])
            .current_dir(&folder)
            .output();
        let word = String::from_utf8(output.unwrap().stdout).unwrap();
        let name = Path::new(&word).file_name().unwrap().to_str().unwrap();
        assert!(names.contains(&name), "{answer} is {word}");
    }
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), names.len());
}

#[test]
fn other_shells_get_scripts_too_and_the_usual_variable_does_nothing() {
    let run = |variable: &str, shell: &str| {
        let mut command = Command::new(agent_binary());
        let output = command.env(variable, shell).arg("--version").output();
        String::from_utf8(output.unwrap().stdout).unwrap()
    };
    for shell in ["zsh", "fish"] {
        let script = run(COMPLETE, shell);
        assert!(script.contains(&format!("{COMPLETE}=")), "{script}");
    }
    assert!(run("COMPLETE", "bash").starts_with("filter-agent "));
    assert_eq!(run(COMPLETE, "no shell"), "");
}
