//! Regions: where their prefixes come from, and the limits that each result must keep to.

use std::{fmt, net::IpAddr, path::PathBuf, time::Duration};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json_path::JsonPath;

/// Regions that need no definition, and the names whose addresses they are.
pub(super) const BUILT_IN: [(&str, &str); 2] = [
    ("osc-fr1", "egress.osc-fr1.scalingo.com"),
    ("osc-secnum-fr1", "egress.osc-secnum-fr1.scalingo.com"),
];

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
    pub(super) fn default_for(source: &RegionSource) -> Self {
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

    /// Whether its prefixes stand in the policy.
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
