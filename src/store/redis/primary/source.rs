//! Where the primary is: at a fixed address, or where the sentinels say.

use deadpool_redis::redis::{ErrorKind, RedisError, ServerErrorKind};

use super::super::client::connection_info;
use super::super::reply::{Role, error_in_words};
use super::sentinels::Sentinels;
use crate::endpoint::ServerUrl;
use crate::error::Invalid;
use crate::store::{StoreError, TlsFiles};

/// See the module.
pub(super) enum Source {
    Fixed(ServerUrl),
    Sentinels(Sentinels),
}

impl Source {
    /// Whether all addresses that are known beforehand can be used at all.
    pub(super) fn check(&self, tls: &TlsFiles) -> Result<(), Invalid> {
        match self {
            Self::Fixed(server) => connection_info(server, tls).map(|_| ()),
            Self::Sentinels(sentinels) => sentinels.check(),
        }
    }

    /// Whether the primary may be another server tomorrow.
    pub(super) const fn follows(&self) -> bool {
        matches!(self, Self::Sentinels(_))
    }

    /// Where the primary is now.
    pub(super) async fn locate(&self) -> Result<ServerUrl, StoreError> {
        match self {
            Self::Fixed(server) => Ok(server.clone()),
            Self::Sentinels(sentinels) => sentinels.locate().await,
        }
    }

    /// The place that [`locate`](Self::locate) named was none of a working primary: another sentinel may know better.
    pub(super) fn doubt(&self) {
        if let Self::Sentinels(sentinels) = self {
            sentinels.ask_another_first();
        }
    }

    /// Whether a server that says so is, or just became, something else than the primary that it was: its connections are of no
    /// more use.
    pub(super) fn is_left_by(&self, error: &RedisError) -> bool {
        match error.kind() {
            // Also at a fixed address: should the server become a primary again, it is greeted anew first, since its counters may
            // have gone back meanwhile.
            ErrorKind::Server(ServerErrorKind::ReadOnly) => true,
            // A new replica that fetches or lacks the data of its primary; or a primary that has just started, which sentinels may replace.
            ErrorKind::Server(ServerErrorKind::BusyLoading | ServerErrorKind::MasterDown) => self.follows(),
            // What a request that was blocked gets when its server becomes a replica.
            ErrorKind::Extension => error.code() == Some("UNBLOCKED"),
            _ => false,
        }
    }

    /// What an error means for the one who asked.
    pub(super) fn in_words(&self, error: &RedisError) -> StoreError {
        if self.follows() && self.is_left_by(error) {
            return StoreError::Unavailable(format!("a failover seems to be under way: {error}").into());
        }
        error_in_words(error)
    }

    /// Whether a server of that role is the one to talk to.
    pub(super) fn accept(&self, role: &Role, place: &str) -> Result<(), StoreError> {
        let problem = match role {
            Role::Primary => return Ok(()),
            Role::Replica { of } => format!("{place} is a replica of {of}"),
            Role::Sentinel => format!("{place} is a sentinel"),
        };
        Err(match (self, role) {
            (Self::Sentinels(_), _) => StoreError::Unavailable(
                format!("{problem}, though a sentinel calls it the primary: a failover is under way").into(),
            ),
            (Self::Fixed(_), Role::Sentinel) => StoreError::Refused(
                format!("{problem}; write redis+sentinel://{place}/NAME with the name of the primary that it watches")
                    .into(),
            ),
            (Self::Fixed(_), _) => StoreError::Refused(format!("{problem}; connect to the primary").into()),
        })
    }
}
