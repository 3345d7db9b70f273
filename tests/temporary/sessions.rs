//! Sessions of a real PostgreSQL whose source loses its access, and those of others.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::IpAddr,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use filter_tests::{
    databases::{Postgres, come_from, psql_at_home},
    net::{ALLOWED4, Connection, DENIED4, NEIGHBOURS, Net, wait, wait_until},
};
use serde_json::json;

use crate::host::{ALLOWED, DB, DENIED, orders, state};

const OTHER: &str = "203.0.113.11/32";

/// A psql at a source of the client's.
struct Session {
    name: String,
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Session {
    /// Connects, and waits until the server lists it.
    fn open(net: &Net, source: IpAddr, name: &str, options: &str) -> Self {
        let database = come_from(net, source);
        let mut command = Command::new("psql");
        command
            .args(["--no-psqlrc", "-At"])
            .arg(format!(
                "host={database} user=postgres sslmode=disable application_name={name} {options}"
            ))
            .env("PGCONNECT_TIMEOUT", "180")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child = net.client.run(|| command.spawn().unwrap());
        let session = Self {
            name: name.into(),
            input: child.stdin.take().unwrap(),
            output: BufReader::new(child.stdout.take().unwrap()),
            child,
        };
        let connected = wait_until(|| session.is_listed(net));
        assert!(connected, "{name} does not connect");
        session
    }

    /// Begins a query, and waits until the server executes it.
    fn execute(&mut self, net: &Net, query: &str) {
        writeln!(self.input, "{query};").unwrap();
        let is_active = || listed(net, &self.name).as_deref() == Some("active");
        assert!(wait_until(is_active), "{} does not execute", self.name);
    }

    /// The state that the server lists.
    fn is_listed(&self, net: &Net) -> bool {
        listed(net, &self.name).is_some()
    }

    #[track_caller]
    fn assert_answers(&mut self) {
        writeln!(self.input, "select 6 * 7;").unwrap();
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        assert_eq!(line, "42\n", "{}", self.name);
    }

    /// Waits until the server does not list it any more. Returns the time.
    #[track_caller]
    fn leaves(&self, net: &Net, since: Instant) -> Duration {
        assert!(wait_until(|| !self.is_listed(net)), "{} stays", self.name);
        since.elapsed()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The state of a session, as the server lists it.
fn listed(net: &Net, name: &str) -> Option<String> {
    let query = format!("select state from pg_stat_activity where application_name = '{name}'");
    Some(psql_at_home(net, &query).unwrap()).filter(|state| !state.is_empty())
}

fn enforcing(name: &str, policy: &str) -> (Net, Postgres) {
    let mut net = Net::new(name);
    let server = Postgres::start(&net);
    net.write_policy(policy);
    net.start();
    (net, server)
}

#[test]
fn block_cuts_the_sessions_of_its_source_and_no_others() {
    let (net, _server) = enforcing("sessions-block", &orders(&[ALLOWED, OTHER], ""));
    let source = ALLOWED4.into();
    let mut idle = Session::open(&net, source, "idle", "");
    idle.assert_answers();
    let mut unset = Session::open(&net, source, "unset", "");
    unset.execute(&net, "select pg_sleep(6)");
    let mut set = Session::open(
        &net,
        source,
        "set",
        "options=-cclient_connection_check_interval=500",
    );
    set.execute(&net, "select pg_sleep(600)");
    let mut other = Session::open(&net, NEIGHBOURS[1], "other", "");
    other.assert_answers();
    let mut busy = Session::open(&net, NEIGHBOURS[1], "busy", "");
    busy.execute(&net, "select pg_sleep(600)");

    let begun = Instant::now();
    let done = net.agent_json(&["block", "orders", ALLOWED, "--for", "2h"]);
    let blocked = begun.elapsed();
    let cut = &done["cut"][0];
    assert_eq!(
        json!([cut["rule"], cut["source"], cut["connections"], cut["reset"]]),
        json!([ALLOWED, "203.0.113.10", 3, true])
    );
    assert_eq!(done["cut"].as_array().unwrap().len(), 1);
    // The clients learn it by themselves.
    for session in [&mut unset, &mut set] {
        assert!(!wait(&mut session.child).unwrap().success());
    }
    let clients = begun.elapsed();
    let [idle, set, unset] = [&idle, &set, &unset].map(|session| session.leaves(&net, begun));
    eprintln!(
        "block: {blocked:?} for the command, its clients ended after {clients:?}; gone from pg_stat_activity: idle {idle:?}, \
         executing with client_connection_check_interval {set:?}, without {unset:?} (its query took 6 s)"
    );
    other.assert_answers();
    assert_eq!(listed(&net, "busy").as_deref(), Some("active"));
    assert_eq!(net.connect(source, DB), Connection::Silence);
    net.agent_text(&["revoke", "orders", ALLOWED]);
    Session::open(&net, source, "again", "").assert_answers();
}

#[test]
fn sessions_are_left_to_the_server_where_the_policy_keeps_them() {
    let policy = orders(&[ALLOWED, OTHER], "on_removal: keep");
    let (net, _server) = enforcing("sessions-keep", &policy);
    let mut idle = Session::open(&net, ALLOWED4.into(), "idle", "");
    idle.assert_answers();
    let done = net.agent_json(&["block", "orders", ALLOWED, "--for", "2h"]);
    assert_eq!(done["cut"][0]["connections"], 1);
    assert_eq!(done["cut"][0]["reset"], false);
    assert_eq!(net.connect(ALLOWED4.into(), DB), Connection::Silence);
    assert!(idle.is_listed(&net));
    // It goes on where it was.
    net.agent_text(&["revoke", "orders", ALLOWED]);
    idle.assert_answers();
    net.write_policy(&orders(&[OTHER], "on_removal: keep"));
    let text = net.agent_text(&["reload"]);
    let line = "database orders: 1 connection of 203.0.113.10, allowed by 203.0.113.10/32";
    assert!(
        text.contains(line) && text.contains("left to the server"),
        "{text}"
    );
    assert!(idle.is_listed(&net));
    net.reload(&policy);
    idle.assert_answers();
}

#[test]
fn reload_region_and_end_cut_the_sessions_that_lose_their_rule() {
    let (net, _server) = enforcing("sessions-rule", &orders(&[ALLOWED, OTHER], ""));
    let mut first = Session::open(&net, ALLOWED4.into(), "first", "");
    let mut second = Session::open(&net, ALLOWED4.into(), "second", "");
    let mut other = Session::open(&net, NEIGHBOURS[1], "other", "");

    net.write_policy(&orders(&[OTHER], ""));
    let plan = net.agent_json(&["plan"]);
    let cut = &plan["cut"][0];
    assert_eq!(
        json!([
            cut["database"],
            cut["rule"],
            cut["source"],
            cut["connections"]
        ]),
        json!(["orders", ALLOWED, "203.0.113.10", 2])
    );
    let before = state(&net);
    for most in ["0", "1"] {
        let error = net.agent_error(&["reload", "--max-cut", most]);
        assert!(
            error.contains("2 ") && error.contains("nothing is changed"),
            "{error}"
        );
        assert_eq!(state(&net), before);
        first.assert_answers();
        second.assert_answers();
        assert_eq!(net.connect(ALLOWED4.into(), DB), Connection::Accepted);
    }
    let begun = Instant::now();
    let text = net.agent_text(&["reload", "--max-cut", "2"]);
    assert!(
        text.contains("2 connections of 203.0.113.10, allowed by 203.0.113.10/32"),
        "{text}"
    );
    let times = [&first, &second].map(|session| session.leaves(&net, begun));
    eprintln!("reload: gone from pg_stat_activity after {times:?}");
    other.assert_answers();
    // With nobody to cut off.
    net.agent_text(&["reload", "--max-cut", "0"]);

    let list = net.dir().join("office.txt");
    let put = |prefixes: &str| {
        let next = net.dir().join("office.next");
        fs::write(&next, prefixes).unwrap();
        fs::rename(next, &list).unwrap();
    };
    put(&format!("{ALLOWED}\n{DENIED}\n"));
    let region = format!(
        "regions: {{office: {{file: {}, max_shrink: 100%}}}}\n",
        list.display()
    );
    let text = orders(&[OTHER], "").replace("rules: [", "rules: [{region: office}, ");
    net.reload(&(text + &region));
    let office = Session::open(&net, DENIED4.into(), "office", "");
    let mut stays = Session::open(&net, ALLOWED4.into(), "stays", "");
    let begun = Instant::now();
    put(&format!("{ALLOWED}\n"));
    let time = office.leaves(&net, begun);
    eprintln!("region: gone from pg_stat_activity {time:?} after its file changed");
    stays.assert_answers();

    net.agent_text(&["allow", "orders", DENIED, "--for", "1h"]);
    let session = Session::open(&net, DENIED4.into(), "temporary", "");
    let begun = Instant::now();
    net.agent_text(&["allow", "orders", DENIED, "--for", "2s"]);
    let (time, end) = (session.leaves(&net, begun), Duration::from_secs(2));
    assert!(time >= end, "{time:?}");
    eprintln!("end: gone from pg_stat_activity {:?} after it", time - end);
    stays.assert_answers();
    other.assert_answers();
}
