//! The same policies enforced by the agent and by nftables, the same connections and datagrams sent
//! through both: the outcomes must be the same.

use std::{
    fmt::Write as _,
    fs,
    net::{IpAddr, SocketAddr, TcpListener},
    process::Command,
    thread,
};

use filter_common::Protocol;
use filter_tests::net::{
    ALLOWED4, ALLOWED6, Connection, DB4, DB6, DENIED4, DENIED6, EchoDatagrams, NEIGHBOURS, Net,
    OTHER_DB4, OTHER_DB6, Patience, Protected, exchange, policy, succeed,
};
use ipnet::IpNet;

/// Sources beside those that every client has.
const MORE_SOURCES: [&str; 12] = [
    "10.1.0.0",
    "10.1.255.255",
    "10.2.0.1",
    "203.0.113.255",
    "203.0.114.1",
    "198.51.100.128",
    "198.51.101.7",
    "fd01::1",
    "fd02::1",
    "2001:db8::ffff",
    "2001:db8:0:1::10",
    "2001:db9::1",
];

const ROUNDS: usize = 6;

struct Database {
    name: &'static str,
    protocol: Protocol,
    port: u16,
    addresses: Vec<IpAddr>,
    /// The regional network of a shared database, else rules and cluster.
    shared: bool,
    cluster: Vec<IpNet>,
    rules: Vec<IpNet>,
}

/// As `net::policy` writes it.
const REGIONAL: [&str; 2] = ["10.1.0.0/16", "fd01::/16"];

/// A prefix around one of the sources, of any length that leaves it a source.
fn prefix(random: &mut fastrand::Rng, sources: &[IpAddr]) -> IpNet {
    let source = sources[random.usize(..sources.len())];
    let length = match source {
        IpAddr::V4(_) => random.u8(0..=32),
        IpAddr::V6(_) => random.u8(0..=128),
    };
    IpNet::new(source, length).unwrap().trunc()
}

fn prefixes(random: &mut fastrand::Rng, sources: &[IpAddr], most: usize) -> Vec<IpNet> {
    let count = random.usize(..=most);
    let mut prefixes: Vec<_> = (0..count).map(|_| prefix(random, sources)).collect();
    prefixes.sort();
    prefixes.dedup();
    prefixes
}

fn databases(random: &mut fastrand::Rng, sources: &[IpAddr]) -> Vec<Database> {
    let mut database = |name, protocol, port, addresses: &[IpAddr]| Database {
        name,
        protocol,
        port,
        addresses: addresses.to_vec(),
        shared: random.u8(..4) == 0,
        cluster: prefixes(random, sources, 1),
        rules: prefixes(random, sources, 6),
    };
    vec![
        database("orders", Protocol::Tcp, 5432, &[]),
        database("names", Protocol::Udp, 5300, &[]),
        database("first", Protocol::Tcp, 6379, &[DB4.into(), DB6.into()]),
        database("second", Protocol::Tcp, 6379, &[OTHER_DB4.into()]),
    ]
}

impl Database {
    fn allowed(&self) -> Vec<IpNet> {
        let mut allowed = self.cluster.clone();
        if self.shared {
            allowed.extend(REGIONAL.map(|text| text.parse::<IpNet>().unwrap()));
        } else {
            allowed.extend(&self.rules);
        }
        allowed
    }

    fn yaml(&self) -> String {
        let list = |items: &mut dyn Iterator<Item = String>| items.collect::<Vec<_>>().join(", ");
        let quoted = |prefix: &IpNet| format!("'{prefix}'");
        let mut yaml = format!(
            "{{name: {}, port: {}, protocol: {}, force_tls: false, addresses: [{}], cluster: [{}], ",
            self.name,
            self.port,
            self.protocol.name(),
            list(&mut self.addresses.iter().map(|address| format!("'{address}'"))),
            list(&mut self.cluster.iter().map(quoted)),
        );
        if self.shared {
            yaml.push_str("model: shared}");
        } else {
            let rules = list(&mut self.rules.iter().map(|rule| format!("{{cidr: '{rule}'}}")));
            write!(yaml, "model: dedicated, rules: [{rules}]}}").unwrap();
        }
        yaml
    }

    fn nft(&self, ruleset: &mut String) {
        let family = |v4: bool| if v4 { "ip" } else { "ip6" };
        let port = format!("{} dport {}", self.protocol.name(), self.port);
        let locals: Vec<(bool, String)> = if self.addresses.is_empty() {
            vec![
                (true, "meta nfproto ipv4".into()),
                (false, "meta nfproto ipv6".into()),
            ]
        } else {
            let locals = self.addresses.iter().map(|local| {
                let v4 = local.is_ipv4();
                (v4, format!("{} daddr {local}", family(v4)))
            });
            locals.collect()
        };
        for (v4, local) in locals {
            for prefix in self
                .allowed()
                .iter()
                .filter(|prefix| prefix.addr().is_ipv4() == v4)
            {
                writeln!(
                    ruleset,
                    "add rule inet filter input {local} {} saddr {prefix} {port} accept",
                    family(v4)
                )
                .unwrap();
            }
            writeln!(ruleset, "add rule inet filter input {local} {port} drop").unwrap();
        }
    }

    fn protected(&self) -> Protected {
        Protected {
            protocol: self.protocol,
            port: self.port,
            addresses: self.addresses.clone(),
            allowed: self.allowed(),
        }
    }
}

/// Who connects and who gets an answer, in a fixed order.
fn outcomes(net: &Net, sources: &[IpAddr], patience: Patience) -> Vec<String> {
    let locals: [IpAddr; 4] = [DB4.into(), DB6.into(), OTHER_DB4.into(), OTHER_DB6.into()];
    let attempts: Vec<(IpAddr, SocketAddr)> = sources
        .iter()
        .flat_map(|&source| locals.map(|local| (source, local)))
        .filter(|(source, local)| source.is_ipv4() == local.is_ipv4())
        .flat_map(|(source, local)| {
            [5432, 6379, 6380].map(|port| (source, SocketAddr::new(local, port)))
        })
        .collect();
    let connections = net.connect_all(&attempts).into_iter().zip(&attempts);
    let connections = connections
        .map(|(outcome, (source, local))| format!("tcp from {source} to {local}: {outcome:?}"));
    let mut outcomes: Vec<String> = connections.collect();
    thread::scope(|scope| {
        let exchange = |&source: &IpAddr| {
            let local = if source.is_ipv4() {
                locals[0]
            } else {
                locals[1]
            };
            let client = &net.client;
            scope.spawn(move || {
                let destination = SocketAddr::new(local, 5300);
                let answered = client.run(|| exchange(source, destination, patience));
                format!("udp from {source}: {answered}")
            })
        };
        let threads: Vec<_> = sources.iter().map(exchange).collect();
        outcomes.extend(threads.into_iter().map(|thread| thread.join().unwrap()));
    });
    outcomes
}

/// Servers on a host behind a filter; those that accept TCP never answer more.
fn listen(net: &Net) -> ([TcpListener; 3], EchoDatagrams) {
    let streams = [5432, 6379, 6380].map(|port| net.listen(port));
    (streams, net.echo_datagrams(5300))
}

#[test]
fn the_same_policies_as_nftables_rules_have_the_same_outcomes() {
    let more = MORE_SOURCES.map(|text| text.parse::<IpAddr>().unwrap());
    let mut sources = vec![
        ALLOWED4.into(),
        ALLOWED6.into(),
        DENIED4.into(),
        DENIED6.into(),
    ];
    sources.extend(NEIGHBOURS);
    sources.extend(more);
    let mut filtered = Net::new("differential-agent");
    let reference = Net::new("differential-nft");
    for net in [&filtered, &reference] {
        for source in more {
            net.add_source(source);
        }
    }
    let _servers = (listen(&filtered), listen(&reference));
    let mut random = fastrand::Rng::with_seed(7);
    let mut seen = [0, 0];
    for round in 0..ROUNDS {
        let databases = databases(&mut random, &sources);
        let yaml: Vec<String> = databases.iter().map(Database::yaml).collect();
        let yaml = policy("eth0", "auto", &yaml);
        filtered.watch(&[]);
        if round == 0 {
            filtered.write_policy(&yaml);
            filtered.start();
        } else {
            filtered.reload(&yaml);
        }
        let protected: Vec<Protected> = databases.iter().map(Database::protected).collect();
        filtered.watch(&protected);

        let mut ruleset = String::from(
            "table inet filter {
                chain input { type filter hook input priority 0; }
            }
            flush chain inet filter input\n",
        );
        for database in &databases {
            database.nft(&mut ruleset);
        }
        let file = reference.dir().join("ruleset");
        fs::write(&file, &ruleset).unwrap();
        reference
            .db
            .run(|| succeed(Command::new("nft").arg("-f").arg(&file)));

        let both = |patience| {
            (
                outcomes(&filtered, &sources, patience),
                outcomes(&reference, &sources, patience),
            )
        };
        let (mut ours, mut theirs) = both(Patience::Short);
        if ours != theirs {
            // A server's thread on a busy machine may have been late.
            (ours, theirs) = both(Patience::Long);
        }
        for (ours, theirs) in ours.iter().zip(&theirs) {
            assert_eq!(ours, theirs, "round {round}\n{yaml}\n{ruleset}");
        }
        let accepted = format!("{:?}", Connection::Accepted);
        seen[0] += ours
            .iter()
            .filter(|outcome| outcome.ends_with(&accepted))
            .count();
        let silence = format!("{:?}", Connection::Silence);
        seen[1] += ours
            .iter()
            .filter(|outcome| outcome.ends_with(&silence))
            .count();
    }
    assert!(
        seen.iter().all(|&count| count > 200),
        "accepted and dropped: {seen:?}"
    );
}
