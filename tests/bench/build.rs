//! Builds the BPF object that the benchmark embeds.

use anyhow::Context as _;
use aya_build::{Package, Toolchain};

/// The toolchain of `rust-toolchain.toml`: one for both sides.
const TOOLCHAIN: &str = "1.95.0";

fn main() -> anyhow::Result<()> {
    // SAFETY: a build script's main runs in one thread.
    unsafe {
        // Lets the stable compiler take `-Z build-std=core`, which the BPF target needs.
        std::env::set_var("RUSTC_BOOTSTRAP", "1");
        // aya-build repeats each line of the inner cargo as a warning.
        std::env::set_var("CARGO_TERM_QUIET", "true");
    }
    let package = Package {
        name: "filter-ebpf",
        root_dir: concat!(env!("CARGO_MANIFEST_DIR"), "/../../filter-ebpf"),
        features: &["bench"],
        ..Package::default()
    };
    aya_build::build_ebpf([package], Toolchain::Custom(TOOLCHAIN)).context("build filter-ebpf")
}
