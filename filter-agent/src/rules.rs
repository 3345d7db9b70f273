//! Rules as the kernel and the policy have them: their keys, and the prefixes that they hold. Pure.

use std::{collections::BTreeMap, sync::Arc};

use ipnet::IpNet;

use crate::{
    policy::{Database, Rule, Source, without},
    prefixes::Prefixes,
};

/// Prefixes that each region allows, by its name. A region that is missing allows nobody.
pub type Regions = BTreeMap<String, Arc<Prefixes>>;

/// Identifies a rule of a database in the kernel. It stays the same over reloads as long as the rule's source does.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RuleKey {
    Rule(Source),
    /// A rule of the fleet.
    Fleet(Source),
    /// Members of the cluster without an end.
    Cluster,
    /// A member of the cluster with an end.
    Member(Source),
    RegionalNetwork,
    Internet,
    /// Added by `allow`.
    Temporary(IpNet),
    Block(IpNet),
}

impl RuleKey {
    /// At most `filter_common::MAX_NAME` + 1 bytes; no two keys alike.
    pub fn text(&self) -> String {
        match self {
            Self::Rule(Source::Cidr(prefix)) => prefix.to_string(),
            Self::Rule(Source::Region(name)) => format!("@{name}"),
            Self::Fleet(Source::Cidr(prefix)) => format!("*{prefix}"),
            Self::Fleet(Source::Region(name)) => format!("^{name}"),
            Self::Cluster => "cluster".into(),
            Self::Member(Source::Cidr(prefix)) => format!("={prefix}"),
            Self::Member(Source::Region(name)) => format!("&{name}"),
            Self::RegionalNetwork => "regional network".into(),
            Self::Internet => "internet".into(),
            Self::Temporary(prefix) => format!("+{prefix}"),
            Self::Block(prefix) => format!("!{prefix}"),
        }
    }

    /// The key of a text; `None`: it is of no key.
    pub fn parse(text: &str) -> Option<Self> {
        let region = |name: &str| Source::Region(name.to_owned());
        Some(match (text, text.split_at_checked(1)?) {
            ("cluster", _) => Self::Cluster,
            ("regional network", _) => Self::RegionalNetwork,
            ("internet", _) => Self::Internet,
            (_, ("@", name)) => Self::Rule(region(name)),
            (_, ("*", prefix)) => Self::Fleet(Source::Cidr(prefix.parse().ok()?)),
            (_, ("^", name)) => Self::Fleet(region(name)),
            (_, ("=", prefix)) => Self::Member(Source::Cidr(prefix.parse().ok()?)),
            (_, ("&", name)) => Self::Member(region(name)),
            (_, ("+", prefix)) => Self::Temporary(prefix.parse().ok()?),
            (_, ("!", prefix)) => Self::Block(prefix.parse().ok()?),
            (prefix, _) => Self::Rule(Source::Cidr(prefix.parse().ok()?)),
        })
    }

    /// A text as `Display` has the key.
    pub fn describe(text: &str) -> String {
        Self::parse(text).map_or_else(|| text.to_owned(), |key| key.to_string())
    }

    /// Whether a text is a block's.
    pub fn is_block(text: &str) -> bool {
        text.starts_with('!')
    }

    /// Whether a text is that of a cluster's member with an end.
    pub fn is_member(text: &str) -> bool {
        text.starts_with(['=', '&'])
    }

    /// Whether TLS is not forced on what it allows: what a cluster says to itself.
    pub fn is_exempt(&self) -> bool {
        matches!(self, Self::Cluster | Self::Member(_))
    }
}

impl std::fmt::Display for RuleKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Rule(source) => source.fmt(f),
            Self::Fleet(source) => write!(f, "fleet rule {source}"),
            Self::Member(source) => write!(f, "cluster member {source}"),
            Self::Temporary(prefix) => write!(f, "temporary rule {prefix}"),
            Self::Block(prefix) => write!(f, "block {prefix}"),
            Self::Cluster | Self::RegionalNetwork | Self::Internet => f.write_str(&self.text()),
        }
    }
}

/// The rules of a database's policy and of its fleet, with their keys.
pub fn keyed(database: &Database) -> impl Iterator<Item = (RuleKey, &Rule)> {
    let written = database.rules().iter();
    let written = written.map(|rule| (RuleKey::Rule(rule.source.clone()), rule));
    let fleet = database.fleet_rules().iter();
    written.chain(fleet.map(|rule| (RuleKey::Fleet(rule.source.clone()), rule)))
}

/// The id of a rule in the API: where it comes from and what it names, since a database has no two rules of one origin for
/// one source.
pub fn rule_id(origin: &str, source: &Source) -> String {
    match source {
        // A `/` would end it in a path.
        Source::Cidr(prefix) => format!("{origin}-{}", prefix.to_string().replace('/', "_")),
        Source::Region(name) => format!("{origin}-region-{name}"),
    }
}

/// The prefixes of a rule of the policy or of a member of a cluster, without its exceptions.
pub fn held(rule: &Rule, regions: &Regions) -> Arc<Prefixes> {
    let prefixes = match &rule.source {
        Source::Cidr(prefix) => Prefixes::shared([*prefix]),
        Source::Region(name) => regions.get(name).cloned().unwrap_or_default(),
    };
    match rule.except.is_empty() {
        true => prefixes,
        false => Prefixes::shared(without(&prefixes, &rule.except)),
    }
}

#[cfg(test)]
mod tests {
    use filter_common::MAX_NAME;

    use super::*;

    #[test]
    fn text_of_a_rule_key_is_described_as_the_key() {
        let prefix: IpNet = "192.0.2.0/24".parse().unwrap();
        let sources = [Source::Cidr(prefix), Source::Region("office".into())];
        let members = sources.clone().map(RuleKey::Member);
        let fleet = sources.clone().map(RuleKey::Fleet);
        let others = [
            RuleKey::Cluster,
            RuleKey::RegionalNetwork,
            RuleKey::Internet,
            RuleKey::Temporary(prefix),
            RuleKey::Block(prefix),
        ];
        for key in sources
            .map(RuleKey::Rule)
            .into_iter()
            .chain(members)
            .chain(fleet)
            .chain(others)
        {
            assert_eq!(RuleKey::describe(&key.text()), key.to_string());
            assert_eq!(RuleKey::parse(&key.text()), Some(key.clone()));
            assert_eq!(
                RuleKey::is_block(&key.text()),
                matches!(key, RuleKey::Block(_))
            );
            assert_eq!(
                RuleKey::is_member(&key.text()),
                matches!(key, RuleKey::Member(_))
            );
        }
    }

    #[test]
    fn every_rule_key_fits_its_field_in_the_kernel() {
        let longest = RuleKey::Rule(Source::Region("r".repeat(MAX_NAME)));
        let name = filter_common::Name::new(1, &longest.text()).unwrap();
        assert_eq!(name.text(), Some(longest.text().as_str()));
        let v6 = RuleKey::Fleet(Source::Cidr(
            "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128"
                .parse()
                .unwrap(),
        ));
        assert!(v6.text().len() <= MAX_NAME);
    }
}
