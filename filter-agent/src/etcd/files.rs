//! The certificates and the key of a connection: read anew for each one, and looked at while it lasts.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use etcd_client::{Certificate, Identity, TlsOptions};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use tokio::time::sleep;

use crate::{fleet::Settings, threads, whole_file};

/// Longest file, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Time allowed to read one, or to look at them.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// Interval of looks at the files. Not inotify: it says nothing about network file systems, and has a limit for each user.
const LOOK_INTERVAL: Duration = Duration::from_secs(3);

/// A change is followed by a new connection after a random time up to this: many hosts get new files at once, and who
/// writes a certificate is about to write its key.
const LONGEST_DELAY: Duration = Duration::from_secs(5);

/// The files of a connection, as they were read.
pub struct Files {
    tls: Option<TlsOptions>,
    /// Looked at before they were read, so that no change in between is missed.
    before: Vec<(PathBuf, Option<State>)>,
}

/// Tells two contents of a file apart, or two files.
type State = (u64, u64, u64, Option<SystemTime>);

impl Files {
    /// # Errors
    /// A file cannot be read, or holds something else.
    pub async fn read(settings: &Settings) -> Result<Self> {
        let files = [&settings.ca_file, &settings.cert_file, &settings.key_file];
        let paths: Vec<PathBuf> = files.into_iter().flatten().cloned().collect();
        let has_files = !paths.is_empty();
        let before = states(paths).await?;
        let mut tls = TlsOptions::new();
        if let Some(file) = &settings.ca_file {
            let text = read(file, has_certificate).await?;
            tls = tls.ca_certificate(Certificate::from_pem(text));
        }
        if let (Some(certificate), Some(key)) = (&settings.cert_file, &settings.key_file) {
            let certificate = read(certificate, has_certificate).await?;
            let key = read(key, has_key).await?;
            tls = tls.identity(Identity::from_pem(certificate, key));
        }
        Ok(Self {
            tls: has_files.then_some(tls),
            before,
        })
    }

    /// `None`: no file is named, and the endpoints speak no TLS.
    pub fn tls(&self) -> Option<TlsOptions> {
        self.tls.clone()
    }

    /// Waits until another connection should be made from other files. Where they cannot be looked at, the connection
    /// that there is serves better than one that cannot be made.
    pub async fn changed(&self) {
        let paths: Vec<PathBuf> = self.before.iter().map(|(path, _)| path.clone()).collect();
        if paths.is_empty() {
            return std::future::pending().await;
        }
        loop {
            sleep(LOOK_INTERVAL).await;
            let now = states(paths.clone()).await.unwrap_or_default();
            let is_new = |((_, before), (_, now)): (&(_, Option<State>), &(_, Option<State>))| {
                now.is_some() && before != now
            };
            if self.before.iter().zip(&now).any(is_new) {
                return sleep(LONGEST_DELAY.mul_f64(fastrand::f64())).await;
            }
        }
    }
}

async fn states(paths: Vec<PathBuf>) -> Result<Vec<(PathBuf, Option<State>)>> {
    let Some(first) = paths.first().cloned() else {
        return Ok(Vec::new());
    };
    let state = |path: PathBuf| {
        let metadata = fs::metadata(&path).ok();
        let state = metadata.map(|it| (it.dev(), it.ino(), it.len(), it.modified().ok()));
        (path, state)
    };
    let job = move || Ok(paths.into_iter().map(state).collect());
    let what = "look at the certificates";
    threads::run_within(&threads::LOOK_UPS, READ_TIMEOUT, what, &first, job).await
}

async fn read(path: &Path, check: fn(&[u8]) -> Result<()>) -> Result<Vec<u8>> {
    let what = format!("read {}", path.display());
    let file = path.to_owned();
    let job = move || {
        let mut file = whole_file::open(&file)?;
        let before = file.metadata()?;
        let content = whole_file::read(&mut file, &before, MAX_FILE)?;
        check(&content)?;
        Ok(content)
    };
    let content = threads::run_within(&threads::LOOK_UPS, READ_TIMEOUT, &what, path, job).await;
    content.context(what)
}

fn has_certificate(pem: &[u8]) -> Result<()> {
    let mut count = 0;
    for certificate in CertificateDer::pem_slice_iter(pem) {
        certificate.context("it is not a PEM file of certificates")?;
        count += 1;
    }
    ensure!(count > 0, "it holds no certificate");
    Ok(())
}

fn has_key(pem: &[u8]) -> Result<()> {
    // The error quotes nothing of it.
    let key = PrivateKeyDer::from_pem_slice(pem);
    ensure!(key.is_ok(), "it holds no private key in PEM");
    Ok(())
}
