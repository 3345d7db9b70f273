//! Restores pins that were removed while the agent runs.

use std::{fs, os::fd::AsRawFd as _, path::Path};

use anyhow::{Context as _, Result};
use aya::{
    maps::MapInfo,
    programs::links::{FdLink, PinnedLink},
};

use crate::kernel::{
    filter::Filter,
    layout::SHAPES,
    pins::{self, exists, is_locked, lock, own_directory},
};

/// Begins the name of a map's pin until it has replaced the pin that another map has.
const NEW_MAP: &str = "new_map_";

impl Filter {
    /// Recreates the directories of the pins, takes their lock again and pins the maps again, from the file
    /// descriptors that this agent holds. Returns whether anything was missing. A link goes with its pin where that
    /// was removed: `attach` makes a new one.
    ///
    /// # Errors
    /// A directory that is not ours, or another agent, which has started meanwhile: the pins are left to it.
    pub fn restore_pins(&mut self) -> Result<bool> {
        let base = self.pins.parent().context("find the pins' directory")?;
        let bpffs = base.parent().context("find the BPF file system")?;
        pins::base(bpffs)?;
        let mut restored = false;
        // A lock on a directory that is gone keeps no other agent from starting.
        if !is_locked(&self.lock, base)? {
            own_directory(base)?;
            let lock = lock(base)?;
            own_directory(&self.pins)?;
            self.pin_links_again()?;
            self.lock = lock;
            restored = true;
        }
        own_directory(&self.pins)?;
        for shape in &SHAPES {
            let map = self.pinned_maps.get(shape.name).context("find the map")?;
            let pin = self.pins.join(shape.name);
            // An agent that came and went may have pinned other maps.
            if exists(&pin)? {
                let pinned =
                    MapInfo::from_pin(&pin).with_context(|| format!("open {}", pin.display()))?;
                if pinned.id() == map.info().context("read a map's id")?.id() {
                    continue;
                }
            }
            let new = self.pins.join(format!("{NEW_MAP}{}", shape.name));
            if exists(&new)? {
                fs::remove_file(&new).with_context(|| format!("remove {}", new.display()))?;
            }
            map.pin(&new)
                .with_context(|| format!("pin the map at {}", new.display()))?;
            fs::rename(&new, &pin)
                .with_context(|| format!("rename {} to {}", new.display(), pin.display()))?;
            restored = true;
        }
        Ok(restored)
    }

    /// Pins the links of a BPF file system that was unmounted in the one that is mounted now. This agent's lock alone keeps
    /// the former alive: without it the links are gone, and their interfaces open.
    fn pin_links_again(&self) -> Result<()> {
        let layout = self.pins.file_name().context("find the layout")?;
        let locked = format!("/proc/self/fd/{}", self.lock.as_raw_fd());
        let former = Path::new(&locked).join(layout);
        // Pins that were removed, not unmounted, are in neither.
        if !exists(&former)? {
            return Ok(());
        }
        for pin in pins::links(&former)? {
            let name = pin.file_name().context("read the name of a link's pin")?;
            let to = self.pins.join(name);
            if !exists(&to)? {
                let link = PinnedLink::from_pin(&pin)
                    .with_context(|| format!("open {}", pin.display()))?;
                FdLink::from(link)
                    .pin(&to)
                    .with_context(|| format!("pin the link at {}", to.display()))?;
            }
        }
        Ok(())
    }
}
