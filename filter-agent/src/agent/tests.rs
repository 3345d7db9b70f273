mod fleet;
mod waiting;
mod window;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    time::Duration,
};

use anyhow::anyhow;
use fastrand::Rng;
use tokio::sync::oneshot;

use super::*;
use crate::{
    compile::compile,
    event::Order,
    fleet::host_status::HostStatus,
    kernel::difference::Difference,
    look_ups::LookUp,
    region::answer::{Answer, Found},
    report::{Enforced, Timing, Verified},
    rules,
    temporary::Kept,
};

const START: i64 = 1_767_225_600;

fn at(seconds: i64) -> Now {
    let time = Timestamp::from_second(START + seconds).unwrap();
    Now {
        boot: BootTime(1_000_000_000 * (1_000 + seconds) as u64),
        steady: time,
        wall: time,
    }
}

/// A policy with a file region, a DNS region and a rule; `number`: a network of its own.
fn policy(number: u8, more: &str) -> String {
    format!(
        "interfaces: [eth0]\nregions:\n  office: {{file: /etc/office.txt, retire_after: 0s, max_shrink: 100%}}\n  \
         cloud: {{dns: [egress.example.net], retire_after: 60s, shrink_after: 0s}}\ndatabases:\n- name: orders\n  port: 5432\n  \
         model: dedicated\n  force_tls: false\n  rules: [{{cidr: 192.0.{number}.0/24}}, {{region: office}}, \
         {{region: cloud}}{more}]\n"
    )
}

fn file(text: &str) -> PolicyFile {
    PolicyFile::parse(Path::new("/etc/policy.yaml"), text.into()).unwrap()
}

fn plan() -> report::Plan {
    report::Plan {
        file: "/etc/policy.yaml".into(),
        hash: String::new(),
        difference: Difference::default(),
        settings: Vec::new(),
        attached: Vec::new(),
        detached: Vec::new(),
        warnings: Vec::new(),
        cut: Vec::new(),
        cut_unknown: Vec::new(),
        lock_out: Vec::new(),
    }
}

fn checked() -> Checked {
    Checked {
        remembered: Remembered::default(),
        entries: Vec::new(),
        verified: Verified {
            at: Timestamp::UNIX_EPOCH,
            probes: 1,
            interfaces: vec!["eth0".into()],
            errors: Vec::new(),
        },
        summary: None,
        last_hits: None,
    }
}

fn committed(order: &Order) -> Committed {
    let compiled = compile(&order.file.policy, &order.prefixes, &order.timed);
    Committed {
        before: Default::default(),
        report: plan().into(),
        enforced: Enforced {
            file: order.file.path.clone(),
            timing: Timing {
                accepted: order.accepted.at,
                compiled_ms: 0.0,
                enforced_ms: 0.0,
                verified_ms: Some(0.0),
                interfaces: Vec::new(),
            },
            next_expiry: compiled.next_end.map(|end| order.timed.now.date_of(end)),
        },
        compiled: Arc::new(compiled),
        timed: Arc::new(order.timed.clone()),
        entries: Vec::new(),
        restarted: BTreeSet::new(),
        errors: Vec::new(),
        not_taken_over: None,
    }
}

/// The regions of a policy before any is looked up.
fn not_looked_up(file: &PolicyFile) -> Regions {
    region::next(&file.policy, &Regions::new(), BTreeMap::new(), at(0).steady).unwrap()
}

/// The result of a start at `at(0)`.
fn started(file: PolicyFile, regions: Regions) -> Started {
    let file = Arc::new(file);
    let order = Order {
        accepted: file.accepted,
        file: file.clone(),
        prefixes: region::prefixes(&regions),
        timed: Timed::of(&file.policy, at(0)),
    };
    Started {
        path: "/etc/policy.yaml".into(),
        regions,
        unsaved: BTreeSet::new(),
        fleet: crate::fleet::state::State::restore(Default::default(), &file.policy, at(0).steady),
        kept_fleet: Some(Default::default()),
        this_host: ThisHost::new("db1".into(), Some("boot".into())),
        file,
        timed: order.timed.clone(),
        committed: committed(&order),
        kept: Kept::default(),
        unkept: None,
        checked: checked(),
        confirmed: None,
        window: None,
        kept_window: Some(Default::default()),
        is_window_unknown: false,
        abandoned: Default::default(),
        is_abandoned: false,
        instead_of_file: None,
        unreadable: None,
        history: History::default(),
        change_id: None,
        unread_history: Vec::new(),
    }
}

fn refused(is_mixed: bool) -> Refused {
    let kernel = if is_mixed {
        Kernel::Mixed
    } else {
        Kernel::Unchanged
    };
    Refused {
        error: anyhow!("no memory"),
        kernel,
    }
}

fn found(address: &str) -> Result<Answer> {
    Ok(Answer::Found(Found {
        prefixes: vec![address.parse().unwrap()],
        ask_again: Some(Duration::from_secs(60)),
        ..Found::default()
    }))
}

/// The world around the agent: a kernel, a disk and sources, as plain values.
struct World {
    agent: Agent,
    now: Now,
    effects: Vec<Effect>,
    log: Vec<String>,
    /// The text of the policy file.
    text: String,
    /// The policy and prefixes that the kernel holds; and whether something else than that may be there.
    kernel: (String, rules::Regions),
    is_dirty: bool,
    is_detached: bool,
    disk: BTreeMap<Record, Write>,
    commits: usize,
    /// How often the enforcer reset what a policy that is confirmed cut off.
    resets: usize,
    /// Reports of the host to the fleet.
    reports: Vec<Arc<HostStatus>>,
}

impl World {
    fn new() -> Self {
        let text = policy(1, "");
        let file = file(&text);
        let regions = not_looked_up(&file);
        let prefixes = region::prefixes(&regions);
        let now = at(0);
        let (agent, effects) = Agent::start(started(file, regions), now);
        let mut world = Self {
            agent,
            now,
            effects: Vec::new(),
            log: Vec::new(),
            kernel: (text.clone(), prefixes),
            is_dirty: false,
            is_detached: false,
            text,
            disk: BTreeMap::new(),
            commits: 0,
            resets: 0,
            reports: Vec::new(),
        };
        world.take(effects);
        world
    }

    fn take(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Log(entry) => self.log.push(entry.to_string()),
                Effect::Report(status) => self.reports.push(status),
                effect => self.effects.push(effect),
            }
        }
    }

    fn send(&mut self, event: Event) {
        let effects = self.agent.handle(event, self.now);
        self.take(effects);
        self.check();
    }

    /// At most one change is under way, and between changes the agent's picture is what the kernel holds.
    fn check(&self) {
        let is_change = |effect: &&Effect| matches!(effect, Effect::Commit { .. } | Effect::Detach);
        let changes = self.effects.iter().filter(is_change).count();
        assert!(changes <= 1, "{:?}", self.effects);
        assert_eq!(changes == 1, self.agent.under_way.is_some());
        if changes == 0 {
            let snapshot = self.agent.snapshot();
            assert_eq!(snapshot.file.text, self.kernel.0);
            assert_eq!(region::prefixes(&snapshot.regions), self.kernel.1);
            assert!(!self.is_dirty || self.agent.stuck.is_some());
        }
    }

    fn find(&self, is_meant: impl Fn(&Effect) -> bool) -> Option<usize> {
        self.effects.iter().position(is_meant)
    }

    /// Carries out one effect. `fail`: what can fail does; `dirty`: and cannot be taken back.
    fn perform(&mut self, place: usize, content: &str, fail: bool, dirty: bool) {
        match self.effects.remove(place) {
            Effect::ReadPolicy { proposal, text, .. } => {
                let text = text.unwrap_or_else(|| self.text.clone());
                let file = PolicyFile::parse(Path::new("/etc/policy.yaml"), text);
                let file = if fail {
                    Err(anyhow!("unreadable"))
                } else {
                    file
                };
                self.send(Event::PolicyRead { proposal, file });
            }
            Effect::LookUp(LookUp { number, region, .. }) => {
                let answer = match region.file() {
                    _ if fail => Err(anyhow!("no answer")),
                    Some(_) => found(content),
                    None => found("198.51.100.7/32"),
                };
                self.send(Event::LookedUp { number, answer });
            }
            Effect::Commit { order, .. } => {
                self.commits += 1;
                if fail {
                    self.is_dirty |= dirty;
                    self.send(Event::Committed(Err(refused(dirty)).into()));
                } else {
                    self.is_dirty = false;
                    self.kernel = (order.file.text.clone(), order.prefixes.clone());
                    self.send(Event::Committed(Ok((committed(&order), checked())).into()));
                }
            }
            Effect::Plan { reply, .. } => reply.send(Ok(plan())),
            Effect::HashPolicy(_) => {
                let hash = crate::policy_file::hash(&self.text);
                let hash = if fail {
                    Err(anyhow!("unreadable"))
                } else {
                    Ok(hash)
                };
                self.send(Event::PolicyHashed(hash));
            }
            Effect::KeepTried { decided, reply } => {
                self.resets += 1;
                self.send(Event::Checked(checked()));
                reply.send(Ok(*decided));
            }
            Effect::Detach => {
                self.is_detached = !fail;
                let result = if fail {
                    Err(anyhow!("busy"))
                } else {
                    Ok(vec![])
                };
                self.send(Event::Detached(result));
            }
            Effect::Save(write) => {
                let result = if fail { Err(anyhow!("full")) } else { Ok(()) };
                if !fail {
                    self.disk.insert(write.record(), write.clone());
                }
                self.send(Event::Saved { write, result });
            }
            Effect::Fail(error) => panic!("{error}"),
            Effect::Watch(_)
            | Effect::Follow(_)
            | Effect::Status(_)
            | Effect::Ready
            | Effect::Report(_)
            | Effect::Count
            | Effect::Stop
            | Effect::Log(_) => {}
        }
    }

    /// Carries out everything, successfully.
    fn settle(&mut self, content: &str) {
        while !self.effects.is_empty() {
            self.perform(0, content, false, false);
        }
    }

    fn pass(&mut self, seconds: i64) {
        let more = Duration::from_secs(seconds as u64);
        self.now.steady += more;
        self.now.wall += more;
        self.now.boot = self.now.boot.after(more);
        self.send(Event::Tick);
    }

    fn reload(&mut self) -> oneshot::Receiver<Result<report::Reloaded>> {
        self.reload_with(ReloadOptions::default())
    }

    fn reload_with(
        &mut self,
        options: ReloadOptions,
    ) -> oneshot::Receiver<Result<report::Reloaded>> {
        let (reply, answer) = oneshot::channel();
        let reply = Reply(reply);
        self.send(Event::Request(Request::Reload { options, reply }));
        answer
    }

    fn refresh(&mut self, region: &str, accept: bool) -> Refreshed {
        let (reply, answer) = oneshot::channel();
        self.send(Event::Request(Request::Refresh {
            region: Some(region.into()),
            accept,
            reply: Reply(reply),
        }));
        answer
    }

    fn allowed(&self, region: &str) -> Vec<String> {
        let prefixes = self.kernel.1.get(region).map(|prefixes| prefixes.to_vec());
        let prefixes = prefixes.unwrap_or_default();
        prefixes.iter().map(ToString::to_string).collect()
    }
}

type Refreshed = oneshot::Receiver<Result<Vec<report::Refreshed>>>;

fn is_commit(effect: &Effect) -> bool {
    matches!(effect, Effect::Commit { .. })
}

fn is_look_up(effect: &Effect) -> bool {
    matches!(effect, Effect::LookUp(_))
}

const OFFICE: &str = "203.0.113.1/32";

fn settled() -> World {
    let mut world = World::new();
    world.settle(OFFICE);
    assert_eq!(world.allowed("office"), [OFFICE]);
    world
}

fn error<T: std::fmt::Debug>(answer: &mut oneshot::Receiver<Result<T>>) -> String {
    format!("{:#}", answer.try_recv().unwrap().unwrap_err())
}

#[test]
fn reload_waits_for_its_file_and_its_regions_and_for_the_disk() {
    let mut world = settled();
    world.text = policy(2, "");
    let mut answer = world.reload();
    let read = world.find(|e| matches!(e, Effect::ReadPolicy { .. }));
    world.perform(read.unwrap(), OFFICE, false, false);
    assert!(world.find(is_commit).is_none());
    let look_up = world.find(is_look_up).unwrap();
    world.perform(look_up, OFFICE, false, false);
    world.perform(world.find(is_commit).unwrap(), OFFICE, false, false);
    assert_eq!(world.kernel.0, policy(2, ""));
    assert!(answer.try_recv().is_err());
    world.settle(OFFICE);
    assert!(answer.try_recv().unwrap().is_ok());
    let Some(Write::Confirmed(Some(confirmed))) = world.disk.get(&Record::Confirmed) else {
        panic!("nothing is confirmed");
    };
    assert_eq!(confirmed.policy, policy(2, ""));
}

#[test]
fn disk_that_hangs_delays_a_reply_for_a_second() {
    let mut world = settled();
    world.text = policy(2, "");
    let mut answer = world.reload();
    while let Some(place) = world.find(|effect| !matches!(effect, Effect::Save(_))) {
        world.perform(place, OFFICE, false, false);
    }
    assert!(answer.try_recv().is_err());
    world.pass(1);
    assert!(answer.try_recv().unwrap().is_ok());
}

/// Fault A3.
#[test]
fn what_fails_after_the_commit_refuses_nothing_and_is_not_undone_later() {
    let mut world = settled();
    world.text = policy(2, "");
    let mut answer = world.reload();
    while world.find(is_commit).is_none() {
        let place = world.find(|effect| !matches!(effect, Effect::Save(_)));
        world.perform(place.unwrap(), OFFICE, false, false);
    }
    let Effect::Commit { order, .. } = world.effects.remove(world.find(is_commit).unwrap()) else {
        unreachable!()
    };
    let mut done = committed(&order);
    done.errors = vec!["remove /sys/fs/bpf/filter-agent/v4/link_7: busy".into()];
    world.kernel = (order.file.text.clone(), order.prefixes.clone());
    world.send(Event::Committed(Ok((done, checked())).into()));
    world.settle(OFFICE);
    let reloaded = answer.try_recv().unwrap().unwrap();
    assert_eq!(reloaded.errors.len(), 1);
    // The next change of a region is one of the new policy.
    world.send(Event::FileChanged("/etc/office.txt".into()));
    world.settle("203.0.113.2/32");
    assert_eq!(world.kernel.0, policy(2, ""));
    assert_eq!(world.allowed("office"), ["203.0.113.2/32"]);
}

/// Fault A4.
#[test]
fn removal_that_the_kernel_refuses_is_tried_again_with_pauses() {
    let mut world = settled();
    let cloud = |answer: &str, world: &mut World| {
        let number = world.agent.look_ups.begin("cloud", true, None);
        let answer = found(answer);
        world.send(Event::LookedUp { number, answer });
        while let Some(place) = world.find(is_commit) {
            world.perform(place, OFFICE, false, false);
        }
    };
    cloud("198.51.100.8/32", &mut world);
    // As every later look-up returns.
    cloud("198.51.100.7/32", &mut world);
    assert_eq!(world.allowed("cloud").len(), 2);
    world.settle(OFFICE);
    let mut tries = 0;
    for _ in 0..600 {
        world.pass(1);
        while let Some(place) = world.find(|_| true) {
            let is_change = is_commit(&world.effects[place]);
            tries += usize::from(is_change);
            // Look-ups fail as well: only time makes changes.
            world.perform(place, OFFICE, is_change, false);
        }
        assert!(!world.agent.until_tick(world.now).is_zero());
    }
    assert!((3..12).contains(&tries), "{tries} tries");
    assert!(world.agent.snapshot().errors[0].contains("no memory"));
    let lines = world.log.iter().filter(|line| line.contains("no memory"));
    assert_eq!(lines.count(), 1);
    for _ in 0..2 {
        world.pass(400);
        world.settle(OFFICE);
    }
    assert_eq!(world.allowed("cloud").len(), 1);
    assert!(world.agent.snapshot().errors.is_empty());
}

/// Fault A7.
#[test]
fn file_that_changes_while_a_reload_waits_is_read_again() {
    let mut world = settled();
    world.text = policy(2, "");
    world.reload();
    let read = world.find(|e| matches!(e, Effect::ReadPolicy { .. }));
    world.perform(read.unwrap(), OFFICE, false, false);
    // The read under way has the old content.
    let stale = world.find(is_look_up).unwrap();
    let Effect::LookUp(stale) = world.effects.remove(stale) else {
        unreachable!()
    };
    world.send(Event::FileChanged("/etc/office.txt".into()));
    let number = stale.number;
    let answer = found(OFFICE);
    world.send(Event::LookedUp { number, answer });
    assert!(world.find(is_commit).is_none());
    world.settle("203.0.113.9/32");
    assert_eq!(world.kernel.0, policy(2, ""));
    assert_eq!(world.allowed("office"), ["203.0.113.9/32"]);
}

/// Fault A9.
#[test]
fn set_that_a_start_read_is_saved() {
    let file = file(&policy(1, ""));
    let mut regions = not_looked_up(&file);
    for state in regions.values_mut() {
        state.take(found(OFFICE), false, at(0).steady);
    }
    let mut started = started(file, regions);
    started.unsaved.insert("office".into());
    let (_, effects) = Agent::start(started, at(0));
    let saved = effects.iter().filter_map(|effect| match effect {
        Effect::Save(Write::Region { name, .. }) => Some(name.as_str()),
        _ => None,
    });
    assert_eq!(saved.collect::<Vec<_>>(), ["office"]);
}

/// Fault B10: a later look-up took the place of one whose result was to be accepted, and did not accept it.
#[test]
fn refresh_with_accept_outlives_a_later_look_up() {
    let mut world = settled();
    let members = (1..=9).map(|host| format!("198.51.100.{host}/32").parse().unwrap());
    let answer = Ok(Answer::Found(Found {
        prefixes: members.collect(),
        ..Found::default()
    }));
    let number = world.agent.look_ups.begin("cloud", false, None);
    world.send(Event::LookedUp { number, answer });
    world.settle(OFFICE);
    // Eight of nine members leave: too many, unless that is accepted.
    let mut first = world.refresh("cloud", true);
    let mut second = world.refresh("cloud", false);
    world.settle(OFFICE);
    for answer in [&mut first, &mut second] {
        let refreshed = answer.try_recv().unwrap().unwrap();
        assert_eq!(refreshed[0].error, None);
        assert_eq!(refreshed[0].left.len(), 8);
    }
}

#[test]
fn refresh_of_a_region_that_no_rule_names_says_what_rules_name() {
    let mut world = settled();
    let mut answer = world.refresh("cluod", false);
    let error = error(&mut answer);
    assert_eq!(
        error,
        "no rule names region cluod; the rules name cloud, office"
    );
}

/// Fault A13.
#[test]
fn change_that_could_not_be_taken_back_is_not_called_refused_without_effect_and_is_repaired() {
    let mut world = settled();
    world.text = policy(2, "");
    let mut answer = world.reload();
    while let Some(place) = world.find(|_| true) {
        let is_change = is_commit(&world.effects[place]);
        world.perform(place, OFFICE, is_change, is_change);
    }
    let error = error(&mut answer);
    assert!(!error.contains("nothing is changed"), "{error}");
    assert!(error.contains("tries to take back"), "{error}");
    assert!(world.is_dirty && !world.agent.snapshot().errors.is_empty());
    world.pass(11);
    world.settle(OFFICE);
    assert!(!world.is_dirty);
    assert_eq!(world.kernel.0, policy(1, ""));
    assert!(world.agent.snapshot().errors.is_empty());
}

#[test]
fn reload_that_is_refused_says_that_nothing_is_changed() {
    let mut world = settled();
    for (text, fail) in [("interfaces: [", false), (&*policy(2, ""), true)] {
        world.text = text.into();
        let mut answer = world.reload();
        while let Some(place) = world.find(|_| true) {
            let fails = fail && is_commit(&world.effects[place]);
            world.perform(place, OFFICE, fails, false);
        }
        let error = error(&mut answer);
        assert!(
            error.starts_with("reload refused, nothing is changed: "),
            "{error}"
        );
        assert_eq!(world.kernel.0, policy(1, ""));
    }
}

/// Fault B2: a detach that failed left an agent without a filter.
#[test]
fn detach_that_fails_leaves_an_agent_that_goes_on() {
    let mut world = settled();
    let (reply, mut answer) = oneshot::channel();
    let reply = Reply(reply);
    world.send(Event::Request(Request::Detach { by: None, reply }));
    let detach = world.find(|effect| matches!(effect, Effect::Detach));
    world.perform(detach.unwrap(), OFFICE, true, false);
    assert_eq!(error(&mut answer), "busy");
    world.text = policy(3, "");
    let mut answer = world.reload();
    world.settle(OFFICE);
    assert!(answer.try_recv().unwrap().is_ok());
    let (reply, mut answer) = oneshot::channel();
    let reply = Reply(reply);
    world.send(Event::Request(Request::Detach { by: None, reply }));
    while !world
        .effects
        .iter()
        .any(|effect| matches!(effect, Effect::Stop))
    {
        world.perform(0, OFFICE, false, false);
    }
    assert!(answer.try_recv().unwrap().is_ok());
    assert_eq!(world.disk[&Record::Confirmed], Write::Confirmed(None));
}

#[test]
fn rule_that_ends_is_taken_out_also_when_the_clock_was_set_back() {
    let ends = at(100).wall;
    let more = format!(", {{cidr: 198.51.100.99/32, expires: {ends}}}");
    let mut world = settled();
    world.text = policy(2, &more);
    world.reload();
    world.settle(OFFICE);
    assert_eq!(world.agent.enforced.next_expiry, Some(ends));
    world.now.wall -= Duration::from_secs(3600);
    world.pass(99);
    world.settle(OFFICE);
    assert_eq!(world.agent.enforced.next_expiry, Some(ends));
    world.pass(1);
    world.settle(OFFICE);
    assert_eq!(world.agent.enforced.next_expiry, None);
    // Still over at the next change.
    world.send(Event::FileChanged("/etc/office.txt".into()));
    world.settle("203.0.113.2/32");
    assert_eq!(world.agent.enforced.next_expiry, None);
}

/// Random events against the model in `World::check`; in the end everything answers, and the kernel holds the
/// last good policy file with what its sources give.
#[test]
fn whatever_happens_the_agents_picture_is_what_the_kernel_holds() {
    for seed in 0..300 {
        let mut random = Rng::with_seed(seed);
        let mut world = World::new();
        let mut content = 1_u8;
        let mut reloads = Vec::new();
        let mut refreshes = Vec::new();
        for _ in 0..120 {
            let office = format!("203.0.113.{content}/32");
            match random.u8(..14) {
                0 => {
                    world.text = match random.u8(..4) {
                        0 => "interfaces: [".into(),
                        number => policy(number, ""),
                    };
                    reloads.push(world.reload());
                }
                1 => world.send(Event::Hangup),
                2 => {
                    content = random.u8(1..250);
                    world.send(Event::FileChanged("/etc/office.txt".into()));
                }
                3 => {
                    let name = if random.bool() { "office" } else { "cloud" };
                    let accept = random.bool();
                    refreshes.push(world.refresh(name, accept));
                }
                4 => {
                    let (reply, _) = oneshot::channel();
                    let (text, path, caller) = (None, None, None);
                    let reply = Reply(reply);
                    world.send(Event::Request(Request::Plan {
                        text,
                        path,
                        caller,
                        reply,
                    }));
                }
                5 => world.pass(random.i64(0..90)),
                6 => world.send(Event::Checked(checked())),
                7 => world.now.wall += Duration::from_secs(random.u64(..1000)),
                _ if !world.effects.is_empty() => {
                    let place = random.usize(..world.effects.len());
                    let (fail, dirty) = (random.u8(..4) == 0, random.bool());
                    world.perform(place, &office, fail, dirty);
                }
                _ => {}
            }
        }
        let office = format!("203.0.113.{content}/32");
        world.settle(&office);
        world.text = policy(7, "");
        let mut last = world.reload();
        for _ in 0..4 {
            world.settle(&office);
            world.pass(400);
        }
        world.settle(&office);
        assert!(last.try_recv().unwrap().is_ok(), "seed {seed}");
        assert_eq!(world.kernel.0, policy(7, ""), "seed {seed}");
        assert_eq!(world.allowed("office"), [office], "seed {seed}");
        assert!(!world.is_dirty, "seed {seed}");
        for reload in &mut reloads {
            let _ = reload.try_recv().unwrap();
        }
        for refresh in &mut refreshes {
            let _ = refresh.try_recv().unwrap();
        }
    }
}
