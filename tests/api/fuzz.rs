//! schemathesis reads docs/openapi.json and asks a real agent whatever the document lets it think of.

use std::{
    fs::File,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use filter_tests::net::{
    Connection, DB4, DENIED4, Net, Protected, connect, dedicated, policy, wait_until,
};

/// As `cargo xtask setup` installs it.
const VERSION: &str = "4.32.5";

/// Requests of each operation and phase: some fifteen hundred in all.
const EXAMPLES: &str = "15";

/// Far longer than it takes.
const LIMIT: Duration = Duration::from_secs(600);

/// The checks of what answers must be like: all but that whatever fits the schema is done, since a rule may be well formed and
/// still one too many.
const LEFT_OUT: &str = "positive_data_acceptance";

fn program() -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let program = target.join(format!("schemathesis-{VERSION}/bin/schemathesis"));
    assert!(
        program.exists(),
        "there is no {}: run `cargo xtask setup`",
        program.display()
    );
    program
}

/// Ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn no_request_that_schemathesis_makes_is_answered_otherwise_than_described() {
    let orders = dedicated("orders", 5432, &["203.0.113.0/24"], "");
    let orders = orders.replace("rules: [", "rules: [{region: office}, ");
    let shop = "{name: shop, port: 3306, model: shared}".to_owned();
    let text = format!(
        "regions: {{office: {{prefixes: [10.9.0.0/16]}}}}\n{}",
        policy("eth0", "native", &[orders, shop])
    );
    let net = Net::enforcing("api-fuzz", &[Protected::tcp(3306, &[])], &text);
    // It speaks HTTP over TCP only.
    let address = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8080);
    let mut proxy = Command::new("socat");
    proxy.arg(format!(
        "TCP-LISTEN:{},bind={},fork,reuseaddr",
        address.port(),
        address.ip()
    ));
    proxy.arg(format!("UNIX-CONNECT:{}", net.socket().display()));
    proxy.stderr(Stdio::null());
    let _proxy = Running(net.db.run(|| proxy.spawn().unwrap()));
    let listens = || net.db.run(|| connect(address.ip(), address)) == Connection::Accepted;
    assert!(wait_until(listens));
    let output = net.dir().join("schemathesis.txt");
    let mut run = Command::new(program());
    run.arg("run")
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/openapi.json"));
    run.args(["--url", &format!("http://{address}")]);
    // The one ends the agent, the other lasts for as long as it is asked for.
    run.args([
        "--exclude-operation-id",
        "detach",
        "--exclude-operation-id",
        "trace",
    ]);
    run.args(["--checks", "all", "--exclude-checks", LEFT_OUT]);
    run.args(["--phases", "examples,coverage,fuzzing,stateful"]);
    run.args([
        "--max-examples",
        EXAMPLES,
        "--seed",
        "20",
        "--request-timeout",
        "60",
    ]);
    run.args(["--warnings", "off", "--no-color", "--continue-on-failure"]);
    // It keeps what it finds in the directory in which it runs.
    run.current_dir(net.dir())
        .stdout(File::create(&output).unwrap());
    let mut running = Running(net.db.run(|| run.spawn().unwrap()));
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = running.0.try_wait().unwrap() {
            break status;
        }
        assert!(begun.elapsed() < LIMIT, "schemathesis does not end");
        std::thread::sleep(Duration::from_millis(100));
    };
    let text = std::fs::read_to_string(&output).unwrap();
    assert!(status.success(), "{text}");
    let tested = text.lines().find(|line| line.trim().starts_with("Tested:"));
    assert_eq!(tested.map(str::trim), Some("Tested: 22"), "{text}");
    let count = text
        .lines()
        .find_map(|line| line.trim().split_once(" generated, "));
    let count: usize = count.expect(&text).0.parse().unwrap();
    assert!(count > 500, "{text}");
    println!("schemathesis: {count} requests in {:?}", begun.elapsed());
    // Whatever was asked for, the agent goes on enforcing.
    net.agent_text(&["status", "--verify"]);
    let shop = SocketAddr::new(DB4.into(), 3306);
    assert_eq!(net.connect(DENIED4.into(), shop), Connection::Silence);
}
