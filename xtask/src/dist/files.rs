//! The files of the packages: one list, that of the .deb in `filter-agent/Cargo.toml`.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use crate::{cargo, output, run};

/// Where the documents are once they are installed.
const DOCUMENTS: &str = "usr/share/doc/filter-agent";

/// A file of the packages.
pub struct Packaged {
    /// From the workspace.
    pub source: PathBuf,
    /// From the root of the system that it is installed on.
    pub target: PathBuf,
    mode: u32,
    is_program: bool,
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    metadata: Option<Tools>,
}

#[derive(Deserialize)]
struct Tools {
    deb: Option<Deb>,
}

#[derive(Deserialize)]
struct Deb {
    assets: Vec<[String; 3]>,
}

/// Those that `cargo deb` finds by itself.
const FOUND: [[&str; 3]; 2] = [
    [
        "../dist/filter-agent.service",
        "usr/lib/systemd/system/",
        "644",
    ],
    [
        "../target/dist/pages/copyright",
        "usr/share/doc/filter-agent/",
        "644",
    ],
];

/// The files that are installed. `program`: path of the agent.
pub fn packaged(program: &Path) -> Result<Vec<Packaged>> {
    let json = output(cargo().args(["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: Metadata = serde_json::from_str(&json).context("read cargo's metadata")?;
    let mut debs = metadata
        .packages
        .into_iter()
        .filter_map(|it| it.metadata?.deb);
    let deb = debs
        .next()
        .context("find the files of the .deb in filter-agent/Cargo.toml")?;
    let found = FOUND.map(|asset| asset.map(str::to_owned));
    let assets = deb.assets.into_iter().chain(found);
    assets.map(|asset| Packaged::of(&asset, program)).collect()
}

impl Packaged {
    fn of([source, target, mode]: &[String; 3], program: &Path) -> Result<Self> {
        let file = source.strip_prefix("../");
        let source = file.map_or(program, Path::new).to_owned();
        let target = match target.ends_with('/') {
            true => Path::new(target).join(source.file_name().context("name a file")?),
            false => target.into(),
        };
        let mode = u32::from_str_radix(mode, 8).context("read the mode of a file")?;
        Ok(Self {
            source,
            target,
            mode,
            is_program: file.is_none(),
        })
    }

    /// Copies it; the program without its symbols, as `cargo deb` does.
    pub fn put(&self, to: &Path) -> Result<()> {
        let folder = to.parent().context("find the folder of a file")?;
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
        if self.is_program {
            run(Command::new("strip").arg("-o").arg(to).arg(&self.source))?;
        } else {
            let copied = fs::copy(&self.source, to);
            copied.with_context(|| format!("copy {}", self.source.display()))?;
        }
        let mode = Permissions::from_mode(self.mode);
        fs::set_permissions(to, mode).with_context(|| format!("set the mode of {}", to.display()))
    }

    /// Whether only Debian's own tools read it.
    pub fn is_of_debian(&self) -> bool {
        self.target.starts_with("usr/share/lintian")
    }

    /// Whether it is a document, and its place among them.
    pub fn document(&self) -> Option<&Path> {
        self.target.strip_prefix(DOCUMENTS).ok()
    }
}

/// Whether every link of the packaged documents leads to another one.
pub fn check_links(files: &[Packaged]) -> Result<()> {
    let documents: Vec<_> = files
        .iter()
        .filter_map(|file| Some((file.document()?, file)))
        .collect();
    for (place, file) in &documents {
        if place.extension().is_none_or(|it| it != "md") {
            continue;
        }
        let text = fs::read_to_string(&file.source)
            .with_context(|| format!("read {}", file.source.display()))?;
        let links = text.split("](").skip(1);
        for link in links.filter_map(|rest| rest.split([')', '#']).next()) {
            if link.is_empty() || link.contains("://") {
                continue;
            }
            let leads_to = place.parent().unwrap_or(place).join(link);
            ensure!(
                documents.iter().any(|(other, _)| *other == leads_to),
                "{} links to {link}, which is not packaged",
                file.source.display()
            );
        }
    }
    Ok(())
}
