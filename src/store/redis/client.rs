//! From a URL to what the client library takes: where, who, and with which certificates.

use std::future::Future;
use std::io;
use std::time::Duration;

use deadpool_redis::redis::io::tcp::TcpSettings;
use deadpool_redis::redis::io::tcp::socket2::{SockRef, TcpKeepalive};
#[cfg(feature = "tls")]
use deadpool_redis::redis::{Client, ClientTlsConfig, TlsCertificates};
use deadpool_redis::redis::{Cmd, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, RedisError, RedisResult, cmd};
use tokio::net::TcpStream;

use super::refusal;
use super::reply::error_in_words;
use crate::endpoint::ServerUrl;
use crate::error::Invalid;
use crate::identity::ManagerId;
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

/// A closed connection is reset. Otherwise the system would go on sending what is left of it, for as long as [`UNACKNOWLEDGED_MAX`]: an acquire could then
/// be executed after the release of its cycle, which was sent on the next connection, had been answered.
const RESET: Duration = Duration::ZERO;

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
    let settings = TcpSettings::default()
        .set_nodelay(true)
        .set_keepalive(keepalive())
        .set_linger_time(RESET);
    #[cfg(any(target_os = "linux", target_os = "android"))]
    let settings = settings.set_user_timeout(UNACKNOWLEDGED_MAX);
    let login = info
        .redis_settings()
        .clone()
        .set_lib_name(LIBRARY, env!("CARGO_PKG_VERSION"));
    Ok(info.set_tcp_settings(settings).set_redis_settings(login))
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
    socket.set_linger(Some(RESET))?;
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

/// What the server is told of the client library: its name (`CLIENT SETINFO`, from Redis 7.2 on).
const LIBRARY: &str = "shardlock";

/// What a connection is for, which its name says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) enum Purpose {
    /// What tasks of the program ask for.
    Requests,
    /// Renewals, and what else the watchdog's thread sends.
    Renewals,
    /// Subscriptions.
    Inbox,
}

/// Gives the connection a name that `CLIENT LIST` shows: `shardlock:<manager>:requests` and so on. A user who may not, or a proxy that does not know
/// the command, goes without.
pub(super) fn named(manager: &ManagerId, purpose: Purpose) -> Cmd {
    let purpose = match purpose {
        Purpose::Requests => "requests",
        Purpose::Renewals => "renewals",
        Purpose::Inbox => "inbox",
    };
    let mut name = cmd("CLIENT");
    name.arg("SETNAME")
        .arg(format!("shardlock:{}:{purpose}", manager.as_str()));
    name
}

/// Connects, and finds out why where that fails without saying so: see [`refusal`]. A server that does not speak TLS waits for the end of what it takes
/// for a command, for ever; so do other servers that are none of Redis.
pub(in crate::store) async fn with_reason<T>(
    info: &ConnectionInfo,
    timeout: Duration,
    connecting: impl Future<Output = RedisResult<T>>,
) -> Result<T, StoreError> {
    match info.addr() {
        ConnectionAddr::TcpTls { host, port, .. } => {
            let suspect = async {
                tokio::time::sleep(refusal::PATIENCE.min(timeout / 4)).await;
                if !refusal::answers_plainly(host, *port).await {
                    // The time limit for connecting decides.
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                biased;
                connected = connecting => connected.map_err(|error| refusal::explained_with_tls(&error)),
                () = suspect => Err(StoreError::Refused(NOT_ENCRYPTED.into())),
            }
        }
        ConnectionAddr::Tcp(host, port) => {
            let suspect = async {
                tokio::time::sleep(timeout / 2).await;
                match refusal::is_of_another_kind(host, *port, refusal::PATIENCE.min(timeout / 4)).await {
                    Some(error) => error,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                connected = connecting => match connected {
                    Ok(connected) => Ok(connected),
                    Err(error) => Err(refusal::explained(&error, host, *port, timeout).await),
                },
                error = suspect => Err(error),
            }
        }
        _ => connecting.await.map_err(|error| error_in_words(&error)),
    }
}

/// What an error of a connection that was just made means.
pub(super) async fn explained(info: &ConnectionInfo, timeout: Duration, error: &RedisError) -> StoreError {
    match info.addr() {
        ConnectionAddr::TcpTls { .. } => refusal::explained_with_tls(error),
        ConnectionAddr::Tcp(host, port) => refusal::explained(error, host, *port, timeout).await,
        _ => error_in_words(error),
    }
}
