//! Forced TLS: has connections judged at their sockets, and closes ports where they cannot be.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use filter_common::Existing;

use super::Enforcer;
use crate::{
    compile::Compiled,
    host::{Interface, coverage::Coverage},
    kernel::hook,
    log::Entry,
    policy::Policy,
};

/// Time for which connections from before TLS was forced are counted: each when it first sends something. All
/// connections of the host pay for it.
const COUNTING_TIME: Duration = Duration::from_secs(600);

/// Subject of errors in judging connections.
pub(super) const TLS: &str = "tls";
const LINK: &str = "the link of the program that judges connections";
const PROOF: &str = "the agent's own connection";

/// Connections that begin and do not arrive are reported after this time, so that none is under way; and how many it
/// takes: others are of a server that starts.
const LOST_AFTER: Duration = Duration::from_secs(20);
const FEWEST_LOST: u64 = 3;

/// Connections to a database that began at an interface, and that arrived at a socket of this host.
pub(super) struct Seen {
    stages: [u64; 2],
    /// Since when none has arrived although some have begun, and how many had begun before.
    lost: Option<(Instant, u64)>,
}

impl Seen {
    pub(super) fn new(stages: [u64; 2]) -> Self {
        Self { stages, lost: None }
    }

    /// Returns whether none has arrived for long.
    fn look(&mut self, stages: [u64; 2], now: Instant) -> bool {
        let [before, arrived] = self.stages;
        let [begun, _] = stages;
        self.stages = stages;
        if stages[1] != arrived || begun < before {
            self.lost = None;
        } else if begun > before {
            self.lost.get_or_insert((now, before));
        }
        let is_long = |(since, before)| now - since >= LOST_AFTER && begun - before >= FEWEST_LOST;
        self.lost.is_some_and(is_long)
    }
}

impl Enforcer {
    /// Notes what of the host decides how connections are judged.
    pub(super) fn note_host(
        &mut self,
        policy: &Policy,
        host: &[Interface],
        entries: &mut Vec<Entry>,
    ) {
        let coverage = Coverage::of(policy, &self.in_force.remembered, host);
        let mut bridged = coverage.present.iter().filter(|i| i.is_bridge_port);
        self.bridged = bridged.next().map(|interface| interface.name.clone());
        let is_local = |interface: &&Interface| {
            !interface.loopback && !interface.default_route && !coverage.is_present(interface.index)
        };
        let local = host.iter().filter(is_local);
        let networks = local.flat_map(|interface| interface.networks.iter().copied());
        let written = self.filter.set_local_networks(&networks.collect());
        self.note("local networks", written, entries);
    }

    /// Returns why a policy's connections could not be judged, as far as that can be seen without doing it.
    pub(super) fn foresee_tls(
        &self,
        compiled: &Compiled,
        policy: &Policy,
        host: &[Interface],
    ) -> Option<String> {
        let coverage = Coverage::of(policy, &self.in_force.remembered, host);
        let is_bridged = coverage.present.iter().any(|found| found.is_bridge_port);
        let is_uncertain = is_bridged || !self.filter.is_judged();
        (compiled.forces_tls() && is_uncertain).then(|| hook::unenforceable(&coverage))?
    }

    /// Has connections judged where TLS is forced, or closes the ports where it is and nothing judges them. `prove`: tries
    /// it out.
    pub(super) fn hold_tls(&mut self, compiled: &Compiled, prove: bool, entries: &mut Vec<Entry>) {
        let held = if compiled.forces_tls() {
            self.judge_connections(prove, entries)
        } else {
            let detached = self.filter.detach_hook();
            detached.and_then(|()| self.filter.set_judged(false))
        };
        let held = held.map_err(|error| match self.filter.set_judged(false) {
            Ok(()) => error.context(
                "TLS cannot be enforced; where it is forced, ports are closed but for `cluster`, and \
                 for databases with `tls_unenforced: allow`",
            ),
            Err(more) => more.context(format!("TLS cannot be enforced: {error:#}")),
        });
        self.note(TLS, held, entries);
    }

    /// # Errors
    /// Connections are certainly not judged. A look that failed, or took too long, is none: it proves nothing, and must
    /// not close a port.
    pub(super) fn judge_connections(
        &mut self,
        prove: bool,
        entries: &mut Vec<Entry>,
    ) -> Result<()> {
        if let Some(name) = &self.bridged {
            bail!(
                "{name} is a port of a bridge: connections may end in machines behind it, whose sockets are not on \
                 this host"
            );
        }
        // That a pin cannot be looked at does not say that it is gone.
        let has_hook = self.filter.has_hook().unwrap_or(true);
        let was_judged = self.filter.is_judged() && has_hook;
        let attached = match self.filter.is_hook_whole() {
            Ok(true) => Ok(false),
            Ok(false) => self.filter.attach_hook().map(|()| true),
            Err(error) => Err(error),
        };
        let is_new = match attached {
            // The program that is attached goes on judging.
            Err(error) if was_judged => {
                self.note(LINK, Err(error), entries);
                return Ok(());
            }
            attached => attached?,
        };
        self.note(LINK, Ok(()), entries);
        if was_judged && !is_new && !prove {
            return Ok(());
        }
        let mut proof = self.filter.prove_hook();
        if let Ok(false) = proof {
            // A link that was detached by force is pinned still.
            self.filter.attach_hook()?;
            proof = self.filter.prove_hook();
        }
        let proof = match proof {
            Err(error) if was_judged => Err(error),
            is_judged => {
                ensure!(
                    is_judged?,
                    "a connection of the agent's own was not judged, although the program is attached"
                );
                Ok(())
            }
        };
        self.note(PROOF, proof, entries);
        self.filter.set_judged(true)
    }

    /// Judges the connections that were under way before TLS was forced by what they send next.
    ///
    /// # Errors
    /// TLS is forced nowhere, or the kernel refuses a write.
    pub fn judge_existing(&mut self) -> Result<()> {
        ensure!(
            self.in_force.compiled.forces_tls(),
            "no database of the policy forces TLS"
        );
        self.counting_until = None;
        self.filter.set_existing(Existing::JUDGED)
    }

    /// Counts connections from before TLS was forced on a database of the new policy, for a while.
    pub(super) fn count_existing(&mut self, compiled: &Compiled) -> Result<()> {
        let mut databases = compiled.databases.iter();
        let is_new = databases
            .any(|(name, entries)| entries.refuses_clear() && !self.filter.refuses_clear(name));
        let existing = self.filter.existing()?;
        if is_new || existing == Existing::COUNTED {
            self.counting_until
                .get_or_insert(Instant::now() + COUNTING_TIME);
        }
        // Also where connections of other databases are judged: those of this one are not, unless that is asked for.
        if is_new {
            self.filter.set_existing(Existing::COUNTED)?;
        }
        Ok(())
    }

    /// Ends what makes packets of judged connections dearer, once it has served.
    pub(super) fn end_tls_searches(&mut self) -> Result<()> {
        if self
            .counting_until
            .is_some_and(|until| until <= Instant::now())
        {
            self.filter.set_existing(Existing::NOTHING)?;
            self.counting_until = None;
        }
        self.filter.end_refusing()
    }

    /// Looks for databases whose connections begin and never arrive. Packets cannot close anything: anybody who is allowed may
    /// send them.
    pub(super) fn look_for_lost(&mut self, entries: &mut Vec<Entry>) {
        let looked = self.lost_connections().map(|lost| {
            let new = lost.iter().filter(|(_, text)| !self.lost.contains(text));
            // Clients that are allowed can cause it again and again.
            entries.extend(new.map(|(name, text)| {
                let entry = Entry::warning(text).with("DATABASE", name);
                entry.limited(format!("database {name}"))
            }));
            self.lost = lost.into_iter().map(|(_, text)| text).collect();
        });
        self.note("connections that arrive", looked, entries);
    }

    /// The databases whose connections are lost, and why in words.
    fn lost_connections(&mut self) -> Result<Vec<(String, String)>> {
        let mut lost = Vec::new();
        let databases = &self.in_force.compiled.databases;
        let forces = |name: &String| databases.get(name).is_some_and(|d| d.tls.is_some());
        self.seen.retain(|name, _| forces(name));
        for name in databases.keys().filter(|name| forces(name)) {
            let stages = self.filter.stages(name)?;
            let seen = self.seen.entry(name.clone());
            let seen = seen.or_insert_with(|| Seen::new(stages));
            if seen.look(stages, Instant::now()) {
                let text = format!(
                    "connections to database {name} begin, and none arrives at a socket of this host: its server \
                     does not listen; or they are forwarded to another machine, or their source is translated, where \
                     TLS is not forced"
                );
                lost.push((name.clone(), text));
            }
        }
        Ok(lost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_lost_where_some_begin_and_none_arrives_for_long() {
        let start = Instant::now();
        let mut seen = Seen::new([7, 7]);
        let mut look = |begun, arrived, seconds| {
            seen.look([begun, arrived], start + Duration::from_secs(seconds))
        };
        // Nobody connects.
        assert!(!look(7, 7, 100));
        assert!(!look(9, 7, 130));
        assert!(!look(9, 7, 160));
        assert!(look(10, 7, 190));
        assert!(look(10, 7, 200));
        // One arrives.
        assert!(!look(13, 8, 220));
        assert!(!look(13, 8, 250));
        // Others arrive, one is under way.
        assert!(!look(20, 14, 280));
        assert!(!look(21, 14, 310));
        assert!(!look(21, 15, 340));
        // The counters begin anew.
        assert!(!look(0, 0, 370));
        assert!(!look(3, 0, 400));
        assert!(look(3, 0, 430));
    }
}
