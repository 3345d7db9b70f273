//! Clients of both sockets that do harm (faults B15 and D11): what they get, and that they hold up nobody for long.

use std::{
    fmt::Write as _,
    fs,
    io::{Read as _, Write as _},
    net::Shutdown,
    os::unix::net::UnixStream,
    path::Path,
    thread,
    time::Duration,
};

use filter_tests::net::{PATIENCE, wait_until};

use crate::{
    http::{ask_at, send},
    status_socket::Passed,
};

fn client(socket: &Path, text: &str) -> UnixStream {
    let mut client = UnixStream::connect(socket).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    // Fails where the agent has answered before it read everything.
    let _ = client.write_all(text.as_bytes());
    client
}

/// All that a client gets until the agent ends the connection.
fn rest(mut client: UnixStream) -> String {
    let mut text = Vec::new();
    match client.read_to_end(&mut text) {
        // What the agent did not read any more.
        Err(error) if error.kind() != std::io::ErrorKind::ConnectionReset => panic!("{error}"),
        _ => String::from_utf8(text).unwrap(),
    }
}

#[test]
fn heads_that_are_slow_or_too_long_or_none_are_given_up_on_both_sockets() {
    let passed = Passed::start("hostile-heads");
    let sockets = [passed.net.socket(), passed.socket.clone()];
    let mut lines = String::new();
    for number in 0..10_000 {
        write!(lines, "a{number}: b\r\n").unwrap();
    }
    let long = "a".repeat(1 << 20);
    for socket in &sockets {
        for (request, statuses) in [
            (
                format!("GET /v1/status HTTP/1.1\r\n{lines}\r\n"),
                &["431"][..],
            ),
            (
                format!("GET /v1/status HTTP/1.1\r\nHost: {long}\r\n\r\n"),
                &["431"],
            ),
            (
                format!("GET /v1/status?{long} HTTP/1.1\r\nHost: a\r\n\r\n"),
                &["414", "431"],
            ),
            (
                format!("{long} /v1/status HTTP/1.1\r\n\r\n"),
                &["400", "431"],
            ),
            ("\0\0\0\0\r\n\r\n".into(), &["400"]),
            ("GET /v1/status HTTP/9.9\r\n\r\n".into(), &["400"]),
            ("\u{16}\u{3}\u{1}\u{2}\0\u{1}\0".into(), &["400"]),
        ] {
            let answer = rest(client(socket, &request));
            let begin = &request[..20.min(request.len())];
            let status = answer.split(' ').nth(1);
            assert!(
                status.is_some_and(|status| statuses.contains(&status)),
                "{begin:?}: {answer:?}"
            );
        }
        let mut slow = client(socket, "GET /v1/status HTTP/1.1\r\n");
        let given_up = wait_until(|| {
            thread::sleep(Duration::from_millis(200));
            slow.write_all(b"a").is_err()
        });
        assert!(given_up, "a head that comes letter by letter is waited for");
        let silent = client(socket, "");
        assert_eq!(rest(silent), "");
        // One that says that it has said everything.
        let half = client(socket, "GET /v1/rules HTTP/1.1\r\nHost: a\r\n\r\n");
        half.shutdown(Shutdown::Write).unwrap();
        let answer = rest(half);
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 200 "),
            "{answer}"
        );
        let half = client(socket, "GET /v1/rules HT");
        half.shutdown(Shutdown::Write).unwrap();
        rest(half);
        assert_eq!(ask_at(socket, "GET /v1/status", &[], "").status, 200);
    }
    passed.net.agent_text(&["status", "--verify"]);
}

#[test]
fn of_requests_on_one_connection_only_the_first_is_done() {
    let passed = Passed::start("hostile-pipeline");
    let allow = |host: u8| {
        let body = format!(
            "{{\"allow\": {{\"database\": \"orders\", \"source\": \"192.0.2.{host}\", \"seconds\": 600}}}}"
        );
        let length = body.len();
        format!("POST /v1/temporary HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n{body}")
    };
    let answers = send(
        &passed.net.socket(),
        (allow(1) + &allow(2) + &allow(3)).as_bytes(),
    );
    assert_eq!(answers.matches("HTTP/1.1 200 ").count(), 1, "{answers}");
    let rules = passed.net.agent_json(&["rules"]).to_string();
    assert!(rules.contains("192.0.2.1/32"), "{rules}");
    assert!(
        !rules.contains("192.0.2.2/32") && !rules.contains("192.0.2.3/32"),
        "{rules}"
    );
    let read = "GET /v1/rules HTTP/1.1\r\nHost: a\r\n\r\n".repeat(100);
    let answers = send(&passed.socket, read.as_bytes());
    assert_eq!(answers.matches("HTTP/1.1 200 ").count(), 1, "{answers}");
}

/// Each answer is as long as the region, and is held until it is read.
#[test]
fn members_who_read_no_answer_hold_a_few_of_them_and_nobody_for_ever() {
    let passed = Passed::start("hostile-readers");
    let list = passed.net.dir().join("long.txt");
    let mut text = String::new();
    for number in 0..100_000_u32 {
        let [_, a, b, c] = (2 * number).to_be_bytes();
        writeln!(text, "11.{a}.{b}.{c}/32").unwrap();
    }
    fs::write(&list, text).unwrap();
    let policy = fs::read_to_string(passed.net.policy_path()).unwrap();
    let policy = policy.replace("rules: [", "rules: [{region: long}, ");
    let region = format!("{{file: {}, max_prefixes: 300000}}", list.display());
    passed
        .net
        .reload(&format!("regions: {{long: {region}}}\n{policy}"));
    let length = ask_at(&passed.socket, "GET /v1/regions", &[], "")
        .body
        .len();
    assert!(length > 1 << 20, "{length}");
    let (before, _) = passed.net.memory();
    let request = "GET /v1/regions HTTP/1.1\r\nHost: a\r\n\r\n";
    let clients: Vec<_> = (0..32).map(|_| client(&passed.socket, request)).collect();
    // Root asks all the time, and is answered: by the loop, and by the thread that owns the filter.
    for _ in 0..5 {
        passed.net.agent_text(&["explain", "203.0.113.10"]);
    }
    let served =
        || send(&passed.socket, b"GET /v1/status HTTP/1.0\r\n\r\n").starts_with("HTTP/1.0 200 ");
    assert!(wait_until(served));
    let (peak, _) = passed.net.memory();
    let grown = (peak - before) / 1024;
    assert!(
        grown < 64,
        "{grown} MiB for answers of {} MiB each",
        length >> 20
    );
    drop(clients);
}
