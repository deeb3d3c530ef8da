//! What can be done with a whole namespace rather than with one of its locks.

use crate::error::LockError;
use crate::manager::LockManager;

/// Removes everything that the namespace of this manager has stored in its shards and returns the
/// number of keys removed: leases, queues, counters and the shard map, including those of other
/// managers.
///
/// Only use it on a namespace that is no longer in use: any manager that still uses it loses its
/// locks. Tokens issued in the namespace later are still larger than all earlier ones.
///
/// # Errors
///
/// [`LockErrorKind::Unavailable`] or [`LockErrorKind::Refused`] if a shard does not answer or
/// refuses to remove a key. Everything else has been removed by then, on the other shards too.
///
/// # Cancel safety
///
/// If the future is dropped, part of the namespace may have been removed.
///
/// # Examples
///
/// ```
/// use shardlock::{LockManager, namespace};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let locks = LockManager::builder()
///     .shard("memory://")
///     .namespace("test-42:")
///     .connect()
///     .await?;
/// locks.lock("k").await?.release().await?;
/// namespace::erase(&locks).await?;
/// locks.shutdown().await?;
/// # Ok(()) }
/// ```
///
/// [`LockErrorKind::Unavailable`]: crate::error::LockErrorKind::Unavailable
/// [`LockErrorKind::Refused`]: crate::error::LockErrorKind::Refused
pub async fn erase(locks: &LockManager) -> Result<u64, LockError> {
    locks.inner.erase_namespace().await
}
