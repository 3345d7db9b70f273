//! The agent in front of a PostgreSQL server, in network namespaces made for the occasion.

use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User, chown};

use crate::{output, run};

const POLICY: &str = include_str!("../demo-policy.yaml");

/// Followed by the process id, so that two demos do not meet and a dead one's remains are known.
const PREFIX: &str = "fa-demo-";

const PROTECTED: u16 = 5432;
const UNPROTECTED: u16 = 5433;

struct Host {
    name: &'static str,
    ipv4: &'static str,
    ipv6: &'static str,
}

const DB: Host = Host {
    name: "db",
    ipv4: "192.0.2.1",
    ipv6: "2001:db8::1",
};
const OFFICE: Host = Host {
    name: "office",
    ipv4: "192.0.2.10",
    ipv6: "2001:db8::10",
};
const ELSEWHERE: Host = Host {
    name: "elsewhere",
    ipv4: "198.51.100.10",
    ipv6: "2001:db8:f::10",
};

/// Limit of every wait for something that must happen, so long that a busy machine does not reach it.
const PATIENCE: Duration = Duration::from_secs(180);

/// The namespace that is the network between the hosts.
const NETWORK: &str = "net";

pub fn show(agent: &Path) -> Result<()> {
    remove_remains_of_the_dead()?;
    let mut demo = Demo::new(agent)?;
    let id = demo.id.clone();
    let directory = demo.directory.clone();
    let shown = demo.play();
    let interrupted = demo.stop_if_interrupted();
    if shown.is_err() && interrupted.is_ok() {
        demo.print_logs();
    }
    let failures = demo.failures;
    // Stops everything and removes it, whatever happened.
    drop(demo);
    let left = what_is_left(&id, &directory)?;
    interrupted?;
    shown?;

    heading("What is left of it");
    ensure!(left.is_empty(), "left behind: {}", left.join(", "));
    println!("  no namespace, no mount, no file, no process");
    ensure!(failures == 0, "{failures} of the expectations did not hold");
    println!("\nEverything was as expected.");
    Ok(())
}

fn heading(text: &str) {
    println!("\n== {text}");
}

struct Demo {
    id: String,
    directory: PathBuf,
    agent: PathBuf,
    postgresql: PathBuf,
    /// The servers, in the order in which they were started.
    children: Vec<Child>,
    interrupted: Arc<AtomicBool>,
    failures: u32,
}

impl Demo {
    fn new(agent: &Path) -> Result<Demo> {
        let interrupted = Arc::new(AtomicBool::new(false));
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            signal_hook::flag::register(signal as i32, interrupted.clone())
                .context("listen for signals")?;
        }
        let id = format!("{PREFIX}{}", std::process::id());
        let directory = std::env::temp_dir().join(&id);
        // PostgreSQL runs as a user of its own and must get to its data in here.
        DirBuilder::new()
            .mode(0o755)
            .create(&directory)
            .with_context(|| format!("create {}", directory.display()))?;
        Ok(Demo {
            id,
            directory,
            agent: agent.to_owned(),
            postgresql: postgresql_directory()?,
            children: Vec::new(),
            interrupted,
            failures: 0,
        })
    }

    fn play(&mut self) -> Result<()> {
        heading("What is set up");
        self.connect_hosts()?;
        for port in [PROTECTED, UNPROTECTED] {
            self.start_postgresql(port)?;
        }
        println!(
            "  db         {}, {}: PostgreSQL on ports 5432 and 5433",
            DB.ipv4, DB.ipv6
        );
        for client in [OFFICE, ELSEWHERE] {
            println!(
                "  {:<10} {}, {}: psql",
                client.name, client.ipv4, client.ipv6
            );
        }
        println!("  each a network namespace; a bridge in a fourth connects them");

        heading("Without the filter: port 5432");
        self.try_everybody(PROTECTED, |_| true)?;

        heading("The policy");
        for line in POLICY.lines() {
            println!("  {line}");
        }

        heading("The agent starts");
        let agent = self.start_agent()?;

        heading("With the filter: port 5432, protected");
        self.try_everybody(PROTECTED, |client| client == OFFICE.name)?;
        heading("With the filter: port 5433, not in the policy");
        self.try_everybody(UNPROTECTED, |_| true)?;

        heading("What the kernel counted: filter-agent status");
        self.ask_agent(&["status"])?;
        heading("filter-agent rules");
        self.ask_agent(&["rules"])?;
        heading(&format!("filter-agent explain {}", ELSEWHERE.ipv4));
        self.ask_agent(&["explain", ELSEWHERE.ipv4])?;
        self.check_counts()?;

        heading("The agent is killed (kill -9): port 5432");
        let agent = &mut self.children[agent];
        agent.kill().context("kill the agent")?;
        agent.wait().context("wait for the agent")?;
        self.try_everybody(PROTECTED, |client| client == OFFICE.name)?;

        heading("filter-agent detach --yes: port 5432");
        let bpffs = self.bpffs();
        run(self
            .agent_command("detach")
            .args(["--yes", "--bpffs"])
            .arg(&bpffs))?;
        // The kernel itself puts files there, but no directories.
        let entries = fs::read_dir(&bpffs).with_context(|| format!("list {}", bpffs.display()))?;
        let pinned = entries.flatten().any(|entry| entry.path().is_dir());
        self.expect(!pinned, "detach removes everything that was pinned");
        self.try_everybody(PROTECTED, |_| true)
    }

    fn connect_hosts(&self) -> Result<()> {
        for name in [NETWORK, DB.name, OFFICE.name, ELSEWHERE.name] {
            self.ip(&format!("netns add {}", self.namespace(name)))?;
        }
        let network = self.namespace(NETWORK);
        self.ip(&format!("-n {network} link add bridge up type bridge"))?;
        for host in [DB, OFFICE, ELSEWHERE] {
            let (port, namespace) = (host.name, self.namespace(host.name));
            self.ip(&format!(
                "-n {network} link add {port} type veth peer name eth0 netns {namespace}"
            ))?;
            self.ip(&format!("-n {network} link set {port} master bridge up"))?;
            // Any address is a neighbour on this network, so that none needs a router.
            self.ip(&format!(
                "-n {namespace} address add {}/32 dev eth0",
                host.ipv4
            ))?;
            self.ip(&format!(
                "-n {namespace} address add {}/128 dev eth0 nodad",
                host.ipv6
            ))?;
            self.ip(&format!("-n {namespace} link set eth0 up"))?;
            self.ip(&format!("-n {namespace} route add default dev eth0"))?;
            self.ip(&format!("-n {namespace} -6 route add default dev eth0"))?;
        }
        Ok(())
    }

    /// Runs `ip` with the words of `arguments`.
    fn ip(&self, arguments: &str) -> Result<()> {
        self.stop_if_interrupted()?;
        run(Command::new("ip").args(arguments.split(' ')))
    }

    fn namespace(&self, host: &str) -> String {
        format!("{}-{host}", self.id)
    }

    fn inside(&self, host: &str, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", &self.namespace(host)])
            .arg(program);
        command
    }

    fn start_postgresql(&mut self, port: u16) -> Result<()> {
        let data = self.directory.join(format!("postgresql-{port}"));
        fs::create_dir(&data).with_context(|| format!("create {}", data.display()))?;
        let user = User::from_name("postgres")
            .context("look up the user postgres")?
            .context("there is no user postgres, which Debian's package makes")?;
        chown(&data, Some(user.uid), Some(user.gid))
            .with_context(|| format!("give {} to postgres", data.display()))?;
        // PostgreSQL refuses to run as root.
        let become_postgres = ["--reuid=postgres", "--regid=postgres", "--init-groups"];
        output(
            Command::new("setpriv")
                .args(become_postgres)
                .arg(self.postgresql.join("initdb"))
                .args([
                    "--auth=trust",
                    "--no-sync",
                    "--no-locale",
                    "--encoding=UTF8",
                ])
                .arg("--pgdata")
                .arg(&data),
        )?;
        fs::write(data.join("pg_hba.conf"), "host all all all trust\n")
            .context("write pg_hba.conf")?;

        let log = self.directory.join(format!("postgresql-{port}.log"));
        let mut server = self.inside(DB.name, Path::new("setpriv"));
        server
            .args(become_postgres)
            .arg(self.postgresql.join("postgres"))
            .arg("-D")
            .arg(&data)
            .args(["-p", &port.to_string(), "-c", "listen_addresses=*"])
            .args(["-c", "unix_socket_directories=", "-c", "fsync=off"]);
        let ready = "database system is ready to accept connections";
        self.start(server, &log, ready)?;
        Ok(())
    }

    fn start_agent(&mut self) -> Result<usize> {
        let bpffs = self.bpffs();
        fs::create_dir(&bpffs).with_context(|| format!("create {}", bpffs.display()))?;
        run(Command::new("mount").args(["-t", "bpf", "bpf"]).arg(&bpffs))?;
        let policy = self.directory.join("policy.yaml");
        fs::write(&policy, POLICY).context("write the policy")?;

        let log = self.directory.join("agent.log");
        let mut agent = self.agent_command("run");
        agent.arg("--policy").arg(policy).arg("--bpffs").arg(bpffs);
        let started = self.start(agent, &log, "enforcing ")?;
        for line in fs::read_to_string(&log)
            .context("read the agent's log")?
            .lines()
        {
            println!("  {line}");
        }
        Ok(started)
    }

    /// The end of what each server said.
    fn print_logs(&self) {
        for entry in fs::read_dir(&self.directory)
            .into_iter()
            .flatten()
            .flatten()
        {
            let path = entry.path();
            if path.extension().is_some_and(|extension| extension == "log") {
                let log = fs::read_to_string(&path).unwrap_or_default();
                let lines: Vec<&str> = log.lines().collect();
                eprintln!("\n{}:", path.display());
                for line in &lines[lines.len().saturating_sub(20)..] {
                    eprintln!("  {line}");
                }
            }
        }
    }

    fn bpffs(&self) -> PathBuf {
        self.directory.join("bpf")
    }

    fn agent_command(&self, command: &str) -> Command {
        let mut agent = self.inside(DB.name, &self.agent);
        agent
            .arg(command)
            .arg("--socket")
            .arg(self.directory.join("control.sock"));
        agent
    }

    fn ask_agent(&self, words: &[&str]) -> Result<()> {
        self.stop_if_interrupted()?;
        run(self.agent_command(words[0]).args(&words[1..]))
    }

    /// Starts a server and waits for the line that says it is ready.
    fn start(&mut self, mut command: Command, log: &Path, ready: &str) -> Result<usize> {
        let file = File::create(log).with_context(|| format!("create {}", log.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone().context("share the log")?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("start `{}`", crate::command_line(&command)))?;
        let index = self.children.len();
        self.children.push(child);

        let begin = Instant::now();
        loop {
            self.stop_if_interrupted()?;
            let ended = self.children[index]
                .try_wait()
                .context("look after a server")?;
            let text = fs::read_to_string(log).context("read a server's log")?;
            if text.contains(ready) {
                return Ok(index);
            }
            if ended.is_some() || begin.elapsed() > PATIENCE {
                bail!("`{}` did not get ready", crate::command_line(&command));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Lets every client connect with psql, over IPv4 and IPv6, all at the same time.
    fn try_everybody(&mut self, port: u16, may: impl Fn(&str) -> bool) -> Result<()> {
        self.stop_if_interrupted()?;
        let mut attempts = Vec::new();
        for client in [OFFICE, ELSEWHERE] {
            for (source, server) in [(client.ipv4, DB.ipv4), (client.ipv6, DB.ipv6)] {
                // Whoever stays out gets no answer at all.
                let timeout = if may(client.name) {
                    PATIENCE.as_secs().to_string()
                } else {
                    "3".into()
                };
                let psql = self
                    .inside(client.name, &self.postgresql.join("psql"))
                    .env("PGCONNECT_TIMEOUT", timeout)
                    .args(["--no-psqlrc", "--tuples-only", "--no-align"])
                    .args(["--host", server, "--port", &port.to_string()])
                    .args(["--username", "postgres", "--dbname", "postgres"])
                    .args(["--command", "select inet_client_addr()"])
                    .stdout(Stdio::piped())
                    .stderr(Stdio::piped())
                    .spawn()
                    .context("start psql")?;
                attempts.push((client.name, source, psql));
            }
        }
        for (client, source, psql) in attempts {
            let answer = psql.wait_with_output().context("wait for psql")?;
            let got_in = answer.status.success();
            let said = if got_in { answer.stdout } else { answer.stderr };
            let said = String::from_utf8_lossy(&said);
            let said = said.trim().trim_start_matches("psql: error: ");
            self.stop_if_interrupted()?;
            if got_in {
                println!("  {source:<17} in   the server sees {said}");
                self.expect(said == source, "the server sees the client's own address");
            } else {
                println!(
                    "  {source:<17} out  {}",
                    said.lines().next().unwrap_or_default()
                );
            }
            let expected = if may(client) { "gets in" } else { "stays out" };
            self.expect(got_in == may(client), &format!("{source} {expected}"));
        }
        Ok(())
    }

    fn check_counts(&mut self) -> Result<()> {
        let status = output(self.agent_command("status").arg("--json"))?;
        let status: serde_json::Value =
            serde_json::from_str(&status).context("parse what `status --json` prints")?;
        let database = &status["databases"][0];
        let passed = database["passed"].as_u64().unwrap_or(0);
        let dropped = database["dropped"]
            .as_object()
            .into_iter()
            .flat_map(|map| map.values());
        let dropped: u64 = dropped.filter_map(serde_json::Value::as_u64).sum();
        self.expect(passed > 0, "the kernel counted the packets of the office");
        self.expect(dropped > 0, "the kernel counted the packets it dropped");
        Ok(())
    }

    fn expect(&mut self, holds: bool, what: &str) {
        if !holds {
            println!("  FAILED: expected that {what}");
            self.failures += 1;
        }
    }

    fn stop_if_interrupted(&self) -> Result<()> {
        ensure!(!self.interrupted.load(Ordering::Relaxed), "interrupted");
        Ok(())
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.id, &self.directory) {
            eprintln!("clean up: {error:#}");
        }
        for child in &mut self.children {
            // Its end was seen to already; this is only for the kernel's process table.
            let _ = child.try_wait();
        }
    }
}

/// Debian keeps each major version's programs in a directory of their own.
fn postgresql_directory() -> Result<PathBuf> {
    let versions = Path::new("/usr/lib/postgresql");
    fs::read_dir(versions)
        .with_context(|| format!("list {}", versions.display()))?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .max()
        .map(|version| versions.join(format!("{version}/bin")))
        .filter(|programs| programs.join("postgres").exists())
        .with_context(|| format!("find a PostgreSQL server in {}", versions.display()))
}

/// Removes what demos left that were killed before they could clean up.
fn remove_remains_of_the_dead() -> Result<()> {
    let mut ids = namespaces(PREFIX)?;
    let temporary = std::env::temp_dir();
    let entries = fs::read_dir(&temporary).context("list the temporary directory")?;
    ids.extend(entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()));
    let mut pids: Vec<u32> = ids
        .iter()
        .filter_map(|id| id.strip_prefix(PREFIX)?.split('-').next()?.parse().ok())
        .collect();
    pids.sort_unstable();
    pids.dedup();
    for pid in pids {
        if !Path::new("/proc").join(pid.to_string()).exists() {
            let id = format!("{PREFIX}{pid}");
            remove(&id, &temporary.join(&id))?;
        }
    }
    Ok(())
}

/// Removes a demo's processes, namespaces, mount and files.
fn remove(id: &str, directory: &Path) -> Result<()> {
    for namespace in namespaces(&format!("{id}-"))? {
        end_processes(&namespace)?;
        run(Command::new("ip").args(["netns", "delete", &namespace]))?;
    }
    for mount in mounts(directory)? {
        run(Command::new("umount").arg(mount))?;
    }
    if directory.exists() {
        fs::remove_dir_all(directory).with_context(|| format!("remove {}", directory.display()))?;
    }
    Ok(())
}

fn end_processes(namespace: &str) -> Result<()> {
    // Killed outright, PostgreSQL would leave its shared memory behind.
    for signal in [Signal::SIGINT, Signal::SIGKILL] {
        for pid in processes(namespace)? {
            // It may have ended meanwhile.
            let _ = kill(pid, signal);
        }
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(30) {
            if processes(namespace)?.is_empty() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    bail!("processes in {namespace} do not end")
}

fn processes(namespace: &str) -> Result<Vec<Pid>> {
    let list = output(Command::new("ip").args(["netns", "pids", namespace]))?;
    let pids = list.lines().map(|pid| pid.parse().map(Pid::from_raw));
    pids.collect::<Result<_, _>>().context("read a process id")
}

fn what_is_left(id: &str, directory: &Path) -> Result<Vec<String>> {
    let mut left = namespaces(&format!("{id}-"))?;
    left.extend(mounts(directory)?);
    if directory.exists() {
        left.push(directory.display().to_string());
    }
    for process in fs::read_dir("/proc")
        .context("list the processes")?
        .flatten()
    {
        let command = fs::read(process.path().join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&command).contains(&*directory.to_string_lossy()) {
            left.push(format!("process {}", process.file_name().display()));
        }
    }
    Ok(left)
}

fn namespaces(prefix: &str) -> Result<Vec<String>> {
    let list = output(Command::new("ip").args(["netns", "list"]))?;
    let names = list.lines().filter_map(|line| line.split(' ').next());
    Ok(names
        .filter(|name| name.starts_with(prefix))
        .map(str::to_owned)
        .collect())
}

fn mounts(directory: &Path) -> Result<Vec<String>> {
    let table = fs::read_to_string("/proc/self/mounts").context("list the mounts")?;
    let points = table.lines().filter_map(|line| line.split(' ').nth(1));
    Ok(points
        .filter(|point| Path::new(point).starts_with(directory))
        .map(str::to_owned)
        .collect())
}
