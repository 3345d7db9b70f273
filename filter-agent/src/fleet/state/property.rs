//! Random histories of an etcd that is written to, restored and tampered with, against a host whose policy changes, which
//! restarts, and whose kernel may refuse.

use std::collections::BTreeSet;

use fastrand::Rng;
use ipnet::IpNet;

use super::*;
use crate::{
    fleet::Value,
    policy::{FromFleet, Rule, Source, parse},
};

const NAMES: [&str; 3] = ["orders", "shop", "billing"];
const HISTORIES: u64 = 80;
const STEPS: usize = 150;

/// An etcd. Each value that is ever written is another.
#[derive(Clone, Default)]
struct Etcd {
    cluster: u64,
    era: u64,
    revision: i64,
    keys: BTreeMap<&'static str, Value>,
    /// Another one for each restore.
    branch: u32,
}

impl Etcd {
    fn put(&mut self, name: &'static str, text: String) {
        self.revision += 1;
        let revision = self.revision;
        let value = self.keys.entry(name).or_insert(Value {
            text: Vec::new(),
            create_revision: revision,
            mod_revision: 0,
            version: 0,
        });
        value.text = text.into_bytes();
        value.mod_revision = revision;
        value.version += 1;
    }

    fn answer(&self, random: &mut Rng) -> Answer {
        let mut documents = BTreeMap::new();
        for name in NAMES {
            // A read of before a reload does not have all.
            if random.u8(..20) == 0 {
                continue;
            }
            let found = match self.keys.get(name) {
                _ if random.u8(..20) == 0 => Found::Unreadable("permission denied".into()),
                Some(value) => Found::Value(value.clone()),
                None => Found::Missing,
            };
            documents.insert(name.into(), found);
        }
        Answer {
            cluster: self.cluster,
            era: self.era,
            revision: self.revision,
            documents,
        }
    }
}

fn random_document(random: &mut Rng, number: u32) -> String {
    let mut rules = |most| -> String {
        let count = if random.u8(..10) == 0 {
            31
        } else {
            random.u8(..most)
        };
        let rules = (0..count).map(|n| match random.u8(..12) {
            0 => format!(
                "{{region: {}}}, ",
                ["office", "cloud", "moon"][random.usize(..3)]
            ),
            1 => "{cidr: 0.0.0.0/0}, ".into(),
            2 => "{cidr: 198.51.100.1/24}, ".into(),
            3 => format!("{{cidr: 2001:db8:{n:x}::/48}}, "),
            4 => format!("{{cidr: 10.{n}.0.0/16}}, "),
            _ => format!("{{cidr: 198.51.{n}.0/24}}, "),
        });
        format!("[{}]", rules.collect::<String>())
    };
    let own = rules(5);
    let rollout = format!(
        "\nrollout: {{on: [db7], until: 2027-01-15T08:10:00Z, rules: {}}}",
        rules(4)
    );
    let with = random.u8(..4) == 0;
    match random.u8(..20) {
        0 => format!("# {number}"),
        1 => format!("rules: []\nmodel: shared # {number}"),
        _ => format!(
            "rules: {own}{} # {number}",
            if with { &rollout } else { "" }
        ),
    }
}

fn random_policy(random: &mut Rng) -> Policy {
    let mut text = "interfaces: [eth0]\nregions: {office: {prefixes: [192.0.2.0/24]}, cloud: {prefixes: [192.0.2.0/24]}}\n".to_owned();
    let frozen = random.u8(..12) == 0;
    text.push_str(&format!("fleet: {{endpoints: ['http://127.0.0.1:2379'], insecure: true, frozen: {frozen}}}\ndatabases:\n"));
    for (name, port) in NAMES.into_iter().zip(1..) {
        let widest = [
            "[/0, /0]",
            "[/8, /16]",
            "[/16, /48]",
            "[/24, /48]",
            "[/25, /64]",
        ];
        let within = [
            "",
            ", within: [198.51.0.0/16]",
            ", within: [10.0.0.0/8, '2001:db8::/32', 198.51.0.0/22]",
        ];
        let regions = ["", ", regions: [office]", ", regions: []"];
        let widest = widest[random.usize(..5)];
        let fleet = match random.u8(..12) {
            0 => "false".into(),
            1 => "true".into(),
            _ => format!(
                "{{widest: {widest}{}{}}}",
                within[random.usize(..3)],
                regions[random.usize(..3)]
            ),
        };
        let floor: String = (0..random.u8(..29))
            .map(|n| format!("{{cidr: 203.0.113.{n}/32}}, "))
            .collect();
        let floor = if random.bool() { floor } else { String::new() };
        text.push_str(&format!(
            "- {{name: {name}, port: {port}, model: dedicated, force_tls: false, fleet: {fleet}, rules: [{floor}]}}\n"
        ));
    }
    parse(&text).unwrap().0
}

/// Checks of a host over all its states.
#[derive(Default)]
struct Watch {
    /// Contents that believed answers held, by database.
    believed: BTreeSet<(String, String)>,
    /// Contents that were in force until a later one was.
    revoked: BTreeSet<(String, String)>,
    /// The etcd whose answer was believed last.
    branch: Option<u32>,
    /// How often each kind of state came up.
    seen: BTreeMap<&'static str, usize>,
}

impl Watch {
    fn count(&mut self, what: &'static str) {
        *self.seen.entry(what).or_default() += 1;
    }

    /// After any change.
    fn check(&mut self, before: &State, after: &State, policy: &Policy) {
        for (name, good) in after.documents() {
            self.count("in force");
            let content = (name.clone(), good.sha256.clone());
            assert!(
                self.believed.contains(&content),
                "{name}: no answer that was believed held it"
            );
            assert!(!self.revoked.contains(&content), "{name}: it was revoked");
            if let Some(old) = before.documents().get(name)
                && old.sha256 != good.sha256
            {
                self.count("replaced");
                self.revoked.insert((name.clone(), old.sha256.clone()));
            }
            let database = policy
                .databases
                .iter()
                .find(|database| database.name == *name);
            let database = database.unwrap();
            let floor = database.rules().to_vec();
            for (host, is_over) in [("db7", false), ("db8", false), ("db7", true)] {
                let rules = good.document.rules_of(host, is_over);
                expect_within(&rules, database.fleet.as_ref().unwrap());
                assert!(rules.len() + floor.len() <= 30);
            }
            // At any time.
            for rule in good.document.all_rules() {
                expect_within(std::slice::from_ref(rule), database.fleet.as_ref().unwrap());
            }
        }
    }
}

/// The bounds once more, by the addresses of a rule.
fn expect_within(rules: &[Rule], from_fleet: &FromFleet) {
    let bounds = &from_fleet.bounds;
    for rule in rules {
        match &rule.source {
            Source::Cidr(prefix) => {
                let ends = [prefix.network(), prefix.broadcast()];
                let widest = match prefix {
                    IpNet::V4(_) => bounds.widest[0],
                    IpNet::V6(_) => bounds.widest[1],
                };
                assert!(prefix.prefix_len() >= widest, "{prefix}");
                let holds = |outer: &IpNet| ends.iter().all(|end| outer.contains(end));
                assert!(
                    bounds.within.is_empty() || bounds.within.iter().any(holds),
                    "{prefix}"
                );
            }
            Source::Region(name) => {
                let is_listed = bounds
                    .regions
                    .as_ref()
                    .is_none_or(|names| names.contains(name));
                assert!(is_listed && (name == "office" || name == "cloud"), "{name}");
            }
        }
    }
}

/// Numbers that no etcd gives, or that one of another time gave.
fn tamper(answer: &mut Answer, random: &mut Rng) {
    match random.u8(..4) {
        0 => answer.cluster = random.u64(..),
        1 => answer.revision -= random.i64(1..30),
        2 => answer.revision += random.i64(1..30),
        _ => {}
    }
    for found in answer.documents.values_mut() {
        if let Found::Value(value) = found
            && random.bool()
        {
            match random.u8(..3) {
                0 => value.mod_revision += random.i64(-10..10),
                1 => value.version += random.i64(-3..3),
                _ => value.create_revision += random.i64(-5..5),
            }
        }
    }
}

fn history(seed: u64, seen: &mut BTreeMap<&'static str, usize>) {
    let mut random = Rng::with_seed(seed);
    let mut etcd = Etcd::default();
    let mut snapshots = vec![etcd.clone()];
    let (mut written, mut branches) = (0, 0);
    let mut policy = random_policy(&mut random);
    let mut now: Timestamp = "2027-01-15T08:00:00Z".parse().unwrap();
    let mut state = State::restore(Kept::default(), &policy, now);
    let mut watch = Watch::default();
    for _ in 0..STEPS {
        now += SignedDuration::from_secs(random.i64(0..20));
        let before = state.clone();
        match random.u8(..100) {
            0..30 => {
                written += 1;
                let text = random_document(&mut random, written);
                etcd.put(NAMES[random.usize(..3)], text);
            }
            30..34 => {
                etcd.revision += 1;
                etcd.keys.remove(NAMES[random.usize(..3)]);
            }
            // Other keys.
            34..38 => etcd.revision += random.i64(1..8),
            38..42 => snapshots.push(etcd.clone()),
            42..46 => {
                let revision = etcd.revision;
                etcd = snapshots[random.usize(..snapshots.len())].clone();
                branches += 1;
                etcd.branch = branches;
                match random.u8(..4) {
                    0 => etcd.cluster = u64::from(branches),
                    // `--bump-revision`.
                    1 => etcd.revision += 1_000,
                    2 => etcd.revision = etcd.revision.max(revision + random.i64(-3..3)),
                    _ => {}
                }
            }
            46..48 => {
                etcd.revision += 1;
                etcd.era += 1;
            }
            48..54 => {
                policy = random_policy(&mut random);
                state = state.under(&policy, now);
                let names = of_fleet(&policy);
                // A host knows nothing of a database that its policy names again.
                watch
                    .revoked
                    .retain(|(name, _)| names.contains_key(name.as_str()));
            }
            54..58 => {
                let text = serde_json::to_string(&state.kept()).unwrap();
                state = State::restore(serde_json::from_str(&text).unwrap(), &policy, now);
                assert_eq!(
                    state.documents(),
                    before.documents(),
                    "a restart is no change"
                );
            }
            58..60 => state.lost("no answer".into(), now),
            tampered @ 60.. => {
                let mut answer = etcd.answer(&mut random);
                let is_tampered = tampered >= 96;
                if is_tampered {
                    tamper(&mut answer, &mut random);
                }
                let next = state.take(&answer, &policy, now);
                // The kernel refuses it.
                if random.u8(..10) == 0 {
                    continue;
                }
                state = next;
                if state.is_frozen() || state.held().is_some() {
                    let kind = if state.is_frozen() { "frozen" } else { "held" };
                    watch.count(kind);
                    assert_eq!(state.documents(), before.documents(), "{kind}");
                    assert_eq!(state.marks(), before.marks(), "{kind}");
                    let is_later = watch.branch == Some(etcd.branch) && !is_tampered;
                    let is_wrong = kind == "held" && is_later;
                    assert!(!is_wrong, "a later answer is held: {:?}", state.held());
                } else {
                    let is_raised = before.marks().is_some_and(|marks| marks.era < answer.era);
                    if is_raised {
                        watch.count("raised");
                        watch.revoked.clear();
                    }
                    // The tampered text of a key stays until another answer has the key.
                    let is_whole = NAMES.iter().all(|name| {
                        let found = answer.documents.get(*name);
                        found.is_some_and(|found| !matches!(found, Found::Unreadable(_)))
                    });
                    if is_tampered {
                        watch.branch = None;
                    } else if is_whole || is_raised {
                        watch.branch = Some(etcd.branch);
                    } else {
                        watch.branch = watch.branch.filter(|branch| *branch == etcd.branch);
                    }
                    for (name, found) in &answer.documents {
                        if let Found::Value(value) = found {
                            let hash = crate::policy_file::hash(&value.text);
                            watch.believed.insert((name.clone(), hash));
                            believed(&before, &state, &policy, name, value, &mut watch);
                        }
                    }
                }
            }
        }
        watch.check(&before, &state, &policy);
    }
    for (kind, count) in watch.seen {
        *seen.entry(kind).or_default() += count;
    }
}

/// A document of a believed answer is in force if the bounds allow it; else nothing changes.
fn believed(
    before: &State,
    after: &State,
    policy: &Policy,
    name: &str,
    value: &Value,
    watch: &mut Watch,
) {
    let Some(database) = of_fleet(policy).get(name).copied() else {
        assert!(!after.documents().contains_key(name));
        return;
    };
    match parse_document(&value.text, database, policy) {
        Ok(document) => {
            assert_eq!(after.documents()[name].document, document);
            assert_eq!(after.standing(name), Standing::Active);
        }
        Err(_) => {
            watch.count("refused");
            assert_eq!(after.documents().get(name), before.documents().get(name));
            assert!(matches!(after.standing(name), Standing::Refused { .. }));
        }
    }
}

/// No sequence of answers opens more than the ceiling; nothing held takes effect; what is in force was believed; what was
/// revoked comes back in no way but by another write or another era; and no later answer of the same etcd is held.
#[test]
fn no_history_opens_what_it_must_not() {
    let mut seen = BTreeMap::new();
    for seed in 0..HISTORIES {
        let run = std::panic::catch_unwind(|| {
            let mut seen = BTreeMap::new();
            history(seed, &mut seen);
            seen
        });
        let run = run.unwrap_or_else(|_| panic!("seed {seed}"));
        for (kind, count) in run {
            *seen.entry(kind).or_default() += count;
        }
    }
    for kind in [
        "in force", "replaced", "held", "frozen", "raised", "refused",
    ] {
        let count: usize = seen.get(kind).copied().unwrap_or_default();
        assert!(count > 100, "{kind} came up {count} times: {seen:?}");
    }
}
