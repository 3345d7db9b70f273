//! The .rpm, which Debian's rpmbuild makes of the same files as the .deb.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::{VERSION, files::Packaged};
use crate::run;

/// Makes the package below `folder`, in which nothing else lies; returns its path.
pub fn make(folder: &Path, files: &[Packaged], release: u32, epoch: &str) -> Result<PathBuf> {
    let folder = std::env::current_dir()
        .context("find the workspace")?
        .join(folder);
    let staged = folder.join("staged");
    let mut listed = String::from(
        "%dir /etc/filter-agent\n%dir /usr/share/filter-agent\n%dir /usr/share/doc/filter-agent\n\
         %dir /usr/share/doc/filter-agent/docs\n%dir /usr/share/doc/filter-agent/examples\n",
    );
    for file in files.iter().filter(|it| !it.is_of_debian()) {
        let target = file.target.to_str().context("name a file")?;
        // Only Debian's zsh looks where the .deb has its completions.
        let target = target.replace("vendor-completions", "site-functions");
        file.put(&staged.join(&target))?;
        let kind = match &target {
            it if it.starts_with("usr/share/doc/") || it.starts_with("usr/share/man/") => "%doc ",
            _ => "",
        };
        listed += &format!("{kind}/{target}\n");
    }
    let list = folder.join("listed");
    fs::write(&list, listed).with_context(|| format!("write {}", list.display()))?;
    let mut build = Command::new("rpmbuild");
    build.env("SOURCE_DATE_EPOCH", epoch);
    let path = |path: &Path| path.display().to_string();
    for (name, value) in [
        ("_topdir", path(&folder)),
        ("_rpmdir", path(&folder)),
        ("version", VERSION.into()),
        ("release", release.to_string()),
        ("staged", path(&staged)),
        ("listed", path(&list)),
        // The program is stripped already, and rpmbuild must not change any file.
        ("debug_package", "%{nil}".into()),
        ("_build_id_links", "none".into()),
        ("__os_install_post", "%{nil}".into()),
        // The same bytes, whoever makes it and when.
        ("use_source_date_epoch_as_buildtime", "1".into()),
        ("clamp_mtime_to_source_date_epoch", "1".into()),
        ("_buildhost", "filter-agent".into()),
        (
            "_rpmfilename",
            "%{NAME}-%{VERSION}-%{RELEASE}.%{ARCH}.rpm".into(),
        ),
    ] {
        build.arg("--define").arg(format!("{name} {value}"));
    }
    run(build.args(["--quiet", "-bb", "dist/filter-agent.spec"]))?;
    let arch = std::env::consts::ARCH;
    let package = folder.join(format!("filter-agent-{VERSION}-{release}.{arch}.rpm"));
    ensure!(package.exists(), "rpmbuild made no {}", package.display());
    Ok(package)
}
