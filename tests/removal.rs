//! The scripts that remove the package and the tarball, run as they are, where the commands that they
//! call are stand-ins: the order of what they do, and what they do where that fails.

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

/// In a mount namespace of its own: the host that the script meets, the script, and what is left.
const RUN: &str = r#"
mount --bind "$HOST/sbin" /usr/sbin
for path in /run /var/lib /usr/share /etc/systemd; do mount -t tmpfs none "$path"; done
[ -e "$HOST/no-systemd" ] || mkdir -p /run/systemd/system
while mountpoint -q /sys/fs/bpf; do umount /sys/fs/bpf; done
if [ ! -e "$HOST/no-bpffs" ]; then
    mount -t bpf none /sys/fs/bpf
    mkdir -p /sys/fs/bpf/filter-agent/v1
fi
PATH=/usr/sbin:/usr/bin:/bin "$@"
status=$?
find /sys/fs/bpf/filter-agent -mindepth 1 > "$HOST/left" 2>/dev/null
exit $status
"#;

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
            && line.contains("`rm -r /sys/fs/bpf/filter-agent`"),
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
            "systemctl disable --now filter-agent.service",
            "filter-agent detach --yes",
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
    assert_eq!(host.calls(), ["filter-agent detach --yes"]);
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
