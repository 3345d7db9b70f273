//! Which rule of a database holds a prefix, and until when. Pure.

use std::{cmp::Reverse, sync::Arc};

use ipnet::IpNet;

use crate::{
    clock::BootTime,
    compile::Entries,
    prefixes::{Prefixes, around},
    rules::RuleKey,
};

/// Prefixes that are judged together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// Those of the cluster, which no rule and no block changes.
    Cluster,
    Rules,
    Blocks,
}

impl Group {
    pub const ALL: [Self; 3] = [Self::Cluster, Self::Rules, Self::Blocks];
}

/// The rule that holds a prefix, and the rule whose end counts, by their places in `Entries::rules`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Of several that have the prefix the first one.
    pub rule: u16,
    /// The one that ends last, of all that hold the prefix; `None`: one of them has no end.
    pub end: Option<u16>,
}

/// The lists of one group of a database, in the order of their rules.
pub struct Lists<'a>(Vec<List<'a>>);

struct List<'a> {
    key: &'a RuleKey,
    rule: u16,
    end: Option<BootTime>,
    prefixes: &'a Arc<Prefixes>,
}

impl RuleKey {
    pub fn group(&self) -> Group {
        match self {
            Self::Block(_) => Group::Blocks,
            key if key.is_exempt() => Group::Cluster,
            _ => Group::Rules,
        }
    }
}

impl Entries {
    pub fn lists(&self, group: Group) -> Lists<'_> {
        let lists = self.lists.iter().map(|(rule, prefixes)| {
            let (key, end) = &self.rules[usize::from(*rule)];
            List {
                key,
                rule: *rule,
                end: *end,
                prefixes,
            }
        });
        Lists(lists.filter(|list| list.key.group() == group).collect())
    }
}

impl List<'_> {
    /// As the one of the list's prefixes, if no other list holds it.
    fn held(&self) -> Held {
        Held {
            rule: self.rule,
            end: self.end.map(|_| self.rule),
        }
    }
}

impl Lists<'_> {
    /// Prefixes of all lists: those that several have count for each.
    pub fn count(&self) -> usize {
        self.0.iter().map(|list| list.prefixes.len()).sum()
    }

    /// The same, one after the other.
    pub fn prefixes(&self) -> impl Iterator<Item = &IpNet> {
        self.0.iter().flat_map(|list| list.prefixes.iter())
    }

    /// The length of the shortest prefix.
    pub fn shortest(&self) -> Option<u8> {
        self.0
            .iter()
            .filter_map(|list| list.prefixes.shortest())
            .min()
    }

    fn have_ends(&self) -> bool {
        self.0.iter().any(|list| list.end.is_some())
    }

    /// Of two rules the one that ends later; where both end at the same time the first one. `None`: there is no end.
    fn later(&self, one: Option<u16>, other: Option<u16>) -> Option<u16> {
        let end = |rule: &u16| {
            let mut lists = self.0.iter();
            let list = lists.find(|list| list.rule == *rule);
            (list.and_then(|list| list.end), Reverse(*rule))
        };
        let (one, other) = (one?, other?);
        [one, other].into_iter().max_by_key(end)
    }

    /// The rule that holds a prefix which is on a list.
    pub fn held(&self, prefix: IpNet) -> Option<Held> {
        let first = self.0.iter().find(|list| list.prefixes.has(&prefix))?;
        let mut held = first.held();
        if self.have_ends() {
            for outer in around(prefix) {
                let holding = self.0.iter().filter(|list| list.prefixes.has(&outer));
                let ends = holding.map(|list| list.held().end);
                held.end = ends.fold(held.end, |end, other| self.later(end, other));
                // Without an end it stays.
                if held.end.is_none() {
                    break;
                }
            }
        }
        Some(held)
    }

    /// All prefixes, in order, each with the rule that holds it: a trie finds only the longest prefix of a source, and a
    /// rule of few sources that has ended must not hide one of many that is in force.
    pub fn all(&self) -> Vec<(IpNet, Held)> {
        let mut all: Vec<(IpNet, Held)> = Vec::with_capacity(self.count());
        for list in &self.0 {
            let held = list.held();
            all.extend(list.prefixes.iter().map(|&prefix| (prefix, held)));
        }
        // Stable, so that of two rules with the same prefix the first keeps it; and made for lists that are in order.
        all.sort_by_key(|&(prefix, _)| prefix);
        all.dedup_by(|(next, same), (prefix, held)| {
            let is_same = next == prefix;
            if is_same {
                held.end = self.later(held.end, same.end);
            }
            is_same
        });
        if self.have_ends() {
            let mut outer: Vec<(IpNet, Option<u16>)> = Vec::new();
            for (prefix, held) in &mut all {
                while outer
                    .pop_if(|(outer, _)| !outer.contains(&*prefix))
                    .is_some()
                {}
                if let Some(&(_, end)) = outer.last() {
                    held.end = self.later(held.end, end);
                }
                outer.push((*prefix, held.end));
            }
        }
        all
    }

    /// Prefixes, in order, among them all whose `held` may be another than in `former`, where a rule is known by its key.
    pub fn affected(&self, former: &Self) -> Vec<IpNet> {
        let mut affected = Vec::new();
        let mut rest = &former.0[..];
        for list in &self.0 {
            let is_same = |old: &List| old.key == list.key && old.end == list.end;
            let place = rest
                .iter()
                .position(|old| is_same(old) && old.prefixes == list.prefixes);
            let Some(place) = place.or_else(|| rest.iter().position(is_same)) else {
                affected.extend_from_slice(list.prefixes);
                continue;
            };
            // What came before it is gone, or comes later now, which changes who is the first.
            let (gone, kept) = rest.split_at(place);
            affected.extend(gone.iter().flat_map(|old| old.prefixes.iter()));
            if !Arc::ptr_eq(kept[0].prefixes, list.prefixes) {
                differing(kept[0].prefixes, list.prefixes, &mut affected);
            }
            rest = &kept[1..];
        }
        affected.extend(rest.iter().flat_map(|old| old.prefixes.iter()));
        affected.sort_unstable();
        affected.dedup();
        // Parts of these may last longer now, or no longer.
        let ending = self.0.iter().filter(|list| list.end.is_some());
        let parts = ending.flat_map(|list| {
            affected
                .iter()
                .flat_map(|outer| list.prefixes.within(outer))
        });
        let parts: Vec<IpNet> = parts.copied().collect();
        affected.extend(parts);
        affected.sort_unstable();
        affected.dedup();
        affected
    }

    /// Prefixes of each rule, by its place. One that an earlier list has too counts there.
    pub fn count_by_rule(&self, counts: &mut [usize]) {
        for (place, list) in self.0.iter().enumerate() {
            let earlier = &self.0[..place];
            let is_earlier =
                |prefix: &&IpNet| earlier.iter().any(|other| other.prefixes.has(prefix));
            let before: usize = earlier.iter().map(|other| other.prefixes.len()).sum();
            // Whichever takes fewer look-ups.
            let twice = if before < list.prefixes.len() {
                let mut all: Vec<IpNet> = earlier
                    .iter()
                    .flat_map(|other| other.prefixes.iter().copied())
                    .collect();
                all.sort_unstable();
                all.dedup();
                all.iter()
                    .filter(|prefix| list.prefixes.has(prefix))
                    .count()
            } else {
                list.prefixes.iter().filter(is_earlier).count()
            };
            counts[usize::from(list.rule)] += list.prefixes.len() - twice;
        }
    }
}

/// Adds the prefixes that only one of two lists has.
fn differing(one: &Prefixes, other: &Prefixes, found: &mut Vec<IpNet>) {
    let (mut one, mut other) = (one.iter().peekable(), other.iter().peekable());
    loop {
        match (one.peek(), other.peek()) {
            (Some(left), Some(right)) if left == right => {
                one.next();
                other.next();
            }
            (Some(left), Some(right)) if left < right => found.extend(one.next()),
            (_, Some(_)) => found.extend(other.next()),
            (Some(_), None) => found.extend(one.next()),
            (None, None) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use filter_common::Protocol;
    use ipnet::Ipv4Net;

    use super::*;
    use crate::policy::{OnRemoval, Source};

    fn entries() -> Entries {
        Entries {
            protocol: Protocol::Tcp,
            ports: vec![5432],
            addresses: vec![],
            monitor: false,
            tls: None,
            on_removal: OnRemoval::Reset,
            rules: vec![],
            lists: vec![],
        }
    }

    fn prefix(random: &mut fastrand::Rng) -> IpNet {
        let address = Ipv4Addr::new(192, 0, 2, random.u8(..16));
        let shortest = [24, 28, 28, 28][random.usize(..4)];
        let length = random.u8(shortest..=32);
        Ipv4Net::new_assert(address, length).trunc().into()
    }

    /// The rule, and the end, by looking at each list for each prefix.
    fn expected(lists: &Lists<'_>, prefix: IpNet) -> Option<(RuleKey, Option<BootTime>)> {
        let first = lists.0.iter().find(|list| list.prefixes.has(&prefix))?;
        let holding = lists
            .0
            .iter()
            .filter(|list| list.prefixes.iter().any(|own| own.contains(&prefix)));
        let ends: Option<Vec<BootTime>> = holding.map(|list| list.end).collect();
        Some((
            first.key.clone(),
            ends.and_then(|ends| ends.into_iter().max()),
        ))
    }

    #[test]
    fn what_is_looked_up_again_is_all_that_differs_after_a_change_of_rules() {
        let mut random = fastrand::Rng::with_seed(6);
        let mut rules: Vec<(RuleKey, Option<BootTime>, Vec<Arc<Prefixes>>)> = Vec::new();
        let mut former = entries();
        let (mut looked_up, mut all_of_them) = (0, 0);
        for _ in 0..20_000 {
            for _ in 0..random.usize(1..3) {
                let place = random.usize(..=rules.len());
                let end = [None, Some(1), Some(2), Some(3)][random.usize(..4)].map(BootTime);
                let list = |random: &mut fastrand::Rng| {
                    let list: Vec<IpNet> = (0..random.usize(..6)).map(|_| prefix(random)).collect();
                    Prefixes::shared(list)
                };
                match random.u8(..6) {
                    0 | 1 if rules.len() < 6 => {
                        let source = Source::Region(random.u8(..8).to_string());
                        let key =
                            [RuleKey::Rule(source), RuleKey::Cluster][random.usize(..2)].clone();
                        let lists = (0..random.usize(1..3)).map(|_| list(&mut random)).collect();
                        if rules.iter().all(|(other, ..)| *other != key) {
                            rules.insert(place, (key, end, lists));
                        }
                    }
                    2 if place < rules.len() => drop(rules.remove(place)),
                    3 if place < rules.len() => rules[place].1 = end,
                    4 if place < rules.len() => rules[place].2[0] = list(&mut random),
                    _ if place < rules.len() => {
                        let moved = rules.remove(place);
                        rules.insert(random.usize(..=rules.len()), moved);
                    }
                    _ => {}
                }
            }
            let mut new = entries();
            for (key, end, lists) in &rules {
                new.add(key.clone(), *end, lists.clone());
            }
            for group in Group::ALL {
                let (before, after) = (former.lists(group), new.lists(group));
                let described = |entries: &Entries, held: Held| {
                    let end = held.end.and_then(|rule| entries.rules[usize::from(rule)].1);
                    (
                        entries.rules[usize::from(held.rule)].0.clone(),
                        end,
                        held.end
                            .map(|rule| entries.rules[usize::from(rule)].0.clone()),
                    )
                };
                let all = after.all();
                assert!(all.is_sorted_by(|(one, _), (other, _)| one < other));
                for &(prefix, held) in &all {
                    let (key, end, _) = described(&new, held);
                    assert_eq!(Some((key, end)), expected(&after, prefix), "{prefix}");
                }
                let mut counts = vec![0; new.rules.len()];
                after.count_by_rule(&mut counts);
                for (rule, count) in counts.into_iter().enumerate() {
                    let own = all
                        .iter()
                        .filter(|(_, held)| usize::from(held.rule) == rule);
                    assert_eq!(count, own.count());
                }
                let affected = after.affected(&before);
                looked_up += affected.len();
                all_of_them += all.len();
                let of_any = before.prefixes().chain(after.prefixes());
                for &prefix in of_any.chain(&affected) {
                    let held = after.held(prefix);
                    let place = all.binary_search_by_key(&prefix, |&(prefix, _)| prefix);
                    assert_eq!(held, place.ok().map(|place| all[place].1), "{prefix}");
                    let old = before.held(prefix).map(|held| described(&former, held));
                    let new = held.map(|held| described(&new, held));
                    assert!(old == new || affected.contains(&prefix), "{prefix}");
                }
            }
            former = new;
        }
        assert!(
            looked_up < all_of_them * 3 / 4,
            "{looked_up} of {all_of_them}"
        );
    }
}
