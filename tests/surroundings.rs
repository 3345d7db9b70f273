//! An agent whose socket, files or BPF file system are removed or replaced, or hang.

use std::{
    fs,
    net::SocketAddr,
    os::unix::net::{UnixDatagram, UnixStream},
    path::PathBuf,
    time::{Duration, Instant},
};

use filter_tests::{
    mounts::{Mounted, own_mounts},
    net::{
        ALLOWED4, Connection, DB4, DENIED4, Hammer, Net, Protected, dedicated, policy, wait_until,
    },
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use socket2::{Domain, SockAddr, Socket, Type};

const PORT: u16 = 5432;
const DB: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(DB4), PORT);
const ALLOWED: [&str; 1] = ["203.0.113.10/32"];

fn orders(allowed: &[&str]) -> String {
    policy("eth0", "native", &[dedicated("orders", PORT, allowed, "")])
}

fn start(name: &str) -> Net {
    Net::enforcing(name, &[Protected::tcp(PORT, &ALLOWED)], &orders(&ALLOWED))
}

/// No command reached an agent whose socket was removed, and no other agent could start beside it.
#[test]
fn socket_that_was_removed_is_made_again_and_another_file_is_left_alone() {
    let mut net = start("lost-socket");
    fs::remove_file(net.socket()).unwrap();
    net.wait_for_line("warning: the control socket was removed; it is there again");
    net.agent_text(&["reload"]);
    fs::remove_file(net.socket()).unwrap();
    fs::write(net.socket(), "not yours").unwrap();
    net.wait_for_line("error: no command reaches the agent: another file has the place of");
    assert_eq!(fs::read_to_string(net.socket()).unwrap(), "not yours");
    fs::remove_file(net.socket()).unwrap();
    assert!(wait_until(|| net.agent(&["status"]).status.success()));
    net.terminate();
    assert!(!net.socket().exists());
}

/// A socket whose agent hangs refuses connections once its queue is full: it was taken for a dead agent's, and removed.
#[test]
fn socket_of_an_agent_that_hangs_is_left_alone() {
    let net = Net::new("full-queue");
    net.watch(&[]);
    net.write_policy(&orders(&ALLOWED));
    let hung = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    hung.bind(&SockAddr::unix(net.socket()).unwrap()).unwrap();
    hung.listen(0).unwrap();
    let _client = UnixStream::connect(net.socket()).unwrap();
    let line = net.refusal(&[]);
    assert!(line.contains("its queue of connections is full"), "{line}");
    assert!(net.socket().exists());
    fs::remove_file(net.socket()).unwrap();
    let _datagrams = UnixDatagram::bind(net.socket()).unwrap();
    let line = net.refusal(&[]);
    assert!(line.contains("examine whether an agent answers"), "{line}");
    assert!(net.socket().exists());
}

/// The agent's own program was reported as another one, and the databases as open, where the BPF file system was
/// unmounted; and where it was mounted again, the agent gave up what kept the links alive.
#[test]
fn filter_stays_in_force_where_the_bpf_file_system_is_unmounted_and_mounted_again() {
    let mut net = start("unmounted");
    let _listener = net.listen(PORT);
    let denied = Hammer::denied(&net.client, &[(DENIED4.into(), DB)]);
    umount2(&net.bpffs(), MntFlags::MNT_DETACH).unwrap();
    let status = net.agent(&["status", "--verify"]);
    let text = String::from_utf8(status.stdout).unwrap();
    assert_eq!(status.status.code(), Some(1), "{text}");
    assert!(!text.contains("nothing is filtered"), "{text}");
    let until =
        "interface eth0 is filtered only until this agent ends: the pin of its link is gone";
    assert!(text.contains(until), "{text}");
    let none = None::<&str>;
    let bpf = Some("bpf");
    mount(bpf, &net.bpffs(), bpf, MsFlags::empty(), none).unwrap();
    net.wait_for_line("warning: pins of the filter were removed; they are restored");
    let is_well = || net.agent(&["status", "--verify"]).status.success();
    assert!(wait_until(is_well));
    assert_eq!(net.connect(ALLOWED4.into(), DB), Connection::Accepted);
    net.terminate();
    denied.stop();
    assert_eq!(net.connect(ALLOWED4.into(), DB), Connection::Accepted);
    let log = net.log.join("\n");
    assert!(!log.contains("another XDP program"), "{log}");
    assert_eq!(log.matches("attached to eth0").count(), 1, "{log}");
}

/// Each such file delayed the start by its time limit, one after the other, and a service that starts late is killed and
/// starts anew.
#[test]
fn region_files_that_hang_delay_a_start_by_one_time_limit() {
    const FILES: u32 = 12;
    const LIMIT: Duration = Duration::from_secs(3);
    let mut net = Net::new("hung-start");
    net.watch(&[]);
    let folder = net.dir().join("files");
    fs::create_dir(&folder).unwrap();
    let (mut regions, mut rules) = (String::new(), String::new());
    for n in 0..FILES {
        let path = folder.join(n.to_string());
        regions += &format!("  x{n}: {{file: {}, timeout: 3s}}\n", path.display());
        rules += &format!("{{region: x{n}}}, ");
    }
    net.write_policy(&format!(
        "interfaces: [eth0]\nregions:\n{regions}databases:\n  - {{name: orders, port: {PORT}, model: dedicated, \
         force_tls: false, rules: [{rules}]}}\n"
    ));
    let _hanging = Mounted::hanging(&folder);
    let begin = Instant::now();
    net.start();
    let took = begin.elapsed();
    assert!((LIMIT..LIMIT * FILES).contains(&took), "{took:?}");
}

/// A state directory that was copied to a new host kept the old host's policy in force there, with its addresses.
#[test]
fn policy_that_was_confirmed_on_another_machine_is_ignored() {
    let mut net = Net::new("other-machine");
    let _listener = net.listen(PORT);
    let etc = std::path::Path::new("/etc/netns").join(&net.db.name);
    fs::create_dir_all(&etc).unwrap();
    let machine = |digit: &str| fs::write(etc.join("machine-id"), digit.repeat(32)).unwrap();
    machine("1");
    net.own_resolver = true;
    let elsewhere = orders(&ALLOWED).replace("port:", "addresses: [192.0.2.77], port:");
    net.write_policy(&elsewhere);
    net.start();
    let status = net.agent_text(&["status"]);
    let inert =
        "database orders: no interface of this host has any of its `addresses` (192.0.2.77)";
    assert!(status.contains(inert), "{status}");
    net.wait_until_confirmed();
    // On the same machine the file may not narrow what is guarded.
    let narrowed = elsewhere.replace("192.0.2.77", "192.0.2.78");
    net.terminate();
    net.write_policy(&narrowed);
    net.start();
    assert!(
        net.log.iter().any(|line| line.contains("is not enforced")),
        "{:?}",
        net.log
    );
    net.terminate();
    // A pinned filter proves that this is the same machine, whatever its id is now.
    machine("2");
    let before = net.log.len();
    net.start();
    let mut log = net.log[before..].iter();
    assert!(
        log.any(|line| line.contains("is not enforced")),
        "{:?}",
        net.log
    );
    // It is kept as this machine's from now on.
    let kept = net.state_dir().join("confirmed.json");
    let is_of = |digit: &str| {
        fs::read_to_string(&kept)
            .unwrap()
            .contains(&digit.repeat(32))
    };
    assert!(wait_until(|| is_of("2")));
    net.terminate();
    // On another the file counts, and nothing is pinned there.
    fs::remove_dir_all(net.bpffs().join("filter-agent")).unwrap();
    machine("3");
    net.write_policy(&orders(&ALLOWED));
    net.watch(&[Protected::tcp(PORT, &ALLOWED)]);
    net.start();
    let ignored = "was kept on another machine (its machine-id(5) differs): ";
    assert!(
        net.log.iter().any(|line| line.contains(ignored)),
        "{:?}",
        net.log
    );
    let attempts = [(ALLOWED4.into(), DB), (DENIED4.into(), DB)];
    assert_eq!(
        net.connect_all(&attempts),
        [Connection::Accepted, Connection::Silence]
    );
    fs::remove_dir_all(&etc).unwrap();
    let _ = fs::remove_dir("/etc/netns");
}

/// A reload that shut everybody out said that all was well, and `explain` that no rule allows the source.
#[test]
fn forced_tls_that_cannot_be_judged_is_announced_by_plan_and_an_error_of_the_reload() {
    // Other tests need the hierarchy.
    own_mounts();
    let mut net = Net::new("unjudged");
    let none = None::<&str>;
    for hierarchy in cgroup2_mounts() {
        mount(
            Some("hidden"),
            &hierarchy,
            Some("tmpfs"),
            MsFlags::empty(),
            none,
        )
        .unwrap();
    }
    net.write_policy(&orders(&ALLOWED));
    net.start();
    let source = ALLOWED4.to_string();
    let forced = orders(&ALLOWED).replace("force_tls: false", "force_tls: true");
    net.write_policy(&forced);
    let plan = net.agent_text(&["plan"]);
    let foreseen =
        "warning: TLS cannot be enforced here: another mount hides the cgroup2 hierarchy";
    assert!(plan.contains(foreseen), "{plan}");
    for arguments in [&["reload"][..], &["reload", "--existing"]] {
        let reloaded = net.agent(arguments);
        let text = String::from_utf8(reloaded.stdout).unwrap();
        assert_eq!(reloaded.status.code(), Some(1), "{text}");
        let closed = "error: TLS cannot be enforced; where it is forced, ports are closed";
        assert!(text.contains(closed), "{text}");
        assert!(!text.contains("are judged"), "{text}");
    }
    let explained = net.agent_text(&["explain", &source]);
    let closed = format!("{source} is dropped: {source}/32 allows it, but the port is closed");
    assert!(explained.contains(&closed), "{explained}");
    // Mounted anywhere, and listed behind those that are hidden.
    let hierarchy = net.dir().join("cgroup2");
    fs::create_dir(&hierarchy).unwrap();
    mount(
        Some("seen"),
        &hierarchy,
        Some("cgroup2"),
        MsFlags::empty(),
        none,
    )
    .unwrap();
    let text = net.agent_text(&["reload", "--existing"]);
    assert!(text.contains("are judged by their next packet"), "{text}");
    assert!(!net.agent_text(&["plan"]).contains("cannot be enforced"));
    let explained = net.agent_text(&["explain", &source]);
    assert!(
        explained.contains("if the connection begins with TLS"),
        "{explained}"
    );
    net.reload(&orders(&ALLOWED));
    let reloaded = net.agent(&["reload", "--existing"]);
    let text = String::from_utf8(reloaded.stdout).unwrap();
    assert_eq!(reloaded.status.code(), Some(1), "{text}");
    let nowhere = "no database of the policy forces TLS";
    assert!(text.contains(nowhere), "{text}");
    net.terminate();
    umount2(&hierarchy, MntFlags::MNT_DETACH).unwrap();
}

fn cgroup2_mounts() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let hierarchies = mounts.lines().filter(|line| line.contains(" - cgroup2 "));
    let places = hierarchies.map(|line| line.split(' ').nth(4).unwrap().into());
    places.collect()
}
