//! Whom we trust, and which certificate we show.

use std::fs;
use std::path::Path;

use rustls::RootCertStore;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use ureq::tls::{Certificate, ClientCert, PemItem, PrivateKey, RootCerts, TlsConfig, parse_pem};

use crate::config::{Config, ConfigError};

/// Reads the PEM files and checks what is in them: ureq would skip a broken authority and panic on a broken client key,
/// both only at the first request.
pub(crate) fn tls_config(config: &Config) -> Result<TlsConfig, ConfigError> {
    let mut builder = TlsConfig::builder();
    if let Some(path) = &config.ca_file {
        let authorities = certificates(path)?;
        let mut store = RootCertStore::empty();
        for authority in &authorities {
            store.add(CertificateDer::from(authority.der())).map_err(|error| {
                ConfigError::new(format!("file \"{}\" holds an invalid certificate: {error}", path.display()))
            })?;
        }
        builder = builder.root_certs(RootCerts::new_with_certs(&authorities));
    }
    match (&config.client_cert_file, &config.client_key_file) {
        (None, None) => {}
        (Some(cert), Some(key)) => builder = builder.client_cert(Some(client_cert(cert, key)?)),
        (Some(_), None) | (None, Some(_)) => {
            return Err(ConfigError::with_hint(
                "a client certificate needs both its certificate file and its key file",
                "Set es_sync.client_cert_file and es_sync.client_key_file.",
            ));
        }
    }
    Ok(builder.build())
}

fn client_cert(cert_path: &Path, key_path: &Path) -> Result<ClientCert, ConfigError> {
    let chain = certificates(cert_path)?;
    let pem = read(key_path)?;
    let no_key = || {
        ConfigError::with_hint(
            format!("file \"{}\" holds no private key", key_path.display()),
            "It must be PEM and not encrypted.",
        )
    };
    let der = PrivateKeyDer::from_pem_slice(&pem).map_err(|_| no_key())?;
    let unusable = |what: String| {
        ConfigError::new(format!("client key in file \"{}\" cannot be used: {what}", key_path.display()))
    };
    let signer =
        ring::default_provider().key_provider.load_private_key(der).map_err(|error| unusable(error.to_string()))?;
    let rustls_chain = chain.iter().map(|cert| CertificateDer::from(cert.der()).into_owned()).collect();
    match CertifiedKey::new(rustls_chain, signer).keys_match() {
        // Unknown: the key's kind does not tell its public half; the handshake will show.
        Ok(()) | Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::Unknown)) => {}
        Err(error) => return Err(unusable(error.to_string())),
    }
    let key = PrivateKey::from_pem(&pem).map_err(|_| no_key())?;
    Ok(ClientCert::new_with_certs(&chain, key))
}

fn read(path: &Path) -> Result<Vec<u8>, ConfigError> {
    fs::read(path).map_err(|error| ConfigError::new(format!("could not read file \"{}\": {error}", path.display())))
}

fn certificates(path: &Path) -> Result<Vec<Certificate<'static>>, ConfigError> {
    let mut found = Vec::new();
    for item in parse_pem(&read(path)?) {
        match item {
            Ok(PemItem::Certificate(certificate)) => found.push(certificate),
            Ok(_) => {}
            Err(_) => {
                return Err(ConfigError::new(format!("file \"{}\" is not valid PEM", path.display())));
            }
        }
    }
    if found.is_empty() {
        return Err(ConfigError::with_hint(
            format!("file \"{}\" holds no certificate", path.display()),
            "It must be PEM, with a line -----BEGIN CERTIFICATE-----.",
        ));
    }
    Ok(found)
}
