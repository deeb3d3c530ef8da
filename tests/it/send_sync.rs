//! Types and futures that must be `Send` and `Sync`. Compiling is the test.

use shardlock::config::{Builder, Config};
use shardlock::{LockError, LockFuture, LockGuard, LockManager, LockRequest, TryLockFuture, TryLockRequest};
use support_locks::{STORE_TIMEOUT, connect};

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
    drop(send(LockManager::connect("memory://send-sync")));
    let builder = Builder::default().shard("memory://send-sync");
    let locks = send(builder.store_timeout(STORE_TIMEOUT).connect()).await.unwrap();
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

/// What a server of tower requires of a service.
#[cfg(feature = "tower")]
#[test]
fn service_with_a_lock_can_be_sent_and_shared() {
    use shardlock::tower::{Hold, LockLayer, LockLayerError, ResponseFuture};
    use tower::Layer;

    fn shared<T: Clone + Send + Sync + 'static>(_: T) {}

    all::<Hold>();
    all::<LockLayerError>();
    send::<Option<ResponseFuture<()>>>(None);
    let lock_of = |_: &()| None::<LockRequest>;
    let layer = LockLayer::new(lock_of)
        .attach(|(): &mut (), _: &Hold| {})
        .on_busy(|()| ());
    shared(layer.layer(tower::service_fn(|()| std::future::ready(Ok::<_, LockLayerError>(())))));
    shared(layer);
}

/// A body that keeps the guard across an await.
async fn named_body(guard: &LockGuard) -> u64 {
    tokio::task::yield_now().await;
    guard.token().get()
}

/// The kinds of bodies that a task may have: a function, and closures that borrow or own what they
/// capture and keep it and the guard across an await.
#[tokio::test]
async fn bodies_under_a_lock_can_be_spawned() {
    let locks = connect("memory://").await;
    let other = locks.clone();
    let named = tokio::spawn(async move { other.with_lock("k", named_body).await });
    assert!(named.await.unwrap().unwrap() > 0);

    let (other, text) = (locks.clone(), String::from("borrowed"));
    let borrowing = tokio::spawn(async move {
        let body = async |guard: &LockGuard| {
            tokio::task::yield_now().await;
            (text.len(), guard.is_valid())
        };
        let seen = other.lock("k").with(body).await;
        (seen, text)
    });
    let (seen, text) = borrowing.await.unwrap();
    assert_eq!((seen.unwrap(), text.as_str()), ((8, true), "borrowed"));

    let (other, text) = (locks.clone(), String::from("owned"));
    let owning = tokio::spawn(async move {
        let body = async move |guard: &LockGuard| {
            tokio::task::yield_now().await;
            assert!(guard.is_valid());
            text
        };
        other.with_lock(String::from("k"), body).await
    });
    assert_eq!(owning.await.unwrap().unwrap(), "owned");

    // The future itself, without a task around it.
    let request = locks.lock("k");
    send(request.with(async |guard| guard.token())).await.unwrap();
}
