//! A booted Debian with systemd, PostgreSQL and the package, and a shell in it.

use std::fs::{self, File};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::image::put_shell;
use super::outside::{HOST_MAC, inside};
use crate::{output, run};

pub const FOLDER: &str = "target/vm";

/// Limit of every wait for something that must happen in the machine, whose processor is emulated.
pub const PATIENCE: Duration = Duration::from_secs(900);

/// The parts of a machine.
pub struct Design {
    /// The beginning of Linux's version, and the end of the kernel's name (`cloud-amd64`).
    pub kernel: (String, &'static str),
    /// Where its image, its disk and the log of its console are.
    pub folder: PathBuf,
    /// Starts QEMU, where its interfaces end.
    pub qemu: fn() -> Command,
    /// QEMU's options for these.
    pub interfaces: Vec<String>,
}

impl Design {
    fn console_log(&self) -> PathBuf {
        self.folder.join(format!("console-{}.log", self.kernel.0))
    }

    fn monitor(&self) -> PathBuf {
        self.folder.join("monitor.sock")
    }
}

pub struct Machine {
    design: Design,
    qemu: Child,
    shell: UnixStream,
    asked: u32,
}

impl Machine {
    /// Powers it on, in the network that is outside of it, and waits until there is a shell.
    pub fn boot(
        design: Design,
        base: &Path,
        furnish: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<Self> {
        println!("==> boot Linux {}", design.kernel.0);
        let folder = &design.folder;
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
        let root = folder.join("root");
        let disk = folder.join("disk.img");
        let _ = fs::remove_dir_all(&root);
        run(Command::new("cp")
            .args(["-a", "--reflink=auto"])
            .arg(base)
            .arg(&root))?;
        put_shell(&root)?;
        furnish(&root)?;
        let _ = fs::remove_file(&disk);
        run(Command::new("mke2fs")
            .args(["-q", "-t", "ext4", "-d"])
            .arg(&root)
            .arg(&disk)
            .arg("3G"))?;
        let console = File::create(design.console_log()).context("create the console's log")?;
        let (qemu, shell) = start(&design, console, "utc")?;
        let mut machine = Self {
            design,
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
        let console = File::options().append(true).open(self.design.console_log());
        let console = console.context("open the console's log")?;
        (self.qemu, self.shell) = start(&self.design, console, clock.trim())?;
        self.wait_for_shell(&before)
    }

    /// Plugs the cable of an interface in, or out. `device`: the id of QEMU's device.
    pub fn set_link(&self, device: &str, is_up: bool) -> Result<()> {
        let state = if is_up { "on" } else { "off" };
        let mut monitor = UnixStream::connect(self.design.monitor()).context("reach QEMU")?;
        monitor
            .write_all(format!("set_link {device} {state}\n").as_bytes())
            .with_context(|| format!("set the link of {device}"))
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

/// Powers a machine on. Returns it, and the shell on its second serial port. `clock`: as QEMU's `-rtc base=` takes it.
fn start(design: &Design, console: File, clock: &str) -> Result<(Child, UnixStream)> {
    let folder = &design.folder;
    let (version, flavour) = &design.kernel;
    let boot = |kind: &str| -> Result<PathBuf> {
        let prefix = format!("{kind}-{version}.");
        let files = fs::read_dir(folder.join("root/boot")).context("list the image's kernels")?;
        files
            .filter_map(|file| Some(file.ok()?.path()))
            .find(|path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                name.starts_with(&prefix) && name.ends_with(flavour)
            })
            .with_context(|| format!("the image has no {prefix}*{flavour}"))
    };
    let socket = folder.join("shell.sock");
    let _ = fs::remove_file(&socket);
    let mut qemu = (design.qemu)()
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
        .args(&design.interfaces)
        .args(["-serial", "stdio", "-serial"])
        .arg(format!("unix:{},server=on,wait=off", socket.display()))
        .arg("-monitor")
        .arg(format!(
            "unix:{},server=on,wait=off",
            design.monitor().display()
        ))
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
        .with_context(|| format!("start QEMU, see {}", design.console_log().display()))?;
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

/// The machine of the system test.
pub fn design(kernel: &str) -> Design {
    let tap = |id: &str, tap: &str| format!("tap,id={id},ifname={tap},script=no,downscript=no");
    let interfaces = [
        "-netdev",
        &tap("net", "tap0"),
        "-device",
        &format!("{VIRTIO_NET},mac={HOST_MAC}"),
        "-netdev",
        &tap("merging", "tap1"),
        "-device",
        MERGING_VIRTIO_NET,
    ];
    Design {
        kernel: (kernel.into(), "cloud-amd64"),
        folder: FOLDER.into(),
        qemu: || inside("qemu-system-x86_64"),
        interfaces: interfaces.map(str::to_owned).to_vec(),
    }
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
