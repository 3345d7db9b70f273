//! Open connections whose source loses its access: found before a change, and reset after it.

use std::{
    borrow::Cow,
    fmt, mem,
    net::IpAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use filter_common::Protocol;

use super::{Checked, Enforcer};
use crate::{
    clock::BootTime,
    compile::Compiled,
    cut::{self, Before, Paths, cut},
    host::sockets::{Connection, Destroyed, Sockets},
    kernel::{difference::Difference, image::Image},
    lock_out::lock_out,
    log::Entry,
    policy::OnRemoval,
    report,
};

/// Time allowed to reset connections: each time they are listed one may be missing (see `Sockets`).
const RESET_TIMEOUT: Duration = Duration::from_secs(2);

/// Error of the checks: connections cannot be reset.
const RESET: &str = "reset connections";

impl Enforcer {
    /// Adds to a plan the open connections that it would cut off, and what its caller could no longer reach. Returns the
    /// interfaces where connections may be cut off. Where they cannot be listed, all of this host's addresses and the caller
    /// count as filtered already.
    pub(super) fn find_effects(
        &mut self,
        after: &Compiled,
        caller: Option<IpAddr>,
        plan: &mut report::Plan,
    ) -> Option<Paths> {
        let may_cut = may_cut(plan);
        if !may_cut && caller.is_none() {
            return None;
        }
        let paths = self.paths();
        if may_cut {
            let cut = paths.as_ref().map_err(|error| format!("{error:#}"));
            let cut = cut.and_then(|paths| {
                let cut = self.cut_connections(after, paths, plan);
                cut.map_err(|error| format!("{error:#}"))
            });
            match cut {
                Ok(cut) => plan.cut = cut,
                Err(error) => plan.cut_unknown.push(error),
            }
            plan.cut_unknown.extend(self.elsewhere(&plan.difference));
        }
        if let Some(caller) = caller {
            self.find_lock_out(after, caller.to_canonical(), paths.as_ref().ok(), plan);
        }
        may_cut.then(|| paths.unwrap_or_else(|_| self.covered_paths()))
    }

    /// As `paths`; where the interfaces cannot be listed, all of this host's addresses count as filtered.
    pub(super) fn paths_or_covered(&mut self) -> Paths {
        self.paths().unwrap_or_else(|_| self.covered_paths())
    }

    fn covered_paths(&self) -> Paths {
        Paths {
            host: Vec::new(),
            filtered: self.covered.clone(),
        }
    }

    fn find_lock_out(
        &self,
        after: &Compiled,
        caller: IpAddr,
        paths: Option<&Paths>,
        plan: &mut report::Plan,
    ) {
        let comes_through = |paths: &Paths| paths.unfiltered(caller).is_none();
        let (was_filtered, is_filtered) = match paths {
            Some(paths) => (
                comes_through(paths),
                comes_through(&with_plan(paths.clone(), plan)),
            ),
            None => (true, true),
        };
        if is_filtered {
            let before = &self.in_force.compiled;
            plan.lock_out = lock_out(before, after, caller, was_filtered, BootTime::now());
        }
    }

    /// The interfaces, and those that a pinned link filters.
    pub(super) fn paths(&mut self) -> Result<Paths> {
        let pinned = self.pinned()?.into_iter();
        Ok(Paths {
            host: self.netlink.interfaces()?,
            filtered: pinned.map(|link| link.interface).collect(),
        })
    }

    fn cut_connections(
        &mut self,
        after: &Compiled,
        paths: &Paths,
        plan: &report::Plan,
    ) -> Result<Vec<report::Cut>> {
        let connections = list(&mut self.sockets, after)?;
        let before = Before {
            image: Cow::Borrowed(self.filter.image()),
            paths: paths.clone(),
        };
        let paths = with_plan(paths.clone(), plan);
        let now = BootTime::now();
        let found = cut(&before, after, &paths, &connections, now);
        let Some(before) = &self.before_tried else {
            return Ok(cut::report(&found));
        };
        let (wait, reset): (Vec<_>, Vec<_>) = found
            .into_iter()
            .partition(|cut| before.lets_in(cut.connection, now));
        let mut report = cut::report(&wait);
        report.iter_mut().for_each(|cut| cut.at_confirm = cut.reset);
        report.extend(cut::report(&reset));
        Ok(report)
    }

    /// Databases that lose sources and whose ports no process of this network namespace listens on: their connections are
    /// in other namespaces, as those of containers.
    fn elsewhere(&mut self, difference: &Difference) -> Vec<String> {
        let compiled = self.in_force.compiled.clone();
        let ports = self.filter.image().tcp_ports();
        let listening = self.sockets.listening(&ports).unwrap_or_default();
        let databases = difference
            .databases
            .iter()
            .filter(|(_, change)| change.takes_access());
        let elsewhere = databases.filter_map(|(name, _)| {
            // Only TCP has connections.
            let entries = compiled.databases.get(name);
            let entries = entries.filter(|entries| entries.protocol == Protocol::Tcp)?;
            let is_here = entries.ports.iter().any(|port| listening.contains(port));
            (!is_here).then(|| {
                format!(
                    "database {name}: its open connections are not known: no process in the agent's network namespace \
                     listens on its ports (a container's published port?)"
                )
            })
        });
        elsewhere.collect()
    }

    /// Resets the connections of sources that `before` let in, and that what is in force does not; `None`: the change cut off
    /// none.
    pub(super) fn reset_cut(&mut self, before: Option<Before<'static>>, entries: &mut Vec<Entry>) {
        if let Some(before) = before {
            // Of changes that could not be followed up the first allowed what all of them took.
            self.not_reset.get_or_insert(before);
        }
        self.reset_rest(entries);
    }

    /// Resets what could not be reset when a change was made.
    pub(super) fn reset_rest(&mut self, entries: &mut Vec<Entry>) {
        let Some(before) = self.not_reset.take() else {
            return;
        };
        let reset = self.reset(&before, entries);
        if reset
            .as_ref()
            .is_err_and(|error| !error.is::<Unsupported>())
        {
            self.not_reset = Some(before);
        }
        self.note(RESET, reset, entries);
    }

    /// Notes what was in force before the policy that is tried, which another agent enforced. It holds what the confirmed
    /// policy compiles to.
    ///
    /// # Errors
    /// The interfaces cannot be listed, or the maps have no room for the policy.
    pub fn restore_before_tried(&mut self, confirmed: &Compiled) -> Result<()> {
        let image = Image::of(confirmed, &Image::default())?;
        self.before_tried = Some(Before {
            image: Cow::Owned(image),
            paths: self.paths()?,
        });
        Ok(())
    }

    /// Forgets what was in force before a policy that is tried: it could not be enforced.
    pub fn forget_before_tried(&mut self) {
        self.before_tried = None;
    }

    /// The policy that is tried is confirmed: resets the connections that it cut off. Returns them.
    pub fn keep_tried(&mut self) -> (Result<Vec<report::Cut>>, Checked) {
        let mut entries = Vec::new();
        let before = self.before_tried.take();
        let cut = before
            .as_ref()
            .map_or(Ok(Vec::new()), |before| self.cut_since(before));
        self.before_tried = before;
        self.reset_since_tried(&mut entries);
        (cut, self.checked(entries, None))
    }

    fn cut_since(&mut self, before: &Before<'_>) -> Result<Vec<report::Cut>> {
        let after = self.in_force.compiled.clone();
        let paths = self.paths()?;
        let connections = list(&mut self.sockets, &after)?;
        let found = cut(before, &after, &paths, &connections, BootTime::now());
        Ok(cut::report(&found))
    }

    /// Resets the connections that were let in before the policy that was tried, and are not now.
    pub(super) fn reset_since_tried(&mut self, entries: &mut Vec<Entry>) {
        if let Some(before) = self.before_tried.take() {
            self.not_reset.get_or_insert(before);
            self.reset_rest(entries);
        }
    }

    fn reset(&mut self, before: &Before<'_>, entries: &mut Vec<Entry>) -> Result<()> {
        let after = self.in_force.compiled.clone();
        let paths = self.paths()?;
        let deadline = Instant::now() + RESET_TIMEOUT;
        let mut logged = false;
        loop {
            let connections = list(&mut self.sockets, &after)?;
            let now = BootTime::now();
            let mut found = cut(before, &after, &paths, &connections, now);
            // Falling back may let these in again.
            if let Some(before) = &self.before_tried {
                found.retain(|cut| !before.lets_in(cut.connection, now));
            }
            if !mem::replace(&mut logged, true) {
                entries.extend(cut::entries(&cut::report(&found)));
            }
            found.retain(|cut| cut.on_removal == OnRemoval::Reset);
            if found.is_empty() {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "{} connections of sources that are no longer allowed are still open",
                found.len()
            );
            for cut in found {
                if self.sockets.destroy(cut.connection)? == Destroyed::Unsupported {
                    return Err(Unsupported.into());
                }
            }
        }
    }
}

/// Trying again is of no use.
#[derive(Debug)]
struct Unsupported;

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "this kernel cannot reset connections (CONFIG_INET_DIAG_DESTROY): those of sources that are no longer allowed \
             stay open at the server until its own time limits; their packets are dropped",
        )
    }
}

impl std::error::Error for Unsupported {}

/// Whether a change may cut any connection.
fn may_cut(plan: &report::Plan) -> bool {
    let mut databases = plan.difference.databases.values();
    !plan.attached.is_empty() || databases.any(|change| change.may_cut())
}

/// The interfaces after a plan.
fn with_plan(mut paths: Paths, plan: &report::Plan) -> Paths {
    for interface in &paths.host {
        if plan.attached.contains(&interface.name) {
            paths.filtered.insert(interface.index);
        }
        if plan.detached.contains(&interface.name) {
            paths.filtered.remove(&interface.index);
        }
    }
    paths
}

/// The open connections to the ports of the databases.
fn list(sockets: &mut Sockets, after: &Compiled) -> Result<Vec<Connection>> {
    let tcp = after.databases.values();
    let tcp = tcp.filter(|entries| entries.protocol == Protocol::Tcp);
    let ports = tcp
        .flat_map(|entries| entries.ports.iter().copied())
        .collect();
    let connections = sockets.connections(&ports);
    connections.context("find the connections that the change cuts off")
}
