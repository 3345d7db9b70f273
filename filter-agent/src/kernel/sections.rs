//! The prefixes of an image, made from those of the one before: of a million that stay none is looked at. Pure.

use std::collections::BTreeSet;

use filter_common::{RuleValue, Section};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::{
    held::{Held, Lists},
    kernel::{
        change::{Change, between},
        sorted::Sorted,
    },
};

/// The content of a trie.
pub type TrieContent<N> = Sorted<(Section, N), RuleValue>;

type Changes<N> = Vec<Change<(Section, N), RuleValue>>;

/// Prefixes of a section that are judged one by one, at most, however few it has.
const FEW: usize = 64;

/// The same as a part of all that it has: beyond that it takes less time to go through all of them, some 15 ms for a
/// million, than some 10 µs for each of these, with 30 rules.
const FEW_OF: usize = 1024;

/// Allowed or blocked prefixes, as they are and as they are to be.
pub(super) struct Rewrite<'a> {
    v4: &'a TrieContent<Ipv4Net>,
    v6: &'a TrieContent<Ipv6Net>,
    changes4: Changes<Ipv4Net>,
    changes6: Changes<Ipv6Net>,
    /// Those that are to be.
    sections: BTreeSet<Section>,
}

/// The same as they are to be.
pub(super) struct Rewritten {
    pub(super) v4: TrieContent<Ipv4Net>,
    pub(super) v6: TrieContent<Ipv6Net>,
    /// Prefixes that are new.
    pub(super) came4: Vec<Ipv4Net>,
    pub(super) came6: Vec<Ipv6Net>,
    /// The number of removed prefixes.
    pub(super) went: usize,
}

impl<'a> Rewrite<'a> {
    pub(super) fn of(v4: &'a TrieContent<Ipv4Net>, v6: &'a TrieContent<Ipv6Net>) -> Self {
        Self {
            v4,
            v6,
            changes4: Vec::new(),
            changes6: Vec::new(),
            sections: BTreeSet::new(),
        }
    }

    /// Sets the content of a section. `former`: the lists that its present content was made from.
    pub(super) fn section(
        &mut self,
        section: Section,
        lists: &Lists<'_>,
        former: Option<&Lists<'_>>,
        value: impl Fn(Held) -> RuleValue,
    ) {
        self.sections.insert(section);
        let few = FEW.max(lists.count() / FEW_OF);
        match former.and_then(|former| lists.affected(former, few)) {
            Some(affected) => {
                for prefix in affected {
                    let old = match prefix {
                        IpNet::V4(prefix) => self.v4.get(&(section, prefix)),
                        IpNet::V6(prefix) => self.v6.get(&(section, prefix)),
                    };
                    let new = lists.held(prefix).map(&value);
                    self.change(
                        section,
                        Change {
                            key: prefix,
                            old,
                            new,
                        },
                    );
                }
            }
            None => {
                let all = lists.all().into_iter();
                let new = all.map(|(prefix, held)| (prefix, value(held)));
                for change in between(self.part(section), new) {
                    self.change(section, change);
                }
            }
        }
    }

    /// The tries as they are to be: without the sections that were not named.
    pub(super) fn finish(mut self) -> Rewritten {
        let all: BTreeSet<Section> = sections(self.v4).chain(sections(self.v6)).collect();
        let gone: Vec<Section> = all.difference(&self.sections).copied().collect();
        for section in gone {
            for change in between(self.part(section), [].into_iter()) {
                self.change(section, change);
            }
        }
        self.changes4.sort_by_key(|change| change.key);
        self.changes6.sort_by_key(|change| change.key);
        let (came4, went4) = came_and_went(&self.changes4);
        let (came6, went6) = came_and_went(&self.changes6);
        Rewritten {
            v4: self.v4.with(&self.changes4),
            v6: self.v6.with(&self.changes6),
            came4,
            came6,
            went: went4 + went6,
        }
    }

    fn part(&self, section: Section) -> impl Iterator<Item = (IpNet, RuleValue)> + use<'a> {
        let v4 = part(self.v4, section).map(|&((_, prefix), value)| (IpNet::V4(prefix), value));
        v4.chain(part(self.v6, section).map(|&((_, prefix), value)| (IpNet::V6(prefix), value)))
    }

    fn change(&mut self, section: Section, change: Change<IpNet, RuleValue>) {
        let Change { key, old, new } = change;
        if old == new {
            return;
        }
        match key {
            IpNet::V4(prefix) => {
                let key = (section, prefix);
                self.changes4.push(Change { key, old, new });
            }
            IpNet::V6(prefix) => {
                let key = (section, prefix);
                self.changes6.push(Change { key, old, new });
            }
        }
    }
}

/// The prefixes that are new, and how many are no more.
fn came_and_went<N: Copy>(changes: &Changes<N>) -> (Vec<N>, usize) {
    let came = changes.iter().filter(|change| change.old.is_none());
    let went = changes.iter().filter(|change| change.removes());
    (came.map(|change| change.key.1).collect(), went.count())
}

/// The prefixes of one section.
pub(super) fn part<N>(
    prefixes: &TrieContent<N>,
    section: Section,
) -> impl Iterator<Item = &((Section, N), RuleValue)> {
    let from = prefixes.past(move |(other, _)| *other < section);
    from.take_while(move |((other, _), _)| *other == section)
}

/// The sections that hold any prefix.
pub(super) fn sections<N>(prefixes: &TrieContent<N>) -> impl Iterator<Item = Section> {
    let first = prefixes.iter().next().map(|((section, _), _)| *section);
    std::iter::successors(first, |section| {
        let next = prefixes.past(|(other, _)| other <= section).next();
        next.map(|((section, _), _)| *section)
    })
}
