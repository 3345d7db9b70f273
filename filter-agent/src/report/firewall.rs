//! The rules of a database in the shape of the provider's API.

use ipnet::IpNet;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::Origin;

#[derive(Debug, Deserialize, Serialize)]
pub struct FirewallRules {
    pub rules: Vec<FirewallRule>,
}

/// One rule alone.
#[derive(Debug, Deserialize, Serialize)]
pub struct FirewallRuleOnly {
    pub rule: FirewallRule,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct FirewallRule {
    /// Its origin and what it names.
    pub id: String,
    pub database_id: String,
    #[serde(rename = "type")]
    pub of: RangeType,
    pub cidr: Option<IpNet>,
    /// The region whose prefixes it stands for.
    pub range_id: Option<String>,
    pub label: Option<String>,
    pub action: FirewallAction,
    pub origin: Origin,
    pub except: Vec<IpNet>,
    pub expires: Option<Timestamp>,
    pub state: RuleState,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RangeType {
    #[default]
    CustomRange,
    ManagedRange,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FirewallAction {
    #[default]
    Allow,
    Block,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum RuleState {
    /// The kernel holds it.
    Active,
    /// A temporary rule that the database has no room for.
    Suspended,
    /// A rule of the file that has ended.
    Expired,
}

#[derive(Debug, Deserialize, Serialize)]
pub struct ManagedRanges {
    pub ranges: Vec<ManagedRange>,
}

/// A region.
#[derive(Debug, Deserialize, Serialize)]
pub struct ManagedRange {
    pub id: String,
    pub name: String,
    /// Where its prefixes come from, in words.
    pub source: String,
    /// How many it allows.
    pub prefixes: usize,
}
