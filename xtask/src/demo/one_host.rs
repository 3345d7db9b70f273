//! One host whose policy says all.

use std::fs;

use anyhow::{Context as _, Result};

use super::network::Host;
use super::servers::{Attempt, agent_log};
use super::{Demo, heading};
use crate::{output, run};

const POLICY: &str = include_str!("../../demo/policy.yaml");

const PROTECTED: u16 = 5432;
const UNPROTECTED: u16 = 5433;

const DB: Host = Host {
    name: "db",
    addresses: &["192.0.2.1", "2001:db8::1"],
};
const OFFICE: Host = Host {
    name: "office",
    addresses: &["192.0.2.10", "2001:db8::10"],
};
const ELSEWHERE: Host = Host {
    name: "elsewhere",
    addresses: &["198.51.100.10", "2001:db8:f::10"],
};

pub fn play(demo: &mut Demo) -> Result<()> {
    heading("What is set up");
    demo.connect_hosts(&[DB, OFFICE, ELSEWHERE])?;
    demo.make_data()?;
    for port in [PROTECTED, UNPROTECTED] {
        demo.start_postgresql(DB.name, port, None)?;
    }
    println!(
        "  db         {}: PostgreSQL on ports 5432 and 5433",
        DB.addresses.join(", ")
    );
    for client in [OFFICE, ELSEWHERE] {
        println!(
            "  {:<10} {}: psql",
            client.name,
            client.addresses.join(", ")
        );
    }
    println!("  each a network namespace; a bridge in a fourth connects them");

    heading("Without the filter: port 5432");
    demo.try_everybody(PROTECTED, |_| true)?;

    heading("The policy");
    for line in POLICY.lines() {
        println!("  {line}");
    }

    heading("The agent starts");
    let policy = demo.home(DB.name).join("policy.yaml");
    fs::write(policy, POLICY).context("write the policy")?;
    demo.mount_bpffs(DB.name)?;
    let agent = demo.start_agent(DB.name)?;
    let log = demo.directory.join(agent_log(DB.name));
    for line in fs::read_to_string(log)
        .context("read the agent's log")?
        .lines()
    {
        println!("  {line}");
    }

    heading("With the filter: port 5432, protected");
    demo.try_everybody(PROTECTED, |client| client == OFFICE.name)?;
    heading("With the filter: port 5433, not in the policy");
    demo.try_everybody(UNPROTECTED, |_| true)?;

    heading("What the kernel counted: filter-agent status");
    demo.ask_agent(&["status"])?;
    heading("filter-agent rules");
    demo.ask_agent(&["rules"])?;
    let elsewhere = ELSEWHERE.addresses[0];
    heading(&format!("filter-agent explain {elsewhere}"));
    demo.ask_agent(&["explain", elsewhere])?;
    demo.check_counts()?;

    heading("The agent is killed (kill -9): port 5432");
    demo.kill(agent)?;
    demo.try_everybody(PROTECTED, |client| client == OFFICE.name)?;

    heading("filter-agent detach --yes: port 5432");
    let bpffs = demo.bpffs(DB.name);
    let mut detach = demo.agent(DB.name, "detach");
    detach.args(["--yes", "--bpffs"]).arg(&bpffs);
    run(detach.arg("--state-dir").arg(demo.state(DB.name)))?;
    // The kernel itself puts files there, but no directories.
    let entries = fs::read_dir(&bpffs).with_context(|| format!("list {}", bpffs.display()))?;
    let pinned = entries.flatten().any(|entry| entry.path().is_dir());
    demo.expect(!pinned, "detach removes everything that was pinned");
    demo.try_everybody(PROTECTED, |_| true)
}

impl Demo {
    fn ask_agent(&self, words: &[&str]) -> Result<()> {
        self.stop_if_interrupted()?;
        run(self.agent(DB.name, words[0]).args(&words[1..]))
    }

    /// Lets every client connect with psql, over IPv4 and IPv6, all at the same time.
    fn try_everybody(&mut self, port: u16, may: impl Fn(&str) -> bool) -> Result<()> {
        self.stop_if_interrupted()?;
        let mut attempts = Vec::new();
        for client in [OFFICE, ELSEWHERE] {
            for (source, server) in client.addresses.iter().zip(DB.addresses) {
                let mut psql = self.psql(client.name, server, port, may(client.name));
                attempts.push((client.name, source, psql.spawn().context("start psql")?));
            }
        }
        for (client, source, psql) in attempts {
            let as_expected = match self.attempt(psql)? {
                Attempt::In(seen) => {
                    println!("  {source:<17} in   the server sees {seen}");
                    self.expect(seen == *source, "the server sees the client's own address");
                    may(client)
                }
                Attempt::Out(said) => {
                    println!("  {source:<17} out  {said}");
                    !may(client)
                }
                Attempt::Failed(said) => {
                    println!("  {source:<17} ?    {said}");
                    false
                }
            };
            let expected = if may(client) { "gets in" } else { "stays out" };
            self.expect(as_expected, &format!("{source} {expected}"));
        }
        Ok(())
    }

    fn check_counts(&mut self) -> Result<()> {
        let status = output(self.agent(DB.name, "status").arg("--json"))?;
        let status: serde_json::Value =
            serde_json::from_str(&status).context("parse what `status --json` prints")?;
        let database = &status["databases"][0];
        let passed = database["passed"].as_u64().unwrap_or(0);
        let dropped = database["dropped"]
            .as_object()
            .into_iter()
            .flat_map(|map| map.values());
        let dropped: u64 = dropped.filter_map(serde_json::Value::as_u64).sum();
        self.expect(passed > 0, "the kernel counted the packets of the office");
        self.expect(dropped > 0, "the kernel counted the packets it dropped");
        Ok(())
    }
}
