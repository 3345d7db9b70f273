//! What is known of a region: the last good set, what became of each answer since, and when to ask
//! again. Pure: answers and instants are given.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use backon::{BackoffBuilder as _, ExponentialBuilder};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    policy::{Guards, Model, Policy, Region, RegionSource, Source, spelled},
    region::lookup::{Answer, Found, Version},
};

/// Regions that rules name, by name.
pub type Regions = BTreeMap<String, State>;

/// The names of the regions that rules name.
pub fn used(policy: &Policy) -> impl Iterator<Item = &String> {
    let rules = policy
        .databases
        .iter()
        .filter_map(|database| match &database.model {
            Model::Dedicated { rules } => Some(rules),
            Model::Shared { .. } => None,
        });
    rules.flatten().filter_map(|rule| match &rule.source {
        Source::Region(name) => Some(name),
        Source::Cidr(_) => None,
    })
}

/// Regions of a policy that must be asked before it can be in force: those that are not known yet, or
/// not from this source, and files, which the operator expects to be read.
pub fn to_ask<'a>(policy: &'a Policy, known: &Regions) -> BTreeMap<&'a str, Option<Version>> {
    let version = |name: &'a String| {
        let region = policy.regions.get(name)?;
        match (kept(region, known.get(name)), &region.source) {
            (Some(state), RegionSource::File(_)) => Some((name.as_str(), state.version().cloned())),
            (Some(_), _) | (None, RegionSource::Prefixes(_)) => None,
            (None, _) => Some((name.as_str(), None)),
        }
    };
    used(policy).filter_map(version).collect()
}

/// What is known of a region that stays true under a new policy.
fn kept<'a>(region: &Region, known: Option<&'a State>) -> Option<&'a State> {
    let holds = |state: &State| {
        let set = state.set.as_ref();
        set.is_none_or(|set| check(&set.members, &region.guards).is_ok())
    };
    known.filter(|state| {
        let Region { source, guards } = &state.region;
        *source == region.source && (*guards == region.guards || holds(state))
    })
}

/// The regions of a policy: what is known of them, and these answers.
///
/// # Errors
/// The regions whose answer is an error or refused, each with why.
pub fn next(
    policy: &Policy,
    known: &Regions,
    mut answers: BTreeMap<String, Result<Answer>>,
    now: Timestamp,
) -> Result<Regions> {
    let mut regions = Regions::new();
    let mut errors = Vec::new();
    for name in used(policy) {
        if regions.contains_key(name) {
            continue;
        }
        let region = policy.regions.get(name);
        let region = region.with_context(|| format!("find region {name}"))?;
        let mut state = match kept(region, known.get(name)) {
            Some(state) => State {
                region: region.clone(),
                ..state.clone()
            },
            None => State::new(region.clone(), now),
        };
        if let Some(answer) = answers.remove(name) {
            state.take(answer, false, now);
            if let (true, Some(error)) = (state.failing, &state.error) {
                errors.push(format!("region {name}: {}", error.text));
            }
        }
        regions.insert(name.clone(), state);
    }
    ensure!(errors.is_empty(), "{}", errors.join("\n"));
    Ok(regions)
}

/// The prefixes that each region allows.
pub fn prefixes(regions: &Regions) -> BTreeMap<String, Arc<[IpNet]>> {
    let allowed = |(name, state): (&String, &State)| {
        let set = state.set.as_ref()?;
        Some((name.clone(), set.prefixes.clone()))
    };
    regions.iter().filter_map(allowed).collect()
}

#[derive(Clone, Debug)]
pub struct State {
    pub region: Region,
    /// In force. `None`: nothing is known, and the region allows nobody.
    pub set: Option<Set>,
    pub change: Option<Change>,
    pub error: Option<Error>,
    /// Whether the last look-up failed.
    pub failing: bool,
    /// When to ask again; `None`: when the file changes, or never.
    pub next: Option<Timestamp>,
    held: Option<Held>,
    failures: usize,
}

/// The last good set.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Set {
    /// Of the last good answer, sorted, no two alike.
    pub members: Arc<[IpNet]>,
    /// Members that left, and until when they stay allowed.
    pub retiring: Vec<(IpNet, Timestamp)>,
    /// When the source last gave it.
    pub confirmed: Timestamp,
    pub serial: Option<u64>,
    pub version: Option<Version>,
    /// What is allowed: members and those that retire, adjacent and covered ones merged.
    #[serde(skip)]
    pub prefixes: Arc<[IpNet]>,
}

/// An answer that may be wrong, and is believed when it stays the same.
#[derive(Clone, Debug)]
struct Held {
    members: Vec<IpNet>,
    since: Timestamp,
}

/// What the last change did to what is allowed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Change {
    pub at: Option<Timestamp>,
    pub added: Vec<IpNet>,
    /// No longer in the answer; allowed for `retire_after`.
    pub left: Vec<IpNet>,
    /// No longer allowed.
    pub removed: Vec<IpNet>,
}

impl Change {
    pub fn is_empty(&self) -> bool {
        self.added.is_empty() && self.left.is_empty() && self.removed.is_empty()
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Error {
    pub at: Timestamp,
    pub text: String,
}

impl Set {
    fn merge(&mut self) {
        let retiring = self.retiring.iter().map(|&(prefix, _)| prefix);
        let all: Vec<IpNet> = self.members.iter().copied().chain(retiring).collect();
        self.prefixes = merged(&all).into();
    }
}

impl State {
    /// Of a region that was never asked for: that is due.
    pub fn new(region: Region, now: Timestamp) -> Self {
        let mut state = Self {
            region,
            set: None,
            change: None,
            error: None,
            failing: false,
            next: Some(now),
            held: None,
            failures: 0,
        };
        if let RegionSource::Prefixes(prefixes) = &state.region.source {
            let found = Found {
                prefixes: prefixes.clone(),
                ..Found::default()
            };
            state.replace(found, now);
            state.change = None;
            state.next = None;
        }
        state
    }

    /// Puts in force what was kept, if it holds to the guards and to `max_age`.
    ///
    /// # Errors
    /// What is wrong with it; nothing is in force then.
    pub fn restore(&mut self, mut set: Set, now: Timestamp) -> Result<()> {
        let guards = &self.region.guards;
        ensure!(
            set.members.is_sorted_by(|a, b| a < b),
            "its members are out of order"
        );
        check(&set.members, guards)?;
        // The clock may have been wrong when it was written, or may be now.
        set.confirmed = set.confirmed.min(now);
        let latest = now + guards.retire_after;
        for (_, until) in &mut set.retiring {
            *until = (*until).min(latest);
        }
        set.retiring.retain(|&(_, until)| until > now);
        let leaving: Vec<IpNet> = set.retiring.iter().map(|&(prefix, _)| prefix).collect();
        check_each(&leaving, guards)?;
        if let Some(max_age) = guards.max_age {
            ensure!(
                set.confirmed + max_age > now,
                "it was confirmed at {}, longer ago than {} (`max_age`)",
                set.confirmed,
                spelled(max_age)
            );
        }
        set.merge();
        self.set = Some(set);
        Ok(())
    }

    /// The version of the set in force, to ask whether the source has another.
    pub fn version(&self) -> Option<&Version> {
        // An answer that is held was not taken: it must be given again in full.
        match (&self.held, &self.set) {
            (None, Some(set)) => set.version.as_ref(),
            _ => None,
        }
    }

    /// Whether another state of the region has the same set of the same source, whenever it was confirmed.
    pub fn holds_the_same(&self, other: &Self) -> bool {
        let content = |set: &Set| Set {
            confirmed: Timestamp::UNIX_EPOCH,
            ..set.clone()
        };
        self.region.source == other.region.source
            && self.set.as_ref().map(content) == other.set.as_ref().map(content)
    }

    /// Takes a look-up's outcome. `accept`: believe it even if it lost most of its members or is older
    /// than the last one. Returns what changed of what is allowed.
    pub fn take(&mut self, outcome: Result<Answer>, accept: bool, now: Timestamp) -> Change {
        match outcome.and_then(|answer| self.judge(answer, accept, now)) {
            Ok(change) => {
                self.failing = false;
                self.failures = 0;
                if !change.is_empty() {
                    self.change = Some(change.clone());
                }
                change
            }
            Err(error) => {
                self.fail(format!("{error:#}"), now);
                Change::default()
            }
        }
    }

    /// Notes a failure; the set in force stays.
    pub fn fail(&mut self, text: String, now: Timestamp) {
        let Guards {
            min_refresh,
            max_refresh,
            ..
        } = self.region.guards;
        let mut delays = ExponentialBuilder::new()
            .with_min_delay(min_refresh)
            .with_max_delay(max_refresh)
            .without_max_times()
            .with_jitter()
            .build();
        // Past the longest delay one more changes nothing.
        let delay = delays.nth(self.failures.min(32)).unwrap_or(max_refresh);
        let mut next = now + delay.min(max_refresh);
        if let Some(held) = &self.held {
            next = next
                .min(held.since + self.region.guards.shrink_after)
                .max(now + min_refresh);
        }
        self.next = Some(next);
        self.failures += 1;
        self.failing = true;
        self.error = Some(Error { at: now, text });
    }

    fn judge(&mut self, answer: Answer, accept: bool, now: Timestamp) -> Result<Change> {
        let found = match answer {
            Answer::Found(found) => found,
            Answer::Unchanged { ask_again } => {
                let Some(set) = &mut self.set else {
                    bail!("the source says that nothing changed, and nothing is known");
                };
                set.confirmed = now;
                self.next = self.schedule(ask_again, now);
                return Ok(Change::default());
            }
        };
        let mut found = found;
        found.prefixes.sort_unstable();
        found.prefixes.dedup();
        if let Err(error) = check(&found.prefixes, &self.region.guards) {
            self.held = None;
            return Err(error);
        }
        if let Some(suspicion) = self.suspicion(&found)
            && !accept
        {
            self.hold(&found.prefixes, &suspicion, now)?;
        }
        self.held = None;
        self.next = self.schedule(found.ask_again, now);
        Ok(self.replace(found, now))
    }

    fn schedule(&self, ask_again: Option<Duration>, now: Timestamp) -> Option<Timestamp> {
        let Guards {
            min_refresh,
            max_refresh,
            ..
        } = self.region.guards;
        let delay = match (&self.region.source, ask_again) {
            (RegionSource::Prefixes(_), _) => return None,
            // Changes are announced, but no word comes of a file that stays as it is.
            (RegionSource::File(_), None) if self.region.guards.max_age.is_none() => return None,
            (_, ask_again) => ask_again.unwrap_or(max_refresh),
        };
        Some(now + delay.clamp(min_refresh, max_refresh))
    }

    /// Why an answer that is well formed may be wrong all the same.
    fn suspicion(&self, found: &Found) -> Option<String> {
        let set = self.set.as_ref()?;
        if let (Some(known), Some(serial)) = (set.serial, found.serial)
            && serial < known
        {
            return Some(format!(
                "the list's number {serial} is older than {known}, in force"
            ));
        }
        let gone = uncovered(&set.members, &merged(&found.prefixes)).count();
        let max_shrink = self.region.guards.max_shrink;
        let most = set.members.len() * usize::from(max_shrink) / 100;
        (gone > most).then(|| {
            let members = set.members.len();
            format!("{gone} of {members} prefixes are gone, more than {max_shrink}% (`max_shrink`)")
        })
    }

    /// Waits for a suspicious answer to stay the same.
    ///
    /// # Errors
    /// Until it has.
    fn hold(&mut self, members: &[IpNet], suspicion: &str, now: Timestamp) -> Result<()> {
        let since = match &self.held {
            Some(held) if held.members == members => held.since,
            _ => {
                let members = members.to_vec();
                self.held = Some(Held {
                    members,
                    since: now,
                });
                now
            }
        };
        let until = since + self.region.guards.shrink_after;
        ensure!(
            now >= until,
            "{suspicion}: taken if it is still so at {until}, or now with `filter-agent refresh \
             REGION --accept`"
        );
        Ok(())
    }

    /// Puts an answer in force.
    fn replace(&mut self, found: Found, now: Timestamp) -> Change {
        let before = self.set.take();
        let (known, allowed, mut retiring) = match before {
            Some(set) => (set.members, set.prefixes, set.retiring),
            None => Default::default(),
        };
        let answered = merged(&found.prefixes);
        retiring.retain(|(prefix, _)| !is_covered(prefix, &answered));
        let mut change = Change {
            at: Some(now),
            added: uncovered(&found.prefixes, &allowed).collect(),
            ..Change::default()
        };
        let retire_after = self.region.guards.retire_after;
        let gone = uncovered(&known, &answered).filter(|gone| {
            let retires = |(prefix, _): &(IpNet, Timestamp)| prefix == gone;
            !retiring.iter().any(retires)
        });
        let gone: Vec<IpNet> = gone.collect();
        if retire_after.is_zero() {
            change.removed = gone;
        } else {
            retiring.extend(gone.iter().map(|&prefix| (prefix, now + retire_after)));
            change.left = gone;
        }
        let mut set = Set {
            members: found.prefixes.into(),
            retiring,
            confirmed: now,
            serial: found.serial,
            version: found.version,
            prefixes: Arc::default(),
        };
        set.merge();
        self.set = Some(set);
        change
    }

    /// What time alone changes: members whose time is over, and a set that is too old.
    pub fn tick(&mut self, now: Timestamp) -> Change {
        let mut change = Change {
            at: Some(now),
            ..Change::default()
        };
        let Some(set) = &mut self.set else {
            return change;
        };
        if let Some(max_age) = self.region.guards.max_age
            && set.confirmed + max_age <= now
        {
            change.removed = set.prefixes.to_vec();
            let text = format!("not confirmed since {} (`max_age`)", set.confirmed);
            self.set = None;
            self.held = None;
            self.failing = true;
            self.error = Some(Error { at: now, text });
        } else if set.retiring.iter().any(|&(_, until)| until <= now) {
            let over = set.retiring.extract_if(.., |&mut (_, until)| until <= now);
            change.removed = over.map(|(prefix, _)| prefix).collect();
            set.merge();
        }
        if !change.is_empty() {
            self.change = Some(change.clone());
        }
        change
    }

    /// When `tick` changes something next.
    pub fn next_tick(&self) -> Option<Timestamp> {
        let set = self.set.as_ref()?;
        let retires = set.retiring.iter().map(|&(_, until)| until).min();
        let max_age = self.region.guards.max_age;
        let ages = max_age.map(|max_age| set.confirmed + max_age);
        [retires, ages].into_iter().flatten().min()
    }
}

/// Adjacent and covered prefixes merged, sorted.
fn merged(prefixes: &[IpNet]) -> Vec<IpNet> {
    let mut merged = IpNet::aggregate(&prefixes.to_vec());
    merged.sort_unstable();
    merged
}

/// Whether one of the prefixes, merged and sorted, holds this one: only the last that sorts no later
/// can, since of the same address the shorter prefix sorts first.
fn is_covered(prefix: &IpNet, merged: &[IpNet]) -> bool {
    let later = merged.partition_point(|other| other <= prefix);
    later > 0 && merged[later - 1].contains(prefix)
}

fn uncovered<'a>(prefixes: &'a [IpNet], merged: &'a [IpNet]) -> impl Iterator<Item = IpNet> + 'a {
    let uncovered = prefixes.iter().filter(|prefix| !is_covered(prefix, merged));
    uncovered.copied()
}

/// # Errors
/// What an answer must not hold, or that it holds nothing or too much.
fn check(prefixes: &[IpNet], guards: &Guards) -> Result<()> {
    ensure!(!prefixes.is_empty(), "the answer holds no prefix");
    ensure!(
        prefixes.len() <= guards.max_prefixes,
        "the answer holds {} prefixes; at most {} (`max_prefixes`)",
        prefixes.len(),
        guards.max_prefixes
    );
    check_each(prefixes, guards)
}

/// Shortest prefix lengths that an answer may hold.
const SHORTEST4: u8 = 8;
const SHORTEST6: u8 = 16;

fn check_each(prefixes: &[IpNet], guards: &Guards) -> Result<()> {
    for prefix in prefixes {
        let shortest = match prefix {
            IpNet::V4(_) => SHORTEST4,
            IpNet::V6(_) => SHORTEST6,
        };
        ensure!(prefix.trunc() == *prefix, "{prefix} has host bits set");
        ensure!(
            prefix.prefix_len() >= shortest,
            "{prefix} is broader than /{shortest}, which no region is"
        );
        for (special, what) in SPECIAL {
            ensure!(!overlap(prefix, &special), "{prefix} is {what}");
        }
        for private in PRIVATE {
            ensure!(
                guards.private || !overlap(prefix, &private),
                "{prefix} is private; a region that has such addresses needs `private: true`"
            );
        }
    }
    Ok(())
}

fn overlap(one: &IpNet, other: &IpNet) -> bool {
    one.contains(other) || other.contains(one)
}

const fn v4(a: u8, b: u8, length: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(
        std::net::Ipv4Addr::new(a, b, 0, 0),
        length,
    ))
}

const fn v6(first: u16, length: u8) -> IpNet {
    let address = std::net::Ipv6Addr::new(first, 0, 0, 0, 0, 0, 0, 0);
    IpNet::V6(Ipv6Net::new_assert(address, length))
}

/// Ranges of the IANA special-purpose registries (RFC 6890) that hold no region's addresses.
const SPECIAL: [(IpNet, &str); 8] = [
    (v4(0, 0, 8), "unspecified"),
    (v4(127, 0, 8), "loopback"),
    (v4(169, 254, 16), "link-local"),
    (v4(224, 0, 4), "multicast"),
    (v4(240, 0, 4), "reserved"),
    // ::/16 holds the unspecified, the loopback and the IPv4-mapped addresses.
    (v6(0, 16), "unspecified, loopback or IPv4-mapped"),
    (v6(0xfe80, 10), "link-local"),
    (v6(0xff00, 8), "multicast"),
];

/// RFC 1918, 6598 and 4193.
const PRIVATE: [IpNet; 5] = [
    v4(10, 0, 8),
    v4(172, 16, 12),
    v4(192, 168, 16),
    v4(100, 64, 10),
    v6(0xfc00, 7),
];

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;
    use crate::policy;

    const NOW: &str = "2026-01-01T00:00:00Z";

    fn region(fields: &str) -> Region {
        let text = format!("interfaces: [eth0]\ndatabases: []\nregions: {{x: {{{fields}}}}}");
        policy::parse(&text).unwrap().0.regions.remove("x").unwrap()
    }

    fn after(time: Duration) -> Timestamp {
        NOW.parse::<Timestamp>().unwrap() + time
    }

    fn seconds(count: u64) -> Timestamp {
        after(Duration::from_secs(count))
    }

    fn list(prefixes: &[&str]) -> Vec<IpNet> {
        prefixes
            .iter()
            .map(|prefix| prefix.parse().unwrap())
            .collect()
    }

    fn found(prefixes: &[&str]) -> Result<Answer> {
        Ok(Answer::Found(Found {
            prefixes: list(prefixes),
            ask_again: Some(Duration::from_secs(20)),
            ..Found::default()
        }))
    }

    fn allowed(state: &State) -> Vec<IpNet> {
        let set = state.set.as_ref();
        set.map(|set| set.prefixes.to_vec()).unwrap_or_default()
    }

    fn error(state: &State) -> &str {
        &state.error.as_ref().unwrap().text
    }

    const DNS: &str = "dns: [egress.example.net]";
    const TWO: [&str; 2] = ["192.0.2.10/32", "192.0.2.20/32"];

    fn with_two(fields: &str) -> State {
        let mut state = State::new(region(fields), seconds(0));
        state.take(found(&TWO), false, seconds(0));
        assert_eq!(allowed(&state), list(&TWO));
        state
    }

    #[test]
    fn every_bad_answer_is_refused_and_keeps_the_last_good_set() {
        let many: Vec<String> = (0..11).map(|i| format!("198.51.100.{i}/32")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let bad: &[(&[&str], &str)] = &[
            (&[], "holds no prefix"),
            (
                &["192.0.2.10/32", "192.0.2.20/32", "0.0.0.0/0"],
                "broader than /8",
            ),
            (
                &["192.0.2.10/32", "192.0.2.20/32", "64.0.0.0/7"],
                "broader than /8",
            ),
            (
                &["192.0.2.10/32", "192.0.2.20/32", "::/0"],
                "broader than /16",
            ),
            (
                &["192.0.2.10/32", "192.0.2.20/32", "2000::/15"],
                "broader than /16",
            ),
            (
                &["192.0.2.10/32", "192.0.2.20/32", "0.0.0.0/32"],
                "unspecified",
            ),
            (
                &["192.0.2.10/32", "192.0.2.20/32", "127.0.0.1/32"],
                "loopback",
            ),
            (
                &["192.0.2.10/32", "192.0.2.20/32", "169.254.169.254/32"],
                "link-local",
            ),
            (
                &["192.0.2.10/32", "192.0.2.20/32", "224.0.0.1/32"],
                "multicast",
            ),
            (
                &["192.0.2.10/32", "192.0.2.20/32", "255.255.255.255/32"],
                "reserved",
            ),
            (&["192.0.2.10/32", "192.0.2.20/32", "::1/128"], "loopback"),
            (
                &["192.0.2.10/32", "192.0.2.20/32", "::ffff:192.0.2.10/128"],
                "IPv4-mapped",
            ),
            (
                &["192.0.2.10/32", "192.0.2.20/32", "fe80::1/128"],
                "link-local",
            ),
            (
                &["192.0.2.10/32", "192.0.2.20/32", "ff02::1/128"],
                "multicast",
            ),
            (
                &["192.0.2.10/32", "192.0.2.20/32", "10.1.2.3/32"],
                "private: true",
            ),
            (
                &["192.0.2.10/32", "192.0.2.20/32", "172.0.0.0/8"],
                "private: true",
            ),
            (
                &["192.0.2.10/32", "192.0.2.20/32", "192.168.0.0/24"],
                "private: true",
            ),
            (
                &["192.0.2.10/32", "192.0.2.20/32", "100.64.0.1/32"],
                "private: true",
            ),
            (
                &["192.0.2.10/32", "192.0.2.20/32", "fd00::1/128"],
                "private: true",
            ),
            (
                &["192.0.2.10/32", "192.0.2.20/32", "192.0.3.1/24"],
                "host bits",
            ),
            (&many, "at most 10 (`max_prefixes`)"),
            (
                &["198.51.100.1/32", "198.51.100.2/32"],
                "2 of 2 prefixes are gone",
            ),
        ];
        for (answer, expected) in bad {
            let mut state = with_two(&format!("{DNS}, max_prefixes: 10"));
            let change = state.take(found(answer), false, seconds(20));
            assert!(change.is_empty() && state.failing, "{answer:?}");
            assert!(
                error(&state).contains(expected),
                "{answer:?}: {}",
                error(&state)
            );
            assert_eq!(allowed(&state), list(&TWO), "{answer:?}");
            assert_eq!(state.set.as_ref().unwrap().confirmed, seconds(0));
        }
    }

    #[test]
    fn bad_answer_is_refused_even_when_it_is_to_be_accepted_or_is_the_first() {
        let bad = ["192.0.2.10/32", "192.0.2.20/32", "0.0.0.0/0"];
        let mut state = with_two(DNS);
        state.take(found(&bad), true, seconds(20));
        assert_eq!(allowed(&state), list(&TWO));
        let mut state = State::new(region(DNS), seconds(0));
        state.take(found(&bad), false, seconds(0));
        assert_eq!(allowed(&state), []);
    }

    #[test]
    fn private_addresses_are_taken_with_private_true() {
        let mut state = State::new(region(&format!("{DNS}, private: true")), seconds(0));
        state.take(found(&["10.1.0.0/16", "fd00::/32"]), false, seconds(0));
        assert_eq!(allowed(&state), list(&["10.1.0.0/16", "fd00::/32"]));
    }

    #[test]
    fn address_that_leaves_stays_allowed_until_it_retires() {
        let mut state = with_two(DNS);
        let change = state.take(
            found(&["192.0.2.10/32", "192.0.2.30/32"]),
            false,
            seconds(20),
        );
        assert_eq!(change.added, list(&["192.0.2.30/32"]));
        assert_eq!(change.left, list(&["192.0.2.20/32"]));
        assert_eq!(change.removed, []);
        let three = list(&["192.0.2.10/32", "192.0.2.20/32", "192.0.2.30/32"]);
        assert_eq!(allowed(&state), three);
        let over = seconds(20 + 3600);
        assert_eq!(state.next_tick(), Some(over));
        assert!(state.tick(seconds(20 + 3599)).is_empty());
        assert_eq!(allowed(&state), three);
        assert_eq!(state.tick(over).removed, list(&["192.0.2.20/32"]));
        assert_eq!(allowed(&state), list(&["192.0.2.10/32", "192.0.2.30/32"]));
        assert_eq!(state.next_tick(), None);
    }

    #[test]
    fn address_that_returns_does_not_retire() {
        let mut state = with_two(DNS);
        state.take(found(&["192.0.2.10/32"]), false, seconds(20));
        state.take(found(&TWO), false, seconds(40));
        assert_eq!(state.next_tick(), None);
        assert_eq!(allowed(&state), list(&TWO));
    }

    #[test]
    fn set_that_shrank_is_taken_when_it_repeats_for_long_enough() {
        let mut state = with_two(&format!("{DNS}, shrink_after: 5m, retire_after: 0s"));
        let other = ["192.0.2.30/32"];
        state.take(found(&other), false, seconds(100));
        state.take(found(&other), false, seconds(399));
        assert!(state.failing && error(&state).contains("2026-01-01T00:06:40Z"));
        assert_eq!(allowed(&state), list(&TWO));
        let change = state.take(found(&other), false, seconds(400));
        assert_eq!((change.added, change.removed), (list(&other), list(&TWO)));
        assert!(!state.failing);
    }

    #[test]
    fn set_that_shrank_starts_anew_when_it_differs_or_was_not_repeated() {
        let mut state = with_two(&format!("{DNS}, shrink_after: 5m"));
        state.take(found(&["192.0.2.30/32"]), false, seconds(100));
        state.take(found(&["192.0.2.31/32"]), false, seconds(200));
        state.take(found(&["192.0.2.31/32"]), false, seconds(450));
        assert_eq!(allowed(&state), list(&TWO));
        state.take(found(&TWO), false, seconds(460));
        state.take(found(&["192.0.2.31/32"]), false, seconds(600));
        assert!(state.failing);
        assert_eq!(allowed(&state), list(&TWO));
    }

    #[test]
    fn set_that_shrank_is_taken_at_once_when_told_so() {
        let mut state = with_two(DNS);
        state.take(found(&["192.0.2.30/32"]), true, seconds(100));
        assert!(!state.failing);
        assert_eq!(allowed(&state).len(), 3);
    }

    #[test]
    fn half_may_leave_at_once_and_no_more() {
        let four = [
            "192.0.2.1/32",
            "192.0.2.3/32",
            "192.0.2.5/32",
            "192.0.2.7/32",
        ];
        for (left, taken) in [(2, true), (1, false)] {
            let mut state = State::new(region(DNS), seconds(0));
            state.take(found(&four), false, seconds(0));
            state.take(found(&four[..left]), false, seconds(20));
            assert_eq!(!state.failing, taken, "{left} left");
        }
    }

    #[test]
    fn list_that_is_older_is_held() {
        let numbered = |prefixes: &[&str], serial| {
            Ok(Answer::Found(Found {
                prefixes: list(prefixes),
                serial: Some(serial),
                ..Found::default()
            }))
        };
        let url = "url: 'https://example.net/'";
        let mut state = State::new(region(url), seconds(0));
        state.take(numbered(&TWO, 7), false, seconds(0));
        let more = ["192.0.2.10/32", "192.0.2.20/32", "192.0.2.30/32"];
        state.take(numbered(&more, 6), false, seconds(20));
        assert!(
            error(&state).contains("6 is older than 7"),
            "{}",
            error(&state)
        );
        assert_eq!(allowed(&state), list(&TWO));
        state.take(numbered(&more, 8), false, seconds(40));
        assert_eq!(allowed(&state), list(&more));
    }

    #[test]
    fn adjacent_and_covered_prefixes_are_merged_and_the_members_are_remembered() {
        let mut state = State::new(region(DNS), seconds(0));
        let members = [
            "192.0.2.0/25",
            "192.0.2.128/25",
            "192.0.2.7/32",
            "2001:db8::/33",
            "2001:db8:8000::/33",
        ];
        state.take(found(&members), false, seconds(0));
        assert_eq!(allowed(&state), list(&["192.0.2.0/24", "2001:db8::/32"]));
        assert_eq!(state.set.as_ref().unwrap().members.len(), 5);
        // One that is covered may leave and changes nothing; one that is not retires.
        let change = state.take(found(&members[1..]), false, seconds(20));
        assert_eq!(change.left, list(&["192.0.2.0/25"]));
        assert_eq!(allowed(&state), list(&["192.0.2.0/24", "2001:db8::/32"]));
        state.tick(seconds(20 + 3600));
        let rest = ["192.0.2.7/32", "192.0.2.128/25", "2001:db8::/32"];
        assert_eq!(allowed(&state), list(&rest));
    }

    #[test]
    fn list_that_says_the_same_in_other_prefixes_changes_nothing() {
        let halves = ["192.0.2.0/25", "192.0.2.128/25", "2001:db8::/32"];
        let mut state = State::new(region(DNS), seconds(0));
        state.take(found(&halves), false, seconds(0));
        for same in [
            &["192.0.2.0/24", "2001:db8::/32"][..],
            &[
                "192.0.2.0/24",
                "192.0.2.0/25",
                "2001:db8::/33",
                "2001:db8:8000::/33",
            ],
            &halves,
        ] {
            let change = state.take(found(same), false, seconds(20));
            assert!(change.is_empty() && !state.failing, "{same:?}: {change:?}");
            assert_eq!(allowed(&state), list(&["192.0.2.0/24", "2001:db8::/32"]));
            assert_eq!(state.next_tick(), None);
        }
    }

    #[test]
    fn covered_prefixes_are_found_as_by_looking_at_each() {
        let mut random = fastrand::Rng::with_seed(1);
        let mut prefix = || {
            let address = std::net::Ipv4Addr::from([192, 0, 2, random.u8(..)]);
            IpNet::new(address.into(), random.u8(24..=32))
                .unwrap()
                .trunc()
        };
        for _ in 0..2_000 {
            let merged = merged(&[prefix(), prefix(), prefix(), prefix()]);
            let wanted = prefix();
            let expected = merged.iter().any(|other| other.contains(&wanted));
            assert_eq!(
                is_covered(&wanted, &merged),
                expected,
                "{wanted} in {merged:?}"
            );
        }
    }

    #[test]
    fn answer_decides_when_to_ask_again_within_bounds() {
        let mut state = with_two(&format!("{DNS}, min_refresh: 5s, max_refresh: 30s"));
        assert_eq!(state.next, Some(seconds(20)));
        for (ttl, next) in [(0, 5), (3600, 30)] {
            let answer = Answer::Found(Found {
                prefixes: list(&TWO),
                ask_again: Some(Duration::from_secs(ttl)),
                ..Found::default()
            });
            state.take(Ok(answer), false, seconds(0));
            assert_eq!(state.next, Some(seconds(next)));
        }
    }

    #[test]
    fn failures_are_tried_again_later_and_later_and_not_in_step() {
        let mut spread = Vec::new();
        for _ in 0..50 {
            let mut state = with_two(&format!("{DNS}, min_refresh: 1s, max_refresh: 1m"));
            let mut delays = Vec::new();
            for _ in 0..40 {
                state.take(Err(anyhow!("no answer")), false, seconds(0));
                delays.push(state.next.unwrap().duration_since(seconds(0)).as_millis());
            }
            for (delay, least) in delays.iter().zip([1000, 2000, 4000, 8000, 16_000, 32_000]) {
                assert!(
                    (least..=2 * least.min(30_000)).contains(delay),
                    "{delays:?}"
                );
            }
            assert!(
                delays[6..].iter().all(|&delay| delay == 60_000),
                "{delays:?}"
            );
            spread.push(delays[3]);
            state.take(found(&TWO), false, seconds(0));
            state.take(Err(anyhow!("no answer")), false, seconds(0));
            assert!(state.next.unwrap() <= seconds(2));
        }
        spread.sort_unstable();
        assert!(spread[40] - spread[10] > 1000, "{spread:?}");
    }

    #[test]
    fn set_that_is_not_confirmed_is_dropped_at_max_age_and_only_then() {
        let mut state = with_two(&format!("{DNS}, max_age: 1h"));
        state.take(Err(anyhow!("no answer")), false, seconds(3000));
        assert_eq!(state.next_tick(), Some(seconds(3600)));
        assert!(state.tick(seconds(3599)).is_empty());
        let change = state.tick(seconds(3600));
        assert_eq!(change.removed, list(&TWO));
        assert_eq!(allowed(&state), []);
        assert!(error(&state).contains("max_age"));
        state.take(found(&TWO), false, seconds(3700));
        assert_eq!(allowed(&state), list(&TWO));
        let mut state = with_two(&format!("{DNS}, max_age: 1h"));
        state.take(
            Ok(Answer::Unchanged { ask_again: None }),
            false,
            seconds(3000),
        );
        assert!(state.tick(seconds(3600)).is_empty());
    }

    #[test]
    fn file_says_at_once_what_it_means() {
        let mut state = with_two("file: /etc/office.txt");
        let change = state.take(found(&["192.0.2.30/32"]), false, seconds(20));
        assert_eq!(change.removed, list(&TWO));
        assert_eq!(allowed(&state), list(&["192.0.2.30/32"]));
        assert!(state.take(found(&[]), false, seconds(40)).is_empty());
        assert_eq!(allowed(&state), list(&["192.0.2.30/32"]));
    }

    #[test]
    fn kept_set_is_restored_unless_it_breaks_a_guard() {
        let mut state = with_two(DNS);
        state.take(found(&["192.0.2.10/32"]), false, seconds(20));
        let kept = state.set.clone().unwrap();
        let mut restored = State::new(region(DNS), seconds(30));
        restored.restore(kept.clone(), seconds(30)).unwrap();
        assert_eq!(allowed(&restored), list(&TWO));
        assert_eq!(restored.next, Some(seconds(30)));
        // What has retired meanwhile, and what a wrong clock would have kept for ever.
        restored.restore(kept.clone(), seconds(7200)).unwrap();
        assert_eq!(allowed(&restored), list(&["192.0.2.10/32"]));
        let earlier = "2025-01-01T00:00:00Z".parse().unwrap();
        restored.restore(kept.clone(), earlier).unwrap();
        assert_eq!(
            restored.next_tick(),
            Some(earlier + Duration::from_hours(1))
        );

        for (fields, bad) in [
            ("", "0.0.0.0/0"),
            ("", "10.0.0.0/8"),
            (", max_prefixes: 1", "192.0.2.30/32"),
            (", max_age: 1m", "192.0.2.30/32"),
        ] {
            let mut set = kept.clone();
            let members = [bad.parse().unwrap(), set.members[0]];
            set.members = if bad < "192.0.2.10" {
                members
            } else {
                [members[1], members[0]]
            }
            .into();
            let mut state = State::new(region(&format!("{DNS}{fields}")), seconds(0));
            assert!(state.restore(set, seconds(90)).is_err(), "{bad}");
            assert_eq!(allowed(&state), []);
        }
        let mut set = kept;
        set.retiring = vec![("0.0.0.0/0".parse().unwrap(), seconds(900))];
        assert!(
            State::new(region(DNS), seconds(0))
                .restore(set, seconds(0))
                .is_err()
        );
    }

    fn policies(regions: &str) -> Policy {
        let text = format!(
            "interfaces: [eth0]\nregions: {{{regions}}}\ndatabases: [{{name: a, port: 1, model: \
             dedicated, force_tls: false, rules: [{{region: x}}]}}]"
        );
        policy::parse(&text).unwrap().0
    }

    #[test]
    fn reload_keeps_what_is_known_of_a_source_and_asks_about_a_new_one() {
        let first = policies("x: {dns: [a.example]}, y: {dns: [y.example]}");
        assert_eq!(
            to_ask(&first, &Regions::new())
                .into_keys()
                .collect::<Vec<_>>(),
            ["x"]
        );
        let answers = BTreeMap::from([("x".into(), found(&TWO))]);
        let known = next(&first, &Regions::new(), answers, seconds(0)).unwrap();

        let slower = policies("x: {dns: [a.example], min_refresh: 30s}");
        assert!(to_ask(&slower, &known).is_empty());
        let after = next(&slower, &known, BTreeMap::new(), seconds(5)).unwrap();
        assert_eq!(allowed(&after["x"]), list(&TWO));
        assert_eq!(after["x"].region, slower.regions["x"]);

        // Neither of another source, nor what the guards would no longer let in.
        for changed in [
            "x: {dns: [b.example]}",
            "x: {dns: [a.example], max_prefixes: 1}",
        ] {
            let changed = policies(changed);
            assert!(to_ask(&changed, &known).contains_key("x"));
            let failed = BTreeMap::from([("x".into(), Err(anyhow!("no answer")))]);
            let refused = next(&changed, &known, failed, seconds(5)).unwrap_err();
            assert_eq!(refused.to_string(), "region x: no answer");
        }
    }
}
