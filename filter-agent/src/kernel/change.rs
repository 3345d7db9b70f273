//! The difference between two sorted lists. Pure.

use std::iter;

/// One entry of one map, before and after.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Change<K, V> {
    pub key: K,
    /// `None`: absent.
    pub old: Option<V>,
    pub new: Option<V>,
}

impl<K, V> Change<K, V> {
    pub fn removes(&self) -> bool {
        self.new.is_none()
    }
}

/// The differences between two sorted lists, by key.
pub fn changes<K: Ord + Copy, V: PartialEq + Copy>(
    old: &[(K, V)],
    new: &[(K, V)],
) -> Vec<Change<K, V>> {
    between(old.iter().copied(), new.iter().copied()).collect()
}

/// The same of what iterators return in order.
pub fn between<K: Ord + Copy, V: PartialEq + Copy>(
    old: impl Iterator<Item = (K, V)>,
    new: impl Iterator<Item = (K, V)>,
) -> impl Iterator<Item = Change<K, V>> {
    let (mut old, mut new) = (old.peekable(), new.peekable());
    let all = iter::from_fn(move || {
        let (key, old, new) = match (old.peek(), new.peek()) {
            (None, None) => return None,
            (Some(&(key, value)), None) => (key, old.next().map(|_| value), None),
            (None, Some(&(key, value))) => (key, None, new.next().map(|_| value)),
            (Some(&(left, value)), Some(&(right, _))) if left < right => {
                (left, old.next().map(|_| value), None)
            }
            (Some(&(left, _)), Some(&(right, value))) if right < left => {
                (right, None, new.next().map(|_| value))
            }
            (Some(&(key, before)), Some(&(_, after))) => {
                (key, old.next().map(|_| before), new.next().map(|_| after))
            }
        };
        Some(Change { key, old, new })
    });
    all.filter(|change| change.old != change.new)
}
