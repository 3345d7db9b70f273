//! Each alert of `dist/monitoring` is raised by its cause, in a real Prometheus; `for:` is one second here.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
};

use filter_common::{LAYOUT, Port, Protocol, port_index};
use filter_tests::{
    etcd::Etcd,
    net::{ALLOWED4, Connection, DB4, Net, Protected, dedicated, policy, succeed, wait_until},
};
use jiff::{SignedDuration, Timestamp};

use crate::prometheus::{AGENT, Prometheus};

const PORT: u16 = 5432;

fn monitoring(file: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    root.join("dist/monitoring").join(file)
}

#[test]
fn promtool_agrees_with_the_alerts() {
    for arguments in [
        ["check", "rules", "alerts.yaml"],
        ["test", "rules", "alerts.test.yaml"],
    ] {
        let mut promtool = Command::new("promtool");
        promtool.args(arguments).current_dir(monitoring(""));
        let output = promtool.output().unwrap();
        let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert!(output.status.success(), "{said}");
    }
}

/// The alerts as they are shipped, but for how long the cause must last.
fn hasty_alerts() -> String {
    let text = fs::read_to_string(monitoring("alerts.yaml")).unwrap();
    let lines = text.lines().map(|line| match line.split_once("for: ") {
        Some((indent, _)) if indent.trim().is_empty() => format!("{indent}for: 1s\n"),
        _ => format!("{line}\n"),
    });
    lines.collect()
}

struct Watched {
    net: Net,
    prometheus: Prometheus,
}

impl Watched {
    /// Waits until an alert is firing whose labels hold these.
    #[track_caller]
    fn fires(&self, alert: &str, labels: &[(&str, &str)]) {
        let mut firing = Vec::new();
        let fires = wait_until(|| {
            firing = self.prometheus.firing(&self.net);
            firing.iter().any(|found| {
                found["alertname"] == alert
                    && labels.iter().all(|(name, value)| found[name] == *value)
            })
        });
        assert!(fires, "{alert} {labels:?} does not fire, but {firing:?}");
    }

    #[track_caller]
    fn nothing_fires(&self) {
        let mut firing = Vec::new();
        let quiet = wait_until(|| {
            firing = self.prometheus.firing(&self.net);
            firing.is_empty() && self.prometheus.unhealthy(&self.net).is_empty()
        });
        assert!(quiet, "{firing:?}");
    }
}

/// Orders with these rules, and with a file's region that is looked up each second.
fn orders(net: &Net, rules: &[String]) -> String {
    let office = net.dir().join("office.txt");
    let orders = dedicated("orders", PORT, &[], "");
    let rules = rules.join(", ");
    let orders = orders.replace("rules: [", &format!("rules: [{{region: office}}, {rules}"));
    let policy = policy("eth0", "native", &[orders]);
    let office = format!("office: {{file: {}, max_refresh: 1s}}", office.display());
    format!("metrics: {{listen: '{AGENT}'}}\nregions:\n  {office}\n{policy}")
}

fn cidr(prefix: &str) -> String {
    format!("{{cidr: {prefix}}}")
}

#[test]
fn each_alert_fires_for_its_cause() {
    let mut net = Net::new("alerts");
    let allowed = format!("{ALLOWED4}/32");
    net.watch(&[Protected::tcp(PORT, &[&allowed])]);
    let _listener = net.listen(PORT);
    let office = net.dir().join("office.txt");
    fs::write(&office, "192.0.2.0/25\n").unwrap();
    let rules = vec![cidr(&allowed)];
    net.write_policy(&orders(&net, &rules));
    net.start_with(&["--max-prefixes", "10"]);
    net.wait_for_line("metrics on ");
    let prometheus = Prometheus::start(&net, &hasty_alerts());
    let mut watched = Watched { net, prometheus };
    watched.nothing_fires();

    let soon = Timestamp::now() + SignedDuration::from_hours(1);
    let mut many = rules;
    many.extend((0..7).map(|n| cidr(&format!("10.0.{n}.0/25"))));
    many[7] = format!("{{cidr: 10.0.6.0/25, expires: {soon}}}");
    watched.net.reload(&orders(&watched.net, &many));
    watched.fires("FilterMapNearlyFull", &[("map", "ALLOWED4")]);
    let rule = [("database", "orders"), ("rule", "10.0.6.0/25")];
    watched.fires("FilterRuleEndsSoon", &rule);
    let few = vec![cidr("10.0.0.0/25")];

    watched.net.reload(&orders(&watched.net, &few));
    watched.nothing_fires();
    watched.net.watch(&[Protected::tcp(PORT, &[])]);
    let to = SocketAddr::new(DB4.into(), PORT);
    assert_eq!(
        watched.net.connect(ALLOWED4.into(), to),
        Connection::Silence
    );
    watched.fires("FilterDropsFormerlyAllowed", &[("database", "orders")]);

    fs::remove_file(&office).unwrap();
    watched.fires("FilterRegionStale", &[("region", "office")]);

    // Somebody writes into the filter's maps: the port is not guarded any more.
    let pin = watched
        .net
        .bpffs()
        .join(format!("filter-agent/v{LAYOUT}/PORT_GUARDS"));
    let key = port_index(Protocol::Tcp, PORT).to_ne_bytes();
    let bytes = |bytes: &[u8]| bytes.iter().map(u8::to_string).collect::<Vec<_>>();
    let mut bpftool = Command::new("bpftool");
    bpftool.args(["map", "update", "pinned"]).arg(pin);
    bpftool.arg("key").args(bytes(&key)).arg("value");
    succeed(bpftool.args(bytes(&[0; size_of::<Port>()])));
    assert_eq!(
        watched.net.agent(&["status", "--verify"]).status.code(),
        Some(1)
    );
    watched.fires("FilterVerificationFailed", &[]);
    watched.fires("FilterNotEnforced", &[]);
    watched.fires("FilterErrors", &[]);

    watched.net.db.ip("link delete eth0");
    watched.fires("FilterAttachedNowhere", &[]);

    watched.net.kill();
    watched.fires("FilterAgentGone", &[("job", "filter-agent")]);
}

#[test]
fn alerts_of_the_fleet_fire_for_their_causes() {
    let etcd = Etcd::start("alerts-fleet");
    let mut net = Net::new("alerts-host");
    etcd.attach(&net.db);
    let settings = etcd.settings(&["orders"]);
    let [ca, certificate, key] = [&settings.ca_file, &settings.cert_file, &settings.key_file]
        .map(|file| file.as_ref().unwrap().display());
    let fleet = format!(
        "fleet: {{endpoints: {:?}, ca_file: {ca}, cert_file: {certificate}, key_file: {key}, host: db7}}",
        settings.endpoints
    );
    let allowed = format!("{ALLOWED4}/32");
    let orders = dedicated("orders", PORT, &[&allowed], "fleet: {widest: [/24, /64]}");
    let policy = policy("eth0", "native", &[orders]);
    net.write_policy(&format!(
        "metrics: {{listen: '{AGENT}'}}\nignore_interfaces: [etcd0]\n{fleet}\n{policy}"
    ));
    etcd.put("rules/orders", b"rules: []");
    net.start();
    net.wait_for_line("metrics on ");
    let prometheus = Prometheus::start(&net, &hasty_alerts());
    let watched = Watched { net, prometheus };
    watched.nothing_fires();
    let orders = ("database", "orders");
    let alert = "FilterFleetDocumentNotInForce";
    etcd.put("rules/orders", b"rules: [{cidr: 0.0.0.0/0}]");
    watched.fires(alert, &[orders, ("state", "refused")]);
    etcd.put("rules/orders", b"rules: []");
    watched.nothing_fires();
    let snapshot = etcd.snapshot();
    etcd.put("rules/orders", b"rules: [{cidr: 198.51.100.0/24}]");
    // A host that never saw this document cannot tell that etcd went back.
    let latest = etcd.revision_of("rules/orders");
    let is_taken = || {
        let status = watched.net.agent_json(&["status"]);
        status["fleet"]["documents"][0]["revision"] == latest
    };
    assert!(wait_until(is_taken));
    etcd.restore(&snapshot);
    watched.fires("FilterFleetHeld", &[]);
    etcd.kill(0);
    watched.fires("FilterFleetSilent", &[]);
}
