//! Connection options for etcd: the login, the timeouts, the files for TLS.

use std::time::Duration;

use etcd_client::ConnectOptions;

use crate::error::LockError;
use crate::store::TlsFiles;

/// How often a silent server is pinged: as often as etcd permits by default.
const PING_EVERY: Duration = Duration::from_secs(5);
/// How long a server may take to answer a ping.
const PING_TIMEOUT: Duration = Duration::from_secs(2);

pub(super) fn connect_options(
    login: Option<&(String, String)>,
    tls: bool,
    files: &TlsFiles,
    timeout: Duration,
) -> Result<ConnectOptions, LockError> {
    let mut options = ConnectOptions::new()
        .with_connect_timeout(timeout)
        .with_keep_alive(PING_EVERY, PING_TIMEOUT)
        // A server that is cut off from the others reports that at once.
        .with_require_leader(true)
        .with_auto_token_refresh(true);
    if let Some((user, password)) = login {
        options = options.with_user(user, password);
    }
    if tls { with_tls(options, files) } else { Ok(options) }
}

#[cfg(feature = "tls")]
fn with_tls(options: ConnectOptions, files: &TlsFiles) -> Result<ConnectOptions, LockError> {
    use etcd_client::{Certificate, Identity, TlsOptions};

    use crate::store::tls::TlsPem;

    let TlsPem { ca, client } = TlsPem::read(files)?;
    let mut tls = match ca {
        Some(ca) => TlsOptions::new().ca_certificate(Certificate::from_pem(ca)),
        None => TlsOptions::new().with_enabled_roots(),
    };
    if let Some(client) = client {
        tls = tls.identity(Identity::from_pem(client.certificate, client.key));
    }
    Ok(options.with_tls(tls))
}

/// Such a URL was already rejected when it was parsed.
#[cfg(not(feature = "tls"))]
fn with_tls(options: ConnectOptions, _files: &TlsFiles) -> Result<ConnectOptions, LockError> {
    Ok(options)
}
