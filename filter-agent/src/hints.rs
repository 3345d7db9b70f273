//! Why a source is dropped, and what would let it in: hints beside the sources that `drops` lists. Pure.

use std::{collections::BTreeMap, net::IpAddr};

use filter_common::{Engine, Reason};
use ipnet::IpNet;
use jiff::{Timestamp, Unit};

use crate::{
    clock::Now,
    holding::{Holding, Regional, in_force},
    policy::{Database, Model, Source},
    reconcile::InForce,
    region::state::{self as region, Regions},
    report,
    rules::{RuleKey, keyed},
    temporary::{Kind, Temporary, room},
};

/// Sources that get a hint: of a flood there are thousands, and each is compared with the rules of all databases.
pub const MAX_HINTS: usize = 256;

/// Everything that a hint may be about.
struct Facts<'a> {
    in_force: &'a InForce,
    regions: &'a Regions,
    /// Temporary rules that ended lately, the latest last.
    ended: &'a [Temporary],
    holdings: BTreeMap<&'a str, Vec<Holding>>,
    now: Now,
}

/// A hint, and whether a temporary rule would let the source in.
struct Hint {
    text: Option<String>,
    is_allowable: bool,
}

impl Hint {
    /// Of a source for which `allow` is of no use.
    fn only(text: impl Into<String>) -> Self {
        Self {
            text: Some(text.into()),
            is_allowable: false,
        }
    }
}

/// Adds hints to the first sources of a report.
pub fn add(
    drops: &mut report::Drops,
    in_force_now: &InForce,
    regions: &Regions,
    ended: &[Temporary],
    now: Now,
) {
    let policy = &in_force_now.file.policy;
    let prefixes = region::prefixes(regions);
    let mut regional = Regional::new(&prefixes);
    let timed = in_force_now.timed.at(now);
    let databases = policy.databases.iter();
    let facts = Facts {
        in_force: in_force_now,
        regions,
        ended,
        holdings: databases
            .map(|database| {
                let holdings = in_force(policy, database, &mut regional, &timed);
                (database.name.as_str(), holdings)
            })
            .collect(),
        now,
    };
    for dropped in drops.sources.iter_mut().take(MAX_HINTS) {
        let (Some(name), Some(source)) = (&dropped.database, dropped.source) else {
            continue;
        };
        let Some(database) = policy.databases.iter().find(|d| d.name == *name) else {
            continue;
        };
        let Some(hint) = facts.hint(database, source, &dropped.reason) else {
            continue;
        };
        dropped.hint = hint.text;
        if hint.is_allowable {
            dropped.allow = Some(format!("filter-agent allow {name} {source} --for 1h"));
        }
    }
}

impl Facts<'_> {
    fn hint(&self, database: &Database, source: IpAddr, reason: &str) -> Option<Hint> {
        let is = |one: Reason| reason == one.name();
        if is(Reason::NotTls) || is(Reason::NoProxyHeader) {
            return Some(Hint::only(client_must(database, is(Reason::NotTls))));
        }
        if is(Reason::TlsUnenforced) {
            return Some(Hint::only(
                "the source is allowed; the port is closed, since TLS cannot be enforced: `filter-agent status` says why",
            ));
        }
        if !is(Reason::NotAllowed) && !is(Reason::Blocked) {
            return None;
        }
        if let Some(block) = self.block(database, source) {
            let label = block.label.as_ref().map(|label| format!(" ({label})"));
            return Some(Hint::only(format!(
                "blocked by {}{} until {}: `filter-agent revoke {} {}` ends that",
                block.source,
                label.unwrap_or_default(),
                block.until,
                database.name,
                block.source
            )));
        }
        let holdings = &self.holdings[database.name.as_str()];
        let allows = |holding: &&Holding| {
            !matches!(holding.key, RuleKey::Block(_)) && holding.contains(source)
        };
        if let Some(rule) = holdings.iter().find(allows) {
            return Some(Hint::only(format!("allowed by now, by {}", rule.key)));
        }
        if let Model::Shared { .. } = database.model {
            return Some(Hint::only(
                "the database is shared: only a network of `regional_network:` in the policy file reaches it, or with \
                 `internet: true` everybody",
            ));
        }
        let text = self
            .history(database, source)
            .or_else(|| neighbour(database, source).or_else(|| self.elsewhere(database, source)));
        let timed = self.in_force.timed.at(self.now);
        let used = timed.in_force(database).filter(|t| t.kind == Kind::Allow);
        let is_full = used.count() >= room(database).0;
        if is_full {
            let full =
                "the database has no room for one more rule: `filter-agent revoke` makes some";
            let text = text.map_or(full.to_owned(), |text| format!("{text}; {full}"));
            return Some(Hint::only(text));
        }
        Some(Hint {
            text,
            is_allowable: true,
        })
    }

    fn block(&self, database: &Database, source: IpAddr) -> Option<&Temporary> {
        let timed = &self.in_force.timed;
        let blocks = timed.temporary.iter().filter(|rule| {
            rule.kind == Kind::Block
                && rule.database == database.name
                && rule.end > self.now.boot
                && rule.source.contains(&source)
        });
        blocks.max_by_key(|rule| rule.end)
    }

    /// Describes a rule that allowed the source, or that nearly does.
    fn history(&self, database: &Database, source: IpAddr) -> Option<String> {
        let now = self.now;
        let timed = self.in_force.timed.at(now);
        let holds = |rule: &&Temporary| {
            rule.kind == Kind::Allow
                && rule.database == database.name
                && rule.source.contains(&source)
        };
        let mut suspended = timed.suspended(&self.in_force.file.policy);
        if let Some(rule) = suspended.find(holds) {
            let source = rule.source;
            return Some(format!(
                "temporary rule {source} is suspended: the policy's rules leave it no room"
            ));
        }
        for (key, rule) in keyed(database) {
            let (Some(expires), Source::Cidr(prefix)) = (rule.expires, &rule.source) else {
                continue;
            };
            let has_ended = timed.ends.of(&database.name, &key, expires, now) <= now.boot;
            if has_ended && prefix.contains(&source) {
                return Some(format!("rule {key} allowed it until {expires}"));
            }
        }
        if let Some(rule) = self.ended.iter().rev().find(holds) {
            let label = rule.label.as_ref().map(|label| format!(" ({label})"));
            let (label, until) = (label.unwrap_or_default(), seconds(rule.until));
            let source = rule.source;
            return Some(format!(
                "temporary rule {source}{label} allowed it until {until}"
            ));
        }
        if let Some(exception) = exception(database, source) {
            return Some(exception);
        }
        let named = database.all_rules().filter_map(|rule| match &rule.source {
            Source::Region(name) => Some(name),
            Source::Cidr(_) => None,
        });
        for name in named {
            let change = self.regions.get(name).and_then(|s| s.change.as_ref());
            let removed = change.filter(|c| c.removed.iter().any(|p| p.contains(&source)));
            if let Some(change) = removed {
                let at = change.at.map(|at| seconds(now.on_host(at)));
                let until = at.map(|at| format!(" until {at}")).unwrap_or_default();
                return Some(format!("region {name} had it{until}"));
            }
        }
        None
    }

    /// Another database whose rules allow the source.
    fn elsewhere(&self, database: &Database, source: IpAddr) -> Option<String> {
        let others = self
            .holdings
            .iter()
            .filter(|(name, _)| **name != database.name);
        let mut allowed = others.filter_map(|(name, holdings)| {
            let allows = |holding: &&Holding| {
                let narrows = !matches!(holding.key, RuleKey::Block(_) | RuleKey::Internet);
                narrows && holding.contains(source)
            };
            let rule = holdings.iter().find(allows)?;
            Some(format!("{} of database {name} allows it there", rule.key))
        });
        allowed.next()
    }
}

/// The exception of a rule that holds the source: `rule 203.0.113.0/24 excepts 203.0.113.66/32`.
pub fn exception(database: &Database, source: IpAddr) -> Option<String> {
    database.all_rules().find_map(|rule| match &rule.source {
        Source::Cidr(prefix) if prefix.contains(&source) => {
            let except = rule.except.iter().find(|hole| hole.contains(&source))?;
            Some(format!("rule {prefix} excepts {except}"))
        }
        _ => None,
    })
}

/// Without fractions, which people do not read.
fn seconds(at: Timestamp) -> Timestamp {
    at.round(Unit::Second).unwrap_or(at)
}

/// A rule of few sources in the same /24 or /64.
fn neighbour(database: &Database, source: IpAddr) -> Option<String> {
    let network = |address: IpAddr| -> Option<(u8, IpNet)> {
        let length = if address.is_ipv4() { 24 } else { 64 };
        Some((length, IpNet::new(address, length).ok()?.trunc()))
    };
    let (length, own) = network(source)?;
    let rules = database.all_rules().chain(&database.cluster);
    let mut near = rules.filter_map(|rule| match &rule.source {
        Source::Cidr(prefix) if prefix.prefix_len() > length => {
            let (_, of_rule) = network(prefix.network())?;
            (of_rule == own).then(|| format!("next to {prefix}, in the same /{length}"))
        }
        _ => None,
    });
    near.next()
}

/// Tells how the client of a refused connection has to connect.
fn client_must(database: &Database, speak_tls: bool) -> String {
    if !speak_tls {
        return "the source is allowed; its connection must begin with a PROXY header".into();
    }
    let how = match database.tls.map(|tls| tls.engine) {
        Some(Engine::Postgresql) => " (sslmode=require)",
        Some(Engine::Mysql) => " (--ssl-mode=REQUIRED)",
        _ => "",
    };
    format!("the source is allowed; its client must use TLS{how}")
}

#[cfg(test)]
mod tests;
