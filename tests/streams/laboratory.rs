//! A database host with every engine, the agent in front of them, and clients that send what they like.

use std::{
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use filter_tests::net::{Net, Polling, RawClient};
use serde_json::Value;

use crate::server::{Engine, Server};

/// Addresses that the policy allows and the client's kernel does not have.
pub const RAW4: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 66));
pub const RAW6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x66));

pub struct Laboratory {
    pub net: Net,
    mode: &'static str,
    _polling: Polling,
}

impl Laboratory {
    /// `name`: the test's. `mode`: how the agent attaches.
    pub fn new(name: &str, mode: &'static str) -> Self {
        Self::with(name, mode, "")
    }

    /// `more`: fields of each database.
    pub fn with(name: &str, mode: &'static str, more: &str) -> Self {
        let mut laboratory = Self::without_agent(name, mode);
        laboratory.net.write_policy(&laboratory.policy(more));
        laboratory.net.start();
        laboratory
    }

    /// Has the policy, and waits to be started.
    pub fn without_agent(name: &str, mode: &'static str) -> Self {
        let net = Net::new(&format!("streams-{name}-{mode}"));
        let polling = Polling::start(&net);
        let laboratory = Self {
            net,
            mode,
            _polling: polling,
        };
        laboratory.net.write_policy(&laboratory.policy(""));
        laboratory
    }

    pub fn policy(&self, more: &str) -> String {
        let mut text = format!("interfaces: [eth0]\nmode: {}\ndatabases:\n", self.mode);
        for engine in Engine::ALL {
            let cancel = match engine {
                Engine::PostgresqlWithoutCancel if !more.contains("force_tls: false") => {
                    "cancel_in_clear: false, "
                }
                _ => "",
            };
            writeln!(
                text,
                "  - {{name: db-{port}, port: {port}, engine: {name}, model: dedicated, cluster: \
                 [10.0.0.0/24, 'fd00::/64'], rules: [{{cidr: 203.0.113.0/24}}, \
                 {{cidr: '2001:db8::/64'}}], {cancel}{more}}}",
                port = engine.port(),
                name = engine.name()
            )
            .unwrap();
        }
        text
    }

    pub fn serve(&self, engine: Engine) -> Server {
        Server::start(&self.net.db, engine)
    }

    pub fn client(&self, address: IpAddr) -> RawClient {
        self.net.raw_client(address)
    }

    /// One of IPv4, one of IPv6.
    pub fn clients(&self) -> [RawClient; 2] {
        [RAW4, RAW6].map(|address| self.client(address))
    }

    /// The status of an engine's database.
    pub fn database(&self, engine: Engine) -> Value {
        let name = format!("db-{}", engine.port());
        let status = self.net.agent_json(&["status"]);
        let databases = status["databases"].as_array().unwrap();
        let found = databases.iter().find(|database| database["name"] == name);
        found.unwrap().clone()
    }

    /// Connections to an engine's port by what was decided of them.
    pub fn connections(&self, engine: Engine) -> Value {
        self.database(engine)["connections"].clone()
    }
}
