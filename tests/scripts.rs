//! The scripts that install the tarball, and that remove it and the package, run as they are, where the commands that
//! they call are stand-ins: the order of what they do, and what they do where that fails.

use std::{
    env,
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use nix::unistd::geteuid;

/// Stops the service: there is no agent any more.
const STOP: &str = r#"#!/bin/sh
echo "${0##*/} $*" >> "$HOST/calls"
case "$*" in *stop*|*--now*) rm -f "$HOST/running" ;; esac
"#;

/// Detaches, unless it cannot. An agent that still runs attaches again.
const DETACH: &str = r#"#!/bin/sh
echo "${0##*/} $*" >> "$HOST/calls"
[ -e "$HOST/cannot-detach" ] && { echo "filter-agent: cannot detach" >&2; exit 1; }
rm -r /sys/fs/bpf/filter-agent
[ ! -e "$HOST/running" ] || mkdir -p /sys/fs/bpf/filter-agent/v1
"#;

/// Writes down that it was called.
const CALLED: &str = r#"#!/bin/sh
echo "${0##*/} $*" >> "$HOST/calls"
"#;

/// Says in what state the package is, if a file has it in its name.
const DPKG_QUERY: &str = r#"#!/bin/sh
[ ! -e "$HOST/dpkg-fails" ] || exit 2
for state in "$HOST"/dpkg-*; do [ -e "$state" ] && echo "${state##*/dpkg-}" && exit; done
exit 1
"#;

const RPM: &str = r#"#!/bin/sh
[ -e "$HOST/rpm-installed" ]
"#;

/// In a mount namespace of its own: the host that the script meets, the script, and what is left.
const RUN: &str = r#"
mkdir -p "$HOST/layers"
mount -t tmpfs none "$HOST/layers"
for path in /etc /usr/lib /usr/share; do
    mkdir -p "$HOST/layers$path/upper" "$HOST/layers$path/work"
    mount -t overlay none -o "lowerdir=$path,upperdir=$HOST/layers$path/upper,workdir=$HOST/layers$path/work" "$path"
done
[ ! -e "$HOST/etc" ] || cp -R "$HOST/etc/." /etc
mount --bind "$HOST/sbin" /usr/sbin
for path in /run /var/lib; do mount -t tmpfs none "$path"; done
[ -e "$HOST/no-systemd" ] || mkdir -p /run/systemd/system
while mountpoint -q /sys/fs/bpf; do umount /sys/fs/bpf; done
if [ ! -e "$HOST/no-bpffs" ]; then
    mount -t bpf none /sys/fs/bpf
    mkdir -p /sys/fs/bpf/filter-agent/v1
fi
PATH=/usr/sbin:/usr/bin:/bin "$@"
status=$?
find /sys/fs/bpf/filter-agent -mindepth 1 > "$HOST/left" 2>/dev/null
find "$HOST/layers" -type f -path "*filter-agent*" -printf "/%P\n" |
    sed 's,/upper/,/,' | sort > "$HOST/files"
exit $status
"#;

/// Files of the tarball that are made for it.
const GENERATED: [&str; 14] = [
    "filter-agent",
    "filter-agent.8",
    "policy.yaml.5",
    "filter-agent.bash",
    "_filter-agent",
    "filter-agent.fish",
    "licences.gz",
    "filter-agent.cdx.json.gz",
    "docs/policy.md",
    "README.md",
    "CHANGELOG.md",
    "LICENSE-MIT",
    "LICENSE-APACHE",
    "LICENSE-GPL2",
];

/// Other files of the tarball, from `dist`.
const SHIPPED: [&str; 9] = [
    "install.sh",
    "filter-agent.service",
    "filter-agent-status.socket",
    "filter-agent.sysusers",
    "policy.yaml",
    "policy.md",
    "database-needs-filter.conf",
    "monitoring/alerts.yaml",
    "monitoring/dashboard.json",
];

/// Stops the service at the place where cargo-deb does.
const SNIPPET: &str = r#"
if [ -d /run/systemd/system ] && [ "$1" = remove ]; then
    deb-systemd-invoke stop filter-agent.service
fi
"#;

/// A host with the agent installed, running and enforcing.
struct Host {
    directory: PathBuf,
}

impl Host {
    /// `faults`: names of files that the stand-ins and `RUN` look for.
    fn new(test: &str, faults: &[&str]) -> Self {
        assert!(geteuid().is_root(), "this test mounts, which needs root");
        let directory = env::temp_dir().join(format!("filter-tests-removal-{test}"));
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(directory.join("sbin")).unwrap();
        for (name, text) in [
            ("systemctl", STOP),
            ("deb-systemd-invoke", STOP),
            ("filter-agent", DETACH),
            ("systemd-sysusers", CALLED),
            ("dpkg-query", DPKG_QUERY),
            ("rpm", RPM),
        ] {
            let path = directory.join("sbin").join(name);
            fs::write(&path, text).unwrap();
            fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
        }
        for file in faults.iter().chain(&["running", "calls"]) {
            fs::write(directory.join(file), "").unwrap();
        }
        Self { directory }
    }

    fn run(&self, script: &Path, argument: &str) -> Output {
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--propagation", "private", "sh", "-c", RUN, "sh"])
            .args(["sh".as_ref(), script.as_os_str(), argument.as_ref()])
            .env("HOST", &self.directory);
        command.output().unwrap()
    }

    /// The package's script before its files are removed.
    fn prerm(&self, argument: &str) -> Output {
        let text = fs::read_to_string(dist("debian/prerm")).unwrap();
        let script = self.directory.join("prerm");
        fs::write(&script, text.replace("#DEBHELPER#", SNIPPET)).unwrap();
        self.run(&script, argument)
    }

    fn uninstall(&self) -> Output {
        self.run(&dist("install.sh"), "--remove")
    }

    /// Runs the script in a folder like the unpacked tarball.
    fn install(&self) -> Output {
        let unpacked = self.directory.join("unpacked");
        fs::create_dir_all(unpacked.join("docs")).unwrap();
        for name in GENERATED {
            fs::write(unpacked.join(name), "").unwrap();
        }
        for name in SHIPPED {
            let to = unpacked.join(Path::new(name).file_name().unwrap());
            fs::copy(dist(name), to).unwrap();
        }
        self.run(&unpacked.join("install.sh"), "")
    }

    /// Puts a file below `/etc` of the host.
    fn put(&self, path: &str, text: &str) {
        let path = self.directory.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// The filter's files that the script wrote below `/etc`, `/usr/lib` and `/usr/share`.
    fn files(&self) -> Vec<String> {
        let text = fs::read_to_string(self.directory.join("files")).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    fn calls(&self) -> Vec<String> {
        let text = fs::read_to_string(self.directory.join("calls")).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    fn is_pinned(&self) -> bool {
        !fs::read_to_string(self.directory.join("left"))
            .unwrap()
            .is_empty()
    }

    fn has_binary(&self) -> bool {
        self.directory.join("sbin/filter-agent").exists()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn dist(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../dist")
        .join(name)
}

#[track_caller]
fn assert_refused(output: &Output) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    let line = stderr.lines().last().unwrap_or_default();
    assert!(
        line.contains("still pinned below /sys/fs/bpf/filter-agent")
            && line.contains("`systemctl stop filter-agent; rm -r /sys/fs/bpf/filter-agent`"),
        "{stderr}"
    );
}

#[test]
fn service_is_stopped_before_the_filter_is_detached() {
    let host = Host::new("order-deb", &[]);
    let output = host.prerm("remove");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(
        host.calls(),
        [
            "deb-systemd-invoke stop filter-agent.service",
            "filter-agent detach --yes"
        ]
    );
    assert!(!host.is_pinned());

    let host = Host::new("order-tarball", &[]);
    let output = host.uninstall();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(
        host.calls(),
        [
            "systemctl stop filter-agent.service",
            "filter-agent detach --yes",
            "systemctl disable filter-agent.service",
            "systemctl daemon-reload"
        ]
    );
    assert!(!host.is_pinned() && !host.has_binary());
}

#[test]
fn removal_is_refused_while_the_filter_is_pinned() {
    let host = Host::new("pinned-deb", &["cannot-detach"]);
    assert_refused(&host.prerm("remove"));
    assert!(host.is_pinned());

    let host = Host::new("pinned-tarball", &["cannot-detach"]);
    assert_refused(&host.uninstall());
    assert!(host.is_pinned() && host.has_binary());
    // Still enabled: a host that boots before somebody looks is not open.
    assert_eq!(
        host.calls(),
        [
            "systemctl stop filter-agent.service",
            "filter-agent detach --yes"
        ]
    );
}

#[test]
fn host_without_systemd_detaches_only() {
    // No agent runs there either, or this would be the refusal above.
    let host = Host::new("no-systemd-deb", &["no-systemd"]);
    fs::remove_file(host.directory.join("running")).unwrap();
    let output = host.prerm("remove");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(host.calls(), ["filter-agent detach --yes"]);
    assert!(!host.is_pinned());

    let host = Host::new("no-systemd-tarball", &["no-systemd"]);
    fs::remove_file(host.directory.join("running")).unwrap();
    let output = host.uninstall();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(
        host.calls(),
        [
            "filter-agent detach --yes",
            "systemctl disable filter-agent.service"
        ]
    );
    assert!(!host.is_pinned() && !host.has_binary());
}

#[test]
fn host_without_bpf_file_system_removes_all_the_same() {
    let faults = ["no-bpffs", "cannot-detach"];
    let host = Host::new("no-bpffs-deb", &faults);
    let output = host.prerm("remove");
    assert!(output.status.success(), "{output:?}");

    let host = Host::new("no-bpffs-tarball", &faults);
    let output = host.uninstall();
    assert!(output.status.success(), "{output:?}");
    assert!(!host.has_binary());
}

#[test]
fn upgrade_leaves_the_filter_in_force() {
    let host = Host::new("upgrade", &[]);
    let output = host.prerm("upgrade");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(host.calls(), [""; 0]);
    assert!(host.is_pinned());
}

/// Else the package's purge would take the policy of the tarball's agent along, and disable its service.
#[test]
fn tarball_neither_replaces_nor_removes_a_package() {
    for (package, expected) in [
        (
            "dpkg-installed",
            "dpkg has a package filter-agent (installed)",
        ),
        (
            "dpkg-config-files",
            "dpkg has a package filter-agent (config-files)",
        ),
        ("dpkg-fails", "dpkg-query fails"),
        ("rpm-installed", "rpm has a package filter-agent"),
    ] {
        let host = Host::new(&format!("package-{package}"), &[package]);
        for output in [host.install(), host.uninstall()] {
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{package}: {stderr}");
            assert!(stderr.contains(expected), "{package}: {stderr}");
            assert_eq!(host.calls(), [""; 0], "{package}");
            assert_eq!(host.files(), [""; 0], "{package}");
            assert!(host.is_pinned() && host.has_binary(), "{package}");
        }
    }
}

#[test]
fn tarball_takes_the_place_of_0_1_0_and_of_no_administrators_unit() {
    const UNIT: &str = "/etc/systemd/system/filter-agent.service";
    for (test, old, stays) in [
        (
            "unit-0.1.0",
            include_str!("released/0.1.0.service").to_owned(),
            false,
        ),
        (
            "unit-edited",
            format!("{}#", include_str!("released/0.1.0.service")),
            true,
        ),
    ] {
        let host = Host::new(test, &[]);
        host.put(UNIT.trim_start_matches('/'), &old);
        let output = host.install();
        assert!(output.status.success(), "{output:?}");
        let files = host.files();
        assert_eq!(files.iter().any(|file| file == UNIT), stays, "{files:?}");
        let new = "/usr/lib/systemd/system/filter-agent.service";
        assert!(files.iter().any(|file| file == new), "{files:?}");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(stderr.contains(UNIT), stays, "{stderr}");
    }
}

/// As in an image that is being built: the service is enabled, for its first boot.
#[test]
fn tarball_is_installed_where_systemd_does_not_run() {
    let host = Host::new("install-chroot", &["no-systemd"]);
    host.put("etc/filter-agent/policy.yaml.rpmsave", "");
    let output = host.install();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(
        host.calls(),
        [
            "systemd-sysusers filter-agent.conf",
            "systemctl enable filter-agent.service"
        ]
    );
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        stderr.contains("/etc/filter-agent/policy.yaml.rpmsave; the new one guards nothing"),
        "{stderr}"
    );
    assert!(
        host.files()
            .contains(&"/etc/filter-agent/policy.yaml".into())
    );
}

/// dpkg compares what a package ships with what the last one shipped: another byte, and it asks at the upgrade of each host
/// with a policy, where the wrong answer opens the databases, and no answer stops the upgrade.
#[test]
fn policy_that_is_shipped_is_that_of_0_1_0() {
    let hash = Command::new("sha256sum")
        .arg(dist("policy.yaml"))
        .output()
        .unwrap();
    let hash = String::from_utf8(hash.stdout).unwrap();
    assert!(
        hash.starts_with("b73cf5af583ab805a3990644c415e66298ba658f1bce423d9e129525414a7eb8 "),
        "{hash}"
    );
}
