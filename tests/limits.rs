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

/// Clients that connect, send this, and go on holding the connection.
fn clients_that_send(net: &Net, count: usize, text: &str) -> Vec<UnixStream> {
    let client = |_| {
        let mut client = UnixStream::connect(net.socket()).unwrap();
        client.set_nonblocking(true).unwrap();
        client.write_all(text.as_bytes()).unwrap();
        client
    };
    (0..count).map(client).collect()
}

/// The same with the beginning of a request.
fn silent_clients(net: &Net, count: usize) -> Vec<UnixStream> {
    clients_that_send(net, count, "GET /v1/status HT")
}

fn descriptors(net: &Net) -> usize {
    let directory = format!("/proc/{}/fd", net.agent_pid());
    fs::read_dir(directory).unwrap().count()
}

fn limit_descriptors(net: &Net, most: usize) {
    let mut limit = Command::new("prlimit");
    let pid = net.agent_pid().to_string();
    limit.args(["--pid", &pid, &format!("--nofile={most}:")]);
    assert!(limit.status().unwrap().success());
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
    // What it has open, the connections that it serves, and a few to attach with.
    limit_descriptors(&net, descriptors(&net) + MAX_CONNECTIONS + 8);
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

/// Fault B15: a script that leaks connections took every descriptor.
#[test]
fn clients_beyond_the_limit_of_connections_take_no_descriptors() {
    let net = start("connections");
    let before = descriptors(&net);
    let mut clients = silent_clients(&net, 3 * MAX_CONNECTIONS);
    let mut most = 0;
    assert!(wait_until(|| {
        most = most.max(descriptors(&net));
        let last = clients.last_mut().unwrap();
        matches!(last.read(&mut [0; 1024]), Ok(0))
    }));
    // A few that a check opens.
    let limit = before + MAX_CONNECTIONS + 16;
    assert!(most <= limit, "{before} before, {most} with the clients");
}

/// Faults B15 and D11: without a descriptor for netlink the checks saw nothing.
#[test]
fn agent_without_a_free_descriptor_says_what_is_not_filtered_and_filters_it_when_it_has_some() {
    let mut net = start("no-descriptor");
    let _listener = net.listen(PORT);
    limit_descriptors(&net, 3);
    net.db.ip("link delete eth0");
    net.watch(&[]);
    net.make_pair();
    net.wait_for_line("error: eth0 is not filtered: ");
    limit_descriptors(&net, 1024);
    net.wait_for_line("attached to eth0");
    net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
    assert!(connects(&net, ALLOWED4.into()));
    assert!(!connects(&net, DENIED4.into()));
}

/// Fault B15, after the head of a request.
#[test]
fn clients_that_send_no_body_keep_nobody_out_for_ever() {
    let net = start("no-body");
    let request = "POST /v1/plan?file=a HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n";
    let clients = clients_that_send(&net, MAX_CONNECTIONS, request);
    assert!(wait_until(|| net.agent(&["status"]).status.success()));
    drop(clients);
}

/// Fault B15, after the request.
#[test]
fn clients_that_do_not_read_the_answer_keep_nobody_out_for_ever() {
    // The answer is longer than what a socket holds.
    let prefixes: Vec<String> = (0..30_000)
        .map(|n| format!("11.{}.{}.{}/32", n / 10_000, n / 100 % 100, n % 100 * 2))
        .collect();
    let orders = format!(
        "{{name: orders, port: {PORT}, model: dedicated, force_tls: false, rules: [{{region: long}}]}}"
    );
    let region = format!(
        "regions: {{long: {{prefixes: [{}]}}}}\n",
        prefixes.join(", ")
    );
    let policy = policy("eth0", "native", &[orders]) + &region;
    let net = Net::enforcing("no-reader", &[], &policy);
    let request = "GET /v1/regions HTTP/1.1\r\nhost: x\r\n\r\n";
    let clients = clients_that_send(&net, MAX_CONNECTIONS, request);
    assert!(wait_until(|| net.agent(&["status"]).status.success()));
    drop(clients);
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
        "GET /v1/status?{} HTTP/1.1\r\nhost: x\r\n\r\n",
        "a".repeat(1 << 20)
    );
    let headers = format!(
        "GET /v1/status HTTP/1.1\r\n{}\r\n",
        "a: b\r\n".repeat(10_000)
    );
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
