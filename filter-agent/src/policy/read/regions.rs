//! Reads the regions that a policy file defines.

use std::{collections::BTreeMap, fmt, net::IpAddr, path::PathBuf, time::Duration};

use ipnet::IpNet;
use jiff::{Span, SpanRelativeTo};
use serde::Deserialize;
use serde_yaml::{Mapping, Value};

use crate::policy::{
    duration::spelled,
    read::reader::{At, Reader, check_name},
    region::{
        BUILT_IN, Dns, DnsType, Guards, Nameserver, Region, RegionSource, Select, Transport, Url,
    },
    secret_url::SecretUrl,
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRegion {
    dns: Option<Vec<String>>,
    records: Option<Vec<DnsType>>,
    nameservers: Option<Vec<String>>,
    dnssec: Option<RawDnssec>,
    trust_anchor: Option<PathBuf>,
    url: Option<String>,
    select: Option<Value>,
    insecure: Option<bool>,
    ca_file: Option<PathBuf>,
    headers_file: Option<PathBuf>,
    file: Option<PathBuf>,
    prefixes: Option<Vec<String>>,
    private: Option<bool>,
    max_prefixes: Option<i64>,
    allow_empty: Option<bool>,
    shortest: Option<Vec<RawScalar>>,
    max_shrink: Option<RawScalar>,
    shrink_after: Option<RawScalar>,
    retire_after: Option<RawScalar>,
    max_age: Option<RawScalar>,
    min_refresh: Option<RawScalar>,
    max_refresh: Option<RawScalar>,
    timeout: Option<RawScalar>,
}

/// Text that YAML may parse as a number, such as a duration without its unit.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected text, such as 50% or 10m")]
pub(super) enum RawScalar {
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

/// Prefix lengths of IPv4 and IPv6, each written as `/6`.
pub(super) fn lengths(texts: &[RawScalar], least: u8) -> Option<[u8; 2]> {
    let [v4, v6] = texts else {
        return None;
    };
    let length = |text: &RawScalar, most| {
        let text = text.to_string();
        let length = text.strip_prefix('/')?.parse().ok()?;
        (least..=most).contains(&length).then_some(length)
    };
    Some([length(v4, 32)?, length(v6, 128)?])
}

impl Reader<'_> {
    pub(super) fn regions(&mut self, raw: Mapping) -> BTreeMap<String, Region> {
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
            // It is defined, although wrongly: rules that name it are not reported.
            let region = region.unwrap_or_else(|| Region::new(RegionSource::Prefixes(Vec::new())));
            regions.insert(name.into(), region);
        }
        regions
    }

    fn region(&mut self, at: &At, name: &str, mut raw: RawRegion) -> Option<Region> {
        let source = self.region_source(at, name, &mut raw)?;
        let constant = matches!(source, RegionSource::Prefixes(_));
        let is_file = matches!(source, RegionSource::File(_));
        let asked = "dns, url and file";
        // `region_source` took the fields of the source.
        let left = [
            ("records", "dns", raw.records.is_some()),
            ("nameservers", "dns", raw.nameservers.is_some()),
            ("dnssec", "dns", raw.dnssec.is_some()),
            (
                "trust_anchor",
                "dnssec: require",
                raw.trust_anchor.is_some(),
            ),
            ("select", "url", raw.select.is_some()),
            ("insecure", "url", raw.insecure.is_some()),
            ("headers_file", "url", raw.headers_file.is_some()),
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
            ("allow_empty", "file", !is_file && raw.allow_empty.is_some()),
            ("shortest", asked, constant && raw.shortest.is_some()),
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
        guards.allow_empty = raw.allow_empty.unwrap_or(guards.allow_empty);
        if let Some(number) = raw.max_prefixes {
            match usize::try_from(number) {
                Ok(most @ 1..) => guards.max_prefixes = most,
                _ => self.problem(&at.key("max_prefixes"), "max_prefixes is at least 1"),
            }
        }
        if let Some(texts) = raw.shortest {
            match lengths(&texts, 1) {
                Some(shortest) => guards.shortest = shortest,
                None => {
                    let message =
                        "shortest is a length for IPv4 and one for IPv6, such as [/6, /16]";
                    self.problem(&at.key("shortest"), message);
                }
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
                    format!("max_shrink: {text:?} is not a percentage, such as 50%"),
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
                None => {
                    format!("{field}: {text:?} is not a valid duration, such as 90s, 10m, 1h or 2d")
                }
                Some(_) => {
                    let (least, most) = (spelled(least), spelled(most));
                    format!("{field}: {text} is not between {least} and {most}")
                }
            };
            self.problem(&at.key(field), message);
        }
        fits
    }

    /// Takes the fields of the source from `raw`. `None`: there is not exactly one source, which is reported.
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
            if let Ok(address) = host.parse::<IpAddr>() {
                let prefix = IpNet::from(address);
                self.problem(
                    &list.index(index),
                    format!(
                        "{host} is an address, not a name to look up: write `prefixes: [{prefix}]`"
                    ),
                );
            } else if !is_host_name(host) {
                self.problem(
                    &list.index(index),
                    format!("{host:?} is not a valid host name"),
                );
            }
        }
        let mut records = raw
            .records
            .take()
            .unwrap_or_else(|| vec![DnsType::A, DnsType::Aaaa]);
        records.sort_unstable();
        records.dedup();
        if records.is_empty() {
            self.problem(&at.key("records"), "no types of records to look up");
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
                Some(server) if server.lacks_interface() => {
                    let message = format!(
                        "{text} is link-local: name its interface as well, such as {}%eth0",
                        server.address
                    );
                    self.problem(&at.key("nameservers").index(index), message);
                }
                Some(nameserver) => nameservers.push(nameserver),
                None => {
                    let message = format!(
                        "{text:?} is not a valid name server, such as 192.0.2.53, tls://192.0.2.53#name or \
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
            records,
            nameservers,
            dnssec,
            trust_anchor,
            ca_file,
        })
    }

    fn url(&mut self, at: &At, url: String, raw: &mut RawRegion) -> Option<RegionSource> {
        let insecure = raw.insecure.take().unwrap_or_default();
        let ca_file = raw.ca_file.take();
        let headers_file = raw.headers_file.take();
        let parsed = SecretUrl::parse(&url);
        match &parsed {
            Ok(url) => match url.scheme() {
                "https" => {}
                "http" if insecure => {}
                "http" => {
                    let message = format!(
                        "{url} is not encrypted: anybody on the way could open the database; write \
                         https, or `insecure: true`"
                    );
                    self.problem(&at.key("url"), message);
                }
                _ => self.problem(&at.key("url"), format!("{url} is not an https URL")),
            },
            // It is not known which part of the text is a secret.
            Err(error) => self.problem(&at.key("url"), format!("url is not a valid URL: {error}")),
        }
        for (field, path) in [("ca_file", &ca_file), ("headers_file", &headers_file)] {
            if let Some(path) = path {
                self.absolute(at, field, path);
            }
        }
        let is_encrypted = parsed.as_ref().is_ok_and(|url| url.scheme() == "https");
        if headers_file.is_some() && !is_encrypted {
            let message = "headers_file goes with an https URL: over http anybody on the way could read the headers";
            self.problem(&at.key("headers_file"), message);
        }
        let select = match raw.select.take() {
            None => Select::Text {
                unterminated: false,
            },
            Some(value) => self.shape::<Select>(&at.key("select"), "select: ", value)?,
        };
        if let Select::Digitalocean {
            country: None,
            region: None,
            city: None,
            ..
        } = select
        {
            let message = "select: at least one of country, region and city is needed";
            self.problem(&at.key("select"), message);
        }
        Some(RegionSource::Url(Url {
            url: parsed.ok()?,
            select,
            insecure,
            ca_file,
            headers_file,
        }))
    }
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
        // A query would be shown, and may be a secret.
        Some(_) if rest.contains('?') => return None,
        Some(slash) => (&rest[..slash], Some(&rest[slash..])),
        None => (rest, None),
    };
    let (host, port) = match place.strip_prefix('[') {
        Some(rest) => match rest.split_once(']')? {
            (host, "") => (host, None),
            (host, port) => (host, Some(port.strip_prefix(':')?)),
        },
        // More than one colon: IPv6 without a port.
        None => match place.split_once(':') {
            Some((host, port)) if !port.contains(':') => (host, Some(port)),
            _ => (place, None),
        },
    };
    let port = port.map(str::parse).transpose().ok()?;
    let (address, interface) = match host.split_once('%') {
        Some((address, interface)) => (address, Some(interface)),
        None => (host, None),
    };
    let address: IpAddr = address.parse().ok()?;
    let is_name = |name: &str| (1..16).contains(&name.len()) && !name.contains(char::is_whitespace);
    if interface.is_some_and(|interface| !address.is_ipv6() || !is_name(interface)) {
        return None;
    }
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
        interface: interface.map(str::to_owned),
        port,
        transport,
    })
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
