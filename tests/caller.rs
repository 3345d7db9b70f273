//! Lines of commands for their user: that a change cuts the user off, and what the command waits for.

use std::process::{Command, Stdio};

use filter_tests::net::{ALLOWED4, Net, dedicated, policy};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const VARIABLE: &str = "SSH_CONNECTION";

fn with(allowed: &[&str]) -> String {
    policy("eth0", "auto", &[dedicated("orders", 5432, allowed, "")])
}

/// Output of a command with one value of the variable in its environment and another in its parent's.
fn run(net: &Net, arguments: &[&str], own: Option<&str>, parents: Option<&str>) -> String {
    let command = net.agent_command(arguments);
    // A shell that waits is a parent with an environment of its own.
    let mut shell = Command::new("sh");
    let own = own.map(|own| format!("{VARIABLE}={own}"));
    let script = "unset SSH_CONNECTION; \"$@\"; exit $?";
    shell.args(["-c", script, "sh", "env"]).args(own);
    shell.arg(command.get_program()).args(command.get_args());
    shell.current_dir(net.dir()).env_remove(VARIABLE);
    shell.envs(parents.map(|parents| (VARIABLE, parents)));
    let output = net.db.output(&mut shell);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{arguments:?}: {error}");
    String::from_utf8(output.stdout).unwrap() + &error
}

fn of(address: &str) -> String {
    format!("{address} 52134 10.0.0.1 22")
}

fn about_you(printed: &str) -> Vec<&str> {
    let lines = printed.lines();
    lines.filter(|line| line.starts_with("you: ")).collect()
}

#[test]
fn change_that_cuts_off_its_caller_says_so() {
    let mut net = Net::new("caller");
    net.write_policy(&with(&["203.0.113.0/24", "198.51.100.0/24"]));
    net.start();
    net.write_policy(&with(&["198.51.100.0/24"]));
    let caller = of(&ALLOWED4.to_string());
    let expected = format!(
        "you: {ALLOWED4} (from SSH_CONNECTION) loses access to database orders, which 203.0.113.0/24 allowed"
    );
    let own = run(&net, &["plan"], Some(&caller), None);
    assert_eq!(about_you(&own), [&expected]);
    // As under sudo. The command's own environment goes first.
    let parents = run(&net, &["plan"], None, Some(&caller));
    assert_eq!(about_you(&parents), [&expected]);
    let mapped = of(&format!("::ffff:{ALLOWED4}"));
    let path = net.policy_path();
    let file = run(&net, &["plan", path.to_str().unwrap()], None, Some(&mapped));
    assert_eq!(about_you(&file), [&expected]);
    let other = of("198.51.100.9");
    let stays = run(&net, &["plan"], Some(&other), Some(&caller));
    assert_eq!(about_you(&stays), Vec::<&str>::new());
    let plan = run(&net, &["plan", "--json"], Some(&caller), None);
    let plan: Value = serde_json::from_str(&plan).unwrap();
    let lost = json!([{ "database": "orders", "rule": "203.0.113.0/24" }]);
    assert_eq!(plan["lock_out"], lost);
    // An unknown caller is reported, and refuses nothing.
    let unknown = run(&net, &["plan"], Some("UNKNOWN 65535 UNKNOWN 65535"), None);
    let unknown = about_you(&unknown);
    assert_eq!(unknown.len(), 1, "{unknown:?}");
    let begin = "you: it is not known whether this cuts you off: ";
    assert!(unknown[0].starts_with(begin), "{unknown:?}");
    let reloaded = run(&net, &["reload"], None, Some(&caller));
    assert_eq!(about_you(&reloaded), [&expected]);
    // It has lost it.
    let reloaded = run(&net, &["reload"], Some(&caller), None);
    assert_eq!(about_you(&reloaded), Vec::<&str>::new());
}

#[test]
fn block_or_revoke_that_cuts_off_its_caller_says_so() {
    let mut net = Net::new("caller-block");
    net.write_policy(&with(&["203.0.113.0/24"]));
    net.start();
    let caller = of(&ALLOWED4.to_string());
    let say = |arguments: &[&str], address: &str| {
        let printed = run(&net, arguments, None, Some(&of(address)));
        about_you(&printed).join("\n")
    };
    let block = ["block", "orders", "203.0.113.0/28", "--for", "1h"];
    let said = run(&net, &block, Some(&caller), None);
    let expected = format!(
        "you: {ALLOWED4} (from SSH_CONNECTION) loses access to database orders, which 203.0.113.0/24 allowed"
    );
    assert_eq!(about_you(&said), [&expected]);
    let allow = ["allow", "orders", "192.0.2.7", "--for", "1h"];
    assert_eq!(say(&allow, "192.0.2.7"), "");
    let revoke = ["revoke", "orders", "192.0.2.7"];
    let expected = "you: 192.0.2.7 (from SSH_CONNECTION) loses access to database orders, which temporary rule \
                    192.0.2.7/32 allowed";
    assert_eq!(say(&revoke, "192.0.2.7"), expected);
}

/// On a terminal only: elsewhere stderr is for errors.
#[test]
fn who_waits_for_longer_than_a_second_reads_what_for() {
    let mut net = Net::new("caller-waits");
    net.write_policy(&with(&["203.0.113.0/24"]));
    net.start();
    net.wait_until_confirmed();
    net.signal(Signal::SIGSTOP);
    let expected = "waiting for the agent, which may look regions up: at most 2s in all";
    let arguments = ["reload", "--timeout", "2s"];
    let error = net.agent_error(&arguments);
    assert!(!error.contains("waiting"), "{error}");
    let command = net.agent_command(&arguments);
    let words = [command.get_program()]
        .into_iter()
        .chain(command.get_args());
    let words: Vec<&str> = words.map(|word| word.to_str().unwrap()).collect();
    let mut terminal = Command::new("script");
    terminal.args(["-qec", &words.join(" "), "/dev/null"]);
    terminal.stdin(Stdio::null());
    let printed = net.db.output(&mut terminal);
    let printed = String::from_utf8(printed.stdout).unwrap();
    assert_eq!(printed.matches("waiting").count(), 1, "{printed}");
    assert!(printed.contains(expected), "{printed}");
    net.signal(Signal::SIGCONT);
}
