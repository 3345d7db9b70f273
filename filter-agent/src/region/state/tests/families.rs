//! Results that lack one address family.

use super::*;

#[test]
fn members_of_a_family_that_failed_stay_and_the_other_family_is_followed() {
    let both = ["192.0.2.10/32", "2001:db8::1/128"];
    let mut state = State::new(region(DNS), seconds(0));
    state.take(found(&both), false, seconds(0));
    for time in [20, 100_000, 200_000] {
        state.take(
            without(false, true, &["192.0.2.20/32"]),
            false,
            seconds(time),
        );
        assert!(state.failing && state.partial);
        assert_eq!(error(&state), "AAAA records: no answer");
        state.tick(seconds(time));
        assert!(allowed(&state).contains(&"192.0.2.20/32".parse().unwrap()));
        assert!(allowed(&state).contains(&"2001:db8::1/128".parse().unwrap()));
    }
    state.take(
        found(&["192.0.2.20/32", "2001:db8::2/128"]),
        false,
        seconds(200_020),
    );
    assert!(!state.failing);
    // A first result may be partial as well.
    let mut state = State::new(region(DNS), seconds(0));
    state.take(without(false, true, &["192.0.2.20/32"]), false, seconds(0));
    assert_eq!(allowed(&state), list(&["192.0.2.20/32"]));
}

#[test]
fn members_of_a_family_that_failed_are_not_older_than_max_age() {
    let both = ["192.0.2.10/32", "2001:db8::1/128"];
    let mut state = State::new(
        region(&format!("{DNS}, max_age: 1h, retire_after: 0s")),
        seconds(0),
    );
    state.take(found(&both), false, seconds(0));
    let v4 = || without(false, true, &["192.0.2.10/32"]);
    state.take(v4(), false, seconds(20));
    state.take(v4(), false, seconds(3600));
    assert_eq!(state.next_tick(), Some(seconds(3620)));
    assert!(state.tick(seconds(3619)).is_empty());
    assert_eq!(allowed(&state), list(&both));
    let change = state.tick(seconds(3620));
    assert_eq!(change.removed, list(&both[1..]));
    assert_eq!(allowed(&state), list(&both[..1]));
    state.take(v4(), false, seconds(3640));
    assert_eq!(allowed(&state), list(&both[..1]));
}

/// Fault C5: held prefixes of a family that cannot be looked up have not been found to be gone.
#[test]
fn held_prefixes_of_a_family_that_failed_stay() {
    let mut state = State::new(region(DNS), seconds(0));
    state.take(
        found(&["192.0.2.10/32", "2001:db8::1/128"]),
        false,
        seconds(0),
    );
    state.take(
        found(&["192.0.2.20/32", "2001:db8::2/128"]),
        false,
        seconds(20),
    );
    for time in [100_000, 200_000] {
        let v4 = without(false, true, &["192.0.2.20/32"]);
        state.take(v4, false, seconds(time));
        state.tick(seconds(time));
    }
    let allowed = allowed(&state);
    assert!(allowed.contains(&"2001:db8::1/128".parse().unwrap()));
    assert!(!allowed.contains(&"192.0.2.10/32".parse().unwrap()));
}
