//! Regions looked up by HTTPS.

use std::{
    fmt::Write as _,
    fs,
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::Command,
};

use filter_tests::{
    net::{CLIENT4, Net, wait_until},
    servers::{Ca, Certificate, FAULTS, RETRY_AFTER, Resolv, Web},
};
use jiff::{SignedDuration, Timestamp};

use crate::orders::{
    GOOD, GOOD_LIST, PORT, keeps_the_last_good_set, policy, policy_with_rules, prefixes, region,
    wait_for_prefixes, watch_good, who_gets_in,
};

/// Region `x` from `https://lists.test/list`.
fn url(ca: &Path, more: &str) -> String {
    format!(
        "  x: {{url: 'https://lists.test/list', ca_file: {}, {more}}}",
        ca.display()
    )
}

/// A web server at the client's address under the name `lists.test`, which the agent's host knows.
fn web(net: &mut Net) -> (Web, Resolv, std::path::PathBuf) {
    let ca = Ca::new(net.dir());
    let file = ca.file();
    let web = Web::start(&net.client, net.dir(), CLIENT4.into(), ca, "lists.test");
    let hosts = [(CLIENT4.into(), "lists.test")];
    let resolv = Resolv::new(&net.db, CLIENT4.into(), &hosts);
    net.own_resolver = true;
    (web, resolv, file)
}

#[test]
fn every_https_fault_keeps_the_last_good_set() {
    let mut net = Net::new("https-faults");
    let _listener = net.listen(PORT);
    let (mut web, _resolv, ca) = web(&mut net);
    web.put("list", GOOD_LIST);
    web.put("plain", b"198.51.100.0/24\n");
    let guards = "min_refresh: 1h, max_refresh: 1h, retire_after: 0s";
    let with_timeout = |timeout: &str| policy(&url(&ca, &format!("timeout: {timeout}, {guards}")));
    net.write_policy(&with_timeout("1m"));
    watch_good(&net);
    net.start();
    wait_for_prefixes(&net, "x", &GOOD);
    who_gets_in(&net);

    for fault in FAULTS {
        let expected = match fault {
            "500" => "500 Internal Server Error",
            "html" => "the server answers with a web page",
            "to-http" => "it redirects to http://lists.test/plain, which is not encrypted",
            "to-secret" => "it redirects to http://lists.test/plain?..., which is not encrypted",
            "retry-after" => "429 Too Many Requests and asks to wait until ",
            "retry-date" => "503 Service Unavailable and asks to wait until ",
            "rate-limit" => "403 Forbidden and asks to wait until ",
            "loop" => "it redirects more than 5 times",
            "slow" => "not all of it came within 2s",
            "endless" | "bomb" => "the body is longer than",
            "cut" => "fetch https://lists.test/list",
            other => panic!("{other}"),
        };
        web.fault(Some(fault));
        // That answer never ends; the others may take their time.
        let timeout = if fault == "slow" { "2s" } else { "1m" };
        net.reload(&with_timeout(timeout));
        keeps_the_last_good_set(&net, fault, expected);
    }
    web.fault(None);
    for (content, expected) in [
        ("", "no prefix that is selected"),
        (
            "203.0.113.10/32\n<br>\n",
            "line 2: \"<br>\" is not a prefix",
        ),
        (
            "203.0.113.10/32\n203.0.113.200/32\n2001:db8::10/128\n0.0.0.0/0\n",
            "broader than /8",
        ),
    ] {
        web.put("list", content.as_bytes());
        keeps_the_last_good_set(&net, content, expected);
    }
    web.put("list", GOOD_LIST);
    for kind in [Certificate::Expired, Certificate::SelfSigned] {
        web.certify(kind);
        keeps_the_last_good_set(&net, "certificate", "certificate");
    }
    web.stop();
    keeps_the_last_good_set(&net, "no server", "fetch https://lists.test/list");
    web.certify(Certificate::Good);
    assert_eq!(
        net.agent_text(&["refresh", "x"]),
        "x: no change, 3 prefixes\n"
    );
    who_gets_in(&net);
    // The prefixes of the plain list never got in: `who_gets_in` tried.
}

#[test]
fn list_that_did_not_change_is_not_sent_again() {
    let mut net = Net::new("https-304");
    let (web, _resolv, ca) = web(&mut net);
    web.put("list", GOOD_LIST);
    net.write_policy(&policy(&url(&ca, "min_refresh: 1h, max_refresh: 1h")));
    net.start();
    wait_for_prefixes(&net, "x", &GOOD);
    let confirmed = region(&net, "x")["confirmed"].clone();
    net.agent_text(&["refresh"]);
    assert_ne!(region(&net, "x")["confirmed"], confirmed);
    let log = web.log();
    assert_eq!(log.len(), 2, "{log:?}");
    assert!(
        log[0] == "200 /list -" && log[1].starts_with("304 /list "),
        "{log:?}"
    );
    // Nor after a restart.
    assert!(wait_until(|| net
        .state_dir()
        .join("regions/x.json")
        .exists()));
    net.terminate();
    net.start();
    assert!(wait_until(|| web.log().len() == 3));
    assert!(web.log()[2].starts_with("304 /list "), "{:?}", web.log());
    assert_eq!(prefixes(&net, "x"), GOOD);
    // And what did change is.
    web.put("list", &[GOOD_LIST, b"192.0.2.0/24\n"].concat());
    let text = net.agent_text(&["refresh", "x"]);
    assert!(text.contains("+ 192.0.2.0/24"), "{text}");
}

#[test]
fn every_format_is_fetched() {
    let mut net = Net::new("https-formats");
    let (web, _resolv, ca) = web(&mut net);
    let samples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../filter-agent/tests/lists");
    let formats = [
        (
            "aws.json",
            "aws, region: eu-west-3, service: EC2",
            "13.36.0.0/14",
        ),
        ("gcp.json", "gcp, scope: europe-west9", "34.155.0.0/16"),
        (
            "azure.json",
            "azure, tag: AzureCloud.francecentral",
            "4.176.0.0/16",
        ),
        ("cloudflare.json", "cloudflare", "103.21.244.0/22"),
        ("github.json", "github, key: actions", "4.148.0.0/16"),
        (
            "oracle.json",
            "oracle, region: eu-paris-1",
            "129.149.0.0/20",
        ),
        (
            "digitalocean.csv",
            "digitalocean, city: Frankfurt",
            "64.226.64.0/20",
        ),
        ("list.txt", "text", "198.51.100.0/24"),
        ("gcp.json", "json, path: '$..ipv4Prefix'", "34.1.208.0/20"),
    ];
    let mut regions = String::new();
    let mut rules = Vec::new();
    for (number, (file, select, _)) in formats.iter().enumerate() {
        web.put(file, &fs::read(samples.join(file)).unwrap());
        writeln!(
            regions,
            "  r{number}: {{url: 'https://lists.test/{file}', ca_file: {}, select: {{format: \
             {select}}}}}",
            ca.display()
        )
        .unwrap();
        rules.push(format!("{{region: r{number}}}"));
    }
    web.put("list", b"192.0.2.0/24\n");
    writeln!(
        regions,
        "  moved: {{url: 'https://lists.test/to-https', ca_file: {}}}
  plain: {{url: 'http://lists.test/list', insecure: true}}",
        ca.display()
    )
    .unwrap();
    rules.push("{region: moved}, {region: plain}".into());
    net.write_policy(&policy_with_rules(&regions, &rules.join(", ")));
    let checked = net.agent_text(&["check", "--resolve", net.policy_path().to_str().unwrap()]);
    let expected = "\nregion moved (url https://lists.test/to-https): ";
    assert!(checked.contains(expected), "{checked}");
    let path = net.policy_path();
    let json = net.agent_json(&["check", "--resolve", path.to_str().unwrap()]);
    let found = json["regions"].as_array().unwrap();
    assert_eq!(found.len(), formats.len() + 2, "{json}");
    for region in found {
        let prefixes = region["prefixes"].as_array().unwrap();
        assert!(!prefixes.is_empty(), "{json}");
        for prefix in prefixes {
            let line = format!("\n  {}\n", prefix.as_str().unwrap());
            assert!(checked.contains(&line), "{line}: {checked}");
        }
    }
    assert!(!checked.contains("was not looked up"), "{checked}");
    net.start();
    let waited = wait_until(|| {
        let status = net.agent_json(&["status"]);
        status["errors"].as_array().unwrap().is_empty()
    });
    assert!(waited, "{}", net.agent_json(&["status"]));
    for (number, (file, _, first)) in formats.iter().enumerate() {
        let prefixes = prefixes(&net, &format!("r{number}"));
        assert_eq!(prefixes[0], *first, "{file}");
    }
    assert_eq!(prefixes(&net, "moved"), ["192.0.2.0/24"]);
    assert_eq!(prefixes(&net, "plain"), ["192.0.2.0/24"]);
}

#[test]
fn fifty_regions_of_a_thousand_prefixes_stay_within_64_mib() {
    let mut net = Net::new("fifty");
    let (web, _resolv, ca) = web(&mut net);
    let mut regions = String::new();
    let mut rules = vec![Vec::new(); 2];
    for region in 0..50 {
        let mut list = String::new();
        for i in 0..1000 {
            // None next to another: nothing is merged.
            writeln!(list, "51.{region}.{}.{}/32", i / 100, i % 100 * 2).unwrap();
        }
        web.put(&format!("r{region}"), list.as_bytes());
        writeln!(
            regions,
            "  r{region}: {{url: 'https://lists.test/r{region}', ca_file: {}, min_refresh: 1h, \
             max_refresh: 1h}}",
            ca.display()
        )
        .unwrap();
        rules[region % 2].push(format!("{{region: r{region}}}"));
    }
    let text = format!(
        "interfaces: [eth0]\nregions:\n{regions}databases:\n\
         - {{name: a, port: 1, model: dedicated, force_tls: false, rules: [{}]}}\n\
         - {{name: b, port: 2, model: dedicated, force_tls: false, rules: [{}]}}\n",
        rules[0].join(", "),
        rules[1].join(", ")
    );
    net.write_policy(&text);
    net.start();
    let all = || {
        let status = net.agent_json(&["status"]);
        let databases = status["databases"].as_array().unwrap();
        databases
            .iter()
            .all(|database| database["prefixes"] == 25_000)
    };
    assert!(wait_until(all), "{}", net.agent_text(&["status"]));
    for round in 0..3 {
        for region in 0..50 {
            let list = fs::read(net.dir().join(format!("nginx/root/r{region}"))).unwrap();
            let more = format!("52.{region}.{round}.0/24\n");
            web.put(&format!("r{region}"), &[&list, more.as_bytes()].concat());
        }
        net.agent_text(&["refresh"]);
    }
    let (peak, resident) = net.memory();
    println!("peak {peak} KiB, resident {resident} KiB");
    assert!(peak <= 64 << 10, "{peak} KiB");
}

/// A file of headers with a token.
fn headers_file(net: &Net, token: &str) -> PathBuf {
    let file = net.dir().join("headers");
    let next = net.dir().join("headers.next");
    fs::write(&next, format!("# of the mirror\nX-Token: {token}\n")).unwrap();
    fs::set_permissions(&next, fs::Permissions::from_mode(0o600)).unwrap();
    fs::rename(next, &file).unwrap();
    file
}

/// Fault C6: HTTP clients send headers of their user's to whatever host a redirect names, and in `Referer` the query of
/// the URL before.
#[test]
fn headers_go_to_the_origin_of_the_url_only() {
    let mut net = Net::new("https-headers");
    let (web, _resolv, ca) = web(&mut net);
    let headers = headers_file(&net, "s3cret");
    let mut regions = String::new();
    // Redirects to the same origin, to another port, from there back, and to http.
    for (name, path) in [
        ("one", "one"),
        ("two", "to-443/two"),
        ("three", "to-8443/three"),
        ("four", "to-8443/to-443/four"),
        ("five", "to-80/five"),
    ] {
        web.put(name, b"192.0.2.0/24\n");
        writeln!(
            regions,
            "  {name}: {{url: 'https://user:pw@lists.test/{path}?key=s3cret', insecure: true, ca_file: {}, \
             headers_file: {}}}",
            ca.display(),
            headers.display()
        )
        .unwrap();
    }
    let rules = "{region: one}, {region: two}, {region: three}, {region: four}, {region: five}";
    net.write_policy(&policy_with_rules(&regions, rules));
    net.start();
    for name in ["one", "two", "three", "four", "five"] {
        wait_for_prefixes(&net, name, &["192.0.2.0/24"]);
    }
    let with = "token=s3cret auth=Basic dXNlcjpwdw== referer=-";
    let without = "token=- auth=- referer=-";
    let mut expected = [
        format!("443 /one {with}"),
        format!("443 /to-443/two {with}"),
        format!("443 /two {with}"),
        format!("443 /to-8443/three {with}"),
        format!("8443 /three {without}"),
        format!("443 /to-8443/to-443/four {with}"),
        format!("8443 /to-443/four {without}"),
        format!("443 /four {without}"),
        format!("443 /to-80/five {with}"),
        format!("80 /five {without}"),
    ];
    let mut found = web.headers();
    expected.sort();
    found.sort();
    assert_eq!(found, expected);
}

/// Fault C6.
#[test]
fn token_is_read_at_each_look_up_from_a_file_of_root_alone() {
    let mut net = Net::new("https-token");
    let _listener = net.listen(PORT);
    let (web, _resolv, ca) = web(&mut net);
    web.put("list", GOOD_LIST);
    let file = headers_file(&net, "s3cret-1");
    let more = format!(
        "headers_file: {}, min_refresh: 1h, max_refresh: 1h",
        file.display()
    );
    net.write_policy(&policy(&url(&ca, &more)));
    watch_good(&net);
    net.start();
    wait_for_prefixes(&net, "x", &GOOD);
    headers_file(&net, "s3cret-2");
    net.agent_text(&["refresh", "x"]);
    let expected =
        ["s3cret-1", "s3cret-2"].map(|token| format!("443 /list token={token} auth=- referer=-"));
    assert_eq!(web.headers(), expected);

    let check = || {
        let policy = net.policy_path();
        let output = net.agent(&["check", policy.to_str().unwrap()]);
        String::from_utf8(output.stdout).unwrap()
    };
    let refused = "the service could not use ";
    assert!(!check().contains(refused), "{}", check());
    let refuses = |expected: &str| {
        keeps_the_last_good_set(&net, expected, expected);
        let checked = check();
        assert!(
            checked.contains(refused) && checked.contains(expected),
            "{checked}"
        );
    };
    for mode in [0o640, 0o604] {
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
        refuses(&format!("(mode {mode:04o}): chmod 600"));
    }
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    chown(&file, Some(65_534), Some(0)).unwrap();
    refuses("it belongs to user 65534, not to root");
    fs::remove_file(&file).unwrap();
    refuses("No such file");
    // None of these look-ups got as far as the server.
    assert_eq!(web.headers(), expected);
    headers_file(&net, "s3cret-3");
    net.agent_text(&["refresh", "x"]);
    assert!(web.headers()[2].contains("token=s3cret-3"));
}

/// Fault C6.
#[test]
fn secrets_of_a_region_are_shown_nowhere() {
    let mut net = Net::new("https-secrets");
    let (mut web, _resolv, ca) = web(&mut net);
    web.put("list", GOOD_LIST);
    let headers = headers_file(&net, "s3cret");
    let with_url = |url: &str| {
        let (ca, headers) = (ca.display(), headers.display());
        policy(&format!(
            "  x: {{url: '{url}', ca_file: {ca}, headers_file: {headers}, min_refresh: 1h, max_refresh: 1h}}"
        ))
    };
    let text = with_url("https://user:s3cret@lists.test/list?token=s3cret");
    net.write_policy(&text);
    net.start();
    wait_for_prefixes(&net, "x", &GOOD);
    let path = net.policy_path();
    let path = path.to_str().unwrap();
    let shows_none = |net: &Net| {
        let commands: [&[&str]; 8] = [
            &["refresh"],
            &["status"],
            &["regions"],
            &["rules"],
            &["plan"],
            &["reload"],
            &["check", path],
            &["check", path, "--resolve"],
        ];
        for arguments in commands {
            for json in [&[][..], &["--json"]] {
                let output = net.agent(&[arguments, json].concat());
                let shown = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
                assert!(!shown.contains("s3cret"), "{arguments:?}: {shown}");
            }
        }
    };
    shows_none(&net);
    let warning = "region x: others can read what may be a secret in its URL";
    for (mode, is_public) in [(0o644, true), (0o640, false)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        let checked = net.agent_text(&["check", path]);
        assert_eq!(checked.contains(warning), is_public, "{checked}");
    }
    let source = region(&net, "x")["source"].clone();
    assert_eq!(source, "url https://lists.test/list?...");
    for fault in ["500", "html", "to-secret", "loop", "retry-after"] {
        web.fault(Some(fault));
        shows_none(&net);
        assert_eq!(region(&net, "x")["failing"], true, "{fault}");
    }
    web.stop();
    shows_none(&net);
    web.fault(None);
    web.restart();
    for wrong in [
        "http://user:s3cret@lists.test/list?token=s3cret",
        "ftp://user:s3cret@lists.test/list?token=s3cret",
        "https://user:s3cret/@lists.test/list?token=s3cret",
        "https://user:s3cret@nowhere.test/list?token=s3cret",
    ] {
        net.write_policy(&with_url(wrong));
        shows_none(&net);
    }
    // On disk only the policy itself holds it, where root alone reads.
    let kept = net.state_dir().join("regions/x.json");
    assert!(wait_until(|| kept.exists()));
    let kept = fs::read_to_string(kept).unwrap();
    assert!(
        kept.contains("https://lists.test/list?...") && !kept.contains("s3cret"),
        "{kept}"
    );
    for place in ["confirmed.json", "regions/x.json"] {
        let metadata = fs::metadata(net.state_dir().join(place)).unwrap();
        assert_eq!(metadata.permissions().mode() & 0o077, 0, "{place}");
    }
    // The set of another URL that is shown alike is not this one's.
    net.terminate();
    net.write_policy(&text.replace("token=s3cret", "token=s3cret-2"));
    net.start();
    wait_for_prefixes(&net, "x", &GOOD);
    net.terminate();
    let of_another = |line: &String| line.contains("it is of another source");
    assert!(net.log.iter().any(of_another), "{:#?}", net.log);
    for line in &net.log {
        assert!(!line.contains("s3cret"), "{line}");
    }
}

/// A server that returns what it was sent had the token in `status` and in the journal.
#[test]
fn secrets_that_a_server_returns_are_not_shown() {
    let mut net = Net::new("https-echo");
    let (web, _resolv, ca) = web(&mut net);
    web.put("list", GOOD_LIST);
    let headers = headers_file(&net, "s3cret-token");
    let with = |url: &str| {
        let (ca, headers) = (ca.display(), headers.display());
        policy(&format!(
            "  x: {{url: '{url}', ca_file: {ca}, headers_file: {headers}, min_refresh: 1h, max_refresh: 1h}}"
        ))
    };
    net.write_policy(&with("https://lists.test/list"));
    net.start();
    wait_for_prefixes(&net, "x", &GOOD);
    for url in [
        "https://lists.test/echo",
        "https://user:s3cret-password@lists.test/echo",
        "https://lists.test/echo?s3cret-query",
        "https://lists.test/echo?of=s3cret-value",
    ] {
        net.write_policy(&with(url));
        for arguments in [
            &["reload"][..],
            &["check", net.policy_path().to_str().unwrap(), "--resolve"],
        ] {
            let output = net.agent(arguments);
            let shown = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
            assert!(shown.contains("is not a prefix"), "{shown}");
            assert!(
                !shown.contains("s3cret") && !shown.contains("dXNlc"),
                "{shown}"
            );
        }
    }
}

/// Of the members of a gzip file only the first was read, and a small one became a GB of values.
#[test]
fn compressed_list_is_taken_whole_and_within_bounds() {
    let mut net = Net::new("https-gzip");
    let (web, _resolv, ca) = web(&mut net);
    let compress = |text: &str| {
        let plain = net.dir().join("plain");
        fs::write(&plain, text).unwrap();
        let gzip = Command::new("gzip").arg("-c").arg(plain).output().unwrap();
        gzip.stdout
    };
    let members = ["192.0.2.1\n", "192.0.2.3\n"].map(compress).concat();
    web.put("members.gz", &members);
    web.put("garbage.gz", &[members.as_slice(), b"garbage"].concat());
    let entries = "{\"\":0},".repeat(400_000);
    let bomb = format!("{{\"prefixes\":[{entries}{{\"cidr\":\"192.0.2.5\"}}]}}");
    web.put("bomb.gz", &compress(&bomb));
    let region = |name: &str, file: &str, select: &str| {
        format!(
            "  {name}: {{url: 'https://lists.test/{file}.gz', ca_file: {}, min_refresh: 1h, max_refresh: 1h{select}}}\n",
            ca.display()
        )
    };
    let json = ", select: {format: json, path: '$.prefixes[*].cidr'}";
    let mut regions = region("whole", "members", "") + &region("garbage", "garbage", "");
    for number in 0..6 {
        regions += &region(&format!("bomb{number}"), "bomb", json);
    }
    let rules: Vec<String> = [
        "whole", "garbage", "bomb0", "bomb1", "bomb2", "bomb3", "bomb4", "bomb5",
    ]
    .map(|name| format!("{{region: {name}}}"))
    .into();
    net.write_policy(&policy_with_rules(&regions, &rules.join(", ")));
    net.start();
    let status = || net.agent_json(&["status"]);
    let errors = || {
        let errors = status()["errors"].as_array().unwrap().clone();
        errors
            .iter()
            .map(|e| e.as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert!(
        wait_until(|| errors().iter().filter(|e| e.contains("96 MiB")).count() == 6),
        "{:#?}",
        errors()
    );
    assert!(wait_until(|| errors().iter().any(|e| e
        .contains("region garbage ")
        && e.contains("behind its end"))));
    assert_eq!(prefixes(&net, "whole"), ["192.0.2.1/32", "192.0.2.3/32"]);
    let memory = fs::read_to_string(format!("/proc/{}/status", status()["pid"])).unwrap();
    let peak = memory
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak < 320 << 10, "{peak} kB");
}

/// `check --resolve` printed nothing but the error.
#[test]
fn region_that_fails_hides_nothing_else_of_a_check() {
    let mut net = Net::new("https-check");
    let (web, _resolv, ca) = web(&mut net);
    web.put("list", GOOD_LIST);
    let good = url(&ca, "min_refresh: 1h, max_refresh: 1h");
    let bad = "  y: {url: 'https://lists.test/500', ca_file: /nowhere}";
    let unsigned = "  z: {dns: [lists.test], dnssec: require, trust_anchor: /nowhere}";
    let regions = format!("{good}\n{bad}\n{unsigned}");
    let rules = "{region: x}, {region: y}, {region: z}";
    net.write_policy(&policy_with_rules(&regions, rules));
    let path = net.policy_path();
    let path = path.to_str().unwrap();
    let output = net.agent(&["check", path, "--resolve", "--host"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    for expected in [
        "orders    tcp/5432",
        "region x (url https://lists.test/list): 3 prefixes",
        "INTERFACE",
        "error: region y: fetch https://lists.test/500: ",
        // A file that is not there was not warned of.
        "region y: ca_file /nowhere cannot be read: No such file",
        "region z: trust_anchor /nowhere cannot be read: No such file",
        // Once.
        "error: region z: read /nowhere: io error: No such file or directory (os error 2)\n",
    ] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
    assert!(!text.contains("was not looked up"), "{text}");
    let output = net.agent(&["check", path, "--resolve", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let error = json["errors"][0].as_str().unwrap();
    assert!(error.starts_with("region y: "), "{json}");
    assert_eq!(json["regions"][0]["prefixes"].as_array().unwrap().len(), 3);
    // No last good set is spoken of where there is none.
    net.start();
    let output = net.agent(&["refresh", "y"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("; it allows nobody\n"), "{text}");
}

/// Fault C19.
#[test]
fn server_that_asks_to_wait_is_asked_by_hand_only() {
    let mut net = Net::new("https-wait");
    let _listener = net.listen(PORT);
    let (web, _resolv, ca) = web(&mut net);
    web.put("list", GOOD_LIST);
    net.write_policy(&policy(&url(&ca, "min_refresh: 1s, max_refresh: 2s")));
    watch_good(&net);
    net.start();
    wait_for_prefixes(&net, "x", &GOOD);
    for (fault, wait) in RETRY_AFTER {
        web.fault(Some(fault));
        let before = web.log().len();
        keeps_the_last_good_set(&net, fault, "asks to wait until ");
        assert!(web.log().len() > before, "{fault}");
        let next: Timestamp = region(&net, "x")["next"].as_str().unwrap().parse().unwrap();
        // Two of them are dates that were set when the server started.
        let late = next.duration_since(Timestamp::now() + wait).abs();
        assert!(late < SignedDuration::from_mins(5), "{fault}: {next}");
    }
    web.fault(None);
    net.agent_text(&["refresh", "x"]);
    assert_eq!(region(&net, "x")["failing"], false);
    // And from then on as always.
    let before = web.log().len();
    assert!(wait_until(|| web.log().len() > before));
}
