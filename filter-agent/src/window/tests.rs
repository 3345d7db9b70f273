use std::path::Path;

use super::*;
use crate::temporary::Kind;

const START: i64 = 1_767_225_600;

fn at(seconds: i64) -> Now {
    let time = Timestamp::from_second(START + seconds).unwrap();
    Now {
        boot: BootTime(1_000_000_000 * (1_000 + seconds) as u64),
        steady: time,
        wall: time,
    }
}

/// Databases by name, each with a rule that ends so many seconds after the start.
fn policy(databases: &[(&str, i64)]) -> Policy {
    let databases = databases.iter().zip(5432..).map(|((name, end), port)| {
        let end = at(*end).wall;
        format!(
            "- {{name: {name}, port: {port}, model: dedicated, force_tls: false, rules: [{{cidr: 192.0.2.0/24, expires: \
             '{end}'}}]}}\n"
        )
    });
    let databases: String = databases.collect();
    let text = format!("interfaces: [eth0]\ndatabases:\n{databases}");
    let file = PolicyFile::parse(Path::new("/etc/policy.yaml"), text);
    file.unwrap().policy
}

fn allowed(database: &str, source: &str, end: i64, now: Now) -> Temporary {
    let source = source.parse().unwrap();
    Temporary::new(database, Kind::Allow, source, at(end).boot, now)
}

fn sources(timed: &Timed) -> Vec<String> {
    let rules = timed.temporary.iter();
    rules.map(|rule| rule.source.to_string()).collect()
}

#[test]
fn falling_back_moves_no_end_further_and_keeps_what_was_changed_meanwhile() {
    let confirmed = policy(&[("orders", 600), ("shop", 600)]);
    // Without `shop`, and with another end.
    let tried = policy(&[("orders", 900)]);
    let ends = Ends::anew(&confirmed, at(0));
    let before = vec![
        allowed("orders", "198.51.100.1/32", 500, at(0)),
        allowed("shop", "198.51.100.2/32", 500, at(1)),
        allowed("shop", "198.51.100.3/32", 50, at(2)),
    ];
    let current = Timed {
        now: at(100),
        ends: Ends::anew(&tried, at(10)),
        // The first was revoked, and another added.
        temporary: vec![allowed("orders", "198.51.100.4/32", 500, at(60))],
    };
    let back = timed((ends.clone(), before), &confirmed, &tried, current, at(120));
    assert_eq!(sources(&back), ["198.51.100.2/32", "198.51.100.4/32"]);
    assert_eq!(back.ends, ends);
}

#[test]
fn end_that_was_brought_nearer_meanwhile_stays_nearer() {
    let confirmed = policy(&[("orders", 600)]);
    let ends = Ends::anew(&confirmed, at(0));
    let forward = Now {
        wall: at(590).wall,
        ..at(60)
    };
    let mut nearer = ends.clone();
    assert!(nearer.bring_nearer(forward));
    let current = Timed {
        now: at(60),
        ends: nearer.clone(),
        temporary: Vec::new(),
    };
    let back = timed((ends, Vec::new()), &confirmed, &confirmed, current, at(120));
    assert_eq!(back.ends, nearer);
}

fn text(number: usize, reason: Reason) -> Text {
    Text {
        hash: format!("{number:064}"),
        reason,
        id: Some(number as u64),
        at: at(number as i64).wall,
    }
}

#[test]
fn the_last_twenty_abandoned_texts_are_remembered_each_once() {
    let mut abandoned = Abandoned::default();
    for number in 0..25 {
        abandoned.add(text(number, Reason::Expired));
    }
    assert_eq!(abandoned.0.len(), 20);
    assert!(abandoned.find(&text(4, Reason::Expired).hash).is_none());
    abandoned.add(text(5, Reason::RolledBack));
    assert_eq!(abandoned.0.len(), 20);
    let found = abandoned.find(&text(5, Reason::Expired).hash).unwrap();
    assert_eq!(found.reason, Reason::RolledBack);
    // The last whose window has ended.
    assert_eq!(abandoned.of_change(None).unwrap().id, Some(24));
    assert_eq!(
        abandoned.of_change(Some(5)).unwrap().reason,
        Reason::RolledBack
    );
    assert!(abandoned.remove(&text(24, Reason::Expired).hash));
    assert!(!abandoned.remove(&text(24, Reason::Expired).hash));
    assert_eq!(abandoned.of_change(None).unwrap().id, Some(23));
}

#[test]
fn window_lasts_in_its_boot_until_its_end_whatever_the_clock_says() {
    let mut open = Open {
        id: 7,
        by: None,
        opened: at(0).wall,
        end: at(120).boot,
        path: "/etc/policy.yaml".into(),
        policy: String::new(),
        before: temporary::Kept {
            boot_id: Some("a".into()),
            ..Default::default()
        },
        regions: BTreeMap::new(),
    };
    let date = |clock: i64| Timestamp::from_second(START + clock).unwrap();
    let set = |now: Now, clock: i64| Now {
        wall: date(clock),
        ..now
    };
    for clock in [-86_400, 119, 86_400] {
        assert!(open.lasts(Some("a"), set(at(119), clock)));
        assert!(!open.lasts(Some("a"), set(at(120), clock)));
        let left = open.report(set(at(100), clock));
        assert_eq!(left.left, 20);
        assert_eq!(left.until, date(clock + 20));
    }
    assert!(!open.lasts(Some("b"), at(1)));
    assert!(!open.lasts(None, at(1)));
    open.before.boot_id = None;
    assert!(!open.lasts(None, at(1)));
}
