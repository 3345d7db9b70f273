//! Files of the state directory. The first byte chooses a record; unless it is a whole file, the checksum and what else
//! the agent would write around the rest is added: nothing of it could be found by chance.

#![no_main]

use std::{
    collections::{BTreeMap, VecDeque},
    sync::LazyLock,
};

use filter_agent::{
    clock::BootTime,
    history::{History, Past, Wanted},
    host::{Interface, coverage::Coverage},
    policy::{Policy, Region},
    policy_file::PolicyFile,
    protection,
    region::state::{Set, State},
    store,
    temporary::Kept,
};
use filter_fuzz::{check_in_force, clock, now, plant, policy};
use serde_json::{json, value::RawValue};

/// Regions as `lib.rs` judges them, but for their sources, `retire_after` and `max_age`.
static POLICY: LazyLock<Policy> = LazyLock::new(|| {
    policy(
        "interfaces: [eth0, 'en*']
regions:
  file: {file: /etc/filter-agent/office.txt, retire_after: 1h}
  list: {url: 'https://example.net', max_age: 366d}
databases:
  - {name: orders, port: 5432, model: dedicated, force_tls: false, rules: [region: file]}
",
    )
});

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let Some((choice, text)) = input.split_first() else {
        return;
    };
    let region = |name: &str| POLICY.regions[name].clone();
    match choice % 8 {
        0 => {
            if let Ok(confirmed) = store::decode_confirmed(text) {
                check_confirmed(&confirmed);
            }
            if let Ok(set) = store::decode(text, "file", &region("file").source) {
                check_set(region("file"), set);
            }
        }
        1 | 2 => {
            let name = if choice % 8 == 1 { "file" } else { "list" };
            let region = region(name);
            let source = serde_json::to_string(&region.source).expect("it is written");
            let source = json!(source);
            let Some(file) = sealed(text, |set| {
                format!("{{\"region\":\"{name}\",\"source\":{source},\"set\":{set}}}")
            }) else {
                return;
            };
            if let Ok(set) = store::decode(&file, name, &region.source) {
                check_set(region, set);
            }
        }
        4 => {
            let Some(file) = sealed(text, |record| record.get().to_owned()) else {
                return;
            };
            if let Ok(kept) = store::decode_temporary(&file) {
                check_temporary(kept);
            }
        }
        5 => {
            if let Ok(id) = store::history::decode_change_id(text) {
                assert!(text.starts_with(format!("{id:020} ").as_bytes()));
            }
            let Some(file) = sealed(text, |record| record.get().to_owned()) else {
                return;
            };
            if let Ok(changes) = store::history::decode_changes(&file) {
                check_changes(changes);
            }
        }
        6 => {
            let Some(file) = sealed(text, |record| record.get().to_owned()) else {
                return;
            };
            if let Ok(kept) = store::decode_window(&file)
                && let Some(open) = kept.open
            {
                check_temporary(open.before);
            }
        }
        _ => {
            let Some(file) = sealed(text, |record| record.get().to_owned()) else {
                return;
            };
            if let Ok(confirmed) = store::decode_confirmed(&file) {
                check_confirmed(&confirmed);
            }
        }
    }
});

/// A file with the right checksum. `None`: the text is not JSON.
fn sealed(text: &[u8], kept: impl Fn(&RawValue) -> String) -> Option<Vec<u8>> {
    let kept = kept(serde_json::from_slice(text).ok()?);
    let crc = crc32fast::hash(kept.as_bytes());
    Some(format!("{{\"crc32\":{crc},\"kept\":{kept}}}").into_bytes())
}

/// In another boot nothing lasts longer than what was left, and no longer than its date says.
fn check_temporary(kept: Kept) {
    let now = clock();
    let (_, same) = kept.clone().restore(kept.boot_id.as_deref(), now);
    let (ends, other) = kept.clone().restore(None, now);
    let left = |end: BootTime| end.since(kept.boot);
    for (dated, end) in ends.iter() {
        assert!(end <= now.boot_time_of(dated.expires).max(now.boot));
    }
    for rule in &other {
        assert!(rule.end > now.boot && rule.end <= now.boot_time_of(rule.until));
        let before = kept.temporary.iter().filter(|before| before.is_same(rule));
        assert!(
            before
                .into_iter()
                .any(|before| rule.end <= now.boot.after(left(before.end)))
        );
    }
    assert!(kept.boot_id.is_none() || same.iter().all(|rule| rule.end > now.boot));
}

/// Ids go on from the highest that was kept, and what is listed is what was kept.
fn check_changes(changes: VecDeque<Past>) {
    let json = serde_json::to_vec(&changes).expect("it is written");
    let again = serde_json::from_slice::<VecDeque<Past>>(&json).expect("it is read");
    assert_eq!(changes, again);
    let highest = changes.iter().map(|past| past.id).max();
    let mut history = History::restore(0, VecDeque::new(), changes.clone(), BTreeMap::new());
    assert_eq!(history.last_id(), highest.unwrap_or_default());
    let listing = history.list(&Wanted::default()).expect("all are listed");
    assert!(listing.changes.iter().all(|past| changes.contains(past)));
    let next = history.next_id();
    assert!(
        changes
            .iter()
            .all(|past| past.id < next || next == u64::MAX)
    );
}

fn check_set(region: Region, set: Set) {
    let text = store::encode("x", &region.source, &set).expect("a set is written");
    let again = store::decode(&text, "x", &region.source).expect("what was written is read");
    assert_eq!(set, again);
    assert!(store::decode(&text[..text.len() - 1], "x", &region.source).is_err());
    let mut state = State::new(region, now());
    let restored = state.restore(set, now());
    assert_eq!(restored.is_ok(), state.set.is_some());
    let Some(set) = state.set.clone() else {
        return;
    };
    check_in_force(&state);
    assert!(set.confirmed <= now());
    assert!(set.retiring.iter().all(|&(_, until)| until > now()));
    // What the set says now is what it says after another restart.
    let mut other = State::new(state.region.clone(), now());
    other
        .restore(set.clone(), now())
        .expect("it was restored before");
    assert!(other.holds_the_same(&state));
    // Until its time is over, and then no prefix that was not there before.
    for _ in 0..8 {
        let Some(next) = state.next_tick() else { break };
        state.tick(next);
        check_in_force(&state);
        assert!(state.next_tick().is_none_or(|later| later > next));
    }
    plant(set.retiring.len() == 1 && set.serial.is_some() && set.version.is_some());
}

fn check_confirmed(confirmed: &store::Confirmed) {
    let json = serde_json::to_vec(confirmed).expect("it is written");
    let again = serde_json::from_slice::<store::Confirmed>(&json).expect("it is read");
    assert_eq!(*confirmed, again);
    let text = confirmed.policy.clone();
    let Ok(file) = PolicyFile::parse("/var/lib/filter-agent/confirmed.json".as_ref(), text) else {
        return;
    };
    let host = ["eth0", "eth1", "ens5"].map(|name| Interface {
        name: name.into(),
        ethernet: true,
        hardware_address: Some("02:00:00:00:00:01".into()),
        ..Interface::default()
    });
    let coverage = Coverage::of(&file.policy, &confirmed.interfaces, &host);
    assert!(
        coverage
            .present
            .iter()
            .all(|interface| host.contains(interface))
    );
    let ended = protection::ended(&POLICY, &file.policy, &confirmed.interfaces, &host);
    plant(ended.is_empty() && coverage.present.len() > 1);
}
