//! Three hosts whose rules come from etcd.

mod etcd;
mod tries;

use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::network::Host;
use super::{Demo, heading};
use crate::run;

const POLICY: &str = include_str!("../../demo/fleet-policy.yaml");

const PORT: u16 = 5432;

const DB7: Host = Host {
    name: "db7",
    addresses: &["192.0.2.7"],
};
const DB8: Host = Host {
    name: "db8",
    addresses: &["192.0.2.8"],
};
const DB9: Host = Host {
    name: "db9",
    addresses: &["192.0.2.9"],
};
const DATABASES: [Host; 3] = [DB7, DB8, DB9];
const ETCD: Host = Host {
    name: "etcd",
    addresses: &["192.0.2.2"],
};
const KIM: Host = Host {
    name: "kim",
    addresses: &["192.0.2.3"],
};
const BASTION: Host = Host {
    name: "bastion",
    addresses: &["203.0.113.10"],
};
const OFFICE: Host = Host {
    name: "office",
    addresses: &["198.51.100.7"],
};
const ELSEWHERE: Host = Host {
    name: "elsewhere",
    addresses: &["203.0.113.70"],
};
const CLIENTS: [Host; 3] = [BASTION, OFFICE, ELSEWHERE];

/// Files of kim's.
const ORDERS: &str = "rules:
  - cidr: 198.51.100.0/24
    label: office
";
const TRIED: &str = "rules:
  - cidr: 198.51.100.0/24
    label: office
  - cidr: 203.0.113.64/26
    label: tried
";
const OPEN: &str = "rules: [{cidr: 0.0.0.0/0}]";

/// What runs, by its number among the servers.
struct Running {
    etcd: usize,
    /// As `DATABASES`.
    agents: [usize; 3],
}

pub fn play(demo: &mut Demo) -> Result<()> {
    let mut running = set_up(demo)?;
    first_document(demo)?;
    without_etcd(demo, &mut running)?;
    with_etcd_again(demo)?;
    bad_document(demo)?;
    rollout(demo)
}

fn only_bastion(client: &str, _: &str) -> bool {
    client == BASTION.name
}

fn office_too(client: &str, _: &str) -> bool {
    client != ELSEWHERE.name
}

fn set_up(demo: &mut Demo) -> Result<Running> {
    heading("What is set up");
    let version = etcd::version()?;
    let hosts: Vec<Host> = [&DATABASES[..], &[ETCD, KIM], &CLIENTS].concat();
    demo.connect_hosts(&hosts)?;
    demo.make_certificates()?;
    demo.make_data()?;
    for host in DATABASES {
        let (certificate, key) = (demo.certificate(host.name), demo.key(host.name));
        demo.start_postgresql(host.name, PORT, Some([&certificate, &key]))?;
    }
    let etcd = demo.start_etcd()?;
    demo.grant_rights()?;
    for (hosts, said) in [
        (&DATABASES[..], "PostgreSQL with TLS on port 5432"),
        (
            &[ETCD],
            &*format!("etcd {version} with TLS; the user is the certificate's common name"),
        ),
        (
            &[KIM],
            "an operator with a certificate, and without an agent",
        ),
        (&CLIENTS, "psql"),
    ] {
        for host in hosts {
            println!("  {:<10}{:<14}{said}", host.name, host.addresses[0]);
        }
    }
    println!("  each a network namespace; a bridge in another one connects them");

    heading("The policy of db7; those of db8 and db9 differ in the name");
    let directory = demo.directory.display().to_string();
    for host in DATABASES {
        let policy = POLICY
            .replace("DIRECTORY", &directory)
            .replace("HOST", host.name);
        if host.name == DB7.name {
            print!("{policy}");
        }
        let path = demo.home(host.name).join("policy.yaml");
        fs::write(path, policy).context("write a policy")?;
    }
    for (name, text) in [
        ("orders.yaml", ORDERS),
        ("tried.yaml", TRIED),
        ("open.yaml", OPEN),
        (
            "kim.yaml",
            &format!(
                "fleet:\n  endpoints: ['https://{}:2379']\n  ca_file: {directory}/ca.pem\n  \
                 cert_file: {directory}/kim.pem\n  key_file: {directory}/kim.key\n",
                ETCD.addresses[0]
            ),
        ),
    ] {
        fs::write(demo.home(KIM.name).join(name), text).context("write kim's files")?;
    }

    heading("The agents start; etcd has no document yet");
    let mut agents = [0; 3];
    for (host, agent) in DATABASES.iter().zip(&mut agents) {
        demo.mount_bpffs(host.name)?;
        *agent = demo.start_agent(host.name)?;
    }
    demo.wait_for_hosts("NONE")?;
    demo.kim("fleet status", 0)?;
    demo.try_all(only_bastion)?;
    Ok(Running { etcd, agents })
}

fn first_document(demo: &mut Demo) -> Result<()> {
    heading("One change: the office, everywhere");
    demo.time_connections(OFFICE, |demo| {
        demo.kim("fleet put orders orders.yaml --wait 2m", 0)
            .map(drop)
    })?;
    demo.try_all(office_too)?;

    heading("Who has it, and why");
    let text = demo.kim("fleet get orders", 0)?;
    demo.expect(text.contains("198.51.100.0/24"), "etcd has the document");
    let text = demo.on(DB8, "explain 198.51.100.7", 0)?;
    let is_fleet = text.contains("allowed by fleet rule 198.51.100.0/24");
    demo.expect(is_fleet, "the fleet's rule allows the office");
    let text = demo.on(DB8, "history", 0)?;
    demo.expect(
        text.contains("fleet: orders at revision"),
        "the history has the change",
    );

    heading("TLS is forced as ever");
    demo.try_in_the_clear(OFFICE, DB8)
}

fn without_etcd(demo: &mut Demo, running: &mut Running) -> Result<()> {
    heading("etcd is killed (kill -9)");
    demo.kill(running.etcd)?;
    demo.kim("fleet status", 1)?;
    demo.try_all(office_too)?;

    heading("db8 reboots meanwhile: its agent is killed, and the kernel has nothing of it");
    let has_program = |demo: &Demo| -> Result<bool> {
        let mut link = demo.inside(DB8.name, "ip".as_ref());
        let link = demo.finish(link.args(["link", "show", "eth0"]))?;
        ensure!(link.status.success(), "db8 has no eth0");
        Ok(String::from_utf8_lossy(&link.stdout).contains("prog/xdp"))
    };
    let is_attached = has_program(demo)?;
    demo.expect(is_attached, "a program is attached on db8");
    demo.kill(running.agents[1])?;
    let bpffs = demo.bpffs(DB8.name);
    run(Command::new("umount").arg(&bpffs))?;
    demo.wait_until("no program is attached on db8", || Ok(!has_program(demo)?))?;
    println!("No program is attached on db8. Its agent starts, with etcd away:");
    demo.mount_bpffs(DB8.name)?;
    running.agents[1] = demo.start_agent(DB8.name)?;
    demo.try_all(office_too)?;
    let text = demo.on(DB8, "status", 0)?;
    demo.expect(text.contains("fleet: host db8"), "status shows the fleet");

    heading("etcd comes back");
    running.etcd = demo.start_etcd()?;
    demo.wait_for_hosts("ACTIVE")?;
    demo.kim("fleet status", 0).map(drop)
}

fn with_etcd_again(demo: &mut Demo) -> Result<()> {
    heading("Changes arrive again: the office's rule is revoked");
    demo.kim("fleet revoke orders 198.51.100.0/24 --wait 2m", 0)?;
    demo.try_all(only_bastion)?;

    heading("And allowed again");
    demo.time_connections(OFFICE, |demo| {
        let allow = "fleet allow orders 198.51.100.0/24 --label office --wait 2m";
        demo.kim(allow, 0).map(drop)
    })?;
    demo.try_all(office_too)
}

fn bad_document(demo: &mut Demo) -> Result<()> {
    heading("A document that would open too much");
    let text = demo.kim("fleet put orders open.yaml", 1)?;
    demo.expect(text.contains("nothing is written"), "put does not write it");
    demo.put_with_etcdctl(OPEN)?;
    let text = demo.kim("fleet status --wait 2m", 1)?;
    demo.expect(text.contains("FAILED"), "the document failed");
    for host in DATABASES {
        let refused = format!("orders on {}: ", host.name);
        demo.expect(
            text.contains(&refused),
            &format!("{} refuses it", host.name),
        );
        let text = demo.on(host, "status --brief", 1)?;
        demo.expect(
            text.contains("0.0.0.0/0 is wider than /16"),
            "the host says why",
        );
    }
    demo.try_all(office_too)?;

    heading("It is corrected");
    demo.kim("fleet put orders orders.yaml --yes --wait 2m", 0)?;
    for host in DATABASES {
        demo.on(host, "status --brief", 0)?;
    }
    Ok(())
}

fn rollout(demo: &mut Demo) -> Result<()> {
    heading("A rollout on db7 alone");
    demo.kim(
        "fleet rollout orders tried.yaml --on db7 --for 30m --wait 2m",
        0,
    )?;
    demo.try_all(|client, host| client != ELSEWHERE.name || host == DB7.name)?;

    heading("It is aborted");
    demo.kim("fleet abort orders --wait 2m", 0)?;
    demo.try_all(office_too)
}

impl Demo {
    /// A command of kim's, who has a certificate only.
    fn kim(&mut self, line: &str, expected: i32) -> Result<String> {
        let mut command = self.inside(KIM.name, &self.agent);
        command.args(line.split(' ')).args(["--fleet", "kim.yaml"]);
        command.current_dir(self.home(KIM.name));
        let line = format!("filter-agent {line} --fleet kim.yaml");
        self.show(KIM.name, &line, &mut command, expected)
    }

    /// A command on a host, to its agent.
    fn on(&mut self, host: Host, line: &str, expected: i32) -> Result<String> {
        let mut words = line.split(' ');
        let name = words.next().context("name a command")?;
        let mut command = self.agent(host.name, name);
        command.args(words);
        if matches!(name, "status" | "history") {
            command.arg("--state-dir").arg(self.state(host.name));
        }
        if name == "status" {
            command.arg("--bpffs").arg(self.bpffs(host.name));
        }
        self.show(
            host.name,
            &format!("filter-agent {line}"),
            &mut command,
            expected,
        )
    }

    /// Waits until all hosts are there and the database is in this state.
    fn wait_for_hosts(&self, state: &str) -> Result<()> {
        self.wait_until(
            &format!("every host reports itself and orders is {state}"),
            || {
                let mut status = self.inside(KIM.name, &self.agent);
                status.args(["fleet", "status", "orders", "--json", "--fleet", "kim.yaml"]);
                status.current_dir(self.home(KIM.name));
                let output = status.output().context("ask for the fleet's status")?;
                // While etcd or a host is away it fails.
                let Ok(status) = serde_json::from_slice::<Value>(&output.stdout) else {
                    return Ok(false);
                };
                let orders = &status["databases"][0];
                Ok(orders["state"] == state
                    && orders["hosts"] == DATABASES.len()
                    && orders["silent"].as_array().is_some_and(Vec::is_empty))
            },
        )
    }
}
