//! TLS to name servers and publishers of lists.

use std::{path::Path, sync::Arc};

use anyhow::{Context as _, Result, ensure};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject as _},
};

use crate::threads;

/// Reads the trusted certificates, a file's or the system's, and sets up TLS with them.
///
/// # Errors
/// They cannot be read, or there are none.
pub(super) async fn client(ca_file: Option<&Path>) -> Result<ClientConfig> {
    let place = ca_file.unwrap_or(Path::new("/etc/ssl/certs"));
    let file = ca_file.map(Path::to_owned);
    threads::run(&threads::LOOK_UPS, place, move || {
        config(roots(file.as_deref())?)
    })
    .await
}

/// Sets up TLS that trusts no certificate, where none is needed.
pub(super) fn none() -> Result<ClientConfig> {
    config(RootCertStore::empty())
}

/// Replaces what rustls writes for its own users: errors of look-ups quote it.
pub(super) fn plain(error: &str) -> String {
    let written = [
        (
            "invalid peer certificate: Other(OtherError(CaUsedAsEndEntity))",
            "the server shows the certificate of an authority as its own: it needs one that the authority signed",
        ),
        (
            "peer closed connection without sending TLS close_notify: \
             https://docs.rs/rustls/latest/rustls/manual/_03_howto/index.html#unexpected-eof",
            "it was cut off: the server closed the connection without saying that this is all (TLS close_notify)",
        ),
    ];
    let replaced = |text: String, (written, plain): (&str, &str)| text.replace(written, plain);
    written.into_iter().fold(error.to_owned(), replaced)
}

fn config(roots: RootCertStore) -> Result<ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context("set up TLS")?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

fn roots(file: Option<&Path>) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    match file {
        Some(file) => {
            let named = || format!("read certificates from {}", file.display());
            for certificate in CertificateDer::pem_file_iter(file).with_context(named)? {
                let added = roots.add(certificate.with_context(named)?);
                added.with_context(named)?;
            }
            ensure!(!roots.is_empty(), "{} holds no certificate", file.display());
        }
        None => {
            let found = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(found.certs);
            ensure!(
                !roots.is_empty(),
                "this system has no certificates to check a server's with: install \
                 ca-certificates, or set `ca_file`"
            );
        }
    }
    Ok(roots)
}

#[cfg(test)]
mod tests {
    use rustls::{CertificateError, Error, OtherError};

    use super::*;

    #[test]
    fn errors_of_tls_are_words() {
        // As webpki returns it.
        #[derive(Debug)]
        struct CaUsedAsEndEntity;
        impl std::fmt::Display for CaUsedAsEndEntity {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("CaUsedAsEndEntity")
            }
        }
        impl std::error::Error for CaUsedAsEndEntity {}
        let error = OtherError(Arc::new(CaUsedAsEndEntity));
        let error = Error::InvalidCertificate(CertificateError::Other(error));
        let text = plain(&format!("error sending request: {error}"));
        assert!(
            text.starts_with("error sending request: the server shows"),
            "{text}"
        );
        let text = plain(
            "a: peer closed connection without sending TLS close_notify: https://docs.rs/rustls/latest/rustls/manual/_03_howto/index.html#unexpected-eof",
        );
        assert!(
            text.starts_with("a: it was cut off: ") && !text.contains("docs.rs"),
            "{text}"
        );
    }
}
