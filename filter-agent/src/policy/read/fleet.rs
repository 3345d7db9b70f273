//! Reads the fleet's part of a policy file: where documents come from, and how far they may open a database.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use filter_common::MAX_DATABASES;
use serde::Deserialize;
use serde_yaml::{Mapping, Value};
use url::Url;

use crate::policy::{
    checked::FromFleet,
    fleet::{Bounds, Fleet, check_host},
    read::{
        reader::{At, Reader},
        regions::{RawScalar, lengths},
    },
    region::Region,
};

// One transaction of etcd reads the documents of all databases and the era: by default it has at most 128 operations
// (`--max-txn-ops`).
const _: () = assert!(MAX_DATABASES < 128);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFleet {
    endpoints: Option<Vec<String>>,
    ca_file: Option<PathBuf>,
    cert_file: Option<PathBuf>,
    key_file: Option<PathBuf>,
    #[serde(default)]
    insecure: bool,
    host: Option<String>,
    #[serde(default)]
    frozen: bool,
}

/// `true`, or `{widest: [/16, /48], within: [203.0.113.0/24], regions: [office]}`.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected `true`, `false` or a mapping")]
pub(super) enum RawFromFleet {
    Is(bool),
    /// Read apart: an error within an untagged entry says nothing of its field.
    Within(Mapping),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawBounds {
    widest: Option<Vec<RawScalar>>,
    within: Option<Vec<String>>,
    regions: Option<Vec<String>>,
}

impl Reader<'_> {
    pub(super) fn fleet(&mut self, value: Value) -> Option<Fleet> {
        let at = At::top("fleet");
        let raw: RawFleet = self.shape(&at, "fleet: ", value)?;
        let endpoints = self.endpoints(&at, &raw);
        if let Some(host) = &raw.host
            && let Err(message) = check_host(host)
        {
            self.problem(&at.key("host"), message);
        }
        Some(Fleet {
            endpoints,
            ca_file: raw.ca_file,
            cert_file: raw.cert_file,
            key_file: raw.key_file,
            host: raw.host,
            frozen: raw.frozen,
        })
    }

    /// The members of etcd, with the files that connections to them need.
    fn endpoints(&mut self, at: &At, raw: &RawFleet) -> Vec<String> {
        let list = at.key("endpoints");
        let texts = raw.endpoints.as_deref().unwrap_or_default();
        if texts.is_empty() && !raw.frozen {
            let message =
                "fleet: no `endpoints`: name the members of etcd, such as https://10.0.0.11:2379";
            let place = if raw.endpoints.is_some() { &list } else { at };
            self.problem(place, message);
        }
        let mut endpoints = Vec::new();
        let mut is_encrypted = false;
        for (index, text) in texts.iter().enumerate() {
            let at = list.index(index);
            let url = match endpoint(text) {
                Ok(url) => url,
                Err(message) => {
                    self.problem(&at, message);
                    continue;
                }
            };
            is_encrypted |= url.scheme() == "https";
            if url.scheme() == "http" && !raw.insecure {
                let message = format!(
                    "{text} is not encrypted: anybody on the way could open the databases within their bounds; write \
                     https, or `insecure: true`"
                );
                self.problem(&at, message);
            }
            let endpoint = url.as_str().trim_end_matches('/').to_owned();
            if endpoints.contains(&endpoint) {
                self.problem(&at, format!("{endpoint} is listed twice"));
            }
            endpoints.push(endpoint);
        }
        let files = [
            ("ca_file", &raw.ca_file),
            ("cert_file", &raw.cert_file),
            ("key_file", &raw.key_file),
        ];
        let missing = files.iter().filter(|(_, path)| path.is_none());
        let missing: Vec<&str> = missing.map(|(field, _)| *field).collect();
        if is_encrypted && !missing.is_empty() {
            let message = format!(
                "fleet: {} missing: with https the authority of etcd's certificates (ca_file) and a certificate of this \
                 host (cert_file, key_file), whose common name is its user in etcd, are needed",
                match missing.as_slice() {
                    [one] => format!("{one} is"),
                    several => format!("{} are", several.join(", ")),
                }
            );
            self.problem(&list, message);
        }
        for (field, path) in files {
            let Some(path) = path else {
                continue;
            };
            self.absolute(at, field, path);
            if !is_encrypted && !endpoints.is_empty() {
                let message = format!("{field} goes with https endpoints");
                self.problem(&at.key(field), message);
            }
        }
        endpoints
    }

    /// How far the fleet may open a database. `None`: not at all.
    pub(super) fn fleet_of_database(
        &mut self,
        at: &At,
        raw: Option<RawFromFleet>,
        is_dedicated: bool,
        regions: &BTreeMap<String, Region>,
    ) -> Option<FromFleet> {
        let at = at.key("fleet");
        let bounds = match raw? {
            RawFromFleet::Is(false) => return None,
            RawFromFleet::Is(true) => Bounds::default(),
            RawFromFleet::Within(fields) => {
                let raw = self.shape::<RawBounds>(&at, "fleet: ", Value::Mapping(fields));
                // The database stays one of the fleet's for the checks that follow.
                raw.map_or_else(Bounds::default, |raw| self.bounds(&at, raw, regions))
            }
        };
        if !is_dedicated {
            let message = "fleet is for dedicated databases: a shared one has no source filtering";
            self.problem(&at, message);
        }
        Some(FromFleet {
            bounds,
            rules: Vec::new(),
            document: None,
        })
    }

    fn bounds(&mut self, at: &At, raw: RawBounds, known: &BTreeMap<String, Region>) -> Bounds {
        let mut bounds = Bounds::default();
        if let Some(texts) = raw.widest {
            match lengths(&texts, 0) {
                Some(widest) => bounds.widest = widest,
                None => {
                    let message =
                        "fleet: widest is a length for IPv4 and one for IPv6, such as [/16, /48]";
                    self.problem(&at.key("widest"), message);
                }
            }
        }
        if let Some(texts) = raw.within {
            let at = at.key("within");
            // As a list of networks it would stand for none; as a field that is not there for all.
            if texts.is_empty() {
                let message = "fleet: within is empty: name networks, or leave it out";
                self.problem(&at, message);
            }
            bounds.within = self.prefixes(&at, Some(&texts));
        }
        if let Some(names) = raw.regions {
            let at = at.key("regions");
            let mut listed = BTreeSet::new();
            for (index, name) in names.into_iter().enumerate() {
                let at = at.index(index);
                if !known.contains_key(&name) {
                    let known: Vec<&str> = known.keys().map(String::as_str).collect();
                    let known = known.join(", ");
                    let message =
                        format!("fleet: no region {name:?} is defined; there are {known}");
                    self.problem(&at, message);
                } else if listed.contains(&name) {
                    self.problem(&at, format!("fleet: region {name} is listed twice"));
                }
                listed.insert(name);
            }
            bounds.regions = Some(listed);
        }
        bounds
    }
}

/// The URL of a member of etcd: scheme, host and port alone.
fn endpoint(text: &str) -> Result<Url, String> {
    // It is not known which part of the text is a secret.
    let url = Url::parse(text).map_err(|error| {
        format!("not a valid URL: {error}: write it as in https://10.0.0.11:2379")
    })?;
    let has_host = matches!(url.scheme(), "http" | "https") && url.has_host();
    if !has_host {
        return Err(format!(
            "{text} is not an https URL, such as https://10.0.0.11:2379"
        ));
    }
    let has_user = !url.username().is_empty() || url.password().is_some();
    let has_more =
        !matches!(url.path(), "" | "/") || url.query().is_some() || url.fragment().is_some();
    if has_user {
        return Err(format!(
            "{text} holds a user: the common name of the certificate is the user in etcd"
        ));
    }
    if has_more {
        return Err(format!(
            "{text} has more than a host and a port: write it as in https://10.0.0.11:2379"
        ));
    }
    // `Url` drops the scheme's own port, and would have it where none is written.
    let own = if url.scheme() == "https" {
        ":443"
    } else {
        ":80"
    };
    if url.port().is_none() && !text.trim_end_matches('/').ends_with(own) {
        return Err(format!("{text} has no port: that of etcd is 2379"));
    }
    Ok(url)
}
