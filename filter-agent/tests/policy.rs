//! Policy files against what `policy::parse` says of them. Each file ends in the lines it expects,
//! as comments: problems for the bad ones, warnings for the good ones.

use std::{fs, path::PathBuf, time::Duration};

use filter_agent::{
    policy::{
        self, Bounds, Fleet, Guards, Listed, Mode, Model, Problem, RegionSource, Select, Source,
        Tls, Transport,
    },
    policy_file::PolicyFile,
};
use filter_common::{Engine, Protocol};

fn files(folder: &str) -> Vec<(PathBuf, String)> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/policies")
        .join(folder);
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), fs::read_to_string(path).unwrap()))
        .collect();
    files.sort();
    files
}

fn expected(text: &str) -> Vec<&str> {
    text.lines()
        .filter_map(|line| line.strip_prefix("# expect: "))
        .collect()
}

fn lines(problems: &[Problem]) -> Vec<String> {
    problems.iter().map(ToString::to_string).collect()
}

#[test]
fn every_bad_file_gets_exactly_the_lines_it_expects() {
    let files = files("bad");
    assert!(files.len() >= 60, "{} files", files.len());
    let mut wrong = Vec::new();
    for (path, text) in files {
        let problems = match policy::parse(&text) {
            Ok(_) => vec!["is accepted".to_owned()],
            Err(problems) => lines(&problems),
        };
        if expected(&text).is_empty() || problems != expected(&text) {
            wrong.push(format!("{}\n  {}", path.display(), problems.join("\n  ")));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_good_file_is_accepted_with_exactly_the_warnings_it_expects() {
    let files = files("good");
    assert!(files.len() >= 5, "{} files", files.len());
    for (path, text) in files {
        let (_, warnings) = policy::parse(&text)
            .unwrap_or_else(|problems| panic!("{}: {:?}", path.display(), lines(&problems)));
        assert_eq!(lines(&warnings), expected(&text), "{}", path.display());
    }
}

#[test]
fn every_field_of_a_policy_arrives() {
    let files = files("good");
    let (_, text) = files
        .iter()
        .find(|(path, _)| path.ends_with("everything.yaml"))
        .unwrap();
    let (policy, _) = policy::parse(text).unwrap();
    let interfaces: Vec<String> = policy.interfaces.iter().map(ToString::to_string).collect();
    assert_eq!(interfaces, ["eth0", "eth0.100", "ens*", "default"]);
    assert!(matches!(policy.interfaces[2], Listed::Pattern(_)));
    assert_eq!(policy.interfaces[3], Listed::DefaultRoute);
    let ignored = policy.ignored_interfaces.iter().map(ToString::to_string);
    assert_eq!(ignored.collect::<Vec<_>>(), ["veth*", "tun0"]);
    assert_eq!(policy.mode, Mode::Generic);
    assert_eq!(policy.regional_network, ["10.0.0.0/8".parse().unwrap()]);
    let source = |name: &str| &policy.regions[name].source;
    assert!(matches!(source("osc-fr1"), RegionSource::Prefixes(_)));
    let RegionSource::Dns(built_in) = source("osc-secnum-fr1") else {
        panic!("{:?}", source("osc-secnum-fr1"));
    };
    assert_eq!(built_in.names, ["egress.osc-secnum-fr1.scalingo.com"]);
    assert_eq!(
        policy.regions["osc-secnum-fr1"].guards.retire_after,
        Duration::from_hours(2)
    );
    let RegionSource::Url(aws) = source("aws-paris") else {
        panic!("{:?}", source("aws-paris"));
    };
    let expected = Select::Aws {
        region: "eu-west-3".into(),
        service: Some("EC2".into()),
    };
    assert_eq!(aws.select, expected);
    assert!(!aws.insecure && aws.ca_file.is_none());
    let token = std::path::Path::new("/etc/filter-agent/token");
    assert_eq!(aws.headers_file.as_deref(), Some(token));
    let RegionSource::Dns(dns) = source("partner-cloud") else {
        panic!("{:?}", source("partner-cloud"));
    };
    let transport = |server: &policy::Nameserver| (server.address.to_string(), server.port);
    let servers: Vec<_> = dns.nameservers.iter().map(transport).collect();
    let (v4, v6) = ("192.0.2.53".to_owned(), "2001:db8::53".to_owned());
    let expected = [
        (v4.clone(), None),
        (v6.clone(), Some(5353)),
        (v4, None),
        (v6, Some(8443)),
    ];
    assert_eq!(servers, expected);
    assert_eq!(
        dns.nameservers[2].transport,
        Transport::Tls {
            name: "dns.example.net".into()
        }
    );
    assert_eq!(
        dns.nameservers[3].transport,
        Transport::Https {
            name: "2001:db8::53".into(),
            path: "/query".into()
        }
    );
    assert!(dns.dnssec && dns.trust_anchor.is_some() && dns.ca_file.is_some());
    let guards = &policy.regions["partner-cloud"].guards;
    let expected = Guards {
        private: true,
        max_prefixes: 50,
        allow_empty: false,
        shortest: [6, 12],
        max_shrink: 0,
        shrink_after: Duration::from_mins(90),
        retire_after: Duration::ZERO,
        max_age: Some(Duration::from_hours(48)),
        min_refresh: Duration::from_secs(5),
        max_refresh: Duration::from_mins(15),
        timeout: Duration::from_secs(2),
    };
    assert_eq!(*guards, expected);
    let [orders, others, shop, metrics] = policy.databases.as_slice() else {
        panic!("{:?}", policy.databases);
    };
    assert_eq!(
        (orders.name.as_str(), orders.ports.as_slice()),
        ("orders", &[5432][..])
    );
    let [member] = orders.cluster.as_slice() else {
        panic!("{:?}", orders.cluster);
    };
    assert_eq!(member.source, Source::Cidr("10.1.2.3/32".parse().unwrap()));
    assert_eq!(orders.addresses.len(), 2);
    let tls = Tls {
        engine: Engine::Postgresql,
        cancel_in_clear: false,
        open_unenforced: true,
        monitor: false,
        proxied: true,
    };
    assert_eq!((orders.tls, others.tls), (Some(tls), None));
    assert!(!orders.monitor && others.monitor);
    let Model::Dedicated { rules } = &orders.model else {
        panic!("{:?}", orders.model);
    };
    assert_eq!(rules.len(), 6);
    assert_eq!(rules[0].label.as_deref(), Some("office gateway"));
    assert_eq!(
        rules[1].expires,
        Some("2026-12-31T17:00:00Z".parse().unwrap())
    );
    assert_eq!(rules[2].source, Source::Region("osc-fr1".into()));
    assert_eq!(shop.ports, [3306, 33060]);
    assert!(shop.tls.is_none() && shop.model == Model::Shared { internet: false });
    assert_eq!((metrics.protocol, metrics.tls), (Protocol::Udp, None));
    let file = |name: &str| Some(PathBuf::from("/etc/filter-agent").join(name));
    let fleet = Fleet {
        endpoints: [
            "https://10.0.0.11:2379",
            "https://etcd.example.net",
            "https://[2001:db8::11]:2379",
        ]
        .map(str::to_owned)
        .into(),
        ca_file: file("etcd-ca.pem"),
        cert_file: file("etcd-client.pem"),
        key_file: file("etcd-client.key"),
        host: Some("db7".into()),
        frozen: true,
    };
    assert_eq!(policy.fleet.as_deref(), Some(&fleet));
    let bounds = |database: &policy::Database| database.fleet.clone().map(|fleet| fleet.bounds);
    let expected = Bounds {
        widest: [16, 48],
        within: vec![
            "203.0.113.0/24".parse().unwrap(),
            "2001:db8::/32".parse().unwrap(),
        ],
        regions: Some(["office", "osc-fr1"].map(str::to_owned).into()),
    };
    assert_eq!(bounds(others), Some(expected));
    let unless_written = Bounds {
        widest: [8, 16],
        within: Vec::new(),
        regions: None,
    };
    assert_eq!(bounds(metrics), Some(unless_written));
    assert_eq!(bounds(orders), None);
}

#[test]
fn suggested_spelling_of_a_bare_address_is_itself_accepted() {
    let refused = |text| policy::parse_cidr(text).unwrap_err();
    assert!(refused("203.0.113.10").ends_with("write 203.0.113.10/32"));
    assert!(refused("::ffff:192.0.2.1").ends_with("write 192.0.2.1/32"));
    assert!(refused("127.0.0.1").contains("is not a valid source"));
}

#[test]
fn problems_past_fifty_are_counted_only() {
    let mut text = "interfaces: [eth0]\nregional_network:\n".to_owned();
    for _ in 0..60 {
        text.push_str("- 10.0.0.1/8\n");
    }
    let problems = lines(&policy::parse(&text).unwrap_err());
    assert_eq!(problems.len(), 51);
    assert_eq!(problems[0].split(':').next(), Some("line 3"));
    assert_eq!(problems[50], "and 11 more problems");
}

#[test]
fn a_hundred_thousand_prefixes_are_read() {
    let mut text =
        "interfaces: [eth0]\ndatabases: []\nregions:\n  big:\n    prefixes:\n".to_owned();
    for i in 0..100_000 {
        text.push_str(&format!(
            "    - 10.{}.{}.{}/32\n",
            i >> 16,
            i >> 8 & 255,
            i & 255
        ));
    }
    let (policy, _) = policy::parse(&text).unwrap();
    let RegionSource::Prefixes(prefixes) = &policy.regions["big"].source else {
        panic!("{:?}", policy.regions["big"]);
    };
    assert_eq!(prefixes.len(), 100_000);
}

#[test]
fn nesting_and_aliases_without_end_are_refused() {
    let deep = format!("interfaces: {}{}", "[".repeat(10_000), "]".repeat(10_000));
    assert!(policy::parse(&deep).is_err());
    let mut laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
    for i in 1..20 {
        let alias = format!("*a{}", i - 1);
        laughs.push_str(&format!(
            "a{i}: &a{i} [{}]\n",
            [alias.as_str(); 9].join(", ")
        ));
    }
    laughs.push_str("interfaces: [eth0]\ndatabases: []\nregions: {bomb: {prefixes: *a19}}\n");
    assert!(policy::parse(&laughs).is_err());
}

#[test]
fn no_mutation_of_a_policy_makes_the_parser_panic() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as usize
    };
    let files = files("good");
    for _ in 0..3_000 {
        let mut bytes = files[random() % files.len()].1.clone().into_bytes();
        for _ in 0..1 + random() % 4 {
            let place = random() % bytes.len();
            match random() % 4 {
                0 => bytes[place] = (random() % 128) as u8,
                1 => bytes.truncate(place.max(1)),
                2 => bytes.insert(place, b":-[]{}&*!|>'\"%@ \n\t0"[random() % 19]),
                _ => {
                    bytes.remove(place);
                    bytes.push(b'\n');
                }
            }
        }
        let text = String::from_utf8_lossy(&bytes);
        let _ = policy::parse(&text);
    }
}

#[test]
fn policy_without_an_end_is_refused() {
    let error = PolicyFile::read(std::path::Path::new("/dev/zero")).err();
    let error = format!("{:#}", error.expect("a device is no policy"));
    assert!(error.contains("it is longer than"), "{error}");
}

/// The time that such a file took grew with the square of its length, and kept the right file waiting.
#[test]
fn brackets_without_end_are_refused_at_once() {
    for open in ["[", "{a: "] {
        let text = format!("databases:\n{}", open.repeat(200_000));
        let problems = policy::parse(&text).unwrap_err();
        assert_eq!(
            lines(&problems),
            ["line 2: more than 1000 brackets are open"]
        );
    }
}

/// Fault C20: what means never was "no instant".
#[test]
fn last_instants_of_the_year_9999_are_read() {
    for text in ["9999-12-31T23:59:59Z", "9999-12-31T00:00:00z"] {
        let policy = format!(
            "interfaces: [eth0]\ndatabases:\n  - {{name: a, port: 1, model: dedicated, force_tls: false, rules: \
             [{{cidr: 192.0.2.0/24, expires: {text}}}]}}\n"
        );
        let (policy, _) = policy::parse(&policy).unwrap();
        let Model::Dedicated { rules } = &policy.databases[0].model else {
            panic!("{:?}", policy.databases[0].model);
        };
        assert_eq!(rules[0].expires, Some(jiff::Timestamp::MAX));
    }
}
