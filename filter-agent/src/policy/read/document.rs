//! Reads a document of the fleet: the rules of one database, held against what the host's policy allows.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use filter_common::MAX_RULES;
use serde::Deserialize;
use serde_yaml::Value;

use crate::{
    policy::{
        checked::{Database, Policy, Rule, Source},
        fleet::{Bounds, Document, MAX_DOCUMENT, Rollout, check_host},
        read::{
            bounded, check_characters,
            databases::instant,
            reader::{At, Reader, structural},
        },
        region::Region,
    },
    text::{is_control, list},
};

/// Longest error, in characters before those are written out that a terminal obeys. It may quote the document.
const MAX_ERROR: usize = 400;

/// Escapes may make a text longer than it is written: `"\L"` is three bytes.
pub(super) const MAX_VALUE: usize = 2 * MAX_DOCUMENT;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDocument {
    rules: Option<Vec<Value>>,
    rollout: Option<Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRollout {
    on: Vec<String>,
    until: String,
    rules: Option<Vec<Value>>,
}

/// Parses a document of a database, which may open it as far as the database's `fleet` allows.
///
/// # Errors
/// The first thing that is wrong with it, in one line without control characters, and how many more there are.
pub fn parse_document(
    text: &[u8],
    database: &Database,
    policy: &Policy,
) -> Result<Document, String> {
    let from_fleet = database.fleet.as_ref();
    let bounds = &from_fleet
        .ok_or("the database is not one of the fleet's")?
        .bounds;
    parse_within(text, bounds, database.rules().len(), &policy.regions)
}

/// The same with what of a host's policy matters. `floor`: the number of the database's own rules. `regions`: those that the
/// policy defines.
///
/// # Errors
/// As `parse_document`.
pub(super) fn parse_within(
    text: &[u8],
    bounds: &Bounds,
    floor: usize,
    regions: &BTreeMap<String, Region>,
) -> Result<Document, String> {
    let limits = Limits {
        bounds,
        floor,
        regions,
    };
    document(text, limits).map_err(|error| {
        let mut shown = String::new();
        let mut left = MAX_ERROR;
        for character in error.chars() {
            let Some(rest) = left.checked_sub(1) else {
                return shown + "...";
            };
            left = rest;
            if is_control(character) {
                shown.extend(character.escape_default());
            } else {
                shown.push(character);
            }
        }
        shown
    })
}

/// How far a document may go.
#[derive(Clone, Copy)]
struct Limits<'a> {
    bounds: &'a Bounds,
    floor: usize,
    regions: &'a BTreeMap<String, Region>,
}

fn document(text: &[u8], limits: Limits<'_>) -> Result<Document, String> {
    if text.len() > MAX_DOCUMENT {
        let length = text.len();
        return Err(format!("it has {length} bytes; at most {MAX_DOCUMENT}"));
    }
    let text = std::str::from_utf8(text).map_err(|error| {
        let before = &text[..error.valid_up_to()];
        let line = 1 + before.iter().filter(|&&byte| byte == b'\n').count();
        format!("line {line}: it is not UTF-8")
    })?;
    check_characters(text).map_err(|problem| problem.to_string())?;
    let is_empty = |line: &str| line.trim().is_empty() || line.trim_start().starts_with('#');
    if text.lines().all(is_empty) {
        return Err(format!("it is empty: {RULES_MISSING}"));
    }
    let value = bounded::value(text, MAX_VALUE);
    let value = value.map_err(|error| structural(&error).to_string())?;
    // The line of each other takes a pass over a text that somebody else wrote, and nobody would see it.
    let mut reader = Reader::new(text, 1);
    let document = reader.document(value, limits);
    match (document, reader.problems.first(), reader.unlisted) {
        (Some(document), None, _) => Ok(document),
        (None, None, _) => Err("it is not a document".into()),
        (_, Some(problem), 0) => Err(problem.to_string()),
        (_, Some(problem), more) => Err(format!("{problem} (and {more} more)")),
    }
}

const RULES_MISSING: &str = "`rules` is needed; `rules: []` is how all rules of the fleet end";

impl Reader<'_> {
    fn document(&mut self, value: Value, limits: Limits<'_>) -> Option<Document> {
        let root = At::root();
        if !value.is_mapping() {
            let message = format!("it is not a mapping: {RULES_MISSING}");
            self.problem(&root, message);
            return None;
        }
        let raw: RawDocument = self.shape(&root, "", value)?;
        let rules = self.within(limits, &root, raw.rules);
        let rollout = raw.rollout.map(|value| self.rollout(value, limits));
        Some(Document {
            rules,
            rollout: rollout.flatten(),
        })
    }

    fn rollout(&mut self, value: Value, limits: Limits<'_>) -> Option<Rollout> {
        let at = At::top("rollout");
        let raw: RawRollout = self.shape(&at, "rollout: ", value)?;
        let on = at.key("on");
        if raw.on.is_empty() {
            self.problem(&on, "rollout: no hosts in `on`");
        }
        for (index, host) in raw.on.iter().enumerate() {
            if let Err(message) = check_host(host) {
                self.problem(&on.index(index), format!("rollout: {message}"));
            }
        }
        let until = instant(&raw.until);
        if until.is_none() {
            let message = format!(
                "rollout: until: {:?} is not a valid time, such as 2026-12-31T18:00:00Z",
                raw.until
            );
            self.problem(&at.key("until"), message);
        }
        let rules = self.within(limits, &at, raw.rules);
        Some(Rollout {
            on: raw.on.into_iter().collect(),
            until: until?,
            rules,
        })
    }

    /// Reads the rules of a document or of its rollout.
    fn within(&mut self, limits: Limits<'_>, of: &At, values: Option<Vec<Value>>) -> Vec<Rule> {
        let Limits {
            bounds,
            floor,
            regions,
        } = limits;
        let at = of.key("rules");
        let Some(values) = values else {
            let place = if of.path.is_empty() { "" } else { "rollout: " };
            self.problem(of, format!("{place}{RULES_MISSING}"));
            return Vec::new();
        };
        // A host may report any number of its own.
        if values.len().saturating_add(floor) > MAX_RULES {
            let message = format!(
                "{} rules, and {floor} of this host's policy; together at most {MAX_RULES}",
                values.len()
            );
            self.problem(&at, message);
            return Vec::new();
        }
        let before = self.problems.len() + self.unlisted;
        let rules = self.listed(&at, values, regions);
        // A rule that could not be read has no place among them.
        if self.problems.len() + self.unlisted > before {
            return rules;
        }
        for (index, rule) in rules.iter().enumerate() {
            if let Err(message) = check_source(&rule.source, bounds) {
                let mut at = at.index(index);
                at.rule = Some(index + 1);
                self.problem(&at, message);
            }
        }
        rules
    }
}

fn check_source(source: &Source, bounds: &Bounds) -> Result<(), String> {
    let Bounds {
        widest: [widest4, widest6],
        within,
        regions,
    } = bounds;
    match source {
        Source::Cidr(prefix) => {
            let widest = if prefix.addr().is_ipv4() {
                widest4
            } else {
                widest6
            };
            if prefix.prefix_len() < *widest {
                return Err(format!(
                    "{prefix} is wider than /{widest}, the widest that this host lets the fleet open (`widest`)"
                ));
            }
            if !within.is_empty() && !within.iter().any(|outer| outer.contains(prefix)) {
                return Err(format!(
                    "{prefix} is not inside {}, to which this host limits the fleet (`within`)",
                    list(within.iter())
                ));
            }
        }
        Source::Region(name) => {
            let listed = regions.as_ref().filter(|names| !names.contains(name));
            if let Some(names) = listed {
                let names = match names.is_empty() {
                    true => "none".into(),
                    false => list(names.iter()),
                };
                return Err(format!(
                    "region {name} is not among those that this host lets the fleet name (`regions`): {names}"
                ));
            }
        }
    }
    Ok(())
}
