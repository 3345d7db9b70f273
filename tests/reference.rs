//! What the verdict on a frame should be: the design's table, rule by rule and slice by slice, with
//! no code, no map and no trick of the packet path.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use filter_agent::{
    policy::{Database, Model, Policy, Rule, Source},
    rules::{Regions, RuleKey},
    temporary::{Kind, Timed},
};
use filter_common::{Protocol, Reason};
use ipnet::IpNet;

use crate::frames::{
    AUTHENTICATION, DESTINATION_OPTIONS, FRAGMENT, HOP_BY_HOP, IPV4, IPV6, ROUTING, SERVICE_VLAN,
    TCP, UDP, VLAN,
};

const VLAN_TAGS: usize = 4;
const EXTENSION_HEADERS: usize = 8;

#[derive(Clone, Debug, PartialEq)]
pub struct Expected {
    pub pass: bool,
    /// `None` with a reason: aimed at no database in particular.
    pub database: Option<String>,
    /// `None`: no business of the filter's, not counted.
    pub reason: Option<Reason>,
    pub monitored: bool,
}

impl Expected {
    fn not_concerned() -> Self {
        Self {
            pass: true,
            database: None,
            reason: None,
            monitored: false,
        }
    }

    /// Where the packet is counted, as `Filter::counts` tells it.
    pub fn counter(&self) -> Option<(Option<String>, Reason, bool)> {
        Some((self.database.clone(), self.reason?, self.monitored))
    }
}

/// What can be told of a frame.
enum Content {
    /// Not IP, neither TCP nor UDP, or a fragment without ports.
    Other,
    /// It may be for any port of these protocols.
    Unclear(Reason, &'static [Protocol]),
    Segment {
        source: IpAddr,
        destination: IpAddr,
        protocol: Protocol,
        port: u16,
        source_routed: bool,
    },
}

use Content::{Other, Segment, Unclear};

pub fn verdict(policy: &Policy, regions: &Regions, frame: &[u8], timed: &Timed) -> Expected {
    match content(frame) {
        Other => Expected::not_concerned(),
        Unclear(reason, protocols) => {
            let may_be_for = |database: &&Database| protocols.contains(&database.protocol);
            let databases: Vec<_> = policy.databases.iter().filter(may_be_for).collect();
            refuse_for_any(&databases, reason)
        }
        Segment {
            source,
            destination,
            protocol,
            port,
            source_routed,
        } => {
            let databases = policy.databases.iter();
            let at_port: Vec<&Database> = databases
                .filter(|database| database.protocol == protocol && database.ports.contains(&port))
                .collect();
            let everywhere = at_port
                .iter()
                .find(|database| database.addresses.is_empty());
            if let Some(database) = everywhere {
                return judge(policy, regions, database, source, timed);
            }
            if at_port.is_empty() {
                return Expected::not_concerned();
            }
            if source_routed || is_for_many(destination) {
                let mut expected = refuse_for_any(&at_port, Reason::Destination);
                if let [database] = at_port[..] {
                    expected.database = Some(database.name.clone());
                }
                return expected;
            }
            let listens = |database: &&&Database| {
                let canonical = destination.to_canonical();
                database
                    .addresses
                    .iter()
                    .any(|address| address.to_canonical() == canonical)
            };
            match at_port.iter().find(listens) {
                Some(database) => judge(policy, regions, database, source, timed),
                None => Expected::not_concerned(),
            }
        }
    }
}

/// What may be for any of these databases is stopped unless all of them are only monitored.
fn refuse_for_any(databases: &[&Database], reason: Reason) -> Expected {
    let monitored = databases.iter().all(|database| database.monitor);
    match databases {
        [] => Expected::not_concerned(),
        _ => Expected {
            pass: monitored,
            database: None,
            reason: Some(reason),
            monitored,
        },
    }
}

fn judge(
    policy: &Policy,
    regions: &Regions,
    database: &Database,
    source: IpAddr,
    timed: &Timed,
) -> Expected {
    let temporary = |kind| {
        let mut rules = timed.temporary.iter();
        rules.any(|rule| {
            rule.kind == kind
                && rule.database == database.name
                && rule.end > timed.now.boot
                && rule.source.contains(&source)
        })
    };
    let is_in_force = |rule: &Rule, key: RuleKey| {
        rule.expires.is_none_or(|expires| {
            timed.ends.of(&database.name, &key, expires, timed.now) > timed.now.boot
        })
    };
    let holds = |rule: &Rule| {
        let held = |prefixes: &[IpNet]| prefixes.iter().any(|prefix| prefix.contains(&source));
        let inside = match &rule.source {
            Source::Cidr(prefix) => held(&[*prefix]),
            Source::Region(name) => held(&regions[name]),
        };
        inside && !held(&rule.except)
    };
    let is_member = database
        .cluster
        .iter()
        .any(|member| is_in_force(member, RuleKey::Member(member.source.clone())) && holds(member));
    let by_model = match &database.model {
        Model::Shared { internet } => {
            let mut regional = policy.regional_network.iter();
            *internet || regional.any(|prefix| prefix.contains(&source))
        }
        Model::Dedicated { rules } => rules
            .iter()
            .any(|rule| is_in_force(rule, RuleKey::Rule(rule.source.clone())) && holds(rule)),
    };
    let is_allowed = by_model || temporary(Kind::Allow);
    let reason = match (is_no_source(source), is_member, is_allowed) {
        (true, ..) => Reason::BadSource,
        (false, true, _) => Reason::Allowed,
        (false, false, true) if temporary(Kind::Block) => Reason::Blocked,
        (false, false, true) => Reason::Allowed,
        (false, false, false) => Reason::NotAllowed,
    };
    Expected {
        pass: reason == Reason::Allowed || database.monitor,
        database: Some(database.name.clone()),
        reason: Some(reason),
        monitored: database.monitor,
    }
}

/// RFC 6890: special addresses that no packet from another host carries as its source.
fn is_no_source(source: IpAddr) -> bool {
    match source {
        IpAddr::V4(source) => {
            source.octets()[0] == 0
                || source.is_loopback()
                || source.is_multicast()
                || source.is_broadcast()
        }
        IpAddr::V6(source) => {
            source.is_unspecified()
                || source.is_loopback()
                || source.is_multicast()
                || source.to_ipv4_mapped().is_some()
        }
    }
}

fn is_for_many(destination: IpAddr) -> bool {
    match destination {
        IpAddr::V4(destination) => destination.is_multicast() || destination.is_broadcast(),
        IpAddr::V6(destination) => destination.is_multicast(),
    }
}

const ANY: &[Protocol] = &Protocol::ALL;

fn number(bytes: &[u8]) -> u16 {
    u16::from_be_bytes([bytes[0], bytes[1]])
}

fn content(frame: &[u8]) -> Content {
    let mut rest = &frame[12..];
    for tags in 0.. {
        if rest.len() < 2 {
            return Unclear(Reason::Truncated, ANY);
        }
        match number(rest) {
            VLAN | SERVICE_VLAN if tags == VLAN_TAGS => return Unclear(Reason::VlanTags, ANY),
            VLAN | SERVICE_VLAN => rest = rest.get(4..).unwrap_or_default(),
            IPV4 => return ipv4(&rest[2..]),
            IPV6 => return ipv6(&rest[2..]),
            _ => return Other,
        }
    }
    unreachable!("every frame ends")
}

fn ipv4(rest: &[u8]) -> Content {
    if rest.len() < 20 {
        return Unclear(Reason::Truncated, ANY);
    }
    let version = rest[0] >> 4;
    let header_length = usize::from(rest[0] & 0x0f) * 4;
    let length = match usize::from(number(&rest[2..])) {
        // Segments that the network stack joined to more than the field can say.
        0 if rest.len() > 0xffff => 0xffff,
        length => length,
    };
    if version != 4 || header_length < 20 || length < header_length {
        return Unclear(Reason::BadHeader, ANY);
    }
    let offset = number(&rest[6..]) % 0x2000;
    let protocol = rest[9];
    if offset > 0 || ![TCP, UDP, AUTHENTICATION].contains(&protocol) {
        return Other;
    }
    if length > rest.len() {
        return Unclear(Reason::BadHeader, ANY);
    }
    let source: [u8; 4] = rest[12..16].try_into().expect("four bytes");
    let destination: [u8; 4] = rest[16..20].try_into().expect("four bytes");
    let options = &rest[20..header_length];
    transport(Walk {
        source: Ipv4Addr::from(source).into(),
        destination: Ipv4Addr::from(destination).into(),
        source_routed: options.contains(&131) || options.contains(&137),
        next: protocol,
        rest: &rest[header_length..length],
    })
}

fn ipv6(rest: &[u8]) -> Content {
    if rest.len() < 40 {
        return Unclear(Reason::Truncated, ANY);
    }
    if rest[0] >> 4 != 6 {
        return Unclear(Reason::BadHeader, ANY);
    }
    let length = usize::from(number(&rest[4..]));
    let next = rest[6];
    let payload = if length == 0 && next == HOP_BY_HOP {
        // A jumbogram: the length is in an option.
        &rest[40..]
    } else if length > rest.len() - 40 {
        return Unclear(Reason::BadHeader, ANY);
    } else {
        &rest[40..40 + length]
    };
    let source: [u8; 16] = rest[8..24].try_into().expect("16 bytes");
    let destination: [u8; 16] = rest[24..40].try_into().expect("16 bytes");
    transport(Walk {
        source: Ipv6Addr::from(source).into(),
        destination: Ipv6Addr::from(destination).into(),
        source_routed: false,
        next,
        rest: payload,
    })
}

/// A packet behind its IP header, cut to the length that this states.
struct Walk<'a> {
    source: IpAddr,
    destination: IpAddr,
    source_routed: bool,
    next: u8,
    rest: &'a [u8],
}

fn transport(mut walk: Walk) -> Content {
    let mut routing_header = false;
    for headers in 1.. {
        let v6 = walk.source.is_ipv6();
        let rest = walk.rest;
        let needed = if walk.next == AUTHENTICATION { 2 } else { 4 };
        let length = match walk.next {
            TCP => return ports(&walk, Protocol::Tcp, &[Protocol::Tcp]),
            UDP => return ports(&walk, Protocol::Udp, &[Protocol::Udp]),
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS | FRAGMENT if !v6 => return Other,
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS | FRAGMENT | AUTHENTICATION
                if rest.len() < needed =>
            {
                return Unclear(Reason::Truncated, ANY);
            }
            FRAGMENT if number(&rest[2..]) >> 3 != 0 => return Other,
            FRAGMENT => 8,
            AUTHENTICATION => (usize::from(rest[1]) + 2) * 4,
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => (usize::from(rest[1]) + 1) * 8,
            // A packet inside one with a routing header can be for this host (segment routing).
            4 | 41 if routing_header => return Unclear(Reason::ExtensionHeaders, ANY),
            _ => return Other,
        };
        if headers > EXTENSION_HEADERS {
            return Unclear(Reason::ExtensionHeaders, ANY);
        }
        routing_header |= walk.next == ROUTING;
        walk.source_routed |= walk.next == ROUTING && rest[3] > 0;
        walk.next = rest[0];
        walk.rest = rest.get(length..).unwrap_or_default();
    }
    unreachable!("every chain ends")
}

fn ports(walk: &Walk, protocol: Protocol, alone: &'static [Protocol]) -> Content {
    if walk.rest.len() < 4 {
        return Unclear(Reason::Truncated, alone);
    }
    Segment {
        source: walk.source,
        destination: walk.destination,
        protocol,
        port: number(&walk.rest[2..]),
        source_routed: walk.source_routed,
    }
}
