//! A [`tower`](https://docs.rs/tower) layer that serves each request under a lock.
//!
//! [`LockLayer`] works with any service: handlers of axum, workers of apalis, clients of tonic. A
//! closure looks at each request and returns the lock that it needs, if any. The service is called
//! once the lock is held, and the lock is released when the service has responded.
//!
//! ```
//! use std::convert::Infallible;
//! use std::time::Duration;
//!
//! use http::{Request, Response};
//! use shardlock::LockManager;
//! use shardlock::tower::{Hold, LockLayer};
//! use tower::{ServiceBuilder, ServiceExt, service_fn};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
//! let locks = LockManager::connect("memory://").await?;
//!
//! let layer = LockLayer::new(move |request: &Request<String>| {
//!     // Requests for other paths need no lock.
//!     let account = request.uri().path().strip_prefix("/accounts/")?;
//!     Some(locks.lock(format!("account:{account}")).timeout(Duration::from_secs(2)))
//! })
//! .attach(|request: &mut Request<String>, hold: &Hold| {
//!     request.extensions_mut().insert(hold.clone());
//! });
//!
//! let handler = service_fn(async |request: Request<String>| {
//!     // Send the token along with each write.
//!     let hold: &Hold = request.extensions().get().expect("the layer has attached it");
//!     Ok::<_, Infallible>(Response::new(format!("written with token {}", hold.token())))
//! });
//! let service = ServiceBuilder::new().layer(layer).service(handler);
//!
//! let request = Request::put("/accounts/7").body(String::new())?;
//! let response = service.oneshot(request).await?;
//! assert!(response.into_body().starts_with("written with token "));
//! # Ok(()) }
//! ```
//!
//! # Waiting, refusing, skipping
//!
//! The closure returns a [`LockRequest`] or a [`TryLockRequest`], so each request decides on its
//! key, its mode ([`shared`](LockRequest::shared) for reads,
//! [`permits`](crate::LockManager::permits) for a limited partner) and its limits:
//!
//! | closure | if the key is held |
//! |---|---|
//! | `Some(locks.lock(key).timeout(limit))` | waits, and fails after `limit` |
//! | `Some(locks.try_lock(key))` | fails at once |
//! | either, with [`on_busy`](LockLayer::on_busy) | responds without calling the service |
//!
//! A job that must run once is skipped if another process runs it:
//!
//! ```
//! use shardlock::LockManager;
//! use shardlock::tower::{BoxError, LockLayer};
//! use tower::{ServiceBuilder, ServiceExt, service_fn};
//!
//! #[derive(Clone)]
//! struct Report(u32);
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), BoxError> {
//! let locks = LockManager::connect("memory://").await?;
//! let requests = locks.clone();
//! let lock_of = move |job: &Report| Some(requests.try_lock(format!("report:{}", job.0)));
//! let layer = LockLayer::new(lock_of).on_busy(|_job: Report| "skipped");
//! let worker = service_fn(async |_job: Report| Ok::<_, BoxError>("done"));
//! let worker = ServiceBuilder::new().layer(layer).service(worker);
//!
//! assert_eq!(worker.clone().oneshot(Report(1)).await?, "done");
//! let elsewhere = locks.lock("report:1").await?;
//! assert_eq!(worker.clone().oneshot(Report(1)).await?, "skipped");
//! assert_eq!(worker.oneshot(Report(2)).await?, "done");
//! # elsewhere.release().await?;
//! # Ok(()) }
//! ```
//!
//! # Errors
//!
//! The error of the service is a [`BoxError`]: that of the inner service, or a [`LockLayerError`].
//! axum's `HandleErrorLayer` turns it into a response:
//!
//! ```
//! use http::StatusCode;
//! use shardlock::tower::{BoxError, LockLayerError};
//!
//! async fn refuse(error: BoxError) -> (StatusCode, String) {
//!     let status = match error.downcast_ref::<LockLayerError>() {
//!         Some(error) if error.is_busy() => StatusCode::CONFLICT,
//!         Some(_) => StatusCode::SERVICE_UNAVAILABLE,
//!         None => StatusCode::INTERNAL_SERVER_ERROR,
//!     };
//!     (status, error.to_string())
//! }
//! ```
//!
//! If the lock is lost, the future of the inner service is dropped and the error is
//! [`LockLayerError::Lost`].
//!
//! # What the lock covers
//!
//! The lock is held until the inner service has returned its response and the server has confirmed
//! the release. The body of an HTTP response that is streamed after that is not covered, and
//! neither is a task that the service has spawned.
//!
//! A request that waits for its lock has already passed `poll_ready` of the inner service, so it
//! occupies a place in a concurrency limit inside of the layer. Put such a limit outside of the
//! layer to bound the requests that wait, and use
//! [`max_waiters_per_key`](crate::config::Config::max_waiters_per_key) to bound them per key.
//!
//! # Cancel safety
//!
//! Dropping the future of a response gives up the place in the queue, or drops the future of the
//! inner service and then releases the lock in the background. A server that drops the futures of
//! clients which disconnect, as hyper does, therefore leaves nothing locked.

mod error;
mod hold;
#[cfg(test)]
mod tests;

use std::fmt;
use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tower_layer::Layer;
use tower_service::Service;

pub use self::error::{BoxError, LockLayerError};
use self::hold::EndOnDrop;
pub use self::hold::Hold;
use crate::body::while_held;
use crate::guard::LockGuard;
use crate::request::{LockRequest, TryLockRequest};

/// Serves each request under the lock that a closure chooses for it. See the
/// [module](crate::tower) for examples.
///
/// `F` is the closure that returns the request for the lock, `A` attaches the [`Hold`] to the
/// request, and `B` makes the response to a request whose key is held.
pub struct LockLayer<F, A = (), B = ()> {
    request: Arc<F>,
    attach: Arc<A>,
    on_busy: Arc<B>,
}

impl<F> LockLayer<F> {
    /// Creates a layer from a closure that returns the request for the lock of each request, or
    /// `None` if it needs no lock.
    ///
    /// The closure need not check the key: with one that is empty or too long, the request fails
    /// with [`LockErrorKind::Invalid`](crate::error::LockErrorKind::Invalid).
    pub fn new<Req, R>(request: F) -> Self
    where
        F: Fn(&Req) -> Option<R>,
        R: Acquire,
    {
        Self {
            request: Arc::new(request),
            attach: Arc::new(()),
            on_busy: Arc::new(()),
        }
    }
}

impl<F, B> LockLayer<F, (), B> {
    /// Calls a closure once the lock is held and before the service is called, to put the [`Hold`]
    /// or its token where the service finds it, as in
    /// `request.extensions_mut().insert(hold.clone())`.
    pub fn attach<Req, A>(self, attach: A) -> LockLayer<F, A, B>
    where
        A: Fn(&mut Req, &Hold),
    {
        LockLayer {
            request: self.request,
            attach: Arc::new(attach),
            on_busy: self.on_busy,
        }
    }
}

impl<F, A> LockLayer<F, A> {
    /// Responds with the result of a closure if the key is held, that is, if a [`TryLockRequest`]
    /// found it held or the timeout of a [`LockRequest`] has passed. Without this, the request
    /// fails with an error for which [`LockLayerError::is_busy`] is true.
    ///
    /// Other errors, such as an unavailable shard, remain errors.
    pub fn on_busy<Req, Res, B>(self, respond: B) -> LockLayer<F, A, B>
    where
        B: Fn(Req) -> Res,
    {
        LockLayer {
            request: self.request,
            attach: self.attach,
            on_busy: Arc::new(respond),
        }
    }
}

impl<F, A, B> Clone for LockLayer<F, A, B> {
    fn clone(&self) -> Self {
        Self {
            request: Arc::clone(&self.request),
            attach: Arc::clone(&self.attach),
            on_busy: Arc::clone(&self.on_busy),
        }
    }
}

impl<F, A, B> fmt::Debug for LockLayer<F, A, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockLayer").finish_non_exhaustive()
    }
}

impl<S, F, A, B> Layer<S> for LockLayer<F, A, B> {
    type Service = LockService<S, F, A, B>;

    fn layer(&self, inner: S) -> Self::Service {
        LockService {
            inner,
            layer: self.clone(),
        }
    }
}

/// The service of a [`LockLayer`].
pub struct LockService<S, F, A = (), B = ()> {
    inner: S,
    layer: LockLayer<F, A, B>,
}

impl<S: Clone, F, A, B> Clone for LockService<S, F, A, B> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            layer: self.layer.clone(),
        }
    }
}

impl<S: fmt::Debug, F, A, B> fmt::Debug for LockService<S, F, A, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockService")
            .field("inner", &self.inner)
            .finish_non_exhaustive()
    }
}

impl<S, F, A, B, Req, R> Service<Req> for LockService<S, F, A, B>
where
    Req: Send + 'static,
    S: Service<Req, Response: Send, Error: Into<BoxError>, Future: Send> + Clone + Send + 'static,
    F: Fn(&Req) -> Option<R>,
    R: Acquire,
    A: Attach<Req> + Send + Sync + 'static,
    B: OnBusy<Req, S::Response> + Send + Sync + 'static,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = ResponseFuture<S::Response>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, mut request: Req) -> Self::Future {
        // The service that is ready is the one that was polled; its clone is not.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        let Some(wanted) = (self.layer.request)(&request) else {
            let response = inner.call(request);
            return ResponseFuture(Box::pin(async { response.await.map_err(Into::into) }));
        };
        let (attach, on_busy) = (Arc::clone(&self.layer.attach), Arc::clone(&self.layer.on_busy));
        ResponseFuture(Box::pin(async move {
            let guard = match wanted.acquire().await {
                Ok(guard) => guard,
                Err(error) if error.is_busy() => return on_busy.respond(request).ok_or_else(|| error.into()),
                Err(error) => return Err(error.into()),
            };
            // Declared after the guard, so that it is dropped before the guard.
            let hold = EndOnDrop(Hold::new(&guard));
            attach.attach(&mut request, &hold.0);
            let response = async { inner.call(request).await.map_err(Into::into) };
            let Some(response) = while_held(guard.lost(), || guard.is_valid(), response).await else {
                return Err(LockLayerError::Lost(guard.lost_error(guard.lost().await)).into());
            };
            drop(hold);
            match guard.release().await {
                Err(error) if error.is_lost() => Err(LockLayerError::Lost(error).into()),
                // A release without a confirmation is repeated in the background. The service did
                // run under the lock.
                _ => response,
            }
        }))
    }
}

/// The future of a [`LockService`].
#[must_use = "futures do nothing unless polled"]
pub struct ResponseFuture<Res>(Pin<Box<dyn Future<Output = Result<Res, BoxError>> + Send>>);

impl<Res> Future for ResponseFuture<Res> {
    type Output = Result<Res, BoxError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(cx)
    }
}

impl<Res> fmt::Debug for ResponseFuture<Res> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}

/// A request for a lock: a [`LockRequest`], which waits, or a [`TryLockRequest`], which does not.
/// No other types implement it.
pub trait Acquire: private::Acquire {}

impl Acquire for LockRequest {}

impl Acquire for TryLockRequest {}

/// Puts the [`Hold`] of a lock into the request that is served under it. Implemented for closures,
/// and for `()`, which does nothing.
pub trait Attach<Req> {
    /// Changes the request before the inner service is called with it.
    fn attach(&self, request: &mut Req, hold: &Hold);
}

impl<Req> Attach<Req> for () {
    fn attach(&self, _: &mut Req, _: &Hold) {}
}

impl<Req, A: Fn(&mut Req, &Hold)> Attach<Req> for A {
    fn attach(&self, request: &mut Req, hold: &Hold) {
        self(request, hold);
    }
}

/// Makes the response to a request whose key is held. Implemented for closures, and for `()`, with
/// which the request fails.
pub trait OnBusy<Req, Res> {
    /// Returns the response, or `None` if the request fails.
    fn respond(&self, request: Req) -> Option<Res>;
}

impl<Req, Res> OnBusy<Req, Res> for () {
    fn respond(&self, _: Req) -> Option<Res> {
        None
    }
}

impl<Req, Res, B: Fn(Req) -> Res> OnBusy<Req, Res> for B {
    fn respond(&self, request: Req) -> Option<Res> {
        Some(self(request))
    }
}

mod private {
    use super::{Future, IntoFuture, LockGuard, LockLayerError, LockRequest, TryLockRequest};

    /// Hidden, so that only requests of this crate acquire locks for a layer.
    pub trait Acquire: Send + 'static {
        fn acquire(self) -> impl Future<Output = Result<LockGuard, LockLayerError>> + Send;
    }

    impl Acquire for LockRequest {
        async fn acquire(self) -> Result<LockGuard, LockLayerError> {
            self.into_future().await.map_err(LockLayerError::NotAcquired)
        }
    }

    impl Acquire for TryLockRequest {
        async fn acquire(self) -> Result<LockGuard, LockLayerError> {
            let key = self.key_name();
            match self.into_future().await {
                Ok(Some(guard)) => Ok(guard),
                Ok(None) => Err(LockLayerError::Busy { key }),
                Err(error) => Err(LockLayerError::NotAcquired(error)),
            }
        }
    }
}
