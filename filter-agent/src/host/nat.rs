//! NAT rules of this host that lead packets from an unguarded port to a guarded one: such packets pass an interface's
//! filter as what they are when they arrive. Listed by the tools that made them.

use std::{collections::BTreeSet, io, ops::RangeInclusive, process::Command, str::FromStr as _};

use filter_common::Protocol;
use serde_json::Value;

use crate::policy::{Database, Policy};

/// A rule that changes the destination port.
#[derive(Debug, PartialEq)]
struct Redirect {
    protocol: Option<Protocol>,
    /// Ports before NAT; empty: all, or not understood.
    from: Vec<RangeInclusive<u16>>,
    /// Ports after NAT, each of which packets may get.
    to: RangeInclusive<u16>,
}

/// Warnings of rules by which a database is reached past its filter. Needs root.
pub fn warnings(policy: &Policy) -> Vec<String> {
    let mut redirects = Vec::new();
    let mut warnings = Vec::new();
    const NFT: &str = "nft --json list ruleset";
    // Not `-t nat`, which would have the kernel make that table. Where `iptables-save` is nftables' it does not list the
    // rules that the kernel keeps for the older tool.
    for command in [
        NFT,
        "iptables-save",
        "ip6tables-save",
        "iptables-legacy-save",
        "ip6tables-legacy-save",
    ] {
        let mut words = command.split(' ');
        let tool = words.next().unwrap_or_default();
        match Command::new(tool).args(words).output() {
            Ok(output) if output.status.success() => {
                let text = String::from_utf8_lossy(&output.stdout);
                match command {
                    NFT => match of_nftables(&text) {
                        Some(found) => redirects.extend(found),
                        None => warnings.push("NAT rules are unknown: nft prints no JSON".into()),
                    },
                    _ => redirects.extend(of_iptables(&text)),
                }
            }
            // Without the tool nobody makes such rules by it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Ok(output) => {
                let error = String::from_utf8_lossy(&output.stderr);
                let error = error.lines().next().unwrap_or_default().to_owned();
                warnings.push(format!("NAT rules are unknown: {tool}: {error}"));
            }
            Err(error) => warnings.push(format!("NAT rules are unknown: run {tool}: {error}")),
        }
    }
    let past: BTreeSet<String> = redirects
        .iter()
        .filter_map(|redirect| past_the_filter(redirect, policy))
        .collect();
    warnings.extend(past);
    warnings
}

fn past_the_filter(redirect: &Redirect, policy: &Policy) -> Option<String> {
    let guards = |database: &&Database, port: u16| {
        let is_meant = redirect
            .protocol
            .is_none_or(|protocol| protocol == database.protocol);
        is_meant && database.ports.contains(&port)
    };
    let mut databases = policy.databases.iter().filter_map(|database| {
        let mut to = redirect.to.clone();
        Some((database, to.find(|&port| guards(&database, port))?))
    });
    let (database, to) = databases.next()?;
    let is_guarded = |port: u16| {
        policy
            .databases
            .iter()
            .any(|database| guards(&database, port))
    };
    let from = redirect.from.iter().cloned();
    let open: Vec<String> = from
        .filter(|range| range.clone().any(|port| !is_guarded(port)))
        .map(|range| match range.start() == range.end() {
            true => range.start().to_string(),
            false => format!("{}-{}", range.start(), range.end()),
        })
        .collect();
    if open.is_empty() && !redirect.from.is_empty() {
        return None;
    }
    let open = if open.is_empty() {
        "other ports".into()
    } else {
        format!("port {}", open.join(", "))
    };
    Some(format!(
        "a NAT rule of this host leads packets from {open} to {to}, which is port {to} of database {}: they are not filtered \
         unless the ports before NAT are in `ports`",
        database.name
    ))
}

/// The rules in the JSON of `nft` (libnftables-json(5)). `None`: it is none. Rules whose target is not a plain port, such
/// as those of maps, are left out.
fn of_nftables(text: &str) -> Option<Vec<Redirect>> {
    let ruleset: Value = serde_json::from_str(text).ok()?;
    let objects = ruleset["nftables"].as_array().into_iter().flatten();
    let rules = objects.filter_map(|object| object["rule"]["expr"].as_array());
    Some(rules.filter_map(|statements| of_rule(statements)).collect())
}

fn of_rule(statements: &[Value]) -> Option<Redirect> {
    let to = statements.iter().find_map(|statement| {
        let target = ["redirect", "dnat"]
            .into_iter()
            .find_map(|name| statement.get(name));
        ports_of(&target?["port"])
    })?;
    let mut redirect = Redirect {
        protocol: None,
        from: Vec::new(),
        to,
    };
    for statement in statements {
        let matched = &statement["match"];
        let payload = &matched["left"]["payload"];
        if payload["field"] == "dport" && matched["op"] == "==" {
            redirect.protocol = protocol(payload["protocol"].as_str().unwrap_or_default());
            let right = &matched["right"];
            let ports = match right["set"].as_array() {
                Some(ports) => ports.as_slice(),
                None => std::slice::from_ref(right),
            };
            redirect.from.extend(ports.iter().filter_map(ports_of));
        }
    }
    Some(redirect)
}

/// `5432`, or `{"range": [5432, 5439]}`.
fn ports_of(value: &Value) -> Option<RangeInclusive<u16>> {
    let port = |value: &Value| u16::try_from(value.as_u64()?).ok();
    match value["range"].as_array().map(Vec::as_slice) {
        Some([first, last]) => Some(port(first)?..=port(last)?),
        _ => port(value).map(|port| port..=port),
    }
}

/// The rules that `iptables-save` prints: `-A DOCKER -p tcp -m tcp --dport 15432 -j DNAT --to-destination 172.17.0.2:5432`.
fn of_iptables(text: &str) -> Vec<Redirect> {
    let rules = text.lines().filter(|line| line.starts_with("-A "));
    rules.filter_map(of_line).collect()
}

fn of_line(line: &str) -> Option<Redirect> {
    let words: Vec<&str> = line.split_whitespace().collect();
    // A negated option names the ports that the rule leaves alone.
    let after = |option: &str| {
        let place = words.iter().position(|word| *word == option)?;
        let is_negated = place > 0 && words[place - 1] == "!";
        words.get(place + 1).copied().filter(|_| !is_negated)
    };
    let to = match after("-j")? {
        "REDIRECT" => after("--to-ports")?,
        "DNAT" => after("--to-destination")?.rsplit_once(':')?.1,
        _ => return None,
    };
    // `5432`, `5432-5439`, or `5432-5439/15432` with the port that the first is for.
    let to = to.split('/').next()?;
    let (first, last) = to.split_once('-').unwrap_or((to, to));
    let to = u16::from_str(first).ok()?..=u16::from_str(last).ok()?;
    let range = |text: &str| {
        let (first, last) = text.split_once(':').unwrap_or((text, text));
        Some(first.parse().ok()?..=last.parse().ok()?)
    };
    let from = after("--dport")
        .or_else(|| after("--dports"))
        .unwrap_or_default();
    Some(Redirect {
        protocol: after("-p").and_then(protocol),
        from: from.split(',').filter_map(range).collect(),
        to,
    })
}

fn protocol(name: &str) -> Option<Protocol> {
    Protocol::ALL
        .into_iter()
        .find(|protocol| protocol.name() == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::parse;

    const IPTABLES: &str = "*nat
:PREROUTING ACCEPT [0:0]
-A PREROUTING -p tcp -m tcp --dport 15432 -j REDIRECT --to-ports 5432
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 5433 -j DNAT --to-destination 172.17.0.2:5432
-A DOCKER -p udp -m udp --dport 53 -j DNAT --to-destination 172.17.0.3:53
-A X -p tcp -m multiport --dports 7000:7010,7020 -j DNAT --to-destination [fd00::2]:5432
-A Y -p tcp ! --dport 22 -j DNAT --to-destination 10.0.0.2:5432-5439
-A Z -p tcp -m tcp --dport 9000 -j DNAT --to-destination 10.0.0.2:5430-5439/9000
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
COMMIT
";

    fn redirect(protocol: Option<Protocol>, from: &[(u16, u16)], to: u16) -> Redirect {
        redirect_to(protocol, from, to..=to)
    }

    fn redirect_to(
        protocol: Option<Protocol>,
        from: &[(u16, u16)],
        to: RangeInclusive<u16>,
    ) -> Redirect {
        Redirect {
            protocol,
            from: from.iter().map(|&(first, last)| first..=last).collect(),
            to,
        }
    }

    #[test]
    fn rules_of_iptables_are_understood() {
        let tcp = Some(Protocol::Tcp);
        let expected = [
            redirect(tcp, &[(15432, 15432)], 5432),
            redirect(tcp, &[(5433, 5433)], 5432),
            redirect(Some(Protocol::Udp), &[(53, 53)], 53),
            redirect(tcp, &[(7000, 7010), (7020, 7020)], 5432),
            redirect_to(tcp, &[], 5432..=5439),
            redirect_to(tcp, &[(9000, 9000)], 5430..=5439),
        ];
        assert_eq!(of_iptables(IPTABLES), expected);
    }

    #[test]
    fn rules_of_nftables_are_understood() {
        let dport = |right: &str| {
            format!(
                r#"{{"match": {{"op": "==", "left": {{"payload": {{"protocol": "tcp", "field": "dport"}}}}, "right": {right}}}}}"#
            )
        };
        let rule =
            |statements: &str| format!(r#"{{"rule": {{"family": "ip", "expr": [{statements}]}}}}"#);
        let rules = [
            rule(&format!(
                r#"{}, {{"redirect": {{"port": 5432}}}}"#,
                dport("15432")
            )),
            rule(&format!(
                r#"{}, {{"dnat": {{"addr": "10.0.0.2", "port": 5432}}}}"#,
                dport(r#"{"set": [1, {"range": [2, 5]}]}"#)
            )),
            rule(r#"{"masquerade": null}"#),
            rule(r#"{"dnat": {"addr": "10.0.0.2", "port": {"range": [5430, 5439]}}}"#),
            rule(r#"{"dnat": {"addr": "10.0.0.2", "port": 5432}}"#),
        ];
        let text = format!(
            r#"{{"nftables": [{{"metainfo": {{}}}}, {}]}}"#,
            rules.join(",")
        );
        let tcp = Some(Protocol::Tcp);
        let expected = [
            redirect(tcp, &[(15432, 15432)], 5432),
            redirect(tcp, &[(1, 1), (2, 5)], 5432),
            redirect_to(None, &[], 5430..=5439),
            redirect(None, &[], 5432),
        ];
        assert_eq!(of_nftables(&text).unwrap(), expected);
        for damaged in [
            "",
            "{",
            r#"{"nftables": 7}"#,
            r#"{"nftables": [{"rule": {"expr": [7]}}]}"#,
        ] {
            assert!(of_nftables(damaged).unwrap_or_default().is_empty());
        }
    }

    #[test]
    fn only_rules_from_an_unguarded_port_to_a_guarded_one_are_warned_of() {
        let policy = parse(
            "interfaces: [eth0]\ndatabases: [{name: orders, ports: [5432, 5433], model: dedicated, force_tls: false}]\n",
        );
        let policy = policy.unwrap().0;
        let past = |redirect: &Redirect| past_the_filter(redirect, &policy);
        let tcp = Some(Protocol::Tcp);
        let warned = [
            redirect(tcp, &[(15432, 15432)], 5432),
            redirect(None, &[], 5432),
            redirect(tcp, &[(5433, 5434)], 5432),
            // Only the first port of a range was considered.
            redirect_to(tcp, &[(15432, 15432)], 5430..=5432),
        ];
        let expected = ["port 15432", "other ports", "port 5433-5434", "port 15432"];
        for (redirect, expected) in warned.iter().zip(expected) {
            let warning = past(redirect).unwrap();
            let expected = format!(
                "leads packets from {expected} to 5432, which is port 5432 of database orders"
            );
            assert!(warning.contains(&expected), "{warning}");
        }
        let silent = [
            redirect(tcp, &[(5433, 5433)], 5432),
            redirect(tcp, &[(15432, 15432)], 80),
            redirect(Some(Protocol::Udp), &[(15432, 15432)], 5432),
        ];
        for redirect in &silent {
            assert_eq!(past(redirect), None);
        }
    }
}
