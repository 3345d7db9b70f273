//! Certificates for etcd and its clients.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::servers::Ca;
pub use crate::servers::Certificate as Kind;

/// A certificate and its key.
#[derive(Clone, Debug)]
pub struct Pair {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

pub struct Authority(Ca);

impl Authority {
    pub fn new(directory: &Path, name: &str) -> Self {
        Self(Ca::named(directory, name))
    }

    /// One whose own certificate has expired.
    pub fn expired(directory: &Path, name: &str) -> Self {
        Self(Ca::expired(directory, name))
    }

    pub fn file(&self) -> PathBuf {
        self.0.file()
    }

    /// `user`: the common name. `names`: what a server is reached by.
    pub fn sign(&self, user: &str, names: &[&str], kind: Kind) -> Pair {
        let (certificate, key) = self.0.certificate_of(user, names, kind);
        Pair { certificate, key }
    }
}

impl Pair {
    /// Takes the place of another, as tools that renew certificates do it.
    pub fn replace(&self, other: &Self) {
        for (from, to) in [
            (&self.certificate, &other.certificate),
            (&self.key, &other.key),
        ] {
            let next = to.with_extension("next");
            fs::copy(from, &next).unwrap();
            fs::rename(next, to).unwrap();
        }
    }
}
