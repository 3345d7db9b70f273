//! The metrics, from plain values to Prometheus' text format 0.0.4. Pure, but for the files of its folder that read /proc
//! and listen. `docs/metrics.md` describes each metric.

mod families;
pub mod listener;
mod process;
pub mod scrape;
pub mod timings;

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use filter_common::{Fate, Reason};

use crate::{
    kernel::fill::Fill,
    report::{self, Status},
    snapshot::Snapshot,
};
use families::Families;
use process::{Usage, seconds};
use timings::Timings;

/// Content of a scrape.
pub struct Values<'a> {
    pub snapshot: &'a Snapshot,
    pub status: &'a Status,
    pub rules: &'a [report::Rule],
    pub fills: &'a [Fill],
    /// Dropped sources that a rule allowed until lately, by database.
    pub formerly_allowed: &'a BTreeMap<String, usize>,
    pub usage: Usage,
    pub timings: &'a Timings,
}

impl Values<'_> {
    /// # Errors
    /// The crate refuses a family.
    pub fn text(&self) -> Result<String> {
        let mut families = Families::default();
        self.add_agent(&mut families);
        self.add_interfaces(&mut families);
        self.add_databases(&mut families);
        self.add_packets(&mut families);
        self.add_rules(&mut families);
        self.add_regions(&mut families);
        self.add_fleet(&mut families);
        self.add_fills(&mut families);
        families.extend(self.timings.families());
        self.add_process(&mut families);
        families.text()
    }

    fn add_agent(&self, families: &mut Families) {
        let Status {
            version,
            policy,
            verified,
            warnings,
            not_enforced,
            errors,
            repairs,
            window,
            ..
        } = self.status;
        families.gauge(
            "filter_agent_build_info",
            "Version of the agent; always 1.",
            [(vec![("version", version.as_str())], 1.0)],
        );
        families.value(
            "filter_agent_policy_accepted_timestamp_seconds",
            "When the policy in force was read and checked, in seconds since 1970.",
            seconds(policy.timing.accepted),
        );
        families.value(
            "filter_agent_policy_enforced",
            "Whether the policy is enforced on every listed interface that exists.",
            flag(not_enforced.is_empty()),
        );
        families.value(
            "filter_agent_errors",
            "Errors that `status` shows now.",
            errors.len() as f64,
        );
        families.value(
            "filter_agent_warnings",
            "Warnings that `status` shows now.",
            warnings.len() as f64,
        );
        families.value(
            "filter_agent_verified_timestamp_seconds",
            "When the attached program was last compared with the policy, in seconds since 1970.",
            seconds(verified.at),
        );
        families.value(
            "filter_agent_verification_errors",
            "Errors of the last comparison of the attached program with the policy.",
            verified.errors.len() as f64,
        );
        families.counter(
            "filter_agent_repairs_total",
            "How often the filter was detached by another program and attached again.",
            [(Vec::new(), *repairs as f64)],
        );
        let ends = self.rules.iter().filter(|rule| is_in_force(rule));
        families.value(
            "filter_agent_next_end_seconds",
            "Time until the next rule or block ends; absent where none does.",
            ends.filter_map(|rule| rule.left)
                .min()
                .map(|left| left as f64),
        );
        families.value(
            "filter_agent_confirm_seconds",
            "Time until the policy that is tried falls back; absent where none is.",
            window.as_ref().map(|window| window.left as f64),
        );
    }

    fn add_interfaces(&self, families: &mut Families) {
        let interfaces = &self.status.interfaces;
        families.gauge(
            "filter_agent_interface_attached",
            "Whether the program runs on a listed interface.",
            interfaces.iter().map(|interface| {
                let attached = flag(interface.program_id.is_some());
                (vec![("interface", interface.name.as_str())], attached)
            }),
        );
        families.gauge(
            "filter_agent_interface_info",
            "Mode of the program on an interface; always 1.",
            interfaces.iter().filter_map(|interface| {
                let mode = interface.mode.as_deref()?;
                let labels = vec![("interface", interface.name.as_str()), ("mode", mode)];
                Some((labels, 1.0))
            }),
        );
    }

    fn add_databases(&self, families: &mut Families) {
        let databases = &self.status.databases;
        let mut gauge = |name: &str, help: &str, value: fn(&report::Database) -> f64| {
            let series = databases
                .iter()
                .map(|database| (vec![("database", database.name.as_str())], value(database)));
            families.gauge(name, help, series);
        };
        gauge(
            "filter_agent_monitored",
            "Whether packets of a database that would be dropped are only counted.",
            |database| flag(database.monitor),
        );
        gauge(
            "filter_agent_rules",
            "Rules and blocks in force, by database.",
            |database| database.rules as f64,
        );
        gauge(
            "filter_agent_prefixes",
            "Allowed prefixes, by database.",
            |database| database.prefixes as f64,
        );
        gauge(
            "filter_agent_temporary_rules",
            "Temporary rules in force, by database.",
            |database| database.temporary as f64,
        );
        gauge(
            "filter_agent_blocks",
            "Blocks in force, by database.",
            |database| database.blocks as f64,
        );
        gauge(
            "filter_agent_suspended_rules",
            "Temporary rules and blocks that are not in force, since their database has no room for them.",
            |database| database.suspended as f64,
        );
        let formerly = |database| {
            let sources = self.formerly_allowed.get(database);
            sources.copied().unwrap_or_default() as f64
        };
        families.gauge(
            "filter_agent_formerly_allowed_sources",
            "Sources dropped in the last ten minutes that a rule allowed in the last 24 hours.",
            databases.iter().map(|database| {
                let name = database.name.as_str();
                (vec![("database", name)], formerly(name))
            }),
        );
    }

    /// A counter that can rise is there from the start on, at zero: Prometheus does not see a series begin as a rise.
    fn add_packets(&self, families: &mut Families) {
        let mut packets = Vec::new();
        let mut connections = Vec::new();
        let labels = |database, kind, value, monitored: bool| {
            let monitored = if monitored { "true" } else { "false" };
            vec![
                ("database", database),
                (kind, value),
                ("monitored", monitored),
            ]
        };
        let mut not_allowed = vec![
            ("", &self.status.unattributed, false, true),
            ("", &self.status.unattributed_would_drop, true, false),
        ];
        for database in &self.status.databases {
            let name = database.name.as_str();
            let allowed = labels(name, "reason", Reason::Allowed.name(), false);
            packets.push((allowed, database.passed as f64));
            not_allowed.push((name, &database.dropped, false, true));
            not_allowed.push((name, &database.would_drop, true, database.monitor));
            for (counts, monitored, all) in [
                (&database.connections, false, database.force_tls),
                (&database.monitored_connections, true, database.monitor_tls),
            ] {
                for fate in Fate::ALL {
                    let count = counts.get(fate.name()).copied();
                    if let Some(count) = count.or(all.then_some(0)) {
                        let labels = labels(name, "fate", fate.name(), monitored);
                        connections.push((labels, count as f64));
                    }
                }
            }
        }
        for (database, counts, monitored, all) in not_allowed {
            for reason in Reason::ALL.into_iter().filter(|r| *r != Reason::Allowed) {
                let count = counts.get(reason.name()).copied();
                if let Some(count) = count.or(all.then_some(0)) {
                    let labels = labels(database, "reason", reason.name(), monitored);
                    packets.push((labels, count as f64));
                }
            }
        }
        families.counter(
            "filter_agent_packets_total",
            "Packets to guarded ports, by database (empty: unknown) and reason of the verdict. `monitored`: passed, and would have been dropped.",
            packets,
        );
        families.counter(
            "filter_agent_connections_total",
            "Connections where TLS is forced, by database and what was decided of them. `monitored`: it was only counted.",
            connections,
        );
    }

    fn add_rules(&self, families: &mut Families) {
        // The file may have two rules of the same source, which are one in the kernel.
        let mut seen = BTreeSet::new();
        let mut rules = Vec::new();
        for rule in self.rules {
            let key = (
                rule.database.as_str(),
                rule.source.as_str(),
                rule.origin.name(),
            );
            if is_in_force(rule) && seen.insert(key) {
                let (database, source, origin) = key;
                let labels = vec![("database", database), ("rule", source), ("origin", origin)];
                rules.push((labels, rule));
            }
        }
        families.counter(
            "filter_agent_rule_packets_total",
            "Packets that a rule allowed, or a block dropped, by database and rule.",
            rules
                .iter()
                .map(|(labels, rule)| (labels.clone(), rule.hits as f64)),
        );
        families.gauge(
            "filter_agent_rule_end_seconds",
            "Time until a rule or a block ends; only of those that do.",
            rules
                .iter()
                .filter_map(|(labels, rule)| Some((labels.clone(), rule.left? as f64))),
        );
    }

    fn add_fleet(&self, families: &mut Families) {
        let Some(fleet) = &self.status.fleet else {
            return;
        };
        let answers = fleet.lost.is_none() && fleet.answered.is_some();
        families.gauge(
            "filter_agent_fleet_answering",
            "Whether etcd answers.",
            [(Vec::new(), flag(answers))],
        );
        families.gauge(
            "filter_agent_fleet_held",
            "Whether the answers of etcd are not believed, since it went back.",
            [(Vec::new(), flag(fleet.held.is_some()))],
        );
        families.counter(
            "filter_agent_fleet_unannounced_changes_total",
            "Changes that etcd did not announce, and a periodic read found.",
            [(Vec::new(), fleet.healed as f64)],
        );
        let documents = fleet.documents.iter();
        families.gauge(
            "filter_agent_fleet_document_revision",
            "Revision in etcd of a database's document in force; 0 where there is none.",
            documents.clone().map(|document| {
                let revision = document.revision.unwrap_or_default();
                (
                    vec![("database", document.database.as_str())],
                    revision as f64,
                )
            }),
        );
        families.gauge(
            "filter_agent_fleet_document_state",
            "1 for the state of a database's document.",
            documents.map(|document| {
                let state = ("state", document.state.name());
                (vec![("database", document.database.as_str()), state], 1.0)
            }),
        );
    }

    fn add_regions(&self, families: &mut Families) {
        let regions: Vec<_> = self.status.regions.iter().filter(|r| r.used).collect();
        let mut gauge = |name: &str, help: &str, value: fn(&report::Region) -> Option<f64>| {
            let series = regions.iter().filter_map(|region| {
                Some((vec![("region", region.name.as_str())], value(region)?))
            });
            families.gauge(name, help, series);
        };
        gauge(
            "filter_agent_region_prefixes",
            "Allowed prefixes of a region that rules name, retiring ones included.",
            |region| Some(region.prefixes.len() as f64),
        );
        gauge(
            "filter_agent_region_retiring_prefixes",
            "Prefixes that left a region and are still allowed.",
            |region| Some(region.retiring.len() as f64),
        );
        gauge(
            "filter_agent_region_failing",
            "Whether the last look-up of a region failed, or its result lacked something.",
            |region| Some(flag(region.failing)),
        );
        gauge(
            "filter_agent_region_confirmed_timestamp_seconds",
            "When the source of a region last returned the prefixes in force, in seconds since 1970; absent where it never did.",
            |region| region.confirmed.map(seconds),
        );
        gauge(
            "filter_agent_region_changed_timestamp_seconds",
            "When the prefixes of a region last changed, in seconds since 1970; absent where they never did.",
            |region| region.change.as_ref()?.at.map(seconds),
        );
        // `prefixes:` are never looked up.
        let states = self.snapshot.regions.iter();
        let states = states.filter(|(_, state)| !state.region.is_constant());
        families.gauge(
            "filter_agent_region_max_refresh_seconds",
            "Longest time between two look-ups of a region.",
            states.clone().map(|(name, state)| {
                let longest = state.region.guards.max_refresh.as_secs_f64();
                (vec![("region", name.as_str())], longest)
            }),
        );
        families.counter(
            "filter_agent_region_look_ups_total",
            "Look-ups of a region, by whether they brought a result that was taken.",
            states.flat_map(|(name, state)| {
                let results = [("good", state.succeeded), ("failed", state.failed)];
                results.map(|(result, count)| {
                    let labels = vec![("region", name.as_str()), ("result", result)];
                    (labels, count as f64)
                })
            }),
        );
    }

    fn add_fills(&self, families: &mut Families) {
        let mut gauge = |name: &str, help: &str, value: fn(&Fill) -> usize| {
            let fills = self.fills.iter();
            let series = fills.map(|fill| (vec![("map", fill.map)], value(fill) as f64));
            families.gauge(name, help, series);
        };
        gauge(
            "filter_agent_map_entries",
            "Entries of a kernel map that can fill up.",
            |fill| fill.entries,
        );
        gauge(
            "filter_agent_map_max_entries",
            "Entries of a kernel map from which on more are refused.",
            |fill| fill.limit,
        );
    }

    fn add_process(&self, families: &mut Families) {
        let usage = &self.usage;
        let cpu = usage.cpu_seconds.map(|seconds| (Vec::new(), seconds));
        families.counter(
            "process_cpu_seconds_total",
            "Processor time of the agent, in user and kernel mode.",
            cpu,
        );
        families.value(
            "process_resident_memory_bytes",
            "Resident memory of the agent. The kernel's maps are not part of it.",
            usage.resident_bytes.map(|bytes| bytes as f64),
        );
        families.value(
            "process_virtual_memory_bytes",
            "Virtual memory of the agent.",
            usage.virtual_bytes.map(|bytes| bytes as f64),
        );
        families.value(
            "process_open_fds",
            "Open file descriptors of the agent.",
            usage.open_fds.map(|fds| fds as f64),
        );
        families.value(
            "process_max_fds",
            "Most file descriptors that the agent may have open.",
            usage.max_fds.map(|fds| fds as f64),
        );
        families.value(
            "process_threads",
            "Threads of the agent.",
            usage.threads.map(|threads| threads as f64),
        );
        families.value(
            "process_start_time_seconds",
            "When the agent started, in seconds since 1970.",
            usage.started,
        );
    }
}

fn flag(is_set: bool) -> f64 {
    f64::from(u8::from(is_set))
}

fn is_in_force(rule: &report::Rule) -> bool {
    !rule.expired && !rule.suspended
}
