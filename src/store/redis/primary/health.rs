//! The primary's clock, and whether it accepts locks.

use std::sync::Arc;

use deadpool_redis::redis::Value;

use super::super::{map, server_time};
use super::RedisStore;
use crate::key::Slot;
use crate::store::{ServerTime, StoreError, StoreFuture};

impl RedisStore {
    /// Checks that the primary accepts locks: sends a write that changes nothing on the background
    /// connection.
    pub(crate) fn accepts_locks(&self) -> StoreFuture<()> {
        let (shared, background) = (Arc::clone(&self.shared), self.background());
        Box::pin(async move {
            let (link, mut live) = background.get(shared.timeout / 3).await?;
            let limit = shared.timeout.mul_f64(0.9);
            // Any slot will do.
            let command = shared.commands.write_nothing(Slot::of(b""));
            let asking = live.connection.send_packed_command(&command);
            match tokio::time::timeout(limit, asking).await {
                Ok(reply) => {
                    let reply = reply.and_then(Value::extract_error).map_err(|error| {
                        link.is_ended_by(&error, &live);
                        shared.discovery.to_store_error(&error)
                    });
                    reply.map(drop)
                }
                Err(_) => {
                    link.broken(&live);
                    Err(StoreError::Unavailable(format!("no answer within {limit:?}").into()))
                }
            }
        })
    }

    /// Reads the primary's time on the background connection, which also checks that the primary is
    /// reachable.
    pub(crate) fn time(&self) -> StoreFuture<ServerTime> {
        let (shared, background) = (Arc::clone(&self.shared), self.background());
        Box::pin(async move {
            let (link, mut live) = background.get(shared.timeout / 3).await?;
            let limit = shared.timeout.mul_f64(0.9);
            let place = link.place(&live).unwrap_or_default();
            let asking = server_time::read(&mut live.connection, place.into(), live.generation);
            match tokio::time::timeout(limit, asking).await {
                Ok(Ok(time)) => time,
                Ok(Err(error)) => {
                    link.is_ended_by(&error, &live);
                    Err(shared.discovery.to_store_error(&error))
                }
                Err(_) => {
                    // The connection may have been lost silently: the next probe opens another one.
                    link.broken(&live);
                    Err(StoreError::Unavailable(format!("no answer within {limit:?}").into()))
                }
            }
        })
    }

    /// Fails if the server has another shard map by now. Other errors are ignored: the request for
    /// the time reports them.
    pub(super) fn probe_map(&self) -> StoreFuture<()> {
        let (shared, background) = (Arc::clone(&self.shared), self.background());
        Box::pin(async move {
            let (link, live) = background.get(shared.timeout / 3).await?;
            let switches = shared.switches();
            let limit = shared.timeout.mul_f64(0.9);
            let asking = shared.map_command(&link, &live, map::read(&shared.map));
            match tokio::time::timeout(limit, asking).await {
                // Replies of a server that has been replaced meanwhile must be discarded.
                Ok(Ok(stored)) if shared.switches() == switches => map::look(&shared.map, &stored),
                _ => Ok(()),
            }
        })
    }
}
