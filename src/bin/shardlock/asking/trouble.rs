//! Why a server could not be asked.

use deadpool_redis::redis::{ErrorKind, RedisError};
use shardlock::ServerUrl;

/// Why nothing was learned from a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Trouble {
    pub(crate) kind: TroubleKind,
    /// In the words of whoever said no.
    pub(crate) reason: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TroubleKind {
    /// There is no connection.
    Unreachable,
    /// There was no answer in time.
    Silent,
    /// The server wants another password, or one at all.
    Login,
    /// The server does not let us choose the database.
    Database,
    /// The encryption did not come about.
    Encryption,
    /// The server answers, but not as it should.
    Answer,
}

impl Trouble {
    /// What an error of a connection to that server, or of a request there, means.
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
