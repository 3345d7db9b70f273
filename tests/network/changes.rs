//! Rules that end, change or are reloaded.

use std::{
    env, fs,
    io::{Read as _, Write as _},
    net::{IpAddr, TcpStream},
    process::Command,
    thread,
    time::Duration,
};

use filter_agent::clock::since_boot;
use filter_tests::net::{
    ALLOWED4, ALLOWED6, Connection, DB4, DB6, DENIED4, Hammer, Net, PATIENCE, Protected, bound,
    dedicated, policy, under_load,
};
use jiff::{SignedDuration, Timestamp};

use crate::orders::{ALLOWED, DB, DB_V6, PORT, orders, v4};

/// A policy with a rule that ends then.
fn expiring(end: Timestamp) -> String {
    let rule = format!("{{cidr: 203.0.113.10/32, expires: '{end:.0}'}}");
    policy(
        "eth0",
        "native",
        &[format!(
            "{{name: orders, port: {PORT}, engine: postgresql, model: dedicated, force_tls: false, \
         rules: [{rule}, {{cidr: '2001:db8::10/128'}}]}}"
        )],
    )
}

fn in_seconds(seconds: i64) -> Timestamp {
    Timestamp::now() + SignedDuration::from_secs(seconds)
}

#[test]
fn rule_ends_when_it_expires() {
    let mut net = Net::new("expires");
    let _listener = net.listen(PORT);
    net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
    net.write_policy(&orders("native"));
    net.start();
    // Until the end is late enough for this machine to connect before it.
    for seconds in [3, 10, 60, 120] {
        let end = in_seconds(seconds);
        net.reload(&expiring(end));
        let connection = net.connect(ALLOWED4.into(), DB);
        if Timestamp::now() < end {
            assert_eq!(connection, Connection::Accepted);
            break;
        }
    }
    net.wait_for_line("database orders: the rule of 203.0.113.10/32 has expired");
    net.watch(&[Protected::tcp(PORT, &["2001:db8::10/128"])]);
    assert_eq!(net.connect(ALLOWED4.into(), DB), Connection::Silence);
    assert_eq!(net.connect(ALLOWED6.into(), DB_V6), Connection::Accepted);
}

#[test]
fn rule_that_expired_while_the_agent_was_down_ends_at_start() {
    let mut net = Net::new("expired");
    let _listener = net.listen(PORT);
    net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
    net.write_policy(&orders("native"));
    net.start();
    // Until the end is late enough for this machine to kill the agent before it.
    for seconds in [2, 10, 60, 120] {
        let end = in_seconds(seconds);
        net.reload(&expiring(end));
        net.kill();
        if Timestamp::now() < end {
            let left = end.duration_since(Timestamp::now()) + SignedDuration::from_secs(1);
            thread::sleep(left.try_into().unwrap_or_default());
            break;
        }
        net.start();
    }
    net.start();
    net.watch(&[Protected::tcp(PORT, &["2001:db8::10/128"])]);
    assert_eq!(net.connect(ALLOWED4.into(), DB), Connection::Silence);
    assert_eq!(net.connect(ALLOWED6.into(), DB_V6), Connection::Accepted);
}

/// Fault B18: regions went by a clock that stands still while the host is suspended. This runs itself in a time
/// namespace, where the two clocks differ as after a suspend of a day.
#[test]
fn time_goes_on_while_the_host_is_suspended() {
    const SUSPENDED: &str = "FILTER_TESTS_SUSPENDED";
    if env::var_os(SUSPENDED).is_none() {
        let mut command = Command::new("unshare");
        command
            .args(["--time", "--fork", "--boottime", "86400", "--"])
            .arg(env::current_exe().unwrap())
            .args([
                "--exact",
                "changes::time_goes_on_while_the_host_is_suspended",
            ])
            .env(SUSPENDED, "");
        let output = command.output().unwrap();
        let printed = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{printed}");
        assert!(printed.contains("1 passed"), "{printed}");
        return;
    }
    let uptime = || {
        let text = fs::read_to_string("/proc/uptime").unwrap();
        let seconds = text.split_whitespace().next().unwrap();
        seconds.parse::<f64>().unwrap()
    };
    let (before, time, after) = (uptime(), since_boot().as_secs_f64(), uptime());
    // It has two digits.
    assert!(
        before <= time + 0.01 && time <= after + 0.01,
        "{before} {time} {after}"
    );
}

#[test]
fn region_file_allows_what_it_lists() {
    let mut net = Net::new("region");
    let _listener = net.listen(PORT);
    let file = net.dir().join("office.txt");
    fs::write(&file, "# the office\n203.0.113.0/28\n2001:db8::10/128\n").unwrap();
    let database = format!(
        "{{name: orders, port: {PORT}, engine: postgresql, model: dedicated, force_tls: false, \
         rules: [{{region: office}}]}}"
    );
    let text = policy("eth0", "native", &[database]);
    let text = format!("regions: {{office: {{file: {}}}}}\n{text}", file.display());
    net.watch(&[Protected::tcp(
        PORT,
        &["203.0.113.0/28", "2001:db8::10/128"],
    )]);
    net.write_policy(&text);
    net.start();
    use Connection::{Accepted, Silence};
    let attempts = [
        (ALLOWED4.into(), DB),
        (ALLOWED6.into(), DB_V6),
        (DENIED4.into(), DB),
    ];
    assert_eq!(net.connect_all(&attempts), [Accepted, Accepted, Silence]);

    net.watch(&[Protected::tcp(
        PORT,
        &["203.0.113.0/28", "2001:db8::10/128", "198.51.100.7/32"],
    )]);
    fs::write(&file, "198.51.100.7/32\n").unwrap();
    net.reload(&text);
    net.watch(&[Protected::tcp(PORT, &["198.51.100.7/32"])]);
    assert_eq!(net.connect_all(&attempts), [Silence, Silence, Accepted]);

    fs::write(&file, "<html>\n").unwrap();
    let error = net.agent_error(&["reload"]);
    assert!(
        error.contains("office") && error.contains("line 1"),
        "{error}"
    );
    assert_eq!(net.connect_all(&attempts), [Silence, Silence, Accepted]);
}

#[test]
fn reloads_under_traffic_neither_refuse_an_allowed_source_nor_accept_a_denied_one() {
    let mut net = Net::new("reloads");
    let _echo = net.echo(PORT);
    net.add_client();
    net.watch(&[Protected::tcp(
        PORT,
        &["203.0.113.0/24", "2001:db8::/64", "10.3.0.0/16"],
    )]);
    let more: Vec<String> = (0..20).map(|n| format!("10.3.{n}.0/24")).collect();
    let more: Vec<&str> = more.iter().map(String::as_str).chain(ALLOWED).collect();
    let wide = ["203.0.113.0/24", "2001:db8::/64"];
    let here = format!("addresses: [{DB4}, '{DB6}', 10.0.1.1]");
    let policies = [
        vec![dedicated("orders", PORT, &ALLOWED, "")],
        vec![dedicated("orders", PORT, &more, "")],
        vec![dedicated("orders", PORT, &wide, "cluster: [10.3.0.0/16]")],
        vec![
            dedicated("renamed", PORT, &ALLOWED, ""),
            dedicated("orders", 5433, &wide, ""),
        ],
        vec![dedicated("orders", PORT, &ALLOWED, &here)],
        vec![
            dedicated("renamed", PORT, &wide, &here),
            dedicated("shop", 5434, &[], ""),
        ],
    ]
    .map(|databases| policy("eth0, eth1", "native", &databases));
    net.write_policy(&policies[0]);
    net.start();
    let stranger = "10.0.1.2".parse().unwrap();
    let denied = [
        (stranger, DB),
        (stranger, v4("10.0.1.1".parse().unwrap(), PORT)),
    ];
    let denied = Hammer::denied(&net.more_clients[0], &denied);
    let allowed = [(ALLOWED4.into(), DB), (ALLOWED6.into(), DB_V6)];
    net.count_syns(PORT);
    let allowed = Hammer::allowed(&net.client, &allowed);
    under_load(204, &[(&allowed, 200), (&denied, 200)], |round| {
        net.reload_unprotected(&policies[(round + 1) % policies.len()]);
    });
    allowed.stop();
    denied.stop();
    net.assert_all_syns_passed();
}

#[test]
fn removed_rule_ends_open_sessions_and_no_others() {
    let mut net = Net::new("sessions");
    let _echo = net.echo(PORT);
    net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
    net.write_policy(&orders("native"));
    net.start();
    let open = |source: IpAddr, destination| {
        let socket = net.client.run(|| bound(source));
        socket.connect_timeout(&destination, PATIENCE).unwrap();
        TcpStream::from(socket)
    };
    let mut removed = open(ALLOWED4.into(), DB.into());
    let mut kept = open(ALLOWED6.into(), DB_V6.into());
    let ping = |stream: &mut TcpStream, patience: Duration| {
        stream.set_read_timeout(Some(patience)).unwrap();
        let mut answer = [0; 4];
        stream.write_all(b"ping").is_ok() && stream.read_exact(&mut answer).is_ok()
    };
    assert!(ping(&mut removed, PATIENCE) && ping(&mut kept, PATIENCE));
    net.reload(&policy(
        "eth0",
        "native",
        &[dedicated("orders", PORT, &ALLOWED[1..], "")],
    ));
    net.watch(&[Protected::tcp(PORT, &ALLOWED[1..])]);
    assert!(!ping(&mut removed, Duration::from_secs(1)));
    assert!(ping(&mut kept, PATIENCE));
}
