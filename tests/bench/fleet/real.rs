//! A host with the real agent, and clients that show what it lets through.

use std::{
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use filter_tests::{
    certificates::Pair,
    datagrams::Datagrams,
    etcd::Etcd,
    net::{ALLOWED4, DENIED4, NEIGHBOURS, Net, Protected, dedicated, policy},
};
use serde_json::Value;

use super::{DATABASE, PATIENCE};

const PORT: u16 = 5300;
/// Of the policy's own rule.
const FLOOR: IpAddr = IpAddr::V4(ALLOWED4);
/// In turns in the documents.
pub const TURNS: [IpAddr; 2] = [IpAddr::V4(DENIED4), NEIGHBOURS[0]];
/// Allowed by nothing.
const NEVER: IpAddr = NEIGHBOURS[1];
/// Rules of each document that stay.
const CONSTANT: u8 = 20;
/// A source is out when nothing of it arrives for so long: it sends every millisecond.
const QUIET: Duration = Duration::from_millis(50);
/// Time for memory to come to rest after a start.
const REST: Duration = Duration::from_secs(1);

pub struct RealHost {
    name: String,
    net: Net,
    policy: String,
}

/// What a change did to the packets of a host.
pub struct Switched {
    pub allowed: Instant,
    /// The last arrival of the source that is no longer allowed.
    pub revoked: Instant,
}

impl RealHost {
    pub fn new(etcd: &Etcd, place: usize, name: &str, pair: &Pair) -> Self {
        let net = Net::new(&format!("bench-fleet-{place}"));
        etcd.attach_as(&net.db, 11 + place as u8);
        let sources = [FLOOR, TURNS[0], TURNS[1]].map(|source| format!("{source}/32"));
        let sources: Vec<&str> = sources.iter().map(String::as_str).collect();
        net.watch(&[Protected::udp(PORT, &sources)]);
        Self {
            name: name.into(),
            policy: policy_of(etcd, name, pair),
            net,
        }
    }

    /// Starts the agent, which enforces the policy's own rules then.
    pub fn start(&mut self) {
        self.net.write_policy(&self.policy);
        self.net.start();
    }

    pub fn kill(&mut self) {
        self.net.kill();
    }

    /// Megabytes.
    pub fn memory(&self) -> f64 {
        sleep(REST);
        (self.net.memory().1 * 1024) as f64 / 1e6
    }

    /// Starts the agent with all rules in its file, and kills it.
    pub fn memory_without_fleet(&mut self) -> f64 {
        let rules: Vec<String> = constant().chain([format!("{FLOOR}/32")]).collect();
        let rules: Vec<&str> = rules.iter().map(String::as_str).collect();
        let database = dedicated(DATABASE, PORT, &rules, "protocol: udp");
        let text = policy("eth0", "native", &[database]);
        self.net
            .write_policy(&format!("ignore_interfaces: [etcd0]\n{text}"));
        self.net.start();
        let memory = self.memory();
        self.kill();
        memory
    }

    /// Waits until the agent has the document of now in force, and has said so.
    pub fn wait_for(&self, etcd: &Etcd) -> Result<()> {
        let revision = etcd.revision_of(&format!("rules/{DATABASE}"));
        let deadline = Instant::now() + PATIENCE;
        while self.status(etcd)["enforced"].as_i64() != Some(revision) {
            ensure!(Instant::now() < deadline, "{} is not current", self.name);
            sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Milliseconds from etcd's announcement until the document was in force, by the agent's own word.
    pub fn enforced_ms(&self, etcd: &Etcd) -> Result<f64> {
        let status = self.status(etcd);
        let time = status["enforced_ms"].as_f64();
        time.with_context(|| format!("{} reports no time: {status}", self.name))
    }

    fn status(&self, etcd: &Etcd) -> Value {
        let text = etcd.text_of(&format!("hosts/{}", self.name));
        let status = text.and_then(|text| serde_json::from_str::<Value>(&text).ok());
        status.unwrap_or_default()["databases"][DATABASE].clone()
    }

    pub fn traffic(&self) -> Datagrams {
        let steady = [FLOOR, TURNS[0], TURNS[1], NEVER];
        Datagrams::start(&self.net, PORT, &steady, &[])
    }
}

/// Waits until a source arrives at a host, and the other no longer does. `begun`: before the change.
///
/// # Errors
/// Not in time.
pub fn switched(
    traffic: &Datagrams,
    allowed: IpAddr,
    revoked: IpAddr,
    begun: Instant,
) -> Result<Switched> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let arrived = traffic.arrivals(allowed);
        let last = traffic.arrivals(revoked).map_or(begun, |it| it.last);
        if let Some(arrived) = arrived
            && last.elapsed() >= QUIET
        {
            return Ok(Switched {
                allowed: arrived.first,
                revoked: last,
            });
        }
        ensure!(Instant::now() < deadline, "the change does not get through");
        sleep(Duration::from_millis(1));
    }
}

/// Nothing of the source that is always allowed was lost, and nothing of the one that never is got through.
///
/// # Errors
/// Otherwise.
pub fn check(traffic: &Datagrams) -> Result<()> {
    let passed = traffic.look();
    let (floor, never) = (passed[&FLOOR], passed[&NEVER]);
    ensure!(
        floor.sent > 0 && floor.sent == floor.received,
        "packets that are allowed are lost: {floor:?}"
    );
    ensure!(
        never.sent > 0 && never.received == 0,
        "packets that are not allowed arrive: {never:?}"
    );
    Ok(())
}

/// The policy of a host, real or simulated.
pub fn policy_of(etcd: &Etcd, name: &str, pair: &Pair) -> String {
    let settings = etcd.settings(&[DATABASE]);
    let floor = format!("{FLOOR}/32");
    let more = "protocol: udp, fleet: {widest: [/24, /64]}";
    let databases = [dedicated(DATABASE, PORT, &[&floor], more)];
    format!(
        "fleet: {{endpoints: {:?}, ca_file: {}, cert_file: {}, key_file: {}, host: {name}}}\n\
         ignore_interfaces: [etcd0]\n{}",
        settings.endpoints,
        etcd.authority.file().display(),
        pair.certificate.display(),
        pair.key.display(),
        policy("eth0", "native", &databases)
    )
}

/// A document as people write them, with one source that is not in the next one.
pub fn document(turn: usize) -> String {
    let mut text = String::from("rules:\n");
    for (number, cidr) in constant().enumerate() {
        writeln!(text, "  - cidr: {cidr}\n    label: office {number}").expect("write to a string");
    }
    let source = TURNS[turn % TURNS.len()];
    writeln!(text, "  - cidr: {source}/32\n    label: in turns").expect("write to a string");
    text
}

fn constant() -> impl Iterator<Item = String> {
    (0..CONSTANT).map(|third| format!("{}/24", Ipv4Addr::new(198, 18, third, 0)))
}
