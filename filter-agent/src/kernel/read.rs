//! Reads the image from the maps.

use anyhow::{Context as _, Result};
use aya::{
    Pod,
    maps::{Array, HashMap, Map, MapData, MapError},
};
use filter_common::{BloomLine, Guard, LocalKey, Name, Port};

use crate::{
    clock::BootTime,
    kernel::{
        batch::Batches,
        image::Image,
        layout::{PinnedMaps, reopen},
        tries::Tries,
    },
};

/// Reads the image. Arrays are read whole: the kernel does not list the elements that are set.
pub(super) fn image(maps: &PinnedMaps) -> Result<Image> {
    read(maps).context("read the maps")
}

fn read(maps: &PinnedMaps) -> Result<Image> {
    let mut image = Image::default();
    let protocols = array(maps, "PROTOCOLS")?;
    image.protocols = *protocols.first().context("find the guarded protocols")?;
    let names = |name| {
        let names = (0..).zip(array(maps, name)?);
        anyhow::Ok(names.filter(|&(_, name)| name != Name::FREE))
    };
    image.slots = names("SLOT_NAMES")?
        .skip_while(|&(slot, _)| slot == 0)
        .collect();
    image.rules = names("RULE_NAMES")?.collect();
    let ends = (0..).zip(array(maps, "ENDS")?);
    let ends = ends.filter(|&(_, end)| end != 0);
    image.ends = ends.map(|(id, end)| (id, BootTime(end))).collect();
    let guards = (0..).zip(array(maps, "PORT_GUARDS")?);
    let guards = guards.map(|(port, word): (_, Port)| (port, word.guard()));
    image.ports = guards.filter(|(_, guard)| !guard.is_none()).collect();
    let lines = (0..).zip(array(maps, "PREFIX_BLOOM")?);
    let used = lines.filter(|(_, line)| *line != BloomLine::default());
    image.bloom = used.collect();
    let locals = Map::HashMap(reopen(maps, "LOCAL_GUARDS")?);
    let locals: HashMap<MapData, LocalKey, Guard> = locals.try_into()?;
    image.locals = locals.iter().collect::<Result<_, MapError>>()?;
    image.locals.sort_unstable_by_key(|&(key, _)| key);
    let open = |name: &str| Ok(Map::LpmTrie(reopen(maps, name)?));
    (image.allowed4, image.allowed6) = Tries::open("ALLOWED4", "ALLOWED6", open)?.read()?;
    (image.blocked4, image.blocked6) = Tries::open("BLOCKED4", "BLOCKED6", open)?.read()?;
    Ok(image)
}

/// All elements of an array.
fn array<V: Pod>(maps: &PinnedMaps, name: &str) -> Result<Vec<V>> {
    let map = Map::Array(reopen(maps, name)?);
    let batches: Batches<u32, V> = Batches::open(&map)?;
    let array: Array<MapData, V> = map.try_into()?;
    if let Ok((indexes, elements)) = batches.read()
        && indexes.into_iter().eq(0..array.len())
    {
        return Ok(elements);
    }
    let elements: Result<_, MapError> = array.iter().collect();
    elements.with_context(|| format!("read the map {name}"))
}
