//! Which rule of a database holds a prefix, and until when. Pure.

use std::{cmp::Reverse, iter, net::IpAddr, sync::Arc};

use ipnet::IpNet;

use crate::{clock::BootTime, compile::Entries, prefixes::Prefixes, rules::RuleKey};

/// Look-ups in a list that take as long as going through so many of its prefixes, about.
const LOOK_UPS: usize = 32;

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
        if held.end.is_some() {
            let holds = |list: &&List<'_>| list.prefixes.holding(prefix).is_some();
            let ends = self.0.iter().filter(holds).map(|list| list.held().end);
            held.end = ends.fold(held.end, |end, other| self.later(end, other));
        }
        Some(held)
    }

    /// The same of the longest prefix that holds an address: none that is shorter lasts longer.
    pub fn holding(&self, address: IpAddr) -> Option<Held> {
        let holding = self.0.iter();
        let holding = holding.filter_map(|list| list.prefixes.holding(address.into()));
        self.held(holding.max_by_key(IpNet::prefix_len)?)
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

    /// Prefixes, in order, among them all whose `held` may be another than in `former`, where a rule is known by its key;
    /// `None`: they are more than `most`.
    pub fn affected(&self, former: &Self, most: usize) -> Option<Vec<IpNet>> {
        let mut affected = Vec::new();
        let mut rest = &former.0[..];
        let mut ends = Vec::new();
        for list in &self.0 {
            let is_same =
                |old: &List| old.key == list.key && old.end.is_some() == list.end.is_some();
            let has_same = |old: &List| is_same(old) && old.prefixes == list.prefixes;
            let place = rest.iter().position(has_same);
            let Some(place) = place.or_else(|| rest.iter().position(is_same)) else {
                add(&mut affected, list.prefixes.iter(), most)?;
                continue;
            };
            // Rules before it were removed, or come later now: another rule may be the first to hold their prefixes.
            let (gone, kept) = rest.split_at(place);
            add(
                &mut affected,
                gone.iter().flat_map(|old| old.prefixes.iter()),
                most,
            )?;
            if !has_same(&kept[0]) {
                add(
                    &mut affected,
                    differing(kept[0].prefixes, list.prefixes),
                    most,
                )?;
            }
            ends.extend(kept[0].end.zip(list.end).map(|ends| (ends, list.prefixes)));
            rest = &kept[1..];
        }
        add(
            &mut affected,
            rest.iter().flat_map(|old| old.prefixes.iter()),
            most,
        )?;
        // A prefix names the rule that ends last, not its end, which a clock that is set moves.
        ends.sort_by_key(|(ends, _)| *ends);
        let is_in_order = |pair: &[((BootTime, BootTime), _)]| {
            let ((old, new), (next_old, next_new)) = (pair[0].0, pair[1].0);
            old.cmp(&next_old) == new.cmp(&next_new)
        };
        if !ends.windows(2).all(is_in_order) {
            add(
                &mut affected,
                ends.iter().flat_map(|(_, list)| list.iter()),
                most,
            )?;
        }
        affected.sort();
        affected.dedup();
        // Parts of these may last longer now, or no longer.
        let ending = self.0.iter().filter(|list| list.end.is_some());
        let outer = affected.clone();
        for list in ending {
            let parts = outer.iter().flat_map(|outer| list.prefixes.within(outer));
            add(&mut affected, parts, most)?;
        }
        affected.sort();
        affected.dedup();
        Some(affected)
    }

    /// Prefixes of each rule, by its place. One that an earlier list has too counts there.
    pub fn count_by_rule(&self, counts: &mut [usize]) {
        let longest = self.0.iter().map(|list| list.prefixes.len()).max();
        let others = self.count() - longest.unwrap_or_default();
        if others > longest.unwrap_or_default() / LOOK_UPS {
            for (_, held) in self.all() {
                counts[usize::from(held.rule)] += 1;
            }
            return;
        }
        // Beside one long list there is little: it is looked up there.
        for (place, list) in self.0.iter().enumerate() {
            let is_in = |others: &[List<'_>], prefix: &IpNet| {
                others.iter().any(|other| other.prefixes.has(prefix))
            };
            let (earlier, own) = (&self.0[..place], &list.prefixes);
            let twice = if Some(own.len()) == longest {
                let places = earlier.iter().enumerate();
                let all = places
                    .flat_map(|(place, other)| other.prefixes.iter().map(move |p| (place, p)));
                all.filter(|(place, prefix)| own.has(prefix) && !is_in(&earlier[..*place], prefix))
                    .count()
            } else {
                own.iter().filter(|prefix| is_in(earlier, prefix)).count()
            };
            counts[usize::from(list.rule)] += own.len() - twice;
        }
    }
}

/// Adds prefixes, unless they become more than `most`.
fn add<'a>(
    found: &mut Vec<IpNet>,
    prefixes: impl Iterator<Item = &'a IpNet>,
    most: usize,
) -> Option<()> {
    found.extend(prefixes.take(most + 1));
    (found.len() <= most).then_some(())
}

/// The prefixes that only one of two lists has.
fn differing<'a>(one: &'a Prefixes, other: &'a Prefixes) -> impl Iterator<Item = &'a IpNet> {
    let (mut one, mut other) = (one.iter().peekable(), other.iter().peekable());
    iter::from_fn(move || {
        loop {
            match (one.peek(), other.peek()) {
                (Some(left), Some(right)) if left == right => {
                    one.next();
                    other.next();
                }
                (Some(left), Some(right)) if left < right => return one.next(),
                (_, Some(_)) => return other.next(),
                (_, None) => return one.next(),
            }
        }
    })
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
            counts: Default::default(),
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
                let key = |entries: &Entries, rule: u16| entries.rules[usize::from(rule)].0.clone();
                let described = |entries: &Entries, held: Held| {
                    let end = held.end.map(|rule| key(entries, rule));
                    (key(entries, held.rule), end)
                };
                let all = after.all();
                assert!(all.is_sorted_by(|(one, _), (other, _)| one < other));
                for &(prefix, held) in &all {
                    let end = held.end.and_then(|rule| new.rules[usize::from(rule)].1);
                    let found = (key(&new, held.rule), end);
                    assert_eq!(Some(found), expected(&after, prefix), "{prefix}");
                }
                let mut counts = vec![0; new.rules.len()];
                after.count_by_rule(&mut counts);
                for (rule, count) in counts.into_iter().enumerate() {
                    let own = all
                        .iter()
                        .filter(|(_, held)| usize::from(held.rule) == rule);
                    assert_eq!(count, own.count());
                }
                let affected = after.affected(&before, usize::MAX - 1).unwrap();
                let most = affected.len().saturating_sub(1);
                assert!(affected.is_empty() || after.affected(&before, most).is_none());
                looked_up += affected.len();
                all_of_them += all.len();
                let of_any = [&before, &after].into_iter().flat_map(|lists| &lists.0);
                let of_any = of_any.flat_map(|list| list.prefixes.iter());
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

    #[test]
    fn prefixes_beside_one_long_list_count_at_the_first_rule_that_has_them() {
        let mut random = fastrand::Rng::with_seed(12);
        for place in 0..4 {
            let mut entries = entries();
            for rule in 0..4 {
                let count = if rule == place { 1_000 } else { 5 };
                let host =
                    |_| Ipv4Net::new_assert([10, 0, 0, random.u8(..)].into(), random.u8(20..=32));
                let list: Vec<IpNet> = (0..count)
                    .map(host)
                    .map(|host| host.trunc().into())
                    .collect();
                let source = Source::Region(rule.to_string());
                entries.add(RuleKey::Rule(source), None, [Prefixes::shared(list)]);
            }
            let lists = entries.lists(Group::Rules);
            let mut counts = vec![0; 4];
            lists.count_by_rule(&mut counts);
            let all = lists.all();
            let own = |rule| {
                all.iter()
                    .filter(|(_, held)| usize::from(held.rule) == rule)
                    .count()
            };
            assert_eq!(counts, [0, 1, 2, 3].map(own));
            assert!(counts.iter().sum::<usize>() < lists.count());
        }
    }
}
