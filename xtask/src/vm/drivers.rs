//! The drivers of network cards that QEMU emulates: whether each runs the filter itself, and that verdicts hold over what
//! administrators do to an interface.

mod cards;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use comfy_table::{Table, presets};

use super::image::debian;
use super::machine::{Design, FOLDER, Machine, wait_for};
use super::outside::{Denied, Namespace, from_outside, inside};
use crate::dist::{self, Profile};
use crate::output;
use cards::{CARDS, Card, SILENCE, TCP, UDP, connect, echoes, echoes_datagram, furnish, outside};

const PACKAGES: &str = "linux-image-amd64,linux-image-6.12-amd64,systemd-sysv,udev,dbus,iproute2,\
                        ethtool,socat";
/// Where QEMU is from: Debian 12's own has no igb.
const BACKPORTS: &str = "deb http://deb.debian.org/debian bookworm-backports main";
const FROM_BACKPORTS: &str = "--aptopt=APT::Default-Release \"bookworm-backports\"";

const PATIENCE: Duration = Duration::from_secs(60);
/// For frames that may be lost.
const LOST: Duration = Duration::from_secs(15);
/// MTUs, in bytes.
const USUAL: usize = 1500;
const JUMBO: usize = 9000;
/// Connections of each source, over all queues.
const CONNECTIONS: usize = 8;

/// The results of a card on a kernel. docs/operations.md has the same table.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Row {
    kernel: &'static str,
    card: &'static str,
    mode: &'static str,
    /// Another number of queues, and an MTU of 9,000, while it was filtered.
    queues: &'static str,
    jumbo: &'static str,
    /// The mode where the MTU is 9,000 before the agent starts.
    mode_at_jumbo: &'static str,
}

const fn row(
    kernel: &'static str,
    card: &'static str,
    [mode, queues, jumbo, mode_at_jumbo]: [&'static str; 4],
) -> Row {
    Row {
        kernel,
        card,
        mode,
        queues,
        jumbo,
        mode_at_jumbo,
    }
}

const REFUSED: &str = "refused";
const HOLDS: &str = "holds";
const LOST_FRAMES: &str = "long frames lost";
const NONE: &str = "none";

const EXPECTED: [Row; 8] = [
    row(
        "6.1",
        "virtio_net",
        ["native", REFUSED, LOST_FRAMES, "generic"],
    ),
    row("6.1", "e1000e", ["generic", NONE, HOLDS, "generic"]),
    row("6.1", "igb", ["native", HOLDS, REFUSED, "generic"]),
    row("6.1", "vmxnet3", ["generic", NONE, LOST_FRAMES, "generic"]),
    row("6.12", "virtio_net", ["native", REFUSED, HOLDS, "native"]),
    row("6.12", "e1000e", ["generic", NONE, HOLDS, "generic"]),
    row("6.12", "igb", ["native", HOLDS, REFUSED, "generic"]),
    row("6.12", "vmxnet3", ["generic", NONE, LOST_FRAMES, "generic"]),
];

/// Tries every card on these kernels, and prints the table of what they did.
pub fn test(kernels: &[&str]) -> Result<()> {
    let package = dist::make(Profile::Shipped)?;
    let folder = Path::new(FOLDER).join("drivers");
    let base = folder.join("base");
    let minimal = "--variant=minbase";
    debian(&base, PACKAGES, &[minimal], &[])?;
    let options = [minimal, FROM_BACKPORTS];
    debian(
        &folder.join("qemu"),
        "qemu-system-x86",
        &options,
        &[BACKPORTS],
    )?;
    let mut rows = Vec::new();
    for kernel in kernels {
        let outside = outside()?;
        let design = Design {
            kernel: ((*kernel).into(), "-amd64"),
            folder: folder.clone(),
            qemu,
            interfaces: CARDS.iter().flat_map(Card::arguments).collect(),
        };
        let machine = Machine::boot(design, &base, |root| furnish(root, &package.deb))?;
        let mut scenario = Scenario {
            machine,
            _outside: outside,
        };
        rows.extend(scenario.live(kernel)?);
        scenario.machine.power_off()?;
    }
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header([
        "driver",
        "Linux",
        "mode",
        "other queues",
        "MTU 9000",
        "mode at MTU 9000",
    ]);
    for row in &rows {
        table.add_row([
            row.card,
            row.kernel,
            row.mode,
            row.queues,
            row.jumbo,
            row.mode_at_jumbo,
        ]);
    }
    println!("{table}");
    let other: Vec<&Row> = rows.iter().filter(|row| !EXPECTED.contains(row)).collect();
    ensure!(other.is_empty(), "drivers did something else: {other:#?}");
    Ok(())
}

/// The later QEMU, with its own libraries: the host's stays as it is.
fn qemu() -> Command {
    let root: PathBuf = [FOLDER, "drivers/qemu"].iter().collect();
    let libraries = root.join("usr/lib/x86_64-linux-gnu");
    let mut qemu = inside("env");
    qemu.arg(format!(
        "QEMU_MODULE_DIR={}",
        libraries.join("qemu").display()
    ))
    .arg(root.join("lib64/ld-linux-x86-64.so.2"))
    .arg("--library-path")
    .arg(format!(
        "{}:{}",
        libraries.display(),
        root.join("lib/x86_64-linux-gnu").display()
    ))
    .arg(root.join("usr/bin/qemu-system-x86_64"));
    for data in ["qemu", "seabios"] {
        qemu.arg("-L").arg(root.join("usr/share").join(data));
    }
    qemu
}

struct Scenario {
    // Dropped first.
    machine: Machine,
    _outside: Namespace,
}

impl Scenario {
    fn live(&mut self, kernel: &str) -> Result<Vec<Row>> {
        self.machine.command(". /root/network")?;
        self.restart()?;
        let addresses = CARDS.iter().map(|card| (card.denied(), card.host()));
        let denied: Result<Vec<Denied>> = addresses
            .flat_map(|(sources, hosts)| sources.into_iter().zip(hosts))
            .map(|(source, host)| Denied::start(source, SocketAddr::new(host, TCP[0])))
            .collect();
        let denied = denied?;
        let mut rows = Vec::new();
        for card in &CARDS {
            let name = card.name;
            let expected = EXPECTED
                .iter()
                .find(|row| (row.kernel, row.card) == (kernel, name));
            let expected = expected.with_context(|| format!("find {name} on {kernel}"))?;
            let [mode, queues, jumbo] = self
                .card(card)
                .map_err(|error| self.with_state(card, error))?;
            // The last is measured when all are detached.
            let row = row(expected.kernel, name, [mode, queues, jumbo, ""]);
            println!("{row:?}");
            rows.push(row);
        }
        let tries: u64 = denied.iter().map(Denied::tries).sum();
        self.expect_no_answer()?;
        println!("{tries} tries of the denied sources got no answer");
        drop(denied);
        self.detach()?;
        for card in &CARDS {
            let refused = self.set_mtu(card, JUMBO)?;
            ensure!(refused.is_empty(), "unfiltered, {}: {refused}", card.name);
            let carries = self.carries(card, JUMBO)?;
            ensure!(
                carries == card.carries_long_frames(),
                "unfiltered, {} carries long frames: {carries}",
                card.name
            );
        }
        self.restart()?;
        // They have counted the answers of the time without the filter.
        output(inside("nft").args(["reset", "counters"]))?;
        for (card, row) in CARDS.iter().zip(&mut rows) {
            row.mode_at_jumbo = self.mode(card.name)?;
            let mtu = if card.carries_long_frames() {
                JUMBO
            } else {
                USUAL
            };
            self.set_mtu(card, mtu)?;
            let judged = self.verdicts(card, mtu);
            judged.map_err(|error| self.with_state(card, error))?;
            println!("{row:?}, judged with frames of up to {mtu} bytes");
        }
        let mut cards = CARDS.iter();
        let card = cards.find(|card| card.name == "vmxnet3");
        let card = card.context("find vmxnet3")?;
        // Its driver has native XDP from Linux 6.6 on.
        let native = kernel != "6.1";
        self.left_native(card, native)
            .and_then(|()| self.bond(card))
            .map_err(|error| self.with_state(card, error))?;
        Ok(rows)
    }

    /// An agent that takes the card for another one attaches natively, as 0.1.0 did. The next agent reports that as an error.
    fn left_native(&mut self, card: &Card, native: bool) -> Result<()> {
        let name = card.name;
        let drop_in = "/run/systemd/system/filter-agent.service.d/sysfs.conf";
        self.machine.command(&format!(
            "for path in /sys/class/net/*/; do
                 copy=/root/net/$(basename $path); mkdir -p $copy/device; cp $path/ifindex $copy
                 ln -s \"$(readlink $path/device/driver || echo none)\" $copy/device/driver
             done
             ln -sfn igb /root/net/{name}/device/driver
             mkdir -p $(dirname {drop_in})
             printf '[Service]\\nBindReadOnlyPaths=/root/net:/sys/class/net\\n' >{drop_in}
             systemctl daemon-reload; filter-agent detach --yes"
        ))?;
        self.restart()?;
        let mode = self.mode(name)?;
        ensure!(
            (mode == "native") == native,
            "as an igb it is filtered in {mode} mode"
        );
        let mut says = |command: &str| {
            let error = format!("interface {name} may not be filtered");
            let said = self
                .machine
                .command(&format!("{command} 2>&1; echo status $?"))?;
            let (told, failed) = (said.contains(&error), !said.ends_with("status 0"));
            ensure!(
                told == native && failed == native,
                "`{command}` says: {said}"
            );
            Ok(())
        };
        says(&format!(
            "rm {drop_in}; systemctl daemon-reload; systemctl restart filter-agent; filter-agent status --enforced"
        ))?;
        says("filter-agent check --host")?;
        says("systemctl stop filter-agent; filter-agent status --enforced")?;
        self.machine.command("filter-agent detach --yes")?;
        self.restart()?;
        let mode = self.mode(name)?;
        ensure!(
            mode == "generic",
            "after `detach` it is filtered in {mode} mode"
        );
        self.verdicts(card, USUAL)?;
        println!("{name} that was left native ({native}) is reported, and filtered after `detach`");
        Ok(())
    }

    /// A bond is filtered in generic mode before the card joins it, and verdicts hold after that.
    fn bond(&mut self, card: &Card) -> Result<()> {
        // The bond gets the card's MAC address: with the random one that udev sets, the card was not reached.
        let name = card.name;
        self.machine.command(&format!(
            "ip link add bond0 address $(cat /sys/class/net/{name}/address) type bond mode active-backup miimon 100
             sed -i 's/^interfaces: \\[/&bond0, /' /etc/filter-agent/policy.yaml"
        ))?;
        self.restart()?;
        let mode = self.mode("bond0")?;
        ensure!(mode == "generic", "a bond without a port is {mode}");
        let [v4, v6] = card.host();
        let said = self.machine.command(&format!(
            "ip link set {name} down; ip address flush dev {name} scope global
             ip link set {name} master bond0 2>&1
             ip link set bond0 up; ip link set {name} up
             ip address add {v4}/24 dev bond0; ip address add {v6}/64 dev bond0 nodad"
        ))?;
        ensure!(said.is_empty(), "{name} joins the bond: {said}");
        self.verdicts(card, USUAL).context("in a bond")?;
        for interface in [name, "bond0"] {
            self.machine.command(&format!(
                "ip link set {interface} down; ip link set {interface} up"
            ))?;
            let judged = self.verdicts(card, USUAL);
            judged.with_context(|| format!("in a bond, after {interface} was down and up"))?;
        }
        println!("{name} in a bond: {mode}, judged before and after down and up");
        Ok(())
    }

    /// The error, with what the machine says of the card.
    fn with_state(&mut self, card: &Card, error: anyhow::Error) -> anyhow::Error {
        let name = card.name;
        let state = self.machine.command(&format!(
            "filter-agent status; ip -s link show {name}; ethtool -S {name} | grep -v ' 0$'; dmesg | tail -20"
        ));
        error.context(format!("try {name}: {}", state.unwrap_or_default()))
    }

    fn card(&mut self, card: &Card) -> Result<[&'static str; 3]> {
        let name = card.name;
        let driver = self
            .machine
            .command(&format!("ethtool -i {name} | sed -n 's/^driver: //p'"))?;
        ensure!(driver == name, "its driver is {driver}");
        let mode = self.mode(card.name)?;
        self.verdicts(card, USUAL)?;
        let queues = self.change_queues(card)?;
        self.verdicts(card, USUAL).context("with other queues")?;
        self.machine.set_link(name, false)?;
        self.carrier(card, "0")?;
        self.machine.set_link(name, true)?;
        self.carrier(card, "1")?;
        self.verdicts(card, USUAL)
            .context("after the cable was out")?;
        self.machine
            .command(&format!("ip link set {name} down; ip link set {name} up"))?;
        self.carrier(card, "1")?;
        self.verdicts(card, USUAL).context("after down and up")?;
        let jumbo = if !self.set_mtu(card, JUMBO)?.is_empty() {
            REFUSED
        } else if self.carries(card, JUMBO)? {
            self.verdicts(card, JUMBO).context("with an MTU of 9000")?;
            HOLDS
        } else {
            self.expect_warning(card, mode)?;
            LOST_FRAMES
        };
        self.set_mtu(card, USUAL)?;
        self.verdicts(card, USUAL).context("after an MTU of 9000")?;
        let after = self.mode(card.name)?;
        ensure!(after == mode, "it was {mode}, and is {after}");
        Ok([mode, queues, jumbo])
    }

    fn mode(&mut self, interface: &str) -> Result<&'static str> {
        let mode = self.machine.command(&format!(
            "filter-agent status --verify | awk '/^{interface} / {{print $2}}'"
        ))?;
        match mode.as_str() {
            "native" => Ok("native"),
            "generic" => Ok("generic"),
            mode => bail!("the mode of {interface} is `{mode}`"),
        }
    }

    /// To one queue, and back.
    fn change_queues(&mut self, card: &Card) -> Result<&'static str> {
        let mut set = |queues: u8| {
            let set = format!("ethtool -L {} combined {queues} 2>&1", card.name);
            self.machine.command(&set)
        };
        match set(1)?.as_str() {
            "" => {
                let refused = set(2)?;
                ensure!(refused.is_empty(), "two queues again: {refused}");
                Ok(HOLDS)
            }
            said if said.contains("not supported") => Ok(NONE),
            said if said.contains("Invalid argument") => Ok(REFUSED),
            said => bail!("another number of queues: {said}"),
        }
    }

    /// Returns the kernel's refusal, or nothing.
    fn set_mtu(&mut self, card: &Card, mtu: usize) -> Result<String> {
        let set = format!("ip link set {} mtu {mtu} 2>&1", card.name);
        let refused = self.machine.command(&set)?;
        self.carrier(card, "1")?;
        Ok(refused)
    }

    /// Whether frames of that MTU come and go, where nothing is guarded.
    fn carries(&self, card: &Card, mtu: usize) -> Result<bool> {
        let [source, host] = [card.denied()[0], card.host()[0]];
        echoes_datagram(source, SocketAddr::new(host, UDP[1]), mtu - 100, LOST)
    }

    /// Native mode loses them, and not the card.
    fn expect_warning(&mut self, card: &Card, mode: &str) -> Result<()> {
        let warning = format!(
            "filter-agent status | grep -c '^warning: {} has an MTU'",
            card.name
        );
        let warned = self.machine.command(&warning)?;
        let expected = if mode == "native" { "1" } else { "0" };
        ensure!(warned == expected, "{warned} warnings of lost frames");
        Ok(())
    }

    fn carrier(&mut self, card: &Card, expected: &str) -> Result<()> {
        let carrier = format!("cat /sys/class/net/{}/carrier", card.name);
        let mut failed = None;
        let reached = wait_for(|| match self.machine.command(&carrier) {
            Ok(carrier) => (carrier == expected).then_some(()),
            Err(error) => {
                failed = Some(error);
                Some(())
            }
        });
        reached.with_context(|| format!("wait for the carrier {expected} of {}", card.name))?;
        failed.map_or(Ok(()), Err)
    }

    fn restart(&mut self) -> Result<()> {
        let said = self.machine.command(
            "systemctl restart filter-agent 2>&1; filter-agent status --enforced --wait 60s 2>&1 && echo enforced",
        )?;
        ensure!(said.ends_with("enforced"), "the agent says: {said}");
        Ok(())
    }

    /// After it every source is served on every card.
    fn detach(&mut self) -> Result<()> {
        let said = self
            .machine
            .command("filter-agent detach --yes 2>&1; ip link | grep -c xdp")?;
        ensure!(said.ends_with('0'), "after `detach`: {said}");
        for card in &CARDS {
            let sources = card.denied().into_iter().zip(card.host());
            for (source, host) in sources {
                ensure!(
                    echoes(source, SocketAddr::new(host, TCP[0]), PATIENCE)?,
                    "after `detach` {source} is not served on {}",
                    card.name
                );
            }
        }
        Ok(())
    }

    fn wait_until_reached(&self, card: &Card) -> Result<()> {
        let (sources, hosts) = (card.denied(), card.host());
        for (source, host) in sources.into_iter().zip(hosts) {
            let open = SocketAddr::new(host, TCP[1]);
            ensure!(
                echoes(source, open, PATIENCE)?,
                "{source} does not reach {open}, which nothing guards"
            );
        }
        Ok(())
    }

    /// Of both families and both protocols, and the kernel has counted what it dropped.
    fn verdicts(&mut self, card: &Card, mtu: usize) -> Result<()> {
        self.wait_until_reached(card)?;
        let before = self.dropped()?;
        for ((allowed, denied), host) in card
            .allowed()
            .into_iter()
            .zip(card.denied())
            .zip(card.host())
        {
            let [guarded, _] = TCP.map(|port| SocketAddr::new(host, port));
            for _ in 0..CONNECTIONS {
                ensure!(
                    echoes(allowed, guarded, PATIENCE)?,
                    "{allowed}, which is allowed, is not served"
                );
            }
            let connected = from_outside(move || {
                // In the namespace, as this thread is.
                let tries = [(); CONNECTIONS]
                    .map(|()| thread::spawn(move || connect(denied, guarded, SILENCE).is_ok()));
                tries.map(|of| of.join().expect("no client panics"))
            })?;
            ensure!(!connected.contains(&true), "{denied} is connected");
            let [guarded, open] = UDP.map(|port| SocketAddr::new(host, port));
            // In one packet each.
            let length = mtu - 100;
            for (source, to, patience, expected) in [
                (allowed, guarded, PATIENCE, true),
                (denied, open, PATIENCE, true),
                (denied, guarded, SILENCE, false),
            ] {
                ensure!(
                    echoes_datagram(source, to, length, patience)? == expected,
                    "a datagram of {length} bytes from {source} to {to}: {}",
                    if expected { "no answer" } else { "an answer" }
                );
            }
        }
        let dropped = self.dropped()? - before;
        ensure!(
            dropped >= 2,
            "only {dropped} datagrams are counted as dropped"
        );
        self.expect_no_answer()
    }

    /// Datagrams, which nothing sends but `verdicts`.
    fn dropped(&mut self) -> Result<u64> {
        let status = self.machine.command("filter-agent status --json")?;
        let status: serde_json::Value =
            serde_json::from_str(&status).with_context(|| format!("read the status: {status}"))?;
        let databases = status["databases"].as_array();
        let mut databases = databases.into_iter().flatten();
        let datagrams = databases.find(|of| of["name"] == "datagrams");
        let datagrams = datagrams.context("find the database in the status")?;
        Ok(datagrams["dropped"]["not-allowed"].as_u64().unwrap_or(0))
    }

    fn expect_no_answer(&self) -> Result<()> {
        let text = output(inside("nft").args(["list", "counter", "inet", "answers", "answers"]))?;
        if !text.contains("packets 0 ") {
            bail!("a denied source was answered: {text}");
        }
        Ok(())
    }
}
