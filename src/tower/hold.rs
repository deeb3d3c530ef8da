//! What a service sees of the lock under which it runs.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::clock::Moment;
use crate::fence::FencingToken;
use crate::guard::LockGuard;
use crate::lease::Lease;
use crate::mode::LockMode;

/// The lock under which a request is served, as the service sees it. Cheap to clone.
///
/// It does not keep the lock: the layer releases the lock once the service has responded, however
/// many clones there are. A clone that lives longer, for example in a task that the service has
/// spawned, is no longer [valid](Self::is_valid) then.
#[derive(Clone)]
pub struct Hold(Arc<Shared>);

struct Shared {
    key: Box<str>,
    token: FencingToken,
    mode: LockMode,
    lease: Arc<Lease>,
    /// Whether the request has been served. The lease may be that of another task since then.
    is_over: AtomicBool,
}

impl Hold {
    pub(super) fn new(guard: &LockGuard) -> Self {
        Self(Arc::new(Shared {
            key: guard.key().into(),
            token: guard.token(),
            mode: guard.mode(),
            lease: guard.lease(),
            is_over: AtomicBool::new(false),
        }))
    }

    /// Returns the key.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.0.key
    }

    /// Returns the fencing token. Send it along with every write that the lock protects.
    #[must_use]
    pub fn token(&self) -> FencingToken {
        self.0.token
    }

    /// Returns the mode in which the key is held.
    #[must_use]
    pub fn mode(&self) -> LockMode {
        self.0.mode
    }

    /// Returns whether the lock is certainly still held. See [`LockGuard::is_valid`]. It is not
    /// once the request has been served.
    ///
    /// The service itself is dropped at an await point when the lock is lost. Check this before
    /// steps that must not happen without the lock, and in tasks and threads that the service has
    /// started.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        !self.is_over() && self.0.lease.check(Moment::now()).is_none()
    }

    /// Returns how long the lock is certainly held if no further renewal succeeds; zero once it was
    /// lost or the request has been served.
    #[must_use]
    pub fn remaining(&self) -> Duration {
        if self.is_over() {
            Duration::ZERO
        } else {
            self.0.lease.check_remaining(Moment::now())
        }
    }

    fn is_over(&self) -> bool {
        self.0.is_over.load(Ordering::Acquire)
    }
}

impl fmt::Debug for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hold")
            .field("key", &self.key())
            .field("token", &self.token())
            .field("mode", &self.mode())
            .finish_non_exhaustive()
    }
}

/// Ends a [`Hold`] when dropped, which must be before its guard is released.
pub(super) struct EndOnDrop(pub(super) Hold);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        self.0.0.is_over.store(true, Ordering::Release);
    }
}
