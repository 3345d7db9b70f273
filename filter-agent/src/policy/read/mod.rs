//! Reads a policy file's text and checks it. Only the files of this folder use the YAML crate.

mod bounded;
mod databases;
mod document;
mod fleet;
mod locate;
mod reader;
mod regions;
mod written;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use filter_common::MAX_DATABASES;
use glob::Pattern;
use serde::Deserialize;
use serde_yaml::{Mapping, Value};

use crate::policy::checked::{DEFAULT_ROUTE, Listed, Mode, Policy};

use databases::RawDatabase;
pub use databases::check_label;
pub use document::parse_document;
use reader::{At, MAX_PROBLEMS, Reader, describe, structural};
pub use reader::{Problem, check_name};
pub use written::{
    check_document, check_within, parse_fleet, with_rollout, with_rule, without_rollout,
    without_rule,
};

/// Longest name of a network interface, in bytes: that of an alternative name (ALTIFNAMSIZ, less the final zero).
const MAX_INTERFACE: usize = 127;

/// Brackets that may be open at a time. The YAML crate's time grows with the square of their number.
const MAX_OPEN_BRACKETS: usize = 1000;

/// Parses and checks a policy. Returns it with warnings.
///
/// # Errors
/// Everything wrong with it, in the order of the file.
pub fn parse(text: &str) -> Result<(Policy, Vec<Problem>), Vec<Problem>> {
    check_characters(text).map_err(|problem| vec![problem])?;
    let file: RawFile = serde_yaml::from_str(text).map_err(|error| vec![structural(&error)])?;
    let mut reader = Reader::new(text, MAX_PROBLEMS);
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

/// Checks what the YAML crate must not get, or does not give a line of.
fn check_characters(text: &str) -> Result<(), Problem> {
    let unreadable = |line, message| Problem {
        line: Some(line),
        region: None,
        database: None,
        rule: None,
        message,
    };
    if let Some(line) = too_deep(text) {
        let message = format!("more than {MAX_OPEN_BRACKETS} brackets are open");
        return Err(unreadable(line, message));
    }
    if let Some((line, character)) = not_allowed(text) {
        let message = format!(
            "the character U+{:04X} is not allowed",
            u32::from(character)
        );
        return Err(unreadable(line, message));
    }
    Ok(())
}

/// The line with one open bracket too many. Those in comments and quotes count, too: no policy has as many.
fn too_deep(text: &str) -> Option<usize> {
    let mut open = 0_usize;
    for (index, line) in text.lines().enumerate() {
        for byte in line.bytes() {
            match byte {
                b'[' | b'{' => open += 1,
                b']' | b'}' => open = open.saturating_sub(1),
                _ => {}
            }
            if open > MAX_OPEN_BRACKETS {
                return Some(index + 1);
            }
        }
    }
    None
}

/// The first character that is not allowed in YAML (YAML 1.1 section 4.1), and its line, which the YAML crate does not
/// report.
fn not_allowed(text: &str) -> Option<(usize, char)> {
    let is_allowed = |c: char| {
        let allowed = matches!(
            c,
            '\t' | '\n' | '\r' | ' '..='~' | '\u{85}' | '\u{a0}'..='\u{fffd}'
        );
        allowed || c >= '\u{10000}'
    };
    let (place, character) = text.char_indices().find(|&(_, c)| !is_allowed(c))?;
    let before = text[..place].bytes().filter(|&byte| byte == b'\n');
    Some((before.count() + 1, character))
}

/// `eth0`, or `{name: eth0, mode: generic}`.
#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "expected a name, or `{name: bond0, mode: generic}`"
)]
enum RawInterface {
    Name(String),
    WithMode(RawWithMode),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawWithMode {
    name: String,
    /// Checked apart: an error within an untagged entry says nothing of its field.
    mode: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFile {
    interfaces: Vec<RawInterface>,
    #[serde(default)]
    ignore_interfaces: Vec<String>,
    #[serde(default)]
    mode: Mode,
    // Not a `BTreeMap`, which would silently keep the last of two definitions of a name.
    regions: Option<Mapping>,
    regional_network: Option<Vec<String>>,
    /// Without effect; accepted for one more release.
    tls_connections: Option<i64>,
    databases: Option<Vec<Value>>,
    #[serde(default)]
    unprotected: BTreeSet<String>,
    metrics: Option<Value>,
    fleet: Option<Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawMetrics {
    listen: String,
}

impl Reader<'_> {
    fn policy(&mut self, file: RawFile) -> Policy {
        let at = At::top("interfaces");
        if file.interfaces.is_empty() {
            self.problem(
                &at,
                "no interfaces: name every one the databases are reachable through",
            );
        }
        let mut modes = BTreeMap::new();
        let mut names = Vec::new();
        for interface in file.interfaces {
            match interface {
                RawInterface::Name(name) => names.push(name),
                RawInterface::WithMode(RawWithMode { name, mode }) => {
                    match serde_yaml::from_value::<Mode>(Value::String(mode)) {
                        Ok(mode) => {
                            modes.insert(name.clone(), mode);
                        }
                        Err(error) => {
                            let at = at.index(names.len());
                            self.problem(&at.key("mode"), format!("mode: {error}"));
                        }
                    }
                    names.push(name);
                }
            }
        }
        let interfaces = self.interfaces(&at, &names);
        let at = At::top("ignore_interfaces");
        let ignored_interfaces = self.interfaces(&at, &file.ignore_interfaces);
        if ignored_interfaces.contains(&Listed::DefaultRoute) {
            let message = "the interface of the default route cannot be ignored: databases are reachable through it";
            self.problem(&at, message);
        }
        let regions = self.regions(file.regions.unwrap_or_default());
        let regional_network = self.prefixes(
            &At::top("regional_network"),
            file.regional_network.as_deref(),
        );
        if file.tls_connections.is_some() {
            let at = At::top("tls_connections");
            self.warn(&at, "tls_connections is without effect: remove it");
        }
        let top = At::top("databases");
        // A file that was cut off must not pass for one that protects nothing.
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
        let has_fleet = file.fleet.is_some();
        let fleet = file.fleet.and_then(|value| self.fleet(value));
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
                if database.fleet.is_some() && !has_fleet {
                    let message = "fleet: the file has no `fleet` at its top, which says where the documents come from";
                    self.problem(&at.key("fleet"), message);
                }
                databases.push((at, database));
            }
        }
        self.overlaps(&databases);
        if has_fleet
            && !databases
                .iter()
                .any(|(_, database)| database.fleet.is_some())
        {
            let message = "no database has `fleet: true`: nothing is taken from the fleet";
            self.warn(&At::top("fleet"), message);
        }
        Policy {
            interfaces,
            ignored_interfaces,
            mode: file.mode,
            modes,
            regions,
            regional_network,
            databases: databases
                .into_iter()
                .map(|(_, database)| database)
                .collect(),
            unprotected: file.unprotected,
            metrics: file.metrics.and_then(|value| self.metrics(value)),
            fleet: fleet.map(Box::new),
        }
    }

    fn metrics(&mut self, value: Value) -> Option<SocketAddr> {
        let at = At::top("metrics");
        let RawMetrics { listen } = self.shape(&at, "metrics: ", value)?;
        let address: Option<SocketAddr> = listen.parse().ok();
        let address = address.filter(|address| address.port() != 0);
        if address.is_none() {
            let message = format!(
                "{listen:?} is not an address and a port, such as 127.0.0.1:9464 or [::1]:9464"
            );
            self.problem(&at.key("listen"), message);
        }
        address
    }

    fn interfaces(&mut self, at: &At, interfaces: &[String]) -> Vec<Listed> {
        let mut listed = Vec::new();
        let mut seen = BTreeSet::new();
        for (index, name) in interfaces.iter().enumerate() {
            let is_pattern = name.contains(['*', '?', '[']);
            let fits = (1..=MAX_INTERFACE).contains(&name.len());
            if !fits || name.contains(|c: char| c == '/' || c.is_whitespace() || c.is_control()) {
                let message = format!(
                    "{name:?} is not a valid interface name: 1 to {MAX_INTERFACE} bytes, no spaces"
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
                        format!("{name:?} is not a valid interface pattern: {}", error.msg);
                    self.problem(&at.index(index), message);
                }
            }
        }
        listed
    }
}
