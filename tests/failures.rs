//! Every system call that matters may fail, and at every one the agent may die. What the kernel enforces
//! then is what the agent says, nobody gets in whom no policy allows, and the next start puts all right.

use std::{collections::BTreeMap, env, fmt::Write as _, path::Path, time::Duration};

use filter_tests::{
    injector::{Action, Fault, Kind, Supervised},
    laboratory::{InForce, Laboratory, Started, Version, claims_refusal, within_limit},
    net::{agent_binary, next_layout_binary, wait_until},
};
use jiff::Timestamp;
use nix::errno::Errno;

/// Time for the agent to start before the rule of `Scenario::End` ends.
const UNTIL_END: Duration = Duration::from_secs(2);

/// Becomes the agent, with the filter that reports its calls.
const LAUNCHER: &str = env!("CARGO_BIN_EXE_launcher");

#[derive(Clone, Copy, Debug, PartialEq)]
enum Scenario {
    /// Nothing is pinned and nothing is kept.
    FirstStart,
    /// The file differs from the policy that is pinned and kept.
    Restart,
    /// The same, and what is pinned has another layout.
    TakeOver,
    /// One prefix is added, and one removed.
    Reload,
    /// While the agent runs.
    Detach,
    /// A region's file changes.
    Region,
    /// A rule ends.
    End,
}

impl Scenario {
    /// Whether its rounds begin with a running agent, and so end with one.
    fn begins_with_agent(self) -> bool {
        matches!(self, Self::Reload | Self::Detach | Self::Region)
    }
}

/// How many of the calls fail.
#[derive(Clone, Copy, Debug)]
enum Share {
    /// Each, by every action.
    All,
    /// Each, by one action after the other.
    InTurn,
    /// One in three, by one action after the other.
    Third,
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
    kind: Kind,
    laboratory: Laboratory,
    /// The policy in force between two rounds.
    version: Version,
    /// The running agent between two rounds, where these begin with one.
    agent: Option<Supervised>,
}

impl Sweep {
    fn new(name: &str, scenario: Scenario, kind: Kind) -> Self {
        let mut binaries = vec![agent_binary()];
        if scenario == Scenario::TakeOver {
            binaries.insert(0, next_layout_binary());
        }
        let mut laboratory = Laboratory::new(name, Path::new(LAUNCHER));
        laboratory.round = "before any fault".into();
        let version = Version::Old;
        match scenario {
            Scenario::Region => laboratory.write_region(version),
            _ => laboratory.net.write_policy(&version.text()),
        }
        for binary in binaries {
            laboratory.net.binary = binary.to_owned();
            let mut agent = laboratory.converge(kind, InForce::Policy(version));
            if scenario == Scenario::Region {
                // What a region was is kept when it changes.
                for version in [version.other(), version] {
                    laboratory.write_region(version);
                    let is_in_force = || laboratory.in_force() == InForce::Policy(version);
                    assert!(within_limit(is_in_force), "{}", laboratory.log());
                }
            }
            laboratory.stop(&mut agent);
            laboratory.remember_files();
        }
        let agent = scenario
            .begins_with_agent()
            .then(|| laboratory.converge(kind, InForce::Policy(version)));
        Self {
            scenario,
            kind,
            laboratory,
            version,
            agent,
        }
    }

    /// The scenario once, with this fault in it.
    fn round(&mut self, fault: Option<Fault>) -> Round {
        let (scenario, kind) = (self.scenario, self.kind);
        self.laboratory.round = match fault {
            None => format!("{scenario:?} without a fault"),
            Some(fault) => {
                let more = if fault.calls == 1 {
                    ""
                } else {
                    " and all after it"
                };
                let (first, action) = (fault.first, fault.action);
                format!("{scenario:?}, {kind:?} call {first}{more}: {action:?}")
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
            Scenario::TakeOver => {
                let from = self.version;
                self.version = from.other();
                let binary = match self.version {
                    Version::Old => agent_binary(),
                    Version::New => next_layout_binary(),
                };
                self.laboratory.net.binary = binary.to_owned();
                self.start(fault, Some(from))
            }
            Scenario::Reload => self.reload(fault),
            Scenario::Detach => self.detach(fault),
            Scenario::Region => self.change_region(fault),
            Scenario::End => self.end(fault),
        }
    }

    /// A start of the agent with a fault, and one without. `from`: what is in force before.
    fn start(&mut self, fault: Option<Fault>, from: Option<Version>) -> Round {
        let to = self.version;
        let laboratory = &mut self.laboratory;
        laboratory.net.write_policy(&to.text());
        let mut agent = laboratory.spawn(self.kind, fault);
        let started = laboratory.wait_for_start(&mut agent);
        name_call(laboratory, &agent);
        let before = from.map_or(InForce::Nothing, InForce::Policy);
        let in_force = laboratory.in_force();
        match started {
            Started::Ready => {
                laboratory.expect_enforced();
                let status = laboratory.command(&["status"]);
                let is_admitted = from.is_some() && in_force == before && !status.succeeded();
                if in_force != InForce::Policy(to) && !is_admitted && !agent.has_ended() {
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
                    let what = format!(
                        "a start fails and leaves in force {}",
                        relative(in_force, to)
                    );
                    laboratory.find(&what, "");
                }
            }
            Started::Hangs => laboratory.find("a start neither succeeds nor fails", ""),
        }
        self.finish(agent, InForce::Policy(to))
    }

    /// A reload with a fault, one without, and a start.
    fn reload(&mut self, fault: Option<Fault>) -> Round {
        let from = self.version;
        let to = from.other();
        let laboratory = &mut self.laboratory;
        let mut agent = self
            .agent
            .take()
            .expect("the agent runs between two rounds");
        laboratory.net.write_policy(&to.text());
        agent.arm(fault);
        let answer = laboratory.command(&["reload"]);
        let in_force = laboratory.in_force();
        name_call(laboratory, &agent);
        let expected = if answer.succeeded() || !claims_refusal(&answer.text) {
            to
        } else {
            from
        };
        if answer.status.is_none() {
            laboratory.find("a reload hangs", &answer.text);
        } else if in_force != InForce::Policy(expected)
            && !agent.has_ended()
            && !answer.text.contains("failed half way")
        {
            let how = match expected {
                _ if answer.succeeded() => "succeeds",
                _ if expected == from => "is refused",
                _ => "fails",
            };
            let what = format!(
                "a reload {how} and leaves in force {}",
                relative(in_force, to)
            );
            laboratory.find(&what, &answer.text);
        }
        let ends = answer.text.contains("the agent ends");
        if !agent.fired().is_empty() && !agent.has_ended() && !ends {
            agent.disarm();
            let again = laboratory.command(&["reload"]);
            let in_force = laboratory.in_force();
            if !again.succeeded() || in_force != InForce::Policy(to) {
                let what = format!("the next reload leaves in force {}", relative(in_force, to));
                laboratory.find(&what, &format!("{}\nthen:\n{}", answer.text, again.text));
            }
            let mut status = laboratory.command(&["status"]);
            // Nothing else is waited for: samples and pins are seen to every few seconds, and not by a reload.
            let lines = status.text.lines().map(str::trim);
            let errors: Vec<&str> = lines
                .filter_map(|line| line.strip_prefix("error: "))
                .collect();
            let is_seen_to = |it: &&str| it.starts_with("drops: ") || it.starts_with("pins: ");
            if !errors.is_empty() && errors.iter().all(is_seen_to) {
                wait_until(|| {
                    status = laboratory.command(&["status"]);
                    status.succeeded()
                });
            }
            if !status.succeeded() {
                laboratory.find("after the next reload `status` fails", &status.text);
            }
        }
        self.version = to;
        self.finish(agent, InForce::Policy(to))
    }

    /// A detach with a fault, one without, and a start.
    fn detach(&mut self, fault: Option<Fault>) -> Round {
        let version = self.version;
        let laboratory = &mut self.laboratory;
        let mut agent = self
            .agent
            .take()
            .expect("the agent runs between two rounds");
        laboratory.check_steady();
        agent.arm(fault);
        let answer = laboratory.command(&["detach", "--yes"]);
        name_call(laboratory, &agent);
        let is_refused = !answer.succeeded() && claims_refusal(&answer.text);
        if is_refused {
            laboratory.check_steady();
        }
        laboratory.expect_anything();
        let detaches = || within_limit(|| laboratory.in_force() == InForce::Nothing);
        if answer.status.is_none() {
            laboratory.find("a detach hangs", &answer.text);
        } else if answer.succeeded() && !detaches() {
            laboratory.find("a detach succeeds and leaves a filter", &answer.text);
        } else if is_refused && laboratory.in_force() != InForce::Policy(version) {
            laboratory.find(
                "a detach is refused and leaves another policy in force",
                &answer.text,
            );
        }
        if !answer.succeeded() {
            agent.disarm();
            let again = laboratory.command(&["detach", "--yes"]);
            if !again.succeeded() || !within_limit(|| laboratory.in_force() == InForce::Nothing) {
                let both = format!("{}\nthen:\n{}", answer.text, again.text);
                laboratory.find("the next detach does not detach", &both);
            }
        }
        laboratory.stop(&mut agent);
        name_call(laboratory, &agent);
        let mut left = laboratory.files();
        // Texts of earlier policies may stay if the agent warns of it: nothing enforces them.
        let texts = laboratory.net.state_dir().join("policies");
        let of_texts = texts.display().to_string();
        let is_warning = |line: &str| line.starts_with("warning: ") && line.contains(&of_texts);
        if laboratory.log().lines().any(is_warning) {
            left.retain(|path| !path.starts_with(&texts));
        }
        if !left.is_empty() {
            laboratory.find("a detach leaves files", &format!("{left:?}"));
        }
        laboratory.clear();
        self.agent = Some(laboratory.converge(self.kind, InForce::Policy(version)));
        round_of(&agent)
    }

    /// A change of a region's file with a fault, and a start without.
    fn change_region(&mut self, fault: Option<Fault>) -> Round {
        let from = self.version;
        let to = from.other();
        let laboratory = &mut self.laboratory;
        let mut agent = self
            .agent
            .take()
            .expect("the agent runs between two rounds");
        agent.arm(fault);
        laboratory.write_region(to);
        // A change that fails leaves what was in force, and `status` says so.
        let is_settled = within_limit(|| {
            agent.has_ended()
                || laboratory.in_force() == InForce::Policy(to)
                || !laboratory.command(&["status"]).succeeded()
                    && laboratory.in_force() == InForce::Policy(from)
        });
        name_call(laboratory, &agent);
        if !is_settled {
            let in_force = relative(laboratory.in_force(), to);
            laboratory.find(&format!("a region's change leaves in force {in_force}"), "");
        }
        self.version = to;
        self.finish(agent, InForce::Policy(to))
    }

    /// The end of a rule with a fault, and a start without.
    fn end(&mut self, fault: Option<Fault>) -> Round {
        let laboratory = &mut self.laboratory;
        let mut until = UNTIL_END;
        let agent = loop {
            let end = Timestamp::now() + until;
            laboratory.net.write_policy(&self.version.text_until(end));
            let mut agent = laboratory.start_again(self.kind);
            let in_force = laboratory.in_force();
            if Timestamp::now() < end {
                laboratory.check_started(in_force, InForce::Policy(self.version));
            }
            if Timestamp::now() + UNTIL_END / 4 < end {
                break agent;
            }
            // A busy machine takes longer than that to start it.
            laboratory.stop(&mut agent);
            until *= 2;
        };
        agent.arm(fault);
        let has_ended = within_limit(|| laboratory.in_force() == InForce::ONLY_ALWAYS);
        name_call(laboratory, &agent);
        if !has_ended {
            let in_force = laboratory.in_force().to_string();
            laboratory.find(&format!("the end of a rule leaves in force {in_force}"), "");
        }
        self.finish(agent, InForce::ONLY_ALWAYS)
    }

    /// Ends a round: stops the agent that met the fault, and starts one that meets none. `expected`: what that one
    /// must leave in force.
    fn finish(&mut self, mut agent: Supervised, expected: InForce) -> Round {
        let laboratory = &mut self.laboratory;
        laboratory.stop(&mut agent);
        name_call(laboratory, &agent);
        laboratory.check_steady();
        if self.scenario.begins_with_agent() {
            self.agent = Some(laboratory.converge(self.kind, expected));
        } else {
            // None of its calls fails: of this kind it makes few that have to be reported.
            let mut next = laboratory.converge(Kind::Log, expected);
            laboratory.stop(&mut next);
        }
        laboratory.check_steady();
        round_of(&agent)
    }

    /// Makes calls fail, one after another, until there are no more.
    fn every_call(&mut self, actions: &[Action], share: Share) {
        let expected = self.round(None).calls;
        // The number of calls differs a little from round to round, where there are many.
        let slack = (expected / 10).min(2);
        let (mut last, mut failed) = (0, 0);
        let step = match share {
            Share::All | Share::InTurn => 1,
            Share::Third => 3,
        };
        for (turn, first) in (1..=expected + 50).step_by(step).enumerate() {
            let chosen = match share {
                Share::All => actions,
                Share::InTurn | Share::Third => &actions[turn % actions.len()..][..1],
            };
            for &action in chosen {
                let met = self.fails(first, 1, action);
                failed += met;
                if met > 0 {
                    last = first;
                }
            }
            if first > last + slack.max(step) {
                break;
            }
        }
        println!(
            "{:?}, {:?}: {last} calls, {share:?}, {failed} failures",
            self.scenario, self.kind
        );
        assert!(
            last > 0 && last + 50 > expected,
            "{last} calls, not {expected}"
        );
    }

    /// Some calls. `calls`: how many fail from there on.
    fn some_calls(&mut self, rounds: usize, calls: usize, actions: &[Action]) {
        let expected = self.round(None).calls;
        let mut random = fastrand::Rng::with_seed(11);
        let mut fired = 0;
        for round in 0..rounds {
            let first = random.usize(1..=expected);
            fired += self.fails(first, calls, actions[round % actions.len()]);
        }
        let (scenario, kind) = (self.scenario, self.kind);
        let more = if calls == 1 { "" } else { " and all after it" };
        println!("{scenario:?}, {kind:?}: {fired} times one of {expected} calls{more}");
        assert!(fired > 0, "none of {expected} calls failed");
    }

    /// Returns in how many rounds the fault was met. A take-over is made twice: to the later layout, and back.
    fn fails(&mut self, first: usize, calls: usize, action: Action) -> usize {
        let fault = Fault {
            first,
            calls,
            action,
        };
        let rounds = match self.scenario {
            Scenario::TakeOver => 2,
            _ => 1,
        };
        let met = (0..rounds).map(|_| self.round(Some(fault)).has_fired);
        met.map(usize::from).sum()
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
            let evidence = found[0].evidence.replace('\n', "\n    ");
            writeln!(report, "  the first one: {evidence}").unwrap();
        }
        assert!(findings.is_empty(), "{report}");
    }
}

/// Adds the first call that did not run to the name of the round.
fn name_call(laboratory: &mut Laboratory, agent: &Supervised) {
    if let Some(call) = agent.fired().first()
        && !laboratory.round.contains(call)
    {
        write!(laboratory.round, " ({call})").unwrap();
    }
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

/// Whether `cargo xtask test --full` runs this.
fn is_full() -> bool {
    env::var_os("FILTER_TESTS_FULL").is_some()
}

/// Each call fails, and at each the agent is killed, in the full test and where there are few calls.
fn every_call(name: &str, scenario: Scenario, kind: Kind) {
    let mut sweep = Sweep::new(name, scenario, kind);
    let share = match (kind, scenario) {
        _ if is_full() => Share::All,
        (Kind::BpfLink, _) => Share::All,
        (_, Scenario::Reload | Scenario::Detach) => Share::InTurn,
        _ => Share::Third,
    };
    sweep.every_call(&actions(scenario, kind), share);
    sweep.report();
}

/// Calls of a kind fail with each of its errors.
fn failures(kind: Kind) -> Vec<Action> {
    let errors = kind.errors().iter();
    errors.map(|error| Action::Fail(*error)).collect()
}

/// The same, and the agent is killed at them: but not before a rule ends, which takes a running agent.
fn actions(scenario: Scenario, kind: Kind) -> Vec<Action> {
    let mut actions = failures(kind);
    if scenario != Scenario::End {
        actions.push(Action::Kill);
    }
    actions
}

/// The same for some of the calls; the full test takes all, or many where they are too many.
fn some_calls(name: &str, scenario: Scenario, kind: Kind) {
    const MANY: usize = 100;
    const SOME: usize = 4;
    // The names of all rules are looked up, to carry their counters.
    let is_endless = kind == Kind::BpfLookup && scenario == Scenario::TakeOver;
    if is_full() && !is_endless {
        every_call(name, scenario, kind);
        return;
    }
    let mut sweep = Sweep::new(name, scenario, kind);
    let rounds = if is_full() { MANY } else { SOME };
    sweep.some_calls(rounds, 1, &actions(scenario, kind));
    sweep.report();
}

#[test]
fn first_start_meets_faults_of_bpf() {
    every_call("fault-first-bpf", Scenario::FirstStart, Kind::Bpf);
}

#[test]
fn first_start_meets_faults_of_lookups() {
    some_calls("fault-first-lookup", Scenario::FirstStart, Kind::BpfLookup);
}

#[test]
fn first_start_meets_faults_of_files() {
    every_call("fault-first-files", Scenario::FirstStart, Kind::Files);
}

#[test]
fn first_start_meets_faults_of_netlink() {
    some_calls("fault-first-netlink", Scenario::FirstStart, Kind::Netlink);
}

#[test]
fn first_start_meets_faults_of_the_log() {
    some_calls("fault-first-log", Scenario::FirstStart, Kind::Log);
}

/// The program of an interface is attached.
#[test]
fn first_start_meets_faults_of_links() {
    every_call("fault-first-link", Scenario::FirstStart, Kind::BpfLink);
}

#[test]
fn restart_meets_faults_of_bpf() {
    every_call("fault-restart-bpf", Scenario::Restart, Kind::Bpf);
}

#[test]
fn restart_meets_faults_of_lookups() {
    some_calls("fault-restart-lookup", Scenario::Restart, Kind::BpfLookup);
}

#[test]
fn restart_meets_faults_of_files() {
    every_call("fault-restart-files", Scenario::Restart, Kind::Files);
}

#[test]
fn restart_meets_faults_of_netlink() {
    some_calls("fault-restart-netlink", Scenario::Restart, Kind::Netlink);
}

#[test]
fn restart_meets_faults_of_the_log() {
    some_calls("fault-restart-log", Scenario::Restart, Kind::Log);
}

/// The program of an interface is switched.
#[test]
fn restart_meets_faults_of_links() {
    every_call("fault-restart-link", Scenario::Restart, Kind::BpfLink);
}

#[test]
fn reload_meets_faults_of_bpf() {
    every_call("fault-reload-bpf", Scenario::Reload, Kind::Bpf);
}

#[test]
fn reload_meets_faults_of_lookups() {
    some_calls("fault-reload-lookup", Scenario::Reload, Kind::BpfLookup);
}

#[test]
fn reload_meets_faults_of_files() {
    every_call("fault-reload-files", Scenario::Reload, Kind::Files);
}

#[test]
fn reload_meets_faults_of_netlink() {
    some_calls("fault-reload-netlink", Scenario::Reload, Kind::Netlink);
}

#[test]
fn reload_meets_faults_of_the_log() {
    some_calls("fault-reload-log", Scenario::Reload, Kind::Log);
}

/// What undoes a change fails as well.
#[test]
fn reload_meets_a_kernel_that_refuses_all_from_some_call_on() {
    let mut sweep = Sweep::new("fault-reload-all", Scenario::Reload, Kind::Bpf);
    let rounds = if is_full() { 200 } else { 20 };
    sweep.some_calls(rounds, usize::MAX, &failures(Kind::Bpf));
    sweep.report();
}

#[test]
fn take_over_meets_faults_of_bpf() {
    some_calls("fault-takeover-bpf", Scenario::TakeOver, Kind::Bpf);
}

/// Fault A2: the program and maps of another layout stay in force on an interface that cannot be switched.
#[test]
fn take_over_meets_faults_of_links() {
    every_call("fault-takeover-link", Scenario::TakeOver, Kind::BpfLink);
}

/// Where the counters of the other layout cannot be read, its links were not switched: the old policy stayed in
/// force, and the agent was never ready.
#[test]
fn take_over_that_cannot_read_the_counters_switches_all_the_same() {
    let mut sweep = Sweep::new(
        "fault-takeover-counters",
        Scenario::TakeOver,
        Kind::BpfLookup,
    );
    // Among thousands of names of rules. Back to the earlier layout, nothing is carried.
    let failure = Action::Fail(Errno::ENOMEM);
    assert_eq!(sweep.fails(2_000, 1, failure), 1);
    sweep.report();
}

#[test]
fn take_over_meets_faults_of_files() {
    some_calls("fault-takeover-files", Scenario::TakeOver, Kind::Files);
}

#[test]
fn take_over_meets_faults_of_lookups() {
    some_calls("fault-takeover-lookup", Scenario::TakeOver, Kind::BpfLookup);
}

#[test]
fn take_over_meets_faults_of_netlink() {
    some_calls("fault-takeover-netlink", Scenario::TakeOver, Kind::Netlink);
}

#[test]
fn take_over_meets_faults_of_the_log() {
    some_calls("fault-takeover-log", Scenario::TakeOver, Kind::Log);
}

#[test]
fn detach_meets_faults_of_files() {
    some_calls("fault-detach-files", Scenario::Detach, Kind::Files);
}

#[test]
fn detach_meets_faults_of_netlink() {
    some_calls("fault-detach-netlink", Scenario::Detach, Kind::Netlink);
}

#[test]
fn detach_meets_faults_of_the_log() {
    some_calls("fault-detach-log", Scenario::Detach, Kind::Log);
}

#[test]
fn change_of_a_region_meets_faults_of_bpf() {
    some_calls("fault-region-bpf", Scenario::Region, Kind::Bpf);
}

#[test]
fn change_of_a_region_meets_faults_of_files() {
    some_calls("fault-region-files", Scenario::Region, Kind::Files);
}

#[test]
fn change_of_a_region_meets_faults_of_lookups() {
    some_calls("fault-region-lookup", Scenario::Region, Kind::BpfLookup);
}

#[test]
fn change_of_a_region_meets_faults_of_netlink() {
    some_calls("fault-region-netlink", Scenario::Region, Kind::Netlink);
}

#[test]
fn change_of_a_region_meets_faults_of_the_log() {
    some_calls("fault-region-log", Scenario::Region, Kind::Log);
}

#[test]
fn end_of_a_rule_meets_faults_of_bpf() {
    some_calls("fault-end-bpf", Scenario::End, Kind::Bpf);
}

#[test]
fn end_of_a_rule_meets_faults_of_lookups() {
    some_calls("fault-end-lookup", Scenario::End, Kind::BpfLookup);
}

#[test]
fn end_of_a_rule_meets_faults_of_netlink() {
    some_calls("fault-end-netlink", Scenario::End, Kind::Netlink);
}

#[test]
fn end_of_a_rule_meets_faults_of_the_log() {
    some_calls("fault-end-log", Scenario::End, Kind::Log);
}
