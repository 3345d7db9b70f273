//! Counters of packets, rules and connections, without the agent's own probes.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context as _, Result, anyhow};
use aya::{
    maps::{Array, Map, MapData, MapInfo, PerCpuArray, PerCpuValues},
    util::nr_cpus,
};
use filter_common::{
    ANY_SLOT, COUNTER_ROW, COUNTERS, CounterRow, Fate, Name, Reason, Stage, hit_index,
};

use crate::{
    kernel::{change::changes, image::Image, layout::SHAPES, maps::Maps, pins::exists},
    rules::RuleKey,
};

/// Packets by database (`None`: aimed at no database in particular), reason, and whether the reason
/// was only counted, not enforced.
pub type Counts = BTreeMap<(Option<String>, Reason, bool), u64>;

/// Packets that a rule allowed or a block dropped, by database and text of the rule's key.
pub type Hits = BTreeMap<(String, String), u64>;

/// Packets of each rule id: those that its verdict was enforced on, and those that were only counted.
pub(super) type HitsById = BTreeMap<u32, [u64; 2]>;

/// Connections by database, fate, and whether the fate was only monitored.
pub type Fates = BTreeMap<(String, Fate, bool), u64>;

/// The value of a counter.
#[derive(Debug)]
pub(super) struct Counter {
    pub(super) index: u32,
    /// By CPU.
    pub(super) packets: Vec<u64>,
    /// How many of them were the agent's own probes.
    pub(super) probes: u64,
}

impl Maps {
    /// Packets counted since the maps were made, the agent's own probes taken out. `hits`: those of the rules.
    pub(super) fn counts(&self, image: &Image, hits: &HitsById) -> Result<Counts> {
        let mut counts = Counts::new();
        // By slot, since each database has rules, and each rule is looked at once.
        let mut allowed: BTreeMap<u32, [u64; 2]> = BTreeMap::new();
        for (id, rule) in image.rules.iter().filter(|(_, rule)| allows(rule)) {
            let [passed, monitored] = hits.get(id).copied().unwrap_or_default();
            let sums = allowed.entry(rule.slot.into()).or_default();
            *sums = [sums[0] + passed, sums[1] + monitored];
        }
        let any = (u32::from(ANY_SLOT), Name::FREE);
        for (slot, name) in [any].iter().chain(&image.slots) {
            for reason in Reason::ALL {
                for monitored in [false, true] {
                    let index = COUNTER_ROW.reason(*slot as u16, reason, monitored);
                    let mut packets = self.count(&self.counts, index, index)?;
                    if reason == Reason::Allowed {
                        let sums = allowed.get(slot).copied().unwrap_or_default();
                        packets += sums[usize::from(monitored)];
                    }
                    if packets > 0 {
                        let database = name.text().map(str::to_owned);
                        counts.insert((database, reason, monitored), packets);
                    }
                }
            }
        }
        Ok(counts)
    }

    /// Connections counted since the maps were made.
    pub(super) fn fates(&self, image: &Image) -> Result<Fates> {
        let mut fates = Fates::new();
        for (slot, name) in &image.slots {
            let Some(database) = name.text() else {
                continue;
            };
            for fate in Fate::ALL {
                for monitored in [false, true] {
                    let index = COUNTER_ROW.fate(*slot as u16, fate, monitored);
                    let connections = self.count(&self.counts, index, index)?;
                    if connections > 0 {
                        fates.insert((database.to_owned(), fate, monitored), connections);
                    }
                }
            }
        }
        Ok(fates)
    }

    /// Connections to a database that came to each stage.
    pub(super) fn stages(&self, slot: u16) -> Result<[u64; Stage::ALL.len()]> {
        let mut connections = [0; Stage::ALL.len()];
        for (stage, connections) in Stage::ALL.into_iter().zip(&mut connections) {
            for monitored in [false, true] {
                let index = COUNTER_ROW.stage(slot, stage, monitored);
                *connections += self.count(&self.counts, index, index)?;
            }
        }
        Ok(connections)
    }

    /// Packets of each rule.
    pub(super) fn hits_by_id(&self, image: &Image) -> Result<HitsById> {
        let ids = image.rules.iter();
        ids.map(|&(id, _)| Ok((id, [self.hits_of(id, false)?, self.hits_of(id, true)?])))
            .collect()
    }

    /// Packets allowed, by database and text of the rule's key.
    pub(super) fn hits(&self, image: &Image, by_id: &HitsById) -> Hits {
        let databases: BTreeMap<u16, &str> = image
            .slots_by_name()
            .into_iter()
            .map(|(database, slot)| (slot, database))
            .collect();
        let mut hits = BTreeMap::new();
        for (id, name) in &image.rules {
            if let (Some(database), Some(rule)) = (databases.get(&name.slot), name.text()) {
                let packets = by_id.get(id).map_or(0, |packets| packets.iter().sum());
                hits.insert(((*database).to_owned(), rule.to_owned()), packets);
            }
        }
        hits
    }

    fn hits_of(&self, rule: u32, monitored: bool) -> Result<u64> {
        let index = hit_index(rule, monitored);
        self.count(&self.hits, index, COUNTERS + index)
    }

    /// One counter, summed over the CPUs, without probes. `probes`: its index in the map of probes.
    fn count(&self, map: &PerCpuArray<MapData, u64>, index: u32, probes: u32) -> Result<u64> {
        let packets: u64 = map.get(&index, 0).context("read a counter")?.iter().sum();
        if packets == 0 {
            return Ok(0);
        }
        let probes = self.probes.get(&probes, 0).context("read the probes")?;
        Ok(packets.saturating_sub(probes))
    }

    /// Adds a probe packet to those that are taken out of a counter.
    pub(super) fn record_probe(&mut self, index: u32) -> Result<()> {
        let probes = self.probes.get(&index, 0)?;
        Ok(self.probes.set(index, probes + 1, 0)?)
    }

    /// Adopts the counters of an older layout's maps, by the names of databases and rules and by the meaning of
    /// each counter. Returns whether it knows how that layout counts.
    pub(super) fn carry_counters(
        &mut self,
        layout: u32,
        pins: &Path,
        image: &Image,
    ) -> Result<bool> {
        let names = ["SLOT_NAMES", "RULE_NAMES", "COUNTS", "HITS", "PROBES"];
        let mut sizes = BTreeMap::new();
        for shape in SHAPES.iter().filter(|shape| names.contains(&shape.name)) {
            let pin = pins.join(shape.name);
            if !exists(&pin)? {
                return Ok(false);
            }
            let info =
                MapInfo::from_pin(&pin).with_context(|| format!("open {}", pin.display()))?;
            if !shape.holds_the_same(&info) {
                return Ok(false);
            }
            sizes.insert(shape.name, info.max_entries());
        }
        let row = CounterRow::of(layout);
        // Layouts before 3 counted the packets of a rule in another way.
        if sizes["HITS"] != hit_index(sizes["RULE_NAMES"], false)
            || sizes["COUNTS"] != row.counters(sizes["SLOT_NAMES"])
        {
            return Ok(false);
        }
        let open = |name: &str| MapData::from_pin(pins.join(name));
        let slot_names: Array<_, Name> = Map::Array(open("SLOT_NAMES")?).try_into()?;
        let rule_names: Array<_, Name> = Map::Array(open("RULE_NAMES")?).try_into()?;
        let counts: PerCpuArray<_, u64> = Map::PerCpuArray(open("COUNTS")?).try_into()?;
        let hits: PerCpuArray<_, u64> = Map::PerCpuArray(open("HITS")?).try_into()?;
        let probes: Array<_, u64> = Map::Array(open("PROBES")?).try_into()?;
        let new_slots = image.slots_by_name();
        let mut slots = BTreeMap::from([(u32::from(ANY_SLOT), ANY_SLOT)]);
        for old in 1..sizes["SLOT_NAMES"] {
            let name = slot_names.get(&old, 0)?;
            let new = name.text().and_then(|name| new_slots.get(name));
            slots.extend(new.map(|&new| (old, new)));
        }
        for (&old, &new) in &slots {
            for (from, to) in carried(row, old as u16, new) {
                self.counts.set(to, counts.get(&from, 0)?, 0)?;
                self.probes.set(to, probes.get(&from, 0)?, 0)?;
            }
        }
        for old in 0..sizes["RULE_NAMES"] {
            let name = rule_names.get(&old, 0)?;
            let Some(&slot) = slots.get(&u32::from(name.slot)) else {
                continue;
            };
            let same = |(_, new): &&(u32, Name)| new.slot == slot && new.text() == name.text();
            if name != Name::FREE
                && let Some(&(new, _)) = image.rules.iter().find(same)
            {
                for monitored in [false, true] {
                    let (old, new) = (hit_index(old, monitored), hit_index(new, monitored));
                    self.hits.set(new, hits.get(&old, 0)?, 0)?;
                    let probed = probes.get(&(sizes["COUNTS"] + old), 0)?;
                    self.probes.set(COUNTERS + new, probed, 0)?;
                }
            }
        }
        Ok(true)
    }

    /// Zeroes the counters of slots and rule ids that `new` begins to use.
    pub(super) fn clear_counters(&mut self, current: &Image, new: &Image) -> Result<()> {
        let cpus = nr_cpus().map_err(|(file, error)| anyhow!(error).context(file))?;
        let zero = || PerCpuValues::try_from(vec![0_u64; cpus]).context("make a zero counter");
        let is_new =
            |current: &[(u32, Name)], id: u32| current.binary_search_by_key(&id, |e| e.0).is_err();
        for &(slot, _) in new
            .slots
            .iter()
            .filter(|entry| is_new(&current.slots, entry.0))
        {
            for index in COUNTER_ROW.of_slot(slot as u16) {
                self.counts
                    .set(index, zero()?, 0)
                    .context("clear a counter")?;
                self.probes.set(index, 0, 0).context("clear a counter")?;
            }
        }
        for &(id, _) in new
            .rules
            .iter()
            .filter(|entry| is_new(&current.rules, entry.0))
        {
            for index in [false, true].map(|monitored| hit_index(id, monitored)) {
                self.hits
                    .set(index, zero()?, 0)
                    .context("clear a counter")?;
                self.probes
                    .set(COUNTERS + index, 0, 0)
                    .context("clear a counter")?;
            }
        }
        Ok(())
    }

    /// Adds the hits of the rules that `after` no longer has to their databases' counters, and to
    /// `replaced` what these were before.
    pub(super) fn keep_hits(
        &mut self,
        before: &Image,
        after: &Image,
        replaced: &mut Vec<Counter>,
    ) -> Result<()> {
        for change in changes(&before.rules, &after.rules) {
            let (Some(rule), None) = (change.old, change.new) else {
                continue;
            };
            // Packets that a block dropped are counted by their reason as well.
            if !allows(&rule) {
                continue;
            }
            for monitored in [false, true] {
                let from = hit_index(change.key, monitored);
                let index = COUNTER_ROW.reason(rule.slot, Reason::Allowed, monitored);
                let kept = Counter {
                    index,
                    packets: self.counts.get(&index, 0)?.to_vec(),
                    probes: self.probes.get(&index, 0)?,
                };
                let hits = self.hits.get(&from, 0)?;
                let sums = kept.packets.iter().zip(hits.iter()).map(|(a, b)| a + b);
                let sum = Counter {
                    index,
                    packets: sums.collect(),
                    probes: kept.probes + self.probes.get(&(COUNTERS + from), 0)?,
                };
                replaced.push(kept);
                self.set_counter(sum)?;
            }
        }
        Ok(())
    }

    /// Writes a counter that the packet path does not write: one of packets that removed rules allowed.
    pub(super) fn set_counter(&mut self, counter: Counter) -> Result<()> {
        let packets = PerCpuValues::try_from(counter.packets)?;
        self.counts
            .set(counter.index, packets, 0)
            .context("write a counter")?;
        self.probes
            .set(counter.index, counter.probes, 0)
            .context("write a counter")
    }
}

/// Whether a rule in the kernel allows, rather than blocks.
fn allows(rule: &Name) -> bool {
    rule.text().is_none_or(|text| !RuleKey::is_block(text))
}

/// The counters of a slot of another layout, by its index there and in this layout.
fn carried(row: CounterRow, old: u16, new: u16) -> Vec<(u32, u32)> {
    let mut carried = Vec::new();
    for monitored in [false, true] {
        // Reasons that the other layout has no room for it does not count.
        let reasons = Reason::ALL.into_iter();
        let reasons = reasons.filter(|&reason| (reason as u32) < row.first_fate);
        carried.extend(reasons.map(|reason| {
            let from = row.reason(old, reason, monitored);
            (from, COUNTER_ROW.reason(new, reason, monitored))
        }));
        carried.extend(Fate::ALL.into_iter().map(|fate| {
            let from = row.fate(old, fate, monitored);
            (from, COUNTER_ROW.fate(new, fate, monitored))
        }));
    }
    carried
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_layout_3_are_carried_by_their_meaning() {
        let row = CounterRow::of(3);
        let carried: BTreeMap<u32, u32> = carried(row, 2, 5).into_iter().collect();
        // It had 12 reasons.
        assert_eq!(carried.len(), 2 * (12 + Fate::ALL.len()));
        // Slot 2's rows began at 64 and 80; fates began at 12, with TLS.
        let monitored = true;
        let tls = COUNTER_ROW.fate(5, Fate::Tls, !monitored);
        assert_eq!(carried[&(64 + 12)], tls);
        let refused = COUNTER_ROW.fate(5, Fate::Refused, monitored);
        assert_eq!(carried[&(80 + 15)], refused);
        let not_tls = COUNTER_ROW.reason(5, Reason::NotTls, monitored);
        assert_eq!(carried[&(80 + 9)], not_tls);
        let range = COUNTER_ROW.of_slot(5);
        assert!(carried.values().all(|to| range.contains(to)));
    }
}
