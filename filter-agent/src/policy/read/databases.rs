//! Reads the databases that a policy file protects, and their rules.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use filter_common::{Engine, MAX_LOCALS, MAX_RULES, Protocol};
use ipnet::IpNet;
use jiff::{Timestamp, civil};
use serde::Deserialize;
use serde_yaml::Value;

use crate::{
    policy::{
        checked::{Database, Model, OnRemoval, Rule, Source, Tls},
        prefix::{parse_cidr, without},
        read::{
            fleet::RawFromFleet,
            reader::{At, Reader, check_name},
        },
        region::Region,
    },
    text::is_control,
};

/// Longest label of a rule, in characters.
const MAX_LABEL: usize = 100;

/// Exceptions of one rule.
const MAX_EXCEPTIONS: usize = 30;

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawProtocol {
    Tcp,
    Udp,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawModel {
    Dedicated,
    Shared,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawDatabase {
    pub(super) name: String,
    port: Option<i64>,
    ports: Option<Vec<i64>>,
    protocol: Option<RawProtocol>,
    addresses: Option<Vec<String>>,
    engine: Option<RawEngine>,
    model: RawModel,
    force_tls: Option<bool>,
    tls_unenforced: Option<Unenforced>,
    cancel_in_clear: Option<bool>,
    proxy_protocol: Option<ProxyProtocol>,
    monitor: Option<RawMonitor>,
    on_removal: Option<OnRemoval>,
    cluster: Option<Vec<RawMember>>,
    rules: Option<Vec<Value>>,
    internet: Option<bool>,
    fleet: Option<RawFromFleet>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawEngine {
    Postgresql,
    Mysql,
    Redis,
    Mongodb,
    Sqlserver,
    Other,
}

impl From<RawEngine> for Engine {
    fn from(engine: RawEngine) -> Self {
        match engine {
            RawEngine::Postgresql => Self::Postgresql,
            RawEngine::Mysql => Self::Mysql,
            RawEngine::Redis => Self::Redis,
            RawEngine::Mongodb => Self::Mongodb,
            // Reported where it is read.
            RawEngine::Sqlserver | RawEngine::Other => Self::Other,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRule {
    cidr: Option<String>,
    region: Option<String>,
    #[serde(default)]
    except: Vec<String>,
    label: Option<String>,
    expires: Option<String>,
}

/// `10.1.2.3/32`, or as a rule: `{cidr: 10.1.2.3/32, label: replica}`.
#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "expected a prefix, or a rule such as `{cidr: 10.1.2.3/32, label: replica}`"
)]
enum RawMember {
    Prefix(String),
    Rule(RawRule),
}

#[derive(Clone, Copy, Deserialize)]
#[serde(untagged, expecting = "expected `true`, `false` or `tls`")]
enum RawMonitor {
    Everything(bool),
    Part(Monitored),
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Monitored {
    Tls,
}

/// State of a database's ports where TLS cannot be enforced.
#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Unenforced {
    Close,
    Allow,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ProxyProtocol {
    Required,
}

/// # Errors
/// The label is too long, or holds a control character.
pub fn check_label(label: &str) -> Result<(), String> {
    if label.chars().count() > MAX_LABEL || label.contains(is_control) {
        return Err(format!(
            "a label has at most {MAX_LABEL} characters, none a control character"
        ));
    }
    Ok(())
}

/// An instant (RFC 3339). The last days of the year 9999, which mean never, are past what can be computed with: the last
/// instant before them is as good.
pub(super) fn instant(text: &str) -> Option<Timestamp> {
    let last = || {
        let date: civil::DateTime = text.strip_suffix(['Z', 'z'])?.parse().ok()?;
        (date.year() == 9999).then_some(Timestamp::MAX)
    };
    text.parse().ok().or_else(last)
}

impl Reader<'_> {
    pub(super) fn database(
        &mut self,
        at: &At,
        raw: RawDatabase,
        regions: &BTreeMap<String, Region>,
        regional_network: &[IpNet],
    ) -> Option<Database> {
        if let Err(message) = check_name(&raw.name) {
            self.problem(&at.key("name"), message);
        }
        let ports = self.ports(at, raw.port, raw.ports);
        let protocol = match raw.protocol {
            None | Some(RawProtocol::Tcp) => Protocol::Tcp,
            Some(RawProtocol::Udp) => Protocol::Udp,
        };
        let addresses = self.addresses(at, raw.addresses.unwrap_or_default());
        let cluster = self.cluster(at, raw.cluster.unwrap_or_default(), regions);
        if matches!(raw.engine, Some(RawEngine::Sqlserver)) {
            let message = "engine: SQL Server begins TLS inside its own packets, which cannot be judged; where it uses \
                           TDS 8.0 (`Encrypt=Strict`), which begins with TLS, write `engine: other`; else let the \
                           server force encryption, and write `force_tls: false`";
            self.problem(&at.key("engine"), message);
        }
        let tcp = protocol == Protocol::Tcp;
        let by_default = tcp && matches!(raw.model, RawModel::Dedicated);
        let force_tls = raw.force_tls.unwrap_or(by_default);
        let monitors_tls = matches!(raw.monitor, Some(RawMonitor::Part(_)));
        let mut tls = None;
        if force_tls && !tcp {
            self.problem(&at.key("force_tls"), "TLS cannot be forced on udp");
        } else if force_tls {
            match raw.engine {
                None => {
                    let message = match raw.force_tls {
                        Some(_) => "force_tls needs `engine`: how TLS begins depends on it",
                        None => {
                            "`engine` is missing: TLS is forced on a dedicated database, and how \
                             it begins depends on the engine (`force_tls: false` does not force it)"
                        }
                    };
                    self.problem(at, message);
                }
                Some(engine) => {
                    tls = Some(Tls {
                        engine: engine.into(),
                        cancel_in_clear: raw.cancel_in_clear.unwrap_or(true),
                        open_unenforced: monitors_tls
                            || raw.tls_unenforced == Some(Unenforced::Allow),
                        monitor: monitors_tls,
                        proxied: raw.proxy_protocol.is_some(),
                    });
                }
            }
        }
        if monitors_tls && !force_tls {
            let message = "monitor: tls is for databases where TLS is forced";
            self.problem(&at.key("monitor"), message);
        }
        if raw.tls_unenforced.is_some() && !force_tls {
            let message = "tls_unenforced is for databases where TLS is forced";
            self.problem(&at.key("tls_unenforced"), message);
        }
        if raw.proxy_protocol.is_some() && !force_tls {
            let message = "proxy_protocol is for databases where TLS is forced";
            self.problem(&at.key("proxy_protocol"), message);
        }
        if raw.on_removal.is_some() && !tcp {
            let message = "on_removal is for databases on tcp: udp has no connections";
            self.problem(&at.key("on_removal"), message);
        }
        let postgresql = matches!(raw.engine, Some(RawEngine::Postgresql));
        if raw.cancel_in_clear.is_some() && !(force_tls && postgresql) {
            let message = "cancel_in_clear is for postgresql databases where TLS is forced";
            self.problem(&at.key("cancel_in_clear"), message);
        }
        let is_dedicated = matches!(raw.model, RawModel::Dedicated);
        let fleet = self.fleet_of_database(at, raw.fleet, is_dedicated, regions);
        let model = match raw.model {
            RawModel::Dedicated => {
                if raw.internet.is_some() {
                    let message = "internet is for shared databases: a dedicated one is opened by \
                                   rules";
                    self.problem(&at.key("internet"), message);
                }
                let rules = self.rules(at, raw.rules.unwrap_or_default(), regions);
                if fleet.is_some() && rules.len() >= MAX_RULES {
                    let message = format!("{MAX_RULES} rules: none is left to the fleet");
                    self.warn(&at.key("rules"), message);
                } else if fleet.is_some() {
                    // Documents open it: none is looked at here.
                } else if rules.is_empty() && cluster.is_empty() {
                    self.warn(at, "no rules: nobody may reach it");
                } else if rules.is_empty() {
                    self.warn(at, "no rules: only its cluster may reach it");
                }
                Model::Dedicated { rules }
            }
            RawModel::Shared => {
                if raw.rules.is_some() {
                    let message = "rules are for dedicated databases: a shared one has no source \
                                   filtering";
                    self.problem(&at.key("rules"), message);
                }
                let internet = raw.internet.unwrap_or_default();
                if internet && !force_tls {
                    let message = "internet: true needs force_tls: true";
                    self.problem(&at.key("internet"), message);
                }
                if !internet && regional_network.is_empty() {
                    self.warn(at, "`regional_network` is not set: nobody may reach it");
                }
                Model::Shared { internet }
            }
        };
        Some(Database {
            name: raw.name,
            protocol,
            ports: ports?,
            addresses,
            model,
            tls,
            monitor: matches!(raw.monitor, Some(RawMonitor::Everything(true))),
            on_removal: raw.on_removal.unwrap_or_default(),
            cluster,
            fleet,
        })
    }

    fn ports(&mut self, at: &At, port: Option<i64>, ports: Option<Vec<i64>>) -> Option<Vec<u16>> {
        let (numbers, at) = match (port, ports) {
            (Some(port), None) => (vec![port], at.key("port")),
            (None, Some(ports)) if !ports.is_empty() => (ports, at.key("ports")),
            _ => {
                self.problem(at, "exactly one of port and ports is needed");
                return None;
            }
        };
        let mut ports = BTreeSet::new();
        for number in numbers {
            match u16::try_from(number) {
                Ok(0) | Err(_) => {
                    self.problem(&at, format!("port {number} is not between 1 and 65535"));
                }
                Ok(port) if !ports.insert(port) => {
                    self.problem(&at, format!("port {port} is listed twice"));
                }
                Ok(_) => {}
            }
        }
        Some(ports.into_iter().collect())
    }

    fn addresses(&mut self, at: &At, texts: Vec<String>) -> Vec<IpAddr> {
        let list = at.key("addresses");
        let mut addresses = Vec::new();
        for (index, text) in texts.iter().enumerate() {
            let at = list.index(index);
            let Ok(address) = text.parse::<IpAddr>() else {
                let message = format!("{text:?} is not an IP address (without a prefix length)");
                self.problem(&at, message);
                continue;
            };
            let broadcast = matches!(address, IpAddr::V4(v4) if v4.is_broadcast());
            if address.is_unspecified() || address.is_multicast() || broadcast {
                self.problem(
                    &at,
                    format!("{address} is not an address that a database can have"),
                );
            } else if address.to_canonical() != address {
                let v4 = address.to_canonical();
                self.problem(&at, format!("{address} is IPv4: write {v4}"));
            } else if addresses.contains(&address) {
                self.problem(&at, format!("{address} is listed twice"));
            } else {
                addresses.push(address);
            }
        }
        addresses
    }

    fn rules(
        &mut self,
        at: &At,
        values: Vec<Value>,
        regions: &BTreeMap<String, Region>,
    ) -> Vec<Rule> {
        let list = at.key("rules");
        if values.len() > MAX_RULES {
            let message = format!("{} rules; at most {MAX_RULES}", values.len());
            self.problem(&list, message);
        }
        self.listed(&list, values, regions)
    }

    /// The rules of a list, of a database or of a document.
    pub(super) fn listed(
        &mut self,
        list: &At,
        values: Vec<Value>,
        regions: &BTreeMap<String, Region>,
    ) -> Vec<Rule> {
        let mut rules = Vec::new();
        for (index, value) in values.into_iter().enumerate() {
            let mut at = list.index(index);
            at.rule = Some(index + 1);
            if let Some(raw) = self.shape::<RawRule>(&at, "", value) {
                rules.push((at, raw));
            }
        }
        self.allowed(rules, regions)
    }

    /// The members of a cluster.
    fn cluster(
        &mut self,
        at: &At,
        members: Vec<RawMember>,
        regions: &BTreeMap<String, Region>,
    ) -> Vec<Rule> {
        let list = at.key("cluster");
        let mut rules = Vec::new();
        for (index, member) in members.into_iter().enumerate() {
            let at = list.index(index);
            let raw = match member {
                RawMember::Rule(rule) => rule,
                RawMember::Prefix(text) => match parse_cidr(&text) {
                    Ok(_) => RawRule {
                        cidr: Some(text),
                        region: None,
                        except: Vec::new(),
                        label: None,
                        expires: None,
                    },
                    Err(message) => {
                        self.problem(&at, message);
                        continue;
                    }
                },
            };
            let region = raw.region.as_ref().and_then(|name| regions.get(name));
            if region.is_some_and(|region| !region.is_written_by_hand()) {
                let message = "of regions only those of a file or of prefixes may be in a cluster: it is exempt from \
                               forced TLS, and must not follow what others publish";
                self.problem(&at.key("region"), message);
            }
            rules.push((at, raw));
        }
        self.allowed(rules, regions)
    }

    /// Checks what is allowed, by rules or as members of a cluster.
    fn allowed(
        &mut self,
        raw: Vec<(At, RawRule)>,
        regions: &BTreeMap<String, Region>,
    ) -> Vec<Rule> {
        let mut sources: BTreeMap<Source, usize> = BTreeMap::new();
        let mut rules = Vec::new();
        for (number, (at, raw)) in (1..).zip(raw) {
            let label = raw.label.as_deref().unwrap_or_default();
            if let Err(message) = check_label(label) {
                self.problem(&at.key("label"), message);
            }
            let mut expires = None;
            if let Some(text) = &raw.expires {
                expires = instant(text);
                if expires.is_none() {
                    let message = format!(
                        "expires: {text:?} is not a valid time, such as 2026-12-31T18:00:00Z"
                    );
                    self.problem(&at.key("expires"), message);
                }
            }
            let Some(source) = self.source(&at, raw.cidr, raw.region, regions) else {
                continue;
            };
            if let Some(first) = sources.get(&source) {
                let message = match at.rule {
                    Some(_) => format!("{source} is allowed by rule {first} already"),
                    None => format!("{source} is listed twice"),
                };
                self.problem(&at, message);
            }
            sources.entry(source.clone()).or_insert(number);
            let except = self.except(&at, &source, &raw.except);
            rules.push(Rule {
                source,
                except,
                label: raw.label,
                expires,
            });
        }
        rules
    }

    /// The exceptions of a rule, each inside its prefix; what a region holds changes.
    fn except(&mut self, at: &At, source: &Source, texts: &[String]) -> Vec<IpNet> {
        let list = at.key("except");
        if texts.len() > MAX_EXCEPTIONS {
            let message = format!("{} exceptions; at most {MAX_EXCEPTIONS}", texts.len());
            self.problem(&list, message);
            // To take out thousands takes minutes.
            return Vec::new();
        }
        let mut except = Vec::new();
        for (index, text) in texts.iter().enumerate() {
            match (parse_cidr(text), source) {
                (Ok(hole), Source::Cidr(prefix)) if !prefix.contains(&hole) => {
                    let message = format!("{hole} is not inside {prefix}");
                    self.problem(&list.index(index), message);
                }
                (Ok(hole), _) => except.push(hole),
                (Err(message), _) => self.problem(&list.index(index), message),
            }
        }
        if let Source::Cidr(prefix) = source
            && without(&[*prefix], &except).is_empty()
        {
            self.problem(&list, format!("nothing is left of {prefix}"));
        }
        except
    }

    fn source(
        &mut self,
        at: &At,
        cidr: Option<String>,
        region: Option<String>,
        regions: &BTreeMap<String, Region>,
    ) -> Option<Source> {
        match (cidr, region) {
            (Some(text), None) => match parse_cidr(&text) {
                Ok(prefix) => Some(Source::Cidr(prefix)),
                Err(message) => {
                    self.problem(&at.key("cidr"), message);
                    None
                }
            },
            (None, Some(name)) => {
                if !regions.contains_key(&name) {
                    let known: Vec<&str> = regions.keys().map(String::as_str).collect();
                    let known = known.join(", ");
                    let place = if at.rule.is_none() { "cluster: " } else { "" };
                    let message =
                        format!("{place}no region {name:?} is defined; there are {known}");
                    self.problem(&at.key("region"), message);
                    return None;
                }
                Some(Source::Region(name))
            }
            _ => {
                self.problem(at, "exactly one of cidr and region is needed");
                None
            }
        }
    }

    /// Refuses databases that claim the same port of the same address.
    pub(super) fn overlaps(&mut self, databases: &[(At, Database)]) {
        let mut claims: BTreeMap<(Protocol, u16), Vec<&Database>> = BTreeMap::new();
        let mut locals = 0;
        for (at, database) in databases {
            locals += database.ports.len() * database.addresses.len();
            for &port in &database.ports {
                let others = claims.entry((database.protocol, port)).or_default();
                for other in others.iter() {
                    let shared = |address: &&IpAddr| other.addresses.contains(address);
                    let shared = database.addresses.iter().find(shared);
                    let whose = match shared {
                        Some(address) => format!("at {address}"),
                        None if database.addresses.is_empty() || other.addresses.is_empty() => {
                            "at every address: give both `addresses`".into()
                        }
                        None => continue,
                    };
                    let protocol = database.protocol.name();
                    let message = format!(
                        "{protocol} port {port} is claimed by {} too, {whose}",
                        other.name
                    );
                    self.problem(at, message);
                }
                others.push(database);
            }
        }
        if locals > MAX_LOCALS as usize {
            let message = format!("{locals} ports of addresses; at most {MAX_LOCALS}");
            self.problem(&At::top("databases"), message);
        }
    }
}
