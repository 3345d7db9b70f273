//! Starts that are refused, and a command whose output nobody reads.

use std::{fs, io, process::Stdio};

use filter_tests::net::{Connection, DENIED4, Net, Protected, dedicated, policy};
use nix::{errno::Errno, sys::signal::Signal};

use crate::orders::{ALLOWED, DB, PORT, orders};

#[test]
fn second_agent_is_refused() {
    let mut net = Net::new("second");
    net.write_policy(&orders("native"));
    net.start();
    let line = net.refusal(&[]);
    assert!(line.contains("another"), "{line}");
    assert_eq!(net.agent_json(&["status"])["errors"], serde_json::json!([]));
}

#[test]
fn other_xdp_program_is_named_and_left_alone() {
    let mut net = Net::new("foreign");
    let _listener = net.listen(PORT);
    net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
    net.write_policy(&orders("native"));
    net.start();
    let status = net.agent_json(&["status"]);
    let program = status["interfaces"][0]["program_id"].as_u64().unwrap();
    // The filter of another BPF file system is nobody this agent knows.
    let stranger = Net::new("foreign-stranger");
    let bpffs = stranger.bpffs();
    let socket = stranger.socket();
    let line = net.refusal_elsewhere(&bpffs, &socket);
    assert!(
        line.contains("another XDP program") && line.contains("eth0"),
        "{line}"
    );
    assert!(line.contains(&program.to_string()), "{line}");
    let status = net.agent_json(&["status", "--verify"]);
    assert_eq!(status["errors"], serde_json::json!([]));
    assert_eq!(net.connect(DENIED4.into(), DB), Connection::Silence);
}

#[test]
fn interface_without_ethernet_is_refused() {
    let net = Net::new("tun");
    net.db.ip("tuntap add tun0 mode tun\nlink set tun0 up");
    net.write_policy(&policy(
        "eth0, tun0",
        "auto",
        &[dedicated("orders", PORT, &ALLOWED, "")],
    ));
    let line = net.refusal(&[]);
    assert!(line.contains("tun0") && line.contains("Ethernet"), "{line}");
    net.assert_detached("eth0");
}

#[test]
fn kernel_that_cannot_serve_is_refused_with_what_is_missing() {
    let net = Net::new("no-bpf");
    net.write_policy(&orders("auto"));
    let without = net.refusal_without_bpf(Errno::ENOSYS);
    assert!(without.contains("CONFIG_BPF_SYSCALL"), "{without}");
    let forbidden = net.refusal_without_bpf(Errno::EPERM);
    assert!(forbidden.contains("CAP_BPF"), "{forbidden}");
    let missing = net.dir().join("no-bpffs");
    let line = net.refusal_elsewhere(&missing, &net.socket());
    assert!(
        line.contains("no-bpffs") && line.contains("mount"),
        "{line}"
    );
    fs::create_dir(&missing).unwrap();
    let line = net.refusal_elsewhere(&missing, &net.socket());
    assert!(line.contains("mount -t bpf -o mode=700 bpf"), "{line}");
    net.assert_detached("eth0");
}

#[test]
fn run_without_root_is_refused() {
    let net = Net::new("rootless");
    net.write_policy(&orders("native"));
    let line = net.refusal_without_root();
    assert!(line.contains("root"), "{line}");
    net.assert_detached("eth0");
}

#[test]
fn directory_that_is_no_bpffs_is_refused() {
    let net = Net::new("no-bpffs");
    net.write_policy(&orders("native"));
    let line = net.refusal_elsewhere(net.dir(), &net.socket());
    assert!(
        line.contains("bpf") && line.contains(net.dir().to_str().unwrap()),
        "{line}"
    );
    net.assert_detached("eth0");
}

#[test]
fn output_that_nobody_reads_on_ends_the_command_quietly() {
    let mut net = Net::new("closed-pipe");
    net.write_policy(&orders("auto"));
    net.start();
    let policy = net.policy_path();
    let policy = policy.to_str().unwrap();
    for arguments in [
        &["check", policy, "--json"][..],
        &["check", policy],
        &["detach", "--yes"],
    ] {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let mut command = net.agent_command(arguments);
        command.stdout(writer).stderr(Stdio::piped());
        let output = command.spawn().unwrap().wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(128 + Signal::SIGPIPE as i32));
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    }
    assert!(net.wait_for_exit().success());
}
