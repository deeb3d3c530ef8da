//! Running a body under a lock, for as long as the lock is held.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;

/// Polls `body` to its end. If the lock is lost first, drops the body and returns `None`.
///
/// `is_valid` is asked before each poll. The loss of a lock whose lease expired during a pause of
/// the process is reported a moment after the pause, and without this check a body that is ready
/// could run up to its next await point before that.
pub(crate) async fn while_held<T>(
    lost: impl Future,
    is_valid: impl Fn() -> bool,
    body: impl Future<Output = T>,
) -> Option<T> {
    let (mut lost, mut body) = (pin!(lost), pin!(body));
    poll_fn(|cx| {
        if lost.as_mut().poll(cx).is_ready() || !is_valid() {
            return Poll::Ready(None);
        }
        body.as_mut().poll(cx).map(Some)
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::pending;
    use std::pin::pin;
    use std::task::{Context, Waker};

    use super::*;

    #[test]
    fn body_is_not_polled_once_the_lock_is_invalid_although_no_loss_was_reported() {
        let (is_valid, polls) = (Cell::new(true), Cell::new(0));
        let body = poll_fn(|_| {
            polls.set(polls.get() + 1);
            Poll::<()>::Pending
        });
        let mut running = pin!(while_held(pending::<()>(), || is_valid.get(), body));
        let mut cx = Context::from_waker(Waker::noop());
        assert!(running.as_mut().poll(&mut cx).is_pending());
        is_valid.set(false);
        assert_eq!(running.as_mut().poll(&mut cx), Poll::Ready(None));
        assert_eq!(polls.get(), 1);
    }

    #[tokio::test]
    async fn loss_is_preferred_to_a_body_that_is_ready() {
        assert_eq!(while_held(async {}, || true, async { 1 }).await, None);
        assert_eq!(while_held(pending::<()>(), || true, async { 1 }).await, Some(1));
    }
}
