//! The packages: a .deb, and a tarball for other distributions.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::{build, cargo, output, run, target_directory};

/// Where the packages end up, below the workspace; `filter-agent/Cargo.toml` names it too.
const FOLDER: &str = "target/dist";

/// The profile that is shipped.
const PROFILE: &str = "shipped";

/// The agent that is packaged.
pub fn binary() -> Result<PathBuf> {
    Ok(target_directory()?.join(PROFILE).join("filter-agent"))
}

/// Builds both; returns the path of the .deb.
pub fn make() -> Result<PathBuf> {
    build(&["--profile", PROFILE])?;
    let pages = Path::new(FOLDER).join("pages");
    run(cargo()
        .args(["run", "--quiet", "--package", "filter-agent"])
        .args(["--example", "pages", "--"])
        .arg(&pages))?;
    policy_page(&pages)?;
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

/// policy.yaml(5), of the text that is the policy's page. lowdown is Debian's smallest program for it that knows tables, and is
/// maintained.
fn policy_page(pages: &Path) -> Result<()> {
    let text = fs::read_to_string("docs/policy.md").context("read docs/policy.md")?;
    let (_, text) = text.split_once('\n').context("find the page's title")?;
    let text = format!(
        "# NAME\n\npolicy.yaml - what filter-agent guards, and who may reach it\n\n# DESCRIPTION\n{text}\n# SEE ALSO\n\n\
         filter-agent(8)\n"
    );
    let source = pages.join("policy.md");
    fs::write(&source, text).with_context(|| format!("write {}", source.display()))?;
    let mut lowdown = Command::new("lowdown");
    lowdown.args(["-s", "-t", "man", "--nroff-nolinks"]);
    lowdown.args(["-M", "title=policy.yaml", "-M", "section=5", "-o"]);
    run(lowdown.arg(pages.join("policy.yaml.5")).arg(&source))
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
        "--profile",
        PROFILE,
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
    // As `cargo deb` does with its own copy.
    run(Command::new("strip")
        .arg("-o")
        .arg(root.join("filter-agent"))
        .arg(binary()?))?;
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
        &pages.join("policy.yaml.5"),
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
