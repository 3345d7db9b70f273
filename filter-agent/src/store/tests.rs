use std::{
    os::unix::fs::{PermissionsExt as _, symlink},
    sync::mpsc::channel,
};

use super::*;

fn region(name: &str, prefix: &str) -> Write {
    Write::Region {
        name: name.into(),
        source: source().into(),
        set: set(prefix).into(),
    }
}

fn source() -> RegionSource {
    RegionSource::File("/etc/office.txt".into())
}

fn set(prefix: &str) -> Set {
    Set {
        members: [prefix.parse().unwrap()].into(),
        held: Vec::new(),
        retiring: Vec::new(),
        confirmed: "2026-01-01T00:00:00Z".parse().unwrap(),
        serial: None,
        version: None,
        shrunk: None,
        incomplete: None,
        merged: Default::default(),
        prefixes: Default::default(),
    }
}

fn error<T: std::fmt::Debug>(result: Result<T>) -> String {
    format!("{:#}", result.unwrap_err())
}

#[test]
fn file_of_somebody_else_or_open_to_others_is_ignored() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let read = |name| read_region(directory, name, &source());
    assert!(read("office").unwrap().is_none());
    write(directory, &region("office", "192.0.2.0/24")).unwrap();
    assert_eq!(read("office").unwrap(), Some(set("192.0.2.0/24")));
    let path = region_path(directory, "office");
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    fs::set_permissions(&path, fs::Permissions::from_mode(0o622)).unwrap();
    let open = error(read("office"));
    assert!(open.contains("others could have written it"), "{open}");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    symlink(&path, region_path(directory, "other")).unwrap();
    let link = error(read("other"));
    assert!(link.contains("it is not a regular file"), "{link}");
}

/// Fault A8: pruning removed what another write had not finished.
#[test]
fn unused_regions_are_removed_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    for name in ["office", "old"] {
        write(directory, &region(name, "192.0.2.0/24")).unwrap();
    }
    let unfinished = directory.join("regions/.tmpAbCdEf");
    fs::write(&unfinished, "half").unwrap();
    write(directory, &Write::Regions(["office".into()].into())).unwrap();
    assert!(region_path(directory, "office").exists());
    assert!(!region_path(directory, "old").exists());
    assert!(unfinished.exists());
    drop(Store::open(directory, |error| panic!("{error:#}")).unwrap());
    assert!(!unfinished.exists());
}

/// Fault B11.
#[test]
fn second_agent_is_refused_the_directory() {
    let directory = tempfile::tempdir().unwrap();
    let first = Store::open(directory.path(), |error| panic!("{error:#}")).unwrap();
    let second = Store::open(directory.path(), |error| panic!("{error:#}"));
    assert!(error(second.map(drop)).contains("another filter-agent keeps its state in"));
    assert!(error(forget_confirmed(directory.path())).contains("another filter-agent"));
    drop(first);
    drop(Store::open(directory.path(), |error| panic!("{error:#}")).unwrap());
}

/// A state directory that was removed under a running agent was used without a lock from then on.
#[test]
fn directory_that_was_removed_is_locked_again() {
    let base = tempfile::tempdir().unwrap();
    let place = base.path().join("state");
    let store = Store::open(&place, |error| panic!("{error:#}")).unwrap();
    let (done, written) = channel();
    store
        .start(move |_, result| done.send(result.is_ok()).unwrap())
        .unwrap();
    let confirm = || store.save(Write::Confirmed(Some(Confirmed::default())));
    for _ in 0..2 {
        confirm();
        assert!(written.recv().unwrap());
        let second = Store::open(&place, |error| panic!("{error:#}"));
        assert!(error(second.map(drop)).contains("another filter-agent"));
        fs::remove_dir_all(&place).unwrap();
    }
    let other = Store::open(&place, |error| panic!("{error:#}")).unwrap();
    confirm();
    assert!(!written.recv().unwrap());
    drop(other);
}

/// A user who can write the directory can replace the confirmed policy with an old one.
#[test]
fn directory_that_others_can_write_is_not_used() {
    let base = tempfile::tempdir().unwrap();
    fs::set_permissions(base.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let mut warning = String::new();
    Store::open(base.path(), |error| warning = format!("{error:#}")).unwrap();
    assert!(warning.contains("others could replace"), "{warning}");
    let error = error(forget_confirmed(base.path()));
    assert!(error.contains("others could replace"), "{error}");
}

/// `detach` beside an agent that was ending found the pins free, the state directory not, and failed half way.
#[test]
fn confirmed_policy_is_removed_when_an_ending_agent_lets_go() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    write(path, &Write::Confirmed(Some(Confirmed::default()))).unwrap();
    let store = Store::open(path, |error| panic!("{error:#}")).unwrap();
    thread::scope(|scope| {
        let forgotten = scope.spawn(|| forget_confirmed(path));
        // Long enough for a first attempt; an attempt after the drop succeeds as well.
        thread::sleep(LOCK_PAUSE);
        drop(store);
        forgotten.join().unwrap().unwrap();
    });
    assert_eq!(read_confirmed(path).unwrap(), None);
}

/// Each attempt at a directory that takes no file was logged, since each error named another temporary file.
#[test]
fn error_of_a_directory_that_takes_no_file_is_the_same_each_time() {
    // Nothing can be made there, by root either.
    let directory = Path::new("/proc/self");
    let attempt = || {
        error(write(
            directory,
            &Write::Confirmed(Some(Confirmed::default())),
        ))
    };
    assert_eq!(attempt(), attempt());
}

/// Fault B19: what waited for a disk that hangs grew without end.
#[test]
fn latest_version_is_written_and_the_ones_before_it_are_not() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path(), |error| panic!("{error:#}")).unwrap();
    for number in 0..1000 {
        store.save(region("office", &format!("192.0.{}.0/24", number % 250)));
    }
    store.save(region("office", "198.51.100.0/24"));
    store.save(Write::Confirmed(None));
    let (done, written) = channel();
    store
        .start(move |write, result| done.send((write.record(), result.is_ok())).unwrap())
        .unwrap();
    assert!(store.finish(Duration::from_secs(60)));
    let office = Record::Region("office".into());
    let written: Vec<_> = written.try_iter().collect();
    assert_eq!(written, [(Record::Confirmed, true), (office, true)]);
    let read = read_region(directory.path(), "office", &source()).unwrap();
    assert_eq!(read, Some(set("198.51.100.0/24")));
}

#[test]
fn sets_of_the_versions_before_are_of_the_same_source() {
    let regions = [
        (
            "dns: [egress.example.net]",
            r#"{"dns":{"names":["egress.example.net"],"nameservers":[],"dnssec":false,"trust_anchor":null,"ca_file":null}}"#,
        ),
        (
            "dns: [egress.example.net], nameservers: [192.0.2.53]",
            r#"{"dns":{"names":["egress.example.net"],"nameservers":[{"address":"192.0.2.53","port":null,"transport":"plain"}],"dnssec":false,"trust_anchor":null,"ca_file":null}}"#,
        ),
        (
            "url: 'https://example.net/'",
            r#"{"url":{"url":"https://example.net/","select":{"format":"text"},"insecure":false,"ca_file":null}}"#,
        ),
        (
            "url: 'https://example.net/', select: {format: geofeed, country: FR}",
            r#"{"url":{"url":"https://example.net/","select":{"format":"digitalocean","country":"FR","region":null,"city":null},"insecure":false,"ca_file":null}}"#,
        ),
        ("file: /etc/office.txt", r#"{"file":"/etc/office.txt"}"#),
    ];
    for (fields, expected) in regions {
        let text = format!("interfaces: [eth0]\ndatabases: []\nregions: {{x: {{{fields}}}}}");
        let policy = crate::policy::parse(&text).unwrap().0;
        let source = serde_json::to_string(&policy.regions["x"].source).unwrap();
        assert_eq!(source, expected);
    }
}

#[test]
fn directory_that_cannot_be_made_yet_is_taken_when_it_can() {
    let base = tempfile::tempdir().unwrap();
    let place = base.path().join("state");
    fs::write(&place, "in the way").unwrap();
    let mut warned = false;
    let store = Store::open(&place, |_| warned = true).unwrap();
    assert!(warned);
    let (done, written) = channel();
    store
        .start(move |_, result| done.send(result.is_ok()).unwrap())
        .unwrap();
    store.save(Write::Confirmed(Some(Confirmed::default())));
    assert!(!written.recv().unwrap());
    fs::remove_file(&place).unwrap();
    store.save(Write::Confirmed(Some(Confirmed::default())));
    assert!(written.recv().unwrap());
    let expected = Confirmed {
        machine: machine(),
        ..Confirmed::default()
    };
    assert!(expected.machine.is_some() && !expected.is_of_another_machine());
    assert_eq!(read_confirmed(&place).unwrap(), Some(expected));
    let elsewhere = Confirmed {
        machine: Some("0".repeat(32)),
        ..Confirmed::default()
    };
    assert!(elsewhere.is_of_another_machine());
    assert!(!Confirmed::default().is_of_another_machine());
    let second = Store::open(&place, |error| panic!("{error:#}"));
    assert!(error(second.map(drop)).contains("another filter-agent"));
}
