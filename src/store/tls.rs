//! The files for TLS connections, and advice for handshakes that fail.
//!
//! Every kind of store reads its certificates here. So a missing or unusable file gives the same
//! error everywhere, before anything is sent. The contents of the files are never shown.

use std::fmt;
use std::io;
use std::path::Path;

use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use rustls::{AlertDescription, CertificateError, ClientConfig, InvalidMessage, RootCertStore};

use super::{NOT_ENCRYPTED, TlsFiles};
use crate::error::InvalidSetting;

/// The contents of [`TlsFiles`], already validated. `Debug` hides them.
#[derive(Clone, Default)]
pub(in crate::store) struct TlsPem {
    /// The CA certificates to trust; those of the system if `None`.
    pub(in crate::store) ca: Option<Vec<u8>>,
    pub(in crate::store) client: Option<ClientPem>,
}

/// The client certificate and its private key.
#[derive(Clone)]
pub(in crate::store) struct ClientPem {
    pub(in crate::store) certificate: Vec<u8>,
    pub(in crate::store) key: Vec<u8>,
}

impl fmt::Debug for TlsPem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsPem")
            .field("ca", &self.ca.is_some())
            .field("client", &self.client.is_some())
            .finish()
    }
}

impl TlsPem {
    /// Reads and validates the files. Also installs a crypto provider if the application has none.
    ///
    /// # Errors
    ///
    /// A file can't be read or used. The error names the setting and the reason.
    pub(in crate::store) fn read(files: &TlsFiles) -> Result<Self, InvalidSetting> {
        install_provider();
        let ca = files.ca.as_deref().map(read_authorities).transpose()?;
        let client = match &files.client {
            Some((certificate, key)) => Some(read_client(certificate, key)?),
            None => None,
        };
        Ok(Self { ca, client })
    }

    /// The configuration for a connection.
    ///
    /// # Errors
    ///
    /// The system's certificates can't be read, if they are needed.
    pub(in crate::store) fn client_config(&self) -> io::Result<ClientConfig> {
        let mut roots = RootCertStore::empty();
        match &self.ca {
            Some(pem) => {
                for certificate in CertificateDer::pem_slice_iter(pem) {
                    roots
                        .add(certificate.map_err(io::Error::other)?)
                        .map_err(io::Error::other)?;
                }
            }
            None => {
                let mut found = rustls_native_certs::load_native_certs();
                if let Some(error) = found.errors.pop() {
                    return Err(io::Error::other(error));
                }
                for certificate in found.certs {
                    roots.add(certificate).map_err(io::Error::other)?;
                }
            }
        }
        let config = ClientConfig::builder().with_root_certificates(roots);
        let Some(client) = &self.client else {
            return Ok(config.with_no_client_auth());
        };
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&client.certificate).collect();
        let key = PrivateKeyDer::from_pem_slice(&client.key).map_err(io::Error::other)?;
        config
            .with_client_auth_cert(chain.map_err(io::Error::other)?, key)
            .map_err(io::Error::other)
    }
}

/// rustls panics if several crypto providers are linked and the application has chosen none. Ours
/// is only chosen if the application has not chosen one.
fn install_provider() {
    if CryptoProvider::get_default().is_none() {
        // If the application chooses one at this very moment, that one stays.
        ring::default_provider().install_default().ok();
    }
}

fn read_file(setting: &'static str, path: &Path, bound: &str) -> Result<Vec<u8>, InvalidSetting> {
    std::fs::read(path)
        .map_err(|error| InvalidSetting::new(setting, path.display().to_string(), format!("{bound} ({error})")))
}

const AUTHORITIES: &str = "a readable PEM file with the CA certificates that sign the servers' certificates";
const CERTIFICATE: &str =
    "a readable PEM file with the client certificate, followed by the certificates that lead to its authority";
const KEY: &str = "a readable PEM file with the unencrypted private key of tls_cert";

fn certificates(
    setting: &'static str,
    path: &Path,
    pem: &[u8],
    bound: &str,
) -> Result<Vec<CertificateDer<'static>>, InvalidSetting> {
    let unfit = |why: String| InvalidSetting::new(setting, path.display().to_string(), format!("{bound} ({why})"));
    let found = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|_| unfit("the file is damaged".to_owned()))?;
    if found.is_empty() {
        return Err(unfit("the file contains no `BEGIN CERTIFICATE`".to_owned()));
    }
    Ok(found)
}

fn read_authorities(path: &Path) -> Result<Vec<u8>, InvalidSetting> {
    let pem = read_file("tls_ca", path, AUTHORITIES)?;
    let mut store = RootCertStore::empty();
    for certificate in certificates("tls_ca", path, &pem, AUTHORITIES)? {
        store.add(certificate).map_err(|error| {
            InvalidSetting::new("tls_ca", path.display().to_string(), format!("{AUTHORITIES} ({error})"))
        })?;
    }
    Ok(pem)
}

fn read_client(certificate_path: &Path, key_path: &Path) -> Result<ClientPem, InvalidSetting> {
    let certificate = read_file("tls_cert", certificate_path, CERTIFICATE)?;
    let chain = certificates("tls_cert", certificate_path, &certificate, CERTIFICATE)?;
    let key = read_file("tls_key", key_path, KEY)?;
    // The parser's errors are left out, since they may quote the file.
    let unfit = |why: &str| InvalidSetting::new("tls_key", key_path.display().to_string(), format!("{KEY} ({why})"));
    let parsed =
        PrivateKeyDer::from_pem_slice(&key).map_err(|_| unfit("the file contains no private key that can be read"))?;
    CertifiedKey::from_der(chain, parsed, &ring::default_provider()).map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => unfit(&format!(
            "the key does not belong to the certificate in {}",
            certificate_path.display()
        )),
        rustls::Error::InvalidCertificate(_) => InvalidSetting::new(
            "tls_cert",
            certificate_path.display().to_string(),
            format!("{CERTIFICATE} (its first certificate can't be read)"),
        ),
        _ => unfit("this kind of key is not supported; use an RSA, ECDSA or Ed25519 key"),
    })?;
    Ok(ClientPem { certificate, key })
}

const NOT_ACCEPTABLE: &str =
    "the server's certificate is not acceptable; replace it on the server, or set tls_ca to its authority";
const SELF_SIGNED_AUTHORITY: &str = "the server presents a CA certificate (CA:TRUE, the default of `openssl req -x509`) as its own; create it again with \
     `-addext basicConstraints=critical,CA:FALSE` and keep tls_ca set to it, or have the authority sign one for the server";
const VERSION_1: &str = "the server's certificate is X.509 version 1; create it again with extensions, which need version 3: `openssl x509 -req ... -extfile FILE` \
     where FILE contains `subjectAltName=DNS:` and the host of the URL";

/// Advice for a handshake that failed; `None` if the failure may be temporary.
pub(in crate::store) fn advice(error: &rustls::Error) -> Option<&'static str> {
    use rustls::Error;
    Some(match error {
        Error::InvalidCertificate(error) => match error {
            CertificateError::UnknownIssuer => {
                "the server's certificate is signed by an authority that is not trusted; set tls_ca to the PEM file of that authority"
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                "the server's certificate is for another host; use a host name in the URL that the certificate contains, or give the \
                 server a certificate for this one"
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                "the server's certificate has expired; renew it, or correct this machine's clock"
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "the server's certificate is not valid yet; correct this machine's clock, or wait"
            }
            CertificateError::Other(error) => match error.0.to_string().as_str() {
                "CaUsedAsEndEntity" => SELF_SIGNED_AUTHORITY,
                "UnsupportedCertVersion" => VERSION_1,
                _ => NOT_ACCEPTABLE,
            },
            _ => NOT_ACCEPTABLE,
        },
        Error::AlertReceived(AlertDescription::CertificateRequired) => {
            "the server requires a client certificate; set tls_cert and tls_key"
        }
        Error::AlertReceived(AlertDescription::UnknownCA) => {
            "the server does not trust the authority of our certificate; set tls_cert to one whose authority it trusts"
        }
        Error::AlertReceived(
            AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::AccessDenied
            | AlertDescription::DecryptError,
        ) => "the server does not accept our certificate; check tls_cert",
        Error::AlertReceived(AlertDescription::CertificateExpired | AlertDescription::CertificateRevoked) => {
            "the server reports that our certificate has expired or was revoked; renew the one in tls_cert"
        }
        Error::AlertReceived(AlertDescription::HandshakeFailure) => {
            "the server refused the handshake; if it requires a client certificate, set tls_cert and tls_key"
        }
        Error::AlertReceived(AlertDescription::ProtocolVersion) | Error::PeerIncompatible(_) => {
            "client and server have no TLS version in common; allow TLS 1.2 or 1.3 on the server"
        }
        Error::InvalidMessage(InvalidMessage::InvalidContentType | InvalidMessage::MessageTooLarge) => NOT_ENCRYPTED,
        _ => return None,
    })
}

/// Finds the rustls error in an I/O error, however deep it is wrapped.
pub(in crate::store) fn cause<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        // The client library shares it in an `Arc`.
        if let Some(shared) = error.downcast_ref::<std::sync::Arc<dyn std::error::Error + Send + Sync>>() {
            return cause(&**shared);
        }
        if let Some(error) = error.downcast_ref::<rustls::Error>() {
            return Some(error);
        }
        next = match error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustls::client::WebPkiServerVerifier;
    use rustls::client::danger::ServerCertVerifier;
    use rustls::pki_types::{ServerName, UnixTime};

    use super::*;

    /// Self-signed, X.509 version 1, as `openssl x509 -req -signkey` makes it without extensions;
    /// valid until 2126.
    const OF_VERSION_1: &str = "\
-----BEGIN CERTIFICATE-----\n\
MIIBJTCBywIUGzzC2sqB1AhV5vrwrFiHs/pzaTUwCgYIKoZIzj0EAwIwFDESMBAG\n\
A1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyOTEwMDQyN1oYDzIxMjYxMTA1MTAwNDI3\n\
WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNC\n\
AASPDVfrAfRFhIsuF5eKrwbDwKs7q45oO5auXk/RhxQ3p7VY3WdNv7bMVeX+1Oj6\n\
LnOZOt8ZZhTBBPXCVoPLUPH6MAoGCCqGSM49BAMCA0kAMEYCIQDLgqUyS2ZIq/5p\n\
NRx1Zzen/vAPbb1f9e6Uq1X45e4UMQIhAPUnmcGbLK9vKiEvaj+WvH4txKQEzz12\n\
2GByvWqNr5+E\n\
-----END CERTIFICATE-----";

    #[test]
    fn certificate_of_version_1_is_refused_with_advice_that_names_the_version() {
        install_provider();
        let certificate = CertificateDer::from_pem_slice(OF_VERSION_1.as_bytes()).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(certificate.clone()).unwrap();
        let verifier = WebPkiServerVerifier::builder(Arc::new(roots)).build().unwrap();
        let host = ServerName::try_from("localhost").unwrap();
        let error = verifier
            .verify_server_cert(&certificate, &[], &host, &[], UnixTime::now())
            .unwrap_err();
        assert_eq!(advice(&error), Some(VERSION_1), "{error:?}");
    }
}
