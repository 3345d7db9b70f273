//! The scripts that install and remove the package and the tarball, run as they are, where the commands that they call
//! are stand-ins: the order of what they do, and what they do where that fails.

use std::{
    env,
    fs::{self, Permissions},
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, Output},
};

use nix::unistd::geteuid;

/// Stops the agent, and reports the service as active unless it does not start.
const SYSTEMCTL: &str = r#"#!/bin/sh
echo "${0##*/} $*" >> "$HOST/calls"
case "$*" in
*stop*) rm -f "$HOST/running" ;;
*is-active*) [ ! -e "$HOST/does-not-start" ] ;;
esac
"#;

/// Detaches, unless it cannot. An agent that still runs attaches again.
const DETACH: &str = r#"#!/bin/sh
echo "${0##*/} $*" >> "$HOST/calls"
[ -e "$HOST/cannot-detach" ] && { echo "filter-agent: cannot detach" >&2; exit 1; }
rm -r /sys/fs/bpf/filter-agent
[ ! -e "$HOST/running" ] || mkdir -p /sys/fs/bpf/filter-agent/v1
"#;

/// Records the call.
const CALLED: &str = r#"#!/bin/sh
echo "${0##*/} $*" >> "$HOST/calls"
"#;

/// Prints the state of the package, which is in the name of a file.
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
[ ! -e "$HOST/root" ] || cp -R "$HOST/root/." /
mount --bind "$HOST/sbin" /usr/sbin
for path in /run /var/lib; do mount -t tmpfs none "$path"; done
[ ! -e "$HOST/state-is-a-mount" ] || { mkdir /var/lib/filter-agent; mount -t tmpfs none /var/lib/filter-agent; }
[ -e "$HOST/no-systemd" ] || mkdir -p /run/systemd/system
while mountpoint -q /sys/fs/bpf; do umount /sys/fs/bpf; done
if [ ! -e "$HOST/no-bpffs" ]; then
    mount -t bpf none /sys/fs/bpf
    mkdir -p /sys/fs/bpf/filter-agent/v1
fi
PATH=/usr/sbin:/usr/bin:/bin "$@"
status=$?
find /sys/fs/bpf/filter-agent -mindepth 1 > "$HOST/left" 2>/dev/null
cat /etc/filter-agent/policy.yaml > "$HOST/policy" 2>/dev/null
find "$HOST/layers" -type f -path "*filter-agent*" -printf "/%P\n" |
    sed 's,/upper/,/,' | sort > "$HOST/files"
exit $status
"#;

const POLICY: &str = "/etc/filter-agent/policy.yaml";
const SHIPPED_POLICY: &str = include_str!("../dist/policy.yaml");

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
    "etc-readme",
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
        let directory = env::temp_dir().join(format!("filter-tests-scripts-{test}"));
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(directory.join("sbin")).unwrap();
        for (name, text) in [
            ("systemctl", SYSTEMCTL),
            ("deb-systemd-invoke", SYSTEMCTL),
            ("filter-agent", DETACH),
            ("systemd-sysusers", CALLED),
            ("journalctl", CALLED),
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

    /// A host on which the agent was never installed.
    fn without_agent(self) -> Self {
        fs::remove_file(self.directory.join("sbin/filter-agent")).unwrap();
        self
    }

    fn run(&self, script: &Path, arguments: &[&str]) -> Output {
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--propagation", "private", "sh", "-c", RUN, "sh"])
            .args(["sh".as_ref(), script.as_os_str()])
            .args(arguments)
            .env("HOST", &self.directory);
        command.output().unwrap()
    }

    /// A script of the package.
    fn package(&self, name: &str, arguments: &[&str]) -> Output {
        let text = fs::read_to_string(dist("debian").join(name)).unwrap();
        let script = self.directory.join(name);
        fs::write(&script, text.replace("#DEBHELPER#", SNIPPET)).unwrap();
        self.run(&script, arguments)
    }

    /// The package's script before its files are removed.
    fn prerm(&self, argument: &str) -> Output {
        self.package("prerm", &[argument])
    }

    fn uninstall(&self) -> Output {
        self.run(&dist("install.sh"), &["--remove"])
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
        self.run(&unpacked.join("install.sh"), &[])
    }

    /// Puts a file below `/etc` or `/usr/share` of the host.
    fn put(&self, path: &str, text: &str) {
        let path = self
            .directory
            .join("root")
            .join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// The filter's files that the script wrote below `/etc`, `/usr/lib` and `/usr/share`.
    fn files(&self) -> Vec<String> {
        let text = fs::read_to_string(self.directory.join("files")).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    /// Text of the policy file after the script.
    fn policy(&self) -> String {
        fs::read_to_string(self.directory.join("policy")).unwrap()
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
        host.put(UNIT, &old);
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
    let host = Host::new("install-chroot", &["no-systemd", "no-bpffs"]).without_agent();
    let output = host.install();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(
        host.calls(),
        [
            "systemd-sysusers filter-agent.conf",
            "systemctl enable --force filter-agent.service"
        ]
    );
    assert_eq!(host.policy(), SHIPPED_POLICY);
}

#[test]
fn argument_that_the_script_does_not_have_installs_nothing() {
    let host = Host::new("argument", &[]);
    for argument in ["--help", "remove"] {
        let output = host.run(&dist("install.sh"), &[argument]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains(argument), "{stderr}");
        assert_eq!(host.calls(), [""; 0]);
        assert!(host.is_pinned());
    }
}

#[test]
fn state_directory_that_is_a_mount_does_not_keep_the_rest() {
    let host = Host::new("mount-tarball", &["state-is-a-mount"]);
    let output = host.uninstall();
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("removed;"));
    let host = Host::new("mount-deb", &["state-is-a-mount", "no-bpffs"]);
    host.put(POLICY, "mine");
    let output = host.package("postrm", &["purge"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(host.policy(), "");
}

/// dpkg asked at the upgrade of each host with a policy, stopped where nobody answered, and the wrong answer opened the
/// databases.
#[test]
fn no_installation_puts_another_policy_in_the_place_of_one() {
    for (test, kept, faults, expected) in [
        ("policy-first", None, &["no-bpffs"][..], SHIPPED_POLICY),
        ("policy-kept", Some("mine"), &["no-bpffs"], "mine"),
        ("policy-gone", None, &[], ""),
    ] {
        let host = |of: &str| {
            let host = Host::new(&format!("{test}-{of}"), faults);
            host.put("/usr/share/filter-agent/policy.yaml", SHIPPED_POLICY);
            if let Some(kept) = kept {
                host.put(POLICY, kept);
            }
            host
        };
        let expected_again = kept.unwrap_or_default();
        for (version, expected) in [("", expected), ("0.1.0-1", expected_again)] {
            let host = host("deb");
            let output = host.package("postinst", &["configure", version]);
            assert!(output.status.success(), "{test}: {output:?}");
            assert_eq!(host.policy(), expected, "{test}, over {version:?}");
        }
        for (is_first, expected) in [(true, expected), (false, expected_again)] {
            let host = host("tarball");
            let host = if is_first { host.without_agent() } else { host };
            let output = host.install();
            assert!(output.status.success(), "{test}: {output:?}");
            assert_eq!(host.policy(), expected, "{test}, first: {is_first}");
        }
    }
    let manifest = fs::read_to_string(dist("../filter-agent/Cargo.toml")).unwrap();
    let below_etc: Vec<_> = manifest
        .split('"')
        .filter(|text| text.starts_with("etc/"))
        .collect();
    assert_eq!(below_etc, ["etc/filter-agent/README"]);
}

/// As to a mount that comes later, or of a tool that manages configuration.
#[test]
fn policy_that_is_a_link_to_nowhere_stays_one() {
    let host = |of: &str| {
        let host = Host::new(&format!("link-{of}"), &["no-bpffs"]);
        host.put("/usr/share/filter-agent/policy.yaml", SHIPPED_POLICY);
        let directory = host.directory.join("root/etc/filter-agent");
        fs::create_dir_all(&directory).unwrap();
        symlink("/nowhere/policy.yaml", directory.join("policy.yaml")).unwrap();
        host
    };
    let deb = host("deb");
    let tarball = host("tarball").without_agent();
    for (host, output) in [
        (&deb, deb.package("postinst", &["configure", ""])),
        (&tarball, tarball.install()),
    ] {
        assert!(output.status.success(), "{output:?}");
        assert_eq!(host.policy(), "");
    }
}

#[test]
fn package_begins_the_agent_of_a_tarball_anew_and_not_that_of_a_package() {
    let restart = "deb-systemd-invoke restart filter-agent.service";
    for (version, expected) in [("", true), ("0.1.0-1", false)] {
        let host = Host::new(&format!("begins-{expected}"), &[]);
        let output = host.package("postinst", &["configure", version]);
        assert!(output.status.success(), "{output:?}");
        let restarts = host.calls().iter().any(|call| call == restart);
        assert_eq!(restarts, expected, "{version:?}");
        assert!(host.is_pinned());
    }
}

#[test]
fn failed_start_is_reported_with_what_the_kernel_enforces() {
    for (faults, expected) in [
        (
            &["does-not-start"][..],
            "what the kernel enforced before stays in force",
        ),
        (&["does-not-start", "no-bpffs"], "and nothing is filtered"),
    ] {
        // dpkg passes the earlier version also after a removal, which detached the filter.
        for version in ["", "0.1.0-1"] {
            let host = Host::new("does-not-start", faults);
            host.put(POLICY, "mine");
            let output = host.package("postinst", &["configure", version]);
            assert!(output.status.success(), "{output:?}");
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(stderr.contains(expected), "{stderr}");
        }
    }
}

#[test]
fn purge_leaves_what_is_not_of_the_package() {
    for (faults, expected) in [
        (&["no-bpffs"][..], &["/etc/filter-agent/etcd.key"][..]),
        // Pinned by an agent that was installed in another way after the removal.
        (&[], &["/etc/filter-agent/etcd.key", POLICY]),
    ] {
        let host = Host::new("purge", faults);
        host.put(POLICY, "mine");
        host.put("/etc/filter-agent/etcd.key", "key");
        let output = host.package("postrm", &["purge"]);
        assert!(output.status.success(), "{output:?}");
        assert_eq!(host.files(), expected);
    }
}
