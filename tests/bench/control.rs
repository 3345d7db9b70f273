//! The agent itself: how long a change takes, and what memory it wants.

use std::{
    fs,
    path::PathBuf,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use filter_tests::net::{DENIED4, Net, dedicated, policy};
use ipnet::IpNet;
use serde_json::Value;

use crate::{
    report::{Measure, Report},
    traffic::PORT,
};

const SECTION: &str = "agent";

/// Starts, reloads and kills the agent with these IPv4 networks, twice as many of them known.
pub fn measure(report: &mut Report, networks: &[IpNet], rounds: usize) -> Result<()> {
    let count = networks.len() / 2;
    let mut net = Net::new("bench-agent");
    net.remove_tripwire();
    let lists = [&networks[..count], &networks[count..]];
    for (number, list) in lists.iter().enumerate() {
        let lines: String = list.iter().map(|network| format!("{network}\n")).collect();
        fs::write(list_file(&net, number), lines)?;
    }
    let most = (count + 16).to_string();
    let start = |net: &mut Net| {
        let begin = Instant::now();
        net.start_with(&["--max-prefixes", &most]);
        begin.elapsed()
    };
    let megabytes = |kib: u64| (kib * 1024) as f64 / 1e6;
    let mut times: [Vec<Duration>; 5] = Default::default();
    let [cold, warm, one, one_in_agent, all] = &mut times;
    let (mut peaks, mut residents) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        net.write_policy(&text(&net, 0, 1));
        cold.push(start(&mut net));
        for address in 0..5 {
            let (wall, agent) = reload(&net, &text(&net, 0, 2 + address))?;
            one.push(wall);
            one_in_agent.push(agent);
        }
        for list in [1, 0] {
            all.push(reload(&net, &text(&net, list, 1))?.0);
        }
        // Of an agent that has had all of it: one that is started over its maps wants less.
        // The agent gives memory back once a second, after changes.
        thread::sleep(Duration::from_secs(2));
        let (peak, resident) = net.memory();
        peaks.push(megabytes(peak));
        residents.push(megabytes(resident));
        net.kill();
        warm.push(start(&mut net));
        if round + 1 < rounds {
            net.agent_text(&["detach", "--yes"]);
            net.wait_for_exit();
        }
    }
    let mut record = |name: &str, unit: &'static str, values: Vec<f64>| {
        let measure = Measure::new(SECTION, name, unit, &values);
        report.record(measure.with_prefixes(count));
    };
    for (name, times) in [
        "started, to enforced",
        "started again over its maps, to enforced",
        "reload, one rule changed",
        "the same, from the file read to enforced",
        "reload, every prefix changed",
    ]
    .into_iter()
    .zip(times)
    {
        let milliseconds = times.iter().map(|time| time.as_secs_f64() * 1e3);
        record(name, "ms", milliseconds.collect());
    }
    record("resident", "MB", residents);
    record("resident at most", "MB", peaks);
    record("maps", "MB", vec![maps(&net)? / 1e6]);
    net.agent_text(&["detach", "--yes"]);
    net.wait_for_exit();
    Ok(())
}

fn list_file(net: &Net, number: usize) -> PathBuf {
    net.dir().join(format!("list{number}.txt"))
}

/// Everything in one of the lists, and one more address.
fn text(net: &Net, list: usize, address: u8) -> String {
    let address = format!("198.18.0.{address}/32");
    let database = dedicated("d", PORT, &[&address], "");
    let database = database.replace("rules: [", "rules: [{region: r}, ");
    let file = list_file(net, list);
    format!(
        "regions: {{r: {{file: {}, max_prefixes: 10000000}}}}\n{}",
        file.display(),
        policy("eth0", "native", &[database])
    )
}

/// How long `reload` took: the command, and from the file read to its policy enforced.
fn reload(net: &Net, policy: &str) -> Result<(Duration, Duration)> {
    net.write_policy(policy);
    let begin = Instant::now();
    let output = net.agent(&["reload", "--json"]);
    let wall = begin.elapsed();
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "reload fails: {stderr}");
    let reloaded: Value = serde_json::from_slice(&output.stdout)?;
    let agent = reloaded["enforced"]["enforced_ms"].as_f64();
    let agent = agent.context("find the time in what reload says")?;
    // It was in force when the command ended: whom no rule allows is not let in.
    let explained = net.agent_json(&["explain", &DENIED4.to_string()]);
    ensure!(explained.to_string().contains("not-allowed"), "{explained}");
    Ok((wall, Duration::from_secs_f64(agent / 1e3)))
}

/// What the kernel holds for the pinned maps, in bytes.
fn maps(net: &Net) -> Result<f64> {
    let mut bytes = 0.0;
    for layout in fs::read_dir(net.bpffs().join("filter-agent"))? {
        let layout = layout?.path();
        if !layout.is_dir() {
            continue;
        }
        for pin in fs::read_dir(&layout)? {
            let pin = pin?.path();
            let mut show = Command::new("bpftool");
            show.args(["--json", "map", "show", "pinned"]).arg(&pin);
            // Links are pinned beside the maps.
            if let Ok(map) = serde_json::from_slice::<Value>(&show.output()?.stdout) {
                bytes += map["bytes_memlock"].as_f64().unwrap_or_default();
            }
        }
    }
    ensure!(bytes > 0.0, "bpftool finds no maps");
    Ok(bytes)
}
