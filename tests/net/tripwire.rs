//! The tripwire's rules: which packets should never have arrived.

use std::{fmt::Write as _, net::IpAddr};

use filter_common::Protocol;
use ipnet::IpNet;

/// What the tripwire watches: packets to these ports from any source that is not allowed.
#[derive(Clone)]
pub struct Protected {
    pub protocol: Protocol,
    pub port: u16,
    /// Local addresses; empty: all.
    pub addresses: Vec<IpAddr>,
    pub allowed: Vec<IpNet>,
}

impl Protected {
    pub fn new(protocol: Protocol, port: u16, allowed: &[&str]) -> Self {
        let allowed = allowed.iter().map(|prefix| prefix.parse().unwrap());
        Self {
            protocol,
            port,
            addresses: Vec::new(),
            allowed: allowed.collect(),
        }
    }

    pub fn tcp(port: u16, allowed: &[&str]) -> Self {
        Self::new(Protocol::Tcp, port, allowed)
    }

    pub fn udp(port: u16, allowed: &[&str]) -> Self {
        Self::new(Protocol::Udp, port, allowed)
    }

    #[must_use]
    pub fn at(mut self, addresses: &[IpAddr]) -> Self {
        self.addresses = addresses.to_vec();
        self
    }
}

/// Returns the nft commands that make the tripwire watch these ports and no others. Its counter stays.
pub(super) fn ruleset(protected: &[Protected]) -> String {
    let mut ruleset = String::from(
        "table inet tripwire {
            counter foreign {}
            chain input { type filter hook input priority -300; }
        }
        flush chain inet tripwire input\n",
    );
    for Protected {
        protocol,
        port,
        addresses,
        allowed,
    } in protected
    {
        for (family, is_v4) in [("ip", true), ("ip6", false)] {
            let of_family = |list: Vec<String>| format!("{{ {} }}", list.join(", "));
            let everywhere = addresses.is_empty();
            let addresses: Vec<String> = addresses
                .iter()
                .filter(|address| address.is_ipv4() == is_v4)
                .map(ToString::to_string)
                .collect();
            let allowed: Vec<String> = IpNet::aggregate(allowed)
                .iter()
                .filter(|prefix| prefix.addr().is_ipv4() == is_v4)
                .map(ToString::to_string)
                .collect();
            if addresses.is_empty() && !everywhere {
                continue;
            }
            let local = match (everywhere, is_v4) {
                (true, true) => "meta nfproto ipv4".into(),
                (true, false) => "meta nfproto ipv6".into(),
                (false, _) => format!("{family} daddr {}", of_family(addresses)),
            };
            let foreign = if allowed.is_empty() {
                String::new()
            } else {
                format!("{family} saddr != {}", of_family(allowed))
            };
            let protocol = protocol.name();
            writeln!(
                ruleset,
                "add rule inet tripwire input {local} {foreign} {protocol} dport {port} \
                 counter name foreign"
            )
            .unwrap();
        }
    }
    ruleset
}
