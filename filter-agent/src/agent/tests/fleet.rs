use super::*;
use crate::{
    fleet::{
        Answer as FleetAnswer, Found as FleetFound, News, Unwritten, Value,
        host_status::DatabaseStatus,
    },
    history::{Wanted as HistoryWanted, What},
    policy::Source,
    report::FleetState,
};

const FLEET: &str = "fleet: {endpoints: ['http://127.0.0.1:2379'], insecure: true, host: db7}\n";

/// The usual policy, whose database the fleet may open.
fn of_fleet(number: u8, fleet: &str) -> String {
    let text = policy(number, "").replace("  force_tls", &format!("  fleet: {fleet}\n  force_tls"));
    format!("{FLEET}{text}")
}

fn world(fleet: &str) -> World {
    let mut world = settled();
    world.text = of_fleet(1, fleet);
    let mut answer = world.reload();
    world.settle(OFFICE);
    answer.try_recv().unwrap().unwrap();
    world
}

impl World {
    fn news(&mut self, revision: i64, text: &str) {
        let value = Value {
            text: text.into(),
            create_revision: 3,
            mod_revision: revision,
            version: revision - 2,
        };
        self.news_of(0, revision, value);
    }

    fn news_of(&mut self, era: u64, revision: i64, value: Value) {
        let answer = FleetAnswer {
            cluster: 7,
            era,
            revision,
            documents: [("orders".into(), FleetFound::Value(value))].into(),
        };
        self.send(Event::Fleet(News::Answer {
            answer,
            healed: 0,
            rang: self.now.boot,
        }));
    }

    /// The last report of the database.
    fn reported(&self) -> DatabaseStatus {
        self.reports.last().unwrap().databases["orders"].clone()
    }

    fn verified(&mut self, errors: &[&str]) {
        let mut checked = checked();
        checked.verified.errors = errors.iter().map(ToString::to_string).collect();
        self.send(Event::Checked(checked));
    }

    /// Sources of the fleet's rules that the agent holds to be in force.
    fn by_fleet(&self) -> Vec<String> {
        let database = &self.agent.file.policy.databases[0];
        let rules = database.fleet_rules().iter();
        rules.map(|rule| rule.source.to_string()).collect()
    }
}

#[test]
fn document_is_in_force_kept_and_in_the_history() {
    let mut world = world("true");
    let commits = world.commits;
    world.news(4, "rules: [{cidr: 198.51.100.0/24}, {region: osc-fr1}]");
    world.settle(OFFICE);
    assert_eq!(world.by_fleet(), ["198.51.100.0/24", "region osc-fr1"]);
    world.pass(0);
    world.settle(OFFICE);
    // The region is looked up from then on, and in force with its answer.
    assert_eq!(world.allowed("osc-fr1"), ["198.51.100.7/32"]);
    assert_eq!(world.commits, commits + 2);
    let Some(Write::Fleet(kept)) = world.disk.get(&Record::Fleet) else {
        panic!("it is not on disk");
    };
    assert_eq!(**kept, world.agent.fleet.kept());
    let listing = world.agent.history.list(&HistoryWanted::default()).unwrap();
    let What::Fleet(past) = &listing.changes[0].what else {
        panic!("{listing:?}");
    };
    assert_eq!(past.documents, [("orders".to_owned(), Some(4))].into());
    // Another revision of the same rules changes nothing in the kernel.
    world.news(
        5,
        "rules: [{cidr: 198.51.100.0/24}, {region: osc-fr1}] # same",
    );
    world.settle(OFFICE);
    assert_eq!(world.commits, commits + 2);
    let database = &world.agent.file.policy.databases[0];
    let document = database.fleet.as_ref().unwrap().document.unwrap();
    assert_eq!(document.revision, 5);
    // A region that nothing names any more is forgotten.
    world.news(6, "rules: []");
    world.settle(OFFICE);
    assert_eq!(world.by_fleet(), [""; 0]);
    assert!(!world.agent.regions.contains_key("osc-fr1"));
}

#[test]
fn document_that_the_kernel_refuses_changes_nothing_and_is_tried_again() {
    let mut world = world("true");
    world.news(4, "rules: [{cidr: 198.51.100.0/24}]");
    world.perform(world.find(is_commit).unwrap(), OFFICE, true, false);
    world.settle(OFFICE);
    assert_eq!(world.by_fleet(), [""; 0]);
    assert!(world.agent.fleet.documents().is_empty());
    world.news(4, "rules: [{cidr: 198.51.100.0/24}]");
    world.settle(OFFICE);
    assert_eq!(world.by_fleet(), ["198.51.100.0/24"]);
    // Without an answer after a pause; and not, once something else is wanted.
    world.news(5, "rules: [{cidr: 198.51.100.0/25}]");
    world.perform(world.find(is_commit).unwrap(), OFFICE, true, false);
    world.settle(OFFICE);
    assert_eq!(world.by_fleet(), ["198.51.100.0/24"]);
    world.pass(60);
    world.settle(OFFICE);
    assert_eq!(world.by_fleet(), ["198.51.100.0/25"]);
    world.news(6, "rules: []");
    world.perform(world.find(is_commit).unwrap(), OFFICE, true, false);
    world.settle(OFFICE);
    world.news(7, "rules: [{cidr: 198.51.100.0/25}]");
    world.settle(OFFICE);
    assert!(world.agent.stuck.is_none() && world.agent.refused_fleet.is_none());
    let commits = world.commits;
    world.pass(60);
    world.settle(OFFICE);
    assert_eq!(
        (world.commits, world.by_fleet()),
        (commits, vec!["198.51.100.0/25".into()])
    );
}

#[test]
fn reload_judges_documents_anew() {
    let mut world = world("true");
    world.news(4, "rules: [{cidr: 198.51.100.0/24}]");
    world.settle(OFFICE);
    let reload = |world: &mut World, text: String| {
        world.text = text;
        let mut answer = world.reload();
        world.settle(OFFICE);
        answer.try_recv().unwrap().unwrap();
        world.by_fleet()
    };
    assert_eq!(reload(&mut world, of_fleet(2, "true")), ["198.51.100.0/24"]);
    let narrow = of_fleet(2, "{within: [203.0.113.0/24]}");
    assert_eq!(reload(&mut world, narrow), [""; 0]);
    let errors = world.agent.snapshot().fleet().unwrap().documents;
    let error = errors[0].error.clone().unwrap();
    assert!(error.contains("198.51.100.0/24"), "{error}");
    // The text is known still.
    assert_eq!(reload(&mut world, of_fleet(2, "true")), ["198.51.100.0/24"]);
    assert_eq!(reload(&mut world, policy(2, "")), [""; 0]);
    assert!(world.agent.fleet.documents().is_empty());
}

#[test]
fn etcd_that_is_gone_or_went_back_changes_nothing() {
    let mut world = world("true");
    world.news(5, "rules: [{cidr: 198.51.100.0/24}]");
    world.settle(OFFICE);
    let commits = world.commits;
    world.send(Event::Fleet(News::Lost("https://etcd: refused".into())));
    world.news(4, "rules: [{cidr: 198.51.100.0/24}, {cidr: 192.0.2.0/24}]");
    world.settle(OFFICE);
    assert_eq!(world.by_fleet(), ["198.51.100.0/24"]);
    assert_eq!(world.commits, commits);
    let fleet = world.agent.snapshot().fleet().unwrap();
    assert!(fleet.held.unwrap().text.contains("went back"));
    let said = world.log.iter().filter(|line| line.contains("went back"));
    assert_eq!(said.count(), 1, "{:?}", world.log);
}

/// Rules that a rollout adds end with it; those that it takes away come back then. Setting the clock back does not begin it
/// again.
#[test]
fn rollout_ends_at_its_time_for_good_with_etcd_away() {
    let mut world = world("true");
    let until = at(600).wall;
    world.news(
        4,
        &format!(
            "rules: [{{cidr: 198.51.100.0/24}}]\nrollout: {{on: [db7], until: '{until}', rules: [{{cidr: 203.0.113.0/24}}]}}"
        ),
    );
    world.settle(OFFICE);
    assert_eq!(world.by_fleet(), ["203.0.113.0/24"]);
    let rule = &world.agent.file.policy.databases[0].fleet_rules()[0];
    assert_eq!(rule.expires, Some(until));
    assert_eq!(rule.source, Source::Cidr("203.0.113.0/24".parse().unwrap()));
    world.pass(599);
    world.settle(OFFICE);
    assert_eq!(world.by_fleet(), ["203.0.113.0/24"]);
    world.pass(1);
    world.settle(OFFICE);
    assert_eq!(world.by_fleet(), ["198.51.100.0/24"]);
    world.now.wall = at(10).wall;
    world.pass(1);
    world.settle(OFFICE);
    assert_eq!(world.by_fleet(), ["198.51.100.0/24"]);
    let Some(Write::Fleet(kept)) = world.disk.get(&Record::Fleet) else {
        panic!("it is not on disk");
    };
    let policy = &world.agent.file.policy;
    let again = Fleet::restore(kept.as_ref().clone(), policy, world.now.steady);
    assert!(again.documents()["orders"].rollout_over);
}

#[test]
fn status_is_reported_where_it_is_news_and_every_ten_minutes() {
    let mut world = world("{widest: [/16, /48], within: [198.51.100.0/24]}");
    let before = world.reported();
    assert_eq!((before.seen, before.enforced), (None, None));
    assert_eq!(before.state, FleetState::Unknown);
    let text = "rules: [{cidr: 198.51.100.0/24}]";
    world.news(4, text);
    assert_eq!(world.reported(), before, "nothing of it is in force");
    world.settle(OFFICE);
    let after = world.reported();
    assert_eq!((after.seen, after.enforced), (Some(4), Some(4)));
    assert_eq!(
        after.sha256,
        Some(crate::policy_file::hash(text.as_bytes()))
    );
    assert_eq!((after.state, after.error), (FleetState::Active, None));
    assert_eq!((after.rules, after.enforced_ms), (1, Some(0.0)));
    let bounds = after.bounds.unwrap();
    assert_eq!(
        (bounds.widest, bounds.floor),
        (["/16".into(), "/48".into()], 3)
    );
    assert_eq!(bounds.within, ["198.51.100.0/24".parse().unwrap()]);
    assert!(
        bounds.regions.contains("osc-fr1"),
        "any that the policy has"
    );
    let status = world.reports.last().unwrap();
    assert_eq!((status.boot.as_str(), status.revision), ("boot", Some(4)));
    // Refused: what is in force is another one, and why.
    world.news(5, "rules: [{cidr: 192.0.2.0/24}]");
    let refused = world.reported();
    assert_eq!((refused.seen, refused.enforced), (Some(5), Some(4)));
    assert_eq!(refused.state, FleetState::Refused);
    assert!(refused.error.unwrap().contains("192.0.2.0/24"));
    world.settle(OFFICE);
    let count = world.reports.len();
    world.pass(599);
    world.settle(OFFICE);
    assert_eq!(world.reports.len(), count, "{:?}", world.reports);
    world.pass(1);
    world.settle(OFFICE);
    assert_eq!(world.reports.len(), count + 1);
}

#[test]
fn document_is_not_reported_as_enforced_unless_the_kernel_does_it() {
    let mut world = world("true");
    world.news(4, "rules: [{cidr: 198.51.100.0/24}]");
    world.settle(OFFICE);
    world.verified(&["eth0 is not filtered"]);
    let report = world.reported();
    assert_eq!((report.enforced, report.sha256), (None, None));
    let error = report.error.unwrap();
    assert_eq!(error, "not enforced: eth0 is not filtered");
    world.verified(&[]);
    let report = world.reported();
    assert_eq!((report.enforced, report.error), (Some(4), None));
    // The kernel takes no change.
    world.news(5, "rules: []");
    world.perform(world.find(is_commit).unwrap(), OFFICE, true, false);
    let report = world.reported();
    assert_eq!(report.enforced, Some(4));
    assert!(report.error.unwrap().contains("no memory"));
    // That it does not is news of the era that was raised.
    let value = Value {
        text: "rules: []".into(),
        create_revision: 3,
        mod_revision: 6,
        version: 4,
    };
    world.news_of(1, 6, value);
    world.perform(world.find(is_commit).unwrap(), OFFICE, true, false);
    let report = world.reported();
    assert!(report.error.unwrap().contains("no memory"));
    assert_eq!((report.seen, report.enforced), (Some(6), Some(4)));
    assert_eq!(world.reports.last().unwrap().era, Some(1));
}

#[test]
fn region_of_a_document_that_allows_nobody_is_reported() {
    let mut world = world("true");
    let end = at(2).wall;
    world.news(
        4,
        &format!("rules: [{{region: osc-fr1, expires: '{end}'}}]"),
    );
    world.perform(world.find(is_commit).unwrap(), OFFICE, false, false);
    world.pass(0);
    assert_eq!(world.reported().enforced, None, "it is being looked up");
    let is_look_up = |effect: &Effect| matches!(effect, Effect::LookUp(_));
    world.perform(world.find(is_look_up).unwrap(), OFFICE, true, false);
    world.settle(OFFICE);
    let report = world.reported();
    assert_eq!(report.enforced, Some(4));
    let error = "region osc-fr1 has no addresses and allows nobody: no answer";
    assert_eq!(report.error.as_deref(), Some(error));
    world.pass(3);
    assert_eq!(world.reported().error, None);
}

#[test]
fn nothing_is_reported_where_nothing_is_followed() {
    let mut world = world("true");
    let reload = |world: &mut World, text: String| {
        world.text = text;
        let mut answer = world.reload();
        world.settle(OFFICE);
        answer.try_recv().unwrap().unwrap();
        world.pass(700);
        world.settle(OFFICE);
    };
    let count = world.reports.len();
    let frozen = of_fleet(2, "true").replace("host: db7", "frozen: true");
    reload(&mut world, frozen);
    reload(&mut world, policy(2, ""));
    // No key can have this name.
    let own = of_fleet(2, "true").replace(", host: db7", "");
    world.agent.this_host = ThisHost::new("db 1".into(), Some("boot".into()));
    reload(&mut world, own.clone());
    assert_eq!(world.reports.len(), count);
    let fleet = world.agent.snapshot().fleet().unwrap();
    let why = fleet.status_unwritten.unwrap().text;
    assert!(why.contains("\"db 1\" is not a valid name"), "{why}");
    world.agent.this_host = ThisHost::new("db1".into(), Some("boot".into()));
    reload(&mut world, own);
    assert!(world.reports.len() > count);
    assert_eq!(world.agent.snapshot().fleet().unwrap().host, "db1");
}

#[test]
fn status_that_is_not_written_is_logged_once_and_shown_until_it_is() {
    let mut world = world("true");
    let told = |world: &mut World, result: Result<(), Unwritten>| {
        world.send(Event::Fleet(News::Status(result)));
        let fleet = world.agent.snapshot().fleet().unwrap();
        fleet.status_unwritten.map(|it| it.text).unwrap_or_default()
    };
    for _ in 0..2 {
        let why = told(
            &mut world,
            Err(Unwritten::Failed("permission denied".into())),
        );
        assert!(why.ends_with("permission denied"), "{why}");
    }
    let why = told(&mut world, Err(Unwritten::NameTaken));
    assert!(
        why.contains("another host of the fleet has the name db7"),
        "{why}"
    );
    for _ in 0..2 {
        assert_eq!(told(&mut world, Ok(())), "");
    }
    assert!(
        world
            .agent
            .snapshot()
            .fleet()
            .unwrap()
            .status_written
            .is_some()
    );
    let lines = |text: &str| world.log.iter().filter(|line| line.contains(text)).count();
    let counts = ["permission denied", "has the name", "written to etcd again"].map(lines);
    assert_eq!(counts, [1, 1, 1], "{:?}", world.log);
}
