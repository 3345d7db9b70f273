//! The pins on a BPF file system: their directories, names and lock.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::programs::links::{FdLink, PinnedLink};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use crate::host::coverage::Pinned;

/// Prefix of the pin of a new link until it replaces the pin of the link before.
pub(super) const NEW_LINK: &str = "new_link_";

/// Prefix of the pin of a link whose interface is in another network namespace, while another interface has
/// its index here.
pub(super) const AWAY_LINK: &str = "away_link_";

/// The directory that the agent owns on a BPF file system.
pub(super) fn base(bpffs: &Path) -> Result<PathBuf> {
    let mount = statfs(bpffs).with_context(|| {
        let bpffs = bpffs.display();
        format!("open {bpffs}, where a BPF file system has to be mounted")
    })?;
    ensure!(
        mount.filesystem_type() == BPF_FS_MAGIC,
        "{0} is no BPF file system: mount one with `mount -t bpf -o mode=700 bpf {0}`",
        bpffs.display()
    );
    Ok(bpffs.join("filter-agent"))
}

/// Makes the directory, or refuses one that another user could have filled.
pub(super) fn own_directory(path: &Path) -> Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(error).with_context(|| format!("create {}", path.display()));
        }
        _ => {}
    }
    let metadata =
        fs::symlink_metadata(path).with_context(|| format!("examine {}", path.display()))?;
    let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
    ensure!(
        metadata.is_dir() && owner == nix::unistd::geteuid().as_raw() && mode & 0o077 == 0,
        "{} is not this agent's own (owner {owner}, mode {mode:o}): find out who made it, and \
         remove it",
        path.display()
    );
    Ok(())
}

/// Whether a lock is one of the directory that is there now, and not of one that was removed.
pub(super) fn is_locked(lock: &Flock<File>, base: &Path) -> Result<bool> {
    let examine = || format!("examine {}", base.display());
    if !exists(base)? {
        return Ok(false);
    }
    let (locked, found) = (lock.metadata(), fs::symlink_metadata(base));
    let (locked, found) = (locked.with_context(examine)?, found.with_context(examine)?);
    Ok((locked.dev(), locked.ino()) == (found.dev(), found.ino()))
}

/// Locks the directory. The kernel releases the lock when the agent ends, however it ends.
pub(super) fn lock(base: &Path) -> Result<Flock<File>> {
    let directory = File::open(base).with_context(|| format!("open {}", base.display()))?;
    match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
        Ok(lock) if is_locked(&lock, base)? => Ok(lock),
        Ok(_) => bail!("{} was removed while it was locked", base.display()),
        Err((_, Errno::EWOULDBLOCK)) => bail!(
            "another filter-agent runs on {}: stop it first, or use its commands",
            base.display()
        ),
        Err((_, error)) => Err(error).with_context(|| format!("lock {}", base.display())),
    }
}

/// Whether there is such a file.
///
/// # Errors
/// The reason why it cannot be seen, for example EACCES: that is not the same as absent.
pub(super) fn exists(path: &Path) -> Result<bool> {
    path.try_exists()
        .with_context(|| format!("examine {}", path.display()))
}

pub(super) fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let list = || -> io::Result<Vec<PathBuf>> {
        fs::read_dir(directory)?
            .map(|entry| Ok(entry?.path()))
            .collect()
    };
    list().with_context(|| format!("list {}", directory.display()))
}

/// The directories of all layouts that are pinned.
pub(super) fn layouts(base: &Path) -> Result<Vec<(u32, PathBuf)>> {
    let layout = |path: PathBuf| {
        let number = path.file_name()?.to_str()?.strip_prefix('v')?.parse();
        Some((number.ok()?, path))
    };
    Ok(entries(base)?.into_iter().filter_map(layout).collect())
}

/// The pins of links, also of those whose interface is in another network namespace.
pub(super) fn links(pins: &Path) -> Result<Vec<PathBuf>> {
    let mut links = entries(pins)?;
    links.retain(|pin| {
        let name = pin.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.starts_with("link_") || name.starts_with(AWAY_LINK))
    });
    Ok(links)
}

pub(super) fn pinned_interfaces(pins: &Path) -> Result<Vec<u32>> {
    let index = |pin: &PathBuf| {
        pin.file_name()?
            .to_str()?
            .strip_prefix("link_")?
            .parse()
            .ok()
    };
    Ok(entries(pins)?.iter().filter_map(index).collect())
}

/// The name of a link's pin: by index, since a rename of the interface does not change it, and bpffs allows no
/// dot in a name, as in eth0.100.
pub(super) fn link_name(interface: u32) -> String {
    format!("link_{interface}")
}

pub(super) fn set_aside(pin: &Path, pins: &Path) -> Result<()> {
    for number in 0..u32::MAX {
        let to = pins.join(format!("{AWAY_LINK}{number}"));
        if !exists(&to)? {
            return fs::rename(pin, &to)
                .with_context(|| format!("rename {} to {}", pin.display(), to.display()));
        }
    }
    bail!("{} cannot be set aside", pin.display())
}

/// Renames links that an agent attached and pinned under the name of new links, before it was killed.
pub(super) fn adopt_new_links(pins: &Path) -> Result<()> {
    for new in entries(pins)? {
        let name = new.file_name().and_then(|name| name.to_str());
        let index = name.and_then(|name| name.strip_prefix(NEW_LINK)?.parse().ok());
        if let Some(index) = index {
            let pin = pins.join(link_name(index));
            fs::rename(&new, &pin)
                .with_context(|| format!("rename {} to {}", new.display(), pin.display()))?;
        }
    }
    Ok(())
}

/// The kernel's id of the program on a link that is pinned.
pub(super) fn linked_program(pin: &Path) -> Result<u32> {
    let link = PinnedLink::from_pin(pin).with_context(|| format!("open {}", pin.display()))?;
    let info = FdLink::from(link).info().context("read the link")?;
    Ok(info.program_id())
}

/// Stops filtering and removes everything that any layout of this agent pinned below `bpffs`.
/// Returns the indexes of the interfaces that were filtered.
///
/// # Errors
/// An agent that runs, and would attach again.
pub fn remove(bpffs: &Path) -> Result<Vec<u32>> {
    let base = base(bpffs)?;
    if !exists(&base)? {
        return Ok(Vec::new());
    }
    let _lock = lock(&base)?;
    remove_pins(&base)
}

pub(super) fn remove_pins(base: &Path) -> Result<Vec<u32>> {
    let mut interfaces = Vec::new();
    for layout in entries(base)? {
        for pin in entries(&layout)? {
            ensure!(
                !pin.is_dir(),
                "{} is not this agent's: remove it, then detach; nothing is changed",
                pin.display()
            );
        }
    }
    for layout in entries(base)? {
        interfaces.extend(pinned_interfaces(&layout)?);
        remove_directory(&layout)?;
    }
    fs::remove_dir(base).with_context(|| format!("remove {}", base.display()))?;
    Ok(interfaces)
}

pub(super) fn remove_directory(pins: &Path) -> Result<()> {
    for pin in entries(pins)? {
        fs::remove_file(&pin).with_context(|| format!("remove {}", pin.display()))?;
    }
    fs::remove_dir(pins).with_context(|| format!("remove {}", pins.display()))
}

/// The links that are pinned below `bpffs`, by whatever layout.
pub fn pinned(bpffs: &Path) -> Result<Vec<Pinned>> {
    let base = base(bpffs)?;
    let mut pinned = Vec::new();
    if exists(&base)? {
        for (_, pins) in layouts(&base)? {
            pinned.extend(pinned_in(&pins)?);
        }
    }
    Ok(pinned)
}

/// The links that are pinned in a layout's directory, with the programs that the kernel says they run.
pub(super) fn pinned_in(pins: &Path) -> Result<Vec<Pinned>> {
    let links = pinned_interfaces(pins)?.into_iter().map(|interface| {
        Ok(Pinned {
            interface,
            program_id: linked_program(&pins.join(link_name(interface)))?,
        })
    });
    links.collect()
}

/// Interface indexes for which a filter is pinned below `bpffs`, whether or not an agent runs.
pub fn left_in_force(bpffs: &Path) -> Result<Vec<u32>> {
    let base = base(bpffs)?;
    let mut interfaces = Vec::new();
    if exists(&base)? {
        for (_, pins) in layouts(&base)? {
            interfaces.extend(pinned_interfaces(&pins)?);
        }
    }
    Ok(interfaces)
}
