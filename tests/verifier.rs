//! The loaded programs: what the verifier makes of them, and the memory they use.

use std::process::Command;

use filter_agent::kernel::{filter::Filter, probe::frame, traced::Traced};
use filter_common::Protocol;
use filter_tests::{bpffs::Bpffs, loaded::Loaded};
use serde_json::Value;

/// Instructions that the verifier may follow, of the million it would: a change that doubles them is a mistake. Linux
/// 6.18 follows some 75,000 and 21,000.
const MOST: [u32; 2] = [150_000, 50_000];
/// The same for the programs that a trace loads.
const MOST_TRACED: [u32; 2] = [250_000, 50_000];

#[test]
fn programs_stay_far_below_the_verifiers_limit() {
    let bpffs = Bpffs::mount();
    let mut filter = Filter::open(bpffs.path(), Some(1024)).unwrap();
    let followed = filter.verified_instructions().unwrap();
    let [interfaces, sockets] = followed;
    println!(
        "instructions verified: {interfaces} of the program at interfaces, {sockets} at sockets"
    );
    assert!(interfaces <= MOST[0] && sockets <= MOST[1], "{followed:?}");
    let traced = Traced::load(&filter.trace_place(), "0.0.0.0/0".parse().unwrap()).unwrap();
    let followed = traced.verified_instructions().unwrap();
    let [interfaces, sockets] = followed;
    println!(
        "instructions verified for a trace: {interfaces} of the program at interfaces, {sockets} at sockets"
    );
    assert!(
        interfaces <= MOST_TRACED[0] && sockets <= MOST_TRACED[1],
        "{followed:?}"
    );
}

fn bpftool(arguments: &str) -> Value {
    let mut command = Command::new("bpftool");
    command.arg("--json").args(arguments.split(' '));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{arguments}: {output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Fault B17: a packet that interrupted one of the agent's test runs overwrote the segment that the test run went on
/// judging.
#[test]
fn test_runs_have_a_segment_of_their_own_which_no_packet_overwrites() {
    let loaded = Loaded::new(
        "interfaces: [eth0]\ndatabases:\n  - {name: a, port: 1, engine: redis, model: dedicated, rules: \
         [{cidr: 192.0.2.0/24}]}\n",
    );
    let addresses = ["192.0.2.7", "10.0.0.9"].map(|address| address.parse().unwrap());
    let mut syn = frame(Protocol::Tcp, addresses[0], addresses[1], 1);
    // The flags.
    syn[14 + 20 + 13] = 2;
    assert!(loaded.filter.run_packet(&syn).unwrap().passes());
    let program = loaded.filter.program_id().unwrap();
    let program = bpftool(&format!("prog show id {program}"));
    let maps = program["map_ids"].as_array().unwrap();
    let name = |id: &Value| bpftool(&format!("map show id {id}"))["name"].clone();
    let id = maps.iter().find(|id| name(id) == "SCRATCH").unwrap();
    // The record of packets, then that of test runs.
    let is_used = |record: &Value| {
        let of_cpus = record["values"].as_array().unwrap().iter();
        let mut bytes = of_cpus.flat_map(|of_cpu| of_cpu["value"].as_array().unwrap());
        bytes.any(|byte| byte != "0x00")
    };
    let records = bpftool(&format!("map dump id {id}"));
    let used: Vec<bool> = records.as_array().unwrap().iter().map(is_used).collect();
    assert_eq!(used, [false, true]);
}
