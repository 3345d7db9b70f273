//! `docs/metrics.md` describes each metric, and no other; promtool has nothing to say about them; and the largest policy
//! stays within the bounds that the page names.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write as _,
    net::SocketAddr,
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use filter_tests::net::{Net, dedicated, policy, wait_until};

use crate::text::{Scrape, get};

const LISTEN: &str = "127.0.0.1:9464";

/// A metric's type and labels.
type Kind = (String, BTreeSet<String>);

fn page() -> String {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md");
    fs::read_to_string(page).unwrap()
}

fn documented() -> BTreeMap<String, Kind> {
    let page = page();
    let rows = page.lines().filter_map(|line| {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let name = cells.get(1)?.strip_prefix('`')?.strip_suffix('`')?;
        let of_type = cells
            .get(2)
            .filter(|cell| ["counter", "gauge", "histogram"].contains(cell))?;
        let labels = cells[3].split('`').skip(1).step_by(2).map(str::to_owned);
        Some((name.to_owned(), ((*of_type).to_owned(), labels.collect())))
    });
    rows.collect()
}

fn served(text: &str) -> BTreeMap<String, Kind> {
    let mut served: BTreeMap<String, Kind> = BTreeMap::new();
    let mut last = String::new();
    for line in text.lines() {
        if let Some(family) = line.strip_prefix("# TYPE ") {
            let (name, of_type) = family.split_once(' ').unwrap();
            last = name.to_owned();
            served.insert(last.clone(), (of_type.to_owned(), BTreeSet::new()));
        } else if let Some((_, labels)) = line.split_once('{') {
            let (labels, _) = labels.rsplit_once('}').unwrap();
            let names = labels
                .split(',')
                .map(|label| label.split('=').next().unwrap());
            let (_, found) = served.get_mut(&last).unwrap();
            found.extend(names.filter(|&name| name != "le").map(str::to_owned));
        }
    }
    served
}

/// A network whose agent has a series of every metric.
fn complete(name: &str) -> (Net, SocketAddr) {
    let mut net = Net::new(name);
    let office = net.dir().join("office.txt");
    fs::write(&office, "192.0.2.0/25\n").unwrap();
    let orders = dedicated("orders", 5432, &["203.0.113.10/32"], "");
    let orders = orders.replace("rules: [", "fleet: true, rules: [{region: office}, ");
    let bank = dedicated("bank", 5433, &["203.0.113.10/32"], "");
    let bank = bank.replace("force_tls: false", "force_tls: true");
    let policy = policy("eth0", "native", &[orders, bank]);
    net.write_policy(&format!(
        "metrics: {{listen: '{LISTEN}'}}\nfleet: {{endpoints: ['http://127.0.0.1:9'], insecure: true}}\nregions:\n  office: \
         {{file: {}}}\n{policy}",
        office.display()
    ));
    net.start();
    net.wait_for_line("metrics on ");
    net.agent_text(&["allow", "orders", "192.0.2.200", "--for", "2h"]);
    let next = net.dir().join("office.next");
    fs::write(&next, "192.0.2.0/26\n198.51.100.128/25\n").unwrap();
    fs::rename(next, office).unwrap();
    net.wait_for_line("region office: ");
    net.agent_text(&["reload", "--confirm", "10m"]);
    (net, LISTEN.parse().unwrap())
}

#[test]
fn page_describes_every_metric_and_promtool_finds_no_fault() {
    let (net, address) = complete("metrics-page");
    let mut text = String::new();
    assert!(wait_until(|| {
        (_, text) = get(&net, address, "/metrics");
        text.contains("filter_agent_region_changed_timestamp_seconds")
    }));
    assert_eq!(documented(), served(&text));
    let mut promtool = Command::new("promtool");
    promtool.args(["check", "metrics"]).stdin(Stdio::piped());
    promtool.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut promtool = promtool.spawn().unwrap();
    let mut input = promtool.stdin.take().unwrap();
    input.write_all(text.as_bytes()).unwrap();
    drop(input);
    let output = promtool.wait_with_output().unwrap();
    let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    assert!(output.status.success() && said.is_empty(), "{said}\n{text}");
}

#[test]
fn series_of_the_largest_policy_are_bounded() {
    let mut net = Net::new("metrics-largest");
    let rules: Vec<String> = (0..30).map(|rule| format!("10.{rule}.0.0/16")).collect();
    let rules: Vec<&str> = rules.iter().map(String::as_str).collect();
    let database = |n: u16| dedicated(&format!("database-{n}"), 5000 + n, &rules, "");
    let databases: Vec<String> = (0..127).map(database).collect();
    let policy = policy("eth0", "native", &databases);
    net.write_policy(&format!("metrics: {{listen: '{LISTEN}'}}\n{policy}"));
    net.start();
    net.wait_for_line("metrics on ");
    let address = LISTEN.parse().unwrap();
    let began = Instant::now();
    let scrape = Scrape::of(&net, address);
    println!("{} series in {:?}", scrape.len(), began.elapsed());
    let packets = 14 * 127 + 13;
    assert!(scrape.len() > 127 * 30 + packets);
    assert!(
        scrape.len() <= 127 * 30 + packets + 127 * 7 + 2 + 120,
        "{}",
        scrape.len()
    );
}
