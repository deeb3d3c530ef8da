//! One connection attempt at a time, shared by all tasks that find no connection.

use std::future::Future;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::StoreError;
use crate::runtime::Runtimes;

type Outcome<T> = Option<Result<T, StoreError>>;

/// See the module documentation.
///
/// Each attempt is a task of its own. The task that started it may never be polled again, which
/// would keep all others from connecting. While a server hangs, all requests wait for the same
/// attempt instead of each starting one.
pub(super) struct Connecting<T> {
    attempt: Mutex<Option<watch::Receiver<Outcome<T>>>>,
}

impl<T> Default for Connecting<T> {
    fn default() -> Self {
        Self {
            attempt: Mutex::new(None),
        }
    }
}

impl<T: Clone + Send + Sync + 'static> Connecting<T> {
    /// Returns the outcome of the attempt in progress, or of a new one if there is none. A new
    /// attempt runs on the background thread if the application's tasks use the connection,
    /// otherwise on the caller's runtime.
    ///
    /// # Cancel safety
    ///
    /// If this future is dropped, the attempt continues for later callers.
    pub(super) async fn attempt<F>(
        &self,
        runtimes: Option<&Runtimes>,
        connect: impl FnOnce() -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>> + Send + 'static,
    {
        let mut outcome = self.under_way_or(|sender| {
            let connecting = connect();
            let attempt = async move {
                let connected = connecting.await;
                sender.send_replace(Some(connected));
            };
            match runtimes {
                Some(runtimes) => runtimes.spawn(attempt),
                None => tokio::spawn(attempt),
            };
        });
        let connected = outcome.wait_for(Option::is_some).await.map(|outcome| outcome.clone());
        // The attempt's runtime has shut down, or the attempt has panicked.
        let no_end = || Err(StoreError::Unavailable("the connection attempt was aborted".into()));
        connected.ok().flatten().unwrap_or_else(no_end)
    }

    fn under_way_or(&self, begin: impl FnOnce(watch::Sender<Outcome<T>>)) -> watch::Receiver<Outcome<T>> {
        let mut attempt = self.attempt.lock();
        // The outcome of a finished attempt is out of date.
        let is_under_way =
            |outcome: &&watch::Receiver<Outcome<T>>| outcome.has_changed().is_ok() && outcome.borrow().is_none();
        if let Some(outcome) = attempt.as_ref().filter(is_under_way) {
            return outcome.clone();
        }
        let (sender, outcome) = watch::channel(None);
        *attempt = Some(outcome.clone());
        begin(sender);
        outcome
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use futures_util::FutureExt;
    use tokio::sync::Notify;

    use super::*;

    /// Attempts that last until they are notified, and return their number.
    #[derive(Default)]
    struct Attempts {
        begun: AtomicU64,
        end: Notify,
    }

    impl Attempts {
        async fn attempt(self: Arc<Self>) -> Result<u64, StoreError> {
            let number = self.begun.fetch_add(1, Ordering::SeqCst) + 1;
            self.end.notified().await;
            Ok(number)
        }
    }

    #[tokio::test]
    async fn concurrent_callers_share_one_attempt_and_later_ones_have_their_own() {
        let connecting = Arc::new(Connecting::default());
        let attempts = Arc::new(Attempts::default());
        for number in 1..=2 {
            let ask = || {
                let (connecting, attempts) = (Arc::clone(&connecting), Arc::clone(&attempts));
                tokio::spawn(async move { connecting.attempt(None, || attempts.attempt()).await })
            };
            let asking: Vec<_> = std::iter::repeat_with(ask).take(100).collect();
            // All of them wait now, since this runtime has one thread.
            tokio::task::yield_now().await;
            attempts.end.notify_one();
            for asked in asking {
                assert_eq!(asked.await.unwrap().unwrap(), number);
            }
        }
        assert_eq!(attempts.begun.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn attempt_continues_after_its_caller_was_dropped() {
        let connecting = Connecting::default();
        let attempts = Arc::new(Attempts::default());
        let ask = || connecting.attempt(None, || Arc::clone(&attempts).attempt());
        assert!(std::pin::pin!(ask()).now_or_never().is_none());
        attempts.end.notify_one();
        assert_eq!(ask().await.unwrap(), 1);
        assert_eq!(attempts.begun.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn attempt_that_panics_is_an_error_and_the_next_one_is_made() {
        let connecting: Connecting<u64> = Connecting::default();
        let panicking = || async { panic!("a panic that this test expects") };
        let failed = connecting.attempt(None, panicking).await;
        assert!(matches!(failed, Err(StoreError::Unavailable(_))), "{failed:?}");
        assert_eq!(connecting.attempt(None, || async { Ok(7) }).await.unwrap(), 7);
    }
}
