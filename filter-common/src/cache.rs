//! An entry of the verdict cache: how it is read and written while packets may interrupt that.

use core::ptr::{read_volatile, write_volatile};

use crate::NO_RULE;

/// The tag of an entry that is being written. No port guard has all bits set.
const BEING_WRITTEN: u64 = u64::MAX;

/// A source and its rule, in the database of one port guard.
#[derive(Debug, Default)]
#[repr(C)]
pub struct CacheEntry {
    /// As in the header; IPv4 in the lower half of the second.
    source: [u64; 2],
    /// The `Port`, with the family. Never zero, which is what an entry begins with: no guard is.
    tag: u64,
    /// A `RuleValue`, or `NO_RULE`.
    rule: u32,
    /// Samples taken of the sources of this place.
    taken: u32,
}

/// Points to an entry of the CPU that runs.
///
/// Packets of one CPU are judged one after the other. But before Linux 6.3 a packet may interrupt one of the agent's
/// test runs anywhere, and is judged to its end before the test run goes on. So no reference to an entry is made, and
/// an entry that is being written matches no source and is not written by another: the test run would go on writing
/// where it was interrupted, and leave its rule with the other's source.
///
/// A test run that is interrupted while it reads may return the rule of another source. No packet does: the agent
/// reports that the probe was misjudged, until the next round of probes.
#[derive(Clone, Copy)]
pub struct EntryPointer(*mut CacheEntry);

impl EntryPointer {
    /// # Safety
    /// The entry exists for as long as the pointer is used, and no other CPU uses it.
    #[inline(always)]
    pub unsafe fn new(entry: *mut CacheEntry) -> Self {
        Self(entry)
    }

    /// The rule of a source, if this entry is of that source.
    #[inline(always)]
    pub fn rule(self, source: [u64; 2], tag: u64) -> Option<u32> {
        // SAFETY: aligned fields of an element that exists, by `new`; the same below.
        unsafe {
            let is_same = read_volatile(&raw const (*self.0).tag) == tag
                && (*self.0).source[0] == source[0]
                && (*self.0).source[1] == source[1];
            is_same.then(|| (*self.0).rule)
        }
    }

    /// Writes the rule of a source, unless this packet has interrupted a test run that writes the entry. `between` is
    /// called between two accesses: tests interrupt there.
    #[inline(always)]
    pub fn remember(self, source: [u64; 2], tag: u64, rule: u32, mut between: impl FnMut()) {
        // SAFETY: as in `rule`.
        unsafe {
            if read_volatile(&raw const (*self.0).tag) == BEING_WRITTEN {
                return;
            }
            between();
            write_volatile(&raw mut (*self.0).tag, BEING_WRITTEN);
            between();
            write_volatile(&raw mut (*self.0).source[0], source[0]);
            between();
            write_volatile(&raw mut (*self.0).source[1], source[1]);
            between();
            write_volatile(&raw mut (*self.0).rule, rule);
            between();
            write_volatile(&raw mut (*self.0).tag, tag);
        }
    }

    /// Whether a source that is far from every allowed prefix may take this place: a flood of such sources
    /// takes none from a source that is allowed.
    #[inline(always)]
    pub fn is_free(self, tag: u64) -> bool {
        // SAFETY: as in `rule`.
        unsafe {
            read_volatile(&raw const (*self.0).tag) >> 32 != tag >> 32 || (*self.0).rule == NO_RULE
        }
    }

    /// The address of the tag, aligned to eight bytes.
    #[inline(always)]
    pub fn tag(self) -> *mut u64 {
        // SAFETY: a field of an element that exists.
        unsafe { &raw mut (*self.0).tag }
    }

    /// The address of the number of samples taken.
    #[inline(always)]
    pub fn taken(self) -> *mut u32 {
        // SAFETY: as `tag`'s.
        unsafe { &raw mut (*self.0).taken }
    }
}

const _: () = assert!(size_of::<CacheEntry>() == 32);

#[cfg(test)]
mod tests {
    use super::*;

    const TAG: u64 = 7;

    /// Sources that differ in either half, each with its own rule.
    const SOURCES: [([u64; 2], u32); 4] =
        [([1, 1], 11), ([1, 2], 12), ([2, 1], 21), ([2, 2], NO_RULE)];

    /// Judges a packet as the program does.
    fn judge(entry: EntryPointer, (source, rule): ([u64; 2], u32), between: impl FnMut()) {
        match entry.rule(source, TAG) {
            Some(cached) => assert_eq!(cached, rule, "{source:?}"),
            None => entry.remember(source, TAG, rule, between),
        }
    }

    /// Fault B17: a packet that interrupted a test run read an entry half written, or wrote the one that the test run
    /// went on writing.
    #[test]
    fn entry_that_is_half_written_when_packets_interrupt_is_of_no_other_source() {
        let mut longest = 0;
        for number in 0..1 << 8 {
            let [before, written, first, second] =
                [0, 2, 4, 6].map(|shift| SOURCES[number >> shift & 3]);
            for places in 0..64 {
                let places = [places % 8, places / 8];
                let mut entry = CacheEntry::default();
                // SAFETY: it exists until the end of the turn, and one thread uses it.
                let entry = unsafe { EntryPointer::new(&raw mut entry) };
                judge(entry, before, || ());
                let mut place = 0;
                judge(entry, written, || {
                    for (at, packet) in places.into_iter().zip([first, second]) {
                        if at == place {
                            judge(entry, packet, || ());
                        }
                    }
                    place += 1;
                });
                longest = longest.max(place);
                for (source, rule) in SOURCES {
                    let cached = entry.rule(source, TAG);
                    assert!(cached.is_none_or(|cached| cached == rule), "{source:?}");
                }
            }
        }
        assert_eq!(longest, 5, "interrupted between every two accesses");
    }
}
