//! Results over time, and what a region allows after them.

mod families;

use std::time::SystemTime;

use anyhow::anyhow;
use reqwest::{
    StatusCode,
    header::{HeaderMap, RETRY_AFTER},
};

use super::*;
use crate::{policy, region::answer::Missing};

const NOW: &str = "2026-01-01T00:00:00Z";

fn region(fields: &str) -> Region {
    let text = format!("interfaces: [eth0]\ndatabases: []\nregions: {{x: {{{fields}}}}}");
    policy::parse(&text).unwrap().0.regions.remove("x").unwrap()
}

fn after(time: Duration) -> Timestamp {
    NOW.parse::<Timestamp>().unwrap() + time
}

fn seconds(count: u64) -> Timestamp {
    after(Duration::from_secs(count))
}

fn list(prefixes: &[&str]) -> Vec<IpNet> {
    prefixes
        .iter()
        .map(|prefix| prefix.parse().unwrap())
        .collect()
}

fn found(prefixes: &[&str]) -> Result<Answer> {
    Ok(Answer::Found(Found {
        prefixes: list(prefixes),
        ask_again: Some(Duration::from_secs(20)),
        ..Found::default()
    }))
}

fn allowed(state: &State) -> Vec<IpNet> {
    let set = state.set.as_ref();
    set.map(|set| set.prefixes.to_vec()).unwrap_or_default()
}

fn error(state: &State) -> &str {
    &state.error.as_ref().unwrap().text
}

const DNS: &str = "dns: [egress.example.net]";
const TWO: [&str; 2] = ["192.0.2.10/32", "192.0.2.20/32"];

fn with_two(fields: &str) -> State {
    let mut state = State::new(region(fields), seconds(0));
    state.take(found(&TWO), false, seconds(0));
    assert_eq!(allowed(&state), list(&TWO));
    state
}

#[test]
fn every_bad_answer_is_refused_and_keeps_the_last_good_set() {
    let many: Vec<String> = (0..11).map(|i| format!("198.51.100.{i}/32")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let bad: &[(&[&str], &str)] = &[
        (&[], "holds no prefix"),
        (
            &["192.0.2.10/32", "192.0.2.20/32", "0.0.0.0/0"],
            "broader than /8",
        ),
        (
            &["192.0.2.10/32", "192.0.2.20/32", "64.0.0.0/7"],
            "broader than /8",
        ),
        (
            &["192.0.2.10/32", "192.0.2.20/32", "::/0"],
            "broader than /16",
        ),
        (
            &["192.0.2.10/32", "192.0.2.20/32", "2000::/15"],
            "broader than /16",
        ),
        (
            &["192.0.2.10/32", "192.0.2.20/32", "0.0.0.0/32"],
            "unspecified",
        ),
        (
            &["192.0.2.10/32", "192.0.2.20/32", "127.0.0.1/32"],
            "loopback",
        ),
        (
            &["192.0.2.10/32", "192.0.2.20/32", "169.254.169.254/32"],
            "link-local",
        ),
        (
            &["192.0.2.10/32", "192.0.2.20/32", "224.0.0.1/32"],
            "multicast",
        ),
        (
            &["192.0.2.10/32", "192.0.2.20/32", "255.255.255.255/32"],
            "reserved",
        ),
        (&["192.0.2.10/32", "192.0.2.20/32", "::1/128"], "loopback"),
        (
            &["192.0.2.10/32", "192.0.2.20/32", "::ffff:192.0.2.10/128"],
            "IPv4-mapped",
        ),
        (
            &["192.0.2.10/32", "192.0.2.20/32", "fe80::1/128"],
            "link-local",
        ),
        (
            &["192.0.2.10/32", "192.0.2.20/32", "ff02::1/128"],
            "multicast",
        ),
        (
            &["192.0.2.10/32", "192.0.2.20/32", "10.1.2.3/32"],
            "private: true",
        ),
        (
            &["192.0.2.10/32", "192.0.2.20/32", "172.0.0.0/8"],
            "private: true",
        ),
        (
            &["192.0.2.10/32", "192.0.2.20/32", "192.168.0.0/24"],
            "private: true",
        ),
        (
            &["192.0.2.10/32", "192.0.2.20/32", "100.64.0.1/32"],
            "private: true",
        ),
        (
            &["192.0.2.10/32", "192.0.2.20/32", "fd00::1/128"],
            "private: true",
        ),
        (
            &["192.0.2.10/32", "192.0.2.20/32", "192.0.3.1/24"],
            "host bits",
        ),
        (&many, "at most 10 (`max_prefixes`)"),
    ];
    for (answer, expected) in bad {
        let mut state = with_two(&format!("{DNS}, max_prefixes: 10"));
        let change = state.take(found(answer), false, seconds(20));
        assert!(change.is_empty() && state.failing, "{answer:?}");
        assert!(
            error(&state).contains(expected),
            "{answer:?}: {}",
            error(&state)
        );
        assert_eq!(allowed(&state), list(&TWO), "{answer:?}");
        assert_eq!(state.set.as_ref().unwrap().confirmed, seconds(0));
    }
}

#[test]
fn bad_answer_is_refused_even_when_it_is_to_be_accepted_or_is_the_first() {
    let bad = ["192.0.2.10/32", "192.0.2.20/32", "0.0.0.0/0"];
    let mut state = with_two(DNS);
    state.take(found(&bad), true, seconds(20));
    assert_eq!(allowed(&state), list(&TWO));
    let mut state = State::new(region(DNS), seconds(0));
    state.take(found(&bad), false, seconds(0));
    assert_eq!(allowed(&state), []);
}

#[test]
fn private_addresses_are_taken_with_private_true() {
    let mut state = State::new(region(&format!("{DNS}, private: true")), seconds(0));
    state.take(found(&["10.1.0.0/16", "fd00::/32"]), false, seconds(0));
    assert_eq!(allowed(&state), list(&["10.1.0.0/16", "fd00::/32"]));
}

#[test]
fn address_that_leaves_stays_allowed_until_it_retires() {
    let mut state = with_two(DNS);
    let change = state.take(
        found(&["192.0.2.10/32", "192.0.2.30/32"]),
        false,
        seconds(20),
    );
    assert_eq!(change.added, list(&["192.0.2.30/32"]));
    assert_eq!(change.left, list(&["192.0.2.20/32"]));
    assert_eq!(change.removed, []);
    let three = list(&["192.0.2.10/32", "192.0.2.20/32", "192.0.2.30/32"]);
    assert_eq!(allowed(&state), three);
    let over = seconds(20 + 3600);
    assert_eq!(state.next_tick(), Some(over));
    assert!(state.tick(seconds(20 + 3599)).is_empty());
    assert_eq!(allowed(&state), three);
    assert_eq!(state.tick(over).removed, list(&["192.0.2.20/32"]));
    assert_eq!(allowed(&state), list(&["192.0.2.10/32", "192.0.2.30/32"]));
    assert_eq!(state.next_tick(), None);
}

#[test]
fn address_that_returns_does_not_retire() {
    let mut state = with_two(DNS);
    state.take(found(&["192.0.2.10/32"]), false, seconds(20));
    state.take(found(&TWO), false, seconds(40));
    assert_eq!(state.next_tick(), None);
    assert_eq!(allowed(&state), list(&TWO));
}

const TEN: [&str; 10] = [
    "192.0.2.1/32",
    "192.0.2.3/32",
    "192.0.2.5/32",
    "192.0.2.7/32",
    "192.0.2.9/32",
    "192.0.2.11/32",
    "192.0.2.13/32",
    "192.0.2.15/32",
    "192.0.2.17/32",
    "192.0.2.19/32",
];

fn with_ten(fields: &str) -> State {
    let mut state = State::new(region(fields), seconds(0));
    state.take(found(&TEN), false, seconds(0));
    state
}

#[test]
fn pool_that_a_name_rotates_through_is_allowed_whole_and_is_no_error() {
    let mut state = State::new(region(DNS), seconds(0));
    let mut pool = list(&TEN);
    pool.sort_unstable();
    for round in 0..60 {
        let two = [TEN[round * 2 % 10], TEN[(round * 2 + 1) % 10]];
        state.take(found(&two), false, seconds(20 * round as u64));
        assert!(!state.failing, "{}", error(&state));
        if round >= 4 {
            assert_eq!(allowed(&state), pool);
        }
    }
}

#[test]
fn pool_of_thirty_of_which_eight_come_at_random_is_allowed_whole() {
    let pool: Vec<String> = (0..30)
        .map(|i| format!("198.51.100.{}/32", 2 * i))
        .collect();
    let mut random = fastrand::Rng::with_seed(7);
    let mut state = State::new(region(DNS), seconds(0));
    for round in 0..90 {
        let some = random.choose_multiple(&pool, 8);
        let some: Vec<&str> = some.into_iter().map(String::as_str).collect();
        let change = state.take(found(&some), false, seconds(20 * round));
        state.tick(seconds(20 * round));
        assert!(!state.failing, "{}", error(&state));
        assert!(round < 60 || change.is_empty() || change.added.is_empty());
    }
    assert_eq!(allowed(&state).len(), 30);
}

#[test]
fn address_that_moves_is_followed_at_once() {
    let mut state = State::new(region(DNS), seconds(0));
    state.take(found(&["192.0.2.10/32"]), false, seconds(0));
    let change = state.take(found(&["198.51.100.7/32"]), false, seconds(20));
    assert_eq!(change.added, list(&["198.51.100.7/32"]));
    assert_eq!(change.left, list(&["192.0.2.10/32"]));
    assert!(!state.failing);
    // Held for `shrink_after`, then retiring: by results alone, not by time.
    assert_eq!(state.next_tick(), None);
    state.take(found(&["198.51.100.7/32"]), false, seconds(619));
    assert_eq!(state.next_tick(), None);
    state.take(Err(anyhow!("no answer")), false, seconds(100_000));
    assert!(state.tick(seconds(100_000)).is_empty());
    state.take(found(&["198.51.100.7/32"]), false, seconds(100_020));
    assert_eq!(allowed(&state).len(), 2);
    assert_eq!(state.next_tick(), Some(seconds(100_020 + 3600)));
    let over = state.tick(seconds(100_020 + 3600));
    assert_eq!(over.removed, list(&["192.0.2.10/32"]));
}

#[test]
fn set_that_shrank_is_an_error_until_it_grows_or_stays_so_and_loses_nobody_meanwhile() {
    let mut state = with_ten(&format!("{DNS}, shrink_after: 5m, retire_after: 0s"));
    let few = ["192.0.2.1/32", "203.0.113.9/32"];
    let change = state.take(found(&few), false, seconds(100));
    assert_eq!(change.added, list(&["203.0.113.9/32"]));
    assert_eq!((change.left.len(), change.removed.len()), (9, 0));
    let text = "the prefixes fell from 10 to 2, by more than `max_shrink`: reported until 2026-01-01T00:06:40Z";
    assert!(error(&state).starts_with(text), "{}", error(&state));
    assert!(state.failing && state.partial);
    assert_eq!(allowed(&state).len(), 11);
    state.take(found(&few), false, seconds(399));
    state.take(
        Ok(Answer::Unchanged { ask_again: None }),
        false,
        seconds(399),
    );
    assert!(state.failing);
    // Kept and restored: the error is not lost with the process.
    let mut restored = State::new(state.region.clone(), seconds(399));
    restored
        .restore(state.set.clone().unwrap(), seconds(399))
        .unwrap();
    restored.take(found(&few), false, seconds(399));
    assert!(restored.failing);
    let mut grown = state.clone();
    grown.take(found(&TEN), false, seconds(399));
    assert!(!grown.failing);
    assert!(state.tick(seconds(400)).is_empty());
    let change = state.take(found(&few), false, seconds(400));
    assert_eq!(change.removed.len(), 9);
    assert!(!state.failing);
    assert_eq!(allowed(&state), list(&few));
}

#[test]
fn set_that_shrank_is_taken_at_once_when_told_so() {
    for later in [false, true] {
        let mut state = with_ten(&format!("{DNS}, retire_after: 1m"));
        if later {
            state.take(found(&TEN[..1]), false, seconds(100));
            assert_eq!(state.next_tick(), None);
        }
        state.take(found(&TEN[..1]), true, seconds(110));
        assert!(!state.failing);
        assert_eq!(state.next_tick(), Some(seconds(110 + 60)));
    }
}

#[test]
fn source_with_ever_new_addresses_keeps_to_max_prefixes() {
    let mut state = State::new(region(&format!("{DNS}, max_prefixes: 10")), seconds(0));
    for round in 0..100u64 {
        let new = [
            format!("198.51.{round}.1/32"),
            format!("198.51.{round}.3/32"),
        ];
        let change = state.take(
            found(&new.each_ref().map(String::as_str)),
            false,
            seconds(round),
        );
        assert!(allowed(&state).len() <= 10);
        // The oldest go.
        let oldest = round.saturating_sub(4);
        let oldest = format!("198.51.{oldest}.1/32").parse().unwrap();
        assert!(allowed(&state).contains(&oldest));
        assert_eq!(change.removed.len(), if round > 4 { 2 } else { 0 });
    }
}

fn without(v4: bool, v6: bool, prefixes: &[&str]) -> Result<Answer> {
    Ok(Answer::Found(Found {
        prefixes: list(prefixes),
        missing: Some(Missing {
            v4,
            v6,
            error: "AAAA records: no answer".into(),
        }),
        ..Found::default()
    }))
}

#[test]
fn half_may_leave_at_once_and_no_more() {
    let four = [
        "192.0.2.1/32",
        "192.0.2.3/32",
        "192.0.2.5/32",
        "192.0.2.7/32",
    ];
    for (left, taken) in [(2, true), (1, false)] {
        let mut state = State::new(region(DNS), seconds(0));
        state.take(found(&four), false, seconds(0));
        state.take(found(&four[..left]), false, seconds(20));
        assert_eq!(!state.failing, taken, "{left} left");
    }
}

#[test]
fn list_that_is_older_is_held() {
    let numbered = |prefixes: &[&str], serial| {
        Ok(Answer::Found(Found {
            prefixes: list(prefixes),
            serial: Some(serial),
            ..Found::default()
        }))
    };
    let url = "url: 'https://example.net/'";
    let mut state = State::new(region(url), seconds(0));
    state.take(numbered(&TWO, 7), false, seconds(0));
    let more = ["192.0.2.10/32", "192.0.2.20/32", "192.0.2.30/32"];
    state.take(numbered(&more, 6), false, seconds(20));
    assert!(
        error(&state).contains("6 is older than 7"),
        "{}",
        error(&state)
    );
    assert_eq!(allowed(&state), list(&TWO));
    // Without a number nothing shows that it is newer.
    state.take(found(&more), false, seconds(30));
    let expected = "the list has no number, and the one in force has 7: taken if";
    assert!(error(&state).contains(expected), "{}", error(&state));
    assert_eq!(allowed(&state), list(&TWO));
    state.take(numbered(&more, 8), false, seconds(40));
    assert_eq!(allowed(&state), list(&more));
}

/// Errors of guards did not say of which file or list.
#[test]
fn answer_that_breaks_a_guard_is_named() {
    for (source, begins) in [
        ("file: /etc/office.txt", "file /etc/office.txt: "),
        ("url: 'https://u:p@a.test/'", "url https://a.test/: "),
        (DNS, "dns egress.example.net: "),
    ] {
        let mut state = State::new(region(source), seconds(0));
        state.take(found(&["10.0.0.0/8"]), false, seconds(0));
        let expected = format!("{begins}10.0.0.0/8 is private");
        assert!(error(&state).starts_with(&expected), "{}", error(&state));
    }
}

/// A program that hung with the file open refused every reload.
#[test]
fn file_that_is_still_written_refuses_a_reload_only_where_no_set_is_known() {
    let text = "interfaces: [eth0]\nregions: {x: {file: /x}}\ndatabases:\n- {name: a, port: 1, model: dedicated, \
                force_tls: false, rules: [{region: x}]}\n";
    let (policy, _) = policy::parse(text).unwrap();
    let answers = || {
        BTreeMap::from([(
            "x".to_owned(),
            Err(anyhow!(StillWritten).context("read /x")),
        )])
    };
    let error = next(&policy, &Regions::new(), answers(), seconds(0)).unwrap_err();
    let expected = "region x: read /x: a program is still writing it";
    assert_eq!(error.to_string(), expected);
    let good = BTreeMap::from([("x".to_owned(), found(&TWO))]);
    let known = next(&policy, &Regions::new(), good, seconds(0)).unwrap();
    let regions = next(&policy, &known, answers(), seconds(1)).unwrap();
    assert_eq!(allowed(&regions["x"]), list(&TWO));
    assert!(regions["x"].failing);
    // Any other error refuses it.
    let other = BTreeMap::from([("x".to_owned(), Err(anyhow!("other")))]);
    assert!(next(&policy, &known, other, seconds(1)).is_err());
}

#[test]
fn adjacent_and_covered_prefixes_are_merged_and_the_members_are_remembered() {
    let mut state = State::new(region(DNS), seconds(0));
    let members = [
        "192.0.2.0/25",
        "192.0.2.128/25",
        "192.0.2.7/32",
        "2001:db8::/33",
        "2001:db8:8000::/33",
    ];
    state.take(found(&members), false, seconds(0));
    assert_eq!(allowed(&state), list(&["192.0.2.0/24", "2001:db8::/32"]));
    assert_eq!(state.set.as_ref().unwrap().members.len(), 5);
    // One that is covered may leave and changes nothing; one that is not retires.
    let change = state.take(found(&members[1..]), false, seconds(20));
    assert_eq!(change.left, list(&["192.0.2.0/25"]));
    assert_eq!(allowed(&state), list(&["192.0.2.0/24", "2001:db8::/32"]));
    state.tick(seconds(20 + 3600));
    let rest = ["192.0.2.7/32", "192.0.2.128/25", "2001:db8::/32"];
    assert_eq!(allowed(&state), list(&rest));
}

#[test]
fn list_that_says_the_same_in_other_prefixes_changes_nothing() {
    let halves = ["192.0.2.0/25", "192.0.2.128/25", "2001:db8::/32"];
    let mut state = State::new(region(DNS), seconds(0));
    state.take(found(&halves), false, seconds(0));
    for same in [
        &["192.0.2.0/24", "2001:db8::/32"][..],
        &[
            "192.0.2.0/24",
            "192.0.2.0/25",
            "2001:db8::/33",
            "2001:db8:8000::/33",
        ],
        &halves,
    ] {
        let change = state.take(found(same), false, seconds(20));
        assert!(change.is_empty() && !state.failing, "{same:?}: {change:?}");
        assert_eq!(allowed(&state), list(&["192.0.2.0/24", "2001:db8::/32"]));
        assert_eq!(state.next_tick(), None);
    }
}

#[test]
fn covered_prefixes_are_found_as_by_looking_at_each() {
    let mut random = fastrand::Rng::with_seed(1);
    let mut prefix = || {
        let address = std::net::Ipv4Addr::from([192, 0, 2, random.u8(..)]);
        IpNet::new(address.into(), random.u8(24..=32))
            .unwrap()
            .trunc()
    };
    for _ in 0..2_000 {
        let merged = merged(&[prefix(), prefix(), prefix(), prefix()]);
        let wanted = prefix();
        let expected = merged.iter().any(|other| other.contains(&wanted));
        assert_eq!(
            is_covered(&wanted, &merged),
            expected,
            "{wanted} in {merged:?}"
        );
    }
}

#[test]
fn answer_decides_when_to_ask_again_within_bounds() {
    let mut state = with_two(&format!("{DNS}, min_refresh: 5s, max_refresh: 30s"));
    assert_eq!(state.next, Some(seconds(20)));
    for (ttl, next) in [(0, 5), (3600, 30)] {
        let answer = Answer::Found(Found {
            prefixes: list(&TWO),
            ask_again: Some(Duration::from_secs(ttl)),
            ..Found::default()
        });
        state.take(Ok(answer), false, seconds(0));
        assert_eq!(state.next, Some(seconds(next)));
    }
}

#[test]
fn failures_are_tried_again_later_and_later_and_not_in_step() {
    let mut spread = Vec::new();
    for _ in 0..50 {
        let mut state = with_two(&format!("{DNS}, min_refresh: 1s, max_refresh: 1m"));
        let mut delays = Vec::new();
        for _ in 0..40 {
            state.take(Err(anyhow!("no answer")), false, seconds(0));
            delays.push(state.next.unwrap().duration_since(seconds(0)).as_millis());
        }
        for (delay, least) in delays.iter().zip([1000, 2000, 4000, 8000, 16_000, 32_000]) {
            assert!(
                (least..=2 * least.min(30_000)).contains(delay),
                "{delays:?}"
            );
        }
        assert!(
            delays[6..].iter().all(|&delay| delay == 60_000),
            "{delays:?}"
        );
        spread.push(delays[3]);
        state.take(found(&TWO), false, seconds(0));
        state.take(Err(anyhow!("no answer")), false, seconds(0));
        assert!(state.next.unwrap() <= seconds(2));
    }
    spread.sort_unstable();
    assert!(spread[40] - spread[10] > 1000, "{spread:?}");
}

/// A look-up that a server refused for so many seconds, with the contexts that the way here adds.
fn try_later(wait: u64) -> Result<Answer> {
    let headers = HeaderMap::from_iter([(RETRY_AFTER, wait.into())]);
    let status = StatusCode::TOO_MANY_REQUESTS;
    let later = TryLater::read(status, &headers, SystemTime::now()).unwrap();
    Err(anyhow::Error::new(later)
        .context("fetch")
        .context("look up"))
}

/// Fault C19.
#[test]
fn look_up_waits_as_long_as_the_server_asks_for() {
    let mut spread = Vec::new();
    for _ in 0..50 {
        let mut state = with_two("url: 'https://a.test/', min_refresh: 10s, max_refresh: 1m");
        state.take(try_later(3600), false, seconds(0));
        assert_eq!(allowed(&state), list(&TWO));
        assert!(error(&state).contains("asks to wait until "), "{state:?}");
        let next = state.next.unwrap();
        // Later than `max_refresh`, and not in step with other hosts.
        assert!((seconds(3610)..=seconds(3620)).contains(&next), "{next}");
        spread.push(next);
        // Longer than the bound, and shorter than `min_refresh`.
        state.take(try_later(100 * 86_400), false, seconds(0));
        let next = state.next.unwrap();
        assert!(
            (seconds(86_410)..=seconds(86_420)).contains(&next),
            "{next}"
        );
        let mut state = with_two("url: 'https://a.test/', min_refresh: 10s");
        state.take(try_later(1), false, seconds(0));
        let next = state.next.unwrap();
        assert!((seconds(10)..=seconds(21)).contains(&next), "{next}");
    }
    spread.sort_unstable();
    assert!(spread[10] < spread[40], "{spread:?}");
}

/// Fault C19: the backoff goes on where the server asks for less.
#[test]
fn look_ups_back_off_further_than_the_server_asks_for() {
    let mut state = with_two("url: 'https://a.test/', min_refresh: 10s, max_refresh: 10m");
    for least in [10, 20, 40, 80, 160, 320] {
        state.take(try_later(1), false, seconds(0));
        assert!(state.next.unwrap() >= seconds(least), "{state:?}");
    }
    state.take(found(&TWO), false, seconds(0));
    state.take(try_later(1), false, seconds(0));
    assert!(state.next.unwrap() <= seconds(21), "{state:?}");
}

/// Fault C6: what a server or a library quotes.
#[test]
fn error_shows_no_secret_of_a_url() {
    let mut state = with_two("url: 'https://a.test/'");
    let quoted = anyhow!("for url (https://u:s3cret@a.test/list?s3cret)");
    state.take(Err(quoted), false, seconds(0));
    assert_eq!(error(&state), "for url (https://a.test/list?...)");
}

#[test]
fn set_that_is_not_confirmed_is_dropped_at_max_age_and_only_then() {
    let mut state = with_two(&format!("{DNS}, max_age: 1h"));
    state.take(Err(anyhow!("no answer")), false, seconds(3000));
    assert_eq!(state.next_tick(), Some(seconds(3600)));
    assert!(state.tick(seconds(3599)).is_empty());
    let change = state.tick(seconds(3600));
    assert_eq!(change.removed, list(&TWO));
    assert_eq!(allowed(&state), []);
    assert!(error(&state).contains("max_age"));
    state.take(found(&TWO), false, seconds(3700));
    assert_eq!(allowed(&state), list(&TWO));
    let mut state = with_two(&format!("{DNS}, max_age: 1h"));
    state.take(
        Ok(Answer::Unchanged { ask_again: None }),
        false,
        seconds(3000),
    );
    assert!(state.tick(seconds(3600)).is_empty());
}

#[test]
fn file_says_at_once_what_it_means() {
    let mut state = with_two("file: /etc/office.txt");
    let change = state.take(found(&["192.0.2.30/32"]), false, seconds(20));
    assert_eq!(change.removed, list(&TWO));
    assert_eq!(allowed(&state), list(&["192.0.2.30/32"]));
    assert!(state.take(found(&[]), false, seconds(40)).is_empty());
    assert_eq!(allowed(&state), list(&["192.0.2.30/32"]));
}

#[test]
fn file_is_looked_at_again_within_max_refresh_whatever_is_watched() {
    let mut state = with_two("file: /etc/office.txt, max_refresh: 7s");
    for answer in [
        found(&TWO),
        Ok(Answer::Unchanged { ask_again: None }),
        Ok(Answer::Found(Found {
            prefixes: list(&TWO),
            ..Found::default()
        })),
    ] {
        state.take(answer, false, seconds(100));
        assert_eq!(state.next, Some(seconds(107)));
    }
    state.take(Err(anyhow!("no answer")), false, seconds(100));
    assert!(state.next.unwrap() <= seconds(107));
    let state = State::new(region("prefixes: [192.0.2.0/24]"), seconds(0));
    assert_eq!(state.next, None);
}

#[test]
fn kept_set_is_restored_unless_it_breaks_a_guard() {
    let mut state = with_two(DNS);
    state.take(found(&["192.0.2.10/32"]), false, seconds(20));
    let kept = state.set.clone().unwrap();
    let mut restored = State::new(region(DNS), seconds(30));
    restored.restore(kept.clone(), seconds(30)).unwrap();
    assert_eq!(allowed(&restored), list(&TWO));
    assert_eq!(restored.next, Some(seconds(30)));
    // What has retired meanwhile, and what a wrong clock would have kept for ever.
    restored.restore(kept.clone(), seconds(7200)).unwrap();
    assert_eq!(allowed(&restored), list(&["192.0.2.10/32"]));
    let earlier = "2025-01-01T00:00:00Z".parse().unwrap();
    restored.restore(kept.clone(), earlier).unwrap();
    assert_eq!(
        restored.next_tick(),
        Some(earlier + Duration::from_hours(1))
    );

    for (fields, bad) in [
        ("", "0.0.0.0/0"),
        ("", "10.0.0.0/8"),
        (", max_prefixes: 1", "192.0.2.30/32"),
        (", max_age: 1m", "192.0.2.30/32"),
    ] {
        let mut set = kept.clone();
        let members = [bad.parse().unwrap(), set.members[0]];
        set.members = if bad < "192.0.2.10" {
            members
        } else {
            [members[1], members[0]]
        }
        .into();
        let mut state = State::new(region(&format!("{DNS}{fields}")), seconds(0));
        assert!(state.restore(set, seconds(90)).is_err(), "{bad}");
        assert_eq!(allowed(&state), []);
    }
    let mut set = kept;
    set.retiring = vec![("0.0.0.0/0".parse().unwrap(), seconds(900))];
    assert!(
        State::new(region(DNS), seconds(0))
            .restore(set, seconds(0))
            .is_err()
    );
}

fn policies(regions: &str) -> Policy {
    let text = format!(
        "interfaces: [eth0]\nregions: {{{regions}}}\ndatabases: [{{name: a, port: 1, model: \
         dedicated, force_tls: false, rules: [{{region: x}}]}}]"
    );
    policy::parse(&text).unwrap().0
}

#[test]
fn reload_keeps_what_is_known_of_a_source_and_asks_about_a_new_one() {
    let first = policies("x: {dns: [a.example]}, y: {dns: [y.example]}");
    assert_eq!(
        to_ask(&first, &Regions::new())
            .into_keys()
            .collect::<Vec<_>>(),
        ["x"]
    );
    let answers = BTreeMap::from([("x".into(), found(&TWO))]);
    let known = next(&first, &Regions::new(), answers, seconds(0)).unwrap();

    let slower = policies("x: {dns: [a.example], min_refresh: 30s}");
    assert!(to_ask(&slower, &known).is_empty());
    let after = next(&slower, &known, BTreeMap::new(), seconds(5)).unwrap();
    assert_eq!(allowed(&after["x"]), list(&TWO));
    assert_eq!(after["x"].region, slower.regions["x"]);

    // Neither of another source, nor what the guards would no longer let in.
    for changed in [
        "x: {dns: [b.example]}",
        "x: {dns: [a.example], max_prefixes: 1}",
    ] {
        let changed = policies(changed);
        assert!(to_ask(&changed, &known).contains_key("x"));
        let failed = BTreeMap::from([("x".into(), Err(anyhow!("no answer")))]);
        let refused = next(&changed, &known, failed, seconds(5)).unwrap_err();
        assert_eq!(refused.to_string(), "region x: no answer");
    }
}
