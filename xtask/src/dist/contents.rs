//! The crates inside the program: their licences, and the bill of materials.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use crate::steps::export;
use crate::{cargo, output, run, target_directory};

/// Beginnings of the names of files with licences.
const LICENCES: [&str; 6] = [
    "licen",
    "copying",
    "copyright",
    "notice",
    "unlicense",
    "authors",
];

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Crate>,
    resolve: Resolve,
}

#[derive(Deserialize)]
struct Crate {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
    repository: Option<String>,
    /// `None`: one of ours.
    source: Option<String>,
    manifest_path: String,
}

#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
    deps: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    pkg: String,
    dep_kinds: Vec<Kind>,
}

#[derive(Deserialize)]
struct Kind {
    /// `None`: of the program, and not of its tests or its build.
    kind: Option<String>,
}

/// Crates and the texts of their licences, as one text.
///
/// # Errors
/// A crate has no licence.
pub fn licences() -> Result<String> {
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let json = output(
        cargo()
            .args(["metadata", "--format-version", "1", "--locked"])
            .args(["--filter-platform", &target]),
    )?;
    let metadata: Metadata = serde_json::from_str(&json).context("read cargo's metadata")?;
    let inside = inside(&metadata);
    let of_others = metadata
        .packages
        .iter()
        .filter(|it| it.source.is_some() && inside.contains(it.id.as_str()));
    let crates: Vec<&Crate> = of_others.collect();
    let mut text = String::from(
        "The programs of filter-agent have these crates inside. Of several licences with OR each holds, with AND all.\n\n",
    );
    let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for own in ["LICENSE-MIT", "LICENSE-APACHE", "LICENSE-GPL2"] {
        let licence = fs::read_to_string(own).with_context(|| format!("read {own}"))?;
        let of = texts.entry(licence.trim().to_owned()).or_default();
        of.push("filter-agent".into());
    }
    for of in &crates {
        let name = format!("{} {}", of.name, of.version);
        let license = of.license.as_deref();
        let license = license.with_context(|| format!("{name} names no licence"))?;
        let place = of.repository.as_deref().unwrap_or("crates.io");
        text += &format!("{name}: {license}; {place}\n");
        let mut found = texts_of(of)?;
        // One of several crates of a repository may have none of its own.
        if found.is_empty() {
            let others = crates.iter().filter(|it| it.repository == of.repository);
            for other in others {
                found.extend(texts_of(other)?);
            }
            found.sort();
            found.dedup();
        }
        ensure!(!found.is_empty(), "{name} has no text of its licence");
        for found in found {
            texts.entry(found).or_default().push(name.clone());
        }
    }
    for (licence, names) in &texts {
        let names = names.join(", ");
        text += &format!("\n{}\n{names}:\n\n{licence}\n", "-".repeat(100));
    }
    Ok(text)
}

/// The crates that the agent and the programs in the kernel are made of, by their ids.
fn inside(metadata: &Metadata) -> BTreeSet<&str> {
    let nodes = metadata.resolve.nodes.iter();
    let nodes: BTreeMap<&str, &Node> = nodes.map(|node| (node.id.as_str(), node)).collect();
    let ours = ["filter-agent", "filter-ebpf"];
    let ours = metadata
        .packages
        .iter()
        .filter(|it| it.source.is_none() && ours.contains(&it.name.as_str()));
    let mut waiting: Vec<&str> = ours.map(|it| it.id.as_str()).collect();
    let mut inside = BTreeSet::new();
    while let Some(id) = waiting.pop() {
        if !inside.insert(id) {
            continue;
        }
        let dependencies = nodes.get(id).into_iter().flat_map(|node| &node.deps);
        let is_inside = |it: &&Dependency| it.dep_kinds.iter().any(|it| it.kind.is_none());
        waiting.extend(dependencies.filter(is_inside).map(|it| it.pkg.as_str()));
    }
    inside
}

fn texts_of(of: &Crate) -> Result<Vec<String>> {
    let folder = Path::new(&of.manifest_path)
        .parent()
        .context("find the folder of a crate")?;
    let mut texts = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let name = name.to_lowercase();
        if LICENCES.iter().any(|it| name.starts_with(it)) && path.is_file() {
            let text = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
            texts.push(String::from_utf8_lossy(&text).trim().replace('\r', ""));
        }
    }
    texts.sort();
    Ok(texts)
}

/// The bill of materials of the agent at the last commit, as CycloneDX. cargo-cyclonedx is that project's own, and maintained.
pub fn bill(epoch: &str) -> Result<String> {
    // It writes beside the manifest of each member, where builds look for changes: elsewhere, then.
    let source = target_directory()?.join("bill-of-materials");
    let _ = fs::remove_dir_all(&source);
    export("HEAD", &source)?;
    let name = "bill-of-materials";
    run(cargo()
        .env("SOURCE_DATE_EPOCH", epoch)
        .args(["cyclonedx", "--quiet", "--format", "json"])
        .args(["--override-filename", name])
        .current_dir(&source))?;
    let made = source.join(format!("filter-agent/{name}.json"));
    let bill = fs::read_to_string(&made).with_context(|| format!("read {}", made.display()))?;
    // Where it was built is nobody's business.
    Ok(bill.replace(&format!("file://{}", source.display()), "file://"))
}
