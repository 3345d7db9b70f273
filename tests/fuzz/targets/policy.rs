//! The policy file, and everything that is made of a policy before the kernel gets it.

#![no_main]

use std::{path::Path, sync::LazyLock};

use filter_agent::{
    compile::compile,
    held::Group,
    host::{Interface, coverage::Remembered},
    kernel::{image::Image, probe::probes},
    policy::{self, Model, Policy, Problem, RegionSource, Rule, Source, parse_cidr},
    policy_file::{self, PolicyFile},
    prefixes::Prefixes,
    protection,
    region::state,
    rules,
    temporary::Timed,
};
use filter_common::{MAX_DATABASES, MAX_RULES};
use filter_fuzz::{check_prefixes, clock, now, plant};
use ipnet::IpNet;

/// What every region allows.
static PREFIXES: LazyLock<Vec<IpNet>> = LazyLock::new(|| {
    ["192.0.2.0/24", "198.51.100.7/32", "2001:db8::/32"]
        .map(|text| text.parse().expect("a prefix"))
        .into()
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = policy_file::text(bytes.to_vec()) else {
        assert!(std::str::from_utf8(bytes).is_err());
        return;
    };
    check_as_document(bytes);
    let read = policy::parse(&text);
    check_with_a_line_before(&text, &read);
    let (policy, warnings) = match read {
        Ok(read) => read,
        Err(problems) => {
            assert!(!problems.is_empty());
            check_problems(&text, &problems);
            return;
        }
    };
    check_problems(&text, &warnings);
    check_policy(&policy);
    let file = PolicyFile::parse(Path::new("/etc/filter-agent/policy.yaml"), text);
    assert_eq!(file.map(|file| file.policy).ok().as_ref(), Some(&policy));
    check_compiled(&policy);

    let host = ["eth0", "eth1", "ens5", "veth0"].map(|name| Interface {
        name: name.into(),
        ethernet: true,
        ..Interface::default()
    });
    let nothing = protection::ended(&policy, &policy, &Remembered::default(), &host);
    assert!(nothing.is_empty(), "{nothing:?}");

    let ended = |model: &Model| match model {
        Model::Dedicated { rules } => {
            let ends = |past: bool| {
                let is_past = |rule: &Rule| rule.expires.map(|end| end <= now()) == Some(past);
                rules.iter().any(is_past)
            };
            ends(true) && ends(false)
        }
        Model::Shared { .. } => false,
    };
    plant(
        policy
            .databases
            .iter()
            .any(|database| ended(&database.model)),
    );
});

/// A policy for documents.
static OF_FLEET: LazyLock<Policy> = LazyLock::new(|| {
    let text = "interfaces: [eth0]\nfleet: {endpoints: ['http://127.0.0.1:2379'], insecure: true}\ndatabases:\n- {name: a, \
                port: 1, model: dedicated, force_tls: false, rules: [{cidr: 192.0.2.1/32}], fleet: {within: [192.0.2.0/24, \
                198.51.100.0/25], regions: [osc-fr1]}}";
    policy::parse(text).expect("a policy").0
});

/// The same bytes as a document of the fleet: one short error, or rules within the bounds.
fn check_as_document(bytes: &[u8]) {
    let database = &OF_FLEET.databases[0];
    let document = match policy::parse_document(bytes, database, &OF_FLEET) {
        Ok(document) => document,
        Err(error) => {
            assert!(!error.is_empty() && error.chars().count() <= 3_200);
            assert!(!error.contains(|c: char| c.is_control()));
            return;
        }
    };
    for rule in document.all_rules() {
        match &rule.source {
            Source::Cidr(prefix) => {
                let bounds = &database.fleet.as_ref().expect("bounds").bounds;
                assert!(bounds.within.iter().any(|outer| outer.contains(prefix)));
            }
            Source::Region(name) => assert_eq!(name, "osc-fr1"),
        }
    }
    assert!(document.rules.len() < MAX_RULES);
}

fn check_problems(text: &str, problems: &[Problem]) {
    // As YAML 1.1 has them.
    let breaks = ['\n', '\r', '\u{85}', '\u{2028}', '\u{2029}'];
    let lines = text.split(breaks).count();
    for problem in problems {
        assert!(!problem.message.is_empty());
        // The names of our types are no words of a policy.
        assert!(
            text.contains("Raw") || !problem.message.contains("Raw"),
            "{problem}"
        );
        if let Some(line) = problem.line {
            assert!((1..=lines + 1).contains(&line), "line {line} of {lines}");
        }
    }
}

/// A comment before the first line moves every message by one line, and changes nothing else.
fn check_with_a_line_before(text: &str, before: &Result<(Policy, Vec<Problem>), Vec<Problem>>) {
    // Only at the start of the text is it a byte order mark.
    if text.starts_with('\u{feff}') {
        return;
    }
    let moved_by = |problems: &[Problem], lines: usize| -> Vec<Problem> {
        let moved = problems.iter().map(|problem| Problem {
            line: problem.line.map(|line| line + lines),
            // At the very beginning the YAML crate adds what it was doing there.
            message: problem
                .message
                .split(", while ")
                .next()
                .unwrap_or_default()
                .into(),
            ..problem.clone()
        });
        moved.collect()
    };
    let moved = |problems: &[Problem]| moved_by(problems, 1);
    let as_they_are = |problems: &[Problem]| moved_by(problems, 0);
    let after = policy::parse(&format!("# comment\n{text}"));
    match (before, after) {
        (Ok((policy, warnings)), Ok((same, later))) => {
            assert_eq!(*policy, same);
            assert_eq!(moved(warnings), as_they_are(&later));
        }
        (Err(problems), Err(later)) => assert_eq!(moved(problems), as_they_are(&later)),
        (_, after) => panic!("a comment makes a difference: {after:?}"),
    }
}

fn check_policy(policy: &Policy) {
    assert!(!policy.interfaces.is_empty());
    assert!(policy::differences(policy, policy).is_empty());
    assert!(policy.databases.len() <= MAX_DATABASES);
    check_own_prefixes(&policy.regional_network);
    for region in policy.regions.values() {
        let guards = &region.guards;
        assert!(guards.min_refresh <= guards.max_refresh);
        assert!(guards.max_shrink <= 100 && guards.max_prefixes > 0);
        assert!(!guards.timeout.is_zero() && !guards.min_refresh.is_zero());
        match &region.source {
            RegionSource::Prefixes(prefixes) => check_own_prefixes(prefixes),
            RegionSource::File(path) => assert!(path.is_absolute()),
            RegionSource::Dns(dns) => assert!(!dns.names.is_empty()),
            RegionSource::Url(url) => {
                // Tabs and line ends do not count in a URL.
                let text = url
                    .url
                    .reveal()
                    .as_str()
                    .to_lowercase()
                    .replace(['\t', '\r', '\n'], "");
                assert!(url.insecure || text.trim_start().starts_with("https:"));
            }
        }
        let printed = serde_json::to_string(&region.source);
        assert!(printed.is_ok(), "it is written to the state directory");
    }
    for database in &policy.databases {
        assert!(database.ports.is_sorted_by(|a, b| a < b) && database.ports[0] > 0);
        let members = database.cluster.iter();
        let members = members.filter_map(|member| match &member.source {
            Source::Cidr(prefix) => Some(*prefix),
            Source::Region(_) => None,
        });
        check_own_prefixes(&members.collect::<Vec<_>>());
        if let Model::Dedicated { rules } = &database.model {
            assert!(rules.len() <= MAX_RULES);
        }
    }
}

/// Prefixes of the policy itself.
fn check_own_prefixes(prefixes: &[IpNet]) {
    check_prefixes(prefixes);
    for prefix in prefixes {
        assert_eq!(parse_cidr(&prefix.to_string()), Ok(*prefix));
    }
}

fn check_compiled(policy: &Policy) {
    let used = state::used(policy);
    let regions: rules::Regions = used
        .map(|name| (name.clone(), Prefixes::shared(PREFIXES.as_slice())))
        .collect();
    let timed = Timed::of(policy, clock());
    let compiled = compile(policy, &regions, &timed);
    assert_eq!(compiled.databases.len(), policy.databases.len());
    assert!(compiled.next_end.is_none_or(|end| end > timed.now.boot));
    for entries in compiled.databases.values() {
        for group in Group::ALL {
            let all = entries.lists(group).all();
            assert!(all.is_sorted_by(|(one, _), (other, _)| one < other));
        }
        let rules = entries.rules.len();
        let counted = entries.prefixes_by_rule();
        assert_eq!(counted.len(), rules);
        // A policy has no blocks.
        assert_eq!(counted.iter().sum::<usize>(), entries.prefixes());
    }
    let Ok(image) = Image::of(&compiled, &Image::default()) else {
        panic!("a valid policy does not fit the maps");
    };
    let entries: usize = compiled.databases.values().map(|e| e.prefixes()).sum();
    assert_eq!(image.allowed4.len() + image.allowed6.len(), entries);
    // The same again changes nothing.
    assert_eq!(Image::of(&compiled, &image).ok().as_ref(), Some(&image));
    for probe in probes(&compiled, timed.now.boot, 1) {
        let entries = &compiled.databases[&probe.database];
        let mut lists = entries.lists.iter();
        let matched = lists.any(|(_, list)| list.iter().any(|p| p.contains(&probe.source)));
        assert_eq!(probe.allowed, matched, "{}", probe.source);
    }
}
