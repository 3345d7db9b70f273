//! Samples of dropped packets, from the ring buffer.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv6Addr},
};

use anyhow::{Context as _, Result};
use filter_common::{ANY_SLOT, Reason, SAMPLES_GRANTED, Sample, opening::OpeningKind};

use crate::kernel::{filter::Filter, image::Image, maps::Unpinned};

/// A sampled drop.
#[derive(Clone, Debug, PartialEq)]
pub struct Dropped {
    /// `None`: the packet has no readable source.
    pub source: Option<IpAddr>,
    /// `None`: aimed at no database in particular.
    pub database: Option<String>,
    pub reason: Reason,
    /// Whether the packet was only counted, and passed.
    pub monitored: bool,
    /// Index of the interface that the packet came in through.
    pub interface: u32,
    /// First bytes of a refused connection, instead of TLS.
    pub opening: Option<OpeningKind>,
}

impl Unpinned {
    /// Reads the samples that are in the ring. Those of databases that `image` no longer has are left out.
    fn dropped(&mut self, image: &Image) -> Result<Vec<Dropped>> {
        let names: BTreeMap<u32, &str> = image
            .slots
            .iter()
            .filter_map(|(slot, name)| Some((*slot, name.text()?)))
            .collect();
        let mut dropped = Vec::new();
        while let Some(item) = self.sampled.next() {
            let sample = Sample::read(&item).context("read a sample")?;
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
                    opening: opening_of(&sample),
                });
            }
        }
        Ok(dropped)
    }

    fn grant_samples(&mut self) -> Result<()> {
        let granted = self.granted.get(&0, 0)?.saturating_add(SAMPLES_GRANTED);
        self.granted.set(0, granted, 0).context("grant samples")
    }
}

fn opening_of(sample: &Sample) -> Option<OpeningKind> {
    let number = sample.family >> 8;
    let mut kinds = OpeningKind::ALL.into_iter();
    kinds.find(|kind| *kind as u32 == number)
}

impl Filter {
    /// Reads the samples of dropped packets that were taken since the last call.
    pub fn dropped(&mut self) -> Result<Vec<Dropped>> {
        let mut dropped = self.maps.unpinned.dropped(&self.image)?;
        if let Some(traced) = &mut self.tracing {
            dropped.extend(traced.unpinned.dropped(&self.image)?);
        }
        Ok(dropped)
    }

    /// Lets each CPU take `SAMPLES_GRANTED` more samples for each place. How often this is called bounds
    /// what a flood costs: once a second.
    pub fn grant_samples(&mut self) -> Result<()> {
        let traced = self.tracing.as_mut().map(|traced| &mut traced.unpinned);
        for maps in [Some(&mut self.maps.unpinned), traced]
            .into_iter()
            .flatten()
        {
            maps.grant_samples()?;
        }
        Ok(())
    }
}

fn source_of(sample: &Sample) -> Option<IpAddr> {
    let [high, low] = sample.source;
    match sample.family & 0xff {
        4 => Some(IpAddr::from((low as u32).to_ne_bytes())),
        6 => {
            let bits = u128::from(u64::from_be(high)) << 64 | u128::from(u64::from_be(low));
            Some(Ipv6Addr::from_bits(bits).into())
        }
        _ => None,
    }
}
