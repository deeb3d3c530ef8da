//! The layer on real servers: other processes, leases that are deleted, servers that are gone.
//! `src/tower/tests.rs` has the rules themselves.

use std::convert::Infallible;
use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use http::{Request, Response};
use shardlock::error::LockErrorKind;
use shardlock::tower::{BoxError, Hold, LockLayer, LockLayerError};
use shardlock::{FencingToken, LockManager, LossReason};
use support::PATIENCE;
use support_locks::{TestStore, lock, on_each_store, soon, until};
use tokio::sync::mpsc;
use tower::util::BoxCloneService;
use tower::{ServiceBuilder, ServiceExt, service_fn};

type Service = BoxCloneService<Request<()>, Response<FencingToken>, BoxError>;

fn request(path: &str) -> Request<()> {
    Request::put(path).body(()).expect("a request")
}

/// A service whose requests are locked by their paths, in two processes.
fn service(locks: LockManager, inside: &Arc<AtomicU32>) -> Service {
    let layer = LockLayer::new(move |request: &Request<()>| Some(locks.lock(request.uri().path()).timeout(PATIENCE)))
        .attach(|request: &mut Request<()>, hold: &Hold| {
            request.extensions_mut().insert(hold.clone());
        });
    let inside = Arc::clone(inside);
    let handler = move |request: Request<()>| {
        let inside = Arc::clone(&inside);
        async move {
            let hold: &Hold = request.extensions().get().expect("the layer has attached it");
            assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "two requests at once");
            tokio::task::yield_now().await;
            assert!(hold.is_valid());
            inside.fetch_sub(1, Ordering::SeqCst);
            Ok::<_, Infallible>(Response::new(hold.token()))
        }
    };
    ServiceBuilder::new()
        .layer(layer)
        .service(service_fn(handler))
        .boxed_clone()
}

/// A service that never responds, and sends the token of each call.
fn stuck(locks: LockManager) -> (Service, mpsc::UnboundedReceiver<FencingToken>) {
    let (started, calls) = mpsc::unbounded_channel();
    let layer = LockLayer::new(move |request: &Request<()>| Some(locks.lock(request.uri().path()))).attach(
        |request: &mut Request<()>, hold: &Hold| {
            request.extensions_mut().insert(hold.token());
        },
    );
    let handler = move |request: Request<()>| {
        let token = request.extensions().get().expect("the layer has attached it");
        started.send(*token).expect("the test listens");
        pending::<Result<Response<FencingToken>, Infallible>>()
    };
    let service = ServiceBuilder::new().layer(layer).service(service_fn(handler));
    (service.boxed_clone(), calls)
}

on_each_store! {
    on(memory redis);

    async fn requests_of_one_key_are_served_one_at_a_time_in_all_processes(store: &TestStore) {
        let inside = Arc::new(AtomicU32::new(0));
        let (here, there) = (store.manager().await, store.manager().await);
        let services = [service(here.clone(), &inside), service(there, &inside)];
        let calls: Vec<_> = (0..40)
            .map(|index| tokio::spawn(services[index % 2].clone().oneshot(request("/accounts/7"))))
            .collect();
        let mut tokens = Vec::new();
        for call in calls {
            let response = soon("a response", call).await.expect("a task").expect("a response");
            tokens.push(response.into_body());
        }
        tokens.sort_unstable();
        tokens.dedup();
        assert_eq!(tokens.len(), 40);
        store.is_empty(&here, "/accounts/7").await;
    }

    async fn dropped_response_leaves_nothing_locked(store: &TestStore) {
        let (here, there) = (store.manager().await, store.manager().await);
        let (service, mut calls) = stuck(here.clone());
        let serving = tokio::spawn(service.clone().oneshot(request("/k")));
        soon("the call", calls.recv()).await.expect("a call");
        let waiting = tokio::spawn(service.oneshot(request("/k")));
        assert!(there.try_lock("/k").await.expect("a try").is_none());
        for task in [waiting, serving] {
            task.abort();
            assert!(task.await.expect_err("it was aborted").is_cancelled());
        }
        lock(&there, "/k").await.release().await.expect("release");
        store.is_empty(&here, "/k").await;
    }
}

on_each_store! {
    on(redis);

    async fn service_is_dropped_when_its_lease_is_deleted(store: &TestStore) {
        let here = store.builder().ttl(Duration::from_secs(3)).connect().await.expect("connect");
        let there = store.manager().await;
        let (service, mut calls) = stuck(here);
        let serving = tokio::spawn(service.oneshot(request("/k")));
        let token = soon("the call", calls.recv()).await.expect("a call");
        store.servers().delete(&store.lease("/k"));
        let error = soon("the loss", serving).await.expect("a task").expect_err("the lease is gone");
        let Some(LockLayerError::Lost(lost)) = error.downcast_ref() else {
            panic!("not a loss: {error}");
        };
        assert_eq!((lost.loss_reason(), lost.token()), (Some(LossReason::Taken), Some(token)));
        let next = lock(&there, "/k").await;
        assert!(next.token() > token);
        next.release().await.expect("release");
    }
}

on_each_store! {
    on(redis, own);

    async fn unavailable_shard_is_an_error_and_the_service_is_not_called(store: &TestStore) {
        let locks = store.manager().await;
        let limit = Duration::from_secs(3);
        let requests = locks.clone();
        let layer = LockLayer::new(move |request: &Request<()>| {
            Some(requests.lock(request.uri().path()).timeout(limit))
        })
        .on_busy(|_: Request<()>| "skipped");
        let handler = service_fn(async |_: Request<()>| Ok::<_, Infallible>("served"));
        let service = ServiceBuilder::new().layer(layer).service(handler);
        assert_eq!(service.clone().oneshot(request("/k")).await.expect("a response"), "served");

        store.server().kill();
        until("the shard is down", async || {
            let error = service.clone().oneshot(request("/k")).await.expect_err("there is no server");
            let Some(LockLayerError::NotAcquired(error)) = error.downcast_ref() else {
                panic!("not an error of the layer: {error}");
            };
            error.kind() == LockErrorKind::Unavailable
        })
        .await;
    }
}
