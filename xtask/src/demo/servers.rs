//! The servers of a host: PostgreSQL and the agent.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::unistd::User;

use super::{Demo, NO_ANSWER, PATIENCE};
use crate::{output, run};

/// PostgreSQL refuses to run as root.
const BECOME_POSTGRES: [&str; 3] = ["--reuid=postgres", "--regid=postgres", "--init-groups"];

/// How a client's attempt to connect ended.
pub enum Attempt {
    /// The address of the client, as the server sees it.
    In(String),
    /// Dropped without an answer.
    Out(String),
    /// Neither: an error of which nobody can say that the filter caused it.
    Failed(String),
}

impl Demo {
    /// Starts a server and waits for the line that says it is ready.
    pub fn start(&mut self, mut command: Command, log: &str, ready: &str) -> Result<usize> {
        let log = self.directory.join(log);
        let file = File::create(&log).with_context(|| format!("create {}", log.display()))?;
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
            let text = fs::read_to_string(&log).context("read a server's log")?;
            if text.contains(ready) {
                return Ok(index);
            }
            if ended.is_some() || begin.elapsed() > PATIENCE {
                bail!("`{}` did not get ready", crate::command_line(&command));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// `kill -9`.
    pub fn kill(&mut self, server: usize) -> Result<()> {
        let server = &mut self.children[server];
        server.kill().context("kill a server")?;
        server.wait().context("wait for a server")?;
        Ok(())
    }

    /// Makes the data directory that each PostgreSQL server gets a copy of.
    pub fn make_data(&self) -> Result<()> {
        self.stop_if_interrupted()?;
        let data = self.data();
        fs::create_dir(&data).with_context(|| format!("create {}", data.display()))?;
        give_to_postgres(&data)?;
        output(
            Command::new("setpriv")
                .args(BECOME_POSTGRES)
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
        fs::write(data.join("pg_hba.conf"), "host all all all trust\n").context("write pg_hba.conf")
    }

    fn data(&self) -> PathBuf {
        self.directory.join("postgresql")
    }

    /// `tls`: the server's certificate and its key.
    pub fn start_postgresql(
        &mut self,
        host: &str,
        port: u16,
        tls: Option<[&Path; 2]>,
    ) -> Result<()> {
        let data = self.home(host).join(format!("postgresql-{port}"));
        let mut copy = Command::new("cp");
        run(copy.arg("--archive").arg(self.data()).arg(&data))?;
        let mut server = self.inside(host, Path::new("setpriv"));
        server
            .args(BECOME_POSTGRES)
            .arg(self.postgresql.join("postgres"))
            .arg("-D")
            .arg(&data)
            .args(["-p", &port.to_string(), "-c", "listen_addresses=*"])
            .args(["-c", "unix_socket_directories=", "-c", "fsync=off"]);
        if let Some([certificate, key]) = tls {
            for (from, name) in [(certificate, "server.crt"), (key, "server.key")] {
                let to = data.join(name);
                fs::copy(from, &to).with_context(|| format!("write {}", to.display()))?;
                fs::set_permissions(&to, Permissions::from_mode(0o600))
                    .with_context(|| format!("close {}", to.display()))?;
                give_to_postgres(&to)?;
            }
            server.args(["-c", "ssl=on"]);
        }
        let ready = "database system is ready to accept connections";
        self.start(server, &format!("postgresql-{host}-{port}.log"), ready)?;
        Ok(())
    }

    /// psql, which reports the address that the server sees. It is given time enough if it should get in.
    pub fn psql(&self, client: &str, server: &str, port: u16, should_get_in: bool) -> Command {
        let timeout = match should_get_in {
            true => PATIENCE.as_secs().to_string(),
            false => "3".into(),
        };
        let mut psql = self.inside(client, &self.postgresql.join("psql"));
        psql.env("LC_ALL", "C")
            .env("PGCONNECT_TIMEOUT", timeout)
            .args(["--no-psqlrc", "--tuples-only", "--no-align"])
            .args(["--host", server, "--port", &port.to_string()])
            .args(["--username", "postgres", "--dbname", "postgres"])
            .args(["--command", "select inet_client_addr()"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        psql
    }

    /// How psql ended.
    pub fn attempt(&self, psql: Child) -> Result<Attempt> {
        let answer = self.wait_for(psql).context("wait for psql")?;
        if answer.status.success() {
            let address = String::from_utf8_lossy(&answer.stdout);
            return Ok(Attempt::In(address.trim().to_owned()));
        }
        let said = String::from_utf8_lossy(&answer.stderr);
        let said = said.trim().trim_start_matches("psql: error: ");
        let line = said.lines().next().unwrap_or_default().to_owned();
        Ok(match said.contains(NO_ANSWER) {
            true => Attempt::Out(line),
            false => Attempt::Failed(said.to_owned()),
        })
    }

    pub fn bpffs(&self, host: &str) -> PathBuf {
        self.home(host).join("bpf")
    }

    pub fn state(&self, host: &str) -> PathBuf {
        self.home(host).join("state")
    }

    pub fn mount_bpffs(&self, host: &str) -> Result<()> {
        let bpffs = self.bpffs(host);
        fs::create_dir_all(&bpffs).with_context(|| format!("create {}", bpffs.display()))?;
        run(Command::new("mount").args(["-t", "bpf", "bpf"]).arg(&bpffs))
    }

    /// Starts the agent of a host with the policy in its directory.
    pub fn start_agent(&mut self, host: &str) -> Result<usize> {
        let mut agent = self.agent(host, "run");
        agent
            .arg("--policy")
            .arg(self.home(host).join("policy.yaml"))
            .arg("--bpffs")
            .arg(self.bpffs(host))
            .arg("--state-dir")
            .arg(self.state(host));
        self.start(agent, &agent_log(host), "enforcing ")
    }

    /// A command of the agent of a host.
    pub fn agent(&self, host: &str, command: &str) -> Command {
        let mut agent = self.inside(host, &self.agent);
        agent
            .arg(command)
            .arg("--socket")
            .arg(self.home(host).join("control.sock"));
        agent
    }
}

pub fn agent_log(host: &str) -> String {
    format!("agent-{host}.log")
}

fn give_to_postgres(path: &Path) -> Result<()> {
    let user = User::from_name("postgres")
        .context("look up the user postgres")?
        .context("there is no user postgres, which Debian's package makes")?;
    chown(path, Some(user.uid.as_raw()), Some(user.gid.as_raw()))
        .with_context(|| format!("give {} to postgres", path.display()))
}

/// Debian keeps each major version's programs in a directory of their own.
pub fn postgresql_directory() -> Result<PathBuf> {
    let versions = Path::new("/usr/lib/postgresql");
    fs::read_dir(versions)
        .with_context(|| format!("list {}", versions.display()))?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .max()
        .map(|version| versions.join(format!("{version}/bin")))
        .filter(|programs| programs.join("postgres").exists())
        .with_context(|| format!("find a PostgreSQL server in {}", versions.display()))
}
