//! The packages: a .deb, an .rpm, and a tarball for other distributions.

mod contents;
mod files;
mod rpm;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::{cargo, output, run, target_directory};
use files::{Packaged, check_links, packaged};

/// Where the packages end up, below the workspace.
const FOLDER: &str = "target/dist";

/// Files that are generated for the packages; `filter-agent/Cargo.toml` names this folder too.
const PAGES: &str = "target/dist/pages";

/// Cargo's profile of the agent in the packages.
#[derive(Clone, Copy)]
pub enum Profile {
    /// The profile of the packages that users install.
    Shipped,
    /// The profile of the tests, which have built the agent already.
    Dev,
}

impl Profile {
    fn name(self) -> &'static str {
        match self {
            Self::Shipped => "shipped",
            Self::Dev => "dev",
        }
    }

    /// Path of the agent that cargo built with this profile.
    pub fn binary(self) -> Result<PathBuf> {
        let folder = match self {
            Self::Shipped => "shipped",
            Self::Dev => "debug",
        };
        Ok(target_directory()?.join(folder).join("filter-agent"))
    }
}

pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The packages of one build.
pub struct Packages {
    pub deb: PathBuf,
    pub rpm: PathBuf,
    pub tarball: PathBuf,
}

/// Builds the agent, and makes the packages twice, which have to be the same bytes.
pub fn make(profile: Profile) -> Result<Packages> {
    let mut build = cargo();
    build.args(["build", "--package", "filter-agent"]);
    build.args(["--profile", profile.name()]);
    if let Profile::Shipped = profile {
        build.env("CARGO_ENCODED_RUSTFLAGS", remapped()?);
    }
    run(&mut build)?;
    let made = package(profile, FOLDER, 1)?;
    let again = package(profile, "target/dist-again", 1)?;
    for (one, other) in [
        (&made.deb, &again.deb),
        (&made.rpm, &again.rpm),
        (&made.tarball, &again.tarball),
    ] {
        let read = |path: &Path| fs::read(path).with_context(|| format!("read {}", path.display()));
        ensure!(
            read(one)? == read(other)?,
            "{} has other bytes each time that it is made",
            one.display()
        );
    }
    run(Command::new("lintian")
        .args(["--pedantic", "--display-info"])
        .args(["--fail-on", "error,warning,info,pedantic"])
        .arg(&made.deb))?;
    Ok(made)
}

/// Flags of the compiler by which it matters to nothing where the sources lie: of the workspace, of the crates, and of the standard
/// library, which messages of panics name.
fn remapped() -> Result<String> {
    let sysroot = output(Command::new("rustc").args(["--print", "sysroot"]))?;
    let library = Path::new(sysroot.trim()).join("lib/rustlib/src/rust");
    let workspace = std::env::current_dir().context("find the workspace")?;
    let home = std::env::var_os("CARGO_HOME").filter(|home| !home.is_empty());
    let home = home.map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    let home = home.context("find cargo's home directory")?;
    let mut prefixes = [(library, "/rust"), (home, "/cargo"), (workspace, ".")];
    // One may be inside another, and the last that matches counts.
    prefixes.sort_by_key(|(from, _)| from.as_os_str().len());
    let flags = prefixes.map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display()));
    // Cargo splits this variable there, so that paths may have spaces; the user's own flags are not used.
    Ok(flags.join("\x1f"))
}

/// Packages what is built, and removes everything else from `folder`. `revision`: of the packaging.
pub fn package(profile: Profile, folder: &str, revision: u32) -> Result<Packages> {
    let folder = Path::new(folder);
    // An earlier run may have left a file that is no longer packaged.
    let _ = fs::remove_dir_all(folder);
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    let mut log = Command::new("git");
    let epoch = output(log.args(["log", "-1", "--format=%ct"]))
        .context("find the date of the last commit")?;
    let epoch = epoch.trim();
    pages(revision, epoch)?;
    let files = packaged(&profile.binary()?)?;
    check_links(&files)?;
    Ok(Packages {
        deb: deb(profile, folder, revision, epoch)?,
        rpm: rpm::make(&folder.join("rpm"), &files, revision, epoch)?,
        tarball: tarball(folder, &files, epoch)?,
    })
}

/// The files that are made for the packages.
fn pages(revision: u32, epoch: &str) -> Result<()> {
    let pages = Path::new(PAGES);
    run(cargo()
        .args(["run", "--quiet", "--package", "filter-agent"])
        .args(["--example", "pages", "--"])
        .arg(pages))?;
    policy_page(pages)?;
    let write = |name: &str, text: &str| {
        let path = pages.join(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    };
    let readme = fs::read_to_string("README.md").context("read README.md")?;
    let readme = readme.replace("](CHANGELOG.md)", "](changelog.gz)");
    let licences = ["](LICENSE-MIT)", "](LICENSE-APACHE)", "](LICENSE-GPL2)"];
    let readme = licences
        .iter()
        .fold(readme, |text, link| text.replace(link, "](copyright)"));
    write("README.md", &readme)?;
    write("copyright", &copyright()?)?;
    write("licences", &contents::licences()?)?;
    write("filter-agent.cdx.json", &contents::bill(epoch)?)?;
    let changes = fs::read_to_string("CHANGELOG.md").context("read CHANGELOG.md")?;
    write("changelog", &changes)?;
    for name in ["licences", "filter-agent.cdx.json", "changelog"] {
        run(Command::new("gzip")
            .args(["--best", "--no-name", "--force"])
            .arg(pages.join(name)))?;
    }
    let date = output(
        Command::new("date")
            .args(["--utc", "--rfc-email", "--date"])
            .arg(format!("@{epoch}")),
    )?;
    write(
        "changelog.Debian",
        &format!(
            "filter-agent ({VERSION}-{revision}) unstable; urgency=medium\n\n  \
             * Version {VERSION}: what changed is in /usr/share/doc/filter-agent/changelog.gz.\n\n \
             -- filter-agent developers <filter-agent@example.org>  {date}"
        ),
    )
}

/// In Debian's format. What Debian has a common text of must not be repeated there: `licences.gz` has it for other systems.
fn copyright() -> Result<String> {
    let mut text = String::from(
        "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n\
         Upstream-Name: filter-agent\n\
         Comment: licences.gz, beside this file, has the licences of the crates inside.\n\n\
         Files: *\n\
         Copyright: 2026, the filter-agent developers\n\
         License: MIT or Apache-2.0\n\n\
         Files: filter-ebpf/*\n\
         Copyright: 2026, the filter-agent developers\n\
         License: MIT or GPL-2\n\
         Comment: The programs in the kernel, which are inside /usr/sbin/filter-agent.\n",
    );
    for name in ["Apache-2.0", "GPL-2"] {
        text += &format!(
            "\nLicense: {name}\n The text is in /usr/share/common-licenses/{name} of Debian, and in licences.gz.\n"
        );
    }
    text += "\nLicense: MIT\n";
    let licence = fs::read_to_string("LICENSE-MIT").context("read LICENSE-MIT")?;
    for line in licence.trim_end().lines() {
        let line = if line.is_empty() { "." } else { line };
        text += &format!(" {line}\n");
    }
    Ok(text)
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

fn deb(profile: Profile, folder: &Path, revision: u32, epoch: &str) -> Result<PathBuf> {
    let mut deb = cargo();
    deb.env("SOURCE_DATE_EPOCH", epoch);
    deb.args(["deb", "--quiet", "--package", "filter-agent"]);
    deb.args(["--no-build", "--profile", profile.name(), "--output"]);
    deb.arg(folder);
    deb.args(["--deb-version", &format!("{VERSION}-{revision}")]);
    if let Profile::Dev = profile {
        // Nobody downloads this one, and the test command makes three.
        deb.arg("--fast");
    }
    let path = output(&mut deb)?;
    let path = PathBuf::from(path.trim());
    ensure!(path.exists(), "cargo deb made no package");
    Ok(path)
}

/// As the .deb, the documents as they lie in the sources, and a script that installs it.
fn tarball(folder: &Path, files: &[Packaged], epoch: &str) -> Result<PathBuf> {
    let name = format!("filter-agent-{VERSION}-{}", std::env::consts::ARCH);
    let root = folder.join(&name);
    for file in files.iter().filter(|it| !it.is_of_debian()) {
        let name = file.source.file_name().context("name a file")?;
        let place = match file.document() {
            Some(document) if document.starts_with("docs") => document,
            _ => Path::new(name),
        };
        // It has the text itself.
        if name != "changelog.gz" {
            file.put(&root.join(place))?;
        }
    }
    for file in [
        "dist/install.sh",
        "README.md",
        "CHANGELOG.md",
        "LICENSE-MIT",
        "LICENSE-APACHE",
        "LICENSE-GPL2",
    ] {
        let to = root.join(Path::new(file).file_name().context("name a file")?);
        fs::copy(file, &to).with_context(|| format!("copy {file}"))?;
    }
    let archive = folder.join(format!("{name}.tar.gz"));
    run(Command::new("tar")
        .args(["--owner=0", "--group=0", "--numeric-owner", "--sort=name"])
        .args(["--mode=u=rwX,go=rX", &format!("--mtime=@{epoch}")])
        .args(["--use-compress-program", "gzip --best --no-name", "-cf"])
        .arg(&archive)
        .arg("-C")
        .arg(folder)
        .arg(&name))?;
    Ok(archive)
}
