//! The log's lines in the journal, with their levels and fields; and lines that others can cause, which are limited.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr},
    os::unix::{
        fs::MetadataExt as _,
        net::{UnixDatagram, UnixStream},
    },
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
};

use filter_common::LAYOUT;
use filter_tests::{
    frames::{Packet, Protocol},
    net::{
        ALLOWED4, Connection, DB4, DENIED4, Net, PATIENCE, addressing, dedicated, policy, succeed,
        wait_until,
    },
};

const PORT: u16 = 5432;
const ERROR: &str = "3";
const WARNING: &str = "4";
const NOTICE: &str = "5";

/// A message to the journal: fields by their names, each with all its values.
type Message = BTreeMap<String, Vec<String>>;

/// As of the native protocol of systemd-journald.
fn parse(mut bytes: &[u8]) -> Message {
    let mut message = Message::new();
    while let Some(end) = bytes.iter().position(|&byte| byte == b'\n') {
        let line = String::from_utf8(bytes[..end].to_vec()).unwrap();
        bytes = &bytes[end + 1..];
        let (name, value) = match line.split_once('=') {
            Some((name, value)) => (name.to_owned(), value.to_owned()),
            None => {
                let (length, rest) = bytes.split_first_chunk().unwrap();
                let (value, rest) = rest.split_at(u64::from_le_bytes(*length) as usize);
                bytes = &rest[1..];
                (line, String::from_utf8(value.to_vec()).unwrap())
            }
        };
        message.entry(name).or_default().push(value);
    }
    message
}

/// An agent whose stderr is the journal's, which the test reads.
struct Journaled {
    child: Child,
    messages: Receiver<Message>,
    read: Vec<Message>,
}

impl Journaled {
    fn start(net: &Net) -> Self {
        let place = net.dir().join("journal");
        fs::create_dir(&place).unwrap();
        let socket = UnixDatagram::bind(place.join("socket")).unwrap();
        let (sender, messages) = mpsc::channel();
        thread::spawn(move || {
            let mut buffer = vec![0; 1 << 20];
            while let Ok(length) = socket.recv(&mut buffer) {
                // The library begins with an empty one, to learn whether a journal is there.
                if length > 0 && sender.send(parse(&buffer[..length])).is_err() {
                    return;
                }
            }
        });
        let stderr = File::create(net.dir().join("stderr")).unwrap();
        let metadata = stderr.metadata().unwrap();
        let agent = net.agent_command(&["run"]);
        // In a mount namespace of its own this journal has the place of the host's.
        let script = "mount -t tmpfs run /run && mkdir -p /run/systemd/journal \
                      && mount --bind \"$0\" /run/systemd/journal && exec \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", script]).arg(&place);
        command.arg(agent.get_program()).args(agent.get_args());
        let stream = format!("{}:{}", metadata.dev(), metadata.ino());
        command.env("JOURNAL_STREAM", stream);
        command.stdin(Stdio::null()).stderr(stderr);
        let child = net.db.run(|| command.spawn().unwrap());
        let mut journaled = Self {
            child,
            messages,
            read: Vec::new(),
        };
        journaled.wait("enforcing ");
        journaled
    }

    /// The next message that begins so.
    #[track_caller]
    fn wait(&mut self, beginning: &str) -> Message {
        loop {
            let Ok(message) = self.messages.recv_timeout(PATIENCE) else {
                panic!("no message {beginning}: {:#?}", self.read);
            };
            self.read.push(message.clone());
            if message["MESSAGE"][0].starts_with(beginning) {
                return message;
            }
        }
    }

    #[track_caller]
    fn expect(&mut self, beginning: &str, priority: &str, fields: &[(&str, &str)]) {
        let message = self.wait(beginning);
        assert_eq!(message["PRIORITY"], [priority], "{message:#?}");
        let known = [
            "DATABASE",
            "REGION",
            "RULE",
            "PREFIX",
            "REASON",
            "INTERFACE",
        ];
        let found = message
            .iter()
            .filter(|(name, _)| known.contains(&name.as_str()));
        let found: BTreeMap<&str, String> = found
            .map(|(name, values)| (name.as_str(), values.join(" ")))
            .collect();
        let fields = fields.iter().map(|&(name, value)| (name, value.to_owned()));
        assert_eq!(found, fields.collect(), "{message:#?}");
    }
}

impl Drop for Journaled {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn write_list(list: &Path, prefixes: &str) {
    let next = list.with_extension("next");
    fs::write(&next, prefixes).unwrap();
    fs::rename(next, list).unwrap();
}

/// The database `orders`, open to one client and to the region `office`.
fn orders(list: &Path, reset: &str) -> String {
    let orders = dedicated("orders", PORT, &["203.0.113.10/32"], reset);
    let orders = orders.replace("}]", "}, {region: office}]");
    let regions = format!("regions: {{office: {{file: {}}}}}\n", list.display());
    regions + &policy("eth0", "native", &[orders])
}

#[test]
fn lines_in_the_journal_have_levels_and_fields() {
    let net = Net::new("journal");
    let list = net.dir().join("list");
    write_list(&list, "192.0.2.0/24\n");
    net.write_policy(&orders(&list, ""));
    let mut journal = Journaled::start(&net);
    let attached = &journal.read[0];
    assert_eq!(attached["INTERFACE"], ["eth0"], "{attached:#?}");
    let _echo = net.echo(PORT);

    write_list(&list, "192.0.2.0/24\n198.51.100.0/24\n2001:db8::/64\n");
    let fields = [
        ("REGION", "office"),
        ("PREFIX", "198.51.100.0/24 2001:db8::/64"),
    ];
    journal.expect("region office: 2 added", NOTICE, &fields);
    write_list(&list, "no prefix\n");
    journal.expect("region office: ", WARNING, &[("REGION", "office")]);
    write_list(&list, "192.0.2.0/24\n198.51.100.0/24\n2001:db8::/64\n");
    journal.expect(
        "region office: answers again",
        NOTICE,
        &[("REGION", "office")],
    );

    net.agent_text(&["allow", "orders", "10.9.9.9", "--for", "1s"]);
    let mut fields = vec![
        ("DATABASE", "orders"),
        ("PREFIX", "10.9.9.9/32"),
        ("REASON", "allowed"),
    ];
    journal.expect(
        "database orders: 10.9.9.9/32 allowed until ",
        NOTICE,
        &fields,
    );
    fields = vec![
        ("DATABASE", "orders"),
        ("RULE", "10.9.9.9/32"),
        ("REASON", "ended"),
    ];
    journal.expect(
        "database orders: temporary rule 10.9.9.9/32 has ended",
        NOTICE,
        &fields,
    );

    // An open connection that a block cuts off.
    let _stream = net.client.run(|| {
        let socket = filter_tests::net::bound(ALLOWED4.into());
        let at = SocketAddr::new(IpAddr::V4(DB4), PORT);
        socket.connect(&at.into()).unwrap();
        let mut stream = std::net::TcpStream::from(socket);
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();
        stream
    });
    net.agent_text(&["block", "orders", "203.0.113.10", "--for", "1h"]);
    fields = vec![
        ("DATABASE", "orders"),
        ("PREFIX", "203.0.113.10/32"),
        ("REASON", "blocked"),
    ];
    journal.expect(
        "database orders: 203.0.113.10/32 blocked until ",
        NOTICE,
        &fields,
    );
    fields = vec![
        ("DATABASE", "orders"),
        ("RULE", "203.0.113.10/32"),
        ("PREFIX", "203.0.113.10"),
        ("REASON", "cut-off"),
    ];
    journal.expect(
        "database orders: 1 connection of 203.0.113.10",
        WARNING,
        &fields,
    );

    let pins = fs::read_dir(net.bpffs().join(format!("filter-agent/v{LAYOUT}"))).unwrap();
    let mut pins = pins.map(|entry| entry.unwrap().path());
    let link = pins.find(|pin| pin.to_str().unwrap().contains("link_"));
    // Until it is put back anybody gets in.
    net.watch(&[]);
    let mut detach = Command::new("bpftool");
    succeed(detach.args(["link", "detach", "pinned"]).arg(link.unwrap()));
    let fields = [("INTERFACE", "eth0")];
    journal.expect("the filter was taken off eth0", WARNING, &fields);
    journal.expect("attached to eth0", NOTICE, &fields);
    net.write_policy("databases: 7");
    net.agent_error(&["reload"]);
    journal.expect("reload refused", ERROR, &[]);
    // All went to the journal, and nothing elsewhere.
    assert_eq!(fs::read_to_string(net.dir().join("stderr")).unwrap(), "");
}

/// For whoever ships the journal elsewhere: each change is a line, with who made it.
#[test]
fn each_change_is_a_line_with_its_number_and_who_made_it() {
    let net = Net::new("journal-changes");
    let policy = |prefix: &str| {
        policy(
            "eth0",
            "native",
            &[dedicated("orders", PORT, &[prefix], "")],
        )
    };
    net.write_policy(&policy("203.0.113.10/32"));
    let mut journal = Journaled::start(&net);
    let of = |message: &Message| -> Vec<String> {
        let names = ["CHANGE", "ORIGIN", "BY_UID", "BY_LOGIN_UID", "BY_COMMAND"];
        let value = |name: &&str| {
            message
                .get(*name)
                .map_or("-".to_owned(), |value| value.join(" "))
        };
        names.iter().map(value).collect()
    };
    assert_eq!(
        of(journal.read.last().unwrap()),
        ["1", "start", "-", "-", "-"]
    );
    net.write_policy(&policy("203.0.113.0/24"));
    // As root who logged in as somebody else.
    let reload = net.agent_command(&["reload"]);
    let mut shell = Command::new("sh");
    shell.args(["-c", "echo 1234 > /proc/self/loginuid && exec \"$@\"", "sh"]);
    shell.arg(reload.get_program()).args(reload.get_args());
    assert!(net.db.output(&mut shell).status.success());
    let expected = ["2", "reload", "0", "1234", "filter-agent"];
    assert_eq!(of(&journal.wait("enforcing ")), expected);
    net.agent_text(&["allow", "orders", "10.9.9.9", "--for", "1s"]);
    let allowed = of(&journal.wait("database orders: 10.9.9.9/32 allowed until "));
    assert_eq!(allowed[..3], ["3", "socket", "0"]);
    assert_eq!(allowed[4], "filter-agent");
    let ended = journal.wait("database orders: temporary rule 10.9.9.9/32 has ended");
    assert_eq!(of(&ended), ["4", "time", "-", "-", "-"]);
    net.agent_text(&["detach", "--yes"]);
    let detached = of(&journal.wait("detached from eth0; change 5 by uid 0"));
    assert_eq!(detached[..3], ["5", "socket", "0"]);
}

#[test]
fn outsiders_cause_few_lines() {
    const CHANGES: usize = 40;
    let mut net = Net::new("journal-flood");
    net.fix_neighbours();
    let list = net.dir().join("list");
    write_list(&list, "192.0.2.0/24\n");
    net.write_policy(&orders(&list, ""));
    net.start();
    let _listener = net.listen(PORT);
    // Packets, and connections to the control socket that ask for nothing or for what is not there.
    let wire = net.wire();
    for number in 0..2000 {
        let denied = addressing(DENIED4.into(), PORT, Protocol::Tcp);
        wire.send(&Packet::new(&denied, number).frame());
    }
    for number in 0..100 {
        let mut client = UnixStream::connect(net.socket()).unwrap();
        let request = match number % 4 {
            0 => "",
            1 => "GET /nothing HTTP/1.1\r\nhost: x\r\n\r\n",
            2 => "\0\u{1b}[31m nonsense\r\n\r\n",
            _ => "GET /v1/drops?source=nonsense HTTP/1.1\r\nhost: x\r\n\r\n",
        };
        let _ = client.write_all(request.as_bytes());
        if number % 4 != 0 {
            let _ = client.read_to_string(&mut String::new());
        }
    }
    // A source of a region that changes all the time.
    for number in 0..CHANGES {
        let prefix = format!("192.0.2.{number}/32");
        write_list(&list, &prefix);
        let in_force = || net.agent_json(&["regions"]).to_string().contains(&prefix);
        assert!(wait_until(in_force), "{prefix}");
    }
    // What is not limited is there.
    net.agent_text(&["allow", "orders", "198.51.100.7", "--for", "1h"]);
    net.wait_for_line("database orders: 198.51.100.7/32 allowed");
    let at = SocketAddr::new(IpAddr::V4(DB4), PORT);
    assert_eq!(net.connect(ALLOWED4.into(), at), Connection::Accepted);
    net.agent_text(&["revoke", "orders", "198.51.100.7"]);
    net.terminate();
    let changes = net
        .log
        .iter()
        .filter(|line| line.starts_with("region office: "));
    let changes = changes.filter(|line| !line.ends_with("left out")).count();
    assert!((5..=30).contains(&changes), "{:#?}", net.log);
    // The start, the attachment, the temporary rule twice, the end.
    let others = net
        .log
        .iter()
        .filter(|line| !line.starts_with("region office: "));
    assert_eq!(others.count(), 5, "{:#?}", net.log);
}
