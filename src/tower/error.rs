//! Why a request was not served under its lock.

use std::error::Error;

use crate::error::LockError;

/// The error of a service with a [`LockLayer`](super::LockLayer), as of most layers of tower.
pub type BoxError = Box<dyn Error + Send + Sync>;

/// Why a request was not served under its lock. The service returns it as a [`BoxError`]:
/// `downcast_ref` distinguishes it from the errors of the inner service.
///
/// For HTTP, `409 Conflict` suits an error that [`is_busy`](Self::is_busy), and `503 Service
/// Unavailable` the others.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LockLayerError {
    /// A [`TryLockRequest`](crate::TryLockRequest) found the key held. The inner service was not
    /// called.
    #[error("{key:?} is locked; try again later")]
    Busy {
        /// The key of the lock.
        key: String,
    },

    /// The lock could not be acquired, for a reason such as a timeout, a limit or an unavailable
    /// shard. The inner service was not called.
    #[error(transparent)]
    NotAcquired(LockError),

    /// The lock was lost before the inner service had responded, and the future of the service was
    /// dropped; or the loss was noticed when the lock was released after the response. Another
    /// holder may have been at work at the same time, unless the resource compares fencing tokens.
    #[error(transparent)]
    Lost(LockError),
}

impl LockLayerError {
    /// Returns whether the key was held by another holder: for a try, at the moment of the try; for
    /// a request that waits, until its timeout had passed.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        match self {
            Self::Busy { .. } => true,
            Self::NotAcquired(error) => error.is_timeout(),
            Self::Lost(_) => false,
        }
    }

    /// Returns the error of the request for the lock. `None` for [`Busy`](Self::Busy).
    #[must_use]
    pub const fn lock_error(&self) -> Option<&LockError> {
        match self {
            Self::Busy { .. } => None,
            Self::NotAcquired(error) | Self::Lost(error) => Some(error),
        }
    }
}
