//! Samples of dropped packets, from the ring buffer.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv6Addr},
};

use anyhow::{Context as _, Result};
use filter_common::{ANY_SLOT, Guard, Reason, SAMPLES_GRANTED, Sample};

use crate::kernel::{image::Image, maps::Maps};

/// Some packets that were not allowed: one, or of a flood the first of each second.
#[derive(Clone, Debug, PartialEq)]
pub struct Dropped {
    /// `None`: it cannot be told.
    pub source: Option<IpAddr>,
    /// `None`: aimed at no database in particular.
    pub database: Option<String>,
    pub reason: Reason,
    /// Whether it was only counted, and passed.
    pub monitored: bool,
    /// Index of the interface that it came in through.
    pub interface: u32,
}

impl Maps {
    /// Samples of the packets that were not allowed since this was asked last. Those of databases that are
    /// no more are left out. More are taken only when it is asked again.
    pub(super) fn dropped(&mut self, image: &Image) -> Result<Vec<Dropped>> {
        let names: BTreeMap<u32, &str> = image
            .slots
            .iter()
            .filter_map(|(slot, name)| Some((*slot, name.text()?)))
            .collect();
        let mut dropped = Vec::new();
        while let Some(item) = self.sampled.next() {
            let sample = read_sample(&item).context("read what was dropped")?;
            let slot = sample.guard.slot();
            let database = names.get(&slot.into()).copied();
            let reason = Reason::ALL.get(sample.reason as usize);
            if let Some(&reason) = reason
                && (slot == ANY_SLOT || database.is_some())
            {
                dropped.push(Dropped {
                    source: source_of(&sample),
                    database: database.map(str::to_owned),
                    reason,
                    monitored: sample.guard.is_monitor(),
                    interface: sample.interface,
                });
            }
        }
        let granted = self.granted.get(&0, 0)?.saturating_add(SAMPLES_GRANTED);
        self.granted.set(0, granted, 0).context("grant samples")?;
        Ok(dropped)
    }
}

/// A sample as it is in the ring.
fn read_sample(bytes: &[u8]) -> Option<Sample> {
    let (source, rest) = bytes.split_first_chunk::<16>()?;
    let &[high, low] = source.as_chunks::<8>().0 else {
        return None;
    };
    let &[family, reason, guard, interface] = rest.as_chunks::<4>().0 else {
        return None;
    };
    Some(Sample {
        source: [high, low].map(u64::from_ne_bytes),
        family: u32::from_ne_bytes(family),
        reason: u32::from_ne_bytes(reason),
        guard: Guard(u32::from_ne_bytes(guard)),
        interface: u32::from_ne_bytes(interface),
    })
}

fn source_of(sample: &Sample) -> Option<IpAddr> {
    let [high, low] = sample.source;
    match sample.family {
        4 => Some(IpAddr::from((low as u32).to_ne_bytes())),
        6 => {
            let bits = u128::from(u64::from_be(high)) << 64 | u128::from(u64::from_be(low));
            Some(Ipv6Addr::from_bits(bits).into())
        }
        _ => None,
    }
}
