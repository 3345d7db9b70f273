//! `filter-agent fleet`, as an operator with a certificate types it.

use std::{
    fs,
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
};

use filter_tests::net::{agent_binary, run_in, wait_until};
use nix::sys::signal::Signal;

use crate::{
    certificates::Kind,
    etcd::{Etcd, USER},
    host::host,
};

/// An operator beside etcd, who may read and write all that is the fleet's.
pub struct Operator<'a> {
    etcd: &'a Etcd,
    place: PathBuf,
}

impl<'a> Operator<'a> {
    pub fn new(etcd: &'a Etcd) -> Self {
        etcd.control(&["user", "add", "kim", "--no-password"]);
        etcd.control(&["role", "add", "operators"]);
        etcd.control(&["user", "grant-role", "kim", "operators"]);
        let all = [
            "grant-permission",
            "operators",
            "readwrite",
            "/filter-agent/",
        ];
        etcd.control(&[&["role"], &all[..], &["--prefix"]].concat());
        Self::with_certificate_of(etcd, "kim")
    }

    fn with_certificate_of(etcd: &'a Etcd, user: &str) -> Self {
        let pair = etcd.authority.sign(user, &[], Kind::Good);
        let settings = etcd.settings(&[]);
        let place = etcd.directory().join(format!("{user}.yaml"));
        let text = format!(
            "fleet:\n  endpoints: {:?}\n  ca_file: {}\n  cert_file: {}\n  key_file: {}\n",
            settings.endpoints,
            etcd.authority.file().display(),
            pair.certificate.display(),
            pair.key.display()
        );
        fs::write(&place, text).unwrap();
        Self { etcd, place }
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(agent_binary());
        command.arg("fleet").args(arguments);
        command.arg("--fleet").arg(&self.place);
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Output {
        self.etcd.host.output(&mut self.command(arguments))
    }

    #[track_caller]
    pub fn says(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// The one line of a command that fails.
    #[track_caller]
    pub fn fails(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {error}");
        assert_eq!(error.trim_end().lines().count(), 1, "{error}");
        error
    }

    pub fn file(&self, text: &str) -> String {
        let path = self.etcd.directory().join("document.yaml");
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

/// All at the same time, on the host.
fn spawn(etcd: &Etcd, mut commands: Vec<Command>) -> Vec<Child> {
    let spawn = |command: &mut Command| {
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().unwrap()
    };
    run_in(&etcd.host.name, move || {
        commands.iter_mut().map(spawn).collect()
    })
}

#[test]
fn document_is_written_read_changed_and_never_overwritten_unseen() {
    let etcd = Etcd::start("fleet-commands");
    let kim = Operator::new(&etcd);
    let missing = kim.fails(&["get", "orders"]);
    assert!(
        missing.contains("etcd has no document of orders"),
        "{missing}"
    );
    let office = kim.file("# the office\nrules:\n- {cidr: 203.0.113.0/24, label: office}\n");
    assert_eq!(
        kim.says(&["diff", "orders", &office]),
        "+ 203.0.113.0/24 \"office\"\n"
    );
    kim.says(&["put", "orders", &office]);
    let first = etcd.revision_of("rules/orders");
    let got = kim.says(&["get", "orders"]);
    assert_eq!(
        got,
        format!(
            "# revision {first}\n{}",
            fs::read_to_string(&office).unwrap()
        )
    );
    assert!(
        kim.says(&["put", "orders", &office])
            .starts_with("no difference")
    );
    assert_eq!(etcd.revision_of("rules/orders"), first);
    let said = kim.says(&[
        "allow",
        "orders",
        "198.51.100.7",
        "--for",
        "2h",
        "--label",
        "kim",
    ]);
    assert!(
        said.starts_with("+ 198.51.100.7/32 \"kim\", until "),
        "{said}"
    );
    let older = kim.says(&["get", "orders", "--revision", &first.to_string()]);
    assert_eq!(older, got);
    let future = kim.fails(&["get", "orders", "--revision", "999"]);
    let latest = etcd.revision_of("rules/orders");
    assert!(
        future.contains(&format!("; its latest one is of {latest}")),
        "{future}"
    );
    let old = kim.fails(&[
        "put",
        "orders",
        &office,
        "--if-revision",
        &first.to_string(),
    ]);
    assert!(
        old.contains(&format!("not the one of revision {first}")),
        "{old}"
    );
    let half = kim.file("rules:\n- {cidr: 192.0.2.0/24}\n");
    let refused = kim.fails(&["put", "orders", &half]);
    assert!(refused.contains("2 rules of 2 would go"), "{refused}");
    kim.says(&["revoke", "orders", "198.51.100.7"]);
    let none = kim.fails(&["revoke", "orders", "198.51.100.7"]);
    assert!(none.contains("it has no rule of 198.51.100.7/32"), "{none}");
    kim.says(&["put", "orders", &half, "--yes"]);
    assert!(
        kim.says(&["get", "orders"])
            .ends_with("rules:\n- {cidr: 192.0.2.0/24}\n")
    );
    for (text, expected) in [
        ("rules: [{cidr: 192.0.2.1/24}]", "host bits"),
        ("", "it is empty"),
        ("rules: {}", "line 1"),
    ] {
        let error = kim.fails(&["put", "orders", &kim.file(text)]);
        assert!(error.contains(expected), "{error}");
    }
    assert!(kim.fails(&["get", "../era"]).contains("a name has"));
    let wrong = kim.run(&["put", "orders"]);
    assert_eq!(wrong.status.code(), Some(2));
}

#[test]
fn rollout_is_begun_promoted_and_aborted() {
    let etcd = Etcd::start("fleet-rollouts");
    let kim = Operator::new(&etcd);
    etcd.put("rules/orders", b"rules: [{cidr: 192.0.2.0/24}]");
    let file = kim.file("rules: [{cidr: 203.0.113.0/24}]");
    let rollout = [
        "rollout", "orders", &file, "--on", "db7,db8", "--for", "10m",
    ];
    let nobody = kim.fails(&rollout);
    assert!(
        nobody.contains("no host db7, db8 has reported the database orders"),
        "{nobody}"
    );
    let said = kim.says(&[&rollout[..], &["--yes"]].concat());
    assert!(said.contains("rolled out to db7, db8 until "), "{said}");
    let document = kim.says(&["get", "orders"]);
    assert!(
        document.contains("rollout:") && document.contains("192.0.2.0/24"),
        "{document}"
    );
    let listed = kim.run(&["status", "orders"]);
    let listed = String::from_utf8(listed.stdout).unwrap();
    assert!(
        listed.contains("orders: rollout on db7, db8 until "),
        "{listed}"
    );
    kim.says(&["abort", "orders"]);
    let document = kim.says(&["get", "orders"]);
    assert!(!document.contains("203.0.113.0/24"), "{document}");
    assert!(
        kim.fails(&["promote", "orders"])
            .contains("it has no rollout")
    );
    let gone = kim.fails(&["promote", "billing"]);
    assert!(gone.contains("there is no document; nothing"), "{gone}");
    kim.says(&["rollout", "orders", &file, "--on", "db7", "--yes"]);
    let said = kim.says(&["promote", "orders"]);
    assert!(
        said.starts_with("- 192.0.2.0/24\n+ 203.0.113.0/24\nthe document"),
        "{said}"
    );
    let no_host = kim.fails(&["rollout", "orders", &file, "--on", "a/b"]);
    assert!(no_host.contains("not a valid name of a host"), "{no_host}");
    assert_eq!(
        kim.run(&["rollout", "orders", &file]).status.code(),
        Some(2)
    );
}

#[test]
fn what_is_written_is_waited_for_and_who_is_silent_is_told() {
    let etcd = Etcd::start("fleet-waiting");
    etcd.grant(USER, "rules/billing");
    let kim = Operator::new(&etcd);
    let mut net = host("fleet-waiting-db", &etcd);
    net.start();
    let file = kim.file("rules: [{cidr: 198.51.100.7/32}]");
    let said = kim.says(&["put", "orders", &file, "--wait", "30s"]);
    let row = said.lines().find(|line| line.starts_with("orders"));
    let row: Vec<&str> = row.unwrap().split_whitespace().collect();
    let revision = etcd.revision_of("rules/orders").to_string();
    assert_eq!(
        row[1..6],
        [revision.as_str(), "ACTIVE", "1", "1", "0"],
        "{said}"
    );
    assert!(said.contains("warning: etcd 3.4."), "{said}");
    // Wider than the host lets the fleet open.
    let wide = kim.file("rules: [{cidr: 198.51.100.7/32}, {cidr: 198.51.0.0/16}]");
    let refused = kim.fails(&["put", "orders", &wide]);
    assert!(refused.contains("db7 would refuse it: line 1"), "{refused}");
    assert!(refused.contains("nothing is written"), "{refused}");
    assert_eq!(etcd.revision_of("rules/orders").to_string(), revision);
    assert_eq!(kim.run(&["diff", "orders", &wide]).status.code(), Some(1));
    let output = kim.run(&["put", "orders", &wide, "--yes", "--wait", "30s"]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("FAILED") && said.contains("orders on db7: "),
        "{said}"
    );
    let file = kim.file("rules: [{cidr: 198.51.100.7/32}]");
    kim.says(&["put", "orders", &file, "--yes", "--wait", "30s"]);
    let present = kim.fails(&["forget", "db7"]);
    assert!(present.contains("db7 is there"), "{present}");
    // Its lease ends with it; not waited for here.
    net.kill();
    let alive = etcd.control(&["get", "/filter-agent/v1/alive/db7", "--write-out", "json"]);
    let alive: serde_json::Value = serde_json::from_str(&alive).unwrap();
    let lease = alive["kvs"][0]["lease"].as_i64().unwrap();
    etcd.control(&["lease", "revoke", &format!("{lease:x}")]);
    let output = kim.run(&[
        "put",
        "orders",
        &kim.file("rules: [{cidr: 198.51.100.0/26}]"),
        "--yes",
        "--wait",
        "1s",
    ]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains("orders: silent: db7"), "{said}");
    let said = kim.says(&["forget", "db7"]);
    assert!(
        said.starts_with("db7, which reported itself last at "),
        "{said}"
    );
    assert!(kim.fails(&["forget", "db7"]).contains("knows no host db7"));
}

#[test]
fn what_speaks_against_a_change_is_told_before_it_is_written() {
    let etcd = Etcd::start("fleet-doubts");
    etcd.grant(USER, "rules/billing");
    let kim = Operator::new(&etcd);
    let mut net = host("fleet-doubts-db", &etcd);
    net.start();
    let file = kim.file("rules: [{cidr: 198.51.100.7/32}]");
    kim.says(&["put", "orders", &file, "--wait", "30s"]);
    let revision = etcd.revision_of("rules/orders");
    let named = |name: &str, text: &str| {
        let path = etcd.directory().join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let wide = named(
        "wide",
        "rules: [{cidr: 198.51.100.7/32}, {cidr: 0.0.0.0/0}]",
    );
    let none = named("none", "rules: []");
    let more = named(
        "more",
        "rules: [{cidr: 198.51.100.7/32}, {cidr: 198.51.100.8/32}]",
    );
    let past = ["--expires", "2020-01-01T00:00:00Z"];
    for (arguments, expected) in [
        (&["allow", "orders", "0.0.0.0/0"][..], "db7 would refuse it"),
        (
            &["allow", "ordres", "198.51.100.8"],
            "no host has a database ordres (they have ",
        ),
        (
            &[&["allow", "orders", "198.51.100.8"], &past[..]].concat(),
            "2020-01-01T00:00:00Z is over",
        ),
        (&["put", "ordres", &file], "no host has a database ordres"),
        (
            &["rollout", "orders", &wide, "--on", "db7"],
            "db7 would refuse it",
        ),
        (
            &["rollout", "orders", &wide, "--on", "db7", "--soak", "10s"],
            "db7 would refuse it",
        ),
        (
            &["rollout", "orders", &none, "--on", "db7"],
            "1 rule of 1 would go",
        ),
        (
            &["rollout", "orders", &none, "--on", "db7", "--soak", "10s"],
            "1 rule of 1 would go",
        ),
        (
            &["rollout", "orders", &more, "--on", "db7,db9"],
            "no host db9 has reported",
        ),
    ] {
        let refused = kim.fails(arguments);
        assert!(refused.contains(expected), "{arguments:?}: {refused}");
        assert!(refused.contains("nothing is written"), "{refused}");
    }
    assert_eq!(etcd.revision_of("rules/orders"), revision);
    let nobody = kim.fails(&["status", "ordres"]);
    assert!(
        nobody.contains("etcd has no document of ordres"),
        "{nobody}"
    );
    for arguments in [
        &["rollout", "orders", &more, "--on", "db7"][..],
        &["allow", "orders", "198.51.100.8"],
    ] {
        let at_once = kim.run(&[arguments, &["--for", "0s"]].concat());
        assert_eq!(at_once.status.code(), Some(2), "{arguments:?}");
    }
    // A rollout is seen, and ends by nobody's oversight.
    let said = kim.says(&["rollout", "orders", &more, "--on", "db7"]);
    assert!(
        said.starts_with("on db7 until ") && said.contains(":\n  + 198.51.100.8/32\n"),
        "{said}"
    );
    let other = named(
        "other",
        "rules: [{cidr: 198.51.100.7/32}, {cidr: 198.51.100.9/32}]",
    );
    for arguments in [
        &["put", "orders", &file][..],
        &["rollout", "orders", &other, "--on", "db7"],
    ] {
        let refused = kim.fails(arguments);
        assert!(refused.contains("the rollout on db7 until "), "{refused}");
    }
    let differs = kim.run(&["diff", "orders", &file]);
    assert_eq!(differs.status.code(), Some(1));
    let differs = String::from_utf8(differs.stdout).unwrap();
    assert!(
        differs.starts_with("on db7, whose rollout ends:\n  - 198.51.100.8/32\nthe rollout on db7"),
        "{differs}"
    );
    kim.says(&["abort", "orders"]);
    // One that is over is in nobody's way, and is not promoted.
    let strange = ["rollout", "orders", &more, "--on", "db7,db9", "--for", "1s"];
    kim.says(&[&strange[..], &["--yes"]].concat());
    // Whether or not the host has it by then.
    let is_told = || {
        let status = kim.run(&["status", "orders"]).stdout;
        String::from_utf8(status)
            .unwrap()
            .contains("promote or abort it")
    };
    assert!(is_told());
    std::thread::sleep(std::time::Duration::from_secs(2));
    assert!(!is_told());
    let over = kim.fails(&["promote", "orders"]);
    assert!(over.contains("its rollout ended at "), "{over}");
    let said = kim.says(&["allow", "orders", "198.51.100.8"]);
    assert!(said.starts_with("+ 198.51.100.8/32\nthe doc"), "{said}");
    kim.says(&["rollout", "orders", &more, "--on", "db7"]);
    kim.says(&["promote", "orders"]);
    // Forced on a host, it is still looked at before all hosts get it.
    kim.says(&["rollout", "orders", &wide, "--on", "db7", "--yes"]);
    let refused = kim.fails(&["promote", "orders"]);
    assert!(refused.contains("db7 would refuse it"), "{refused}");
    assert!(refused.contains("nothing is written"), "{refused}");
    kim.says(&["abort", "orders", "--wait", "30s"]);
    // A few hosts report more than can be read: access is taken away all the same.
    let much = b" ".repeat(1_400_000);
    for n in 0..4 {
        etcd.put(&format!("hosts/much{n}"), &much);
        // Without a lease it outlives its host.
        etcd.put(&format!("alive/much{n}"), &much);
    }
    assert!(kim.fails(&["status", "orders"]).contains("too large"));
    let told = kim.fails(&["revoke", "orders", "198.51.100.8"]);
    assert!(
        told.contains("it is written, but what hosts report cannot be read"),
        "{told}"
    );
    assert!(!kim.says(&["get", "orders"]).contains("198.51.100.8/32"));
    for n in 0..4 {
        let host = format!("much{n}");
        kim.says(&["forget", &host]);
        etcd.delete(&format!("alive/{host}"));
    }
    kim.says(&["allow", "orders", "198.51.100.8", "--wait", "30s"]);
    // A host's report cannot add rows to what `status` prints.
    let row = b"{\"orders  9  ACTIVE\n\": 1}";
    etcd.put("hosts/db8", row);
    let garbled = kim.run(&["status", "orders"]);
    assert_eq!(garbled.status.code(), Some(3));
    let garbled = String::from_utf8(garbled.stdout).unwrap();
    assert!(
        garbled.contains("no report that can be read: db8\n"),
        "{garbled}"
    );
    kim.says(&["forget", "db8"]);
    net.signal(Signal::SIGSTOP);
    kim.says(&["allow", "orders", "198.51.100.10"]);
    let pending = kim.run(&["status", "orders"]);
    net.signal(Signal::SIGCONT);
    assert_eq!(pending.status.code(), Some(4));
    let pending = String::from_utf8(pending.stdout).unwrap();
    assert!(pending.contains("orders: not yet on db7\n"), "{pending}");
    // Less is allowed by what hosts refuse, too: written, and told.
    etcd.put(
        "rules/orders",
        b"rules: [{cidr: 0.0.0.0/0}, {cidr: 198.51.100.7/32}]",
    );
    let told = kim.fails(&["revoke", "orders", "198.51.100.7"]);
    let is_told = |told: &str| {
        told.contains("it is written, but db7 would refuse it")
            && told.contains("what was in force there may go on")
    };
    assert!(is_told(&told), "{told}");
    assert!(!kim.says(&["get", "orders"]).contains("198.51.100.7"));
    kim.says(&["rollout", "orders", &file, "--on", "db7", "--yes"]);
    let told = kim.fails(&["abort", "orders"]);
    assert!(is_told(&told), "{told}");
    assert!(!kim.says(&["get", "orders"]).contains("rollout"));
}

/// A rule that only a rollout has was not found, and one of both went on in the rollout, to be promoted later.
#[test]
fn rule_is_revoked_and_added_in_a_rollout_as_well() {
    let etcd = Etcd::start("fleet-both");
    let kim = Operator::new(&etcd);
    let mut net = host("fleet-both-db", &etcd);
    net.start();
    let file = kim.file("rules: [{cidr: 198.51.100.7/32}]");
    kim.says(&["put", "orders", &file, "--wait", "30s"]);
    let more = "rules: [{cidr: 198.51.100.7/32}, {cidr: 198.51.100.8/32}]";
    let more = kim.file(more);
    kim.says(&["rollout", "orders", &more, "--on", "db7", "--wait", "30s"]);
    kim.says(&["allow", "orders", "198.51.100.9", "--wait", "30s"]);
    kim.says(&["revoke", "orders", "198.51.100.8", "--wait", "30s"]);
    kim.says(&["revoke", "orders", "198.51.100.7", "--wait", "30s"]);
    let passes = |source: &str| {
        let explained = net.agent_json(&["explain", source, "--database", "orders"]);
        explained["verdicts"][0]["passes"] == true
    };
    let sources = ["198.51.100.7", "198.51.100.8", "198.51.100.9"];
    assert_eq!(sources.map(passes), [false, false, true]);
    kim.says(&["promote", "orders", "--wait", "30s"]);
    assert_eq!(sources.map(passes), [false, false, true]);
}

/// One host's report that etcd was not believed, about any database, stopped every command for all of them.
#[test]
fn forged_report_stops_no_command_and_a_lost_document_is_missed() {
    let etcd = Etcd::start("fleet-forged");
    let kim = Operator::new(&etcd);
    let mut net = host("fleet-forged-db", &etcd);
    net.start();
    let file = kim.file("rules: [{cidr: 198.51.100.7/32}]");
    kim.says(&["put", "orders", &file, "--wait", "30s"]);
    let report = etcd.text_of("hosts/db7").unwrap();
    let held = report.replace("\"state\":\"active\"", "\"state\":\"held\"");
    assert_ne!(held, report);
    // It is not there, and another one knows no such database.
    etcd.put("hosts/db8", held.as_bytes());
    etcd.put("hosts/db9", held.replace("orders", "zzz").as_bytes());
    kim.says(&["allow", "orders", "198.51.100.8"]);
    kim.says(&["revoke", "orders", "198.51.100.8"]);
    kim.says(&["forget", "db8"]);
    kim.says(&["forget", "db9"]);
    // Hosts refuse this document, and enforce the one before.
    etcd.put("rules/orders", b"rules: [{cidr: 0.0.0.0/0}]");
    let is_refused = || kim.run(&["status", "orders"]).status.code() == Some(1);
    assert!(wait_until(is_refused));
    kim.file("rules: [{cidr: 203.0.113.7/32}]");
    for arguments in [
        &["put", "orders", &file][..],
        &["revoke", "orders", "198.51.100.7"],
    ] {
        let told = kim.fails(arguments);
        let expected = "db7 still enforces rules of a document";
        assert!(
            told.contains(expected) && told.contains("nothing is written"),
            "{told}"
        );
    }
    kim.file("rules: [{cidr: 198.51.100.7/32}]");
    etcd.delete("rules/orders");
    for arguments in [
        &["allow", "orders", "198.51.100.8"][..],
        &["diff", "orders", &file],
        &["put", "orders", &file],
        &["revoke", "orders", "198.51.100.7"],
    ] {
        let output = kim.run(arguments);
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8(said).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(
            said.contains("db7 still enforces rules of a document"),
            "{said}"
        );
    }
}

/// A document that is written while a host does not believe etcd would not be in force there.
#[test]
fn nothing_is_written_while_a_host_holds() {
    let etcd = Etcd::start("fleet-holding");
    etcd.grant(USER, "rules/billing");
    let kim = Operator::new(&etcd);
    etcd.put("rules/orders", b"rules: []");
    let mut net = host("fleet-holding-db", &etcd);
    net.start();
    let snapshot = etcd.snapshot();
    let file = kim.file("rules: [{cidr: 198.51.100.7/32}]");
    kim.says(&["put", "orders", &file, "--wait", "30s"]);
    etcd.restore(&snapshot);
    // A document that is written before the host has seen the restored ones may be the one that it has in force.
    let is_reported = || {
        let status = kim.run(&["status", "orders"]).stdout;
        String::from_utf8(status)
            .unwrap()
            .contains("etcd went back")
    };
    assert!(wait_until(is_reported));
    let rollout = ["rollout", "orders", &file, "--on", "db7"];
    for arguments in [
        &["put", "orders", &file][..],
        &["diff", "orders", &file],
        &["allow", "orders", "198.51.100.9"],
        &[&rollout[..], &["--soak", "10s"]].concat(),
    ] {
        let output = kim.run(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert!(said.contains("db7 does not believe etcd"), "{said}");
        let writes = arguments[0] != "diff";
        assert_eq!(said.contains("nothing is written"), writes, "{said}");
    }
    // The restored document is corrected before it is believed.
    let corrected = "rules: [{cidr: 198.51.100.8/32}, {cidr: 198.51.100.9/32}]";
    let corrected = kim.file(corrected);
    let output = kim.run(&["put", "orders", &corrected, "--yes", "--wait", "1s"]);
    assert_eq!(output.status.code(), Some(1));
    // Less is allowed: written all the same, and told.
    let told = kim.fails(&["revoke", "orders", "198.51.100.9"]);
    assert!(told.contains("it is written, but db7 does not"), "{told}");
    kim.says(&["recover", "--yes"]);
    // The hosts' reports are from before the era was raised.
    kim.says(&["allow", "orders", "198.51.100.10", "--wait", "30s"]);
    let explained = net.agent_json(&["explain", "198.51.100.8", "--database", "orders"]);
    assert_eq!(explained["verdicts"][0]["passes"], true, "{explained}");
}

/// A backup holds that hosts are there, and enforce what it holds of documents.
#[test]
fn what_a_backup_says_of_hosts_is_not_taken_for_now() {
    let etcd = Etcd::start("fleet-backup");
    let kim = Operator::new(&etcd);
    let mut net = host("fleet-backup-db", &etcd);
    net.start();
    let file = kim.file("rules: [{cidr: 198.51.100.7/32}]");
    kim.says(&["put", "orders", &file, "--wait", "30s"]);
    let snapshot = etcd.snapshot();
    net.kill();
    etcd.restore_as(&snapshot, "another");
    let status = kim.run(&["status", "orders"]);
    assert_eq!(status.status.code(), Some(4));
    let status = String::from_utf8(status.stdout).unwrap();
    assert!(status.contains("orders: not yet on db7"), "{status}");
    let allow = ["allow", "orders", "198.51.100.8"];
    let rollout = ["rollout", "orders", &file, "--on", "db7", "--soak", "10s"];
    for arguments in [&allow[..], &rollout] {
        let told = kim.fails(arguments);
        let expected = "db7 reported to another etcd";
        assert!(
            told.contains(expected) && told.contains("nothing is written"),
            "{told}"
        );
    }
    let told = kim.fails(&["revoke", "orders", "198.51.100.7"]);
    assert!(told.contains("it is written, but"), "{told}");
    kim.says(&["put", "orders", &file, "--yes"]);
    // The document is that which it has in force.
    net.start();
    kim.says(&["status", "orders", "--wait", "30s"]);
    kim.says(&[&allow[..], &["--wait", "30s"]].concat());
}

#[test]
fn writers_at_the_same_time_lose_nothing() {
    let etcd = Etcd::start("fleet-writers");
    let kim = Operator::new(&etcd);
    let sources: Vec<String> = (0..30)
        .map(|host| format!("198.51.100.{host}/32"))
        .collect();
    let commands = sources
        .iter()
        .map(|source| kim.command(&["allow", "orders", source]));
    let spawned = spawn(&etcd, commands.collect());
    for mut child in spawned {
        assert!(child.wait().unwrap().success());
    }
    let document = kim.says(&["get", "orders"]);
    assert!(
        sources.iter().all(|source| document.contains(source)),
        "{document}"
    );
    let beyond = kim.fails(&["allow", "orders", "198.51.100.30/32"]);
    assert!(beyond.contains("at most 30"), "{beyond}");
    // Of several who saw the same revision one gets through.
    let revision = etcd.revision_of("rules/orders").to_string();
    let file = kim.file("rules: [{cidr: 203.0.113.0/24}]\n");
    let put = ["put", "orders", &file, "--yes", "--if-revision", &revision];
    let spawned = spawn(&etcd, (0..20).map(|_| kim.command(&put)).collect());
    let done = spawned.into_iter().map(|mut child| child.wait().unwrap());
    assert_eq!(done.filter(|status| status.success()).count(), 1);
}

#[test]
fn who_may_not_or_reaches_nobody_is_told_so() {
    let etcd = Etcd::start("fleet-rights");
    etcd.put("rules/orders", b"rules: []");
    let host = Operator::with_certificate_of(&etcd, USER);
    host.says(&["get", "orders"]);
    let file = host.file("rules: [{cidr: 203.0.113.0/24}]\n");
    for arguments in [&["put", "orders", &file][..], &["recover", "--yes"]] {
        let denied = host.fails(arguments);
        for part in [
            "permission denied",
            "nothing is written",
            "as the user that",
        ] {
            assert!(denied.contains(part), "{denied}");
        }
    }
    let kim = Operator::new(&etcd);
    assert_eq!(kim.run(&["recover"]).status.code(), Some(2));
    // Later than any that a host may have seen and a backup has not, and than one that is yet to come by the clock.
    let raised = kim.says(&["recover", "--yes"]);
    assert!(
        raised.ends_with(": hosts believe what etcd has now\n"),
        "{raised}"
    );
    let era: u64 = raised.split([' ', ':']).nth(1).unwrap().parse().unwrap();
    assert!(era > 1_700_000_000);
    etcd.put("era", b"99999999999");
    let raised = kim.says(&["recover", "--yes"]);
    assert!(raised.starts_with("era 100000000000: "), "{raised}");
    // A host has seen a later one than a backup's, and than the clock's.
    let later = r#"{"agent": "0.1.0", "boot": "", "era": 100000000002, "at": "2027-01-01T00:00:00Z", "databases": {}}"#;
    etcd.put("hosts/db9", later.as_bytes());
    let told = kim.fails(&["recover", "--yes"]);
    assert!(told.contains("but db9 reported a later era"), "{told}");
    kim.says(&["recover", "--yes"]);
    let highest = u64::MAX.to_string();
    etcd.put("era", highest.as_bytes());
    let highest_still = kim.fails(&["recover", "--yes"]);
    assert!(
        highest_still.contains(&format!("{highest} is the highest there is")),
        "{highest_still}"
    );
    assert_eq!(etcd.text_of("era"), Some(highest));
    etcd.kill(0);
    let gone = kim.fails(&["get", "orders"]);
    assert!(
        gone.contains("reach etcd: https://10.77.0.1:2379: "),
        "{gone}"
    );
    fs::write(&kim.place, "interfaces: [eth0]\n").unwrap();
    assert!(kim.fails(&["get", "orders"]).contains("it has no `fleet`"));
}
