//! Endpoints that cannot be connected to, each with one line that says why.

use std::{
    io::{Read as _, Write as _},
    net::TcpListener,
    thread,
};

use filter_agent::fleet::Settings;
use filter_tests::net::wait_until;

use crate::{
    certificates::{Authority, Kind, Pair},
    etcd::{Etcd, USER, endpoint},
    follower::Follower,
};

/// The first line that the host gets, without the endpoint.
fn refused(etcd: &Etcd, settings: Settings) -> String {
    refusals(etcd, settings).next().unwrap()
}

/// An etcd that has just started on a busy machine may not answer in time.
fn refused_in_time(etcd: &Etcd, settings: Settings) -> String {
    let mut lines = refusals(etcd, settings);
    lines.find(|line| !line.contains(" within ")).unwrap()
}

fn refusals(etcd: &Etcd, settings: Settings) -> impl Iterator<Item = String> {
    let prefix = format!("{}: ", settings.endpoints[0]);
    let follower = Follower::start(&etcd.host, settings);
    std::iter::repeat_with(move || {
        let line = follower.lost();
        let why = line.strip_prefix(&prefix);
        why.unwrap_or_else(|| panic!("{line} begins with {prefix}"))
            .to_owned()
    })
}

const AT_ONCE: &str = "it closed the connection at once: it is not etcd, expects TLS, or refuses the certificate in `cert_file`, which may have expired";
const NOT_GRPC: &str = "it does not speak gRPC";
const REFUSED: &str =
    "it refuses the certificate in `cert_file`, which may have expired, or that there is none";

#[test]
fn refused_certificates_are_told_apart() {
    let etcd = Etcd::start("fleet-tls");
    let settings = || etcd.settings(&["orders"]);
    let strangers = Authority::new(etcd.directory(), "strangers");
    let other_authority = Settings {
        ca_file: Some(strangers.file()),
        ..settings()
    };
    assert_eq!(
        refused_in_time(&etcd, other_authority),
        "no authority in `ca_file` signed the certificate that it shows"
    );
    let client = |pair: Option<&Pair>| Settings {
        cert_file: pair.map(|pair| pair.certificate.clone()),
        key_file: pair.map(|pair| pair.key.clone()),
        ..settings()
    };
    let strange = strangers.sign(USER, &[], Kind::Good);
    let expired = etcd.authority.sign(USER, &[], Kind::Expired);
    for pair in [None, Some(&strange), Some(&expired)] {
        // In TLS 1.3 the refusal comes after the client began to speak: then it may get lost.
        let line = refused_in_time(&etcd, client(pair));
        assert!([REFUSED, AT_ONCE].contains(&line.as_str()), "{line}");
    }
    let unknown = etcd.authority.sign("db99", &[], Kind::Good);
    assert_eq!(
        refused_in_time(&etcd, client(Some(&unknown))),
        "read /filter-agent/v1/era: etcdserver: permission denied"
    );
    let plain = Settings {
        endpoints: vec![endpoint(0).replace("https", "http")],
        ca_file: None,
        ..client(None)
    };
    assert_eq!(refused_in_time(&etcd, plain), AT_ONCE);
    for (name, address, validity, line) in [
        (
            "expired",
            "10.77.0.1",
            Kind::Expired,
            "the certificate that it shows has expired",
        ),
        (
            "other",
            "10.77.0.200",
            Kind::Good,
            "invalid peer certificate: certificate not valid for name \"10.77.0.1\"; \
             certificate is only valid for IpAddress(10.77.0.200)",
        ),
    ] {
        etcd.kill(0);
        etcd.run_as(0, &etcd.authority.sign(name, &[address], validity));
        let listens = || {
            refused_in_time(&etcd, settings())
                != "tcp connect error: Connection refused (os error 111)"
        };
        assert!(wait_until(listens), "etcd listens");
        assert_eq!(refused_in_time(&etcd, settings()), line);
    }
}

#[test]
fn other_servers_are_told_apart() {
    let etcd = Etcd::start("fleet-others");
    let settings = |url: &str| Settings {
        endpoints: vec![url.into()],
        ..etcd.settings(&["orders"])
    };
    let plain = |url: &str| Settings {
        ca_file: None,
        cert_file: None,
        key_file: None,
        ..settings(url)
    };
    for (url, line) in [
        (
            "https://10.77.0.1:3000",
            "tcp connect error: Connection refused (os error 111)",
        ),
        (
            "https://10.88.0.1:3000",
            "tcp connect error: Network is unreachable (os error 101)",
        ),
        ("https://10.77.0.77:3000", "no connection within 2 s"),
    ] {
        assert_eq!(refused(&etcd, settings(url)), line);
    }
    let silent = serve(&etcd, None);
    let http = serve(&etcd, Some("HTTP/1.1 400 Bad Request\r\n\r\n"));
    let text = serve(&etcd, Some("hello\r\n"));
    for (port, with_tls, without) in [
        (silent, "no answer within 5 s", ["no answer within 5 s"; 2]),
        // The text comes before the end, or is lost with it.
        (http, "it does not speak TLS", [NOT_GRPC, AT_ONCE]),
        (text, "it does not speak TLS", [NOT_GRPC, AT_ONCE]),
    ] {
        let url = format!("https://10.77.0.1:{port}");
        assert_eq!(refused(&etcd, settings(&url)), with_tls);
        let url = format!("http://10.77.0.1:{port}");
        let line = refused(&etcd, plain(&url));
        assert!(without.contains(&line.as_str()), "{line}");
    }
}

/// A server beside etcd that answers the first bytes with a text and hangs up, or is silent. Returns its port.
fn serve(etcd: &Etcd, answer: Option<&'static str>) -> u16 {
    let bind = || TcpListener::bind("10.77.0.1:0").unwrap();
    let listener = etcd.namespace.run(bind);
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || {
                let mut buffer = [0; 4096];
                while stream.read(&mut buffer).is_ok_and(|length| length > 0) {
                    if let Some(answer) = answer {
                        let _ = stream.write_all(answer.as_bytes());
                        break;
                    }
                }
            });
        }
    });
    port
}
