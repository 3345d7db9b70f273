//! Writes the manual page and the shell completions into a folder, from the commands themselves.

use std::{env, fs, path::PathBuf};

use anyhow::{Context as _, Result};
use clap_complete::env::{Bash, EnvCompleter, Fish, Zsh};
use filter_agent::cli;

/// Where the packages install the agent: the search path of other users than root may not have it.
const PROGRAM: &str = "/usr/sbin/filter-agent";

fn main() -> Result<()> {
    let folder = env::args_os().nth(1).context("name a folder")?;
    let folder = PathBuf::from(folder);
    fs::create_dir_all(&folder)?;
    let command = cli::command();
    let mut page = Vec::new();
    let manual = clap_mangen::Man::new(command.clone()).section("8");
    manual.render(&mut page)?;
    page.extend_from_slice(b".SH COMMANDS IN DETAIL\n");
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        let manual = clap_mangen::Man::new(sub.clone());
        let name = sub.get_name();
        page.extend_from_slice(format!(".SS filter-agent {name}\n").as_bytes());
        manual.render_description_section(&mut page)?;
        manual.render_options_section(&mut page)?;
    }
    page.extend_from_slice(include_bytes!("../../dist/filter-agent.8.end"));
    fs::write(folder.join("filter-agent.8"), page)?;
    fs::write(folder.join("filter-agent.bash"), completion(&Bash)?)?;
    fs::write(folder.join("filter-agent.fish"), completion(&Fish)?)?;
    let mut zsh = completion(&Zsh)?;
    // The script only registers a function. Zsh reads it to complete, and the first time, too, wants an answer.
    zsh.extend_from_slice(
        b"if [ \"$funcstack[1]\" = _filter-agent ]; then\n    _clap_dynamic_completer_filter_agent \"$@\"\nfi\n",
    );
    fs::write(folder.join("_filter-agent"), zsh)?;
    Ok(())
}

/// The script that has a shell ask the agent's program for completions.
fn completion(shell: &dyn EnvCompleter) -> Result<Vec<u8>> {
    let mut script = Vec::new();
    let name = "filter-agent";
    shell.write_registration(cli::COMPLETE, name, name, PROGRAM, &mut script)?;
    Ok(script)
}
