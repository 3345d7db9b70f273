//! Every system call that matters may fail, and at every one the agent may die. What the kernel enforces
//! then is what the agent says, nobody gets in whom no policy allows, and the next start puts all right.

use std::{collections::BTreeMap, env, fmt::Write as _, path::Path};

use filter_tests::{
    injector::{Action, Fault, Kind, Supervised},
    laboratory::{InForce, Laboratory, Started, Version, claims_refusal},
};

/// Becomes the agent, with the filter that reports its calls.
const LAUNCHER: &str = env!("CARGO_BIN_EXE_launcher");

#[derive(Clone, Copy, Debug, PartialEq)]
enum Scenario {
    /// Nothing is pinned and nothing is kept.
    FirstStart,
    /// The file differs from the policy that is pinned and kept.
    Restart,
    /// One prefix is added, and one removed.
    Reload,
}

/// What one round showed.
struct Round {
    /// Calls of the kind, from when they are counted to the agent's end.
    calls: usize,
    has_fired: bool,
}

/// A laboratory and the scenario that it repeats.
struct Sweep {
    scenario: Scenario,
    laboratory: Laboratory,
    /// What is in force between two rounds.
    version: Version,
    /// The running agent, between two reloads.
    agent: Option<Supervised>,
}

impl Sweep {
    fn new(name: &str, scenario: Scenario, kind: Kind) -> Self {
        let mut laboratory = Laboratory::new(name, Path::new(LAUNCHER), kind);
        laboratory.round = "without a fault".into();
        let version = Version::Old;
        laboratory.net.write_policy(&version.text());
        let mut agent = laboratory.converge(version);
        let agent = match scenario {
            Scenario::Reload => Some(agent),
            Scenario::FirstStart | Scenario::Restart => {
                laboratory.stop(&mut agent);
                None
            }
        };
        Self {
            scenario,
            laboratory,
            version,
            agent,
        }
    }

    /// The scenario once, with this fault in it.
    fn round(&mut self, fault: Option<Fault>) -> Round {
        let (scenario, kind) = (self.scenario, self.laboratory.kind);
        self.laboratory.round = match fault {
            None => format!("{scenario:?} without a fault"),
            Some(Fault {
                first,
                calls,
                action,
            }) => {
                let last = if calls == 1 { "" } else { " and all after it" };
                format!("{scenario:?}, {kind:?} call {first}{last}: {action:?}")
            }
        };
        match scenario {
            Scenario::FirstStart => {
                self.laboratory.clear();
                self.start(fault, None)
            }
            Scenario::Restart => {
                let from = self.version;
                self.version = from.other();
                self.start(fault, Some(from))
            }
            Scenario::Reload => self.reload(fault),
        }
    }

    /// A start of the agent with a fault, and one without. `from`: what is in force before.
    fn start(&mut self, fault: Option<Fault>, from: Option<Version>) -> Round {
        let to = self.version;
        let laboratory = &mut self.laboratory;
        laboratory.net.write_policy(&to.text());
        let mut agent = laboratory.spawn(fault);
        let started = laboratory.wait_for_start(&mut agent);
        name_calls(laboratory, &agent);
        let before = from.map_or(InForce::Nothing, InForce::Policy);
        let in_force = laboratory.in_force();
        match started {
            Started::Ready => {
                laboratory.expect_enforced();
                let status = laboratory.command(&["status"]);
                let is_admitted = from.is_some() && in_force == before && !status.succeeded();
                if in_force != InForce::Policy(to) && !is_admitted && !has_died(&mut agent) {
                    let what = format!("READY, and in force is {}", relative(in_force, to));
                    laboratory.find(&what, &status.text);
                }
            }
            // A killed agent may leave the maps half written.
            Started::Exited(status) if status.code().is_none() => {}
            Started::Exited(_) => {
                let log = laboratory.log();
                let message = log.lines().last().unwrap_or_default();
                let is_admitted = in_force == InForce::Policy(to)
                    && !claims_refusal(message)
                    && message.contains("in force");
                if in_force != before && !is_admitted {
                    let what = format!("a start fails and leaves {}", relative(in_force, to));
                    laboratory.find(&what, "");
                }
            }
            Started::Hangs => laboratory.find("a start neither succeeds nor fails", ""),
        }
        laboratory.stop(&mut agent);
        name_calls(laboratory, &agent);
        laboratory.check_steady();
        let mut next = laboratory.converge(to);
        laboratory.stop(&mut next);
        laboratory.check_steady();
        round_of(&agent)
    }

    /// A reload with a fault, and a start without.
    fn reload(&mut self, fault: Option<Fault>) -> Round {
        let from = self.version;
        let to = from.other();
        let laboratory = &mut self.laboratory;
        let mut agent = self
            .agent
            .take()
            .expect("the agent runs between two reloads");
        laboratory.net.write_policy(&to.text());
        agent.arm(fault);
        let answer = laboratory.command(&["reload"]);
        let in_force = laboratory.in_force();
        name_calls(laboratory, &agent);
        if answer.status.is_none() {
            laboratory.find("a reload hangs", &answer.text);
        } else if answer.succeeded() {
            if in_force != InForce::Policy(to) && !has_died(&mut agent) {
                let what = format!("a reload succeeds and leaves {}", relative(in_force, to));
                laboratory.find(&what, &answer.text);
            }
        } else if !has_died(&mut agent) {
            let is_refused = claims_refusal(&answer.text);
            let expected = if is_refused { from } else { to };
            if in_force != InForce::Policy(expected) {
                let how = if is_refused { "is refused" } else { "fails" };
                let what = format!("a reload {how} and leaves {}", relative(in_force, to));
                laboratory.find(&what, &answer.text);
            }
        }
        if !agent.fired().is_empty() && !has_died(&mut agent) {
            agent.disarm();
            let again = laboratory.command(&["reload"]);
            let in_force = laboratory.in_force();
            if !again.succeeded() || in_force != InForce::Policy(to) {
                let what = format!("the next reload leaves {}", relative(in_force, to));
                laboratory.find(&what, &format!("{}\nthen:\n{}", answer.text, again.text));
            }
            let status = laboratory.command(&["status"]);
            if !status.succeeded() {
                laboratory.find("after the next reload `status` fails", &status.text);
            }
        }
        laboratory.stop(&mut agent);
        name_calls(laboratory, &agent);
        laboratory.check_steady();
        self.version = to;
        self.agent = Some(laboratory.converge(to));
        laboratory.check_steady();
        round_of(&agent)
    }

    /// Every call, one after another, until there are no more. `actions`: taken in turn.
    fn every_call(&mut self, actions: &[Action]) {
        let calls = self.round(None).calls;
        // The number of calls differs a little from round to round.
        let mut missed = 0;
        for first in 1.. {
            let action = actions[first % actions.len()];
            let fault = Fault {
                first,
                calls: 1,
                action,
            };
            let round = self.round(Some(fault));
            missed = if round.has_fired { 0 } else { missed + 1 };
            if missed == 2 {
                assert!(first + 20 > calls, "{first} calls, not {calls}");
                break;
            }
        }
    }

    /// Panics with what was found, the same once.
    fn report(self) {
        let mut findings: BTreeMap<&str, Vec<_>> = BTreeMap::new();
        for finding in &self.laboratory.findings {
            findings.entry(&finding.what).or_default().push(finding);
        }
        let mut report = String::new();
        for (what, found) in &findings {
            writeln!(report, "\n{what}:").unwrap();
            for finding in found {
                writeln!(report, "  {}", finding.round).unwrap();
            }
            writeln!(
                report,
                "  the first one: {}",
                found[0].evidence.replace('\n', "\n    ")
            )
            .unwrap();
        }
        assert!(findings.is_empty(), "{report}");
    }
}

/// Adds the calls that did not run to the name of the round.
fn name_calls(laboratory: &mut Laboratory, agent: &Supervised) {
    if let Some(call) = agent.fired().first()
        && !laboratory.round.contains(call)
    {
        write!(laboratory.round, " ({call})").unwrap();
    }
}

fn has_died(agent: &mut Supervised) -> bool {
    agent.child.try_wait().unwrap().is_some()
}

fn round_of(agent: &Supervised) -> Round {
    Round {
        calls: agent.count(),
        has_fired: !agent.fired().is_empty(),
    }
}

/// Rounds take turns between the two policies; a finding is the same for both.
fn relative(in_force: InForce, to: Version) -> String {
    match in_force {
        InForce::Policy(version) if version == to => "the policy of the file".into(),
        InForce::Policy(_) => "the policy of before".into(),
        other => other.to_string(),
    }
}

/// Each call fails, and at each the agent is killed: in turn, or both with `cargo xtask test --full`.
fn sweep(name: &str, scenario: Scenario, kind: Kind) {
    let mut sweep = Sweep::new(name, scenario, kind);
    let actions = [Action::Fail(kind.errno()), Action::Kill];
    if env::var_os("FILTER_TESTS_FULL").is_some() {
        for action in actions {
            sweep.every_call(&[action]);
        }
    } else {
        sweep.every_call(&actions);
    }
    sweep.report();
}

#[test]
fn first_start_meets_bpf_faults() {
    sweep("fault-first-bpf", Scenario::FirstStart, Kind::Bpf);
}

#[test]
fn restart_meets_bpf_faults() {
    sweep("fault-restart-bpf", Scenario::Restart, Kind::Bpf);
}

#[test]
fn reload_meets_bpf_faults() {
    sweep("fault-reload-bpf", Scenario::Reload, Kind::Bpf);
}
