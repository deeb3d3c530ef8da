//! From a URL to what the client library takes: where, who, and with which certificates.

use std::future::Future;
use std::time::Duration;

use deadpool_redis::redis::io::tcp::TcpSettings;
#[cfg(feature = "tls")]
use deadpool_redis::redis::{Client, ClientTlsConfig, TlsCertificates};
use deadpool_redis::redis::{ConnectionAddr, ConnectionInfo, IntoConnectionInfo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::endpoint::ServerUrl;
use crate::error::Invalid;
#[cfg(feature = "tls")]
use crate::store::tls::TlsPem;
use crate::store::{NOT_ENCRYPTED, StoreError, TlsFiles};

/// How to reach a server. Nothing is sent.
///
/// # Errors
///
/// The URL is none that the client library can use, or one of the files is of no use. No password is in it.
#[cfg_attr(not(feature = "tls"), allow(unused_variables))]
pub(in crate::store) fn connection_info(server: &ServerUrl, tls: &TlsFiles) -> Result<ConnectionInfo, Invalid> {
    // The error of the client library may quote the URL, and with it the password.
    let unusable = || Invalid::new("url", server.place(), "a server that the client library can use");
    #[cfg(feature = "tls")]
    let info = if server.is_encrypted() {
        let client = Client::build_with_tls(server.as_str(), certificates(tls)?).map_err(|_| unusable())?;
        client.get_connection_info().clone()
    } else {
        server.as_str().into_connection_info().map_err(|_| unusable())?
    };
    #[cfg(not(feature = "tls"))]
    let info = server.as_str().into_connection_info().map_err(|_| unusable())?;
    // A request is small and must not wait until it is worth a packet.
    Ok(info.set_tcp_settings(TcpSettings::default().set_nodelay(true)))
}

/// The certificates as the client library takes them, for what does not take a [`ConnectionInfo`].
///
/// # Errors
///
/// One of the files is of no use.
#[cfg(feature = "tls")]
pub(in crate::store) fn certificates(files: &TlsFiles) -> Result<TlsCertificates, Invalid> {
    let TlsPem { ca, client } = TlsPem::read(files)?;
    Ok(TlsCertificates {
        client_tls: client.map(|client| ClientTlsConfig {
            client_cert: client.certificate,
            client_key: client.key,
        }),
        root_cert: ca,
    })
}

/// After which part of the time for connecting a handshake is taken to be stuck.
const HANDSHAKE_SHARE: u32 = 5;

/// Connects, and finds out meanwhile why a handshake of TLS gets no answer: a server that does not speak TLS waits for the end of
/// what it takes for a command, for ever.
pub(in crate::store) async fn unless_plain<T>(
    info: &ConnectionInfo,
    timeout: Duration,
    connecting: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    let ConnectionAddr::TcpTls { host, port, .. } = info.addr() else {
        return connecting.await;
    };
    let suspect = async {
        tokio::time::sleep(timeout / HANDSHAKE_SHARE).await;
        if !speaks_plainly(host, *port).await {
            // The time limit for connecting decides.
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        biased;
        connected = connecting => connected,
        () = suspect => Err(StoreError::Refused(NOT_ENCRYPTED.into())),
    }
}

/// Whether a Redis server answers there without encryption. Nothing that is secret is sent.
async fn speaks_plainly(host: &str, port: u16) -> bool {
    let ask = async {
        let mut stream = TcpStream::connect((host, port)).await?;
        stream.write_all(b"PING\r\n").await?;
        let mut first = [0];
        stream.read_exact(&mut first).await?;
        Ok::<_, std::io::Error>(first[0])
    };
    matches!(ask.await, Ok(b'+' | b'-'))
}
