//! Rules from an etcd outside of the machine. The connection is without TLS, which the tests of the fleet have.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use super::machine::wait_for;
use super::outside::{ALLOWED, inside};
use crate::output;

/// Its data outlasts it. Killed when dropped.
pub struct Etcd(Child);

impl Etcd {
    /// `folder`: where its data is.
    pub fn start(folder: &Path, is_new: bool) -> Result<Self> {
        let data = folder.join("etcd");
        if is_new && data.exists() {
            fs::remove_dir_all(&data).with_context(|| format!("remove {}", data.display()))?;
        }
        let endpoint = endpoint();
        let etcd = inside("etcd")
            .args(["--log-level", "warn", "--data-dir"])
            .arg(&data)
            .args(["--listen-client-urls", &endpoint])
            .args(["--advertise-client-urls", &endpoint])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(folder.join("etcd.log")).context("create the log of etcd")?)
            .spawn()
            .context("start etcd")?;
        let etcd = Self(etcd);
        let is_healthy = || {
            let mut health = etcdctl(&["endpoint", "health"]);
            // It prints there also that etcd is healthy.
            output(health.stderr(Stdio::null())).ok()
        };
        wait_for(is_healthy).context("wait for etcd")?;
        Ok(etcd)
    }

    /// Writes the document of `orders`.
    pub fn put(&self, document: &str) -> Result<()> {
        let key = "/filter-agent/v1/rules/orders";
        let written = output(&mut etcdctl(&["put", key, document]))?;
        ensure!(written.trim() == "OK", "etcdctl says: {written}");
        Ok(())
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn endpoint() -> String {
    format!("http://{ALLOWED}:2379")
}

fn etcdctl(arguments: &[&str]) -> Command {
    let mut etcdctl = inside("etcdctl");
    etcdctl.env("ETCDCTL_API", "3");
    etcdctl.args(["--endpoints", &endpoint()]).args(arguments);
    etcdctl
}
