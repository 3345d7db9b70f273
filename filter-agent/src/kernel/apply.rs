//! Changing what the kernel holds: writing a difference, and taking it back.

use std::{collections::BTreeSet, fmt, mem};

use anyhow::{Error, Result, ensure};

use crate::{
    compile::Compiled,
    kernel::{
        counters::Counter,
        difference::Difference,
        filter::Filter,
        image::{Image, Origin},
        read,
        steps::Step,
    },
};

/// Writes that are worth batches.
const FEW: usize = 32;

/// A change to be made.
#[derive(Debug)]
#[cfg_attr(test, derive(Default))]
pub struct Planned {
    pub difference: Difference,
    image: Image,
    origin: Option<Origin>,
}

/// A change that is in force, and the values that it replaced.
#[derive(Debug)]
pub struct Applied {
    /// Databases whose counters begin at zero with this change: they are new in the kernel.
    pub restarted: BTreeSet<String>,
    /// The image before the change.
    pub before: Image,
    origin: Option<Origin>,
    replaced: Replaced,
}

/// Values outside the image that a change replaces.
#[derive(Debug, Default)]
struct Replaced {
    /// Counters of databases to which it adds the hits of removed rules.
    counters: Vec<Counter>,
}

/// A change could not be taken back whole: the kernel holds parts of it. `Filter` has read the maps again
/// and goes on from there, so that the next apply that succeeds removes the rest.
#[derive(Debug)]
pub struct NotTakenBack;

impl fmt::Display for NotTakenBack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a refused change could not be taken back, parts of it are in force")
    }
}

/// A change could not be taken back, and the maps cannot be read: this `Filter` must not be used any more.
/// The pinned maps stay in force, and the next agent reads them.
#[derive(Debug)]
pub struct Unknown;

impl fmt::Display for Unknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "a refused change could not be taken back, and the kernel's maps cannot be read",
        )
    }
}

impl Filter {
    /// Returns what `compiled` would change.
    ///
    /// # Errors
    /// A policy that does not fit the maps. Found here, nothing has to be taken back.
    pub fn plan(&self, compiled: &Compiled) -> Result<Planned> {
        let (image, origin) = Image::next(compiled, &self.image, self.origin.as_ref())?;
        for (family, prefixes) in [
            ("IPv4", image.allowed4.len()),
            ("IPv6", image.allowed6.len()),
        ] {
            ensure!(
                prefixes <= self.max_prefixes,
                "the policy has {prefixes} {family} prefixes and the kernel's map holds {}: write \
                 fewer, or make larger maps (`filter-agent detach`, then `run --max-prefixes`)",
                self.max_prefixes
            );
        }
        Ok(Planned {
            difference: self.image.difference(&image),
            image,
            origin: Some(origin),
        })
    }

    /// Plans and makes a change.
    ///
    /// # Errors
    /// As `plan` and `make`.
    pub fn apply(&mut self, compiled: &Compiled) -> Result<Applied> {
        self.make(self.plan(compiled)?)
    }

    /// Makes the kernel hold what `plan` returned last, by writing only what differs.
    ///
    /// # Errors
    /// The first write that the kernel refused. Everything written before it has been taken back, unless
    /// the error is a `NotTakenBack` or an `Unknown` as well.
    pub fn make(&mut self, planned: Planned) -> Result<Applied> {
        let image = planned.image;
        let steps = self.image.steps_to(&image);
        let mut replaced = Replaced::default();
        let mut begun = 0;
        if let Err(error) = self.write_all(&image, &steps, &mut begun, &mut replaced) {
            let error = error.context("write the policy to the kernel");
            let back = steps[..begun].iter().rev().map(Step::reversed);
            let before = self.image.clone();
            return Err(match self.take_back(back, replaced, before) {
                Ok(()) => error,
                Err(more) => more.context(format!("{error:#}")),
            });
        }
        let new_slots = image.slots.iter().filter(|(slot, _)| {
            let slots = &self.image.slots;
            slots.binary_search_by_key(slot, |&(slot, _)| slot).is_err()
        });
        let restarted = new_slots
            .filter_map(|(_, name)| Some(name.text()?.to_owned()))
            .collect();
        Ok(Applied {
            restarted,
            before: mem::replace(&mut self.image, image),
            origin: mem::replace(&mut self.origin, planned.origin),
            replaced,
        })
    }

    /// Takes a change back that `apply` made last: the maps and the counters are what they were before it.
    ///
    /// # Errors
    /// A `NotTakenBack` or an `Unknown`.
    pub fn undo(&mut self, applied: Applied) -> Result<()> {
        let steps = self.image.steps_to(&applied.before);
        let taken_back = self.take_back(steps.into_iter(), applied.replaced, applied.before);
        self.origin = applied.origin.filter(|_| taken_back.is_ok());
        taken_back
    }

    /// Writes the steps and what belongs to them. `begun`: the steps that may have been written.
    fn write_all(
        &mut self,
        image: &Image,
        steps: &[Step],
        begun: &mut usize,
        replaced: &mut Replaced,
    ) -> Result<()> {
        // Free slots and rule ids are not shown: clearing their counters changes nothing that is in force.
        self.maps.clear_counters(&self.image, image)?;
        for group in steps.chunk_by(Step::is_independent_of) {
            *begun += group.len();
            self.write(group)?;
        }
        self.maps.begin_epoch(&image.ports)?;
        self.maps
            .keep_hits(&self.image, image, &mut replaced.counters)
    }

    /// Writes every step, whatever fails, so that as much as possible is as `before` again.
    fn take_back(
        &mut self,
        steps: impl Iterator<Item = Step>,
        replaced: Replaced,
        before: Image,
    ) -> Result<()> {
        let mut refused: Option<Error> = None;
        for step in steps {
            if let Err(error) = self.maps.write(&step) {
                refused.get_or_insert(error);
            }
        }
        if refused.is_some() {
            // The step that failed first may not have been written at all, and the kernel refuses
            // to take it back for the same reason: only the maps show what is left.
            match read::image(&self.pinned_maps) {
                Ok(image) => {
                    self.image = image;
                    self.origin = None;
                }
                Err(unread) => {
                    let error = refused.unwrap_or(unread);
                    return Err(error.context(Unknown));
                }
            }
            if self.image == before {
                refused = None;
            }
        } else {
            self.image = before;
        }
        // The verdict caches may hold what was true half way.
        let rest = self.maps.begin_epoch(&self.image.ports);
        let rest = rest.and_then(|()| self.restore(replaced));
        match refused.or(rest.err()) {
            None => Ok(()),
            Some(error) => Err(error.context(NotTakenBack)),
        }
    }

    fn restore(&mut self, replaced: Replaced) -> Result<()> {
        for counter in replaced.counters.into_iter().rev() {
            self.maps.set_counter(counter)?;
        }
        Ok(())
    }

    /// Writes steps that are independent of each other. What a batch did not write is written one by one: a kernel may have
    /// no batches, run out of entries in one (6.13), or give up waiting for a lock after 250 ms (6.15).
    fn write(&mut self, group: &[Step]) -> Result<()> {
        let failed = if group.len() < FEW {
            vec![group]
        } else {
            self.maps.write_batches(group)
        };
        let mut steps = failed.into_iter().flatten();
        steps.try_for_each(|step| self.maps.write(step))
    }
}
