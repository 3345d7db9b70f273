//! The live view, by a real agent in a real terminal: tmux.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread,
};

use filter_tests::net::{
    ALLOWED4, Connection, DB4, DENIED4, Net, agent_binary, dedicated, policy, wait_until,
};
use nix::{
    libc::pid_t,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

const PORT: u16 = 5432;

/// A shell in a terminal of tmux.
struct Terminal {
    socket: PathBuf,
    /// File of all that was written to the terminal.
    written: PathBuf,
}

impl Terminal {
    fn start(net: &Net, columns: u16, lines: u16) -> Self {
        let terminal = Self {
            socket: net.dir().join("tmux.sock"),
            written: net.dir().join("written"),
        };
        let size = [columns.to_string(), lines.to_string()];
        let mut start = terminal.command(&["-f", "/dev/null", "new-session", "-d"]);
        start.args(["-x", &size[0], "-y", &size[1], "sh"]);
        start.env_remove("TMUX").env_remove("NO_COLOR");
        let output = start.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let pipe = format!("cat > {}", terminal.written.display());
        terminal.tmux(&["pipe-pane", "-o", &pipe]);
        terminal.wait("the prompt", is_prompt);
        terminal
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("tmux");
        command
            .arg("-u")
            .arg("-S")
            .arg(&self.socket)
            .args(arguments);
        command
    }

    fn tmux(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// A line of the shell.
    fn enter(&self, line: &str) {
        self.tmux(&["send-keys", "-l", line]);
        self.keys(&["Enter"]);
    }

    fn keys(&self, keys: &[&str]) {
        self.tmux(&[&["send-keys"], keys].concat());
    }

    fn screen(&self) -> String {
        self.tmux(&["capture-pane", "-p"])
    }

    /// Waits for what the screen must show, and returns the screen.
    #[track_caller]
    fn wait(&self, what: &str, shows: impl Fn(&str) -> bool) -> String {
        let mut screen = String::new();
        let is_shown = wait_until(|| {
            screen = self.screen();
            shows(&screen)
        });
        assert!(is_shown, "the screen does not show {what}:\n{screen}");
        screen
    }

    #[track_caller]
    fn wait_for(&self, words: &str) -> String {
        self.wait(words, |screen| screen.contains(words))
    }

    /// Whether a program draws on the other screen of the terminal, and whether the cursor is shown.
    fn state(&self) -> String {
        let state = self.tmux(&["display-message", "-p", "#{alternate_on} #{cursor_flag}"]);
        state.trim().into()
    }

    /// Waits until the shell has its terminal back: the first screen, the cursor, and a line discipline that echoes.
    #[track_caller]
    fn wait_until_restored(&self, status: &str) {
        let marker = format!("ended {status}");
        self.wait(&marker, |screen| screen.lines().any(|line| line == marker));
        assert_eq!(self.state(), "0 1");
        self.enter("stty -a");
        let settings = self.wait_for("echoke");
        for setting in ["icanon", "isig", "echo", "opost", "icrnl"] {
            let is_set = settings.split_whitespace().any(|word| word == setting);
            assert!(is_set, "{setting} is not set:\n{settings}");
        }
        self.enter("clear");
        self.wait("only the prompt", is_prompt);
    }

    /// Everything that was written until a view ended with success.
    fn written(&self) -> String {
        let mut written = String::new();
        let is_whole = wait_until(|| {
            let bytes = fs::read(&self.written).unwrap();
            written = String::from_utf8_lossy(&bytes).into_owned();
            written.contains("ended 0")
        });
        assert!(is_whole, "{written}");
        written
    }

    /// The process that the shell waits for.
    fn child(&self) -> Pid {
        let shell = self.tmux(&["display-message", "-p", "#{pane_pid}"]);
        let shell = shell.trim();
        let children = fs::read_to_string(format!("/proc/{shell}/task/{shell}/children"));
        let child: pid_t = children.unwrap().trim().parse().unwrap();
        Pid::from_raw(child)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.command(&["kill-server"]).output();
    }
}

/// The view's line of the shell, which prints its exit status at the end.
fn line(net: &Net) -> String {
    line_at(&net.socket())
}

fn line_at(socket: &Path) -> String {
    let (agent, socket) = (agent_binary().display(), socket.display());
    format!("{agent} top --interval 200ms --socket {socket}; echo ended $?")
}

/// Whether there is nothing but the prompt of the shell, for root or others.
fn is_prompt(screen: &str) -> bool {
    matches!(screen.trim(), "#" | "$")
}

fn has(screen: &str, words: &[&str]) -> bool {
    screen
        .lines()
        .any(|line| words.iter().all(|word| line.contains(word)))
}

fn get(net: &Net, path: &str) -> Value {
    serde_json::from_str(&ask(&net.socket(), path)).unwrap()
}

/// The body of an answer.
fn ask(socket: &Path, path: &str) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: filter-agent\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200"), "{answer}");
    body.into()
}

fn databases() -> String {
    let orders = dedicated("orders", PORT, &["203.0.113.10/32"], "");
    let orders = orders.replace("rules: [", "rules: [{region: office}, ");
    let stock = dedicated("stock", 5433, &["192.0.2.0/24"], "");
    policy("eth0", "auto", &[orders, stock])
}

fn started(name: &str) -> Net {
    let mut net = Net::new(name);
    let list = net.dir().join("office.txt");
    fs::write(&list, "198.51.100.200/32\n").unwrap();
    let regions = format!("regions: {{office: {{file: {}}}}}\n", list.display());
    net.write_policy(&(regions + &databases()));
    net.start();
    net
}

#[test]
fn refused_client_is_seen_and_allowed_in_the_view() {
    let net = started("top");
    let _listener = net.listen(PORT);
    let connect = |source| net.connect(source, (DB4, PORT).into());
    let terminal = Terminal::start(&net, 120, 40);
    terminal.enter(&line(&net));
    terminal.wait("databases and the log", |screen| {
        has(screen, &["orders", "tcp/5432"])
            && has(screen, &["stock", "tcp/5433"])
            && has(screen, &["info", "enforcing "])
            && has(screen, &["office", "good"])
            && screen.contains("no packet was dropped since the agent started")
    });
    assert_eq!(terminal.state(), "1 0");
    assert_eq!(connect(DENIED4.into()), Connection::Silence);
    assert_eq!(connect(ALLOWED4.into()), Connection::Accepted);
    terminal.wait("who is refused, and the rule that was hit", |screen| {
        let is_hit = |line: &str| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let hits = words.get(3).and_then(|hits| hits.parse::<u64>().ok());
            words.first() == Some(&"203.0.113.10/32") && hits > Some(0)
        };
        has(screen, &["198.51.100.7", "orders", "not-allowed"]) && screen.lines().any(is_hit)
    });

    terminal.keys(&["Tab", "a"]);
    terminal.wait_for("allow 198.51.100.7 to orders for 1 hour? [y/N]");
    terminal.keys(&["n"]);
    terminal.wait_for("198.51.100.7 was not allowed");
    assert_eq!(connect(DENIED4.into()), Connection::Silence);
    terminal.keys(&["a"]);
    terminal.wait_for("allow 198.51.100.7 to orders for 1 hour? [y/N]");
    terminal.keys(&["y"]);
    terminal.wait_for("database orders: 198.51.100.7/32 allowed until ");
    assert_eq!(connect(DENIED4.into()), Connection::Accepted);
    terminal.wait("the rule", |screen| {
        has(screen, &["198.51.100.7", "not-allowed", "allowed for 59m"])
            && has(screen, &["orders", "198.51.100.7/32", "top"])
    });
    let rules = net.agent_json(&["rules"]);
    let rules = rules["rules"].as_array().unwrap();
    let rule = rules
        .iter()
        .find(|rule| rule["origin"] == "temporary")
        .unwrap();
    assert_eq!(rule["label"], "top");
    assert!(rule["left"].as_u64() > Some(3000), "{rule}");

    // A refusal of the agent's is shown as it is.
    net.reload(&databases().replace("{region: office}, ", "").replace(
        "model: dedicated, force_tls: false, rules: [{cidr: '203.0.113.10/32'}]",
        "model: shared",
    ));
    terminal.keys(&["a"]);
    terminal.wait_for("allow 198.51.100.7 to orders for 1 hour? [y/N]");
    terminal.keys(&["y"]);
    terminal.wait_for("error: ");
    terminal.wait_for("shared");

    terminal.keys(&["d"]);
    terminal.wait("orders only", |screen| {
        screen.contains("only orders") && !has(screen, &["stock", "tcp/5433"])
    });
    terminal.keys(&["d"]);
    terminal.wait("stock only", |screen| {
        screen.contains("only stock") && !screen.contains("198.51.100.7 ")
    });
    terminal.keys(&["Escape"]);
    terminal.wait_for("all databases");
    terminal.tmux(&["resize-window", "-x", "80", "-y", "24"]);
    let screen = terminal.wait("all of it on 80x24", |screen| {
        let lines: Vec<&str> = screen.lines().collect();
        lines.len() == 24
            && lines[23].starts_with("q quit")
            && ["DATABASE", "REFUSED SOURCE", "RULE", "REGION", "EVENT"]
                .iter()
                .all(|title| screen.contains(title))
            && screen.contains("198.51.100.7")
    });
    assert!(
        screen.lines().all(|line| line.chars().count() <= 80),
        "{screen}"
    );
    terminal.keys(&["?"]);
    terminal.wait_for("q, Ctrl-C      quit");
    terminal.keys(&["x"]);
    terminal.wait_for("REFUSED SOURCE");
    terminal.keys(&["q"]);
    terminal.wait_until_restored("0");
    terminal.enter(&line(&net));
    terminal.wait_for("tcp/5432");
    terminal.keys(&["C-c"]);
    terminal.wait_until_restored("0");
}

#[test]
fn agent_that_hangs_or_is_gone_stops_nothing_and_comes_back() {
    let mut net = started("top-away");
    let terminal = Terminal::start(&net, 80, 24);
    terminal.enter(&line(&net));
    terminal.wait_for("enforced on eth0");
    net.signal(Signal::SIGSTOP);
    terminal.wait_for("no answer since ");
    terminal.keys(&["?"]);
    terminal.wait_for("q, Ctrl-C      quit");
    terminal.keys(&["x"]);
    terminal.wait("what was known", |screen| {
        has(screen, &["orders", "tcp/5432"]) && has(screen, &["no answer since "])
    });
    // The time limit of a request has passed.
    terminal.wait_for(": no answer on ");
    net.signal(Signal::SIGCONT);
    terminal.wait_for("enforced on eth0");
    net.kill();
    terminal.wait_for(": no agent answers on ");
    net.start();
    let pid = format!("pid {},", net.agent_pid());
    terminal.wait("the new agent", |screen| {
        screen.contains(&pid) && screen.contains("enforced on eth0")
    });
    kill(terminal.child(), Signal::SIGTERM).unwrap();
    terminal.wait_until_restored("0");
    // Begun before any agent.
    net.kill();
    terminal.enter(&line(&net));
    terminal.wait_for("no answer yet: no agent answers on ");
    net.start();
    terminal.wait_for("enforced on eth0");
    terminal.keys(&["q"]);
    terminal.wait_until_restored("0");
}

/// An agent behind a socket of its own, in whose answers the word is the same with escape sequences around it.
fn poisoned(net: &Net, word: &str) -> PathBuf {
    let (socket, agent) = (net.dir().join("poisoned.sock"), net.socket());
    let listener = UnixListener::bind(&socket).unwrap();
    let poison = format!("\\u001b]0;{word}\\u0007\\u001b[31m\\u009b2J");
    let word = word.to_owned();
    thread::spawn(move || {
        for client in listener.incoming() {
            let mut client = BufReader::new(client.unwrap());
            let mut request = String::new();
            while client
                .read_line(&mut request)
                .is_ok_and(|length| length > 2)
            {}
            // Without a request: the first connection, which tries whether it may.
            let Some(path) = request.split(' ').nth(1) else {
                continue;
            };
            let body = ask(&agent, path).replace(&word, &poison);
            let answer = format!(
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            );
            // A view that ended does not read it.
            let _ = client.get_mut().write_all(answer.as_bytes());
        }
    });
    socket
}

#[test]
fn control_characters_in_answers_are_written_out() {
    let net = started("top-escapes");
    fs::write(net.dir().join("office.txt"), "evil\n").unwrap();
    assert!(wait_until(
        || ask(&net.socket(), "/v1/events").contains("evil")
    ));
    net.agent_text(&[
        "allow",
        "orders",
        "192.0.2.7",
        "--for",
        "1h",
        "--label",
        "evil",
    ]);
    let socket = poisoned(&net, "evil");
    let terminal = Terminal::start(&net, 120, 40);
    terminal.enter(&line_at(&socket));
    let written_out = r"\u{1b}]0;evil\u{7}\u{1b}[31m\u{9b}2J";
    terminal.wait("label, error and log", |screen| {
        has(screen, &["orders", "192.0.2.7/32", written_out])
            && has(screen, &["office", "FAILED", "line 1"])
            && has(screen, &["warning: region office: ", written_out])
            && has(screen, &["Z warning region office: "])
    });
    terminal.keys(&["q"]);
    terminal.wait_until_restored("0");
    let written = terminal.written();
    assert!(written.contains("evil"), "{written}");
    assert!(!written.contains("\u{1b}]0;evil"), "{written}");
    assert!(!written.contains(['\u{7}', '\u{9b}']), "{written}");
}

#[test]
fn without_a_terminal_or_on_one_that_only_prints_it_refuses() {
    let net = started("top-refuses");
    let error = net.agent_error(&["top"]);
    assert!(
        error.starts_with("filter-agent: top draws on a terminal"),
        "{error}"
    );
    let terminal = Terminal::start(&net, 100, 24);
    for term in ["dumb", ""] {
        terminal.enter(&format!("TERM={term} {}", line(&net)));
        terminal.wait_for(&format!("and TERM is \"{term}\": use"));
        terminal.wait_until_restored("1");
    }
    // Without colours no colour is set.
    terminal.enter(&format!("NO_COLOR=1 {}", line(&net)));
    terminal.wait_for("enforced on eth0");
    fs::write(net.dir().join("office.txt"), "no prefix\n").unwrap();
    terminal.wait_for("FAILED");
    terminal.keys(&["q"]);
    terminal.wait_until_restored("0");
    let written = terminal.written();
    let is_colour = |code: &str| {
        let code = code.split('m').next().unwrap_or_default();
        code.split(';')
            .any(|part| matches!(part, "31" | "33" | "38"))
    };
    assert!(written.contains("FAILED"));
    assert!(
        !written.split("\u{1b}[").skip(1).any(is_colour),
        "{written:?}"
    );
}

#[test]
fn last_lines_of_the_log_are_answered_as_the_page_says() {
    let net = started("top-events");
    let events = get(&net, "/v1/events");
    let lines = events["events"].as_array().unwrap();
    let last = lines.last().unwrap();
    let fields = |value: &Value| -> Vec<String> {
        let names = value.as_object().unwrap().keys();
        names.cloned().collect()
    };
    assert_eq!(fields(&events), ["events", "since"]);
    assert_eq!(fields(last), ["at", "fields", "level", "number", "text"]);
    assert!(lines.iter().any(|line| {
        line["level"] == "info" && line["text"].as_str().unwrap().starts_with("enforcing ")
    }));
    let page = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/api.md")).unwrap();
    let (_, section) = page.split_once("\n## events\n").unwrap();
    let section = section.split("\n## ").next().unwrap();
    for field in [
        "since",
        "events[].number",
        "events[].at",
        "events[].level",
        "events[].text",
    ] {
        assert!(section.contains(&format!("`{field}`")), "{field}");
    }
    assert!(section.contains("`events[].fields.*`"));
    let number = last["number"].as_u64().unwrap();
    let none = get(&net, &format!("/v1/events?after={number}"));
    assert_eq!(none["events"], serde_json::json!([]));
    assert_eq!(none["since"], events["since"]);
    net.agent_text(&["reload"]);
    let newer = get(&net, &format!("/v1/events?after={number}"));
    let newer = newer["events"].as_array().unwrap();
    assert_eq!(newer[0]["number"], number + 1);
    let output: Output = Command::new(agent_binary())
        .args(["top", "--interval", "50ms"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}
