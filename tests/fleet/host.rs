//! A database host of the fleet: the real agent with a real etcd.

use std::{fs, net::IpAddr};

use filter_tests::net::{
    ALLOWED4, Connection, DB4, DENIED4, EchoClient, Hammer, NEIGHBOURS, Net, Protected, dedicated,
    policy, wait_until,
};
use serde_json::{Value, json};

use crate::{
    certificates::{Authority, Kind},
    etcd::{Etcd, USER},
};

pub const PORT: u16 = 5432;
const BILLING: u16 = 5433;

/// Sources: of the policy's own rule, and of those of the fleet.
pub const FLOOR: IpAddr = NEIGHBOURS[0];
pub const A: &str = "198.51.100.7/32";
pub const B: &str = "203.0.113.10/32";

/// A host whose policy allows `FLOOR` at two databases, and lets the fleet open both within bounds.
pub fn host(name: &str, etcd: &Etcd) -> Net {
    let net = Net::new(name);
    etcd.attach(&net.db);
    etcd.grant_own(USER, USER);
    net.write_policy(&text(etcd, "within: [198.51.100.0/24, 203.0.113.0/24]"));
    net
}

pub fn text(etcd: &Etcd, bounds: &str) -> String {
    let settings = etcd.settings(&["orders", "billing"]);
    let path = |path: &Option<std::path::PathBuf>| path.as_ref().unwrap().display().to_string();
    let fleet = format!(
        "fleet: {{endpoints: {:?}, ca_file: {}, cert_file: {}, key_file: {}, host: db7}}\nignore_interfaces: [etcd0]\n",
        settings.endpoints,
        path(&settings.ca_file),
        path(&settings.cert_file),
        path(&settings.key_file)
    );
    let floor = format!("{FLOOR}/32");
    let more = format!("fleet: {{widest: [/24, /64], {bounds}}}");
    let databases = [("orders", PORT), ("billing", BILLING)];
    let databases = databases.map(|(name, port)| dedicated(name, port, &[&floor], &more));
    fleet + &policy("eth0", "native", &databases)
}

pub fn document(sources: &[&str]) -> Vec<u8> {
    let rules = sources.iter().map(|source| format!("  - cidr: {source}\n"));
    let rules: String = rules.collect();
    match rules.as_str() {
        "" => b"rules: []\n".to_vec(),
        rules => format!("rules:\n{rules}").into_bytes(),
    }
}

pub fn status(net: &Net, database: &str) -> Value {
    let status = net.agent_json(&["status"]);
    let documents = status["fleet"]["documents"].as_array().unwrap();
    let mut documents = documents.iter();
    let found = documents.find(|document| document["database"] == database);
    found.unwrap().clone()
}

/// Waits until the document of a database in force is of this revision of its key.
pub fn wait_for(net: &Net, etcd: &Etcd, database: &str) {
    let revision = etcd.revision_of(&format!("rules/{database}"));
    let in_force = || status(net, database)["revision"] == json!(revision);
    assert!(wait_until(in_force), "{}", status(net, database));
}

#[track_caller]
fn wait_until_held(net: &Net) {
    let is_held = || status(net, "orders")["state"] == "held";
    assert!(wait_until(is_held), "{}", status(net, "orders"));
}

/// Waits until the agent says that etcd is away for this reason.
#[track_caller]
fn wait_until_lost(net: &Net, why: &str) {
    let lost = || net.agent_json(&["status"])["fleet"]["lost"]["text"].clone();
    let is_so = || lost().as_str().is_some_and(|text| text.contains(why));
    assert!(wait_until(is_so), "{}", lost());
}

/// As after power-on: nothing is in the kernel.
fn reboot(net: &mut Net) {
    net.kill();
    net.watch(&[]);
    fs::remove_dir_all(net.bpffs().join("filter-agent")).unwrap();
    net.assert_detached("eth0");
}

pub fn connects(net: &Net, source: IpAddr, port: u16) -> bool {
    net.connect(source, (DB4, port).into()) == Connection::Accepted
}

#[test]
fn document_is_in_force_and_stays_so_without_etcd_over_a_reboot() {
    let etcd = Etcd::start("fleet-host");
    etcd.grant("db7", "rules/billing");
    etcd.put("rules/orders", &document(&[A]));
    let mut net = host("fleet-db", &etcd);
    let _echo = net.echo(PORT);
    net.start();
    wait_for(&net, &etcd, "orders");
    net.watch(&[Protected::tcp(PORT, &[A, "203.0.113.9/32"])]);
    assert!(connects(&net, DENIED4.into(), PORT) && connects(&net, FLOOR, PORT));
    assert!(!connects(&net, ALLOWED4.into(), PORT));
    let explained = net.agent_json(&["explain", "198.51.100.7", "--database", "orders"]);
    let verdict = &explained["verdicts"][0];
    assert_eq!(verdict["rule"], "fleet rule 198.51.100.7/32");
    assert_eq!(
        verdict["document"]["revision"],
        etcd.revision_of("rules/orders")
    );
    let rules = net.agent_json(&["rules", "--database", "orders"]);
    let rules = rules["rules"].as_array().unwrap();
    assert!(
        rules
            .iter()
            .any(|rule| rule["origin"] == "fleet" && rule["source"] == A)
    );
    let history = net.agent_json(&["history"]);
    assert_eq!(history["changes"][0]["origin"], "fleet");
    net.wait_until_confirmed();
    etcd.kill(0);
    let mut client = EchoClient::open(&net, DENIED4.into(), (DB4, PORT).into());
    net.kill();
    net.start();
    client.assert_alive();
    drop(client);
    reboot(&mut net);
    net.start();
    net.watch(&[Protected::tcp(PORT, &[A, "203.0.113.9/32"])]);
    assert!(connects(&net, DENIED4.into(), PORT) && connects(&net, FLOOR, PORT));
    assert!(!connects(&net, ALLOWED4.into(), PORT));
    wait_until_lost(&net, "refused");
    // Found again by itself, with what changed meanwhile.
    etcd.run(0);
    etcd.wait_until_healthy();
    net.watch(&[Protected::tcp(PORT, &[A, B, "203.0.113.9/32"])]);
    etcd.put("rules/orders", &document(&[A, B]));
    wait_for(&net, &etcd, "orders");
    assert!(connects(&net, ALLOWED4.into(), PORT) && connects(&net, DENIED4.into(), PORT));
    // A source that is taken out loses its connections.
    let mut client = EchoClient::open(&net, DENIED4.into(), (DB4, PORT).into());
    etcd.put("rules/orders", &document(&[B]));
    wait_for(&net, &etcd, "orders");
    client.assert_reset();
    // Nothing is left of it where the policy no longer names a fleet.
    net.watch(&[Protected::tcp(PORT, &["203.0.113.9/32"])]);
    let floor = format!("{FLOOR}/32");
    let databases = [("orders", PORT), ("billing", BILLING)];
    let databases = databases.map(|(name, port)| dedicated(name, port, &[&floor], ""));
    net.reload(&policy("eth0", "native", &databases));
    assert!(!connects(&net, ALLOWED4.into(), PORT));
    assert!(wait_until(|| !net.state_dir().join("fleet.json").exists()));
}

#[test]
fn bad_documents_change_nothing_and_hold_up_no_other() {
    let etcd = Etcd::start("fleet-bad");
    etcd.grant("db7", "rules/billing");
    etcd.put("rules/orders", &document(&[A]));
    let mut net = host("fleet-bad-db", &etcd);
    let _echo = net.echo(PORT);
    net.start();
    wait_for(&net, &etcd, "orders");
    net.watch(&[Protected::tcp(PORT, &[A, "203.0.113.9/32"])]);
    let allowed = Hammer::allowed(
        &net.client,
        &[
            (DENIED4.into(), (DB4, PORT).into()),
            (FLOOR, (DB4, PORT).into()),
        ],
    );
    let denied = Hammer::denied(&net.client, &[(ALLOWED4.into(), (DB4, PORT).into())]);
    let good = status(&net, "orders")["revision"].clone();
    let many: Vec<String> = (0..30)
        .map(|host| format!("198.51.100.{host}/32"))
        .collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let bombs = format!(
        "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nrules: {}",
        "[*c,*c,*c,*c,*c,*c,*c,*c,*c]"
    );
    let before = net.memory().1;
    for (bad, expected) in [
        (b"".to_vec(), "rules"),
        (b"[]".to_vec(), "line 1"),
        (vec![0xff, 0, 1, 2], "UTF-8"),
        (vec![b'#'; 1 << 20], "65536"),
        (document(&["198.51.100.7/24"]), "host bits"),
        (document(&["0.0.0.0/0"]), "wider than /24"),
        (document(&["192.0.2.0/24"]), "192.0.2.0/24"),
        (b"rules: [{region: nowhere}]".to_vec(), "nowhere"),
        (document(&many), "at most 30"),
        (b"rules: []\nallow: all".to_vec(), "allow"),
        (bombs.into_bytes(), "line"),
    ] {
        etcd.put("rules/orders", &bad);
        let is_refused = || {
            let document = status(&net, "orders");
            let error = document["error"].as_str().unwrap_or_default();
            document["state"] == "refused" && error.contains(expected)
        };
        let shown: String = String::from_utf8_lossy(&bad).chars().take(100).collect();
        assert!(
            wait_until(is_refused),
            "{shown}: {}",
            status(&net, "orders")
        );
        assert_eq!(status(&net, "orders")["revision"], good, "{shown}");
        let errors = net.agent_json(&["status"])["errors"].to_string();
        assert!(
            errors.contains("database orders: the document of revision"),
            "{errors}"
        );
    }
    // The other database's changes land all the same.
    etcd.put("rules/billing", &document(&[B]));
    wait_for(&net, &etcd, "billing");
    etcd.control(&["del", "--prefix", "/filter-agent/v1/rules/"]);
    assert!(wait_until(|| status(&net, "orders")["state"] == "missing"));
    assert!(wait_until(|| status(&net, "billing")["state"] == "missing"));
    assert_eq!(status(&net, "orders")["revision"], good);
    assert!(net.memory().1 < before + 8 * 1024, "{before} KiB before");
    // An empty list is how rules are removed.
    assert!(allowed.attempts() > 0 && denied.attempts() > 0);
    allowed.stop();
    denied.stop();
    net.watch(&[Protected::tcp(PORT, &["203.0.113.9/32"])]);
    etcd.put("rules/orders", &document(&[]));
    wait_for(&net, &etcd, "orders");
    assert!(!connects(&net, DENIED4.into(), PORT) && connects(&net, FLOOR, PORT));
}

#[test]
fn etcd_that_was_restored_opens_nothing_until_the_era_is_raised() {
    let etcd = Etcd::start("fleet-back");
    etcd.grant("db7", "rules/billing");
    etcd.put("rules/orders", &document(&[A, B]));
    let mut net = host("fleet-back-db", &etcd);
    let _echo = net.echo(PORT);
    net.start();
    wait_for(&net, &etcd, "orders");
    assert!(connects(&net, ALLOWED4.into(), PORT));
    let snapshot = etcd.snapshot();
    etcd.put("rules/orders", &document(&[A]));
    wait_for(&net, &etcd, "orders");
    net.watch(&[Protected::tcp(PORT, &[A, "203.0.113.9/32"])]);
    assert!(!connects(&net, ALLOWED4.into(), PORT));
    let denied = Hammer::denied(&net.client, &[(ALLOWED4.into(), (DB4, PORT).into())]);
    etcd.restore(&snapshot);
    wait_until_held(&net);
    let errors = net.agent_json(&["status"])["errors"].to_string();
    assert!(errors.contains("etcd went back from revision"), "{errors}");
    // Nor does a restart believe it, or one after a reboot.
    net.kill();
    net.start();
    wait_until_held(&net);
    assert!(denied.attempts() > 0);
    denied.stop();
    net.watch(&[]);
    reboot(&mut net);
    net.start();
    wait_until_held(&net);
    assert!(!connects(&net, ALLOWED4.into(), PORT) && connects(&net, DENIED4.into(), PORT));
    etcd.put("era", b"1");
    wait_for(&net, &etcd, "orders");
    assert!(connects(&net, ALLOWED4.into(), PORT));
    assert_eq!(net.agent_json(&["status"])["errors"], json!([]));
}

/// A thousand changes one after the other: who is allowed by all of them loses no packet, who is allowed by none gets none
/// through, and the last one is in force.
#[test]
fn flapping_document_neither_cuts_off_nor_lets_in_anybody_else() {
    let etcd = Etcd::start("fleet-flapping");
    etcd.grant("db7", "rules/billing");
    let always = format!("{ALLOWED4}/32");
    etcd.put("rules/orders", &document(&[&always]));
    let mut net = host("fleet-flap-db", &etcd);
    let _echo = net.echo(PORT);
    net.start();
    wait_for(&net, &etcd, "orders");
    let [one, other] = ["198.51.100.64/26", "198.51.100.128/25"];
    net.watch(&[Protected::tcp(
        PORT,
        &[&always, one, other, "203.0.113.9/32"],
    )]);
    let allowed = Hammer::allowed(&net.client, &[(ALLOWED4.into(), (DB4, PORT).into())]);
    let denied = Hammer::denied(&net.client, &[(DENIED4.into(), (DB4, PORT).into())]);
    let mut client = EchoClient::open(&net, ALLOWED4.into(), (DB4, PORT).into());
    let texts = (0..1000).map(|round| {
        let second = if round % 2 == 0 { one } else { other };
        String::from_utf8(document(&[&always, second])).unwrap()
    });
    etcd.put_all("rules/orders", texts);
    wait_for(&net, &etcd, "orders");
    let fleet: Vec<Value> = net.agent_json(&["rules"])["rules"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|rule| rule["origin"] == "fleet")
        .map(|rule| rule["source"].clone())
        .collect();
    assert_eq!(fleet, [json!(always), json!(other)]);
    client.assert_alive();
    assert_eq!(net.agent_json(&["status", "--verify"])["errors"], json!([]));
    assert!(allowed.attempts() > 0 && denied.attempts() > 0);
    allowed.stop();
    denied.stop();
    assert!(connects(&net, FLOOR, PORT));
}

/// etcd's rights are no boundary: on 3.4 a host that fills it through its own key may disable them (etcd
/// pull request 22386). What it can do then ends at the bounds of the other hosts' policies.
#[test]
fn host_that_took_over_etcd_opens_nothing_beyond_the_bounds() {
    let etcd = Etcd::with_room("fleet-rogue", 16 << 20);
    etcd.put("rules/orders", &document(&[B]));
    etcd.control(&["user", "add", "db8", "--no-password"]);
    etcd.control(&["role", "add", "db8"]);
    etcd.control(&["user", "grant-role", "db8", "db8"]);
    let own = "/filter-agent/v1/hosts/db8";
    etcd.control(&["role", "grant-permission", "db8", "readwrite", own]);
    let db8 = etcd.authority.sign("db8", &[], Kind::Good);
    let mut net = host("fleet-rogue-db", &etcd);
    net.write_policy(&text(&etcd, "within: [203.0.113.0/24]"));
    let _echo = net.echo(PORT);
    net.start();
    wait_for(&net, &etcd, "orders");
    net.watch(&[Protected::tcp(PORT, &["203.0.113.0/24"])]);
    let allowed = Hammer::allowed(&net.client, &[(FLOOR, (DB4, PORT).into())]);
    let denied = Hammer::denied(&net.client, &[(DENIED4.into(), (DB4, PORT).into())]);
    let orders = "/filter-agent/v1/rules/orders";
    for arguments in [
        &["get", orders][..],
        &["put", orders, "rules: []"],
        &["del", orders],
        &["get", "--prefix", "/filter-agent/"],
        &["put", "/filter-agent/v1/era", "7"],
        &["auth", "disable"],
    ] {
        let (done, text) = etcd.control_as(&db8, arguments, b"");
        assert!(
            !done && text.contains("permission denied"),
            "{arguments:?}: {text}"
        );
    }
    let filling = vec![b'x'; 1_000_000];
    let is_full = (0..40).any(|_| !etcd.control_as(&db8, &["put", own], &filling).0);
    assert!(is_full, "there is room still");
    let (done, text) = etcd.control_as(&db8, &["auth", "disable"], b"");
    assert!(done, "{text}");
    let rogue = |arguments: &[&str], input: &[u8]| {
        let (done, text) = etcd.control_as(&db8, arguments, input);
        assert!(done, "{arguments:?}: {text}");
        text
    };
    rogue(&["del", own], b"");
    let revision = rogue(&["get", own, "--write-out", "json"], b"");
    let revision: Value = serde_json::from_str(&revision).unwrap();
    let revision = revision["header"]["revision"].to_string();
    rogue(&["compact", &revision, "--physical"], b"");
    rogue(&["defrag"], b"");
    rogue(&["alarm", "disarm"], b"");
    rogue(&["put", "/filter-agent/v1/era", "7"], b"");
    for wide in ["0.0.0.0/0", "198.51.100.7/32"] {
        rogue(&["put", orders], &document(&[wide]));
        let is_refused = || {
            let found = status(&net, "orders");
            found["state"] == "refused" && found["error"].as_str().unwrap().contains(wide)
        };
        assert!(wait_until(is_refused), "{}", status(&net, "orders"));
    }
    rogue(&["del", "--prefix", "/filter-agent/"], b"");
    assert!(wait_until(|| {
        // The era is gone as well: it went back.
        status(&net, "orders")["state"] != "refused"
    }));
    assert!(
        connects(&net, ALLOWED4.into(), PORT),
        "the last good document stays"
    );
    assert!(allowed.attempts() > 0 && denied.attempts() > 0);
    allowed.stop();
    denied.stop();
}

/// A rollout on this host, written by an operator whose command is gone since, ends at its time with etcd away.
#[test]
fn rollout_ends_by_itself_without_etcd() {
    let etcd = Etcd::start("fleet-rollout");
    etcd.put("rules/orders", &document(&[A]));
    let mut net = host("fleet-roll-db", &etcd);
    let _echo = net.echo(PORT);
    net.start();
    wait_for(&net, &etcd, "orders");
    let until = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(12);
    let rollout = format!(
        "rules: [{{cidr: {A}}}]\nrollout: {{on: [db7], until: '{until:.0}', rules: [{{cidr: {B}}}]}}"
    );
    etcd.put("rules/orders", rollout.as_bytes());
    wait_for(&net, &etcd, "orders");
    assert!(connects(&net, ALLOWED4.into(), PORT) && !connects(&net, DENIED4.into(), PORT));
    etcd.kill(0);
    // The agent is gone as well when it ends: what was added is over all the same.
    net.kill();
    assert!(wait_until(|| !connects(&net, ALLOWED4.into(), PORT)));
    assert!(jiff::Timestamp::now() + jiff::SignedDuration::from_secs(1) > until);
    net.start();
    net.watch(&[Protected::tcp(PORT, &[A, "203.0.113.9/32"])]);
    assert!(wait_until(|| connects(&net, DENIED4.into(), PORT)));
    assert!(!connects(&net, ALLOWED4.into(), PORT));
    let document = status(&net, "orders");
    assert_eq!(document["rollout"]["in_force"], false, "{document}");
}

/// Its region was not looked up before the policy was in force: the reload took the networks of both files away.
#[test]
fn reload_keeps_what_a_region_has_that_only_a_document_names() {
    let etcd = Etcd::start("fleet-region");
    etcd.put("rules/orders", b"rules: [{region: office}]");
    let mut net = host("fleet-region-db", &etcd);
    let [before, after] = ["before", "after"].map(|name| net.dir().join(name));
    fs::write(&before, format!("{A}\n{B}\n")).unwrap();
    fs::write(&after, format!("{A}\n")).unwrap();
    let text = |file: &std::path::Path| {
        let fleet = text(&etcd, "within: [198.51.100.0/24, 203.0.113.0/24]");
        format!("regions: {{office: {{file: {}}}}}\n{fleet}", file.display())
    };
    net.write_policy(&text(&before));
    let _echo = net.echo(PORT);
    net.start();
    wait_for(&net, &etcd, "orders");
    assert!(wait_until(|| connects(&net, ALLOWED4.into(), PORT)));
    net.reload(&text(&after));
    let history = net.agent_json(&["history"]);
    let changes = history["changes"].as_array().unwrap();
    let reload = changes.iter().find(|change| change["origin"] == "reload");
    let difference = &reload.unwrap()["difference"]["databases"]["orders"];
    assert_eq!(difference["removed"]["first"], json!([B]), "{history}");
    assert!(connects(&net, DENIED4.into(), PORT));
    assert!(!connects(&net, ALLOWED4.into(), PORT));
}

#[test]
fn authority_of_clients_that_expired_takes_no_rule_away_and_is_told() {
    let etcd = Etcd::start("fleet-old-authority");
    etcd.grant(USER, "rules/billing");
    etcd.put("rules/orders", &document(&[A]));
    let mut net = host("fleet-old-db", &etcd);
    let _echo = net.echo(PORT);
    net.start();
    wait_for(&net, &etcd, "orders");
    net.watch(&[Protected::tcp(PORT, &[A, "203.0.113.9/32"])]);
    // etcd knows it besides the other one, and the host's certificate is of it.
    let old = Authority::expired(etcd.directory(), "old");
    let file = etcd.authority.file();
    let both = [&file, &old.file()].map(|file| fs::read_to_string(file).unwrap());
    fs::write(&file, both.concat()).unwrap();
    old.sign(USER, &[], Kind::Good).replace(&etcd.client);
    etcd.kill(0);
    etcd.run(0);
    etcd.wait_until_healthy();
    wait_until_lost(&net, "refuses the certificate in `cert_file`");
    etcd.put("rules/orders", &document(&[A, B]));
    assert!(connects(&net, DENIED4.into(), PORT) && connects(&net, FLOOR, PORT));
    assert!(!connects(&net, ALLOWED4.into(), PORT));
    // Also one that starts then.
    net.kill();
    net.start();
    assert!(connects(&net, DENIED4.into(), PORT) && !connects(&net, ALLOWED4.into(), PORT));
    wait_until_lost(&net, "refuses the certificate in `cert_file`");
    net.watch(&[Protected::tcp(PORT, &[A, B, "203.0.113.9/32"])]);
    // It takes the place of the one before.
    etcd.authority.sign(USER, &[], Kind::Good);
    wait_for(&net, &etcd, "orders");
    assert!(connects(&net, ALLOWED4.into(), PORT));
}
