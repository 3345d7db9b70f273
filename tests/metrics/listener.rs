//! The address on which metrics are served: taken, missing, moved, and in front of bad clients.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
};

use filter_tests::net::{Net, dedicated, policy, wait_until};

use crate::text::{Scrape, get, refuses, request};

fn serving(listen: &str) -> String {
    let databases = [dedicated("orders", 5432, &["203.0.113.10/32"], "")];
    format!(
        "metrics: {{listen: '{listen}'}}\n{}",
        policy("eth0", "native", &databases)
    )
}

fn errors(net: &Net) -> String {
    net.agent_json(&["status"])["errors"].to_string()
}

#[test]
fn only_get_of_metrics_is_answered() {
    let mut net = Net::new("metrics-paths");
    net.write_policy(&serving("[::1]:9464"));
    net.start();
    net.wait_for_line("metrics on http://[::1]:9464/metrics");
    let address: SocketAddr = "[::1]:9464".parse().unwrap();
    assert_eq!(get(&net, address, "/metrics").0, 200);
    assert_eq!(get(&net, address, "/metrics?x=1").0, 200);
    for path in ["/", "/status", "/detach", "/metrics/", "/../metrics"] {
        assert_eq!(get(&net, address, path).0, 404, "{path}");
    }
    for method in ["POST", "DELETE", "PUT"] {
        let head = format!("{method} /metrics HTTP/1.0\r\nContent-Length: 0\r\n\r\n");
        assert_eq!(request(&net, address, &head).0, 405, "{method}");
    }
    let long = format!("GET /metrics HTTP/1.0\r\nX: {}\r\n\r\n", "x".repeat(9000));
    assert_eq!(request(&net, address, &long).0, 431);
    assert_eq!(request(&net, address, "\x16\x03\x01\r\n\r\n").0, 400);
    let databases = [dedicated("orders", 5432, &[], "")];
    net.reload(&policy("eth0", "native", &databases));
    assert!(wait_until(|| refuses(&net, address)));
    assert_eq!(errors(&net), "[]");
}

#[test]
fn taken_port_is_an_error_and_tried_again() {
    let mut net = Net::new("metrics-taken");
    let address: SocketAddr = "127.0.0.1:9464".parse().unwrap();
    let taken = net.db.run(|| TcpListener::bind(address).unwrap());
    net.write_policy(&serving("127.0.0.1:9464"));
    net.start();
    net.wait_for_line("error: no metrics on 127.0.0.1:9464: Address already in use");
    assert!(errors(&net).contains("no metrics on 127.0.0.1:9464"));
    assert_eq!(net.agent(&["status"]).status.code(), Some(1));
    drop(taken);
    net.wait_for_line("metrics on ");
    assert_eq!(errors(&net), "[]");
    let version = env!("CARGO_PKG_VERSION");
    let info = format!("filter_agent_build_info{{version=\"{version}\"}}");
    assert!(Scrape::of(&net, address).has(&info));

    // Of the host's own tomorrow.
    net.reload(&serving("192.0.2.5:9464"));
    net.wait_for_line("error: no metrics on 192.0.2.5:9464: Cannot assign requested address");
    assert!(refuses(&net, address));
    net.db.ip("address add 192.0.2.5/32 dev lo");
    net.wait_for_line("metrics on ");
    Scrape::of(&net, "192.0.2.5:9464".parse().unwrap());
    assert_eq!(errors(&net), "[]");
}

#[test]
fn slow_clients_keep_others_waiting_for_a_bounded_time_only() {
    let mut net = Net::new("metrics-slow");
    let address: SocketAddr = "127.0.0.1:9464".parse().unwrap();
    net.write_policy(&serving("127.0.0.1:9464"));
    net.start();
    net.wait_for_line("metrics on ");
    // More than are served at a time; each begins a request and does not end it.
    let slow: Vec<TcpStream> = net.db.run(|| {
        let client = |_| {
            let mut client = TcpStream::connect(address).unwrap();
            client.write_all(b"GET /metrics HTTP/1.0\r\n").unwrap();
            client
        };
        (0..20).map(client).collect()
    });
    Scrape::of(&net, address);
    for mut client in slow {
        let mut answer = String::new();
        // Given up by the agent.
        let _ = client.read_to_string(&mut answer);
        assert!(!answer.contains("filter_agent"), "{answer}");
    }
    assert_eq!(errors(&net), "[]");
}

#[test]
fn kernel_that_cannot_be_read_is_an_error_and_no_zeros() {
    let mut net = Net::new("metrics-unread");
    let address: SocketAddr = "127.0.0.1:9464".parse().unwrap();
    net.write_policy(&serving("127.0.0.1:9464"));
    net.start();
    net.wait_for_line("metrics on ");
    let tampering = net.tamper("bpf", "error=EPERM");
    let mut answer = (0, String::new());
    let refused = wait_until(|| {
        answer = get(&net, address, "/metrics");
        answer.0 == 503
    });
    assert!(refused, "{answer:?}");
    // Without the paths that its error names.
    let text = "the filter cannot be read now: `filter-agent status` says why\n";
    assert_eq!(answer.1, text);
    tampering.stop();
    assert!(wait_until(|| get(&net, address, "/metrics").0 == 200));
}
