//! A PROXY header that MariaDB 10.11 reads otherwise than the specification has it: it takes what has come by then for the whole.

use std::process::Command;

use filter_tests::{
    databases::Maria,
    net::{RawClient, RawConnection, Received, wait_until},
};

use crate::{
    laboratory::{Laboratory, RAW4},
    proxies::version_2,
    server::Engine,
};

/// A login without TLS, with a password that is wrong.
fn login() -> Vec<u8> {
    let mut login = vec![1, 0x82, 8, 0, 0, 0, 0, 1, 45];
    login.resize(32, 0);
    login.extend(b"anyone\0\x14wrongwrongwrongwrong");
    login.extend(b"mysql_native_password\0");
    [&[login.len() as u8, 0, 0, 1], &login[..]].concat()
}

/// A header with a login inside, in two segments.
fn hidden() -> [Vec<u8>; 2] {
    let mut inside = [&[7; 12][..], &login()].concat();
    inside.resize(200, 0);
    let mut beginning = version_2(1, 0x11, &inside);
    let rest = beginning.split_off(28);
    [beginning, rest]
}

/// Waits until MariaDB has refused the login of a connection.
#[track_caller]
fn wait_for_denial(client: &RawClient, connection: &RawConnection) {
    let denies = |segment: &Received| {
        let mut words = segment.data.windows(13);
        connection.is_mine(segment) && words.any(|word| word == b"Access denied")
    };
    client.wait(denies);
}

/// Bytes that MariaDB's socket has received from this port, and those that MariaDB has not read. `None`: it has closed it.
fn received(laboratory: &Laboratory, port: u16) -> Option<(u32, u32)> {
    let mut command = Command::new("ss");
    command.args(["-Htin", &format!("( sport = :3306 and dport = :{port} )")]);
    let output = laboratory.net.db.output(&mut command);
    let text = String::from_utf8(output.stdout).unwrap();
    let words: Vec<_> = text.split_whitespace().collect();
    if words.first() != Some(&"ESTAB") {
        return None;
    }
    let mut counts = words
        .iter()
        .filter_map(|word| word.strip_prefix("bytes_received:"));
    let received = counts.next().map_or(0, |count| count.parse().unwrap());
    Some((received, words[1].parse().unwrap()))
}

fn send(laboratory: &Laboratory, connection: &RawConnection, segments: &[Vec<u8>]) {
    let mut place = 0;
    for segment in segments {
        connection.write(place, segment);
        place += segment.len() as u32;
        let unread = || received(laboratory, connection.from).map_or(0, |(_, unread)| unread);
        assert!(wait_until(|| unread() == 0));
    }
}

#[test]
fn login_inside_a_header_is_never_read() {
    let laboratory = Laboratory::with("maria", "native", "force_tls: false");
    let _server = Maria::start(&laboratory.net);
    let client = laboratory.client(RAW4);
    for forced in [false, true] {
        if forced {
            laboratory
                .net
                .reload(&laboratory.policy("proxy_protocol: required"));
        }
        let connection = client.open(Engine::Mysql.port());
        client.wait(|segment| connection.is_mine(segment) && !segment.data.is_empty());
        send(&laboratory, &connection, &hidden());
        if forced {
            client.fence();
            assert_eq!(received(&laboratory, connection.from), Some((0, 0)));
        } else {
            wait_for_denial(&client, &connection);
        }
        connection.reset(0);
    }
}
