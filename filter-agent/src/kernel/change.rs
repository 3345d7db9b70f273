//! The difference between two sorted lists. Pure.

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
    let mut changes = Vec::new();
    // Most changes leave nearly all of a long list as it is.
    let same = old.iter().zip(new).take_while(|(old, new)| old == new);
    let same = same.count();
    let (old, new) = (&old[same..], &new[same..]);
    let (backwards, new_backwards) = (old.iter().rev(), new.iter().rev());
    let same = backwards
        .zip(new_backwards)
        .take_while(|(old, new)| old == new);
    let same = same.count();
    let (old, new) = (&old[..old.len() - same], &new[..new.len() - same]);
    let (mut old, mut new) = (old.iter().peekable(), new.iter().peekable());
    loop {
        let (key, old, new) = match (old.peek(), new.peek()) {
            (None, None) => return changes,
            (Some(&&(key, value)), None) => (key, old.next().map(|_| value), None),
            (None, Some(&&(key, value))) => (key, None, new.next().map(|_| value)),
            (Some(&&(left, value)), Some(&&(right, _))) if left < right => {
                (left, old.next().map(|_| value), None)
            }
            (Some(&&(left, _)), Some(&&(right, value))) if right < left => {
                (right, None, new.next().map(|_| value))
            }
            (Some(&&(key, before)), Some(&&(_, after))) => {
                (key, old.next().map(|_| before), new.next().map(|_| after))
            }
        };
        if old != new {
            changes.push(Change { key, old, new });
        }
    }
}
