//! Connects to the servers of shards.

use std::time::Duration;

use anyhow::Context;
use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::{AsyncConnectionConfig, Client, ClientTlsConfig, RedisError, TlsCertificates};
use shardlock::config::Config;
use shardlock::tool::{ServerUrl, why_not_connected};

use super::{ProbeError, ProbeErrorKind};

/// How to connect to servers.
#[derive(Debug)]
pub(crate) struct Connector<'a> {
    pub(crate) config: &'a Config,
    certificates: TlsCertificates,
}

impl<'a> Connector<'a> {
    /// # Errors
    ///
    /// If a TLS file can't be read.
    pub(crate) fn new(config: &'a Config) -> anyhow::Result<Self> {
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

    fn client(&self, server: &ServerUrl) -> Result<Client, ProbeError> {
        let client = if server.is_encrypted() {
            Client::build_with_tls(server.with_password(), self.certificates.clone())
        } else {
            Client::open(server.with_password())
        };
        // The client library's error may quote the URL, and with it the password.
        client.map_err(|_| ProbeError {
            kind: ProbeErrorKind::Tls,
            reason: "the client library rejects the URL or the files of tls_ca, tls_cert and tls_key".to_owned(),
        })
    }

    pub(crate) async fn connect(&self, server: &ServerUrl) -> Result<MultiplexedConnection, ProbeError> {
        let client = self.client(server)?;
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.timeout()))
            .set_response_timeout(Some(self.timeout()));
        match client.get_multiplexed_async_connection_with_config(&config).await {
            Ok(connection) => Ok(connection),
            Err(error) => Err(self.classify(&error, server).await),
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
