//! Connections for requests that are not on the path of a lock, from a pool; and which other one
//! replaces them while the server accepts no more.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::{Cmd, RedisError, RedisResult, Value, cmd};

use super::super::checked_pool::{CheckedPool, ConnectionOrigin, Lent, Opener, PooledConnection, discard};
use super::super::client::Purpose;
use super::super::reply::{Role, role};
use super::Shared;
use super::dial::{Dialer, Opened};
use super::link::{Link, Live};
use crate::clock::Moment;
use crate::store::StoreError;
use crate::time_limit::within;

/// The pool of one primary.
pub(super) type PrimaryPool = CheckedPool<PrimaryOpener>;

/// Opens pooled connections the way kept ones are opened, so they follow the primary, too.
pub(super) struct PrimaryOpener(Dialer);

impl PrimaryOpener {
    /// Creates the store's pool. Sends nothing yet.
    pub(super) fn pool(shared: &Arc<Shared>) -> PrimaryPool {
        let opener = Self(Dialer::new(shared, Purpose::Pool));
        CheckedPool::new(opener, &shared.runtimes, shared.timeout)
    }
}

impl Opener for PrimaryOpener {
    async fn open(&self) -> Result<PooledConnection, StoreError> {
        let pooled = |opened: Opened| {
            let origin = ConnectionOrigin {
                place: opened.place.into(),
                switches: opened.switches,
                era: opened.era,
            };
            // Its server was replaced while it was opened.
            if !self.is_current(&origin) {
                return Err(StoreError::Unavailable("the primary has changed".into()));
            }
            Ok(PooledConnection::new(opened.connection, opened.driver, origin))
        };
        self.0.connect(&pooled).await
    }

    fn is_current(&self, origin: &ConnectionOrigin) -> bool {
        let shared = &*self.0.shared;
        shared.era.load(Ordering::Acquire) == origin.era && shared.failovers.switches() == origin.switches
    }

    fn check(&self) -> Cmd {
        // Every user has the permission for these, which PING is not certain of.
        cmd(if self.0.shared.check_role { "ROLE" } else { "TIME" })
    }

    fn is_usable(&self, reply: RedisResult<Value>) -> bool {
        match reply {
            Ok(reply) if self.0.shared.check_role => matches!(role(&reply), Ok(Role::Primary)),
            reply => reply.is_ok(),
        }
    }
}

/// The pool of a primary, and its kept connections. A server that accepts no more connections still
/// serves the existing ones, so one of them carries the request then.
pub(super) struct Checked {
    pub(super) shared: Arc<Shared>,
    pub(super) pool: Arc<PrimaryPool>,
    pub(super) kept: Vec<Arc<Link>>,
}

/// A connection for one request.
pub(super) enum Borrowed {
    Pooled(Lent<PrimaryOpener>),
    Kept(Arc<Link>, Live),
}

impl Checked {
    /// Returns a connection. If a kept one is open, the pool is given only a third of a request's
    /// time limit.
    pub(super) async fn get(&self) -> Result<Borrowed, StoreError> {
        let open = || self.kept.iter().find_map(|link| Some((Arc::clone(link), link.live()?)));
        let lent = match open() {
            Some(_) => self.pooled_within(self.shared.timeout / 3).await,
            None => self.pool.get().await,
        };
        match lent {
            Ok(lent) => Ok(Borrowed::Pooled(lent)),
            // The server has another map, so it no longer keeps our locks.
            Err(error @ StoreError::MapMismatch { .. }) => Err(error),
            Err(error) => {
                let (link, live) = open().ok_or_else(|| error.clone())?;
                crate::log::debug!(?error, "no pooled connection; using a kept one instead");
                Ok(Borrowed::Kept(link, live))
            }
        }
    }

    /// Returns a pooled connection.
    pub(super) async fn pooled_within(&self, limit: Duration) -> Result<Lent<PrimaryOpener>, StoreError> {
        let lent = within(Moment::now(), limit, pin!(self.pool.get())).await;
        lent.unwrap_or_else(|_| {
            Err(StoreError::Unavailable(
                format!("no connection within {limit:?}").into(),
            ))
        })
    }
}

impl Borrowed {
    pub(super) fn connection(&self) -> MultiplexedConnection {
        match self {
            Self::Pooled(lent) => lent.connection.clone(),
            Self::Kept(_, live) => live.connection.clone(),
        }
    }

    /// Gives back a connection after a request failed: closes it if the error means that it is
    /// unusable. Returns the error for the caller.
    pub(super) fn failed(self, shared: &Shared, error: &RedisError) -> StoreError {
        match self {
            Self::Pooled(lent) => {
                if shared.discovery.is_demotion(error) {
                    let origin = lent.origin.clone();
                    discard(lent);
                    shared.leave_server(&origin.place, origin.era);
                } else if error.is_unrecoverable_error() {
                    discard(lent);
                }
            }
            Self::Kept(link, live) => {
                link.close_if_broken(error, &live);
            }
        }
        shared.discovery.to_store_error(error)
    }
}
