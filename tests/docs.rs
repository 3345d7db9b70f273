//! What the documents show is what happens: policies are valid, commands exist, and the tour of the
//! README runs as it is printed.

use std::{fs, path::PathBuf, process::Command};

use filter_agent::policy;
use filter_tests::{
    net::{CLIENT4, Net, Protected, agent_binary},
    servers::{Dns, Resolv},
};

const DOCUMENTS: [&str; 5] = [
    "README.md",
    "docs/policy.md",
    "docs/operations.md",
    "docs/ARCHITECTURE.md",
    "docs/performance.md",
];

const POLICY: &str = "/etc/filter-agent/policy.yaml";

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The fenced blocks of a language, in order.
fn blocks(document: &str, language: &str) -> Vec<String> {
    let text = fs::read_to_string(root().join(document)).unwrap();
    let mut blocks = Vec::new();
    let mut parts = text.split("\n```");
    parts.next();
    while let (Some(block), Some(_)) = (parts.next(), parts.next()) {
        if let Some(body) = block.strip_prefix(language)
            && let Some(body) = body.strip_prefix('\n')
        {
            blocks.push(body.to_owned());
        }
    }
    blocks
}

#[test]
fn every_policy_shown_is_valid() {
    let mut shown = 0;
    for document in DOCUMENTS {
        for block in blocks(document, "yaml") {
            shown += 1;
            if let Err(problems) = policy::parse(&block) {
                panic!("{document}: {problems:?}\n{block}");
            }
        }
    }
    assert!(shown >= 2);
}

#[test]
fn every_command_shown_has_the_options_it_is_shown_with() {
    let help = |arguments: &[&str]| {
        let output = Command::new(agent_binary())
            .args(arguments)
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {stderr}");
        String::from_utf8(output.stdout).unwrap()
    };
    let mut shown = 0;
    for document in DOCUMENTS {
        for language in ["sh", "console"] {
            for block in blocks(document, language) {
                for line in block.lines() {
                    let prompt = if language == "sh" { "" } else { "$ " };
                    let command = line.strip_prefix(prompt);
                    let command = command.and_then(|line| line.strip_prefix("filter-agent "));
                    let Some(command) = command else { continue };
                    let mut words = command.split_whitespace();
                    let help = help(&[words.next().unwrap(), "--help"]);
                    shown += 1;
                    for option in words.filter(|word| word.starts_with("--")) {
                        assert!(help.contains(option), "{document}: {line}");
                    }
                }
            }
        }
    }
    assert!(shown >= 15);
}

/// Without what differs from run to run: numbers that stand alone, and the width of columns.
fn normal(text: &str) -> Vec<String> {
    let is_number = |word: &str| {
        let word = word.trim_matches(|c: char| c.is_ascii_punctuation());
        word.strip_suffix("ms")
            .or(word.strip_suffix('s'))
            .unwrap_or(word)
            .parse::<f64>()
            .is_ok()
    };
    text.lines()
        .map(|line| {
            let words = line.split_whitespace();
            let words = words.map(|word| if is_number(word) { "#" } else { word });
            words.collect::<Vec<_>>().join(" ")
        })
        .filter(|line| !line.is_empty())
        .collect()
}

/// Commands and what follows each of them.
fn tour() -> Vec<(String, String)> {
    let mut commands: Vec<(String, String)> = Vec::new();
    for block in blocks("README.md", "console") {
        for line in block.lines() {
            match line.strip_prefix("$ ") {
                Some(command) => commands.push((command.into(), String::new())),
                None => {
                    let (_, output) = commands.last_mut().unwrap();
                    output.push_str(line);
                    output.push('\n');
                }
            }
        }
    }
    commands
}

#[test]
fn tour_of_the_readme_prints_what_it_shows() {
    let mut net = Net::new("tour");
    net.watch(&[Protected::tcp(
        5432,
        &["203.0.113.10/32", "2001:db8::10/128", "198.51.100.0/24"],
    )]);
    let dns = Dns::start(&net.client, net.dir(), CLIENT4.into(), "scalingo.com.");
    dns.set("egress.osc-fr1 50 A 171.33.105.206\negress.osc-fr1 50 A 171.33.92.211\n");
    let _resolv = Resolv::new(&net.db, CLIENT4.into(), &[]);
    net.own_resolver = true;
    let mut text = blocks("README.md", "yaml").remove(0);
    text.push('\n');
    net.write_policy(&text);
    let path = net.policy_path().to_str().unwrap().to_owned();
    let mut wrong = String::new();
    let commands = tour();
    assert!(commands.len() >= 10);
    for (command, shown) in commands {
        let printed = if command == "filter-agent run &" {
            let before = net.log.len();
            net.start();
            net.log[before..].join("\n")
        } else if command == "pkill -9 filter-agent" {
            net.kill();
            String::new()
        } else if let Some(rule) = command.strip_prefix("echo '") {
            let (rule, file) = rule.split_once("' >> ").unwrap();
            assert_eq!(file, POLICY);
            text.push_str(&format!("{rule}\n"));
            net.write_policy(&text);
            String::new()
        } else {
            let command = command.replace(POLICY, &path);
            let words: Vec<&str> = command.split_whitespace().collect();
            assert_eq!(words[0], "filter-agent");
            let output = net.agent(&words[1..]);
            let both = [output.stdout, output.stderr].concat();
            String::from_utf8(both).unwrap()
        };
        let socket = net.socket().to_str().unwrap().to_owned();
        let printed = printed
            .replace(&path, POLICY)
            .replace(&socket, "/run/filter-agent/control.sock");
        if normal(&printed) != normal(&shown) {
            wrong.push_str(&format!("$ {command}\n{printed}"));
        }
    }
    assert!(wrong.is_empty(), "the README should show:\n{wrong}");
}
