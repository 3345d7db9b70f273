//! Images of Debian: what is installed, and what is put into them for a test.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use super::machine::FOLDER;
use super::outside::{ALLOWED, PORT};
use crate::dist::Packages;
use crate::run;

const PACKAGES: &str = "linux-image-cloud-amd64,linux-image-6.12-cloud-amd64,systemd-sysv,udev,dbus,\
                        iproute2,nftables,postgresql,ca-certificates,cloud-init,rpm";

/// A Debian with what every run of the system test needs, made once.
pub fn base() -> Result<PathBuf> {
    let root = Path::new(FOLDER).join("base");
    debian(&root, PACKAGES, &["--variant=minbase"], &[])?;
    Ok(root)
}

/// Makes a Debian 12 with these packages, unless it is there. `options`: of mmdebstrap. `sources`: of apt, besides this host's.
pub fn debian(root: &Path, packages: &str, options: &[&str], sources: &[&str]) -> Result<()> {
    let made = root.with_extension("made");
    let of = format!("{packages}\n{options:?}\n{sources:?}\n");
    if fs::read_to_string(&made).is_ok_and(|text| text == of) {
        return Ok(());
    }
    println!("==> make a Debian image, {}", root.display());
    let folder = root.parent().context("find the image's folder")?;
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    let _ = fs::remove_dir_all(root);
    let mut mmdebstrap = Command::new("mmdebstrap");
    mmdebstrap
        .arg("--quiet")
        .args(options)
        .args(["--include", packages, "bookworm"])
        .arg(root)
        .args(sources);
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
    fs::write(&made, of).with_context(|| format!("write {}", made.display()))
}

/// Writes a file of an image.
pub fn write(root: &Path, path: &str, text: &str) -> Result<()> {
    let path = root.join(path);
    fs::create_dir_all(path.parent().context("find the folder")?)
        .and_then(|()| fs::write(&path, text))
        .with_context(|| format!("write {}", path.display()))
}

/// Installs a package into an image, where nothing is to be started.
pub fn install(root: &Path, package: &Path) -> Result<()> {
    let policy_rc = root.join("usr/sbin/policy-rc.d");
    write(root, "usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n")?;
    fs::set_permissions(&policy_rc, fs::Permissions::from_mode(0o755)).context("set a mode")?;
    let installed = "root/this.deb";
    fs::copy(package, root.join(installed))
        .with_context(|| format!("copy {}", package.display()))?;
    run(Command::new("chroot")
        .arg(root)
        .args(["dpkg", "-i", "/root/this.deb"]))?;
    fs::remove_file(&policy_rc).context("remove policy-rc.d")
}

/// A shell on the second serial port, and what a Debian needs to boot as far as that.
pub fn put_shell(root: &Path) -> Result<()> {
    write(root, "etc/fstab", "/dev/vda / ext4 defaults 0 1\n")?;
    write(root, "etc/hostname", "database\n")?;
    write(
        root,
        "etc/systemd/system/shell.service",
        "[Unit]\nAfter=basic.target\n[Service]\nExecStart=/bin/sh -c 'stty -echo; cat | /bin/sh 2>&1'\n\
         StandardInput=tty\nStandardOutput=tty\nStandardError=tty\nTTYPath=/dev/ttyS1\n\
         Restart=always\n[Install]\nWantedBy=basic.target\n",
    )?;
    enable(root, &["shell.service"])
}

/// Has systemd start these units of an image.
pub fn enable(root: &Path, units: &[&str]) -> Result<()> {
    let mut systemctl = Command::new("systemctl");
    systemctl.arg("--quiet").arg("--root").arg(root);
    run(systemctl.arg("enable").args(units))
}

/// Adds to the image of the system test, besides Debian, the package, a policy, a network, and a database that is open to
/// everybody.
pub fn furnish(root: &Path, this: &Packages, next: &Packages) -> Result<()> {
    let write = |path: &str, text: &str| write(root, path, text);
    for (package, name) in [
        (&next.deb, "next.deb"),
        (&this.rpm, "this.rpm"),
        (&next.rpm, "next.rpm"),
    ] {
        fs::copy(package, root.join("root").join(name))
            .with_context(|| format!("copy {}", package.display()))?;
    }
    install(root, &this.deb)?;
    write("etc/filter-agent/policy.yaml", &policy())?;
    write(
        "etc/systemd/network/10-eth0.network",
        "[Match]\nName=eth0\n[Network]\nDHCP=ipv4\n[DHCPv4]\nClientIdentifier=mac\n",
    )?;
    write(
        "etc/cloud/cloud.cfg.d/99-test.cfg",
        "datasource_list: [None]\n",
    )?;
    write(
        "etc/cloud/cloud.cfg.d/98-network.cfg",
        "network: {config: disabled}\n",
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
    enable(root, &["systemd-networkd.service"])
}

pub fn policy() -> String {
    format!(
        "interfaces: [default]\ndatabases:\n  - name: orders\n    port: {PORT}\n    engine: postgresql\n    \
         model: dedicated\n    rules: [{{cidr: {ALLOWED}/32}}]\n"
    )
}
