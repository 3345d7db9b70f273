//! Builds the BPF object that the agent embeds.

use std::{env, fs, path::Path};

use anyhow::Context as _;
use aya_build::{Package, Toolchain};
use object::{
    build::elf::{Builder, SectionData},
    elf::SHT_STRTAB,
};

/// The toolchain of `rust-toolchain.toml`: one for both sides.
const TOOLCHAIN: &str = "1.95.0";

fn main() -> anyhow::Result<()> {
    println!("cargo:rerun-if-changed=../filter-common");
    // SAFETY: a build script's main runs in one thread.
    unsafe {
        // Lets the stable compiler take `-Z build-std=core`, which the BPF target needs.
        env::set_var("RUSTC_BOOTSTRAP", "1");
        // aya-build repeats each line of the inner cargo as a warning.
        env::set_var("CARGO_TERM_QUIET", "true");
        // BTF names the sources: with their paths in it an object would differ by where they lie.
        env::set_var("CARGO_UNSTABLE_TRIM_PATHS", "true");
        env::set_var("CARGO_PROFILE_RELEASE_TRIM_PATHS", "all");
        // aya-build passes it on for programs that read registers, which ours do not. With one value the objects are the same
        // bytes on every processor of one byte order; else the name of a source file in their BTF differs.
        env::set_var("CARGO_CFG_TARGET_ARCH", "x86_64");
    }
    let features: &[&str] = if cfg!(feature = "next-layout") {
        &["next-layout"]
    } else {
        &[]
    };
    let package = Package {
        name: "filter-ebpf",
        root_dir: concat!(env!("CARGO_MANIFEST_DIR"), "/../filter-ebpf"),
        features,
        ..Package::default()
    };
    aya_build::build_ebpf([package], Toolchain::Custom(TOOLCHAIN)).context("build filter-ebpf")?;
    let folder = env::var_os("OUT_DIR").context("find the folder of what is built")?;
    for object in ["filter", "traced"] {
        strip(&Path::new(&folder).join(object)).with_context(|| format!("strip {object}"))?;
    }
    Ok(())
}

/// Takes out DWARF, which BTF was made from and neither the agent nor the kernel reads: four fifths of an object, and
/// parsed with its 20,000 relocations at each start.
fn strip(path: &Path) -> anyhow::Result<()> {
    let data = fs::read(path).context("read it")?;
    let mut object = Builder::read(data.as_slice())?;
    for section in &mut object.sections {
        section.delete = [b".debug_".as_slice(), b".rel.debug_"]
            .iter()
            .any(|prefix| section.name.starts_with(prefix));
    }
    object.delete_orphans();
    // LLVM keeps the names of sections among those of symbols, which the builder cannot.
    let names = object.sections.add();
    names.name = ".shstrtab".into();
    names.sh_type = SHT_STRTAB;
    names.sh_addralign = 1;
    names.data = SectionData::SectionString;
    let mut stripped = Vec::new();
    object.write(&mut stripped)?;
    fs::write(path, stripped).context("write it")
}
