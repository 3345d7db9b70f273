//! The fields of the JSON against its page.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    process::Command,
};

use filter_agent::report::{TraceLine, Traced};
use filter_tests::net::{
    Connection, DB4, DENIED4, Net, dedicated, policy as policy_text, wait_until,
};
use jiff::Timestamp;
use serde_json::Value;

use crate::{text, tours::Server};

/// Paths of all values in JSON, such as `interfaces[].name`, and those where nothing is: `null`, an empty list or object.
fn paths(value: &Value, path: &str, found: &mut BTreeMap<String, bool>) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (name, value) in fields {
                let dot = if path.is_empty() { "" } else { "." };
                paths(value, &format!("{path}{dot}{name}"), found);
            }
        }
        Value::Array(values) if !values.is_empty() => {
            for value in values {
                paths(value, &format!("{path}[]"), found);
            }
        }
        _ => {
            let is_empty = value.is_null() || value.is_array() || value.is_object();
            *found.entry(path.into()).or_insert(is_empty) &= is_empty;
        }
    }
}

/// Whether a path is a described one, in which `*` stands for any name; if nothing is there, whether it leads to one.
fn is_described_as(path: &str, is_empty: bool, described: &str) -> bool {
    let mut described = described.split('.');
    let mut path = path.split('.').peekable();
    while let Some(part) = path.next() {
        let Some(wanted) = described.next() else {
            return false;
        };
        let leads_there = is_empty && path.peek().is_none() && wanted.starts_with(part);
        if part != wanted && wanted != "*" && !leads_there {
            return false;
        }
    }
    is_empty || described.next().is_none()
}

#[test]
fn every_field_of_the_json_is_described_and_no_other() {
    let mut net = Net::new("docs-json");
    let file = net.dir().join("office.txt");
    fs::write(&file, "192.0.2.0/24\n198.51.100.0/24\n").unwrap();
    let orders = dedicated("orders", 5432, &["203.0.113.10/32"], "");
    let orders = orders.replace("rules: [", "fleet: true, rules: [{region: office}, ");
    let text = policy_text("eth0", "auto", &[orders]);
    let regions = format!("regions: {{office: {{file: {}}}}}\n", file.display());
    let fleet = "fleet: {endpoints: ['http://127.0.0.1:2379'], insecure: true, host: db7}\n";
    net.write_policy(&(regions + fleet + &text));
    net.watch(&[]);
    let data = net.dir().join("etcd");
    let _etcd = Server::start(&net, &format!("\netcd --data-dir {}", data.display()));
    net.start();
    let document = "{rules: [], rollout: {on: [db7], until: 2099-12-31T00:00:00Z, rules: [{cidr: 203.0.113.77/32}]}}";
    let put = ["put", "/filter-agent/v1/rules/orders", document];
    let mut put_document = Command::new("etcdctl");
    put_document.env("ETCDCTL_API", "3").args(put);
    let is_put = || net.db.output(&mut put_document).status.success();
    assert!(wait_until(is_put), "etcd takes no document");
    net.wait_for_line("the fleet's rules changed");
    fs::write(&file, "192.0.2.0/24\n").unwrap();
    net.wait_for_line("region office: 1 removed");
    net.remove_tripwire();
    assert_eq!(
        net.connect(DENIED4.into(), (DB4, 5432).into()),
        Connection::Silence
    );
    let path = net.policy_path();
    let path = path.to_str().unwrap();
    let sections: [(&str, &[&str]); 12] = [
        ("status", &["status"]),
        ("rules", &["rules"]),
        ("regions", &["regions"]),
        ("explain", &["explain", "203.0.113.77"]),
        ("drops", &["drops"]),
        ("plan", &["plan"]),
        (
            "temporary",
            &["allow", "orders", "203.0.113.99", "--for", "1h"],
        ),
        ("refresh", &["refresh", "office"]),
        ("check", &["check", path, "--host"]),
        ("reload", &["reload", "--confirm", "10m"]),
        ("confirm", &["confirm"]),
        ("history", &["history"]),
    ];
    let page = text_of_sections("docs/api.md");
    for (section, arguments) in sections {
        if section == "plan" {
            let wider = fs::read_to_string(path)
                .unwrap()
                .replace("203.0.113.10/32", "203.0.113.0/24");
            net.write_policy(&wider);
        }
        let mut found = BTreeMap::new();
        paths(&net.agent_json(arguments), "", &mut found);
        let described: Vec<&str> = page[section]
            .lines()
            .filter_map(|line| line.strip_prefix("| `")?.split(" |").next())
            .flat_map(|cell| cell.trim_end_matches('`').split("`, `"))
            .collect();
        // What another section describes.
        let is_elsewhere = |path: &str| {
            let other = [
                "regions[]",
                "plan",
                "enforced",
                "verified",
                "window",
                "difference",
                "rule",
                "regions[].change.timing",
            ]
            .into_iter();
            let mut other = other.filter(|other| described.contains(other));
            other.any(|other| {
                path.strip_prefix(other)
                    .is_some_and(|rest| rest.starts_with('.'))
            })
        };
        for (path, is_empty) in &found {
            let is_described = described
                .iter()
                .any(|described| is_described_as(path, *is_empty, described));
            assert!(
                is_described || is_elsewhere(path),
                "{section}: {path} is not described"
            );
        }
        for described in &described {
            let is_found = found.iter().any(|(path, is_empty)| {
                is_described_as(path, *is_empty, described) || is_elsewhere(path)
            });
            assert!(is_found, "{section}: {described} is not in {found:#?}");
        }
    }
}

/// The sections of a page, by their headings.
fn text_of_sections(document: &str) -> BTreeMap<String, String> {
    let text = text(document);
    let sections = text.split("\n## ").skip(1);
    let sections = sections.filter_map(|section| section.split_once('\n'));
    sections
        .map(|(heading, body)| (heading.to_owned(), body.to_owned()))
        .collect()
}

/// Each kind of line that a trace has.
#[test]
fn every_field_of_a_trace_is_described_and_no_other() {
    let at = Timestamp::UNIX_EPOCH;
    let lines = [
        TraceLine::Begun {
            tracing: "203.0.113.0/24".parse().unwrap(),
            database: Some("orders".into()),
            until: at,
        },
        TraceLine::Packet(Box::new(Traced {
            at,
            source: DENIED4.into(),
            interface: Some("eth0".into()),
            at_socket: false,
            protocol: Some("tcp".into()),
            port: Some(5432),
            database: Some("orders".into()),
            rule: Some("203.0.113.0/24".into()),
            reason: Some("not-allowed".into()),
            passed: false,
            text: "text".into(),
        })),
        TraceLine::Lost { lost: 1 },
        TraceLine::Ended {
            ended: "why".into(),
        },
    ];
    let mut found = BTreeMap::new();
    for line in lines {
        let json = serde_json::to_value(&line).unwrap();
        assert_eq!(
            serde_json::from_value::<TraceLine>(json.clone()).unwrap(),
            line
        );
        paths(&json, "", &mut found);
    }
    let page = text_of_sections("docs/api.md");
    let described = page["trace"].lines().filter_map(|line| {
        let cell = line.strip_prefix("| `")?.split(" |").next()?;
        Some(cell.trim_end_matches('`').split("`, `").map(str::to_owned))
    });
    let described: BTreeSet<String> = described.flatten().collect();
    assert_eq!(described, found.into_keys().collect());
}
