//! How often a request is sent.

use deadpool_redis::redis::RedisError;

use super::Shared;
use super::link::{Link, Live};
use crate::store::StoreError;

/// How often a request is resent on a new connection after the old one turned out to be broken.
pub(super) const RECONNECTS_PER_REQUEST: usize = 2;

/// Counts failed attempts to send a request.
#[derive(Default)]
pub(super) struct Attempts {
    count: usize,
    /// Whether one of them may have released the lease.
    pub(super) may_have_released: bool,
}

impl Attempts {
    /// After a connection broke, or turned out not to lead to a primary, the request is resent on a
    /// new one: the store treats two requests of one cycle as one. Any other error fails the
    /// request.
    pub(super) fn failed(
        &mut self,
        shared: &Shared,
        link: &Link,
        live: &Live,
        error: &RedisError,
    ) -> Result<(), StoreError> {
        if link.close_if_broken(error, live) {
            self.count += 1;
            // A server that replied that it is not a primary has done nothing.
            self.may_have_released |= error.is_unrecoverable_error();
            if self.count <= RECONNECTS_PER_REQUEST {
                return Ok(());
            }
        }
        Err(shared.discovery.to_store_error(error))
    }

    /// The primary changed while the request was in flight, so its reply must be discarded. For a
    /// release, `held` states whether the lease was ours in that reply.
    pub(super) fn was_discarded(&mut self, held: Option<bool>) -> Result<(), StoreError> {
        self.count += 1;
        self.may_have_released |= held.unwrap_or(false);
        if self.count <= RECONNECTS_PER_REQUEST {
            return Ok(());
        }
        Err(StoreError::Unavailable(
            "the primary changed more than once while the request was in flight".into(),
        ))
    }
}
