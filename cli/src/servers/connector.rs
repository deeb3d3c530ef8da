//! Connects to the servers of shards.

use std::time::Duration;

use anyhow::Context;
use deadpool_redis::redis::{Client, ClientTlsConfig, RedisError, TlsCertificates};
use deadpool_redis::{Connection, Pool, PoolError};
use shardlock::config::Config;
use shardlock::tool::{ServerUrl, why_not_connected};

use super::pools::{ServerPools, pool};
use super::{ProbeError, ProbeErrorKind};

/// How many connections are opened to a server at most.
const CONNECTIONS_MAX: usize = 4;

/// How to connect to servers.
#[derive(Debug)]
pub(crate) struct Connector<'a> {
    pub(crate) config: &'a Config,
    certificates: TlsCertificates,
    pools: ServerPools,
}

impl<'a> Connector<'a> {
    /// # Errors
    ///
    /// If a TLS file can't be read.
    pub(crate) fn new(config: &'a Config) -> anyhow::Result<Self> {
        Self::with_pools(config, ServerPools::default())
    }

    /// The same with connections that an earlier connector may have opened.
    ///
    /// # Errors
    ///
    /// If a TLS file can't be read.
    pub(crate) fn with_pools(config: &'a Config, pools: ServerPools) -> anyhow::Result<Self> {
        let read = |setting: &str, path: &Option<std::path::PathBuf>| match path {
            None => Ok(None),
            Some(path) => std::fs::read(path)
                .map(Some)
                .with_context(|| format!("{setting} is {}, which can't be read", path.display())),
        };
        let client_tls = match (read("tls_cert", &config.tls_cert)?, read("tls_key", &config.tls_key)?) {
            (Some(client_cert), Some(client_key)) => Some(ClientTlsConfig {
                client_cert,
                client_key,
            }),
            _ => None,
        };
        let root_cert = read("tls_ca", &config.tls_ca)?;
        if rustls::crypto::CryptoProvider::get_default().is_none() {
            // Another thread may have installed one in the meantime; that one is kept.
            rustls::crypto::ring::default_provider().install_default().ok();
        }
        Ok(Self {
            config,
            certificates: TlsCertificates { client_tls, root_cert },
            pools,
        })
    }

    pub(crate) fn timeout(&self) -> Duration {
        self.config.store_timeout
    }

    /// The contents of `tls_ca`.
    #[cfg(feature = "etcd")]
    pub(crate) fn authorities(&self) -> Option<&[u8]> {
        self.certificates.root_cert.as_deref()
    }

    /// The contents of `tls_cert` and `tls_key`.
    #[cfg(feature = "etcd")]
    pub(crate) fn identity(&self) -> Option<(&[u8], &[u8])> {
        let client = self.certificates.client_tls.as_ref()?;
        Some((&client.client_cert, &client.client_key))
    }

    /// The pool of a server. Sends nothing yet.
    pub(crate) fn pool(&self, server: &ServerUrl) -> Result<Pool, ProbeError> {
        let url = server.with_password();
        self.pools.get_or_create(url, || {
            let client = if server.is_encrypted() {
                Client::build_with_tls(url, self.certificates.clone())
            } else {
                Client::open(url)
            };
            let info = client.map(|client| client.get_connection_info().clone());
            let pool = info
                .map_err(anyhow::Error::from)
                .and_then(|info| pool(info, CONNECTIONS_MAX, self.timeout()));
            // The client library's error may quote the URL, and with it the password.
            pool.map_err(|_| ProbeError {
                kind: ProbeErrorKind::Tls,
                reason: "the client library rejects the URL or the files of tls_ca, tls_cert and tls_key".to_owned(),
            })
        })
    }

    /// A connection that has just answered. It returns to the server's pool when it is dropped.
    pub(crate) async fn connect(&self, server: &ServerUrl) -> Result<Connection, ProbeError> {
        match self.pool(server)?.get().await {
            Ok(connection) => Ok(connection),
            Err(PoolError::Backend(error)) => Err(self.classify(&error, server).await),
            // All connections are in use.
            Err(error) => Err(ProbeError {
                kind: ProbeErrorKind::Timeout,
                reason: error.to_string(),
            }),
        }
    }

    /// Classifies an error from connecting to this server. If the error is too vague, the server is
    /// probed for the reason.
    pub(crate) async fn classify(&self, error: &RedisError, server: &ServerUrl) -> ProbeError {
        let mut classified = ProbeError::classify(error, server);
        if matches!(
            classified.kind,
            ProbeErrorKind::Unreachable | ProbeErrorKind::UnexpectedReply
        ) {
            classified.reason = why_not_connected(server, error, self.timeout()).await;
        }
        classified
    }
}
