//! The documents against the binary: policies are valid, commands, options, fields, defaults and exit statuses are
//! those of the code, none is left out, and the tour of the README runs as it is printed.

mod json;
mod tours;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{IpAddr, TcpListener},
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Command, Stdio},
};

use filter_agent::{cli, policy};
use filter_tests::net::{
    ALLOWED4, Connection, DB4, DENIED4, Namespace, Net, agent_binary, connect, dedicated,
    policy as policy_text,
};

/// README.md and every page of docs/, by path.
fn documents() -> Vec<String> {
    let pages = fs::read_dir(root().join("docs")).unwrap();
    let names = pages.map(|page| page.unwrap().file_name().into_string().unwrap());
    let pages = names.filter(|name| name.ends_with(".md"));
    let pages = pages.map(|name| format!("docs/{name}"));
    ["README.md".into()].into_iter().chain(pages).collect()
}

fn text(document: &str) -> String {
    fs::read_to_string(root().join(document)).unwrap()
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The fenced blocks of a language, in order.
fn blocks(document: &str, language: &str) -> Vec<String> {
    let text = text(document);
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
    for document in documents() {
        for block in blocks(&document, "yaml") {
            shown += 1;
            if let Err(problems) = policy::parse(&block) {
                panic!("{document}: {problems:?}\n{block}");
            }
        }
    }
    assert!(shown >= 2);
}

/// Lines of code and code in lines, of a whole page.
fn code(document: &str) -> Vec<String> {
    let mut code = Vec::new();
    let text = text(document);
    let mut is_block = false;
    for line in text.lines() {
        if line.starts_with("```") {
            is_block = !is_block;
        } else if is_block {
            code.push(line.trim_start_matches("$ ").to_owned());
        }
    }
    // A span may go over the end of a line.
    let outside: Vec<&str> = text.split("\n```").step_by(2).collect();
    let outside = outside.join("\n").replace("``", "`");
    for paragraph in outside.split("\n\n") {
        let spans = paragraph.split('`').skip(1).step_by(2);
        code.extend(spans.map(|span| span.split_whitespace().collect::<Vec<_>>().join(" ")));
    }
    code
}

/// Options of each command, `--long` each.
fn commands() -> BTreeMap<String, BTreeSet<String>> {
    let mut command = cli::command();
    command.build();
    command
        .get_subcommands()
        .filter(|sub| sub.get_name() != "help")
        .map(|sub| {
            let options = sub.get_arguments().filter_map(|option| option.get_long());
            let options = options.map(|long| format!("--{long}")).collect();
            (sub.get_name().to_owned(), options)
        })
        .collect()
}

/// Options of each command, those of its own commands included.
fn all_options() -> BTreeMap<String, BTreeSet<String>> {
    let mut options = commands();
    let mut command = cli::command();
    command.build();
    for sub in command.get_subcommands() {
        let Some(options) = options.get_mut(sub.get_name()) else {
            continue;
        };
        for inner in sub.get_subcommands().filter(|it| it.get_name() != "help") {
            let longs = inner.get_arguments().filter_map(|option| option.get_long());
            options.extend(longs.map(|long| format!("--{long}")));
        }
    }
    options
}

#[test]
fn every_command_and_option_in_a_page_exists() {
    let commands = all_options();
    let mut found = 0;
    for document in documents() {
        for code in code(&document) {
            // `sudo filter-agent`, `+/usr/sbin/filter-agent` and the like; other programs' lines are not looked at.
            let Some((_, line)) = code.split_once("filter-agent ") else {
                continue;
            };
            let mut words = line.split_whitespace();
            let Some(command) = words.next() else {
                continue;
            };
            if !code.starts_with("filter-agent ") && !commands.contains_key(command) {
                continue;
            }
            if command.starts_with("--") || !command.starts_with(|c: char| c.is_ascii_lowercase()) {
                continue;
            }
            let options = commands.get(command);
            let options = options.unwrap_or_else(|| panic!("{document}: no command: {code}"));
            found += 1;
            for option in words.filter(|word| word.starts_with("--")) {
                let option = option.trim_end_matches(['.', ',', ':', ';', ')']);
                let option = option.split('=').next().unwrap();
                assert!(
                    options.contains(option),
                    "{document}: no option {option}: {code}"
                );
            }
        }
        // `reload --existing`, without the program's name.
        for code in code(&document) {
            let mut words = code.split_whitespace();
            if let Some(options) = words.next().and_then(|word| commands.get(word)) {
                for option in words.filter(|word| word.starts_with("--")) {
                    assert!(
                        options.contains(option),
                        "{document}: no option {option}: {code}"
                    );
                    found += 1;
                }
            }
        }
    }
    assert!(found >= 30, "{found}");
}

#[test]
fn every_command_and_option_is_described() {
    let mut command = cli::command();
    command.build();
    let operations = code("docs/operations.md");
    for sub in command
        .get_subcommands()
        .filter(|sub| sub.get_name() != "help")
    {
        let name = sub.get_name();
        let shown = format!("filter-agent {name}");
        let is_shown = |code: &String| *code == shown || code.starts_with(&format!("{shown} "));
        assert!(
            operations.iter().any(is_shown),
            "docs/operations.md lacks `{shown}`"
        );
        assert!(sub.get_about().is_some(), "{name} has no description");
        // The manual page is made from these.
        for argument in sub.get_arguments() {
            let id = argument.get_id();
            assert!(argument.get_help().is_some(), "{name}: {id} has no help");
        }
    }
    let all: BTreeSet<String> = all_options().into_values().flatten().collect();
    let pages: String = documents().iter().map(|document| text(document)).collect();
    for option in all {
        assert!(pages.contains(&option), "no page names {option}");
    }
}

#[test]
fn manual_page_has_every_command_option_and_exit_status() {
    let folder = tempfile::tempdir().unwrap();
    let mut pages = Command::new(env!("CARGO"));
    pages.args(["run", "--quiet", "--package", "filter-agent"]);
    pages.args(["--example", "pages", "--"]).arg(folder.path());
    pages.current_dir(root());
    assert!(pages.status().unwrap().success());
    let page = fs::read_to_string(folder.path().join("filter-agent.8")).unwrap();
    // roff writes a hyphen as `\-`.
    let page = page.replace("\\-", "-");
    for (command, options) in commands() {
        let (_, section) = page
            .split_once(&format!(".SS filter-agent {command}\n"))
            .unwrap();
        let section = section.split("\n.SS ").next().unwrap();
        for option in options {
            assert!(section.contains(&option), "{command}: {option}");
        }
    }
    let (_, statuses) = page.split_once("\n.SH EXIT STATUS\n").unwrap();
    let statuses = statuses.split("\n.SH ").next().unwrap();
    let statuses: Vec<&str> = statuses.split(".TP\n").skip(1).collect();
    let statuses = statuses.iter().map(|entry| entry.lines().next().unwrap());
    let documented = rows("docs/operations.md", "status");
    let documented = documented.iter().map(|row| row[0].trim_matches('`'));
    assert!(statuses.eq(documented));
}

/// The fields that the policy's reader takes at a place, as its error about another field lists them.
fn fields(text: &str) -> BTreeSet<String> {
    let problems = policy::parse(text).unwrap_err();
    let message = problems
        .iter()
        .map(|problem| &problem.message)
        .find(|message| message.contains("expected one of"))
        .unwrap_or_else(|| panic!("{problems:?}"));
    let (_, listed) = message.split_once("expected one of").unwrap();
    listed
        .split('`')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect()
}

/// The rows of a page's tables whose header begins with this cell, without their code marks.
fn rows(document: &str, header: &str) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    let mut is_wanted = false;
    for line in text(document).lines() {
        let Some(line) = line.strip_prefix('|') else {
            is_wanted = false;
            continue;
        };
        let cells: Vec<String> = line
            .split(" |")
            .map(|cell| cell.trim().to_owned())
            .collect();
        if cells[0].trim_matches('`') == header {
            is_wanted = true;
        } else if is_wanted && !cells[0].starts_with("---") {
            rows.push(cells);
        }
    }
    rows
}

#[test]
fn every_field_of_the_policy_is_described_and_no_other() {
    let top = fields("interfaces: [eth0]\ndatabases: []\nother: 1\n");
    let database =
        fields("interfaces: [eth0]\ndatabases: [{name: a, model: shared, port: 1, other: 1}]\n");
    let rule = fields(
        "interfaces: [eth0]\ndatabases: [{name: a, model: dedicated, port: 1, force_tls: false, rules: [{other: 1}]}]\n",
    );
    let region = fields("interfaces: [eth0]\nregions: {x: {other: 1}}\ndatabases: []\n");
    let formats = fields(
        "interfaces: [eth0]\nregions: {x: {url: 'https://a.test/', select: {format: other}}}\ndatabases: []\n",
    );
    let fleet = fields("interfaces: [eth0]\nfleet: {other: 1}\ndatabases: []\n");
    let bounds = fields(
        "interfaces: [eth0]\ndatabases: [{name: a, model: dedicated, port: 1, force_tls: false, fleet: {other: 1}}]\n",
    );
    assert!(top.len() >= 7 && database.len() >= 14 && rule.len() >= 5 && region.len() >= 19);
    assert!(fleet.len() >= 7 && bounds.len() >= 3);
    let mut documented = BTreeSet::new();
    for header in ["field", "source"] {
        for row in rows("docs/policy.md", header) {
            // `port`, `ports`; `dns: [names]`; `dnssec: require`.
            for span in row[0].split('`').skip(1).step_by(2) {
                documented.insert(span.split(':').next().unwrap().to_owned());
            }
        }
    }
    let page = text("docs/policy.md");
    // Described in the text of their own sections.
    for field in ["select", "insecure"] {
        assert!(page.contains(&format!("`{field}")), "{field}");
        documented.insert(field.into());
    }
    let accepted: BTreeSet<String> = [top, database, rule, region, fleet, bounds]
        .into_iter()
        .flatten()
        .collect();
    assert_eq!(documented, accepted);
    let documented = rows("docs/policy.md", "format");
    let documented: BTreeSet<String> = documented
        .iter()
        .flat_map(|row| row[0].split('`').skip(1).step_by(2).map(str::to_owned))
        .collect();
    // What serde does not list: another name of `digitalocean`.
    let accepted = formats.into_iter().chain(["geofeed".into()]);
    assert_eq!(documented, accepted.collect());
}

#[test]
fn defaults_of_the_policy_are_those_of_the_code() {
    let text = "interfaces: [eth0]
regions:
  dns: {dns: [a.test]}
  url: {url: 'https://a.test/'}
  file: {file: /a}
fleet: {endpoints: ['http://127.0.0.1:2379'], insecure: true}
databases:
  - {name: dedicated, port: 1, model: dedicated, engine: postgresql, fleet: true}
  - {name: shared, port: 2, model: shared}
  - {name: udp, port: 3, model: dedicated, protocol: udp}
";
    let (policy, _) = policy::parse(text).unwrap();
    // `1s; url 10s`: of names, then of the sources where it is another.
    let by_source = |default: &dyn Fn(&policy::Guards) -> String| {
        let of = |source: &str| default(&policy.regions[source].guards);
        let mut text = of("dns");
        for source in ["url", "file"] {
            if of(source) != of("dns") {
                text.push_str(&format!("; `{source}` {}", of(source)));
            }
        }
        text
    };
    let spelled = |duration| policy::spelled(duration);
    let [dedicated, shared, udp] = &policy.databases[..] else {
        panic!("{:?}", policy.databases);
    };
    assert!(dedicated.tls.is_some() && shared.tls.is_none() && udp.tls.is_none());
    let policy::Model::Shared { internet } = shared.model else {
        panic!("{:?}", shared.model);
    };
    let tls = dedicated.tls.unwrap();
    let cancel = tls.cancel_in_clear;
    assert!(!tls.proxied);
    let unenforced = if tls.open_unenforced {
        "allow"
    } else {
        "close"
    };
    assert_eq!(policy.mode, policy::Mode::Auto);
    assert!(policy.ignored_interfaces.is_empty() && policy.regional_network.is_empty());
    assert!(policy.unprotected.is_empty());
    assert!(dedicated.addresses.is_empty() && dedicated.cluster.is_empty());
    assert!(shared.fleet.is_none());
    let bounds = &dedicated.fleet.as_ref().unwrap().bounds;
    assert!(bounds.within.is_empty() && bounds.regions.is_none());
    let [widest4, widest6] = bounds.widest;
    let frozen = policy.fleet.as_ref().unwrap().frozen;
    let expected = [
        ("widest", format!("[/{widest4}, /{widest6}]")),
        ("within", "anywhere".into()),
        ("frozen", format!("`{frozen}`")),
        ("mode", "`auto`".into()),
        ("ignore_interfaces", "empty".into()),
        ("regional_network", "empty".into()),
        ("unprotected", "empty".into()),
        ("tls_unenforced", format!("`{unenforced}`")),
        ("protocol", format!("`{}`", dedicated.protocol.name())),
        ("force_tls", "`true` if dedicated and TCP".into()),
        ("addresses", "all".into()),
        ("cluster", "empty".into()),
        ("cancel_in_clear", format!("`{cancel}`")),
        ("proxy_protocol", "none".into()),
        ("monitor", format!("`{}`", dedicated.monitor)),
        ("internet", format!("`{internet}`")),
        (
            "private",
            by_source(&|guards| format!("`{}`", guards.private)),
        ),
        (
            "max_prefixes",
            by_source(&|guards| guards.max_prefixes.to_string()),
        ),
        (
            "shortest",
            by_source(&|guards| {
                let [v4, v6] = guards.shortest;
                format!("[/{v4}, /{v6}]")
            }),
        ),
        (
            "max_shrink",
            by_source(&|guards| format!("{}%", guards.max_shrink)),
        ),
        (
            "shrink_after",
            by_source(&|guards| spelled(guards.shrink_after)),
        ),
        (
            "retire_after",
            by_source(&|guards| spelled(guards.retire_after)),
        ),
        (
            "min_refresh",
            by_source(&|guards| spelled(guards.min_refresh)),
        ),
        (
            "max_refresh",
            by_source(&|guards| spelled(guards.max_refresh)),
        ),
        ("timeout", by_source(&|guards| spelled(guards.timeout))),
        (
            "max_age",
            by_source(&|guards| guards.max_age.map_or("never".into(), spelled)),
        ),
    ];
    let rows = rows("docs/policy.md", "field");
    let of = |field: &str| {
        let row = rows.iter().find(|row| row[0] == format!("`{field}`"));
        row.unwrap_or_else(|| panic!("no row of {field}"))[1].clone()
    };
    for (field, default) in expected {
        assert_eq!(of(field), default, "{field}");
    }
}

#[test]
fn exit_statuses_are_those_of_the_page() {
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::write(place("valid.yaml"), "interfaces: [lo0]\ndatabases: []\n").unwrap();
    fs::write(place("invalid.yaml"), "interfaces: [lo0]\n").unwrap();
    let (valid, invalid, none) = (
        place("valid.yaml"),
        place("invalid.yaml"),
        place("none.sock"),
    );
    let status = |arguments: &[&str]| {
        let mut command = Command::new(agent_binary());
        command.args(arguments).stdin(Stdio::null());
        command.output().unwrap().status.code().unwrap()
    };
    let tried: &[(&[&str], i32)] = &[
        (&["check", &valid], 0),
        (&["--help"], 0),
        (&["check", &invalid], 1),
        (&["rules", "--socket", &none], 1),
        (&["status", "--socket", &none], 1),
        (&["rules", "--socket"], 2),
        (&["rules", "--other"], 2),
        (&["reload", "--timeout", "2h"], 2),
        (&["detach", "--socket", &none], 2),
        (&["status", "--brief", "--other"], 3),
    ];
    for (arguments, expected) in tried {
        assert_eq!(status(arguments), *expected, "{arguments:?}");
    }
    // The reader of the output is gone before it comes.
    let script = "mkfifo \"$1\"; : <\"$1\" & exec 3>\"$1\"; wait; \"$2\" check \"$3\" >&3; echo $?";
    let mut command = Command::new("sh");
    let agent = agent_binary().to_str().unwrap();
    command.args(["-c", script, "sh", &place("pipe"), agent, &valid]);
    assert_eq!(command.output().unwrap().stdout, b"141\n");
    let documented = rows("docs/operations.md", "status");
    let documented: Vec<&str> = documented
        .iter()
        .map(|row| row[0].trim_matches('`'))
        .collect();
    // 4 and 130 need a fleet: its tests look at them.
    assert_eq!(documented, ["0", "1", "2", "3", "4", "130", "141"]);
}

/// The sentence of the README that has these words.
fn sentence(words: &str) -> String {
    let text = text("README.md");
    let text: Vec<&str> = text.split_whitespace().collect();
    let text = text.join(" ");
    let mut sentences = text.split(". ").filter(|sentence| sentence.contains(words));
    let found = sentences.next();
    let found = found.unwrap_or_else(|| panic!("the README does not say: {words}"));
    found.into()
}

/// Fault B24: it said so of the list of dropped sources, which `drops` prints.
#[test]
fn what_the_readme_says_does_not_exist_is_no_command() {
    let listed = sentence(" do not exist yet").to_lowercase();
    let (listed, _) = listed.split_once(" do not exist yet").unwrap();
    let mut command = cli::command();
    command.build();
    let fleet = command.find_subcommand("fleet").unwrap();
    let put = fleet.find_subcommand("put").unwrap();
    for thing in listed.split(" and ").flat_map(|things| things.split(", ")) {
        let option = match thing {
            "signed documents" => "sign",
            _ => panic!("the README says that {thing} do not exist yet"),
        };
        let exists = put.get_arguments().any(|it| it.get_id() == option);
        assert!(!exists, "{thing}: fleet put has --{option}");
    }
}

/// Fault B24: it said nowhere how to get the binary.
#[test]
fn readme_makes_and_installs_the_package_of_this_version() {
    let version = env!("CARGO_PKG_VERSION");
    let package = format!("./target/dist/filter-agent_{version}-1_amd64.deb");
    let shown = blocks("README.md", "sh").remove(0);
    let shown: Vec<&str> = shown.lines().collect();
    assert_eq!(
        shown,
        ["cargo xtask dist", &format!("apt install {package}")]
    );
}

/// Fault B24: it did not say that `run` needs root.
#[test]
fn commands_need_root_as_the_readme_says() {
    let sentence = sentence("its commands need root");
    let (_, exceptions) = sentence.split_once("except ").unwrap();
    let exceptions: Vec<&str> = exceptions.split('`').skip(1).step_by(2).collect();
    let orders = dedicated("orders", 5432, &["203.0.113.10/32"], "");
    let policy = policy_text("eth0", "native", &[orders]);
    let net = Net::enforcing("readme-root", &[], &policy);
    let path = net.policy_path();
    for name in commands().keys() {
        let argument: &[&str] = match name.as_str() {
            "check" => &[path.to_str().unwrap()],
            "explain" | "trace" => &["203.0.113.10"],
            "allow" | "block" => &["orders", "203.0.113.11", "--for", "1h"],
            "revoke" => &["orders", "203.0.113.11"],
            "detach" => &["--yes"],
            _ => &[],
        };
        let mut command = net.agent_command(&[&[name.as_str()], argument].concat());
        if name == "fleet" {
            command = Command::new(agent_binary());
            command
                .args(["fleet", "get", "orders", "--fleet"])
                .arg(&path);
        }
        command.uid(65534).gid(65534);
        let output = net.db.output(&mut command);
        let stderr = String::from_utf8(output.stderr).unwrap();
        let needs_none = exceptions.contains(&name.as_str());
        if name == "fleet" {
            // It reads the file, which names no etcd.
            assert!(
                needs_none && stderr.contains("it has no `fleet`"),
                "{stderr}"
            );
            continue;
        }
        assert_eq!(output.status.success(), needs_none, "{name}: {stderr}");
        let names_it = stderr.contains("root") || stderr.contains("Permission denied");
        assert!(needs_none || names_it, "{name}: {stderr}");
    }
}

/// Fault B24: it did not say that these are open.
#[test]
fn loopback_and_bridges_of_containers_are_filtered_as_the_readme_says() {
    const PORT: u16 = 5432;
    let sentence = sentence("Not filtered are");
    assert!(sentence.contains("loopback interface"), "{sentence}");
    assert!(sentence.contains("bridge such as `docker0` unless the policy lists it"));
    assert!(sentence.contains("and what they send each other"));
    let orders = dedicated("orders", PORT, &["203.0.113.10/32"], "");
    let policy = |interfaces| policy_text(interfaces, "auto", std::slice::from_ref(&orders));
    let net = Net::enforcing("readme-open", &[], &policy("eth0"));
    let _listener = net.listen(PORT);
    let container = Namespace::new("readme-open-container".into());
    net.db.ip(&format!(
        "link add docker0 type bridge
         link set docker0 up
         address add 172.17.0.1/16 dev docker0
         link add veth0 type veth peer name eth0 netns {}
         link set veth0 master docker0
         link set veth0 up",
        container.name
    ));
    container.ip("link set eth0 up\naddress add 172.17.0.2/16 dev eth0");
    let [local, bridge, inside] = ["127.0.0.1", "172.17.0.1", "172.17.0.2"];
    let [local, bridge, inside] = [local, bridge, inside].map(|ip| ip.parse::<IpAddr>().unwrap());
    let from_host = || net.db.run(|| connect(local, (local, PORT).into()));
    let from_container = || container.run(|| connect(inside, (bridge, PORT).into()));
    let from = |source: IpAddr| net.connect(source, (IpAddr::from(DB4), PORT).into());
    let clients = [from(ALLOWED4.into()), from(DENIED4.into())];
    assert_eq!(clients, [Connection::Accepted, Connection::Silence]);
    assert_eq!(
        [from_host(), from_container()],
        [Connection::Accepted, Connection::Accepted]
    );
    let other = Namespace::new("readme-open-other".into());
    net.db.ip(&format!(
        "link add veth1 type veth peer name eth0 netns {}
         link set veth1 master docker0
         link set veth1 up",
        other.name
    ));
    other.ip("link set eth0 up\naddress add 172.17.0.3/16 dev eth0");
    let beside: IpAddr = "172.17.0.3".parse().unwrap();
    let _beside = other.run(|| TcpListener::bind((beside, PORT)).unwrap());
    let from_beside = || container.run(|| connect(inside, (beside, PORT).into()));
    net.reload(&policy("eth0, docker0"));
    assert_eq!(
        [from_host(), from_container(), from_beside()],
        [
            Connection::Accepted,
            Connection::Silence,
            Connection::Accepted
        ]
    );
}
