//! `check`: whether a policy file is valid, and whether this host can enforce it.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::Result;
use ipnet::IpNet;
use jiff::Timestamp;
use serde::Serialize;

use crate::{
    cli::{
        args::Output,
        output::{failure_if, or, print_table, table},
        print::{print_warnings, with_addresses, with_monitor},
        progress::announced,
        read_within, readable,
    },
    clock::Clock,
    compile::compile,
    host::{
        self,
        coverage::{Coverage, Remembered, address_warnings, describe_missing},
        driver::{self, Driver},
        nat,
        settings::Settings,
    },
    kernel::{hook, links, pins, program},
    policy::{Listed, RegionSource},
    policy_file::PolicyFile,
    region::{
        lookup,
        state::{self as region, Regions},
    },
    store,
    temporary::Timed,
    text::counted,
};

/// Time allowed for the file to be read: a pipe may never end.
const READ_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Serialize)]
struct Checked {
    file: PathBuf,
    interfaces: Vec<String>,
    databases: Vec<CheckedDatabase>,
    /// Regions that rules name, as far as they were looked up.
    regions: Vec<CheckedRegion>,
    #[serde(skip_serializing_if = "Option::is_none")]
    host: Option<Vec<Driver>>,
    warnings: Vec<String>,
    /// Regions that failed, and why a start on this host would be refused, which is only examined with `--host`.
    errors: Vec<String>,
}

#[derive(Serialize)]
struct CheckedDatabase {
    name: String,
    ports: Vec<String>,
    addresses: Vec<IpAddr>,
    model: String,
    monitor: bool,
    rules: Vec<String>,
    /// Whether documents of the fleet add to them.
    fleet: bool,
    prefixes: usize,
}

#[derive(Serialize)]
struct CheckedRegion {
    name: String,
    source: String,
    /// As `Region::prefixes` of `regions`.
    prefixes: Vec<IpNet>,
}

/// Checks a policy file. Needs no agent, and the network only with `resolve`. `places`: the BPF file system and the state
/// directory, to check whether this host can enforce the file.
pub(super) async fn check(
    file: &Path,
    resolve: bool,
    places: Option<(&Path, &Path)>,
    output: &Output,
) -> Result<ExitCode> {
    let loaded = read_within(file.to_owned(), READ_TIMEOUT).await?;
    let known = Regions::new();
    let mut ask = region::to_ask(&loaded.policy, &known);
    let is_file = |name: &str| {
        let region = &loaded.policy.regions[name];
        matches!(region.source, RegionSource::File(_))
    };
    ask.retain(|name, _| resolve || is_file(name));
    let what = || "waiting for the look-ups of regions: each ends after its `timeout`".to_owned();
    let answers = announced(what, lookup::ask_all(&loaded.policy, ask)).await;
    let now = Timestamp::now();
    // One region that fails must not hide what the others have.
    let (regions, mut errors) = region::next_and_errors(&loaded.policy, &known, answers, now)?;
    let compiled = compile(
        &loaded.policy,
        &region::prefixes(&regions),
        &Timed::of(&loaded.policy, Clock::start().now()),
    );
    let host = host::interfaces().await?;
    let mut warnings = loaded.warnings(&compiled);
    let looked_up = regions.iter().filter_map(|(name, state)| {
        Some(CheckedRegion {
            name: name.clone(),
            source: state.region.source.to_string(),
            prefixes: state.set.as_ref()?.prefixes.to_vec(),
        })
    });
    let looked_up: Vec<CheckedRegion> = looked_up.collect();
    let partial = regions.iter().filter(|(_, state)| state.partial);
    warnings.extend(partial.filter_map(|(name, state)| {
        let error = state.error.as_ref()?;
        Some(format!("region {name}: {}", error.text))
    }));
    let unknown = regions
        .iter()
        .filter(|(_, state)| state.set.is_none() && state.error.is_none());
    warnings.extend(unknown.map(|(name, state)| {
        let source = &state.region.source;
        format!("region {name} ({source}) was not looked up: use --resolve")
    }));
    // Other users are refused more than the service: their own errors tell.
    if nix::unistd::geteuid().is_root() {
        warnings.extend(readable::warnings(&loaded.path, &loaded.policy));
    }
    let kept = match places {
        Some((_, state_dir)) => store::read_confirmed(state_dir),
        None => Ok(None),
    };
    let remembered = match kept {
        Ok(kept) => kept.unwrap_or_default().interfaces,
        Err(error) => {
            errors.push(format!("{error:#}"));
            Remembered::default()
        }
    };
    let coverage = Coverage::of(&loaded.policy, &remembered, &host);
    warnings.extend(coverage.warnings(&host));
    let missing = coverage.missing.iter();
    let missing: Vec<String> = missing
        .map(|entry| format!("{} here", describe_missing(entry)))
        .collect();
    let mut drivers = None;
    // Without --host the policy may be for another host: a missing interface is only a warning.
    match places {
        Some((bpffs, _)) => {
            if coverage.present.is_empty() && !missing.is_empty() {
                errors.extend(missing);
                errors.push("nothing would be filtered, and the databases would be open".into());
            } else {
                warnings.extend(missing);
            }
            let found = driver::drivers(&coverage.present, |interface| {
                coverage.mode(&loaded.policy, interface)
            })
            .await?;
            errors.extend(refusals(bpffs, &coverage));
            if compiled.forces_tls() {
                errors.extend(hook::unenforceable(&coverage));
            }
            errors.extend(found.iter().filter_map(|driver| driver.error.clone()));
            drivers = Some(found);
            let settings = Settings::read();
            warnings.extend(address_warnings(&loaded.policy, &host));
            warnings.extend(settings.port_warnings(&loaded.policy));
            warnings.extend(settings.forward_warnings(&loaded.policy, &coverage.present));
            if nix::unistd::geteuid().is_root() {
                warnings.extend(nat::warnings(&loaded.policy));
            } else {
                warnings.push("NAT rules are unknown: run this as root".into());
            }
            let changing = loaded.policy.interfaces.iter();
            let changing = changing.filter(|entry| !matches!(entry, Listed::Name(_)));
            warnings.extend(changing.filter(|entry| !remembered.knows(entry)).map(|entry| {
                format!(
                    "no agent has recorded the interfaces of `{entry}` yet: at the first boot the databases are open \
                     until such an interface exists"
                )
            }));
        }
        None => warnings.extend(missing),
    }
    let PolicyFile {
        path: file, policy, ..
    } = loaded;
    let databases = policy.databases.iter().map(|database| {
        let entries = &compiled.databases[&database.name];
        CheckedDatabase {
            name: database.name.clone(),
            ports: database.guarded_ports(),
            addresses: database.addresses.clone(),
            model: database.model.name().into(),
            monitor: database.monitor,
            rules: entries
                .rules
                .iter()
                .map(|(key, _)| key.to_string())
                .collect(),
            fleet: database.fleet.is_some(),
            prefixes: entries.prefixes(),
        }
    });
    let checked = Checked {
        file,
        databases: databases.collect(),
        regions: looked_up,
        interfaces: policy.interfaces.iter().map(ToString::to_string).collect(),
        host: drivers,
        warnings,
        errors,
    };
    output.print(&checked, |checked| {
        say!("{} is valid", checked.file.display());
        say!("interfaces: {}", checked.interfaces.join(", "));
        let mut table = table(["DATABASE", "PORTS", "MODEL", "PREFIXES", "OPEN TO"]);
        for database in &checked.databases {
            let fleet = database.fleet.then(|| "what the fleet allows".to_owned());
            let open_to: Vec<String> = database.rules.iter().cloned().chain(fleet).collect();
            table.add_row([
                database.name.clone(),
                with_addresses(&database.ports, &database.addresses),
                with_monitor(&database.model, database.monitor),
                database.prefixes.to_string(),
                or(&open_to.join(", "), "nobody"),
            ]);
        }
        say!("");
        print_table(&table, checked.databases.len());
        for region in checked.regions.iter().filter(|_| resolve) {
            let prefixes = counted(region.prefixes.len(), "prefix", "prefixes");
            say!("\nregion {} ({}): {prefixes}", region.name, region.source);
            for prefix in &region.prefixes {
                say!("  {prefix}");
            }
        }
        print_drivers(checked.host.as_deref().unwrap_or_default());
        print_warnings(&checked.warnings);
        for error in &checked.errors {
            say!("error: {error}");
        }
    })?;
    Ok(failure_if(!checked.errors.is_empty()))
}

/// Returns why a start on this host would be refused.
fn refusals(bpffs: &Path, coverage: &Coverage) -> Vec<String> {
    let kernel = program::check_kernel(bpffs).err();
    let mut refusals: Vec<String> = kernel.iter().map(|error| format!("{error:#}")).collect();
    let ours = match pins::left_in_force(bpffs) {
        Ok(ours) => ours,
        // Our own program must not be taken for another's.
        Err(error) => {
            refusals.push(format!("{error:#}: run this as root"));
            return refusals;
        }
    };
    let others = coverage.present.iter();
    let others = others.filter(|interface| !ours.contains(&interface.index));
    let others = others.filter_map(|interface| links::check_free(interface).err());
    refusals.extend(others.map(|error| format!("{error:#}")));
    refusals
}

fn print_drivers(drivers: &[Driver]) {
    if drivers.is_empty() {
        return;
    }
    let mut table = table(["INTERFACE", "DRIVER", "NATIVE XDP", "MTU", "RX QUEUES"]);
    for driver in drivers {
        let native = match driver.native {
            Some(true) => "yes",
            Some(false) => "no",
            None => "unknown",
        };
        table.add_row([
            driver.interface.clone(),
            driver.driver.clone(),
            native.into(),
            driver.mtu.to_string(),
            driver.rx_queues.to_string(),
        ]);
    }
    say!("");
    print_table(&table, drivers.len());
    for driver in drivers {
        for note in &driver.notes {
            say!("{}: {note}", driver.interface);
        }
    }
}
