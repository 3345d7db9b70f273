//! The database `orders`, open to region `x`, and who reaches it.

use std::net::{IpAddr, SocketAddr};

use filter_tests::net::{
    ALLOWED4, ALLOWED6, CLIENT4, Connection, DB4, DB6, DENIED4, DENIED6, Net, Protected, wait_until,
};
use serde_json::Value;

pub const PORT: u16 = 5432;
pub const DB: SocketAddr = SocketAddr::new(IpAddr::V4(DB4), PORT);
pub const DB_V6: SocketAddr = SocketAddr::new(IpAddr::V6(DB6), PORT);

/// The addresses that every source gives first: the client's allowed ones, and one of nobody.
pub const GOOD: [&str; 3] = ["203.0.113.10/32", "203.0.113.200/32", "2001:db8::10/128"];
pub const GOOD_RECORDS: &str = "egress 1 A 203.0.113.10\n\
                                egress 1 A 203.0.113.200\n\
                                    egress 1 AAAA 2001:db8::10\n";
pub const GOOD_LIST: &[u8] = b"# egress\n203.0.113.10\n203.0.113.200/32\n2001:db8::10/128\n";

/// The database `orders`, open to region `x`, and `other`, open to nobody.
pub fn policy(regions: &str) -> String {
    policy_with_rules(regions, "{region: x}")
}

pub fn policy_with_rules(regions: &str, rules: &str) -> String {
    format!(
        "interfaces: [eth0]
regions:
{regions}
databases:
  - {{name: orders, port: {PORT}, model: dedicated, force_tls: false, rules: [{rules}]}}
  - {{name: other, port: 6379, model: dedicated, force_tls: false, rules: [{{cidr: 192.0.2.0/24}}]}}
"
    )
}

/// Region `x` by DNS from the server next to the database, which may be slow on a busy machine.
pub fn dns(more: &str) -> String {
    let timeout = if more.contains("timeout:") {
        ""
    } else {
        "timeout: 20s, "
    };
    format!("  x: {{dns: [egress.test], nameservers: [{CLIENT4}], {timeout}{more}}}")
}

pub fn region(net: &Net, name: &str) -> Value {
    let regions = net.agent_json(&["regions"]);
    let regions = regions["regions"].as_array().unwrap();
    regions
        .iter()
        .find(|region| region["name"] == name)
        .unwrap()
        .clone()
}

pub fn prefixes(net: &Net, name: &str) -> Vec<String> {
    let region = region(net, name);
    let prefixes = region["prefixes"].as_array().unwrap();
    prefixes
        .iter()
        .map(|prefix| prefix.as_str().unwrap().to_owned())
        .collect()
}

pub fn wait_for_prefixes(net: &Net, name: &str, expected: &[&str]) {
    let mut found = Vec::new();
    let arrived = wait_until(|| {
        found = prefixes(net, name);
        found == expected
    });
    assert!(
        arrived,
        "region {name} has {found:?}: {}",
        region(net, name)
    );
}

pub fn last_error(net: &Net, name: &str) -> String {
    let region = region(net, name);
    assert_eq!(region["failing"], true, "{region}");
    region["error"]["text"].as_str().unwrap().into()
}

/// `refresh` fails with this, `regions` and `status` name it, and who got in before still does and
/// nobody else.
pub fn keeps_the_last_good_set(net: &Net, fault: &str, expected: &str) {
    let output = net.agent(&["refresh", "x"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{fault}: {text}");
    assert!(text.contains(expected), "{fault}: {text}");
    let error = last_error(net, "x");
    assert!(error.contains(expected), "{fault}: {error}");
    let status = net.agent_text(&["status"]);
    assert!(status.contains("warning: region x: "), "{fault}: {status}");
    assert_eq!(prefixes(net, "x"), GOOD, "{fault}");
    who_gets_in(net);
}

pub fn who_gets_in(net: &Net) {
    use Connection::{Accepted, Silence};
    let attempts = [
        (ALLOWED4.into(), DB),
        (ALLOWED6.into(), DB_V6),
        (DENIED4.into(), DB),
        (DENIED6.into(), DB_V6),
    ];
    let expected = [Accepted, Accepted, Silence, Silence];
    assert_eq!(net.connect_all(&attempts), expected);
}

pub fn watch_good(net: &Net) {
    net.watch(&[Protected::tcp(PORT, &GOOD)]);
}
