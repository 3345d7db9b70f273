//! The lines of the traced programs, from numbers to words. Pure.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv6Addr},
};

use filter_common::{
    ANY_SLOT, BAD_SOURCE, Guard, NO_RULE, Name, Reason, RuleValue,
    steps::{Decision, LookedUp, Parsed, Stand},
};
use jiff::Timestamp;

use crate::{kernel::image::Image, report, rules::RuleKey};

const XDP_PASS: u64 = 2;

/// Names for the numbers in a line.
pub struct Names<'a> {
    pub image: &'a Image,
    /// The interfaces by index.
    pub interfaces: &'a BTreeMap<u32, String>,
}

impl Names<'_> {
    fn database(&self, slot: u16) -> Option<String> {
        let named = |(found, _): &&(u32, Name)| *found == u32::from(slot);
        let (_, name) = self.image.slots.iter().find(named)?;
        Some(name.text()?.to_owned())
    }

    fn rule(&self, id: u32) -> String {
        let place = self.image.rules.binary_search_by_key(&id, |&(id, _)| id);
        let name = place
            .ok()
            .and_then(|place| self.image.rules[place].1.text().map(str::to_owned));
        // A packet may have been judged just before a reload.
        name.map_or_else(
            || format!("{id}, removed since"),
            |text| RuleKey::describe(&text),
        )
    }
}

/// Reads a line that a traced program logged. `None`: it is of another form.
pub fn read(line: &str, at: Timestamp, names: &Names<'_>) -> Option<report::Traced> {
    let (kind, numbers) = line.split_once(' ')?;
    let numbers: Vec<u64> = numbers
        .split(' ')
        .map(str::parse)
        .collect::<Result<_, _>>()
        .ok()?;
    match (kind, numbers.as_slice()) {
        (
            "packet",
            &[
                a,
                b,
                c,
                d,
                version,
                interface,
                parsed,
                port,
                guard,
                looked_up,
                value,
                decision,
                why,
                action,
            ],
        ) => {
            let packet = Packet {
                from: From::new([a, b, c, d], version, interface, names),
                parsed: *Parsed::ALL.get(parsed as usize)?,
                port: port as u16,
                guard: Guard(guard as u32),
                looked_up: *LookedUp::ALL.get(looked_up as usize)?,
                value: value as u32,
                decision: *Decision::ALL.get(decision as usize)?,
                why: why as u32,
                passed: action == XDP_PASS,
            };
            packet.report(at, names)
        }
        (
            "segment",
            &[
                a,
                b,
                c,
                d,
                version,
                interface,
                port,
                guard,
                stand,
                place,
                length,
                reason,
                passes,
            ],
        ) => {
            let segment = Segment {
                from: From::new([a, b, c, d], version, interface, names),
                port: port as u16,
                guard: Guard(guard as u32),
                stand: *Stand::ALL.get(stand as usize)?,
                place,
                length,
                reason: *Reason::ALL.get(reason as usize)?,
                passed: passes != 0,
            };
            Some(segment.report(at, names))
        }
        _ => None,
    }
}

/// Where a packet comes from.
struct From {
    source: IpAddr,
    interface: Option<String>,
}

impl From {
    fn new(words: [u64; 4], version: u64, interface: u64, names: &Names<'_>) -> Self {
        let [[a, b, c, d], [e, f, g, h], [i, j, k, l], [m, n, o, p]] =
            words.map(|word| (word as u32).to_ne_bytes());
        let source = match version {
            4 => IpAddr::from([m, n, o, p]),
            _ => Ipv6Addr::from([a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]).into(),
        };
        let interface = names.interfaces.get(&(interface as u32)).cloned();
        Self { source, interface }
    }

    fn version(&self) -> &'static str {
        match self.source {
            IpAddr::V4(_) => "IPv4",
            IpAddr::V6(_) => "IPv6",
        }
    }
}

/// The steps of the program at the interfaces.
struct Packet {
    from: From,
    parsed: Parsed,
    port: u16,
    guard: Guard,
    looked_up: LookedUp,
    value: u32,
    decision: Decision,
    /// The number of a `Reason`, or of an ending.
    why: u32,
    passed: bool,
}

impl Packet {
    /// `None`: a reason that this agent does not know.
    fn report(&self, at: Timestamp, names: &Names<'_>) -> Option<report::Traced> {
        let reason = match self.decision {
            Decision::Dropped => Some(*Reason::ALL.get(self.why as usize)?),
            _ => None,
        };
        let database = names.database(self.guard.slot());
        let rule = self.rule(reason).map(|id| names.rule(id));
        let mut steps = vec![self.describe_headers()];
        match &database {
            Some(name) => steps[0].push_str(&format!(": database {name}")),
            None if self.decision == Decision::NotConcerned
                && self.parsed != Parsed::LaterFragment =>
            {
                steps[0].push_str(": no database");
            }
            None => {}
        }
        steps.extend(self.describe_source(reason, rule.as_deref()));
        steps.extend(self.describe_tls(reason));
        steps.push(self.describe_verdict(reason, database.as_deref()));
        let is_segment = matches!(self.parsed, Parsed::Tcp | Parsed::Udp);
        Some(report::Traced {
            at,
            source: self.from.source,
            interface: self.from.interface.clone(),
            at_socket: false,
            protocol: match self.parsed {
                Parsed::Tcp => Some("tcp".into()),
                Parsed::Udp => Some("udp".into()),
                _ => None,
            },
            port: is_segment.then_some(self.port),
            database,
            rule,
            reason: reason.map(|reason| reason.name().to_owned()),
            passed: self.passed,
            text: steps.join("; "),
        })
    }

    /// The rule that allows the source, or the block that holds it.
    fn rule(&self, reason: Option<Reason>) -> Option<u32> {
        let is_found = match self.decision {
            Decision::Allowed | Decision::Refused => true,
            Decision::Dropped => matches!(reason, Some(Reason::Blocked | Reason::TlsUnenforced)),
            Decision::NotConcerned => false,
        };
        is_found.then(|| RuleValue(self.value).rule())
    }

    fn describe_headers(&self) -> String {
        let version = self.from.version();
        match self.parsed {
            Parsed::Tcp => format!("{version} TCP to port {}", self.port),
            Parsed::Udp => format!("{version} UDP to port {}", self.port),
            Parsed::Other => format!("{version}, neither TCP nor UDP"),
            Parsed::LaterFragment => format!("{version}, a later fragment, which has no port"),
            Parsed::Unclear => {
                format!("{version}, headers that do not lead to a port: it may be for any database")
            }
        }
    }

    fn describe_source(&self, reason: Option<Reason>, rule: Option<&str>) -> Option<String> {
        let source = self.from.source;
        let looked_up = match self.looked_up {
            LookedUp::Nowhere => "",
            LookedUp::VerdictCache => " (as looked up before)",
            LookedUp::Bloom => " (near no allowed network)",
            LookedUp::Tries => " (looked up)",
        };
        match (rule, reason) {
            (Some(rule), Some(Reason::Blocked)) => {
                Some(format!("source {source}: {rule}{looked_up}"))
            }
            (Some(rule), _) => {
                let exempt = if RuleValue(self.value).is_exempt() && self.guard.engine() != 0 {
                    ", without TLS, too"
                } else {
                    ""
                };
                Some(format!(
                    "source {source}: allowed by {rule}{exempt}{looked_up}"
                ))
            }
            (None, Some(Reason::BadSource)) => {
                debug_assert_eq!(self.value, BAD_SOURCE);
                Some(format!("source {source}: an address that no host may have"))
            }
            (None, Some(Reason::NotAllowed)) => {
                debug_assert_eq!(self.value, NO_RULE);
                Some(format!("source {source}: no rule{looked_up}"))
            }
            (None, Some(Reason::Destination)) => Some(format!(
                "source {source}: which address it is for in the end is not known"
            )),
            (None, _) => Some(format!("source {source}")),
        }
    }

    fn describe_tls(&self, reason: Option<Reason>) -> Option<String> {
        let is_forced = self.guard.engine() != 0 && !RuleValue(self.value).is_exempt();
        let text = match (self.decision, reason) {
            (Decision::Allowed, _) if is_forced => "TLS is forced, which is judged at the socket",
            (Decision::Refused, _) => "its connection was refused, since it did not begin with TLS",
            (_, Some(Reason::TlsUnenforced)) => "TLS is forced, and nothing judges connections",
            (_, Some(Reason::TlsUnclear)) => "it begins a connection in fragments",
            _ => return None,
        };
        Some(text.into())
    }

    fn describe_verdict(&self, reason: Option<Reason>, database: Option<&str>) -> String {
        // The numbers of `answer::Ending` in the program.
        match (self.decision, self.why) {
            (Decision::Refused, 1) => return "answered with its end".into(),
            (Decision::Refused, 2) => return "passed on as a reset of the server's side".into(),
            (Decision::Refused, 3) => return "passed on without its data".into(),
            _ => {}
        }
        match reason {
            Some(reason) if self.passed => {
                let monitored = monitored(database);
                format!("passed, since {monitored}; else dropped: {}", reason.name())
            }
            Some(reason) => format!("dropped: {}", reason.name()),
            None if self.passed => "passed".into(),
            None => "dropped".into(),
        }
    }
}

fn monitored(database: Option<&str>) -> String {
    match database {
        Some(name) => format!("database {name} is only monitored"),
        None => "every database is only monitored".into(),
    }
}

/// The steps of the program at the sockets.
struct Segment {
    from: From,
    port: u16,
    guard: Guard,
    stand: Stand,
    place: u64,
    length: u64,
    reason: Reason,
    passed: bool,
}

impl Segment {
    fn report(&self, at: Timestamp, names: &Names<'_>) -> report::Traced {
        let database = match self.guard.slot() {
            ANY_SLOT => None,
            slot => names.database(slot),
        };
        let of = database
            .as_deref()
            .map(|name| format!(" of database {name}"));
        let (version, port) = (self.from.version(), self.port);
        let headers = format!(
            "{version} TCP at the socket{}, port {port}",
            of.unwrap_or_default()
        );
        let reason = Some(self.reason).filter(|&reason| reason != Reason::Allowed);
        let verdict = match reason {
            None => "passed".into(),
            Some(reason) if self.passed => {
                let monitored = match &database {
                    Some(name) => format!("TLS is only monitored at database {name}"),
                    None => monitored(None),
                };
                format!("passed, since {monitored}; else refused: {}", reason.name())
            }
            Some(reason @ Reason::TlsUnclear) => {
                format!("dropped until it comes again: {}", reason.name())
            }
            Some(reason) => format!("refused: {}", reason.name()),
        };
        let source = format!("source {}", self.from.source);
        report::Traced {
            at,
            source: self.from.source,
            interface: self.from.interface.clone(),
            at_socket: true,
            protocol: Some("tcp".into()),
            port: Some(port),
            database,
            rule: None,
            reason: reason.map(|reason| reason.name().to_owned()),
            passed: self.passed,
            text: [headers, source, self.describe_bytes(reason), verdict].join("; "),
        }
    }

    fn describe_bytes(&self, reason: Option<Reason>) -> String {
        let last = (self.place + self.length).saturating_sub(1);
        let bytes = format!("bytes {} to {last} of the connection", self.place);
        match (self.stand, reason) {
            (_, Some(Reason::NoProxyHeader)) => format!("{bytes} are no PROXY header"),
            (Stand::Handshake, None) => "the handshake, without data".into(),
            (Stand::Handshake, Some(_)) => "data within the handshake that cannot be judged".into(),
            (Stand::Beginning, None) => format!("{bytes} are a beginning of TLS so far"),
            (Stand::Beginning, Some(Reason::NotTls)) => format!("{bytes} do not begin TLS"),
            (Stand::Beginning, Some(_)) => format!("{bytes} cannot be judged"),
            (Stand::Begun, _) => format!("{bytes}: it begins with TLS"),
            (Stand::Later, None) => "past its beginning".into(),
            (Stand::Later, Some(_)) => "from before TLS was forced, and no TLS record".into(),
            (Stand::Unknown, _) => "where it stands in its connection cannot be told".into(),
        }
    }
}

#[cfg(test)]
mod tests;
