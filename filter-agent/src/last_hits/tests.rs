use super::*;

const SECOND: u64 = 1_000_000_000;
const DATABASE: &str = "orders";
const RULE: &str = "203.0.113.0/24";

fn boot(seconds: u64) -> BootTime {
    BootTime(seconds * SECOND)
}

fn date(seconds: i64) -> Timestamp {
    Timestamp::from_second(seconds).unwrap()
}

/// So many seconds after a boot, at a date of the host's clock.
fn now(since_boot: u64, wall: i64) -> Now {
    Now {
        boot: boot(since_boot),
        steady: date(wall),
        wall: date(wall),
    }
}

fn key(rule: &str) -> Key {
    (DATABASE.into(), rule.into())
}

fn hits(packets: u64) -> Hits {
    Hits::from([(key(RULE), packets)])
}

fn last(hits: &LastHits, now: Now) -> (Option<i64>, i64) {
    let found = hits.of(DATABASE, RULE, now).unwrap();
    let at = found.at.map(Timestamp::as_second);
    (at, found.counted_since.as_second())
}

/// Writes and reads, as the disk does.
fn kept(hits: &LastHits, now: Now, boot_id: &str) -> Kept {
    let kept = Kept {
        boot_id: Some(boot_id.into()),
        ..hits.kept(now.boot, now.wall)
    };
    let text = serde_json::to_string(&kept).unwrap();
    let read: Kept = serde_json::from_str(&text).unwrap();
    assert_eq!(read, kept);
    read
}

#[test]
fn rule_is_hit_when_its_counter_grows() {
    let mut found = LastHits::default();
    // Packets from before it was counted came at an unknown time.
    assert!(found.note(&hits(7), boot(100)));
    assert_eq!(last(&found, now(130, 1030)), (None, 1000));
    assert!(!found.note(&hits(7), boot(110)));
    assert!(found.note(&hits(8), boot(120)));
    assert!(!found.note(&hits(8), boot(130)));
    assert_eq!(last(&found, now(130, 1030)), (Some(1020), 1000));
    // A counter that began anew.
    assert!(found.note(&hits(3), boot(140)));
    assert!(found.note(&hits(0), boot(150)));
    assert_eq!(last(&found, now(150, 1050)), (Some(1040), 1000));
    assert_eq!(found.of(DATABASE, "192.0.2.0/24", now(150, 1050)), None);
}

#[test]
fn rule_that_is_gone_is_forgotten_and_counted_anew_when_it_comes_back() {
    let mut found = LastHits::default();
    let (none, rules) = (BTreeSet::new(), BTreeSet::from([key(RULE)]));
    assert!(found.changed(&rules, &none, boot(1)));
    assert!(found.note(&hits(1), boot(10)));
    // A reload that keeps it.
    let both = BTreeSet::from([key(RULE), key("192.0.2.0/24")]);
    assert!(found.changed(&both, &none, boot(20)));
    assert_eq!(last(&found, now(20, 20)), (Some(10), 1));
    assert!(found.changed(&BTreeSet::new(), &none, boot(30)));
    assert_eq!(found, LastHits::default());
    assert!(found.changed(&rules, &none, boot(40)));
    assert_eq!(last(&found, now(50, 50)), (None, 40));
    assert!(found.note(&Hits::new(), boot(50)));
    assert_eq!(found, LastHits::default());
}

#[test]
fn database_whose_counters_begin_anew_keeps_its_last_hits() {
    let mut found = LastHits::default();
    let rules = BTreeSet::from([key(RULE)]);
    let restarted = BTreeSet::from([DATABASE.to_owned()]);
    found.changed(&rules, &BTreeSet::new(), boot(1));
    found.note(&hits(5), boot(10));
    found.changed(&rules, &restarted, boot(20));
    assert_eq!(last(&found, now(20, 20)), (Some(10), 1));
    // As many as before.
    assert!(found.note(&hits(5), boot(30)));
    assert_eq!(last(&found, now(30, 30)), (Some(30), 1));
}

#[test]
fn restart_in_the_same_boot_goes_on_and_finds_hits_from_in_between() {
    let mut found = LastHits::default();
    found.note(&hits(5), boot(10));
    found.note(&hits(6), boot(20));
    let kept = kept(&found, now(30, 1030), "one");
    let mut same = kept.clone().restore(Some("one"));
    assert_eq!(same, found);
    assert!(!same.note(&hits(6), boot(100)));
    assert!(same.note(&hits(7), boot(100)));
    // The host's clock was corrected since.
    assert_eq!(last(&same, now(110, 9110)), (Some(9100), 9010));
    // Of an unknown boot.
    assert_ne!(kept.restore(None), found);
}

#[test]
fn reboot_keeps_dates_and_a_clock_that_is_set_back_shows_none_to_come() {
    let mut found = LastHits::default();
    found.note(&hits(5), boot(100));
    found.note(&hits(6), boot(200));
    let kept = kept(&found, now(300, 10_300), "one");
    let mut next = kept.restore(Some("two"));
    let later = now(20, 20_000);
    assert_eq!(last(&next, later), (Some(10_200), 10_100));
    // The kernel counts from zero.
    assert!(!next.note(&hits(0), boot(20)));
    assert_eq!(last(&next, later), (Some(10_200), 10_100));
    // A clock that was set back has both before its boot.
    assert_eq!(last(&next, now(20, 5_000)), (Some(4_980), 4_980));
    assert!(next.note(&hits(1), boot(30)));
    assert_eq!(last(&next, now(40, 20_020)), (Some(20_010), 10_100));
    // Over a third boot.
    let third = super::tests::kept(&next, now(50, 20_030), "two").restore(Some("three"));
    assert_eq!(last(&third, now(5, 30_000)), (Some(20_010), 10_100));
}

/// Whatever happens, no time is later than now, no hit earlier than what is counted, and nothing is kept of rules that
/// the kernel does not hold.
#[test]
fn random_histories_show_no_time_to_come() {
    let mut random = fastrand::Rng::with_seed(19);
    for _ in 0..300 {
        let mut found = LastHits::default();
        let (mut since_boot, mut wall, mut boots) = (1_u64, random.i64(0..2_000_000_000), 0);
        let mut counters = Hits::new();
        for _ in 0..60 {
            since_boot += random.u64(0..1000);
            wall += random.i64(0..1000);
            let at = now(since_boot, wall);
            match random.u8(..12) {
                0 => wall = random.i64(0..2_000_000_000),
                1 => {
                    let kept = kept(&found, at, &boots.to_string());
                    boots += u64::from(random.bool());
                    found = kept.restore(Some(&boots.to_string()));
                }
                2 => {
                    let kept = kept(&found, at, &boots.to_string());
                    boots += 1;
                    found = kept.restore(Some(&boots.to_string()));
                    since_boot = 1;
                    counters.values_mut().for_each(|hits| *hits = 0);
                }
                3..=5 => {
                    let rule = key(&format!("192.0.2.{}/32", random.u8(..4)));
                    if counters.remove(&rule).is_none() {
                        counters.insert(rule, 0);
                    }
                    let rules = counters.keys().cloned().collect();
                    found.changed(&rules, &BTreeSet::new(), at.boot);
                }
                _ => {
                    counters
                        .values_mut()
                        .for_each(|hits| *hits += random.u64(..2));
                    found.note(&counters, at.boot);
                }
            }
            let at = now(since_boot, wall);
            for (database, rule) in found.0.keys() {
                let hit = found.of(database, rule, at).unwrap();
                assert!(hit.counted_since <= at.wall);
                assert!(hit.at.is_none_or(|last| last <= at.wall));
            }
            assert!(found.0.len() <= 4);
            assert!(found.0.keys().all(|key| counters.contains_key(key)));
        }
    }
}
