//! The program at the sockets, which judges how connections begin where TLS is forced: attached to the root of the cgroups,
//! pinned, and tried out.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use aya::programs::{CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, ProgramInfo, links::FdLink};
use btf_rs::{Backend, Btf, BtfType, Type};
use filter_common::{Existing, KernelOffsets};
use ipnet::IpNet;
use nix::sys::{
    memfd::{MFdFlags, memfd_create},
    statfs::{CGROUP2_SUPER_MAGIC, statfs},
};

use crate::{
    host::coverage::Coverage,
    kernel::{
        filter::Filter,
        pins::{exists, linked_program},
        program::load_error,
    },
};

/// The pin of the link.
const LINK: &str = "tls_link";
const NEW_LINK: &str = "new_tls_link";

/// Time that a connection of the agent to itself may take.
const PROOF_TIMEOUT: Duration = Duration::from_secs(2);

impl Filter {
    /// Has this agent's program judge the connections of all sockets, by a link that is pinned. What was attached before is
    /// replaced without a gap: both judge for a moment.
    ///
    /// # Errors
    /// No hierarchy of cgroup2, a kernel without type information, the kernel's refusal.
    pub fn attach_hook(&mut self) -> Result<()> {
        let pin = self.pins.join(LINK);
        let root = cgroup_root()?;
        let directory = File::open(&root).with_context(|| format!("open {}", root.display()))?;
        let program = self.load_hook()?;
        let id = program
            .attach(
                directory,
                CgroupSkbAttachType::Ingress,
                CgroupAttachMode::Single,
            )
            .with_context(|| format!("attach to the cgroup {}", root.display()))?;
        let link = FdLink::try_from(program.take_link(id)?)
            .map_err(|_| anyhow!("the kernel makes no BPF link of a cgroup"))?;
        let new = self.pins.join(NEW_LINK);
        if exists(&new)? {
            fs::remove_file(&new).with_context(|| format!("remove {}", new.display()))?;
        }
        link.pin(&new)
            .with_context(|| format!("pin the link at {}", new.display()))?;
        fs::rename(&new, &pin)
            .with_context(|| format!("rename {} to {}", new.display(), pin.display()))
    }

    /// Loads the program, once.
    fn load_hook(&mut self) -> Result<&mut CgroupSkb> {
        if let Some(error) = &self.offsets_error {
            bail!("{error}");
        }
        let program = match &mut self.tracing {
            Some(traced) => traced.ebpf.program_mut("tls_opening_traced"),
            None => self.ebpf.program_mut("tls_opening"),
        };
        let program = program.context("find the program that judges connections")?;
        let program: &mut CgroupSkb = program.try_into()?;
        if program.fd().is_err() {
            program
                .load()
                .map_err(load_error)
                .context("load the program that judges connections")?;
        }
        Ok(program)
    }

    /// Instructions that the kernel's verifier followed, of the million that it would: of the program at the interfaces,
    /// and of that at the sockets.
    pub fn verified_instructions(&mut self) -> Result<[u32; 2]> {
        let count = |info: ProgramInfo| info.verified_instruction_count();
        let sockets = count(self.load_hook()?.info()?);
        let interfaces = count(self.program()?.info()?);
        let known = |count: Option<u32>| count.context("read how much was verified (Linux 5.16)");
        Ok([known(interfaces)?, known(sockets)?])
    }

    /// Whether the program on the pinned link is this agent's.
    pub fn is_hook_whole(&self) -> Result<bool> {
        let pin = self.pins.join(LINK);
        if !exists(&pin)? {
            return Ok(false);
        }
        let program = match &self.tracing {
            Some(traced) => traced.ebpf.program("tls_opening_traced"),
            None => self.ebpf.program("tls_opening"),
        };
        let program: &CgroupSkb = program
            .context("find the program that judges connections")?
            .try_into()?;
        let Ok(info) = program.info() else {
            return Ok(false);
        };
        Ok(linked_program(&pin)? == info.id())
    }

    /// Ends the judgement of connections.
    pub fn detach_hook(&mut self) -> Result<()> {
        for pin in [LINK, NEW_LINK].map(|name| self.pins.join(name)) {
            if exists(&pin)? {
                fs::remove_file(&pin).with_context(|| format!("remove {}", pin.display()))?;
            }
        }
        Ok(())
    }

    /// Whether the kernel refuses connections without TLS to a database, by what the maps hold.
    pub fn refuses_clear(&self, database: &str) -> bool {
        let slot = self.image.slot(database);
        slot.is_some_and(|slot| self.image.refuses_clear(slot))
    }

    /// Whether a program judges by a pinned link: this agent's, or that of one before, which judges by the same maps.
    pub fn has_hook(&self) -> Result<bool> {
        exists(&self.pins.join(LINK))
    }

    pub fn is_judged(&self) -> bool {
        self.is_judged
    }

    /// Opens or closes the ports where TLS is forced: they are closed while nothing judges their connections.
    pub fn set_judged(&mut self, judged: bool) -> Result<()> {
        if self.is_judged != judged {
            self.maps.set_judged(judged)?;
            self.is_judged = judged;
        }
        Ok(())
    }

    /// Sets the networks whose clients speak to containers on this host itself, without passing the filter.
    pub fn set_local_networks(&mut self, networks: &BTreeSet<IpNet>) -> Result<()> {
        self.maps
            .set_local_networks(networks)
            .context("write the networks of this host")
    }

    /// Returns how connections from before TLS was forced are treated.
    pub fn existing(&self) -> Result<Existing> {
        self.maps.existing()
    }

    /// Has these connections counted or judged, when they next send something.
    pub fn set_existing(&mut self, existing: Existing) -> Result<()> {
        self.maps.set_existing(existing)
    }

    /// Has packets no longer looked up among refused connections, until one is refused again.
    pub fn end_refusing(&mut self) -> Result<()> {
        self.maps.end_refusing()
    }

    /// Connects to itself without TLS. Returns whether the connection was judged, and nothing of it arrived.
    ///
    /// # Errors
    /// No connection could be made, or nothing became of it in time: that proves nothing.
    pub fn prove_hook(&mut self) -> Result<bool> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listen on loopback")?;
        let address = listener.local_addr().context("listen on loopback")?;
        let before = self.proofs()?;
        self.set_proof(address.port())?;
        let proof = (|| -> Result<bool> {
            const TEXT: &[u8] = b"no TLS";
            let connected = TcpStream::connect_timeout(&address, PROOF_TIMEOUT);
            let mut client = connected.context("connect to this agent over loopback")?;
            let own = client
                .local_addr()
                .context("connect to this agent over loopback")?;
            // Any process of this host may connect, too. What is made by now waits to be accepted.
            listener
                .set_nonblocking(true)
                .context("listen on loopback")?;
            let mut server = loop {
                let (server, peer) = listener.accept().context("accept its own connection")?;
                if peer == own {
                    break server;
                }
            };
            client.write_all(TEXT).context("write to itself")?;
            server.set_nonblocking(true).context("read from itself")?;
            let end = Instant::now() + PROOF_TIMEOUT;
            while Instant::now() < end {
                let mut read = [0; TEXT.len()];
                if server.read(&mut read).is_ok() && read == TEXT {
                    return Ok(false);
                }
                if self.proofs()? != before {
                    return Ok(true);
                }
                thread::sleep(Duration::from_millis(1));
            }
            bail!("its own connection was neither refused nor served within {PROOF_TIMEOUT:?}")
        })();
        self.set_proof(0)?;
        proof
    }

    /// Has connections to a port over loopback judged, by whichever program is attached.
    fn set_proof(&mut self, port: u16) -> Result<()> {
        self.maps.unpinned.set_proof(port)?;
        match &mut self.tracing {
            Some(traced) => traced.unpinned.set_proof(port),
            None => Ok(()),
        }
    }

    /// How many segments of such connections were dropped.
    fn proofs(&self) -> Result<u32> {
        let own = self.maps.unpinned.proofs()?;
        match &self.tracing {
            Some(traced) => Ok(own.wrapping_add(traced.unpinned.proofs()?)),
            None => Ok(own),
        }
    }
}

/// Where the root of the cgroup2 hierarchy is mounted.
fn cgroup_root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("list the mounts")?;
    // proc_pid_mountinfo(5): the root and the mount point are the fourth and fifth field, the type follows a hyphen.
    let roots = mounts.lines().filter_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(3);
        let is_root = mount.next()? == "/" && kind.starts_with("cgroup2 ");
        mount.next().filter(|_| is_root).map(PathBuf::from)
    });
    let mut refused = None;
    for root in roots {
        // Another mount may hide it.
        match check_cgroup_root(&root) {
            Ok(()) => return Ok(root),
            Err(error) => refused = refused.or(Some(error)),
        }
    }
    Err(refused.unwrap_or_else(|| {
        anyhow!("no cgroup2 hierarchy is mounted: mount one with `mount -t cgroup2 none DIRECTORY`")
    }))
}

fn check_cgroup_root(root: &Path) -> Result<()> {
    let file_system = statfs(root).with_context(|| format!("examine {}", root.display()))?;
    ensure!(
        file_system.filesystem_type() == CGROUP2_SUPER_MAGIC,
        "another mount hides the cgroup2 hierarchy at {}: mount one with `mount -t cgroup2 none DIRECTORY`",
        root.display()
    );
    // In a cgroup namespace the root is one of a part, whose sockets are not all of the host's.
    let metadata = fs::metadata(root).with_context(|| format!("examine {}", root.display()))?;
    ensure!(
        metadata.ino() == 1,
        "{} is not the root of the cgroups: run the agent in the host's cgroup namespace",
        root.display()
    );
    Ok(())
}

/// Returns why TLS could not be enforced on this host, as far as that can be seen without doing it.
pub fn unenforceable(coverage: &Coverage) -> Option<String> {
    let bridged = coverage.present.iter().find(|found| found.is_bridge_port);
    let why = match (cgroup_root().and_then(|_| kernel_offsets()), bridged) {
        (Err(error), _) => format!("{error:#}"),
        (Ok(_), Some(interface)) => format!("{} is a port of a bridge", interface.name),
        (Ok(_), None) => return None,
    };
    Some(format!("TLS cannot be enforced here: {why}"))
}

/// Finds in the kernel's type information where it keeps what the program reads.
///
/// # Errors
/// A kernel without type information (CONFIG_DEBUG_INFO_BTF), or one whose types have changed.
pub(super) fn kernel_offsets() -> Result<KernelOffsets> {
    let path = "/sys/kernel/btf/vmlinux";
    // Kernels before 6.16 map no such file; of a copy in memory only what is looked at is read.
    let copy = memfd_create("btf", MFdFlags::MFD_CLOEXEC).context("copy the type information")?;
    let mut copy = File::from(copy);
    let mut file = File::open(path).with_context(|| {
        format!("open {path}: the kernel must be built with CONFIG_DEBUG_INFO_BTF")
    })?;
    std::io::copy(&mut file, &mut copy).with_context(|| format!("read {path}"))?;
    let copy = format!("/proc/self/fd/{}", copy.as_raw_fd());
    let btf =
        Btf::from_file_with_backend(copy, Backend::Mmap).with_context(|| format!("read {path}"))?;
    let offset = |name: &str, path: &[&str]| {
        let place = || format!("find {name}.{} in the kernel's types", path.join("."));
        offset(&btf, name, path).with_context(place)
    };
    Ok(KernelOffsets {
        namespace: offset("sock", &["__sk_common", "skc_net", "net"])?,
        inode: offset("net", &["ns", "inum"])?,
        first: offset("tcp_request_sock", &["rcv_isn"])?,
    })
}

/// The offset in bytes of a member of a member of a structure.
fn offset(btf: &Btf, name: &str, path: &[&str]) -> Result<u32> {
    let types = btf.resolve_types_by_name(name)?;
    let mut found = types
        .into_iter()
        .find(|found| matches!(found, Type::Struct(_)));
    let mut offset = 0;
    for name in path {
        while let Some(Type::Typedef(alias)) = &found {
            found = Some(btf.resolve_chained_type(alias)?);
        }
        let Some(Type::Struct(structure)) = &found else {
            bail!("{name} is in no structure");
        };
        let is_meant = |member: &&btf_rs::Member| {
            member.get_name_offset().is_some()
                && btf.resolve_name(*member).is_ok_and(|found| found == *name)
        };
        let member = structure.members.iter().find(is_meant);
        let member = member.with_context(|| format!("there is no {name}"))?;
        ensure!(member.bit_offset() % 8 == 0, "{name} is a bit field");
        offset += member.bit_offset() / 8;
        found = btf.resolve_chained_type(member).ok();
    }
    Ok(offset)
}

/// Inode number of this process' network namespace, whose interfaces are filtered.
pub(super) fn namespace() -> Result<u32> {
    let path = Path::new("/proc/self/ns/net");
    let metadata = fs::metadata(path).with_context(|| format!("examine {}", path.display()))?;
    u32::try_from(metadata.ino()).context("read the network namespace's number")
}
