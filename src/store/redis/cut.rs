//! Abandoned connections: all requests on them fail at once so that the system can reset the
//! connection, and the time is recorded.
//!
//! # Implementation details
//!
//! A request sent on a connection may execute after the connection was abandoned and replaced. If
//! it acquires something, no task knows: the release of its cycle went out on the next connection
//! and was answered earlier. A connection is therefore *reset* when it is closed (`SO_LINGER` 0,
//! see `client`), which discards data that the system has not sent yet. It must also be closed at
//! once, which this module ensures: the client library closes a connection when its last handle is
//! dropped, and every request that waits for a reply holds one.
//!
//! Data that already left this machine may still arrive, for example from a proxy's buffer. The
//! time at which a connection was last abandoned is therefore recorded. Until
//! [`LATE_MAX`](crate::store::LATE_MAX) has passed, an answered release does not prove that nothing
//! of its cycle is left.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use deadpool_redis::redis::{RedisError, RedisResult};
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use crate::clock::Moment;

/// When one of a store's connections was last abandoned.
#[derive(Debug, Default)]
pub(super) struct Cuts {
    /// In nanoseconds; zero if there was none.
    last: AtomicU64,
}

impl Cuts {
    /// Records that a connection is abandoned now. Call this before another connection can take its
    /// place.
    pub(super) fn note(&self) {
        self.last.fetch_max(Moment::now().as_nanos(), Ordering::AcqRel);
    }

    pub(super) fn last(&self) -> Option<Moment> {
        match self.last.load(Ordering::Acquire) {
            0 => None,
            nanos => Some(Moment::from_nanos(nanos)),
        }
    }
}

/// Closes a connection when it is dropped.
#[derive(Debug)]
pub(super) enum Ending {
    /// Aborts the driver, which this crate spawned. All requests on the connection fail.
    Driver(AbortHandle),
    /// Makes all requests fail and drop their handles, since the client library spawned the driver.
    Requests(Cut),
}

impl Ending {
    /// The cut to wait on, for requests on a connection of the client library.
    pub(super) fn cut(&self) -> Option<Cut> {
        match self {
            Self::Driver(_) => None,
            Self::Requests(cut) => Some(cut.clone()),
        }
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        match self {
            Self::Driver(driver) => driver.abort(),
            Self::Requests(cut) => cut.happen(),
        }
    }
}

/// Whether a connection of the client library was abandoned.
#[derive(Debug, Clone, Default)]
pub(super) struct Cut(Arc<State>);

#[derive(Debug, Default)]
struct State {
    happened: AtomicBool,
    notify: Notify,
}

impl Cut {
    pub(super) fn happen(&self) {
        self.0.happened.store(true, Ordering::SeqCst);
        self.0.notify.notify_waiters();
    }

    /// Returns the reply, or a broken-pipe error once the connection is abandoned.
    pub(super) async fn or<T>(&self, reply: Pin<&mut impl Future<Output = RedisResult<T>>>) -> RedisResult<T> {
        let notified = self.0.notify.notified();
        if self.0.happened.load(Ordering::SeqCst) {
            return Err(given_up());
        }
        tokio::select! {
            biased;
            reply = reply => reply,
            () = notified => Err(given_up()),
        }
    }
}

fn given_up() -> RedisError {
    io::Error::new(io::ErrorKind::BrokenPipe, "the connection was abandoned").into()
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use super::*;

    #[tokio::test]
    async fn requests_end_once_their_connection_is_given_up() {
        let ending = Ending::Requests(Cut::default());
        let cut = ending.cut().unwrap();
        assert_eq!(cut.or(pin!(async { Ok(1) })).await.unwrap(), 1);
        let waiting = tokio::spawn({
            let cut = cut.clone();
            async move { cut.or(pin!(std::future::pending::<RedisResult<()>>())).await }
        });
        tokio::task::yield_now().await;
        drop(ending);
        assert!(waiting.await.unwrap().unwrap_err().is_unrecoverable_error());
        let late = cut.or(pin!(std::future::pending::<RedisResult<()>>())).await;
        assert!(late.unwrap_err().is_unrecoverable_error());
    }

    #[test]
    fn the_last_cut_counts() {
        let cuts = Cuts::default();
        assert_eq!(cuts.last(), None);
        cuts.note();
        let first = cuts.last().unwrap();
        cuts.note();
        assert!(cuts.last().unwrap() >= first);
    }
}
