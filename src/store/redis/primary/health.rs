//! The primary's clock, and whether it accepts locks.
//!
//! # Implementation details
//!
//! The probe is sent on the kept background connection, which it thereby checks. A dead connection
//! is not a dead server: if the probe fails or has had no answer for a while, a pooled connection,
//! which has just been checked, gives a second opinion. It is not asked otherwise: probes are so
//! frequent that each manager would keep one more connection open all the time.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;

use deadpool_redis::redis::{RedisError, Value};

use super::super::{map, server_time};
use super::RedisStore;
use super::checked::{Borrowed, Checked};
use crate::key::Slot;
use crate::store::{Health, ServerTime, StoreError, StoreFuture};

/// Returns what the probe on the kept connection found, or the second opinion if that was nothing.
pub(super) async fn probe(checked: Checked, kept: impl Future<Output = Health>) -> Health {
    let limit = checked.shared.timeout;
    let mut kept = pin!(kept);
    let is_unanswered = |health: &Health| matches!(health.reached, Err(StoreError::Unavailable(_)));
    let (kept, second) = match tokio::time::timeout(limit / 3, kept.as_mut()).await {
        Ok(health) if is_unanswered(&health) => (Some(health), second_opinion(&checked).await),
        Ok(health) => return health,
        Err(_) => {
            // The probe closes the kept connection at the end of its own limit if it is silent.
            let (kept, second) = tokio::join!(tokio::time::timeout(limit * 3 / 5, kept), second_opinion(&checked));
            (kept.ok(), second)
        }
    };
    match (kept, second) {
        (_, Err(error @ StoreError::MapMismatch { .. })) => Health {
            reached: Err(error),
            times: Vec::new(),
        },
        (Some(health), Err(_)) => health,
        (Some(health), _) if !is_unanswered(&health) => health,
        (_, Ok(health)) => health,
        (None, Err(_)) => Health {
            reached: Err(StoreError::no_answer(limit)),
            times: Vec::new(),
        },
    }
}

/// The same probe on a pooled connection.
///
/// # Errors
///
/// The server did not answer on that one either.
async fn second_opinion(checked: &Checked) -> Result<Health, StoreError> {
    let shared = &*checked.shared;
    let lent = checked.pooled_within(shared.timeout / 3).await?;
    let (place, number) = (Arc::clone(&lent.origin.place), lent.number);
    let borrowed = Borrowed::Pooled(lent);
    let (mut clock, mut reading, mut writing) = (borrowed.connection(), borrowed.connection(), borrowed.connection());
    let (read, write) = (map::read(&shared.map), shared.commands.write_nothing(Slot::of(b"")));
    let asking = async {
        let (time, stored, written) = tokio::join!(
            server_time::read(&mut clock, place, number),
            reading.send_packed_command(&read),
            writing.send_packed_command(&write),
        );
        // Only errors of the map's content count, as in the first probe.
        Ok::<_, RedisError>((time?, stored, written?.extract_error()))
    };
    let (time, stored, written) = match tokio::time::timeout(shared.timeout / 3, asking).await {
        Ok(Ok(replies)) => replies,
        Ok(Err(error)) => return Err(borrowed.failed(shared, &error)),
        Err(_) => return Err(borrowed.failed(shared, &shared.no_answer())),
    };
    let mapped = match stored.and_then(Value::extract_error) {
        Ok(stored) => map::check_or_forget(&shared.map, &stored),
        Err(_) => Ok(()),
    };
    let accepts_locks = written.map(drop).map_err(|error| borrowed.failed(shared, &error));
    let reached = mapped.and(accepts_locks);
    Ok(match time {
        Ok(time) => Health {
            reached,
            times: vec![time],
        },
        Err(error) => Health {
            reached: Err(error),
            times: Vec::new(),
        },
    })
}

impl RedisStore {
    /// Probes the primary on the background connection.
    pub(super) fn probe_kept(&self) -> impl Future<Output = Health> + Send + use<> {
        let (time, map, accepts_locks) = (self.time(), self.probe_map(), self.accepts_locks());
        async move {
            let (time, map, accepts_locks) = tokio::join!(time, map, accepts_locks);
            let (reached, times) = match time {
                Ok(time) => (map.and(accepts_locks), vec![time]),
                Err(error) => (Err(error), Vec::new()),
            };
            Health { reached, times }
        }
    }

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
                        link.close_if_broken(&error, &live);
                        shared.discovery.to_store_error(&error)
                    });
                    reply.map(drop)
                }
                Err(_) => {
                    link.broken(&live);
                    Err(StoreError::no_answer(limit))
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
                    link.close_if_broken(&error, &live);
                    Err(shared.discovery.to_store_error(&error))
                }
                Err(_) => {
                    // The connection may have been lost silently: the next probe opens another one.
                    link.broken(&live);
                    Err(StoreError::no_answer(limit))
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
                Ok(Ok(stored)) if shared.switches() == switches => map::check_or_forget(&shared.map, &stored),
                _ => Ok(()),
            }
        })
    }
}
