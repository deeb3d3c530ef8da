//! How to reach a server: from a URL to an address, a login and certificates, and the socket's
//! settings.

use std::future::Future;
use std::io;
use std::time::Duration;

use deadpool_redis::redis::io::tcp::socket2::{SockRef, TcpKeepalive};
use deadpool_redis::redis::{
    Cmd, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, RedisConnectionInfo, RedisError, RedisResult, cmd,
};
use tokio::net::TcpStream;

use super::refusal;
use super::reply::to_store_error;
use crate::credentials::Credentials;
use crate::endpoint::ServerUrl;
use crate::error::InvalidSetting;
use crate::identity::ManagerId;
use crate::store::login::Login;
#[cfg(feature = "tls")]
use crate::store::tls::TlsPem;
use crate::store::{NOT_ENCRYPTED, StoreError, TlsFiles};

/// TCP keepalive: the idle time before the first probe, the interval between probes, and the number
/// of unanswered probes after which the connection is broken. A connection that only listens would
/// not notice a dead peer otherwise.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(10);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(3);
const KEEPALIVE_PROBES: u32 = 3;
/// How long sent data may stay unacknowledged before the connection is broken. This matches the
/// total keepalive time, because no probes are sent while data is in flight. Linux would retry for
/// 15 minutes by default; other systems use their own default.
#[cfg(any(target_os = "linux", target_os = "android"))]
const UNACKNOWLEDGED_MAX: Duration =
    Duration::from_secs(KEEPALIVE_AFTER.as_secs() + KEEPALIVE_PROBES as u64 * KEEPALIVE_EVERY.as_secs());

/// Closing a connection resets it. Otherwise the system would keep sending the remaining data for
/// up to [`UNACKNOWLEDGED_MAX`]. An acquire could then execute after the release of its cycle had
/// already been answered on the next connection.
const RESET: Duration = Duration::ZERO;

/// How to reach a server: the client library's settings, and the certificates.
#[derive(Clone)]
pub(super) struct Target {
    info: ConnectionInfo,
    login: Login,
    #[cfg(feature = "tls")]
    pem: TlsPem,
}

impl Target {
    /// Uses the login of the URL. Sends nothing.
    ///
    /// # Errors
    ///
    /// Fails if the client library can't use the URL, or if one of the files is unusable. The error
    /// contains no password.
    #[cfg_attr(not(feature = "tls"), allow(unused_variables))]
    pub(super) fn new(server: &ServerUrl, tls: &TlsFiles) -> Result<Self, InvalidSetting> {
        // The error of the client library may quote the URL, and with it the password.
        let unusable = |_| InvalidSetting::new("url", server.place(), "a server that the client library can use");
        #[cfg(feature = "tls")]
        let pem = if server.is_encrypted() {
            TlsPem::read(tls)?
        } else {
            TlsPem::default()
        };
        let info = server.with_password().into_connection_info().map_err(unusable)?;
        let login = info
            .redis_settings()
            .clone()
            .set_lib_name(LIBRARY, env!("CARGO_PKG_VERSION"));
        Ok(Self {
            info: info.set_redis_settings(login),
            login: Login::default(),
            #[cfg(feature = "tls")]
            pem,
        })
    }

    /// The same with another source for the login.
    pub(super) fn with_login(mut self, login: &Login) -> Self {
        self.login = login.clone();
        self
    }

    /// The settings for a new connection, with the current login.
    ///
    /// # Errors
    ///
    /// The login is not available now.
    pub(super) async fn settings(&self) -> io::Result<RedisConnectionInfo> {
        let address = match self.info.addr() {
            ConnectionAddr::Tcp(host, port) | ConnectionAddr::TcpTls { host, port, .. } if host.contains(':') => {
                format!("[{host}]:{port}")
            }
            ConnectionAddr::Unix(path) => path.display().to_string(),
            addr => addr.to_string(),
        };
        let settings = self.info.redis_settings().clone();
        Ok(match self.login.credentials(&address).await? {
            None => settings,
            Some(Credentials { username, password }) => {
                let settings = settings.set_password(password.expose());
                match username {
                    Some(username) => settings.set_username(username),
                    None => settings,
                }
            }
        })
    }

    pub(super) fn info(&self) -> &ConnectionInfo {
        &self.info
    }

    /// The same certificates at another address, or with another login.
    pub(super) fn with_info(&self, info: ConnectionInfo) -> Self {
        let mut target = self.clone();
        target.info = info;
        target
    }

    #[cfg(feature = "tls")]
    pub(super) fn tls_config(&self) -> io::Result<rustls::ClientConfig> {
        self.pem.client_config()
    }
}

fn keepalive() -> TcpKeepalive {
    TcpKeepalive::new()
        .with_time(KEEPALIVE_AFTER)
        .with_interval(KEEPALIVE_EVERY)
        .with_retries(KEEPALIVE_PROBES)
}

/// Applies the settings of every connection.
pub(super) fn prepare(stream: &TcpStream) -> io::Result<()> {
    // Requests are small; Nagle's algorithm would delay them.
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    socket.set_linger(Some(RESET))?;
    #[cfg(any(target_os = "linux", target_os = "android"))]
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED_MAX))?;
    socket.set_tcp_keepalive(&keepalive())
}

/// The library name reported to the server (`CLIENT SETINFO`, Redis 7.2 and later).
const LIBRARY: &str = "shardlock";

/// What a connection is used for, as shown in its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) enum Purpose {
    /// Requests of the application's tasks.
    Requests,
    /// Renewals, and everything else that the background thread sends.
    Renewals,
    /// Subscriptions.
    Inbox,
    /// Requests that are not on the path of a lock, see `checked_pool`.
    Pool,
}

/// Names the connection as `shardlock:<manager>:requests` and so on, for `CLIENT LIST`. If the user
/// lacks the permission, or a proxy does not know the command, the connection stays unnamed.
pub(super) fn named(manager: &ManagerId, purpose: Purpose) -> Cmd {
    let purpose = match purpose {
        Purpose::Requests => "requests",
        Purpose::Renewals => "renewals",
        Purpose::Inbox => "inbox",
        Purpose::Pool => "pool",
    };
    let mut name = cmd("CLIENT");
    name.arg("SETNAME")
        .arg(format!("shardlock:{}:{purpose}", manager.as_str()));
    name
}

/// Connects. If that fails without a useful reason, looks for one: see [`refusal`]. A server
/// without TLS would wait forever for the rest of what it takes for a command, and so would other
/// non-Redis servers.
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
        _ => connecting.await.map_err(|error| to_store_error(&error)),
    }
}

/// Explains an error on a connection that was just made.
pub(super) async fn explained(info: &ConnectionInfo, timeout: Duration, error: &RedisError) -> StoreError {
    match info.addr() {
        ConnectionAddr::TcpTls { .. } => refusal::explained_with_tls(error),
        ConnectionAddr::Tcp(host, port) => refusal::explained(error, host, *port, timeout).await,
        _ => to_store_error(error),
    }
}
