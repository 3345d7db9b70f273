//! A watch that lives and announces nothing, as faults of etcd have made them.

use std::{
    io::{self, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use filter_agent::fleet::{News, Settings};

use crate::{
    etcd::Etcd,
    follower::{Follower, text_of},
};

#[test]
fn change_that_no_watch_announces_is_found_counted_and_ends_the_connection() {
    let etcd = Etcd::start("fleet-mute");
    // Only without TLS can anybody stand between. Then there are no users.
    etcd.control(&["auth", "disable"]);
    etcd.put("rules/orders", b"one");
    let is_mute = Arc::new(AtomicBool::new(false));
    let port = stand_between(&etcd, is_mute.clone());
    let settings = Settings {
        endpoints: vec![format!("http://10.77.0.1:{port}")],
        ca_file: None,
        cert_file: None,
        key_file: None,
        ..etcd.settings(&["orders"])
    };
    let follower = Follower::start(&etcd.host, settings);
    follower.answer_with("orders", "one");
    is_mute.store(true, Ordering::Relaxed);
    etcd.put("rules/orders", b"two");
    follower.answer_with("orders", "two");
    let why = follower.lost();
    assert!(
        why.ends_with("the watch did not announce a change that a read found"),
        "{why}"
    );
    is_mute.store(false, Ordering::Relaxed);
    let News::Answer { answer, healed, .. } = follower.next() else {
        panic!("the next connection works");
    };
    assert_eq!((text_of(&answer, "orders"), healed), (Some("two"), 1));
    etcd.put("rules/orders", b"three");
    let News::Answer { answer, healed, .. } = follower.next() else {
        panic!("the next watch announces");
    };
    assert_eq!((text_of(&answer, "orders"), healed), (Some("three"), 1));
}

/// Passes on connections to etcd, and while `is_mute` nothing that a watch announces. Returns its port.
fn stand_between(etcd: &Etcd, is_mute: Arc<AtomicBool>) -> u16 {
    let bind = || TcpListener::bind("10.77.0.1:0").unwrap();
    let listener = etcd.namespace.run(bind);
    let port = listener.local_addr().unwrap().port();
    let namespace = etcd.namespace.name.clone();
    thread::spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            let connect = || TcpStream::connect(Etcd::without_tls(0));
            let Ok(server) = filter_tests::net::run_in(&namespace, connect) else {
                break;
            };
            let (mut from, mut to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            thread::spawn(move || io::copy(&mut from, &mut to));
            let is_mute = is_mute.clone();
            thread::spawn(move || pass_frames(server, client, &is_mute));
        }
    });
    port
}

/// Frames of HTTP/2. The watch is the first stream of its connection.
fn pass_frames(mut from: TcpStream, mut to: TcpStream, is_mute: &AtomicBool) -> io::Result<()> {
    const DATA: u8 = 0;
    loop {
        let mut frame = vec![0; 9];
        from.read_exact(&mut frame)?;
        let length = u32::from_be_bytes([0, frame[0], frame[1], frame[2]]);
        let stream = u32::from_be_bytes([frame[5], frame[6], frame[7], frame[8]]);
        let is_announcement = frame[3] == DATA && stream == 1;
        let head = frame.len();
        frame.resize(head + length as usize, 0);
        from.read_exact(&mut frame[head..])?;
        if !(is_announcement && is_mute.load(Ordering::Relaxed)) {
            to.write_all(&frame)?;
        }
    }
}
