//! Batches of entries that the kernel refuses, or writes in part.

use std::{
    fs::{self, File},
    mem,
    net::{IpAddr, Ipv4Addr},
    os::{
        fd::{AsRawFd as _, BorrowedFd},
        unix::fs::FileExt as _,
    },
    path::PathBuf,
    sync::{Arc, Mutex, mpsc},
    thread,
};

use aya::maps::{LpmTrie, Map, MapData, MapError, lpm_trie::Key};
use filter_agent::{
    clock::Clock,
    compile::{Compiled, compile},
    kernel::{apply::Unknown, difference::Difference, filter::Filter},
    policy,
    prefixes::Prefixes,
    rules::Regions,
    temporary::Timed,
};
use filter_common::{LAYOUT, SECTION_BITS, Source4};
use filter_tests::bpffs::Bpffs;
use ipnet::IpNet;
use libseccomp::{
    ScmpAction, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpNotifReq, ScmpNotifResp,
    ScmpNotifRespFlags, ScmpSyscall,
};
use nix::{
    errno::Errno,
    libc::{SYS_bpf, syscall},
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

const MAP_UPDATE_ELEM: u64 = 2;
const MAP_DELETE_ELEM: u64 = 3;
const MAP_LOOKUP_BATCH: u64 = 24;
const MAP_UPDATE_BATCH: u64 = 26;
const MAP_DELETE_BATCH: u64 = 27;

/// The kernel's error for a map without batches. C libraries do not know the number.
const ENOTSUPP: i32 = 524;

/// How the kernel treats batches.
#[derive(Clone, Copy, Debug)]
enum Treatment {
    Refuse(i32),
    /// Half of it is done, then memory runs out.
    Halve,
    /// The same, and of single writes to a trie every second one finds no memory.
    Starve,
    /// So many are done, and no write to any map from then on.
    Break(usize),
}

/// A database that so many hosts of a network may reach.
fn many(network: u8, count: u16) -> Compiled {
    let text = format!(
        "interfaces: [eth0]\ndatabases:\n  - {{name: a, port: 1, model: dedicated, force_tls: false, \
         rules: [{{cidr: 10.{network}.0.0/16}}]}}\n"
    );
    let (policy, _) = policy::parse(&text).unwrap_or_else(|problems| panic!("{problems:?}"));
    let timed = Timed::of(&policy, Clock::start().now());
    let mut compiled = compile(&policy, &Regions::new(), &timed);
    let hosts = (0..count).map(|host| {
        let [high, low] = (host * 2).to_be_bytes();
        IpNet::from(IpAddr::from([10, network, high, low]))
    });
    let hosts: Vec<IpNet> = hosts.collect();
    compiled.databases.get_mut("a").unwrap().lists = vec![(0, Prefixes::shared(hosts))];
    compiled
}

fn trie(bpffs: &Bpffs) -> LpmTrie<MapData, Source4, u32> {
    let pin: PathBuf = bpffs
        .path()
        .join(format!("filter-agent/v{LAYOUT}/ALLOWED4"));
    let map = Map::LpmTrie(MapData::from_pin(pin).unwrap());
    map.try_into().unwrap()
}

/// The addresses in the kernel's trie, listed one by one.
fn held(bpffs: &Bpffs) -> Vec<Ipv4Addr> {
    let keys: Result<Vec<Key<Source4>>, MapError> = trie(bpffs).keys().collect();
    let keys = keys.unwrap().into_iter();
    let mut held: Vec<Ipv4Addr> = keys.map(|key| key.data().address.into()).collect();
    held.sort_unstable();
    held
}

fn addresses(compiled: &Compiled) -> Vec<Ipv4Addr> {
    let hosts = compiled.databases["a"]
        .lists
        .iter()
        .flat_map(|(_, list)| list.iter());
    let v4 = hosts.filter_map(|host| match host.network() {
        IpAddr::V4(address) => Some(address),
        IpAddr::V6(_) => None,
    });
    v4.collect()
}

/// The treatment that is in force, and how many calls met it.
type Treated = Mutex<(Treatment, usize)>;

/// Has writes of this thread, and of those that it starts, treated from now on. libseccomp has one listener a process.
fn treat() -> Arc<Treated> {
    let treated = Arc::new(Treated::new((Treatment::Halve, 0)));
    let (send, listener) = mpsc::channel();
    // Started before there is a filter, which it would inherit.
    let supervised = treated.clone();
    thread::spawn(move || supervise(listener.recv().unwrap(), &supervised));
    let mut filter = ScmpFilterContext::new(ScmpAction::Allow).unwrap();
    let bpf = ScmpSyscall::from_name("bpf").unwrap();
    for command in [
        MAP_UPDATE_ELEM,
        MAP_DELETE_ELEM,
        MAP_LOOKUP_BATCH,
        MAP_UPDATE_BATCH,
        MAP_DELETE_BATCH,
    ] {
        let is_command = ScmpArgCompare::new(0, ScmpCompareOp::Equal, command);
        filter
            .add_rule_conditional(ScmpAction::Notify, bpf, &[is_command])
            .unwrap();
    }
    filter.load().unwrap();
    send.send(filter.get_notify_fd().unwrap()).unwrap();
    treated
}

/// Answers calls until no thread has the filter.
fn supervise(listener: i32, treated: &Treated) {
    // SAFETY: libseccomp opened it for this, and nobody closes it before the process ends.
    let listener = unsafe { BorrowedFd::borrow_raw(listener) };
    let mut is_starved = false;
    loop {
        let mut fds = [PollFd::new(listener, PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            polled => polled.unwrap(),
        };
        if !fds[0].revents().unwrap().contains(PollFlags::POLLIN) {
            return;
        }
        let Ok(request) = ScmpNotifReq::receive(listener.as_raw_fd()) else {
            continue;
        };
        let [command, attributes, ..] = request.data.args;
        let (treatment, met) = &mut *treated.lock().unwrap();
        let error = match (command, &mut *treatment) {
            (MAP_UPDATE_ELEM, Treatment::Starve) if writes_a_trie(attributes) => {
                is_starved = !is_starved;
                is_starved.then_some(Errno::ENOMEM as i32)
            }
            (MAP_LOOKUP_BATCH, Treatment::Break(_)) => None,
            (MAP_UPDATE_BATCH | MAP_DELETE_BATCH, Treatment::Break(left @ 1..)) => {
                *left -= 1;
                None
            }
            (_, Treatment::Break(0)) => Some(Errno::EPERM as i32),
            (MAP_UPDATE_ELEM | MAP_DELETE_ELEM, _) | (_, Treatment::Break(_)) => None,
            (_, Treatment::Refuse(error)) => Some(*error),
            (_, Treatment::Halve | Treatment::Starve) => {
                halve(command, attributes);
                Some(Errno::ENOMEM as i32)
            }
        };
        let none = ScmpNotifRespFlags::empty();
        let response = match error {
            Some(error) => ScmpNotifResp::new_error(request.id, -error, none),
            None => ScmpNotifResp::new_continue(request.id, none),
        };
        *met += usize::from(error.is_some());
        response.respond(listener.as_raw_fd()).unwrap();
    }
}

/// Whether a single write goes to a trie.
fn writes_a_trie(attributes: u64) -> bool {
    let mut map = [0; 4];
    let memory = File::open("/proc/self/mem").unwrap();
    memory.read_exact_at(&mut map, attributes).unwrap();
    let map = u32::from_ne_bytes(map);
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{map}")).unwrap();
    // BPF_MAP_TYPE_LPM_TRIE
    info.lines().any(|line| line == "map_type:\t11")
}

/// Makes a call of another thread for half of its entries, and says there how many these were, as the kernel does.
fn halve(command: u64, attributes: u64) {
    const LENGTH: usize = 56;
    const COUNT: usize = 32;
    let mut options = File::options();
    let memory = options
        .read(true)
        .write(true)
        .open("/proc/self/mem")
        .unwrap();
    let mut bytes = [0_u8; LENGTH];
    memory.read_exact_at(&mut bytes, attributes).unwrap();
    let count = &mut bytes[COUNT..COUNT + 4];
    let half = u32::from_ne_bytes(count.try_into().unwrap()) / 2;
    count.copy_from_slice(&half.to_ne_bytes());
    // SAFETY: the other thread waits for an answer, and vouches for twice as many entries.
    let result = unsafe { syscall(SYS_bpf, command, bytes.as_mut_ptr(), LENGTH) };
    assert!(
        result == 0 || Errno::last() == Errno::ENOENT,
        "{}",
        Errno::last()
    );
    let count = &bytes[COUNT..COUNT + 4];
    memory
        .write_all_at(count, attributes + COUNT as u64)
        .unwrap();
}

#[test]
fn batches_that_fail_or_are_not_known_are_finished_one_by_one() {
    let bpffs = Bpffs::mount();
    let treated = treat();
    let open = || Filter::open(bpffs.path(), Some(5_000)).unwrap();
    let met = || mem::take(&mut treated.lock().unwrap().1);
    for treatment in [
        Treatment::Halve,
        Treatment::Starve,
        Treatment::Refuse(Errno::EINVAL as i32),
        Treatment::Refuse(ENOTSUPP),
    ] {
        treated.lock().unwrap().0 = treatment;
        let mut filter = open();
        for policy in [many(1, 4_000), many(2, 3_000)] {
            met();
            filter.apply(&policy).unwrap();
            assert!(met() > 0, "{treatment:?}: no batch was written");
            assert_eq!(held(&bpffs), addresses(&policy), "{treatment:?}");
            drop(filter);
            filter = open();
            assert!(met() > 0, "{treatment:?}: no batch was read");
            let left = filter.plan(&policy).unwrap().difference;
            assert_eq!(left, Difference::default(), "{treatment:?}");
        }
    }
    check_that_a_change_which_could_not_be_taken_back_is_gone_after_the_next(&treated);
}

/// What the maps were made of is not known then: what is left of the refused change would stay for good.
fn check_that_a_change_which_could_not_be_taken_back_is_gone_after_the_next(treated: &Treated) {
    let bpffs = Bpffs::mount();
    let mut filter = Filter::open(bpffs.path(), Some(5_000)).unwrap();
    let mut mixed = 0;
    for batches in 0..8 {
        let old = many(1, 1_000 + batches);
        treated.lock().unwrap().0 = Treatment::Break(usize::MAX);
        filter.apply(&old).unwrap();
        treated.lock().unwrap().0 = Treatment::Break(batches.into());
        if let Err(error) = filter.apply(&many(2, 3_000)) {
            assert!(!error.is::<Unknown>(), "{error:#}");
            mixed += usize::from(held(&bpffs) != addresses(&old));
        }
        treated.lock().unwrap().0 = Treatment::Break(usize::MAX);
        filter.apply(&old).unwrap();
        assert!(held(&bpffs) == addresses(&old), "{batches} batches");
    }
    assert!(mixed > 1, "{mixed}");
}

/// The kernel itself stops a removal there.
#[test]
fn removal_goes_on_behind_an_entry_that_somebody_removed() {
    let bpffs = Bpffs::mount();
    let mut filter = Filter::open(bpffs.path(), Some(5_000)).unwrap();
    let policy = many(1, 4_000);
    filter.apply(&policy).unwrap();
    let mut trie = trie(&bpffs);
    for place in [700, 2_500] {
        let address = addresses(&policy)[place].octets();
        let keys = trie.keys().map(Result::unwrap);
        let key = keys.into_iter().find(|key| key.data().address == address);
        let section = key.unwrap().data().section;
        trie.remove(&Key::new(SECTION_BITS + 32, Source4 { section, address }))
            .unwrap();
    }
    let none = many(1, 0);
    filter.apply(&none).unwrap();
    assert_eq!(held(&bpffs), addresses(&none));
}

#[test]
fn list_is_read_whole_whatever_its_length() {
    let bpffs = Bpffs::mount();
    let open = || Filter::open(bpffs.path(), Some(20_000)).unwrap();
    for count in [0, 1, 16_383, 16_384, 16_385] {
        let policy = many(1, count);
        open().apply(&policy).unwrap();
        let filter = open();
        assert_eq!(filter.image().allowed4.len(), usize::from(count));
        assert_eq!(
            filter.plan(&policy).unwrap().difference,
            Difference::default()
        );
    }
}
