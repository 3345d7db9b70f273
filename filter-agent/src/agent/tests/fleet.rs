use super::*;
use crate::{
    fleet::{Answer as FleetAnswer, Found as FleetFound, News, Value},
    history::{Wanted as HistoryWanted, What},
    policy::Source,
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
        let answer = FleetAnswer {
            cluster: 7,
            era: 0,
            revision,
            documents: [("orders".into(), FleetFound::Value(value))].into(),
        };
        self.send(Event::Fleet(News::Answer {
            answer,
            healed: 0,
            rang: self.now.boot,
        }));
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
