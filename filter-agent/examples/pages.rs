//! Writes the manual page and the shell completions into a folder, from the commands themselves.

use std::{env, fs, path::PathBuf};

use anyhow::{Context as _, Result};
use clap_complete::Shell;

fn main() -> Result<()> {
    let folder = env::args_os().nth(1).context("name a folder")?;
    let folder = PathBuf::from(folder);
    fs::create_dir_all(&folder)?;
    let mut command = filter_agent::cli::command();
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
    page.extend_from_slice(
        b".SH EXIT STATUS\n.TP\n0\ndone\n.TP\n1\nnot done, or done with an error in what was printed\n.TP\n2\n\
          wrong usage\n.TP\n141\nthe reader of the output ended first\n.SH FILES\n.TP\n/etc/filter-agent/policy.yaml\nthe policy\n.TP\n/var/lib/filter-agent/\n\
          the last good addresses of regions\n.TP\n/sys/fs/bpf/filter-agent/\nthe filter in the \
          kernel\n.SH SEE ALSO\n/usr/share/doc/filter-agent/\n",
    );
    fs::write(folder.join("filter-agent.8"), page)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut command, "filter-agent", &folder)?;
    }
    Ok(())
}
