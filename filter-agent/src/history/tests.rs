use std::path::Path;

use super::*;

fn file(number: usize, length: usize) -> PolicyFile {
    let text = format!("interfaces: [eth0]\ndatabases: []\n# {number}\n");
    let mut file = PolicyFile::parse(Path::new("/etc/policy.yaml"), text).unwrap();
    // Longer than can be parsed in a moment.
    file.text
        .push_str(&"#".repeat(length.saturating_sub(file.text.len())));
    file
}

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(seconds).unwrap()
}

fn enforce(history: &mut History, file: &PolicyFile, state: State) -> u64 {
    let id = history.next_id();
    let past = Past {
        id,
        at: at(id as i64),
        origin: Origin::Reload,
        by: None,
        what: What::policy(file, state, Summary::default()),
    };
    history.enforced(past, file);
    id
}

fn allow(history: &mut History, database: &str) -> u64 {
    let id = history.next_id();
    history.changed(Past {
        id,
        at: at(id as i64),
        origin: Origin::Socket,
        by: None,
        what: What::Temporary(PastTemporary {
            action: Action::Allowed,
            database: database.into(),
            source: "192.0.2.1/32".parse().unwrap(),
            label: None,
            until: Some(at(1_000_000)),
        }),
    });
    id
}

fn ids(history: &History, wanted: Wanted) -> Vec<u64> {
    let changes = history.list(&wanted).unwrap().changes;
    changes.iter().map(|past| past.id).collect()
}

fn error<T: std::fmt::Debug>(result: Result<T>) -> String {
    format!("{:#}", result.unwrap_err())
}

#[test]
fn last_policies_and_last_changes_are_kept_and_do_not_push_out_each_other() {
    let mut history = History::default();
    for number in 0..=MAX_POLICIES {
        enforce(&mut history, &file(number, 0), State::Confirmed);
    }
    for _ in 0..=MAX_OTHERS {
        allow(&mut history, "orders");
    }
    let last = (MAX_POLICIES + MAX_OTHERS + 2) as u64;
    assert_eq!(history.last_id(), last);
    let all = ids(&history, Wanted::default());
    let changes = (last - MAX_OTHERS as u64 + 1..=last).rev();
    let policies = (2..=MAX_POLICIES as u64 + 1).rev();
    assert!(all.iter().copied().eq(changes.chain(policies)));
    assert!(error(history.policy(1)).starts_with("change 1 is not kept: the last 20 policies"));
    assert_eq!(&*history.policy(2).unwrap().text, file(1, 0).text);
    assert_eq!(history.texts().len(), MAX_POLICIES);
    // A restart does not lengthen it.
    let restored = History::restore(
        history.last_id(),
        (**history.policies()).clone(),
        (**history.others()).clone(),
        history.texts().clone(),
    );
    assert_eq!(restored, history);
}

#[test]
fn oldest_texts_are_forgotten_first_and_their_policies_stay() {
    let mut history = History::default();
    let third = MAX_TEXTS / 3 + 1;
    for number in 0..3 {
        enforce(&mut history, &file(number, third), State::Confirmed);
    }
    let kept = |history: &History| -> Vec<bool> {
        let changes = history.list(&Wanted::default()).unwrap().changes;
        let kept = changes.iter().map(|past| match &past.what {
            What::Policy(policy) => policy.text_kept,
            _ => unreachable!(),
        });
        kept.collect()
    };
    assert_eq!(kept(&history), [true, true, false]);
    let gone = error(history.policy(1));
    assert!(
        gone.starts_with("the text of change 1 is not kept any more"),
        "{gone}"
    );
    // The same text twice takes its room once.
    enforce(&mut history, &file(1, third), State::Confirmed);
    assert_eq!(kept(&history), [true, true, true, false]);
    assert_eq!(history.texts().len(), 2);
}

#[test]
fn policy_before_is_the_newest_confirmed_one_with_another_text() {
    let mut history = History::default();
    assert_eq!(history.before(), None);
    let first = enforce(&mut history, &file(1, 0), State::Confirmed);
    assert_eq!(history.before(), None);
    let second = enforce(&mut history, &file(2, 0), State::Confirmed);
    assert_eq!(history.before(), Some(first));
    let third = enforce(&mut history, &file(3, 0), State::Trying);
    allow(&mut history, "orders");
    assert_eq!(history.before(), Some(second));
    history.set_state(third, State::FellBack);
    let again = enforce(&mut history, &file(2, 0), State::Confirmed);
    assert_eq!(history.before(), Some(first));
    assert_eq!(history.in_force().map(|(past, _)| past.id), Some(again));
    assert!(error(history.policy(4)).contains("change 4 is not a policy"));
    assert!(error(history.policy(9)).contains("there is no change 9 yet: the last one is 5"));
}

#[test]
fn policy_in_force_is_the_last_one_until_a_detach() {
    let mut history = History::default();
    assert_eq!(history.is_in_force(&file(1, 0)), None);
    let id = enforce(&mut history, &file(1, 0), State::Confirmed);
    allow(&mut history, "orders");
    assert_eq!(history.is_in_force(&file(1, 0)), Some(id));
    assert_eq!(history.is_in_force(&file(2, 0)), None);
    let detached = history.detached(at(0), None);
    allow(&mut history, "orders");
    assert_eq!(history.is_in_force(&file(1, 0)), None);
    assert!(history.texts().is_empty());
    assert_eq!(
        ids(&history, Wanted::default()),
        [detached + 1, detached, 2, id]
    );
}

#[test]
fn ids_go_on_from_the_highest_that_is_known() {
    let mut history = History::default();
    enforce(&mut history, &file(1, 0), State::Confirmed);
    allow(&mut history, "orders");
    for (last, next) in [(0, 3), (2, 3), (7, 8)] {
        let (policies, others) = (history.policies(), history.others());
        let mut restored = History::restore(
            last,
            (**policies).clone(),
            (**others).clone(),
            BTreeMap::new(),
        );
        assert_eq!(restored.next_id(), next);
    }
}

#[test]
fn difference_is_listed_within_bounds_and_counted_beyond() {
    let prefixes = |count: usize| -> Vec<IpNet> {
        let prefix = |number| format!("10.{}.{}.0/24", number / 256, number % 256);
        (0..count)
            .map(|number| prefix(number).parse().unwrap())
            .collect()
    };
    let databases = (0..30).map(|number| {
        let difference = DatabaseDifference {
            added: prefixes(1000),
            removed: prefixes(7),
            ..Default::default()
        };
        (format!("database-{number:02}"), difference)
    });
    let plan = report::Plan {
        hash: String::new(),
        file: "/etc/policy.yaml".into(),
        difference: Difference {
            databases: databases.collect(),
        },
        settings: (0..200).map(|line| format!("~ line {line}")).collect(),
        attached: Vec::new(),
        detached: Vec::new(),
        warnings: Vec::new(),
        cut: Vec::new(),
        cut_unknown: Vec::new(),
        lock_out: Vec::new(),
    };
    let summary = Summary::of(&plan);
    assert_eq!(
        (summary.settings.count, summary.settings.first.len()),
        (200, 100)
    );
    let first = &summary.databases["database-00"];
    assert_eq!((first.added.count, first.added.first.len()), (1000, 100));
    assert_eq!((first.removed.count, first.removed.first.len()), (7, 7));
    let last = &summary.databases["database-29"];
    assert_eq!((last.added.count, last.added.first.len()), (1000, 0));
    let listed = summary.databases.values();
    let listed: usize = listed
        .map(|d| d.added.first.len() + d.removed.first.len())
        .sum();
    assert_eq!(listed + summary.settings.first.len(), LISTED_IN_ALL);
}

#[test]
fn changes_are_found_by_database_time_and_number() {
    let mut history = History::default();
    let of = |database: &str, settings: &[&str]| {
        let databases = [(database.to_owned(), DatabaseSummary::default())];
        Summary {
            databases: databases.into(),
            settings: Listed {
                count: settings.len(),
                first: settings.iter().map(|&line| line.to_owned()).collect(),
            },
            ..Summary::default()
        }
    };
    for difference in [
        of("orders", &[]),
        of("shop", &["~ database orders: port: 1 -> 2"]),
        of("shop", &["+ database orders2"]),
        of("shop", &["- database orders"]),
    ] {
        let id = history.next_id();
        let past = Past {
            id,
            at: at(id as i64),
            origin: Origin::Reload,
            by: None,
            what: What::policy(&file(id as usize, 0), State::Confirmed, difference),
        };
        history.enforced(past, &file(id as usize, 0));
    }
    allow(&mut history, "orders");
    allow(&mut history, "shop");
    let orders = Wanted {
        database: Some("orders".into()),
        ..Wanted::default()
    };
    assert_eq!(ids(&history, orders), [5, 4, 2, 1]);
    let since = Wanted {
        since: Some(at(5)),
        ..Wanted::default()
    };
    assert_eq!(ids(&history, since), [6, 5]);
    let limited = Wanted {
        limit: Some(2),
        ..Wanted::default()
    };
    assert_eq!(ids(&history, limited.clone()), [6, 5]);
    assert_eq!(history.list(&limited).unwrap().left_out, 4);
    let one = Wanted {
        id: Some(3),
        ..Wanted::default()
    };
    assert_eq!(ids(&history, one), [3]);
}

#[test]
fn change_is_the_same_after_it_was_written_and_read() {
    let mut history = History::default();
    enforce(&mut history, &file(1, 0), State::Trying);
    allow(&mut history, "orders");
    history.detached(
        at(9),
        Some(By {
            uid: 0,
            login_uid: Some(1000),
            pid: Some(7),
            command: None,
        }),
    );
    for past in history.policies().iter().chain(history.others().iter()) {
        let json = serde_json::to_string(past).unwrap();
        assert_eq!(
            serde_json::from_str::<Past>(&json).unwrap(),
            *past,
            "{json}"
        );
    }
}
