//! Regions by DNS from a server that tampers with what it answers.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use filter_tests::{
    net::{ALLOWED4, CLIENT4, Connection, DB4, DENIED4, Net, Protected, wait_until},
    servers::{Dns, Genuine, Resolv, Tamperer},
};
use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata},
};
use serde_json::Value;

const PORT: u16 = 5432;
const DB: SocketAddr = SocketAddr::new(IpAddr::V4(DB4), PORT);
const TAMPERER: &str = "10.0.0.9";

/// `guest` is another customer's name in the same zone.
const ZONE: &str = "egress 60 A 203.0.113.10\n\
                    guest 1 A 198.51.100.7\n\
                    guest-alias 1 CNAME guest\n\
                    alias 60 CNAME middle\n\
                    middle 60 CNAME egress\n\
                    _db._tcp 1 SRV 0 0 5432 guest\n";
const GOOD: &str = "203.0.113.10/32";

struct Fixture {
    net: Net,
    dns: Dns,
    more: String,
}

impl Fixture {
    fn new(name: &str, signed: bool) -> Self {
        let net = Net::new(name);
        net.add_source(TAMPERER.parse().unwrap());
        let start = if signed {
            Dns::start_signed
        } else {
            Dns::start
        };
        let dns = start(&net.client, net.dir(), CLIENT4.into(), "test.");
        dns.set(ZONE);
        let mut more = String::new();
        if signed {
            let anchor = dns.trust_anchor();
            more = format!("dnssec: require, trust_anchor: {}", anchor.display());
        }
        net.watch(&[Protected::tcp(PORT, &[GOOD])]);
        Self { net, dns, more }
    }

    fn tamper(&self, tamper: impl Fn(&Genuine, &mut Message) + Send + 'static) -> Tamperer {
        let address: IpAddr = TAMPERER.parse().unwrap();
        Tamperer::start(
            &self.net.client,
            (address, 53).into(),
            CLIENT4.into(),
            tamper,
        )
    }

    fn policy(&self, name: &str) -> String {
        format!(
            "interfaces: [eth0]
regions:
  x: {{dns: [{name}.test], nameservers: [{TAMPERER}], retire_after: 0s, timeout: 5s, {}}}
databases:
  - {{name: orders, port: {PORT}, model: dedicated, force_tls: false, rules: [{{region: x}}]}}
",
            self.more
        )
    }

    fn region(&self) -> Value {
        let regions = self.net.agent_json(&["regions"]);
        let named = |region: &&Value| region["name"] == "x";
        let regions = regions["regions"].as_array().unwrap();
        regions.iter().find(named).unwrap().clone()
    }

    fn only_the_right_address_gets_in(&self, what: &str) {
        let found = || self.region()["prefixes"] == serde_json::json!([GOOD]);
        assert!(wait_until(found), "{what}: {}", self.region());
        assert_eq!(self.net.connect(DENIED4.into(), DB), Connection::Silence);
        assert_eq!(self.net.connect(ALLOWED4.into(), DB), Connection::Accepted);
    }

    fn refresh_fails(&self, expected: &str) {
        let output = self.net.agent(&["refresh", "x"]);
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(1), "{expected}: {text}");
        assert!(text.contains(expected), "{expected}: {text}");
        self.only_the_right_address_gets_in(expected);
    }
}

/// Adds everything that the zone holds of other names to an answer.
fn add_foreign(genuine: &Genuine, answer: &mut Message, way: usize) {
    let query = &answer.queries[0];
    if !matches!(
        query.query_type(),
        RecordType::A | RecordType::AAAA | RecordType::CNAME
    ) {
        return;
    }
    let mut foreign = Vec::new();
    for (name, kind) in [
        ("guest.test.", RecordType::A),
        ("guest-alias.test.", RecordType::CNAME),
        ("_db._tcp.test.", RecordType::SRV),
    ] {
        foreign.extend(genuine.ask(name, kind).answers);
    }
    match way {
        // Not where there is a proof that there are no records.
        0 if answer.answers.is_empty() => {}
        0 | 5 => answer.answers.extend(foreign),
        1 => {
            foreign.append(&mut answer.answers);
            answer.answers = foreign;
        }
        2 => {
            answer.answers.extend(foreign);
            answer.answers.reverse();
        }
        3 => answer.authorities.extend(foreign),
        _ => answer.additionals.extend(foreign),
    }
}

fn foreign_records_are_ignored(name: &str, signed: bool) {
    let mut fixture = Fixture::new(name, signed);
    let _listener = fixture.net.listen(PORT);
    let way = Arc::new(AtomicUsize::new(0));
    let chosen = way.clone();
    let _tamperer = fixture.tamper(move |genuine, answer| {
        add_foreign(genuine, answer, chosen.load(Ordering::Relaxed));
    });
    fixture.net.write_policy(&fixture.policy("egress"));
    fixture.net.start();
    fixture.only_the_right_address_gets_in("at the start");
    // Not the TTL of a record that was added.
    let region = fixture.region();
    let time =
        |field: &str| -> jiff::Timestamp { region[field].as_str().unwrap().parse().unwrap() };
    let next = time("next").duration_since(time("confirmed"));
    assert!(next.as_secs() > 30, "{region}");
    for asked in ["egress", "alias", "EGRESS"] {
        fixture.net.reload(&fixture.policy(asked));
        for chosen in 0..=5 {
            way.store(chosen, Ordering::Relaxed);
            let text = fixture.net.agent_text(&["refresh", "x"]);
            assert_eq!(text, "x: no change, 1 prefix\n", "{asked}, {chosen}");
            fixture.only_the_right_address_gets_in(&format!("{asked}, {chosen}"));
        }
    }
}

#[test]
fn records_of_other_names_are_ignored() {
    foreign_records_are_ignored("dns-foreign", false);
}

#[test]
fn signed_records_of_other_names_are_ignored() {
    foreign_records_are_ignored("dns-foreign-signed", true);
}

#[test]
fn chain_of_aliases_in_parts_is_followed() {
    for signed in [false, true] {
        let mut fixture = Fixture::new(&format!("dns-parts-{signed}"), signed);
        let _listener = fixture.net.listen(PORT);
        let _tamperer = fixture.tamper(|_, answer| {
            let asked = answer.queries[0].name().clone();
            answer.answers.retain(|record| record.name == asked);
        });
        fixture.net.write_policy(&fixture.policy("alias"));
        fixture.net.start();
        fixture.only_the_right_address_gets_in("in parts");
    }
}

fn name(text: &str) -> Name {
    Name::from_ascii(text).unwrap()
}

#[test]
fn contradictions_keep_the_last_good_set() {
    let mut fixture = Fixture::new("dns-contradictions", false);
    let _listener = fixture.net.listen(PORT);
    let way = Arc::new(AtomicUsize::new(0));
    let chosen = way.clone();
    let _tamperer = fixture.tamper(move |_, answer| {
        let asked = answer.queries[0].name().clone();
        let alias = |owner: &Name, target: &str| {
            Record::from_rdata(owner.clone(), 1, RData::CNAME(rdata::CNAME(name(target))))
        };
        match chosen.load(Ordering::Relaxed) {
            1 => answer.answers.extend([
                alias(&asked, "guest.test."),
                Record::from_rdata(name("guest.test."), 1, RData::A(DENIED4.into())),
            ]),
            2 => {
                answer.answers = vec![
                    alias(&asked, "middle.test."),
                    alias(&asked, "guest-alias.test."),
                ];
            }
            3 => {
                answer.answers = vec![
                    alias(&asked, "middle.test."),
                    alias(&name("middle.test."), "egress.test."),
                    Record::from_rdata(name("guest.test."), 1, RData::A(DENIED4.into())),
                ];
            }
            _ => {}
        }
    });
    fixture.net.write_policy(&fixture.policy("egress"));
    fixture.net.start();
    fixture.only_the_right_address_gets_in("at the start");
    for (chosen, expected) in [
        (1, "egress.test. has an alias and A records"),
        (2, "egress.test. has two aliases"),
        (3, "egress.test. is its own alias"),
    ] {
        way.store(chosen, Ordering::Relaxed);
        fixture.refresh_fails(expected);
    }
}

/// The wildcard's records are validly signed for every name, and must be shown to be of none that
/// exists.
#[test]
fn wildcard_does_not_replace_a_name_that_exists() {
    let mut fixture = Fixture::new("dns-wildcard", true);
    let _listener = fixture.net.listen(PORT);
    fixture.dns.set(&format!(
        "{ZONE}egress.w 60 A 203.0.113.10\n*.w 60 A 198.51.100.7\nchild 60 NS ns.child\n\
         ns.child 60 A 192.0.2.1\n"
    ));
    let way = Arc::new(AtomicUsize::new(0));
    let chosen = way.clone();
    let _tamperer = fixture.tamper(move |genuine, answer| {
        let query = answer.queries[0].clone();
        if chosen.load(Ordering::Relaxed) == 0 || query.query_type() != RecordType::A {
            return;
        }
        answer.answers = genuine.ask("other.w.test.", RecordType::A).answers;
        for record in &mut answer.answers {
            record.name = query.name().clone();
        }
        // From a zone that is not signed.
        let [mname, rname] = ["ns.child.test.", "root.child.test."].map(name);
        let soa = rdata::SOA::new(mname, rname, 1, 60, 60, 600, 1);
        let soa = Record::from_rdata(name("child.test."), 1, RData::SOA(soa));
        answer.authorities = vec![soa];
    });
    fixture.net.write_policy(&fixture.policy("egress.w"));
    fixture.net.start();
    fixture.only_the_right_address_gets_in("at the start");
    way.store(1, Ordering::Relaxed);
    fixture.refresh_fails("not signed");
}

#[test]
fn records_of_one_type_that_fail_do_not_take_the_other_with_them() {
    let mut fixture = Fixture::new("dns-one-type", false);
    let _listener = fixture.net.listen(PORT);
    fixture
        .dns
        .set(&format!("{ZONE}egress 1 AAAA 2001:db8::10\n"));
    const BOTH: [&str; 2] = [GOOD, "2001:db8::10/128"];
    fixture.net.watch(&[Protected::tcp(PORT, &BOTH)]);
    let faults = [
        (ResponseCode::NoError, ""),
        (ResponseCode::NXDomain, "Non-Existent Domain"),
        (ResponseCode::ServFail, "Server Failure"),
        (ResponseCode::Refused, "Query Refused"),
        (ResponseCode::NotImp, "Not Implemented"),
        // No answer at all.
        (ResponseCode::NotAuth, "AAAA records"),
    ];
    let chosen = Arc::new(AtomicUsize::new(0));
    let now = chosen.clone();
    let _tamperer = fixture.tamper(move |_, answer| {
        let (code, _) = faults[now.load(Ordering::Relaxed)];
        if code == ResponseCode::NoError || answer.queries[0].query_type() != RecordType::AAAA {
            return;
        }
        answer.metadata.response_code = code;
        answer.answers.clear();
        if code == ResponseCode::NotAuth {
            answer.queries.clear();
        }
    });
    // Nothing but `refresh` asks.
    fixture.more = "min_refresh: 1h, max_refresh: 1h".into();
    fixture.net.write_policy(&fixture.policy("egress"));
    fixture.net.start();
    let holds = |expected: &[&str]| {
        let region = fixture.region();
        assert_eq!(region["prefixes"], serde_json::json!(expected), "{region}");
    };
    assert!(wait_until(|| fixture.region()["confirmed"] != Value::Null));
    holds(&BOTH);
    for (index, (_, expected)) in faults.iter().enumerate().skip(1) {
        chosen.store(index, Ordering::Relaxed);
        // What is new of the type that answers is followed; the other's last good members stay.
        let moved = format!("203.0.113.{}", 20 + index);
        fixture
            .dns
            .set(&format!("egress 60 A {moved}\negress 60 A 203.0.113.10\n"));
        let output = fixture.net.agent(&["refresh", "x"]);
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(
            text.contains("AAAA records") && text.contains(expected),
            "{text}"
        );
        assert!(!text.contains("look up egress.test: A records"), "{text}");
        let region = fixture.region();
        let prefixes = region["prefixes"].to_string();
        assert!(
            prefixes.contains(&moved) && prefixes.contains("2001:db8::10"),
            "{region}"
        );
    }
    // A start without a last good set.
    fixture.dns.set(ZONE);
    fixture.net.terminate();
    std::fs::remove_dir_all(fixture.net.state_dir()).unwrap();
    fixture.net.start();
    assert!(wait_until(|| fixture.region()["confirmed"] != Value::Null));
    let region = fixture.region();
    assert_eq!(region["prefixes"], serde_json::json!([GOOD]), "{region}");
    assert_eq!(region["failing"], true);
    let status = fixture.net.agent_text(&["status"]);
    assert!(
        status.contains("region x: look up egress.test: AAAA records"),
        "{status}"
    );
    // Who knows that there are none says so.
    fixture.more = "records: [A]".into();
    fixture.net.reload(&fixture.policy("egress"));
    assert_eq!(fixture.region()["failing"], false, "{}", fixture.region());
    fixture.only_the_right_address_gets_in("with A records alone");
}

/// Its addresses were lost without an error.
#[test]
fn name_without_addresses_beside_another_name_keeps_the_last_good_set() {
    let mut fixture = Fixture::new("dns-no-address", false);
    let _tamperer = fixture.tamper(|_, _| {});
    fixture.more = "min_refresh: 1h, max_refresh: 1h".into();
    let policy = fixture.policy("egress.test, guest");
    fixture.net.write_policy(&policy);
    fixture.net.start();
    assert!(wait_until(|| fixture.region()["confirmed"] != Value::Null));
    let before = fixture.region()["prefixes"].clone();
    assert_eq!(before.as_array().unwrap().len(), 2);
    let zone = ZONE.replace("guest 1 A 198.51.100.7", "guest 1 TXT none");
    fixture.dns.set(&zone);
    let output = fixture.net.agent(&["refresh", "x"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("look up guest.test: no addresses"), "{text}");
    assert_eq!(fixture.region()["prefixes"], before, "{}", fixture.region());
}

/// What is kept of all names cannot be told from what another name has.
#[test]
fn type_of_records_that_fails_for_one_name_and_not_for_another_fails_the_look_up() {
    let mut fixture = Fixture::new("dns-two-names", false);
    fixture
        .dns
        .set(&format!("{ZONE}egress 60 AAAA 2001:db8::10\n"));
    let broken = Arc::new(AtomicUsize::new(0));
    let now = broken.clone();
    let _tamperer = fixture.tamper(move |_, answer| {
        let query = &answer.queries[0];
        let is_meant =
            query.name().to_string() == "guest.test." && query.query_type() == RecordType::AAAA;
        if is_meant && now.load(Ordering::Relaxed) == 1 {
            answer.metadata.response_code = ResponseCode::ServFail;
        }
    });
    fixture.more = "min_refresh: 1h, max_refresh: 1h".into();
    fixture
        .net
        .write_policy(&fixture.policy("egress.test, guest"));
    fixture.net.start();
    assert!(wait_until(|| fixture.region()["confirmed"] != Value::Null));
    let before = fixture.region()["prefixes"].clone();
    assert_eq!(before.as_array().unwrap().len(), 3);
    broken.store(1, Ordering::Relaxed);
    fixture
        .dns
        .set(&format!("{ZONE}egress 60 AAAA 2001:db8::11\n"));
    let output = fixture.net.agent(&["refresh", "x"]);
    let text = String::from_utf8(output.stdout).unwrap();
    let names_it = text.contains("look up guest.test: AAAA records: ");
    assert!(names_it && text.contains("Server Failure"), "{text}");
    let region = fixture.region();
    assert_eq!(
        (&region["prefixes"], &region["partial"]),
        (&before, &Value::Bool(false)),
        "{region}"
    );
}

#[test]
fn resolver_configuration_that_a_look_up_does_not_need_is_ignored() {
    let mut fixture = Fixture::new("dns-resolv-conf", false);
    let _listener = fixture.net.listen(PORT);
    // Reached only through its interface.
    let link_local = "fe80::9".parse().unwrap();
    fixture.net.add_source(IpAddr::V6(link_local));
    let address = fixture.net.client.run(|| {
        let interface = nix::net::if_::if_nametoindex("eth0").unwrap();
        SocketAddr::V6(std::net::SocketAddrV6::new(link_local, 53, 0, interface))
    });
    let _tamperer = Tamperer::start(&fixture.net.client, address, CLIENT4.into(), |_, _| {});
    let label = "x".repeat(70);
    let text = format!(
        "domain -bad..domain
search {label}.example.net ex\u{e4}mple..net
sortlist 300.1.2.3/nonsense
options attempts:many ndots:-1 timeout: frobnicate
lookup file bind
nameserver not-an-address
nameserver fe80::1
nameserver fe80::9%eth0
"
    );
    // And a byte that is not UTF-8.
    let text = [&b"; caf\xe9\n"[..], text.as_bytes()].concat();
    let resolv = Resolv::of(&fixture.net.db, &text, &[]);
    fixture.net.own_resolver = true;
    let policy = fixture.policy("egress");
    fixture
        .net
        .write_policy(&policy.replace(&format!("nameservers: [{TAMPERER}], "), ""));
    fixture.net.start();
    fixture.only_the_right_address_gets_in("by the host's own name servers");
    drop(resolv);
    // The same in the policy.
    fixture
        .net
        .reload(&policy.replace(TAMPERER, "'[fe80::9%eth0]:53'"));
    fixture.only_the_right_address_gets_in("by a name server of the policy");
    fixture
        .net
        .write_policy(&policy.replace(TAMPERER, "'fe80::9'"));
    let error = fixture.net.agent_error(&["reload"]);
    let expected = "fe80::9 is link-local: name its interface as well, such as fe80::9%eth0";
    assert!(error.contains(expected), "{error}");
}
