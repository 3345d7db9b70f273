//! System calls of a trace that fail: the links run what they ran, or are repaired.

use filter_tests::{
    injector::{Action, Fault, Kind, Supervised},
    laboratory::{Laboratory, Started, Version},
    net::wait_until,
};
use nix::errno::Errno;

use crate::reader::{Reader, program};

const LAUNCHER: &str = env!("CARGO_BIN_EXE_launcher");

/// A laboratory whose agent enforces a policy.
fn enforcing(name: &str, kind: Kind) -> (Laboratory, Supervised) {
    let mut laboratory = Laboratory::new(name, LAUNCHER.as_ref());
    laboratory.net.write_policy(&Version::Old.text());
    let mut agent = laboratory.spawn(kind, None);
    assert_eq!(laboratory.wait_for_start(&mut agent), Started::Ready);
    laboratory.expect_enforced();
    (laboratory, agent)
}

fn end(mut laboratory: Laboratory, mut agent: Supervised) {
    laboratory.check_steady();
    laboratory.stop(&mut agent);
    let findings: Vec<&str> = laboratory.findings.iter().map(|f| &*f.what).collect();
    assert!(findings.is_empty(), "{findings:?}: {}", laboratory.log());
    laboratory.clear();
}

#[test]
fn trace_that_the_kernel_refuses_is_one_line_and_switches_nothing() {
    for (kind, calls, errno) in [
        (Kind::Bpf, usize::MAX, Errno::ENOMEM),
        (Kind::BpfLink, 1, Errno::EPERM),
    ] {
        let (laboratory, agent) = enforcing("trace-refusals", kind);
        agent.arm(Some(Fault {
            first: 1,
            calls,
            action: Action::Fail(errno),
        }));
        let answer = laboratory.command(&["trace", "10.0.0.1"]);
        agent.disarm();
        let is_one_line = answer.text.trim_end().lines().count() == 1;
        assert!(!answer.succeeded() && is_one_line, "{}", answer.text);
        assert_eq!(program(&laboratory.net, "eth0"), "filter");
        end(laboratory, agent);
    }
}

#[test]
fn link_that_is_not_switched_back_is_repaired() {
    let (laboratory, agent) = enforcing("trace-repair", Kind::BpfLink);
    let reader = Reader::start(&laboratory.net, &["10.0.0.1"]);
    agent.arm(Some(Fault {
        first: 1,
        calls: 1,
        action: Action::Fail(Errno::ENOMEM),
    }));
    reader.interrupt();
    assert!(wait_until(|| !agent.fired().is_empty()));
    let is_repaired = || program(&laboratory.net, "eth0") == "filter";
    assert!(wait_until(is_repaired), "{}", laboratory.log());
    let log = laboratory.log();
    assert!(
        log.contains("error: end the trace of 10.0.0.1/32: "),
        "{log}"
    );
    end(laboratory, agent);
}
