//! The fleet's part of a policy: where documents come from, how far they may go, and what one says.

use std::{collections::BTreeSet, path::PathBuf};

use ipnet::IpNet;
use jiff::Timestamp;

use crate::policy::Rule;

/// Longest document, in bytes.
pub const MAX_DOCUMENT: usize = 64 << 10;

/// Longest name of a host in the fleet, in bytes.
const MAX_HOST: usize = 63;

/// The source of the fleet's documents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fleet {
    /// URLs of the members of etcd, such as `https://10.0.0.11:2379`. Empty only where `frozen`.
    pub endpoints: Vec<String>,
    pub ca_file: Option<PathBuf>,
    /// The certificate, whose common name is the user in etcd, and its key.
    pub cert_file: Option<PathBuf>,
    pub key_file: Option<PathBuf>,
    /// Name of this host in the fleet; `None`: the host's name.
    pub host: Option<String>,
    /// Documents in force stay so, and nothing new is taken.
    pub frozen: bool,
}

/// How far the fleet may open a database.
#[derive(Clone, Debug, PartialEq)]
pub struct Bounds {
    /// Shortest prefix lengths, for IPv4 and IPv6.
    pub widest: [u8; 2],
    /// Networks that its rules must be inside of; empty: anywhere.
    pub within: Vec<IpNet>,
    /// Regions that it may name; `None`: every region of the policy.
    pub regions: Option<BTreeSet<String>>,
}

impl Default for Bounds {
    /// Those of a database with `fleet: true`.
    fn default() -> Self {
        Self {
            widest: [8, 16],
            within: Vec::new(),
            regions: None,
        }
    }
}

/// Checks the name of a host, which becomes part of keys in etcd.
///
/// # Errors
/// The name is too long, or has other characters.
pub fn check_host(name: &str) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
    let begins = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if !begins || name.len() > MAX_HOST || !name.chars().all(allowed) {
        return Err(format!(
            "{name:?} is not a valid name of a host in the fleet: 1 to {MAX_HOST} letters, digits, dots, hyphens and \
             underscores, of which the first is a letter or a digit"
        ));
    }
    Ok(())
}

/// The content of a document.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Document {
    pub rules: Vec<Rule>,
    pub rollout: Option<Rollout>,
}

/// Rules that some hosts enforce instead, for a time.
#[derive(Clone, Debug, PartialEq)]
pub struct Rollout {
    /// Names of hosts.
    pub on: BTreeSet<String>,
    /// From then on it counts as not written.
    pub until: Timestamp,
    pub rules: Vec<Rule>,
}

impl Document {
    /// The rules that a host enforces. Those that a rollout adds end with it, so that they do in the kernel as well.
    /// `is_over`: the time of the rollout.
    pub fn rules_of(&self, host: &str, is_over: bool) -> Vec<Rule> {
        let rollout = self.rollout.as_ref();
        let Some(rollout) = rollout.filter(|r| r.on.contains(host) && !is_over) else {
            return self.rules.clone();
        };
        let stays = |rule: &Rule| self.rules.contains(rule);
        let mut rules = rollout.rules.clone();
        for rule in rules.iter_mut().filter(|rule| !stays(rule)) {
            let end = rule
                .expires
                .map_or(rollout.until, |end| end.min(rollout.until));
            rule.expires = Some(end);
        }
        rules
    }

    /// Every rule of it, of the rollout too.
    pub fn all_rules(&self) -> impl Iterator<Item = &Rule> {
        let rollout = self.rollout.iter().flat_map(|rollout| &rollout.rules);
        self.rules.iter().chain(rollout)
    }
}
