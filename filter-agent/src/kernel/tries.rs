//! The tries of prefixes: reading and writing them.

use std::{io, net::IpAddr, thread, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    Pod,
    maps::{LpmTrie, Map, MapData, MapError, lpm_trie::Key},
};
use backon::{BlockingRetryable as _, ExponentialBuilder};
use filter_common::{RuleValue, SECTION_BITS, Section, Source4, Source6};
use ipnet::{Ipv4Net, Ipv6Net};

use crate::kernel::{batch::Batches, change::Change, sections::TrieContent, steps::PrefixStep};

/// Since 6.13 a trie's entries come from a small store of each processor that is filled up in the background, and a
/// write finds it empty where that is late, with memory to spare: 6.18 on Graviton 5 does so all the time.
const REFILLS: ExponentialBuilder = ExponentialBuilder::new()
    .with_min_delay(Duration::from_micros(100))
    .with_max_times(6);

/// Allowed or blocked prefixes of every database, by address family.
pub(super) struct Tries {
    v4: Trie<Source4>,
    v6: Trie<Source6>,
}

struct Trie<A> {
    map: LpmTrie<MapData, A, RuleValue>,
    /// Whether the last write found no memory, however often it was tried: others are not waited for then, of which there may
    /// be a million.
    is_starved: bool,
    batches: Batches<Key<A>, RuleValue>,
}

impl Tries {
    /// `open`: opens a map by its name.
    pub(super) fn open(
        v4: &str,
        v6: &str,
        mut open: impl FnMut(&str) -> Result<Map>,
    ) -> Result<Self> {
        Ok(Self {
            v4: Trie::of(open(v4)?).with_context(|| format!("open the map {v4}"))?,
            v6: Trie::of(open(v6)?).with_context(|| format!("open the map {v6}"))?,
        })
    }

    /// Reads both, each sorted by key.
    pub(super) fn read(&self) -> Result<(TrieContent<Ipv4Net>, TrieContent<Ipv6Net>)> {
        // Only this agent writes the maps, and only prefixes.
        let v4 = self.v4.read(|key| {
            let Source4 { section, address } = key.data();
            let length = key.prefix_len().saturating_sub(SECTION_BITS) as u8;
            let prefix = Ipv4Net::new(address.into(), length);
            prefix.ok().map(|prefix| (section, prefix))
        });
        let v6 = self.v6.read(|key| {
            let Source6 { section, address } = key.data();
            let length = key.prefix_len().saturating_sub(SECTION_BITS) as u8;
            let prefix = Ipv6Net::new(address.into(), length);
            prefix.ok().map(|prefix| (section, prefix))
        });
        Ok((v4?, v6?))
    }

    pub(super) fn write(&mut self, step: &PrefixStep) -> Result<()> {
        match *step {
            PrefixStep::V4(Change { key, new, .. }) => {
                let written = self.v4.write(&source4(key), new);
                written.with_context(|| format!("write prefix {}", key.1))
            }
            PrefixStep::V6(Change { key, new, .. }) => {
                let written = self.v6.write(&source6(key), new);
                written.with_context(|| format!("write prefix {}", key.1))
            }
        }
    }

    /// Writes steps of one address family in one call.
    ///
    /// # Errors
    /// Any of them may have been written.
    pub(super) fn write_batch(&self, steps: &[&PrefixStep]) -> Result<()> {
        let v4 = steps.iter().map(|step| match step {
            PrefixStep::V4(change) => Some((source4(change.key), change.new)),
            PrefixStep::V6(_) => None,
        });
        let v6 = steps.iter().map(|step| match step {
            PrefixStep::V4(_) => None,
            PrefixStep::V6(change) => Some((source6(change.key), change.new)),
        });
        match (v4.collect(), v6.collect()) {
            (Some(v4), _) => self.v4.write_batch(v4),
            (_, Some(v6)) => self.v6.write_batch(v6),
            (None, None) => bail!("prefixes of two address families are not in one trie"),
        }
    }

    /// The value of the longest prefix of a section that holds a source.
    pub(super) fn find(&self, section: Section, source: IpAddr) -> Result<Option<RuleValue>> {
        let found = match source {
            IpAddr::V4(source) => self.v4.map.get(&source4((section, source.into())), 0),
            IpAddr::V6(source) => self.v6.map.get(&source6((section, source.into())), 0),
        };
        absent_is_none(found).context("look the source up in the kernel")
    }
}

impl<A: Pod> Trie<A> {
    fn of(map: Map) -> Result<Self> {
        Ok(Self {
            batches: Batches::open(&map)?,
            is_starved: false,
            map: map.try_into()?,
        })
    }

    fn read<N: Ord + Copy>(
        &self,
        prefix: impl Fn(Key<A>) -> Option<(Section, N)>,
    ) -> Result<TrieContent<N>> {
        // A kernel that refuses a batch may list one by one.
        let entries = match self.batches.read() {
            Ok((keys, values)) => keys.into_iter().zip(values).collect(),
            Err(_) => self.map.iter().collect::<Result<Vec<_>, MapError>>()?,
        };
        let entries = entries.into_iter();
        let mut prefixes: Vec<_> = entries
            .filter_map(|(key, value)| Some((prefix(key)?, value)))
            .collect();
        prefixes.sort_unstable_by_key(|&(key, _)| key);
        Ok(prefixes.into())
    }

    /// Writes one entry and reads it back: writes have been seen to fail under memory pressure.
    fn write(&mut self, key: &Key<A>, new: Option<RuleValue>) -> Result<()> {
        let Some(value) = new else {
            absent_is_none(self.map.remove(key))?;
            return Ok(());
        };
        let refills = match self.is_starved {
            true => REFILLS.with_max_times(0),
            false => REFILLS,
        };
        let insert = || self.map.insert(key, value, 0);
        let inserted = insert
            .retry(refills)
            .sleep(thread::sleep)
            .when(is_out_of_memory)
            .call();
        self.is_starved = inserted.as_ref().is_err_and(is_out_of_memory);
        inserted?;
        self.ensure_holds(key, value)
    }

    /// Writes entries, or removes them.
    fn write_batch(&self, entries: Vec<(Key<A>, Option<RuleValue>)>) -> Result<()> {
        let (keys, values): (Vec<_>, Vec<_>) = entries.into_iter().unzip();
        if values.iter().all(Option::is_none) {
            return Ok(self.batches.delete(&keys)?);
        }
        let values: Option<Vec<_>> = values.into_iter().collect();
        let values = values.context("find a value for each prefix")?;
        self.batches.update(&keys, &values)?;
        // The kernel writes one after the other, and none after one that fails: where it holds the last, it was there.
        match (keys.last(), values.last()) {
            (Some(key), Some(&value)) => self.ensure_holds(key, value),
            _ => Ok(()),
        }
    }

    fn ensure_holds(&self, key: &Key<A>, value: RuleValue) -> Result<()> {
        // The longest match of a prefix that is in the trie is that prefix.
        ensure!(
            self.map.get(key, 0)? == value,
            "the kernel does not hold what was written"
        );
        Ok(())
    }
}

fn is_out_of_memory(error: &MapError) -> bool {
    matches!(error, MapError::SyscallError(error) if error.io_error.kind() == io::ErrorKind::OutOfMemory)
}

/// aya names a missing key in three ways, by map type and call.
pub(super) fn absent_is_none<T>(result: Result<T, MapError>) -> Result<Option<T>, MapError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound | MapError::ElementNotFound) => Ok(None),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn source4((section, prefix): (Section, Ipv4Net)) -> Key<Source4> {
    let address = prefix.network().octets();
    let source = Source4 { section, address };
    Key::new(SECTION_BITS + u32::from(prefix.prefix_len()), source)
}

fn source6((section, prefix): (Section, Ipv6Net)) -> Key<Source6> {
    let address = prefix.network().octets();
    let source = Source6 { section, address };
    Key::new(SECTION_BITS + u32::from(prefix.prefix_len()), source)
}
