//! Leader election: one leader at a time among any number of processes.

use std::sync::Arc;
use std::time::Duration;

use tracing::field::display;

use crate::backoff::Backoff;
use crate::body::while_held;
use crate::clock::Moment;
use crate::error::{Failure, InvalidSetting, LockError, LockErrorKind, LossReason};
use crate::guard::LockGuard;
use crate::key::LockKey;
use crate::manager_inner::ManagerInner;
use crate::request::LockRequest;

/// The bounds of the pause before the next campaign. See [`Backoff`].
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// The class under which metrics count campaigns, unless another one is set.
const CLASS: &str = "leader";

/// Takes part in the election of a leader. Created by
/// [`LockManager::election`](crate::LockManager::election). Override settings as needed, then call
/// [`lead`](Self::lead):
///
/// ```
/// use std::time::Duration;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), shardlock::LockError> {
/// # let locks = shardlock::LockManager::connect("memory://").await?;
/// let election = locks.election("scheduler").ttl(Duration::from_secs(5));
/// let token = election.lead(async |term| term.token()).await?;
/// println!("led with token {token}");
/// # Ok(()) }
/// ```
#[must_use = "an election does nothing until `lead` is awaited"]
#[derive(Debug, Clone)]
pub struct Election {
    request: LockRequest,
}

impl Election {
    #[track_caller]
    pub(crate) fn new(manager: Arc<ManagerInner>, key: Result<LockKey, InvalidSetting>) -> Self {
        // A leader leads until it ends or loses its lease, whatever the limits for other locks.
        let request = LockRequest::new(manager, key)
            .timeout(None)
            .max_hold(None)
            .min_hold(Duration::ZERO)
            .linger(Duration::ZERO)
            .class(CLASS);
        Self { request }
    }

    /// Sets how long the leader's lease lasts without renewal: 50 ms to 24 h. If the leader dies,
    /// the next one begins within this time. A leader that can't reach the server stops within this
    /// time.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.request = self.request.ttl(ttl);
        self
    }

    /// Sets the class under which metrics count the campaigns, instead of `leader`.
    pub fn class(mut self, class: &str) -> Self {
        self.request = self.request.class(class);
        self
    }

    /// Waits until this process is the leader, runs `body` as the leader, and returns its value.
    ///
    /// A leader holds the lock on the key, so at most one of all processes that call this with the
    /// same key leads at a time. `body` gets the guard of its term. The
    /// [`token`](LockGuard::token) of a term is larger than that of every earlier term: send it
    /// along with every write, so that a resource can reject a former leader.
    ///
    /// If the lease is lost, the body is cancelled at once: its future is dropped at its current
    /// await point. This process then campaigns again after a short random pause, and calls `body`
    /// anew when it leads again. A body must therefore expect to be interrupted at each await, and
    /// state that it keeps outside of itself must make sense to its next run. If the process was
    /// paused for longer than the lease lasts, the body is not continued after the pause. Only code
    /// between two awaits can run past the end of the lease.
    ///
    /// Campaigning has no time limit. If the shard can't be reached or refuses, the reason is
    /// logged, and the campaign begins anew after a random pause of at most one second.
    ///
    /// When the body has returned, leadership ends and the lock goes to the next process. To lead
    /// until the program ends, the body must not return. If the lease turns out to be lost only
    /// when it is released after that, this is logged, and the value is returned.
    ///
    /// # Errors
    ///
    /// - [`LockErrorKind::Closed`] once the manager is shut down: immediately while this process
    ///   leads or waits, after the body was cancelled, and within a second during a pause.
    /// - [`LockErrorKind::Invalid`] if the key or the TTL is outside its bounds.
    /// - [`LockErrorKind::ShardMapMismatch`] if the shard has another shard map.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the place in the queue, or drops the body at its current await
    /// point and then releases the lock.
    ///
    /// # Examples
    ///
    /// The future is `Send` if that of the body is, so it can be spawned. The compiler accepts this
    /// for functions and for `async move` closures, which own what they capture, and may keep state
    /// from one term to the next:
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// use shardlock::{LockGuard, LockManager};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # async fn assign_jobs(_term: &LockGuard) -> bool { true }
    /// let locks = LockManager::connect("memory://").await?;
    /// let leading = tokio::spawn(async move {
    ///     let mut terms = 0;
    ///     let body = async move |term: &LockGuard| {
    ///         terms += 1;
    ///         println!("term {terms} of this process, token {}", term.token());
    ///         while !assign_jobs(term).await {
    ///             tokio::time::sleep(Duration::from_secs(1)).await;
    ///         }
    ///     };
    ///     locks.lead("scheduler", body).await
    /// });
    /// leading.await??;
    /// # Ok(()) }
    /// ```
    pub async fn lead<T>(self, mut body: impl AsyncFnMut(&LockGuard) -> T) -> Result<T, LockError> {
        let mut backoff = Backoff::new(PAUSE_MIN, PAUSE_MAX);
        let log = ElectionLog {
            names_keys: self.request.names_keys(),
        };
        loop {
            let term = match self.request.clone().await {
                Ok(term) => term,
                Err(error) if ends_election(&error) => return Err(error),
                Err(error) => {
                    log.failed(&error, "a campaign failed; campaigning again");
                    backoff.wait().await;
                    continue;
                }
            };
            let since = Moment::now();
            log.leads(&term);
            let Some(value) = while_held(term.lost(), || term.is_valid(), body(&term)).await else {
                let reason = term.lost().await;
                if reason == LossReason::Closed {
                    return Err(Failure::Closed.into());
                }
                log.failed(
                    &term.lost_error(reason),
                    "this process no longer leads; campaigning again",
                );
                drop(term);
                // A term that lasted shows that the earlier failures are over.
                if Moment::now().since(since) >= PAUSE_MAX {
                    backoff.reset();
                }
                backoff.wait().await;
                continue;
            };
            if let Err(error) = term.release().await {
                log.failed(&error, "the end of a term was not confirmed");
            }
            return Ok(value);
        }
    }
}

/// The log lines of an election.
#[derive(Debug, Clone, Copy)]
struct ElectionLog {
    /// Whether lines above debug level may contain the key, which every error does.
    names_keys: bool,
}

impl ElectionLog {
    fn leads(self, term: &LockGuard) {
        let (key, token) = (term.key(), term.token());
        let named = self.names_keys.then_some(key);
        crate::log::info!(key = named, %token, "this process leads");
        crate::log::debug!(key, %token, "the election that this process has won");
    }

    fn failed(self, error: &LockError, what: &'static str) {
        let kind = error.kind();
        let shown = self.names_keys.then(|| display(error));
        crate::log::warn!(?kind, error = shown, "{what}");
        crate::log::debug!(%error, "{what}");
    }
}

/// Whether no later campaign can succeed without a change by the caller or an operator.
fn ends_election(error: &LockError) -> bool {
    matches!(
        error.kind(),
        LockErrorKind::Closed | LockErrorKind::Invalid | LockErrorKind::ShardMapMismatch
    )
}
