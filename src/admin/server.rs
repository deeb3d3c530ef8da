//! The HTTP server. It runs on a separate thread with a separate runtime, so it answers even if the
//! application's runtime is stuck.
//!
//! # Implementation details
//!
//! Connections are bounded in number, size and time. Each connection carries one request.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HOST, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, oneshot};

use super::pages::{self, Page};
use super::{AddedPage, AdminError, Renderer};
use crate::manager_inner::ManagerInner;

/// The maximum number of concurrent connections; further ones wait to be accepted.
const CONNECTIONS_MAX: usize = 32;
/// How long a request may take to arrive.
const HEADER_TIME_MAX: Duration = Duration::from_secs(5);
/// How long a connection may last.
const CONNECTION_TIME_MAX: Duration = Duration::from_secs(15);
/// The maximum size of the head of a request, in bytes, and the maximum number of its fields.
const HEAD_BYTES_MAX: usize = 16 * 1024;
const FIELDS_MAX: usize = 64;
/// How often the recorder aggregates its samples, so that it does not grow.
const UPKEEP_EVERY: Duration = Duration::from_secs(1);
/// The pause after a failure to accept a connection, for example when file descriptors have run
/// out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A running endpoint. It stops when this is dropped.
#[derive(Debug)]
#[must_use = "the endpoint stops as soon as this is dropped"]
pub struct AdminServer {
    address: SocketAddr,
    /// Dropping it stops the thread.
    _stop: oneshot::Sender<Infallible>,
}

impl AdminServer {
    /// Returns the address on which it answers.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }
}

/// State shared by the connections.
struct Shared {
    renderer: Renderer,
    added: Vec<AddedPage>,
    manager: Weak<ManagerInner>,
    is_loopback: bool,
}

pub(super) fn start(
    listener: std::net::TcpListener,
    address: SocketAddr,
    renderer: Renderer,
    added: Vec<AddedPage>,
    manager: Weak<ManagerInner>,
) -> Result<AdminServer, AdminError> {
    let (stop, stopped) = oneshot::channel();
    listener.set_nonblocking(true).map_err(AdminError::Thread)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(AdminError::Thread)?;
    let shared = Arc::new(Shared {
        renderer,
        added,
        manager,
        is_loopback: address.ip().is_loopback(),
    });
    let serve = move || {
        runtime.block_on(async {
            match TcpListener::from_std(listener) {
                Ok(listener) => tokio::select! {
                    () = accept(listener, Arc::clone(&shared)) => {}
                    () = keep_up(&shared) => {}
                    _ = stopped => {}
                },
                Err(error) => crate::log::error!(%error, "the admin endpoint can't listen"),
            }
        });
    };
    std::thread::Builder::new()
        .name("shardlock-admin".into())
        .spawn(serve)
        .map_err(AdminError::Thread)?;
    Ok(AdminServer { address, _stop: stop })
}

async fn keep_up(shared: &Shared) {
    loop {
        tokio::time::sleep(UPKEEP_EVERY).await;
        (shared.renderer.upkeep)();
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        // The semaphore is never closed.
        let Ok(place) = Arc::clone(&room).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let shared = Arc::clone(&shared);
                tokio::spawn(async move {
                    let _place = place;
                    serve_one(stream, shared).await;
                });
            }
            Err(error) => {
                crate::log::debug!(%error, "the admin endpoint could not accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve_one(stream: TcpStream, shared: Arc<Shared>) {
    let service = service_fn(move |request| {
        let response = answer(&request, &shared);
        async move { Ok::<_, Infallible>(response) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME_MAX)
        .keep_alive(false)
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(FIELDS_MAX)
        .serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(CONNECTION_TIME_MAX, connection).await {
        Ok(Ok(())) => {}
        // Errors of the peer do not belong in our log above debug level.
        Ok(Err(error)) => crate::log::debug!(%error, "a connection to the admin endpoint failed"),
        Err(_) => crate::log::debug!("a connection to the admin endpoint took too long"),
    }
}

fn answer(request: &Request<Incoming>, shared: &Shared) -> Response<Full<Bytes>> {
    let page = if !matches!(*request.method(), Method::GET | Method::HEAD) {
        Page::text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD are answered\n")
    } else if shared.is_loopback && !names_this_machine(request) {
        // Prevents DNS rebinding: a foreign web page whose name was made to resolve to this machine
        // must not read the endpoint through the browser of a local user.
        Page::text(StatusCode::FORBIDDEN, "the host must be an IP address or localhost\n")
    } else {
        pages::page(
            request.uri().path(),
            &shared.renderer,
            &shared.added,
            shared.manager.upgrade().as_deref(),
        )
    };
    let mut response = Response::new(Full::new(Bytes::from(page.body)));
    *response.status_mut() = page.status;
    let fields = response.headers_mut();
    fields.insert(CONTENT_TYPE, HeaderValue::from_static(page.content_type));
    fields.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if page.status == StatusCode::METHOD_NOT_ALLOWED {
        fields.insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    }
    response
}

fn names_this_machine(request: &Request<Incoming>) -> bool {
    let Some(host) = request.headers().get(HOST) else {
        return true;
    };
    let Ok(authority) = host.to_str().unwrap_or_default().parse::<hyper::http::uri::Authority>() else {
        return false;
    };
    let host = authority.host();
    let is_address = host.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok();
    is_address || host.eq_ignore_ascii_case("localhost")
}
