//! Commands and what they print.

use std::{
    collections::BTreeMap,
    fmt::Display,
    io::{self, BufRead as _, IsTerminal as _, Write as _},
    net::IpAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use clap::{Args, CommandFactory as _, Parser, Subcommand};
use comfy_table::{ContentArrangement, Table, presets};
use futures_util::future::join_all;
use http_body_util::{BodyExt as _, Empty};
use hyper::{Method, Request, body::Bytes};
use hyper_util::rt::TokioIo;
use ipnet::IpNet;
use jiff::{SignedDuration, Timestamp};
use serde::{Serialize, de::DeserializeOwned};
use signal_hook::{consts::SIGPIPE, flag::register_conditional_shutdown};
use tokio::net::UnixStream;

use crate::{
    compile::compile,
    daemon::{self, Options},
    host,
    host::coverage::{Coverage, Remembered, describe_missing},
    host::driver::{self, Driver},
    kernel::{links, pins, program},
    log,
    policy::{self, Listed, RegionSource},
    policy_file::PolicyFile,
    region::lookup::{self, Answer, Version},
    region::state::{self as region, Regions},
    report::{self, Drops, Explanation, Plan, Refreshed, Reloaded, Rule, Status},
    store,
};

/// Widest line that a command prints.
const WIDTH: u16 = 100;

/// Prefixes that a difference prints before it only counts.
const LISTED: usize = 20;

/// Drops, in the kernel, every packet to a database port that no rule allows.
#[derive(Parser)]
#[command(name = "filter-agent", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Args)]
struct PolicyPath {
    /// The policy file.
    #[arg(long, default_value = "/etc/filter-agent/policy.yaml")]
    policy: PathBuf,
}

#[derive(Args)]
struct Socket {
    /// The daemon's control socket.
    #[arg(long, default_value = "/run/filter-agent/control.sock")]
    socket: PathBuf,
}

#[derive(Args)]
struct Bpffs {
    /// The BPF file system below which the filter is pinned.
    #[arg(long, default_value = "/sys/fs/bpf")]
    bpffs: PathBuf,
}

#[derive(Args)]
struct StateDir {
    /// Where the confirmed policy and the last good addresses of regions are kept.
    #[arg(long, default_value = "/var/lib/filter-agent")]
    state_dir: PathBuf,
}

#[derive(Args)]
struct Output {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Enforce the policy and keep it enforced; the filter stays when this stops.
    Run {
        #[command(flatten)]
        policy: PolicyPath,
        #[command(flatten)]
        socket: Socket,
        #[command(flatten)]
        bpffs: Bpffs,
        #[command(flatten)]
        state_dir: StateDir,
        /// Prefixes of one address family that the kernel's maps are made for [default: 1048576].
        /// Maps that exist keep their size.
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1 << 26))]
        max_prefixes: Option<u32>,
    },
    /// Validate a policy file and print what it would enforce. Needs no root.
    Check {
        /// The policy file, instead of --policy.
        file: Option<PathBuf>,
        /// Look up the regions that it uses, which needs the network.
        #[arg(long)]
        resolve: bool,
        /// Examine the interfaces and the kernel of this host, and print what attaching would meet.
        #[arg(long)]
        host: bool,
        #[command(flatten)]
        policy: PolicyPath,
        #[command(flatten)]
        bpffs: Bpffs,
        #[command(flatten)]
        state_dir: StateDir,
        #[command(flatten)]
        output: Output,
    },
    /// Print the difference between a policy file and what the kernel enforces.
    Plan {
        /// The policy file [default: the daemon's].
        file: Option<PathBuf>,
        #[command(flatten)]
        socket: Socket,
        #[command(flatten)]
        output: Output,
    },
    /// Enforce the policy file as it is now; if it is refused, nothing changes.
    Reload {
        /// Where TLS is forced, judge connections from before that, too, by what they send next.
        #[arg(long)]
        existing: bool,
        /// Enforce it even if a database, port, address or interface that is guarded now is guarded no longer.
        #[arg(long)]
        allow_unprotect: bool,
        #[command(flatten)]
        socket: Socket,
        #[command(flatten)]
        output: Output,
    },
    /// Print what the kernel enforces and what it counted.
    Status {
        /// Run probe packets through the attached program first.
        #[arg(long)]
        verify: bool,
        /// Exit 0 if every listed interface that exists enforces the policy, whatever else is wrong; without an
        /// agent, too. For a database's unit.
        #[arg(long)]
        enforced: bool,
        /// Wait for that at most so long, such as 60s.
        #[arg(long, requires = "enforced", value_name = "DURATION", value_parser = wait_limit)]
        wait: Option<Duration>,
        #[command(flatten)]
        socket: Socket,
        #[command(flatten)]
        bpffs: Bpffs,
        #[command(flatten)]
        state_dir: StateDir,
        #[command(flatten)]
        output: Output,
    },
    /// List the rules, with the packets each of them let through.
    Rules {
        /// Only of this database.
        #[arg(long)]
        database: Option<String>,
        #[command(flatten)]
        socket: Socket,
        #[command(flatten)]
        output: Output,
    },
    /// List the regions and their prefixes.
    Regions {
        #[command(flatten)]
        socket: Socket,
        #[command(flatten)]
        output: Output,
    },
    /// Look up regions now and print what changed; if one fails, its last good set stays.
    Refresh {
        /// Only this region.
        region: Option<String>,
        /// Believe an answer that lost most of its prefixes, or that is older than the last.
        #[arg(long, requires = "region")]
        accept: bool,
        #[command(flatten)]
        socket: Socket,
        #[command(flatten)]
        output: Output,
    },
    /// Print the verdict on packets from a source, and the rule that gives it.
    Explain {
        source: IpAddr,
        /// Only at this database.
        #[arg(long)]
        database: Option<String>,
        #[command(flatten)]
        socket: Socket,
        #[command(flatten)]
        output: Output,
    },
    /// List who is turned away since the agent started: source, database, reason.
    Drops {
        /// Only at this database.
        #[arg(long)]
        database: Option<String>,
        /// Go on, with a line for each source that is turned away from now on, every second.
        #[arg(long)]
        follow: bool,
        #[command(flatten)]
        socket: Socket,
        #[command(flatten)]
        output: Output,
    },
    /// Stop filtering and remove every trace: everybody can reach the databases then.
    Detach {
        /// Do not ask.
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        socket: Socket,
        #[command(flatten)]
        bpffs: Bpffs,
        #[command(flatten)]
        state_dir: StateDir,
    },
}

/// The commands, for what is made from them.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Parses the command line and does what it says. Usage errors exit 2 in here.
pub fn main() -> ExitCode {
    let command = Cli::parse().command;
    log::install();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let done = runtime
        .context("start the async runtime")
        .and_then(|runtime| {
            let done = runtime.block_on(execute(command));
            // What hangs on a file system is not waited for.
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

/// Every command but `run`, `check` and a `detach` without an agent is a question to the daemon.
async fn execute(command: Command) -> Result<ExitCode> {
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
            daemon::run(options).await?;
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
            socket,
            output,
        } => {
            let path = match file {
                // The daemon's working directory is not this command's.
                Some(file) => {
                    let file = std::path::absolute(&file);
                    let file = file.context("find the current directory")?;
                    format!("/plan?file={}", encode(&file.to_string_lossy()))
                }
                None => "/plan".into(),
            };
            let plan: Plan = ask(&socket, Method::GET, &path).await?;
            output.print(&plan, print_plan)?;
        }
        Command::Reload {
            existing,
            allow_unprotect,
            socket,
            output,
        } => {
            let path = format!("/reload?existing={existing}&allow_unprotect={allow_unprotect}");
            let reloaded: Reloaded = ask(&socket, Method::POST, &path).await?;
            output.print(&reloaded, print_reloaded)?;
            let failed = !reloaded.verified.errors.is_empty() || !reloaded.errors.is_empty();
            return Ok(failure_if(failed));
        }
        Command::Status {
            enforced: true,
            wait,
            socket,
            bpffs,
            state_dir,
            output,
            ..
        } => {
            let look = || enforced(&socket, &bpffs.bpffs, &state_dir.state_dir);
            let found = wait_for(wait.unwrap_or_default(), look).await?;
            output.print(&found, print_enforcement)?;
        }
        Command::Status {
            verify,
            socket,
            bpffs,
            output,
            ..
        } => {
            let path = format!("/status?verify={verify}");
            let status: Result<Status> = ask(&socket, Method::GET, &path).await;
            let status = status.map_err(|error| tell_what_is_left(error, &bpffs.bpffs))?;
            output.print(&status, print_status)?;
            return Ok(failure_if(!status.errors.is_empty()));
        }
        Command::Rules {
            database,
            socket,
            output,
        } => {
            let database = database.map(|database| format!("?database={}", encode(&database)));
            let path = format!("/rules{}", database.unwrap_or_default());
            let rules: Vec<Rule> = ask(&socket, Method::GET, &path).await?;
            output.print(&rules, |rules| print_rules(rules))?;
        }
        Command::Regions { socket, output } => {
            let regions: Vec<report::Region> = ask(&socket, Method::GET, "/regions").await?;
            output.print(&regions, |regions| print_regions(regions))?;
        }
        Command::Refresh {
            region,
            accept,
            socket,
            output,
        } => {
            let region = region.map(|region| format!("&region={}", encode(&region)));
            let path = format!("/refresh?accept={accept}{}", region.unwrap_or_default());
            let refreshed: Vec<Refreshed> = ask(&socket, Method::POST, &path).await?;
            output.print(&refreshed, |refreshed| print_refreshed(refreshed))?;
            let failed = refreshed.iter().any(|region| region.error.is_some());
            return Ok(failure_if(failed));
        }
        Command::Explain {
            source,
            database,
            socket,
            output,
        } => {
            let database = database.map(|database| format!("&database={}", encode(&database)));
            let path = format!("/explain?source={source}{}", database.unwrap_or_default());
            let verdicts: Vec<Explanation> = ask(&socket, Method::GET, &path).await?;
            output.print(&verdicts, |verdicts| print_explanations(verdicts))?;
        }
        Command::Drops {
            database,
            follow,
            socket,
            output,
        } => {
            let database = database.map(|database| format!("?database={}", encode(&database)));
            let path = format!("/drops{}", database.unwrap_or_default());
            let drops: Drops = ask(&socket, Method::GET, &path).await?;
            if follow {
                return follow_drops(drops, &socket, &path, &output).await;
            }
            output.print(&drops, print_drops)?;
        }
        Command::Detach {
            yes,
            socket,
            bpffs,
            state_dir,
        } => return detach(yes, &socket, &bpffs.bpffs, &state_dir.state_dir).await,
    }
    Ok(ExitCode::SUCCESS)
}

/// What a shell makes of a process that SIGPIPE ended.
const EXIT_BROKEN_PIPE: i32 = 128 + SIGPIPE;

/// Exit status 1 where something was printed that is an error all the same.
fn failure_if(failed: bool) -> ExitCode {
    if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

/// Ends the process where nobody reads on, as in `status | head -1`. To be called when all that is left is
/// to print: to lose the agent half way is an error that wants a message.
fn end_with_the_reader() -> Result<()> {
    register_conditional_shutdown(SIGPIPE, EXIT_BROKEN_PIPE, Arc::new(true.into()))
        .context("watch for a closed pipe")?;
    Ok(())
}

impl Output {
    fn print<T: Serialize>(&self, value: &T, text: impl Fn(&T)) -> Result<()> {
        end_with_the_reader()?;
        if self.json {
            let json = serde_json::to_string_pretty(value).context("write JSON")?;
            println!("{json}");
        } else {
            text(value);
        }
        Ok(())
    }
}

/// Percent-encodes a query's value (RFC 3986 section 2.3).
fn encode(value: &str) -> String {
    let mut encoded = String::new();
    for byte in value.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                encoded.push(byte.into());
            }
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

/// One request to the daemon.
async fn ask<T: DeserializeOwned>(socket: &Socket, method: Method, path: &str) -> Result<T> {
    let socket = &socket.socket;
    let stream = UnixStream::connect(socket).await.map_err(|error| {
        let socket = socket.display();
        let what = match error.kind() {
            io::ErrorKind::PermissionDenied => format!("only root may use {socket}"),
            _ => format!("no agent answers on {socket}: start it with `filter-agent run`"),
        };
        anyhow!(error).context(what)
    })?;
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.context("speak to the agent")?;
    tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(hyper::header::HOST, "filter-agent")
        .body(Empty::<Bytes>::new())
        .context("make a request")?;
    let response = sender
        .send_request(request)
        .await
        .context("ask the agent")?;
    let status = response.status();
    let body = response.into_body().collect().await;
    let body = body.context("read the agent's answer")?.to_bytes();
    if !status.is_success() {
        match serde_json::from_slice::<report::Failure>(&body) {
            Ok(failure) => bail!("{}", failure.error),
            Err(_) => bail!("{}", String::from_utf8_lossy(&body)),
        }
    }
    serde_json::from_slice(&body).context("understand the agent's answer")
}

/// Without an agent the filter may well be in force, which is what matters.
fn tell_what_is_left(error: anyhow::Error, bpffs: &Path) -> anyhow::Error {
    match pins::left_in_force(bpffs) {
        Ok(interfaces) if interfaces.is_empty() => error.context("nothing is filtered"),
        Ok(interfaces) => {
            let names: Vec<String> = interfaces.into_iter().map(interface_name).collect();
            let names = names.join(", ");
            error.context(format!(
                "the last policy stays in force on {names}, unattended"
            ))
        }
        Err(_) => error,
    }
}

fn interface_name(index: u32) -> String {
    let name = nix::net::if_::if_indextoname(index);
    let name = name.ok().and_then(|name| name.into_string().ok());
    name.unwrap_or_else(|| format!("interface {index} (gone)"))
}

#[derive(Serialize)]
struct Checked {
    file: PathBuf,
    interfaces: Vec<String>,
    databases: Vec<CheckedDatabase>,
    #[serde(skip_serializing_if = "Option::is_none")]
    host: Option<Vec<Driver>>,
    warnings: Vec<String>,
    /// What on this host refuses a start, as far as it was asked for.
    errors: Vec<String>,
}

#[derive(Serialize)]
struct CheckedDatabase {
    name: String,
    ports: Vec<String>,
    addresses: Vec<IpAddr>,
    model: String,
    monitor: bool,
    rules: Vec<String>,
    prefixes: usize,
}

/// Asks no agent: the file may be meant for another host. Nor the network, unless it is told to.
/// `places`: the BPF file system and the state directory, to look whether this host can enforce the file.
/// Looks up what must be known of a policy's regions before it can be in force.
async fn look_up(
    policy: &policy::Policy,
    ask: BTreeMap<&str, Option<Version>>,
) -> BTreeMap<String, Result<Answer>> {
    let answers = ask.into_iter().map(|(name, version)| async move {
        let policy::Region { source, guards } = &policy.regions[name];
        let answer = lookup::ask(source, guards, version.as_ref(), None).await;
        (name.to_owned(), answer)
    });
    join_all(answers).await.into_iter().collect()
}

async fn check(
    file: &Path,
    resolve: bool,
    places: Option<(&Path, &Path)>,
    output: &Output,
) -> Result<ExitCode> {
    let loaded = PolicyFile::read(file)?;
    let known = Regions::new();
    let mut ask = region::to_ask(&loaded.policy, &known);
    let is_file = |name: &str| {
        let region = &loaded.policy.regions[name];
        matches!(region.source, RegionSource::File(_))
    };
    ask.retain(|name, _| resolve || is_file(name));
    let answers = look_up(&loaded.policy, ask).await;
    let regions = region::next(&loaded.policy, &known, answers, Timestamp::now())?;
    let compiled = compile(
        &loaded.policy,
        &region::prefixes(&regions),
        Timestamp::now(),
    );
    let host = host::interfaces().await?;
    let mut warnings = loaded.warnings(&compiled);
    let unknown = regions.iter().filter(|(_, state)| state.set.is_none());
    warnings.extend(unknown.map(|(name, state)| {
        let source = &state.region.source;
        format!("region {name} ({source}) is not looked up here, unless with --resolve")
    }));
    let kept = match places {
        Some((_, state_dir)) => store::read_confirmed(state_dir),
        None => Ok(None),
    };
    let mut errors = Vec::new();
    let remembered = match kept {
        Ok(kept) => kept.unwrap_or_default().interfaces,
        Err(error) => {
            errors.push(format!("{error:#}"));
            Remembered::default()
        }
    };
    let coverage = Coverage::of(&loaded.policy, &remembered, &host);
    warnings.extend(coverage.warnings(&host));
    let missing = coverage.missing.iter();
    let missing: Vec<String> = missing
        .map(|entry| format!("{} here", describe_missing(entry)))
        .collect();
    let mut drivers = None;
    // Without --host the policy may be meant for another host: only a warning.
    match places {
        Some((bpffs, _)) => {
            if coverage.present.is_empty() && !missing.is_empty() {
                errors.extend(missing);
                errors.push("nothing would be filtered, and the databases would be open".into());
            } else {
                warnings.extend(missing);
            }
            let found = driver::drivers(&coverage.present, loaded.policy.mode).await?;
            errors.extend(refusals(bpffs, &coverage));
            errors.extend(found.iter().filter_map(|driver| driver.error.clone()));
            drivers = Some(found);
            let changing = loaded.policy.interfaces.iter();
            let changing = changing.filter(|entry| !matches!(entry, Listed::Name(_)));
            warnings.extend(changing.filter(|entry| !remembered.knows(entry)).map(|entry| {
                format!(
                    "no agent has noted yet what `{entry}` stands for: at a first boot the databases are \
                     open until there is such an interface"
                )
            }));
        }
        None => warnings.extend(missing),
    }
    let PolicyFile {
        path: file, policy, ..
    } = loaded;
    let databases = policy.databases.iter().map(|database| {
        let entries = &compiled.databases[&database.name];
        CheckedDatabase {
            name: database.name.clone(),
            ports: database.guarded_ports(),
            addresses: database.addresses.clone(),
            model: database.model.name().into(),
            monitor: database.monitor,
            rules: entries.rules.iter().map(ToString::to_string).collect(),
            prefixes: entries.prefixes(),
        }
    });
    let checked = Checked {
        file,
        databases: databases.collect(),
        interfaces: policy.interfaces.iter().map(ToString::to_string).collect(),
        host: drivers,
        warnings,
        errors,
    };
    output.print(&checked, |checked| {
        println!("{} is valid", checked.file.display());
        println!("interfaces: {}", checked.interfaces.join(", "));
        let mut table = table(["DATABASE", "PORTS", "MODEL", "PREFIXES", "OPEN TO"]);
        for database in &checked.databases {
            table.add_row([
                database.name.clone(),
                with_addresses(&database.ports, &database.addresses),
                with_monitor(&database.model, database.monitor),
                database.prefixes.to_string(),
                or(&database.rules.join(", "), "nobody"),
            ]);
        }
        println!();
        print_table(&table, checked.databases.len());
        print_drivers(checked.host.as_deref().unwrap_or_default());
        print_warnings(&checked.warnings);
        for error in &checked.errors {
            println!("error: {error}");
        }
    })?;
    Ok(failure_if(!checked.errors.is_empty()))
}

/// What on this host would refuse a start.
fn refusals(bpffs: &Path, coverage: &Coverage) -> Vec<String> {
    let kernel = program::check_kernel(bpffs).err();
    let mut refusals: Vec<String> = kernel.iter().map(|error| format!("{error:#}")).collect();
    let ours = match pins::left_in_force(bpffs) {
        Ok(ours) => ours,
        // Our own program must not be taken for another's.
        Err(error) => {
            refusals.push(format!("{error:#}: run this as root"));
            return refusals;
        }
    };
    let others = coverage.present.iter();
    let others = others.filter(|interface| !ours.contains(&interface.index));
    let others = others.filter_map(|interface| links::check_free(interface).err());
    refusals.extend(others.map(|error| format!("{error:#}")));
    refusals
}

/// What `status --enforced` found.
#[derive(Serialize)]
struct Enforcement {
    /// Whether an agent said so; else the pins and the kernel's list of interfaces did.
    agent: bool,
    interfaces: Vec<String>,
}

fn print_enforcement(found: &Enforcement) {
    let on = or(
        &found.interfaces.join(", "),
        "no interface, since nothing is to be protected",
    );
    let by = if found.agent {
        ""
    } else {
        ", without an agent"
    };
    println!("enforced on {on}{by}");
}

/// Longest time that an agent may take to answer before the pins are looked at without it.
const AGENT_TIMEOUT: Duration = Duration::from_secs(10);

/// Whether the filter is in force on every listed interface that exists.
///
/// # Errors
/// It is not, or that cannot be found out.
async fn enforced(socket: &Socket, bpffs: &Path, state_dir: &Path) -> Result<Enforcement> {
    let asked = ask::<Status>(socket, Method::GET, "/status?verify=true");
    match tokio::time::timeout(AGENT_TIMEOUT, asked).await {
        Ok(Ok(status)) => {
            ensure!(
                status.not_enforced.is_empty(),
                "{}",
                status.not_enforced.join("; ")
            );
            let filtered = status
                .interfaces
                .into_iter()
                .filter(|i| i.program_id.is_some());
            Ok(Enforcement {
                agent: true,
                interfaces: filtered.map(|interface| interface.name).collect(),
            })
        }
        // Nobody answers: the filter may be in force all the same.
        Ok(Err(_)) | Err(_) => enforced_without_agent(bpffs, state_dir).await,
    }
}

async fn enforced_without_agent(bpffs: &Path, state_dir: &Path) -> Result<Enforcement> {
    let pinned = pins::pinned(bpffs)?;
    let host = host::interfaces().await?;
    let runs = |interface: &host::Interface| {
        let xdp = interface.xdp.map(|xdp| xdp.program_id);
        let mut links = pinned
            .iter()
            .filter(|link| link.interface == interface.index);
        links.any(|link| xdp == Some(link.program_id))
    };
    let kept = store::read_confirmed(state_dir)?;
    let kept = kept.context("no agent answers, and no policy was ever confirmed on this host")?;
    let (policy, _) = policy::parse(&kept.policy).map_err(|problems| {
        let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
        anyhow!("the confirmed policy is not valid: {}", problems.join("; "))
    })?;
    let coverage = Coverage::of(&policy, &kept.interfaces, &host);
    for interface in &coverage.present {
        let name = &interface.name;
        ensure!(
            runs(interface),
            "no agent answers, and {name} is not filtered"
        );
    }
    let missing: Vec<String> = coverage.missing.iter().map(describe_missing).collect();
    ensure!(
        !coverage.present.is_empty() || missing.is_empty(),
        "no agent answers, and nothing is filtered: {}",
        missing.join(", ")
    );
    Ok(Enforcement {
        agent: false,
        interfaces: coverage
            .present
            .into_iter()
            .map(|interface| interface.name)
            .collect(),
    })
}

/// Repeats a look until it succeeds or the limit has passed. Returns the last error.
async fn wait_for<T, F: Future<Output = Result<T>>>(
    limit: Duration,
    mut look: impl FnMut() -> F,
) -> Result<T> {
    const PAUSE: Duration = Duration::from_millis(200);
    let deadline = Instant::now() + limit;
    loop {
        let found = look().await;
        if found.is_ok() || Instant::now() + PAUSE > deadline {
            return found;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// A duration of the command line, of at most an hour.
fn wait_limit(text: &str) -> Result<Duration, String> {
    let duration: SignedDuration = text.parse().map_err(|_| "not a valid duration: 60s, 2m")?;
    let duration = Duration::try_from(duration).map_err(|_| "a duration must not be negative")?;
    if duration > Duration::from_hours(1) {
        return Err("at most 1h".into());
    }
    Ok(duration)
}

fn print_drivers(drivers: &[Driver]) {
    if drivers.is_empty() {
        return;
    }
    let mut table = table(["INTERFACE", "DRIVER", "NATIVE XDP", "MTU", "RX QUEUES"]);
    for driver in drivers {
        let native = match driver.native {
            Some(true) => "yes",
            Some(false) => "no",
            None => "unknown",
        };
        table.add_row([
            driver.interface.clone(),
            driver.driver.clone(),
            native.into(),
            driver.mtu.to_string(),
            driver.rx_queues.to_string(),
        ]);
    }
    println!();
    print_table(&table, drivers.len());
    for driver in drivers {
        for note in &driver.notes {
            println!("{}: {note}", driver.interface);
        }
    }
}

/// Sober columns, wrapped where they would not fit.
fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_width(WIDTH)
        .set_header(header);
    table
}

fn print_table(table: &Table, rows: usize) {
    if rows > 0 {
        for line in table.lines() {
            println!("{}", line.trim());
        }
    }
}

fn or(text: &str, otherwise: &str) -> String {
    if text.is_empty() { otherwise } else { text }.to_owned()
}

fn with_addresses(ports: &[String], addresses: &[IpAddr]) -> String {
    let ports = ports.join(", ");
    if addresses.is_empty() {
        return ports;
    }
    let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    format!("{ports} at {}", addresses.join(", "))
}

fn with_monitor(model: &str, monitor: bool) -> String {
    let monitor = if monitor { ", monitor" } else { "" };
    format!("{model}{monitor}")
}

fn print_warnings(warnings: &[String]) {
    if !warnings.is_empty() {
        println!();
    }
    for warning in warnings {
        println!("warning: {warning}");
    }
}

fn print_plan(plan: &Plan) {
    let mut same = true;
    for name in &plan.attached {
        println!("+ interface {name}");
        same = false;
    }
    for name in &plan.detached {
        println!("- interface {name}");
        same = false;
    }
    for (name, database) in &plan.difference.databases {
        same = false;
        println!("database {name}");
        list("+", "protect ", &database.guarded);
        list("-", "protect ", &database.unguarded);
        list("+", "", &database.added);
        list("-", "", &database.removed);
    }
    if same {
        println!("no difference: the kernel enforces {}", plan.file.display());
    }
    print_warnings(&plan.warnings);
}

/// The first `LISTED` items: a region may have a hundred thousand.
fn list<T: Display>(sign: &str, what: &str, items: &[T]) {
    for item in items.iter().take(LISTED) {
        println!("  {sign} {what}{item}");
    }
    if items.len() > LISTED {
        println!("  {sign} and {} more", items.len() - LISTED);
    }
}

fn print_reloaded(reloaded: &Reloaded) {
    print_plan(&reloaded.plan);
    println!();
    let report::Enforced {
        file,
        compiled_ms,
        enforced_ms,
        ..
    } = &reloaded.enforced;
    println!(
        "{} is enforced, {enforced_ms:.1} ms after it was read (compiled after {compiled_ms:.1} ms)",
        file.display()
    );
    print_verified(&reloaded.verified);
    for error in &reloaded.errors {
        println!("error: {error}");
    }
}

fn print_verified(verified: &report::Verified) {
    let probes = verified.probes;
    if verified.errors.is_empty() {
        println!("verified: the attached program judged {probes} probe packets as the policy does");
    }
    for error in &verified.errors {
        println!("error: {error}");
    }
}

fn print_status(status: &Status) {
    let policy = &status.policy;
    println!(
        "filter-agent {}, pid {}, up {}",
        status.version,
        status.pid,
        age(status.started)
    );
    println!(
        "policy {}, accepted {} ago, compiled after {:.1} ms, enforced after {:.1} ms",
        policy.file.display(),
        age(policy.accepted),
        policy.compiled_ms,
        policy.enforced_ms
    );
    if let Some(expiry) = policy.next_expiry {
        println!("next rule expires at {expiry}");
    }
    print_verified(&status.verified);
    let mut interfaces = table(["INTERFACE", "MODE", "PROGRAM"]);
    for interface in &status.interfaces {
        let program = interface.program_id.map(|id| id.to_string());
        interfaces.add_row([
            interface.name.clone(),
            or(
                interface.mode.as_deref().unwrap_or_default(),
                "NOT FILTERED",
            ),
            or(&program.unwrap_or_default(), "-"),
        ]);
    }
    println!();
    print_table(&interfaces, status.interfaces.len());
    if status.repairs > 0 {
        let times = if status.repairs == 1 { "time" } else { "times" };
        println!(
            "somebody took the filter off; it was put back {} {times}",
            status.repairs
        );
    }
    let header = [
        "DATABASE", "PORTS", "MODEL", "RULES", "PREFIXES", "PASSED", "DROPPED",
    ];
    let mut databases = table(header);
    for database in &status.databases {
        let mut dropped = reasons(&database.dropped);
        if !database.would_drop.is_empty() {
            let would_drop = reasons(&database.would_drop);
            dropped = format!("{dropped} (would drop {would_drop})");
        }
        databases.add_row([
            database.name.clone(),
            with_addresses(&database.ports, &database.addresses),
            with_monitor(&database.model, database.monitor),
            database.rules.to_string(),
            database.prefixes.to_string(),
            database.passed.to_string(),
            dropped,
        ]);
    }
    println!();
    print_table(&databases, status.databases.len());
    for database in status
        .databases
        .iter()
        .filter(|database| database.force_tls)
    {
        let mut connections = reasons(&database.connections);
        if !database.monitored_connections.is_empty() {
            let monitored = reasons(&database.monitored_connections);
            connections = format!("{connections} (monitored: {monitored})");
        }
        println!(
            "{}: TLS is forced; connections: {connections}",
            database.name
        );
    }
    let unattributed = [
        ("dropped", &status.unattributed),
        ("would be dropped", &status.unattributed_would_drop),
    ];
    for (what, counts) in unattributed {
        if !counts.is_empty() {
            println!(
                "\n{what}, aimed at no database in particular: {}",
                reasons(counts)
            );
        }
    }
    let used: Vec<&report::Region> = status.regions.iter().filter(|r| r.used).collect();
    if !used.is_empty() {
        println!();
    }
    print_region_table(&used);
    print_warnings(&status.warnings);
    if status.warnings.is_empty() && !status.errors.is_empty() {
        println!();
    }
    for error in &status.errors {
        println!("error: {error}");
    }
}

/// `3 not-allowed, 1 bad-source`.
fn reasons(counts: &BTreeMap<String, u64>) -> String {
    let reasons = counts
        .iter()
        .map(|(reason, packets)| format!("{packets} {reason}"));
    or(&reasons.collect::<Vec<_>>().join(", "), "0")
}

fn print_region_table(regions: &[&report::Region]) {
    let header = [
        "REGION",
        "PREFIXES",
        "AGE",
        "NEXT",
        "LAST LOOK-UP",
        "SOURCE",
    ];
    let mut table = table(header);
    for region in regions {
        let (next, last) = match (region.used, region.failing, &region.confirmed) {
            (false, _, _) => ("-".into(), "not used"),
            (true, true, _) => (until(region.next), "FAILED"),
            (true, false, None) => (until(region.next), "under way"),
            (true, false, Some(_)) => (until(region.next), "good"),
        };
        table.add_row([
            region.name.clone(),
            region.prefixes.len().to_string(),
            region.confirmed.map(age).unwrap_or_else(|| "-".into()),
            next,
            last.into(),
            region.source.clone(),
        ]);
    }
    print_table(&table, regions.len());
}

/// How long until then.
fn until(then: Option<Timestamp>) -> String {
    match then {
        Some(then) => duration(then.duration_since(Timestamp::now())),
        None => "-".into(),
    }
}

fn age(since: Timestamp) -> String {
    duration(Timestamp::now().duration_since(since))
}

/// Whole seconds, to be short.
fn duration(duration: SignedDuration) -> String {
    format!("{:#}", SignedDuration::from_secs(duration.as_secs().max(0)))
}

fn print_rules(rules: &[Rule]) {
    let header = [
        "DATABASE", "RULE", "SOURCE", "PREFIXES", "PACKETS", "EXPIRES", "LABEL",
    ];
    let mut table = table(header);
    for rule in rules {
        let expires = rule.expires.map(|expires| expires.to_string());
        let expires = match (expires, rule.expired) {
            (Some(expires), true) => format!("{expires} (expired)"),
            (Some(expires), false) => expires,
            (None, _) => "-".into(),
        };
        table.add_row([
            rule.database.clone(),
            rule.number
                .map_or_else(|| "-".into(), |number| number.to_string()),
            rule.source.clone(),
            rule.prefixes.to_string(),
            rule.hits.to_string(),
            expires,
            rule.label.clone().unwrap_or_default(),
        ]);
    }
    if rules.is_empty() {
        println!("no rules: nobody may reach a database");
    }
    print_table(&table, rules.len());
}

fn print_regions(regions: &[report::Region]) {
    print_region_table(&regions.iter().collect::<Vec<_>>());
    for region in regions.iter().filter(|region| region.used) {
        println!("\n{}", region.name);
        list(" ", "", &region.prefixes);
        for retiring in region.retiring.iter().take(LISTED) {
            let left = until(Some(retiring.until));
            println!("    {} has left and retires in {left}", retiring.prefix);
        }
        if let Some(change) = &region.change {
            let at = change.at.map(age).unwrap_or_else(|| "-".into());
            println!("  last change {at} ago");
            print_change(&change.added, &change.left, &change.removed);
        }
        if let Some(error) = &region.error {
            let over = if region.failing { "" } else { ", over by now" };
            println!("  last error {} ago{over}: {}", age(error.at), error.text);
        }
    }
}

fn print_change(added: &[IpNet], left: &[IpNet], removed: &[IpNet]) {
    list("+", "", added);
    list("~", "left, still allowed for a time: ", left);
    list("-", "", removed);
}

fn print_refreshed(refreshed: &[Refreshed]) {
    if refreshed.is_empty() {
        println!("no rule names a region");
    }
    for region in refreshed {
        let name = &region.region;
        let prefixes = region.prefixes;
        let changes = region.added.len() + region.left.len() + region.removed.len();
        match &region.error {
            Some(error) => println!("{name}: error: {error}; {prefixes} prefixes stay in force"),
            None if changes == 0 => println!("{name}: no change, {prefixes} prefixes"),
            None => println!("{name}: changed, {prefixes} prefixes"),
        }
        print_change(&region.added, &region.left, &region.removed);
    }
}

fn print_explanations(explanations: &[Explanation]) {
    if explanations.is_empty() {
        println!("no database has an address of that family");
    }
    for verdict in explanations {
        let Explanation {
            database, source, ..
        } = verdict;
        let action = if verdict.passes {
            "passes"
        } else {
            "is dropped"
        };
        let label = verdict.label.as_ref().map(|label| format!(" ({label})"));
        let label = label.unwrap_or_default();
        let expires = verdict.expires.map(|at| format!(", until {at}"));
        let expires = expires.unwrap_or_default();
        let why = match &verdict.rule {
            Some(rule) => format!("allowed by {rule}{label}{expires}"),
            None => match verdict.reason.as_str() {
                "bad-source" => "no host may have this address on the wire".into(),
                _ => "no rule allows it".into(),
            },
        };
        let monitor = if verdict.monitor && verdict.rule.is_none() {
            ", but the database is only monitored"
        } else {
            ""
        };
        let tls = match verdict.force_tls && verdict.rule.is_some() {
            true => ", as long as the connection begins with TLS",
            false => "",
        };
        println!("{database}: {source} {action}: {why}{tls}{monitor}");
    }
}

fn print_drops(drops: &Drops) {
    let mut table = table(["DATABASE", "SOURCE", "REASON", "PACKETS", "LAST SEEN"]);
    for dropped in drops.sources.iter().take(LISTED) {
        table.add_row([
            or_any(&dropped.database).to_owned(),
            source(dropped),
            reason(&dropped.reason, dropped.monitor),
            dropped.packets.to_string(),
            format!("{} ago", age(dropped.last_seen)),
        ]);
    }
    print_table(&table, drops.sources.len());
    if drops.sources.len() > LISTED {
        println!("and {} more (see --json)", drops.sources.len() - LISTED);
    }
    drops.unsampled.iter().for_each(print_unsampled);
    if drops.sources.is_empty() && drops.unsampled.is_empty() {
        let since = age(drops.since);
        println!("nobody was turned away since the agent started {since} ago");
    }
}

fn print_unsampled(more: &report::Unsampled) {
    let (database, reason) = (or_any(&more.database), reason(&more.reason, more.monitor));
    println!(
        "{database}: {} more packets, {reason}, not looked at one by one",
        more.packets
    );
}

fn or_any(database: &Option<String>) -> &str {
    database.as_deref().unwrap_or("any")
}

fn source(dropped: &report::Dropped) -> String {
    let source = dropped.source.map(|source| source.to_string());
    source.unwrap_or_else(|| "unknown".into())
}

fn reason(reason: &str, monitor: bool) -> String {
    let monitor = if monitor { ", only monitored" } else { "" };
    format!("{reason}{monitor}")
}

/// Prints what is new since `before`, every second, until the agent or the reader is gone.
async fn follow_drops(
    mut before: Drops,
    socket: &Socket,
    path: &str,
    output: &Output,
) -> Result<ExitCode> {
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let now: Drops = ask(socket, Method::GET, path).await?;
        let new = newer(&before, &now);
        let mut lines = Vec::new();
        if output.json {
            for dropped in &new {
                lines.push(serde_json::to_string(dropped).context("write JSON")?);
            }
        } else {
            lines.extend(new.iter().take(LISTED).map(line));
            if new.len() > LISTED {
                lines.push(format!("and {} more", new.len() - LISTED));
            }
        }
        let mut stdout = io::stdout();
        let written = lines.iter().try_for_each(|line| writeln!(stdout, "{line}"));
        match written {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                return Ok(ExitCode::from(EXIT_BROKEN_PIPE as u8));
            }
            written => written.context("write to standard output")?,
        }
        before = now;
    }
}

fn line(dropped: &report::Dropped) -> String {
    format!(
        "{:.0} {} {} {} {}",
        dropped.last_seen,
        or_any(&dropped.database),
        source(dropped),
        dropped.packets,
        reason(&dropped.reason, dropped.monitor)
    )
}

/// Who was turned away between two reports, with the packets since the first.
fn newer(before: &Drops, now: &Drops) -> Vec<report::Dropped> {
    let who = |dropped: &report::Dropped| {
        let database = dropped.database.clone();
        (
            database,
            dropped.source,
            dropped.reason.clone(),
            dropped.monitor,
        )
    };
    let before: BTreeMap<_, u64> = before
        .sources
        .iter()
        .map(|dropped| (who(dropped), dropped.packets))
        .collect();
    let mut new = now.sources.clone();
    for dropped in &mut new {
        dropped.packets -= before
            .get(&who(dropped))
            .copied()
            .unwrap_or_default()
            .min(dropped.packets);
    }
    new.retain(|dropped| dropped.packets > 0);
    new
}

/// A running agent detaches itself, since it would attach again; without one the pins are removed
/// here.
async fn detach(yes: bool, socket: &Socket, bpffs: &Path, state_dir: &Path) -> Result<ExitCode> {
    if !yes {
        if !io::stdin().is_terminal() {
            eprintln!("filter-agent: detach asks on a terminal; elsewhere it needs --yes");
            return Ok(ExitCode::from(2));
        }
        print!("Stop filtering? Everybody can reach the databases then. [y/N] ");
        io::stdout().flush().context("write to the terminal")?;
        let mut answer = String::new();
        io::stdin()
            .lock()
            .read_line(&mut answer)
            .context("read the answer")?;
        ensure!(answer.trim().eq_ignore_ascii_case("y"), "not detached");
    }
    let names = match UnixStream::connect(&socket.socket).await {
        Ok(_) => ask::<Vec<String>>(socket, Method::POST, "/detach").await?,
        Err(_) => {
            let interfaces = pins::remove(bpffs)?;
            store::forget_confirmed(state_dir).context(
                "detached: nothing is filtered any more; but the next start may enforce it again",
            )?;
            interfaces.into_iter().map(interface_name).collect()
        }
    };
    end_with_the_reader()?;
    match names.as_slice() {
        [] => println!("nothing was filtered"),
        names => println!("detached from {}: it is open now", names.join(", ")),
    }
    Ok(ExitCode::SUCCESS)
}
