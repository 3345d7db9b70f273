//! Pins that somebody removes under a running agent, and interfaces that vanish.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    os::unix::fs::chown,
};

use filter_agent::{
    clock::Clock,
    compile::{Compiled, compile},
    host::Interface,
    kernel::{difference::Difference, filter::Filter, links::is_gone},
    policy::{self, Mode},
    rules::Regions,
    temporary::Timed,
};
use filter_common::LAYOUT;
use filter_tests::{
    bpffs::Bpffs,
    net::{
        ALLOWED4, Connection, DB4, DENIED4, Net, Protected, dedicated, policy as policy_text,
        wait_until,
    },
};
use nix::sys::signal::Signal;
use serde_json::json;

const PORT: u16 = 5432;
const DB: SocketAddr = SocketAddr::new(IpAddr::V4(DB4), PORT);

fn compiled(rule: &str) -> Compiled {
    let text = policy_text("eth0", "native", &[dedicated("orders", PORT, &[rule], "")]);
    let (policy, _) = policy::parse(&text).unwrap_or_else(|problems| panic!("{problems:?}"));
    compile(
        &policy,
        &Regions::new(),
        &Timed::of(&policy, Clock::start().now()),
    )
}

#[test]
fn pins_removed_under_a_running_agent_are_restored_and_the_database_is_filtered_again() {
    let mut net = Net::new("pins-removed");
    let _server = net.echo(PORT);
    net.write_policy(&policy_text(
        "eth0",
        "native",
        &[dedicated("orders", PORT, &["203.0.113.10/32"], "")],
    ));
    net.start();
    let base = net.bpffs().join("filter-agent");
    fs::remove_dir_all(&base).unwrap();
    let link = |name: &str| name.starts_with("link_");
    assert!(wait_until(|| {
        let pins = fs::read_dir(base.join(format!("v{LAYOUT}")));
        let mut names = pins.into_iter().flatten();
        names.any(|pin| pin.is_ok_and(|pin| pin.file_name().to_str().is_some_and(link)))
    }));
    net.wait_for_line("warning: pins of the filter were removed; they are restored");
    net.wait_for_line("attached to eth0");
    net.watch(&[Protected::tcp(PORT, &["203.0.113.10/32"])]);
    let sources = [ALLOWED4, DENIED4].map(|source| net.connect(source.into(), DB));
    assert_eq!(sources, [Connection::Accepted, Connection::Silence]);
    assert_eq!(net.agent_json(&["status", "--verify"])["errors"], json!([]));
    // The next agent goes on from the pins that were restored.
    net.kill();
    net.start();
    let sources = [ALLOWED4, DENIED4].map(|source| net.connect(source.into(), DB));
    assert_eq!(sources, [Connection::Accepted, Connection::Silence]);
}

/// Fault D5, where something has the place of the pins.
#[test]
fn status_says_that_the_database_is_open_while_pins_cannot_be_restored() {
    let mut net = Net::new("pins-blocked");
    let _listener = net.listen(PORT);
    let orders = dedicated("orders", PORT, &["203.0.113.10/32"], "");
    net.write_policy(&policy_text("eth0", "native", &[orders]));
    net.start();
    let base = net.bpffs().join("filter-agent");
    // An agent that runs would be quicker.
    net.signal(Signal::SIGSTOP);
    fs::remove_dir_all(&base).unwrap();
    fs::create_dir(&base).unwrap();
    chown(&base, Some(65534), Some(65534)).unwrap();
    net.signal(Signal::SIGCONT);
    net.wait_for_line("error: restore the filter's pins: ");
    assert_eq!(net.connect(DENIED4.into(), DB), Connection::Accepted);
    let errors = net.agent_json(&["status"])["errors"].to_string();
    assert!(errors.contains("the databases are open"), "{errors}");
    assert!(errors.contains("is not this agent's own"), "{errors}");
    for arguments in [&["status"][..], &["status", "--enforced"]] {
        assert!(!net.agent(arguments).status.success(), "{arguments:?}");
    }
    fs::remove_dir(&base).unwrap();
    net.wait_for_line("attached to eth0");
    net.watch(&[Protected::tcp(PORT, &["203.0.113.10/32"])]);
    let sources = [ALLOWED4, DENIED4].map(|source| net.connect(source.into(), DB));
    assert_eq!(sources, [Connection::Accepted, Connection::Silence]);
    net.agent_text(&["status", "--verify"]);
}

#[test]
fn restored_pins_are_those_of_the_maps_and_the_lock_keeps_another_agent_away() {
    let bpffs = Bpffs::mount();
    let base = bpffs.path().join("filter-agent");
    let open = || Filter::open(bpffs.path(), Some(5_000));
    let policy = compiled("203.0.113.0/24");
    let mut filter = open().unwrap();
    filter.apply(&policy).unwrap();
    assert!(!filter.restore_pins().unwrap());
    fs::remove_dir_all(&base).unwrap();
    // An agent that comes and goes meanwhile leaves maps of its own.
    drop(open().unwrap());
    assert!(filter.restore_pins().unwrap());
    assert!(!filter.restore_pins().unwrap());
    let error = format!("{:#}", open().err().unwrap());
    assert!(error.contains("another filter-agent runs"), "{error}");
    // A single pin.
    fs::remove_file(base.join(format!("v{LAYOUT}/ALLOWED4"))).unwrap();
    assert!(filter.restore_pins().unwrap());
    drop(filter);
    let next = open().unwrap();
    assert_eq!(
        next.plan(&policy).unwrap().difference,
        Difference::default()
    );
}

#[test]
fn agent_that_started_after_the_pins_were_removed_is_left_alone() {
    let bpffs = Bpffs::mount();
    let open = || Filter::open(bpffs.path(), Some(100));
    let mut filter = open().unwrap();
    fs::remove_dir_all(bpffs.path().join("filter-agent")).unwrap();
    let mut other = open().unwrap();
    let error = format!("{:#}", filter.restore_pins().unwrap_err());
    assert!(error.contains("another filter-agent runs"), "{error}");
    assert!(!other.restore_pins().unwrap());
}

#[test]
fn interface_that_vanished_is_told_from_one_that_refuses() {
    let bpffs = Bpffs::mount();
    let mut filter = Filter::open(bpffs.path(), Some(100)).unwrap();
    let gone = Interface {
        index: 0x7fff_fff0,
        name: "gone0".into(),
        ethernet: true,
        ..Interface::default()
    };
    for mode in [Mode::Auto, Mode::Native, Mode::Generic] {
        let error = filter.attach(&gone, mode).unwrap_err();
        assert!(is_gone(&error), "{error:?}");
    }
    // Loopback has no native mode.
    let loopback = Interface {
        index: 1,
        name: "lo".into(),
        ..gone
    };
    let error = filter.attach(&loopback, Mode::Native).unwrap_err();
    assert!(!is_gone(&error), "{error:?}");
}
