//! Who gets in at which host, and how soon.

use std::fs::File;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::sched::{CloneFlags, setns};

use super::{CLIENTS, DATABASES, PORT};
use crate::demo::network::Host;
use crate::demo::servers::Attempt;
use crate::demo::{Demo, PATIENCE};

/// Time that a try to connect is given while we wait for the first that succeeds.
const TRY_TIME: Duration = Duration::from_millis(20);

impl Demo {
    /// Lets every client connect to every host with psql, all at the same time. `may`: whether a client gets in at a host.
    pub fn try_all(&mut self, may: impl Fn(&str, &str) -> bool) -> Result<()> {
        self.stop_if_interrupted()?;
        let mut attempts = Vec::new();
        for client in CLIENTS {
            for host in DATABASES {
                let mut psql = self.psql_with_tls(client, host, may(client.name, host.name));
                attempts.push(psql.spawn().context("start psql")?);
            }
        }
        let mut attempts = attempts.into_iter();
        let names: Vec<String> = DATABASES
            .iter()
            .map(|host| format!("{:<5}", host.name))
            .collect();
        println!("{:26}{}", "", names.join("").trim_end());
        for client in CLIENTS {
            let mut row = format!("  {:<10}{:<14}", client.name, client.addresses[0]);
            let mut surprises = Vec::new();
            for (host, psql) in DATABASES.iter().zip(attempts.by_ref()) {
                let attempt = self.attempt(psql)?;
                let expected = may(client.name, host.name);
                let (shown, is_expected, said) = match attempt {
                    Attempt::In(seen) => ("in", expected && seen == client.addresses[0], seen),
                    Attempt::Out(said) => ("out", !expected, said),
                    Attempt::Failed(said) => ("?", false, said),
                };
                row += &format!("{shown:<5}");
                if !is_expected {
                    let ends = if expected { "gets in" } else { "stays out" };
                    surprises.push(format!("{} {ends} at {}: {said}", client.name, host.name));
                }
            }
            println!("{}", row.trim_end());
            for surprise in surprises {
                self.expect(false, &surprise);
            }
        }
        Ok(())
    }

    fn psql_with_tls(&self, client: Host, host: Host, should_get_in: bool) -> Command {
        let mut psql = self.psql(client.name, host.addresses[0], PORT, should_get_in);
        psql.env("PGSSLMODE", "verify-full")
            .env("PGSSLROOTCERT", self.certificate("ca"));
        psql
    }

    /// Lets a client that may get in connect in the clear.
    pub fn try_in_the_clear(&mut self, client: Host, host: Host) -> Result<()> {
        self.stop_if_interrupted()?;
        println!(
            "{}$ psql 'host={} sslmode=disable'",
            client.name, host.addresses[0]
        );
        let mut psql = self.psql_with_tls(client, host, true);
        psql.env("PGSSLMODE", "disable");
        let said = match self.attempt(psql.spawn().context("start psql")?)? {
            Attempt::In(_) => "in".to_owned(),
            Attempt::Out(said) | Attempt::Failed(said) => said,
        };
        println!("{said}");
        self.expect(
            said.contains("TLS is required"),
            "it is refused because it does not begin with TLS",
        );
        Ok(())
    }

    /// Does something, and says how long after its begin a client first connects to each host.
    pub fn time_connections(
        &mut self,
        client: Host,
        action: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let network = self.network_file(client.name);
        let is_over = AtomicBool::new(false);
        let (begin, connected) = thread::scope(|scope| -> Result<_> {
            let tries = DATABASES.map(|host| {
                let (network, is_over) = (&network, &is_over);
                scope.spawn(move || first_connection(network, host, is_over))
            });
            let begin = Instant::now();
            let done = action(self).and_then(|()| {
                self.wait_until("somebody connects to each host", || {
                    Ok(tries.iter().all(|it| it.is_finished()))
                })
            });
            is_over.store(true, Ordering::Relaxed);
            done?;
            let ends = tries.map(|it| it.join().expect("trying to connect does not panic"));
            Ok((begin, ends))
        })?;
        println!(
            "From the command's start to the first connection from the {}:",
            client.name
        );
        for (host, at) in DATABASES.iter().zip(connected) {
            match at? {
                Some(at) => println!(
                    "  {}  {} ms",
                    host.name,
                    at.saturating_duration_since(begin).as_millis()
                ),
                None => self.expect(false, &format!("{} lets it in", host.name)),
            }
        }
        Ok(())
    }
}

fn first_connection(network: &Path, host: Host, is_over: &AtomicBool) -> Result<Option<Instant>> {
    let file = File::open(network).with_context(|| format!("open {}", network.display()))?;
    // Of this thread alone, which ends soon.
    setns(file, CloneFlags::CLONE_NEWNET).context("enter a network")?;
    let address = SocketAddr::new(host.addresses[0].parse().context("read an address")?, PORT);
    let begin = Instant::now();
    while !is_over.load(Ordering::Relaxed) && begin.elapsed() < PATIENCE {
        if TcpStream::connect_timeout(&address, TRY_TIME).is_ok() {
            return Ok(Some(Instant::now()));
        }
        // Refused at once, it would be tried without a pause.
        thread::sleep(Duration::from_millis(1));
    }
    Ok(None)
}
