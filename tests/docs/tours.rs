//! Pages whose commands are typed one after the other, and what they print is compared with what the page shows.

use std::{
    cell::RefCell,
    io::Write as _,
    net::SocketAddr,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use filter_tests::{
    net::{
        ALLOWED4, CLIENT4, Connection, DB4, DENIED4, Net, Protected, bound, run_in, succeed,
        wait_until,
    },
    servers::{Dns, Resolv},
};

use crate::blocks;

const PORT: u16 = 5432;

/// Where pages have the policy file; a test has it elsewhere.
const CONFIGURATION: &str = "/etc/filter-agent";

/// How a client of PostgreSQL 3.0 without TLS begins, with the name of its user.
const STARTUP: &[u8] = b"\0\0\0\x12\0\x03\0\0user\0kim\0\0";

/// Time in which a command that changes nothing has to print what is shown, however often it is typed.
const READ_PATIENCE: Duration = Duration::from_secs(30);

/// Without what differs from run to run: numbers, times and durations that stand alone, and the width of columns.
fn normal(text: &str) -> Vec<String> {
    let lines = text.lines().map(|line| {
        let mut words: Vec<&str> = line.split_whitespace().map(without_number).collect();
        // `1h 59m 12s`
        words.dedup_by(|word, before| *word == DURATION && *before == DURATION);
        words.join(" ")
    });
    lines.filter(|line| !line.is_empty()).collect()
}

const DURATION: &str = "(duration)";

fn without_number(word: &str) -> &str {
    let bare = word.trim_matches(|c: char| c.is_ascii_punctuation());
    let is_number = |text: &str| text.parse::<f64>().is_ok();
    let mut units = ["ms", "s", "m", "h", "d"].into_iter();
    if units.any(|unit| bare.strip_suffix(unit).is_some_and(is_number)) {
        DURATION
    } else if is_number(bare) || is_hash(bare) || bare.parse::<jiff::Timestamp>().is_ok() {
        "#"
    } else {
        word
    }
}

fn is_hash(word: &str) -> bool {
    word.len() == 64 && word.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The commands of a page, and what follows each of them.
fn commands(document: &str) -> Vec<(String, String)> {
    let mut commands: Vec<(String, String)> = Vec::new();
    for block in blocks(document, "console") {
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

/// The first policy of a page, with its files where a test has them.
fn policy_of(net: &Net, document: &str) -> String {
    let dir = net.dir().to_str().unwrap();
    blocks(document, "yaml")
        .remove(0)
        .replace(CONFIGURATION, dir)
}

/// Types a page's commands on the database's host. `prelude`: lines of a shell before each of other programs' commands;
/// `before`: what clients do before a command is typed.
fn type_commands(net: &mut Net, document: &str, prelude: &str, before: impl Fn(&Net, &str)) {
    let mut text = policy_of(net, document);
    text.push('\n');
    net.write_policy(&text);
    let commands = commands(document);
    assert!(commands.len() >= 10);
    let mut wrong = String::new();
    for (command, shown) in commands {
        before(net, &command);
        let deadline = Instant::now() + READ_PATIENCE;
        let reads = [
            "drops", "explain", "history", "plan", "regions", "rules", "status",
        ];
        let reads = reads.map(|name| format!("filter-agent {name}"));
        let may_repeat = reads.iter().any(|read| command.starts_with(read));
        let mut printed = type_command(net, prelude, &command);
        while normal(&printed) != normal(&shown) && may_repeat && Instant::now() < deadline {
            printed = type_command(net, prelude, &command);
        }
        if normal(&printed) != normal(&shown) {
            wrong.push_str(&format!("$ {command}\n{printed}"));
        }
    }
    assert!(wrong.is_empty(), "{document} should show:\n{wrong}");
}

/// Returns what a command prints, with the usual places of files.
fn type_command(net: &mut Net, prelude: &str, command: &str) -> String {
    let dir = net.dir().to_str().unwrap().to_owned();
    let socket = net.socket().to_str().unwrap().to_owned();
    let typed = command.replace(CONFIGURATION, &dir);
    let printed = match typed.strip_prefix("filter-agent ") {
        _ if typed == "pkill -9 filter-agent" => {
            net.kill();
            String::new()
        }
        Some("run &") => {
            let before = net.log.len();
            net.start();
            net.log[before..].join("\n")
        }
        // It asks no agent.
        Some(arguments) if arguments.starts_with("fleet ") => {
            let script = format!("{prelude}\n{} {arguments}", net.binary.display());
            both(net.db.output(Command::new("sh").args(["-c", &script])))
        }
        Some(arguments) => {
            // A command in `$(...)` is the shell's.
            let arguments = match arguments.contains("$(") {
                true => both(
                    net.db
                        .output(Command::new("sh").args(["-c", &format!("echo {arguments}")])),
                ),
                false => arguments.to_owned(),
            };
            let words: Vec<&str> = arguments.split_whitespace().collect();
            both(net.agent(&words))
        }
        None => {
            let script = format!("{prelude}\n{typed}");
            both(net.db.output(Command::new("sh").args(["-c", &script])))
        }
    };
    let state = net.state_dir().to_str().unwrap().to_owned();
    let places = [
        (socket, "/run/filter-agent/control.sock"),
        (state, "/var/lib/filter-agent"),
        (dir, CONFIGURATION),
    ];
    places
        .iter()
        .fold(printed, |text, (place, usual)| text.replace(place, usual))
}

fn both(output: Output) -> String {
    let both = [output.stdout, output.stderr].concat();
    String::from_utf8(both).unwrap()
}

#[test]
fn tour_of_the_readme_prints_what_it_shows() {
    let mut net = Net::new("tour");
    let _server = net.echo(PORT);
    net.watch(&[Protected::tcp(
        PORT,
        &["203.0.113.10/32", "2001:db8::10/128", "198.51.100.0/24"],
    )]);
    let dns = Dns::start(&net.client, net.dir(), CLIENT4.into(), "scalingo.com.");
    dns.set("egress.osc-fr1 50 A 171.33.105.206\negress.osc-fr1 50 A 171.33.92.211\n");
    let _resolv = Resolv::new(&net.db, CLIENT4.into(), &[]);
    net.own_resolver = true;
    type_commands(&mut net, "README.md", "", |_, _| {});
}

#[test]
fn tasks_of_the_operator_print_what_their_page_shows() {
    let mut net = Net::new("tasks");
    let _server = net.echo(PORT);
    let allowed = [
        "203.0.113.0/28",
        "198.51.100.0/24",
        "2001:db8::10/128",
        "10.0.0.2/32",
    ];
    net.watch(&[Protected::tcp(PORT, &allowed)]);
    net.write_policy(&blocks("docs/tasks.md", "yaml").remove(0));
    net.start();
    type_commands(&mut net, "docs/tasks.md", "", |net, command| {
        let database = SocketAddr::new(DB4.into(), PORT);
        match command {
            "filter-agent drops --source 198.51.100.7" => {
                let connection = net.connect(DENIED4.into(), database);
                assert_eq!(connection, Connection::Silence);
            }
            "filter-agent rules --database orders" => {
                let connection = net.connect(ALLOWED4.into(), database);
                assert_eq!(connection, Connection::Accepted);
            }
            "filter-agent drops --source 203.0.113.10" => net.client.run(|| {
                let socket = bound(ALLOWED4.into());
                socket.connect(&database.into()).unwrap();
                (&socket).write_all(STARTUP).unwrap();
            }),
            _ => {}
        }
    });
}

/// A server as a page starts it, ended when dropped.
pub struct Server(Child);

impl Server {
    pub fn start(net: &Net, script: &str) -> Self {
        let mut command = Command::new("sh");
        // The shell is replaced, so that its child is not left behind.
        command.args(["-ec", &script.replace("\netcd ", "\nexec etcd ")]);
        command.stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        Self(run_in(&net.db.name, || command.spawn().unwrap()))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Where the page has etcd's data.
const ETCD: &str = "/var/lib/etcd";

#[test]
fn fleet_is_set_up_restored_and_recovered_as_its_page_shows() {
    const PAGE: &str = "docs/fleet.md";
    let mut net = Net::new("docs-fleet");
    net.db.ip("address add 10.0.0.11/32 dev lo");
    let dir = net.dir().to_str().unwrap().to_owned();
    let scripts = blocks(PAGE, "sh").into_iter();
    let scripts = scripts.map(|script| script.replace(CONFIGURATION, &dir).replace(ETCD, &dir));
    let scripts: Vec<String> = scripts.collect();
    let [
        certificates,
        etcd,
        rights,
        files,
        documents,
        backup,
        restore,
    ] = &scripts[..]
    else {
        panic!("{scripts:?}");
    };
    let shell = |net: &Net, script: &str| {
        net.db
            .run(|| succeed(Command::new("sh").args(["-ec", script])));
    };
    shell(&net, &format!("cd {dir}\n{certificates}"));
    let inside = format!("cd {dir}/fleet");
    let exports = rights.lines().filter(|line| line.starts_with("export "));
    let root: Vec<&str> = exports.collect();
    let root = format!("{inside}\n{}", root.join("\n"));
    let kim = format!("{root}\nexport ETCDCTL_CERT=kim.pem ETCDCTL_KEY=kim.key");
    let is_healthy = |net: &Net| {
        let script = format!("{root}\netcdctl endpoint health");
        let output = net.db.output(Command::new("sh").args(["-c", &script]));
        output.status.success()
    };
    let server = Server::start(&net, &format!("{inside}\n{etcd}"));
    assert!(wait_until(|| is_healthy(&net)), "etcd does not get healthy");
    shell(&net, &format!("{inside}\n{rights}"));
    for script in [files, documents] {
        shell(&net, &format!("{inside}\n{script}"));
    }
    net.write_policy(&policy_of(&net, PAGE));
    net.start();
    let server = RefCell::new(Some(server));
    type_commands(&mut net, PAGE, &kim, |net, command| match command {
        "echo 'rules: []' | etcdctl put /filter-agent/v1/rules/orders" => {
            shell(net, &format!("{root}\n{backup}"));
        }
        "etcdctl get --print-value-only /filter-agent/v1/rules/orders" => {
            server.take();
            shell(net, &format!("{inside}\nexport ETCDCTL_API=3\n{restore}"));
            let restored = etcd.replace("fleet-1", "fleet-2");
            server.replace(Some(Server::start(net, &format!("{inside}\n{restored}"))));
            assert!(wait_until(|| is_healthy(net)), "etcd is not restored");
        }
        _ => {}
    });
}
