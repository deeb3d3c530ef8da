//! The layer on `memory://`. `tests/it/tower.rs` has what concerns servers.

use std::convert::Infallible;
use std::future::{Future, pending};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use ::tower::limit::ConcurrencyLimit;
use ::tower::{ServiceBuilder, ServiceExt, service_fn};
use parking_lot::Mutex;
use tower_layer::Layer;
use tower_service::Service;

use super::{BoxError, Hold, LockLayer, LockLayerError};
use crate::error::LockErrorKind;
use crate::{LockManager, LockMode, LossReason};

/// Time limit for anything that must happen.
const PATIENCE: Duration = Duration::from_secs(60);

/// A request of no particular kind: the key of its lock, if it needs one.
#[derive(Debug, Clone, Default)]
struct Job {
    key: Option<&'static str>,
    hold: Option<Hold>,
}

fn job(key: &'static str) -> Job {
    Job {
        key: Some(key),
        hold: None,
    }
}

fn keep_hold(job: &mut Job, hold: &Hold) {
    job.hold = Some(hold.clone());
}

/// How many calls are running, and how many were running at most.
#[derive(Debug, Default)]
struct Running {
    now: AtomicU32,
    most: AtomicU32,
    calls: AtomicU32,
}

impl Running {
    fn enter(self: &Arc<Self>) -> Leave {
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        self.calls.fetch_add(1, Ordering::SeqCst);
        Leave(Arc::clone(self))
    }

    fn now(&self) -> u32 {
        self.now.load(Ordering::SeqCst)
    }

    fn most(&self) -> u32 {
        self.most.load(Ordering::SeqCst)
    }

    fn calls(&self) -> u32 {
        self.calls.load(Ordering::SeqCst)
    }
}

/// A call, until it ends or is dropped.
struct Leave(Arc<Running>);

impl Drop for Leave {
    fn drop(&mut self) {
        self.0.now.fetch_sub(1, Ordering::SeqCst);
    }
}

async fn manager() -> LockManager {
    LockManager::connect("memory://").await.unwrap()
}

fn lock_error(error: &BoxError) -> &LockLayerError {
    error
        .downcast_ref()
        .unwrap_or_else(|| panic!("not of the layer: {error}"))
}

/// Polls a future once that has something else to wait for.
fn starts<F: Future>(future: Pin<&mut F>) {
    let mut cx = Context::from_waker(Waker::noop());
    assert!(future.poll(&mut cx).is_pending());
}

/// Polls the runtime's other tasks until the condition is true.
async fn until(mut condition: impl FnMut() -> bool) {
    let polling = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(PATIENCE, polling).await.unwrap();
}

#[tokio::test]
async fn requests_of_one_key_are_served_one_at_a_time_and_others_beside_them() {
    let locks = manager().await;
    let (running, requests) = (Arc::new(Running::default()), locks.clone());
    let layer = LockLayer::new(move |job: &Job| Some(requests.lock(job.key?)));
    let counted = Arc::clone(&running);
    let service = ServiceBuilder::new().layer(layer).service(service_fn(move |_: Job| {
        let counted = Arc::clone(&counted);
        async move {
            let _running = counted.enter();
            for _ in 0..3 {
                tokio::task::yield_now().await;
            }
            Ok::<_, Infallible>(())
        }
    }));
    let calls: Vec<_> = (0..20)
        .map(|_| tokio::spawn(service.clone().oneshot(job("k"))))
        .collect();
    for call in calls {
        call.await.unwrap().unwrap();
    }
    assert_eq!((running.most(), running.calls(), running.now()), (1, 20, 0));

    // Another key, and a request without one, are served while the key is held.
    let guard = locks.lock("k").await.unwrap();
    service.clone().oneshot(job("another")).await.unwrap();
    service.clone().oneshot(Job::default()).await.unwrap();
    let mut waiting = pin!(service.oneshot(job("k")));
    starts(waiting.as_mut());
    assert_eq!(running.calls(), 22);
    guard.release().await.unwrap();
    waiting.await.unwrap();
    assert_eq!(running.calls(), 23);
}

#[tokio::test]
async fn service_sees_the_lock_while_it_runs_and_only_then() {
    let locks = manager().await;
    let layer = LockLayer::new(move |job: &Job| Some(locks.lock(job.key?))).attach(keep_hold);
    let mut service = layer.layer(service_fn(async |job: Job| {
        let hold = job.hold.as_ref();
        assert!(hold.is_none_or(|hold| hold.is_valid() && !hold.remaining().is_zero()));
        Ok::<_, Infallible>(job.hold)
    }));
    let first = service.ready().await.unwrap().call(job("k")).await.unwrap().unwrap();
    assert_eq!((first.key(), first.mode()), ("k", LockMode::Exclusive));
    let second = service.ready().await.unwrap().call(job("k")).await.unwrap().unwrap();
    assert!(second.token() > first.token());
    // Also while somebody else has the key, on the same lease.
    for hold in [first, second] {
        assert!(!hold.is_valid() && hold.remaining().is_zero(), "{hold:?}");
    }
    let none = service.ready().await.unwrap().call(Job::default()).await.unwrap();
    assert!(none.is_none());
}

#[tokio::test]
async fn try_fails_at_once_if_the_key_is_held_and_the_service_is_not_called() {
    let locks = manager().await;
    let requests = locks.clone();
    let layer = LockLayer::new(move |job: &Job| Some(requests.try_lock(job.key?)));
    let running = Arc::new(Running::default());
    let counted = Arc::clone(&running);
    let service = layer.layer(service_fn(move |_: Job| {
        drop(counted.enter());
        async { Ok::<_, Infallible>(()) }
    }));
    let guard = locks.lock("k").await.unwrap();
    let error = service.clone().oneshot(job("k")).await.unwrap_err();
    assert!(lock_error(&error).is_busy() && lock_error(&error).lock_error().is_none());
    assert_eq!(error.to_string(), "\"k\" is locked; try again later");
    assert_eq!(running.calls(), 0);
    guard.release().await.unwrap();
    service.oneshot(job("k")).await.unwrap();
    assert_eq!(running.calls(), 1);
}

#[tokio::test]
async fn busy_key_is_answered_in_place_of_the_service_after_a_try_and_after_a_timeout() {
    let locks = manager().await;
    let running = Arc::new(Running::default());
    let serve = |counted: Arc<Running>| {
        service_fn(move |_: Job| {
            drop(counted.enter());
            async { Ok::<_, BoxError>("served") }
        })
    };
    let skip = |job: Job| {
        if job.key == Some("k") {
            "skipped"
        } else {
            "wrong request"
        }
    };
    let (tries, waits) = (locks.clone(), locks.clone());
    let tries = LockLayer::new(move |job: &Job| Some(tries.try_lock(job.key?)))
        .on_busy(skip)
        .layer(serve(Arc::clone(&running)));
    let limit = Duration::from_millis(5);
    let waits = LockLayer::new(move |job: &Job| Some(waits.lock(job.key?).timeout(limit)))
        .on_busy(skip)
        .layer(serve(Arc::clone(&running)));

    let guard = locks.lock("k").await.unwrap();
    assert_eq!(tries.clone().oneshot(job("k")).await.unwrap(), "skipped");
    assert_eq!(waits.clone().oneshot(job("k")).await.unwrap(), "skipped");
    assert_eq!(running.calls(), 0);
    guard.release().await.unwrap();
    assert_eq!(tries.clone().oneshot(job("k")).await.unwrap(), "served");
    assert_eq!(waits.oneshot(job("k")).await.unwrap(), "served");

    // Errors that do not concern the holder are no reason to skip anything.
    locks.shutdown().await.unwrap();
    let error = tries.oneshot(job("k")).await.unwrap_err();
    let kind = lock_error(&error).lock_error().unwrap().kind();
    assert_eq!((kind, lock_error(&error).is_busy()), (LockErrorKind::Closed, false));
}

#[tokio::test]
async fn timeout_is_a_busy_error_of_a_request_that_waits() {
    let locks = manager().await;
    let requests = locks.clone();
    let limit = Duration::from_millis(5);
    let layer = LockLayer::new(move |job: &Job| Some(requests.lock(job.key?).timeout(limit)));
    let service = layer.layer(service_fn(async |_: Job| Ok::<_, Infallible>(())));
    let guard = locks.lock("k").await.unwrap();
    let error = service.oneshot(job("k")).await.unwrap_err();
    assert!(
        matches!(lock_error(&error), LockLayerError::NotAcquired(error) if error.is_timeout()),
        "{error:?}"
    );
    assert!(lock_error(&error).is_busy());
    guard.release().await.unwrap();
}

#[tokio::test]
async fn invalid_key_is_an_error_and_not_a_panic() {
    let locks = manager().await;
    for layer in [
        LockLayer::new({
            let locks = locks.clone();
            move |_: &Job| Some(locks.lock(""))
        })
        .layer(service_fn(async |_: Job| Ok::<_, Infallible>(())))
        .oneshot(Job::default())
        .await,
        LockLayer::new(move |_: &Job| Some(locks.try_lock("")))
            .layer(service_fn(async |_: Job| Ok::<_, Infallible>(())))
            .oneshot(Job::default())
            .await,
    ] {
        let error = layer.unwrap_err();
        let kind = lock_error(&error).lock_error().unwrap().kind();
        assert_eq!(kind, LockErrorKind::Invalid);
    }
}

#[tokio::test]
async fn service_is_dropped_when_the_lock_is_lost() {
    let locks = manager().await;
    let requests = locks.clone();
    let brief = Duration::from_millis(20);
    let layer = LockLayer::new(move |job: &Job| Some(requests.lock(job.key?).max_hold(brief))).attach(keep_hold);
    let (running, holds) = (Arc::new(Running::default()), Arc::new(Mutex::new(Vec::new())));
    let (counted, kept) = (Arc::clone(&running), Arc::clone(&holds));
    let service = layer.layer(service_fn(move |job: Job| {
        kept.lock().extend(job.hold);
        let running = counted.enter();
        async move {
            pending::<()>().await;
            drop(running);
            Ok::<_, Infallible>(())
        }
    }));
    let response = tokio::time::timeout(PATIENCE, service.oneshot(job("k")));
    let error = response.await.unwrap().unwrap_err();
    let LockLayerError::Lost(lost) = lock_error(&error) else {
        panic!("{error:?}");
    };
    let hold = holds.lock().pop().unwrap();
    assert_eq!(
        (lost.loss_reason(), lost.token()),
        (Some(LossReason::MaxHold), Some(hold.token()))
    );
    assert!(!lock_error(&error).is_busy() && !hold.is_valid());
    assert_eq!((running.calls(), running.now()), (1, 0));
    locks.lock("k").await.unwrap().release().await.unwrap();
}

/// The service runs to its end without an await, so it can't be dropped.
#[tokio::test]
async fn response_of_a_service_that_outlived_its_lock_is_an_error() {
    let locks = manager().await;
    let requests = locks.clone();
    let brief = Duration::from_millis(5);
    let layer = LockLayer::new(move |job: &Job| Some(requests.lock(job.key?).max_hold(brief))).attach(keep_hold);
    let service = layer.layer(service_fn(async |job: Job| {
        let hold = job.hold.unwrap();
        while hold.is_valid() {
            std::thread::yield_now();
        }
        Ok::<_, Infallible>(())
    }));
    let error = service.oneshot(job("k")).await.unwrap_err();
    assert!(matches!(lock_error(&error), LockLayerError::Lost(_)), "{error:?}");
}

#[tokio::test]
async fn dropped_response_gives_up_the_lock_or_the_place_in_the_queue() {
    let locks = manager().await;
    let requests = locks.clone();
    let layer = LockLayer::new(move |job: &Job| Some(requests.lock(job.key?))).attach(keep_hold);
    let (running, holds) = (Arc::new(Running::default()), Arc::new(Mutex::new(Vec::new())));
    let (counted, kept) = (Arc::clone(&running), Arc::clone(&holds));
    let service = layer.layer(service_fn(move |job: Job| {
        kept.lock().extend(job.hold);
        let running = counted.enter();
        async move {
            pending::<()>().await;
            drop(running);
            Ok::<_, Infallible>(())
        }
    }));
    let serving = tokio::spawn(service.clone().oneshot(job("k")));
    until(|| running.now() == 1).await;
    let waiting = tokio::spawn(service.oneshot(job("k")));
    tokio::task::yield_now().await;
    waiting.abort();
    assert!(waiting.await.unwrap_err().is_cancelled());
    assert!(locks.try_lock("k").await.unwrap().is_none());

    serving.abort();
    assert!(serving.await.unwrap_err().is_cancelled());
    assert_eq!((running.calls(), running.now()), (1, 0));
    assert!(!holds.lock()[0].is_valid());
    locks.lock("k").await.unwrap().release().await.unwrap();
}

#[tokio::test]
async fn errors_and_panics_of_the_service_release_the_lock() {
    let locks = manager().await;
    let requests = locks.clone();
    let layer = LockLayer::new(move |job: &Job| Some(requests.lock(job.key?)));
    let service = layer.layer(service_fn(async |job: Job| match job.key {
        Some("panic") => panic!("on purpose"),
        _ => Err::<(), _>(std::io::Error::other("of the service")),
    }));
    let error = service.clone().oneshot(job("k")).await.unwrap_err();
    assert_eq!(
        error.downcast_ref::<std::io::Error>().unwrap().to_string(),
        "of the service"
    );
    assert!(locks.try_lock("k").await.unwrap().is_some());

    let panicked = tokio::spawn(service.oneshot(job("panic"))).await.unwrap_err();
    assert!(panicked.is_panic());
    locks.lock("panic").await.unwrap().release().await.unwrap();
}

#[tokio::test]
async fn lock_is_free_as_soon_as_the_response_is_there() {
    let here = LockManager::connect("memory://tower-release").await.unwrap();
    let there = LockManager::connect("memory://tower-release").await.unwrap();
    let layer = LockLayer::new(move |job: &Job| Some(here.lock(job.key?)));
    let mut service = layer.layer(service_fn(async |_: Job| Ok::<_, Infallible>(())));
    for _ in 0..20 {
        service.ready().await.unwrap().call(job("k")).await.unwrap();
        let guard = there.try_lock("k").await.unwrap();
        guard.expect("the lock was released").release().await.unwrap();
    }
}

#[tokio::test]
async fn each_request_chooses_its_mode() {
    let locks = manager().await;
    let requests = locks.clone();
    let layer = LockLayer::new(move |job: &Job| {
        let key = job.key?;
        Some(match key {
            "partner" => requests.try_permits(key, 2),
            _ => requests.try_lock(key).shared(),
        })
    })
    .attach(keep_hold);
    let service = layer.layer(service_fn(async |job: Job| {
        Ok::<_, Infallible>(job.hold.unwrap().mode())
    }));
    let reader = locks.lock("prices").shared().await.unwrap();
    assert_eq!(service.clone().oneshot(job("prices")).await.unwrap(), LockMode::Shared);
    reader.release().await.unwrap();

    let one = locks.permits("partner", 2).await.unwrap();
    let mode = service.clone().oneshot(job("partner")).await.unwrap();
    assert_eq!(mode, LockMode::Permits { weight: 1, limit: 2 });
    let two = locks.permits("partner", 2).await.unwrap();
    let error = service.oneshot(job("partner")).await.unwrap_err();
    assert!(lock_error(&error).is_busy());
    one.release().await.unwrap();
    two.release().await.unwrap();
}

/// A service that must be polled before each call, and whose clones are not ready.
struct Strict {
    is_ready: bool,
}

impl Clone for Strict {
    fn clone(&self) -> Self {
        Self { is_ready: false }
    }
}

impl Service<Job> for Strict {
    type Response = ();
    type Error = BoxError;
    type Future = std::future::Ready<Result<(), BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.is_ready = true;
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Job) -> Self::Future {
        let is_ready = std::mem::take(&mut self.is_ready);
        std::future::ready(if is_ready {
            Ok(())
        } else {
            Err("called before it was ready".into())
        })
    }
}

#[tokio::test]
async fn service_that_was_polled_is_the_one_that_is_called() {
    let locks = manager().await;
    let layer = LockLayer::new(move |job: &Job| Some(locks.lock(job.key?)));
    let mut service = layer.layer(Strict { is_ready: false });
    for job in [job("k"), Job::default(), job("k")] {
        service.ready().await.unwrap().call(job.clone()).await.unwrap();
        // The next call needs another poll.
        assert!(service.call(job).await.is_err());
    }
}

#[tokio::test]
async fn refused_request_frees_its_place_in_a_concurrency_limit() {
    let locks = manager().await;
    let requests = locks.clone();
    let layer = LockLayer::new(move |job: &Job| Some(requests.try_lock(job.key?)));
    let inner = service_fn(async |_: Job| Ok::<_, Infallible>(()));
    let mut service = layer.layer(ConcurrencyLimit::new(inner, 1));
    let guard = locks.lock("k").await.unwrap();
    for _ in 0..3 {
        let error = service.ready().await.unwrap().call(job("k")).await.unwrap_err();
        assert!(lock_error(&error).is_busy());
    }
    guard.release().await.unwrap();

    // A request that waits keeps its place, as the documentation of the module explains.
    let guard = locks.lock("k").await.unwrap();
    let layer = LockLayer::new({
        let locks = locks.clone();
        move |job: &Job| Some(locks.lock(job.key?))
    });
    let inner = service_fn(async |_: Job| Ok::<_, Infallible>(()));
    let mut service = layer.layer(ConcurrencyLimit::new(inner, 1));
    let mut waiting = Box::pin(service.ready().await.unwrap().call(job("k")));
    starts(waiting.as_mut());
    let mut cx = Context::from_waker(Waker::noop());
    assert!(Service::<Job>::poll_ready(&mut service, &mut cx).is_pending());
    guard.release().await.unwrap();
    waiting.await.unwrap();
    service.ready().await.unwrap().call(job("k")).await.unwrap();
}

#[tokio::test]
async fn error_of_a_service_that_does_not_become_ready_is_passed_on() {
    #[derive(Clone)]
    struct Broken;

    impl Service<Job> for Broken {
        type Response = ();
        type Error = BoxError;
        type Future = std::future::Pending<Result<(), BoxError>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
            Poll::Ready(Err("broken".into()))
        }

        fn call(&mut self, _: Job) -> Self::Future {
            pending()
        }
    }

    let locks = manager().await;
    let service = LockLayer::new(move |job: &Job| Some(locks.lock(job.key?))).layer(Broken);
    assert_eq!(service.oneshot(job("k")).await.unwrap_err().to_string(), "broken");
}
