//! Every query of the dashboard of `dist/monitoring` returns data, and other data once its cause is made.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write as _,
    net::{IpAddr, SocketAddr},
    os::unix::net::UnixStream,
    path::Path,
    process::Command,
};

use filter_common::{LAYOUT, Port, Protocol, port_index};
use filter_tests::net::{
    ALLOWED4, CLIENT4, Connection, DB4, DENIED4, Net, Protected, bound, dedicated, policy, succeed,
    wait_until,
};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::prometheus::{AGENT, Prometheus};

const ORDERS: u16 = 5432;
const BANK: u16 = 5433;
const SHOP: u16 = 3306;

/// Values by labels.
type Data = BTreeMap<String, f64>;

struct Query {
    panel: String,
    expression: String,
    before: Data,
}

struct Dashboard {
    queries: Vec<Query>,
    prometheus: Prometheus,
    /// Panels whose queries were all seen to change.
    seen: BTreeSet<String>,
}

fn data(prometheus: &Prometheus, net: &Net, expression: &str) -> Data {
    let series = prometheus.query(net, expression).into_iter();
    let numbers = series.filter(|(_, value)| !value.is_nan());
    numbers
        .map(|(labels, value)| (labels.to_string(), value))
        .collect()
}

impl Dashboard {
    fn open(net: &Net, prometheus: Prometheus) -> Self {
        // Rates need two scrapes.
        let cpu = "rate(process_cpu_seconds_total[2m]) and on (instance) up == 1";
        assert!(wait_until(|| !data(&prometheus, net, cpu).is_empty()));
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../dist/monitoring/dashboard.json");
        let dashboard: Value = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
        let mut queries = Vec::new();
        for panel in dashboard["panels"].as_array().unwrap() {
            let title = panel["title"].as_str().unwrap();
            for target in panel["targets"].as_array().into_iter().flatten() {
                let expression = target["expr"].as_str().unwrap();
                assert!(!expression.contains("vector("), "{expression}");
                let expression = expression
                    .replace("$__rate_interval", "2m")
                    .replace("$instance", ".*");
                assert!(!expression.contains('$'), "{expression}");
                queries.push(Query {
                    panel: title.to_owned(),
                    before: data(&prometheus, net, &expression),
                    expression,
                });
            }
        }
        Self {
            queries,
            prometheus,
            seen: BTreeSet::new(),
        }
    }

    /// Waits until the query of a panel returns data, which a change is to differ from.
    fn begin(&mut self, net: &Net, panel: &str) {
        for query in self.queries.iter_mut().filter(|query| query.panel == panel) {
            let prometheus = &self.prometheus;
            assert!(wait_until(|| {
                query.before = data(prometheus, net, &query.expression);
                !query.before.is_empty()
            }));
        }
    }

    /// Waits until each query of these panels returns data, and other data than before.
    #[track_caller]
    fn show(&mut self, net: &Net, panels: &[&str]) {
        for panel in panels {
            let queries = self.queries.iter().filter(|query| query.panel == *panel);
            let mut count = 0;
            for query in queries {
                let mut now = Data::new();
                let changed = wait_until(|| {
                    now = data(&self.prometheus, net, &query.expression);
                    !now.is_empty() && now != query.before
                });
                assert!(changed, "{panel}: {} is still {now:?}", query.expression);
                println!("{panel}: {:?} -> {now:?}", query.before);
                count += 1;
            }
            assert!(count > 0, "no panel {panel}");
            self.seen.insert((*panel).to_owned());
        }
    }
}

/// `orders` with these rules and a region, `bank` where TLS is forced, and `shop`, which is only monitored.
fn databases(net: &Net, rules: &[&str]) -> String {
    let office = net.dir().join("office.txt");
    let orders = dedicated("orders", ORDERS, rules, "");
    let orders = orders.replace("rules: [", "rules: [{region: office}, ");
    let bank = dedicated("bank", BANK, &[&format!("{ALLOWED4}/32")], "");
    let bank = bank.replace("force_tls: false", "force_tls: true");
    let shop = dedicated("shop", SHOP, &[], "monitor: true");
    let office = format!("office: {{file: {}, retire_after: 1h}}", office.display());
    let policy = policy("eth0, eth1", "native", &[orders, bank, shop]);
    format!("metrics: {{listen: '{AGENT}'}}\nregions:\n  {office}\n{policy}")
}

fn write_office(net: &Net, text: &str) {
    let next = net.dir().join("office.next");
    fs::write(&next, text).unwrap();
    fs::rename(next, net.dir().join("office.txt")).unwrap();
}

#[test]
fn every_query_returns_data_that_change_with_their_cause() {
    let mut net = Net::new("dashboard");
    let allowed = format!("{ALLOWED4}/32");
    let watched = [ORDERS, BANK].map(|port| Protected::tcp(port, &[&allowed]));
    net.watch(&watched);
    let _listeners = [ORDERS, BANK, SHOP].map(|port| net.listen(port));
    write_office(&net, "192.0.2.0/25\n192.0.2.200/32\n");
    net.write_policy(&databases(&net, &[&allowed]));
    net.start();
    net.wait_for_line("metrics on ");
    let prometheus = Prometheus::start(&net, "groups: []\n");
    let mut dashboard = Dashboard::open(&net, prometheus);
    let to = |port| SocketAddr::new(DB4.into(), port);

    write_office(&net, "192.0.2.0/25\n192.0.2.201/32\n192.0.2.203/32\n");
    let of_region = [
        "Prefixes",
        "Retiring prefixes",
        "Look-ups",
        "Duration of look-ups (99 %)",
        "Since last confirmed",
    ];
    dashboard.show(&net, &of_region);

    assert_eq!(
        net.connect(ALLOWED4.into(), to(ORDERS)),
        Connection::Accepted
    );
    assert_eq!(net.connect(DENIED4.into(), to(ORDERS)), Connection::Silence);
    assert_eq!(net.connect(CLIENT4.into(), to(SHOP)), Connection::Accepted);
    let clear = net.client.run(|| bound(IpAddr::from(ALLOWED4)));
    clear.connect(&to(BANK).into()).unwrap();
    (&clear)
        .write_all(b"\0\0\0\x19\0\x03\0\0user\0postgres\0\0")
        .unwrap();
    let of_packets = [
        "Passed",
        "Dropped",
        "Would be dropped (monitored)",
        "Busiest rules",
        "Connections where TLS is forced",
    ];
    dashboard.show(&net, &of_packets);

    for source in ["192.0.2.198", "192.0.2.199"] {
        net.agent_text(&["allow", "orders", source, "--for", "2h"]);
    }
    net.agent_text(&["block", "orders", &allowed, "--for", "2h"]);
    dashboard.begin(&net, "Dropped by blocks");
    assert_eq!(
        net.connect(ALLOWED4.into(), to(ORDERS)),
        Connection::Silence
    );
    dashboard.show(
        &net,
        &["Dropped by blocks", "Next end", "Kernel maps, how full"],
    );

    let open: Vec<UnixStream> = (0..9)
        .map(|_| UnixStream::connect(net.socket()).unwrap())
        .collect();
    dashboard.show(&net, &["File descriptors", "Memory", "Processor time"]);
    drop(open);

    net.add_client();
    dashboard.show(&net, &["Interfaces filtered", "Errors"]);

    // No room for one of the temporary rules, and none that allows who comes again.
    let rules: Vec<String> = (0..28).map(|n| format!("10.9.{n}.0/24")).collect();
    let rules: Vec<&str> = rules.iter().map(String::as_str).collect();
    net.reload(&databases(&net, &rules));
    net.watch(&[Protected::tcp(BANK, &[&allowed])]);
    assert_eq!(
        net.connect(ALLOWED4.into(), to(ORDERS)),
        Connection::Silence
    );
    let of_rules = [
        "Rules in force",
        "Temporary rules and blocks",
        "Allowed prefixes",
        "Dropped sources that were allowed until lately",
        "Reloads and other changes",
        "Time until a change is in force (99 %)",
        "Policy accepted",
    ];
    dashboard.show(&net, &of_rules);

    fs::remove_file(net.dir().join("office.txt")).unwrap();
    dashboard.show(&net, &["Failing", "Warnings"]);

    let pins = net.bpffs().join(format!("filter-agent/v{LAYOUT}"));
    let names = fs::read_dir(&pins).unwrap().map(|pin| pin.unwrap().path());
    let link = names
        .into_iter()
        .find(|pin| pin.to_str().unwrap().contains("link_"));
    let mut bpftool = Command::new("bpftool");
    succeed(
        bpftool
            .args(["link", "detach", "pinned"])
            .arg(link.unwrap()),
    );
    dashboard.show(&net, &["Repairs"]);

    net.signal(Signal::SIGSTOP);
    dashboard.show(&net, &["Up"]);
    net.signal(Signal::SIGCONT);
    let delay = "Delay of the main loop (99 %)";
    dashboard.show(&net, &[delay]);
    let mut of_delay = dashboard
        .queries
        .iter()
        .filter(|query| query.panel == delay);
    let of_delay = &of_delay.next().unwrap().expression;
    assert!(wait_until(|| {
        let delays = data(&dashboard.prometheus, &net, of_delay);
        delays.values().any(|delay| *delay > 0.5)
    }));

    // The port is not guarded any more.
    let key = port_index(Protocol::Tcp, ORDERS).to_ne_bytes();
    let bytes = |bytes: &[u8]| bytes.iter().map(u8::to_string).collect::<Vec<_>>();
    let mut bpftool = Command::new("bpftool");
    bpftool
        .args(["map", "update", "pinned"])
        .arg(pins.join("PORT_GUARDS"));
    bpftool.arg("key").args(bytes(&key)).arg("value");
    succeed(bpftool.args(bytes(&[0; size_of::<Port>()])));
    assert_eq!(net.agent(&["status", "--verify"]).status.code(), Some(1));
    dashboard.show(&net, &["Verification errors", "Enforced"]);

    let panels: BTreeSet<String> = dashboard.queries.iter().map(|q| q.panel.clone()).collect();
    assert_eq!(panels, dashboard.seen);
}
