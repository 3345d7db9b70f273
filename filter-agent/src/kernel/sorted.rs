//! Sorted lists that share what they have in common: of a million entries a change copies a few thousand. Pure.

use std::{collections::HashSet, iter, sync::Arc};

use crate::kernel::change::{Change, between};

/// Entries of a piece, about: what one change copies, and 1,000 of it are a million.
const PIECE: usize = 1024;

/// Entries sorted by key, no two alike.
#[derive(Clone, Debug)]
pub struct Sorted<K, V> {
    /// None is empty.
    pieces: Vec<Arc<[(K, V)]>>,
}

impl<K, V> Default for Sorted<K, V> {
    fn default() -> Self {
        Self { pieces: Vec::new() }
    }
}

impl<K: PartialEq, V: PartialEq> PartialEq for Sorted<K, V> {
    fn eq(&self, other: &Self) -> bool {
        self.len() == other.len() && self.iter().eq(other.iter())
    }
}

/// From entries that are sorted.
impl<K: Copy, V: Copy> From<Vec<(K, V)>> for Sorted<K, V> {
    fn from(entries: Vec<(K, V)>) -> Self {
        Self {
            pieces: entries.chunks(PIECE).map(Arc::from).collect(),
        }
    }
}

impl<K, V> Sorted<K, V> {
    pub fn len(&self) -> usize {
        self.pieces.iter().map(|piece| piece.len()).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = &(K, V)> + Clone {
        self.pieces.iter().flat_map(|piece| piece.iter())
    }

    /// The entries from the first one on that is not `before` some place. Those that are must come first.
    pub fn past(&self, before: impl Fn(&K) -> bool) -> impl Iterator<Item = &(K, V)> {
        let is_before = |piece: &Arc<[(K, V)]>| piece.last().is_some_and(|(key, _)| before(key));
        let rest = &self.pieces[self.pieces.partition_point(is_before)..];
        let skipped = rest
            .first()
            .map_or(0, |piece| piece.partition_point(|(key, _)| before(key)));
        rest.iter().flat_map(|piece| piece.iter()).skip(skipped)
    }

    /// The entries of pieces that the other list does not share.
    fn not_shared(&self, other: &Self) -> impl Iterator<Item = &(K, V)> {
        let others: HashSet<*const (K, V)> =
            other.pieces.iter().map(|piece| piece.as_ptr()).collect();
        let own = self
            .pieces
            .iter()
            .filter(move |piece| !others.contains(&piece.as_ptr()));
        own.flat_map(|piece| piece.iter())
    }
}

impl<K: Ord + Copy, V: Copy> Sorted<K, V> {
    pub fn get(&self, key: &K) -> Option<V> {
        let found = self.past(|other| other < key).next();
        found
            .filter(|(other, _)| other == key)
            .map(|&(_, value)| value)
    }

    /// The differences from this list to another, by key. What they share is not looked at.
    pub fn changes_to(&self, new: &Self) -> Vec<Change<K, V>>
    where
        V: PartialEq,
    {
        let old = self.not_shared(new).copied();
        between(old, new.not_shared(self).copied()).collect()
    }

    /// The list after changes, which are sorted by key, no two alike.
    pub fn with(&self, changes: &[Change<K, V>]) -> Self {
        let mut pieces = Vec::with_capacity(self.pieces.len());
        // Entries of pieces that change, until they are a piece.
        let mut open: Vec<(K, V)> = Vec::new();
        let mut rest = changes;
        for (place, piece) in self.pieces.iter().enumerate() {
            let next = self.pieces.get(place + 1);
            let own = next.map_or(rest.len(), |next| {
                rest.partition_point(|change| change.key < next[0].0)
            });
            let (own, later) = rest.split_at(own);
            rest = later;
            if own.is_empty() && open.is_empty() {
                pieces.push(piece.clone());
                continue;
            }
            merge(piece, own, &mut open);
            if open.len() >= PIECE / 2 {
                pieces.extend(open.chunks(PIECE).map(Arc::from));
                open.clear();
            }
        }
        // All of them, where there was no piece.
        merge(&[], rest, &mut open);
        pieces.extend(open.chunks(PIECE).map(Arc::from));
        Self { pieces }
    }
}

fn merge<K: Ord + Copy, V: Copy>(
    entries: &[(K, V)],
    changes: &[Change<K, V>],
    merged: &mut Vec<(K, V)>,
) {
    let mut rest = entries.iter().peekable();
    for &Change { key, new, .. } in changes {
        merged.extend(iter::from_fn(|| rest.next_if(|(other, _)| *other < key)));
        rest.next_if(|(other, _)| *other == key);
        merged.extend(new.map(|new| (key, new)));
    }
    merged.extend(rest);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn list_with_changes_holds_what_a_map_does_and_shares_the_rest() {
        let mut random = fastrand::Rng::with_seed(5);
        let mut map: BTreeMap<u32, u32> = (0..20_000).map(|key| (key * 2, 0)).collect();
        let mut list = Sorted::from(map.clone().into_iter().collect::<Vec<_>>());
        for round in 1..400 {
            let before = list.clone();
            // Most of a region goes at times, and comes back.
            let begin = random.u32(..40_000);
            let (count, width) = [(5, 40_000), (2_000, 3_000)][usize::from(round % 10 == 0)];
            let mut values: BTreeMap<u32, Option<u32>> = BTreeMap::new();
            for _ in 0..random.u32(..count) {
                let value = random.bool().then_some(round);
                values.insert(begin + random.u32(..width), value);
            }
            let change = |(&key, &new): (&u32, &Option<u32>)| Change {
                key,
                old: map.get(&key).copied(),
                new,
            };
            let changes: Vec<Change<u32, u32>> = values.iter().map(change).collect();
            list = list.with(&changes);
            for change in &changes {
                match change.new {
                    Some(value) => map.insert(change.key, value),
                    None => map.remove(&change.key),
                };
            }
            assert!(list.iter().copied().eq(map.clone()));
            assert_eq!(list.len(), map.len());
            let mut sizes = list.pieces.iter().map(|piece| piece.len());
            assert!(sizes.all(|size| (1..=PIECE).contains(&size)));
            assert!(list.not_shared(&before).count() <= changes.len() * 3 * PIECE);
            for key in values.into_keys().take(20).chain([random.u32(..80_000)]) {
                assert_eq!(list.get(&key), map.get(&key).copied());
                let rest = list.past(|other| *other < key).copied();
                assert!(rest.eq(map.range(key..).map(|(key, value)| (*key, *value))));
            }
            let differ = changes
                .into_iter()
                .filter(|change| change.old != change.new);
            assert_eq!(before.changes_to(&list), differ.collect::<Vec<_>>());
        }
        // Pieces do not get ever smaller.
        assert!(list.pieces.len() < 3 * map.len() / PIECE);
        let none = list.with(&list.changes_to(&Sorted::default()));
        assert!(none.is_empty() && none == Sorted::default());
        assert_eq!(none.with(&none.changes_to(&list)), list);
    }
}
