use std::{path::Path, time::Duration};

use anyhow::Result;

use super::*;
use crate::{policy_file::PolicyFile, prefixes::Prefixes, report, rules::Regions};

const FILE: &str = "interfaces: [eth0]\nregions: {office: {prefixes: [198.51.100.0/24]}}\ndatabases:\n- name: orders\n  \
                    port: 5432\n  model: dedicated\n  force_tls: false\n  cluster: [10.1.2.3/32]\n  rules:\n  - {cidr: \
                    192.0.2.0/24, except: [192.0.2.66/32]}\n  - {region: office}\n  - {cidr: 203.0.113.0/24, expires: \
                    2026-01-01T01:00:00Z}\n- {name: shop, port: 3306, model: shared}\n";

/// `boot`: seconds since boot; `wall`: seconds of the day that follows 2026-01-01T00:00:00Z.
fn at(boot: u64, wall: i64) -> Now {
    let start: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
    let wall = start + Duration::from_secs(wall as u64);
    Now {
        boot: BootTime(boot * 1_000_000_000),
        steady: wall,
        wall,
    }
}

fn file(text: &str) -> PolicyFile {
    PolicyFile::parse(Path::new("/etc/policy.yaml"), text.into()).unwrap()
}

fn wanted(source: &str, seconds: u64) -> Wanted {
    Wanted {
        database: "orders".into(),
        source: source.into(),
        seconds,
        label: None,
    }
}

fn regions() -> Regions {
    let office: [IpNet; 1] = ["198.51.100.0/24".parse().unwrap()];
    Regions::from([("office".into(), Prefixes::shared(office))])
}

fn change(timed: &Timed, change: Change) -> Result<(Timed, report::Temporary)> {
    timed.changed(&file(FILE), &regions(), change, None)
}

fn refusal(timed: &Timed, refused: Change) -> String {
    format!("{:#}", change(timed, refused).unwrap_err())
}

#[test]
fn rule_is_added_prolonged_and_revoked() {
    let timed = Timed::of(&file(FILE).policy, at(100, 0));
    let (timed, done) = change(&timed, Change::Allow(wanted("203.0.113.77", 60))).unwrap();
    assert_eq!(
        done.to_string(),
        "database orders: 203.0.113.77/32 allowed until 2026-01-01T00:01:00Z"
    );
    assert_eq!(timed.temporary[0].end, at(160, 0).boot);
    let later = timed.at(at(130, 30));
    let (later, _) = change(&later, Change::Allow(wanted("203.0.113.77/32", 60))).unwrap();
    assert_eq!(later.temporary.len(), 1);
    assert_eq!(later.temporary[0].end, at(190, 0).boot);
    let (both, _) = change(&later, Change::Block(wanted("203.0.113.77", 60))).unwrap();
    assert_eq!(both.temporary.len(), 2);
    let revoke = Change::Revoke {
        database: "orders".into(),
        source: "203.0.113.77".into(),
    };
    let (none, _) = change(&both, revoke).unwrap();
    assert_eq!(none.temporary, []);
}

#[test]
fn what_cannot_be_is_refused_with_what_to_do() {
    let timed = Timed::of(&file(FILE).policy, at(100, 0));
    let of = |database: &str| Wanted {
        database: database.into(),
        ..wanted("203.0.113.77", 60)
    };
    let revoke = |source: &str| Change::Revoke {
        database: "orders".into(),
        source: source.into(),
    };
    let cases = [
        (
            Change::Allow(of("nope")),
            "no database nope in the policy, which has orders, shop",
        ),
        (Change::Block(of("shop")), "database shop is shared"),
        (
            Change::Allow(wanted("192.0.2.1/24", 60)),
            "the network is 192.0.2.0/24",
        ),
        (Change::Allow(wanted("office", 60)), "is not a prefix"),
        (
            Change::Allow(wanted("127.0.0.1", 60)),
            "is not a valid source",
        ),
        (
            Change::Allow(wanted("192.0.2.1", 0)),
            "lasts from a second to",
        ),
        (
            Change::Allow(wanted("192.0.2.1", 400 * 86_400)),
            "write it into /etc/policy.yaml",
        ),
        (
            Change::Block(wanted("10.1.2.3", 60)),
            "which no block changes",
        ),
        (revoke("192.0.2.0/24"), "take it out of /etc/policy.yaml"),
        (revoke("192.0.2.9"), "it has none"),
    ];
    for (refused, expected) in cases {
        let error = refusal(&timed, refused);
        assert!(error.contains(expected), "{error}");
    }
    let mut full = timed;
    for host in 0..27 {
        full = change(
            &full,
            Change::Allow(wanted(&format!("203.0.113.{host}"), 60)),
        )
        .unwrap()
        .0;
    }
    let error = refusal(&full, Change::Allow(wanted("203.0.113.99", 60)));
    assert!(
        error.contains("has 30 rules, 27 of them temporary"),
        "{error}"
    );
    // Those that have ended leave room.
    assert!(
        change(
            &full.at(at(200, 100)),
            Change::Allow(wanted("203.0.113.99", 60))
        )
        .is_ok()
    );
}

#[test]
fn operator_is_told_what_may_not_be_expected() {
    let timed = Timed::of(&file(FILE).policy, at(100, 0));
    let notes = |timed: &Timed, asked| change(timed, asked).unwrap().1.notes;
    let none = Vec::<String>::new();
    assert_eq!(notes(&timed, Change::Allow(wanted("192.0.2.66", 60))), none);
    assert_eq!(notes(&timed, Change::Block(wanted("192.0.2.1", 60))), none);
    let held = notes(&timed, Change::Allow(wanted("198.51.100.7", 60)));
    assert_eq!(held, ["region office of the policy allows it already"]);
    let members = notes(&timed, Change::Block(wanted("10.0.0.0/8", 60)));
    assert_eq!(
        members,
        ["members of its cluster are not blocked: 10.1.2.3/32"]
    );
    let (blocked, _) = change(&timed, Change::Block(wanted("198.18.0.0/15", 60))).unwrap();
    let notes = notes(&blocked, Change::Allow(wanted("198.18.0.1", 60)));
    assert!(notes[0].starts_with("198.18.0.0/15 stays blocked until 2026-01-01T00:01:00Z"));
}

#[test]
fn newest_rules_are_suspended_where_the_policy_leaves_no_room() {
    let mut timed = Timed::of(&file(FILE).policy, at(100, 0));
    for host in [1, 2, 3] {
        timed = change(
            &timed,
            Change::Allow(wanted(&format!("203.0.113.{host}"), 60)),
        )
        .unwrap()
        .0;
    }
    let rules: String = (0..25)
        .map(|n| format!("  - {{cidr: 10.9.{n}.0/24}}\n"))
        .collect();
    let wider = file(&FILE.replace(
        "  - {region: office}\n",
        &(rules + "  - {region: office}\n"),
    ));
    let suspended = |policy| {
        timed
            .suspended(policy)
            .map(|rule| rule.source.to_string())
            .collect::<Vec<_>>()
    };
    let same = file(FILE);
    assert_eq!(suspended(&same.policy), Vec::<String>::new());
    assert_eq!(suspended(&wider.policy), ["203.0.113.3/32"]);
    let in_force: Vec<_> = timed
        .in_force(&wider.policy.databases[0])
        .map(|rule| rule.source.to_string())
        .collect();
    assert_eq!(in_force, ["203.0.113.1/32", "203.0.113.2/32"]);
}

/// Time left of the rule that ends at 01:00 and of a temporary one of an hour, kept at midnight, 100 seconds after a
/// boot, in seconds.
fn left(same_boot: bool, now: Now) -> (u64, Option<u64>) {
    let timed = Timed::of(&file(FILE).policy, at(100, 0));
    let (timed, _) = change(&timed, Change::Allow(wanted("203.0.113.77", 3600))).unwrap();
    let kept = Kept {
        boot_id: Some("this".into()),
        ..Kept::of(&timed, timed.now, Timestamp::UNIX_EPOCH)
    };
    let (ends, temporary) = kept.restore(Some(if same_boot { "this" } else { "next" }), now);
    let (_, end) = ends.iter().next().unwrap();
    let seconds = |end: BootTime| end.since(now.boot).as_secs();
    (
        seconds(end),
        temporary.first().map(|rule| seconds(rule.end)),
    )
}

/// Guarantee 10: an end is an end.
#[test]
fn end_is_never_later_than_it_was() {
    // Within a boot the clock does not matter.
    assert_eq!(left(true, at(160, 60)), (3540, Some(3540)));
    assert_eq!(left(true, at(160, 9000)), (3540, Some(3540)));
    assert_eq!(left(true, at(3800, 60)), (0, None));
    // Over a reboot: 10 minutes switched off; a clock that stood still; one that is wrong by hours.
    assert_eq!(left(false, at(20, 600)), (3000, Some(3000)));
    assert_eq!(left(false, at(20, 0)), (3600, Some(3600)));
    assert_eq!(left(false, at(20, 7200)), (0, None));
    let back = Now {
        wall: "2025-01-01T00:00:00Z".parse().unwrap(),
        ..at(20, 0)
    };
    assert_eq!(left(false, back), (3600, Some(3600)));
}

#[test]
fn clock_that_is_set_forward_brings_dates_nearer_and_back_again_does_not_undo_it() {
    let policy = file(FILE).policy;
    let mut ends = Ends::anew(&policy, at(100, 0));
    assert!(!ends.bring_nearer(at(110, 10)));
    assert!(!ends.bring_nearer(at(120, 0)));
    assert!(ends.bring_nearer(at(130, 3000)));
    let end = ends.iter().next().unwrap().1;
    assert_eq!(end, at(730, 0).boot);
    assert!(!ends.bring_nearer(at(140, 40)));
    // A restart keeps it, a reload does not.
    assert_eq!(ends.with(&policy, at(140, 40)), ends);
    assert_eq!(
        Ends::anew(&policy, at(140, 40)).iter().next().unwrap().1,
        at(3700, 0).boot
    );
    let moved = file(&FILE.replace("T01:00", "T02:00")).policy;
    assert_eq!(
        ends.with(&moved, at(140, 40)).iter().next().unwrap().1,
        at(7300, 0).boot
    );
}
