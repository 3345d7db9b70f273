//! Clients of the control socket that do harm, disks that hang, and hosts that run out: what they delay, and
//! that they stop nothing.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr},
    os::unix::net::{UnixDatagram, UnixStream},
    process::{Command, Stdio},
};

use filter_tests::mounts::Mounted;
use filter_tests::net::{
    ALLOWED4, Connection, DB4, DENIED4, Net, Protected, dedicated, policy, wait, wait_until,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

const PORT: u16 = 5432;

const ALLOWED: [&str; 1] = ["203.0.113.10/32"];

/// Connections that the control socket serves at a time.
const MAX_CONNECTIONS: usize = 32;

fn start(name: &str) -> Net {
    let orders = dedicated("orders", PORT, &ALLOWED, "");
    let policy = policy("eth0", "native", &[orders]);
    Net::enforcing(name, &[Protected::tcp(PORT, &ALLOWED)], &policy)
}

fn connects(net: &Net, source: IpAddr) -> bool {
    let database = SocketAddr::new(DB4.into(), PORT);
    matches!(net.connect(source, database), Connection::Accepted)
}

/// Clients that connect, send the beginning of a request, and go on holding the connection.
fn silent_clients(net: &Net, count: usize) -> Vec<UnixStream> {
    let client = |_| {
        let mut client = UnixStream::connect(net.socket()).unwrap();
        client.set_nonblocking(true).unwrap();
        client.write_all(b"GET /status HT").unwrap();
        client
    };
    (0..count).map(client).collect()
}

/// Fault B15.
#[test]
fn clients_that_say_nothing_keep_nobody_out_for_long() {
    let net = start("silent");
    let clients = silent_clients(&net, 2 * MAX_CONNECTIONS);
    net.agent_text(&["status", "--verify"]);
    drop(clients);
}

/// Faults B15 and D11.
#[test]
fn descriptors_that_run_out_stop_neither_checks_nor_repairs() {
    let mut net = start("descriptors");
    let _listener = net.listen(PORT);
    let pid = net.agent_pid().to_string();
    // What it has open, the connections that it serves, and a few to attach with.
    let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let most = open + MAX_CONNECTIONS + 8;
    let mut limit = Command::new("prlimit");
    let limit = limit
        .args(["--pid", &pid, &format!("--nofile={most}:{most}")])
        .status()
        .unwrap();
    assert!(limit.success());
    let _clients = silent_clients(&net, 3 * MAX_CONNECTIONS);
    net.db.ip("link delete eth0");
    net.watch(&[]);
    net.make_pair();
    net.wait_for_line("attached to eth0");
    net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
    assert!(connects(&net, ALLOWED4.into()));
    assert!(!connects(&net, DENIED4.into()));
    net.agent_text(&["status", "--verify"]);
}

#[test]
fn requests_that_are_none_are_refused_and_harm_nobody() {
    let net = start("requests");
    let answer = |request: &[u8]| {
        let mut client = UnixStream::connect(net.socket()).unwrap();
        let _ = client.write_all(request);
        let mut answer = Vec::new();
        let _ = client.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    };
    let long = format!(
        "GET /status?{} HTTP/1.1\r\nhost: x\r\n\r\n",
        "a".repeat(1 << 20)
    );
    let headers = format!("GET /status HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(10_000));
    for request in [
        "\0\0\0\0\r\n\r\n",
        &long,
        &headers,
        "GET / HTTP/1.1\r\n\r\n",
    ] {
        let answer = answer(request.as_bytes());
        assert!(!answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    net.agent_text(&["status", "--verify"]);
}

/// Starts an agent, lets its state directory hang, reloads with these rules and this field of the database, and
/// runs the rest of the test.
fn with_hung_disk(name: &str, rules: &[&str], field: &str, test: impl FnOnce(&mut Net)) {
    let mut net = start(name);
    net.wait_until_confirmed();
    let state = net.state_dir();
    let hung = Mounted::hanging(&state);
    let database = dedicated("orders", PORT, rules, field);
    net.reload(&policy("eth0", "native", &[database]));
    test(&mut net);
    drop(hung);
}

/// Fault B6: the end waited for a write to disk that hung.
#[test]
fn disk_that_hangs_does_not_keep_the_agent_from_ending() {
    with_hung_disk("hung-disk", &["198.51.100.0/24"], "", |net| {
        net.signal(Signal::SIGTERM);
        let status = net.wait_for_exit();
        assert!(status.success(), "{status}");
    });
}

/// The filter is checked and attached again while a write to disk hangs.
#[test]
fn disk_that_hangs_delays_no_repair_and_no_answer() {
    with_hung_disk("slow-disk", &ALLOWED, "monitor: false", |net| {
        net.db.ip("link delete eth0");
        net.make_pair();
        net.wait_for_line("attached to eth0");
        assert!(wait_until(|| {
            let status = net.agent_json(&["status"]);
            status["errors"] == serde_json::json!([])
        }));
    });
}

/// Guarantee 11: a service manager that read nothing stopped the agent's only thread.
#[test]
fn service_manager_that_reads_nothing_stops_nothing() {
    let net = Net::new("deaf-manager");
    net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
    net.write_policy(&policy(
        "eth0",
        "native",
        &[dedicated("orders", PORT, &ALLOWED, "")],
    ));
    let path = net.dir().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    let filler = UnixDatagram::unbound().unwrap();
    filler.set_nonblocking(true).unwrap();
    while filler.send_to(b"full", &path).is_ok() {}
    let mut command = net.agent_command(&["run"]);
    command.env("NOTIFY_SOCKET", &path).stderr(Stdio::null());
    let mut agent = net.db.run(|| command.spawn().unwrap());
    assert!(wait_until(|| net.agent(&["status"]).status.success()));
    net.agent_text(&["reload"]);
    net.db.ip("link delete eth0");
    net.make_pair();
    assert!(wait_until(|| net.agent(&["status"]).status.success()));
    let pid = Pid::from_raw(i32::try_from(agent.id()).unwrap());
    kill(pid, Signal::SIGTERM).unwrap();
    assert!(wait(&mut agent).expect("the agent ends").success());
    drop(manager);
}
