//! Builds the agent's binary.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

/// The agent's binary, of the same profile as this test, built once; or the one that FILTER_TESTS_AGENT names, where the
/// test runs on a machine without cargo.
pub fn agent_binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| match env::var_os("FILTER_TESTS_AGENT") {
        Some(path) => path.into(),
        None => build_agent("", &[]),
    })
}

/// An agent whose maps have another layout, a later one.
pub fn next_layout_binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| build_agent("next-layout", &["--features", "next-layout"]))
}

/// The agent of an earlier release, which `cargo xtask test --full` builds.
pub fn released_binary(version: &str) -> PathBuf {
    let test = env::current_exe().unwrap();
    let target = test.ancestors().nth(3).unwrap();
    let binary = target.join("released").join(version).join("filter-agent");
    assert!(binary.exists(), "{} is missing", binary.display());
    binary
}

/// `below`: the folder of the target directory, which this binary must not share with the other. What its dependencies
/// are compiled to is shared.
fn build_agent(below: &str, arguments: &[&str]) -> PathBuf {
    let test = env::current_exe().unwrap();
    // <target>/<profile>/deps/<test>
    let profile = test.ancestors().nth(2).unwrap();
    let shared = profile.parent().unwrap();
    let target = shared.join(below);
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--quiet", "--package", "filter-agent"]);
    build.args(arguments).arg("--target-dir").arg(&target);
    let intermediate = format!("build.build-dir={:?}", shared.to_str().unwrap());
    build.args(["--config", &intermediate]);
    if profile.ends_with("release") {
        build.arg("--release");
    }
    build.current_dir(env!("CARGO_MANIFEST_DIR"));
    // These describe this package to us. Build scripts of dependencies run again wherever they differ.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            build.env_remove(&name);
        }
    }
    let status = build.status().unwrap();
    assert!(status.success(), "cargo cannot build filter-agent");
    target
        .join(profile.file_name().unwrap())
        .join("filter-agent")
}
