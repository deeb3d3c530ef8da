//! Each limit has its own error, which states the limit, and reaching a limit loses nothing.

use std::task::Poll;
use std::time::Duration;

use shardlock::config::Builder;
use shardlock::error::LockErrorKind;
use shardlock::{LockError, LockKey, LockManager};
use support_locks::{STORE_TIMEOUT, connect};

/// Settings for a busy machine.
fn builder() -> Builder {
    LockManager::builder().store_timeout(STORE_TIMEOUT)
}

/// Enqueues requests by polling each of them once.
async fn enqueued(requests: Vec<shardlock::LockRequest>) -> Vec<std::pin::Pin<Box<shardlock::LockFuture>>> {
    let mut waiting = Vec::new();
    for request in requests {
        let mut future = Box::pin(request.into_future());
        assert!(
            std::future::poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx)))
                .await
                .is_pending()
        );
        waiting.push(future);
    }
    waiting
}

#[tokio::test]
async fn the_waiters_of_one_key_are_limited() {
    let locks = builder()
        .shard("memory://limit-per-key")
        .max_waiters_per_key(2)
        .connect()
        .await
        .unwrap();
    let guard = locks.lock("k").await.unwrap();
    let mut waiting = enqueued(vec![locks.lock("k"), locks.lock("k")]).await;
    let error = locks.lock("k").await.unwrap_err();
    assert!(
        (error.kind(), error.in_use(), error.limit()) == (LockErrorKind::QueueFull, Some(2), Some(2)),
        "{error:?}"
    );
    assert!(
        error.to_string().contains("max_waiters_per_key = 2") && error.is_retryable(),
        "{error}"
    );
    // Another key is not affected, and an abandoned place becomes free again.
    locks.lock("other").await.unwrap().release().await.unwrap();
    waiting.pop();
    let mut again = enqueued(vec![locks.lock("k")]).await;
    guard.release().await.unwrap();
    waiting.remove(0).await.unwrap().release().await.unwrap();
    again.remove(0).await.unwrap().release().await.unwrap();
}

/// Regression: when a key had the maximum number of waiters, `try_lock` was refused as one waiter
/// too many, although a try never waits.
#[tokio::test]
async fn try_is_not_limited_by_max_waiters_per_key() {
    let locks = builder()
        .shard("memory://limit-try")
        .max_waiters_per_key(1)
        .connect()
        .await
        .unwrap();
    let guard = locks.lock("k").await.unwrap();
    let mut waiting = enqueued(vec![locks.lock("k")]).await;
    assert!(locks.try_lock("k").await.unwrap().is_none());
    let error = locks.lock("k").timeout(Duration::ZERO).await.unwrap_err();
    assert!(error.is_timeout(), "{error}");
    guard.release().await.unwrap();
    waiting.remove(0).await.unwrap().release().await.unwrap();
}

#[tokio::test]
async fn all_waiters_together_are_limited() {
    let locks = builder()
        .shard("memory://limit-in-all")
        .max_waiters(2)
        .connect()
        .await
        .unwrap();
    let guards = [locks.lock("a").await.unwrap(), locks.lock("b").await.unwrap()];
    let waiting = enqueued(vec![locks.lock("a"), locks.lock("b")]).await;
    let error = locks.lock("c").await.unwrap_err();
    assert!(
        (error.kind(), error.in_use(), error.limit()) == (LockErrorKind::TooManyWaiters, Some(2), Some(2)),
        "{error:?}"
    );
    assert!(error.to_string().contains("max_waiters = 2"), "{error}");
    drop(waiting);
    locks.lock("c").await.unwrap().release().await.unwrap();
    drop(guards);
}

#[tokio::test]
async fn the_keys_of_a_process_are_limited() {
    let locks = builder()
        .shard("memory://limit-keys")
        .max_keys(2)
        .connect()
        .await
        .unwrap();
    let guards = [locks.lock("a").await.unwrap(), locks.lock("b").await.unwrap()];
    let error = locks.lock("c").await.unwrap_err();
    assert!(
        (error.kind(), error.in_use(), error.limit()) == (LockErrorKind::TooManyKeys, Some(2), Some(2)),
        "{error:?}"
    );
    for guard in guards {
        guard.release().await.unwrap();
    }
    locks.lock("c").await.unwrap().release().await.unwrap();
}

/// Regression: each shard counted its own keys, so a process with two shards could use twice as
/// many as `max_keys` allows.
#[tokio::test]
async fn max_keys_applies_to_all_shards_together() {
    let locks = builder()
        .shard("memory://limit-keys-a")
        .shard("memory://limit-keys-b")
        .max_keys(2)
        .connect()
        .await
        .unwrap();
    let shard_of = |key: &str| locks.shard_map().index(LockKey::new(key).unwrap().slot());
    let of = |shard| {
        let keys = (0..40).map(|key| format!("k{key}"));
        keys.filter(move |key| shard_of(key) == shard)
            .take(2)
            .collect::<Vec<_>>()
    };
    let (one, other) = (of(0), of(1));
    for _ in 0..3 {
        let guards = [locks.lock(&one[0]).await.unwrap(), locks.lock(&other[0]).await.unwrap()];
        for key in [&one[1], &other[1]] {
            let error = locks.lock(key).await.unwrap_err();
            assert!(
                (error.kind(), error.in_use(), error.limit()) == (LockErrorKind::TooManyKeys, Some(2), Some(2)),
                "{error:?}"
            );
        }
        for guard in guards {
            guard.release().await.unwrap();
        }
    }
}

#[tokio::test]
async fn request_options_are_checked_against_the_bounds_of_the_configuration() {
    let locks = connect("memory://limit-bounds").await;
    let refused = |error: LockError| {
        assert!(error.kind() == LockErrorKind::Invalid, "{error:?}");
        error.to_string()
    };
    let zero = refused(locks.lock("k").ttl(Duration::ZERO).await.unwrap_err());
    assert!(zero.contains("ttl is 0s") && zero.contains("from 50ms to 1d"), "{zero}");
    let long = refused(locks.lock("k").ttl(Duration::MAX).await.unwrap_err());
    assert!(long.contains("from 50ms to 1d"), "{long}");
    let patient = refused(locks.lock("k").timeout(Duration::MAX).await.unwrap_err());
    assert!(patient.contains("timeout is") && patient.contains("365d"), "{patient}");
    let hold = refused(locks.lock("k").max_hold(Duration::ZERO).await.unwrap_err());
    assert!(hold.contains("max_hold is 0s"), "{hold}");
    let empty = refused(locks.lock("").await.unwrap_err());
    assert!(
        empty.contains("key is empty") && empty.contains("1 to 512 bytes"),
        "{empty}"
    );
    let tried = refused(locks.try_lock("k").ttl(Duration::from_millis(1)).await.unwrap_err());
    assert!(tried.contains("ttl is 1ms"), "{tried}");
    // Nothing is left behind.
    locks
        .try_lock("k")
        .await
        .unwrap()
        .expect("the key is free")
        .release()
        .await
        .unwrap();
}

/// Regression: the limit was higher than the number of leases that one shard can renew, so leases
/// were lost instead of new ones refused.
#[tokio::test]
async fn keys_are_limited_to_what_a_shard_renews_unless_overridden() {
    assert_eq!(shardlock::config::Config::default().max_keys, 100_000);
}
