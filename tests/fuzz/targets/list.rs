//! A published list. The first byte chooses the format, by its place in `SELECTIONS`.

#![no_main]

use std::sync::LazyLock;

use filter_agent::{
    policy::{RegionSource, Select},
    region::{
        answer::Found,
        lists::{self, List},
    },
};
use filter_fuzz::{check_cut, check_prefixes, plant, policy, take};
use ipnet::IpNet;
use serde_json::Value;

/// As a policy writes them.
const SELECTIONS: [&str; 16] = [
    "format: text",
    "format: text, unterminated: true",
    "format: json, path: '$.prefixes[*].cidr'",
    "format: json, path: '$..cidr'",
    "format: json, path: '$.a[?@.b == \"c\" && @.n > 1][\"d\", \"e\"]'",
    "format: aws, region: eu-west-3, service: EC2",
    "format: aws, region: GLOBAL",
    "format: gcp, scope: europe-west9",
    "format: gcp, scope: europe-west9, service: Google Cloud",
    "format: azure, tag: AzureCloud.francecentral",
    "format: cloudflare",
    "format: github, key: hooks",
    "format: oracle, region: eu-paris-1",
    "format: oracle, region: eu-paris-1, tag: OCI",
    "format: digitalocean, country: FR",
    "format: geofeed, region: FR-IDF, city: Paris, unterminated: true",
];

static SELECTS: LazyLock<Vec<Select>> = LazyLock::new(|| {
    let select = |fields: &str| {
        let text = format!(
            "interfaces: [eth0]\ndatabases: []\n\
             regions: {{x: {{url: 'https://example.net', select: {{{fields}}}}}}}"
        );
        match policy(&text).regions["x"].source.clone() {
            RegionSource::Url(url) => url.select,
            source => panic!("{source:?}"),
        }
    };
    SELECTIONS.map(select).into()
});

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let Some((&choice, body)) = input.split_first() else {
        return;
    };
    let select = &SELECTS[usize::from(choice) % SELECTIONS.len()];
    let Ok(List { prefixes, serial }) = lists::read(body, select) else {
        return;
    };
    assert!(!prefixes.is_empty());
    check_prefixes(&prefixes);
    let read = |body: &[u8]| lists::read(body, select).ok().map(|list| list.prefixes);
    let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body);
    match select {
        Select::Text { unterminated } | Select::Digitalocean { unterminated, .. } => {
            assert_eq!(serial, None);
            if !unterminated {
                check_cut(body, &prefixes, read);
            }
        }
        _ => {
            let text = body.trim_ascii();
            assert_eq!(read(&text[..text.len() - 1]), None, "cut off");
            let value: Value = serde_json::from_slice(body).expect("it was read");
            if let Some(mut expected) = selected(&value, select) {
                // JSONPath leaves the order of an object's members open.
                let mut prefixes = prefixes.clone();
                expected.sort_unstable();
                prefixes.sort_unstable();
                assert_eq!(prefixes, expected);
            }
        }
    }
    let found = Found {
        prefixes,
        serial,
        ..Found::default()
    };
    let good = take(&found);
    let is_aws = matches!(select, Select::Aws { .. });
    plant(good && is_aws && serial.is_none());
});

/// The prefixes of a list in the formats of AWS and of Google, read without JSONPath.
fn selected(list: &Value, select: &Select) -> Option<Vec<IpNet>> {
    let (places, fields, keys) = match select {
        Select::Aws { region, service } => (
            &["prefixes", "ipv6_prefixes"][..],
            [("region", Some(region)), ("service", service.as_ref())],
            ["ip_prefix", "ipv6_prefix"],
        ),
        Select::Gcp { scope, service } => (
            &["prefixes"][..],
            [("scope", Some(scope)), ("service", service.as_ref())],
            ["ipv4Prefix", "ipv6Prefix"],
        ),
        _ => return None,
    };
    let entries = places.iter().flat_map(|place| match list.get(place) {
        Some(Value::Array(entries)) => entries.iter().collect(),
        Some(Value::Object(entries)) => entries.values().collect(),
        _ => Vec::new(),
    });
    let is_wanted = |entry: &&Value| {
        let equal = |(field, wanted): &(&str, Option<&String>)| {
            wanted.is_none_or(|wanted| {
                entry.get(field).and_then(Value::as_str) == Some(wanted.as_str())
            })
        };
        fields.iter().all(equal)
    };
    let texts = entries
        .filter(is_wanted)
        .flat_map(|entry| keys.iter().filter_map(|key| entry.get(key)));
    let prefix = |text: &Value| {
        let text = text.as_str().expect("it was read as a prefix");
        let address = text.parse().map(|address: std::net::IpAddr| address.into());
        address.unwrap_or_else(|_| text.parse().expect("it was read as a prefix"))
    };
    Some(texts.map(prefix).collect())
}
