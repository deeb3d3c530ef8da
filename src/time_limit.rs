//! Time limits measured on the machine's clock.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use crate::clock::Moment;

/// How far tokio's clock advances at a time if it is paused.
const STEP: Duration = Duration::from_millis(1);
/// After this time, check whether tokio's clock is paused. Most requests complete sooner.
const SUSPECT_AFTER: Duration = Duration::from_millis(2);

/// The time limit of a future has elapsed.
#[derive(Debug)]
pub(crate) struct Elapsed;

/// Waits for a future until `limit` has passed since `started`.
///
/// The clock of a tokio runtime can be paused in tests. It then jumps to the next timer whenever
/// the runtime is idle, although a server or another thread has yet to reply. So a timer that fires
/// too early by the machine's clock is ignored. From then on, tokio's clock advances at the speed
/// of the machine's clock while this function waits.
///
/// The caller pins the future: passed by value, it would take up space in both futures.
pub(crate) async fn within<T>(
    started: Moment,
    limit: Duration,
    mut future: Pin<&mut (impl Future<Output = T> + ?Sized)>,
) -> Result<T, Elapsed> {
    let left = || limit.saturating_sub(Moment::now().since(started));
    let (first, first_left) = (Moment::now(), left().min(SUSPECT_AFTER));
    if let Ok(done) = tokio::time::timeout(first_left, future.as_mut()).await {
        return Ok(done);
    }
    if Moment::now().since(first) >= first_left
        && let Ok(done) = tokio::time::timeout(left(), future.as_mut()).await
    {
        return Ok(done);
    }
    while !left().is_zero() {
        // The clock does not jump while a blocking task is running.
        let nap = tokio::task::spawn_blocking(|| std::thread::sleep(STEP));
        tokio::select! {
            done = future.as_mut() => return Ok(done),
            _ = nap => {}
        }
        if let Ok(done) = tokio::time::timeout(STEP, future.as_mut()).await {
            return Ok(done);
        }
    }
    Err(Elapsed)
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn limit_follows_the_system_clock_while_the_tokio_clock_is_paused() {
        let started = Moment::now();
        let (done, completed) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            done.send(()).ok();
        });
        assert!(within(started, Duration::from_secs(60), pin!(completed)).await.is_ok());
        assert!(Moment::now().since(started) >= Duration::from_millis(50));

        let (started, limit) = (Moment::now(), Duration::from_millis(30));
        assert!(
            within(started, limit, pin!(std::future::pending::<()>()))
                .await
                .is_err()
        );
        assert!(Moment::now().since(started) >= limit);
    }
}
