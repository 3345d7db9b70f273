//! The layout of the pinned maps: type, sizes and flags that a map must have to be reused.

use std::{collections::BTreeMap, fs, os::fd::AsFd as _, path::Path};

use anyhow::{Context as _, Result, bail, ensure};
use aya::maps::{MapData, MapInfo, MapType};
use filter_common::{
    ANSWERS, Address, Answer, BLOCKED_PREFIXES, BloomLine, COUNTERS, Client, Connection, Guard,
    HANDSHAKES, HITS, Judgement, LAYOUT, LOCAL_NETWORKS, LocalKey, MAX_LOCALS, Name, OUTSIDERS,
    PORTS, PREFIX_LINES, PUBLISHED, Port, Published, REFUSALS, RULE_IDS, Refusal, SLOTS, SYNS,
    Source4, Source6, Syn,
};

use crate::kernel::pins::{exists, layouts, pinned_interfaces};

const BPF_F_NO_PREALLOC: u32 = 1;

/// Type, sizes and flags that a pinned map must have before it is reused: aya opens an existing pin without
/// comparing. `entries` of `None`: chosen by the operator when the map was made.
pub(super) struct Shape {
    pub(super) name: &'static str,
    pub(super) map_type: MapType,
    key: usize,
    value: usize,
    pub(super) entries: Option<u32>,
    flags: u32,
}

impl Shape {
    /// Whether a map has this type and these sizes of key and value, however many entries.
    pub(super) fn holds_the_same(&self, info: &MapInfo) -> bool {
        info.map_type().ok() == Some(self.map_type)
            && info.key_size() as usize == self.key
            && info.value_size() as usize == self.value
    }
}

const fn array(name: &'static str, value: usize, entries: u32) -> Shape {
    Shape {
        name,
        map_type: MapType::Array,
        key: 4,
        value,
        entries: Some(entries),
        flags: 0,
    }
}

const fn trie(name: &'static str, source: usize) -> Shape {
    Shape {
        name,
        map_type: MapType::LpmTrie,
        key: 4 + source,
        value: 4,
        entries: None,
        flags: BPF_F_NO_PREALLOC,
    }
}

const fn blocks(name: &'static str, source: usize) -> Shape {
    Shape {
        entries: Some(BLOCKED_PREFIXES),
        ..trie(name, source)
    }
}

const fn per_cpu(name: &'static str, entries: u32) -> Shape {
    Shape {
        map_type: MapType::PerCpuArray,
        ..array(name, 8, entries)
    }
}

/// The pinned maps by name, with file descriptors of their own.
pub(super) type PinnedMaps = BTreeMap<&'static str, MapData>;

/// A map with another file descriptor of its own.
pub(super) fn reopen(maps: &PinnedMaps, name: &str) -> Result<MapData> {
    let open = || {
        let map = maps.get(name).context("find it")?;
        let fd = map.fd().as_fd().try_clone_to_owned()?;
        anyhow::Ok(MapData::from_fd(fd)?)
    };
    open().with_context(|| format!("open the map {name}"))
}

const fn lru(name: &'static str, key: usize, value: usize, entries: u32) -> Shape {
    Shape {
        name,
        map_type: MapType::LruHash,
        key,
        value,
        entries: Some(entries),
        flags: 0,
    }
}

pub(super) const SHAPES: [Shape; 27] = [
    array("PORT_GUARDS", size_of::<Port>(), PORTS),
    Shape {
        name: "LOCAL_GUARDS",
        map_type: MapType::Hash,
        key: size_of::<LocalKey>(),
        value: size_of::<Guard>(),
        entries: Some(MAX_LOCALS),
        flags: BPF_F_NO_PREALLOC,
    },
    array("PROTOCOLS", 4, 1),
    trie("ALLOWED4", size_of::<Source4>()),
    trie("ALLOWED6", size_of::<Source6>()),
    blocks("BLOCKED4", size_of::<Source4>()),
    blocks("BLOCKED6", size_of::<Source6>()),
    array("ENDS", 8, RULE_IDS),
    array("PREFIX_BLOOM", size_of::<BloomLine>(), PREFIX_LINES),
    array("EPOCH", 4, 1),
    per_cpu("COUNTS", COUNTERS),
    per_cpu("HITS", HITS),
    array("SLOT_NAMES", size_of::<Name>(), SLOTS),
    array("RULE_NAMES", size_of::<Name>(), RULE_IDS),
    array("PROBES", 8, COUNTERS + HITS),
    lru("SYNS_PASSED", size_of::<Syn>(), size_of::<LocalKey>(), SYNS),
    Shape {
        map_type: MapType::Hash,
        flags: BPF_F_NO_PREALLOC,
        ..lru(
            "PUBLISHED_SOCKETS",
            size_of::<Published>(),
            size_of::<LocalKey>(),
            PUBLISHED,
        )
    },
    lru("HANDSHAKES_JUDGED", size_of::<Connection>(), 4, HANDSHAKES),
    Shape {
        map_type: MapType::Hash,
        flags: BPF_F_NO_PREALLOC,
        ..lru("OUTSIDER_SOURCES", size_of::<Address>(), 4, OUTSIDERS)
    },
    array("OUTSIDERS_FULL", 4, 1),
    lru(
        "REFUSED",
        size_of::<Client>(),
        size_of::<Refusal>(),
        REFUSALS,
    ),
    array("REFUSING", 4, 1),
    array("JUDGED", 4, 1),
    array("EXISTING", 4, 1),
    Shape {
        name: "LOCAL_NETWORKS",
        map_type: MapType::LpmTrie,
        key: 4 + size_of::<Address>(),
        value: 4,
        entries: Some(LOCAL_NETWORKS),
        flags: BPF_F_NO_PREALLOC,
    },
    Shape {
        name: "JUDGEMENTS",
        map_type: MapType::SkStorage,
        key: 4,
        value: size_of::<Judgement>(),
        entries: Some(0),
        flags: BPF_F_NO_PREALLOC,
    },
    array("ANSWERS_BY_ENGINE", size_of::<Answer>(), ANSWERS),
];

/// The maps of this layout that are pinned.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum MapsFound {
    None,
    /// A first start was cut short.
    Some,
    All,
}

/// Checks every map that is pinned.
pub(super) fn check_pins(pins: &Path) -> Result<MapsFound> {
    let mut missing = None;
    let mut found = false;
    for shape in &SHAPES {
        if exists(&pins.join(shape.name))? {
            check_pin(pins, shape)?;
            found = true;
        } else {
            missing = Some(shape.name);
        }
    }
    // Without a link, a first start was cut short. With one, a new and empty map would replace the one in
    // force.
    if let Some(name) = missing
        && !pinned_interfaces(pins)?.is_empty()
    {
        bail!(
            "the pin of {name} is missing from {}, where a filter is in force: run \
             `filter-agent detach`, then start again",
            pins.display()
        );
    }
    Ok(match (found, missing) {
        (false, _) => MapsFound::None,
        (true, Some(_)) => MapsFound::Some,
        (true, None) => MapsFound::All,
    })
}

/// Opens the maps that are pinned: all of this layout.
pub(super) fn open_pins(pins: &Path) -> Result<PinnedMaps> {
    let pinned = |shape: &Shape| {
        let map = MapData::from_pin(pins.join(shape.name));
        let map = map.with_context(|| format!("open the map {}", shape.name))?;
        Ok((shape.name, map))
    };
    SHAPES.iter().map(pinned).collect()
}

/// # Errors
/// A map of another type, size or flags than this layout has: another program made it.
pub(super) fn check_pin(pins: &Path, shape: &Shape) -> Result<MapInfo> {
    let pin = pins.join(shape.name);
    let info = MapInfo::from_pin(&pin).with_context(|| format!("open {}", pin.display()))?;
    let same = shape.holds_the_same(&info)
        && shape
            .entries
            .is_none_or(|entries| entries == info.max_entries())
        && info.map_flags() == shape.flags;
    ensure!(
        same,
        "{} is not a map of this agent's layout {LAYOUT}: find out who pinned it, then run \
         `filter-agent detach`",
        pin.display()
    );
    Ok(info)
}

/// Pins the maps of connections of another layout under this one's directory too, where they have this
/// layout's shape: open connections go on being followed through a change of layouts.
pub(super) fn share_connections(base: &Path, pins: &Path) -> Result<()> {
    let shared = [
        "JUDGEMENTS",
        "PUBLISHED_SOCKETS",
        "OUTSIDER_SOURCES",
        "OUTSIDERS_FULL",
        "HANDSHAKES_JUDGED",
        "EXISTING",
    ];
    for shape in SHAPES.iter().filter(|shape| shared.contains(&shape.name)) {
        let own = pins.join(shape.name);
        for (layout, other) in layouts(base)? {
            let theirs = other.join(shape.name);
            if layout == LAYOUT || exists(&own)? || !exists(&theirs)? {
                continue;
            }
            let info =
                MapInfo::from_pin(&theirs).with_context(|| format!("open {}", theirs.display()))?;
            if shape.holds_the_same(&info) {
                fs::hard_link(&theirs, &own)
                    .with_context(|| format!("share {} with layout {LAYOUT}", theirs.display()))?;
            }
        }
    }
    Ok(())
}
