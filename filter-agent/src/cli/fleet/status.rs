//! `fleet status`: whether every host enforces what was written, and waiting for it.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use jiff::Timestamp;
use serde::Serialize;

use crate::{
    cli::output::{end_with_the_reader, print_raw, print_table, table},
    etcd::client::{Client, Overview},
    fleet::host_status::HostStatus,
    policy::{self, check_within},
    report::FleetState,
    text::{list, one_line},
};

/// Pause between two looks while one waits.
const PAUSE: Duration = Duration::from_millis(200);

/// Longest reason of a refusal, in characters.
const MAX_REFUSAL: usize = 300;

/// Versions of etcd from which on its rights are a boundary: of 3.6, and of 3.7 and later.
const SOUND: [(u64, u64, u64); 2] = [(3, 6, 14), (3, 7, 1)];

/// The state of a database in the fleet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub(super) enum Goal {
    /// There is no document: hosts enforce the rules of their policies alone.
    None,
    Active,
    /// No host that has the database is there.
    Silent,
    Pending,
    Failed,
}

impl Goal {
    fn name(self) -> &'static str {
        match self {
            Self::None => "NONE",
            Self::Active => "ACTIVE",
            Self::Silent => "SILENT",
            Self::Pending => "PENDING",
            Self::Failed => "FAILED",
        }
    }
}

#[derive(Debug, Serialize)]
pub(super) struct Database {
    database: String,
    /// etcd's revision of the document.
    revision: Option<i64>,
    state: Goal,
    hosts: usize,
    /// Hosts that enforce that revision.
    active: usize,
    /// Hosts that do not enforce it yet.
    pending: Vec<String>,
    /// Hosts that are not there: what they enforce is not known.
    silent: Vec<String>,
    /// The longest that a host took, from etcd's announcement on, in milliseconds.
    slowest_ms: Option<f64>,
    /// Why hosts do not enforce it, by their names.
    errors: BTreeMap<String, String>,
    /// Hosts that enforce other rules of the document for a time.
    rollout: Option<Rollout>,
}

#[derive(Debug, Serialize)]
struct Rollout {
    on: Vec<String>,
    until: Timestamp,
}

#[derive(Debug, Serialize)]
pub(super) struct Fleet {
    pub(super) databases: Vec<Database>,
    /// Hosts that do not believe etcd.
    holding: Vec<String>,
    /// Hosts whose reports are of another etcd, or of before a restore.
    elsewhere: Vec<String>,
    /// Hosts whose reports cannot be read: what they enforce is not known.
    unreadable: Vec<String>,
}

impl Fleet {
    /// `only`: the database that is asked for.
    pub(super) fn of(overview: &Overview, only: Option<&str>) -> Self {
        let named = overview.reports();
        let named = named.flat_map(|(_, status)| status.databases.keys());
        let mut names: Vec<&String> = overview.documents.keys().chain(named).collect();
        names.sort_unstable();
        names.dedup();
        names.retain(|name| only.is_none_or(|only| only == *name));
        let is_holding = |(host, status): &(&String, &HostStatus)| {
            let is_of_now = !overview.is_of_earlier_era(status);
            status.is_holding() && is_of_now && overview.is_alive(host, status)
        };
        let holding = overview.reports().filter(is_holding);
        let elsewhere = overview.reports();
        let elsewhere = elsewhere.filter(|(_, status)| overview.is_elsewhere(status));
        let elsewhere = elsewhere.filter(|(host, _)| overview.alive.contains_key(*host));
        // One that is there and has no report, too.
        let unreadable: BTreeSet<&String> =
            overview.hosts.keys().chain(overview.alive.keys()).collect();
        let unreadable = unreadable
            .into_iter()
            .filter(|host| overview.report(host).is_none());
        Self {
            unreadable: unreadable.cloned().collect(),
            holding: holding.map(|(name, _)| name.clone()).collect(),
            elsewhere: elsewhere.map(|(name, _)| name.clone()).collect(),
            databases: names
                .into_iter()
                .map(|name| database(name, overview))
                .collect(),
        }
    }

    /// The worst of all, and whether hosts are silent, or say what cannot be read.
    fn exit(&self) -> u8 {
        let states = self.databases.iter().map(|database| database.state);
        let is_silent = self.databases.iter().any(|it| !it.silent.is_empty());
        match states.max() {
            Some(Goal::Failed) => 1,
            Some(Goal::Pending) => 4,
            _ if is_silent || !self.unreadable.is_empty() => 3,
            _ => 0,
        }
    }

    fn print(&self) {
        let header = [
            "DATABASE", "REVISION", "STATE", "HOSTS", "ACTIVE", "SILENT", "SLOWEST",
        ];
        let mut rows = table(header);
        for database in &self.databases {
            rows.add_row([
                database.database.clone(),
                database
                    .revision
                    .map_or("-".into(), |revision| revision.to_string()),
                database.state.name().into(),
                database.hosts.to_string(),
                database.active.to_string(),
                database.silent.len().to_string(),
                database
                    .slowest_ms
                    .map_or("-".into(), |ms| format!("{ms:.1} ms")),
            ]);
        }
        print_table(&rows, self.databases.len());
        if !self.holding.is_empty() {
            say!(
                "not believing etcd: {}; where it was restored: filter-agent fleet recover",
                list(self.holding.iter())
            );
        }
        if !self.elsewhere.is_empty() {
            say!(
                "reported to another etcd, or before this one was restored: {}",
                list(self.elsewhere.iter())
            );
        }
        if !self.unreadable.is_empty() {
            say!(
                "no report that can be read: {}",
                list(self.unreadable.iter())
            );
        }
        for database in &self.databases {
            let name = &database.database;
            for (host, error) in &database.errors {
                say!("{name} on {host}: {error}");
            }
            if !database.pending.is_empty() {
                say!("{name}: not yet on {}", list(database.pending.iter()));
            }
            if database.state == Goal::Pending && database.hosts == 0 {
                say!("{name}: no host has reported it");
            }
            if !database.silent.is_empty() {
                say!("{name}: silent: {}", list(database.silent.iter()));
            }
            if let Some(rollout) = &database.rollout {
                let on = list(rollout.on.iter());
                say!(
                    "{name}: rollout on {on} until {}: promote or abort it",
                    rollout.until
                );
            }
        }
    }
}

fn database(name: &str, overview: &Overview) -> Database {
    let revision = overview.documents.get(name).copied();
    // One whose time is over counts as not written.
    let rollout = overview.rollouts.get(name);
    let rollout = rollout.filter(|rollout| rollout.until > Timestamp::now());
    let mut found = Database {
        database: name.into(),
        revision,
        state: Goal::None,
        hosts: 0,
        active: 0,
        pending: Vec::new(),
        silent: Vec::new(),
        slowest_ms: None,
        errors: BTreeMap::new(),
        rollout: rollout.map(|rollout| Rollout {
            on: rollout.on.iter().cloned().collect(),
            until: rollout.until,
        }),
    };
    for (host, status) in overview.reports() {
        let Some(reported) = status.databases.get(name) else {
            continue;
        };
        found.hosts += 1;
        // The last report of a host that is away says nothing of now.
        if !overview.is_alive(host, status) {
            found.silent.push(host.clone());
            continue;
        }
        // Its error is about something earlier.
        if overview.is_earlier(status, reported, revision) {
            found.pending.push(host.clone());
            continue;
        }
        // No document was ever there: the policy's own rules are what is meant.
        if revision.is_none()
            && reported.enforced.is_none()
            && reported.state == FleetState::Missing
        {
            continue;
        }
        if let Some(error) = &reported.error {
            found.errors.insert(host.clone(), error.clone());
        } else if revision.is_some() && reported.enforced == revision {
            found.active += 1;
            let slowest = found.slowest_ms.unwrap_or_default();
            found.slowest_ms = reported
                .enforced_ms
                .map(|ms| ms.max(slowest))
                .or(found.slowest_ms);
        } else {
            found.pending.push(host.clone());
        }
    }
    found.state = if !found.errors.is_empty() {
        Goal::Failed
    } else if !found.pending.is_empty() {
        Goal::Pending
    } else if revision.is_none() {
        Goal::None
    // Of no host it is not known that it enforces anything.
    } else if found.hosts == 0 {
        Goal::Pending
    } else if found.active == 0 {
        Goal::Silent
    } else {
        Goal::Active
    };
    found
}

/// Prints the state of each database. `wait`: at most so long, until every host that is there enforces or refuses it.
pub(super) async fn status(
    client: &mut Client,
    only: Option<&str>,
    wait: Option<Duration>,
    json: bool,
) -> Result<ExitCode> {
    let deadline = Instant::now() + wait.unwrap_or_default();
    let fleet = loop {
        let fleet = Fleet::of(&client.overview().await?, only);
        if let Some(only) = only.filter(|_| fleet.databases.is_empty()) {
            bail!(
                "etcd has no document of {only}, and no host has reported a database of that name"
            );
        }
        let is_pending = fleet.databases.iter().any(|it| it.state == Goal::Pending);
        if !is_pending || Instant::now() >= deadline {
            break fleet;
        }
        tokio::time::sleep(PAUSE).await;
    };
    end_with_the_reader()?;
    match json {
        true => print_raw(&serde_json::to_string_pretty(&fleet)?),
        false => {
            fleet.print();
            if let Ok(version) = client.version().await
                && !is_sound(&version)
            {
                say!(
                    "warning: etcd {version}: who may write one key may take over all of it, before 3.6.14 and 3.7.1"
                );
            }
        }
    }
    Ok(ExitCode::from(fleet.exit()))
}

/// Whether the rights of this version hold.
fn is_sound(version: &str) -> bool {
    let mut numbers = version.split(['.', '-']).map(|part| part.parse().ok());
    let mut next = || numbers.next().flatten();
    let (Some(major), Some(minor), Some(patch)) = (next(), next(), next()) else {
        return true;
    };
    let version: (u64, u64, u64) = (major, minor, patch);
    let [of_36, of_37] = SOUND;
    version >= of_37 || version >= of_36 && (major, minor) == (3, 6)
}

/// The hosts that would refuse a document, and why.
pub(super) fn refusals(overview: &Overview, database: &str, text: &str) -> Vec<String> {
    let refusal = |(host, status): (&String, &HostStatus)| {
        let reported = status.databases.get(database)?;
        let bounds = reported.bounds.as_ref()?;
        let [widest4, widest6] = &bounds.widest;
        let length = |text: &String| text.trim_start_matches('/').parse().ok();
        let within = policy::Bounds {
            widest: [length(widest4)?, length(widest6)?],
            within: bounds.within.clone(),
            regions: Some(bounds.regions.clone()),
        };
        let error = check_within(text.as_bytes(), within, bounds.floor).err()?;
        // It names what the host reported.
        Some(one_line(
            &format!("{host} would refuse it: {error}"),
            MAX_REFUSAL,
        ))
    };
    overview.reports().filter_map(refusal).collect()
}

/// Says which hosts that are there do not believe what etcd has of a database.
pub(super) fn held(overview: &Overview, database: &str) -> Option<String> {
    let is_held = |(host, status): &(&String, &HostStatus)| {
        let reported = status.databases.get(database);
        reported.is_some_and(|it| it.state == FleetState::Held)
            && overview.is_alive(host, status)
            && !overview.is_of_earlier_era(status)
    };
    let held = overview.reports().filter(is_held);
    let held: Vec<_> = held.map(|(host, _)| host).collect();
    let verb = if held.len() == 1 { "does" } else { "do" };
    (!held.is_empty()).then(|| {
        format!(
            "{} {verb} not believe etcd: `filter-agent fleet status` says why; where etcd was restored, `fleet recover` has it \
             believed again",
            list(held.into_iter())
        )
    })
}

/// Says which hosts have reported a database to another etcd, and not to this one.
pub(super) fn elsewhere(overview: &Overview, database: &str) -> Option<String> {
    let is_elsewhere = |(host, status): &(&String, &HostStatus)| {
        overview.is_alive(host, status)
            && status.databases.contains_key(database)
            && overview.is_elsewhere(status)
            && !overview.is_of_earlier_era(status)
    };
    let hosts = overview.reports().filter(is_elsewhere);
    let hosts: Vec<_> = hosts.map(|(host, _)| host).collect();
    (!hosts.is_empty()).then(|| {
        let hosts = list(hosts.into_iter());
        format!("{hosts} reported to another etcd, or before this one was restored: what is in force there is not known")
    })
}

/// Says which hosts enforce another document than etcd's, which does not follow from it: etcd has none, none that can be
/// read (`is_readable`), or one that they refuse.
pub(super) fn lost(overview: &Overview, database: &str, is_readable: bool) -> Option<String> {
    let revision = overview.documents.get(database).copied();
    let enforced = |(host, status)| {
        let status: &HostStatus = status;
        let reported = status.databases.get(database)?;
        let is_of_now = || !overview.is_earlier(status, reported, revision);
        let is_lost = !is_readable || reported.state == FleetState::Refused && is_of_now();
        Some((host, reported.enforced.filter(|_| is_lost)?))
    };
    let (hosts, revisions): (Vec<_>, BTreeSet<_>) = overview.reports().filter_map(enforced).unzip();
    (!hosts.is_empty()).then(|| {
        let verb = if hosts.len() == 1 {
            "enforces"
        } else {
            "enforce"
        };
        let hosts = list(hosts.into_iter());
        let revisions = list(revisions.into_iter());
        format!(
            "{hosts} still {verb} rules of a document that is gone, broken or followed by one that is refused, as of revision \
             {revisions}: those that are not in the new one would end"
        )
    })
}

/// Says that no host has reported the database, or which hosts of a rollout have not.
pub(super) fn unknown(
    overview: &Overview,
    database: &str,
    on: Option<&BTreeSet<String>>,
) -> Vec<String> {
    let has_it = |status: &HostStatus| status.databases.contains_key(database);
    let mut hosts = overview.reports().map(|(_, status)| status).peekable();
    let mut unknown = Vec::new();
    // A new fleet may have documents before it has hosts.
    if hosts.peek().is_some() && !hosts.any(has_it) {
        let names = overview.reports();
        let names = names.flat_map(|(_, status)| status.databases.keys());
        let names: BTreeSet<_> = names.collect();
        let names = list(names.into_iter());
        let text = format!("no host has a database {database} (they have {names})");
        unknown.push(one_line(&text, MAX_REFUSAL));
    }
    let is_strange = |host: &&String| !overview.report(host).is_some_and(has_it);
    let strange: Vec<_> = on.into_iter().flatten().filter(is_strange).collect();
    if !strange.is_empty() {
        let names = list(strange.into_iter());
        unknown.push(format!(
            "no host {names} has reported the database {database}"
        ));
    }
    unknown
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn host(enforced: i64, error: Option<&str>) -> Vec<u8> {
        let status = json!({
            "agent": "0.1.0", "boot": "life", "era": 0, "revision": 9, "at": "2027-01-01T00:00:00Z",
            "databases": {"orders": {
                "seen": 9, "enforced": enforced, "sha256": null, "error": error, "enforced_ms": 3.1, "rules": 2, "temporary": 0,
                "state": if error.is_some() { "refused" } else { "active" },
                "bounds": {"widest": ["/16", "/48"], "within": ["203.0.113.0/24"], "regions": ["osc-fr1"], "floor": 29},
            }},
        });
        status.to_string().into_bytes()
    }

    fn overview(hosts: &[(&str, Vec<u8>, bool)]) -> Overview {
        let alive = hosts.iter().filter(|(_, _, alive)| *alive);
        Overview {
            documents: [("orders".into(), 9)].into(),
            alive: alive
                .map(|(name, ..)| ((*name).into(), "life".into()))
                .collect(),
            hosts: hosts
                .iter()
                .map(|(name, text, _)| ((*name).into(), HostStatus::read(text)))
                .collect(),
            ..Overview::default()
        }
    }

    fn exit(hosts: &[(&str, Vec<u8>, bool)]) -> (Goal, u8) {
        let fleet = Fleet::of(&overview(hosts), None);
        (fleet.databases[0].state, fleet.exit())
    }

    #[test]
    fn silent_host_is_never_counted_as_converged() {
        let (done, late) = (host(9, None), host(8, None));
        assert_eq!(exit(&[("db7", done.clone(), true)]), (Goal::Active, 0));
        assert_eq!(exit(&[("db7", late.clone(), true)]), (Goal::Pending, 4));
        assert_eq!(exit(&[]), (Goal::Pending, 4));
        // Its error is of the document before.
        let mut behind: serde_json::Value =
            serde_json::from_slice(&host(7, Some("line 3"))).unwrap();
        behind["databases"]["orders"]["seen"] = 8.into();
        let behind = behind.to_string().into_bytes();
        assert_eq!(exit(&[("db7", behind, true)]), (Goal::Pending, 4));
        let silent = [("db7", done.clone(), true), ("db8", done.clone(), false)];
        assert_eq!(exit(&silent), (Goal::Active, 3));
        assert_eq!(exit(&silent[1..]), (Goal::Silent, 3));
        let failed = [("db7", host(8, Some("line 3")), true), ("db8", late, true)];
        assert_eq!(exit(&failed), (Goal::Failed, 1));
        let garbled = [("db7", done.clone(), true), ("db8", b"{".to_vec(), true)];
        assert_eq!(exit(&garbled), (Goal::Active, 3));
        let mut mute = overview(&[("db7", done.clone(), true)]);
        mute.alive.insert("db8".into(), "life".into());
        assert_eq!(Fleet::of(&mute, None).exit(), 3);
        // There is no document, and there was none.
        let mut without: serde_json::Value = serde_json::from_slice(&host(9, None)).unwrap();
        let orders = &mut without["databases"]["orders"];
        orders["enforced"] = json!(null);
        orders["seen"] = json!(null);
        orders["state"] = json!("missing");
        orders["error"] = json!("there is no document");
        let mut none = overview(&[("db7", without.to_string().into_bytes(), true)]);
        none.documents.clear();
        let exit_of_none = |none: &Overview| {
            let none = Fleet::of(none, None);
            (none.databases[0].state, none.exit())
        };
        assert_eq!(exit_of_none(&none), (Goal::None, 0));
        // It has not reported since the era was raised.
        none.era = 1;
        assert_eq!(exit_of_none(&none), (Goal::Pending, 4));
        // Another life than the one that reported.
        let mut reborn = overview(&[("db7", done, true)]);
        reborn.alive.insert("db7".into(), "another".into());
        assert_eq!(Fleet::of(&reborn, None).exit(), 3);
    }

    #[test]
    fn what_was_reported_to_another_etcd_or_before_the_era_was_raised_is_not_of_now() {
        let why = Some("another etcd answers");
        let (ours, other) = (Some("0000000000000007"), Some("0000000000000006"));
        for (error, era, cluster, expected) in [
            (None, 1, ours, (Goal::Pending, false, false)),
            (None, 2, ours, (Goal::Active, false, false)),
            // Of an agent that does not report it.
            (None, 2, None, (Goal::Active, false, false)),
            (None, 2, other, (Goal::Pending, false, true)),
            (why, 1, ours, (Goal::Pending, false, false)),
            (why, 2, ours, (Goal::Failed, true, false)),
            // It does not believe this etcd, and has the mark of the one before.
            (why, 2, other, (Goal::Failed, true, false)),
        ] {
            let mut report: serde_json::Value = serde_json::from_slice(&host(9, error)).unwrap();
            report["era"] = era.into();
            report["cluster"] = cluster.into();
            let report = report.to_string().replace("refused", "held");
            let mut overview = overview(&[("db7", report.into_bytes(), true)]);
            overview.cluster = 7.into();
            overview.era = 2;
            let fleet = Fleet::of(&overview, None);
            let state = fleet.databases[0].state;
            let doubts = [held(&overview, "orders"), elsewhere(&overview, "orders")];
            let [is_held, is_elsewhere] = doubts.map(|doubt| doubt.is_some());
            assert_eq!(
                (state, is_held, is_elsewhere),
                expected,
                "{error:?} {era} {cluster:?}"
            );
            assert_eq!(fleet.holding.is_empty(), !is_held);
            overview.alive.clear();
            assert_eq!(elsewhere(&overview, "orders"), None);
            assert_eq!(Fleet::of(&overview, None).holding, [""; 0]);
        }
    }

    #[test]
    fn rules_of_an_earlier_document_are_missed_where_it_is_gone_or_a_present_one_is_refused() {
        let refused = |revision| {
            let mut overview = overview(&[("db7", host(8, Some("line 3")), true)]);
            overview.documents = [("orders".into(), revision)].into();
            overview
        };
        let told = lost(&refused(9), "orders", true).unwrap();
        assert!(told.starts_with("db7 still enforces") && told.contains("revision 8"));
        // Its report is of a document before, which it refused.
        assert_eq!(lost(&refused(10), "orders", true), None);
        assert!(lost(&refused(10), "orders", false).is_some());
        let good = overview(&[("db7", host(9, None), true)]);
        assert_eq!(lost(&good, "orders", true), None);
    }

    #[test]
    fn hosts_that_would_refuse_a_document_are_named() {
        let overview = overview(&[("db7", host(9, None), true)]);
        for (text, expected) in [
            ("rules: [{cidr: 203.0.1.0/16}]", "host bits"),
            ("rules: [{cidr: 203.0.0.0/12}]", "wider than /16"),
            ("rules: [{cidr: 192.0.2.0/24}]", "not inside"),
            ("rules: [{region: elsewhere}]", "elsewhere"),
            (
                "rules: [{cidr: 203.0.113.0/25}, {region: osc-fr1}]",
                "at most 30",
            ),
        ] {
            let refused = refusals(&overview, "orders", text);
            assert!(
                refused[0].starts_with("db7 would refuse it: "),
                "{refused:?}"
            );
            assert!(refused[0].contains(expected), "{refused:?}");
        }
        assert!(refusals(&overview, "orders", "rules: [{cidr: 203.0.113.0/25}]").is_empty());
        assert!(refusals(&overview, "billing", "rules: [{cidr: 192.0.2.0/24}]").is_empty());
        let mut report: serde_json::Value = serde_json::from_slice(&host(9, None)).unwrap();
        report["databases"]["orders"]["bounds"]["floor"] = usize::MAX.into();
        let overview = self::overview(&[("db7", report.to_string().into_bytes(), true)]);
        let refused = refusals(&overview, "orders", "rules: [{cidr: 203.0.113.0/25}]");
        assert!(refused[0].contains("at most 30"), "{refused:?}");
    }

    #[test]
    fn what_hosts_report_is_named_in_one_short_line() {
        let mut report: serde_json::Value = serde_json::from_slice(&host(9, None)).unwrap();
        let orders = report["databases"]["orders"].clone();
        report["databases"]["orders"]["bounds"]["regions"] = json!(["\u{1b}[2J\nof a host"]);
        report["databases"]["orders"]["bounds"]["within"] = json!(vec!["203.0.113.0/24"; 40]);
        for n in 0..100 {
            report["databases"][format!("database-{n}")] = orders.clone();
        }
        let overview = overview(&[("db7", report.to_string().into_bytes(), true)]);
        let refused = ["{region: elsewhere}", "{cidr: 192.0.2.0/24}"];
        let refused =
            refused.map(|rule| refusals(&overview, "orders", &format!("rules: [{rule}]")));
        let unknown = unknown(&overview, "billing", None);
        for line in refused.iter().flatten().chain(&unknown) {
            assert!(!line.contains(char::is_control), "{line:?}");
            assert!(line.chars().count() <= MAX_REFUSAL, "{line}");
        }
        assert!(refused.iter().all(|lines| lines.len() == 1) && unknown.len() == 1);
    }

    #[test]
    fn versions_whose_rights_hold_are_known() {
        for (version, sound) in [
            ("3.4.23", false),
            ("3.5.33", false),
            ("3.6.13", false),
            ("3.6.14", true),
            ("3.7.0", false),
            ("3.7.1", true),
            ("3.8.0-rc.1", true),
            ("4.0.0", true),
        ] {
            assert_eq!(is_sound(version), sound, "{version}");
        }
    }
}
