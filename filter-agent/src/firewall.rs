//! The rules of a database as the API lists them, and the tag of such a list. Pure: no I/O, no clock.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use anyhow::{Result, ensure};

use crate::{
    clock::Now,
    policy::{Policy, Rule, Source},
    refusal::Refusal,
    report::{FirewallAction, FirewallRule, Origin, RangeType, RuleState},
    rules::{RuleKey, keyed, rule_id},
    temporary::{Kind, Temporary, Timed, find_database},
};

/// A database's rules of the policy, in its order, those of the fleet, in the document's, then temporary rules and blocks, oldest first.
///
/// # Errors
/// The policy has no such database.
pub fn rules(
    policy: &Policy,
    timed: &Timed,
    now: Now,
    database: &str,
) -> Result<Vec<FirewallRule>> {
    let database = find_database(policy, database)?;
    let timed = timed.at(now);
    let of_policy = keyed(database).map(|(key, rule)| {
        let origin = match key {
            RuleKey::Fleet(_) => Origin::Fleet,
            _ => Origin::File,
        };
        let has_ended = rule
            .expires
            .is_some_and(|at| timed.ends.of(&database.name, &key, at, now) <= now.boot);
        let state = match has_ended {
            true => RuleState::Expired,
            false => RuleState::Active,
        };
        of_policy(&database.name, rule, origin, state)
    });
    let running = timed.temporary.iter();
    let running = running.filter(|t| t.database == database.name && t.end > now.boot);
    let temporary = running.map(|rule| {
        let is_in_force = timed.in_force(database).any(|found| found == rule);
        let state = match is_in_force {
            true => RuleState::Active,
            false => RuleState::Suspended,
        };
        temporary(rule, state)
    });
    Ok(of_policy.chain(temporary).collect())
}

fn of_policy(database: &str, rule: &Rule, origin: Origin, state: RuleState) -> FirewallRule {
    let (of, cidr, range_id) = match &rule.source {
        Source::Cidr(prefix) => (RangeType::CustomRange, Some(*prefix), None),
        Source::Region(name) => (RangeType::ManagedRange, None, Some(name.clone())),
    };
    FirewallRule {
        id: rule_id(origin.name(), &rule.source),
        database_id: database.to_owned(),
        of,
        cidr,
        range_id,
        label: rule.label.clone(),
        action: FirewallAction::Allow,
        origin,
        except: rule.except.clone(),
        expires: rule.expires,
        state,
    }
}

fn temporary(rule: &Temporary, state: RuleState) -> FirewallRule {
    let (action, origin) = match rule.kind {
        Kind::Allow => (FirewallAction::Allow, Origin::Temporary),
        Kind::Block => (FirewallAction::Block, Origin::Block),
    };
    FirewallRule {
        id: rule.id(),
        database_id: rule.database.clone(),
        of: RangeType::CustomRange,
        cidr: Some(rule.source),
        range_id: None,
        label: rule.label.clone(),
        action,
        origin,
        except: Vec::new(),
        expires: Some(rule.until),
        state,
    }
}

/// The entity tag of a list, without its quotes: the same as long as nothing in the list changes.
pub fn tag(rules: &[FirewallRule]) -> String {
    let mut hasher = DefaultHasher::new();
    // Fails for no value of this type.
    serde_json::to_string(rules)
        .unwrap_or_default()
        .hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

/// What a change is made on the condition of: `If-Match` (RFC 9110 section 13.1.1).
#[derive(Clone, Debug, PartialEq)]
pub enum Condition {
    /// Whatever the list holds.
    Any,
    /// It has one of these tags.
    OneOf(Vec<String>),
}

impl Condition {
    /// # Errors
    /// The list is another one.
    pub fn check(&self, rules: &[FirewallRule]) -> Result<()> {
        let Self::OneOf(tags) = self else {
            return Ok(());
        };
        let tag = tag(rules);
        ensure!(
            tags.contains(&tag),
            Refusal::PreconditionFailed(format!(
                "the rules are others by now, with the tag \"{tag}\": read them again"
            ))
        );
        Ok(())
    }
}
