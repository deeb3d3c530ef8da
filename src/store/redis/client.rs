//! From a URL to what the client library takes: where, who, and with which certificates.

use std::future::Future;
use std::io;
use std::time::Duration;

use deadpool_redis::redis::io::tcp::TcpSettings;
use deadpool_redis::redis::io::tcp::socket2::{SockRef, TcpKeepalive};
#[cfg(feature = "tls")]
use deadpool_redis::redis::{Client, ClientTlsConfig, TlsCertificates};
use deadpool_redis::redis::{ConnectionAddr, ConnectionInfo, IntoConnectionInfo, RedisResult};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::reply::error_in_words;
use crate::endpoint::ServerUrl;
use crate::error::Invalid;
#[cfg(feature = "tls")]
use crate::store::tls::TlsPem;
use crate::store::{NOT_ENCRYPTED, StoreError, TlsFiles};

/// How long a connection is silent before the system asks whether the other machine is still there, how often it asks then, and
/// after how many questions without an answer the connection is broken. A connection that only listens would not notice otherwise.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(10);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(3);
const KEEPALIVE_PROBES: u32 = 3;
/// How long the other machine may leave unacknowledged what was sent to it: as long as it may leave all questions unanswered, since there are none while
/// something was sent. Linux would go on for a quarter of an hour; other systems decide by themselves.
#[cfg(any(target_os = "linux", target_os = "android"))]
const UNACKNOWLEDGED_MAX: Duration =
    Duration::from_secs(KEEPALIVE_AFTER.as_secs() + KEEPALIVE_PROBES as u64 * KEEPALIVE_EVERY.as_secs());

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
    // As in `prepare`.
    let settings = TcpSettings::default().set_nodelay(true).set_keepalive(keepalive());
    #[cfg(any(target_os = "linux", target_os = "android"))]
    let settings = settings.set_user_timeout(UNACKNOWLEDGED_MAX);
    Ok(info.set_tcp_settings(settings))
}

fn keepalive() -> TcpKeepalive {
    TcpKeepalive::new()
        .with_time(KEEPALIVE_AFTER)
        .with_interval(KEEPALIVE_EVERY)
        .with_retries(KEEPALIVE_PROBES)
}

/// Gives a stream that was opened here the same settings as the client library's have.
pub(super) fn prepare(stream: &TcpStream) -> io::Result<()> {
    // A request is small and must not wait until it is worth a packet.
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    #[cfg(any(target_os = "linux", target_os = "android"))]
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED_MAX))?;
    socket.set_tcp_keepalive(&keepalive())
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

/// After which time a handshake is suspected to be stuck: longer than one takes, unless the server is far away or busy.
const HANDSHAKE_PATIENCE: Duration = Duration::from_millis(200);

/// Connects, and finds out why where that fails because one side speaks TLS and the other does not. A server that does not speak
/// TLS waits for the end of what it takes for a command, for ever; one that does hangs up on a plain client without a word.
pub(in crate::store) async fn with_reason<T>(
    info: &ConnectionInfo,
    timeout: Duration,
    connecting: impl Future<Output = RedisResult<T>>,
) -> Result<T, StoreError> {
    let patience = HANDSHAKE_PATIENCE.min(timeout / 4);
    match info.addr() {
        ConnectionAddr::TcpTls { host, port, .. } => {
            let suspect = async {
                tokio::time::sleep(patience).await;
                if !matches!(first_byte(host, *port, b"PING\r\n").await, Ok(b'+' | b'-')) {
                    // The time limit for connecting decides.
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                biased;
                connected = connecting => connected.map_err(|error| error_in_words(&error)),
                () = suspect => Err(StoreError::Refused(NOT_ENCRYPTED.into())),
            }
        }
        ConnectionAddr::Tcp(host, port) => {
            let error = match connecting.await {
                Ok(connected) => return Ok(connected),
                Err(error) if !error.is_connection_dropped() => return Err(error_in_words(&error)),
                Err(error) => error,
            };
            match tokio::time::timeout(patience, first_byte(host, *port, &client_hello())).await {
                Ok(Ok(TLS_ALERT | TLS_HANDSHAKE)) => Err(StoreError::Refused(format!("{ENCRYPTED}: {error}").into())),
                // No answer, or no more than silence: it may be anything.
                _ => Err(error_in_words(&error)),
            }
        }
        _ => connecting.await.map_err(|error| error_in_words(&error)),
    }
}

const ENCRYPTED: &str = "the port speaks TLS; use a URL with TLS (rediss:// and its like), or the server's plain port";
const TLS_ALERT: u8 = 21;
const TLS_HANDSHAKE: u8 = 22;

/// The least that can be said to begin with TLS 1.2: one cipher suite, no session, no compression, and zeros for what would be random.
/// Whoever speaks TLS answers, be it with a refusal.
fn client_hello() -> Vec<u8> {
    let (record, handshake) = ([TLS_HANDSHAKE, 3, 1, 0, 45], [1, 0, 0, 41]);
    let (version, random_and_session) = ([3, 3], [0; 33]);
    let (cipher_suites, compressions) = ([0, 2, 0xc0, 0x2f], [1, 0]);
    [
        &record[..],
        &handshake,
        &version,
        &random_and_session,
        &cipher_suites,
        &compressions,
    ]
    .concat()
}

/// What a server says first to these bytes. Nothing that is secret is sent.
async fn first_byte(host: &str, port: u16, bytes: &[u8]) -> io::Result<u8> {
    let mut stream = TcpStream::connect((host, port)).await?;
    stream.write_all(bytes).await?;
    stream.read_u8().await
}
