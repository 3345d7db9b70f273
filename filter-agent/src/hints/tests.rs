use std::{path::Path, sync::Arc};

use super::*;
use crate::{
    clock::BootTime,
    compile::Compiled,
    host::coverage::Remembered,
    policy_file::PolicyFile,
    region::state::{Change, State},
    temporary::Timed,
};

const POLICY: &str = "
interfaces: [eth0]
regional_network: [10.0.0.0/8]
regions:
  cloud: {file: /nowhere}
databases:
  - name: orders
    port: 5432
    engine: postgresql
    model: dedicated
    rules:
      - cidr: 203.0.113.10/32
      - {cidr: 198.51.100.0/24, expires: 2025-12-31T00:00:00Z}
      - {cidr: 192.0.2.0/24, except: [192.0.2.66/32]}
      - {region: cloud}
      - cidr: 2001:db8::10/128
  - name: shop
    port: 3306
    model: dedicated
    force_tls: false
    rules: [{cidr: 100.64.0.0/16}]
  - {name: common, port: 6379, model: shared}
";

fn date(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn hint_of(database: &str, source: &str, reason: Reason) -> (Option<String>, Option<String>) {
    let file = PolicyFile::parse(Path::new("policy.yaml"), POLICY.into()).unwrap();
    let now = Now {
        boot: BootTime(3600 * 1_000_000_000),
        steady: date("2026-01-01T00:00:00Z"),
        wall: date("2026-01-01T00:00:00Z"),
    };
    let mut state = State::new(file.policy.regions["cloud"].clone(), now.steady);
    state.change = Some(Arc::new(Change {
        at: Some(date("2025-12-30T00:00:00Z")),
        removed: vec!["9.9.9.0/24".parse().unwrap()],
        ..Change::default()
    }));
    let regions = Regions::from([("cloud".into(), state)]);
    let temporary = |kind, source: &str, end| {
        let source = source.parse().unwrap();
        Temporary::new("orders", kind, source, BootTime(end), now)
    };
    let mut timed = Timed::of(&file.policy, now);
    timed.temporary = vec![
        temporary(Kind::Block, "203.0.113.10/32", u64::MAX / 4),
        temporary(Kind::Allow, "8.8.8.8/32", u64::MAX / 4),
    ];
    let ended = [Temporary {
        label: Some("Kim".into()),
        ..temporary(Kind::Allow, "7.7.7.0/24", 1_000_000_000)
    }];
    let in_force = InForce {
        file: Arc::new(file),
        compiled: Arc::new(Compiled::default()),
        timed: Arc::new(timed),
        remembered: Remembered::default(),
    };
    let mut drops = report::Drops {
        since: now.wall,
        sources: vec![report::Dropped {
            database: Some(database.into()),
            source: Some(source.parse().unwrap()),
            reason: reason.name().into(),
            monitor: false,
            packets: 1,
            first_seen: None,
            last_seen: now.wall,
            opening: None,
            hint: None,
            allow: None,
        }],
        left_out: 0,
        unsampled: Vec::new(),
    };
    add(&mut drops, &in_force, &regions, &ended, now);
    let dropped = drops.sources.remove(0);
    (dropped.hint, dropped.allow)
}

#[test]
fn hints_name_what_is_known_and_the_command_that_helps() {
    use Reason::{BadHeader, Blocked, NotAllowed, NotTls, TlsUnenforced};
    let can_be_allowed = [
        (
            "198.51.100.7",
            "rule 198.51.100.0/24 allowed it until 2025-12-31T00:00:00Z",
        ),
        (
            "7.7.7.7",
            "temporary rule 7.7.7.0/24 (Kim) allowed it until 2025-12-31T23:00:01Z",
        ),
        ("192.0.2.66", "rule 192.0.2.0/24 excepts 192.0.2.66/32"),
        ("9.9.9.9", "region cloud had it until 2025-12-30T00:00:00Z"),
        ("203.0.113.99", "next to 203.0.113.10/32, in the same /24"),
        ("2001:db8::99", "next to 2001:db8::10/128, in the same /64"),
        (
            "100.64.1.1",
            "100.64.0.0/16 of database shop allows it there",
        ),
        (
            "10.1.1.1",
            "regional network of database common allows it there",
        ),
    ];
    for (source, expected) in can_be_allowed {
        let (hint, allow) = hint_of("orders", source, NotAllowed);
        assert_eq!(hint.as_deref(), Some(expected));
        let command = format!("filter-agent allow orders {source} --for 1h");
        assert_eq!(allow, Some(command));
    }
    let (hint, allow) = hint_of("orders", "1.2.3.4", NotAllowed);
    assert_eq!(hint, None);
    assert!(allow.is_some());
    for (database, source, reason, expected) in [
        (
            "orders",
            "203.0.113.10",
            Blocked,
            "blocked by 203.0.113.10/32 until ",
        ),
        ("orders", "203.0.113.10", NotAllowed, "blocked by "),
        (
            "orders",
            "8.8.8.8",
            NotAllowed,
            "allowed by now, by temporary rule 8.8.8.8/32",
        ),
        ("common", "1.2.3.4", NotAllowed, "the database is shared: "),
        (
            "orders",
            "192.0.2.1",
            TlsUnenforced,
            "the source is allowed; the port is closed, since TLS cannot be enforced",
        ),
        (
            "orders",
            "192.0.2.1",
            NotTls,
            "the source is allowed; its client must use TLS (sslmode=require)",
        ),
    ] {
        let (hint, allow) = hint_of(database, source, reason);
        assert!(
            hint.as_ref().is_some_and(|h| h.starts_with(expected)),
            "{hint:?}"
        );
        assert_eq!(allow, None, "{source}");
    }
    assert_eq!(hint_of("orders", "1.2.3.4", BadHeader), (None, None));
    // Of a database that the policy no longer has.
    assert_eq!(hint_of("gone", "1.2.3.4", NotAllowed), (None, None));
}
