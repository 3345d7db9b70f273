//! How many instructions the filter executes for a frame: exact, where times are noisy. Counted in the program as the kernel
//! has translated it, look-ups in arrays and all; what helpers execute, such as look-ups in tries, is not.

mod machine;
mod maps;

use std::{collections::HashMap, fs, path::Path, process::Command};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{TestRun as _, TestRunOptions, programs::Xdp};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};

use machine::{Instruction, Machine, Ran};
use maps::Maps;

/// Per-CPU maps are read as this processor has them.
const PROCESSOR: usize = 0;

/// Whether the program has seen the frame's source before.
#[derive(Clone, Copy, PartialEq)]
pub enum Source {
    Known,
    New,
}

/// A program as the kernel has translated it.
pub struct Translated {
    instructions: Vec<Instruction>,
    /// Names of the helpers, by the numbers in its calls of them.
    helpers: HashMap<i32, String>,
}

impl Translated {
    pub fn read(pin: &Path) -> Result<Self> {
        let mut bpftool = Command::new("bpftool");
        bpftool.args(["prog", "dump", "xlated", "pinned"]).arg(pin);
        bpftool.args(["file", "/dev/stdout"]);
        let output = bpftool.output().context("start bpftool")?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{bpftool:?} fails: {stderr}");
        let (instructions, rest) = output.stdout.as_chunks();
        ensure!(rest.is_empty(), "the translated program is cut off");
        Ok(Self {
            instructions: instructions.iter().map(Instruction::read).collect(),
            helpers: helpers()?,
        })
    }

    /// The instructions executed for a frame, and what the program returns. The kernel runs the program, too.
    ///
    /// # Errors
    /// The kernel comes to another result.
    pub fn count(&self, program: &Xdp, frame: &[u8], source: Source) -> Result<Ran> {
        let all = sched_getaffinity(Pid::from_raw(0))?;
        let mut one = CpuSet::new();
        one.set(PROCESSOR)?;
        sched_setaffinity(Pid::from_raw(0), &one).context("stay on a processor")?;
        let ran = self.count_here(program, frame, source);
        sched_setaffinity(Pid::from_raw(0), &all).context("use all processors again")?;
        ran
    }

    fn count_here(&self, program: &Xdp, frame: &[u8], source: Source) -> Result<Ran> {
        let kernel = || {
            let options = TestRunOptions {
                data_in: Some(frame),
                ..TestRunOptions::default()
            };
            let result = program.test_run(options).context("run the program")?;
            anyhow::Ok(result.return_value)
        };
        if source == Source::Known {
            kernel()?;
        }
        // It writes to no map: the kernel finds what it found.
        let maps = Maps::new(PROCESSOR);
        let ran = Machine::new(&self.instructions, &self.helpers, maps).run(frame)?;
        let returned = kernel()?;
        ensure!(
            ran.returned == returned,
            "counting instructions comes to action {}, the kernel to {returned}",
            ran.returned
        );
        Ok(ran)
    }
}

/// The kernel's functions by how far they are from where it counts from, as calls name them.
fn helpers() -> Result<HashMap<i32, String>> {
    let text = fs::read_to_string("/proc/kallsyms").context("read the kernel's symbols")?;
    let functions = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let address = u64::from_str_radix(words.next()?, 16).ok()?;
        let is_function = words.next()?.eq_ignore_ascii_case("t");
        is_function.then_some((address, words.next()?))
    });
    let functions: Vec<(u64, &str)> = functions.collect();
    let base = functions
        .iter()
        .find(|(_, name)| *name == "__bpf_call_base");
    let Some(&(base, _)) = base.filter(|(address, _)| *address != 0) else {
        bail!("the kernel hides its symbols: set kernel.kptr_restrict to 0 or 1");
    };
    let near = functions.iter().filter_map(|&(address, name)| {
        let distance = i32::try_from(address.wrapping_sub(base) as i64).ok()?;
        (!name.starts_with("__pfx_")).then(|| (distance, name.to_owned()))
    });
    Ok(near.collect())
}
