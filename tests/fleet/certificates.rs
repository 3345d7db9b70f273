//! Certificates for etcd and its clients.

use std::{
    fs,
    path::{Path, PathBuf},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair,
    date_time_ymd,
};

/// A certificate and its key.
#[derive(Clone, Debug)]
pub struct Pair {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    directory: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Validity {
    Now,
    Past,
}

impl Authority {
    pub fn new(directory: &Path, name: &str) -> Self {
        let directory = directory.join(name);
        fs::create_dir_all(&directory).unwrap();
        let key = KeyPair::generate().unwrap();
        let mut parameters = parameters(name, &[]);
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = parameters.self_signed(&key).unwrap();
        fs::write(directory.join("ca.pem"), certificate.pem()).unwrap();
        Self {
            issuer: Issuer::new(parameters, key),
            directory,
        }
    }

    pub fn file(&self) -> PathBuf {
        self.directory.join("ca.pem")
    }

    /// `user`: the common name. `names`: what a server is reached by.
    pub fn sign(&self, user: &str, names: &[&str], validity: Validity) -> Pair {
        let key = KeyPair::generate().unwrap();
        let mut parameters = parameters(user, names);
        if validity == Validity::Past {
            parameters.not_before = date_time_ymd(2020, 1, 1);
            parameters.not_after = date_time_ymd(2021, 1, 1);
        }
        let certificate = parameters.signed_by(&key, &self.issuer).unwrap();
        let path = |end: &str| self.directory.join(format!("{user}-{validity:?}.{end}"));
        let pair = Pair {
            certificate: path("pem"),
            key: path("key"),
        };
        fs::write(&pair.certificate, certificate.pem()).unwrap();
        fs::write(&pair.key, key.serialize_pem()).unwrap();
        pair
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

fn parameters(name: &str, names: &[&str]) -> CertificateParams {
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    let mut parameters = CertificateParams::new(names).unwrap();
    parameters.distinguished_name = DistinguishedName::new();
    parameters.distinguished_name.push(DnType::CommonName, name);
    parameters
}
