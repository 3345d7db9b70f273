//! Hosts as network namespaces, and the network between them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use super::{Demo, make_directory};
use crate::run;

/// The namespace that is the network between the hosts.
const NETWORK: &str = "net";

#[derive(Clone, Copy)]
pub struct Host {
    pub name: &'static str,
    pub addresses: &'static [&'static str],
}

impl Demo {
    pub fn connect_hosts(&self, hosts: &[Host]) -> Result<()> {
        let network = self.namespace(NETWORK);
        self.ip(&format!("netns add {network}"))?;
        self.ip(&format!("-n {network} link add bridge up type bridge"))?;
        for host in hosts {
            make_directory(&self.home(host.name))?;
            let (port, namespace) = (host.name, self.namespace(host.name));
            self.ip(&format!("netns add {namespace}"))?;
            self.ip(&format!(
                "-n {network} link add {port} type veth peer name eth0 netns {namespace}"
            ))?;
            self.ip(&format!("-n {network} link set {port} master bridge up"))?;
            for address in host.addresses {
                let prefix = match address.contains(':') {
                    true => format!("{address}/128 dev eth0 nodad"),
                    false => format!("{address}/32 dev eth0"),
                };
                self.ip(&format!("-n {namespace} address add {prefix}"))?;
            }
            // By the loopback interface a host reaches itself.
            self.ip(&format!("-n {namespace} link set lo up"))?;
            self.ip(&format!("-n {namespace} link set eth0 up"))?;
            // Any address is a neighbour on this network, so that none needs a router.
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

    pub fn namespace(&self, host: &str) -> String {
        format!("{}-{host}", self.id)
    }

    /// The directory of a host's files.
    pub fn home(&self, host: &str) -> PathBuf {
        self.directory.join(host)
    }

    /// A program in a host's network. `ip netns exec` would hide the mounts below /sys, and forced TLS needs cgroup2.
    pub fn inside(&self, host: &str, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.network_file(host).display()));
        command.arg("--").arg(program);
        command
    }

    pub fn network_file(&self, host: &str) -> PathBuf {
        Path::new("/run/netns").join(self.namespace(host))
    }
}
