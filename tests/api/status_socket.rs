//! The status socket: passed as systemd passes it, for the members of a group, who only read.

use std::{
    fs::{self, Permissions},
    io::Write as _,
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    path::PathBuf,
    process::{Command, Output},
};

use filter_agent::control;
use filter_tests::net::{
    ALLOWED4, Connection, DB4, DENIED4, Net, Protected, agent_binary, dedicated, policy, wait_until,
};
use nix::unistd::{Gid, chown};
use rustix::process::{Resource, getrlimit, setrlimit};

use crate::http::{ask_at, send};

/// Of no group of this host.
const GROUP: u32 = 64_202;
/// A user who is nobody.
const USER: u32 = 65_534;

const PORT: u16 = 5432;

/// An agent whose status socket was made and passed by systemd's own tool.
pub struct Passed {
    pub net: Net,
    pub socket: PathBuf,
}

impl Passed {
    pub fn start(name: &str) -> Self {
        let mut net = Net::new(name);
        let orders = dedicated("orders", PORT, &["203.0.113.10/32"], "");
        net.write_policy(&policy("eth0", "native", &[orders]));
        net.watch(&[Protected::tcp(PORT, &["203.0.113.10/32"])]);
        let socket = net.dir().join("status.sock");
        let script = net.dir().join("pass");
        let agent = agent_binary().display();
        let listen = format!(
            "systemd-socket-activate --fdname=status --listen={}",
            socket.display()
        );
        let text = format!(
            "#!/bin/sh\n[ \"$1\" = run ] || exec {agent} \"$@\"\nexec {listen} {agent} \"$@\"\n"
        );
        fs::write(&script, text).unwrap();
        fs::set_permissions(&script, Permissions::from_mode(0o755)).unwrap();
        net.binary = script;
        net.spawn(&[]);
        assert!(wait_until(|| socket.exists()));
        chown(&socket, None, Some(Gid::from_raw(GROUP))).unwrap();
        fs::set_permissions(&socket, Permissions::from_mode(0o660)).unwrap();
        // It starts the agent with the first connection.
        drop(UnixStream::connect(&socket).unwrap());
        net.wait_for_line("enforcing ");
        Self { net, socket }
    }

    /// A command of an ordinary user's, who is in the group or not.
    fn by_user(&self, is_member: bool, arguments: &[&str]) -> Output {
        let mut command = Command::new("setpriv");
        command.args([&format!("--reuid={USER}"), &format!("--regid={USER}")]);
        match is_member {
            true => command.arg(format!("--groups={GROUP}")),
            false => command.arg("--clear-groups"),
        };
        let inner = self.net.agent_command(arguments);
        command.arg(inner.get_program()).args(inner.get_args());
        command.current_dir(self.net.dir());
        if let "status" | "rules" | "regions" | "explain" | "drops" = arguments[0] {
            command.arg("--status-socket").arg(&self.socket);
        }
        self.net.db.output(&mut command)
    }
}

#[test]
fn members_of_the_group_read_and_change_nothing_and_others_do_neither() {
    let passed = Passed::start("status-socket");
    let reads: [&[&str]; 7] = [
        &["status"],
        &["status", "--brief"],
        &["status", "--enforced"],
        &["rules"],
        &["regions"],
        &["explain", "203.0.113.10"],
        &["drops"],
    ];
    for arguments in reads {
        let member = passed.by_user(true, arguments);
        let error = String::from_utf8(member.stderr).unwrap();
        assert!(member.status.success(), "{arguments:?}: {error}");
        let same = passed.net.agent(arguments);
        let first = |output: &[u8]| -> String {
            let text = String::from_utf8_lossy(output);
            let line = text.lines().next().unwrap_or_default();
            line.chars().filter(|c| !c.is_ascii_digit()).collect()
        };
        assert_eq!(first(&member.stdout), first(&same.stdout), "{arguments:?}");
    }
    for arguments in [&["rules"][..], &["status"]] {
        let other = passed.by_user(false, arguments);
        assert_eq!(other.status.code(), Some(1));
        let error = String::from_utf8(other.stderr).unwrap();
        assert_eq!(error.lines().count(), 1, "{error}");
        for part in [
            "only root may use",
            &format!("the group {GROUP}"),
            "status.sock",
        ] {
            assert!(error.contains(part), "{part}: {error}");
        }
    }
    let changes: [&[&str]; 5] = [
        &["plan"],
        &["reload"],
        &["allow", "orders", "198.51.100.7", "--for", "1h"],
        &["trace", "198.51.100.7"],
        &["detach", "--yes"],
    ];
    for arguments in changes {
        let member = passed.by_user(true, arguments);
        assert_eq!(member.status.code(), Some(1), "{arguments:?}");
        let error = String::from_utf8(member.stderr).unwrap();
        assert!(error.contains("only root may use"), "{error}");
    }
    let orders = (DB4, PORT).into();
    assert_eq!(
        passed.net.connect(DENIED4.into(), orders),
        Connection::Silence
    );
}

#[test]
fn status_socket_answers_what_is_marked_for_it_and_refuses_all_else_in_one_line() {
    let passed = Passed::start("status-routes");
    let ask = |request: &str| ask_at(&passed.socket, request, &[], "");
    let mut answered = 0;
    let routes = control::listed();
    for route in &routes {
        let query = if route.path.ends_with("/explain") {
            "?source=203.0.113.10"
        } else {
            ""
        };
        let path = route
            .path
            .replace("{database}", "orders")
            .replace("{id}", "file-203.0.113.10_32");
        for method in ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"] {
            let answer = ask(&format!("{method} {path}{query}"));
            let of_path = routes.iter().filter(|other| other.path == route.path);
            let is_read = of_path
                .clone()
                .any(|other| other.is_for_group && other.method.as_str() == method);
            if is_read {
                assert_eq!((method, answer.status), ("GET", 200), "{path}: {answer:?}");
                answered += 1;
                continue;
            }
            let is_for_nobody = of_path.clone().all(|other| !other.is_for_group);
            let expected = if is_for_nobody { 403 } else { 405 };
            assert_eq!(answer.status, expected, "{method} {path}: {answer:?}");
            assert_eq!(answer.error().lines().count(), 1);
        }
    }
    assert!(answered >= 10, "{answered}");
    for secret in [
        "plan",
        "trace",
        "events",
        "reload",
        "temporary",
        "detach",
        "refresh",
    ] {
        let answer = ask(&format!("GET /v1/{secret}"));
        assert_eq!(answer.status, 403, "{secret}: {answer:?}");
    }
    assert_eq!(ask("GET /v1/nothing").status, 404);
    let metrics = ask("GET /metrics");
    assert!(metrics.body.contains("filter_agent_"), "{metrics:?}");
    // Nothing was done of what was asked for.
    let rules = passed.net.agent_json(&["rules"]);
    assert_eq!(rules["rules"].as_array().unwrap().len(), 1, "{rules}");
    let orders = (DB4, PORT).into();
    assert_eq!(
        passed.net.connect(ALLOWED4.into(), orders),
        Connection::Refused
    );
}

#[test]
fn thousand_connections_of_a_member_hold_up_no_command_of_roots() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
    let passed = Passed::start("status-thousand");
    let net = &passed.net;
    let descriptors = || {
        let directory = format!("/proc/{}/fd", net.agent_pid());
        fs::read_dir(directory).unwrap().count()
    };
    let before = descriptors();
    let client = |n: usize| {
        let mut client = UnixStream::connect(&passed.socket).unwrap();
        let text: &[u8] = match n % 3 {
            0 => b"",
            1 => b"GET /v1/status HT",
            _ => b"GET /v1/regions HTTP/1.1\r\nHost: a\r\n\r\n",
        };
        client.set_nonblocking(true).unwrap();
        client.write_all(text).unwrap();
        client
    };
    let clients: Vec<UnixStream> = (0..1000).map(client).collect();
    // Those that wait take none of the agent's descriptors.
    for _ in 0..3 {
        net.agent_text(&["status"]);
        net.agent_text(&["allow", "orders", "192.0.2.7", "--for", "1h"]);
        net.agent_text(&["revoke", "orders", "192.0.2.7"]);
        let now = descriptors();
        assert!(now < before + 16 + 32 + 16, "{before}, then {now}");
    }
    drop(clients);
    // Members are served again.
    let served =
        || send(&passed.socket, b"GET /v1/status HTTP/1.0\r\n\r\n").starts_with("HTTP/1.0 200 ");
    assert!(wait_until(served));
}

/// It is the service manager's: an agent that made it anew would take it from the group.
#[test]
fn status_socket_outlasts_the_agent_and_no_other_descriptor_is_taken_for_it() {
    let mut passed = Passed::start("status-stays");
    passed.net.terminate();
    assert!(passed.socket.exists());
    // Under another name it is none.
    let script = fs::read_to_string(&passed.net.binary).unwrap();
    let other = passed.net.dir().join("other.sock");
    let script = script
        .replace("--fdname=status", "--fdname=other")
        .replace("status.sock", "other.sock");
    fs::write(&passed.net.binary, script).unwrap();
    passed.net.spawn(&[]);
    assert!(wait_until(|| other.exists()));
    drop(UnixStream::connect(&other).unwrap());
    passed.net.wait_for_line("enforcing ");
    let mut unanswered = UnixStream::connect(&other).unwrap();
    unanswered
        .write_all(b"GET /v1/status HTTP/1.0\r\n\r\n")
        .unwrap();
    passed.net.agent_text(&["status"]);
    unanswered.set_nonblocking(true).unwrap();
    let mut read = [0];
    let error = std::io::Read::read(&mut unanswered, &mut read).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
}
