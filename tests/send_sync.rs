//! Types and futures that must be `Send` and `Sync`. Compiling is the test.

use shardlock::config::{Builder, Config};
use shardlock::{LockError, LockFuture, LockGuard, LockManager, LockRequest, TryLockFuture, TryLockRequest};

fn send<T: Send>(value: T) -> T {
    value
}

fn all<T: Send + Sync + 'static>() {}

#[test]
fn everything_public_can_be_sent_and_shared() {
    all::<LockManager>();
    all::<LockGuard>();
    all::<LockRequest>();
    all::<TryLockRequest>();
    all::<LockError>();
    all::<Config>();
    all::<Builder>();
    send::<Option<LockFuture>>(None);
    send::<Option<TryLockFuture>>(None);
}

#[tokio::test]
async fn all_futures_can_be_sent() {
    let locks = send(LockManager::connect("memory://send-sync")).await.unwrap();
    let guard = send(locks.lock("k").into_future()).await.unwrap();
    drop(send(guard.lost()));
    send(guard.release()).await.unwrap();
    send(locks.inspect("k")).await.unwrap();
    // The body of another task: its whole future is sent to the runtime.
    let other = locks.clone();
    let body = tokio::spawn(async move { other.with_lock("k", async |guard| guard.token()).await });
    body.await.unwrap().unwrap();
    send(locks.shutdown()).await.unwrap();
}
