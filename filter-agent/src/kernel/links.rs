//! The links between the program and the interfaces.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use aya::programs::{
    XdpMode,
    links::{FdLink, PinnedLink},
};
use filter_common::LAYOUT;
use nix::{errno::Errno, net::if_::if_nametoindex};

use crate::{
    host::{AttachedXdp, Interface, coverage::Pinned, driver::unreliable},
    kernel::{
        filter::Filter,
        pins::{
            self, AWAY_LINK, NEW_LINK, entries, exists, layouts, link_name, linked_program,
            own_directory, pinned_in, remove_directory, remove_pins, set_aside,
        },
    },
    policy::Mode,
};

/// The result of `attach`.
#[derive(Clone, Debug, PartialEq)]
pub enum Attached {
    /// A pinned link was there. It now runs this agent's program, or, if another layout made it, will after
    /// `take_over`.
    Kept,
    Native,
    /// `refusal`: the error of native mode, where that was tried first.
    Generic {
        refusal: Option<String>,
    },
}

/// Links and counters taken over from an agent of another layout.
#[derive(Clone, Debug, PartialEq)]
pub struct TakenOver {
    pub layout: u32,
    /// Interfaces whose program was switched.
    pub links: usize,
    /// Whether the counters were carried over; else they begin at zero.
    pub counters: bool,
}

/// The pins of an agent of another layout.
#[derive(Debug)]
pub struct OtherLayout {
    layout: u32,
    pins: PathBuf,
    links: Vec<PathBuf>,
}

/// The result of a take-over.
#[derive(Debug, Default)]
pub struct TakeOver {
    pub taken: Vec<TakenOver>,
    /// Links that could not be switched, or not be pinned as this layout's.
    pub not_taken: Vec<anyhow::Error>,
    /// Errors beside that, such as counters that cannot be read or pins that cannot be removed.
    pub errors: Vec<anyhow::Error>,
}

impl Filter {
    /// Runs the program on `interface`: by the pinned link where that is intact, else by a new link, which is
    /// pinned.
    ///
    /// # Errors
    /// The kernel's refusal; `is_gone` recognises an interface that vanished.
    pub fn attach(&mut self, interface: &Interface, mode: Mode) -> Result<Attached> {
        let pin = self.link_pin(interface.index);
        if let Some(found) = self.find_link(interface.index)?
            && self.is_whole(interface)?
        {
            // `take_over` switches a link of another layout, once the maps hold the policy.
            if found != pin {
                return Ok(Attached::Kept);
            }
            let ours = Some(self.program_id()?);
            if interface.xdp.map(|xdp| xdp.program_id) != ours {
                self.update(&pin)
                    .with_context(|| format!("update the program on {}", interface.name))?;
            }
            return Ok(Attached::Kept);
        }
        if self.is_ours_without_pin(interface)? {
            return Ok(Attached::Kept);
        }
        // The pinned link was detached by force, and the new one replaces it; or its interface is in another
        // network namespace, and this interface has its index now.
        if exists(&pin)? {
            match self.update(&pin) {
                Ok(()) => set_aside(&pin, &self.pins)?,
                Err(error) if is_detached(&error) => {}
                Err(error) => return Err(error.context(format!("update {}", pin.display()))),
            }
        }
        let native = match mode {
            Mode::Generic => None,
            Mode::Auto | Mode::Native => match unreliable(interface) {
                // One that vanished, or has another name by now, has no driver to be read: `is_gone` recognises the first, and the
                // second is listed again under its name.
                Some(_) if if_nametoindex(interface.name.as_str()) != Ok(interface.index) => {
                    Some(io::Error::from(Errno::ENODEV).into())
                }
                Some(reason) => Some(anyhow!(reason)),
                None => match self.attach_new(interface, XdpMode::Driver, &pin) {
                    Ok(()) => return Ok(Attached::Native),
                    Err(error) => Some(error),
                },
            },
        };
        if mode == Mode::Native
            && let Some(error) = native
        {
            return Err(error.context(format!("attach to {} in native mode", interface.name)));
        }
        let refusal = native.map(|error| format!("{:#}", error.root_cause()));
        match self.attach_new(interface, XdpMode::Skb, &pin) {
            Ok(()) => Ok(Attached::Generic { refusal }),
            Err(error) => {
                let native = refusal.map(|refusal| format!(" (native mode: {refusal})"));
                let native = native.unwrap_or_default();
                let name = &interface.name;
                Err(error.context(format!("attach to {name} in generic mode{native}")))
            }
        }
    }

    fn attach_new(&mut self, interface: &Interface, mode: XdpMode, pin: &Path) -> Result<()> {
        let program = self.program_mut()?;
        let id = program.attach_to_if_index(interface.index, mode)?;
        let link = program.take_link(id)?;
        // Where the kernel refuses a link with EINVAL, aya attaches over netlink instead, which does
        // not outlive the agent. Such an attachment is no FdLink, and is undone as it is dropped.
        let link = FdLink::try_from(link)
            .map_err(|_| anyhow!("the driver refuses a BPF link (EINVAL)"))?;
        let new = self.pins.join(format!("{NEW_LINK}{}", interface.index));
        link.pin(&new)
            .with_context(|| format!("pin the link at {}", new.display()))?;
        fs::rename(&new, pin)
            .with_context(|| format!("rename {} to {}", new.display(), pin.display()))
    }

    /// Replaces the program on a pinned link atomically (BPF_LINK_UPDATE, kernel 5.9): no packet meets
    /// an interface without one.
    pub(super) fn update(&mut self, pin: &Path) -> Result<()> {
        let link = FdLink::from(PinnedLink::from_pin(pin)?);
        let program = self.program_mut()?;
        let id = program.attach_to_link(link.try_into()?)?;
        // The pin keeps the link; this agent needs no file descriptor of it.
        drop(program.take_link(id)?);
        Ok(())
    }

    /// Brings pins, which are named by interface index, in line with the host: a link whose interface is gone is
    /// removed, and the link of an interface that was in another network namespace, and is back under another
    /// index, gets its name. A link whose interface is elsewhere stays: it is filtered there.
    pub fn adopt_moved(&mut self, host: &[Interface]) -> Result<()> {
        let mut away = Vec::new();
        for pin in entries(&self.pins)? {
            let name = pin
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            let index = name
                .strip_prefix("link_")
                .and_then(|index| index.parse().ok());
            let is_gone = index.is_some_and(|index: u32| !host.iter().any(|i| i.index == index));
            if is_gone || name.starts_with(AWAY_LINK) {
                match self.update(&pin) {
                    Ok(()) => away.push(pin),
                    Err(error) if is_detached(&error) => fs::remove_file(&pin)
                        .with_context(|| format!("remove {}", pin.display()))?,
                    Err(error) => return Err(error),
                }
            }
        }
        if away.is_empty() {
            return Ok(());
        }
        let ours = self.program_id()?;
        let mut back = Vec::new();
        for interface in host
            .iter()
            .filter(|i| i.xdp.is_some_and(|xdp| xdp.program_id == ours))
        {
            if self.find_link(interface.index)?.is_none() {
                back.push(interface.index);
            }
        }
        // The kernel does not report which link belongs to which of several interfaces.
        if let ([pin], [index]) = (away.as_slice(), back.as_slice()) {
            let to = self.link_pin(*index);
            fs::rename(pin, &to)
                .with_context(|| format!("rename {} to {}", pin.display(), to.display()))?;
        }
        Ok(())
    }

    /// Whether the program of the link that is pinned for an interface runs there.
    fn is_whole(&self, interface: &Interface) -> Result<bool> {
        let Some(pin) = self.find_link(interface.index)? else {
            return Ok(false);
        };
        let program_id = linked_program(&pin)?;
        Ok(interface
            .xdp
            .is_some_and(|xdp| xdp.program_id == program_id))
    }

    /// Whether this agent's program runs on an interface by a link whose pin is gone, as where the BPF file system was
    /// unmounted. Only this agent keeps the link then: a new one is refused while it is there.
    fn is_ours_without_pin(&self, interface: &Interface) -> Result<bool> {
        let runs = interface.xdp.map(|xdp| xdp.program_id) == Some(self.program_id()?);
        Ok(runs && self.find_link(interface.index)?.is_none())
    }

    /// The link that is pinned for an interface, by this layout or another.
    fn find_link(&self, interface: u32) -> Result<Option<PathBuf>> {
        let name = link_name(interface);
        let others = self.other_layouts()?.into_iter();
        let others = others.map(|(_, pins)| pins.join(&name));
        for pin in std::iter::once(self.link_pin(interface)).chain(others) {
            if exists(&pin)? {
                return Ok(Some(pin));
            }
        }
        Ok(None)
    }

    /// The directories of other layouts.
    fn other_layouts(&self) -> Result<Vec<(u32, PathBuf)>> {
        let base = self.pins.parent().context("find the pins' directory")?;
        let mut others = layouts(base)?;
        others.retain(|(layout, _)| *layout != LAYOUT);
        Ok(others)
    }

    /// Returns what `take_over` has to take over.
    ///
    /// # Errors
    /// It cannot be listed, or a directory is not ours.
    pub fn to_take_over(&self) -> Result<Vec<OtherLayout>> {
        let others = self.other_layouts().context("look for other layouts")?;
        let list = |(layout, pins): (u32, PathBuf)| {
            own_directory(&pins)?;
            Ok(OtherLayout {
                layout,
                links: pins::links(&pins)?,
                pins,
            })
        };
        others.into_iter().map(list).collect()
    }

    /// Takes over what agents of other layouts left in force: carries their counters, switches each of their
    /// links to this program atomically, and only then removes their maps. The maps must hold the policy by
    /// now. Whenever it is cut off, the next start goes on with what is left. Only a link whose interface is
    /// certainly gone is removed; one that the kernel does not switch stays with its program and maps.
    pub fn take_over(&mut self, others: Vec<OtherLayout>) -> TakeOver {
        let mut result = TakeOver::default();
        for other in others {
            self.take_over_layout(&other, &mut result);
        }
        result
    }

    fn take_over_layout(&mut self, other: &OtherLayout, result: &mut TakeOver) {
        let OtherLayout {
            layout,
            pins,
            links: pinned,
        } = other;
        // The meaning of a later layout's counters is not known here. No packet waits for counters: where they
        // cannot be read, the links are switched all the same.
        let counters = *layout < LAYOUT
            && self
                .maps
                .carry_counters(*layout, pins, &self.image)
                .with_context(|| format!("carry the counters of layout {layout}"))
                .unwrap_or_else(|error| {
                    result.errors.push(error);
                    false
                });
        let before = result.not_taken.len();
        let mut links = 0;
        for pin in pinned {
            match self.take_over_link(*layout, pin) {
                Ok(is_here) => links += usize::from(is_here),
                Err(error) => result.not_taken.push(error),
            }
        }
        // Its maps are those of a link that was not switched.
        if result.not_taken.len() > before {
            return;
        }
        result.errors.extend(remove_directory(pins).err());
        result.taken.push(TakenOver {
            layout: *layout,
            links,
            counters,
        });
    }

    /// Switches a link of another layout to this program, and pins it as this layout's. Returns whether its
    /// interface still exists; where not, the link goes with its layout's directory.
    fn take_over_link(&mut self, layout: u32, pin: &Path) -> Result<bool> {
        let name = pin.file_name().context("read the name of a link's pin")?;
        let to = self.pins.join(name);
        let describe = || {
            format!(
                "switch {} to layout {LAYOUT}; the policy of layout {layout} stays in force",
                pin.display()
            )
        };
        let is_taken = exists(&to).with_context(describe)?;
        match self.update(pin) {
            Ok(()) => {}
            Err(error) if is_detached(&error) => return Ok(false),
            Err(error) => return Err(error.context(describe())),
        }
        let pinned = if is_taken {
            // Another interface has the index of this link's interface now.
            set_aside(pin, &self.pins)
        } else {
            fs::rename(pin, &to)
                .with_context(|| format!("rename {} to {}", pin.display(), to.display()))
        };
        pinned.context(
            "the new policy is in force, but a link of the old layout stays where it is",
        )?;
        Ok(true)
    }

    /// Whether this agent may attach to the interface: it has an Ethernet link layer and no XDP
    /// program but ours, in a mode that need not change.
    pub fn check_interface(&self, interface: &Interface, mode: Mode) -> Result<()> {
        let Some(xdp) = interface.xdp else {
            return check_free(interface);
        };
        if !self.is_whole(interface)? && !self.is_ours_without_pin(interface)? {
            return check_free(interface);
        }
        let name = &interface.name;
        let attached = attached(xdp);
        let keeps = match mode {
            Mode::Auto => true,
            Mode::Native => xdp.native,
            Mode::Generic => !xdp.native,
        };
        ensure!(
            keeps,
            "{name} is filtered in {attached} mode, and changing the mode would open it for a \
             moment: run `filter-agent detach` first"
        );
        Ok(())
    }

    /// Stops filtering an interface, whether or not it still exists.
    pub fn detach(&mut self, interface: u32) -> Result<()> {
        let pin = self.link_pin(interface);
        fs::remove_file(&pin).with_context(|| format!("remove {}", pin.display()))
    }

    /// Stops filtering everywhere and removes every pin, this filter's own included.
    ///
    /// # Errors
    /// Something that is not ours among the pins, before any is removed.
    pub fn remove(&self) -> Result<Vec<u32>> {
        let base = self.pins.parent().context("find the pins' directory")?;
        if !exists(base)? {
            return Ok(Vec::new());
        }
        remove_pins(base)
    }

    /// The links that are pinned, with the programs the kernel says they run.
    pub fn pinned(&self) -> Result<Vec<Pinned>> {
        pinned_in(&self.pins)
    }

    fn link_pin(&self, interface: u32) -> PathBuf {
        self.pins.join(link_name(interface))
    }
}

/// Whether the program may be attached where this agent's does not run.
///
/// # Errors
/// An interface that is not Ethernet, or one on which another program runs.
pub fn check_free(interface: &Interface) -> Result<()> {
    let name = &interface.name;
    ensure!(
        interface.ethernet,
        "{name} is not an Ethernet interface: the filter reads Ethernet frames only"
    );
    if let Some(xdp) = interface.xdp {
        bail!(
            "another XDP program (id {}, {} mode) is attached to {name}: detach it first, for \
             example with `ip link set dev {name} xdp off`",
            xdp.program_id,
            attached(xdp)
        );
    }
    Ok(())
}

fn attached(xdp: AttachedXdp) -> &'static str {
    if xdp.native { "native" } else { "generic" }
}

/// Whether `Filter::attach` failed because the interface does not exist any more (ENODEV).
pub fn is_gone(error: &anyhow::Error) -> bool {
    has(error, Errno::ENODEV)
}

/// Whether a link has no interface any more: it vanished, or the link was detached by force.
pub(super) fn is_detached(error: &anyhow::Error) -> bool {
    has(error, Errno::ENOLINK)
}

fn has(error: &anyhow::Error, errno: Errno) -> bool {
    error.chain().any(|cause| {
        let cause = cause.downcast_ref::<io::Error>();
        cause.is_some_and(|cause| cause.raw_os_error() == Some(errno as i32))
    })
}
