//! How full the maps are that can fill up.

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, Map, MapData, MapError};
use filter_common::{
    Address, BLOCKED_PREFIXES, LOCAL_NETWORKS, LocalKey, MAX_DATABASES, MAX_LOCALS, OUTSIDERS,
    PUBLISHED, Published, RULE_IDS,
};

use crate::kernel::filter::Filter;

/// The entries of one map.
#[derive(Clone, Debug, PartialEq)]
pub struct Fill {
    pub map: &'static str,
    pub entries: usize,
    /// Most entries that are taken before a change is refused, or a connection closed.
    pub limit: usize,
}

impl Filter {
    /// The maps that only the agent fills: it knows what they hold.
    pub fn own_fills(&self) -> Vec<Fill> {
        let fill = |map, entries, limit| Fill {
            map,
            entries,
            limit,
        };
        let image = &self.image;
        let blocked = BLOCKED_PREFIXES as usize;
        // A trie has twice that room, for the reload that replaces all prefixes.
        vec![
            fill("ALLOWED4", image.allowed4.len(), self.max_prefixes),
            fill("ALLOWED6", image.allowed6.len(), self.max_prefixes),
            fill("BLOCKED4", image.blocked4.len(), blocked),
            fill("BLOCKED6", image.blocked6.len(), blocked),
            fill("LOCAL_GUARDS", image.locals.len(), MAX_LOCALS as usize),
            fill("SLOT_NAMES", image.slots.len(), MAX_DATABASES),
            fill("RULE_NAMES", image.rules.len(), RULE_IDS as usize),
        ]
    }

    /// The maps that the programs fill, or that follow the host. Each entry is listed: a system call each.
    ///
    /// # Errors
    /// A map cannot be opened or listed.
    pub fn program_fills(&self) -> Result<Vec<Fill>> {
        Ok(vec![
            Fill {
                map: "PUBLISHED_SOCKETS",
                entries: self.listed::<{ size_of::<Published>() }, { size_of::<LocalKey>() }>(
                    "PUBLISHED_SOCKETS",
                )?,
                limit: PUBLISHED as usize,
            },
            Fill {
                map: "OUTSIDER_SOURCES",
                entries: self.listed::<{ size_of::<Address>() }, 4>("OUTSIDER_SOURCES")?,
                limit: OUTSIDERS as usize,
            },
            Fill {
                map: "LOCAL_NETWORKS",
                entries: count(self.maps.local_networks.keys(), "LOCAL_NETWORKS")?,
                limit: LOCAL_NETWORKS as usize,
            },
        ])
    }

    fn listed<const KEY: usize, const VALUE: usize>(&self, name: &str) -> Result<usize> {
        let opened = MapData::from_pin(self.pins.join(name));
        let opened = opened.with_context(|| format!("open the map {name}"))?;
        let map: HashMap<_, [u8; KEY], [u8; VALUE]> = Map::HashMap(opened).try_into()?;
        count(map.keys(), name)
    }
}

fn count<K>(mut keys: impl Iterator<Item = Result<K, MapError>>, name: &str) -> Result<usize> {
    keys.try_fold(0, |count, key| key.map(|_| count + 1))
        .with_context(|| format!("list the map {name}"))
}
