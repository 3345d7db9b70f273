//! Answers of name servers, and what is taken of them.

use std::net::Ipv4Addr;

use hickory_resolver::proto::rr::rdata::{A, CNAME};

use super::*;

fn name(text: &str) -> Name {
    Name::from_ascii(text).unwrap()
}

/// Such as `egress.test. A 192.0.2.10`, with a TTL of 60.
fn record(text: &str) -> Record {
    let [owner, kind, data] = text.split(' ').collect::<Vec<_>>()[..] else {
        panic!("{text}");
    };
    let data = match kind {
        "A" => RData::A(A(data.parse().unwrap())),
        _ => RData::CNAME(CNAME(name(data))),
    };
    Record::from_rdata(name(owner), 60, data)
}

/// The addresses found and the last name, or the error.
fn walk(answers: &[Record]) -> Result<(Vec<Ipv4Addr>, String, bool)> {
    let mut walk = Walk::new(name("egress.test."));
    let incomplete = walk.follow(RecordType::A, answers)?;
    let mut addresses: Vec<Ipv4Addr> = walk
        .records
        .iter()
        .filter_map(|record| match record.data {
            RData::A(address) => Some(address.0),
            _ => None,
        })
        .collect();
    addresses.sort();
    Ok((addresses, walk.end().to_ascii(), incomplete))
}

fn walk_of(answers: &[&str]) -> Result<(Vec<Ipv4Addr>, String, bool)> {
    walk(&answers.iter().map(|text| record(text)).collect::<Vec<_>>())
}

#[test]
fn records_of_other_names_are_ignored() {
    for answers in [
        &["egress.test. A 192.0.2.10", "guest.test. A 10.0.0.66"][..],
        &["guest.test. A 10.0.0.66", "EGRESS.Test. A 192.0.2.10"],
        &[
            "egress.test. A 192.0.2.10",
            "guest.test. CNAME evil.test.",
            "evil.test. A 10.0.0.66",
        ],
        &[
            "egress.test. A 192.0.2.10",
            "sub.egress.test. A 10.0.0.66",
            "test. A 10.0.0.66",
        ],
    ] {
        let (addresses, end, incomplete) = walk_of(answers).unwrap();
        assert_eq!(addresses, [Ipv4Addr::new(192, 0, 2, 10)], "{answers:?}");
        assert_eq!((end.as_str(), incomplete), ("egress.test.", false));
    }
    let nothing = (Vec::new(), "egress.test.".into(), false);
    assert_eq!(walk_of(&["guest.test. A 10.0.0.66"]).unwrap(), nothing);
    assert_eq!(walk_of(&[]).unwrap(), nothing);
}

#[test]
fn aliases_are_followed_to_the_end() {
    let chain = [
        "egress.test. CNAME a.test.",
        "A.test. CNAME b.test.",
        "b.TEST. A 192.0.2.10",
    ];
    let found = (vec![Ipv4Addr::new(192, 0, 2, 10)], "b.test.".into(), false);
    assert_eq!(walk_of(&chain).unwrap(), found);
    let (addresses, end, incomplete) = walk_of(&chain[..2]).unwrap();
    assert!(addresses.is_empty() && end == "b.test." && incomplete);
    // The rest, from another answer.
    let mut walk = Walk::new(name("egress.test."));
    assert!(walk.follow(RecordType::A, &[record(chain[0])]).unwrap());
    let rest = [record(chain[1]), record(chain[2])];
    assert!(!walk.follow(RecordType::A, &rest).unwrap());
    assert_eq!(walk.records.len(), 3);
    // The same alias twice is one alias.
    let twice = [chain[0], "EGRESS.test. CNAME A.test.", chain[1], chain[2]];
    assert_eq!(walk_of(&twice).unwrap(), found);
}

#[test]
fn contradictions_loops_and_long_chains_are_errors() {
    for (answers, expected) in [
        (
            &["egress.test. CNAME a.test.", "egress.test. CNAME b.test."][..],
            "egress.test. has two aliases",
        ),
        (
            &["egress.test. CNAME a.test.", "egress.test. A 192.0.2.10"],
            "egress.test. has an alias and A records",
        ),
        (&["egress.test. CNAME Egress.test."], "is its own alias"),
        (
            &["egress.test. CNAME a.test.", "a.test. CNAME egress.test."],
            "egress.test. is its own alias",
        ),
    ] {
        let error = walk_of(answers).unwrap_err().to_string();
        assert!(error.contains(expected), "{answers:?}: {error}");
    }
    let chain = |length: usize| {
        let mut records = vec![record("egress.test. CNAME n0.test.")];
        records.extend((1..length).map(|i| record(&format!("n{}.test. CNAME n{i}.test.", i - 1))));
        records.push(record(&format!("n{}.test. A 192.0.2.10", length - 1)));
        records
    };
    let (addresses, ..) = walk(&chain(MAX_ALIASES)).unwrap();
    assert_eq!(addresses.len(), 1);
    let error = walk(&chain(MAX_ALIASES + 1)).unwrap_err().to_string();
    assert!(error.contains("more than 8 aliases"), "{error}");
    // Across answers too.
    let mut walk = Walk::new(name("egress.test."));
    let answers = chain(MAX_ALIASES + 1);
    let mut results = answers
        .iter()
        .map(|record| walk.follow(RecordType::A, std::slice::from_ref(record)));
    assert!(results.any(|result| result.is_err()));
}

#[test]
fn order_and_foreign_records_make_no_difference() {
    let mut random = fastrand::Rng::with_seed(7);
    for round in 0..2000 {
        let aliases = random.usize(..=MAX_ALIASES);
        let mut owner = String::from("egress.test.");
        let mut answers = Vec::new();
        for i in 0..aliases {
            let target = format!("alias{i}.test.");
            answers.push(record(&format!("{owner} CNAME {target}")));
            owner = target;
        }
        let expected: Vec<Ipv4Addr> = (0..random.u8(..4))
            .map(|i| Ipv4Addr::new(192, 0, 2, i))
            .collect();
        answers.extend(
            expected
                .iter()
                .map(|address| record(&format!("{owner} A {address}"))),
        );
        for i in 0..random.usize(..20) {
            // Their aliases may lead to a name on the way, never from one.
            let target = if random.bool() {
                "egress.test."
            } else {
                "foreign0.test."
            };
            answers.push(record(&match random.u8(..2) {
                0 => format!("foreign{i}.test. A 10.0.0.{i}"),
                _ => format!("foreign{i}.test. CNAME {target}"),
            }));
        }
        random.shuffle(&mut answers);
        let found = walk(&answers).unwrap();
        let incomplete = aliases > 0 && expected.is_empty();
        assert_eq!(
            found,
            (expected, owner, incomplete),
            "round {round}: {answers:?}"
        );

        let kept = owners(&name("egress.test."), &answers);
        let kept: Vec<Record> = answers
            .iter()
            .filter(|r| kept.contains(&r.name))
            .cloned()
            .collect();
        assert_eq!(walk(&kept).unwrap(), found);
        assert!(
            !kept
                .iter()
                .any(|record| record.name.to_ascii().starts_with("foreign"))
        );
    }
}

#[test]
fn ttl_is_that_of_the_records_taken() {
    let mut answers = vec![
        record("egress.test. CNAME a.test."),
        record("a.test. A 192.0.2.10"),
    ];
    let mut foreign = record("guest.test. A 10.0.0.66");
    foreign.ttl = 0;
    answers.push(foreign);
    let mut again = answers[0].clone();
    again.ttl = 7;
    answers.push(again);
    let mut walk = Walk::new(name("egress.test."));
    walk.follow(RecordType::A, &answers).unwrap();
    assert_eq!(walk.records.iter().map(|record| record.ttl).min(), Some(7));
}
