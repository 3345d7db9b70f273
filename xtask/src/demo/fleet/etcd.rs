//! etcd with TLS, and certificates as users with rights: as docs/fleet.md sets it up.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context as _, Result, bail};

use super::{DATABASES, ETCD, KIM};
use crate::command_line;
use crate::demo::Demo;
use crate::demo::network::Host;

/// Has all rights in etcd; only the set-up uses it.
const ROOT: &str = "root";

impl Demo {
    /// An authority, and a certificate of it for each server and each user of etcd.
    pub fn make_certificates(&self) -> Result<()> {
        let mut authority = self.openssl("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256");
        authority.args("-noenc -days 2 -subj /CN=fleet -keyout ca.key -out ca.pem".split(' '));
        self.quietly(&mut authority)?;
        let user = "extendedKeyUsage=clientAuth".to_owned();
        for name in [ROOT, KIM.name] {
            self.sign(name, &user)?;
        }
        for Host { name, addresses } in DATABASES.into_iter().chain([ETCD]) {
            let address = addresses[0];
            // The user of etcd that the agent is, and PostgreSQL's and etcd's own.
            let usage = "extendedKeyUsage=serverAuth,clientAuth";
            self.sign(name, &format!("subjectAltName=IP:{address}\n{usage}"))?;
        }
        Ok(())
    }

    fn sign(&self, name: &str, extensions: &str) -> Result<()> {
        self.stop_if_interrupted()?;
        let file = self.directory.join(format!("{name}.ext"));
        fs::write(&file, extensions).with_context(|| format!("write {}", file.display()))?;
        let mut request = self.openssl("req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc");
        let options = format!("-subj /CN={name} -keyout {name}.key -out {name}.csr");
        self.quietly(request.args(options.split(' ')))?;
        let mut sign = self.openssl("x509 -req -CA ca.pem -CAkey ca.key -CAcreateserial -days 2");
        let options = format!("-in {name}.csr -extfile {name}.ext -out {name}.pem");
        self.quietly(sign.args(options.split(' ')))
    }

    fn openssl(&self, arguments: &str) -> Command {
        let mut command = Command::new("openssl");
        command
            .args(arguments.split(' '))
            .current_dir(&self.directory);
        command
    }

    pub fn certificate(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.pem"))
    }

    pub fn key(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.key"))
    }

    /// Starts etcd, also with the data that an earlier one left.
    pub fn start_etcd(&mut self) -> Result<usize> {
        let [client, peer] =
            [2379, 2380].map(|port| format!("https://{}:{port}", ETCD.addresses[0]));
        let mut etcd = self.inside(ETCD.name, Path::new("etcd"));
        etcd.current_dir(&self.directory)
            .arg("--data-dir")
            .arg(self.home(ETCD.name).join("data"))
            .args(["--name", "m1", "--initial-cluster-token", "fleet-1"])
            .args(["--listen-client-urls", &client])
            .args(["--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer])
            .args(["--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("m1={peer}")]);
        for prefix in ["", "peer-"] {
            etcd.arg(format!("--{prefix}client-cert-auth"))
                .args([&format!("--{prefix}trusted-ca-file"), "ca.pem"])
                .args([&format!("--{prefix}cert-file"), "etcd.pem"])
                .args([&format!("--{prefix}key-file"), "etcd.key"]);
        }
        self.start(etcd, "etcd.log", "ready to serve client requests")
    }

    /// Users, roles and rights, and that they count from now on.
    pub fn grant_rights(&self) -> Result<()> {
        let prefix = "/filter-agent/v1";
        let mut commands = vec![
            "user add root --no-password".to_owned(),
            "user grant-role root root".into(),
            "role add operator".into(),
            format!("role grant-permission operator --prefix=true readwrite {prefix}/"),
            "user add kim --no-password".into(),
            "user grant-role kim operator".into(),
            "role add reads-orders".into(),
            format!("role grant-permission reads-orders read {prefix}/era"),
            format!("role grant-permission reads-orders read {prefix}/rules/orders"),
        ];
        for host in DATABASES.map(|host| host.name) {
            commands.push(format!("role add host-{host}"));
            for key in ["hosts", "alive"] {
                let key = format!("{prefix}/{key}/{host}");
                commands.push(format!("role grant-permission host-{host} readwrite {key}"));
            }
            commands.push(format!("user add {host} --no-password"));
            commands.push(format!("user grant-role {host} reads-orders"));
            commands.push(format!("user grant-role {host} host-{host}"));
        }
        commands.push("auth enable".into());
        for command in commands {
            self.stop_if_interrupted()?;
            let mut etcdctl = self.etcdctl(ETCD.name, ROOT);
            self.quietly(etcdctl.args(command.split(' ')))?;
        }
        Ok(())
    }

    /// Runs a command that prints only if it fails.
    fn quietly(&self, command: &mut Command) -> Result<()> {
        let Output {
            status,
            stdout,
            stderr,
        } = self.finish(command)?;
        if !status.success() {
            let said = [stdout, stderr].concat();
            let said = String::from_utf8_lossy(&said);
            bail!(
                "`{}` failed: {status}: {}",
                command_line(command),
                said.trim()
            );
        }
        Ok(())
    }

    /// `etcdctl` as a user of etcd, on a host.
    pub fn etcdctl(&self, host: &str, user: &str) -> Command {
        let mut command = self.inside(host, Path::new("etcdctl"));
        command
            .env("ETCDCTL_API", "3")
            .env("ETCDCTL_CACERT", self.certificate("ca"))
            .env("ETCDCTL_CERT", self.certificate(user))
            .env("ETCDCTL_KEY", self.key(user))
            .env(
                "ETCDCTL_ENDPOINTS",
                format!("https://{}:2379", ETCD.addresses[0]),
            )
            // A busy machine is slow to answer.
            .env("ETCDCTL_COMMAND_TIMEOUT", "60s");
        command
    }

    /// Writes the document of `orders` around `filter-agent fleet`.
    pub fn put_with_etcdctl(&mut self, document: &str) -> Result<()> {
        let file = self.home(KIM.name).join("etcdctl.yaml");
        fs::write(&file, document).with_context(|| format!("write {}", file.display()))?;
        let mut put = self.etcdctl(KIM.name, KIM.name);
        put.args(["put", "/filter-agent/v1/rules/orders"])
            .stdin(File::open(&file).with_context(|| format!("open {}", file.display()))?);
        let line = format!("echo '{document}' | etcdctl put /filter-agent/v1/rules/orders");
        self.show(KIM.name, &line, &mut put, 0).map(drop)
    }
}

/// Such as `3.4.23`.
pub fn version() -> Result<String> {
    let output = crate::output(Command::new("etcd").arg("--version"))?;
    let version = output
        .lines()
        .next()
        .and_then(|line| line.split(' ').next_back());
    Ok(version.context("read the version of etcd")?.to_owned())
}
