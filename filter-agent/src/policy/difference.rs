//! How one policy differs from another, line by line: `plan` must show every difference of meaning, not only those of
//! prefixes and ports. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Display,
    path::PathBuf,
    time::Duration,
};

use filter_common::Engine;

use crate::policy::{
    checked::{Database, FromFleet, Model, OnRemoval, Policy, Rule, Tls},
    duration::spelled,
    fleet::{Bounds, Fleet},
    region::{Guards, Region, RegionSource},
};

/// Everything that a policy says: of itself (`""`), of each region and of each database, by field.
type Settings = BTreeMap<String, BTreeMap<String, String>>;

/// Settings of a database that mean something only while TLS is forced.
const OF_FORCED_TLS: [&str; 4] = [
    "engine",
    "cancel_in_clear",
    "tls_unenforced",
    "proxy_protocol",
];

/// Lists the differences from `before` to `after`: `+ PLACE`, `- PLACE`, or `~ PLACE: OLD -> NEW`. Of a region or database
/// that one of them lacks only its name.
pub fn differences(before: &Policy, after: &Policy) -> Vec<String> {
    let secrets = after.regions.iter().filter_map(|(name, new)| {
        let old = &before.regions.get(name)?.source;
        let differ = *old != new.source && source(old) == source(&new.source);
        differ.then(|| format!("~ region {name}: the secrets of its URL"))
    });
    let mut lines: Vec<String> = secrets.collect();
    lines.extend(moves(before, after));
    let [before, after] = [before, after].map(settings);
    let of: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    for of in of {
        match (before.get(of), after.get(of)) {
            (Some(old), Some(new)) => {
                let fields: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
                // Of a database where TLS is no longer forced these say nothing, whatever the file has.
                let is_void = |field: &String| {
                    let forced = new.get("force_tls").is_none_or(|forced| forced == "true");
                    !forced && OF_FORCED_TLS.contains(&field.as_str())
                };
                let fields = fields.into_iter().filter(|field| !is_void(field));
                let changed = fields.filter_map(|field| {
                    let place = match of.as_str() {
                        "" => field.clone(),
                        of => format!("{of}: {field}"),
                    };
                    changed(&place, old.get(field), new.get(field))
                });
                lines.extend(changed);
            }
            (Some(_), None) => lines.push(format!("- {of}")),
            (None, _) => lines.push(format!("+ {of}")),
        }
    }
    lines
}

/// Lists the databases, rules and members of clusters that have another place among those that stay: of two that hold the
/// same prefix the first counts.
fn moves(before: &Policy, after: &Policy) -> Vec<String> {
    let place = |place: &str, (old, new): (usize, usize)| {
        format!("~ {place}: place {} -> {}", old + 1, new + 1)
    };
    let names = |policy: &Policy| -> Vec<String> {
        let names = policy.databases.iter().map(|database| &database.name);
        names.map(|name| format!("database {name}")).collect()
    };
    let databases = moved(&names(before), &names(after));
    let mut lines: Vec<String> = databases
        .into_iter()
        .map(|(database, places)| place(&database, places))
        .collect();
    for new in &after.databases {
        let is_same = |old: &&Database| old.name == new.name;
        let Some(old) = before.databases.iter().find(is_same) else {
            continue;
        };
        let [(old_rules, old_cluster), (new_rules, new_cluster)] = [old, new].map(|database| {
            let rules = named("rule", database.rules());
            (rules, named("cluster", &database.cluster))
        });
        let cluster = moved(&old_cluster, &new_cluster);
        for (of, places) in moved(&old_rules, &new_rules).into_iter().chain(cluster) {
            lines.push(place(&format!("database {}: {of}", new.name), places));
        }
    }
    lines
}

fn named(kind: &str, rules: &[Rule]) -> Vec<String> {
    let named = rules.iter().map(|rule| format!("{kind} {}", rule.source));
    named.collect()
}

/// Returns the fewest items that were moved, with their places before and after. The others have kept their order: they are
/// the longest such sequence.
fn moved(before: &[String], after: &[String]) -> Vec<(String, (usize, usize))> {
    let place = |items: &[String], item: &String| items.iter().position(|other| other == item);
    let stay = before.iter().enumerate();
    let stay: Vec<(usize, usize)> = stay
        .filter(|(old, item)| place(before, item) == Some(*old))
        .filter_map(|(old, item)| Some((old, place(after, item)?)))
        .collect();
    // For each item the length of the longest sequence that ends with it, and the item before it.
    let mut longest: Vec<(usize, Option<usize>)> = Vec::new();
    for (index, (_, new)) in stay.iter().enumerate() {
        let earlier = (0..index).filter(|&earlier| stay[earlier].1 < *new);
        let best = earlier.max_by_key(|&earlier| longest[earlier].0);
        longest.push((best.map_or(1, |best| longest[best].0 + 1), best));
    }
    let mut in_order = BTreeSet::new();
    let mut next = (0..stay.len()).max_by_key(|&index| longest[index].0);
    while let Some(index) = next {
        in_order.insert(index);
        next = longest[index].1;
    }
    let is_moved = |(index, _): &(usize, (usize, usize))| !in_order.contains(index);
    let moved = stay.into_iter().enumerate().filter(is_moved);
    moved
        .map(|(_, places)| (before[places.0].clone(), places))
        .collect()
}

fn changed(place: &str, old: Option<&String>, new: Option<&String>) -> Option<String> {
    let said = |value: &str| match value {
        "" => "nothing".to_owned(),
        value => value.to_owned(),
    };
    let with = |sign: &str, value: &str| match value {
        "" => format!("{sign} {place}"),
        value => format!("{sign} {place}: {value}"),
    };
    match (old, new) {
        (Some(old), Some(new)) => {
            (old != new).then(|| format!("~ {place}: {} -> {}", said(old), said(new)))
        }
        (Some(old), None) => Some(with("-", old)),
        (None, Some(new)) => Some(with("+", new)),
        (None, None) => None,
    }
}

// Each type is taken apart by all its fields: a new one that is left out here does not compile.

fn settings(policy: &Policy) -> Settings {
    let Policy {
        interfaces,
        ignored_interfaces,
        mode,
        modes,
        regions,
        regional_network,
        databases,
        unprotected,
        metrics,
        fleet,
    } = policy;
    let mut own = BTreeMap::new();
    let mut set = |field: &str, value: String| {
        own.insert(field.to_owned(), value);
    };
    set("interfaces", list(interfaces));
    set("ignore_interfaces", list(ignored_interfaces));
    set("mode", mode.to_string());
    set("regional_network", list(regional_network));
    set("unprotected", list(unprotected));
    set("metrics: listen", list(metrics));
    if let Some(fleet) = fleet {
        let Fleet {
            endpoints,
            ca_file,
            cert_file,
            key_file,
            host,
            frozen,
        } = fleet.as_ref();
        let path = |path: &Option<PathBuf>| list(path.iter().map(|path| path.display()));
        set("fleet: endpoints", list(endpoints));
        set("fleet: ca_file", path(ca_file));
        set("fleet: cert_file", path(cert_file));
        set("fleet: key_file", path(key_file));
        set("fleet: host", list(host));
        set("fleet: frozen", frozen.to_string());
    }
    for (entry, mode) in modes {
        set(&format!("interface {entry}: mode"), mode.to_string());
    }
    let mut settings = Settings::from([(String::new(), own)]);
    for (name, region) in regions {
        settings.insert(format!("region {name}"), of_region(region));
    }
    for database in databases {
        settings.insert(format!("database {}", database.name), of_database(database));
    }
    settings
}

fn of_region(region: &Region) -> BTreeMap<String, String> {
    let Region { source, guards } = region;
    let Guards {
        private,
        max_prefixes,
        allow_empty,
        shortest: [shortest4, shortest6],
        max_shrink,
        shrink_after,
        retire_after,
        max_age,
        min_refresh,
        max_refresh,
        timeout,
    } = guards;
    let or_never = |age: &Option<Duration>| age.map_or("never".into(), spelled);
    let settings = [
        ("source", self::source(source)),
        ("private", private.to_string()),
        ("max_prefixes", max_prefixes.to_string()),
        ("allow_empty", allow_empty.to_string()),
        ("shortest", format!("/{shortest4}, /{shortest6}")),
        ("max_shrink", format!("{max_shrink}%")),
        ("shrink_after", spelled(*shrink_after)),
        ("retire_after", spelled(*retire_after)),
        ("max_age", or_never(max_age)),
        ("min_refresh", spelled(*min_refresh)),
        ("max_refresh", spelled(*max_refresh)),
        ("timeout", spelled(*timeout)),
    ];
    settings.map(|(field, value)| (field.into(), value)).into()
}

/// All its fields, without the secrets of a URL.
fn source(source: &RegionSource) -> String {
    serde_json::to_string(source).unwrap_or_default()
}

fn of_database(database: &Database) -> BTreeMap<String, String> {
    let Database {
        name: _,
        protocol,
        ports,
        addresses,
        model,
        tls,
        monitor,
        on_removal,
        cluster,
        fleet,
    } = database;
    let mut settings = BTreeMap::new();
    let mut set = |field: &str, value: String| {
        settings.insert(field.to_owned(), value);
    };
    set("protocol", protocol.name().into());
    set("ports", list(ports));
    set("addresses", list(addresses));
    set("model", model.name().into());
    let monitors_tls = tls.as_ref().is_some_and(|tls| tls.monitor);
    set(
        "monitor",
        match (monitor, monitors_tls) {
            (true, _) => "true",
            (false, true) => "tls",
            (false, false) => "false",
        }
        .into(),
    );
    let on_removal = match on_removal {
        OnRemoval::Reset => "reset",
        OnRemoval::Keep => "keep",
    };
    set("on_removal", on_removal.into());
    set("force_tls", tls.is_some().to_string());
    if let Some(tls) = tls {
        let Tls {
            engine,
            cancel_in_clear,
            open_unenforced,
            monitor: _,
            proxied,
        } = tls;
        set("engine", spell(*engine).into());
        set("cancel_in_clear", cancel_in_clear.to_string());
        // A database that is only monitored stays open in any case.
        if !monitors_tls {
            let unenforced = if *open_unenforced { "allow" } else { "close" };
            set("tls_unenforced", unenforced.into());
        }
        if *proxied {
            set("proxy_protocol", "required".into());
        }
    }
    match model {
        Model::Dedicated { rules } => {
            for rule in rules {
                set(&format!("rule {}", rule.source), describe(rule));
            }
        }
        Model::Shared { internet } => set("internet", internet.to_string()),
    }
    for member in cluster {
        set(&format!("cluster {}", member.source), describe(member));
    }
    // The rules of its document are no setting of the policy.
    if let Some(FromFleet {
        bounds,
        rules: _,
        document: _,
    }) = fleet
    {
        let Bounds {
            widest: [widest4, widest6],
            within,
            regions,
        } = bounds;
        set("fleet: widest", format!("/{widest4}, /{widest6}"));
        let all = |texts: String, default: &str| match texts.is_empty() {
            true => default.to_owned(),
            false => texts,
        };
        set("fleet: within", all(list(within), "anywhere"));
        set(
            "fleet: regions",
            regions
                .as_ref()
                .map_or("all".into(), |names| all(list(names), "none")),
        );
    }
    settings
}

/// The label, the exceptions and the end of a rule: `"office", except 192.0.2.1/32, until 2026-12-31T18:00:00Z`.
fn describe(rule: &Rule) -> String {
    let Rule {
        source: _,
        except,
        label,
        expires,
    } = rule;
    let label = label.as_ref().map(|label| format!("{label:?}"));
    let expires = expires.map(|at| format!("until {at}"));
    let except = (!except.is_empty()).then(|| format!("except {}", list(except)));
    let said: Vec<String> = label.into_iter().chain(except).chain(expires).collect();
    said.join(", ")
}

fn spell(engine: Engine) -> &'static str {
    match engine {
        Engine::Postgresql => "postgresql",
        Engine::Mysql => "mysql",
        Engine::Redis => "redis",
        Engine::Mongodb => "mongodb",
        Engine::Other => "other",
    }
}

fn list<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    let items = items.into_iter().map(|item| item.to_string());
    items.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::parse;

    const BEFORE: &str = "interfaces: [eth0]
regions:
  office: {file: /etc/office.txt}
databases:
  - name: orders
    port: 5432
    engine: postgresql
    model: dedicated
    rules:
      - {cidr: 203.0.113.0/24, label: office}
      - {cidr: 198.51.100.0/24, expires: 2030-01-01T00:00:00Z}
";

    fn lines(from: &str, to: &str) -> Vec<String> {
        let [before, after] =
            [BEFORE, &BEFORE.replace(from, to)].map(|text| parse(text).unwrap().0);
        assert_eq!(differences(&before, &before), Vec::<String>::new());
        differences(&before, &after)
    }

    /// Fault D7: `plan` said that there is no difference.
    #[test]
    fn every_difference_of_meaning_is_a_line() {
        let cases = [
            (
                ", expires: 2030-01-01T00:00:00Z",
                "",
                "~ database orders: rule 198.51.100.0/24: until 2030-01-01T00:00:00Z -> nothing",
            ),
            (
                "expires: 2030",
                "expires: 2031",
                "~ database orders: rule 198.51.100.0/24: until 2030-01-01T00:00:00Z -> until 2031-01-01T00:00:00Z",
            ),
            (
                "label: office",
                "label: Lyon",
                "~ database orders: rule 203.0.113.0/24: \"office\" -> \"Lyon\"",
            ),
            (
                "label: office",
                "label: office, except: [203.0.113.66/32]",
                "~ database orders: rule 203.0.113.0/24: \"office\" -> \"office\", except 203.0.113.66/32",
            ),
            (
                "    rules:",
                "    on_removal: keep\n    rules:",
                "~ database orders: on_removal: reset -> keep",
            ),
            ("[eth0]", "[eth0]\nmode: native", "~ mode: auto -> native"),
            (
                "[eth0]",
                "[{name: eth0, mode: generic}]",
                "+ interface eth0: mode: generic",
            ),
            (
                "    rules:",
                "    cancel_in_clear: false\n    rules:",
                "~ database orders: cancel_in_clear: true -> false",
            ),
            (
                "    rules:",
                "    proxy_protocol: required\n    rules:",
                "+ database orders: proxy_protocol: required",
            ),
            (
                "office.txt}",
                "office.txt, max_age: 1h}",
                "~ region office: max_age: never -> 1h",
            ),
            (
                "office.txt}",
                "lyon.txt}",
                "~ region office: source: {\"file\":\"/etc/office.txt\"} -> {\"file\":\"/etc/lyon.txt\"}",
            ),
            (
                "databases:",
                "  new: {file: /etc/new.txt}\ndatabases:",
                "+ region new",
            ),
            (
                "file: /etc/office.txt",
                "url: 'https://a.test/?key=1', retire_after: 0s, max_shrink: 100%, min_refresh: 1s, max_refresh: 1m, \
                 timeout: 10s",
                "~ region office: source: {\"file\":\"/etc/office.txt\"} -> {\"url\":{\"url\":\"https://a.test/?...\",\
                 \"select\":{\"format\":\"text\"},\"insecure\":false,\"ca_file\":null}}",
            ),
            ("name: orders", "name: shop", "- database orders"),
            (
                "    rules:",
                "    cluster: [{cidr: 10.0.0.1/32, label: replica}]\n    rules:",
                "+ database orders: cluster 10.0.0.1/32: \"replica\"",
            ),
        ];
        let with = |key: u8| {
            BEFORE.replace(
                "file: /etc/office.txt",
                &format!("url: 'https://a.test/?key={key}'"),
            )
        };
        let [one, two] = [1, 2].map(|key| parse(&with(key)).unwrap().0);
        assert_eq!(
            differences(&one, &two),
            ["~ region office: the secrets of its URL"]
        );
        for (from, to, expected) in cases {
            let lines = lines(from, to);
            assert_eq!(lines[0], expected, "{lines:#?}");
            let more = usize::from(to.contains("shop"));
            assert_eq!(lines.len(), 1 + more, "{lines:#?}");
        }
    }

    /// `+ proxy_protocol` stood there, although no PROXY header is required.
    #[test]
    fn forcing_tls_lists_only_what_is_set() {
        let clear = BEFORE.replace("    engine: postgresql", "    force_tls: false");
        let [before, after] = [clear.as_str(), BEFORE].map(|text| parse(text).unwrap().0);
        assert_eq!(
            differences(&before, &after),
            [
                "+ database orders: cancel_in_clear: true",
                "+ database orders: engine: postgresql",
                "~ database orders: force_tls: false -> true",
                "+ database orders: tls_unenforced: close",
            ]
        );
    }

    /// `plan` said that there is no difference, although `explain` and `rules` name another rule.
    #[test]
    fn rules_and_databases_that_are_moved_are_a_line_each() {
        let rule = |n: u8| format!("      - {{cidr: 192.0.2.{n}/32}}\n");
        let database = |name: &str, port: u8, rules: &[u8]| {
            let rules: String = rules.iter().map(|&n| rule(n)).collect();
            format!(
                "  - name: {name}\n    port: {port}\n    model: dedicated\n    force_tls: false\n    cluster: \
                 [10.0.0.1/32, 10.0.0.2/32]\n    rules:\n{rules}"
            )
        };
        let policy = |databases: [String; 2]| {
            let text = format!("interfaces: [eth0]\ndatabases:\n{}", databases.concat());
            parse(&text).unwrap().0
        };
        let [a, b] = [database("a", 1, &[1, 2, 3, 4]), database("b", 2, &[1])];
        let before = policy([a.clone(), b.clone()]);
        let after = |rules: &[u8]| policy([database("a", 1, rules), b.clone()]);
        assert_eq!(
            differences(&before, &after(&[4, 1, 2, 3])),
            ["~ database a: rule 192.0.2.4/32: place 4 -> 1"]
        );
        assert_eq!(
            differences(&before, &after(&[2, 1, 3, 4])).len(),
            1,
            "two that changed places"
        );
        // Those after one that is gone, or new, were not moved.
        assert_eq!(
            differences(&before, &after(&[9, 2, 3, 4])),
            [
                "- database a: rule 192.0.2.1/32",
                "+ database a: rule 192.0.2.9/32"
            ]
        );
        let cluster = a.replace("10.0.0.1/32, 10.0.0.2/32", "10.0.0.2/32, 10.0.0.1/32");
        let lines = differences(&before, &policy([cluster, b.clone()]));
        assert!(
            lines.len() == 1 && lines[0].contains("cluster 10.0.0."),
            "{lines:?}"
        );
        let lines = differences(&before, &policy([b, a]));
        assert!(lines.len() == 1 && lines[0].contains("place "), "{lines:?}");
    }

    #[test]
    fn end_of_forced_tls_removes_nothing_that_the_file_still_has() {
        let lines = lines("    rules:", "    force_tls: false\n    rules:");
        assert_eq!(lines, ["~ database orders: force_tls: true -> false"]);
    }

    /// Fault D7, field by field.
    #[test]
    fn every_field_that_changes_is_named() {
        let region = |field: &str| ("office.txt}", format!("office.txt, {field}}}"));
        let database = |field: &str| ("    rules:", format!("    {field}\n    rules:"));
        let cases = [
            (("[eth0]", "[eth0, eth1]".to_owned()), "~ interfaces: "),
            (
                ("[eth0]", "[eth0]\nignore_interfaces: [veth*]".into()),
                "~ ignore_interfaces: ",
            ),
            (
                ("[eth0]", "[eth0]\nregional_network: [10.0.0.0/8]".into()),
                "~ regional_network: ",
            ),
            (
                ("[eth0]", "[eth0]\nunprotected: [shop]".into()),
                "~ unprotected: ",
            ),
            (
                (
                    "[eth0]",
                    "[eth0]\nmetrics: {listen: '127.0.0.1:9464'}".into(),
                ),
                "~ metrics: listen: ",
            ),
            (region("private: true"), "~ region office: private"),
            (region("max_prefixes: 10"), "~ region office: max_prefixes"),
            (region("allow_empty: true"), "~ region office: allow_empty"),
            (region("shortest: [/6, /16]"), "~ region office: shortest"),
            (region("max_shrink: 10%"), "~ region office: max_shrink"),
            (region("shrink_after: 7m"), "~ region office: shrink_after"),
            (region("retire_after: 7m"), "~ region office: retire_after"),
            (region("min_refresh: 7s"), "~ region office: min_refresh"),
            (region("max_refresh: 7h"), "~ region office: max_refresh"),
            (region("timeout: 7s"), "~ region office: timeout"),
            (
                ("port: 5432", "port: 5433".into()),
                "~ database orders: ports",
            ),
            (
                database("addresses: [10.0.0.1]"),
                "~ database orders: addresses",
            ),
            (database("monitor: true"), "~ database orders: monitor: "),
            (
                database("monitor: tls"),
                "~ database orders: monitor: false -> tls",
            ),
            (
                database("tls_unenforced: allow"),
                "~ database orders: tls_unenforced",
            ),
            (
                ("engine: postgresql", "engine: mysql".into()),
                "~ database orders: engine",
            ),
        ];
        for ((from, to), expected) in cases {
            let lines = lines(from, &to);
            assert!(
                lines.iter().any(|line| line.starts_with(expected)),
                "{expected}: {lines:#?}"
            );
        }
    }

    #[test]
    fn every_field_of_the_fleet_that_changes_is_named() {
        let fleet = "fleet: {endpoints: ['http://127.0.0.1:2379'], insecure: true}\ndatabases:";
        let base = BEFORE.replace("databases:", fleet);
        let base = base.replace("    rules:", "    fleet: true\n    rules:");
        let lines = |from: &str, to: &str| {
            assert!(base.contains(from), "{from}");
            let [before, after] =
                [&base, &base.replace(from, to)].map(|text| parse(text).unwrap().0);
            differences(&before, &after)
        };
        let files = "'https://127.0.0.1:2379'], ca_file: /a, cert_file: /b, key_file: /c";
        let cases = [
            (
                "insecure: true}",
                "insecure: true, host: db7}",
                "~ fleet: host: nothing -> db7",
            ),
            (
                "insecure: true}",
                "insecure: true, frozen: true}",
                "~ fleet: frozen: false -> true",
            ),
            (
                "'http://127.0.0.1:2379']",
                files,
                "~ fleet: ca_file: nothing -> /a\n~ fleet: cert_file: nothing -> /b\n~ fleet: endpoints: \
                 http://127.0.0.1:2379 -> https://127.0.0.1:2379\n~ fleet: key_file: nothing -> /c",
            ),
            (
                "fleet: true",
                "fleet: {widest: [/0, /48]}",
                "~ database orders: fleet: widest: /8, /16 -> /0, /48",
            ),
            (
                "fleet: true",
                "fleet: {within: [203.0.113.0/24]}",
                "~ database orders: fleet: within: anywhere -> 203.0.113.0/24",
            ),
            (
                "fleet: true",
                "fleet: {regions: []}",
                "~ database orders: fleet: regions: all -> none",
            ),
            (
                "fleet: true",
                "fleet: {regions: [office]}",
                "~ database orders: fleet: regions: all -> office",
            ),
            (
                "fleet: true",
                "fleet: false",
                "- database orders: fleet: regions: all\n- database orders: fleet: widest: /8, /16\n\
                 - database orders: fleet: within: anywhere",
            ),
        ];
        for (from, to, expected) in cases {
            assert_eq!(lines(from, to).join("\n"), expected);
        }
    }
}
