//! YAML text to a checked `Policy`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use filter_common::{
    DEFAULT_TLS_CONNECTIONS, Engine, MAX_DATABASES, MAX_LOCALS, MAX_NAME, MAX_RULES, Protocol,
};
use glob::Pattern;
use ipnet::{IpNet, Ipv4Net};
use jiff::{SignedDuration, Span, SpanRelativeTo, Timestamp};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{self, DeserializeOwned, DeserializeSeed, MapAccess, SeqAccess, Visitor},
};
use serde_json_path::JsonPath;
use serde_yaml::{Mapping, Value};

/// A policy that holds: every name resolves, every number is in range, no two databases claim the
/// same port of the same address. Only `parse` makes one.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    pub interfaces: Vec<Listed>,
    pub mode: Mode,
    /// The built-in regions included.
    pub regions: BTreeMap<String, Region>,
    /// What "the regional network" means for shared databases.
    pub regional_network: Vec<IpNet>,
    /// How many connections with forced TLS are followed at once.
    pub tls_connections: u32,
    pub databases: Vec<Database>,
    /// Databases (by name) and interfaces (`interface eth1`) whose protection this policy may end when it
    /// takes another's place.
    pub unprotected: BTreeSet<String>,
}

/// An entry of `interfaces`.
#[derive(Clone, Debug, PartialEq)]
pub enum Listed {
    Name(String),
    /// Every Ethernet interface whose name the shell pattern matches.
    Pattern(Pattern),
    /// Whichever carries a default route.
    DefaultRoute,
}

/// As the policy file spells it.
impl fmt::Display for Listed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Pattern(pattern) => pattern.fmt(f),
            Self::DefaultRoute => f.write_str(DEFAULT_ROUTE),
        }
    }
}

const DEFAULT_ROUTE: &str = "default";

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Native XDP, else generic.
    #[default]
    Auto,
    Native,
    Generic,
}

/// A set of prefixes that changes by itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Region {
    pub source: RegionSource,
    pub guards: Guards,
}

/// Where a region's prefixes come from.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RegionSource {
    Prefixes(Vec<IpNet>),
    File(PathBuf),
    Dns(Dns),
    Url(Url),
}

/// Names whose A and AAAA records are the region's addresses.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Dns {
    pub names: Vec<String>,
    /// Empty: those of `/etc/resolv.conf`.
    pub nameservers: Vec<Nameserver>,
    /// Whether every record must be signed, from the trust anchor on.
    pub dnssec: bool,
    /// DNSKEY records in presentation format; `None`: the root's.
    pub trust_anchor: Option<PathBuf>,
    /// Certificates (PEM) that sign the name servers'; `None`: the system's.
    pub ca_file: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Nameserver {
    pub address: IpAddr,
    /// `None`: the transport's own (53, 853, 443).
    pub port: Option<u16>,
    pub transport: Transport,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// UDP, and TCP for answers that do not fit.
    Plain,
    /// RFC 7858; `name` is what the certificate must be for.
    Tls { name: String },
    /// RFC 8484.
    Https { name: String, path: String },
}

/// A published list.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Url {
    pub url: String,
    pub select: Select,
    /// Whether plain http will do.
    pub insecure: bool,
    /// Certificates (PEM) that sign the server's; `None`: the system's.
    pub ca_file: Option<PathBuf>,
}

/// How a list is written, and which of its prefixes are meant. Fields are named as the publisher
/// names them; `docs/policy.md` has the addresses of their pages.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(tag = "format", rename_all = "lowercase", deny_unknown_fields)]
pub enum Select {
    /// One prefix a line, `#` begins a comment.
    Text {},
    /// Strings selected by a JSONPath query (RFC 9535).
    Json {
        path: JsonPath,
    },
    Aws {
        region: String,
        service: Option<String>,
    },
    Gcp {
        scope: String,
        service: Option<String>,
    },
    Azure {
        tag: String,
    },
    Cloudflare {},
    Github {
        key: String,
    },
    Oracle {
        region: String,
        tag: Option<String>,
    },
    /// A geofeed (RFC 8805), which DigitalOcean and others publish.
    #[serde(alias = "geofeed")]
    Digitalocean {
        country: Option<String>,
        region: Option<String>,
        city: Option<String>,
    },
}

/// What an answer about a region must keep to, and when to ask again.
#[derive(Clone, Debug, PartialEq)]
pub struct Guards {
    /// Whether private addresses (RFC 1918, 6598, 4193) may be among the prefixes.
    pub private: bool,
    pub max_prefixes: usize,
    /// Members that may leave at once, in per cent.
    pub max_shrink: u8,
    /// For how long a set that lost more than that must be repeated to be taken.
    pub shrink_after: Duration,
    /// For how long a member that left stays allowed.
    pub retire_after: Duration,
    /// For how long a set stays in force that is not confirmed; `None`: for ever.
    pub max_age: Option<Duration>,
    /// Bounds of the time to the next look-up; failures are tried again from the first to the second.
    pub min_refresh: Duration,
    pub max_refresh: Duration,
    /// Of a look-up as a whole.
    pub timeout: Duration,
}

impl Guards {
    /// A file is the operator's own: what leaves it is meant to, and at once.
    fn default_for(source: &RegionSource) -> Self {
        let file = matches!(source, RegionSource::File(_));
        let url = matches!(source, RegionSource::Url(_));
        Self {
            private: false,
            max_prefixes: 100_000,
            max_shrink: if file { 100 } else { 50 },
            shrink_after: Duration::from_mins(10),
            retire_after: if file {
                Duration::ZERO
            } else {
                Duration::from_hours(1)
            },
            max_age: None,
            min_refresh: Duration::from_secs(if url { 10 } else { 1 }),
            max_refresh: Duration::from_mins(if url { 5 } else { 1 }),
            timeout: Duration::from_secs(if url { 30 } else { 5 }),
        }
    }
}

impl Region {
    /// Whether its prefixes stand in the policy.
    pub fn is_constant(&self) -> bool {
        matches!(self.source, RegionSource::Prefixes(_))
    }

    fn new(source: RegionSource) -> Self {
        Self {
            guards: Guards::default_for(&source),
            source,
        }
    }

    fn built_in(name: &str) -> Option<Self> {
        let (_, host) = BUILT_IN.into_iter().find(|&(region, _)| region == name)?;
        Some(Self::new(RegionSource::Dns(Dns {
            names: vec![host.into()],
            ..Dns::default()
        })))
    }
}

/// Where the prefixes come from, in a few words.
impl fmt::Display for RegionSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Prefixes(_) => f.write_str("policy"),
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Dns(dns) => write!(f, "dns {}", dns.names.join(", ")),
            Self::Url(url) => write!(f, "url {}", url.url),
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Database {
    pub name: String,
    pub protocol: Protocol,
    /// At least one, sorted, no two alike.
    pub ports: Vec<u16>,
    /// Local addresses the database listens on; empty: all.
    pub addresses: Vec<IpAddr>,
    pub model: Model,
    pub tls: Option<Tls>,
    /// Count what would be dropped, and pass it.
    pub monitor: bool,
    /// Its own cluster members: always allowed.
    pub cluster: Vec<IpNet>,
}

/// How TLS is forced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tls {
    pub engine: Engine,
    /// Whether PostgreSQL's CancelRequest may come in the clear.
    pub cancel_in_clear: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Model {
    /// Closed but for these rules; at most `filter_common::MAX_RULES`.
    Dedicated { rules: Vec<Rule> },
    /// Open to the regional network, with `internet` to everybody.
    Shared { internet: bool },
}

#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    pub source: Source,
    pub label: Option<String>,
    /// The instant from which the rule no longer allows.
    pub expires: Option<Timestamp>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    Cidr(IpNet),
    /// A key of `Policy::regions`.
    Region(String),
}

/// As the policy file spells it, and as a rule is named everywhere: `203.0.113.0/24`, `region osc-fr1`.
impl Database {
    /// `tcp/5432`, for each port.
    pub fn guarded_ports(&self) -> Vec<String> {
        let protocol = self.protocol.name();
        self.ports
            .iter()
            .map(|port| format!("{protocol}/{port}"))
            .collect()
    }
}

impl Model {
    /// As the policy file spells it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Dedicated { .. } => "dedicated",
            Self::Shared { .. } => "shared",
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cidr(prefix) => prefix.fmt(f),
            Self::Region(name) => write!(f, "region {name}"),
        }
    }
}

/// One thing wrong with, or notable in, a policy file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// Counted from 1.
    pub line: Option<usize>,
    pub region: Option<String>,
    pub database: Option<String>,
    /// Place in the database's `rules`, counted from 1.
    pub rule: Option<usize>,
    pub message: String,
}

/// `line 12: database orders, rule 3: host bits are set`.
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = self.line {
            write!(f, "line {line}: ")?;
        }
        if let Some(region) = &self.region {
            write!(f, "region {region}: ")?;
        }
        match (&self.database, self.rule) {
            (Some(database), Some(rule)) => write!(f, "database {database}, rule {rule}: ")?,
            (Some(database), None) => write!(f, "database {database}: ")?,
            (None, _) => {}
        }
        f.write_str(&self.message)
    }
}

/// Problems reported of one file; each costs another pass over it for its line.
const MAX_PROBLEMS: usize = 50;

/// Longest label of a rule, in characters.
const MAX_LABEL: usize = 100;

/// Longest name of a network interface, in bytes: an alternative one (ALTIFNAMSIZ, less the closing zero).
const MAX_INTERFACE: usize = 127;

/// Regions that need no definition, and the names whose addresses they are.
const BUILT_IN: [(&str, &str); 2] = [
    ("osc-fr1", "egress.osc-fr1.scalingo.com"),
    ("osc-secnum-fr1", "egress.osc-secnum-fr1.scalingo.com"),
];

/// A checked policy and what its author should know of it, or everything wrong with it in the order
/// of the file.
pub fn parse(text: &str) -> Result<(Policy, Vec<Problem>), Vec<Problem>> {
    let file: RawFile = serde_yaml::from_str(text).map_err(|error| vec![structural(&error)])?;
    let mut reader = Reader {
        text,
        problems: Vec::new(),
        warnings: Vec::new(),
        unlisted: 0,
    };
    let policy = reader.policy(file);
    reader.problems.sort_by_key(|problem| problem.line);
    reader.warnings.sort_by_key(|warning| warning.line);
    if reader.problems.is_empty() {
        return Ok((policy, reader.warnings));
    }
    if reader.unlisted > 0 {
        reader.problems.push(Problem {
            line: None,
            region: None,
            database: None,
            rule: None,
            message: format!("and {} more problems", reader.unlisted),
        });
    }
    Err(reader.problems)
}

/// What serde_yaml says of a file that is no YAML, or not of this shape.
fn structural(error: &serde_yaml::Error) -> Problem {
    let line = error.location().map(|location| location.line());
    let mut message = error.to_string();
    // Its own "at line 3 column 5" stands at the end, or in front of what more it says.
    if let Some(place) = message.find(" at line ") {
        message.truncate(place);
    }
    Problem {
        line,
        region: None,
        database: None,
        rule: None,
        message: plain(&message),
    }
}

/// What serde says of a shape, without its names for our types.
fn plain(message: &str) -> String {
    let shapes = ["File", "Region", "Database", "Rule"].map(|name| format!("struct Raw{name}"));
    let mut message = message
        .replace("a sequence", "a list")
        .replace("i64", "a number");
    for shape in shapes {
        message = message.replace(&shape, "a mapping");
    }
    message
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFile {
    interfaces: Vec<String>,
    #[serde(default)]
    mode: Mode,
    // A mapping, and not a map of Rust's: that would take a name's last definition in silence.
    regions: Option<Mapping>,
    regional_network: Option<Vec<String>>,
    tls_connections: Option<i64>,
    databases: Option<Vec<Value>>,
    #[serde(default)]
    unprotected: BTreeSet<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRegion {
    dns: Option<Vec<String>>,
    nameservers: Option<Vec<String>>,
    dnssec: Option<RawDnssec>,
    trust_anchor: Option<PathBuf>,
    url: Option<String>,
    select: Option<Value>,
    insecure: Option<bool>,
    ca_file: Option<PathBuf>,
    file: Option<PathBuf>,
    prefixes: Option<Vec<String>>,
    private: Option<bool>,
    max_prefixes: Option<i64>,
    max_shrink: Option<RawScalar>,
    shrink_after: Option<RawScalar>,
    retire_after: Option<RawScalar>,
    max_age: Option<RawScalar>,
    min_refresh: Option<RawScalar>,
    max_refresh: Option<RawScalar>,
    timeout: Option<RawScalar>,
}

/// Text that YAML may take for a number, such as a duration without its unit.
#[derive(Deserialize)]
#[serde(untagged)]
enum RawScalar {
    Text(String),
    Number(i64),
}

impl fmt::Display for RawScalar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => f.write_str(text),
            Self::Number(number) => number.fmt(f),
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawDnssec {
    Require,
}

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
struct RawDatabase {
    name: String,
    port: Option<i64>,
    ports: Option<Vec<i64>>,
    protocol: Option<RawProtocol>,
    addresses: Option<Vec<String>>,
    engine: Option<RawEngine>,
    model: RawModel,
    force_tls: Option<bool>,
    cancel_in_clear: Option<bool>,
    monitor: Option<bool>,
    cluster: Option<Vec<String>>,
    rules: Option<Vec<Value>>,
    internet: Option<bool>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawEngine {
    Postgresql,
    Mysql,
    Redis,
    Mongodb,
    Other,
}

impl From<RawEngine> for Engine {
    fn from(engine: RawEngine) -> Self {
        match engine {
            RawEngine::Postgresql => Self::Postgresql,
            RawEngine::Mysql => Self::Mysql,
            RawEngine::Redis => Self::Redis,
            RawEngine::Mongodb => Self::Mongodb,
            RawEngine::Other => Self::Other,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRule {
    cidr: Option<String>,
    region: Option<String>,
    label: Option<String>,
    expires: Option<String>,
}

/// One step on the way to a node of the file.
#[derive(Clone, Debug, PartialEq)]
enum Step {
    Key(String),
    Index(usize),
}

/// A node of the file, and whose it is.
#[derive(Clone, Debug)]
struct At {
    path: Vec<Step>,
    region: Option<String>,
    database: Option<String>,
    rule: Option<usize>,
}

impl At {
    fn top(key: &str) -> Self {
        Self {
            path: vec![Step::Key(key.into())],
            region: None,
            database: None,
            rule: None,
        }
    }

    fn key(&self, key: &str) -> Self {
        let mut at = self.clone();
        at.path.push(Step::Key(key.into()));
        at
    }

    fn index(&self, index: usize) -> Self {
        let mut at = self.clone();
        at.path.push(Step::Index(index));
        at
    }
}

struct Reader<'a> {
    text: &'a str,
    problems: Vec<Problem>,
    warnings: Vec<Problem>,
    /// Problems past `MAX_PROBLEMS`.
    unlisted: usize,
}

impl Reader<'_> {
    fn problem(&mut self, at: &At, message: impl Into<String>) {
        self.problem_at(&at.path, false, at, message.into());
    }

    /// A problem at a node, or at the key that leads to it, of what `whose` says.
    fn problem_at(&mut self, path: &[Step], of_key: bool, whose: &At, message: String) {
        if self.problems.len() < MAX_PROBLEMS {
            let line = locate(self.text, path, of_key);
            self.problems.push(describe(line, whose, message));
        } else {
            self.unlisted += 1;
        }
    }

    fn warn(&mut self, at: &At, message: impl Into<String>) {
        let line = locate(self.text, &at.path, false);
        self.warnings.push(describe(line, at, message.into()));
    }

    /// Reads a part of the file into its shape; `whose` begins what is said of it.
    fn shape<T: DeserializeOwned>(&mut self, at: &At, whose: &str, value: Value) -> Option<T> {
        let error = match serde_path_to_error::deserialize(value) {
            Ok(shape) => return Some(shape),
            Err(error) => error,
        };
        let mut path = at.path.clone();
        for segment in error.path() {
            match segment {
                serde_path_to_error::Segment::Map { key } => path.push(Step::Key(key.clone())),
                serde_path_to_error::Segment::Seq { index } => path.push(Step::Index(*index)),
                _ => {}
            }
        }
        let field = match path.last() {
            Some(Step::Key(key)) if path.len() > at.path.len() => format!("{key}: "),
            _ => String::new(),
        };
        let mut message = plain(&error.inner().to_string());
        let unknown = message.strip_prefix("unknown field `");
        let unknown = unknown.and_then(|rest| rest.split('`').next().map(str::to_owned));
        let of_key = unknown.is_some();
        match unknown {
            Some(unknown) => {
                path.truncate(at.path.len());
                path.push(Step::Key(unknown));
            }
            None => message.insert_str(0, &field),
        }
        self.problem_at(&path, of_key, at, format!("{whose}{message}"));
        None
    }

    fn policy(&mut self, file: RawFile) -> Policy {
        let interfaces = self.interfaces(&file.interfaces);
        let regions = self.regions(file.regions.unwrap_or_default());
        let regional_network = self.prefixes(
            &At::top("regional_network"),
            file.regional_network.as_deref(),
        );
        let tls_connections = self.tls_connections(file.tls_connections);
        let top = At::top("databases");
        // Not an empty list: a file that was cut off must not be one that protects nothing.
        if file.databases.is_none() {
            self.problem(
                &top,
                "`databases` is missing or empty: is the file whole? `databases: []` protects nothing",
            );
        }
        let values = file.databases.unwrap_or_default();
        if values.is_empty() {
            self.warnings.push(describe(
                None,
                &top,
                "no databases: nothing is protected".into(),
            ));
        }
        if values.len() > MAX_DATABASES {
            let message = format!("{} databases; at most {MAX_DATABASES}", values.len());
            self.problem(&top, message);
        }
        let mut databases = Vec::new();
        let mut names = BTreeSet::new();
        for (index, value) in values.into_iter().enumerate() {
            let mut at = top.index(index);
            at.database = Some(match value.get("name").and_then(Value::as_str) {
                Some(name) => name.into(),
                None => format!("number {}", index + 1),
            });
            let Some(raw) = self.shape::<RawDatabase>(&at, "", value) else {
                continue;
            };
            if !names.insert(raw.name.clone()) {
                self.problem(&at.key("name"), "another database has this name");
            }
            if let Some(database) = self.database(&at, raw, &regions, &regional_network) {
                databases.push((at, database));
            }
        }
        self.overlaps(&databases);
        Policy {
            interfaces,
            mode: file.mode,
            regions,
            regional_network,
            tls_connections,
            databases: databases
                .into_iter()
                .map(|(_, database)| database)
                .collect(),
            unprotected: file.unprotected,
        }
    }

    fn interfaces(&mut self, interfaces: &[String]) -> Vec<Listed> {
        let at = At::top("interfaces");
        if interfaces.is_empty() {
            self.problem(
                &at,
                "no interfaces: name every one the databases are reachable through",
            );
        }
        let mut listed = Vec::new();
        let mut seen = BTreeSet::new();
        for (index, name) in interfaces.iter().enumerate() {
            let is_pattern = name.contains(['*', '?', '[']);
            let fits = (1..=MAX_INTERFACE).contains(&name.len());
            if !fits || name.contains(|c: char| c == '/' || c.is_whitespace() || c.is_control()) {
                let message = format!(
                    "{name:?} is no name of an interface: 1 to {MAX_INTERFACE} bytes, no spaces"
                );
                self.problem(&at.index(index), message);
            } else if !seen.insert(name) {
                self.problem(
                    &at.index(index),
                    format!("interface {name} is listed twice"),
                );
            }
            match Pattern::new(name) {
                Ok(pattern) if is_pattern => listed.push(Listed::Pattern(pattern)),
                Ok(_) if name == DEFAULT_ROUTE => listed.push(Listed::DefaultRoute),
                Ok(_) => listed.push(Listed::Name(name.clone())),
                Err(error) => {
                    let message =
                        format!("{name:?} is no pattern of interface names: {}", error.msg);
                    self.problem(&at.index(index), message);
                }
            }
        }
        listed
    }

    fn regions(&mut self, raw: Mapping) -> BTreeMap<String, Region> {
        let built_in = BUILT_IN.map(|(name, _)| Some((name.into(), Region::built_in(name)?)));
        let mut regions = BTreeMap::from_iter(built_in.into_iter().flatten());
        let top = At::top("regions");
        for (key, value) in raw {
            let Some(name) = key.as_str() else {
                self.problem(&top, "the name of a region is not text");
                continue;
            };
            let mut at = top.key(name);
            if let Err(message) = check_name(name) {
                self.problem(&at, format!("region {name:?}: {message}"));
            }
            at.region = Some(name.into());
            let region = self.shape::<RawRegion>(&at, "", value);
            let region = region.and_then(|raw| self.region(&at, name, raw));
            // Defined, if badly: rules that name it are not at fault.
            let region = region.unwrap_or_else(|| Region::new(RegionSource::Prefixes(Vec::new())));
            regions.insert(name.into(), region);
        }
        regions
    }

    fn region(&mut self, at: &At, name: &str, mut raw: RawRegion) -> Option<Region> {
        let source = self.region_source(at, name, &mut raw)?;
        let constant = matches!(source, RegionSource::Prefixes(_));
        let asked = "dns, url and file";
        // The source took what is its own.
        let left = [
            ("nameservers", "dns", raw.nameservers.is_some()),
            ("dnssec", "dns", raw.dnssec.is_some()),
            (
                "trust_anchor",
                "dnssec: require",
                raw.trust_anchor.is_some(),
            ),
            ("select", "url", raw.select.is_some()),
            ("insecure", "url", raw.insecure.is_some()),
            (
                "ca_file",
                "url, and with nameservers over TLS or HTTPS",
                raw.ca_file.is_some(),
            ),
            ("private", asked, constant && raw.private.is_some()),
            (
                "max_prefixes",
                asked,
                constant && raw.max_prefixes.is_some(),
            ),
            ("max_shrink", asked, constant && raw.max_shrink.is_some()),
            (
                "shrink_after",
                asked,
                constant && raw.shrink_after.is_some(),
            ),
            (
                "retire_after",
                asked,
                constant && raw.retire_after.is_some(),
            ),
            ("max_age", asked, constant && raw.max_age.is_some()),
            ("min_refresh", asked, constant && raw.min_refresh.is_some()),
            ("max_refresh", asked, constant && raw.max_refresh.is_some()),
            ("timeout", asked, constant && raw.timeout.is_some()),
        ];
        for (field, with, _) in left.into_iter().filter(|(_, _, left)| *left) {
            self.problem(&at.key(field), format!("{field} goes with {with}"));
        }
        let mut guards = Guards::default_for(&source);
        guards.private = raw.private.unwrap_or(guards.private);
        if let Some(number) = raw.max_prefixes {
            match usize::try_from(number) {
                Ok(most @ 1..) => guards.max_prefixes = most,
                _ => self.problem(&at.key("max_prefixes"), "max_prefixes is at least 1"),
            }
        }
        if let Some(text) = raw.max_shrink.map(|raw| raw.to_string()) {
            let percent = text
                .strip_suffix('%')
                .and_then(|number| number.parse().ok());
            match percent.filter(|percent| *percent <= 100) {
                Some(percent) => guards.max_shrink = percent,
                None => self.problem(
                    &at.key("max_shrink"),
                    format!("max_shrink: {text:?} is no share, such as 50%"),
                ),
            }
        }
        const DAY: Duration = Duration::from_hours(24);
        let second = Duration::from_secs(1);
        let month = 31 * DAY;
        let durations = [
            (
                "shrink_after",
                raw.shrink_after,
                &mut guards.shrink_after,
                Duration::ZERO,
                month,
            ),
            (
                "retire_after",
                raw.retire_after,
                &mut guards.retire_after,
                Duration::ZERO,
                month,
            ),
            (
                "min_refresh",
                raw.min_refresh,
                &mut guards.min_refresh,
                second,
                DAY,
            ),
            (
                "max_refresh",
                raw.max_refresh,
                &mut guards.max_refresh,
                second,
                DAY,
            ),
            (
                "timeout",
                raw.timeout,
                &mut guards.timeout,
                second,
                Duration::from_mins(10),
            ),
        ];
        for (field, text, duration, least, most) in durations {
            if let Some(text) = text {
                *duration = self
                    .duration(at, field, &text, least, most)
                    .unwrap_or(*duration);
            }
        }
        if let Some(text) = raw.max_age {
            let least = guards.max_refresh;
            guards.max_age = self.duration(at, "max_age", &text, least, 366 * DAY);
        }
        if guards.min_refresh > guards.max_refresh {
            let message = format!(
                "min_refresh ({}) is longer than max_refresh ({})",
                spelled(guards.min_refresh),
                spelled(guards.max_refresh)
            );
            self.problem(at, message);
        }
        Some(Region { source, guards })
    }

    fn duration(
        &mut self,
        at: &At,
        field: &str,
        written: &RawScalar,
        least: Duration,
        most: Duration,
    ) -> Option<Duration> {
        let text = written.to_string();
        let span = text.parse::<Span>().ok();
        let exact = span.and_then(|s| s.to_duration(SpanRelativeTo::days_are_24_hours()).ok());
        let duration = exact.and_then(|exact| Duration::try_from(exact).ok());
        let fits = duration.filter(|duration| (least..=most).contains(duration));
        if fits.is_none() {
            let message = match duration {
                None => format!("{field}: {text:?} is no duration, such as 90s, 10m, 1h or 2d"),
                Some(_) => {
                    let (least, most) = (spelled(least), spelled(most));
                    format!("{field}: {text} is not between {least} and {most}")
                }
            };
            self.problem(&at.key(field), message);
        }
        fits
    }

    /// Takes from `raw` what belongs to the source; `None`: it has none, which is reported.
    fn region_source(&mut self, at: &At, name: &str, raw: &mut RawRegion) -> Option<RegionSource> {
        let source = (
            raw.dns.take(),
            raw.url.take(),
            raw.file.take(),
            raw.prefixes.take(),
        );
        match source {
            (Some(names), None, None, None) => Some(self.dns(at, names, raw)),
            (None, None, None, None) if let Some(built_in) = Region::built_in(name) => {
                let RegionSource::Dns(Dns { names, .. }) = built_in.source else {
                    return None;
                };
                Some(self.dns(at, names, raw))
            }
            (None, Some(url), None, None) => self.url(at, url, raw),
            (None, None, Some(file), None) => {
                self.absolute(at, "file", &file);
                Some(RegionSource::File(file))
            }
            (None, None, None, Some(prefixes)) => {
                if prefixes.is_empty() {
                    self.problem(&at.key("prefixes"), "no prefixes");
                }
                let prefixes = self.prefixes(&at.key("prefixes"), Some(&prefixes));
                Some(RegionSource::Prefixes(prefixes))
            }
            _ => {
                self.problem(at, "exactly one of dns, url, file and prefixes is needed");
                None
            }
        }
    }

    fn dns(&mut self, at: &At, names: Vec<String>, raw: &mut RawRegion) -> RegionSource {
        let list = at.key("dns");
        if names.is_empty() {
            self.problem(&list, "no names to look up");
        }
        for (index, host) in names.iter().enumerate() {
            if !is_host_name(host) {
                self.problem(&list.index(index), format!("{host:?} is no host name"));
            }
        }
        let mut nameservers = Vec::new();
        for (index, text) in raw
            .nameservers
            .take()
            .unwrap_or_default()
            .iter()
            .enumerate()
        {
            match nameserver(text) {
                Some(nameserver) => nameservers.push(nameserver),
                None => {
                    let message = format!(
                        "{text:?} is no name server, such as 192.0.2.53, tls://192.0.2.53#name or \
                         https://192.0.2.53/dns-query#name"
                    );
                    self.problem(&at.key("nameservers").index(index), message);
                }
            }
        }
        let dnssec = raw.dnssec.take().is_some();
        let trust_anchor = if dnssec {
            raw.trust_anchor.take()
        } else {
            None
        };
        let encrypted = nameservers.iter().any(|n| n.transport != Transport::Plain);
        let ca_file = if encrypted { raw.ca_file.take() } else { None };
        for (field, path) in [("trust_anchor", &trust_anchor), ("ca_file", &ca_file)] {
            if let Some(path) = path {
                self.absolute(at, field, path);
            }
        }
        RegionSource::Dns(Dns {
            names,
            nameservers,
            dnssec,
            trust_anchor,
            ca_file,
        })
    }

    fn url(&mut self, at: &At, url: String, raw: &mut RawRegion) -> Option<RegionSource> {
        let insecure = raw.insecure.take().unwrap_or_default();
        let ca_file = raw.ca_file.take();
        let parsed = url::Url::parse(&url);
        match parsed.as_ref().map(url::Url::scheme) {
            Ok("https") => {}
            Ok("http") if insecure => {}
            Ok("http") => {
                let message = format!(
                    "{url} is not encrypted: anybody on the way could open the database; write \
                     https, or `insecure: true`"
                );
                self.problem(&at.key("url"), message);
            }
            _ => self.problem(&at.key("url"), format!("{url:?} is no https URL")),
        }
        if let Some(path) = &ca_file {
            self.absolute(at, "ca_file", path);
        }
        let select = match raw.select.take() {
            None => Select::Text {},
            Some(value) => self.shape::<Select>(&at.key("select"), "select: ", value)?,
        };
        if let Select::Digitalocean {
            country: None,
            region: None,
            city: None,
        } = select
        {
            let message = "select: at least one of country, region and city is needed";
            self.problem(&at.key("select"), message);
        }
        Some(RegionSource::Url(Url {
            url,
            select,
            insecure,
            ca_file,
        }))
    }

    fn absolute(&mut self, at: &At, field: &str, path: &std::path::Path) {
        if !path.is_absolute() {
            let message = format!("{field}: {} is no absolute path", path.display());
            self.problem(&at.key(field), message);
        }
    }

    fn prefixes(&mut self, at: &At, texts: Option<&[String]>) -> Vec<IpNet> {
        let mut prefixes = Vec::new();
        for (index, text) in texts.unwrap_or_default().iter().enumerate() {
            match parse_cidr(text) {
                Ok(prefix) => prefixes.push(prefix),
                Err(message) => self.problem(&at.index(index), message),
            }
        }
        prefixes
    }

    fn database(
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
        let cluster = self.prefixes(&at.key("cluster"), raw.cluster.as_deref());
        let tcp = protocol == Protocol::Tcp;
        let by_default = tcp && matches!(raw.model, RawModel::Dedicated);
        let force_tls = raw.force_tls.unwrap_or(by_default);
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
                    });
                }
            }
        }
        let postgresql = matches!(raw.engine, Some(RawEngine::Postgresql));
        if raw.cancel_in_clear.is_some() && !(force_tls && postgresql) {
            let message = "cancel_in_clear is for postgresql databases where TLS is forced";
            self.problem(&at.key("cancel_in_clear"), message);
        }
        let model = match raw.model {
            RawModel::Dedicated => {
                if raw.internet.is_some() {
                    let message = "internet is for shared databases: a dedicated one is opened by \
                                   rules";
                    self.problem(&at.key("internet"), message);
                }
                let rules = self.rules(at, raw.rules.unwrap_or_default(), regions);
                if rules.is_empty() && cluster.is_empty() {
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
            monitor: raw.monitor.unwrap_or_default(),
            cluster,
        })
    }

    fn tls_connections(&mut self, written: Option<i64>) -> u32 {
        // A connection takes some 220 bytes of the kernel's memory, from the start on.
        const BOUNDS: std::ops::RangeInclusive<i64> = 1024..=1 << 24;
        match written {
            None => DEFAULT_TLS_CONNECTIONS,
            Some(number) if BOUNDS.contains(&number) => number as u32,
            Some(number) => {
                let (least, most) = BOUNDS.into_inner();
                let message = format!("tls_connections: {number} is not from {least} to {most}");
                self.problem(&At::top("tls_connections"), message);
                DEFAULT_TLS_CONNECTIONS
            }
        }
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
                let message = format!("{text:?} is no IP address (without a prefix length)");
                self.problem(&at, message);
                continue;
            };
            let broadcast = matches!(address, IpAddr::V4(v4) if v4.is_broadcast());
            if address.is_unspecified() || address.is_multicast() || broadcast {
                self.problem(&at, format!("{address} is no address a database can have"));
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
        let mut sources: BTreeMap<Source, usize> = BTreeMap::new();
        let mut rules = Vec::new();
        for (index, value) in values.into_iter().enumerate() {
            let mut at = list.index(index);
            let number = index + 1;
            at.rule = Some(number);
            let Some(raw) = self.shape::<RawRule>(&at, "", value) else {
                continue;
            };
            let label = raw.label.as_deref().unwrap_or_default();
            if label.chars().count() > MAX_LABEL || label.contains(char::is_control) {
                let message =
                    format!("a label has at most {MAX_LABEL} characters, none a control character");
                self.problem(&at.key("label"), message);
            }
            let mut expires = None;
            if let Some(text) = &raw.expires {
                expires = text.parse::<Timestamp>().ok();
                if expires.is_none() {
                    let message =
                        format!("expires: {text:?} is no instant, such as 2026-12-31T18:00:00Z");
                    self.problem(&at.key("expires"), message);
                }
            }
            let Some(source) = self.source(&at, raw.cidr, raw.region, regions) else {
                continue;
            };
            if let Some(first) = sources.get(&source) {
                let message = format!("{source} is allowed by rule {first} already");
                self.problem(&at, message);
            }
            sources.entry(source.clone()).or_insert(number);
            rules.push(Rule {
                source,
                label: raw.label,
                expires,
            });
        }
        rules
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
                    let message = format!("no region {name:?} is defined; there are {known}");
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
    fn overlaps(&mut self, databases: &[(At, Database)]) {
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

fn describe(line: Option<usize>, at: &At, message: String) -> Problem {
    Problem {
        line,
        region: at.region.clone(),
        database: at.database.clone(),
        rule: at.rule,
        message,
    }
}

/// Names stand in paths, metrics and output: lower case, digits and hyphens.
fn check_name(name: &str) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if name.is_empty()
        || name.len() > MAX_NAME
        || name.starts_with('-')
        || !name.chars().all(allowed)
    {
        return Err(format!(
            "a name has 1 to {MAX_NAME} characters of a to z, 0 to 9 and hyphen, and begins with no \
             hyphen"
        ));
    }
    Ok(())
}

/// `192.0.2.53`, `192.0.2.53:5353`, `tls://[2001:db8::53]:853#name`,
/// `https://192.0.2.53/dns-query#name`. Without a name the certificate must be for the address.
fn nameserver(text: &str) -> Option<Nameserver> {
    let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
    let (rest, name) = match rest.split_once('#') {
        Some((rest, name)) if is_host_name(name) => (rest, Some(name)),
        Some(_) => return None,
        None => (rest, None),
    };
    let (place, path) = match rest.find('/') {
        Some(slash) => (&rest[..slash], Some(&rest[slash..])),
        None => (rest, None),
    };
    let (address, port) = match place.parse::<SocketAddr>() {
        Ok(socket) => (socket.ip(), Some(socket.port())),
        Err(_) => {
            let bare = place
                .strip_prefix('[')
                .and_then(|rest| rest.strip_suffix(']'));
            (bare.unwrap_or(place).parse().ok()?, None)
        }
    };
    let certified = name.map_or_else(|| address.to_string(), str::to_owned);
    let transport = match (scheme, path, name) {
        ("", None, None) => Transport::Plain,
        ("tls", None, _) => Transport::Tls { name: certified },
        ("https", _, _) => Transport::Https {
            name: certified,
            path: path.unwrap_or("/dns-query").into(),
        },
        _ => return None,
    };
    Some(Nameserver {
        address,
        port,
        transport,
    })
}

/// As the policy spells it: `1h 30m`.
pub fn spelled(duration: Duration) -> String {
    let signed = SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX);
    format!("{signed:#}")
}

/// RFC 1123 section 2.1.
fn is_host_name(name: &str) -> bool {
    let name = name.strip_suffix('.').unwrap_or(name);
    let label = |label: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        (1..=63).contains(&label.len())
            && label.chars().all(allowed)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(label)
}

/// A prefix as the policy spells it, or what is wrong with the text.
pub fn parse_cidr(text: &str) -> Result<IpNet, String> {
    let malformed = || format!("{text:?} is no prefix, such as 192.0.2.0/24 or 2001:db8::/32");
    let Some((address, length)) = text.split_once('/') else {
        let address: IpAddr = text.parse().map_err(|_| malformed())?;
        let one = IpNet::from(address.to_canonical());
        // What is suggested must be accepted: an address no rule can name gets its own refusal.
        parse_cidr(&one.to_string())?;
        return Err(format!(
            "{text} has no prefix length: for this one address write {one}"
        ));
    };
    let address: IpAddr = address.parse().map_err(|_| malformed())?;
    // Digits only: Rust's own parser takes a sign and leading zeros.
    let canonical = length.parse::<u8>().ok();
    let canonical = canonical.filter(|number| number.to_string() == length);
    let length = canonical.ok_or_else(malformed)?;
    let prefix = IpNet::new(address, length).map_err(|_| {
        let longest = IpNet::from(address).max_prefix_len();
        format!("{text} has a prefix length past {longest}")
    })?;
    if let IpAddr::V6(v6) = address
        && let Some(v4) = v6.to_ipv4_mapped()
        && let Some(Ok(v4)) = length
            .checked_sub(96)
            .map(|length| Ipv4Net::new(v4, length))
    {
        return Err(format!(
            "{text} is IPv4, which arrives as such: write {}",
            v4.trunc()
        ));
    }
    if prefix.trunc() != prefix {
        return Err(format!(
            "{text} has host bits set: the network is {}",
            prefix.trunc()
        ));
    }
    if is_never_a_source(&prefix) {
        return Err(format!(
            "{text} is no source: packets from there are always dropped"
        ));
    }
    Ok(prefix)
}

/// Whether the filter drops every packet from the prefix, so that a rule could never match.
fn is_never_a_source(prefix: &IpNet) -> bool {
    match prefix {
        IpNet::V4(prefix) => {
            let first = prefix.network();
            let within = first.octets()[0] == 0 || first.is_loopback() || first.is_multicast();
            // The ranges are of /8 and /4; a shorter prefix holds other addresses too.
            let length = if first.is_multicast() { 4 } else { 8 };
            first.is_broadcast() || within && prefix.prefix_len() >= length
        }
        IpNet::V6(prefix) => {
            let first = prefix.network();
            let single = first.is_unspecified() || first.is_loopback();
            (single && prefix.prefix_len() >= 127)
                || (first.is_multicast() && prefix.prefix_len() >= 8)
        }
    }
}

/// The line of a node in the file, or of the key that leads to it.
///
/// serde_yaml tells lines in errors only: a deserializer that walks to the node and fails there on
/// purpose gets one.
fn locate(text: &str, path: &[Step], of_key: bool) -> Option<usize> {
    let walk = Walk { path, of_key };
    let found = walk.deserialize(serde_yaml::Deserializer::from_str(text));
    found.err()?.location().map(|location| location.line())
}

#[derive(Clone, Copy)]
struct Walk<'a> {
    path: &'a [Step],
    of_key: bool,
}

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the node to locate")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        if let Some((Step::Key(wanted), path)) = self.path.split_first() {
            let key = Key {
                wanted,
                fail: self.of_key && path.is_empty(),
            };
            while let Some(found) = map.next_key_seed(key)? {
                if found {
                    return map.next_value_seed(Walk { path, ..self });
                }
                map.next_value::<de::IgnoredAny>()?;
            }
        }
        Err(de::Error::custom("here"))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        if let Some((Step::Index(wanted), path)) = self.path.split_first() {
            for _ in 0..*wanted {
                seq.next_element::<de::IgnoredAny>()?;
            }
            seq.next_element_seed(Walk { path, ..self })?;
        }
        Err(de::Error::custom("here"))
    }
}

/// A key of a mapping; fails at the wanted one where it is the one to locate.
#[derive(Clone, Copy)]
struct Key<'a> {
    wanted: &'a str,
    fail: bool,
}

impl<'de> DeserializeSeed<'de> for Key<'_> {
    /// Whether it is the wanted one.
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Key<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: de::Error>(self, key: &str) -> Result<bool, E> {
        if key == self.wanted && self.fail {
            return Err(E::custom("here"));
        }
        Ok(key == self.wanted)
    }
}
