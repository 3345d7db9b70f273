//! The system test: the package in a booted Debian with real systemd and PostgreSQL, and two clients
//! outside that never stop trying.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sched::{CloneFlags, setns};
use socket2::{Domain, SockRef, Socket, Type};

use crate::{dist, run};

/// Debian 12's own kernel, and the later one of the same repository.
pub const KERNELS: [&str; 2] = ["6.1", "6.12"];

const FOLDER: &str = "target/vm";
const NAMESPACE: &str = "filter-agent-vm";
const HOST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const ALLOWED: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const DENIED: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 3);
const PORT: u16 = 5432;

/// How long anything in the machine may take, whose processor is emulated.
const PATIENCE: Duration = Duration::from_secs(240);

/// At most, as `systemd-analyze security` sees the unit: 0 is the safest, 10 the least safe.
const EXPOSURE: f32 = 2.0;

const PACKAGES: &str = "linux-image-cloud-amd64,linux-image-6.12-cloud-amd64,systemd-sysv,udev,dbus,\
                        iproute2,postgresql,ca-certificates,cloud-init";

/// What the machine goes through, and whether the database is up all the time.
const PHASES: [(&str, &str, bool); 8] = [
    (
        "agent stopped",
        "systemctl stop filter-agent; sleep 5",
        true,
    ),
    (
        "agent started",
        "systemctl start filter-agent; sleep 5",
        true,
    ),
    (
        "agent killed",
        "systemctl kill -s KILL filter-agent; sleep 8",
        true,
    ),
    (
        "policy reloaded",
        "for i in 1 2 3; do systemctl reload filter-agent; sleep 2; done",
        true,
    ),
    (
        "package upgraded",
        "dpkg -i /root/next.deb >/dev/null 2>&1; sleep 5",
        true,
    ),
    (
        "interface down and up",
        "ip link set eth0 down; sleep 3; ip link set eth0 up; sleep 8",
        false,
    ),
    (
        "agent restarted",
        "systemctl restart filter-agent; sleep 5",
        true,
    ),
    (
        "database restarted",
        "systemctl restart postgresql; sleep 8",
        false,
    ),
];

/// Boots each kernel and prints what the clients saw.
pub fn test(kernels: &[&str]) -> Result<()> {
    let deb = dist::make()?;
    let next = dist::package(Some("0.1.0-2"))?;
    let base = base()?;
    for kernel in kernels {
        Machine::boot(kernel, &base, &deb, &next)?.live()?;
    }
    Ok(())
}

/// A Debian with what every run needs, made once.
fn base() -> Result<PathBuf> {
    let root = Path::new(FOLDER).join("base");
    let made = Path::new(FOLDER).join("base.made");
    if fs::read_to_string(&made).ok().as_deref() == Some(PACKAGES) {
        return Ok(root);
    }
    println!("==> make a Debian image");
    fs::create_dir_all(FOLDER).with_context(|| format!("create {FOLDER}"))?;
    let _ = fs::remove_dir_all(&root);
    let mut mmdebstrap = Command::new("mmdebstrap");
    mmdebstrap
        .args(["--quiet", "--variant=minbase", "--include", PACKAGES])
        .arg("bookworm")
        .arg(&root);
    // Where this host has its packages from is where they are to be had.
    for sources in [
        "/etc/apt/sources.list.d/debian.sources",
        "/etc/apt/sources.list",
    ] {
        if Path::new(sources).exists() {
            mmdebstrap.arg(sources);
        }
    }
    for entry in fs::read_dir("/etc/apt/apt.conf.d").context("read apt's configuration")? {
        let path = entry.context("read apt's configuration")?.path();
        let text = fs::read_to_string(&path).unwrap_or_default();
        if text.contains("Acquire") && !text.contains("docker") {
            mmdebstrap.arg("--aptopt").arg(path);
        }
    }
    run(&mut mmdebstrap)?;
    fs::write(&made, PACKAGES).with_context(|| format!("write {}", made.display()))?;
    Ok(root)
}

/// A booting machine, its network and the clients in it.
struct Machine {
    kernel: String,
    qemu: Child,
    shell: UnixStream,
    asked: u32,
    clients: [Client; 2],
    phases: Vec<(String, Instant, bool)>,
}

impl Machine {
    fn boot(kernel: &str, base: &Path, deb: &Path, next: &Path) -> Result<Self> {
        println!("==> boot Linux {kernel}");
        let folder = Path::new(FOLDER);
        let root = folder.join("root");
        let disk = folder.join("disk.img");
        let _ = fs::remove_dir_all(&root);
        run(Command::new("cp")
            .args(["-a", "--reflink=auto"])
            .arg(base)
            .arg(&root))?;
        furnish(&root, deb, next)?;
        let _ = fs::remove_file(&disk);
        run(Command::new("mke2fs")
            .args(["-q", "-t", "ext4", "-d"])
            .arg(&root)
            .arg(&disk)
            .arg("3G"))?;
        let boot = |kind: &str| -> Result<PathBuf> {
            let prefix = format!("{kind}-{kernel}.");
            let files = fs::read_dir(root.join("boot")).context("list the image's kernels")?;
            files
                .filter_map(|file| Some(file.ok()?.path()))
                .find(|path| {
                    let name = path.file_name().unwrap_or_default();
                    name.to_string_lossy().starts_with(&prefix)
                })
                .with_context(|| format!("the image has no {prefix}*"))
        };
        network()?;
        // From before power-on.
        let clients = [Client::start(ALLOWED)?, Client::start(DENIED)?];
        let socket = folder.join("shell.sock");
        let _ = fs::remove_file(&socket);
        let console_log = folder.join(format!("console-{kernel}.log"));
        let console = File::create(&console_log).context("create the console's log")?;
        let started = Instant::now();
        let qemu = Command::new("ip")
            .args(["netns", "exec", NAMESPACE, "qemu-system-x86_64"])
            .args(["-m", "1024", "-smp", "2", "-display", "none"])
            .args(["-machine", "q35,accel=tcg", "-cpu", "max"])
            .arg("-kernel")
            .arg(boot("vmlinuz")?)
            .arg("-initrd")
            .arg(boot("initrd.img")?)
            .args([
                "-append",
                "root=/dev/vda rw console=ttyS0 net.ifnames=0 systemd.journald.forward_to_console=1",
            ])
            .arg("-drive")
            .arg(format!(
                "file={},format=raw,if=virtio,cache=unsafe",
                disk.display()
            ))
            .args(["-netdev", "tap,id=net,ifname=tap0,script=no,downscript=no"])
            .args(["-device", VIRTIO_NET])
            .args(["-netdev", "tap,id=merging,ifname=tap1,script=no,downscript=no"])
            .args(["-device", MERGING_VIRTIO_NET])
            .args(["-serial", "stdio", "-serial"])
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .stdin(Stdio::null())
            .stdout(console.try_clone().context("share the console's log")?)
            .stderr(console)
            .spawn()
            .context("start qemu-system-x86_64")?;
        let mut qemu = qemu;
        let shell = wait_for(|| match qemu.try_wait() {
            Ok(Some(_)) => Some(None),
            _ => UnixStream::connect(&socket).ok().map(Some),
        });
        let log = console_log.display();
        let shell = shell
            .flatten()
            .with_context(|| format!("start QEMU, see {log}"))?;
        shell
            .set_read_timeout(Some(Duration::from_millis(500)))
            .context("set up the shell")?;
        Ok(Self {
            kernel: kernel.into(),
            qemu,
            shell,
            asked: 0,
            clients,
            phases: vec![("boot".into(), started, false)],
        })
    }

    fn live(mut self) -> Result<()> {
        self.wait_until_up()?;
        let kernel = self.command("uname -r")?;
        let native = self.command("filter-agent status | grep -c native")?;
        ensure!(native == "1", "eth0 is not filtered in native mode");
        let refused = self.command("journalctl -b -u filter-agent | grep 'attached to eth1'")?;
        ensure!(
            refused.contains("in generic mode, since native mode was refused: "),
            "eth1, whose driver refuses native mode: {refused}"
        );
        let checked = self.command("filter-agent check --host | grep '^eth1: '")?;
        ensure!(
            checked.starts_with("eth1: virtio_net refuses native XDP"),
            "`check --host` says of eth1: {checked}"
        );
        let cycles = self.command("journalctl -b | grep -ci 'ordering cycle'")?;
        ensure!(cycles == "0", "systemd found an ordering cycle");
        for (name, command, up) in PHASES {
            self.phases.push((name.into(), Instant::now(), up));
            self.command(command)?;
            let expected = if name == "agent stopped" {
                "inactive"
            } else {
                "active"
            };
            let deadline = Instant::now() + PATIENCE;
            loop {
                let status = self.command("systemctl is-active filter-agent")?;
                if status == expected {
                    break;
                }
                ensure!(
                    Instant::now() < deadline,
                    "after `{name}` the agent is {status}"
                );
                thread::sleep(Duration::from_millis(500));
            }
        }
        let version = self.command("dpkg-query -W -f '${Version}' filter-agent")?;
        ensure!(version == "0.1.0-2", "version {version} is installed");
        self.command("filter-agent status --verify")?;
        let exposure = self.unit()?;
        self.phases.push(("reboot".into(), Instant::now(), false));
        self.reboot()?;
        self.wait_until_up()?;
        self.phases
            .push(("after the reboot".into(), Instant::now(), true));
        thread::sleep(Duration::from_secs(5));
        let end = Instant::now();
        let enforced_after = self.bond()?;
        let bad_line = self.force_tls_over_a_bad_line()?;
        self.remove_the_package()?;
        self.shell
            .write_all(b"systemctl poweroff\n")
            .context("power off")?;
        let gone = wait_for(|| self.qemu.try_wait().ok().flatten());
        gone.context("wait for the machine to power off")?;
        let [allowed, denied] = &self.clients;
        println!(
            "\nLinux {kernel} (Debian 12, {} asked for); {exposure}",
            self.kernel
        );
        println!(
            "{:<24}{:>8} {:>16} {:>16} {:>16} {:>12}",
            "phase",
            "seconds",
            "denied: tries",
            "denied: answers",
            "allowed: served",
            "longest gap"
        );
        let mut answers = 0;
        let mut unserved = Vec::new();
        let ends = self.phases.iter().skip(1).map(|phase| phase.1).chain([end]);
        for ((name, start, up), end) in self.phases.iter().zip(ends) {
            let span = (*start, end);
            let (tries, answered, _) = denied.between(span, |attempt| attempt.answered);
            let (_, served, gap) = allowed.between(span, |attempt| attempt.served);
            answers += answered;
            let seconds = (end - *start).as_secs_f64();
            let gap = if *up {
                format!("{:.2} s", gap.as_secs_f64())
            } else {
                "-".into()
            };
            println!("{name:<24}{seconds:>8.1} {tries:>16} {answered:>16} {served:>16} {gap:>12}");
            if *up && served == 0 {
                unserved.push(name.as_str());
            }
        }
        println!("an interface that appears is filtered after {enforced_after} ms");
        println!("over a line that {bad_line}: 10 of 10 connections with TLS, 0 of 10 without");
        ensure!(
            answers == 0,
            "the denied client was answered {answers} times"
        );
        ensure!(
            unserved.is_empty(),
            "the allowed client was not served: {}",
            unserved.join(", ")
        );
        Ok(())
    }

    /// What systemd thinks of the unit.
    fn unit(&mut self) -> Result<String> {
        let complaints = self.command("systemd-analyze verify --man=no filter-agent.service")?;
        ensure!(
            complaints.is_empty(),
            "systemd says of the unit: {complaints}"
        );
        let exposure = self.command("systemd-analyze security filter-agent | tail -1")?;
        // "→ Overall exposure level for filter-agent.service: 2.0 OK 🙂"
        let level = exposure
            .split(": ")
            .nth(1)
            .and_then(|rest| rest.split(' ').next());
        let level: Option<f32> = level.and_then(|level| level.parse().ok());
        ensure!(
            level.is_some_and(|level| level <= EXPOSURE),
            "systemd-analyze says: {exposure}"
        );
        Ok(exposure)
    }

    /// A bond that appears is filtered natively, on the interfaces that join it. Returns how long it
    /// took, in milliseconds.
    fn bond(&mut self) -> Result<String> {
        let enforced_after = self.command(
            "start=$(date +%s%N)
             ip link add bond0 type bond mode active-backup
             for i in $(seq 500); do ip link show bond0 | grep -q xdp && break; done
             echo $((($(date +%s%N) - start) / 1000000))",
        )?;
        self.command(
            "ip netns add outside
             ip link add inner type veth peer name far netns outside
             ip link set inner master bond0
             ip address add 10.88.0.1/24 dev bond0
             ip link set bond0 up
             ip -n outside address add 10.88.0.2/24 dev far
             ip -n outside link set far up
             sleep 2",
        )?;
        let status = self.command("filter-agent status --verify | grep '^bond0 '")?;
        ensure!(
            status.contains("native"),
            "the bond is filtered as {status}"
        );
        let answer = self.connect_over_bond()?;
        ensure!(
            answer == "124",
            "over the bond a denied client gets {answer}"
        );
        Ok(enforced_after)
    }

    /// How a connection over the bond ends: 0, or 124 where nothing answers.
    fn connect_over_bond(&mut self) -> Result<String> {
        self.command(&format!(
            "ip netns exec outside timeout 5 bash -c 'exec 3<>/dev/tcp/10.88.0.1/{PORT}' 2>/dev/null
             echo $?"
        ))
    }

    /// Forced TLS refuses no psql that speaks it, and serves none that does not, whatever the network
    /// does to their segments. Returns what it did.
    fn force_tls_over_a_bad_line(&mut self) -> Result<String> {
        self.command(
            "sed -i 's/force_tls: false/force_tls: true/; s/model:/engine: postgresql\\n    model:/
                     s/rules: \\[/&{cidr: 10.88.0.2\\/32}, /' /etc/filter-agent/policy.yaml
             sysctl -q net.ipv4.route.min_adv_mss=88
             ip -n outside route change 10.88.0.0/24 dev far advmss 88
             ip route change 10.88.0.0/24 dev bond0 advmss 88
             ip netns exec outside tc qdisc add dev far root netem delay 20ms reorder 40% 50% loss 5%",
        )?;
        let reloaded = self.command("filter-agent reload 2>&1 && echo reloaded")?;
        ensure!(reloaded.ends_with("reloaded"), "reload says: {reloaded}");
        let mut psql = |sslmode: &str, query: &str| {
            self.command(&format!(
                "for i in $(seq 10); do
                     ip netns exec outside timeout 200 psql \
                         'host=10.88.0.1 user=postgres dbname=postgres sslmode={sslmode}' \
                         -Atc '{query}' 2>&1 &
                 done
                 wait"
            ))
        };
        let with_tls = psql("require", "select 1")?;
        let served = with_tls.lines().filter(|line| *line == "1").count();
        let without = psql("disable", "select 1")?;
        let refused = without
            .lines()
            .filter(|line| line.contains("error:"))
            .count();
        // MSS 88, of which 12 bytes are the timestamp.
        let size = psql("require", "\\! ss -tinH dst 10.88.0.1")?;
        let lost = self.command(
            "ip netns exec outside tc -s qdisc show dev far | sed -n 's/.*dropped \\([0-9]*\\).*/\\1/p'",
        )?;
        let happened = |count: &str| count.parse().is_ok_and(|count: u32| count > 0);
        let disordered = self.command("nstat -asz TcpExtTCPOFOQueue | awk '/OFO/ {print $2}'")?;
        ensure!(
            served == 10,
            "over a bad line {served} of 10 are served: {with_tls}"
        );
        ensure!(
            refused == 10,
            "over a bad line {refused} of 10 are refused: {without}"
        );
        ensure!(
            size.contains(" mss:76 ") && happened(&lost) && happened(&disordered),
            "the line is not bad: {size}; {lost} lost, {disordered} out of order"
        );
        self.command(
            "ip netns exec outside tc qdisc delete dev far root
             ip -n outside route change 10.88.0.0/24 dev far
             ip route change 10.88.0.0/24 dev bond0",
        )?;
        Ok(format!(
            "lost {lost} segments and brought {disordered} out of order"
        ))
    }

    /// Removal leaves no trace in the kernel, and purging none on disk.
    fn remove_the_package(&mut self) -> Result<()> {
        let removed = Instant::now();
        self.command("dpkg -r filter-agent >/dev/null 2>&1; sleep 2")?;
        let traces =
            self.command("ls -d /sys/fs/bpf/filter-agent; ip link show eth0 | grep xdp")?;
        ensure!(
            !traces.contains("prog") && traces.contains("No such file"),
            "after its removal the package leaves: {traces}"
        );
        let (_, answered, _) = self.clients[1].between((removed, Instant::now()), |a| a.answered);
        ensure!(answered > 0, "nobody gets in after the package's removal");
        let answer = self.connect_over_bond()?;
        ensure!(answer == "0", "without the package the bond gives {answer}");
        self.command("dpkg -P filter-agent >/dev/null 2>&1")?;
        let left = self.command(
            "find /etc/filter-agent /var/lib/filter-agent /usr/sbin/filter-agent 2>/dev/null | wc -l",
        )?;
        ensure!(
            left == "0",
            "{left} files are left after the package was purged"
        );
        Ok(())
    }

    /// Until the agent enforces and the database answers.
    fn wait_until_up(&mut self) -> Result<()> {
        let up = "systemctl is-active filter-agent && pg_isready -q -h 127.0.0.1 && echo both";
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            // What is typed before the shell is there is lost.
            let answer = self.brief_command(up);
            if answer.is_some_and(|text| text.ends_with("both")) {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(500));
        }
        let state =
            self.command("systemctl --failed --no-legend; journalctl -b -u filter-agent | tail");
        bail!("the machine is not up: {}", state.unwrap_or_default())
    }

    fn reboot(&mut self) -> Result<()> {
        const BOOT: &str = "cat /proc/sys/kernel/random/boot_id";
        let before = self.command(BOOT)?;
        self.shell
            .write_all(b"systemctl reboot\n")
            .context("reboot")?;
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            thread::sleep(Duration::from_secs(2));
            if self
                .brief_command(BOOT)
                .is_some_and(|after| after.len() == 36 && after != before)
            {
                return Ok(());
            }
        }
        bail!("the machine does not come back from its reboot")
    }

    /// What a command in the machine prints.
    fn command(&mut self, command: &str) -> Result<String> {
        let text = self.ask(command, PATIENCE)?;
        text.with_context(|| format!("wait for `{command}` in the machine"))
    }

    /// The same where there may be nobody to answer.
    fn brief_command(&mut self, command: &str) -> Option<String> {
        self.ask(command, Duration::from_secs(10)).ok().flatten()
    }

    fn ask(&mut self, command: &str, patience: Duration) -> Result<Option<String>> {
        // Numbered: the answer to a question that was given up may come late.
        self.asked += 1;
        let (begin, end) = (
            format!("BEGIN-{}", self.asked),
            format!("END-{}", self.asked),
        );
        // What the command prints need not end in a line's end.
        let text = format!("\necho {begin}\n{command}\necho; echo {end}\n");
        self.shell
            .write_all(text.as_bytes())
            .context("write to the machine's shell")?;
        let mut read = Vec::new();
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            let mut buffer = [0; 4096];
            match self.shell.read(&mut buffer) {
                Ok(0) => bail!("the machine is gone"),
                Ok(length) => read.extend_from_slice(&buffer[..length]),
                Err(_) => continue,
            }
            let text = String::from_utf8_lossy(&read);
            let lines: Vec<&str> = text.lines().map(str::trim).collect();
            let place = |marker: &str| lines.iter().position(|line| *line == marker);
            if let (Some(begin), Some(end)) = (place(&begin), place(&end)) {
                return Ok(Some(lines[begin + 1..end].join("\n").trim().to_owned()));
            }
        }
        Ok(None)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        for client in &mut self.clients {
            client.stop();
        }
        let _ = Command::new("ip")
            .args(["netns", "delete", NAMESPACE])
            .status();
    }
}

/// Without the offloads that keep this driver from native mode.
const VIRTIO_NET: &str = "virtio-net-pci,netdev=net,guest_tso4=off,guest_tso6=off,guest_ecn=off,\
                          guest_ufo=off,guest_csum=off";

/// With offloads that the guest cannot switch off: the driver refuses native mode.
const MERGING_VIRTIO_NET: &str = "virtio-net-pci,netdev=merging,ctrl_guest_offloads=off";

/// What the image gets besides Debian: the package, a policy, a network, a database that is open to
/// everybody, and a shell on the second serial port.
fn furnish(root: &Path, deb: &Path, next: &Path) -> Result<()> {
    let write = |path: &str, text: &str| -> Result<()> {
        let path = root.join(path);
        fs::create_dir_all(path.parent().context("find the folder")?)
            .and_then(|()| fs::write(&path, text))
            .with_context(|| format!("write {}", path.display()))
    };
    fs::copy(deb, root.join("root/this.deb")).context("copy the package")?;
    fs::copy(next, root.join("root/next.deb")).context("copy the package")?;
    write("usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n")?;
    let executable = fs::Permissions::from_mode(0o755);
    fs::set_permissions(root.join("usr/sbin/policy-rc.d"), executable).context("set a mode")?;
    run(Command::new("chroot")
        .arg(root)
        .args(["dpkg", "-i", "/root/this.deb"]))?;
    fs::remove_file(root.join("usr/sbin/policy-rc.d")).context("remove policy-rc.d")?;
    write(
        "etc/filter-agent/policy.yaml",
        &format!(
            "interfaces: [default, '[be]*']\ndatabases:\n  - name: orders\n    port: {PORT}\n    \
             model: dedicated\n    force_tls: false\n    rules: [{{cidr: {ALLOWED}/32}}]\n"
        ),
    )?;
    write(
        "etc/systemd/network/10-eth0.network",
        &format!("[Match]\nName=eth0\n[Network]\nAddress={HOST}/24\nGateway={ALLOWED}\n"),
    )?;
    write("etc/fstab", "/dev/vda / ext4 defaults 0 1\n")?;
    write("etc/hostname", "database\n")?;
    write(
        "etc/cloud/cloud.cfg.d/99-test.cfg",
        "datasource_list: [None]\n",
    )?;
    write(
        "etc/cloud/cloud.cfg.d/98-network.cfg",
        "network: {config: disabled}\n",
    )?;
    write(
        "etc/systemd/system/shell.service",
        "[Unit]\nAfter=basic.target\n[Service]\nExecStart=/bin/sh -c 'stty -echo; cat | /bin/sh 2>&1'\n\
         StandardInput=tty\nStandardOutput=tty\nStandardError=tty\nTTYPath=/dev/ttyS1\n\
         Restart=always\n[Install]\nWantedBy=basic.target\n",
    )?;
    let drop_in = "postgresql@.service.d/needs-filter.conf";
    let text = fs::read_to_string("dist/database-needs-filter.conf").context("read the drop-in")?;
    write(&format!("etc/systemd/system/{drop_in}"), &text)?;
    let main = "etc/postgresql/15/main";
    write(
        &format!("{main}/conf.d/open.conf"),
        "listen_addresses = '*'\n",
    )?;
    write(
        &format!("{main}/pg_hba.conf"),
        "local all all trust\nhost all all 0.0.0.0/0 trust\n",
    )?;
    run(Command::new("systemctl")
        .arg("--quiet")
        .arg("--root")
        .arg(root)
        .args(["enable", "systemd-networkd.service", "shell.service"]))
}

/// The namespace outside of the machine, with both clients' addresses.
fn network() -> Result<()> {
    let _ = Command::new("ip")
        .args(["netns", "delete", NAMESPACE])
        .stderr(Stdio::null())
        .status();
    run(Command::new("ip").args(["netns", "add", NAMESPACE]))?;
    for command in [
        "tuntap add dev tap0 mode tap".into(),
        "tuntap add dev tap1 mode tap".into(),
        format!("address add {ALLOWED}/24 dev tap0"),
        format!("address add {DENIED}/24 dev tap0"),
        "link set tap0 up".into(),
        "link set tap1 up".into(),
        "link set lo up".into(),
    ] {
        let words = command.split(' ');
        run(Command::new("ip").args(["-n", NAMESPACE]).args(words))?;
    }
    Ok(())
}

/// Tries the database's port again and again, many times a second.
struct Client {
    stop: Arc<AtomicBool>,
    attempts: Arc<Mutex<Vec<Attempt>>>,
    thread: Option<JoinHandle<()>>,
}

struct Attempt {
    at: Instant,
    /// Anything came back, be it a refusal.
    answered: bool,
    /// PostgreSQL answered.
    served: bool,
}

impl Client {
    fn start(source: Ipv4Addr) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let attempts = Arc::new(Mutex::new(Vec::new()));
        let (stopped, made) = (stop.clone(), attempts.clone());
        let namespace = Path::new("/run/netns").join(NAMESPACE);
        let namespace = File::open(namespace).context("open the namespace")?;
        let thread = thread::spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).expect("enter the namespace");
            while !stopped.load(Ordering::Relaxed) {
                let attempt = attempt(source);
                if let Ok(mut made) = made.lock() {
                    made.push(attempt);
                }
                thread::sleep(Duration::from_millis(20));
            }
        });
        Ok(Self {
            stop,
            attempts,
            thread: Some(thread),
        })
    }

    fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }

    /// Attempts, those that `counts`, and the longest time without one of these.
    fn between(
        &self,
        (start, end): (Instant, Instant),
        counts: impl Fn(&Attempt) -> bool,
    ) -> (usize, usize, Duration) {
        let attempts = self.attempts.lock().expect("no client panics");
        let within = attempts.iter().filter(|a| (start..end).contains(&a.at));
        let (mut tries, mut counted, mut last, mut gap) = (0, 0, start, Duration::ZERO);
        for attempt in within {
            tries += 1;
            if counts(attempt) {
                counted += 1;
                gap = gap.max(attempt.at - last);
                last = attempt.at;
            }
        }
        (tries, counted, gap.max(end - last))
    }
}

/// One connection with the question that every PostgreSQL answers: SSLRequest.
fn attempt(source: Ipv4Addr) -> Attempt {
    let at = Instant::now();
    let brief = Duration::from_millis(250);
    let connect = || -> std::io::Result<bool> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.bind(&SocketAddr::new(IpAddr::V4(source), 0).into())?;
        SockRef::from(&socket).set_linger(Some(Duration::ZERO))?;
        socket.connect_timeout(&SocketAddr::new(IpAddr::V4(HOST), PORT).into(), brief)?;
        let mut stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(brief * 4))?;
        stream.write_all(&[0, 0, 0, 8, 4, 210, 22, 47])?;
        let mut answer = [0];
        stream.read_exact(&mut answer)?;
        Ok(matches!(answer, [b'S' | b'N']))
    };
    use std::io::ErrorKind::{
        ConnectionRefused, ConnectionReset, HostUnreachable, NetworkUnreachable, TimedOut,
        WouldBlock,
    };
    let (answered, served) = match connect() {
        Ok(served) => (true, served),
        Err(error) => match error.kind() {
            // A peer that took the connection and then said nothing was there all the same.
            ConnectionRefused | ConnectionReset | WouldBlock => (true, false),
            TimedOut | HostUnreachable | NetworkUnreachable => (false, false),
            _ => (true, false),
        },
    };
    Attempt {
        at,
        answered,
        served,
    }
}

fn wait_for<T>(mut found: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if let Some(found) = found() {
            return Some(found);
        }
        thread::sleep(Duration::from_millis(100));
    }
    None
}
