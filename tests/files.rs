//! Region files: programs that write them, links on the way to them, and file systems that hang.

use std::{
    fs::{self, File},
    io::Write as _,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use filter_tests::{
    mounts::Mounted,
    net::{Net, wait_until},
};
use serde_json::Value;

/// The database `orders`, open to region `x`, which is a file.
fn policy(file: &Path, more: &str) -> String {
    format!(
        "interfaces: [eth0]
regions:
  x: {{file: {}, {more}}}
databases:
  - {{name: orders, port: 5432, model: dedicated, force_tls: false, rules: [{{region: x}}]}}
",
        file.display()
    )
}

/// A file in a folder of its own, with these lines.
fn file(net: &Net, text: &str) -> PathBuf {
    let folder = net.dir().join("lists");
    fs::create_dir(&folder).unwrap();
    let file = folder.join("office.txt");
    fs::write(&file, text).unwrap();
    file
}

fn region(net: &Net) -> Value {
    net.agent_json(&["regions"])["regions"]
        .as_array()
        .unwrap()
        .iter()
        .find(|region| region["name"] == "x")
        .unwrap()
        .clone()
}

fn prefixes(net: &Net) -> Vec<String> {
    let region = region(net);
    let prefixes = region["prefixes"].as_array().unwrap();
    let text = |prefix: &Value| prefix.as_str().unwrap().to_owned();
    prefixes.iter().map(text).collect()
}

fn wait_for_prefixes(net: &Net, expected: &[&str]) {
    let arrived = wait_until(|| prefixes(net) == expected);
    assert!(arrived, "{expected:?}: {}", region(net));
}

fn wait_for_error(net: &Net, expected: &str) {
    let named = wait_until(|| {
        let region = region(net);
        let text = region["error"]["text"].as_str().unwrap_or_default();
        region["failing"] == true && text.contains(expected)
    });
    assert!(named, "{expected}: {}", region(net));
}

#[test]
fn file_is_read_when_it_changes_however_it_does() {
    let mut net = Net::new("file-change");
    let file = file(&net, "192.0.2.1/32\n");
    let folder = file.parent().unwrap();
    net.write_policy(&policy(&file, "max_refresh: 1h"));
    net.start();
    assert_eq!(prefixes(&net), ["192.0.2.1/32"]);
    fs::write(&file, "192.0.2.2/32\n").unwrap();
    wait_for_prefixes(&net, &["192.0.2.2/32"]);

    let replace = |text: &str| {
        fs::write(folder.join("next"), text).unwrap();
        fs::rename(folder.join("next"), &file).unwrap();
    };
    replace("192.0.2.3/32\n");
    wait_for_prefixes(&net, &["192.0.2.3/32"]);
    for (text, expected) in [
        ("<html>\n", "line 1: \"<html>\" is not a"),
        ("", "holds no prefix"),
        ("192.0.2.0\n", "write 192.0.2.0/32"),
        ("0.0.0.0/0\n", "broader than /8"),
        ("10.0.0.0/8\n", "`private: true`"),
    ] {
        replace(text);
        wait_for_error(&net, expected);
        assert_eq!(prefixes(&net), ["192.0.2.3/32"]);
    }
    fs::remove_file(&file).unwrap();
    wait_for_error(&net, "No such file");
    assert_eq!(prefixes(&net), ["192.0.2.3/32"]);
    // Fault D8: empty is right where the policy says so, and only there.
    replace("# nobody today\n");
    wait_for_error(&net, "holds no prefix");
    net.reload(&policy(&file, "max_refresh: 1h, allow_empty: true"));
    wait_for_prefixes(&net, &[]);
    replace("192.0.2.3/32\n");
    wait_for_prefixes(&net, &["192.0.2.3/32"]);

    // Behind a symbolic link that is replaced, in a directory of its own.
    for version in ["one", "two"] {
        fs::create_dir(folder.join(version)).unwrap();
    }
    fs::write(folder.join("one/list"), "192.0.2.4/32\n").unwrap();
    fs::write(folder.join("two/list"), "192.0.2.5/32\n").unwrap();
    symlink("one", folder.join("current")).unwrap();
    symlink("current/list", folder.join("next")).unwrap();
    fs::rename(folder.join("next"), &file).unwrap();
    wait_for_prefixes(&net, &["192.0.2.4/32"]);
    symlink("two", folder.join("next")).unwrap();
    fs::rename(folder.join("next"), folder.join("current")).unwrap();
    wait_for_prefixes(&net, &["192.0.2.5/32"]);
    fs::write(folder.join("two/list"), "192.0.2.6/32\n").unwrap();
    wait_for_prefixes(&net, &["192.0.2.6/32"]);
}

#[test]
fn list_that_a_program_writes_line_by_line_is_enforced_whole() {
    let mut net = Net::new("file-lines");
    let path = file(&net, "192.0.2.1/32\n");
    net.write_policy(&policy(&path, "max_refresh: 1h"));
    net.start();
    let mut list = File::create(&path).unwrap();
    let lines = ["198.51.100.1/32", "198.51.100.3/32", "198.51.100.5/32"];
    for line in lines {
        writeln!(list, "{line}").unwrap();
        // Other files of the directory come and go, and somebody asks for a look.
        fs::write(path.with_extension("new"), line).unwrap();
        fs::remove_file(path.with_extension("new")).unwrap();
        let output = net.agent(&["refresh", "x"]);
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("a program is still writing it"), "{text}");
        assert_eq!(prefixes(&net), ["192.0.2.1/32"]);
    }
    drop(list);
    wait_for_prefixes(&net, &lines);
    assert_eq!(region(&net)["failing"], false);
}

/// Half of a list replaced the kept set at a start, and a program that hung refused every reload.
#[test]
fn program_that_hangs_with_the_file_open_keeps_the_set_and_holds_up_no_reload() {
    let mut net = Net::new("file-hung-writer");
    let path = file(&net, "192.0.2.1/32\n192.0.2.3/32\n");
    let text = policy(&path, "max_refresh: 1h");
    net.write_policy(&text);
    net.start();
    let both = ["192.0.2.1/32", "192.0.2.3/32"];
    assert_eq!(prefixes(&net), both);
    let kept = net.state_dir().join("regions/x.json");
    assert!(wait_until(|| kept.exists()));
    net.terminate();
    let mut list = File::create(&path).unwrap();
    writeln!(list, "192.0.2.5/32").unwrap();
    net.start();
    wait_for_error(&net, "a program is still writing it");
    assert_eq!(prefixes(&net), both);
    net.reload(&text.replace("max_refresh: 1h", "max_refresh: 2h"));
    wait_for_error(&net, "a program is still writing it");
    assert_eq!(prefixes(&net), both);
    drop(list);
    wait_for_prefixes(&net, &["192.0.2.5/32"]);
    // Nobody closes the file after truncate(2).
    fs::write(&path, "192.0.2.5/32\n192.0.2.7/32\n").unwrap();
    wait_for_prefixes(&net, &["192.0.2.5/32", "192.0.2.7/32"]);
    nix::unistd::truncate(&path, 13).unwrap();
    net.reload(&text);
    assert_eq!(prefixes(&net), ["192.0.2.5/32"]);
    assert_eq!(region(&net)["failing"], false);
}

#[test]
fn link_with_a_hop_in_a_third_directory_is_followed_when_any_hop_changes() {
    let mut net = Net::new("file-hops");
    let path = net.dir().join("etc/office.txt");
    let folder = net.dir().to_owned();
    let directory = |name: &str| folder.join(name);
    for name in ["etc", "hop", "releases/1", "releases/2"] {
        fs::create_dir_all(directory(name)).unwrap();
    }
    fs::write(directory("releases/1/list"), "192.0.2.1/32\n").unwrap();
    fs::write(directory("releases/2/list"), "192.0.2.2/32\n").unwrap();
    symlink("releases/1", directory("current")).unwrap();
    symlink(directory("current/list"), directory("hop/list")).unwrap();
    symlink(directory("hop/list"), &path).unwrap();
    net.write_policy(&policy(&path, "max_refresh: 1h"));
    net.start();
    assert_eq!(prefixes(&net), ["192.0.2.1/32"]);
    let swap = |target: &str, link: &str| {
        symlink(target, directory("next")).unwrap();
        fs::rename(directory("next"), directory(link)).unwrap();
    };
    swap("releases/2", "current");
    wait_for_prefixes(&net, &["192.0.2.2/32"]);
    swap("../releases/1/list", "hop/list");
    wait_for_prefixes(&net, &["192.0.2.1/32"]);
    fs::rename(directory("releases"), directory("old")).unwrap();
    wait_for_error(&net, "No such file");
    fs::create_dir_all(directory("new/1")).unwrap();
    fs::write(directory("new/1/list"), "192.0.2.3/32\n").unwrap();
    fs::rename(directory("new"), directory("releases")).unwrap();
    wait_for_prefixes(&net, &["192.0.2.3/32"]);
}

#[test]
fn file_system_that_hangs_holds_up_nothing_but_its_region() {
    let mut net = Net::new("file-hang");
    let path = file(&net, "192.0.2.1/32\n");
    let folder = path.parent().unwrap();
    net.write_policy(&policy(
        &path,
        "timeout: 1s, min_refresh: 1h, max_refresh: 1h",
    ));
    net.start();
    assert_eq!(prefixes(&net), ["192.0.2.1/32"]);
    let hanging = Mounted::hanging(folder);
    for _ in 0..3 {
        let output = net.agent(&["refresh", "x"]);
        let text = String::from_utf8(output.stdout).unwrap();
        let expected = format!("read {}: no answer within 1s", path.display());
        assert!(text.contains(&expected), "{text}");
        assert_eq!(prefixes(&net), ["192.0.2.1/32"]);
    }
    // One thread waits for the file, however often it was tried.
    let status = net.agent_json(&["status"]);
    let tasks = format!("/proc/{}/task", status["pid"]);
    let tasks = fs::read_dir(tasks)
        .unwrap()
        .map(|task| task.unwrap().path());
    let names = tasks.map(|task| fs::read_to_string(task.join("comm")).unwrap());
    assert_eq!(names.filter(|name| name.trim() == "read-file").count(), 1);
    drop(hanging);
    fs::write(&path, "192.0.2.2/32\n").unwrap();
    let refreshed = wait_until(|| net.agent(&["refresh", "x"]).status.success());
    assert!(refreshed, "{}", region(&net));
    assert_eq!(prefixes(&net), ["192.0.2.2/32"]);
    // Nor does it hold up the end.
    let _hanging = Mounted::hanging(folder);
    net.agent(&["refresh", "x"]);
    net.terminate();
}

#[test]
fn file_that_changes_without_an_event_is_seen_within_max_refresh() {
    let mut net = Net::new("file-silent");
    let path = file(&net, "192.0.2.1/32\n");
    net.write_policy(&policy(&path, "max_refresh: 1s"));
    net.start();
    assert_eq!(prefixes(&net), ["192.0.2.1/32"]);
    assert_ne!(region(&net)["next"], Value::Null);
    // As a file that another host changes: nothing is announced.
    let other = net.dir().join("other");
    fs::write(&other, "192.0.2.2/32\n").unwrap();
    let _mounted = Mounted::bind(&other, &path);
    wait_for_prefixes(&net, &["192.0.2.2/32"]);
}
