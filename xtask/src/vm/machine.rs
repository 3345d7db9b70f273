//! A booted Debian with systemd, PostgreSQL and the package, and a shell in it.

use std::fs::{self, File};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::outside::{ALLOWED, HOST_MAC, PORT, inside};
use crate::dist::Packages;
use crate::{output, run};

pub const FOLDER: &str = "target/vm";

/// Limit of every wait for something that must happen in the machine, whose processor is emulated.
pub const PATIENCE: Duration = Duration::from_secs(900);

const PACKAGES: &str = "linux-image-cloud-amd64,linux-image-6.12-cloud-amd64,systemd-sysv,udev,dbus,\
                        iproute2,nftables,postgresql,ca-certificates,cloud-init,rpm";

/// A Debian with what every run needs, made once.
pub fn base() -> Result<PathBuf> {
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

pub struct Machine {
    kernel: String,
    qemu: Child,
    shell: UnixStream,
    asked: u32,
}

impl Machine {
    /// Powers it on, in the network that is outside of it, and waits until there is a shell.
    pub fn boot(
        kernel: &str,
        base: &Path,
        furnish: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<Self> {
        println!("==> boot Linux {kernel}");
        let folder = Path::new(FOLDER);
        let root = folder.join("root");
        let disk = folder.join("disk.img");
        let _ = fs::remove_dir_all(&root);
        run(Command::new("cp")
            .args(["-a", "--reflink=auto"])
            .arg(base)
            .arg(&root))?;
        furnish(&root)?;
        let _ = fs::remove_file(&disk);
        run(Command::new("mke2fs")
            .args(["-q", "-t", "ext4", "-d"])
            .arg(&root)
            .arg(&disk)
            .arg("3G"))?;
        let console_log = console_log(kernel);
        let console = File::create(&console_log).context("create the console's log")?;
        let (qemu, shell) = start(kernel, console, "utc")?;
        let mut machine = Self {
            kernel: kernel.into(),
            qemu,
            shell,
            asked: 0,
        };
        machine.wait_for_shell("")?;
        Ok(machine)
    }

    /// Powers it off, and on again with a clock that says that so many hours have passed.
    pub fn switch_off_for(&mut self, hours: u32) -> Result<()> {
        let before = self.command("cat /proc/sys/kernel/random/boot_id")?;
        self.power_off()?;
        let later = format!("+{hours} hours");
        let clock = output(Command::new("date").args(["-u", "-d", &later, "+%FT%T"]))?;
        let console = File::options().append(true).open(console_log(&self.kernel));
        let console = console.context("open the console's log")?;
        (self.qemu, self.shell) = start(&self.kernel, console, clock.trim())?;
        self.wait_for_shell(&before)
    }

    pub fn power_off(&mut self) -> Result<()> {
        self.shell
            .write_all(b"systemctl poweroff\n")
            .context("power off")?;
        let gone = wait_for(|| self.qemu.try_wait().ok().flatten());
        gone.context("wait for the machine to power off")?;
        Ok(())
    }

    /// Waits until the shell of another boot answers. What is typed before it is there is lost.
    fn wait_for_shell(&mut self, last_boot: &str) -> Result<()> {
        let mut read = Vec::new();
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            self.shell
                .write_all(b"\necho BOOT-$(cat /proc/sys/kernel/random/boot_id)\n")
                .context("write to the machine's shell")?;
            let again = Instant::now() + Duration::from_secs(2);
            while Instant::now() < again {
                self.read(&mut read)?;
                let text = String::from_utf8_lossy(&read);
                let mut boots = text.lines().filter_map(|l| l.trim().strip_prefix("BOOT-"));
                if boots.any(|boot| boot.len() == 36 && boot != last_boot) {
                    return Ok(());
                }
            }
        }
        bail!("the machine does not get as far as a shell")
    }

    /// Runs a command in the machine. Returns its output.
    pub fn command(&mut self, command: &str) -> Result<String> {
        self.asked += 1;
        let (begin, end) = (
            format!("BEGIN-{}", self.asked),
            format!("END-{}", self.asked),
        );
        // The command's output need not end in a line's end.
        let text = format!("\necho {begin}\n{command}\necho; echo {end}\n");
        self.shell
            .write_all(text.as_bytes())
            .context("write to the machine's shell")?;
        let mut read = Vec::new();
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            self.read(&mut read)?;
            let text = String::from_utf8_lossy(&read);
            let lines: Vec<&str> = text.lines().map(str::trim).collect();
            let place = |marker: &str| lines.iter().position(|line| *line == marker);
            if let (Some(begin), Some(end)) = (place(&begin), place(&end)) {
                return Ok(lines[begin + 1..end].join("\n").trim().to_owned());
            }
        }
        bail!("`{command}` does not end in the machine")
    }

    /// Appends what the shell printed, if it did within half a second.
    fn read(&mut self, read: &mut Vec<u8>) -> Result<()> {
        let mut buffer = [0; 4096];
        match self.shell.read(&mut buffer) {
            Ok(0) => bail!("the machine is gone"),
            Ok(length) => read.extend_from_slice(&buffer[..length]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("read from the machine's shell"),
        }
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

fn console_log(kernel: &str) -> PathBuf {
    Path::new(FOLDER).join(format!("console-{kernel}.log"))
}

/// Powers a machine on. Returns it, and the shell on its second serial port. `clock`: as QEMU's `-rtc base=` takes it.
fn start(kernel: &str, console: File, clock: &str) -> Result<(Child, UnixStream)> {
    let folder = Path::new(FOLDER);
    let boot = |kind: &str| -> Result<PathBuf> {
        let prefix = format!("{kind}-{kernel}.");
        let files = fs::read_dir(folder.join("root/boot")).context("list the image's kernels")?;
        files
            .filter_map(|file| Some(file.ok()?.path()))
            .find(|path| {
                let name = path.file_name().unwrap_or_default();
                name.to_string_lossy().starts_with(&prefix)
            })
            .with_context(|| format!("the image has no {prefix}*"))
    };
    let socket = folder.join("shell.sock");
    let _ = fs::remove_file(&socket);
    let mut qemu = inside("qemu-system-x86_64")
        .args(["-m", "1024", "-smp", "2", "-display", "none"])
        .args(["-machine", "q35,accel=tcg", "-cpu", "max"])
        .args(["-rtc", &format!("base={clock}")])
        .arg("-kernel")
        .arg(boot("vmlinuz")?)
        .arg("-initrd")
        .arg(boot("initrd.img")?)
        .args([
            "-append",
            "root=/dev/vda rw console=ttyS0 net.ifnames=0 \
             systemd.journald.forward_to_console=1 systemd.default_timeout_start_sec=600",
        ])
        .arg("-drive")
        .arg(format!(
            "file={},format=raw,if=virtio,cache=unsafe",
            folder.join("disk.img").display()
        ))
        .args(["-netdev", "tap,id=net,ifname=tap0,script=no,downscript=no"])
        .arg("-device")
        .arg(format!("{VIRTIO_NET},mac={HOST_MAC}"))
        .args([
            "-netdev",
            "tap,id=merging,ifname=tap1,script=no,downscript=no",
        ])
        .args(["-device", MERGING_VIRTIO_NET])
        .args(["-serial", "stdio", "-serial"])
        .arg(format!("unix:{},server=on,wait=off", socket.display()))
        .stdin(Stdio::null())
        .stdout(console.try_clone().context("share the console's log")?)
        .stderr(console)
        .spawn()
        .context("start qemu-system-x86_64")?;
    let shell = wait_for(|| match qemu.try_wait() {
        Ok(Some(_)) => Some(None),
        _ => UnixStream::connect(&socket).ok().map(Some),
    });
    let shell = shell
        .flatten()
        .with_context(|| format!("start QEMU, see {}", console_log(kernel).display()))?;
    shell
        .set_read_timeout(Some(Duration::from_millis(500)))
        .context("set up the shell")?;
    Ok((qemu, shell))
}

/// Without the offloads that keep this driver from native mode.
const VIRTIO_NET: &str = "virtio-net-pci,netdev=net,guest_tso4=off,guest_tso6=off,guest_ecn=off,\
                          guest_ufo=off,guest_csum=off";

/// With offloads that the guest cannot switch off: the driver refuses native mode.
const MERGING_VIRTIO_NET: &str = "virtio-net-pci,netdev=merging,ctrl_guest_offloads=off";

/// Adds to the image, besides Debian, the package, a policy, a network, a database that is open to
/// everybody, and a shell on the second serial port.
pub fn furnish(root: &Path, this: &Packages, next: &Packages) -> Result<()> {
    let write = |path: &str, text: &str| -> Result<()> {
        let path = root.join(path);
        fs::create_dir_all(path.parent().context("find the folder")?)
            .and_then(|()| fs::write(&path, text))
            .with_context(|| format!("write {}", path.display()))
    };
    for (package, name) in [
        (&this.deb, "this.deb"),
        (&next.deb, "next.deb"),
        (&this.rpm, "this.rpm"),
        (&next.rpm, "next.rpm"),
    ] {
        fs::copy(package, root.join("root").join(name))
            .with_context(|| format!("copy {}", package.display()))?;
    }
    write("usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n")?;
    let executable = fs::Permissions::from_mode(0o755);
    fs::set_permissions(root.join("usr/sbin/policy-rc.d"), executable).context("set a mode")?;
    run(Command::new("chroot")
        .arg(root)
        .args(["dpkg", "-i", "/root/this.deb"]))?;
    fs::remove_file(root.join("usr/sbin/policy-rc.d")).context("remove policy-rc.d")?;
    write("etc/filter-agent/policy.yaml", &policy())?;
    write(
        "etc/systemd/network/10-eth0.network",
        "[Match]\nName=eth0\n[Network]\nDHCP=ipv4\n[DHCPv4]\nClientIdentifier=mac\n",
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
        "listen_addresses = '*'\nauthentication_timeout = 600\n",
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

pub fn policy() -> String {
    format!(
        "interfaces: [default]\ndatabases:\n  - name: orders\n    port: {PORT}\n    engine: postgresql\n    \
         model: dedicated\n    rules: [{{cidr: {ALLOWED}/32}}]\n"
    )
}

/// Waits until a closure finds something, for as long as an emulated processor may take.
pub fn wait_for<T>(mut found: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if let Some(found) = found() {
            return Some(found);
        }
        thread::sleep(Duration::from_millis(100));
    }
    None
}
