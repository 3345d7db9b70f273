//! The layout of the pinned maps: what a map must be to be adopted.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context as _, Result, bail, ensure};
use aya::maps::{MapData, MapInfo, MapType};
use filter_common::{
    ANSWERS, Answer, COUNTERS, Connection, Guard, HITS, LAYOUT, LocalKey, MAX_LOCALS, NEAR_LINES,
    Name, NearLine, PORTS, Port, RULE_IDS, SLOTS, Source4, Source6, Stream,
};

use crate::kernel::pins::{exists, layouts, pinned_interfaces};

const BPF_F_NO_PREALLOC: u32 = 1;

/// What a pinned map has to be to be adopted: aya opens an existing pin without comparing.
/// Entries of `None` are the operator's choice, made when the map was.
pub(super) struct Shape {
    pub(super) name: &'static str,
    pub(super) map_type: MapType,
    key: usize,
    value: usize,
    pub(super) entries: Option<u32>,
    flags: u32,
}

impl Shape {
    /// Whether a map's entries are like this one's, however many there are.
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

const fn per_cpu(name: &'static str, entries: u32) -> Shape {
    Shape {
        map_type: MapType::PerCpuArray,
        ..array(name, 8, entries)
    }
}

/// The pinned maps by name, with file descriptors of their own.
pub(super) type PinnedMaps = BTreeMap<&'static str, MapData>;

pub(super) const SHAPES: [Shape; 15] = [
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
    array("NEAR", size_of::<NearLine>(), NEAR_LINES),
    array("EPOCH", 4, 1),
    per_cpu("COUNTS", COUNTERS),
    per_cpu("HITS", HITS),
    array("SLOT_NAMES", size_of::<Name>(), SLOTS),
    array("RULE_NAMES", size_of::<Name>(), RULE_IDS),
    array("PROBES", 8, COUNTERS + HITS),
    Shape {
        name: "STREAMS",
        map_type: MapType::LruHash,
        key: size_of::<Connection>(),
        value: size_of::<Stream>(),
        entries: None,
        flags: 0,
    },
    array("ADOPT_UNTIL", 8, SLOTS),
    array("ANSWERS_BY_ENGINE", size_of::<Answer>(), ANSWERS),
];

/// Checks every map that is pinned; whether any is.
pub(super) fn check_pins(pins: &Path) -> Result<bool> {
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
    // Without a link this is a first start that was cut short. With one, a new and empty map would
    // take the place of the one that is enforced.
    if let Some(name) = missing
        && !pinned_interfaces(pins)?.is_empty()
    {
        bail!(
            "the pin of {name} is missing from {}, where a filter is in force: run \
             `filter-agent detach`, then start again",
            pins.display()
        );
    }
    Ok(found)
}

/// # Errors
/// A map of another type, size or flags than this layout has: made by somebody else.
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

/// The connections that an agent of another layout follows, in a map like this layout's, go on being
/// followed in the same map.
pub(super) fn share_streams(base: &Path, pins: &Path) -> Result<()> {
    let own = pins.join("STREAMS");
    let shape = SHAPES.iter().find(|shape| shape.name == "STREAMS");
    for (layout, other) in layouts(base)? {
        let theirs = other.join("STREAMS");
        let info = MapInfo::from_pin(&theirs);
        let (Ok(info), Some(shape)) = (info, shape) else {
            continue;
        };
        if layout != LAYOUT && !exists(&own)? && shape.holds_the_same(&info) {
            fs::hard_link(&theirs, &own)
                .with_context(|| format!("share {} with layout {LAYOUT}", theirs.display()))?;
        }
    }
    Ok(())
}
