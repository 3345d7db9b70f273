//! The packages: a .deb, and a tarball for other distributions.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::{build, cargo, output, run, target_directory};

/// Where the packages end up, below the workspace; `filter-agent/Cargo.toml` names it too.
const FOLDER: &str = "target/dist";

/// Builds both; returns the path of the .deb.
pub fn make() -> Result<PathBuf> {
    build(&["--release"])?;
    let pages = Path::new(FOLDER).join("pages");
    run(cargo()
        .args(["run", "--quiet", "--release", "--package", "filter-agent"])
        .args(["--example", "pages", "--"])
        .arg(&pages))?;
    let deb = package(None)?;
    run(Command::new("lintian")
        .args([
            "--fail-on",
            "error",
            "--suppress-tags",
            "bad-distribution-in-changes-file",
        ])
        .arg(&deb))?;
    tarball(&pages)?;
    Ok(deb)
}

/// A .deb of what is built, of this version or another.
pub fn package(version: Option<&str>) -> Result<PathBuf> {
    let mut deb = cargo();
    deb.args([
        "deb",
        "--quiet",
        "--package",
        "filter-agent",
        "--no-build",
        "--output",
        FOLDER,
    ]);
    if let Some(version) = version {
        deb.args(["--deb-version", version]);
    }
    let path = output(&mut deb)?;
    let path = PathBuf::from(path.trim());
    ensure!(path.exists(), "cargo deb made no package");
    Ok(path)
}

fn tarball(pages: &Path) -> Result<()> {
    let version = env!("CARGO_PKG_VERSION");
    let name = format!("filter-agent-{version}-{}", std::env::consts::ARCH);
    let root = Path::new(FOLDER).join(&name);
    fs::create_dir_all(&root).with_context(|| format!("create {}", root.display()))?;
    let binary = target_directory()?.join("release/filter-agent");
    // As `cargo deb` does with its own copy.
    run(Command::new("strip")
        .arg("-o")
        .arg(root.join("filter-agent"))
        .arg(&binary))?;
    let files = [
        Path::new("dist/filter-agent.service"),
        Path::new("dist/filter-agent-status.socket"),
        Path::new("dist/filter-agent.sysusers"),
        Path::new("dist/policy.yaml"),
        Path::new("dist/database-needs-filter.conf"),
        Path::new("dist/install.sh"),
        Path::new("dist/monitoring/alerts.yaml"),
        Path::new("dist/monitoring/dashboard.json"),
        Path::new("README.md"),
        Path::new("CHANGELOG.md"),
        Path::new("docs/policy.md"),
        Path::new("docs/operations.md"),
        Path::new("docs/api.md"),
        Path::new("docs/openapi.json"),
        Path::new("docs/containers.md"),
        Path::new("docs/fleet.md"),
        Path::new("docs/force-tls.md"),
        Path::new("docs/load-balancers.md"),
        Path::new("docs/metrics.md"),
        Path::new("docs/moving.md"),
        &pages.join("filter-agent.8"),
        &pages.join("filter-agent.bash"),
        &pages.join("_filter-agent"),
        &pages.join("filter-agent.fish"),
    ];
    for file in files {
        let to = root.join(file.file_name().context("name a file")?);
        fs::copy(file, &to).with_context(|| format!("copy {}", file.display()))?;
    }
    let archive = format!("{name}.tar.gz");
    run(Command::new("tar")
        .args(["--owner=0", "--group=0", "-czf"])
        .arg(Path::new(FOLDER).join(&archive))
        .args(["-C", FOLDER, &name]))?;
    println!("{FOLDER}/{archive}");
    Ok(())
}
