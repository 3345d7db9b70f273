//! A real Prometheus beside the agent, in the database host's namespace.

use std::{
    fs,
    net::SocketAddr,
    process::{Child, Command, Stdio},
};

use filter_tests::net::{Net, wait_until};
use serde_json::Value;

use crate::text::get;

/// The agent's address in every test with a Prometheus.
pub const AGENT: &str = "127.0.0.1:9464";

pub struct Prometheus {
    child: Child,
    address: SocketAddr,
}

impl Prometheus {
    /// Starts one that scrapes the agent and evaluates these rules each second, and waits for the first scrape.
    pub fn start(net: &Net, rules: &str) -> Self {
        let dir = net.dir().join("prometheus");
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("rules.yaml"), rules).unwrap();
        let configuration = format!(
            "global: {{scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}}
rule_files: [rules.yaml]
scrape_configs:
  - job_name: filter-agent
    static_configs: [{{targets: ['{AGENT}']}}]
"
        );
        fs::write(dir.join("prometheus.yml"), configuration).unwrap();
        let address = "127.0.0.1:9090";
        let log = fs::File::create(dir.join("log")).unwrap();
        let mut command = Command::new("prometheus");
        command
            .current_dir(&dir)
            .arg("--config.file=prometheus.yml");
        command.args([
            "--storage.tsdb.path=data",
            &format!("--web.listen-address={address}"),
        ]);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let child = net.db.run(|| command.spawn().unwrap());
        let prometheus = Self {
            child,
            address: address.parse().unwrap(),
        };
        let scrapes =
            wait_until(|| prometheus.listens(net) && prometheus.number(net, "up") == Some(1.0));
        let log = fs::read_to_string(dir.join("log")).unwrap();
        assert!(scrapes, "no scrape: {log}");
        prometheus
    }

    fn listens(&self, net: &Net) -> bool {
        !crate::text::refuses(net, self.address) && get(net, self.address, "/-/ready").0 == 200
    }

    fn api(&self, net: &Net, path: &str) -> Value {
        let (status, body) = get(net, self.address, &format!("/api/v1/{path}"));
        assert_eq!(status, 200, "{path}: {body}");
        serde_json::from_str::<Value>(&body).unwrap()["data"].take()
    }

    /// Labels and value of each series of an instant query.
    pub fn query(&self, net: &Net, expression: &str) -> Vec<(Value, f64)> {
        let encoded: String = expression
            .bytes()
            .map(|byte| format!("%{byte:02x}"))
            .collect();
        let mut data = self.api(net, &format!("query?query={encoded}"));
        let Value::Array(results) = data["result"].take() else {
            panic!("{expression}: {data}");
        };
        let results = results.into_iter().map(|mut result| {
            let value = result["value"][1].as_str().unwrap().parse().unwrap();
            (result["metric"].take(), value)
        });
        results.collect()
    }

    /// The value of a query with one series at most.
    fn number(&self, net: &Net, expression: &str) -> Option<f64> {
        self.query(net, expression).first().map(|(_, value)| *value)
    }

    /// Names and labels of the alerts that are firing.
    pub fn firing(&self, net: &Net) -> Vec<Value> {
        let mut data = self.api(net, "alerts");
        let Value::Array(alerts) = data["alerts"].take() else {
            panic!("{data}");
        };
        let firing = alerts
            .into_iter()
            .filter(|alert| alert["state"] == "firing");
        firing.map(|mut alert| alert["labels"].take()).collect()
    }

    /// Rules that were not evaluated yet, or could not be.
    pub fn unhealthy(&self, net: &Net) -> Vec<Value> {
        let data = self.api(net, "rules");
        let groups = data["groups"].as_array().unwrap();
        let rules = groups
            .iter()
            .flat_map(|group| group["rules"].as_array().unwrap());
        rules
            .filter(|rule| rule["health"] != "ok")
            .cloned()
            .collect()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
