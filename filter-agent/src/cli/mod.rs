//! Commands: arguments, and what each does.

/// Prints a line to stdout. `println!` panics where stdout takes nothing, as on a full disk.
macro_rules! say {
    ($($text:tt)*) => {
        $crate::cli::output::print_line(format_args!($($text)*))
    };
}

mod args;
mod brief;
mod caller;
mod check;
mod client;
mod complete;
mod detach;
mod drops;
mod enforced;
mod fleet;
mod history;
mod output;
mod print;
mod progress;
mod readable;
mod rules;
mod top;
mod trace;

use std::{
    env, num::NonZeroUsize, os::unix::net::UnixListener, path::PathBuf, process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::{CommandFactory as _, Parser as _};
use clap_complete::CompleteEnv;
use serde_json::{Value, json};

use crate::{
    daemon::{self, Options},
    enforcer::LOAD_TIMEOUT,
    log, passed,
    policy_file::PolicyFile,
    report::{self, Decided, Drops, Plan, Refreshes, Regions, Reloaded, Rules, Status, Verdicts},
    temporary::parse_source,
    threads,
};

use args::{Cli, Command, Output, Socket, Temporary, Timeout};
use caller::Caller;
use check::check;
use client::{Agent, encode};
use detach::{detach, tell_what_is_left};
use drops::{follow_drops, print_drops};
use enforced::{enforced, print_enforcement, wait_for};
use output::{LISTED, failure_if};
use print::{
    print_decided, print_explanations, print_plan, print_refreshed, print_regions, print_reloaded,
    print_status, print_temporary,
};
use rules::{print_rules, print_unused};
use top::top;

/// The variable that asks for completion, in scripts that `clap_complete` writes. Not its usual `COMPLETE`: a service must
/// start whatever its environment holds.
pub const COMPLETE: &str = "FILTER_AGENT_COMPLETE";

/// Returns the definition of the commands, for the manual page and completions.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Parses the command line and runs the command. Exits with 2 on wrong usage.
pub fn main() -> ExitCode {
    let completion = CompleteEnv::with_factory(command)
        .var(COMPLETE)
        .shells(complete::SHELLS);
    match completion.try_complete(env::args_os(), env::current_dir().ok().as_deref()) {
        Ok(false) => {}
        Ok(true) => return ExitCode::SUCCESS,
        // An error must not disturb the line that is being typed.
        Err(_) => return ExitCode::FAILURE,
    }
    let command = match Cli::try_parse() {
        Ok(cli) => cli.command,
        Err(error) => return brief::end_with_usage(&error),
    };
    // Before there are threads.
    let status_socket = passed::status_socket();
    log::install();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let done = runtime
        .context("start the async runtime")
        .and_then(|runtime| {
            let done = runtime.block_on(execute(command, status_socket));
            // Threads that hang on a file system are not waited for.
            runtime.shutdown_background();
            done
        });
    let code = done.unwrap_or_else(|error| {
        log::failure(&error);
        ExitCode::FAILURE
    });
    log::flush();
    code
}

/// The agent, for requests that may wait for look-ups.
fn patient(socket: &Socket, timeout: Timeout) -> Agent<'_> {
    Agent {
        timeout: timeout.timeout,
        while_it: Some("which may look regions up"),
        ..Agent::new(&socket.socket)
    }
}

/// Runs a command. All but `run`, `check`, `status --enforced` and a `detach` without an agent are a request to the
/// agent.
///
/// `status_socket`: the one that was passed to this process.
async fn execute(
    command: Command,
    status_socket: Result<Option<UnixListener>>,
) -> Result<ExitCode> {
    match command {
        Command::Run {
            policy,
            socket,
            bpffs,
            state_dir,
            max_prefixes,
        } => {
            let options = Options {
                policy: policy.policy,
                socket: socket.socket,
                bpffs: bpffs.bpffs,
                state_dir: state_dir.state_dir,
                max_prefixes,
            };
            let status_socket = status_socket.unwrap_or_else(|error| {
                log::Entry::error(format!("{error:#}")).log();
                None
            });
            daemon::run(options, status_socket).await?;
        }
        Command::Check {
            file,
            resolve,
            host,
            policy,
            bpffs,
            state_dir,
            output,
        } => {
            let file = file.unwrap_or(policy.policy);
            let places = host.then_some((&*bpffs.bpffs, &*state_dir.state_dir));
            return check(&file, resolve, places, &output).await;
        }
        Command::Plan {
            file,
            timeout,
            socket,
            output,
        } => {
            let limit = timeout.timeout;
            let agent = patient(&socket, timeout);
            let caller = Caller::find();
            let from = caller.query();
            let is_of_agent = file.is_none();
            let plan: Plan = match file {
                // The agent cannot: its sandbox hides home directories, and a pipe belongs to this process.
                Some(file) => {
                    let file = read_within(file, limit).await?;
                    let name = encode(&file.path.to_string_lossy());
                    let path = format!("/v1/plan?file={name}&{from}");
                    agent.post(&path, file.text).await?
                }
                None => agent.get(&format!("/v1/plan?{from}")).await?,
            };
            output.print(&plan, |plan| {
                print_plan(plan);
                // A reload reads the agent's own file.
                if is_of_agent {
                    let hash = &plan.hash;
                    say!("to enforce this very text: filter-agent reload --if {hash}");
                }
                caller.print(&plan.lock_out);
            })?;
            caller.tell_if_unknown();
        }
        Command::Reload {
            existing,
            allow_unprotect,
            max_cut,
            confirm,
            if_hash,
            timeout,
            socket,
            output,
        } => {
            let max_cut = max_cut.map(|most| format!("&max_cut={most}"));
            let confirm = confirm.map(|lasting| format!("&confirm={}", lasting.as_secs()));
            let if_hash = if_hash.map(|hash| format!("&if={hash}"));
            let conditions: String = [max_cut, confirm, if_hash].into_iter().flatten().collect();
            let caller = Caller::find();
            let from = caller.query();
            let path = format!(
                "/v1/reload?existing={existing}&allow_unprotect={allow_unprotect}{conditions}&{from}"
            );
            let agent = patient(&socket, timeout);
            let reloaded: Reloaded = agent.post(&path, String::new()).await?;
            output.print(&reloaded, |reloaded| {
                print_reloaded(reloaded, "");
                if existing && reloaded.errors.is_empty() {
                    say!("connections that are open are judged by their next packet");
                }
                caller.print(&reloaded.plan.lock_out);
            })?;
            caller.tell_if_unknown();
            return Ok(failure_if(has_failed(&reloaded)));
        }
        Command::Rollback {
            change,
            allow_unprotect,
            max_cut,
            timeout,
            socket,
            output,
        } => {
            let to = change.map(|id| format!("&to={id}"));
            let max_cut = max_cut.map(|most| format!("&max_cut={most}"));
            let conditions: String = [to, max_cut].into_iter().flatten().collect();
            let caller = Caller::find();
            let from = caller.query();
            let path = format!("/v1/rollback?allow_unprotect={allow_unprotect}{conditions}&{from}");
            let agent = patient(&socket, timeout);
            let reloaded: Reloaded = agent.post(&path, String::new()).await?;
            output.print(&reloaded, |reloaded| {
                print_reloaded(reloaded, "an earlier text of ");
                caller.print(&reloaded.plan.lock_out);
            })?;
            caller.tell_if_unknown();
            return Ok(failure_if(has_failed(&reloaded)));
        }
        Command::Confirm {
            change,
            fall_back,
            socket,
            output,
        } => {
            let id = change.map(|id| format!("&id={id}")).unwrap_or_default();
            let path = format!("/v1/confirm?fall_back={fall_back}{id}");
            let decided: Decided = Agent::new(&socket.socket)
                .post(&path, String::new())
                .await?;
            output.print(&decided, print_decided)?;
            return Ok(failure_if(!decided.errors.is_empty()));
        }
        Command::Fleet(command) => return fleet::fleet(command).await,
        Command::Allow {
            database,
            source,
            temporary,
            socket,
            output,
        } => {
            let change = temporary_change("allow", &database, &source, temporary);
            return send_temporary(change, &socket, &output).await;
        }
        Command::Block {
            database,
            source,
            temporary,
            socket,
            output,
        } => {
            let change = temporary_change("block", &database, &source, temporary);
            return send_temporary(change, &socket, &output).await;
        }
        Command::Revoke {
            database,
            source,
            socket,
            output,
        } => {
            let change = json!({ "revoke": { "database": database, "source": source } });
            return send_temporary(change, &socket, &output).await;
        }
        Command::Status {
            enforced: true,
            wait,
            reading,
            bpffs,
            state_dir,
            output,
            ..
        } => {
            let agent = reading.agent();
            let look = || enforced(&agent, &bpffs.bpffs, &state_dir.state_dir);
            let found = wait_for(wait.unwrap_or_default(), look).await?;
            output.print(&found, print_enforcement)?;
        }
        Command::Status {
            brief: true,
            verify,
            reading,
            bpffs,
            state_dir,
            ..
        } => {
            let (bpffs, state_dir) = (&bpffs.bpffs, &state_dir.state_dir);
            return Ok(brief::brief(verify, &reading.agent(), bpffs, state_dir).await);
        }
        Command::Status {
            verify,
            reading,
            bpffs,
            output,
            ..
        } => {
            let path = format!("/v1/status?verify={verify}");
            let status: Result<Status> = reading.agent().get(&path).await;
            let status = status.map_err(|error| tell_what_is_left(error, &bpffs.bpffs))?;
            output.print(&status, print_status)?;
            return Ok(failure_if(!status.errors.is_empty()));
        }
        Command::Rules {
            database,
            unused,
            reading,
            output,
        } => {
            let database = database.map(|database| format!("?database={}", encode(&database)));
            let path = format!("/v1/rules{}", database.unwrap_or_default());
            let rules: Rules = reading.agent().get(&path).await?;
            match unused {
                None => output.print(&rules, |Rules { rules }| print_rules(rules))?,
                Some(unused) => print_unused(rules, unused, &output)?,
            }
        }
        Command::Regions { reading, output } => {
            let agent = reading.agent();
            let regions: Regions = agent.get("/v1/regions").await?;
            output.print(&regions, |Regions { regions }| print_regions(regions))?;
        }
        Command::Refresh {
            region,
            accept,
            timeout,
            socket,
            output,
        } => {
            let region = region.map(|region| format!("&region={}", encode(&region)));
            let path = format!("/v1/refresh?accept={accept}{}", region.unwrap_or_default());
            let agent = patient(&socket, timeout);
            let refreshed: Refreshes = agent.post(&path, String::new()).await?;
            output.print(&refreshed, |Refreshes { regions }| print_refreshed(regions))?;
            let failed = refreshed
                .regions
                .iter()
                .any(|region| region.error.is_some());
            return Ok(failure_if(failed));
        }
        Command::Explain {
            source,
            database,
            reading,
            output,
        } => {
            let database = database.map(|database| format!("&database={}", encode(&database)));
            let path = format!(
                "/v1/explain?source={source}{}",
                database.unwrap_or_default()
            );
            let verdicts: Verdicts = reading.agent().get(&path).await?;
            output.print(&verdicts, |Verdicts { verdicts }| {
                print_explanations(verdicts)
            })?;
        }
        Command::Drops {
            database,
            source,
            limit,
            follow,
            reading,
            output,
        } => {
            let database = database.map(|database| format!("&database={}", encode(&database)));
            let source = source.map(|source| format!("&source={}", encode(&source)));
            let usual = (!output.json && !follow).then_some(LISTED);
            let limit = limit.map(NonZeroUsize::get).or(usual);
            let limit = limit.map(|limit| format!("&limit={limit}"));
            let wanted: String = [database, source, limit].into_iter().flatten().collect();
            let path = format!("/v1/drops?hints={}{wanted}", !follow);
            let agent = reading.agent();
            let drops: Drops = agent.get(&path).await?;
            if follow {
                return follow_drops(drops, &agent, &path, output.json).await;
            }
            output.print(&drops, print_drops)?;
        }
        Command::History {
            wanted,
            socket,
            state_dir,
            output,
        } => {
            let (socket, state_dir) = (&socket.socket, &state_dir.state_dir);
            return history::history(wanted, socket, state_dir, &output).await;
        }
        Command::Top { interval, socket } => top(&socket.socket, interval).await?,
        Command::Trace {
            source,
            database,
            time,
            socket,
            output,
        } => {
            let agent = Agent {
                timeout: LOAD_TIMEOUT,
                while_it: Some("whose kernel verifies the programs of the trace"),
                ..Agent::new(&socket.socket)
            };
            return trace::trace(&agent, &source, database.as_deref(), time, output.json).await;
        }
        Command::Detach {
            yes,
            socket,
            bpffs,
            state_dir,
        } => return detach(yes, &socket.socket, &bpffs.bpffs, &state_dir.state_dir).await,
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether a policy that is enforced is not what the kernel does, or not as it should be.
fn has_failed(reloaded: &Reloaded) -> bool {
    !reloaded.verified.errors.is_empty() || !reloaded.errors.is_empty()
}

/// Reads a policy. A pipe may never end.
async fn read_within(file: PathBuf, limit: Duration) -> Result<PolicyFile> {
    let (what, named) = (format!("read {}", file.display()), file.clone());
    let read = move || PolicyFile::read(&file);
    threads::run_within(&threads::POLICIES, limit, &what, &named, read).await
}

/// Exits with 2 where it has no end.
fn temporary_change(action: &str, database: &str, source: &str, temporary: Temporary) -> Value {
    let Temporary { lasting, label } = temporary;
    let Some(lasting) = lasting else {
        // As the policy file spells it, which takes no bare address.
        let source = parse_source(source).map_or(source.to_owned(), |prefix| prefix.to_string());
        let message = match action {
            "allow" => format!(
                "a rule without an end belongs into the policy file, under `rules:` of {database}: \
                 `- cidr: {source}`; for a time: `--for 2h`"
            ),
            _ => format!(
                "a block needs an end, such as `--for 2h`; for good, take {source} out of the rules of {database} in the \
                 policy file, or except it: `except: [{source}]`"
            ),
        };
        Cli::command()
            .error(clap::error::ErrorKind::MissingRequiredArgument, message)
            .exit();
    };
    let wanted = json!({
        "database": database,
        "source": source,
        "seconds": lasting.as_secs(),
        "label": label,
    });
    json!({ action: wanted })
}

async fn send_temporary(mut change: Value, socket: &Socket, output: &Output) -> Result<ExitCode> {
    let agent = Agent::new(&socket.socket);
    let caller = Caller::find();
    change["caller"] = json!(caller.address());
    let done: report::Temporary = agent.post("/v1/temporary", change.to_string()).await?;
    output.print(&done, |done| {
        print_temporary(done);
        caller.print(&done.lock_out);
    })?;
    caller.tell_if_unknown();
    Ok(failure_if(!done.errors.is_empty()))
}
