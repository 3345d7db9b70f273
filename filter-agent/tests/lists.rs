//! Lists as their publishers write them, and as nobody should: small samples of each format, and a
//! bounded number of mutations of them.

use std::path::Path;

use filter_agent::{
    policy::{self, RegionSource, Select},
    region::lists::{self, List},
    region::state::Set,
    store,
};
use ipnet::IpNet;

fn sample(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lists");
    std::fs::read(folder.join(name)).unwrap()
}

fn select(fields: &str) -> Select {
    let text = format!(
        "interfaces: [eth0]\ndatabases: []\nregions: {{x: {{url: 'https://example.net', select: {{{fields}}}}}}}"
    );
    let (policy, _) = policy::parse(&text).unwrap_or_else(|problems| panic!("{problems:?}"));
    match policy.regions["x"].source.clone() {
        RegionSource::Url(url) => url.select,
        source => panic!("{source:?}"),
    }
}

/// File, selection, what it selects, serial.
const PUBLISHED: [(&str, &str, &[&str], Option<u64>); 16] = [
    (
        "list.txt",
        "format: text",
        &["198.51.100.0/24", "203.0.113.7/32", "2001:db8:1::/48"],
        None,
    ),
    (
        "aws.json",
        "format: aws, region: eu-west-3, service: EC2",
        &["13.36.0.0/14", "15.236.0.0/15", "2a05:d012::/36"],
        Some(1_767_225_600),
    ),
    (
        "aws.json",
        "format: aws, region: GLOBAL",
        &["52.46.0.0/18", "2600:9000::/28"],
        Some(1_767_225_600),
    ),
    (
        "gcp.json",
        "format: gcp, scope: europe-west9",
        &["34.155.0.0/16", "2600:1900:40b0::/44"],
        Some(1_767_225_600_000),
    ),
    (
        "gcp.json",
        "format: gcp, scope: africa-south1, service: Google Cloud",
        &["34.1.208.0/20"],
        Some(1_767_225_600_000),
    ),
    (
        "azure.json",
        "format: azure, tag: AzureCloud.francecentral",
        &["4.176.0.0/16", "20.19.0.0/17", "2603:1020:800::/47"],
        Some(84),
    ),
    (
        "cloudflare.json",
        "format: cloudflare",
        &["173.245.48.0/20", "103.21.244.0/22", "2400:cb00::/32"],
        None,
    ),
    (
        "github.json",
        "format: github, key: hooks",
        &["192.30.252.0/22", "185.199.108.0/22", "2a0a:a440::/29"],
        None,
    ),
    (
        "github.json",
        "format: github, key: actions",
        &[
            "4.148.0.0/16",
            "54.196.81.106/32",
            "2a01:111:f403:c20e::/64",
        ],
        None,
    ),
    (
        "oracle.json",
        "format: oracle, region: eu-paris-1",
        &["129.149.0.0/20", "134.70.224.0/22"],
        None,
    ),
    (
        "oracle.json",
        "format: oracle, region: eu-paris-1, tag: OCI",
        &["129.149.0.0/20"],
        None,
    ),
    (
        "digitalocean.csv",
        "format: digitalocean, city: Frankfurt",
        &["64.226.64.0/20", "2a03:b0c0:3::/48"],
        None,
    ),
    (
        "digitalocean.csv",
        "format: geofeed, country: US, region: US-NY",
        &["104.131.0.0/18"],
        None,
    ),
    (
        "aws.json",
        "format: json, path: \"$.prefixes[?@.region=='eu-west-1'].ip_prefix\"",
        &["3.4.12.4/32"],
        None,
    ),
    (
        "oracle.json",
        "format: json, path: $..cidr",
        &["129.146.0.0/21", "129.149.0.0/20", "134.70.224.0/22"],
        None,
    ),
    (
        "cloudflare.json",
        "format: json, path: '$.result.ipv6_cidrs[*]'",
        &["2400:cb00::/32"],
        None,
    ),
];

#[test]
fn every_published_format_is_read() {
    for (file, fields, expected, serial) in PUBLISHED {
        let mut list = lists::read(&sample(file), &select(fields))
            .unwrap_or_else(|error| panic!("{file}, {fields}: {error:#}"));
        let mut prefixes: Vec<IpNet> = expected.iter().map(|p| p.parse().unwrap()).collect();
        list.prefixes.sort_unstable();
        prefixes.sort_unstable();
        assert_eq!(list, List { prefixes, serial }, "{file}, {fields}");
    }
}

#[test]
fn wrong_lists_are_refused_with_what_is_wrong_and_where() {
    let html = b"<!DOCTYPE html>\n<html><body>Are you human?</body></html>";
    let long = [b"192.0.2.0/24\n".as_slice(), &[b'9'; 100_000], b"\n"].concat();
    let cases: &[(&[u8], &str, &str)] = &[
        (
            html,
            "format: text",
            "line 1: \"<!DOCTYPE html>\" is not a prefix",
        ),
        (
            html,
            "format: aws, region: eu-west-3",
            "it begins with \"<!DOCTYPE html>",
        ),
        (
            html,
            "format: geofeed, country: FR",
            "line 2 has no end as the others have: it was cut off",
        ),
        (
            b"<!DOCTYPE html>\n<html>\n",
            "format: geofeed, country: FR",
            "no prefix that is selected",
        ),
        (b"", "format: text", "no prefix that is selected"),
        (b"", "format: cloudflare", "read JSON"),
        (
            b"192.0.2.0/24\n192.0.2.1/24\n",
            "format: text",
            "line 2: 192.0.2.1/24 has host bits set",
        ),
        (
            b"192.0.2.0/24\n\xff\xfe\n",
            "format: text",
            "line 2: \"\\xff\\xfe\" is not UTF-8 text",
        ),
        (&long, "format: text", "line 2: \"9999"),
        (b"{}", "format: gcp, scope: x", "it has no list `prefixes`"),
        (
            b"[]",
            "format: github, key: hooks",
            "it has no list `hooks`",
        ),
        (
            b"{\"hooks\":[\"192.0.2.0/24\",7]}",
            "format: github, key: hooks",
            "\"7\" is selected",
        ),
        (
            b"{\"hooks\":[{\"a\":1}]}",
            "format: github, key: hooks",
            "\"{\\\"a\\\":1}\" is selected",
        ),
        (
            b"{\"hooks\":[\"::ffff:192.0.2.0/120\"]}",
            "format: github, key: hooks",
            "is IPv4, which arrives as such",
        ),
    ];
    for (body, fields, expected) in cases {
        let error = lists::read(body, &select(fields)).unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains(expected), "{fields}: {error}");
        assert!(error.len() < 300, "{error}");
    }
    // A list whose selection is empty: the region's name is misspelt, or all of it is gone.
    let nothing = lists::read(
        &sample("aws.json"),
        &select("format: aws, region: eu-west-33"),
    );
    assert!(
        nothing
            .unwrap_err()
            .to_string()
            .contains("no prefix that is selected")
    );
}

#[test]
fn selection_cannot_be_escaped_from() {
    for value in [
        "x'] || @.region=='eu-west-3",
        "x\" || @.region==\"eu-west-3",
        "\\\" || true",
    ] {
        let select = Select::Aws {
            region: value.into(),
            service: None,
        };
        assert!(
            lists::read(&sample("aws.json"), &select).is_err(),
            "{value}"
        );
    }
}

#[test]
fn lists_of_windows_editors_are_read() {
    let body = b"\xef\xbb\xbf192.0.2.0/24\r\n2001:db8::/32\r\n";
    assert_eq!(
        lists::read(body, &select("format: text"))
            .unwrap()
            .prefixes
            .len(),
        2
    );
    assert_eq!(lists::read_file(body).unwrap().len(), 2);
}

#[test]
fn own_file_is_spelled_as_the_policy() {
    let error = |body: &[u8]| format!("{:#}", lists::read_file(body).unwrap_err());
    let bare = error(b"# office\n192.0.2.0/24\n203.0.113.7\n");
    assert!(
        bare.contains("line 3") && bare.contains("write 203.0.113.7/32"),
        "{bare}"
    );
    assert_eq!(lists::read_file(b"# nothing yet\n").unwrap(), []);
}

/// Bytes that lists are made of, and some that they are not.
const INSERTED: &[u8] = b"0123456789./:,\"'[]{}#\\\n\r\t \x00\xff\xef\xbb\xbf";

fn mutate(random: &mut fastrand::Rng, samples: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = samples[random.usize(..samples.len())].clone();
    for _ in 0..random.usize(1..6) {
        if bytes.is_empty() {
            break;
        }
        let place = random.usize(..bytes.len());
        let end = random.usize(place..bytes.len());
        match random.u8(..7) {
            0 => bytes[place] = random.u8(..),
            1 => bytes.truncate(place),
            2 => bytes.insert(place, INSERTED[random.usize(..INSERTED.len())]),
            3 => drop(bytes.drain(place..end)),
            4 => {
                let part = bytes[place..end].to_vec();
                bytes.splice(place..place, part);
            }
            5 => {
                let other = &samples[random.usize(..samples.len())];
                let from = random.usize(..other.len());
                bytes.splice(place..end, other[from..].iter().copied());
            }
            _ => {
                let deep = random.usize(1..400);
                bytes.splice(place..place, vec![b"[{\""[random.usize(..3)]; deep]);
            }
        }
    }
    bytes
}

#[test]
fn no_mutation_of_a_list_makes_a_reader_panic_or_gives_what_is_no_prefix() {
    let mut random = fastrand::Rng::with_seed(7);
    let files: Vec<Vec<u8>> = PUBLISHED.iter().map(|(file, ..)| sample(file)).collect();
    let selections: Vec<Select> = PUBLISHED
        .iter()
        .map(|(_, fields, ..)| select(fields))
        .collect();
    let (mut read, mut refused) = (0, 0);
    for _ in 0..20_000 {
        let body = mutate(&mut random, &files);
        let mut results: Vec<_> = (0..3)
            .map(|_| &selections[random.usize(..selections.len())])
            .map(|select| lists::read(&body, select).map(|list| list.prefixes))
            .collect();
        results.push(lists::read_file(&body));
        for result in results {
            match result {
                Ok(prefixes) => {
                    assert!(prefixes.iter().all(|prefix| prefix.trunc() == *prefix));
                    read += 1;
                }
                Err(error) => {
                    assert!(format!("{error:#}").len() < 400, "{error:#}");
                    refused += 1;
                }
            }
        }
    }
    assert!(
        read > 200 && refused > 1_000,
        "{read} read, {refused} refused"
    );
}

fn kept_set() -> (RegionSource, Set) {
    let source = RegionSource::File("/etc/office.txt".into());
    let set = Set {
        members: [
            "192.0.2.0/24".parse().unwrap(),
            "2001:db8::/32".parse().unwrap(),
        ]
        .into(),
        held: Vec::new(),
        retiring: vec![(
            "198.51.100.7/32".parse().unwrap(),
            "2026-01-02T03:04:05Z".parse().unwrap(),
        )],
        confirmed: "2026-01-01T00:00:00Z".parse().unwrap(),
        serial: Some(84),
        version: None,
        shrunk: None,
        incomplete: None,
        merged: Default::default(),
        prefixes: Default::default(),
    };
    (source, set)
}

#[test]
fn kept_set_comes_back_as_it_was() {
    let (source, set) = kept_set();
    let text = store::encode("office", &source, &set).unwrap();
    assert_eq!(store::decode(&text, "office", &source).unwrap(), set);
    let other = store::decode(&text, "osc-fr1", &source)
        .unwrap_err()
        .to_string();
    assert_eq!(other, "it is of region office");
    let elsewhere = RegionSource::File("/etc/other.txt".into());
    let other = store::decode(&text, "office", &elsewhere)
        .unwrap_err()
        .to_string();
    assert!(other.starts_with("it is of another source"), "{other}");
}

/// Fault C6: the URL was kept with its secrets, and the error quoted it.
#[test]
fn kept_set_holds_no_secret_of_its_url_and_is_of_that_url_alone() {
    let source = |url: &str| {
        let text = format!("interfaces: [eth0]\ndatabases: []\nregions: {{x: {{url: '{url}'}}}}\n");
        let (mut policy, _) = policy::parse(&text).unwrap();
        policy.regions.remove("x").unwrap().source
    };
    let (_, set) = kept_set();
    let [plain, first, second] = ["", "?list=s3cret-1", "?list=s3cret-2"]
        .map(|query| source(&format!("https://lists.test/list{query}")));
    let text = store::encode("x", &first, &set).unwrap();
    let shown = String::from_utf8(text.clone()).unwrap();
    assert!(
        shown.contains("https://lists.test/list?...") && !shown.contains("s3cret"),
        "{shown}"
    );
    assert_eq!(store::decode(&text, "x", &first).unwrap(), set);
    for other in [plain, second] {
        let error = store::decode(&text, "x", &other).unwrap_err();
        assert_eq!(format!("{error:#}"), "it is of another source");
    }
}

#[test]
fn no_mutation_of_a_kept_set_is_taken_for_another() {
    let mut random = fastrand::Rng::with_seed(7);
    let (source, set) = kept_set();
    let text = store::encode("office", &source, &set).unwrap();
    for place in 0..text.len() {
        for bit in 0..8 {
            let mut flipped = text.clone();
            flipped[place] ^= 1 << bit;
            if let Ok(decoded) = store::decode(&flipped, "office", &source) {
                assert_eq!(decoded, set, "bit {bit} of byte {place}");
            }
        }
        assert!(store::decode(&text[..place], "office", &source).is_err());
    }
    for _ in 0..20_000 {
        let mutated = mutate(&mut random, std::slice::from_ref(&text));
        if let Ok(decoded) = store::decode(&mutated, "office", &source) {
            assert_eq!(decoded, set);
        }
    }
}

/// Fault C7: cut from 203.0.113.17, it let another host in.
#[test]
fn list_that_ends_within_a_line_is_refused() {
    let body = b"192.0.2.0/24\n203.0.113.1";
    let feed = b"192.0.2.0/24,FR,,,\n203.0.113.1";
    for (body, fields) in [
        (&body[..], "format: text"),
        (feed, "format: geofeed, country: FR"),
    ] {
        let error = format!("{:#}", lists::read(body, &select(fields)).unwrap_err());
        assert!(error.contains("line 2 has no end"), "{error}");
        // Some publishers write it so.
        let fields = format!("{fields}, unterminated: true");
        assert!(lists::read(body, &select(&fields)).is_ok());
    }
    let error = format!("{:#}", lists::read_file(body).unwrap_err());
    assert!(error.contains("line 2 has no end"), "{error}");
    // Of one line nothing can be told.
    assert_eq!(lists::read_file(b"192.0.2.0/24").unwrap().len(), 1);
    // JSON ends where it begins.
    let whole = sample("aws.json");
    let fields = select("format: aws, region: eu-west-3");
    for end in 0..whole.trim_ascii_end().len() {
        assert!(lists::read(&whole[..end], &fields).is_err(), "{end}");
    }
}

/// Fault C8: the rest of the list was a part of the field.
#[test]
fn quote_that_is_not_closed_is_refused_with_its_line() {
    let body = b"192.0.2.0/24,FR,,Paris,\n198.51.100.0/24,FR,,\"Lyon,\n203.0.113.0/24,FR,,Nice,\n";
    let error = lists::read(body, &select("format: geofeed, country: FR")).unwrap_err();
    assert!(format!("{error:#}").contains("line 2: a quote is not closed"));
    let body = b"192.0.2.0/24,US,,\"Washington, DC\",\n";
    let list = lists::read(body, &select("format: geofeed, city: 'Washington, DC'"));
    assert_eq!(list.unwrap().prefixes.len(), 1);
}

/// Fault C9: real geofeeds.
#[test]
fn geofeed_is_right_where_it_is_selected_and_may_be_anything_elsewhere() {
    let body = b"prefix,country,region,city,postal\n   \n# comment\n192.0.2.0/24,fr,,Paris,\n\
        198.51.100.1/24,JP,,\x93\x8c\x8b\x9e,\nno prefix,US,,,\n2001:db8::/32,FR,,,\n";
    let list = lists::read(body, &select("format: geofeed, country: FR")).unwrap();
    assert_eq!(list.prefixes.len(), 2);
    let error = lists::read(body, &select("format: geofeed, country: JP")).unwrap_err();
    let error = format!("{error:#}");
    assert!(
        error.contains("line 5: 198.51.100.1/24 has host bits set"),
        "{error}"
    );
}

/// Fault C11.
#[test]
fn byte_order_mark_is_skipped_and_other_encodings_are_named() {
    let body = [b"\xef\xbb\xbf".as_slice(), &sample("aws.json")].concat();
    lists::read(&body, &select("format: aws, region: eu-west-3")).unwrap();
    let body = b"\xef\xbb\xbf192.0.2.0/24,FR,,,\n";
    lists::read(body, &select("format: geofeed, country: FR")).unwrap();
    for body in [&b"\xff\xfe1\x009\x002\x00"[..], b"\xfe\xff\x001\x009\x002"] {
        let error = lists::read(body, &select("format: text")).unwrap_err();
        assert!(error.to_string().contains("UTF-16"), "{error}");
    }
}

/// Fault C20: as Spamhaus writes its lists.
#[test]
fn semicolon_begins_a_comment() {
    let body = b"; Spamhaus DROP List\n192.0.2.0/24 ; SBL1\n";
    let list = lists::read(body, &select("format: text")).unwrap();
    assert_eq!(list.prefixes.len(), 1);
}

/// Fault C20: half of the list was lost.
#[test]
fn key_that_stands_twice_in_a_json_object_is_refused() {
    let body = b"{\"hooks\":[\"192.0.2.0/24\"],\"hooks\":[\"198.51.100.0/24\"]}";
    let error = lists::read(body, &select("format: github, key: hooks")).unwrap_err();
    let error = format!("{error:#}");
    assert!(error.contains("\"hooks\" stands twice"), "{error}");
}

/// A reader of one line at a time took the first record and lost the others.
#[test]
fn geofeed_whose_lines_end_in_cr_alone_is_read_whole() {
    let body = b"192.0.2.0/24,FR,,,\r198.51.100.0/24,FR,,,\r203.0.113.0/24,US,,,\r";
    let list = lists::read(body, &select("format: geofeed, country: FR")).unwrap();
    assert_eq!(list.prefixes.len(), 2);
}

/// An answer of 23 KB, compressed, took more than a GB: each empty object of the text has a place of its own.
#[test]
fn json_that_would_take_too_much_memory_is_refused() {
    let valid = "{\"ip_prefix\":\"192.0.2.0/24\",\"region\":\"eu-west-3\"}";
    let list = |entries: &str| {
        format!("{{\"prefixes\":[{entries}{valid}],\"ipv6_prefixes\":[]}}").into_bytes()
    };
    let select = select("format: aws, region: eu-west-3");
    for entry in ["{\"\":0},", "[0],", "{\"a\":[{}]},", "0,", "\"\","] {
        let body = list(&entry.repeat((16 << 20) / entry.len() - 100));
        let error = format!("{:#}", lists::read(&body, &select).unwrap_err());
        assert!(
            error.contains("more than 96 MiB of memory"),
            "{entry} {error}"
        );
        assert!(error.contains("use a shorter list"), "{entry} {error}");
    }
    // As many entries as a region may have prefixes, as their publisher writes them.
    let entries: String = (0..100_000)
        .map(|n| {
            format!(
                "{{\"ip_prefix\":\"51.{}.{}.{}/32\",\"region\":\"eu-west-3\",\"service\":\"AMAZON\",\
                 \"network_border_group\":\"eu-west-3\"}},",
                n >> 16,
                n >> 8 & 255,
                n & 255
            )
        })
        .collect();
    let read = lists::read(&list(&entries), &select).unwrap();
    assert_eq!(read.prefixes.len(), 100_001);
    // Each comma of a geofeed takes eight times its memory.
    let feed = format!("192.0.2.0/24,FR{}\n", ",".repeat(8 << 20));
    let feed = lists::read(
        feed.as_bytes(),
        &self::select("format: geofeed, country: FR"),
    );
    assert_eq!(
        feed.unwrap_err().to_string(),
        "line 1 is longer than 65536 bytes"
    );
}

/// What is selected of a list in a publisher's format is there, or the list is damaged: it was taken in part.
#[test]
fn list_whose_selected_part_is_damaged_is_refused() {
    let aws = "format: aws, region: eu-west-3, service: EC2";
    let azure = "format: azure, tag: AzureCloud.francecentral";
    let oracle = "format: oracle, region: eu-paris-1";
    let damages = [
        (
            "aws.json",
            aws,
            "\"ip_prefix\": \"15.236.0.0/15\"",
            "\"x\": 1",
            "`prefixes`, entry 5: it has neither `ip_prefix`",
        ),
        ("aws.json", aws, "\"ipv6_prefix\"", "\"ipv6\"", "neither"),
        ("aws.json", aws, "\"15.236.0.0/15\"", "null", "is selected"),
        ("aws.json", aws, "\"ipv6_prefixes\"", "\"x\"", "no list"),
        (
            "aws.json",
            aws,
            "\"1767225600\"",
            "-1",
            "`syncToken` is not",
        ),
        ("aws.json", aws, "\"1767225600\"", "\"x\"", "`syncToken` is"),
        ("aws.json", aws, "\"1767225600\"", "17.5", "`syncToken` is"),
        (
            "gcp.json",
            "format: gcp, scope: europe-west9",
            "ipv6Prefix",
            "ipv5Prefix",
            "neither `ipv4Prefix`",
        ),
        ("azure.json", azure, "84", "null", "`changeNumber` is not"),
        ("oracle.json", oracle, "\"cidr\"", "\"x\"", "has no `cidr`"),
        ("oracle.json", oracle, "\"cidrs\"", "\"x\"", "list `cidrs`"),
        (
            "oracle.json",
            "format: oracle, region: eu-paris-1, tag: OCI",
            "\"tags\"",
            "\"x\"",
            "no list `tags`",
        ),
        (
            "cloudflare.json",
            "format: cloudflare",
            "true",
            "false",
            "`success`",
        ),
        (
            "cloudflare.json",
            "format: cloudflare",
            "[\"2400:cb00::/32\"]",
            "null",
            "no list `ipv6_cidrs`",
        ),
    ];
    for (file, fields, from, to, expected) in damages {
        let whole = String::from_utf8(sample(file)).unwrap();
        lists::read(whole.as_bytes(), &select(fields)).unwrap();
        let damaged = whole.replace(from, to);
        assert_ne!(damaged, whole, "{from}");
        let error = lists::read(damaged.as_bytes(), &select(fields)).unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains(expected), "{file}: {from} -> {to}: {error}");
    }
    let object = b"{\"hooks\":{\"a\":\"192.0.2.0/24\"}}";
    let error = lists::read(object, &select("format: github, key: hooks")).unwrap_err();
    assert_eq!(error.to_string(), "it has no list `hooks`");
    // A second value of the same tag.
    let twice = b"{\"values\":[\
        {\"name\":\"a\",\"properties\":{\"addressPrefixes\":[\"192.0.2.0/24\"]}},\
        {\"name\":\"a\",\"properties\":{\"addressPrefixes\":\"198.51.100.0/24\"}}]}";
    let error = lists::read(twice, &select("format: azure, tag: a")).unwrap_err();
    let expected = "`values`, entry 2: it has no list `addressPrefixes`";
    assert_eq!(format!("{error:#}"), expected);
}
