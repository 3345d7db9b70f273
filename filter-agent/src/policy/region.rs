//! Regions: where their prefixes come from, and the limits that each result must keep to.

use std::{fmt, net::IpAddr, path::PathBuf, time::Duration};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json_path::JsonPath;

use crate::policy::secret_url::SecretUrl;

/// Built-in regions, and the DNS name of each.
pub(super) const BUILT_IN: [(&str, &str); 2] = [
    ("osc-fr1", "egress.osc-fr1.scalingo.com"),
    ("osc-secnum-fr1", "egress.osc-secnum-fr1.scalingo.com"),
];

/// A named set of prefixes, kept current.
#[derive(Clone, Debug, PartialEq)]
pub struct Region {
    pub source: RegionSource,
    pub guards: Guards,
}

/// Where a region's prefixes come from.
///
/// Its JSON stands beside each set that is kept on disk and has to stay the same, or an upgrade loses the set: new fields
/// are left out where they have their defaults.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RegionSource {
    Prefixes(Vec<IpNet>),
    File(PathBuf),
    Dns(Dns),
    Url(Url),
}

/// Names whose A and AAAA records are the region's addresses.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Dns {
    pub names: Vec<String>,
    /// The types of records to look up, sorted. Never empty.
    #[serde(skip_serializing_if = "is_both")]
    pub records: Vec<DnsType>,
    /// Name servers; empty: those of `/etc/resolv.conf`.
    pub nameservers: Vec<Nameserver>,
    /// Whether DNSSEC must validate every record.
    pub dnssec: bool,
    /// File of DNSKEY records in presentation format; `None`: the root's.
    pub trust_anchor: Option<PathBuf>,
    /// File of the certificate authorities (PEM) of the name servers; `None`: the system's.
    pub ca_file: Option<PathBuf>,
}

fn is_both(records: &[DnsType]) -> bool {
    records == [DnsType::A, DnsType::Aaaa]
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum DnsType {
    A,
    Aaaa,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Nameserver {
    pub address: IpAddr,
    /// Through which a link-local address is reached.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interface: Option<String>,
    /// `None`: the port of the transport (53, 853, 443).
    pub port: Option<u16>,
    pub transport: Transport,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// UDP, and TCP for responses that do not fit.
    Plain,
    /// RFC 7858; the certificate must be for `name`.
    Tls { name: String },
    /// RFC 8484.
    Https { name: String, path: String },
}

/// A published list.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Url {
    pub url: SecretUrl,
    pub select: Select,
    /// Whether plain http is allowed.
    pub insecure: bool,
    /// File of the certificate authorities (PEM) of the server; `None`: the system's.
    pub ca_file: Option<PathBuf>,
    /// File of the headers that are sent to the URL's origin, such as a token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub headers_file: Option<PathBuf>,
}

/// The format of a list, and which of its prefixes belong to the region. Fields have the publishers' names;
/// `docs/policy.md` links their pages.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(tag = "format", rename_all = "lowercase", deny_unknown_fields)]
pub enum Select {
    /// One prefix a line; `#` or `;` begins a comment.
    Text {
        /// Whether its publisher leaves out the last line's end. Else that says that the list was cut off.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        unterminated: bool,
    },
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
        /// As of text.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        unterminated: bool,
    },
}

/// Limits that a region's result must keep, and times of its look-ups.
#[derive(Clone, Debug, PartialEq)]
pub struct Guards {
    /// Whether private addresses (RFC 1918, 6598, 4193) are allowed.
    pub private: bool,
    pub max_prefixes: usize,
    /// Whether a file without prefixes is right.
    pub allow_empty: bool,
    /// Shortest lengths of prefixes: of IPv4 and of IPv6.
    pub shortest: [u8; 2],
    /// Share of the members that may leave at once, in per cent.
    pub max_shrink: u8,
    /// A result that lost more must stay the same for this long.
    pub shrink_after: Duration,
    /// How long a prefix that left stays allowed.
    pub retire_after: Duration,
    /// How long a set stays in force without a good look-up; `None`: for ever.
    pub max_age: Option<Duration>,
    /// Bounds of the time to the next look-up. The backoff after failures grows from the first to the second.
    pub min_refresh: Duration,
    pub max_refresh: Duration,
    /// Time limit of a look-up.
    pub timeout: Duration,
}

impl Guards {
    /// A file is the operator's own: a prefix that leaves it is no longer allowed at once.
    pub(super) fn default_for(source: &RegionSource) -> Self {
        let file = matches!(source, RegionSource::File(_));
        let url = matches!(source, RegionSource::Url(_));
        Self {
            private: false,
            max_prefixes: 100_000,
            allow_empty: false,
            shortest: [8, 16],
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
            timeout: Duration::from_secs(match source {
                RegionSource::Url(_) => 30,
                RegionSource::File(_) => 10,
                RegionSource::Dns(_) | RegionSource::Prefixes(_) => 5,
            }),
        }
    }
}

impl Region {
    /// Its file, if that is where its prefixes come from.
    pub fn file(&self) -> Option<&PathBuf> {
        match &self.source {
            RegionSource::File(path) => Some(path),
            _ => None,
        }
    }

    /// Whether the operator writes its prefixes, rather than a publisher.
    pub fn is_written_by_hand(&self) -> bool {
        matches!(
            self.source,
            RegionSource::Prefixes(_) | RegionSource::File(_)
        )
    }

    /// Whether the policy itself holds its prefixes.
    pub fn is_constant(&self) -> bool {
        matches!(self.source, RegionSource::Prefixes(_))
    }

    pub(super) fn new(source: RegionSource) -> Self {
        Self {
            guards: Guards::default_for(&source),
            source,
        }
    }

    pub(super) fn built_in(name: &str) -> Option<Self> {
        let (_, host) = BUILT_IN.into_iter().find(|&(region, _)| region == name)?;
        Some(Self::new(RegionSource::Dns(Dns {
            names: vec![host.into()],
            records: vec![DnsType::A, DnsType::Aaaa],
            nameservers: Vec::new(),
            dnssec: false,
            trust_anchor: None,
            ca_file: None,
        })))
    }
}

impl Nameserver {
    /// Whether it is a link-local address that says nothing of its link (RFC 4007): it cannot be queried.
    pub fn lacks_interface(&self) -> bool {
        let is_link_local = matches!(self.address, IpAddr::V6(v6) if v6.is_unicast_link_local());
        is_link_local && self.interface.is_none()
    }
}

/// The source in a few words: `file /etc/office.txt`.
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
