//! Discovery of the primary: a fixed address, or the one that the sentinels report.

use deadpool_redis::redis::{ErrorKind, RedisError, ServerErrorKind};

use super::super::client::Target;
use super::super::reply::{Role, to_store_error};
use super::sentinels::Sentinels;
use crate::endpoint::ServerUrl;
use crate::error::InvalidSetting;
use crate::store::{StoreError, TlsFiles};

/// See the module.
pub(super) enum Discovery {
    Fixed(ServerUrl),
    Sentinels(Sentinels),
}

impl Discovery {
    /// Checks all addresses that are known in advance.
    pub(super) fn check(&self, tls: &TlsFiles) -> Result<(), InvalidSetting> {
        match self {
            Self::Fixed(server) => Target::new(server, tls).map(drop),
            Self::Sentinels(sentinels) => sentinels.check(),
        }
    }

    /// Whether the primary can change to another server.
    pub(super) const fn follows(&self) -> bool {
        matches!(self, Self::Sentinels(_))
    }

    /// The current address of the primary.
    pub(super) async fn locate(&self) -> Result<ServerUrl, StoreError> {
        match self {
            Self::Fixed(server) => Ok(server.clone()),
            Self::Sentinels(sentinels) => sentinels.locate().await,
        }
    }

    /// The address from [`locate`](Self::locate) did not lead to a working primary: ask another
    /// sentinel first.
    pub(super) fn report_unreachable(&self) {
        if let Self::Sentinels(sentinels) = self {
            sentinels.ask_another_first();
        }
    }

    /// Whether this error shows that the server is no longer the expected primary, so that its
    /// connections must be abandoned.
    pub(super) fn is_demotion(&self, error: &RedisError) -> bool {
        match error.kind() {
            // Also at a fixed address: if the server becomes a primary again, it must be greeted
            // anew, since its counters may have decreased meanwhile.
            ErrorKind::Server(ServerErrorKind::ReadOnly) => true,
            // A new replica that is syncing or lacks its primary's data, or a primary that has just
            // started and may be replaced by the sentinels.
            ErrorKind::Server(ServerErrorKind::BusyLoading | ServerErrorKind::MasterDown) => self.follows(),
            // Returned for a blocked request when its server becomes a replica.
            ErrorKind::Extension => error.code() == Some("UNBLOCKED"),
            _ => false,
        }
    }

    /// Converts an error for the caller.
    pub(super) fn to_store_error(&self, error: &RedisError) -> StoreError {
        if self.follows() && self.is_demotion(error) {
            return StoreError::Unavailable(format!("a failover seems to be in progress: {error}").into());
        }
        to_store_error(error)
    }

    /// Checks that a server with this role is the primary.
    pub(super) fn check_role(&self, role: &Role, place: &str) -> Result<(), StoreError> {
        let problem = match role {
            Role::Primary => return Ok(()),
            Role::Replica { of } => format!("{place} is a replica of {of}"),
            Role::Sentinel => format!("{place} is a sentinel"),
        };
        Err(match (self, role) {
            (Self::Sentinels(_), _) => StoreError::Unavailable(
                format!("{problem}, although a sentinel names it as the primary: a failover is in progress").into(),
            ),
            (Self::Fixed(_), Role::Sentinel) => StoreError::Refused(
                format!("{problem}; use redis+sentinel://{place}/NAME with the name of the primary that it watches")
                    .into(),
            ),
            (Self::Fixed(_), _) => StoreError::Refused(format!("{problem}; connect to the primary").into()),
        })
    }
}
