//! Each row of the table of answers, and what a reload and a restart make of them.

use super::*;
use crate::{fleet::Value, policy::parse};

const POLICY: &str = "interfaces: [eth0]
fleet: {endpoints: ['http://127.0.0.1:2379'], insecure: true}
databases:
  - {name: orders, port: 5432, model: dedicated, force_tls: false, fleet: {widest: [/16, /48]}}
  - {name: shop, port: 3306, model: dedicated, force_tls: false, fleet: true}
  - {name: own, port: 3307, model: dedicated, force_tls: false}
";

const A: &str = "rules: [{cidr: 198.51.100.0/24}]";
const B: &str = "rules: [{cidr: 203.0.113.0/24}]";
const BOTH: &str = "rules: [{cidr: 198.51.100.0/24}, {cidr: 203.0.113.0/24}]";
const WIDE: &str = "rules: [{cidr: 203.0.0.0/8}]";

fn policy() -> Policy {
    parse(POLICY).unwrap().0
}

fn with(from: &str, to: &str) -> Policy {
    assert!(POLICY.contains(from));
    parse(&POLICY.replace(from, to)).unwrap().0
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + second).unwrap()
}

fn fresh() -> State {
    State::restore(Kept::default(), &policy(), at(0))
}

/// `(created, changed, version)`.
fn value(text: impl AsRef<[u8]>, (created, changed, version): (i64, i64, i64)) -> Found {
    Found::Value(Value {
        text: text.as_ref().to_vec(),
        create_revision: created,
        mod_revision: changed,
        version,
    })
}

/// An answer of era 0 about `orders` alone.
fn answer(revision: i64, orders: Found) -> Answer {
    Answer {
        cluster: 0xc1,
        era: 0,
        revision,
        documents: [("orders".into(), orders)].into(),
    }
}

fn taken(state: &State, answer: &Answer, second: i64) -> State {
    state.take(answer, &policy(), at(second))
}

/// The document in force is of revision 9, read at revision 20: its third version.
fn known() -> State {
    taken(&fresh(), &answer(20, value(A, (4, 9, 3))), 10)
}

fn in_force(state: &State) -> Option<String> {
    let good = state.documents().get("orders")?;
    let rules = good
        .document
        .rules
        .iter()
        .map(|rule| rule.source.to_string());
    Some(rules.collect::<Vec<_>>().join(" "))
}

fn expect_a(state: &State) {
    assert_eq!(in_force(state).as_deref(), Some("198.51.100.0/24"));
}

#[track_caller]
fn expect_held(state: &State, why: &str) {
    assert_eq!(state.held().map(|held| held.why.as_str()), Some(why));
    assert_eq!(state.standing("orders"), Standing::Held(why.into()));
    assert_eq!(state.marks(), known().marks());
    assert_eq!(state.kept().databases, known().kept().databases);
    expect_a(state);
}

fn refusal(state: &State) -> (String, i64) {
    match state.standing("orders") {
        Standing::Refused { why, mod_revision } => (why, mod_revision),
        standing => panic!("{standing:?}"),
    }
}

#[test]
fn fresh_host_believes_what_it_finds() {
    let state = fresh();
    assert_eq!(state.standing("orders"), Standing::Unknown);
    assert!(state.documents().is_empty());
    let state = known();
    expect_a(&state);
    assert_eq!(state.standing("orders"), Standing::Active);
    assert_eq!(state.standing("shop"), Standing::Unknown);
    let good = &state.documents()["orders"];
    assert_eq!(
        (good.create_revision, good.mod_revision, good.version),
        (4, 9, 3)
    );
    assert_eq!(good.since, at(10));
    assert_eq!(good.sha256, crate::policy_file::hash(A));
    let marks = Marks {
        cluster: 0xc1,
        era: 0,
        revision: 20,
    };
    assert_eq!(state.marks(), Some(marks));
}

#[test]
fn later_answer_is_taken() {
    // The same again at a later revision.
    let same = taken(&known(), &answer(25, value(A, (4, 9, 3))), 20);
    assert_eq!(same.documents(), known().documents());
    assert_eq!(same.marks().unwrap().revision, 25);
    let changed = taken(&same, &answer(30, value(B, (4, 30, 4))), 30);
    assert_eq!(in_force(&changed).as_deref(), Some("203.0.113.0/24"));
    assert_eq!(changed.documents()["orders"].since, at(30));
    // Written again as it is: in force since before.
    let again = taken(&changed, &answer(40, value(B, (4, 35, 5))), 40);
    let good = &again.documents()["orders"];
    assert_eq!(
        (good.mod_revision, good.version, good.since),
        (35, 5, at(30))
    );
    // Deleted and made anew.
    let anew = taken(&again, &answer(60, value(A, (50, 55, 2))), 50);
    expect_a(&anew);
    assert!(anew.held().is_none());
}

#[test]
fn answer_of_a_raised_era_is_believed_whole() {
    let mut restored = answer(12, value(BOTH, (4, 5, 2)));
    expect_held(
        &taken(&known(), &restored, 20),
        "etcd went back from revision 20 to 12",
    );
    restored.era = 1;
    restored.cluster = 0xc2;
    let state = taken(&known(), &restored, 20);
    assert!(state.held().is_none());
    assert_eq!(
        in_force(&state).as_deref(),
        Some("198.51.100.0/24 203.0.113.0/24")
    );
    let marks = Marks {
        cluster: 0xc2,
        era: 1,
        revision: 12,
    };
    assert_eq!(state.marks(), Some(marks));
    // By the bounds it is judged all the same.
    restored.documents = [("orders".into(), value(WIDE, (4, 5, 2)))].into();
    let state = taken(&known(), &restored, 20);
    expect_a(&state);
    assert_eq!(refusal(&state).1, 5);
    // Numbers of the era before do not count: another document is not there at all.
    let mut shop = answer(12, Found::Missing);
    shop.era = 2;
    let state = taken(&state, &shop, 30);
    assert!(matches!(state.standing("orders"), Standing::Missing { .. }));
    expect_a(&state);
}

/// A key that was read at revision 20 of the era before was read in another history.
#[test]
fn key_that_a_raised_era_did_not_show_may_be_anything_then() {
    let mut raised = answer(12, Found::Unreadable("permission denied".into()));
    raised.era = 1;
    let state = taken(&known(), &raised, 20);
    assert!(state.held().is_none());
    expect_a(&state);
    let mut next = answer(13, value(B, (4, 5, 2)));
    next.era = 1;
    let state = taken(&state, &next, 30);
    assert_eq!(in_force(&state).as_deref(), Some("203.0.113.0/24"));
}

#[test]
fn answer_that_went_back_is_held_whole() {
    let mut other = answer(30, value(B, (4, 30, 4)));
    other.cluster = 0xc2;
    expect_held(
        &taken(&known(), &other, 20),
        "another etcd answers: cluster c2, not c1",
    );
    let in_era = State {
        marks: Some(Marks {
            cluster: 0xc1,
            era: 3,
            revision: 20,
        }),
        ..known()
    };
    let state = in_era.take(&answer(30, value(B, (4, 30, 4))), &policy(), at(20));
    assert_eq!(state.held().unwrap().why, "etcd went back from era 3 to 0");
    expect_a(&state);
    // A good document in it is held as well.
    let mut with_shop = answer(19, value(BOTH, (4, 5, 2)));
    with_shop
        .documents
        .insert("shop".into(), value(B, (3, 3, 1)));
    let state = taken(&known(), &with_shop, 20);
    expect_held(&state, "etcd went back from revision 20 to 19");
    assert!(!state.documents().contains_key("shop"));
    assert!(matches!(state.standing("shop"), Standing::Held(_)));
}

#[test]
fn answer_that_went_back_and_changes_nothing_moves_the_marks() {
    for (cluster, revision, numbers) in [
        (0xc2, 30, (7, 7, 1)),
        (0xc1, 12, (4, 9, 3)),
        (0xc2, 8, (5, 6, 2)),
    ] {
        let mut same = answer(revision, value(A, numbers));
        same.cluster = cluster;
        same.documents.insert("shop".into(), Found::Missing);
        let state = taken(&known(), &same, 20);
        assert!(state.held().is_none());
        assert_eq!(
            state.marks().unwrap(),
            Marks {
                cluster,
                era: 0,
                revision
            }
        );
        let good = &state.documents()["orders"];
        assert_eq!(
            (good.create_revision, good.mod_revision, good.version),
            numbers
        );
        assert_eq!(good.since, at(10));
        // The history goes on from there.
        let mut next = answer(
            revision + 5,
            value(B, (numbers.0, revision + 5, numbers.2 + 1)),
        );
        next.cluster = cluster;
        let state = taken(&state, &next, 30);
        assert_eq!(in_force(&state).as_deref(), Some("203.0.113.0/24"));
    }
    let mut lower = answer(20, value(A, (4, 9, 3)));
    let in_era = State {
        marks: Some(Marks {
            cluster: 0xc1,
            era: 3,
            revision: 20,
        }),
        ..known()
    };
    let state = in_era.take(&lower, &policy(), at(20));
    assert_eq!(state.marks().unwrap().era, 0);
    // A document that cannot be read, or is not there, or was not there, is not the same.
    lower.revision = 12;
    for orders in [
        Found::Missing,
        Found::Unreadable("permission denied".into()),
    ] {
        lower.documents.insert("orders".into(), orders);
        expect_held(
            &taken(&known(), &lower, 20),
            "etcd went back from revision 20 to 12",
        );
    }
    lower.documents = [
        ("orders".into(), value(A, (4, 9, 3))),
        ("shop".into(), value(A, (4, 4, 1))),
    ]
    .into();
    expect_held(
        &taken(&known(), &lower, 20),
        "etcd went back from revision 20 to 12",
    );
    lower.documents.clear();
    expect_held(
        &taken(&known(), &lower, 20),
        "etcd went back from revision 20 to 12",
    );
}

#[test]
fn document_that_no_later_etcd_can_hold_is_held() {
    let cases = [
        (30, value(BOTH, (4, 8, 2)), "from revision 9 to 8"),
        (
            30,
            value(BOTH, (4, 9, 3)),
            "two different ones of revision 9",
        ),
        (30, value(A, (9, 9, 1)), "two different ones of revision 9"),
        (30, value(A, (4, 9, 2)), "two different ones of revision 9"),
        // Restored with `--bump-revision`, and written since.
        (
            1_030,
            value(BOTH, (4, 1_029, 2)),
            "version 2 of revision 1029 after version 3 of 9",
        ),
        (
            1_030,
            value(BOTH, (4, 1_029, 3)),
            "version 3 of revision 1029 after version 3 of 9",
        ),
        (
            30,
            value(BOTH, (4, 22, 19)),
            "version 19 of revision 22 after version 3 of 9",
        ),
        // Overtaken by a restored one with the same token: at 20 it was not so.
        (
            30,
            value(BOTH, (4, 15, 4)),
            "changed at revision 15, and was still of 9 at 20",
        ),
        (
            30,
            value(BOTH, (12, 25, 4)),
            "created at revision 12, and was one created at 4 at 20",
        ),
        (20, Found::Missing, "there and not there at revision 20"),
    ];
    for (revision, found, how) in cases {
        let state = taken(&known(), &answer(revision, found), 20);
        expect_held(
            &state,
            &format!("etcd went back: document of orders: {how}"),
        );
    }
    let missing = taken(&known(), &answer(25, Found::Missing), 20);
    let state = taken(&missing, &answer(30, value(BOTH, (24, 24, 1))), 30);
    let why = "etcd went back: document of orders: created at revision 24, and was not there at 25";
    assert_eq!(state.held().unwrap().why, why);
    let state = taken(&missing, &answer(30, value(B, (26, 26, 1))), 30);
    assert_eq!(in_force(&state).as_deref(), Some("203.0.113.0/24"));
}

#[test]
fn numbers_that_cannot_be_are_held_from_the_first_answer_on() {
    let cases = [
        (4, 31, 3),
        (4, 3, 1),
        (0, 9, 3),
        (-1, 9, 3),
        (4, 9, 0),
        (4, 9, 7),
        (4, 9, 1),
        (9, 9, 2),
    ];
    for (created, changed, version) in cases {
        let mut impossible = answer(30, value(A, (created, changed, version)));
        for era in 0..2 {
            impossible.era = era;
            let state = taken(&fresh(), &impossible, 20);
            assert!(state.documents().is_empty() && state.marks().is_none());
            let why = format!(
                "numbers of etcd that cannot be: document of orders, created at revision {created}, changed at {changed}, \
                 version {version}, read at revision 30"
            );
            assert_eq!(state.held().unwrap().why, why);
            expect_a(&taken(&known(), &impossible, 20));
        }
    }
}

#[test]
fn held_answer_is_judged_again_against_each_later_one() {
    let back = answer(12, value(BOTH, (4, 5, 2)));
    let held = taken(&known(), &back, 20);
    let held = taken(&held, &back, 30);
    assert_eq!(held.held().unwrap().since, at(20));
    // The operator corrects the restored document.
    let corrected = taken(&held, &answer(13, value(A, (4, 13, 3))), 40);
    assert!(corrected.held().is_none());
    assert_eq!(corrected.marks().unwrap().revision, 13);
    // Or the right etcd answers again.
    let right = taken(&held, &answer(21, value(B, (4, 21, 4))), 40);
    assert_eq!(in_force(&right).as_deref(), Some("203.0.113.0/24"));
    // A held answer is not on disk.
    let restarted = State::restore(held.kept(), &policy(), at(50));
    expect_a(&restarted);
    expect_held(
        &taken(&restarted, &back, 60),
        "etcd went back from revision 20 to 12",
    );
}

#[test]
fn refused_document_leaves_the_last_good_one_and_the_others() {
    let texts: [&[u8]; 4] = [WIDE.as_bytes(), b"", b"\xff", &vec![b' '; 65_537]];
    for text in texts {
        let mut answer = answer(30, value(text, (4, 30, 4)));
        answer.documents.insert("shop".into(), value(B, (3, 3, 1)));
        answer.documents.insert("own".into(), value(B, (3, 3, 1)));
        let state = taken(&known(), &answer, 20);
        expect_a(&state);
        let (why, revision) = refusal(&state);
        assert_eq!(revision, 30);
        assert!(!why.is_empty());
        assert_eq!(state.standing("shop"), Standing::Active);
        // The policy does not give this one to the fleet.
        assert!(!state.documents().contains_key("own"));
        assert_eq!(state.marks().unwrap().revision, 30);
        let restarted = State::restore(state.kept(), &policy(), at(40));
        assert_eq!(restarted.documents(), state.documents());
        assert_eq!(restarted.standing("orders"), state.standing("orders"));
        // The one before it does not come back unnoticed.
        let back = taken(&state, &self::answer(31, value(A, (4, 9, 3))), 50);
        assert!(back.held().unwrap().why.ends_with("from revision 30 to 9"));
        let good = taken(&state, &self::answer(31, value(B, (4, 31, 5))), 50);
        assert_eq!(in_force(&good).as_deref(), Some("203.0.113.0/24"));
        assert_eq!(good.kept().databases["orders"].last_good, None);
    }
}

#[test]
fn missing_and_unreadable_keys_leave_the_last_good_document() {
    let state = taken(&known(), &answer(30, Found::Missing), 20);
    expect_a(&state);
    assert_eq!(
        state.standing("orders"),
        Standing::Missing { since: at(20) }
    );
    let state = taken(&state, &answer(31, Found::Missing), 30);
    assert_eq!(
        state.standing("orders"),
        Standing::Missing { since: at(20) }
    );
    let state = taken(&state, &answer(40, value(A, (35, 35, 1))), 40);
    assert_eq!(state.standing("orders"), Standing::Active);
    assert_eq!(state.documents()["orders"].since, at(10));
    let denied = answer(50, Found::Unreadable("permission denied".into()));
    let state = taken(&state, &denied, 50);
    let state = taken(&state, &denied, 60);
    expect_a(&state);
    let why = "permission denied".into();
    assert_eq!(
        state.standing("orders"),
        Standing::Unreadable(Since { since: at(50), why })
    );
    let state = taken(&state, &answer(60, value(B, (35, 45, 2))), 70);
    assert_eq!(state.standing("orders"), Standing::Active);
    // Never had one: nothing but the floor.
    let state = taken(&fresh(), &answer(30, Found::Missing), 20);
    assert!(state.documents().is_empty());
    assert_eq!(
        state.standing("orders"),
        Standing::Missing { since: at(20) }
    );
}

#[test]
fn silence_leaves_everything_and_is_reported_after_three_minutes() {
    let mut state = known();
    assert!(!state.is_silent(at(189)) && state.is_silent(at(190)));
    state.lost("connect to 10.0.0.11: refused".into(), at(50));
    state.lost("connect to 10.0.0.12: refused".into(), at(60));
    let lost = state.lost_since().unwrap();
    assert_eq!(
        (lost.since, lost.why.as_str()),
        (at(50), "connect to 10.0.0.12: refused")
    );
    expect_a(&state);
    assert_eq!(state.standing("orders"), Standing::Active);
    // From a start on it has three minutes, however old the last answer is.
    let restarted = State::restore(state.kept(), &policy(), at(1_000));
    assert_eq!(restarted.contact(), Some(at(10)));
    assert!(!restarted.is_silent(at(1_179)) && restarted.is_silent(at(1_180)));
    // A clock that was set back.
    assert!(!restarted.is_silent(at(5)));
    let answered = taken(&state, &answer(21, value(A, (4, 9, 3))), 200);
    assert!(answered.lost_since().is_none() && !answered.is_silent(at(379)));
    // Also one that is held.
    let held = taken(&state, &answer(12, value(B, (4, 5, 2))), 200);
    assert!(held.lost_since().is_none() && held.contact() == Some(at(200)));
}

#[test]
fn frozen_host_takes_nothing_and_keeps_what_is_in_force() {
    let frozen = with("insecure: true}", "insecure: true, frozen: true}");
    let state = known().under(&frozen, at(20));
    assert!(state.is_frozen());
    let later = state.take(&answer(30, value(B, (4, 30, 4))), &frozen, at(30));
    expect_a(&later);
    assert_eq!(later.marks(), known().marks());
    assert_eq!(later.contact(), Some(at(30)));
    let restarted = State::restore(later.kept(), &frozen, at(40));
    expect_a(&restarted);
    let thawed = restarted.under(&policy(), at(50));
    let thawed = taken(&thawed, &answer(30, value(B, (4, 30, 4))), 60);
    assert_eq!(in_force(&thawed).as_deref(), Some("203.0.113.0/24"));
    // A reload that freezes and widens takes nothing new either.
    let refused = taken(&known(), &answer(30, value(WIDE, (4, 30, 4))), 20);
    let text = POLICY.replace("insecure: true}", "insecure: true, frozen: true}");
    let wider = parse(&text.replace("/16, /48", "/8, /48")).unwrap().0;
    let state = refused.under(&wider, at(30));
    expect_a(&state);
    assert_eq!(
        refusal(&state).0,
        "`fleet: {frozen: true}`: nothing new is taken"
    );
}

#[test]
fn reload_that_widens_the_bounds_takes_the_refused_document() {
    let refused = taken(&known(), &answer(30, value(WIDE, (4, 30, 4))), 20);
    let refused = State::restore(refused.kept(), &policy(), at(30));
    expect_a(&refused);
    let wider = with("/16, /48", "/8, /48");
    let state = refused.under(&wider, at(40));
    assert_eq!(in_force(&state).as_deref(), Some("203.0.0.0/8"));
    assert_eq!(state.documents()["orders"].since, at(40));
    assert_eq!(state.standing("orders"), Standing::Active);
    // Back again: what was revoked by it does not come back.
    let state = state.under(&policy(), at(50));
    assert_eq!(in_force(&state), None);
    assert_eq!(refusal(&state).1, 30);
    // The reload that was not committed has changed nothing.
    expect_a(&refused);
}

#[test]
fn reload_that_narrows_the_bounds_ends_what_is_outside() {
    let narrow = with("/16, /48", "/25, /48");
    let state = known().under(&narrow, at(20));
    assert_eq!(in_force(&state), None);
    let (why, revision) = refusal(&state);
    assert!(why.contains("198.51.100.0/24 is wider than /25"), "{why}");
    assert_eq!(revision, 9);
    let restarted = State::restore(known().kept(), &narrow, at(30));
    assert_eq!(in_force(&restarted), None);
    let state = restarted.under(&policy(), at(40));
    expect_a(&state);
    assert_eq!(state.documents()["orders"].since, at(40));
    // A restart alone is no change.
    let restarted = State::restore(known().kept(), &policy(), at(30));
    assert_eq!(restarted.documents(), known().documents());
}

#[test]
fn documents_of_databases_that_are_not_the_fleets_are_forgotten() {
    let without = with(", fleet: {widest: [/16, /48]}", "");
    let state = known().under(&without, at(20));
    assert!(state.documents().is_empty() && state.kept().databases.is_empty());
    assert_eq!(state.marks(), known().marks());
    // It comes back, and with it the first document; what etcd held before is not believed.
    let again = state.under(&policy(), at(30));
    assert_eq!(again.standing("orders"), Standing::Unknown);
    let state = taken(&again, &answer(12, value(BOTH, (4, 5, 2))), 40);
    assert_eq!(
        state.held().unwrap().why,
        "etcd went back from revision 20 to 12"
    );
    assert!(state.documents().is_empty());
    let state = taken(&again, &answer(21, value(A, (4, 9, 3))), 40);
    expect_a(&state);
    let none = POLICY.replace(
        "fleet: {endpoints: ['http://127.0.0.1:2379'], insecure: true}\n",
        "",
    );
    let none = none
        .replace(", fleet: {widest: [/16, /48]}", "")
        .replace(", fleet: true", "");
    let state = known().under(&parse(&none).unwrap().0, at(20));
    assert_eq!(state.kept(), Kept::default());
}

#[test]
fn what_is_kept_is_read_back_and_compared() {
    let state = taken(&known(), &answer(30, value(b"\xff", (4, 30, 4))), 20);
    let text = serde_json::to_string(&state.kept()).unwrap();
    let kept: Kept = serde_json::from_str(&text).unwrap();
    assert_eq!(kept, state.kept());
    let later = taken(&state, &answer(35, value(b"\xff", (4, 30, 4))), 30);
    assert_ne!(later.kept(), kept);
    assert!(later.kept().has_same_documents(&kept));
    assert!(!known().kept().has_same_documents(&kept));
    let mut era = answer(35, value(b"\xff", (4, 30, 4)));
    era.era = 1;
    assert!(!taken(&state, &era, 30).kept().has_same_documents(&kept));
}
