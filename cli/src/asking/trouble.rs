//! Why a server could not be asked.

use deadpool_redis::redis::{ErrorKind, RedisError};
use shardlock::ServerUrl;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Trouble {
    pub(crate) kind: TroubleKind,
    /// The message of the server or library that reported the error.
    pub(crate) reason: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TroubleKind {
    /// No connection.
    Unreachable,
    /// No answer in time.
    Silent,
    /// The server requires a password, or a different one.
    Login,
    /// The server refuses to select the database.
    Database,
    /// TLS could not be established.
    Encryption,
    /// The server's answer is unexpected.
    Answer,
}

impl Trouble {
    /// Classifies an error of a connection to this server, or of a request on it.
    pub(crate) fn of(error: &RedisError, server: &ServerUrl) -> Self {
        let reason = error.to_string();
        let is_about_certificates =
            server.is_encrypted() && (reason.contains("ertificate") || reason.contains("handshake"));
        let kind = match error.kind() {
            ErrorKind::AuthenticationFailed => TroubleKind::Login,
            _ if reason.contains("refused to switch database") => TroubleKind::Database,
            _ if matches!(error.code(), Some("NOAUTH" | "WRONGPASS" | "NOPERM")) => TroubleKind::Login,
            _ if is_about_certificates || error.kind() == ErrorKind::InvalidClientConfig => TroubleKind::Encryption,
            _ if error.is_timeout() => TroubleKind::Silent,
            ErrorKind::Io => TroubleKind::Unreachable,
            _ => TroubleKind::Answer,
        };
        Self { kind, reason }
    }
}
