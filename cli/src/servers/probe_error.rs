//! Why a server could not be probed.

use deadpool_redis::redis::{ErrorKind, RedisError};
use shardlock::tool::ServerUrl;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ProbeError {
    pub(crate) kind: ProbeErrorKind,
    /// The message of the server or library that reported the error.
    pub(crate) reason: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ProbeErrorKind {
    /// No connection.
    Unreachable,
    /// No answer in time.
    Timeout,
    /// The server requires a password, or a different one.
    Login,
    /// The server refuses to select the database.
    Database,
    /// TLS could not be established.
    Tls,
    /// The server's answer is unexpected.
    UnexpectedReply,
}

impl ProbeError {
    /// Classifies an error of a connection to this server, or of a request on it.
    pub(crate) fn classify(error: &RedisError, server: &ServerUrl) -> Self {
        let reason = error.to_string();
        let is_about_certificates =
            server.is_encrypted() && (reason.contains("ertificate") || reason.contains("handshake"));
        let kind = match error.kind() {
            ErrorKind::AuthenticationFailed => ProbeErrorKind::Login,
            _ if reason.contains("refused to switch database") => ProbeErrorKind::Database,
            _ if matches!(error.code(), Some("NOAUTH" | "WRONGPASS" | "NOPERM")) => ProbeErrorKind::Login,
            _ if is_about_certificates || error.kind() == ErrorKind::InvalidClientConfig => ProbeErrorKind::Tls,
            _ if error.is_timeout() => ProbeErrorKind::Timeout,
            ErrorKind::Io => ProbeErrorKind::Unreachable,
            _ => ProbeErrorKind::UnexpectedReply,
        };
        Self { kind, reason }
    }
}
