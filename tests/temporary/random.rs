//! Changes at random, under clients that must never notice and one that must never get in.

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::IpAddr,
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use filter_tests::net::{ALLOWED4, DENIED4, Hammer, NEIGHBOURS, Net, Protected, wait_until};
use ipnet::IpNet;
use serde_json::{Value, json};

use crate::host::{ALLOWED, DB, MEMBER, PORT, connected, explain, orders, temporary};

const CHANGES: u32 = 1_000;
/// Time after which a slow machine makes no more of them.
const LIMIT: Duration = Duration::from_secs(30);

/// Networks and hosts that are allowed and blocked. None holds `DENIED4`.
const NETWORKS: [&str; 12] = [
    "203.0.112.0/24",
    "203.0.113.8/31",
    "203.0.113.128/25",
    "203.0.113.0/24",
    "203.0.113.8/29",
    "203.0.113.8/30",
    "203.0.113.10/31",
    MEMBER,
    ALLOWED,
    "203.0.113.12/32",
    "203.0.112.0/22",
    "192.0.2.0/28",
];

/// Those that are allowed and blocked for a second. Their verdicts are not asked for.
const BRIEF: [&str; 3] = ["198.18.0.0/24", "198.18.0.0/23", "198.18.0.7/32"];

/// Sources whose verdict is compared with the model's.
const ASKED: [&str; 7] = [
    "203.0.113.9",
    "203.0.113.10",
    "203.0.113.11",
    "203.0.113.12",
    "203.0.113.200",
    "203.0.112.1",
    "192.0.2.3",
];

/// Sources that were allowed or blocked, and not revoked.
#[derive(Default)]
struct Model {
    rules: BTreeSet<(&'static str, &'static str)>,
}

impl Model {
    fn holds(&self, action: &str, source: IpAddr) -> bool {
        self.rules.iter().any(|(found, network)| {
            let network: IpNet = network.parse().unwrap();
            *found == action && network.contains(&source)
        })
    }

    fn passes(&self, source: &str) -> bool {
        let source: IpAddr = source.parse().unwrap();
        let is_member = MEMBER.parse::<IpNet>().unwrap().contains(&source);
        let in_file = ALLOWED.parse::<IpNet>().unwrap().contains(&source);
        let is_blocked = self.holds("block", source);
        is_member || !is_blocked && (in_file || self.holds("allow", source))
    }
}

/// Whether the agent did what it was asked for, by its socket: faster than a command.
fn change(net: &Net, change: &Value) -> bool {
    let body = change.to_string();
    let mut stream = UnixStream::connect(net.socket()).unwrap();
    let length = body.len();
    let head = format!("POST /v1/temporary HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n");
    stream
        .write_all(format!("{head}Connection: close\r\n\r\n{body}").as_bytes())
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let done = answer.starts_with("HTTP/1.1 200");
    let nothing = [
        "has no temporary rule and no block of",
        "is a rule of the policy file",
    ]
    .iter()
    .any(|text| answer.contains(text));
    assert!(done || nothing, "{change}: {answer}");
    assert!(
        !done || answer.contains("\"errors\":[]"),
        "{change}: {answer}"
    );
    done
}

#[test]
fn changes_at_random_neither_touch_nor_let_in_anybody_else() {
    let policy = orders(&[ALLOWED], &format!("cluster: [{MEMBER}]"));
    let watched = ["203.0.112.0/22", "192.0.2.0/28"];
    let net = Net::enforcing("random", &[Protected::tcp(PORT, &watched)], &policy);
    let _echo = net.echo(PORT);
    // Blocks hold the member of the cluster, which they do not touch, and never the other source.
    let steady = [NEIGHBOURS[0], ALLOWED4.into()];
    let allowed = Hammer::allowed(&net.client, &steady.map(|source| (source, DB)));
    let denied = Hammer::denied(&net.client, &[(DENIED4.into(), DB)]);
    let mut clients = steady.map(|source| connected(&net, source));
    let begun = Instant::now();
    let mut random = fastrand::Rng::with_seed(18);
    let mut model = Model::default();
    let mut made = 0;
    while made < CHANGES && (begun.elapsed() < LIMIT || made < 100) {
        let network = random.choice(NETWORKS).unwrap();
        let holds_steady = network
            .parse::<IpNet>()
            .unwrap()
            .contains(&IpAddr::V4(ALLOWED4));
        let seconds = random.u32(3600..7200);
        let wanted = json!({"database": "orders", "source": network, "seconds": seconds});
        match random.u32(0..3) {
            0 => {
                assert!(change(&net, &json!({ "allow": wanted })));
                model.rules.insert(("allow", network));
            }
            1 if !holds_steady && network != MEMBER => {
                assert!(change(&net, &json!({ "block": wanted })));
                model.rules.insert(("block", network));
            }
            _ => {
                let revoke = json!({"database": "orders", "source": network});
                let before = model.rules.len();
                model.rules.retain(|(_, found)| *found != network);
                let is_there = model.rules.len() < before;
                assert_eq!(
                    change(&net, &json!({ "revoke": revoke })),
                    is_there,
                    "{network}"
                );
            }
        }
        if random.u32(0..20) == 0 {
            let source = random.choice(BRIEF).unwrap();
            let action = random.choice(["allow", "block"]).unwrap();
            let wanted = json!({"database": "orders", "source": source, "seconds": 1});
            assert!(change(&net, &json!({ action: wanted })));
        }
        made += 1;
        for client in &mut clients {
            client.assert_alive();
        }
        if made % 50 == 0 {
            for source in ASKED {
                let expected = model.passes(source);
                assert_eq!(
                    explain(&net, source)["passes"],
                    expected,
                    "{made}: {source}"
                );
            }
            let listed = temporary(&net);
            let is_brief = |rule: &&Value| BRIEF.contains(&rule["source"].as_str().unwrap());
            let brief = listed.iter().filter(is_brief).count();
            assert_eq!(listed.len() - brief, model.rules.len());
        }
    }
    eprintln!("{made} changes in {:?}", begun.elapsed());
    let status = net.agent_json(&["status", "--verify"]);
    assert_eq!(status["errors"], json!([]));
    let networks = model.rules.iter().map(|(_, network)| *network);
    for network in networks.collect::<BTreeSet<_>>() {
        let revoke = json!({"database": "orders", "source": network});
        assert!(change(&net, &json!({ "revoke": revoke })));
    }
    assert!(
        wait_until(|| temporary(&net).is_empty()),
        "a rule outlives its end"
    );
    for source in ASKED {
        let expected = Model::default().passes(source);
        assert_eq!(explain(&net, source)["passes"], expected, "{source}");
    }
    assert_eq!(
        net.agent_json(&["plan"])["difference"]["databases"],
        json!({})
    );
    assert!(wait_until(|| !net
        .state_dir()
        .join("temporary.json")
        .exists()));
    for client in &mut clients {
        client.assert_alive();
    }
    assert!(allowed.attempts() > 0 && denied.attempts() > 0);
    allowed.stop();
    denied.stop();
}
