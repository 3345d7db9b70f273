//! What the kernel holds after an apply that succeeds, and after one that is refused half way.

use std::{net::IpAddr, path::PathBuf, process::Command};

use aya::maps::{LpmTrie, Map, MapData, lpm_trie::Key};
use filter_agent::{
    clock::{BootTime, Clock},
    compile::{Compiled, compile},
    kernel::{
        apply::{NotTakenBack, Unknown},
        difference::Difference,
        filter::Filter,
        probe::{frame, probes},
    },
    policy,
    prefixes::Prefixes,
    rules::Regions,
    temporary::Timed,
};
use filter_common::{LAYOUT, Protocol, Reason, SECTION_BITS, Section, Source4};
use filter_tests::bpffs::Bpffs;
use ipnet::IpNet;

fn compiled(databases: &str) -> Compiled {
    let text = format!("interfaces: [eth0]\ndatabases:\n{databases}");
    let (policy, _) = policy::parse(&text).unwrap_or_else(|problems| panic!("{problems:?}"));
    compile(
        &policy,
        &Regions::new(),
        &Timed::of(&policy, Clock::start().now()),
    )
}

/// A database on as many ports of as many local addresses as the map has room for.
fn wide(name: &str, network: u8, rule: &str) -> Compiled {
    let addresses: Vec<String> = (1..=128)
        .map(|host| format!("10.0.{network}.{host}"))
        .collect();
    let ports: Vec<String> = (1..=128).map(|port: u16| port.to_string()).collect();
    compiled(&format!(
        "  - {{name: {name}, model: dedicated, force_tls: false, ports: [{}], addresses: [{}], \
         rules: [{{cidr: {rule}}}]}}\n",
        ports.join(", "),
        addresses.join(", ")
    ))
}

/// A database that 4,000 hosts of a network may reach.
fn many(network: u8) -> Compiled {
    let mut compiled = compiled(&format!(
        "  - {{name: a, port: 1, model: dedicated, force_tls: false, rules: [{{cidr: 10.{network}.0.0/16}}]}}\n"
    ));
    let hosts = (0..4_000_u16).map(|host| {
        let [high, low] = (host * 2).to_be_bytes();
        IpNet::from(IpAddr::from([10, network, high, low]))
    });
    let hosts: Vec<IpNet> = hosts.collect();
    compiled.databases.get_mut("a").unwrap().lists = vec![(0, Prefixes::shared(hosts))];
    compiled
}

fn passes(filter: &Filter, source: &str, destination: &str) -> bool {
    let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
    filter
        .run_packet(&frame(Protocol::Tcp, source, destination, 1))
        .unwrap()
        .passes()
}

fn pin(bpffs: &Bpffs, name: &str) -> PathBuf {
    bpffs.path().join(format!("filter-agent/v{LAYOUT}/{name}"))
}

/// Lets the kernel refuse every further write to a map.
fn freeze(bpffs: &Bpffs, name: &str) {
    let mut command = Command::new("bpftool");
    command.args(["map", "freeze", "pinned"]);
    assert!(command.arg(pin(bpffs, name)).status().unwrap().success());
}

/// One database on port 1 of all addresses, and one on a local address.
fn two(rule: &str, address: &str) -> Compiled {
    compiled(&format!(
        "  - {{name: a, port: 1, model: dedicated, force_tls: false, rules: [{{cidr: {rule}}}]}}
  - {{name: b, port: 2, model: dedicated, force_tls: false, addresses: [{address}], rules: []}}\n"
    ))
}

#[test]
fn refused_undo_takes_back_what_it_can_and_the_maps_are_read_again() {
    let bpffs = Bpffs::mount();
    let mut filter = Filter::open(bpffs.path(), Some(100)).unwrap();
    let old = two("192.0.2.0/24", "10.0.0.1");
    filter.apply(&old).unwrap();
    let applied = filter.apply(&two("198.51.100.0/24", "10.0.0.2")).unwrap();
    freeze(&bpffs, "LOCAL_GUARDS");
    let error = filter.undo(applied).unwrap_err();
    assert!(
        error.is::<NotTakenBack>() && !error.is::<Unknown>(),
        "{error:#}"
    );
    assert!(passes(&filter, "192.0.2.7", "10.0.0.9"));
    assert!(!passes(&filter, "198.51.100.7", "10.0.0.9"));
    // The agent knows what is left, as the next one does.
    let left = filter.plan(&old).unwrap().difference;
    assert_eq!(left.databases["b"].unguarded, ["10.0.0.2 tcp/2"]);
    assert_eq!(left.databases["b"].guarded, ["10.0.0.1 tcp/2"]);
    assert_eq!(left.databases.len(), 1, "{left:?}");
    drop(filter);
    let next = Filter::open(bpffs.path(), None).unwrap();
    assert_eq!(next.plan(&old).unwrap().difference, left);
}

#[test]
fn change_refused_at_a_map_that_takes_no_write_is_taken_back_whole() {
    let bpffs = Bpffs::mount();
    let mut filter = Filter::open(bpffs.path(), Some(100)).unwrap();
    let old = two("192.0.2.0/24", "10.0.0.1");
    filter.apply(&old).unwrap();
    freeze(&bpffs, "LOCAL_GUARDS");
    let error = filter
        .apply(&two("198.51.100.0/24", "10.0.0.2"))
        .unwrap_err();
    assert!(
        !error.is::<NotTakenBack>() && !error.is::<Unknown>(),
        "{error:#}"
    );
    assert_eq!(filter.plan(&old).unwrap().difference, Difference::default());
    assert!(!passes(&filter, "198.51.100.7", "10.0.0.9"));
    drop(filter);
    let next = Filter::open(bpffs.path(), None).unwrap();
    assert_eq!(next.plan(&old).unwrap().difference, Difference::default());
}

#[test]
fn refused_reload_keeps_hits_and_counts() {
    let bpffs = Bpffs::mount();
    let mut filter = Filter::open(bpffs.path(), Some(100)).unwrap();
    let databases = |rule: &str, a_tls: bool, b_tls: bool, address: &str| {
        compiled(&format!(
            "  - {{name: a, port: 1, model: dedicated, engine: mysql, force_tls: {a_tls}, \
                   rules: [{{cidr: {rule}}}]}}
  - {{name: b, port: 2, model: dedicated, engine: mysql, force_tls: {b_tls}, \
                   addresses: [{address}], rules: []}}\n"
        ))
    };
    let old = databases("192.0.2.0/24", true, false, "10.0.0.1");
    filter.apply(&old).unwrap();
    filter.set_judged(true).unwrap();
    for _ in 0..3 {
        passes(&filter, "192.0.2.7", "10.0.0.9");
        passes(&filter, "203.0.113.7", "10.0.0.9");
    }
    let state = |filter: &Filter| (filter.hits().unwrap(), filter.counts().unwrap());
    let before = state(&filter);
    assert_eq!(before.0.values().sum::<u64>(), 3);
    // An interface that cannot be attached refuses a change that the maps took.
    let applied = filter
        .apply(&databases("198.51.100.0/24", false, true, "10.0.0.1"))
        .unwrap();
    let allowed = (Some("a".to_owned()), Reason::Allowed, false);
    assert_eq!(filter.counts().unwrap()[&allowed], 3);
    filter.undo(applied).unwrap();
    assert_eq!(state(&filter), before);
    // The kernel refuses a write.
    freeze(&bpffs, "LOCAL_GUARDS");
    filter
        .apply(&databases("198.51.100.0/24", true, true, "10.0.0.2"))
        .unwrap_err();
    assert_eq!(state(&filter), before);
}

#[test]
fn apply_that_the_kernel_refuses_half_way_is_undone() {
    let bpffs = Bpffs::mount();
    let mut filter = Filter::open(bpffs.path(), Some(100)).unwrap();
    let old = wide("old", 1, "192.0.2.0/24");
    filter.apply(&old).unwrap();
    let error = filter
        .apply(&wide("new", 2, "198.51.100.0/24"))
        .unwrap_err();
    let error = format!("{error:#}");
    assert!(error.contains("16384"), "{error}");

    let unchanged = |filter: &Filter| {
        assert!(passes(filter, "192.0.2.7", "10.0.1.1"));
        assert!(!passes(filter, "198.51.100.7", "10.0.1.1"));
        assert!(!passes(filter, "203.0.113.7", "10.0.1.128"));
        assert!(passes(filter, "203.0.113.7", "10.0.2.1"));
        assert_eq!(filter.plan(&old).unwrap().difference, Difference::default());
    };
    unchanged(&filter);
    drop(filter);
    // What a new agent reads from the kernel is the old policy, and nothing of the new one.
    unchanged(&Filter::open(bpffs.path(), None).unwrap());
}

#[test]
fn prefixes_that_do_not_fit_half_way_are_taken_back_however_many() {
    let bpffs = Bpffs::mount();
    let open = || Filter::open(bpffs.path(), Some(5_000)).unwrap();
    let mut filter = open();
    let (old, new) = (many(1), many(2));
    filter.apply(&old).unwrap();
    let map = Map::LpmTrie(MapData::from_pin(pin(&bpffs, "ALLOWED4")).unwrap());
    let mut trie: LpmTrie<_, Source4, u32> = map.try_into().unwrap();
    let others = (0..3_000_u16).map(|host| {
        let [high, low] = host.to_be_bytes();
        let address = [192, 0, high, low];
        let section = Section::rules(99);
        Key::new(SECTION_BITS + 32, Source4 { section, address })
    });
    let others: Vec<_> = others.collect();
    for key in &others {
        trie.insert(key, 0, 0).unwrap();
    }
    let error = format!("{:#}", filter.apply(&new).unwrap_err());
    assert!(
        error.starts_with("write the policy to the kernel: write prefix 10.2."),
        "{error}"
    );
    for key in &others {
        trie.remove(key).unwrap();
    }
    assert!(passes(&filter, "10.1.2.2", "10.0.0.1"));
    assert!(!passes(&filter, "10.2.2.2", "10.0.0.1"));
    drop(filter);
    let mut filter = open();
    assert_eq!(filter.plan(&old).unwrap().difference, Difference::default());
    filter.apply(&new).unwrap();
    assert!(!passes(&filter, "10.1.2.2", "10.0.0.1"));
    assert!(passes(&filter, "10.2.2.2", "10.0.0.1"));
    assert!(!passes(&filter, "10.2.2.3", "10.0.0.1"));
    drop(filter);
    assert_eq!(open().plan(&new).unwrap().difference, Difference::default());
}

#[test]
fn what_was_applied_is_what_the_next_agent_finds() {
    let bpffs = Bpffs::mount();
    let policies = [
        "  - {name: a, port: 1, model: dedicated, force_tls: false, cluster: [10.0.0.0/8],
             rules: [{cidr: 192.0.2.0/24}, {cidr: '2001:db8::/32'}, {cidr: '::/0'}]}
  - {name: b, port: 1, protocol: udp, model: dedicated, monitor: true, rules: [{cidr: 0.0.0.0/0}]}\n",
        "  - {name: b, port: 1, model: dedicated, force_tls: false, addresses: [10.0.0.1, 'fd00::1'],
             rules: [{cidr: 192.0.2.0/25}]}
  - {name: c, port: 1, addresses: [10.0.0.2], model: dedicated, force_tls: false, rules: []}\n",
    ];
    for databases in policies {
        let compiled = compiled(databases);
        let mut filter = Filter::open(bpffs.path(), Some(100)).unwrap();
        assert_ne!(
            filter.plan(&compiled).unwrap().difference,
            Difference::default()
        );
        filter.apply(&compiled).unwrap();
        drop(filter);
        let filter = Filter::open(bpffs.path(), Some(100)).unwrap();
        assert_eq!(
            filter.plan(&compiled).unwrap().difference,
            Difference::default()
        );
        for probe in probes(&compiled, BootTime::default(), 0) {
            let frame = frame(probe.protocol, probe.source, probe.destination, probe.port);
            let expected = probe.allowed || probe.monitor;
            assert_eq!(
                filter.run_packet(&frame).unwrap().passes(),
                expected,
                "{}",
                probe.source
            );
        }
    }
}

#[test]
fn policy_with_more_prefixes_than_the_maps_are_made_for_is_refused_before_anything_is_written() {
    let bpffs = Bpffs::mount();
    let mut filter = Filter::open(bpffs.path(), Some(2)).unwrap();
    let rules = |count: u8| {
        let rules = (0..count).map(|i| format!("{{cidr: 192.0.{i}.0/24}}"));
        let rules = rules.collect::<Vec<_>>().join(", ");
        compiled(&format!(
            "  - {{name: a, port: 1, model: dedicated, force_tls: false, rules: [{rules}]}}\n"
        ))
    };
    filter.apply(&rules(2)).unwrap();
    let error = format!("{:#}", filter.apply(&rules(3)).unwrap_err());
    assert!(
        error.contains("3 IPv4 prefixes") && error.contains("--max-prefixes"),
        "{error}"
    );
    assert!(passes(&filter, "192.0.1.7", "10.0.0.1"));
    assert!(!passes(&filter, "192.0.2.7", "10.0.0.1"));
}
