//! Hosts that stand side by side: with nothing in front of the stack, with the filter, and with what
//! would be used in its place.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use aya::{Ebpf, maps::Array, programs::Xdp};
use aya_obj::programs::XdpAttachType;
use filter_agent::{
    clock::Clock,
    compile::compile,
    kernel::filter::Filter,
    policy,
    prefixes::Prefixes,
    rules::Regions,
    temporary::{Kind, Temporary, Timed},
};
use filter_tests::net::{Net, succeed};
use ipnet::IpNet;

use crate::{
    instructions::Translated,
    traffic::{self, PORT, TLS_PORT},
};

/// What stands between a host's interface and TCP.
#[derive(Clone, Copy, PartialEq)]
pub enum Guard {
    /// A program that drops everything, and one that passes everything: what XDP costs.
    Drop,
    Pass,
    /// One that passes as many sources as the filter does, by chance.
    Chance,
    Filter,
    NftIngress,
    NftInput,
    Ipset,
    XdpFilter,
}

impl Guard {
    pub const RIVALS: [Guard; 4] = [
        Guard::NftIngress,
        Guard::NftInput,
        Guard::Ipset,
        Guard::XdpFilter,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Guard::Drop => "XDP_DROP alone",
            Guard::Pass => "XDP_PASS alone",
            Guard::Chance => "XDP_DROP, XDP_PASS for as many",
            Guard::Filter => "filter-agent",
            Guard::NftIngress => "nftables, netdev ingress",
            Guard::NftInput => "nftables, inet input",
            Guard::Ipset => "iptables and ipset",
            Guard::XdpFilter => "xdp-filter",
        }
    }

    const fn short(self) -> &'static str {
        match self {
            Guard::Drop => "drop",
            Guard::Pass => "pass",
            Guard::Chance => "chance",
            Guard::Filter => "filter",
            Guard::NftIngress => "ingress",
            Guard::NftInput => "input",
            Guard::Ipset => "ipset",
            Guard::XdpFilter => "xdp",
        }
    }
}

pub struct Host {
    pub guard: Guard,
    pub net: Net,
    /// Whether it was told the networks that are measured now.
    pub ready: bool,
}

impl Host {
    pub fn new(guard: Guard, programs: &Programs) -> Self {
        let mut net = Net::new(&format!("bench-{}", guard.short()));
        net.remove_tripwire();
        net.fix_neighbours();
        match programs.pin(guard) {
            Some(pin) => attach(&net, "eth0", &pin),
            // So that the interface takes frames as XDP sends them, without a program of its own.
            None => net
                .db
                .run(|| succeed(Command::new("ethtool").args(["-K", "eth0", "gro", "on"]))),
        }
        Self {
            guard,
            net,
            ready: true,
        }
    }

    /// Allows these networks and no others. The filter is told by itself.
    pub fn allow(&mut self, networks: &[IpNet]) -> Result<()> {
        self.ready = false;
        match self.guard {
            Guard::Drop | Guard::Pass | Guard::Chance | Guard::Filter => {}
            Guard::NftIngress => self.nftables("netdev", "ingress device eth0", networks)?,
            Guard::NftInput => self.nftables("inet", "input", networks)?,
            Guard::Ipset => self.ipset(networks)?,
            Guard::XdpFilter => self.xdp_filter(networks)?,
        }
        self.ready = true;
        Ok(())
    }

    fn nftables(&self, family: &str, hook: &str, networks: &[IpNet]) -> Result<()> {
        let (v4, v6) = by_family(networks);
        let text = format!(
            "flush ruleset
             table {family} bench {{
               set allowed4 {{ type ipv4_addr; flags interval; elements = {{ {} }} }}
               set allowed6 {{ type ipv6_addr; flags interval; elements = {{ {} }} }}
               chain guard {{
                 type filter hook {hook} priority 0
                 tcp dport {PORT} ip saddr != @allowed4 drop
                 tcp dport {PORT} ip6 saddr != @allowed6 drop
               }}
             }}\n",
            v4.join(","),
            v6.join(",")
        );
        self.feed("nft -f -", &text)
    }

    fn ipset(&self, networks: &[IpNet]) -> Result<()> {
        let (v4, v6) = by_family(networks);
        let ports = format!("-p tcp --dport {PORT} -m set ! --match-set");
        for (iptables, family, set, networks) in [
            ("iptables", "inet", "allowed4", v4),
            ("ip6tables", "inet6", "allowed6", v6),
        ] {
            self.feed(&format!("{iptables} -F INPUT"), "")?;
            let _ = self.feed(&format!("ipset destroy {set}"), "");
            let most = networks.len().max(1 << 16);
            let mut text = format!("create {set} hash:net family {family} maxelem {most}\n");
            for network in networks {
                writeln!(text, "add {set} {network}")?;
            }
            self.feed("ipset restore", &text)?;
            self.feed(
                &format!("{iptables} -A INPUT {ports} {set} src -j DROP"),
                "",
            )?;
        }
        Ok(())
    }

    /// It knows addresses, not networks, takes one with each command, and ten thousand at most.
    fn xdp_filter(&self, networks: &[IpNet]) -> Result<()> {
        ensure!(
            networks.len() <= 2000,
            "xdp-filter takes an address at a time"
        );
        let _ = self.feed("xdp-filter unload eth0", "");
        self.feed("xdp-filter load --policy deny --mode native eth0", "")?;
        for network in networks {
            self.feed(&format!("xdp-filter ip --mode src {}", network.addr()), "")?;
        }
        // What another port of the host would need.
        self.feed("xdp-filter port --mode dst 9999", "")
    }

    fn feed(&self, command_line: &str, input: &str) -> Result<()> {
        let mut words = command_line.split(' ');
        let mut command = Command::new(words.next().context("find the program")?);
        command.args(words).stdin(Stdio::piped());
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let child = self.net.db.run(|| command.spawn());
        let mut child = child.with_context(|| format!("start {command_line}"))?;
        let mut stdin = child.stdin.take().context("write to the command")?;
        // One that fails need not read all of it.
        let _ = stdin.write_all(input.as_bytes());
        drop(stdin);
        let output = child.wait_with_output()?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        let said = stderr.lines().next().unwrap_or("nothing");
        ensure!(output.status.success(), "{command_line} fails: {said}");
        Ok(())
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if self.guard == Guard::XdpFilter {
            let _ = self.feed("xdp-filter unload eth0", "");
        }
    }
}

fn by_family(networks: &[IpNet]) -> (Vec<String>, Vec<String>) {
    let text = |is_v4: bool| {
        let networks = networks
            .iter()
            .filter(move |n| matches!(n, IpNet::V4(_)) == is_v4);
        networks.map(ToString::to_string).collect()
    };
    (text(true), text(false))
}

/// Runs a pinned program on an interface of the host.
pub fn attach(net: &Net, interface: &str, pin: &Path) {
    net.db.ip(&format!(
        "link set dev {interface} xdpdrv pinned {}",
        pin.display()
    ));
}

/// The filter as it is shipped, loaded by the agent's code, and the programs to compare it with.
pub struct Programs {
    pub filter: Filter,
    pub filtering: Xdp,
    pub translated: Translated,
    pub dropping: Xdp,
    /// Whether there is a database that TLS is forced for: each SYN is noted then, which is not free.
    pub forces_tls: bool,
    directory: PathBuf,
    floors: Ebpf,
}

impl Programs {
    /// `bpffs`: where they are pinned.
    pub fn load(bpffs: &Path, max_prefixes: usize) -> Result<Self> {
        let most = u32::try_from(max_prefixes)?;
        let filter = Filter::open(bpffs, Some(most))?;
        let directory = bpffs.to_owned();
        let pin = directory.join("filter");
        succeed(
            Command::new("bpftool")
                .args(["prog", "pin", "id", &filter.program_id()?.to_string()])
                .arg(&pin),
        );
        let mut floors = traffic::programs(None)?;
        for name in ["floor", "pass", "chance"] {
            traffic::program(&mut floors, name)?.pin(directory.join(name))?;
        }
        let open = |name| Xdp::from_pin(directory.join(name), XdpAttachType::Interface);
        Ok(Self {
            filter,
            filtering: open("filter")?,
            translated: Translated::read(&pin)?,
            dropping: open("floor")?,
            forces_tls: false,
            floors,
            directory,
        })
    }

    /// What runs on the interface of a host that is guarded so.
    pub fn pin(&self, guard: Guard) -> Option<PathBuf> {
        let name = match guard {
            Guard::Drop => "floor",
            Guard::Pass => "pass",
            Guard::Chance => "chance",
            Guard::Filter => "filter",
            _ => return None,
        };
        Some(self.directory.join(name))
    }

    /// Has `Guard::Chance` pass this share of sources.
    pub fn pass(&mut self, share: f64) -> Result<()> {
        let map = self.floors.map_mut("PASSED").context("find PASSED")?;
        let mut passed: Array<_, u32> = map.try_into()?;
        let of = f64::from(u32::MAX);
        passed.set(0, (share * of) as u32, 0).context("set PASSED")
    }

    /// Has the filter allow these networks and no others. `databases`: how many there are beside.
    pub fn allow(&mut self, networks: &[IpNet], databases: u16) -> Result<()> {
        self.allow_with(networks, databases, &[])
    }

    /// `allow`, with temporary rules and blocks of an hour.
    pub fn allow_with(
        &mut self,
        networks: &[IpNet],
        databases: u16,
        temporary: &[(Kind, IpNet)],
    ) -> Result<()> {
        let rules = "model: dedicated, rules: [{region: r}]";
        let mut text = format!(
            "interfaces: [eth0]
regions: {{r: {{prefixes: [192.0.2.0/24]}}}}
databases:
  - {{name: d, port: {PORT}, force_tls: false, {rules}}}\n"
        );
        if self.forces_tls {
            writeln!(
                text,
                "  - {{name: t, port: {TLS_PORT}, engine: postgresql, force_tls: true, {rules}}}"
            )?;
        }
        for number in 0..databases {
            let port = 10_000 + number;
            writeln!(
                text,
                "  - {{name: d{number}, port: {port}, force_tls: false, {rules}}}"
            )?;
        }
        let parsed = policy::parse(&text).map_err(|problems| anyhow::anyhow!("{problems:?}"));
        let (policy, _) = parsed.context("read the benchmark's policy")?;
        let regions: Regions = BTreeMap::from([("r".to_owned(), Prefixes::shared(networks))]);
        let now = Clock::start().now();
        let end = now.boot.after(Duration::from_hours(1));
        let temporary = temporary.iter();
        let temporary =
            temporary.map(|&(kind, source)| Temporary::new("d", kind, source, end, now));
        let timed = Timed {
            temporary: temporary.collect(),
            ..Timed::of(&policy, now)
        };
        let compiled = compile(&policy, &regions, &timed);
        self.filter.apply(&compiled)?;
        // As the agent does. Frames are run through the program at interfaces only, without sockets.
        self.filter.set_judged(compiled.forces_tls())?;
        Ok(())
    }
}
