//! How long a trace lasts, and what it leaves behind.

use std::{net::IpAddr, process::Command, time::Instant};

use filter_common::Protocol;
use filter_tests::{
    frames::Packet,
    net::{
        ALLOWED4, DENIED4, Hammer, Net, Protected, addressing, dedicated, policy, under_load,
        wait_until,
    },
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::{
    reader::{Reader, program},
    steps::{ALLOWED, PORT, db},
};

fn orders() -> String {
    policy("eth0", "native", &[dedicated("orders", PORT, &ALLOWED, "")])
}

fn enforcing(name: &str) -> Net {
    Net::enforcing(name, &[Protected::tcp(PORT, &ALLOWED)], &orders())
}

fn is_traced(net: &Net) -> bool {
    program(net, "eth0") == "filter_traced"
}

/// The programs and maps of traces that the kernel has.
fn leftovers() -> Vec<String> {
    let list = |what| {
        let output = Command::new("bpftool")
            .args(["--json", what, "show"])
            .output();
        let list: Value = serde_json::from_slice(&output.unwrap().stdout).unwrap();
        list.as_array().unwrap().clone()
    };
    let names = list("prog").into_iter().chain(list("map"));
    let names = names.filter_map(|found| Some(found["name"].as_str()?.to_owned()));
    let traced = [
        "filter_traced",
        "tls_opening_tra",
        "AYA_LOGS",
        "TRACE_BUDGET",
    ];
    names
        .filter(|name| traced.contains(&name.as_str()))
        .collect()
}

#[test]
fn trace_ends_with_its_client_its_time_and_the_agent_and_leaves_nothing() {
    let mut net = enforcing("trace-ends");
    assert_eq!(program(&net, "eth0"), "filter");

    let reader = Reader::start(&net, &["203.0.113.10"]);
    assert!(is_traced(&net));
    let status = net.agent_json(&["status", "--verify"]);
    assert_eq!(status["errors"], json!([]));
    assert_eq!(status["interfaces"][0]["mode"], "native");
    assert_eq!(status["tracing"]["source"], "203.0.113.10/32");
    // One at a time.
    let error = net.agent_error(&["trace", "10.0.0.0/8"]);
    assert!(
        error.contains("a trace of 203.0.113.10/32 is on until") && error.contains("by uid 0"),
        "{error}"
    );
    reader.interrupt();
    assert!(wait_until(|| !is_traced(&net)), "the client is gone");
    net.wait_for_line("trace of 203.0.113.10/32 has ended: its client has ended");

    let reader = Reader::start(&net, &["203.0.113.10"]);
    reader.signal(Signal::SIGKILL);
    assert!(wait_until(|| !is_traced(&net)), "the client is gone");
    drop(reader);

    let mut reader = Reader::start(&net, &["203.0.113.10", "--for", "1s"]);
    assert_eq!(reader.wait_for_end(), "its time is over, 1s");
    assert!(!is_traced(&net));

    // Also where nobody reads it.
    let reader = Reader::start(&net, &["203.0.113.10", "--for", "1s"]);
    reader.signal(Signal::SIGSTOP);
    assert!(wait_until(|| !is_traced(&net)), "its time is over");
    drop(reader);

    let mut reader = Reader::start(&net, &["203.0.113.10"]);
    net.terminate();
    assert_eq!(reader.wait_for_end(), "the agent ends");
    assert_eq!(program(&net, "eth0"), "filter");

    net.start();
    let mut reader = Reader::start(&net, &["203.0.113.10"]);
    net.agent_text(&["detach", "--yes"]);
    assert_eq!(reader.wait_for_end(), "the filter is detached");
    net.wait_for_exit();
    net.assert_detached("eth0");
    net.watch(&[]);
}

#[test]
fn traced_program_is_replaced_by_the_start_after_a_crash() {
    let mut net = enforcing("trace-crash");
    let _echo = net.echo(PORT);
    let reader = Reader::start(&net, &["203.0.113.10"]);
    net.kill();
    let error = reader.fail();
    assert!(
        error.contains("the agent ended in the middle of the trace"),
        "{error}"
    );
    // It goes on enforcing.
    assert!(is_traced(&net));
    net.connect(DENIED4.into(), db(PORT));
    net.start();
    assert_eq!(program(&net, "eth0"), "filter");
    let status = net.agent_json(&["status", "--verify"]);
    assert_eq!(
        (&status["errors"], &status["tracing"]),
        (&json!([]), &json!(null))
    );
    let mut reader = Reader::start(&net, &["203.0.113.10"]);
    net.connect(ALLOWED4.into(), db(PORT));
    reader.wait_for_text("passed");
    reader.interrupt();
    net.terminate();
}

#[test]
fn reload_goes_on_under_a_trace_and_is_told_with_its_new_names() {
    let mut net = enforcing("trace-reload");
    let mut reader = Reader::start(&net, &["198.51.100.7", "--database", "orders"]);
    net.connect(DENIED4.into(), db(PORT));
    reader.wait_for_text("no rule");
    net.watch(&[]);
    let other = dedicated("more", 5433, &ALLOWED, "");
    let orders = dedicated("orders", PORT, &["198.51.100.0/24"], "");
    net.reload(&policy("eth0", "native", &[other, orders]));
    assert!(is_traced(&net));
    net.connect(DENIED4.into(), db(PORT));
    let line = reader.wait_for_text("allowed by");
    assert_eq!(line["rule"], "198.51.100.0/24");
    reader.interrupt();
    net.terminate();
}

/// No packet of a denied source passes and no connection of an allowed one fails, while the programs are switched.
#[test]
fn switching_loses_nothing_and_lets_nothing_through() {
    let mut net = enforcing("trace-switch");
    let _echo = net.echo(PORT);
    net.count_syns(PORT);
    let allowed = Hammer::allowed(&net.client, &[(ALLOWED4.into(), db(PORT))]);
    under_load(6, &[(&allowed, 300)], |_| {
        let reader = Reader::start(&net, &["203.0.113.10"]);
        reader.interrupt();
        assert!(wait_until(|| !is_traced(&net)), "the client is gone");
    });
    allowed.stop();
    net.assert_all_syns_passed();
    let sources = [IpAddr::from(DENIED4)];
    let denied = Hammer::denied(&net.client, &sources.map(|source| (source, db(PORT))));
    under_load(6, &[(&denied, 300)], |_| {
        let reader = Reader::start(&net, &["198.51.100.7"]);
        reader.interrupt();
        assert!(wait_until(|| !is_traced(&net)), "the client is gone");
    });
    denied.stop();
    assert_eq!(net.tripwire(), 0);
    net.terminate();
}

#[test]
fn flood_is_bounded_and_what_was_not_printed_is_counted() {
    const FRAMES: u64 = 3000;
    let mut net = enforcing("trace-flood");
    net.fix_neighbours();
    let wire = net.wire();
    let mut reader = Reader::start(&net, &["198.51.100.0/24"]);
    let frame = Packet::new(&addressing(DENIED4.into(), PORT, Protocol::Tcp), 7).frame();
    let begun = Instant::now();
    for _ in 0..FRAMES {
        wire.send(&frame);
    }
    // None is missing.
    let (mut printed, mut lost) = (0, 0);
    while printed + lost < FRAMES {
        let line = reader.wait_for(|_| true);
        match line["lost"].as_u64() {
            Some(more) => lost += more,
            None => printed += u64::from(line["text"].is_string()),
        }
    }
    assert_eq!(printed + lost, FRAMES);
    let seconds = begun.elapsed().as_secs() + 2;
    assert!(
        lost > 0 && printed <= 100 * seconds,
        "{printed} in {seconds} s, {lost} lost"
    );
    reader.interrupt();
    net.terminate();
}

#[test]
fn what_cannot_be_traced_is_one_clear_line() {
    let mut net = enforcing("trace-refused");
    for (arguments, expected) in [
        (vec!["nowhere"], "trace nowhere: "),
        (vec!["10.0.0.1/8"], "trace 10.0.0.1/8: "),
        (vec!["10.0.0.1", "--database", "other"], "other"),
    ] {
        let error = net.agent_error(&[vec!["trace"], arguments].concat());
        assert!(error.contains(expected), "{error}");
    }
    let output = net.agent(&["trace", "10.0.0.1", "--for", "11m"]);
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(program(&net, "eth0"), "filter");
    net.terminate();
}

/// A start loads neither the traced programs nor their maps.
#[test]
fn nothing_of_a_trace_is_loaded_without_one() {
    // Other tests of this file trace at the same time: the agent's own programs and maps tell.
    let mut net = enforcing("trace-unloaded");
    let loaded = |net: &Net| {
        let descriptors = std::fs::read_dir(format!("/proc/{}/fdinfo", net.agent_pid())).unwrap();
        let texts =
            descriptors.filter_map(|entry| std::fs::read_to_string(entry.unwrap().path()).ok());
        texts
            .filter(|text| text.contains("map_id:") || text.contains("prog_id:"))
            .count()
    };
    let before = loaded(&net);
    let reader = Reader::start(&net, &["10.0.0.1"]);
    assert!(loaded(&net) > before && !leftovers().is_empty());
    reader.interrupt();
    let is_unloaded = wait_until(|| loaded(&net) == before);
    assert!(is_unloaded, "{} instead of {before}", loaded(&net));
    net.terminate();
}
